"""Reads the papers' pickled networks as tensors and plain data. Nothing that a file names is imported or run.

`torch.save` files are read by PyTorch with `weights_only=True`. That does not read plain pickles, such as the snapshots of EDM
(arXiv 2206.00364) and R3GAN (arXiv 2501.05441): trees of modules, of which each storage is a `torch.save` stream of its own.
These are read by the standard library's unpickler, restricted as its documentation says: a fixed table says what each global
stands for, a type or a function that only makes tensors and plain data. All other globals, and all instructions that protocols
3 to 5 do not need for such trees, are refused. A file that was made to do harm can end the process at most. EDM's "persistent"
objects carry the source text of their classes, which is dropped.
"""

import os
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from io import BytesIO
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor


# How `torch.save` files begin: as zip archives, and before that with a pickled number.
ZIP_START = b"PK\x03\x04"
LEGACY_START = pickle.dumps(torch.serialization.MAGIC_NUMBER, 2)
PERSISTENCE_VERSION = 6

# All classes of these modules become kinds of `PickledObject`. R3GAN's authors renamed their package.
MODULES = {"training.networks", "training.networks_baseline"}
MODULES |= {f"torch.nn.modules.{name}" for name in ("container", "conv", "linear")}
MODULES |= {
    f"{gan}.{name}" for gan in ("R3GAN", "BaselineGAN") for name in ("Networks", "FusedOperators", "Resamplers")
}

# Instructions that make, store and name values, and those that call a global or set a state.
INSTRUCTIONS = set(
    "PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT "  # noqa: SIM905
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE "
    "GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD".split()
)


class PickledObject:
    """An object whose class was not imported.

    Attributes:
        class_name (`str`): The name of the class in the file. That of a persistent object lacks the module.
        state: The state that the file gives the object. For a module this is its `__dict__`.
    """

    class_name: str
    state: Any = None

    def __init__(self, class_name: str, state: Any = None):
        self.class_name, self.state = class_name, state

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def attribute(self, name: str, default: Any = None) -> Any:
        """The entry `name` of the state, or `default` if there is none."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by their dotted names, for a `torch.nn.Module`.

        Raises:
            ValueError: If the state is not that of a module, or if a module contains itself.
        """
        try:
            return dict(self._named_tensors(""))
        except (AttributeError, RecursionError) as error:
            raise ValueError(f"the modules of its {self.class_name} are damaged ({error}).") from error

    def _named_tensors(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        for kind in ("_parameters", "_buffers"):
            for name, tensor in self.attribute(kind, {}).items():
                if tensor is not None:
                    yield f"{prefix}{name}", finite_tensor(f"{prefix}{name}", tensor)
        for name, module in self.attribute("_modules", {}).items():
            if module is not None:
                yield from module._named_tensors(f"{prefix}{name}.")


def load_pickle(path: str | os.PathLike) -> Any:
    """The content of a pickle or a `torch.save` file: tensors (on the CPU), plain data and [`PickledObject`].

    Raises:
        ValueError: If the file is damaged, or if it has a global or an instruction that is not known to be harmless. The
            message names it. Nothing of the file runs in any case.
        OSError: If the file cannot be opened.
    """
    content = Path(path).read_bytes()
    saved_by_torch = content.startswith((ZIP_START, LEGACY_START))
    try:
        return _load_by_torch(content) if saved_by_torch else _Unpickler(content).load()
    except Exception as error:  # damaged instructions lead to errors of many types
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"{path} is refused: damaged, or more than tensors and plain data ({reason}).") from error


def entry(mapping: Any, kind: str, name: str) -> PickledObject:
    """The object of a kind that a mapping in a file has by a name; a `ValueError` if there is none."""
    value = mapping.get(name) if isinstance(mapping, dict) else None
    if not isinstance(value, PickledObject):
        found = sorted(map(str, mapping)) if isinstance(mapping, dict) else type(mapping).__name__
        raise ValueError(f"it has no {kind} '{name}', only {found}.")
    return value


