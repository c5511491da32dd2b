"""Trains a SIREN initialisation, its inner-loop step sizes and a Transformer reader end to end, to
classify images from the weights of their INRs (Gielisse & van Gemert, "End-to-End Implicit Neural
Representations for Classification", CVPR 2025).

    python train.py                                      # 8x8 digits, embedded: 1 to 3 minutes
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
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

import data
import figures
from checkpoint import (InputError, Stop, exits, generator, load_checkpoint, model_from,
                        read_checkpoint, save_checkpoint, seeded)
from measures import wilson
from model import MWT, psnr, statistics
from reader import Reader
from settings import LAUNCH, RANK, WORLD, command_line, environment, find_device, open_run, parser

# ---- Evaluation ----------------------------------------------------------------------------------

@torch.no_grad()
def fitted(model: MWT, images, order, steps: int, workers: int):
    """Yields (row numbers, labels, values seen, tokens, error) for each tensor of row numbers in
    `order`, of a `data.Images`."""
    for rows, (pixels, labels) in zip(order, images.batches(order, model.coords.device, workers)):
        coords, values = model.look(images.signal(pixels), steps + 1)
        phi, error = model.fit_and_error(coords, values, clamp=True)
        yield rows, labels, values, model.tokens(phi), error


@torch.no_grad()
def evaluate(model: MWT, images, steps: int | None = None, workers=0, poll=lambda: None) -> dict:
    """The `score` of a `data.Images`, by all processes; poll() is called in between."""
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
    """Accuracy with its interval and mean PSNR, of what is known of each image (n,)."""
    correct, n = int(right.sum()), len(right)
    return {"test_accuracy": correct / n, "test_interval": list(wilson(correct, n)),
            "test_psnr": float(decibels.mean()), "test_images": n}


# ---- The outer loop ------------------------------------------------------------------------------

def make_optimizer(model: nn.Module, args) -> torch.optim.Optimizer:
    """Each part of the model is a group; what is frozen is in none."""
    groups = [{"params": [p for p in part.parameters() if p.requires_grad],
               "lr": args.lr_alpha if name == "inner_loop" else args.lr}
              for name, part in model.named_children()]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=True)


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
    """torch.compile of the step, if one batch can be had by it; if not, a line says so."""
    fast = torch.compile(forward)
    try:
        fast(*batch)[:3].sum().backward()
        return fast
    except Exception as error:     # a missing compiler, driver or package: each has its own type
        reason = " ".join(str(error).split())[:160]
        print(f"torch.compile does not work here, the step runs without: {reason}", file=sys.stderr)
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
            self.began -= progress.get("seconds", 0.0)         # of the epoch that was interrupted

    @property
    def length(self) -> int:
        """Steps of this epoch; 0 when training is over."""
        return max(0, min(self.steps, self.total - self.epoch * self.steps))

    def save(self):
        """The first process alone writes: at any of its steps it holds the state of all."""
        state = self.model.state_dict()
        total = self.sums.sum() + sum(p.sum() for p in state.values())         # a nan stays in it
        if not math.isfinite(float(total) + self.metrics.get("test_psnr", 0.0)):
            raise Stop(1, "the loss or a weight is not finite; the last checkpoint is kept")
        content = {"method": self.model.method, "args": vars(self.args), "data": self.facts,
                   "metrics": self.metrics, "model": state}
        if self.length:
            content["progress"] = {"epoch": self.epoch, "step": self.step, "sums": self.sums.cpu(),
                                   "global_batch": self.batch,
                                   "seconds": time.monotonic() - self.began}
            content["optimizer"] = self.optimizer.state_dict()
            content["scheduler"] = self.scheduler.state_dict()
        if RANK == 0 and self.args.out:
            save_checkpoint(self.args.out, content)
        self.saved_at = time.monotonic()

    def pause(self):
        """Between steps: saves when it is time, and ends when asked to."""
        if self.caught and RANK == 0:
            self.save()
            way = f"{LAUNCH} train.py --resume --out {shlex.quote(str(self.args.out))}"
            way = way if self.model.method == "mwt" else "the same command"
            raise Stop(128 + self.caught[0], f"stopped and saved at epoch {self.epoch + 1}, step "
                       f"{self.step}; go on by: {way}" if self.args.out else "stopped")
        if time.monotonic() - self.saved_at >= 60 * self.args.save_minutes:
            self.save()

    def end_epoch(self, result: dict):
        """Takes in the evaluation, saves, and says how the epoch went."""
        names = ("loss", "reconstruction", "weighted_cluster_loss", "train_accuracy", "train_psnr")
        now, means = time.monotonic(), (self.sums / self.step).tolist()
        row = {"epoch": self.epoch + 1, **dict(zip(names, means)), "seconds": now - self.began,
               **{key: result[key] for key in ("test_accuracy", "test_psnr") if key in result}}
        self.metrics |= result
        self.metrics["epochs"].append(row)
        self.metrics["seconds"] += row["seconds"]
        self.epoch, self.step, self.began = self.epoch + 1, 0, now
        self.save()
        if RANK == 0 and self.args.out:
            print("epoch {epoch:3d}/{of}  loss {loss:.4f}  reconstruction {reconstruction:.5f}  "
                  "{on} accuracy {test_accuracy:.2%}  {on} PSNR {test_psnr:.2f} dB  {seconds:.1f} s"
                  .format(**row, of=self.args.epochs, on="val" if self.args.val else "test"),
                  flush=True)


def train(args, model, examples, batches, forward, test, facts=(), content=None) -> dict:
    """Trains to the last epoch, writing args.out as it goes (None: nothing); returns the metrics.

    batches(row numbers (steps, batch), number of the first step) yields what `forward` takes, which
    returns `statistics`; test(poll) returns metrics; content: a checkpoint to go on from."""
    run, device = Run(args, model, examples, facts, content), next(model.parameters()).device
    compiles = args.compile or args.compile is None and device.type == "cuda"
    with signals(run.caught):
        while run.length:
            if run.step == 0:
                run.sums.zero_()
            g = generator("order", args.seed, run.epoch)
            order = torch.randperm(examples, generator=g)[:run.length * run.batch]
            order = order.view(run.length, WORLD, -1)[run.step:, RANK]         # (steps, batch)
            bar = tqdm(batches(order, run.epoch * run.steps + run.step),
                       f"epoch {run.epoch + 1}/{args.epochs}", len(order), leave=False,
                       disable=True if RANK else None)
            for batch in bar:
                run.pause()
                if compiles:
                    forward, compiles = compiled(forward, *batch), False
                    model.zero_grad()
                run.sums += backward(forward, run.optimizer, *batch)
                update(run.optimizer)
                run.scheduler.step()
                run.step += 1
            run.end_epoch(test(run.pause))
    return run.metrics


def image_batches(args, model: MWT, images, order, step: int):
    """Yields what `MWT.forward` takes for each tensor of row numbers in `order`, of a
    `data.Images`, as drawn and augmented in that step and those after it."""
    device, labels = model.coords.device, images.labels
    flip = args.dataset not in ("digits", "mnist")             # digits have no mirror image
    shuffled = torch.randperm(len(labels), generator=generator("random labels", args.seed))
    for rows, (pixels, own) in zip(order, images.batches(order, device, args.workers)):
        if args.augment:
            g = generator("augmentation", args.seed, step, RANK)
            pixels = data.augment(pixels, torch.rand(len(pixels), 6, generator=g).to(device), flip)
        g = generator("pixels", args.seed, step, RANK, device=device)
        batch = *model.look(images.signal(pixels), args.steps + 1, g), own
        if args.cluster_random:                # an image's random label stays the same
            batch = *batch, labels[shuffled[rows].to(labels.device)].to(device)
        yield batch
        step += 1


# ---- A reader on fixed weights -------------------------------------------------------------------

class Fits(NamedTuple):
    """A data set as fitted weights."""
    tokens: Tensor         # (n, T, D)
    labels: Tensor         # (n,)
    error: Tensor          # (n,) mean squared error of the reconstruction


def fit_once(model: MWT, images, steps: int, workers: int) -> Fits:
    """All of a `data.Images`, fitted by so many inner steps."""
    order = torch.arange(len(images)).split(model.block_size)
    blocks = tqdm(fitted(model, images, order, steps, workers), "fitting", len(order), leave=False,
                  disable=None)
    fits = [(tokens, labels, error) for _, labels, _, tokens, error in blocks]
    return Fits(*map(torch.cat, zip(*fits)))


def train_on_fits(args, model, read, fits: Fits, test: Fits | None, facts, content=None) -> dict:
    """`train`, of the reader of a model alone: read(tokens) -> logits."""
    def batches(order, step):
        for rows in order.to(fits.labels.device):
            yield tuple(each[rows] for each in fits)

    def forward(tokens, labels, error):
        logits = read(tokens).to(tokens.dtype)
        return statistics(logits, labels, error, error.new_zeros(()))

    @torch.no_grad()
    def evaluate_fits(poll):
        if test is None:
            return {}
        guess = torch.cat([read(tokens).argmax(-1) for tokens in test.tokens.split(256)])
        return score((guess == test.labels).float(), psnr(test.error))

    return train(args, model, len(fits.labels), batches, forward, evaluate_fits, facts, content)


def train_reader(tokens: Tensor, labels: Tensor, args, spread=0.0, method=None, facts=(),
                 test: Fits | None = None, classes: int | None = None) -> Reader:
    """A new reader trained on tokens (n, T, D) and labels (n,), its token scale such that they get
    a root mean square of 1, its offsets beta drawn with `spread` times theirs. Writes nothing,
    unless a method is named: then its checkpoint args.out, or goes on with the one there. classes:
    more than there are labels, where a small training set has not all."""
    scale = 1 / float(tokens.square().mean().sqrt())
    with seeded("reader", args.seed):
        classes = classes or int(labels.max()) + 1
        reader = Reader(tokens.shape[1], args.width, classes, tokens.shape[2], args.reader_depth,
                        args.head_dim, args.mlp_ratio, scale)
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
        fits = Fits(tokens, labels, tokens.new_zeros(len(labels)))
        train_on_fits(args, model, reader, fits, test, facts, content)
    return reader.eval()


# ---- The program ---------------------------------------------------------------------------------

def facts(images) -> tuple[int, list[str], int]:
    """What a checkpoint must know of its training data: channels, classes, number of images."""
    return images.channels, list(images.classes), len(images)


def open_data(args, device):
    """(training images, test images)."""
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if RANK:                                   # waits until the first has downloaded
        dist.barrier()
    images, test = data.load_dataset(args, device, train=not args.eval_only)
    if WORLD > 1 and RANK == 0:
        dist.barrier()
    if not args.eval_only and args.batch_size * WORLD > len(images):
        raise InputError(f"--batch-size {args.batch_size}, {WORLD} process(es): there are only "
                         f"{len(images)} training images")
    return images, test


def make_model(args, content: dict | None, images, device) -> MWT:
    """The checkpoint's model, or a new one, with the INR of --init-from."""
    if content is not None:
        known = tuple(content["data"])
        if facts(images)[:2] != known[:2] or not args.eval_only and facts(images) != known:
            raise InputError(f"--dataset {args.dataset}: other channels, classes or number of "
                             "images than the checkpoint's")
        model = model_from(content, args.ckpt or args.out, device)
        model.fraction, model.bf16 = args.fraction, args.precision == "bf16"
    else:
        model = MWT(args, images.channels, len(images.classes)).to(device)
    if content is None and args.init_from:
        start, _ = load_checkpoint(args.init_from, device)
        if start.siren.head.out_features != images.channels:
            raise InputError(f"--init-from {args.init_from}: of images with other channels")
        model.siren.load_state_dict(start.siren.state_dict())
        model.inner_loop.load_state_dict(start.inner_loop.state_dict())
    model.siren.requires_grad_(not args.freeze_siren)
    model.inner_loop.requires_grad_(not args.freeze_siren)
    model.inner_loop.recompute = args.recompute
    return model


