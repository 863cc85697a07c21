"""Teacher samples: made once, the same in every batch, never another's."""

import copy
import importlib.util
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from conftest import TEACHER
from diffusers import (
    AutoPipelineForText2Image,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
)
from diffusers.hooks import apply_group_offloading
from PIL import Image
from tiny_pipelines import build

from diffusers_gas import GASScheduler, SDMScheduler, calibrate, distill
from diffusers_gas.commands import train
from diffusers_gas.comparison import training_free_schedulers
from diffusers_gas.pipelines import teacher
from diffusers_gas.pipelines.driving import scheduler_config
from diffusers_gas.pipelines.inputs import SampleInputs, load_sample_inputs
from diffusers_gas.pipelines.named_schedulers import load_scheduler
from diffusers_gas.pipelines.teacher import (
    CHECKED_STEPS,
    LAZY_SHARD_SIZE,
    SHARD_SIZE,
    LazyTeacherSamples,
    TeacherCache,
    TeacherSamples,
    check_driven,
    check_noise,
    check_teacher,
    default_teacher,
    fingerprint,
    fingerprint_of_pipeline,
    fingerprint_of_scheduler,
)


@pytest.fixture
def cache(tmp_path, digits):
    return TeacherCache(tmp_path, "digits", DDIMScheduler.from_config(digits.scheduler.config), 3)


@pytest.fixture
def network_calls(digits):
    calls = []
    handle = digits.unet.register_forward_hook(lambda *_: calls.append(1))
    yield calls
    handle.remove()


def test_samples_do_not_depend_on_the_batch_size(cache, tmp_path, digits):
    inputs = SampleInputs.create(7, 5)
    one_batch = cache.collect(digits, inputs, 5, "")
    for file in tmp_path.iterdir():
        file.unlink()
    small_batches = cache.collect(digits, inputs, 2, "")
    assert torch.equal(one_batch.noise, small_batches.noise)
    torch.testing.assert_close(one_batch.final, small_batches.final, rtol=0, atol=1e-4)


def test_noise_is_that_of_the_seed(cache, digits):
    samples = cache.collect(digits, SampleInputs.create(3, 2), 2, "")
    expected = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    assert torch.equal(samples.noise[1:], expected)


def test_an_interrupted_collection_goes_on_where_it_was(cache, digits, network_calls):
    inputs = SampleInputs.create(0, 2 * SHARD_SIZE)

    def interrupt(*_):
        if len(network_calls) > 3:
            raise KeyboardInterrupt

    handle = digits.unet.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.collect(digits, inputs, SHARD_SIZE, "")
    handle.remove()
    network_calls.clear()
    cache.collect(digits, inputs, SHARD_SIZE, "")
    assert len(network_calls) == 3  # the second shard only
    network_calls.clear()
    assert len(cache.collect(digits, inputs, SHARD_SIZE, "")) == 2 * SHARD_SIZE
    assert not network_calls


def test_more_samples_keep_the_ones_there_are(cache, digits, network_calls):
    cache.collect(digits, SampleInputs.create(0, SHARD_SIZE), SHARD_SIZE, "")
    network_calls.clear()
    cache.collect(digits, SampleInputs.create(0, SHARD_SIZE + 1), SHARD_SIZE, "")
    assert len(network_calls) == 3


