"""Data: archives, splits, augmentation that depends on the seed alone."""

import zipfile

import numpy as np
import pytest
import torch

from bitbybit.errors import ConfigError, DataError
from bitbybit.utils.data import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    DeviceLoader,
    ImageDataset,
    evenly_spread,
    get_loaders,
    load_arrays,
    make_loader,
    normalise,
    split_holdout,
)


def write_archive(folder, **changes):
    rng = np.random.default_rng(0)
    arrays = {
        "train_x": rng.integers(0, 256, (40, 32, 32, 3), np.uint8),
        "train_y": np.arange(40, dtype=np.uint8) % 10,
        "test_x": rng.integers(0, 256, (12, 32, 32, 3), np.uint8),
        "test_y": np.arange(12, dtype=np.uint8) % 10,
        "classes": np.array([f"c{i}" for i in range(10)]),
    }
    arrays.update(changes)
    np.savez(folder / "cifar10.npz", **arrays)
    return arrays


def test_reads_an_archive(tmp_path):
    expected = write_archive(tmp_path)
    arrays = load_arrays("cifar10", tmp_path)
    assert np.array_equal(arrays.train_x, expected["train_x"])
    assert arrays.train_y.dtype == np.int64
    assert arrays.classes[3] == "c3"


def test_loaders_of_the_hackathon(tmp_path):
    write_archive(tmp_path)
    train, test = get_loaders("cifar10", tmp_path, 16, CIFAR10_MEAN, CIFAR10_STD, 0, False)
    images, labels = next(iter(train))
    assert images.shape == (16, 3, 32, 32)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert sum(len(y) for _, y in test) == 12
    assert sum(len(y) for _, y in train) == 40


def test_test_loader_is_in_order_and_not_augmented(tmp_path):
    expected = write_archive(tmp_path)
    _, test = get_loaders("cifar10", tmp_path, 5)
    images = torch.cat([x for x, _ in test])
    assert torch.equal(images, normalise(expected["test_x"], CIFAR10_MEAN, CIFAR10_STD))


def test_digits_are_embedded_split_by_class_and_enlarged():
    arrays = load_arrays("digits")
    assert arrays.train_x.shape == (1433, 32, 32, 3)
    assert arrays.test_x.shape == (364, 32, 32, 3)
    assert len(np.unique(arrays.test_y)) == 10
    train = {x.tobytes() for x in arrays.train_x}
    assert not any(x.tobytes() in train for x in arrays.test_x)


def test_normalises_by_mean_and_deviation():
    pixels = np.full((1, 2, 2, 3), 255, np.uint8)
    x = normalise(pixels, (0.5, 0.25, 0.0), (0.5, 0.5, 2.0))
    assert x[0, :, 0, 0].tolist() == [1.0, 1.5, 0.5]


def test_augmentation_repeats_for_the_same_batch_and_differs_by_seed():
    images = np.random.default_rng(1).integers(0, 256, (8, 32, 32, 3), np.uint8)
    labels = np.arange(8)

    def batch(seed, indices):
        dataset = ImageDataset(images, labels, (0.5,) * 3, (0.5,) * 3, augment=True, seed=seed)
        return dataset.__getitems__(indices)[0]

    assert torch.equal(batch(0, [1, 2, 3]), batch(0, [1, 2, 3]))
    assert not torch.equal(batch(0, [1, 2, 3]), batch(1, [1, 2, 3]))
    assert not torch.equal(batch(0, [1, 2, 3]), batch(0, [3, 2, 1]).flip(0))


def test_augmentation_crops_and_flips_but_invents_no_pixels():
    image = np.arange(32 * 32 * 3, dtype=np.int64).reshape(1, 32, 32, 3) % 251 + 1
    dataset = ImageDataset(image.astype(np.uint8), np.zeros(1, int), (0.0,) * 3, (1.0,) * 3, augment=True)
    known = set(range(252))
    found = {round(v) for v in (dataset.__getitems__([0])[0] * 255).unique().tolist()}
    assert found <= known


def test_order_depends_on_seed_and_epoch_alone():
    dataset = ImageDataset(np.zeros((50, 2, 2, 3), np.uint8), np.arange(50), (0,) * 3, (1,) * 3, seed=3)
    one, two = make_loader(dataset, 10, shuffle=True), make_loader(dataset, 10, shuffle=True)
    first = torch.cat([y for _, y in one])
    second = torch.cat([y for _, y in one])
    assert not torch.equal(first, second)
    two.sampler.epoch = 1
    assert torch.equal(torch.cat([y for _, y in two]), second)
    assert sorted(first.tolist()) == list(range(50))


