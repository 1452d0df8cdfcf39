"""Everything that touches a live model: every hook goes on and comes off in this package."""
