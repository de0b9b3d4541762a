"""The kernel language: every operation that a kernel may use, declared once for the GPU and for the CPU.

Addresses, sizes and counters are int64; `v16` is 16 bytes in registers, `f32x8` eight fp32.  Memory operations name their
width in bytes and act on global memory unless they say "shared".  Orders are those of the PTX memory model: *weak* (nobody
else touches the word meanwhile), *relaxed* (others may; the access is atomic, nothing else is ordered), *acquire* and
*release*, and unless stated otherwise they hold for the whole *system*: all GPUs and CPUs that map the memory.

On the CPU each GPU thread is an OS thread; the collectives' Python bodies below are what runs there.
"""
from llvmlite import ir

from . import llvm
from .llvm import BARRIER_BYTES, I32, I64, V16
from .op import f32, f32x8, i64, op, v16, void

# ---- who am I --------------------------------------------------------------------------------------------------------


def _special(name):
    """A special register of the GPU, widened to int64."""
    def emit(b):
        read = b.module.declare_intrinsic("llvm.nvvm.read.ptx.sreg." + name, (), ir.FunctionType(I32, []))
        return b.zext(b.call(read, []), I64)
    return emit


def _shape(size, of_thread):
    """On the CPU: a constant where a block or warp is one thread, so that LLVM drops the loops over lanes."""
    return lambda b, cpu: ir.Constant(I64, of_thread) if getattr(cpu, size) == 1 else llvm.context("thread")(b, cpu)


@op(i64, ptx=_special("tid.x"), cpu=_shape("threads", 0), pure=True)
def thread_rank():
    """This thread's index in its block."""


@op(i64, ptx=_special("ntid.x"), cpu=lambda b, cpu: ir.Constant(I64, cpu.threads), pure=True)
def num_threads():
    """Threads in a block."""


@op(i64, ptx=_special("ctaid.x"), cpu=llvm.context("block"), pure=True)
def block_rank():
    """This block's index in the grid."""


@op(i64, ptx=_special("nctaid.x"), cpu=llvm.context("blocks"), pure=True)
def num_blocks():
    """Blocks in the grid."""


@op(i64, ptx=lambda b: ir.Constant(I64, 32), cpu=lambda b, cpu: ir.Constant(I64, cpu.warp), pure=True)
def warp_size():
    """Lanes in a warp: 32 on a GPU, what the shape says on the CPU."""


@op(i64, ptx="{ .reg .b32 t; mov.u32 t, %laneid; cvt.u64.u32 $0, t; }", pure=True)
def lane():
    """This thread's index in its warp."""
    return umod(thread_rank(), warp_size())


# ---- arithmetic that Python spells slowly ----------------------------------------------------------------------------

def _in_32_bits(b, divide, x, y):
    return b.zext(divide(b.trunc(x, I32), b.trunc(y, I32)), I64)


@op(i64, (i64, i64), ptx=lambda b, x, y: _in_32_bits(b, b.udiv, x, y), cpu=lambda b, _, x, y: _in_32_bits(b, b.udiv, x, y),
    pure=True)
def udiv(x, y):
    """x // y of numbers from 0 to 2**32 - 1: by a constant that is one multiplication, where 64 bits would take six."""


@op(i64, (i64, i64), ptx=lambda b, x, y: _in_32_bits(b, b.urem, x, y), cpu=lambda b, _, x, y: _in_32_bits(b, b.urem, x, y),
    pure=True)
def umod(x, y):
    """x % y of numbers from 0 to 2**32 - 1."""


@op(i64, (i64,), ptx="{ .reg .b32 t; popc.b64 t, $1; cvt.u64.u32 $0, t; }", cpu=llvm.intrinsic("llvm.ctpop.i64"), pure=True)
def popc(x):
    """How many bits are set."""


@op(i64, (i64,), ptx="{ .reg .b64 r; .reg .b32 t; brev.b64 r, $1; clz.b64 t, r; cvt.u64.u32 $0, t; }",
    cpu=llvm.intrinsic("llvm.cttz.i64"), pure=True)
def lowest_bit(x):
    """The index of the lowest bit that is set; 64 if none is."""


# ---- weak memory accesses --------------------------------------------------------------------------------------------

