"""Trains variants of the model ("lanes"), several seeds each, diagnoses every run, and asks what
each change does and whether gains add up.

    python interventions.py --dataset digits --lanes all --seeds 3 --out sweep
    python interventions.py --lanes baseline bias route route+bias deeper --epochs 5 --out sweep
    python interventions.py --report-only --out sweep      # of what is there

A lane is a few flags of train.py; any other flag holds for all. A stopped sweep goes on with the
same command. Several may share a folder, in a terminal each, with other --lanes or seeds (--seed 3
--seeds 2: 3 and 4): a run is made once, and a report is of all.
"""
import argparse
import inspect
import itertools
import json
import math
import os
import statistics
import time
import traceback
from pathlib import Path

import torch
from torch import Tensor

import figures
import train
from bench import step_flops
from checkpoint import InputError, Stop, exits, generator, model_from, read_checkpoint
from claims import (OPEN, POINTS, fold, helps_verdict, percent, pressure_verdict, side, span,
                    table)
from data import load_dataset
from diagnostics import Fitted, accuracy, clustering, coordinate_systems, fit_all
from measures import bootstrap, holm, spearman, t_interval, t_quantile, t_test
from routes import BLOCK, donors
from settings import (FREE, RECIPE, as_flags, command_line, environment, find_device, flag, parser,
                       settings, whole)

# ---- Lanes ---------------------------------------------------------------------------------------
#
# A lane changes one thing; lanes joined by + change several. Each is compared with the baseline and
# with what could explain its gain away: more compute (`baseline@LANE`, the baseline trained for the
# lane's FLOPs), another column (`column`, `column-random` for `bias`), the mean colour gone
# (`centred` for `colour`), a second loss whatever its labels (`cluster-random1`). `deeper` is
# capacity alone. A contrastive loss needs batches with pairs: `baseline64`.

COLUMN = "column:0"    # which one depends on the seed
CLUSTER = "a contrastive loss on phi - theta, batches of at least 64"
RANDOM = CLUSTER + ", labels at random"
LANES = {              # name: what changes, in words and in flags (`lane_flags` adapts some)
    "baseline": ("shared-anchor MWT", {}),
    "wt": ("no class loss for the INR", {"w_task": 0.0}),
    **{f"task{w:g}": ("another weight of the class loss", {"w_task": w})
       for w in (0.001, 0.1, 1.0, 10.0)},
    "baseline64": ("batches of at least 64", {"batch_size": 64}),
    **{f"cluster{w:g}": (CLUSTER, {"batch_size": 64, "w_cluster": w}) for w in (0.01, 0.1, 1.0)},
    **{f"cluster-random{w:g}": (RANDOM, {"batch_size": 64, "w_cluster": w, "cluster_random": True})
       for w in (0.1, 1.0)},
    "route": ("learned queries gather the tokens", {"readout": 8}),
    "bias": ("the bias column to the logits by a branch", {"branch": "bias"}),
    "column": ("as bias, but the column of highest energy in its baseline", {"branch": COLUMN}),
    "column-random": ("as bias, but a random column, by the seed", {"branch": COLUMN}),
    "centred": ("the mean colour removed before fitting", {"centre_colour": True}),
    "colour": ("centred, the mean colour by a branch", {"centre_colour": True, "branch": "colour"}),
    "dense": ("four more inner steps, on all pixels", {"steps": 4, "fraction": 1.0}),
    "deeper": ("a reader so deep that a step costs twice", {"reader_depth": 0})}
FACTORS = ("route", "bias", "dense")
CELLS = list(itertools.product((0, 1), repeat=3))      # which of them are on
CELL_LANES = ["+".join(itertools.compress(FACTORS, cell)) or "baseline" for cell in CELLS]
JUDGED = [*CELL_LANES[1:], "column", "column-random", "deeper"]           # by C4
PRESSED = ["cluster0.01", "cluster0.1", "cluster1"]                       # by C1c
MATCHED = "baseline@"


