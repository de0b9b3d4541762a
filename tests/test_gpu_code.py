"""What a GPU will run, checked without one: the PTX, what the assembler says of it, and the machine code.

The kernels are compiled as CudaEngine does it for a GPU of 132 multiprocessors (H100, H200).  A kernel takes seconds, and modes
and phases make many of them: COMPILED are those that differ most.  At the end, what LLVM made of the kernels for the CPU.
"""
import functools
import importlib.util
import inspect
import os
import pathlib
import re
import subprocess
import tempfile
from types import FunctionType
from typing import NamedTuple

import numba
import pytest

pytest.importorskip("cuda.core")
pytest.importorskip("numba_cuda")

import test_lang  # noqa: E402
import test_port  # noqa: E402
from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib  # noqa: E402
from launches import Notes, OnCpu, launches  # noqa: E402

from pyep.kernels import cuda, lang  # noqa: E402
from pyep.kernels.collectives import compiled as compiled_anew  # noqa: E402
from pyep.kernels.collectives import has_collectives  # noqa: E402
from pyep.kernels.lang import ld4_nc_if, ld8_nc_if, ld8_relaxed_if, st8  # noqa: E402
from pyep.kernels.op import Op, bind  # noqa: E402
from pyep.layout import DATA, LowLatency  # noqa: E402

try:
    for library in ("nvvm", "nvJitLink"):
        load_nvidia_dynamic_lib(library)
except DynamicLibNotFoundError as error:
    pytest.skip(f"nothing to compile with: {error}", allow_module_level=True)

MULTIPROCESSORS, WARP = 132, 32
REGISTERS, THREADS = 65536, 2048                # of a multiprocessor
SHARED, BLOCK_SHARED = 228 << 10, 227 << 10     # bytes of shared memory of a multiprocessor; that a block may have
SYSTEM_SHARED = 1 << 10                         # bytes that the system takes for itself in each block

DEPLOYED = LowLatency(num_ranks=4, max_tokens=128, hidden=7168, num_experts=256, num_topk=8)

# name: (shape, bytes of an entry of topk_idx[, 1 if there are port peers])
SHAPES = {
    "direct": (DEPLOYED, 8),
    "few": (DEPLOYED._replace(max_tokens=1), 8),
    "reduced": (DEPLOYED._replace(data="fp8", weighted=True), 8),
    "rank-major": (DEPLOYED._replace(data="fp8_ue8m0", rank_major=True, weighted=True), 8),
    "large": (LowLatency(num_ranks=8, max_tokens=128, hidden=16384, num_experts=64, num_topk=6, data="fp8"), 4),
}
SHAPES |= {f"{name}-ports": (*SHAPES[name], 1) for name in ("direct", "large")}

# Every kind of combine; each role of each operation also alone; "few" tokens, for which blocks are small; "large", whose blocks
# leave a thread the fewest registers; both operations with port peers.
COMPILED = {
    "direct": ("dispatch-both", "combine-both", "combine-send", "combine-receive"),
    "few": ("dispatch-both", "combine-both"),
    "reduced": ("dispatch-both", "combine-both"),
    "rank-major": ("dispatch-send", "dispatch-receive", "combine-both"),
    "large": ("dispatch-both", "combine-both"),
    "direct-ports": ("combine-both",),
    "large-ports": ("dispatch-both",),
}


class Gpu(Notes, cuda.CudaEngine):
    """The engine of a GPU that is not there."""

    def __init__(self):
        self.index, self.cc, self.multiprocessors = 0, (9, 0), MULTIPROCESSORS


