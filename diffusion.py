"""Samples like the rows of a data set of tokens, from a diffusion model or a normal distribution,
and how good they are.

    samples = diffusion(x, 360, depth=3)       # x (n, T, D), standardised; (360, T, D)
    frechet(features_of_samples, features_of_data)
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from checkpoint import generator, seeded
from measures import nearest
from reader import MLP, Attention


BATCH, RATE = 64, 4e-3                     # Adam, cosine decay to 0


class Denoiser(nn.Module):
    """Noisy tokens (N, depth * r, D), angle (N,) -> v. Tokens know their layer and component, and
    attend within a layer, then across."""

    def __init__(self, depth: int, rank: int, features: int, width=64):
        super().__init__()
        self.shape = depth, rank
        self.embed, self.out = nn.Linear(features, width), nn.Linear(width, features)
        self.time = nn.Linear(16, width)
        self.layer = nn.Parameter(0.02 * torch.randn(depth, 1, width))
        self.component = nn.Parameter(0.02 * torch.randn(rank, width))
        self.within, self.across = (nn.ModuleList(Attention(width, 16) for _ in range(3))
                                    for _ in range(2))
        self.mlps = nn.ModuleList(MLP(width, 4) for _ in range(3))

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        waves = angle[:, None] * 2 ** torch.arange(8).to(x)
        place = (self.layer + self.component).flatten(0, 1)                    # (T, width)
        x = self.embed(x) + place + self.time(torch.cat([waves.sin(), waves.cos()], 1))[:, None]
        for within, across, mlp in zip(self.within, self.across, self.mlps):
            x = x + within(x.unflatten(1, self.shape).flatten(0, 1)).view_as(x)
            x = x + across(x)
            x = x + mlp(x)
        return self.out(x)


def noised(x: Tensor, noise: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """The state cos x + sin noise, and v, which is to be predicted, cos noise - sin x (Salimans &
    Ho, ICLR 2022). Angle (N, 1, 1): 0 data, pi / 2 noise."""
    cos, sin = angle.cos(), angle.sin()
    return cos * x + sin * noise, cos * noise - sin * x


def ddim(predict, x: Tensor, steps: int = 50) -> Tensor:
    """From noise x (N, ...) to samples (Song et al., ICLR 2021): by v each step turns the state."""
    turn = math.pi / 2 / steps
    for step in range(steps, 0, -1):
        v = predict(x, torch.full((len(x),), step * turn).to(x))
        x = math.cos(turn) * x - math.sin(turn) * v
    return x


def diffusion(x: Tensor, count: int, depth: int, steps: int = 1000, seed: int = 0) -> Tensor:
    """Samples (count, T, D), by `ddim`, of a DDPM (Ho et al., NeurIPS 2020) of x (n, T, D), whose
    tokens are those of `depth` layers. Trained for so many steps."""
    g, (n, *shape) = generator("diffusion", seed), x.shape
    with seeded("denoiser", seed):
        denoiser = Denoiser(depth, shape[0] // depth, shape[1]).to(x)
    adam = torch.optim.Adam(denoiser.parameters(), fused=True)
    for step in tqdm(range(steps), "diffusion", leave=False, disable=None):
        rows = torch.randint(n, (BATCH,), generator=g)
        noise = torch.randn(BATCH, *shape, generator=g)
        angle = math.pi / 2 * torch.rand(BATCH, 1, 1, generator=g).to(x)
        state, v = noised(x[rows], noise.to(x), angle)
        F.mse_loss(denoiser(state, angle.flatten()), v).backward()
        adam.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
        adam.step()
        adam.zero_grad()
    with torch.no_grad():
        return ddim(denoiser, torch.randn(count, *shape, generator=g).to(x))


def gaussian(x: Tensor, count: int, g) -> Tensor:
    """Draws (count, T, D) from the normal distribution with the mean and covariance of x (n, T, D):
    sums of its rows with random weights."""
    weights = torch.randn(count, len(x), generator=g).to(x) / math.sqrt(len(x))
    return x.mean(0) + torch.tensordot(weights, x - x.mean(0), 1)


def frechet(x: Tensor, y: Tensor) -> float:
    """Squared distance of the normal laws that fit x (n, d) and y (m, d) (Dowson & Landau 1982):
    |difference of means|^2 + tr(S + R - 2 (S R)^(1/2)), S, R their covariances."""
    x, y = x.double(), y.double()
    S, R = torch.cov(x.T), torch.cov(y.T)
    values, vectors = torch.linalg.eigh(S)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    both = torch.linalg.eigvalsh(root @ R @ root).clamp_min(0).sqrt().sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + S.trace() + R.trace() - 2 * both)


def copies(samples: Tensor, bank: Tensor, test: Tensor) -> dict:
    """Median distance of samples (n, ...) to the nearest row of the bank, beside that of test rows,
    and the share of samples that are nearer than 19 of 20 test rows. A sampler of the data's own
    law has a twentieth; one that repeats the bank has all."""
    samples, bank, test = (each.flatten(1) for each in (samples, bank, test))
    near, usual = ((bank[nearest(bank, x, 1)[:, 0]] - x).norm(dim=1) for x in (samples, test))
    return {"nearest": float(near.median()), "nearest of test": float(usual.median()),
            "copied": float((near < usual.quantile(0.05)).double().mean())}