def place(lane: str) -> tuple:
    """Where a lane stands in a table: as in LANES, then joined ones; each before its compute's."""
    parts = lane.removeprefix(MATCHED).split("+")
    return len(parts), [list(LANES).index(part) for part in parts], lane.startswith(MATCHED)


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
    if "all" in lanes:
        lanes = [*lanes, *LANES, *CELL_LANES, *(MATCHED + lane for lane in JUDGED)]
    found = {"baseline"}
    for lane in set(lanes) - {"all"}:
        parts = lane.removeprefix(MATCHED).split("+")
        if not set(parts) <= set(LANES):
            raise InputError(f"--lanes {lane}: not of {', '.join(LANES)}, joined by + or not, or "
                             f"{MATCHED}LANE")
        plain = "+".join(sorted(parts, key=place))
        found |= {MATCHED + plain} if lane.startswith(MATCHED) else {plain, rivals(plain)[0]}
    return sorted(found, key=place)


def image_flops(args, facts, **changed) -> float:
    """Of training on one image; facts: as `train.facts` gives."""
    args = argparse.Namespace(**vars(args) | changed)
    return step_flops(args, facts[0], len(facts[1])) / args.batch_size


def lane_flags(lane: str, base, facts, usual: float) -> dict:
    """The flags of a lane. base: the sweep's settings; usual: FLOPs of its baseline."""
    if lane.startswith(MATCHED):
        flags = lane_flags(lane.removeprefix(MATCHED), base, facts, usual)
        times = image_flops(base, facts, **flags) / usual
        return {"epochs": max(1.0, round(base.epochs * times, 2))}
    found, parts = {}, lane.split("+")
    for part in parts:
        for key in set(found) & set(LANES[part][1]):
            raise InputError(f"--lanes {lane}: two of its parts set {flag(key)}")
        found |= LANES[part][1]
    if "batch_size" in found:
        found["batch_size"] = max(64, base.batch_size)
    if "dense" in parts:
        found["steps"] += base.steps
    if "deeper" in parts:
        block = image_flops(base, facts, reader_depth=base.reader_depth + 1) - usual
        found["reader_depth"] = base.reader_depth + round(usual / block)
    return found


# ---- The folder ----------------------------------------------------------------------------------
#
# sweep.json holds the settings of all runs, and their number of threads, since rounding depends on
# it; runs/ holds train.py's files and, of each finished run, a .diagnosis.json.

MEASURES = ("reader", "psnr", "purity", "gap", "lost", "lost_branch")


def read_runs(folder: Path) -> dict[tuple[str, int], dict]:
    """The diagnosis of each finished run, by (lane, seed)."""
    found = {}
    for path in (folder / "runs").glob("*.diagnosis.json"):
        lane, _, seed = path.name.removesuffix(".diagnosis.json").rpartition("-seed")
        try:
            run, seed = json.loads(path.read_text()), int(seed.split("-")[0])  # once with a hash
            if "lost_branch" not in run and run["training"]["branch"] == "bias":
                run["lost"] = None             # the first runs exchanged both at once
            found[lane, seed] = {"lost_branch": None} | run | {"lane": lane, "seed": seed}
        except Exception as error:             # whatever a damaged file brings
            raise InputError(f"{path}: damaged; delete it, and it is made again") from error
    return {key: found[key] for key in sorted(found, key=lambda key: (place(key[0]), key[1]))}


def write_json(path: Path, content: dict):
    """Whole or not at all, whatever other process writes it too."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


def open_sweep(folder: Path, base=None) -> argparse.Namespace:
    """The settings of the folder's sweep. base: what they must be, and are in a new folder."""
    path = folder / "sweep.json"
    try:
        if base and not (folder.exists() and any(folder.iterdir())):
            (folder / "runs").mkdir(parents=True)
            write_json(path, {"threads": torch.get_num_threads(), "settings": vars(base)})
        found = json.loads(path.read_text())
        saved = RECIPE | found["settings"]
        torch.set_num_threads(found["threads"])
    except Exception as error:                 # whatever a file of something else brings
        raise InputError(f"--out {folder}: not of a sweep, or damaged: {error}") from error
    for key, value in vars(base).items() if base else ():
        if key not in FREE | {"seed"} and saved[key] != value:
            raise InputError(f"--out {folder}: its sweep has {flag(key)} {saved[key]}, not {value}")
    return argparse.Namespace(**saved)


# ---- A run ---------------------------------------------------------------------------------------
#
# By train.main in this process, as its printed command would. It is claimed first, by a file that
# only one process can create. When that and the checkpoint have not been written for ten minutes
# (or twice --save-minutes) their process is taken for dead.

COMPILE = {None: [], True: ["--compile"], False: ["--no-compile"]}


