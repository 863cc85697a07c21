"""LPIPS (arXiv 1801.03924, version 0.1 on VGG16), written as features: LPIPS is their squared L2 distance.

The packages `lpips` and torchmetrics have the distance only, while Gauss-Newton needs the features. They also require torchvision.
"""

from collections.abc import Iterator
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor, nn

from ..utils.tensors import FLOAT32


# Channels of VGG16's convolutions by stage (arXiv 1409.1556, table 1, D). Stages end before a pooling layer, their outputs
# are relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

# Mean and standard deviation of ImageNet's colours for images in [-1, 1], as LPIPS has them.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)

# torchvision's VGG16 for ImageNet, and LPIPS's five linear layers.
VGG16_FILE: dict[str, Any] = {
    "repo_id": "timm/vgg16.tv_in1k",
    "filename": "model.safetensors",
    "revision": "b8d8aa2dd860af9233c8c67385a8097fd6c35d3f",
}
LINEAR_FILE: dict[str, Any] = {
    "repo_id": "vivym/lpips",
    "filename": "vgg_lpips_linear.safetensors",
    "revision": "270571f1fb2a2c4c5f920cec96cd87838c345982",
}


class LPIPS(nn.Module):
    """Features phi of images such that the mean over all entries of (phi(x) - phi(y))^2 is the mean LPIPS of x and y.

    A stage has a feature vector for each position, which is normalised and then weighted by channel. LPIPS is the sum over
    stages of their squared distances, averaged over positions. The weights are frozen. They are random until they are loaded.

    There are 6.1 million features (24 MB) for an image of 224 x 224, and 0.5 million for 64 x 64. Gauss-Newton keeps them for
    every parameter of the solver: choose its batch size, or `size`, accordingly.

    Args:
        size (`int`, *optional*, defaults to 224): Height and width, at least 16, to which images are resized bilinearly, as in
            the GAS paper. `None` leaves them as they are.

    Raises:
        ValueError: If `size` is below 16.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, size: int | None = 224):
        super().__init__()
        if size is not None and size < 16:
            raise ValueError(f"`size` must be at least 16, as four poolings halve it, got {size}.")
        self.size = size
        layers, channels = [], 3
        for widths in STAGES:
            for width in widths:
                layers += [nn.Conv2d(channels, width, kernel_size=3, padding=1, **FLOAT32), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])
        self.channel_weights = nn.ParameterList(torch.ones(1, widths[-1], 1, 1, **FLOAT32) for widths in STAGES)
        self.register_buffer("shift", torch.tensor(SHIFT, **FLOAT32).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE, **FLOAT32).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, size: int | None = 224) -> "LPIPS":
        """LPIPS with its published weights, which are downloaded from the Hub (553 MB, once).

        Args:
            size: See the class.

        Raises:
            ValueError: If they cannot be downloaded.
        """
        try:
            vgg16, linear = (load_file(hf_hub_download(**file)) for file in (VGG16_FILE, LINEAR_FILE))
        except OSError as error:
            raise ValueError(
                f"LPIPS's weights could not be downloaded from {VGG16_FILE['repo_id']} and {LINEAR_FILE['repo_id']} ({error}). "
                "Use a loss that needs none: 'pixels' or 'states'."
            ) from error
        model, prefix = cls(size), "features."
        convolutions = {name.removeprefix(prefix): tensor for name, tensor in vgg16.items() if name.startswith(prefix)}
        model.features.load_state_dict(convolutions)
        model.channel_weights.load_state_dict({name.removesuffix(".weight"): linear[name] for name in linear})
        return model

    def forward(self, images: Tensor) -> Tensor:
        """Features `(batch_size, num_features)` of images or videos, whose LPIPS is the mean over their frames.

        Args:
            images: Images of shape `(batch_size, channels, height, width)` or videos of shape
                `(batch_size, channels, frames, height, width)`, with 1 or 3 channels, clipped to [-1, 1].

        Raises:
            ValueError: If the shape is another.
        """
        if images.ndim not in (4, 5) or images.shape[1] not in (1, 3):
            raise ValueError(f"LPIPS is for images and videos of 1 or 3 channels, got shape {tuple(images.shape)}.")
        if images.ndim == 5:
            return self(images.transpose(1, 2).flatten(0, 1)).view(len(images), -1)
        images = images.to(self.scale)
        if self.size is not None:
            images = nn.functional.interpolate(images, size=(self.size, self.size), mode="bilinear")
        # The scaling repeats a single channel.
        stages = self._stages((images.clamp(-1, 1) - self.shift) / self.scale)
        weighted = []
        for x, weight in zip(stages, self.channel_weights):
            # Where no channel is active, `vector_norm` has the gradient 0. That of a square root would be infinite.
            unit = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)
            weighted.append((unit * (weight.clamp_min(0) / x[0, 0].numel()).sqrt()).flatten(1))
        features = torch.cat(weighted, dim=1)
        return features * features.shape[1] ** 0.5

    def _stages(self, x: Tensor) -> Iterator[Tensor]:
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                yield x
            x = layer(x)
        yield x
