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
from warploom.train.ladder import RUNGS, Course, run_in_process, run_rung

SMALL = ("ladder", "--preset", "nano", "--batch-size", "2", "--seq-len", "24", "--steps", "2", "--no-compile")
COURSE = Course("nano", batch_size=2, seq_len=24, steps=2)


@pytest.fixture
def here(monkeypatch):
    """Rungs run in this process, whose malloc stays as it is; returns the list of what the rungs asked of malloc."""
    asked = []
    monkeypatch.setattr(ladder, "keep_freed_memory", lambda: asked.append("keep"))
    monkeypatch.setattr("warploom.cli.ladder.run_in_process", run_rung)
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
    alone = run_in_process(rung, COURSE)
    assert run_rung(dataclasses.replace(rung, keep_memory=False), COURSE).losses == tuple(alone.losses)
    assert alone.step_s > 0 and alone.peak_bytes > 0


@pytest.mark.parametrize(("rung", "remedy"), [("naive", ""), ("compile", "; leave it out with --no-compile")])
def test_a_rung_that_breaks_down_is_named(monkeypatch, rung, remedy):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match=f"^rung {rung} ended with code 1: it said nothing{remedy}$"):
        run_in_process(RUNGS[rung], COURSE)


def test_a_ladder_without_steps_is_refused(capsys):
    assert main(["ladder", "--steps", "0"]) == 2
    assert "steps is 0; give 1 or more" in capsys.readouterr().err
