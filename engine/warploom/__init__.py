"""warploom trains transformer language models from scratch on hand-written kernels. This is the public surface.

What the ops, the models and their sampling need is torch alone, and is imported here. A trainer reads and writes files
with a dozen libraries more, so its names are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING

from warploom import _openmp as _openmp  # first: it acts when it is imported
from warploom.errors import UserError
from warploom.generate.beam import beam_search
from warploom.generate.distribution import SamplingConfig
from warploom.generate.sampler import generate
from warploom.models.config import TransformerConfig
from warploom.models.presets import preset
from warploom.models.transformer import Transformer
from warploom.ops import backend
from warploom.patch import patch, unpatch
from warploom.train.config import OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig

if TYPE_CHECKING:
    from warploom.evaluation.perplexity import evaluate
    from warploom.train.load_model import LoadedModel, load_model
    from warploom.train.result import TrainResult
    from warploom.train.run import TextConfig, train_on_text
    from warploom.train.trainer import Trainer

__all__ = [
    "LoadedModel",
    "OptimizerConfig",
    "RunConfig",
    "SamplingConfig",
    "ScheduleConfig",
    "TextConfig",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "Transformer",
    "TransformerConfig",
    "UserError",
    "backend",
    "beam_search",
    "evaluate",
    "generate",
    "load_model",
    "patch",
    "preset",
    "train_on_text",
    "unpatch",
]

_HOMES = {
    "LoadedModel": "warploom.train.load_model",
    "TextConfig": "warploom.train.run",
    "TrainResult": "warploom.train.result",
    "Trainer": "warploom.train.trainer",
    "evaluate": "warploom.evaluation.perplexity",
    "load_model": "warploom.train.load_model",
    "train_on_text": "warploom.train.run",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
