"""What a GPU will run, checked without one: the PTX, what the assembler says of it, and the machine code.

The kernels are compiled as CudaEngine does it for a GPU of 132 multiprocessors (H100, H200): every launch of one
published shape, and of two odd shapes those that send and receive at once.
"""
import functools
import importlib.util
import os
import pathlib
import re
import subprocess
import tempfile
from types import FunctionType
from typing import NamedTuple

import pytest

pytest.importorskip("cuda.core")
pytest.importorskip("numba_cuda")

import test_lang  # noqa: E402
from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib  # noqa: E402

from pyep.kernels import cuda, lang  # noqa: E402
from pyep.kernels.lang import ld4_nc_if, ld8_nc_if, ld8_relaxed_if, st8  # noqa: E402
from pyep.kernels.op import Op  # noqa: E402
from pyep.layout import LowLatency  # noqa: E402
from pyep.low_latency import make_plan  # noqa: E402

try:
    for library in ("nvvm", "nvJitLink"):
        load_nvidia_dynamic_lib(library)
except DynamicLibNotFoundError as error:
    pytest.skip(f"nothing to compile with: {error}", allow_module_level=True)

REGISTERS = 65536                       # of a multiprocessor
SHARED = 227 << 10                      # bytes of shared memory that a block may have
WARP = 32

# name: (shape, bytes of an entry of topk_idx, threads of a block)
SHAPES = {
    "published": (LowLatency(num_ranks=4, max_tokens=128, hidden=7168, num_experts=256, num_topk=8), 8, 896),
    "smallest rows": (LowLatency(num_ranks=3, max_tokens=5, hidden=8, num_experts=6, num_topk=1), 4, 32),
    "large rows": (LowLatency(num_ranks=8, max_tokens=128, hidden=16384, num_experts=64, num_topk=6), 8, 1024),
}


class Launch(NamedTuple):
    """What CudaEngine.kernel is asked for."""

    fn: object
    blocks: int
    threads: int
    shared_bytes: int
    constants: dict


class Blueprint(cuda.CudaEngine):
    """The engine of a GPU that is not there: it notes its launches."""

    def __init__(self):
        self.index, self.cc, self.multiprocessors = 0, (9, 0), 132

    def kernel(self, fn, blocks, threads, shared_bytes=0, **constants):
        return Launch(fn, blocks, threads, shared_bytes, constants)


def launches():
    """All that is compiled here: {(name of the shape, operation, phase): Launch}."""
    chosen = {}
    for name, (shape, index_bytes, _) in SHAPES.items():
        plan = make_plan(Blueprint(), shape, index_bytes, 0)
        for operation, phases in (("dispatch", plan.dispatch), ("combine", plan.combine)):
            chosen |= {(name, operation, phase): launch for phase, launch in phases.items()
                       if name == "published" or phase == "both"}
    return chosen


LAUNCHES = launches()


# ---- compiling and taking apart --------------------------------------------------------------------------------------

class Code(NamedTuple):
    """A compiled kernel: its PTX, the assembler's report, machine code."""

    ptx: str
    log: str
    cubin: bytes


@functools.cache
def compiled(fn, threads, constants=()):
    text = cuda.ptx(fn, threads, **dict(constants))
    cubin, log = cuda.link(text)
    return Code(text, log, cubin)


def code_of(key):
    launch = LAUNCHES[key]
    return compiled(launch.fn, launch.threads, tuple(sorted(launch.constants.items())))


@pytest.fixture(scope="module", params=LAUNCHES, ids="-".join)
def case(request):
    """(operation, phase, Launch, Code) of one launch."""
    return *request.param[1:], LAUNCHES[request.param], code_of(request.param)


@functools.cache
def nvdisasm():
    """The disassembler's path, or None."""
    found = importlib.util.find_spec("nvidia")
    for folder in found.submodule_search_locations if found else ():
        for file in pathlib.Path(folder).glob("**/bin/nvdisasm"):
            return str(file)
    return None


@functools.cache
def sass(cubin):
    """The opcodes of machine code, with their modifiers, in order."""
    if nvdisasm() is None:
        pytest.skip("no nvdisasm: pip install nvidia-cuda-nvdisasm")
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "kernel.cubin")
        pathlib.Path(file).write_bytes(cubin)
        text = subprocess.run([nvdisasm(), "-c", file], capture_output=True, text=True, check=True).stdout
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, re.M)
    assert "EXIT" in opcodes, text[:2000]
    return opcodes


