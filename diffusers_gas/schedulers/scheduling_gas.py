"""`GASScheduler`: a Generalized Solver (GS / GAS, arXiv 2510.17699) as a Diffusers scheduler."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import register_to_config
from diffusers.utils import logging
from torch import Tensor

from ..generalized_solver import GeneralizedSolver, SolverTable, initial_times
from ..noise_schedules import EDMVPSchedule, FlowMatchSchedule, NoiseSchedule, data_prediction_weights
from .guidance import warn_of_other_guidance
from .scheduling_utils import ODEScheduler, evenly_spaced
from .solver_files import read_solver_file, save_solver_file


logger = logging.get_logger(__name__)

# Of noise and network outputs in a state. Nothing that was learned comes near it, and float32 ends at 1e38.
LARGEST_WEIGHT = 1e12


class GASScheduler(ODEScheduler):
    """Samples with learned linear multistep solvers, one for each number of steps, or with DPM-Solver++ theory.

    `set_timesteps(n)` picks the solver that was trained for n steps, each of which is one network evaluation. A scheduler
    without any trained solver (`from_config`) samples with the theory solver that training starts from.

    This model inherits from [`SchedulerMixin`] and [`ConfigMixin`]. Check the superclass documentation for the generic
    methods the library implements for all schedulers such as loading and saving.

    Args:
        num_train_timesteps (`int`, defaults to 1000), beta_start (`float`, defaults to 0.0001), beta_end (`float`,
        defaults to 0.02), beta_schedule (`str`, defaults to `"linear"`), trained_betas (`list[float]`, *optional*),
        rescale_betas_zero_snr (`bool`, defaults to `False`), snr_shift_scale (`float`, defaults to 1.0):
            The variance-preserving noise schedule, as in Diffusers' other schedulers (the last one CogVideoX').
        prediction_type (`"epsilon"`, `"sample"`, `"v_prediction"` or `"flow_prediction"`, defaults to `"epsilon"`):
            What the network predicts.
        use_flow_sigmas (`bool`, defaults to `False`), flow_shift (`float`, defaults to 1.0), use_dynamic_shifting
        (`bool`, defaults to `False`), time_shift_type (`"exponential"` or `"linear"`, defaults to `"exponential"`):
            Flow matching instead, its shift, and whether pipelines pass the shift as `mu`.
        shift_terminal (`float`, *optional*):
            Noise level of the last evaluation, to which those of the theory solver are stretched, as in
            `FlowMatchEulerDiscreteScheduler`.
        sigma_data (`float`, *optional*):
            Set for networks with EDM preconditioning instead, of whose output `prediction_type` is the sign, as Diffusers
            has it. They are sampled as variance-preserving ones ([`EDMVPSchedule`]): states are 1 / sqrt(1 + sigma^2) times
            EDM's, so that the initial noise has variance 1, and t = 1 is sigma = 152, whatever an EDM scheduler starts from.
        edm_timestep (`"log"` or `"atan"`, defaults to `"log"`):
            What EDM networks are told, log(sigma) / 4 or atan(sigma) in quarter turns (Stable Audio).
        variance_type (`"learned"` or `"learned_range"`, *optional*):
            Set for networks that predict a variance in a second half of their channels, which is then dropped.
        t_start (`float`, defaults to 1.0):
            Time that the theory solver takes the initial noise to have; see [`GeneralizedSolver`].
        t_end (`float`, defaults to 1e-3):
            Time at which integration ends (the papers' t_eps), at least the first trained one, 1 / `num_train_timesteps`.
        solver_order (`int`, defaults to 2), lower_order_final (`bool`, defaults to `True`):
            Order of the theory solver and whether it falls towards the end, as in `DPMSolverMultistepScheduler` (but for
            any number of steps).
        use_karras_sigmas, use_lu_lambdas (`bool`, defaults to `False`):
            Time grid of the theory solver instead of uniform t: Karras', or uniform in lambda.
        use_theory_for_untrained_steps (`bool`, defaults to `False`):
            Whether a scheduler that has trained solvers answers other step counts with the theory solver, not an error.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        prediction_type: Literal["epsilon", "sample", "v_prediction", "flow_prediction"] = "epsilon",
        rescale_betas_zero_snr: bool = False,
        snr_shift_scale: float = 1.0,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        shift_terminal: float | None = None,
        sigma_data: float | None = None,
        edm_timestep: Literal["log", "atan"] = "log",
        variance_type: str | None = None,
        t_start: float = 1.0,
        t_end: float = 1e-3,
        solver_order: int = 2,
        lower_order_final: bool = True,
        use_karras_sigmas: bool | None = False,
        use_lu_lambdas: bool = False,
        use_theory_for_untrained_steps: bool = False,
    ):
        self._initialize()
        self.solvers: dict[int, GeneralizedSolver] = {}
        self._solver: GeneralizedSolver | None = None

    @classmethod
    def distill(
        cls, pipe: DiffusionPipeline, num_inference_steps: Sequence[int] = (4,), **kwargs: Any
    ) -> "GASScheduler":
        """A scheduler with a solver for each number of steps; see [`diffusers_gas.distillation.distill.distill`].

        `pipe.scheduler = GASScheduler.distill(pipe, [4], inputs=...)` is all that a pipeline needs.
        """
        from ..distillation.distill import distill

        return distill(pipe, num_inference_steps, **kwargs)

    def _check_settings(self) -> None:
        super()._check_settings()
        if not 0 < self.config.t_start <= 1:
            raise ValueError(f"`t_start` must be more than 0 and at most 1, got {self.config.t_start}.")

    def noise_schedule(self, mu: float | None = None) -> NoiseSchedule:
        if self.config.sigma_data is not None:
            return EDMVPSchedule(self.config.sigma_data, self.config.edm_timestep)
        return super().noise_schedule(mu)

    def add_solver(self, solver: GeneralizedSolver) -> None:
        """Puts a solver in for its step count; `solver.t_end` must be this scheduler's."""
        t_end = self._t_end(self.noise_schedule(mu=1.0))
        if abs(solver.t_end - t_end) > 1e-12:
            raise ValueError(f"The solver ends at t = {solver.t_end}, this scheduler at t_end = {t_end}.")
        self.solvers[solver.num_inference_steps] = solver

    def theory_solver(self, num_inference_steps: int, mu: float | None = None) -> GeneralizedSolver:
        """The untrained solver of the config for a number of steps: where training starts."""
        noise_schedule = self.noise_schedule(mu)
        t_end = self._t_end(noise_schedule)
        spacing = "karras" if self.config.use_karras_sigmas else "logsnr" if self.config.use_lu_lambdas else "uniform"
        times = initial_times(spacing, num_inference_steps, noise_schedule, self.config.t_start, t_end)
        return self._theory_solver(torch.cat([self._stretch(times[:-1], noise_schedule), times[-1:]]))

    def _theory_solver(self, times: Tensor) -> GeneralizedSolver:
        return GeneralizedSolver(
            len(times) - 1,
            theory_order=self.config.solver_order,
            lower_order_final=self.config.lower_order_final,
            t_start=times[0].item(),
            t_end=times[-1].item(),
            times=times,
        )

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """Chooses the solver and its times; to be called before every sampling.

        Args:
            num_inference_steps (`int`, *optional*): Number of steps, which is the number of network evaluations.
            device (`str` or `torch.device`, *optional*): Device of `timesteps`.
            sigmas (`list[float]`, *optional*): Noise levels as Diffusers pipelines pass them: for flow matching one a
                step, before the shift; otherwise sigma / alpha with the final one (0 for the end of the schedule) added.
                For a trained solver an evenly spaced list only says how many steps are meant.
            mu (`float`, *optional*): Shift of a flow-matching pipeline that depends on the resolution.
            timesteps (`list[float]`, *optional*): Network times of the theory solver's steps.
        """
        noise_schedule = self.noise_schedule(mu)
        num_inference_steps = self._count_steps(num_inference_steps, sigmas, timesteps)
        self._solver = self._choose_solver(num_inference_steps, noise_schedule, mu, sigmas, timesteps)
        if num_inference_steps < 3:
            logger.warning(
                f"{num_inference_steps} steps are too few for a solver of this kind: expect blurred or distorted samples; "
                "3 or more are recommended."
            )
        warn_of_other_guidance(self._solver.provenance)
        with torch.no_grad():
            table = self._solver.table(noise_schedule)
        self._reset(noise_schedule, table.times, table.evaluation_times, device)
        self._set_table(table)

    def _count_steps(
        self, num_inference_steps: int | None, sigmas: list[float] | None, timesteps: list[float] | None
    ) -> int:
        if sigmas is not None and timesteps is not None:
            raise ValueError("Pass only one of `sigmas` and `timesteps`.")
        given = sigmas if timesteps is None else timesteps
        if given is None:
            if num_inference_steps is None:
                raise ValueError("Pass one of `num_inference_steps`, `sigmas` and `timesteps`.")
            count = num_inference_steps
        else:
            final = sigmas is not None and not self.config.use_flow_sigmas
            count = len(given) - final
        if count < 1:
            raise ValueError(f"`num_inference_steps` must be at least 1, got {count}.")
        if num_inference_steps not in (None, count):
            raise ValueError(f"`num_inference_steps` is {num_inference_steps}, but {given} are {count} steps.")
        return count

    def _choose_solver(
        self,
        num_inference_steps: int,
        noise_schedule: NoiseSchedule,
        mu: float | None,
        sigmas: list[float] | None,
        timesteps: list[float] | None,
    ) -> GeneralizedSolver:
        if num_inference_steps in self.solvers:
            if timesteps is not None or not evenly_spaced(sigmas):
                raise ValueError(
                    "`timesteps` and `sigmas` cannot be chosen for a trained solver, which has times of its own. Pass "
                    "only `num_inference_steps`, or use an untrained scheduler (`GASScheduler.from_config`)."
                )
            return self.solvers[num_inference_steps]
        if self.solvers and not self.config.use_theory_for_untrained_steps:
            raise ValueError(
                f"No solver for {num_inference_steps} steps: this scheduler was trained for {sorted(self.solvers)}. Use "
                "one of these, train another, or set `use_theory_for_untrained_steps=True` in the config."
            )
        if sigmas is None and timesteps is None:
            return self.theory_solver(num_inference_steps, mu)
        return self._theory_solver(self._custom_times(noise_schedule, sigmas, timesteps))

    def _custom_times(
        self, noise_schedule: NoiseSchedule, sigmas: list[float] | None, timesteps: list[float] | None
    ) -> Tensor:
        """A time grid `(n + 1,)` from the arguments of `set_timesteps`."""
        if timesteps is not None:
            times = noise_schedule.inverse_timestep(torch.as_tensor(timesteps, dtype=torch.float64))
        elif isinstance(noise_schedule, FlowMatchSchedule):
            times = self._stretch(torch.as_tensor(sigmas, dtype=torch.float64), noise_schedule)
        else:
            times = noise_schedule.inverse_diffusers_sigma(torch.as_tensor(sigmas, dtype=torch.float64)[:-1])
        t_end = self._t_end(noise_schedule)
        end = t_end if times[-1] > t_end else noise_schedule.t_min
        times = torch.cat([times, times.new_full((1,), end)])
        # Published lists of sigmas are rounded, and may begin a little above the schedule.
        if not times[0] < 1 + 1e-3 or not (times.diff() < -1e-9).all():
            given = sigmas if timesteps is None else timesteps
            raise ValueError(f"`sigmas` or `timesteps` must descend within the noise schedule, got {given}.")
        return times.clamp(max=1)

    def _set_table(self, table: SolverTable, begin: int = 0) -> None:
        """Turns a table, whose first step is number `begin`, into the plain numbers that `step` works with."""
        weights = data_prediction_weights(
            self.config.prediction_type, self._noise_schedule, table.times[:-1], table.evaluation_times
        )
        weights = torch.stack(weights, dim=1)
        if not weights.isfinite().all():
            raise ValueError(
                f"A `prediction_type` of '{self.config.prediction_type}' says nothing about the data where the noise "
                f"schedule has alpha = 0, as it has at t = {table.times[0].item()}."
            )
        self._prediction_weights = dict(enumerate(weights.tolist(), begin))
        self._update_weights = dict(enumerate(table.folded().tolist(), begin))
        self._history: list[Tensor] = []

    def _start_history(self, state: Tensor) -> None:
        begin = self._step_index
        if begin > 0:
            with torch.no_grad():
                self._set_table(self._solver.table(self._noise_schedule, begin=begin), begin)
        # A pipeline may change its tensor in place later on.
        self._history = [state.clone()]

    def _update(self, state: Tensor, data: Tensor) -> list[tuple[float, Tensor]]:
        """The sum of the sample, the first sample and all data predictions."""
        self._history.append(data)
        newest, *past = self._update_weights[self._step_index]
        return [(newest, state), *zip(past, self._history)]

    def _forget_history(self) -> None:
        self._history = []

    def _save_solvers(self, folder: str | os.PathLike) -> set[int]:
        for num_inference_steps, solver in self.solvers.items():
            record = {"solver": solver.config(), "scheduler": self._record(), "provenance": solver.provenance}
            save_solver_file(folder, num_inference_steps, solver.state_dict(), record)
        return set(self.solvers)

    def _load_solver(self, num_inference_steps: int, path: Path) -> None:
        tensors, record = read_solver_file(path)
        try:
            solver = GeneralizedSolver.from_tensors(tensors, **record["solver"])
            solver.provenance = dict(record["provenance"])
            if solver.num_inference_steps != num_inference_steps:
                raise ValueError(f"it is of {solver.num_inference_steps} steps: rename or remove it.")
            self._check_trained_for(dict(record["scheduler"]))
            self._check_weights(solver)
            self.add_solver(solver)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} does not hold a solver for this scheduler: {error}") from error

    def _check_weights(self, solver: GeneralizedSolver) -> None:
        """Refuses a solver whose samples would be out of all proportion."""
        noise_schedule = self.noise_schedule(mu=1.0)
        with torch.no_grad():
            table = solver.table(noise_schedule)
        times = table.times[:-1], table.evaluation_times
        prediction_weights = data_prediction_weights(self.config.prediction_type, noise_schedule, *times)
        largest = table.in_model_outputs(*prediction_weights).abs().max().item()
        if not largest < LARGEST_WEIGHT:
            raise ValueError(f"its samples would be {largest:.3g} times what the network returns.")
