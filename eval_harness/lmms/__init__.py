"""Runs of lmms-eval from here: `runs` starts them, `equality` holds them against `eval run`."""
