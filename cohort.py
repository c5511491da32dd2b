"""A cohort of images as INRs: one encoder for all, a linear decoder each. What does the encoder
encode, and how deep should it be frozen for new images? After "What Cohort INRs Encode and Where to
Freeze Them" (arXiv 2605.08298) and STRAINER (Vyas et al., NeurIPS 2024), with controls.

    python cohort.py                           # 16 digits: cohort.pt, cohort.json, cohort.png
    python cohort.py --dataset cifar10 --backbone ffmlp --seeds 3
    python cohort.py --dataset fashion_mnist --train-size 10000 --test-size 2000 --token-steps 100
    python diagnostics.py --ckpt cohort.pt     # an image's own layers, read by a Transformer

Layers 0 .. L - 1 are shared. A layer is an augmented weight (out, in + 1), the bias last; of N
images it has a leading N. Measurements are rows: {name: [a tensor (n,) for each layer]}. A command
that was stopped, given again, finds its fits and its half-trained reader.
"""
import argparse
import hashlib
import json
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import figures
import settings
from checkpoint import InputError, exits, generator, read_checkpoint, save_checkpoint, seeded
from data import load_dataset
from dictionary import ablate, decibels, dictionaries
from measures import bootstrap, over_repeats
from reader import Reader
from siren import affine, coordinate_grid
from train import Fits, facts, train_reader

OMEGA, SIGMA = 30.0, 3.0   # SIREN: factor in the sine; FFMLP: frequencies, cycles an image
RECIPE = {"siren": (500, 1e-3, 1e-3), "ffmlp": (1500, 3e-3, 3e-3)}   # steps, rate; new images' rate
NEW = 8                    # new images in the freeze sweep
BLOCK = 64                 # images fitted between two writes


# ---- The network and the cohort ------------------------------------------------------------------

class Encoder(nn.Module):
    """SIREN: sin(omega (W x + b)). FFMLP: ReLU layers on `width` random frequencies (Tancik et al.,
    NeurIPS 2020). The last of `layers` is where decoders start."""

    def __init__(self, args, channels, seed, key="trained"):
        super().__init__()
        n, self.sine, self.recipe = args.width, args.backbone == "siren", RECIPE[args.backbone]
        frequencies = torch.randn(n, 2, generator=generator("frequencies", seed))
        self.register_buffer("frequencies", math.pi * SIGMA * frequencies)     # images are 2 wide
        sizes = [2 if self.sine else 2 * n, *[n] * args.layers, channels]
        bounds = [math.sqrt(6 / size) / (OMEGA if self.sine else 1) for size in sizes]
        bounds[0 if self.sine else args.layers] = 1 / 2 if self.sine else 1 / math.sqrt(n)
        self.layers = nn.ParameterList(torch.zeros(o, i + 1) for i, o in zip(sizes, sizes[1:]))
        with seeded(key, seed):
            for weight, bound in zip(self.layers, bounds):
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
        """Pixels (N, P, C) by own layers, the last a decoder, of what they see, x (P, in)."""
        return affine(self.through(x, own[:-1]), own[-1])


def adam(parameters, loss, rate, steps, decay=True):
    """Adam down loss(), by cosine decay; yields the number of steps taken."""
    optimizer = torch.optim.Adam(parameters, rate, fused=True)
    for step in range(steps):
        if decay:
            optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        with torch.enable_grad():
            loss().backward()
        optimizer.step()
        yield step + 1


def train_cohort(encoder, values, args, seed):
    """Trains the encoder on images (N, P, C); returns decoders (N, C, width + 1)."""
    steps, rate, _ = encoder.recipe
    start, g = encoder.layers[-1].detach(), generator("decoders", seed)
    noise = torch.randn(len(values), len(start), args.width, generator=g).to(start)
    decoders = F.pad(start.std() * noise, (0, 1)).requires_grad_()             # each its own start
    x, layers = encoder.inputs(args.size), [*encoder.layers[:-1], decoders]

    def loss():                                # all decoders are one matrix product
        return (encoder.predict(x, layers) - values).square().mean()

    list(tqdm(adam(layers, loss, rate, steps), "cohort", steps, leave=False, disable=None))
    return decoders.detach()