def test_damaged_and_foreign_files_are_named(cache, tmp_path, digits):
    inputs = SampleInputs.create(0, 2)
    expected = cache.collect(digits, inputs, 2, "")
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    for content, message in ((whole[:100], "is not a readable"), (whole[:-1] + b"x", "is damaged")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{file.name} {message}"):
            cache.collect(digits, inputs, 2, "")
    file.unlink()
    assert torch.equal(cache.collect(digits, inputs, 2, "").final, expected.final)


def test_processes_make_shards_in_turn(cache, tmp_path, digits, network_calls):
    """The first of two makes the first of two shards; the second finds it, and both have all samples."""
    inputs = SampleInputs.create(0, SHARD_SIZE + 2)
    first = SimpleNamespace(process_index=0, num_processes=2, device="cpu")
    with pytest.raises(ValueError, match="is missing: processes on several machines need one output folder"):
        cache.collect(digits, inputs, SHARD_SIZE, "", first)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    second = SimpleNamespace(process_index=1, num_processes=2, device="cpu")
    shared = cache.collect(digits, inputs, SHARD_SIZE, "", second)
    assert len(network_calls) == 6
    alone = cache.collect(digits, inputs, SHARD_SIZE, "")
    assert torch.equal(shared.final, alone.final)
    assert len(network_calls) == 6


def test_guidance_scales_take_turns():
    prompts = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]
    rows = SampleInputs.create(0, 9, prompts, guidance_scale=[1.0, 2.0, 3.0]).per_sample
    assert [row["guidance_scale"] for row in rows[:3]] == [1.0, 2.0, 3.0]
    assert len({(row["prompt"], row["guidance_scale"]) for row in rows}) == 9
    inputs = SampleInputs.create(0, 5, prompts[:2], guidance_scale=[1.0, 2.0])
    assert list(inputs.map_calls(2, lambda positions: positions)) == [[0, 3], [4], [1, 2]]
    lists = SampleInputs.create(0, 4, prompt=["a", "b"], guidance_scale=(1.0, 2.0)).per_sample
    assert [(row["prompt"], row["guidance_scale"]) for row in lists] == [
        ("a", 1.0),
        ("b", 2.0),
        ("a", 2.0),
        ("b", 1.0),
    ]


def test_another_teacher_does_not_get_these_samples(cache, tmp_path, digits, network_calls):
    inputs = SampleInputs.create(0, 2)
    cache.collect(digits, inputs, 2, "")
    network_calls.clear()
    TeacherCache(tmp_path, "digits", cache.scheduler, 4).collect(digits, inputs, 2, "")
    assert len(network_calls) == 4


def test_inputs_are_taken_in_turn():
    inputs = SampleInputs.create(0, 3, [{"prompt": "a fox"}, {"prompt": "a hen"}], guidance_scale=3.0)
    assert [sample["prompt"] for sample in inputs.per_sample] == ["a fox", "a hen", "a fox"]
    assert inputs[1:].common == {"guidance_scale": 3.0}
    assert list(inputs[1:].seeds) == [1, 2]


class TestInputFiles:
    class TextPipeline:
        def __call__(self, prompt=None, guidance_scale=7.5, prompt_embeds=None):
            raise NotImplementedError

    class ClassPipeline:
        def __call__(self, class_labels, guidance_scale=4.0):
            raise NotImplementedError

    def test_prompts(self, tmp_path):
        path = tmp_path / "prompts.txt"
        path.write_text("a fox\n\na hen\n")
        assert load_sample_inputs(self.TextPipeline(), str(path), {}) == [{"prompt": "a fox"}, {"prompt": "a hen"}]

    def test_arguments(self, tmp_path):
        path = tmp_path / "classes.jsonl"
        path.write_text('{"class_labels": 1}\n{"class_labels": 2}\n')
        assert load_sample_inputs(self.ClassPipeline(), str(path), {})[1] == {"class_labels": 2}

    def test_unconditional(self, digits):
        assert load_sample_inputs(digits, None, {}) == [{}]

    def test_missing_prompts(self):
        with pytest.raises(ValueError, match=r"TextPipeline needs \['prompt'\]: pass `--prompts_file`"):
            load_sample_inputs(self.TextPipeline(), None, {})
        assert load_sample_inputs(self.TextPipeline(), None, {"prompt": "a fox"}) == [{}]

    def test_missing_arguments(self):
        with pytest.raises(ValueError, match=r"needs \['class_labels'\]"):
            load_sample_inputs(self.ClassPipeline(), None, {})

    @pytest.mark.parametrize(
        "content, message",
        [
            ("", "is empty"),
            ("{", "line 1: .* JSON object"),
            ('{"class_labels": 1}\n{"clas_labels": 1}', "line 2"),
            ("3", "line 1"),
        ],
    )
    def test_malformed(self, tmp_path, content, message):
        path = tmp_path / "bad.jsonl"
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_sample_inputs(self.ClassPipeline(), str(path), {})


