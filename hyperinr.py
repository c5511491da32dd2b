"""HyperINR: each image has a latent z, from which a hypernetwork H makes all weights of its SIREN.
Training sees pixels alone. Is the class in z all the same, and do the conditions of the theorem
hold that is said to put it there? (Qiu, Sonis & Shen, "Ensuring Semantics in Weights of Implicit
Neural Representations through the Implicit Function Theorem", arXiv 2601.23181.)

    python hyperinr.py                         # 8x8 digits: hyperinr.pt, hyperinr.json, .png
    python diagnostics.py --ckpt hyperinr.pt

H and the z of the training images are trained together. Then H is frozen, and every image is fitted
by its z alone, from 0. With f the field of the weights H(z), D the numbers in an image X, ' = d/dz:

    z*(X) = argmin L(z, X),    L = |f(H(z)) - X|^2 / D + lambda_z |z|^2

Where L' = 0 and L'' is invertible, z* is smooth near X: dz = -L''^-1 (dL'/dX) dX.
The same command, given again, goes on from the last finished epoch.
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
from torch.func import grad, hessian, jacfwd, jvp, vmap
from tqdm import tqdm

import figures
import settings
from checkpoint import (InputError, exits, generator, model_from, read_checkpoint, save_checkpoint,
                        seeded)
from data import load_dataset
from measures import (DECAYS, PENALTIES, fit_linear, fit_mlp, fit_probe, knn_predict,
                      nearest_mean_predict, paired_bootstrap, principal, wilson)
from model import psnr
from reader import Reader
from siren import affine, coordinate_grid
from train import facts, train_reader

HIDDEN = 256                               # units in each of H's two hidden layers
BATCH, LR_H, LR_Z = 64, 5e-4, 3e-2         # joint training: Adam, cosine decay to 0
FIT_STEPS, LR_FIT, BLOCK = 150, 0.1, 256   # a new image's z, by Adam; images at once
MEASURED = 24                              # test images that the theorem is measured on
USUAL = dict(width=32, depth=1, head_dim=32, reader_depth=3, lr=3e-3, epochs=15, latent=128,
             lambda_z=1e-4, joint_epochs=150, fraction=0.25, fourier=False, out="hyperinr.pt")
DIGITS = dict(latent=32, lambda_z=1e-3, fraction=1.0)
USED = ("dataset data_root size train_size test_size val workers omega mlp_ratio batch_size "
        "weight_decay seed device").split()


# ---- The model -----------------------------------------------------------------------------------

class HyperINR(nn.Module):
    """H, the field whose weights it makes, and a reader of these weights."""

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
            nn.init.uniform_(self.H[-1].weight, -0.01, 0.01)   # all images start near H(0)
            self.H[-1].bias.data = torch.cat([layer.flatten() for layer in start])
        with seeded("reader", args.seed):
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

    def descend(self, z: Tensor, x: Tensor, lambda_z: float) -> Tensor:
        """z (N, l) after FIT_STEPS of Adam down L, for pixels x (N, D)."""
        z = z.clone().requires_grad_()
        adam = torch.optim.Adam([z], betas=(0.9, 0.99))
        for step in range(FIT_STEPS):
            set_rate(adam, LR_FIT, step / FIT_STEPS)
            with torch.enable_grad():
                loss = (self.render(z) - x).square().mean(-1) + lambda_z * z.square().sum(-1)
                z.grad, = torch.autograd.grad(loss.sum(), z)
            adam.step()
        return z.detach()

    def latents(self, images: Tensor) -> Tensor:
        """z (N, l) of images (N, C, size, size) in [-1, 1], fitted from 0; each image once."""
        keys = [image.tobytes() for image in images.cpu().numpy()]
        new = torch.tensor([i for i, key in enumerate(keys) if key not in self.fitted]).long()
        bar = tqdm(new.split(BLOCK), "fitting", leave=False, disable=len(new) <= BLOCK or None)
        for rows in bar:
            x = flat(images[rows])
            z = self.descend(x.new_zeros(len(x), self.args.latent), x, self.args.lambda_z)
            self.fitted |= {keys[i]: each for i, each in zip(rows.tolist(), z)}
            bar.set_postfix_str(f"PSNR {self.decibels(z, x):.2f} dB")
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
    count = max(1, int(args.fraction * len(model.inputs) + 1e-9))
    bar = tqdm(range(len(psnrs), args.joint_epochs), "training", leave=False, disable=None)
    for epoch in bar:
        g, total = generator("order", args.seed, epoch), 0.0
        order = torch.randperm(len(images), generator=g).split(BATCH)
        batches = images.batches(order, device, args.workers)
        for step, (rows, (batch, _)) in enumerate(zip(order, batches)):
            done = (epoch + step / len(order)) / args.joint_epochs
            pixels = torch.randperm(len(model.inputs), generator=g)[:count].to(device)
            x, z = images.signal(batch).flatten(2).mT[:, pixels], latents(rows.to(device))
            error = (model.field(model.weights(z), model.inputs[pixels]) - x).square().mean((1, 2))
            (error + args.lambda_z * z.square().sum(1)).mean().backward()
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


# ---- The theorem, measured -----------------------------------------------------------------------
#
# On n test images x (n, D), in float64. render: one z (l,) -> its pixels (D,).

ZERO = 1e-8                # a gradient below is 0; so is an eigenvalue, over the largest
SAME, ALIKE = 1e-3, 0.02   # same z: over the distance between images; same picture: rms of pixels
SHARE = 0.95               # of refits must end at the same z
SIZES = (1e-4, 1e-3, 1e-2, 1e-1)           # |dX| / |X|
SIZE, ERROR = 1e-3, 0.01   # at this size dz must be predicted up to this share of it


def objective(render, lambda_z: float):
    """The function L of one latent z (l,) and one image x (D,)."""
    return lambda z, x: (render(z) - x).square().mean() + lambda_z * z.square().sum()


def by_image(f, z: Tensor, x: Tensor) -> Tensor:
    """f(z_i, x_i) of each image i; as many at once as l tangents of them find room."""
    return vmap(f, chunk_size=max(1, 2 ** 17 // (z.shape[1] * x.shape[1])))(z, x)


def newton(loss, z: Tensor, x: Tensor, steps=15) -> Tensor:
    """z where L' = 0, by damped Newton: along each eigenvector of L'' down by slope / |eigenvalue|;
    of this the whole, or the half, quarter, ... that first does not raise L."""
    z, value = z.clone(), vmap(loss)
    for _ in range(steps):
        slope = vmap(grad(loss))(z, x)
        going = slope.norm(dim=1) > ZERO / 1000
        if not going.any():
            break
        at, to, slope = z[going], x[going], slope[going, None]
        values, basis = torch.linalg.eigh(by_image(hessian(loss), at, to))
        values = values.abs().clamp_min(ZERO * values.abs().max())[:, None]
        move = -(slope @ basis / values @ basis.mT)[:, 0]
        limit = value(at, to) * (1 + 1e-13)                    # rounding is no rise
        for _ in range(20):
            if not (rises := value(at + move, to) > limit).any():
                break
            move[rises] /= 2
        z[going] = at + move
    return z


def spread(x: Tensor) -> list[float]:
    """[median, least, most]"""
    return [float(each) for each in (x.median(), x.min(), x.max())]


def curvature(loss, lambda_z: float, z: Tensor, x: Tensor) -> dict:
    """L', and the eigenvalues of L'' with and without the 2 lambda_z that the penalty adds."""
    values = torch.linalg.eigvalsh(by_image(hessian(loss), z, x))              # (n, l), ascending
    return {"|L'|": spread(vmap(grad(loss))(z, x).norm(dim=1)),
            "smallest eigenvalue of L''": spread(values[:, 0]),
            "... without the penalty's share": spread(values[:, 0] - 2 * lambda_z),
            "largest eigenvalue of L''": spread(values[:, -1]),
            "condition number of L''": spread(values[:, -1] / values[:, 0].abs().clamp_min(1e-300))}


