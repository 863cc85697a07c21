"""An exported table as a sampler function of ComfyUI.

ComfyUI's states are data + sigma * noise, and its models return denoised estimates. For flow matching both packages agree on the
states. Elsewhere ours are alpha times ComfyUI's.
"""

import logging
import math

import torch


logger = logging.getLogger(__name__)


class SolverTable:
    """One table of a file of `GASScheduler.export`; see the `rule` in the file.

    Attributes:
        table: The entry of `tables`.
        kind: The kind of noise schedule.
        scale: The guidance scale that the table is for, `None` if the solver is not one for a range.
        levels: SIGMAS for the MODEL.
    """

    def __init__(self, table, kind, model_sampling):
        self.table, self.kind, self.scale = table, kind, table.get("guidance_scale")
        self.flow = kind.endswith("flow_matching")
        self.num_steps = table["num_inference_steps"]
        self.levels = self._levels_for(model_sampling)

    @classmethod
    def of(cls, content, steps, shift, name, model_sampling):
        """The tables of an exported file for a number of steps and for a MODEL's shift (`None` without flow matching).

        There is one, or one for each of several guidance scales.
        """
        if not isinstance(content, dict) or content.get("schema") != "diffusers_gas/solver_table":
            raise ValueError(f"Load GAS solver: {name} is not a file of `diffusers-gas export`.")
        if content["version"] != 1:
            raise ValueError(f"Load GAS solver: {name} is of version {content['version']}. This node reads version 1.")
        kind, tables = content["noise_schedule"], content["tables"]
        if kind.endswith("flow_matching") != (shift is not None):
            other = "is of another kind" if shift is None else "is a flow-matching model"
            raise ValueError(f"Load GAS solver: {name} is for {kind.replace('_', ' ')}, but this MODEL {other}.")
        of_steps = [table for table in tables if table["num_inference_steps"] == steps]
        if not of_steps:
            known = sorted({table["num_inference_steps"] for table in tables})
            raise ValueError(f"Load GAS solver: {name} has no solver for {steps} steps, but for {known}.")
        found = [table for table in of_steps if shift is None or math.isclose(table["shift"], shift, rel_tol=1e-3)]
        if not found:
            shifts = [round(table["shift"], 4) for table in of_steps]
            raise ValueError(
                f"Load GAS solver: {name} has tables for the shifts {shifts}, but this MODEL has {shift:.4f}. Change the "
                f"MODEL's shift, or export another table: `diffusers-gas export ... --shifts {shift:.4f}`, or for shifts that "
                f"depend on the resolution `--mu {math.log(shift):.6f}`."
            )
        of_scales = {table.get("guidance_scale"): table for table in reversed(found)}
        return [cls(table, kind, model_sampling) for table in of_scales.values()]

    def _levels_for(self, model_sampling):
        """ComfyUI's noise levels of all states."""
        largest = float(model_sampling.sigma_max)
        levels = [self._level(step["alpha"], step["sigma"]) for step in self.table["steps"]]
        if self.kind == "variance_preserving":
            self._check_times(model_sampling)
        if self.kind != "variance_exploding":
            # ComfyUI scales the noise as that of a whole sampling only from the model's largest level on.
            levels[0] = max(levels[0], largest)
        # It divides flow-matching results by 1 - the last level. Our last state is the result as it is.
        return [*levels, 0.0]

    def _check_times(self, model_sampling):
        """Refuses a MODEL that has other noise levels at the times that the network is to be told."""
        times = [min(step["timestep"], len(model_sampling.sigmas) - 2.0) for step in self.table["steps"]]
        theirs = model_sampling.sigma(torch.tensor(times)).tolist()
        for step, time, sigma in zip(self.table["steps"], times, theirs):
            ours = self._level(step["evaluation_alpha"], step["evaluation_sigma"])
            if time == step["timestep"] and not math.isclose(ours, sigma, rel_tol=0.05):
                raise ValueError(
                    f"Load GAS solver: at time {time:.1f} the solver's network has sigma = {ours:.4g}, but this MODEL {sigma:.4g}: "
                    "the solver is for another noise schedule."
                )

    def sample(self, model, x, sigmas, begin, extra_args, callback):
        """The steps from `begin` on, as many as SIGMAS ask for."""
        steps, end = self.table["steps"], begin + len(sigmas) - 1
        rows = [step["weights"] for step in steps] if begin == 0 else self.table["weights_from"].get(str(begin), [])
        told = [self._level(step["evaluation_alpha"], step["evaluation_sigma"]) for step in steps[begin:end]]
        told = torch.tensor([*told, float(sigmas[-1])], dtype=sigmas.dtype, device=sigmas.device)
        extra_args = _telling(extra_args, told)
        state = x * (1 / math.hypot(self.levels[0], 1) if begin == 0 and self._scaled else self._scale(steps[begin]))
        known, ones = [state], x.new_ones(len(x))
        for i, step in enumerate(steps[begin:end]):
            given = state / step["evaluation_alpha"] if self._scaled else state
            denoised = model(given, told[i] * ones, **extra_args)
            known.append(_weighted_sum(step["denoised"], [state, denoised]))
            if callback is not None:
                callback({"x": given, "i": i, "sigma": sigmas[i], "sigma_hat": told[i], "denoised": denoised})
            state = _weighted_sum(rows[i], [state, *known])
        if end < self.num_steps:
            return state / self._scale(steps[end])
        return _keep_unmasked(model, state, told[-2] * ones, extra_args)

    @property
    def _scaled(self):
        """Whether ComfyUI's states are ours divided by alpha."""
        return not self.flow and self.kind != "variance_exploding"

    def _scale(self, state):
        return state["alpha"] if self._scaled else 1.0

    def _level(self, alpha, sigma):
        return sigma if self.flow else sigma / alpha


