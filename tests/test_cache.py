"""Compiled kernels: what names them, on disk where they are found again, and in a process, which makes each of them once."""
import concurrent.futures
import errno
import gc
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import types
import weakref

import numba
import pytest
from test_lang import memory, who

from pyep.kernels import cache, cpu
from pyep.kernels.cpu import CpuKernel
from pyep.kernels.lang import st8
from pyep.kernels.op import CUDA, HELPERS, Cpu, bind, i64, op

pytestmark = pytest.mark.timeout(120, method="thread")           # as in test_lang


# ---- files -----------------------------------------------------------------------------------------------------------

VALUE = 0


def helper(x):
    return x + VALUE


def constant(out):
    """VALUE as the kernel sees it and as its helper does."""
    st8(out, VALUE)
    st8(out + 8, helper(1000))


def through_helper(out):
    st8(out, helper(1000))


def constant_of(value):
    """(what the kernel wrote, how often it was found on disk) with VALUE = value, as in a process that has not made it yet."""
    cpu.COMPILED.clear()
    kernel, out = CpuKernel(constant, 1, Cpu(1, 1), 0, dict(VALUE=value)), memory(2)
    kernel.launch(0, out.ctypes.data)
    return out.tolist(), sum(kernel.run.stats.cache_hits.values())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Of the disk cache: empty, its own, and what is in the process stays."""
    monkeypatch.setenv("PYEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu, "COMPILED", {})
    cache._warn.cache_clear()
    return tmp_path / "cache" / "cpu"


def test_cached_kernels_keep_their_constants_apart(folder):
    assert [constant_of(v) for v in (1, 2)] == [([1, 1001], 0), ([2, 1002], 0)]
    assert [constant_of(v) for v in (2, 1)] == [([2, 1002], 1), ([1, 1001], 1)]


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:100], lambda data: data[:-1] + bytes([data[-1] ^ 1])],
                         ids=["empty", "cut off", "a bit"])
def test_a_damaged_file_is_replaced(folder, damage):
    assert constant_of(1) == ([1, 1001], 0)
    file, = folder.glob("*.code")
    file.write_bytes(damage(file.read_bytes()))
    assert [constant_of(1) for _ in range(2)] == [([1, 1001], 0), ([1, 1001], 1)]


def fail_to_write(path, data):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_a_full_disk_is_said_once(folder, monkeypatch):
    """Kernels are compiled all the same; what was written of a file is not taken for it."""
    monkeypatch.setattr(pathlib.Path, "write_bytes", fail_to_write)
    with pytest.warns(RuntimeWarning, match="cannot be kept in .*No space left.*PYEP_CACHE") as warned:
        assert [constant_of(v) for v in (1, 2, 1)] == [([1, 1001], 0), ([2, 1002], 0), ([1, 1001], 0)]
    assert len(warned) == 1
    assert [file.suffix for file in folder.iterdir()] == [".lock", ".lock"]


def test_a_cache_that_cannot_be_written_is_read(folder, monkeypatch):
    """For instance one in a container's image."""
    def fail_to_open(path, mode):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
    assert constant_of(1) == ([1, 1001], 0)
    monkeypatch.setattr(cache, "open", fail_to_open, raising=False)
    monkeypatch.setattr(pathlib.Path, "write_bytes", fail_to_write)
    assert constant_of(1) == ([1, 1001], 1)


# Its pthread keys are other ones than here, and so is every address: cached machine code must hold neither.
ELSEWHERE = """
import ctypes
for _ in range(5):
    ctypes.CDLL(None).pthread_key_create(ctypes.byref(ctypes.c_uint()), None)
import test_lang
out = test_lang.memory(2, 8, 8)
kernel = test_lang.CpuKernel(test_lang.who, *test_lang.WIDE, 0, {})
kernel.launch(0, out.ctypes.data)
print(out[:, :, :6].sum(axis=(0, 1)).tolist(), sum(kernel.run.stats.cache_hits.values()))
"""


def test_cached_kernels_run_in_other_processes(tmp_path):
    folders = os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))
    environment = dict(os.environ, PYEP_CACHE=str(tmp_path), PYTHONPATH=os.pathsep.join(folders))
    lines = [subprocess.run([sys.executable, "-c", ELSEWHERE if again else ELSEWHERE.replace("range(5)", "range(0)")],
                            env=environment, capture_output=True, text=True, check=True).stdout.strip()
             for again in (False, True)]
    sums = "[56, 128, 8, 32, 24, 64]"
    assert lines == [f"{sums} 0", f"{sums} 1"]


# ---- names -----------------------------------------------------------------------------------------------------------

