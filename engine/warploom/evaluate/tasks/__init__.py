"""The benchmarks, by the name that `warploom eval --tasks` takes."""

from warploom.evaluate.task import Task
from warploom.evaluate.tasks.arc import Arc
from warploom.evaluate.tasks.gsm8k import GSM8K
from warploom.evaluate.tasks.hellaswag import HellaSwag
from warploom.evaluate.tasks.humaneval import HumanEval
from warploom.evaluate.tasks.mmlu import MMLU
from warploom.evaluate.tasks.mt_bench import MTBench
from warploom.evaluate.tasks.truthfulqa import TruthfulQA
from warploom.evaluate.tasks.truthfulqa_gen import TruthfulQAGeneration

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *(Arc("easy"), Arc("challenge"), HellaSwag(), MMLU(), TruthfulQA()),
        *(TruthfulQAGeneration(), GSM8K(), HumanEval(), MTBench()),
    )
}
