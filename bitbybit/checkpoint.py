"""Checkpoints of hashed networks: what they are, read from the file itself where need be.

A checkpoint is a state dict.  Beside it may lie a card, ``<stem>.json``, with the model's name,
hash configuration and accuracies; without one, both are worked out from the state dict's keys
and shapes, so that a checkpoint made elsewhere needs no further word.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bitbybit.errors import CheckpointError, CheckpointWarning, ConfigError
from bitbybit.patching import COMMON, HASHABLE, HashConfig, hash_config_of, patch_model
from bitbybit.spec import INTEGER, PATCH, PIXEL
from bitbybit.training.run_folder import RunFolder
from bitbybit.utils.files import atomic_path, save_tensors, sha256, write_json
from bitbybit.utils.models import MODELS, load_checked, load_state_dict_file

_KERNEL_KEY = re.compile(r"^(.*)\.hash_kernels\.(\d+)\.(\d+)\._(random|learnable)_projection_matrix$")
_CARD_KINDS = {
    "model": (str,),
    "dataset": (str,),
    "sha256": (str,),
    "hash_config": (dict,),
    "test_accuracy": (float, int),
    "float_test_accuracy": (float, int),
}
_UNRECORDED = (
    "{path}: no card beside it; code_bits and projection_bits, which leave no trace in the tensors, are taken to be 1 "
    "and 8; keep the .json file beside the checkpoint, or pass its hash configuration"
)
_KERNEL_TYPES = {"random": "random_projection", "learnable": "learned_projection"}


@dataclass(frozen=True)
class Checkpoint:
    """A network rebuilt from a checkpoint.

    Attributes:
        model: patched, loaded, in eval mode.
        name: the backbone's name.
        dataset: the data set it was made for.
        hash_config: what it was patched with.
        path: the state dict's file.
        sha256: of that file.
        card: what the card beside it says; empty without one.
    """

    model: nn.Module
    name: str
    dataset: str
    hash_config: HashConfig
    path: Path
    sha256: str
    card: dict[str, Any] = field(default_factory=dict)


def card_path(checkpoint: str | Path) -> Path:
    """Where the card of a checkpoint file lies."""
    return Path(checkpoint).with_suffix(".json")


def load_checkpoint(
    path: str | Path, *, model_name: str | None = None, hash_config: HashConfig | None = None
) -> Checkpoint:
    """Rebuilds the network of a checkpoint file or of a training run's folder.

    Args:
        path: a ``.pth`` or ``.safetensors`` file, or a run folder.
        model_name: the backbone; from the card, the file's name or the tensors when None.
        hash_config: how to patch it; from the card or the tensors when None. Tensors in integer arithmetic do not tell
            all of it, which is warned of.

    Raises:
        CheckpointError: missing, damaged, or of an architecture that is not known.
        ConfigError: the configuration does not fit the backbone.
    """
    path, card = _find(Path(path))
    state = load_state_dict_file(path)
    digest = sha256(path)
    if (card.get("sha256") or digest) != digest:
        raise CheckpointError(
            f"{card_path(path)}: expected the card of {path.name} ({digest[:12]}...), got one of "
            f"{card['sha256'][:12]}...; export the checkpoint again, or delete the card"
        )
    name = model_name or card.get("model") or guess_model(path, state)
    if name not in MODELS:
        raise CheckpointError(f"{path}: unknown model {name!r}; expected one of {', '.join(sorted(MODELS))}")
    model = MODELS[name]()
    try:
        config = hash_config if hash_config is not None else card.get("hash_config")
        if config is None:
            config = guess_hash_config(model, state)
            if any(settings.get("arithmetic") == INTEGER for settings in config.values()):
                warnings.warn(_UNRECORDED.format(path=path), CheckpointWarning, stacklevel=2)
        if config:
            patch_model(model, config)
    except (ConfigError, CheckpointError) as e:
        raise type(e)(f"{path}: {e}") from e
    load_checked(model, state, path)
    dataset = card.get("dataset") or name.split("_")[0]
    return Checkpoint(model.eval(), name, dataset, hash_config_of(model) if config else {}, path, digest, card)


def recorded_hash_config(path: str | Path) -> HashConfig | None:
    """The hash configuration that a checkpoint's card, or its run's options, name; None where neither is there.

    Raises:
        CheckpointError: what is there is damaged.
    """
    return _find(Path(path))[1].get("hash_config")


def _find(path: Path) -> tuple[Path, dict[str, Any]]:
    """The state dict's file, and what the card or the run's folder says of it."""
    folder = RunFolder(path if path.is_dir() else path.parent)
    if not path.is_dir() and (path != folder.weights or not folder.options.is_file()):
        return path, _read_card(card_path(path)) if card_path(path).is_file() else {}
    options = folder.read_options()
    if not folder.weights.is_file():
        raise CheckpointError(f"{folder.weights}: the run has not finished; resume it with 'bitbybit train --resume'")
    card = {"model": options.model, "dataset": options.dataset, "hash_config": options.hash_config or {}}
    if folder.summary.is_file():
        card |= _read_card(folder.summary)
    return folder.weights, card


def check_json_target(path: Path) -> None:
    """Checks where a command is to write JSON; a checkpoint's card may be all that tells its bits.

    Raises:
        ConfigError: the name does not end in .json, or the file is the card of a checkpoint.
    """
    if path.suffix != ".json":
        raise ConfigError(f"{path}: expected a name ending in .json, got {path.name!r}; rename it")
    for checkpoint in (path.with_suffix(".pth"), path.with_suffix(".safetensors")):
        if path.exists() and checkpoint.exists():
            raise ConfigError(f"{path}: expected a new file, got the card of {checkpoint.name}; name another")


def save_checkpoint(model: nn.Module, path: str | Path, card: dict[str, Any]) -> None:
    """Writes a state dict and its card, each whole or not at all.

    Raises:
        ConfigError: the file's name is that of its card.
        OSError: the folder cannot be written.
    """
    path = Path(path)
    if path.suffix == card_path(path).suffix:
        raise ConfigError(f"{path}: expected a name ending in .pth or .safetensors, got {path.name!r}; rename it")
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    if path.suffix == ".safetensors":
        from safetensors.torch import save

        with atomic_path(path) as partial:
            partial.write_bytes(save(state))
    else:
        save_tensors(path, state)
    write_json(card_path(path), {**card, "hash_config": hash_config_of(model), "sha256": sha256(path)})


def guess_model(path: Path, state: dict[str, Tensor]) -> str:
    """The backbone whose parameters a state dict holds; its file's name decides between equals.

    Raises:
        CheckpointError: no backbone fits.
    """
    fitting = []
    for name, build in MODELS.items():
        own = build().state_dict()
        if all(_holds(state, key, value) for key, value in own.items()):
            fitting.append(name)
    if not fitting:
        raise CheckpointError(
            f"{path}: fits none of the known backbones ({', '.join(sorted(MODELS))}); "
            "load it in Python and call compiler.compile_model"
        )
    named = [name for name in fitting if path.stem.startswith(name)]
    return (named or fitting)[0]


def _holds(state: dict[str, Tensor], key: str, value: Tensor) -> bool:
    """Whether a state dict has a backbone's parameter, or the codes of a layer in integer arithmetic in its place."""
    if key in state:
        return state[key].shape == value.shape
    layer, _, name = key.rpartition(".")
    codes = state.get(f"{layer}.code_weight")
    return name == "weight" and codes is not None and len(codes) == len(value)