def identifiability(J: Tensor) -> dict:
    """Of the eigenvalues s of J^T J, J = d pixels / dz (n, D, l). Participation ratio: (sum s)^2 /
    sum s^2, how many directions of z move the picture."""
    s = torch.linalg.eigvalsh(J.mT @ J).clamp_min(1e-300).flip(1)              # (n, l), falling
    return {"rank of J^T J": spread((s > ZERO * s[:, :1]).sum(1).double()),
            "condition number of J^T J": spread(s[:, 0] / s[:, -1]),
            "participation ratio of J^T J": spread(s.sum(1).square() / s.square().sum(1)),
            "spectrum": s.median(0).values.tolist()}


def uniqueness(render, z: Tensor, ends: dict) -> dict:
    """Did fits from elsewhere end at z (n, l), or show the same picture? ends: {start: (n, l)}."""
    found = {}
    for start, end in ends.items():
        distance = (end - z).norm(dim=1) / torch.pdist(z).median()
        rms = (render(end) - render(z)).square().mean(1).sqrt()
        found[start] = {"same z": float((distance < SAME).double().mean()),
                        "same picture": float((rms < ALIKE).double().mean()),
                        "rms": spread(rms), "distances": distance.tolist()}
    return found


def predict(loss, second: Tensor, z: Tensor, x: Tensor, dx: Tensor) -> Tensor:
    """dz = -second^-1 (dL'/dX) dX (n, l)."""
    def mixed(z, x, dx):
        return jvp(lambda x: grad(loss)(z, x), (x,), (dx,))[1]
    inverse = torch.linalg.pinv(second, hermitian=True)        # there are flat directions without
    return -(inverse @ vmap(mixed)(z, x, dx)[..., None])[..., 0]                   # a penalty


