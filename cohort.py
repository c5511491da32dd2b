"""A cohort of images as INRs: one encoder for all, a linear decoder each. What does the encoder
encode, and how deep should it be frozen for new images? After "What Cohort INRs Encode and Where to
Freeze Them" (arXiv 2605.08298) and STRAINER (Vyas et al., NeurIPS 2024), with controls.

    python cohort.py                                       # cohort.pt, cohort.json, cohort.png
    python cohort.py --dataset cifar10 --backbone ffmlp --seeds 3
    python diagnostics.py --ckpt cohort.pt                 # its weights, read by a Transformer

Layers 0 .. L - 1 are shared. A layer is an augmented weight (out, in + 1), the bias last; that of
N images has a leading N. Measurements are rows: {row: [a tensor (n,) for each layer]}.
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
from model import psnr
from reader import Reader
from settings import Parser, check_output, environment, find_device, flag, number, whole
from siren import affine, coordinate_grid
from train import facts, train_reader

OMEGA, SIGMA = 30.0, 3.0   # SIREN: factor in the sine; FFMLP: frequencies, cycles an image
RECIPE = {"siren": (500, 1e-3, 1e-3), "ffmlp": (1500, 3e-3, 3e-3)}   # steps, rate; new images' rate
NEW = 8                    # new images in the freeze sweep
ATOMS, TOPK, SAE_STEPS = 256, 8, 300
PATIENCE = 50              # steps of training without firing: a dead atom
DISC = 0.2                 # radius of the disc that may hold an atom's energy; images are 2 wide


# ---- The network and the cohort ----

class Encoder(nn.Module):
    """SIREN: sin(omega (W x + b)). FFMLP: ReLU layers on sine and cosine of `width` random
    frequencies (Tancik et al., NeurIPS 2020). The last of `layers` is where decoders start."""

    def __init__(self, args, channels, seed, key="trained"):
        super().__init__()
        self.sine, n = args.backbone == "siren", args.width
        frequencies = torch.randn(n, 2, generator=generator("frequencies", seed))
        self.register_buffer("frequencies", math.pi * SIGMA * frequencies)
        sizes = [2 if self.sine else 2 * n, *[n] * args.layers, channels]
        self.layers = nn.ParameterList(torch.zeros(o, i + 1) for i, o in zip(sizes, sizes[1:]))
        with seeded(key, seed):
            for weight, size in zip(self.layers, sizes):
                bound = math.sqrt(6 / size) / (OMEGA if self.sine else 1)
                if self.sine and weight is self.layers[0]:
                    bound = 1 / 2
                elif not self.sine and weight is self.layers[-1]:
                    bound = 1 / math.sqrt(size)                # as nn.Linear: no ReLU follows
                nn.init.uniform_(weight[:, :-1], -bound, bound)

    def inputs(self, side):
        """What layer 0 sees of a grid (side^2, in)."""
        coords = coordinate_grid(side, side).to(self.frequencies)
        phase = coords @ self.frequencies.mT
        return coords if self.sine else torch.cat([phase.sin(), phase.cos()], 1)

    def through(self, x, layers):
        """x (..., P, in) after some layers."""
        for weight in layers:
            z = affine(x, weight)
            x = torch.sin(OMEGA * z) if self.sine else z.relu()
        return x

    def predict(self, x, own):
        """Pixels by own layers, the last a decoder, of what they see, x (..., P, in)."""
        return affine(self.through(x, own[:-1]), own[-1])


def adam(parameters, loss, rate, steps, title=None, decay=True):
    """Steps of Adam down loss(), its rate by cosine decay; yields how many are taken."""
    optimizer = torch.optim.Adam(parameters, rate, fused=True)
    for step in tqdm(range(steps), title, leave=False, disable=None if title else True):
        if decay:
            optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        with torch.enable_grad():
            loss().backward()
        optimizer.step()
        yield step + 1


def decibels(output, values, dims):
    return psnr((output.clamp(-1, 1) - values).square().mean(dims))


def train_cohort(encoder, values, args):
    """Trains the encoder on values (P, N, C); returns decoders (N * C, width + 1), one matrix
    product for all, and each image's PSNR (N,)."""
    steps, rate, _ = RECIPE[args.backbone]
    start, g = encoder.layers[-1].detach(), generator("decoders", args.seed)
    noise = torch.randn(values[0].numel(), args.width, generator=g).to(start)
    decoders = F.pad(start.std() * noise, (0, 1)).requires_grad_()             # each its own start
    x, layers = encoder.inputs(args.size), [*encoder.layers[:-1], decoders]

    def output():
        return encoder.predict(x, layers).view_as(values)

    list(adam(layers, lambda: (output() - values).square().mean(), rate, steps, "cohort"))
    return decoders.detach(), decibels(output().detach(), values, (0, 2))


