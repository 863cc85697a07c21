"""Copies of one scheduler, as servers make them for every request, do not disturb each other."""

import copy
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Semaphore, Thread

import pytest
import torch
from test_solver_files import trained_scheduler
from torch import Tensor

from diffusers_gas import SDMScheduler
from diffusers_gas.schedulers.scheduling_utils import ODEScheduler


NUM_CALLS, NUM_FREE_THREADS = 200, 8


def gas() -> ODEScheduler:
    return trained_scheduler(3, 4, 6)


def sdm() -> ODEScheduler:
    scheduler = SDMScheduler()
    for n in (3, 4, 6):
        scheduler.add_plan(scheduler.published_plan(n))
    return scheduler


def call(scheduler: ODEScheduler, seed: int, wait: Callable[[], None] = lambda: None) -> Tensor:
    """Samples with a step count that depends on the seed, and waits before all that it does with the scheduler."""
    wait()
    scheduler.set_timesteps((3, 4, 6)[seed % 3])
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed)) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = torch.sin(scheduler.scale_model_input(x, t) + seed + 1e-3 * t)
        wait()
        x = scheduler.step(output, t, x).prev_sample
    return x


def take_turns(scheduler: ODEScheduler) -> dict[int, Tensor]:
    """All calls at once, a thread each, of which a random one goes on at a time."""
    turns = [Semaphore(0) for _ in range(NUM_CALLS)]
    back, results = Semaphore(0), {}

    def serve(seed: int) -> None:
        def wait() -> None:
            back.release()
            turns[seed].acquire()

        turns[seed].acquire()
        results[seed] = call(copy.deepcopy(scheduler), seed, wait)
        back.release()

    threads = [Thread(target=serve, args=(seed,), daemon=True) for seed in range(NUM_CALLS)]
    for thread in threads:
        thread.start()
    rng, running = random.Random(0), list(range(NUM_CALLS))
    while running:
        seed = rng.choice(running)
        turns[seed].release()
        assert back.acquire(timeout=30)
        if seed in results:
            running.remove(seed)
    return results


@pytest.mark.parametrize("make", [gas, sdm])
def test_calls_that_take_turns_give_what_calls_one_by_one_give(make):
    scheduler = make()
    expected = {seed: call(copy.deepcopy(scheduler), seed) for seed in range(NUM_CALLS)}
    found = take_turns(scheduler)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[seed], expected[seed]) for seed in expected)


@pytest.mark.parametrize("make", [gas, sdm])
def test_threads_without_order_give_the_same(make):
    scheduler = make()
    expected = {seed: call(copy.deepcopy(scheduler), seed) for seed in range(NUM_CALLS)}
    together = Barrier(NUM_FREE_THREADS)

    def serve(first: int) -> dict[int, Tensor]:
        together.wait(timeout=30)
        return {seed: call(copy.deepcopy(scheduler), seed) for seed in range(first, NUM_CALLS, NUM_FREE_THREADS)}

    with ThreadPoolExecutor(NUM_FREE_THREADS) as pool:
        for found in pool.map(serve, range(NUM_FREE_THREADS)):
            assert all(torch.equal(x, expected[seed]) for seed, x in found.items())


def test_one_scheduler_for_all_would_not_do():
    """The tests above can fail: without copies the calls disturb each other."""
    scheduler = gas()
    scheduler.set_timesteps(4)
    alone = call(copy.deepcopy(scheduler), 1)
    other = iter(range(2))

    def disturb() -> None:
        if next(other, None) == 1:
            call(scheduler, 2)

    try:
        disturbed = call(scheduler, 1, disturb)
    except (IndexError, RuntimeError, ValueError):
        return
    assert not torch.equal(disturbed, alone)
