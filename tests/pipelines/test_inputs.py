"""Which arguments a batch of samples gives to a pipeline, and how they are read from files."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tiny_pipelines import MATRIX, build

from diffusers_gas.commands.arguments import PipelineSettings
from diffusers_gas.pipelines.driving import sample_latents
from diffusers_gas.pipelines.inputs import SampleInputs, check_arguments, load_sample_inputs, whole_numbers


class Pipeline(DiffusionPipeline):
    """Its call has the arguments of many pipelines."""

    def __init__(self):
        pass

    def __call__(
        self,
        prompt=None,
        negative_prompt=None,
        prompt_2=None,
        image=None,
        class_labels=None,
        prompt_embeds=None,
        prompt_attention_mask=None,
        ip_adapter_image_embeds=None,
        guidance_scale=5.0,
        height=None,
        num_inference_steps=50,
        num_images_per_prompt=1,
        generator=None,
        output_type="pil",
    ):
        pass


class FromImage(DiffusionPipeline):
    def __init__(self):
        pass

    def __call__(self, image, num_inference_steps=50, generator=None):
        pass


def arguments(pipe, *args, **kwargs):
    result = SampleInputs.create(0, 3, *args, **kwargs).pipeline_arguments(pipe)
    assert [generator.initial_seed() for generator in result.pop("generator")] == [0, 1, 2]
    return result


def test_what_belongs_together_is_batched_together():
    cycle = [{"prompt": "a"}, {"prompt": "b"}]
    assert arguments(Pipeline(), cycle, negative_prompt="no", prompt_2="more", guidance_scale=2.0, height=64) == {
        "prompt": ["a", "b", "a"],
        "negative_prompt": ["no"] * 3,
        "prompt_2": ["more"] * 3,
        "guidance_scale": 2.0,
        "height": 64,
    }


def test_one_prompt_of_many_samples_is_repeated():
    assert arguments(Pipeline(), prompt="a") == {"prompt": ["a"] * 3}
    assert arguments(Pipeline(), class_labels=[4]) == {"class_labels": [4, 4, 4]}
    assert arguments(Pipeline(), class_labels=4) == {"class_labels": [4, 4, 4]}
    one = SampleInputs.create(0, 1, class_labels=4).pipeline_arguments(Pipeline())
    assert one["class_labels"] == [4], "the rest of a batch may be one sample"
    assert arguments(Pipeline(), prompt=["a", "b", "c"]) == {"prompt": ["a", "b", "c"]}


def test_embeddings_are_repeated_with_their_masks():
    rows, mask = torch.randn(1, 4, 2), torch.ones(1, 4)
    result = arguments(Pipeline(), prompt_embeds=rows, prompt_attention_mask=mask, ip_adapter_image_embeds=[rows])
    assert torch.equal(result["prompt_embeds"], rows.expand(3, 4, 2))
    assert torch.equal(result["prompt_attention_mask"], mask.expand(3, 4))
    assert result["ip_adapter_image_embeds"] == [rows], "one for each adapter, not for each sample"
    # Some pipelines take a list with the embeddings of every prompt.
    assert len(arguments(Pipeline(), prompt_embeds=[rows[0]])["prompt_embeds"]) == 3


def test_images_of_samples_are_batched():
    arrays = [np.full((1, 2, 2, 3), i, dtype=np.float32) for i in range(3)]
    batch = arguments(Pipeline(), [{"image": array, "prompt": "a"} for array in arrays])["image"]
    assert batch.shape == (3, 2, 2, 3) and batch[:, 0, 0, 0].tolist() == [0, 1, 2]
    picture = Image.new("RGB", (2, 2))
    assert arguments(FromImage(), image=picture) == {"image": [picture] * 3}


PICTURES = [Image.new("L", (1, 1), i) for i in range(2)]


@pytest.mark.parametrize(
    "lists",
    [
        {"prompt": ["a", "b"], "negative_prompt": ["x", "y"]},
        {"prompt": ("a", "b"), "image": PICTURES},
        {"image": PICTURES},
        {"image": np.arange(2.0).reshape(2, 1, 1, 1)},
        {"class_labels": [3, 4]},
        {"class_labels": torch.tensor([3, 4])},
        {"prompt_embeds": torch.arange(8.0).view(2, 2, 2), "prompt_attention_mask": torch.eye(2)},
        {"prompt_embeds": [torch.zeros(1), torch.ones(1)]},
    ],
    ids=lambda lists: " ".join(f"{name} {type(value).__name__}" for name, value in lists.items()),
)
def test_samples_take_the_entries_of_lists_in_turn(lists):
    """In batches as one by one, and never fewer samples than entries."""
    together = arguments(Pipeline(), **lists)
    for i in range(3):
        alone = SampleInputs.create(0, 3, **lists)[i : i + 1].pipeline_arguments(Pipeline())
        for name, entries in lists.items():
            # Some pipelines take a lone prompt as a text only.
            own = alone[name] if isinstance(alone[name], str) else alone[name][0]
            assert np.array_equal(together[name][i], entries[i % 2]) and np.array_equal(own, entries[i % 2])
    assert len(SampleInputs.of_call(Pipeline(), None, 1, lists)) == 2


@pytest.mark.parametrize(
    "scales", [[np.float32(2), np.float32(4)], np.array([2.0, 4.0]), torch.tensor([2.0, 4.0]), (2, 4)]
)
def test_numbers_of_any_kind_are_those_of_python(scales):
    """A record must go into a file, after a fit."""
    cycle = [{"image_guidance_scale": np.float32(1.5)}]
    inputs = SampleInputs.create(
        0, 4, cycle, guidance_scale=scales, true_cfg_scale=torch.tensor(3.0), class_labels=np.int64(5)
    )
    assert inputs.guidance_range() == ("guidance_scale", [2, 4])
    assert inputs.value("class_labels") == 5 and type(inputs.value("class_labels")) is int
    by_hand = SampleInputs(np.arange(2), [{"guidance_scale": np.float32(2)}, {"guidance_scale": np.float32(4)}], {})
    assert [generator.initial_seed() for generator in by_hand.pipeline_arguments(Pipeline())["generator"]] == [0, 1]
    for some in (inputs, by_hand):
        assert json.loads(json.dumps(some.record(Pipeline())))["guidance_scale"] == [2, 4]
    assert inputs.record(Pipeline())["true_cfg_scale"] == 3.0


def test_lists_that_are_no_samples_stay_whole():
    images = [Image.new("L", (1, 1))] * 2
    assert arguments(Pipeline(), prompt="a", image=images)["image"] == images, "several images of one sample"
    picture = torch.zeros(3, 2, 2)
    assert arguments(FromImage(), image=picture)["image"] is picture
    rows = [torch.zeros(1, 2), torch.ones(1, 2)]
    assert arguments(Pipeline(), prompt="a", ip_adapter_image_embeds=rows)["ip_adapter_image_embeds"] == rows
    for uneven in ({"negative_prompt": ["x"] * 3}, {"negative_prompt": []}):
        with pytest.raises(ValueError, match=r"the same length, got .*'prompt': 2, 'negative_prompt'"):
            SampleInputs.create(0, 4, prompt=["a", "b"], **uneven)


@pytest.mark.parametrize(
    "values, expected",
    [
        (4, [4]),
        (np.int64(4), [4]),
        (torch.tensor([4]), [4]),
        (torch.tensor(4), [4]),
        (np.array([6, 4]), [4, 6]),
        (range(4, 6), [4, 5]),
    ],
)
def test_numbers_of_steps_may_be_of_any_integer_type(values, expected):
    found = whole_numbers("num_inference_steps", values)
    assert found == expected and all(type(number) is int for number in found)


@pytest.mark.parametrize("values", [4.0, "4", None, [], [0, 4], np.float64(4), torch.tensor([4.0]), [[4]]])
def test_other_numbers_of_steps_are_refused(values):
    with pytest.raises(ValueError, match=r"`num_inference_steps` must be .* whole number"):
        whole_numbers("num_inference_steps", values)


@pytest.mark.parametrize(
    ("seeds", "per_sample"),
    [(range(8), [{}]), (range(2), [{}] * 3), (range(2), [{"prompt": "a"}, {"prompt": "b", "negative_prompt": "no"}])],
)
def test_every_seed_needs_the_same_arguments(seeds, per_sample):
    with pytest.raises(ValueError, match=f"a mapping for each of the {len(seeds)} seeds, all of the same names"):
        SampleInputs(seeds, per_sample, {})
    with pytest.raises(TypeError):
        SampleInputs([0.5], [{}], {}).pipeline_arguments(Pipeline())


@pytest.mark.parametrize("own", [{}, {"prompt": "a"}, {"prompt_embeds": torch.zeros(1, 4, 2)}])
def test_a_sample_is_not_judged_by_itself(own):
    same = SampleInputs([3, 4, 3], [own] * 3, {})
    with pytest.raises(ValueError, match="a sample twice"):
        SampleInputs.of_call(Pipeline(), same, 3, {})
    other = SampleInputs([3, 3], [{"prompt": "a"}, {"prompt": "b"}], {})
    assert SampleInputs.of_call(Pipeline(), other, 2, {}) is other


def test_arguments_of_samples_replace_those_of_all():
    inputs = SampleInputs.create(0, 2, [{"prompt": "a"}, {"prompt": "b"}], prompt="c", negative_prompt="no")
    assert inputs.record(Pipeline()) == {"guidance_scale": 5.0, "negative_prompt": "no"}


def test_a_pipeline_without_anything_to_repeat_is_told_the_number():
    assert arguments(Pipeline()) == {"num_images_per_prompt": 3}


def test_a_lone_prompt_stays_a_text():
    """Some pipelines take no lists."""
    result = SampleInputs.create(0, 1, [{"prompt": "a"}], negative_prompt="no").pipeline_arguments(Pipeline())
    assert (result["prompt"], result["negative_prompt"]) == ("a", "no")


def test_samples_of_other_sizes_go_into_other_calls():
    sizes = [(2, 2), (4, 2), (2, 2)]
    inputs = SampleInputs.create(0, 3, [{"image": Image.new("RGB", size)} for size in sizes])
    assert list(inputs.map_calls(8, list)) == [[0, 2], [1]]


def test_samples_with_other_numbers_and_mappings_go_into_other_calls():
    strengths = [
        {"cross_attention_kwargs": {"scale": scale}, "height": height} for scale in (0, 1) for height in (8, 16)
    ]
    inputs = SampleInputs.create(0, 8, strengths, prompt="a fox")
    calls = [inputs[found].pipeline_arguments(build("stable-diffusion").pipe) for found in inputs.map_calls(8, list)]
    assert [(call["cross_attention_kwargs"], call["height"]) for call in calls] == [
        ({"scale": scale}, height) for scale in (0, 1) for height in (8, 16)
    ]
    assert [call["prompt"] for call in calls] == [["a fox"] * 2] * 4
    orders = [{"guidance_scale": 3.0, "eta": 1.0}, {"eta": 3.0, "guidance_scale": 1.0}]
    masks = [
        {"cross_attention_kwargs": {"mask": torch.ones(2000).index_fill(0, torch.tensor(i), 0)}} for i in (900, 901)
    ]
    for cycle in (orders, masks):
        assert list(SampleInputs.create(0, 2, cycle).map_calls(8, list)) == [[0], [1]]


@pytest.mark.parametrize("name", MATRIX)
def test_many_samples_of_one_prompt_are_the_same_in_any_batch(name):
    """In every pipeline, whatever its argument for the number of samples is called or overwritten with."""
    tiny = build(name)
    inputs = SampleInputs.create(5, 3, **tiny.inputs(1))

    def final(samples: SampleInputs) -> torch.Tensor:
        _, states = sample_latents(tiny.pipe, tiny.pipe.scheduler, 4, **samples.pipeline_arguments(tiny.pipe))
        return states[: len(samples)]

    together = final(inputs)
    assert len(together) == 3
    for i in range(3):
        alone = final(inputs[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-3, atol=1e-3)


# Files


def read(tmp_path, name: str, content: bytes) -> list:
    path = tmp_path / name
    path.write_bytes(content)
    return load_sample_inputs(Pipeline(), str(path), {})


@pytest.mark.parametrize(
    "name, content, prompts",
    [
        ("notepad.txt", b"\xef\xbb\xbfa fox\r\n\r\nan owl\r\n", ["a fox", "an owl"]),
        ("separator.txt", "a fox\u2028in the snow\x0b\n".encode(), ["a fox\u2028in the snow\x0b"]),
        ("mark.jsonl", b'\xef\xbb\xbf{"prompt": "a fox"}\r\n', ["a fox"]),
        ("separator.jsonl", json.dumps({"prompt": "a\u2028fox"}, ensure_ascii=False).encode(), ["a\u2028fox"]),
        ("UPPER.JSONL", b'{"prompt": "a fox"}\n', ["a fox"]),
        ("last.txt", b"a fox", ["a fox"]),
    ],
)
def test_text_is_text(tmp_path, name, content, prompts):
    assert read(tmp_path, name, content) == [{"prompt": prompt} for prompt in prompts]


@pytest.mark.parametrize("name", ["p.csv", "p.json", "p.yaml", "p.jsonl.gz"])
def test_prompts_in_other_kinds_of_files_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be a .txt file"):
        read(tmp_path, name, b'["a fox"]')


def test_what_a_file_and_the_command_line_both_have_is_refused(tmp_path):
    """Else one of them would be ignored. What lies beside a model is for want of others."""
    (tmp_path / "own.jsonl").write_text('{"prompt": "a", "guidance_scale": 2.0}')
    (tmp_path / "pipeline_arguments.json").write_text('{"guidance_scale": 7.5}')
    settings = {"pretrained_model_name_or_path": str(tmp_path), "prompts_file": str(tmp_path / "own.jsonl")}
    inputs = PipelineSettings(**settings).sample_inputs(Pipeline(), 0, 1)
    assert (inputs.common, inputs.value("guidance_scale")) == ({}, 2.0)
    for given in ({"guidance_scale": [5.0]}, {"pipeline_arguments": '{"prompt": "b"}'}):
        with pytest.raises(ValueError, match=r"own.jsonl has .*, and so has the command line"):
            PipelineSettings(**settings, **given).sample_inputs(Pipeline(), 0, 1)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_other_encodings_are_refused_by_name(tmp_path, encoding):
    with pytest.raises(ValueError, match=r"some\.txt is not UTF-8 text"):
        read(tmp_path, "some.txt", "a fuchs \u00fc\n".encode(encoding))


def test_images_are_read_from_beside_the_file(tmp_path):
    Image.new("RGB", (3, 2), "red").save(tmp_path / "red.png")
    (entry,) = read(tmp_path, "some.jsonl", b'{"image": "red.png", "prompt": "a fox"}')
    assert entry["image"].size == (3, 2) and entry["image"].getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(ValueError, match=r"some\.jsonl, line 2: .*blue\.png"):
        read(tmp_path, "some.jsonl", b'\n{"image": "blue.png", "prompt": "a fox"}')


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "guidance_scales",
            "Pipeline has no argument `guidance_scales`. Did you mean `guidance_scale`\\? It has class_labels",
        ),
        ("output_type", "`output_type` cannot be a pipeline argument here"),
        ("num_inference_steps", "`num_inference_steps` cannot be a pipeline argument here"),
        ("num_images_per_prompt", "`num_images_per_prompt` cannot be a pipeline argument here"),
    ],
)
def test_arguments_are_checked_before_work_begins(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        check_arguments(Pipeline(), ["prompt", name])
    with pytest.raises(ValueError, match=message):
        load_sample_inputs(Pipeline(), None, {"prompt": "a", name: 1})
    with pytest.raises(ValueError, match=f"line 1: {message}"):
        read(tmp_path, "some.jsonl", json.dumps({"prompt": "a", name: 1}).encode())


class Ignoring(DiffusionPipeline):
    """As some of Diffusers do, it ignores what it does not know."""

    def __init__(self):
        pass

    def __call__(self, prompt, guidance_scale=5.0, num_inference_steps=50, generator=None, batch_size=1, **kwargs):
        pass


class Wrapping(Ignoring):
    def __call__(self, *args, seed=None, **kwargs):
        return super().__call__(*args, **kwargs)


@pytest.mark.parametrize("pipeline_class", [Ignoring, Wrapping])
def test_misspelled_arguments_are_refused_where_a_pipeline_ignores_them(pipeline_class):
    pipe = pipeline_class()
    with pytest.raises(ValueError, match=r"has no argument `guidance`\. Did you mean `guidance_scale`\?"):
        check_arguments(pipe, ["guidance"])
    check_arguments(pipe, ["prompt", "guidance_scale", *["seed"] * (pipeline_class is Wrapping)])
    with pytest.raises(ValueError, match="no argument `guidance`"):
        SampleInputs.of_call(pipe, SampleInputs.create(0, 2, prompt="a", guidance=4), 1, {})
