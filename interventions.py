"""Trains variants of the model ("lanes"), several seeds each, diagnoses every run, and asks what each change does and whether gains add up.

    python interventions.py --dataset digits --lanes all --seeds 3 --out sweep
    python interventions.py --dataset cifar10 --lanes baseline bias route route+bias deeper --jobs 2 --out sweep --epochs 5
    python interventions.py --report-only --out sweep               # tables and figures again, from what is there

Any flag of train.py holds for all lanes. A lane is a few flags of train.py; its command stands in the report, and its checkpoint is
an ordinary one. A sweep that was stopped goes on with the same command: finished runs stay, the one in progress resumes. Claims: does
pressure to cluster help the reader (C1), where in the reader do neighbourhoods go with accuracy (C2, over all these models), do a
stronger readout, a bias route and denser fitting help, and do they add up (C4). Sections, top to bottom: lanes, runs, diagnosis,
statistics, report, figures, command line.
"""
import argparse
import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import diagnostics
import train

try:
    import fcntl
except ImportError:                # Windows: two sweeps in one folder are not kept apart
    fcntl = None

# ---- Lanes ---------------------------------------------------------------------------------------------------------------
#
# name: (what changes, and that change as a function of the settings that all lanes share; None: it hangs on more than those).

LARGE = lambda base: {"batch_size": max(64, base.batch_size)}              # the contrastive loss needs pairs
LANES = {
    "baseline": ("shared-anchor MWT", lambda base: {}),
    "wt": ("no class loss for the INR", lambda base: {"w_task": 0.0}),
    **{f"task{w:g}": ("another weight of the class loss for the INR", lambda base, w=w: {"w_task": w}) for w in (0.001, 0.1, 1.0, 10.0)},
    "baseline64": ("batches of at least 64", LARGE),
    **{f"cluster{w:g}": ("batches of at least 64, and a supervised contrastive loss on phi - theta", lambda base, w=w: LARGE(base) | {"w_cluster": w}) for w in (0.01, 0.1, 1.0)},
    "bias": ("the bias column to the logits by a branch of its own", lambda base: {"branch": "bias"}),
    "column": ("control of bias: the column of highest energy in this seed's baseline", None),
    "column-random": ("control of bias: a random column, by the seed", None),
    "centred": ("the mean colour removed before fitting", lambda base: {"centre_colour": True}),
    "colour": ("centred, with the mean colour through a branch like bias's", lambda base: {"centre_colour": True, "branch": "colour"}),
    "route": ("learned queries gather the tokens, starting from their mean", lambda base: {"readout": 8}),
    "dense": ("four more inner steps, on all pixels", lambda base: {"steps": base.steps + 4, "fraction": 1.0}),
    "deeper": ("capacity control: a deeper reader", None),
}
FACTORS = ("route", "bias", "dense")
COMBINED = [f"{a}+{b}" for a, b in itertools.combinations(FACTORS, 2)] + ["+".join(FACTORS)]
DEAREST = ("route", "bias", "colour", "dense")             # the capacity control is larger and dearer than these
COMPILE = {None: [], True: ["--compile"], False: ["--no-compile"]}


def settings_of(base, changed: dict):
    return argparse.Namespace(**vars(base) | changed)


def cost(args, channels: int, classes: int) -> tuple[int, float]:
    """Parameters, and counted FLOPs of training on one image."""
    model = train.build_model(args, channels, classes)
    return sum(p.numel() for p in model.parameters()), sum(train.count_flops(model, args.batch_size).values()) / args.batch_size


def capacity_depth(base, channels: int, classes: int) -> int:
    """The least depth of a reader whose model has at least the parameters of the dearest lane and a quarter more FLOPs, since the inner
    loop's FLOPs take longer than the reader's. InputError: no depth that anybody would train (dense, on all of many pixels)."""
    least = np.max([cost(settings_of(base, LANES[lane][1](base)), channels, classes) for lane in DEAREST], axis=0) * (1, 1.25)
    for depth in range(base.reader_depth, base.reader_depth + 50):
        if (np.array(cost(settings_of(base, {"reader_depth": depth}), channels, classes)) >= least).all():
            return depth
    raise train.InputError(f"--lanes deeper: its reader would need more than {depth} blocks to cost what dense costs, all pixels in place of a share of {base.fraction:g}; leave it out")


def against(lane: str) -> str:
    """The lane that this one is compared with."""
    return "baseline64" if any(part.startswith("cluster") for part in lane.split("+")) else "baseline"


def in_order(lanes: list[str]) -> list[str]:
    """The lanes asked for and those they are compared with, each once and baselines first; the parts of a joined one in one order."""
    parts = [*FACTORS, *(part for part in LANES if part not in FACTORS)]
    found = {"baseline"}
    for lane in lanes:
        unknown = [part for part in lane.split("+") if part not in LANES]
        if unknown:
            raise train.InputError(f"--lanes {lane}: there is no lane {unknown[0]}; there are {', '.join(LANES)}, and several joined by +")
        if "+" in lane and (len(set(lane.split("+"))) < len(lane.split("+")) or "baseline" in lane):
            raise train.InputError(f"--lanes {lane}: {'a baseline changes nothing that could be joined' if 'baseline' in lane else 'the same one twice'}")
        lane = "+".join(sorted(lane.split("+"), key=parts.index))
        found |= {lane, against(lane)}
    return sorted(found, key=lambda lane: (list(LANES).index(lane) if lane in LANES else len(LANES), lane.count("+"), [parts.index(part) for part in lane.split("+")]))


# ---- Runs ----------------------------------------------------------------------------------------------------------------

MARK, VERSION = "routed-inr sweep", 1
HERE = Path(__file__).resolve().parent


class Failed(Exception):
    """A run ended before its time: its last words."""


