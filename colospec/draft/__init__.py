"""Draft algorithms: one folder each, found through `catalog` and `registry`."""
