"""How an option is declared: a field of `Config`, of which flag, help and defaults are made."""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from types import NoneType
from typing import Any, get_args

WHAT, META, TRANSFER, RUN = "experiment", "meta-training", "transfer and evaluation", "the run"
TITLES = {"cifar10": "CIFAR-10", "fgsm": "FGSM", "pgd": "PGD"}


def number(text: str) -> float:
    """A float, or a fraction such as 8/255."""
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number or a fraction") from None


def path(text: str) -> str:
    """A path, its ~ expanded, which a shell leaves alone after a =."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("it is empty, or no path at all")
    return os.path.expanduser(text)


@dataclass(frozen=True)
class Option:
    """What a field's metadata say of it.

    Attributes:
        group: of the help; None for a setting without a flag.
        help: one sentence; what the defaults are comes after it by itself.
        default: where no exception holds.
        exceptions: {words: the value there}, of which the last that holds wins. Words are a data
            set, an attack, a recipe or "quick"; all must be those of the run. The recipe "penalty"
            is "robust" too.
        of: "φ" for what a loaded φ brings along, "place" for what may change when a run is
            continued.
        said: of the default, in words.
        opposite: of a switch, whether there is a --no-switch too.
        kind: parses an argument, where the field's type does not say how.
    """

    group: str | None = None
    help: str = ""
    default: Any = None
    exceptions: dict[str, Any] = field(default_factory=dict)
    choices: tuple[str, ...] | None = None
    metavar: str | None = None
    of: str = ""
    said: str | None = None
    opposite: bool = False
    kind: Callable[[str], Any] | None = None

    def value(self, words: set[str]) -> Any:
        """The default of a run that these words describe."""
        value = self.default
        for needed, other in self.exceptions.items():
            if words.issuperset(needed.split()):
                value = other
        return value

    def sentence(self) -> str:
        """The help, with the defaults behind it."""
        if self.said is not None or self.default is None or self.default is False:
            return self.help + (f" ({self.said})" if self.said else "")
        shown = [show(self.default)]
        for words, other in self.exceptions.items():
            if "quick" not in words:
                where = " ".join(TITLES.get(word, word) for word in words.split())
                shown.append(f"{where}: {show(other)}")
        return f"{self.help} ({'; '.join(shown)})"

    def arguments(self, type_: Any) -> dict[str, Any]:
        """Those of `add_argument`, for a field of that type."""
        text = self.sentence().replace("%", "%%")
        if type_ is bool:
            action = argparse.BooleanOptionalAction if self.opposite else "store_true"
            return {"action": action, "help": text}
        inner = [one for one in get_args(type_) if one not in (NoneType, Ellipsis)]
        kind = self.kind or (inner or [type_])[0]
        several = len(get_args(type_)) > 1 and NoneType not in get_args(type_)
        return {
            "type": number if kind is float else kind,
            "nargs": (2 if inner[1:] == inner[:1] else "+") if several else None,
            "choices": self.choices,
            "metavar": self.metavar or (None if self.choices else "N" if kind is int else "X"),
            "help": text,
        }


def show(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, tuple):
        return " ".join(map(show, value))
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)


def option(*positional: Any, **more: Any) -> Any:
    """The field of an `Option`; it has no default of its own, as that depends on the run."""
    return field(metadata={"option": Option(*positional, **more)})
