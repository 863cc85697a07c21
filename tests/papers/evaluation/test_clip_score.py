"""CLIP scores with a tiny random CLIP."""

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from diffusers_gas.papers.evaluation.clip_score import CLIPScore


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory) -> str:
    """A folder with a random CLIP whose tokenizer knows single letters."""
    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer({token: i for i, token in enumerate(tokens)}, [], model_max_length=16)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(tokens), "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    CLIPProcessor(CLIPImageProcessor(size=size, crop_size=size), tokenizer).save_pretrained(folder)
    return str(folder)


def test_score_is_the_cosine_of_the_embeddings(tiny_clip):
    score = CLIPScore(tiny_clip)
    images, prompts = torch.rand(6, 3, 16, 16), ["a fox", "a hen", "dogs", "x", "some long words", "b"]
    scores = score(images, prompts)
    assert scores.shape == (6,)
    assert ((scores >= 0) & (scores <= 100)).all() and scores.max() > 0
    inputs = score.processor(
        text=prompts, images=[(image * 255).round().byte() for image in images], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = score.model(**inputs).logits_per_image.diagonal() / score.model.logit_scale.exp()
    torch.testing.assert_close(scores, 100 * logits.clamp(min=0), rtol=1e-4, atol=1e-4)


def test_a_score_does_not_depend_on_the_batch(tiny_clip):
    score = CLIPScore(tiny_clip)
    images, prompts = torch.rand(3, 1, 20, 20), ["a fox", "a b c d e f g", "hen"]
    alone = torch.cat([score(images[i : i + 1], prompts[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(score(images, prompts), alone, rtol=1e-3, atol=1e-3)


def test_long_prompts_are_cut(tiny_clip):
    assert CLIPScore(tiny_clip)(torch.rand(1, 3, 16, 16), ["a " * 100]).isfinite().all()


def test_prompts_must_match(tiny_clip):
    with pytest.raises(ValueError, match="2 images need as many prompts, got 1"):
        CLIPScore(tiny_clip)(torch.rand(2, 3, 16, 16), ["a fox"])
