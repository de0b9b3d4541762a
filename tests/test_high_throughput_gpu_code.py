"""What a GPU will run in high-throughput operations, checked without one, as in test_gpu_code."""
import re

import pytest

pytest.importorskip("cuda.core")
pytest.importorskip("numba_cuda")

from test_gpu_code import (GENERIC, GLOBAL, KNOWN, LEAVING, LOCAL, Gpu, compiled, memory_instructions, sass,  # noqa: E402
                           stretches, under_way, used)

from pyep.high_throughput import Kernels, Shape  # noqa: E402
from pyep.high_throughput_errors import COMBINE, DISPATCH  # noqa: E402

NUM_SMS = 20
THREADS, REGISTERS = {"combine": 768}, {"combine": 80}          # of a block that fills a multiprocessor; else 1024 of 64
SHARED = 227 << 10                              # bytes that a block may have

DEPLOYED = Shape(DISPATCH, 4, 7168, num_topk=8, weighted=True, num_experts=256, counts="exchanged")
SHAPES = {
    "bf16": DEPLOYED,
    "fp8": DEPLOYED._replace(dtype="float8_e4m3fn", scale_bytes=224, scale_dtype="float32"),
    "bytes": DEPLOYED._replace(dtype="uint8", scale_bytes=7, scale_dtype="uint8"),
    "halves": DEPLOYED._replace(dtype="uint8", scale_bytes=14, scale_dtype="bfloat16"),
    "worst": DEPLOYED._replace(counts="worst"),
    "cached": Shape(DISPATCH, 4, 7168, counts="cached"),
    "large": Shape(DISPATCH, 8, 5000, num_topk=6, num_experts=8 * 2047, counts="exchanged"),  # a row is no whole number of slices
    "combine": Shape(COMBINE, 4, 7168, num_topk=8, weighted=True),
    "large combine": Shape(COMBINE, 8, 5000),
}
SCALE_ITEM = {"bytes": 1, "halves": 2}          # bytes of scales that are moved at a time; else words of 4
COMPILED = {name: [(name, kernel) for kernel in kernels] for name, kernels in {
    "bf16": ("dispatch", "notify"), "fp8": ("dispatch",), "bytes": ("dispatch",), "halves": ("dispatch",),
    "worst": ("notify",), "cached": ("dispatch",),
    "large": ("dispatch", "notify"), "combine": ("combine",), "large combine": ("combine",)}.items()}


def launch_of(shape, kernel):
    """The `Launch` of a kernel."""
    made = Kernels(Gpu(), SHAPES[shape].num_ranks)
    return made.of(SHAPES[shape], 8, SCALE_ITEM.get(shape, 4), NUM_SMS)[kernel]


LAUNCHES = {f"{shape}-{kernel}": launch_of(shape, kernel) for pairs in COMPILED.values() for shape, kernel in pairs}
LAUNCHES["layout"] = Kernels(Gpu(), 4).layout(256, 4, 8, 8, NUM_SMS)[0]


def launches(*names):
    """Run a test for each kernel (whose name ends in one of these)."""
    chosen = [pytest.param(launch, id=name) for name, launch in LAUNCHES.items() if not names or name.endswith(names)]
    return pytest.mark.parametrize("launch", chosen)


def code_of(launch):
    return compiled(launch.fn, launch.threads, tuple(sorted(launch.constants.items())))


# ---- launches --------------------------------------------------------------------------------------------------------

@launches()
def test_launches(launch):
    """No more blocks than were asked for, each of which fits."""
    assert 0 < launch.blocks <= NUM_SMS and launch.threads == THREADS.get(launch.fn.__name__, 1024) and launch.overlap
    assert 0 < launch.shared_bytes <= SHARED


def test_any_number_of_multiprocessors():
    """As many as are asked for, as far as there are; a notify has work for one block a rank and one more."""
    made = Kernels(Gpu(), 4)
    for asked, blocks in (1, 1), (2, 2), (20, 20), (132, 132), (1000, 132):
        launched = made.of(DEPLOYED, 8, 4, asked)
        assert (launched["dispatch"].blocks, launched["notify"].blocks) == (blocks, min(blocks, 5))


