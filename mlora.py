"""mLoRA: an image as low-rank factors on a field that all images share. Weights fitted to one image
alone have no order; what gives them some, the factors or that all images start from one place?
(Yang, Salzmann & Suesstrunk, "Weight Space Representation Learning with Neural Fields",
arXiv 2512.01759.)

    python mlora.py                            # 8x8 digits: mlora.pt, mlora.json, mlora.png
    python diagnostics.py --ckpt mlora.pt

First a base field is trained on all images. Then it is frozen, and each image is fitted by numbers
of its own, of some kind. W is a hidden layer's weight in the base, A (r, in), B (out, r):

    mlp    a whole network, no base       lora    W + B A       mlora    W * (B A), entry by entry

With "-asym" some entries keep their value, the same for all images, so that neurons or components
cannot change places. All images start from one draw ("shared"), or each from its own ("separate"),
which is the control. The same command, given again, goes on after the last finished row.
"""
import argparse
import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import figures
import settings
from checkpoint import (InputError, exits, generator, model_from, read_checkpoint, save_checkpoint,
                        seeded)
from data import load_dataset
from measures import (DECAYS, PENALTIES, fit_linear, fit_mlp, fit_probe, knn_predict, nearest,
                      squared_distances)
from model import psnr
from reader import MLP, Attention, Reader
from siren import affine, coordinate_grid
from train import facts, train_reader

KINDS = ("mlp", "mlp-asym", "lora", "lora-asym", "mlora", "mlora-asym")
KEPT = "mlora"                             # the kind that diagnostics.py is given
PARTS = ("reconstruct", "classify", "connect", "generate")
BATCH, LR_BASE, LR_Z = 64, 2e-3, 3e-2      # the base: Adam, cosine decay to 0
BLOCK = 64                                 # images that are fitted at once
KAPPA = 1.0                                # deviation of what "-asym" freezes, of the usual one
EPSILON = 0.1                              # two fits of one image: starts so far apart, relatively
CONNECTED, POINTS = 64, 11                 # images of that, and points on the line between two fits
RATES = (3.0, 1.0, 0.3)                    # tried by --choose: times the usual one
USUAL = dict(width=32, depth=3, head_dim=16, reader_depth=3, lr=3e-3, epochs=15, latent=32,
             lambda_z=1e-5, base_epochs=80, progressive=False, fraction=0.25, rank=4, fit_steps=100,
             rate_mlp=0.01, rate_lora=0.01, rate_mlora=0.03, kinds=[*KINDS],
             init=["shared", "separate"], start=0, diffusion_steps=1000, only=[*PARTS],
             choose=False, out="mlora.pt")
DIGITS = dict(omega=4.0, latent=16, base_epochs=100, fraction=1.0)
USED = ("dataset data_root size train_size test_size val workers omega mlp_ratio batch_size "
        "weight_decay seed device").split()


# ---- The field -----------------------------------------------------------------------------------
#
# A network is one tensor (neurons, width + 1), a neuron a row and its bias last: `width` rows of
# the first layer, whose inputs are two (what is between is 0), each hidden layer's, one a channel.

def cosine(optimizer, peak: float, done: float):
    """A rate that decays from `peak` to 0 as `done` goes from 0 to 1."""
    optimizer.param_groups[0]["lr"] = peak * (1 + math.cos(math.pi * done)) / 2


def split_layers(network: Tensor, width: int) -> list[Tensor]:
    """A network (..., neurons, width + 1) -> each layer's weights (..., out, in + 1)."""
    first, *rest = network.split(width, -2)
    return [torch.cat([first[..., :2], first[..., -1:]], -1), *rest]


def field(inputs: Tensor, layers: list[Tensor]) -> Tensor:
    """Values (..., P, C)."""
    for weight in layers[:-1]:
        inputs = torch.sin(affine(inputs, weight))
    return affine(inputs, layers[-1])


