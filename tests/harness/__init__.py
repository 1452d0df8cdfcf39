"""Tests of the measuring harness."""
