"""How good a trained model is: loss, perplexity and bits per byte of text, and benchmarks."""
