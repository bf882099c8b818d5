"""Training in parts equals training in one process: losses and final weights after 20 steps, in every dimension.

In float64, where a rounding is 1e-16, the two agree far below what float32 could show; a few cases run in float32 too.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

UNEVEN = {"num_heads": 6, "head_dim": 8, "position": "learned", "tie_embeddings": False, "activation": "swiglu"}
TRANSLATOR = {"architecture": "encoder-decoder", "position": "t5", "num_layers": 2}

MARIAN = {"output_bias": True, "embedding_norm": True, "tie_embeddings": True, "bias": True}

# Four processes; all cases of one size share theirs.
QUICK = {
    "data, rows that do not divide": {"parallel": {"data": 4}, "batch_size": 7},
    "shard, packed documents": {"parallel": {"shard": 4}, "packed": True, "optimizer": "muon"},
    "tensor, uneven heads, features and vocabulary": {
        "parallel": {"tensor": 4},
        "model": {**UNEVEN, "d_ff": 50},
        "packed": True,
        "optimizer": "muon",
    },
    "context x tensor, grouped heads, ALiBi": {
        "parallel": {"context": 2, "tensor": 2},
        "model": {"num_heads": 6, "head_dim": 8, "num_kv_heads": 3, "position": "alibi"},
    },
    "pipeline, tied copies, T5 bias": {"parallel": {"pipeline": 4}, "model": {"position": "t5"}},
    "pipeline x data, interleaved": {"parallel": {"pipeline": 2, "data": 2, "schedule": "interleaved"}, "packed": True},
    "translation, pipeline x tensor, output bias, embedding norm": {
        "parallel": {"pipeline": 2, "tensor": 2, "schedule": "gpipe"},
        "model": {**TRANSLATOR, "position": "learned", **MARIAN},
    },
    "tensor, float32": {
        "parallel": {"tensor": 4},
        "model": {"activation": "gelu_tanh", "output_bias": True},
        "dtype": "float32",
        "optimizer": "sgd",
        "lr": 0.05,  # at 0.5 weights move away from where rounding takes them: test_rounding.py
    },
    "data x context, float32": {
        "parallel": {"data": 2, "context": 2},
        "model": {"activation": "gelu_tanh"},
        "dtype": "float32",
        "eps": 1e-4,
    },
}

# Four processes: what of "every dimension alone" is not above.
ALONE = {
    "context, packed documents": {"parallel": {"context": 4}, "packed": True, "optimizer": "muon"},
    **{
        f"translation, {name}": {"parallel": {name: 4}, "model": TRANSLATOR, "src_len": 11, "optimizer": optimizer}
        for name, optimizer in (
            ("data", "muon"),
            ("shard", "adamw"),
            ("tensor", "muon"),
            ("context", "adamw"),
            ("pipeline", "muon"),
        )
    },
}

# Eight processes: products of two and three dimensions.
LONG = {
    "data x shard x tensor": {"parallel": {"data": 2, "shard": 2, "tensor": 2}, "optimizer": "muon", "batch_size": 6},
    "shard x context x tensor": {"parallel": {"shard": 2, "context": 2, "tensor": 2}, "packed": True},
    "data x pipeline x tensor, zero bubble": {
        "parallel": {"data": 2, "pipeline": 2, "tensor": 2, "schedule": "zero-bubble"},
        "optimizer": "muon",
    },
    "shard x pipeline x context, 1f1b": {
        "parallel": {"shard": 2, "pipeline": 2, "context": 2, "schedule": "1f1b"},
        "model": {"position": "alibi", "num_kv_heads": 2},
    },
    "pipeline x tensor x context, zero bubble, nothing divides": {
        "parallel": {"pipeline": 2, "tensor": 2, "context": 2, "schedule": "zero-bubble"},
        "model": {**UNEVEN, "num_layers": 5, "d_ff": 50},
        "batch_size": 7,
    },
    "pipeline of 8, gpipe": {"parallel": {"pipeline": 8, "schedule": "gpipe"}, "model": {"num_layers": 8}},
    "translation, data x shard x context": {
        "parallel": {"data": 2, "shard": 2, "context": 2},
        "model": TRANSLATOR,
        "src_len": 11,
        "optimizer": "muon",
    },
    "translation, pipeline x tensor x data, interleaved": {
        "parallel": {"pipeline": 2, "tensor": 2, "data": 2, "schedule": "interleaved"},
        "model": TRANSLATOR,
    },
    "translation, pipeline x context x tensor": {
        "parallel": {"pipeline": 2, "context": 2, "tensor": 2, "schedule": "1f1b"},
        "model": {**TRANSLATOR, "position": "rotary"},
    },
    "shard x tensor, float32": {
        "parallel": {"shard": 4, "tensor": 2},
        "model": {"activation": "gelu_tanh"},
        "dtype": "float32",
        "eps": 1e-4,
    },
    "tensor x pipeline x data, float32, Muon": {
        "parallel": {"data": 2, "pipeline": 2, "tensor": 2},
        "model": {"activation": "swiglu", "norm": "rms_norm"},
        "dtype": "float32",
        "optimizer": "muon",
        "eps": 1e-4,
    },
}

# Sixteen processes: products of four dimensions.
WIDE = {
    "data x shard x pipeline x tensor": {"parallel": {"data": 2, "shard": 2, "pipeline": 2, "tensor": 2}},
    "translation, data x pipeline x context x tensor, interleaved": {
        "parallel": {"data": 2, "pipeline": 2, "context": 2, "tensor": 2, "schedule": "interleaved"},
        "model": {**TRANSLATOR, "position": "rotary"},
        "batch_size": 6,
    },
}


def run(cases, num_processes, folder):
    """Return the results of each case, by rank."""
    (folder / "cases.json").write_text(json.dumps(cases))
    path = os.pathsep.join(str(ROOT / part) for part in ("engine", "kernels", "."))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.parallel.parity_run"),
            *(str(folder / "cases.json"), str(folder), str(num_processes)),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    by_rank = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num_processes)]
    return {name: [results[name] for results in by_rank] for name in cases}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return run(QUICK, 4, tmp_path_factory.mktemp("quick"))


def check(case, results):
    in_float32 = case.get("dtype") == "float32"
    # The loss is summed in float32, and so is the gradient of a learned bias on attention.
    learned_bias = case.get("model", {}).get("position") == "t5"
    limits = {
        "losses": 1e-5 if in_float32 else 1e-6,
        # A small gradient is a difference of larger ones, so in float32 its norm carries more than their rounding.
        "norms": 1e-4 if in_float32 else 1e-10,
        "weights": 1e-5 if in_float32 else 1e-6 if learned_bias else 1e-11,
    }
    for rank, result in enumerate(results):
        assert result["compared"] > 1000
        for what, limit in limits.items():
            assert result[what] <= limit, (rank, what, result)


@pytest.mark.parametrize("name", QUICK)
def test_parts_train_as_the_whole(name, quick):
    check(QUICK[name], quick[name])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(ALONE, 4, tmp_path_factory.mktemp("alone"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_dimensions_alone_train_as_the_whole(name, alone):
    check(ALONE[name], alone[name])


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    return run(LONG, 8, tmp_path_factory.mktemp("long"))


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_products_train_as_the_whole(name, long):
    check(LONG[name], long[name])


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return run(WIDE, 16, tmp_path_factory.mktemp("wide"))


@pytest.mark.slow
@pytest.mark.parametrize("name", WIDE)
def test_products_of_four_dimensions_train_as_the_whole(name, wide):
    check(WIDE[name], wide[name])
