"""`warploom ladder`: every rung trains the same model, and one that does not ends the climb."""

from __future__ import annotations

import dataclasses
import re
import sys

import pytest
import torch

from warploom.cli.main import main
from warploom.errors import UserError
from warploom.optim import build_optimizers
from warploom.train import ladder, naive
from warploom.train.ladder import RUNGS, Course, RungHere, RungProcess, climb

SMALL = ("ladder", "--preset", "nano", "--batch-size", "2", "--seq-len", "24", "--steps", "2", "--no-compile")
COURSE = Course("nano", batch_size=2, seq_len=24, steps=2)


@pytest.fixture
def here(monkeypatch):
    """Rungs run in this process, whose malloc stays as it is; returns the list of what the rungs asked of malloc."""
    asked = []
    monkeypatch.setattr(ladder, "keep_freed_memory", lambda: asked.append("keep"))
    monkeypatch.setattr("warploom.cli.ladder.RungProcess", RungHere)
    return asked


def test_every_rung_is_climbed(here, capsys):
    assert main(SMALL) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines[lines.index("") + 2 :]]
    assert [row[0] for row in rows] == [name for name in RUNGS if name != "compile"]
    assert here == ["keep", "keep"]  # by the rung of that name, and by the one on top of it
    losses = {row[0]: float(row[4 + (row[0] != "naive")]) for row in rows}
    assert max(losses.values()) - min(losses.values()) < 0.05
    # They fell, so it is training that is compared; log(4096) is where random weights are.
    assert max(losses.values()) < 8.25
    for row in rows[1:]:
        assert re.fullmatch(r"\d+\.\d\dx", row[2]) and re.fullmatch(r"\d+\.\d\dx", row[3])


def divides_by_one_less(norm, x, residual=None):
    stream = x if residual is None else residual + x
    wide = stream.float()
    y = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias
    return y.to(x.dtype), stream


def sees_the_future(attention, x, context):
    q, k, v = (
        proj(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    o = (q @ k.mT / attention.head_dim**0.5).softmax(-1) @ v
    return attention.o_proj(o.transpose(1, 2).flatten(2))


def leaks(feed_forward, x):
    return feed_forward.down_proj(torch.nn.functional.leaky_relu(feed_forward.up_proj(x)))


def smooths_labels(model, tokens, targets):
    logits = model.logits(model(tokens)).float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=1e-3)


def learns_faster(model, config):
    return build_optimizers(model, dataclasses.replace(config, lr=1.05 * config.lr))


PLANTS = {
    "norm": (naive.NaiveNorm, "forward", divides_by_one_less),
    "attention": (naive.NaiveAttention, "forward", sees_the_future),
    "linear": (naive.NaiveFeedForward, "forward", leaks),
    "loss": (ladder, "naive_loss", smooths_labels),
    "optimizer": (ladder, "build_optimizers", learns_faster),
}


@pytest.mark.parametrize("rung", PLANTS)
def test_a_wrong_rung_is_caught(monkeypatch, capsys, here, rung):
    """One of the two forms between which the rung lies is wrong, so its losses differ from the rung before."""
    monkeypatch.setattr(*PLANTS[rung])
    assert main(SMALL) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"{rung} is wrong: its losses differ from those of {RUNGS[rung].builds_on} by ")


def test_a_rung_in_a_process_of_its_own_is_the_same():
    rung = RUNGS["recompute"]
    alone, here = RungProcess(rung, COURSE), RungHere(dataclasses.replace(rung, keep_memory=False), COURSE)
    assert [alone.step()[0] for _ in range(3)] == [here.step()[0] for _ in range(3)]
    assert alone.step()[1] > 0 and alone.peak_bytes() > 0
    assert alone.float32_losses() == here.float32_losses()
    alone.close()


@pytest.mark.parametrize(("rung", "remedy"), [("naive", ""), ("compile", "; leave it out with --no-compile")])
def test_a_rung_that_breaks_down_is_named(monkeypatch, rung, remedy):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    broken = RungProcess(RUNGS[rung], COURSE)
    with pytest.raises(UserError, match=f"^rung {rung} ended with code 1: it said nothing{remedy}$"):
        broken.step()
    broken.close()


def test_a_rung_takes_turns_with_the_one_it_builds_on():
    """And waits no longer than until the last rung that builds on it; x first is the product of what came before."""
    seconds = {"naive": 8.0, "bf16": 4.0, "norm": 1.0}
    events = []

    class Told:
        def __init__(self, rung, course):
            self._name = rung.name

        def step(self):
            events.append(self._name)
            return 1.0, seconds[self._name]

        def peak_bytes(self):
            return 0

        def float32_losses(self):
            return [1.0] * 3

        def close(self):
            events.append(f"no {self._name}")

    results = list(climb([RUNGS[name] for name in seconds], Course(steps=2), start=Told))
    assert events == [
        *["naive"] * 5,
        *["bf16"] * 3, "naive", "bf16", "naive", "bf16", "no naive",
        *["norm"] * 3, "bf16", "norm", "bf16", "norm", "no bf16", "no norm",
    ]  # fmt: skip
    assert [(result.faster, result.faster_than_first) for result in results] == [(1, 1), (2, 2), (4, 8)]


@pytest.mark.parametrize("bad", [float("nan"), 1.1])
def test_losses_that_differ_are_not_right(bad):
    result = ladder.Result(RUNGS["norm"], (1.0,) * 5, (1.0,) * 3, 1.0, 1.0, 1.0, 1.0, 0, off=0.01, float32_off=1e-5)
    assert result.is_right
    assert not dataclasses.replace(result, off=bad).is_right
    assert not dataclasses.replace(result, float32_off=bad).is_right


def test_a_ladder_without_steps_is_refused(capsys):
    assert main(["ladder", "--steps", "0"]) == 2
    assert "steps is 0; give 1 or more" in capsys.readouterr().err
