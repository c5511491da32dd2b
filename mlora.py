"""mLoRA: an image as low-rank factors on a field that all images share. Weights that are fitted to
one image alone have no order; what gives them some, the factors, or that all fits start from one
place? (Yang, Salzmann & Suesstrunk, "Weight Space Representation Learning with Neural Fields",
arXiv 2512.01759.)

    python mlora.py                            # 8x8 digits: mlora.pt, mlora.json, mlora.png
    python diagnostics.py --ckpt mlora.pt

A base field is trained on all images and frozen. Then each image is fitted by numbers of its own, W
a hidden layer's weights in the base, A (r, in) and B (out, r):

    mlp    a whole network, no base       lora    W + B A       mlora    W * (B A), entry by entry

"-asym": some entries keep their value, the same for all images, so that neurons or components
cannot change places. All fits start from one draw ("shared") or, the control, each from its own
("separate"). The more a fit learns, the less its weights look like its neighbours': so a rate is
chosen (--choose) by both, on training images alone. The same command, given again, goes on after
the last finished kind.
"""
import argparse
import itertools
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
from checkpoint import InputError, Stop, exits, generator, model_from, save_checkpoint, seeded
from claims import table
from data import load_dataset, stratified_sample
from diffusion import copies, diffusion, frechet, gaussian
from measures import (DECAYS, PENALTIES, adjusted_rand, fit_linear, fit_mlp, fit_probe, kmeans,
                      knn_predict, neighbor_purity)
from model import psnr
from reader import Reader
from siren import coordinate_grid
from train import facts, train_reader

KINDS = ("mlp", "mlp-asym", "lora", "lora-asym", "mlora", "mlora-asym")
KEPT = "mlora"                             # the kind that diagnostics.py is given
PARTS = ("reconstruct", "classify", "connect", "generate")
BATCH, LR_BASE, LR_Z = 64, 2e-3, 3e-2      # the base: Adam, cosine decay to 0
BLOCK = 256                                # images that are fitted at once
MOST = [kind for kind in KINDS if kind != "mlp-asym"]      # what is fitted by default
RATES, TRIED = (0.003, 0.01, 0.03, 0.1), 2000          # what --choose tries, on so many images
RATE_FLAGS = ("rate_mlp", "rate_lora", "rate_mlora")
EPSILON = 0.1                              # two fits of an image: relative noise on their starts
LINKED, POINTS = 64, 11                    # images of that, and points on the line between the fits
USUAL = dict(width=32, depth=3, head_dim=16, reader_depth=3, lr=3e-3, epochs=15, latent=32,
             lambda_z=1e-5, base_epochs=80, progressive=False, fraction=0.25, rank=4, fit_steps=100,
             rate_mlp=0.01, rate_lora=0.03, rate_mlora=0.03, kinds=MOST,
             init=["shared", "separate"], start=0, choose=False, diffusion_steps=400,
             only=[*PARTS], out="mlora.pt")
DIGITS = dict(omega=4.0, latent=16, base_epochs=100, fraction=1.0, batch_size=32, lr=6e-3,
              epochs=10, head_dim=32)
USED = ("dataset data_root size train_size test_size val workers omega mlp_ratio batch_size "
        "weight_decay seed device").split()


# ---- The model -----------------------------------------------------------------------------------
#
# A network is one tensor (neurons, width + 1), a row a neuron, its bias last: the first layer's
# `width` rows, of which two weights are used, those of each hidden layer, one row a channel.

def split_layers(network: Tensor, width: int) -> list[tuple[Tensor, Tensor]]:
    """A network (..., neurons, width + 1) -> each layer's W (..., out, in), bias (..., 1, out)."""
    layers = [(rows[..., :-1], rows[..., None, :, -1]) for rows in network.split(width, -2)]
    return [(layers[0][0][..., :2], layers[0][1]), *layers[1:]]


def field(a: Tensor, layers: list[tuple[Tensor, Tensor]]) -> Tensor:
    """What the layers make of inputs a (P, in): (..., P, C)."""
    for W, bias in layers[:-1]:
        a = torch.sin(a @ W.mT + bias)
    W, bias = layers[-1]
    return a @ W.mT + bias


def set_rate(optimizer, peak: float, done: float):
    """Cosine decay from `peak` to 0 as `done` goes from 0 to 1."""
    optimizer.param_groups[0]["lr"] = peak * (1 + math.cos(math.pi * done)) / 2


