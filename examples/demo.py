"""A page to try solvers on: the same noise under the teacher, the best of Diffusers, and learned solvers.

    python examples/demo.py
    python examples/demo.py --pretrained_model_name_or_path some/model --solvers you/some-model-gas --prompts "a fox" "an old lighthouse"
    python examples/demo.py --write_space my-space && hf upload you/my-space my-space --repo-type space

Gradio and matplotlib come with `pip install -e ".[demo]"`. The page needs no internet and reports nothing to anybody.
`--write_space` writes a folder to push as a Hugging Face Space, and starts nothing. Models and solvers in folders are copied into it.
"""

import argparse
import copy
import functools
import inspect
import logging
import math
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from huggingface_hub import SpaceCard, SpaceCardData
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from torch import Tensor

from diffusers_gas import GASScheduler, GuidedSolver, SampleInputs
from diffusers_gas.comparison import Row, compare, training_free_schedulers
from diffusers_gas.pipelines.driving import scheduler_config
from diffusers_gas.pipelines.inputs import EVALUATION_SEED, load_sample_inputs
from diffusers_gas.pipelines.sampling import sample_with_states
from diffusers_gas.pipelines.teacher import TeacherCache, default_teacher
from diffusers_gas.presentation.figures import draw_solvers


HERE = Path(__file__).resolve().parent
MODEL = HERE / "teachers" / "text-to-emoji"
SOLVERS = [path for name in ("gs", "gas") if (path := HERE / "solvers" / MODEL.name / name).is_dir()]
PROMPTS = [
    "red apple",
    "cat face with tears of joy",
    "police car",
    "penguin",
    "sunflower",
    "slice of pizza",
]
ACCELERATOR = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
PROJECT = metadata("diffusers-gas")["Home-page"]

TEACHER_STEPS = 50
# Diffusers' schedulers are compared on so many samples.
NUM_COMPARED, BATCH_SIZE = 12, 12
# The page's first seed is neither one of these nor one that solvers are distilled from.
FIRST_SEED, LARGEST_SEED = 2 * EVALUATION_SEED, 2**63 - 1
LARGEST_GUIDANCE = 30.0
# The page begins with so many evaluations, or the nearest number that all solvers have.
FIRST_STEP_COUNT = 4
# Seconds between looks at the pictures that were shown, and after which they are deleted.
CLEANUP = 3600, 3600
# Smaller pictures are magnified pixel by pixel.
SMALLEST_PICTURE = 512

THEME = gr.themes.Default(primary_hue="blue")
STYLE = """
.message { padding: 0.6em 1em; border-left: 4px solid #999; background: #8882; }
.message.bad { border-color: #c22; background: #c221; }
.message .message { padding: 0; border: 0; background: none; }
"""


@dataclass(frozen=True)
class Sample:
    """A sample on the page.

    Attributes:
        scheduler: Name of the scheduler.
        evaluations: Network evaluations.
        seconds: Time of sampling and decoding.
        picture: The picture.
        state (`Tensor` of shape `(1, ...)`): The final state.
        distance: Mean squared distance of the final state to the teacher's.
    """

    scheduler: str
    evaluations: int
    seconds: float
    picture: Image.Image
    state: Tensor
    distance: float | None

    def caption(self) -> str:
        lines = [self.scheduler, f"**{self.evaluations} evaluations**, {self.seconds:.2f} s"]
        if self.distance is not None:
            lines.append(f"distance to the teacher **{self.distance:.2g}**")
        return "<br>".join(lines)