@op(v16, (i64,), ptx="ld.global.L1::no_allocate.v2.s64 {$0,$1}, [$2];", cpu=llvm.load(V16))
def ld16(address):
    """Load 16 bytes; weak."""


@op(v16, (i64, i64), ptx="{ .reg .pred p; setp.ne.s64 p, $3, 0; mov.b64 $0, 0; mov.b64 $1, 0;"
    " @p ld.global.L1::no_allocate.v2.s64 {$0,$1}, [$2]; }", cpu=llvm.load_if(llvm.load(V16)))
def ld16_if(address, wanted):
    """`ld16` where wanted != 0, else zeros without touching memory; no branch, so that several stay in flight."""


@op(v16, (i64,), ptx="ld.global.nc.L1::no_allocate.v2.s64 {$0,$1}, [$2];", cpu=llvm.load(V16))
def ld16_nc(address):
    """Load 16 bytes that nobody writes while the kernel runs."""


@op(v16, (i64, i64), ptx="{ .reg .pred p; setp.ne.s64 p, $3, 0; mov.b64 $0, 0; mov.b64 $1, 0;"
    " @p ld.global.nc.L1::no_allocate.v2.s64 {$0,$1}, [$2]; }", cpu=llvm.load_if(llvm.load(V16)))
def ld16_nc_if(address, wanted):
    """`ld16_nc` where wanted != 0, else zeros without touching memory."""


@op(void, (i64, v16), ptx="st.global.L1::no_allocate.v2.s64 [$0], {$1,$2};", cpu=llvm.store(V16))
def st16(address, value):
    """Store 16 bytes; weak."""


@op(i64, (i64,), ptx="ld.global.s64 $0, [$1];", cpu=llvm.load())
def ld8(address):
    """Load 8 bytes; weak."""


@op(i64, (i64, i64), ptx="{ .reg .pred p; setp.ne.s64 p, $2, 0; mov.b64 $0, 0; @p ld.global.s64 $0, [$1]; }",
    cpu=llvm.load_if(llvm.load()))
def ld8_if(address, wanted):
    """`ld8` where wanted != 0, else 0 without touching memory."""


@op(void, (i64,), ptx="prefetch.global.L1 [$0];")
def prefetch(address):
    """Have the line at an address near at hand when this block loads from it."""


@op(i64, (i64,), ptx="ld.global.nc.s64 $0, [$1];", cpu=llvm.load(), pure=True)
def ld8_constant(address):
    """Load 8 bytes that no kernel ever writes.  It may be done early, before `previous_kernel_done`, or once for many."""


@op(i64, (i64,), ptx="ld.global.nc.s64 $0, [$1];", cpu=llvm.load())
def ld8_nc(address):
    """Load 8 bytes that nobody writes while the kernel runs."""


@op(i64, (i64, i64), ptx="{ .reg .pred p; setp.ne.s64 p, $2, 0; mov.b64 $0, 0; @p ld.global.nc.s64 $0, [$1]; }",
    cpu=llvm.load_if(llvm.load()))
def ld8_nc_if(address, wanted):
    """`ld8_nc` where wanted != 0, else 0 without touching memory."""


@op(void, (i64, i64), ptx="st.global.s64 [$0], $1;", cpu=llvm.store())
def st8(address, value):
    """Store 8 bytes; weak."""


@op(i64, (i64,), ptx="ld.global.nc.s32 $0, [$1];", cpu=llvm.load(I32))
def ld4_nc(address):
    """Load a signed 4-byte integer that nobody writes while the kernel runs."""


@op(i64, (i64, i64), ptx="{ .reg .pred p; setp.ne.s64 p, $2, 0; mov.b64 $0, 0; @p ld.global.nc.s32 $0, [$1]; }",
    cpu=llvm.load_if(llvm.load(I32)))
def ld4_nc_if(address, wanted):
    """`ld4_nc` where wanted != 0, else 0 without touching memory."""


@op(i64, (i64, i64), ptx="{ .reg .pred p; .reg .b32 t; setp.ne.s64 p, $2, 0; mov.b32 t, 0; @p ld.global.nc.u8 t, [$1];"
    " cvt.u64.u32 $0, t; }", cpu=llvm.load_if(llvm.load(llvm.I8)))
def ld1_nc_if(address, wanted):
    """Load a byte, 0 to 255, that nobody writes while the kernel runs, where wanted != 0, else 0 without touching memory."""


