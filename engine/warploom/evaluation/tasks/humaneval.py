"""HumanEval (Chen et al., 2021): finish a Python function; the tests that came with it are run in a sandbox."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from warploom.errors import UserError
from warploom.evaluation.config import EvalConfig
from warploom.evaluation.figures import pass_at_k
from warploom.evaluation.multiple_choice import record
from warploom.evaluation.sandbox import describe, run_program, run_programs
from warploom.evaluation.task import Item, Record, Task, TaskFiles, require
from warploom.evaluation.text_model import TextModel
from warploom.generate.distribution import SamplingConfig

_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
_TIMEOUT_S = 3.0


class HumanEval(Task):
    """pass@k for each k of 1, 2, 4, ... (and 10 and 100) that the number of samples allows.

    Rows: {"task_id", "prompt", "entry_point", "test"}.
    """

    name = "humaneval"
    version = "1"
    files = {"test": ("*humaneval.jsonl*", "*humaneval/*")}

    def items(self, files: TaskFiles, num_shots: int) -> list[Item]:
        if num_shots:
            raise UserError("humaneval takes no shots; leave shots out")
        items = []
        for _, row in files.rows(self, "test"):
            id_, prompt, entry_point, test = require(row, self, "task_id", "prompt", "entry_point", "test")
            items.append(Item(id_, prompt, {"test": f"{test}\ncheck({entry_point})"}))
        return items

    def check(self, config: EvalConfig) -> None:
        if not config.allow_code_execution:
            raise UserError(
                "humaneval runs programs that the model writes, in a sandbox (docs/evaluation.md says how strong it "
                "is); allow it with --allow-code-execution, or leave humaneval out"
            )
        run_program("pass")  # where there can be no sandbox, that is known before hours of writing

    def answer(self, model: TextModel, items: Sequence[Item], config: EvalConfig) -> Iterator[Record]:
        prompts, names = [item.prompt for item in items], [item.id for item in items]
        for number, texts, cut in model.complete(prompts, self._sampling(config), names=names):
            item = items[number]
            programs = [f"{item.prompt}{text}\n{item.values['test']}" for text in texts]
            outcomes = list(run_programs(programs, workers=config.code_workers, timeout_s=_TIMEOUT_S))
            num_right = sum(outcome.status == "passed" for outcome in outcomes)
            ks = [k for k in (1, 2, 4, 8, 10, 16, 32, 64, 100) if k <= len(texts)]
            late = any(outcome.status == "timed out" for outcome in outcomes)
            yield record(
                item,
                {f"pass@{k}": pass_at_k(len(texts), num_right, k) for k in ks},
                [*(["timed out"] if late else []), *(["prompt cut"] if cut else [])],
                answers=texts,
                outcomes=[{"status": outcome.status, "message": outcome.message} for outcome in outcomes],
                isolation=outcomes[0].isolation,
            )

    def settings(self, config: EvalConfig) -> dict[str, Any]:
        sampling = self._sampling(config)
        return {
            "samples": config.samples,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_new_tokens": sampling.max_new_tokens,
            "seed": config.seed,
            "timeout_s": _TIMEOUT_S,
            "isolation": describe(run_program("pass").locks),
        }

    def _sampling(self, config: EvalConfig) -> SamplingConfig:
        is_drawn = config.samples > 1
        return SamplingConfig(
            temperature=0.2 if is_drawn else 0.0,
            top_p=0.95 if is_drawn else None,
            stop=_STOP,
            max_new_tokens=config.max_new_tokens or 1024,
            num_samples=config.samples,
            seed=config.seed,
        )
