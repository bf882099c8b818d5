"""`warploom verify`: every op's proof, run on the user's own machine."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from warploom.errors import UserError, nearest
from warploom.ops import REGISTRY, _extension
from warploom.ops._proof import Proof, prove_all


@dataclass(frozen=True)
class Command:
    """Prove every op on this machine, on each back end and at each instruction-set level that it has: outputs and
    gradients against float64, memory full of NaN, the same bits at each repeat and for one thread and two. The exit
    code is 1 if anything fails."""

    op: tuple[str, ...] = ()
    """Names of ops; none given means all."""

    def run(self) -> int:
        for name in self.op:
            if name not in REGISTRY:
                raise UserError(f"no op is called {name!r}{nearest(name, REGISTRY)}")
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = 1000  # a pipe has no edge to wrap at
        started = time.monotonic()
        proofs = prove_all([REGISTRY[name] for name in dict.fromkeys(self.op or sorted(REGISTRY))])
        console.print(_table(proofs, plain=not console.is_terminal))
        console.print("error: the largest of all outputs and gradients, as a share of what is allowed")
        wrong = [proof for proof in proofs if proof.failures]
        for proof in wrong:
            for failure in proof.failures:
                console.print(f"{proof.op} on {proof.backend} at {proof.level}: {failure}", markup=False)
        if _extension.missing is not None:
            console.print(f"Only what runs on torch alone was proved: {_extension.missing}", markup=False)
        cases = sum(proof.cases for proof in proofs)
        failures = sum(len(proof.failures) for proof in proofs)
        console.print(f"{cases:,} cases, {failures:,} failures, in {time.monotonic() - started:.0f} s.")
        return 1 if wrong else 0


def _table(proofs: list[Proof], *, plain: bool) -> Table:
    table = Table(box=None if plain else box.SIMPLE_HEAD, pad_edge=False)
    for column in ("op", "back end", "level", "cases", "refused", "error", "verdict"):
        table.add_column(column, justify="right" if column in ("cases", "refused", "error") else "left", no_wrap=True)
    for proof in proofs:
        table.add_row(
            *(proof.op, proof.backend, proof.level, str(proof.cases), str(proof.refused or ""), f"{proof.worst:.2f}"),
            f"WRONG in {len(proof.failures)}" if proof.failures else "right",
        )
    return table