class TestFingerprints:
    """Samples are told apart by the content of what they are made of."""

    rng = np.random.default_rng(0)
    values = (
        rng.random((2, 100, 100)),
        torch.from_numpy(rng.random((2, 100, 100))),
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)),
        {"image": Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)), "scale": 0.5},
        [torch.ones(3), None, "text"],
    )

    @pytest.mark.parametrize("value", values, ids=lambda value: type(value).__name__)
    def test_equal_values_have_equal_fingerprints(self, value):
        assert fingerprint(value) == fingerprint(copy.deepcopy(value))

    def test_other_values_have_other_fingerprints(self):
        array = self.rng.random((3, 100, 100), dtype=np.float32)
        changed = array.copy()
        changed[1, 50, 50] += 1  # what `str` leaves out
        picture = Image.fromarray(np.zeros((20, 20, 3), dtype=np.uint8))
        values = [array, changed, array[:, :, ::-1].copy(), array.astype(np.float64), array.reshape(100, 300)]
        values += [torch.from_numpy(array), torch.from_numpy(changed), torch.from_numpy(array).bfloat16()]
        values += [picture, picture.convert("L"), picture.resize((10, 40)), array.tolist(), {"a": array}, {"b": array}]
        assert len({fingerprint(value) for value in values}) == len(values)

    def test_a_value_of_unknown_content_is_refused(self):
        with pytest.raises(ValueError, match="of type SimpleNamespace cannot be compared"):
            fingerprint(SimpleNamespace(secret=1))

    def test_other_weights_of_the_same_name_make_other_samples(self, cache, digits, network_calls):
        inputs = SampleInputs.create(0, 2)
        first = cache.collect(digits, inputs, 2, "").final
        network_calls.clear()
        other = copy.deepcopy(digits)
        with torch.no_grad():
            for parameter in other.unet.parameters():
                parameter.mul_(1.01)
        assert not torch.equal(cache.collect(other, inputs, 2, "").final, first)
        cache.collect(digits, inputs, 2, "")

    def test_a_teacher_that_has_learned_something_else_makes_other_samples(self, digits, tmp_path):
        inputs, finals = SampleInputs.create(0, 2), []
        scheduler = GASScheduler.from_config(digits.scheduler.config)
        for t_start in (1.0, 0.8):
            variant = GASScheduler.from_config(scheduler.config, t_start=t_start)
            scheduler.add_solver(variant.theory_solver(3))
            finals.append(TeacherCache(tmp_path, "digits", scheduler, 3).collect(digits, inputs, 2, "").final)
        assert not torch.equal(*finals)


def change_one_entry(pipe):
    with torch.no_grad():
        next(pipe.unet.parameters()).flatten()[7] += 1e-3


