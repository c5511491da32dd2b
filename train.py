"""Trains a SIREN initialisation, its inner-loop step sizes and a Transformer reader end to end, to
classify images from the weights of their INRs (Gielisse & van Gemert, "End-to-End Implicit Neural
Representations for Classification", CVPR 2025).

    python train.py                                      # 8x8 digits, embedded: under two minutes
    python train.py --dataset cifar10                    # the paper's MWT; downloads the data
    python train.py --dataset cifar10 --w-task 0         # WT: no class loss for the INR
    torchrun --nproc_per_node=4 train.py --dataset path/to/imagenette --width 256
    python train.py --resume --out out.pt                # go on after a crash, a kill or Ctrl-C
    python train.py --eval-only --ckpt out.pt

Top to bottom: the model, evaluation, the outer loop, a reader on fixed weights, reports, the
program.
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
from pathlib import Path
from typing import Callable, NamedTuple

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
from settings import (LAUNCH, RANK, RECIPE, WORLD, as_flags, command_line, environment, find_device,
                      free_memory, open_run, parser, peak_memory)
from siren import Siren, Weights, coordinate_grid

BLOCK_POINTS = 1 << 17         # image points that are evaluated at once ...
BLOCK_POINTS_CPU = 1 << 12     # ... and fitted at once on a CPU: what its caches hold


# ---- The model -----------------------------------------------------------------------------------

class MWT(nn.Module):
    """Anchor, inner loop and reader for images (N, channels, size, size) in [-1, 1].

    args: the flags of this program. `fit`, `read`, `trace`, `parts`, `coordinates`, `reconstruct`
    and the attribute `reader` are what diagnostics.py asks of any method.
    """

    def __init__(self, args, channels: int, classes: int):
        super().__init__()
        self.fraction, self.centre_colour = args.fraction, args.centre_colour
        self.w_task, self.w_cluster = args.w_task, args.w_cluster
        self.bf16 = args.precision == "bf16"
        with seeded("siren", args.seed):
            self.siren = Siren(2, channels, args.width, args.depth, args.omega)
        with seeded("inner loop", args.seed):
            self.inner_loop = MetaSGD(self.siren, args.steps, args.shared_lr)
        with seeded("reader", args.seed):
            self.reader = make_reader(args, channels, classes)
        grid = coordinate_grid(args.size, args.size)
        self.register_buffer("coords", grid, persistent=False)                 # (P, 2)

    @property
    def points(self) -> int:
        """Pixels of an image that one look sees."""
        return int(self.fraction * len(self.coords) + 1e-9)

    def look(self, images: Tensor, draws: int, generator_=None) -> tuple[Tensor, Tensor]:
        """What `draws` looks at images (N, C, size, size) see: coords (draws, [N,] n, 2) and values
        (draws, N, n, C). Where a fraction is drawn: for each image anew from the generator, or, in
        evaluation, without one, the same pixels for all images, always the same ones."""
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
        """phi, and each image's mean squared error (N,), of what `look` returned: all but the last
        look are for the inner steps, the last is for the error. With centre_colour phi stores the
        image less its mean colour."""
        centred, mean = values[:-1], 0.0
        if self.centre_colour:
            mean = self.colour(values)[:, None]                                # (N, 1, C)
            centred = centred - mean
        phi = self.inner_loop.descend(self.siren, coords[:-1], centred)
        prediction = self.siren(coords[-1], phi) + mean                        # (N, n, C)
        prediction = prediction.clamp(-1, 1) if clamp else prediction
        return phi, (prediction - values[-1]).square().mean((-2, -1))

    def tokens(self, phi: Weights) -> Tensor:
        """phi - theta, hidden neuron by hidden neuron: (N, depth * width, width + 1), the bias
        column last."""
        return (phi.hidden - self.siren.hidden).flatten(1, 2)

    def logits(self, tokens: Tensor, values: Tensor) -> Tensor:
        """`read`, and for a branch that takes it the mean colour of values (draws, N, n, C)."""
        if getattr(self.reader, "takes_colour", False):
            return self.read(tokens, self.colour(values))
        return self.read(tokens)

    def forward(self, coords: Tensor, values: Tensor, labels: Tensor) -> Tensor:
        """Means over a batch as `look` returned it, k + 1 looks (5,): class loss, reconstruction
        and weighted contrastive loss, the outer losses, then accuracy and PSNR (dB).

        The class loss reaches the INR with weight w_task: its gradient is scaled where tokens enter
        the reader, so that one backward pass serves all losses.
        """
        phi, error = self.fit_and_error(coords, values)
        tokens = self.tokens(phi)                                              # (N, T, width + 1)
        value = tokens.detach()
        scaled = value + self.w_task * (tokens - value) if self.w_task else value
        logits = self.logits(scaled, values).to(tokens.dtype)                  # (N, classes)
        cluster = error.new_zeros(())
        if self.w_cluster:
            moved = [(phi.first - self.siren.first).flatten(1), tokens.flatten(1)]
            cluster = self.w_cluster * supervised_contrastive(torch.cat(moved, 1), labels)
        return statistics(logits, labels, error, cluster)

    # What diagnostics.py asks of a method, all of it in evaluation: no gradients.

    def adapt(self, images: Tensor, steps: int | None = None) -> Weights:
        """phi of images (N, C, size, size) after `steps` (default k) steps."""
        coords, values = self.look(images, (self.inner_loop.steps if steps is None else steps) + 1)
        return self.fit_and_error(coords, values)[0]

    @torch.no_grad()
    def fit(self, images: Tensor) -> Tensor:
        """Images (N, C, size, size) in [-1, 1] -> tokens (N, T, width + 1)."""
        return torch.cat([self.tokens(self.adapt(part)) for part in self.blocks(images)])

    def blocks(self, images: Tensor):
        points = BLOCK_POINTS if images.is_cuda else BLOCK_POINTS_CPU
        return images.split(max(1, points // self.points))

    def read(self, tokens: Tensor, *colour) -> Tensor:
        """Tokens (N, T, width + 1) -> logits (N, classes)."""
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bf16):
            return self.reader(tokens, *colour)

    def trace(self, tokens: Tensor):
        """logits (N, classes), [(stage, state (N, T, width)), ...] of the reader."""
        return self.reader.trace(tokens)

    def parts(self) -> dict[str, Tensor]:
        """Bases (width + 1, m) of parts of a token: the bias column, and the column of weights
        whose incoming activation is the most constant over pixels at theta, as a bias's is."""
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
        first = torch.cat([self.adapt(part).first for part in self.blocks(images)])
        first = (first - self.siren.first).flatten(1)
        layers = tokens.chunk(len(self.siren.hidden), dim=1)
        named = {"phi - theta": torch.cat([first, tokens.flatten(1)], 1), "first layer": first}
        named |= {f"hidden layer {i + 1}": layer.flatten(1) for i, layer in enumerate(layers)}
        return named | {"phi": (tokens + self.siren.hidden.flatten(0, 1)).flatten(1)}

    @torch.no_grad()
    def reconstruct(self, images: Tensor, steps: int | None = None) -> Tensor:
        """What the weights show of images (N, C, size, size), after so many inner steps."""
        shown = []
        for part in self.blocks(images):
            phi = self.adapt(part, steps)
            shown.append(self.siren(self.coords, phi).mT.expand_as(part.flatten(2)))   # (N, C, P)
        shown = torch.cat(shown).view_as(images)
        if self.centre_colour:
            shown = shown + images.mean((2, 3), keepdim=True)
        return shown.clamp(-1, 1)


