"""DeepEP's names: a program written for its V1 low-latency or intranode interface runs after `import pyep.deep_ep as deep_ep`."""
import torch

from .buffer import Buffer
from .config import Config
from .events import EventOverlap

topk_idx_t = torch.int64                # of expert indices; int32 is accepted too

__all__ = ["Buffer", "Config", "EventOverlap", "topk_idx_t"]