CHANGES = {
    "one entry of a weight": change_one_entry,
    "another VAE": lambda pipe: setattr(pipe, "vae", type(pipe.vae).from_config(pipe.vae.config)),
    "a setting of the VAE": lambda pipe: pipe.vae.register_to_config(scaling_factor=0.5),
    "a setting of the text encoder": lambda pipe: setattr(pipe.text_encoder.config, "eos_token_id", 5),
    "a setting of the pipeline": lambda pipe: pipe.register_to_config(requires_safety_checker=True),
    "FreeU": lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    "another precision": lambda pipe: pipe.to(torch.bfloat16),
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_changes_the_samples_changes_the_fingerprint(name):
    pipe = DiffusionPipeline.from_pretrained(TEACHER.parent / "text-to-digits")
    before = fingerprint_of_pipeline(pipe)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    assert fingerprint_of_pipeline(pipe) == before, "others choose the scheduler"
    CHANGES[name](pipe)
    assert fingerprint_of_pipeline(pipe) != before


def test_an_interpolated_plan_of_a_teacher_depends_on_those_it_has():
    scheduler = SDMScheduler()
    found = []
    for n in (22, 23, 24):
        scheduler.add_plan(scheduler.plan_for(n))
        found.append(fingerprint_of_scheduler(scheduler, 24))
    scheduler.add_plan(scheduler.plan_for(25))
    assert len(set(found)) == 3 and fingerprint_of_scheduler(scheduler, 24) == found[-1]


class Copying(DDPMPipeline):
    """Loops over a copy of the scheduler's times."""

    @torch.no_grad()
    def __call__(self, batch_size=1, generator=None, num_inference_steps=50):
        state = torch.stack([torch.randn(1, 8, 8, generator=g) for g in generator])
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps.tolist():
            state = self.scheduler.step(self.unet(state, t).sample, t, state).prev_sample


class Drawing(DDPMPipeline):
    """Goes by the number of steps, and draws from PyTorch's own generator."""

    @torch.no_grad()
    def __call__(self, batch_size=1, generator=None, num_inference_steps=50):
        state, drawn = torch.stack([torch.randn(1, 8, 8, generator=g) for g in generator]), torch.randn(1, 8, 8)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            state = self.scheduler.step(self.unet(state + drawn / num_inference_steps, t).sample, t, state).prev_sample


def test_a_pipeline_that_goes_by_the_number_of_all_steps_can_be_driven(digits):
    pipe, before = Drawing(unet=digits.unet, scheduler=digits.scheduler), torch.get_rng_state()
    scheduler = GASScheduler.from_config(digits.scheduler.config)
    check_driven(pipe, scheduler, scheduler.theory_solver(CHECKED_STEPS), SampleInputs.create(0, 1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("fit", [distill, calibrate])
def test_pipelines_that_are_another_model_when_they_are_driven_are_refused_before_a_fit(fit, digits):
    with_control = build("stable-diffusion-controlnet")
    arguments = with_control.inputs(1)
    scheduler = GASScheduler.from_config(with_control.pipe.scheduler.config)
    theory = scheduler.theory_solver(CHECKED_STEPS)
    check_driven(with_control.pipe, scheduler, theory, SampleInputs.create(0, 1, **arguments))
    copying = Copying(unet=digits.unet, scheduler=digits.scheduler)
    for pipe, some in ((copying, {}), (with_control.pipe, {**arguments, "control_guidance_end": 0.9})):
        with pytest.raises(ValueError, match=f"{type(pipe).__name__} can be neither calibrated nor"):
            fit(pipe, 4, inputs=SampleInputs.create(0, 4, **some))


def test_what_holds_beside_a_pipelines_config_changes_the_fingerprint():
    with_pag = AutoPipelineForText2Image.from_pipe(build("stable-diffusion").pipe, enable_pag=True)
    animated = build("animatediff").pipe
    found = [fingerprint_of_pipeline(with_pag)]
    with_pag.set_pag_applied_layers(["down"])
    found += [fingerprint_of_pipeline(with_pag), fingerprint_of_pipeline(animated)]
    for noise_type in ("random", "repeat_context"):
        animated.enable_free_noise(context_length=2, context_stride=1, noise_type=noise_type)
        found.append(fingerprint_of_pipeline(animated))
    with torch.autocast("cpu", torch.bfloat16):
        found.append(fingerprint_of_pipeline(animated))
    assert len(set(found)) == len(found)


OFFLOADED = {
    "sequential": lambda network, folder: cpu_offload(network, "cpu", offload_buffers=True),
    "sequential, on disk": lambda network, folder: disk_offload(network, str(folder), "cpu"),
    "groups": lambda network, folder: apply_group_offloading(network, **GROUPS),
    "groups, on disk": lambda network, folder: apply_group_offloading(
        network, **GROUPS, offload_to_disk_path=str(folder)
    ),
}
GROUPS = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu"), "offload_type": "leaf_level"}


@pytest.mark.parametrize("name", OFFLOADED)
def test_offloaded_weights_are_the_same_weights(name, digits, tmp_path):
    """Before a sampling and after it, in the fingerprint of the plain pipeline."""
    found = []
    for scale, folder in ((1, "a"), (2, "b")):
        pipe = copy.deepcopy(digits)
        with torch.no_grad():
            pipe.unet.mid_block.resnets[0].conv1.weight.mul_(scale)
        found.append(fingerprint_of_pipeline(pipe))
        OFFLOADED[name](pipe.unet, tmp_path / folder)
        for _ in range(2):
            assert fingerprint_of_pipeline(pipe) == found[-1]
            pipe(num_inference_steps=1, output_type="np")
    assert found[0] != found[1]


def test_weights_that_are_nowhere_are_no_weights(digits):
    pipe = copy.deepcopy(digits)
    pipe.unet.to("meta")
    with pytest.raises(ValueError, match=r"conv_in\.weight of UNet2DModel is on the meta device"):
        fingerprint_of_pipeline(pipe)


def test_a_pipeline_of_another_class_does_not_get_these_samples(cache, digits, network_calls):
    """Classes for the same weights differ in the arguments that they take for granted, such as guidance."""

    class OtherPipeline(type(digits)):
        pass

    inputs = SampleInputs.create(0, 2)
    cache.collect(digits, inputs, 2, "")
    network_calls.clear()
    cache.collect(OtherPipeline(**digits.components), inputs, 2, "")
    assert network_calls
    network_calls.clear()
    cache.collect(digits, inputs, 2, "")
    assert not network_calls


def test_images_with_equal_indices_and_other_colours_are_other_images():
    image = Image.new("P", (2, 2))
    image.putpalette([255, 0, 0])
    other = image.copy()
    other.putpalette([0, 0, 255])
    assert fingerprint(image) == fingerprint(image.copy()) != fingerprint(other)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_images_of_many_levels_differ_in_all_of_them(dtype):
    """Depth maps: eight bits cannot hold their levels."""
    images = [Image.fromarray(np.full((2, 2), level, dtype)) for level in (0.25, 1000, 2000, 2000.5)]
    assert len(set(map(fingerprint, images))) == len({image.tobytes() for image in images})


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="adapters need the package peft")
def test_adapters_at_another_strength_are_another_model():
    from peft import LoraConfig

    pipe = build("stable-diffusion").pipe
    plain = fingerprint_of_pipeline(pipe)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"]), "style")
    found = [plain, fingerprint_of_pipeline(pipe)]
    pipe.set_adapters(["style"], [0.5])
    found.append(fingerprint_of_pipeline(pipe))
    pipe.disable_lora()
    found.append(fingerprint_of_pipeline(pipe))
    assert len(set(found)) == 4
    assert fingerprint_of_pipeline(pipe) == found[-1]
    pipe.delete_adapters(["style"])
    pipe.unload_lora_weights()
    assert fingerprint_of_pipeline(pipe) == plain
    assert fingerprint_of_pipeline(build("stable-diffusion").pipe) == plain, "no address of an object"


@pytest.mark.parametrize("name", ["stable-diffusion", "wan", "mochi", "stable-audio", "cogvideox", "ddpm"])
def test_a_teacher_follows_the_noise_of_the_pipeline(name, tmp_path):
    """Whatever its class is. One that tells the network other times than those of its states teaches something else."""
    pipe = build(name).pipe
    for same in (default_teacher(pipe), pipe.scheduler):
        check_noise(pipe, same)
    classes = (EDMDPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, EulerDiscreteScheduler)
    others = [scheduler_class() for scheduler_class in classes]
    if "prediction_type" in pipe.scheduler.config:
        others.append(DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="sample"))
    own = {"wan": 1, "ddpm": 2}.get(name)  # the class's defaults are the pipeline's settings
    for i, other in enumerate(others):
        with nullcontext() if i == own else pytest.raises(ValueError, match="another noise schedule or prediction"):
            check_noise(pipe, other)


def test_teachers_and_rivals_have_what_the_pipelines_scheduler_has_by_default():
    """Of every class of Diffusers: Heun's and KDPM2's betas are others than those of the classes that sample in their place."""
    checked = 0
    for kind in (getattr(diffusers, name) for name in dir(diffusers)):
        if not isinstance(kind, type) or SchedulerMixin not in kind.__mro__[1:] or hasattr(kind, "_backends"):
            continue
        try:
            config = scheduler_config(SimpleNamespace(scheduler=(own := kind())))
            ours = GASScheduler.from_config(config)
        except (TypeError, ValueError):  # arguments without defaults, and refused classes
            continue
        if hasattr(own, "alphas_cumprod"):
            others = {"teacher": default_teacher(SimpleNamespace(scheduler=own)), **training_free_schedulers(config)}
            for name, other in {"ours": ours, **others}.items():
                expected, found = (torch.as_tensor(one.alphas_cumprod)[:-1].double() for one in (own, other))
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=0, msg=f"{name} for {kind.__name__}")
            checked += 1
    assert checked >= 18