def run_args(folder: Path, base, lane: str, flags: dict, seed: int, runs: dict):
    """The settings of a run; runs: those that are there, for the baseline's column."""
    args = argparse.Namespace(**vars(base) | flags | {
        "seed": seed, "out": str(folder / "runs" / f"{lane}-seed{seed}.pt")})
    if args.branch == COLUMN:
        column = runs.get(("baseline", seed), {}).get("highest_column")
        if "column-random" in lane:
            column = int(torch.randint(base.width, (), generator=generator("column", seed)))
        args.branch = f"column:{column}"
    return args


def claim(args) -> bool:
    """Whether the run is this process's now."""
    path, now = Path(args.out).with_suffix(".claim"), time.time()
    files = [file for file in (path, Path(args.out)) if file.exists()]
    if all(now - file.stat().st_mtime > 60 * max(10, 2 * args.save_minutes) for file in files):
        path.unlink(missing_ok=True)
    try:
        path.open("x").close()
        return True
    except FileExistsError:
        return False


def work(folder: Path, base, lanes: dict[str, dict], seeds) -> list[str]:
    """Trains and diagnoses each run that is not finished; returns what failed."""
    failed = []
    for seed, (lane, flags) in itertools.product(seeds, lanes.items()):
        runs, name = read_runs(folder), f"{lane} seed {seed}"
        if (lane, seed) in runs:
            continue
        print(f"---- {name}", flush=True)
        args = run_args(folder, base, lane, flags, seed, runs)
        if args.branch == "column:None":
            print("left out: needs its seed's baseline")
            continue
        if not claim(args):
            print("left out: of another process (if that was killed, delete the .claim)")
            continue
        try:
            out = Path(args.out)
            resume = ["--resume"] if out.exists() else []
            torch.compiler.reset()             # as in a process of its own
            train.main([*as_flags(vars(args)), *COMPILE[args.compile], *resume])
            write_json(out.with_suffix(".diagnosis.json"), diagnose(args))
        except SystemExit as error:            # train.py has said why
            if error.code >= 128:              # by Ctrl-C or SIGTERM, after saving
                raise Stop(error.code, "stopped; the same command goes on") from None
            failed.append(name)
        except Exception:                      # no disk, no memory: the next run may go
            traceback.print_exc()
            failed.append(name)
        finally:
            out.with_suffix(".claim").unlink(missing_ok=True)
    return failed


# ---- Its diagnosis -------------------------------------------------------------------------------

def predictions(model, fits: Fitted, blocks=None, branch=None) -> Tensor:
    """The model's own (n,). blocks, branch: for each image the one (n,), if not itself, whose bias
    column the blocks see, or whose column or colour the branch sees."""
    reader, found, own = model.reader, [], torch.arange(len(fits.labels))
    blocks, branch = (own if rows is None else rows for rows in (blocks, branch))
    for rows, others, seen in zip(*(each.split(BLOCK) for each in (own, blocks, branch))):
        tokens, colour = fits.tokens[rows].clone(), []
        tokens[..., -1] = fits.tokens[others, :, -1]
        if getattr(reader, "takes_colour", False):
            colour = [model.colour(model.look(fits.images[seen], model.inner_loop.steps + 1)[1])]
        x = reader.input_map(tokens)
        for block in reader.blocks:
            x = x + block(x)
        found.append(reader.conclude(x, fits.tokens[seen], *colour).argmax(-1))
    return torch.cat(found)


def diagnose(args) -> dict:
    """Of the test images: accuracy, geometry of the weights, and what exchanges cost."""
    content, device = read_checkpoint(args.out), find_device(args.device)
    model = model_from(content, args.out, device).eval().requires_grad_(False)
    model.bf16 = False                         # small differences are compared
    bank, queries = (fit_all(model.fit, images, device, args.workers)
                     for images in load_dataset(args, device))
    guesses, labels = predictions(model, queries), queries.labels
    geometry = clustering(coordinate_systems(model, bank, queries), bank.labels, labels, guesses,
                          probes=False)

    def lost(where: str) -> float:
        """Accuracy, mean over five exchanges."""
        others = (donors(labels, "any", repeat, 0) for repeat in range(5))
        return accuracy(guesses, labels) - statistics.fmean(
            accuracy(predictions(model, queries, **{where: other}), labels) for other in others)

    branch = getattr(model.reader, "branch", None)
    return {"training": vars(args), "parameters": sum(x.numel() for x in model.parameters()),
            "gflop_per_image": image_flops(args, content["data"]) / 1e9,
            "right": "".join(map(str, (guesses == labels).int().tolist())),
            "reader": accuracy(guesses, labels), "psnr": content["metrics"]["test_psnr"],
            "purity": geometry["purity"], "gap": geometry["G"]["gap"][0],
            "lost": lost("blocks"), "lost_branch": lost("branch") if branch is not None else None,
            "highest_column": int(bank.tokens[..., :-1].var(0).sum(0).argmax()),
            **environment(device)}


