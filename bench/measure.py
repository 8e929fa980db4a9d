"""What the commands share: options, a device under a clock, interleaved rounds, their reports."""

import argparse
import gc
import math
import platform
import random
import shlex
import statistics
import subprocess
import timeit
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from l2l_ref.backend import BACKENDS, available_device, build_info, built, resolve
from l2l_ref.errors import InputError
from l2l_ref.experiment.cli import Parser
from l2l_ref.experiment.machine import processor

CPU = torch.device("cpu")
ASKED = {"driver": "driver_version", "max_mhz": "clocks.max.sm", "mhz": "clocks.sm",
         "watts": "power.limit"}  # what nvidia-smi calls them  # fmt: skip
SAMPLE = 0.005  # seconds that one sample lasts at least
WARM = 0.1  # a run shorter than this is repeated once, unclocked, before each sample
ROUNDS = (3, 15)  # at least, at most

# ------------------------------------------------------------------------------------- options


def count(text: str) -> int:
    """A whole number of at least 1, also as 1e6."""
    try:
        value = float(text)
        if value >= 1 and value == int(value):
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")


def parser(
    script: str, doc: str, *, device: str = "", backend: str = "auto", seconds: float | None = None
) -> Parser:
    """A parser with `--backend`; with `--device` where the command serves more than a CPU; with
    `--seconds`, that many, and `--out` where it clocks and writes what it found."""
    top = Parser(prog=f"{script}.py", description=doc.splitlines()[0], allow_abbrev=False)
    top.add_argument("--backend", choices=BACKENDS, default=backend, help=f"ours ({backend})")
    top.set_defaults(device="cpu")
    if device:
        top.add_argument("--device", default=device, metavar="D",
                         help=f"cpu, cuda, cuda:1, … ({device})")  # fmt: skip
    if seconds is not None:
        top.add_argument("--seconds", type=float, default=seconds, metavar="S",
                         help=f"clocked for all that take turns ({seconds:g})")  # fmt: skip
        top.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="FOLDER")
    return top


def parse(top: Parser, arguments: list[str]) -> argparse.Namespace:
    """The options; their device is ready to be measured.

    Raises:
        InputError: any that are wrong, or that cannot be had here.
    """
    options = top.parse_args(arguments)
    options.device = chosen(options.device)
    resolve(options.backend, options.device)
    if "seconds" in options and not 0 <= options.seconds < float("inf"):
        raise InputError(f"--seconds is {options.seconds}: it must be at least 0 and finite")
    return options


# -------------------------------------------------------- what differs where tensors are on a GPU


def chosen(name: str) -> torch.device:
    """The device `name`, with its number, ready to be measured: float32 is float32 on it.

    Raises:
        InputError: a device that is not there, or neither a CPU nor a GPU with CUDA.
    """
    device = torch.empty(0, device=available_device(name)).device
    if kind(device) == "cuda":
        torch.cuda.set_device(device)  # streams and events are the current device's
        torch.backends.cudnn.allow_tf32 = False  # cuDNN's LSTM would round to 10 bits
    return device


def kind(device: torch.device) -> str:
    """ "cpu" or "cuda": which side of the seams a device is on."""
    return device.type


def clock(run: Callable[[], Any], calls: int, device: torch.device = CPU) -> float:
    """Seconds a call, of `calls` in a row: on a GPU from when the first begins there to when the
    last has ended, so the time to launch them counts where the GPU waits for it."""
    if kind(device) == "cuda":
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
    if kind(device) == "cuda":
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


def give_back(device: torch.device) -> None:
    """Free what nothing refers to, on a GPU for the other programs too."""
    gc.collect()
    if kind(device) == "cuda":
        torch.cuda.empty_cache()


def about(device: torch.device) -> dict[str, Any] | None:
    """What a GPU and its driver say of it; None for a CPU.

    `max_mhz` and `mhz` are the clock of the multiprocessors, the highest and that of the moment,
    `watts` is the limit on its power. What they do not say is None.
    """
    if kind(device) == "cpu":
        return None
    found = torch.cuda.get_device_properties(device)
    told = ask_driver(f"GPU-{found.uuid}")
    told["max_mhz"] = told["max_mhz"] or getattr(found, "clock_rate", 0) / 1e3 or None
    return {
        "name": found.name,
        "capability": (found.major, found.minor),
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": found.L2_cache_size,
        **told,
        "cuda": torch.version.cuda,
    }


def ask_driver(identity: str) -> dict[str, Any]:
    """Each of ASKED, as nvidia-smi says it of the GPU `identity`; None where it does not."""
    query = ["nvidia-smi", f"--id={identity}", f"--query-gpu={','.join(ASKED.values())}"]
    command = [*query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        driver, *numbers = (value.strip() for value in done.stdout.splitlines()[0].split(","))
        return dict(zip(ASKED, (driver, *map(number, numbers)), strict=True))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return dict.fromkeys(ASKED)


def number(text: str) -> float | None:
    """A number of nvidia-smi, which says "[N/A]" where it has none."""
    try:
        return float(text)
    except ValueError:
        return None


# ------------------------------------- clocks that noise on a shared machine disturbs little


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


# ------------------------------------------------------------------------ what a command leaves


def machine(
    script: str, arguments: list[str], backend: str, device: torch.device = CPU
) -> dict[str, Any]:
    """Date, hardware, versions, the backend with what it says of its build, and the command.

    Of a CPU also its `rates`; a GPU's are `gpu.ceilings`.
    """
    gpu, ours = about(device), resolve(backend, device)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "backend": ours,
        "build": build_info() if ours == "fused" else None,
        **({"gpu": gpu} if gpu else {"rates": rates()}),
        "command": command(script, arguments),
    }


def where(found: dict[str, Any]) -> str:
    """What `machine` is about: the GPU or the CPU with its rates, PyTorch and the backend."""
    about = f"torch {found['torch']}, {found['backend']} backend"
    if "gpu" in found:
        return f"{found['gpu']['name']}, {about}"
    flops, copied = found["rates"]["flops"], found["rates"]["copied"]
    computed = f"{flops / 1e9:.0f} GFLOP/s in float32, " if flops else ""
    return f"{found['cpu']}, {about}\none thread: {computed}copies {copied / 1e9:.1f} GB/s"


def rates(copied: int = 1 << 26, rounds: int = 9) -> dict[str, float | None]:
    """What one thread of this CPU does a second, at best, as measured now.

    Args:
        copied: bytes that are read and as many that are written at once, far beyond any cache.

    Returns:
        "flops": of independent multiply-adds in float32, two each, None without the engine;
        "copied": bytes read and written by a copy.
    """

    def fastest(run: Callable[[], Any]) -> float:
        return min(clock(run, 1) for _ in range(rounds))

    flops, source = None, torch.rand(copied // 4)
    target, before = torch.empty_like(source), torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = fastest(lambda: target.copy_(source))
    torch.set_num_threads(before)
    if built():
        multiply_adds = import_module("l2l_ref.backend._C").multiply_adds
        many = 10**6
        flops = 2 * multiply_adds(many) / fastest(lambda: multiply_adds(many))
    return {"flops": flops, "copied": 2 * copied / seconds}


def command(script: str, arguments: list[str]) -> str:
    """The command line that made a result, without the folders of this machine."""
    shown = [Path(a).name if Path(a).is_absolute() else a for a in arguments]
    return shlex.join(["python", "-m", f"bench.{script}", *shown])
