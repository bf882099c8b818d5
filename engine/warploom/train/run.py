"""From a folder of text to a trained model, samples and a report: the whole road, in the order it is walked."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.console import Console

import warploom.ops  # noqa: F401  registers torch.ops.warploom_cpu, which names the instruction-set level
from warploom.checkpoint.format import list_checkpoints
from warploom.data.documents import list_files
from warploom.data.shards import TokenDataset, tokenize_corpus
from warploom.data.stdlib import stdlib_paths
from warploom.data.tokenizer import Tokenizer
from warploom.generate.distribution import SamplingConfig
from warploom.generate.sampler import generate
from warploom.models.config import TransformerConfig
from warploom.models.transformer import Transformer
from warploom.ops import _extension
from warploom.train.budget import BudgetPlan, Deadline, vocab_size
from warploom.train.config import RunConfig
from warploom.train.device import choose_device
from warploom.train.load_model import load_model
from warploom.train.monitor import Monitor
from warploom.train.probe import plan_on_this_machine
from warploom.train.report import Sample, write_report
from warploom.train.result import TrainResult
from warploom.train.trainer import Trainer

if TYPE_CHECKING:
    from warploom.parallel.apply import Parallelize

SAMPLE_TEMPERATURES = (0.2, 0.7, 1.0)
_PROMPT_TOKENS = 12
_NUM_PROMPTS = 2


@dataclass(frozen=True)
class TextConfig:
    """Which text, and how it becomes tokens."""

    tokenizer: Path | None = None
    """A tokenizer.json to use; None trains one with model.vocab-size words on this text."""
    heldout_fraction: float = 0.05
    """Share of the text that is never trained on, chosen by a hash of the text itself."""
    text_column: str = "text"
    """Field of .jsonl lines and column of .parquet files that holds the text."""
    on_bad_utf8: Literal["error", "replace"] = "error"
    """What to do with bytes that are not UTF-8; replace puts U+FFFD there."""
    on_bad_line: Literal["error", "skip"] = "error"
    """What to do with lines of .jsonl files that are no JSON object with the text; skip counts them."""


@dataclass(frozen=True)
class TextRun:
    """What train_on_text has done."""

    result: TrainResult
    config: RunConfig
    samples: tuple[Sample, ...]
    report: Path | None
    """None if a signal ended the run."""
    wall_s: float


def open_text(
    data: Sequence[str | Path], out_dir: Path, text: TextConfig, vocab_size: int, console: Console
) -> TokenDataset:
    """Return the token shards of data: files, folders or globs of text, encoded into out_dir/data; one folder of token
    shards, opened as it is; or nothing, which stands for the standard library of the running Python."""
    if _is_shards(data):
        return TokenDataset(data[0])
    stage_before = ""

    def progress(stage: str, done_bytes: int, total_bytes: int | None) -> None:
        nonlocal stage_before
        if stage != stage_before:
            console.print(f"Text: {stage} ...", highlight=False)
        stage_before = stage

    dataset = tokenize_corpus(
        list(data) or stdlib_paths(),
        out_dir / "data",
        vocab_size=vocab_size,
        tokenizer=None if text.tokenizer is None else Tokenizer.load(text.tokenizer),
        heldout_fraction=text.heldout_fraction,
        text_column=text.text_column,
        on_bad_utf8=text.on_bad_utf8,
        on_bad_line=text.on_bad_line,
        progress=progress,
        replace=not list_checkpoints(out_dir),
    )
    train, heldout = dataset.train, dataset.heldout
    console.print(
        f"Text: {train.num_bytes / 1e6:,.1f} MB to train on ({train.num_tokens:,} tokens), "
        f"{heldout.num_bytes / 1e6:,.1f} MB held out ({heldout.num_tokens:,} tokens), "
        f"vocabulary {dataset.tokenizer.vocab_size:,}.",
        highlight=False,
    )
    return dataset


def _is_shards(data: Sequence[str | Path]) -> bool:
    return len(data) == 1 and (Path(data[0]) / "manifest.json").is_file()


def train_on_text(
    data: Sequence[str | Path] = (),
    config: RunConfig | None = None,
    *,
    text: TextConfig | None = None,
    budget_s: float | None = None,
    started: float | None = None,
    console: Console | None = None,
    parallelize: Parallelize | None = None,
    benchmark: Callable[[Transformer, Tokenizer], Mapping[str, float]] | None = None,
) -> TextRun:
    """Tokenize, train, sample and report; everything is written into config.train.out_dir.

    data: see open_text. With budget_s, seconds from `started` (a time.monotonic(), now if None), the model, the batch,
    the optimizer and the length of the run are chosen and what config says of them is not used.
    parallelize: for a run of many processes, each of which calls; train.processes.joined makes it. benchmark: scores of
    a model by name, measured at each evaluation (evaluate.during_training has one).
    Raises UserError for what a person can mend.
    """
    started = time.monotonic() if started is None else started
    text = TextConfig() if text is None else text
    console = Console() if console is None else console
    config = RunConfig(model=TransformerConfig()) if config is None else config
    out_dir = config.train.out_dir
    before = _config_of_run(out_dir) if budget_s is not None and config.train.resume == "auto" else None
    words = config.model.vocab_size
    if before is not None:
        words = before.model.vocab_size
    elif budget_s is not None and text.tokenizer is None and not _is_shards(data):
        words = vocab_size(sum(path.stat().st_size for path in list_files(list(data) or stdlib_paths())))
    dataset = _open_text_once(data, out_dir, text, words, console, parallelize)

    plan: BudgetPlan | None = None
    if before is not None:
        console.print(f"Going on with what was chosen for the run in {out_dir}.", highlight=False)
        config = dataclasses.replace(before, train=dataclasses.replace(before.train, out_dir=out_dir))
    elif budget_s is not None:
        device = choose_device(config.train.device)
        plan = plan_on_this_machine(budget_s - (time.monotonic() - started), dataset, device)
        config = planned_config(config, plan)
        for sentence in plan.explanation:
            console.print(f"Plan: {sentence}", highlight=False)
    config = _with_vocabulary(config, dataset, console)
    deadline = None
    if plan is not None and budget_s is not None:
        deadline = Deadline(started + budget_s, budget_s, plan.reserve_s, plan.step_s)

    torch.manual_seed(config.train.seed)
    model = Transformer(config.model)
    is_first = parallelize is None or parallelize.mesh.rank == 0
    result = Trainer(
        model,
        dataset,
        config,
        tokenizer=dataset.tokenizer,
        monitor=Monitor(out_dir, console=console) if is_first else None,
        deadline=deadline,
        parallelize=parallelize,
        benchmark=None if benchmark is None else _with_tokenizer(benchmark, dataset.tokenizer),
    ).fit()
    if result.stop_signal is not None or not is_first:
        return TextRun(result, config, (), None, time.monotonic() - started)
    if (
        parallelize is not None or config.parallel.devices > 1
    ):  # the weights are in parts; the checkpoint has them whole
        assert result.checkpoint is not None
        model = load_model(result.checkpoint).model
    model.compute_dtype = torch.float32
    samples = write_samples(model, dataset, config.train.sample_prompts, config.train.seed)
    report = write_report(
        out_dir,
        result=result,
        config=config.to_dict(),
        samples=samples,
        environment=environment(dataset, model, config),
        wall_s=time.monotonic() - started,
        warnings=result.warnings,
        plan=() if plan is None else plan.explanation,
    )
    return TextRun(result, config, tuple(samples), report, time.monotonic() - started)


def _open_text_once(
    data: Sequence[str | Path],
    out_dir: Path,
    text: TextConfig,
    vocab_size: int,
    console: Console,
    parallelize: Parallelize | None,
) -> TokenDataset:
    """Let the first process encode the text, and the others open what it wrote."""
    if parallelize is None:
        return open_text(data, out_dir, text, vocab_size, console)
    if parallelize.mesh.rank == 0:
        dataset = open_text(data, out_dir, text, vocab_size, console)
    parallelize.mesh.barrier()
    return dataset if parallelize.mesh.rank == 0 else open_text(data, out_dir, text, vocab_size, console)


def planned_config(config: RunConfig, plan: BudgetPlan) -> RunConfig:
    """Put what the plan chose into the configuration; where to write, seeds and prompts stay."""
    train = dataclasses.replace(
        config.train,
        steps=plan.steps,
        epochs=None,
        seq_len=plan.batch.seq_len,
        global_batch_size=plan.batch.global_batch_size,
        micro_batch_size=plan.batch.micro_batch_size,
        dtype="bf16" if plan.dtype == torch.bfloat16 else "fp32",
        eval_every=plan.eval_every,
        eval_tokens=plan.eval_tokens,
        save_every=max(plan.eval_every, config.train.save_every),
    )
    return RunConfig(model=plan.model, train=train, optimizer=plan.optimizer, schedule=plan.schedule)


def write_samples(model: Transformer, dataset: TokenDataset, prompts: Sequence[str], seed: int) -> list[Sample]:
    """Continue each prompt at every temperature of SAMPLE_TEMPERATURES; without prompts, the beginnings of held-out
    documents, which the model has not seen."""
    tokenizer = dataset.tokenizer
    if not prompts:
        starts = dataset.heldout.document_starts[: 8 * _NUM_PROMPTS : 8] + 1  # past <|endoftext|>
        length = min(_PROMPT_TOKENS, dataset.heldout.num_tokens - int(starts.max()))
        prompts = [tokenizer.decode(ids) for ids in dataset.heldout.read(starts, length).tolist()]
    room = model.config.max_seq_len - max(len(tokenizer.encode(prompt)) for prompt in prompts) - 1
    samples = []
    for temperature in SAMPLE_TEMPERATURES:
        sampling = SamplingConfig(temperature=temperature, max_new_tokens=max(1, min(120, room)), seed=seed)
        for prompt, (written,) in zip(prompts, generate(model, tokenizer, prompts, sampling), strict=True):
            samples.append(Sample(temperature, prompt, written))
    return samples


def environment(dataset: TokenDataset, model: Transformer, config: RunConfig) -> Mapping[str, str]:
    """What the numbers of a run depend on besides its configuration, as name -> value to be read."""
    splits: dict[str, Any] = dataset.manifest["splits"]
    return {
        "parameters": f"{model.num_parameters():,}",
        "training text": f"{splits['train']['num_bytes']:,} bytes, {splits['train']['num_tokens']:,} tokens",
        "held-out text": f"{splits['heldout']['num_bytes']:,} bytes, {splits['heldout']['num_tokens']:,} tokens",
        "tokenizer": f"{dataset.tokenizer.vocab_size:,} words, sha256 {dataset.tokenizer.sha256[:16]}",
        **machine(model),
    }


def machine(model: Transformer) -> Mapping[str, str]:
    """What the speed of a run depends on, as name -> value to be read."""
    return {
        "device": torch.cuda.get_device_name() if next(model.parameters()).is_cuda else processor_name(),
        "CPU kernels": _extension.missing or f"instruction-set level {torch.ops.warploom_cpu.level()}",
        "threads": str(torch.get_num_threads()),
        "PyTorch": torch.__version__,
        "Python": platform.python_version(),
        "system": platform.platform(),
    }


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:  # not Linux
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _config_of_run(out_dir: Path) -> RunConfig | None:
    """The configuration of the run that out_dir holds, None if it holds none."""
    return load_model(out_dir, on_skip=lambda text: None).config if list_checkpoints(out_dir) else None


def _with_vocabulary(config: RunConfig, dataset: TokenDataset, console: Console) -> RunConfig:
    found = dataset.tokenizer.vocab_size
    if found == config.model.vocab_size:
        return config
    console.print(f"The model's vocabulary is the tokenizer's: {found:,} words.", highlight=False)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=found))


def _with_tokenizer(
    benchmark: Callable[[Transformer, Tokenizer], Mapping[str, float]], tokenizer: Tokenizer
) -> Callable[[Transformer], Mapping[str, float]]:
    return lambda model: benchmark(model, tokenizer)
