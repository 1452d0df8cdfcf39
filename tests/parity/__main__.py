"""`python -m tests.parity` writes which cases every method meets, for the table of methods."""

from tests.parity.index import PATH, as_text

if __name__ == "__main__":
    PATH.write_text(as_text(), encoding="utf-8")
