"""Files that are not what they seem: other images called MNIST, pictures with more in them."""

import struct
import sys
import zlib

import pytest
from PIL import Image

from l2l_ref import data
from l2l_ref.errors import InputError


@pytest.fixture
def other_mnist(tmp_path):
    """100 + 50 images in MNIST's layout."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 100), ("t10k", 50)):
        labels = bytes(i % 10 for i in range(n))
        header = struct.pack(">4i", 2051, n, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + bytes(n * 784))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, n) + labels)
    return tmp_path


def test_other_images_are_not_called_mnist(other_mnist):
    assert data.load("mnist", other_mnist, strict=True).source == "other images in MNIST's layout"


def test_a_broken_torchvision_is_not_the_datas_fault(other_mnist, monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "torchvision":
                raise RuntimeError("operator torchvision::nms does not exist")

    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(InputError, match="torchvision, .* cannot be imported .*nms") as caught:
        data.load("mnist", other_mnist)
    assert "remove" not in str(caught.value)


def test_a_picture_that_is_far_too_large_is_not_decoded(tmp_path, monkeypatch):
    """13,000 × 13,000 pixels are refused by their header."""
    monkeypatch.setattr(Image.Image, "convert", None)  # who decodes it fails
    header = struct.pack(">2I5B", 13_000, 13_000, 8, 2, 0, 0, 0)

    def chunk(kind, body):
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
    for part in ("train", "test"):
        for label in range(10):
            folder = tmp_path / "cifar10" / part / f"class{label}"
            folder.mkdir(parents=True)
            (folder / "0.png").write_bytes(png)
    with pytest.raises(InputError, match="is 13000x13000 in mode RGB|exceeds limit"):
        data.load("cifar10", tmp_path)
