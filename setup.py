"""Builds warploom._C out of csrc/ with ninja, and records in _build.json what was built or why nothing was.

setuptools' own builder cannot do it: every csrc/cpu/*.cpp is compiled once per instruction-set level, and the level is
chosen on the machine that runs it (csrc/common/levels.h). Everything else about the package is in pyproject.toml.
"""

import fcntl
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
PYTHON_INCLUDE = sysconfig.get_path("include")
# Lowest first. The order and the names are those of csrc/common/levels.h.
X86_AVX512 = "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl"
LEVELS = {
    "x86_64": {
        "portable": "",
        "avx2": "-mavx2 -mfma -mf16c",
        "avx512": X86_AVX512,
        "avx512_bf16": f"{X86_AVX512} -mavx512bf16",
        "amx": f"{X86_AVX512} -mavx512bf16 -mamx-tile -mamx-bf16",
    },
    "aarch64": {"portable": "", "neon_bf16": "-march=armv8.2-a+bf16"},
}
# Sanitizers and the like: objects of different flags get folders of their own, so that neither rebuilds the other.
CXXFLAGS, LDFLAGS = os.environ.get("CXXFLAGS", ""), os.environ.get("LDFLAGS", "")
FLAVOUR = f"-{zlib.crc32((CXXFLAGS + LDFLAGS).encode()):08x}" if CXXFLAGS or LDFLAGS else ""
# No contraction: where a product may stay unrounded is the kernels' decision, and then it is the same at every level.
# GCC 12 calls the undefined vectors inside its own intrinsics uninitialized.
COMMON_FLAGS = "-O3 -g0 -fPIC -fopenmp -fvisibility=hidden -fno-math-errno -ffp-contract=off"
COMMON_FLAGS += " -Wall -Wextra -Wno-maybe-uninitialized"


class CannotBuild(Exception):
    """What the machine lacks, with the way to get it. A compile error is not this: it fails the install."""


def find_compiler():
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(name)[0]):
            return name
    raise CannotBuild(
        f"no C++ compiler found ({wanted or 'c++, g++, clang++'}); on Debian: apt-get install g++, then install again"
    )


def compiles(compiler, flags, code="int main() { return 0; }", link=False):
    """Return None if the compiler takes these flags and this code, else its first line of complaint."""
    command = [*shlex.split(compiler), *shlex.split(flags), "-Werror", "-x", "c++", "-", "-o", os.devnull]
    result = subprocess.run(command if link else [*command, "-c"], input=code, capture_output=True, text=True)
    return None if result.returncode == 0 else (result.stderr.strip() or "it failed without a message").splitlines()[0]


def probe_levels(compiler, machine):
    """Return {level: flags} of those the compiler can do and {level: complaint} of those it cannot."""
    known = LEVELS.get(machine, {"portable": ""})
    complaints = {level: compiles(compiler, flags) for level, flags in known.items()}
    left_out = {level: complaint for level, complaint in complaints.items() if complaint}
    return {level: flags for level, flags in known.items() if level not in left_out}, left_out


def torch_flags():
    """Return the flags to compile and to link against the installed torch."""
    if importlib.util.find_spec("torch") is None:
        raise CannotBuild("torch is not installed where the build runs; install it first, then --no-build-isolation")
    from torch.utils import cpp_extension

    includes = " ".join(f"-isystem {shlex.quote(path)}" for path in cpp_extension.include_paths())
    folders = " ".join(f"-L{shlex.quote(path)}" for path in cpp_extension.library_paths())
    return f"-std=c++20 {includes}", f"{folders} -ltorch_cpu -lc10"