class Sweep:
    """All runs of lanes and seeds under one folder: where they lie, what they need, and what has come out."""

    def __init__(self, folder: Path, base, lanes: list[str], seeds: list[int], threads: int, facts: tuple[int, list[str], int]):
        self.folder, self.base, self.lanes, self.seeds, self.threads = folder, base, lanes, seeds, threads
        self.shape, self.images = (facts[0], len(facts[1])), facts[2]
        self.depth = capacity_depth(base, *self.shape) if any("deeper" in lane.split("+") for lane in lanes) else None
        self.children, self.stopping, self.lock = set(), threading.Event(), None

    def change(self, part: str, seed: int, highest: int | None) -> dict | None:
        if part == "deeper":
            return {"reader_depth": self.depth}
        if part == "column-random":
            return {"branch": f"column:{int(torch.randint(self.base.width, (), generator=train.generator('column', seed)))}"}
        if part == "column":
            found = self.result("baseline", seed)
            highest = found["highest_column"] if found else highest
            return None if highest is None else {"branch": f"column:{highest}"}
        return LANES[part][1](self.base)

    def args(self, lane: str, seed: int, highest: int | None = None):
        """The settings of one run; None where they hang on a baseline that is not there yet, unless `highest` stands for its column."""
        changes = [self.change(part, seed, highest) for part in lane.split("+")]
        if None in changes:
            return None
        changed = {}
        for key, value in (item for change in changes for item in change.items()):
            if key in changed:
                raise train.InputError(f"--lanes {lane}: two of its parts set --{key.replace('_', '-')}")
            changed[key] = value
        args = settings_of(self.base, changed | {"seed": seed})
        known = json.dumps({key: value for key, value in vars(args).items() if key not in train.FREE}, sort_keys=True)
        args.out = str(self.folder / "runs" / f"{lane}-seed{seed}-{hashlib.sha256(known.encode()).hexdigest()[:8]}.pt")
        return args

    def check(self):
        """InputError: a lane that train.py would refuse, or that these settings make the same as what it is compared with."""
        reference = {}
        for lane in self.lanes:
            args = self.args(lane, self.seeds[0], highest=0)
            try:
                train.settings({key: value for key, value in vars(args).items() if value is not None and value is not False})
            except train.InputError as error:
                raise train.InputError(f"--lanes {lane}: {error}") from error
            if args.batch_size > self.images:
                raise train.InputError(f"--lanes {lane}: batches of {args.batch_size}, but there are only {self.images} training images")
            settings = {key: value for key, value in vars(args).items() if key not in train.FREE}
            same = reference.setdefault(json.dumps(settings), lane)
            if same != lane and not lane.startswith(("baseline", "column")):       # these may be the same by chance
                raise train.InputError(f"--lanes {lane}: with these flags it is the same as {same}")

    def command(self, args) -> str:
        """What makes this run by itself, to the last bit on the same machine."""
        alone = settings_of(args, {"out": Path(args.out).name.rsplit("-", 1)[0] + ".pt"})
        return " ".join([f"OMP_NUM_THREADS={self.threads}", train.command_line(alone), *COMPILE[args.compile]])

    def whole_command(self) -> str:
        """What makes all of these runs and their report, whatever commands they came from."""
        flags = train.command_line(settings_of(self.base, {"out": train.RECIPE["out"]})).removeprefix(f"{train.LAUNCH} train.py")
        return " ".join([f"OMP_NUM_THREADS={self.threads} python interventions.py{flags}", *COMPILE[self.base.compile], "--lanes", *self.lanes,
                         f"--seeds {len(self.seeds)} --out", shlex.quote(str(self.folder))])

    def result(self, lane: str, seed: int) -> dict | None:
        """What came out of a finished and diagnosed run."""
        args = self.args(lane, seed)
        path = args and diagnosis_path(args.out)
        if not path or not path.exists():
            return None
        try:
            result = json.loads(path.read_text())
            if not set(REPORTED) <= set(result):
                raise ValueError
        except (OSError, ValueError, TypeError) as error:
            raise train.InputError(f"{path}: damaged; delete it, and it is made again") from error
        return result | {"lane": lane, "seed": seed, "command": self.command(args), "checkpoint": args.out}

    def call(self, command: list[str], log: Path, heard=lambda line: None):
        """Runs a command, its output into the log. Failed: with its last line."""
        environment = {key: value for key, value in os.environ.items() if key != "MKL_NUM_THREADS"} | {"OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"}
        with open(log, "a") as f:
            # A child keeps the folder's lock: no second sweep starts beside what a killed one left, which ends with its next line.
            child = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                     errors="replace", env=environment, **({"pass_fds": (self.lock.fileno(),)} if fcntl else {}))
            self.children.add(child)
            if self.stopping.is_set():
                child.terminate()
            last = ""
            for line in child.stdout:
                f.write(line)
                f.flush()
                last = line.strip() or last
                heard(line)
            self.children.discard(child)
            if child.wait():
                raise Failed(last or f"exit status {child.returncode}")

    def run(self, lane: str, seed: int, heard):
        """Trains, or goes on training, and diagnoses. heard(share): of the training that is behind it."""
        args = self.args(lane, seed)
        if args is None:
            raise Failed("it needs its seed's baseline, which failed")
        out, log = Path(args.out), Path(args.out).with_suffix(".log")
        there, here = out.exists(), {key: getattr(args, key) for key in ("data_root", "workers", "device")}            # here: what may have changed since

        def listen(line: str):
            word, _, rest = line.partition(" ")
            epoch = rest.split("/")[0].strip()
            if word == "epoch" and epoch.isdigit():
                heard(int(epoch) / args.epochs)

        if not there or "progress" in train.read_checkpoint(out):
            flags = ["--resume", f"--out={out}", *train.as_flags(here)] if there else train.as_flags(vars(args) | {"compile": None}) + COMPILE[args.compile]
            self.call([str(HERE / "train.py"), *flags], log, listen)
        heard(1.0)
        if not diagnosis_path(out).exists():
            self.call(["-c", "import sys; sys.path.insert(0, sys.argv[1]); import interventions; interventions.diagnose(*sys.argv[2:])", str(HERE), str(out), json.dumps(here)], log)

    def stop(self):
        self.stopping.set()
        for child in list(self.children):
            child.terminate()

    def flops(self, lane: str) -> float:
        """Counted, of the whole training."""
        alike = "+".join("bias" if part == "column" else part for part in lane.split("+"))             # as dear
        args = self.args(alike, self.seeds[0])
        return cost(args, *self.shape)[1] * self.images * args.epochs

    def work(self, jobs: int) -> dict[tuple[str, int], str]:
        """All runs that are not finished, `jobs` at a time, seed by seed; returns what failed, with its last words."""
        todo = [(lane, seed) for seed in self.seeds for lane in self.lanes if self.result(lane, seed) is None]
        weight = {(lane, seed): self.flops(lane) for lane, seed in todo}
        failed = {}
        with tqdm(desc=f"{len(todo)} runs", total=sum(weight.values()), bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}", disable=None) as bar, \
                concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            futures, caught = {}, []

            def one(lane, seed):
                behind = 0.0

                def heard(share):
                    nonlocal behind
                    bar.update((share - behind) * weight[lane, seed])
                    behind = share

                if self.stopping.is_set():
                    return
                if "column" in lane.split("+") and ("baseline", seed) in futures:      # it was begun earlier
                    concurrent.futures.wait([futures["baseline", seed]])
                try:
                    self.run(lane, seed, heard)
                except (Failed, train.InputError, OSError) as error:
                    if not self.stopping.is_set():
                        failed[lane, seed] = str(error)
                        tqdm.write(f"{lane}, seed {seed} failed: {error}", file=sys.stderr)
                    heard(1.0)
                else:
                    found = self.result(lane, seed)
                    tqdm.write(f"{lane:18s} seed {seed}  accuracy {100 * found['reader']:.2f}%  PSNR {found['psnr']:.2f} dB  "
                               f"purity {found['purity']:.3f}  {found['seconds']:.0f} s", file=sys.stdout)

            before = {n: signal.signal(n, lambda n, _: (caught.append(n), self.stop())) for n in (signal.SIGINT, signal.SIGTERM)}
            try:
                for lane, seed in todo:
                    futures[lane, seed] = pool.submit(one, lane, seed)
                while concurrent.futures.wait(futures.values(), 0.5).not_done:         # a wait without a limit would let no signal through
                    pass
                for future in futures.values():
                    future.result()
            finally:
                for n, handler in before.items():
                    signal.signal(n, handler)
        if caught:
            raise train.Stop(128 + caught[0], "stopped; the same command goes on")
        return failed


