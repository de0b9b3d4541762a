"""High-throughput dispatch of rows and scales of all types, numbers and strides: byte for byte as they are."""
import numpy as np
import pytest
import ranks
from engine import choose_gpu, down, make_high_throughput_buffer, on_gpu, up
from high_throughput_case import Case, assert_bits, counts_of

HEAP = 2**22
TOKENS = (33, 0, 20)


def bytes_of(rng, shape, dtype):
    """Any bytes, as values of a type of NumPy."""
    dtype = np.dtype(dtype)
    return rng.integers(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=np.uint8).view(dtype)


# How arrays [T, n] lie in memory: a function of (rng, T, n, dtype).
CONTIGUOUS = {"rows": lambda rng, t, n, dtype: bytes_of(rng, (t, n), dtype)}
APART = {"rows apart": lambda rng, t, n, dtype: bytes_of(rng, (t, 3 * n), dtype)[:, n:2 * n],
         "every second": lambda rng, t, n, dtype: bytes_of(rng, (2 * t, n), dtype)[::2]}
ANY = CONTIGUOUS | APART | {"by column": lambda rng, t, n, dtype: bytes_of(rng, (n, t), dtype).T,
                            "every third": lambda rng, t, n, dtype: bytes_of(rng, (t, 3 * n), dtype)[:, ::3],
                            "from an odd byte": lambda rng, t, n, dtype: bytes_of(rng, (t * n + 1,), dtype)[1:].reshape(t, n),
                            "shifted": lambda rng, t, n, dtype: bytes_of(rng, (t, n + 1), dtype)[:, 1:],
                            "the same for all": lambda rng, t, n, dtype: np.broadcast_to(bytes_of(rng, (1, n), dtype), (t, n))}
