"""`Config`: what DeepEP's high-throughput operations are tuned with."""
import dataclasses
import numbers

from . import layout

MOST_TOPK = 16                          # for size hints that are not told: more than models select
LEAST_TOKENS = 4096                     # likewise: as many as DeepEP's own programs have on a rank


@dataclasses.dataclass(frozen=True)
class Config:
    """How many SMs an operation takes, and how many tokens its chunks and its ring buffers hold; names and defaults are DeepEP's.

    pyep's low-latency operations look at none of it.  Its high-throughput operations take at most `num_sms` SMs.  They have no
    rings, since rows are written straight to where they belong; but as in DeepEP the memory that a Config asks for grows with
    `num_max_nvl_chunked_recv_tokens`.
    """

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "num_sms" else 1
            if not isinstance(value, numbers.Integral) or isinstance(value, bool):
                raise TypeError(f"{field.name} is {value!r}; expected an int")
            if value < least:
                raise ValueError(f"{field.name} is {value}; expected at least {least}")
            object.__setattr__(self, field.name, int(value))     # a NumPy integer too

    def get_nvl_buffer_size_hint(self, hidden_bytes, num_ranks):
        """Bytes of num_nvl_bytes for high-throughput operations of up to num_sms / 2 * num_max_nvl_chunked_recv_tokens tokens on
        each rank, as many as DeepEP's rings for this Config have room for, but for 4096 at least.  For more:
        `Buffer.get_high_throughput_size_hint`.

        hidden_bytes: of a row of bf16.
        """
        hidden_bytes, num_ranks = int(hidden_bytes), int(num_ranks)
        tokens = max(LEAST_TOKENS, self.num_sms // 2 * self.num_max_nvl_chunked_recv_tokens)
        return layout.high_throughput_size_hint(tokens, hidden_bytes // 2, num_ranks, MOST_TOPK, hidden_bytes)

    def get_rdma_buffer_size_hint(self, hidden_bytes, num_ranks):
        """Bytes of num_rdma_bytes for high-throughput operations: none, as long as there is one node."""
        return 0


def recommended(num_sms, num_ranks):
    """The same for any number of ranks: nothing in it depends on them, see `Config`."""
    if not isinstance(num_ranks, numbers.Integral) or num_ranks < 1:
        raise ValueError(f"num_ranks is {num_ranks!r}; expected an int of at least 1")
    return Config(num_sms)


def check_num_sms(value):
    """A number of SMs as `Buffer.set_num_sms` takes it."""
    if not isinstance(value, numbers.Integral) or value < 2 or value % 2:
        raise ValueError(f"num_sms is {value!r}; expected an even number of SMs, at least 2")
    return int(value)
