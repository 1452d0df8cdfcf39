"""Training what methods learn."""