# ---- Diagnosis -----------------------------------------------------------------------------------------------------------

def diagnosis_path(checkpoint: str | Path) -> Path:
    return Path(checkpoint).with_suffix(".diagnosis.json")


@torch.no_grad()
def diagnose(path: str, here: str = "{}"):
    """What the report takes from one finished run, as JSON beside its checkpoint: predictions on the test images, geometry of the
    weights and of every stage of the reader, and what permuting the bias column costs. here: settings in place of the run's, as JSON."""
    content = train.read_checkpoint(path)
    args = argparse.Namespace(**content["args"] | json.loads(here))
    device = train.find_device(args.device)
    model = train.model_from(content, path, device).eval().requires_grad_(False)
    model.bf16 = False                                     # small differences are compared
    data, test = train.load_dataset(args, device)
    bank, queries = diagnostics.bank_and_queries(diagnostics.fitter(model), data, test, device, args.workers)
    tokens = torch.cat([block.tokens for block in queries.blocks()])

    def predict(column: int = -1, donors=None):
        """donors: of each image, the one whose column its tokens get."""
        found = []
        for block in queries.blocks():
            rows, changed = torch.arange(block.start, block.start + len(block.labels), device=device), block.tokens.clone()
            if donors is not None:
                changed[..., column] = tokens[donors.to(device)[rows], :, column]
            found.append(model.read(changed, colour=model.colour(block.images.flatten(2).mT)).argmax(-1))
        return torch.cat(found)

    guess, labels = predict(), queries.labels
    right = guess == labels

    def lost(column):
        """Accuracy with the column permuted over the images, five times."""
        moved = [predict(column, diagnostics.donors(labels, "any", repeat, 0)) == labels for repeat in range(5)]
        return diagnostics.bootstrap(torch.stack([right.double() - m.double() for m in moved], 1), diagnostics.over_repeats())

    mean = sum(block.tokens.sum(0, dtype=torch.float64) for block in bank.blocks()).float() / len(bank)
    energy = sum((block.tokens - mean).square().sum((0, 1)) for block in bank.blocks())                # of each column
    highest = int(energy[:-1].argmax())
    known = torch.cat([block.tokens[..., -1] for block in bank.blocks()])
    centre, components, _ = diagnostics.principal(known)
    colours = [torch.cat([block.images.mean((2, 3)) for block in fits.blocks()]) for fits in (bank, queries)]
    told = diagnostics.regression((known - centre) @ components[:, :4], colours[0], (tokens[..., -1] - centre) @ components[:, :4], colours[1])
    coordinates = diagnostics.weight_coordinates(bank, args.depth, model.siren.hidden.flatten(0, 1), model.reader.beta)
    untrained = train.build_model(args, data.channels, len(data.classes)).reader.to(device).requires_grad_(False)
    clustering = diagnostics.clustering(coordinates, bank, queries, guess)
    flow = diagnostics.token_flow(model.read, untrained, bank, queries, flattened=False)               # of the weights alone: no colour branch
    parameters, flops = cost(args, data.channels, len(data.classes))
    epochs = content["metrics"]["epochs"]
    permuted = lost(-1)
    diagnostics.save(diagnosis_path(path), {
        "name": Path(path).stem, "training": vars(args), "reader": float(right.double().mean()), "right": "".join(map(str, right.int().tolist())),
        "psnr": content["metrics"]["test_psnr"], "seconds": len(epochs) * float(np.median([e["seconds"] for e in epochs])), "parameters": parameters, "gflop_per_image": flops / 1e9,
        "purity": clustering["purity"], "gap": clustering["gap"][0], "last_knn10": flow["rows"][-1]["pooled_knn10"], "permuted": permuted, "lost": permuted[0],
        "highest_column": highest, "highest_permuted": lost(highest), "colour_r2": float(np.mean([r2[0] for r2 in told if r2])),
        "experiments": {"clustering": clustering, "token-flow": flow}, **train.environment(device)})


# ---- Statistics ----------------------------------------------------------------------------------------------------------