def test_helpers_of_different_kernels_have_different_names():
    """Machine code that is found on disk brings its helpers' symbols along; they must not be taken for those of another kernel."""
    def name_of(machine, **constants):
        return bind(constant, machine, **constants).__globals__["helper"].py_func.__qualname__
    names = [name_of(Cpu(1, 1), VALUE=1), name_of(Cpu(1, 1), VALUE=2), name_of(Cpu(8, 4), VALUE=1), name_of(Cpu(1, 1))]
    assert len(set(names)) == len(names) and all(name.startswith("helper_") for name in names)


def test_cache_keys():
    def key(fn=constant, machine=Cpu(1, 1), **constants):
        return cache.key(fn, machine, constants)
    assert key(VALUE=1, OTHER=2) == key(OTHER=2, VALUE=1)
    keys = [key(), key(who), key(machine=Cpu(8, 4)), key(machine=Cpu(8, 8)), key(VALUE=1), key(VALUE=2),
            key(through_helper, VALUE=1), key(through_helper, VALUE=2)]
    assert len(set(keys)) == len(keys)
    assert key(OTHER=1) == key()                                 # what a function does not name cannot change it
    assert all(k.isidentifier() for k in keys)


def adder(n, m=0):
    def add(x, step=m):
        return x + n + step
    return add


add_1, add_2, add_1_and_1, add_1_again = adder(1), adder(2), adder(1, 1), adder(1)
SCALE = 3


def scaled(x):
    return x * SCALE


def two_adders(out):
    """Its helpers have the same code and the same name."""
    st8(out, add_1(10))
    st8(out + 8, add_2(10))


def test_cache_keys_see_what_functions_refer_to(monkeypatch):
    """What a helper has captured, its defaults, and the plain values that it reads from its module."""
    keys = [cache.key(fn, Cpu(1, 1), {}) for fn in (add_1, add_2, add_1_and_1, scaled)]
    assert len(set(keys)) == len(keys) and cache.key(add_1_again, Cpu(1, 1), {}) == keys[0]
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 4)
    assert cache.key(scaled, Cpu(1, 1), {}) != keys[-1]


KERNEL = """
import {settings}
from pyep.kernels.lang import st8


def kernel(out):
    st8(out, helper(1000))


def helper(x):
    return x + {settings}.VALUE
"""


def key_of_file(folder, text, **names):
    """The key of the function `kernel` of a module whose source is in a folder; names: what its globals are besides."""
    folder.mkdir()
    (folder / "own.py").write_text(text)
    module = dict(__name__="own", **names)
    exec(compile(text, str(folder / "own.py"), "exec"), module)
    return cache.key(module["kernel"], Cpu(1, 1), {})


def test_cache_keys_do_not_tell_where_a_source_lies(tmp_path, monkeypatch):
    """In which folder, and below which line; but what it says, and what it takes from other modules."""
    settings = types.ModuleType("settings_of_a_test")
    settings.VALUE = 1
    monkeypatch.setitem(sys.modules, settings.__name__, settings)
    text = KERNEL.format(settings=settings.__name__)
    first = key_of_file(tmp_path / "one", text)
    assert key_of_file(tmp_path / "two", text) == key_of_file(tmp_path / "three", "# moved\n\n" + text) == first
    settings.VALUE = 2
    keys = [first, key_of_file(tmp_path / "four", text), key_of_file(tmp_path / "five", text.replace("x +", "x -")),
            key_of_file(tmp_path / "six", text.replace("1000", "1001"))]
    assert len(set(keys)) == len(keys)


def test_cache_keys_see_functions_of_numba():
    def key(function):
        st8_of = numba.njit(function)
        return cache.key(lambda out: st8_of(out), Cpu(1, 1), {})
    assert key(lambda x: x + 1) != key(lambda x: x + 2)


SAME_KEYS = """
import pyep
from pyep.kernels import cache, op
from pyep.kernels.low_latency_dispatch import dispatch
print(pyep.__file__, cache.key(dispatch, op.Cpu(1, 1), dict(TOPK=8)), cache.key(dispatch, op.CUDA, dict(TOPK=8)))
"""


def test_a_copy_of_the_package_finds_what_another_has_compiled(tmp_path):
    """As in a fresh checkout; but not once a kernel or the engine is another."""
    def keys_of(place):
        done = subprocess.run([sys.executable, "-c", SAME_KEYS], env=dict(os.environ, PYTHONPATH=str(place)), cwd=place,
                              capture_output=True, text=True, check=True)
        where, *keys = done.stdout.split()
        assert pathlib.Path(where).parents[1] == place
        return keys
    here, there = pathlib.Path(__file__).resolve().parents[1], tmp_path / "checkout"
    shutil.copytree(here / "pyep", there / "pyep", ignore=shutil.ignore_patterns("__pycache__"))
    assert keys_of(there) == keys_of(here)
    with open(there / "pyep" / "kernels" / "quantize.py", "a") as file:
        file.write("# another\n")
    assert not set(keys_of(there)) & set(keys_of(here))


