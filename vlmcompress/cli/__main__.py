"""`python -m vlmcompress.cli`, for where the console script is not on the path."""

from vlmcompress.cli import app

app(prog_name="vlmcompress")
