"""Models x methods x keeps x tasks: `vlmcompress eval run`.

`plan` says what is asked, `tasks` reads questions, `metrics` scores answers, `asker` runs the
model, `store` keeps every answer as it comes, `results` compares, and `run` goes through it all.
"""

from __future__ import annotations
