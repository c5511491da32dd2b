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
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import claims
import figures
import train
from bench import count_flops
from checkpoint import InputError, Stop, exits, generator, model_from, read_checkpoint, seeded
from claims import POINTS, fold, percent, side, span, table
from data import load_dataset
from diagnostics import Fitted, accuracy, clustering, coordinate_systems, fit_all, token_flow
from measures import bootstrap, holm, paired_bootstrap, t_interval, t_quantile, t_test
from routes import BLOCK, donors
from settings import (FREE, RECIPE, Parser, as_flags, command_line, environment, epochs,
                      find_device, flag, parser, settings, whole)

# ---- Lanes ---------------------------------------------------------------------------------------
#
# A lane changes one thing; lanes joined by + change several. Each is compared with the baseline and
# with what could explain its gain away: more compute (`baseline@LANE`, the baseline trained for as
# many steps as cost the lane's FLOPs), another column (`column` and `column-random` of `bias`), the
# mean colour gone (`centred` of `colour`), a second loss whatever its labels (`cluster-random1`).
# `deeper` is capacity alone. A contrastive loss needs batches with pairs: `baseline64`.

TASK = "another weight of the class loss"
CLUSTER = "batches of at least 64, and a contrastive loss on phi - theta"
RANDOM = CLUSTER + " with random labels, fixed for the run"
LANES = {              # name: what changes, in words, in flags; None: `Sweep.change` has it
    "baseline": ("shared-anchor MWT", {}),
    "wt": ("no class loss for the INR", {"w_task": 0.0}),
    **{f"task{w:g}": (TASK, {"w_task": w}) for w in (0.001, 0.1, 1.0, 10.0)},
    "baseline64": ("batches of at least 64", {"batch_size": 64}),
    **{f"cluster{w:g}": (CLUSTER, {"batch_size": 64, "w_cluster": w}) for w in (0.01, 0.1, 1.0)},
    **{f"cluster-random{w:g}": (RANDOM, {"batch_size": 64, "w_cluster": w, "cluster_random": True})
       for w in (0.1, 1.0)},
    "route": ("learned queries gather the tokens, starting from their mean", {"readout": 8}),
    "bias": ("the bias column to the logits by a branch of its own", {"branch": "bias"}),
    "column": ("as bias, but the column of highest energy in its baseline", None),
    "column-random": ("as bias, but a random column, by the seed", None),
    "centred": ("the mean colour removed before fitting", {"centre_colour": True}),
    "colour": ("centred, with the mean colour through a branch like bias's",
               {"centre_colour": True, "branch": "colour"}),
    "dense": ("four more inner steps, on all pixels", None),
    "deeper": ("a reader so deep that a step costs twice", None)}
FACTORS = ("route", "bias", "dense")
CELLS = list(itertools.product((0, 1), repeat=3))      # which are on
CELL_LANES = ["+".join(itertools.compress(FACTORS, cell)) or "baseline" for cell in CELLS]
JUDGED = [*CELL_LANES[1:], "column", "column-random", "deeper"]           # by C4
MATCHED = "baseline@"
PRESSED = ["cluster0.01", "cluster0.1", "cluster1"]
REGIMES = {            # one architecture and batch size, one loss of several weights
    "class loss": ["baseline", "wt", "task0.001", "task0.1", "task1", "task10"],
    "contrastive loss": ["baseline64", *PRESSED],
    "contrastive loss, random labels": ["baseline64", "cluster-random0.1", "cluster-random1"]}


def place(lane: str) -> tuple:
    """Where a lane stands in a table: as in LANES, then joined ones; each before its compute's."""
    plain = lane.removeprefix(MATCHED)
    return plain.count("+"), [list(LANES).index(part) for part in plain.split("+")], lane != plain


def rivals(lane: str) -> list[str]:
    """The lanes that this one is compared with, its baseline first."""
    found = ["baseline64" if "cluster" in lane else "baseline"]
    if lane in JUDGED:
        found.append(MATCHED + lane)
    if lane.startswith("task"):
        found.append("wt")
    return found + {"bias": ["column", "column-random"], "colour": ["centred"],
                    "cluster0.1": ["cluster-random0.1"], "cluster1": ["cluster-random1"]
                    }.get(lane, [])


def with_baselines(lanes: list[str]) -> list[str]:
    """The lanes asked for and their baselines, in order. InputError: no such lane."""
    found = {"baseline"}
    for lane in lanes:
        plain = lane.removeprefix(MATCHED)
        if not set(plain.split("+")) <= set(LANES):
            raise InputError(f"--lanes {lane}: there are {', '.join(LANES)}, and joined by +, and "
                             "all of them after baseline@")
        plain = "+".join(sorted(plain.split("+"), key=place))
        found |= {MATCHED + plain} if lane.startswith(MATCHED) else {plain, rivals(plain)[0]}
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
AVERAGED = (*MEASURED, "lost_branch")          # the first runs lack this


