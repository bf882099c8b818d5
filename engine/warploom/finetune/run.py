"""From a checkpoint and a file of examples to the tuned model, its samples and its report, in the order it is done."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from warploom.checkpoint.format import CheckpointState, list_checkpoints
from warploom.checkpoint.save import make_run_folder, save_checkpoint
from warploom.data.chat import ChatTemplate
from warploom.data.dataset import TokenDataset
from warploom.data.shards import tokenize_corpus
from warploom.data.tokenizer import Tokenizer
from warploom.errors import UserError
from warploom.finetune.config import FinetuneConfig
from warploom.finetune.data import ExampleData
from warploom.finetune.freeze import HeldMemory, add_layers, freeze, held_memory
from warploom.finetune.preference import PreferenceLoss, preference_accuracy, set_reference
from warploom.finetune.rows import read_instructions, read_pairs, task_of
from warploom.generate.distribution import SamplingConfig
from warploom.generate.sampler import generate
from warploom.models.transformer import Transformer
from warploom.nn.lora import base_state, merge_lora, unmerge_lora
from warploom.optim import OptimizerConfig, ScheduleConfig
from warploom.train.batches import TokenData
from warploom.train.config import RunConfig, TrainConfig, to_json
from warploom.train.device import choose_device, choose_dtype
from warploom.train.heldout import HeldoutLoss, heldout_loss
from warploom.train.load_model import ADAPTER, CHAT_TEMPLATE, LoadedModel, base_record, load_model
from warploom.train.monitor import Monitor
from warploom.train.report import Sample, write_report
from warploom.train.result import TrainResult
from warploom.train.run import machine
from warploom.train.trainer import Trainer

TUNE = "finetune"  # entry of a checkpoint's meta: the FinetuneConfig
_BEFORE_FILE = "before.json"
_REFERENCE_FILE = "reference.safetensors"
_NUM_SAMPLES = 4


@dataclass(frozen=True)
class FinetuneRun:
    """What finetune has done."""

    result: TrainResult
    config: RunConfig
    samples: tuple[Sample, ...]
    report: Path | None
    """None if a signal ended the run."""
    wall_s: float
    memory: HeldMemory | None
    forgetting: tuple[HeldoutLoss, HeldoutLoss] | None
    """On the base's own held-out text, before and after; None if there is none."""
    accuracy: float | None
    """preference: share of held-out pairs whose chosen side gained more than the rejected one."""
    merged: Path | None
    """lora: the checkpoint of the merged model."""


