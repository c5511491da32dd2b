"""Every picture: functions from a report (a dict, as its JSON file has it) to a PNG file.

    figures.clustering_figure("clustering.png", report["model"]["experiments"]["clustering"])

A figure computes nothing but units: accuracies are shares in a report and percent here, losses of
accuracy are points. An interval is (value, low, high) at 95%; low and high may be None. A panel
whose numbers a report lacks is left out, or one line says so.
"""
import itertools
import math
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

LINES = ("C0o-", "C1s--", "C2^-.", "C3d:", "C4x-", "C5P--")
MARKERS = "os^dvP*X<"
LOSS = "loss of accuracy (points; bars: 95%)"
PURITY = "neighbour purity of phi - theta (share of 10)"


# ---- Pieces --------------------------------------------------------------------------------------

def canvas(rows: int, columns: int, width: float, height: float, **more):
    """A figure of width x height inches, and its panels row after row."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **more).flatten())


def panels(draws: list[tuple]) -> Figure:
    """A panel for each (function of an axis, its other arguments)."""
    draws = draws or [(note, "nothing was measured")]
    columns = min(2, len(draws))
    rows = math.ceil(len(draws) / columns)
    figure, axes = canvas(rows, columns, 6.5 * columns, 4.6 * rows)
    for axis, (draw, *arguments) in itertools.zip_longest(axes, draws, fillvalue=(note, "")):
        draw(axis, *arguments)
    return figure


def note(axis, text: str):
    """Text in place of a panel."""
    axis.axis("off")
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", fontsize=9)


def label(axis, title: str, x: str, y: str = "", legend: bool = False):
    title = "\n".join(textwrap.fill(line, 62) for line in title.split("\n"))
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    if legend:
        axis.legend(fontsize=8)


def span(interval, factor: float = 1, digits: int = 1) -> str:
    """value [low, high]; the value alone where there is no interval."""
    if interval is None:
        return "none"
    value, *ends = (None if x is None else f"{factor * x:+.{digits}f}" for x in interval)
    return f"{value} [{ends[0]}, {ends[1]}]" if ends[0] else f"{value} (no interval)"


def whiskers(intervals: list, factor: float):
    """Values (n,), and how far the lower and upper ends are from them (2, n); NaN: none."""
    table = factor * np.array(intervals, dtype=float)
    return table[:, 0], np.abs(table[:, 1:].T - table[:, 0])


def place_axis(axis, places: list):
    """Places, slanted where they are words."""
    words = {"rotation": 50, "ha": "right", "rotation_mode": "anchor"}
    slant = words if any(isinstance(place, str) for place in places) else {}
    axis.set_xticks(range(len(places)), places, **slant)


def lines(axis, rows: list[dict], series: list[tuple]):
    """Shares over the stages: a line for each (key, style, name) that the last row has."""
    place_axis(axis, [row["stage"] for row in rows])
    for key, style, name in series:
        if rows[-1].get(key) is not None:
            x, y = zip(*((i, 100 * row[key]) for i, row in enumerate(rows)
                         if row.get(key) is not None))
            axis.plot(x, y, style, markersize=4, label=name)


def curves(axis, points: list[tuple], factor: float = 1):
    """Points (name, place, interval): a line for each name, a little side by side."""
    places = list(dict.fromkeys(place for _, place, _ in points))
    names = list(dict.fromkeys(name for name, *_ in points))
    for k, (name, style) in enumerate(zip(names, itertools.cycle(LINES))):
        mine = [(places.index(place), interval) for n, place, interval in points if n == name]
        x = np.array([i for i, _ in mine]) + 0.07 * (k - (len(names) - 1) / 2)
        y, error = whiskers([interval for _, interval in mine], factor)
        axis.errorbar(x, y, yerr=error, fmt=style, markersize=4, elinewidth=0.8, capsize=2,
                      label=textwrap.fill(name, 32))
    place_axis(axis, places)


def name_axis(axis, names: list[str]):
    """Names from the top down."""
    axis.set_yticks(range(len(names)), [textwrap.fill(name, 38) for name in names])
    axis.set_ylim(len(names) - 0.4, -0.6)


def dots(axis, rows: list[tuple]):
    """Rows (name, interval, style), in points."""
    for i, (_, interval, style) in enumerate(rows):
        value, error = whiskers([interval], 100)
        axis.errorbar(value, i, xerr=error, fmt=style, ecolor="black", capsize=2)
    name_axis(axis, [name for name, *_ in rows])
    axis.axvline(0, color="black", linewidth=0.8)


# ---- Training and cost ---------------------------------------------------------------------------

def training_figure(path: Path, report: dict, shown: dict):
    """Learning curves above a few images as the weights show them after each inner step.

    shown: {"stages": inner steps, 0 is the anchor; "images": (n, C, h, w) in [-1, 1]; "shown":
    (stages, n, C, h, w); "psnr": (stages, n) in dB; "classes", "guesses": n names each}."""
    titles = [*(f"step {j}" if j else "anchor" for j in shown["stages"]), "image"]
    count, columns = len(shown["images"]), len(titles)
    figure = Figure((max(9, 1.4 * columns), 2.7 + 1.8 * count), layout="constrained", dpi=110)
    top, bottom = figure.subfigures(2, 1, height_ratios=[2.7, 1.8 * count])
    learning_curves(top.subplots(1, 3), report)
    grid = bottom.subplots(count, columns, squeeze=False)
    for axis, title in zip(grid[0], titles):
        axis.set_title(title, fontsize=9)
    for i, row in enumerate(grid):
        for axis, images, decibels in zip(row, shown["shown"], shown["psnr"]):
            picture(axis, images[i], f"{decibels[i]:.1f} dB")
        text = f"{shown['classes'][i]}\nread as {shown['guesses'][i]}"
        picture(row[-1], shown["images"][i], text)
    figure.savefig(path)


def learning_curves(axes, report: dict):
    epochs = [row["epoch"] for row in report["epochs"]]
    held = "val" if "validation" in report["evaluated_on"] else "test"
    for axis, quantity, keys, factor in (
            (axes[0], "class loss (nats)", {"train": "loss"}, 1),
            (axes[1], "accuracy (%)", {"train": "train_accuracy", held: "test_accuracy"}, 100),
            (axes[2], "PSNR (dB)", {"train": "train_psnr", held: "test_psnr"}, 1)):
        for (name, key), style in zip(keys.items(), ("C0.--", "C1.-")):
            y = [factor * row[key] for row in report["epochs"]]
            axis.plot(epochs, y, style, label=name)
        label(axis, "", "epoch", quantity, True)


def picture(axis, image: np.ndarray, text: str = "", **place):
    """image: (C, h, w) in [-1, 1], C is 1 or 3."""
    image = (image.clip(-1, 1).transpose(1, 2, 0) + 1) / 2                     # (h, w, C)
    axis.imshow(image, cmap="gray", vmin=0, vmax=1, **place)
    axis.set_xlabel(text, fontsize=8, parse_math=False)                # a class may be called "$"
    axis.set_xticks([])
    axis.set_yticks([])


def strips(axis, rows: dict):
    """{name: pictures (n, C, h, w) in [-1, 1]}, a strip each."""
    for i, pictures in enumerate(rows.values()):
        for j, image in enumerate(pictures):
            picture(axis, image, extent=(j, j + 0.95, i + 0.95, i))
    axis.set_xlim(0, max(map(len, rows.values())))
    axis.set_ylim(len(rows), 0)
    axis.set_yticks(np.arange(len(rows)) + 0.5, [*rows], fontsize=8)
    axis.tick_params(length=0)
    axis.set_frame_on(False)


def cost_figure(path: Path, report: dict):
    """Time and memory of a step against its counted FLOPs."""
    figure, axes = canvas(1, 2, 11, 4.6)
    varied = itertools.groupby(report["cost"], lambda row: row["what"])
    for (what, rows), style in zip(varied, itertools.cycle(LINES)):
        rows = list(rows)
        name = f"{what}: {', '.join(str(row['value']) for row in rows)}"
        gflop = [row["flops"] / 1e9 for row in rows]
        memory = [(row["peak_memory_bytes"] or math.nan) / 2 ** 30 for row in rows]
        axes[0].loglog(gflop, [np.median(row["ms"]) for row in rows], style, label=name)
        axes[1].loglog(gflop, memory, style, label=name)
    for axis, y in zip(axes, ("median time of a step (ms)", "peak memory (GiB)")):
        label(axis, f"A training step; {report['device']}", "counted GFLOP a step", y, True)
    figure.savefig(path)


# ---- Hypernetwork --------------------------------------------------------------------------------

def hypernetwork_figure(path: Path, report: dict, shown: dict):
    """Pictures above what was measured of the latents z.

    shown: {"images", "rebuilt": (n, C, h, w); "path": pictures on the way from one z to another
    (m, C, h, w); "weights": theirs (m, T, D); "map": (q, 2); "labels": (q,)}."""
    figure = Figure(figsize=(13, 12), layout="constrained", dpi=110)
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.1])
    weights = shown["weights"] / np.abs(shown["weights"]).max()
    strips(top.subplots(), {"image": shown["images"], "from its z": shown["rebuilt"],
                            "between two z": shown["path"], "the weights there": weights[:, None]})
    draws = bottom.subplots(2, 2).flatten()
    for draw, axis in zip((map_of_latents, spectrum, refit_distances, errors_of_dz), draws):
        draw(axis, shown if draw is map_of_latents else report["theorem"])
    figure.savefig(path)


def map_of_latents(axis, shown: dict):
    for c in np.unique(shown["labels"]):
        mine = shown["map"][shown["labels"] == c]
        axis.scatter(*mine.T, s=12, marker=MARKERS[c % 9], color=f"C{c % 10}", label=str(c))
    label(axis, "Test images' z; a colour and marker is a class", "first principal component",
          "second", True)


def spectrum(axis, found: dict):
    s = np.array(found["spectrum"])
    axis.semilogy(range(1, len(s) + 1), s / s[0], "C0o-", markersize=3)
    label(axis, "In how many directions does z move the picture?", "eigenvalue of J^T J",
          f"over the largest (median of {found['images']} images)")


def refit_distances(axis, found: dict):
    """Sorted, a line for each start, with the penalty and without."""
    styles = iter(LINES)
    for penalty, rows in found["refits"].items():
        for start, row in rows.items():
            distance = np.maximum(np.sort(row["distances"]), 1e-12)
            axis.semilogy(np.linspace(0, 100, len(distance)), distance, next(styles),
                          markersize=3, label=f"{start} start, {penalty}")
    label(axis, "Do fits from elsewhere end at the same z?", "share of images (%)",
          "distance to z over that between images", True)


def errors_of_dz(axis, found: dict):
    styles = iter(LINES)
    for way in ("newton", "gauss_newton"):
        for change in dict.fromkeys(row["change"] for row in found["predictions"]):
            rows = [row for row in found["predictions"] if row["change"] == change]
            axis.loglog([row["size"] for row in rows], [row[way][0] for row in rows], next(styles),
                        label=f"{change}, {way.replace('_', '-')}")
    label(axis, "Is dz predicted?", "|dX| / |X|", "error over |dz| (median)", True)


# ---- Low-rank weights ----------------------------------------------------------------------------

def mlora_figure(path: Path, report: dict, shown: dict):
    """Images as kinds of weights, and samples of these, show them, beside what was measured.

    shown: {name: pictures (n, C, h, w)}."""
    draws = [(draw, report[part]) for part, draw in (
        ("classify", accuracy_of_weights), ("connect", errors_between_fits),
        ("generate", distances_of_samples)) if report[part]]
    figure = Figure((5 + 5.5 * len(draws), 2 + 0.4 * len(shown)), layout="constrained", dpi=110)
    left, right = figure.subfigures(1, 2, width_ratios=[4.5, 5 * len(draws)])
    strips(left.subplots(), shown)
    for (draw, rows), axis in zip(draws, right.subplots(1, len(draws), squeeze=False)[0]):
        draw(axis, rows)
    figure.savefig(path)


def accuracy_of_weights(axis, rows: dict):
    for key, marker in zip(("1-NN", "linear", "MLP", "reader", "ARI"), "o^PsD"):
        share = [100 * row.get(key, math.nan) for row in rows.values()]
        axis.plot(share, range(len(rows)), marker, markersize=5, label=key)
    name_axis(axis, [f"{name} ({row['numbers']})" for name, row in rows.items()])
    label(axis, "Is the class in the weights? (how many numbers)",
          "accuracy on test images; ARI of k-means (%)", "", True)


def errors_between_fits(axis, rows: dict):
    for (name, row), style in zip(rows.items(), LINES):
        axis.semilogy(np.linspace(0, 1, len(row["path"])), row["path"], style, markersize=3,
                      label=name)
    label(axis, "Two fits of one image", "way from one to the other", "mean squared error", True)


def distances_of_samples(axis, rows: dict):
    axis.plot([row["Frechet"] for row in rows.values()], range(len(rows)), "C0o")
    axis.axvline(next(iter(rows.values()))["floor"], color="black", label="test images")
    name_axis(axis, [*rows])
    label(axis, "Pictures of sampled weights", "Fréchet distance to training images", "", True)


# ---- One model -----------------------------------------------------------------------------------

def accuracy(result: dict) -> str:
    return f"accuracy on test images (%; chance {100 / result['classes']:.3g})"


def geometry(axis, result: dict):
    rows = result["rows"]
    for key, marker, name in (("knn1", "d", "nearest neighbour"), ("knn10", "o", "10-NN"),
                              ("nearest_mean", "s", "nearest class mean"),
                              ("linear", "^", "linear probe"), ("mlp", "P", "MLP probe")):
        if any(key in row for row in rows):
            x = [100 * row.get(key, math.nan) for row in rows]
            axis.plot(x, range(len(rows)), marker, markersize=5, label=name)
    low, high = result["reader_interval"]
    axis.axvspan(100 * low, 100 * high, color="black", alpha=0.12)
    axis.axvline(100 * result["reader"], color="black", label="trained reader (band: 95%)")
    name_axis(axis, [row["coordinate"] for row in rows])
    gaps = [f"reader - {name} {span(result[letter]['gap'], 100)}" for letter, name in
            (("G", "best geometry"), ("L", "best classifier")) if letter in result]
    label(axis, "Do the weights cluster by class?\n" + "; ".join(gaps), accuracy(result))
    axis.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.4, -0.13))


def accuracy_by_stage(axis, result: dict, view: str):
    """view: "pooled" (the mean token) or "flattened"."""
    series = [(f"{view}_knn10", "C0o-", "10-NN"),
              (f"untrained_{view}_knn10", "C0o:", "10-NN, untrained readers")]
    title = {"pooled": "Where do classes come apart? (mean token)",
             "flattened": "All tokens flattened"}[view]
    if view == "pooled":
        series += [("pooled_linear", "C1^-", "linear probe"),
                   ("logit_lens", "C4s--", "head applied early")]
    if view in result.get("rises", {}):
        late = result["rises"][view]["late_less_early"]
        title += f"\nlate - early rise {span(late, 100)} points"
    lines(axis, [row for row in result["rows"] if f"{view}_knn10" in row], series)
    axis.axhline(100 * result["reader"], color="black", linewidth=1, label="trained reader")
    label(axis, title, "stage", accuracy(result), view == "pooled")


def banks_by_stage(axis, result: dict):
    lines(axis, result["rows"], [("seen_knn10", "C0o-", "images seen in training"),
                                 ("unseen_knn10", "C1s--", "as many images never seen")])
    label(axis, "10-NN on the mean token: does it matter\nthat the reader was trained on the bank?",
          "stage", "accuracy on half of the test images (%)", True)


def knocked_out(axis, result: dict):
    curves(axis, [(f"all {row['replaced']}", row["block"], row["loss"])
                  for row in result["knock_outs"]], 100)
    axis.axhline(0, color="black", linewidth=0.8)
    label(axis, "From a block on, attention or MLPs add only their mean", "first such block", LOSS,
          True)


def exchanged(axis, result: dict, groups: tuple):
    """Rows of these groups; without "replaced" the bias column exchanged alone."""
    styles = {"replaced": ("bias column: ", "C0o"),
              "control": ("control of its size: ", "C1s"), "route": ("another route: ", "C7d")}
    rows = [] if "replaced" in groups else [("bias column", result["permuted"], "C0o")]
    for row in result["rows"]:
        if row["group"] in groups:
            prefix, style = styles[row["group"]]
            size = result["controls"].get(row["name"], {"size": 1})["size"]
            larger = f", {size:.1f} times as large" if size > 1.1 else ""
            rows.append((prefix + row["name"] + larger, row["loss"], style))
    single = result["single_columns"]
    rows.append((f"another route: most expensive of {single['columns']} columns",
                 single["largest"], "C7d"))
    dots(axis, rows)
    margins = [f"{name} {span(control['margin'], 100)}"
               for name, control in result["controls"].items()]
    label(axis, "Is the bias column a route beyond its size?\nits loss - that of "
          + ("; ".join(margins) or "nothing: no control of its size"), LOSS)


def cut_to_rank(axis, result: dict):
    """Loss against the components kept of the bias column."""
    curves(axis, [("", row["rank"], row["loss"]) for row in result["rows"]
                  if row["group"] == "rank"], 100)
    axis.axhline(0, color="black", linewidth=0.8)
    label(axis, "The bias column cut to rank r, all else of the token untouched\neffective rank "
          f"{result['effective_rank']:.1f}", "principal components kept, r", LOSS)


def facts_of_parts(axis, told: dict):
    """R^2 of each fact from four components of each part."""
    facts = list(next(iter(told.values())))
    r2 = np.array([[found[fact] for found in told.values()] for fact in facts], dtype=float)
    axis.imshow(r2.clip(0, 1), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(r2):
        axis.text(j, i, "none" if math.isnan(value) else f"{value:.2f}", ha="center", va="center",
                  fontsize=8, color="white" if value > 0.6 else "black")
    axis.set_title("What does a part carry? R² on test images, 4 components of it", fontsize=10)
    axis.tick_params(labelsize=8)
    axis.set_xticks(range(len(told)), [textwrap.fill(name, 13) for name in told])
    axis.set_yticks(range(len(facts)), facts)


def mediated(axis, result: dict, donors: tuple):
    """Loss with another image's mean colour in all parts, or in one alone."""
    found = [m for m in result.get("mediation") or [] if m["donors"] in donors]
    if not found:
        return note(axis, "mean colour: not exchanged")
    rows = []
    for m in found:
        rows.append((f"{m['donors']} class: all parts", m["total"], "kD"))
        rows += [(f"{m['donors']} class: {name}", part["indirect"],
                  "C0o" if name == "bias column" else "C1s") for name, part in m["parts"].items()]
    dots(axis, rows)
    share = found[0]["parts"].get("bias column", {}).get("share")
    label(axis, "Mean colour exchanged, one part alone following it\n"
          f"share of the bias column {span(share, 1, 2)}", LOSS)


