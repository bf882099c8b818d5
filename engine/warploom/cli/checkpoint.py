"""`warploom checkpoint`: what a checkpoint holds, whether it is whole, and its weights for other programs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from warploom.checkpoint.format import OPTIMIZER, RNG, WEIGHTS, CheckpointDamaged, CheckpointTooNew, Manifest
from warploom.checkpoint.load import checkpoints_at, read_config, read_manifest, verify_checkpoint
from warploom.cli.export import Command as Export
from warploom.parallel.config import DIMENSIONS

_KINDS = {"weights": WEIGHTS, "optimizer": OPTIMIZER, "random states": RNG}


@dataclass(frozen=True)
class Inspect:
    """Print step, layout, files and tensors of a checkpoint, from its manifest and its configuration alone."""

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A step-... folder, or a run folder, whose newest checkpoint is taken."""
    tensors: Literal["weights", "all", "none"] = "weights"
    """Which tensors to list: the weights; the optimizer's and the random states too; or only how many there are."""

    def run(self) -> None:
        path = checkpoints_at(self.checkpoint)[0]
        shown = {"weights": ["weights"], "all": list(_KINDS), "none": []}[self.tensors]
        print("\n".join(describe(path, read_manifest(path), shown)))


@dataclass(frozen=True)
class Verify:
    """Compare every byte of a checkpoint, or of all checkpoints of a run, with its checksum. The exit code is 1 if one
    is damaged."""

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A step-... folder, or a run folder, whose checkpoints are all verified."""

    def run(self) -> int:
        is_sound = True
        for path in checkpoints_at(self.checkpoint):
            try:
                files = verify_checkpoint(path).files.values()
            except (CheckpointDamaged, CheckpointTooNew) as error:
                is_sound = False
                print(f"{path.name}  not sound: {error}")
                continue
            tensors = sum(len(file.tensors or ()) for file in files)
            size = sum(file.size for file in files)
            print(f"{path.name}  sound: {len(files)} files, {tensors:,} tensors, {size:,} bytes")
        return 0 if is_sound else 1


@dataclass(frozen=True)
class Command:
    """What a checkpoint holds, whether every byte is as it was written, and its weights for other programs."""

    action: Annotated[
        Annotated[Inspect, tyro.conf.subcommand("inspect")]
        | Annotated[Verify, tyro.conf.subcommand("verify")]
        | Annotated[Export, tyro.conf.subcommand("export")],
        tyro.conf.arg(name=""),
    ]

    def run(self) -> int | None:
        return self.action.run()


def describe(path: Path, manifest: Manifest, shown: list[str]) -> list[str]:
    """Return lines for people: what the checkpoint is, its files, its tensors (listed one by one for shown kinds)."""
    parallel = read_config(path, manifest).get("parallel", {})
    layout = {name: parallel[name] for name in (*DIMENSIONS, "devices") if parallel.get(name, 1) not in (1, -1)}
    loss = manifest.heldout_loss
    facts = {
        "checkpoint": str(path),
        "step": f"{manifest.step:,}",
        "run": manifest.run or "not said",
        "held-out loss": "not measured" if loss is None else f"{loss:.4f} nats per token",
        "layout": ", ".join(f"{name} {size}" for name, size in layout.items()) or "one process",
        "format": f"version {manifest.version}",
        "size": f"{sum(file.size for file in manifest.files.values()):,} bytes",
    }
    lines = [f"{name:<15}{value}" for name, value in facts.items()]
    lines += ["", f"{'file':<36}{'bytes':>16}"]
    lines += [f"{name:<36}{file.size:>16,}" for name, file in sorted(manifest.files.items())]
    for title, kind in _KINDS.items():
        pieces = manifest.pieces(kind)
        wholes = {name: found[0][1].whole for name, found in pieces.items()}
        lines += ["", f"{title}: {len(wholes):,} tensors, {sum(map(math.prod, wholes.values())):,} numbers"]
        if title in shown:
            for name, found in pieces.items():
                shape = " x ".join(map(str, wholes[name])) or "scalar"
                parts = f"  in {len(found)} parts" if len(found) > 1 else ""
                lines.append(f"  {name:<56} {found[0][1].dtype:<5} {shape}{parts}")
    return lines