def finetune(
    base: str | Path,
    data: Sequence[str | Path],
    tune: FinetuneConfig | None = None,
    train: TrainConfig | None = None,
    optimizer: OptimizerConfig | None = None,
    schedule: ScheduleConfig | None = None,
    *,
    console: Console | None = None,
) -> FinetuneRun:
    """Go on from the checkpoint base on data; everything is written into train.out_dir, and the same call goes on
    where it was interrupted.

    data: files of examples (rows.py), or for the task text, files, folders or globs of text or one folder of token
    shards. The checkpoints hold the whole model, or with LoRA the adapters alone, which load_model puts onto the base.
    Raises UserError for what a person can mend.
    """
    started = time.monotonic()
    tune = FinetuneConfig() if tune is None else tune
    console = Console() if console is None else console

    def say(text: str) -> None:
        assert console is not None
        console.print(text, markup=False, highlight=False)

    loaded = load_model(base, on_skip=say)
    tokenizer = _require_tokenizer(loaded)
    model = loaded.model
    train = TrainConfig(out_dir=Path("finetune")) if train is None else train
    if train.dtype == "auto":
        train = dataclasses.replace(train, dtype=loaded.config.train.dtype)  # what the base's training found fast
    _refuse_own_run(loaded.path, train.out_dir)
    torch.manual_seed(train.seed)
    if tune.new_layers:
        model = add_layers(model, tune.new_layers)
    freeze(model, tune, loaded.config.model.num_layers)
    config = RunConfig(
        model=model.config,
        train=train,
        optimizer=OptimizerConfig(name="adamw", lr=1e-4) if optimizer is None else optimizer,
        schedule=ScheduleConfig() if schedule is None else schedule,
    )
    device = choose_device(train.device)
    model.to(device)
    model.compute_dtype = choose_dtype(train.dtype, device)
    if train.threads:
        torch.set_num_threads(train.threads)

    task = task_of(data) if tune.task == "auto" else tune.task
    extras: dict[str, Any] = {TUNE: to_json(tune)}
    if tune.lora.rank:
        extras[ADAPTER] = {"lora": to_json(tune.lora), "base": base_record(loaded.path)}
    template = loaded.chat_template
    loss_sum: Callable[..., Tensor] | None = None
    if task == "text":
        dataset: ExampleData | TokenDataset = _open_text(data, train.out_dir, tokenizer, tune)
    else:
        template = _choose_template(tune.chat_template, loaded.chat_template)
        template.end_id(tokenizer)
        dataset = _open_examples(data, task, tokenizer, template, config, tune, say)
    if template is not None:
        extras[CHAT_TEMPLATE] = template.source
    micro_batch_size = min(train.micro_batch_size or 8, train.global_batch_size)
    if task == "preference":
        assert isinstance(dataset, ExampleData)
        identity = f"{base_record(loaded.path)['weights']} {model.compute_dtype}"
        if set_reference(model, dataset, train.out_dir / _REFERENCE_FILE, identity, micro_batch_size):
            say("Reference: the base's log-probabilities are computed, once.")
        loss_sum = PreferenceLoss(model, tune.beta)

    forgetting_data = _open_forgetting(loaded, tune, config, say)
    before = _before(model, forgetting_data, train.out_dir, micro_batch_size)
    monitor = Monitor(train.out_dir, console=console)
    trainer = Trainer(model, dataset, config, tokenizer=tokenizer, monitor=monitor, loss_sum=loss_sum, extras=extras)
    result = trainer.fit()
    if result.stop_signal is not None:
        return FinetuneRun(result, config, (), None, time.monotonic() - started, None, None, None, None)
    memory = held_memory(model, trainer.optimizers)
    say(f"Memory: {memory}")
    forgetting = None
    if before is not None:
        forgetting = before, _measure(model, forgetting_data, micro_batch_size)
        say(_forgetting_sentence(*forgetting))
    accuracy = None
    if task == "preference":
        assert isinstance(dataset, ExampleData)
        accuracy = preference_accuracy(model, dataset, micro_batch_size)
        say(f"Preference: of the held-out pairs, {accuracy:.1%} have the chosen side gain more than the rejected one.")
    merged = _save_merged(model, result, config, extras, tokenizer) if tune.merge else None
    model.compute_dtype = torch.float32
    samples = _samples(model, tokenizer, dataset, template, train)
    report = write_report(
        train.out_dir,
        result=result,
        config={
            "base": str(loaded.path),
            "data": [str(path) for path in data],
            **config.to_dict(),
            "tune": to_json(tune),
        },
        samples=samples,
        environment=_environment(model, dataset),
        wall_s=time.monotonic() - started,
        warnings=result.warnings,
        plan=[f"Task: {task}.", str(memory), *([_forgetting_sentence(*forgetting)] if forgetting else [])],
        loss_meaning=_LOSS_MEANINGS[task],
        more_figures=_figures(forgetting, accuracy),
    )
    return FinetuneRun(
        result, config, tuple(samples), report, time.monotonic() - started, memory, forgetting, accuracy, merged
    )


_LOSS_MEANINGS = {
    "text": "nats per token of text the model never trained on",
    "instruct": "nats per token of answers the model never trained on",
    "preference": "of pairs the model never trained on; a model that is its base has ln 2 = 0.693",
}


