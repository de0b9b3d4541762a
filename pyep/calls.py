"""What is left of an operation's arguments once they were checked."""
from typing import NamedTuple

from . import arrays, layout
from .results import Results


class Call(NamedTuple):
    """An operation whose arguments were checked: what it needs besides their addresses."""

    shape: layout.LowLatency
    library: arrays.Library
    kernels: dict                       # by phase
    results: Results

    def at(self, array):
        """The address of an array; 0 for None."""
        return 0 if array is None else self.library.pointer(array)

    def aligned(self, array, argument):
        """The address of rows that kernels access 16 bytes at a time."""
        address = self.library.pointer(array)
        if address % 16 and len(array):
            raise ValueError(f"{argument} begins at address {address:#x}; rows must begin at a multiple of 16 bytes")
        return address
