"""`Config`: what DeepEP's high-throughput operations are tuned with."""
import dataclasses
import numbers


@dataclasses.dataclass(frozen=True)
class Config:
    """How many SMs an operation takes, and how many tokens its chunks and its ring buffers hold; names and defaults are DeepEP's.

    pyep's low-latency operations look at none of it, and there are no others yet.  Nor will those have chunks or rings: rows are to
    be written straight to where they belong.  So only `num_sms` will mean something here.
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

    def get_nvl_buffer_size_hint(self, hidden_bytes, num_ranks):
        """Bytes of num_nvl_bytes for high-throughput operations: not known before there are some."""
        raise NotImplementedError(_NO_HINT.format("get_nvl_buffer_size_hint"))

    def get_rdma_buffer_size_hint(self, hidden_bytes, num_ranks):
        """Bytes of num_rdma_bytes for high-throughput operations between nodes: not known before there are some."""
        raise NotImplementedError(_NO_HINT.format("get_rdma_buffer_size_hint"))


_NO_HINT = ("Config.{} sizes the memory of the high-throughput operations, which are not implemented yet; for the low-latency ones "
            "there is Buffer.get_low_latency_rdma_size_hint")


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
