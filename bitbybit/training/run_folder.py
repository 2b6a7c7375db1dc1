"""The files of a training run, and the checkpoint from which it resumes exactly."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitbybit.errors import CheckpointError, ConfigError
from bitbybit.training.options import TrainOptions
from bitbybit.utils.files import atomic_path, save_tensors, write_json

METRIC_COLUMNS = ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr", "seconds")


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run: options, metrics, the resumable state and the final weights."""

    root: Path

    @property
    def options(self) -> Path:
        return self.root / "options.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.csv"

    @property
    def state(self) -> Path:
        return self.root / "last.pt"

    @property
    def weights(self) -> Path:
        return self.root / "model.pth"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    def start(self, options: TrainOptions) -> None:
        """Claims the folder for a new run.

        Raises:
            ConfigError: another run is in it.
            OSError: it cannot be written.
        """
        if self.options.exists():
            raise ConfigError(f"{self.root}: already holds a run; pass --resume to go on, or another folder")
        write_json(self.options, options.to_dict())

    def read_options(self) -> TrainOptions:
        """Reads the options of the run that is here.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        try:
            return TrainOptions.from_dict(json.loads(self.options.read_text(encoding="utf-8")))
        except OSError as e:
            reason = (e.strerror or "not readable").lower()
            raise CheckpointError(f"{self.root}: not a training run's folder; its options.json: {reason}") from e
        except (ValueError, TypeError) as e:
            raise CheckpointError(f"{self.root}: not a training run's folder; its options.json: {e}") from e

    def save_state(self, state: dict[str, Any]) -> None:
        """Replaces the resumable state."""
        save_tensors(self.state, state)

    def load_state(self) -> dict[str, Any] | None:
        """The resumable state, or None before the first epoch has ended.

        Raises:
            CheckpointError: the file is damaged.
        """
        if not self.state.is_file():
            return None
        try:
            return torch.load(self.state, map_location="cpu", weights_only=True)
        except Exception as e:  # torch raises a dozen unrelated types for a damaged file
            raise CheckpointError(f"{self.state}: damaged checkpoint; delete it to start over") from e

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Rewrites the table of epochs, so that a resumed run never repeats a row."""
        with atomic_path(self.metrics) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, METRIC_COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
