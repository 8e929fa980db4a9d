"""How fast the engine's operators are, beside other ways to do the same.

python -m bench.operators --threads 1 --sizes 16384
python -m bench.operators --device cuda

Prints each peer's time over ours, and ns per coordinate-step with quartiles; writes operators.json
into --out. The sgemm floor is the time that the operations of an update (meta-gradient: three times
as many) take in one large float32 matrix product. The other floors are those of `bench/limits.py`:
their time over ours is the share of the machine that ours reaches.
"""

import gc
from typing import Any

import torch

from bench import limits, measure, memory, peers
from bench.case import Case, Peer, Unavailable, flops, make_case
from bench.measure import count
from bench.peers import OURS
from l2l_ref.errors import InputError
from l2l_ref.experiment.cli import run_as_script
from l2l_ref.experiment.machine import cores
from l2l_ref.files import write_json

MEMORY_CASE = (16384, 20)  # N and T of the memory measurement
UNROLL = {"step": [1], "meta_gradient": [20]}
DEFAULTS = {"cpu": ([1000, 10_000, 16_384, 100_000, 1_000_000], 2_000_000),
            "cuda": ([10**k for k in range(4, 9)], 100_000_000)}  # --sizes, --most  # fmt: skip


def parse(arguments: list[str]) -> Any:
    """The options; raises InputError for any that are wrong."""
    top = measure.parser("operators", __doc__, seconds=10.0)
    top.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, … (cpu)")
    top.add_argument("--sizes", type=count, nargs="+", metavar="N",
                     help="coordinates (1e3 1e4 16384 1e5 1e6; on a GPU 1e4 to 1e8)")  # fmt: skip
    top.add_argument("--unroll", type=count, nargs="+", metavar="T",
                     help="steps (of a step 1, of a meta-gradient 20)")  # fmt: skip
    top.add_argument("--most", type=count, metavar="K",
                     help="no row of more coordinate-steps, N·T (2e6; on a GPU 1e8)")  # fmt: skip
    top.add_argument("--threads", type=count, nargs="+", default=[1], metavar="K", help="(1)")
    top.add_argument("--odd", action="store_true", help="the odd form of φ")
    top.add_argument("--theta-input", action="store_true", help="φ that sees θ")
    top.add_argument("--no-compile", action="store_false", dest="compiled",
                     help="leave torch.compile out")  # fmt: skip
    top.add_argument("--no-memory", action="store_false", dest="memory",
                     help="do not measure memory")  # fmt: skip
    options = measure.parse(top, arguments)
    sizes, most = DEFAULTS[options.device.type]
    options.sizes, options.most = options.sizes or sizes, options.most or most
    options.unroll = dict.fromkeys(UNROLL, options.unroll) if options.unroll else UNROLL
    if max(options.threads) > cores():
        raise InputError(f"--threads {max(options.threads)} is more than the {cores()} cores here")
    options.form = {"odd": options.odd, "theta_input": options.theta_input}
    return options


def ready(operator: str, case: Case, options: Any) -> tuple[dict[str, Peer], dict[str, str]]:
    """The peers that run here, each checked against the reference, and why the others do not."""
    built, unavailable = {}, {}
    table = peers.builders(operator, options.backend, options.device, options.compiled)
    for name, build in table.items():
        try:
            peer = build(case)
            peers.check(operator, case, name, peer)
            built[name] = peer
        except Unavailable as error:
            unavailable[name] = str(error)
        except RuntimeError as error:
            if name == OURS and not isinstance(error, torch.OutOfMemoryError):
                raise
            unavailable[name] = reason(error)
    return built, unavailable


def reason(error: RuntimeError) -> str:
    """Why a peer does not run, without what PyTorch advises."""
    first = str(error).split("\n")[0]
    return f"fails here: {'. '.join(first.split('. ')[:2])}"


