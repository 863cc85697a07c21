"""From published snapshots of EDM (arXiv 2206.00364) to an `EDMUNet`, by names and shapes of tensors."""

import math
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any, Literal

import torch
from torch import Tensor

from ...adaptive.grids import iddpm_noise_levels
from ..pickles import PickledObject
from .unet import FILTERS, EDMUNet, filter_kernel


# EDM samples in this range of noise levels, unless that of the network is smaller.
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0

# The authors' wrappers, our names of their preconditionings, and constants that every network has as in table 1.
WRAPPERS: dict[str, tuple[Literal["edm", "vp", "ve", "iddpm"], dict[str, Any]]] = {
    "EDMPrecond": ("edm", {}),
    "VPPrecond": ("vp", {"beta_d": 19.9, "beta_min": 0.1, "M": 1000}),
    "VEPrecond": ("ve", {}),
    "iDDPMPrecond": ("iddpm", {"C_1": 0.001, "C_2": 0.008, "M": 1000}),
}
# Arguments of a `SongUNet` that distinguish its two architectures. A `DhariwalUNet` is an ADM.
DDPMPP = {"embedding_type": "positional", "channel_mult_noise": 1, "resample_filter": [1, 1]}
DDPMPP |= {"encoder_type": "standard", "decoder_type": "standard"}
NCSNPP = {"embedding_type": "fourier", "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1]}
NCSNPP |= {"encoder_type": "residual", "decoder_type": "standard"}
ARCHITECTURES: dict[str, dict[str, dict[str, Any]]] = {
    "SongUNet": {"ddpm++": DDPMPP, "ncsn++": NCSNPP},
    "DhariwalUNet": {"adm": {}},
}
# Defaults of arguments, which snapshots leave out.
SONG_SIZES = {"model_channels": 128, "channel_mult": [1, 2, 2, 2], "num_blocks": 4, "attn_resolutions": [16]}
ADM_SIZES = {"model_channels": 192, "channel_mult": [1, 2, 3, 4], "num_blocks": 3, "attn_resolutions": [32, 16, 8]}
DEFAULTS: dict[str, dict[str, Any]] = {
    "SongUNet": {"label_dim": 0, "channel_mult_emb": 4, **SONG_SIZES, **DDPMPP},
    "DhariwalUNet": {"label_dim": 0, "channel_mult_emb": 4, **ADM_SIZES},
}
REQUIRED = {"img_resolution", "in_channels", "out_channels"}
TRAINING_ONLY = {"augment_dim", "dropout", "label_dropout"}

# Our names of a residual block's parts, and the authors' names.
BLOCK_PARTS = {"norm1": "norm0", "conv1": "conv0", "noise_projection": "affine", "norm2": "norm1", "conv2": "conv1"}
BLOCK_PARTS |= {"shortcut": "skip", "attention.norm": "norm2", "attention.qkv": "qkv", "attention.proj": "proj"}


@dataclass
class PublishedNetwork:
    """A converted network.

    Attributes:
        unet: The network.
        wrapper, model: The authors' names of the classes of its preconditioning and its network.
        sigma_min, sigma_max: Noise levels to sample between.
    """

    unet: EDMUNet
    wrapper: str
    model: str
    sigma_min: float
    sigma_max: float


def convert_snapshot(snapshot: Any, sigma_data: float = 0.5) -> PublishedNetwork:
    """The averaged network of a snapshot.

    Args:
        snapshot: The content of the file, from [`load_pickle`].
        sigma_data: The `sigma_data` of the scheduler, for networks that have none of their own (VP, VE, iDDPM).

    Raises:
        ValueError: If it is not such a snapshot, if its network is not one of the paper's, or if a tensor is missing, unexpected
            or of a wrong shape. The message names the tensor.
    """
    wrapper = snapshot.get("ema") if isinstance(snapshot, dict) else None
    if not isinstance(wrapper, PickledObject):
        found = sorted(map(str, snapshot)) if isinstance(snapshot, dict) else type(snapshot).__name__
        raise ValueError(f"it has no network 'ema', only {found}.")
    if wrapper.class_name not in WRAPPERS:
        raise ValueError(f"its network is a {wrapper.class_name}, not one of {sorted(WRAPPERS)}.")
    preconditioning, constants = WRAPPERS[wrapper.class_name]
    for name, expected in constants.items():
        if not _equal(value := wrapper.attribute(name, expected), expected):
            raise ValueError(f"its {wrapper.class_name} has {name} = {short(value)}, not {expected}.")
    model = _entry(wrapper, "_modules", "model")
    if not isinstance(model, PickledObject) or model.class_name not in DEFAULTS:
        found = model.class_name if isinstance(model, PickledObject) else type(model).__name__
        raise ValueError(f"the network in its {wrapper.class_name} is a {found}, not one of {sorted(DEFAULTS)}.")
    if preconditioning == "iddpm":
        _check_noise_levels(wrapper)
    if preconditioning == "edm":
        sigma_data = _number(wrapper, "sigma_data", sigma_data)
    config = _config(model, variance=preconditioning == "iddpm")
    unet = EDMUNet(**config, preconditioning=preconditioning, sigma_data=sigma_data)
    _load(unet, model.tensors())
    sigma_min = max(SIGMA_MIN, _number(wrapper, "sigma_min", 0.0))
    sigma_max = min(SIGMA_MAX, _number(wrapper, "sigma_max", math.inf))
    return PublishedNetwork(unet, wrapper.class_name, model.class_name, sigma_min, sigma_max)


def _number(published: PickledObject, name: str, default: float) -> float:
    value = published.attribute(name, default)
    if not isinstance(value, (int, float)) or value < 0:
        raise ValueError(f"its {published.class_name} has {name} = {short(value)}, not a number.")
    return float(value)


def _check_noise_levels(wrapper: PickledObject) -> None:
    levels = _entry(wrapper, "_buffers", "u")
    expected = iddpm_noise_levels().float()
    # The authors computed them one after the other in float32.
    known = isinstance(levels, Tensor) and levels.shape == expected.shape
    if not known or not levels.float().allclose(expected, rtol=1e-2):
        raise ValueError(f"its {wrapper.class_name} has other noise levels 'u' than the paper's.")


def _config(model: PickledObject, variance: bool) -> dict[str, Any]:
    """The arguments of an [`EDMUNet`] for the recorded arguments of a network. With `variance` it predicts a variance, too."""
    given = model.attribute("_init_kwargs")
    if not isinstance(given, dict) or model.attribute("_init_args"):
        raise ValueError(f"its {model.class_name} does not record its arguments by name.")
    defaults = DEFAULTS[model.class_name]
    unknown = sorted(map(str, given.keys() - defaults.keys() - REQUIRED - TRAINING_ONLY))
    missing = sorted(REQUIRED - given.keys())
    if unknown or missing:
        raise ValueError(f"its {model.class_name} has unknown arguments {unknown} and lacks {missing}.")
    arguments = defaults | given
    architectures = [
        name
        for name, settings in ARCHITECTURES[model.class_name].items()
        if all(_equal(arguments[argument], value) for argument, value in settings.items())
    ]
    if not architectures or not _equal(arguments["channel_mult_emb"], 4):
        raise ValueError(f"its {model.class_name} with {short(arguments)} is neither DDPM++, NCSN++ nor ADM.")
    integers = ("img_resolution", "in_channels", "out_channels", "label_dim", "model_channels", "num_blocks")
    lists = [arguments[name] for name in ("channel_mult", "attn_resolutions")]
    numbers = [arguments[name] for name in integers] + [
        item for items in lists if type(items) is list for item in items
    ]
    if not all(type(items) is list for items in lists) or not all(type(number) is int for number in numbers):
        raise ValueError(f"its {model.class_name} has arguments of strange types, {short(arguments)}.")
    return {
        "sample_size": arguments["img_resolution"],
        "in_channels": arguments["in_channels"],
        # The second half of iDDPM's channels is a variance, which no ODE solver needs.
        "out_channels": arguments["out_channels"] // (2 if variance else 1),
        "architecture": architectures[0],
        "model_channels": arguments["model_channels"],
        "channel_mult": arguments["channel_mult"],
        "layers_per_block": arguments["num_blocks"],
        "attention_resolutions": arguments["attn_resolutions"],
        "num_class_embeds": arguments["label_dim"] or None,
    }


def _equal(value: Any, expected: Any) -> bool:
    """Equality of numbers, texts and lists of them. A file may have tensors or deeply nested data in their place."""
    if isinstance(expected, list):
        return isinstance(value, list) and len(value) == len(expected) and all(map(_equal, value, expected))
    return isinstance(value, int | float | str) and value == expected


def _entry(module: PickledObject, kind: str, name: str) -> Any:
    """A module's buffer or submodule, or `None`."""
    entries = module.attribute(kind)
    return entries.get(name) if isinstance(entries, dict) else None


def _load(unet: EDMUNet, published: dict[str, Tensor]) -> None:
    """Puts all tensors of a published network into ours. Filters, which ours does not load, are compared with its own."""
    own, architecture = unet.state_dict(), unet.config.architecture
    sources = {name: _published_name(unet, name) for name in own}
    expected = set(sources.values())
    if "class_embedding.weight" in own and architecture != "adm":
        expected.add("map_label.bias")
    filters = {name: tensor for name, tensor in published.items() if name.endswith(".resample_filter")}
    missing = sorted(expected - published.keys())
    unexpected = sorted(published.keys() - expected - filters.keys() - {"map_augment.weight"})
    if missing or unexpected:
        raise ValueError(f"missing tensors {missing}, unexpected tensors {unexpected}.")
    state = {}
    for name, parameter in own.items():
        source = sources[name]
        tensor = published[source]
        if name == "class_embedding.weight":
            tensor = _class_embedding(tensor, published.get("map_label.bias"))
        elif name.endswith(("attention.qkv.weight", "attention.qkv.bias")):
            heads = unet.get_submodule(name.partition(".qkv.")[0]).num_heads
            tensor = _one_after_the_other(tensor, int(heads))
        elif name.startswith("conv_out.") and tensor.shape[:1] == (2 * len(parameter),):
            tensor = tensor[: len(parameter)]  # the second half is iDDPM's variance
        if tensor.shape != parameter.shape:
            raise ValueError(f"'{source}' should be of shape {tuple(parameter.shape)}, got {tuple(tensor.shape)}.")
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"'{source}' should hold finite numbers.")
        state[name] = tensor
    kernel = filter_kernel(FILTERS[architecture])[None, None]
    for name, tensor in filters.items():
        if tensor.shape != kernel.shape or not tensor.float().allclose(kernel, rtol=0, atol=1e-6):
            raise ValueError(f"'{name}' is not the filter {list(FILTERS[architecture])}.")
    unet.load_state_dict(state)