@dataclass
class Sweep:
    """What all runs of a folder share."""
    folder: Path
    base: argparse.Namespace       # settings
    threads: int                   # of every run, since rounding depends on it
    facts: list                    # channels, class names, number of training images
    flops: dict = field(default_factory=dict)      # an image, of lanes, once counted

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

    def matched_epochs(self, lane: str) -> float:
        """Of the baseline, for what the lane's training costs."""
        for name in (lane, "baseline"):
            if name not in self.flops:
                args = self.args(name, 0, {("baseline", 0): {"highest_column": 0}})
                self.flops[name] = cost(args, self.facts)[1]
        times = self.flops[lane] / self.flops["baseline"]
        return epochs(str(max(1, round(self.base.epochs * times, 2))))

    @functools.cached_property
    def depth(self) -> int:
        """Of the lane deeper: a step costs about twice the baseline's, every block the same."""
        has = self.base.reader_depth
        now, one_more = (cost(argparse.Namespace(**vars(self.base) | {"reader_depth": depth}),
                              self.facts)[1] for depth in (has, has + 1))
        return has + round(now / (one_more - now))

    def args(self, lane: str, seed: int, runs: dict) -> argparse.Namespace:
        """The settings of a run. runs: those that are there, for the baseline's column."""
        highest = runs.get(("baseline", seed), {}).get("highest_column")
        changes = {"seed": seed, "out": str(self.folder / "runs" / f"{lane}-seed{seed}.pt")}
        if lane.startswith(MATCHED):
            return argparse.Namespace(**vars(self.base) | changes | {
                "epochs": self.matched_epochs(lane.removeprefix(MATCHED))})
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
        if "lost_branch" not in run and run["training"]["branch"] == "bias":
            run["lost"] = None                 # both at once: another figure
        found[lane, int(seed)] = {"lost_branch": None} | run | {"lane": lane, "seed": int(seed)}
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


def copied(args, runs: dict) -> bool:
    """Whether another lane's run is the same, as those of the compute of two lanes that cost the
    same; if so, its diagnosis stands for this one's."""
    for run in runs.values():
        if claims.key_of(run["training"]) == claims.key_of(vars(args)):
            same = run | {"name": Path(args.out).stem, "training": vars(args)}
            write_json(Path(args.out).with_suffix(".diagnosis.json"), same)
            return True
    return False


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
        elif copied(args, runs):
            why = ""
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
# reader (diagnostics.py), and the cost of other images' bias columns in the input of the reader's
# blocks alone, and of another image's input to its branch alone.

def predictions(model, fits: Fitted, donor=None, branch_donor=None) -> Tensor:
    """The model's own (n,); donor: images (n,) whose bias column the blocks see instead,
    branch_donor: images whose column or colour the branch sees instead."""
    reader, found = model.reader, []
    for rows in torch.arange(len(fits.labels)).split(BLOCK):
        seen = rows if branch_donor is None else branch_donor[rows]
        tokens, colour = fits.tokens[rows].clone(), []
        if donor is not None:
            tokens[..., -1] = fits.tokens[donor[rows], :, -1]
        if getattr(reader, "takes_colour", False):
            colour = [model.colour(model.look(fits.images[seen], model.inner_loop.steps + 1)[1])]
        x = reader.input_map(tokens)
        for block in reader.blocks:
            x = x + block(x)
        found.append(reader.conclude(x, fits.tokens[seen], *colour).argmax(-1))
    return torch.cat(found)


