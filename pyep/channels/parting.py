"""How ranks part: each lets go of what it holds in stages, for some of which all ranks must have come through the one before.

Nobody waits long for that: what cannot be let go of yet is *parked*, and looked at again whenever a Buffer is made or destroyed,
and at exit.  Finalizers only park: they may come at any time, in any thread, where nothing may be sent and nobody be waited for.
"""
import atexit
import collections
import time

WAIT_S = 1.0                            # how long `destroy` waits for the other ranks to destroy theirs too
NAP_S = 100e-6

_parked = collections.deque()


class Parting:
    """The leave of one rank of a `Buffer`."""

    def __init__(self, bootstrap, steps, failure=None):
        """steps: functions that let go of something, each called once all ranks have taken the one before; the first, and what
        follows the last, waits for nobody.  failure: why this rank leaves, in words, if it is after an error."""
        self._bootstrap, self._steps, self._failure, self._stage = bootstrap, list(steps), failure, 0

    @property
    def holds(self):
        """Whether there is something left to let go of."""
        return bool(self._steps)

    def go_on(self):
        """Take all steps that can be taken now; does not wait.  Whether it is over, on all ranks."""
        if self._stage == 0:
            self._take_step()
        while self._bootstrap.all_parted(self._stage):
            if not self._steps:
                self._bootstrap.forget()
                return True
            self._take_step()
        return False

    def _take_step(self):
        if self._steps:
            self._steps.pop(0)()
        self._stage += 1
        self._bootstrap.part(self._stage, self._failure)


def leave(thing, wait_s):
    """Let a `Parting` go on until it is over, for wait_s at most; then it is parked."""
    deadline = time.monotonic() + wait_s
    while not over(thing):
        if time.monotonic() >= deadline:
            _parked.append(thing)
            break
        tidy()                                                   # it may have to wait for what is parked
        time.sleep(NAP_S)


def park(thing):
    """For `tidy` to go on with.  May be called at any time."""
    _parked.append(thing)


def tidy():
    """Go on with all that is parked; waits for nobody."""
    for _ in range(len(_parked)):
        thing = _parked.popleft()
        if not over(thing):
            _parked.append(thing)


def over(thing):
    """Whether a `Parting` is over.  It is if the other ranks cannot be reached any more and nothing waits for them."""
    try:
        return thing.go_on()
    except Exception:                                            # of MPI or of the store
        return not thing.holds


atexit.register(tidy)                   # the ranks that are left should not wait for this one
