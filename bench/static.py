"""What the compiler makes of every Triton kernel and every configuration that ships, for cards that are not there.

    python -m bench.static [--kernel NAME NAME] [--card NAME NAME] [--one-shape] [--every] [--json FILE]

Launchers run on meta tensors with the arguments of real shapes; what they would launch is compiled for each card and
read: registers, spills to local memory, shared memory, whether the card's own matrix instructions are used, how many
warps stay resident. bound is the time that no kernel can beat on that card for the shape: its floating-point operations
or its bytes at the rates of the data sheet, whichever takes longer.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import tyro
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

import warploom_kernels
from bench.harness import print_table, write_records
from warploom.errors import UserError, nearest
from warploom_kernels import (
    _launch,
    adamw,
    attention,
    cross_entropy,
    embedding,
    grad_norm,
    layer_norm,
    linear,
    linear_cross_entropy,
    linear_glu,
    linear_qkv,
    newton_schulz,
    rms_norm,
    rotary,
)
from warploom_kernels._launch import Config, Launch

# Those of which a card of sm_90 must run its own matrix instructions, in every 16-bit configuration.
PRODUCT_KERNELS = {
    "attention_fwd_kernel",
    "attention_bwd_dq_kernel",
    "attention_bwd_dkdv_kernel",
    "linear_product_kernel",
    "linear_glu_fwd_kernel",
    "linear_glu_bwd_dx_kernel",
    "linear_qkv_each_kernel",
    "linear_qkv_bwd_dx_kernel",
    "linear_cross_entropy_lse_kernel",
    "linear_cross_entropy_dlogits_kernel",
    "newton_schulz_product_kernel",
}
# Bytes of stack that are no spills: the array in which sine and cosine reduce a large angle.
LOCAL_ARRAY = {"rotary_kernel": 40}
REGISTERS_PER_SM, WARPS_PER_SM = 65536, 64  # of all three


@dataclass(frozen=True)
class Card:
    """Rates and sizes of the manufacturer's data sheet; dense, without sparsity."""

    name: str
    architecture: int
    tensor_flops: float  # 16-bit
    float32_flops: float
    bytes_per_s: float
    shared_per_block: int
    shared_per_sm: int


CARDS = {
    card.name: card
    for card in (
        Card("A100", 80, 312e12, 19.5e12, 2.04e12, 163 << 10, 164 << 10),
        Card("H100", 90, 989e12, 67e12, 3.35e12, 227 << 10, 228 << 10),
        Card("B200", 100, 2250e12, 75e12, 8.0e12, 227 << 10, 228 << 10),
    )
}


@dataclass(frozen=True)
class Shape:
    """One call of a launcher, on meta tensors, and what it must do at least."""

    name: str
    call: Callable[[], object]
    flops: dict[str, float]  # by kernel
    bytes: dict[str, float]
    common: bool = False  # of a model's everyday: the ones that the tests compile each time


@dataclass(frozen=True)
class Compiled:
    """One configuration of one kernel, compiled for one card."""

    kernel: str
    shape: str
    card: str
    config: dict[str, int]
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_memory: int  # columns of 128 lanes x 4 bytes, of the 512 that sm_100 has
    warps_per_sm: int
    matrix_instruction: str  # wgmma, tcgen05, mma or none
    bound_us: float | None
    bound_by: str

    @property
    def fault(self) -> str | None:
        """Why it may not ship, None if it may."""
        if self.spilled_bytes:
            return f"spills {self.spilled_bytes} bytes a thread"
        if self.tensor_memory > 512:  # Triton compiles such a kernel to nothing but a trap
            return f"needs {self.tensor_memory} columns of tensor memory, 512 exist"
        limit = CARDS[self.card].shared_per_block
        return f"needs {self.shared_bytes} bytes of shared memory, {limit} exist" if self.shared_bytes > limit else None


# Shapes.


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _norm_shapes() -> Iterator[Shape]:
    for N, C in ((8192, 768), (8192, 2048), (8192, 8192), (4096, 16384), (2048, 65536)):
        x, weight, rows = _empty(N, C), _empty(C), _empty(N, dtype=torch.float32)
        bytes_ = {"norm_fwd_kernel": 8.0 * N * C, "norm_bwd_kernel": 8.0 * N * C, "norm_bwd_wide_kernel": 8.0 * N * C}
        bytes_["norm_bwd_weight_kernel"] = 4.0 * N * C

        def call(x=x, weight=weight, rows=rows) -> None:
            layer_norm.launch_layer_norm_fwd(x, weight, weight, x, 1e-5)
            layer_norm.launch_layer_norm_bwd(x, x, x, weight, rows, rows)
            rms_norm.launch_rms_norm_fwd(x, weight, x, 1e-5)
            rms_norm.launch_rms_norm_bwd(x, x, x, weight, rows)

        yield Shape(f"norm {N}x{C}", call, {}, bytes_, common=C in (768, 8192, 65536))


