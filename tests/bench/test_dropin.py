"""The drop-in bench times two subjects that do the same work."""

import dataclasses

import pytest
import torch
from bench.dropin import QUICK_CASES, SUBJECTS, build_step, check

from warploom.ops import REGISTRY

pytest.importorskip("transformers")


@pytest.mark.parametrize("model", QUICK_CASES)
def test_subjects_agree_and_only_one_uses_the_ops(model, capsys):
    case = dataclasses.replace(QUICK_CASES[model], batch_size=1, seq_len=16)
    layers = {"opt": "num_hidden_layers", "gpt2": "n_layer"}[model]
    case = dataclasses.replace(case, config=case.config | {layers: 1, "vocab_size": 64} | _TOKENS)
    losses, used = {}, {}
    for subject in SUBJECTS:
        before = REGISTRY["layer_norm"].calls.total()
        step = build_step(subject, case, torch.bfloat16)
        losses[subject] = [step() for _ in range(3)]
        used[subject] = REGISTRY["layer_norm"].calls.total() > before
    check(losses, "bf16")
    assert losses["patched"][2] < losses["patched"][0]
    assert used == {"transformers": False, "patched": REGISTRY["layer_norm"].choice("cpu") == "cpu"}
    assert "swapped" in capsys.readouterr().err


_TOKENS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)


def test_a_wrong_model_is_not_timed():
    with pytest.raises(SystemExit, match="the patched model is wrong"):
        check({"transformers": [1.0, 2.0], "patched": [1.0, float("nan")]}, "bf16")
