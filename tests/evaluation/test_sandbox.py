"""What a program in the sandbox cannot do, and that honest programs can do what they need.

Every escape is run outside first where that is harmless, so that it is known to work without the sandbox.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from warploom.errors import UserError
from warploom.evaluation import sandbox
from warploom.evaluation.sandbox import run_program, run_programs

HONEST = """
import collections, dataclasses, heapq, itertools, math, random, re, statistics, string, hashlib, json
from typing import Dict, List, NamedTuple, Optional, Tuple
class P(NamedTuple):
    x: int = 1
Q = collections.namedtuple("Q", "a b")
@dataclasses.dataclass
class R:
    y: int = 2
def f(xs: List[int]) -> Optional[int]:
    return sorted(xs, key=lambda v: -v)[0] if xs else None
def check(candidate):
    assert candidate([1, 3, 2]) == 3
    assert (P().x, R().y, Q(1, 2).b) == (1, 2, 2)
    assert hashlib.md5(b"hello").hexdigest().startswith("5d41")
    try:
        1 / 0
    except ZeroDivisionError as error:
        assert str(error)
check(f)
print("printed to nowhere")
"""

# Each must not come to its end. {outside} is a file of the test, {folder} the one it lies in.
ESCAPES = {
    "leaves early": "import os; os._exit(0)",
    "leaves politely": "import sys; sys.exit(0)",
    "raises SystemExit": "raise SystemExit(0)",
    "reads a file": "open({outside!r}).read()",
    "reads a file by its descriptor": "import os; os.read(os.open({outside!r}, os.O_RDONLY), 9)",
    "reads the passwords": "open('/etc/passwd').read()",
    "reads a file as code": "import runpy; runpy.run_path({outside!r})",
    "reads its environment's files": "open('/proc/self/environ').read()",
    "reads its memory": "open('/proc/self/mem', 'rb').read(1)",
    "lists a folder": "import os; os.listdir({folder!r})",
    "writes a file": "open({new!r}, 'w').write('x')",
    "writes into its folder": "open('x', 'w').write('x')",
    "appends to a file": "open({outside!r}, 'a').write('x')",
    "removes a file": "import os; os.remove({outside!r})",
    "renames a file": "import os; os.rename({outside!r}, {new!r})",
    "makes a folder": "import os; os.mkdir({new!r})",
    "links a file": "import os; os.symlink({outside!r}, {new!r})",
    "changes rights": "import os; os.chmod({outside!r}, 0o777)",
    "cuts a file": "import os; os.truncate({outside!r}, 0)",
    "removes a tree": "import shutil; shutil.rmtree({folder!r})",
    "shell": "import os; assert os.system('true') == 0",
    "starts a program": "import subprocess; subprocess.run(['true'], check=True)",
    "starts a program, low": "import _posixsubprocess",
    "becomes a program": "import os; os.execv('/bin/true', ['true'])",
    "spawns a program": "import os; os.posix_spawn('/bin/true', ['true'], {{}})",
    "forks": "import os; os.fork() or os._exit(0)",
    "forks, by another name": "import posix; posix.fork() or posix._exit(0)",
    "starts processes": "import multiprocessing; multiprocessing.Process(target=int).start()",
    "opens a socket": "import socket; socket.socket()",
    "opens a socket, low": "import _socket; _socket.socket()",
    "fetches a page": "import urllib.request; urllib.request.urlopen('http://127.0.0.1:1')",
    "calls C": "import ctypes; ctypes.CDLL(None).getpid()",
    "calls C, low": "import _ctypes",
    "finds the C library in its parent module": "import __main__; __main__._libc.getpid()",
    "kills its parent": "import os; os.kill(os.getppid(), 9)",
    "kills its group": "import os; os.killpg(0, 9)",
    "raises its limits": "import resource; resource.setrlimit(resource.RLIMIT_NPROC, (99, 99))",
    "takes all memory": "x = bytearray(1 << 34)",
    "takes all memory, in pieces": "x = []\nwhile True: x.append('y' * 10**7)",
    "looks up the stack": "import sys; sys._getframe(1).f_locals",
    "looks up a traceback": "try:\n    1 / 0\nexcept Exception as e:\n    e.__traceback__.tb_frame.f_back.f_locals",
    "looks up a generator": "g = (g.gi_frame.f_back.f_locals for _ in [1])\nnext(g)",
    "looks through memory": "import gc; gc.get_objects()",
    "traces": "import sys; sys.settrace(lambda *a: None)",
    "traces in a thread": "import threading, sys; sys.setprofile(lambda *a: None)",
    "replaces builtins": "import builtins; builtins.any = lambda x: True; open({outside!r}).read()",
    "replaces path functions": "import os; os.path.realpath = lambda p: os.__file__; open({outside!r}, 'w')",
    "maps memory": "import mmap; mmap.mmap(-1, 4096)",
    "recurses": "def f(): return f()\nf()",
    "aborts": "import os; os.abort()",
}


@pytest.fixture
def places(tmp_path):
    outside = tmp_path / "outside.py"
    outside.write_text("secret = 1")
    # Open to all: what keeps the program out shall be the sandbox and not the rights of the file.
    tmp_path.chmod(0o777)
    outside.chmod(0o666)
    return {"outside": str(outside), "new": str(tmp_path / "new"), "folder": str(tmp_path)}


@pytest.mark.parametrize("name", ESCAPES)
def test_escapes_are_blocked(name, places):
    outcome = run_program(ESCAPES[name].format(**places), timeout_s=2)
    assert outcome.status != "passed"
    assert Path(places["outside"]).read_text() == "secret = 1" and not os.path.exists(places["new"])


def test_the_escapes_are_no_nonsense(places):
    """Without the sandbox the harmless ones among them come to their end."""
    harmless = [
        *(
            "reads a file",
            "reads the passwords",
            "reads a file by its descriptor",
            "lists a folder",
            "reads a file as code",
        ),
        *("shell", "starts a program", "calls C", "looks through memory", "opens a socket", "looks up a traceback"),
    ]
    for name in harmless:
        program = ESCAPES[name].format(**places)
        if name == "looks up a traceback":
            program = f"def f():\n    {program.replace(chr(10), chr(10) + '    ')}\nf()"
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_honest_programs_pass():
    outcome = run_program(HONEST)
    assert outcome.status == "passed", outcome.message
    outcome = run_program(HONEST + "\nassert f([]) == 1, 'of nothing'")
    assert (outcome.status, outcome.message) == ("failed", "AssertionError: of nothing")
    assert run_program("def f(:").message.startswith("SyntaxError")


def test_endless_programs_are_stopped():
    started = time.monotonic()
    programs = [
        "while True: pass",
        "import time; time.sleep(1000)",
        "try:\n    while True: pass\nfinally:\n    while True: pass",
    ]
    outcomes = list(run_programs(programs, workers=3, timeout_s=1))
    assert [outcome.status for outcome in outcomes] == ["timed out"] * 3
    assert time.monotonic() - started < 200  # of 1000: a bound that tells stopped from not


def test_time_in_which_the_machine_stands_still_does_not_count(monkeypatch):
    """The clock that waits are measured by jumps while the program runs, as it does for a process that was stopped."""
    calls = 0

    def jumping():
        nonlocal calls
        calls += 1
        return time.monotonic() + (1000 if calls > 3 else 0)

    monkeypatch.setattr(subprocess, "_time", jumping)
    assert run_program("import time; time.sleep(0.3)", timeout_s=1).status == "passed"
    assert calls > 3


def test_a_pass_cannot_be_forged():
    """Whatever a program writes to whatever is open, and however it leaves, it has not come to its end."""
    forgery = """
