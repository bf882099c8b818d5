"""warploom trains transformer language models from scratch on hand-written kernels. This is the public surface."""

from warploom import _openmp as _openmp  # first: it acts when it is imported
from warploom.errors import UserError
from warploom.evaluate.perplexity import evaluate
from warploom.generate.beam import beam_search
from warploom.generate.distribution import SamplingConfig
from warploom.generate.sampler import generate
from warploom.models.config import TransformerConfig
from warploom.models.presets import preset
from warploom.models.transformer import Transformer
from warploom.ops import backend
from warploom.patch import patch, unpatch
from warploom.train.config import OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig
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
