"""Reads the papers' pickled networks as tensors and plain data. Nothing that a file names is imported or run.

`pickle.load` and an unrestricted `torch.load` run whatever a file asks for. Here a fixed table says what each known global
stands for: a dtype or a function of this module. All other globals, and all instructions that plain data does not need, are
refused. The table is complete for

- plain pickles, among them the snapshots of EDM (arXiv 2206.00364) and R3GAN (arXiv 2501.05441). Their "persistent" objects
  carry the source text of their classes, which is dropped. Each of their storages is a `torch.save` stream of its own;
- `torch.save` files in the zip layout and in the legacy layout before it.
"""

import os
import pickle
import pickletools
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from math import prod
from types import FunctionType
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from torch import Tensor


# The legacy layout is this number, a version, sizes of types, the object, the keys of its storages, and their content.
TORCH_MAGIC, TORCH_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
PERSISTENCE_VERSION = 6

STORAGE_DTYPES = {"Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16}
STORAGE_DTYPES |= {"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8}
STORAGE_DTYPES |= {"Byte": torch.uint8, "Bool": torch.bool}

# All classes of these modules become `PickledObject`. R3GAN's authors renamed their package.
MODULES = {"training.networks", "training.networks_baseline"}
MODULES |= {f"torch.nn.modules.{name}" for name in ("container", "conv", "linear")}
MODULES |= {
    f"{gan}.{name}" for gan in ("R3GAN", "BaselineGAN") for name in ("Networks", "FusedOperators", "Resamplers")
}

# Instructions for which the standard library's methods are safe, or are replaced below.
INSTRUCTIONS = set(
    "PROTO FRAME STOP MARK POP POP_MARK "  # noqa: SIM905
    "NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINSTRING SHORT_BINSTRING BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST "
    "APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE "
    "GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID".split()
)


@dataclass(eq=False, slots=True)
class PickledObject:
    """An object whose class was not imported.

    Attributes:
        class_name (`str`): The name of the class in the file. That of a persistent object lacks the module.
        state: The state that the file gives the object. For a module this is its `__dict__`.
        arguments (`tuple`): The arguments from which the file constructs the object.
    """

    class_name: str
    state: Any = None
    arguments: tuple = ()

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
            return _read(file, _TABLE)
        except ValueError as error:
            raise ValueError(f"{path} is refused: {error}") from error
        except Exception as error:  # damaged instructions lead to errors of many types
            raise ValueError(f"{path} is refused: it is damaged ({type(error).__name__}: {error}).") from error


def _read(stream: BinaryIO, table: Mapping[str, Any]) -> Any:
    """The content of a stream in any layout. `table` has the globals of a plain pickle."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    zipped = stream.read(4) == b"PK\x03\x04"
    stream.seek(0)
    if zipped:
        return _read_zip(stream, size)
    content = _Unpickler(stream, size, table).load()
    return _read_legacy(stream, size) if type(content) is int and content == TORCH_MAGIC else content


def _read_zip(stream: BinaryIO, size: int) -> Any:
    """A `torch.save` file in the zip layout: `data.pkl` and `data/{key}` in a folder of any name."""
    storages: dict[str, Tensor] = {}
    with zipfile.ZipFile(stream) as archive:
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise ValueError("its entries are compressed, which `torch.save` does not do.")
        if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
            raise ValueError("its tensors are in big-endian byte order.")
        content = _Unpickler(BytesIO(archive.read(entries["data.pkl"])), size, _TORCH_TABLE, storages).load()
        for key, values in storages.items():
            _fill(values, archive.read(entries[f"data/{key}"]))
    return content


def _read_legacy(stream: BinaryIO, size: int) -> Any:
    """A `torch.save` stream in the legacy layout, from the end of its magic number on."""
    version, types = (_Unpickler(stream, size).load() for _ in range(2))
    if version != TORCH_PROTOCOL or not isinstance(types, dict) or types.get("little_endian") is not True:
        raise ValueError("its `torch.save` layout is not the little-endian one of version 1001.")
    storages: dict[str, Tensor] = {}
    content = _Unpickler(stream, size, _TORCH_TABLE, storages).load()
    keys = _Unpickler(stream, size).load()
    if not isinstance(keys, list) or sorted(_simple(keys)) != sorted(storages):
        raise ValueError("its list of storages is not that of its tensors.")
    for key in keys:
        values = storages[key]
        if stream.read(8) != struct.pack("<q", values.numel()):
            raise ValueError(f"storage '{key}' has not the {values.numel()} elements of its tensors.")
        _fill(values, stream.read(values.nbytes))
    return content


def _fill(values: Tensor, content: bytes) -> None:
    """Copies a storage's bytes into it, and so into the tensors that are views of it."""
    if len(content) != values.nbytes:
        raise ValueError(f"a storage of {values.numel()} elements of {values.dtype} has {len(content)} bytes.")
    if content:
        values.view(torch.uint8).copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))


