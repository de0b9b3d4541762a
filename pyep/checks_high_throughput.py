"""Arguments that no high-throughput operation can serve, as in `pyep.checks`; and what those that can be served move."""
import numbers
from typing import NamedTuple

from . import arrays, layout
from .checks import check_async, check_library, index_bytes_of, library_on
from .config import Config
from .high_throughput import Shape
from .high_throughput_errors import COMBINE, DISPATCH
from .high_throughput_results import HighThroughputHandle, kind_of
from .kernels.intranode import ROW, SCALES, SOURCE, TOPK_IDX, TOPK_WEIGHTS

SCALE_TYPES = "float32", "int32", "uint32", "uint8", "int8", "float8_e8m0fnu", "float8_e4m3fn", "bfloat16", "float16"
LAYOUT = "num_tokens_per_rank", "is_token_in_rank", "num_tokens_per_expert"
GIVEN = *LAYOUT, "topk_idx", "topk_weights"                      # to a dispatch without a handle


def check_run(config, previous_event):
    """How an operation runs."""
    if config is not None and not isinstance(config, Config):
        raise TypeError(f"config is a {type(config).__name__}; expected a Config or None")
    if previous_event is not None:
        check_async(False, False, previous_event)


def check_count(name, value, least):
    """The value as an int."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; expected an int")
    if not least <= value < 2**31:
        raise ValueError(f"{name} is {value}; expected at least {least}")
    return int(value)


def check_num_experts(num_experts, num_ranks):
    """The number as an int."""
    num_experts = check_count("num_experts", num_experts, -2**31)
    if num_experts < 1 or num_experts % num_ranks:
        raise ValueError(f"num_experts is {num_experts}; expected a multiple of the {num_ranks} ranks")
    if num_experts // num_ranks > layout.MAX_LOCAL_EXPERTS:
        raise ValueError(f"num_experts is {num_experts}; expected at most {layout.MAX_LOCAL_EXPERTS} a rank")
    return num_experts


def check_hidden(hidden):
    if hidden < 8 or hidden % 8:
        raise ValueError(f"hidden is {hidden}; expected a multiple of 8 (rows of whole 16-byte vectors)")


def check_topk_idx(topk_idx, library, num_tokens):
    """K."""
    arrays.check(topk_idx, "topk_idx", library, ("int64", "int32"), (num_tokens, "K"))
    if topk_idx.shape[1] < 1:
        raise ValueError("topk_idx selects 0 experts a token; expected at least 1")
    return topk_idx.shape[1]


def check_layout(engine, num_ranks, topk_idx, num_experts):
    """The arguments of `get_dispatch_layout` but for values and addresses: (library, T, K, bytes of an entry of topk_idx, E)."""
    library = library_on(engine, topk_idx, "topk_idx")
    num_topk = check_topk_idx(topk_idx, library, "T")
    num_experts = check_num_experts(num_experts, num_ranks)
    return library, topk_idx.shape[0], num_topk, index_bytes_of(library, topk_idx), num_experts


# ---- rows and their scales -------------------------------------------------------------------------------------------

class Moved(NamedTuple):
    """What an operation moves, and how it lies in memory, strides in bytes."""

    library: arrays.Library
    shape: Shape
    num_tokens: int                     # T
    kinds: tuple = ()                   # of a dispatch's results, `Kind`s
    index_bytes: int = 8                # of an entry of topk_idx
    num_worst_tokens: int = 0
    expert_alignment: int = 1
    x_stride: int = 0                   # from one row to the next
    scales_stride: int = 0              # from one row's scales to the next's
    scale_stride: int = 0               # from one of them to the next
    scale_item: int = 4                 # bytes that are moved of them at a time


def values_and_scales(x):
    """The tokens of a dispatch, an array or a pair: (values, scales or None)."""
    if not isinstance(x, tuple):
        return x, None
    if len(x) != 2 or x[1] is None:
        raise TypeError(f"x is a tuple of {len(x)}; expected a [T, H] array or the pair (values, scales)")
    return x


def byte_strides(array):
    """Strides in bytes."""
    return tuple(array.dtype.itemsize * n for n in array.stride()) if hasattr(array, "stride") else array.strides


def check_values(engine, values, argument, alone):
    """[T, H] bf16 or of any type of one byte, each row in one piece: (library, bytes from one row to the next).  alone: whether no
    scales belong to them; bf16 has none."""
    library = library_on(engine, values, argument)
    name = library.dtype(values)
    if not (name == "bfloat16" and alone or values.dtype.itemsize == 1 and name != "bool"):
        raise TypeError(f"{argument} has dtype {name}; expected {'bfloat16 or ' if alone else ''}a type of one byte, for instance "
                        "float8_e4m3fn or uint8")
    if len(values.shape) != 2:
        raise ValueError(f"{argument} has shape {list(values.shape)}; expected [T, H]")
    num_tokens, hidden = values.shape
    if name == "bfloat16":
        check_hidden(hidden)
    elif hidden < 16 or hidden % 16:
        raise ValueError(f"hidden is {hidden}; expected a multiple of 16 for rows of {name} (rows of whole 16-byte vectors)")
    row, (stride, step) = hidden * values.dtype.itemsize, byte_strides(values)
    if num_tokens > 0 and step != values.dtype.itemsize:
        raise ValueError(f"{argument} is not contiguous within a row; pass a contiguous copy of it")
    if num_tokens > 1 and stride % 16:
        raise ValueError(f"{argument} has rows {stride} bytes apart; expected a multiple of 16: pass a contiguous copy of it")
    return library, stride if num_tokens > 1 else row


def check_x(engine, values, scales):
    """x: (library, fields of `Shape`, `Kind`s, fields of `Moved`)."""
    argument = "x" if scales is None else "x[0], the values,"
    library, x_stride = check_values(engine, values, argument, scales is None)
    arrays.check_aligned(values, argument, library)
    num_tokens, hidden = values.shape
    shape = dict(hidden=hidden, dtype=library.dtype(values))
    kinds, moved = (kind_of(ROW, values.dtype, hidden),), dict(x_stride=x_stride)
    if scales is None:
        return library, shape, kinds, moved
    arrays.library_of(scales, "x[1], the scales,")               # for its error
    if len(scales.shape) not in (1, 2) or scales.shape[0] != num_tokens or 0 in scales.shape[1:]:
        raise ValueError(f"x[1], the scales, has shape {list(scales.shape)}; expected [{num_tokens}, S] or [{num_tokens}]")
    arrays.check_type(scales, "x[1], the scales,", library, SCALE_TYPES)
    item, (scales_stride, *steps) = scales.dtype.itemsize, byte_strides(scales)
    num_scales, step = (scales.shape[1], steps[0]) if steps else (1, item)
    scale_bytes = item * num_scales
    shape |= dict(scale_bytes=scale_bytes, scale_dtype=library.dtype(scales))
    kinds += kind_of(SCALES, scales.dtype, *scales.shape[1:]),
    in_one_piece = num_scales == 1 or step == item
    if in_one_piece and scale_bytes % 4 == 0 and scales_stride % 4 == 0 and library.pointer(scales) % 4 == 0:
        item = step = 4                                          # in words
    moved |= dict(scales_stride=scales_stride, scale_stride=step, scale_item=item)
    return library, shape, kinds, moved


# ---- operations ------------------------------------------------------------------------------------------------------

def check_dispatch(engine, num_ranks, values, scales, num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert, topk_idx,
                   topk_weights, expert_alignment, num_worst_tokens):
    """The arguments of a dispatch without a handle, but for values and addresses: `Moved`."""
    library, shape, kinds, moved = check_x(engine, values, scales)
    num_tokens = values.shape[0]
    expert_alignment = check_count("expert_alignment", expert_alignment, 1)
    num_worst_tokens = check_count("num_worst_tokens", num_worst_tokens, 0)
    for name, array in zip(LAYOUT, (num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert)):
        if array is None:
            raise ValueError(f"{name} is None; expected what get_dispatch_layout returned, or a handle")
    arrays.check(num_tokens_per_rank, "num_tokens_per_rank", library, ("int32",), (num_ranks,))
    arrays.check(is_token_in_rank, "is_token_in_rank", library, ("bool",), (num_tokens, num_ranks))
    arrays.check(num_tokens_per_expert, "num_tokens_per_expert", library, ("int32",), ("E",))
    num_experts = num_tokens_per_expert.shape[0]
    if num_experts < 1 or num_experts % num_ranks or num_experts // num_ranks > layout.MAX_LOCAL_EXPERTS:
        raise ValueError(f"num_tokens_per_expert has shape [{num_experts}]; expected a multiple of the {num_ranks} ranks, and at "
                         f"most {layout.MAX_LOCAL_EXPERTS} experts a rank")
    kinds += kind_of(SOURCE, library.dtype_of("int32")),
    num_topk, index_bytes = 0, 8
    if topk_idx is not None:
        num_topk, index_bytes = check_topk_idx(topk_idx, library, num_tokens), index_bytes_of(library, topk_idx)
        kinds += kind_of(TOPK_IDX, library.dtype_of("int64"), num_topk),
    if topk_weights is not None:
        if topk_idx is None:
            raise ValueError("topk_weights are given, but topk_idx is None; expected both: weights belong to selections")
        arrays.check(topk_weights, "topk_weights", library, ("float32",), (num_tokens, num_topk))
        kinds += kind_of(TOPK_WEIGHTS, library.dtype_of("float32"), num_topk),
    shape = Shape(DISPATCH, num_ranks, **shape, num_topk=num_topk, weighted=topk_weights is not None, num_experts=num_experts,
                  counts="worst" if num_worst_tokens else "exchanged")
    return Moved(library, shape, num_tokens, kinds, index_bytes, num_worst_tokens, expert_alignment, **moved)


def check_none(given):
    """ValueError unless all that a handle stands for is None (or 0); given: by name."""
    for name, value in given.items():
        if value is not None and not (name == "num_worst_tokens" and value == 0):
            raise ValueError(f"{name} is given together with handle; expected None: the handle has the layout, and only x moves")


def check_cached(engine, num_ranks, values, scales, dispatched_with, num_tokens):
    """x of a dispatch with a handle, likewise.  dispatched_with, num_tokens: the library and the T of the handle."""
    library, shape, kinds, moved = check_x(engine, values, scales)
    check_library(library, dispatched_with)
    if values.shape[0] != num_tokens:
        raise ValueError(f"x has {values.shape[0]} tokens; expected the {num_tokens} that handle is for")
    return Moved(library, Shape(DISPATCH, num_ranks, **shape, counts="cached"), num_tokens, kinds, **moved)


def biases_of(bias):
    """bias as a tuple of arrays."""
    biases = () if bias is None else tuple(bias) if isinstance(bias, (tuple, list)) else (bias,)
    if len(biases) > 2:
        raise ValueError(f"bias has {len(biases)} arrays; expected at most 2")
    return biases


def check_combine(engine, num_ranks, x, topk_weights, *rest):
    """The arguments of a combine, likewise.  rest: the biases, then library, N and T of the handle."""
    *biases, dispatched_with, num_rows, num_tokens = rest
    library = library_on(engine, x, "x")
    arrays.check(x, "x", library, ("bfloat16",), (num_rows, "H"))
    arrays.check_aligned(x, "x", library)
    check_library(library, dispatched_with)
    hidden = x.shape[1]
    check_hidden(hidden)
    num_topk = 0
    if topk_weights is not None:
        arrays.check(topk_weights, "topk_weights", library, ("float32",), (num_rows, "K"))
        num_topk = topk_weights.shape[1]
        if num_topk < 1:
            raise ValueError("topk_weights has 0 weights a row; expected at least 1")
    for i, array in enumerate(biases):
        argument = f"bias[{i}]" if len(biases) > 1 else "bias"
        arrays.check(array, argument, library, ("bfloat16",), (num_tokens, hidden))
        arrays.check_aligned(array, argument, library)
    return Moved(library, Shape(COMBINE, num_ranks, hidden, num_topk=num_topk, weighted=num_topk > 0), num_tokens)


def check_high_throughput_shape(num_max_tokens, hidden, num_ranks, num_topk, hidden_bytes, num_results):
    """The arguments of the size hint, as ints."""
    given = [check_count(name, value, least) for name, value, least in (
        ("num_max_tokens", num_max_tokens, 0), ("hidden", hidden, 0), ("num_ranks", num_ranks, 1), ("num_topk", num_topk, 0),
        ("hidden_bytes", 2 * hidden if hidden_bytes is None else hidden_bytes, 1), ("num_results", num_results, 1))]
    check_hidden(given[1])
    return given


def check_handle(handle, owner):
    """What `dispatch` of the buffer `owner` returned as handle."""
    if not isinstance(handle, HighThroughputHandle):
        kind = "None" if handle is None else f"a {type(handle).__name__}"
        raise TypeError(f"handle is {kind}; expected what dispatch returned as handle")
    if handle.owner != owner:
        raise ValueError("handle is of another Buffer; expected one that dispatch of this buffer returned")
