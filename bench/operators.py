"""How fast the engine's operators are, beside other ways to do the same.

python -m bench.operators --threads 1 --sizes 16384
python -m bench.operators --device cuda

Prints one table: each peer's time over ours, then ns per coordinate-step with quartiles. Writes
operators.json and operators.png into --out. The sgemm floor is the time that the operations of an
update (meta-gradient: three times as many) take in one large float32 matrix product. On a GPU a
second table has the floors of `bench/gpu.py` and the share of the larger one in our time.
"""

import os
from typing import Any

import torch

from bench import gpu, measure, memory, peers, plot
from bench.case import Peer, Unavailable, flops, make_case
from bench.measure import count
from bench.peers import ADAM, CLASS, COPY, FLOOR, GRAPH, OURS, TENSOR, XLA
from l2l_ref.errors import InputError
from l2l_ref.experiment import folder
from l2l_ref.experiment.cli import run_as_script
from l2l_ref.files import write_json

CORES = os.cpu_count() or 1
MEMORY_CASE = (16384, 20)  # N and T of the memory measurement
SHORT = {CLASS: "class", "nn.LSTM": "LSTM", "torch.compile": "compiled", FLOOR: "sgemm",
         GRAPH: "graph", TENSOR: "tensor", ADAM: "Adam"}  # fmt: skip
BOTH = (CLASS, "nn.LSTM", "torch.compile", "reference", FLOOR)
COLUMNS = {"cpu": (*BOTH, XLA), "cuda": (GRAPH, TENSOR, *BOTH, ADAM, COPY)}
DEFAULTS = {
    "cpu": {"sizes": [1000, 10_000, 16_384, 100_000, 1_000_000], "most": 2_000_000,
            "unroll": [1, 20], "threads": [k for k in (1, 2) if k <= CORES]},
    "cuda": {"sizes": [10**k for k in range(4, 9)], "most": 100_000_000,
             "unroll": {"step": [1], "meta_gradient": [20]}, "threads": [1]},
}  # fmt: skip
QUICK = {"sizes": [256, 1000], "unroll": [1, 3]}


def parse(arguments: list[str]) -> Any:
    """The options; raises InputError for any that are wrong."""
    quick = "--quick" in arguments
    top = measure.parser("operators", __doc__, device="cpu", seconds=0.1 if quick else 10.0)
    top.add_argument("--sizes", type=count, nargs="+", metavar="N",
                     help="coordinates (1e3 1e4 16384 1e5 1e6; on a GPU 1e4 to 1e8)")  # fmt: skip
    top.add_argument("--unroll", type=count, nargs="+", metavar="T",
                     help="steps (1 20; on a GPU a step 1, a meta-gradient 20)")  # fmt: skip
    top.add_argument("--most", type=count, metavar="K",
                     help="no row of more coordinate-steps, N·T (2e6; on a GPU 1e8)")  # fmt: skip
    top.add_argument("--threads", type=count, nargs="+", metavar="K",
                     help="threads (1 2; on a GPU 1)")  # fmt: skip
    top.add_argument("--odd", action="store_true", help="the odd form of φ")
    top.add_argument("--theta-input", action="store_true", help="φ that sees θ")
    top.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    top.add_argument("--no-compile", action="store_false", dest="compiled",
                     help="leave torch.compile and XLA out")  # fmt: skip
    top.add_argument("--no-memory", action="store_false", dest="memory",
                     help="do not measure memory")  # fmt: skip
    options = measure.parse(top, arguments)
    defaults = DEFAULTS[measure.kind(options.device)] | (QUICK if quick else {})
    for name, default in defaults.items():
        given = getattr(options, name)
        setattr(options, name, sorted(set(given)) if isinstance(given, list) else given or default)
    if isinstance(options.unroll, list):
        options.unroll = dict.fromkeys(peers.OPERATORS, options.unroll)
    if max(options.threads) > CORES:
        raise InputError(f"--threads {max(options.threads)} is more than the {CORES} cores here")
    options.form = {"odd": options.odd, "theta_input": options.theta_input}
    return options