def resident(launch):
    """Blocks that a multiprocessor must have room for: all of a grid run together, small ones beside the next kernel's."""
    return max(-(-launch.blocks // MULTIPROCESSORS), cuda.resident_blocks(launch.threads))


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


class Case(NamedTuple):
    """A kernel of COMPILED, as it is launched."""

    shape: LowLatency
    operation: str
    phase: str
    launch: object                              # `launches.Launch`

    @property
    def roles(self):
        return {"send", "receive"} if self.phase == "both" else {self.phase}

    @property
    def ports(self):
        return self.launch.constants["PORTS"] > 0

    @property
    def quantizes(self):
        return self.operation == "dispatch" and self.shape.fp8 and "send" in self.roles

    @property
    def counts(self):
        """Receivers of rows in several cuts count who has listed them; and packets and triggers are counted, with port peers."""
        return self.ports or self.operation == "dispatch" and "receive" in self.roles and self.launch.constants["TAKEN_CUTS"] > 1

    @property
    def divides(self):
        """Scales that are powers of two take no division."""
        return self.quantizes and self.shape.data == "fp8"

    @property
    def sums(self):
        """Receivers of a combine sum; and its senders, if they reduce first (rank-major, the caller has done that)."""
        reduces = self.shape.reduced and not self.shape.rank_major
        return self.operation == "combine" and ("receive" in self.roles or reduces)

    @property
    def code(self):
        return compiled(self.launch.fn, self.launch.threads, tuple(sorted(self.launch.constants.items())))

    @property
    def sass(self):
        return sass(self.code.cubin)

    @property
    def opcodes(self):
        return set(opcodes(self.code.cubin))


def case_of(name, which):
    return Case(SHAPES[name][0], *which.split("-"), launches(Gpu(), *SHAPES[name])[which])


CASES = {f"{name}-{which}": case_of(name, which) for name in COMPILED for which in COMPILED[name]}


def cases(operation=None):
    """Run a test for each kernel of COMPILED (of an operation)."""
    chosen = [pytest.param(case, id=name) for name, case in CASES.items() if operation in (None, case.operation)]
    return pytest.mark.parametrize("case", chosen)


class Instruction(NamedTuple):
    """One of machine code.

    A load counts one of six *scoreboards* up (`sets`) and down again once its result is there; an instruction starts when all
    scoreboards that it names (`waits`, bit i for number i) are 0.  What waits for a load so waits for all loads that share its
    scoreboard.
    """

    label: str                                  # a branch may lead here, if not empty
    guard: str
    opcode: str
    operands: str
    sets: int
    waits: int

    @property
    def name(self):
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]


@functools.cache
def nvdisasm():
    """The disassembler's path, or None."""
    found = importlib.util.find_spec("nvidia")
    for folder in found.submodule_search_locations if found else ():
        for file in pathlib.Path(folder).glob("**/bin/nvdisasm"):
            return str(file)
    return None


def disassembled(cubin):
    """nvdisasm's text, in which every instruction has its 128 bits beside it, the upper 64 on a line of their own."""
    if nvdisasm() is None:
        pytest.skip("no nvdisasm: pip install nvidia-cuda-nvdisasm")
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "kernel.cubin")
        pathlib.Path(file).write_bytes(cubin)
        return subprocess.run([nvdisasm(), "-c", "-hex", file], capture_output=True, text=True, check=True).stdout


LABEL = r"^(?P<label>[\w.$]+):$"
INSTRUCTION = (r"^\s+/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P\w+)?\s*(?P<opcode>[A-Z][\w.]*)(?P<operands>.*?);.*"
               r"\n\s+/\* 0x(?P<upper>[0-9a-f]{16}) \*/")


@functools.cache
def sass(cubin):
    """The instructions of machine code, in order."""
    instructions, label = [], ""
    for m in re.finditer(f"{LABEL}|{INSTRUCTION}", disassembled(cubin), re.M):
        if m["label"]:
            label = m["label"]
            continue
        # From bit 41 on: 4 bits of cycles to stall, 1 to yield, 3 and 3 for the scoreboards set (by results; by operands read), 6
        # for those waited for (Jia et al., "Dissecting the NVIDIA Volta GPU architecture via microbenchmarking", 2018, section 2).
        control = int(m["upper"], 16) >> 41
        instructions.append(Instruction(label, m["guard"] or "", m["opcode"], m["operands"], control >> 5 & 7, control >> 11 & 63))
        label = ""
    assert any(i.name == "EXIT" for i in instructions) and all(i.sets < 6 for i in instructions if i.name == "LDG")
    return instructions


