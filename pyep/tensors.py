"""PyTorch's tensors, for `pyep.arrays`: which of them kernels can use, and tensors that belong to no mode of their caller.

Imported only once the caller has handed in a tensor.
"""
import contextlib

import numpy as np
import torch

from .arrays import ALIGNED, AS_IT_IS, Library

PLAIN_KINDS = torch.Tensor, torch.nn.Parameter

# PyTorch's own names, without the Python around them; they are private, so each has a substitute.
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
_transform = getattr(torch._C._functorch, "maybe_current_level", lambda: None)
_is_transformed = getattr(torch._C._functorch, "is_functorch_wrapped_tensor", lambda tensor: False)
_function_modes = getattr(torch._C, "_len_torch_function_stack", lambda: 1)
_deterministic = getattr(torch._C, "_get_deterministic_algorithms", torch.are_deterministic_algorithms_enabled)
_gpu, _raw_stream = getattr(torch._C, "_cuda_getDevice", None), getattr(torch._C, "_cuda_getCurrentRawStream", None)


class Torch(Library):
    """PyTorch's tensors on the CPU or on GPUs."""

    dtype = staticmethod(lambda array: str(array.dtype).removeprefix("torch."))
    is_contiguous = staticmethod(torch.Tensor.is_contiguous)

    @staticmethod
    def pointer(array):
        if _function_modes():
            with torch._C.DisableTorchFunction():
                return array.data_ptr()
        return array.data_ptr()

    def __init__(self, name, engine):
        super().__init__(name, engine)
        self._device = torch.device(engine)

    def device(self, array):
        return array.device.index or 0

    def empty(self, shape, dtype):
        with self.plainly():
            return torch.empty(shape, dtype=getattr(torch, dtype), device=self._device)

    @staticmethod
    def look_of(kind):
        return look if kind in PLAIN_KINDS else careful_look

    @staticmethod
    def obstacle(array):
        return obstacle(array)

    def plainly(self):
        return outside_of_modes() if in_a_mode() else AS_IT_IS

    def lasting(self):
        return belonging_to_no_mode()

    def has_history(self, *arrays):
        for array in arrays:
            if array is not None and array.requires_grad:
                return True
        return False

    def without_history(self, array):
        if array is None or not (array.requires_grad or array._is_view()):
            return array
        with belonging_to_no_mode():
            return array.detach()

    def stream(self):
        if self.engine == "cpu":
            return 0
        return _raw_stream(_gpu()) if _raw_stream and _gpu else torch.cuda.current_stream().cuda_stream

    def is_capturing(self):
        return self.engine == "cuda" and torch.cuda.is_current_stream_capturing()

    def of_memory(self, memory):
        return torch.as_tensor(memory, device=self._device) if self.engine == "cuda" else torch.from_numpy(np.asarray(memory))

    def dtype_of(self, name):
        return getattr(torch, name)

    def external_stream(self, stream, device):
        return torch.cuda.ExternalStream(stream, device=device)


# ---- which tensors kernels can use -------------------------------------------------------------------------------------

def look(array):
    """(signature, address) of a tensor; what `obstacle` finds has another signature than what kernels can use.

    Under a `TorchFunctionMode`, as `torch.set_default_device` makes one, a look at an attribute takes microseconds: not here.
    """
    if _function_modes():
        return careful_look(array)
    try:
        address = array.data_ptr()
        return (type(array), array.shape, array.dtype, array.is_contiguous() or array.stride(), array.get_device(), array.is_neg(),
                address % ALIGNED if address else None), address
    except Exception:                                            # a tensor without these: the checks will say what it is
        return (type(array), object()), 0


def careful_look(array):
    """The same of a subclass, which may handle attributes itself, or have no address that may be asked for."""
    try:
        with torch._C.DisableTorchFunction():
            address = array.data_ptr() if has_memory(array) else 0
            return (type(array), array.shape, array.dtype, array.is_contiguous() or array.stride(), array.get_device(),
                    array.is_neg(), address % ALIGNED if address else None), address
    except Exception:
        return (type(array), object()), 0


def obstacle(array):
    """What keeps kernels from the values of a tensor, in words; None if nothing does."""
    kind = f"{type(array).__module__}.{type(array).__qualname__}"
    if isinstance(array, torch.nn.parameter.UninitializedTensorMixin):
        return f"a {kind}, which has no shape and no memory yet"
    if array.device.type not in ("cpu", "cuda"):
        return f"a tensor on the device {array.device}, whose memory is out of reach"
    if array.layout is not torch.strided or array.is_nested:
        return f"a {'nested tensor' if array.is_nested else 'tensor'} of layout {array.layout}; pass a dense one"
    if _is_transformed(array):
        return "a tensor of a torch.func transform (vmap, grad, ..), which has no memory of its own"
    if not has_memory(array):
        if type(array) in PLAIN_KINDS:
            return f"a {kind} whose memory was freed"
        return f"a {kind}, which has no memory of its own; pass the local or plain tensor that it stands for"
    if array.is_neg() or array.is_conj():
        return "a view whose values are still to be negated or conjugated; pass its resolve_neg() or resolve_conj()"
    return None


def has_memory(array):
    """Whether a tensor's values, if it has any, are in memory of its own."""
    try:
        storage = array.untyped_storage()
        return storage.device.type == array.device.type and (storage.data_ptr() != 0 or array.numel() == 0)
    except (RuntimeError, NotImplementedError):                  # there is no storage, or it has no address
        return False


# ---- modes of the caller -----------------------------------------------------------------------------------------------

def in_a_mode():
    """Whether `outside_of_modes` makes a difference."""
    return _function_modes() or _dispatch_modes() or _deterministic() or _transform() is not None


@contextlib.contextmanager
def outside_of_modes():
    """A context in which PyTorch makes real tensors, and leaves new memory as it is, whatever modes the caller is in: under a
    `FakeTensorMode` or in a `torch.func` transform it would make others, under deterministic algorithms fill them.
    """
    if not (_dispatch_modes() or _deterministic() or _transform() is not None):
        with torch._C.DisableTorchFunction():
            yield
        return
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
    from torch.utils import deterministic
    from torch.utils._python_dispatch import _disable_current_modes
    fills = deterministic.fill_uninitialized_memory
    with _disable_current_modes(), temporarily_clear_interpreter_stack(), torch._C.DisableTorchFunction():
        deterministic.fill_uninitialized_memory = False
        try:
            yield
        finally:
            deterministic.fill_uninitialized_memory = fills


@contextlib.contextmanager
def belonging_to_no_mode():
    """A context for tensors that outlive a call: later calls may hand them out in other modes than the first."""
    with torch.inference_mode(False), outside_of_modes():
        yield
