"""From published snapshots of EDM (arXiv 2206.00364) to an `EDMUNet`, by names and shapes of tensors."""

import math
from collections.abc import Mapping
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor

from ...utils.files import check_tensors
from ..pickles import PickledObject, entry
from .unet import FILTERS, EDMUNet, filter_kernel


# The authors' class of EDM's preconditioning. The baselines of their paper have others.
WRAPPER = "EDMPrecond"
# Arguments of a `SongUNet` that distinguish its two architectures. A `DhariwalUNet` is an ADM.
DDPMPP = {"embedding_type": "positional", "channel_mult_noise": 1, "resample_filter": [1, 1]}
DDPMPP |= {"encoder_type": "standard", "decoder_type": "standard"}
NCSNPP = DDPMPP | {"embedding_type": "fourier", "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1]}
NCSNPP |= {"encoder_type": "residual"}
ARCHITECTURES: dict[str, dict[str, dict[str, Any]]] = {
    "SongUNet": {"ddpm++": DDPMPP, "ncsn++": NCSNPP},
    "DhariwalUNet": {"adm": {}},
}
# Arguments that snapshots have, and defaults of those that they leave out.
REQUIRED = {"img_resolution": 0, "in_channels": 0, "out_channels": 0}
SONG_SIZES = {"model_channels": 128, "channel_mult": [1, 2, 2, 2], "num_blocks": 4, "attn_resolutions": [16]}
ADM_SIZES = {"model_channels": 192, "channel_mult": [1, 2, 3, 4], "num_blocks": 3, "attn_resolutions": [32, 16, 8]}
DEFAULTS: dict[str, dict[str, Any]] = {
    "SongUNet": {**REQUIRED, "label_dim": 0, "channel_mult_emb": 4, **SONG_SIZES, **DDPMPP},
    "DhariwalUNet": {**REQUIRED, "label_dim": 0, "channel_mult_emb": 4, **ADM_SIZES},
}
# Our names of arguments, and the authors' names.
ARGUMENTS = {name: name for name in ("in_channels", "out_channels", "model_channels", "channel_mult")}
ARGUMENTS |= {
    "sample_size": "img_resolution",
    "layers_per_block": "num_blocks",
    "attention_resolutions": "attn_resolutions",
}
TRAINING_ONLY = {"augment_dim", "dropout", "label_dropout"}

# Our names of a residual block's parts, and the authors' names.
BLOCK_PARTS = {"norm1": "norm0", "conv1": "conv0", "noise_projection": "affine", "norm2": "norm1", "conv2": "conv1"}
BLOCK_PARTS |= {"shortcut": "skip", "attention.norm": "norm2", "attention.qkv": "qkv", "attention.proj": "proj"}


def convert_snapshot(snapshot: Any) -> EDMUNet:
    """The averaged network of a snapshot.

    Args:
        snapshot: The content of the file, from [`load_pickle`].

    Raises:
        ValueError: If it is not such a snapshot, if its network is not one of the paper's, or if a tensor is missing, unexpected
            or of a wrong shape. The message names the tensor.
    """
    wrapper = entry(snapshot, "network", "ema")
    if wrapper.class_name != WRAPPER:
        raise ValueError(f"its network is a {wrapper.class_name}, not an {WRAPPER}.")
    sigma_data = wrapper.attribute("sigma_data", 0.5)
    if not isinstance(sigma_data, (int, float)) or sigma_data <= 0:
        raise ValueError(f"its {WRAPPER} has sigma_data = {short(sigma_data)}, not a positive number.")
    model = entry(wrapper.attribute("_modules"), "network", "model")
    if model.class_name not in DEFAULTS:
        raise ValueError(f"the network in its {WRAPPER} is a {model.class_name}, not one of {sorted(DEFAULTS)}.")
    unet = EDMUNet(**_config(model), sigma_data=float(sigma_data))
    _load(unet, model.tensors())
    return unet


def _config(model: PickledObject) -> dict[str, Any]:
    """The arguments of an [`EDMUNet`] for the recorded arguments of a network."""
    given, defaults = model.attribute("_init_kwargs"), DEFAULTS[model.class_name]
    if not isinstance(given, dict):
        raise ValueError(f"its {model.class_name} does not record its arguments by name.")
    unknown = sorted(map(str, given.keys() - defaults.keys() - TRAINING_ONLY))
    missing = sorted(REQUIRED.keys() - given.keys())
    if unknown or missing:
        raise ValueError(f"its {model.class_name} has unknown arguments {unknown} and lacks {missing}.")
    arguments = {name: given.get(name, default) for name, default in defaults.items()}
    for name, value in arguments.items():
        items = value if isinstance(value, list) else []
        if type(value) is not type(defaults[name]) or not all(type(item) is int for item in items):
            raise ValueError(
                f"its {model.class_name} has {name} = {short(value)}, of another type than {defaults[name]}."
            )
    architectures = [
        name for name, settings in ARCHITECTURES[model.class_name].items() if settings.items() <= arguments.items()
    ]
    if not architectures or arguments["channel_mult_emb"] != 4:
        raise ValueError(f"its {model.class_name} with {short(arguments)} is neither DDPM++, NCSN++ nor ADM.")
    config = {ours: arguments[theirs] for ours, theirs in ARGUMENTS.items()}
    return {**config, "architecture": architectures[0], "num_class_embeds": arguments["label_dim"] or None}


def _load(unet: EDMUNet, published: dict[str, Tensor]) -> None:
    """Puts all tensors of a published network into ours. Filters, which ours does not load, are compared with its own."""
    own, taps, places = unet.state_dict(), FILTERS[unet.config.architecture], _places(unet)
    sources = {name: _published_name(places, name) for name in own}
    shapes = {source: tuple(own[name].shape) for name, source in sources.items()}
    if unet.config.num_class_embeds is not None:
        classes, width = own["class_embedding.weight"].shape
        shapes["map_label.weight"] = (width, classes - 1)
        if unet.config.architecture != "adm":
            shapes["map_label.bias"] = (width,)
    filters = {name: tensor for name, tensor in published.items() if name.endswith(".resample_filter")}
    check_tensors(
        {name: published[name] for name in published.keys() - filters.keys() - {"map_augment.weight"}}, shapes
    )
    kernel = filter_kernel(taps)[None, None]
    for name, tensor in filters.items():
        if tensor.shape != kernel.shape or not tensor.float().allclose(kernel, rtol=0, atol=1e-6):
            raise ValueError(f"'{name}' is not the filter {list(taps)}.")
    state = {}
    for name, source in sources.items():
        tensor = published[source]
        if name == "class_embedding.weight":
            tensor = _class_embedding(tensor, published.get("map_label.bias"))
        elif ".attention.qkv." in name:
            # From (head; channel; query, key or value) to (query, key or value; head; channel).
            heads = int(unet.get_submodule(name.partition(".qkv.")[0]).num_heads)
            tensor = tensor.unflatten(0, (heads, -1, 3)).movedim(2, 0).flatten(0, 2)
        state[name] = tensor
    unet.load_state_dict(state)


def _places(unet: EDMUNet) -> dict[str, str]:
    """The authors' names of our modules: of residual blocks, and of layers that are in none."""
    config, last = unet.config, len(unet.config.channel_mult) - 1
    levels = [f"{config.sample_size >> level}x{config.sample_size >> level}" for level in range(last + 1)]
    out = "out" if config.architecture == "adm" else f"dec.{levels[0]}_aux"
    places = {"noise_layers.0": "map_layer0", "noise_layers.1": "map_layer1", "class_embedding": "map_label"}
    places |= {"conv_in": f"enc.{levels[0]}_conv", "norm_out": f"{out}_norm", "conv_out": f"{out}_conv"}
    places |= {f"middle.{j}": f"dec.{levels[last]}_in{j}" for j in range(2)}
    for i, level in enumerate(levels):
        # Our decoder starts with the coarsest level.
        places |= {f"encoder.{i}.{j}": f"enc.{level}_block{j}" for j in range(config.layers_per_block)}
        places |= {f"decoder.{last - i}.{j}": f"dec.{level}_block{j}" for j in range(config.layers_per_block + 1)}
        places |= {f"downsamplers.{i - 1}": f"enc.{level}_down", f"upsamplers.{last - 1 - i}": f"dec.{level}_up"}
        places[f"image_downsamplers.{i - 1}.conv"] = f"enc.{level}_aux_residual"
    return places


def _published_name(places: Mapping[str, str], name: str) -> str:
    """The authors' name of one of our tensors."""
    if name == "noise_frequencies":
        return "map_noise.freqs"
    module, _, parameter = name.rpartition(".")
    if module in places:
        return f"{places[module]}.{parameter}"
    block = next(place for place in places if module.startswith(f"{place}."))
    return f"{places[block]}.{BLOCK_PARTS[module.removeprefix(f'{block}.')]}.{parameter}"


def _class_embedding(weight: Tensor, bias: Tensor | None) -> Tensor:
    """The table of the authors' linear map of one-hot labels. Its last row is for a label of zeros."""
    table = torch.cat([weight.T, weight.new_zeros(1, len(weight))])
    return table if bias is None else table * math.sqrt(weight.shape[1]) + bias
