"""Trains variants of the model ("lanes"), several seeds each, diagnoses every run, and asks what
each change does and whether gains add up.

    python interventions.py --dataset digits --lanes all --seeds 3 --out sweep
    python interventions.py --lanes baseline bias route route+bias deeper --epochs 5 --out sweep
    python interventions.py --report-only --out sweep      # of what is there

A lane is a few flags of train.py; any other flag holds for all. A stopped sweep goes on with the
same command. Several may share a folder, in a terminal each, with other --lanes or seeds (--seed 3
--seeds 2: 3 and 4): no run is made twice, and a report is of all that are there.

Top to bottom: lanes, the folder, a run, its diagnosis, statistics, claims, report, program.
"""
import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import platform
import re
import statistics
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import claims
import figures
import train
from bench import count_flops
from checkpoint import InputError, Stop, exits, generator, model_from, read_checkpoint, seeded
from claims import POINTS, decide, fold, side, span
from data import load_dataset
from diagnostics import Fitted, accuracy, clustering, coordinate_systems, fit_all, token_flow
from measures import bootstrap, paired_bootstrap, t_interval, t_quantile
from routes import BLOCK, donors
from settings import (FREE, RECIPE, Parser, as_flags, command_line, environment, find_device, flag,
                      parser, settings, whole)

# ---- Lanes ---------------------------------------------------------------------------------------
#
# A lane changes one thing; lanes joined by + change several. Each is compared with the baseline. A
# gain could come from mere size: `deeper` costs more than any single lane. Controls: `column` and
# `column-random` of `bias`, `centred` of `colour`, `baseline64` of the contrastive lanes, whose
# loss needs pairs of a class in a batch.

TASK = "another weight of the class loss"
CLUSTER = "batches of at least 64, and a contrastive loss on phi - theta"
LANES = {              # name: what changes, in words, in flags; None: `Sweep.change` has it
    "baseline": ("shared-anchor MWT", {}),
    "wt": ("no class loss for the INR", {"w_task": 0.0}),
    **{f"task{w:g}": (TASK, {"w_task": w}) for w in (0.001, 0.1, 1.0, 10.0)},
    "baseline64": ("batches of at least 64", {"batch_size": 64}),
    **{f"cluster{w:g}": (CLUSTER, {"batch_size": 64, "w_cluster": w}) for w in (0.01, 0.1, 1.0)},
    "route": ("learned queries gather the tokens, starting from their mean", {"readout": 8}),
    "bias": ("the bias column to the logits by a branch of its own", {"branch": "bias"}),
    "column": ("as bias, but the column of highest energy in its baseline", None),
    "column-random": ("as bias, but a random column, by the seed", None),
    "centred": ("the mean colour removed before fitting", {"centre_colour": True}),
    "colour": ("centred, with the mean colour through a branch like bias's",
               {"centre_colour": True, "branch": "colour"}),
    "dense": ("four more inner steps, on all pixels", None),
    "deeper": ("capacity control: a deeper reader", None)}
FACTORS = ("route", "bias", "dense")
CELLS = list(itertools.product((0, 1), repeat=3))      # which are on
CELL_LANES = ["+".join(itertools.compress(FACTORS, cell)) or "baseline" for cell in CELLS]


def place(lane: str) -> tuple:
    """Where a lane stands in a table: as in LANES, joined ones at the end."""
    return lane.count("+"), [list(LANES).index(part) for part in lane.split("+")]


def rivals(lane: str) -> list[str]:
    """The lanes that this one is compared with, its baseline first."""
    found = ["baseline64" if "cluster" in lane else "baseline"]
    if lane.startswith("task"):
        found.append("wt")
    if lane in CELL_LANES[1:]:
        found.append("deeper")
    return found + {"bias": ["column", "column-random"], "colour": ["centred"]}.get(lane, [])


