"""Tensor algorithms shared by methods; they know no model."""