def diagnose(args) -> dict:
    content, device = read_checkpoint(args.out), find_device(args.device)
    model = model_from(content, args.out, device).eval().requires_grad_(False)
    model.bf16 = False                         # small differences are compared
    images, test = load_dataset(args, device)
    bank, queries = (fit_all(model.fit, x, device, args.workers) for x in (images, test))
    with seeded("reader", args.seed, 0):       # as diagnostics.py has its first one
        untrained = type(model.reader)(*model.reader.arguments).to(device).requires_grad_(False)
    guesses, labels = predictions(model, queries), queries.labels
    geometry = clustering(coordinate_systems(model, bank, queries), bank.labels, labels, guesses,
                          probes=False)
    flow = token_flow(model.trace, [untrained.trace], bank, queries, model.reader, flattened=False,
                      probes=False)
    reader, others = accuracy(guesses, labels), [donors(labels, "any", r, 0) for r in range(5)]

    def lost(**exchanged):
        return reader - accuracy(predictions(model, queries, **exchanged), labels)
    in_blocks = statistics.fmean(lost(donor=other) for other in others)
    in_branch = None
    if getattr(model.reader, "branch", None) is not None:
        in_branch = statistics.fmean(lost(branch_donor=other) for other in others)
    parameters, flops = cost(args, content["data"])
    seconds = [epoch["seconds"] for epoch in content["metrics"]["epochs"]]
    return {"name": Path(args.out).stem, "training": vars(args), "reader": reader,
            "right": "".join(map(str, (guesses == labels).int().tolist())),
            "psnr": content["metrics"]["test_psnr"],
            "seconds": args.epochs * statistics.median(seconds), "parameters": parameters,
            "gflop_per_image": flops / 1e9, "purity": geometry["purity"],
            "gap": geometry["G"]["gap"][0], "last_knn10": flow["rows"][-1]["pooled_knn10"],
            "lost": in_blocks, "lost_branch": in_branch,
            "highest_column": int(bank.tokens[..., :-1].var(0).sum(0).argmax()),
            "experiments": {"clustering": geometry, "token-flow": flow}, **environment(device)}


# ---- Statistics ----------------------------------------------------------------------------------
#
# Lanes are compared by seed: a t interval over seeds, and beside it, never in its place, a paired
# bootstrap over the images of the first seed. The least detectable effect: the gain that so many
# seeds, spread like these, show in 80% of repeats at 5%. The factors alone and joined are a 2^3
# factorial design, in accuracy and in log-odds, since on a bounded scale equal gains shrink near
# its ends: an interaction counts only if both scales show it.

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
    freedom = 7 * (len(seeds) - 1)
    factor = 1 + t_quantile(freedom, 0.8) / t_quantile(freedom) if freedom else math.inf
    result["least"] = {asked: factor * (high - value) if freedom else None
                       for asked, (value, _, high) in result["accuracy"].items()}
    return result


def difference(found: dict[str, list[dict]], lane: str, other: str) -> dict | None:
    """Accuracy and purity of a lane less another's, over the seeds that both have, if any."""
    pairs = [(a, b) for a in found[lane] for b in found.get(other, []) if a["seed"] == b["seed"]]
    if not pairs or lane == other:
        return None
    reader, purity = ([a[key] - b[key] for a, b in pairs] for key in ("reader", "purity"))
    several = len(pairs) > 1
    return {"lane": lane, "minus": other, "seeds": len(pairs), "over_seeds": t_interval(reader),
            "least": detectable(reader) if several else None,
            "p": t_test(reader) if several else None, "purity": t_interval(purity),
            "over_images": paired_bootstrap(*map(hits, pairs[0])),
            "image_seed": pairs[0][0]["seed"]}


def detectable(gains: list[float]) -> float:
    """The least detectable effect."""
    quantiles = sum(t_quantile(len(gains) - 1, level) for level in (0.975, 0.8))
    return quantiles * statistics.stdev(gains) / math.sqrt(len(gains))


def lane_row(lane: str, runs: list[dict]) -> dict:
    """Of each measure a lane's mean and, over seeds, standard deviation."""
    row = {key: runs[0][key] for key in ("lane", "parameters", "gflop_per_image")}
    row |= {key: runs[0]["training"][key] for key in ("w_task", "w_cluster", "epochs")}
    row["n"] = len(runs)
    for key in AVERAGED:
        values = [run[key] for run in runs if run[key] is not None]
        row[key] = (statistics.fmean(values) if values else None,
                    statistics.stdev(values) if values[1:] else None)
    return row


def regimes(found: dict[str, list[dict]]) -> dict:
    """Description: the rank correlation of purity and accuracy over the models of a regime."""
    result = {}
    for name, lanes in REGIMES.items():
        runs = [run for lane in lanes for run in found.get(lane, [])]
        across = claims.across(runs) if runs else {"correlations": {}}
        if across["correlations"]:
            result[name] = {key: across[key] for key in ("models", "settings", "correlations")}
    return result


def summarise(found: dict[str, list[dict]]) -> dict:
    """The report. found: each lane's runs, one a seed."""
    differences = [difference(found, lane, other) for lane in found for other in rivals(lane)]
    differences = [each for each in differences if each]
    return {"lanes": [lane_row(lane, runs) for lane, runs in found.items()],
            "differences": differences, "helps": judge(differences),
            "factorial": factorial(found), "regimes": regimes(found)}