def builders(operator: str, options: Any) -> dict[str, Any]:
    """Those of `peers`, as the options want them."""
    return peers.builders(operator, options.backend, options.device, options.compiled)


def ready(operator: str, case: Any, options: Any) -> tuple[dict[str, Peer], dict[str, str]]:
    """The peers that run here, each checked against the reference, and why the others do not."""
    table = builders(operator, options)
    built, unavailable, expected = {}, {}, None
    for name in sorted(table, key=lambda name: name != "reference"):  # it says what is right
        try:
            peer = table[name](case)
            if operator == "meta_gradient" and name == "reference":
                expected = peer.run()
            elif operator == "meta_gradient" and expected is None:
                raise Unavailable("not checked, for the reference does not run here")
            else:
                peers.check(operator, case, name, peer, expected)
            built[name] = peer
        except Unavailable as error:
            unavailable[name] = str(error)
        except RuntimeError as error:
            if name == OURS and not isinstance(error, torch.OutOfMemoryError):
                raise
            unavailable[name] = reason(error)
    return {name: built[name] for name in table if name in built}, unavailable


def reason(error: RuntimeError) -> str:
    """Why a peer does not run, without what PyTorch advises."""
    first = str(error).split("\n")[0]
    return f"fails here: {'. '.join(first.split('. ')[:2])}"


def measured(
    operator: str, n: int, steps: int, threads: int, options: Any, limits: dict | None
) -> dict[str, Any]:
    """One row: check every peer against the reference, then clock them all.

    Returns:
        operator, n, unroll, threads; "peers": name -> median and quartiles in ns per
        coordinate-step, with a note; "unavailable": name -> why; "ratios": name -> its median
        over ours; with `limits`, "floors": see `gpu.floors`, and the share that ours "reached".
    """
    torch.set_num_threads(threads)
    row = {"operator": operator, "n": n, "unroll": steps, "threads": threads}
    try:
        case = make_case(n, steps, device=options.device, **options.form)
    except torch.OutOfMemoryError as error:
        return {**row, "peers": {}, "unavailable": {"all": reason(error)}, "ratios": {}}
    built, unavailable = ready(operator, case, options)
    runs = {name: peer.run for name, peer in built.items()}
    samples = measure.interleave(runs, options.seconds, device=options.device)
    times = {
        name: {**measure.summary(samples[name], peer.scale), "note": peer.note}
        for name, peer in built.items()
    }
    medians = {name: found["median"] for name, found in times.items()}
    ours = medians.get(OURS)
    ratios = {name: x / ours for name, x in medians.items() if ours and name != OURS}
    row |= {"peers": times, "unavailable": unavailable, "ratios": ratios}
    if limits:
        found = gpu.floors(operator, case, limits)
        reached = {n: found["floor"] / medians[n] for n in (OURS, GRAPH, TENSOR) if n in medians}
        row["floors"] = found | {"reached": reached}
    return row


def header(columns: tuple[str, ...]) -> str:
    """The two lines above the table."""
    names = [SHORT.get(name, name) for name in columns]
    ratios = "".join(f"{name:>10}" for name in names)
    times = "".join(f"{name:>19}" for name in (OURS, *names))
    over = f"{'peer time / ours':^{len(ratios)}}"
    first = f"{'':32}{over}  {'ns per coordinate-step [quartiles]':^{len(times)}}"
    return f"{first}\n{'operator':<14}{'N':>9}{'T':>4}{'thr':>5}{ratios}  {times}"


