"""The restricted reader: the tensors and the plain data of honest files, and hostile ones of which nothing may run."""

import builtins
import contextlib
import copyreg
import io
import os
import pickle
import struct
import time
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from official_files import PERSISTENT, Reduced, foreign, written

from diffusers_gas.papers.pickles import PickledObject, load_pickle


def saved(content: Any, zipped: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


# Honest files


PLAIN_DATA = {
    "numbers": [0, 1, 255, 65536, -1, 2**40, -(2**100), 0.1, float("inf"), True, False, None],
    "text": ("a", "ä" * 300, b"bytes", b"b" * 300),
    "containers": [{"a": {1: ()}}, (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), set(), OrderedDict(x=1)],
    "numpy": [np.float64(0.3), np.float32(0.25), np.int64(-7), np.bool_(True), np.uint8(200)],
    "torch": [torch.bfloat16],
}


@pytest.mark.parametrize("protocol", [4, 5])
def test_plain_data(tmp_path, protocol):
    shared = [1]
    content = PLAIN_DATA | {"shared": (shared, shared)}
    loaded = load_pickle(written(tmp_path, pickle.dumps(content, protocol)))
    assert loaded == content
    assert loaded["shared"][0] is loaded["shared"][1]
    assert {type(value) for value in loaded["numpy"]} == {float, int, bool}
    python = load_pickle(written(tmp_path, pickle._dumps(PLAIN_DATA, protocol)))  # the other pickler
    assert python == PLAIN_DATA


DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def some_tensors() -> dict[str, Any]:
    base = torch.randn(4, 6)
    return {
        **{str(dtype): (10 * torch.randn(3, 5)).to(dtype) for dtype in DTYPES},
        "base": base,
        "view": base[1:, ::2].T,
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "dtype": torch.bfloat16,
    }


@pytest.mark.parametrize("layout", ["pickle 3", "pickle 4", "torch zip", "torch legacy"])
def test_tensors(tmp_path, layout):
    content = some_tensors()
    kind, variant = layout.split()
    raw = pickle.dumps(content, int(variant)) if kind == "pickle" else saved(content, zipped=variant == "zip")
    loaded = load_pickle(written(tmp_path, raw))
    assert loaded.pop("dtype") is content.pop("dtype")
    assert loaded.keys() == content.keys()
    for name, tensor in content.items():
        assert type(loaded[name]) in (torch.Tensor, type(tensor))
        torch.testing.assert_close(loaded[name].detach(), tensor.detach(), rtol=0, atol=0)


def test_the_authors_training_checkpoint_is_what_torch_loads():
    path = ROOT / "tests" / "golden" / "official_format_n5.pt"
    expected = torch.load(path, weights_only=True)
    loaded = load_pickle(path)
    assert loaded.keys() == expected.keys()
    for mine, theirs in zip(loaded["ema"]["shadow_params"], expected["ema"]["shadow_params"]):
        assert torch.equal(mine, theirs)
    assert loaded["optim"]["param_groups"] == expected["optim"]["param_groups"]


@pytest.mark.parametrize("protocol", [4, 5])
def test_modules_come_out_as_names_and_tensors(tmp_path, protocol):
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1, bias=False), torch.nn.Linear(3, 2).bfloat16())
    module.register_buffer("scale", torch.ones(1))
    loaded = load_pickle(written(tmp_path, pickle.dumps({"net": module}, protocol)))["net"]
    assert isinstance(loaded, PickledObject) and loaded.class_name == "torch.nn.modules.container.Sequential"
    assert loaded.attribute("training") is True
    assert loaded.attribute("_modules")["0"].attribute("kernel_size") == (1, 1)
    expected = module.state_dict()
    tensors = loaded.tensors()
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_persistent_objects_keep_their_state_and_their_source_is_never_compiled(tmp_path, monkeypatch):
    trace = tmp_path / "trace"
    meta = {"type": "class", "version": 6, "module_src": f"open({str(trace)!r}, 'w')", "class_name": "EDMPrecond"}
    state = {"_parameters": OrderedDict(weight=torch.nn.Parameter(torch.ones(2))), "sigma_data": 0.5}

    def pickled(**changes: Any) -> Path:
        with foreign(PERSISTENT, kind=types.FunctionType) as (reconstruct,):
            return written(tmp_path, pickle.dumps(Reduced(reconstruct, meta | {"state": state} | changes)))

    path = pickled()
    monkeypatch.setattr(builtins, "compile", lambda *_: pytest.fail("something was compiled"))
    loaded = load_pickle(path)
    monkeypatch.undo()
    assert (loaded.class_name, loaded.attribute("sigma_data")) == ("EDMPrecond", 0.5)
    assert torch.equal(loaded.tensors()["weight"], torch.ones(2))
    assert not trace.exists()
    for change in ({"version": 5}, {"type": "function"}, {"state": None}, {"class_name": 3}):
        with pytest.raises(ValueError, match="persistent object"):
            load_pickle(pickled(**change))


