"""`warploom bench`: runs the benches of the source checkout, which are not part of the installed package."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from warploom.errors import UserError

CHECKOUT = Path(__file__).resolve().parents[3]  # where engine/ and bench/ lie beside each other


@dataclass(frozen=True)
class Command:
    """Time this engine against plain torch on this machine, after checking that it is right."""

    which: tyro.conf.Positional[Literal["ops", "step"]] = "ops"
    """ops: each kernel, forward and backward. step: the whole training step."""
    only: tuple[str, ...] = ()
    """Names of ops, or of step configurations (small, gpt2); none given means the bench's default."""
    dtype: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    """Compute types."""
    budget_s: float | None = None
    """Seconds of timing per case; None takes the bench's default."""
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's choice."""
    json: Path | None = None
    """Write the records there as JSON."""

    def run(self) -> int:
        if not (CHECKOUT / "bench" / "harness.py").is_file():
            raise UserError(
                f"there are no benches in {CHECKOUT}: they are part of the source checkout, so clone it and run there"
            )
        command = [sys.executable, "-m", f"bench.{self.which}"]
        if self.only:
            command += ["--op" if self.which == "ops" else "--config", *self.only]
        command += ["--dtype", *self.dtype]
        if self.budget_s is not None:
            command += ["--budget-s", str(self.budget_s)]
        if self.json is not None:
            command += ["--json", str(self.json.absolute())]
        command += ["--threads", str(self.threads)]
        return subprocess.run(command, cwd=CHECKOUT).returncode
