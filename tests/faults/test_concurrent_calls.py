"""Copies of one scheduler, as servers make them for every request, do not disturb each other."""

import copy
import functools
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Semaphore, Thread

import pytest
import torch
from saved_schedulers import planned_scheduler, trained_scheduler
from torch import Tensor

from diffusers_gas import SDMScheduler
from diffusers_gas.schedulers.scheduling_utils import ODEScheduler


NUM_CALLS, NUM_FREE_THREADS = 96, 8
STEP_COUNTS = (3, 4, 6)
TIMEOUT = 600


gas = functools.partial(trained_scheduler, *STEP_COUNTS)
sdm = functools.partial(planned_scheduler, *STEP_COUNTS)


def online_sdm() -> ODEScheduler:
    """Decides on the way how many evaluations there are."""
    return SDMScheduler(online=True, tau=0.05)


@pytest.fixture(scope="module", params=[gas, sdm, online_sdm], ids=["gas", "sdm", "online_sdm"])
def served(request) -> tuple[ODEScheduler, list[Tensor]]:
    """A scheduler, and what calls one after the other give."""
    scheduler = request.param()
    return scheduler, [call(scheduler, seed) for seed in range(NUM_CALLS)]


def call(scheduler: ODEScheduler, seed: int, wait: Callable[[], None] = lambda: None) -> Tensor:
    """Samples with a step count that depends on the seed, and waits before all that it does with the scheduler."""
    wait()
    scheduler.set_timesteps(STEP_COUNTS[seed % len(STEP_COUNTS)])
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed)) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = torch.sin(scheduler.scale_model_input(x, t) + seed + 1e-3 * t)
        wait()
        x = scheduler.step(output, t, x).prev_sample
    return x


def take_turns(scheduler: ODEScheduler, copied: Callable[[ODEScheduler], ODEScheduler]) -> list[Tensor | None]:
    """All calls at once, a thread each, of which a random one goes on at a time; `None` for those that fail."""
    results: list[Tensor | None] = [None] * NUM_CALLS
    turns, back = [Semaphore(0) for _ in results], Semaphore(0)
    running = list(range(NUM_CALLS))

    def serve(seed: int) -> None:
        def wait() -> None:
            back.release()
            assert turns[seed].acquire(timeout=TIMEOUT)

        assert turns[seed].acquire(timeout=TIMEOUT)
        try:
            results[seed] = call(copied(scheduler), seed, wait)
        except (ValueError, IndexError):
            pass
        finally:
            running.remove(seed)
            back.release()

    for seed in running:
        Thread(target=serve, args=(seed,), daemon=True).start()
    rng = random.Random(0)
    while running:
        turns[rng.choice(running)].release()
        assert back.acquire(timeout=TIMEOUT)
    return results


def test_calls_that_take_turns_give_what_calls_one_by_one_give(served):
    scheduler, expected = served
    assert all(torch.equal(*pair) for pair in zip(take_turns(scheduler, copy.deepcopy), expected))


def test_turns_do_disturb_calls_that_share_a_scheduler():
    """So that the test above can fail."""
    scheduler = gas()
    expected = [call(scheduler, seed) for seed in range(NUM_CALLS)]
    found = take_turns(scheduler, lambda shared: shared)
    assert sum(x is None or not torch.equal(x, y) for x, y in zip(found, expected)) > NUM_CALLS / 2


def test_free_threads_give_what_calls_one_by_one_give(served):
    scheduler, expected = served
    together = Barrier(NUM_FREE_THREADS)

    def serve(first: int) -> dict[int, Tensor]:
        together.wait(TIMEOUT)
        return {seed: call(copy.deepcopy(scheduler), seed) for seed in range(first, NUM_CALLS, NUM_FREE_THREADS)}

    with ThreadPoolExecutor(NUM_FREE_THREADS) as pool:
        for found in pool.map(serve, range(NUM_FREE_THREADS)):
            assert all(torch.equal(x, expected[seed]) for seed, x in found.items())