def clustering_figure(path: Path, result: dict):
    figure, (axis,) = canvas(1, 1, 8, 2 + 0.34 * len(result["rows"]))
    geometry(axis, result)
    figure.savefig(path)


def flow_figure(path: Path, result: dict):
    views = [view for view in ("pooled", "flattened")
             if any(f"{view}_knn10" in row for row in result["rows"])]
    draws = [(accuracy_by_stage, result, view) for view in views] + [(banks_by_stage, result)]
    if "knock_outs" in result:
        draws.append((knocked_out, result))
    panels(draws).savefig(path)


def bias_figure(path: Path, result: dict):
    figure, (left, right) = canvas(1, 2, 13, 7)
    exchanged(left, result, ("replaced", "control", "route"))
    cut_to_rank(right, result)
    figure.savefig(path)


def content_figure(path: Path, result: dict):
    figure, (left, right) = canvas(1, 2, 13, 6.4)
    facts_of_parts(left, result["told"])
    mediated(right, result, ("other", "same"))
    figure.savefig(path)


def curve_figure(path: Path, result: dict):
    """Accuracy as the training set grows, of the reader and of simple classifiers."""
    figure, (axis,) = canvas(1, 1, 7, 4.6)
    for (key, name), style in zip({"reader": "reader", "linear": "linear probe",
                                   "mlp": "MLP probe"}.items(), LINES):
        x, y = zip(*((row["images"], 100 * row[key]) for row in result["rows"]))
        axis.plot(x, y, style, label=name)
    label(axis, "What does a Transformer add, and from how many images on?",
          "training images, on the same fitted weights", accuracy(result), True)
    figure.savefig(path)


