"""What schedulers read of the call of the pipeline that runs them: the right call, whatever is around it, and nothing else."""

import functools
import gc
import threading
import weakref

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler

from diffusers_gas import GASScheduler
from diffusers_gas.schedulers.scheduling_utils import PipelineCall, pipeline_call


LEVELS = [1.0, 0.6, 0.3]


class Recorder(GASScheduler):
    """Reads the running call where schedulers do."""

    call: PipelineCall | None = None

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        self.call = pipeline_call(self)


class Pipe(DiffusionPipeline):
    def __init__(self, scheduler):
        super().__init__()
        self.register_modules(scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, prompt=None, num_inference_steps=4, sigmas=None, guidance_scale=3.0, callback=None):
        sigmas = None  # what a pipeline makes of its arguments does not count
        return callback() if callback else self.scheduler.set_timesteps(num_inference_steps, sigmas=sigmas)


class InferenceMode(Pipe):
    __call__ = torch.inference_mode()(Pipe.__call__.__wrapped__)


class OtherCall(Pipe):
    @torch.no_grad()
    def __call__(self, levels, guidance=1.0):
        super().__call__(sigmas=levels, guidance_scale=guidance)


class Undecorated(Pipe):
    def __call__(self, levels):
        super().__call__(sigmas=levels, guidance_scale=5.0)


class AnyArguments(Pipe):
    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        self.scheduler.set_timesteps(4)


def with_other_arguments(function):
    @functools.wraps(function)
    def call(self, levels, *rest, scale=5.0):
        return function(self, None, 4, levels, scale)

    return call


class DecoratedOutside(Pipe):
    __call__ = with_other_arguments(Pipe.__call__)


class DecoratedInside(Pipe):
    __call__ = torch.no_grad()(with_other_arguments(Pipe.__call__))


class HelperWithoutGradients(Pipe):
    @torch.no_grad()
    def __call__(self, sigmas, guidance_scale=5.0):
        self.prepare(4)

    @torch.no_grad()
    def prepare(self, sigmas):
        self.scheduler.set_timesteps(4)


class Outer(Pipe):
    """Has two pipelines' schedulers; its own argument is for the other part."""

    def __init__(self, scheduler, other):
        DiffusionPipeline.__init__(self)
        self.register_modules(scheduler=scheduler, other=other)

    @torch.no_grad()
    def __call__(self, sigmas):
        Pipe(self.scheduler)(sigmas=LEVELS, guidance_scale=5.0)


def in_a_thread(pipe):
    thread = threading.Thread(target=pipe, kwargs={"sigmas": LEVELS, "guidance_scale": 5.0})
    thread.start()
    thread.join()


@pytest.mark.parametrize(
    "pipeline_class, run",
    [
        (Pipe, lambda pipe: pipe(sigmas=LEVELS, guidance_scale=5.0)),
        (Pipe, lambda pipe: pipe(None, 4, LEVELS, 5.0)),
        (Pipe, lambda pipe: functools.partial(pipe, sigmas=LEVELS)(guidance_scale=5.0)),
        (Pipe, in_a_thread),
        (Pipe, lambda pipe: Pipe(DDPMScheduler())(callback=lambda: pipe(sigmas=LEVELS, guidance_scale=5.0))),
        (InferenceMode, lambda pipe: pipe(sigmas=LEVELS, guidance_scale=5.0)),
        (OtherCall, lambda pipe: pipe(LEVELS, 5.0)),
        (Undecorated, lambda pipe: pipe(LEVELS)),
        (AnyArguments, lambda pipe: pipe("prompt", sigmas=LEVELS, guidance_scale=5.0)),
        (DecoratedOutside, lambda pipe: pipe(LEVELS)),
        (DecoratedInside, lambda pipe: pipe(LEVELS)),
        (HelperWithoutGradients, lambda pipe: pipe(LEVELS)),
        (functools.partial(Outer, other=DDPMScheduler()), lambda pipe: pipe([1.0, 0.1])),
    ],
)
def test_the_call_that_runs_the_scheduler_is_read(pipeline_class, run):
    scheduler = Recorder()
    run(pipeline_class(scheduler))
    call = scheduler.call
    assert call.pipe.scheduler is scheduler
    assert call.arguments["sigmas"] == LEVELS and (call.defaults | call.arguments)["guidance_scale"] == 5.0


def test_arguments_that_were_not_passed_have_defaults():
    scheduler = Recorder()
    Pipe(scheduler)("prompt", sigmas=None)
    assert scheduler.call.arguments.keys() == {"self", "prompt"}
    assert scheduler.call.defaults == {"num_inference_steps": 4, "guidance_scale": 3.0, "callback": None}


def test_a_call_of_a_pipeline_that_has_another_scheduler_is_not_read():
    scheduler, pipe = Recorder(), Pipe(DDPMScheduler())
    pipe(sigmas=LEVELS, callback=lambda: scheduler.set_timesteps(4))
    assert scheduler.call is None
    type("NoDecorator", (Pipe,), {"__call__": Pipe.__call__.__wrapped__})(scheduler)(sigmas=LEVELS)
    assert scheduler.call is None


@pytest.mark.parametrize("scheduler_class", [DPMSolverMultistepScheduler, GASScheduler])
def test_what_a_pipeline_deletes_is_freed(scheduler_class):
    class Deleting(Pipe):
        @torch.no_grad()
        def __call__(self, guidance_scale=3.0):
            embedding = torch.zeros(10)
            reference = weakref.ref(embedding)
            self.scheduler.set_timesteps(4)
            del embedding
            gc.collect()
            return reference()

    scheduler = scheduler_class()
    if scheduler_class is GASScheduler:
        scheduler.add_solver(scheduler.theory_solver(4))
        scheduler.solvers[4].provenance = {"pipeline_arguments": {"guidance_scale": 3.0}}
    assert Deleting(scheduler)() is None


def test_a_subclass_with_another_call_samples(digits):
    class Mine(type(digits)):
        @torch.no_grad()
        def __call__(self, number, steps=4):
            return super().__call__(batch_size=number, num_inference_steps=steps, output_type="np")

    mine = Mine(digits.unet, GASScheduler.from_config(digits.scheduler.config))
    mine.set_progress_bar_config(disable=True)
    assert mine(3).images.shape[0] == 3
