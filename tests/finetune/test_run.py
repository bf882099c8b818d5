"""The whole road on a small base: what is trained, what is kept, what is forgotten, what the checkpoint can do."""

import json

import pytest
import torch

from warploom.cli.main import main
from warploom.errors import UserError
from warploom.finetune.config import FinetuneConfig
from warploom.finetune.freeze import add_layers
from warploom.finetune.run import finetune
from warploom.generate.distribution import SamplingConfig
from warploom.generate.sampler import generate
from warploom.nn.lora import LoRAConfig
from warploom.optim import OptimizerConfig
from warploom.train.load_model import load_model

FAST = OptimizerConfig(name="adamw", lr=1e-2, weight_decay=0.0)


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return {name for name in a if name in b and torch.equal(a[name], b[name])}


def test_instructions_are_learned_and_the_template_stays(base, instructions, short):
    train = short(steps=300, eval_every=150, global_batch_size=8, micro_batch_size=8)
    done = finetune(base, [instructions], None, train, FAST)
    before, after = done.forgetting
    assert done.result.heldout_loss < 0.5  # the word, and that it is the last
    assert before.loss < after.loss and before.num_targets == after.num_targets
    loaded = load_model(done.result.checkpoint)
    template = loaded.chat_template
    prompt = template.encode(loaded.tokenizer, [{"role": "user", "content": "lo lo lo"}], add_generation_prompt=True)
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=12)
    assert generate(loaded.model, loaded.tokenizer, [prompt.ids], greedy) == [["me"]]
    assert "forgetting" in done.report.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "tune, trained",
    [
        (FinetuneConfig(), lambda name: True),
        (
            FinetuneConfig(freeze=("embedding.*", "*_norm.*")),
            lambda name: "embedding" not in name and "_norm" not in name,
        ),
        (FinetuneConfig(last_layers=1), lambda name: "blocks.1." in name or name.startswith("stack.norm")),
        (FinetuneConfig(new_layers=1), lambda name: "blocks.2." in name),
    ],
    ids=["full", "pattern", "last_layers", "new_layers"],
)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_frozen_parameters_stay_and_store_nothing(base, instructions, short, tune, trained, optimizer):
    done = finetune(base, [instructions], tune, short(), OptimizerConfig(name=optimizer, weight_decay=0.0))
    after = load_model(done.result.checkpoint)
    names = set(after.model.state_dict())
    assert names - same_weights(after.model, load_model(base).model) == {name for name in names if trained(name)}
    count = sum(p.numel() for name, p in after.model.named_parameters() if trained(name))
    memory = done.memory
    assert memory.num_trained == count and memory.gradients_bytes == 4 * count
    moments = 1 if optimizer == "muon" else 2
    # Adam counts its steps, in a tensor for each parameter.
    assert 4 * moments * count <= memory.optimizer_bytes <= 8 * count + 4 * 100


def test_new_layers_begin_by_changing_nothing(base):
    before, grown = load_model(base).model, add_layers(load_model(base).model, 2)
    tokens = torch.arange(20).view(1, 20)
    assert grown.config.num_layers == before.config.num_layers + 2
    torch.testing.assert_close(grown(tokens), before(tokens), rtol=0, atol=1e-6)