def test_kernels_are_made_once():
    """Whatever shapes share them: the worst and the exchanged counts, rows of any type and as many bytes, all strides."""
    made = Kernels(Gpu(), 4)
    first = made.of(DEPLOYED, 8, 4, NUM_SMS)
    assert all(a is b for a, b in zip(first.values(), made.of(DEPLOYED, 8, 4, NUM_SMS).values()))
    assert made.of(SHAPES["fp8"], 8, 4, NUM_SMS)["notify"] is first["notify"]
    assert made.of(SHAPES["worst"], 8, 4, NUM_SMS)["dispatch"] is first["dispatch"]
    as_bytes = DEPLOYED._replace(dtype="uint8", hidden=2 * 7168)
    assert made.of(as_bytes, 8, 4, NUM_SMS)["dispatch"] is first["dispatch"]


# ---- machine code ----------------------------------------------------------------------------------------------------

@launches()
def test_registers_suffice(launch):
    """Of a block that fills a multiprocessor; nothing is on a stack or spilled."""
    code = code_of(launch)
    assert used(code.log) <= REGISTERS.get(launch.fn.__name__, 64)
    report = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    assert set(re.findall(report, code.log)) == {("0", "0", "0")}


@launches()
def test_memory_is_accessed_by_ops_alone(launch):
    code = code_of(launch)
    assert memory_instructions(code.ptx) <= KNOWN
    assert not [word for word in ("call.uni", "call (", ".extern .func", ".local") if word in code.ptx]
    assert {i.name for i in sass(code.cubin)} & (LOCAL | GENERIC) == set()
    calls = [i.operands for i in sass(code.cubin) if i.name == "CALL"]
    assert all(re.search("_(div|rem)_u64", target) for target in calls)                # by numbers known at run time only
    assert calls == [] or launch.fn.__name__ in ("notify", "combine")


@launches()
def test_nothing_is_touched_before_the_previous_kernel_has_ended(launch):
    code = sass(code_of(launch).cubin)
    start = next(k for k, i in enumerate(code) if i.label.endswith("pyep_" + launch.fn.__name__))
    wait = next(k for k, i in enumerate(code) if k >= start and i.name == "ACQBULK")
    assert {i.name for i in code[start:wait]} & (GLOBAL | GENERIC | LEAVING) == set()
    assert code[wait].guard == "" and "PREEXIT" in {i.name for i in code[wait:]}


@launches("dispatch", "combine")
def test_ends_with_a_release(launch):
    """Among blocks by an atomic add, among ranks by a store; the peers' word is acquired."""
    ptx = code_of(launch).ptx
    for instruction in "atom.acq_rel.gpu.global.add.u64", "st.release.sys.global.s64", "ld.acquire.sys.global.s64":
        assert instruction in ptx


@launches("dispatch")
def test_a_dispatch_loads_four_times_before_it_stores(launch):
    """Of a row; then four stores for each destination, and no load among them.  The last few loads of a row may be fewer."""
    code = sass(code_of(launch).cubin)
    found = [under_way(stretch, "LDG.E.NA.128.CONSTANT") for stretch in stretches(code)]
    groups = [most for loads, most in found if loads >= 4]
    assert groups and min(groups) >= 4
    rows = [i.opcode for i in code if i.opcode in ("LDG.E.NA.128.CONSTANT", "STG.E.NA.128")]
    text = "".join("L" if opcode.startswith("LDG") else "S" for opcode in rows)
    assert re.fullmatch(r"(L{4}(S{4})+)+(L{1,4}S+)?", text), text


@launches("combine")
def test_a_combine_has_many_loads_under_way(launch):
    """Four of those that send, while they store what the last four brought; eight of those that sum, of up to four rows, before
    they add.  The assembler may hold two back, for want of a scoreboard or a register.
    """
    code = sass(code_of(launch).cubin)
    for opcode, loads_at_once, least in ("LDG.E.NA.128.CONSTANT", 4, 4), ("LDG.E.NA.128", 8, 6):
        found = [under_way(stretch, opcode) for stretch in stretches(code)]
        groups = [most for loads, most in found if loads >= loads_at_once]
        assert groups and min(groups) >= least


@launches("notify")
def test_a_notify_looks_at_four_tokens_at_once(launch):
    """Without branches between, in each of its two passes."""
    code = code_of(launch)
    assert code.ptx.count("ld.global.nc.u8") == 8
    found = [under_way(stretch, "LDG.E.U8.CONSTANT") for stretch in stretches(sass(code.cubin))]
    assert [most for loads, most in found if loads] == [4, 4]
