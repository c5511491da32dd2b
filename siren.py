"""A SIREN (Sitzmann et al., NeurIPS 2020) whose weights are an argument.

One set of meta-learned weights theta, the anchor, is shared by all images; the inner loop moves it
to the weights phi of one image. With coordinates x, a layer's weight matrix W and its bias b kept
as W's last column (the augmented weight):

    a_0 = sin(omega (W_0 x + b_0)),   a_l = sin(W_l a_{l-1} + b_l),   f(x) = scale * (V a_depth + c)

The head (V, c) and the scale are shared by all images: the outer loop alone trains them.
`Siren.loss_and_grad` is the gradient of the reconstruction loss in closed form. It calls no
autograd itself, so autograd can differentiate through it in one first-order pass.

    siren = Siren(in_features=2, out_features=3)
    pixels = siren(coordinate_grid(32, 32), siren.anchor())       # (1024, 3)
"""
import math
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor


class Weights(NamedTuple):
    """One SIREN's layers, or a batch of them (leading dimensions). A row is a neuron."""
    first: Tensor   # (..., width, in_features + 1)      last column is the bias
    hidden: Tensor  # (..., depth, width, width + 1)     last column is the bias


def coordinate_grid(height: int, width: int) -> Tensor:
    """Pixel coordinates (height * width, 2): rows (y, x) from -1 to 1, row-major."""
    y, x = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).view(-1, 2)


class SinCos(torch.autograd.Function):
    """sin z and cos z, up to sign each other's derivative: autograd would compute both again."""

    @staticmethod
    def forward(ctx, z: Tensor) -> tuple[Tensor, Tensor]:
        sin, cos = z.sin(), z.cos()
        ctx.save_for_backward(sin, cos)
        return sin, cos

    @staticmethod
    def backward(ctx, d_sin: Tensor, d_cos: Tensor) -> Tensor:
        sin, cos = ctx.saved_tensors
        return torch.addcmul(d_sin * cos, d_cos, sin, value=-1)


def affine(a: Tensor, weight: Tensor) -> Tensor:
    """W a + b for points a (..., P, in), augmented weight (..., out, in + 1) -> (..., P, out)."""
    return a @ weight[..., :-1].mT + weight[..., None, :, -1]


class Siren(nn.Module):
    """Parameters: first (width, in_features + 1), hidden (depth, width, width + 1), head, scale."""

    def __init__(self, in_features=2, out_features=3, width=128, depth=4, omega=10.0):
        super().__init__()
        self.omega = omega
        self.first = nn.Parameter(torch.zeros(width, in_features + 1))
        self.hidden = nn.Parameter(torch.zeros(depth, width, width + 1))
        self.head = nn.Linear(width, out_features)
        self.scale = nn.Parameter(torch.full((out_features,), 0.1))
        nn.init.uniform_(self.first[:, :-1], -1 / in_features, 1 / in_features)
        nn.init.uniform_(self.hidden[..., :-1], -math.sqrt(6 / width), math.sqrt(6 / width))

    def anchor(self) -> Weights:
        """theta, without a leading dimension: it broadcasts over images."""
        return Weights(self.first, self.hidden)

    def layers(self, weights: Weights) -> list[Tensor]:
        """Each sine layer's augmented weight (..., width, in + 1); the first one times omega."""
        return [self.omega * weights.first, *weights.hidden.unbind(-3)]

    def forward(self, coords: Tensor, weights: Weights) -> Tensor:
        """Values (N, P, out_features) at coords (P, in_features) or, each its own, (N, P, ...)."""
        a = coords
        for weight in self.layers(weights):
            a = torch.sin(affine(a, weight))                     # (N, P, width)
        return self.scale * self.head(a)

    def loss_and_grad(self, coords: Tensor, values: Tensor,
                      weights: Weights) -> tuple[Tensor, Weights]:
        """Each image's loss (N,), the mean squared error over pixels and channels, and its
        gradient with respect to `weights`, as Weights with a leading N.

        coords (P, in_features) or (N, P, in_features), values (N, P, out_features). This is
        back-propagation written out: with u = W a + b of a layer and d = dL/du, dL/dW = d^T a and
        dL/db = the sum of d, both over pixels; one layer down d <- (d W) * cos(u). At the anchor,
        weights without the leading N, activations have none either: one pass serves all images.
        """
        layers, inputs, slopes = self.layers(weights), [coords], []
        for weight in layers:
            a, slope = SinCos.apply(affine(inputs[-1], weight))  # (N, P, width); (P, ...) at theta
            inputs.append(a)
            slopes.append(slope)
        last = inputs.pop()
        error = self.scale * self.head(last) - values            # (N, P, out)
        loss = error.square().mean((-2, -1))                     # (N,)

        count = values.shape[-2] * values.shape[-1]
        d = (2 / count) * self.scale * error                     # dL/d(head's output) (N, P, out)
        weight_above, grads = self.head.weight, []               # grads: in the layers' order
        for weight, a, slope in zip(reversed(layers), reversed(inputs), reversed(slopes)):
            d = (d @ weight_above) * slope                       # dL/du (N, P, width)
            grads.insert(0, torch.cat([d.mT @ a, d.sum(-2)[..., None]], -1))   # (N, width, in + 1)
            weight_above = weight[..., :-1]
        return loss, Weights(self.omega * grads[0], torch.stack(grads[1:], dim=-3))
