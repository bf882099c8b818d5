"""A run of a pipeline: its folder, its phases, and what stands in it at the end.

    tag       one task per group of files     read, run all steps, write text, tags and hashes
    judge     one                             rules over the tags, exact duplicates
    link      one task per band               candidate pairs of near-duplicates, held against exact Jaccard
    decide    one                             clusters, the split, repeated lines, the samples of the report
    write     one task per group of files     the kept text and the dropped
    learn     one                             the tokenizer, if token shards are asked for and none is given
    encode    one task per group of files     token ids
    finish    one                             the mix, token shards, manifest.json, report.html

A task is a function of the folder and its number and leaves a file when it is done, so tasks can run anywhere and in
any order, and a run goes on where it was stopped. Phases from judge on have a folder of their own for each set of
thresholds; the first phase is only repeated if what it writes would differ.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from warploom.checkpoint.lock import LOCK
from warploom.curate.cut import (
    KEPT,
    Decisions,
    RuleStats,
    count_reasons,
    drop_exact,
    drop_near,
    judge,
    linked_pairs,
    task_segments,
)
from warploom.curate.dedup import ExactDedup, LineDedup, NearDedup, equal_groups
from warploom.curate.encode import encode_task, learn_tokenizer
from warploom.curate.finish import finish
from warploom.curate.harmful import bias_table
from warploom.curate.optional import optional
from warploom.curate.pipeline import Pipeline, load_pipeline
from warploom.curate.records import ENDINGS, HUGGING_FACE
from warploom.curate.segments import Segment, read_json, write_array, write_json
from warploom.curate.split import split
from warploom.curate.tag import tag
from warploom.curate.write import repeated_lines, write_task
from warploom.data.documents import list_files
from warploom.data.tokenizer import Tokenizer
from warploom.errors import UserError

# Of what the steps write; raised when one of them changes.
VERSION = 2
# Small files are read by one task until they have this many bytes; a task is what a worker takes at once.
TASK_BYTES = 64 << 20
# A larger file is read by several tasks. Each reads it through and takes every so manieth block of records: reading is
# some thirty times faster than the steps, and any format can be shared out so.
STRIPE_BYTES = 256 << 20


class Run:
    """A folder with a run in it."""

    def __init__(self, folder: Path):
        """Open the folder that `prepare` has made. Raises UserError if there is none."""
        self.folder = folder
        plan_file = folder / "plan.json"
        if not plan_file.exists():
            raise UserError(f"{folder} holds no run: no plan.json there; start one with warploom data run")
        self.plan: dict[str, Any] = read_json(plan_file)
        self.pipeline: Pipeline = load_pipeline(folder / self.plan["pipeline"])
        self.tag_dir = folder / "work" / f"tag-{self.plan['tag_key']}"
        self.cut_dir = folder / "work" / f"cut-{self.plan['cut_key']}"

    @classmethod
    def prepare(cls, pipeline_file: Path, folder: Path) -> Run:
        """Read the pipeline, list its files, and write the plan of the run into folder."""
        pipeline = load_pipeline(pipeline_file)
        tasks, files = _plan_tasks(pipeline)
        settings = pipeline.settings()
        tag_settings = {
            "files": files,
            "columns": [source.text_column for source in pipeline.sources],
            "steps": [step.tag_settings() for step in pipeline.steps],
            "step_files": [_state(path) for step in pipeline.steps for path in step.files()],
            # The steps of a Python file are whatever it says.
            "code": pipeline_file.read_text(encoding="utf-8") if pipeline_file.suffix == ".py" else "",
            "version": VERSION,
        }
        tokenizer = pipeline.tokens.tokenizer if pipeline.tokens is not None else None
        folder.mkdir(parents=True, exist_ok=True)
        if any(entry.name != LOCK for entry in folder.iterdir()) and not (folder / "plan.json").exists():
            raise UserError(f"{folder} holds other files; name an empty or new folder for the run")
        copy = f"pipeline{pipeline_file.suffix}"
        if pipeline_file.resolve() != (folder / copy).resolve():
            shutil.copyfile(pipeline_file, folder / copy)
        tag_key = _key(tag_settings)
        plan = {
            "pipeline": copy,
            "tasks": tasks,
            "files": files,
            "tag_key": tag_key,
            "cut_key": _key(
                {"tag": tag_key, "settings": settings, "tokenizer": tokenizer and Tokenizer.load(tokenizer).sha256}
            ),
        }
        write_json(folder / "plan.json", plan)
        return cls(folder)

    @property
    def near(self) -> NearDedup | None:
        return next((step for step in self.pipeline.steps if isinstance(step, NearDedup)), None)

    def phases(self) -> list[tuple[str, int]]:
        """(name, number of tasks), in order."""
        num_tasks = len(self.plan["tasks"])
        tokens = self.pipeline.tokens
        phases = [("tag", num_tasks), ("judge", 1)]
        if self.near is not None:
            phases.append(("link", self.near.num_bands))
        phases += [("decide", 1), ("write", num_tasks)]
        if tokens is not None:
            phases += [("learn", 1), ("encode", num_tasks)]
        return [*phases, ("finish", 1)]

    def is_done(self, phase: str, index: int) -> bool:
        if phase == "tag":
            cursor = self.tag_dir / f"{index:05d}" / "cursor.json"
            return cursor.exists() and bool(read_json(cursor).get("done"))
        return self._done_file(phase, index).exists()

    def _done_file(self, phase: str, index: int) -> Path:
        return self.cut_dir / phase / f"{index:05d}.done.json"

    def run_task(self, phase: str, index: int) -> None:
        """Do one task of a phase, unless it is done. The phases before must be complete.

        Raises UserError if there is no such task.
        """
        if not 0 <= index < dict(self.phases()).get(phase, 0):
            known = ", ".join(f"{name} 0 to {count - 1}" for name, count in self.phases())
            raise UserError(f"the run in {self.folder} has no task {index} of a phase {phase!r}; it has {known}")
        if not self.is_done(phase, index):
            (self.cut_dir / phase).mkdir(parents=True, exist_ok=True)
            started = time.process_time()
            _PHASES[phase](self, index)
            write_json(self._seconds_file(phase, index), time.process_time() - started)

    def _seconds_file(self, phase: str, index: int) -> Path:
        """Beside the results, which are the same bytes however long they took."""
        folder = self.tag_dir / f"{index:05d}" if phase == "tag" else self.cut_dir / phase
        return folder / f"{index:05d}.seconds.json"

    def seconds(self) -> dict[str, float]:
        """CPU seconds of each phase, of the processes that finished its tasks; 0 for one that was not timed."""
        files = {phase: [self._seconds_file(phase, i) for i in range(count)] for phase, count in self.phases()}
        return {phase: sum(read_json(f) for f in of_phase if f.exists()) for phase, of_phase in files.items()}

    def is_published(self) -> bool:
        """Whether the result in the folder is that of this plan, and not of other thresholds."""
        mark = self.folder / "result.json"
        return mark.exists() and read_json(mark)["cut_key"] == self.plan["cut_key"]

    def unfinish(self) -> None:
        """Have the last phase done again."""
        self._done_file("finish", 0).unlink()

    def manifest(self) -> dict[str, Any]:
        """manifest.json of the finished run."""
        result: dict[str, Any] = read_json(self.folder / "manifest.json")
        return result

    def cursors(self) -> list[dict[str, Any]]:
        return [read_json(self.tag_dir / f"{task:05d}" / "cursor.json") for task in range(len(self.plan["tasks"]))]

    def segments(self) -> list[list[Segment]]:
        """Of each task."""
        return task_segments(self.tag_dir, self.cursors())

    def decisions(self) -> Decisions:
        return Decisions(self.cut_dir / "decide", sum(s.num_documents for task in self.segments() for s in task))


def run_task(folder: str, phase: str, index: int) -> None:
    """Do one task of the run in a folder: what a worker of any kind calls."""
    Run(Path(folder)).run_task(phase, index)


def _tag(run: Run, index: int) -> None:
    tag(run.pipeline, run.plan["tasks"][index], run.tag_dir / f"{index:05d}")


def _judge(run: Run, index: int) -> None:
    segments = [segment for task in run.segments() for segment in task]
    decisions = run.decisions()
    reasons, rules = judge(run.pipeline, segments, decisions)
    for position, step in enumerate(run.pipeline.steps):
        if isinstance(step, ExactDedup | NearDedup):
            reasons.append(f"{step.name}.copy")
            rules[reasons[-1]] = RuleStats()
            if isinstance(step, ExactDedup):
                drop_exact(segments, position, len(reasons) - 1, decisions)
    decisions.flush()
    result = {"reasons": reasons, "rules": {name: dataclasses.asdict(stats) for name, stats in rules.items()}}
    write_json(run._done_file("judge", 0), result)


def _link(run: Run, band: int) -> None:
    step, decisions = run.near, run.decisions()
    assert step is not None
    segments = [segment for task in run.segments() for segment in task]
    alive = decisions.dropped_at > run.pipeline.steps.index(step)
    pairs = [(a, b) for a, b, _ in linked_pairs(segments, alive, band, step.band_hashes, step.jaccard)]
    write_array(run.cut_dir / "link" / f"{band:05d}.npy", np.array(pairs, np.uint32).reshape(-1, 2))
    write_json(run._done_file("link", band), {"pairs": len(pairs)})


def _decide(run: Run, index: int) -> None:
    judged = read_json(run._done_file("judge", 0))
    reasons: list[str] = judged["reasons"]
    rules = {name: RuleStats(**stats) for name, stats in judged["rules"].items()}
    segments = [segment for task in run.segments() for segment in task]
    decisions = run.decisions()
    step = run.near
    decisions.cluster_size[:] = 1
    if step is not None:
        files = (run.cut_dir / "link" / f"{band:05d}.npy" for band in range(step.num_bands))
        pairs = (pair for file in files for pair in np.load(file).tolist())
        drop_near(pairs, run.pipeline.steps.index(step), reasons.index(f"{step.name}.copy"), decisions)
    count_reasons(reasons, rules, decisions)
    kept = decisions.dropped_at == KEPT
    if not kept.any():
        most = max(rules, key=lambda name: rules[name].dropped, default="no rule")
        raise UserError(
            f"no document is left of {decisions.size}: {most} dropped most of them; loosen it, or look at the samples "
            "with keep_dropped = true"
        )
    names = [source.name for source in run.pipeline.sources]
    source_of_segment = [
        names.index(task["source"]) for task, made in zip(run.plan["tasks"], run.segments(), strict=True) for _ in made
    ]
    proof = split(run.pipeline.heldout, run.pipeline.seed, step, segments, source_of_segment, decisions)
    lines = next((step for step in run.pipeline.steps if isinstance(step, LineDedup)), None)
    repeats = np.empty((0, 2), np.int64)
    if lines is not None:
        columns, alive = [], []
        for segment in segments:
            values, offsets = segment.array("lines")
            columns.append(values)
            alive.append(np.repeat(kept[segment.first : segment.first + segment.num_documents], np.diff(offsets)))
        groups = equal_groups(columns, np.concatenate(alive))
        repeats = repeated_lines(segments, groups, lines.keep_occurrences)
    write_array(run.cut_dir / "decide" / "repeats.npy", repeats)
    decisions.flush()
    result = {
        "reasons": reasons,
        "rules": {name: dataclasses.asdict(stats) for name, stats in rules.items()},
        "split": dataclasses.asdict(proof),
        "dropped_at": np.bincount(
            np.minimum(decisions.dropped_at, len(run.pipeline.steps)), minlength=len(run.pipeline.steps) + 1
        ).tolist(),
        "dropped_bytes_at": np.bincount(
            np.minimum(decisions.dropped_at, len(run.pipeline.steps)),
            weights=decisions.bytes,
            minlength=len(run.pipeline.steps) + 1,
        ).tolist(),
        "repeated_lines": len(repeats),
        "bias": bias_table(run.pipeline.steps, segments, kept),
    }
    write_json(run._done_file("decide", 0), result)


def _write(run: Run, index: int) -> None:
    decided = read_json(run._done_file("decide", 0))
    samples = [stats[kind] for stats in decided["rules"].values() for kind in ("kept_samples", "dropped_samples")]
    write_task(
        run.pipeline,
        run.segments()[index],
        run.decisions(),
        decided["reasons"],
        {row for rows in samples for row in rows},
        np.load(run.cut_dir / "decide" / "repeats.npy"),
        run.cut_dir / "write",
        f"{index:05d}",
    )


def _learn(run: Run, index: int) -> None:
    assert run.pipeline.tokens is not None
    tokenizer = learn_tokenizer(run.pipeline.tokens, run.cut_dir / "write" / "train")
    tokenizer.save(run.cut_dir / "learn" / "tokenizer.json")
    write_json(run._done_file("learn", 0), {"vocab_size": tokenizer.vocab_size})


def _encode(run: Run, index: int) -> None:
    result = encode_task(run.cut_dir, f"{index:05d}")
    write_json(run._done_file("encode", index), result)


def _finish(run: Run, index: int) -> None:
    finish(run.pipeline, run.plan, run.cut_dir, run.folder, run.cursors(), run.seconds())
    write_json(run.folder / "result.json", {"cut_key": run.plan["cut_key"]})
    write_json(run._done_file("finish", 0), {})


_PHASES: dict[str, Callable[[Run, int], None]] = {
    "tag": _tag,
    "judge": _judge,
    "link": _link,
    "decide": _decide,
    "write": _write,
    "learn": _learn,
    "encode": _encode,
    "finish": _finish,
}


def _plan_tasks(pipeline: Pipeline) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Group the files of each source into tasks."""
    tasks: list[dict[str, Any]] = []
    files: list[dict[str, Any]] = []
    for source in pipeline.sources:
        size = TASK_BYTES
        plain = [path for path in source.paths if not path.startswith(HUGGING_FACE)]
        found = [str(path.resolve()) for path in list_files(plain, ENDINGS)] if plain else []
        for path in (*found, *(path for path in source.paths if path.startswith(HUGGING_FACE))):
            file_bytes = 0 if path.startswith(HUGGING_FACE) else Path(path).stat().st_size
            stripes = max(1, -(-file_bytes // STRIPE_BYTES))
            for stripe in range(stripes):
                if stripes > 1 or size + file_bytes > TASK_BYTES:
                    tasks.append({"source": source.name, "files": [], "stripe": stripe, "stripes": stripes})
                    size = 0
                tasks[-1]["files"].append(path)
            size += file_bytes
            entry: dict[str, Any] = {"source": source.name, "path": path, "size": file_bytes}
            if file_bytes:
                entry["modified_ns"] = Path(path).stat().st_mtime_ns
            files.append(entry)
    return tasks, files


def _state(path: Path) -> list[Any]:
    """What changes with a file's content, or nearly always."""
    state = path.stat()
    return [str(path), state.st_size, state.st_mtime_ns]


def _key(value: Any) -> str:
    orjson = optional("orjson")
    return xxhash.xxh3_64_hexdigest(orjson.dumps(value, option=orjson.OPT_SORT_KEYS))