def _refuse(name: str, unpickler: Any) -> None:
    raise ValueError(f"it has the instruction {name}, which tensors and plain data do not need.")


class _Unpickler(pickle._Unpickler):
    """The standard library's unpickler in Python, with fewer instructions and with checks of what they are applied to.

    The unpickler in C cannot be restricted like this: it takes globals from the cache of the extension registry, hashes keys
    that are nested so deeply that the stack overflows, and fills memory up to any index that a file names.

    A file can name the same bytes again and again. The bytes that calls copy and that storages need are therefore limited to
    twice the size of the file. No honest file needs more: its bytes are text at most once, and storage at most once.

    Args:
        stream: Its position is left at the end of the pickle.
        size: Number of bytes in the file.
        table: What globals stand for, by their dotted names: functions, which the file may call, or values.
        storages: Filled with storages to be read, by their keys. Without it, the pickle must not refer to storages.
    """

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(
        self, stream: BinaryIO, size: int, table: Mapping[str, Any] = {}, storages: dict[str, Tensor] | None = None
    ):
        super().__init__(stream, encoding="latin1")
        self.remaining, self.table, self.storages = 2 * size, table, storages

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if module in MODULES:
            return _recorder(full_name)
        if full_name not in self.table:
            raise ValueError(f"it names {full_name}, which is not needed for tensors and plain data.")
        return self.table[full_name]

    def persistent_load(self, pid: Any) -> Tensor:
        # A sixth entry in the legacy layout is for views of storages, which `torch.save` no longer writes.
        kind, dtype, key, _, numel, view = (*pid, None)[:6] if isinstance(pid, tuple) else (None,) * 6
        known = kind == "storage" and isinstance(dtype, torch.dtype) and isinstance(key, str) and view is None
        if self.storages is None or not known or type(numel) is not int or numel < 0:
            raise ValueError("it refers to something outside that is not a tensor's storage.")
        if key not in self.storages:
            self.reserve(numel * dtype.itemsize)
            self.storages[key] = torch.empty(numel, dtype=dtype, device="cpu")
        return self.storages[key]

    def reserve(self, count: int) -> None:
        """Counts bytes or items that a copy or a storage needs."""
        self.remaining -= count
        if self.remaining < 0:
            raise ValueError("its content would be much larger than the file.")

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, FunctionType) or not isinstance(arguments, tuple):
            raise ValueError(f"it calls a {type(function).__name__} with a {type(arguments).__name__}.")
        if arguments and isinstance(arguments[0], bytes | str | list):
            self.reserve(len(arguments[0]))
        self.append(function(*arguments))

    def set_state(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, PickledObject) and target.state is None:
            target.state = state
        elif not isinstance(target, dict):  # attributes of a mapping, such as a `state_dict`'s versions, are not kept
            raise ValueError(f"it sets the state of a {type(target).__name__}.")

    def add(self, kind: type, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, kind):
            raise ValueError(f"it adds items of a {kind.__name__} to a {type(target).__name__}.")
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, set):
            target.update(_simple(items))
        elif isinstance(target, dict):
            target.update(zip(_simple(items[::2]), items[1::2], strict=True))

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        ord(op.code): pickle._Unpickler.dispatch[ord(op.code)]
        if op.name in INSTRUCTIONS
        else partial(_refuse, op.name)
        for op in pickletools.opcodes
    } | {
        pickle.REDUCE[0]: call,
        pickle.NEWOBJ[0]: call,
        pickle.BUILD[0]: set_state,
        pickle.APPEND[0]: lambda self: self.add(list, [self.stack.pop()]),
        pickle.APPENDS[0]: lambda self: self.add(list, self.pop_mark()),
        pickle.SETITEM[0]: lambda self: self.add(dict, [self.stack.pop(), self.stack.pop()][::-1]),
        pickle.SETITEMS[0]: lambda self: self.add(dict, self.pop_mark()),
        pickle.ADDITEMS[0]: lambda self: self.add(set, self.pop_mark()),
    }


