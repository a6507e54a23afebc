"""Measure acceptance length: real, by speculative decoding; simulated, by training accuracy."""