class MLoRA(nn.Module):
    """A base field, images' own numbers (T, D), of any kind, and a reader of those of KEPT. mlp: a
    network. lora, mlora: depth * r tokens, a row of A and then the column of B that it meets."""

    def __init__(self, args, channels: int, classes: int):
        super().__init__()
        self.args, self.channels, self.classes = args, channels, classes
        self.register_buffer("coords", args.omega * coordinate_grid(args.size, args.size))
        self.base = nn.Parameter(self.draw_network("base", args.seed)[0], False)
        with seeded("reader", args.seed):
            self.reader = Reader(args.depth * args.rank, args.width, classes, 2 * args.width,
                                 args.reader_depth, args.head_dim, args.mlp_ratio, args.token_scale)

    def draw_network(self, *key) -> tuple[Tensor, Tensor]:
        """Initial weights of a SIREN, uniform, and their standard deviation."""
        width, depth = self.args.width, self.args.depth
        bound = torch.zeros((depth + 1) * width + self.channels, width + 1)
        bound[:width, :2], bound[:width, -1] = 1 / 2, math.pi      # all phases, or the field is odd
        bound[width:, :-1] = math.sqrt(6 / width)
        bound[width:, -1] = bound[-self.channels:] = 1 / math.sqrt(width)
        draw = 2 * torch.rand(bound.shape, generator=generator(*key)) - 1
        return bound * draw, bound / math.sqrt(3)

    def free(self, kind: str) -> Tensor:
        """Which numbers (T, D) are fitted. "-asym": of a neuron's weights, or a row of A, all but
        about sqrt(width), drawn once."""
        args, width, rows = self.args, self.args.width, slice(None)
        free = torch.ones(args.depth * args.rank, 2 * width, dtype=torch.bool)
        if kind.startswith("mlp"):
            free, rows = torch.ones(self.base.shape, dtype=torch.bool), slice(width, -self.channels)
            free[:width, 2:-1] = False     # not used
        if kind.endswith("asym"):
            order = torch.rand(len(free[rows]), width, generator=generator("mask", args.seed))
            free[rows] = free[rows].scatter(1, order.argsort(1)[:, :round(math.sqrt(width))], False)
        return free

    def start(self, kind: str, *key) -> Tensor:
        """Numbers (T, D) before a fit; without a key those that all images share."""
        rank, width, free, key = self.args.rank, self.args.width, self.free(kind), (
            "start", self.args.start, *key)
        noise, deviation = torch.randn(free.shape, generator=generator(*key)), width ** -0.5
        if kind.startswith("mlp"):
            own, deviation = self.draw_network(*key)
        elif kind.startswith("lora"):      # B A is 0
            own = torch.cat([deviation * noise[:, :width], 0 * noise[:, width:]], 1)
        else:                              # B A is 1 on average; what is frozen has no part in it
            used = free.unflatten(0, (-1, rank)).sum(1, True).clamp_min(1)     # (depth, 1, D)
            ones = rank ** 0.5 / used.expand(-1, rank, -1).flatten(0, 1)       # B: 1 / sqrt(r)
            own, deviation = ones * (1 + noise / 2), 0.0
        frozen = torch.randn(free.shape, generator=generator("frozen", self.args.seed))
        return torch.where(free, own, deviation * frozen)

    def layers(self, kind: str, own: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The layers that numbers (..., T, D) make, up to the last."""
        args = self.args
        if kind.startswith("mlp"):
            return split_layers(own, args.width)
        *hidden, head = split_layers(self.base, args.width)[1:]
        A, B = own.unflatten(-2, (args.depth, args.rank)).split(args.width, -1)
        BA = (B.mT @ A).unbind(-3)                                             # (..., w, w) each
        return [*((W * change if kind.startswith("mlora") else W + change, bias)
                  for (W, bias), change in zip(hidden, BA)), head]

    def inputs(self, kind: str) -> Tensor:
        """What these layers take (P, in): coordinates, or what the base's first layer makes."""
        if kind.startswith("mlp"):
            return self.coords
        W, bias = split_layers(self.base, self.args.width)[0]
        return torch.sin(self.coords @ W.mT + bias)

    def descend(self, kind: str, own: Tensor, images: Tensor) -> Tensor:
        """Numbers (N, T, D) for images (N, C, size, size), by Adam from `own`. Each step draws
        pixels, the same for all images: else neighbours differ by the draw."""
        args, free, inputs = self.args, self.free(kind).to(own), self.inputs(kind)
        x, own = images.flatten(2).mT, own.clone().requires_grad_()
        adam = torch.optim.Adam([own], betas=(0.9, 0.99), fused=True)
        for step in range(args.fit_steps):
            set_rate(adam, vars(args)[f"rate_{kind.split('-')[0]}"], step / args.fit_steps)
            seen = self.draw_pixels(len(inputs), generator("pixels", args.seed, step))
            with torch.enable_grad():
                error = field(inputs[seen], self.layers(kind, own)) - x[:, seen]
                own.grad, = torch.autograd.grad(error.square().mean((1, 2)).sum(), own)
            own.grad *= free
            adam.step()
        return own.detach()

    def draw_pixels(self, count: int, g) -> Tensor:
        share = max(1, int(self.args.fraction * count + 1e-9))
        return torch.randperm(count, generator=g)[:share].to(self.coords.device)

    def fit_kind(self, kind: str, init: str, images: Tensor) -> Tensor:
        """Numbers (N, T, D) of images (N, C, size, size) in [-1, 1]."""
        fits, blocks = [], images.split(BLOCK)
        for block in tqdm(blocks, kind, leave=False, disable=len(blocks) < 5 or None):
            keys = [[image.tobytes()] for image in block.cpu().numpy()]
            keys = keys if init == "separate" else [[]]
            starts = torch.stack([self.start(kind, *key) for key in keys]).to(block)
            fits.append(self.descend(kind, starts.expand(len(block), -1, -1), block))
        return torch.cat(fits)

    @torch.no_grad()
    def show(self, kind: str, own: Tensor) -> Tensor:
        """Pictures (N, C, size, size)."""
        blocks = [field(self.inputs(kind), self.layers(kind, block)) for block in own.split(BLOCK)]
        return torch.cat(blocks).mT.clamp(-1, 1).unflatten(-1, [self.args.size] * 2)

    # What diagnostics.py asks of a method.

    def fit(self, images: Tensor) -> Tensor:
        return self.fit_kind(KEPT, "shared", images) - self.start(KEPT).to(images)

    def read(self, tokens: Tensor) -> Tensor:
        return self.reader(tokens)

    def trace(self, tokens: Tensor):
        return self.reader.trace(tokens)

    def parts(self) -> dict[str, Tensor]:
        return {}                          # a token has no bias column

    def reconstruct(self, images: Tensor) -> Tensor:
        return self.show(KEPT, self.fit_kind(KEPT, "shared", images))


def from_checkpoint(content: dict, device="cpu") -> MLoRA:
    """The model in what `read_checkpoint` returned."""
    channels, classes, _ = content["data"]
    model = MLoRA(argparse.Namespace(**content["args"]), channels, len(classes))
    model.load_state_dict(content["model"])
    return model.to(device)


# ---- The base ------------------------------------------------------------------------------------

def modulated(base: Tensor, factor: Tensor) -> Tensor:
    """Networks whose hidden neurons, all inputs and bias, are multiplied by 1 + factor (..., n)."""
    width = base.shape[1] - 1
    around = width, len(base) - width - factor.shape[-1]       # the first layer's rows, the head's
    return base * (1 + F.pad(factor, around))[..., None]


def train_base(model: MLoRA, images: Tensor) -> float:
    """Trains model.base on images (N, C, size, size) as an auto-decoder: mean squared error +
    lambda_z |z|^2; then folds z = 0 into it. PSNR (dB) over the last epoch, with their z."""
    args, base, device = model.args, model.base.requires_grad_(), images.device
    with seeded("modulation", args.seed):
        modulate = nn.Sequential(nn.Linear(args.latent, 64), nn.GELU(),
                                 nn.Linear(64, args.depth * args.width)).to(device)
    latents = nn.Embedding(len(images), args.latent, sparse=True).to(device)
    nn.init.zeros_(latents.weight)
    adam = torch.optim.Adam([base, *modulate.parameters()], fused=True)
    adam_z = torch.optim.SparseAdam(latents.parameters())
    for epoch in tqdm(range(args.base_epochs), "base", leave=False, disable=None):
        g, decibels = generator("order", args.seed, epoch), []
        halvings = max(0, 2 - 4 * epoch // args.base_epochs) if args.progressive else 0
        size = max(2, args.size >> halvings)
        coords = args.omega * coordinate_grid(size, size).to(device)
        order = torch.randperm(len(images), generator=g).split(BATCH)
        for step, rows in enumerate(order):
            seen, z = model.draw_pixels(size * size, g), latents(rows.to(device))
            x = F.interpolate(images[rows], (size, size), mode="bilinear", align_corners=True)
            layers = split_layers(modulated(base, modulate(z)), args.width)
            error = (field(coords[seen], layers) - x.flatten(2).mT[:, seen]).square().mean((1, 2))
            (error + args.lambda_z * z.square().sum(1)).mean().backward()
            for optimizer, peak in ((adam, LR_BASE), (adam_z, LR_Z)):
                set_rate(optimizer, peak, (epoch + step / len(order)) / args.base_epochs)
                optimizer.step()
                optimizer.zero_grad()
            decibels.append(psnr(error.detach()))
    with torch.no_grad():
        base.requires_grad_(False).copy_(modulated(base, modulate(torch.zeros_like(z[0]))))
    return float(torch.cat(decibels).mean())


# ---- The learning rates of fits -----------------------------------------------------------------

def choose_rates(model: MLoRA, images: Tensor, labels: Tensor) -> dict:
    """Sets the rate of each way to change weights, by training images; all that was tried."""
    rows, tried = stratified_sample(labels, min(TRIED, len(labels))), {}
    images, labels = images[rows], labels[rows]
    for flag in RATE_FLAGS:
        kind, of_rate = flag.removeprefix("rate_"), {}
        for rate in RATES:
            setattr(model.args, flag, rate)
            own = model.fit_kind(kind, "shared", images)
            error = (model.show(kind, own) - images).square().mean((1, 2, 3))
            of_rate[rate] = {"PSNR": float(psnr(error).mean()),
                             "1-NN": neighbor_purity(own.flatten(1), labels, 1)}
        setattr(model.args, flag, best_rate(of_rate))
        tried |= {f"{kind}, {rate}": row for rate, row in of_rate.items()}
    return tried


def best_rate(rows: dict) -> float:
    """Of {rate: figures}: of those whose 1-NN, of an image among the others, is within two points
    of the best, the one of the highest PSNR."""
    least = max(row["1-NN"] for row in rows.values()) - 0.02
    return max((rate for rate in rows if rows[rate]["1-NN"] >= least),
               key=lambda rate: rows[rate]["PSNR"])


# ---- Classes and clusters ------------------------------------------------------------------------

def classify(bank: Tensor, bank_labels: Tensor, x: Tensor, labels: Tensor, seed: int) -> dict:
    """Accuracies on x (q, ...); on the bank (n, ...) how k-means, five times, finds the classes."""
    bank, x = bank.flatten(1), x.flatten(1)
    data = bank, bank_labels, x
    guesses = {"1-NN": knn_predict(*data, 1), "10-NN": knn_predict(*data),
               "linear": fit_probe(fit_linear, PENALTIES, *data)[0],
               "MLP": fit_probe(fit_mlp, DECAYS, *data)[0]}
    ari = [adjusted_rand(kmeans(bank, int(bank_labels.max()) + 1, generator("k-means", seed, i)),
                         bank_labels) for i in range(5)]
    return {how: float((guess == labels).double().mean()) for how, guess in guesses.items()} | {
        "ARI": sum(ari) / 5, "least": min(ari), "most": max(ari)}


# ---- Linear mode connectivity --------------------------------------------------------------------

def align(a: Tensor, b: Tensor, rank: int) -> Tensor:
    """b (N, depth * r, D) with each layer's components in the order that is nearest to a; what they
    make is the same."""
    a, b = (each.unflatten(1, (-1, rank)) for each in (a, b))                  # (N, depth, r, D)
    orders = torch.tensor([*itertools.permutations(range(rank))], device=a.device)     # (r!, r)
    match = (a @ b.mT)[..., torch.arange(rank), orders].sum(-1)                # (N, depth, r!)
    order = orders[match.argmax(-1)]                                           # (N, depth, r)
    return b.gather(2, order[..., None].expand_as(b)).flatten(1, 2)


def path_errors(model: MLoRA, kind: str, a: Tensor, b: Tensor, images: Tensor) -> Tensor:
    """Mean squared error (POINTS, N) of the pictures on the way from a to b (N, T, D)."""
    return torch.stack([(model.show(kind, torch.lerp(a, b, t)) - images).square().mean((1, 2, 3))
                        for t in torch.linspace(0, 1, POINTS).to(a)])


def barrier(errors: Tensor) -> float:
    """How far errors (POINTS, N) rise above the line between their ends, the mean over images
    (Frankle et al., ICML 2020)."""
    t = torch.linspace(0, 1, len(errors)).to(errors)[:, None]
    return float((errors - torch.lerp(errors[0], errors[-1], t)).amax(0).mean())


def connect(model: MLoRA, kind: str, images: Tensor) -> dict:
    """Of two fits of each image, from starts EPSILON apart."""
    g, free, start = generator("apart", model.args.start), model.free(kind), model.start(kind)
    starts = [start * (1 + EPSILON * free * torch.randn(free.shape, generator=g)) for _ in "ab"]
    starts = [each.expand(len(images), -1, -1).to(images) for each in starts]
    fits = a, b = [model.descend(kind, each, images) for each in starts]
    errors = path_errors(model, kind, a, b, images)
    found = {"barrier": barrier(errors), "path": errors.mean(1).tolist()}
    if not kind.startswith("mlp"):
        b = align(a, b, model.args.rank)
        found["barrier, aligned"] = barrier(path_errors(model, kind, a, b, images))
    return found | {f"cosine of {what}": float(F.cosine_similarity(*pair, dim=-1).mean())
                    for what, pair in (("starts", starts), ("fits", fits))}


# ---- Generation ----------------------------------------------------------------------------------

def generate(model: MLoRA, kind: str, bank: Tensor, test: Tensor, data: list[Tensor]):
    """{sampler: figures}, {sampler: pictures} of as many samples like a bank (n, T, D) as there are
    test images. Fréchet distances are from training images, in a classifier's hidden units; floor:
    the test images'."""
    (images, labels, test_images, _), args = data, model.args
    features = fit_mlp(images.flatten(1), labels, int(labels.max()) + 1, DECAYS[1])[:-1]
    real, also_real = (features(each.flatten(1)) for each in (images, test_images))
    deviation, mean = torch.std_mean(bank, 0)
    x, y = ((each - mean) / deviation.clamp_min(1e-6) for each in (bank, test))
    samples = {"Gaussian": gaussian(x, len(y), generator("gaussian", args.seed))}
    if not kind.startswith("mlp"):
        samples["DDPM"] = diffusion(x, len(y), args.depth, args.diffusion_steps, args.seed)
    shown = {name: model.show(kind, each * deviation + mean) for name, each in samples.items()}
    return {name: {"Frechet": frechet(features(shown[name].flatten(1)), real),
                   "floor": frechet(also_real, real), **copies(sample, x, y)}
            for name, sample in samples.items()}, shown


# ---- The program ---------------------------------------------------------------------------------

def examine(model: MLoRA, kind: str, init: str, data: list[Tensor], found: dict):
    """Puts the figures of one kind of weights into found: {part: {name: {what: figure}}}."""
    args, name = model.args, kind + ", separate" * (init == "separate")
    images, labels, test_images, test_labels = data
    bank, test = (model.fit_kind(kind, init, each) for each in (images, test_images))
    if not (bank.isfinite().all() and test.isfinite().all()):
        raise Stop(1, f"the fits of {name} are not finite; a lower --rate-… is needed")
    pictures, start = model.show(kind, test), model.start(kind).to(bank)
    decibels = psnr((pictures - test_images).square().mean((1, 2, 3)))
    row = found["classify"][name] = {"numbers": int(model.free(kind).sum()),
                                     "PSNR": float(decibels.mean())}
    found["pictures"][name] = pictures[:8].clone()             # a view would be saved whole
    if name == KEPT or "classify" in args.only:
        reader = train_reader(bank - start, labels, args, classes=model.classes)
        row["reader"] = float((reader(test - start).argmax(1) == test_labels).double().mean())
    if name == KEPT:
        model.reader, args.token_scale = reader, reader.token_scale
    if "classify" in args.only:
        row |= classify(bank, labels, test, test_labels, args.seed)
    if "connect" in args.only and init == "shared":
        found["connect"][name] = connect(model, kind, test_images[:LINKED])
    if "generate" in args.only and init == "shared":
        samplers, shown = generate(model, kind, bank, test, data)
        found["generate"] |= {f"{name}, {sampler}": row for sampler, row in samplers.items()}
        found["pictures"] |= {f"{name}, {sampler}": x[:8].clone() for sampler, x in shown.items()}
    found["done"].append([kind, init])


def as_text(title: str, rows: dict) -> str:
    """{name: {what: figure}} as a table."""
    keys = [key for key in max(rows.values(), key=len) if key != "path"]
    return table([title, *keys], [[name, *(f"{row[key]:.4g}" if key in row else "" for key in keys)]
                                  for name, row in rows.items()]) + "\n"


def read_flags(argv: list[str] | None) -> argparse.Namespace:
    p = settings.parser(__doc__.split("\n\n")[0], "mlora.py", {*USED, *USUAL}, USUAL)
    more = p.add_argument_group("low-rank weights")
    count, positive = settings.whole(1), settings.number(0, above=True)
    for name, kind, text in (
            ("latent", count, "numbers in z"), ("lambda-z", settings.number(0), "weight of |z|^2"),
            ("base-epochs", count, "of the base"), ("rank", settings.whole(1, 6), "r"),
            ("fit-steps", count, "of Adam"), ("rate-mlp", positive, "learning rate of a fit"),
            ("rate-lora", positive, "... of lora"), ("rate-mlora", positive, "... of mlora"),
            ("start", settings.whole(0), "seed of starts"), ("diffusion-steps", count, "training")):
        more.add_argument(f"--{name}", type=kind, help=text)
    for name, choices in (("kinds", KINDS), ("init", ("shared", "separate")), ("only", PARTS)):
        more.add_argument(f"--{name}", nargs="+", choices=choices, help="these alone")
    more.add_argument("--choose", action="store_true", help="the learning rates of fits")
    more.add_argument("--progressive", action="store_true", help="the base sees small images first")
    return settings.method_settings(p, argv, USUAL, DIGITS)


def run(argv: list[str] | None):
    args = read_flags(argv)
    found_out = {"token_scale", *(RATE_FLAGS if args.choose else ())}
    device, content = settings.find_device(args.device), settings.open_method_run(args, found_out)
    if args.init == ["separate"] and not {"reconstruct", "classify"} & set(args.only):
        raise InputError(f"--only {' '.join(args.only)}: of fits from one start, --init shared")
    images, test = load_dataset(args, device)
    if min(len(images), len(test)) < 24:
        raise InputError(f"{len(images)} training and {len(test)} test images: 24 needed")
    if content and tuple(content["data"]) != facts(images):
        raise InputError(f"--dataset {args.dataset}: not the data of {args.out}, or changed since")
    data = [x for each in (images, test) for pixels, labels in each.batches(
        [torch.arange(len(each))], device, args.workers) for x in (each.signal(pixels), labels)]
    if content:
        model, found = model_from(content, args.out, device), content["metrics"]
        model.args = args
    else:
        model = MLoRA(args, images.channels, len(images.classes)).to(device)
        found = {"base_psnr": train_base(model, data[0]), "rates": {}, "done": [], "classify": {},
                 "connect": {}, "generate": {}, "pictures": {"image": data[2][:8].clone()}}
        if args.choose:
            found["rates"] = choose_rates(model, *data[:2])
    if "classify" in args.only:
        found["classify"]["pixels"] = {"numbers": data[0][0].numel()} | classify(*data, args.seed)

    def save(**unfinished):
        save_checkpoint(args.out, unfinished | {
            "method": "mlora", "args": vars(args), "data": facts(images),
            "model": model.state_dict(), "metrics": found})

    asked = [(kind, init) for kind, init in itertools.product(args.kinds, args.init)
             if init == "shared" or "-" not in kind or args.init == ["separate"]]
    for kind, init in dict.fromkeys([(KEPT, "shared"), *asked]):
        if [kind, init] not in found["done"]:
            save(progress={})
            examine(model, kind, init, data, found)
    save()
    report = {"command": settings.command_line(args, "mlora"), "flags": vars(args),
              **{key: value for key, value in found.items() if key != "pictures"},
              **settings.environment(device)}
    path = Path(args.out).with_suffix(".json")
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    pictures = {name: x.cpu().numpy() for name, x in found["pictures"].items()}
    figures.mlora_figure(path.with_suffix(".png"), report, pictures)
    print(f"base: {found['base_psnr']:.2f} dB on training images; accuracies are shares\n",
          *(as_text(part, found[part]) for part in ("rates", *PARTS) if found.get(part)), sep="\n")


def main(argv: list[str] | None = None):
    with exits("mlora.py"):
        run(argv)


if __name__ == "__main__":
    main()
