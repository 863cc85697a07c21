"""Pipelines around small random networks, built from the type hints of their constructors.

Sizes are tied by the names of parameters: every text encoder has states of `WIDTH` entries, every autoencoder latents of
`LATENT` channels, and every parameter that names one of these sizes has that value.
"""

import inspect
import typing
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.guiders import BaseGuidance
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoConfig,
    ByT5Tokenizer,
    FeatureExtractionMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    RobertaTokenizer,
    T5Tokenizer,
)
from transformers.image_processing_base import ImageProcessingMixin

from .exceptions import PIPELINES
from .inputs import merged
from .sizes import (
    AUTOENCODER_SIZES,
    CONFIG_SIZES,
    CONFIGS,
    IMAGE_PROCESSORS,
    LONGEST_TEXT,
    MODELS,
    NAMED_TOKENS,
    PROCESSORS,
    SCHEDULERS,
    SIZES,
    SPECIAL_TOKENS,
)


# Components that pipelines do without.
ABSENT = [
    "safety_checker",
    "feature_extractor",
    "image_encoder",
    "watermarker",
    "prompt_enhancer",
    "duration_head",
    "pe",
    "pe_tokenizer",
    "prompt_enhancer_head",
]
# These, too, where `None` is the default.
OPTIONAL = [
    "transformer_2",
    "audio_scheduler",
    "audio_tokenizer",
    "audio_token_detokenizer",
    "sound_tokenizer",
    "processor",
]
FLAGS = {"requires_safety_checker": False, "add_watermarker": False}
# Where a type hint names several classes or none of Diffusers' own.
GENERIC: dict[str, str] = {
    "SchedulerMixin": "FlowMatchEulerDiscreteScheduler",
    "KarrasDiffusionSchedulers": "DDIMScheduler",
    "BaseGuidance": "ClassifierFreeGuidance",
    "AutoTokenizer": "PreTrainedTokenizerFast",
    "PythonBackend": "PreTrainedTokenizerFast",
    "TokenizersBackend": "PreTrainedTokenizerFast",
}
NOT_COMPONENTS = (bool, int, float, str, type(None), typing.Any)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class SilentSafetyChecker(ModelMixin, ConfigMixin):
    """Stands for the guardrail of Cosmos, a package of its own: pipelines ask it, and it has no objections."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))  # pipelines ask where it is

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: np.ndarray) -> np.ndarray:
        return video


def build(pipeline_class: type[DiffusionPipeline]) -> DiffusionPipeline:
    """A pipeline of a class around small random networks, always with the same weights."""
    own = merged(PIPELINES, pipeline_class.__name__)
    hints = typing.get_type_hints(pipeline_class.__init__)
    parameters = dict(list(inspect.signature(pipeline_class.__init__).parameters.items())[1:])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        values = {
            name: _value(name, parameter, hints.get(name), own)
            for name, parameter in parameters.items()
            if name in own or _is_needed(name, parameter, hints.get(name))
        }
        pipe = pipeline_class(**values)
        networks = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
        for network in networks:
            _speak(network.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _is_needed(name: str, parameter: inspect.Parameter, hint: Any) -> bool:
    """Whether a parameter is to be passed: not if it is a setting with a default."""
    if name in FLAGS:
        return True
    has_default = parameter.default is not parameter.empty
    return bool(_classes(hint)) and (not has_default or parameter.default is None)


def _value(name: str, parameter: inspect.Parameter, hint: Any, own: dict[str, Any]) -> Any:
    settings = own.get(name)
    if name in own and not isinstance(settings, dict):
        return settings
    if settings is None and (name in ABSENT or (name in OPTIONAL and parameter.default is None)):
        return None
    return FLAGS[name] if name in FLAGS else component(name, hint, **(settings or {}))


def _classes(hint: Any) -> list[type]:
    """The classes of components that a type hint names."""
    parts = typing.get_args(hint)
    found = [kind for part in parts for kind in _classes(part)] if parts else [hint]
    return [kind for kind in found if inspect.isclass(kind) and kind not in NOT_COMPONENTS]


def component(name: str, hint: Any, **settings: Any) -> Any:
    """A component for a parameter of a pipeline's constructor.

    Raises:
        ValueError: If the type hint does not tell what to build.
    """
    chosen = settings.pop("class", None)
    kinds = _classes(hint) if chosen is None else [_named(chosen)]
    if not kinds:
        raise ValueError(f"The type hint of `{name}` names no class: {hint}.")
    kind = _named(GENERIC[kinds[0].__name__]) if kinds[0].__name__ in GENERIC else kinds[0]
    if issubclass(kind, SchedulerMixin):
        return kind(**(SCHEDULERS.get(kind.__name__, {}) | settings))
    if issubclass(kind, PreTrainedTokenizerBase):
        return tokenizer(kind, is_chosen=chosen is not None)
    if issubclass(kind, ProcessorMixin) or kind is transformers.AutoProcessor:
        return processor(kind)
    if issubclass(kind, ImageProcessingMixin):
        return kind(**IMAGE_PROCESSORS.get(kind.__name__, IMAGE_PROCESSORS["CLIPImageProcessorPil"]))
    if issubclass(kind, FeatureExtractionMixin | BaseGuidance | SilentSafetyChecker):
        return kind(**settings)
    if issubclass(kind, nn.Module):
        return model(kind, **settings)
    raise ValueError(f"There is no rule for `{name}`, of type {kind.__name__}.")


def _named(name: str) -> Any:
    """A class by its name."""
    here: dict[str, Any] = {"SilentSafetyChecker": SilentSafetyChecker, "LDMBertModel": LDMBertModel}
    return here.get(name) or getattr(diffusers, name, None) or getattr(transformers, name)


def model(model_class: type[nn.Module], **settings: Any) -> nn.Module:
    """A small random network of Diffusers or Transformers."""
    settings = MODELS.get(model_class.__name__, {}) | settings
    if issubclass(model_class, PreTrainedModel):
        config_name = settings.pop("config", None)
        config_class = model_class.config_class if config_name is None else getattr(transformers, config_name)
        return model_class(config(config_class, **settings))
    names = inspect.signature(model_class.__init__).parameters
    sizes = AUTOENCODER_SIZES if hasattr(model_class, "decode") else SIZES
    return model_class(**({name: value for name, value in sizes.items() if name in names} | settings))


def config(config_class: type[PreTrainedConfig], **settings: Any) -> PreTrainedConfig:
    """A small config of Transformers, with the configs that are parts of it."""
    names = inspect.signature(config_class.__init__).parameters
    values = {name: value for name, value in CONFIG_SIZES.items() if name in names}
    for name, part in config_class.sub_configs.items():
        kind = type(getattr(config_class(), name)) if part is AutoConfig else part
        if name in names and issubclass(kind, PreTrainedConfig):  # a part may be missing
            values[name] = config(kind, **settings.pop(name, {})).to_dict()
    return config_class(**(values | CONFIGS.get(config_class.__name__, {}) | settings))


def tokenizer(kind: type, is_chosen: bool = False) -> PreTrainedTokenizerBase:
    """A tokenizer whose tokens are bytes, with the special tokens of all models.

    It is of its class only where the pipeline asks for its class: most classes differ in their vocabularies alone.
    """
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    numbered = {token: i for i, token in enumerate(tokens)}
    if kind is ByT5Tokenizer:
        return ByT5Tokenizer(model_max_length=LONGEST_TEXT)
    if is_chosen and kind is T5Tokenizer:
        return T5Tokenizer(vocab=[(token, 0.0) for token in tokens], model_max_length=LONGEST_TEXT)
    if is_chosen and kind is RobertaTokenizer:
        return RobertaTokenizer(vocab=numbered, model_max_length=LONGEST_TEXT)
    padding, begin, end, unknown = SPECIAL_TOKENS[:4]
    backend = Tokenizer(models.BPE(numbered, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", pair=f"{begin} $A $B {end}", special_tokens=[(begin, 1), (end, 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=LONGEST_TEXT,
        pad_token=padding,
        bos_token=begin,
        eos_token=end,
        unk_token=unknown,
        cls_token=begin,
        sep_token=end,
        chat_template=CHAT_TEMPLATE,
        extra_special_tokens=NAMED_TOKENS,
    )


def processor(kind: type) -> ProcessorMixin:
    """A processor of texts and images."""
    # The classes insist on a processor of videos, which needs torchvision.
    lenient = type(kind.__name__, (kind,), {"check_argument_for_proper_class": lambda self, name, part: None})
    parts = {
        name: getattr(transformers, part)(**(IMAGE_PROCESSORS[part] | settings))
        for name, (part, settings) in PROCESSORS[kind.__name__].items()
    }
    return lenient(tokenizer=tokenizer(PreTrainedTokenizerFast), chat_template=CHAT_TEMPLATE, **parts)


def _speak(network: nn.Module) -> None:
    """Gives weights that start at zero random values, so that the network's output depends on all of its inputs."""
    for parameter in network.parameters():
        if parameter.is_floating_point() and parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
