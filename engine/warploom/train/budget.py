"""--budget 10m: the one dial for a newcomer. From a time, the corpus and the measured speed of the machine it chooses
the vocabulary, the model, the batch, the learning rate and the number of steps, says why, and keeps to the time.

Nothing here trains or reads a clock: the speed comes in as a function, so every decision can be tested with made-up
machines.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from warploom.errors import UserError
from warploom.models.config import TransformerConfig
from warploom.optim import OptimizerConfig, ScheduleConfig
from warploom.train.estimate import estimate
from warploom.train.monitor import format_duration

SHORTEST_S = 20.0
_UNITS_S = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(text: str) -> float:
    """Read "90s", "10m", "1.5h" or "1h30m" as seconds. Raises UserError for anything else, or under 20 s."""
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([a-z]+)", text.strip().lower())
    if not parts or "".join(number + unit for number, unit in parts) != re.sub(r"\s", "", text.lower()):
        raise UserError(f"budget is {text!r}, which is no duration; write it like 90s, 10m or 1.5h")
    for _, unit in parts:
        if unit not in _UNITS_S:
            raise UserError(f"budget is {text!r}, with the unknown unit {unit!r}; write it like 90s, 10m or 1.5h")
    seconds = sum(float(number) * _UNITS_S[unit] for number, unit in parts)
    if not seconds >= SHORTEST_S:
        raise UserError(f"budget is {text!r}, too short to train anything; give at least {SHORTEST_S:.0f}s")
    return seconds


# Rows of (text smaller than this, vocabulary). More text supports more words, each seen often enough to be learned; a
# larger vocabulary puts more text behind each token, and costs more in the output layer.
_VOCABULARIES = ((200e3, 512), (2e6, 1024), (8e6, 2048), (100e6, 4096), (1e9, 8192), (10e9, 16384))
_LARGEST_VOCABULARY = 32768

# (d_model, layers), each with two to three times the parameters of the one before.
_SIZES = (
    (64, 2), (64, 4), (96, 4), (128, 4), (192, 4), (256, 5), (384, 6), (512, 8), (640, 10), (768, 12), (1024, 14),
    (1280, 18), (1536, 24), (2048, 28),
)  # fmt: skip

# Rows of (fewer passes over the corpus than this, dropout): what is read often enough is learned by heart.
_DROPOUTS = ((4.0, 0.0), (12.0, 0.1), (math.inf, 0.2))

_SCHEDULE = ScheduleConfig(kind="wsd", decay_fraction=0.6, min_lr_ratio=0.0)
_USUAL_SHARE = 0.3  # of the matrix rate that a training step reaches; assumed until a size was timed
_MEMORY_SHARE = 0.5  # of what is free, for the estimate to stay below

# Evaluations: how many, and of how many tokens, as shares of the run's. Without a backward pass a token costs a third,
# so that all of them together cost a twentieth of the time at most.
_EVALUATIONS = 10
_EVAL_SHARE, _MOST_EVAL_SHARE, _ALL_EVALS_SHARE = 0.01, 0.1, 0.15
_WANTED_EVAL_TOKENS, _MOST_EVAL_TOKENS = 20_000, 1_000_000
_EVAL_COST = 1 / 3

# After the last step come an evaluation, which is reckoned, and checkpoint, samples and report: so much for those.
_RESERVE, _RESERVE_S = 0.02, 3.0
_LEAST_TRAIN_S = 5.0

# Moments, as shares of the run, at which the number of steps is set anew from the pace since the one before. The first
# comes early, when the schedule is still flat; the last bounds what a late change of pace can do. Where the machine has
# become so slow that none of them comes for this share of the time, it is done then.
_CORRECTIONS = (0.05, 0.25, 0.5, 0.75, 0.9)
_LONGEST_UNCORRECTED = 0.1

# Of the budget: what is kept back at most for what follows the last step, however slow the machine has become.
_LARGEST_RESERVE = 0.25


def vocab_size(corpus_bytes: int) -> int:
    """The vocabulary to train a tokenizer with, from the size of the text."""
    return next((size for limit, size in _VOCABULARIES if corpus_bytes < limit), _LARGEST_VOCABULARY)


@dataclass(frozen=True)
class Corpus:
    """The training split, tokenized."""

    num_tokens: int
    num_bytes: int
    vocab_size: int


@dataclass(frozen=True)
class Machine:
    """What was measured of the machine."""

    device: Literal["cpu", "cuda"]
    matmul_flops: Mapping[torch.dtype, float]  # FLOP/s of large products, by compute dtype (matmul_rate.measure)
    memory_bytes: int  # that training may use


@dataclass(frozen=True)
class BatchShape:
    """Sequences of seq_len tokens: so many per update, so many at a time."""

    seq_len: int
    global_batch_size: int
    micro_batch_size: int

    @property
    def tokens(self) -> int:
        """Per update."""
        return self.seq_len * self.global_batch_size


@dataclass(frozen=True)
class Candidate:
    """One model size, and what the time allows it."""

    model: TransformerConfig
    batch: BatchShape
    num_parameters: int
    step_s: float
    steps: int
    expected_loss: float  # see the function of that name

    @property
    def tokens(self) -> int:
        """Trained on in all steps."""
        return self.steps * self.batch.tokens

    @property
    def tokens_per_s(self) -> float:
        return self.batch.tokens / self.step_s


StepTimer = Callable[[TransformerConfig, BatchShape, torch.dtype], float]
"""Seconds of one training step."""


@dataclass(frozen=True)
class BudgetPlan:
    """What was chosen; `explanation` says it, and why, in plain sentences."""

    model: TransformerConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    batch: BatchShape
    dtype: torch.dtype
    steps: int
    eval_every: int
    eval_tokens: int
    step_s: float  # as timed
    reserve_s: float  # for what follows the last step: evaluation, checkpoint, samples, report
    candidates: tuple[Candidate, ...]  # the sizes that were timed, smallest first
    explanation: tuple[str, ...]


def plan(left_s: float, corpus: Corpus, machine: Machine, step_timer: StepTimer) -> BudgetPlan:
    """Choose everything about a run that is to be over, report included, in `left_s` seconds.

    step_timer is called for the few sizes around the best; what that costs is the caller's to subtract. Raises
    UserError if too little time is left for any training.
    """
    train_s = left_s * (1 - _RESERVE) - _RESERVE_S
    if train_s < _LEAST_TRAIN_S:
        raise UserError(
            f"budget leaves {max(0.0, train_s):.0f} s for training once the text is prepared, and the least is "
            f"{_LEAST_TRAIN_S:.0f} s; give a larger one (the same folder keeps the prepared text for a second run)"
        )
    dtype = max(machine.matmul_flops, key=lambda dtype: machine.matmul_flops[dtype])
    timed: dict[int, Candidate] = {}

    def loss_at(index: int) -> float:
        if not 0 <= index < len(_SIZES):
            return math.inf
        if index not in timed:
            timed[index] = _candidate(index, train_s, corpus, machine, dtype, step_timer)
        return timed[index].expected_loss

    # Over the sizes the expected loss is one valley: walk down into it from the guess.
    best = _first_guess(train_s, corpus, machine.matmul_flops[dtype])
    while loss_at(better := min((best - 1, best + 1), key=loss_at)) < loss_at(best):
        best = better
    chosen = timed[best]
    candidates = tuple(timed[index] for index in sorted(timed))
    eval_tokens, evaluations = _evaluations(chosen.tokens)
    last_evaluation_s = _EVAL_COST * eval_tokens / chosen.tokens_per_s
    return BudgetPlan(
        model=chosen.model,
        optimizer=optimizer_for(chosen.model),
        schedule=_SCHEDULE,
        batch=chosen.batch,
        dtype=dtype,
        steps=chosen.steps,
        eval_every=-(-chosen.steps // evaluations),
        eval_tokens=eval_tokens,
        step_s=chosen.step_s,
        reserve_s=left_s - train_s + last_evaluation_s,
        candidates=candidates,
        explanation=tuple(_explain(chosen, candidates, train_s, corpus, machine, dtype)),
    )


@dataclass(frozen=True)
class Deadline:
    """When a run of a time budget is over."""

    at: float
    """All of it, report included: a moment of time.monotonic()."""
    budget_s: float
    """From the beginning until then."""
    reserve_s: float
    """What follows the last step takes so long where a step takes step_s."""
    step_s: float

    def of_steps(self, pace_s: float) -> float:
        """When the last step is to be done, on a machine that takes pace_s per step now: what follows slows down with
        the steps."""
        reserve_s = self.reserve_s * max(1.0, pace_s / self.step_s)
        return self.at - min(reserve_s, max(self.reserve_s, _LARGEST_RESERVE * self.budget_s))


def corrected_steps(step: int, pace_s: float, left_s: float) -> int:
    """The last step of a run that is at `step`, takes pace_s per step and has left_s seconds left for steps."""
    return step + max(0, int(left_s / pace_s))


def is_correction_due(step: int, steps: int, uncorrected: float) -> bool:
    """Whether the number of steps, now `steps`, is to be set anew after `step`. uncorrected: share of the budget that
    has passed since it was set."""
    return uncorrected >= _LONGEST_UNCORRECTED or any(step == math.ceil(share * steps) for share in _CORRECTIONS)


def expected_loss(num_hidden: int, tokens: float, unique_tokens: int) -> float:
    """Held-out loss, nats per token, of a model of num_hidden parameters in its blocks after this many tokens.

    E + A / N^a + B / D^b, the form of Hoffmann et al. (2022), with constants fitted to small models (docs/lab.md). Of a
    corpus that repeats, D counts what the passes are worth (Muennighoff et al., 2023). It ranks sizes at one
    vocabulary; it is no promise.
    """
    repeats = max(0.0, tokens / unique_tokens - 1)
    worth = min(tokens, unique_tokens) + unique_tokens * _REPEATS_WORTH * (1 - math.exp(-repeats / _REPEATS_WORTH))
    return _LOSS_FLOOR + _SIZE_FACTOR / num_hidden**_SIZE_POWER + _DATA_FACTOR / worth**_DATA_POWER


_LOSS_FLOOR, _SIZE_FACTOR, _SIZE_POWER, _DATA_FACTOR, _DATA_POWER = 0.30, 60.0, 0.34, 127.5, 0.28
_REPEATS_WORTH = 15.4


def _first_guess(train_s: float, corpus: Corpus, matmul_flops: float) -> int:
    """The size with the lowest expected loss if every size reached the usual share of the matrix rate."""

    def loss(index: int) -> float:
        model = _model(index, corpus.vocab_size)
        return expected_loss(_num_hidden(model), _guessed_tokens(model, train_s, matmul_flops), corpus.num_tokens)

    return min(range(len(_SIZES)), key=loss)


def _candidate(
    index: int, train_s: float, corpus: Corpus, machine: Machine, dtype: torch.dtype, step_timer: StepTimer
) -> Candidate:
    model = _model(index, corpus.vocab_size)
    batch = _batch(model, _guessed_tokens(model, train_s, machine.matmul_flops[dtype]), machine, dtype)
    step_s = step_timer(model, batch, dtype)
    eval_tokens, evaluations = _evaluations(train_s / step_s * batch.tokens)
    evaluations_s = evaluations * _EVAL_COST * eval_tokens * step_s / batch.tokens
    steps = max(1, int((train_s - evaluations_s) / step_s))
    tokens = steps * batch.tokens
    dropout = next(dropout for limit, dropout in _DROPOUTS if tokens < limit * corpus.num_tokens)
    return Candidate(
        model=dataclasses.replace(model, dropout=dropout),
        batch=batch,
        num_parameters=_num_hidden(model) + model.vocab_size * model.d_model,
        step_s=step_s,
        steps=steps,
        expected_loss=expected_loss(_num_hidden(model), tokens, corpus.num_tokens),
    )


def _evaluations(run_tokens: float) -> tuple[int, int]:
    """Tokens of one evaluation, and how many evaluations, of a run of so many tokens."""
    tokens = max(_EVAL_SHARE * run_tokens, min(_WANTED_EVAL_TOKENS, _MOST_EVAL_SHARE * run_tokens))
    tokens = min(_MOST_EVAL_TOKENS, tokens)
    return math.ceil(tokens), max(1, min(_EVALUATIONS, int(_ALL_EVALS_SHARE * run_tokens / tokens)))


def _model(index: int, vocab_size: int) -> TransformerConfig:
    d_model, num_layers = _SIZES[index]
    return TransformerConfig(
        vocab_size=vocab_size,
        max_seq_len=_seq_len(d_model),
        d_model=d_model,
        num_layers=num_layers,
        num_heads=d_model // (64 if d_model % 64 == 0 and d_model > 128 else 32),
        norm="rms_norm",
    )


def _seq_len(d_model: int) -> int:
    """A larger model learns to use a longer context; attention costs a small one more than it brings."""
    return 256 if d_model < 512 else 512 if d_model < 1024 else 1024


def _num_hidden(model: TransformerConfig) -> int:
    """Parameters of the blocks' matrices."""
    return model.num_layers * (4 * model.d_model**2 + 2 * model.d_model * model.ff_width)


