"""``patch_model``: replaces the layers of a network by hash layers, as a configuration says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from torch import nn

from bitbybit.errors import ConfigError
from bitbybit.integer import IntegerHashConv2d, IntegerHashLinear
from bitbybit.kernel import KERNELS
from bitbybit.nn import HashConv2d, HashLinear, HashSpec
from bitbybit.spec import FLOAT, INTEGER

COMMON = "common_params"
HASHABLE = (nn.Linear, nn.Conv2d)
LAYER_TYPES: dict[tuple[str, bool], type[nn.Module]] = {
    (FLOAT, True): HashLinear,
    (FLOAT, False): HashConv2d,
    (INTEGER, True): IntegerHashLinear,
    (INTEGER, False): IntegerHashConv2d,
}
HASHED = (HashLinear, HashConv2d, IntegerHashLinear, IntegerHashConv2d)
HashLayer = HashLinear | HashConv2d | IntegerHashLinear | IntegerHashConv2d

LayerConfig = dict[str, Any]
HashConfig = dict[str, LayerConfig]


def patch_model(model: nn.Module, config: HashConfig | None = None, *, verbose: bool = False) -> nn.Module:
    """Replaces linear and convolution layers by hash layers, in place.

    ``config`` maps module paths to fields of ``HashSpec``; its key ``"common_params"`` holds the
    fields for layers that are not named.  Without either, a layer gets a random projection of 4096
    bits in tiles of 128.  A ``hash_kernel_type`` of None or ``"none"`` leaves a layer exact.
    Everything is checked before the first layer is replaced.

    Args:
        model: the network; its parameters keep their names.
        verbose: print ``patch_report``.

    Returns:
        ``model`` itself.

    Raises:
        ConfigError: a named layer does not exist or cannot be hashed, or a value is out of range;
            the message names the layer, and nothing has been patched.
    """
    replacements: dict[str, nn.Module] = {}
    built: dict[int, nn.Module] = {}  # a layer under two paths stays one layer
    for name, spec in plan_patch(model, config).items():
        module = model.get_submodule(name)
        if id(module) not in built:
            layer_type = LAYER_TYPES[spec.arithmetic, isinstance(module, nn.Linear)]
            try:
                built[id(module)] = layer_type(module, spec)  # type: ignore[arg-type]
            except ConfigError as e:
                raise ConfigError(f"layer {name!r}: {e}") from e
            built[id(module)].train(module.training)
        replacements[name] = built[id(module)]
    for name, layer in replacements.items():
        if not name:
            raise ConfigError("the model is itself a single layer; wrap it in nn.Sequential before patching")
        model.set_submodule(name, layer)
    if verbose:
        print(patch_report(model))
    return model


def plan_patch(model: nn.Module, config: HashConfig | None) -> dict[str, HashSpec]:
    """Which layers would be hashed, and how; nothing is changed.

    Raises:
        ConfigError: as ``patch_model``.
    """
    config = {} if config is None else config
    if not isinstance(config, dict) or not all(isinstance(v, dict) for v in config.values()):
        raise ConfigError("hash configuration: expected a mapping of layer names to settings")
    layers = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, HASHABLE)}
    if not layers and any(isinstance(m, HASHED) for m in model.modules()):
        raise ConfigError("the model is already patched; build a fresh backbone before patching again")
    for name in config:
        if name != COMMON and name not in layers:
            raise ConfigError(_unknown_layer(model, name, layers))
    plan = {}
    for name in layers:
        settings = config.get(name, config.get(COMMON, {}))
        spec = _read_spec(name, settings)
        if spec is not None:
            plan[name] = spec
    if COMMON in config:
        _read_spec(COMMON, config[COMMON])
    return plan


def _unknown_layer(model: nn.Module, name: str, layers: Iterable[str]) -> str:
    modules = dict(model.named_modules())
    if name in modules:
        return f"layer {name!r} is a {type(modules[name]).__name__}; only Linear and Conv2d layers can be hashed"
    return f"layer {name!r} does not exist in {type(model).__name__}; it has {', '.join(list(layers)[:4])}, ..."


def _read_spec(name: str, settings: LayerConfig) -> HashSpec | None:
    known = [f.name for f in fields(HashSpec)]
    for key in settings:
        if key not in known:
            raise ConfigError(f"layer {name!r}: unknown setting {key!r}; expected some of {', '.join(known)}")
    kind = settings.get("hash_kernel_type", HashSpec.hash_kernel_type)
    if kind is None or kind == "none":
        return None
    if kind not in KERNELS:
        raise ConfigError(
            f"layer {name!r}: unknown hash kernel type {kind!r}; expected one of {', '.join(KERNELS)}, none"
        )
    try:
        return HashSpec(**settings)
    except ConfigError as e:
        raise ConfigError(f"layer {name!r}: {e}") from e


def hash_layers(model: nn.Module) -> dict[str, HashLayer]:
    """The hash layers of a network by module path."""
    return {name: m for name, m in model.named_modules() if isinstance(m, HASHED)}


def hash_config_of(model: nn.Module) -> HashConfig:
    """The configuration that patches a fresh network like this one."""
    config: HashConfig = {COMMON: {"hash_kernel_type": "none"}}
    config.update({name: layer.hash_config() for name, layer in hash_layers(model).items()})
    return config


def patch_report(model: nn.Module) -> str:
    """One line for each hash layer: name, type, tiling, bits, tiles."""
    lines = [f"{'layer':<24} {'type':<10} {'tiling':<6} {'bits':>5} {'tiles':>6} {'kernel':<18} centred"]
    for name, layer in hash_layers(model).items():
        spec = layer.spec
        tiles = f"{len(layer.hash_kernels)}x{len(layer.hash_kernels[0])}"  # type: ignore[arg-type]
        lines.append(
            f"{name:<24} {type(layer).__name__:<10} {spec.tiling:<6} {spec.hash_length:>5} {tiles:>6} "
            f"{spec.hash_kernel_type:<18} {'yes' if spec.centring else 'no'}"
        )
    return "\n".join(lines)