def line(row: dict[str, Any], columns: tuple[str, ...]) -> str:
    """One row of the table, and a line for each peer that says something of itself."""
    found = row["peers"]
    ratios = {name: f"{ratio:.2f}×" for name, ratio in row["ratios"].items()}
    times = {name: f" {measure.spread(peer)}" for name, peer in found.items()}
    cells = "".join(f"{ratios.get(name, '–'):>10}" for name in columns) + "  "
    cells += "".join(f"{times.get(name, '–'):>19}" for name in (OURS, *columns))
    notes = row["unavailable"] | {
        name: peer["note"] for name, peer in found.items() if "blocks" in peer["note"]
    }
    head = f"{row['operator']:<14}{row['n']:>9}{row['unroll']:>4}{row['threads']:>5}"
    return head + cells + "".join(f"\n    {name}: {note}" for name, note in notes.items())


def speedups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Time of ours on the fewest threads over that on each other number of threads."""
    keys, base, found = ("operator", "n", "unroll"), {}, []
    for row in (row for row in rows if OURS in row["peers"]):  # the fewest threads come first
        case, ours = {key: row[key] for key in keys}, row["peers"][OURS]["median"]
        fewest, one = base.setdefault(tuple(case.values()), (row["threads"], ours))
        if row["threads"] > fewest:
            case |= {"threads": row["threads"], "over": fewest, "speedup": one / ours}
            found.append(case)
    return found


def peak_memory(options: Any) -> dict[str, Any]:
    """Peak extra memory of a meta-gradient, for each peer: see `memory.peak_extra`."""
    smallest = options.sizes[0], options.unroll["meta_gradient"][-1]
    n, steps = smallest if options.quick else MEMORY_CASE
    request = {"operator": "meta_gradient", "n": n, "steps": steps,
               "backend": options.backend, "form": options.form}  # fmt: skip
    found = {
        name: memory.peak_extra({**request, "name": name}, options.device)
        for name in builders("meta_gradient", options)
        if name not in peers.YARDSTICKS
    }
    print(f"\npeak extra memory of a meta-gradient, N = {n}, T = {steps}, one thread:")
    for name, result in found.items():
        size = f"{result['bytes'] / 1e6:9.1f} MB" if "bytes" in result else result["unavailable"]
        print(f"    {name:<15}{size}", flush=True)
    return {"n": n, "unroll": steps, "peers": found}


def main(arguments: list[str]) -> None:
    """Parse, measure, print, write."""
    options = parse(arguments)
    folder.make(options.out)
    path = options.out / "operators.json"
    limits = gpu.ceilings_of(options.device)
    meta = make_case(1, 1, **options.form).meta
    report = measure.machine("operators", arguments, options.backend, options.device)
    report |= {"threads": options.threads, "phi": meta.settings,
               "flops_per_coordinate_step": flops(meta)}  # fmt: skip
    if limits:
        report["ceilings"] = limits
    report |= {"rows": [], "speedups": [], "memory": None}
    columns = COLUMNS[measure.kind(options.device)]
    print(f"{measure.where(report)}, {flops(meta)} operations a coordinate-step\n\n"
          f"{header(columns)}")  # fmt: skip
    cases = [
        (operator, n, steps, threads)
        for threads in options.threads
        for operator in peers.OPERATORS
        for steps in options.unroll[operator]
        for n in options.sizes
        if n * steps <= options.most
    ]
    for case in cases:
        row = measured(*case, options, limits)
        measure.give_back(options.device)
        print(line(row, columns), flush=True)
        report["rows"].append(row)
        write_json(path, report)  # in case it is stopped
    report["speedups"] = speedups(report["rows"])
    for s in report["speedups"]:
        print(f"{s['threads']} threads over {s['over']}: {s['speedup']:.2f}× "
              f"({s['operator']}, N = {s['n']}, T = {s['unroll']})")  # fmt: skip
    if limits:
        print(f"\n{gpu.title(limits)}\n{gpu.table(report['rows'])}", flush=True)
    report["memory"] = peak_memory(options) if options.memory else None
    write_json(path, report)
    plot.draw(options.out / "operators.png", report)
    print(f"\n{options.out}: operators.json, operators.png")


if __name__ == "__main__":
    run_as_script("operators.py", main)
