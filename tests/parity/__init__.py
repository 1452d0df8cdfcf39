"""Comparison with numbers made by the original implementations."""
