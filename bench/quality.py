"""Time to quality: how long until the held-out bits per byte of a well-known CPU quick start are reached?

    python -m bench.quality --text input.txt [--budget-s 20] [--json FILE]

The quick start (bench/plain_char_model.py) runs to its end in plain torch; what it reaches on the held-out text is the
target, and the time it took the yardstick. Then this engine runs as `warploom train --budget` would, on the same text,
with everything its own choice, and the moment counts at which an evaluation first finds it at the target. Held out is
the last tenth of the text, as in the quick start; all of it is predicted once in each evaluation, by both. Time is
training time, evaluations left out on both sides; what comes before the first step is stated beside it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

from bench.harness import print_fingerprint, print_table, write_records
from bench.plain_char_model import Characters, CharTrainer, Recipe
from warploom.data.dataset import TokenDataset
from warploom.data.documents import read_documents
from warploom.data.shards import tokenize_corpus
from warploom.data.stdlib import stdlib_paths
from warploom.evaluation.perplexity import TextWindows, text_windows
from warploom.models.transformer import Transformer
from warploom.train.batches import TokenData
from warploom.train.budget import vocab_size
from warploom.train.config import RunConfig, TrainConfig, TransformerConfig
from warploom.train.heldout import heldout_loss
from warploom.train.monitor import METRICS_FILE, Monitor
from warploom.train.probe import plan_on_this_machine
from warploom.train.run import planned_config
from warploom.train.trainer import Trainer

CPU = torch.device("cpu")
HELDOUT_SHARE = 0.1
RECIPE_EVALUATIONS = 8
_STDLIB_EVERY = 10  # files; a megabyte, the size of the text that the quick start was made for


@dataclass(frozen=True)
class Point:
    """A model in training: bits per byte of the whole held-out text."""

    step: int
    train_s: float
    bits_per_byte: float


@dataclass(frozen=True)
class Run:
    """One side of the race."""

    curve: tuple[Point, ...]
    prepare_s: float  # from the text to the first step
    num_parameters: int
    tokens_per_step: int
    what: str


def read_text(path: Path | None) -> tuple[str, str]:
    """Return the text and what it is; without a path, every tenth file of the standard library."""
    if path is not None:
        return path.read_text(encoding="utf-8"), path.name
    files = stdlib_paths()[::_STDLIB_EVERY]
    text = "".join(document for _, document in read_documents(files))
    return text, f"every {_STDLIB_EVERY}th file of the Python standard library"


def halves(text: str) -> tuple[str, str]:
    """The training and the held-out part."""
    cut = int((1 - HELDOUT_SHARE) * len(text))
    return text[:cut], text[cut:]


def run_recipe(train: str, heldout: str, recipe: Recipe, evaluations: int = RECIPE_EVALUATIONS) -> Run:
    started = time.perf_counter()
    characters = Characters(train + heldout)
    trainer = CharTrainer(train, characters, recipe)
    prepare_s = time.perf_counter() - started
    windows = list(characters.windows(train, heldout, recipe.seq_len))
    curve = []
    for evaluation in range(1, evaluations + 1):
        while trainer.iteration < evaluation * recipe.iterations // evaluations:
            trainer.step()
        found = heldout_loss(trainer.model.loss_sum, windows, CPU)
        assert found is not None  # nothing asked it to stop
        curve.append(Point(trainer.iteration, trainer.train_s, found.bits_per_byte))
    return Run(
        curve=tuple(curve),
        prepare_s=prepare_s,
        num_parameters=sum(p.numel() for p in trainer.model.parameters()),
        tokens_per_step=recipe.batch_size * recipe.seq_len,
        what=f"{len(characters.characters)} characters, {recipe.num_layers} x {recipe.d_model}, "
        f"{recipe.batch_size} x {recipe.seq_len} a step, fp32",
    )


def run_engine(train: str, heldout: str, folder: Path, budget_s: float, evaluations: int) -> Run:
    """Do what `warploom train --budget` does, with evaluations on the held-out text of this bench."""
    train_path, heldout_path = folder / "train.txt", folder / "heldout.txt"
    train_path.write_text(train, encoding="utf-8")
    heldout_path.write_text(heldout, encoding="utf-8")
    started = time.perf_counter()
    # As ever, the engine keeps a twentieth of the text it is given for its own held-out split: it trains on less.
    dataset = tokenize_corpus([train_path], folder / "data", vocab_size=vocab_size(train_path.stat().st_size))
    plan = plan_on_this_machine(budget_s - (time.perf_counter() - started), dataset, CPU)
    prepare_s = time.perf_counter() - started
    config = planned_config(RunConfig(TransformerConfig(), TrainConfig(out_dir=folder / "run", device="cpu")), plan)
    run = train_engine(config, dataset, heldout_path, evaluations)
    return dataclasses.replace(run, prepare_s=prepare_s)


def train_engine(config: RunConfig, dataset: TokenDataset, heldout: Path, evaluations: int) -> Run:
    assert config.train.steps is not None
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, eval_every=max(1, config.train.steps // evaluations))
    )
    data = _Data(dataset, config.train, heldout)
    torch.manual_seed(config.train.seed)
    model = Transformer(config.model)
    monitor = Monitor(config.train.out_dir, console=Console(quiet=True))
    Trainer(model, data, config, tokenizer=dataset.tokenizer, monitor=monitor).fit()
    model_config, shape = config.model, config.train
    return Run(
        curve=tuple(read_curve(config.train.out_dir / METRICS_FILE)),
        prepare_s=0.0,
        num_parameters=model.num_parameters(),
        tokens_per_step=shape.global_batch_size * shape.seq_len,
        what=f"{model_config.vocab_size} words, {model_config.num_layers} x {model_config.d_model}, "
        f"{shape.global_batch_size} x {shape.seq_len} a step, {shape.dtype}",
    )


class _Data(TokenData):
    """The engine's own training split, and this bench's held-out text."""

    def __init__(self, dataset: TokenDataset, config: TrainConfig, heldout: Path) -> None:
        super().__init__(dataset, config)
        self._tokenizer, self._heldout, self._seq_len = dataset.tokenizer, heldout, config.seq_len

    def heldout_batches(self, micro_batch_size: int) -> list[TextWindows]:
        return list(text_windows(self._tokenizer, [self._heldout], self._seq_len, micro_batch_size))


def read_curve(metrics: Path) -> list[Point]:
    """The evaluations of a run's metrics.jsonl, each with the time that the steps before it took."""
    train_s, curve = 0.0, []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] == "step":
            train_s += record["step_s"]
        elif record["kind"] == "eval":
            curve.append(Point(record["step"], train_s, record["bits_per_byte"]))
    return curve


