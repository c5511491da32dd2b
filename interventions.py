"""Trains variants of the model ("lanes"), several seeds each, diagnoses every run, and asks what
each change does and whether gains add up.

    python interventions.py --dataset digits --lanes all --seeds 3 --out sweep
    python interventions.py --lanes baseline bias route route+bias deeper --epochs 5 --out sweep
    python interventions.py --report-only --out sweep      # tables and figures of what is there

A lane is a few flags of train.py; any other flag holds for all lanes. A stopped sweep goes on with
the same command. Several may work in one folder at once, each in a terminal of its own, with other
--lanes or seeds (--seed 3 --seeds 2: seeds 3 and 4): no run is made twice.

Top to bottom: lanes, the folder, runs, diagnosis, statistics, claims, report, program.
"""
import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import shlex
import signal
import statistics
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import claims
import figures
import train
from bench import count_flops
from checkpoint import (InputError, Stop, exits, generator, model_from, read_checkpoint,
                        seeded)
from claims import POINTS, decide, fold, side, span
from data import load_dataset
from routes import BLOCK, covariance, donors
from diagnostics import (Fitted, accuracy, clustering, coordinate_systems,
                         fit_all, token_flow)
from measures import (bootstrap, over_repeats, paired_bootstrap, principal, regression, t_interval,
                      t_quantile)
from settings import (FREE, LAUNCH, RECIPE, Parser, as_flags, command_line, environment,
                      find_device, flag, parser, settings, whole)

# ---- Lanes ---------------------------------------------------------------------------------------
#
# A lane changes one thing; lanes joined by + change several. Each is compared with the baseline. A
# gain could also come from mere size: `deeper` is a reader with more parameters and FLOPs than any
# single lane. `column` and `column-random` give another column of the tokens what `bias` gives the
# bias column; `centred` is what `colour` is without its branch, `baseline64` the contrastive lanes
# without their loss.

def always(**changed):
    """A change that does not depend on what all lanes share."""
    return lambda base: changed


def large_batches(base, **changed):            # the contrastive loss needs pairs of a class
    return {"batch_size": max(64, base.batch_size), **changed}


def denser(base):
    return {"steps": base.steps + 4, "fraction": 1.0}


TASK = "another weight of the class loss for the INR"
CLUSTER = "batches of at least 64, and a supervised contrastive loss on phi - theta"
LANES = {              # name: what changes, as a function of what all lanes share
    "baseline": ("shared-anchor MWT", always()),
    "wt": ("no class loss for the INR", always(w_task=0.0)),
    "task0.001": (TASK, always(w_task=0.001)),
    "task0.1": (TASK, always(w_task=0.1)),
    "task1": (TASK, always(w_task=1.0)),
    "task10": (TASK, always(w_task=10.0)),
    "baseline64": ("batches of at least 64", large_batches),
    "cluster0.01": (CLUSTER, partial(large_batches, w_cluster=0.01)),
    "cluster0.1": (CLUSTER, partial(large_batches, w_cluster=0.1)),
    "cluster1": (CLUSTER, partial(large_batches, w_cluster=1.0)),
    "bias": ("the bias column to the logits by a branch of its own", always(branch="bias")),
    "column": ("control of bias: the column of highest energy in this seed's baseline", None),
    "column-random": ("control of bias: a random column, by the seed", None),
    "centred": ("the mean colour removed before fitting", always(centre_colour=True)),
    "colour": ("centred, with the mean colour through a branch like bias's",
               always(centre_colour=True, branch="colour")),
    "route": ("learned queries gather the tokens, starting from their mean", always(readout=8)),
    "dense": ("four more inner steps, on all pixels", denser),
    "deeper": ("capacity control: a deeper reader", None)}
FACTORS = ("route", "bias", "dense")
COMBINED = [f"{a}+{b}" for a, b in itertools.combinations(FACTORS, 2)] + ["+".join(FACTORS)]


def changed_by(base, changes: dict) -> argparse.Namespace:
    return argparse.Namespace(**vars(base) | changes)


def counted(args) -> dict:
    """The settings that a result depends on."""
    return {key: value for key, value in vars(args).items() if key not in FREE}


def cost(args, channels: int, classes: int) -> tuple[int, float]:
    """Parameters, and counted FLOPs of training on one image."""
    model = train.MWT(args, channels, classes)
    parameters = sum(p.numel() for p in model.parameters())
    return parameters, count_flops(model, args.batch_size) / args.batch_size


def capacity_depth(base, channels: int, classes: int) -> int:
    """The least depth of a reader whose model has the parameters of the dearest lane and a quarter
    more FLOPs, since the inner loop's FLOPs take longer than the reader's. Every block adds the
    same. InputError: a depth that nobody would train."""
    def costs(changes: dict):
        return cost(changed_by(base, changes), channels, classes)

    dearest = [costs(LANES[lane][1](base)) for lane in ("route", "bias", "colour", "dense")]
    wanted = max(p for p, _ in dearest), 1.25 * max(flops for _, flops in dearest)
    has, with_one_more = costs({}), costs({"reader_depth": base.reader_depth + 1})
    more = max(0, *(math.ceil((w - h) / (m - h)) for w, h, m in zip(wanted, has, with_one_more)))
    if more >= 50:
        raise InputError(f"--lanes deeper: its reader would need {more} more blocks to cost what "
                         "dense costs, all pixels in place of a share of "
                         f"{base.fraction:g}; leave it out")
    return base.reader_depth + more


def against(lane: str) -> str:
    """The lane that this one is compared with."""
    contrastive = any(part.startswith("cluster") for part in lane.split("+"))
    return "baseline64" if contrastive else "baseline"