def make_reader(args, channels: int, classes: int) -> Reader:
    shape = (args.depth * args.width, args.width, classes, args.width + 1, args.reader_depth,
             args.head_dim, args.mlp_ratio, args.token_scale)
    if args.readout or args.branch:
        return RoutedReader(*shape, args.readout, args.branch, channels)
    return Reader(*shape)


def statistics(logits, labels, error, cluster) -> Tensor:
    """Of a batch (5,): class, reconstruction and contrastive loss, accuracy, PSNR."""
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
def evaluate(model: MWT, images, steps: int | None = None, workers=0, poll=lambda: None) -> dict:
    """Accuracy with its interval and mean PSNR (dB) over `images`, a `data.Images`, shared by all
    processes; poll() is called between batches."""
    device, k = model.coords.device, model.inner_loop.steps if steps is None else steps
    block = max(1, min(512, BLOCK_POINTS // model.points))
    order = torch.arange(len(images))[RANK::WORLD].split(block)
    right, decibels = torch.zeros(2, len(images), device=device)
    for rows, (pixels, labels) in zip(order, images.batches(order, device, workers)):
        poll()
        coords, values = model.look(images.signal(pixels), k + 1)
        phi, error = model.fit_and_error(coords, values, clamp=True)
        guess = model.logits(model.tokens(phi), values).argmax(-1)
        right[rows] = (guess == labels).to(right.dtype)
        decibels[rows] = psnr(error).to(right.dtype)
    if WORLD > 1:
        dist.all_reduce(right)
        dist.all_reduce(decibels)
    return score(right, decibels)


def score(right: Tensor, decibels: Tensor) -> dict:
    """Of test images: which are read right (n,), and their PSNR (n,)."""
    correct, n = int(right.sum()), len(right)
    return {"test_accuracy": correct / n, "test_interval": list(wilson(correct, n)),
            "test_psnr": float(decibels.mean()), "test_images": n}


def in_words(result: dict, args) -> str:
    low, high = result["test_interval"]
    of = "held-out training images" if args.val else "test images"
    estimate = f" (an estimate: {args.fraction:g} of the pixels)" if args.fraction < 1 else ""
    return (f"accuracy {100 * result['test_accuracy']:.2f}% (95% interval {100 * low:.2f} to "
            f"{100 * high:.2f}, n = {result['test_images']} {of}), "
            f"PSNR {result['test_psnr']:.2f} dB{estimate}")


# ---- The outer loop ------------------------------------------------------------------------------

def parameter_groups(model: nn.Module, args) -> list[dict]:
    """Each with its learning rate and clipped by itself; frozen parameters are in none."""
    rates = {"siren": args.lr, "inner_loop": args.lr_alpha, "reader": args.lr}
    groups = [{"params": [p for p in part.parameters() if p.requires_grad], "lr": rates[name]}
              for name, part in model.named_children()]
    return [group for group in groups if group["params"]]


def make_optimizer(groups: list[dict], args) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, weight_decay=args.weight_decay,
                             fused=groups[0]["params"][0].device.type in ("cpu", "cuda"))


def backward(forward, groups: list[dict], *batch) -> Tensor:
    """Gradients, averaged over processes by one all-reduce; returns the batch's statistics."""
    stats = forward(*batch)
    stats[:3].sum().backward()
    stats = stats.detach()
    if WORLD > 1:
        tensors = [p.grad for group in groups for p in group["params"]] + [stats]
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, mean in zip(tensors, (flat / WORLD).split([t.numel() for t in tensors])):
            t.copy_(mean.view_as(t))
    return stats


def update(groups: list[dict], optimizer) -> Tensor:
    """Clips each group's gradient to norm 1 and steps; returns the sum of the norms."""
    norms = [nn.utils.clip_grad_norm_(group["params"], 1.0) for group in groups]
    optimizer.step()
    optimizer.zero_grad()
    return sum(norms)


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


class Run:
    """A training run between two steps: what a checkpoint holds, and when to write one."""

    def __init__(self, args, model: nn.Module, examples: int, facts: tuple, content: dict | None):
        self.args, self.model, self.facts, self.caught = args, model, facts, []
        self.device = next(model.parameters()).device
        self.batch = args.batch_size * WORLD
        self.steps = examples // self.batch    # an epoch; the incomplete last batch is dropped
        self.groups = parameter_groups(model, args)
        self.optimizer = make_optimizer(self.groups, args)
        total = args.epochs * self.steps
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, [group["lr"] for group in self.groups], total_steps=total,
            pct_start=0.05 if total != 20 else 0.051)  # a warm-up of one step: division by zero
        self.metrics, self.epoch, self.step = {"epochs": [], "seconds": 0.0}, 0, 0
        self.sums = torch.zeros(5, device=self.device, dtype=torch.get_default_dtype())
        self.bad = torch.full((), -1, device=self.device)      # the first step that was not finite
        self.saved_at = self.began = time.monotonic()
        self.waited = 0.0                                      # for data, in seconds, this epoch
        if content is not None:
            self.optimizer.load_state_dict(content["optimizer"])
            self.scheduler.load_state_dict(content["scheduler"])
            progress, self.metrics = content["progress"], content["metrics"]
            self.epoch, self.step = progress["epoch"], progress["step"]
            self.sums += progress["sums"].to(self.device)
            self.began, self.waited = self.began - progress["seconds"], progress["waited"]

    def save(self, finished: bool = False):
        """Writes a checkpoint, unless the weights are spoilt. The first process does it alone: at
        any of its steps it holds the state of all."""
        bad, parameters = int(self.bad), self.model.parameters()
        if bad >= 0 or not all(bool(torch.isfinite(p).all()) for p in parameters):
            bad = bad if bad >= 0 else self.epoch * self.steps + self.step - 1
            kept = self.args.out and os.path.exists(self.args.out)
            raise Stop(1, f"the loss or its gradient is not finite at epoch {bad // self.steps + 1}"
                          f", step {bad % self.steps + 1}; " + (
                              f"{self.args.out} is the last good checkpoint" if kept
                              else "no checkpoint had been written"))
        progress = {"epoch": self.epoch, "step": self.step, "sums": self.sums.cpu(),
                    "global_batch": self.batch, "seconds": time.monotonic() - self.began,
                    "waited": self.waited}
        unfinished = {"optimizer": self.optimizer.state_dict(), "progress": progress,
                      "scheduler": self.scheduler.state_dict()}
        if RANK == 0 and self.args.out:
            save_checkpoint(self.args.out, {
                "method": "mwt", "args": vars(self.args), "data": self.facts, "metrics":
                self.metrics, "model": self.model.state_dict(), **({} if finished else unfinished)})
        self.saved_at = time.monotonic()

    def pause(self):
        """Between steps: saves when it is time, and ends when asked to."""
        if self.caught and not self.args.out:
            raise Stop(128 + self.caught[0], "stopped")
        if self.caught and RANK == 0:
            self.save()
            raise Stop(128 + self.caught[0], f"stopped and saved at epoch {self.epoch + 1}, step "
                       f"{self.step}; go on with: {LAUNCH} train.py --resume "
                       f"--out {shlex.quote(str(self.args.out))}")
        if time.monotonic() - self.saved_at >= 60 * self.args.save_minutes:
            self.save()

    def take_step(self, forward, batch):
        stats = backward(forward, self.groups, *batch)
        norms = update(self.groups, self.optimizer)
        self.scheduler.step()
        finite = torch.isfinite(stats[:3].sum() + norms)       # stays on the device
        now = self.epoch * self.steps + self.step
        self.bad = torch.where((self.bad < 0) & ~finite, now, self.bad)
        self.sums += stats
        self.step += 1

    def end_epoch(self, result: dict):
        """Takes in the evaluation, saves, and says how the epoch went."""
        if not math.isfinite(result.get("test_psnr", 0.0)):    # the last step spoilt the weights
            self.bad.clamp_(min=(self.epoch + 1) * self.steps - 1)
        names = ("loss", "reconstruction", "weighted_cluster_loss", "train_accuracy", "train_psnr")
        seconds, memory = time.monotonic() - self.began, peak_memory(self.device)
        epoch = {"epoch": self.epoch + 1, **dict(zip(names, (self.sums / self.steps).tolist())),
                 **{key: result[key] for key in ("test_accuracy", "test_psnr") if key in result},
                 "seconds": seconds, "waiting_for_data": self.waited, "peak_memory_bytes": memory}
        self.metrics.update(result)
        self.metrics["epochs"].append(epoch)
        self.metrics["seconds"] += seconds
        self.epoch, self.step, self.waited = self.epoch + 1, 0, 0.0
        self.began = time.monotonic()
        self.sums.zero_()
        self.save(finished=self.epoch == self.args.epochs)
        if RANK == 0 and self.args.out:
            name = "val" if self.args.val else "test"
            print(f"epoch {self.epoch:3d}/{self.args.epochs}  loss {epoch['loss']:.4f}  "
                  f"reconstruction {epoch['reconstruction']:.5f}  "
                  f"{name} accuracy {100 * epoch['test_accuracy']:.2f}%  "
                  f"{name} PSNR {epoch['test_psnr']:.2f} dB  {seconds:.1f} s, "
                  f"{100 * epoch['waiting_for_data'] / seconds:.0f}% of it waiting for data  "
                  f"peak {(memory or math.nan) / 2 ** 30:.2f} GiB", flush=True)


