"""Training runs whose makers said how long they took, to hold the forecast against."""

from __future__ import annotations

from dataclasses import dataclass

from warploom.models.presets import preset
from warploom.plan.forecast import Forecast, fastest
from warploom.plan.hardware import Hardware, device_named
from warploom.plan.layout import Workload


@dataclass(frozen=True)
class PublishedRun:
    """One run; device_hours are as published, for these tokens."""

    name: str
    preset: str
    tokens: float
    global_batch_size: int
    device: str
    count: int
    device_hours: float
    source: str


RUNS = (
    PublishedRun(
        *("GPT-3 175B", "gpt3-175b", 300e9, 1536, "v100", 9216, 14.8 * 24 * 10_000),
        "tokens, batch of 3.2 M tokens: Brown et al., 2020; 14.8 days of 10,000 V100: Patterson et al., 2021",
    ),
    PublishedRun(
        *("Llama 2 70B", "llama2-70b", 2e12, 1024, "a100-80gb", 2048, 1_720_320),
        "batch of 4 M tokens, device-hours: Touvron et al., 2023; number of devices assumed",
    ),
    PublishedRun(
        *("Falcon 180B", "falcon-180b", 3.5e12, 2048, "a100-40gb", 4096, 7_000_000),
        "devices, device-hours: Hugging Face, Spread Your Wings: Falcon 180B is here, 2023",
    ),
)


def reckon(run: PublishedRun, tokens: float | None = None) -> Forecast:
    """Return the forecast of the run, or of its model on other tokens, in the layout that is the fastest here."""
    model = preset(run.preset)
    workload = Workload(model, tokens or run.tokens, model.max_seq_len, run.global_batch_size)
    return fastest(workload, Hardware(device_named(run.device), run.count), 1)[0]
