"""Reads the papers' pickled networks as tensors and plain data, without importing or running anything that they name.

`pickle.load` and an unrestricted `torch.load` run whatever a file asks for. Here a file's instructions are interpreted by a
small machine of our own: a global is looked up in a fixed list, which leads to the constructors of this module and nowhere
else, and objects of classes come out as [`PickledObject`], a name and a state. Understood are

- plain pickles, among them the snapshots of EDM (arXiv 2206.00364) and R3GAN (arXiv 2501.05441): their "persistent" objects
  carry the source text of their classes, which is dropped here, and their tensors are streams of `torch.save` of their own;
- `torch.save` files, in the zip layout and in the one before it.
"""

import os
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from types import NoneType
from typing import Any, BinaryIO

import torch
from torch import Tensor


# The layout before zip: this number, a version, the sizes of types, the object, the keys of its storages, their content.
TORCH_MAGIC, TORCH_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
PERSISTENCE_VERSION = 6

STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORAGE_DTYPES.values()}
# Codes of the `struct` module for NumPy's scalars.
NUMPY_CODES = {"b1": "?", "i1": "b", "u1": "B", "i2": "h", "u2": "H", "i4": "i", "u4": "I", "i8": "q", "u8": "Q"}
NUMPY_CODES |= {"f2": "e", "f4": "f", "f8": "d"}

# Classes whose objects are pickled by reference, of which name and state are kept.
MODULE_CLASSES = {
    "torch.nn.modules.container": ("ModuleDict", "ModuleList", "Sequential"),
    "torch.nn.modules.conv": ("Conv2d",),
    "torch.nn.modules.linear": ("Linear",),
    "training.networks": ("Discriminator", "Generator"),
}
R3GAN_CLASSES = {
    "Networks": (
        "Convolution",
        "Discriminator",
        "DiscriminativeBasis",
        "DiscriminatorStage",
        "DownsampleLayer",
        "GenerativeBasis",
        "Generator",
        "GeneratorStage",
        "ResidualBlock",
        "UpsampleLayer",
    ),
    "FusedOperators": tuple(f"BiasedActivation{variant}" for variant in ("", "CUDA", "Reference")),
    "Resamplers": tuple(
        f"{kind}{direction}sampler{variant}"
        for kind in ("Inplace", "Interpolative")
        for direction in ("Down", "Up")
        for variant in ("", "CUDA", "Reference")
    ),
}
# The authors renamed their packages: earlier files have the second names.
MODULE_CLASSES |= {
    f"{package}.{module}": names for package in ("R3GAN", "BaselineGAN") for module, names in R3GAN_CLASSES.items()
}
MODULE_CLASSES["training.networks_baseline"] = MODULE_CLASSES["training.networks"]


@dataclass(eq=False)
class PickledObject:
    """An object whose class was not imported.

    Attributes:
        class_name (`str`): The class by the name in the file; of a persistent object without its module.
        state: What the file assigns to the object, of a module the `__dict__`.
        arguments (`tuple`): What the file constructs it with.
    """

    class_name: str
    state: Any = None
    arguments: tuple = ()

    def attribute(self, name: str, default: Any = None) -> Any:
        """An entry of the state, if that is a mapping which has it."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by their dotted names, if the object is a `torch.nn.Module`."""
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
                    if value is None:
                        continue
                    if not isinstance(value, expected):
                        found = type(value).__name__
                        raise ValueError(f"'{prefix}{name}' should be a {expected.__name__}, got {found}.")
                    if isinstance(value, Tensor):
                        tensors[f"{prefix}{name}"] = value
                    else:
                        modules.append((f"{prefix}{name}.", value))
        return tensors


def load_pickle(path: str | os.PathLike) -> Any:
    """The content of a pickle or a `torch.save` file: tensors (on the CPU), plain data and [`PickledObject`].

    Raises:
        ValueError: If the file names a global or an instruction that is not known to be harmless, which is then named, or
            if it is damaged. Nothing of the file runs in any case.
    """
    with open(path, "rb") as file:
        try:
            return _read(file)
        except ValueError as error:
            raise ValueError(f"{path} is refused: {error}") from error


def _read(stream: BinaryIO) -> Any:
    if stream.read(4) == b"PK\x03\x04":
        return _read_zip(stream)
    stream.seek(0)
    content = _Machine(stream, _PLAIN_GLOBALS).run()
    return _read_legacy(stream) if type(content) is int and content == TORCH_MAGIC else content


