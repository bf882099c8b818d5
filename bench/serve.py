"""python -m bench.serve: what a request to `warploom serve` takes, alone, beside others, and beside malformed ones.

The server is a process of its own with a model of random weights; clients stream completions over HTTP, each asking
again as soon as it is answered. Before anything is timed, what is answered beside others is held against what is
answered alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from tests.serve.test_hostile import Attacker

from bench.harness import print_fingerprint, print_table, write_records
from warploom.checkpoint.format import CheckpointState
from warploom.checkpoint.save import save_checkpoint
from warploom.data.tokenizer import Tokenizer
from warploom.models import Transformer, preset
from warploom.train.config import RunConfig, TrainConfig

PROMPT_TOKENS, NEW_TOKENS = 64, 64
NUM_ATTACKERS = 4


@dataclass(frozen=True)
class Answer:
    """Of one request, seconds: until the first token, between tokens, in all."""

    first_s: float
    gaps_s: list[float]
    total_s: float
    text: str


def prompt_of(client: int) -> list[int]:
    return [(7 * client + 3 * place) % 200 + 10 for place in range(PROMPT_TOKENS)]


async def ask(port: int, prompt: list[int]) -> Answer:
    body = {"prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "stream": True}
    data = json.dumps(body).encode()
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(data) + data
    )
    times, texts = [], []
    async for line in reader:
        if line.startswith(b"data: {"):
            times.append(time.perf_counter())
            texts.append(json.loads(line[6:])["choices"][0]["text"])
    writer.close()
    if not times:
        raise SystemExit("the server gave no answer; nothing is timed")
    return Answer(times[0] - started, np.diff(times).tolist(), times[-1] - started, "".join(texts))


async def load(port: int, num_clients: int, num_requests: int, attacked: bool) -> tuple[list[Answer], float, int]:
    """The answers of all clients, the seconds that they took, and the malformed requests that were sent meanwhile."""

    async def client(number: int) -> list[Answer]:
        return [await ask(port, prompt_of(number)) for _ in range(num_requests)]

    attackers = [Attacker(port, seed) for seed in range(NUM_ATTACKERS if attacked else 0)]
    attacks = [asyncio.create_task(attacker.run(10**9)) for attacker in attackers]
    started = time.perf_counter()
    answers = await asyncio.gather(*(client(number) for number in range(num_clients)))
    seconds = time.perf_counter() - started
    for attack in attacks:
        attack.cancel()
    await asyncio.gather(*attacks, return_exceptions=True)
    return [answer for each in answers for answer in each], seconds, sum(attacker.sent for attacker in attackers)


def save_model(name: str, folder: Path) -> Path:
    """A checkpoint of a preset with random weights; its tokenizer knows bytes alone."""
    torch.manual_seed(0)
    model = Transformer(preset(name))
    tokenizer = Tokenizer.train(["a"], 257)
    config = RunConfig(model=model.config, train=TrainConfig(out_dir=folder, seq_len=128))
    state = CheckpointState(
        step=0, weights=model.state_dict(), meta={"config": config.to_dict()}, tokenizer=tokenizer.to_bytes()
    )
    save_checkpoint(folder, state)
    return folder


@contextlib.contextmanager
def serving(checkpoint: Path, slots: int) -> Iterator[int]:
    """A server in a process of its own; yields its port."""
    command = [
        sys.executable,
        "-m",
        "warploom.cli.main",
        "serve",
        str(checkpoint),
        "--port",
        "0",
        "--slots",
        str(slots),
    ]
    command += ["--requests-per-minute", "100000000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = next((line for line in process.stdout if "Serving" in line), "")
            port = re.search(r":(\d+)/", line)
            if port is None:
                raise SystemExit(f"the server did not start: exit code {process.wait()}")
            yield int(port[1])
        finally:
            process.terminate()


def measure(checkpoint: Path, slots: int, num_clients: int, num_requests: int, attacked: bool) -> dict[str, Any]:
    with serving(checkpoint, slots) as port:
        alone = [asyncio.run(ask(port, prompt_of(number))).text for number in range(num_clients)]
        answers, seconds, malformed = asyncio.run(load(port, num_clients, num_requests, attacked))
    if [answer.text for answer in answers] != [text for text in alone for _ in range(num_requests)]:
        raise SystemExit("an answer beside others is not what is answered alone: wrong, so nothing is timed")
    first, gaps, total = (
        np.array([answer.first_s for answer in answers]),
        np.array([gap for answer in answers for gap in answer.gaps_s]),
        np.array([answer.total_s for answer in answers]),
    )
    return {
        "bench": "serve",
        "config": f"{slots} slots",
        "subject": f"{num_clients} clients" + (", attacked" if attacked else ""),
        "requests": len(answers),
        "tokens_per_s": len(answers) * NEW_TOKENS / seconds,
        "malformed_per_s": malformed / seconds,
        **{
            f"{name}_p{q}_ms": 1e3 * float(np.percentile(values, q))
            for name, values in (("first", first), ("gap", gaps), ("request", total))
            for q in (50, 99)
        },
    }


@dataclass(frozen=True)
class Arguments:
    """Time requests to a server."""

    preset: str = "small"
    """The model, with random weights."""
    requests: int = 25
    """Requests of each client."""
    json: Path | None = None
    """Write the records there as JSON."""


CASES = ((1, 1, False), (1, 8, False), (8, 8, False), (8, 8, True))  # slots, clients, beside malformed requests


def main(arguments: Arguments) -> None:
    print_fingerprint()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = save_model(arguments.preset, Path(folder) / "model")
        records = [measure(checkpoint, *case[:2], arguments.requests, case[2]) for case in CASES]
    print_table(
        f"{arguments.preset}: {PROMPT_TOKENS} tokens read, {NEW_TOKENS} written a request; milliseconds, p50 / p99",
        ("slots", "clients", "requests", "first token", "between tokens", "whole request", "tokens/s", "malformed/s"),
        [
            (
                r["config"].removesuffix(" slots"),
                r["subject"].replace(" clients", ""),
                str(r["requests"]),
                *(f"{r[f'{n}_p50_ms']:,.1f} / {r[f'{n}_p99_ms']:,.1f}" for n in ("first", "gap", "request")),
                f"{r['tokens_per_s']:,.0f}",
                f"{r['malformed_per_s']:,.0f}",
            )
            for r in records
        ],
    )
    write_records(arguments.json, records)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
