"""Files are whole or not there, what has changed is refused, and a lock has one holder."""

import fcntl
import math
import os
import random

import pytest
import torch

import run
from l2l_ref.errors import InputError
from l2l_ref.files import (
    locked,
    plain,
    read_checkpoint,
    read_json,
    replace_with,
    sealed,
    write_checkpoint,
    write_json,
)


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "new" / "a.txt"
    replace_with(path, lambda partial: partial.write_text("old"))

    def half(partial):
        partial.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        replace_with(path, half)
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "write, read",
    [
        (write_checkpoint, read_checkpoint),
        (lambda path, value: write_json(path, sealed(plain(value))),
         lambda path: read_json(path, "delete it")),
    ],
    ids=["checkpoint", "JSON"],
)  # fmt: skip
def test_a_flip_is_refused(tmp_path, write, read):
    path, noise = tmp_path / "a", random.Random(0)
    value = {"name": "φ", "losses": [1.5, 2.0], "of": {"seed": 0}}
    write(path, value)
    assert read(path) == value
    content = path.read_bytes()
    for _ in range(200):
        flipped = bytearray(content)
        flipped[noise.randrange(len(content))] ^= 1 << noise.randrange(8)
        path.write_bytes(flipped)
        try:
            assert read(path) == value  # a flip in the blanks of JSON
        except InputError as error:
            assert str(path) in str(error)


def test_what_executes_is_not_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    path = tmp_path / "a.pt"
    write_checkpoint(path, {"evil": Evil()})
    with pytest.raises(Exception, match="eights_only"):
        read_checkpoint(path)
    torch.save({"evil": Evil()}, path)  # without the seal
    for content in (path.read_bytes(), b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match="a.pt cannot be read"):
            read_checkpoint(path)
    assert not (tmp_path / "executed").exists()


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"loss": (1.0, math.nan, -math.inf), 2: torch.tensor(3).item()})
    assert "NaN" not in (text := (tmp_path / "a.json").read_text()) and "Infinity" not in text
    assert plain({"a": (1, math.nan), 2: None}) == {"a": [1, None], "2": None}


def test_one_process_holds_a_lock(tmp_path):
    path = tmp_path / "a.lock"
    with locked(path) as first:
        with locked(path, wait=False) as second:
            assert first and not second
    with locked(path, wait=False) as again:
        assert again


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(InputError, match="--out .* cannot be written .No locks available.: name"):
        run.main(["--dataset", "quadratic", "--quick", "--out", str(tmp_path / "r")])
