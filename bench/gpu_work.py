"""What bench.gpu times: calls of the ops at the shapes of real models, and of those who offer the same: torch, and
Liger-Kernel, flash-attn and TransformerEngine where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from warploom.ops import REGISTRY, backend
from warploom.ops._accuracy import as_tuple
from warploom.ops._op import BackendUnavailable

Call = Callable[[], object]
Functions = dict[str, Callable[..., Any]]
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Work:
    """One call to time: its op, shape, and what no implementation can avoid."""

    op: str
    shape: str
    subjects: dict[str, Call]  # those of torch have names that begin with torch
    flops: float = 0.0
    bytes: float = 0.0


def gpu_backends(name: str) -> list[str]:
    op = REGISTRY[name]
    return [each for each in op.backends if each != "reference" and op.refusal(each, "cuda") is None]


def forced(name: str, back_end: str, call: Call) -> Call:
    def forced_call() -> object:
        with backend(**{name: back_end}):
            return call()

    return forced_call


# Rivals, as functions of the op's arguments.


def _installed(module: str) -> Any | None:
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return None
    try:
        return importlib.import_module(module)
    except ImportError as error:  # built for another torch or CUDA
        print(f"{module} is installed and cannot be imported: {error}", flush=True)
        return None


def attention_rivals() -> Functions:
    """They want (B, T, H, D), which the tensors of attention_work are underneath."""
    rivals: Functions = {}
    for label, module in (("flash-attn", "flash_attn"), ("flash-attn 3", "flash_attn_interface")):
        found = _installed(module)
        if found is not None:

            def call(q: Tensor, k: Tensor, v: Tensor, causal: bool, found: Any = found) -> Tensor:
                o = found.flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=causal)
                return (o[0] if isinstance(o, tuple) else o).transpose(1, 2)

            rivals[label] = call
    engine = _installed("transformer_engine.pytorch")
    if engine is not None:

        def fused(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
            B, H, T, D = q.shape
            mask = "causal" if causal else "no_mask"
            attend = engine.DotProductAttention(H, D, attention_dropout=0.0, attn_mask_type=mask, qkv_format="bshd")
            return attend(*(x.transpose(1, 2) for x in (q, k, v))).view(B, T, H, D).transpose(1, 2)

        rivals["TransformerEngine"] = fused
    return rivals


def norm_rivals(name: str) -> Functions:
    liger = _installed("liger_kernel.transformers.functional")
    rivals: Functions = {}
    if liger is not None and name == "layer_norm":

        def layer_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            total = x + residual
            return liger.liger_layer_norm(total, weight, torch.zeros_like(weight), 1e-5), total

        rivals["Liger-Kernel"] = layer_norm
    if liger is not None and name == "rms_norm":

        def rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            total = x + residual
            return liger.liger_rms_norm(total, weight, 1e-6, 0.0, "llama", False), total

        rivals["Liger-Kernel"] = rms_norm
    engine = _installed("transformer_engine.pytorch")
    if engine is not None:
        kind = engine.LayerNorm if name == "layer_norm" else engine.RMSNorm

        def norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            module = kind(weight.numel(), params_dtype=weight.dtype, device=weight.device)
            total = x + residual
            return torch.func.functional_call(module, {"weight": weight}, (total,)), total

        rivals["TransformerEngine"] = norm
    return rivals


def loss_rivals() -> Functions:
    liger = _installed("liger_kernel.transformers.functional")
    if liger is None:
        return {}
    return {"Liger-Kernel": lambda logits, targets: liger.liger_cross_entropy(logits, targets)}


def linear_loss_rivals() -> Functions:
    liger = _installed("liger_kernel.transformers.functional")
    if liger is None:
        return {}
    return {
        "Liger-Kernel": lambda hidden, weight, targets: liger.liger_fused_linear_cross_entropy(
            hidden, weight.to(hidden.dtype), targets
        )
    }


def glu_rivals() -> Functions:
    liger = _installed("liger_kernel.transformers.functional")
    if liger is None:
        return {}
    return {
        "Liger-Kernel": lambda x, gate_weight, up_weight: liger.liger_swiglu(
            F.linear(x, gate_weight), F.linear(x, up_weight)
        )
    }


# Work.


def of_torch(name: str) -> Functions:
    peer = REGISTRY[name].torch_peer
    return {"torch": peer, "torch.compile": torch.compile(peer)}


def _passes(
    name: str, shape: str, peers: Functions, arguments: dict[str, Any], leaves: list[Tensor],
    flops: tuple[float, float], size: tuple[float, float], *, together: bool = False,
) -> Iterator[Work]:  # fmt: skip
    """The forward without gradients, and the backward alone; or both together, for ops that make gradients in the
    forward. A back end that refuses the arguments, and a rival that fails on them, is named and left out."""
    function = REGISTRY[name].function
    functions: dict[str, tuple[str | None, Callable[..., Any]]] = {
        each: (each, function) for each in gpu_backends(name)
    }
    functions |= {each: (None, peer) for each, peer in peers.items()}
    forward: dict[str, Call] = {}
    backward: dict[str, Call] = {}
    for label, (back_end, f) in functions.items():

        def on_back_end(call: Call, back_end: str | None = back_end) -> Call:
            return call if back_end is None else forced(name, back_end, call)

        run = on_back_end(lambda f=f: f(**arguments))  # type: ignore[misc]
        try:
            outputs = as_tuple(run())  # type: ignore[arg-type]
            gradients = [torch.randn_like(y) for y in outputs]
            on_back_end(lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True))()  # noqa: B023
        except BackendUnavailable as error:
            print(f"{name} {shape}: {label} does not take it: {error}", flush=True)
            continue
        except Exception as error:
            if back_end is not None:
                raise
            print(f"{name} {shape}: {label} fails: {type(error).__name__}: {error}", flush=True)
            continue

        def derive(outputs: Any = outputs, gradients: Any = gradients) -> object:
            return torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)

        def both(f: Callable[..., Any] = f, gradients: Any = gradients) -> object:
            return torch.autograd.grad(as_tuple(f(**arguments)), leaves, gradients)

        if together:
            forward[label] = on_back_end(both)
        else:
            forward[label] = torch.no_grad()(run)
            backward[label] = on_back_end(derive)
    if together:
        yield Work(name, f"{shape} forward+backward", forward, sum(flops), sum(size))
    else:
        yield Work(name, f"{shape} forward", forward, flops[0], size[0])
        yield Work(name, f"{shape} backward", backward, flops[1], size[1])


def leaf(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype).requires_grad_()


def attention_work() -> Iterator[Work]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def sdpa(kind: SDPBackend) -> Callable[..., Any]:
        def call(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
            with sdpa_kernel(kind):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

        return call

    peers = {"torch flash": sdpa(SDPBackend.FLASH_ATTENTION), "torch cudnn": sdpa(SDPBackend.CUDNN_ATTENTION)}
    peers |= attention_rivals()
    for D in (128, 64):
        for T in (1024, 2048, 4096):
            B, H = 16384 // T, 2048 // D
            q, k, v = (leaf(B, T, H, D).transpose(1, 2).detach().requires_grad_() for _ in range(3))
            flops = 2.0 * B * H * T * T * D  # two products, half of each
            arguments = {"q": q, "k": k, "v": v, "causal": True}
            shape, work = f"causal D {D} T {T}", (flops, 2.5 * flops)
            yield from _passes("attention", shape, peers, arguments, [q, k, v], work, (0, 0))


def norm_work() -> Iterator[Work]:
    for name in ("layer_norm", "rms_norm"):
        peers = of_torch(name) | norm_rivals(name)
        for N, C in ((8192, 768), (8192, 1024), (8192, 4096), (8192, 8192), (1024, 384)):
            arguments = {"x": leaf(N, C), "residual": leaf(N, C), "weight": leaf(C)}
            size = 8.0 * N * C
            yield from _passes(name, f"{N}x{C}", peers, arguments, list(arguments.values()), (0, 0), (size, size))


def linear_work() -> Iterator[Work]:
    for N, C, width in ((8192, 768, 3072), (8192, 2048, 8192), (1024, 384, 1536)):
        flops = 2.0 * N * C * width
        for activation in ("relu", "gelu_tanh", "none"):
            x, weight, bias = leaf(N, C), leaf(width, C), leaf(width)
            arguments = {"x": x, "weight": weight, "bias": bias, "activation": activation}
            shape = f"{N}x{C}x{width} {activation}"
            yield from _passes(
                "linear", shape, of_torch("linear"), arguments, [x, weight, bias], (flops, 2 * flops), (0, 0)
            )
        x, gate, up = leaf(N, C), leaf(width, C), leaf(width, C)
        arguments = {"x": x, "gate_weight": gate, "up_weight": up}
        peers = of_torch("linear_glu") | glu_rivals()
        yield from _passes(
            "linear_glu", f"{N}x{C}x{width}", peers, arguments, [x, gate, up], (2 * flops, 4 * flops), (0, 0)
        )
        x, weights = leaf(N, C), [leaf(C, C) for _ in range(3)]
        arguments = {"x": x, **dict(zip(("q_weight", "k_weight", "v_weight"), weights, strict=True))}
        flops = 6.0 * N * C * C
        yield from _passes(
            "linear_qkv", f"{N}x{C}", of_torch("linear_qkv"), arguments, [x, *weights], (flops, 2 * flops), (0, 0)
        )


def loss_work() -> Iterator[Work]:
    N, C, V = 8192, 768, 50304
    targets = torch.randint(V, (N,), device="cuda")
    logits = leaf(N, V)
    size = 2.0 * logits.numel()
    peers = of_torch("cross_entropy") | loss_rivals()
    arguments: dict[str, Any] = {"logits": logits, "targets": targets}
    yield from _passes("cross_entropy", f"{N}x{V}", peers, arguments, [logits], (0, 0), (size, size), together=True)
    del logits, arguments
    hidden, weight = leaf(N, C), leaf(V, C, dtype=torch.float32)
    flops = 2.0 * N * C * V
    peers = of_torch("linear_cross_entropy") | linear_loss_rivals()
    arguments = {"hidden": hidden, "weight": weight, "targets": targets}
    yield from _passes(
        "linear_cross_entropy", f"{N}x{C}x{V}", peers, arguments, [hidden, weight], (flops, 2 * flops), (0, 0),
        together=True,
    )  # fmt: skip
    table, tokens = leaf(V, C, dtype=torch.float32), torch.randint(V, (N,), device="cuda")
    size = 4.0 * N * C
    yield from _passes(
        "embedding", f"{N}x{V}x{C}", of_torch("embedding"), {"tokens": tokens, "weight": table}, [table], (0, 0),
        (2 * size, size + 4.0 * V * C),
    )  # fmt: skip


def rotary_work() -> Iterator[Work]:
    x, positions = leaf(8, 16, 2048, 64), torch.arange(2048, device="cuda")
    size, arguments = 4.0 * x.numel(), {"x": x, "positions": positions}
    yield from _passes("rotary", "8x16x2048x64", of_torch("rotary"), arguments, [x], (0, 0), (size, size))


def optimizer_work() -> Iterator[Work]:
    """GPT-2's tensors."""
    shapes = [(50304, 768), *[(768, 3072), (3072, 768), (768, 768), (768,), (768,)] * 12]
    lists = {
        name: [torch.rand(shape, device="cuda") for shape in shapes]
        for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")
    }
    elements = sum(p.numel() for p in lists["params"])
    steps = [torch.ones((), device="cuda") for _ in shapes]
    settings = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-8}
    yield _plain("adamw", {**lists, "max_exp_avg_sqs": [], "state_steps": steps, **settings}, bytes_=28.0 * elements)
    yield _plain("grad_norm", {"grads": lists["grads"]}, bytes_=4.0 * elements)
    matrices = torch.randn(12, 768, 3072, device="cuda")
    flops = 5 * 12 * (4.0 * 768 * 768 * 3072 + 2.0 * 768**3)
    yield _plain("newton_schulz", {"matrices": matrices, "dtype": BF16}, flops=flops)


def _plain(name: str, arguments: dict[str, Any], flops: float = 0.0, bytes_: float = 0.0) -> Work:
    """Of an op without gradients."""
    op = REGISTRY[name]
    subjects: dict[str, Call] = {
        each: forced(name, each, lambda: op.function(**arguments)) for each in gpu_backends(name)
    }
    subjects["torch"] = lambda: op.torch_peer(**arguments)
    return Work(name, "GPT-2's tensors", subjects, flops, bytes_)


WORK: dict[str, Callable[[], Iterator[Work]]] = {
    "attention": attention_work,
    "norms": norm_work,
    "linear": linear_work,
    "losses": loss_work,
    "rotary": rotary_work,
    "optimizers": optimizer_work,
}
