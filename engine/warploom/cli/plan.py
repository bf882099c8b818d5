"""`warploom plan`: parameters, operations, memory, layouts, time and cost of a training run, before it is paid for."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from warploom.errors import UserError
from warploom.models.config import TransformerConfig
from warploom.models.presets import PRESETS, preset
from warploom.optim import OptimizerConfig
from warploom.plan.forecast import TOKENS_PER_PARAMETER, Forecast, cheapest_change, fastest, forecast
from warploom.plan.hardware import Hardware, device_named
from warploom.plan.here import measure, this_device
from warploom.plan.layout import RESERVED, Layout, Memory, Workload, checkpoint_copy_bytes, memory, meta_model
from warploom.plan.run_error import run_error
from warploom.plan.timing import flops_per_token
from warploom.train.device import choose_device
from warploom.train.monitor import format_duration

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Tokens per update by the run's tokens: of the order of what published runs took.
_BATCH_TOKENS = ((1e9, 1 << 15), (10e9, 1 << 19), (100e9, 1 << 20), (float("inf"), 1 << 22))
_ORDERS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_HERE = ("nano", "tiny", "small", "base", "gpt2")  # whose blocks take seconds to time
_SIZES = ("small", "base", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "llama2-7b", "llama2-70b", "gpt3-175b")


@dataclass(frozen=True)
class Command:
    """Say what a training run takes: parameters, FLOPs, memory, the layouts that fit, time, cost.

    Without a preset or a configuration: how long it takes to train models of many sizes on this hardware.
    """

    preset: str | None = None
    """A model by name, such as small, gpt2 or llama2-7b; --model.* changes parts of it."""
    config: Path | None = None
    """A TOML file with the settings below and [model]; flags win over it."""
    tokens: str | None = None
    """Tokens to train on, such as 500M, 300B or 2T; left out, 20 per parameter."""
    hardware: str = "here"
    """v100, a100-40gb, a100-80gb, h100, h200, b200, rtx4090; or here, this machine, which is measured."""
    devices: int = 1
    """How many of them."""
    price: float | None = None
    """US dollars for an hour of one device; left out, a usual price."""
    batch_tokens: str | None = None
    """Tokens per update, such as 4M; left out, by the length of the run."""
    seq_len: int = 0
    """Tokens per sequence; 0 takes the model's max_seq_len."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Compute type."""
    micro_batch_size: int = 1
    """Sequences at a time on one device, in the layout asked about."""
    grad_checkpointing: Literal["none", "blocks", "ops"] = "none"
    """As train.grad_checkpointing, in the layout asked about."""
    shard: int = 1
    """Devices that share one fully sharded copy, in the layout asked about."""
    tensor: int = 1
    """Devices that share each matrix product, likewise."""
    pipeline: int = 1
    """Stages, likewise."""
    context: int = 1
    """Devices that share each sequence, likewise."""
    after: Path | None = None
    """The folder of a finished run of this machine: say how far a forecast is from it, and stop."""
    model: TransformerConfig = field(default_factory=TransformerConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(name="adamw"))

    @staticmethod
    def expand_preset(name: str) -> dict[str, Any]:
        return {"model": dataclasses.asdict(preset(name))}

    def run(self) -> None:
        if self.after is not None:
            print(f"Forecast against the run in {self.after}: {run_error(self.after)}")
        elif self.preset is None and self.config is None:
            self._answer()
        else:
            self._plan()

    def _hardware(self) -> Hardware:
        if self.hardware == "here":
            if self.devices != 1:
                raise UserError(f"devices is {self.devices} and hardware 'here' is one; name a device, such as h100")
            device = this_device(choose_device("auto"), _DTYPES[self.dtype])
        else:
            device = device_named(self.hardware)
        if self.price is not None:
            device = dataclasses.replace(device, price=self.price)
        return Hardware(device, self.devices)

    def _workload(self, model: TransformerConfig) -> Workload:
        tokens = count("tokens", self.tokens) if self.tokens else TOKENS_PER_PARAMETER * parameters(model)
        seq_len = self.seq_len or model.max_seq_len
        if seq_len > model.max_seq_len:
            raise UserError(f"seq_len is {seq_len}, more than model.max_seq_len {model.max_seq_len}; lower it")
        usual = next(size for limit, size in _BATCH_TOKENS if tokens <= limit)
        batch_tokens = count("batch_tokens", self.batch_tokens) if self.batch_tokens else usual
        # A multiple of a power of two, so that the batch divides over devices.
        sequences = max(1, round(batch_tokens / seq_len))
        sequences = max(self.devices * self.micro_batch_size, sequences)
        sequences -= sequences % (self.devices * self.micro_batch_size)
        return Workload(model, tokens, seq_len, sequences, _DTYPES[self.dtype], self.optimizer)

    def _layout(self) -> Layout:
        group = self.tensor * self.pipeline * self.context
        if self.devices % (group * self.shard):
            sizes = [size for size in range(1, self.devices + 1) if self.devices % (group * size) == 0]
            raise UserError(
                f"shard {self.shard} x tensor {self.tensor} x pipeline {self.pipeline} x context {self.context} does "
                f"not divide {self.devices} devices"
                + (f"; shard {', '.join(map(str, sizes))} would" if sizes else "; make the last three smaller")
            )
        return Layout(
            *(self.devices // (group * self.shard), self.shard, self.tensor, self.pipeline, self.context),
            micro_batch_size=self.micro_batch_size,
            recompute=self.grad_checkpointing,
        )

    def _plan(self) -> None:
        hardware, workload, layout = self._hardware(), self._workload(self.model), self._layout()
        show_workload(workload, self.tokens is None)
        if self.hardware == "here":
            show_here(workload, layout, hardware)
            return
        asked = forecast(workload, layout, hardware)
        device = hardware.device
        print(f"\nOn {hardware.count} x {device.name} ({device.memory_bytes / 1e9:.0f} GB each), {layout}:")
        show_memory(asked.memory, device.memory_bytes)
        show_checkpoint_copy(workload, layout)
        show_time(asked)
        change = cheapest_change(workload, layout, hardware)
        if change is not None:
            print(
                f"It does not fit. The cheapest change after which it does: {change.what}; {summary(change.forecast)}."
            )
        elif not asked.fits:
            print("It does not fit, and neither does any layout of up to 4096 times as many devices.")
        best = fastest(workload, hardware)
        if best:
            print("\nThe fastest layouts that fit:")
        for one in best:
            print(f"  {one.layout}: {one.memory.total / 1e9:.1f} GB, {summary(one)}")

    def _answer(self) -> None:
        hardware = self._hardware()
        print("How long does it take to train an LLM from scratch?")
        tokens = f"{self.tokens} tokens" if self.tokens else f"{TOKENS_PER_PARAMETER} tokens per parameter"
        print(f"On {hardware.count} x {hardware.device.name}, {tokens}:\n")
        for name in _HERE if self.hardware == "here" else _SIZES:
            workload = self._workload(PRESETS[name])
            size = f"{parameters(workload.model) / 1e6:,.0f} M parameters"
            head = f"  {name:<12}{size:>21}, {short(workload.tokens):>5} tokens: "
            if self.hardware == "here":
                layout = Layout(micro_batch_size=1)
                total_s = measure(workload, layout, choose_device("auto")).total * workload.steps
                print(head + duration(total_s))
                continue
            best = fastest(workload, hardware, 1)
            if best:
                print(f"{head}{summary(best[0])}, {best[0].layout}")
            else:
                change = cheapest_change(workload, Layout(data=hardware.count), hardware)
                print(head + (f"does not fit; {change.what}: {summary(change.forecast)}" if change else "does not fit"))


def count(name: str, text: str) -> float:
    """Read "500M", "2T" or "3e11" as a number. Raises UserError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmbt]?)", text.strip().lower())
    if match is None or not float(match[1]) > 0:
        raise UserError(f"{name} is {text!r}; write it like 500M, 300B or 2T")
    return float(match[1]) * _ORDERS[match[2]]


def short(number: float) -> str:
    size, letter = next((size, letter) for letter, size in reversed(_ORDERS.items()) if number >= size or not letter)
    return f"{number / size:.3g}{letter.upper()}"


def duration(seconds: float) -> str:
    return format_duration(seconds) if seconds < 2 * 86400 else f"{seconds / 86400:,.1f} days"


def parameters(model: TransformerConfig) -> int:
    return meta_model(model).num_parameters()


def show_workload(workload: Workload, suggested: bool) -> None:
    flops = flops_per_token(workload)
    n, tokens = parameters(workload.model), workload.tokens
    why = ", where a given compute goes furthest" if suggested else ""
    print(f"parameters       {n:,}")
    print(f"tokens           {short(tokens)} ({tokens / n:.0f} per parameter){why}")
    print(f"batch            {workload.global_batch_size} x {workload.seq_len} tokens, {workload.steps:,} steps")
    print("FLOPs            of a token and of the run, forward and backward")
    for name, per_token in (
        ("6 N", flops.six_n),
        ("6 N + attention over all keys", flops.six_n + flops.attention_full),
        ("6 N + the causal half", flops.six_n + flops.attention),
        ("products + attention over all keys", flops.full),
        ("products + the causal half", flops.causal),
    ):
        print(f"  {name:<35}{per_token:>10.3g}{per_token * tokens:>12.3g}")


def show_memory(found: Memory, memory_bytes: float) -> None:
    parts = ", ".join(f"{part.name} {getattr(found, part.name) / 1e9:.2f}" for part in dataclasses.fields(found))
    room = (1 - RESERVED) * memory_bytes
    verdict = "fits" if found.total <= room else "does not fit"
    print(f"memory           {found.total / 1e9:.2f} GB of {room / 1e9:.1f}, {verdict}: {parts}")


def show_checkpoint_copy(workload: Workload, layout: Layout, device: str = "cuda") -> None:
    copy = checkpoint_copy_bytes(workload, layout, device) / 1e9
    print(f"host             {copy:.2f} GB more per process, from which checkpoints are written in the background")


def show_time(one: Forecast) -> None:
    parts = [(part.name, getattr(one.time, part.name) / one.time.total) for part in dataclasses.fields(one.time)]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in sorted(parts, key=lambda p: -p[1]) if share >= 0.005)
    print(f"step             {one.time.total:.3g} s: {shares}")
    print(f"run              {summary(one)}")


def summary(one: Forecast) -> str:
    return (
        f"{duration(one.total_s)}, {one.device_hours:,.0f} device-hours, ${one.cost:,.0f}, "
        f"{one.mfu:.0%} of the peak in the model's own operations"
    )


def show_here(workload: Workload, layout: Layout, hardware: Hardware) -> None:
    device = choose_device("auto")
    found = measure(workload, layout, device)
    total_s = found.total * workload.steps
    print(f"\nOn this machine ({device.type}), {layout}, timed on models one and two blocks deep:")
    show_memory(memory(workload, layout, device.type), hardware.device.memory_bytes)
    show_checkpoint_copy(workload, layout, device.type)
    print(f"step             {found.total:.3g} s: passes {found.passes:.3g}, update {found.update:.3g}")
    print(f"run              {duration(total_s)}")
