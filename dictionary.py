"""A sparse dictionary of a network's activations over the plane, and whether its atoms mean what
they seem to. Are they local? Do they trace an image? Does the network use their directions? Each
answer is a difference from a control: see `differences` in cohort.py.

    rows, z, atoms = dictionaries({"trained": a, "untrained": b}, own, others, seed=0)
    rows |= ablate(rest, a, z, atoms, values, seed=0)

Activations a are (P, d), on a square grid of P points; codes z (P, atoms): a column is an atom's
map. Measurements are rows: {name: a tensor (n,), a number for each atom that ever fires}.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint import generator
from model import psnr
from siren import coordinate_grid

ATOMS, TOPK = 256, 8                   # in a dictionary; that may fire at a point
STEPS, BATCH, RATE = 300, 256, 3e-3    # of Adam; points a step
PATIENCE = 50                          # steps without firing after which an atom is dead
DISC = 0.2                             # radius of the disc that may hold a map's energy


# ---- The dictionary ------------------------------------------------------------------------------

class Dictionary(NamedTuple):
    """A TopK sparse autoencoder (Gao et al., arXiv 2406.04093): the code z is the k largest of
    (a - c) E^T where positive, else 0; the reconstruction z D + c. A row of D is an atom."""
    encoder: Tensor                    # E (atoms, d)
    decoder: Tensor                    # D (atoms, d), rows of length 1
    centre: Tensor                     # c (d,)

    def code(self, a, among=1.0):
        """z (P, atoms); among (atoms,): 0 for those that may not fire."""
        scores = (a - self.centre) @ self.encoder.mT * among
        values, places = scores.topk(TOPK)
        return torch.zeros_like(scores).scatter(1, places, values.relu())

    def loss(self, a, z, dead):
        """Mean squared error, and 1/32 of what the dead atoms (atoms,) leave of the residual."""
        residual = a - z @ self.decoder - self.centre
        left = residual.detach() - self.code(a, dead) @ self.decoder
        return residual.square().mean() + left.square().mean() / 32 * dead.any()


def train_dictionary(a, steps, seed):
    """A dictionary of a (P, d), by Adam; after 0 steps a random one."""
    g = generator("dictionary", seed)
    atoms = F.normalize(torch.randn(ATOMS, a.shape[1], generator=g)).to(a)
    sae = Dictionary(*(p.clone().requires_grad_() for p in (atoms, atoms, a.mean(0))))
    adam, silent = torch.optim.Adam(sae, RATE, fused=True), torch.zeros_like(atoms[:, 0])
    for _ in range(steps):
        block = a[torch.randint(len(a), (BATCH,), generator=g).to(a.device)]
        with torch.enable_grad():
            z = sae.code(block)                                                # (BATCH, atoms)
            sae.loss(block, z, silent > PATIENCE).backward()
        adam.step()
        adam.zero_grad()
        silent = (silent + 1) * (z == 0).all(0)
        sae.decoder.data = F.normalize(sae.decoder.data)
    return Dictionary(*(p.detach() for p in sae))


# ---- What an atom's map is like ------------------------------------------------------------------

def spread(energy, coords):
    """(n,) of maps (P, n): standard deviation of position over a uniform map's; 0: a point."""
    weights = (energy / energy.sum(0)).mT
    variance = (weights @ coords.square() - (weights @ coords).square()).sum(1).clamp_min(0)
    return (variance / coords.var(0, correction=0).sum()).sqrt()


def in_a_disc(energy, coords):
    """(n,): the largest share of a map's energy (P, n) in a disc."""
    near = (torch.cdist(coords[::3], coords) <= DISC).to(energy)               # (P / 3, P)
    return (near @ energy).amax(0) / energy.sum(0)


def likeness(maps, pictures):
    """(n,): the largest |correlation| of maps (P, n) with one of pictures (P, N)."""
    maps, pictures = (F.normalize(x - x.mean(0), dim=0) for x in (maps, pictures))
    return (maps.mT @ pictures).abs().amax(1)