def in_order(lanes: list[str]) -> list[str]:
    """The lanes asked for and those they are compared with, each once, baselines first; the parts
    of a joined one in one order. InputError: no such lane."""
    parts = [*FACTORS, *(part for part in LANES if part not in FACTORS)]
    found = {"baseline"}
    for lane in lanes:
        joined = lane.split("+")
        for part in joined:
            if part not in LANES:
                raise InputError(f"--lanes {lane}: there is no lane {part}; there are "
                                 f"{', '.join(LANES)}, and several joined by +")
            if part.startswith("baseline") and lane != part:
                raise InputError(f"--lanes {lane}: a baseline changes nothing that could be joined")
            if joined.count(part) > 1:
                raise InputError(f"--lanes {lane}: the same one twice")
        found |= {"+".join(sorted(joined, key=parts.index)), against(lane)}

    def place(lane: str):
        single = list(LANES).index(lane) if lane in LANES else len(LANES)
        return single, lane.count("+"), [parts.index(part) for part in lane.split("+")]
    return sorted(found, key=place)


# ---- The folder ----------------------------------------------------------------------------------
#
# sweep.json says what the folder is a sweep of; runs/ holds, for each run, train.py's files, the
# .log of what it printed and the .diagnosis.json that the report is made of. A run's name ends in a
# hash of its settings, so that what is there under that name is what was asked for.

MARK = {"format": "routed-inr sweep", "version": 1}
COMPILE = {None: [], True: ["--compile"], False: ["--no-compile"]}


def diagnosis_path(args) -> Path:
    return Path(args.out).with_suffix(".diagnosis.json")


class Sweep:
    """Lanes and seeds: with what settings a run is made, where it lies, what has come out."""

    def __init__(self, folder: Path, mark: dict):
        self.folder, self.threads, self.facts = folder, mark["threads"], mark["facts"]
        self.cover(mark)

    def cover(self, mark: dict):
        self.base, self.lanes = argparse.Namespace(**mark["settings"]), mark["lanes"]
        self.seeds = list(range(self.base.seed, self.base.seed + mark["seeds"]))

    @functools.cached_property
    def depth(self) -> int:
        return capacity_depth(self.base, self.facts[0], len(self.facts[1]))

    def change(self, part: str, seed: int, highest: int | None) -> dict | None:
        """What a part of a lane changes; None where that hangs on a baseline not finished yet."""
        if part == "deeper":
            return {"reader_depth": self.depth}
        if part == "column-random":
            column = torch.randint(self.base.width, (), generator=generator("column", seed))
            return {"branch": f"column:{int(column)}"}
        if part == "column":
            found = self.result("baseline", seed) or {"highest_column": highest}
            column = found["highest_column"]
            return None if column is None else {"branch": f"column:{column}"}
        return LANES[part][1](self.base)

    def args(self, lane: str, seed: int, highest: int | None = None):
        """The settings of one run; None where they hang on a baseline that is not finished yet,
        unless `highest` stands for its column."""
        changes = {"seed": seed}
        for part in lane.split("+"):
            change = self.change(part, seed, highest)
            if change is None:
                return None
            for key in set(change) & set(changes):
                raise InputError(f"--lanes {lane}: two of its parts set {flag(key)}")
            changes |= change
        args = changed_by(self.base, changes)
        known = json.dumps(counted(args), sort_keys=True)
        name = f"{lane}-seed{seed}-{hashlib.sha256(known.encode()).hexdigest()[:8]}.pt"
        args.out = str(self.folder / "runs" / name)
        return args

    def result(self, lane: str, seed: int) -> dict | None:
        """What came out of a run; None where it is not finished and diagnosed."""
        args = self.args(lane, seed)
        if args is None or not diagnosis_path(args).exists():
            return None
        try:
            result = json.loads(diagnosis_path(args).read_text())
            if not set(REPORTED) <= set(result):
                raise ValueError
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{diagnosis_path(args)}: damaged; delete it, and it is made "
                             "again") from error
        return result | {"lane": lane, "seed": seed, "command": self.command(args),
                         "checkpoint": args.out}

    def command(self, args) -> str:
        """What makes this run by itself, to the last bit on the same machine."""
        alone = changed_by(args, {"out": Path(args.out).name.rsplit("-", 1)[0] + ".pt"})
        return " ".join([f"OMP_NUM_THREADS={self.threads}", command_line(alone),
                         *COMPILE[args.compile]])

    def whole_command(self) -> str:
        """What makes all runs and their report, whatever commands they came from."""
        base = changed_by(self.base, {"out": RECIPE["out"]})
        flags = command_line(base).removeprefix(f"{LAUNCH} train.py")
        return " ".join([f"OMP_NUM_THREADS={self.threads} python interventions.py{flags}",
                         *COMPILE[base.compile], "--lanes", *self.lanes,
                         f"--seeds {len(self.seeds)} --out", shlex.quote(str(self.folder))])


