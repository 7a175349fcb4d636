import numpy as np
import pytest
import torch

from visattn.data import cluttered_digits
from visattn.data.digits import draw


@pytest.fixture(scope="module")
def data():
    return cluttered_digits(train=200, val=100)


def test_default_is_four_thousand_and_one_thousand_balanced_digits():
    data = cluttered_digits()
    assert (len(data.train.labels), len(data.val.labels)) == (4000, 1000)
    assert data.train.labels.bincount().tolist() == [400] * 10
    assert data.val.labels.bincount().tolist() == [100] * 10


def test_no_source_digit_is_in_both_splits():
    data = cluttered_digits()
    train = {digit.tobytes() for digit in data.train.digits}
    val = {digit.tobytes() for digit in data.val.digits}
    assert not train & val


def test_image_holds_the_whole_digit_brightened_by_clutter_only():
    rng = np.random.default_rng(0)
    digits = rng.integers(0, 256, size=(5, 28, 28), dtype=np.uint8)
    images, _ = draw(digits, rng)
    assert images.shape == (5, 60, 60)
    for image, digit in zip(images, digits, strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(image, (28, 28)).reshape(-1, 28, 28)
        # clutter adds light, and covers at most 4 * 64 of the 784 pixels
        there = (windows >= digit).all(axis=(1, 2)) & ((windows == digit).mean(axis=(1, 2)) > 0.6)
        assert there.sum() == 1


def test_clutter_is_there_and_sums_are_clipped_not_wrapped():
    images, _ = draw(np.full((6, 28, 28), 255, dtype=np.uint8), np.random.default_rng(1))
    assert set(np.unique(images)) == {0, 255}
    assert (images.reshape(6, -1) > 0).sum(axis=1).max() > 28 * 28


def test_training_images_change_with_seed_and_epoch_alone(data):
    indices = torch.tensor([7, 3, 150])
    first = data.train.batch(indices, seed=1, epoch=2)
    data.train.batch(indices, seed=1, epoch=3)
    assert torch.equal(first, data.train.batch(indices, seed=1, epoch=2))
    assert torch.equal(first[1:2], data.train.batch(indices[1:2], seed=1, epoch=2))
    assert not torch.equal(first, data.train.batch(indices, seed=1, epoch=3))
    assert not torch.equal(first, data.train.batch(indices, seed=2, epoch=2))


def test_validation_images_are_fixed(data):
    indices = torch.tensor([0, 99])
    assert torch.equal(data.val.batch(indices, seed=0, epoch=0), data.val.batch(indices, seed=5, epoch=9))
    assert data.val.pictures(indices).shape == (2, 60, 60)


def test_batches_are_normalised():
    data = cluttered_digits()
    batch = data.train.batch(torch.arange(4000), seed=0, epoch=0)
    assert batch.shape == (4000, 1, 60, 60)
    assert abs(batch.mean().item()) < 0.05
    assert abs(batch.std().item() - 1) < 0.05


def test_another_seed_splits_otherwise():
    one, two = cluttered_digits(0, train=200, val=100), cluttered_digits(1, train=200, val=100)
    assert not np.array_equal(one.train.digits, two.train.digits)
    assert one.fingerprint != two.fingerprint


def test_more_digits_than_there_are():
    with pytest.raises(ValueError, match=r"at most 5000 together, got train=4000, val=2000"):
        cluttered_digits(train=4000, val=2000)
