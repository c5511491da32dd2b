"""One table: is the class clustered, simply there, or routed, in several weight spaces?

    python diagnostics.py --ckpt a.pt --out a
    python diagnostics.py --ckpt a.pt --out a-same --only same-reader
    python spaces.py a/report.json a-same/report.json … pixels.json --out spaces

Reports of diagnostics.py, and of pixels.py, become a row for each weight space and data set, seeds
within it: table.json, table.md, table.png. A row that cannot be compared says why. R is here one
Transformer, trained in one way in all spaces, G the best geometry, L the best simple classifier.
Leads: by more than 2 points. Is level: within 2 points, or behind (claims.lead; 95% over seeds).

    clustered       neither R nor L leads G
    simply there    R or L leads G, and R is level with L
    routed          R leads both
    not routed      R is level with L; whether anything leads G is not decided
    not clustered   R or L leads G; whether R leads L is not decided
"""
import argparse
import json
from pathlib import Path

import claims
import figures
from checkpoint import METHODS, InputError, exits
from data import SIZE
from measures import t_interval
from settings import Parser

# Of each column: its title, and the factor to what is printed (percent, points), decimals.
HELD = {"numbers": ("numbers that R reads", 1, 0), "psnr": ("PSNR, dB", 1, 1),
        "R": ("R: one Transformer, %", 100, 1), "own": ("its own reader, %", 100, 1),
        "G": ("G: geometry, %", 100, 1), "L": ("L: classifier, %", 100, 1),
        "R - G": ("R − G", 100, 1), "R - L": ("R − L", 100, 1), "L - G": ("L − G", 100, 1),
        "pixels G": ("pixels: G", 100, 1), "pixels L": ("pixels: L", 100, 1),
        "pixels R": ("pixels: Transformer", 100, 1)}
DONE = {"late": ("rise of 10-NN, late − early", 100, 1),
        "bias column": ("loss: bias column exchanged", 100, 1),
        "columns": ("… − random columns", 100, 1), "components": ("… − components", 100, 1),
        "colour": ("loss: mean colour of another class", 100, 1),
        "share": ("… share by the bias column", 1, 2)}
COLUMNS = HELD | DONE
SHORT = {"numbers": "numbers", "psnr": "PSNR, dB", "G": "geometry, %",
         "L": "simple classifier, %", "R": "Transformer, %"}
NAMES = {"hyperinr": "HyperINR", "mlora": "mLoRA"}     # others go by their label


# ---- From reports to rows ------------------------------------------------------------------------

def cells(model: dict) -> dict:
    """What the report of one model says, by column."""
    e, done = claims.evidence(model), model["experiments"]
    found = {column: e[name][0] for column, name in (
        ("own", "R"), ("G", "G"), ("L", "L"), ("pixels G", "G on pixels"),
        ("pixels L", "L on pixels"), ("late", "late pooled"), ("bias column", "exchanged"),
        ("columns", "margin random columns"), ("components", "margin principal components"),
        ("chance", "chance")) if name in e}
    if same := done.get("same-reader"):
        found |= {"numbers": same["tokens"] * same["features"], "psnr": same["psnr"],
                  "R": same["reader"]}
    found |= {f"{a} - {b}": found[a] - found[b] for a, b in ("RG", "RL", "LG")
              if {a, b} <= found.keys()}
    if "content" in done:
        other = done["content"]["mediation"][0]
        found["colour"] = other["total"][0]
        if share := other["parts"].get("bias column", {}).get("share"):
            found["share"] = share[0]
    return found


def merge(models: list[dict]) -> list[dict]:
    """Reports of the same run on the same images as one."""
    found = {}
    for model in models:
        key = model["method"], claims.key_of(model["training"]), examined(model)
        one = found.setdefault(key, model | {"experiments": {}})
        one["experiments"] |= model["experiments"]
    return list(found.values())


def side(dataset: str, size: int | None) -> int:
    """Pixels a side that a run with --dataset and --size saw."""
    return size or SIZE.get(dataset, 32)


