"""The inner loop: meta-SGD (Li et al., arXiv 1707.03835) takes the anchor theta to the weights phi
of one image in k steps.

    phi_0 = theta,   phi_{j+1} = phi_j - alpha_j * grad L(phi_j),   j = 0 .. k-1

alpha_j holds a learned step size for every weight, one set a step, or one for all (`shared`). L is
the image's reconstruction loss over all its pixels, or over a share of them drawn anew each step.

    inner_loop = MetaSGD(siren, steps=6)
    phi = inner_loop(siren, coords, values)                    # coords (P, 2), values (N, P, 3)
"""
import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def draw_pixels(steps, images, pixels, fraction, generator=None, device="cpu") -> Tensor:
    """floor(fraction * pixels) distinct pixel numbers a step and image: (steps, images, n)."""
    count = int(fraction * pixels + 1e-9)                      # 0.29 * 100 is 28.999...96
    if not 1 <= count <= pixels:
        raise ValueError(f"a fraction of {fraction} of {pixels} pixels is {count} pixels")

    # The largest of iid uniform keys are a uniform draw without replacement.
    keys = [torch.rand(images, pixels, generator=generator, device=device) for _ in range(steps)]
    return torch.stack([k.topk(count, sorted=False).indices for k in keys])


def each_step(coords: Tensor, values: Tensor, steps: int, pixels: Tensor | None = None):
    """What each step sees of values (N, P, C) at coords (P, in):
    everything, (steps, P, in) and (steps, N, P, C), without a copy; or, given the numbers of drawn
    pixels (steps, N, n), these alone, (steps, N, n, in) and (steps, N, n, C)."""
    if pixels is None:
        return coords.expand(steps, *coords.shape), values.expand(steps, *values.shape)
    images = torch.arange(len(values), device=values.device)[:, None]                    # (N, 1)
    return coords[pixels], values[images, pixels]


class MetaSGD(nn.Module):
    """Parameters: the step sizes alpha, from U(0.1, 1): first (k or 1, width, in + 1) and hidden
    (k or 1, depth, width, width + 1)."""

    def __init__(self, siren, steps: int = 6, shared: bool = False):
        super().__init__()
        self.steps, self.shared = steps, shared
        self.recompute = False      # True: the backward pass computes each step again: less memory
        count = 1 if shared else steps
        self.first = nn.Parameter(torch.empty(count, *siren.first.shape))
        self.hidden = nn.Parameter(torch.empty(count, *siren.hidden.shape))
        for j in range(count):      # step by step: the first ones are the same for any k
            for alpha in self.parameters():
                nn.init.uniform_(alpha[j], 0.1, 1)

    def forward(self, siren, coords: Tensor, values: Tensor, steps=None, fraction=1.0):
        """phi, as Weights with a leading N, after `steps` (default k) steps on values (N, P, C) at
        coords (P, in), or on a fraction of them drawn for each step. ValueError: see `descend`."""
        steps, pixels = self.steps if steps is None else steps, None
        if fraction < 1:
            pixels = draw_pixels(steps, *values.shape[:2], fraction, device=values.device)
        return self.descend(siren, *each_step(coords, values, steps, pixels))

    def descend(self, siren, coords: Tensor, values: Tensor):
        """phi after a step on each of coords and values, as `each_step` gives them. ValueError:
        more steps than k, unless step sizes are shared."""
        if len(values) > self.steps and not self.shared:
            raise ValueError(f"{len(values)} steps need shared=True: step sizes for {self.steps}")

        def step(j, phi):
            _, grad = siren.loss_and_grad(coords[j], values[j], phi)
            j = 0 if self.shared else j
            return phi._replace(first=phi.first - self.first[j] * grad.first,
                                hidden=phi.hidden - self.hidden[j] * grad.hidden)

        phi = siren.anchor()
        for j in range(len(values)):
            if self.recompute and torch.is_grad_enabled():
                phi = checkpoint(step, j, phi, use_reentrant=False, preserve_rng_state=False)
            else:
                phi = step(j, phi)
        return phi


# ---- The same gradient by autograd, for tests and the benchmark ----

def for_each_image(siren, weights, images: int):
    """`weights` with a leading N, also where all images are still at the anchor."""
    return weights._make(w.expand(images, *w.shape) if w.dim() == a.dim() else w
                         for w, a in zip(weights, siren.anchor()))


def textbook_loss_and_grad(siren, coords: Tensor, values: Tensor, weights):
    """What `Siren.loss_and_grad` returns, by autograd through `siren.forward`: the published way,
    which torch.compile cannot differentiate again."""
    second_order = torch.is_grad_enabled()
    with torch.enable_grad():
        weights = for_each_image(siren, weights, len(values))
        weights = weights._make(w if w.requires_grad else w.detach().requires_grad_()
                                for w in weights)
        loss = (siren(coords, weights) - values).square().mean((-2, -1))
        grad = torch.autograd.grad(loss.sum(), weights, create_graph=second_order)
        return loss, weights._make(grad)


def functional_loss_and_grad(siren, coords: Tensor, values: Tensor, weights):
    """The same by torch.func, for networks without a closed form; torch.compile takes it. In a
    class of your own: `loss_and_grad = functional_loss_and_grad`."""
    def total(weights):
        loss = (siren(coords, weights) - values).square().mean((-2, -1))
        return loss.sum(), loss

    weights = for_each_image(siren, weights, len(values))
    grad, loss = torch.func.grad(total, has_aux=True)(weights)
    return loss, grad
