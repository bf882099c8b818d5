"""--budget: durations, and plans for made-up machines and corpora: that they fit the time, the memory and the data."""

import dataclasses
import itertools
import math

import pytest
import torch

from warploom.errors import UserError
from warploom.train import budget
from warploom.train.budget import (
    Corpus,
    Deadline,
    Machine,
    corrected_steps,
    expected_loss,
    is_correction_due,
    parse_duration,
    plan,
    vocab_size,
)

CPU = Machine("cpu", {torch.float32: 2e11, torch.bfloat16: 8e11}, memory_bytes=16 << 30)


def timer(share=0.3, rates=CPU.matmul_flops, floor_s=0.002):
    """A machine that reaches this share of its matrix rate, and no step under floor_s."""

    def step_s(model, batch, dtype):
        hidden = model.num_layers * 12 * model.d_model**2
        flops = 6 * (hidden + model.vocab_size * model.d_model) * batch.tokens
        return max(floor_s, flops / (share * rates[dtype]))

    return step_s


def corpus_of(num_bytes):
    vocab = vocab_size(num_bytes)
    return Corpus(num_tokens=int(num_bytes / (1.2 + 0.19 * math.log2(vocab))), num_bytes=num_bytes, vocab_size=vocab)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("10m", 600), ("10 min", 600), ("1.5h", 5400), ("1h30m", 5400), ("1h 30m", 5400), (" 2M ", 120)],
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "m", "ten minutes", "10x", "1h30", "-5m", "5m!", "nan s", "1e3s", "1.5.2h"])
def test_what_is_no_duration_is_refused_with_the_value(text):
    with pytest.raises(UserError) as refusal:
        parse_duration(text)
    assert repr(text) in str(refusal.value) and "90s, 10m or 1.5h" in str(refusal.value)


@pytest.mark.parametrize("text", ["0s", "1s", "0.1m"])
def test_a_budget_too_short_is_refused(text):
    with pytest.raises(UserError, match="too short.*at least 20s"):
        parse_duration(text)


def test_the_vocabulary_grows_with_the_text():
    sizes = [vocab_size(int(10**exponent)) for exponent in range(3, 13)]
    assert sizes == sorted(sizes) and sizes[0] == 512 and sizes[-1] == 32768


SWEEP = [
    *itertools.product((20.0, 300.0, 3600.0), (50_000, 1_000_000, 12_000_000, 1_000_000_000), (2e10, 8e11)),
    (86400.0, 10_000_000_000, 4e14),
]


