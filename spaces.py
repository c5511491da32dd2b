"""One table: is the class clustered, simply there, or routed, in several weight spaces?

    python diagnostics.py --ckpt a.pt --out a
    python diagnostics.py --ckpt a.pt --out a-same --only same-reader
    python spaces.py a/report.json a-same/report.json … pixels.json --out spaces

Reports of diagnostics.py, and of pixels.py, become a row for each weight space and data set, seeds
within it: table.json, table.md, table.png. A row that cannot be compared says why. In each space

    clustered      geometry of the weights tells the class as well as a trained Transformer, R
    simply there   it does not, but a simple classifier does
    routed         neither does
    not routed     a simple classifier does; whether geometry does too is not decided

by the rules of claims.py for C1a and C1b. R is one reader, trained in one way, for all spaces.
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
COLUMNS = {"numbers": ("numbers an image", 1, 0), "psnr": ("PSNR, dB", 1, 1),
           "R": ("R: same reader, %", 100, 1), "own": ("its own reader, %", 100, 1),
           "G": ("G: geometry, %", 100, 1), "L": ("L: classifier, %", 100, 1),
           "R - G": ("R − G", 100, 1), "R - L": ("R − L", 100, 1),
           "pixels G": ("pixels: G", 100, 1), "pixels L": ("pixels: L", 100, 1),
           "pixels R": ("pixels: Transformer", 100, 1),
           "late": ("rise of 10-NN, late − early", 100, 1),
           "bias column": ("loss: bias column exchanged", 100, 1),
           "columns": ("… − random columns", 100, 1),
           "components": ("… − components", 100, 1),
           "colour": ("loss: mean colour of another class", 100, 1),
           "share": ("… share by the bias column", 1, 2)}
HELD = list(COLUMNS)[:11]                      # the second table's columns
SHORT = {"numbers": "numbers an image", "psnr": "PSNR, dB", "G": "geometry, %",
         "L": "simple classifier, %", "R": "Transformer, %"}   # the first's
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
        found |= {f"R - {letter}": same["reader"] - found[letter] for letter in "GL"
                  if letter in found}
    if "content" in done:
        other = done["content"]["mediation"][0]
        found["colour"] = other["total"][0]
        if share := other["parts"].get("bias column", {}).get("share"):
            found["share"] = share[0]
    return found


def merge(models: list[dict]) -> list[dict]:
    """Reports of the same run as one."""
    found = {}
    for model in models:
        key = model["method"] + claims.key_of(model["training"])
        one = found.setdefault(key, model | {"experiments": {}})
        one["experiments"] |= model["experiments"]
    return list(found.values())


def side(dataset: str, size: int | None) -> int:
    """Pixels a side that a run with --dataset and --size saw."""
    return size or SIZE.get(dataset, 32)


def examined(model: dict) -> tuple:
    """What must be the same for two rows to be compared."""
    return (side(model["data"], model["training"].get("size")), model["bank"], model["test"],
            model["evaluated_on"])


def rows(models: list[dict], pixels: list[dict]) -> list[dict]:
    """A row a weight space and data set: {"data", "space", "seeds", "cells": {column: (value, low,
    high)}, over seeds, low and high None for one; "why_not": what forbids a comparison, or None;
    "answer"}. pixels: reports of pixels.py."""
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
        seeds = [model["training"]["seed"] for model in group]
        values = [cells(model) | {"pixels R": report["test_accuracy"] for report in pixels
                                  if is_of(report["flags"], data, seed, usual)}
                  for seed, model in zip(seeds, group)]
        row = {"data": data, "space": space, "seeds": sorted(seeds),
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
    return f"{settings} settings of this name" if settings > 1 else None


def describe(seen: tuple) -> str:
    """What `examined` returns, in words."""
    size, bank, test, where = seen
    return f"{size} pixels a side, {bank} training images, {test} {where}"


def is_of(flags: dict, data: str, seed: int, usual: tuple) -> bool:
    """Is a run on pixels of that data and seed?"""
    size, bank, *_ = usual
    return (Path(flags["dataset"]).name, flags["seed"], side(flags["dataset"], flags["size"])) == (
        data, seed, size) and flags["train_size"] in (None, bank)


def over(values: list[dict], column: str) -> tuple:
    """(mean, low, high) over the seeds that have it."""
    known = [value[column] for value in values if column in value]
    return t_interval(known) or (known[0], None, None)


def answer(row: dict) -> str:
    """The rule of this table."""
    c, alike = row["cells"], (claims.REFUTED, "equivalent")
    if row["why_not"]:
        return "not comparable"
    if not {"R - G", "R - L", "chance"} <= c.keys():
        return "not measured"
    geometry, classifier = (claims.opponent_verdict(c[f"R - {letter}"], c[letter][0], c["R"][0],
                                                    c["chance"][0]) for letter in "GL")
    if geometry in alike:
        return "clustered"
    if geometry == claims.SUPPORTED == classifier:
        return "routed"
    if classifier in alike and geometry in (claims.SUPPORTED, claims.OPEN):
        return "simply there" if geometry == claims.SUPPORTED else "not routed"
    if len(row["seeds"]) == 1 and claims.OPEN in (geometry, classifier):
        return "not decided by one seed"
    return classifier if geometry == claims.SUPPORTED else geometry


# ---- The page ------------------------------------------------------------------------------------

def cell(row: dict, column: str) -> str:
    if column not in row["cells"]:
        return ""
    _, factor, digits = COLUMNS[column]
    value, *ends = (None if x is None else f"{factor * x:.{digits}f}" for x in row["cells"][column])
    same = ends[0] in (None, value) and ends[1] in (None, value)
    return value if same else f"{value} [{ends[0]}, {ends[1]}]"


def in_short(found: list[dict]) -> str:
    """One table: the answer in each weight space, under each data set a row of its pixels."""
    head = ["images", "stored as", "seeds", *SHORT.values(), "the class is"]
    text, sets = [line(head), line(["---"] * len(head))], {row["data"]: row for row in found}
    for data, last in sets.items():
        for row in (row for row in found if row["data"] == data):
            text.append(line([data, row["space"], str(len(row["seeds"])),
                              *(cell(row, key) for key in SHORT), row["answer"].split(" (")[0]]))
        pixels = [cell(last, f"pixels {letter}") for letter in "GLR"]
        text.append(line([data, "pixels", "", "", "", *pixels, ""]))
    return "\n".join(text) + "\n"


def as_markdown(found: list[dict]) -> str:
    """The short table; two more a data set, what weights hold and what the reader does with it."""
    text = [in_short(found)]
    for data in dict.fromkeys(row["data"] for row in found):
        mine = [row for row in found if row["data"] == data]
        for title, held in (("What the weights hold", True),
                            ("What its own reader does with it, points", False)):
            columns = [column for column in COLUMNS if (column in HELD) == held
                       and any(column in row["cells"] for row in mine)]
            last = ["the class is"] * held
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
                cells(report["model"]), claims.point(report["model"])
                models.append(report["model"])
            else:
                float(report["test_accuracy"]), report["flags"]["seed"]
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
