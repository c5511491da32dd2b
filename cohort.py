"""A cohort of images as INRs: one encoder for all, a linear decoder each. What does the encoder
encode, and how deep should it be frozen for new images? After "What Cohort INRs Encode and Where to
Freeze Them" (arXiv 2605.08298) and STRAINER (Vyas et al., NeurIPS 2024), with controls that decide.

    python cohort.py                                       # cohort.pt, cohort.json, cohort.png
    python cohort.py --dataset cifar10 --backbone ffmlp --seeds 3
    python diagnostics.py --ckpt cohort.pt                 # its weights, read by a Transformer

Layers 0 .. L - 1 are shared. A layer is an augmented weight (out, in + 1), the bias last; one of N
images has a leading N. What is measured goes into rows: {row: [a tensor (n,) for each layer]}.
"""
import argparse
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
from checkpoint import InputError, exits, generator, save_checkpoint, seeded
from data import load_dataset
from measures import bootstrap, over_repeats
from reader import Reader
from settings import Parser, check_output, environment, find_device, flag, whole
from siren import affine, coordinate_grid
from train import facts, psnr, train_reader

OMEGA, SIGMA = 30.0, 3.0   # SIREN: factor in the sine; FFMLP: frequencies, cycles an image
RECIPE = {"siren": (500, 1e-3, 1e-3), "ffmlp": (1500, 3e-3, 3e-3)}   # steps, rate; new images' rate
DISC = 0.2                 # radius of the disc that may hold an atom's energy; images are 2 wide
PATIENCE = 50              # steps of training without firing: a dead atom


# ---- The network and the cohort ------------------------------------------------------------------

class Encoder(nn.Module):
    """SIREN: sin(omega (W x + b)). FFMLP: ReLU layers on sine and cosine of `width` random
    frequencies (Tancik et al., NeurIPS 2020). The last of `layers` is where decoders start."""

    def __init__(self, args, channels: int, seed: int, key: str = "trained"):
        super().__init__()
        self.sine, n = args.backbone == "siren", args.width
        frequencies = torch.randn(n, 2, generator=generator("frequencies", seed))
        self.register_buffer("frequencies", math.pi * SIGMA * frequencies)
        self.layers = nn.ParameterList()
        with seeded(key, seed):
            for l in range(args.layers + 1):
                size = n if l else 2 if self.sine else 2 * n
                bound = math.sqrt(6 / size) / (OMEGA if self.sine else 1) if l or not self.sine else 1 / 2
                weight = torch.zeros(n if l < args.layers else channels, size + 1)
                weight[:, :-1].uniform_(-bound, bound)
                self.layers.append(weight)

    def inputs(self, side: int) -> Tensor:
        """What layer 0 sees of a grid (side^2, in)."""
        coords = coordinate_grid(side, side).to(self.frequencies)
        phase = coords @ self.frequencies.mT
        return coords if self.sine else torch.cat([phase.sin(), phase.cos()], 1)

    def through(self, x: Tensor, layers) -> Tensor:
        """x (..., P, in) after some layers."""
        for weight in layers:
            z = affine(x, weight)
            x = torch.sin(OMEGA * z) if self.sine else z.relu()
        return x

    def predict(self, x: Tensor, own: list[Tensor]) -> Tensor:
        """Pixels of own layers, a decoder the last, on what they see, x (P, in)."""
        return affine(self.through(x, own[:-1]), own[-1])


def adam(parameters, loss, rate: float, steps: int, title=None, decay=True):
    """Takes steps of Adam down loss(); yields how many are taken."""
    optimizer = torch.optim.Adam(parameters, rate, fused=True)
    for step in tqdm(range(steps), title, leave=False, disable=None if title else True):
        if decay:
            optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        with torch.enable_grad():
            loss().backward()
        optimizer.step()
        yield step + 1


def decibels(output: Tensor, values: Tensor, dims) -> Tensor:
    return psnr((output.clamp(-1, 1) - values).square().mean(dims))


