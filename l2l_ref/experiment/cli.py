"""The command line: its options, the Config they make, how a program ends."""

import argparse
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields
from functools import partial
from typing import Any

from l2l_ref.errors import InputError, shortened
from l2l_ref.experiment.config import OPTIONS, Config, complete, names_of, require, tuples
from l2l_ref.experiment.machine import torchrun
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


class Output:
    """A stream that outlives its reader (`| head`) and its disk: what it cannot write is lost, and
    the program goes on. `lost` says why, unless its reader has left."""

    lost = ""

    def __init__(self, stream: io.TextIOWrapper):
        stream.reconfigure(errors="replace")  # φ and ε on a terminal that has no Greek
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError as error:  # what is left in its buffer, and all that follows, goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if not isinstance(error, BrokenPipeError):
                self.lost = error.strerror or str(error)
        return len(text)


class Stopped(KeyboardInterrupt):
    """A signal that ends a program, as control-C does; its one argument is the signal."""


@contextmanager
def said_once(first: bool) -> Iterator[None]:
    """Help and mistakes, which every process of torchrun meets: all but the first are silent."""
    if first:
        yield
        return
    with redirect_stdout(io.StringIO()):
        try:
            yield
        except InputError:
            sys.exit(2)


def run_as_script(
    name: str, main: Callable[[list[str]], object], interrupted: str = "stopped"
) -> None:
    """Run `main` on the command line; a mistake is one sentence and exit code 2, and a signal one
    and 128 plus its number.

    Args:
        main: may return where its results are.
        interrupted: what to say of a program that did not come to its end.
    """

    def stop(number: int, _: Any) -> None:
        raise Stopped(number)

    sys.stdout, sys.stderr = (
        Output(stream) if isinstance(stream, io.TextIOWrapper) else stream or open(os.devnull, "w")
        for stream in (sys.stdout, sys.stderr)
    )
    alone = threading.current_thread() is threading.main_thread()  # no other may have handlers
    for number in (signal.SIGTERM, signal.SIGHUP) if alone else ():
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup has SIGHUP ignored
            signal.signal(number, stop)
    try:
        results = main(sys.argv[1:])
        if lost := getattr(sys.stdout, "lost", ""):
            where = f": the results are in {results}" if results else ""
            end(2, f"{name}: standard output could not be written ({lost}){shortened(where)}")
    except InputError as error:
        end(2, f"{name}: {shortened(str(error))}")
    except OSError as error:  # no room, no permission, a disk that fails
        where = f"{error.filename}: " if error.filename else ""
        end(2, f"{name}: {shortened(where)}{error.strerror or error} ({interrupted})")
    except KeyboardInterrupt as stopped:
        first = torchrun().get("RANK", 0) == 0  # the other ranks hear of it too
        end(128 + (stopped.args or (signal.SIGINT,))[0], f"\n{interrupted}" * first)


def end(code: int, words: str) -> None:
    if words:
        print(words, file=sys.stderr)
    sys.exit(code)