# ---- Contrasts -----------------------------------------------------------------------------------
#
# Weighted sums of lanes' accuracies: a lane less another; the effects of the factors, whose eight
# lanes are a 2^3 factorial design. By seed: a t interval over seeds and beside it, never in its
# place, a bootstrap over the images of one seed.

ADDED = "all - added up"


def effects() -> dict[str, dict[str, float]]:
    """The lanes' weights in each effect. A main effect: the mean of those with a factor less that
    of those without; an interaction: the difference of such differences (Fisher 1935), averaged
    over the other factors. And what all three give beyond their single gains."""
    found = {}
    for size in (1, 2, 3):
        for chosen in itertools.combinations(range(3), size):
            found[" x ".join(FACTORS[f] for f in chosen)] = {
                lane: math.prod(2 * cell[f] - 1 for f in chosen) / 2 ** (3 - size)
                for cell, lane in zip(CELLS, CELL_LANES)}
    return found | {ADDED: {"route+bias+dense": 1, "route": -1, "bias": -1, "dense": -1,
                            "baseline": 2}}


def hits(run: dict) -> Tensor:
    """Which test images a run reads right (n,)."""
    return torch.tensor([float(c) for c in run["right"]])


def detectable(gains: list[float]) -> float | None:
    """The least effect that so many seeds, spread like these, show in 80% of repeats at 5%."""
    if len(gains) < 2:
        return None
    quantiles = sum(t_quantile(len(gains) - 1, level) for level in (0.975, 0.8))
    return quantiles * statistics.stdev(gains) / math.sqrt(len(gains))


def contrasts(runs: dict, asked: dict[str, dict[str, float]]) -> dict[str, dict]:
    """Of each {lane: weight} that is asked, over the seeds that all its lanes have, if any."""
    found = {}
    for name, weights in asked.items():
        def total(measure, seed):
            return sum(weight * measure(runs[lane, seed]) for lane, weight in weights.items())

        seeds = sorted(set.intersection(*({seed for lane, seed in runs if lane == each}
                                          for each in weights)))
        if seeds:
            gains = [total(lambda run: run["reader"], seed) for seed in seeds]
            purer = [total(lambda run: run["purity"], seed) for seed in seeds]
            found[name] = {"gains": gains, "over_seeds": t_interval(gains),
                           "least": detectable(gains), "purity": t_interval(purer),
                           "over_images": bootstrap(total(hits, seeds[0]))}
    return found


def lane_row(lane: str, runs: list[dict]) -> dict:
    """Of each measure a lane's mean and, over seeds, standard deviation."""
    row = {"lane": lane, "n": len(runs), "parameters": runs[0]["parameters"],
           "gflop": runs[0]["gflop_per_image"] * runs[0]["training"]["epochs"]}
    for key in MEASURES:
        values = [run[key] for run in runs if run[key] is not None]
        row[key] = (statistics.fmean(values) if values else None,
                    statistics.stdev(values) if values[1:] else None)
    return row


def summarise(runs: dict) -> dict:
    """The report's numbers. runs: by (lane, seed)."""
    lanes = {}
    for (lane, _), run in runs.items():
        lanes.setdefault(lane, []).append(run)
    pairs = {f"{lane} - {other}": {lane: 1, other: -1}
             for lane in lanes for other in rivals(lane) if lane != other}
    return {"lanes": [lane_row(lane, of) for lane, of in lanes.items()],
            "differences": contrasts(runs, pairs), "factorial": contrasts(runs, effects())}


# ---- Claims: C1c and C4 --------------------------------------------------------------------------

