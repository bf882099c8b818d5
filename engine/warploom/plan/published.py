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
    other_tokens: tuple[float, ...] = ()
    """Lengths that the run is asked about as well."""


RUNS = (
    PublishedRun(
        *("GPT-3 175B", "gpt3-175b", 300e9, 1536, "a100-80gb", 1024, 34 * 24 * 1024),
        "34 days on 1,024 A100 for the 300 B tokens, in batches of 3.1 M, of Brown et al. (2020): Narayanan et al., "
        "2021, from iterations timed at that size, not from a whole run; what the first run took was not published",
        other_tokens=(500e9,),
    ),
    PublishedRun(
        *("Llama 2 70B", "llama2-70b", 2e12, 1024, "a100-80gb", 2048, 1_720_320),
        "device-hours, batch of 4 M tokens, clusters of up to 2,000 A100 on 200 Gbit/s links: Touvron et al., 2023; "
        "the number of devices is assumed",
    ),
    PublishedRun(
        *("Falcon 180B", "falcon-180b", 3.5e12, 2048, "a100-40gb", 4096, 7_000_000),
        "device-hours, up to 4,096 GPUs: Hugging Face, Spread Your Wings: Falcon 180B is here, 2023; A100 on a cloud "
        "with limited interconnect: Almazrouei et al., 2023; the batch and 40 GB are assumed",
    ),
)


def reckon(run: PublishedRun, tokens: float | None = None) -> Forecast:
    """Return the forecast of the run, or of its model on other tokens, in the layout that is the fastest here."""
    model = preset(run.preset)
    workload = Workload(model, tokens or run.tokens, model.max_seq_len, run.global_batch_size)
    return fastest(workload, Hardware(device_named(run.device), run.count), 1)[0]
