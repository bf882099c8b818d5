"""What became of a forecast: a finished run against what would have been said of it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from warploom.errors import UserError
from warploom.plan.here import measure
from warploom.plan.layout import Layout, Workload, memory
from warploom.train.config import RunConfig
from warploom.train.device import choose_device, choose_dtype
from warploom.train.load_model import load_model
from warploom.train.monitor import METRICS_FILE
from warploom.train.report import read_metrics


@dataclass(frozen=True)
class RunError:
    """Forecast and fact of one run on this machine."""

    forecast_bytes: float
    peak_bytes: float  # 0 where nothing counted it
    forecast_s: float
    step_s: float  # of the median step

    def __str__(self) -> str:
        time = f"a step {_against(self.forecast_s, self.step_s, 's', 1.0)}"
        if not self.peak_bytes:
            return f"{time}; nothing counted the memory of tensors."
        return f"memory {_against(self.forecast_bytes, self.peak_bytes, 'GB', 1e9)}, {time}."


def _against(forecast: float, fact: float, unit: str, size: float) -> str:
    return f"{forecast / size:.3g} {unit} forecast and {fact / size:.3g} {unit} taken ({forecast / fact - 1:+.1%})"


def run_error(run_dir: Path) -> RunError:
    """Forecast the run that run_dir holds, on this machine now, and compare. Raises UserError if it holds none."""
    path = run_dir / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{run_dir} holds no {METRICS_FILE}; give the folder of a run of `warploom train`")
    metrics = read_metrics(path).steps
    loaded = load_model(run_dir, on_skip=lambda text: None)
    workload, layout, device = as_workload(loaded.config, loaded.micro_batch_size)
    forecast_s = measure(workload, layout, device).total
    peaks = [value for _, value in metrics.get("tensors_peak_bytes", [])]
    steps = [value for _, value in metrics["step_s"]]
    forecast_bytes = memory(workload, layout, device.type).total
    return RunError(forecast_bytes, max(peaks, default=0), forecast_s, statistics.median(steps))


def as_workload(config: RunConfig, micro_batch_size: int) -> tuple[Workload, Layout, torch.device]:
    """Return what a run of this configuration trains, on one device, as plans have it."""
    train = config.train
    device = choose_device(train.device)
    workload = Workload(
        config.model,
        (train.steps or 1) * train.global_batch_size * train.seq_len,
        train.seq_len,
        train.global_batch_size,
        choose_dtype(train.dtype, device),
        config.optimizer,
    )
    recompute = "blocks" if train.grad_checkpointing == "budget" else train.grad_checkpointing
    return workload, Layout(micro_batch_size=micro_batch_size, recompute=recompute), device
