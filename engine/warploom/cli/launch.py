"""`warploom launch`: a verb in many processes, watched and started again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from warploom.cli import standby
from warploom.errors import UserError
from warploom.launch import LaunchConfig, launch


@dataclass(frozen=True)
class Command(LaunchConfig):
    """Run a verb in several processes: `warploom launch --nproc 4 -- train --parallel.shard 4 ...`. When one dies,
    freezes or gets stuck, all start again from the last checkpoint."""

    verb: Annotated[tuple[str, ...], Positional, arg(metavar="[VERB ...]")] = ()
    """After --: the verb, and its flags."""

    def run(self) -> int:
        if not self.verb:
            raise UserError("there is no verb to run; give it after --, as in: warploom launch --nproc 4 -- train ...")
        standby.prepare()
        return launch(self, self.verb, standby.run)
