"""Prove ops on their CUDA C++ back end, run by the emulator. A program of its own, since AddressSanitizer must be
loaded before Python.

Standard input: a JSON list of jobs {"library", "op", "cases" (a pattern of their names), "seed"}. Each runs in a forked
process, since what is found ends it. Prints a line of JSON for each: {"proof"} or, where it did not come to one,
{"error"}.
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

sys.modules["warploom._C"] = None  # type: ignore[assignment]  # the library defines the same operators

import torch  # noqa: E402

from warploom.ops import REGISTRY  # noqa: E402
from warploom.ops._accuracy import Trial  # noqa: E402
from warploom.ops._op import BackendUnavailable  # noqa: E402
from warploom.ops._proof import Refuted, check_accuracy, check_writes_everything  # noqa: E402

warnings.simplefilter("error")


def proof_of(library: str, op: str, cases: str, seed: int) -> dict:
    os.environ["EMULATOR_SEED"] = str(seed)
    torch.ops.load_library(library)
    count_conflicts = ctypes.CDLL(library).emulator_bank_conflicts
    count_conflicts.restype = ctypes.c_long
    record = REGISTRY[op]
    record.backends["cuda"] = dataclasses.replace(record.backends["cuda"], devices=("cpu",), missing=lambda: None)
    proven, refused, failures = 0, 0, []
    for case in record.cases:
        for dtype in case.dtypes if re.search(cases, case.name) else ():
            trial = Trial(record, case, dtype)
            try:
                check_accuracy(record, "cuda", trial)
                # Its two runs have threads scheduled differently, so it shows too that results do not depend on that.
                check_writes_everything(record, "cuda", trial)
                proven += 1
            except BackendUnavailable:
                refused += 1
            except Refuted as failure:
                failures.append(f"{case.name}, {dtype}: {failure}")
    return {"proven": proven, "refused": refused, "failures": failures, "bank_conflicts": count_conflicts()}


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
