"""How an algorithm asks for network evaluations: a generator yields `(x, sigma)` and is sent the data prediction."""

from collections.abc import Callable, Generator
from typing import TypeAlias, TypeVar

from torch import Tensor


T = TypeVar("T")

Algorithm: TypeAlias = Generator[tuple[Tensor, Tensor], Tensor, T]
"""Yields `x = x0 + sigma * noise`, shape `(B, ...)`, and `sigma`, a 0-dim float64 tensor; is sent `D(x; sigma)`."""

Denoiser: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""`D(x; sigma)`: the prediction of x0 for `x = x0 + sigma * noise`, of x's shape."""


def run(algorithm: Algorithm[T], denoiser: Denoiser) -> T:
    """Run an algorithm, answering its evaluation requests with `denoiser(x, sigma)`, and return its result."""
    try:
        request = next(algorithm)
        while True:
            request = algorithm.send(denoiser(*request))
    except StopIteration as stop:
        return stop.value