class Comparison:
    """A model under its teacher, Diffusers' schedulers and learned solvers.

    Args:
        pipe: The pipeline.
        solvers: Schedulers with learned solvers, by name. Arguments of the pipeline's call are those that the first was distilled
            with, but for prompts.
        prompts: For the samples on which Diffusers' schedulers are compared.

    Raises:
        ValueError: If the pipeline needs more than a prompt and these arguments.
    """

    def __init__(self, pipe: DiffusionPipeline, solvers: Mapping[str, GASScheduler], prompts: Sequence[str]):
        self.pipe, self.solvers, self.teacher = pipe, solvers, default_teacher(pipe)
        self.rivals = training_free_schedulers(scheduler_config(pipe))
        self.step_counts = sorted({n for scheduler in solvers.values() for n in scheduler.solvers})
        in_all = set(self.step_counts).intersection(*(scheduler.solvers for scheduler in solvers.values()))
        self.first_step_count = min(in_all or self.step_counts, key=lambda n: abs(n - FIRST_STEP_COUNT))
        parameters = inspect.signature(type(pipe).__call__).parameters
        self.takes_prompt = "prompt" in parameters
        self.cycle: list[dict[str, Any]] = [{"prompt": text} for text in prompts] if self.takes_prompt else [{}]
        first = next(iter(next(iter(solvers.values())).solvers.values()))
        recorded = {k: v for k, v in first.provenance.get("pipeline_arguments", {}).items() if k != "prompt"}
        self.common = {name: value[0] if isinstance(value, list) else value for name, value in recorded.items()}
        load_sample_inputs(pipe, None, self.common | self.cycle[0])
        guidance = self.common.pop("guidance_scale", None)
        if isinstance(first, GuidedSolver) and first.argument == "guidance_scale":
            guidance = first.usual_scale
        elif guidance is None and "guidance_scale" in parameters:
            guidance = parameters["guidance_scale"].default
        self.guidance = float(guidance) if isinstance(guidance, int | float) else None
        self._folder = tempfile.TemporaryDirectory()
        self._cache = TeacherCache(self._folder.name, str(pipe.name_or_path), self.teacher, TEACHER_STEPS)
        self._rows: dict[tuple[int, float | None], list[Row]] = {}

    def request(
        self, prompt: str, seed: str, evaluations: str, guidance: float | None
    ) -> tuple[SampleInputs, int, float | None]:
        """What a user asks for: the sample, the network evaluations and the guidance scale, if the pipeline takes one.

        Raises:
            ValueError: If the input is bad.
        """
        prompt = prompt.strip()
        if self.takes_prompt and not prompt:
            raise ValueError(f"The prompt is empty. Say what to draw, for example “{self.cycle[0]['prompt']}”.")
        number = whole_number("The seed", seed)
        if not 0 <= number <= LARGEST_SEED:
            raise ValueError(f"The seed must be from 0 to {LARGEST_SEED}, got {number}.")
        n = whole_number("The number of network evaluations", evaluations)
        if n not in self.step_counts:
            have = "; ".join(f"{name}: {listed(scheduler)}" for name, scheduler in self.solvers.items())
            raise ValueError(f"There is no solver for {n} network evaluations. Choose another number ({have}).")
        if self.guidance is None:
            guidance = None
        elif guidance is None or not 0 <= guidance <= LARGEST_GUIDANCE:
            raise ValueError(f"The guidance scale must be a number from 0 to {LARGEST_GUIDANCE:g}, got {guidance}.")
        cycle = [{"prompt": prompt}] if self.takes_prompt else [{}]
        return self._inputs(number, 1, cycle, guidance), n, guidance

    def samples(self, inputs: SampleInputs, n: int, guidance: float | None) -> Iterator[Sample | str]:
        """Samples of the teacher, of the best of Diffusers and of the solvers, or why there is none."""
        taught = self._sample(type(self.teacher).__name__, self.teacher, TEACHER_STEPS, inputs)
        yield taught
        rows = self.compared(n, guidance)
        if rows:
            yield self._sample(rows[0].scheduler, self.rivals[rows[0].scheduler], n, inputs, taught)
        else:
            yield f"None of Diffusers' few-step schedulers samples {type(self.pipe).__name__}."
        for scheduler in self.solvers.values():
            if n in scheduler.solvers:
                # A copy warns again of what a scheduler warns of once.
                yield self._sample(type(scheduler).__name__, copy.deepcopy(scheduler), n, inputs, taught)
            else:
                yield f"Distilled for {listed(scheduler)} evaluations only."

    def compared(self, n: int, guidance: float | None) -> list[Row]:
        """Diffusers' schedulers with their spacings, the closest to the teacher first. They are compared once."""
        if (n, guidance) not in self._rows:
            inputs = self._inputs(EVALUATION_SEED, NUM_COMPARED, self.cycle, guidance)
            reference = self._cache.collect(self.pipe, inputs, BATCH_SIZE, "Samples of the teacher")
            self._rows[n, guidance] = compare(self.pipe, self.rivals, [n], reference, BATCH_SIZE)
        return self._rows[n, guidance]

    def _inputs(
        self, seed: int, num_samples: int, cycle: Sequence[Mapping[str, Any]], guidance: float | None
    ) -> SampleInputs:
        scale = {} if guidance is None else {"guidance_scale": guidance}
        return SampleInputs.create(seed, num_samples, cycle, **self.common, **scale)

    def _sample(
        self, name: str, scheduler: SchedulerMixin, n: int, inputs: SampleInputs, teacher: Sample | None = None
    ) -> Sample:
        start = time.perf_counter()
        (image,), state = sample_with_states(self.pipe, scheduler, n, inputs, batch_size=1)
        seconds = time.perf_counter() - start
        pixels = (image.nan_to_num(0) * 255).byte().movedim(0, -1).squeeze(-1).numpy()
        picture = Image.fromarray(pixels)
        times = math.ceil(SMALLEST_PICTURE / max(picture.size))
        picture = picture.resize((times * picture.width, times * picture.height), Image.Resampling.NEAREST)
        distance = None if teacher is None else (state - teacher.state).square().mean().item()
        return Sample(name, n, seconds, picture, state, distance)

    def verdict(self, shown: Mapping[str, Sample | str], n: int, guidance: float | None) -> str:
        """What the samples of the rival and the solvers say, and what they do not say."""
        _, best, *ours = shown.values()
        if isinstance(best, str) or not best.distance:
            return ""
        ratios = [
            f"{sample.distance / best.distance:.2g} for {name}"
            for name, sample in zip(self.solvers, ours)
            if isinstance(sample, Sample) and sample.distance is not None
        ]
        num_rivals = len(self.compared(n, guidance))
        return (
            f"With {n} network evaluations instead of the teacher's {TEACHER_STEPS}, the distance to the teacher, relative to that "
            f"of the best of Diffusers, is **{' and '.join(ratios)}**. The best is {best.scheduler}, the closest of {num_rivals} of "
            f"Diffusers' schedulers and spacings on {NUM_COMPARED} other samples. The distance is the mean squared difference of "
            "the final states.\n\n"
            f"One sample measures nothing. [RESULTS.md]({PROJECT}/blob/main/RESULTS.md) has hundreds, with errors."
        )


