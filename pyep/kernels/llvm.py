"""What the ops look like on the CPU: small functions (builder, machine, *values) -> value that emit LLVM instructions."""
import ctypes

from llvmlite import binding, ir
from numba.core import cgutils

I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
V16 = ir.VectorType(I32, 4)
_I8X16, _I16X8 = ir.VectorType(ir.IntType(8), 16), ir.VectorType(ir.IntType(16), 8)
_I32X8, _F32X8 = ir.VectorType(I32, 8), ir.VectorType(ir.FloatType(), 8)

# ---- who am I: every GPU thread is an OS thread that finds its context under one pthread key -------------------------

libc = ctypes.CDLL(None)
libc.pthread_getspecific.restype = ctypes.c_uint64
_key = ctypes.c_uint()
libc.pthread_key_create(ctypes.byref(_key), None)
binding.add_symbol("pyep_context_key", ctypes.addressof(_key))

CONTEXT = ("thread", "block", "blocks", "barriers", "exchange", "shared")      # int64 fields, in this order


def enter(context):
    """Make `context` (an array of int64, see CONTEXT) that of the calling OS thread; the caller keeps it alive."""
    libc.pthread_setspecific(_key, ctypes.byref(context))


def context(field):
    """Load a field of the calling thread's context."""
    offset = 8 * CONTEXT.index(field)

    def emit(b, machine):
        key = b.module.globals.get("pyep_context_key") or ir.GlobalVariable(b.module, I32, "pyep_context_key")
        key.linkage = "external"                   # by symbol, not by address: machine code is cached across processes
        getspecific = cgutils.get_or_insert_function(b.module, ir.FunctionType(I64, [I32]), "pthread_getspecific")
        getspecific.attributes.add("readnone")     # a thread's context never changes while a kernel runs: hoist it
        getspecific.attributes.add("nounwind")
        base = b.call(getspecific, [b.load(key)])
        return b.load(pointer(b, b.add(base, ir.Constant(I64, offset))))
    return emit


# ---- memory ----------------------------------------------------------------------------------------------------------

def pointer(b, address, t=I64):
    """An address as a pointer.

    LLVM takes apart how an address was computed, and a part that may be 0 for a null pointer; since nobody may touch what that
    points to, it then takes the part for never 0.  The attribute forbids that.  (llvmlite does not know it.)
    """
    set.add(b.function.attributes, "null_pointer_is_valid")
    return b.inttoptr(address, t.as_pointer())


def load(t=I64, order=None, signed=True):
    """Load a `t`, widened to int64 if it is a smaller integer (with its sign, if it is to have one; a byte has none); `order` makes
    it atomic."""
    def emit(b, machine, address):
        p = pointer(b, address, t)
        if t == V16:
            return b.load(p, align=16)
        value = b.load_atomic(p, order, t.width // 8) if order else b.load(p)
        if t in (I8, I32):
            value = b.sext(value, I64) if signed and t == I32 else b.zext(value, I64)
        return value
    return emit


def store(t=I64, order=None):
    """Store a `t` (an int64 is cut down to it); `order` makes it atomic."""
    def emit(b, machine, address, value):
        p = pointer(b, address, t)
        if t in (I8, I32):
            value = b.trunc(value, t)
        if order:
            b.store_atomic(value, p, order, t.width // 8)
        else:
            b.store(value, p, align=16 if t == V16 else None)
    return emit


def load_fresh(b, machine, address):
    """Load 16 bytes that another rank may be writing: the empty asm keeps LLVM from reusing an earlier load."""
    b.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], side_effect=True)
    return b.load(pointer(b, address, V16), align=16)


def load_if(load):
    """A load where the second argument is not 0, else zeros: loaded from a place of our own, which is cheaper than a branch."""
    def emit(b, machine, address, wanted):
        nothing = cgutils.alloca_once(b, V16, zfill=True)
        is_wanted = b.icmp_signed("!=", wanted, ir.Constant(I64, 0))
        return load(b, machine, b.select(is_wanted, address, b.ptrtoint(nothing, I64)))
    return emit