def _guessed_tokens(model: TransformerConfig, train_s: float, matmul_flops: float) -> float:
    flops_per_token = 6 * (_num_hidden(model) + model.vocab_size * model.d_model)
    return _USUAL_SHARE * matmul_flops * train_s / flops_per_token


def _batch(model: TransformerConfig, run_tokens: float, machine: Machine, dtype: torch.dtype) -> BatchShape:
    """Batches grow with the square root of the run's tokens; a micro batch is what memory holds of one."""
    seq_len = model.max_seq_len
    tokens = min(_LARGEST_BATCH_TOKENS, max(_SMALLEST_BATCH_TOKENS[machine.device], 2 * math.sqrt(run_tokens)))
    global_batch_size = max(1, 2 ** round(math.log2(tokens / seq_len)))
    micro_batch_size = global_batch_size
    while micro_batch_size > 1 and (
        micro_batch_size * seq_len > _LARGEST_MICRO_BATCH_TOKENS[machine.device]
        or _memory_bytes(model, seq_len, micro_batch_size, dtype) > _MEMORY_SHARE * machine.memory_bytes
    ):
        micro_batch_size //= 2
    return BatchShape(seq_len, global_batch_size, micro_batch_size)


_SMALLEST_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}  # less leaves the device idle between kernels
_LARGEST_BATCH_TOKENS = 1 << 19
_LARGEST_MICRO_BATCH_TOKENS = {"cpu": 8192, "cuda": 65536}  # more is not faster, and a CPU's caches are left


