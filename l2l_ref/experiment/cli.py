"""The command line: its options, the Config they make, how a program ends."""

import argparse
import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial

from l2l_ref.errors import InputError, shortened
from l2l_ref.experiment.config import GROUPS, OPTIONS, Config, complete, flag, names_of
from l2l_ref.pretrained import card, list_pretrained


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
        "clean data only, and evaluate those under attack.",
        epilog="Figure 1 of the paper: run.py --dataset mnist --attack fgsm --eps 0.05 0.1 0.2 0.3",
        argument_default=argparse.SUPPRESS,
        formatter_class=partial(argparse.HelpFormatter, max_help_position=26, width=96),
        allow_abbrev=False,
    )
    groups = {title: top.add_argument_group(title) for title in GROUPS}
    for one in fields(Config):
        chosen = OPTIONS[one.name]
        if chosen.group is not None:
            groups[chosen.group].add_argument(flag(one.name), **chosen.arguments(one.type))
    return top


def parse(arguments: list[str]) -> Config:
    """The Config of a command line; InputError for anything the user can mend."""
    given = vars(parser().parse_args(arguments))
    if given.get("load") in list_pretrained():
        its_own = card(given["load"])["config"]
        given = {key: its_own[key] for key in ("dataset", "attack", "eps")} | given
    if given.get("load") and (clash := given.keys() & names_of("φ")):
        names = ", ".join(map(flag, sorted(clash)))
        raise InputError(f"--load takes φ as it was meta-trained: leave out {names}")
    return complete(given)


def run_as_script(
    name: str, main: Callable[[list[str]], object], interrupted: str = "stopped"
) -> None:
    """Run `main` on the command line; a mistake is one sentence and exit code 2, and control-C one
    and 130. `interrupted` says what there is to do about a program that stopped."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # there is none where it was closed
            stream.reconfigure(errors="replace", line_buffering=True)  # φ, ε; logs that grow
    try:
        main(sys.argv[1:])
        return
    except InputError as error:
        code, words = 2, f"{name}: {shortened(error)}"
    except OSError as error:  # no room, no permission, a disk that fails, a reader that left
        where = f"{shortened(error.filename)}: " if error.filename else ""
        code, words = 2, f"{name}: {where}{error.strerror or error} ({interrupted})"
    except KeyboardInterrupt:
        code, words = 128 + signal.SIGINT, f"\n{interrupted}"
    print(words, file=sys.stderr)
    sys.exit(code)