ONE_BYTE = ("uint8", "int8") if on_gpu() else ("uint8", "int8", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz")     # CuPy
# What travels: (type of values, H, how they lie; type of scales, S or 0 for [T], how they lie; None: no scales).
PLAIN = [("uint8", 64, "rows", None), ("int8", 48, "rows apart", None), ("bfloat16", 64, "rows apart", None),
         ("bfloat16", 64, "every second", None)]
TYPES = [(values, 64, "rows", (scales, 4, "rows")) for values, scales in zip(
    ONE_BYTE * 2, ("float32", "int32", "uint8", "bfloat16", "float16", "float32"))]
STRIDES = [("uint8", 64, how, (dtype, 4, lie)) for how, dtype, lie in (
    ("rows", "float32", "by column"), ("rows apart", "float32", "every third"), ("rows", "uint8", "by column"),
    ("rows", "uint8", "shifted"), ("every second", "uint8", "rows"), ("rows", "float16", "by column"),
    ("rows", "float16", "shifted"), ("rows", "int32", "the same for all"), ("rows", "uint8", "rows apart"))]
NUMBERS = [("uint8", 16, "rows", (dtype, count, "rows")) for dtype, count in (
    ("float32", 1), ("float32", 0), ("int32", 37), ("uint8", 0), ("uint8", 3), ("uint8", 28), ("bfloat16", 5))]
NUMBERS.insert(6, ("uint8", 16, "rows", ("uint8", 28, "from an odd byte")))      # not in words, as the ones before it are
NARROW = [("uint8", 112, "rows", ("uint8", 7, "every third"))]   # MXFP8-like: a scale for every 16


def make(rng, tokens, kind):
    """x of one rank."""
    values, hidden, how, scales = kind
    x = ANY[how](rng, tokens, hidden, values)
    if scales is None:
        return x
    dtype, count, lie = scales
    made = ANY[lie](rng, tokens, max(count, 1), dtype)
    return x, made if count else made[:, 0]


def raw(array):
    return np.ascontiguousarray(array).view(np.uint8)


def to_engine(array):
    """On a GPU with the strides that it has here."""
    if not on_gpu():
        return array
    whole = array
    while isinstance(whole.base, np.ndarray):                    # to the array that has the memory, of whatever type
        whole = whole.base
    import cupy
    begin = (array.__array_interface__["data"][0] - whole.__array_interface__["data"][0]) if array.size else 0
    memory = cupy.asarray(np.ascontiguousarray(whole)).view("u1").ravel()[begin:]
    return cupy.ndarray(array.shape, array.dtype, memory.data, array.strides)


def move(comm, kinds):
    me, tokens = comm.rank, TOKENS[:comm.size]
    layouts = Case(1, tokens, 64, 4 * comm.size, 3).make().layout
    with make_high_throughput_buffer(comm, HEAP) as buf:
        for number, kind in enumerate(kinds):
            x = [make(np.random.default_rng([number, r]), t, kind) for r, t in enumerate(tokens)]
            mine = tuple(map(to_engine, x[me])) if isinstance(x[me], tuple) else to_engine(x[me])
            first = buf.dispatch(mine, **counts_of(layouts[me]))
            for got in first, buf.dispatch(mine, first[4]):
                got[5].synchronize()
                parts = got[0] if isinstance(mine, tuple) else (got[0],)
                for part, *of_all in zip(parts, *[one if isinstance(one, tuple) else (one,) for one in x]):
                    want = np.concatenate([a[of_rank.is_token_in_rank[:, me]] for a, of_rank in zip(of_all, layouts)])
                    assert part.dtype == of_all[me].dtype and part.flags.c_contiguous, kind
                    assert part.shape == want.shape, kind
                    assert_bits(raw(down(part)), raw(want), str(kind))


@pytest.mark.parametrize("kinds", [PLAIN, TYPES, STRIDES, NUMBERS, NARROW], ids=["plain", "types", "strides", "numbers", "narrow"])
def test_rows_and_scales(kinds):
    ranks.run(3, move, kinds)


def move_wide(comm, kinds):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYEP_CPU_SHAPE", "2,8,4")
        move(comm, kinds)


@pytest.mark.skipif(on_gpu(), reason="shapes of the CPU engine")
def test_rows_and_scales_by_many_lanes():
    """A lane an item, in several turns; items of 1, 2 and 4 bytes."""
    ranks.run(2, move_wide, [NUMBERS[2], NUMBERS[4], NUMBERS[5], NUMBERS[7], STRIDES[0]])


def torch_types(comm):
    """Types that NumPy has not: packed FP4 with exponents for scales, as tensors."""
    import torch
    me, tokens = comm.rank, TOKENS[:comm.size]
    layout = Case(1, tokens, 64, 4 * comm.size, 3).make().layout
    choose_gpu()
    device = "cuda" if on_gpu() else "cpu"
    counts = {name: torch.from_numpy(getattr(layout[me], name)).to(device)
              for name in ("num_tokens_per_rank", "is_token_in_rank", "num_tokens_per_expert")}
    with make_high_throughput_buffer(comm, HEAP) as buf:
        for values, scales in (("float4_e2m1fn_x2", "float8_e8m0fnu"), ("float8_e5m2", "float8_e4m3fn"), ("uint8", "int32"),
                               ("float8_e4m3fnuz", "bfloat16")):
            by_column = getattr(torch, scales).itemsize == 1
            x = []
            for r, t in enumerate(tokens):
                some = torch.Generator().manual_seed(r)
                shape = (8, t) if by_column else (t, 8)
                one, other = (torch.randint(0, 256, n, dtype=torch.uint8, generator=some) for n in ((t, 32), shape))
                x.append((one, other.t() if by_column else other))
            mine = x[me][0].to(device).view(getattr(torch, values)), x[me][1].to(device).view(getattr(torch, scales))
            (recv_values, recv_scales), *_, event = buf.dispatch(mine, **counts)
            event.synchronize()
            assert recv_values.dtype == mine[0].dtype and recv_scales.dtype == mine[1].dtype and recv_scales.is_contiguous()
            for got, of_all in zip((recv_values, recv_scales), zip(*x)):
                want = np.concatenate([a.numpy()[of_rank.is_token_in_rank[:, me]] for a, of_rank in zip(of_all, layout)])
                assert_bits(got.view(torch.uint8).cpu().numpy(), want, f"{values}, {scales}")
    return "done"


def test_types_of_torch():
    pytest.importorskip("torch")
    done = ranks.launch(2, torch_types, timeout=200)
    assert done.results == ["done"] * 2, (done.errors, done.stderr)


def other_type(comm):
    """Ranks that send rows of different types: known before anything is sent, by all."""
    me, layouts = comm.rank, Case(1, TOKENS[:2], 64, 8, 3).make().layout
    with make_high_throughput_buffer(comm, HEAP, timeout_s=20) as buf:
        rng = np.random.default_rng(me)
        with pytest.raises(ValueError, match="first use of .* ranks .1. made another call|first use of .* ranks .0. made another"):
            buf.dispatch(up(bytes_of(rng, (TOKENS[me], 64), ("uint8", "int8")[me])), **counts_of(layouts[me]))


def test_ranks_with_other_types():
    ranks.run(2, other_type)