def test_a_teacher_of_another_noise_schedule_is_refused_everywhere(digits, tmp_path):
    other = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    other.save_pretrained(tmp_path)
    for use in (
        lambda: distill(digits, 3, teacher=other),
        lambda: calibrate(digits, 4, teacher=other),
        lambda: load_scheduler(str(tmp_path), digits),
    ):
        with pytest.raises(ValueError, match="another noise schedule"):
            use()


RANDOM = [
    DDPMScheduler(),
    DDPMScheduler(variance_type="learned_range"),
    DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    EulerAncestralDiscreteScheduler(),
    FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    FlowMatchEulerDiscreteScheduler(stochastic_sampling=True, use_dynamic_shifting=True),
    KDPM2AncestralDiscreteScheduler(),
    LCMScheduler(),
]


@pytest.mark.parametrize("random", RANDOM, ids=lambda random: type(random).__name__)
def test_a_teacher_that_adds_noise_is_refused(random, digits, monkeypatch):
    monkeypatch.setattr(teacher, "check_noise", lambda *arguments: None)  # they are for several networks
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"{type(random).__name__} adds noise in its steps"):
        check_teacher(digits, random)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", training_free_schedulers(DDPMScheduler().config))
def test_other_teachers_are_not(name, digits):
    check_teacher(digits, training_free_schedulers(digits.scheduler.config)[name])


