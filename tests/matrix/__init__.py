"""The full matrix: every method on every family, kernel and dtype, and the file of its results."""