def memory_instructions(text):
    """The loads, stores and atomics in PTX, parameters excepted."""
    return set(re.findall(r"\b((?:ld|ldu|st|red|atom)\.(?!param)[\w.:]+)", text))


def used(log):
    """Registers per thread, from the assembler's report."""
    return int(re.search(r"Used (\d+) registers", log)[1])


# ---- launches --------------------------------------------------------------------------------------------------------

def test_every_kernel_file_is_known():
    """A new file of kernels must be added here: to LAUNCHES, if it has kernels of its own."""
    tools = {"__init__", "cache", "cpu", "cuda", "lang", "llvm", "op"}
    files = {file.stem for file in pathlib.Path(cuda.__file__).parent.glob("*.py")}
    assert files - tools == {"low_latency", "low_latency_dispatch", "low_latency_combine"}


def test_launches_by_hand():
    """132 blocks; in a dispatch a sixth of them send while the others receive."""
    roles = {key[1:]: (launch.constants["SENDERS"], launch.constants["RECEIVERS"]) for key, launch in LAUNCHES.items()}
    assert roles == {
        ("dispatch", "both"): (22, 110), ("dispatch", "send"): (132, 0), ("dispatch", "receive"): (0, 132),
        ("combine", "both"): (132, 132), ("combine", "send"): (132, 0), ("combine", "receive"): (0, 132)}
    for (name, _, _), launch in LAUNCHES.items():
        assert (launch.blocks, launch.threads) == (132, SHAPES[name][2])


def test_shared_memory_fits():
    assert all(0 < launch.shared_bytes <= SHARED for launch in LAUNCHES.values())


# ---- PTX -------------------------------------------------------------------------------------------------------------

ROWS_READ, ROWS_SENT = "ld.global.nc.L1::no_allocate.v2.s64", "st.relaxed.sys.global.L1::no_allocate.v2.s64"
ROWS_POLLED, ROWS_KEPT = "ld.relaxed.sys.global.L1::no_allocate.v2.s64", "st.global.L1::no_allocate.v2.s64"
WORDS_POLLED, WORDS_SENT = "ld.relaxed.sys.global.s64", "st.relaxed.sys.global.s64"
CONSUMED = ["st.release.sys.global.s64", "ld.acquire.sys.global.s64"]       # told to the peers, awaited from them
GIVING_UP = ["atom.acq_rel.sys.global.cas.b64", "st.release.sys.global.s64", "%globaltimer", "nanosleep.u32"]
LISTS = ["vote.sync.ballot.b32", "ld.shared.b64", "st.shared.b64", "bar.sync"]
SUMS = ["fma.rn.f32", "cvt.rn.bf16x2.f32"]

MEANT = {
    ("dispatch", "send"): [ROWS_READ, ROWS_SENT, WORDS_SENT, *CONSUMED, *LISTS],
    ("dispatch", "receive"): [ROWS_POLLED, ROWS_KEPT, WORDS_POLLED, "st.global.u32", *LISTS],
    ("combine", "send"): [ROWS_READ, ROWS_SENT, *CONSUMED, "bar.sync"],
    ("combine", "receive"): [ROWS_POLLED, ROWS_KEPT, *SUMS, *LISTS],
}
NOT_MEANT = {"send": [ROWS_POLLED, ROWS_KEPT, *SUMS], "receive": [ROWS_READ, ROWS_SENT]}

# Weak accesses to single words: the tables and counters that no other rank touches meanwhile.
WEAK = {"ld.global.s64", "ld.global.nc.s64", "ld.global.nc.s32", "st.global.s64", "st.global.u32"}
OPS = {name: op for name, op in vars(lang).items() if isinstance(op, Op)}
KNOWN = set().union(*[memory_instructions(op.ptx) for op in OPS.values() if isinstance(op.ptx, str)])


def phases_of(phase):
    return ("send", "receive") if phase == "both" else (phase,)


def test_ptx_is_for_the_gpu_and_the_block(case):
    operation, _, launch, code = case
    assert ".target sm_90" in code.ptx
    assert re.search(rf"\.maxntid\s+{launch.threads}\b", code.ptx)
    assert re.findall(r"\.entry (\w+)", code.ptx) == ["pyep_" + operation]


