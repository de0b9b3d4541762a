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
from numbers import Number
from types import FunctionType

PLAIN = Number, str, bytes, type(None)


def directory(machine):
    """The folder for one kind of machine ("cpu", "cuda"), made if need be; `PYEP_CACHE` moves it from ~/.cache/pyep."""
    root = pathlib.Path(os.environ.get("PYEP_CACHE") or pathlib.Path.home() / ".cache" / "pyep")
    folder = root / machine
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def _sources():
    """A hash of the compilers' versions and of the folders that kernels and their engines are in: helpers live in other files than
    their kernel.  The rest of pyep is no part of any machine code but by the template parameters."""
    root = pathlib.Path(__file__).parents[1]
    digest = hashlib.sha256(platform.python_version().encode())
    for file in sorted([*(root / "kernels").rglob("*.py"), *(root / "channels").rglob("*.py")]):
        digest.update(file.read_bytes())
    for package in ("numba", "llvmlite", "numba-cuda", "nvidia-nvjitlink", "nvidia-nvvm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            digest.update(f"{package} {importlib.metadata.version(package)}".encode())
    return digest.digest()


def _meaning(value, seen):
    """What a value that a kernel refers to contributes to its machine code, as bytes: the code of functions and whatever they refer
    to in turn, since kernels may live outside of pyep too; the declarations of ops; plain values; nothing of modules and the like.

    Code in marshal's version 2: later ones write how often an object is referred to, which differs between processes.
    """
    if isinstance(value, FunctionType):
        if value in seen:
            return b""
        seen.add(value)
        code, names = value.__code__, value.__globals__
        captured = tuple(cell.cell_contents for cell in value.__closure__ or ())
        used = tuple(names[name] for name in code.co_names if name in names)
        return marshal.dumps(code, 2) + _meaning((value.__defaults__, captured, used), seen)
    if isinstance(value, tuple):
        return b"(%s)" % b",".join(_meaning(item, seen) for item in value)
    if hasattr(value, "declaration"):                            # an op
        return _meaning(value.declaration, seen)
    return repr(value).encode() if isinstance(value, PLAIN) else b""


def key(fn, machine, constants):
    """The name of a compiled kernel: it changes with whatever the machine code depends on."""
    digest = hashlib.sha256(_sources() + _meaning(fn, set()))
    digest.update(repr((fn.__module__, fn.__qualname__, machine, sorted(constants.items()))).encode())
    return f"{fn.__name__}_{digest.hexdigest()[:24]}"


@contextlib.contextmanager
def one_at_a_time(folder, name):
    """One of a host's ranks compiles a kernel, the others wait here and find it on disk."""
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
