"""Which arguments of the public calls compile kernels when they change: the tables of docs/settings.md, row by row.

Nothing is compiled or run.  The engine only notes by which names kernels would be looked for, in the process and on disk; a row's
operations are those whose names are others than without the change.
"""
import ctypes
import functools
import importlib.util
import pathlib
import re

import numpy as np
import pytest
import ranks
from engine import make_buffer
from launches import launches
from ml_dtypes import bfloat16, float8_e4m3fn

from pyep import Buffer
from pyep.config import Config
from pyep.high_throughput import Kernels, Shape
from pyep.high_throughput_errors import COMBINE, DISPATCH
from pyep.kernels import cache
from pyep.kernels.cpu import CpuEngine
from pyep.kernels.intranode_notify import STATE
from pyep.kernels.op import CUDA
from pyep.layout import LowLatency

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs" / "settings.md"
T, M, H, E, K = 3, 8, 512, 8, 3
KERNELS = {"low_latency": 2 + 2, "high_throughput": 1 + 2 + 1}  # of a first call: send and receive halves; layout, notify, ..
OF = {"layout": "get_dispatch_layout", "notify": "dispatch", "combine_reduced": "combine"}     # else the kernel's own name

# What is changed, by the rows of the tables: (arguments of `low_latency` below, or of `high_throughput`; those they are compared
# with, if it is not none).
LOW_LATENCY = {
    "the hidden size of `x`": (dict(hidden=1024), {}),
    "the top-k of `topk_idx`": (dict(topk=4), {}),
    "`num_experts`": (dict(experts=16), {}),
    "the number of ranks": (dict(num_ranks=1), {}),
    "the ranks of a node: all or fewer": (dict(per_node="1"), {}),
    "`output_layout`": (dict(output_layout="rank_major"), {}),
    "`topk_weights` of dispatch: given or None": (dict(weighted=True), {}),
    "int32 or int64 in `topk_idx`": (dict(index="int32"), {}),
    "`use_fp8`": (dict(use_fp8=False), {}),
    "`round_scale`": (dict(round_scale=True), {}),
    "`use_ue8m0`": (dict(round_scale=True, use_ue8m0=True), dict(round_scale=True)),
    "`num_max_dispatch_tokens_per_rank`": (dict(max_tokens=5), {}),
    "the number of tokens": (dict(tokens=0), {}),
    "the values of all arrays": (dict(shift=1), {}),
    "`cumulative_local_expert_recv_stats`, `.._wait_recv_cost_stats`": (dict(stats=True), {}),
    "`out`": (dict(out=True), {}),
    "`zero_copy`": (dict(zero_copy=True), {}),
    "`return_recv_hook`": (dict(return_recv_hook=True), {}),
    "`async_finish`": (dict(async_finish=True), {}),
    "`previous_event`": (dict(previous_event=True), {}),
    "NumPy or PyTorch": (dict(library="torch"), {}),
    "another `Buffer` of as many ranks": (dict(buffer=dict(timeout_s=7, num_rdma_bytes=2**26)), {}),
}
HIGH_THROUGHPUT = {
    "the hidden size of `x`": (dict(hidden=1024), {}),
    "the top-k of `topk_idx` and of combine's `topk_weights`": (dict(topk=4), {}),
    "`num_experts`": (dict(experts=16), {}),
    "the number of ranks": (dict(num_ranks=1), {}),
    "int32 or int64 in `topk_idx`": (dict(index="int32"), {}),
    "`topk_idx` of dispatch: given or None": (dict(carried="nothing"), dict(carried="indices")),
    "`topk_weights` of dispatch: given or None": (dict(carried="indices"), {}),
    "`topk_weights` of combine: given or None": (dict(sum_weights=False), {}),
    "`handle` of dispatch: given or None": (dict(cached=True), {}),
    "`num_worst_tokens`: 0 or not": (dict(num_worst_tokens=9), {}),
    "`num_worst_tokens`, not 0": (dict(num_worst_tokens=10), dict(num_worst_tokens=9)),
    "the scales of `x`: given or not, how many bytes a row": (dict(x="e4m3"), dict(x="bytes")),
    "scales of one or two bytes: in words of four or not": (dict(x="bytes, columns"), dict(x="bytes")),
    "the dtype of `x`, of as many bytes a row": (dict(x="rows of bytes"), {}),
    "the dtype of scales, of as many bytes": (dict(x="e4m3, int32"), dict(x="e4m3")),
    "the strides of `x` and of its scales": (dict(x="e4m3, columns"), dict(x="e4m3")),
    "the number of tokens": (dict(tokens=0), {}),
    "the values of all arrays": (dict(shift=1), {}),
    "`expert_alignment`": (dict(expert_alignment=4), {}),
    "`bias`": (dict(bias=True), {}),
    "`config`, `Buffer.set_num_sms`": (dict(config=Config(num_sms=4)), {}),
    "`async_finish`": (dict(async_finish=True), {}),
    "`previous_event`": (dict(previous_event=True), {}),
    "NumPy or PyTorch": (dict(library="torch"), {}),
    "another `Buffer` of as many ranks": (dict(buffer=dict(timeout_s=7, num_nvl_bytes=2**23)), {}),
}


