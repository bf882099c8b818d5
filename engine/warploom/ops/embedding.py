"""y = weight[tokens]: the rows of a table, and the table's gradient, whose rows are sums over the places of a token.

On a GPU the sums are made over sorted tokens, without atomic additions, so that they have the same bits each time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from warploom.ops import _triton
from warploom.ops._op import Backend, BadCase, BenchCase, Case, Op


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """Return weight[tokens], (..., C) in the weight's dtype.

    tokens: (...) int64 or int32, in [0, V); weight: (V, C), any floating dtype. Raises ValueError for a wrong shape or
    a token out of range (tokens are read on the CPU only), TypeError for a wrong dtype.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight must be (V, C), got {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating point, got {weight.dtype}")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"tokens must be torch.int64 or torch.int32, got {tokens.dtype}")
    if tokens.device != weight.device:
        raise ValueError(f"tokens must be on {weight.device} as weight is, got {tokens.device}")
    return _Embedding.apply(weight, tokens)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, tokens):
        ctx.save_for_backward(tokens)
        ctx.num_embeddings = weight.shape[0]
        return torch.ops.warploom.embedding_fwd.default(weight, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return torch.ops.warploom.embedding_bwd.default(dy, *ctx.saved_tensors, ctx.num_embeddings), None


def add_embedding_gradient(dy: Tensor, tokens: Tensor, dweight: Tensor) -> None:
    """Add the gradient of the table, (V, C), into dweight."""
    torch.ops.warploom.embedding_bwd_into.default(dy, tokens, dweight)


def embedding_reference(tokens, weight):
    return F.embedding(tokens, weight)


def _check_values(weight, tokens):
    V = weight.shape[0]
    wrong = (tokens < 0) | (tokens >= V)
    if wrong.any():
        raise ValueError(f"tokens must be in [0, {V}), got {int(tokens[wrong][0])}")


def _reference_fwd(weight, tokens):
    return F.embedding(tokens, weight)


def _reference_bwd(dy, tokens, num_embeddings):
    return torch.ops.aten.embedding_dense_backward(dy, tokens, num_embeddings, -1, False)


def _reference_bwd_into(dy, tokens, dweight):
    if dweight.device.type == "cpu":
        dweight.index_add_(0, tokens.reshape(-1), dy.reshape(-1, dy.shape[-1]))
    else:  # index_add_ is atomic there
        dweight += _reference_bwd(dy, tokens, dweight.shape[0])


def _fake_fwd(weight, tokens):
    return weight.new_empty((*tokens.shape, weight.shape[1]))


def _fake_bwd(dy, tokens, num_embeddings):
    return dy.new_empty((num_embeddings, dy.shape[-1]))


def _fake_bwd_into(dy, tokens, dweight):
    return None


def _case(*leading, V, C, one_token=False):
    def make(generator):
        tokens = torch.randint(1 if one_token else V, leading, generator=generator)
        return {"tokens": tokens, "weight": torch.randn(V, C, generator=generator, dtype=torch.float64)}

    return make


def _bad(name, match, error=ValueError, **changed):
    good = {"tokens": torch.zeros(2, 3, dtype=torch.int64), "weight": torch.ones(5, 4)}
    return BadCase(name, lambda: {**good, **changed}, error, match)


def _bench(N, V, C):
    return BenchCase(
        f"{N}x{V}x{C}",
        _case(N, V=V, C=C),
        bytes_per_element=2 * N * C,
        backward_bytes_per_element=N * C + V * C,
    )


OP = Op(
    name="embedding",
    function=embedding,
    reference=embedding_reference,
    torch_peer=embedding_reference,
    schemas={
        "fwd": "(Tensor weight, Tensor tokens) -> Tensor",
        "bwd": "(Tensor dy, Tensor tokens, int num_embeddings) -> Tensor",
        "bwd_into": "(Tensor dy, Tensor tokens, Tensor(a!) dweight) -> ()",
    },
    fakes={"fwd": _fake_fwd, "bwd": _fake_bwd, "bwd_into": _fake_bwd_into},
    checks={"fwd": _check_values},
    backends={
        "reference": Backend(
            kernels={"fwd": _reference_fwd, "bwd": _reference_bwd, "bwd_into": _reference_bwd_into},
            devices=("cpu", "cuda"),
        ),
        "triton": Backend(
            kernels={s: _triton.launcher("embedding", f"launch_embedding_{s}") for s in ("fwd", "bwd", "bwd_into")},
            devices=("cuda", "cpu"),
            missing=_triton.missing,
            refuses={s: lambda tensor, *_: _triton.refuses_tensor(tensor) for s in ("fwd", "bwd", "bwd_into")},
            slower={"fwd": lambda weight, tokens: "torch's reads as fast, and stops at a token that is out of range"},
        ),
    },
    cases=(
        Case("tiny", _case(2, 3, V=5, C=4), gradcheck=True),
        Case("one_token", _case(V=3, C=7)),
        Case("one_row", _case(4, V=1, C=1)),
        Case("no_tokens", _case(0, V=4, C=3)),
        Case("ragged", _case(3, 37, V=50, C=67)),
        Case("long_run", _case(100, V=9, C=33, one_token=True)),
        Case("sparse", _case(20, V=3000, C=16)),
    ),
    bad_cases=(
        _bad("weight_shape", r"weight must be \(V, C\)", weight=torch.ones(5)),
        _bad("weight_dtype", "weight must be floating", TypeError, weight=torch.ones(5, 4, dtype=torch.int64)),
        _bad("tokens_dtype", "tokens must be torch.int64", TypeError, tokens=torch.zeros(2, 3)),
        _bad("too_large", r"tokens must be in \[0, 5\), got 5", tokens=torch.full((2,), 5)),
        _bad("negative", "got -1", tokens=torch.full((2,), -1)),
    ),
    bench_cases=(_bench(4096, 8192, 384), _bench(1024, 50304, 768)),
)
