"""Every op and the training step on an NVIDIA card, in one command that needs the checkout, torch and triton alone.

    python -m bench.gpu [--budget-s 440] [--json FILE]

First every op is checked on the card against float64, case by case, as the contract tests do on the CPU; then ops are
timed at the shapes of real models, each back end beside what torch offers, as a share of the card's own matrix-product
rate or copy bandwidth of the same minutes; then the whole training step. A part that fails is printed and the rest goes
on; the exit code is 1 then. Parts that the budget does not reach are named.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "engine"), str(ROOT / "kernels")]  # the checkout may not be installed

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from warploom.ops import REGISTRY, backend  # noqa: E402
from warploom.ops._accuracy import Trial, as_tuple  # noqa: E402
from warploom.ops._op import BackendUnavailable  # noqa: E402
from warploom.ops._proof import Refuted, check_accuracy  # noqa: E402

Call = Callable[[], object]
BF16 = torch.bfloat16


@dataclass
class Report:
    """What came out so far, and until when there is time."""

    deadline: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def part(self, name: str, run: Callable[[], object]) -> None:
        """Run a part; an error in it is kept and printed, and ends nothing else."""
        if time.monotonic() > self.deadline:
            self.left_out.append(name)
            return
        try:
            run()
        except Exception as error:
            self.failures.append(f"{name}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}")
            traceback.print_exc()


@dataclass(frozen=True)
class Work:
    """One call to time: its op, shape, and what no implementation can avoid."""

    op: str
    shape: str
    subjects: dict[str, Call]  # the first of torch's is the one to compare with
    flops: float = 0.0
    bytes: float = 0.0


# Checks.


def gpu_backends(name: str) -> list[str]:
    op = REGISTRY[name]
    return [each for each in op.backends if each != "reference" and op.refusal(each, "cuda") is None]


def check_op(report: Report, name: str, until: float) -> None:
    """Every case in every dtype on every back end of this card, until the time is up."""
    op = REGISTRY[name]
    for back_end in gpu_backends(name):
        done, refused, wrong = 0, 0, []
        for case in op.cases:
            for dtype in case.dtypes:
                if time.monotonic() > until:
                    report.left_out.append(f"check of {name} on {back_end} after {done} cases")
                    break
                try:
                    check_accuracy(op, back_end, Trial(op, case, dtype), layout=Tensor.cuda)
                    done += 1
                except BackendUnavailable:
                    refused += 1
                except Refuted as refuted:
                    wrong.append(f"{name} on {back_end}, {case.name}, {dtype}: {refuted}")
        report.failures += wrong
        print(f"check {name} {back_end}: {done} right, {len(wrong)} wrong, {refused} refused", flush=True)


# What is timed.


def _forced(name: str, back_end: str, call: Call) -> Call:
    def forced() -> object:
        with backend(**{name: back_end}):
            return call()

    return forced


def _passes(
    name: str, shape: str, function: Callable[..., Any], peers: dict[str, Callable[..., Any]],
    arguments: dict[str, Any], leaves: list[Tensor], flops: tuple[float, float], size: tuple[float, float],
) -> Iterator[Work]:  # fmt: skip
    """The forward without gradients, and the backward alone. A back end that refuses the arguments is no subject."""
    functions: dict[str, tuple[str | None, Callable[..., Any]]] = {
        each: (each, function) for each in gpu_backends(name)
    }
    functions |= {each: (None, peer) for each, peer in peers.items()}
    forward: dict[str, Call] = {}
    backward: dict[str, Call] = {}
    for label, (back_end, f) in functions.items():
        run = (lambda f=f: f(**arguments)) if back_end is None else _forced(name, back_end, lambda f=f: f(**arguments))
        try:
            outputs = as_tuple(run())  # type: ignore[arg-type]
        except (BackendUnavailable, RuntimeError) as error:
            print(f"{name} {shape}: {label} does not take it: {str(error).splitlines()[0]}", flush=True)
            continue
        forward[label] = torch.no_grad()(run)
        gradients = [torch.randn_like(y) for y in outputs]

        def derive(outputs=outputs, gradients=gradients) -> object:
            return torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)

        backward[label] = derive if back_end is None else _forced(name, back_end, derive)
    yield Work(name, f"{shape} forward", forward, flops[0], size[0])
    yield Work(name, f"{shape} backward", backward, flops[1], size[1])


def _leaf(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype).requires_grad_()


def attention_work() -> Iterator[Work]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def sdpa(kind: SDPBackend) -> Callable[..., Any]:
        def call(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
            with sdpa_kernel(kind):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

        return call

    for D in (128, 64):
        for T in (1024, 2048, 4096):
            B, H = 16384 // T, 2048 // D
            q, k, v = (_leaf(B, T, H, D).transpose(1, 2).detach().requires_grad_() for _ in range(3))
            flops = 2.0 * B * H * T * T * D  # two products, half of each
            peers = {"torch flash": sdpa(SDPBackend.FLASH_ATTENTION), "torch cudnn": sdpa(SDPBackend.CUDNN_ATTENTION)}
            arguments = {"q": q, "k": k, "v": v, "causal": True}
            function = REGISTRY["attention"].function
            yield from _passes(
                "attention", f"causal D {D} T {T}", function, peers, arguments, [q, k, v], (flops, 2.5 * flops), (0, 0)
            )


def norm_work() -> Iterator[Work]:
    for name in ("layer_norm", "rms_norm"):
        op = REGISTRY[name]
        for N, C in ((8192, 768), (8192, 1024), (8192, 4096), (8192, 8192), (1024, 384)):
            x, residual, weight = _leaf(N, C), _leaf(N, C), _leaf(C)
            arguments = {"x": x, "residual": residual, "weight": weight}
            peers = {"torch": op.torch_peer, "torch.compile": torch.compile(op.torch_peer)}
            leaves, size = list(arguments.values()), 8.0 * N * C
            yield from _passes(name, f"{N}x{C}", op.function, peers, arguments, leaves, (0, 0), (size, size))


def linear_work() -> Iterator[Work]:
    op = REGISTRY["linear"]
    for N, C, width in ((8192, 768, 3072), (8192, 2048, 8192), (1024, 384, 1536)):
        for activation in ("relu", "gelu_tanh", "none"):
            x, weight, bias = _leaf(N, C), _leaf(width, C), _leaf(width)
            arguments = {"x": x, "weight": weight, "bias": bias, "activation": activation}
            peers = {"torch": op.torch_peer, "torch.compile": torch.compile(op.torch_peer)}
            flops, leaves = 2.0 * N * C * width, [x, weight, bias]
            shape = f"{N}x{C}x{width} {activation}"
            yield from _passes("linear", shape, op.function, peers, arguments, leaves, (flops, 2 * flops), (0, 0))


def other_work() -> Iterator[Work]:
    op = REGISTRY["cross_entropy"]
    logits, targets = _leaf(8192, 50304), torch.randint(50304, (8192,), device="cuda")
    arguments: dict[str, Any] = {"logits": logits, "targets": targets}
    size = 2.0 * logits.numel()
    peers = {"torch": op.torch_peer, "torch.compile": torch.compile(op.torch_peer)}
    both = {
        label: (lambda f=f: torch.autograd.grad(f(**arguments), [logits])) for label, f in peers.items()
    } | {
        each: _forced("cross_entropy", each, lambda: torch.autograd.grad(op.function(**arguments), [logits]))
        for each in gpu_backends("cross_entropy")
    }  # fmt: skip
    yield Work("cross_entropy", "8192x50304 forward+backward", both, bytes=2 * size)
    x, positions = _leaf(8, 16, 2048, 64), torch.arange(2048, device="cuda")
    op = REGISTRY["rotary"]
    peers = {"torch": op.torch_peer, "torch.compile": torch.compile(op.torch_peer)}
    size = 4.0 * x.numel()
    arguments = {"x": x, "positions": positions}
    yield from _passes("rotary", "8x16x2048x64", op.function, peers, arguments, [x], (0, 0), (size, size))
    op = REGISTRY["adamw"]
    shapes = [(50304, 768), *[(768, 3072), (3072, 768), (768, 768), (768,), (768,)] * 12]
    lists = {
        name: [torch.rand(shape, device="cuda") for shape in shapes]
        for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")
    }
    steps = [torch.ones((), device="cuda") for _ in shapes]
    settings = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-8}
    arguments = {**lists, "max_exp_avg_sqs": [], "state_steps": steps, **settings}
    subjects: dict[str, Call] = {
        each: _forced("adamw", each, lambda: op.function(**arguments)) for each in gpu_backends("adamw")
    }
    subjects["torch"] = lambda: op.torch_peer(**arguments)
    yield Work("adamw", "GPT-2's tensors", subjects, bytes=28.0 * sum(p.numel() for p in lists["params"]))


WORK = {"attention": attention_work, "norms": norm_work, "linear": linear_work, "others": other_work}


# Timing.


def interleave(subjects: dict[str, Call], budget_s: float) -> dict[str, float]:
    """Median seconds of each, taking turns. Before each sample a block larger than the cache is written: inputs come
    from memory, and the card is behind the host, so that launches do not count."""
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    for call in subjects.values():
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    samples: dict[str, list[tuple[Any, Any]]] = {name: [] for name in subjects}
    started = time.monotonic()
    rounds = 0
    names = list(subjects)
    while rounds < 5 or (time.monotonic() - started < budget_s and rounds < 200):
        for name in names[rounds % len(names) :] + names[: rounds % len(names)]:
            flush.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            subjects[name]()
            end.record()
            samples[name].append((begin, end))
        torch.cuda.synchronize()
        rounds += 1
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) / 1e3 for name, pairs in samples.items()}


def ceilings() -> dict[str, tuple[Call, float]]:
    """A call that comes near the card's limit, and its FLOP or bytes."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=BF16) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.randn(1 << 28, device="cuda", dtype=BF16)
    target = torch.empty_like(source)
    return {
        "ceiling: product": (lambda: torch.mm(a, b, out=product), 2.0 * 8192**3),
        "ceiling: copy": (lambda: target.copy_(source), 4.0 * source.numel()),
    }