def _read_zip(stream: BinaryIO) -> Any:
    """A `torch.save` file in the zip layout: `data.pkl` and `data/{key}` in a folder of any name."""
    try:
        with zipfile.ZipFile(stream) as archive:
            entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
                raise ValueError("its entries are compressed, which `torch.save` does not do.")

            def content(name: str) -> bytes:
                if name not in entries:
                    raise ValueError(f"it is a zip archive without '{name}'.")
                return archive.read(entries[name])

            if "byteorder" in entries and content("byteorder") != b"little":
                raise ValueError("its tensors are in big-endian byte order.")

            def storage(key: str, dtype: torch.dtype, numel: int) -> "_Storage":
                return _Storage(_from_bytes(content(f"data/{key}"), dtype, numel))

            return _Machine(BytesIO(content("data.pkl")), _TENSOR_GLOBALS, storage).run()
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"it is not a whole zip archive ({error}).") from error


def _read_legacy(stream: BinaryIO) -> Any:
    """A `torch.save` stream in the layout before zip, from behind its magic number."""
    version, sizes = (_Machine(stream, {}).run() for _ in range(2))
    if version != TORCH_PROTOCOL or not isinstance(sizes, dict) or sizes.get("little_endian") is not True:
        raise ValueError("its `torch.save` layout is not the little-endian one of version 1001.")
    position = stream.tell()
    remaining = stream.seek(0, os.SEEK_END) - position
    stream.seek(position)
    storages: dict[str, _Storage] = {}

    def storage(key: str, dtype: torch.dtype, numel: int) -> "_Storage":
        nonlocal remaining
        if key not in storages:
            remaining -= numel * dtype.itemsize
            if remaining < 0:
                raise ValueError(f"storage '{key}' of {numel} elements is larger than the file.")
            storages[key] = _Storage(torch.empty(numel, dtype=dtype))
        return storages[key]

    content = _Machine(stream, _TENSOR_GLOBALS, storage).run()
    keys = _Machine(stream, {}).run()
    if not isinstance(keys, list) or sorted(_keys(keys)) != sorted(storages):
        raise ValueError("its list of storages is not that of its tensors.")
    # Tensors are views of the storages, whose content follows.
    for key in keys:
        values = storages[key].values
        if stream.read(8) != struct.pack("<q", values.numel()):
            raise ValueError(f"storage '{key}' has not the {values.numel()} elements of its tensors.")
        values.copy_(_from_bytes(stream.read(values.nbytes), values.dtype, values.numel()))
    return content


def _from_bytes(content: bytes, dtype: torch.dtype, numel: int) -> Tensor:
    if len(content) != numel * dtype.itemsize:
        raise ValueError(f"a storage of {numel} elements of {dtype} has {len(content)} bytes.")
    return torch.frombuffer(bytearray(content), dtype=dtype) if numel else torch.empty(0, dtype=dtype)