def measured(
    operator: str, n: int, steps: int, threads: int, options: Any, rates: dict[str, Any]
) -> dict[str, Any]:
    """One row: check every peer against the reference, then clock them all.

    Returns:
        operator, n, unroll, threads; "peers": name -> median and quartiles in ns per
        coordinate-step, with a note; "unavailable": name -> why; "floors": see `limits.floors`,
        whose rates are those of one thread, or a GPU.
    """
    torch.set_num_threads(threads)
    row = {"operator": operator, "n": n, "unroll": steps, "threads": threads}
    row |= {"peers": {}, "floors": {}}
    try:
        case = make_case(n, steps, device=options.device, **options.form)
    except torch.OutOfMemoryError as error:
        return {**row, "unavailable": {"all": reason(error)}}
    built, row["unavailable"] = ready(operator, case, options)
    runs = {name: peer.run for name, peer in built.items()}
    samples = measure.interleave(runs, options.seconds, device=options.device)
    for name, peer in built.items():
        row["peers"][name] = {**measure.summary(samples[name], peer.scale), "note": peer.note}
    if threads == 1:
        row["floors"] = limits.floors(operator, case, rates)
    return row


def lines(row: dict[str, Any]) -> str:
    """A row of the table: a line a peer, ours first."""
    head = f"{row['operator']:<14}{row['n']:>10}{row['unroll']:>4}{row['threads']:>4}  "
    ours, cells = row["peers"].get(OURS, {"median": float("nan")})["median"], []
    for name, found in row["peers"].items():
        spread, ratio = measure.spread(found), found["median"] / ours
        cells.append(f"{name:<21}{ratio:>7.2f}×{spread:>21}  {found['note']}".rstrip())
    for name, least in row["floors"].items():
        cells.append(f"{'floor: ' + name:<21}{least / ours:>7.2f}×{least:>21.3g}")
    cells += [f"{name:<21}{'–':>8}  {why}" for name, why in row["unavailable"].items()]
    return head + ("\n" + " " * len(head)).join(cells)


def peak_memory(options: Any) -> dict[str, Any]:
    """Peak extra memory of a meta-gradient, for each peer: see `memory.peak_extra`."""
    n, steps = MEMORY_CASE
    print(f"\npeak extra memory of a meta-gradient, N = {n}, T = {steps}, one thread:")
    about, found = (options.backend, options.device, options.compiled), {}
    for name in peers.builders("meta_gradient", *about):
        if name not in peers.YARDSTICKS:
            found[name] = memory.peak_extra(name, n, steps, options.form, *about[:2])
            size = found[name].get("unavailable") or f"{found[name]['bytes'] / 1e6:9.1f} MB"
            print(f"    {name:<15}{size}", flush=True)
    return {"n": n, "unroll": steps, "peers": found}


def main(arguments: list[str]) -> None:
    """Parse, measure, print, write."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    meta = make_case(1, 1, **options.form).meta
    report = limits.machine("operators", arguments, options.backend, options.device)
    report |= {"phi": meta.settings, "flops_per_coordinate_step": flops(meta), "rows": []}
    print(f"{limits.where(report)}, {flops(meta)} operations a coordinate-step\n\n"
          f"{'operator':<14}{'N':>10}{'T':>4}{'thr':>4}  {'peer':<21}{'/ ours':>8}"
          f"{'ns [quartiles]':>21}")  # fmt: skip
    cases = [
        (operator, n, steps, threads)
        for threads in options.threads
        for operator in peers.OPERATORS
        for steps in options.unroll[operator]
        for n in options.sizes
        if n * steps <= options.most
    ]
    for case in cases:
        row = measured(*case, options, report["rates"])
        gc.collect()
        if options.device.type == "cuda":  # its memory is for other programs, too
            torch.cuda.empty_cache()
        print(lines(row), flush=True)
        report["rows"].append(row)
        write_json(options.out / "operators.json", report)  # in case it is stopped
    report["memory"] = peak_memory(options) if options.memory else None
    write_json(options.out / "operators.json", report)
    print(f"\n{options.out}: operators.json")


if __name__ == "__main__":
    run_as_script("operators.py", main)
