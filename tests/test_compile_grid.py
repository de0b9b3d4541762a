"""No shape ends the process by an abort of the compiler: a sample of the grid of shapes is compiled, in a campaign a large one.

The whole of it, in parts: see `kernel_grid`.
"""
import os

import pytest
from compiling import Job, compile_all
from kernel_grid import engines, jobs_of
from llvmlite import ir
from numba.core import cgutils

from pyep.kernels.lang import st8
from pyep.kernels.op import CUDA, Cpu, op

EXAMPLES = int(os.environ.get("PYEP_TEST_EXAMPLES", 100))
COUNT = max(1, EXAMPLES // 10)                                  # kernels of a sample
pytestmark = pytest.mark.timeout(600 + 60 * COUNT)              # seconds, on a busy machine


def report(wrong):
    return "\n".join(f"{job.name}\n{error}" for job, error in wrong)


def test_a_sample_of_the_grid_can_be_compiled():
    wrong = compile_all(jobs_of(engines())[:COUNT])
    assert not wrong, report(wrong)


@pytest.mark.skipif(EXAMPLES <= 100, reason="only in campaigns: test_gpu_code.py compiles for GPUs")
def test_a_sample_of_the_grid_can_be_compiled_for_gpus():
    jobs = [job for job in jobs_of(engines(gpu=True)) if job.machine == CUDA]
    wrong = compile_all(jobs[:COUNT])
    assert not wrong, report(wrong)


# ---- that it would be noticed ----------------------------------------------------------------------------------------

def barrier_of_a_gpu(builder, machine):
    """What LLVM has no instruction for on a CPU: it aborts when it comes to choose one."""
    barrier = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), []), "llvm.nvvm.barrier0")
    return builder.call(barrier, [])


@op(ptx="bar.sync 0;", cpu=barrier_of_a_gpu)
def unknown():
    """An op that ends the compiler."""


VALUE = 0


def aborts(out):
    st8(out, VALUE)
    unknown()


def compiles(out):
    st8(out, VALUE)


def fails(out):
    st8(out, "text")


def test_an_abort_is_told_with_its_shape():
    """And all others are compiled, some by another process."""
    jobs = [Job(f"{fn.__name__} {value}", fn, Cpu(1, 1), 1, dict(VALUE=value))
            for fn, value in ((compiles, 1), (aborts, 1), (compiles, 2), (fails, 1), (compiles, 3))]
    noted = []
    wrong = compile_all(jobs, 1, lambda job, error: noted.append((job.name, error is None)))
    assert noted == [("compiles 1", True), ("aborts 1", False), ("compiles 2", True), ("fails 1", False), ("compiles 3", True)]
    told = report(wrong)
    assert "aborts 1\nthe process ended by SIGABRT" in told and "LLVM ERROR" in told and "fails 1\nTraceback" in told
