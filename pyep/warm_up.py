"""`Buffer.warm_up`: what a program will use is used once, without a token, so that nothing is compiled later."""
import contextlib
import sys

import numpy as np

from . import arrays, layout


def warm_up(self, low_latency=(), high_throughput=(), *, like=None, progress=True):
    """Compile all kernels of these calls, on all ranks at once, and make ready what else their first use takes.  Collective; not in
    a graph's capture, and not while a hook waits to be called.  docs/settings.md lists the arguments that compile, under "What
    compiles kernels".

    low_latency: a dict for each kind of dispatch, with the arguments of `low_latency_dispatch` by name, but instead of arrays
        hidden: H; num_topk: K; index_dtype: of topk_idx, "int64" (or "int32"); weighted: whether topk_weights are given (False).
        Its combine is warmed up too.  All smaller num_max_dispatch_tokens_per_rank then are ready as well (on GPUs there are two
        sets of kernels: for num_max_dispatch_tokens_per_rank * ranks up to 64, and above).
    high_throughput: a dict for each kind of dispatch, with num_experts and these arguments of `dispatch` by name: num_worst_tokens,
        config, expert_alignment; and instead of arrays
        hidden: H; num_topk: K; index_dtype, weighted: as above; dtype: of rows, "bfloat16" or "float8_e4m3fn";
        cached: whether the dispatch with its handle, and the combine with topk_weights, are used too: those of backward passes.
    like: an array of the library that the program uses, on its device.  None: NumPy on the CPU engine; on GPUs PyTorch if the
        program has used a GPU through it, else CuPy.
    progress: show a bar on rank 0 (with tqdm; a line for each call without it).

        buf.warm_up(low_latency=[dict(hidden=7168, num_topk=8, num_max_dispatch_tokens_per_rank=128, num_experts=256)],
                    high_throughput=[dict(hidden=7168, num_topk=8, num_experts=256, weighted=True, cached=True)])
    """
    library = _library(self.engine, like)
    calls = [("low_latency", _low_latency, entry) for entry in low_latency]
    calls += [("high_throughput", _high_throughput, entry) for entry in high_throughput]
    for family, _, entry in calls:
        missing = [name for name in ("hidden", "num_topk", "num_experts") if name not in entry]
        if missing:
            raise TypeError(f"{family} has an entry without {', '.join(missing)}: {entry}")
    with _progress(len(calls), progress and self.rank == 0) as done:
        for family, use, entry in calls:
            use(self, library, **entry)
            done(f"{family} {entry}")
    self._connection.engine.synchronize()


def _library(engine, like):
    """The library in whose arrays calls are made."""
    if like is not None:
        return arrays.library_of(like, "like")
    library = arrays.library_of(np.empty(0), "like") if engine == "cpu" else arrays.library_on_gpu()
    if library is None:
        raise ValueError("like is None, but the program has imported neither PyTorch nor CuPy; expected an array")
    return library


def _tokens(library, hidden, num_topk, index_dtype, weighted, dtype="bfloat16"):
    """No tokens at all: (x, topk_idx, topk_weights or None)."""
    return (library.empty((0, hidden), dtype), library.empty((0, num_topk), index_dtype),
            library.empty((0, num_topk), "float32") if weighted else None)


def _low_latency(buf, library, hidden, num_topk, index_dtype="int64", weighted=False, **options):
    x, topk_idx, weights = _tokens(library, hidden, num_topk, index_dtype, weighted)
    handle = buf.low_latency_dispatch(x, topk_idx, topk_weights=weights, **options).handle
    y, weights = buf.get_next_low_latency_combine_buffer(handle), library.empty((0, num_topk), "float32")
    buf.low_latency_combine(y, topk_idx, weights, handle)


def _high_throughput(buf, library, hidden, num_topk, num_experts, index_dtype="int64", weighted=False, dtype="bfloat16",
                     cached=False, config=None, **options):
    x, topk_idx, weights = _tokens(library, hidden, num_topk, index_dtype, weighted, dtype)
    if dtype != "bfloat16":
        x = x, library.empty((0, hidden // layout.FP8_BLOCK), "float32")
    per_rank, _, per_expert, in_rank, _ = buf.get_dispatch_layout(topk_idx, num_experts)
    handle = buf.dispatch(x, num_tokens_per_rank=per_rank, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert,
                          topk_idx=topk_idx, topk_weights=weights, config=config, **options)[4]
    rows = len(handle[1])                                        # 0, or num_worst_tokens
    y = library.empty((rows, hidden), "bfloat16")
    buf.combine(y, handle, config=config)
    if cached:
        buf.dispatch(_tokens(library, hidden, num_topk, index_dtype, weighted)[0], handle, config=config)        # a gradient: bf16
        if dtype != "bfloat16":
            buf.dispatch(x, handle, config=config)
        if weighted:
            buf.combine(y, handle, topk_weights=library.empty((rows, num_topk), "float32"), config=config)


@contextlib.contextmanager
def _progress(total, shown):
    """A function to be called after each step, with what was done."""
    if not shown:
        yield lambda what: None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        steps = iter(range(1, total + 1))
        yield lambda what: print(f"warm_up {next(steps)}/{total}: {what}", file=sys.stderr)
        return
    with tqdm(total=total, desc="warm_up", unit="call", file=sys.stderr) as bar:
        yield lambda what: bar.update()
