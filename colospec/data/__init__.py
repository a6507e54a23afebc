"""From rows of text to packed micro-batches: load and tokenise, mask, plan."""
