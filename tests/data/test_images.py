"""Sets of images: halves, parts, and the batches of an epoch."""

from itertools import islice

import pytest
import torch
from conftest import generator

from l2l_ref.data import ImageSet
from l2l_ref.errors import InputError


@pytest.mark.parametrize("n", [2, 10, 1001, 60_000])
def test_halves_are_disjoint_equal_and_shuffled_by_the_seed(n):
    whole = ImageSet(torch.zeros(n, 1, 1, 1, dtype=torch.uint8), torch.arange(n))
    a, b = (half.labels for half in whole.halves(seed=3))
    assert len(a) == len(b) == n // 2
    both = torch.cat([a, b]).sort().values
    assert len(both.unique()) == n // 2 * 2 and 0 <= both[0] and both[-1] < n
    if n % 2 == 0:
        assert torch.equal(both, torch.arange(n))
    assert torch.equal(a, whole.halves(seed=3)[0].labels)
    if n > 2:
        assert not torch.equal(a, whole.halves(seed=4)[0].labels)
        assert not torch.equal(a, a.sort().values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_batch_scales_bytes_to_the_unit_interval(dtype):
    ramp = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    x, y = ImageSet(ramp, torch.tensor([3, 1, 4, 1])).batch(torch.tensor([3, 0]), dtype)
    assert x.dtype == dtype and x.shape == (2, 1, 8, 8) and y.tolist() == [1, 3]
    expected = torch.tensor([*range(192, 256), *range(64)], dtype=torch.float64) / 255
    tolerance = {"rtol": torch.finfo(dtype).eps, "atol": 0}
    torch.testing.assert_close(x.flatten().double(), expected, **tolerance)
    assert x.min() == 0 and x.max() == 1


def test_subset_keeps_the_order_of_its_index():
    part = numbered(20).subset(torch.tensor([7, 3]))
    assert len(part) == 2 and part.images.dtype == torch.uint8
    assert part.images.flatten().tolist() == part.labels.tolist() == [7, 3]


def numbered(n: int) -> ImageSet:
    """Each sample is its own label."""
    return ImageSet(torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1), torch.arange(n))


@pytest.mark.parametrize("n, batch_size", [(12, 4), (11, 4), (5, 5), (7, 1)])
def test_batches_see_each_sample_once_an_epoch_and_reshuffle(n, batch_size):
    stream = numbered(n).batches(batch_size, generator())
    epochs = []
    for _ in range(6):
        labels = []
        for x, y in islice(stream, n // batch_size):
            assert x.shape == (batch_size, 1, 1, 1) and x.dtype == torch.float32
            assert torch.equal((x.flatten() * 255).round().long(), y)
            labels += y.tolist()
        assert len(set(labels)) == len(labels) == n // batch_size * batch_size
        epochs.append(tuple(labels))
    assert len(set(epochs)) > 1
    assert {label for epoch in epochs for label in epoch} == set(range(n))


def test_batches_are_a_function_of_the_generator():
    def first_labels(seed):
        stream = numbered(50).batches(8, generator(seed))
        return torch.stack([y for _, y in islice(stream, 20)])

    torch.manual_seed(0)
    first = first_labels(1)
    torch.manual_seed(1)  # the global stream plays no part
    assert torch.equal(first, first_labels(1))
    assert not torch.equal(first, first_labels(2))


@pytest.mark.parametrize("batch_size", [0, -1, 11])
def test_batches_refuse_a_size_that_no_epoch_holds(batch_size):
    with pytest.raises(InputError, match=rf"batch size {batch_size} .* 10 images"):
        numbered(10).batches(batch_size, generator())  # at the call, before next()