def summary_figure(path: Path, model: dict):
    """A panel of each experiment that was run."""
    chosen = {"clustering": (geometry,), "token-flow": (accuracy_by_stage, "pooled"),
              "bias-route": (exchanged, ("control", "route")), "content": (mediated, ("other",))}
    done = model["experiments"]
    figure = panels([(draw, done[name], *arguments)
                     for name, (draw, *arguments) in chosen.items() if name in done])
    figure.suptitle(f"{model['name']}: reader {100 * model['reader']:.1f}% on {model['test']} "
                    f"{model.get('evaluated_on', 'test images')}, {model['data']}",
                    fontsize=11, parse_math=False)
    figure.savefig(path)


# ---- Several models ------------------------------------------------------------------------------

def models_figure(path: Path, result: dict):
    """Purity against accuracy, and which stage's purity goes with accuracy."""
    rho = result["correlations"]
    figure, axes = canvas(1, 1 + bool(rho), 7 + 6 * bool(rho), 4.8)
    architectures = [each["architecture"] for each in result["points"]]
    most = max(architectures, key=architectures.count)
    purity_points(axes[0], [
        (each["label"], (each["evidence"]["purity"][0], None), (each["evidence"]["R"][0], None),
         each["architecture"] == most)
        for each in result["points"] if "purity" in each["evidence"]])
    label(axes[0], "A point is a model; hollow: another architecture", PURITY,
          "reader accuracy (%)")
    if axes[0].containers:
        axes[0].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    if rho:
        curves(axes[1], [("", name, interval) for name, interval in rho.items()])
        label(axes[1], f"{result['models']} models of one architecture\n{result['settings']} "
              "settings (below 5: no bars)", "stage (mean token)",
              "Spearman's rho of purity and accuracy (bars: 95%)")
    figure.savefig(path)


