"""HyperINR: each image has a latent z, from which a hypernetwork H makes all weights of its SIREN.
Training sees pixels alone. Is the class in z all the same, and do the conditions of the theorem
hold that is said to put it there? (Qiu, Sonis & Shen, "Ensuring Semantics in Weights of Implicit
Neural Representations through the Implicit Function Theorem", arXiv 2601.23181.)

    python hyperinr.py                         # 8x8 digits: hyperinr.pt, hyperinr.json, .png
    python diagnostics.py --ckpt hyperinr.pt

H and the z of the training images are trained together. Then H is frozen, and every image is fitted
by its z alone, from 0: with f the field of the weights H(z), D the numbers in an image X,

    z*(X) = argmin L(z, X),    L = |f(H(z)) - X|^2 / D + lambda_z |z|^2

The theorem's conditions on z* are measured by theorem.py. The same command, given again, goes on
from the last finished epoch.
"""
import argparse
import copy
import json
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import figures
import settings
import theorem
from checkpoint import InputError, exits, generator, model_from, save_checkpoint, seeded
from data import load_dataset, stratified_sample
from measures import (DECAYS, PENALTIES, fit_linear, fit_mlp, fit_probe, knn_predict,
                      nearest_mean_predict, paired_bootstrap, principal, wilson)
from model import psnr
from reader import Reader
from siren import affine, coordinate_grid
from train import facts, train_reader

HIDDEN = 256                               # units in each of H's two hidden layers
BATCH, LR_H, LR_Z = 64, 5e-4, 3e-2         # joint training: Adam, cosine decay to 0
FIT_STEPS, LR_FIT, BLOCK = 150, 0.1, 256   # a new image's z, by Adam; images at once
MEASURED, POLISH_STEPS = 16, 1000          # test images that the theorem is measured on; to z*
USUAL = dict(width=32, depth=1, head_dim=32, reader_depth=3, lr=3e-3, epochs=15, latent=128,
             lambda_z=3e-4, joint_epochs=150, fraction=0.25, fourier=False, out="hyperinr.pt")
DIGITS = dict(latent=32, lambda_z=1e-3, fraction=1.0)
USED = ("dataset data_root size train_size test_size val workers omega mlp_ratio batch_size "
        "weight_decay seed device").split()


# ---- The model -----------------------------------------------------------------------------------

