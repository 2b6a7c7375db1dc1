"""The rewrites of the compiler, one a file; ``compiler.pipeline`` puts them in order."""

from compiler.passes.base import Pass, PassResult, RefusalLog
from compiler.passes.drop_identity import DropIdentity
from compiler.passes.fold_batchnorm import FoldBatchnorm
from compiler.passes.fold_constants import FoldConstants
from compiler.passes.fuse_activation import FuseActivation
from compiler.passes.fuse_residual import FuseResidual
from compiler.passes.pack_hash_layers import PackHashLayers
from compiler.passes.prepare_exact_layers import PrepareExactLayers

__all__ = [
    "DropIdentity",
    "FoldBatchnorm",
    "FoldConstants",
    "FuseActivation",
    "FuseResidual",
    "PackHashLayers",
    "Pass",
    "PassResult",
    "PrepareExactLayers",
    "RefusalLog",
]