import os
for fd in range(64):
    for line in (b'passed\\n', b'\\n', b'{"locks": []}\\n'):
        try:
            os.write(fd, line)
        except OSError:
            pass
os._exit(0)
"""
    assert run_program(forgery).status == "failed"


def test_no_process_is_left():
    before = set(os.listdir("/proc")) if os.path.isdir("/proc") else pytest.skip("needs /proc")
    run_program("import os, time\nos.setsid()\ntime.sleep(1000)", timeout_s=1)

    def left():
        pids = set(os.listdir("/proc")) - before
        return [pid for pid in pids if pid.isdigit() and b"sandbox_child" in _command_line(pid)]

    patience = time.monotonic() + 30  # the kill is sent when run_program returns; a busy kernel takes a while over it
    while left() and time.monotonic() < patience:
        time.sleep(0.05)
    assert left() == []


def _command_line(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b""


def test_it_fails_closed(tmp_path, monkeypatch):
    """A lock that must hold and does not: nothing is run, and that is an error."""
    mark = tmp_path / "ran"
    source = sandbox._CHILD.read_text(encoding="utf-8")
    broken = tmp_path / "child.py"
    for before, after in (
        ("resource.setrlimit(limit, (value, value))", "raise OSError('no such limit')"),
        ("locks = lock_down", "raise RuntimeError\n        locks = lock_down"),
    ):
        assert before in source
        broken.write_text(source.replace(before, after))
        monkeypatch.setattr(sandbox, "_CHILD", broken)
        with pytest.raises(UserError, match="the sandbox cannot be locked.*no code was run"):
            run_program(f"open({str(mark)!r}, 'w')")
    assert not mark.exists()


def test_the_isolation_is_told():
    outcome = run_program("pass")
    assert "audit hook" in outcome.isolation and all(lock in outcome.isolation for lock in outcome.locks)