class HyperINR(nn.Module):
    """H, the field whose weights it makes, and a reader of these weights."""
    mediation_images = 500     # that diagnostics.py fits again with another's mean colour

    def __init__(self, args, channels: int, classes: int):
        super().__init__()
        self.args, self.fitted, width = args, {}, args.width   # fitted: {an image's bytes: its z}
        with seeded("hyperinr", args.seed):
            grid = coordinate_grid(args.size, args.size)                       # (P, 2)
            inputs = args.omega * F.pad(grid, (0, 1), value=1)                 # (P, 3)
            self.activation, bound = torch.sin, 1 / 2
            if args.fourier:               # Tancik et al., NeurIPS 2020; a SIREN's frequencies
                angles = args.omega * grid @ (torch.rand(2, width // 2) - 0.5)
                inputs = F.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, 1), value=1)
                self.activation, bound = torch.relu, math.sqrt(6 / (inputs.shape[1] - 1))
            self.shapes = [(width, inputs.shape[1]), *[(width, width + 1)] * args.depth,
                           (channels, width + 1)]
            bounds = [bound, *[math.sqrt(6 / width)] * args.depth, 1 / math.sqrt(width)]
            start = [torch.empty(shape).uniform_(-b, b) for shape, b in zip(self.shapes, bounds)]
            for layer in start:
                layer[:, -1] = 0
            self.H = nn.Sequential(nn.Linear(args.latent, HIDDEN), nn.Tanh(),
                                   nn.Linear(HIDDEN, HIDDEN), nn.Tanh(),
                                   nn.Linear(HIDDEN, sum(map(math.prod, self.shapes))))
            nn.init.uniform_(self.H[-1].weight, -0.01, 0.01)   # H(z) is near `start` for all z
            self.H[-1].bias.data = torch.cat([layer.flatten() for layer in start])
        with seeded("reader", args.seed):      # its trained one takes its place
            self.reader = Reader(args.depth * width, width, classes, width + 1, args.reader_depth,
                                 args.head_dim, args.mlp_ratio, args.token_scale)
        self.register_buffer("inputs", inputs)

    def weights(self, z: Tensor) -> list[Tensor]:
        """Latents (..., l) -> each layer's rows of weights, the bias last (..., out, in + 1)."""
        layers = self.H(z).split([*map(math.prod, self.shapes)], -1)
        return [layer.unflatten(-1, shape) for layer, shape in zip(layers, self.shapes)]

    def field(self, weights: list[Tensor], inputs: Tensor) -> Tensor:
        """Pixel values (..., P, C) at inputs (P, in + 1): omega (y, x, 1), or features and 1."""
        first, *hidden, head = weights
        a = self.activation(inputs @ first.mT)                                 # (..., P, width)
        for weight in hidden:
            a = self.activation(affine(a, weight))
        return affine(a, head)

    def render(self, z: Tensor) -> Tensor:
        """Latents (..., l) -> pixels (..., D), in the order of `flat`."""
        return self.field(self.weights(z), self.inputs).flatten(-2)

    def loss(self, z: Tensor, values: Tensor, pixels: Tensor, lambda_z: float) -> tuple:
        """L (N,) of latents z (N, l), and its first term alone; values (N, P, C) at some pixels."""
        shown = self.field(self.weights(z), self.inputs[pixels])
        error = (shown - values[:, pixels]).square().mean((1, 2))
        return error + lambda_z * z.square().sum(1), error

    def draw(self, g: torch.Generator, fraction: float) -> Tensor:
        """Numbers of the pixels that a step sees, of all its images."""
        count = int(fraction * len(self.inputs) + 1e-9)
        return torch.randperm(len(self.inputs), generator=g)[:count].to(self.inputs.device)

    def descend(self, z: Tensor, values: Tensor, lambda_z: float, steps: int, fraction=1.0):
        """z (N, l) after so many steps of Adam down L, for values (N, P, C), of which a step sees a
        fraction: every image the same pixels in the same order."""
        z, g = z.clone().requires_grad_(), generator("evaluation")
        adam = torch.optim.Adam([z], betas=(0.9, 0.99))
        for step in range(steps):
            set_rate(adam, LR_FIT, step / steps)
            with torch.enable_grad():
                loss, _ = self.loss(z, values, self.draw(g, fraction), lambda_z)
                z.grad, = torch.autograd.grad(loss.sum(), z)
            adam.step()
        return z.detach()

    def latents(self, images: Tensor) -> Tensor:
        """z (N, l) of images (N, C, size, size) in [-1, 1], fitted from 0; each image once."""
        keys = [image.tobytes() for image in images.cpu().numpy()]
        new = torch.tensor([i for i, key in enumerate(keys) if key not in self.fitted]).long()
        blocks = new.split(BLOCK) if len(new) else ()
        bar = tqdm(blocks, "fitting", leave=False, disable=len(new) <= BLOCK or None)
        for rows in bar:
            values = images[rows].flatten(2).mT                                # (N, P, C)
            start = values.new_zeros(len(values), self.args.latent)
            z = self.descend(start, values, self.args.lambda_z, FIT_STEPS, self.args.fraction)
            self.fitted |= {keys[i]: each for i, each in zip(rows.tolist(), z)}
            bar.set_postfix_str(f"PSNR {self.decibels(z, values.flatten(1)):.2f} dB")
        return torch.stack([self.fitted[key] for key in keys])

    @torch.no_grad()
    def decibels(self, z: Tensor, x: Tensor) -> float:
        return float(psnr((self.render(z).clamp(-1, 1) - x).square().mean(1)).mean())

    @torch.no_grad()
    def tokens(self, z: Tensor) -> Tensor:
        """H(z) - H(0), hidden neuron by hidden neuron: (N, depth * width, width + 1)."""
        hidden, anchor = (torch.cat(self.weights(each)[1:-1], 1) for each in (z, 0 * z[:1]))
        return hidden - anchor

    @torch.no_grad()
    def show(self, z: Tensor) -> Tensor:
        """Pictures (N, C, size, size)."""
        pixels = self.field(self.weights(z), self.inputs).mT.clamp(-1, 1)      # (N, C, P)
        return pixels.unflatten(-1, (self.args.size, self.args.size))

    # What diagnostics.py asks of a method.

    def fit(self, images: Tensor) -> Tensor:
        return self.tokens(self.latents(images))

    def read(self, tokens: Tensor) -> Tensor:
        return self.reader(tokens)

    def trace(self, tokens: Tensor):
        return self.reader.trace(tokens)

    def parts(self) -> dict[str, Tensor]:
        return {"bias column": torch.eye(self.args.width + 1, device=self.inputs.device)[:, -1:]}

    def coordinates(self, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        return {"z": self.latents(images)}

    def reconstruct(self, images: Tensor) -> Tensor:
        return self.show(self.latents(images))


def flat(images: Tensor) -> Tensor:
    """Images (N, C, size, size) -> pixels (N, D)."""
    return images.flatten(2).mT.flatten(1)


def set_rate(optimizer, peak: float, done: float):
    """Cosine decay from `peak` to 0 as `done` goes from 0 to 1."""
    optimizer.param_groups[0]["lr"] = peak * (1 + math.cos(math.pi * done)) / 2


def from_checkpoint(content: dict, device="cpu") -> HyperINR:
    """The model in what `read_checkpoint` returned."""
    args, (channels, classes, _) = argparse.Namespace(**content["args"]), content["data"]
    with torch.device("meta"):             # takes no memory: the sizes are only claims
        model = HyperINR(args, channels, len(classes))
    model.load_state_dict(content["model"], assign=True)
    return model.to(device)


# ---- Joint training ------------------------------------------------------------------------------

def train_jointly(model: HyperINR, images, content: dict | None) -> list[float]:
    """Trains H and a z for each of `images` (a `data.Images`), saving after each epoch; returns the
    PSNR (dB) of each. content: a checkpoint to go on from."""
    args, device, psnrs = model.args, model.inputs.device, []
    latents = nn.Embedding(len(images), args.latent, sparse=True).to(device)
    nn.init.zeros_(latents.weight)
    adam = torch.optim.Adam(model.H.parameters())
    adam_z = torch.optim.SparseAdam(latents.parameters(), betas=(0.9, 0.99))   # rows seen, alone
    parts = (latents, adam, adam_z)
    if content:
        psnrs = content["metrics"]["train_psnr"]
        for part, state in zip(parts, content.get("optimizer", [])):
            part.load_state_dict(state)
    bar = tqdm(range(len(psnrs), args.joint_epochs), "training", leave=False, disable=None)
    for epoch in bar:
        g, total = generator("order", args.seed, epoch), 0.0
        order = torch.randperm(len(images), generator=g).split(BATCH)
        batches = images.batches(order, device, args.workers)
        for step, (rows, (batch, _)) in enumerate(zip(order, batches)):
            done = (epoch + step / len(order)) / args.joint_epochs
            values = images.signal(batch).flatten(2).mT                        # (N, P, C)
            pixels = model.draw(g, args.fraction)
            loss, error = model.loss(latents(rows.to(device)), values, pixels, args.lambda_z)
            loss.mean().backward()
            for optimizer, peak in ((adam, LR_H), (adam_z, LR_Z)):
                set_rate(optimizer, peak, done)
                optimizer.step()
                optimizer.zero_grad()
            total += float(psnr(error.detach()).sum())
        psnrs.append(total / len(images))
        bar.set_postfix_str(f"PSNR {psnrs[-1]:.2f} dB")
        save(model, images, {"train_psnr": psnrs}, progress={"epoch": epoch + 1},
             optimizer=[part.state_dict() for part in parts])
    return psnrs


def save(model: HyperINR, images, metrics: dict, **unfinished):
    save_checkpoint(model.args.out, unfinished | {
        "method": "hyperinr", "args": vars(model.args), "data": facts(images),
        "model": model.state_dict(), "metrics": metrics})


# ---- The theorem ---------------------------------------------------------------------------------

def conditions(model: HyperINR, images: Tensor) -> dict:
    """What `theorem.measure` finds, in float64, of images (n, C, size, size)."""
    exact, fitted = copy.deepcopy(model).double(), model.latents(images).double()
    exact.requires_grad_(False)            # or the graph of H fills the memory
    x, g = flat(images).double(), generator("theorem", model.args.seed)
    noise, noise_z = (torch.randn(each.shape, generator=g).to(each) for each in (x, fitted))

    def minimise(z, x, lambda_z):          # Newton's steps cost more and do not cross saddles well
        values = x.float().unflatten(1, (-1, images.shape[1]))
        return model.descend(z.float(), values, lambda_z, POLISH_STEPS).double()
    found = theorem.measure(
        exact.render, minimise, x, model.args.lambda_z,
        changes={"noise": noise, "shift": flat(images.roll(1, 3)) - x},
        starts={"0": 0 * fitted, "random": noise_z * fitted.std(), "another's": fitted.roll(1, 0)})
    z = found.pop("z*")
    found["|fitted z - z*| / that between images"] = theorem.spread(
        (fitted - z).norm(dim=1) / torch.pdist(z).median())
    return found


# ---- Where is the class? -------------------------------------------------------------------------

def look(model: HyperINR, images) -> tuple[Tensor, Tensor, Tensor, dict]:
    """Of a `data.Images`: images, labels, z, and {where: rows (n, d)} to look for the class in."""
    rows = [torch.arange(len(images))]
    x, labels = next(images.batches(rows, model.inputs.device, model.args.workers))
    x = images.signal(x)
    z = model.latents(x)
    tokens = model.tokens(z)
    return x, labels, z, {"pixels": x.flatten(1), "z": z, "weights": tokens.flatten(1),
                          "bias column": tokens[..., -1]}


CLASSIFIERS = {"10-NN": knn_predict, "nearest mean": nearest_mean_predict,
               "linear": lambda *data: fit_probe(fit_linear, PENALTIES, *data)[0],
               "MLP": lambda *data: fit_probe(fit_mlp, DECAYS, *data)[0]}


def read_class(bank: dict, bank_labels: Tensor, queries: dict, labels: Tensor) -> dict:
    """{where: {how: (accuracy, gain over pixels, its interval's ends)}}; bank and queries: {where:
    rows (n, d)}, pixels first."""
    found, on_pixels = {}, {}
    for where, x in queries.items():
        found[where] = {}
        for how, classify in CLASSIFIERS.items():
            right = (classify(bank[where], bank_labels, x) == labels).double()
            gain = paired_bootstrap(right, on_pixels.setdefault(how, right))
            found[where][how] = (float(right.mean()), *gain)
    return found


# ---- The program ---------------------------------------------------------------------------------

def tables(report: dict) -> str:
    """All that was measured, as text."""
    found, score = report["theorem"], report["metrics"]
    text = (f"PSNR (dB): training {score['train_psnr'][-1]:.2f}, test {score['test_psnr']:.2f}; "
            "reader on the weights {:.2%} [{:.2%}, {:.2%}]\n".format(
                score["test_accuracy"], *score["test_interval"]))

    def line(name: str, *cells):
        nonlocal text
        cells = [f"{x:.3g}" if isinstance(x, float) else x for x in cells]
        text += f"\n{name:{100 - 20 * len(cells)}}" + "".join(f"{cell:>20}" for cell in cells)

    line("accuracy (%)", *CLASSIFIERS)
    for where, row in report["class"].items():
        line(where, *(f"{100 * row[how][0]:.1f}" for how in row))
        if where != "pixels":
            line("  less pixels'", *("{:+.1f} [{:.1f}, {:.1f}]".format(
                *(100 * x for x in row[how][1:])) for how in row))
    text += "\n"
    line(f"on {found['images']} test images", "median", "least", "most")
    for name, values in found.items():
        if isinstance(values, list) and name not in ("spectrum", "predictions"):
            line(name, *values)
    text += "\n"
    line("refits from another start", "same z (share)", "same picture", "median rms")
    for penalty, rows in found["refits"].items():
        for start, row in rows.items():
            line(f"{start}, {penalty}", row["same z"], row["same picture"], row["rms"][0])
    text += "\n"
    line("error of dz over |dz|, median", "|dX| / |X|", "by L''", "by Gauss-Newton")
    for row in found["predictions"]:
        line(row["change"], row["size"], row["newton"][0], row["gauss_newton"][0])
    return "\n".join([text, "", *(f"{name}: {said}" for name, said in report["verdicts"].items())])


def read_flags(argv: list[str] | None) -> argparse.Namespace:
    p = settings.parser(__doc__.split("\n\n")[0], "hyperinr.py", {*USED, *USUAL}, USUAL)
    more = p.add_argument_group("hypernetwork")
    for name, kind, text in (("--latent", settings.whole(2, 4096), "l, numbers in z"),
                             ("--lambda-z", settings.number(0), "lambda_z, weight of |z|^2"),
                             ("--joint-epochs", settings.whole(1), "of H and z alone")):
        default = USUAL[name[2:].replace("-", "_")]
        more.add_argument(name, type=kind, help=f"{text} (default {default})")
    more.add_argument("--fourier", action="store_true", help="Fourier features, ReLU: no SIREN")
    return settings.method_settings(p, argv, USUAL, DIGITS)


def pictures(model: HyperINR, images: Tensor, z: Tensor, labels: Tensor) -> dict:
    """For the figure: eight images and what their z show; on the way from one z to another what is
    shown, and the weights; all z on two principal components."""
    rows = torch.linspace(0, len(z) - 1, 8).long()
    way = torch.lerp(z[rows[0]], z[rows[-1]], torch.linspace(0, 1, 8)[:, None].to(z.device))
    mean, components, _ = principal(z)
    shown = {"images": images[rows], "rebuilt": model.show(z[rows]), "path": model.show(way),
             "weights": model.tokens(way), "map": (z - mean) @ components[:, :2],
             "labels": labels}
    return {name: each.cpu().numpy() for name, each in shown.items()}


def run(argv: list[str] | None):
    args = read_flags(argv)
    device, content = settings.find_device(args.device), settings.open_method_run(args)
    images, test = load_dataset(args, device)
    if min(len(images), len(test)) < MEASURED:
        raise InputError(f"{len(images)} training and {len(test)} test images: {MEASURED} needed")
    if content and tuple(content["data"]) != facts(images):
        raise InputError(f"--dataset {args.dataset}: not the data of {args.out}, or changed since")
    model = (model_from(content, args.out, device) if content else
             HyperINR(args, images.channels, len(images.classes)).to(device))
    model.args = args
    psnrs = train_jointly(model, images, content)
    x, labels, z, bank = look(model, images)
    model.reader = train_reader(model.tokens(z), labels, args, classes=len(images.classes))
    x, test_labels, z, queries = look(model, test)
    right, n = int((model.read(model.tokens(z)).argmax(1) == test_labels).sum()), len(test)
    metrics = {"train_psnr": psnrs, "test_psnr": model.decibels(z, flat(x)), "test_images": n,
               "test_accuracy": right / n, "test_interval": wilson(right, n)}
    args.token_scale = model.reader.token_scale
    save(model, images, metrics)
    rows = stratified_sample(test_labels.cpu(), MEASURED)
    found = conditions(model, x[rows])
    report = {"command": settings.command_line(args, "hyperinr"), "flags": vars(args),
              "metrics": metrics, "theorem": found, "verdicts": theorem.verdicts(found),
              "class": read_class(bank, labels, queries, test_labels),
              **settings.environment(device)}
    path = Path(args.out).with_suffix(".json")
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    shown = pictures(model, x, z, test_labels)
    figures.hypernetwork_figure(path.with_suffix(".png"), report, shown)
    print(tables(report))


def main(argv: list[str] | None = None):
    with exits("hyperinr.py"):
        run(argv)


if __name__ == "__main__":
    main()
