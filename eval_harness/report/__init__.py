"""One page of everything that was measured: `vlmcompress report`.

`inputs` reads results, `regressions` finds what compression breaks, `pictures` shows what the
language model saw of it, `figures` draws, and `page` puts all of it into one HTML file that needs
nothing else.
"""

from __future__ import annotations