class Task(NamedTuple):
    """What `train` trains on: images, or weights that were fitted once."""
    examples: int
    batches: Callable      # row numbers (steps, batch) -> yields what is read of each row
    prepare: Callable      # that, and the number of the step -> what `forward` takes
    forward: Callable      # -> statistics of the batch (5,)
    test: Callable         # a function to call now and then -> metrics


def image_task(args, model: MWT, images, test) -> Task:
    device, flip = model.coords.device, args.dataset not in ("digits", "mnist")

    def prepare(batch, step):
        pixels, labels = batch
        if args.augment:
            g = generator("augmentation", args.seed, step, RANK)
            pixels = data.augment(pixels, torch.rand(len(pixels), 6, generator=g).to(device), flip)
        g = generator("pixels", args.seed, step, RANK, device=device)
        return *model.look(images.signal(pixels), args.steps + 1, g), labels

    return Task(len(images), lambda order: images.batches(order, device, args.workers), prepare,
                model, lambda poll: evaluate(model, test, args.steps_test, args.workers, poll))


def train(args, model: nn.Module, task: Task, facts: tuple = (), content=None) -> dict:
    """Trains to the last epoch, writing args.out as it goes (None: nothing); returns the metrics.

    content: a checkpoint to go on from. Stop: interrupted (after saving), or a loss that is not
    finite (without). InputError: an image that cannot be decoded (after saving).
    """
    run, forward = Run(args, model, task.examples, facts, content), None
    compiles = args.compile or args.compile is None and run.device.type == "cuda"
    with signals(run.caught):
        try:
            while run.epoch < args.epochs:
                g = generator("order", args.seed, run.epoch)
                order = torch.randperm(task.examples, generator=g)[:run.steps * run.batch]
                order = order.view(run.steps, WORLD, -1)[run.step:, RANK]      # (steps, batch)
                batches = task.batches(order)
                for _ in tqdm(range(len(order)), f"epoch {run.epoch + 1}/{args.epochs}",
                              leave=False, disable=True if RANK else None):
                    asked = time.monotonic()
                    batch = next(batches)
                    run.waited += time.monotonic() - asked
                    run.pause()
                    batch = task.prepare(batch, run.epoch * run.steps + run.step)
                    if forward is None:
                        forward = compiled(task.forward, *batch) if compiles else task.forward
                        model.zero_grad()
                    run.take_step(forward, batch)
                run.end_epoch(task.test(run.pause))
        except InputError:
            run.save()
            raise
        except RuntimeError:
            if RANK and run.caught:            # the first process has saved and left
                raise Stop(128 + run.caught[0], "stopped") from None
            raise
    return run.metrics