# ---- New images, and the depth to freeze at ------------------------------------------------------

def fit(encoder, x, start, values, stops):
    """N images' own layers, from one start, after each number of steps in stops; values (N, P, C).
    x (P, in): what the frozen layers give, computed once. Each is fitted as if alone: the loss is a
    sum over images, and Adam works entry by entry."""
    own = [w.detach().repeat(len(values), 1, 1).requires_grad_() for w in start]

    def loss():
        return (encoder.predict(x, own) - values).square().mean((1, 2)).sum()

    steps = adam(own, loss, encoder.recipe[2], stops[-1], decay=False)
    return [[w.detach().clone() for w in own] for step in steps if step in stops]


def sweep(encoder, untrained, values, args, seed):
    """PSNR of new images (N, P, C) with 0 to L layers frozen; 0: fine-tuning, or from scratch. On
    the half of the pixels that is fitted it tells what can be trained, on the other what transfers.
    """
    order = torch.randperm(values.shape[1], generator=generator("half", seed)).to(values.device)
    seen, unseen = order.chunk(2)
    old, new, rows = list(encoder.layers), list(untrained.layers), {}
    stops = [max(1, args.fit_steps // share) for share in (10, 3, 1)]
    for frozen in tqdm(range(len(old)), "freeze sweep", leave=False, disable=None):
        for name, start in (("rest kept", old), ("rest new", old[:frozen] + new[frozen:]),
                            ("untrained", new)):
            x = encoder.through(encoder.inputs(args.size), start[:frozen])
            found = fit(encoder, x[seen], start[frozen:], values[:, seen], stops)
            for step, own in zip(stops, found):
                output = encoder.predict(x, own)
                for where, half in (("fitted", seen), ("held-out", unseen)):
                    row = f"{where} PSNR (dB), {name}" + f", {step} steps" * (step < stops[-1])
                    rows.setdefault(row, []).append(decibels(output[:, half], values[:, half]))
    return rows


def stable_rank(layer):
    """||W||_F^2 / ||W||_2^2 without the bias (Rudelson & Vershynin 2007)."""
    squares = torch.linalg.svdvals(layer[:, :-1]).square()
    return squares.sum() / squares[0]


@torch.no_grad()
def measure(images, args, seed):
    """The trained encoder, and all rows of a cohort drawn from images (n, C, size, size)."""
    n, order = args.images, torch.randperm(len(images), generator=generator("cohort", seed))
    mine, others, new = images[order[:2 * n + NEW].to(images.device)].split([n, n, NEW])
    encoders = {key: Encoder(args, images.shape[1], seed, key).to(images)
                for key in ("trained", "other cohort", "untrained")}
    encoder, other, untrained = encoders.values()
    values, x = mine.flatten(2).mT, encoder.inputs(args.size)                  # (N, P, C)
    decoders = train_cohort(encoder, values, args, seed)
    train_cohort(other, others.flatten(2).mT, args, seed)
    shown = encoder.predict(x, [*encoder.layers[:-1], decoders])
    rows = {"cohort's PSNR (dB)": [decibels(shown, values)]}
    rows |= sweep(encoder, untrained, new.flatten(2).mT, args, seed)

    side = 2 * args.size - 1                   # a grid of which every other point is a pixel
    grey = [F.interpolate(x.mean(1, keepdim=True), (side, side), mode="bilinear",
                          align_corners=True).flatten(1).mT for x in (mine, others)]      # (P, N)
    for l in tqdm(range(args.layers), "dictionaries", leave=False, disable=None):
        a = {name: e.through(e.inputs(side), e.layers[:l + 1]) for name, e in encoders.items()}
        found, z, atoms = dictionaries(a, *grey, seed)
        a, z = (x.unflatten(0, (side, side))[::2, ::2].flatten(0, 1) for x in (a["trained"], z))
        above = [*encoder.layers[l + 1:-1], decoders]
        found |= ablate(lambda a: encoder.predict(a, above), a, z, atoms, values, seed)
        found |= {f"stable rank, {name}": stable_rank(e.layers[l])[None]
                  for name, e in encoders.items()}
        for row, x in found.items():
            rows.setdefault(row, []).append(x)
    return encoder, rows


# ---- From measurements to verdicts ---------------------------------------------------------------

SAME = {"freezing there beats fine-tuning": 0.5}       # dB: within that they match
IN_JSON_ALONE = ("energy", "likeness", "half", "PSNR lost on", "change", "area")


def differences(rows):
    """{claim: for each layer a difference (n,) that is above 0 if it holds}, of one seed's rows; of
    (n, m) the least of m means is to be. Of layer l: 0 to l are frozen."""
    def less(x, y):                            # networks have not equally many atoms
        return [a[:len(b)] - b[:len(a)] for a, b in zip(rows[x], rows[y])]

    kept, untrained = (torch.stack(rows[f"held-out PSNR (dB), {name}"], 1)
                       for name in ("rest kept", "untrained"))                 # (n, L + 1)
    best = int(torch.cat(rows["stable rank, trained"]).argmax()) + 1
    others = [frozen for frozen in range(1, kept.shape[1]) if frozen != best]
    return {
        "best depth: highest stable rank": [kept[:, best, None] - kept[:, others]],
        "freezing there beats fine-tuning": [kept[:, best] - kept[:, 0]],
        "frozen to here beats fine-tuning": list((kept - kept[:, :1])[:, 1:].T),
        "frozen to here beats untrained": list((kept - untrained)[:, 1:].T),
        "atoms more local than untrained's": less("spread, untrained", "spread, trained"),
        "atoms more local than random ones": less("spread, random atoms", "spread, trained"),
        "atoms trace images trained on": less("tracing, trained", "tracing, other cohort"),
        "an atom's direction matters": less("PSNR lost (dB), atom", "PSNR lost (dB), random")}


def interval(groups):
    """(value, low, high) of the mean of each seed's (n,), of (n, m) the least of m means, by a
    bootstrap over images or atoms, and seeds."""
    n = min(map(len, groups))
    x = torch.stack([group[:n].reshape(n, -1) for group in groups], 1)         # (n, seeds, m)
    return bootstrap(x.flatten(1), lambda means: over_repeats()(
        means.unflatten(-1, x.shape[1:]).amin(-1)))


def intervals(seeds):
    """{row: [interval for each layer]} of all seeds' rows."""
    return {row: [interval(list(cells)) for cells in zip(*(rows[row] for rows in seeds))]
            for row in seeds[0]}


def verdict(difference, same=0.0):
    """The rule of every claim: where is the 95% interval of its difference?"""
    _, low, high = difference
    if -same < low and high < same:
        return "same"
    return "yes" if low > 0 else "no" if high < 0 else "not decided"


def table(report):
    """The layers' means, in part; each claim's difference, interval, verdict."""
    layers, lines, seeds = report["flags"]["layers"], [], report["flags"]["seeds"]

    def line(name, cells, form=".2f"):
        cells = [""] * (len(cells) == layers) + [format(x, form) for x in cells]
        lines.append(f"{name:36}" + "".join(f"{cell:>10}" for cell in cells))

    line("layer; PSNR: the last frozen one", ["none", *range(layers)], "")
    for row, cells in report["rows"].items():
        if not (row.startswith(IN_JSON_ALONE) or row.endswith(("steps", "seed", "cohort"))):
            line(row, [value for value, *_ in cells])
    over = "images or atoms, and seeds" if seeds > 1 else "images or atoms of one seed"
    lines.append(f"\n95% interval over {over}: above 0 yes, below no, else ?;\n"
                 "freezing there, within 0.5: same")
    for claim, cells in report["claims"].items():
        for name, column in zip((claim, "  from", "  to"), zip(*cells)):
            line(name, column)
        line("", [x.replace("not decided", "?") for x in report["verdicts"][claim]], "")
    return "\n".join(lines)


# ---- An image's own layers as tokens -------------------------------------------------------------

class Cohort(nn.Module):
    """What diagnostics.py asks of a method. A token is a neuron of an image's own layers, above the
    frozen ones, less its start, the bias last."""
    mediation_images = 500     # that diagnostics.py fits again with another's mean colour

    def __init__(self, args, encoder):
        super().__init__()
        self.args, self.encoder, self.reader = args, encoder, None

    def split(self):
        """What own layers see (P, width), and their start."""
        layers, first = [w.detach() for w in self.encoder.layers], self.args.freeze + 1
        x = self.encoder.inputs(self.args.size)
        return self.encoder.through(x, layers[:first]), layers[first:]

    def fit(self, images):
        """Images (N, C, size, size) -> tokens (N, T, width + 1)."""
        (x, start), found = self.split(), []
        for values in images.flatten(2).mT.split(max(1, 4096 // len(x))):      # what caches hold
            own, = fit(self.encoder, x, start, values, [self.args.token_steps])
            found.append(torch.cat([w - w0 for w, w0 in zip(own, start)], 1))
        return torch.cat(found)

    def show(self, tokens):
        """The images (N, C, size, size) of tokens."""
        x, start = self.split()
        own = [w + part for w, part in zip(start, tokens.split([len(w) for w in start], 1))]
        return self.encoder.predict(x, own).mT.unflatten(2, 2 * [self.args.size]).clamp(-1, 1)

    def reconstruct(self, images):
        return self.show(self.fit(images))

    def read(self, tokens):
        return self.reader(tokens)

    def trace(self, tokens):
        return self.reader.trace(tokens)

    def parts(self):
        return {"bias column": torch.eye(self.args.width + 1)[:, -1:].to(self.encoder.frequencies)}


def from_checkpoint(content, device="cpu"):
    """The model in what `read_checkpoint` returned."""
    args, (channels, classes, _) = argparse.Namespace(**content["args"]), content["data"]
    model = Cohort(args, Encoder(args, channels, args.seed))
    model.reader = Reader(len(content["model"]["reader.beta"]), args.width, len(classes),
                          args.width + 1, args.reader_depth, args.head_dim, args.mlp_ratio,
                          args.token_scale)
    model.load_state_dict(content["model"])
    return model.to(device)


def fit_all(model, images, labels, path):
    """Images as `Fits`. The file is the tokens' memory: what was fitted before a run was stopped is
    there, the rest is 0."""
    shape = (len(images), *model.fit(images[:1]).shape[1:])
    tokens = torch.from_file(str(path), shared=True, size=math.prod(shape)).view(shape)
    error = torch.zeros(len(images))
    for rows in tqdm(torch.arange(len(images)).split(BLOCK), "fitting", leave=False, disable=None):
        block = images[rows.to(images.device)]
        if not tokens[rows[-1]].any():
            tokens[rows] = model.fit(block).cpu()
        error[rows] = (model.show(tokens[rows].to(block)) - block).square().mean((1, 2, 3)).cpu()
    return Fits(tokens.to(images), labels, error.to(images))


# ---- The program ---------------------------------------------------------------------------------

OWN = {                    # name: default, type, help
    "backbone": ("siren", str, "siren; ffmlp: ReLU layers on Fourier features"),
    "layers": (5, settings.whole(2, 64), "L, shared layers"),
    "images": (16, settings.whole(2), "N, images of a cohort"),
    "seeds": (1, settings.whole(1), "cohorts; intervals are then over seeds, too"),
    "fit_steps": (150, settings.whole(1), "of a new image in the freeze sweep"),
    "freeze": (None, settings.whole(0), "last frozen layer of the tokens; None: the sweep's best"),
    "token_steps": (10, settings.whole(1), "of an image's fit as tokens")}
USUAL = dict(size=32, train_size=200, test_size=100, width=64, head_dim=32, reader_depth=3, lr=3e-3,
             epochs=15, out="cohort.pt")
USED = ("dataset data_root size train_size test_size val workers width reader_depth head_dim "
        "mlp_ratio epochs batch_size lr weight_decay seed out save_minutes device").split()


def read_flags(argv):
    p, usual = settings.parser(__doc__.split("\n\n")[0], "cohort.py", USED, USUAL), dict(USUAL)
    more = p.add_argument_group("cohort")
    for name, (usual[name], kind, text) in OWN.items():
        more.add_argument(settings.flag(name), type=kind, help=f"{text} ({usual[name]})")
    given = vars(p.parse_args(argv))
    args = vars(settings.settings(usual | given))
    args = argparse.Namespace(**{name: args[name] for name in (*USED, *OWN)})
    problems = {
        f"--backbone {args.backbone}: neither siren nor ffmlp": args.backbone not in RECIPE,
        f"--freeze {args.freeze}: there is no such layer": (args.freeze or 0) >= args.layers,
        f"--train-size {args.train_size}: two cohorts and {NEW} images are more":
            args.train_size < 2 * args.images + NEW}
    if any(problems.values()):
        raise InputError(max(problems, key=problems.get))
    settings.check_output(argparse.Namespace(out=args.out, resume=True))
    return args


def conclude(seeds, args, device):
    """Writes, draws and prints what all seeds' rows say, and chooses the depth of the tokens."""
    rows, claims = intervals(seeds), intervals([differences(rows) for rows in seeds])
    if args.freeze is None:
        depths = rows["held-out PSNR (dB), rest kept"][1:]
        args.freeze = depths.index(max(depths))
    report = {"command": settings.command_line(args, "cohort"), "flags": vars(args),
              **settings.environment(device), "rows": rows, "claims": claims,
              "verdicts": {claim: [verdict(cell, SAME.get(claim, 0)) for cell in cells]
                           for claim, cells in claims.items()}}
    path = Path(args.out).with_suffix(".json")
    path.write_text(json.dumps(report, indent=1) + "\n")
    figures.cohort_figure(path.with_suffix(".png"), report)
    print(f"{table(report)}\nfrozen for the tokens: layers 0 to {args.freeze}", flush=True)


def run(argv):
    args = read_flags(argv)
    device, data = settings.find_device(args.device), []
    sets = load_dataset(args, device)
    for images in sets:
        pixels, labels = next(images.batches([torch.arange(len(images))], device, args.workers))
        data.append((images.signal(pixels), labels))
    encoders, seeds = zip(*(measure(data[0][0], args, args.seed + s) for s in range(args.seeds)))
    conclude(seeds, args, device)
    model, key = Cohort(args, encoders[0]), hashlib.sha256(repr(args).encode()).hexdigest()[:8]
    files = [Path(args.out).with_suffix(f".{key}.{name}") for name in ("train", "test", "pt")]
    fits, test = (fit_all(model, *each, path) for each, path in zip(data, files))
    model.reader = train_reader(
        fits.tokens, fits.labels, argparse.Namespace(**vars(args) | {"out": str(files[2])}),
        method="cohort", facts=facts(sets[0]), test=test,
        classes=len(sets[0].classes))
    args.token_scale, metrics = model.reader.token_scale, read_checkpoint(files[2])["metrics"]
    save_checkpoint(args.out, {"method": "cohort", "args": vars(args), "data": facts(sets[0]),
                               "metrics": metrics, "model": model.state_dict()})
    for path in files:
        path.unlink()


def main(argv=None):
    with exits("cohort.py"):
        run(argv)


if __name__ == "__main__":
    main()