CELLS = list(itertools.product((0, 1), repeat=len(FACTORS)))
SUBSETS = [subset for size in (1, 2, 3) for subset in itertools.combinations(range(len(FACTORS)), size)]


def lane_of(cell: tuple[int, ...]) -> str:
    return "+".join(factor for factor, on in zip(FACTORS, cell) if on) or "baseline"


def contrast(subset: tuple[int, ...]) -> np.ndarray:
    """Coefficients (8,) over CELLS of a main effect, the mean with the factor less the mean without; or of an interaction, the difference
    of such differences (Fisher 1935; here not halved), each averaged over the factors not in it."""
    signs = np.array([math.prod(1 if cell[f] else -1 for f in subset) for cell in CELLS], dtype=float)
    return signs / 2 ** (len(FACTORS) - len(subset))


def log_odds(p, n: int):
    """Of a share p of n images, half an image added to either side (Haldane 1956), so that 0 and 1 stay finite."""
    return np.log((p * n + 0.5) / (n - p * n + 0.5))


def additive(cell: tuple[int, ...]) -> np.ndarray:
    """Coefficients (8,) over CELLS of the baseline plus the gains of the cell's factors taken singly."""
    c = np.zeros(len(CELLS))
    c[0] = 1 - sum(cell)
    for f, on in enumerate(cell):
        c[CELLS.index(tuple(int(g == f) for g in range(len(cell))))] += on
    return c


# What is asked of the eight cells: effects and interactions; and of each joined cell, what it has beyond the single gains.
ASKED = {" x ".join(FACTORS[f] for f in subset): contrast(subset) for subset in SUBSETS} | {
    f"{lane_of(cell)} - additive": np.array([float(other == cell) for other in CELLS]) - additive(cell) for cell in CELLS if sum(cell) > 1}
JOINED = f"{'+'.join(FACTORS)} - additive"                 # the one that decides whether gains add up, so that there is one chance of error


def factorial(y: np.ndarray) -> dict[str, tuple[float, float | None, float | None]]:
    """ASKED of y (8 cells as CELLS, seeds): (value, low, high), 95% t intervals from the pooled residual of cells + seeds,
    (8 - 1)(seeds - 1) degrees of freedom. With one seed there is no residual: low and high are None."""
    cells, seeds = y.shape
    residual = y - y.mean(1, keepdims=True) - y.mean(0) + y.mean()
    freedom = (cells - 1) * (seeds - 1)
    result = {}
    for name, c in ASKED.items():
        value = float(c @ y.mean(1))
        half = diagnostics.t_quantile(freedom) * math.sqrt(float((residual ** 2).sum()) / freedom * float(c @ c) / seeds) if freedom else None
        result[name] = (value, None, None) if half is None else (value, value - half, value + half)
    return result


def factorial_over_images(right: torch.Tensor, odds: bool = False) -> dict[str, tuple[float, float, float]]:
    """The same for one seed: intervals over the test images, right (n, 8), by the paired bootstrap."""
    n = len(right)
    scale = (lambda m: torch.log((m * n + 0.5) / (n - m * n + 0.5))) if odds else (lambda m: m)
    return {name: diagnostics.bootstrap(right, lambda m, c=torch.from_numpy(c): scale(m) @ c) for name, c in ASKED.items()}


def hits(result: dict) -> torch.Tensor:
    """Which test images a run reads right (n,)."""
    return torch.tensor([float(c) for c in result["right"]], dtype=torch.float64)


def difference(found: dict[str, list[dict]], lane: str, other: str, key: str = "reader") -> dict | None:
    """lane - other, paired over the seeds that both have: its t interval; with one seed, of accuracies, the interval over images."""
    pairs = [(a, b) for a in found.get(lane, []) for b in found.get(other, []) if a["seed"] == b["seed"]]
    if not pairs or lane == other:
        return None
    interval = diagnostics.t_interval([a[key] - b[key] for a, b in pairs])
    if interval is None:
        interval = diagnostics.paired_bootstrap(hits(pairs[0][0]), hits(pairs[0][1])) if key == "reader" else (pairs[0][0][key] - pairs[0][1][key], None, None)
    return {"lane": lane, "minus": other, "seeds": len(pairs), "interval": interval}


MEASURED = ("reader", "psnr", "purity", "gap", "last_knn10", "lost", "colour_r2", "seconds")
REPORTED = (*MEASURED, "right", "training", "experiments", "permuted", "highest_column", "highest_permuted", "parameters", "gflop_per_image", "device", "threads", "versions")


def summarise(found: dict[str, list[dict]]) -> dict:
    """All figures of the report. found: each lane's results, one a seed."""
    report = {"lanes": [], "controls": [], "factorial": None}
    for lane, results in found.items():
        row = {"lane": lane, "n": len(results), "minus": against(lane), "difference": difference(found, lane, against(lane)), "purity_difference": difference(found, lane, against(lane), "purity")}
        for key in MEASURED:
            values = np.array([r[key] for r in results], dtype=float)
            row[key] = (float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None)
        report["lanes"].append(row | {key: results[0][key] for key in ("parameters", "gflop_per_image")} | {key: results[0]["training"][key] for key in ("w_task", "w_cluster")})
        if lane in (*FACTORS, *COMBINED) and (control := difference(found, lane, "deeper")):
            control["gain"] = row["difference"]["interval"]
            control["dearer"] = any(results[0][key] > found["deeper"][0][key] for key in ("parameters", "gflop_per_image"))
            report["controls"].append(control)
    pairs = (("bias", "column"), ("bias", "column-random"), ("colour", "centred"))
    report["pairs"] = [pair for pair in (difference(found, *names) for names in pairs) if pair]
    cells = [lane_of(cell) for cell in CELLS]
    seeds = sorted(set.intersection(*({r["seed"] for r in found.get(lane, [])} for lane in cells)))
    if seeds:
        of = {(r["lane"], r["seed"]): r for lane in cells for r in found[lane]}
        y = np.array([[of[lane, seed]["reader"] for seed in seeds] for lane in cells])
        if len(seeds) > 1:
            scales = factorial(y), factorial(log_odds(y, len(of[cells[0], seeds[0]]["right"])))
        else:
            right = torch.stack([hits(of[lane, seeds[0]]) for lane in cells], 1)
            scales = factorial_over_images(right), factorial_over_images(right, odds=True)
        report["factorial"] = {"seeds": len(seeds), "accuracy": scales[0], "log_odds": scales[1], "cells": [
            {"lane": lane, "measured": float(m), "additive": float(additive(cell) @ y.mean(1))} for lane, cell, m in zip(cells, CELLS, y.mean(1))]}
    models = {}
    for point in diagnostics.points([r for results in found.values() for r in results]):
        models.setdefault((point["setting"], point["seed"]), point)                    # two lanes may be the same: a model counts once
    report["across"] = diagnostics.across(list(models.values()))
    report["late"] = [r["experiments"]["token-flow"]["late_minus_half"] for r in found.get("baseline", [])]
    return report