def spaces_figure(path: Path, rows: list[dict]):
    """Accuracies from the weights, a panel a data set; lines: the same from the pixels."""
    sets = list(dict.fromkeys(row["data"] for row in rows))
    most = max(sum(row["data"] == data for row in rows) for data in sets)
    figure, axes = canvas(1, len(sets), 2 + 5 * len(sets), 2.6 + 0.5 * most)
    for axis, data in zip(axes, sets):
        mine = [row for row in rows if row["data"] == data]
        for shift, (key, marker, name) in enumerate((
                ("G", "s", "geometry"), ("L", "^", "simple classifier"),
                ("R", "o", "Transformer"), ("own", "x", "its own reader"))):
            known = [(i, row["cells"][key][:3]) for i, row in enumerate(mine)
                     if key in row["cells"]]
            if not known:
                continue
            value, error = whiskers([each for _, each in known], 100)
            axis.errorbar(value, [i + 0.12 * (shift - 1.5) for i, _ in known], xerr=error,
                          fmt=f"C{shift}{marker}", capsize=2, label=name)
        for shift, (key, style, name) in enumerate((
                ("pixels G", ":", "pixels: geometry"), ("pixels L", "--", "pixels: classifier"),
                ("pixels R", "-", "pixels: Transformer"))):
            known = [row["cells"][key][0] for row in mine
                     if key in row["cells"] and not row["why_not"]]
            if known:
                axis.axvline(100 * sum(known) / len(known), color=f"C{shift}", linestyle=style,
                             linewidth=1, label=name)
        name_axis(axis, [f"{row['space']}, n = {len(row['seeds'])}: {row['answer']}"
                         for row in mine])
        label(axis, data, "accuracy on test images (%; bars: 95% over seeds)")
    named = {name: mark for axis in axes for mark, name in zip(*axis.get_legend_handles_labels())}
    figure.legend(named.values(), named.keys(), loc="outside lower center", fontsize=8, ncols=7)
    figure.savefig(path)


