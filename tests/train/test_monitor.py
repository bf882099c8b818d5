"""The monitor: what it prints on and off a terminal, metrics.jsonl, TensorBoard events, truncation on resume."""

import io
import json
import math
import struct
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from warploom.train.matmul_rate import measure
from warploom.train.monitor import (
    EvalRecord,
    MemoryGauge,
    Monitor,
    RunInfo,
    StepRecord,
    format_duration,
    memory_bytes,
    truncate_metrics,
)

INFO = RunInfo(
    steps=4,
    start_step=0,
    num_parameters=1234567,
    tokens_per_step=100,
    matmul_flops=5e11,
    device="cpu",
    dtype="float32",
)
RESULT = SimpleNamespace(steps=4, stopped_because="all 4 steps are done")


def step_record(step, **changed):
    values = {
        "step": step,
        "tokens": step * 100,
        "loss": 5.0 / step,
        "lr": 3e-4,
        "grad_norm": 0.75,
        "step_s": 0.5,
        "tokens_per_s": 200.0,
        "mfu_measured": 0.41,
        "memory_bytes": 1_250_000_000,
        "skipped": False,
        "epoch": step / 10,
    }
    return StepRecord(**{**values, **changed})


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def read_lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def run(run_dir, steps, info=INFO, terminal=False, clock=None, step_s=6.0, evaluate_at=()):
    """Train `steps` in the imagination; returns what was printed."""
    screen = io.StringIO()
    clock = clock or Clock()
    monitor = Monitor(run_dir, console=Console(file=screen, force_terminal=terminal, width=100), clock=clock)
    monitor.start(info)
    for step in steps:
        clock.now += step_s
        monitor.step(step_record(step))
        if step in evaluate_at:
            monitor.evaluation(EvalRecord(step=step, heldout_loss=2.5, bits_per_byte=1.25, train_loss=2.25))
    monitor.finish(RESULT)
    return screen.getvalue()


def test_metrics_hold_one_object_per_record(tmp_path):
    run(tmp_path, range(1, 5), evaluate_at=(2, 4))
    lines = read_lines(tmp_path)
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("step", 1),
        ("step", 2),
        ("eval", 2),
        ("step", 3),
        ("step", 4),
        ("eval", 4),
    ]
    assert lines[0]["loss"] == 5.0 and lines[0]["tokens"] == 100 and lines[0]["skipped"] is False
    assert lines[2] == {
        "kind": "eval",
        "step": 2,
        "heldout_loss": 2.5,
        "bits_per_byte": 1.25,
        "train_loss": 2.25,
    }


def test_metrics_are_on_disk_before_the_run_ends(tmp_path):
    monitor = Monitor(tmp_path, console=Console(file=io.StringIO()))
    monitor.start(INFO)
    monitor.step(step_record(1))
    assert [line["step"] for line in read_lines(tmp_path)] == [1]
    monitor.close()


def test_short_steps_are_written_once_a_second_and_before_a_checkpoint(tmp_path):
    clock = Clock()
    monitor = Monitor(tmp_path, console=Console(file=io.StringIO()), clock=clock)
    monitor.start(INFO)
    on_disk = []
    for step in range(1, 8):
        clock.now += 0.4
        monitor.step(step_record(step))
        on_disk.append(len(read_lines(tmp_path)))
    assert on_disk == [1, 1, 1, 4, 4, 4, 7]
    monitor.step(step_record(8))
    assert len(read_lines(tmp_path)) == 7
    monitor.write()
    assert len(read_lines(tmp_path)) == 8
    monitor.step(step_record(9))
    monitor.close()
    assert [line["step"] for line in read_lines(tmp_path)] == [*range(1, 10)]


def test_a_number_that_is_not_finite_becomes_null(tmp_path):
    monitor = Monitor(tmp_path, console=Console(file=io.StringIO()))
    monitor.start(INFO)
    monitor.step(step_record(1, loss=math.nan, grad_norm=math.inf, skipped=True))
    monitor.close()
    (line,) = read_lines(tmp_path)
    assert line["loss"] is None and line["grad_norm"] is None and line["skipped"] is True


def test_a_fresh_run_in_a_used_folder_starts_an_empty_curve(tmp_path):
    run(tmp_path, range(1, 5))
    run(tmp_path, range(1, 3))
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 2]


def test_resume_leaves_no_doubles(tmp_path):
    run(tmp_path, range(1, 5), evaluate_at=(2, 4))
    resumed = RunInfo(**{**vars(INFO), "start_step": 2, "steps": 5})
    run(tmp_path, range(3, 6), info=resumed)
    assert [(line["kind"], line["step"]) for line in read_lines(tmp_path)] == [
        ("step", 1),
        ("step", 2),
        ("eval", 2),
        ("step", 3),
        ("step", 4),
        ("step", 5),
    ]