def test_ptx_has_what_is_meant(case):
    operation, phase, _, code = case
    meant = [instruction for p in phases_of(phase) for instruction in [*MEANT[operation, p], *GIVING_UP]]
    assert [instruction for instruction in meant if instruction not in code.ptx] == []


def test_ptx_holds_one_role_only(case):
    operation, phase, _, code = case
    absent = NOT_MEANT.get(phase, []) + (SUMS if operation == "dispatch" else [])
    assert [instruction for instruction in absent if instruction in code.ptx] == []


def test_helpers_are_inlined_and_nothing_is_in_local_memory(case):
    code = case[-1]
    for word in ("call.uni", "call (", ".extern .func", ".local"):
        assert word not in code.ptx


def test_memory_is_accessed_by_ops_alone(case):
    """Numba and LLVM add no access of their own, and single words go without an order only where it is meant."""
    found = memory_instructions(case[-1].ptx)
    assert found <= KNOWN
    weak_words = {i for i in found if re.match(r"(ld|st)\.global\.(?!.*\.v2)", i)}
    assert weak_words <= WEAK


def test_arithmetic_is_exact_and_fast(case):
    """No flushing of subnormals, no approximations, no division at run time."""
    text = case[-1].ptx
    assert re.findall(r"\b\w+[\w.]*\.(?:ftz|approx)\b", text) == []
    assert re.findall(r"\b(?:div|rem)\.\w+", text) == []


def test_predicated_loads_keep_their_address(case):
    """The *_if loads zero their result before they use the address: these must be different registers."""
    loads = re.findall(r"@p ld\.\S+ (.+), \[(%\w+)\]", case[-1].ptx)
    assert [load for load in loads if load[1] in re.findall(r"%\w+", load[0])] == []
    assert loads or case[:2] != ("combine", "receive")


# ---- machine code ----------------------------------------------------------------------------------------------------

def test_no_stack_and_no_spills(case):
    report = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    assert re.findall(report, case[-1].log) == [("0", "0", "0")]


def test_registers_of_a_block_fit(case):
    """A multiprocessor gives each warp registers in units of 256."""
    _, _, launch, code = case
    assert used(code.log) <= REGISTERS // launch.threads
    assert launch.threads // WARP * -(-used(code.log) * WARP // 256) * 256 <= REGISTERS


def test_machine_code_has_no_local_memory_and_no_calls(case):
    opcodes = {opcode.split(".")[0] for opcode in sass(case[-1].cubin)}
    assert opcodes & {"LDL", "STL", "CALL"} == set()
    assert opcodes & {"LD", "ST", "ATOM"} == set()              # of generic addresses: LLVM lost track of what they are


VECTORS = {
    ("dispatch", "send"): ["LDG.E.NA.128.CONSTANT", "STG.E.NA.128.STRONG.SYS"],
    ("dispatch", "receive"): ["LDG.E.NA.128.STRONG.SYS", "STG.E.NA.128"],
    ("combine", "send"): ["LDG.E.NA.128.CONSTANT", "STG.E.NA.128.STRONG.SYS"],
    ("combine", "receive"): ["LDG.E.NA.128.STRONG.SYS", "STG.E.NA.128", "FFMA", "F2FP.BF16.F32.PACK_AB"],
}


def test_machine_code_moves_vectors(case):
    operation, phase, _, code = case
    opcodes = set(sass(code.cubin))
    assert [v for p in phases_of(phase) for v in VECTORS[operation, p] if v not in opcodes] == []
    assert {"BAR.SYNC.DEFER_BLOCKING", "ATOMG.E.CAS.64.STRONG.SYS"} <= opcodes


@pytest.mark.parametrize("key", [k for k in LAUNCHES if k[1] == "combine" and k[2] != "send"], ids="-".join)
def test_first_looks_are_under_way_at_once(key):
    """A combine starts four loads of outputs before it uses the first, so that their latencies do not add up."""
    opcodes = sass(code_of(key).cubin)
    of_interest = [o for o in opcodes if o.startswith(("LDG.E.NA.128.STRONG", "STG.E.NA.128", "FFMA"))]
    of_interest = of_interest[of_interest.index("LDG.E.NA.128.STRONG.SYS"):]
    assert of_interest[:4] == ["LDG.E.NA.128.STRONG.SYS"] * 4


# ---- the language ----------------------------------------------------------------------------------------------------

