"""`deep_ep.utils.math`: how DeepEP's tests make FP8 tokens and routing, and compare what they get."""
import torch
from torch.nn.functional import pad

BLOCK = 128                             # values that share a scale
E4M3_MAX = 448.0
LEAST = 1e-4                            # the largest magnitude of a block is taken to be at least this


def calc_diff(x, y):
    """How unlike two tensors are, a float, 0 if they are equal: 1 - 2 <a, b> / (<a, a> + <b, b>), where a = x + 1, b = y + 1."""
    a, b = x.double() + 1, y.double() + 1
    return 1 - (2 * (a * b).sum() / (a.square() + b.square()).sum()).item()


def per_token_cast_to_fp8(x):
    """(e4m3 [T, H], scales fp32 [T, ceil(H / 128)]) of x [T, H]: each block of 128 values is scaled by its largest magnitude."""
    blocks = in_blocks(x.float())
    scales = blocks.abs().amax(dim=2).clamp(min=LEAST) / E4M3_MAX
    values = (blocks / scales.unsqueeze(2)).to(torch.float8_e4m3fn)
    return values.flatten(1)[:, :x.shape[1]].contiguous(), scales


def per_token_cast_back(x_fp8, x_scales):
    """bf16 [T, H] of e4m3 [T, H] and its scales: fp32 [T, ceil(H / 128)], or int32 of which each packs four exponents."""
    if x_scales.dtype == torch.int32:                            # an exponent's place in fp32 is behind 23 bits of mantissa
        x_scales = (x_scales.contiguous().flatten().view(torch.uint8).int() << 23).view(torch.float32)
    blocks = in_blocks(x_fp8.float())
    return (blocks * x_scales.reshape(*blocks.shape[:2], 1)).flatten(1)[:, :x_fp8.shape[1]].to(torch.bfloat16)


def in_blocks(x):
    """[T, H] as [T, ceil(H / 128), 128], with zeros behind."""
    padded = pad(x, (0, -x.shape[1] % BLOCK))
    return padded.view(len(x), padded.shape[1] // BLOCK, BLOCK)


def hash_tensor(t):
    """An int that is the same for the same bits: the sum of all 32-bit words."""
    return t.contiguous().view(torch.int32).sum(dtype=torch.int64).item()


def inplace_unique(x, num_slots):
    """Leave in each row of x [T, K], of integers below num_slots, every value that is not negative once: largest first, then -1."""
    present = torch.zeros((len(x), num_slots + 1), dtype=torch.bool, device=x.device)
    present.scatter_(1, x.masked_fill(x < 0, num_slots), True)
    slots = torch.arange(num_slots, dtype=x.dtype, device=x.device)
    found = torch.where(present[:, :num_slots], slots, -1).sort(dim=1, descending=True).values[:, :x.shape[1]]
    x.fill_(-1)
    x[:, :found.shape[1]] = found


def create_grouped_scores(scores, group_idx, num_groups):
    """scores [T, E] with 0 for the experts outside the groups group_idx [T, G] that a token may choose from."""
    chosen = torch.zeros((len(scores), num_groups), dtype=torch.bool, device=scores.device).scatter_(1, group_idx, True)
    return scores * chosen.repeat_interleave(scores.shape[1] // num_groups, dim=1)
