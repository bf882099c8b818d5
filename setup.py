"""Builds warploom._C out of csrc/ with ninja, and records in _build.json what was built or why nothing was.

setuptools' own builder cannot do it: every csrc/cpu/*.cpp is compiled once per instruction-set level, and the level is
chosen on the machine that runs it (csrc/common/levels.h); every csrc/cuda/*.cu is compiled by nvcc, where there is one,
once per GPU architecture. Everything else about the package is in pyproject.toml.
"""

import fcntl
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
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
# Oldest first; the PTX of the last is what newer GPUs compile for themselves. 90a: with the instructions of H100 alone.
CUDA_ARCHS = ("80", "86", "89", "90a", "100", "120")
CUDA_FOLDERS = ("/usr/local/cuda/bin",)  # searched after the PATH
CUDA_FLAGS = "-std=c++17 -O3 -Werror all-warnings --resource-usage -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra"
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


def torch_names_streams():
    """Whether the installed torch can tell the CUDA stream on which work is queued (csrc/bindings/stream.h)."""
    from torch.utils import cpp_extension

    headers = (Path(folder) / "c10" / "core" / "Stream.h" for folder in cpp_extension.include_paths())
    return any("native_handle" in header.read_text(encoding="utf-8") for header in headers if header.exists())


def find_cuda(compiler):
    """Return nvcc, the flags to link with its library, its version, and the architectures to build for.

    Raises CannotBuild, which here leaves out the GPU's part alone.
    """
    wanted = os.environ.get("WARPLOOM_CUDA_ARCHS", "").replace(",", " ").split()
    if wanted == ["none"]:
        raise CannotBuild("WARPLOOM_CUDA_ARCHS=none was set when it was installed")
    unknown = [arch for arch in wanted if arch not in CUDA_ARCHS]
    if unknown:
        known = " ".join(CUDA_ARCHS)
        raise SystemExit(f"WARPLOOM_CUDA_ARCHS must be none or some of {known}, got {' '.join(unknown)}")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(CUDA_FOLDERS))
    if nvcc is None:
        raise CannotBuild("no nvcc found; put that of a CUDA toolkit on the PATH, then install again")
    listed = subprocess.check_output([nvcc, "--list-gpu-arch"], text=True)
    asked = [arch for arch in CUDA_ARCHS if arch in (wanted or CUDA_ARCHS)]
    archs = [arch for arch in asked if f"compute_{arch.rstrip('a')}\n" in listed]
    if not archs:
        raise CannotBuild(f"{nvcc} knows none of the architectures {' '.join(asked)}")
    probe = [nvcc, "-ccbin", compiler, *shlex.split(CUDA_FLAGS), "-shared", "-x", "cu", "-", "-o", os.devnull]
    result = subprocess.run(probe, input="__global__ void kernel() {}\n", capture_output=True, text=True)
    if result.returncode != 0:
        complaint = (result.stderr.strip() or "it failed without a message").splitlines()[0]
        raise CannotBuild(f"{nvcc} does not work with {compiler}: {complaint}")
    if not torch_names_streams():
        raise CannotBuild(
            "this torch has no c10::Stream::native_handle, which 2.11 and later have; upgrade torch, then install again"
        )
    version = re.search(r"release \S+, V(\S+)", subprocess.check_output([nvcc, "--version"], text=True))[1]
    plan = subprocess.run([*probe, "--dryrun"], capture_output=True, text=True).stderr
    link = re.search(r"LIBRARIES=(.*)", plan)[1] + " -lcudart_static -ldl -lrt -lpthread"
    return nvcc, link, version, archs


