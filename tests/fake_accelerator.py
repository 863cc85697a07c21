"""An emulated accelerator: mixed devices, transfers, waits and float64 on the device are found on a machine without one.

Inside [`Accelerator`] the device `meta` is the accelerator. Its tensors are wrappers that compute on the CPU. It stands for all
kinds of devices: where it counts float64, a device that lacks float64 would fail.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


DEVICE = torch.device("meta")

# Operations that read values of tensors, so that the host waits for the device.
_WAITING = ("aten._local_scalar_dense", "aten.equal", "aten.is_nonzero", "aten.nonzero", "aten.masked_select")


class Accelerator(TorchDispatchMode):
    """Counts in `events`, as long as it is active, what happens between host and device.

    The keys of `events` are "to the device", "from the device", "wait" and "float64". An operation on tensors of both devices
    raises a `RuntimeError`, unless those of the host are single numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: Counter[str] = Counter()
        self._stack = ExitStack()

    def __enter__(self) -> "Accelerator":
        self._stack.enter_context(_NumbersFirstOnHost())
        module = SimpleNamespace(empty_cache=lambda: None)  # as there is `torch.cuda`
        self._stack.enter_context(patch.object(torch, DEVICE.type, module, create=True))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._stack.close()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return self.run(function, args, kwargs or {})

    def run(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The result of an operation, on the device that PyTorch would have it on."""
        name = str(function).removesuffix(".default")
        if name == "aten.to.dtype_layout":  # PyTorch itself, where it needs shapes only
            return function(*args, **kwargs)
        tensors = _tensors((args, kwargs))
        there = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
        here = [tensor for tensor in tensors if not isinstance(tensor, OnDevice) and tensor.ndim > 0]
        on_device = bool(there)
        if name.startswith(_WAITING):
            self.events["wait"] += on_device
        elif name.startswith("aten.copy_"):
            on_device = isinstance(args[0], OnDevice)
            self._count_transfer(isinstance(args[1], OnDevice), on_device)
        elif kwargs.get("device") is not None:
            on_device = torch.device(kwargs["device"]).type == DEVICE.type
            if name == "aten._to_copy":
                self._count_transfer(bool(there), on_device)
        elif there and here and not name.startswith("aten.index"):  # positions may be on the host
            raise RuntimeError(f"Expected all tensors to be on the same device: {name}")
        result = function(*_map(_inner, args), **_on_host(_map(_inner, kwargs)))
        wrappers = {id(tensor.inner): tensor for tensor in there}

        def wrapped(value: Any) -> Any:
            if not on_device or not isinstance(value, Tensor):
                return value
            return (
                wrappers[id(value)] if id(value) in wrappers else OnDevice(value, self)
            )  # in-place operations return their tensor

        result = _map(wrapped, result)
        made = (tensor for tensor in _tensors(result) if isinstance(tensor, OnDevice))
        self.events["float64"] += any(tensor.dtype == torch.float64 for tensor in made)
        return result

    def _count_transfer(self, from_device: bool, to_device: bool) -> None:
        if from_device != to_device:
            self.events["to the device" if to_device else "from the device"] += 1


class _NumbersFirstOnHost(TorchFunctionMode):
    """Makes tensors of Python's numbers on the host and moves them. For `meta` PyTorch would drop the numbers."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        device = (kwargs or {}).get("device")
        if function is torch.tensor and device is not None and torch.device(device).type == DEVICE.type:
            return function(*args, **{**(kwargs or {}), "device": "cpu"}).to(DEVICE)
        return function(*args, **(kwargs or {}))


class OnDevice(Tensor):
    """A tensor on the emulated accelerator. `inner` has its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_meta = False  # it has values

    @staticmethod
    def __new__(cls, inner: Tensor, accelerator: Accelerator) -> "OnDevice":
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        tensor = Tensor._make_wrapper_subclass(cls, inner.size(), **layout, device=DEVICE)
        tensor.inner, tensor.accelerator = inner, accelerator
        return tensor

    def __repr__(self) -> str:
        return f"OnDevice({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        tensors = _tensors((args, kwargs or {}))
        accelerator = next(tensor.accelerator for tensor in tensors if isinstance(tensor, OnDevice))
        return accelerator.run(function, args, kwargs or {})


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """The value with what is in its lists, tuples and dictionaries changed. PyTorch's `tree_map` takes as long as the operation."""
    if isinstance(value, list | tuple):
        return type(value)([_map(function, entry) for entry in value])
    if isinstance(value, dict):
        return {name: _map(function, entry) for name, entry in value.items()}
    return function(value)


def _tensors(value: Any) -> list[Tensor]:
    found: list[Any] = []
    _map(found.append, value)
    return [entry for entry in found if isinstance(entry, Tensor)]


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, OnDevice) else value


def _on_host(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of an operation without what is for an accelerator only."""
    changes: dict[str, Any] = {"device": torch.device("cpu"), "pin_memory": None, "non_blocking": False}
    return {name: changes.get(name, value) if value is not None else None for name, value in kwargs.items()}
