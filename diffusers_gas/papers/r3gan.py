"""From the published snapshots of R3GAN (arXiv 2501.05441) to an `R3GANDiscriminator`, by names and shapes of tensors."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..distillation.discriminator import R3GANDiscriminator, low_pass_kernel
from ..utils.files import check_tensors
from .pickles import entry


def convert_snapshot(snapshot: Any) -> R3GANDiscriminator:
    """The discriminator of a snapshot, in float32.

    Args:
        snapshot: The content of the file, from [`load_pickle`].

    Raises:
        ValueError: If it has no discriminator of R3GAN, or for the reasons of [`convert_state`].
    """
    tensors = entry(snapshot, "discriminator", "D").tensors()
    # Stages that computed in half precision may have stored their weights in it.
    return convert_state({name: tensor.float() for name, tensor in tensors.items()})


# Parts of our names, as regular expressions, and of the published names.
_PUBLISHED_NAMES = {
    r"^extraction": r"ExtractionLayer.Layer",
    r"^stages\.(\d+)\.(\d+)": r"MainLayers.\1.Layers.\2",
    r"conv(\d)\.weight": r"LinearLayer\1.Layer.weight",
    r"conv(\d)\.bias": r"NonLinearity\1.Bias",
    r"projection": r"LinearLayer.Layer",
    r"basis": r"Basis",
    r"linear": r"LinearLayer",
}
_EMBEDDING = "EmbeddingLayer.weight"


def convert_state(state: Mapping[str, Tensor]) -> R3GANDiscriminator:
    """A discriminator with the weights of the authors' implementation of R3GAN, in their precision.

    The logit of a published class-conditional network is linear in the embedding of the class. The discriminator whose logit
    is the mean over all classes therefore differs in its last layer only.

    Args:
        state: Tensors by their published names, with or without the prefix `Model.`.

    Raises:
        ValueError: If a tensor is missing, unexpected or of the wrong shape, or if a resampling filter is not [1, 3, 3, 1].
    """
    state = {name.removeprefix("Model."): tensor for name, tensor in state.items()}
    config = _published_config(state)
    num_stages, blocks = len(config["widths"]), config["blocks_per_stage"]
    last = f"MainLayers.{num_stages - 1}.Layers.{blocks[-1]}.LinearLayer.weight"
    embedding = state.pop(_EMBEDDING, None)
    if embedding is not None and last in state:
        if embedding.ndim != 2 or state[last].shape[:1] != embedding.shape[:1]:
            raise ValueError(
                f"'{_EMBEDDING}' should be a matrix with as many rows as the last layer, whose shape is "
                f"{tuple(state[last].shape)}, got shape {tuple(embedding.shape)}."
            )
        state[last] = embedding.mean(dim=1, keepdim=True).T @ state[last]
    network = R3GANDiscriminator(sample_size=(4 * 2 ** (num_stages - 1),) * 2, **config)
    own = network.state_dict()
    published = {name: published_name(name) for name in own}
    shapes = {published[name]: tuple(tensor.shape) for name, tensor in own.items()}
    kernels = [f"MainLayers.{s}.Layers.{blocks[s]}.Resampler.Kernel" for s in range(num_stages - 1)]
    shapes |= dict.fromkeys(kernels, (4, 4))
    check_tensors(state, shapes)
    for name in kernels:
        if not torch.allclose(state[name].float().cpu(), low_pass_kernel((True, True)), rtol=0, atol=1e-6):
            raise ValueError(f"'{name}' should be the outer product of [1, 3, 3, 1] / 8 with itself: {state[name]}.")

    network.to(state["ExtractionLayer.Layer.weight"].dtype)
    network.load_state_dict({name: state[published[name]] for name in own})
    return network


def published_name(name: str) -> str:
    """The published name of a tensor of our network."""
    for pattern, replacement in _PUBLISHED_NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def _published_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration of the network without the sample size, from the shapes of its tensors."""
    blocks: dict[int, set[int]] = {}
    for name in state:
        if match := re.match(r"MainLayers\.(\d+)\.Layers\.(\d+)\.(LinearLayer|NonLinearity)\d\.", name):
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    widths, cardinalities = [], []
    for s in range(max(blocks, default=0) + 1):
        expanded, width, *_ = _shape(state, f"MainLayers.{s}.Layers.0.LinearLayer1.Layer.weight")
        _, group_width, kernel_size, _ = _shape(state, f"MainLayers.{s}.Layers.0.LinearLayer2.Layer.weight")
        widths.append(width)
        cardinalities.append(max(1, expanded // group_width))
    return {
        "in_channels": _shape(state, "ExtractionLayer.Layer.weight")[1],
        "widths": widths,
        "cardinalities": cardinalities,
        "blocks_per_stage": [len(blocks[s]) for s in range(len(widths))],
        "expansion_factor": expanded // width,
        "kernel_size": kernel_size,
    }


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """The shape of a convolution's weight."""
    if name not in state:
        raise ValueError(f"missing tensors {[name]}.")
    shape = tuple(state[name].shape)
    if len(shape) != 4 or 0 in shape:
        raise ValueError(f"'{name}' should be the weight of a 2-D convolution, got shape {shape}.")
    return shape