def half_width(a):
    """Steps of the grid after which the autocorrelation of a (P, d) is below a half. A feature of
    that band looks like a local atom, learnt or not."""
    side = math.isqrt(len(a))
    a = (a - a.mean(0)).mT.unflatten(1, (side, side))
    power = [sum((x[:, lag:] * x[:, :side - lag]).mean() for x in (a, a.mT)) for lag in range(side)]
    return (torch.stack(power) > power[0] / 2).int().argmin()


def describe(a, sae, own, others):
    """Rows of a dictionary, some of one number for all of it, and its codes."""
    side, z = math.isqrt(len(a)), sae.code(a)
    coords, maps = coordinate_grid(side, side).to(a), z[:, (z > 0).any(0)]
    missed = (a - z @ sae.decoder - sae.centre).square().mean() / a.var(0).mean()
    to_own, to_others = likeness(maps, own), likeness(maps, others)
    return {"spread": spread(maps.square(), coords),
            "energy in a disc": in_a_disc(maps.square(), coords),
            "likeness to own images": to_own, "likeness to others": to_others,
            "tracing": to_own - to_others, "variance explained": 1 - missed[None],
            "dead atoms": (z == 0).all(0).to(a).mean()[None],
            "half-width (grid steps)": half_width(a)[None]}, z


def dictionaries(activations, own, others, seed):
    """Rows of dictionaries of one layer of some networks, {name: a}; of "trained" also by another
    seed, and a random one. Returns its codes and atoms, too. own, others (P, N): grey levels of the
    images that the trained network shows, and of as many others."""
    cases = {name: (a, STEPS, seed) for name, a in activations.items()}
    a, rows = activations["trained"], {}
    cases |= {"second seed": (a, STEPS, -1 - seed), "random atoms": (a, 0, seed)}
    for name, (a, steps, key) in cases.items():
        a = a / a.var(0).mean().sqrt()
        sae = train_dictionary(a, steps, key)
        found, z = describe(a, sae, own, others)
        rows |= {f"{row}, {name}": x for row, x in found.items()}
        if name == "trained":
            kept = z, sae.decoder
    return rows, *kept


# ---- What an atom's direction does ---------------------------------------------------------------

def decibels(output, values):
    """PSNR (N,) of images (N, P, C)."""
    return psnr((output.clamp(-1, 1) - values).square().mean((1, 2)))


def ablate(rest, a, z, atoms, values, seed):
    """Rows of what it costs to project a (P, d), less its mean, off an atom at every point. The
    control takes as much away along a random direction. rest(a): images (N, P, C), like values.

    An atom that is subtracted only where it fires changes nothing elsewhere, since the network sees
    each point alone: the last row makes the point that such locality is trivial."""
    live = (z > 0).any(0)
    atoms, z, plain = atoms[live], z[:, live], rest(a)
    g = generator("directions", seed)
    random = F.normalize(torch.randn(atoms.shape, generator=g)).to(a)
    along, before, rows = (a - a.mean(0)) @ atoms.mT, decibels(plain, values), {}    # along (P, n)
    for name, directions in (("atom", atoms), ("random", random)):
        found = []
        for n, direction in enumerate(directions):
            output = rest(a - along[:, n:n + 1] * direction)
            lost = before - decibels(output, values)                           # (N,)
            change = (output - plain).square().sum((0, 2))                     # (P,)
            found.append((lost.mean(), lost.max(), change[z[:, n] > 0].sum() / change.sum()))
        for row, x in zip(("PSNR lost (dB)", "PSNR lost on one image (dB)",
                           "change where it fires"), torch.tensor(found).T):
            rows[f"{row}, {name}"] = x
    elsewhere = (rest(a - z[:, :1] * atoms[0]) - plain)[:, z[:, 0] == 0].abs().sum()
    return rows | {"area where it fires": (z > 0).to(a).mean(0),
                   "change elsewhere, if only there": elsewhere[None]}
