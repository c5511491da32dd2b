"""The control: the reader on pixels instead of weights. Is an image easier or harder to classify
when it is stored as the weights of an INR?

    python pixels.py --dataset digits --choose             # pixels.pt, pixels.json
    python diagnostics.py --ckpt pixels.pt

A token is a square patch of the image where it was a neuron's row; all else is train.py's. A weak
opponent would flatter the weights, so with --choose its spread, learning rate and epochs are chosen
on a fifth of the training images. The same command, given again, goes on where it was stopped.
"""
import argparse
import contextlib
import copy
import json
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import settings
from checkpoint import InputError, exits, read_checkpoint
from data import load_dataset, stratified_sample
from reader import Reader
from train import Fits, facts, train_reader

USED = ("dataset data_root size train_size test_size val workers width depth reader_depth head_dim "
        "mlp_ratio epochs batch_size lr weight_decay seed out save_minutes device").split()


# ---- The method ----------------------------------------------------------------------------------

def choose_patch(tokens: int, size: int, channels: int) -> tuple[int, int]:
    """(pixels a side, channels) of the patches, of one channel or of all, whose number in an image
    of `size` pixels a side is by its ratio the nearest to `tokens`."""
    patches = [(side, c) for side in range(1, size + 1) if size % side == 0 for c in (1, channels)]
    return min(patches, key=lambda p: abs(math.log((size // p[0]) ** 2 * channels / p[1] / tokens)))


class Pixels(nn.Module):
    """What diagnostics.py asks of a method, of patches in place of weights."""

    def __init__(self, args, channels: int, classes: int):
        super().__init__()
        self.size = args.size
        self.side, self.together = choose_patch(args.depth * args.width, args.size, channels)
        tokens = (args.size // self.side) ** 2 * channels // self.together
        self.filled = self.together * self.side ** 2           # numbers of a token that are pixels
        self.reader = Reader(tokens, args.width, classes, max(args.width + 1, self.filled),
                             args.reader_depth, args.head_dim, args.mlp_ratio, args.token_scale)
        self.read, self.trace = self.reader.forward, self.reader.trace

    def fit(self, images: Tensor) -> Tensor:
        """Images (N, C, size, size) -> patches (N, T, D), channel by channel where they have one,
        then row by row. Zeros make them as long as a neuron's row: the reader is the weights'
        own, and its offsets beta have room to say where a patch is, apart from its grey levels."""
        planes = images.reshape(-1, self.together, self.size, self.size)
        patches = F.unfold(planes, self.side, stride=self.side).mT.reshape(
            len(images), -1, self.filled)
        return F.pad(patches, (0, self.reader.beta.shape[1] - self.filled))

    def parts(self) -> dict[str, Tensor]:
        return {}                  # no number of a patch is a bias


def from_checkpoint(content: dict, device="cpu") -> Pixels:
    """The model in what `read_checkpoint` returned."""
    channels, classes, _ = content["data"]
    with torch.device("meta"):     # takes no memory: the sizes are only claims
        model = Pixels(argparse.Namespace(**content["args"]), channels, len(classes))
    model.load_state_dict(content["model"], assign=True)
    return model.to(device)


def count_flops(model: nn.Module, *inputs: Tensor) -> int:
    """FLOPs (a multiply-add is two) of the matrix products of model(*inputs), forward and backward,
    counted on copies without memory."""
    model, inputs = copy.deepcopy(model).to("meta"), [x.to("meta") for x in inputs]
    with torch.device("meta"), FlopCounterMode(display=False) as counter, \
            sdpa_kernel(SDPBackend.MATH):
        model(*inputs).sum().backward()
    return counter.get_total_flops()


# ---- Its recipe ----------------------------------------------------------------------------------

def choose(args, fits: Fits, train_on, trials: list[dict], write) -> dict:
    """The best setting on a held-out fifth of the training images, one flag after the other."""
    held = torch.zeros_like(fits.labels, dtype=torch.bool)
    held[stratified_sample(fits.labels, max(1, len(held) // 5))] = True
    rest, held = (Fits(*(x[rows] for x in fits)) for rows in (~held, held))

    def accuracy(setting: dict) -> float:
        for trial in trials:
            if setting.items() <= trial.items():
                return trial["held_out"]
        path = Path(args.out).with_suffix(f".trial{len(trials) + 1}.pt")
        metrics = train_on(rest, held, args, **setting, out=str(path), val=0.2)
        trials.append(setting | {"held_out": metrics["test_accuracy"]})
        write()
        path.unlink()
        print(f"{setting}: {metrics['test_accuracy']:.2%} held out", flush=True)
        return metrics["test_accuracy"]

    # The rate first: where it is too low nothing is learnt, whatever the spread.
    grid = {"lr": [args.lr * factor for factor in (1, 1 / 3, 3, 10)],
            "spread": [args.spread, 0.1, 0.3, 1.0],
            "epochs": [args.epochs * factor for factor in (1, 3)]}
    best = {key: vars(args)[key] for key in grid}
    for key, values in grid.items():
        best = max([best | {key: value} for value in values], key=accuracy)
    return best


# ---- The program ---------------------------------------------------------------------------------

def read_flags(argv: list[str] | None) -> argparse.Namespace:
    p = settings.parser(__doc__.split("\n\n")[0], "pixels.py", USED)
    p.add_argument("--spread", type=settings.number(0), help="of the position offsets beta at the "
                   "start, in units of the patches' root mean square (default 0)")
    p.add_argument("--choose", action="store_true", help="try settings around those given")
    given = {"out": "pixels.pt", "spread": 0.0, "choose": False} | vars(p.parse_args(argv))
    args = vars(settings.settings(given))
    settings.check_output(argparse.Namespace(out=args["out"], resume=True))
    return argparse.Namespace(**{key: args[key] for key in (*USED, "token_scale", *given)})


def open_report(args, path: Path) -> dict:
    """What this command has found before. InputError: --out holds another's."""
    flags = {key: value for key, value in vars(args).items() if key not in settings.FREE}
    if not path.exists() and not Path(args.out).exists():
        return {"flags": flags, "trials": []}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):        # some other file
        report = json.loads(path.read_text())
        if report["flags"] == flags:
            return report
    raise InputError(f"--out {args.out}: it or {path} is of another command")


def run(argv: list[str] | None):
    args = read_flags(argv)
    path, device = Path(args.out).with_suffix(".json"), settings.find_device(args.device)
    report, (images, test) = open_report(args, path), load_dataset(args, device)
    model = Pixels(args, images.channels, len(images.classes))
    tokens = len(model.reader.beta)
    flops = count_flops(model.reader, model.reader.beta.detach()[None])
    report |= {"tokens": tokens, "flops_an_image": flops} | settings.environment(device)
    print(f"{tokens} tokens of {model.filled} pixels, {flops / 1e9:.3f} GFLOP an image")

    def fitted(images) -> Fits:
        x, labels = next(images.batches([torch.arange(len(images))], device, args.workers))
        return Fits(model.fit(images.signal(x)), labels, torch.zeros(len(x), device=device))

    def train_on(fits: Fits, test: Fits, args, **changed) -> dict:             # metrics
        args = argparse.Namespace(**vars(args) | changed)
        train_reader(fits.tokens, fits.labels, args, args.spread, "pixels", facts(images), test,
                     len(images.classes))
        return read_checkpoint(args.out)["metrics"]

    def write():
        path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")

    write()
    fits = fitted(images)
    if args.choose:
        best = choose(args, fits, train_on, report["trials"], write)
        args = argparse.Namespace(**vars(args) | best | {"choose": False})
    report |= train_on(fits, fitted(test), args)
    report["command"] = settings.command_line(args, "pixels")
    write()
    low, high = report["test_interval"]
    print(f"accuracy {report['test_accuracy']:.2%} [{low:.2%}, {high:.2%}]: {report['command']}")


def main(argv: list[str] | None = None):
    with exits("pixels.py"):
        run(argv)


if __name__ == "__main__":
    main()