def with_baselines(lanes: list[str]) -> list[str]:
    """The lanes asked for and their baselines, in order. InputError: no such lane."""
    found = {"baseline"}
    for lane in lanes:
        parts = lane.split("+")
        if not set(parts) <= set(LANES):
            raise InputError(f"--lanes {lane}: there are {', '.join(LANES)}, and joined by +")
        lane = "+".join(sorted(parts, key=place))
        found |= {lane, rivals(lane)[0]}
    return sorted(found, key=place)


def cost(args, facts) -> tuple[int, float]:
    """Parameters, and counted FLOPs of training on one image. facts: as `train.facts`."""
    model = train.MWT(args, facts[0], len(facts[1]))
    parameters = sum(p.numel() for p in model.parameters())
    return parameters, count_flops(model, args.batch_size) / args.batch_size


# ---- The folder ----------------------------------------------------------------------------------
#
# sweep.json holds what all runs share: written once, then compared. runs/ holds train.py's files of
# each run, a .log, and the .diagnosis.json that the report is made of: with it a run is finished.

FORMAT = {"format": "routed-inr sweep", "version": 1}
NAME = re.compile(r"(.+)-seed(\d+)(-[0-9a-f]{8})?\.diagnosis\.json")   # older ones end in a hash
MEASURED = ("reader", "psnr", "purity", "gap", "last_knn10", "lost", "seconds")


@dataclass
class Sweep:
    """What all runs of a folder share."""
    folder: Path
    base: argparse.Namespace       # settings
    threads: int                   # of every run, since rounding depends on it
    facts: list                    # channels, class names, number of training images

    def change(self, part: str, seed: int, highest_column: int | None = None) -> dict:
        """The flags that a part of a lane changes."""
        if part == "dense":
            return {"steps": self.base.steps + 4, "fraction": 1.0}
        if part == "deeper":
            return {"reader_depth": self.depth}
        if part == "column":
            return {"branch": f"column:{highest_column}"}
        if part == "column-random":
            column = torch.randint(self.base.width, (), generator=generator("column", seed))
            return {"branch": f"column:{int(column)}"}
        change = dict(LANES[part][1])
        if "batch_size" in change:
            change["batch_size"] = max(64, self.base.batch_size)
        return change

    @functools.cached_property
    def depth(self) -> int:
        """Of the lane deeper: the least with which the model has the parameters of the dearest
        single lane and a quarter more FLOPs, since the inner loop's FLOPs take longer. Every block
        adds the same. InputError: a depth that nobody would train."""
        has = self.base.reader_depth
        changes = [{}, {"reader_depth": has + 1},
                   *(self.change(lane, 0) for lane in ("route", "bias", "colour", "dense"))]
        now, one_more, *lanes = (cost(argparse.Namespace(**vars(self.base) | change), self.facts)
                                 for change in changes)
        parameters, flops = map(max, zip(*lanes))
        more = max(0, math.ceil((parameters - now[0]) / (one_more[0] - now[0])),
                   math.ceil((1.25 * flops - now[1]) / (one_more[1] - now[1])))
        if more >= 50:
            raise InputError(f"--lanes deeper: takes {more} more blocks to cost what dense does; "
                             "leave it out")
        return has + more

    def args(self, lane: str, seed: int, runs: dict) -> argparse.Namespace:
        """The settings of a run. runs: those that are there, for the baseline's column."""
        highest = runs.get(("baseline", seed), {}).get("highest_column")
        changes = {"seed": seed, "out": str(self.folder / "runs" / f"{lane}-seed{seed}.pt")}
        for part in lane.split("+"):
            change = self.change(part, seed, highest)
            for key in set(change) & set(changes):
                raise InputError(f"--lanes {lane}: two of its parts set {flag(key)}")
            changes |= change
        return argparse.Namespace(**vars(self.base) | changes)