def test_dictionaries_with_attributes(tmp_path):
    state = torch.nn.Linear(1, 1).state_dict()
    assert load_pickle(written(tmp_path, pickle.dumps(state))).keys() == {"weight", "bias"}
    with foreign("dnnlib.util.EasyDict") as (easy,):
        easy.__reduce__ = lambda self: (easy, (), {"attribute": 1}, None, iter([("c_dim", 0)]))
        path = written(tmp_path, pickle.dumps({"kwargs": easy()}))
    assert load_pickle(path) == {"kwargs": {"c_dim": 0}}


# Hostile files. Each is given a path at which it leaves a trace if it is run.


def pickled_call(function: Callable, *arguments: Any) -> bytes:
    return pickle.dumps(Reduced(function, *arguments))


def binunicode(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


EXTENSION = 77


def direct(trace: str) -> bytes:
    return pickled_call(os.system, f"touch {trace}")


def evaluated(trace: str) -> bytes:
    return pickled_call(eval, f"open({trace!r}, 'w')")


def executed(trace: str) -> bytes:
    return pickled_call(exec, f"open({trace!r}, 'w')")


def nested(trace: str) -> bytes:
    return pickle.dumps({"weights": [torch.ones(2), (OrderedDict(a={1: Reduced(os.system, f"touch {trace}")}),)]})


def dictionary_key(trace: str) -> bytes:
    return b"\x80\x04}(" + direct(trace)[2:-1] + b"Nu."


def protocol_0(trace: str) -> bytes:
    return b"cposix\nsystem\n(Vtouch " + trace.encode() + b"\ntR."


def protocol_2(trace: str) -> bytes:
    return pickle.dumps(Reduced(os.system, f"touch {trace}"), 2)


def instance(trace: str) -> bytes:
    return b"(" + binunicode(f"touch {trace}") + b"iposix\nsystem\n."


def obj(trace: str) -> bytes:
    return b"(cposix\nsystem\nVtouch " + trace.encode() + b"\no."


def new_object(trace: str) -> bytes:
    """`subprocess.Popen.__new__` runs nothing, its call does."""
    return b"csubprocess\nPopen\n((Vtouch\nV" + trace.encode() + b"\nltR."


def dotted(trace: str) -> bytes:
    """A known module, from which dots lead elsewhere."""
    return (
        b"\x80\x04" + binunicode("torch") + binunicode("serialization.os.system") + b"\x93"
        b"(" + binunicode(f"touch {trace}") + b"tR."
    )


def dotted_allowed_prefix(trace: str) -> bytes:
    return (
        b"\x80\x04" + binunicode("collections") + binunicode("OrderedDict.fromkeys.__self__.__init__") + b"\x93"
        b")R" + direct(trace)[2:]
    )


def attribute(trace: str) -> bytes:
    return b"\x80\x02cbuiltins\ngetattr\n(cposix\n__dict__\n" + binunicode("get") + b"tR" + direct(trace)[2:]


def imported(trace: str) -> bytes:
    return b"\x80\x02cbuiltins\n__import__\n(" + binunicode("os") + b"tR0" + direct(trace)[2:]


def state_of_class(trace: str) -> bytes:
    """Gives an allowed class an attribute that would be called later."""
    return b"\x80\x02ccollections\nOrderedDict\n}" + binunicode("__new__") + b"cposix\nsystem\nsb" + direct(trace)[2:]


def state_of_tensor(trace: str) -> bytes:
    tensor = pickle.dumps(torch.ones(2))[:-1]
    return tensor + b"}" + binunicode("__setstate__") + b"cposix\nsystem\nsb" + direct(trace)[2:]


def setstate(trace: str) -> bytes:
    """An object whose state is set by a function of the file's choice."""
    return (
        b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81}"
        + binunicode("__setstate__")
        + b"cposix\nsystem\nsb"
        + binunicode(f"touch {trace}")
        + b"b."
    )