def train_model(args, model: MWT, images, test, content) -> dict:
    """On images; where no image's fit ever changes, and memory allows, on fits made once."""
    cpu, steps = model.coords.device.type == "cpu", args.steps_test or args.steps
    changes = args.fraction < 1 or args.augment or args.w_cluster or args.branch == "colour"
    gib = 4 * model.reader.beta.numel() * (len(images) + len(test)) / 2 ** 30
    if args.freeze_siren and not changes and gib <= (4 if cpu else 16):
        fits = fit_once(model, images, args.steps, args.workers)
        test = fit_once(model, test, steps, args.workers)
        return train_on_fits(args, model, model.read, fits, test, facts(images), content)
    return train(args, model, len(images), partial(image_batches, args, model, images), model,
                 lambda poll: evaluate(model, test, steps, args.workers, poll), facts(images),
                 content)


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
    held_out = "validation share of the training set" if args.val else "test set"
    estimate = f" (estimated by {args.fraction:g} of the pixels)" if args.fraction < 1 else ""
    print(f"{held_out}: accuracy {metrics['test_accuracy']:.2%} (95% interval {low:.2%} to "
          f"{high:.2%}, n = {metrics['test_images']}), PSNR {metrics['test_psnr']:.2f} dB"
          f"{estimate}; trained for {metrics['seconds']:.0f} s")
    if args.out is not None:
        path, content = Path(args.out).with_suffix(".json"), {
            "command": command, "flags": vars(args), **environment(model.coords.device),
            "processes": WORLD, "evaluated_on": held_out, **metrics}
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
    model = make_model(args, content, images, device)
    say = print if RANK == 0 else lambda text: None
    if args.eval_only:
        metrics = content["metrics"] | evaluate(model, test, args.steps_test, args.workers)
    elif content is None or "progress" in content:
        count = sum(p.numel() for p in model.parameters())
        say(f"{args.dataset}: {len(images):,} images to train on, {len(test):,} to evaluate on, "
            f"{images.channels}x{args.size}x{args.size}; {count:,} parameters; {device}, {WORLD} "
            "process(es)")
        metrics = train_model(args, model, images, test, content)
    else:
        say(f"the run in {args.out} is finished: nothing to train")
        metrics = content["metrics"]
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
    main()
