"""Optimizers, the choice of parameters for them, and the learning-rate schedule."""

from warploom.optim.adamw import AdamW
from warploom.optim.build import OptimizerConfig, build_optimizers
from warploom.optim.muon import Muon
from warploom.optim.schedule import ScheduleConfig, lr_multiplier

__all__ = ["AdamW", "Muon", "OptimizerConfig", "ScheduleConfig", "build_optimizers", "lr_multiplier"]
