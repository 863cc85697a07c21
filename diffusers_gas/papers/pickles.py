"""Reads the papers' pickled networks as tensors and plain data. Nothing that a file names is imported or run.

`torch.save` files are read by PyTorch with `weights_only=True`. That does not read plain pickles, such as the snapshots of EDM
(arXiv 2206.00364) and R3GAN (arXiv 2501.05441): trees of modules, of which each storage is a `torch.save` stream of its own.
Here a fixed table says what each global in them stands for: a dtype or a function of this module. All other globals, and all
instructions that protocols 3 to 5 do not need for such trees, are refused. EDM's "persistent" objects carry the source text of
their classes, which is dropped.
"""

import os
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from math import prod
from pickle import UnpicklingError
from types import FunctionType
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from torch import Tensor


# How `torch.save` files begin: as zip archives, and before that with a pickled number.
ZIP_START = b"PK\x03\x04"
LEGACY_START = pickle.dumps(torch.serialization.MAGIC_NUMBER, 2)
PERSISTENCE_VERSION = 6

# All classes of these modules become `PickledObject`. R3GAN's authors renamed their package.
MODULES = {"training.networks", "training.networks_baseline"}
MODULES |= {f"torch.nn.modules.{name}" for name in ("container", "conv", "linear")}
MODULES |= {
    f"{gan}.{name}" for gan in ("R3GAN", "BaselineGAN") for name in ("Networks", "FusedOperators", "Resamplers")
}

# Instructions for which the standard library's methods are safe, or are replaced below.
INSTRUCTIONS = set(
    "PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT "  # noqa: SIM905
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE "
    "GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD".split()
)


@dataclass(eq=False, slots=True)
class PickledObject:
    """An object whose class was not imported.

    Attributes:
        class_name (`str`): The name of the class in the file. That of a persistent object lacks the module.
        state: The state that the file gives the object. For a module this is its `__dict__`.
    """

    class_name: str
    state: Any = None

    def attribute(self, name: str, default: Any = None) -> Any:
        """The entry `name` of the state, or `default` if there is none."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by their dotted names, for a `torch.nn.Module`.

        Raises:
            ValueError: If the state is not that of a module, or if a module occurs twice.
        """
        tensors: dict[str, Tensor] = {}
        modules, seen = [("", self)], set()
        while modules:
            prefix, module = modules.pop()
            if id(module) in seen:
                raise ValueError(f"The module at '{prefix}' has two places.")
            seen.add(id(module))
            for kind, expected in (("_parameters", Tensor), ("_buffers", Tensor), ("_modules", PickledObject)):
                entries = module.attribute(kind, {})
                if not isinstance(entries, dict):
                    raise ValueError(f"The module at '{prefix}' has damaged {kind}: {type(entries).__name__}.")
                for name, value in entries.items():
                    if value is not None and not isinstance(value, expected):
                        found = type(value).__name__
                        raise ValueError(f"'{prefix}{name}' should be a {expected.__name__}, got {found}.")
                    if isinstance(value, Tensor):
                        tensors[f"{prefix}{name}"] = value
                    elif value is not None:
                        modules.append((f"{prefix}{name}.", value))
        return tensors


def load_pickle(path: str | os.PathLike) -> Any:
    """The content of a pickle or a `torch.save` file: tensors (on the CPU), plain data and [`PickledObject`].

    Raises:
        ValueError: If the file is damaged, or if it has a global or an instruction that is not known to be harmless. The
            message names it. Nothing of the file runs in any case.
        OSError: If the file cannot be opened.
    """
    with open(path, "rb") as file:
        try:
            start = file.read(len(LEGACY_START))
            saved_by_torch = start.startswith(ZIP_START) or start == LEGACY_START
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            return _load_by_torch(file, size) if saved_by_torch else _Unpickler(file, size).load()
        except Exception as error:  # damaged instructions lead to errors of many types
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise ValueError(
                f"{path} is refused: it is damaged, or has more than tensors and plain data ({reason})."
            ) from error


