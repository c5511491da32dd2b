"""The model: SIREN initialisation (anchor), inner loop and reader composed, for images.

    images (N, C, size, size) -> look -> fit_and_error: phi -> tokens phi - theta -> logits
"""
import argparse

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from checkpoint import generator, seeded
from inner_loop import MetaSGD, draw_pixels, each_step
from measures import supervised_contrastive
from reader import Reader, RoutedReader
from settings import RECIPE
from siren import Siren, Weights, coordinate_grid


class MWT(nn.Module):
    """Anchor, inner loop and reader for images (N, channels, size, size) in [-1, 1]."""
    method = "mwt"             # as checkpoints say

    def __init__(self, args, channels: int, classes: int):
        super().__init__()
        self.fraction, self.centre_colour = args.fraction, args.centre_colour
        self.w_task, self.w_cluster = args.w_task, args.w_cluster
        self.bf16 = args.precision == "bf16"
        with seeded("siren", args.seed):
            self.siren = Siren(2, channels, args.width, args.depth, args.omega)
        with seeded("inner loop", args.seed):
            self.inner_loop = MetaSGD(self.siren, args.steps, args.shared_lr)
        shape = (args.depth * args.width, args.width, classes, args.width + 1, args.reader_depth,
                 args.head_dim, args.mlp_ratio, args.token_scale)
        with seeded("reader", args.seed):
            if args.readout or args.branch:
                self.reader = RoutedReader(*shape, args.readout, args.branch, channels)
            else:
                self.reader = Reader(*shape)
        grid = coordinate_grid(args.size, args.size)
        self.register_buffer("coords", grid, persistent=False)                 # (P, 2)

    @property
    def points(self) -> int:
        """Pixels of an image that one look sees."""
        return int(self.fraction * len(self.coords) + 1e-9)

    @property
    def block_size(self) -> int:
        """Images fitted at once where no gradient is kept: what a CPU's caches hold."""
        return max(1, (4096 if self.coords.device.type == "cpu" else 131072) // self.points)

    def look(self, images: Tensor, draws: int, generator_=None) -> tuple[Tensor, Tensor]:
        """Coords (draws, [N,] n, 2) and values (draws, N, n, C) of the pixels that each of k + 1
        draws sees, k for the inner steps and one for the outer loss: all of them, or a fraction
        drawn for each image from the generator; in evaluation, without one, the same for all."""
        values, pixels = images.flatten(2).mT, None                            # (N, P, C)
        if self.fraction < 1:
            g = generator_ or generator("evaluation", device=images.device)
            n = len(images) if generator_ else 1
            pixels = draw_pixels(draws, n, len(self.coords), self.fraction, g, images.device)
            pixels = pixels.expand(-1, len(images), -1)                        # (draws, N, n)
        return each_step(self.coords, values, draws, pixels)

    def colour(self, values: Tensor) -> Tensor:
        """Mean colour (N, C) of all that was seen, values (draws, N, n, C)."""
        return values.mean((0, 2)) if self.fraction < 1 else values[0].mean(1)

    def fit_and_error(self, coords: Tensor, values: Tensor, clamp=False) -> tuple[Weights, Tensor]:
        """phi by all looks but the last, and by the last each image's mean squared error (N,). With
        centre_colour phi stores the image less its mean colour."""
        centred, mean = values[:-1], 0.0
        if self.centre_colour:
            mean = self.colour(values)[:, None]                                # (N, 1, C)
            centred = centred - mean
        phi = self.inner_loop.descend(self.siren, coords[:-1], centred)
        prediction = self.siren(coords[-1], phi) + mean                        # (N, n, C)
        prediction = prediction.clamp(-1, 1) if clamp else prediction
        return phi, (prediction - values[-1]).square().mean((-2, -1))

    def tokens(self, phi: Weights) -> Tensor:
        """phi - theta, a hidden neuron a row, its bias last: (N, depth * width, width + 1)."""
        return (phi.hidden - self.siren.hidden).flatten(1, 2)

    def logits(self, tokens: Tensor, values: Tensor) -> Tensor:
        """`read`, and for a branch that takes it the mean colour of values (draws, N, n, C)."""
        if getattr(self.reader, "takes_colour", False):
            return self.read(tokens, self.colour(values))
        return self.read(tokens)

    def forward(self, coords: Tensor, values: Tensor, labels: Tensor, groups=None) -> Tensor:
        """The `statistics` of a batch as `look` returned it. The class loss reaches the INR with
        weight w_task: its gradient is scaled where tokens enter the reader, so that one backward
        pass serves all losses. groups (N,): for the contrastive loss, if not the labels."""
        phi, error = self.fit_and_error(coords, values)
        tokens = self.tokens(phi)                                              # (N, T, width + 1)
        fixed = tokens.detach()
        if self.w_task:                                # the same numbers, w_task times the gradient
            fixed = fixed + self.w_task * (tokens - fixed)
        logits = self.logits(fixed, values).to(tokens.dtype)                  # (N, classes)
        cluster = error.new_zeros(())
        if self.w_cluster:
            moved = [(phi.first - self.siren.first).flatten(1), tokens.flatten(1)]
            groups = labels if groups is None else groups
            cluster = self.w_cluster * supervised_contrastive(torch.cat(moved, 1), groups)
        return statistics(logits, labels, error, cluster)

    # What diagnostics.py asks of a method; `read` and `logits` serve training too.

    def adapt(self, images: Tensor, steps: int | None = None) -> Weights:
        """phi of images (N, C, size, size) after `steps` (default k) steps."""
        coords, values = self.look(images, (self.inner_loop.steps if steps is None else steps) + 1)
        return self.fit_and_error(coords, values)[0]

    @torch.no_grad()
    def fit(self, images: Tensor) -> Tensor:
        """Images (N, C, size, size) in [-1, 1] -> tokens (N, T, width + 1)."""
        blocks = images.split(self.block_size)
        return torch.cat([self.tokens(self.adapt(block)) for block in blocks])

    def read(self, tokens: Tensor, *colour) -> Tensor:
        """Tokens (N, T, width + 1) -> logits (N, classes)."""
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bf16):
            return self.reader(tokens, *colour)

    def trace(self, tokens: Tensor):
        """logits (N, classes), [(stage, state (N, T, width)), ...] of the reader."""
        return self.reader.trace(tokens)

    def parts(self) -> dict[str, Tensor]:
        """Bases (width + 1, m) of parts of a token: the bias column, and the column whose incoming
        activation is the most constant over pixels at theta, as a bias's is."""
        eye = torch.eye(self.siren.hidden.shape[-1], device=self.coords.device)
        a, squared_mean, mean_square = self.coords, 0.0, 0.0
        for weight in self.siren.layers(self.siren.anchor())[:-1]:
            a = torch.sin(a @ weight[:, :-1].mT + weight[:, -1])               # (P, width)
            squared_mean = squared_mean + a.mean(0).square()
            mean_square = mean_square + a.square().mean(0)
        constant = int((squared_mean / mean_square).argmax())
        return {"bias column": eye[:, -1:], "most constant column": eye[:, constant:constant + 1]}

    @torch.no_grad()
    def coordinates(self, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """More places (N, d) to look for clusters: phi - theta with the first layer, each layer."""
        blocks = [self.adapt(block).first for block in images.split(self.block_size)]
        first = (torch.cat(blocks) - self.siren.first).flatten(1)
        layers = tokens.flatten(1).chunk(len(self.siren.hidden), dim=1)
        return {"phi - theta": torch.cat([first, *layers], 1), "first layer": first,
                **{f"hidden layer {i}": layer for i, layer in enumerate(layers, 1)}}

    @torch.no_grad()
    def reconstruct(self, images: Tensor, steps: int | None = None) -> Tensor:
        """What the weights show of images (N, C, size, size), after so many inner steps."""
        shown, steps = [], self.inner_loop.steps if steps is None else steps
        for block in images.split(self.block_size):
            coords, values = self.look(block, steps + 1)
            phi = self.fit_and_error(coords, values)[0]
            pixels = self.siren(self.coords, phi).mT                           # (N or 1, C, P)
            if self.centre_colour:
                pixels = pixels + self.colour(values)[..., None]
            shown.append(pixels.expand_as(block.flatten(2)).view_as(block))
        return torch.cat(shown).clamp(-1, 1)


def statistics(logits, labels, error, cluster) -> Tensor:
    """Means over a batch (5,): class, reconstruction and contrastive loss, accuracy, PSNR (dB)."""
    right = (logits.argmax(-1) == labels).to(error.dtype)
    return torch.stack([F.cross_entropy(logits, labels), error.mean(), cluster, right.mean(),
                        psnr(error.detach()).mean()])


def psnr(error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1] (peak to peak 2), at most 100 dB."""
    return 10 * torch.log10(4 / error.clamp_min(4e-10))


def from_checkpoint(content: dict, device="cpu") -> MWT:
    """The model in what `read_checkpoint` returned."""
    args = argparse.Namespace(**RECIPE | content["args"])
    channels, classes, _ = content["data"]
    with torch.device("meta"):     # takes no memory: the sizes are only claims
        model = MWT(args, channels, len(classes))
    model.load_state_dict(content["model"], assign=True)
    model.coords = coordinate_grid(args.size, args.size).to(model.siren.first.dtype)
    return model.to(device)
