"""pyep: the dispatch and combine of Mixture-of-Experts layers, in pure Python, on GPUs and CPUs."""
from .buffer import Buffer
from .errors import EPBufferTooSmallError, EPClosedError, EPError, EPRoutingError, EPTimeoutError, EPTransportError
from .events import EventOverlap
from .version import __version__

__all__ = ["Buffer", "EventOverlap", "EPError", "EPBufferTooSmallError", "EPClosedError", "EPRoutingError", "EPTimeoutError",
           "EPTransportError", "__version__"]
