"""Names and versions of the artifact format; the one definition writer and reader share.

The normative description is docs/operators.md and docs/artifact.md.
"""

from __future__ import annotations

from collections.abc import Iterable

DOMAIN = "io.bitbybit"
DOMAIN_VERSION = 4  # the newest that a reader knows; a writer imports the lowest that its operators need
FORMAT_VERSION = 4  # alike; a file's two versions are equal
ONNX_OPSET = 20
ONNX_OPSETS = {1: ONNX_OPSET, 2: ONNX_OPSET, 3: 21, 4: 21}  # by version of the domain; 4-bit tensors came with 21
IR_VERSION = 10

LSH_ENCODE = "LshEncode"
LSH_CONV = "LshConv"
LSH_CONV_ADD = "LshConvAdd"
LSH_ENCODE_INTEGER = "LshEncodeInteger"
LSH_CONV_INTEGER = "LshConvInteger"
LSH_CONV_ADD_INTEGER = "LshConvAddInteger"
SINCE_VERSION = {  # operator to the version of the domain that brought it
    LSH_ENCODE: 1,
    LSH_CONV: 1,
    LSH_CONV_ADD: 1,
    LSH_ENCODE_INTEGER: 2,
    LSH_CONV_INTEGER: 2,
    LSH_CONV_ADD_INTEGER: 2,
}
NARROW_SINCE = 3  # version of the domain from which a projection may have 4 bits
PLANES_SINCE = 4  # version from which a weight's code may have several planes of bits
MOST_PLANES = 4
OPERATORS = tuple(SINCE_VERSION)
ENCODE_OPERATORS = (LSH_ENCODE, LSH_ENCODE_INTEGER)
INTEGER_CONV_OPERATORS = (LSH_CONV_INTEGER, LSH_CONV_ADD_INTEGER)
INTEGER_OPERATORS = (LSH_ENCODE_INTEGER, *INTEGER_CONV_OPERATORS)

EXACT_LIMIT = 2**24  # whole numbers below it are exact in float32, whatever the order of a sum
INTEGER_RANGES = ((0, 255), (-128, 127))  # (low, high) of quantised activations
INTEGER_LEVELS = 255  # greatest norm; also greatest magnitude of a quantised activation and of a centre
PROJECTION_LEVELS = 127  # greatest magnitude of an integer projection
PAD_LIMIT = 1024  # pixels; a wider pad is a corrupt attribute, and its image of pad pixels would fill the memory
EXPONENT_LIMIT = 31  # greatest magnitude of the power of two that quantises activations

FLOAT_MAX = 3.4028234663852886e38  # largest finite float32: a clip bound that never acts

META_FORMAT_VERSION = "bitbybit.format_version"
META_CHECKPOINT_SHA256 = "bitbybit.checkpoint_sha256"
META_MODEL = "bitbybit.model"  # backbone name, or empty
META_HASH_CONFIG = "bitbybit.hash_config"  # JSON, as patch_model takes it
META_NORMALIZATION = "bitbybit.normalization"  # JSON {"mean": [c], "std": [c]} of pixels in 0..1
META_CLASSES = "bitbybit.classes"  # JSON list, index = label
META_COMPILE_OPTIONS = "bitbybit.compile_options"  # JSON
META_VERSIONS = "bitbybit.versions"  # JSON, package: version
META_LAYERS = "bitbybit.layers"  # JSON list of hashed layers, in graph order (docs/artifact.md)
METADATA_KEYS = (
    META_FORMAT_VERSION,
    META_CHECKPOINT_SHA256,
    META_MODEL,
    META_HASH_CONFIG,
    META_NORMALIZATION,
    META_CLASSES,
    META_COMPILE_OPTIONS,
    META_VERSIONS,
    META_LAYERS,
)


def version_needed(operators: Iterable[str], *, narrow: bool = False, planes: bool = False) -> int:
    """The lowest version of domain and format that knows the operators; 1 where there are none.

    Args:
        operators: names of the domain's.
        narrow: whether a projection has 4 bits.
        planes: whether a weight's code has several planes of bits.
    """
    if planes:
        return PLANES_SINCE
    return NARROW_SINCE if narrow else max((SINCE_VERSION[name] for name in operators), default=1)


def largest_code(planes: int) -> int:
    """The greatest value of a weight's code: planes of bits count +-1, +-2, +-4 and so on."""
    return 2**planes - 1
