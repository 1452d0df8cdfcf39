"""The cheapest pipeline that keeps a model's accuracy: `vlmcompress tune`.

`space` says what is searched, `goal` what is admissible, `halving` searches, `finalists` says what
is worth a test on samples that nobody has seen, `confirm` tests it, `evidence` holds the
statistics of both, `judge` is what they ask, `models` and `costs` answer it for a real model, and
`run` goes through it all.
"""

from __future__ import annotations