# ---- Report --------------------------------------------------------------------------------------------------------------

def shown(interval, factor: float = 1, digits: int = 1) -> str:
    """value [low, high], or the value alone."""
    return "none" if interval is None else diagnostics.span(interval, factor, digits) if interval[1] is not None else f"{factor * interval[0]:+.{digits}f}"


def claims(report: dict, images: str = "test images") -> list[str]:
    """What the runs say about C1, C2 and C4, by the rules printed with it. A verdict needs three seeds."""
    across, side, by = report["across"], diagnostics.side, {row["lane"]: row for row in report["lanes"]}
    about = lambda n: f"over {n} seeds" if n > 1 else f"over {images}, one seed"
    few = "not decided here (fewer than three seeds)"
    baseline = few if by.get("baseline", {"n": 0})["n"] < 3 else "not decided here (the baseline's architecture is not that of most models)"
    lines = [verdict for verdict in across["verdicts"] if verdict.split(":")[0] in ("C1, baseline", "C2, baseline")]
    if not lines:
        rho = {key: (c or {}).get("spearman", {}) for key, c in across["correlations"].items()}
        purity, last = rho.get("purity", {}).get("phi - theta"), rho.get("stage purity", {}).get("last - first")
        models = f"over {across['models']} models of one architecture" if purity else "too few models"
        lines = [f"C1: {baseline}. Reader - best geometry {100 * by['baseline']['gap'][0]:+.1f} points (rule: > 2); Spearman's rho(purity of phi - theta, accuracy) {shown(purity, 1, 2)}, {models} (rule: < 0.5)"] if "baseline" in by else []
        late = ", ".join(shown(interval, 100) for interval in report["late"])
        lines.append(f"C2: {baseline}. rho(purity at the last stage) - rho(purity of phi - theta) {shown(last, 1, 2)}, {models} (rule: > 0); "
                     f"rise of 10-NN in the second half of the baseline's blocks - half of the rise {late} points over {images} (rule: > 0)")
    lines += [f"C1: purity of phi - theta, w_task {pair['w_task']:g} minus 0, same seeds: {shown(pair['interval'] or (pair['mean'], None, None), 1, 3)}, n = {pair['n']}" for pair in across.get("pairs", [])]
    for row in report["lanes"]:
        if row["lane"].startswith("cluster") and row["difference"]:
            lines.append(f"C1, {row['lane']} against {row['minus']}: purity of phi - theta {shown(row['purity_difference']['interval'], 1, 3)}, accuracy {shown(row['difference']['interval'], 100)} points, "
                         + about(row["difference"]["seeds"]))
    for control in report["controls"]:
        over, gain = side(control["interval"], 0), side(control["gain"], 0)
        verdict = few if control["seeds"] < 3 else "refuted" if over < 0 else "supported" if over > 0 and gain > 0 else "not decided here"
        lines.append(f"C4, {control['lane']}: {verdict}. Accuracy - that of the capacity control {shown(control['interval'], 100)} points, - the baseline's {shown(control['gain'], 100)}, "
                     f"{about(control['seeds'])} (rule: both > 0, refuted if the first is < 0)" + ("; this lane is dearer than the control" if control["dearer"] else ""))
    if not report["controls"]:
        lines.append("C4: not measured: that takes the lane deeper and one or more of route, bias, dense")
    if found := report["factorial"]:
        beyond, odds = (found[scale][JOINED] for scale in ("accuracy", "log_odds"))
        verdict = few if found["seeds"] < 3 else "not additive" if side(beyond, 0) == side(odds, 0) != 0 else "additive" if side(beyond, -0.02) > 0 > side(beyond, 0.02) else "not decided here"
        lines.append(f"C4, adding up: {verdict}. All three together - the sum of their single gains {shown(beyond, 100)} points, {shown(odds, 1, 2)} in log-odds, {about(found['seeds'])} "
                     "(rule: not additive if both exclude 0 on the same side, additive if within 2 points of 0)")
    lines += [f"{pair['lane']} - {pair['minus']}: accuracy {shown(pair['interval'], 100)} points, {about(pair['seeds'])}" for pair in report["pairs"]]
    lines.append("Intervals are of one comparison each: not corrected for their number.")
    return lines


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown with its columns aligned, so that it reads on a terminal too; numbers are flush right."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    left = [i == 0 or name in ("flags", "what changes") for i, name in enumerate(header)]
    line = lambda cells: "| " + " | ".join(c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(cells, widths, left)) + " |"
    return "\n".join([line(header), "|" + "|".join("-" * (w + 1) + ("-" if to_left else ":") for w, to_left in zip(widths, left)) + "|", *map(line, rows)])


def plus_minus(pair, factor: float = 1, digits: int = 1) -> str:
    return " ± ".join(f"{factor * x:.{digits}f}" for x in pair if x is not None)


def lane_table(report: dict) -> str:
    rows = [[r["lane"], str(r["n"]), plus_minus(r["reader"], 100), shown(r["difference"]["interval"], 100) if r["difference"] else "", plus_minus(r["psnr"][:1]),
             plus_minus(r["purity"][:1], 1, 3), plus_minus(r["last_knn10"][:1], 100), plus_minus(r["lost"][:1], 100)] for r in report["lanes"]]
    return table(["lane", "n", "accuracy %", "- baseline", "PSNR", "purity", "10-NN", "lost"], rows)