def _attention_shapes() -> Iterator[Shape]:
    def shape(name: str, D: int, *, H=16, H_kv=16, dtype=torch.bfloat16, bias: Tensor | None = None, common=False,
              documents=0, causal=True, window: int | None = None) -> Shape:  # fmt: skip
        B, T = (1, 16384) if documents else (8, 2048)
        q, k = (_empty(B, T, heads, D, dtype=dtype).transpose(1, 2) for heads in (H, H_kv))
        lse = _empty(B, H, T, dtype=torch.float32)
        offsets = _empty(documents + 1, dtype=torch.int32) if documents else None
        options = (bias, offsets, None, None, causal, window, D**-0.5)

        def call() -> None:
            attention.launch_attention_fwd(q, k, k, *options)
            attention.launch_attention_bwd(q, q, k, k, q, lse, *options, bias is not None)

        product = 2.0 * B * H * T * T * D / (2 if causal else 1)
        flops = {
            f"attention_{kernel}_kernel": n * product for kernel, n in (("fwd", 2), ("bwd_dq", 3), ("bwd_dkdv", 4))
        }
        return Shape(f"{name} D {D}", call, {} if documents or window else flops, {}, common)

    for D in (64, 128, 256):
        yield shape("causal", D, common=True)
    for D in (16, 32, 80):
        yield shape("causal", D)
    yield shape("full", 64, causal=False)
    yield shape("grouped window", 128, H_kv=4, window=512)
    yield shape("packed grouped", 64, H_kv=4, documents=37)
    yield shape("bias", 64, bias=_empty(16, 2048, 2048))
    yield shape("distances", 64, bias=_empty(16, 4095), causal=False, common=True)
    yield shape("distances", 256, bias=_empty(1, 4095))
    for D in (64, 128, 256):  # all at once: what fits here fits with less
        bias = _empty(16, 16384, 16384)
        yield shape("everything", D, H_kv=4, window=512, documents=37, bias=bias)
        yield shape("float32", D, dtype=torch.float32)
    for D in (128, 160):
        bias = _empty(16, 16384, 16384, dtype=torch.float32)
        yield shape("everything float32", D, H_kv=4, window=512, documents=37, bias=bias, dtype=torch.float32)
    yield shape("distances float32", 160, bias=_empty(1, 4095, dtype=torch.float32), dtype=torch.float32)


def _linear_shapes() -> Iterator[Shape]:
    def shape(N: int, C: int, F: int, activation: str, dtype=torch.bfloat16, common=False) -> Shape:
        x, weight, bias, dy = (_empty(*s, dtype=dtype) for s in ((N, C), (F, C), (F,), (N, F)))

        def call() -> None:
            _, saved = linear.launch_linear_fwd(x, weight, bias, None, activation, activation != "none")
            linear.launch_linear_bwd(dy, x, weight, None, saved, activation, True, True, True)

        name = f"{activation} {N}x{C}x{F}" + (" float32" if dtype == torch.float32 else "")
        return Shape(name, call, {"linear_product_kernel": 2.0 * N * C * F}, {}, common)

    yield shape(8192, 768, 3072, "relu", common=True)
    for activation in ("none", "relu2", "gelu_tanh", "silu"):
        yield shape(8192, 768, 3072, activation)
    yield shape(1000, 63, 65, "relu")
    yield shape(8192, 768, 3072, "gelu_tanh", dtype=torch.float32)


