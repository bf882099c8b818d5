"""Builds warploom._C out of csrc/ with ninja, and records in _build.json what was built or why nothing was.

setuptools' own builder cannot do it: every csrc/cpu/*.cpp is compiled once per instruction-set level, and the level is
chosen on the machine that runs it (csrc/common/levels.h). Everything else about the package is in pyproject.toml.
"""

import fcntl
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
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
NAMES_OF_MACHINES = {"AMD64": "x86_64", "arm64": "aarch64"}
COMMON_FLAGS = "-O3 -g0 -fPIC -fopenmp -fvisibility=hidden -fno-math-errno -ffp-contract=off -Wall -Wextra -Wno-maybe-uninitialized"


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


def torch_paths():
    if importlib.util.find_spec("torch") is None:
        raise CannotBuild("torch is not installed where the build runs; install it first, then --no-build-isolation")
    from torch.utils import cpp_extension

    return cpp_extension.include_paths(), cpp_extension.library_paths()


def write_ninja(build_dir, compiler, levels, includes, libraries):
    """Write build.ninja: per level each kernel, once everything else, one shared object."""
    import torch

    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    every_level = " ".join(f"X({level},Table,name)" for level in levels)
    cxxflags = f"{COMMON_FLAGS} {abi} -I{ROOT}/csrc '-DWARPLOOM_EACH_LEVEL(X,Table,name)={every_level}'"
    torch_flags = "-std=c++20 " + " ".join(f"-isystem {shlex.quote(path)}" for path in includes)
    lines = [
        f"cxx = {compiler}",
        f"cxxflags = {cxxflags} {os.environ.get('CXXFLAGS', '')}",
        f"ldflags = -shared -fopenmp {os.environ.get('LDFLAGS', '')}",
        "rule cxx",
        "  command = $cxx $cxxflags $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        # libgomp comes from torch's own folder at run time, whose copy is loaded already: one pool of threads.
        "  command = $cxx $in $ldflags $libs -o $out",
        "  description = $out",
    ]
    objects = []

    def compile_line(source, flags, suffix=""):
        objects.append(f"{source.relative_to(ROOT / 'csrc').with_suffix('')}{suffix}.o")
        lines.extend([f"build {objects[-1]}: cxx {source}", f"  flags = {flags}"])

    csrc = ROOT / "csrc"
    for source in sorted(csrc.glob("cpu/*.cpp")):
        for level, flags in levels.items():
            compile_line(source, f"-std=c++17 {flags} -DWARPLOOM_LEVEL={level} -DWARPLOOM_LEVEL_{level}=1", f".{level}")
    for source in sorted(csrc.glob("common/*.cpp")):
        compile_line(source, "-std=c++17")
    for source in [*sorted(csrc.glob("bindings/*.cpp")), csrc / "module.cpp"]:
        compile_line(source, torch_flags)
    libs = " ".join([*(f"-L{shlex.quote(path)}" for path in libraries), "-ltorch_cpu -ltorch -lc10"])
    lines.extend([f"build _C.so: link {' '.join(objects)}", f"  libs = {libs}", ""])
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
        machine = NAMES_OF_MACHINES.get(platform.machine(), platform.machine())
        compiler = find_compiler()
        record["compiler"] = subprocess.check_output([*shlex.split(compiler), "--version"], text=True).splitlines()[0]
        includes, libraries = torch_paths()
        record["torch"] = importlib.metadata.version("torch")
        python_include = sysconfig.get_path("include")
        if compiles(compiler, f"-I{shlex.quote(python_include)}", "#include <Python.h>\n"):
            raise CannotBuild(f"Python.h is not in {python_include}; on Debian: apt-get install python3-dev")
        if compiles(compiler, "-fopenmp", "#include <omp.h>\nint main() { return omp_get_max_threads() < 0; }", link=True):
            raise CannotBuild(f"{compiler} has no OpenMP; on Debian: apt-get install g++ (or libomp-dev for clang)")
        levels = {}
        for level, flags in LEVELS.get(machine, {"portable": ""}).items():
            complaint = compiles(compiler, flags)
            if complaint:
                record["left_out"][level] = complaint
            else:
                levels[level] = flags
        build_dir = ROOT / "build" / f"{machine}-{sys.implementation.cache_tag}"
        build_dir.mkdir(parents=True, exist_ok=True)
        with open(build_dir / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # ninja does not guard its folder against a second install
            write_ninja(build_dir, compiler, levels, [*includes, python_include], libraries)
            ninja = [sys.executable, "-m", "ninja", "-C", str(build_dir)]
            if subprocess.call(ninja) != 0:
                raise SystemExit("warploom: compiling csrc/ failed; the compiler's message is above")
            # Renamed into place: processes that have the old one mapped keep it.
            shutil.copy(build_dir / "_C.so", target.with_name("_C.so.new"))
            os.replace(target.with_name("_C.so.new"), target)
        record.update(built=True, levels=list(levels))


setup(ext_modules=[Extension("warploom._C", sources=[])], cmdclass={"build_ext": BuildExtension})
