"""Prints this interpreter's path if its environment has what pyproject.toml asks for.

    python tools/active_env.py [PACKAGE ...]      # PACKAGE: asked for as well

Where something is lacking it prints nothing, and says on stderr what. The Makefile runs it with the
interpreter of the active environment, which may be any Python.
"""

import os
import re
import sys
from importlib.metadata import PackageNotFoundError, version


def numbers(text):
    """'2.11.0+cpu' -> (2, 11, 0)"""
    return tuple(int(n) for n in re.match(r"[\d.]*\d", text).group().split("."))


def lacks(name, least):
    try:
        return numbers(version(name)) < numbers(least or "0")
    except PackageNotFoundError:
        return True


def lacking(pyproject, extra):
    """What is not here of `pyproject` (its text) and `extra`: a list such as ['torch>=2.11']."""
    python = re.search(r'^requires-python = ">=([\d.]+)"', pyproject, re.M).group(1)
    if sys.version_info < numbers(python):
        return ["python>=" + python]
    listed = re.search(r"^dependencies = \[(.*?)\]", pyproject, re.M | re.S).group(1)
    needed = [r.partition(">=") for r in re.findall(r'"(.+?)"', listed) + extra]
    return [name + sign + least for name, sign, least in needed if lacks(name, least)]


if os.path.isdir(".venv") and os.path.samefile(sys.prefix, ".venv"):
    sys.exit()  # the checkout's own: make keeps it up to date
with open("pyproject.toml") as file:
    missing = lacking(file.read(), sys.argv[1:])
if missing:
    print(f"{sys.prefix} is active but lacks {', '.join(missing)}: using .venv", file=sys.stderr)
else:
    print(sys.executable)