@pytest.mark.parametrize(("batch_size", "seen"), [(7, 49), (49, 49), (8, 50), (50, 50), (64, 50), (1, 50)])
def test_training_leaves_out_a_last_batch_of_one_sample(batch_size, seen):
    dataset = ImageDataset(np.zeros((50, 2, 2, 3), np.uint8), np.arange(50), (0,) * 3, (1,) * 3)
    batches = [len(y) for _, y in make_loader(dataset, batch_size, shuffle=True)]
    assert sum(batches) == seen
    assert sum(len(y) for _, y in make_loader(dataset, batch_size, shuffle=False)) == 50


def test_holdout_is_stratified_disjoint_and_repeatable():
    labels = np.repeat(np.arange(10), 30)
    kept, held = split_holdout(labels, 50)
    assert np.bincount(labels[held]).tolist() == [5] * 10
    assert sorted([*kept, *held]) == list(range(300))
    assert np.array_equal(held, split_holdout(labels, 50)[1])


def test_no_holdout_keeps_everything():
    kept, held = split_holdout(np.arange(10), 0)
    assert len(kept) == 10
    assert len(held) == 0


def test_refuses_an_unknown_data_set():
    with pytest.raises(ConfigError, match=r"'mnist'.*cifar10"):
        load_arrays("mnist")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_x": np.zeros((40, 32, 32), np.uint8)}, r"expected uint8\[n, h, w, 3\]"),
        ({"test_y": np.zeros(3, np.uint8)}, "test_y"),
        ({"classes": np.array(["a"])}, r"class names \[1\], expected \[10\]"),
        ({"classes": np.array("a")}, r"class names \[\], expected \[10\]"),
        ({"test_x": np.zeros((0, 32, 32, 3), np.uint8), "test_y": np.zeros(0, np.uint8)}, "test_x .* n above 0"),
        (
            {"test_x": np.zeros((12, 28, 28, 3), np.uint8)},
            r"\[32, 32, 3\] to train on and of \[28, 28, 3\] to test; expected one size",
        ),
    ],
)
def test_refuses_an_archive_of_other_shapes(tmp_path, changes, message):
    write_archive(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        load_arrays("cifar10", tmp_path)


@pytest.mark.parametrize("label", [1.7, -3, 10])
def test_refuses_labels_of_no_class(tmp_path, label):
    labels = write_archive(tmp_path)["test_y"].astype(type(label))
    labels[0] = label
    write_archive(tmp_path, test_y=labels)
    with pytest.raises(DataError, match=r"test_y holds .*; expected whole numbers from 0 to 9"):
        load_arrays("cifar10", tmp_path)


@pytest.mark.parametrize(("count", "wanted"), [(10_000, 2_000), (1999, 1000), (10, 10), (3, 7), (5, 1), (0, 4)])
def test_samples_are_spread_over_the_whole_split(count, wanted):
    chosen = evenly_spread(count, wanted)
    assert len(chosen) == len(set(chosen.tolist())) == min(count, wanted)
    gaps = np.diff([*chosen, count])
    assert not len(chosen) or (chosen[0] == 0 and gaps.max() - gaps.min() <= 1)


def test_refuses_a_truncated_archive(tmp_path):
    write_archive(tmp_path)
    path = tmp_path / "cifar10.npz"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match="not a readable image archive"):
        load_arrays("cifar10", tmp_path)


def not_an_archive(path):
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))


def members_that_are_no_arrays(path):
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("train_x", "train_y", "test_x", "test_y", "classes"):
            archive.writestr(name, b"text")


def encrypted(path):
    write_archive(path.parent)
    content = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(signature) + flags] |= 1
    path.write_bytes(content)


@pytest.mark.parametrize("spoil", [not_an_archive, members_that_are_no_arrays, encrypted])
def test_refuses_a_file_that_is_no_archive_of_arrays(tmp_path, spoil):
    spoil(tmp_path / "cifar10.npz")
    with pytest.raises(DataError, match="not a readable image archive"):
        load_arrays("cifar10", tmp_path)


def test_no_data_and_no_network_is_one_clear_line(tmp_path, monkeypatch):
    from torchvision import datasets

    def unreachable(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(datasets, "CIFAR10", unreachable)
    with pytest.raises(DataError, match=r"no data in .*--data-dir") as caught:
        load_arrays("cifar10", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize(("count", "batch_size"), [(50, 8), (49, 8), (48, 8), (1, 8)])
def test_device_batches_are_the_loaders(augment, count, batch_size):
    images = np.random.default_rng(0).integers(0, 256, (count, 12, 10, 3), np.uint8)
    data = ImageDataset(images, np.arange(count), (0.4, 0.5, 0.6), (0.2, 0.3, 0.2), augment=augment, seed=3)
    ours, theirs = DeviceLoader(data, batch_size, "cpu"), make_loader(data, batch_size, shuffle=True)
    assert len(ours) == len(theirs)
    for _ in range(2):  # epochs differ
        for (x, y), (wanted, labels) in zip(ours, theirs, strict=True):
            assert torch.equal(x, wanted) and torch.equal(y, labels)
