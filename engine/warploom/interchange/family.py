"""Family: one architecture of Hugging Face transformers, as a configuration and a list of tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from warploom.errors import UserError
from warploom.interchange.mapping import Entry, same, with_parameters
from warploom.models.config import TransformerConfig

ACTIVATIONS = {
    "relu": "relu",
    "relu2": "relu2",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
# The first name that transformers has for ours.
THEIR_ACTIVATIONS = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}


@dataclass(frozen=True)
class Family:
    """How one model_type of transformers and ours say the same.

    head: their output layer and embedding, which are one matrix if the model is tied. prefix: what checkpoints of the
    model without output layer leave out of the names. ignored: buffers that hold no weight. constants: tensors that
    are theirs alone and must be written.
    """

    model_type: str
    architecture: str
    head: tuple[str, str]
    prefix: str
    read_config: Callable[[Settings], dict[str, Any]]
    """config.json to the fields of a TransformerConfig that are not defaults; tie_embeddings is put in later."""
    write_config: Callable[[TransformerConfig], dict[str, Any]]
    """The reverse. Raises UserError, a sentence without subject, for what the architecture cannot express."""
    entries: Callable[[TransformerConfig], list[Entry]]
    ignored: re.Pattern[str] = re.compile(r"$^")
    constants: Callable[[TransformerConfig], dict[str, Tensor]] = field(default=lambda config: {})
    correct: Callable[[Settings, TransformerConfig, dict[str, Tensor]], None] | None = None
    """Changes our weights as a setting of theirs asks that the entries do not know of."""

    def all_entries(self, config: TransformerConfig) -> list[Entry]:
        """entries, and those of the output layer."""
        entries = self.entries(config)
        if not config.tie_embeddings:
            entries.append(same(self.head[0], "lm_head.weight"))
        return entries


class Settings:
    """A config.json whose values are checked as they are read."""

    def __init__(self, values: Mapping[str, Any], path: str) -> None:
        self.values, self.path = values, path

    def number(self, name: str, default: int | None = None) -> int:
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"{self.path} says {name} {value!r}, and a whole number is needed")
        return value

    def real(self, name: str, default: float) -> float:
        value = self.values.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UserError(f"{self.path} says {name} {value!r}, and a number is needed")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise UserError(f"{self.path} says {name} {value!r}, and true or false is needed")
        return value

    def activation(self, name: str, default: str) -> str:
        value = self.values.get(name, default)
        if value not in ACTIVATIONS:
            raise UserError(f"{self.path} says {name} {value!r}; known: {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def require(self, name: str, wanted: Any, default: Any) -> None:
        """Refuse a variant that is not implemented."""
        value = self.values.get(name, default)
        if value != wanted:
            raise UserError(f"{self.path} says {name} {value!r}, and only {wanted!r} is supported")

    def rotary_base(self) -> float:
        """The base of plain rotary positions, where transformers 4 or 5 writes it. Scaled ones are refused."""
        rope = self.values.get("rope_parameters") or self.values.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise UserError(f"{self.path} asks for rotary positions {rope!r}; only unscaled ones are supported")
        return float(rope.get("rope_theta", self.values.get("rope_theta", 10000.0)))


def require_fields(config: TransformerConfig, **wanted: Any) -> None:
    """Raise UserError if a field has another value than the one, or one of the tuple, that an architecture has."""
    for name, expected in wanted.items():
        value = getattr(config, name)
        if value not in (expected if isinstance(expected, tuple) else (expected,)):
            raise UserError(f"cannot have {name} {value!r}")


def layers(count: int, entries_of: Callable[[int], Sequence[Entry]]) -> list[Entry]:
    return [entry for layer in range(count) for entry in entries_of(layer)]


def parts(theirs: str, ours: str, names: Mapping[str, str], bias: bool) -> list[Entry]:
    """Layers called otherwise there, alike in all else."""
    return [
        entry
        for their_name, our_name in names.items()
        for entry in with_parameters(same, f"{theirs}.{their_name}", f"{ours}.{our_name}", bias)
    ]


def logits_bias_constant(config: TransformerConfig) -> dict[str, Tensor]:
    """What BART and Marian always have and ours only if it is not zero."""
    return {} if config.output_bias else {"final_logits_bias": torch.zeros(1, config.vocab_size)}
