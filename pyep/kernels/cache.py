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
import stat
import tempfile
import threading
import warnings
from numbers import Number
from types import CodeType, FunctionType, ModuleType

PLAIN = Number, str, bytes, type(None)
DIGEST = hashlib.sha256().digest_size           # bytes
LOCK = threading.RLock()                        # one thread compiles at a time: some of what is set for Numba is set for all


# ---- files -----------------------------------------------------------------------------------------------------------

def directory(machine):
    """The folder for one kind of machine ("cpu", "cuda"), made if need be: in `PYEP_CACHE`, else in ~/.cache/pyep, or where that
    cannot be written in a private folder for temporary files.  ValueError if no folder can be made."""
    chosen = os.environ.get("PYEP_CACHE")
    try:
        folder = pathlib.Path(chosen or pathlib.Path.home() / ".cache" / "pyep") / machine
        folder.mkdir(parents=True, exist_ok=True)
        if chosen or os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError) as error:                     # RuntimeError: there is no home
        if chosen:
            raise ValueError(f"PYEP_CACHE is {chosen!r}, and no folder for compiled kernels can be made there: {error}") from None
    folder = _temporary() / machine
    folder.mkdir(exist_ok=True)
    return folder


def _temporary():
    """A folder that is this user's alone: machine code from it is run."""
    folder = pathlib.Path(tempfile.gettempdir()) / f"pyep-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise OSError(f"{folder} is not a folder that only this user can enter")
    except OSError as error:
        raise ValueError(f"there is no folder for compiled kernels: the home cannot be written, and {error}. Set PYEP_CACHE to a "
                         "folder that can be written") from None
    return folder


class File:
    """A file of a compiled kernel: its bytes behind their hash, by which a damaged file is known."""

    def __init__(self, machine, name):
        self._path = directory(machine) / name

    @contextlib.contextmanager
    def locked(self):
        """One of a host's ranks compiles a kernel, the others wait here and find it on disk."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):                   # a folder that cannot be written, or where nothing can be locked
                lock = stack.enter_context(open(self._path.with_suffix(".lock"), "w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def read(self):
        """The bytes that were written; None if there are none, or others."""
        try:
            data = self._path.read_bytes()
        except OSError:
            return None
        digest, data = data[:DIGEST], data[DIGEST:]
        return data if hashlib.sha256(data).digest() == digest else None

    def write(self, data):
        """Whole or not at all, also if this process is killed or the disk is full; then the kernel is compiled again next time."""
        partial = self._path.with_suffix(f".{os.getpid()}")
        try:
            partial.write_bytes(hashlib.sha256(data).digest() + data)
            partial.rename(self._path)
        except OSError as error:
            _warn(f"compiled kernels cannot be kept in {self._path.parent}, so every process compiles them anew: {error.strerror}. "
                  "Set PYEP_CACHE to a folder that can be written")
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


@functools.cache
def _warn(text):
    """Once, however many kernels there are."""
    warnings.warn(text, RuntimeWarning, stacklevel=2)


# ---- names -----------------------------------------------------------------------------------------------------------

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


@functools.cache
def global_names(fn):
    """The global names that a function and the plain functions that it calls use."""
    names = fn.__code__.co_names
    called = (fn.__globals__.get(name) for name in names)
    return set(names).union(*(global_names(f) for f in called if isinstance(f, FunctionType)))


@functools.cache
def _instructions(code):
    """A code object as bytes: all of it but where its source lies, which no machine code depends on.  So copies of a program share
    what they have compiled, wherever they are.

    In marshal's version 2: later ones write how often an object is referred to, which differs between processes.
    """
    return marshal.dumps(_without_place(code), 2)


def _without_place(code):
    constants = tuple(_without_place(c) if isinstance(c, CodeType) else c for c in code.co_consts)
    return code.replace(co_filename="", co_firstlineno=1, co_linetable=b"", co_consts=constants)


def _meaning(value, seen):
    """What a value that a kernel refers to contributes to its machine code, as bytes: the code of functions (also of Numba's) and
    whatever they refer to in turn, since kernels may live outside of pyep too; what they use of modules; the declarations of ops;
    plain values; nothing of anything else."""
    value = getattr(value, "py_func", value)
    if isinstance(value, FunctionType):
        if value in seen:
            return b""
        seen.add(value)
        code, names = value.__code__, value.__globals__
        captured = tuple(cell.cell_contents for cell in value.__closure__ or ())
        used = tuple(names[name] for name in code.co_names if name in names)
        of_modules = tuple(vars(m)[name] for m in used if isinstance(m, ModuleType) for name in code.co_names if name in vars(m))
        return _instructions(code) + _meaning((value.__defaults__, captured, used, of_modules), seen)
    if isinstance(value, tuple):
        return b"(%s)" % b",".join(_meaning(item, seen) for item in value)
    if hasattr(value, "declaration"):                            # an op
        return _meaning(value.declaration, seen)
    return repr(value).encode() if isinstance(value, PLAIN) else b""


def key(fn, machine, constants):
    """The name of a compiled kernel or helper: it changes with whatever the machine code depends on, and of the constants that is
    those that the function, or one that it calls, names."""
    digest = hashlib.sha256(_sources() + _meaning(fn, set()))
    used = sorted((name, constants[name]) for name in global_names(fn) & constants.keys())
    digest.update(repr((fn.__module__, fn.__qualname__, machine, used)).encode())
    return f"{fn.__name__}_{digest.hexdigest()[:24]}"
