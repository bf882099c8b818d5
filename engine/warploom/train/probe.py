"""What --budget has to know of a machine and can only measure: matrix rates, free memory, the time of a real step."""

from __future__ import annotations

import functools
import time

import torch

from warploom.data.loader import Loader
from warploom.data.shards import TokenDataset
from warploom.models.config import TransformerConfig
from warploom.models.transformer import Transformer
from warploom.nn.linear import keep_packed
from warploom.optim import build_optimizers
from warploom.train import matmul_rate
from warploom.train.allocator import keep_freed_memory
from warploom.train.batch_size import available_bytes
from warploom.train.budget import BatchShape, BudgetPlan, Corpus, Machine, StepTimer, optimizer_for, plan
from warploom.train.step import training_step

_STEPS = 3
_LONGEST_S = 10.0  # per size; of steps so slow that three do not fit, one is enough


def plan_on_this_machine(left_s: float, dataset: TokenDataset, device: torch.device) -> BudgetPlan:
    """Plan a run that is over in left_s seconds, with sizes timed on `device`; takes some seconds itself."""
    if device.type == "cpu":
        keep_freed_memory()  # as the trainer does: it changes the time of a step
    split = dataset.train
    corpus = Corpus(split.num_tokens, split.num_bytes, dataset.tokenizer.vocab_size)
    return plan(left_s, corpus, measure_machine(device), step_timer(dataset, device))


def measure_machine(device: torch.device) -> Machine:
    """Measure the matrix rates in float32 and bfloat16, about 0.3 s each, and read the free memory."""
    memory_bytes = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    rates = {dtype: matmul_rate.measure(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    return Machine("cuda" if device.type == "cuda" else "cpu", rates, memory_bytes)


def step_timer(dataset: TokenDataset, device: torch.device) -> StepTimer:
    """Return a function that trains a fresh model for a few real steps and gives the seconds of the fastest."""

    def step_seconds(config: TransformerConfig, shape: BatchShape, dtype: torch.dtype) -> float:
        model = Transformer(config).to(device)
        model.compute_dtype = dtype
        packed = keep_packed(model)
        optimizers = build_optimizers(model, optimizer_for(config), muon_dtype=dtype, packed=packed)
        batches = Loader(dataset.train, seq_len=shape.seq_len, micro_batch_size=shape.micro_batch_size, seed=0)
        loss_sum = functools.partial(model.loss, reduction="sum")
        durations: list[float] = []
        started = time.perf_counter()
        # The first step, which fills caches and allocators, is not counted.
        while len(durations) <= _STEPS and (not durations or time.perf_counter() - started < _LONGEST_S):
            before = time.perf_counter()
            micro_batches = [next(batches) for _ in range(shape.global_batch_size // shape.micro_batch_size)]
            training_step(loss_sum, micro_batches, list(model.parameters()), optimizers, grad_clip=1.0)
            durations.append(time.perf_counter() - before)
        # A busy neighbour only adds to a step, and for one size it may have come while it was timed, for another not.
        return min(durations[1:] or durations)

    return step_seconds