def write(path: Path, text: str):
    """Whole or not at all, whatever other process writes it too."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_json(path: Path, content: dict):
    write(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_mark(folder: Path) -> dict | None:
    """What the folder is a sweep of; None where there is none yet. InputError: a folder with
    something else in it."""
    types = {"threads": int, "settings": dict, "facts": list, "lanes": list, "seeds": int}
    try:
        mark = json.loads((folder / "sweep.json").read_text())
        sound = mark | MARK == mark and all(isinstance(mark[key], t) for key, t in types.items())
        saved = parser().parse_args(as_flags(mark["settings"]))    # as a user's flags are checked
        in_order(mark["lanes"])
        if sound and "dataset" in saved and "size" in saved and mark["seeds"] > 0 < mark["threads"]:
            known = {key: mark["settings"].get(key, usual) for key, usual in RECIPE.items()}
            return mark | {"settings": known}                      # without what is no setting now
    except FileNotFoundError:
        if not folder.exists() and folder.parent.is_dir():
            return None
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else ["a file"]
        if all(name == "runs" or name.startswith("sweep.json.") for name in names):
            return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, InputError):
        pass
    if not folder.exists():
        raise InputError(f"--out {folder}: there is no folder {folder.parent}")
    raise InputError(f"--out {folder}: holds something else than a sweep of this program; name "
                     "another folder")


def widen(folder: Path, mark: dict) -> dict:
    """Writes sweep.json, with what other commands with the same settings asked for."""
    marks = [found for found in (read_mark(folder), mark) if found]
    shared = [{key: value for key, value in m["settings"].items() if key not in FREE | {"seed"}}
              for m in marks]
    if shared[0] == shared[-1]:
        first = min(m["settings"]["seed"] for m in marks)
        end = max(m["settings"]["seed"] + m["seeds"] for m in marks)
        mark = mark | {"lanes": in_order([lane for m in marks for lane in m["lanes"]]),
                       "settings": mark["settings"] | {"seed": first}, "seeds": end - first}
    write_json(folder / "sweep.json", mark)
    return mark


# ---- Runs ----------------------------------------------------------------------------------------
#
# Run after run in this process, each by train.main: what its printed command would do. So that two
# sweeps do not make the same run, it is claimed first, by a file that only one of them can create.
# A claim whose process is gone is taken over: at once where it was made on this machine, else when
# claim and checkpoint have been silent for so long that a run at work would have saved.

SILENT_MINUTES = 10            # or twice --save-minutes, where that is longer
OWNER = f"{os.getpid()} {platform.node()}"


def claim_path(args) -> Path:
    return Path(args.out).with_suffix(".claim")


def alive(pid: int) -> bool:
    """Whether another process of that number runs on this machine."""
    if os.name != "posix" or pid == os.getpid():           # elsewhere signal 0 is no question
        return os.name != "posix"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def stale(args) -> bool:
    """Whether the run's claim may be taken over."""
    try:
        pid, _, host = claim_path(args).read_text().partition(" ")
        if host == platform.node() and pid.isdecimal() and not alive(int(pid)):
            return True
        files = [path for path in (claim_path(args), Path(args.out)) if path.exists()]
        last = max(path.stat().st_mtime for path in files)
    except FileNotFoundError:                  # just released
        return False
    return time.time() - last > 60 * max(SILENT_MINUTES, 2 * args.save_minutes)


def claim(args) -> bool:
    """Whether the run is this process's now."""
    try:
        with open(claim_path(args), "x") as f:
            f.write(OWNER)
        return True
    except FileExistsError:
        if not stale(args):
            return False
    write(claim_path(args), OWNER)
    time.sleep(0.2)                            # of several that take it over the last one has it
    return owned(args)


def owned(args) -> bool:
    return claim_path(args).exists() and claim_path(args).read_text() == OWNER


def release(args):
    if owned(args):
        claim_path(args).unlink()


def make(args) -> str:
    """Trains a run, or goes on training it, and diagnoses it, its output into its log. Returns ""
    or, where it failed, its last words. SystemExit: stopped by a signal."""
    flags = as_flags(vars(args) | {"compile": None}) + COMPILE[args.compile]
    if Path(args.out).exists():                # these may have changed since
        here = ("out", "data_root", "workers", "device")
        flags = ["--resume", *as_flags({key: getattr(args, key) for key in here})]
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()                 # as in a process of its own
    log = Path(args.out).with_suffix(".log")
    with open(log, "a", buffering=1) as f, contextlib.redirect_stdout(f), \
            contextlib.redirect_stderr(f):
        try:
            train.main(flags)
            if owned(args):
                claim_path(args).touch()       # not silent
            with exits("diagnosis"):
                write_json(diagnosis_path(args), diagnose(args))
            return ""
        except (OSError, RuntimeError):        # a full disk, no memory
            traceback.print_exc()
        except SystemExit as error:
            if error.code >= 128:
                raise
    return log.read_text(errors="replace").strip().splitlines()[-1]


@contextlib.contextmanager
def ended_by_signals():
    """Ctrl-C and SIGTERM raise SystemExit; while it trains train.py saves first."""
    def end(number, _):
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except SystemExit as error:
        raise Stop(error.code, "stopped; the same command goes on") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def work(sweep: Sweep) -> tuple[dict, list[str]]:
    """Makes what is not finished, seed by seed. Returns {(lane, seed): last words} of what failed,
    and what other processes are making."""
    failed, elsewhere = {}, []
    todo = [(lane, seed) for seed in sweep.seeds for lane in sweep.lanes
            if sweep.result(lane, seed) is None]
    torch.set_num_threads(sweep.threads)
    with ended_by_signals(), tqdm(todo, "runs", unit="run", disable=None) as bar:
        for lane, seed in bar:
            bar.set_postfix_str(f"{lane}, seed {seed}")
            args, words = sweep.args(lane, seed), ""
            if args is None and ("baseline", seed) in failed:
                words = "it needs its seed's baseline, which failed"
            elif args is None or not claim(args):
                elsewhere.append(f"{lane} seed {seed}")
                continue
            else:
                try:
                    if sweep.result(lane, seed) is None:       # nor made by another since
                        words = make(args)
                finally:
                    release(args)
            if words:
                failed[lane, seed] = words
                tqdm.write(f"{lane}, seed {seed} failed: {words}", file=sys.stderr)
            else:
                found = sweep.result(lane, seed)
                tqdm.write(f"{lane:18s} seed {seed}  accuracy {100 * found['reader']:.2f}%  "
                           f"PSNR {found['psnr']:.2f} dB  purity {found['purity']:.3f}  "
                           f"{found['seconds']:.0f} s", file=sys.stdout)
    return failed, elsewhere