def test_a_random_teacher_is_refused_before_a_fit_or_a_search(digits, tmp_path):
    random = EulerAncestralDiscreteScheduler.from_config(digits.scheduler.config)
    command = ["--pretrained_model_name_or_path", str(TEACHER), "--output_dir", str(tmp_path)]
    for use in (
        lambda: distill(digits, 3, teacher=random),
        lambda: calibrate(digits, 4, teacher=random),
        lambda: train.main([*command, "--teacher_scheduler", "EulerAncestralDiscreteScheduler"]),
    ):
        with pytest.raises(ValueError, match="adds noise in its steps"):
            use()


@pytest.mark.parametrize("world", range(1, 10))
def test_processes_make_further_samples_together(cache, monkeypatch, world):
    """Each of them waits for the others wherever samples are made; 16 a file cannot be shared equally by 3, 5, 6, 7 or 9."""
    made = []

    def collect(self, pipe, inputs, *others):
        made.append(len(inputs))
        return TeacherSamples(inputs, *torch.tensor(inputs.seeds).expand(2, -1))

    monkeypatch.setattr(TeacherCache, "collect", collect)
    inputs, cache = SampleInputs.create(0, 100), replace(cache, shard_size=LAZY_SHARD_SIZE)
    processes = [SimpleNamespace(process_index=rank, num_processes=world) for rank in range(world)]
    shares = [LazyTeacherSamples(cache, None, inputs, 1, "", process) for process in processes]
    for number in range(1, len(shares[0]) + 1):
        assert all(len(samples[:number]) == number for samples in shares)
        assert len(made) in (0, world)
        made.clear()
    assert sorted(seed for samples in shares for seed in samples[:].inputs.seeds) == list(range(100 // world * world))


def test_all_processes_hear_of_one_that_cannot_sample(cache, digits, monkeypatch):
    """They would wait for it for ever if it went on without its samples, as it does where these are for a table only."""
    failed = []
    monkeypatch.setattr(teacher, "reduce", lambda tensor, _: failed.append(tensor) or torch.tensor(1.0))
    process = SimpleNamespace(process_index=0, num_processes=2, device="cpu")
    with pytest.raises(RuntimeError, match="failed in another process"):
        cache.collect(digits, SampleInputs.create(0, 1), 1, "", process)
    with monkeypatch.context() as without_network, pytest.raises(AttributeError):
        without_network.setattr(digits, "unet", None)
        cache.collect(digits, SampleInputs.create(1, 1), 1, "", process)
    assert failed == [0, 1]
    # The file of the first sample is there, and damaged where this process reads it.
    monkeypatch.setattr(teacher, "reduce", lambda tensor, _: failed.append(tensor) or tensor)
    monkeypatch.setattr(teacher, "load_safetensors", lambda path: ({}, {}))
    with pytest.raises(ValueError, match="does not hold 1 teacher samples"):
        cache.collect(digits, SampleInputs.create(0, 1), 1, "", process)
    assert failed[2:] == [0, 1]
