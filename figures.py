"""Every picture: a function from a report (a dict) to a file. Nothing is computed here but units.

    clustering_figure("clustering.png", report["experiments"]["clustering"])

Intervals are (value, low, high), 95%, shares of 1; they are drawn in points or percent.
"""
import itertools
import math
import textwrap
from pathlib import Path

import numpy as np

MARKERS = ("o-", "s--", "^-.", "d:", "x-")


# ---- Pieces --------------------------------------------------------------------------------------

def canvas(rows: int, columns: int, width: float, height: float, **more):
    """A figure, and its axes in one list."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **more).flatten())


def span(interval, factor: float = 100, digits: int = 1) -> str:
    """value [low, high]"""
    value, *ends = ("" if x is None else f"{factor * x:+.{digits}f}" for x in interval)
    return f"{value} [{ends[0]}, {ends[1]}]" if ends[0] else value


def wrap(text: str, width: int = 32) -> str:
    return textwrap.fill(text, width)


def names_on_y(axis, names: list[str]):
    """One name a row, the first on top."""
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.grid(axis="x", alpha=0.3)


def bars(axis, names: list[str], intervals: list, colours: list[str]):
    """Horizontal bars in points, with their intervals; None leaves a gap."""
    for i, (interval, colour) in enumerate(zip(intervals, colours)):
        if interval is not None:
            value, low, high = (None if x is None else 100 * x for x in interval)
            axis.barh(i, value, color=colour, alpha=0.75)
            if low is not None:
                axis.plot([low, high], [i, i], color="black", linewidth=1.2)
    names_on_y(axis, names)
    axis.axvline(0, color="black", linewidth=0.8)


def curves(axis, rows: list[dict], lines: list[tuple], factor: float = 1):
    """A line for each (key, style, label) that the rows have; None is a gap."""
    for key, style, label in lines:
        if rows[-1].get(key) is not None:
            values = [math.nan if row.get(key) is None else factor * row[key] for row in rows]
            axis.plot(values, style, markersize=4, label=label)


def stage_axis(axis, stages: list[str]):
    short = {"attention ": "A", "MLP ": "M", "gather ": "G", "queries ": "Q", " tokens": "",
             "input map": "map"}
    names = []
    for stage in stages:
        for long, abbreviation in short.items():
            stage = stage.replace(long, abbreviation)
        names.append(stage)
    axis.set_xticks(range(len(names)), names, fontsize=8, rotation=0 if len(names) < 12 else 60)
    axis.grid(alpha=0.3)


def whole_numbers(axis):
    axis.xaxis.get_major_locator().set_params(integer=True)


# ---- train.py and bench.py -----------------------------------------------------------------------

def training_figure(path: Path, report: dict, shown: dict):
    """Learning curves of report["epochs"], and a few test images as their weights show them after
    each inner step. shown: stages, images (n, C, h, w), shown (stages, n, C, h, w), psnr (stages,
    n), classes, guesses."""
    from matplotlib.figure import Figure
    count, stages, epochs = len(shown["images"]), shown["stages"], report["epochs"]
    size = max(9, 1.35 * (len(stages) + 1)), 2.6 + 1.75 * count
    figure = Figure(figsize=size, layout="constrained", dpi=110)
    top, bottom = figure.subfigures(2, 1, height_ratios=[2.6, 1.75 * count])
    held = "val" if report["evaluated_on"].startswith("val") else "test"
    panels = {"class loss (nats)": [("loss", "--", "train")],
              "accuracy (%)": [("train_accuracy", "--", "train"), ("test_accuracy", "-", held)],
              "PSNR (dB)": [("train_psnr", "--", "train"), ("test_psnr", "-", held)]}
    for axis, (title, lines) in zip(top.subplots(1, 3), panels.items()):
        for key, style, label in lines:
            factor = 100 if key.endswith("accuracy") else 1
            axis.plot([e["epoch"] for e in epochs], [factor * e[key] for e in epochs], style,
                      marker="o" if len(epochs) < 30 else None, markersize=3, label=label)
        axis.set_xlabel("epoch")
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=8)
        whole_numbers(axis)
    grid = bottom.subplots(count, len(stages) + 1, squeeze=False)
    for i, line in enumerate(grid):
        for j, axis in enumerate(line[:-1]):
            show(axis, shown["shown"][j][i], f"{shown['psnr'][j][i]:.1f} dB")
        name, guess = shown["classes"][i], shown["guesses"][i]
        right = "right" if name == guess else "wrong"
        show(line[-1], shown["images"][i], f"{name}\nread as {guess} ({right})")
    for axis, stage in zip(grid[0], [*stages, "image"]):
        title = stage if stage == "image" else f"step {stage}" if stage else "anchor"
        axis.set_title(title, fontsize=9)
    figure.savefig(path)


def show(axis, image: np.ndarray, text: str):
    """An image (C, h, w) in [-1, 1], text below it."""
    image = (image.transpose(1, 2, 0) + 1) / 2
    if image.shape[-1] != 3:
        image = image[..., :1].repeat(3, -1)
    axis.imshow(image.clip(0, 1), interpolation="nearest")
    axis.set_xlabel(text, fontsize=8, parse_math=False)            # a class may be called "$"
    axis.set_xticks([])
    axis.set_yticks([])


def cost_figure(path: Path, report: dict):
    """Time and memory of a step against its counted FLOPs, a line for each thing varied."""
    figure, axes = canvas(1, 2, 11, 4.6)
    for (what, rows), style in zip(itertools.groupby(report["cost"], lambda r: r["what"]), MARKERS):
        rows = list(rows)
        flops = [row["flops"] / 1e9 for row in rows]
        values = ", ".join(str(row["value"]) for row in rows)
        axes[0].loglog(flops, [np.median(row["ms"]) for row in rows], style,
                       label=f"{what}: {values}")
        memory = [(row["peak_memory_bytes"] or math.nan) / 2 ** 30 for row in rows]
        axes[1].loglog(flops, memory, style, label=what)
    rate = np.median([np.median(row["ms"]) / row["flops"] for row in report["cost"]])
    flops = [row["flops"] for row in report["cost"]]
    ends = np.array([min(flops), max(flops)])
    axes[0].loglog(ends / 1e9, rate * ends, color="grey", linewidth=1,
                   label=f"{1 / rate / 1e9:.3f} TFLOP/s")
    for axis, title in zip(axes, ("ms a step", "peak memory (GiB)")):
        axis.set_xlabel("counted GFLOP a step")
        axis.set_ylabel(title)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    figure.suptitle(f"Cost of a training step; {report['device']}", fontsize=11)
    figure.savefig(path)


# ---- diagnostics.py ------------------------------------------------------------------------------

def clustering_figure(path: Path, result: dict):
    rows = result["rows"][::-1]
    figure, (axis,) = canvas(1, 1, 8, 1.8 + 0.36 * len(rows))
    for key, marker, label in (("knn1", "d", "nearest neighbour"),
                               ("knn10", "o", "10 nearest neighbours"),
                               ("nearest_mean", "s", "nearest class mean"),
                               ("probe", "^", "linear probe"),
                               ("knn10_shuffled", "x", "10 nearest, labels shuffled")):
        points = [(100 * row[key], i) for i, row in enumerate(rows) if key in row]
        if points:
            axis.plot(*zip(*points), marker, label=label)
    low, high = result["reader_interval"]
    axis.axvline(100 * result["reader"], color="black", label="trained reader (band: 95%)")
    axis.axvspan(100 * low, 100 * high, color="black", alpha=0.12)
    axis.axvline(100 / result["classes"], color="grey", linestyle=":", label="chance")
    axis.set_yticks(range(len(rows)), [row["coordinate"] for row in rows])
    axis.set_xlabel("accuracy on test images (%)")
    axis.set_title(f"Classes by geometry of the weights; bank {result['bank']}, "
                   f"test {result['test']} images", fontsize=10)
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path)


def flow_lines(axis, result: dict, view: str):
    """Accuracy by stage, of the mean token ("pooled") or of all tokens ("flattened")."""
    rows = result["rows"]
    lines = [(f"{view}_knn10", "o-", "10-NN"), (f"{view}_probe", "^-", "linear probe"),
             (f"untrained_{view}_knn10", "o:", "10-NN, untrained reader"),
             (f"untrained_{view}_probe", "^:", "probe, untrained reader")]
    if view == "pooled":
        lines.append(("logit_lens", "s--", "head applied early"))
    curves(axis, rows, lines, 100)
    axis.axhline(100 * result["reader"], color="black", linewidth=1, label="trained reader")
    axis.axhline(100 / result["classes"], color="grey", linestyle=":", label="chance")
    stage_axis(axis, [row["stage"] for row in rows])
    axis.set_ylabel("accuracy on test images (%)")
    axis.legend(fontsize=7)


def flow_figure(path: Path, result: dict):
    rows, knocked = result["rows"], result.get("knock_outs") or []
    stages = [row["stage"] for row in rows]
    figure, axes = canvas(3 if knocked else 2, 2, 12, 12 if knocked else 8)
    for axis, view, title in zip(axes, ("pooled", "flattened"), ("Mean token", "All tokens")):
        if view in result["views"]:
            flow_lines(axis, result, view)
            axis.set_title(title, fontsize=10)
        else:
            axis.axis("off")
    curves(axes[2], rows, [("pooled_purity", "o-", "purity, mean token"),
                           ("flattened_purity", "s-", "purity, all tokens"),
                           ("untrained_pooled_purity", "o:", "purity, untrained reader")])
    if rows[-1]["auroc"] and all(row["auroc"] for row in rows):
        value, low, high = np.array([row["auroc"] for row in rows]).T
        axes[2].errorbar(range(len(rows)), value, yerr=[value - low, high - value], fmt="^--",
                         markersize=4, color="C3", label="AUROC: purity tells right from wrong")
    axes[2].set_title("Neighbour purity among test images", fontsize=10)
    axes[2].set_ylabel("share of 10 neighbours; AUROC")
    curves(axes[3], rows, [("seen_knn10", "o-", "bank seen in training"),
                           ("unseen_knn10", "s--", "bank never seen")], 100)
    axes[3].set_title(f"10-NN on the mean token, banks of {result['half']} images", fontsize=10)
    axes[3].set_ylabel("accuracy on half of the test images (%)")
    for axis in axes[2:4]:
        stage_axis(axis, stages)
        axis.legend(fontsize=7)
    for axis, where in zip(axes[4:], ("alone", "from here on")):
        knock_out_lines(axis, knocked, where)
    figure.suptitle("Token flow: A, M: after a block's attention, MLP; "
                    f"bank {result['bank']}, test {result['test']} images", fontsize=11)
    figure.savefig(path)


def knock_out_lines(axis, knocked: list[dict], where: str):
    for kind, style in zip(dict.fromkeys(row["replaced"] for row in knocked), MARKERS):
        mine = [row for row in knocked if (row["replaced"], row["span"]) == (kind, where)]
        axis.plot([row["block"] for row in mine], [100 * row["loss"][0] for row in mine], style,
                  markersize=4, label=kind)
    axis.set_title("Replaced in one block" if where == "alone" else
                   "Replaced in this block and all later ones", fontsize=10)
    axis.set_xlabel("block")
    axis.set_ylabel("loss of accuracy (points)")
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
    whole_numbers(axis)


REPLACED = {"replaced": ("bias: ", "C0"), "kept": ("kept: ", "C2"), "control": ("control: ", "C1")}


def bias_figure(path: Path, result: dict):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 8.5), layout="constrained", dpi=120)
    left, right = figure.subfigures(1, 2, width_ratios=[1.15, 1])
    rows = [row for row in result["rows"] if row["group"] in REPLACED]
    axis = left.subplots()
    bars(axis, [wrap(REPLACED[row["group"]][0] + row["name"], 34) for row in rows],
         [row["loss"] for row in rows], [REPLACED[row["group"]][1] for row in rows])
    axis.set_xlabel("loss of accuracy (points; line: 95% interval)")
    axis.set_title("Replaced in every token; controls: by another image's", fontsize=10)
    top, bottom = right.subplots(2, 1)
    rank_lines(top, result)
    single = result["single_columns"]
    losses = [100 * loss for loss in single["losses"].values()]
    bottom.hist(losses, bins=20, color="C1", alpha=0.75, label=f"{len(losses)} other columns")
    bottom.axvline(100 * single["bias"], color="C0", linewidth=2, label="bias column")
    bottom.set_xlabel("loss of accuracy, one column exchanged between images (points)")
    bottom.set_ylabel("columns")
    bottom.legend(fontsize=8)
    bottom.set_title(f"Single columns, {single['images']} images", fontsize=10)
    figure.savefig(path)


def rank_lines(axis, result: dict):
    """Accuracy with a part cut to its first r principal components."""
    own = [row for row in result["rows"] if row["group"] == "rank"]
    ranks = [row["rank"] for row in own]
    axis.plot(range(len(own)), [100 * row["accuracy"] for row in own], "o-", color="black",
              label="bias column")
    low = [row for row in result["rows"]
           if row["group"] == "low-rank control" and "for the bias" not in row["name"]]
    parts = dict.fromkeys(row["part"] for row in low)
    for style, part in zip(("s--", "^--", "d--", "x:", "+:"), parts):
        mine = [row for row in low if row["part"] == part and row["rank"] in ranks]
        axis.plot([ranks.index(row["rank"]) for row in mine],
                  [100 * row["accuracy"] for row in mine], style, markersize=4, label=part)
    axis.axhline(100 * result["reader"], color="grey", linewidth=1)
    axis.set_xticks(range(len(own)), ranks, fontsize=8)
    axis.set_xlabel("principal components kept, all else of the token untouched")
    axis.set_ylabel("accuracy (%)")
    axis.legend(fontsize=7, loc="lower right")
    axis.set_title("Cut to rank r; grey: the reader", fontsize=10)
    axis.grid(alpha=0.3)


def four_components(regression: dict) -> dict:
    """R^2 of each fact from four components, or from as many as there are."""
    return regression["to_facts"].get("4") or list(regression["to_facts"].values())[-1]


def content_figure(path: Path, result: dict):
    names = list(result["regressions"])
    figure, (left, right) = canvas(1, 2, 13, 6.4, width_ratios=[1.25, 1])
    tables = [four_components(each) for each in result["regressions"].values()]
    facts = list(tables[0])
    values = np.array([[math.nan if table[fact] is None else table[fact][0] for table in tables]
                       for fact in facts])
    left.imshow(values.clip(0, 1), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        text = "none" if math.isnan(value) else f"{round(value, 2) + 0.0:.2f}"
        left.text(j, i, text, ha="center", va="center", fontsize=8,
                  color="white" if value > 0.6 else "black")
    left.set_xticks(range(len(names)), [wrap(name, 13) for name in names], fontsize=7.5)
    left.set_yticks(range(len(facts)), facts, fontsize=8)
    left.set_title("R² on test images, from 4 principal components of a part", fontsize=10)
    labels, intervals, colours = [], [], []
    for m in result["mediation"]:
        who = "another class" if m["donors"] == "other" else "the same class"
        labels += ["", f"{who}: total effect", *(wrap(name, 30) for name in m["parts"])]
        intervals += [None, m["total"], *(part["indirect"] for part in m["parts"].values())]
        colours += ["black", "black", *("C0" if name == "bias column" else "C1"
                                        for name in m["parts"])]
    bars(right, labels[1:], intervals[1:], colours[1:])
    right.set_xlabel("loss of accuracy (points; line: 95% interval)")
    right.set_title("Mean colour from an image of …; then only one part from it", fontsize=10)
    figure.savefig(path)


def summary_figure(path: Path, model: dict):
    """A panel for each experiment that was made."""
    done = model["experiments"]
    panels = {"clustering": clustering_panel, "token-flow": flow_panel, "bias-route": route_panel,
              "content": content_panel}
    panels = {name: panel for name, panel in panels.items() if name in done}
    if not panels:
        return
    count = len(panels)
    figure, axes = canvas(2 if count > 2 else 1, min(count, 2), 12 if count > 1 else 6.5,
                          9 if count > 2 else 4.8)
    for axis, (name, panel) in zip(axes, panels.items()):
        panel(axis, done[name])
    for axis in axes[count:]:
        axis.axis("off")
    figure.suptitle(f"{model['name']}: reader {100 * model['reader']:.1f}% on {model['test']} "
                    f"{model.get('evaluated_on', 'test images')}, {model['data']}", fontsize=11)
    figure.savefig(path)


def clustering_panel(axis, c: dict):
    rows = {row["coordinate"]: row["knn10"] for row in c["rows"]}
    shown = [name for name in ("pixels", "phi - theta", "bias column", "all but the bias column",
                               "after the reader's input map") if name in rows]
    names = [f"10-NN, {name}" for name in shown]
    names += ["best geometry of the weights", "trained reader"]
    values = [rows[name] for name in shown] + [c["best_accuracy"], c["reader"]]
    axis.barh(range(len(names)), [100 * value for value in values], alpha=0.75,
              color=["C1"] * len(shown) + ["C2", "C0"])
    names_on_y(axis, names)
    axis.axvline(100 / c["classes"], color="black", linestyle=":")
    axis.set_xlabel("accuracy on test images (%); dotted: chance")
    axis.set_title("Do the weights cluster?\nreader - best geometry "
                   f"{span(c['gap'])}: C1 {c['verdict']}", fontsize=10)


def flow_panel(axis, f: dict):
    flow_lines(axis, f, "pooled")
    axis.set_xlabel("stage; A, M: after a block's attention, MLP")
    title = "Where do classes come apart? (mean token)"
    if "rise" in f:
        title += f"\nlate rise - half {span(f['late_minus_half'])}: C2 {f['verdict']}"
    axis.set_title(title, fontsize=10)


def route_panel(axis, b: dict):
    controls = [row for row in b["rows"] if row["group"] == "control"]
    singles = b["single_columns"]["losses"]
    names = ["bias column", *(wrap(row["name"], 30) for row in controls),
             f"largest of {len(singles)} single columns"]
    losses = [b["permuted"], *(row["loss"] for row in controls)]
    losses.append((max(singles.values()), None, None))
    bars(axis, names, losses, ["C0"] + ["C1"] * (len(names) - 1))
    axis.set_xlabel("loss of accuracy, exchanged between images (points)")
    axis.set_title("Is the bias column a route of its own?\nloss - strongest control's "
                   f"{span(b['margin'])}: C3 {b['verdict']}", fontsize=10)


def content_panel(axis, c: dict):
    m = c["mediation"][0]
    parts = m["parts"]
    bars(axis, ["total effect", *(wrap(name, 30) for name in parts)],
         [m["total"], *(part["indirect"] for part in parts.values())],
         ["black"] + ["C0" if name == "bias column" else "C1" for name in parts])
    axis.set_xlabel("loss of accuracy (points)")
    share = parts.get("bias column", {}).get("share")
    text = f"share through the bias column {span(share, 1, 2)}" if share else "no share to speak of"
    axis.set_title(f"What does it carry? Mean colour swapped\n{text}", fontsize=10)


def models_figure(path: Path, result: dict):
    """Purity against accuracy over models, and the correlation by stage of the reader."""
    found, correlations = result["points"], result["correlations"]
    by_stage = {label: correlations[key] for key, label in (("stage purity", "purity"),
                ("stage knn10", "10-NN accuracy")) if correlations.get(key)}
    figure, axes = canvas(1, 1 + bool(by_stage), 7 + 6 * bool(by_stage), 4.8)
    architectures = [p["architecture"] for p in found]
    most, labels = max(architectures, key=architectures.count), [p["label"] for p in found]
    labels = list(dict.fromkeys(labels))
    for i, (label, marker) in enumerate(zip(labels, itertools.cycle("os^dvP*X<"))):
        mine = [p for p in found if p["label"] == label and "purity" in p]
        colour = f"C{i % 10}"
        axes[0].scatter([p["purity"] for p in mine], [100 * p["reader"] for p in mine],
                        marker=marker, label=label, edgecolors=colour, facecolors=[
                            colour if p["architecture"] == most else "none" for p in mine])
    axes[0].set_xlabel("neighbour purity of phi - theta")
    axes[0].set_ylabel("reader accuracy (%)")
    aside = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if len(labels) >= 8 else {}
    axes[0].legend(fontsize=8 if len(labels) < 8 else 6, **aside)
    axes[0].grid(alpha=0.3)
    rho = (correlations.get("purity") or {}).get("spearman", {}).get("phi - theta")
    text = f"Spearman's rho {span(rho, 1, 2)}" if rho else "too few for a correlation"
    axes[0].set_title(f"Models (hollow: another architecture)\n{text}", fontsize=10)
    if by_stage:
        correlation_lines(axes[1], by_stage, result["models"])
    figure.savefig(path)


def correlation_lines(axis, by_stage: dict, models: int):
    names = list(dict.fromkeys(name for c in by_stage.values() for name in c["spearman"]))
    names = [name for name in names if name != "last - first"]
    for k, ((label, c), style) in enumerate(zip(by_stage.items(), MARKERS)):
        rho = [c["spearman"].get(name, (None,) * 3) for name in names]
        y = np.array(rho, dtype=float)                             # nothing: NaN
        axis.errorbar(np.arange(len(names)) + 0.12 * k, y[:, 0],
                      yerr=np.abs(y[:, 1:].T - y[:, 0]), fmt=style, markersize=4, capsize=2,
                      label=f"{label}, mean token")
    stage_axis(axis, names)
    axis.legend(fontsize=8)
    axis.set_ylabel("Spearman's rho with reader accuracy")
    settings = next(iter(by_stage.values()))["settings"]
    few = "" if settings >= 5 else f"\nno intervals: {settings} settings"
    axis.set_title(f"By stage of the reader, {models} models of one architecture{few}", fontsize=10)


# ---- interventions.py: each returns whether there was anything to draw ---------------------------

def dots(axis, names: list[str], intervals: list, seeds: list[int], factor: float = 100):
    """One row each: the value and its interval; a hollow one is of one seed, over images."""
    for i, (name, interval, n) in enumerate(zip(names, intervals, seeds)):
        value, low, high = (None if x is None else factor * x for x in interval)
        if low is not None:
            axis.plot([low, high], [i, i], color="black", linewidth=1.2)
        axis.plot(value, i, "s" if " x " in name else "o", color="C1" if name == "deeper" else "C0",
                  markerfacecolor=None if n > 1 else "white")
    names_on_y(axis, names)
    axis.axvline(0, color="grey", linewidth=0.8)


def lanes_figure(path: Path, report: dict, images: str) -> bool:
    rows = [row for row in report["lanes"] if row["difference"]]
    if not rows:
        return False
    figure, (axis,) = canvas(1, 1, 8, 1.5 + 0.28 * len(rows))
    dots(axis, [row["lane"] for row in rows], [row["difference"]["interval"] for row in rows],
         [row["difference"]["seeds"] for row in rows])
    axis.set_xlabel("accuracy - that of its baseline (cluster...: baseline64), points")
    title = f"95% intervals: filled, over seeds; hollow, one seed, over {images}"
    if any(row["lane"] == "deeper" for row in rows):
        title += "\norange: the capacity control"
    axis.set_title(title, fontsize=10)
    figure.savefig(path)
    return True


def clusters_figure(path: Path, report: dict, images: str) -> bool:
    """Purity of phi - theta against accuracy as a weight grows: class loss, contrastive loss."""
    lanes = [row for row in report["lanes"] if "+" not in row["lane"]]
    task = [r for r in lanes if r["lane"] in ("wt", "baseline") or r["lane"].startswith("task")]
    cluster = [r for r in lanes if r["lane"].startswith(("baseline64", "cluster"))]
    series = [("w_task", "weight of the class loss", task),
              ("w_cluster", "weight of the contrastive loss", cluster)]
    series = [each for each in series if len(each[2]) > 1]
    if not series:
        return False
    figure, axes = canvas(1, len(series), 5.5 * len(series), 4.6, sharey=True)
    for axis, (key, title, rows) in zip(axes, series):
        rows = sorted(rows, key=lambda row: row[key])
        axis.plot([r["purity"][0] for r in rows], [100 * r["reader"][0] for r in rows], alpha=0.4)
        for row, marker, k in zip(rows, itertools.cycle("osD^vP"), itertools.count()):
            (x, x_sd), (y, y_sd) = row["purity"], row["reader"]
            axis.errorbar(x, 100 * y, xerr=x_sd, yerr=y_sd and 100 * y_sd, fmt=marker,
                          color=f"C{k}", capsize=2, label=f"{row[key]:g}")
        axis.legend(title=key, fontsize=9, title_fontsize=9)
        axis.set_title(f"{key}, {title}", fontsize=10)
        axis.set_xlabel("purity of phi - theta: share of 10 nearest images of its class")
        axis.grid(alpha=0.3)
        axis.margins(0.12)
    axes[0].set_ylabel("reader accuracy (%)")
    figure.suptitle("Does accuracy follow purity? A point is a lane; bars: sd over seeds, where "
                    "there are seeds", fontsize=10)
    figure.savefig(path)
    return True


def factorial_figure(path: Path, report: dict, images: str) -> bool:
    found = report["factorial"]
    if not found:
        return False
    figure, axes = canvas(1, 3, 15, 4.4)
    for axis, scale, factor, label in zip(axes, ("accuracy", "log_odds"), (100, 1),
                                          ("points of accuracy", "log-odds")):
        names = [name for name in found[scale] if "additive" not in name]
        dots(axis, names, [found[scale][name] for name in names], [found["seeds"]] * len(names),
             factor)
        axis.set_xlabel(label)
        axis.set_title("Main effects (circles), interactions (squares)", fontsize=10)
    cells = sorted(found["cells"], key=lambda cell: (cell["lane"] != "baseline",
                                                     cell["lane"].count("+")))
    for i, cell in enumerate(cells):           # the interval of the difference, around the measured
        beyond = found["accuracy"].get(f"{cell['lane']} - additive")
        if beyond and beyond[1] is not None:
            ends = [100 * (cell["measured"] + end - beyond[0]) for end in beyond[1:]]
            axes[2].plot(ends, [i, i], color="black", linewidth=1.2)
    axes[2].plot([100 * c["measured"] for c in cells], range(len(cells)), "o", label="measured")
    axes[2].plot([100 * c["additive"] for c in cells], range(len(cells)), "D", color="C3",
                 markerfacecolor="none", label="baseline + single gains")
    names_on_y(axes[2], [cell["lane"] for cell in cells])
    axes[2].set_ylim(len(cells) - 0.4, -1.6)
    axes[2].set_xlabel("accuracy (%)")
    axes[2].set_title("Do gains add up? Bars: of the difference", fontsize=10)
    axes[2].legend(fontsize=8, loc="upper center", ncols=2)
    over = f"over {images}, one seed"
    if found["seeds"] > 1:
        over = f"over {found['seeds']} seeds, pooled residual"
    figure.suptitle(f"95% intervals {over}", fontsize=11)
    figure.savefig(path)
    return True


def population_figure(path: Path, report: dict, images: str) -> bool:
    if not any(report["across"]["correlations"].values()):
        return False
    models_figure(path, report["across"])
    return True
