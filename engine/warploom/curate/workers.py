"""Who does the tasks of a phase: this process, a pool of processes, a Slurm array, or Ray. All run the same function
on the same folder, which is all they share."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Literal

from warploom.checkpoint.lock import FolderLock
from warploom.curate.optional import optional
from warploom.curate.pipeline import load_pipeline
from warploom.curate.run import Run, run_task
from warploom.errors import UserError

Kind = Literal["inline", "pool", "ray"]
Progress = Callable[[str, int, int], None]  # phase, tasks done, tasks in all


def run_pipeline(
    pipeline_file: Path,
    folder: Path,
    workers: Kind = "pool",
    num_workers: int = 1,
    progress: Progress = lambda phase, done, total: None,
    ray_address: str | None = None,
) -> Run:
    """Run a pipeline into a folder, going on where an earlier run of it was stopped. Returns the finished run.

    Raises UserError for an unusable pipeline or input, if nothing is left, and if another process is at work in the
    folder.
    """
    if num_workers < 1:
        raise UserError(f"num-workers must be at least 1, got {num_workers}")
    load_pipeline(pipeline_file)  # before a folder is made for one that cannot be used
    with FolderLock(folder):
        run = Run.prepare(pipeline_file, folder)
        if run.is_done("finish", 0) and not run.is_published():
            run.unfinish()
        if workers == "ray":
            _ray(run, num_workers, ray_address, progress)
        elif workers == "pool" and num_workers > 1:
            _pool(run, num_workers, progress)
        else:
            _inline(run, progress)
    return run


def _waiting(run: Run, phase: str, count: int) -> list[int]:
    return [index for index in range(count) if not run.is_done(phase, index)]


def _inline(run: Run, progress: Progress) -> None:
    for phase, count in run.phases():
        waiting = _waiting(run, phase, count)
        for done, index in enumerate(waiting, 1):
            run.run_task(phase, index)
            progress(phase, count - len(waiting) + done, count)


def _pool(run: Run, num_workers: int, progress: Progress) -> None:
    # Spawned, not forked: a fork would copy locks that other threads of this process may hold.
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for phase, count in run.phases():
            waiting = _waiting(run, phase, count)
            futures = [pool.submit(run_task, str(run.folder), phase, index) for index in waiting]
            try:
                for done, future in enumerate(as_completed(futures), 1):
                    future.result()
                    progress(phase, count - len(waiting) + done, count)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def _ray(run: Run, num_workers: int, address: str | None, progress: Progress) -> None:
    """Tasks on the Ray cluster at an address, or on a local one of num_workers processes."""
    ray: Any = optional("ray", "ray")
    started = not ray.is_initialized()
    if started:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
        where = {"address": address} if address else {"num_cpus": num_workers, "include_dashboard": False}
        ray.init(**where, log_to_driver=False, configure_logging=False)
    try:
        task = ray.remote(run_task)
        for phase, count in run.phases():
            waiting = _waiting(run, phase, count)
            futures = [task.remote(str(run.folder.resolve()), phase, index) for index in waiting]
            for done, future in enumerate(futures, 1):
                try:
                    ray.get(future)
                except ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, UserError):
                        raise error.cause from None
                    raise
                progress(phase, count - len(waiting) + done, count)
    finally:
        if started:
            ray.shutdown()


def slurm_script(run: Run, options: str = "") -> str:
    """A shell script that submits the run: one array job per phase, each after the one before has succeeded.

    options: further options of every sbatch call, such as "--partition=cpu --time=2:00:00".
    """
    lines = [
        "#!/bin/sh",
        "# Submits every phase as an array; a phase begins when the one before has succeeded.",
        "set -eu",
    ]
    command = f"{shlex.quote(sys.executable)} -m warploom.cli.main data task {shlex.quote(str(run.folder.resolve()))}"
    after = ""
    for phase, count in run.phases():
        wrapped = shlex.quote(f'{command} {phase} "$SLURM_ARRAY_TASK_ID"')
        words = ["sbatch --parsable", options, f"--job-name=warploom-{phase}", f"--array=0-{count - 1}", after]
        lines.append(f"job=$({' '.join(word for word in words if word)} --wrap {wrapped})")
        after = '--dependency="afterok:$job" --kill-on-invalid-dep=yes'
    return "\n".join([*lines, ""])
