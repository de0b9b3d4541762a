"""`deep_ep.utils.testing`: how DeepEP's tests time calls and kernels."""
import time

import torch
import torch.distributed as dist

CACHE_BYTES = 256 << 20                 # more than any GPU's L2 cache
HEAD_START = 20_000_000                 # cycles: about 10 ms, in which hosts launch what is to be timed


def bench(fn, num_warmups=50, num_tests=50, post_fn=None, flush_l2=True):
    """Seconds of a call: (average, shortest, longest) of num_tests calls, but for the first.

    On GPUs between two events around the call on the current stream; without one, of the host.
    post_fn: called after each call, not timed.  flush_l2: on GPUs write over the L2 cache before each call.
    """
    for _ in range(num_warmups):
        fn()
    timed = time_on_gpu if torch.cuda.is_available() else time_on_host
    seconds = timed(fn, num_tests, post_fn or (lambda: None), flush_l2)[1:]
    return sum(seconds) / len(seconds), min(seconds), max(seconds)


def time_on_gpu(fn, num_tests, post_fn, flush_l2):
    """Seconds of each call."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(num_tests)]
    for begin, end in pairs:
        if flush_l2:
            flush_l2_cache()
        begin.record()
        fn()
        end.record()
        post_fn()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]


def time_on_host(fn, num_tests, post_fn, flush_l2):
    """Seconds of each call; there is no L2 cache to flush."""
    seconds = []
    for _ in range(num_tests):
        start = time.perf_counter()
        fn()
        seconds.append(time.perf_counter() - start)
        post_fn()
    return seconds


def flush_l2_cache():
    torch.zeros(CACHE_BYTES // 4, dtype=torch.int32, device="cuda")


def bench_kineto(fn, kernel_names, num_tests=30, suppress_kineto_output=False, trace_path=None, flush_l2=True,
                 barrier_comm_profiling=False, num_kernels_per_period=1, barrier=None):
    """Seconds of the GPU kernels that a call launches, on average over num_tests calls.

    kernel_names: parts of their names; a str, or a tuple for a list of results.  pyep's are called pyep_dispatch, pyep_combine,
        pyep_combine_reduced, pyep_notify and pyep_layout.
    num_kernels_per_period: if k > 1, the result for a name is a list of k numbers, of every k-th kernel of the name from the
        first, second, ... on: for calls that launch a kernel for each of k phases.
    barrier_comm_profiling: let all ranks wait for each other on their GPUs before each call, by `barrier()` or an all-reduce, so
        that no rank's kernel is timed while it waits for another rank's host.
    trace_path: also write a trace for Chrome.  flush_l2: as for `bench`.  suppress_kineto_output: the profiler prints nothing.
    """
    if not torch.cuda.is_available():
        raise NotImplementedError("bench_kineto times kernels of a GPU, and there is none; bench times calls on the host")
    fn()
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    token = torch.ones(1, dtype=torch.float32, device="cuda")
    with profile:
        for _ in range(num_tests):
            if flush_l2:
                flush_l2_cache()
            if barrier_comm_profiling:
                torch.cuda._sleep(HEAD_START)
                barrier() if barrier else dist.all_reduce(token)
            fn()
        torch.cuda.synchronize()
    if trace_path:
        profile.export_chrome_trace(trace_path)
    kernels = [(event.name, event.time_range.start, event.time_range.elapsed_us()) for event in profile.events()
               if event.device_type == torch.autograd.DeviceType.CUDA]
    names = (kernel_names,) if isinstance(kernel_names, str) else kernel_names
    seconds = [seconds_of(name, kernels, num_kernels_per_period) for name in names]
    return seconds[0] if isinstance(kernel_names, str) else seconds


def seconds_of(name, kernels, per_period=1):
    """The average over the kernels with `name` in their names, 0 if there are none; or a list, see `bench_kineto`.

    kernels: (name, start, microseconds) of each.
    """
    found = [us / 1e6 for kernel, _, us in sorted(kernels, key=lambda kernel: kernel[1]) if name in kernel]
    if len(found) % per_period:
        raise ValueError(f"{len(found)} kernels have {name!r} in their names; expected a multiple of num_kernels_per_period = "
                         f"{per_period}")
    phases = [found[i::per_period] for i in range(per_period)]
    averages = [sum(phase) / len(phase) if phase else 0 for phase in phases]
    return averages if per_period > 1 else averages[0]
