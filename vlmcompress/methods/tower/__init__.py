"""Methods inside the vision tower: tokens are dropped or merged between its blocks."""