# ---- Diagnosis -----------------------------------------------------------------------------------
#
# What the report takes from one run, all on the test images: the model's own predictions, geometry
# of the weights and of every stage of the reader (diagnostics.py), what exchanging the bias column
# between images costs, and as much for the column of highest energy. Does the bias column tell the
# mean colour? R^2 of a regression on its four first principal components.

def predictions(model, fits: Fitted, column: int = -1, order: Tensor | None = None) -> Tensor:
    """The model's own (n,), with the mean colour where a branch takes it; with `order`, a column of
    the tokens is that of the images it names."""
    found = []
    for rows in torch.arange(len(fits.labels)).split(BLOCK):
        tokens, draws = fits.tokens[rows].clone(), model.inner_loop.steps + 1
        if order is not None:
            tokens[..., column] = fits.tokens[order[rows], :, column]
        values = model.look(fits.images[rows], draws)[1]           # as it saw them
        found.append(model.logits(tokens, values).argmax(-1))
    return torch.cat(found)


def loss_without(model, fits: Fitted, right: Tensor, column: int) -> tuple[float, float, float]:
    """Accuracy lost with a column exchanged between images, five times."""
    lost = []
    for repeat in range(5):
        guesses = predictions(model, fits, column, donors(fits.labels, "any", repeat, 0))
        lost.append(right.double() - (guesses == fits.labels).double())
    return bootstrap(torch.stack(lost, 1), over_repeats())


def colour_told(bank: Fitted, queries: Fitted) -> float:
    """R^2 of the mean colour on four principal components of the bias column."""
    mean, components, _ = principal(bank.tokens[..., -1])
    x, x_test = ((each.tokens[..., -1] - mean) @ components[:, :4] for each in (bank, queries))
    y, y_test = (each.images.mean((2, 3)) for each in (bank, queries))
    told = [r2[0] for r2 in regression(x, y, x_test, y_test) if r2]
    return statistics.fmean(told) if told else 0.0


def diagnose(args) -> dict:
    content, device = read_checkpoint(args.out), find_device(args.device)
    model = model_from(content, args.out, device).eval().requires_grad_(False)
    model.bf16 = False                         # small differences are compared
    images, test = load_dataset(args, device)
    bank, queries = (fit_all(model.fit, x, device, args.workers) for x in (images, test))
    guesses = predictions(model, queries)
    right = guesses == queries.labels
    with seeded("reader", args.seed):
        untrained = type(model.reader)(*model.reader.arguments).to(device)
    untrained.requires_grad_(False)
    geometry = clustering(coordinate_systems(model, bank, queries), bank.labels, queries.labels,
                          guesses, probe=False)
    flow = token_flow(model.trace, untrained.trace, bank, queries, flattened=False, probe=False)
    highest = int(covariance(bank.tokens).diagonal()[:-1].argmax())
    permuted = loss_without(model, queries, right, -1)
    parameters, flops = cost(args, images.channels, len(images.classes))
    epochs = [epoch["seconds"] for epoch in content["metrics"]["epochs"]]
    return {"name": Path(args.out).stem, "training": vars(args),
            "reader": accuracy(guesses, queries.labels),
            "right": "".join(map(str, right.int().tolist())),
            "psnr": content["metrics"]["test_psnr"],
            "seconds": len(epochs) * statistics.median(epochs), "parameters": parameters,
            "gflop_per_image": flops / 1e9, "purity": geometry["purity"], "gap": geometry["gap"][0],
            "last_knn10": flow["rows"][-1]["pooled_knn10"], "permuted": permuted,
            "lost": permuted[0], "highest_column": highest,
            "highest_permuted": loss_without(model, queries, right, highest),
            "colour_r2": colour_told(bank, queries),
            "experiments": {"clustering": geometry, "token-flow": flow}, **environment(device)}


# ---- Statistics ----------------------------------------------------------------------------------
#
# A lane less its baseline, paired by seed: t interval over seeds; with one seed, paired bootstrap
# over the test images. The three factors alone and joined are a 2^3 factorial design, in accuracy
# and in log-odds, since on a bounded scale equal gains shrink near its ends: an interaction counts
# only if both scales show it.

CELLS = list(itertools.product((0, 1), repeat=len(FACTORS)))
SUBSETS = [subset for size in (1, 2, 3)
           for subset in itertools.combinations(range(len(FACTORS)), size)]


def lane_of(cell: tuple[int, ...]) -> str:
    return "+".join(factor for factor, on in zip(FACTORS, cell) if on) or "baseline"


def contrast(subset: tuple[int, ...]) -> Tensor:
    """Coefficients (8,) over CELLS of a main effect, the mean with the factor less the mean
    without; or of an interaction, the difference of such differences (Fisher 1935; here not
    halved), each averaged over the factors not in it."""
    signs = [math.prod(1 if cell[f] else -1 for f in subset) for cell in CELLS]
    return torch.tensor(signs, dtype=torch.float64) / 2 ** (len(FACTORS) - len(subset))


def additive(cell: tuple[int, ...]) -> Tensor:
    """Coefficients (8,) over CELLS of the baseline plus the gains of the cell's single factors."""
    c = torch.zeros(len(CELLS), dtype=torch.float64)
    c[0] = 1 - sum(cell)
    for f, on in enumerate(cell):
        c[CELLS.index(tuple(int(g == f) for g in range(len(cell))))] += on
    return c


# What is asked of the cells: effects and interactions, and what each joined cell has beyond the
# single gains.
ASKED = {" x ".join(FACTORS[f] for f in subset): contrast(subset) for subset in SUBSETS}
for cell, itself in zip(CELLS, torch.eye(len(CELLS), dtype=torch.float64)):
    if sum(cell) > 1:
        ASKED[f"{lane_of(cell)} - additive"] = itself - additive(cell)
JOINED = f"{'+'.join(FACTORS)} - additive"     # this one alone decides: one chance of error