def purity_points(axis, points: list[tuple]):
    """Points (name, purity, accuracy, filled); the two are (mean, sd), sd may be None."""
    names = [name for name, *_ in points]
    for i, (name, (x, x_sd), (y, y_sd), filled) in enumerate(points):
        k = list(dict.fromkeys(names)).index(name)      # nine markers, ten colours: no two alike
        axis.errorbar(x, 100 * y, xerr=x_sd, yerr=y_sd and 100 * y_sd, fmt=MARKERS[k % 9],
                      color=f"C{k % 10}", markerfacecolor=f"C{k % 10}" if filled else "none",
                      capsize=2, label=name if names.index(name) == i else None)


def contrasts_figure(path: Path, found: dict):
    """Differences or effects {name: row} by their two kinds of interval, a panel each."""
    kinds = {"over_seeds": "Intervals over n seeds: what the method does",
             "over_images": "Intervals over the images of one seed: its models alone"}
    kinds = {key: title for key, title in kinds.items() if any(row[key] for row in found.values())}
    size = 3 + 5 * len(kinds), 1.8 + 0.28 * len(found)
    figure, axes = canvas(1, len(kinds), *size, sharey=True)
    for axis, (key, title) in zip(axes, kinds.items()):
        dots(axis, [(f"{name} (n = {len(row['gains'])})", row[key] or (math.nan,) * 3, "C0o")
                    for name, row in found.items()])
        label(axis, title, "difference of accuracy (points; bars: 95%)")
    figure.savefig(path)