def read_runs(folder: Path) -> dict[tuple[str, int], dict]:
    """The diagnosis of each finished run, by (lane, seed)."""
    found = {}
    for path in sorted((folder / "runs").glob("*.diagnosis.json")):
        try:
            lane, seed, _ = NAME.fullmatch(path.name).groups()
            run = json.loads(path.read_text())
            if not set(MEASURED) <= set(run):
                raise ValueError
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: damaged; delete it, and it is made again") from error
        found[lane, int(seed)] = run | {"lane": lane, "seed": int(seed)}
    return found


def read_sweep(folder: Path) -> Sweep | None:
    """None where there is none yet. InputError: a folder with something else in it."""
    try:
        found = json.loads((folder / "sweep.json").read_text())
        known = {key: found["settings"].get(key, usual) for key, usual in RECIPE.items()}
        if found | FORMAT == found:
            return Sweep(folder, argparse.Namespace(**known), found["threads"], found["facts"])
    except FileNotFoundError:
        if not folder.exists() or not any(folder.iterdir()):
            return None
    except Exception:          # whatever a file of something else brings
        pass
    raise InputError(f"--out {folder}: holds something else than a sweep; name another folder")


def write_json(path: Path, content: dict):
    """Whole or not at all, whatever other process writes it too."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


# ---- A run ---------------------------------------------------------------------------------------
#
# By train.main in this process, as its printed command would. It is claimed first, by a file that
# only one process can create. The claim of a process that is gone is taken over: at once where this
# machine can tell, else after ten minutes (or twice --save-minutes) without a new checkpoint.

OWNER = f"{os.getpid()} {platform.node()}"
COMPILE = {None: [], True: ["--compile"], False: ["--no-compile"]}


def claim(args) -> bool:
    """Whether the run is this process's now."""
    path = Path(args.out).with_suffix(".claim")
    try:
        with open(path, "x") as f:
            f.write(OWNER)
        return True
    except FileExistsError:
        if not abandoned(path, args):
            return False
    path.write_text(OWNER)
    time.sleep(0.2)                            # of several the last has it
    return path.read_text() == OWNER


def abandoned(path: Path, args) -> bool:
    """Whether the run's process is gone."""
    try:
        owner, files = path.read_text(), [path, Path(args.out)]
        last = max(file.stat().st_mtime for file in files if file.exists())
    except (FileNotFoundError, ValueError):    # just released
        return False
    pid, _, machine = owner.partition(" ")
    here = machine == platform.node() and Path("/proc/self").exists()
    silent = time.time() - last > max(600, 120 * args.save_minutes)
    return silent or owner == OWNER or here and not Path("/proc", pid).exists()


def make(args) -> str:
    """Trains a run, or goes on with it, and diagnoses it. Returns "" or why it failed."""
    flags = [*as_flags(vars(args) | {"compile": None}), *COMPILE[args.compile]]
    flags += ["--resume"] * Path(args.out).exists()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()                 # as in a process of its own
    log = Path(args.out).with_suffix(".log")
    with open(log, "a", buffering=1) as f, contextlib.redirect_stdout(f), \
            contextlib.redirect_stderr(f):
        try:
            train.main(flags)
            write_json(Path(args.out).with_suffix(".diagnosis.json"), diagnose(args))
            return ""
        except (OSError, RuntimeError, InputError):    # no disk, no memory, other data
            traceback.print_exc()
        except SystemExit as error:
            if error.code >= 128:              # by Ctrl-C or SIGTERM; train.py has saved
                raise Stop(error.code, "stopped; the same command goes on") from None
    return f"failed: {log.read_text(errors='replace').strip().splitlines()[-1]}"


