"""Arrays and buffers of the engine that PYEP_DEVICE names: NumPy on the CPU, CuPy on GPUs."""
import os

import pyep


# A kernel for CuPy that keeps a stream busy for so many nanoseconds.
SPIN = r"""
extern "C" __global__ void spin(long long ns) {
    long long start, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
    do asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)); while (now - start < ns);
}"""


def on_gpu():
    return os.environ["PYEP_DEVICE"] == "cuda"


def up(array):
    """The engine's array of a NumPy array's values; on a GPU, call `make_buffer` first: it chooses the device."""
    if not on_gpu():
        return array
    import cupy
    return cupy.asarray(array)


def down(array):
    """The NumPy array of an engine's array; on the CPU it is the same one."""
    return array.get() if on_gpu() else array


def make_buffer(comm, M, H, E, K, **options):
    """A Buffer with the memory that low-latency operations of this shape need; more or other arguments in `options`."""
    choose_gpu()
    size = pyep.Buffer.get_low_latency_rdma_size_hint(M, H, comm.size, E, num_topk=K)
    return pyep.Buffer(**dict(comm=comm, num_rdma_bytes=size, low_latency_mode=True) | options)


def make_high_throughput_buffer(comm, num_nvl_bytes, **options):
    """A Buffer for high-throughput operations alone; more or other arguments in `options`."""
    choose_gpu()
    return pyep.Buffer(**dict(comm=comm, num_nvl_bytes=num_nvl_bytes) | options)


def choose_gpu():
    """Make this rank's GPU the current one."""
    if on_gpu():
        import cupy
        from mpi4py import MPI
        cupy.cuda.Device(MPI.COMM_WORLD.rank % cupy.cuda.runtime.getDeviceCount()).use()        # also for a buffer of its own