def _require_tokenizer(loaded: LoadedModel) -> Tokenizer:
    if loaded.tokenizer is None:
        raise UserError(f"{loaded.path} holds no tokenizer, so it cannot be tuned on text")
    if loaded.config.model.architecture != "decoder":
        raise UserError(f"{loaded.path} is a {loaded.config.model.architecture}; fine-tuning takes a decoder")
    return loaded.tokenizer


def _refuse_own_run(base: Path, out_dir: Path) -> None:
    if base.resolve().parent == out_dir.resolve():
        raise UserError(f"train.out_dir {out_dir} is the run of the base itself; choose another folder")


def _choose_template(name: str, own: ChatTemplate | None) -> ChatTemplate:
    if name == "auto":
        return ChatTemplate.named("turns") if own is None else own
    return ChatTemplate.named(name)


def _open_text(data: Sequence[str | Path], out_dir: Path, tokenizer: Tokenizer, tune: FinetuneConfig) -> TokenDataset:
    if len(data) == 1 and (Path(data[0]) / "manifest.json").is_file():
        return TokenDataset(data[0])
    return tokenize_corpus(
        list(data),
        out_dir / "data",
        tokenizer=tokenizer,
        heldout_fraction=tune.heldout_fraction,
        on_bad_line=tune.on_bad_line,
        replace=not list_checkpoints(out_dir),
    )


def _open_examples(
    data: Sequence[str | Path],
    task: str,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    config: RunConfig,
    tune: FinetuneConfig,
    say: Callable[[str], None],
) -> ExampleData:
    train = config.train
    if not train.separate_documents:
        raise UserError("train.separate_documents is false; examples are always kept apart, leave it out")
    counts: Counter[str] = Counter()
    if task == "preference":
        pairs = read_pairs(data, tokenizer, template, on_bad_line=tune.on_bad_line, counts=counts)
        units: list[Any] = list(pairs)
    else:
        chats = read_instructions(
            data, tokenizer, template, wrap_prompts=tune.wrap_prompts, on_bad_line=tune.on_bad_line, counts=counts
        )
        units = [(chat,) for chat in chats]
    examples = ExampleData(
        units,
        seq_len=train.seq_len,
        seed=train.seed,
        heldout_fraction=tune.heldout_fraction,
        packing=tune.packing,
        token_bytes=None if task == "preference" else tokenizer.token_bytes,
    )
    kind = "pairs" if task == "preference" else "examples"
    say(
        f"Data: {len(examples.train.units):,} {kind} to train on in {examples.num_sequences:,} rows of {train.seq_len} "
        f"tokens, {len(examples.heldout.units):,} held out; {examples.num_cut:,} were cut to that length, "
        f"{examples.num_left_out:,} left out because no answer begins within it, {counts.total():,} lines were skipped."
    )
    return examples


def _open_forgetting(
    loaded: LoadedModel, tune: FinetuneConfig, config: RunConfig, say: Callable[[str], None]
) -> TokenData | None:
    folder = loaded.path.resolve().parent / "data" if tune.forgetting_data is None else tune.forgetting_data
    if tune.forgetting_data is None and not (folder / "manifest.json").is_file():
        say(
            f"Forgetting is not measured: the base's run has no token shards in {folder}; name some with "
            "tune.forgetting-data."
        )
        return None
    dataset = TokenDataset(folder)
    assert loaded.tokenizer is not None
    dataset.require_tokenizer(loaded.tokenizer)
    seq_len = min(loaded.config.train.seq_len, dataset.train.num_tokens)
    return TokenData(dataset, dataclasses.replace(config.train, seq_len=seq_len))


def _measure(model: Transformer, data: TokenData | None, micro_batch_size: int) -> HeldoutLoss:
    assert data is not None
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    loss_sum = functools.partial(model.loss, reduction="sum")
    found = heldout_loss(loss_sum, data.heldout_batches(micro_batch_size), device)
    model.train(was_training)
    assert found is not None  # nothing asked it to stop
    return found