def log_odds(p: Tensor, n: int) -> Tensor:
    """Of shares p of n images, half an image added to either side (Haldane 1956): finite."""
    return ((p * n + 0.5) / (n - p * n + 0.5)).log()


def factorial(y: Tensor) -> dict[str, tuple[float, float, float]]:
    """ASKED of y (8 cells, 2 seeds or more): value and t interval from the pooled residual of
    cells + seeds, with (8 - 1)(seeds - 1) degrees of freedom."""
    cells, seeds = y.shape
    freedom = (cells - 1) * (seeds - 1)
    residual = y - y.mean(1, keepdim=True) - y.mean(0) + y.mean()
    variance = float(residual.square().sum()) / freedom
    found = {}
    for name, c in ASKED.items():
        value = float(c @ y.mean(1))
        half = t_quantile(freedom) * math.sqrt(variance * float(c @ c) / seeds)
        found[name] = (value, value - half, value + half)
    return found


def factorial_over_images(right: Tensor, odds: bool = False) -> dict:
    """The same for one seed, right (n, 8): intervals over the test images."""
    def ask(c: Tensor, means: Tensor) -> Tensor:
        return (log_odds(means, len(right)) if odds else means) @ c

    return {name: bootstrap(right, partial(ask, c)) for name, c in ASKED.items()}


def factorial_report(found: dict[str, list[dict]]) -> dict | None:
    """Of the seeds that have all eight cells; None without one."""
    runs = [{r["seed"]: r for r in found.get(lane_of(cell), [])} for cell in CELLS]
    seeds = sorted(set.intersection(*map(set, runs)))
    if not seeds:
        return None
    y = torch.tensor([[of[seed]["reader"] for seed in seeds] for of in runs], dtype=torch.float64)
    if len(seeds) > 1:
        scales = factorial(y), factorial(log_odds(y, len(runs[0][seeds[0]]["right"])))
    else:
        right = torch.stack([hits(of[seeds[0]]) for of in runs], 1)
        scales = factorial_over_images(right), factorial_over_images(right, odds=True)
    cells = [{"lane": lane_of(cell), "measured": float(y[i].mean()),
              "additive": float(additive(cell) @ y.mean(1))} for i, cell in enumerate(CELLS)]
    return {"seeds": len(seeds), "accuracy": scales[0], "log_odds": scales[1], "cells": cells}


def hits(result: dict) -> Tensor:
    """Which test images a run reads right (n,)."""
    return torch.tensor([float(c) for c in result["right"]], dtype=torch.float64)


def difference(found: dict[str, list[dict]], lane: str, other: str, key="reader") -> dict | None:
    """lane - other, over the seeds that both have; None where there is none."""
    pairs = [(a, b) for a in found.get(lane, []) for b in found.get(other, [])
             if a["seed"] == b["seed"]]
    if not pairs or lane == other:
        return None
    differences = [a[key] - b[key] for a, b in pairs]
    interval = t_interval(differences)
    if interval is None and key == "reader":
        interval = paired_bootstrap(*map(hits, pairs[0]))
    return {"lane": lane, "minus": other, "seeds": len(pairs),
            "interval": interval or (differences[0], None, None)}


MEASURED = ("reader", "psnr", "purity", "gap", "last_knn10", "lost", "colour_r2", "seconds")
REPORTED = (*MEASURED, "permuted", "highest_column", "highest_permuted", "parameters",
            "gflop_per_image", "device", "threads", "versions", "right", "training", "experiments")


def lane_row(found: dict[str, list[dict]], lane: str) -> dict:
    """A lane's figures: of each measure the mean and, over seeds, the standard deviation."""
    results = found[lane]
    row = {"lane": lane, "n": len(results), "minus": against(lane),
           "difference": difference(found, lane, against(lane)),
           "purity_difference": difference(found, lane, against(lane), "purity")}
    for key in MEASURED:
        values = [r[key] for r in results]
        row[key] = (statistics.fmean(values),
                    statistics.stdev(values) if len(values) > 1 else None)
    row |= {key: results[0][key] for key in ("parameters", "gflop_per_image")}
    return row | {key: results[0]["training"][key] for key in ("w_task", "w_cluster")}


def summarise(found: dict[str, list[dict]]) -> dict:
    """All figures of the report. found: each lane's results, one a seed."""
    rows, controls = [lane_row(found, lane) for lane in found], []
    for row in rows:
        control = difference(found, row["lane"], "deeper")
        if control and row["lane"] in (*FACTORS, *COMBINED):
            deeper = found["deeper"][0]
            dearer = any(row[key] > deeper[key] for key in ("parameters", "gflop_per_image"))
            controls.append(control | {"gain": row["difference"]["interval"], "dearer": dearer})
    pairs = [difference(found, *names) for names in
             (("bias", "column"), ("bias", "column-random"), ("colour", "centred"))]
    models = {}                # two lanes may be the same: a model counts once
    for point in claims.points([r for results in found.values() for r in results]):
        models.setdefault((point["setting"], point["seed"]), point)
    return {"lanes": rows, "controls": controls, "factorial": factorial_report(found),
            "pairs": [pair for pair in pairs if pair],
            "across": claims.across(list(models.values())),
            "late": [r["experiments"]["token-flow"]["late_minus_half"]
                     for r in found.get("baseline", [])]}


# ---- Claims --------------------------------------------------------------------------------------
#
# A sentence a claim, with its rule beside the verdict; ABOUT, below, says what C1, C2 and C4 are.

FEW = "not decided here (fewer than three seeds)"


def shown(interval, factor: float = 1, digits: int = 1) -> str:
    """value [low, high], or the value alone."""
    return span(interval, factor, digits).removesuffix(" (no interval)")


def over(seeds: int, images: str) -> str:
    return f"over {seeds} seeds" if seeds > 1 else f"over {images}, one seed"