KERNELS = [test_lang.who, test_lang.integers, test_lang.widths, test_lang.wanted_rows, test_lang.count_up,
           test_lang.elect, test_lang.count_by_swaps, test_lang.play, test_lang.play_rows, test_lang.announce,
           test_lang.weigh, test_lang.divide, test_lang.largest, test_lang.quantize, test_lang.tick,
           test_lang.exchange_in_block, test_lang.exchange_words, test_lang.ask_block, test_lang.exchange_in_warp,
           test_lang.ask_lanes, test_lang.follow, test_lang.epochs]


def mnemonics(text):
    """The instructions in inline PTX, such as "popc.b64"."""
    return set(re.findall(r"(?:^|[;{] ?|@p )\s*([a-z]+(?:\.[\w:]+)+)", text, re.M))


def test_every_op_assembles():
    """The kernels that test_lang runs on the CPU, for a GPU."""
    codes = [compiled(kernel, 64) for kernel in KERNELS]
    for kernel, code in zip(KERNELS, codes):
        assert "bytes stack frame" in code.log and ".extern .func" not in code.ptx, kernel.__name__
    text = "\n".join(code.ptx for code in codes)
    names = [name for name, op in OPS.items() if isinstance(op.ptx, str) and not mnemonics(op.ptx) <= mnemonics(text)]
    assert names == []
    registers = {"%tid.x", "%ntid.x", "%ctaid.x", "%nctaid.x", "%laneid", "%globaltimer"}
    assert [r for r in registers if r not in text] == [] and "pyep_shared" in text


def test_collectives_are_convergent():
    """LLVM may not move these into branches; and nothing else is held back by the mark."""
    collectives = {name: op for name, op in OPS.items() if op.collective}
    assert set(collectives) == {"syncthreads", "syncthreads_or", "syncwarp", "shfl", "shfl_xor", "ballot"}
    assert not any(op.pure for op in collectives.values())


def look(address, wanted, out):
    """Loads that may be unwanted, then their sum."""
    relaxed = ld8_relaxed_if(address, wanted & 1) + ld8_relaxed_if(address + 8, wanted & 2)
    st8(out, relaxed + ld8_nc_if(address + 16, wanted & 4) + ld4_nc_if(address + 24, wanted & 8))


def test_words_that_may_be_unwanted_are_loaded_at_once():
    """Without a branch, so that their latencies do not add up."""
    opcodes = sass(compiled(look, 32).cubin)
    loads = [k for k, opcode in enumerate(opcodes) if opcode.startswith("LDG")]
    assert len(loads) == 4
    between = {opcode.split(".")[0] for opcode in opcodes[loads[0]:loads[-1]]}
    assert between & {"BRA", "BSSY", "IADD3"} == set()


def test_conversion_to_e4m3_takes_one_instruction_a_pair():
    opcodes = sass(compiled(test_lang.quantize, 64).cubin)
    assert opcodes.count("F2FP.SATFINITE.E4M3.F32.PACK_AB_MERGE_C") == opcodes.count("FMUL") // 2 > 0


# ---- the disk cache --------------------------------------------------------------------------------------------------

NUMBER = 0


def store(out):
    st8(out, NUMBER)


def store_more(out):
    st8(out, NUMBER + 1000)


def cubin(fn=store, threads=32, cc=(9, 0), **constants):
    return cuda.cubin(fn, threads, cc, constants)


def test_cached_machine_code(tmp_path, monkeypatch):
    monkeypatch.setenv("PYEP_CACHE", str(tmp_path))
    first = cubin(NUMBER=1)
    assert first[:4] == b"\x7fELF"
    different = [first, cubin(NUMBER=2), cubin(NUMBER=1, threads=64), cubin(NUMBER=1, cc=(8, 0))]
    assert len(set(different)) == len(different) == len(list(tmp_path.glob("cuda/*.cubin")))
    monkeypatch.setattr(cuda, "link", None)         # not called again
    assert [cubin(NUMBER=1), cubin(NUMBER=2)] == different[:2]


def test_a_changed_kernel_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PYEP_CACHE", str(tmp_path))
    changed = FunctionType(store_more.__code__, globals(), store.__name__)
    changed.__qualname__ = store.__qualname__
    assert (changed.__module__, changed.__qualname__) == (store.__module__, store.__qualname__)
    assert cubin(store, NUMBER=1) != cubin(changed, NUMBER=1)
