"""What pyep raises.  Wrong types and values of arguments are plain `TypeError` and `ValueError`."""


class EPError(RuntimeError):
    """Base of all errors below.  After one that came out of a running operation, a `Buffer` can only be destroyed, unless the
    message says that it stays usable."""


class EPTimeoutError(EPError):
    """A wait ended without what it waited for: the message says which operation, which peer, what was expected and seen."""


class EPRoutingError(EPError, ValueError):
    """Indices of experts that do not exist, or that select an expert more often than it has room for.

    Where the host has seen it, on the CPU engine, nothing was launched and the buffer stays usable.  It stays so too where kernels
    have seen it of a low-latency dispatch: all ranks have run that to its end, and all raise this.
    """


class EPBufferTooSmallError(EPError):
    """The buffer has fewer bytes than the operation needs.  Nothing was launched, the buffer stays usable."""


class EPTransportError(EPError):
    """A transport cannot be used here: the message says what is missing and what to install or set."""


class EPClosedError(EPError):
    """The buffer was destroyed, or an earlier error made it unusable."""