def loss_and_grad(inputs: Tensor, x: Tensor, layers: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Each image's mean squared error (N,) at values x (N, P, C), and its gradient for each layer
    (N, out, in + 1): back-propagation written out, as in siren.py."""
    activations, slopes = [inputs], []
    for weight in layers[:-1]:
        u = affine(activations[-1], weight)                                    # (N, P, out)
        activations.append(u.sin())
        slopes.append(u.cos_())
    error = affine(activations[-1], layers[-1]) - x
    d, grads = 2 / error[0].numel() * error, []
    for weight, a in zip(reversed(layers), reversed(activations)):
        grads.insert(0, torch.cat([d.mT @ a, d.sum(-2)[..., None]], -1))
        if slopes:
            d = (d @ weight[..., :-1]).mul_(slopes.pop())
    return error.square().mean((1, 2)), grads


# ---- The model -----------------------------------------------------------------------------------

class MLoRA(nn.Module):
    """A base field; images as numbers of their own, of any kind; a reader of those of KEPT.

    An image's own numbers are (T, D). mlp: its network. lora, mlora: depth * r tokens a + b, a row
    of A and then the column of B that it goes with."""

    def __init__(self, args, channels: int, classes: int):
        super().__init__()
        self.args, self.channels, width = args, channels, args.width
        self.register_buffer("coords", args.omega * coordinate_grid(args.size, args.size))
        self.base = nn.Parameter(self.draw_network(generator("base", args.seed)), False)
        with seeded("reader", args.seed):
            self.reader = Reader(args.depth * args.rank, width, classes, 2 * width,
                                 args.reader_depth, args.head_dim, args.mlp_ratio, args.token_scale)

    def bound(self) -> Tensor:
        """Of a SIREN's initial weights (neurons, width + 1); biases are 0."""
        width, channels = self.args.width, self.channels
        bound = torch.full(((self.args.depth + 1) * width + channels, width + 1),
                           math.sqrt(6 / width))
        bound[:width], bound[-channels:] = 1 / 2, 1 / math.sqrt(width)
        bound[:, -1] = bound[:width, 2:] = 0
        return bound

    def draw_network(self, g) -> Tensor:
        return self.bound() * (2 * torch.rand(self.bound().shape, generator=g) - 1)

    def free(self, kind: str) -> Tensor:
        """Which of an image's numbers (T, D) are fitted. "-asym": of the weights into a neuron, or
        of a row of A, about sqrt(width) are not; which ones is drawn once."""
        args, width, (family, *asym) = self.args, self.args.width, kind.split("-")
        shape = self.base.shape if family == "mlp" else (args.depth * args.rank, 2 * width)
        free, rows = torch.ones(shape, dtype=torch.bool), slice(None)
        if family == "mlp":
            free[:width, 2:-1], rows = False, slice(width, -self.channels)
        if asym:
            drawn = torch.rand(free[rows].shape, generator=generator("mask", args.seed))
            frozen = drawn[:, :width].argsort(1)[:, :round(math.sqrt(width))]
            free[rows] = free[rows].scatter(1, frozen, False)
        return free

    def start(self, kind: str, *key) -> Tensor:
        """An image's numbers (T, D) before it is fitted; without a key those that all share."""
        width, rank, (family, *_) = self.args.width, self.args.rank, kind.split("-")
        g, free = generator("start", self.args.start, *key), self.free(kind)
        if family == "mlp":
            own, deviation = self.draw_network(g), self.bound() / math.sqrt(3)
        else:
            noise, deviation = torch.randn(free.shape, generator=g), 1 / math.sqrt(width)
        if family == "lora":               # B A is 0
            own = torch.cat([deviation * noise[:, :width], 0 * noise[:, width:]], 1)
        if family == "mlora":              # B A is near 1
            components = free[:, :width].unflatten(0, (-1, rank)).sum(1, True).clamp_min(1)
            a = (math.sqrt(rank) / components).expand(-1, rank, -1).flatten(0, 1)
            own = torch.cat([a, torch.full_like(a, 1 / math.sqrt(rank))], 1) * (1 + noise / 2)
            deviation = 0.0                # what is frozen takes no part
        frozen = torch.randn(free.shape, generator=generator("frozen", self.args.seed))
        return torch.where(free, own, KAPPA * deviation * frozen)

    def starts(self, kind: str, init: str, images: Tensor) -> Tensor:
        """(N, T, D), for images (N, C, size, size)."""
        if init == "shared":
            return self.start(kind).expand(len(images), -1, -1).to(images)
        return torch.stack([self.start(kind, image.tobytes())
                            for image in images.float().cpu().numpy()]).to(images)

    def layers(self, kind: str, own: Tensor) -> list[Tensor]:
        """The layers that an image's numbers (..., T, D) make, and the base's that follow. Those
        before, the base's first, are in `inputs`."""
        args, (family, *_) = self.args, kind.split("-")
        if family == "mlp":
            return split_layers(own, args.width)
        *hidden, head = split_layers(self.base, args.width)[1:]
        hidden = torch.stack(hidden)                                           # (depth, w, w + 1)
        a, b = own.unflatten(-2, (args.depth, args.rank)).split(args.width, -1)
        BA, W, bias = b.mT @ a, hidden[..., :-1], hidden[..., -1:]
        W = W * BA if family == "mlora" else W + BA                            # (..., depth, w, w)
        return [*torch.cat([W, bias.expand(*W.shape[:-1], 1)], -1).unbind(-3), head]

    def inputs(self, kind: str) -> Tensor:
        """What the first of `layers` gets at each pixel (P, in)."""
        if kind.startswith("mlp"):
            return self.coords
        return torch.sin(affine(self.coords, split_layers(self.base, self.args.width)[0]))

    def descend(self, kind: str, rate: float, own: Tensor, x: Tensor) -> Tensor:
        """Numbers (N, T, D) after args.fit_steps of Adam from `own`, for values x (N, P, C). Pixels
        are drawn anew each step, the same for all images: else neighbours differ by the draw."""
        own, free, inputs = own.clone().requires_grad_(), self.free(kind).to(x), self.inputs(kind)
        adam, steps = torch.optim.Adam([own], betas=(0.9, 0.99), fused=True), self.args.fit_steps
        count = max(1, int(self.args.fraction * len(inputs) + 1e-9))
        for step in range(steps):
            cosine(adam, rate, step / steps)
            g = generator("pixels", self.args.seed, step)
            seen = torch.randperm(len(inputs), generator=g)[:count].to(x.device)
            with torch.enable_grad():
                layers = self.layers(kind, own)
            _, grads = loss_and_grad(inputs[seen], x[:, seen], [each.detach() for each in layers])
            layers, grads = zip(*((w, g) for w, g in zip(layers, grads) if w.requires_grad))
            own.grad = torch.autograd.grad(layers, own, grads)[0] * free
            adam.step()
        return own.detach()

    @torch.no_grad()
    def fit_kind(self, kind: str, init: str, rate: float, images: Tensor) -> Tensor:
        """Numbers (N, T, D) of images (N, C, size, size) in [-1, 1]."""
        blocks = images.split(BLOCK)
        bar = tqdm(blocks, f"{kind}, {init}", leave=False, disable=len(blocks) < 9 or None)
        return torch.cat([self.descend(kind, rate, self.starts(kind, init, block),
                                       block.flatten(2).mT) for block in bar])

    @torch.no_grad()
    def show(self, kind: str, own: Tensor) -> Tensor:
        """Pictures (N, C, size, size)."""
        inputs = self.inputs(kind)
        pixels = torch.cat([field(inputs, self.layers(kind, block)).mT.clamp(-1, 1)
                            for block in own.split(BLOCK)])                    # (N, C, P)
        return pixels.unflatten(-1, (self.args.size, self.args.size))

    # What diagnostics.py asks of a method.

    def fit(self, images: Tensor) -> Tensor:
        return self.fit_kind(KEPT, "shared", self.args.rate_mlora, images) - self.start(KEPT).to(images)

    def read(self, tokens: Tensor) -> Tensor:
        return self.reader(tokens)

    def trace(self, tokens: Tensor):
        return self.reader.trace(tokens)

    def parts(self) -> dict[str, Tensor]:
        return {}                          # a token has no bias column

    def reconstruct(self, images: Tensor) -> Tensor:
        return self.show(KEPT, self.fit(images) + self.start(KEPT).to(images))


# ---- The base ------------------------------------------------------------------------------------

def modulation(args) -> nn.Sequential:
    """A latent z (N, l) -> how much less 1 each hidden neuron's row is multiplied by."""
    with seeded("modulation", args.seed):
        return nn.Sequential(nn.Linear(args.latent, 64), nn.GELU(),
                             nn.Linear(64, args.depth * args.width))


def modulated(base: Tensor, factor: Tensor) -> Tensor:
    """Networks (..., neurons, width + 1): the hidden rows of `base` times 1 + factor (..., rows)."""
    width = base.shape[1] - 1
    around = width, len(base) - width - factor.shape[-1]       # the first layer's rows, the head's
    return base * (1 + F.pad(factor, around))[..., None]


def train_base(model: MLoRA, images: Tensor) -> float:
    """Trains model.base as an auto-decoder of images (N, C, size, size): error + lambda_z |z|^2,
    z multiplying the hidden neurons. Then z = 0 is folded into it. Returns the PSNR (dB)."""
    args, count = model.args, max(1, int(model.args.fraction * len(model.coords) + 1e-9))
    modulate = modulation(args).to(images.device)
    z = nn.Embedding(len(images), args.latent, sparse=True).to(images.device)
    nn.init.zeros_(z.weight)
    base = model.base.requires_grad_()
    adam = torch.optim.Adam([base, *modulate.parameters()], fused=True)
    adam_z = torch.optim.SparseAdam(z.parameters())
    bar = tqdm(range(args.base_epochs), "base", leave=False, disable=None)
    for epoch in bar:
        g, total = generator("order", args.seed, epoch), 0.0
        coarse = 2 ** max(0, 2 - 4 * epoch // args.base_epochs) if args.progressive else 1
        size = max(2, args.size // coarse)
        coords = args.omega * coordinate_grid(size, size).to(images)
        batches = torch.randperm(len(images), generator=g).split(BATCH)
        for step, rows in enumerate(batches):
            x = F.interpolate(images[rows], (size, size), mode="bilinear", align_corners=True)
            seen = torch.randperm(len(coords), generator=g)[:count].to(x.device)
            own = z(rows.to(x.device))
            layers = split_layers(modulated(base, modulate(own)), args.width)
            error = (field(coords[seen], layers) - x.flatten(2).mT[:, seen]).square().mean((1, 2))
            (error + args.lambda_z * own.square().sum(1)).mean().backward()
            for optimizer, peak in ((adam, LR_BASE), (adam_z, LR_Z)):
                cosine(optimizer, peak, (epoch + step / len(batches)) / args.base_epochs)
                optimizer.step()
                optimizer.zero_grad()
            total += float(psnr(error.detach()).sum())
        bar.set_postfix_str(f"PSNR {total / len(images):.2f} dB")
    with torch.no_grad():
        base.copy_(modulated(base, modulate(0 * z.weight[0])))
    base.requires_grad_(False).grad = None
    return total / len(images)


# ---- Classes and clusters ------------------------------------------------------------------------

def kmeans(x: Tensor, k: int, g, steps: int = 50) -> Tensor:
    """Cluster (n,) of each row of x (n, d), by Lloyd's steps from k rows drawn as in k-means++."""
    def nearest_centre(centres):
        return torch.cat([*squared_distances(centres, x)]).min(1)

    centres = x[torch.randint(len(x), (1,), generator=g)]
    while len(centres) < k:
        chances = nearest_centre(centres).values.double().cpu() + 1e-12
        centres = torch.cat([centres, x[torch.multinomial(chances, 1, generator=g)]])
    for _ in range(steps):
        member = F.one_hot(nearest_centre(centres).indices, k).to(x)           # (n, k)
        means = member.T @ x / member.sum(0).clamp_min(1)[:, None]
        centres = torch.where(member.any(0)[:, None], means, centres)
    return nearest_centre(centres).indices


def adjusted_rand(a: Tensor, b: Tensor) -> float:
    """Agreement of two labellings (n,) of the same rows: 1 the same, 0 as by chance (Hubert & Arabie
    1985)."""
    def pairs(count):
        return float((count * (count - 1) / 2).sum())

    table = torch.zeros(int(a.max()) + 1, int(b.max()) + 1, dtype=torch.double)
    table.index_put_((a.cpu(), b.cpu()), torch.ones(1, dtype=torch.double), accumulate=True)
    rows, columns, every = pairs(table.sum(1)), pairs(table.sum(0)), pairs(table.sum())
    expected = rows * columns / every
    return (pairs(table) - expected) / ((rows + columns) / 2 - expected)


def classify(bank: Tensor, bank_labels: Tensor, x: Tensor, labels: Tensor, seed: int) -> dict:
    """Accuracies on rows x (q, d), and k-means' agreement with the classes on the bank (n, d)."""
    guesses = {"1-NN": knn_predict(bank, bank_labels, x, 1),
               "10-NN": knn_predict(bank, bank_labels, x),
               "linear": fit_probe(fit_linear, PENALTIES, bank, bank_labels, x)[0],
               "MLP": fit_probe(fit_mlp, DECAYS, bank, bank_labels, x)[0]}
    found = {how: float((guess == labels).double().mean()) for how, guess in guesses.items()}
    k = int(bank_labels.max()) + 1
    ari = [adjusted_rand(kmeans(bank, k, generator("k-means", seed, i)), bank_labels)
           for i in range(5)]
    return found | {"ARI": [sum(ari) / len(ari), min(ari), max(ari)]}


# ---- Linear mode connectivity --------------------------------------------------------------------

def align(a: Tensor, b: Tensor, rank: int) -> Tensor:
    """b (N, depth * r, D) with the components of each layer in the order that suits `a` best: the
    largest sum of inner products of all orders. The picture stays the same."""
    a, b = (each.unflatten(1, (-1, rank)) for each in (a, b))                  # (N, depth, r, D)
    orders = torch.tensor([*itertools.permutations(range(rank))], device=a.device)     # (r!, r)
    match = (a @ b.mT)[..., torch.arange(rank), orders].sum(-1)                # (N, depth, r!)
    order = orders[match.argmax(-1)]                                           # (N, depth, r)
    return b.gather(2, order[..., None].expand_as(b)).flatten(1, 2)


@torch.no_grad()
def path_error(model: MLoRA, kind: str, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """Mean squared error (POINTS, N) along the line from a to b (N, T, D), at values x (N, P, C)."""
    inputs = model.inputs(kind)
    return torch.stack([
        (field(inputs, model.layers(kind, torch.lerp(a, b, t))) - x).square().mean((1, 2))
        for t in torch.linspace(0, 1, POINTS).to(a)])


def barrier(error: Tensor) -> float:
    """How far the error (POINTS, N) rises above the line between its ends (Frankle et al., ICML
    2020), the mean over images."""
    t = torch.linspace(0, 1, len(error)).to(error)[:, None]
    return float((error - torch.lerp(error[0], error[-1], t)).amax(0).mean())


def connect(model: MLoRA, kind: str, rate: float, images: Tensor) -> dict:
    """Of two fits of each image, from starts EPSILON apart."""
    free, start, x = model.free(kind), model.start(kind), images.flatten(2).mT
    g = generator("apart", model.args.start)
    starts = [start * (1 + EPSILON * free * torch.randn(free.shape, generator=g)) for _ in "ab"]
    starts = [each.expand(len(x), -1, -1).to(x) for each in starts]
    a, b = (model.descend(kind, rate, each, x) for each in starts)
    before, after = (F.cosine_similarity(*(each.flatten(1) for each in pair)).mean()
                     for pair in (starts, (a, b)))
    error = path_error(model, kind, a, b, x)
    found = {"barrier": barrier(error), "path": error.mean(1).tolist(),
             "cosine before": float(before), "cosine after": float(after)}
    if not kind.startswith("mlp"):
        error = path_error(model, kind, a, align(a, b, model.args.rank), x)
        found["barrier aligned"] = barrier(error)
    return found


# ---- Generation ----------------------------------------------------------------------------------

class Denoiser(nn.Module):
    """Noisy tokens (N, depth * r, D), angle (N,) -> v. Tokens know their layer and component; they
    attend within a layer, then across."""

    def __init__(self, depth: int, rank: int, features: int, width=64):
        super().__init__()
        self.shape = depth, rank
        self.embed, self.out = nn.Linear(features, width), nn.Linear(width, features)
        self.time = nn.Linear(16, width)
        self.layer = nn.Parameter(0.02 * torch.randn(depth, 1, width))
        self.component = nn.Parameter(0.02 * torch.randn(rank, width))
        self.blocks = nn.ModuleList(block for _ in range(3) for block in (
            Attention(width, 16), Attention(width, 16), MLP(width, 4)))
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        waves = angle[:, None] * 2 ** torch.arange(8).to(x)
        place = (self.layer + self.component).flatten(0, 1)                    # (T, width)
        x = self.embed(x) + place + self.time(torch.cat([waves.sin(), waves.cos()], 1))[:, None]
        for within, across, mlp in zip(*(self.blocks[i::3] for i in range(3))):
            x = x + within(x.unflatten(1, self.shape).flatten(0, 1)).view_as(x)
            x = x + across(x)
            x = x + mlp(x)
        return self.out(x)


def noised(x: Tensor, noise: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """The diffusion's state, cos x + sin noise, and the v to be predicted, cos noise - sin x
    (Salimans & Ho, ICLR 2022). Angle (N,): 0 data, pi / 2 noise."""
    cos, sin = (f(angle).view(-1, *[1] * (x.dim() - 1)) for f in (torch.cos, torch.sin))
    return cos * x + sin * noise, cos * noise - sin * x


def ddim(predict, x: Tensor, steps: int = 50) -> Tensor:
    """From noise x (N, ...) to a sample, without further noise (Song et al., ICLR 2021): with v
    each step turns the state by the same angle."""
    turn = math.pi / 2 / steps
    for step in range(steps, 0, -1):
        v = predict(x, torch.full((len(x),), step * turn).to(x))
        x = math.cos(turn) * x - math.sin(turn) * v
    return x


def diffusion(x: Tensor, count: int, depth: int, steps: int, seed: int) -> Tensor:
    """So many samples of a DDPM (Ho et al., NeurIPS 2020) of tokens x (n, T, D)."""
    g, (n, tokens, features) = generator("diffusion", seed), x.shape
    with seeded("denoiser", seed):
        denoiser = Denoiser(depth, tokens // depth, features).to(x)
    adam = torch.optim.Adam(denoiser.parameters(), fused=True)
    for step in tqdm(range(steps), "diffusion", leave=False, disable=None):
        rows = torch.randint(n, (128,), generator=g)
        noise, angle = torch.randn(128, tokens, features, generator=g), torch.rand(128, generator=g)
        angle = math.pi / 2 * angle.to(x)
        state, v = noised(x[rows], noise.to(x), angle)
        F.mse_loss(denoiser(state, angle), v).backward()
        cosine(adam, 2e-3, step / steps)
        adam.step()
        adam.zero_grad()
    with torch.no_grad():
        return ddim(denoiser, torch.randn(count, tokens, features, generator=g).to(x))


def gaussian(x: Tensor, count: int, seed: int) -> Tensor:
    """So many draws (count, d) from the normal distribution of the mean and covariance of x (n, d):
    sums of its rows with random weights."""
    mean, weights = x.mean(0), torch.randn(count, len(x), generator=generator("gaussian", seed))
    return mean + weights.to(x) @ (x - mean) / math.sqrt(len(x))


def frechet(x: Tensor, y: Tensor) -> float:
    """Distance of two normal distributions with the moments of x (n, d) and y (m, d) (Dowson &
    Landau 1982): |difference of means|^2 + tr(S + R - 2 (S R)^(1/2))."""
    (S, R), x, y = (torch.cov(each.double().T) for each in (x, y)), x.double(), y.double()
    values, vectors = torch.linalg.eigh(S)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ R @ root).clamp_min(0).sqrt().sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + S.trace() + R.trace() - 2 * cross)


def train_features(images: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """A small convolutional classifier; without its last layer: images -> features (N, 64)."""
    with seeded("features", seed):
        size = (images.shape[-1] + 3) // 4
        net = nn.Sequential(
            nn.Conv2d(images.shape[1], 32, 3, 2, 1), nn.GELU(), nn.Conv2d(32, 64, 3, 2, 1),
            nn.GELU(), nn.Flatten(), nn.Linear(64 * size ** 2, 64), nn.GELU(),
            nn.Linear(64, int(labels.max()) + 1)).to(images)
    adam, epochs = torch.optim.Adam(net.parameters(), fused=True), 10
    for epoch in tqdm(range(epochs), "features", leave=False, disable=None):
        cosine(adam, 2e-3, epoch / epochs)
        g = generator("features", seed, epoch)
        for rows in torch.randperm(len(images), generator=g).split(BATCH):
            F.cross_entropy(net(images[rows]), labels[rows]).backward()
            adam.step()
            adam.zero_grad()
    return net.requires_grad_(False)


def novelty(samples: Tensor, bank: Tensor, test: Tensor) -> dict:
    """Are samples copies? Their distance to the nearest row of the bank, the median, beside that of
    test rows; all (n, d)."""
    near = [float((bank[nearest(bank, x, 1)[:, 0]] - x).norm(dim=1).median())
            for x in (samples, test)]
    return {"nearest": near[0], "nearest of test": near[1], "copies": near[0] < near[1] / 2}


def generate(model: MLoRA, kind: str, bank: Tensor, test: Tensor, features, real: Tensor):
    """({sampler: figures}, {sampler: eight pictures}) of weights sampled like `bank` (n, T, D), as
    many as `test` has. real: features (n, 64) of the bank's images."""
    args, found, shown = model.args, {}, {}
    deviation, mean = torch.std_mean(bank, 0)
    x, y = ((each - mean) / deviation.clamp_min(1e-6) for each in (bank, test))
    samples = {"Gaussian": gaussian(x.flatten(1), len(y), args.seed).view_as(y)}
    if not kind.startswith("mlp"):
        samples["DDPM"] = diffusion(x, len(y), args.depth, args.diffusion_steps, args.seed)
    for sampler, sample in samples.items():
        pictures = model.show(kind, sample * deviation + mean)
        found[sampler] = {"frechet": frechet(features(pictures), real),
                          **novelty(sample.flatten(1), x.flatten(1), y.flatten(1))}
        shown[sampler] = pictures[:8]
    return found, shown


# ---- The program ---------------------------------------------------------------------------------

def table(header: list[str], rows: list[list]) -> str:
    rows = [[x if isinstance(x, str) else f"{x:.3g}" for x in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
                     for row in rows) + "\n"


def tables(report: dict) -> str:
    """All that was measured, as text."""
    how = ("1-NN", "10-NN", "linear", "MLP", "reader")
    seen, joined, sampled = [], [], []
    for name, row in report["rows"].items():
        cells = [f"{100 * row[each]:.1f}" if each in row else "" for each in how]
        ari = "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in row["ARI"])) if "ARI" in row else ""
        seen.append([name, str(row["numbers"]), row.get("psnr", ""), *cells, ari])
        if "barrier" in row:
            joined.append([name, row["barrier"], row.get("barrier aligned", ""),
                           row["cosine before"], row["cosine after"]])
        for sampler, each in row.get("samplers", {}).items():
            sampled.append([f"{name}, {sampler}", each["frechet"], each["nearest"],
                            each["nearest of test"], "copies" if each["copies"] else ""])
    text = (f"base: training PSNR {report['base_psnr']:.2f} dB; PSNR in dB, accuracies and ARI in %\n\n"
            + table(["test images", "numbers", "PSNR", *how, "k-means ARI"], seen))
    if joined:
        text += "\n" + table([f"two fits, starts {EPSILON:g} apart", "barrier (MSE)", "aligned",
                              "cosine before", "after"], joined)
    if sampled:
        text += "\n" + table([f"samples (Frechet floor {report['floor']:.3g})", "Frechet",
                              "nearest training weights", "of test weights", ""], sampled)
    return "\n".join([text, *report.get("choices", [])])


def read_flags(argv: list[str] | None) -> argparse.Namespace:
    p = settings.parser(__doc__.split("\n\n")[0])
    p.prog, more = "mlora.py", p.add_argument_group("low-rank weights")
    for name, kind, text in (
            ("latent", settings.whole(1, 4096), "numbers in the base's z"),
            ("lambda-z", settings.number(0), "weight of |z|^2"),
            ("base-epochs", settings.whole(1), "of the base"),
            ("rank", settings.whole(1, 6), "r, components a layer"),
            ("fit-steps", settings.whole(1), "of Adam, an image"),
            ("rate-mlp", settings.number(0, above=True), "its rate, for mlp"),
            ("rate-lora", settings.number(0, above=True), "... for lora"),
            ("rate-mlora", settings.number(0, above=True), "... for mlora"),
            ("start", settings.whole(0), "seed of the numbers before a fit"),
            ("diffusion-steps", settings.whole(1), "of the denoiser's training")):
        more.add_argument(f"--{name}", type=kind, help=text)
    for name, choices in (("kinds", KINDS), ("init", ("shared", "separate")), ("only", PARTS)):
        more.add_argument(f"--{name}", nargs="+", choices=choices, help="these alone")
    more.add_argument("--progressive", action="store_true", help="the base sees coarse images first")
    more.add_argument("--choose", action="store_true", help="with --val: try other rates")
    given = vars(p.parse_args(argv))
    for name in given.keys() - {*USED, *USUAL}:
        raise InputError(f"--{name.replace('_', '-')}: means nothing to low-rank weights")
    usual = USUAL | (DIGITS if given.get("dataset", "digits") == "digits" else {})
    args = settings.settings(usual | given)
    if args.choose and not args.val:
        raise InputError("--choose needs --val: nothing is chosen on test images")
    settings.check_output(argparse.Namespace(out=args.out, resume=True))
    return args


def open_run(args) -> dict | None:
    """What this command left. InputError: --out holds another's."""
    if not Path(args.out).exists():
        return None
    content = read_checkpoint(args.out)
    fixed = vars(args).keys() - settings.FREE - {"token_scale"}
    if any(content["args"].get(key) != vars(args)[key] for key in fixed):
        raise InputError(f"--out {args.out}: holds another run; choose another")
    args.token_scale = content["args"]["token_scale"]
    return content


def representations(args) -> dict[str, tuple[str, str, float]]:
    """{name: (kind, init, rate)} to fit, that of the checkpoint among them."""
    found, usual = {}, {kind: vars(args)[f"rate_{kind.split('-')[0]}"] for kind in KINDS}
    for init, kind in itertools.product(args.init, args.kinds):
        for rate in [usual[kind] * factor for factor in (RATES if args.choose else (1.0,))]:
            name = kind + ", separate" * (init == "separate") + f", rate {rate:g}" * args.choose
            found[name] = kind, init, rate
    kept = KEPT, "shared", usual[KEPT]
    return found if kept in found.values() else {KEPT: kept} | found


class Data(NamedTuple):
    """Images (n, C, size, size) in [-1, 1] and their labels; what generation is judged by."""
    train: Tensor
    labels: Tensor
    test: Tensor
    test_labels: Tensor
    features: nn.Module | None
    real: Tensor | None    # features of the training images

    @property
    def floor(self) -> float:
        return frechet(self.features(self.test), self.real)


def open_data(args, images, test, device) -> Data:
    pairs = [next(each.batches([torch.arange(len(each))], device, args.workers))
             for each in (images, test)]
    x, y = (each.signal(pixels) for each, (pixels, _) in zip((images, test), pairs))
    features = None
    if "generate" in args.only:
        features = train_features(x, pairs[0][1], args.seed)[:-1]
    return Data(x, pairs[0][1], y, pairs[1][1], features, features and features(x))


def examine(model: MLoRA, data: Data, kind: str, init: str, rate: float) -> tuple[dict, dict]:
    """Figures of one kind of weights, and a few pictures {what: (8, C, size, size)}."""
    args, rows = model.args, []
    bank, test = (model.fit_kind(kind, init, rate, x) for x in (data.train, data.test))
    pictures = model.show(kind, test)
    row = {"kind": kind, "init": init, "rate": rate, "numbers": int(model.free(kind).sum()),
           "psnr": float(psnr((pictures - data.test).square().mean((1, 2, 3))).mean())}
    shown = {"rebuilt": pictures[:8]}
    kept = (kind, init, rate) == (KEPT, "shared", args.rate_mlora)
    if kept or "classify" in args.only:
        bank_tokens, tokens = (each - model.start(kind).to(each) for each in (bank, test))
        reader = train_reader(bank_tokens, data.labels, args)
        row["reader"] = float((reader(tokens).argmax(1) == data.test_labels).double().mean())
        if kept:
            model.reader, args.token_scale = reader, reader.token_scale
    if "classify" in args.only:
        row |= classify(bank.flatten(1), data.labels, test.flatten(1), data.test_labels, args.seed)
    if "connect" in args.only and init == "shared":
        row |= connect(model, kind, rate, data.test[:CONNECTED])
    if "generate" in args.only and init == "shared":
        row["samplers"], samples = generate(model, kind, bank, test, data.features, data.real)
        shown |= samples
    return row, shown


def choices(rows: dict) -> list[str]:
    """The rate of each kind: of those whose 1-NN accuracy is within a point of the best, that of the
    best PSNR."""
    lines = []
    for what, group in itertools.groupby(rows.values(), lambda row: (row["kind"], row["init"])):
        group = list(group)
        best = max(row["1-NN"] for row in group)
        chosen = max((row for row in group if row["1-NN"] >= best - 0.01),
                     key=lambda row: row["psnr"])
        lines.append(f"{', '.join(what)} start: rate {chosen['rate']:g}, the best PSNR within a "
                     "point of the best 1-NN")
    return lines


def run(argv: list[str] | None):
    args = read_flags(argv)
    device, content = settings.find_device(args.device), open_run(args)
    images, test = load_dataset(args, device)
    if min(len(images), len(test)) < 16:
        raise InputError(f"{len(images)} training and {len(test)} test images: 16 needed")
    if content and tuple(content["data"]) != facts(images):
        raise InputError(f"--dataset {args.dataset}: not the data of {args.out}, or changed since")
    model = (model_from(content, args.out, device) if content else
             MLoRA(args, images.channels, len(images.classes)).to(device))
    model.args, metrics = args, content["metrics"] if content else {"rows": {}, "pictures": {}}

    def save(**unfinished):
        save_checkpoint(args.out, unfinished | {
            "method": "mlora", "args": vars(args), "data": facts(images),
            "model": model.state_dict(), "metrics": metrics})

    data = open_data(args, images, test, device)
    if not content:
        metrics["base_psnr"] = train_base(model, data.train)
        save(progress={})
    rows, pictures = metrics["rows"], metrics["pictures"]
    if "classify" in args.only and "pixels" not in rows:
        rows["pixels"] = {"numbers": data.test[0].numel()} | classify(
            data.train.flatten(1), data.labels, data.test.flatten(1), data.test_labels, args.seed)
    for name, what in representations(args).items():
        if name not in rows:
            rows[name], pictures[name] = examine(model, data, *what)
            save(progress={})
    save()
    report = {"command": settings.command_line(args, "mlora"), "flags": vars(args),
              "base_psnr": metrics["base_psnr"], "rows": rows, **settings.environment(device)}
    if data.features:
        report["floor"] = data.floor
    if args.choose:
        report["choices"] = choices(rows)
    path = Path(args.out).with_suffix(".json")
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    shown = {name: {what: x.cpu().numpy() for what, x in each.items()}
             for name, each in pictures.items()}
    figures.mlora_figure(path.with_suffix(".png"), report,
                         {"image": {"rebuilt": data.test[:8].cpu().numpy()}} | shown)
    print(tables(report))


def from_checkpoint(content: dict, device="cpu") -> MLoRA:
    """The model in what `read_checkpoint` returned."""
    args, (channels, classes, _) = argparse.Namespace(**content["args"]), content["data"]
    model = MLoRA(args, channels, len(classes))
    model.load_state_dict(content["model"])
    return model.to(device)


def main(argv: list[str] | None = None):
    with exits("mlora.py"):
        run(argv)


if __name__ == "__main__":
    main()
