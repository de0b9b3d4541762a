"""The layout of the symmetric memory: what the protocol needs of it for any shape, and one shape worked out by hand."""
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pyep.heap import Heap
from pyep.kernels import low_latency_escapes as escapes
from pyep.kernels import low_latency_slots as slots
from pyep.layout import (DATA, LINE, MAX_BLOCKS, MAX_CHUNKS, MAX_LOCAL_EXPERTS, SECTIONS, WORD, LowLatency, Region, Rows,
                         combined_rows, control, control_bytes, dispatched_rows, draw, half_capacity, heap_offset,
                         high_throughput_size_hint, low_latency_size_hint, name_of)
from pyep.low_latency import constants

# What other ranks write into control memory.
COUNTERS = ("consumed", "rdma_recv_count", "ht_counts", "place", "done", "chunk")
HIDDEN_STEP = {"bf16": 8, "fp8": 128, "fp8_powers_of_2": 128, "fp8_ue8m0": 512}       # 16 bytes; one scale; four scales


@st.composite
def shapes(draw_value):
    """R 1..9, M 1..300, H up to 8192, up to 16 experts a rank, any K up to E, every mode."""
    ranks = draw_value(st.integers(1, 9))
    experts = ranks * draw_value(st.integers(1, 16))
    data = draw_value(st.sampled_from(DATA))
    step = HIDDEN_STEP[data]
    return LowLatency(num_ranks=ranks, max_tokens=draw_value(st.integers(1, 300)),
                      hidden=step * draw_value(st.integers(1, 8192 // step)), num_experts=experts,
                      num_topk=draw_value(st.integers(1, experts)), data=data, rank_major=draw_value(st.booleans()),
                      weighted=draw_value(st.booleans()))


SMALLEST = LowLatency(num_ranks=1, max_tokens=1, hidden=8, num_experts=1, num_topk=1)
SMALLEST_FP8 = LowLatency(num_ranks=1, max_tokens=1, hidden=128, num_experts=1, num_topk=1, data="fp8", weighted=True)
PUBLISHED = LowLatency(num_ranks=4, max_tokens=128, hidden=7168, num_experts=256, num_topk=8)
RANKS = st.integers(1, 9)


def without_modes(shape):
    """The shape in bf16, expert-major, without weights: what a size hint is for."""
    return LowLatency(*shape[:5])


def halves(shape):
    """The regions of each operation in each half, as lists."""
    start = control_bytes(shape.num_ranks)
    return [data(start + i * shape.half_bytes) for i in (0, 1) for data in (shape.dispatch, shape.combine)]


def offset_of(region, index):
    """Where an entry is, from the definition: as far apart as is said, else the last index runs fastest."""
    if region.apart:
        return region.offset + sum(i * stride for i, stride in zip(index, region.apart))
    return region.offset + region.item * int(np.ravel_multi_index(index, region.dims) if index else 0)


def lines_of(region, position, value):
    """The 128-byte lines that hold the words of a region whose index at `position` is `value`."""
    entries = np.arange(region.nbytes // region.item).reshape(region.dims).take(value, axis=position).ravel()
    return set(((region.offset + entries * region.item) // LINE).tolist())


def check_in_order(regions, start, end):
    """Regions begin on lines, lie between start and end, and do not overlap."""
    assert all(r.offset % LINE == 0 and r.nbytes > 0 for r in regions)
    assert regions[0].offset >= start and regions[-1].end <= end
    for before, after in zip(regions, regions[1:]):
        assert before.end <= after.offset


# ---- regions ---------------------------------------------------------------------------------------------------------

@given(RANKS)
def test_control_regions(ranks):
    regions = control(ranks)
    check_in_order(list(regions.values()), 0, control_bytes(ranks))
    assert control_bytes(ranks) % LINE == 0
    assert all(name == r.name for name, r in regions.items())
    assert regions["epoch"].dims == (MAX_BLOCKS,)
    assert regions["consumed"].dims == (ranks,)
    assert regions["rdma_recv_count"].dims == (2, ranks, 1 + MAX_LOCAL_EXPERTS)
    assert regions["ht_epoch"].dims == (MAX_BLOCKS,)
    parity, sources, entries = regions["ht_counts"].dims
    assert (parity, sources) == (2, ranks) and entries >= 1 + ranks + MAX_LOCAL_EXPERTS
    assert regions["place"].dims == (ranks, SECTIONS) and SECTIONS >= len(Rows._fields)
    assert regions["chunk"].dims == (ranks, MAX_CHUNKS)
    assert regions["boxes"].dims == (2, ranks, 4)                # what `box_table` has
    assert regions["claims"].dims == regions["told"].dims == (ranks,)
    assert regions["flags"].dims == (2, ranks, 4)
    assert regions["consumed"].item >= 2 * WORD                  # of a port peer two words come


@given(shapes())
@example(SMALLEST)
@example(SMALLEST_FP8)
def test_regions_of_halves(shape):
    start = control_bytes(shape.num_ranks)
    for i, (dispatch, combine) in enumerate(zip(halves(shape)[::2], halves(shape)[1::2])):
        begin, end = start + i * shape.half_bytes, start + (i + 1) * shape.half_bytes
        check_in_order(combine, begin, end)
        assert all(begin <= r.offset < r.end <= end for r in dispatch)
    assert start + 2 * shape.half_bytes == shape.nbytes


@given(shapes())
@example(SMALLEST)
@example(SMALLEST_FP8)
def test_slots_hold_all_of_a_token(shape):
    """What is of one token and source lies in one slot, in order, on lines that are nobody else's; M moves no slot."""
    routes, places, listed, rows, *_ = shape.slot()
    for before, after in zip(shape.slot(), shape.slot()[1:]):
        assert before.end <= after.offset
    assert rows.offset % LINE == listed.offset % LINE == shape.slot_bytes % LINE == 0 and shape.slot()[-1].end <= shape.slot_bytes
    assert places.offset % WORD == 0 and places.end <= listed.offset         # written by the source; listed by this rank
    larger = shape._replace(max_tokens=shape.max_tokens + 1)
    for of_slot, region, same in zip(shape.slot(), shape.dispatch(), larger.dispatch()):
        assert region._replace(dims=()) == same._replace(dims=())
        last = offset_of(region, tuple(n - 1 for n in region.dims))
        slot = (shape.max_tokens * shape.num_ranks - 1) * shape.slot_bytes
        assert last == slot + offset_of(of_slot, tuple(n - 1 for n in of_slot.dims)) and last + region.item == region.end


@given(shapes())
@example(SMALLEST_FP8)
def test_data_fits_its_region(shape):
    (routes, places, listed, rows, *escapes), (sent_back,) = shape.dispatch(), shape.combine()
    ranks, tokens, topk = shape.num_ranks, shape.max_tokens, shape.num_topk
    assert routes.nbytes == places.nbytes == WORD * ranks * tokens * topk
    assert listed.nbytes == WORD * ranks * tokens
    assert rows.nbytes == ranks * tokens * shape.wire_bytes and rows.item == shape.wire_bytes
    assert [4 * r.nbytes for r in escapes] == ([] if shape.data.startswith("fp8") else [rows.nbytes])
    name, count = ("partials", ranks * tokens) if shape.rank_major or shape.weighted else ("outputs", tokens * topk)
    assert (sent_back.name, sent_back.nbytes, sent_back.item) == (name, 2 * count * shape.hidden, shape.row_bytes)
    assert shape.rows_per_expert == ranks * tokens and shape.local_experts * ranks == shape.num_experts


@given(shapes())
@example(SMALLEST_FP8)
def test_rows_are_whole_vectors(shape):
    """Of 16 bytes: the values, and what is behind them, which is room for the scales and less than a vector more."""
    assert shape.row_bytes % 16 == shape.data_bytes % 16 == shape.wire_bytes % 16 == 0
    values, scales = (1, shape.hidden // 128) if shape.data.startswith("fp8") else (2, 0)
    assert shape.data_bytes == values * shape.hidden
    assert 0 <= shape.wire_bytes - shape.data_bytes - 4 * scales < 16


@pytest.mark.parametrize("data, hidden, data_bytes, wire_bytes", [
    ("bf16", 8, 16, 16),
    ("bf16", 7168, 14_336, 14_336),
    ("fp8", 128, 128, 144),                             # one scale of 4 bytes
    ("fp8", 640, 640, 672),                             # five scales: 20 bytes
    ("fp8", 7168, 7168, 7392),                          # 56 scales: 224 bytes
    ("fp8_powers_of_2", 7168, 7168, 7392),
    ("fp8_ue8m0", 7168, 7168, 7392),                    # they travel as fp32 and become exponents when they are delivered
])
def test_bytes_of_rows_by_hand(data, hidden, data_bytes, wire_bytes):
    shape = PUBLISHED._replace(data=data, hidden=hidden)
    assert (shape.row_bytes, shape.data_bytes, shape.wire_bytes) == (2 * hidden, data_bytes, wire_bytes)


# ---- words that other ranks write ------------------------------------------------------------------------------------

@given(RANKS)
def test_counters_are_aligned_words(ranks):
    """64-bit remote adds must be safe: 8 bytes each, at multiples of 8, no two in the same place."""
    assert WORD == 8
    for region in control(ranks).values():
        assert region.item in (WORD, LINE) and region.offset % WORD == region.item % WORD == 0


@given(shapes())
def test_routes_and_places_are_aligned_words(shape):
    for region in [r for regions in halves(shape) for r in regions if r.name in ("routes", "places")]:
        assert region.item == WORD and region.offset % WORD == 0


@pytest.mark.parametrize("ranks", range(1, 10))
def test_writers_do_not_share_lines(ranks):
    regions = [control(ranks)[name] for name in COUNTERS]
    by_source = [set.union(*[lines_of(r, r.index.index("source"), source) for r in regions]) for source in range(ranks)]
    assert sum(map(len, by_source)) == len(set.union(*by_source))
    assert {r.writer for r in regions} == {"source"}


@pytest.mark.parametrize("ranks", range(1, 10))
def test_all_that_ranks_write_is_accounted_for(ranks):
    """A new region that other ranks write must join the tests of COUNTERS."""
    writers = {r.name: r.writer for r in control(ranks).values()}
    assert {name for name, writer in writers.items() if writer not in ("host", "this rank")} == set(COUNTERS)


# ---- sizes -----------------------------------------------------------------------------------------------------------

@given(shapes())
@example(SMALLEST)
@example(PUBLISHED)
def test_half_bytes(shape):
    assert shape.half_bytes % LINE == 0
    assert shape.half_bytes >= max(r.end for data in (shape.dispatch, shape.combine) for r in data())
    assert shape.half_bytes - LINE < max(r.end for data in (shape.dispatch, shape.combine) for r in data())
    assert half_capacity(shape.nbytes, shape.num_ranks) == shape.half_bytes
    assert half_capacity(shape.nbytes - 1, shape.num_ranks) < shape.half_bytes


@given(st.integers(0, 10**7), RANKS)
def test_half_capacity(nbytes, ranks):
    capacity = half_capacity(nbytes, ranks)
    assert capacity % LINE == 0 and capacity >= 0
    assert capacity == 0 or control_bytes(ranks) + 2 * capacity <= nbytes
    assert control_bytes(ranks) + 2 * (capacity + LINE) > nbytes


@given(shapes())
@example(SMALLEST)
@example(SMALLEST_FP8)
def test_size_hint(shape):
    """It knows no modes: memory that is right without them fits all."""
    ranks, tokens, hidden, experts, topk = shape[:5]
    exact = low_latency_size_hint(tokens, hidden, ranks, experts, num_topk=topk)
    assert exact == without_modes(shape).nbytes >= shape.nbytes
    assert low_latency_size_hint(tokens, hidden, ranks, experts, topk) == exact
    assert low_latency_size_hint(tokens, hidden, ranks, experts) >= exact


@given(shapes())
def test_size_hint_without_topk_covers_every_topk(shape):
    room = half_capacity(low_latency_size_hint(*[shape[i] for i in (1, 2, 0, 3)]), shape.num_ranks)
    for mode in shape, without_modes(shape):
        needs = [mode._replace(num_topk=k).half_bytes for k in range(1, shape.num_experts + 1)]
        assert needs == sorted(needs) and needs[-1] <= room
    assert needs[-1] == room


def test_a_published_shape_by_hand():
    """M=128, H=7168, R=4, E=256, K=8: rows are 14336 bytes; each region begins at the next multiple of 128."""
    assert {name: (r.offset, r.nbytes) for name, r in control(4).items()} == {
        "status": (0, 8),
        "peers": (128, 32),                             # 4 x 8
        "ports": (256, 32),
        "failed": (384, 8),
        "epoch": (512, 8192),                           # 1024 blocks x 8
        "consumed": (8704, 512),                        # 4 x 128
        "rdma_recv_count": (9216, 131072),              # 2 halves x 4 sources x (1 + 2047) x 8
        "ht_epoch": (140_288, 8192),
        "ht_counts": (148_480, 132_096),                # 2 x 4 sources x (2 + 4 + 2047, up to a multiple of 16) x 8
        "place": (280_576, 512),                        # 4 lines
        "done": (281_088, 512),
        "chunk": (281_600, 131_072),                    # 4 sources x 4096 x 8
        "arrived": (412_672, 8),
        "boxes": (412_800, 256),                        # 2 x 4 x 4 x 8
        "claims": (413_056, 32),
        "packed": (413_184, 8),
        "told": (413_312, 32),
        "flags": (413_440, 256),
    }
    assert control_bytes(4) == 413_696
    assert [(r.name, r.offset, r.nbytes) for r in PUBLISHED.dispatch()] == [
        ("routes", 0, 32_768),                          # 128 x 4 x 8 words
        ("places", 64, 32_768),
        ("listed", 128, 4096),                          # 128 x 4 words
        ("rows", 256, 7_340_032),                       # 128 x 4 rows
        ("escapes", 14_592, 1_835_008),                 # 128 x 4 x 896 pieces
    ]
    assert PUBLISHED.slot_bytes == 18_176               # 256 + 14336 + 4 x 896
    assert [r.strides for r in PUBLISHED.dispatch()] == [(72_704, 18_176, 8)] * 2 + [(72_704, 18_176)] * 2 + [(72_704, 18_176, 4)]
    assert [(r.name, r.offset, r.nbytes) for r in PUBLISHED.combine()] == [("outputs", 0, 14_680_064)]  # 128 x 8 rows
    assert PUBLISHED.half_bytes == 14_680_064
    assert PUBLISHED.nbytes == 29_773_824               # 413696 + 2 x 14680064
    assert PUBLISHED.local_experts == 64 and PUBLISHED.rows_per_expert == 512
    assert low_latency_size_hint(128, 7168, 4, 256, num_topk=8) == 29_773_824
    assert low_latency_size_hint(128, 7168, 4, 256) == 939_937_792     # 413696 + 2 x 128 x 256 x 14336


def test_a_published_shape_in_fp8_reduced_by_hand():
    """Rows are 7392 bytes; what comes back is still bf16, one row for each (rank, token)."""
    shape = PUBLISHED._replace(data="fp8", weighted=True)
    assert [(r.name, r.offset, r.nbytes) for r in shape.dispatch()] == [
        ("routes", 0, 32_768),
        ("places", 64, 32_768),
        ("listed", 128, 4096),
        ("rows", 256, 3_784_704),                       # 128 x 4 rows
    ]
    assert shape.slot_bytes == 7680                     # 256 + 7392, up to a multiple of 128
    assert [(r.name, r.offset, r.nbytes) for r in shape.combine()] == [("partials", 0, 7_340_032)]      # 4 x 128 rows
    assert shape.half_bytes == 7_340_032 and shape.nbytes == 15_093_760         # 413696 + 2 x 7340032


# ---- the heap --------------------------------------------------------------------------------------------------------

@st.composite
def rows_of_any_kind(draw_value):
    """bf16 or rows of bytes with scales, K 0..40, with or without weights, dispatched or combined."""
    topk, hidden = draw_value(st.integers(0, 40)), 16 * draw_value(st.integers(1, 512))
    if draw_value(st.booleans()):
        return combined_rows(hidden, topk)
    scales = draw_value(st.integers(0, 100))
    return dispatched_rows(hidden if scales else 2 * hidden, topk, draw_value(st.booleans()), scales, draw_value(st.booleans()))


@given(rows_of_any_kind(), st.integers(0, 5000), st.integers(0, 100))
def test_sections(rows, num_rows, first_line):
    *starts, end = rows.starts(num_rows, first_line * LINE)
    assert all(start % LINE == 0 for start in starts) and starts[0] == first_line * LINE
    assert all(a + num_rows * item <= b for a, b, item in zip(starts, [*starts[1:], end], rows))
    assert end == first_line * LINE + rows.nbytes(num_rows) and rows.nbytes(num_rows) % LINE == 0


@given(rows_of_any_kind(), st.integers(0, 10**7))
def test_rows_that_fit(rows, nbytes):
    """As many as there is room for, not one less."""
    assert rows.fit(nbytes) == 0 or rows.nbytes(rows.fit(nbytes)) <= nbytes
    assert rows.nbytes(rows.fit(nbytes) + 1) > nbytes


@given(RANKS, st.integers(0, 300), st.integers(1, 64), st.integers(0, 9), st.booleans(), st.integers(1, 5))
def test_high_throughput_size_hint(ranks, tokens, blocks, topk, fp8, held):
    """The most rows that there can be fit the operations' room; so many results, the results' room."""
    hidden, scale_bytes = 128 * blocks, 4 * blocks if fp8 else 0
    hidden_bytes = hidden if fp8 else 2 * hidden
    hint = high_throughput_size_hint(tokens, hidden, ranks, topk, hidden_bytes + scale_bytes, held)
    heap, slabs = Heap(0, hint), []
    items = dispatched_rows(hidden_bytes, topk, topk > 0, scale_bytes)
    assert items.nbytes(ranks * tokens) <= heap.operations_room
    assert combined_rows(hidden, topk).nbytes((ranks - 1) * tokens) <= heap.operations_room
    for _ in range(held):
        sizes = 4 * ranks * (ranks + tokens), *[item * ranks * tokens for item in items if item * tokens]
        slabs += [heap.lend(nbytes) for nbytes in sizes]
    assert None not in slabs
    if held > 2 and not fp8:
        assert heap.nbytes < 1.5 * sum(slab.nbytes for slab in slabs) + 2000 * held + tokens * ranks * 200      # and not much more


def test_sections_by_hand():
    """1000 rows of 7168 bf16 with top-8: each section begins at the next multiple of 128."""
    rows = dispatched_rows(14_336, 8, True)
    assert rows.starts(1000, 256) == [
        256,                                            # rows
        14_336_256,                                     # source tokens
        14_340_352,                                     # top-k, 14336256 + 4096
        14_404_352,                                     # weights
        14_436_352, 14_436_352,                         # no scales
    ]
    assert rows.nbytes(1000) == 14_436_096 and rows.fit(14_436_096) == 1000 and rows.fit(14_436_095) == 999


@given(st.integers(0, 10**6), RANKS)
def test_the_heap_begins_behind_control_words_and_halves(num_rdma_bytes, ranks):
    offset = heap_offset(num_rdma_bytes, ranks)
    assert offset % LINE == 0 and offset >= control_bytes(ranks) and offset >= num_rdma_bytes
    assert offset >= control_bytes(ranks) + 2 * half_capacity(num_rdma_bytes, ranks)


# ---- names -----------------------------------------------------------------------------------------------------------

def entries(data, region):
    """An index into a region, and the name that its entry should have."""
    index = tuple(data.draw(st.integers(0, d - 1), label=i) for i, d in zip(region.index, region.dims))
    return index, region.name + "".join(f"[{name} {i}]" for name, i in zip(region.index, index))


@given(RANKS, st.data())
def test_slot_names_entries(ranks, data):
    region = data.draw(st.sampled_from(list(control(ranks).values())))
    index, name = entries(data, region)
    byte = data.draw(st.integers(0, region.item - 1))
    assert region.slot(offset_of(region, index) + byte) == name


def test_slot_by_hand():
    region = Region("things", 1000, ("source", "token"), (3, 5), 16, "source")
    assert (region.nbytes, region.end) == (240, 1240)
    assert region.slot(1000) == region.slot(1015) == "things[source 0][token 0]"
    assert region.slot(1016) == "things[source 0][token 1]"
    assert region.slot(1239) == "things[source 2][token 4]"
    assert Region("thing", 8, (), (), 8, "host").slot(8) == "thing"


@given(shapes(), st.data())
def test_kernels_know_the_layout(shape, data):
    """The formulas of `low_latency_slots`, with the template parameters that the host gives them, are those of the regions."""
    here = data.draw(st.integers(0, 1000)) * LINE
    regions = {r.name: r for r in [*shape.dispatch(here), *shape.combine(here)]}
    source, token = data.draw(st.integers(0, shape.num_ranks - 1)), data.draw(st.integers(0, shape.max_tokens - 1))
    k, piece = data.draw(st.integers(0, shape.num_topk - 1)), data.draw(st.integers(0, shape.row_bytes // 16 - 1))
    parameters = constants(shape, 8)
    with (mock.patch.multiple(slots, **{name: value for name, value in parameters.items() if hasattr(slots, name)}),
          mock.patch.multiple(escapes, ESCAPES=parameters["ESCAPES"], udiv=int.__floordiv__)):
        found = {"routes": (slots.route_at(here, source, token, k), (token, source, k)),
                 "places": (slots.place_at(here, source, token, k), (token, source, k)),
                 "listed": (slots.listed_at(here, source, token), (token, source)),
                 "rows": (slots.row_at(here, source, token), (token, source)),
                 "escapes": (escapes.escape_at(slots.row_at(here, source, token), 16 * piece), (token, source, piece)),
                 "partials": (slots.partial_at(here, source, token), (token, source)),
                 "outputs": (slots.output_at(here, token, k), (token, k))}
    for name, region in regions.items():
        address, index = found[name]
        assert address == offset_of(region, index) and region.find(address + region.item - 1) == index


@given(shapes(), st.integers(0, 1000), st.booleans(), st.data())
def test_name_of_inverts_offsets(shape, spare_lines, of_dispatch, data):
    """In a buffer that may have been made for a larger shape."""
    half_bytes, start = shape.half_bytes + LINE * spare_lines, control_bytes(shape.num_ranks)
    regions = shape.dispatch if of_dispatch else shape.combine
    half = data.draw(st.integers(0, 1))
    here = data.draw(st.sampled_from([*control(shape.num_ranks).values(), *regions(start + half * half_bytes)]))
    index, name = entries(data, here)
    byte = data.draw(st.integers(0, here.item - 1))
    suffix = f" of half {half}" if here.offset >= start else ""
    assert name_of(offset_of(here, index) + byte, shape.num_ranks, half_bytes, regions) == name + suffix


def test_names_of_slots_of_combines_by_hand():
    start, row = control_bytes(4), 14_336
    for modes in dict(weighted=True), dict(rank_major=True):
        shape = PUBLISHED._replace(**modes)
        slot = start + (5 * 4 + 2) * row
        assert name_of(slot + row - 1, 4, shape.half_bytes, shape.combine) == "partials[token 5][rank 2] of half 0"
        assert name_of(slot + shape.half_bytes, 4, shape.half_bytes, shape.combine) == "partials[token 5][rank 2] of half 1"
    slot = start + (100 * 8 + 3) * row
    assert name_of(slot, 4, PUBLISHED.half_bytes, PUBLISHED.combine) == "outputs[token 100][k 3] of half 0"


@given(shapes())
def test_name_of_gaps(shape):
    end = control(shape.num_ranks)["status"].end
    assert name_of(end, shape.num_ranks, shape.half_bytes, shape.dispatch) == f"byte {end}"
    assert name_of(shape.nbytes, shape.num_ranks, shape.half_bytes, shape.combine) == f"byte {shape.nbytes}"


@given(shapes(), st.sampled_from([None, 0, 1, 12345]))
@example(SMALLEST, None)
def test_draw(shape, spare):
    text = draw(shape) if spare is None else draw(shape, shape.nbytes + spare)
    assert text.isascii() and all(line.isprintable() for line in text.split("\n"))
    half = half_capacity(shape.nbytes + (spare or 0), shape.num_ranks)
    start = control_bytes(shape.num_ranks)
    everything = [*control(shape.num_ranks).values(),
                  *[r for i in (0, 1) for data in (shape.dispatch, shape.combine) for r in data(start + i * half)]]
    for region in everything:
        lines = [line for line in text.split("\n") if line.split()[:2] == [f"{region.offset:,}", f"{region.nbytes:,}"]]
        assert any(f"  {region.name}" in line and line.endswith(f"x {region.item}, {region.writer}") for line in lines)
    assert len(text.split("\n")) == 2 + 1 + len(control(1)) + 2 * (1 + len(shape.slot())) + 2 * (1 + 1)