@op(void, (i64, i64), ptx="st.global.u8 [$0], $1;", cpu=llvm.store(llvm.I8))
def st1(address, value):
    """Store the low byte of `value`; weak."""


@op(void, (i64, i64), ptx="st.global.u32 [$0], $1;", cpu=llvm.store(I32))
def st4(address, value):
    """Store the low 4 bytes of `value`; weak."""


# ---- memory accesses that other ranks see or make --------------------------------------------------------------------

@op(v16, (i64,), ptx="ld.relaxed.sys.global.L1::no_allocate.v2.s64 {$0,$1}, [$2];", cpu=llvm.load_fresh)
def ld16_relaxed(address):
    """Load 16 bytes; relaxed.  Each 8-byte half is atomic, the whole is not."""


@op(v16, (i64, i64), ptx="{ .reg .pred p; setp.ne.s64 p, $3, 0; mov.b64 $0, 0; mov.b64 $1, 0;"
    " @p ld.relaxed.sys.global.L1::no_allocate.v2.s64 {$0,$1}, [$2]; }", cpu=llvm.load_if(llvm.load_fresh))
def ld16_relaxed_if(address, wanted):
    """`ld16_relaxed` where wanted != 0, else zeros without touching memory; no branch, so that several stay in flight."""


@op(void, (i64, v16), ptx="st.relaxed.sys.global.L1::no_allocate.v2.s64 [$0], {$1,$2};", cpu=llvm.store(V16))
def st16_relaxed(address, value):
    """Store 16 bytes; relaxed.  Each 8-byte half is atomic, the whole is not."""


@op(i64, (i64,), ptx="ld.relaxed.sys.global.s64 $0, [$1];", cpu=llvm.load(order="monotonic"))
def ld8_relaxed(address):
    """Load 8 bytes; relaxed."""


@op(i64, (i64, i64), ptx="{ .reg .pred p; setp.ne.s64 p, $2, 0; mov.b64 $0, 0; @p ld.relaxed.sys.global.s64 $0, [$1]; }",
    cpu=llvm.load_if(llvm.load(order="monotonic")))
def ld8_relaxed_if(address, wanted):
    """`ld8_relaxed` where wanted != 0, else 0 without touching memory; no branch, so that several stay in flight."""


@op(i64, (i64, i64), ptx="{ .reg .pred p; .reg .b32 t; setp.ne.s64 p, $2, 0; mov.b32 t, 0; @p ld.relaxed.sys.global.u32 t, [$1];"
    " cvt.u64.u32 $0, t; }", cpu=llvm.load_if(llvm.load(I32, order="monotonic", signed=False)))
def ld4_relaxed_if(address, wanted):
    """Load 4 bytes, not negative, where wanted != 0, else 0 without touching memory; relaxed, no branch.

    (To extend the sign would take an instruction that waits for the load; zeros are there already.)
    """


@op(void, (i64, i64), ptx="st.relaxed.sys.global.s64 [$0], $1;", cpu=llvm.store(order="monotonic"))
def st8_relaxed(address, value):
    """Store 8 bytes; relaxed."""


@op(void, (i64, i64), ptx="st.relaxed.sys.global.u32 [$0], $1;", cpu=llvm.store(I32, order="monotonic"))
def st4_relaxed(address, value):
    """Store the low 4 bytes of `value`; relaxed."""


@op(i64, (i64,), ptx="ld.acquire.sys.global.s64 $0, [$1];", cpu=llvm.load(order="acquire"))
def ld8_acquire(address):
    """Load 8 bytes; what the thread that released this value had seen or stored is visible from here on."""


@op(void, (i64, i64), ptx="st.release.sys.global.s64 [$0], $1;", cpu=llvm.store(order="release"))
def st8_release(address, value):
    """Store 8 bytes after all that this thread has seen or stored."""


@op(void, (i64, i64, i64), ptx="st.release.sys.global.v2.u64 [$0], {$1,$2};")
def st16_release(address, first, second):
    """Store two words after all that this thread has seen or stored.

    On a GPU that is one access of 16 bytes.  On the CPU it is two: whoever acquires the second word sees the first.
    """
    st8_relaxed(address, first)
    st8_release(address + 8, second)


