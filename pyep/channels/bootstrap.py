"""How the ranks of a `Buffer` find each other, agree, and part again on the host: by what they post on a *board*.

A board belongs to a communicator or a process group and serves all Buffers on it: each rank posts values under keys, which the
others can read (`MpiBoard`, `StoreBoard`).  Nothing here is a collective of MPI or of torch.distributed: those have no time limit
and cannot say who is missing.
"""
import contextlib
import hashlib
import pickle
import secrets
import time

from ..errors import EPTimeoutError, EPTransportError

LOOK_S = 0.1                            # how often a rank that waits looks at what has become of each of the others
SHORT_NAP_S, LONG_NAP_S = 20e-6, 2e-3   # between two looks at the board
HAS_FAILED = "has failed: "
HELLO, AGREED = "hello", "agreed"       # keys of all Buffers; those of one begin with what its ranks have agreed on


class Bootstrap:
    """The ranks of one `Buffer`.  Made by all of them, each bounded by timeout_s.

    rank, size   this rank, and how many there are
    board        where they post
    """

    def __init__(self, board, timeout_s):
        self.board, self.rank, self.size = board, board.rank, board.size
        self._everyone, self._step, self._name = range(board.size), 0, None
        try:
            board.open(timeout_s)
            self._name = self._agree(timeout_s)
        except BaseException as error:
            tell_failure(board, error)
            raise
        board.serve(self._name)

    def _agree(self, timeout_s):
        """A name that all ranks have in common and that nobody had before.

        Each rank posts a number that it has drawn, and, whenever it has read other numbers of its peers than before, what it
        makes of all of them.  Once all ranks make the same of them, these were of now: numbers that a peer has left on the board,
        in an attempt that has failed, it did not draw together with this rank's.  So ranks of which some have given up before
        find together the next time.
        """
        board, what = self.board, "Buffer: meeting"
        board.post(HELLO, pickle.dumps((board.attempts, secrets.token_bytes(8), None)))
        mine, waiting = None, Waiting(timeout_s)
        while True:
            hellos = board.read_all(HELLO, self._everyone)
            if hellos is not None:
                name = hashlib.blake2b(b"".join(hellos), digest_size=8).hexdigest()
                if name != mine:
                    board.post(AGREED, name.encode())
                    mine = name
                agreed = board.read_all(AGREED, self._everyone)
                if agreed is not None and set(agreed) == {mine.encode()}:
                    return name
            if waiting.time_to_look():
                told = {r: pickle.loads(hello) for r, hello in board.read(HELLO, self._everyone).items()}
                raise_failure(what, {r: failure for r, (attempt, _, failure) in told.items()
                                     if failure is not None and attempt >= board.attempts})
                waiting.go_on(what, self.rank, [r for r in self._everyone if r not in told]
                              or "the other ranks to make a Buffer at the same time")
            waiting.nap()

    def allgather(self, value, timeout_s, what):
        """The values (anything that can be pickled) of all ranks, in rank order.

        EPTimeoutError that names who did not come; `raise_failure`'s error as soon as one that is waited for has parted.
        """
        self._step += 1
        key, waiting = f"{self._name}/{self._step}", Waiting(timeout_s)
        self.board.post_step(key, pickle.dumps(value))
        while (values := self.board.read_all(key, self._everyone)) is None:
            if waiting.time_to_look():
                here = self.board.read(key, self._everyone)
                missing = [r for r in self._everyone if r not in here]
                raise_failure(what, {r: pickle.loads(end)[1] for r, end in self.board.read(self._end, missing).items()})
                if missing:
                    waiting.go_on(what, self.rank, missing)
            waiting.nap()
        self.board.settle(key)
        return [pickle.loads(v) for v in values]

    def meet(self, timeout_s, what, word=0):
        """Return once every rank has called it: all ranks' `word`s.  Errors as `allgather`."""
        return self.allgather(word, timeout_s, what)

    def part(self, stage, failure=None):
        """Tell the other ranks that this one has come to a stage of its leave, 1 or more, and why, in words; does not wait."""
        self.board.post(self._end, pickle.dumps((stage, failure or "has destroyed its Buffer")))

    def all_parted(self, stage):
        """Whether all ranks have come to a stage of their leave; does not wait."""
        ends = self.board.read_all(self._end, self._everyone)
        return ends is not None and all(pickle.loads(end)[0] >= stage for end in ends)

    def forget(self):
        """This Buffer is no more, on any rank."""
        self.board.forget(self._name, self._end)

    @property
    def _end(self):
        return f"{self._name}/end"


class Waiting:
    """The time that a rank waits for others."""

    def __init__(self, timeout_s):
        self._timeout_s, begin = timeout_s, time.monotonic()
        self._deadline, self._next_look, self._nap_s = begin + timeout_s, begin + LOOK_S, SHORT_NAP_S

    def time_to_look(self):
        """Whether it is time to see who is missing."""
        now = time.monotonic()
        if now < min(self._next_look, self._deadline):
            return False
        self._next_look = now + LOOK_S
        return True

    def go_on(self, what, rank, missing):
        """EPTimeoutError if the time is over.  missing: the ranks that did not come, or who is waited for in words."""
        if time.monotonic() >= self._deadline:
            whom = missing if isinstance(missing, str) else f"ranks {missing}, which have not come"
            raise EPTimeoutError(f"{what}: rank {rank} waited {self._timeout_s:g} s for {whom}")

    def nap(self):
        """Leave the core to others, the longer the longer this lasts."""
        time.sleep(self._nap_s)
        self._nap_s = min(1.1 * self._nap_s, LONG_NAP_S)


def raise_failure(what, failures):
    """EPTransportError if there are any, or EPTimeoutError if the other rank has waited in vain; failures: {rank: what has become
    of it, in words}."""
    for rank, failure in failures.items():
        kind = EPTimeoutError if failure.startswith(f"{HAS_FAILED}{EPTimeoutError.__name__}:") else EPTransportError
        raise kind(f"{what}: rank {rank} {failure}")


def tell_failure(board, error):
    """Tell ranks that are about to make a Buffer with this one that it has failed to; does not wait, and does not fail."""
    with contextlib.suppress(Exception):
        board.post(HELLO, pickle.dumps((board.attempts, b"", failure_of(error))))


def failure_of(error):
    """What has become of a rank with an error, in words for the others."""
    return f"{HAS_FAILED}{type(error).__name__}: {error}"


@contextlib.contextmanager
def telling_failure(board):
    """What is done here fails on all ranks if it fails on one, where they can be told."""
    try:
        yield
    except BaseException as error:
        tell_failure(board, error)
        raise