def whole_number(what: str, text: str | None) -> int:
    """The number in a text; a `ValueError` that names what it should be."""
    try:
        return int(text or "")
    except ValueError:
        raise ValueError(f"{what} must be a whole number, got “{text or ''}”.") from None


def listed(scheduler: GASScheduler) -> str:
    """The step counts of a scheduler's solvers."""
    return ", ".join(map(str, sorted(scheduler.solvers)))


def table_picture(scheduler: GASScheduler, n: int) -> Image.Image:
    """Times and coefficients of a solver beside those of DPM-Solver++."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "solver.png"
        draw_solvers(scheduler, [n], path)
        with Image.open(path) as picture:
            return picture.convert("RGB")


@contextmanager
def warnings_of_the_package() -> Iterator[list[str]]:
    """Inside, what this package warns of is listed, too: nobody sees the terminal from a page."""
    texts: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())
    logger = logging.getLogger("diffusers_gas")
    logger.addHandler(handler)
    try:
        yield texts
    finally:
        logger.removeHandler(handler)


def make_page(comparison: Comparison, model_name: str) -> gr.Blocks:
    """The page. Gradio samples for one visitor at a time, so that nobody changes the pipeline's scheduler meanwhile."""
    names = ["Teacher", "Best of Diffusers", *comparison.solvers]
    table_of = functools.cache(lambda name, n: table_picture(comparison.solvers[name], n))
    with gr.Blocks(title="diffusers_gas", analytics_enabled=False, delete_cache=CLEANUP) as page:
        gr.Markdown(
            f"# {model_name}: a few network evaluations instead of {TEACHER_STEPS}\n"
            f"All pictures start from the same noise. GS and GAS are solvers that were distilled from the teacher by "
            f"[diffusers_gas]({PROJECT})."
        )
        with gr.Row():
            first = str(comparison.cycle[0].get("prompt", ""))
            prompt = gr.Textbox(
                first, label="Prompt", elem_id="prompt", scale=4, visible=comparison.takes_prompt, max_lines=3
            )
            seed = gr.Textbox(str(FIRST_SEED), label="Seed", elem_id="seed", min_width=110, max_lines=1)
            counts = list(map(str, comparison.step_counts))
            evaluations = gr.Dropdown(
                counts,
                value=str(comparison.first_step_count),
                label="Network evaluations",
                elem_id="evaluations",
                allow_custom_value=True,
            )
            guidance = gr.Slider(
                0,
                LARGEST_GUIDANCE,
                value=comparison.guidance,
                label="Guidance scale",
                elem_id="guidance",
                visible=comparison.guidance is not None,
                step=0.5,
            )
        if comparison.takes_prompt:
            gr.Examples([[example["prompt"]] for example in comparison.cycle], prompt, label="Prompts to try")
        button = gr.Button("Sample", variant="primary", elem_id="sample")
        message = gr.Markdown(visible=False, elem_id="message")
        pictures, captions = {}, {}
        with gr.Row():
            for i, name in enumerate(names):
                with gr.Column(min_width=200):
                    gr.Markdown(f"### {name}")
                    pictures[name] = gr.Image(
                        format="png", show_label=False, interactive=False, buttons=["download"], elem_id=f"picture-{i}"
                    )
                    captions[name] = gr.Markdown(elem_id=f"caption-{i}")
        verdict = gr.Markdown(elem_id="verdict", min_height=90)
        tables = {
            name: gr.Image(
                format="png",
                label=f"The times and coefficients of {name}",
                interactive=False,
                buttons=["download", "fullscreen"],
                visible=False,
                elem_id=f"table-{i}",
            )
            for i, name in enumerate(comparison.solvers)
        }
        progress = gr.Progress(track_tqdm=True)

        def said(text: str, kind: str = "") -> Any:
            return gr.Markdown(text, visible=bool(text), elem_classes=["message", kind])

        def sample(
            prompt: str, seed: str, evaluations: str, guidance: float | None, progress: gr.Progress = progress
        ) -> Iterator[dict[Any, Any]]:
            empty: dict[Any, Any] = {message: said(""), verdict: ""}
            empty |= dict.fromkeys((*pictures.values(), *captions.values()))
            empty |= {table: gr.Image(None, visible=False) for table in tables.values()}
            try:
                inputs, n, scale = comparison.request(prompt, seed, evaluations, guidance)
            except ValueError as error:
                yield empty | {message: said(f"**Nothing was sampled.** {error}", "bad")}
                return
            yield empty
            shown: dict[str, Sample | str] = {}
            try:
                with warnings_of_the_package() as warnings:
                    for name, found in zip(names, comparison.samples(inputs, n, scale)):
                        shown[name] = found
                        if isinstance(found, str):
                            yield {captions[name]: found}
                        else:
                            yield {pictures[name]: found.picture, captions[name]: found.caption()}
                notes = "\n\n".join(dict.fromkeys(warnings))
                yield {verdict: comparison.verdict(shown, n, scale), message: said(notes)}
                for name, scheduler in comparison.solvers.items():
                    if n in scheduler.solvers:
                        yield {tables[name]: gr.Image(table_of(name, n), visible=True)}
            except Exception as error:  # whatever a model makes of what it is asked
                traceback.print_exc()
                yield {message: said(f"**Sampling failed.** {type(error).__name__}: {error}", "bad")}

        outputs = [message, verdict, *pictures.values(), *captions.values(), *tables.values()]
        gr.on(
            [page.load, button.click, prompt.submit, seed.submit, guidance.release],
            sample,
            [prompt, seed, evaluations, guidance],
            outputs,
            show_progress_on=[verdict],
        )
    return page