@contextlib.contextmanager
def signals(caught: list):
    """Ctrl-C and SIGTERM are noted, to be acted on between two steps."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(n, lambda n, _: caught.append(n)) for n in numbers]
    try:
        yield
    finally:
        for n, handler in zip(numbers, before):
            signal.signal(n, handler)


# ---- A reader on fixed weights -------------------------------------------------------------------

class Fits(NamedTuple):
    """A data set as fitted weights."""
    tokens: Tensor         # (n, T, D)
    labels: Tensor         # (n,)
    error: Tensor          # (n,) mean squared error of the reconstruction


@torch.no_grad()
def fit_once(model: MWT, images, steps: int, workers: int = 0) -> Fits:
    """All of a `data.Images`, fitted by so many inner steps."""
    device, parts = model.coords.device, []
    order = torch.arange(len(images)).split(max(1, BLOCK_POINTS_CPU // len(model.coords)))
    bar = tqdm(order, "fitting", leave=False, disable=None)
    for rows, (pixels, labels) in zip(bar, images.batches(order, device, workers)):
        coords, values = model.look(images.signal(pixels), steps + 1)
        phi, error = model.fit_and_error(coords, values, clamp=True)
        parts.append((model.tokens(phi), labels, error))
    return Fits(*map(torch.cat, zip(*parts)))


def reader_task(read, fits: Fits, test: Fits | None = None) -> Task:
    """To train `read`, tokens -> logits, on fits."""
    def batches(order):
        for rows in order:
            rows = rows.to(fits.labels.device)
            yield fits.tokens[rows], fits.labels[rows], fits.error[rows]

    def forward(tokens, labels, error):
        logits = read(tokens).to(tokens.dtype)
        return statistics(logits, labels, error, error.new_zeros(()))

    @torch.no_grad()
    def evaluate_fits(poll):
        poll()
        if test is None:
            return {}
        guess = torch.cat([read(tokens).argmax(-1) for tokens in test.tokens.split(256)])
        return score((guess == test.labels).float(), psnr(test.error))

    return Task(len(fits.labels), batches, lambda batch, step: batch, forward, evaluate_fits)


def train_reader(tokens: Tensor, labels: Tensor, args) -> Reader:
    """A new reader trained on fixed tokens (n, T, D) and labels (n,), with args' reader (width,
    reader_depth, head_dim, mlp_ratio) and recipe (epochs, batch_size, lr, weight_decay, seed). Its
    token scale makes the training tokens' root mean square 1. Writes nothing."""
    scale = 1 / float(tokens.square().mean().sqrt())
    with seeded("reader", args.seed):
        reader = Reader(tokens.shape[1], args.width, int(labels.max()) + 1, tokens.shape[2],
                        args.reader_depth, args.head_dim, args.mlp_ratio, scale).to(tokens.device)
    fits = Fits(tokens, labels, torch.zeros(len(labels), device=tokens.device))
    in_memory = argparse.Namespace(**vars(args) | {
        "out": None, "compile": False, "batch_size": min(args.batch_size, len(labels))})
    train(in_memory, nn.ModuleDict({"reader": reader}), reader_task(reader, fits))
    return reader.eval()