def add_atomic(order, t=I64):
    """Add to a `t` (an int64 is cut down to it)."""
    def emit(b, machine, address, value):
        return b.atomic_rmw("add", pointer(b, address, t), b.trunc(value, t) if t == I32 else value, order)
    return emit


def swap_atomic(b, machine, address, expected, value):
    return b.extract_value(b.cmpxchg(pointer(b, address), expected, value, "acq_rel", "acquire"), 0)


# ---- vectors ---------------------------------------------------------------------------------------------------------

def splat(value, t=V16):
    return ir.Constant(t, [value] * t.count)


_ABSENT = splat(-1)


def absent(b, machine, v):
    hits = b.bitcast(b.icmp_signed("==", v, _ABSENT), ir.IntType(4))
    return b.zext(b.icmp_unsigned("!=", hits, ir.Constant(ir.IntType(4), 0)), I64)


def reserved(b, machine, v):
    hits = b.bitcast(b.icmp_unsigned(">=", v, splat(0xFFFFFFFE)), ir.IntType(4))
    return b.zext(b.icmp_unsigned("!=", hits, ir.Constant(ir.IntType(4), 0)), I64)


def present(b, machine, v):
    return b.select(b.icmp_signed("==", v, _ABSENT), splat(0x7FFFFFFF), v)


def unpack(b, v):
    """Eight bf16 -> eight fp32: a bf16 is the upper half of an fp32."""
    wide = b.zext(b.bitcast(v, _I16X8), _I32X8)
    return b.bitcast(b.shl(wide, splat(16, _I32X8)), _F32X8)


def broadcast(b, value):
    """Eight fp32 of the one."""
    undefined = ir.Constant(_F32X8, ir.Undefined)
    return b.shuffle_vector(b.insert_element(undefined, value, ir.Constant(I32, 0)), undefined, splat(0, _I32X8))


def fma(b, machine, v, weight, total):
    fn = cgutils.get_or_insert_function(b.module, ir.FunctionType(_F32X8, [_F32X8] * 3), "llvm.fma.v8f32")
    return b.call(fn, [unpack(b, v), broadcast(b, weight), total])


def as_float(b, machine, bits):
    return b.bitcast(b.trunc(bits, I32), ir.FloatType())


def as_bits(b, machine, value):
    return b.zext(b.bitcast(value, I32), I64)


def amax(b, machine, v):
    """The largest |value| of eight bf16, NaNs left out; without the sign, bf16 compare like the integers they are made of."""
    size = b.and_(b.bitcast(v, _I16X8), splat(0x7FFF, _I16X8))
    numbers = b.select(b.icmp_signed("<=", size, splat(0x7F80, _I16X8)), size, splat(0, _I16X8))
    fn = cgutils.get_or_insert_function(b.module, ir.FunctionType(ir.IntType(16), [_I16X8]), "llvm.vector.reduce.umax.v8i16")
    return b.zext(b.call(fn, [numbers]), I64)


def pack(b, machine, values):
    """Eight fp32 -> eight bf16, to nearest even; in integers, since the instruction for it flushes subnormals to zero."""
    bits = b.bitcast(values, _I32X8)
    upper = b.lshr(bits, splat(16, _I32X8))
    odd = b.and_(upper, splat(1, _I32X8))
    rounded = b.lshr(b.add(bits, b.add(odd, splat(0x7FFF, _I32X8))), splat(16, _I32X8))
    nan = b.fcmp_unordered("uno", values, values)
    halves = b.select(nan, b.or_(upper, splat(0x40, _I32X8)), rounded)
    return b.bitcast(b.trunc(halves, _I16X8), V16)