def finite_tensor(name: str, value: Any) -> Tensor:
    """The value, which a file has by that name. Raises a `ValueError` unless it is a tensor of finite floating-point numbers."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.isfinite().all():
        raise ValueError(f"'{name}' should be a tensor of finite numbers.")
    return value


def _load_by_torch(content: bytes) -> Any:
    if content.startswith(ZIP_START):
        # `torch.save` does not compress, but PyTorch would decompress.
        with zipfile.ZipFile(BytesIO(content)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > len(content):
                raise UnpicklingError("its content would be larger than the file")
    try:
        return torch.load(BytesIO(content), map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        # PyTorch's message is mostly advice, among it to run the file.
        global_name = re.search(r"GLOBAL \S+", str(error))
        raise UnpicklingError(f"PyTorch refuses {global_name[0] if global_name else 'an instruction'}") from error


class _Unpickler(pickle.Unpickler):
    """The standard library's unpickler for one plain pickle, with the globals and the instructions from above only."""

    def __init__(self, content: bytes):
        for instruction, argument, _ in pickletools.genops(content):
            if instruction.name not in INSTRUCTIONS:
                raise UnpicklingError(f"it has the instruction {instruction.name}")
            # The unpickler would make room for as many.
            if instruction.name == "LONG_BINPUT" and argument is not None and argument > len(content):
                raise UnpicklingError(f"it remembers a value at place {argument}")
        super().__init__(BytesIO(content))
        # A file can name the same bytes again and again, but its storages are made of no more bytes than it has.
        self.remaining = len(content)

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if module in MODULES:
            return type(name, (PickledObject,), {"class_name": full_name})  # the unpickler calls its `__new__` only
        if full_name == "torch.storage._load_from_bytes":
            return self.load_storage
        if full_name not in GLOBALS:
            raise UnpicklingError(f"it names {full_name}")
        return GLOBALS[full_name]

    def load_storage(self, content: bytes) -> Tensor:
        """A storage as a tensor of shape `(numel,)`."""
        self.remaining -= len(content)
        if self.remaining < 0:
            raise UnpicklingError("its content would be larger than the file")
        if not content.startswith(LEGACY_START):
            raise UnpicklingError("a storage is not in PyTorch's layout")
        storage = _load_by_torch(content)
        if not isinstance(storage, torch.storage.TypedStorage):
            raise UnpicklingError(f"a storage is a {type(storage).__name__}")
        return torch.empty(0, dtype=storage.dtype).set_(storage)


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """A view of a storage. The further arguments are about gradients."""
    # A view that repeats elements costs no bytes in the file, but memory later. PyTorch checks the rest.
    if prod(size) > storage.numel():
        raise UnpicklingError(f"a tensor of size {size} is out of the bounds of {storage.numel()} elements")
    return storage.as_strided(size, stride, offset)


def _persistent_object(meta: dict[str, Any]) -> PickledObject:
    """An object of `torch_utils.persistence`, without its source text."""
    class_name, state = meta.get("class_name"), meta.get("state")
    is_class = meta.get("type") == "class" and meta.get("version") == PERSISTENCE_VERSION
    if not is_class or not isinstance(class_name, str) or not isinstance(state, dict):
        raise UnpicklingError(f"a persistent object is no class of version {PERSISTENCE_VERSION} with name and state")
    return PickledObject(class_name, state)


def _numpy_scalar(dtype: PickledObject, content: bytes) -> bool | int | float:
    if not re.fullmatch("b1|[iu][1248]|f[248]", dtype.class_name) or dtype.state[1] not in ("<", "|"):
        raise UnpicklingError("it has a NumPy scalar of an unknown type")
    return np.frombuffer(content, f"<{dtype.class_name}").item()


# What globals stand for, beside the storages and the classes of `MODULES`.
GLOBALS: dict[str, Any] = {
    **{str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)},
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent_object,
    "collections.OrderedDict": OrderedDict,
    "dnnlib.util.EasyDict": OrderedDict,
    "numpy.dtype": lambda code, *_: PickledObject(code),
    **dict.fromkeys(("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"), _numpy_scalar),
}