def guess_hash_config(model: nn.Module, state: dict[str, Tensor]) -> HashConfig:
    """Works the configuration out of the kernels' shapes.

    Pixel tiling shows in projections that cover the channels alone; a layer of one tap, which is the
    same under both tilings, is given that of the others.  Where outputs are cut in
    several tiles, the size is the smallest power of two, else the smallest, that gives their number.
    ``projection_bits`` and ``code_bits`` leave no trace in the tensors and are taken to be 8 and 1: keep the card of a
    network with others.
    """
    grids: dict[str, dict[tuple[int, int], tuple[str, Tensor]]] = {}
    for key, value in state.items():
        if match := _KERNEL_KEY.match(key):
            layer, i, j, kind = match.groups()
            grids.setdefault(layer, {})[int(i), int(j)] = (_KERNEL_TYPES[kind], value)
    if not grids:
        return {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, HASHABLE)}
    config: HashConfig = {COMMON: {"hash_kernel_type": "none"}}
    for layer, grid in grids.items():
        if layer not in layers:
            raise CheckpointError(
                f"the checkpoint hashes a layer {layer!r} that {type(model).__name__} does not have; name its backbone"
            )
        rows, columns = (1 + max(index) for index in zip(*grid, strict=True))
        if len(grid) != rows * columns or any(value.dim() != 2 for _, value in grid.values()):
            raise CheckpointError(
                f"layer {layer!r}: expected {rows} x {columns} projection matrices, got {len(grid)}; "
                "the checkpoint is incomplete, save it again"
            )
        config[layer] = _guess_layer(layers[layer], grid, centred=f"{layer}.centre" in state)
        if f"{layer}.code_weight" in state:
            config[layer]["arithmetic"] = INTEGER
    if any(settings.get("tiling") == PIXEL for settings in config.values()):
        for layer in grids:
            weight = layers[layer].weight
            assert isinstance(weight, Tensor)
            if weight[0].numel() == weight.shape[1]:
                config[layer]["tiling"] = PIXEL
    return config


