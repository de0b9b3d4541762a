"""What kernels a shape needs, without compiling any: engines that note what they are asked for."""
from typing import NamedTuple

from pyep.kernels.cpu import CpuEngine
from pyep.low_latency import make_plan


class Launch(NamedTuple):
    """What an engine is asked for."""

    fn: object
    blocks: int
    threads: int
    shared_bytes: int
    overlap: bool
    constants: dict


class Notes:
    """An engine that compiles nothing: it notes its launches."""

    def kernel(self, fn, blocks, threads, shared_bytes=0, overlap=False, **constants):
        return Launch(fn, blocks, threads, shared_bytes, overlap, constants)


class OnCpu(Notes, CpuEngine):
    """The engine of the CPU."""


def launches(engine, shape, index_bytes, ports=0):
    """All launches of a low-latency shape: {"operation-phase": Launch}."""
    plan = make_plan(engine, shape, index_bytes, 0, ports)
    return {f"{operation}-{phase}": launch for operation in ("dispatch", "combine")
            for phase, launch in getattr(plan, operation).items()}
