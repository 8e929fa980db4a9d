"""Runs the engine's operators on a GPU, for a profiler or a sanitizer to look at.

compute-sanitizer --tool memcheck python -m bench.kernels --every-form
ncu --profile-from-start off python -m bench.kernels --sizes 1e6
python -m bench.kernels --sizes 1e6 --times

A profiler that starts when the program says so (`--profile-from-start off`) sees the operators
alone, each once and warm. `--every-form` is for a sanitizer: small cases of every form, dtype and
shape of φ, sizes beside those of warps and blocks, and the differentiable step.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bench import measure
from bench.case import Case, make_case
from bench.measure import count
from l2l_ref.backend import operators, use_tensor_cores
from l2l_ref.experiment.cli import run_as_script

OPERATORS = ("step", "meta_gradient", "differentiable_step")
UNROLL = 20  # steps of a meta-gradient
SMALL = (1, 31, 33, 257, 1000)  # coordinates of --every-form
SHAPES = ((1, 20), (2, 20), (3, 20), (2, 1), (2, 33))  # layers and units, at SMALL[2] coordinates


def cases(options: Any) -> Iterator[Case]:
    """The paper's φ at `--sizes`, or small cases of every kind."""
    if not options.every_form:
        for n in options.sizes:
            yield make_case(n, UNROLL, device=options.device)
        return
    for odd, theta_input in product((False, True), repeat=2):
        common = {"device": options.device, "odd": odd, "theta_input": theta_input}
        for n in SMALL:
            yield make_case(n, 3, **common)
        for (layers, units), dtype in product(SHAPES, (torch.float32, torch.float64)):
            shape = {"num_layers": layers, "hidden_size": units}
            yield make_case(SMALL[2], 3, dtype=dtype, **shape, **common)


def prepared(operator: str, case: Case, backend: str) -> Callable[[], tuple[Tensor, ...]]:
    """One of OPERATORS, to be called on copies of what it changes; returns all that it wrote."""
    ours, form = operators(backend, case.state), case.meta.form
    theta, state, gradient = case.theta.clone(), case.state.clone(), case.gradients[0]
    if operator == "meta_gradient":
        return lambda: (ours.unroll_meta_gradient(*case.unroll, **form),)
    if operator == "differentiable_step":
        inputs = [x.clone().requires_grad_() for x in (theta, gradient, state, case.phi)]
        ones = [torch.ones_like(theta), torch.ones_like(state)]
        return lambda: torch.autograd.grad(ours.theta_step(*inputs, **form), inputs, ones)

    def step() -> tuple[Tensor, ...]:
        ours.theta_step_([theta], [gradient], [state], case.phi, **form)
        return theta, state

    return step


@contextmanager
def watched(options: Any) -> Iterator[None]:
    """Where the profilers look: a CUDA profiler's range, and PyTorch's for `--times`."""
    kind = options.device.type
    wait = torch.cuda.synchronize if kind == "cuda" else lambda: None
    activity = getattr(torch.profiler.ProfilerActivity, kind.upper())
    times = torch.profiler.profile(activities=[activity]) if options.times else nullcontext()
    wait()
    with torch.cuda.profiler.profile() if kind == "cuda" else nullcontext(), times:
        yield
        wait()
    if options.times:
        key = "self_device_time_total" if kind == "cuda" else "self_cpu_time_total"
        print(times.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=100))


def main(arguments: list[str]) -> None:
    """Parse and run: twice, of which the second time is watched; every form once."""
    top = measure.parser("kernels", __doc__)
    top.set_defaults(backend="fused")
    top.add_argument("--device", default="cuda", metavar="D", help="cuda, cuda:1, … (cuda)")
    top.add_argument("--operators", choices=OPERATORS, nargs="+",
                     help="(step and meta_gradient; with --every-form all)")  # fmt: skip
    top.add_argument("--sizes", type=count, nargs="+", default=[1_000_000], metavar="N")
    top.add_argument("--every-form", action="store_true", help="small cases of every kind")
    top.add_argument("--times", action="store_true", help="print what PyTorch's profiler sees")
    top.add_argument("--tensor-cores", action="store_true", help="in the steps that they serve")
    options, done = measure.parse(top, arguments), 0
    if options.tensor_cores:
        use_tensor_cores(True)
    chosen = options.operators or (OPERATORS if options.every_form else OPERATORS[:2])
    for case in cases(options):
        calls = {name: prepared(name, case, options.backend) for name in chosen}
        for name, call in calls.items():
            if not all(result.cpu().isfinite().all() for result in call()):
                raise AssertionError(f"{name} of {len(case.theta)} coordinates is not finite")
            done += 1
        if not options.every_form:
            with watched(options):
                for call in calls.values():
                    call()
    print(f"{done} cases of {', '.join(chosen)} on {options.device}")


if __name__ == "__main__":
    run_as_script("kernels.py", main)
