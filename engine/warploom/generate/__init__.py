"""Writing text with a model: sampling, the key-value cache, beam search."""
