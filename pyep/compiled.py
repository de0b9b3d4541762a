"""`torch.compile` leaves the public functions alone: they launch kernels, which it cannot see into.

A compiled function that calls one has a graph break there and nothing else: pyep's own code is not traced, nothing is compiled anew
at the next call, and nobody is warned.  This is what `torch.compiler.disable` does, without the wrapper that it puts around a
function, which each call would go through that is not compiled, and without importing PyTorch, let alone its compiler.
"""
import functools
import inspect
import sys
import types

WHY = "it launches kernels and returns handles, which cannot be traced"
SPECIAL = "__call__", "__enter__", "__exit__"


def leave_alone(*kinds):
    """Mark the public functions of classes."""
    for kind in kinds:
        for function in _public(kind):
            _keep_frames_out(function, "torch" in sys.modules)


@functools.cache
def _public(kind):
    members = ((name, inspect.getattr_static(kind, name)) for name in dir(kind))
    functions = [(name, getattr(member, "__func__", member)) for name, member in members]
    return [f for name, f in functions if isinstance(f, types.FunctionType) and (name in SPECIAL or not name.startswith("_"))]


@functools.cache
def _keep_frames_out(function, torch_is_there):
    function._torchdynamo_disable, function._torchdynamo_disable_msg = True, WHY         # where a caller is traced
    if torch_is_there:                                                                   # where it runs, after the graph break
        from torch._C._dynamo import eval_frame
        if hasattr(eval_frame, "set_code_exec_strategy"):
            skip = eval_frame._FrameAction.SKIP
            eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
