"""python -m bench.finetune: what each way of fine-tuning holds in memory and computes, measured on the tensors that
exist after the last of a few steps. No timing. That frozen weights are as they were, to the bit, is checked first.
"""

from __future__ import annotations

import dataclasses
import io
import json
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

from bench.harness import print_fingerprint, print_table, write_records
from warploom.checkpoint.format import CheckpointState
from warploom.checkpoint.save import save_checkpoint
from warploom.data.tokenizer import Tokenizer
from warploom.finetune.config import FinetuneConfig
from warploom.finetune.freeze import add_layers, freeze
from warploom.finetune.run import finetune
from warploom.models import Transformer, preset
from warploom.nn.lora import LoRAConfig
from warploom.train.config import RunConfig, TrainConfig
from warploom.train.load_model import load_model

WAYS = {
    "all parameters": FinetuneConfig(),
    "all but embedding and norms": FinetuneConfig(freeze=("embedding.*", "*norm.*")),
    "the last 2 layers": FinetuneConfig(last_layers=2),
    "2 new layers": FinetuneConfig(new_layers=2),
    "LoRA, rank 8": FinetuneConfig(lora=LoRAConfig(rank=8)),
    "LoRA, rank 8, q and v": FinetuneConfig(lora=LoRAConfig(rank=8, targets=("q_proj", "v_proj"))),
}


def save_base(name: str, folder: Path) -> Path:
    """A checkpoint of a preset with random weights, whose tokenizer knows bytes alone."""
    torch.manual_seed(0)
    model = Transformer(preset(name))
    config = RunConfig(model=model.config, train=TrainConfig(out_dir=folder, seq_len=64))
    tokenizer = Tokenizer.train(["a"], 257)
    meta = {"config": config.to_dict()}
    return save_checkpoint(
        folder, CheckpointState(step=0, weights=model.state_dict(), meta=meta, tokenizer=tokenizer.to_bytes())
    )


def measure(way: str, base: Path, data: Path, out: Path) -> dict[str, Any]:
    tune = dataclasses.replace(WAYS[way], heldout_fraction=0.2)
    train = TrainConfig(out_dir=out, steps=2, seq_len=64, global_batch_size=2, micro_batch_size=2, dtype="fp32")
    done = finetune(base, [data], tune, train, console=Console(file=io.StringIO()))
    assert done.memory is not None
    before = load_model(base).model
    layers = before.config.num_layers
    model = add_layers(before, tune.new_layers) if tune.new_layers else before
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    freeze(model, tune, layers)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    # LoRA's checkpoint is merged as it is loaded: its layers' weights are the base's and the adapters'.
    adapted = {name.rpartition(".")[0] + ".weight" for name in trained if name.endswith("lora_a")}
    for name, tensor in load_model(done.result.checkpoint).model.state_dict().items():
        if name not in trained | adapted and not torch.equal(tensor, old[name]):
            raise SystemExit(f"{way}: {name} is frozen and has changed; nothing is printed")
    return {
        "bench": "finetune",
        "config": way,
        "subject": "warploom",
        **dataclasses.asdict(done.memory),
        "flops_per_token": model.flops_per_token(64),
    }


@dataclass(frozen=True)
class Arguments:
    """Measure what fine-tuning holds and computes."""

    preset: str = "small"
    """The base, with random weights."""
    json: Path | None = None
    """Write the records there as JSON."""


def main(arguments: Arguments) -> None:
    print_fingerprint()
    with tempfile.TemporaryDirectory() as folder:
        base = save_base(arguments.preset, Path(folder) / "base")
        data, chance = Path(folder) / "talk.jsonl", random.Random(0)
        rows = [{"prompt": f"{chance.random()}", "response": f"{chance.random()}"} for _ in range(60)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        records = [measure(way, base, data, Path(folder) / str(n)) for n, way in enumerate(WAYS)]
    print_table(
        f"{arguments.preset}, float32 weights, AdamW; MB of tensors after a step, MFLOPs a token of 64",
        ("trained", "parameters", "share", "weights", "gradients", "optimizer state", "MFLOPs a token"),
        [
            (
                r["config"],
                f"{r['num_trained']:,}",
                f"{r['num_trained'] / r['num_parameters']:.2%}",
                *(f"{r[f'{name}_bytes'] / 1e6:,.2f}" for name in ("weights", "gradients", "optimizer")),
                f"{r['flops_per_token'] / 1e6:,.1f}",
            )
            for r in records
        ],
    )
    write_records(arguments.json, records)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
