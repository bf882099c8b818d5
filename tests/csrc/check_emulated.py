"""Prove ops on their CUDA C++ back end, run by the emulator. A program of its own, since AddressSanitizer must be
loaded before Python.

Standard input: a JSON list of jobs {"library", "op", "cases" (a pattern of their names), "seed"}, and for the back end
cublaslt also {"cublaslt" (its library), "environment"}. Each runs in a forked process, since what is found ends it.
Prints a line of JSON for each: {"proof"} or, where it did not come to one, {"error"}.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Mapping
from types import MappingProxyType

sys.modules["warploom._C"] = None  # type: ignore[assignment]  # the library defines the same operators

import torch  # noqa: E402

from warploom.ops import REGISTRY, adamw, backend  # noqa: E402
from warploom.ops._accuracy import Trial  # noqa: E402
from warploom.ops._op import BackendUnavailable  # noqa: E402
from warploom.ops._proof import Refuted, check_accuracy, check_writes_everything  # noqa: E402

warnings.simplefilter("error")


def proof_of(
    library: str,
    op: str,
    cases: str,
    seed: int,
    cublaslt: str | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> dict:
    os.environ.update(environment, EMULATOR_SEED=str(seed))
    torch.ops.load_library(library)
    name = "cuda"
    if cublaslt is not None:
        name = "cublaslt"
        assert torch.ops.warploom_cuda.cublaslt_load(cublaslt) == 130100
    count_conflicts = ctypes.CDLL(library).emulator_bank_conflicts
    count_conflicts.restype = ctypes.c_long
    record = REGISTRY[op]
    record.backends[name] = dataclasses.replace(record.backends[name], devices=("cpu",), missing=lambda: None)
    proven, refused, failures = 0, 0, []
    for case in record.cases:
        for dtype in case.dtypes if re.search(cases, case.name) else ():
            trial = Trial(record, case, dtype)
            try:
                check_accuracy(record, name, trial)
                # Its two runs have threads scheduled differently, so it shows too that results do not depend on that.
                check_writes_everything(record, name, trial)
                proven += 1
            except BackendUnavailable:
                refused += 1
            except Refuted as failure:
                failures.append(f"{case.name}, {dtype}: {failure}")
    failures += OTHER_PROOFS[op]()
    return {"proven": proven, "refused": refused, "failures": failures, "bank_conflicts": count_conflicts()}


def wrong_copies() -> list[str]:
    """Which bfloat16 copies that adamw writes in its pass are not those of the weights it wrote."""
    sizes = [(70, 90), (5,), (4101,), (33,)]
    params = [torch.randn(size) for size in sizes]
    # Of the second no copy is kept; that of the last begins between two multiples of 16 bytes.
    copies = [torch.full((max(torch.Size(size).numel(), 1) + 1,), torch.nan, dtype=torch.bfloat16) for size in sizes]
    packed = [copy[: param.numel()].view(param.shape) for copy, param in zip(copies, params, strict=True)]
    packed[1] = torch.empty(0, dtype=torch.uint8)
    packed[3] = copies[3][1:]
    lists = [[torch.rand_like(param) for param in params] for _ in range(3)]
    steps = [torch.ones(()) for _ in params]
    before = [param.clone() for param in params]
    settings = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-8}
    with backend(adamw="cuda"):
        adamw(params, *lists, [], steps, packed=packed, **settings)
    wrong = []
    for index, (copy, param, old) in enumerate(zip(packed, params, before, strict=True)):
        if torch.equal(param, old) or (index != 1 and not torch.equal(copy, param.bfloat16())):
            wrong.append(f"the copy of tensor {index} is not that of its new values")
    ends = (copies[0][-1], copies[1][-1], copies[2][-1], copies[3][0])
    return wrong if all(end.isnan() for end in ends) else [*wrong, "memory beside a copy was written"]


def wrong_without_heads() -> list[str]:
    """A gradient of keys that no query has a head for must be zeros, and nothing may be launched for the queries."""
    q, k = torch.empty(2, 0, 4, 64, dtype=torch.bfloat16), torch.ones(2, 1, 70, 64, dtype=torch.bfloat16)
    o, lse = torch.ops.warploom_cuda.attention_fwd(q, k, k, True, 0.125)
    _, *of_keys = torch.ops.warploom_cuda.attention_bwd(q, q, k, k, o, lse, True, 0.125)
    return ["gradients without heads are not 0"] if any(gradient.any() for gradient in of_keys) else []


def wrong_without_columns() -> list[str]:
    x, rows = torch.empty(3, 0), torch.zeros(3)
    torch.ops.warploom_cuda.layer_norm_fwd(x, x[0], None, None, 1e-5)
    torch.ops.warploom_cuda.layer_norm_bwd(x, None, x, x[0], rows, rows)
    return []


def wrong_with_shifted_mask() -> list[str]:
    """A mask that begins at no multiple of 4 bytes, of which the kernel reads words."""
    x, weight, dy = (torch.randn(size, dtype=torch.bfloat16) for size in ((5, 16), (24, 16), (5, 24)))
    _, mask = torch.ops.warploom_cuda.linear_fwd(x, weight, None, None, "relu", True)
    shifted = torch.empty(mask.numel() + 1, dtype=torch.uint8)[1:].view(mask.shape).copy_(mask)
    options = ("relu", True, True, True)
    both = [torch.ops.warploom_cuda.linear_bwd(dy, x, weight, None, each, *options) for each in (mask, shifted)]
    equal = all(torch.equal(*pair) for pair in zip(*both, strict=True))
    return [] if equal and both[0][0].any() else ["gradients change with where the mask begins"]


# What no case of the op reaches.
OTHER_PROOFS = {
    "adamw": wrong_copies,
    "attention": wrong_without_heads,
    "layer_norm": wrong_without_columns,
    "linear": wrong_with_shifted_mask,
}


def main() -> None:
    for job in json.load(sys.stdin):
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            child = os.fork()
            if child == 0:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                print(json.dumps(proof_of(**job)), flush=True)
                os._exit(0)
            os.waitpid(child, 0)
            out.seek(0)
            err.seek(0)
            line = out.readline()
            print(json.dumps({"proof": json.loads(line)} if line else {"error": err.read()}), flush=True)


if __name__ == "__main__":
    main()
