"""`deep_ep.utils.event`: events."""
from pyep.events import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
