"""report.html: it parses, holds every section, escapes what it is given, and needs nothing from outside."""

import html.parser
import json
import math
import re
from types import SimpleNamespace

import pytest

from warploom.train.chart import Series, line_chart, running_mean, thin, ticks
from warploom.train.report import Sample, read_metrics, write_report

RESULT = SimpleNamespace(
    steps=40, tokens=40_000, heldout_loss=2.0, bits_per_byte=1.5, stopped_because="all 40 steps are done"
)
MALICIOUS = "</pre><script>alert('x')</script><img src=http://evil.example/a.png onerror=x>&amp;{{ 7 * 7 }}\x00\x1b[31m"
VOID = {"meta", "link", "br", "img", "hr", "input"}


def write_metrics(run_dir, steps=40):
    records = []
    for step in range(1, steps + 1):
        records.append(
            {
                "kind": "step",
                "step": step,
                "tokens": step * 1000,
                "loss": 8.0 / step**0.5,
                "lr": 1e-3 * step / steps,
                "grad_norm": 1.0 if step != 20 else None,
                "step_s": 0.5,
                "tokens_per_s": 2000.0,
                "mfu_measured": 0.4,
                "memory_bytes": 10**9,
                "skipped": step == 20,
                "epoch": step / 10,
            }
        )
        if step % 10 == 0:
            records.append(
                {"kind": "eval", "step": step, "heldout_loss": 8 / step**0.5 + 0.1, "bits_per_byte": 4 / step**0.5}
            )
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