def additivity_verdict(beyond: dict, gained: bool) -> str:
    """C4, adding up, by the contrast "all - added up": additive within 2 points, not additive on
    one side of 0; gained: whether any lane of the design beats the baseline."""
    interval = beyond["over_seeds"]
    if not gained or beyond["least"] > POINTS:
        return "no verdict: nothing is gained, or nothing under 2 points could be seen"
    if side(interval, 0):
        return "not additive"
    return "additive" if side(interval, -POINTS) > 0 > side(interval, POINTS) else OPEN


def judge(differences: dict, factorial: dict) -> list[str]:
    """A claim is judged with three seeds (C1c, adding up) or five (C4), of a lane and of all that
    it is compared with."""
    def compared(lane: str, seeds: int) -> list[dict]:
        """The lane less its rivals, if these all have so many seeds."""
        rows = [differences.get(f"{lane} - {other}") for other in rivals(lane)]
        return rows if all(row and len(row["gains"]) >= seeds for row in rows) else []

    lines = []
    seeds = dict.fromkeys(PRESSED, 3) | dict.fromkeys(JUDGED, 5)
    if few := [lane for lane in seeds if f"{lane} - {rivals(lane)[0]}" in differences
               and not compared(lane, seeds[lane])]:
        lines.append("not judged, for want of seeds or of a lane to compare with: "
                     + ", ".join(sorted(few, key=place)))
    for lane in PRESSED:
        if rows := compared(lane, 3):
            purity, beyond = rows[0]["purity"], rows[1]["over_seeds"] if rows[1:] else None
            verdict = pressure_verdict(purity, rows[0]["over_seeds"], beyond)
            lines.append(f"C1c, {lane}: {verdict}; purity {span(purity, 1, 3)}")
    helped = {lane: rows for lane in JUDGED if (rows := compared(lane, 5))}
    p_values = holm([t_test(rows[0]["gains"]) for rows in helped.values()])
    for (lane, rows), p in zip(helped.items(), p_values):
        gains = dict(zip(rivals(lane), (row["over_seeds"] for row in rows)))
        least = max(row["least"] for row in rows)                      # support needs all of them
        lines.append(f"C4, {lane}: {helps_verdict(gains, least, p)}; p {p:.3f}")
    if factorial and len(factorial[ADDED]["gains"]) >= 3:
        gained = any(side(differences[f"{lane} - baseline"]["over_seeds"], 0) > 0
                     for lane in CELL_LANES[1:])
        lines.append(f"C4, adding up: {additivity_verdict(factorial[ADDED], gained)}")
    return lines


def correlation(runs: dict) -> list[str]:
    """Description: does accuracy go with purity as the weight of the class loss grows?"""
    some = [run for (lane, _), run in runs.items() if lane in ("baseline", "wt") or "task" in lane]
    rho = spearman(*([run[key] for run in some] for key in ("purity", "reader", "lane")))
    return [f"no claim: rank correlation of purity and accuracy {span(rho, 1, 2)} over {len(some)} "
            "models with other weights of the class loss"] if rho else []


# ---- Report --------------------------------------------------------------------------------------

LANES_TABLE = """\
n: seeds; ± sd over them. gap: accuracy less the best of k-NN and nearest mean on phi - theta, an
image's weights less the shared anchor. PSNR: dB, of the pixels drawn. purity: share of an image's
10 nearest in phi - theta that have its class. lost: points, when the reader's blocks alone see
another image's bias column; branch: when its branch alone sees another's input. k par.: 1,000
parameters. cost: FLOPs of training over the baseline's."""
CONTRASTS = """\
Points of accuracy, paired by seed; not corrected for their number. Over n seeds: of the method;
least: the effect that so many show in 80% of repeats; over images: of the models of one seed.
baseline@: the baseline trained for the lane's compute."""
EFFECTS = """\
Do gains add up? A factor: with it less without it, averaged over the others; a x b: the difference
of such differences; all - added up: the three together less baseline and single gains."""


def lane_table(rows: list[dict]) -> str:
    usual, lines = next((row for row in rows if row["lane"] == "baseline"), rows[0]), []
    for row in rows:
        lines.append([row["lane"], str(row["n"]),
                      " ± ".join(percent(x) for x in row["reader"] if x is not None),
                      percent(row["gap"][0]), f"{row['psnr'][0]:.1f}", f"{row['purity'][0]:.3f}",
                      percent(row["lost"][0]), percent(row["lost_branch"][0]),
                      f"{row['parameters'] / 1000:.0f}", f"{row['gflop'] / usual['gflop']:.3f}"])
    return table("lane|n|accuracy %|gap|PSNR|purity|lost|branch|k par.|cost".split("|"), lines)


