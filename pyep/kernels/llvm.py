"""What the ops look like on the CPU: small functions (builder, machine, *values) -> value that emit LLVM instructions."""
import ctypes

from llvmlite import binding, ir
from numba.core import cgutils

I32, I64 = ir.IntType(32), ir.IntType(64)
V16 = ir.VectorType(I32, 4)
_I16X8, _I32X8, _F32X8 = ir.VectorType(ir.IntType(16), 8), ir.VectorType(I32, 8), ir.VectorType(ir.FloatType(), 8)

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
    return b.inttoptr(address, t.as_pointer())


def load(t=I64, order=None):
    """Load a `t`, widened to int64 with its sign if it is a smaller integer; `order` makes it atomic."""
    def emit(b, machine, address):
        p = pointer(b, address, t)
        if t == V16:
            return b.load(p, align=16)
        value = b.load_atomic(p, order, 8) if order else b.load(p)
        return b.sext(value, I64) if t == I32 else value
    return emit


def store(t=I64, order=None):
    """Store a `t` (an int64 is cut down to it); `order` makes it atomic."""
    def emit(b, machine, address, value):
        p = pointer(b, address, t)
        if t == I32:
            value = b.trunc(value, I32)
        if order:
            b.store_atomic(value, p, order, 8)
        else:
            b.store(value, p, align=16 if t == V16 else None)
    return emit


def load_fresh(b, machine, address):
    """Load 16 bytes that another rank may be writing: the empty asm keeps LLVM from reusing an earlier load."""
    b.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], side_effect=True)
    return b.load(pointer(b, address, V16), align=16)


def load_if(load):
    """A 16-byte load where the second argument is not 0, else zeros."""
    def emit(b, machine, address, wanted):
        with b.if_else(b.icmp_signed("!=", wanted, ir.Constant(I64, 0))) as (then, otherwise):
            with then:
                value, came_from = load(b, machine, address), b.block
            with otherwise:
                nothing = b.block
        result = b.phi(V16)
        result.add_incoming(value, came_from)
        result.add_incoming(splat(0), nothing)
        return result
    return emit


def add_atomic(order):
    return lambda b, machine, address, value: b.atomic_rmw("add", pointer(b, address), value, order)


def swap_atomic(b, machine, address, expected, value):
    return b.extract_value(b.cmpxchg(pointer(b, address), expected, value, "acq_rel", "acquire"), 0)


# ---- vectors ---------------------------------------------------------------------------------------------------------

def splat(value, t=V16):
    return ir.Constant(t, [value] * t.count)


_ABSENT = splat(-1)


def absent(b, machine, v):
    hits = b.bitcast(b.icmp_signed("==", v, _ABSENT), ir.IntType(4))
    return b.zext(b.icmp_unsigned("!=", hits, ir.Constant(ir.IntType(4), 0)), I64)


def present(b, machine, v):
    return b.select(b.icmp_signed("==", v, _ABSENT), splat(0x7FFFFFFF), v)


def unpack(b, v):
    """Eight bf16 -> eight fp32: a bf16 is the upper half of an fp32."""
    wide = b.zext(b.bitcast(v, _I16X8), _I32X8)
    return b.bitcast(b.shl(wide, splat(16, _I32X8)), _F32X8)


def fma(b, machine, v, weight, total):
    weights = cgutils.alloca_once(b, _F32X8)
    value = b.load(weights)                        # undefined lanes, all overwritten
    for k in range(8):
        value = b.insert_element(value, weight, ir.Constant(I32, k))
    fn = cgutils.get_or_insert_function(b.module, ir.FunctionType(_F32X8, [_F32X8] * 3), "llvm.fma.v8f32")
    return b.call(fn, [unpack(b, v), value, total])


def as_float(b, machine, bits):
    return b.bitcast(b.trunc(bits, I32), ir.FloatType())


def pack(b, machine, values):
    """Eight fp32 -> eight bf16, to nearest even; in integers, since the instruction for it flushes subnormals to zero."""
    bits = b.bitcast(values, _I32X8)
    upper = b.lshr(bits, splat(16, _I32X8))
    odd = b.and_(upper, splat(1, _I32X8))
    rounded = b.lshr(b.add(bits, b.add(odd, splat(0x7FFF, _I32X8))), splat(16, _I32X8))
    nan = b.fcmp_unordered("uno", values, values)
    halves = b.select(nan, b.or_(upper, splat(0x40, _I32X8)), rounded)
    return b.bitcast(b.trunc(halves, _I16X8), V16)


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


def yield_core(b, machine, ns):
    b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(I32, []), "sched_yield"), [])