@op(void, (i64, i64), ptx="st.relaxed.sys.global.s64 [$0], $1;", cpu=llvm.store(order="release"))
def st8_after_kernels(address, value):
    """Store 8 bytes after all that the kernels before this one have seen or stored.  On a GPU `previous_kernel_done` has seen to
    that; a release would take a microsecond all the same."""


@op(void, (i64, i64), ptx="red.release.sys.global.add.u64 [$0], $1;", cpu=llvm.add_atomic("release"))
def add8_release(address, value):
    """Add to 8 bytes after all that this thread has seen or stored."""


@op(void, (i64, i64), ptx="red.relaxed.gpu.global.add.u64 [$0], $1;", cpu=llvm.add_atomic("monotonic"))
def add8(address, value):
    """Add to 8 bytes of this rank's own memory; relaxed among this rank's threads."""


@op(void, (i64, i64), ptx="{ .reg .b32 t; cvt.u32.u64 t, $1; red.relaxed.gpu.global.add.u32 [$0], t; }",
    cpu=llvm.add_atomic("monotonic", I32))
def add4(address, value):
    """Add to 4 bytes of this rank's own memory; relaxed among this rank's threads."""


@op(i64, (i64, i64), ptx="atom.acq_rel.gpu.global.add.u64 $0, [$1], $2;", cpu=llvm.add_atomic("acq_rel"))
def fetch_add8(address, value):
    """Add to 8 bytes of this rank's own memory and return what was there; acquire and release among this rank's threads."""


@op(i64, (i64, i64), ptx="atom.relaxed.gpu.global.add.u64 $0, [$1], $2;", cpu=llvm.add_atomic("monotonic"))
def fetch_add8_relaxed(address, value):
    """Add to 8 bytes of this rank's own memory and return what was there; relaxed among this rank's threads."""


@op(i64, (i64, i64, i64), ptx="atom.relaxed.gpu.global.cas.b64 $0, [$1], $2, $3;", cpu=llvm.swap_atomic)
def swap8_if(address, expected, value):
    """If 8 bytes of this rank's own memory are `expected`, make them `value`; return what was there.  Relaxed."""


# ---- rows that announce themselves -----------------------------------------------------------------------------------
# Scratch memory holds the 32-bit word 0xffffffff wherever nothing has arrived.  Data is kept from using that word, so a reader sees
# from the data alone whether all of it is there.  Sums of bf16 are `present`; rows with any bits at all: `low_latency_escapes`.

@op(v16, ptx="mov.b64 $0, -1; mov.b64 $1, -1;", cpu=lambda b, _: llvm.splat(-1), pure=True)
def absence():
    """The value that means "nothing has arrived"."""


@op(i64, (v16,), ptx="{ .reg .pred p; .reg .b32 a,b,c,d; mov.b64 {a,b}, $1; mov.b64 {c,d}, $2; setp.eq.b32 p, a, -1;"
    " setp.eq.or.b32 p, b, -1, p; setp.eq.or.b32 p, c, -1, p; setp.eq.or.b32 p, d, -1, p; selp.b64 $0, 1, 0, p; }",
    cpu=llvm.absent, pure=True)
def absent(value):
    """1 if any of the four 32-bit words has not arrived, else 0."""


@op(i64, (v16,), ptx="{ .reg .pred p; .reg .b32 a,b,c,d; mov.b64 {a,b}, $1; mov.b64 {c,d}, $2; setp.ge.u32 p, a, 0xfffffffe;"
    " setp.ge.or.u32 p, b, 0xfffffffe, p; setp.ge.or.u32 p, c, 0xfffffffe, p; setp.ge.or.u32 p, d, 0xfffffffe, p;"
    " selp.b64 $0, 1, 0, p; }", cpu=llvm.reserved, pure=True)
def reserved(value):
    """1 if any of the four 32-bit words is 0xffffffff or 0xfffffffe, else 0."""


@op(v16, (v16,), ptx="{ .reg .pred p; .reg .b32 a,b,c,d; mov.b64 {a,b}, $2; mov.b64 {c,d}, $3;"
    " setp.eq.b32 p, a, -1; selp.b32 a, 0x7fffffff, a, p; setp.eq.b32 p, b, -1; selp.b32 b, 0x7fffffff, b, p;"
    " setp.eq.b32 p, c, -1; selp.b32 c, 0x7fffffff, c, p; setp.eq.b32 p, d, -1; selp.b32 d, 0x7fffffff, d, p;"
    " mov.b64 $0, {a,b}; mov.b64 $1, {c,d}; }", cpu=llvm.present, pure=True)