# ---- the calls -------------------------------------------------------------------------------------------------------

def in_library(library, array):
    """The array, or PyTorch's tensor over it."""
    if library == "numpy" or array is None:
        return array
    import torch
    if array.dtype == bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def selections(tokens, topk, experts, index, shift):
    return ((np.arange(tokens * topk).reshape(tokens, topk) + shift) % experts).astype(index)


def low_latency(buf, tokens=T, max_tokens=M, hidden=H, experts=E, topk=K, index="int64", weighted=False, shift=0, stats=False,
                out=False, zero_copy=False, library="numpy", previous_event=False, **options):
    """A dispatch and its combine."""
    of = functools.partial(in_library, library)
    ranks, local = buf.group_size, experts // buf.group_size
    x, idx = of(np.zeros((tokens, hidden), bfloat16)), of(selections(tokens, topk, experts, index, shift))
    weights = of(np.zeros((tokens, topk), np.float32))
    counted = dict(cumulative_local_expert_recv_stats=np.zeros(local, np.int32),
                   dispatch_wait_recv_cost_stats=np.zeros(ranks, np.int64)) if stats else {}
    waited = dict(combine_wait_recv_cost_stats=np.zeros(ranks, np.int64)) if stats else {}
    run = {name: options.pop(name) for name in ("async_finish", "return_recv_hook") if name in options}
    run |= dict(previous_event=buf.capture()) if previous_event else {}
    got = buf.low_latency_dispatch(x, idx, max_tokens, experts, topk_weights=weights if weighted else None, **counted, **run,
                                   **options)
    if got.hook:
        got.hook()
    y = buf.get_next_low_latency_combine_buffer(got.handle)
    combined = buf.low_latency_combine(y, idx, weights, got.handle, out=of(np.zeros((tokens, hidden), bfloat16)) if out else None,
                                       zero_copy=zero_copy, **waited, **run)
    if combined[2]:
        combined[2]()


def rows_of(kind, tokens, hidden):
    """x of a high-throughput dispatch."""
    if kind == "bf16":
        return np.zeros((tokens, hidden), bfloat16)
    if kind == "rows of bytes":
        return np.zeros((tokens, 2 * hidden), np.uint8)
    values, *how = kind.split(", ")
    dtype, item, count = (float8_e4m3fn, np.float32, 4) if values == "e4m3" else (np.uint8, np.uint8, 12)
    item = np.int32 if "int32" in how else item
    scales = np.zeros((count, tokens), item).T if "columns" in how else np.zeros((tokens, count), item)
    apart = 2 if "columns" in how else 1
    return np.zeros((tokens, apart * hidden), dtype)[:, :hidden], scales


def high_throughput(buf, tokens=T, hidden=H, experts=E, topk=K, index="int64", x="bf16", carried="weights", sum_weights=True,
                    cached=False, shift=0, bias=False, library="numpy", previous_event=False, config=None, async_finish=False,
                    **options):
    """A layout, a dispatch, perhaps a cached one, and a combine."""
    of = functools.partial(in_library, library)
    x, idx = rows_of(x, tokens, hidden), of(selections(tokens, topk, experts, index, shift))
    x = tuple(map(of, x)) if isinstance(x, tuple) else of(x)
    weights = of(np.zeros((tokens, topk), np.float32))
    run = dict(async_finish=async_finish, **dict(previous_event=buf.capture()) if previous_event else {})
    per_rank, _, per_expert, in_rank, _ = buf.get_dispatch_layout(idx, experts, **run)
    handle = buf.dispatch(x, None, per_rank, None, in_rank, per_expert, idx if carried != "nothing" else None,
                          weights if carried == "weights" else None, config=config, **options, **run)[4]
    if cached:
        buf.dispatch(x, handle, config=config, **run)
    rows = len(handle[1])
    buf.combine(of(np.zeros((rows, hidden), bfloat16)), handle, of(np.zeros((rows, topk), np.float32)) if sum_weights else None,
                of(np.zeros((tokens, hidden), bfloat16)) if bias else None, config, **run)


# ---- what they would compile -----------------------------------------------------------------------------------------