def load_solvers(model: str, paths: Sequence[str]) -> dict[str, GASScheduler]:
    """The solvers of folders or Hub repositories by names, GS or GAS. A solver that does not fit the model is a `ValueError`."""
    solvers: dict[str, GASScheduler] = {}
    for path in paths:
        scheduler = GASScheduler.from_pretrained(model, subfolder="scheduler", solver=path)
        is_gas = any(solver.provenance.get("loss") == "gas" for solver in scheduler.solvers.values())
        name = "GAS" if is_gas else "GS"
        solvers[f"{name} ({path})" if name in solvers else name] = scheduler
    return solvers


def write_space(folder: Path, model: str, solvers: Sequence[str], prompts: Sequence[str]) -> None:
    """Writes a Hugging Face Space: this file with an `app.py` that starts it, a README with the Space's settings, requirements.

    Args:
        folder: A new or empty folder.
        model, solvers: Folders, which are copied, or Hub repositories.
        prompts: As for the page.

    Raises:
        ValueError: If the folder is not empty, or a model or solver is neither a folder nor the name of a repository.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"`--write_space {folder}` must be a new or empty folder.")
    for path in [model, *solvers]:
        if not Path(path).is_dir():
            validate_repo_id(path)
    folder.mkdir(parents=True, exist_ok=True)

    def argument(path: str, copy: Path) -> str:
        if not Path(path).is_dir():
            return repr(path)
        shutil.copytree(path, folder / copy)
        return f"str(HERE / {copy.as_posix()!r})"

    words = [
        "'--pretrained_model_name_or_path'",
        argument(model, Path("model") / Path(model).resolve().name),
        "'--solvers'",
    ]
    words += [argument(path, Path("solvers") / str(i)) for i, path in enumerate(solvers)]
    words += map(repr, ("--prompts", *prompts))
    shutil.copyfile(__file__, folder / "demo.py")
    app = ["from pathlib import Path", "", "from demo import main", "", "", "HERE = Path(__file__).resolve().parent"]
    (folder / "app.py").write_text(
        "\n".join([*app, "main([", *(f"    {word}," for word in words), "])", ""]), encoding="utf-8"
    )
    (folder / "requirements.txt").write_text(f"diffusers-gas[demo] @ git+{PROJECT}\n", encoding="utf-8")
    repositories = [path for path in (model, *solvers) if not Path(path).is_dir()]
    data = SpaceCardData(
        title="diffusers_gas",
        sdk="gradio",
        sdk_version=gr.__version__,
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        app_file="app.py",
        license="apache-2.0",
        models=repositories or None,
        tags=["diffusers", "diffusers-gas"],
        short_description="One noise under few-step diffusion solvers",
    )
    text = (
        f"# {Path(model).resolve().name} in a few network evaluations\n\nThe same noise under a teacher with {TEACHER_STEPS} steps, under the "
        f"best of Diffusers' schedulers, and under solvers that were distilled by [diffusers_gas]({PROJECT})."
    )
    SpaceCard(f"---\n{data}\n---\n\n{text}\n").save(folder / "README.md")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("--pretrained_model_name_or_path", default=str(MODEL), help="a folder or a Hub repository")
    add("--solvers", nargs="+", default=list(map(str, SOLVERS)), help="folders or Hub repositories")
    add("--prompts", nargs="+", default=PROMPTS, help="to try, and to find the best of Diffusers' schedulers with")
    add("--device", default=ACCELERATOR)
    add("--write_space", type=Path, metavar="FOLDER", help="write a Hugging Face Space instead of starting the page")
    args = parser.parse_args(arguments)
    model = args.pretrained_model_name_or_path
    if args.write_space is not None:
        write_space(args.write_space, model, args.solvers, args.prompts)
        print(f"Space: {args.write_space}")
        return
    solvers = load_solvers(model, args.solvers)
    dtype = torch.float32 if str(args.device) == "cpu" else torch.float16
    pipe = DiffusionPipeline.from_pretrained(model, dtype=dtype).to(args.device)
    page = make_page(Comparison(pipe, solvers, args.prompts), Path(model).resolve().name)
    page.launch(share=False, theme=THEME, css=STYLE, footer_links=[], run_history=False, show_error=True)


if __name__ == "__main__":
    main()