def present(value):
    """`value` with each word 0xffffffff replaced by 0x7fffffff: bf16 stays the same but for the payload of a NaN."""


# ---- bf16, fp32 and e4m3 ---------------------------------------------------------------------------------------------

@op(f32, (i64,), ptx="{ .reg .b32 t; cvt.u32.u64 t, $1; mov.b32 $0, t; }", cpu=llvm.as_float, pure=True)
def f32_of(bits):
    """The fp32 whose bits are the low 4 bytes of `bits`; of a bf16, `f32_of(bits << 16)`."""


@op(i64, (f32,), ptx="{ .reg .b32 t; mov.b32 t, $1; cvt.u64.u32 $0, t; }", cpu=llvm.as_bits, pure=True)
def bits_of(value):
    """The 4 bytes of an fp32 as a number below 2**32.  Where no value is negative or NaN, bits compare as the values do."""


@op(f32, (f32, f32), ptx="div.rn.f32 $0, $1, $2;", cpu=lambda b, _, x, y: b.fdiv(x, y), pure=True)
def div(x, y):
    """x / y, to nearest even, subnormals included."""


@op(f32x8, ptx="".join(f"mov.f32 ${k}, 0f00000000; " for k in range(8)),
    cpu=lambda b, _: llvm.splat(0.0, f32x8.cpu_type), pure=True)
def zeros():
    """Eight fp32 zeros."""


def _fma8(lo="{ .reg .b32 a,b,c,d,t; .reg .f32 f; mov.b64 {a,b}, $8; mov.b64 {c,d}, $9;"):
    """$8,$9: eight bf16; $10: the weight; $11..$18: the sums so far."""
    for k, word in enumerate("abcd"):
        for half, bits in enumerate((f" shl.b32 t, {word}, 16;", f" and.b32 t, {word}, 0xffff0000;")):
            lo += f"{bits} mov.b32 f, t; fma.rn.f32 ${2 * k + half}, f, $10, ${11 + 2 * k + half};"
    return lo + " }"


@op(f32x8, (v16, f32, f32x8), ptx=_fma8(), cpu=llvm.fma, pure=True)
def fma8(values, weight, sums):
    """sums + weight * values: eight bf16 values, one fp32 weight, eight fp32 sums, each rounded once."""


@op(v16, (f32x8,), ptx="{ .reg .b32 a,b,c,d; cvt.rn.bf16x2.f32 a, $3, $2; cvt.rn.bf16x2.f32 b, $5, $4;"
    " cvt.rn.bf16x2.f32 c, $7, $6; cvt.rn.bf16x2.f32 d, $9, $8; mov.b64 $0, {a,b}; mov.b64 $1, {c,d}; }",
    cpu=llvm.pack, pure=True)
def to_bf16(sums):
    """Eight fp32 to eight bf16, to nearest even."""


# "max" leaves out a NaN unless both are NaN, so there is none after the one with 0; "xorsign.abs": of |a| and |b|, with some sign.
@op(i64, (v16,), ptx="{ .reg .b32 a,b,c,d; mov.b64 {a,b}, $1; mov.b64 {c,d}, $2; max.xorsign.abs.bf16x2 a, a, b;"
    " max.xorsign.abs.bf16x2 c, c, d; max.xorsign.abs.bf16x2 a, a, c; mov.b32 b, 0; max.xorsign.abs.bf16x2 a, a, b;"
    " shr.u32 b, a, 16; max.xorsign.abs.bf16x2 a, a, b; and.b32 a, a, 0x7fff; cvt.u64.u32 $0, a; }",
    cpu=llvm.amax, pure=True)
def amax8(values):
    """The largest |value| of eight bf16, as its bits (0 to 0x7f80, which compare as the values do); a NaN counts as 0."""


