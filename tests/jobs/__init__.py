"""Whole jobs, started as a user starts them, on the tiny target."""