def work(sweep: Sweep, asked: list[tuple[str, int]]) -> dict[str, str]:
    """Makes what is not finished. Returns, of what is not finished then, why."""
    missing = {}
    torch.set_num_threads(sweep.threads)
    for lane, seed in tqdm(asked, "runs", unit="run", disable=None):
        runs, name = read_runs(sweep.folder), f"{lane} seed {seed}"
        args = sweep.args(lane, seed, runs)
        if (lane, seed) in runs:
            continue
        if args.branch == "column:None":
            why = "needs its seed's baseline"
        elif not claim(args):
            why = "being made by another process"
        else:
            try:
                why = make(args)
            finally:
                Path(args.out).with_suffix(".claim").unlink(missing_ok=True)
        if why:
            missing[name] = why
        else:
            run = read_runs(sweep.folder)[lane, seed]
            why = f"accuracy {100 * run['reader']:.2f}%, {run['seconds']:.0f} s"
        tqdm.write(f"{name:23s} {why}", file=sys.stdout)
    return missing


# ---- Its diagnosis -------------------------------------------------------------------------------
#
# On the test images: the model's own predictions, geometry of the weights and of every stage of the
# reader (diagnostics.py), and what exchanging the bias column between images costs.

def predictions(model, fits: Fitted, donor: Tensor | None = None) -> Tensor:
    """The model's own (n,), its branch included; donor: images (n,) to take the bias column of."""
    found = []
    for rows in torch.arange(len(fits.labels)).split(BLOCK):
        tokens = fits.tokens[rows].clone()
        if donor is not None:
            tokens[..., -1] = fits.tokens[donor[rows], :, -1]
        values = model.look(fits.images[rows], model.inner_loop.steps + 1)[1]  # as it saw them
        found.append(model.logits(tokens, values).argmax(-1))
    return torch.cat(found)


def diagnose(args) -> dict:
    content, device = read_checkpoint(args.out), find_device(args.device)
    model = model_from(content, args.out, device).eval().requires_grad_(False)
    model.bf16 = False                         # small differences are compared
    images, test = load_dataset(args, device)
    bank, queries = (fit_all(model.fit, x, device, args.workers) for x in (images, test))
    with seeded("reader", args.seed):
        untrained = type(model.reader)(*model.reader.arguments).to(device).requires_grad_(False)
    guesses, labels = predictions(model, queries), queries.labels
    geometry = clustering(coordinate_systems(model, bank, queries), bank.labels, labels, guesses,
                          probes=False)
    flow = token_flow(model.trace, [untrained.trace], bank, queries, model.reader, flattened=False,
                      probes=False)
    exchanged = [accuracy(predictions(model, queries, donors(labels, "any", repeat, 0)), labels)
                 for repeat in range(5)]
    parameters, flops = cost(args, content["data"])
    epochs = [epoch["seconds"] for epoch in content["metrics"]["epochs"]]
    reader = accuracy(guesses, labels)
    return {"name": Path(args.out).stem, "training": vars(args), "reader": reader,
            "right": "".join(map(str, (guesses == labels).int().tolist())),
            "psnr": content["metrics"]["test_psnr"],
            "seconds": len(epochs) * statistics.median(epochs), "parameters": parameters,
            "gflop_per_image": flops / 1e9, "purity": geometry["purity"], "gap": geometry["G"]["gap"][0],
            "last_knn10": flow["rows"][-1]["pooled_knn10"],
            "lost": reader - statistics.fmean(exchanged),
            "highest_column": int(bank.tokens[..., :-1].var(0).sum(0).argmax()),
            "experiments": {"clustering": geometry, "token-flow": flow}, **environment(device)}


# ---- Statistics ----------------------------------------------------------------------------------
#
# Lanes are compared by seed: t interval over seeds; with one seed, paired bootstrap over images.
# The factors alone and joined are a 2^3 factorial design, in accuracy and in log-odds, since on a
# bounded scale equal gains shrink near its ends: an interaction counts only if both scales show it.