def test_a_line_torn_by_a_kill_is_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "step", "step": 1}\n{"kind": "step", "st')
    truncate_metrics(path, 1)
    assert path.read_text() == '{"kind": "step", "step": 1}\n'


def test_truncating_without_a_file_is_fine(tmp_path):
    truncate_metrics(tmp_path / "metrics.jsonl", 7)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_off_a_terminal_plain_lines_come_at_intervals(tmp_path):
    printed = run(tmp_path, range(1, 5), step_s=6.0, evaluate_at=(2,))
    lines = [line for line in printed.splitlines() if line.startswith("step ")]
    # At 6 s a step: the first, the evaluation after the second, 12 s later the fourth, which is also the last.
    assert [line.split(" ")[1] for line in lines] == ["1/4", "2/4", "4/4"]
    assert "\x1b" not in printed
    assert lines[1] == (
        "step 2/4 | loss 2.500 | held-out 2.500 (1.250 bits/byte) | lr 3.00e-04 | grad norm 0.75 | 200 tokens/s | "
        "41% of matrix rate | 1.25 GB | epoch 0.20 | 12 s left"
    )
    assert "Training 1,234,567 parameters to step 4" in printed
    assert printed.rstrip().endswith("Stopped at step 4: all 4 steps are done.")


def test_on_a_terminal_a_display_with_every_figure_is_redrawn(tmp_path):
    printed = run(tmp_path, range(1, 5), terminal=True, evaluate_at=(2,))
    assert "\x1b[" in printed
    for figure in ("4/4", "100%", "1.250 bits/byte", "3.00e-04", "0.75", "200 tokens/s", "41%", "1.25 GB", "0 s left"):
        assert figure in printed


def test_a_message_with_markup_is_printed_as_it_is(tmp_path):
    screen = io.StringIO()
    monitor = Monitor(tmp_path, console=Console(file=screen, force_terminal=True, width=100))
    monitor.message("saved [bold]runs/[/x] step-1")
    assert "saved [bold]runs/[/x] step-1" in screen.getvalue()


def test_a_skipped_step_says_so(tmp_path):
    screen = io.StringIO()
    monitor = Monitor(tmp_path, console=Console(file=screen))
    monitor.start(INFO)
    monitor.step(step_record(1, loss=math.nan, skipped=True))
    monitor.close()
    assert "loss nan" in screen.getvalue() and "step skipped" in screen.getvalue()


def test_moving_the_end_moves_the_time_left(tmp_path):
    screen, clock = io.StringIO(), Clock()
    monitor = Monitor(tmp_path, console=Console(file=screen), clock=clock, line_every_s=0)
    monitor.start(INFO)
    clock.now += 10
    monitor.step(step_record(1))
    monitor.set_steps(10)
    clock.now += 10
    monitor.step(step_record(2))
    monitor.close()
    lines = [line for line in screen.getvalue().splitlines() if line.startswith("step ")]
    assert lines[0].endswith("30 s left") and lines[1].startswith("step 2/10") and lines[1].endswith("1 min 20 s left")


def test_tensorboard_holds_the_scalars(tmp_path):
    run(tmp_path, range(1, 4), evaluate_at=(2,))
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    for tag in (b"loss", b"lr", b"grad_norm", b"tokens_per_s", b"mfu_measured", b"heldout_loss", b"bits_per_byte"):
        assert tag in content
    # A scalar is a protobuf float: tag byte 0x15, then the value.
    assert b"\x15" + struct.pack("<f", 2.5) in content


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (245, "4 min 05 s"),
        (3600, "1 h 00 min"),
        (11222, "3 h 07 min"),
    ],
)
def test_durations_read_well(seconds, text):
    assert format_duration(seconds) == text


def test_memory_grows_with_an_allocation():
    before = memory_bytes(torch.device("cpu"))
    block = torch.ones(64 * 1024 * 1024 // 4)
    assert memory_bytes(torch.device("cpu")) - before > 50e6
    del block


def test_the_gauge_asks_once_a_second():
    clock = Clock()
    gauge = MemoryGauge(torch.device("cpu"), clock)
    held, _ = gauge.read()
    block = torch.ones(64 * 1024 * 1024 // 4)
    clock.now += 0.9
    assert gauge.read()[0] == held
    clock.now += 0.2
    assert gauge.read()[0] - held > 50e6
    del block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_matrix_rate_is_a_rate_of_this_machine(dtype):
    # Slower than any processor that runs PyTorch, faster than any: a wrong unit or a forgotten 2 M^3 shows.
    assert 1e8 < measure(dtype) < 1e16