def _published_name(unet: EDMUNet, name: str) -> str:
    """The authors' name of one of our tensors."""
    size, last = unet.config.sample_size, len(unet.config.channel_mult) - 1
    resolutions = [f"{size >> level}x{size >> level}" for level in range(last + 1)]
    finest = resolutions[0]
    places = {"noise_layers.0": "map_layer0", "noise_layers.1": "map_layer1", "conv_in": f"enc.{finest}_conv"}
    if unet.config.architecture == "adm":
        places |= {"norm_out": "out_norm", "conv_out": "out_conv"}
    else:
        places |= {"norm_out": f"dec.{finest}_aux_norm", "conv_out": f"dec.{finest}_aux_conv"}
    places |= {"class_embedding": "map_label"}
    module, _, parameter = name.rpartition(".")
    if name == "noise_frequencies":
        return "map_noise.freqs"
    if module in places:
        return f"{places[module]}.{parameter}"
    kind, first, part = module.split(".", 2)
    i = int(first)
    if kind == "image_downsamplers":
        return f"enc.{resolutions[i + 1]}_aux_residual.{parameter}"
    if kind in ("encoder", "decoder"):
        j, part = part.split(".", 1)
        place = f"enc.{resolutions[i]}_block{j}" if kind == "encoder" else f"dec.{resolutions[last - i]}_block{j}"
    elif kind == "downsamplers":
        place = f"enc.{resolutions[i + 1]}_down"
    elif kind == "upsamplers":
        place = f"dec.{resolutions[last - 1 - i]}_up"
    else:
        place = f"dec.{resolutions[last]}_in{i}"
    return f"{place}.{BLOCK_PARTS[part]}.{parameter}"


def _class_embedding(weight: Tensor, bias: Tensor | None) -> Tensor:
    """The table of the authors' linear map of one-hot labels. Its last row is for a label of zeros."""
    if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        return weight  # the caller refuses its shape
    table = torch.cat([weight.T, weight.new_zeros(1, len(weight))])
    return table if bias is None else table * math.sqrt(weight.shape[1]) + bias


def _one_after_the_other(tensor: Tensor, heads: int) -> Tensor:
    """Rows in the order (query, key or value; head; channel) from (head; channel; query, key or value)."""
    if tensor.ndim == 0 or len(tensor) % (3 * heads):
        return tensor  # the caller refuses its shape
    return tensor.unflatten(0, (heads, -1, 3)).movedim(2, 0).flatten(0, 2)