def read_resources(report):
    """Yield what ptxas --resource-usage says of each kernel."""
    pattern = (
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    for name, arch, stack, stores, loads, registers in re.findall(pattern, report, re.DOTALL):
        yield {
            "kernel": name,
            "arch": arch,
            "registers": int(registers),
            "stack_bytes": int(stack),
            "spill_bytes": int(stores) + int(loads),
        }


def write_ninja(build_dir, compiler, levels, nvcc, archs, compile_with_torch, link_flags):
    """Write build.ninja: each kernel once per level or architecture, everything else once, one shared object."""
    csrc = Path(os.path.relpath(ROOT / "csrc", build_dir))  # relative: the checkout's own path may hold spaces
    every_level = " ".join(f"X({level},Table,name)" for level in levels)
    lines = [
        "rule cxx",
        f"  command = {compiler} {COMMON_FLAGS} -I{csrc} '-DWARPLOOM_EACH_LEVEL(X,Table,name)={every_level}' "
        f"{CXXFLAGS} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        # ptxas' report is kept beside the object: _build.json shows it.
        "rule nvcc",
        f"  command = {nvcc} -ccbin {compiler} {CUDA_FLAGS} -I{csrc} $flags -MMD -MF $out.d -c $in -o $out "
        "> $out.log 2>&1 || { cat $out.log; exit 1; }",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        f"  command = {compiler} -shared -fopenmp $in {LDFLAGS} {link_flags} -o $out",
        "  description = $out",
    ]
    objects = []

    def add(pattern, flags, suffix="", rule="cxx"):
        for source in sorted((ROOT / "csrc").glob(pattern)):
            path = source.relative_to(ROOT / "csrc")
            if path.stem.endswith("_cuda") and not archs:
                continue
            objects.append(f"{path.with_suffix('')}{suffix}.o")
            lines.extend([f"build {objects[-1]}: {rule} {csrc / path}", f"  flags = {flags}"])

    for level, flags in levels.items():
        add("cpu/*.cpp", f"-std=c++17 {flags} -DWARPLOOM_LEVEL={level} -DWARPLOOM_LEVEL_{level}=1", f".{level}")
    add("common/*.cpp", "-std=c++17")
    add("bindings/*.cpp", compile_with_torch)
    add("module.cpp", f"-isystem {shlex.quote(PYTHON_INCLUDE)}")
    if archs:
        targets = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs]
        targets.append(f"-gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        add("cuda/*.cu", " ".join(targets), ".cuda", rule="nvcc")
        add("cuda/*.cpp", "-std=c++17")
    lines.append(f"build _C.so: link {' '.join(objects)}\n")
    build_dir.joinpath("build.ninja").write_text("\n".join(lines), encoding="utf-8")


class BuildExtension(build_ext):
    def run(self):
        target = Path(self.get_ext_fullpath("warploom._C"))
        target.parent.mkdir(parents=True, exist_ok=True)
        record = {"built": False, "reason": None, "levels": [], "left_out": {}, "compiler": None, "torch": None}
        record["cuda"] = {"reason": None, "archs": [], "nvcc": None, "kernels": []}
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
        compile_with_torch, link_flags = torch_flags()
        record["torch"] = importlib.metadata.version("torch")
        if compiles(compiler, f"-I{shlex.quote(PYTHON_INCLUDE)}", "#include <Python.h>\n"):
            raise CannotBuild(f"Python.h is not in {PYTHON_INCLUDE}; on Debian: apt-get install python3-dev")
        if compiles(compiler, "-fopenmp", "#include <omp.h>\nint main() { omp_get_max_threads(); }", link=True):
            raise CannotBuild(f"{compiler} has no OpenMP; on Debian: apt-get install g++ (or libomp-dev for clang)")
        levels, record["left_out"] = probe_levels(compiler, platform.machine())
        nvcc = None
        cuda = record["cuda"]
        try:
            nvcc, link_with_cuda, cuda["nvcc"], cuda["archs"] = find_cuda(compiler)
            link_flags = f"{link_flags} {link_with_cuda}"
        except CannotBuild as missing:
            cuda["reason"] = str(missing)
            print(f"warploom is built without its CUDA kernels: {missing}", file=sys.stderr)
        build_dir = ROOT / "build" / f"{platform.machine()}-{sys.implementation.cache_tag}{FLAVOUR}"
        build_dir.mkdir(parents=True, exist_ok=True)
        with open(build_dir / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # ninja does not guard its folder against a second install
            write_ninja(build_dir, compiler, levels, nvcc, cuda["archs"], compile_with_torch, link_flags)
            ninja = [sys.executable, "-m", "ninja", "-C", str(build_dir)]
            if subprocess.call(ninja) != 0:
                raise SystemExit("warploom: compiling csrc/ failed; the compiler's message is above")
            # Renamed into place: processes that have the old one mapped keep it.
            shutil.copy(build_dir / "_C.so", target.with_name("_C.so.new"))
            os.replace(target.with_name("_C.so.new"), target)
            for log in sorted(build_dir.glob("cuda/*.log")) if nvcc else ():
                cuda["kernels"].extend(read_resources(log.read_text(encoding="utf-8")))
        record.update(built=True, levels=list(levels))


if __name__ == "__main__":
    setup(ext_modules=[Extension("warploom._C", sources=[])], cmdclass={"build_ext": BuildExtension})