def test_an_adapter_is_saved_alone_and_loaded_on_its_base(base, instructions, short, tmp_path):
    tune = FinetuneConfig(lora=LoRAConfig(rank=2), merge=True)
    done = finetune(base, [instructions], tune, short(), FAST)
    from safetensors import safe_open

    with safe_open(done.result.checkpoint / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert names and all(name.endswith(("lora_a", "lora_b")) for name in names)
    assert done.memory.gradients_bytes == 4 * done.memory.num_trained < 0.2 * done.memory.weights_bytes
    loaded, merged = load_model(done.result.checkpoint), load_model(done.merged)
    tokens = torch.arange(20).view(1, 20)
    torch.testing.assert_close(loaded.model(tokens), merged.model(tokens))
    original = load_model(base).model
    assert not torch.allclose(loaded.model(tokens), original(tokens), atol=1e-3)
    assert same_weights(loaded.model, original)  # the embedding and the norms
    moved = base.rename(tmp_path / "moved")
    try:
        with pytest.raises(UserError, match="its base is no longer at"):
            load_model(done.result.checkpoint)
        again = load_model(done.result.checkpoint, base=moved)
        torch.testing.assert_close(again.model(tokens), loaded.model(tokens), rtol=0, atol=0)
        with pytest.raises(UserError, match="holds other weights"):
            load_model(done.result.checkpoint, base=done.merged)
    finally:
        moved.rename(base)
    with pytest.raises(UserError, match="needs no base"):
        load_model(done.merged, base=base)


@pytest.mark.parametrize("tune", [FinetuneConfig(), FinetuneConfig(lora=LoRAConfig(rank=2, dropout=0.1))], ids=str)
def test_an_interrupted_run_goes_on_bit_for_bit(base, instructions, short, tmp_path, tune):
    whole = finetune(base, [instructions], tune, short(out_dir=tmp_path / "whole", save_every=3), FAST)
    half = short(out_dir=tmp_path / "half", save_every=3)
    finetune(base, [instructions], tune, half, FAST)
    import shutil

    shutil.rmtree(tmp_path / "half" / "step-00000006")
    resumed = finetune(base, [instructions], tune, half, FAST)
    one, other = load_model(whole.result.checkpoint).model, load_model(resumed.result.checkpoint).model
    assert same_weights(one, other) == set(one.state_dict())
    assert resumed.forgetting == whole.forgetting


def test_plain_text_is_gone_on_with(base, short, tmp_path):
    text = tmp_path / "more"
    text.mkdir()
    for number in range(20):
        (text / f"{number}.txt").write_text(f"su ta {number} " * 200)
    done = finetune(base, [text], FinetuneConfig(heldout_fraction=0.2), short(steps=20), FAST)
    before, after = done.forgetting
    assert done.result.bits_per_byte > 0 and after.loss > before.loss
    assert load_model(done.result.checkpoint).chat_template is None


def test_the_command(base, instructions, tmp_path, capsys):
    out = tmp_path / "tuned"
    argv = ["finetune", str(base), "--data", str(instructions), "--train.out-dir", str(out), "--train.steps", "3"]
    argv += [
        "--train.seq-len",
        "64",
        "--train.global-batch-size",
        "4",
        "--train.device",
        "cpu",
        "--tune.lora.rank",
        "2",
    ]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "parameters are trained" in said and "Forgetting:" in said and "Checkpoint:" in said
    assert main(["sample", str(out), "--prompt", "ki", "--chat", "--max-new-tokens", "4"]) == 0


@pytest.mark.parametrize(
    "row, match",
    [
        ({"messages": [{"role": "user", "content": "x"}]}, "no message of the assistant"),
        ({"prompt": "x"}, "give messages, or prompt and response"),
        ({"prompt": "x", "response": 3}, "give messages, or prompt and response"),
        ({"messages": "x"}, "a conversation is a list"),
        ({"chosen": "x"}, "give messages, or prompt and response"),
    ],
)
def test_a_line_that_is_no_example_is_named_or_skipped(base, instructions, short, tmp_path, row, match):
    file = tmp_path / "bad.jsonl"
    file.write_text(instructions.read_text() + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=f"bad.jsonl:301.*{match}.*on-bad-line"):
        finetune(base, [file], FinetuneConfig(task="instruct"), short())
    tune = FinetuneConfig(task="instruct", on_bad_line="skip")
    assert finetune(base, [file], tune, short(steps=1)).result.steps == 1


@pytest.mark.parametrize(
    "tune, train, match",
    [
        ({"freeze": ("encoder.*",)}, {}, "fits no parameter"),
        ({"freeze": ("*",)}, {}, "nothing to train"),
        ({"last_layers": 9}, {}, "the base has 2 blocks"),
        ({"chat_template": "nonesuch"}, {}, "no chat template"),
        ({}, {"seq_len": 65}, "max_seq_len"),
        ({}, {"separate_documents": False}, "separate_documents"),
        ({"heldout_fraction": 1e-9}, {}, "held-out side has no example"),
    ],
)
def test_settings_that_do_not_fit_are_refused(base, instructions, short, tune, train, match):
    with pytest.raises(UserError, match=match):
        finetune(base, [instructions], FinetuneConfig(**tune), short(**train))
    with pytest.raises(UserError, match="the run of the base itself"):
        finetune(base, [instructions], None, short(out_dir=base))


@pytest.mark.parametrize(
    "values", [{"last_layers": 1, "new_layers": 1}, {"merge": True}, {"beta": 0.0}, {"last_layers": 0}]
)
def test_a_configuration_that_contradicts_itself_is_refused(values):
    with pytest.raises(UserError, match="tune"):
        FinetuneConfig(**values)
