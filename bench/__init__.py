"""Benchmarks. `python -m bench.<name>` from the checkout; nothing in the package imports this."""