def columns_text(sweep: Sweep, images: str) -> str:
    return (f"n: seeds. accuracy: of the reader on {images}, mean ± sd over seeds{', with other drawn pixels than train.py reports' if sweep.base.fraction < 1 else ''}; - baseline: points, paired over the "
            f"seeds that both have, [95% t interval, for these {images}], with one seed [over {images}] (lanes cluster...: against baseline64). "
            f"PSNR in dB{', an estimate over drawn pixels' if sweep.base.fraction < 1 else ''}. purity: share of an image's 10 nearest {images} in phi - theta that have its "
            "class. 10-NN: % at the reader's last stage, mean over tokens (over the queries where there are some), a branch left out. lost: points of accuracy with the bias column permuted over the images.")


def cost_table(report: dict, found: dict[str, list[dict]], base) -> str:
    rows = []
    for r in report["lanes"]:
        flags = train.as_flags({key: value for key, value in found[r["lane"]][0]["training"].items() if key not in train.FREE | {"seed"} and value != getattr(base, key)})
        what = " and ".join(LANES[part][0] for part in r["lane"].split("+"))
        rows.append([r["lane"], what, f"`{' '.join(flags)}`" if flags else "", f"{r['parameters']:,}", f"{r['gflop_per_image']:.3g}", plus_minus(r["seconds"], 1, 0), plus_minus(r["colour_r2"], 1, 2)])
    return table(["lane", "what changes", "flags", "parameters", "GFLOP an image", "training, s", "colour R²"], rows)


def factorial_table(found: dict) -> str:
    return table(["", "accuracy, points", "log-odds"], [[name, shown(found["accuracy"][name], 100, 1), shown(found["log_odds"][name], 1, 3)] for name in found["accuracy"]]) + "\n\n" + table(
        ["cell", "measured %", "singles added up %"], [[c["lane"], f"{100 * c['measured']:.1f}", f"{100 * c['additive']:.1f}"] for c in found["cells"]])


ABOUT = """phi - theta: how far the fitted weights phi of an image moved from the anchor theta that all images share. Reader - best geometry: the reader's accuracy less that of the best of k-NN
and nearest class mean on phi - theta. w_task: weight of the class loss for the INR. Capacity control: the lane deeper. Stages of the reader: input tokens, input map, attention and MLP of each block (A1, M1, ...).

C1: class feedback, or pressure to cluster, does not make the weights' geometry track the reader's accuracy. C2: purity goes with accuracy only at late
stages of the reader. C4: a stronger readout (route), a bias route (bias), denser fitting (dense) help beyond a deeper reader of the same cost, and do not add up."""


def write_report(sweep: Sweep, failed: dict) -> bool:
    """report.md, report.json and figures in the sweep's folder, tables on the terminal. False where nothing is finished."""
    found = {lane: [r for r in (sweep.result(lane, seed) for seed in sweep.seeds) if r] for lane in sweep.lanes}
    found = {lane: results for lane, results in found.items() if results}
    missing = [f"{lane} seed {seed}" for lane in sweep.lanes for seed in sweep.seeds if seed not in [r["seed"] for r in found.get(lane, [])]]
    if not found:
        return False
    runs, images = [r for results in found.values() for r in results], "held-out training images" if sweep.base.val else "test images"
    if len({len(r["right"]) for r in runs}) > 1:
        raise train.InputError(f"{sweep.folder}: its runs saw different numbers of {images}: the data were changed in between")
    report = summarise(found)
    figures = {"lanes.png": (lanes_figure, "Accuracy less the baseline's"), "clusters.png": (clusters_figure, "Purity of the weights against accuracy"),
               "factorial.png": (factorial_figure, "Effects and interactions of the three factors"), "population.png": (population_figure, "Which stage's purity goes with accuracy")}
    drawn = [name for name, (draw, _) in figures.items() if draw(sweep.folder / name, report, images)]
    for name in set(figures) - set(drawn):
        (sweep.folder / name).unlink(missing_ok=True)      # an earlier report's
    lines, columns = claims(report, images), columns_text(sweep, images)
    hardware = sorted({f"{r['device']}, {r['threads']} thread{'s' * (r['threads'] > 1)} a run, torch {r['versions']['torch']}" for r in runs})
    text = [f"# Interventions on {sweep.base.dataset}, {sweep.base.size}x{sweep.base.size} pixels", f"`{sweep.whole_command()}`",
            f"Lanes: {len(found)}; {len(sweep.seeds)} seed{'s' * (len(sweep.seeds) > 1)} ({', '.join(map(str, sweep.seeds))}); runs: {len(runs)}; {len(runs[0]['right'])} {images}; {'; '.join(hardware)}."
            + (f" Not finished: {', '.join(missing) if len(missing) < 10 else f'{len(missing)} runs, named in report.json'}." if missing else "") + "".join(f"\nFailed: {lane}, seed {seed}: {words}." for (lane, seed), words in failed.items()),
            lane_table(report), columns, "## Claims", ABOUT, "\n".join(f"- {line}" for line in lines), *(f"![{figures[name][1]}]({name})" for name in drawn)]
    if report["factorial"]:
        text += ["## Do gains add up", "A factor alone: accuracy with it less without it, over the four settings of the other two; a x b: the difference of such differences; "
                 "a+b - additive: what the joined lane has beyond the baseline plus the gains of its single lanes.", factorial_table(report["factorial"])]
    text += ["## Cost", "training: the median epoch's wall time, beside whatever else ran, times the epochs; GFLOP an image: counted, of the matrix products of one training step; colour R²: how well four principal components of the bias column tell an image's mean colour, on images not fitted to.",
             cost_table(report, found, sweep.base), "## Commands", "Each gives its run by itself, bit for bit on the same machine.", "```\n" + "\n".join(r["command"] for r in runs) + "\n```"]
    (sweep.folder / "report.md").write_text("\n\n".join(text) + "\n")
    kept = ("lane", "seed", "command", "checkpoint", *(key for key in REPORTED if key not in ("right", "training", "experiments")))
    diagnostics.save(sweep.folder / "report.json", {"command": sweep.whole_command(), "flags": vars(sweep.base), "failed": {f"{lane}, seed {seed}": words for (lane, seed), words in failed.items()}, "missing": missing, "claims": lines, **report,
                                                            "runs": [{key: r[key] for key in kept} for r in runs]})
    print("\n\n".join([lane_table(report), diagnostics.fold(columns), diagnostics.fold("\n".join(lines))]))
    print(f"wrote {', '.join(f'{sweep.folder}/{name}' for name in ('report.md', 'report.json', *drawn))}")
    return True