# ---- Claims --------------------------------------------------------------------------------------
#
# C1c and C4, over seeds. What C1 to C3 are of the baseline or any other run diagnostics.py says.

FEW = "not decided here (fewer than {} seeds)"
ALL = CELL_LANES[-1] + " - additive"


def by_pair(differences: list[dict]) -> dict[tuple[str, str], dict]:
    return {(each["lane"], each["minus"]): each for each in differences}


def judge(differences: list[dict]) -> list[dict]:
    """C4 of each lane: what it has over its rivals, p of lane - baseline after Holm's correction
    over the lanes with five seeds, the verdict."""
    rows, there = [], by_pair(differences)
    for lane in sorted(JUDGED, key=place):
        if (lane, "baseline") in there:
            over = {other: there.get((lane, other)) for other in rivals(lane)}
            seeds = min(each["seeds"] if each else 0 for each in over.values())
            rows.append({"lane": lane, "seeds": seeds, "over": over, "p": None,
                         "verdict": FEW.format("five")})
    decided = [row for row in rows if row["seeds"] >= 5]
    for row, p in zip(decided, holm([row["over"]["baseline"]["p"] for row in decided])):
        gains = {other: each["over_seeds"] for other, each in row["over"].items()}
        least = max(each["least"] for each in row["over"].values())    # support needs all of them
        row |= {"p": p, "verdict": claims.helps_verdict(gains, least, p)}
    return rows


def help_claim(row: dict) -> str:
    gains = [f"over {other} {span(each['over_seeds'], 100)} (least {percent(each['least'])})"
             for other, each in row["over"].items() if each and each["over_seeds"]]
    gains += [f"p {row['p']:.3f}"] if row["p"] is not None else []
    missing = [other for other, each in row["over"].items() if not each]
    points = f". Points {', '.join(gains)}" if gains else ""
    absent = f". Not run: {', '.join(missing)}" if missing else ""
    return f"C4, {row['lane']}: {row['verdict']}{points}{absent}"


def pressure_claims(differences: list[dict]) -> list[str]:
    """C1c of each contrastive lane."""
    lines, there = [], by_pair(differences)
    for lane in PRESSED:
        if plain := there.get((lane, "baseline64")):
            random = there.get((lane, lane.replace("cluster", "cluster-random")))
            beyond = random["over_seeds"] if random and random["seeds"] >= 3 else None
            purity, accuracy = plain["purity"], plain["over_seeds"]
            verdict = claims.pressure_verdict(purity, accuracy, beyond)
            lines.append(f"C1c, {lane}: " + (FEW.format("three") if plain["seeds"] < 3 else (
                f"{verdict}. Less baseline64: purity {span(purity, 1, 3)}, accuracy "
                f"{span(accuracy, 100)}; less random labels: accuracy {span(beyond, 100)}")))
    return lines


def additivity_verdict(found: dict, gained: bool) -> str:
    """found: the report's factorial; gained: whether any of its lanes beats the baseline."""
    beyond, odds = found["accuracy"][ALL], found["log_odds"][ALL]
    if found["seeds"] < 3:
        return FEW.format("three")
    if not gained:
        return "no verdict: nothing is gained that could add up"
    if found["least"][ALL] > POINTS:
        return "no verdict: the least effect that could be seen is over 2 points"
    if side(beyond, 0) == side(odds, 0) != 0:
        return "not additive"
    return "additive" if side(beyond, -POINTS) > 0 > side(beyond, POINTS) else claims.OPEN


def all_claims(report: dict) -> list[str]:
    lines = pressure_claims(report["differences"]) + [help_claim(row) for row in report["helps"]]
    if found := report["factorial"]:
        there = by_pair(report["differences"])
        gained = any(side(there[lane, "baseline"]["over_seeds"], 0) > 0 for lane in CELL_LANES[1:])
        lines.append(f"C4, adding up: {additivity_verdict(found, gained)}. {ALL} "
                     f"{span(found['accuracy'][ALL], 100)} points (least "
                     f"{percent(found['least'][ALL]) or 'unknown'})")
    for name, each in report["regimes"].items():
        rho = each["correlations"].get("phi - theta")
        lines.append(f"no claim: rho(purity, accuracy) {span(rho, 1, 2)} over {each['models']} "
                     f"models, {each['settings']} weights of the {name}")
    return lines


# ---- Report --------------------------------------------------------------------------------------

