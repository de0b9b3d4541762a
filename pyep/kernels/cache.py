"""Compiled kernels on disk: where they are and what names them."""
import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import marshal
import os
import pathlib
import platform
from types import FunctionType


def directory(machine):
    """The folder for one kind of machine ("cpu", "cuda"), made if need be; `PYEP_CACHE` moves it from ~/.cache/pyep."""
    root = pathlib.Path(os.environ.get("PYEP_CACHE") or pathlib.Path.home() / ".cache" / "pyep")
    folder = root / machine
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def _sources():
    """A hash of every source file of pyep and of the compilers' versions: helpers live in other files than their kernel."""
    root = pathlib.Path(__file__).parents[1]
    digest = hashlib.sha256(platform.python_version().encode())
    for file in sorted(root.rglob("*.py")):
        digest.update(file.read_bytes())
    for package in ("numba", "llvmlite", "numba-cuda", "nvidia-nvjitlink", "nvidia-nvvm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            digest.update(f"{package} {importlib.metadata.version(package)}".encode())
    return digest.digest()


def _code(fn, seen):
    """The code of a function and of the plain functions that it calls, as bytes: kernels may live outside of pyep too.

    In marshal's version 2: later ones write how often an object is referred to, which differs between processes.
    """
    if fn in seen:
        return b""
    seen.add(fn)
    called = (fn.__globals__.get(name) for name in fn.__code__.co_names)
    return marshal.dumps(fn.__code__, 2) + b"".join(_code(f, seen) for f in called if isinstance(f, FunctionType))


def key(fn, machine, constants):
    """The name of a compiled kernel: it changes with whatever the machine code depends on."""
    digest = hashlib.sha256(_sources() + _code(fn, set()))
    digest.update(repr((fn.__module__, fn.__qualname__, machine, sorted(constants.items()))).encode())
    return f"{fn.__name__}_{digest.hexdigest()[:24]}"


@contextlib.contextmanager
def one_at_a_time(folder, name):
    """One of a host's ranks compiles a kernel, the others wait here and find it on disk."""
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
