"""Calls whose arguments were checked, kept in mind: a call like an earlier one is not checked again."""
from . import arrays


class Call:
    """An operation whose arguments were checked.

    checked: what the check has returned: all that the operation needs to know of its arguments but for addresses and values.
    ready: what was made ready for it when it ran first, None up to then.
    """

    __slots__ = "checked", "ready"

    def __init__(self, checked):
        self.checked, self.ready = checked, None


class Calls:
    """The calls of a buffer, by all of their arguments but for addresses and values."""

    def __init__(self, connection, most):
        """most: how many are kept in mind, before they are forgotten; where sizes are ever other ones, they are."""
        self._connection, self._most, self._calls = connection, most, {}

    def find(self, operation, check, given, options):
        """(the `Call`, addresses of `given`).  given: arrays, or None.  options: all else that matters.

        check: a function of (engine, number of ranks, *given, *options) that raises what is wrong with them, if this is the first
        such call.
        """
        signatures, addresses = arrays.look(given)
        key = operation, signatures, options
        try:
            call = self._calls.get(key)
        except TypeError:                                        # an option that cannot be hashed: the check says which
            return Call(self._check(check, given, options)), addresses
        if call is None:
            call = Call(self._check(check, given, options))
            if len(self._calls) >= self._most:
                self._calls.clear()
            self._calls[key] = call
        return call, addresses

    def _check(self, check, given, options):
        return check(self._connection.engine, self._connection.size, *given, *options)

    def forget(self):
        self._calls.clear()
