"""Figures that come out the same whatever the user's matplotlib is set to."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from l2l_ref.files import replace_with


@contextmanager
def own_style() -> Iterator[None]:
    """Decorates what draws: matplotlib's own style holds, no `matplotlibrc`, and no MPLBACKEND,
    which may name one that is not there. A `$` in a text is a dollar."""
    environment = {key: v for key, v in os.environ.items() if key != "MPLBACKEND"}
    with patch.dict(os.environ, {**environment, "MATPLOTLIBRC": os.devnull}, clear=True):
        import matplotlib.style

    with matplotlib.style.context("default"), matplotlib.rc_context({"text.parse_math": False}):
        yield


def save_png(figure: Any, path: Path, dpi: int) -> None:
    """Write a `matplotlib.figure.Figure`, whole or not at all; logarithmic axes have plain numbers,
    for what matplotlib puts there in their place is formulas, with a `$`."""
    from matplotlib.ticker import LogFormatter, NullFormatter

    for panel in figure.axes:
        for axis in (panel.xaxis, panel.yaxis):
            if axis.get_scale() != "linear":
                axis.set_major_formatter(LogFormatter())
                if not isinstance(axis.get_minor_formatter(), NullFormatter):
                    axis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
    replace_with(path, lambda partial: figure.savefig(partial, format="png", dpi=dpi))