# ---- New images, and the depth to freeze at ----

def fit(encoder, x, start, values, rate, stops):
    """N images' own layers, from one start, after each number of steps in stops; values (N, P, C).
    x (P, in): what the frozen layers give, computed once. The loss is a sum over images and Adam
    works entry by entry: each is fitted as if alone."""
    own = [w.detach().repeat(len(values), 1, 1).requires_grad_() for w in start]

    def loss():
        return (encoder.predict(x, own) - values).square().mean((1, 2)).sum()

    steps = adam(own, loss, rate, stops[-1], decay=False)
    return [[w.detach().clone() for w in own] for step in steps if step in stops]


def sweep(encoder, untrained, values, args, seed):
    """Rows of PSNR (N,) of new images (N, P, C) with 0 to L layers frozen. Half of the pixels are
    fitted: there PSNR tells what can be trained, on the other half what transfers."""
    order = torch.randperm(values.shape[1], generator=generator("half", seed)).to(values.device)
    halves = dict(zip(("fitted", "held-out"), order.chunk(2)))
    old, new, rows, seen = list(encoder.layers), list(untrained.layers), {}, halves["fitted"]
    stops = [max(1, args.fit_steps // share) for share in (10, 3, 1)]
    for frozen in tqdm(range(len(old)), "freeze sweep", leave=False, disable=None):
        for name, start in (("rest kept", old), ("rest new", old[:frozen] + new[frozen:]),
                            ("untrained", new)):
            x = encoder.through(encoder.inputs(args.size), start[:frozen])
            fits = fit(encoder, x[seen], start[frozen:], values[:, seen],
                       RECIPE[args.backbone][2], stops)
            for step, own in zip(stops, fits):
                output = encoder.predict(x, own)
                for where, half in halves.items():
                    row = f"{where} PSNR (dB), {name}" + f", {step} steps" * (step < stops[-1])
                    rows.setdefault(row, []).append(
                        decibels(output[:, half], values[:, half], (1, 2)))
    return rows


def stable_rank(layer):
    """||W||_F^2 / ||W||_2^2 without the bias (Rudelson & Vershynin 2007)."""
    squares = torch.linalg.svdvals(layer[:, :-1]).square()
    return squares.sum() / squares[0]


# ---- A dictionary of the activations ----

class Dictionary(NamedTuple):
    """S TopK sparse autoencoders (Gao et al., arXiv 2406.04093): code z = the k largest of
    (a - c) E^T where positive, reconstruction z D + c. A row of D, of length 1, is an atom."""
    encoder: Tensor        # E (S, atoms, d)
    decoder: Tensor        # D (S, atoms, d)
    centre: Tensor         # c (S, 1, d)

    def code(self, a, k, among=1.0):
        """a (S, P, d) -> z (S, P, atoms); among (S, 1, atoms): 0 for atoms that may not fire."""
        scores = (a - self.centre) @ self.encoder.mT * among
        values, places = scores.topk(k)
        return torch.zeros_like(scores).scatter(2, places, values.relu())

    def loss(self, a, k, dead):
        """Squared error, and 1/32 of what k dead atoms leave of the residual."""
        rest = a - self.code(a, k) @ self.decoder - self.centre
        revived = self.code(a, k, dead) @ self.decoder if dead.any() else 0
        return (rest.square() + (rest.detach() - revived).square() / 32).mean((1, 2)).sum()


def train_dictionaries(a, steps, seed):
    """S dictionaries of a (S, P, d), at once; after 0 steps random ones."""
    g = generator("dictionary", seed)
    atoms = F.normalize(torch.randn(len(a), ATOMS, a.shape[2], generator=g), dim=2).to(a)
    sae = Dictionary(*(p.clone().requires_grad_() for p in (atoms, atoms, a.mean(1, keepdim=True))))
    silent, block = torch.zeros_like(atoms[:, None, :, 0]), a[:, :256]         # (S, 1, atoms)

    def loss():
        return sae.loss(block, TOPK, silent >= PATIENCE)

    for _ in adam(sae, loss, 3e-3, steps, "dictionaries"):
        with torch.no_grad():
            sae.decoder.copy_(F.normalize(sae.decoder, dim=2))
            silent = (silent + 1) * (sae.code(block, TOPK) == 0).all(1, keepdim=True)
        block = a[:, torch.randint(a.shape[1], (256,), generator=g).to(a.device)]
    return Dictionary(*(p.detach() for p in sae))


def spread(energy, coords):
    """(n,) of maps (P, n): standard deviation of position over a uniform map's; 0: a point."""
    weights = (energy / energy.sum(0)).mT
    variance = (weights @ coords.square() - (weights @ coords).square()).sum(1).clamp_min(0)
    return (variance / coords.var(0, correction=0).sum()).sqrt()


def in_a_disc(energy, coords):
    """(n,): the largest share of a map's energy (P, n) in a disc of radius DISC."""
    near = (torch.cdist(coords[::3], coords) <= DISC).to(energy)               # (P / 3, P)
    return (near @ energy).amax(0) / energy.sum(0)


def likeness(maps, pictures):
    """(n,): the largest |correlation| of maps (P, n) with one of pictures (P, N)."""
    maps, pictures = (F.normalize(x - x.mean(0), dim=0) for x in (maps, pictures))
    return (maps.mT @ pictures).abs().amax(1)


def half_width(a, side):
    """Lag, in steps of the grid, at which the autocorrelation of a (side^2, d) is below a half."""
    a = (a - a.mean(0)).mT.unflatten(1, (side, side))
    power = [sum((x[:, lag:] * x[:, :side - lag]).mean() for x in (a, a.mT)) for lag in range(side)]
    return int((torch.stack(power) > power[0] / 2).int().argmin())


def atom_rows(a, sae, pictures, side):
    """What a layer's live atoms (n,), or the layer (1,), are like; codes (P, atoms). Activations a
    (1, P, d); pictures (P, N): the cohort's images, as many others."""
    z, coords = sae.code(a, TOPK), coordinate_grid(side, side).to(a)
    missed, z = (a - z @ sae.decoder - sae.centre).square().mean() / a.var(1).mean(), z[0]
    maps = z[:, (z > 0).any(0)]
    own, other = (likeness(maps, x) for x in pictures)
    return {"spread": spread(maps.square(), coords), "likeness to own images": own,
            "likeness to others": other, "tracing": own - other,
            "energy in a disc": in_a_disc(maps.square(), coords),
            "variance explained": 1 - missed[None],
            "dead atoms": 1 - torch.tensor([maps.shape[1] / z.shape[1]]),
            "half-width (pixels)": torch.tensor([half_width(a[0], side) / 2])}, z


def dictionaries(encoders, pictures, args, seed):
    """Rows of the trained encoder and the controls on a grid of which every other point is a pixel;
    the trained one's codes at the pixels [(P, atoms)] and atoms (L, atoms, d)."""
    side, L = 2 * args.size - 1, args.layers
    pictures = [F.interpolate(x.mean(1, keepdim=True), (side, side), mode="bilinear",
                              align_corners=True).flatten(1).mT for x in pictures]
    a = torch.stack([each.through(each.inputs(side), each.layers[:l + 1]).detach()
                     for each in (*encoders.values(), encoders["trained"]) for l in range(L)])
    a = a / a.var(1, keepdim=True).mean(2, keepdim=True).sqrt()                # (S, P, d)
    learned, drawn = train_dictionaries(a, SAE_STEPS, seed), train_dictionaries(a[:L], 0, seed)
    sae = Dictionary(*map(torch.cat, zip(learned, drawn)))
    names = [name for name in (*encoders, "second seed", "random atoms") for _ in range(L)]
    rows, codes = {}, []
    for s, name in enumerate(names):
        one = Dictionary(*(p[s, None] for p in sae))
        found, z = atom_rows(a[s % len(a), None], one, pictures, side)
        codes.append(z.unflatten(0, (side, side))[::2, ::2].flatten(0, 1))
        for row, x in found.items():
            rows.setdefault(f"{row}, {name}", []).append(x)
    return rows, codes[:L], sae.decoder[:L]


# ---- Ablation ----

def ablate(rest, a, z, atoms, values, seed):
    """Rows (live atoms,): what it costs to project an atom out of a (P, d) less its mean, at every
    point. Control: as much taken along a random direction. rest: a -> pixels (P, N, C); codes z (P,
    atoms). Taken only where it fires, it changes nothing elsewhere: each point is alone."""
    atoms, z = atoms[(z > 0).any(0)], z[:, (z > 0).any(0)]
    along, plain, rows = (a - a.mean(0)) @ atoms.mT, rest(a), {}               # (P, n)
    random = torch.randn(atoms.shape, generator=generator("direction", seed)).to(a)
    for name, directions in (("atom", atoms), ("random", F.normalize(random, dim=1))):
        for n, direction in enumerate(directions):
            output, fires = rest(a - along[:, n:n + 1] * direction), z[:, n] > 0
            change = (output - plain).square().sum((1, 2))                     # (P,)
            lost = decibels(plain, values, (0, 2)) - decibels(output, values, (0, 2))
            for row, x in (("PSNR lost (dB)", lost.mean()), ("... on one image", lost.max()),
                           ("change where it fires", change[fires].sum() / change.sum())):
                rows.setdefault(f"{row}, {name}", []).append(x)
    elsewhere = (rest(a - z[:, :1] * atoms[0]) - plain)[z[:, 0] == 0].abs().sum()
    return {row: torch.stack(x) for row, x in rows.items()} | {
        "area where it fires": (z > 0).float().mean(0),
        "change elsewhere if taken there alone": elsewhere[None]}


# ---- An image's own layers as tokens ----

class Cohort(nn.Module):
    """What diagnostics.py asks of a method. A token: a neuron of an image's own layers, those above
    the frozen ones, less where all images start, the bias last."""

    def __init__(self, args, encoder):
        super().__init__()
        self.args, self.encoder, self.reader = args, encoder, None
        self.start = list(encoder.layers)[args.freeze + 1:]

    @torch.no_grad()
    def own(self, images):
        """What own layers see (P, width), and own layers (N, out, width + 1)."""
        args, e = self.args, self.encoder
        x = e.through(e.inputs(args.size), e.layers[:args.freeze + 1])
        blocks = images.flatten(2).mT.split(max(1, 4096 // len(x)))            # what caches hold
        fits = [fit(e, x, self.start, block, RECIPE[args.backbone][2], [args.token_steps])[0]
                for block in blocks]
        return x, [torch.cat(layer) for layer in zip(*fits)]

    def fit(self, images):
        """Images (N, C, size, size) -> tokens (N, T, width + 1)."""
        return torch.cat([w - w0.detach() for w, w0 in zip(self.own(images)[1], self.start)], 1)

    def reconstruct(self, images):
        return self.encoder.predict(*self.own(images)).mT.reshape(images.shape).clamp(-1, 1)

    def read(self, tokens):
        """Tokens -> logits (N, classes)."""
        return self.reader(tokens)

    def trace(self, tokens):
        """logits, [(stage, state), ...] of the reader."""
        return self.reader.trace(tokens)

    def parts(self):
        return {"bias column": torch.eye(self.args.width + 1)[:, -1:].to(self.encoder.frequencies)}


def from_checkpoint(content, device="cpu"):
    """The model in what `read_checkpoint` returned."""
    args, state = argparse.Namespace(**content["args"]), content["model"]
    model = Cohort(args, Encoder(args, content["data"][0], args.seed))
    model.reader = Reader(len(state["reader.beta"]), args.width, len(state["reader.head.bias"]),
                          args.width + 1, args.reader_depth, args.head_dim, args.mlp_ratio,
                          args.token_scale)
    model.load_state_dict(state)
    return model.to(device)


# ---- From measurements to verdicts ----

CLAIMS = {                 # of a layer: (margin, rows that must all lie above it)
    "best depth: highest stable rank": (0, ["highest rank over other depths (dB)"]),
    "freezing there matches fine-tuning": (-0.5, ["highest rank over fine-tuning (dB)"]),
    "frozen to here beats fine-tuning": (0, ["frozen over fine-tuning (dB)"]),
    "... and an untrained prefix": (0, ["frozen over untrained (dB)"]),
    "atoms are more local than controls'": (0.05, [
        "spread, untrained - spread, trained", "spread, random atoms - spread, trained"]),
    "atoms trace the cohort's images": (0.02, [
        "tracing, trained", "tracing, trained - tracing, untrained"]),
    "an atom's direction matters": (0.1, ["PSNR lost (dB), atom - PSNR lost (dB), random"])}


def differences(rows):
    """The rows of CLAIMS, of one seed's rows; x - y is as many measurements of x less those of y,
    highest rank: of the layer whose weights have it."""
    kept, untrained = (torch.stack(rows[f"held-out PSNR (dB), {name}"], 1)
                       for name in ("rest kept", "untrained"))                 # (n, L + 1)
    peak = int(torch.cat(rows["stable rank, trained"]).argmax()) + 1
    lead = kept[:, peak, None] - kept
    found = {"highest rank over other depths (dB)": [
                 torch.cat([lead[:, 1:peak], lead[:, peak + 1:]], 1)],
             "highest rank over fine-tuning (dB)": [lead[:, 0]],
             "frozen over fine-tuning (dB)": list((kept - kept[:, :1]).T[1:]),
             "frozen over untrained (dB)": list((kept - untrained).T[1:])}
    for name in (name for _, names in CLAIMS.values() for name in names if " - " in name):
        pairs = zip(*(rows[row] for row in name.split(" - ")))
        found[name] = [x[:min(len(x), len(y))] - y[:min(len(x), len(y))] for x, y in pairs]
    return found


def interval(groups):
    """(value, low, high) of the mean of each seed's (n,), of (n, m) the least of m means; rows and
    seeds are drawn again."""
    n = min(map(len, groups))
    x = torch.stack([group[:n].reshape(n, -1) for group in groups], 1)         # (n, seeds, m)
    return bootstrap(x.flatten(1), lambda means: over_repeats()(
        means.unflatten(-1, x.shape[1:]).amin(-1)))


def verdict(intervals, margin):
    if any(high < min(0, margin) for _, _, high in intervals):
        return "refuted"
    return "holds" if all(low > margin for _, low, _ in intervals) else "open"


def conclude(rows):
    """{claim: verdicts}, of all seeds' intervals."""
    return {claim: [verdict(tests, margin) for tests in zip(*(rows[name] for name in names))]
            for claim, (margin, names) in CLAIMS.items()}


def table(rows, verdicts, layers):
    """Means, and intervals of what decides a claim; last what is claimed of each layer."""
    lines = [("", "none", *(f"layer {l}" for l in range(layers)))]
    for row, cells in rows.items():
        decides = any(row in names for _, names in CLAIMS.values())
        for name, end in ((row, 0), ("  from", 1), ("  to", 2))[:3 if decides else 1]:
            lines.append((name, *[""] * (len(cells) == layers), *(f"{c[end]:.2f}" for c in cells)))
    for claim, words in verdicts.items():
        lines.append((f"{claim} (> {CLAIMS[claim][0]})", *[""] * (len(words) == layers), *words))
    return "\n".join(f"{name:46}" + "".join(f"{cell:>9}" for cell in cells)
                     for name, *cells in lines)


# ---- The program ----

FLAGS = {                  # name: type, default, help
    "dataset": (str, "digits", "as train.py's: digits, cifar10, mnist, fashion_mnist or a folder"),
    "data_root": (str, "data", "folder of the downloaded data sets"),
    "size": (whole(4, 128), 32, "pixels a side; images of another size are resized"),
    "train_size": (whole(1), 300, "images for the reader, the cohorts and new images among them"),
    "test_size": (whole(1), 100, "test images, for diagnostics.py"),
    "backbone": (str, "siren", "siren or ffmlp"),
    "width": (whole(32, 4096), 64, "neurons a layer; also the reader's width"),
    "layers": (whole(2, 64), 5, "L, shared layers"),
    "images": (whole(2), 16, "N, images of a cohort"),
    "fit_steps": (whole(1), 200, "of a new image; also looked at after a tenth and a third"),
    "freeze": (whole(0), None, "last frozen layer of the tokens; None: the sweep's best"),
    "token_steps": (whole(1), 20, "of an image's fit as tokens"),
    "seed": (whole(0), 0, "of the first cohort"),
    "seeds": (whole(1), 1, "cohorts; intervals are over seeds and images"),
    "device": (str, "auto", "auto: CUDA if there is one"),
    "out": (str, "cohort.pt", "checkpoint; *.json and *.png are written beside it")}
READER = dict(reader_depth=3, head_dim=32, mlp_ratio=1, epochs=15, batch_size=16, lr=3e-3,
              weight_decay=1e-4, save_minutes=5.0)


def read_flags(argv: list[str] | None):
    p = Parser(prog="cohort.py", description=__doc__.split("\n\n")[0])
    for name, (kind, default, text) in FLAGS.items():
        p.add_argument(flag(name), type=kind, default=default, help=f"{text} ({default})")
    for name, value in READER.items():
        p.add_argument(flag(name), type=number(0, above=True, kind=type(value)), default=value,
                       help=f"the reader's, as train.py has it ({value})")
    args = argparse.Namespace(**vars(p.parse_args(argv)), val=False, workers=0)
    if args.backbone not in RECIPE:
        raise InputError(f"--backbone {args.backbone}: neither siren nor ffmlp")
    if args.width % args.head_dim:
        raise InputError(f"--head-dim {args.head_dim} does not divide --width {args.width}")
    if (args.freeze or 0) >= args.layers:
        raise InputError(f"--freeze {args.freeze}: there is no such layer")
    if args.train_size < 2 * args.images + NEW:
        raise InputError(f"--train-size {args.train_size}: two cohorts and {NEW} images are more")
    check_output(argparse.Namespace(**vars(args), resume=False, eval_only=False, init_from=None))
    return args


def measure(images, args, seed):
    """The trained encoder and all rows, of one seed."""
    n, order = args.images, torch.randperm(len(images), generator=generator("cohort", seed))
    mine, others, new = images[order[:2 * n + NEW].to(images.device)].split([n, n, NEW])
    encoders = {key: Encoder(args, images.shape[1], seed, key).to(images)
                for key in ("trained", "other cohort", "untrained")}
    encoder, other, untrained = encoders.values()
    values, other_values = (x.flatten(2).permute(2, 0, 1) for x in (mine, others))   # (P, N, C)
    decoders, reached = train_cohort(encoder, values, args)
    train_cohort(other, other_values, args)
    rows = {"cohort's PSNR (dB)": [reached]}
    rows |= sweep(encoder, untrained, new.flatten(2).mT, args, seed)
    for key in ("trained", "untrained"):
        rows[f"stable rank, {key}"] = [stable_rank(w)[None] for w in encoders[key].layers[:-1]]
    found, codes, atoms = dictionaries(encoders, [mine, others], args, seed)
    rows |= found
    for l in tqdm(range(args.layers), "ablation", leave=False, disable=None):
        a = encoder.through(encoder.inputs(args.size), encoder.layers[:l + 1])
        above = [*encoder.layers[l + 1:-1], decoders]
        found = ablate(lambda a: encoder.predict(a, above).view_as(values), a, codes[l], atoms[l],
                       values, seed)
        for row, x in found.items():
            rows.setdefault(row, []).append(x)
    return encoder, rows | differences(rows)


def run(argv: list[str] | None):
    args = read_flags(argv)
    device = find_device(args.device)
    images, _ = load_dataset(args, device)
    pixels, labels = next(images.batches([torch.arange(len(images))], device))
    values = images.signal(pixels)
    with torch.no_grad():
        encoders, seeds = zip(*(measure(values, args, args.seed + s) for s in range(args.seeds)))
    rows = {row: [interval(list(cells)) for cells in zip(*(rows[row] for rows in seeds))]
            for row in seeds[0]}
    verdicts = conclude(rows)
    if args.freeze is None:
        means = [value for value, *_ in rows["held-out PSNR (dB), rest kept"]]
        args.freeze = means.index(max(means[1:]), 1) - 1
    path = Path(args.out).with_suffix(".json")
    report = {"flags": vars(args), **environment(device), "rows": rows, "verdicts": verdicts}
    path.write_text(json.dumps(report, indent=1) + "\n")
    figures.cohort_figure(path.with_suffix(".png"), report)
    print(table(rows, verdicts, args.layers), flush=True)

    model = Cohort(args, encoders[0])
    tokens = torch.cat([model.fit(block) for block in tqdm(values.split(32), "fitting", leave=False,
                                                          disable=None)])
    model.reader = train_reader(tokens, labels, args)
    args.token_scale = model.reader.token_scale
    save_checkpoint(args.out, {"method": "cohort", "args": vars(args), "data": facts(images),
                               "metrics": {}, "model": model.state_dict()})


def main(argv: list[str] | None = None):
    with exits("cohort.py"):
        run(argv)


if __name__ == "__main__":
    main()