class Noted:
    """A kernel that does nothing, but that a notify tells the host that no row comes."""

    def __init__(self, fn):
        self._tells = fn.__name__ == "notify"

    def launch(self, stream, *args):
        if self._tells and args[-1]:
            ctypes.c_int64.from_address(args[-1] + 8 * STATE).value = 1


def kernels_of(comm, family, per_node=None, buffer={}, **arguments):
    """The names, on disk, of the kernels that calls use: {(operation, name)}."""
    names = set()

    def kernel(self, fn, blocks, threads, shared_bytes=0, overlap=False, **constants):
        names.add((OF.get(fn.__name__, fn.__name__), cache.key(fn, self.machine, constants)))
        return Noted(fn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuEngine, "kernel", kernel)
        patch.delenv("PYEP_CPU_SHAPE", raising=False)
        if per_node:
            patch.setenv("PYEP_RANKS_PER_NODE", per_node)
        nbytes = Buffer.get_high_throughput_size_hint(M, 2 * H, comm.size, K + 1)
        with make_buffer(comm, M, 2 * H, 2 * E, K + 1, **dict(num_nvl_bytes=nbytes, transport="host") | buffer) as buf:
            dict(low_latency=low_latency, high_throughput=high_throughput)[family](buf, **arguments)
    return names


def kernels_of_all(comm, family, calls):
    return [kernels_of(comm, family, **arguments) for arguments in calls]


def kernels_by_call(family, calls):
    """The same for each of these calls, on as many ranks as it says, or two."""
    found = {}
    for num_ranks in (1, 2):
        chosen = [call for call in calls if call.get("num_ranks", 2) == num_ranks]
        bare = [{name: value for name, value in call.items() if name != "num_ranks"} for call in chosen]
        found |= zip(map(repr, chosen), ranks.run(num_ranks, kernels_of_all, family, bare)[0])
    return found


def table(heading):
    """{what changes: what is compiled} of the table below a heading of the docs."""
    section = DOCS.read_text().split(f"\n### {heading}\n")[1].split("\n#")[0]
    rows = re.findall(r"^\| (.*?) \| (.*?) \|$", section, re.M)
    return dict(rows[1:])                                        # without the head; the line below it has no spaces


@pytest.mark.parametrize("family, changes", [("low_latency", LOW_LATENCY), ("high_throughput", HIGH_THROUGHPUT)])
def test_docs_tell_what_is_compiled(family, changes):
    told = table(family.replace("_", " ").capitalize())
    assert list(told) == list(changes)
    if importlib.util.find_spec("torch") is None:
        changes = {name: pair for name, pair in changes.items() if "PyTorch" not in name}
    found = kernels_by_call(family, [call for pair in changes.values() for call in pair])
    assert len(found[repr({})]) == KERNELS[family]
    for what, (changed, base) in changes.items():
        new = {operation for operation, _ in found[repr(changed)] - found[repr(base)]}
        order = [operation for operation in ("get_dispatch_layout", "dispatch", "combine") if operation in new]
        assert told[what] == (", ".join(order) or "nothing"), what


@pytest.mark.parametrize("mode", [dict(weighted=True), dict(output_layout="rank_major")])
def test_a_combine_without_topk_idx_takes_its_dispatch_to_be_right(mode):
    """It compiles no dispatch for the integers that are the default."""
    names = ranks.run(1, kernels_of, "low_latency", index="int32", **mode)[0]
    assert len(names) == KERNELS["low_latency"]


# ---- what is said of GPUs --------------------------------------------------------------------------------------------

def code(launch):
    """What tells a launch's machine code from another's."""
    return cache.key(launch.fn, (CUDA, launch.threads), launch.constants)


@pytest.fixture
def gpu():
    pytest.importorskip("cuda.core")
    pytest.importorskip("numba_cuda")
    from test_gpu_code import Gpu
    return Gpu()


def test_gpus_have_two_sets_of_kernels_for_tokens(gpu):
    few, *more_few, many, most = [
        set(map(code, launches(gpu, LowLatency(4, max_tokens, 7168, 256, 8), 8).values())) for max_tokens in (1, 8, 16, 17, 4096)]
    assert all(few == others for others in more_few) and many == most and not few & many


def test_gpus_compile_a_combine_for_few_multiprocessors(gpu):
    def codes(operation, experts, num_sms):
        shape = Shape(operation, 4, 7168, num_topk=8, weighted=True, num_experts=experts, counts="exchanged" if experts else "")
        return set(map(code, Kernels(gpu, 4).of(shape, 8, 0, num_sms).values()))
    assert codes(DISPATCH, 256, 2) == codes(DISPATCH, 256, 64)
    assert codes(COMBINE, 0, 24) == codes(COMBINE, 0, 132)
    assert len(set.union(*[codes(COMBINE, 0, num_sms) for num_sms in range(2, 26, 2)])) == 12
