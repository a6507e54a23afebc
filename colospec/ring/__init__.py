"""Slots that carry features from an engine to its trainer."""
