"""The command line: its options, the Config they make, how a program ends."""

import argparse
import io
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial

from l2l_ref.errors import InputError
from l2l_ref.experiment.config import OPTIONS, Config, complete, names_of, require, tuples
from l2l_ref.experiment.options import META, RUN, TRANSFER, WHAT
from l2l_ref.pretrained import card


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are InputErrors, so that there is one way to fail."""

    def error(self, message: str):
        raise InputError(f"{message} (see {self.prog} --help)")


def parser() -> Parser:
    """The command line, made of the fields of `Config`."""
    top = Parser(
        prog="run.py",
        usage="run.py [options]",
        description="Meta-train an LSTM optimizer under attack, transfer it to new models that see "
        "clean data only, and judge those under attack.",
        epilog="Figure 1 of the paper: run.py --dataset mnist --attack fgsm --eps 0.05 0.1 0.2 0.3",
        argument_default=argparse.SUPPRESS,
        formatter_class=partial(argparse.HelpFormatter, max_help_position=26, width=96),
        allow_abbrev=False,
    )
    groups = {title: top.add_argument_group(title) for title in (WHAT, META, TRANSFER, RUN)}
    for one in fields(Config):
        chosen = OPTIONS[one.name]
        if chosen.group is not None:
            flag = "--" + one.name.replace("_", "-")
            groups[chosen.group].add_argument(flag, **chosen.arguments(one.type))
    groups[META].add_argument(
        "--pretrained", metavar="NAME", help="use a φ of the package (l2l_ref.list_pretrained())"
    )
    return top


def parse(arguments: list[str]) -> Config:
    """The Config of a command line.

    Raises:
        InputError: anything the user can mend.
    """
    given = vars(parser().parse_args(arguments))
    if "pretrained" in given:
        require("pretrained", "load" not in given, given["pretrained"], "given without --load")
        name = given.pop("pretrained")
        its_own = card(name)["config"]
        given = {
            **{key: its_own[key] for key in ("dataset", "attack", "eps")},
            **given,
            "load": name,
        }
    clash = sorted(given.keys() & (names_of("φ") | {"grid"})) if "load" in given else []
    if clash:
        names = ", ".join("--" + name.replace("_", "-") for name in clash)
        raise InputError(f"--load takes φ as it was meta-trained: leave out {names}")
    given = tuples(given)
    if "grid" in given:
        axes = [(name.replace("-", "_"), values) for name, values in given["grid"]]
        given["grid"] = dict(axes)
        require("grid", len(given["grid"]) == len(axes), axes, "given once for each name")
    return complete(given)


def run_as_script(
    name: str, main: Callable[[list[str]], None], interrupted: str = "stopped"
) -> None:
    """Run `main` on the command line; an InputError is one sentence and exit code 2."""
    sys.stdout, sys.stderr = (
        stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr)
    )
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not that of a notebook
            stream.reconfigure(errors="replace")  # φ and ε on a terminal that has no Greek
    try:
        main(sys.argv[1:])
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(f"\n{interrupted}")