def called_object(trace: str) -> bytes:
    return b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81)R0" + direct(trace)[2:]


def extension(trace: str) -> bytes:
    return b"\x80\x02\x82" + bytes([EXTENSION]) + b"(" + binunicode(f"touch {trace}") + b"tR."


def torch_loaded(trace: str) -> bytes:
    return pickled_call(torch.load, io.BytesIO(saved(Reduced(os.system, f"touch {trace}"), zipped=True)))


def storage_bytes(zipped: bool) -> Callable[[str], bytes]:
    def build(trace: str) -> bytes:
        content = saved(Reduced(os.system, f"touch {trace}"), zipped)
        return pickled_call(torch.storage._load_from_bytes, content)

    return build


def storage_in_storage(trace: str) -> bytes:
    inner = saved(Reduced(os.system, f"touch {trace}"), zipped=False)
    middle = saved(Reduced(torch.storage._load_from_bytes, inner), zipped=False)
    return pickled_call(torch.storage._load_from_bytes, middle)


def pickle_in_storage(trace: str) -> bytes:
    return pickled_call(torch.storage._load_from_bytes, direct(trace))


def torch_zip(trace: str) -> bytes:
    return saved({"weight": torch.ones(2), "more": Reduced(os.system, f"touch {trace}")}, zipped=True)


def torch_legacy(trace: str) -> bytes:
    return saved({"weight": torch.ones(2), "more": Reduced(os.system, f"touch {trace}")}, zipped=False)


HOSTILE = {
    "direct": (direct, "posix.system"),
    "eval": (evaluated, "builtins.eval"),
    "exec": (executed, "builtins.exec"),
    "nested": (nested, "posix.system"),
    "dictionary key": (dictionary_key, "posix.system"),
    "protocol 0": (protocol_0, "it names posix.system|instruction UNICODE"),
    "protocol 2": (protocol_2, "posix.system"),
    "INST": (instance, "INST"),
    "OBJ": (obj, "OBJ|instruction UNICODE"),
    "Popen": (new_object, "instruction UNICODE"),
    "dotted": (dotted, "torch.serialization.os.system"),
    "dotted from an allowed class": (dotted_allowed_prefix, "collections.OrderedDict.fromkeys"),
    "getattr": (attribute, "builtins.getattr"),
    "import": (imported, "builtins.__import__"),
    "BUILD of a class": (state_of_class, "posix.system"),
    "BUILD of a tensor": (state_of_tensor, "posix.system"),
    "BUILD with __setstate__": (setstate, "posix.system"),
    "call of an object": (called_object, "object is not callable"),
    "extension registry": (extension, "EXT1"),
    "torch.load": (torch_loaded, "torch.serialization.load"),
    "storage bytes, legacy layout": (storage_bytes(zipped=False), "posix.system"),
    "storage bytes, zip layout": (storage_bytes(zipped=True), "not in PyTorch's layout"),
    "storage bytes in storage bytes": (storage_in_storage, "torch.storage._load_from_bytes"),
    "storage bytes, plain pickle": (pickle_in_storage, "not in PyTorch's layout"),
    "torch.save, zip layout": (torch_zip, "posix.system"),
    "torch.save, legacy layout": (torch_legacy, "posix.system"),
}
# These only prepare what a later instruction of a more careful attacker would use, or fail before they get there.
HARMLESS_WITH_PICKLE = {
    "dictionary key", "getattr", "BUILD of a class", "BUILD of a tensor", "BUILD with __setstate__", "call of an object",
    "dotted from an allowed class", "storage bytes, plain pickle", "torch.load",
}  # fmt: skip


