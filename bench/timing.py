"""Clocks that noise on a shared machine disturbs little: interleaved rounds, medians, quartiles."""

import gc
import math
import random
import statistics
from collections.abc import Callable
from typing import Any

import torch

from bench.device import CPU, clock

SAMPLE = 0.005  # seconds that one sample lasts at least
WARM = 0.1  # a run shorter than this is repeated once, unclocked, before each sample


def interleave(
    runs: dict[str, Callable[[], Any]],
    seconds: float,
    least: int = 3,
    most: int = 15,
    device: torch.device = CPU,
) -> dict[str, list[float]]:
    """Clock `runs` in turn, each once a round, in an order drawn anew for each round.

    Args:
        runs: name -> what to clock; each has been called before, so that it is warm.
        seconds: the rounds together take about this long.
        least, most: bounds on the number of rounds.
        device: where they run.

    Returns:
        name -> seconds a call, one number a round.
    """
    gc.collect()
    first = {name: clock(run, 1, device) for name, run in runs.items()}
    calls = {name: max(1, math.ceil(SAMPLE / max(t, 1e-9))) for name, t in first.items()}
    round_time = sum(t * (calls[name] + (t < WARM)) for name, t in first.items())
    rounds = min(most, max(least, int(seconds / round_time)))
    order, samples = list(runs), {name: [] for name in runs}
    if round_time * rounds > seconds > 0:  # long runs: what told how long they are is a round too
        samples = {name: [t] for name, t in first.items()}
    draw = random.Random(0)
    for _ in range(rounds - len(samples[order[0]])):
        draw.shuffle(order)
        for name in order:
            if first[name] < WARM:
                runs[name]()
            samples[name].append(clock(runs[name], calls[name], device))
    return samples


def summary(samples: list[float], scale: float = 1.0) -> dict[str, Any]:
    """{"median": x, "quartiles": [x, x], "rounds": n} of the samples times `scale`."""
    scaled = [scale * sample for sample in samples]
    low, _, high = statistics.quantiles(scaled, n=4, method="inclusive")
    return {"median": statistics.median(scaled), "quartiles": [low, high], "rounds": len(scaled)}
