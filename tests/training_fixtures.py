"""Data that a tiny network learns in seconds, and what it has learned."""

import numpy as np
import pytest
from tiny_training import TinyNet, float_options

from bitbybit.training import prepare as prepare_module
from bitbybit.training import train
from bitbybit.utils import models
from bitbybit.utils.data import ImageArrays


@pytest.fixture
def tiny(monkeypatch):
    rng = np.random.default_rng(0)
    centres = rng.integers(60, 200, (10, 1, 1, 3))

    def split(n):
        y = np.arange(n) % 10
        x = np.clip(centres[y] + rng.normal(0, 20, (n, 8, 8, 3)), 0, 255).astype(np.uint8)
        return x, y.astype(np.int64)

    (train_x, train_y), (test_x, test_y) = split(200), split(50)
    arrays = ImageArrays(train_x, train_y, test_x, test_y, tuple("0123456789"))
    monkeypatch.setattr(prepare_module, "load_arrays", lambda *a, **k: arrays)
    monkeypatch.setitem(models.MODELS, "digits_tiny", TinyNet)
    return arrays


@pytest.fixture
def float_weights(tiny, tmp_path):
    train(float_options(), tmp_path / "float")
    return tmp_path / "float" / "model.pth"