def clusters_figure(path: Path, lanes: list[dict]):
    """Purity of phi - theta against accuracy as the weight of a loss grows."""
    figure, axes = canvas(1, 2, 11, 4.6, sharey=True)
    for axis, loss, start, without in (
            (axes[0], "class loss", "task", ("baseline", "wt")),
            (axes[1], "contrastive loss\nhollow: random labels", "cluster", ("baseline64",))):
        rows = [row for row in lanes if "+" not in row["lane"] and (
            row["lane"] in without or row["lane"].startswith(start))]
        purity_points(axis, [(f"{row['lane']}, n = {row['n']}", row["purity"], row["reader"],
                              "random" not in row["lane"]) for row in rows])
        label(axis, f"Lanes with another weight of the {loss}", PURITY,
              "reader accuracy (%; bars: sd over n seeds)", bool(rows))
    figure.savefig(path)


# ---- Cohort --------------------------------------------------------------------------------------

def cohort_figure(path: Path, report: dict):
    """report["rows"]: {row: [(value, low, high) of each layer]}, of PSNR first with none frozen."""
    rows, layers = report["rows"], report["flags"]["layers"]
    figure, axes = canvas(2, 3, 17, 9.5)

    def draw(axis, named: list[tuple], places: list, title: str, x: str, y: str):
        """named: (name, row), a line each."""
        curves(axis, [(name, place, cell) for name, row in named
                      for place, cell in zip(places, rows[row])])
        label(axis, title, x, y, len(named) > 1)

    depths, numbers = ["none", *(f"0 to {l}" for l in range(layers))], list(range(layers))
    for axis, where, why in ((axes[0], "held-out", "What transfers? PSNR on pixels not fitted"),
                             (axes[1], "fitted", "What can be trained? PSNR on fitted pixels")):
        psnr = f"{where} PSNR (dB), "
        draw(axis, [("layers above start as trained (none: fine-tuning)", psnr + "rest kept"),
                    ("layers above start anew (none: from scratch)", psnr + "rest new"),
                    ("control: frozen layers untrained", psnr + "untrained")],
             depths, f"{why}\nof new images, {report['flags']['fit_steps']} steps",
             "frozen layers of the encoder", "PSNR (dB; bars: 95%)")
    draw(axes[2], [("trained", "stable rank, trained"), ("untrained", "stable rank, untrained")],
         numbers, "Is the best depth that of the highest stable rank? "
         + report["verdicts"]["best depth: highest stable rank"][0], "layer",
         "stable rank of its weights")
    controls = ("trained", "second seed", "other cohort", "untrained", "random atoms")
    names = dict(zip(controls, ("trained", "trained, second dictionary", "another cohort's encoder",
                                "control: untrained encoder", "control: random atoms")))
    draw(axes[3], [(names[each], f"spread, {each}") for each in controls], numbers,
         "How local are dictionary atoms?\nspread of an atom's map: 0 a point, 1 the whole image",
         "layer", "mean spread (bars: 95%)")
    draw(axes[4], [(f"{encoder}, {whose}", f"likeness to {row}, {encoder}")
                   for encoder in ("trained", "untrained")
                   for whose, row in (("the cohort", "own images"), ("other images", "others"))],
         numbers, "Do atoms trace the images of the cohort?\nlargest |correlation| of an atom's "
         "map with one of the images", "layer", "mean over atoms (bars: 95%)")
    draw(axes[5], [("atom, mean image", "PSNR lost (dB), atom"),
                   ("random direction, mean image", "PSNR lost (dB), random"),
                   ("atom, worst image", "PSNR lost on one image (dB), atom"),
                   ("random direction, worst image", "PSNR lost on one image (dB), random")],
         numbers,
         "What does an atom's direction do?\nas much removed along it and along a random direction",
         "layer", "PSNR lost by the cohort's images (dB; bars: 95%)")
    figure.savefig(path)
