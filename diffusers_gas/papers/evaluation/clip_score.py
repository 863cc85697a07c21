"""Agreement of images with their prompts, by the embeddings of a CLIP model."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .feature_extractors import check_images, rgb_bytes


class CLIPScore:
    """100 times the cosine of image and prompt embeddings, at least 0 (Hessel et al., arXiv 2104.08718, there times 2.5).

    Args:
        name: Repository or folder of a CLIP model of Transformers, with its processor.
    """

    def __init__(self, name: str | os.PathLike, device: str | torch.device = "cpu"):
        from transformers import CLIPModel, CLIPProcessor

        self.model = CLIPModel.from_pretrained(name).eval()
        nn.Module.to(self.model, device)
        self.processor = CLIPProcessor.from_pretrained(name)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores of shape `(batch_size,)`, on the CPU.

        Args:
            images (`Tensor` of shape `(batch_size, channels, height, width)`): In [0, 1].
            prompts: One per image. Prompts that are too long for CLIP's text encoder are cut off.

        Raises:
            ValueError: If images have other shapes or values, or if there are not as many prompts as images.
        """
        check_images(images)
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images need as many prompts, got {len(prompts)}.")
        pixels = list(rgb_bytes(images).cpu())
        inputs = self.processor(text=list(prompts), images=pixels, padding=True, truncation=True, return_tensors="pt")
        output = self.model(**inputs.to(self.model.device))
        cosines = torch.cosine_similarity(output.image_embeds.float(), output.text_embeds.float())
        return 100 * cosines.clamp(min=0).cpu()
