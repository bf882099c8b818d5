"""The transformer, its configuration, and configurations by name."""

from warploom.models.config import TransformerConfig
from warploom.models.presets import PRESETS, preset
from warploom.models.transformer import Transformer

__all__ = ["PRESETS", "Transformer", "TransformerConfig", "preset"]