def _glu_shapes() -> Iterator[Shape]:
    def shape(N: int, C: int, F: int, activation: str, dtype=torch.bfloat16, common=False) -> Shape:
        x, weight, dy = (_empty(*s, dtype=dtype) for s in ((N, C), (F, C), (N, F)))

        def call() -> None:
            linear_glu.launch_linear_glu_fwd(x, [weight] * 2, [weight[:, 0]] * 2, [None] * 2, activation, True)
            linear_glu.launch_linear_glu_bwd(dy, x, [weight] * 2, [None] * 2, dy, dy, activation, True, True, True)

        product = 2.0 * N * C * F
        flops = {"linear_glu_fwd_kernel": 2 * product, "linear_glu_bwd_dx_kernel": 2 * product}
        flops["linear_product_kernel"] = product
        name = f"gated {activation} {N}x{C}x{F}" + (" float32" if dtype == torch.float32 else "")
        return Shape(name, call, flops, {}, common)

    yield shape(8192, 768, 2048, "silu", common=True)
    yield shape(8192, 768, 2048, "gelu_tanh")
    yield shape(1000, 63, 65, "silu")
    yield shape(8192, 768, 2048, "silu", dtype=torch.float32)


def _qkv_shapes() -> Iterator[Shape]:
    def shape(N: int, C: int, widths: tuple[int, int, int], common=False) -> Shape:
        x, weights, biases, dys = (
            _empty(N, C), [_empty(F, C) for F in widths], [_empty(F) for F in widths], [_empty(N, F) for F in widths]
        )  # fmt: skip

        def call() -> None:
            linear_qkv.launch_linear_qkv_fwd(x, weights, biases, [None] * 3)
            linear_qkv.launch_linear_qkv_bwd(x, dys, weights, [None] * 3, True, True, True)

        product = 2.0 * N * C * sum(widths)
        flops = {"linear_qkv_each_kernel": product, "linear_qkv_bwd_dx_kernel": product}
        return Shape(f"qkv {N}x{C}x{widths[0]}", call, flops, {}, common)

    yield shape(8192, 768, (768, 768, 768), common=True)
    yield shape(8192, 2048, (2048, 512, 512))
    yield shape(1000, 63, (65, 33, 33))


def _loss_shapes() -> Iterator[Shape]:
    for N, C, V, dtype in (
        (8192, 768, 50304, torch.bfloat16),
        (1000, 63, 301, torch.bfloat16),
        (8192, 768, 50304, torch.float32),
    ):
        hidden, weight = _empty(N, C, dtype=dtype), _empty(V, C, dtype=torch.float32)
        targets, scale, lse = _empty(N, dtype=torch.int64), *(_empty(*s, dtype=torch.float32) for s in ((), (N,)))

        def call(hidden=hidden, weight=weight, targets=targets, scale=scale, lse=lse) -> None:
            linear_cross_entropy.launch_linear_cross_entropy_fwd(hidden, weight, targets, -100, False, False)
            arguments = (scale, hidden, weight, targets, lse, -100, True, True)
            linear_cross_entropy.launch_linear_cross_entropy_bwd(*arguments)

        flops = {"linear_cross_entropy_lse_kernel": 2.0 * N * C * V}
        name = f"loss {N}x{C}x{V}" + (" float32" if dtype == torch.float32 else "")
        yield Shape(name, call, flops, {}, common=C == 768 and dtype == torch.bfloat16)


def _iteration_shapes() -> Iterator[Shape]:
    for batch, M, N, dtype in (
        (12, 768, 3072, torch.bfloat16),
        (2, 33, 70, torch.bfloat16),
        (12, 768, 3072, torch.float32),
    ):
        matrices = _empty(batch, M, N, dtype=torch.float32)

        def call(matrices=matrices, dtype=dtype) -> None:
            newton_schulz.launch_newton_schulz_fwd(matrices, dtype, [1.0, 1.0, 1.0], 1)

        name = f"iteration {batch}x{M}x{N}" + (" float32" if dtype == torch.float32 else "")
        yield Shape(name, call, {}, {}, common=M == 768 and dtype == torch.bfloat16)


