"""Tests of the seam between a live model and its compression."""