def finite_tensor(name: str, value: Any) -> Tensor:
    """The value, which a file has by that name. Raises a `ValueError` unless it is a tensor of finite floating-point numbers."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.isfinite().all():
        raise ValueError(f"'{name}' should be a tensor of finite numbers.")
    return value


def _load_by_torch(stream: BinaryIO, size: int) -> Any:
    if zipfile.is_zipfile(stream):
        with zipfile.ZipFile(stream) as archive:  # `torch.save` does not compress, but PyTorch would decompress
            if sum(entry.file_size for entry in archive.infolist()) > size:
                raise UnpicklingError("its content would be larger than the file")
    stream.seek(0)
    try:
        return torch.load(stream, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        # PyTorch's message is mostly advice, among it to run the file.
        named = re.search(r"GLOBAL \S+", str(error))
        raise UnpicklingError(f"PyTorch refuses {named[0] if named else 'an instruction'}") from error


def _refuse(name: str, unpickler: Any) -> None:
    raise UnpicklingError(f"it has the instruction {name}")


class _Unpickler(pickle._Unpickler):
    """The standard library's unpickler in Python, with fewer instructions and with checks of what they are applied to.

    The unpickler in C cannot be restricted like this: it takes globals from the cache of the extension registry, hashes keys
    that are nested so deeply that the stack overflows, and fills memory up to any index that a file names.

    Args:
        stream: A plain pickle.
        size: Number of bytes in the file. A file can name the same bytes again and again, but its storages are made of
            no more bytes than it has.
    """

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, stream: BinaryIO, size: int):
        super().__init__(stream)
        self.remaining = size

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if module in MODULES:
            return lambda: PickledObject(full_name)
        if full_name not in _TABLE:
            raise UnpicklingError(f"it names {full_name}")
        return _TABLE[full_name]

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, FunctionType) or not isinstance(arguments, tuple):
            raise UnpicklingError(f"it calls a {type(function).__name__} with a {type(arguments).__name__}")
        if function is _storage:
            self.remaining -= len(arguments[0])
            if self.remaining < 0:
                raise UnpicklingError("its content would be larger than the file")
        self.append(function(*arguments))

    def set_state(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, PickledObject) and target.state is None:
            target.state = state
        elif not isinstance(target, dict):  # attributes of a mapping, such as a `state_dict`'s versions, are not kept
            raise UnpicklingError(f"it sets the state of a {type(target).__name__}")

    def set_items(self, items: list[Any]) -> None:
        target, keys = self.stack[-1], items[::2]
        strange = [type(key).__name__ for key in keys if not isinstance(key, str | int | float | bytes | None)]
        if strange or not isinstance(target, dict):
            raise UnpicklingError(f"it uses a {(*strange, 'value')[0]} as a key of a {type(target).__name__}")
        target.update(zip(keys, items[1::2], strict=True))

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        ord(op.code): pickle._Unpickler.dispatch[ord(op.code)]
        if op.name in INSTRUCTIONS
        else partial(_refuse, op.name)
        for op in pickletools.opcodes
    } | {
        pickle.REDUCE[0]: call,
        pickle.NEWOBJ[0]: call,
        pickle.BUILD[0]: set_state,
        pickle.SETITEM[0]: lambda self: self.set_items([self.stack.pop(), self.stack.pop()][::-1]),
        pickle.SETITEMS[0]: lambda self: self.set_items(self.pop_mark()),
    }


# What globals stand for. A storage is a tensor of shape `(numel,)`.


def _storage(content: bytes) -> Tensor:
    if not content.startswith(LEGACY_START):
        raise UnpicklingError("a storage is not in PyTorch's layout")
    storage = _load_by_torch(BytesIO(content), len(content))
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
    known = meta.get("type") == "class" and meta.get("version") == PERSISTENCE_VERSION
    if not known or not isinstance(class_name, str) or not isinstance(state, dict):
        raise UnpicklingError(
            f"a persistent object is not a class of version {PERSISTENCE_VERSION} with name and state"
        )
    return PickledObject(class_name, state)


def _numpy_scalar(dtype: PickledObject, content: bytes) -> bool | int | float:
    if not re.fullmatch("b1|[iu][1248]|f[248]", dtype.class_name) or dtype.state[1] not in ("<", "|"):
        raise UnpicklingError("it has a NumPy scalar of an unknown type")
    return np.frombuffer(content, f"<{dtype.class_name}").item()


_TABLE: dict[str, Any] = {
    **{str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)},
    "torch.storage._load_from_bytes": _storage,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent_object,
    "collections.OrderedDict": lambda: OrderedDict(),
    "dnnlib.util.EasyDict": lambda: {},
    "numpy.dtype": lambda code, *_: PickledObject(code),
    **dict.fromkeys(("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"), _numpy_scalar),
}
