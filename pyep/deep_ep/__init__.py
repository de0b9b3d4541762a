"""DeepEP's names: a program written for its V1 low-latency or intranode interface runs after `import pyep.deep_ep as deep_ep`.

`sys.modules["deep_ep"] = pyep.deep_ep` does the same for a program that is not to be changed.  Its submodules may then be imported
a second time, as `deep_ep.utils...`: so what is in this folder names pyep's modules in full, and keeps no state.
"""
import torch

from pyep.buffer import Buffer
from pyep.config import Config
from pyep.events import EventHandle, EventOverlap

topk_idx_t = torch.int64                # of expert indices; int32 is accepted too

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "topk_idx_t"]
