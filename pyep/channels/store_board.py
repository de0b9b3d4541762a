"""A board over the store of a torch.distributed process group: the place where its ranks have found each other.

Only the store is used, neither the group's collectives nor a group of its own: to make one takes ranks that belong to equally many
groups.  The store goes on when the group is destroyed.  What is there of a Buffer is deleted: a step's keys once all ranks have
taken the next one, the rest once all ranks have parted.
"""
import sys
import threading
import weakref

from ..errors import EPTimeoutError, EPTransportError

ANSWER_S = 5.0                          # how long the store may take to answer: rank 0, which has it, may be stopped
_boards = weakref.WeakKeyDictionary()   # by process group


def board_of(group):
    """The board of a process group; TypeError or ValueError, naming `group`, if this rank is in no such group."""
    expected = "expected a torch.distributed process group of which this rank is a member"
    dist = sys.modules.get("torch.distributed")                  # who has a group has imported it
    if dist is None or not (isinstance(group, dist.ProcessGroup) or group is dist.GroupMember.NON_GROUP_MEMBER):
        raise TypeError(f"group is {group!r}; {expected}" + hint(group))
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"group is GroupMember.NON_GROUP_MEMBER, what new_group returns to a rank that is no member; {expected}")
    known = dist.distributed_c10d._world.pg_map                  # of this process's groups; PyTorch shows the stores nowhere else
    if group not in known:
        raise ValueError(f"group is {group!r}, which was destroyed or never registered; {expected}")
    if dist.get_rank(group) < 0:
        raise ValueError(f"group is {group!r}, of which this rank is no member; {expected}")
    if group not in _boards:
        store = dist.PrefixStore("pyep", known[group][1])
        _boards[group] = StoreBoard(store, dist.get_rank(group), dist.get_world_size(group))
    return _boards[group]


def hint(value):
    """What may be meant by what is no group."""
    if hasattr(value, "Idup"):
        return "; pass an mpi4py communicator as comm="
    if hasattr(value, "get_group") and hasattr(value, "mesh_dim_names"):
        return "; of a DeviceMesh pass get_group(dimension)"
    return ""


class StoreBoard:
    """See `Bootstrap`.  rank, size: of the group.  attempts: how many Buffers were tried to be made on it."""

    def __init__(self, store, rank, size):
        self.rank, self.size, self.attempts = rank, size, 0
        self._store, self._steps, self._asked = store, [], None

    def open(self, timeout_s):
        """There is nothing to be opened."""

    def serve(self, name):
        """A store keeps what is posted."""

    def post(self, key, value):
        """Make a value (bytes) known to all ranks; it takes the place of an older one of this rank."""
        self._ask(self._store.set, self._at(key, self.rank), value)

    def post_step(self, key, value):
        """`post`, what may be deleted when a later step is settled."""
        self._steps.append(key)
        self.post(key, value)

    def settle(self, key):
        """All ranks have posted `key`: so none reads any more what this one has posted in steps before."""
        at = self._steps.index(key)
        for old in self._steps[:at]:
            self._ask(self._store.delete_key, self._at(old, self.rank))
        del self._steps[:at]

    def read(self, key, ranks):
        """{rank: the newest value} of those that have posted the key."""
        return {r: self._ask(self._store.get, self._at(key, r)) for r in ranks if self._ask(self._store.check, [self._at(key, r)])}

    def read_all(self, key, ranks):
        """The values in the order of the ranks, or None if one is missing."""
        keys = [self._at(key, r) for r in ranks]
        if not self._ask(self._store.check, keys):
            return None
        if self._store.has_extended_api():
            return self._ask(self._store.multi_get, keys)
        return [self._ask(self._store.get, key) for key in keys]

    def forget(self, name, end):
        """The last rank to come here deletes what is left of a Buffer."""
        gone = f"{name}/gone"
        if self._ask(self._store.add, gone, 1) == self.size:
            for key in [gone, *[self._at(end, r) for r in range(self.size)]]:
                self._ask(self._store.delete_key, key)

    @staticmethod
    def _at(key, rank):
        return f"{key}/{rank}"

    def _ask(self, function, *args):
        """What a call of the store returns.  It has no time limit, so a thread makes it; EPTimeoutError if that takes too long,
        EPTransportError if the store is gone."""
        if self._asked is not None and self._asked.is_alive():
            raise EPTimeoutError("the store of the process group still does not answer")
        answer = []

        def ask():
            try:
                answer.append((function(*args), None))
            except Exception as error:
                answer.append((None, f"{type(error).__name__}: {str(error).splitlines()[0]}"))
        self._asked = threading.Thread(target=ask, name="pyep store", daemon=True)
        try:
            self._asked.start()
            self._asked.join(ANSWER_S)
        except RuntimeError:                                     # the interpreter is ending, and starts no more threads
            self._asked = None
            ask()
        if not answer:
            raise EPTimeoutError(f"the store of the process group does not answer for {ANSWER_S:g} s: the rank that has it is "
                                 "stuck, or the network is")
        value, error = answer[0]
        if error is not None:
            raise EPTransportError(f"the store of the process group has failed ({error}): the rank that had it may be gone")
        return value
