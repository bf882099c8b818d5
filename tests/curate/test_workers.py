"""The same bytes from one process, a pool, a Slurm array and Ray; and from a run that was killed and went on."""

import hashlib
import json
import random
import signal
import subprocess
import sys
import time

import pytest

from warploom.checkpoint.lock import FolderLock
from warploom.curate import tag
from warploom.curate.run import Run
from warploom.curate.workers import run_pipeline, slurm_script
from warploom.errors import UserError

WORDS = [f"word{i}" for i in range(400)] + ["the", "and", "of"] * 20
PIPELINE = """
keep_dropped = true
[[source]]
name = "a"
paths = ["{folder}/a*.jsonl"]
[[source]]
name = "b"
paths = ["{folder}/b.jsonl"]
weight = 2
[[step]]
use = "gopher_quality"
min_words = 40
[[step]]
use = "exact_dedup"
[[step]]
use = "near_dedup"
[[step]]
use = "line_dedup"
[[step]]
use = "redact"
[heldout]
fraction = 0.2
[tokens]
vocab_size = 280
"""


@pytest.fixture
def pipeline_file(tmp_path, monkeypatch):
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randrange(30, 120))) + f" jane{i}@mail.example" for i in range(60)]
    texts += texts[:10] + [text.replace("the", "a", 1) for text in texts[10:20]]
    rng.shuffle(texts)
    for name, part in (("a0", texts[:30]), ("a1", texts[30:50]), ("b", texts[50:])):
        rows = [json.dumps({"text": text, "url": f"http://site{i % 9}.example/"}) for i, text in enumerate(part)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    monkeypatch.setattr("warploom.curate.run.TASK_BYTES", 1)  # a task per file
    file = tmp_path / "pipeline.toml"
    file.write_text(PIPELINE.format(folder=tmp_path), encoding="utf-8")
    return file


def digest(folder):
    """Hashes of all that a run has made, but for times."""
    hashes = {}
    for name in ("train", "heldout", "dropped", "tokens", "provenance", "documents.jsonl.zst"):
        path = folder / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            hashes[str(file.relative_to(folder))] = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for entry in manifest["funnel"]:
        del entry["seconds"], entry["mb_per_core_second"]
    for stats in manifest["rules"].values():
        del stats["step_seconds"]
    assert set(manifest.pop("phases")) >= {"tag", "link", "write", "encode"}
    return {**hashes, "manifest": manifest}


@pytest.fixture
def expected(pipeline_file, tmp_path):
    run = run_pipeline(pipeline_file, tmp_path / "inline", "inline")
    found = digest(run.folder)
    assert len([name for name in found if name.startswith("train/")]) == 3
    reasons = {name: stats["dropped"] for name, stats in found["manifest"]["rules"].items() if stats["dropped"]}
    assert set(reasons) == {"gopher_quality.min_words", "exact_dedup.copy", "near_dedup.copy"}
    return found


def test_a_pool_gives_the_same_bytes(pipeline_file, tmp_path, expected):
    run = run_pipeline(pipeline_file, tmp_path / "pool", "pool", num_workers=2)
    assert digest(run.folder) == expected


SBATCH = """#!/bin/sh
# Runs the array at once, in the order 1, 0, 2, and prints a job number, as sbatch --parsable does.
while [ $# -gt 0 ]; do
  case "$1" in
    --array=*) last="${1#--array=0-}" ;;
    --dependency=*) echo "$1" >> "$LOG" ;;
    --wrap) shift; command="$1" ;;
  esac
  shift
done
for index in $(seq "$last" -1 0); do
  SLURM_ARRAY_TASK_ID=$index sh -c "$command" >&2 || exit 1
done
echo 1234
"""


@pytest.mark.slow  # a process per task
def test_a_slurm_array_gives_the_same_bytes(pipeline_file, tmp_path, expected):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "sbatch").write_text(SBATCH, encoding="utf-8")
    (tools / "sbatch").chmod(0o755)
    run = Run.prepare(pipeline_file, tmp_path / "slurm")
    script = tmp_path / "submit.sh"
    script.write_text(slurm_script(run, "--partition=cpu"), encoding="utf-8")
    log = tmp_path / "log"
    path = f"{tools}:/usr/bin:/bin"
    environment = {"PATH": path, "LOG": str(log), "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run(["sh", str(script)], env=environment, check=True, capture_output=True)
    assert digest(run.folder) == expected
    assert log.read_text(encoding="utf-8").split() == ["--dependency=afterok:1234"] * (len(run.phases()) - 1)


def test_the_slurm_script_chains_every_phase(pipeline_file, tmp_path):
    run = Run.prepare(pipeline_file, tmp_path / "slurm")
    script = slurm_script(run, "--partition=cpu")
    assert script.count("sbatch") == len(run.phases()) == script.count("--partition=cpu")
    assert "--array=0-2" in script and "--array=0-13" in script
    subprocess.run(["sh", "-n"], input=script, text=True, check=True)


@pytest.mark.slow  # starting a cluster takes seconds
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_gives_the_same_bytes(pipeline_file, tmp_path, expected):
    pytest.importorskip("ray")
    run = run_pipeline(pipeline_file, tmp_path / "ray", "ray", num_workers=2)
    assert digest(run.folder) == expected


def test_a_task_goes_on_inside_its_file(pipeline_file, tmp_path, expected, monkeypatch):
    """Stopped at every segment border in turn, the run ends with the same bytes, and no segment is made twice."""
    monkeypatch.setattr(tag, "SEGMENT_BYTES", 4000)
    made = []
    write_segment = tag.write_segment

    def stopping(stem, documents):
        if stem not in stopped:
            stopped.add(stem)
            next(documents)
            raise KeyboardInterrupt
        made.append(stem)
        return write_segment(stem, documents)

    stopped = set()
    monkeypatch.setattr(tag, "write_segment", stopping)
    for _ in range(100):
        try:
            run = run_pipeline(pipeline_file, tmp_path / "resumed", "inline")
            break
        except KeyboardInterrupt:
            continue
    assert len(stopped) > 6 and len(made) == len(set(made)) == len(stopped)
    assert digest(run.folder) == expected


CHILD = """
import sys
from pathlib import Path
from warploom.curate import run, tag
from warploom.curate.workers import run_pipeline
run.TASK_BYTES, tag.SEGMENT_BYTES = 1, 2000
print("begun", flush=True)
run_pipeline(Path(sys.argv[1]), Path(sys.argv[2]), "inline")
"""


def test_a_killed_run_goes_on(pipeline_file, tmp_path, expected, monkeypatch):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(pipeline_file), str(tmp_path / "killed")],
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    assert child.stdout is not None and child.stdout.readline() == b"begun\n"
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").rglob("00001.tags.jsonl.zst")) and time.monotonic() < deadline:
        assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    monkeypatch.setattr(tag, "SEGMENT_BYTES", 2000)
    assert digest(run_pipeline(pipeline_file, tmp_path / "killed", "inline").folder) == expected


def test_two_runs_do_not_write_one_folder(pipeline_file, tmp_path):
    folder = tmp_path / "run"
    with FolderLock(folder), pytest.raises(UserError, match=f"the run folder {folder} is in use by process"):
        run_pipeline(pipeline_file, folder, "inline")
    assert not (folder / "plan.json").exists()
    run_pipeline(pipeline_file, folder, "inline")


def test_an_error_in_a_pool_reaches_the_caller(pipeline_file, tmp_path):
    text = pipeline_file.read_text(encoding="utf-8").replace("min_words = 40", "min_words = 4000")
    pipeline_file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="no document is left"):
        run_pipeline(pipeline_file, tmp_path / "pool", "pool", num_workers=2)
