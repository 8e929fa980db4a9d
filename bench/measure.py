"""What the commands share: options, a device under a clock, interleaved rounds."""

import argparse
import gc
import math
import random
import shlex
import statistics
import timeit
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from l2l_ref.backend import BACKENDS, available_device, resolve
from l2l_ref.errors import InputError
from l2l_ref.experiment.cli import Parser
from l2l_ref.experiment.machine import environment

CPU = torch.device("cpu")
SAMPLE = 0.005  # seconds that one sample lasts at least
WARM = 0.1  # a run shorter than this is repeated once, unclocked, before each sample
ROUNDS = (3, 15)  # at least, at most


def count(text: str) -> int:
    """A whole number of at least 1, also as 1e6."""
    with suppress(ValueError):
        value = float(text)
        if value >= 1 and value % 1 == 0:  # of infinity that is nan
            return int(value)
    raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")


def parser(script: str, doc: str, seconds: float | None = None) -> Parser:
    """A parser with `--backend`, for a CPU; with `--seconds`, that many, and `--out` where the
    command clocks and writes what it found."""
    top = Parser(prog=f"{script}.py", description=doc.splitlines()[0], allow_abbrev=False)
    top.add_argument("--backend", choices=BACKENDS, default="auto", help="who runs ours")
    top.set_defaults(device="cpu")
    if seconds is not None:
        top.add_argument("--seconds", type=float, default=seconds, metavar="S",
                         help=f"clocked for all that take turns ({seconds:g})")  # fmt: skip
        top.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="FOLDER")
    return top


def parse(top: Parser, arguments: list[str]) -> argparse.Namespace:
    """The options; their device, with its number, is ready to be measured: float32 is float32.

    Raises:
        InputError: any that are wrong, or that cannot be had here.
    """
    options = top.parse_args(arguments)
    options.device = torch.empty(0, device=available_device(options.device)).device
    if options.device.type == "cuda":
        torch.cuda.set_device(options.device)  # streams and events are the current device's
        torch.backends.cudnn.allow_tf32 = False  # cuDNN's LSTM would round to 10 bits
    resolve(options.backend, options.device)
    if "seconds" in options and not 0 <= options.seconds < float("inf"):
        raise InputError(f"--seconds is {options.seconds}: it must be at least 0 and finite")
    return options


def clock(run: Callable[[], Any], calls: int, device: torch.device = CPU) -> float:
    """Seconds a call, of `calls` in a row: on a GPU from when the first begins there to when the
    last has ended, so the time to launch them counts where the GPU waits for it."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls
    return timeit.timeit(run, number=calls) / calls


def free_bytes(device: torch.device) -> float:
    """Memory that is free now; infinite where the system does not say."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + kept)
    try:
        return float(said_by_linux("meminfo", "MemAvailable"))
    except (OSError, StopIteration):  # another system
        return float("inf")


def said_by_linux(file: str, key: str) -> int:
    """Bytes behind `key` in a file of /proc."""
    lines = Path("/proc", file).read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def interleave(
    runs: dict[str, Callable[[], Any]], seconds: float, device: torch.device = CPU
) -> dict[str, list[float]]:
    """Clock `runs` in turn, each once a round, in an order drawn anew for each round.

    Args:
        runs: name -> what to clock; each has been called before, so that it is warm.
        seconds: the rounds together take about this long.
        device: where they run.

    Returns:
        name -> seconds a call, one number a round.
    """
    gc.collect()
    first = {name: clock(run, 1, device) for name, run in runs.items()}
    calls = {name: max(1, math.ceil(SAMPLE / max(t, 1e-9))) for name, t in first.items()}
    round_time = sum(t * (calls[name] + (t < WARM)) for name, t in first.items())
    least, most = ROUNDS
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


def spread(found: dict[str, Any]) -> str:
    """Median and quartiles of a `summary`, to about three digits."""
    three = found["median"], *found["quartiles"]
    middle, low, high = (f"{x:.0f}" if x >= 100 else f"{x:.3g}" for x in three)
    return f"{middle} [{low}, {high}]"


def origin(
    script: str, arguments: list[str], device: torch.device, backend: str, data: Any
) -> dict[str, Any]:
    """When, by which command and in which `environment` a result was made; the command line is
    without the folders of this machine."""
    shown = [Path(a).name if Path(a).is_absolute() else a for a in arguments]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", f"bench.{script}", *shown]),
        "environment": environment(device, resolve(backend, device), data),
    }