def examined(model: dict) -> tuple:
    """What must be the same for two rows to be compared."""
    return (model["data"], side(model["data"], model["training"].get("size")), model["bank"],
            model["test"], model["evaluated_on"])


def rows(models: list[dict], pixels: list[dict]) -> list[dict]:
    """A row a weight space and data set: {"data", "space", "seeds", "cells": {column: (value, low,
    high, n)}, over n seeds, low and high None for one; "why_not": what forbids a comparison, or
    None; "answer"}. pixels: reports of pixels.py."""
    groups, of_data = {}, {}           # models of one row; what the models of a data set saw
    for model in merge(models):
        point, data = claims.point(model), Path(model["data"]).name
        space = NAMES.get(point["label"], point["label"])
        groups.setdefault((data, space, point["setting"]), []).append(model)
        of_data.setdefault(data, []).append(examined(model))
    spaces, result = [key[:2] for key in groups], []
    order = {method: i for i, method in enumerate(METHODS)}
    for (data, space, _), group in sorted(groups.items(), key=lambda item: (
            item[0][0], order.get(item[1][0]["method"], len(order)), item[0][1])):
        usual = max(of_data[data], key=of_data[data].count)
        values = [cells(model) | {"pixels R": report["test_accuracy"] for report in pixels
                                  if is_of(report["flags"], model)} for model in group]
        row = {"data": data, "space": space,
               "seeds": sorted(model["training"]["seed"] for model in group),
               "why_not": why_not(group, usual, spaces.count((data, space))),
               "cells": {column: over(values, column) for column in (*COLUMNS, "chance")
                         if any(column in value for value in values)}}
        result.append(row | {"answer": answer(row)})
    return result


def why_not(group: list[dict], usual: tuple, settings: int) -> str | None:
    """What forbids to compare the models of a row with the others of its data set."""
    others = {examined(model) for model in group} - {usual}
    if others:
        return f"{describe(others.pop())}; the others {describe(usual)}"
    if any(model["unfinished"] for model in group):
        return "a run is not finished"
    return f"{settings} settings of this name" if settings > 1 else None


def describe(seen: tuple) -> str:
    """What `examined` returns, in words."""
    data, size, bank, test, where = seen
    return f"{data}, {size} pixels a side, {bank} training images, {test} {where}"


def is_of(flags: dict, model: dict) -> bool:
    """Did a run on pixels see what the model saw?"""
    of_pixels, of_model = ((Path(each["dataset"]).name, side(each["dataset"], each.get("size")),
                            *(each.get(key) for key in ("train_size", "test_size", "val", "seed")))
                           for each in (flags, model["training"]))
    return of_pixels == of_model


def over(values: list[dict], column: str) -> tuple:
    """(mean, low, high, n) over the n seeds that have it."""
    known = [value[column] for value in values if column in value]
    return *(t_interval(known) or (known[0], None, None)), len(known)


def answer(row: dict) -> str:
    """The rule of this table."""
    c, level = row["cells"], (claims.REFUTED, "equivalent")
    if row["why_not"]:
        return "not comparable"
    if not {"R - G", "R - L", "chance"} <= c.keys():
        return "R not measured"
    if c["G"][0] > claims.CEILING:
        return "no verdict: ceiling"                   # nothing is left for anything to add
    if max(c["R"][0], c["L"][0]) - c["chance"][0] < claims.FLOOR:
        return "no verdict: floor"
    if c["R - L"][3] == 1:
        return "not decided by one seed"
    R_to_G, L_to_G, R_to_L = (claims.lead(c[pair][:3]) for pair in ("R - G", "L - G", "R - L"))
    if claims.SUPPORTED in (R_to_G, L_to_G):
        return ("routed" if R_to_L == claims.SUPPORTED else
                "simply there" if R_to_L in level else "not clustered")
    if R_to_G in level and L_to_G in level:
        return "clustered"
    return "not routed" if R_to_L in level else claims.OPEN


# ---- The page ------------------------------------------------------------------------------------

