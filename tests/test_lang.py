"""Every op of the kernel language on the CPU engine, against Python and NumPy.

A kernel below gathers what several ops do in an output array, and runs in a narrow shape (one thread) and in wide ones;
those that only compute or copy also run on a GPU, where the tests are meant to use one.
"""
import functools
import time
from types import FunctionType
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16, float8_e4m3fn

from pyep import layout, reference
from pyep.channels.memory import LAST_EPOCH, next_epoch, previous_epoch, reached
from pyep.kernels import lang
from pyep.kernels.cpu import CpuEngine, CpuKernel
from pyep.kernels.lang import (absence, absent, add4, add4_shared, add8, add8_release, amax8, ballot, bits_of, block_rank, clock_ns,
                               div, f32_of, fetch_add8, fetch_add8_relaxed, fma8, lane, ld1_nc_if, ld4_nc, ld4_nc_if,
                               ld4_relaxed_if, ld4_shared, ld8, ld8_acquire, ld8_constant, ld8_if, ld8_nc, ld8_nc_if, ld8_relaxed,
                               ld8_relaxed_if, ld8_shared, ld16, ld16_if, ld16_nc, ld16_nc_if, ld16_relaxed, ld16_relaxed_if,
                               lowest_bit, next_kernel_may_start, num_blocks, num_threads, pause, polls_per_look, popc, prefetch,
                               present, previous_kernel_done, reserved, shared, shfl, shfl_xor, st1, st4, st4_relaxed, st4_shared,
                               st8, st8_after_kernels, st8_relaxed, st8_release, st8_shared, st16, st16_relaxed, st16_release,
                               swap8_if, syncthreads, syncthreads_or, syncwarp,
                               thread_rank, to_bf16, to_e4m3, udiv, umod, warp_size, zeros)
from pyep.kernels.op import Cpu, Op

# Machine code that waits for ever cannot be interrupted; the process can be ended.
pytestmark = pytest.mark.timeout(120, method="thread")

OPS = {name: value for name, value in vars(lang).items() if isinstance(value, Op)}
MASK32, MASK64 = 2**32 - 1, 2**64 - 1
FAR = 2**55                                         # from any memory: no CPU and no GPU has addresses that high
PATIENCE = 20 * 10**9                               # ns after which a waiting kernel of this file gives up


class Gpu(NamedTuple):
    """A GPU as a machine of this file."""

    threads: int = 64
    warp: int = 32


# Shapes: (blocks, machine).
NARROW, NARROW_PAIR, WIDE, ODD = (1, Cpu(1, 1)), (2, Cpu(1, 1)), (2, Cpu(8, 4)), (3, Cpu(6, 2))
FULL_WARP = (1, Cpu(32, 32))
ON_GPU = (2, Gpu())


def shapes(*chosen):
    """Run a test in each of these shapes."""
    def case(shape):
        blocks, (threads, warp) = shape
        if shape is ON_GPU:
            return pytest.param(shape, id="gpu", marks=pytest.mark.gpu)
        return pytest.param(shape, id=f"{blocks},{threads},{warp}")
    return pytest.mark.parametrize("shape", [case(shape) for shape in chosen])


one_or_many = shapes(NARROW, WIDE)
everywhere = shapes(NARROW, WIDE, ON_GPU)


# ---- how kernels are run ---------------------------------------------------------------------------------------------

@functools.cache
def compiled(kernel, blocks, machine, shared_bytes):
    if isinstance(machine, Gpu):
        from pyep.kernels.cuda import CudaEngine
        return CudaEngine(0).kernel(kernel, blocks, machine.threads, shared_bytes)
    return CpuKernel(kernel, blocks, machine, shared_bytes, {})


def run(kernel, shape, *args, shared_bytes=0):
    """Run a kernel to its end; an array among the arguments is passed as its address, on a GPU as that of its copy there."""
    launch = compiled(kernel, *shape, shared_bytes).launch
    if shape is not ON_GPU:
        launch(0, *[a.ctypes.data if isinstance(a, np.ndarray) else a for a in args])
        return
    import cupy
    copies = [cupy.asarray(a) if isinstance(a, np.ndarray) else a for a in args]
    launch(0, *[a.data.ptr if isinstance(a, cupy.ndarray) else a for a in copies])
    for array, copy in zip(args, copies):
        if isinstance(array, np.ndarray):
            array[...] = copy.get()


def threads_of(shape):
    blocks, machine = shape
    return blocks * machine.threads


def memory(*dims, dtype=np.int64, fill=0):
    """An array that begins on a 128-byte line: 16-byte accesses need alignment, which NumPy does not promise."""
    nbytes = int(np.prod(dims)) * np.dtype(dtype).itemsize
    raw = np.empty(nbytes + 128, np.uint8)
    start = -raw.ctypes.data % 128
    array = raw[start:start + nbytes].view(dtype).reshape(dims)
    array[...] = fill
    return array


def filled(values, dtype=np.int64):
    """The values in aligned memory."""
    values = np.asarray(values, dtype)
    return memory(*values.shape, dtype=dtype, fill=values)


def random_words(seed, *dims):
    return filled(np.random.default_rng(seed).integers(0, 2**64, dims, np.uint64).view(np.int64))


def my_thread():
    return block_rank() * num_threads() + thread_rank()


def all_threads():
    return num_blocks() * num_threads()


def wait_for(address, goal, until):
    """Wait until a counter is `goal` or more, but not for ever: a broken op shall fail its test, not hang it."""
    while ld8_acquire(address) < goal and clock_ns() < until:
        pause(1)


# ---- who am I --------------------------------------------------------------------------------------------------------

def who(out):
    """Eight words a thread."""
    prefetch(out)
    at = out + 64 * my_thread()
    st8(at, thread_rank())
    st8(at + 8, num_threads())
    st8(at + 16, block_rank())
    st8(at + 24, num_blocks())
    st8(at + 32, lane())
    st8(at + 40, warp_size())
    st8(at + 48, shared())


