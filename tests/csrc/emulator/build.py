"""Compiles csrc/cuda and its bindings for the emulator: a library of torch operators on CPU tensors.

Objects are kept in build/emulator under a hash of all that goes into them.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[3]
EMULATOR = Path(__file__).resolve().parent
FOLDER = ROOT / "build" / "emulator"
CXX = os.environ.get("CXX", "g++")
SANITIZE = "-fsanitize=address --param asan-instrumentation-with-call-threshold=0"
FLAGS = f"-fPIC -fvisibility=hidden -I{shlex.quote(str(EMULATOR))} -I{shlex.quote(str(ROOT / 'csrc'))}"


def missing() -> str | None:
    """Say what the emulator lacks on this machine, None if it can be built."""
    if os.uname().machine != "x86_64":
        return "the emulator's fibres are written for x86-64"
    if shutil.which(CXX) is None or not Path(_library("libasan.so")).is_absolute():
        return f"no {CXX} with AddressSanitizer"
    return None


def build(changed: Mapping[str, str] | None = None) -> Path:
    """Return the library. changed: the text to take for some files of csrc/cuda, by name, in place of their own."""
    changed = changed or {}
    FOLDER.mkdir(parents=True, exist_ok=True)
    torch_flags = " ".join(f"-isystem {shlex.quote(path)}" for path in cpp_extension.include_paths())
    bindings = sorted((ROOT / "csrc" / "bindings").glob("*_cuda.cpp"))
    objects = [
        # One compilation of torch's headers serves all bindings.
        _compile(
            "bindings.cpp", "\n".join(f'#include "{path}"\n' for path in bindings), f"-O0 -std=c++20 {torch_flags}"
        ),
        *(
            _compile(f"{stem}.cpp", (EMULATOR / f"{stem}.cpp").read_text(encoding="utf-8"), "-O2 -std=c++17")
            for stem in ("scheduler", "races")
        ),
    ]
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.c[up]*")):
        if source.suffix in (".cu", ".cpp"):
            text = changed.get(source.name) or source.read_text(encoding="utf-8")
            flags = f"-O1 -g1 -std=c++17 -Wall -Wno-unknown-pragmas -Werror {SANITIZE}"
            objects.append(_compile(f"{source.name}.cpp", text, flags))
    folders = " ".join(f"-L{shlex.quote(path)}" for path in cpp_extension.library_paths())
    name = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:16]
    library = FOLDER / f"emulated-{name}.so"
    if not library.exists():
        _run(f"{CXX} -shared {shlex.join(map(str, objects))} {folders} -ltorch_cpu -lc10", library)
    return library


def build_cublaslt() -> Path:
    """Return the library that takes the place of NVIDIA's."""
    text = (EMULATOR / "fake_cublaslt.cpp").read_text(encoding="utf-8")
    built = _compile("fake_cublaslt.cpp", text, f"-O1 -g1 -std=c++17 -Wall -Werror {SANITIZE}")
    library = built.with_suffix(".so")
    if not library.exists():
        _run(f"{CXX} -shared {shlex.quote(str(built))}", library)
    return library


def environment() -> dict[str, str]:
    """For the process that loads the library: AddressSanitizer must be there from its start."""
    preload = " ".join(map(_library, ("libasan.so", "libstdc++.so")))
    options = "detect_leaks=0:detect_stack_use_after_return=0"
    return {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": options}


def _library(name: str) -> str:
    return subprocess.check_output([CXX, f"-print-file-name={name}"], text=True).strip()


def _compile(name: str, text: str, flags: str) -> Path:
    command = f"{CXX} {FLAGS} {flags} -c"
    headers = sorted(
        path
        for folder in (ROOT / "csrc", EMULATOR)
        for path in folder.rglob("*")
        if path.suffix in (".h", ".cuh") or path.name.endswith("_cuda.cpp")
    )
    digest = hashlib.sha256("\0".join([command, text, *(p.read_text(encoding="utf-8") for p in headers)]).encode())
    source = FOLDER / f"{digest.hexdigest()[:16]}-{name}"
    target = source.with_suffix(".o")
    if not target.exists():
        source.write_text(text, encoding="utf-8")
        _run(f"{command} {shlex.quote(str(source))}", target)
    return target


def _run(command: str, target: Path) -> None:
    """Tests in several processes may build at once: each writes a file of its own and renames it."""
    mine = target.with_name(f"{os.getpid()}-{target.name}")
    done = subprocess.run([*shlex.split(command), "-o", str(mine)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command}\n{done.stderr}")
    mine.replace(target)