def time_work(report: Report, work: Work, limits: dict[str, tuple[Call, float]], budget_s: float) -> None:
    ceiling = "ceiling: product" if work.flops else "ceiling: copy"
    limit, amount = limits[ceiling]
    times = interleave({**work.subjects, ceiling: limit}, budget_s)
    rate = amount / times[ceiling]
    peers = [times[name] for name in times if name.startswith("torch")]
    for name in work.subjects:
        report.rows.append(
            {
                "op": work.op,
                "shape": work.shape,
                "subject": name,
                "us": times[name] * 1e6,
                "tflops": work.flops / times[name] / 1e12 if work.flops else None,
                "share_of_ceiling": (work.flops or work.bytes) / times[name] / rate,
                "over_best_torch": min(peers) / times[name] if peers else None,
            }
        )
        print(format_row(report.rows[-1]), flush=True)


def time_step(report: Report) -> None:
    """GPT-2 124M, 8 x 1024 tokens, weights float32, products bf16."""
    from bench.plain_torch import plain_copy
    from warploom.models.presets import preset
    from warploom.models.transformer import Transformer
    from warploom.optim import AdamW

    B, T = 8, 1024
    torch.manual_seed(0)
    model = Transformer(preset("gpt2")).cuda()
    tokens = torch.randint(preset("gpt2").vocab_size, (B, T + 1), device="cuda")
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    plain = plain_copy(model)
    compiled = torch.compile(plain)
    model.compute_dtype = BF16
    own, theirs = AdamW(model.parameters(), lr=1e-4), torch.optim.AdamW(plain.parameters(), lr=1e-4, fused=True)

    def warploom() -> Tensor:
        loss = model.loss(inputs, targets, reduction="mean")
        loss.backward()
        own.step()
        own.zero_grad(set_to_none=True)
        return loss.detach()

    def other(forward: Callable[..., Any]) -> Call:
        def step() -> Tensor:
            with torch.autocast("cuda", BF16):
                loss = forward(inputs, targets)
            loss.backward()
            theirs.step()
            theirs.zero_grad(set_to_none=True)
            return loss.detach()

        return step

    subjects: dict[str, Call] = {"warploom": warploom, "torch": other(plain), "torch.compile": other(compiled)}
    first, second = float(warploom()), float(other(plain)())  # type: ignore[arg-type]
    if abs(first - second) > 2e-2:
        raise AssertionError(f"the first losses differ: {first} and {second}")
    times = interleave(subjects, 20.0)
    for name, seconds in times.items():
        best = min(times["torch"], times["torch.compile"])
        row = {"op": "training step", "shape": f"GPT-2 124M {B}x{T}", "subject": name, "us": seconds * 1e6}
        row |= {"tokens_per_s": B * T / seconds, "over_best_torch": best / seconds}
        report.rows.append(row)
        print(format_row(row), f"{row['tokens_per_s']:.0f} tokens/s", flush=True)