def train_cohort(encoder: Encoder, images: Tensor, args) -> tuple[Tensor, Tensor]:
    """Trains the encoder on images (N, C, size, size); returns decoders (N * C, width + 1), one
    matrix product for all, and each image's PSNR (N,)."""
    values, (steps, rate, _) = images.flatten(2).permute(2, 0, 1), RECIPE[args.backbone]
    decoders = encoder.layers[-1].detach().repeat(len(images), 1).requires_grad_()
    x, layers = encoder.inputs(args.size), [*encoder.layers[:-1], decoders]

    def output():
        return encoder.predict(x, layers).view_as(values)                      # (P, N, C)

    for _ in adam(layers, lambda: (output() - values).square().mean(), rate, args.steps or steps,
                  "cohort"):
        pass
    return decoders.detach(), decibels(output().detach(), values, (0, 2))


# ---- New images, and the depth to freeze at ------------------------------------------------------

def fit(encoder: Encoder, x: Tensor, start: list[Tensor], values: Tensor, rate: float,
        stops: list[int]) -> list[list[Tensor]]:
    """Own layers of N images, values (N, P, C), from one start, after each number of steps in stops.
    x (P, in): what the frozen layers give, computed once. The loss is a sum over images and Adam
    works entry by entry: each is fitted as if alone."""
    own, found = [w.detach().repeat(len(values), 1, 1).requires_grad_() for w in start], []

    def loss():
        return (encoder.predict(x, own) - values).square().mean((1, 2)).sum()

    for step in adam(own, loss, rate, stops[-1], decay=False):
        if step in stops:
            found.append([w.detach().clone() for w in own])
    return found