def _e4m3(b, values):
    """Eight fp32 -> eight int32, each an e4m3 code.

    Between 2^e and 2^(e+1) e4m3 has the multiples of 2^(e-3); below 2^-6 it has those of 2^-9, as if e were -6.  Adding
    2^(e+20), whose last bit is worth 2^(e-3), rounds |value| to n such steps, and its bits grow by n.  A normal number has
    the biased exponent e + 7 and n - 8 as its mantissa: its code is 8 (e + 6) + n.  So is a subnormal one's, which is n.
    """
    smallest, largest = splat(127 - 6 << 23, _I32X8), splat(0x43E00000, _I32X8)           # 2^-6, 448
    bits = b.bitcast(values, _I32X8)
    size = b.and_(bits, splat(0x7FFFFFFF, _I32X8))
    size = b.select(b.icmp_signed("<", size, largest), size, largest)
    binade = b.and_(size, splat(0x7F800000, _I32X8))
    binade = b.select(b.icmp_signed(">", binade, smallest), binade, smallest)
    shift = b.add(binade, splat(20 << 23, _I32X8))
    n = b.sub(b.bitcast(b.fadd(b.bitcast(size, _F32X8), b.bitcast(shift, _F32X8)), _I32X8), shift)
    code = b.add(b.lshr(b.sub(binade, smallest), splat(20, _I32X8)), n)
    sign = b.and_(b.lshr(bits, splat(24, _I32X8)), splat(0x80, _I32X8))
    return b.select(b.fcmp_unordered("uno", values, values), splat(0x7F, _I32X8), b.or_(code, sign))


def to_e4m3(b, machine, low, high, factor):
    codes = [_e4m3(b, b.fmul(unpack(b, v), broadcast(b, factor))) for v in (low, high)]
    both = b.shuffle_vector(*codes, ir.Constant(ir.VectorType(I32, 16), list(range(16))))
    return b.bitcast(b.trunc(both, _I8X16), V16)


# ---- waiting for others ----------------------------------------------------------------------------------------------

BARRIER_BYTES = 64                              # more than a pthread_barrier_t has, and a cache line


def barriers(sizes):
    """Barriers (bytes; the caller keeps them), `BARRIER_BYTES` apart, each for as many threads as `sizes` says."""
    memory = (ctypes.c_int64 * (BARRIER_BYTES // 8 * len(sizes)))()
    for k, size in enumerate(sizes):
        libc.pthread_barrier_init(ctypes.byref(memory, BARRIER_BYTES * k), None, size)
    return memory


def meet(b, machine, barrier):
    wait = cgutils.get_or_insert_function(b.module, ir.FunctionType(I32, [I64]), "pthread_barrier_wait")
    b.call(wait, [barrier])


def rest(b, machine, long):
    """Give up the time slice, or sleep if `long`: 50 us, which is how exact the sleeps of Linux are."""
    time = cgutils.alloca_once_value(b, ir.Constant(ir.ArrayType(I64, 2), [0, 50_000]))          # seconds, nanoseconds
    sleep = cgutils.get_or_insert_function(b.module, ir.FunctionType(I32, [time.type, time.type]), "nanosleep")
    give_way = cgutils.get_or_insert_function(b.module, ir.FunctionType(I32, []), "sched_yield")
    with b.if_else(b.icmp_signed("!=", long, ir.Constant(I64, 0))) as (sleeping, yielding):
        with sleeping:
            b.call(sleep, [time, ir.Constant(time.type, None)])
        with yielding:
            b.call(give_way, [])


# ---- the rest --------------------------------------------------------------------------------------------------------

def constant(value):
    return lambda b, *_: ir.Constant(I64, value)


def intrinsic(name):
    """An LLVM intrinsic from int64 to int64."""
    def emit(b, machine, value):
        flag = [ir.Constant(ir.IntType(1), 0)] if "cttz" in name else []
        fn = cgutils.get_or_insert_function(b.module, ir.FunctionType(I64, [I64] + [f.type for f in flag]), name)
        return b.call(fn, [value] + flag)
    return emit


def clock(b, machine):
    """CLOCK_MONOTONIC in nanoseconds."""
    now = cgutils.alloca_once(b, ir.ArrayType(I64, 2))
    read = cgutils.get_or_insert_function(b.module, ir.FunctionType(I32, [I32, now.type]), "clock_gettime")
    b.call(read, [ir.Constant(I32, 1), now])
    seconds, nanoseconds = (b.load(cgutils.gep_inbounds(b, now, 0, k)) for k in (0, 1))
    return b.add(b.mul(seconds, ir.Constant(I64, 10**9)), nanoseconds)
