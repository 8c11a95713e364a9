"""What a checkpoint's small documents say of its tensors: one function for a kind of input."""
