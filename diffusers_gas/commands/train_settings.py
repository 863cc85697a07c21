"""The settings of a training; training/README.md says what to choose."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..distillation.gradient_descent import Recipe
from .arguments import HubSettings, PipelineSettings, TeacherSettings, argument, count, positive


@dataclass
class AdversarialSettings:
    """Adversarial training, --loss gas."""

    gas_distance: Literal["l2", "l1", "huber"] = argument("l1", "the distillation loss beside the adversarial")
    adversarial_weight: float = argument(1.0, "published: 1, on CIFAR-10 0.1")
    discriminator_model_name_or_path: str | None = argument(
        None, "a folder or Hub id, e.g. the output of `diffusers-gas convert r3gan`"
    )
    discriminator_width: int = argument(128, "channels of a new one")
    discriminator_features: Literal["states", "pixels"] = argument(
        "states", "what it compares: final states, latents in latent pipelines, or decoded images"
    )
    discriminator_size: int | None = argument(None, "pixels that its images are averaged to", type=positive)
    discriminator_learning_rate: float = argument(1e-4, "published: 1e-5; that is the default for a pretrained one")
    discriminator_warmup_steps: int = argument(
        0, "of --max_train_steps, in which only the discriminator learns; for a new one", type=int
    )
    r1_weight: float = argument(0.1)
    r2_weight: float = argument(0.1)
    reuse_fakes: bool = argument(False, "the discriminator learns from the solver's own samples: a rollout less")


@dataclass
class TrainSettings(AdversarialSettings, Recipe, HubSettings, TeacherSettings, PipelineSettings):
    """The run.

    Defaults are those of Gauss-Newton on the squared distance. `method_defaults` has what others need.
    """

    output_dir: str = argument("gas_output")
    num_inference_steps: Sequence[int] = argument(
        (4,), "step counts of the solvers to distill", type=positive, nargs="+"
    )
    optimizer: Literal["gauss_newton", "adam"] = argument("gauss_newton", "gauss_newton; adam for --loss gas")
    loss: Literal["l2", "l1", "huber", "gas"] = argument(
        "l2", "l2 for Gauss-Newton, l1 for Adam; gas adds a discriminator"
    )
    features: Literal["states", "pixels", "lpips"] = argument("states", "what the loss compares")
    lpips_weights: Sequence[str] | None = argument(
        None, "files of VGG's weights and LPIPS's; from the Hub by default", nargs="+"
    )
    lpips_size: int = argument(224, "pixels that images are resized to")
    initialize_from: str | None = argument(
        None, "a scheduler folder or Hub id of GS (solvers) or SDM (time steps) to start from"
    )
    initialization: Literal["gauss_newton", "theory", "published"] = argument(
        "published", "of Adam: published (uniform times, third order); a Gauss-Newton fit for --loss gas"
    )
    detail: bool = argument(
        False,
        "a second phase of Gauss-Newton, in which the absolute error counts, too; it removes the faint grain of l2",
    )
    max_train_evaluations: int | None = argument(
        None,
        "of the network by Gauss-Newton, the teacher's included; with --detail about 18 thousand for 4 steps, 77 for 8",
        type=positive,
    )
    max_train_iterations: int | None = argument(
        None, "of Gauss-Newton; 6 for each step by default, 0 keeps the solver it would start from", type=count
    )
    train_batch_size: int = argument(128, "most samples per pipeline call and process; 128, with Adam 24")
    num_teacher_samples: int = argument(
        1024, "Gauss-Newton takes at most so many, as it needs them; 1400 for Adam, 5000 for gas"
    )
    num_validation_samples: int = argument(32, "held out, to choose the best solver by; 512 for Adam")
    num_compared_samples: int = argument(
        32, "held out, for the table and the picture with Diffusers' schedulers; 0 for none", type=count
    )
    validation_steps: int = argument(500, "of Adam, from one validation to the next")
    validation_prompts: Sequence[str] | None = argument(
        None, "of the pictures; the first held-out samples by default", nargs="+"
    )
    checkpointing_steps: int = argument(500, "of Adam, from one checkpoint to the next")
    checkpoints_total_limit: int | None = argument(None, "all are kept by default", type=positive)
    resume_from_checkpoint: str | None = argument(None, '"latest", or a file')
    allow_tf32: bool = argument(False)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = argument(None, "of the networks; solvers stay in float64")
    report_to: Literal["tensorboard", "wandb", "all"] | None = argument(
        None, "trackers; their files go to {output_dir}/logs"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.num_inference_steps = sorted(set(self.num_inference_steps))
        if self.optimizer == "gauss_newton" and self.loss == "gas":
            raise ValueError("`--loss gas` is not a least-squares problem: it needs `--optimizer adam`.")
        if self.detail and self.optimizer == "gauss_newton" and (self.loss, self.features) != ("l2", "states"):
            raise ValueError(
                "`--detail` is for the squared distance of final states: it needs `--loss l2 --features states`."
            )
        if self.discriminator_size is not None and self.discriminator_features != "pixels":
            raise ValueError("`--discriminator_size` is that of images: it needs `--discriminator_features pixels`.")
        if self.features == "lpips" and self.distance != "l2":
            raise ValueError(f"LPIPS is a squared distance of features: it needs 'l2', not '{self.distance}'.")

    @property
    def distance(self) -> Literal["l2", "l1", "huber"]:
        """The distillation loss, which `--loss gas` has beside the adversarial one."""
        return self.gas_distance if self.loss == "gas" else self.loss

    @property
    def public(self) -> dict[str, Any]:
        """The settings that may be written down."""
        return {name: value for name, value in vars(self).items() if name != "hub_token"}


def method_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Defaults that depend on settings that were given: the published recipes have their own."""
    adversarial = given.get("loss") == "gas"
    distance = "l2" if given.get("features") == "lpips" else "l1"
    defaults: dict[str, Any] = {"gas_distance": distance}
    if given.get("discriminator_model_name_or_path") is not None:
        defaults["discriminator_learning_rate"] = 1e-5
    if given.get("optimizer", "adam" if adversarial else "gauss_newton") == "adam":
        defaults |= {"optimizer": "adam", "loss": distance, "train_batch_size": Recipe().train_batch_size}
        # Published: 1400 samples for GS, 5000 for GAS, whose discriminator overfits sooner.
        defaults["num_teacher_samples"] = 5000 if adversarial else 1400
        defaults["num_validation_samples"] = 512
        defaults["initialization"] = "gauss_newton" if adversarial else "published"
    return defaults