def baseline_claims(report: dict, images: str) -> list[str]:
    """C1 and C2 of the baseline."""
    across, baseline = report["across"], report["lanes"][0]
    verdicts = [line for line in across["verdicts"]
                if line.startswith(("C1, baseline:", "C2, baseline:"))]
    if verdicts or baseline["lane"] != "baseline":
        return verdicts
    verdict = FEW
    if baseline["n"] >= 3:
        verdict = "not decided here (the baseline's architecture is not that of most models)"
    rho = {key: (c or {}).get("spearman", {}) for key, c in across["correlations"].items()}
    purity = rho.get("purity", {}).get("phi - theta")
    last = rho.get("stage purity", {}).get("last - first")
    models = f"over {across['models']} models of one architecture" if purity else "too few models"
    late = ", ".join(shown(interval, 100) for interval in report["late"])
    return [f"C1: {verdict}. Reader - best geometry {100 * baseline['gap'][0]:+.1f} points (rule: "
            f"> 2); Spearman's rho(purity of phi - theta, accuracy) {shown(purity, 1, 2)}, "
            f"{models} (rule: < 0.5)",
            f"C2: {verdict}. rho(purity at the last stage) - rho(purity of phi - theta) "
            f"{shown(last, 1, 2)}, {models} (rule: > 0); rise of 10-NN in the second half of the "
            f"baseline's blocks - half of the rise {late} points over {images} (rule: > 0)"]


def contrast_claims(report: dict, images: str) -> list[str]:
    """C1: what the class loss and the contrastive loss do to purity and accuracy."""
    lines = []
    for pair in report["across"].get("pairs", []):
        interval = pair["interval"] or (pair["mean"], None, None)
        lines.append(f"C1: purity of phi - theta, w_task {pair['w_task']:g} minus 0, same seeds: "
                     f"{shown(interval, 1, 3)}, n = {pair['n']}")
    for row in report["lanes"]:
        if row["lane"].startswith("cluster") and row["difference"]:
            purity, gain = (row[key]["interval"] for key in ("purity_difference", "difference"))
            lines.append(f"C1, {row['lane']} against {row['minus']}: purity of phi - theta "
                         f"{shown(purity, 1, 3)}, accuracy {shown(gain, 100)} points, "
                         + over(row["difference"]["seeds"], images))
    return lines


def capacity_claims(report: dict, images: str) -> list[str]:
    """C4: does a lane help beyond the capacity control?"""
    lines = []
    for control in report["controls"]:
        beyond, gain = control["interval"], control["gain"]
        verdict = FEW
        if control["seeds"] >= 3:
            verdict = decide(side(beyond, 0) > 0 and side(gain, 0) > 0, side(beyond, 0) < 0)
        lines.append(f"C4, {control['lane']}: {verdict}. Accuracy - that of the capacity control "
                     f"{shown(beyond, 100)} points, - the baseline's {shown(gain, 100)}, "
                     f"{over(control['seeds'], images)} (rule: both > 0, refuted if the first is "
                     "< 0)" + "; this lane is dearer than the control" * control["dearer"])
    return lines or ["C4: not measured: that takes the lane deeper and one or more of route, bias, "
                     "dense"]


def additivity_claim(found: dict, images: str) -> str:
    """C4: do the gains of all three factors add up? found: the report's factorial."""
    beyond, odds = (found[scale][JOINED] for scale in ("accuracy", "log_odds"))
    verdict = "not decided here"
    if found["seeds"] < 3:
        verdict = FEW
    elif side(beyond, 0) == side(odds, 0) != 0:
        verdict = "not additive"
    elif side(beyond, -POINTS) > 0 > side(beyond, POINTS):
        verdict = "additive"
    return (f"C4, adding up: {verdict}. All three together - the sum of their single gains "
            f"{shown(beyond, 100)} points, {shown(odds, 1, 2)} in log-odds, "
            f"{over(found['seeds'], images)} (rule: not additive if both exclude 0 on the same "
            "side, additive if within 2 points of 0)")


def all_claims(report: dict, images: str = "test images") -> list[str]:
    lines = [*baseline_claims(report, images), *contrast_claims(report, images),
             *capacity_claims(report, images)]
    if report["factorial"]:
        lines.append(additivity_claim(report["factorial"], images))
    lines += [f"{pair['lane']} - {pair['minus']}: accuracy {shown(pair['interval'], 100)} points, "
              + over(pair["seeds"], images) for pair in report["pairs"]]
    return [*lines, "Intervals are of one comparison each: not corrected for their number."]


# ---- Report --------------------------------------------------------------------------------------

ABOUT = """\
phi - theta: how far the fitted weights phi of an image moved from the anchor theta that all images
share. Reader - best geometry: the reader's accuracy less that of the best of k-NN and nearest class
mean on phi - theta. w_task: weight of the class loss for the INR. Capacity control: the lane
deeper. Stages of the reader: input tokens, input map, attention and MLP of each block.

C1: class feedback, or pressure to cluster, does not make the weights' geometry track the reader's
accuracy. C2: purity goes with accuracy only at late stages of the reader. C4: a stronger readout
(route), a bias route (bias), denser fitting (dense) help beyond a deeper reader of the same cost,
and do not add up."""
COLUMNS = (
    "n: seeds. accuracy: of the reader on {images}, mean ± sd over seeds; - baseline: points, "
    "paired over the seeds that both have, [95% t interval, for these {images}], with one seed "
    "[over {images}] (lanes cluster...: against baseline64). PSNR in dB{estimate}. purity: share "
    "of an image's 10 nearest {images} in phi - theta that have its class. 10-NN: % at the "
    "reader's last stage, mean over tokens (over the queries where there are some), a branch left "
    "out. lost: points of accuracy with the bias column permuted over the images.")