def opcodes(cubin):
    """Opcodes with their modifiers, in order."""
    return [i.opcode for i in sass(cubin)]


def memory_instructions(text):
    """The loads, stores and atomics in PTX, parameters excepted."""
    return set(re.findall(r"\b((?:ld|ldu|st|red|atom)\.(?!param)[\w.:]+)", text))


def used(log):
    """Registers per thread, from the assembler's report."""
    return int(re.search(r"Used (\d+) registers", log)[1])


# ---- launches --------------------------------------------------------------------------------------------------------

def test_every_kernel_file_is_known():
    """A new file of kernels must be added here: to COMPILED, if it has kernels of its own."""
    tools = {"__init__", "basics", "cache", "collectives", "cpu", "cuda", "lang", "llvm", "op"}
    files = {file.stem for file in pathlib.Path(cuda.__file__).parent.glob("*.py")}
    assert files - tools == {"low_latency", "low_latency_announce", "low_latency_boxes", "low_latency_combine",
                             "low_latency_dispatch", "low_latency_escapes", "low_latency_listing", "low_latency_reduce",
                             "low_latency_ship", "low_latency_slots", "low_latency_sums", "low_latency_units",
                             "low_latency_unpack", "low_latency_void", "quantize", "intranode", "intranode_layout",
                             "intranode_notify", "intranode_dispatch", "intranode_combine"}


@pytest.mark.parametrize("shape", [DEPLOYED, SHAPES["large"][0]], ids=["deployed", "large"])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("rank_major", [False, True], ids=["expert-major", "rank-major"])
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
def test_launches(shape, data, rank_major, weighted):
    """Every block has a role, all fit on the GPU at once, and they may start while the kernel before them ends."""
    shape = shape._replace(data=data, rank_major=rank_major, weighted=weighted)
    for which, launch in launches(Gpu(), shape, 8).items():
        senders, receivers = launch.constants["SENDERS"], launch.constants["RECEIVERS"]
        assert max(senders, receivers) <= launch.blocks <= senders + receivers
        assert (senders > 0, receivers > 0) == ("receive" not in which, "send" not in which)
        assert launch.threads % WARP == 0 and launch.threads * resident(launch) <= THREADS
        assert 0 < launch.shared_bytes <= BLOCK_SHARED
        assert resident(launch) * (launch.shared_bytes + SYSTEM_SHARED) <= SHARED
        assert launch.overlap


@pytest.mark.parametrize("hidden", [8, 128, 1024, 2560, 4096, 5120, 7168, 8192, 16384])
@pytest.mark.parametrize("data", ["bf16", "fp8"])
@pytest.mark.parametrize("rank_major", [False, True], ids=["expert-major", "rank-major"])
@pytest.mark.parametrize("tokens, ports", [(1, 0), (128, 0), (128, 1)])
@pytest.mark.parametrize("engine", [Gpu(), OnCpu("2,24,4"), OnCpu("1,1,1")], ids=["gpu", "wide", "narrow"])
def test_cuts_are_whole_rows(engine, hidden, data, rank_major, tokens, ports):
    """Cuts cover a row, none of them in vain; teams are all of a block's warps; a cut is a whole number of what a team moves."""
    hidden = max(hidden, 128) if data == "fp8" else hidden
    shape = LowLatency(4, tokens, hidden, 256, 8, data=data, rank_major=rank_major, weighted=rank_major)
    for which, launch in launches(engine, shape, 8, ports).items():
        c, warps = launch.constants, launch.threads // engine.warp
        sides = ("CUTS", "CUT_BYTES", "TEAMS", "TEAM_THREADS"), ("TAKEN_CUTS", "TAKEN_CUT_BYTES", "TAKING_TEAMS", "TAKING_THREADS")
        for cuts, nbytes, teams, threads in ([c[name] for name in side] for side in sides):
            assert (cuts - 1) * nbytes < c["DATA_BYTES"] <= cuts * nbytes
            assert teams * threads == launch.threads and warps % teams == 0 and nbytes % (16 * threads) == 0
        assert c["CUTS"] == 1 or not ports
        assert c["TAKEN_CUTS"] == 1 or not ports and not rank_major