def contrasts() -> dict[str, Tensor]:
    """What is asked of the cells, as coefficients (8,). A main effect: the mean with a factor less
    that without; an interaction: the difference of such differences (Fisher 1935; here not halved);
    each averaged over the other factors. And what a joined cell has beyond additive gains."""
    cells, each, found = torch.tensor(CELLS).double(), torch.eye(8).double(), {}   # (8, 3), (8, 8)
    for size in (1, 2, 3):
        for subset in itertools.combinations(range(3), size):
            signs = (2 * cells[:, list(subset)] - 1).prod(1)
            found[" x ".join(FACTORS[f] for f in subset)] = signs / 2 ** (3 - size)
    gains = each[[CELL_LANES.index(factor) for factor in FACTORS]] - each[0]       # (3, 8)
    for lane, beyond in zip(CELL_LANES, each - each[0] - cells @ gains):
        if "+" in lane:
            found[f"{lane} - additive"] = beyond
    return found


def log_odds(p: Tensor, n: int) -> Tensor:
    """Of shares p of n images, half an image added to either side (Haldane 1956): finite."""
    return ((p * n + 0.5) / (n - p * n + 0.5)).log()


def over_seeds(y: Tensor) -> dict[str, tuple[float, float, float]]:
    """The contrasts of y (8 cells, seeds): t intervals from the pooled residual of cells + seeds,
    with (8 - 1)(seeds - 1) degrees of freedom."""
    seeds, freedom, found = y.shape[1], 7 * (y.shape[1] - 1), {}
    residual = y - y.mean(1, keepdim=True) - y.mean(0) + y.mean()
    variance = float(residual.square().sum()) / freedom
    for name, c in contrasts().items():
        value = float(c @ y.mean(1))
        half = t_quantile(freedom) * math.sqrt(variance * float(c @ c) / seeds)
        found[name] = (value, value - half, value + half)
    return found


def hits(run: dict) -> Tensor:
    """Which test images a run reads right (n,)."""
    return torch.tensor([float(c) for c in run["right"]], dtype=torch.float64)


def factorial(found: dict[str, list[dict]]) -> dict | None:
    """The contrasts, over the seeds that have all eight cells; with one seed, over images."""
    cells = [{run["seed"]: run for run in found.get(lane, [])} for lane in CELL_LANES]
    seeds = sorted(set.intersection(*map(set, cells)))
    if not seeds:
        return None
    right = torch.stack([torch.stack([hits(cell[seed]) for cell in cells]) for seed in seeds])
    result = {"seeds": len(seeds)}
    for name, scale in (("accuracy", torch.clone),
                        ("log_odds", functools.partial(log_odds, n=right.shape[2]))):
        if len(seeds) > 1:
            result[name] = over_seeds(scale(right.mean(2)).T)
        else:
            result[name] = {asked: bootstrap(right[0].T, lambda means: scale(means) @ c)
                            for asked, c in contrasts().items()}
    return result


def difference(found: dict[str, list[dict]], lane: str, other: str) -> dict | None:
    """Accuracy and purity of a lane less another's, over the seeds that both have, if any."""
    pairs = [(a, b) for a in found[lane] for b in found.get(other, []) if a["seed"] == b["seed"]]
    if not pairs or lane == other:
        return None
    reader, purity = ([a[key] - b[key] for a, b in pairs] for key in ("reader", "purity"))
    return {"lane": lane, "minus": other, "seeds": len(pairs),
            "interval": t_interval(reader) or paired_bootstrap(*map(hits, pairs[0])),
            "purity": t_interval(purity) or (purity[0], None, None)}


def lane_row(lane: str, runs: list[dict]) -> dict:
    """Of each measure a lane's mean and, over seeds, standard deviation."""
    row = {key: runs[0][key] for key in ("lane", "parameters", "gflop_per_image")}
    row |= {key: runs[0]["training"][key] for key in ("w_task", "w_cluster")} | {"n": len(runs)}
    for key in MEASURED:
        values = [run[key] for run in runs]
        row[key] = (statistics.fmean(values), statistics.stdev(values) if values[1:] else None)
    return row