# ---- Figures: each returns whether there was anything to draw ------------------------------------------------------------

def dots(axis, names: list[str], intervals: list, seeds: list[int], factor: float = 100):
    """One row each, first on top: the value and its interval; a hollow one is over images."""
    for i, (interval, n) in enumerate(zip(intervals, seeds)):
        value, low, high = (None if x is None else factor * x for x in interval)
        if low is not None:
            axis.plot([low, high], [i, i], color="black", linewidth=1.2)
        axis.plot(value, i, "s" if " x " in names[i] or "additive" in names[i] else "o", color="C1" if names[i] == "deeper" else "C0", markerfacecolor=None if n > 1 else "white")
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.axvline(0, color="grey", linewidth=0.8)
    axis.grid(alpha=0.3)


def lanes_figure(path: Path, report: dict, images: str) -> bool:
    rows = [r for r in report["lanes"] if r["difference"]]
    if rows:
        figure, (axis,) = diagnostics.canvas(1, 1, 8, 1.5 + 0.28 * len(rows))
        dots(axis, [r["lane"] for r in rows], [r["difference"]["interval"] for r in rows], [r["difference"]["seeds"] for r in rows])
        axis.set_xlabel("accuracy - that of its baseline (cluster...: baseline64), points")
        axis.set_title(f"95% intervals: filled, over seeds; hollow, one seed, over {images}" + "\norange: the capacity control" * any(r["lane"] == "deeper" for r in rows), fontsize=10)
        figure.savefig(path)
    return bool(rows)


def clusters_figure(path: Path, report: dict, images: str) -> bool:
    """Purity of phi - theta against accuracy as the weight of the class loss, or of the contrastive loss, grows."""
    lanes = [r for r in report["lanes"] if "+" not in r["lane"]]
    series = {"w_task": ("weight of the class loss", [r for r in lanes if r["lane"] in ("wt", "baseline") or r["lane"].startswith("task")]),
              "w_cluster": ("weight of the contrastive loss", [r for r in lanes if r["lane"].startswith(("baseline64", "cluster"))])}
    series = {key: (title, sorted(rows, key=lambda r: r[key])) for key, (title, rows) in series.items() if len(rows) > 1}
    if not series:
        return False
    figure, axes = diagnostics.canvas(1, len(series), 5.5 * len(series), 4.6, sharey=True)
    for axis, (key, (title, rows)) in zip(axes, series.items()):
        axis.plot([r["purity"][0] for r in rows], [100 * r["reader"][0] for r in rows], color="C0", alpha=0.4)
        for k, r in enumerate(rows):
            (x, sx), (y, sy) = r["purity"], r["reader"]
            axis.errorbar(x, 100 * y, xerr=sx, yerr=sy and 100 * sy, fmt="osD^vP"[k], color=f"C{k}", capsize=2, label=f"{r[key]:g}")
        axis.legend(title=key, fontsize=9, title_fontsize=9)
        axis.set_title(f"{key}, {title}", fontsize=10)
        axis.set_xlabel("purity of phi - theta: share of 10 nearest images of its class")
        axis.grid(alpha=0.3)
        axis.margins(0.12)
    axes[0].set_ylabel("reader accuracy (%)")
    figure.suptitle("Does accuracy follow purity? A point is a lane" + ("; bars: sd over seeds" if any(r["n"] > 1 for r in lanes) else ", one seed"), fontsize=10)
    figure.savefig(path)
    return True


def factorial_figure(path: Path, report: dict, images: str) -> bool:
    found = report["factorial"]
    if not found:
        return False
    figure, axes = diagnostics.canvas(1, 3, 15, 4.4)
    for axis, scale, factor, label in zip(axes, ("accuracy", "log_odds"), (100, 1), ("points of accuracy", "log-odds")):
        names = [name for name in found[scale] if "additive" not in name]
        dots(axis, names, [found[scale][name] for name in names], [found["seeds"]] * len(names), factor)
        axis.set_xlabel(label)
        axis.set_title("Main effects (circles), interactions (squares)", fontsize=10)
    cells = sorted(found["cells"], key=lambda cell: (cell["lane"] != "baseline") + cell["lane"].count("+"))
    for i, cell in enumerate(cells):
        value, low, high = found["accuracy"].get(f"{cell['lane']} - additive", (0, None, None))
        if low is not None:        # the interval of the difference, around what was measured
            axes[2].plot([100 * (cell["measured"] + low - value), 100 * (cell["measured"] + high - value)], [i, i], color="black", linewidth=1.2)
    axes[2].plot([100 * c["measured"] for c in cells], range(len(cells)), "o", label="measured")
    axes[2].plot([100 * c["additive"] for c in cells], range(len(cells)), "D", markerfacecolor="none", color="C3", label="baseline + single gains")
    axes[2].set_yticks(range(len(cells)), [c["lane"] for c in cells], fontsize=9)
    axes[2].set_ylim(len(cells) - 0.4, -1.6)
    axes[2].set_xlabel("accuracy (%)")
    axes[2].set_title("Do gains add up? Bars: of the difference", fontsize=10)
    axes[2].grid(alpha=0.3)
    axes[2].legend(fontsize=8, loc="upper center", ncols=2)
    figure.suptitle("95% intervals " + (f"over {found['seeds']} seeds, pooled residual" if found["seeds"] > 1 else f"over {images}, one seed"), fontsize=11)
    figure.savefig(path)
    return True


def population_figure(path: Path, report: dict, images: str) -> bool:
    if not any(report["across"]["correlations"].values()):
        return False
    diagnostics.models_figure(path, report["across"])
    return True


# ---- Command line --------------------------------------------------------------------------------------------------------

OWN = ("lanes", "seeds", "jobs", "report_only", "out")
UNUSED = ("resume", "eval_only", "ckpt", "bench", "steps_test")            # the diagnosis fits with k steps


