"""What runs inside the sandbox: locks this process in, runs one program, and says whether it came to its end.

Started by sandbox.py as a script of an isolated interpreter, on the standard library alone; it imports nothing else.
The first line of standard input is a secret, the rest the program. Whoever wants to be believed must write the secret
to the result pipe after the program: the program cannot, since neither frames nor memory of this process are open to
it.

Locks that must hold, or nothing is run: limits of the kernel, no new privileges, and for root another user or no
capabilities; an audit hook. Locks that are put on where the kernel allows: namespaces (network, processes, mounts,
IPC), a read-only file system, Landlock.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import types

_NOBODY = 65534
_CLONE = {"mount": 0x00020000, "uts": 0x04000000, "ipc": 0x08000000, "process": 0x20000000, "network": 0x40000000}
_CLONE_NEWUSER = 0x10000000
_MS_REC_PRIVATE = 0x4000 | (1 << 18)
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
# The same numbers on x86-64 and arm64.
_SYS_MOUNT_SETATTR, _SYS_LANDLOCK_CREATE, _SYS_LANDLOCK_ADD, _SYS_LANDLOCK_RESTRICT = 442, 444, 445, 446
_AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = -100, 0x8000, 1

_READABLE = tuple(
    {os.path.realpath(p) for p in (os.path.dirname(os.__file__), sys.base_prefix, sys.prefix, *sys.path) if p}
)
_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    result, cpu_s, memory_bytes = (int(word) for word in sys.argv[1:])
    with os.fdopen(0, "rb") as stream:
        secret = stream.readline()
        program = stream.read().decode("utf-8")
    for number in range(3):  # nothing to read, nowhere to print
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
    keep_only(result)
    try:
        entered = enter_namespaces()
        become_supervisor()
        locks = lock_down(cpu_s, memory_bytes, entered)
    except (OSError, ValueError) as error:
        os.write(result, json.dumps({"refused": f"{type(error).__name__}: {error}"}).encode() + b"\n")
        os._exit(3)
    os.write(result, json.dumps({"locks": locks}).encode() + b"\n")
    run(program, secret, result)


def run(program: str, secret: bytes, result: int) -> None:
    """Everything that is used after the program is looked up before it."""
    write, leave, dumps, kind, text = os.write, os._exit, json.dumps, type, str
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module  # in place of this file, whose names (libc among them) are not for the program
    sys.addaudithook(audit_hook())
    try:
        exec(compile(program, "candidate.py", "exec"), module.__dict__)
    except BaseException as error:  # SystemExit too: a program that leaves has not come to its end
        try:
            message = f"{kind(error).__name__}: {text(error)[:400]}"
        except BaseException:
            message = "an error that cannot be shown"
        write(result, dumps({"failed": message}).encode() + b"\n")
        leave(1)
    write(result, secret)
    leave(0)


def keep_only(result: int) -> None:
    for entry in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else map(str, range(3, 256)):
        if int(entry) > 2 and int(entry) != result:
            try:
                os.close(int(entry))
            except OSError:
                pass  # the one that listed them


def enter_namespaces() -> list[str]:
    """Leave the networks, processes and mounts of the system behind, as far as this kernel lets; say which."""
    user = [] if os.geteuid() == 0 else [_CLONE_NEWUSER]
    entered = []
    if not user or _libc.unshare(_CLONE_NEWUSER) == 0:
        entered = [name for name, flag in _CLONE.items() if _libc.unshare(flag) == 0]
    if "mount" in entered:
        _libc.mount(None, b"/", None, _MS_REC_PRIVATE, None)
        read_only = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY, 0, 0, 0)
        if _libc.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, read_only, 32) == 0:
            entered.append("read-only files")
    return entered


def become_supervisor() -> None:
    """Go on in a child, the first process of a new process namespace; this one waits for it and ends as it did."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def lock_down(cpu_s: int, memory_bytes: int, entered: list[str]) -> list[str]:
    """Put on the locks that must hold, and Landlock; return all that the kernel gave."""
    is_root = os.geteuid() == 0
    locks = list(entered)
    if is_root and all(map(is_open_to_all, _READABLE)):
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        locks.append("another user")
    # After the change of user, which takes it back: if the supervisor is killed, so is this process.
    for option, value in ((_PR_SET_PDEATHSIG, signal.SIGKILL), (_PR_SET_DUMPABLE, 0), (_PR_SET_NO_NEW_PRIVS, 1)):
        check(_libc.prctl(option, value, 0, 0, 0), f"prctl {option}")
    if landlock():
        locks.append("landlock")
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: cpu_s,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    if is_root and os.geteuid() == 0:
        # An interpreter in root's own folder can only be read by root: who stays root does so without its powers, and
        # not where its files could be written.
        if not {"landlock", "read-only files"} & set(locks):
            raise PermissionError(f"only root can read {_READABLE[0]}, and this kernel cannot protect root's files")
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        check(_libc.capset(header, none), "capset")
        locks.append("no capabilities")
    return locks


