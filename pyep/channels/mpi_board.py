"""A board over an mpi4py communicator: what is posted is sent to all ranks at once, and filed there until it is read.

There is one for a communicator and process, whatever number of Buffers comes and goes; it goes with the communicator.  Its messages
travel on a duplicate, where they meet nobody else's.
"""
import collections
import contextlib
import functools
import pickle
import time

from mpi4py import MPI

from ..errors import EPTimeoutError, EPTransportError
from . import parting

TAG = 0                                 # of what is posted; ports have the others, see `lane`
BYE = "bye"                             # the last thing that a rank posts
FREE_S = 1.0                            # how long a communicator that is freed waits for the other ranks to free theirs


@functools.cache
def keyval():
    """The number under which communicators keep their boards."""
    return MPI.Comm.Create_keyval(delete_fn=on_free)


def board_of(comm):
    """The board of a communicator."""
    board = comm.Get_attr(keyval())
    if board is None:
        board = MpiBoard(comm)
        comm.Set_attr(keyval(), board)
    return board


def on_free(comm, number, board):
    """MPI frees a communicator, which all ranks do together (or ends, and with it all that there is)."""
    if comm not in (MPI.COMM_WORLD, MPI.COMM_SELF):
        with contextlib.suppress(Exception):
            parting.leave(Leave(board), FREE_S)


class MpiBoard:
    """See `Bootstrap`.  rank, size: of the communicator.  attempts: how many Buffers were tried to be made on it.  comm: the
    duplicate, None before `open`.  lanes: see `lane`."""

    def __init__(self, comm):
        self.rank, self.size, self.attempts, self.comm, self.lanes = comm.rank, comm.size, 0, None, 0
        self._original, self._duplicating = comm, None
        self._sends, self._filed = collections.deque(), {}       # (request, what it sends); by key, by rank: the newest value
        self._served = set()                                     # names of Buffers whose messages are kept until they are read

    def open(self, timeout_s):
        """Make the duplicate, if there is none; then forget what ranks have posted for Buffers that are no more."""
        if self.comm is None:
            self._duplicate(timeout_s)
        self._receive()
        for key in [key for key in self._filed if "/" in key and key.partition("/")[0] not in self._served]:
            del self._filed[key]

    def _duplicate(self, timeout_s):
        """A duplicate that was begun in vain is gone on with: it is complete once all ranks have begun it."""
        if self._duplicating is None:
            self._duplicating = self._original.Idup()
        comm, request = self._duplicating
        deadline = time.monotonic() + timeout_s
        while not request.Test():
            if time.monotonic() > deadline:
                raise EPTimeoutError(f"Buffer: rank {self.rank} waited {timeout_s:g} s for the other ranks to make a Buffer too")
            time.sleep(20e-6)
        comm.Set_errhandler(MPI.ERRORS_RETURN)                   # an error there is an exception, and not the end of the process
        self.comm, self._original, self._duplicating = comm, None, None

    # ---- what `Bootstrap` calls ------------------------------------------------------------------------------------------

    def post(self, key, value):
        """Make a value (bytes) known to all ranks; it takes the place of an older one of this rank."""
        if self.comm is None:
            raise EPTransportError("nothing can be posted yet")
        require_running()
        message = pickle.dumps((key, value))
        self._filed.setdefault(key, {})[self.rank] = value
        while self._sends and self._sends[0][0].Test():
            self._sends.popleft()
        for rank in range(self.size):
            if rank != self.rank:
                self._sends.append((self.comm.Isend([message, MPI.BYTE], rank, TAG), message))

    post_step = post

    def settle(self, key):
        """All ranks have posted `key`: it has been read here, and is not read again."""
        self._filed.pop(key, None)

    def read(self, key, ranks):
        """{rank: the newest value} of those that have posted the key."""
        self._receive()
        filed = self._filed.get(key, {})
        return {rank: filed[rank] for rank in ranks if rank in filed}

    def read_all(self, key, ranks):
        """The values in the order of the ranks, or None if one is missing."""
        found = self.read(key, ranks)
        return [found[rank] for rank in ranks] if len(found) == len(ranks) else None

    def serve(self, name):
        """Keep what is posted under keys that begin with `name/`."""
        self._served.add(name)

    def forget(self, name, end):
        self._served.discard(name)
        for key in [key for key in self._filed if key.startswith(name + "/")]:
            del self._filed[key]

    # ---- ports and the end -----------------------------------------------------------------------------------------------

    def lane(self, bootstrap, timeout_s):
        """A number that no Buffer on this communicator had before; collective.  Its ports take their tags from it."""
        self.lanes = 1 + max(bootstrap.allgather(self.lanes, timeout_s, "Buffer: numbering"))
        return self.lanes

    @property
    def in_use(self):
        """Whether a Buffer is here still."""
        return bool(self._served)

    def free(self):
        """Free the duplicate; all that was sent to this rank is there, and whoever wanted it is gone."""
        while self._next_message(MPI.ANY_TAG) is not None:
            pass
        self.comm.Free()
        self.comm = None

    def _receive(self):
        """File all messages that have come."""
        require_running()
        while (came := self._next_message(TAG)) is not None:
            source, data = came
            key, value = pickle.loads(data)
            self._filed.setdefault(key, {})[source] = value

    def _next_message(self, tag):
        """(the rank that has sent it, bytes) of a message that has come, or None."""
        message = self.comm.Improbe(MPI.ANY_SOURCE, tag, status := MPI.Status())
        if message is None:
            return None
        data = bytearray(status.Get_count(MPI.BYTE))
        message.Recv([data, MPI.BYTE])
        return status.Get_source(), data


def require_running():
    """EPTransportError once MPI was finalized: another call would end the process."""
    if MPI.Is_finalized():
        raise EPTransportError("MPI was finalized")


class Leave:
    """The end of a board: its duplicate is freed once all ranks have said that they post no more."""

    def __init__(self, board):
        self._board, self._said, self.holds = board, False, False

    def go_on(self):
        board = self._board
        if board.comm is None:
            return True
        if board.in_use:
            return False
        if not self._said:
            board.post(BYE, b"")
            self._said = True
        if board.read_all(BYE, range(board.size)) is None:
            return False
        board.free()
        return True
