"""Samples in Diffusers with an exported solver (`GASScheduler.export`), bit by bit as `GASScheduler` does.

This file needs neither diffusers_gas nor anything of Diffusers beyond what makes a class a scheduler. Copy it.

    scheduler = SolverTableScheduler.from_json("solver.json")

In a repository that others load with `trust_remote_code=True`, put this file and the exported one, named `scheduler_config.json`,
into the pipeline's folder `scheduler/`, and `"scheduler": ["scheduling_solver_table", "SolverTableScheduler"]` into
`model_index.json`.
"""

import json

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput


class SolverTableScheduler(SchedulerMixin, ConfigMixin):
    """The arguments are the entries of the exported file."""

    order = 1

    @register_to_config
    def __init__(
        self,
        tables=(),
        version=1,
        schema=None,
        rule=None,
        noise_schedule=None,
        prediction_type=None,
        variance_type=None,
        num_train_timesteps=1000,
        init_noise_sigma=1.0,
        pipeline_settings=None,
    ):
        if version != 1 or not tables:
            raise ValueError(f"Expected an exported solver of version 1 with tables, got version {version}.")
        self.init_noise_sigma = init_noise_sigma
        self.timesteps, self.sigmas, self.num_inference_steps = torch.empty(0), torch.empty(0), None
        self.step_index = self.begin_index = self.repeated_time = self.guidance_scale = None

    @property
    def config(self):
        """The arguments, and beside them the settings by which pipelines compute `mu`."""
        own = super().config
        return FrozenDict({**own, **(own["pipeline_settings"] or {})})

    @classmethod
    def from_json(cls, path):
        with open(path, encoding="utf-8") as file:
            return cls(**json.load(file))

    def set_guidance_scale(self, scale):
        """Chooses the table of the nearest scale, where there are tables for several; to be called before `set_timesteps`."""
        self.guidance_scale = scale

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None):
        """Flow-matching pipelines say by the length of `sigmas` how many steps they want, and by `mu` their shift."""
        n = num_inference_steps if sigmas is None else len(sigmas)
        tables = self.config.tables
        known = [(table["num_inference_steps"], table["mu"]) for table in tables]
        found = [steps == n and (its is None or (mu is not None and abs(its - mu) < 1e-6)) for steps, its in known]
        if self.guidance_scale is not None and sum(found) > 1:
            distances = [abs(table.get("guidance_scale", 1e9) - self.guidance_scale) for table in tables]
            least = min(distance for distance, is_found in zip(distances, found) if is_found)
            found = [is_found and distance == least for distance, is_found in zip(distances, found)]
        if sum(found) != 1:
            advice = f"Export one: `scheduler.export(path, [{n}], mu=[{mu}])`."
            if self.config.pipeline_settings is None:  # a file of an earlier version
                advice = "Pipelines may ask for another mu than the model's own, whose settings this file lacks: export it again."
            if sum(found) > 1:
                advice = "Choose one of several guidance scales with `set_guidance_scale`."
            raise ValueError(
                f"No table, or several, for {n} steps and mu = {mu}. There are (steps, mu) = {known}."
                + ("" if mu is None and sum(found) == 0 else f" {advice}")
            )
        self.table = tables[found.index(True)]
        flow, end = self.config.noise_schedule.endswith("flow_matching"), self.table["end"]
        self.timesteps = torch.tensor([step["timestep"] for step in self.table["steps"]], device=device)
        levels = [(step["evaluation_alpha"], step["evaluation_sigma"]) for step in self.table["steps"]]
        levels.append((end["alpha"], end["sigma"]))
        self.sigmas = torch.tensor([sigma / (1 if flow else alpha) for alpha, sigma in levels])
        if self.config.noise_schedule == "inverted_flow_matching":
            self.sigmas = 1 - self.sigmas
        self.num_inference_steps = n
        self.step_index = self.begin_index = self.repeated_time = None

    def set_begin_index(self, begin_index=0):
        self.begin_index = begin_index

    def next_index(self, timestep):
        if self.step_index is not None:
            return self.step_index - self.repeats_the_start(timestep)
        if self.begin_index is not None:
            return self.begin_index
        return self.index_for_timestep(timestep)

    def index_for_timestep(self, timestep):
        """Second-order steps end and begin at equal times. A start is at the last of these, as in `HeunDiscreteScheduler`."""
        times, time = [step["timestep"] for step in self.table["steps"]], float(timestep)
        return 0 if time == times[0] else len(times) - 1 - times[::-1].index(time)

    def repeats_the_start(self, timestep):
        """Whether a loop began with the first of equal times, and is at the others, whose step it has made already."""
        if self.repeated_time is not None and float(timestep) != self.repeated_time:
            self.repeated_time = None
        return self.repeated_time is not None

    def scale_model_input(self, sample, timestep=None):
        scale = self.table["steps"][self.next_index(timestep)]["input_scale"]
        return sample if scale == 1 else sample * scale

    def step(self, model_output, timestep, sample, generator=None, return_dict=True, **ignored):
        if self.repeats_the_start(timestep):
            return SchedulerOutput(prev_sample=sample) if return_dict else (sample,)
        k = self.next_index(timestep)
        state = sample.to(torch.promote_types(sample.dtype, torch.float32))
        if self.step_index is None:  # the first step, which is step k
            self.terms = [state.clone()]
            equal = k > 0 and self.table["steps"][k - 1]["timestep"] == self.table["steps"][k]["timestep"]
            self.repeated_time = float(timestep) if equal and self.begin_index is None else None
            self.rows = self.table["weights_from"][str(k)] if k else [step["weights"] for step in self.table["steps"]]
        if self.config.variance_type is not None and model_output.shape[1] == 2 * sample.shape[1]:
            model_output = model_output.chunk(2, dim=1)[0]
        self.terms.append(weighted_sum(self.table["steps"][k]["prediction"], [state, model_output]))
        state = weighted_sum(self.rows[len(self.terms) - 2], [state, *self.terms]).to(sample.dtype)
        self.step_index = k + 1
        return SchedulerOutput(prev_sample=state) if return_dict else (state,)

    def add_noise(self, original_samples, noise, timesteps):
        if self.begin_index is not None:
            indices = [self.begin_index if self.step_index is None else self.step_index]
        else:
            indices = [self.index_for_timestep(timestep) for timestep in timesteps]
        levels = [(self.table["steps"][index]["alpha"], self.table["steps"][index]["sigma"]) for index in indices]
        alphas, sigmas = torch.tensor(levels, dtype=original_samples.dtype, device=noise.device).unbind(1)
        shape = (-1,) + (1,) * (noise.ndim - 1)
        return alphas.view(shape) * original_samples + sigmas.view(shape) * noise

    def scale_noise(self, sample, timestep, noise):
        return self.add_noise(sample, noise, timestep)

    def __len__(self):
        return self.config.num_train_timesteps


def weighted_sum(weights, tensors):
    """The sum in the precision of the first tensor, in the order of `GASScheduler`. Weights of 0 are left out."""
    dtype, total = tensors[0].dtype, None
    for weight, tensor in zip(weights, tensors):
        if weight != 0:
            total = weight * tensor.to(dtype) if total is None else total.add_(tensor, alpha=weight)
    return torch.zeros_like(tensors[0]) if total is None else total