def prediction(loss, lambda_z: float, J: Tensor, z: Tensor, x: Tensor, changes: dict) -> list[dict]:
    """|predicted dz - dz of a refit| / |dz| as images change, by L'' and by Gauss-Newton, which
    leaves out how f(H(z)) curves. changes: {what: direction (n, D)}."""
    rows, eye = [], torch.eye(z.shape[1]).to(z)
    ways = {"newton": by_image(hessian(loss), z, x),
            "gauss_newton": 2 / x.shape[1] * J.mT @ J + 2 * lambda_z * eye}
    for what, direction in changes.items():
        for size in SIZES:
            dx = size * direction * (x.norm(dim=1) / direction.norm(dim=1))[:, None]
            dz = newton(loss, z, x + dx) - z
            errors = {way: (predict(loss, second, z, x, dx) - dz).norm(dim=1) / dz.norm(dim=1)
                      for way, second in ways.items()}
            rows.append({"change": what, "size": size, **{w: spread(e) for w, e in errors.items()}})
    return rows


def measure(model: HyperINR, images: Tensor) -> dict:
    """All of it, on images (n, C, size, size)."""
    z, model = model.latents(images).double(), copy.deepcopy(model).double()
    model.requires_grad_(False)            # or the graph of H fills the memory
    lambda_z, render, images = model.args.lambda_z, model.render, images.double()
    x, refits, g = flat(images), {}, generator("theorem", model.args.seed)
    noise, noise_z = (torch.randn(each.shape, generator=g).to(each) for each in (x, z))
    starts = {"0": 0 * z, "random": noise_z * z.std(), "another's": z.roll(1, 0)}
    for name, penalty in (("no penalty", 0.0), ("penalty", lambda_z)):
        loss, many = objective(render, penalty), x.repeat(len(starts), 1)
        ends = newton(loss, model.descend(torch.cat([*starts.values()]), many, penalty), many)
        ends = dict(zip(starts, ends.split(len(x))))
        z = ends.pop("0")
        refits[name] = uniqueness(render, z, ends)
    J = torch.cat([vmap(jacfwd(render))(block) for block in z.split(4)])
    changes = {"noise": noise, "shift": flat(images.roll(1, 3)) - x}
    return {"images": len(x), "latent": z.shape[1], "lambda_z": lambda_z, "refits": refits,
            **curvature(loss, lambda_z, z, x), **identifiability(J),
            "predictions": prediction(loss, lambda_z, J, z, x, changes)}