def parser() -> train.Parser:
    p = train.Parser(prog="interventions.py", description=__doc__.split("\n\n")[0] + " Any flag of train.py holds for all lanes.", parents=[train.parser()],
                     conflict_handler="resolve", argument_default=argparse.SUPPRESS, allow_abbrev=False)
    group = p.add_argument_group("sweep")
    group.add_argument("--lanes", nargs="+", help=f"all, or some of {', '.join(LANES)}, or several joined by + (default all)", metavar="LANE")
    group.add_argument("--seeds", type=train.whole(1), help="so many, from --seed on (default 3)")
    group.add_argument("--jobs", type=train.whole(1), help="runs at a time (default 1)")
    group.add_argument("--report-only", action="store_true", help="tables and figures of what is in --out")
    group.add_argument("--out", help="folder of the sweep")
    for name in UNUSED:
        p.add_argument("--" + name.replace("_", "-"), nargs="?", const=True, help=argparse.SUPPRESS)
    return p


def read_mark(folder: Path) -> dict | None:
    """What the folder's sweep is; None where there is none yet. InputError: a folder with something else in it."""
    types = {"threads": int, "settings": dict, "facts": list, "lanes": list, "seeds": int}
    try:
        mark = json.loads((folder / "sweep.json").read_text())
        if mark["format"] == MARK and mark["version"] == VERSION and all(isinstance(mark[key], kind) for key, kind in types.items()):
            known = vars(train.parser().parse_args(train.as_flags(mark["settings"])))              # they pass the same checks as a user's
            in_order(mark["lanes"])
            if {"dataset", "size"} <= set(known) and mark["seeds"] > 0 < mark["threads"]:
                return mark | {"settings": train.RECIPE | mark["settings"]}
    except FileNotFoundError:
        if folder.is_dir() and {path.name for path in folder.iterdir()} <= {"runs", "lock"} or not folder.exists() and folder.parent.is_dir():
            return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, train.InputError):
        pass
    raise train.InputError(f"--out {folder}: " + ("holds something else than a sweep of this program; name another folder" if folder.exists() else f"there is no folder {folder.parent}"))


def report_again(folder: Path, given: dict):
    mark = read_mark(folder)
    if mark is None:
        raise train.InputError(f"--out {folder}: no sweep there")
    if set(given) - {"out", "report_only"}:
        raise train.InputError("--report-only takes --out alone: the folder knows its sweep")
    base = argparse.Namespace(**mark["settings"])
    seeds = list(range(base.seed, base.seed + mark["seeds"]))
    if not write_report(Sweep(folder, base, mark["lanes"], seeds, mark["threads"], mark["facts"]), {}):
        raise train.Stop(1, "no run is finished yet: nothing to report")


def run(argv: list[str] | None):
    given = vars(parser().parse_args(argv))
    for key in UNUSED:
        if key in given:
            raise train.InputError(f"--{key.replace('_', '-')}: a flag of train.py alone")
    if "out" not in given:
        raise train.InputError("--out: name the sweep's folder")
    folder = Path(given["out"])
    if given.get("report_only"):
        return report_again(folder, given)
    lanes, count, jobs = given.get("lanes", ["all"]), given.get("seeds", 3), given.get("jobs", 1)
    lanes = in_order([lane for name in lanes for lane in ([*LANES, *COMBINED] if name == "all" else [name])])
    base, mark = train.settings({key: value for key, value in given.items() if key not in OWN}), read_mark(folder)
    for key in ("dataset", "size", "train_size", "test_size", "val") if mark else ():
        if mark["settings"][key] != getattr(base, key):
            raise train.InputError(f"--out {folder}: holds a sweep with --{key.replace('_', '-')} {mark['settings'][key]}, not {getattr(base, key)}; name another folder")
    train.find_device(base.device)
    facts = train.facts(train.load_dataset(base, train=False)[0])
    if mark and mark["facts"] != list(facts):
        raise train.InputError(f"--out {folder}: the data were changed since that sweep began: other classes or number of images; name another folder")
    # One number of threads for all runs of a folder, since rounding depends on it.
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    threads = mark["threads"] if mark else int(wanted) if wanted.isdecimal() and int(wanted) else max(1, (os.cpu_count() or 1) // jobs)
    sweep = Sweep(folder, base, lanes, list(range(base.seed, base.seed + count)), threads, facts)
    sweep.check()                                          # all that can be wrong, before the first run
    asked = {"lanes": lanes, "seeds": count}
    settings = lambda of: {key: value for key, value in of.items() if key not in train.FREE}
    if mark and settings(mark["settings"]) == settings(vars(base)):            # the report covers what earlier commands asked for, too
        asked = {"lanes": in_order([*mark["lanes"], *lanes]), "seeds": max(count, mark["seeds"])}
    try:
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        sweep.lock = open(folder / "lock", "w")
    except OSError as error:
        raise train.InputError(f"--out {folder}: cannot be written ({error.strerror})") from error
    if fcntl:
        try:
            fcntl.flock(sweep.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise train.InputError(f"--out {folder}: a sweep is at work there, or a run that a killed one left; wait for it, or stop it") from error
    diagnostics.save(folder / "sweep.json", {"format": MARK, "version": VERSION, "threads": threads, "settings": vars(base), "facts": facts, **asked})
    failed = sweep.work(jobs)
    whole = Sweep(folder, base, asked["lanes"], list(range(base.seed, base.seed + asked["seeds"])), threads, facts)
    written = write_report(whole, failed)
    if failed:
        raise train.Stop(1, f"{len(failed)} of the runs failed; the same command tries them again")
    assert written


def main(argv: list[str] | None = None):
    """Exit status: 0; 1 a run failed; 2 bad input; 130 or 143 stopped by Ctrl-C or SIGTERM."""
    try:
        run(argv)
    except (train.InputError, train.Stop, KeyboardInterrupt) as error:
        status = getattr(error, "status", 130)
        print(f"interventions.py: {'error: ' if status == 2 else ''}{str(error) or 'interrupted'}", file=sys.stderr)
        raise SystemExit(status) from None


if __name__ == "__main__":
    main()