FACTORIAL = (
    "A factor alone: accuracy with it less without it, over the four settings of the other two; a "
    "x b: the difference of such differences; a+b - additive: what the joined lane has beyond the "
    "baseline plus the gains of its single lanes.")
COST = (
    "training: the median epoch's wall time, beside whatever else ran, times the epochs; GFLOP an "
    "image: counted, of the matrix products of one training step; colour R²: how well four "
    "principal components of the bias column tell an image's mean colour, on images not fitted to.")
FIGURES = {"lanes.png": (figures.lanes_figure, "Accuracy less the baseline's"),
           "clusters.png": (figures.clusters_figure, "Purity of the weights against accuracy"),
           "factorial.png": (figures.factorial_figure,
                             "Effects and interactions of the three factors"),
           "population.png": (figures.population_figure,
                              "Which stage's purity goes with accuracy")}


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table that reads on a terminal too; numbers are flush right."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    left = [i == 0 or name in ("flags", "what changes") for i, name in enumerate(header)]

    def line(cells):
        return "| " + " | ".join(cell.ljust(w) if to_left else cell.rjust(w)
                                 for cell, w, to_left in zip(cells, widths, left)) + " |"
    rule = "|".join("-" * (w + 1) + ("-" if to_left else ":") for w, to_left in zip(widths, left))
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])


def plus_minus(pair, factor: float = 1, digits: int = 1) -> str:
    return " ± ".join(f"{factor * x:.{digits}f}" for x in pair if x is not None)


def lane_table(report: dict) -> str:
    rows = []
    for r in report["lanes"]:
        gain = shown(r["difference"]["interval"], 100) if r["difference"] else ""
        rows.append([r["lane"], str(r["n"]), plus_minus(r["reader"], 100), gain,
                     f"{r['psnr'][0]:.1f}", f"{r['purity'][0]:.3f}",
                     f"{100 * r['last_knn10'][0]:.1f}", f"{100 * r['lost'][0]:.1f}"])
    return markdown(["lane", "n", "accuracy %", "- baseline", "PSNR", "purity", "10-NN", "lost"],
                    rows)


def cost_table(report: dict, found: dict[str, list[dict]], base) -> str:
    rows = []
    for r in report["lanes"]:
        training = found[r["lane"]][0]["training"]
        flags = " ".join(as_flags({key: value for key, value in training.items() if key not in
                                   FREE | {"seed"} and value != vars(base).get(key)}))
        what = " and ".join(LANES[part][0] for part in r["lane"].split("+"))
        rows.append([r["lane"], what, flags and f"`{flags}`", f"{r['parameters']:,}",
                     f"{r['gflop_per_image']:.3g}", plus_minus(r["seconds"], 1, 0),
                     plus_minus(r["colour_r2"], 1, 2)])
    return markdown(["lane", "what changes", "flags", "parameters", "GFLOP an image", "training, s",
                     "colour R²"], rows)


def factorial_tables(found: dict) -> list[str]:
    effects = [[name, shown(interval, 100), shown(found["log_odds"][name], 1, 3)]
               for name, interval in found["accuracy"].items()]
    cells = [[cell["lane"], *(f"{100 * cell[key]:.1f}" for key in ("measured", "additive"))]
             for cell in found["cells"]]
    return [markdown(["", "accuracy, points", "log-odds"], effects),
            markdown(["cell", "measured %", "singles added up %"], cells)]


def heading(sweep: Sweep, runs: list[dict], images: str, missing: list[str], failed: dict) -> str:
    seeds, lanes, plural = sweep.seeds, {r["lane"] for r in runs}, "s" * (sweep.threads > 1)
    hardware = {f"{r['device']}, {r['threads']} thread{plural} a run, torch "
                f"{r['versions']['torch']}" for r in runs}
    line = (f"Lanes: {len(lanes)}; {len(seeds)} seed{'s' * (len(seeds) > 1)} "
            f"({', '.join(map(str, seeds))}); runs: {len(runs)}; {len(runs[0]['right'])} {images}; "
            f"{'; '.join(sorted(hardware))}.")
    if missing:
        many = f"{len(missing)} runs, named in report.json"
        line += f" Not finished: {many if len(missing) >= 10 else ', '.join(missing)}."
    return "\n".join([line, *(f"Failed: {lane}, seed {seed}: {words}."
                              for (lane, seed), words in failed.items())])


def write_report(sweep: Sweep, failed: dict) -> bool:
    """report.md, report.json and figures in the folder, tables on the terminal. False where
    nothing is finished."""
    results = {lane: [sweep.result(lane, seed) for seed in sweep.seeds] for lane in sweep.lanes}
    missing = [f"{lane} seed {seed}" for lane in results
               for seed, result in zip(sweep.seeds, results[lane]) if not result]
    found = {lane: [r for r in of if r] for lane, of in results.items() if any(of)}
    runs, base = [r for of in found.values() for r in of], sweep.base
    images = "held-out training images" if base.val else "test images"
    if not runs:
        return False
    if len({len(r["right"]) for r in runs}) > 1:
        raise InputError(f"{sweep.folder}: its runs saw different numbers of {images}: the data "
                         "were changed in between")
    report, drawn = summarise(found), []
    for name, (draw, _) in FIGURES.items():
        (sweep.folder / name).unlink(missing_ok=True)          # an earlier report's
        drawn += [name] if draw(sweep.folder / name, report, images) else []
    lines = all_claims(report, images)
    estimate = ", an estimate over drawn pixels" if base.fraction < 1 else ""
    columns = COLUMNS.format(images=images, estimate=estimate)
    text = [f"# Interventions on {base.dataset}, {base.size}x{base.size} pixels",
            f"`{sweep.whole_command()}`", heading(sweep, runs, images, missing, failed),
            lane_table(report), columns, "## Claims", ABOUT,
            "\n".join(f"- {line}" for line in lines),
            *(f"![{FIGURES[name][1]}]({name})" for name in drawn)]
    if report["factorial"]:
        text += ["## Do gains add up", FACTORIAL, *factorial_tables(report["factorial"])]
    text += ["## Cost", COST, cost_table(report, found, base), "## Commands",
             "Each gives its run by itself, bit for bit on the same machine.",
             "\n".join(["```", *(r["command"] for r in runs), "```"])]
    write(sweep.folder / "report.md", "\n\n".join(text) + "\n")
    kept = ("lane", "seed", "command", "checkpoint", *REPORTED[:-3])
    write_json(sweep.folder / "report.json", {
        "command": sweep.whole_command(), "flags": vars(base),
        "failed": {f"{lane}, seed {seed}": words for (lane, seed), words in failed.items()},
        "missing": missing, "claims": lines, **report,
        "runs": [{key: r[key] for key in kept} for r in runs]})
    files = ", ".join(f"{sweep.folder}/{name}" for name in ("report.md", "report.json", *drawn))
    print("\n\n".join([lane_table(report), fold(columns), fold("\n".join(lines))]))
    print(f"wrote {files}")
    return True


