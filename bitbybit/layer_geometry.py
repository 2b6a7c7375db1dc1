"""Windows of convolutions, as both kinds of hash layers read them from torch's modules."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn


class LayerGeometry(NamedTuple):
    """How a hash layer slides over an image; pairs are (y, x).

    Attributes:
        kernel, stride, dilation: of the windows that are hashed.
        pads: zeros around the image: left, right, top, bottom.
        code_stride, code_dilation: with which the weights' codes slide over the hashed positions.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    pads: tuple[int, int, int, int]
    code_stride: tuple[int, int]
    code_dilation: tuple[int, int]


def pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    """(y, x) of a number or a pair."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def pads_of(module: nn.Conv2d) -> tuple[int, int, int, int]:
    """Zeros around the image, in pixels: left, right, top, bottom, as ``F.pad`` takes them."""
    if module.padding == "valid":
        return (0, 0, 0, 0)
    if module.padding == "same":
        total = [d * (k - 1) for d, k in zip(pair(module.dilation), pair(module.kernel_size), strict=True)]
        (top, left) = (t // 2 for t in total)
        return (left, total[1] - left, top, total[0] - top)
    y, x = pair(module.padding)  # type: ignore[arg-type]
    return (x, x, y, y)


def output_size(
    size: tuple[int, int],
    pads: tuple[int, int, int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int]:
    """Rows and columns of a convolution's result for an image of ``size``."""
    left, right, top, bottom = pads
    height = size[0] + top + bottom - dilation[0] * (kernel[0] - 1) - 1
    width = size[1] + left + right - dilation[1] * (kernel[1] - 1) - 1
    return height // stride[0] + 1, width // stride[1] + 1