def nearest(tables, scale):
    """The table of the nearest guidance scale. A scale beyond those of all tables is a warning."""
    scales = [table.scale for table in tables]
    if scales == [None]:
        return tables[0]
    if not min(scales) <= scale <= max(scales):
        logger.warning(
            f"Load GAS solver: the solver is for guidance scales from {min(scales):g} to {max(scales):g} and samples as for the "
            f"nearest of these, but is used with {scale:g}."
        )
    return min(tables, key=lambda table: abs(table.scale - scale))


def sampler_function(tables, levels):
    """The function for ComfyUI's `KSAMPLER`. Of several tables it takes that of the guidance scale of the sampling.

    SIGMAS may be all of `levels` or any consecutive ones.
    """

    @torch.no_grad()
    def sample_gas(model, x, sigmas, extra_args=None, callback=None, disable=None):
        if len(sigmas) < 2:
            return x  # no step, as from a split at an end
        begin, table = _position(levels, sigmas), tables[0]
        if len(tables) > 1:
            scale = _guidance_scale(model.inner_model)
            table = nearest(tables, scale)
            # Other levels than those of SIGMAS are for pure noise only, of which all tables need as much.
            own = len(sigmas) < len(levels) or not math.isclose(table.levels[0], levels[0], rel_tol=1e-4)
            if own and table.levels != levels:
                raise ValueError(
                    "Load GAS solver: SIGMAS that are split or shortened by `denoise` are those of one guidance scale. Set the "
                    f"node's `guidance_scale` to that of the sampler, {scale:g}."
                )
        return table.sample(model, x, sigmas, begin, extra_args or {}, callback)

    return sample_gas


def _guidance_scale(guider):
    """The CFG of a sampling or, where that is 1, the guidance that the network is told, as FLUX is."""
    scale = getattr(guider, "cfg", None)
    if scale in (None, 1):
        told = (cond.get("guidance") for cond in getattr(guider, "original_conds", {}).get("positive", ()))
        scale = next((guidance for guidance in told if guidance is not None), scale)
    if scale is None:
        raise ValueError(
            "Load GAS solver: this solver is for several guidance scales, and the sampler does not tell its own. Set the "
            "node's `guidance_scale`."
        )
    return scale


def _position(levels, sigmas):
    """The step at which SIGMAS begin."""
    given = sigmas.tolist()
    for begin in range(len(levels) - len(given) + 1):
        if all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(given, levels[begin:])):
            return begin
    raise ValueError(
        "Load GAS solver: the SAMPLER needs the SIGMAS of the same node, whole, split or shortened by `denoise`. It has "
        f"{[round(level, 4) for level in levels]}, and was given {[round(level, 4) for level in given]}."
    )


def _telling(extra_args, told):
    """The model's arguments with the noise levels that it will be told. Context windows and some models look theirs up."""
    options = extra_args.get("model_options", {})
    transformer_options = {**options.get("transformer_options", {}), "sample_sigmas": told}
    return {**extra_args, "model_options": {**options, "transformer_options": transformer_options}}


def _keep_unmasked(model, state, sigma, extra_args):
    """The result with the image in the place of what inpainting does not change."""
    mask = extra_args.get("denoise_mask")
    if mask is None:
        return state
    function = extra_args["model_options"].get("denoise_mask_function")
    if function is not None:
        mask = function(sigma, mask, extra_options={"model": model.inner_model, "sigmas": model.sigmas})
    return state * mask + model.latent_image * (1 - mask)


def _weighted_sum(weights, tensors):
    return sum(weight * tensor for weight, tensor in zip(weights, tensors) if weight != 0)
