"""`EDMPipeline`: images from an `EDMUNet` and any scheduler with EDM preconditioning."""

from typing import Literal

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .unet import EDMUNet


class EDMPipeline(DiffusionPipeline):
    """Unconditional or class-conditional images from EDM's networks (arXiv 2206.00364).

    Args:
        unet ([`EDMUNet`]): The network.
        scheduler ([`SchedulerMixin`]): `EDMEulerScheduler`, `EDMDPMSolverMultistepScheduler`, `SDMScheduler` or
            `GASScheduler`, each with the network's `sigma_data`.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: EDMUNet, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(do_resize=False)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: int | list[int] | Tensor | None = None,
        num_inference_steps: int = 18,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Samples images.

        Args:
            batch_size (`int`, defaults to 1): Number of images.
            class_labels (`int`, `list[int]` or `torch.Tensor` of shape `(batch_size,)`, *optional*): The class of all images,
                or the class of each image. Without it, a class-conditional network makes images of no class in particular.
            num_inference_steps (`int`, defaults to 18): Steps of the scheduler.
            generator (`torch.Generator` or a list of them, *optional*): Generator of the initial noise, or one for each image.
            latents (`torch.Tensor` of shape `(batch_size, channels, height, width)`, *optional*): Initial noise of variance 1
                to use instead.
            output_type (`"pil"`, `"np"`, `"pt"` or `"latent"`): Images, arrays or tensors in [0, 1], or the final sample.
            return_dict (`bool`, defaults to `True`): Whether to return an [`ImagePipelineOutput`] or a tuple.

        Raises:
            ValueError: If generators, latents or classes do not fit `batch_size` or the network.
        """
        config, device = self.unet.config, self._execution_device
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"`generator` must have one for each of {batch_size} images, got {len(generator)}.")
        class_labels = self._check_labels(class_labels, batch_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif latents.shape != shape:
            raise ValueError(f"`latents` must be of shape {shape}, got {tuple(latents.shape)}.")
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        # Samples of variance sigma^2 need float32. Only the inside of the network may use half precision.
        latents = latents.to(device, torch.float32) * self.scheduler.init_noise_sigma
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for t in self.scheduler.timesteps:
                model_input = self.scheduler.scale_model_input(latents, t)
                model_output = self.unet(model_input, t, class_labels=class_labels, return_dict=False)[0]
                latents = self.scheduler.step(model_output, t, latents, generator=generator, return_dict=False)[0]
                progress_bar.update()
        images = self.image_processor.postprocess(latents, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_labels(self, class_labels: int | list[int] | Tensor | None, batch_size: int) -> Tensor | None:
        if class_labels is None:
            return None
        num_classes = self.unet.config.num_class_embeds
        if num_classes is None:
            raise ValueError("`class_labels` were given, but the network is not class-conditional.")
        labels = torch.as_tensor(class_labels, device=self._execution_device).long()
        if labels.shape not in ((), (batch_size,)) or not ((labels >= 0) & (labels < num_classes)).all():
            allowed = f"one class or {batch_size} of them, from 0 to {num_classes - 1}"
            raise ValueError(f"`class_labels` must be {allowed}, got {labels.tolist()}.")
        return labels.expand(batch_size)