class Page(html.parser.HTMLParser):
    """Text, headings, tags and attributes; every opened element must be closed, in order."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.headings, self.text, self.open = [], [], [], "", []
        self.cells = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append(data.strip())
        if "td" in self.open:
            self.cells[-1] += data


def report(tmp_path, **changed):
    write_metrics(tmp_path)
    arguments = {
        "result": RESULT,
        "config": {
            "seed": 7,
            "model": {"d_model": 128, "num_kv_heads": None},
            "train": {"out_dir": "run", "sample_prompts": ["def ", "<b>"], "schedule": {"kind": "cosine"}},
        },
        "samples": [Sample(0.0, "def ", "f(x):\n    return x"), Sample(0.8, "", MALICIOUS)],
        "wall_s": 125.0,
        "environment": {"torch": "2.13.0", "processor": "<unknown>"},
        "warnings": ["Overfitting: held-out loss is > training loss."],
        "plan": ["The corpus holds 11 MB."],
    }
    path = write_report(tmp_path, **{**arguments, **changed})
    assert path == tmp_path / "report.html"
    source = path.read_text(encoding="utf-8")
    return source, Page(source)


def test_every_section_is_there(tmp_path):
    _, page = report(tmp_path)
    for heading in (
        tmp_path.name,
        "What was chosen, and why",
        "Curves",
        "Loss",
        "Held-out bits per byte",
        "Learning rate",
        "Gradient norm",
        "Tokens per second",
        "Samples",
        "temperature 0.0",
        "temperature 0.8",
        "Configuration",
        "Environment",
    ):
        assert heading in page.headings
    assert page.tags.count("svg") == 10  # five charts, each with its clipped inside
    for text in ("1.500", "2.000", "7.4", "40,000", "2 min 05 s", "40%", "all 40 steps are done"):
        assert text in page.text
    assert "Overfitting: held-out loss is > training loss." in page.text
    assert "The corpus holds 11 MB." in page.text


def test_the_configuration_is_shown_in_full(tmp_path):
    _, page = report(tmp_path)
    rows = dict(zip(page.cells[::2], page.cells[1::2], strict=True))
    assert rows["seed"] == "7" and rows["d_model"] == "128" and rows["num_kv_heads"] == "none"
    assert rows["sample_prompts"] == "def , <b>" and rows["kind"] == "cosine"
    assert rows["torch"] == "2.13.0" and rows["processor"] == "<unknown>"
    assert {"run", "model", "train", "train.schedule"} <= set(page.headings)


def test_a_hostile_sample_stays_text(tmp_path):
    source, page = report(tmp_path)
    assert "script" not in page.tags and "img" not in page.tags
    assert "<script" not in source
    assert MALICIOUS.replace("\x00", "\u2400").replace("\x1b", "\u241b") in page.text
    assert re.search(r"[\x00-\x08\x0b-\x1f\x7f]", source) is None


def test_a_sample_keeps_its_leading_newlines(tmp_path):
    _, page = report(tmp_path, samples=[Sample(1.0, "", "\n\nx = 1\n")])
    # The parser keeps the newline that a browser drops after <pre>.
    assert "\n\n\nx = 1\n" in page.text


def test_nothing_is_fetched(tmp_path):
    source, page = report(tmp_path)
    assert not {"script", "link", "img", "iframe", "object", "image", "use"} & set(page.tags)
    assert not any(name in ("src", "href", "xlink:href", "srcset", "data") for name, _ in page.attributes)
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style and "@import" not in style and "http" not in style
    assert not re.search(r"https?://", source.replace("http://evil.example", ""))


def test_the_same_run_gives_the_same_bytes(tmp_path):
    assert report(tmp_path)[0] == report(tmp_path)[0]


def test_a_run_without_evaluation_has_no_heldout_figures(tmp_path):
    result = SimpleNamespace(**{**vars(RESULT), "heldout_loss": math.nan, "bits_per_byte": math.nan})
    source, page = report(tmp_path, result=result, samples=[], warnings=[], plan=[])
    assert "perplexity" not in page.text and "What was chosen" not in page.text
    assert 'class="card warnings"' not in source
    assert "No samples were drawn." in page.text


def test_a_diverged_run_still_gets_its_report(tmp_path):
    result = SimpleNamespace(**{**vars(RESULT), "heldout_loss": 5000.0})
    _, page = report(tmp_path, result=result)
    assert "5000.000" in page.text


def test_of_two_lines_of_one_step_the_later_counts(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"kind": "step", "step": 2, "loss": 3.0}\n{"kind": "step", "step": 1, "loss": null}\n'
        '{"kind": "step", "step": 2, "loss": 4.0}\n'
    )
    assert read_metrics(tmp_path / "metrics.jsonl").steps["loss"] == [(2.0, 4.0)]


def test_points_land_where_their_values_say():
    svg = line_chart([Series("a", [(0, 0), (50, 5), (100, 10)], "plain")], label="a", width=200, height=100)
    (points,) = re.findall(r'points="([^"]*)"', svg)
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, point.split(","))) for point in points.split(" "))
    assert x0 < x1 < x2 and x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 > y1 > y2 and y0 - y1 == pytest.approx(y1 - y2, abs=0.2)  # up is less in SVG


def test_a_chart_of_nothing_and_of_one_point():
    assert "Nothing was recorded" in line_chart([Series("a", [], "plain")], label="a", width=200, height=100)
    assert "<circle" in line_chart([Series("a", [(1, 3.0)], "plain")], label="a", width=200, height=100)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1.4, 9.3), (-3, 2e-4), (5, 5), (0, 0), (1e-5, 3e-3), (2e6, 2.1e6)])
def test_ticks_cover_the_range_with_few_round_numbers(low, high):
    found = ticks(low, high)
    assert found[0] <= low and found[-1] >= high
    assert 3 <= len(found) <= 7


def test_thinning_keeps_the_mean():
    points = [(float(x), float(x % 7)) for x in range(1000)]
    thinned = thin(points, 100)
    assert len(thinned) == 100
    assert sum(y for _, y in thinned) / 100 == pytest.approx(sum(y for _, y in points) / 1000)
    assert thin(points, 1000) == points


def test_the_running_mean_has_no_lag():
    line = [(float(x), 3.0 * x) for x in range(200)]
    assert [y for _, y in running_mean(line)] == pytest.approx([y for _, y in line])
