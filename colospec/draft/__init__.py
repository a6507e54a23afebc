"""Draft algorithms: one module each, found through `registry`."""
