"""Named tensors, wherever they are stored: read one at a time, never all at once."""