def _guess_layer(module: nn.Module, grid: dict[tuple[int, int], tuple[str, Tensor]], centred: bool) -> dict[str, Any]:
    kind, first = grid[0, 0]
    features = sum(grid[i, 0][1].shape[1] for i in range(1 + max(i for i, _ in grid)))
    columns = 1 + max(j for _, j in grid)
    weight = module.weight
    assert isinstance(weight, Tensor)
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    outputs, per_group = weight.shape[0] // groups, max(1, columns // groups)
    smallest = math.ceil(outputs / per_group)
    power = 1 << (smallest - 1).bit_length()
    return {
        "hash_kernel_type": kind,
        "hash_length": first.shape[0],
        "input_tile_size": first.shape[1],
        "output_tile_size": None if per_group == 1 else power if math.ceil(outputs / power) == per_group else smallest,
        "tiling": PIXEL if weight.dim() == 4 and features < weight[0].numel() else PATCH,
        "centring": centred,
    }


def _read_card(path: Path) -> dict[str, Any]:
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(
            f"{path}: the checkpoint's card is not readable JSON ({_reason(e)}); export it again"
        ) from e
    if not isinstance(card, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(card).__name__}; export the checkpoint again")
    for key, kinds in _CARD_KINDS.items():
        if not isinstance(card.get(key), (*kinds, type(None))):
            raise CheckpointError(
                f"{path}: expected {key} of type {kinds[0].__name__}, got {card[key]!r}; export the checkpoint again"
            )
    return card


def _reason(error: Exception) -> str:
    """What went wrong without the path, which the message has already."""
    return (error.strerror or str(error)).lower() if isinstance(error, OSError) else str(error)


def read_hash_config(path: str | Path) -> HashConfig:
    """Reads a hash configuration from a JSON file, or from the card of a checkpoint.

    Raises:
        ConfigError: missing or not a JSON object.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path}: not a readable hash configuration ({_reason(e)}); expected a JSON object") from e
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected a JSON object of layers, got {type(config).__name__}")
    if isinstance(config.get("hash_config"), dict):
        config = config["hash_config"]
    return config
