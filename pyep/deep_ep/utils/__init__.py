"""`deep_ep.utils`: events, and what DeepEP's own tests and benchmarks take from its submodules `envs`, `math` and `testing`."""
from pyep.events import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