def summarise(found: dict[str, list[dict]]) -> dict:
    """The report. found: each lane's runs, one a seed."""
    differences = [difference(found, lane, other) for lane in found for other in rivals(lane)]
    models = {}                # two lanes may be the same: a model counts once
    for run in (run for runs in found.values() for run in runs):
        models.setdefault(claims.key_of(run["training"]), run)
    return {"lanes": [lane_row(lane, runs) for lane, runs in found.items()],
            "differences": [each for each in differences if each], "factorial": factorial(found),
            "across": claims.across(list(models.values()))}


# ---- Claims --------------------------------------------------------------------------------------
#
# C1 and C2 of the baseline come from claims.py; what C4 is, and its rules, stands in ABOUT below.

FEW = "not decided here (fewer than three seeds)"


def additivity_verdict(found: dict) -> str:
    """found: the report's factorial."""
    name = f"{CELL_LANES[-1]} - additive"
    beyond, odds = found["accuracy"][name], found["log_odds"][name]
    if found["seeds"] < 3:
        return FEW
    if side(beyond, 0) == side(odds, 0) != 0:
        return "not additive"
    return "additive" if side(beyond, -POINTS) > 0 > side(beyond, POINTS) else "not decided here"


def all_claims(report: dict) -> list[str]:
    found = {(each["lane"], each["minus"]): each for each in report["differences"]}
    lines = [line for line in report["across"]["verdicts"] if ", baseline:" in line] or [
        "C1, C2: not decided here (too few seeds of the baseline)"]
    for lane in CELL_LANES[1:]:
        if (lane, "baseline") in found and (lane, "deeper") in found:
            gain, beyond = (side(found[lane, other]["interval"], 0)
                            for other in ("baseline", "deeper"))
            verdict = decide(gain > 0 and beyond > 0, beyond < 0)
            lines.append(f"C4, {lane}: {verdict if found[lane, 'deeper']['seeds'] >= 3 else FEW}")
    if report["factorial"]:
        lines.append(f"C4, adding up: {additivity_verdict(report['factorial'])}")
    return lines


# ---- Report --------------------------------------------------------------------------------------

