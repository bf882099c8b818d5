"""Models of transformers are built from configurations here; nothing is looked up on the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
