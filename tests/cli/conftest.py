"""The run that the tests of hostile inputs damage a copy of."""

import os
import random

import pytest
from tests.cli.scene import NEWER, OLDER, SMALL, Scene

from warploom.cli.main import main


@pytest.fixture(scope="session")
def hostile_text(tmp_path_factory):
    draw = random.Random(0)
    words = ["".join(draw.choices("abdegiklmou", k=draw.randint(2, 7))) for _ in range(200)]
    folder = tmp_path_factory.mktemp("text")
    for number in range(8):
        lines = (" ".join(draw.choices(words, k=12)) + "." for _ in range(40))
        (folder / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def hostile_run(hostile_text, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    argv = ["train", "--data", str(hostile_text), "--train.out-dir", str(out), "--train.steps", "4", *SMALL]
    assert main(argv) == 0
    assert {OLDER, NEWER} <= set(os.listdir(out))
    return out


@pytest.fixture
def scene(tmp_path, hostile_run, hostile_text):
    return Scene(tmp_path, hostile_run, hostile_text)