def _other_shapes() -> Iterator[Shape]:
    for D, rotary_dim in ((64, 64), (80, 32)):
        x, positions = _empty(8, 16, 2048, D), _empty(2048, dtype=torch.int64)
        bytes_ = {"rotary_kernel": 4.0 * x.numel()}

        def turn(x=x, positions=positions, rotary_dim=rotary_dim) -> None:
            rotary.launch_rotary_fwd(x, positions, 10000.0, rotary_dim)

        yield Shape(f"rotary D {D}", turn, {}, bytes_, common=D == 64)
    for dtype in (torch.bfloat16, torch.float32):
        logits, targets = _empty(8192, 50304, dtype=dtype), _empty(8192, dtype=torch.int64)

        def rows(logits=logits, targets=targets) -> None:
            cross_entropy.launch_cross_entropy_fwd(logits, targets, -100, True, True)
            cross_entropy.launch_cross_entropy_fwd(logits, targets, -100, True, False)

        bytes_ = {"cross_entropy_kernel": 2.0 * logits.numel() * dtype.itemsize}
        yield Shape(f"rows {dtype}".replace("torch.", ""), rows, {}, bytes_, common=dtype == torch.bfloat16)
    for name, rows, amsgrad in (("adamw", 768, False), ("adamw amsgrad", 768, True), ("adamw odd", 767, False)):
        columns = 3072 - rows % 2
        tensors = [_empty(rows, columns, dtype=torch.float32)] * 4
        steps = [_empty(dtype=torch.float32)] * 4

        def step(tensors=tensors, steps=steps, amsgrad=amsgrad) -> None:
            largest = tensors if amsgrad else []
            copies = [_empty(*tensors[0].shape)] * 4
            lists: tuple[list[Tensor], ...] = (tensors, tensors, tensors, tensors, largest, steps, copies)
            adamw.launch_adamw_step(*lists, 1e-3, 0.9, 0.95, 0.1, 1e-8, False, 1.0, False)

        bytes_ = {"adamw_kernel": 4 * rows * columns * (38.0 if amsgrad else 30.0)}
        yield Shape(name, step, {}, bytes_, common=name == "adamw")
    for dtype in (torch.float32, torch.bfloat16):
        grads = [_empty(768, 3072, dtype=dtype)] * 4

        def norm(grads=grads) -> None:
            grad_norm.launch_grad_norm_fwd(grads)

        bytes_ = {"grad_norm_squares_kernel": 4.0 * 768 * 3072 * dtype.itemsize}
        yield Shape(f"norm of {dtype} gradients".replace("torch.", ""), norm, {}, bytes_)
    tokens, table, rows = _empty(8192, dtype=torch.int64), _empty(50304, 768, dtype=torch.float32), _empty(8192, 768)

    def look_up() -> None:
        embedding.launch_embedding_fwd(table, tokens)
        embedding.launch_embedding_bwd(rows, tokens, 50304)

    yield Shape("embedding 8192x768", look_up, {}, {"embedding_fwd_kernel": 8.0 * 8192 * 768})


def all_shapes() -> Iterator[Shape]:
    yield from _norm_shapes()
    yield from _attention_shapes()
    yield from _linear_shapes()
    yield from _glu_shapes()
    yield from _qkv_shapes()
    yield from _loss_shapes()
    yield from _iteration_shapes()
    yield from _other_shapes()


# Compilation.


def kernel_names() -> set[str]:
    """Every kernel of warploom_kernels."""
    modules = [
        importlib.import_module(f"warploom_kernels.{m.name}") for m in pkgutil.iter_modules(warploom_kernels.__path__)
    ]
    return {
        name
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_kernel") and hasattr(value, "arg_names")
    }


def launches(shape: Shape, card: Card) -> list[Launch]:
    """What the shape's launchers would run on this card."""
    with _launch.recording(card.architecture) as recorded:
        shape.call()
    return recorded


