"""report.html: one self-contained page about a finished run, drawn from metrics.jsonl and what the trainer knows."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from warploom.train.chart import Point, Series, line_chart
from warploom.train.monitor import METRICS_FILE, format_duration

if TYPE_CHECKING:
    from warploom.train.result import TrainResult

REPORT_FILE = "report.html"
# A sample may hold any character; HTML allows no control characters, so they are shown as their Unicode pictures.
_VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"} | {0x7F: 0x2421}


@dataclass(frozen=True)
class Sample:
    """One text the trained model wrote."""

    temperature: float
    prompt: str
    text: str  # the completion alone


@dataclass(frozen=True)
class Metrics:
    """The curves of metrics.jsonl, each a list of (step, value) with steps ascending; nulls are left out."""

    steps: Mapping[str, list[Point]]  # by field of StepRecord
    evaluations: Mapping[str, list[Point]]  # by field of EvalRecord


def read_metrics(path: Path) -> Metrics:
    """Read metrics.jsonl. Of two lines of one kind and step the later counts."""
    records: dict[str, dict[int, dict[str, Any]]] = {"step": {}, "eval": {}}
    with path.open(encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            kind = record.pop("kind")
            if kind in records:  # those of skipped steps hold no curve
                records[kind][record["step"]] = record
    return Metrics(_curves(records["step"]), _curves(records["eval"]))


def _curves(records: Mapping[int, dict[str, Any]]) -> dict[str, list[Point]]:
    curves: dict[str, list[Point]] = {}
    for step in sorted(records):
        fields = records[step]
        for name, value in (fields | fields.get("scores", {})).items():
            if value is not None and name != "scores":
                curves.setdefault(name, []).append((float(step), float(value)))
    return curves


def write_report(
    run_dir: Path,
    *,
    result: TrainResult,
    config: Mapping[str, Any],
    samples: Sequence[Sample],
    environment: Mapping[str, str],
    wall_s: float,
    warnings: Sequence[str] = (),
    plan: Sequence[str] = (),
    loss_meaning: str = "nats per token of text the model never trained on",
    more_figures: Sequence[tuple[str, str, str]] = (),
) -> Path:
    """Write run_dir/report.html and return its path. The page needs no other file and no network.

    config: the resolved configuration, nested mappings of plain values. environment: name -> value, as to be read.
    wall_s: seconds the whole of it took. warnings: sentences on the quality of the run. plan: what a time budget chose,
    and why, one sentence each. loss_meaning: what the held-out loss is of; one that is not nats per token has no
    perplexity. more_figures: (name, value, meaning).
    """
    metrics = read_metrics(run_dir / METRICS_FILE)
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        Path(__file__).with_name(REPORT_FILE).read_text(encoding="utf-8")
    )
    page = template.render(
        name=run_dir.resolve().name,
        stopped_because=result.stopped_because,
        figures=[*more_figures, *_figures(result, metrics, wall_s, loss_meaning)],
        warnings=warnings,
        plan=plan,
        loss=_loss_chart(metrics),
        charts=_small_charts(metrics),
        samples=[
            Sample(one.temperature, one.prompt.translate(_VISIBLE), one.text.translate(_VISIBLE)) for one in samples
        ],
        sections=_sections(config),
        environment=environment,
    )
    path = run_dir / REPORT_FILE
    path.write_text(page, encoding="utf-8")
    return path


def _figures(result: TrainResult, metrics: Metrics, wall_s: float, loss_meaning: str) -> list[tuple[str, str, str]]:
    """(name, value, one sentence that says what it means) of each final figure."""
    rate = statistics.median(value for _, value in metrics.steps["tokens_per_s"])
    share = statistics.median(value for _, value in metrics.steps["mfu_measured"])
    figures = []
    if not math.isnan(result.bits_per_byte):  # data that is no text has none
        meaning = f"of held-out text; as a compressor, the model would shrink it to {result.bits_per_byte / 8:.0%}"
        figures.append(("bits per byte", f"{result.bits_per_byte:.3f}", meaning))
    if not math.isnan(result.heldout_loss):
        figures.append(("held-out loss", f"{result.heldout_loss:.3f}", loss_meaning))
        if loss_meaning.startswith("nats per token"):
            perplexity = math.exp(min(result.heldout_loss, 700.0))  # e^710 is past the largest float
            figures.append(("perplexity", f"{perplexity:,.1f}", "as unsure as a choice among this many tokens"))
    return figures + [
        ("tokens", f"{result.tokens:,}", f"trained on, in {result.steps:,} steps"),
        ("wall time", format_duration(wall_s), f"{rate:,.0f} tokens per second in the median step"),
        ("of the matrix rate", f"{share:.0%}", "of the speed this machine reaches on matrix products alone"),
    ]


def _loss_chart(metrics: Metrics) -> Markup:
    return line_chart(
        [
            Series("training loss", metrics.steps.get("loss", []), "train", smooth=True),
            Series("held-out loss", metrics.evaluations.get("heldout_loss", []), "heldout"),
        ],
        label="Training and held-out loss over the step",
        width=960,
        height=340,
        skip=0.03,
    )


def _small_charts(metrics: Metrics) -> list[tuple[str, Markup]]:
    steps = metrics.steps
    charts = []
    for title, points, style, is_noisy, from_zero in (
        ("Held-out bits per byte", metrics.evaluations.get("bits_per_byte", []), "heldout", False, False),
        ("Learning rate", steps.get("lr", []), "plain", False, True),
        ("Gradient norm", steps.get("grad_norm", []), "plain", True, True),
        ("Tokens per second", steps.get("tokens_per_s", []), "plain", True, True),
    ):
        series = Series(title.lower(), points, style, smooth=is_noisy)
        picture = line_chart(
            [series], label=f"{title} over the step", width=470, height=210, value=_short, from_zero=from_zero
        )
        charts.append((title, picture))
    for name in sorted(name for name in metrics.evaluations if "/" in name):  # benchmarks
        series = Series(name, metrics.evaluations[name], "heldout")
        charts.append((name, line_chart([series], label=f"{name} over the step", width=470, height=210, value=_short)))
    return charts


def _short(number: float) -> str:
    """A tick label of few characters: 12k, 0.25, 3e-4."""
    if abs(number) >= 1e6:
        return f"{number / 1e6:g}M"
    if abs(number) >= 1e4:
        return f"{number / 1e3:g}k"
    if 0 < abs(number) < 1e-2:
        mantissa, exponent = f"{number:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{number:g}"


def _sections(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The configuration as tables: one for the plain values at the top, one for each nested mapping below it."""
    top = [(key, _plain(value)) for key, value in config.items() if not isinstance(value, Mapping)]
    sections = [("run", top)] if top else []
    for key, value in config.items():
        if isinstance(value, Mapping):
            inner = [(f"{key}.{name}", rows) for name, rows in _sections(value)]
            # Plain values of a nested mapping carry its own name.
            sections += [(key if name == f"{key}.run" else name, rows) for name, rows in inner]
    return sections


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    if value is None:
        return "none"
    return str(value)