def _to_e4m3(code="{ .reg .b32 a,b,t,w0,w1,w2,w3; .reg .b16 l,h; .reg .f32 x,y;"):
    """$2..$5: sixteen bf16; $6: the factor."""
    for k in range(4):
        code += f" mov.b64 {{a,b}}, ${2 + k};"
        for word, two_bytes in (("a", "l"), ("b", "h")):
            code += (f" shl.b32 t, {word}, 16; mov.b32 x, t; mul.rn.f32 x, x, $6; and.b32 t, {word}, 0xffff0000; mov.b32 y, t;"
                     f" mul.rn.f32 y, y, $6; cvt.rn.satfinite.e4m3x2.f32 {two_bytes}, y, x;")        # y above x
        code += f" mov.b32 w{k}, {{l,h}};"
    return code + " mov.b64 $0, {w0,w1}; mov.b64 $1, {w2,w3}; }"


@op(v16, (v16, v16, f32), ptx=_to_e4m3(), cpu=llvm.to_e4m3, pure=True)
def to_e4m3(low, high, factor):
    """Sixteen bf16 times an fp32 factor, rounded to fp32, then to e4m3: byte i is value i, those of `low` first.

    To nearest even; beyond +-448 (infinity too) it is +-448, 0x7e or 0xfe; a NaN is 0x7f: no byte is ever 0xff.
    """


# ---- time ------------------------------------------------------------------------------------------------------------

@op(i64, ptx="mov.u64 $0, %globaltimer;", cpu=llvm.clock)
def clock_ns():
    """Nanoseconds of a clock that only this rank's threads share (on a GPU it may tick as coarsely as 1 us)."""


@op(i64, ptx=lambda b: ir.Constant(I64, 4096), cpu=llvm.constant(16), pure=True)
def polls_per_look():
    """How often a waiting thread polls between looks at the clock.  On a GPU, where a look costs as long as a poll, many thousands
    of threads wait at a time, and the last of them to see its data ends the operation: looks must be rare.  On the CPU others
    may need the core."""


@op(void, (i64,), ptx="nanosleep.u32 20;", cpu=llvm.rest)
def pause(long):
    """A waiting thread leaves the core to others: on the CPU for a turn, or, if it has waited `long`, for 50 us.

    Nobody may wait by turns alone: since Linux 6.18 each of them puts a thread a whole time slice back, and threads that keep
    giving up their turns were seen to starve others of their process for half a minute.
    """


# ---- shared memory of a block: dynamic, its size given at launch -----------------------------------------------------

def _dynamic_shared(b):
    name = "pyep_shared"
    memory = b.module.globals.get(name)
    if memory is None:
        memory = ir.GlobalVariable(b.module, ir.ArrayType(ir.IntType(8), 0), name, addrspace=3)
        memory.linkage, memory.align = "external", 128
    return b.zext(b.ptrtoint(memory, I32), I64)


@op(i64, ptx=_dynamic_shared, cpu=llvm.context("shared"), pure=True)
def shared():
    """The address of the block's shared memory, for the `*_shared` ops only."""


@op(i64, (i64,), ptx="{ .reg .b32 a; cvt.u32.u64 a, $1; ld.shared.b64 $0, [a]; }", cpu=llvm.load())
def ld8_shared(address):
    """Load 8 bytes of shared memory."""


@op(void, (i64, i64), ptx="{ .reg .b32 a; cvt.u32.u64 a, $0; st.shared.b64 [a], $1; }", cpu=llvm.store())
def st8_shared(address, value):
    """Store 8 bytes of shared memory."""


@op(i64, (i64,), ptx="{ .reg .b32 a; cvt.u32.u64 a, $1; ld.shared.s32 $0, [a]; }", cpu=llvm.load(I32))
def ld4_shared(address):
    """Load a signed 4-byte integer of shared memory."""


@op(void, (i64, i64), ptx="{ .reg .b32 a; cvt.u32.u64 a, $0; st.shared.u32 [a], $1; }", cpu=llvm.store(I32))
def st4_shared(address, value):
    """Store the low 4 bytes of `value` in shared memory."""


@op(void, (i64, i64), ptx="{ .reg .b32 a,t; cvt.u32.u64 a, $0; cvt.u32.u64 t, $1; red.relaxed.cta.shared.add.u32 [a], t; }",
    cpu=llvm.add_atomic("monotonic", I32))
def add4_shared(address, value):
    """Add to 4 bytes of shared memory; relaxed among the block's threads."""


# ---- the kernels before and after this one on the stream: "programmatic dependent launch" ----------------------------
# On the CPU, and on a GPU where a launch does not ask for it, kernels follow one another and these do nothing.

