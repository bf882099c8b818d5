"""How benchmarks are put: what a person chooses, beside which tasks and where their files are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from warploom.errors import UserError


@dataclass(frozen=True)
class EvalConfig:
    limit: int | None = None
    """Items of each task, and of each subject of MMLU, from the first; None takes all."""
    shots: int | None = None
    """Worked examples before each question; None takes each task's own number."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Compute type; logits are computed in fp32 either way."""
    batch_size: int = 16
    """Texts written or windows of text read at a time."""
    max_new_tokens: int | None = None
    """Longest answer where a task asks for text, tokens; None takes each task's own."""
    samples: int = 1
    """humaneval: programs per problem. 1 is greedy; more are drawn at temperature 0.2 and top-p 0.95."""
    seed: int = 0
    """Seed of what is drawn."""
    allow_code_execution: bool = False
    """humaneval: run the programs that the model writes, in a sandbox (docs/evaluation.md says how strong it is)."""
    code_workers: int = 2
    """humaneval: programs run side by side."""
    chat_template: str | None = None
    """mt_bench: name of a chat template, or its file, for a checkpoint that holds none."""
    judge: str | None = None
    """mt_bench: who judges, the http(s) address of an OpenAI-compatible API (up to /v1) or a checkpoint; None writes
    answers for a later judgment."""
    judge_model: str = "gpt-4"
    """mt_bench: name of the model at the judge's address."""
    judge_key_file: Path | None = None
    """mt_bench: file with the key for the judge's address."""

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "max_new_tokens", "samples", "code_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name.replace('_', '-')} is {value}; give 1 or more")
        if self.shots is not None and self.shots < 0:
            raise UserError(f"shots is {self.shots}; give 0 or more")