@pytest.fixture
def extension_registry(monkeypatch):
    """A global that files may name by a number."""
    monkeypatch.setitem(copyreg._inverted_registry, EXTENSION, ("posix", "system"))


@pytest.mark.usefixtures("extension_registry")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_by_name_and_nothing_runs(tmp_path, name):
    build, offence = HOSTILE[name]
    trace = tmp_path / "trace"
    path = written(tmp_path, build(str(trace)))
    with pytest.raises(ValueError, match=f"is refused.*{offence}"):
        load_pickle(path)
    assert not trace.exists()


@pytest.mark.usefixtures("extension_registry")
@pytest.mark.parametrize("name", sorted(HOSTILE.keys() - HARMLESS_WITH_PICKLE))
def test_the_hostile_files_are_hostile(tmp_path, name):
    """Without this the test before would prove little."""
    trace = tmp_path / "trace"
    path = written(tmp_path, HOSTILE[name][0](str(trace)))
    with contextlib.suppress(Exception):
        if name.startswith("torch.save"):
            torch.load(path, weights_only=False)
        else:
            pickle.loads(path.read_bytes())
    patience = time.monotonic() + 5  # `Popen` does not wait
    while not trace.exists() and time.monotonic() < patience:
        time.sleep(0.01)
    assert trace.exists()


LINEAR = b"ctorch.nn.modules.linear\nLinear\n"
DEEP_TUPLE = b")" + b"\x85" * 200_000
TENSOR = pickle.dumps(torch.ones(2), 3)[2:-1]
KNOWN_FUNCTION = b"cdnnlib.util\nEasyDict\n"

# Instructions that the standard library's unpickler follows whatever its `find_class` and `persistent_load` are.
INSTRUCTIONS = {
    "extension of one byte": (b"\x82\x4d.", "EXT1"),
    "extension of two bytes": (b"\x83\x4d\x00.", "EXT2"),
    "extension of four bytes": (b"\x84\x4d\x00\x00\x00.", "EXT4"),
    "INST of a known class": (b"(itorch.nn.modules.linear\nLinear\n.", "INST"),
    "OBJ of a known class": (b"(" + LINEAR + b"o.", "OBJ"),
    "keyword arguments": (LINEAR + b")}\x92.", "NEWOBJ_EX"),
    "persistent id as text": (b"P0\n.", "PERSID"),
    "persistent id": (b"K\x01Q.", "BINPERSID"),
    "bytes of protocol 2": (b"c_codecs\nencode\n.", "names _codecs.encode"),
    "buffer outside of the file": (b"\x97.", "NEXT_BUFFER"),
    "byte array of a size that it has not": (b"\x96" + b"\xff" * 7 + b"\x7f.", "damaged"),
    "bytes of a size that they have not": (b"\x8e" + b"\xff" * 7 + b"\x7f.", "damaged"),
    "text of a size that it has not": (b"\x8d" + b"\xff" * 7 + b"\x7f.", "damaged"),
    "frame of a size that it has not": (b"\x95" + b"\xff" * 7 + b"\x7fN.", "damaged"),
    "duplicate": (b"]2a.", "DUP"),
    "frozen set of a deep tuple": (b"(" + DEEP_TUPLE + b"\x91.", "FROZENSET"),
    "set of a deep tuple": (b"\x8f(" + DEEP_TUPLE + b"\x90.", "ADDITEMS"),
    "constructed set of a deep tuple": (b"c__builtin__\nset\n](" + DEEP_TUPLE + b"e\x85R.", "__builtin__.set"),
    "items in a list": (b"]K\x00Ns.", "damaged"),
    "members in a tensor": (TENSOR + b"(K\x05\x90.", "ADDITEMS"),
    "append to an object": (LINEAR + b")\x81Na.", "object has no attribute"),
    "append to a tensor": (TENSOR + b"(NNe.", "'Tensor' object has no attribute"),
    "append to a dictionary": (b"}(NNe.", "'dict' object has no attribute"),
    "key without a value": (b"}(Nu.", "odd number"),
    "state of a class": (LINEAR + b"}b.", "__setstate__"),
    "state of a tensor": (TENSOR + b"}b.", "damaged"),
    "damaged": (b"]}b.", "damaged"),
    "call of a dtype": (b"ctorch\nfloat32\n)R.", "object is not callable"),
    "call of a tensor": (TENSOR + b")R.", "object is not callable"),
    "call with a list": (KNOWN_FUNCTION + b"]R.", "must be a tuple"),
    "call without operands": (b"R.", "damaged"),
    "known mapping from a class": (KNOWN_FUNCTION + LINEAR + b"\x85R.", "damaged"),
    "attribute of a known name": (b"ctorch\nfloat32.to_real\n.", "torch.float32.to_real"),
    "unknown instruction": (b"\xff.", "damaged"),
    "later protocol": (b"\x80\x06N.", "protocol"),
}