def contrast_table(found: dict) -> str:
    return table(["", "n", "over seeds [95% t]", "least", "over images [95% bootstrap]"], [
        [name, str(len(row["gains"])), span(row["over_seeds"], 100) if row["over_seeds"] else "",
         percent(row["least"]), span(row["over_images"], 100)] for name, row in found.items()])


def command_of(run: dict) -> str:
    """What makes a run by itself."""
    args = argparse.Namespace(**run["training"] | {"out": f"{run['lane']}-seed{run['seed']}.pt"})
    return " ".join([f"OMP_NUM_THREADS={run['threads']}", command_line(args),
                     *COMPILE[args.compile]])


def write_report(folder: Path, base, runs: dict):
    """report.md, report.json and figures in the folder; the report without commands is printed."""
    report = summarise(runs)
    lanes, differences, factorial = (report[k] for k in ("lanes", "differences", "factorial"))
    lines = [*judge(differences, factorial), *correlation(runs)]
    tables, drawn = [lane_table(lanes), LANES_TABLE], ["clusters.png"]
    figures.clusters_figure(folder / "clusters.png", lanes)
    for name, found, about in (("lanes.png", differences, CONTRASTS),
                               ("factorial.png", factorial, EFFECTS)):
        if found:
            tables += [contrast_table(found), about]
            figures.contrasts_figure(folder / name, found)
            drawn.append(name)
    one, images = next(iter(runs.values())), "held-out training" if base.val else "test"
    rules = (judge, pressure_verdict, helps_verdict, additivity_verdict)
    text = fold("\n\n".join([
        f"# Interventions on {base.dataset}, {base.size}x{base.size} pixels",
        f"{len(runs)} runs; {len(one['right'])} {images} images; {one['device']}.",
        "```", *tables, "```", "## Claims", *(f"- {line}" for line in lines),
        *map(inspect.getdoc, rules), *(f"![{name}]({name})" for name in drawn)]))
    commands = [f"# {lane}: {LANES.get(lane, [''])[0]}\n{command_of(run)}"
                for (lane, _), run in runs.items()]
    (folder / "report.md").write_text("\n\n".join([
        text, "## Commands", "Each gives its run by itself, bit for bit on the same machine.",
        "```", *commands, "```\n"]))
    write_json(folder / "report.json", {"claims": lines, **report})
    print(f"{text}\n\nwrote {folder}/report.md, report.json, {', '.join(drawn)}")


# ---- The program ---------------------------------------------------------------------------------

def run(argv: list[str] | None):
    p = parser(__doc__.split("\n\n")[0], "interventions.py")
    p.add_argument("--lanes", nargs="+", help=f"all (default), or some of {', '.join(LANES)}, "
                   f"joined by + or not; {MATCHED}LANE: the baseline for a lane's compute")
    p.add_argument("--seeds", type=whole(1), help="so many, from --seed on (default 3)")
    p.add_argument("--report-only", action="store_true", help="of the folder --out (default sweep)")
    given = vars(p.parse_args(argv))
    for key in {"resume", "eval_only", "ckpt", "steps_test"} & set(given):
        raise InputError(f"{flag(key)}: a flag of train.py alone")
    folder, failed = Path(given.get("out", "sweep")), []
    if "report_only" in given:
        base = open_sweep(folder)
    else:
        base = settings({key: value for key, value in given.items() if key in RECIPE})
        find_device(base.device)
        names = with_baselines(given.get("lanes", ["all"]))
        facts = train.facts(load_dataset(base, train=False)[0])
        usual = image_flops(base, facts)
        lanes = {lane: lane_flags(lane, base, facts, usual) for lane in names}
        open_sweep(folder, base)
        failed = work(folder, base, lanes, range(base.seed, base.seed + given.get("seeds", 3)))
    runs = read_runs(folder)
    if not runs:
        raise Stop(1, "no run is finished: nothing to report")
    write_report(folder, base, runs)
    if failed:
        raise Stop(1, f"failed: {', '.join(failed)}; the same command tries again")


def main(argv: list[str] | None = None):
    """Exit status: 0; 1 a run failed; 2 bad input; 130, 143 stopped by Ctrl-C, SIGTERM."""
    with exits("interventions.py"):
        run(argv)


if __name__ == "__main__":
    main()
