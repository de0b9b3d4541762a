"""Events: the moment at which an operation is done, for other streams and for the host to wait on."""


class EventOverlap:
    """What `Buffer` operations return as `event`; the names are DeepEP's.

    On the CPU engine an operation is done when its call returns, and waiting is nothing.
    """

    def __init__(self, library=None, check=None):
        self._library, self._check = library, check or (lambda: None)
        self._stream = library.stream() if library else 0

    def current_stream_wait(self):
        """Make the caller's current stream wait for the operation."""
        if self._library and self._library.engine == "cuda" and self._library.stream() != self._stream:
            from .kernels import cuda
            cuda.stream_wait(self._library.stream(), self._stream)

    def synchronize(self):
        """Make the host wait for the operation; raises what went wrong in it."""
        if self._library and self._library.engine == "cuda":
            from .kernels import cuda
            cuda.synchronize(self._stream)
        self._check()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.current_stream_wait()