@pytest.mark.usefixtures("extension_registry")
@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instructions_that_plain_data_does_not_need_are_refused(tmp_path, monkeypatch, name):
    # Where the standard library finds a global that an earlier pickle has named by its number.
    monkeypatch.setitem(copyreg._extension_cache, EXTENSION, os.system)
    content, message = INSTRUCTIONS[name]
    with pytest.raises(ValueError, match=f"is refused.*{message}"):
        load_pickle(written(tmp_path, b"\x80\x02" + content))


def test_a_state_is_data_only(tmp_path):
    """Neither a `__dict__`, nor the pair that sets slots."""
    for state in (b"}" + binunicode("class_name") + b"Ns", b"N}" + binunicode("class_name") + b"Ns\x86"):
        loaded = load_pickle(written(tmp_path, b"\x80\x02" + LINEAR + b")\x81" + state + b"b."))
        assert isinstance(loaded, PickledObject) and loaded.class_name == "torch.nn.modules.linear.Linear"
        assert vars(loaded).keys() == {"state"}


def storage_stream(values: torch.Tensor) -> bytes:
    """What a pickled tensor has of its storage."""
    return saved(values._typed_storage(), zipped=False)


def test_a_storage_that_is_named_repeatedly_is_not_copied_repeatedly(tmp_path):
    """A file of megabytes would otherwise fill gigabytes."""
    stream = storage_stream(torch.ones(2**18))
    start = b"B" + struct.pack("<I", len(stream)) + stream + b"q\x00"
    again = b"ctorch.storage\n_load_from_bytes\nh\x00\x85R"
    with pytest.raises(ValueError, match="larger than the file"):
        load_pickle(written(tmp_path, b"\x80\x02](" + start + 2000 * again + b"e."))


def test_an_archive_that_is_compressed_fills_no_memory(tmp_path):
    path = written(tmp_path, saved(torch.zeros(2**20), zipped=True))
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "small", "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert load_pickle(path).shape == (2**20,)
    with pytest.raises(ValueError, match="larger than the file"):
        load_pickle(tmp_path / "small")


def test_memory_is_not_taken_for_the_memos_indices(tmp_path):
    with pytest.raises(ValueError, match="at place 4294967295"):
        load_pickle(written(tmp_path, b"\x80\x02Nr\xff\xff\xff\xff."))


