"""Arguments that no high-throughput operation can serve, as in `pyep.checks`."""
import numbers

from . import arrays, layout
from .checks import check_async, index_bytes_of, library_on
from .config import Config
from .high_throughput import COMBINE, DISPATCH, HighThroughputHandle, Shape

LAYOUT = "num_tokens_per_rank", "is_token_in_rank", "num_tokens_per_expert"


def check_run(config, previous_event):
    """How an operation runs."""
    if config is not None and not isinstance(config, Config):
        raise TypeError(f"config is a {type(config).__name__}; expected a Config or None")
    if previous_event is not None:
        check_async(False, False, previous_event)


def check_count(name, value, least):
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; expected an int")
    if not least <= value < 2**31:
        raise ValueError(f"{name} is {value}; expected at least {least}")


def check_num_experts(num_experts, num_ranks):
    check_count("num_experts", num_experts, -2**31)
    if num_experts < 1 or num_experts % num_ranks:
        raise ValueError(f"num_experts is {num_experts}; expected a multiple of the {num_ranks} ranks")
    if num_experts // num_ranks > layout.MAX_LOCAL_EXPERTS:
        raise ValueError(f"num_experts is {num_experts}; expected at most {layout.MAX_LOCAL_EXPERTS} a rank")


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
    """The arguments of `get_dispatch_layout` but for values and addresses: (library, T, K, bytes of an entry of topk_idx)."""
    library = library_on(engine, topk_idx, "topk_idx")
    num_topk = check_topk_idx(topk_idx, library, "T")
    check_num_experts(num_experts, num_ranks)
    return library, topk_idx.shape[0], num_topk, index_bytes_of(library, topk_idx)


def values_and_scales(x):
    """The tokens of a dispatch, an array of bf16 or a pair: (values, scales or None)."""
    if not isinstance(x, tuple):
        return x, None
    if len(x) != 2 or x[1] is None:
        raise TypeError(f"x is a tuple of {len(x)}; expected a [T, H] array of bfloat16 or the pair (values, scales) of FP8")
    return x


def check_x(engine, values, scales):
    """[T, H] bf16, or e4m3 with scales [T, H/128]: the library."""
    if scales is None:
        library = library_on(engine, values, "x")
        arrays.check(values, "x", library, ("bfloat16",), ("T", "H"))
        check_hidden(values.shape[1])
        return library
    library = library_on(engine, values, "x[0], the values,")
    dtypes = ("float8_e4m3fn", "uint8") if library.name == "cupy" else ("float8_e4m3fn",)       # CuPy has no FP8
    arrays.check(values, "x[0], the values,", library, dtypes, ("T", "H"))
    num_tokens, hidden = values.shape
    if hidden < 1 or hidden % layout.FP8_BLOCK:
        raise ValueError(f"hidden is {hidden}; expected a multiple of {layout.FP8_BLOCK} for FP8")
    arrays.check(scales, "x[1], the scales,", library, ("float32",), (num_tokens, hidden // layout.FP8_BLOCK))
    return library


def check_dispatch(engine, num_ranks, values, scales, num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert, topk_idx,
                   topk_weights, expert_alignment, num_worst_tokens):
    """The arguments of a dispatch without a handle, but for values and addresses: (library, `Shape`, bytes of topk_idx's items)."""
    library = check_x(engine, values, scales)
    num_tokens, hidden = values.shape
    check_count("expert_alignment", expert_alignment, 1)
    check_count("num_worst_tokens", num_worst_tokens, 0)
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
    num_topk, index_bytes = 0, 8
    if topk_idx is not None:
        num_topk, index_bytes = check_topk_idx(topk_idx, library, num_tokens), index_bytes_of(library, topk_idx)
    if topk_weights is not None:
        if topk_idx is None:
            raise ValueError("topk_weights are given, but topk_idx is None; expected both: weights belong to selections")
        arrays.check(topk_weights, "topk_weights", library, ("float32",), (num_tokens, num_topk))
    shape = Shape(DISPATCH, num_ranks, hidden, scales is not None, num_topk, topk_weights is not None, num_experts,
                  "worst" if num_worst_tokens else "exchanged")
    return library, shape, index_bytes


def check_cached(engine, num_ranks, values, scales, handle, given):
    """The arguments of a dispatch with a handle, likewise.  given: by name, what must be None (or 0)."""
    for name, value in given.items():
        if value is not None and not (name == "num_worst_tokens" and value == 0):
            raise ValueError(f"{name} is given together with handle; expected None: the handle has the layout, and only x moves")
    library = check_x(engine, values, scales)
    check_library(handle, library)
    num_tokens, hidden = values.shape
    if num_tokens != handle.known.num_tokens:
        raise ValueError(f"x has {num_tokens} tokens; expected the {handle.known.num_tokens} that handle is for")
    return library, Shape(DISPATCH, num_ranks, hidden, scales is not None, counts="cached"), 8


def check_combine(engine, num_ranks, x, handle, topk_weights, bias):
    """The arguments of a combine, likewise; also bias as a tuple of arrays."""
    library = library_on(engine, x, "x")
    check_library(handle, library)
    arrays.check(x, "x", library, ("bfloat16",), (handle.known.num_rows, "H"))
    hidden = x.shape[1]
    check_hidden(hidden)
    num_topk = 0
    if topk_weights is not None:
        arrays.check(topk_weights, "topk_weights", library, ("float32",), (handle.known.num_rows, "K"))
        num_topk = topk_weights.shape[1]
        if num_topk < 1:
            raise ValueError("topk_weights has 0 weights a row; expected at least 1")
    biases = () if bias is None else tuple(bias) if isinstance(bias, (tuple, list)) else (bias,)
    if len(biases) > 2:
        raise ValueError(f"bias has {len(biases)} arrays; expected at most 2")
    for i, array in enumerate(biases):
        arrays.check(array, f"bias[{i}]" if isinstance(bias, (tuple, list)) else "bias", library, ("bfloat16",),
                     (handle.known.num_tokens, hidden))
    return library, Shape(COMBINE, num_ranks, hidden, False, num_topk, num_topk > 0), biases


def check_high_throughput_shape(num_max_tokens, hidden, num_ranks, num_topk, hidden_bytes, num_results):
    """The arguments of the size hint."""
    for name, value, least in (("num_max_tokens", num_max_tokens, 0), ("hidden", hidden, 0), ("num_ranks", num_ranks, 1),
                               ("num_topk", num_topk, 0), ("hidden_bytes", 1 if hidden_bytes is None else hidden_bytes, 1),
                               ("num_results", num_results, 1)):
        check_count(name, value, least)
    check_hidden(hidden)


def check_handle(handle, owner):
    """What `dispatch` of the buffer `owner` returned as handle."""
    if not isinstance(handle, HighThroughputHandle):
        kind = "None" if handle is None else f"a {type(handle).__name__}"
        raise TypeError(f"handle is {kind}; expected what dispatch returned as handle")
    if handle.owner != owner:
        raise ValueError("handle is of another Buffer; expected one that dispatch of this buffer returned")


def check_library(handle, library):
    """TypeError unless a handle's arrays are of this library."""
    other = arrays.library_of(handle[0], "handle")
    if other is not library:
        raise TypeError(f"x is a {library.name} array, but handle is of a dispatch of {other.name} arrays")
