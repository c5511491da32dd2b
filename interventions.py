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
# What a lane changes, as a function of the settings shared by all lanes; None: it hangs on more than those. A lane is compared with
# "baseline", or with "baseline64" where it needs batches of 64; names joined by + change all that their parts change.

LARGE = lambda base: {"batch_size": max(64, base.batch_size)}              # the contrastive loss needs pairs
LANES = {
    "baseline": lambda base: {},
    "wt": lambda base: {"w_task": 0.0},
    "task0.001": lambda base: {"w_task": 0.001},
    "task0.1": lambda base: {"w_task": 0.1},
    "task1": lambda base: {"w_task": 1.0},
    "task10": lambda base: {"w_task": 10.0},
    "baseline64": LARGE,
    "cluster0.01": lambda base: LARGE(base) | {"w_cluster": 0.01},
    "cluster0.1": lambda base: LARGE(base) | {"w_cluster": 0.1},
    "cluster1": lambda base: LARGE(base) | {"w_cluster": 1.0},
    "bias": lambda base: {"branch": "bias"},
    "column": None,                # branch on the column of highest energy: known when this seed's baseline is there
    "column-random": None,         # and on a random one, by the seed
    "centred": lambda base: {"centre_colour": True},
    "colour": lambda base: {"centre_colour": True, "branch": "colour"},
    "route": lambda base: {"readout": base.readout or 8},
    "dense": lambda base: {"steps": base.steps + 4, "fraction": 1.0},
    "deeper": None,                # capacity control: a reader as deep as the dearest of the lanes above asks for
}
FACTORS = ("route", "bias", "dense")
COMBINED = [f"{a}+{b}" for a, b in itertools.combinations(FACTORS, 2)] + ["+".join(FACTORS)]
DEAREST = ("route", "bias", "colour", "dense")             # the capacity control is no smaller and no faster than these


def settings_of(base, changed: dict):
    return argparse.Namespace(**vars(base) | changed)


def cost(args, channels: int, classes: int) -> tuple[int, float]:
    """Parameters, and counted FLOPs of training on one image."""
    model = train.build_model(args, channels, classes)
    return sum(p.numel() for p in model.parameters()), sum(train.count_flops(model, args.batch_size).values()) / args.batch_size


def capacity_depth(base, channels: int, classes: int) -> int:
    """The least depth of a reader whose model has at least the parameters and the FLOPs of the dearest lane."""
    dearest = np.max([cost(settings_of(base, LANES[lane](base)), channels, classes) for lane in DEAREST], axis=0)
    depth = base.reader_depth
    while (np.array(cost(settings_of(base, {"reader_depth": depth}), channels, classes)) < dearest).any():
        depth += 1
    return depth