# ---- PTX -------------------------------------------------------------------------------------------------------------

ROWS_READ, ROWS_SENT = "ld.global.nc.L1::no_allocate.v2.s64", "st.relaxed.sys.global.L1::no_allocate.v2.s64"
ROWS_POLLED, ROWS_KEPT = "ld.relaxed.sys.global.L1::no_allocate.v2.s64", "st.global.L1::no_allocate.v2.s64"
WORDS_POLLED, WORDS_SENT = "ld.relaxed.sys.global.s64", "st.relaxed.sys.global.s64"
CONSUMED = [WORDS_SENT, "ld.global.s64", WORDS_POLLED]                      # told to the peers, looked at, awaited from them
GIVING_UP = ["atom.relaxed.gpu.global.cas.b64", "st.release.sys.global.s64", "%globaltimer", "nanosleep.u32"]
OVERLAP = ["griddepcontrol.wait", "griddepcontrol.launch_dependents"]
LISTS = ["vote.sync.ballot.b32", "ld.shared.b64", "st.shared.b64", "bar.sync"]
SUMS = ["fma.rn.f32", "cvt.rn.bf16x2.f32"]
PORTS = ["st.release.sys.global.v2.u64", "atom.acq_rel.gpu.global.add.u64", "ld.acquire.sys.global.s64"]     # triggers, arrivals
COUNTS = ["atom.relaxed.gpu.global.add.u64"]                                # of lists; of packets, and of places in a FIFO
DIVISION = "div.rn.f32"
QUANTIZING = ["max.xorsign.abs.bf16x2", "shfl.sync.bfly.b32", "cvt.rn.satfinite.e4m3x2.f32"]
SCALES_SENT = ["st.relaxed.sys.global.u32"]                                 # of FP8; of bf16 escapes

MEANT = {
    ("dispatch", "send"): [ROWS_READ, ROWS_SENT, WORDS_SENT, *CONSUMED, *LISTS],
    ("dispatch", "receive"): [ROWS_POLLED, ROWS_KEPT, WORDS_POLLED, "st.global.u32", *LISTS],
    ("combine", "send"): [ROWS_READ, ROWS_SENT, *CONSUMED, "bar.sync"],
    ("combine", "receive"): [ROWS_POLLED, ROWS_KEPT, *LISTS],
}
OF_ONE_ROLE = {"send": [ROWS_READ, ROWS_SENT], "receive": [ROWS_POLLED, ROWS_KEPT]}

# Weak accesses to single words: tables and counters that no other rank touches meanwhile, and scales (exponents are bytes).
WEAK = {"ld.global.s64", "ld.global.nc.s64", "ld.global.nc.s32", "st.global.s64", "st.global.u32", "st.global.u8"}
OPS = {name: op for name, op in vars(lang).items() if isinstance(op, Op)}
KNOWN = set().union(*[memory_instructions(op.ptx) for op in OPS.values() if isinstance(op.ptx, str)])


@cases()
def test_ptx_is_for_the_gpu_and_the_block(case):
    assert ".target sm_90" in case.code.ptx
    assert re.search(rf"\.maxntid\s+{case.launch.threads}\b", case.code.ptx)
    assert re.findall(r"\.entry (\w+)", case.code.ptx) == ["pyep_" + case.launch.fn.__name__]


@cases()
def test_ptx_has_what_is_meant(case):
    meant = GIVING_UP + OVERLAP + SUMS * case.sums + QUANTIZING * case.quantizes + PORTS * case.ports + COUNTS * case.counts
    meant = meant + SCALES_SENT * (case.operation == "dispatch" and "send" in case.roles)
    for role in case.roles:
        meant = meant + MEANT[case.operation, role]
    assert [instruction for instruction in meant if instruction not in case.code.ptx] == []


