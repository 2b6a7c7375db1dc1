"""Checkpoints of the hackathon's package load strictly and answer alike.

The package is re-stated here as its documentation describes it: unfolded windows, a grid of
kernels, the brief's formula with ``torch.sign``.
"""

import inspect
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bitbybit as bb
from bitbybit.checkpoint import load_checkpoint
from bitbybit.utils.models import get_backbone
from bitbybit.utils.score import calculate_submission_score


class TheirKernel(nn.Module):
    def __init__(self, in_features, out_features, hash_length, learned):
        super().__init__()
        projection = torch.randn(hash_length, in_features)
        self.hash_length, self.learned = hash_length, learned
        if learned:
            self._learnable_projection_matrix = nn.Parameter(projection)
        else:
            self.register_buffer("_random_projection_matrix", projection)

    def forward(self, x, weights):
        projection = self._learnable_projection_matrix if self.learned else self._random_projection_matrix
        x_norm, w_norm = x.norm(dim=1, keepdim=True), weights.norm(dim=1, keepdim=True)
        h_x = torch.sign(x / (x_norm + 1e-12) @ projection.T)
        h_w = torch.sign(weights / (w_norm + 1e-12) @ projection.T)
        s = h_x @ h_w.T / self.hash_length
        return torch.cos(math.pi / 2 * (1 - s)) * x_norm * w_norm.T


class TheirLayer(nn.Module):
    def __init__(self, module, input_tile, output_tile, hash_length, learned):
        super().__init__()
        self.weight, self.bias = module.weight, module.bias
        self.module = (module,)
        features, outputs = self.weight[0].numel(), len(self.weight)
        self.input_tile, self.output_tile = input_tile, output_tile
        self.hash_kernels = nn.ModuleList(
            nn.ModuleList(
                TheirKernel(min(input_tile, features - i), min(output_tile, outputs - j), hash_length, learned)
                for j in range(0, outputs, output_tile)
            )
            for i in range(0, features, input_tile)
        )

    def forward(self, x):
        module = self.module[0]
        if isinstance(module, nn.Linear):
            rows = x
        else:
            rows = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
            n, _, positions = rows.shape
            rows = rows.transpose(1, 2).flatten(0, 1)
        weight = self.weight.flatten(1)
        columns = []
        for j, start in enumerate(range(0, len(weight), self.output_tile)):
            w = weight[start : start + self.output_tile]
            total = 0
            for i, low in enumerate(range(0, rows.shape[1], self.input_tile)):
                tile = slice(low, low + self.input_tile)
                total = total + self.hash_kernels[i][j](rows[:, tile], w[:, tile])
            columns.append(total)
        y = torch.cat(columns, 1)
        if self.bias is not None:
            y = y + self.bias
        if isinstance(module, nn.Linear):
            return y
        size = [
            (s + 2 * p - d * (k - 1) - 1) // t + 1
            for s, p, d, k, t in zip(
                x.shape[2:], module.padding, module.dilation, module.kernel_size, module.stride, strict=True
            )
        ]
        return y.view(n, positions, -1).transpose(1, 2).view(n, -1, *size)


def their_model(name, hash_length, learned, tile):
    torch.manual_seed(5)
    model = get_backbone(name, pretrained=False)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            model.set_submodule(path, TheirLayer(module, tile, tile, hash_length, learned))
    with torch.no_grad():  # one training batch, so that batch norm keeps activations of a sane size
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        model(torch.randn(16, 3, 32, 32))
    return model.eval()


@pytest.mark.parametrize("kernel_type", ["random_projection", "learned_projection"])
@pytest.mark.parametrize(
    ("name", "hash_length", "tile"), [("cifar10_resnet20", 256, 256), ("cifar100_resnet20", 96, 64)]
)
def test_their_checkpoint_loads_strictly_and_gives_the_same_logits(tmp_path, name, hash_length, tile, kernel_type):
    theirs = their_model(name, hash_length, kernel_type == "learned_projection", tile)
    model = get_backbone(name, pretrained=False)
    config = {
        "common_params": {
            "hash_kernel_type": kernel_type,
            "hash_length": hash_length,
            "input_tile_size": tile,
            "output_tile_size": tile,
        }
    }
    bb.patch_model(model, config)
    model.load_state_dict(theirs.state_dict(), strict=True)
    path = tmp_path / "submission.pth"
    torch.save(theirs.state_dict(), path)
    loaded = load_checkpoint(path, model_name=name)
    # float64: in float32 the order of a sum decides the bits whose projection is within rounding of
    # zero, and in a network of random weights one such bit changes the whole answer
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs.double()(images)
        # 1e-4 as promised; float64 and the fitted sine (7e-9) leave far less
        torch.testing.assert_close(model.double().eval()(images), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(loaded.model.double()(images), expected, rtol=1e-4, atol=1e-4)


def test_public_names_are_where_participants_expect_them():
    for name in ("patch_model", "patch", "HashLinear", "HashConv2d", "RandomProjKernel", "LearnedProjKernel"):
        assert callable(getattr(bb, name))
    assert bb.kernel.kernel_factory is bb.kernel_factory
    assert bb.nn.HashLinear is bb.HashLinear
    assert bb.utils.models.get_backbone is get_backbone
    from bitbybit.config.resnet20 import resnet20_full_patch_config
    from bitbybit.utils import data

    assert resnet20_full_patch_config["conv1"]["input_tile_size"] == 256
    assert data.CIFAR10_MEAN == (0.4914, 0.4822, 0.4465)
    assert data.CIFAR100_STD == (0.2673, 0.2564, 0.2762)


def test_public_signatures_hold():
    score = inspect.signature(calculate_submission_score).parameters
    assert list(score) == ["model", "acc_drop", "delta", "gamma"]
    assert (score["delta"].default, score["gamma"].default) == (0.15, 0.5)
    loaders = inspect.signature(bb.utils.data.get_loaders).parameters
    assert list(loaders) == ["dataset_name", "data_dir", "batch_size", "mean", "std", "num_workers", "pin_memory"]
    for layer in (bb.HashLinear, bb.HashConv2d):
        names = list(inspect.signature(layer.from_torch_module).parameters)
        assert names[:5] == ["module", "input_tile_size", "output_tile_size", "hash_kernel_type", "hash_length"]
    bb.RandomProjKernel(4, 2, 8)
    assert bb.kernel_factory("random_projection", 4, 2, 8).projection_matrix.shape == (8, 4)