# ---- Reports -------------------------------------------------------------------------------------

@torch.no_grad()
def pictures(model: MWT, test, steps: int) -> dict:
    """A few test images, and what the weights show of them after each inner step."""
    rows = torch.linspace(0, len(test) - 1, min(4, len(test))).long()
    images, labels = next(test.batches([rows], model.coords.device))
    images = test.signal(images)
    stages = torch.linspace(0, steps, min(steps, 7) + 1).round().int().tolist()
    shown = torch.stack([model.reconstruct(images, j) for j in stages])        # (stages, n, ...)
    decibels = psnr((shown - images).square().mean((2, 3, 4)))                 # (stages, n)
    coords, values = model.look(images, steps + 1)
    guess = model.logits(model.tokens(model.fit_and_error(coords, values)[0]), values).argmax(-1)
    return {"stages": stages, "images": images.cpu().numpy(), "shown": shown.cpu().numpy(),
            "psnr": decibels.tolist(), "classes": [test.classes[c] for c in labels.tolist()],
            "guesses": [test.classes[c] for c in guess.tolist()]}


def write_reports(args, model: MWT, test, metrics: dict, command: str):
    """args.out with .json and .png in place of .pt."""
    if RANK:
        return
    report = {"command": command, "flags": vars(args), **environment(model.coords.device),
              "processes": WORLD, "evaluated_on": "validation share of the training set"
              if args.val else "test set", **metrics}
    path = Path(args.out).with_suffix(".json")
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    shown = pictures(model, test, args.steps_test or args.steps)
    figures.training_figure(path.with_suffix(".png"), report, shown)


