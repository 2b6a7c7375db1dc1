"""Float networks' answers to augmented batches, kept in files for the epochs that bring the same batches again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from bitbybit.training.options import TrainOptions
from bitbybit.utils.data import ImageDataset
from bitbybit.utils.files import save_tensors


class TeacherAnswers:
    """Asks once about every batch of the first epochs, and knows the answers afterwards.

    A file holds the answers of one epoch, float32[images, classes] in the order of its batches. Its name says what they
    depend on, so runs that share a folder share answers where they would be equal, and never others.

    Args:
        folder: where files are kept; made when the first is written.
        key: of everything that the answers depend on, from ``answers_key``.
        period: epochs after which batches come again.
        ask: answers float32[n, classes] to a batch float32[n, 3, h, w].
    """

    def __init__(self, folder: Path, key: str, period: int, ask: Callable[[Tensor], Tensor]) -> None:
        self.folder, self.key, self.period, self._ask = folder, key, period, ask
        self._known: Tensor | None = None
        self._new: list[Tensor] = []
        self._seen = 0

    def path(self, epoch: int) -> Path:
        """The file of an epoch, counted from 0."""
        return self.folder / f"answers-{self.key}-{epoch % self.period + 1}.pt"

    def start(self, epoch: int) -> None:
        """Begins an epoch, counted from 0; a file that cannot be read is made anew."""
        self._known, self._new, self._seen = None, [], 0
        if self.path(epoch).is_file():
            try:
                self._known = torch.load(self.path(epoch), map_location="cpu", weights_only=True)
            except Exception:  # torch raises a dozen unrelated types for a damaged file
                self.path(epoch).unlink()

    def answer(self, images: Tensor) -> Tensor:
        """Answers to the epoch's next batch, on its device."""
        start, self._seen = self._seen, self._seen + len(images)
        if self._known is not None:
            return self._known[start : self._seen].to(images.device, non_blocking=True)
        self._new.append(self._ask(images))
        return self._new[-1]

    def finish(self, epoch: int) -> None:
        """Ends an epoch whose batches were all given, and writes what was asked."""
        if self._new:
            save_tensors(self.path(epoch), torch.cat(self._new).cpu())


def answers_key(options: TrainOptions, networks: list[nn.Module], images: ImageDataset, narrow: bool) -> str:
    """Twelve hexadecimal digits that differ where answers would.

    Args:
        options: of the run: its batches and the softmax temperature.
        networks: that are asked.
        images: that batches are drawn from.
        narrow: whether products are taken in bfloat16.
    """
    digest = hashlib.sha256(repr((options.seed, options.batch_size, options.temperature, narrow)).encode())
    digest.update(repr((images.images.shape, images.mean, images.std, images.augment, images.flip)).encode())
    digest.update(images.images.tobytes())
    for network in networks:
        for name, tensor in network.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]