@pytest.mark.parametrize(("left_s", "num_bytes", "flops"), SWEEP)
def test_a_plan_fits_time_and_memory(left_s, num_bytes, flops):
    device = "cuda" if flops > 1e13 else "cpu"
    machine = Machine(device, {torch.float32: flops / 4, torch.bfloat16: flops}, memory_bytes=16 << 30)
    step_timer = timer(rates=machine.matmul_flops)
    corpus = corpus_of(num_bytes)
    chosen = plan(left_s, corpus, machine, step_timer)
    step_s = step_timer(chosen.model, chosen.batch, chosen.dtype)
    num_evaluations = -(-chosen.steps // chosen.eval_every)
    # A token of an evaluation costs a third of one of training. The last evaluation comes out of the reserve.
    one_evaluation_s = chosen.eval_tokens / chosen.batch.tokens * step_s / 3
    took_s = chosen.steps * step_s + (num_evaluations - 1) * one_evaluation_s + chosen.reserve_s
    assert chosen.dtype == torch.bfloat16
    assert took_s <= 1.01 * left_s
    assert took_s >= 0.95 * left_s - 2 * step_s
    assert num_evaluations <= 10 and num_evaluations * one_evaluation_s <= 0.06 * left_s
    shape = chosen.batch
    assert budget._memory_bytes(chosen.model, shape.seq_len, shape.micro_batch_size, chosen.dtype) <= 8 << 30
    assert chosen.batch.global_batch_size % chosen.batch.micro_batch_size == 0
    assert chosen.model.vocab_size == corpus.vocab_size
    assert 2 <= len(chosen.candidates) <= 6


@pytest.mark.parametrize("left_s", [-30.0, 0.0, 7.0])
def test_no_time_left_is_said(left_s):
    with pytest.raises(UserError, match="budget leaves [0-4] s for training.*give a larger one"):
        plan(left_s, corpus_of(12_000_000), CPU, timer())


def test_no_neighbour_size_is_expected_to_be_better():
    chosen = plan(300.0, corpus_of(12_000_000), CPU, timer())
    best = min(chosen.candidates, key=lambda one: one.expected_loss)
    assert best.model == chosen.model
    index = budget._SIZES.index((chosen.model.d_model, chosen.model.num_layers))
    timed = {(one.model.d_model, one.model.num_layers) for one in chosen.candidates}
    assert {budget._SIZES[index - 1], budget._SIZES[index + 1]} <= timed


def test_more_time_or_speed_gives_a_larger_model_and_batch():
    corpus = corpus_of(1_000_000_000)
    plans = [plan(seconds, corpus, CPU, timer()) for seconds in (30.0, 300.0, 3000.0, 30000.0)]
    sizes = [one.model.num_layers * one.model.d_model**2 for one in plans]
    batches = [one.batch.tokens for one in plans]
    assert sizes == sorted(sizes) and len(set(sizes)) == 4
    assert batches == sorted(batches) and batches[0] < batches[-1]
    assert [one.optimizer.muon_lr for one in plans] == sorted((one.optimizer.muon_lr for one in plans), reverse=True)


def test_sizes_that_run_badly_are_avoided():
    """The achieved share differs by size: what counts is the time measured, not the FLOPs."""
    even = plan(300.0, corpus_of(12_000_000), CPU, timer())

    def step_s(model, batch, dtype):
        slow = 8.0 if model.d_model >= even.model.d_model else 1.0
        return slow * timer()(model, batch, dtype)

    uneven = plan(300.0, corpus_of(12_000_000), CPU, step_s)
    assert uneven.model.d_model < even.model.d_model


def test_the_faster_compute_type_is_taken():
    emulated = Machine("cpu", {torch.float32: 2e11, torch.bfloat16: 2e10}, memory_bytes=16 << 30)
    chosen = plan(300.0, corpus_of(12_000_000), emulated, timer(rates=emulated.matmul_flops))
    assert chosen.dtype == torch.float32 and "computes in float32" in chosen.explanation[1]


def test_little_memory_gives_small_micro_batches():
    small = dataclasses.replace(CPU, memory_bytes=300 << 20)
    corpus = corpus_of(1_000_000_000)
    roomy, tight = (plan(3000.0, corpus, machine, timer()) for machine in (CPU, small))
    assert tight.batch.micro_batch_size < roomy.batch.micro_batch_size
    assert tight.batch.global_batch_size == roomy.batch.global_batch_size


def test_many_passes_over_a_small_corpus_bring_dropout():
    few = plan(60.0, corpus_of(100_000_000), CPU, timer())
    many = plan(600.0, corpus_of(300_000), CPU, timer())
    assert few.model.dropout == 0.0 and many.model.dropout > 0.0
    assert "no dropout" in " ".join(few.explanation) and "dropout of 0.2" in " ".join(many.explanation)


def test_a_repeated_pass_is_worth_less_than_new_text():
    new, repeated = expected_loss(10**6, 40e6, 40_000_000), expected_loss(10**6, 40e6, 2_000_000)
    once = expected_loss(10**6, 2e6, 2_000_000)
    assert new < repeated < once


def test_the_explanation_names_what_was_chosen():
    chosen = plan(300.0, corpus_of(12_000_000), CPU, timer())
    text = " ".join(chosen.explanation)
    for fact in ("12.0 MB", "4,096", "800 GFLOP/s in bfloat16", f"{chosen.model.num_layers} layers of width",
                 f"{chosen.steps:,} steps", "passes over the text"):  # fmt: skip
        assert fact in text


def run_to_the_end(budget_s, planned_step_s, step_s):
    """Steps as a trainer would take them, the number corrected at its moments. Returns when the last was over, how
    often the number was corrected, and when all that follows was, which takes 20 planned steps."""
    deadline = Deadline(at=budget_s, budget_s=budget_s, reserve_s=20 * planned_step_s, step_s=planned_step_s)
    steps, step, now, marked_step, marked_at = int(budget_s / planned_step_s), 0, 0.0, 0, 0.0
    pace_s, corrections = planned_step_s, 0
    while step < steps:
        step += 1
        now += step_s(now)
        if now >= deadline.of_steps(pace_s):
            break
        if is_correction_due(step, steps, (now - marked_at) / budget_s):
            pace_s = (now - marked_at) / (step - marked_step)
            steps = corrected_steps(step, pace_s, deadline.of_steps(pace_s) - now)
            marked_step, marked_at, corrections = step, now, corrections + 1
    return now, corrections, now + 20 * step_s(now)


@pytest.mark.parametrize("factor", [0.05, 0.5, 0.9, 1.0, 1.3, 3.0, 10.0])
def test_a_wrong_plan_still_ends_on_time(factor):
    """Planned on a busy machine that is idle afterwards, or the reverse; what follows the last step is in time too."""
    _, _, over = run_to_the_end(240.0, planned_step_s=0.2, step_s=lambda now: 0.2 * factor)
    assert over == pytest.approx(240.0, rel=0.02)


@pytest.mark.parametrize("change_at", [10.0, 60.0, 130.0, 200.0])
@pytest.mark.parametrize("factor", [0.2, 0.6, 1.6, 4.0])
def test_a_pace_that_changes_on_the_way_still_ends_on_time(change_at, factor):
    _, _, over = run_to_the_end(
        240.0, planned_step_s=0.2, step_s=lambda now: 0.2 * (factor if now > change_at else 1.0)
    )
    assert over == pytest.approx(240.0, rel=0.02)


def test_a_machine_that_is_far_slower_than_planned_has_its_schedule_corrected():
    """At 60 times the planned pace the time is over before a twentieth of the steps is done: the number of steps, which
    the learning rate falls by, is corrected by the clock instead."""
    last_step, corrections, over = run_to_the_end(240.0, planned_step_s=0.2, step_s=lambda now: 0.2 * 60)
    assert corrections >= 4 and last_step <= 240.0
    # What follows takes 240 s then; a quarter of the budget is kept for it at most.
    assert last_step >= 0.7 * 240.0 and over > 1.5 * 240.0


def test_a_pause_does_not_end_the_run():
    """The machine stands still for a quarter of the time, once."""
    paused = []

    def step_s(now):
        if now > 80.0 and not paused:
            paused.append(now)
            return 60.0
        return 0.2

    _, _, over = run_to_the_end(240.0, planned_step_s=0.2, step_s=step_s)
    assert paused and over == pytest.approx(240.0, rel=0.02)


def test_without_corrections_the_same_run_does_not_keep_the_time(monkeypatch):
    """The control: without them a run that becomes faster is over far too early."""
    monkeypatch.setattr(budget, "_CORRECTIONS", ())
    monkeypatch.setattr(budget, "_LONGEST_UNCORRECTED", math.inf)
    _, _, over = run_to_the_end(240.0, planned_step_s=0.2, step_s=lambda now: 0.2 * (0.5 if now > 60.0 else 1.0))
    assert over < 0.7 * 240.0