@cases()
def test_ptx_has_only_what_is_meant(case):
    absent = (SUMS * (not case.sums) + QUANTIZING * (not case.quantizes) + PORTS * (not case.ports)
              + COUNTS * (not case.counts))
    for role in OF_ONE_ROLE.keys() - case.roles:
        absent = absent + OF_ONE_ROLE[role]
    assert [instruction for instruction in absent if instruction in case.code.ptx] == []


def barriers_of(fn):
    """How many barriers of the block are in the source of a function and of those that it calls."""
    if isinstance(fn, Op):
        return int(fn.__name__ in ("syncthreads", "syncthreads_or"))
    if not isinstance(fn, FunctionType) or not has_collectives(fn):
        return 0
    _, calls = compiled_anew(fn.__code__)
    return sum(n * barriers_of(fn.__globals__.get(name)) for name, n in calls.items())


def barriers_in(text):
    return len(re.findall(r"\bbar\.(?:sync|red)", text))


@cases()
def test_no_barrier_is_there_twice(case):
    """Neither Python nor LLVM copies any; those of other roles and modes are gone."""
    assert 0 < barriers_in(case.code.ptx) <= barriers_of(case.launch.fn)


@cases()
def test_helpers_are_inlined_and_nothing_is_in_local_memory(case):
    for word in ("call.uni", "call (", ".extern .func", ".local"):
        assert word not in case.code.ptx


@cases()
def test_memory_is_accessed_by_ops_alone(case):
    """Numba and LLVM add no access of their own, and single words go without an order only where it is meant."""
    found = memory_instructions(case.code.ptx)
    assert found <= KNOWN
    weak_words = {i for i in found if re.match(r"(ld|st)\.global\.(?!.*\.v2)", i)}
    assert weak_words <= WEAK


@cases()
def test_arithmetic_is_exact_and_fast(case):
    """No flushing of subnormals, no approximations; at run time no division but those that the scales of FP8 are."""
    assert re.findall(r"\b\w+[\w.]*\.(?:ftz|approx)\b", case.code.ptx) == []
    assert set(re.findall(r"\b(?:div|rem)\.[\w.]+", case.code.ptx)) == ({DIVISION} if case.divides else set())


@cases()
def test_predicated_loads_keep_their_address(case):
    """The *_if loads zero their result before they use the address: these must be different registers."""
    loads = re.findall(r"@p ld\.\S+ (.+), \[(%\w+)\]", case.code.ptx)
    assert [load for load in loads if load[1] in re.findall(r"%\w+", load[0])] == []
    assert loads


# ---- machine code ----------------------------------------------------------------------------------------------------

@cases()
def test_no_stack_and_no_spills(case):
    report = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    assert set(re.findall(report, case.code.log)) == {("0", "0", "0")}