@shapes(NARROW, NARROW_PAIR, WIDE, ODD, FULL_WARP)
def test_ranks_and_sizes(shape):
    blocks, (threads, warp) = shape
    out = memory(blocks, threads, 8)
    run(who, shape, out)
    for block, thread in np.ndindex(blocks, threads):
        assert out[block, thread, :6].tolist() == [thread, threads, block, blocks, thread % warp, warp]
    bases = out[:, :, 6]
    assert (bases == bases[:, :1]).all() and len(set(bases[:, 0].tolist())) == blocks


# ---- arithmetic ------------------------------------------------------------------------------------------------------

def integers(x, y, bits, n, out):
    """Four words an entry: x // y, x % y, how many of the bits are set, the lowest of them."""
    i = my_thread()
    while i < n:
        at = out + 32 * i
        st8(at, udiv(ld8(x + 8 * i), ld8(y + 8 * i)))
        st8(at + 8, umod(ld8(x + 8 * i), ld8(y + 8 * i)))
        st8(at + 16, popc(ld8(bits + 8 * i)))
        st8(at + 24, lowest_bit(ld8(bits + 8 * i)))
        i += all_threads()


def lowest(bits):
    """The index of the lowest bit that is set, of 64."""
    return (bits & -bits).bit_length() - 1 if bits else 64


NATURAL = st.integers(0, 2**32 - 1) | st.integers(0, 300)
WORD = st.integers(-2**63, 2**63 - 1) | st.integers(0, 63).map(lambda k: (1 << k) - (1 << 64) * (k == 63))


