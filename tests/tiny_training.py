"""A tiny network, and the options to train it with."""

import torch
from torch import nn

from bitbybit.training import TrainOptions


class TinyNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.2)  # draws from the global generator: a resume must restore it
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x))).mean((2, 3))
        return self.fc(self.dropout(x))


def float_options(**changes):
    return TrainOptions(
        **{
            "model": "digits_tiny",
            "epochs": 3,
            "batch_size": 32,
            "holdout": 40,
            "optimizer": "sgd",
            "lr": 0.1,
            **changes,
        }
    )


def hashed_options(weights, arithmetic="float", **changes):
    settings = {"hash_kernel_type": "learned_projection", "hash_length": 16, "centring": True, "arithmetic": arithmetic}
    config = {"common_params": settings | ({"output_tile_size": None} if arithmetic == "integer" else {})}
    fixed = {"hash_config": config, "optimizer": "adam", "distill": 0.5, "projection_steps": 5}
    return float_options(weights=str(weights), **{**fixed, "lr": 1e-3, **changes})