def sweep(encoder: Encoder, untrained: Encoder, images: Tensor, args, seed: int) -> dict:
    """Rows of PSNR (N,) with 0 to L layers frozen, of new images. Half of the pixels are fitted:
    there PSNR tells what can be trained, on the other half what transfers."""
    values, found = images.flatten(2).mT, {}                                   # (N, P, C)
    order = torch.randperm(values.shape[1], generator=generator("half", seed))
    seen, held = order.to(values.device).chunk(2)
    stops = [max(1, args.fit_steps // share) for share in (10, 3, 1)]
    old, new = list(encoder.layers), list(untrained.layers)
    cases = [case for l in range(len(old)) for case in (
        ("rest kept", old, l), ("rest new", old[:l] + new[l:], l), ("untrained", new, l))]
    for name, start, frozen in tqdm(cases, "freeze sweep", leave=False, disable=None):
        x = encoder.through(encoder.inputs(args.size), start[:frozen])
        fits = fit(encoder, x[seen], start[frozen:], values[:, seen], RECIPE[args.backbone][2], stops)
        for step, own in zip(stops, fits):
            output = encoder.predict(x, own)
            for where, rows in (("held-out", held), ("fitted", seen)):
                row = f"{where} PSNR (dB), {name}" + f", {step} steps" * (step < stops[-1])
                found.setdefault(row, []).append(decibels(output[:, rows], values[:, rows], (1, 2)))
    return found


def stable_rank(layer: Tensor) -> Tensor:
    """||W||_F^2 / ||W||_2^2 without the bias (Rudelson & Vershynin 2007)."""
    squares = torch.linalg.svdvals(layer[:, :-1]).square()
    return squares.sum() / squares[0]


# ---- A dictionary of the activations -------------------------------------------------------------

class Dictionary(NamedTuple):
    """S TopK sparse autoencoders (Gao et al., arXiv 2406.04093): code z = the k largest of
    (a - c) E^T where positive, reconstruction z D + c. A row of D, of length 1, is an atom."""
    encoder: Tensor        # E (S, atoms, d)
    decoder: Tensor        # D (S, atoms, d)
    centre: Tensor         # c (S, 1, d)

    def code(self, a: Tensor, k: int, among: Tensor | float = 1.0) -> Tensor:
        """a (S, P, d) -> z (S, P, atoms); among (S, 1, atoms): 0 for atoms that may not fire."""
        scores = (a - self.centre) @ self.encoder.mT * among
        values, places = scores.topk(min(k, scores.shape[2]))
        return torch.zeros_like(scores).scatter(2, places, values.relu())

    def loss(self, a: Tensor, k: int, dead: Tensor) -> Tensor:
        """Squared error, and 1/32 of what 2 k dead atoms leave of the residual."""
        rest = a - self.code(a, k) @ self.decoder - self.centre
        revived = self.code(a, 2 * k, dead) @ self.decoder if dead.any() else 0
        return (rest.square() + (rest.detach() - revived).square() / 32).mean((1, 2)).sum()


def train_dictionaries(a: Tensor, learns: Tensor, args, seed: int) -> Dictionary:
    """S dictionaries of a (S, P, d) at once. Where not learns (S, 1, 1), atoms stay random."""
    g = generator("dictionary", seed)
    atoms = F.normalize(torch.randn(len(a), args.atoms, a.shape[2], generator=g), dim=2).to(a)
    sae = Dictionary(*(p.clone().requires_grad_() for p in (atoms, atoms, a.mean(1, keepdim=True))))
    silent, block = a.new_zeros(len(a), 1, args.atoms), [a[:, :256]]
    for _ in adam(sae, lambda: sae.loss(block[0], args.topk, silent >= PATIENCE), 3e-3,
                  args.sae_steps, "dictionaries"):
        with torch.no_grad():
            sae.decoder.copy_(torch.where(learns, F.normalize(sae.decoder, dim=2), atoms))
            silent = (silent + 1) * (sae.code(block[0], args.topk) == 0).all(1, keepdim=True)
        block[0] = a[:, torch.randint(a.shape[1], (256,), generator=g).to(a.device)]
    return Dictionary(*(p.detach() for p in sae))


def spread(energy: Tensor, coords: Tensor) -> Tensor:
    """(n,) of maps (P, n): standard deviation of position over a uniform map's; 0: a point."""
    weights = (energy / energy.sum(0)).mT
    variance = (weights @ coords.square() - (weights @ coords).square()).sum(1).clamp_min(0)
    return (variance / coords.var(0, correction=0).sum()).sqrt()


def in_a_disc(energy: Tensor, coords: Tensor) -> Tensor:
    """(n,): the largest share of a map's energy (P, n) in a disc of radius DISC."""
    near = (torch.cdist(coords[::3], coords) <= DISC).to(energy)               # (P / 3, P)
    return (near @ energy).amax(0) / energy.sum(0)


def likeness(maps: Tensor, pictures: Tensor) -> Tensor:
    """(n,): the largest |correlation| of maps (P, n) with one of pictures (P, N)."""
    maps, pictures = (F.normalize(x - x.mean(0), dim=0) for x in (maps, pictures))
    return (maps.mT @ pictures).abs().amax(1)


def half_width(a: Tensor, side: int) -> float:
    """Steps of the grid at which the autocorrelation of a (side^2, d) falls to a half."""
    a = (a - a.mean(0)).mT.unflatten(1, (side, side))
    before = power = float(a.square().mean())
    for lag in range(1, side):
        now = float((a[:, lag:] * a[:, :-lag]).mean() + (a[..., lag:] * a[..., :-lag]).mean()) / 2
        if now < power / 2:
            return lag - (power / 2 - now) / (before - now)
        before = now
    return float(side)


def dictionaries(encoders: dict, pictures: dict, args, seed: int):
    """Rows of atoms' measures, (live atoms,) or (1,), on a grid of which every other point is a
    pixel; the trained encoder's codes at the pixels [(P, atoms)], and its atoms (L, atoms, d).
    encoders: trained, and controls; pictures: {"own": cohort (N, C, size, size), "other": ...}."""
    side, found, codes = 2 * args.size - 1, {}, []
    cases = {name: [each.through(each.inputs(side), each.layers[:l + 1]) for l in range(args.layers)]
             for name, each in encoders.items()}
    cases["second seed"] = cases["random atoms"] = cases["trained"]
    names = [name for name in cases for _ in range(args.layers)]
    a = torch.stack([layer - layer.mean(0) for case in cases.values() for layer in case]).detach()
    scale = a.square().mean((1, 2), keepdim=True).sqrt()
    learns = torch.tensor([name != "random atoms" for name in names]).to(a.device)
    a = a / scale                                                              # (S, P, d)
    sae = train_dictionaries(a, learns[:, None, None], args, seed)
    coords = coordinate_grid(side, side).to(a)
    pictures = {whose: F.interpolate(x.mean(1, keepdim=True), (side, side), mode="bilinear",
                                     align_corners=True).flatten(1).mT for whose, x in pictures.items()}
    for s, name in enumerate(names):
        z = Dictionary(*(p[s:s + 1] for p in sae)).code(a[s:s + 1], args.topk)[0]
        maps, missed = z[:, (z > 0).any(0)], a[s] - z @ sae.decoder[s] - sae.centre[s]
        own, other = (likeness(maps, pictures[whose]) for whose in ("own", "other"))
        for what, x in {"spread": spread(maps.square(), coords), "likeness, own images": own,
                        "likeness, other images": other, "tracing": own - other,
                        "energy in a disc": in_a_disc(maps.square(), coords),
                        "variance explained": 1 - missed.square().mean()[None],
                        "dead atoms": (z == 0).all(0).float().mean()[None],
                        "half-width (pixels)": torch.tensor([half_width(a[s], side) / 2])}.items():
            found.setdefault(f"{what}, {name}", []).append(x)
        codes.append((z * scale[s]).unflatten(0, (side, side))[::2, ::2].flatten(0, 1))
    return found, codes[:args.layers], sae.decoder[:args.layers]


# ---- Ablation ------------------------------------------------------------------------------------

def ablate(rest, a: Tensor, z: Tensor, atoms: Tensor, values: Tensor, seed: int) -> dict:
    """What it costs to project an atom's direction out of a (P, d) less its mean, everywhere: {row:
    (live atoms,)}. Control: as much taken away along a random direction. rest: a -> pixels (P, N,
    C); codes z (P, atoms)."""
    live, plain, found = (z > 0).any(0), rest(a), {}
    atoms, z = atoms[live], z[:, live]
    along = (a - a.mean(0)) @ atoms.mT                                         # (P, n)
    random = torch.randn(atoms.shape, generator=generator("direction", seed)).to(a)
    for what, directions in (("atom", atoms), ("random", F.normalize(random, dim=1))):
        for n, direction in enumerate(directions):
            output = rest(a - along[:, n:n + 1] * direction)
            change = (output - plain).square().sum((1, 2))                     # (P,)
            lost = decibels(plain, values, (0, 2)) - decibels(output, values, (0, 2))
            for row, x in (("PSNR lost (dB)", lost.mean()), ("most on one image (dB)", lost.max()),
                           ("change where it fires", change[z[:, n] > 0].sum() / change.sum())):
                found.setdefault(f"{row}, {what}", []).append(x)
    # An atom subtracted where it fires changes nothing elsewhere: the network sees each point alone.
    silent = z[:, 0] == 0
    change = (rest(a - z[:, :1] * atoms[0]) - plain)[silent].abs().sum()
    found = {row: torch.stack(x) for row, x in found.items()}
    return found | {"area where it fires": (z > 0).float().mean(0),
                    "change elsewhere if subtracted there": change[None]}


# ---- An image's own layers as tokens -------------------------------------------------------------

class Cohort(nn.Module):
    """What diagnostics.py asks of a method. A token: a neuron of an image's own layers, those above
    the frozen ones, less where all images start, the bias last."""

    def __init__(self, args, encoder: Encoder):
        super().__init__()
        self.args, self.encoder, self.reader = args, encoder, None

    @property
    def start(self) -> list[Tensor]:
        return list(self.encoder.layers[self.args.freeze + 1:])

    @torch.no_grad()
    def own(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What own layers see (P, width), and they (N, out, width + 1)."""
        args, e = self.args, self.encoder
        x = e.through(e.inputs(args.size), e.layers[:args.freeze + 1])
        blocks = images.flatten(2).mT.split(max(1, 4096 // len(x)))            # what caches hold
        fits = [fit(e, x, self.start, block, RECIPE[args.backbone][2], [args.token_steps])[0]
                for block in blocks]
        return x, [torch.cat(layer) for layer in zip(*fits)]

    def fit(self, images: Tensor) -> Tensor:
        """Images (N, C, size, size) -> tokens (N, T, width + 1)."""
        own = self.own(images)[1]
        return torch.cat([w - w0.detach() for w, w0 in zip(own, self.start)], 1)

    def reconstruct(self, images: Tensor) -> Tensor:
        return self.encoder.predict(*self.own(images)).mT.reshape(images.shape).clamp(-1, 1)

    def read(self, tokens: Tensor) -> Tensor:
        return self.reader(tokens)

    def trace(self, tokens: Tensor):
        return self.reader.trace(tokens)

    def parts(self) -> dict[str, Tensor]:
        return {"bias column": torch.eye(self.args.width + 1)[:, -1:].to(self.encoder.layers[-1])}


def from_checkpoint(content: dict, device="cpu") -> Cohort:
    """The model in what `read_checkpoint` returned."""
    args, (channels, classes, _) = argparse.Namespace(**content["args"]), content["data"]
    model = Cohort(args, Encoder(args, channels, args.seed))
    model.reader = Reader(sum(map(len, model.start)), args.width, len(classes), args.width + 1,
                          args.reader_depth, args.head_dim, args.mlp_ratio, args.token_scale)
    model.load_state_dict(content["model"])
    return model.to(device)


# ---- From measurements to sentences --------------------------------------------------------------

def interval(groups: list[Tensor], minus: list[Tensor] | None = None) -> tuple:
    """(value, low, high) of a mean over (n,) rows of each seed, or of its excess over another's;
    rows and seeds are drawn again."""
    n = min(map(len, groups + (minus or [])))
    x, y = (torch.stack([x[:n] for x in each], 1) if each else 0 for each in (groups, minus))
    return bootstrap(x - y, over_repeats())


CLAIMS = [                 # what is claimed of a layer; above which margin; [(row, less this row)]
    ("frozen up to it, new images gain over fine-tuning", 0, [("gain (dB)", None)]),
    ("... and over an untrained prefix", 0, [("gain over untrained (dB)", None)]),
    ("its atoms are more local than both controls'", 0.05, [
        ("spread, untrained", "spread, trained"), ("spread, random atoms", "spread, trained")]),
    ("its atoms trace the cohort's images", 0.02, [
        ("tracing, trained", None), ("tracing, trained", "tracing, untrained")]),
    ("an atom's direction matters", 0.1, [("PSNR lost (dB), atom", "PSNR lost (dB), random")])]


def depth_tests(held: list[Tensor], tuned: list[Tensor], ranks: list[Tensor]) -> list[tuple]:
    """Of the layer of highest stable rank (ranks (L,) of a seed): held-out PSNR (n, L) over that of
    all other depths, and over fine-tuning's (n,)."""
    peaks = [int(rank.argmax()) for rank in ranks]
    first = [torch.cat([x[:, p:p + 1], x[:, :p], x[:, p + 1:]], 1) for x, p in zip(held, peaks)]

    def lead(means):
        means = means.unflatten(-1, (len(held), -1))                           # (..., seeds, L)
        return over_repeats()(means[..., 0] - means[..., 1:].amax(-1))

    return [bootstrap(torch.cat(first, 1), lead), interval([x[:, 0] for x in first], tuned)]


def verdict(tests: list[tuple], margin: float) -> str:
    """Every control must be beaten by more than the margin; below 0 (or it) is refuted."""
    if any(high < min(0, margin) for _, _, high in tests):
        return "refuted"
    return "supported" if all(low > margin for _, low, _ in tests) else "not decided"


def conclude(seeds: list[dict]) -> list[dict]:
    """Of each seed's rows: every claim, its tests and verdicts."""
    kept = [torch.stack(rows["held-out PSNR (dB), rest kept"], 1) for rows in seeds]   # (n, L + 1)
    lead, matches = depth_tests([x[:, 1:] for x in kept], [x[:, 0] for x in kept],
                                [torch.cat(rows["stable rank, trained"]) for rows in seeds])
    found = [("the best depth is where the stable rank is highest (dB)", 0, [[lead]]),
             ("freezing there matches fine-tuning (dB)", -0.5, [[matches]])]
    for name, margin, pairs in CLAIMS:
        found.append((name, margin, [
            [interval([rows[row][l] for rows in seeds], minus and [rows[minus][l] for rows in seeds])
             for row, minus in pairs] for l in range(len(seeds[0][pairs[0][0]]))]))
    return [{"claim": name, "margin": margin, "tests": tests,
             "verdicts": [verdict(each, margin) for each in tests]} for name, margin, tests in found]


def sentences(claims: list[dict]) -> str:
    lines = []
    for each in claims:
        lines.append(f"{each['claim']} (supported above {each['margin']}):")
        for l, (tests, word) in enumerate(zip(each["tests"], each["verdicts"])):
            told = "; ".join("{:+.2f} [{:+.2f}, {:+.2f}]".format(*test) for test in tests)
            lines.append((f"  layer {l} " if len(each["tests"]) > 1 else "  ") + f"{word}: {told}")
    return "\n".join(lines)


def table(rows: dict, layers: int) -> str:
    lines = [f"{'':40}{'frozen: none':>14}" + "".join(f"{f'layer {l}':>9}" for l in range(layers))]
    for row, cells in rows.items():
        texts = [""] * (layers + 1 - len(cells)) + [f"{cell[0]:.2f}" for cell in cells]
        lines.append(f"{row:40}{texts[0]:>14}" + "".join(f"{text:>9}" for text in texts[1:]))
    return "\n".join(lines)


# ---- The program ---------------------------------------------------------------------------------

FLAGS = {                  # name: type, default, help
    "dataset": (str, "digits", "as train.py's: digits, cifar10, mnist, fashion_mnist or a folder"),
    "data_root": (str, "data", "folder of the downloaded data sets"),
    "size": (whole(4, 128), 32, "pixels a side; images of another size are resized"),
    "train_size": (whole(1), 300, "images for the reader; the others are taken from them"),
    "test_size": (whole(1), 100, "test images, for diagnostics.py"),
    "backbone": (str, "siren", "siren or ffmlp"),
    "width": (whole(1, 4096), 64, "neurons a layer; also the reader's width"),
    "layers": (whole(2, 64), 5, "L, shared layers"),
    "images": (whole(2), 16, "N, images of a cohort"),
    "steps": (whole(0), 0, "of Adam for the cohort; 0: siren 500, ffmlp 1500"),
    "new_images": (whole(2), 8, "of a seed, in the freeze sweep"),
    "fit_steps": (whole(1), 200, "of each; also looked at after a tenth and a third"),
    "atoms": (whole(2), 256, "of a dictionary"),
    "topk": (whole(1), 8, "k, atoms that fire at a point"),
    "sae_steps": (whole(1), 300, "of the dictionaries"),
    "freeze": (whole(0), None, "last frozen layer of the tokens; default: the sweep's best"),
    "token_steps": (whole(1), 20, "of an image's fit as tokens"),
    "seed": (whole(0), 0, "of the first cohort"),
    "seeds": (whole(1), 1, "cohorts; intervals are over seeds and images"),
    "device": (str, "auto", "auto: CUDA if there is one"),
    "out": (str, "cohort.pt", "checkpoint; *.json and *.png are written beside it")}
READER = dict(reader_depth=3, head_dim=32, mlp_ratio=1, epochs=15, batch_size=16, lr=3e-3,
              weight_decay=1e-4, save_minutes=5.0, workers=0)      # as train.py's flags


def read_flags(argv: list[str] | None) -> argparse.Namespace:
    p = Parser(prog="cohort.py", description=__doc__.split("\n\n")[0])
    for name, (kind, default, text) in FLAGS.items():
        p.add_argument(flag(name), type=kind, default=default, help=f"{text} ({default})")
    args = argparse.Namespace(**vars(p.parse_args(argv)), **READER, val=False)
    for wrong, words in (
            (args.backbone not in RECIPE, f"--backbone {args.backbone}: neither siren nor ffmlp"),
            (args.width % 32, f"--width {args.width}: not a multiple of 32, the heads' width"),
            ((args.freeze or 0) >= args.layers, f"--freeze {args.freeze}: there is no such layer"),
            (args.train_size < 2 * args.images + args.new_images,
             f"--train-size {args.train_size}: two cohorts and the new images are more")):
        if wrong:
            raise InputError(words)
    check_output(argparse.Namespace(**vars(args), resume=False, eval_only=False, init_from=None))
    return args


def measure(images: Tensor, args, seed: int) -> tuple[Encoder, dict]:
    """The trained encoder and all rows, of one seed."""
    order = torch.randperm(len(images), generator=generator("cohort", seed))
    mine, others, new = images[order].split([args.images, args.images, len(order) - 2 * args.images])
    encoder, other, untrained = encoders = [
        Encoder(args, images.shape[1], seed, key).to(images)
        for key in ("trained", "other cohort", "untrained")]
    decoders, reached = train_cohort(encoder, mine, args)
    train_cohort(other, others, args)
    rows = {"cohort's PSNR (dB)": [reached]}
    rows |= sweep(encoder, untrained, new[:args.new_images], args, seed)
    kept, random = (rows[f"held-out PSNR (dB), {name}"] for name in ("rest kept", "untrained"))
    rows["gain (dB)"] = [x - kept[0] for x in kept[1:]]
    rows["gain over untrained (dB)"] = [x - y for x, y in zip(kept[1:], random[1:])]
    for each, name in zip((encoder, untrained), ("trained", "untrained")):
        rows[f"stable rank, {name}"] = [stable_rank(w)[None] for w in each.layers[:-1]]
    found, codes, atoms = dictionaries(
        dict(zip(("trained", "other cohort", "untrained"), encoders)),
        {"own": mine, "other": others}, args, seed)
    rows |= found
    values = mine.flatten(2).permute(2, 0, 1)                                  # (P, N, C)
    for l in tqdm(range(args.layers), "ablation", leave=False, disable=None):
        a = encoder.through(encoder.inputs(args.size), encoder.layers[:l + 1])
        above = [*encoder.layers[l + 1:-1], decoders]
        for row, x in ablate(lambda a: encoder.predict(a, above).view_as(values), a, codes[l],
                             atoms[l], values, seed).items():
            rows.setdefault(row, []).append(x)
    return encoder, rows


def run(argv: list[str] | None):
    args = read_flags(argv)
    device = find_device(args.device)
    images, _ = load_dataset(args, device)
    pixels, labels = next(images.batches([torch.arange(len(images))], device))
    values = images.signal(pixels)
    with torch.no_grad():
        encoders, seeds = zip(*(measure(values, args, args.seed + s) for s in range(args.seeds)))
    rows = {row: [interval([x.cpu() for x in cells]) for cells in zip(*(rows[row] for rows in seeds))]
            for row in seeds[0]}
    claims = conclude(seeds)
    if args.freeze is None:
        means = [cell[0] for cell in rows["held-out PSNR (dB), rest kept"][1:]]
        args.freeze = means.index(max(means))
    report = {"flags": vars(args), **environment(device), "rows": rows, "claims": claims}
    path = Path(args.out).with_suffix(".json")
    path.write_text(json.dumps(report, indent=1) + "\n")
    figures.cohort_figure(path.with_suffix(".png"), report)
    print(table(rows, args.layers), sentences(claims), sep="\n\n", flush=True)

    model, blocks = Cohort(args, encoders[0]), tqdm(values.split(32), "fitting", leave=False, disable=None)
    tokens = torch.cat([model.fit(block) for block in blocks])
    model.reader = train_reader(tokens, labels, args)
    args.token_scale = model.reader.token_scale
    save_checkpoint(args.out, {"method": "cohort", "args": vars(args), "data": facts(images),
                               "metrics": {}, "model": model.state_dict()})


def main(argv: list[str] | None = None):
    with exits("cohort.py"):
        run(argv)


if __name__ == "__main__":
    main()