@everywhere
@given(st.lists(st.tuples(NATURAL, NATURAL.map(lambda y: max(y, 1)), WORD), min_size=1, max_size=40))
@example([(0, 1, 0), (2**32 - 1, 1, -1), (2**32 - 1, 2**32 - 1, -2**63), (6, 7, 1)])
@settings(max_examples=60)
def test_integers(shape, entries):
    x, y, bits = (filled(column) for column in zip(*entries))
    out = memory(len(entries), 4)
    run(integers, shape, x, y, bits, len(entries), out)
    assert out.tolist() == [[a // b, a % b, (c & MASK64).bit_count(), lowest(c & MASK64)] for a, b, c in entries]


# ---- memory ----------------------------------------------------------------------------------------------------------

def widths(source, target):
    """Each thread copies 256 bytes with accesses of every width and order."""
    a, b = source + 256 * my_thread(), target + 256 * my_thread()
    st8(b, ld8(a))
    st8(b + 8, ld8_nc(a + 8))
    st8(b + 16, ld4_nc(a + 16))                     # extended with its sign
    st8(b + 24, ld4_nc(a + 20))
    st4(b + 36, ld8(a + 32))                        # cut down; leaves the words beside it alone
    st4(b + 40, ld8(a + 40))
    st8_relaxed(b + 48, ld8_relaxed(a + 48))
    st8_release(b + 56, ld8_acquire(a + 56))
    st16(b + 64, ld16(a + 64))
    st16(b + 80, ld16_nc(a + 80))
    st16(b + 96, ld16_relaxed(a + 96))
    st16_relaxed(b + 112, ld16(a + 112))
    st4_relaxed(b + 132, ld8(a + 128))              # like st4
    st1(b + 146, ld8(a + 144))                      # cut down too
    st8(b + 152, ld4_relaxed_if(a + 148, 1))
    st8(b + 160, ld4_relaxed_if(1, 0))              # no such address
    st8(b + 168, ld8_constant(a + 168))
    st8_after_kernels(b + 176, ld8(a + 176))


@everywhere
def test_widths(shape):
    for seed in range(20):
        source, target = random_words(seed, threads_of(shape), 32), memory(threads_of(shape), 32, fill=-7)
        expected = target.copy()
        halves, words = source.view(np.int32), expected.view(np.int32)
        expected[:, :2] = source[:, :2]
        expected[:, 2:4] = halves[:, 4:6]           # int32 into int64
        words[:, 9], words[:, 10] = halves[:, 8], halves[:, 10]
        expected[:, 6:16] = source[:, 6:16]
        words[:, 33] = halves[:, 32]
        expected.view(np.uint8)[:, 146] = source.view(np.uint8)[:, 144]
        expected[:, 19], expected[:, 20], expected[:, 21:23] = source.view(np.uint32)[:, 37], 0, source[:, 21:23]
        run(widths, shape, source, target)
        np.testing.assert_array_equal(target, expected)


def wanted_rows(rows, offsets, wanted, n, out):
    """What is at each offset that is wanted, by every load that can be told not to; twelve words an entry."""
    i = my_thread()
    while i < n:
        address, want, at = rows + ld8(offsets + 8 * i), ld8(wanted + 8 * i), out + 96 * i
        st16(at, ld16_relaxed_if(address, want))
        st16(at + 16, ld16_nc_if(address, want))
        st8(at + 32, ld8_relaxed_if(address, want))
        st8(at + 40, ld8_nc_if(address, want))
        st8(at + 48, ld4_nc_if(address, want))
        st8(at + 56, ld1_nc_if(address + 2, want))
        st16(at + 64, ld16_if(address, want))
        st8(at + 80, ld8_if(address, want))
        i += all_threads()


@everywhere
def test_unwanted_memory_is_not_touched(shape):
    for seed in range(20):
        wanted = filled([0, 1, 0, -1, 2**32, 2**63 - 1, 0, -2**63])    # also where the low half is 0
        rows, out = random_words(seed, len(wanted), 2), memory(len(wanted), 12, fill=5)
        offsets = filled(np.where(wanted, 16 * np.arange(len(wanted)), FAR))
        run(wanted_rows, shape, rows, offsets, wanted, len(wanted), out)
        signed = rows.view(np.int32)[:, :1]
        there = np.concatenate([rows, rows, rows[:, :1], rows[:, :1], signed, rows.view(np.uint8)[:, 2:3]], axis=1)
        np.testing.assert_array_equal(out[:, :8], np.where(wanted[:, None] != 0, there, 0))
        np.testing.assert_array_equal(out[:, 8:10], np.where(wanted[:, None] != 0, rows, 0))
        np.testing.assert_array_equal(out[:, 10], np.where(wanted != 0, rows[:, 0], 0))


# ---- memory that several threads write -------------------------------------------------------------------------------

def start_together(gate):
    """OS threads start one after another; the first ones would be done before the last ones begin."""
    add8_release(gate, 1)
    wait_for(gate, all_threads(), clock_ns() + PATIENCE)


def count_up(counters, n, value, seen, seen_relaxed):
    """Every thread adds `value` to two counters n times and notes what was there, and adds once to each of the others."""
    start_together(counters + 256)
    i = 0
    while i < n:
        st8(seen + 8 * (n * my_thread() + i), fetch_add8(counters, value))
        st8(seen_relaxed + 8 * (n * my_thread() + i), fetch_add8_relaxed(counters + 640, value))
        i += 1
    add8_release(counters + 128, value * (1 + my_thread()))
    add8(counters + 384, value * (1 + my_thread()))
    add4(counters + 516, value * (1 + my_thread()))                     # an upper half


@pytest.mark.parametrize("value", [1, -3, 2**60])
@shapes(NARROW, WIDE, ODD)
def test_adds_of_many_threads(shape, value):
    threads, n = threads_of(shape), 5000
    counters, seen, seen_relaxed = memory(6, 16), memory(threads, n), memory(threads, n)
    run(count_up, shape, counters, n, value, seen, seen_relaxed)
    once = value * threads * (threads + 1) // 2
    sums = [value * threads * n, once, threads, once, once << 32, value * threads * n]
    assert counters[:, 0].view(np.uint64).tolist() == [total & MASK64 for total in sums]
    assert not counters[:, 1:].any()
    if abs(value) < 2**32:                          # no overflow: distinct values, in order on each thread
        for noted in seen, seen_relaxed:
            np.testing.assert_array_equal(np.sort(noted // value, axis=None), np.arange(threads * n))
            assert (np.diff(noted // value) > 0).all()


def elect(gate, words, n, seen):
    """Every thread tries to be the first at each of n words, then swaps against a value that is never there."""
    start_together(gate)
    i = 0
    while i < n:
        st8(seen + 8 * (n * my_thread() + i), swap8_if(words + 8 * i, 0, 1 + my_thread()))
        i += 1
    st8(seen + 8 * (n * all_threads() + my_thread()), swap8_if(words + 8 * n, -5, 1 + my_thread()))


@shapes(NARROW, WIDE, ODD)
def test_swap_has_one_winner(shape):
    threads, n = threads_of(shape), 200
    words, seen = memory(n + 1), memory(threads * (n + 1))
    words[n] = 77
    run(elect, shape, memory(1), words, n, seen)
    by_thread = seen[:threads * n].reshape(threads, n)
    winners = words[:n]
    assert ((by_thread == 0).sum(axis=0) == 1).all()
    np.testing.assert_array_equal(by_thread.argmin(axis=0) + 1, winners)
    assert ((by_thread == 0) | (by_thread == winners)).all()            # the losers see who won
    assert words[n] == 77 and (seen[threads * n:] == 77).all()          # nobody expected what was there


def count_by_swaps(counter, n):
    """Every thread adds 1 to a counter n times; an add is lost unless comparing and swapping are one."""
    start_together(counter + 128)
    i = 0
    while i < n:
        seen = ld8_relaxed(counter)
        while swap8_if(counter, seen, seen + 1) != seen:
            seen = ld8_relaxed(counter)
        i += 1


@shapes(NARROW, WIDE, ODD)
def test_swaps_are_atomic(shape):
    counter, n = memory(32), 20_000
    run(count_by_swaps, shape, counter, n)
    assert counter[0] == n * threads_of(shape)


def play(box, n, got):
    """Block 0 sends n messages, block 1 reads each and answers: data, then a release that an acquire waits for."""
    flag, answer = box + 128, box + 256
    until = clock_ns() + PATIENCE
    i = 1
    while i <= n and thread_rank() == 0:
        if block_rank() == 0:
            st8(box, 3 * i)
            st8_release(flag, i)
            wait_for(answer, i, until)
        if block_rank() == 1:
            wait_for(flag, i, until)
            st8(got + 8 * (i - 1), ld8(box))
            add8_release(answer, 1)
        i += 1


@shapes(NARROW_PAIR, WIDE)
def test_release_and_acquire_carry_data(shape):
    box, got = memory(48), memory(300)
    run(play, shape, box, len(got), got)
    np.testing.assert_array_equal(got, 3 * np.arange(1, len(got) + 1))


def play_pairs(box, n, got):
    """As `play`, but what announces the data is a pair of words, whose first tells something too."""
    pair, answer = box + 128, box + 256
    until = clock_ns() + PATIENCE
    i = 1
    while i <= n and thread_rank() == 0:
        if block_rank() == 0:
            st8(box, 3 * i)
            st16_release(pair, 5 * i, i)
            wait_for(answer, i, until)
        if block_rank() == 1:
            wait_for(pair + 8, i, until)
            st8(got + 16 * (i - 1), ld8(box))
            st8(got + 16 * (i - 1) + 8, ld8(pair))
            add8_release(answer, 1)
        i += 1


@shapes(NARROW_PAIR, WIDE)
def test_release_of_two_words(shape):
    box, got = memory(48), memory(300, 2)
    run(play_pairs, shape, box, len(got), got)
    np.testing.assert_array_equal(got, np.arange(1, len(got) + 1)[:, None] * [3, 5])


def play_rows(rows, n, got):
    """Block 0 sends n rows into slots where nothing has arrived; block 1 takes each out once all of it is there."""
    until = clock_ns() + PATIENCE
    i = 0
    while i < n and thread_rank() == 0:
        slot = rows + 16 * (i & 1)
        if block_rank() == 0:
            while absent(ld16_relaxed(slot)) == 0 and clock_ns() < until:
                pause(1)
            st16(rows + 128, absence())
            st8(rows + 128, i)
            st16_relaxed(slot, present(ld16(rows + 128)))
        if block_rank() == 1:
            value = ld16_relaxed(slot)
            while absent(value) != 0 and clock_ns() < until:
                pause(1)
                value = ld16_relaxed(slot)
            st16(got + 16 * i, value)
            st16_relaxed(slot, absence())
        i += 1


@shapes(NARROW_PAIR, WIDE)
def test_rows_announce_themselves(shape):
    rows, got = memory(32, fill=-1), memory(300, 2)
    run(play_rows, shape, rows, len(got), got)
    np.testing.assert_array_equal(got[:, 0], np.arange(len(got)))
    assert (got[:, 1] == 0x7FFFFFFF7FFFFFFF).all()


def looks(out):
    st8(out, polls_per_look())


@everywhere
def test_how_often_waits_look_at_the_clock(shape):
    """Often enough for a timeout of seconds, a poll taking less than a microsecond; on the CPU much more often."""
    out = memory(1)
    run(looks, shape, out)
    assert 1 <= out[0] <= 10**5


# ---- rows that announce themselves -----------------------------------------------------------------------------------

def announce(rows, n, out):
    """Six words a row: absent(row), absent(present(row)) and above it reserved(row), present(row), absence()."""
    i = my_thread()
    while i < n:
        row, at = ld16(rows + 16 * i), out + 48 * i
        st8(at, absent(row))
        st8(at + 8, absent(present(row)) | reserved(row) << 1)
        st16(at + 16, present(row))
        st16(at + 32, absence())
        i += all_threads()


WORD32 = st.sampled_from([MASK32, MASK32 - 1, MASK32 >> 1, 0xFFFF, 0xFFFF0000, 0]) | st.integers(0, MASK32)


@everywhere
@given(st.lists(st.tuples(*[WORD32] * 4), min_size=1, max_size=20))
@example([tuple(MASK32 if k == i else 0xFFFF0000 + k for k in range(4)) for i in range(5)])    # each word, and none
@settings(max_examples=100)
def test_absence(shape, rows):
    out = memory(len(rows), 12, dtype=np.uint32)
    run(announce, shape, filled(rows, np.uint32), len(rows), out)
    for row, got in zip(rows, out.tolist()):
        replaced = [MASK32 >> 1 if word == MASK32 else word for word in row]
        reserved = 2 * (MASK32 in row or MASK32 - 1 in row)
        assert got == [int(MASK32 in row), 0, reserved, 0, *replaced, *[MASK32] * 4]


# ---- bf16, fp32 and e4m3 ---------------------------------------------------------------------------------------------

TERMS, PARTS = 3, 3
MINUS_ONE = 0xBF800000


def weigh(values, weights, n, out):
    """Eight sums of TERMS products each, rounded to bf16; then what that rounding lost, rounded, and once more.

    So the outputs tell the fp32 sums to their last bits, which no op can store.
    """
    i = my_thread()
    while i < n:
        total = zeros()
        for k in range(TERMS):
            weight = f32_of(ld8(weights + 8 * (TERMS * i + k)))
            total = fma8(ld16(values + 16 * (TERMS * i + k)), weight, total)
        for k in range(PARTS):
            rounded = to_bf16(total)
            st16(out + 16 * (PARTS * i + k), rounded)
            total = fma8(rounded, f32_of(MINUS_ONE), total)
        i += all_threads()


def weighed(values, weights):
    """What `weigh` must give: values [n, TERMS, 8] bf16, weights [n, TERMS] fp32 -> [n, PARTS, 8] bf16."""
    total, out = np.zeros((len(values), 8), np.float32), np.empty((len(values), PARTS, 8), bfloat16)
    for k in range(TERMS):
        total = reference.fma32(weights[:, k, None], values[:, k], total)
    for k in range(PARTS):
        with np.errstate(all="ignore"):
            out[:, k] = total.astype(bfloat16)
        total = reference.fma32(out[:, k], np.float32(-1), total)
    return out


def check_weigh(shape, values, weights):
    """values [n, TERMS, 8] uint16 and weights [n, TERMS] uint32 are bit patterns."""
    upper = np.random.default_rng(0).integers(0, 2**32, weights.shape, np.uint64) << np.uint64(32)    # must not matter
    words = filled((weights.astype(np.uint64) | upper).view(np.int64))
    out = memory(len(values), PARTS, 8, dtype=np.uint16)
    run(weigh, shape, filled(values, np.uint16), words, len(values), out)
    expected = weighed(values.view(bfloat16), weights.view(np.float32))
    nan = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(out.view(bfloat16).astype(np.float32)), nan)
    np.testing.assert_array_equal(out[~nan], expected.view(np.uint16)[~nan])


BF16 = st.integers(0, 2**16 - 1) | st.sampled_from([0, 0x8000, 1, 0x8001, 0x7F, 0x80, 0x7F7F, 0xFF7F, 0x7F80, 0x3F80])
FP32 = st.integers(0, MASK32) | st.sampled_from([0, 1, 0x80000001, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000])
NANS = [((0x3F80,) * 8 * TERMS, (nan, 0x3F800000, 0)) for nan in (0x7F800001, 0x7FFFFFFF, MASK32, 0xFF800001)]


@everywhere
@given(st.lists(st.tuples(st.tuples(*[BF16] * 8 * TERMS), st.tuples(*[FP32] * TERMS)), min_size=1, max_size=4))
@example(NANS)                                      # rounded like numbers, some of these would become zero or infinite
@settings(max_examples=100)
def test_sums_of_any_bits(shape, rows):
    values, weights = zip(*rows)
    check_weigh(shape, np.array(values, np.uint16).reshape(-1, TERMS, 8), np.array(weights, np.uint32))


@everywhere
def test_sums_of_like_sizes(shape):
    """Random bits seldom give sums whose terms meet; these do, down among the subnormals and up at the overflow."""
    rng, n = np.random.default_rng(2), 4000
    exponents = rng.choice([0, 1, 2, 9, 60, 127, 190, 252, 253, 254], (n, 1, 1))
    values = rng.integers(0, 2**7, (n, TERMS, 8)) | (exponents << 7) | rng.integers(0, 2, (n, TERMS, 8)) << 15
    weights = rng.integers(0, 2**23, (n, TERMS)) | rng.integers(119, 129, (n, TERMS)) << 23
    check_weigh(shape, values.astype(np.uint16), weights.astype(np.uint32))


@everywhere
def test_rounding_at_ties(shape):
    """h + r, where r takes the sum to, just under or just over the midpoint of two bf16 values, at every exponent."""
    rng, exponents = np.random.default_rng(3), np.arange(9, 255)       # of h; r is 8 or 9 binades below
    h = rng.integers(0, 2**7, (len(exponents), 1, 8)) | rng.integers(0, 2, (len(exponents), 1, 8)) << 15
    h[:, :, 0] = 0x7F                                                  # rounds up to the next binade, in the end to inf
    values = np.zeros((len(exponents), 3, TERMS, 8), np.uint16)
    values[:, :, 0] = h | exponents[:, None, None] << 7
    values[:, :, 1] = 0x3F80
    weights = np.zeros((len(exponents), 3, TERMS), np.uint32)
    weights[:, :, 0] = 0x3F800000
    half_ulp = exponents - 8 << 23
    weights[:, :, 1] = np.stack([half_ulp - 2**16, half_ulp, half_ulp + 2**16], axis=1)
    check_weigh(shape, values.reshape(-1, TERMS, 8), weights.reshape(-1, TERMS))


def divide(x, y, n, out):
    """Two words an entry: the bits of the fp32 number x, the bits of x / y."""
    i = my_thread()
    while i < n:
        dividend, divisor = f32_of(ld8(x + 8 * i)), f32_of(ld8(y + 8 * i))
        st8(out + 16 * i, bits_of(dividend))
        st8(out + 16 * i + 8, bits_of(div(dividend, divisor)))
        i += all_threads()


def check_divide(shape, x, y):
    """x and y [n] are bit patterns."""
    x, y = np.asarray(x, np.uint32), np.asarray(y, np.uint32)
    out = memory(len(x), 2)
    run(divide, shape, filled(x, np.uint64).view(np.int64) | -1 << 32, filled(y).view(np.int64), len(x), out)
    with np.errstate(all="ignore"):
        expected = x.view(np.float32) / y.view(np.float32)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(out[:, 0], x)
    np.testing.assert_array_equal(out[~nan, 1], expected.view(np.uint32)[~nan])
    assert np.isnan(out[nan, 1].astype(np.uint32).view(np.float32)).all() and (out >> 32 == 0).all()


@everywhere
@given(st.lists(st.tuples(FP32, FP32), min_size=1, max_size=20))
@example([(x, y) for x in (0, 1, 0x80000001, 0x3F800000, 0x7F800000, 0xFF800000, 0x7FC00000)       # 0, subnormal, 1, inf, NaN
          for y in (0, 0x80000000, 0x007FFFFF, 0x7F7FFFFF, 0x7F800000, MASK32)])
@settings(max_examples=100)
def test_quotients_of_any_bits(shape, pairs):
    check_divide(shape, *zip(*pairs))


@everywhere
def test_quotients_at_the_limits(shape):
    """Random numbers of exponents that differ so much that the quotient is subnormal, infinite, or just not."""
    rng, n = np.random.default_rng(6), 100_000
    exponents = rng.integers(0, 255, n)
    others = np.clip(exponents + rng.choice([1, -1], n) * rng.integers(120, 155, n), 0, 254)
    x, y = (rng.integers(0, 2**23, n) | e << 23 | rng.integers(0, 2, n) << 31 for e in (exponents, others))
    check_divide(shape, x, y)


def largest(values, n, out):
    i = my_thread()
    while i < n:
        st8(out + 8 * i, amax8(ld16(values + 16 * i)))
        i += all_threads()


def check_largest(shape, values):
    """values [n, 8] are bit patterns."""
    values = filled(values, np.uint16)
    out = memory(len(values))
    run(largest, shape, values, len(values), out)
    sizes = np.abs(values.view(bfloat16).astype(np.float32))
    expected = np.where(np.isnan(sizes), np.float32(0), sizes).max(axis=1)      # np.fmax lets signalling NaNs through
    np.testing.assert_array_equal(out, expected.view(np.uint32) >> 16)


@everywhere
@pytest.mark.parametrize("others", [0, 0x8000, 0x7FC0, 0xFFFF, 0x7F81])
def test_largest_of_one_number(shape, others):
    """Every bf16 in every place, beside zeros or NaNs."""
    values = np.full((8, 2**16, 8), others, np.uint16)
    for place in range(8):
        values[place, :, place] = np.arange(2**16)
    check_largest(shape, values.reshape(-1, 8))


@everywhere
def test_largest_of_eight(shape):
    rng, n = np.random.default_rng(7), 20_000
    anything = rng.integers(0, 2**16, (n, 8))
    close = rng.integers(0, 2**16, (n, 1)) + rng.integers(-2, 3, (n, 8)) & 0xFFFF
    infinite = np.where(rng.random((n, 8)) < 0.3, 0x7F7F + rng.integers(0, 3, (n, 8)), anything)
    check_largest(shape, np.concatenate([anything, close, close ^ rng.integers(0, 2, (n, 8)) << 15, infinite]))


def quantize(values, factors, n, out):
    """Sixteen values and a factor an entry."""
    i = my_thread()
    while i < n:
        low, high = ld16(values + 32 * i), ld16(values + 32 * i + 16)
        st16(out + 16 * i, to_e4m3(low, high, f32_of(ld8(factors + 8 * i))))
        i += all_threads()


def quantized(values, factors):
    """What `quantize` must give: values [n, 16] bf16, factors [n] fp32 -> [n, 16] uint8."""
    with np.errstate(all="ignore"):
        products = values.astype(np.float32) * factors[:, None]
        codes = np.clip(products, -448, 448).astype(float8_e4m3fn).view(np.uint8)
    return np.where(np.isnan(products), 0x7F, codes)


def near(x):
    """fp32: x and its two neighbours."""
    x = np.float32(x)
    return [np.nextafter(x, np.float32(0)), x, np.nextafter(x, np.float32(np.inf))]


# With a factor of 1, and just off it, the bf16 values meet, miss and pass every midpoint of two e4m3.
FACTORS = [*near(1), *near(448 / 3), *near(2**-9), 1 / 448, 448 / 1e-4, -1, 0, 2**-149, 2**-126, 3e38, np.inf, np.nan]


@everywhere
def test_e4m3_of_every_bf16(shape):
    rng = np.random.default_rng(8)
    chosen = np.array([*FACTORS, *np.exp2(rng.uniform(-130, 125, 30))], np.float32)
    values = filled(rng.permuted(np.tile(np.arange(2**16), (len(chosen), 1)), axis=1).reshape(-1, 16), np.uint16)
    factors = np.repeat(chosen, 2**16 // 16)
    out = memory(len(values), 16, dtype=np.uint8)
    run(quantize, shape, values, filled(factors.view(np.uint32)), len(values), out)
    np.testing.assert_array_equal(out, quantized(values.view(bfloat16), factors))


def test_e4m3_by_hand():
    def codes(*values):
        out = memory(1, 16, dtype=np.uint8)
        run(quantize, NARROW, filled(np.resize(values, (1, 16)), bfloat16), filled([0x3F800000]), 1, out)
        return out[0, :len(values)].tolist()
    assert codes(0, -0.0, 1, 1.0625, 1.1875, -448, 464, -1e30) == [0, 0x80, 0x38, 0x38, 0x3A, 0xFE, 0x7E, 0xFE]
    assert codes(np.inf, -np.inf, np.nan, -np.nan) == [0x7E, 0xFE, 0x7F, 0x7F]
    assert codes(2**-6, 2**-9, 2**-10, 1.0078125 * 2**-10, 3 * 2**-10) == [8, 1, 0, 1, 2]


# ---- time ------------------------------------------------------------------------------------------------------------

def tick(n, out):
    i = 0
    while i < n:
        st8(out + 8 * (n * my_thread() + i), clock_ns())
        pause(i & 1)
        i += 1


@one_or_many
def test_clock(shape):
    out = memory(threads_of(shape), 50)
    before = time.monotonic_ns()
    run(tick, shape, 50, out)
    after = time.monotonic_ns()
    assert (np.diff(out) >= 0).all() and out.max() > out.min()
    assert np.ptp(out, axis=1).min() > 24 * 50_000                        # every other pause was a sleep
    assert before <= out.min() and out.max() <= after


# ---- shared memory and collectives -----------------------------------------------------------------------------------

def exchange_in_block(rounds, out):
    """Each round a thread leaves a number in shared memory and adds what its mirror image left."""
    mine, mirror = shared() + 8 * thread_rank(), shared() + 8 * (num_threads() - 1 - thread_rank())
    total, i = 0, 0
    while i < rounds:
        st8_shared(mine, 1000 * block_rank() + (i + 1) * thread_rank())
        syncthreads()
        total += ld8_shared(mirror)
        syncthreads()
        i += 1
    st8(out + 8 * my_thread(), total)


@shapes(NARROW, WIDE, ODD)
def test_shared_memory_and_syncthreads(shape):
    (blocks, (threads, _)), rounds = shape, 40
    out = memory(blocks, threads)
    run(exchange_in_block, shape, rounds, out, shared_bytes=8 * threads)
    block, thread = np.indices((blocks, threads))
    np.testing.assert_array_equal(out, rounds * 1000 * block + rounds * (rounds + 1) // 2 * (threads - 1 - thread))


def exchange_words(values, out):
    """Each thread leaves 4 bytes beside those of the others and takes what its mirror image left."""
    st4_shared(shared() + 4 * thread_rank(), ld8(values + 8 * my_thread()))
    syncthreads()
    st8(out + 8 * my_thread(), ld4_shared(shared() + 4 * (num_threads() - 1 - thread_rank())))


@shapes(NARROW, WIDE, ODD, ON_GPU)
def test_shared_words(shape):
    blocks, (threads, _) = shape
    for seed in range(5):
        values, out = random_words(seed, blocks, threads), memory(blocks, threads)
        run(exchange_words, shape, values, out, shared_bytes=4 * threads)
        np.testing.assert_array_equal(out, values.astype(np.int32)[:, ::-1])


def count_in_block(values, rounds, out):
    """The block's threads add their values to two counters of 4 bytes, side by side, a number of times."""
    for k in range(2):
        if thread_rank() == 0:
            st4_shared(shared() + 4 * k, 0)
    syncthreads()
    i = 0
    while i < rounds:
        add4_shared(shared(), ld8(values + 8 * my_thread()))
        add4_shared(shared() + 4, 1)
        i += 1
    syncthreads()
    st8(out + 16 * my_thread(), ld4_shared(shared()))
    st8(out + 16 * my_thread() + 8, ld4_shared(shared() + 4))


@shapes(NARROW, WIDE, ODD, ON_GPU)
def test_adds_in_shared_memory(shape):
    blocks, (threads, _) = shape
    values, rounds = random_words(3, blocks, threads), 500
    out = memory(blocks, threads, 2)
    run(count_in_block, shape, values, rounds, out, shared_bytes=8)
    totals = (values.sum(axis=1, keepdims=True) * rounds).astype(np.int32)      # modulo 2**32
    np.testing.assert_array_equal(out[..., 0], np.broadcast_to(totals, (blocks, threads)))
    assert (out[..., 1] == rounds * threads).all()


def ask_block(votes, rounds, out):
    """Per thread, in which rounds anybody of its block voted; and what its mirror images left, as above."""
    mine, mirror = shared() + 8 * thread_rank(), shared() + 8 * (num_threads() - 1 - thread_rank())
    hits, total, i = 0, 0, 0
    while i < rounds:
        hits += syncthreads_or(ld8(votes + 8 * (rounds * my_thread() + i))) << i
        i += 1
    while i > 0:
        st8_shared(mine, i * thread_rank())
        syncthreads_or(0)
        total += ld8_shared(mirror)
        syncthreads_or(1)
        i -= 1
    st8(out + 16 * my_thread(), hits)
    st8(out + 16 * my_thread() + 8, total)


@shapes(NARROW, WIDE, ODD)
def test_syncthreads_or(shape):
    (blocks, (threads, _)), rounds = shape, 40
    chosen = np.random.default_rng(4).choice([0, 1, -1, 2**40, -2**63], (blocks, threads, rounds))
    votes = chosen * (np.random.default_rng(5).random(chosen.shape) < 0.7 / threads)       # often nobody, seldom two
    votes[:, :, 0], votes[:, :, 1], votes[:, 1:, 1] = 0, 2**63 - 1, 0
    out = memory(blocks, threads, 2)
    run(ask_block, shape, filled(votes), rounds, out, shared_bytes=8 * threads)
    hits = (votes != 0).any(axis=1) @ (1 << np.arange(rounds))
    np.testing.assert_array_equal(out[:, :, 0], np.broadcast_to(hits[:, None], (blocks, threads)))
    mirror = np.broadcast_to(threads - 1 - np.arange(threads), (blocks, threads))
    np.testing.assert_array_equal(out[:, :, 1], rounds * (rounds + 1) // 2 * mirror)


def exchange_in_warp(rounds, words, out):
    """As above with the lanes of a warp, which meet without their block; warps do different numbers of rounds."""
    mine = words + 8 * my_thread()
    mirror = mine + 8 * (warp_size() - 1 - 2 * lane())
    total, i = 0, 0
    while i < rounds * (1 + udiv(thread_rank(), warp_size())):
        st8(mine, (i + 1) * my_thread())
        syncwarp()
        total += ld8(mirror)
        syncwarp()
        i += 1
    st8(out + 8 * my_thread(), total)


@shapes(NARROW, WIDE, ODD, FULL_WARP)
def test_syncwarp(shape):
    blocks, (threads, warp) = shape
    out = memory(blocks, threads // warp, warp)
    run(exchange_in_warp, shape, 20, memory(*out.shape), out)
    mirror = np.arange(out.size).reshape(out.shape)[:, :, ::-1]
    rounds = 20 * (1 + np.arange(threads // warp))[None, :, None]
    np.testing.assert_array_equal(out, rounds * (rounds + 1) // 2 * mirror)


def ask_lanes(values, out):
    """Per thread: what each lane has to say, what the lane k further on has, what the lane k across has, and four votes."""
    value, at = ld8(values + 8 * my_thread()), out + 8 * (3 * warp_size() + 4) * my_thread()
    k = 0
    while k < warp_size():
        st8(at, shfl(value, k))
        st8(at + 8, shfl(value, umod(lane() + k, warp_size())))         # every lane asks another one
        st8(at + 16, shfl_xor(value, k))
        at += 24
        k += 1
    st8(at, ballot(value & 1))
    st8(at + 8, ballot(value & (1 << 40)))                              # any bit makes a vote
    st8(at + 16, ballot(value & (-1 << 63)))
    st8(at + 24, ballot(1))


def votes(lanes, bit):
    """The ballot of a warp's votes on one bit of its values."""
    return sum(1 << i for i, value in enumerate(lanes) if value & (1 << bit))


@shapes(NARROW, WIDE, ODD, FULL_WARP, ON_GPU)
def test_shfl_and_ballot(shape):
    blocks, (threads, warp) = shape
    for seed in range(5):
        values = random_words(seed, blocks * threads // warp, warp)
        out = memory(*values.shape, 3 * warp + 4)
        run(ask_lanes, shape, values, out)
        for (w, i), got in zip(np.ndindex(values.shape), out.reshape(values.size, -1).tolist()):
            lanes = values[w].tolist()
            said = [x for k in range(warp) for x in (lanes[k], lanes[(i + k) % warp], lanes[i ^ k])]
            assert got == [*said, votes(lanes, 0), votes(lanes, 40), votes(lanes, 63), (1 << warp) - 1]


# ---- the kernels before and after ------------------------------------------------------------------------------------

def follow(out):
    previous_kernel_done()
    st8(out + 8 * my_thread(), 1 + ld8(out + 8 * my_thread()))
    next_kernel_may_start()


@everywhere
def test_kernels_follow_one_another(shape):
    """Launched without asking for more, they do nothing."""
    out = memory(threads_of(shape))
    for _ in range(3):
        run(follow, shape, out)
    assert (out == 3).all()


# ---- epochs ----------------------------------------------------------------------------------------------------------

def epochs(entries, n, out):
    """Three words for each (epoch, goal): the next and the previous epoch, and whether the goal is reached."""
    i = my_thread()
    while i < n:
        epoch, goal = ld8(entries + 16 * i), ld8(entries + 16 * i + 8)
        st8(out + 24 * i, next_epoch(epoch))
        st8(out + 24 * i + 8, previous_epoch(epoch))
        st8(out + 24 * i + 16, 1 if reached(epoch, goal) else 0)
        i += all_threads()


EPOCHS = st.integers(1, LAST_EPOCH) | st.sampled_from([1, 2, 3, 2**31 - 1, 2**31, 2**31 + 1, LAST_EPOCH - 1])


@given(EPOCHS)
@example(1)
@example(LAST_EPOCH)
def test_epochs_go_round(epoch):
    assert next_epoch(previous_epoch(epoch)) == epoch == previous_epoch(next_epoch(epoch))
    for neighbour in (next_epoch(epoch), previous_epoch(epoch)):
        assert 1 <= neighbour <= LAST_EPOCH and (neighbour - epoch) % 2 == 1


@given(EPOCHS, st.integers(0, 20))
@example(LAST_EPOCH, 1)
@example(LAST_EPOCH - 1, 3)
def test_later_epochs_reach_earlier_ones(epoch, steps):
    later = epoch
    for _ in range(steps):
        later = next_epoch(later)
    assert reached(later, epoch)
    assert reached(epoch, later) == (steps == 0)


def test_epochs_by_hand():
    assert (next_epoch(0), next_epoch(1), next_epoch(LAST_EPOCH)) == (1, 2, 1)
    assert (previous_epoch(0), previous_epoch(1), previous_epoch(2)) == (LAST_EPOCH, LAST_EPOCH, 1)
    assert LAST_EPOCH == MASK32 - 1
    assert reached(0, previous_epoch(previous_epoch(1)))                # fresh memory: nobody waits for the first
    assert reached(0, previous_epoch(previous_epoch(2)))
    assert not reached(0, previous_epoch(previous_epoch(3)))            # the third waits until the first is read


@one_or_many
@given(st.lists(st.tuples(EPOCHS | st.just(0), EPOCHS), min_size=1, max_size=20))
@settings(max_examples=50)
def test_epochs_in_kernels(shape, entries):
    out = memory(len(entries), 3)
    run(epochs, shape, filled(entries), len(entries), out)
    assert out.tolist() == [[next_epoch(e), previous_epoch(e), reached(e, goal)] for e, goal in entries]


# ---- the language as a whole -----------------------------------------------------------------------------------------

def test_every_op_is_documented_and_exercised():
    functions = [f for name, f in globals().items() if isinstance(f, FunctionType) and not name.startswith("test_")]
    used = {f.__globals__.get(name) for f in functions if f.__module__ == __name__ for name in f.__code__.co_names
            if isinstance(f.__globals__.get(name), Op)}
    assert [name for name, op in OPS.items() if not (op.__doc__ or "").strip()] == []
    assert [name for name, op in OPS.items() if op not in used and not name.startswith("_")] == []


@pytest.mark.parametrize("name", OPS)
def test_ops_run_in_kernels_only(name):
    op = OPS[name]
    with pytest.raises(TypeError, match=f"{name} is an op of the kernel language"):
        op(*range(len(op.args)))


# ---- the engine ------------------------------------------------------------------------------------------------------

BAD_SHAPES = ["1", "1,1", "1,1,1,1", "a,b,c", "1.5,1,1", "1,1,", ",,", "0,1,1", "1,0,1", "1,1,0", "-1,1,1", "1,-8,4",
              "1,8,3", "1,6,4", "1,4,8", "1,64,64", "2 8 4"]


@pytest.mark.parametrize("text", BAD_SHAPES)
def test_bad_shapes_of_the_cpu(text, monkeypatch):
    with pytest.raises(ValueError, match="PYEP_CPU_SHAPE is"):
        CpuEngine(text)
    monkeypatch.setenv("PYEP_CPU_SHAPE", text)
    with pytest.raises(ValueError, match="PYEP_CPU_SHAPE is"):
        CpuEngine()


def test_more_blocks_than_the_layout_has_epochs():
    assert CpuEngine(f"{layout.MAX_BLOCKS},1,1").blocks == layout.MAX_BLOCKS
    with pytest.raises(ValueError, match="PYEP_CPU_SHAPE is"):
        CpuEngine(f"{layout.MAX_BLOCKS + 1},1,1")


def test_good_shapes_of_the_cpu(monkeypatch):
    monkeypatch.delenv("PYEP_CPU_SHAPE", raising=False)
    assert (CpuEngine().blocks, CpuEngine().machine) == (1, Cpu(1, 1))
    monkeypatch.setenv("PYEP_CPU_SHAPE", "3,64,32")
    assert (CpuEngine().blocks, CpuEngine().machine) == (3, Cpu(64, 32))
    engine = CpuEngine("2,8,4")                     # an argument comes before the environment
    assert (engine.blocks, engine.machine, engine.teams(1 << 20, 1), engine.warp) == (2, Cpu(8, 4), (2, 2, 4), 4)


def test_engine_runs_its_shape():
    engine, out = CpuEngine("2,8,4"), memory(2, 8, 8)
    engine.kernel(who, engine.blocks, 8).launch(0, out.ctypes.data)
    assert (out[:, :, 3] == 2).all() and (out[:, :, 5] == 4).all()
