"""How good a trained model is: held-out loss, perplexity, bits per byte."""
