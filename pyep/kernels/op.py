"""How an operation of the kernel language is declared, and how a kernel is bound to a machine.

A kernel is a plain, undecorated Python function over int64 scalars (addresses, sizes, counters).  It calls ops (declared in
`lang.py`) and other plain functions.  `bind(kernel, machine)` returns the same function for Numba to compile, in which each
op has become

* on `CUDA`: its inline PTX,
* on a `Cpu`: a call to the LLVM builder, or its own Python body where that body is the implementation.

Names in capitals that a kernel uses are its template parameters: `bind(kernel, machine, TOPK=8)` compiles them in.
"""
import functools
import inspect
from types import FunctionType
from typing import NamedTuple

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import register_model

from . import cache
from .collectives import code_of

i32, i64, f32, void = types.int32, types.int64, types.float32, types.void


class Cpu(NamedTuple):
    """The CPU as a machine: how many threads a block has and how many of them make a warp, compiled into the kernel.

    One thread a block is the fast shape; wider ones run the lane, warp and block logic without a GPU.
    """

    threads: int = 1
    warp: int = 1


CUDA = "cuda"


# ---- vectors: one value to the kernel, an LLVM vector on the CPU, a tuple of registers on a GPU ----------------------

class Vector(types.Type):
    """`count` values of `element` that travel together; `v16` and `f32x8` below are the two there are."""

    def __init__(self, name, element, count, cpu_type):
        super().__init__(name)
        self.registers, self.cpu_type = types.UniTuple(element, count), cpu_type


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, fe_type.cpu_type)


v16 = Vector("v16", i64, 2, ir.VectorType(ir.IntType(32), 4))          # 16 bytes of memory, for instance eight bf16
f32x8 = Vector("f32x8", f32, 8, ir.VectorType(ir.FloatType(), 8))      # eight fp32: the values of a v16 of bf16


def type_on(machine, t):
    """The Numba type of a language type on a machine."""
    return t.registers if machine == CUDA and isinstance(t, Vector) else t


# ---- ops -------------------------------------------------------------------------------------------------------------

class Op:
    """One operation.  `on(machine)` is the Numba function that a bound kernel calls in its place."""

    def __init__(self, fn, ret, args, ptx, cpu, pure, collective):
        functools.update_wrapper(self, fn)
        self.fn, self.ret, self.args, self.ptx, self.cpu, self.pure, self.collective = fn, ret, args, ptx, cpu, pure, collective
        # What its code depends on, see `cache.key`; pyep's own sources count as a whole, and to go through them would take long.
        self.declaration = () if fn.__module__.startswith("pyep.") else (fn, repr((ret, args)), ptx, cpu, pure, collective)

    def __call__(self, *args):
        raise TypeError(f"{self.__name__} is an op of the kernel language: it runs in a kernel, see pyep.kernels.op.bind")

    @functools.cache
    def on(self, machine):
        if machine != CUDA and self.cpu is None:
            return helper(self.fn, machine, {})
        if machine == CUDA:
            from numba.cuda.extending import intrinsic
            from numba.cuda.typing import signature
            codegen = self._ptx
        else:
            from numba.core.typing import signature
            from numba.extending import intrinsic
            codegen = functools.partial(self._llvm, machine)
        sig = signature(type_on(machine, self.ret), *(type_on(machine, a) for a in self.args))

        def define(typingctx, *args):
            return sig, codegen
        names = ("typingctx", *inspect.signature(self.fn).parameters)     # Numba checks calls against these names
        define.__signature__ = inspect.Signature([inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names])
        define.__name__ = self.__name__
        return intrinsic(define)

    def _llvm(self, machine, context, builder, sig, values):
        result = self.cpu(builder, machine, *values)
        return context.get_dummy_value() if self.ret == void else result

    def _ptx(self, context, builder, sig, values):
        if callable(self.ptx):
            return self.ptx(builder, *values)
        flat = []
        for value in values:
            flat += cgutils.unpack_tuple(builder, value) if isinstance(value.type, ir.ArrayType) else [value]
        outs, ins = _registers(self.ret), [r for a in self.args for r in _registers(a)]
        constraints = ["=&" + _CONSTRAINT[t] for t in outs] + [_CONSTRAINT[t] for t in ins]
        if not self.pure:
            constraints.append("~{memory}")
        out_types = [context.get_value_type(t) for t in outs]
        ret = ir.VoidType() if not outs else out_types[0] if len(outs) == 1 else ir.LiteralStructType(out_types)
        asm = ir.InlineAsm(ir.FunctionType(ret, [v.type for v in flat]), self.ptx, ",".join(constraints), side_effect=not self.pure)
        result = builder.call(asm, flat, attrs=("convergent",) if self.collective else ())
        if not outs:
            return context.get_dummy_value()
        if len(outs) == 1:
            return result
        return cgutils.pack_array(builder, [builder.extract_value(result, k) for k in range(len(outs))])


_CONSTRAINT = {i32: "r", i64: "l", f32: "f"}


def _registers(t):
    return () if t == void else (t.registers.dtype,) * t.registers.count if isinstance(t, Vector) else (t,)


def op(ret=void, args=(), *, ptx, cpu=None, pure=False, collective=False):
    """Declare an op.

    ptx: inline PTX, `$0..` being the results followed by the arguments (a vector counts as its registers), or a function
         (builder, *values) -> value.
    cpu: a function (builder, machine, *values) -> value; without it the Python body is compiled.
    pure: no memory is touched, or none that ever changes, so calls may be merged, moved or dropped.
    collective: the lanes act together, so LLVM must not copy or move the call into a branch ("convergent").
    """
    return lambda fn: Op(fn, ret, args, ptx, cpu, pure, collective)


# ---- functions that kernels call -------------------------------------------------------------------------------------

RARE = set()
HELPERS = {}                                              # compiled ones (Numba's dispatchers), by name


def rare(fn):
    """Mark a helper that hardly ever runs: on the CPU it stays out of line, so that the loops around it keep their registers."""
    RARE.add(fn)
    return fn


def helper(fn, machine, constants):
    """A function that kernels call, for Numba to call: one for all kernels that want the same, since a kernel has dozens of them.

    Its name tells all that its machine code depends on.  Code from the disk cache brings the symbols of its helpers along, and
    what has the same name must be the same thing in every process.
    """
    name = cache.key(fn, machine, constants)
    if name not in HELPERS:
        bound = bind(fn, machine, **constants)
        bound.__name__ = bound.__qualname__ = name
        HELPERS[name] = for_numba(bound, machine, fn in RARE)
    return HELPERS[name]


def for_numba(bound, machine, rare):
    """A function that Numba compiles into those that call it."""
    if machine == CUDA:
        from numba import cuda
        return cuda.jit(device=True, forceinline=True)(bound)     # by NVVM: with `inline` Numba would do it, ten times slower
    # Without wrappers, which only Python would call: they take a quarter of the time to compile.
    return numba.njit(error_model="numpy", forceinline=not rare, no_cpython_wrapper=True, no_cfunc_wrapper=True)(bound)


def bind(fn, machine, **constants):
    """`fn` for one machine: its ops and the plain functions it calls become that machine's, `constants` replace globals."""
    names = dict(fn.__globals__)
    for name in fn.__code__.co_names:
        value = names.get(name)
        if name in constants:
            names[name] = constants[name]
        elif isinstance(value, Op):
            names[name] = value.on(machine)
        elif isinstance(value, FunctionType):
            names[name] = helper(value, machine, constants)
    return FunctionType(code_of(fn), names, fn.__name__, fn.__defaults__, fn.__closure__)
