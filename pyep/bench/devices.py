"""Array libraries and clocks: NumPy and PyTorch on the CPU, CuPy and PyTorch on GPUs.

Each class has: up (a NumPy array's values as an array of the library), down (the other way), stream (a context in which
operations run), seconds (how long a function takes), and on GPUs capture (a CUDA graph).
"""
import contextlib
import functools
import time

import ml_dtypes
import numpy as np


def make(array, buf):
    """The library `array` on the device that `buf` uses."""
    if buf.engine == "cpu":
        return {"numpy": NumPy, "torch": TorchOnCpu}[array]()
    return {"cupy": CuPy, "torch": TorchOnGpu}[array](buf.get_local_device_id())


class OnCpu:
    """An operation has ended when its call returns: the wall clock tells."""

    stream = contextlib.nullcontext

    def seconds(self, run):
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


class NumPy(OnCpu):
    """NumPy arrays, for the CPU engine."""

    def up(self, array):
        return array

    def down(self, array):
        return array


class TorchArrays:
    """NumPy has no bf16 and no e4m3 of its own, so PyTorch takes and gives them as integers of the same size."""

    device = "cpu"

    @functools.cached_property
    def torch(self):
        import torch
        return torch

    def up(self, array):
        name = array.dtype.name
        if not hasattr(ml_dtypes, name):
            return self.torch.from_numpy(array).to(self.device)
        integer = {1: np.uint8, 2: np.int16}[array.itemsize]
        return self.torch.from_numpy(array.view(integer)).view(getattr(self.torch, name)).to(self.device)

    def down(self, tensor):
        name = str(tensor.dtype).removeprefix("torch.")
        if not hasattr(ml_dtypes, name):
            return tensor.cpu().numpy()
        integer = {1: self.torch.uint8, 2: self.torch.int16}[tensor.element_size()]
        return tensor.cpu().view(integer).numpy().view(getattr(ml_dtypes, name))


class TorchOnCpu(TorchArrays, OnCpu):
    """PyTorch tensors in host memory, for the CPU engine."""


class CuPy:
    """CuPy arrays, streams, events and graphs."""

    def __init__(self, device):
        import cupy
        self.cupy = cupy
        cupy.cuda.Device(device).use()
        self._begin, self._end = cupy.cuda.Event(), cupy.cuda.Event()

    def up(self, array):
        if array.dtype == ml_dtypes.float8_e4m3fn:
            array = array.view(np.uint8)                         # CuPy has no FP8: its bytes
        return self.cupy.asarray(array)

    def down(self, array):
        return array.get()

    def stream(self):
        return self.cupy.cuda.Stream(non_blocking=True)          # the default stream cannot be captured

    def seconds(self, run):
        """Between two events around `run` on the current stream."""
        stream = self.cupy.cuda.get_current_stream()
        self._begin.record(stream)
        run()
        self._end.record(stream)
        self._end.synchronize()
        return 1e-3 * self.cupy.cuda.get_elapsed_time(self._begin, self._end)

    def capture(self, run):
        """A function that replays what `run` launches on the current stream."""
        stream = self.cupy.cuda.get_current_stream()
        stream.begin_capture()
        run()
        graph = stream.end_capture()
        return lambda: graph.launch(stream)


class TorchOnGpu(TorchArrays):
    """PyTorch tensors on a GPU, with its streams, events and graphs."""

    def __init__(self, device):
        self.device = f"cuda:{device}"
        self.torch.cuda.set_device(device)
        self._begin, self._end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))

    def stream(self):
        return self.torch.cuda.stream(self.torch.cuda.Stream())

    def seconds(self, run):
        """Between two events around `run` on the current stream."""
        self._begin.record()
        run()
        self._end.record()
        self._end.synchronize()
        return 1e-3 * self._begin.elapsed_time(self._end)

    def capture(self, run):
        """A function that replays what `run` launches on the current stream."""
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph, stream=self.torch.cuda.current_stream()):
            run()
        return graph.replay