def verdicts(found: dict) -> dict[str, str]:
    """{condition: does it hold, on all images?} of what `measure` returned."""
    def outcome(holds: bool, without_penalty: bool = True) -> str:
        if not holds:
            return "does not hold"
        return "holds" if without_penalty else "holds only by the penalty"

    floor = ZERO * found["largest eigenvalue of L''"][2]
    definite, alone = (found[name][1] > floor for name in (
        "smallest eigenvalue of L''", "... without the penalty's share"))
    full = found["rank of J^T J"][1] == found["latent"]
    said = {"L' = 0": outcome(found["|L'|"][2] <= ZERO),
            "L'' is positive definite": outcome(definite, alone),
            "every direction of z is seen": outcome(full or found["lambda_z"] > 0, full)}
    for start in found["refits"]["penalty"]:
        same, alone = (found["refits"][name][start]["same z"] >= SHARE
                       for name in ("penalty", "no penalty"))
        said[f"the same z from {start} start"] = outcome(same, alone)
    errors = [row["newton"][0] for row in found["predictions"] if row["size"] == SIZE]
    said[f"dz is predicted, |dX| = {SIZE:g} |X|"] = outcome(max(errors) <= ERROR)
    return said


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
        if isinstance(values, list) and len(values) == 3:
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
    p = settings.parser(__doc__.split("\n\n")[0])
    p.prog, more = "hyperinr.py", p.add_argument_group("hypernetwork")
    for name, kind, text in (("--latent", settings.whole(1, 4096), "l, numbers in z"),
                             ("--lambda-z", settings.number(0), "lambda_z, weight of |z|^2"),
                             ("--joint-epochs", settings.whole(1), "of H and z")):
        more.add_argument(name, type=kind, help=text)
    more.add_argument("--fourier", action="store_true", help="Fourier features, ReLU: no SIREN")
    given = vars(p.parse_args(argv))
    for name in given.keys() - {*USED, *USUAL}:
        raise InputError(f"--{name.replace('_', '-')}: means nothing to a hypernetwork")
    usual = USUAL | (DIGITS if given.get("dataset", "digits") == "digits" else {})
    args = settings.settings(usual | given)
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
    return content


def pictures(model: HyperINR, images: Tensor, z: Tensor, labels: Tensor) -> dict:
    """For the figure: images and what their z show; on the way from one z to another what is shown,
    and the weights; z on two principal components."""
    way = torch.lerp(z[0], z[-1], torch.linspace(0, 1, 8)[:, None].to(z.device))
    mean, components, _ = principal(z)
    shown = {"images": images[:8], "rebuilt": model.show(z[:8]), "path": model.show(way),
             "weights": model.tokens(way), "map": (z - mean) @ components[:, :2],
             "labels": labels}
    return {name: each.cpu().numpy() for name, each in shown.items()}


def run(argv: list[str] | None):
    args = read_flags(argv)
    device, content = settings.find_device(args.device), open_run(args)
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
    model.reader = train_reader(model.tokens(z), labels, args)
    x, test_labels, z, queries = look(model, test)
    right, n = int((model.read(model.tokens(z)).argmax(1) == test_labels).sum()), len(test)
    metrics = {"train_psnr": psnrs, "test_psnr": model.decibels(z, flat(x)), "test_images": n,
               "test_accuracy": right / n, "test_interval": wilson(right, n)}
    args.token_scale = model.reader.token_scale
    save(model, images, metrics)
    theorem = measure(model, x[:MEASURED])
    report = {"command": settings.command_line(args, "hyperinr"), "flags": vars(args),
              "metrics": metrics, "theorem": theorem, "verdicts": verdicts(theorem),
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