LANES_TABLE = """\
n: seeds. accuracy: the reader's on {images}, mean ± sd over seeds. gap: accuracy less the
best of k-NN and nearest mean on phi - theta, an image's weights less the shared anchor. PSNR: dB,
of the pixels drawn. purity: share of an image's 10 nearest {images} in phi - theta that
have its class. 10-NN: % at the reader's last stage, without a branch. lost: points, another image's
bias column in the input of the reader's blocks alone; branch: another's input of the branch alone.
k par.: 1,000 parameters. cost: FLOPs of training over the baseline's."""
DIFFERENCES = """\
Points of accuracy, paired by seed. Over n seeds: of the method; over {images}: of the
models of one seed. baseline@: the baseline trained for the lane's compute. Not corrected for their
number."""
ABOUT = """\
C1c, pressure to cluster does not help: supported if purity rises and accuracy falls, less
baseline64, and accuracy falls below that with fixed random labels, the price of any second loss;
refuted if both rise. C4, acting on the diagnosis helps: supported if over the baseline and over the
baseline of the lane's compute (bias: over column, column-random too), p < 0.05 by Holm over lanes;
refuted if under both. deeper: what capacity alone buys. Adding up: not additive if all three -
additive is on one side of 0 in accuracy and in log-odds, additive within 2 points. Points, over
seeds; least: the effect that so many seeds show in 80% of repeats. C1 to C3: see diagnostics.py."""
FACTORIAL = """\
A factor: with it less without it, averaged over the other two; a x b: the difference of such
differences; a+b - additive: the joined lane less baseline and gains of its single lanes."""
FIGURES = {"lanes.png": figures.lanes_figure, "clusters.png": figures.clusters_figure,
           "factorial.png": figures.factorial_figure, "population.png": figures.population_figure}


def lane_table(rows: list[dict]) -> str:
    usual = next((row for row in rows if row["lane"] == "baseline"), rows[0])
    lines = []
    for row in rows:
        cost = (row[key] / usual[key] for key in ("gflop_per_image", "epochs"))
        lines.append([row["lane"], str(row["n"]),
                      " ± ".join(percent(x) for x in row["reader"] if x is not None),
                      percent(row["gap"][0]), f"{row['psnr'][0]:.1f}", f"{row['purity'][0]:.3f}",
                      *(percent(row[key][0]) for key in ("last_knn10", "lost", "lost_branch")),
                      f"{row['parameters'] / 1000:.0f}", f"{math.prod(cost):.3f}"])
    titles = "lane|n|accuracy %|gap|PSNR|purity|10-NN|lost|branch|k par.|cost"
    return table(titles.split("|"), lines)


def difference_table(found: list[dict]) -> str:
    first, lines = min((each["image_seed"] for each in found), default=0), []
    for each in found:
        minus = MATCHED if each["minus"].startswith(MATCHED) else each["minus"]
        other_seed = "" if each["image_seed"] == first else f" seed {each['image_seed']}"
        lines.append([f"{each['lane']} - {minus}", str(each["seeds"]),
                      span(each["over_seeds"], 100) if each["over_seeds"] else "",
                      span(each["over_images"], 100) + other_seed])
    return table(["difference", "n", "over seeds [95% t]",
                  f"over images [95% bootstrap], seed {first}"], lines)


def factorial_table(found: dict) -> str:
    over = f"{found['seeds']} seeds" if found["seeds"] > 1 else "images, one seed"
    return table(["", f"accuracy, points, over {over}", "least effect", "log-odds"], [
        [name, span(interval, 100), percent(found["least"][name]),
         span(found["log_odds"][name], 1, 3)] for name, interval in found["accuracy"].items()])


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
            "```", *tables, "```", "## Claims", ABOUT, "\n".join(f"- {line}" for line in lines),
            *(f"![{name}]({name})" for name in drawn)]
    if report["factorial"]:
        factors = factorial_table(report["factorial"])
        text += ["## Do gains add up", FACTORIAL, "```", factors, "```"]
    text += ["## Commands", "Each gives its run by itself, bit for bit on the same machine.", "```"]
    for lane in found:
        what = " and ".join(LANES[part][0] for part in lane.removeprefix(MATCHED).split("+"))
        what = f"the baseline, for the compute of: {what}" if MATCHED in lane else what
        text.append("\n".join([f"# {lane}: {what}", *map(command_of, found[lane])]))
    (folder / "report.md").write_text("\n\n".join([*text, "```"]) + "\n")
    kept = [{key: run[key] for key in ("lane", "seed", *AVERAGED)} | {"command": command_of(run)}
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
                   help=f"all (default), or some of {', '.join(LANES)}, or some joined by +; "
                        f"{MATCHED}LANE: the baseline for a lane's compute")
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
        every = [*LANES, *CELL_LANES, *(MATCHED + lane for lane in JUDGED)]
        every = every if "all" in lanes else []
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
