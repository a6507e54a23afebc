"""Look at a machine before a run does: `python -m colospec.doctor`."""