# What globals stand for. A storage is a tensor of shape `(numel,)`.


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """A view of a storage. The further arguments are about gradients."""
    integers = (offset, *size, *stride)
    if len(size) != len(stride) or len(size) > 64 or not all(type(i) is int and 0 <= i < 2**63 for i in integers):
        raise ValueError("a tensor has offset, size and stride that are not non-negative integers, as many of each.")
    numel, available = prod(size), storage.numel()
    last = offset + sum((length - 1) * step for length, step in zip(size, stride))
    # A view of more elements than the storage has would repeat some. They cost no bytes in the file, but memory later.
    if numel > available or (numel > 0 and last >= available):
        raise ValueError(
            f"a tensor of size {size}, stride {stride} and offset {offset} is out of the bounds of its storage of "
            f"{available} elements."
        )
    return storage.as_strided(size, stride, offset) if numel else storage.new_empty(size)


def _persistent_object(meta: dict[str, Any]) -> PickledObject:
    """An object of `torch_utils.persistence`, without its source text."""
    class_name, state = meta.get("class_name"), meta.get("state")
    known = meta.get("type") == "class" and meta.get("version") == PERSISTENCE_VERSION
    if not known or not isinstance(class_name, str) or not isinstance(state, dict):
        raise ValueError(f"a persistent object is not a class of version {PERSISTENCE_VERSION} with name and state.")
    return PickledObject(class_name, state)


def _numpy_scalar(dtype: PickledObject, content: bytes) -> bool | int | float:
    code, order = dtype.arguments[0], dtype.state[1]
    if not re.fullmatch("b1|[iu][1248]|f[248]", code) or order not in ("<", "|"):
        raise ValueError("it has a NumPy scalar of an unknown type.")
    return np.frombuffer(content, f"<{code}").item()


def _latin1(text: str, encoding: str) -> bytes:
    """Bytes as protocols 0 to 2 write them."""
    if encoding != "latin1":
        raise ValueError("it encodes a text otherwise than in Latin-1.")
    return text.encode("latin1")


def _simple(items: list[Any]) -> list[Any]:
    """Keys of a mapping or members of a set, which are hashed only if they are simple."""
    strange = [type(item).__name__ for item in items if not isinstance(item, str | int | float | bytes | None)]
    if strange:
        raise ValueError(f"it uses a {strange[0]} as a key.")
    return items


def _recorder(class_name: str) -> Callable[..., PickledObject]:
    return lambda *arguments: PickledObject(class_name, arguments=arguments)


# What `torch.save` writes for tensors in plain containers.
_TORCH_TABLE: dict[str, Any] = {
    **{f"torch.{name}Storage": dtype for name, dtype in STORAGE_DTYPES.items()},
    **{str(dtype): dtype for dtype in STORAGE_DTYPES.values()},
    "torch.Size": lambda size=(): size,
    "torch.device": _recorder("torch.device"),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "collections.OrderedDict": lambda: OrderedDict(),
    "builtins.set": lambda items=(): set(_simple(items)),
    "__builtin__.set": lambda items=(): set(_simple(items)),
    "_codecs.encode": _latin1,
}
_TABLE = _TORCH_TABLE | {
    "torch.storage._load_from_bytes": lambda content: _read(BytesIO(content), {}),
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent_object,
    "dnnlib.util.EasyDict": lambda: {},
    "numpy.dtype": _recorder("numpy.dtype"),
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
}