def is_open_to_all(folder: str) -> bool:
    """Whether any user can read the folder: the way to it can be walked, and it can be listed."""
    parts = folder.split("/")
    way = ["/".join(parts[:n]) or "/" for n in range(1, len(parts) + 1)]
    return all(os.stat(step).st_mode & 0o001 for step in way) and bool(os.stat(folder).st_mode & 0o004)


def check(failed: int, what: str) -> None:
    if failed:
        raise OSError(ctypes.get_errno(), what)


def landlock() -> bool:
    """Forbid this process all of the file system but reading the standard library, TCP, and signals to others."""
    version = _libc.syscall(_SYS_LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return False
    files = (1 << (13 if version == 1 else 14 if version == 2 else 15 if version < 5 else 16)) - 1
    rules = (ctypes.c_uint64 * 3)(files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = _libc.syscall(_SYS_LANDLOCK_CREATE, rules, size, 0)
    if ruleset < 0:
        return False
    for folder in (*_READABLE, "/lib", "/lib64", "/usr/lib", "/usr/share/zoneinfo"):
        if os.path.isdir(folder):
            parent = os.open(folder, os.O_PATH | os.O_CLOEXEC)
            rule = (1 << 2 | 1 << 3).to_bytes(8, sys.byteorder) + parent.to_bytes(4, sys.byteorder)
            check(_libc.syscall(_SYS_LANDLOCK_ADD, ruleset, 1, ctypes.create_string_buffer(rule, 12), 0), "rule")
            os.close(parent)
    check(_libc.syscall(_SYS_LANDLOCK_RESTRICT, ruleset, 0), "landlock")
    os.close(ruleset)
    return True


def audit_hook():
    """Deny what reaches out of the interpreter, or up its stack to the secret. A hook cannot be taken off again."""
    modules = {
        *("ctypes", "_ctypes", "cffi", "_cffi_backend", "mmap", "fcntl", "resource", "faulthandler", "pty", "termios"),
        *("subprocess", "_posixsubprocess", "multiprocessing", "_multiprocessing", "_posixshmem", "socket", "_socket"),
        *("_testcapi", "_testinternalcapi", "_xxsubinterpreters", "_interpreters", "_asyncio", "syslog", "sqlite3"),
    }
    for name in [name for name in sys.modules if name.split(".")[0] in modules]:
        del sys.modules[name]
    prefixes = (
        *("os.", "socket.", "subprocess.", "shutil.", "ctypes.", "mmap.", "fcntl.", "resource.", "pty.", "gc."),
        *("signal.", "syslog.", "sqlite3.", "tempfile.", "http.", "urllib.", "ftplib.", "smtplib.", "webbrowser."),
        *("sys._current", "sys.settrace", "sys.setprofile", "sys.addaudithook", "cpython.remote", "sys.remote_exec"),
        *("cpython._PySys_ClearAuditHooks", "cpython.PyInterpreterState", "code.__new__", "glob."),
    )
    frames = {"tb_frame", "gi_frame", "cr_frame", "ag_frame", "f_back"}
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    readable, listing, real = _READABLE, {"os.listdir", "os.scandir"}, os.path.realpath
    is_a, any_of = isinstance, any  # the program may put others in the place of builtins

    def is_readable(path) -> bool:
        if is_a(path, bytes):
            path = path.decode("utf-8", "replace")
        place = real(path) if is_a(path, str) else ""
        return any_of(place == folder or place.startswith(folder + "/") for folder in readable)

    def hook(event, arguments):
        if event == "import" and arguments[0].split(".")[0] in modules:
            raise ImportError(f"{arguments[0]} is not there in the sandbox")
        if event == "sys._getframe":
            raise ValueError("frames are not there in the sandbox")  # namedtuple and typing do without on this error
        if event == "object.__getattr__" and arguments[1] in frames:
            raise AttributeError(f"{arguments[1]} is not there in the sandbox")
        if event == "open":
            path, _, flags = arguments
            if flags & writing or not is_readable(path):
                raise PermissionError(f"opening {path!r:.80} is not allowed in the sandbox")
        elif event in listing:
            if not is_readable(arguments[0]):
                raise PermissionError(f"{event} is not allowed in the sandbox")
        elif event.startswith(prefixes):
            raise PermissionError(f"{event} is not allowed in the sandbox")

    return hook


if __name__ == "__main__":
    main()
