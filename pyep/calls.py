"""What is left of an operation's arguments once they were checked."""


class Call:
    """An operation whose arguments were checked: what it needs besides their addresses.

    kernels (by phase) and results are set when it is about to run for the first time, see `LowLatencyOperations._make`.
    """

    __slots__ = "shape", "library", "index_bytes", "kernels", "results"

    def __init__(self, library, shape, index_bytes):
        """shape: a `layout.LowLatency`.  index_bytes: of an entry of topk_idx; 0 without it."""
        self.library, self.shape, self.index_bytes = library, shape, index_bytes
        self.kernels = self.results = None

    def at(self, array):
        """The address of an array; 0 for None."""
        return 0 if array is None else self.library.pointer(array)

    def aligned(self, array, argument):
        """The address of rows that kernels access 16 bytes at a time."""
        address = self.library.pointer(array)
        if address % 16 and len(array):
            raise ValueError(f"{argument} begins at address {address:#x}; rows must begin at a multiple of 16 bytes")
        return address