def _before(model: Transformer, data: TokenData | None, out_dir: Path, micro_batch_size: int) -> HeldoutLoss | None:
    """The loss of the base on its own text; an interrupted run finds it where it wrote it."""
    if data is None:
        return None
    path = out_dir / _BEFORE_FILE
    if path.is_file() and list_checkpoints(out_dir):
        return HeldoutLoss(**json.loads(path.read_text(encoding="utf-8")))
    before = _measure(model, data, micro_batch_size)
    make_run_folder(out_dir)
    path.write_text(json.dumps(dataclasses.asdict(before)), encoding="utf-8")
    return before


def _forgetting_sentence(before: HeldoutLoss, after: HeldoutLoss) -> str:
    return (
        f"Forgetting: on the base's own held-out text the loss was {before.loss:.4f} nats per token and is "
        f"{after.loss:.4f}, {after.loss - before.loss:+.4f}."
    )


def _figures(forgetting: tuple[HeldoutLoss, HeldoutLoss] | None, accuracy: float | None) -> list[tuple[str, str, str]]:
    figures = []
    if accuracy is not None:
        figures.append(
            ("preference", f"{accuracy:.1%}", "of held-out pairs: the chosen side gained more over the base")
        )
    if forgetting is not None:
        before, after = forgetting
        meaning = f"nats per token on the base's own held-out text: {before.loss:.3f} before, {after.loss:.3f} after"
        figures.append(("forgetting", f"{after.loss - before.loss:+.3f}", meaning))
    return figures


def _save_merged(
    model: Transformer, result: TrainResult, config: RunConfig, extras: dict[str, Any], tokenizer: Tokenizer
) -> Path:
    merge_lora(model)
    meta = {"config": config.to_dict(), **{name: value for name, value in extras.items() if name != ADAPTER}}
    state = CheckpointState(
        step=result.steps,
        weights=base_state(model.state_dict()),
        meta=meta,
        tokenizer=tokenizer.to_bytes(),
        heldout_loss=None if math.isnan(result.heldout_loss) else result.heldout_loss,
    )
    path = save_checkpoint(config.train.out_dir / "merged", state)
    unmerge_lora(model)
    return path


def _samples(
    model: Transformer,
    tokenizer: Tokenizer,
    dataset: ExampleData | TokenDataset,
    template: ChatTemplate | None,
    train: TrainConfig,
) -> list[Sample]:
    """Answer train.sample_prompts, or the prompts of held-out examples, greedily."""
    if template is not None and train.sample_prompts:
        prompts = [
            template.encode(tokenizer, [{"role": "user", "content": p}], add_generation_prompt=True).ids
            for p in train.sample_prompts
        ]
    elif isinstance(dataset, ExampleData):
        chats = [unit[0] for unit in dataset.heldout.units[:_NUM_SAMPLES]]
        prompts = [chat.ids[: chat.is_answer.index(True)] for chat in chats]
    else:
        starts = dataset.heldout.document_starts[:_NUM_SAMPLES]
        prompts = dataset.heldout.read(starts, min(12, dataset.heldout.num_tokens)).tolist()
    room = model.config.max_seq_len - 1
    prompts = [prompt for prompt in prompts if len(prompt) < room]
    if not prompts:
        return []
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=max(1, min(120, room - max(map(len, prompts)))))
    end_id = None if template is None else template.end_id(tokenizer)
    written = generate(model, tokenizer, prompts, sampling, end_id=end_id)
    return [Sample(0.0, tokenizer.decode(prompt[1:]), text) for prompt, (text,) in zip(prompts, written, strict=True)]


def _environment(model: Transformer, dataset: ExampleData | TokenDataset) -> dict[str, str]:
    if isinstance(dataset, ExampleData):
        size = f"{len(dataset.train.units):,} examples to train on, {len(dataset.heldout.units):,} held out"
    else:
        size = f"{dataset.train.num_tokens:,} tokens to train on, {dataset.heldout.num_tokens:,} held out"
    return {"parameters": f"{model.num_parameters():,}", "data": size, **machine(model)}