class _Machine:
    """Interprets the instructions of one pickle.

    Args:
        stream: The pickle, left behind its end.
        known: What (module, name) stands for: a [`_Constructor`] or a value.
        storage: Called with key, dtype and number of elements for every reference to a tensor's storage.
    """

    def __init__(
        self,
        stream: BinaryIO,
        known: Mapping[tuple[str, str], Any],
        storage: Callable[[str, torch.dtype, int], "_Storage"] | None = None,
    ):
        self.stream, self.known, self.storage = stream, known, storage
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        try:
            for instruction, argument, _ in pickletools.genops(self.stream):
                if instruction.name == "STOP":
                    return self.stack.pop()
                self._do(instruction.name, argument)
        except (IndexError, KeyError, TypeError, OverflowError, MemoryError, struct.error) as error:
            raise ValueError(f"it is damaged ({type(error).__name__}: {error}).") from error
        raise AssertionError("`genops` ends with STOP or an error")

    def _do(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name == "MARK":
            self.marked.append(stack)
            self.stack = []
        elif name == "POP_MARK":
            self._items()
        elif name == "POP":
            stack.pop()
        elif name == "TUPLE":
            items = self._items()
            self.stack.append(tuple(items))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(self._pop(int(name[-1]))))
        elif name == "APPEND":
            self._add(self._pop(1), list)
        elif name == "SETITEM":
            self._add(self._pop(2), dict)
        elif name in ("APPENDS", "SETITEMS", "ADDITEMS"):
            self._add(self._items(), {"APPENDS": list, "SETITEMS": dict, "ADDITEMS": set}[name])
        elif name == "GLOBAL":
            stack.append(self._global(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(self._global(*self._pop(2)))
        elif name in ("REDUCE", "NEWOBJ"):
            constructor, arguments = self._pop(2)
            if not isinstance(constructor, _Constructor) or not isinstance(arguments, tuple):
                raise ValueError(f"it calls a {type(constructor).__name__} with {type(arguments).__name__}.")
            stack.append(constructor(arguments))
        elif name == "BUILD":
            state = stack.pop()
            self._build(stack[-1], state)
        elif name == "BINPERSID":
            stack.append(self._persistent(stack.pop()))
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"it has the instruction {name}, which tensors and plain data do not need.")

    def _pop(self, count: int) -> list[Any]:
        """The uppermost items, removed."""
        if len(self.stack) < count:
            raise IndexError("an instruction without its operands")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _items(self) -> list[Any]:
        """What lies above the newest mark, removed with it."""
        items, self.stack = self.stack, self.marked.pop()
        return items

    def _add(self, items: list[Any], kind: type) -> None:
        target = self.stack[-1]
        if not isinstance(target, kind):
            raise ValueError(f"it adds items of a {kind.__name__} to a {type(target).__name__}.")
        if kind is list:
            target.extend(items)
        elif kind is set:
            target.update(_keys(items))
        else:
            target.update(zip(_keys(items[::2]), items[1::2], strict=True))

    def _global(self, module: Any, name: Any) -> Any:
        if not isinstance(module, str) or not isinstance(name, str) or (module, name) not in self.known:
            raise ValueError(f"it names {module}.{name}, which is not needed for tensors and plain data.")
        return self.known[module, name]

    def _build(self, target: Any, state: Any) -> None:
        if isinstance(target, PickledObject) and target.state is None:
            target.state = state
        elif not isinstance(target, dict):  # attributes of a mapping, such as a `state_dict`'s versions, are not kept
            raise ValueError(f"it sets the state of a {type(target).__name__}.")

    def _persistent(self, reference: Any) -> "_Storage":
        # The sixth entry, of the layout before zip, is for views of storages, which `torch.save` no longer writes.
        kind, dtype, key, _, numel, view = (*reference, None)[:6] if isinstance(reference, tuple) else (None,) * 6
        known = self.storage and kind == "storage" and isinstance(dtype, torch.dtype) and isinstance(key, str)
        if not known or type(numel) is not int or numel < 0 or view is not None:
            raise ValueError("it refers to something outside that is not a tensor's storage.")
        return self.storage(key, dtype, numel)


_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING"}
_LITERALS |= {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_CONSTANTS = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_TUPLE": tuple}
_CONSTANTS |= {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}


@dataclass(frozen=True)
class _Constructor:
    """What a global stands for that a file may call."""

    name: str
    call: Callable[..., Any] = field(repr=False)

    def __call__(self, arguments: tuple) -> Any:
        try:
            return self.call(*arguments)
        except (AttributeError, TypeError, RuntimeError) as error:
            raise ValueError(f"it calls {self.name} with arguments that do not fit ({error}).") from error


@dataclass(frozen=True, eq=False)
class _Storage:
    """A tensor's memory, `values` of shape `(numel,)`."""

    values: Tensor


def _tensor(storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """A view of a storage; the further arguments are about gradients."""
    integers = (offset, *size, *stride)
    if any(type(i) is not int or i < 0 for i in integers) or len(size) != len(stride):
        raise ValueError(f"a tensor has offset {offset}, size {size} and stride {stride}.")
    numel = 1
    for length in size:
        numel *= length
    last = offset + sum((length - 1) * step for length, step in zip(size, stride))
    available = storage.values.numel()
    # A view of more elements than there are would repeat some, which costs no bytes in the file but memory here.
    if numel > available or (numel > 0 and last >= available):
        raise ValueError(
            f"a tensor of size {size}, stride {stride} and offset {offset} is out of the bounds of its storage of "
            f"{available} elements."
        )
    return storage.values.as_strided(size, stride, offset) if numel else storage.values.new_empty(size)


def _parameter(data: Tensor, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise ValueError(f"a parameter is made of a {type(data).__name__}.")
    return data


def _storage_from_bytes(content: bytes) -> _Storage:
    if not isinstance(content, bytes):
        raise ValueError(f"a storage is made of a {type(content).__name__}.")
    stream = BytesIO(content)
    if content[:4] == b"PK\x03\x04":
        storage = _read_zip(stream)
    elif _Machine(stream, {}).run() == TORCH_MAGIC:
        storage = _read_legacy(stream)
    else:
        storage = None
    if not isinstance(storage, _Storage):
        raise ValueError("the content of a storage is not a storage.")
    return storage


def _persistent_object(meta: dict[str, Any]) -> PickledObject:
    """An object of `torch_utils.persistence`; its source text is left alone."""
    if not isinstance(meta, dict) or meta.get("type") != "class" or meta.get("version") != PERSISTENCE_VERSION:
        raise ValueError(f"a persistent object is not a class of version {PERSISTENCE_VERSION}.")
    class_name, state = meta.get("class_name"), meta.get("state")
    if not isinstance(class_name, str) or not isinstance(state, dict):
        raise ValueError("a persistent object has no class name or no state.")
    return PickledObject(class_name, state)


def _numpy_scalar(dtype: PickledObject, content: bytes) -> bool | int | float:
    known = isinstance(dtype, PickledObject) and dtype.class_name == "numpy.dtype" and isinstance(dtype.state, tuple)
    code, order = (*dtype.arguments[:1], *dtype.state[1:2]) if known else (None, None)
    if not isinstance(code, str) or code not in NUMPY_CODES or order not in ("<", "|"):
        raise ValueError("it has a NumPy scalar of an unknown type.")
    return struct.unpack("<" + NUMPY_CODES[code], content)[0]


def _encode(text: str, encoding: str) -> bytes:
    """How Python 2's protocols write bytes."""
    if encoding != "latin1" or not isinstance(text, str):
        raise ValueError(f"it encodes a {type(text).__name__} in {encoding!r}.")
    return text.encode("latin1")


def _set(items: list[Any] | tuple[Any, ...] = ()) -> set[Any]:
    return set(_keys(items))


def _keys(items: list[Any] | tuple[Any, ...]) -> list[Any] | tuple[Any, ...]:
    """Keys of a mapping or members of a set, which are only hashed if they are simple."""
    strange = [type(item).__name__ for item in items if not isinstance(item, (str, int, float, bytes, NoneType))]
    if strange:
        raise ValueError(f"it uses a {strange[0]} as a key.")
    return items


def _size(items: tuple[int, ...] = ()) -> tuple[int, ...]:
    return tuple(items)


def _device(kind: str, index: int | None = None) -> str:
    return kind if index is None else f"{kind}:{index}"


def _empty(kind: type) -> Callable[[], Any]:
    return lambda: kind()


def _constructors(calls: Mapping[str, Callable[..., Any]]) -> dict[tuple[str, str], _Constructor]:
    return {tuple(name.rsplit(".", 1)): _Constructor(name, call) for name, call in calls.items()}


def _recorder(class_name: str) -> Callable[..., PickledObject]:
    return lambda *arguments: PickledObject(class_name, arguments=arguments)


# What `torch.save` writes for tensors in plain containers.
_TENSOR_GLOBALS: dict[tuple[str, str], Any] = {
    **{("torch", name): dtype for name, dtype in (STORAGE_DTYPES | DTYPES).items()},
    **_constructors(
        {
            "collections.OrderedDict": _empty(OrderedDict),
            "torch.Size": _size,
            "torch.device": _device,
            "torch._utils._rebuild_tensor": _tensor,
            "torch._utils._rebuild_tensor_v2": _tensor,
            "torch._utils._rebuild_parameter": _parameter,
            "builtins.set": _set,
            "__builtin__.set": _set,
            "_codecs.encode": _encode,
        }
    ),
}
_PLAIN_GLOBALS: dict[tuple[str, str], Any] = {
    **_TENSOR_GLOBALS,
    **_constructors(
        {
            "torch.storage._load_from_bytes": _storage_from_bytes,
            "torch_utils.persistence._reconstruct_persistent_obj": _persistent_object,
            "dnnlib.util.EasyDict": _empty(dict),
            "numpy.dtype": _recorder("numpy.dtype"),
            "numpy.core.multiarray.scalar": _numpy_scalar,
            "numpy._core.multiarray.scalar": _numpy_scalar,
            **{
                f"{module}.{name}": _recorder(f"{module}.{name}")
                for module, names in MODULE_CLASSES.items()
                for name in names
            },
        }
    ),
}
