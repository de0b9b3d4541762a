"""Events: the moment at which an operation is done, for other streams and for the host to wait on."""
import itertools

from . import arrays

moments = itertools.count(1)            # numbers events and operations as the host makes them: an event covers what came before


class EventOverlap:
    """What `Buffer` operations return as `event`, and `Buffer.capture` makes; the names are DeepEP's.

    event: the CUDA event (`cuda.core.Event`) that was recorded behind an operation with async_finish, or by `Buffer.capture`.
        None where there is none to wait for.  Without async_finish an operation runs on the caller's own stream, and to wait
        for it is to wait for that stream.  On the CPU engine an operation is done when its call returns, and waiting is nothing.
    extra_tensors: the arrays that an operation on the communication stream reads and writes.  They live at least until the
        stream from which the operation was called waits for it, or the host does: until then keep the event.

    References keep memory, not PyTorch's `record_stream`: that would cost a call for every tensor, keep a graph's memory from
    being used again, and has no counterpart in CuPy.  They suffice: memory goes back to the stream on which it was allocated, and
    what is put on that stream later runs after the wait.
    """

    def __init__(self, event=None, extra_tensors=None, library=None, stream=0, check=None):
        """event: may also be an `EventHandle`, whose moment is then meant.
        library: whose current streams wait.  stream: the caller's, an int.  check: raises what went wrong in the operation."""
        self.moment = next(moments)                              # what the host did later, this event does not cover
        if isinstance(event, EventHandle):
            event, library, stream, self.moment = event.event, event._library, event._stream, event.moment
        self.event, self.extra_tensors = event, extra_tensors
        self._library, self._stream, self._check = library, stream, check

    def current_stream_wait(self):
        """Make the caller's current stream wait for the operation."""
        if self._library is not None and self._library.engine == "cuda":
            current = self._library.stream()
            self.make_wait(current)
            if current == self._stream:
                self.extra_tensors = None

    def synchronize(self):
        """Make the host wait for the operation; raises what went wrong in it."""
        if self._library is not None and self._library.engine == "cuda":
            from .kernels import cuda
            cuda.synchronize(self._stream if self.event is None else self.event)
        self.extra_tensors = None
        if self._check is not None:
            self._check()

    def make_wait(self, stream):
        """Make a stream, an int, wait."""
        if self.event is not None or self._library is not None and stream != self._stream:
            from .kernels import cuda
            cuda.stream_wait(stream, self._stream if self.event is None else self.event)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.current_stream_wait()


class EventHandle(EventOverlap):
    """An event behind all that was put on the caller's current stream so far; `EventOverlap(EventHandle())` is DeepEP's way to say
    `Buffer.capture()`.

    like: an array whose library's stream is meant.  Without it: PyTorch's if the program has used a GPU through it, else CuPy's.
    """

    def __init__(self, like=None):
        library = arrays.library_on_gpu() if like is None else arrays.library_of(like, "like")
        if library is None or library.engine == "cpu":
            super().__init__()
        else:
            from .kernels import cuda
            stream = library.stream()
            super().__init__(cuda.record(stream), None, library, stream)


def capture(like=None):
    """An event behind all that was put on the caller's current stream so far, for `previous_event`.  like: see `EventHandle`."""
    return EventOverlap(EventHandle(like))