def first_at(curve: Sequence[Point], target: float) -> Point | None:
    """The first evaluation that finds the target reached."""
    return next((point for point in curve if point.bits_per_byte <= target), None)


@dataclass(frozen=True)
class Arguments:
    """Time until this engine is as good as a well-known CPU quick start, against that quick start."""

    text: Path | None = None
    """A text in UTF-8, about a megabyte (the quick start's own is Tiny Shakespeare); None takes part of the standard
    library of this Python."""
    budget_s: float = 20.0
    """Seconds for which the engine plans its run, as with warploom train --budget."""
    evaluations: int = 24
    """Evaluations of the engine's run; more find the moment more closely."""
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's choice."""
    json: Path | None = None
    """Write the records there as JSON."""


def main(arguments: Arguments) -> None:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print_fingerprint()
    text, name = read_text(arguments.text)
    train, heldout = halves(text)
    print(f"text: {name}, {len(train.encode()):,} bytes to train on, {len(heldout.encode()):,} held out")
    recipe = run_recipe(train, heldout, Recipe())
    with tempfile.TemporaryDirectory() as folder:
        engine = run_engine(train, heldout, Path(folder), arguments.budget_s, arguments.evaluations)
    nats = recipe.curve[-1].bits_per_byte * math.log(2) * len(heldout.encode()) / len(heldout)
    print(f"the quick start ends at {nats:.3f} nats per character")
    records = compare(recipe, engine)
    show(records)
    write_records(arguments.json, [{"text": name, **record} for record in records])


def compare(recipe: Run, engine: Run) -> list[dict[str, Any]]:
    """Records of the quick start at its end, of the engine where it reached the same (if it did), and at its end."""
    target = recipe.curve[-1]
    reached = first_at(engine.curve, target.bits_per_byte)
    rows = [("quick start, end", recipe, target)]
    if reached is not None:
        rows.append(("warploom, as good", engine, reached))
    rows.append(("warploom, end", engine, engine.curve[-1]))
    records = []
    for subject, run, point in rows:
        all_s = run.prepare_s + point.train_s
        is_as_good = point.bits_per_byte <= target.bits_per_byte
        records.append(
            {
                "bench": "quality",
                "subject": subject,
                **dataclasses.asdict(point),
                "ratio": target.train_s / point.train_s if is_as_good else None,
                "with_preparation_s": all_s,
                "ratio_with_preparation": (recipe.prepare_s + target.train_s) / all_s if is_as_good else None,
                "trained_tokens": point.step * run.tokens_per_step,
                "parameters": run.num_parameters,
                "what": run.what,
            }
        )
    return records


def show(records: list[dict[str, Any]]) -> None:
    def ratio(value: float | None) -> str:
        return "not as good" if value is None else f"{value:.1f}x"

    for record in (records[0], records[-1]):
        print(f"{record['subject'].partition(',')[0]}: {record['parameters']:,} parameters, {record['what']}")
    print_table(
        "seconds of training, evaluations left out; sooner: the quick start's seconds over these",
        ("", "bits per byte", "steps", "training s", "sooner", "with preparation s", "sooner"),
        [
            (
                record["subject"],
                f"{record['bits_per_byte']:.4f}",
                f"{record['step']:,}",
                f"{record['train_s']:.1f}",
                ratio(record["ratio"]),
                f"{record['with_preparation_s']:.1f}",
                ratio(record["ratio_with_preparation"]),
            )
            for record in records
        ],
    )


if __name__ == "__main__":
    main(tyro.cli(Arguments))