def test_a_storage_of_a_zip_archive_is_read_once(tmp_path):
    base = torch.arange(6.0)
    loaded = load_pickle(written(tmp_path, saved([base, base[2:]], zipped=True)))
    assert loaded[0].untyped_storage().data_ptr() == loaded[1].untyped_storage().data_ptr()
    assert loaded[1].tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: np.ones(3), "_reconstruct"),
        (lambda: [np.array(["a"])], "_reconstruct"),
        (lambda: np.float128(1) if hasattr(np, "float128") else np.complex128(1), "unknown type"),
        (lambda: np.datetime64("2020-01-01"), "unknown type"),
        (lambda: torch.optim.SGD([torch.ones(1)], 0.1), "torch.optim.sgd.SGD"),
        (lambda: torch.nn.ReLU(), "torch.nn.modules.activation.ReLU"),
        (lambda: range(3), "builtins.range"),
    ],
)
def test_other_objects_are_refused(tmp_path, build, message):
    with pytest.raises(ValueError, match=message):
        load_pickle(written(tmp_path, pickle.dumps(build())))


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    "offset, size, stride",
    [
        (0, (7,), (1,)),
        (0, (2,), (2**63 - 1,)),
        (2**62, (2,), (2**62,)),
        (1, (6,), (1,)),
        (0, (2, 3), (4, 1)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (5, (-2,), (1,)),
        (0, (10**12,), (0,)),
        (0, (2**40, 2**40), (1, 1)),
        (0, (2,), (1, 1)),
        (0.0, (2,), (1,)),
    ],
)
def test_views_out_of_bounds_are_refused(tmp_path, offset, size, stride):
    arguments = (torch.arange(6.0).storage(), offset, size, stride, False, OrderedDict())
    with pytest.raises(ValueError, match=r"out of (the )?bounds|overflow|offset|trides"):
        load_pickle(written(tmp_path, pickled_call(torch._utils._rebuild_tensor_v2, *arguments)))


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_views_within_bounds(tmp_path):
    arguments = (torch.arange(6.0).storage(), 1, (2, 2), (3, 1), False, OrderedDict())
    loaded = load_pickle(written(tmp_path, pickled_call(torch._utils._rebuild_tensor_v2, *arguments)))
    assert loaded.tolist() == [[1, 2], [4, 5]]


@pytest.mark.parametrize("numel", [2**47 - 1, 2**24])
def test_storages_larger_than_the_file(tmp_path, numel):
    raw = storage_stream(torch.ones(7))
    assert raw.count(b"K\x07Nt") == 1
    raw = raw.replace(b"K\x07Nt", b"\x8a\x06" + struct.pack("<Q", numel)[:6] + b"Nt")
    with pytest.raises(ValueError, match=r"allocate|wrong byte size"):
        load_pickle(written(tmp_path, pickled_call(torch.storage._load_from_bytes, raw)))


@pytest.mark.parametrize("layout", ["pickle", "torch zip", "torch legacy"])
def test_every_truncation_of_a_file_is_refused(tmp_path, layout):
    content = {"a": torch.ones(2), "b": [np.float64(2), {"x": (1, "y")}]}
    if layout == "pickle":
        raw = pickle.dumps(content)
    else:
        del content["b"][0]
        raw = saved(content, zipped=layout == "torch zip")
    for end in range(0, len(raw), 7 if layout == "torch zip" else 1):
        with pytest.raises(ValueError, match="is refused"):
            load_pickle(written(tmp_path, raw[:end]))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_bytes_never_raise_anything_else(tmp_path):
    generator = np.random.default_rng(0)
    files = [pickle.dumps({"net": torch.nn.Linear(2, 2)}), saved([torch.ones(3), {"a": 1}], zipped=False)]
    for raw in files:
        for _ in range(400):
            damaged = bytearray(raw)
            for position in generator.integers(0, len(raw), size=generator.integers(1, 4)):
                damaged[position] = generator.integers(256)
            with contextlib.suppress(ValueError):
                load_pickle(written(tmp_path, bytes(damaged)))


@pytest.mark.parametrize("nest", [b"](a", b"\x85", b"("], ids=["lists", "tuples", "marks"])
def test_deep_nesting_does_not_exhaust_the_stack(tmp_path, nest):
    deep = {b"](a": b"]" * 200_000 + b"a" * 199_999, b"\x85": b")" + b"\x85" * 200_000, b"(": b"(" * 200_000}[nest]
    path = written(tmp_path, b"\x80\x04" + deep + b".")
    if nest == b"(":
        with pytest.raises(ValueError, match="damaged"):
            load_pickle(path)
    else:
        load_pickle(path)


def test_modules_that_contain_themselves(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(1, 1))
    module._modules["again"] = module
    loaded = load_pickle(written(tmp_path, pickle.dumps(module)))
    with pytest.raises(ValueError, match=r"modules of its .*Sequential are damaged"):
        loaded.tensors()


def test_a_module_with_a_strange_parameter(tmp_path):
    module = torch.nn.Linear(1, 1)
    module._parameters["weight"] = "none"
    with pytest.raises(ValueError, match=r"'weight' should be a tensor"):
        load_pickle(written(tmp_path, pickle.dumps(module))).tensors()
