"""The training loop: FSDP2, optimizer, metrics."""
