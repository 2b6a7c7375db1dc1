"""How a layer is hashed, as one frozen record."""

from __future__ import annotations

from dataclasses import dataclass

from bitbybit.errors import ConfigError

PATCH = "patch"
PIXEL = "pixel"
TILINGS = (PATCH, PIXEL)
FLOAT = "float"
INTEGER = "integer"
ARITHMETICS = (FLOAT, INTEGER)
PROJECTION_BITS = range(2, 9)
CODE_BITS = range(1, 5)


def projection_limit(bits: int) -> int:
    """The largest whole number in P with so many bits, sign included: 7 for 4, 127 for 8."""
    return (1 << (bits - 1)) - 1


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class HashSpec:
    """How one layer is hashed.

    Attributes:
        hash_kernel_type: ``"random_projection"`` or ``"learned_projection"``.
        hash_length: k, bits in a code.
        input_tile_size: features that one hash covers; None: all of them.
        output_tile_size: outputs that share a projection; None: all of them.
        tiling: ``"patch"`` or ``"pixel"``; a linear layer is the same under both.
        centring: hash ``x - centre``; the exact rest goes to the bias.
        orthogonal: draw projections in orthogonal blocks.
        arithmetic: ``"float"``: angles estimated by a cosine, weights hashed by the inputs' projection;
            ``"integer"``: quantised inputs, weights with codes of their own, an estimate linear in the distance
            (``bitbybit.integer``).
        projection_bits: of an entry of P in integer arithmetic, sign included, 2 to 8; up to 4 take half a byte.
        code_bits: of a weight's code for every bit of the input's, in integer arithmetic, 1 to 4: odd whole numbers up
            to ``+-(2 ** code_bits - 1)``. Projections and inputs' codes stay as they are, and every bit is looked up.
    """

    hash_kernel_type: str = "random_projection"
    hash_length: int = 4096
    input_tile_size: int | None = 128
    output_tile_size: int | None = 128
    tiling: str = PATCH
    centring: bool = False
    orthogonal: bool = False
    arithmetic: str = FLOAT
    projection_bits: int = 8
    code_bits: int = 1

    def __post_init__(self) -> None:
        for name in ("hash_length", "input_tile_size", "output_tile_size"):
            value = getattr(self, name)
            optional = name != "hash_length"
            if optional and value is None:
                continue
            if not _is_whole(value) or value < 1:
                raise ConfigError(f"{name}: expected a whole number of at least 1, got {value!r}")
        for name in ("centring", "orthogonal"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: expected true or false, got {getattr(self, name)!r}")
        if self.tiling not in TILINGS:
            raise ConfigError(f"tiling: expected one of {', '.join(TILINGS)}, got {self.tiling!r}")
        if self.arithmetic not in ARITHMETICS:
            raise ConfigError(f"arithmetic: expected one of {', '.join(ARITHMETICS)}, got {self.arithmetic!r}")
        if not _is_whole(self.projection_bits) or self.projection_bits not in PROJECTION_BITS:
            raise ConfigError(f"projection_bits: expected 2 to 8, got {self.projection_bits!r}")
        if self.projection_bits != 8 and self.arithmetic != INTEGER:
            raise ConfigError(
                f"projection_bits: expected 8 with float arithmetic, whose P is float32, got {self.projection_bits}; "
                "choose integer arithmetic"
            )
        if not _is_whole(self.code_bits) or self.code_bits not in CODE_BITS:
            raise ConfigError(f"code_bits: expected 1 to 4, got {self.code_bits!r}")
        if self.code_bits != 1 and self.arithmetic != INTEGER:
            raise ConfigError(
                f"code_bits: expected 1 with float arithmetic, got {self.code_bits}; choose integer arithmetic"
            )


@dataclass(frozen=True)
class Part:
    """The outputs that share a projection: one output tile of one group.

    Attributes:
        column: index of the kernels' column, ``hash_kernels[i][column]``.
        group: index of the group whose input channels it reads.
        outputs: rows of the weight.
    """

    column: int
    group: int
    outputs: slice


def make_spec(
    input_tile_size: int | None = HashSpec.input_tile_size,
    output_tile_size: int | None = HashSpec.output_tile_size,
    hash_kernel_type: str = HashSpec.hash_kernel_type,
    hash_length: int = HashSpec.hash_length,
    **options: object,
) -> HashSpec:
    """A ``HashSpec`` of the arguments of ``from_torch_module``, in its order.

    Raises:
        ConfigError: an option is unknown, or a value out of range.
    """
    unknown = sorted(set(options) - set(HashSpec.__dataclass_fields__))
    if unknown:
        known = ", ".join(HashSpec.__dataclass_fields__)
        raise ConfigError(f"unknown hash option {unknown[0]!r}; expected some of {known}")
    return HashSpec(hash_kernel_type, hash_length, input_tile_size, output_tile_size, **options)  # type: ignore[arg-type]
