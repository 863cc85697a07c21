"""What the arguments of `set_timesteps` ask for: a number of steps, or noise levels that somebody chose."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from diffusers import SchedulerMixin
from typing_extensions import Self

from ..utils.diffusers_hooks import PipelineCall, pipeline_call
from .configs import REFUSED_ARGUMENTS, REFUSED_PIPELINES


# Lists of flow matching that begin below this noise level do not begin at noise. Pipelines' own lists begin at 1.
NOISE_LEVEL_OF_NOISE = 0.99


@dataclass(frozen=True)
class RequestedSteps:
    """A number of steps, and the lists that came with it.

    Most flow-matching pipelines pass a list of noise levels to every scheduler. It is their own way to say how many steps are
    meant, unless the user passed a list to the pipeline.

    Attributes:
        count: Number of steps.
        sigmas: Noise levels as Diffusers pipelines pass them: for flow matching one a step, before the shift; otherwise
            sigma / alpha with the final one added. `None` for no list, and for one of `timesteps`. A list of one a step
            is without its end, if it names that.
        timesteps: Network times, if they were passed without noise levels.
        unshifted_timesteps: Whether the network is told noise levels before the shift. Pipelines of such networks pass both
            lists (CogView4).
        chosen: Whether a user chose the list.
    """

    count: int
    sigmas: tuple[float, ...] | None = None
    timesteps: tuple[float, ...] | None = None
    unshifted_timesteps: bool = False
    chosen: bool = False

    @classmethod
    def of(
        cls,
        scheduler: SchedulerMixin,
        num_inference_steps: int | None,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> Self:
        """What the arguments of `set_timesteps` ask a scheduler of this package for.

        Raises:
            ValueError: If they contradict each other or ask for no step.
        """
        config, call = scheduler.config, pipeline_call(scheduler)
        if call is not None:
            _check_call(call)
        lists = ("sigmas", "timesteps")
        passed = None if call is None else {name: call.arguments[name] for name in lists if name in call.arguments}
        if passed and sigmas is None and timesteps is None:
            # The pipeline dropped the user's list, as Flux does for configs with `use_flow_sigmas`.
            num_inference_steps, sigmas, timesteps = None, passed.get("sigmas"), passed.get("timesteps")
        with_final = not config["use_flow_sigmas"] and config["exploding_sigmas"] is None
        last_timestep = config["num_train_timesteps"] if config["invert_sigmas"] else 0
        levels = _numbers(sigmas, end=None if with_final else 0)
        times = _numbers(timesteps, end=None if with_final else last_timestep)
        both = levels is not None and times is not None
        if both and not _same_levels(levels, times, config["num_train_timesteps"]):
            raise ValueError("Pass only one of `sigmas` and `timesteps`: they are not the same noise levels.")
        # Outside of pipelines (loops of one's own, modular pipelines) the values must tell.
        chosen = bool(passed) if passed is not None else not _only_counts(levels, None if both else times)
        count = _count(num_inference_steps, levels, times, with_final=with_final)
        return cls(count, levels, None if both else times, both, chosen)

    @property
    def from_noise(self) -> bool:
        """Whether a list of flow matching begins at noise, as far as it says."""
        return self.sigmas is None or max(self.sigmas) >= NOISE_LEVEL_OF_NOISE

    @property
    def must_be_followed(self) -> bool:
        """Whether a list says more than how many steps are meant."""
        return self.chosen or not self.from_noise

    def check_free(self, owner: str) -> None:
        """Raises a `ValueError` if these steps are not those of a solver or plan that has times of its own.

        Args:
            owner: What the times belong to, for the message.
        """
        if self.chosen:
            raise ValueError(
                f"`timesteps` and `sigmas` cannot be chosen for {owner}, which has times of its own. Pass only "
                "`num_inference_steps`, or use a scheduler made with `from_config`."
            )
        self.check_from_noise(owner)

    def check_from_noise(self, owner: str) -> None:
        """Raises a `ValueError` if a pipeline's list of noise levels begins in the middle of the schedule."""
        if not self.from_noise:
            raise ValueError(
                f"The pipeline starts at noise level {max(self.sigmas or ()):.4g} by a list of `sigmas`. {owner.capitalize()} starts at "
                "noise. Use a scheduler made with `from_config`, which follows the list."
            )


def _check_call(call: PipelineCall) -> None:
    """Raises a `ValueError` for a pipeline, or an argument of one, that needs a scheduler of Diffusers."""
    names = [base.__name__ for base in type(call.pipe).__mro__]
    for name in REFUSED_PIPELINES.keys() & names:
        raise ValueError(f"{name} works with its own scheduler only: {REFUSED_PIPELINES[name]}.")
    for (name, argument), reason in REFUSED_ARGUMENTS.items():
        if name in names and call.arguments.get(argument):
            raise ValueError(f"With `{argument}` {name} works with its own scheduler only: {reason}.")


def _numbers(values: Sequence[float] | None, end: float | None) -> tuple[float, ...] | None:
    """The numbers of a list. If it has one a step, the end, where nothing is left to do, is no step."""
    numbers = None if values is None else tuple(float(value) for value in values)
    return numbers[:-1] if numbers is not None and len(numbers) > 1 and numbers[-1] == end else numbers


def _same_levels(
    sigmas: tuple[float, ...] | None, timesteps: tuple[float, ...] | None, num_train_timesteps: int
) -> bool:
    """Whether two lists are the same noise levels, but for rounding to one of 1000 timesteps."""
    levels, others = np.asarray(sigmas), np.asarray(timesteps) / num_train_timesteps
    return len(levels) == len(others) and np.allclose(levels, others, rtol=0, atol=1e-3)


def _only_counts(sigmas: tuple[float, ...] | None, timesteps: tuple[float, ...] | None) -> bool:
    """Whether lists only say how many steps are meant: noise levels that descend evenly, but for rounding to a timestep."""
    if sigmas is None:
        return timesteps is None
    steps = np.diff(sigmas)
    atol = 2e-3 if sigmas[0] <= 1 else 1e-3 / len(sigmas)
    return bool((steps < 0).all()) and np.allclose(np.diff(steps), 0, atol=atol)


def _count(
    num_inference_steps: int | None,
    sigmas: tuple[float, ...] | None,
    timesteps: tuple[float, ...] | None,
    with_final: bool,
) -> int:
    """The number of steps; lists of `sigmas` may end with the final noise level."""
    if timesteps is not None:
        count = len(timesteps)
    elif sigmas is not None:
        count = len(sigmas) - with_final
    elif num_inference_steps is not None:
        count = num_inference_steps
    else:
        raise ValueError("Pass a number of steps, `num_inference_steps`, or a list of noise levels, `sigmas`.")
    if count < 1:
        raise ValueError(f"`num_inference_steps` must be at least 1, got {count}.")
    if num_inference_steps not in (None, count):
        given = sigmas if timesteps is None else timesteps
        raise ValueError(f"`num_inference_steps` is {num_inference_steps}, but {list(given or ())} are {count} steps.")
    return count
