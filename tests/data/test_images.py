"""Sets of images: halves, parts, and the batches of an epoch."""

from itertools import islice

import pytest
import torch
from conftest import generator

from l2l_ref.data import ImageSet
from l2l_ref.errors import InputError


def numbered(n: int) -> ImageSet:
    """Each sample is its own label; of a byte the pixel is the label's rest."""
    return ImageSet((torch.arange(n) % 256).to(torch.uint8).view(n, 1, 1, 1), torch.arange(n))


@pytest.mark.parametrize("n", [10, 1001])
def test_halves_are_disjoint_equal_and_shuffled_by_the_seed(n):
    whole = numbered(n)
    a, b = whole.halves(seed=3)
    both = torch.cat([a.labels, b.labels]).tolist()
    assert len(a) == len(b) == n // 2 and len(set(both)) == len(both) and set(both) <= set(range(n))
    assert torch.equal(b.images.flatten().long(), b.labels % 256)
    assert torch.equal(a.labels, whole.halves(seed=3)[0].labels)
    assert not torch.equal(a.labels, whole.halves(seed=4)[0].labels)
    assert not torch.equal(a.labels, a.labels.sort().values)


def test_a_batch_scales_bytes_to_the_unit_interval():
    ramp = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    x, y = ImageSet(ramp, torch.tensor([3, 1, 4, 1])).batch(torch.tensor([3, 0]))
    assert x.dtype == torch.float32 and x.shape == (2, 1, 8, 8) and y.tolist() == [1, 3]
    expected = torch.tensor([*range(192, 256), *range(64)], dtype=torch.float64) / 255
    torch.testing.assert_close(x.flatten(), expected.float(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("n, batch_size", [(12, 4), (11, 4), (5, 5), (7, 1)])
def test_batches_see_each_sample_once_an_epoch_and_reshuffle(n, batch_size):
    def epochs(seed):
        stream = numbered(n).batches(batch_size, generator(seed))
        for _ in range(6):
            labels = []
            for x, y in islice(stream, n // batch_size):
                assert torch.equal((x.flatten() * 255).round().long(), y) and len(y) == batch_size
                labels += y.tolist()
            assert len(set(labels)) == len(labels) == n // batch_size * batch_size
            yield tuple(labels)

    torch.manual_seed(0)
    first = list(epochs(1))
    torch.manual_seed(1)  # the global stream plays no part
    assert first == list(epochs(1)) != list(epochs(2))
    assert len(set(first)) > 1 and {label for epoch in first for label in epoch} == set(range(n))


@pytest.mark.parametrize("batch_size", [0, -1, 11])
def test_batches_refuse_a_size_that_no_epoch_holds(batch_size):
    with pytest.raises(InputError, match=rf"batch size {batch_size} .* 10 images"):
        numbered(10).batches(batch_size, generator())  # at the call, before next()
