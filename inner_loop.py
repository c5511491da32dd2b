"""The inner loop: meta-SGD (Li et al., arXiv 1707.03835) takes the anchor theta to one image's weights phi in k steps.

    phi_0 = theta,   phi_{j+1} = phi_j - alpha_j * grad L(phi_j),   j = 0 .. k-1

alpha_j holds a learned step size for every weight, one set for each step or one for all (`shared`). L is the image's
reconstruction loss over all its pixels, or over a share s of them drawn anew at each step (`fraction`).

    inner_loop = MetaSGD(siren, steps=6)
    phi = inner_loop(siren, coords, values)                        # coords (P, 2), values (N, P, 3)
"""
import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def draw_pixels(steps: int, images: int, pixels: int, fraction: float, generator: torch.Generator | None = None,
                device: torch.device | str = "cpu") -> Tensor:
    """floor(fraction * pixels) distinct pixel numbers for each step and image: (steps, images, count), int64."""
    count = int(fraction * pixels + 1e-9)                          # 0.29 * 100 is 28.999...96 in floating point
    if not 1 <= count <= pixels:
        raise ValueError(f"a fraction of {fraction} of {pixels} pixels is {count} pixels")
    # The largest `count` of iid uniform keys are a uniform draw without replacement.
    return torch.stack([torch.rand(images, pixels, generator=generator, device=device).topk(count, sorted=False).indices
                        for _ in range(steps)])


def take_pixels(coords: Tensor, values: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Those of coords (P, in) and values (N, P, C) that pixels (steps, N, n) number -> (steps, N, n, in), (steps, N, n, C)."""
    images = torch.arange(len(values), device=values.device).unsqueeze(-1)                # (N, 1)
    return coords[pixels], values[images, pixels]


class MetaSGD(nn.Module):
    """Parameters: step sizes first (k or 1, width, in + 1) and hidden (k or 1, depth, width, width + 1), from U(0.1, 1)."""

    def __init__(self, siren, steps: int = 6, shared: bool = False):
        super().__init__()
        self.steps, self.shared = steps, shared
        self.recompute = False     # True: the backward pass computes each step again, and keeps only its phi in between
        anchor = siren.anchor()
        # Drawn step by step, so that more steps start from the same step sizes plus more.
        drawn = [[torch.empty(w.shape, dtype=w.dtype).uniform_(0.1, 1) for w in anchor] for _ in range(1 if shared else steps)]
        for name, alpha in zip(anchor._fields, zip(*drawn)):
            self.register_parameter(name, nn.Parameter(torch.stack(alpha)))

    def forward(self, siren, coords: Tensor, values: Tensor, steps: int | None = None, fraction: float = 1.0):
        """phi, as Weights with a leading N, after `steps` (default k) steps on values (N, P, C) at coords (P, in).

        A fraction below 1 draws pixels for each step. Or each step is given its own: values (steps, N, n, C) at coords
        (steps, N, n, in), as from `take_pixels`. More steps than k need shared step sizes: ValueError.
        """
        steps = self.steps if steps is None else steps
        if steps > self.steps and not self.shared:
            raise ValueError(f"{steps} steps, but step sizes for {self.steps}: more needs shared=True")
        if values.dim() == 3 and fraction < 1:
            coords, values = take_pixels(coords, values, draw_pixels(steps, *values.shape[:2], fraction, device=values.device))
        def step(j, phi):
            seen = (coords, values) if values.dim() == 3 else (coords[j], values[j])
            _, grad = siren.loss_and_grad(*seen, phi)
            return phi._make(w - alpha[0 if self.shared else j] * g for w, alpha, g in zip(phi, alphas, grad))

        phi = siren.anchor()
        alphas = [getattr(self, name) for name in phi._fields]
        for j in range(steps):
            again = self.recompute and torch.is_grad_enabled()
            phi = checkpoint(step, j, phi, use_reentrant=False, preserve_rng_state=False) if again else step(j, phi)
        return phi


def textbook_loss_and_grad(siren, coords: Tensor, values: Tensor, weights):
    """What `Siren.loss_and_grad` returns, by autograd through `siren.forward`, which torch.compile cannot differentiate again:
    the published way, the oracle of the tests and the baseline of the benchmark."""
    second_order = torch.is_grad_enabled()
    with torch.enable_grad():
        batch = [w.expand(len(values), *w.shape) if w.dim() == a.dim() else w for w, a in zip(weights, siren.anchor())]
        batch = [w if w.requires_grad else w.detach().requires_grad_() for w in batch]
        weights = weights._make(batch)
        loss = (siren(coords, weights) - values).square().mean((-2, -1))
        return loss, weights._make(torch.autograd.grad(loss.sum(), weights, create_graph=second_order))


def functional_loss_and_grad(siren, coords: Tensor, values: Tensor, weights):
    """The same by torch.func, for networks without a closed form; torch.compile takes it. To use it in a class of your own:
    `loss_and_grad = functional_loss_and_grad`."""
    def total(weights):
        loss = (siren(coords, weights) - values).square().mean((-2, -1))
        return loss.sum(), loss

    batch = [w.expand(len(values), *w.shape) if w.dim() == a.dim() else w for w, a in zip(weights, siren.anchor())]
    grad, loss = torch.func.grad(total, has_aux=True)(weights._make(batch))
    return loss, grad
