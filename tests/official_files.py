"""Writes files in the layouts of the papers' code, with weights of our choice and placeholders for source text.

A snapshot of EDM or R3GAN pickles a tree of modules, whose classes are not installed here. Stand-ins with their names exist
while the file is written, and no longer when it is read.
"""

import json
import math
import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from conftest import ROOT
from safetensors import safe_open
from torch import Tensor, nn


GOLDEN = ROOT / "tests" / "golden"
SOURCE_TEXT = "raise SystemExit('the source text of a snapshot was run')"


class Reduced:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable, *arguments: Any):
        self.reduction = (function, arguments)

    def __reduce__(self):
        return self.reduction


@contextmanager
def foreign(*names: str, kind: type = type) -> Iterator[list[Any]]:
    """Makes classes (or functions) that pickle by the given names, as long as the context lasts."""
    with ExitStack() as stack:
        values = []
        for full_name in names:
            module_name, name = full_name.rsplit(".", 1)
            if kind is type:
                value = type(name, (nn.Module,), {})
            else:
                value = types.FunctionType((lambda *_: None).__code__, {}, name)
            value.__module__, value.__qualname__ = module_name, name
            for path in (module_name, module_name.partition(".")[0]):
                if path not in sys.modules:
                    stack.enter_context(mock.patch.dict(sys.modules, {path: types.ModuleType(path)}))
            stack.enter_context(mock.patch.object(sys.modules[module_name], name, value, create=True))
            values.append(value)
        yield values


