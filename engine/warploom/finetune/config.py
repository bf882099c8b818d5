"""What a fine-tuning run adds to a RunConfig: the task, the parameters that are trained, the chat template."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from warploom.errors import UserError
from warploom.nn.lora import LoRAConfig


@dataclass(frozen=True)
class FinetuneConfig:
    task: Literal["auto", "instruct", "preference", "text"] = "auto"
    """instruct: the loss on answers only. preference: chosen over rejected answers (DPO). text: on every token.
    auto sees by the fields of the first line."""
    chat_template: str = "auto"
    """How a conversation is written: turns, alpaca, or a Jinja2 file; auto takes the base's own, or else turns."""
    wrap_prompts: bool = True
    """Lines of prompt and response are put through the chat template; otherwise they are trained on as they stand."""
    packing: bool = True
    """Put several examples into a row, which do not see each other; otherwise each has a row of its own."""
    heldout_fraction: float = 0.05
    """Share of the examples that is never trained on, chosen by a hash of the example."""
    beta: float = 0.1
    """preference: how dear it is to leave the base; small lets the model go far."""
    on_bad_line: Literal["error", "skip"] = "error"
    """What to do with lines that are no example; skip counts them."""
    freeze: tuple[str, ...] = ()
    """Patterns of the names of parameters that are not trained, such as embedding.* or *_norm.*."""
    last_layers: int | None = None
    """Train only the last so many blocks, and what follows them."""
    new_layers: int = 0
    """Blocks put on top of the base's, which begin by changing nothing; only they are trained."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    merge: bool = False
    """lora: write the merged model too, which needs no base, into the folder merged of the run."""
    forgetting_data: Path | None = None
    """Token shards of the base's text, on whose held-out split the loss is measured before and after; None takes those
    in the folder data of the base's run."""

    def __post_init__(self) -> None:
        if not 0 < self.heldout_fraction < 1:
            raise UserError(f"tune.heldout_fraction is {self.heldout_fraction}; give a fraction between 0 and 1")
        if not self.beta > 0:
            raise UserError(f"tune.beta is {self.beta}; give a number above 0, 0.1 is usual")
        if self.new_layers < 0:
            raise UserError(f"tune.new_layers is {self.new_layers}; give 0 or more")
        if self.last_layers is not None and self.last_layers < 1:
            raise UserError(f"tune.last_layers is {self.last_layers}; give 1 or more, or leave it out")
        ways = {
            "lora.rank": self.lora.rank > 0,
            "last_layers": self.last_layers is not None,
            "new_layers": self.new_layers > 0,
        }
        chosen = [name for name, given in ways.items() if given]
        if len(chosen) > 1:
            raise UserError(f"tune has {' and '.join(chosen)}, which each say what alone is trained; leave one")
        if self.merge and not self.lora.rank:
            raise UserError("tune.merge is for lora, and tune.lora.rank is 0; leave it out")
