"""The correlation of sign features with the weights' codes, and its gradients, for ``bitbybit.integer``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from bitbybit.sign_features import Sliding, centres_images, gpu_kernels

try:
    from bitbybit import window_gradient_cpu
except ImportError:  # no Numba: the same numbers from torch operators
    window_gradient_cpu = None  # type: ignore[assignment]


class HashProduct(Function):
    """Gives the correlation of sign features with codes the gradients of a straight line through the signs.

    ``n sign(P v)`` is given the slope of a line ``R v``, R proportional to P. Towards v and P a layer then looks like
    one convolution of v with ``line = codes R``, so its backward pass is a float layer's and not one over all the bits.
    A window of twice the length has the same signs and twice the answer. What the answer is beyond the line therefore
    grows with the window's length |v|, and what is differentiated towards v is

        line v + (exact - bias - line v).detach() |v| / |v|.detach().

    Without the second term a network does not see that its errors grow with its activations, and inflates them.

    Only the gradient of the codes needs the bits. It may be estimated from the first images of a batch: the line
    tells what it would be for all images if the features were ``R v``, and those images add, scaled up, what they are
    beyond that. Its mean over orders of a batch is the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        v: Tensor,
        line: Tensor,
        codes: Tensor,
        bias: Tensor,
        answer: Tensor,
        exact: Tensor,
        features: Tensor,
        rows: Tensor,
        geometries: tuple[Sliding, Sliding],
    ) -> Tensor:
        """Keeps what the backward pass needs.

        Args:
            v: float[n, c, h, w], centred, with its pads.
            line: float[o, c, kh, kw].
            codes: float[o, t * k, kh, kw], times the scale; [o, t * k, 1, 1] where windows are hashed.
            bias: float[o].
            answer: float[n, o, oh, ow], the correlation of all features with ``codes``, plus ``bias``.
            exact: the answer of an undisturbed array, which gradients are taken of; often ``answer`` itself.
            features: float[m, t * k, h, w], of the first m images; the codes' gradient is taken from these.
            rows: float32[t * k, features], R: tiles on the diagonal.
            geometries: of the correlation with ``line``, and of that with ``codes``.

        Returns:
            A copy of ``answer``, which an in-place activation may overwrite.
        """
        ctx.save_for_backward(v, line, codes, bias, exact, features, rows)
        ctx.geometries = geometries
        return answer.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        v, line, codes, bias, exact, features, rows = ctx.saved_tensors
        of_line, of_codes = ctx.geometries
        for_v, for_line, for_codes, for_bias, *_ = ctx.needs_input_grad
        count, sampled = len(v), len(features)
        grad_v = grad_line = grad_codes = grad_bias = None
        if for_v:
            grad_v = _backward(grad, v, line, of_line, of_input=True)
            on_line = F.conv2d(v, line, bias, stride=of_line[0], dilation=of_line[1])
            grad_v = _add_lengthwise(grad_v, v, exact, on_line, grad, (line.shape[2], line.shape[3]), of_line)
        if for_line or (for_codes and sampled < count):
            first = grad_line = _backward(grad[:sampled], v[:sampled], line, of_line, of_input=False)
            if sampled < count:
                grad_line = first + _backward(grad[sampled:], v[sampled:], line, of_line, of_input=False)
        if for_codes:
            grad_codes = _backward(grad[:sampled], features, codes, of_codes, of_input=False)
            if sampled < count:
                assert grad_line is not None
                share = sampled / count
                beyond = (grad_line.float() - first.float() / share).reshape(len(codes), -1, *codes.shape[2:])
                on_line = torch.einsum("ofhw,qf->oqhw", beyond, rows)
                grad_codes = (grad_codes.float() / share + on_line).to(codes.dtype)
        if for_bias:
            grad_bias = grad.sum((0, 2, 3), dtype=torch.float32).to(grad.dtype)
        return grad_v, grad_line, grad_codes, grad_bias, *(None,) * 5


def _add_lengthwise(
    grad_v: Tensor,
    v: Tensor,
    exact: Tensor,
    on_line: Tensor,
    grad: Tensor,
    kernel: tuple[int, int],
    geometry: Sliding,
) -> Tensor:
    """Adds to the gradient of v that of ``sum of (exact - on_line).detach() grad |window| / |window|.detach()``.

    Args:
        grad_v: float[n, c, h, w]; may be overwritten.
        v: float[n, c, h, w].
        exact, on_line, grad: float[n, o, oh, ow].
        kernel: rows and columns of a window.
        geometry: its stride and dilation.
    """
    if centres_images(v, v.dtype) and window_gradient_cpu.fits(v, exact):
        return window_gradient_cpu.add_lengthwise(grad_v, v, exact, on_line, grad, kernel, *geometry)
    if kernels := gpu_kernels(v, v.dtype):
        return kernels.add_lengthwise(grad_v, v, exact, on_line, grad, kernel, *geometry)
    (sy, sx), (dy, dx) = geometry
    (oh, ow), (kh, kw) = exact.shape[2:], kernel
    # Where the windows have their pixel of each tap; sums over taps cost less so than convolutions of one channel.
    taps = [
        (..., slice(i * dy, i * dy + sy * (oh - 1) + 1, sy), slice(j * dx, j * dx + sx * (ow - 1) + 1, sx))
        for i in range(kh)
        for j in range(kw)
    ]
    energy = v.square().sum(1, keepdim=True, dtype=torch.float32)
    product = ((exact - on_line) * grad).sum(1, keepdim=True, dtype=torch.float32)
    square = torch.zeros_like(product)
    for tap in taps:
        square += energy[tap]
    share = product / square.clamp_(min=1.0)  # v holds whole numbers: a window's square is 0, or 1 and more
    spread = torch.zeros_like(energy)
    for tap in taps:
        spread[tap] += share
    return grad_v + v * spread.to(v.dtype)


def _backward(grad: Tensor, image: Tensor, weight: Tensor, geometry: Sliding, *, of_input: bool) -> Tensor:
    """The gradient of a convolution's input or of its weight.

    A kernel of one tap is given the pixels that it reads: oneDNN's backward pass of such a kernel with a stride writes
    beyond its memory where there are few channels (PyTorch 2.14, AVX2).
    """
    stride, dilation = geometry
    if weight.shape[2:] == (1, 1) and stride != (1, 1):
        read = (..., slice(None, None, stride[0]), slice(None, None, stride[1]))
        found = _backward(grad, image[read], weight, ((1, 1), (1, 1)), of_input=of_input)
        if not of_input:
            return found
        spread = torch.zeros_like(image)
        spread[read] = found
        return spread
    found = torch.ops.aten.convolution_backward(
        grad, image, weight, None, list(stride), [0, 0], list(dilation), False, [0, 0], 1,
        [of_input, not of_input, False],
    )  # fmt: skip
    return found[0] if of_input else found[1]