@cases()
def test_registers_of_resident_blocks_fit(case):
    """A multiprocessor gives each warp registers in units of 256."""
    warps = resident(case.launch) * case.launch.threads // WARP
    assert warps * -(-used(case.code.log) * WARP // 256) * 256 <= REGISTERS


LOCAL = {"LDL", "STL"}
GENERIC = {"LD", "ST", "ATOM"}                  # addresses of which LLVM lost track whether they are global or shared
GLOBAL = {"LDG", "STG", "ATOMG", "REDG", "RED", "LDGSTS"}
LEAVING = {"BRA", "BRX", "JMP", "JMX", "CALL", "RET", "EXIT"}


@cases()
def test_machine_code_has_no_local_memory(case):
    assert {i.name for i in case.sass} & (LOCAL | GENERIC) == set()


@cases()
def test_machine_code_calls_divisions_alone(case):
    """A quotient takes a dozen instructions, and a call only where it may be subnormal, infinite or a NaN."""
    calls = [i.operands for i in case.sass if i.name == "CALL"]
    assert (len(calls) > 0) == case.divides and all(re.search("div_rn.*_f32", target) for target in calls)


@cases()
def test_nothing_is_touched_before_the_previous_kernel_has_ended(case):
    """Kernels overlap: what stands before griddepcontrol.wait, which is ACQBULK, may run while the last one still stores."""
    start = next(k for k, i in enumerate(case.sass) if i.label.endswith("pyep_" + case.launch.fn.__name__))
    wait = next(k for k, i in enumerate(case.sass) if k >= start and i.name == "ACQBULK")
    before = case.sass[start:wait]
    assert {i.name for i in before} & (GLOBAL | GENERIC | LEAVING) == set()
    assert case.sass[wait].guard == "" and not any(i.label for i in case.sass[start + 1:wait + 1])
    assert "PREEXIT" in {i.name for i in case.sass[wait:]}       # griddepcontrol.launch_dependents


ROWS = {        # (loads, stores) of 16 bytes
    "send": ("LDG.E.NA.128.CONSTANT", "STG.E.NA.128.STRONG.SYS"),
    "receive": ("LDG.E.NA.128.STRONG.SYS", "STG.E.NA.128"),
}


@cases()
def test_machine_code_moves_vectors(case):
    meant = {"BAR.SYNC.DEFER_BLOCKING", "ATOMG.E.CAS.64.STRONG.GPU"}.union(*[ROWS[role] for role in case.roles])
    assert meant <= case.opcodes


@cases()
def test_machine_code_converts_pairs(case):
    assert ("F2FP.BF16.F32.PACK_AB" in case.opcodes) == case.sums
    assert any(o.startswith("F2FP.SATFINITE.E4M3.F32") for o in case.opcodes) == case.quantizes


# ---- what is under way at once ---------------------------------------------------------------------------------------

def stretches(instructions):
    """Machine code cut where branches lead to."""
    cuts = [k for k, i in enumerate(instructions) if k == 0 or i.label]
    return [instructions[a:b] for a, b in zip(cuts, [*cuts[1:], len(instructions)])]


def under_way(instructions, opcode):
    """How many loads of a kind there are, and how many of them are under way at the same time at most."""
    scoreboards, most = [], 0
    for i in instructions:
        scoreboards = [s for s in scoreboards if not i.waits >> s & 1]
        if i.opcode == opcode:
            scoreboards.append(i.sets)
            most = max(most, len(scoreboards))
    return sum(i.opcode == opcode for i in instructions), most


@cases("combine")
def test_a_combine_loads_rows_at_once(case):
    """Four loads are meant to be under way before the first is used, lest their latencies add up; no branches part them.

    The assembler may hold one of them back, for want of a scoreboard or a register.
    """
    for role in case.roles - ({"send"} if case.shape.rank_major else set()):        # whose senders need one row at a time
        found = [under_way(stretch, ROWS[role][0]) for stretch in stretches(case.sass)]
        groups = [most for loads, most in found if loads >= 4]
        assert groups and min(groups) >= 3


SCALES_POLLED = "LDG.E.STRONG.SYS"              # of 4 bytes


@cases("dispatch")
def test_a_dispatch_loads_ahead_of_its_stores(case):
    """A load is under way while the row before it is stored: of a row, and of a scale of FP8, which a receiver looks at.

    (What a call waits for is rare: see the divisions.)
    """
    pairs = [ROWS[role] for role in case.roles]
    if case.shape.fp8 and "receive" in case.roles:
        pairs.append((SCALES_POLLED, ROWS["receive"][1]))
    for load, store in pairs:
        pending, overlaps = [], 0
        for i in case.sass:
            pending = [s for s in pending if i.name == "CALL" or not i.waits >> s & 1]
            overlaps += i.opcode == store and len(pending) > 0
            pending += [i.sets] if i.opcode == load else []
        assert overlaps > 0


# ---- the language ----------------------------------------------------------------------------------------------------

KERNELS = [test_lang.who, test_lang.integers, test_lang.widths, test_lang.wanted_rows, test_lang.count_up,
           test_lang.elect, test_lang.count_by_swaps, test_lang.play, test_lang.play_pairs, test_lang.play_rows, test_lang.announce,
           test_lang.weigh, test_lang.divide, test_lang.largest, test_lang.quantize, test_lang.tick,
           test_lang.exchange_in_block, test_lang.exchange_words, test_lang.count_in_block, test_lang.ask_block,
           test_lang.exchange_in_warp, test_lang.ask_lanes, test_lang.follow, test_lang.epochs]


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
    code = sass(compiled(look, 32).cubin)
    loads = [k for k, i in enumerate(code) if i.name == "LDG"]
    assert len(loads) == 4
    between = {i.name for i in code[loads[0]:loads[-1]]}
    assert between & {"BRA", "BSSY", "IADD3"} == set()


def test_conversion_to_e4m3_takes_one_instruction_a_pair():
    found = opcodes(compiled(test_lang.quantize, 64).cubin)
    assert found.count("F2FP.SATFINITE.E4M3.F32.PACK_AB_MERGE_C") == found.count("FMUL") // 2 > 0


# ---- ports -----------------------------------------------------------------------------------------------------------

PORT = ("st.release.sys.global.v2.u64", "atom.relaxed.gpu.global.add.u64", "ld.acquire.sys.global.s64", "ld.global.nc.s64",
        "ld.relaxed.sys.global.s64", "st.relaxed.sys.global.s64")


def test_a_trigger_is_stored_at_once():
    """Its two words in one access: else the proxy might see words of two laps.  All four kinds are pushed one after another."""
    code = compiled(test_port.push_all, 32, tuple(test_port.OFFSETS.items()))
    assert [instruction for instruction in PORT if instruction not in code.ptx] == []
    assert memory_instructions(code.ptx) <= KNOWN
    found = opcodes(code.cubin)
    assert found.count("STG.E.128.STRONG.SYS") == found.count("ATOMG.E.ADD.64.STRONG.GPU") == 4
    for k in (k for k, opcode in enumerate(found) if opcode == "STG.E.128.STRONG.SYS"):
        assert "MEMBAR.ALL.SYS" in found[:k]                     # a release


def test_a_memory_channel_moves_vectors():
    code = compiled(test_port.through_memory, 32, tuple(test_port.OFFSETS.items()))
    assert "red.release.sys.global.add.u64" in code.ptx and memory_instructions(code.ptx) <= KNOWN
    text = [i.name for i in sass(code.cubin) if i.name in ("LDG", "STG") and ".128" in i.opcode]
    assert text[:8] == ["LDG"] * 4 + ["STG"] * 4                 # four loads are under way at once


# ---- on the CPU ------------------------------------------------------------------------------------------------------

CPU_SHAPES = {
    "direct": LowLatency(num_ranks=1, max_tokens=8, hidden=512, num_experts=8, num_topk=3),
    "reduced": LowLatency(num_ranks=2, max_tokens=8, hidden=512, num_experts=8, num_topk=8, data="fp8", weighted=True),
    "rank-major": LowLatency(num_ranks=2, max_tokens=8, hidden=512, num_experts=8, num_topk=3, data="fp8_ue8m0", rank_major=True),
}


@pytest.mark.parametrize("shape", CPU_SHAPES.values(), ids=CPU_SHAPES)
def test_llvm_finds_no_way_unreachable(shape):
    """LLVM once took a loop for one that never runs, led astray by loads behind branches, see `load_if` in `pyep.kernels.llvm`."""
    engine = OnCpu("1,1,1")
    for which, launch in launches(engine, shape, 8).items():
        signature = numba.void(*[numba.int64] * len(inspect.signature(launch.fn).parameters))
        kernel = numba.njit(signature, nogil=True, error_model="numpy")(bind(launch.fn, engine.machine, **launch.constants))
        text, = kernel.inspect_llvm().values()
        assert "ret i32 0" in text and not re.search(r"^\s+unreachable$", text, re.M), which
        assert re.search(r"^attributes #\d+ = {.* null_pointer_is_valid\b", text, re.M), which       # see `pointer` there


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