def cell(row: dict, column: str) -> str:
    if column not in row["cells"]:
        return ""
    _, factor, digits = COLUMNS[column]
    *interval, n = row["cells"][column]
    value, *ends = (None if x is None else f"{factor * x:.{digits}f}" for x in interval)
    text = value if set(ends) <= {None, value} else f"{value} [{ends[0]}, {ends[1]}]"
    return text if n == len(row["seeds"]) else f"{text} (n = {n})"


def in_short(found: list[dict]) -> str:
    """One table: the answer in each weight space, under each data set a row of its pixels."""
    head = ["images", "stored as", "seeds", *SHORT.values(), "the class is"]
    text = [line(head), line(["---"] * len(head))]
    for data in dict.fromkeys(row["data"] for row in found):
        for row in (row for row in found if row["data"] == data):
            text.append(line([data, row["space"], str(len(row["seeds"])),
                              *(cell(row, key) for key in SHORT), row["answer"]]))
        pixels = [next((cell(row, f"pixels {letter}") for row in found if row["data"] == data
                        and not row["why_not"] and f"pixels {letter}" in row["cells"]), "")
                  for letter in "GLR"]
        text.append(line([data, "pixels", "", "", "", *pixels, ""]))
    return "\n".join(text) + "\n"


def as_markdown(found: list[dict]) -> str:
    """The short table; two more a data set, what weights hold and what the reader does with it."""
    text = [in_short(found)]
    for data in dict.fromkeys(row["data"] for row in found):
        mine = [row for row in found if row["data"] == data]
        for title, among in (("What the weights hold", HELD),
                             ("What its own reader does with it, points", DONE)):
            columns = [key for key in among if any(key in row["cells"] for row in mine)]
            last = ["the class is"] * (among is HELD)
            head = ["weight space", "seeds", *(COLUMNS[column][0] for column in columns), *last]
            text += [f"**{data}. {title}**\n", line(head), line(["---"] * len(head))]
            for row in mine:
                text.append(line([row["space"], ", ".join(map(str, row["seeds"])),
                                  *(cell(row, column) for column in columns),
                                  *[row["answer"] for _ in last]]))
            text.append("")
        text += [f"{row['space']}: not comparable: {row['why_not']}\n" for row in mine
                 if row["why_not"]]
    return "\n".join(text)


def line(texts: list[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def write(folder: Path, models: list[dict], pixels=()) -> str:
    """table.json, table.md, table.png. Returns the text."""
    found = rows(models, list(pixels))
    (folder / "table.json").write_text(json.dumps({"rows": found}, indent=1) + "\n")
    (folder / "table.md").write_text(text := as_markdown(found))
    figures.spaces_figure(folder / "table.png", found)
    return text


# ---- The program ---------------------------------------------------------------------------------

def read_reports(paths: list[str]) -> tuple[list[dict], list[dict]]:
    """(reports of models, reports of pixels)."""
    models, pixels = [], []
    for path in paths:
        try:
            report = json.loads(Path(path).read_text())
            if "model" in report:
                models.append({"method": "mwt"} | report["model"])     # the first reports say none
                rows(models[-1:], [])
                float(report["model"]["reader"])
            else:
                float(report["test_accuracy"]), report["flags"]["dataset"]
                pixels.append(report)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: no report of diagnostics.py on one model, or of pixels.py "
                             f"({type(error).__name__})") from error
    if not models:
        raise InputError("no report of diagnostics.py among these")
    return models, pixels


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    p = Parser(prog="spaces.py", description=__doc__.split("\n\n")[0])
    p.add_argument("reports", nargs="+", help="report.json of diagnostics.py, pixels.json")
    p.add_argument("--out", default="spaces", help="folder (default: spaces)")
    return p.parse_args(argv)


def main(argv: list[str] | None = None):
    with exits("spaces.py"):
        flags = parse_flags(argv)
        reports, folder = read_reports(flags.reports), Path(flags.out)
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {folder}: {error.strerror}") from error
        print(write(folder, *reports) + f"\nwrote {folder}/table.json, table.md and table.png")


if __name__ == "__main__":
    main()