# ---- The program ---------------------------------------------------------------------------------

def facts(images) -> tuple[int, list[str], int]:
    """What a checkpoint must know of its training data: channels, classes, number of images."""
    return images.channels, list(images.classes), len(images)


def open_data(args, device, only_test: bool):
    """(training images, test images); of several processes the first downloads."""
    torch.set_float32_matmul_precision("highest" if args.precision == "float32" else "high")
    if WORLD > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if RANK:
            dist.barrier()
    images, test = data.load_dataset(args, device, train=not only_test)
    if WORLD > 1 and RANK == 0:
        dist.barrier()
    if not only_test and args.batch_size * WORLD > len(images):
        raise InputError(f"--batch-size {args.batch_size}, {WORLD} process(es): there are only "
                         f"{len(images)} training images")
    return images, test


def new_model(args, images, device) -> MWT:
    try:
        model = MWT(args, images.channels, len(images.classes)).to(device)
    except (RuntimeError, OverflowError, TypeError) as error:
        raise InputError(f"--width {args.width} --depth {args.depth}: a model of that size cannot "
                         "be made here") from error
    if args.init_from:
        start, _ = load_checkpoint(args.init_from, device)
        if start.siren.head.out_features != images.channels:
            raise InputError(f"--init-from {args.init_from}: not for {images.channels} channels")
        model.siren.load_state_dict(start.siren.state_dict())
        model.inner_loop.load_state_dict(start.inner_loop.state_dict())
    return model


