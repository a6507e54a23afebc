"""Train the draft model of speculative decoding on the GPUs that run its target."""

__version__ = "0.1.0"