LANES_TABLE = """\
n: seeds. accuracy: the reader's on {images}, mean ± sd over seeds. gap: accuracy less the
best of k-NN and nearest mean on phi - theta, an image's weights less the shared anchor. PSNR: dB,
of the pixels drawn. purity: share of an image's 10 nearest {images} in phi - theta that
have its class. 10-NN: % at the reader's last stage, without a branch. lost: points, bias column
exchanged between images. k par.: 1,000 parameters. MFLOP: a training step, an image. s: training,
the median epoch times epochs."""
DIFFERENCES = """\
Paired by seed: [95% t interval over n seeds]; with n = 1 [95% over {images}]. Not corrected
for their number."""
ABOUT = """\
C1: the weights do not cluster by class as well as the reader reads them. C2: classes come apart
late in the reader. C4: route, bias, dense help more than deeper and do not add up: supported if
lane - baseline and lane - deeper are above 0, refuted if lane - deeper is below; not additive if
all three - additive is on one side of 0 in accuracy and in log-odds, additive within 2 points."""
FACTORIAL = """\
A factor: with it less without it, averaged over the other two; a x b: the difference of such
differences; a+b - additive: the joined lane less baseline and gains of its single lanes."""
FIGURES = {"lanes.png": figures.lanes_figure, "clusters.png": figures.clusters_figure,
           "factorial.png": figures.factorial_figure, "population.png": figures.population_figure}


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table that reads on a terminal too: names, then numbers flush right."""
    widths = [max(2, *map(len, column)) for column in zip(header, *rows)]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join(" | ".join(["", row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:]),
                                 ""]).strip() for row in (header, rule, *rows))


def lane_table(rows: list[dict]) -> str:
    table = []
    for row in rows:
        accuracy = " ± ".join(f"{100 * x:.1f}" for x in row["reader"] if x is not None)
        gap, near, lost = (f"{100 * row[key][0]:.1f}" for key in ("gap", "last_knn10", "lost"))
        table.append([row["lane"], str(row["n"]), accuracy, gap, f"{row['psnr'][0]:.1f}",
                      f"{row['purity'][0]:.3f}", near, lost, f"{row['parameters'] / 1000:.0f}",
                      f"{1000 * row['gflop_per_image']:.0f}", f"{row['seconds'][0]:.0f}"])
    return markdown("lane|n|accuracy %|gap|PSNR|purity|10-NN|lost|k par.|MFLOP|s".split("|"), table)


def difference_table(found: list[dict]) -> str:
    return markdown(["difference", "n", "accuracy, points", "purity"], [
        [f"{each['lane']} - {each['minus']}", str(each["seeds"]), span(each["interval"], 100),
         span(each["purity"], 1, 3)] for each in found])


def factorial_table(found: dict) -> str:
    return markdown(["", "accuracy, points", "log-odds"], [
        [name, span(interval, 100), span(found["log_odds"][name], 1, 3)]
        for name, interval in found["accuracy"].items()])


def command_of(run: dict) -> str:
    """What makes a run by itself."""
    args = argparse.Namespace(**run["training"] | {"out": f"{run['lane']}-seed{run['seed']}.pt"})
    return " ".join([f"OMP_NUM_THREADS={run['threads']}", command_line(args),
                     *COMPILE[args.compile]])


def write_report(sweep: Sweep, runs: dict, missing: dict[str, str]):
    """report.md, report.json and figures in the folder, tables on the terminal."""
    base, folder, seeds = sweep.base, sweep.folder, sorted({seed for _, seed in runs})
    found = {lane: [runs[lane, seed] for seed in seeds if (lane, seed) in runs]
             for lane in sorted({lane for lane, _ in runs}, key=place)}
    report, one = summarise(found), next(iter(runs.values()))
    lines = all_claims(report)
    images = "held-out training images" if base.val else "test images"
    tables = [lane_table(report["lanes"]), LANES_TABLE.format(images=images),
              difference_table(report["differences"]), DIFFERENCES.format(images=images)]
    drawn = [name for name, draw in FIGURES.items() if draw(folder / name, report, images)]
    text = [f"# Interventions on {base.dataset}, {base.size}x{base.size} pixels",
            f"{len(runs)} runs of {len(found)} lanes, seeds {', '.join(map(str, seeds))}; "
            f"{len(one['right'])} {images}; {one['device']}.",
            *(f"Not finished: {name}: {why}." for name, why in missing.items()),
            *tables, "## Claims", ABOUT, "\n".join(f"- {line}" for line in lines),
            *(f"![{name}]({name})" for name in drawn)]
    if report["factorial"]:
        text += ["## Do gains add up", FACTORIAL, factorial_table(report["factorial"])]
    text += ["## Commands", "Each gives its run by itself, bit for bit on the same machine.", "```"]
    for lane in found:
        what = " and ".join(LANES[part][0] for part in lane.split("+"))
        text.append("\n".join([f"# {lane}: {what}", *map(command_of, found[lane])]))
    (folder / "report.md").write_text("\n\n".join([*text, "```"]) + "\n")
    kept = [{key: run[key] for key in ("lane", "seed", *MEASURED)} | {"command": command_of(run)}
            for run in runs.values()]
    write_json(folder / "report.json", {"flags": vars(base), "missing": missing, "claims": lines,
                                        **report, "runs": kept})
    print("\n\n".join([*tables, fold("\n".join(lines))]))
    print(f"wrote {folder}/report.md, report.json, {', '.join(drawn)}")


# ---- The program ---------------------------------------------------------------------------------

UNUSED = ("resume", "eval_only", "ckpt", "steps_test")         # the diagnosis fits with k steps


def sweep_parser() -> Parser:
    p = Parser(prog="interventions.py", parents=[parser()], conflict_handler="resolve",
               description=__doc__.split("\n\n")[0], argument_default=argparse.SUPPRESS,
               allow_abbrev=False)
    p.add_argument("--lanes", nargs="+", metavar="LANE",
                   help=f"all (default), or some of {', '.join(LANES)}, or some joined by +")
    p.add_argument("--seeds", type=whole(1), help="so many, from --seed on (default 3)")
    p.add_argument("--report-only", action="store_true", help="report what is in --out")
    p.add_argument("--out", required=True, help="folder of the sweep")
    return p


def differing(made: dict, args) -> list[str]:
    """The flags, of those that change a result, that were others in `made`."""
    return [f"{flag(key)} {made[key]}, not {value}" for key, value in vars(args).items()
            if key not in FREE and made.get(key, value) != value]


def open_sweep(folder: Path, given: dict) -> Sweep:
    """InputError: settings that do not go together, or not with the folder's."""
    for key in set(UNUSED) & set(given):
        raise InputError(f"{flag(key)}: a flag of train.py alone")
    base, there = settings({k: v for k, v in given.items() if k in RECIPE}), read_sweep(folder)
    find_device(base.device)
    facts = list(train.facts(load_dataset(base, train=False)[0]))
    if there is None:
        return Sweep(folder, base, torch.get_num_threads(), facts)
    for words in differing(vars(there.base) | {"seed": base.seed}, base):
        raise InputError(f"--out {folder}: holds a sweep with {words}; name another folder")
    if there.facts != facts:
        raise InputError(f"--out {folder}: its sweep had other data; name another folder")
    return Sweep(folder, base, there.threads, facts)