def _source(launch: Launch, config: Config) -> ASTSource:
    """The kernel with its arguments' types, as Triton would specialise it for them at run time."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    capitals = {param.name for param in launch.kernel.params if param.is_constexpr}
    values = {**launch.arguments, **config.constants}
    for index, name in enumerate(launch.kernel.arg_names):
        value = values[name]
        aligned = False
        if name in capitals or value is None or (type(value) is int and value == 1):
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, Tensor):
            signature[name] = f"*{_TYPE_NAMES[value.dtype]}"
            aligned = value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            aligned = value % 16 == 0
        if aligned:
            attributes[index,] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


_TYPE_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.float64: "fp64",
}


def compile_launch(shape: Shape, launch: Launch, config: Config, card: Card) -> Compiled:
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    target = GPUTarget("cuda", card.architecture, 32)
    kernel = _compile(_source(launch, config), target, options)
    name = launch.kernel.__name__
    registers, stack = _resources(kernel.asm["cubin"])
    spilled = max(0, stack - LOCAL_ARRAY.get(name, 0))
    shared = kernel.metadata.shared
    blocks = min(
        WARPS_PER_SM // config.num_warps,
        REGISTERS_PER_SM // (registers * 32 * config.num_warps),
        card.shared_per_sm // (shared + 1024),
    )
    rate = card.float32_flops if "float32" in shape.name else card.tensor_flops
    bounds = {
        "operations": shape.flops.get(name, 0.0) / rate,
        "memory": shape.bytes.get(name, 0.0) / card.bytes_per_s,
    }
    by = max(bounds, key=lambda each: bounds[each])
    return Compiled(
        name, shape.name, card.name, config.as_record(), registers, spilled, shared,
        getattr(kernel.metadata, "tmem_size", None) or 0, blocks * config.num_warps,
        _matrix_instruction(kernel.asm["ptx"]), bounds[by] * 1e6 or None, by,
    )  # fmt: skip


def _compile(source: ASTSource, target: GPUTarget, options: dict[str, int]) -> CompiledKernel:
    for _ in range(10):
        try:
            return triton.compile(source, target=target, options=options)
        except SystemError as error:  # CPython 3.11: threads that parse at once share a count (python/cpython#106905)
            if "AST constructor recursion depth" not in str(error):
                raise
    return triton.compile(source, target=target, options=options)


def _matrix_instruction(ptx: str) -> str:
    for name, instruction in (("tcgen05", "tcgen05.mma"), ("wgmma", "wgmma.mma_async"), ("mma", "mma.sync")):
        if instruction in ptx:
            return name
    return "none"


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing about registers: {text}")
    return int(found[1]), int(found[2])


def compile_all(
    shapes: list[Shape],
    cards: list[Card],
    *,
    every: bool = True,
    kernels: tuple[str, ...] = (),
    one_shape: bool = False,
) -> list[Compiled]:
    """Every configuration of every launch, or the first alone; of every shape, or for each kernel of the first that
    launches it; each combination once."""
    first_of: dict[tuple[str, str], Launch] = {}
    jobs: dict[str, tuple[Shape, Launch, Config, Card]] = {}
    for card in cards:
        for shape in shapes:
            for launch in launches(shape, card):
                name = launch.kernel.__name__
                if kernels and name not in kernels:
                    continue
                if one_shape and first_of.setdefault((name, card.name), launch) is not launch:
                    continue
                for config in launch.configs if every else launch.configs[:1]:
                    source = _source(launch, config).hash() + str(config) + card.name
                    jobs.setdefault(source, (shape, launch, config, card))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda job: compile_launch(*job), jobs.values()))


# The table.


@dataclass(frozen=True)
class Arguments:
    """Compile every Triton kernel for cards that need not be there, and print what came out."""

    kernel: tuple[str, ...] = ()
    """Which kernels, such as attention_fwd_kernel; none given means all."""
    card: tuple[str, ...] = tuple(CARDS)
    """A100, H100 and B200."""
    one_shape: bool = False
    """Each kernel for the first of the shapes that launch it, and not for all."""
    every: bool = False
    """Every configuration that ships, and not the first of each shape alone."""
    json: Path | None = None
    """Write the records there as JSON."""


def main(arguments: Arguments) -> None:
    for name in arguments.card:
        if name not in CARDS:
            raise UserError(f"no card is called {name!r}{nearest(name, CARDS)}")
    cards = [CARDS[name] for name in arguments.card]
    compiled = compile_all(
        list(all_shapes()), cards, every=arguments.every, kernels=arguments.kernel, one_shape=arguments.one_shape
    )
    if not compiled:
        raise UserError(f"no kernel is called {' or '.join(arguments.kernel)}")
    print_table(
        "Triton kernels, compiled (spills: bytes a thread; warps: resident on a multiprocessor, of 64)",
        ("kernel", "shape", "card", "tile", "warps x stages", "registers", "spills", "shared KiB", "warps", "products",
         "bound us"),
        [
            (
                each.kernel.removesuffix("_kernel"),
                each.shape,
                each.card,
                " ".join(str(v) for k, v in each.config.items() if k not in ("num_warps", "num_stages")),
                f"{each.config['num_warps']} x {each.config['num_stages']}",
                str(each.registers),
                str(each.spilled_bytes),
                f"{each.shared_bytes / 1024:.0f}",
                str(each.warps_per_sm),
                each.matrix_instruction,
                f"{each.bound_us:.0f} ({each.bound_by})" if each.bound_us else "",
            )
            for each in compiled
        ],
    )  # fmt: skip
    write_records(arguments.json, [asdict(each) for each in compiled])
    faults = [each for each in compiled if each.fault]
    for each in faults:
        print(f"{each.kernel}, {each.shape}, {each.card}, {each.config}: {each.fault}", file=sys.stderr)
    if faults:
        sys.exit(1)


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments))
    except UserError as error:
        print(f"bench.static: {error}", file=sys.stderr)
        sys.exit(2)
