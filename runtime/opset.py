"""Names and versions of the artifact format; the one definition writer and reader share.

The normative description is docs/operators.md and docs/artifact.md.
"""

DOMAIN = "io.bitbybit"
DOMAIN_VERSION = 1
FORMAT_VERSION = 1
ONNX_OPSET = 20
IR_VERSION = 10

LSH_ENCODE = "LshEncode"
LSH_CONV = "LshConv"
LSH_CONV_ADD = "LshConvAdd"
OPERATORS = (LSH_ENCODE, LSH_CONV, LSH_CONV_ADD)

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