@op(ptx="griddepcontrol.launch_dependents;")
def next_kernel_may_start():
    """The first call in each block counts: once every block has called or ended, blocks of the next kernel may start.

    That promises them nothing about memory: what this kernel stores they see after `previous_kernel_done`.
    """


@op(ptx="griddepcontrol.wait;")
def previous_kernel_done():
    """Wait until the kernel before has ended; all that it stored is visible from here on."""


# ---- collectives: every thread of the block, or every lane of the warp, must call --------------------------------------

@op(i64, ptx=lambda b: ir.Constant(I64, 0), cpu=llvm.context("barriers"), pure=True)
def _barriers():
    """CPU only: the block's barrier and those of its warps, `BARRIER_BYTES` apart."""


@op(i64, ptx=lambda b: ir.Constant(I64, 0), cpu=llvm.context("exchange"), pure=True)
def _exchange():
    """CPU only: one word per thread of the block."""


@op(void, (i64,), ptx="", cpu=llvm.meet)
def _meet(barrier):
    """CPU only: wait at a barrier for the others, asleep."""


@op(ptx="bar.sync 0;", collective=True)
def syncthreads():
    """The block meets; what its threads stored before is visible to all of them after."""
    if num_threads() > 1:
        _meet(_barriers())


@op(i64, (i64,), ptx="{ .reg .pred p; setp.ne.s64 p, $1, 0; bar.red.or.pred p, 0, p; selp.b64 $0, 1, 0, p; }", collective=True)
def syncthreads_or(vote):
    """`syncthreads`, and 1 if any thread of the block voted other than 0, else 0."""
    if num_threads() == 1:
        return 1 if vote != 0 else 0
    st8(_exchange() + 8 * thread_rank(), vote)
    syncthreads()
    result = 0
    for k in range(num_threads()):
        if ld8(_exchange() + 8 * k) != 0:
            result = 1
    syncthreads()
    return result


@op(ptx="bar.warp.sync 0xffffffff;", collective=True)
def syncwarp():
    """The warp meets; what its lanes stored before is visible to all of them after."""
    if warp_size() > 1:
        _meet(_barriers() + BARRIER_BYTES * (1 + udiv(thread_rank(), warp_size())))


@op(i64, (i64, i64), ptx="{ .reg .b32 l,h,s; mov.b64 {l,h}, $1; cvt.u32.u64 s, $2; shfl.sync.idx.b32 l, l, s, 0x1f, 0xffffffff;"
    " shfl.sync.idx.b32 h, h, s, 0x1f, 0xffffffff; mov.b64 $0, {l,h}; }", collective=True)
def shfl(value, source):
    """`value` of lane `source` of the warp."""
    if warp_size() == 1:
        return value
    st8(_exchange() + 8 * thread_rank(), value)
    syncwarp()
    result = ld8(_exchange() + 8 * (thread_rank() - lane() + source))
    syncwarp()
    return result


@op(i64, (i64, i64), ptx="{ .reg .b32 l,h,m; mov.b64 {l,h}, $1; cvt.u32.u64 m, $2; shfl.sync.bfly.b32 l, l, m, 0x1f, 0xffffffff;"
    " shfl.sync.bfly.b32 h, h, m, 0x1f, 0xffffffff; mov.b64 $0, {l,h}; }", collective=True)
def shfl_xor(value, mask):
    """`value` of the lane whose index differs in the bits of `mask`, which is less than the warp's size."""
    if warp_size() == 1:
        return value
    st8(_exchange() + 8 * thread_rank(), value)
    syncwarp()
    result = ld8(_exchange() + 8 * (thread_rank() ^ mask))
    syncwarp()
    return result


@op(i64, (i64,), ptx="{ .reg .pred p; .reg .b32 m; setp.ne.s64 p, $1, 0; vote.sync.ballot.b32 m, p, 0xffffffff;"
    " cvt.u64.u32 $0, m; }", collective=True)
def ballot(vote):
    """Bit i is set if lane i voted other than 0."""
    if warp_size() == 1:
        return 1 if vote != 0 else 0
    st8(_exchange() + 8 * thread_rank(), vote)
    syncwarp()
    bits = 0
    for k in range(warp_size()):
        if ld8(_exchange() + 8 * (thread_rank() - lane() + k)) != 0:
            bits |= 1 << k
    syncwarp()
    return bits
