"""Which data set an artifact was made for: its checkpoint's card says it, or its own metadata show it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bitbybit.errors import ConfigError

if TYPE_CHECKING:
    from bitbybit.checkpoint import Checkpoint
    from bitbybit.utils.data import DatasetSpec
    from runtime.metadata import Metadata
    from runtime.model import Model

_DIGITS = 1e-4  # of mean and std: what four written digits leave open


def own_dataset(backbone: str) -> str:
    """The data set that a backbone is named after, and its float weights are trained on."""
    return backbone.split("_")[0]


def dataset_of(model: Model, checkpoint: Checkpoint | None) -> str:
    """The data set of an artifact.

    1. What the card of its own checkpoint names, unless classes or normalisation are another data set's.
    2. Without a card, the data set with the artifact's number of classes and normalisation.

    Args:
        model: the artifact.
        checkpoint: what lies beside it, or None.

    Raises:
        ConfigError: none is named or none fits; the message does not name the file.
    """
    from bitbybit.utils.data import DATASETS

    metadata = model.metadata
    if len(metadata.mean) != 3 or len(metadata.std) != 3 or not all(metadata.std):
        raise ConfigError("expected a mean and a std other than 0 for 3 channels; compile it with those of its data")
    count = len(metadata.classes) or model.outputs[0].shape[-1]
    alike = [name for name, spec in DATASETS.items() if _normalised_alike(spec, metadata)]
    fitting = [name for name in alike if DATASETS[name].num_classes == count]
    if checkpoint is not None and checkpoint.sha256 == metadata.checkpoint_sha256 and checkpoint.card.get("dataset"):
        named = checkpoint.dataset
        if named not in DATASETS:
            raise ConfigError(f"its card names the data set {named!r}; expected one of {', '.join(DATASETS)}")
        if DATASETS[named].num_classes != count or (alike and named not in alike):
            raise ConfigError(f"its card names {named}, its {count} classes or normalisation differ; compile it again")
        return named
    if not fitting:
        raise ConfigError(
            f"its {count} classes and normalisation are those of no data set ({', '.join(DATASETS)}); "
            "put its checkpoint and card beside it"
        )
    own = own_dataset(metadata.model)
    return own if own in fitting else fitting[0]


def _normalised_alike(spec: DatasetSpec, metadata: Metadata) -> bool:
    return np.allclose([spec.mean, spec.std], [metadata.mean, metadata.std], rtol=0, atol=_DIGITS)
