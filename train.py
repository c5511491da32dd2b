"""Trains a SIREN initialisation, its inner-loop step sizes and a Transformer reader end to end, to
classify images from the weights of their INRs (Gielisse & van Gemert, "End-to-End Implicit Neural
Representations for Classification", CVPR 2025).

    python train.py                                      # 8x8 digits, embedded: under two minutes
    python train.py --dataset cifar10                    # the paper's MWT; downloads the data
    python train.py --dataset cifar10 --w-task 0         # WT: no class loss for the INR
    torchrun --nproc_per_node=4 train.py --dataset path/to/imagenette --width 256
    python train.py --resume --out out.pt                # go on after a crash, a kill or Ctrl-C
    python train.py --eval-only --ckpt out.pt
"""
import argparse
import contextlib
import json
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
import figures
from checkpoint import (InputError, Stop, exits, generator, load_checkpoint, model_from,
                        read_checkpoint, save_checkpoint, seeded)
from inner_loop import MetaSGD, draw_pixels, each_step
from measures import supervised_contrastive, wilson
from reader import Reader, RoutedReader
from settings import (LAUNCH, RANK, RECIPE, WORLD, command_line, environment, find_device, open_run,
                      parser)
from siren import Siren, Weights, coordinate_grid

# ---- The model -----------------------------------------------------------------------------------

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
    def on_cpu(self) -> bool:
        return self.coords.device.type == "cpu"

    @property
    def points(self) -> int:
        """Pixels of an image that one look sees."""
        return int(self.fraction * len(self.coords) + 1e-9)

    @property
    def block_size(self) -> int:
        """Images fitted at once where no gradient is kept: as many as a CPU's caches hold."""
        points = 1 << (12 if self.on_cpu else 17)
        return max(1, points // self.points)

    def look(self, images: Tensor, draws: int, generator_=None) -> tuple[Tensor, Tensor]:
        """Coords (draws, [N,] n, 2) and values (draws, N, n, C): the pixels of images (N, C, size,
        size) that each of k + 1 draws takes, k for the inner steps and one for the outer loss. All
        pixels, or a fraction drawn for each image anew from the generator; without a generator, in
        evaluation, always the same for all images."""
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
        """phi, and each image's mean squared error (N,), of what `look` returned: the last look is
        for the error, the others are for the inner steps. With centre_colour phi stores the image
        less its mean colour."""
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
        """The `statistics` of a batch as `look` returned it, k + 1 looks. The class loss reaches
        the INR with weight w_task: its gradient is scaled where tokens enter the reader, so that
        one backward pass serves all losses. groups (N,): what the contrastive loss pulls together,
        if not the classes."""
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
        a, mean_square, square = self.coords, 0.0, 0.0
        for weight in self.siren.layers(self.siren.anchor())[:-1]:
            a = torch.sin(a @ weight[:, :-1].mT + weight[:, -1])               # (P, width)
            mean_square = mean_square + a.mean(0).square()
            square = square + a.square().mean(0)
        constant = int((mean_square / square).argmax())
        return {"bias column": eye[:, -1:], "most constant column": eye[:, constant:constant + 1]}

    @torch.no_grad()
    def coordinates(self, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """More places (N, d) to look for clusters: phi - theta with the first layer, each layer."""
        blocks = images.split(self.block_size)
        first = torch.cat([self.adapt(block).first - self.siren.first for block in blocks])
        first = first.flatten(1)
        layers = tokens.chunk(len(self.siren.hidden), dim=1)
        named = {"phi - theta": torch.cat([first, tokens.flatten(1)], 1), "first layer": first}
        named |= {f"hidden layer {i + 1}": layer.flatten(1) for i, layer in enumerate(layers)}
        return named

    @torch.no_grad()
    def reconstruct(self, images: Tensor, steps: int | None = None) -> Tensor:
        """What the weights show of images (N, C, size, size), after so many inner steps."""
        shown = []
        for block in images.split(self.block_size):
            pixels = self.siren(self.coords, self.adapt(block, steps)).mT      # (N or 1, C, P)
            shown.append(pixels.expand_as(block.flatten(2)).view_as(block))
        mean = images.mean((2, 3), keepdim=True) if self.centre_colour else 0.0
        return (torch.cat(shown) + mean).clamp(-1, 1)


def statistics(logits, labels, error, cluster) -> Tensor:
    """Means over a batch (5,): class loss, reconstruction and weighted contrastive loss, the outer
    losses, then accuracy and PSNR (dB)."""
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


# ---- Evaluation ----------------------------------------------------------------------------------

@torch.no_grad()
def fitted(model: MWT, images, order, steps: int, workers: int):
    """Yields (row numbers, labels, values seen, tokens, error) for each tensor of row numbers in
    `order`, of `images`, a `data.Images`."""
    for rows, (pixels, labels) in zip(order, images.batches(order, model.coords.device, workers)):
        coords, values = model.look(images.signal(pixels), steps + 1)
        phi, error = model.fit_and_error(coords, values, clamp=True)
        yield rows, labels, values, model.tokens(phi), error


@torch.no_grad()
def evaluate(model: MWT, images, steps: int | None = None, workers=0, poll=lambda: None) -> dict:
    """The `score` of images, shared by all processes; poll() is called between batches."""
    order = torch.arange(len(images))[RANK::WORLD].split(model.block_size)
    steps = steps or model.inner_loop.steps
    right, decibels = sums = torch.zeros(2, len(images), device=model.coords.device)
    for rows, labels, values, tokens, error in fitted(model, images, order, steps, workers):
        poll()
        right[rows] = (model.logits(tokens, values).argmax(-1) == labels).to(right.dtype)
        decibels[rows] = psnr(error).to(right.dtype)
    if WORLD > 1:
        dist.all_reduce(sums)
    return score(right, decibels)


def score(right: Tensor, decibels: Tensor) -> dict:
    """Accuracy with its interval, and mean PSNR: of n images, which are read right, and PSNRs."""
    correct, n = int(right.sum()), len(right)
    return {"test_accuracy": correct / n, "test_interval": list(wilson(correct, n)),
            "test_psnr": float(decibels.mean()), "test_images": n}


# ---- The outer loop ------------------------------------------------------------------------------

def make_optimizer(model: nn.Module, args) -> torch.optim.Optimizer:
    """Each part of the model is a group; what is frozen is in none."""
    groups = [{"params": [p for p in part.parameters() if p.requires_grad],
               "lr": args.lr_alpha if name == "inner_loop" else args.lr}
              for name, part in model.named_children()]
    return torch.optim.AdamW([group for group in groups if group["params"]], fused=True,
                             weight_decay=args.weight_decay)


def backward(forward, optimizer, *batch) -> Tensor:
    """Gradients, averaged over processes by one all-reduce; returns the batch's statistics."""
    stats = forward(*batch)
    stats[:3].sum().backward()
    stats = stats.detach()
    if WORLD > 1:
        tensors = [p.grad for group in optimizer.param_groups for p in group["params"]] + [stats]
        flat = nn.utils.parameters_to_vector(tensors)
        dist.all_reduce(flat)
        nn.utils.vector_to_parameters(flat / WORLD, tensors)
    return stats


def update(optimizer):
    """A step, each group's gradient clipped to norm 1."""
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def compiled(forward, *batch):
    """torch.compile of the step, tried on one batch; where that does not work, a line says so."""
    fast = torch.compile(forward)
    try:
        fast(*batch)[:3].sum().backward()
        return fast
    except Exception as error:     # a missing compiler, driver or package: each has its own type
        print("torch.compile does not work here, so the step runs without it: "
              f"{' '.join(str(error).split())[:160]}", file=sys.stderr, flush=True)
        return forward


@contextlib.contextmanager
def signals(caught: list):
    """Ctrl-C and SIGTERM are noted, to be acted on between two steps."""
    before = {n: signal.signal(n, lambda n, _: caught.append(n))
              for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


class Run:
    """A training run between two steps: what a checkpoint holds, and when to write one."""

    def __init__(self, args, model: nn.Module, examples: int, facts: tuple, content: dict | None):
        self.args, self.model, self.facts, self.caught = args, model, facts, []
        self.batch = args.batch_size * WORLD
        self.steps = examples // self.batch    # an epoch; the incomplete last batch is dropped
        total = self.total = round(args.epochs * self.steps)   # a last part of an epoch counts
        self.optimizer = make_optimizer(model, args)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, [group["lr"] for group in self.optimizer.param_groups], total,
            pct_start=0.05 if total != 20 else 0.051)  # a warm-up of one step: division by zero
        self.epoch = self.step = 0
        self.sums = next(model.parameters()).new_zeros(5)      # of this epoch's statistics
        self.metrics = {"epochs": [], "seconds": 0.0}
        self.saved_at = self.began = time.monotonic()
        if content is not None:
            self.optimizer.load_state_dict(content["optimizer"])
            self.scheduler.load_state_dict(content["scheduler"])
            progress, self.metrics = content["progress"], content["metrics"]
            self.epoch, self.step = progress["epoch"], progress["step"]
            self.sums += progress["sums"].to(self.sums.device)
            self.began -= progress["seconds"]

    @property
    def done(self) -> int:
        """Steps taken."""
        return self.epoch * self.steps + self.step

    @property
    def length(self) -> int:
        """Steps of this epoch; 0 when training is over."""
        return max(0, min(self.steps, self.total - self.epoch * self.steps))

    def save(self):
        """The first process alone writes: at any of its steps it holds the state of all."""
        so_far = (*self.sums.tolist(), self.metrics.get("test_psnr", 0.0))     # nan and inf stay
        if not (all(map(math.isfinite, so_far))
                and all(bool(p.isfinite().all()) for p in self.model.parameters())):
            raise Stop(1, f"the loss or a weight is not finite after {self.done} steps; the last "
                          "checkpoint is kept")
        content = {"method": self.model.method, "args": vars(self.args), "data": self.facts,
                   "metrics": self.metrics, "model": self.model.state_dict()}
        if self.length:
            content |= {"optimizer": self.optimizer.state_dict(),
                        "scheduler": self.scheduler.state_dict(), "progress": {
                            "epoch": self.epoch, "step": self.step, "sums": self.sums.cpu(),
                            "seconds": time.monotonic() - self.began, "global_batch": self.batch}}
        if RANK == 0 and self.args.out:
            save_checkpoint(self.args.out, content)
        self.saved_at = time.monotonic()

    def pause(self):
        """Between steps: saves when it is time, and ends when asked to."""
        if self.caught and RANK == 0:
            self.save()
            again = "the same command" if self.model.method != "mwt" else (
                f"{LAUNCH} train.py --resume --out {shlex.quote(str(self.args.out))}")
            raise Stop(128 + self.caught[0], f"stopped and saved; go on by: {again}"
                       if self.args.out else "stopped")
        if time.monotonic() - self.saved_at >= 60 * self.args.save_minutes:
            self.save()

    def end_epoch(self, result: dict):
        """Takes in the evaluation, saves, and says how the epoch went."""
        names = ("loss", "reconstruction", "weighted_cluster_loss", "train_accuracy", "train_psnr")
        now = time.monotonic()
        row = {"epoch": self.epoch + 1, **dict(zip(names, (self.sums / self.step).tolist())),
               **{key: result[key] for key in ("test_accuracy", "test_psnr") if key in result},
               "seconds": now - self.began}
        self.metrics |= result
        self.metrics["epochs"].append(row)
        self.metrics["seconds"] += row["seconds"]
        self.epoch, self.step, self.began = self.epoch + 1, 0, now
        self.save()
        if RANK == 0 and self.args.out:
            print("epoch {epoch:3d}/{of}  loss {loss:.4f}  reconstruction {reconstruction:.5f}  "
                  "{held} accuracy {test_accuracy:.2%}  {held} PSNR {test_psnr:.2f} dB  "
                  "{seconds:.1f} s".format(**row, of=self.args.epochs,
                                           held="val" if self.args.val else "test"), flush=True)


def train(args, model: nn.Module, source, prepare, forward, test, facts=(), content=None) -> dict:
    """Trains to the last epoch, writing args.out as it goes (None: nothing); returns the metrics.

    source: what is trained on, a `data.Images` or `Fits`. prepare(number of the step, rows, batch
    of the source): what `forward` takes. forward: `statistics` of it. test(poll): metrics. content:
    a checkpoint to go on from. Stop: interrupted (after saving), or not finite (without)."""
    run, device = Run(args, model, len(source), facts, content), next(model.parameters()).device
    compiles = args.compile or args.compile is None and device.type == "cuda"
    with signals(run.caught):
        while run.length:
            g = generator("order", args.seed, run.epoch)
            order = torch.randperm(len(source), generator=g)[:run.length * run.batch]
            order = order.view(run.length, WORLD, -1)[run.step:, RANK]         # (steps, batch)
            if run.step == 0:
                run.sums.zero_()
            bar = tqdm(order, f"epoch {run.epoch + 1}/{args.epochs}", leave=False,
                       disable=True if RANK else None)
            for rows, batch in zip(bar, source.batches(order, device, args.workers)):
                run.pause()
                batch = prepare(run.done, rows, *batch)
                if compiles:
                    forward, compiles = compiled(forward, *batch), False
                    model.zero_grad()          # of the trial
                run.sums += backward(forward, run.optimizer, *batch)
                update(run.optimizer)
                run.scheduler.step()
                run.step += 1
            run.end_epoch(test(run.pause))
    return run.metrics


def preparation(args, model: MWT, images):
    """The function (number of the step, rows, pixels, labels) -> what `MWT.forward` takes."""
    device, groups = model.coords.device, None
    flip = args.dataset not in ("digits", "mnist")             # digits have no mirror image
    if args.cluster_random:                                    # an image keeps the label it draws
        g, labels = generator("random labels", args.seed), images.labels
        groups = labels[torch.randperm(len(labels), generator=g).to(labels.device)]

    def prepare(number, rows, pixels, labels):
        if args.augment:
            g = generator("augmentation", args.seed, number, RANK)
            pixels = data.augment(pixels, torch.rand(len(pixels), 6, generator=g).to(device), flip)
        g = generator("pixels", args.seed, number, RANK, device=device)
        batch = *model.look(images.signal(pixels), args.steps + 1, g), labels
        return batch if groups is None else (*batch, groups[rows.to(groups.device)].to(device))
    return prepare


# ---- A reader on fixed weights -------------------------------------------------------------------

@dataclass
class Fits:
    """A data set as weights, to be trained on as a `data.Images` is."""
    tokens: Tensor         # (n, T, D)
    labels: Tensor         # (n,)
    error: Tensor          # (n,) mean squared error of the reconstruction

    def __len__(self):
        return len(self.labels)

    def batches(self, order, *_):
        for rows in order.to(self.labels.device):
            yield self.tokens[rows], self.labels[rows], self.error[rows]


def fit_once(model: MWT, images, steps: int, workers: int) -> Fits:
    """All of a `data.Images`, fitted by so many inner steps."""
    order = torch.arange(len(images)).split(model.block_size)
    blocks = tqdm(fitted(model, images, order, steps, workers), "fitting", len(order), leave=False,
                  disable=None)
    fits = [(tokens, labels, error) for _, labels, _, tokens, error in blocks]
    return Fits(*map(torch.cat, zip(*fits)))


def train_on_fits(args, model, read, fits: Fits, test: Fits | None, facts, content=None) -> dict:
    """`train`, of a model's reader alone: read(tokens) -> logits."""
    def forward(tokens, labels, error):
        logits = read(tokens).to(tokens.dtype)
        return statistics(logits, labels, error, error.new_zeros(()))

    @torch.no_grad()
    def evaluate_fits(poll):
        if test is None:
            return {}
        guess = torch.cat([read(tokens).argmax(-1) for tokens in test.tokens.split(256)])
        return score((guess == test.labels).float(), psnr(test.error))

    return train(args, model, fits, lambda number, rows, *batch: batch, forward, evaluate_fits,
                 facts, content)


def train_reader(tokens: Tensor, labels: Tensor, args, spread=0.0, method=None, facts=(),
                 test: Fits | None = None) -> Reader:
    """A new reader trained on fixed tokens (n, T, D) and labels (n,), its size and recipe as args
    say, its token scale such that these tokens' root mean square is 1, its offsets beta drawn with
    `spread` times that. Writes nothing, unless a method is named: then its checkpoint args.out,
    evaluated on `test`; a run that is there is gone on with."""
    scale = 1 / float(tokens.square().mean().sqrt())
    with seeded("reader", args.seed):
        reader = Reader(tokens.shape[1], args.width, int(labels.max()) + 1, tokens.shape[2],
                        args.reader_depth, args.head_dim, args.mlp_ratio, scale)
    if spread:
        nn.init.normal_(reader.beta, std=spread / scale, generator=generator("beta", args.seed))
    model, content = nn.ModuleDict({"reader": reader.to(tokens.device)}), None
    model.method = method
    args = argparse.Namespace(**vars(args) | {
        "out": args.out if method else None, "compile": False, "token_scale": scale,
        "batch_size": min(args.batch_size, len(labels))})
    if method and os.path.exists(args.out):
        content = read_checkpoint(args.out)
        model.load_state_dict(content["model"])
    if content is None or "progress" in content:
        fits = Fits(tokens, labels, torch.zeros(len(labels), device=tokens.device))
        train_on_fits(args, model, reader, fits, test, facts, content)
    return reader.eval()


# ---- The program ---------------------------------------------------------------------------------

def facts(images) -> tuple[int, list[str], int]:
    """What a checkpoint must know of its training data: channels, classes, number of images."""
    return images.channels, list(images.classes), len(images)


def open_data(args, device):
    """(training images, test images); of several processes the first downloads."""
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if RANK:
            dist.barrier()
    images, test = data.load_dataset(args, device, train=not args.eval_only)
    if WORLD > 1 and RANK == 0:
        dist.barrier()
    if not args.eval_only and args.batch_size * WORLD > len(images):
        raise InputError(f"--batch-size {args.batch_size}, {WORLD} process(es): there are only "
                         f"{len(images)} training images")
    return images, test


def make_model(args, content: dict | None, images, test, device) -> MWT:
    """The checkpoint's model, or a new one, with the INR of --init-from."""
    if content is not None:
        path, known = args.ckpt or args.out, tuple(content["data"])
        if facts(test)[:2] != known[:2] or not args.eval_only and facts(images) != known:
            raise InputError(f"--dataset {args.dataset}: not the data of {path}, or changed since: "
                             "other channels, classes or number of images")
        model = model_from(content, path, device)
        model.fraction, model.bf16 = args.fraction, args.precision == "bf16"
    else:
        model = MWT(args, images.channels, len(images.classes)).to(device)
        if args.init_from:
            start, _ = load_checkpoint(args.init_from, device)
            if start.siren.head.out_features != images.channels:
                raise InputError(f"--init-from {args.init_from}: made for other channels")
            model.siren.load_state_dict(start.siren.state_dict())
            model.inner_loop.load_state_dict(start.inner_loop.state_dict())
    for part in (model.siren, model.inner_loop):
        part.requires_grad_(not args.freeze_siren)
    model.inner_loop.recompute = args.recompute
    return model


def train_model(args, model: MWT, images, test, content) -> dict:
    """On images; but where no image's fit ever changes, and memory allows, on fits made once."""
    inr, reader = (sum(p.numel() for part in parts for p in part.parameters())
                   for parts in ([model.siren, model.inner_loop], [model.reader]))
    if RANK == 0:
        print(f"{args.dataset}: {len(images):,} images to train on, {len(test):,} to evaluate on, "
              f"{images.channels}x{args.size}x{args.size}; {model.coords.device}, {WORLD} "
              f"process(es)\nparameters: SIREN with alpha {inr:,}, reader {reader:,}")
    changes = args.fraction < 1 or args.augment or args.w_cluster or args.branch == "colour"
    size = 4 * model.reader.beta.numel() * (len(images) + len(test)) / 2 ** 30
    steps, about = args.steps_test or args.steps, facts(images)
    if args.freeze_siren and not changes and size <= (4 if model.on_cpu else 16):      # GiB
        fits = fit_once(model, images, args.steps, args.workers)
        test = fit_once(model, test, steps, args.workers)
        return train_on_fits(args, model, model.read, fits, test, about, content)
    return train(args, model, images, preparation(args, model, images), model,
                 lambda poll: evaluate(model, test, steps, args.workers, poll), about, content)


@torch.no_grad()
def pictures(model: MWT, test, steps: int) -> dict:
    """A few test images, and what the weights show of them after each inner step."""
    rows = torch.linspace(0, len(test) - 1, min(4, len(test))).long()
    images = test.signal(next(test.batches([rows], model.coords.device))[0])   # (n, C, h, w)
    stages = torch.linspace(0, steps, min(steps, 7) + 1).round().int().tolist()
    shown = torch.stack([model.reconstruct(images, j) for j in stages])        # (stages, n, ...)
    _, labels, values, tokens, _ = next(fitted(model, test, [rows], steps, 0))
    guesses = model.logits(tokens, values).argmax(-1)
    return {"stages": stages, "images": images.cpu().numpy(), "shown": shown.cpu().numpy(),
            "psnr": psnr((shown - images).square().mean((2, 3, 4))).tolist(),  # (stages, n)
            "classes": [test.classes[c] for c in labels],
            "guesses": [test.classes[c] for c in guesses]}


def report(args, model: MWT, test, metrics: dict, command: str):
    """Prints the result; writes it to args.out with .json and .png in place of .pt."""
    low, high = metrics["test_interval"]
    estimate = f" (an estimate: {args.fraction:g} of the pixels)" if args.fraction < 1 else ""
    held_out = "validation share of the training set" if args.val else "test set"
    print(f"accuracy {metrics['test_accuracy']:.2%} (95% interval {low:.2%} to {high:.2%}, "
          f"{metrics['test_images']} images of the {held_out}), PSNR {metrics['test_psnr']:.2f} dB"
          f"{estimate}; trained for {metrics['seconds']:.0f} s")
    if args.out is not None:
        content = {"command": command, "flags": vars(args), **environment(model.coords.device),
                   "processes": WORLD, "evaluated_on": held_out, **metrics}
        path = Path(args.out).with_suffix(".json")
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        shown = pictures(model, test, args.steps_test or args.steps)
        figures.training_figure(path.with_suffix(".png"), content, shown)


def run(given: dict):
    args, content = open_run(given)
    device = find_device(args.device)
    torch.set_float32_matmul_precision("highest" if args.precision == "float32" else "high")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    images, test = open_data(args, device)
    model = make_model(args, content, images, test, device)
    if args.eval_only:
        metrics = content["metrics"] | evaluate(model, test, args.steps_test, args.workers)
    elif content is None or "progress" in content:
        metrics = train_model(args, model, images, test, content)
    else:
        metrics = content["metrics"]
        print(f"the run in {args.out} is finished: nothing to train")
    if RANK == 0:
        report(args, model, test, metrics, command_line(args))


def main(argv: list[str] | None = None):
    try:
        with exits("train.py"):
            run(vars(parser(__doc__.split("\n\n")[0]).parse_args(argv)))
    finally:
        if WORLD > 1 and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.modules["train"] = sys.modules["__main__"]     # a checkpoint that is loaded finds this one
    main()
