"""The layout of boxes: everything fits, ranks agree on where they are, and one shape worked out by hand."""
import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from test_layout import PUBLISHED, check_in_order, shapes

from pyep.layout import LINE, MAX_LOCAL_EXPERTS, PACKET_HEADER, WORD, LowLatency, half_capacity
from pyep.layout_boxes import box_bytes, box_table, boxes, most_port_peers
from pyep.low_latency import box_constants

SHAPES = shapes().filter(lambda shape: shape.num_ranks > 1)      # one rank has no peers
NODES = st.lists(st.integers(0, 3), min_size=1, max_size=9)      # of ranks: in any order, also with numbers left out

# The most experts a rank may have, and rows of 16 and of 32 bytes: what leaves the least room.
FULL = LowLatency(num_ranks=2, max_tokens=1, hidden=8, num_experts=2 * MAX_LOCAL_EXPERTS, num_topk=1)
TIGHT = [LowLatency(num_ranks=2, max_tokens=300, hidden=hidden, num_experts=64, num_topk=64) for hidden in (8, 16)]


@given(SHAPES, st.integers(0, 10**6))
@example(FULL, 0)
@example(TIGHT[0], 0)
@example(TIGHT[1], 0)
def test_every_shape_that_fits_a_half_fits_a_box(shape, spare):
    capacity = half_capacity(shape.nbytes + spare, shape.num_ranks)
    check_in_order(shape.combine_box(LINE), LINE, LINE + box_bytes(capacity))
    header, routes, places, packets = shape.dispatch_box(LINE)
    assert LINE == header.offset < header.end <= routes.offset < places.offset and places.end <= packets.offset
    assert packets.end <= LINE + box_bytes(capacity)


@given(SHAPES)
@example(FULL)
def test_what_a_box_holds(shape):
    """Of one source as much as a half has of it; rows behind headers, each aligned to 16 bytes."""
    header, routes, places, packets = shape.dispatch_box()
    half_routes, half_places, _, half_rows, *_ = shape.slot()
    assert header.dims[0] * WORD == 8 + WORD * (1 + (1 if shape.rank_major else shape.local_experts))
    assert routes.dims[1:] == half_routes.dims and places.dims[1:] == half_places.dims
    assert places.offset - routes.offset == half_places.offset - half_routes.offset
    assert routes.dims[:1] == packets.dims == (shape.max_tokens,) and packets.item == PACKET_HEADER + half_rows.item
    (_, packets_back), (rows_back,) = shape.combine_box(), shape.combine()
    assert packets_back.item == PACKET_HEADER + rows_back.item
    assert packets_back.dims[0] == rows_back.nbytes // rows_back.item // (shape.num_ranks if shape.reduced else 1)
    assert packets.item % 16 == packets_back.item % 16 == PACKET_HEADER % 16 == packets.offset % 16 == 0


@given(SHAPES, st.integers(0, 300))
def test_packets_follow_the_words_of_the_tokens_there_are(shape, tokens):
    """As `packets_in` of `low_latency_boxes` has it."""
    parameters = box_constants("dispatch", shape)
    *_, packets = shape.dispatch_box(LINE, tokens)
    assert packets.offset == LINE + parameters["BOX_WORDS"] + tokens * parameters["WORD_BYTES"]
    parameters = box_constants("combine", shape)
    assert shape.combine_box(LINE)[1].offset == LINE + parameters["BOX_WORDS"] and parameters["WORD_BYTES"] == 0


@given(NODES, st.integers(0, 10**6), st.integers(0, 100))
def test_ranks_agree_on_boxes(node_of, half_lines, start_lines):
    """What a rank puts arrives where the peer looks for it, in a box that is nobody else's."""
    start, half, ranks = start_lines * LINE, half_lines * LINE, range(len(node_of))
    peers = most_port_peers(node_of)
    tables = [box_table(node_of, me, start, half) for me in ranks]
    end = boxes(start, peers, half)[-1].end
    assert end == start + 4 * peers * box_bytes(half)
    for me in ranks:
        mine = [box for parity in (0, 1) for r in ranks if node_of[r] != node_of[me] for box in tables[me][parity][r][:2]]
        assert len(set(mine)) == len(mine)
        assert all(start <= box <= end - box_bytes(half) and (box - start) % box_bytes(half) == 0 for box in mine)
        for parity, other in itertools.product((0, 1), ranks):
            outbox, inbox, there, _ = tables[me][parity][other]
            if node_of[other] == node_of[me]:
                assert outbox == inbox == there == 0
            else:
                assert there == tables[other][parity][me][1]


@pytest.mark.parametrize("node_of, most", [([0], 0), ([0, 0], 0), ([0, 1], 1), ([0, 0, 1], 2), ([0, 0, 1, 1], 2),
                                           ([5, 2, 5, 1], 3)])
def test_most_port_peers(node_of, most):
    assert most_port_peers(node_of) == most


def test_a_published_shape_by_hand():
    """M=128, H=7168, R=4, E=256, K=8, two nodes of two ranks."""
    assert [(r.name, r.offset, r.nbytes) for r in PUBLISHED.dispatch_box()] == [
        ("header", 0, 528),                             # 2 + 64 words
        ("routes", 640, 8192),                          # 128 x 8 words
        ("places", 704, 8192),
        ("packets", 17_024, 1_837_056),                 # 128 x (16 + 14336)
    ]
    assert [(r.name, r.offset, r.nbytes) for r in PUBLISHED.combine_box()] == [
        ("header", 0, 16),
        ("packets", 128, 14_696_448),                   # 128 x 8 x (16 + 14336)
    ]
    assert box_bytes(PUBLISHED.half_bytes) == 22_037_120         # 3/2 x 14680064 + 2050 words + 4 lines, up to a line
    assert [(r.name, r.offset, r.nbytes) for r in boxes(1000 * LINE, 2, PUBLISHED.half_bytes)] == [
        ("outbox", 128_000, 88_148_480),
        ("inbox", 88_276_480, 88_148_480),
    ]
    assert box_table([0, 0, 1, 1], 1, 0, 0)[1] == [
        [0, 0, 0, 0],
        [0, 0, 0, 0],
        [34_048, 102_144, 119_168, 0],                  # boxes of 17024 bytes: parity 1 begins with the third; 7th and 8th inbox
        [51_072, 119_168, 119_168, 0],
    ]
