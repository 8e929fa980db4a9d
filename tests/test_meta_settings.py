"""The settings of meta-training are checked when they are made."""

import pytest

from l2l_ref.errors import InputError
from l2l_ref.meta_settings import MetaSettings


@pytest.mark.parametrize(
    "name, value",
    [
        ("episodes", -1), ("steps", 0), ("unroll", 0), ("meta_lr", float("nan")), ("meta_lr", -1.0),
        ("meta_lr", float("inf")), ("input_alpha", 1.5),
        ("penalty", -0.1), ("alpha", 2.0), ("alpha", float("nan")), ("curriculum", (0.7, 0.3)),
        ("curriculum", (0.5, 1.5)), ("average", 1.0), ("average", float("nan")), ("stride", 0),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_named(name, value):
    with pytest.raises(InputError, match=f"^{name} is .*: it must be "):
        MetaSettings(**{"episodes": 5, name: value})
    MetaSettings(5)