def _memory_bytes(model: TransformerConfig, seq_len: int, micro_batch_size: int, dtype: torch.dtype) -> int:
    return estimate(
        model, seq_len=seq_len, micro_batch_size=micro_batch_size, dtype=dtype, optimizer=optimizer_for(model)
    ).peak_bytes


def optimizer_for(model: TransformerConfig) -> OptimizerConfig:
    """Muon, with rates found at width 128 that fall with the square root of the width."""
    scale = math.sqrt(128 / model.d_model)
    return OptimizerConfig(name="muon", lr=0.02 * scale, muon_lr=0.01 * scale, momentum=0.9)


def _explain(
    chosen: Candidate,
    candidates: Sequence[Candidate],
    train_s: float,
    corpus: Corpus,
    machine: Machine,
    dtype: torch.dtype,
) -> list[str]:
    model, batch = chosen.model, chosen.batch
    passes = chosen.tokens / corpus.num_tokens
    rates = " and ".join(
        f"{flops / 1e9:,.0f} GFLOP/s in {_name(one)}"
        for one, flops in sorted(machine.matmul_flops.items(), key=lambda item: item[1])
    )
    timed = "; ".join(
        f"{_millions(one.num_parameters)} parameters: {one.tokens_per_s:,.0f} tokens/s, {_millions(one.tokens)} tokens"
        for one in candidates
    )
    sentences = [
        f"The training text holds {corpus.num_bytes / 1e6:,.1f} MB; a vocabulary of {corpus.vocab_size:,} suits that "
        f"size and cuts it into {_millions(corpus.num_tokens)} tokens of {corpus.num_bytes / corpus.num_tokens:.1f} "
        "bytes.",
        f"Matrix products run here at {rates}, so training computes in {_name(dtype)}; the weights stay in float32.",
        f"{format_duration(train_s)} are left for training. Timed on this machine, that allows: {timed}.",
        f"The lowest held-out loss is expected of {_millions(chosen.num_parameters)} parameters ({model.num_layers} "
        f"layers of width {model.d_model}): a larger model would see too little text in the time, a smaller one could "
        "not learn as much from it.",
        f"That is {passes:.1f} passes over the text, {_dropout_reason(model.dropout)}.",
        f"A batch of {batch.tokens:,} tokens ({batch.global_batch_size} sequences of {batch.seq_len}) gives about "
        f"{chosen.steps:,} steps; the number is corrected to the pace as the run goes, so that it ends in time.",
    ]
    return sentences


def _dropout_reason(dropout: float) -> str:
    if dropout == 0:
        return "few enough to need no dropout"
    return f"so a dropout of {dropout:g} keeps the model from learning it by heart"


def _millions(number: float) -> str:
    return f"{number / 1e6:,.1f} M" if number < 1e9 else f"{number / 1e9:,.1f} B"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