# ---- The program ---------------------------------------------------------------------------------

OWN = ("lanes", "seeds", "report_only", "out")
UNUSED = ("resume", "eval_only", "ckpt", "steps_test")         # the diagnosis fits with k steps


def sweep_parser() -> Parser:
    p = Parser(prog="interventions.py", parents=[parser()], conflict_handler="resolve",
               description=__doc__.split("\n\n")[0], argument_default=argparse.SUPPRESS,
               allow_abbrev=False)
    group = p.add_argument_group("sweep")
    group.add_argument("--lanes", nargs="+", metavar="LANE", help=f"all, or some of "
                       f"{', '.join(LANES)}, or several joined by + (default all)")
    group.add_argument("--seeds", type=whole(1), help="so many, from --seed on (default 3)")
    group.add_argument("--report-only", action="store_true", help="report what is in --out")
    group.add_argument("--out", help="folder of the sweep")
    return p


def check(sweep: Sweep):
    """InputError: a lane that train.py would refuse, or that is the same as another."""
    seen = {}
    for lane in sweep.lanes:
        args, images = sweep.args(lane, sweep.seeds[0], highest=0), sweep.facts[2]
        try:
            given = {key: value for key, value in vars(args).items() if value not in (None, False)}
            settings(given)
        except InputError as error:
            raise InputError(f"--lanes {lane}: {error}") from error
        if args.batch_size > images:
            raise InputError(f"--lanes {lane}: batches of {args.batch_size}, but there are only "
                             f"{images} training images")
        same = seen.setdefault(json.dumps(counted(args)), lane)
        if same != lane and not lane.startswith(("baseline", "column")):       # may be by chance
            raise InputError(f"--lanes {lane}: with these flags it is the same as {same}")


def open_sweep(folder: Path, given: dict) -> tuple[Sweep, dict]:
    """The sweep that was asked for, and what sweep.json is to say of it. InputError: all that can
    be wrong, before the first run."""
    lanes = given.get("lanes", ["all"])
    lanes = [*lanes, *LANES, *COMBINED] if "all" in lanes else lanes
    lanes = in_order([lane for lane in lanes if lane != "all"])
    base = settings({key: value for key, value in given.items() if key not in OWN})
    before = read_mark(folder)
    for key in ("dataset", "size", "train_size", "test_size", "val") if before else ():
        if before["settings"][key] != getattr(base, key):
            raise InputError(f"--out {folder}: holds a sweep with {flag(key)} "
                             f"{before['settings'][key]}, not {getattr(base, key)}; name another "
                             "folder")
    find_device(base.device)
    facts = list(train.facts(load_dataset(base, train=False)[0]))
    if before and before["facts"] != facts:
        raise InputError(f"--out {folder}: the data were changed since that sweep began: other "
                         "classes or number of images; name another folder")
    # One number of threads for all runs of a folder, since rounding depends on it.
    threads = before["threads"] if before else torch.get_num_threads()
    mark = MARK | {"threads": threads, "settings": vars(base), "facts": facts, "lanes": lanes,
                   "seeds": given.get("seeds", 3)}
    sweep = Sweep(folder, mark)
    check(sweep)
    return sweep, mark


def run(argv: list[str] | None):
    given = vars(sweep_parser().parse_args(argv))
    for key in UNUSED:
        if key in given:
            raise InputError(f"{flag(key)}: a flag of train.py alone")
    if "out" not in given:
        raise InputError("--out: name the sweep's folder")
    folder = Path(given["out"])
    if given.get("report_only"):
        if set(given) - {"out", "report_only"}:
            raise InputError("--report-only takes --out alone: the folder knows its sweep")
        mark = read_mark(folder)
        if mark is None:
            raise InputError(f"--out {folder}: no sweep there")
        if not write_report(Sweep(folder, mark), {}):
            raise Stop(1, "no run is finished yet: nothing to report")
        return
    sweep, mark = open_sweep(folder, given)
    try:
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        widen(folder, mark)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be written ({error.strerror})") from error
    failed, elsewhere = work(sweep)
    sweep.cover(widen(folder, mark))           # others may have asked for more meanwhile
    if not write_report(sweep, failed):
        print("no run is finished yet: nothing to report")
    if elsewhere:
        print(fold(f"being made by another process: {', '.join(elsewhere)}"))
    if failed:
        raise Stop(1, f"{len(failed)} of the runs failed; the same command tries them again")


def main(argv: list[str] | None = None):
    """Exit status: 0; 1 a run failed; 2 bad input; 130 or 143 stopped by Ctrl-C or SIGTERM."""
    with exits("interventions.py"):
        run(argv)


if __name__ == "__main__":
    main()
