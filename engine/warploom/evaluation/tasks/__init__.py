"""The benchmarks, by the name that `warploom eval --tasks` takes."""

from warploom.evaluation.task import Task
from warploom.evaluation.tasks.arc import Arc
from warploom.evaluation.tasks.gsm8k import GSM8K
from warploom.evaluation.tasks.hellaswag import HellaSwag
from warploom.evaluation.tasks.humaneval import HumanEval
from warploom.evaluation.tasks.mmlu import MMLU
from warploom.evaluation.tasks.mt_bench import MTBench
from warploom.evaluation.tasks.truthfulqa import TruthfulQA
from warploom.evaluation.tasks.truthfulqa_gen import TruthfulQAGeneration

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *(Arc("easy"), Arc("challenge"), HellaSwag(), MMLU(), TruthfulQA()),
        *(TruthfulQAGeneration(), GSM8K(), HumanEval(), MTBench()),
    )
}
