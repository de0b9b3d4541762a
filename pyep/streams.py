"""On which stream an operation runs, and what it waits for there."""
from .events import EventOverlap, moments


class Streams:
    """The caller's streams and the buffer's own one, `comm` (a CUstream as an int; None on the CPU engine).

    The operations of a buffer must run one after another: each takes the epoch that the one before has left in memory.  On the
    caller's streams the caller sees to that, on `comm` it comes by itself.  `enter` orders those on one and those on the other.
    """

    def __init__(self, engine):
        self.comm = engine.comm_stream if engine.name == "cuda" else None
        self._latest_on_comm, self._latest = False, 0            # of the latest operation: where it runs, its moment

    def enter(self, current, async_finish=False, previous_event=None):
        """The stream for the next launch, made to wait for all that comes before; `current`: the caller's stream.

        With async_finish it is `comm`, which waits for `current`, or for `previous_event` instead.
        """
        latest, self._latest = self._latest, next(moments)
        if not (async_finish or self._latest_on_comm or previous_event is not None):
            return current                                       # the usual case makes no call of CUDA
        if self.comm is None:
            if previous_event is not None:
                previous_event.synchronize()
            return current
        from .kernels import cuda
        stream = self.comm if async_finish else current
        if previous_event is not None:
            previous_event.make_wait(stream)
        if async_finish:
            # An event from before the latest operation does not cover it: if that runs on the caller's stream, wait for this too.
            if previous_event is None or not self._latest_on_comm and previous_event.moment < latest:
                cuda.stream_wait(stream, current)
        elif self._latest_on_comm and cuda.is_capturing(current) == cuda.is_capturing(self.comm):
            cuda.stream_wait(current, self.comm)                 # if one of them is being captured, the caller orders its graph
        self._latest_on_comm = async_finish
        return stream

    def follow(self, stream, current):
        """Make `stream` wait for all that the caller's stream has to do so far, beside what `enter` made it wait for."""
        if stream != current:
            from .kernels import cuda
            cuda.stream_wait(stream, current)

    def event(self, library, current, keep, async_finish, previous_event, check):
        """The `EventOverlap` of the operation that was launched last.  current: the caller's stream, of `library`.  keep: what the
        operation reads and writes.  check: raises what went wrong in it."""
        if async_finish and self.comm is not None:
            from .kernels import cuda
            event = EventOverlap(cuda.record(self.comm), keep, library, current, check)
        else:                                                    # nothing to record: it is done, or on the caller's stream
            event = EventOverlap(None, None, library, current, check)
        if previous_event is not None:
            event.moment = previous_event.moment                 # it does not cover what the caller's stream has done since
        return event