# Output.


def format_row(row: dict[str, Any]) -> str:
    def shown(key: str, form: str) -> str:
        value = row.get(key)
        return "" if value is None else form.format(value)

    return (
        f"{row['op']:<14} {row['shape']:<32} {row['subject']:<14} {row['us']:>10.1f} us "
        f"{shown('tflops', '{:.0f} TFLOP/s'):>13} {shown('share_of_ceiling', '{:.2f} of ceiling'):>16} "
        f"{shown('over_best_torch', '{:.2f}x best of torch'):>20}"
    )


def finish(report: Report, card: str, path: Path | None) -> int:
    """Print the table, what failed and what was left out; write the JSON. Returns the exit code."""
    print(f"\n{card}, torch {torch.__version__}")
    for row in report.rows:
        print(format_row(row))
    for what in report.left_out:
        print(f"no time left for: {what}")
    for what in report.failures:
        print(f"FAILED: {what}", file=sys.stderr)
    if path is not None:
        record = {"card": card, "torch": torch.__version__, "rows": report.rows}
        record |= {"failures": report.failures, "left_out": report.left_out}
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 1 if report.failures else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--budget-s", type=float, default=440.0, help="seconds for everything; parts beyond are named")
    parser.add_argument("--json", type=Path, help="write the records there")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench.gpu: there is no NVIDIA GPU that torch can use", file=sys.stderr)
        return 2
    started = time.monotonic()
    report = Report(deadline=started + arguments.budget_s)
    names = sorted(name for name in REGISTRY if gpu_backends(name))
    for index, name in enumerate(names):  # checks may take two fifths, shared by the ops that are left
        left = started + 0.4 * arguments.budget_s - time.monotonic()
        until = time.monotonic() + max(left, 0.0) / (len(names) - index)
        report.part(f"check of {name}", lambda name=name, until=until: check_op(report, name, until))
    limits = ceilings()
    # Before the ops one by one: of all numbers this is the one to have.
    report.part("training step", lambda: time_step(report))
    for kind, make in WORK.items():

        def run(make: Callable[[], Iterator[Work]] = make) -> None:
            for work in make():
                name = f"{work.op} {work.shape}"
                report.part(name, lambda work=work: time_work(report, work, limits, 1.0))

        report.part(kind, run)
    return finish(report, torch.cuda.get_device_name(), arguments.json)


if __name__ == "__main__":
    sys.exit(main())