def check(sweep: Sweep, asked: list[tuple[str, int]]):
    """InputError: a run that train.py would refuse, or that was made as something else."""
    runs = read_runs(sweep.folder)
    for lane, seed in asked:
        args = sweep.args(lane, seed, runs)
        if args.batch_size > sweep.facts[2]:
            raise InputError(f"--lanes {lane}: batches of {args.batch_size}, but only "
                             f"{sweep.facts[2]} training images")
        if (lane, seed) in runs and args.branch != "column:None":
            for words in differing(runs[lane, seed]["training"], args):
                raise InputError(f"{args.out}: made with {words}; delete its files")


def make_folder(sweep: Sweep):
    try:
        sweep.folder.mkdir(exist_ok=True)
        if read_sweep(sweep.folder) is None:
            write_json(sweep.folder / "sweep.json", FORMAT | {
                "threads": sweep.threads, "settings": vars(sweep.base), "facts": sweep.facts})
        (sweep.folder / "runs").mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {sweep.folder}: cannot be written ({error.strerror})") from error


def run(argv: list[str] | None):
    given = vars(sweep_parser().parse_args(argv))
    folder, missing, lanes = Path(given["out"]), {}, given.get("lanes", ["all"])
    if given.get("report_only"):
        sweep = read_sweep(folder)
        if sweep is None or set(given) != {"out", "report_only"}:
            raise InputError("--report-only takes --out alone, the folder of a sweep")
    else:
        every = [*LANES, *CELL_LANES] if "all" in lanes else []
        lanes = with_baselines([*every, *(lane for lane in lanes if lane != "all")])
        sweep = open_sweep(folder, given)
        seeds = range(sweep.base.seed, sweep.base.seed + given.get("seeds", 3))
        asked = [(lane, seed) for seed in seeds for lane in lanes]
        check(sweep, asked)
        make_folder(sweep)
        missing = work(sweep, asked)
    runs = read_runs(folder)
    if not runs:
        raise Stop(1, "no run is finished: nothing to report")
    write_report(sweep, runs, missing)
    failed = [name for name, why in missing.items() if why.startswith("failed")]
    if failed:
        raise Stop(1, f"failed: {', '.join(failed)}; the same command tries again")


def main(argv: list[str] | None = None):
    """Exit status: 0; 1 a run failed; 2 bad input; 130, 143 stopped by Ctrl-C, SIGTERM."""
    with exits("interventions.py"):
        run(argv)


if __name__ == "__main__":
    main()