def test_cache_keys_see_how_ops_are_declared():
    def key(**options):
        fence = op(**options)(adder)
        return cache.key(lambda: fence(), CUDA, {})
    keys = {key(ptx="membar.sys;"), key(ptx="membar.gl;"), key(ptx="membar.gl;", pure=True), key(ptx="membar.gl;", args=(i64,))}
    assert len(keys) == 4


def test_helpers_of_one_factory_are_kept_apart():
    out = memory(2)
    CpuKernel(two_adders, 1, Cpu(1, 1), 0, {}).launch(0, out.ctypes.data)
    assert out.tolist() == [11, 12]


# ---- folders ---------------------------------------------------------------------------------------------------------

def test_cache_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("PYEP_CACHE", str(tmp_path / "elsewhere"))
    assert cache.directory("cpu") == tmp_path / "elsewhere" / "cpu" and cache.directory("cpu").is_dir()
    monkeypatch.delenv("PYEP_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.directory("cuda") == tmp_path / "home" / ".cache" / "pyep" / "cuda"


@pytest.fixture
def homeless(tmp_path, monkeypatch):
    """A user whose home is a file; returns the folder for temporary files."""
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("PYEP_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_without_a_home_the_cache_is_private_and_temporary(homeless):
    folder = cache.directory("cpu")
    assert folder == homeless / f"pyep-{os.getuid()}" / "cpu" == cache.directory("cpu")
    assert folder.is_dir() and folder.parent.stat().st_mode & 0o777 == 0o700


def give_to_another(folder, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    folder.rename(folder.with_name("pyep-4242"))


def replace_by_a_link(folder, monkeypatch):
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))


@pytest.mark.parametrize("change", [lambda folder, _: folder.chmod(0o770), lambda folder, _: folder.chmod(0o705), give_to_another,
                                    replace_by_a_link], ids=["group", "others", "owner", "link"])
def test_a_temporary_folder_that_others_may_write_is_refused(homeless, monkeypatch, change):
    """Machine code from it would be run."""
    folder = homeless / f"pyep-{os.getuid()}"
    folder.mkdir(0o700)
    change(folder, monkeypatch)
    with pytest.raises(ValueError, match="not a folder that only this user can enter.*PYEP_CACHE"):
        cache.directory("cpu")


def test_a_cache_that_cannot_be_made(homeless, monkeypatch):
    monkeypatch.setenv("PYEP_CACHE", str(homeless / "file" / "cache"))
    with pytest.raises(ValueError, match="PYEP_CACHE is .*file/cache.*Not a directory"):
        cache.directory("cpu")


# ---- what a process has compiled -------------------------------------------------------------------------------------

def test_a_kernel_is_compiled_once_in_a_process(folder):
    """Whoever asks, and for as many blocks as may be; nor are its helpers made again."""
    first, known = CpuKernel(constant, 1, Cpu(1, 1), 0, dict(VALUE=3)), set(HELPERS)
    assert CpuKernel(constant, 2, Cpu(1, 1), 64, dict(VALUE=3)).run is first.run
    assert set(HELPERS) == known
    assert CpuKernel(constant, 1, Cpu(1, 1), 0, dict(VALUE=4)).run is not first.run
    assert len(cpu.COMPILED) == 2


def test_threads_compile_one_after_another(folder, monkeypatch):
    """Four threads that want two kernels get the two."""
    running, most, bind_alone = [], [], cpu.bind

    def counted(*args, **constants):
        running.append(1)
        most.append(len(running))
        time.sleep(0.05)
        running.pop()
        return bind_alone(*args, **constants)
    monkeypatch.setattr(cpu, "bind", counted)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        kernels = list(pool.map(lambda value: CpuKernel(constant, 1, Cpu(1, 1), 0, dict(VALUE=value)), [1, 2, 1, 2]))
    assert most == [1, 1]
    assert kernels[0].run is kernels[2].run is not kernels[1].run is kernels[3].run


def test_what_a_kernel_needs_on_the_cpu_goes_with_it():
    """Contexts and barriers are its own."""
    kernel = CpuKernel(constant, 2, Cpu(8, 4), 64, dict(VALUE=1))
    owned = [weakref.ref(c) for c in kernel._contexts]
    assert len(owned) == 16
    del kernel
    gc.collect()
    assert [ref() for ref in owned] == [None] * 16
