"""What a step of the learned optimizer costs on a ResNet-18, beside one of fused Adam.

python -m bench.resnet_step --device cuda

Clocks `LearnedOptimizer.step()` on torchvision's resnet18 with a head of 10 classes, as CIFAR-10
needs (11,181,642 parameters), with φ in the form of each recipe: on the model's 62 parameters, and
on one of as many coordinates. Gradients are random; an untrained φ does the work of
a trained one. Each optimizer is clocked alone, for the robust φ keeps 640 B a parameter. Writes
resnet_step.json into --out.
"""

from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from bench import measure
from bench.case import STEP_BYTES, Unavailable, need
from bench.transfer_step import form_of
from l2l_ref.backend import resolve
from l2l_ref.experiment import folder
from l2l_ref.experiment.cli import run_as_script
from l2l_ref.experiment.config import RECIPES
from l2l_ref.experiment.machine import keep_freed_memory
from l2l_ref.files import write_json
from l2l_ref.meta_optimizer import MetaOptimizer
from l2l_ref.optimizer import LearnedOptimizer

ADAM = "Adam (fused)"  # the ratios are over its time
CLASSES = 10


def parse(arguments: list[str]) -> Any:
    """The options; raises InputError for any that are wrong."""
    top = measure.parser("resnet_step", __doc__, device="cpu", seconds=5.0)
    top.add_argument("--threads", type=measure.count, default=1, metavar="K", help="threads (1)")
    return measure.parse(top, arguments)


def resnet(device: torch.device, one: bool) -> list[Tensor]:
    """The parameters of a ResNet-18, or one that is as large, with random gradients."""
    torch.manual_seed(0)
    params = list(resnet18(num_classes=CLASSES).to(device).parameters())
    if one:
        params = [nn.Parameter(nn.utils.parameters_to_vector(params).detach())]
    for param in params:
        param.grad = 1e-3 * torch.randn_like(param)
    return params


def learned(recipe: str, options: Any, params: list[Tensor]) -> torch.optim.Optimizer:
    """φ in the form of a recipe, as the optimizer of the parameters.

    Raises:
        Unavailable: its states, or the reference's activations, do not fit.
    """
    meta = MetaOptimizer(**form_of(recipe)).to(options.device)
    columns = sum(param.numel() for param in params) * (2 if meta.form["odd"] else 1)
    needed = 2 * 4 * meta.num_layers * 2 * meta.hidden_size * columns  # gathered at the first step
    if resolve(options.backend, options.device) == "reference":
        needed = max(needed, STEP_BYTES * columns)
    need(needed, options.device)
    return LearnedOptimizer(params, meta, backend=options.backend)


def measured(options: Any) -> dict[str, Any]:
    """Label -> milliseconds a step, median and quartiles, or {"unavailable": why}; prints each."""
    optimizers = {ADAM: (partial(torch.optim.Adam, fused=True), False)}
    for recipe, one in product(RECIPES, (False, True)):
        label = f"φ, {recipe}" + ", one tensor" * one
        optimizers[label] = partial(learned, recipe, options), one
    rows: dict[str, Any] = {}
    for label, (build, one) in optimizers.items():
        try:
            params = resnet(options.device, one)
            step = build(params).step
            step()
            step()  # what is allocated but once has been
            samples = measure.interleave({label: step}, options.seconds, device=options.device)
        except (Unavailable, torch.OutOfMemoryError) as error:
            rows[label] = {"unavailable": str(error).splitlines()[0]}
            print(f"{label:<24}{rows[label]['unavailable']}", flush=True)
            continue
        finally:
            step = None
            measure.give_back(options.device)
        found = rows[label] = measure.summary(samples[label], 1e3)
        found["ns_per_parameter"] = 1e6 * found["median"] / sum(p.numel() for p in params)
        found["over_adam"] = found["median"] / rows[ADAM]["median"]
        over = f"{found['ns_per_parameter']:>12.3f}{found['over_adam']:>10.1f}×"
        print(f"{label:<24}{measure.spread(found):>32}{over}", flush=True)
    return rows


def main(arguments: list[str]) -> None:
    """Parse, measure, print, write."""
    options = parse(arguments)
    folder.make(options.out)
    keep_freed_memory()  # as run.py does
    torch.set_num_threads(options.threads)
    parameters = sum(param.numel() for param in resnet(options.device, one=False))
    report = measure.machine("resnet_step", arguments, options.backend, options.device)
    print(f"{measure.where(report)}; resnet18, {CLASSES} classes, {parameters:,} parameters\n")
    print(f"{'optimizer':<24}{'ms per step [quartiles]':>32}{'ns/param.':>12}{'over Adam':>11}")
    report |= {"threads": options.threads, "model": "torchvision resnet18", "classes": CLASSES,
               "parameters": parameters, "optimizers": measured(options)}  # fmt: skip
    write_json(options.out / "resnet_step.json", report)
    print(f"\n{options.out}: resnet_step.json")


if __name__ == "__main__":
    run_as_script("resnet_step.py", main)