def introduce(args, model: MWT, images, test):
    count = {name: sum(p.numel() for p in part.parameters())
             for name, part in model.named_children()}
    held_out = "held-out" if args.val else "test"
    print(f"{args.dataset}: {len(images):,} training and {len(test):,} {held_out} images, "
          f"{images.channels}x{args.size}x{args.size}, {len(images.classes)} classes; "
          f"on {model.coords.device}, {WORLD} process(es) of {torch.get_num_threads()} thread(s)")
    print(f"parameters: SIREN with alpha {count['siren'] + count['inner_loop']:,}, "
          f"reader {count['reader']:,}")
    print("settings: " + " ".join(f"{key}={value}" for key, value in vars(args).items()),
          flush=True)


def choose_task(args, model: MWT, images, test) -> Task:
    """Where no fit ever changes, and all fits find room, they are made once."""
    if args.freeze_siren and args.fraction == 1 and not (args.augment or args.w_cluster):
        size = 4 * model.reader.beta.numel() * (len(images) + len(test))
        if args.branch != "colour" and size < free_memory(model.coords.device) / 2:
            fits = fit_once(model, images, args.steps, args.workers)
            tests = fit_once(model, test, args.steps_test or args.steps, args.workers)
            return reader_task(model.read, fits, tests)
    return image_task(args, model, images, test)


def run(explicit: dict):
    args, content = open_run(explicit)
    device = find_device(args.device)
    images, test = open_data(args, device, args.eval_only)
    if content is None:
        model = new_model(args, images, device)
    else:
        if facts(test)[:2] != tuple(content["data"])[:2] or \
                not args.eval_only and facts(images) != tuple(content["data"]):
            raise InputError(f"--dataset {args.dataset}: not the data of {args.ckpt or args.out}, "
                             "or changed since: other channels, classes or number of images")
        model = model_from(content, args.ckpt or args.out, device)
        model.fraction, model.bf16 = args.fraction, args.precision == "bf16"
    for part in (model.siren, model.inner_loop):
        part.requires_grad_(not args.freeze_siren)
    model.inner_loop.recompute = args.recompute

    if args.eval_only:
        metrics = content["metrics"] | evaluate(model, test, args.steps_test, args.workers)
        if RANK == 0:
            print(in_words(metrics, args))
        if args.out is not None:
            given = shlex.join([*LAUNCH.split(), "train.py", *as_flags(explicit)])
            write_reports(args, model, test, metrics, given)
        return
    if RANK == 0:
        introduce(args, model, images, test)
    if content is not None and "progress" not in content:
        metrics = content["metrics"]
        if RANK == 0:
            print(f"the run in {args.out} is finished: nothing to train")
    else:
        task = choose_task(args, model, images, test)
        metrics = train(args, model, task, facts(images), content)
    if RANK == 0:
        print(f"{in_words(metrics, args)}; {metrics['seconds']:.0f} s", flush=True)
    write_reports(args, model, test, metrics, command_line(args))


def main(argv: list[str] | None = None):
    try:
        with exits("train.py"):
            run(vars(parser(__doc__.split("\n\n")[0]).parse_args(argv)))
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.modules["train"] = sys.modules["__main__"]     # a checkpoint that is loaded finds this one
    main()