def nested(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings from a mapping with dotted names."""
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = tensor
    return tree


# EDM


PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"


def module_state(tree: Mapping[str, Any], child: Callable[[str, Mapping[str, Any]], Any]) -> dict[str, Any]:
    """The `__dict__` that a module pickles."""
    state = {name: OrderedDict() for name in ("_parameters", "_buffers", "_modules")}
    for name, value in tree.items():
        if not isinstance(value, Tensor):
            state["_modules"][name] = child(name, value)
        elif name in ("resample_filter", "freqs", "u"):
            state["_buffers"][name] = value
        else:
            state["_parameters"][name] = nn.Parameter(value, requires_grad=False)
    return {"training": False, "_backward_hooks": OrderedDict(), **state}


def edm_snapshot(
    tensors: Mapping[str, Tensor],
    wrapper: str,
    model: str,
    arguments: Mapping[str, Any],
    further: Mapping[str, Any] | None = None,
    **attributes: Any,
) -> bytes:
    """A snapshot of EDM's training.

    Args:
        tensors: Tensors of the network by the authors' names.
        wrapper, model: Names of the authors' classes.
        arguments: The arguments from which the network was constructed.
        further: Other entries of the snapshot.
        attributes: Attributes of the wrapper.
    """
    with foreign(PERSISTENT, kind=types.FunctionType) as (reconstruct,):

        def persistent(class_name: str, state: Mapping[str, Any]) -> Reduced:
            meta = {"type": "class", "version": 6, "module_src": SOURCE_TEXT, "class_name": class_name}
            return Reduced(reconstruct, {**meta, "state": dict(state)})

        def child(name: str, tree: Mapping[str, Any]) -> Any:
            if name in ("enc", "dec"):
                modules = nn.ModuleDict()
                modules._modules.update((key, child(key, value)) for key, value in tree.items())
                return modules
            class_name = "UNetBlock" if "norm0" in tree else "Linear" if "map_" in name else "Conv2d"
            return persistent(class_name, module_state(tree, child))

        recorded = {"_init_args": (), "_init_kwargs": dict(arguments)}
        network = persistent(model, module_state(nested(tensors), child) | recorded)
        state = module_state({}, child)
        state["_modules"]["model"] = network
        buffers = {name: value for name, value in attributes.items() if isinstance(value, Tensor)}
        state["_buffers"].update(buffers)
        values = {name: value for name, value in attributes.items() if name not in buffers}
        ema = persistent(wrapper, state | {"_init_args": (), "_init_kwargs": {"model_type": model}} | values)
        return pickle.dumps({"ema": ema, "loss_fn": persistent("EDMLoss", {"P_mean": -1.2}), **(further or {})})


def pseudo_random(shape: tuple[int, ...], seed: int) -> Tensor:
    """Numbers in [-1/2, 1/2) that look random and are the same on all machines: float64 with 20 bits."""
    i = torch.arange(math.prod(shape), dtype=torch.int64)
    mixed = (i * 7919 + seed * 104729 + 1) * 2654435761 % 2**32
    return ((mixed >> 12).double() / 2**20 - 0.5).view(shape)


def edm_weights(layout: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """Weights in float32 for a network of EDM, whose tensors have these names and shapes."""
    weights = {}
    for seed, name in enumerate(sorted(layout)):
        shape = tuple(layout[name])
        values = pseudo_random(shape, seed)
        module, last = ["", *name.split(".")][-2:]
        if last == "resample_filter":
            taps = torch.tensor([1.0, 1.0] if shape[-1] == 2 else [1.0, 3.0, 3.0, 1.0])
            values = torch.outer(taps, taps)[None, None] / taps.sum() ** 2
        elif last == "freqs":
            values = 16 * values
        elif last == "weight":
            fan_in = math.prod(shape[1:])
            values = 1 + values if "norm" in module else values * 2.0 ** (2 - round(math.log2(fan_in) / 2))
        weights[name] = values.float()
    return weights


def edm_reference() -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """The cases with EDM's preconditioning, and the tensors, of `golden/edm_reference.safetensors`; see `test_edm.py`."""
    with safe_open(GOLDEN / "edm_reference.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        cases, layouts = (json.loads(file.metadata()[name]) for name in ("cases", "layouts"))
    cases = {name: case for name, case in cases.items() if case["wrapper"] == "EDMPrecond"}
    for case in cases.values():
        case["layout"] = layouts[case["layout"]]
    return cases, tensors


def edm_case_snapshot(case: Mapping[str, Any], **changes: Any) -> bytes:
    """The snapshot of a reference case; `changes` replace tensors, the wrapper's attributes or other entries by name."""
    attributes = {"sigma_min": 0, "sigma_max": math.inf, "sigma_data": 0.5}
    tensors = edm_weights(case["layout"])
    return edm_snapshot(
        changes.pop("tensors", tensors),
        changes.pop("wrapper", case["wrapper"]),
        changes.pop("model", case["model"]),
        changes.pop("arguments", case["arguments"]),
        **attributes | changes,
    )


# R3GAN


def r3gan_class(path: tuple[str, ...], tree: Mapping[str, Any]) -> str | None:
    """The class of a module in a discriminator without its package, or `None` for classes of PyTorch."""
    name, parent = path[-1] if path else "", path[-2] if len(path) > 1 else ""
    if not path:
        return "Networks.Discriminator"
    if name.startswith("NonLinearity"):
        return "FusedOperators.BiasedActivationCUDA"
    if name == "Resampler":
        return "Resamplers.InterpolativeDownsamplerCUDA"
    if parent == "MainLayers":
        return "Networks.DiscriminatorStage"
    if parent == "Layers":
        kinds = {"LinearLayer1": "ResidualBlock", "Resampler": "DownsampleLayer", "Basis": "DiscriminativeBasis"}
        return "Networks." + next(kind for part, kind in kinds.items() if part in tree)
    return "Networks.Convolution" if "Layer" in tree else None


def r3gan_snapshot(state: Mapping[str, Tensor], package: str = "R3GAN", **further: Any) -> bytes:
    """A snapshot of R3GAN's training.

    Args:
        state: Tensors of the discriminator by the authors' names.
        package: The package of the classes. The published files have an earlier name of it.
        further: Other entries of the snapshot.
    """
    with ExitStack() as stack:
        classes: dict[str, type] = {}

        def module(class_name: str) -> nn.Module:
            if class_name not in classes:
                (classes[class_name],) = stack.enter_context(foreign(class_name))
            return classes[class_name]()

        def build(path: tuple[str, ...], tree: Mapping[str, Any]) -> nn.Module:
            class_name = r3gan_class(path, tree)
            if class_name is not None:
                network = module(f"{package}.{class_name}")
            elif "weight" in tree:
                network = nn.Linear(1, 1, bias=False) if tree["weight"].ndim == 2 else nn.Conv2d(1, 1, 1, bias=False)
            else:
                network = nn.ModuleList()
            for name, value in tree.items():
                if not isinstance(value, Tensor):
                    network._modules[name] = build((*path, name), value)
                elif name == "Kernel":
                    network.register_buffer(name, value)
                else:
                    network._parameters[name] = nn.Parameter(value, requires_grad=False)
            if class_name == "Networks.DiscriminatorStage":
                network.DataType = torch.bfloat16
            return network

        discriminator = module("training.networks.Discriminator")
        discriminator.Model = build((), nested(state))
        snapshot = {
            "G": None,
            "D": discriminator,
            "G_ema": None,
            "cur_nimg": 10,
            "training_set_kwargs": {"xflip": True},
        }
        return pickle.dumps(snapshot | further)


def written(folder: Path, content: bytes, name: str = "network-snapshot.pkl") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path