def write_ninja(build_dir, compiler, levels, compile_with_torch, link_with_torch):
    """Write build.ninja: each kernel once per level, everything else once, one shared object."""
    csrc = Path(os.path.relpath(ROOT / "csrc", build_dir))  # relative: the checkout's own path may hold spaces
    every_level = " ".join(f"X({level},Table,name)" for level in levels)
    lines = [
        "rule cxx",
        f"  command = {compiler} {COMMON_FLAGS} -I{csrc} '-DWARPLOOM_EACH_LEVEL(X,Table,name)={every_level}' "
        f"{CXXFLAGS} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        f"  command = {compiler} -shared -fopenmp $in {LDFLAGS} {link_with_torch} -o $out",
        "  description = $out",
    ]
    objects = []

    def add(pattern, flags, suffix=""):
        for source in sorted((ROOT / "csrc").glob(pattern)):
            path = source.relative_to(ROOT / "csrc")
            objects.append(f"{path.with_suffix('')}{suffix}.o")
            lines.extend([f"build {objects[-1]}: cxx {csrc / path}", f"  flags = {flags}"])

    for level, flags in levels.items():
        add("cpu/*.cpp", f"-std=c++17 {flags} -DWARPLOOM_LEVEL={level} -DWARPLOOM_LEVEL_{level}=1", f".{level}")
    add("common/*.cpp", "-std=c++17")
    add("bindings/*.cpp", compile_with_torch)
    add("module.cpp", f"-isystem {shlex.quote(PYTHON_INCLUDE)}")
    lines.append(f"build _C.so: link {' '.join(objects)}\n")
    build_dir.joinpath("build.ninja").write_text("\n".join(lines), encoding="utf-8")


class BuildExtension(build_ext):
    def run(self):
        target = Path(self.get_ext_fullpath("warploom._C"))
        target.parent.mkdir(parents=True, exist_ok=True)
        record = {"built": False, "reason": None, "levels": [], "left_out": {}, "compiler": None, "torch": None}
        try:
            self.build(target, record)
        except CannotBuild as missing:
            record["reason"] = str(missing)
            target.unlink(missing_ok=True)  # one of an earlier build would hide that this one is without
            self.extensions = []
            print(f"warploom is installed without its compiled kernels: {missing}", file=sys.stderr)
        target.with_name("_build.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def build(self, target, record):
        if os.environ.get("WARPLOOM_NO_EXTENSION") == "1":
            raise CannotBuild("WARPLOOM_NO_EXTENSION=1 was set when it was installed")
        compiler = find_compiler()
        record["compiler"] = subprocess.check_output([*shlex.split(compiler), "--version"], text=True).splitlines()[0]
        flags_of_torch = torch_flags()
        record["torch"] = importlib.metadata.version("torch")
        if compiles(compiler, f"-I{shlex.quote(PYTHON_INCLUDE)}", "#include <Python.h>\n"):
            raise CannotBuild(f"Python.h is not in {PYTHON_INCLUDE}; on Debian: apt-get install python3-dev")
        if compiles(compiler, "-fopenmp", "#include <omp.h>\nint main() { omp_get_max_threads(); }", link=True):
            raise CannotBuild(f"{compiler} has no OpenMP; on Debian: apt-get install g++ (or libomp-dev for clang)")
        levels, record["left_out"] = probe_levels(compiler, platform.machine())
        build_dir = ROOT / "build" / f"{platform.machine()}-{sys.implementation.cache_tag}{FLAVOUR}"
        build_dir.mkdir(parents=True, exist_ok=True)
        with open(build_dir / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # ninja does not guard its folder against a second install
            write_ninja(build_dir, compiler, levels, *flags_of_torch)
            ninja = [sys.executable, "-m", "ninja", "-C", str(build_dir)]
            if subprocess.call(ninja) != 0:
                raise SystemExit("warploom: compiling csrc/ failed; the compiler's message is above")
            # Renamed into place: processes that have the old one mapped keep it.
            shutil.copy(build_dir / "_C.so", target.with_name("_C.so.new"))
            os.replace(target.with_name("_C.so.new"), target)
        record.update(built=True, levels=list(levels))


if __name__ == "__main__":
    setup(ext_modules=[Extension("warploom._C", sources=[])], cmdclass={"build_ext": BuildExtension})