def against(lane: str) -> str:
    """The lane that this one is compared with."""
    return "baseline64" if lane.startswith("cluster") else "baseline"


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
        self.depth = capacity_depth(base, *self.shape)
        self.children, self.stopping, self.lock = set(), threading.Event(), None

    def changes(self, part: str, seed: int) -> dict | None:
        if part == "deeper":
            return {"reader_depth": self.depth}
        if part == "column-random":
            return {"branch": f"column:{int(torch.randint(self.base.width, (), generator=train.generator('column', seed)))}"}
        if part == "column":
            found = self.result("baseline", seed)
            return found and {"branch": f"column:{found['highest_column']}"}
        return LANES[part](self.base)

    def args(self, lane: str, seed: int):
        """The settings of one run; None where they hang on a baseline that is not there yet."""
        changes = [self.changes(part, seed) for part in lane.split("+")]
        if None in changes:
            return None
        changed = {key: value for change in changes for key, value in change.items()}
        args = settings_of(self.base, changed | {"seed": seed})
        known = json.dumps({key: value for key, value in vars(args).items() if key not in train.FREE}, sort_keys=True)
        args.out = str(self.folder / "runs" / f"{lane}-seed{seed}-{hashlib.sha256(known.encode()).hexdigest()[:8]}.pt")
        return args

    def command(self, args) -> str:
        """What makes this run by itself, to the last bit on the same machine."""
        return f"OMP_NUM_THREADS={self.threads} {train.command_line(args)}" + {None: "", True: " --compile", False: " --no-compile"}[args.compile]

    def result(self, lane: str, seed: int) -> dict | None:
        """What came out of a finished and diagnosed run."""
        args = self.args(lane, seed)
        with contextlib.suppress(FileNotFoundError):
            result = args and json.loads(diagnosis_path(args.out).read_text())
            return result and result | {"lane": lane, "seed": seed, "command": self.command(args), "lost": result["permuted"][0]}
        return None

    def call(self, command: list[str], log: Path, heard=lambda line: None):
        """Runs a command, its output into the log. Failed: with its last line."""
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"}
        with open(log, "a") as f:
            # A child keeps the folder's lock: no second sweep starts beside what a killed one left, which ends with its next line.
            child = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                     errors="replace", env=environment, pass_fds=(self.lock.fileno(),) if self.lock else ())
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
        there = out.exists()

        def listen(line: str):
            word, _, rest = line.partition(" ")
            epoch = rest.split("/")[0].strip()
            if word == "epoch" and epoch.isdigit():
                heard(int(epoch) / args.epochs)

        if not there or "progress" in train.read_checkpoint(out):
            flags = ["--resume", f"--out={out}"] if there else train.as_flags(vars(args) | {"compile": None}) + {None: [], True: ["--compile"], False: ["--no-compile"]}[args.compile]
            self.call([str(HERE / "train.py"), *flags], log, listen)
        heard(1.0)
        if not diagnosis_path(out).exists():
            self.call(["-c", "import sys; sys.path.insert(0, sys.argv[1]); import interventions; interventions.diagnose(sys.argv[2])", str(HERE), str(out)], log)

    def stop(self):
        self.stopping.set()
        for child in list(self.children):
            child.terminate()

    def flops(self, lane: str) -> float:
        """Counted, of the whole training."""
        args = settings_of(self.base, {"branch": "bias"}) if "column" in lane else self.args(lane, self.seeds[0])
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
                except (Failed, train.InputError) as error:
                    if not self.stopping.is_set():
                        failed[lane, seed] = str(error)
                        tqdm.write(f"{lane}, seed {seed} failed: {error}", file=sys.stderr)
                else:
                    found = self.result(lane, seed)
                    tqdm.write(f"{lane:18s} seed {seed}  accuracy {100 * found['accuracy']:.2f}%  PSNR {found['psnr']:.2f} dB  "
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
def diagnose(path: str):
    """What the report takes from one finished run, as JSON beside its checkpoint: predictions on the test images, geometry of the
    weights and of every stage of the reader, and what permuting the bias column costs."""
    content = train.read_checkpoint(path)
    args, device = argparse.Namespace(**content["args"]), train.find_device(content["args"]["device"])
    model = train.model_from(content, path, device).eval().requires_grad_(False)
    model.bf16 = False                                     # small differences are compared
    data, test = train.load_dataset(args, device)
    bank, queries = diagnostics.bank_and_queries(diagnostics.fitter(model), data, test, device, args.workers)
    bias = torch.cat([block.tokens[..., -1:] for block in queries.blocks()])

    def predict(donors=None):
        """donors: of each image, the one whose bias column its tokens get."""
        found = []
        for block in queries.blocks():
            rows = torch.arange(block.start, block.start + len(block.labels), device=device)
            given = bias[rows if donors is None else donors.to(device)[rows]]
            found.append(model.read(torch.cat([block.tokens[..., :-1], given], -1), colour=model.colour(block.images.flatten(2).mT)).argmax(-1))
        return torch.cat(found)

    guess, labels = predict(), queries.labels
    right = guess == labels
    moved = [predict(diagnostics.donors(labels, "any", repeat, 0)) == labels for repeat in range(5)]
    mean = sum(block.tokens.sum(0, dtype=torch.float64) for block in bank.blocks()).float() / len(bank)
    energy = sum((block.tokens - mean).square().sum((0, 1)) for block in bank.blocks())                # of each column
    coordinates = diagnostics.weight_coordinates(bank, args.depth, model.siren.hidden.flatten(0, 1), model.reader.beta)
    untrained = train.build_model(args, data.channels, len(data.classes)).reader.to(device).requires_grad_(False)
    clustering = diagnostics.clustering(coordinates, bank, queries, guess)
    flow = diagnostics.token_flow(model.read, untrained, bank, queries, flattened=False)
    parameters, flops = cost(args, data.channels, len(data.classes))
    diagnostics.save(diagnosis_path(path), {
        "name": Path(path).stem, "training": vars(args), "reader": float(right.double().mean()), "right": "".join(map(str, right.int().tolist())),
        "accuracy": content["metrics"]["test_accuracy"], "psnr": content["metrics"]["test_psnr"], "seconds": content["metrics"]["seconds"],
        "parameters": parameters, "gflop_per_image": flops / 1e9, "purity": clustering["purity"], "last_knn10": flow["rows"][-1]["pooled_knn10"],
        "permuted": diagnostics.bootstrap(torch.stack([right.double() - m.double() for m in moved], 1), diagnostics.over_repeats()),
        "highest_column": int(energy[:-1].argmax()), "experiments": {"clustering": clustering, "token-flow": flow}, **train.environment(device)})


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


def factorial(y: np.ndarray) -> dict[str, tuple[float, float | None, float | None]]:
    """Main effects and interactions of y (8 cells as CELLS, seeds): (value, low, high), 95% t intervals from the pooled residual of
    cells + seeds, (8 - 1)(seeds - 1) degrees of freedom. With one seed there is no residual: low and high are None."""
    cells, seeds = y.shape
    residual = y - y.mean(1, keepdims=True) - y.mean(0) + y.mean()
    freedom = (cells - 1) * (seeds - 1)
    result = {}
    for subset in SUBSETS:
        c = contrast(subset)
        value = float(c @ y.mean(1))
        half = diagnostics.t_quantile(freedom) * math.sqrt(float((residual ** 2).sum()) / freedom * float(c @ c) / seeds) if freedom else None
        result[" x ".join(FACTORS[f] for f in subset)] = (value, None, None) if half is None else (value, value - half, value + half)
    return result


def factorial_over_images(right: torch.Tensor, odds: bool = False) -> dict[str, tuple[float, float, float]]:
    """The same for one seed: intervals over the test images, right (n, 8), by the paired bootstrap."""
    n = len(right)
    scale = (lambda m: torch.log((m * n + 0.5) / (n - m * n + 0.5))) if odds else (lambda m: m)
    return {" x ".join(FACTORS[f] for f in subset): diagnostics.bootstrap(right, lambda m, c=torch.from_numpy(contrast(subset)): scale(m) @ c) for subset in SUBSETS}


def hits(result: dict) -> torch.Tensor:
    """Which test images a run reads right (n,)."""
    return torch.tensor([float(c) for c in result["right"]], dtype=torch.float64)


def difference(found: dict[str, list[dict]], lane: str, other: str, key: str = "reader") -> dict | None:
    """lane - other, paired by seed: its t interval, or with one seed, of accuracies, the interval over images."""
    pairs = [(a, b) for a in found.get(lane, []) for b in found.get(other, []) if a["seed"] == b["seed"]]
    if not pairs or lane == other:
        return None
    interval = diagnostics.t_interval([a[key] - b[key] for a, b in pairs])
    if interval is None:
        interval = diagnostics.paired_bootstrap(hits(pairs[0][0]), hits(pairs[0][1])) if key == "reader" else (pairs[0][0][key] - pairs[0][1][key], None, None)
    return {"lane": lane, "minus": other, "seeds": len(pairs), "interval": interval}


def summarise(found: dict[str, list[dict]]) -> dict:
    """All figures of the report. found: each lane's results, a seed each."""
    report = {"lanes": [], "controls": [], "factorial": None}
    for lane, results in found.items():
        column = lambda key: np.array([r[key] for r in results], dtype=float)
        mean_sd = lambda key: (float(column(key).mean()), float(column(key).std(ddof=1)) if len(results) > 1 else None)
        report["lanes"].append({"lane": lane, "n": len(results), "accuracy": mean_sd("reader"), "difference": difference(found, lane, against(lane)), "minus": against(lane),
                                "purity_difference": difference(found, lane, against(lane), "purity"), "psnr": mean_sd("psnr"), "purity": mean_sd("purity"),
                                "last_knn10": mean_sd("last_knn10"), "permuted": mean_sd("lost"), "parameters": results[0]["parameters"],
                                "gflop_per_image": results[0]["gflop_per_image"], "seconds": mean_sd("seconds")})
        if lane != "deeper" and not lane.startswith("cluster") and lane in (*FACTORS, *COMBINED):
            control = difference(found, lane, "deeper")
            report["controls"] += [control] if control else []
    cells = [lane_of(cell) for cell in CELLS]
    seeds = sorted(set.intersection(*({r["seed"] for r in found.get(lane, [])} for lane in cells)))
    if seeds:
        of = {(r["lane"], r["seed"]): r for lane in cells for r in found[lane]}
        y = np.array([[of[lane, seed]["reader"] for seed in seeds] for lane in cells])
        n = len(of[cells[0], seeds[0]]["right"])
        if len(seeds) > 1:
            effects, odds = factorial(y), factorial(log_odds(y, n))
        else:
            right = torch.stack([hits(of[lane, seeds[0]]) for lane in cells], 1)
            effects, odds = factorial_over_images(right), factorial_over_images(right, odds=True)
        mean = y.mean(1)
        single = {f: mean[cells.index(FACTORS[f])] - mean[0] for f in range(len(FACTORS))}
        report["factorial"] = {"seeds": len(seeds), "accuracy": effects, "log_odds": odds, "cells": [
            {"lane": lane, "measured": float(m), "additive": float(mean[0] + sum(single[f] for f, on in enumerate(cell) if on))} for lane, cell, m in zip(cells, CELLS, mean)]}
    report["across"] = diagnostics.across(diagnostics.points([r for results in found.values() for r in results]))
    return report


def claims(report: dict) -> list[str]:
    """One line a claim, by the rules printed with them."""
    across, span, side, lines = report["across"], diagnostics.span, diagnostics.side, []
    about = lambda n: f"over {n} seeds" if n > 1 else "over test images, one seed: it says nothing about the method"
    lines += [v for v in across["verdicts"] if v.split(":")[0] in ("C1, baseline", "C2, baseline")]
    if not lines:
        rho = {key: (c or {}).get("spearman", {}) for key, c in across["correlations"].items()}
        purity, last = rho.get("purity", {}).get("phi - theta"), rho.get("stage purity", {}).get("last - first")
        lines += [f"C1: not decided here (fewer than three seeds). Spearman's rho(purity of phi - theta, accuracy) {span(purity, 1, 2)} over {across['models']} models of one architecture (rule: < 0.5)",
                  f"C2: not decided here (fewer than three seeds). rho(purity at the last stage) - rho(purity of phi - theta) {span(last, 1, 2)} (rule: > 0)"]
    for row in report["lanes"]:
        if row["lane"].startswith("cluster") and row["difference"]:
            lines.append(f"C1, {row['lane']}: purity of phi - theta {shown(row['purity_difference']['interval'], 1, 3)}, accuracy {span(row['difference']['interval'], 100)} points against {row['minus']}, "
                         + about(row["difference"]["seeds"]))
    for control in report["controls"]:
        sign = side(control["interval"], 0)
        verdict = {1: "supported", -1: "refuted", 0: "not decided here"}[sign] if control["seeds"] >= 3 else "not decided here (fewer than three seeds)"
        lines.append(f"C4, {control['lane']}: {verdict}. Accuracy - that of the capacity control {span(control['interval'], 100)} points, {about(control['seeds'])} (rule: > 0, refuted < 0)")
    if report["factorial"]:
        found = report["factorial"]
        both = [name for name in found["accuracy"] if "x" in name and all(side(found[scale][name], 0) for scale in ("accuracy", "log_odds"))]
        lines.append(f"C4, adding up: {'not additive: ' + ', '.join(both) if both else 'no interaction excludes 0 in accuracy and in log-odds'}; " + about(found["seeds"])
                     + " (rule: not additive if an interaction excludes 0 in both)")
    return lines


# ---- Report --------------------------------------------------------------------------------------------------------------

def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown with its columns aligned, so that it reads on a terminal too; all but the first are flush right."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    line = lambda cells: "| " + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths))) + " |"
    return "\n".join([line(header), "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|", *map(line, rows)])


def plus_minus(pair, factor: float = 1, digits: int = 1) -> str:
    return " ± ".join(f"{factor * x:.{digits}f}" for x in pair if x is not None)


def shown(interval, factor: float = 1, digits: int = 1) -> str:
    """value [low, high], or the value alone."""
    return diagnostics.span(interval, factor, digits) if interval[1] is not None else f"{factor * interval[0]:+.{digits}f}"


def lane_table(report: dict) -> str:
    rows = [[r["lane"], str(r["n"]), plus_minus(r["accuracy"], 100), shown(r["difference"]["interval"], 100) if r["difference"] else "",
             plus_minus(r["psnr"][:1]), plus_minus(r["purity"][:1], 1, 3), plus_minus(r["last_knn10"][:1], 100), plus_minus(r["permuted"][:1], 100)] for r in report["lanes"]]
    return table(["lane", "n", "accuracy %", "- baseline", "PSNR", "purity", "10-NN", "bias"], rows)


def cost_table(report: dict, found: dict[str, list[dict]], base) -> str:
    def flags(lane):
        return " ".join(train.as_flags({key: value for key, value in found[lane][0]["training"].items() if key not in train.FREE | {"seed"} and value != getattr(base, key)}))
    return table(["lane", "flags", "parameters", "GFLOP an image", "training, s"],
                 [[r["lane"], f"`{flags(r['lane'])}`" if flags(r["lane"]) else "", f"{r['parameters']:,}", f"{r['gflop_per_image']:.3f}", plus_minus(r["seconds"], 1, 0)] for r in report["lanes"]])


def factorial_table(found: dict) -> str:
    return table(["effect", "accuracy, points", "log-odds"], [[name, shown(found["accuracy"][name], 100, 1), shown(found["log_odds"][name], 1, 3)] for name in found["accuracy"]]) + "\n\n" + table(
        ["cell", "measured %", "singles added up %"], [[c["lane"], f"{100 * c['measured']:.1f}", f"{100 * c['additive']:.1f}"] for c in found["cells"]])


COLUMNS = """accuracy: of the reader on test images, mean ± sd over n seeds; - baseline: paired by seed, points, [95% t interval], with one seed
[over test images] (lanes cluster...: against baseline64); PSNR in dB; purity: share of the 10 nearest test images in phi - theta that
have an image's class; 10-NN: at the reader's last stage, mean over tokens, %; bias: accuracy lost with the bias column permuted, points."""


def write_report(sweep: Sweep, about: dict, failed: dict) -> bool:
    """report.md, report.json and figures in the sweep's folder, tables on the terminal. False where nothing is finished."""
    found = {lane: [r for r in (sweep.result(lane, seed) for seed in sweep.seeds) if r] for lane in sweep.lanes}
    found = {lane: results for lane, results in found.items() if results}
    missing = [f"{lane} seed {seed}" for lane in sweep.lanes for seed in sweep.seeds if seed not in [r["seed"] for r in found.get(lane, [])]]
    if not found:
        return False
    report, everything = summarise(found), [r for results in found.values() for r in results]
    n = len(everything[0]["right"])
    figures = {"lanes.png": lanes_figure, "clusters.png": clusters_figure, "factorial.png": factorial_figure, "population.png": population_figure}
    drawn = [name for name, draw in figures.items() if draw(sweep.folder / name, report)]
    for name in set(figures) - set(drawn):
        (sweep.folder / name).unlink(missing_ok=True)
    lines = claims(report)
    hardware = sorted({f"{r['device']}, {r['threads']} threads a run, torch {r['versions']['torch']}" for r in everything})
    text = [f"# Interventions on {sweep.base.dataset}, {sweep.base.size}x{sweep.base.size} pixels", f"`{about['command']}`",
            f"{len(everything)} runs of {len(found)} lanes, {len(sweep.seeds)} seed{'s' * (len(sweep.seeds) > 1)}; {n} test images; {'; '.join(hardware)}."
            + (f" Not there: {', '.join(missing)}." if missing else "") + "".join(f"\nFailed: {lane}, seed {seed}: {words}." for (lane, seed), words in failed.items()),
            lane_table(report), COLUMNS, "## Claims", "\n".join(f"- {line}" for line in lines)]
    captions = {"lanes.png": "Accuracy less the baseline's", "clusters.png": "Purity of the weights against accuracy", "factorial.png": "Effects and interactions of the three factors",
                "population.png": "Which stage's purity goes with accuracy"}
    text += [f"![{captions[name]}]({name})" for name in drawn]
    text += ["## Do gains add up", factorial_table(report["factorial"])] if report["factorial"] else []
    text += ["## Cost", cost_table(report, found, sweep.base), "## Commands", "Each gives its run by itself, bit for bit on the same machine.", "```\n" + "\n".join(r["command"] for r in everything) + "\n```"]
    (sweep.folder / "report.md").write_text("\n\n".join(text) + "\n")
    diagnostics.save(sweep.folder / "report.json", about | {"failed": {f"{lane}, seed {seed}": words for (lane, seed), words in failed.items()}, "missing": missing, "claims": lines, **report, "runs": [
        {key: r[key] for key in ("lane", "seed", "command", "reader", "psnr", "purity", "last_knn10", "permuted", "parameters", "gflop_per_image", "seconds", "device", "threads", "versions")} for r in everything]})
    print("\n\n".join([lane_table(report), diagnostics.fold(" ".join(COLUMNS.split())), diagnostics.fold("\n".join(lines))]))
    print(f"wrote {', '.join(f'{sweep.folder}/{name}' for name in ('report.md', 'report.json', *drawn))}")
    return True


# ---- Figures: each returns whether there was anything to draw ------------------------------------------------------------

def lanes_figure(path: Path, report: dict) -> bool:
    rows = [(r["lane"], r["difference"]) for r in report["lanes"] if r["difference"]]
    if rows:
        figure, (axis,) = diagnostics.canvas(1, 1, 8, 1.5 + 0.28 * len(rows))
        diagnostics.bars(axis, [lane for lane, _ in rows], [d["interval"] for _, d in rows], ["C1" if lane == "deeper" else "C0" for lane, _ in rows])
        axis.set_xlabel("accuracy - that of its baseline (points)")
        axis.set_title("95% intervals " + ("over seeds" if rows[0][1]["seeds"] > 1 else "over test images, one seed") + "; orange: capacity control", fontsize=10)
        figure.savefig(path)
    return bool(rows)


def clusters_figure(path: Path, report: dict) -> bool:
    """Purity of phi - theta against accuracy as the weight of the class loss, or of the contrastive loss, grows."""
    by = {r["lane"]: r for r in report["lanes"]}
    series = {"weight of the class loss (w_task)": [lane for lane in ("wt", "task0.001", "baseline", "task0.1", "task1", "task10") if lane in by],
              "weight of the contrastive loss (w_cluster), batches of 64": [lane for lane in ("baseline64", "cluster0.01", "cluster0.1", "cluster1") if lane in by]}
    if max(map(len, series.values())) < 2:
        return False
    figure, (axis,) = diagnostics.canvas(1, 1, 8, 5.2)
    for (title, lanes), style, color in zip(series.items(), ("o-", "s--"), ("C0", "C3")):
        if lanes:
            x, y = ([by[lane][key] for lane in lanes] for key in ("purity", "accuracy"))
            axis.errorbar([m for m, _ in x], [100 * m for m, _ in y], xerr=[sd or 0 for _, sd in x], yerr=[100 * (sd or 0) for _, sd in y], fmt=style, color=color, capsize=2, alpha=0.8, label=title)
            for lane, (px, _), (py, _) in zip(lanes, x, y):
                axis.annotate(lane, (px, 100 * py), textcoords="offset points", xytext=(5, 5 if style == "o-" else -11), fontsize=8, color=color)
    axis.set_xlabel("neighbour purity of phi - theta (share of 10 nearest test images)")
    axis.set_ylabel("reader accuracy (%)")
    axis.set_title("Does accuracy follow purity? " + ("Bars: sd over seeds" if report["lanes"][0]["n"] > 1 else "One seed"), fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    axis.margins(0.12)
    figure.savefig(path)
    return True


def factorial_figure(path: Path, report: dict) -> bool:
    found = report["factorial"]
    if not found:
        return False
    figure, axes = diagnostics.canvas(1, 3, 14, 4.2)
    for axis, scale, factor, label in zip(axes, ("accuracy", "log_odds"), (100, 1), ("points of accuracy", "log-odds")):
        for i, (name, (value, low, high)) in enumerate(found[scale].items()):
            if low is not None:
                axis.plot([factor * low, factor * high], [i, i], color="black", linewidth=1.2)
            axis.plot(factor * value, i, "s" if "x" in name else "o", color="C1" if "x" in name else "C0")
        axis.set_yticks(range(len(found[scale])), list(found[scale]), fontsize=9)
        axis.invert_yaxis()
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_title("Main effects (circles) and interactions (squares)\n95% intervals " + (f"over {found['seeds']} seeds, pooled residual" if found["seeds"] > 1 else "over test images, one seed"), fontsize=10)
    cells = found["cells"]
    axes[2].plot([100 * c["measured"] for c in cells], range(len(cells)), "o", label="measured")
    axes[2].plot([100 * c["additive"] for c in cells], range(len(cells)), "D", markerfacecolor="none", color="C3", label="baseline + gains of the singles")
    axes[2].set_yticks(range(len(cells)), [c["lane"] for c in cells], fontsize=9)
    axes[2].invert_yaxis()
    axes[2].set_xlabel("accuracy (%)")
    axes[2].grid(alpha=0.3)
    axes[2].legend(fontsize=8)
    figure.savefig(path)
    return True


def population_figure(path: Path, report: dict) -> bool:
    if len(report["across"]["points"]) < 2:
        return False
    diagnostics.models_figure(path, report["across"])
    return True


# ---- Command line --------------------------------------------------------------------------------------------------------

OWN = ("lanes", "seeds", "jobs", "report_only", "out")
UNUSED = ("resume", "eval_only", "ckpt", "bench")


def parser() -> train.Parser:
    p = train.Parser(prog="interventions.py", description=__doc__.split("\n\n")[0] + " Any flag of train.py holds for all lanes.", parents=[train.parser()],
                     conflict_handler="resolve", argument_default=argparse.SUPPRESS, allow_abbrev=False)
    group = p.add_argument_group("sweep")
    group.add_argument("--lanes", nargs="+", help=f"all, or some of {', '.join(LANES)}, or several joined by + (default all)", metavar="LANE")
    group.add_argument("--seeds", type=train.whole(1), help="so many, from --seed on (default 3)")
    group.add_argument("--jobs", type=train.whole(1), help="runs at a time (default 1)")
    group.add_argument("--report-only", action="store_true", help="tables and figures of what is in --out")
    group.add_argument("--out", help="folder of the sweep")
    return p


def in_order(lanes: list[str]) -> list[str]:
    """The lanes asked for and those they are compared with, each once, baselines first."""
    for lane in lanes:
        unknown = [part for part in lane.split("+") if part not in LANES]
        if unknown or len(set(lane.split("+"))) < len(lane.split("+")):
            raise train.InputError(f"--lanes {lane}: {f'there is no lane {unknown[0]}' if unknown else 'the same one twice'}; there are {', '.join(LANES)}, and several joined by +")
    wanted = {"baseline", *lanes, *map(against, lanes)}
    return sorted(wanted, key=lambda lane: (list(LANES).index(lane) if lane in LANES else len(LANES), lane.count("+"), lane))


def read_mark(folder: Path) -> dict | None:
    """What the folder's sweep is. InputError: a folder with something else in it."""
    try:
        mark = json.loads((folder / "sweep.json").read_text())
        if mark["format"] == MARK and mark["version"] == VERSION:
            return mark
    except FileNotFoundError:
        if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise train.InputError(f"--out {folder}: holds something else than a sweep of this program; name another folder")


def run(argv: list[str] | None):
    given = vars(parser().parse_args(argv))
    explicit = {key: value for key, value in given.items() if key not in OWN}
    for key in UNUSED:
        if key in explicit:
            raise train.InputError(f"--{key.replace('_', '-')}: a flag of train.py alone")
    if "out" not in given:
        raise train.InputError("--out: name the sweep's folder")
    folder = Path(given["out"])
    mark = read_mark(folder)
    if given.get("report_only"):
        if mark is None:
            raise train.InputError(f"--out {folder}: no sweep there")
        if explicit or "lanes" in given or "seeds" in given:
            raise train.InputError("--report-only takes --out alone: the folder knows its sweep")
        explicit, asked, count = mark["flags"], mark["lanes"], mark["seeds"]
    else:
        asked = given.get("lanes", ["all"])
        asked = in_order([*LANES, *COMBINED] if "all" in asked else asked)
        count = given.get("seeds", 3)
    base = train.settings(explicit)
    data = {key: getattr(base, key) for key in ("dataset", "size", "train_size", "test_size", "val")}
    if mark and mark["data"] != data:
        raise train.InputError(f"--out {folder}: holds a sweep of other data ({mark['data']['dataset']}, {mark['data']['size']} pixels a side); name another folder")
    everything, _ = train.load_dataset(base, train=False)
    if max(64 if any("64" in lane or "cluster" in lane for lane in asked) else 1, base.batch_size) > len(everything):
        raise train.InputError(f"--lanes: batches of up to {max(64, base.batch_size)}, but there are only {len(everything)} training images")
    device = train.find_device(base.device)
    jobs = given.get("jobs", 1)
    # One number of threads for all runs of a folder, since rounding depends on it.
    threads = mark["threads"] if mark else int(os.environ.get("OMP_NUM_THREADS") or 0) or max(1, (os.cpu_count() or 1) // jobs)
    flags = {key: value for key, value in explicit.items() if key not in ("workers", "save_minutes")}
    lanes, seeds = asked, count
    if mark and mark["flags"] == flags:                    # the report covers what earlier commands asked for, too
        lanes, seeds = in_order(list(dict.fromkeys([*mark["lanes"], *asked]))), max(count, mark["seeds"])
    sweep = Sweep(folder, base, asked, list(range(base.seed, base.seed + count)), threads, train.facts(everything))
    for lane in asked:                                     # every run's settings are looked at before the first starts
        args = sweep.args(lane, base.seed)
        if args:
            train.settings({key: value for key, value in vars(args).items() if value is not None and value is not False})
    about = train.environment(device) | {"command": shlex.join(["python", "interventions.py", *(sys.argv[1:] if argv is None else argv)]), "flags": vars(base), "seeds": seeds}
    failed = {}
    if not given.get("report_only"):
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
        diagnostics.save(folder / "sweep.json", {"format": MARK, "version": VERSION, "data": data, "threads": threads, "flags": flags, "lanes": lanes, "seeds": seeds})
        failed = sweep.work(jobs)
    sweep.lanes, sweep.seeds = lanes, list(range(base.seed, base.seed + seeds))
    written = write_report(sweep, about, failed)
    if failed:
        raise train.Stop(1, f"{len(failed)} of the runs failed; the same command tries them again")
    if not written:
        raise train.Stop(1, "no run is finished: nothing to report")


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
