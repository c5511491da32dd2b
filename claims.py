"""From measurements to sentences: the rules by which a report decides claims C1, C2 and C3, what it
says in a dozen lines, and the comparison across models and seeds.

C1  class feedback does not make the weights cluster as well as the trained reader reads them
C2  classes come apart late in the reader, and only late neighbourhoods tell its accuracy
C3  the bias column of the tokens is a route of its own

A claim may come out either way. Absence of significance is never support: what is neither supported
nor refuted is "not decided here". Intervals are (value, low, high), 95%, shares of 1.
"""
import json
import textwrap

import numpy as np

from measures import correlations, t_interval
from settings import FLAGS, FREE

POINTS = 0.02          # a difference of accuracy below two points is none

SHORT = {"column of highest energy": "highest col", "most constant column": "const. col",
         "leading direction": "direction",
         "random columns, energy matched before the input map": "rnd, before",
         "random columns, energy matched after the input map": "rnd, after"}


# ---- Words ---------------------------------------------------------------------------------------

def span(interval, factor: float = 1, digits: int = 1) -> str:
    """value [low, high]; the value alone where there is no interval."""
    if interval is None:
        return "none"
    value, *ends = (None if x is None else f"{factor * x:+.{digits}f}" for x in interval)
    return f"{value} [{ends[0]}, {ends[1]}]" if ends[0] else f"{value} (no interval)"


def percent(x: float | None) -> str:
    return "" if x is None else f"{100 * x:.1f}"


def cell(row: dict, key: str) -> str:
    """A share in percent; purity, silhouette and Fisher ratio as they are; nothing for None."""
    value = row.get(key)
    if value is not None and key.endswith(("purity", "silhouette", "fisher")):
        return f"{value:.3f}"
    return percent(value)


def table(titles: list[str], rows: list[list[str]]) -> str:
    """Aligned text: the first column flush left, all others flush right."""
    count = len(titles)
    lines = [titles, *([*row, *[""] * (count - len(row))] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(count)]
    return "\n".join("  ".join(text.ljust(w) if i == 0 else text.rjust(w)
                               for i, (text, w) in enumerate(zip(line, widths))).rstrip()
                     for line in lines)


def fold(text: str) -> str:
    """Lines of at most 100 columns."""
    return "\n".join(line if len(line) <= 100 else textwrap.fill(line, 100, subsequent_indent="  ")
                     for line in text.split("\n"))


# ---- Rules ---------------------------------------------------------------------------------------

def side(interval, limit: float) -> int:
    """1: the interval lies wholly above the limit, -1: below, 0: neither, or there is none."""
    if interval is None or interval[1] is None:
        return 0
    return int(interval[1] > limit) - int(interval[2] < limit)


def decide(supported: bool, refuted: bool) -> str:
    return "refuted" if refuted else "supported" if supported else "not decided here"


def clustering_verdict(result: dict) -> str:
    """C1 on one checkpoint: reader - best geometry > 2 points, refuted below. A bank that is only
    part of the training set cannot support it; the claim's other half needs several models."""
    gap = side(result["gap"], POINTS)
    verdict = decide(gap > 0 and result["whole_bank"], gap < 0)
    return "first half holds" if verdict == "supported" else verdict


def flow_verdict(result: dict) -> str:
    """C2 on one checkpoint: there is a rise over the untrained reader, and the second half of the
    blocks has more than half of it. The claim's other half needs several models."""
    if side(result["rise"], 0) <= 0:
        return "not decided here"
    late = side(result["late_minus_half"], 0)
    return decide(late > 0, late < 0).replace("supported", "second half holds")


def route_verdict(result: dict) -> str:
    """C3 on one checkpoint: loss with the bias column exchanged - the strongest control's > 2
    points, refuted below 0."""
    return decide(side(result["margin"], POINTS) > 0, side(result["margin"], 0) < 0)


# ---- One checkpoint ------------------------------------------------------------------------------

def summary(model: dict) -> list[str]:
    """A dozen lines about one checkpoint, then a line a claim."""
    done, verdicts = model["experiments"], []
    low, high = model["reader_interval"]
    unfinished = " (the run is not finished)" if model.get("unfinished") else ""
    lines = [f"reader accuracy {percent(model['reader'])}% [{percent(low)}, {percent(high)}] on "
             f"{model['test']} {model.get('evaluated_on', 'test images')}{unfinished}"]
    for key, (describe, verdict) in {"clustering": (clustering_lines, clustering_claim),
                                     "token-flow": (flow_lines, flow_claim),
                                     "bias-route": (route_lines, route_claim),
                                     "content": (content_lines, None)}.items():
        if key in done:
            lines += describe(done[key])
            verdicts += [verdict(done[key])] if verdict else []
    if verdicts:
        verdicts.append("the intervals are over test images, of one checkpoint")
    return [*lines, "", *verdicts]


def clustering_lines(c: dict) -> list[str]:
    rows = {row["coordinate"]: row for row in c["rows"]}
    found = [f"{name} {percent(rows[name]['knn10'])}%"
             for name in ("pixels", "phi - theta", "bias column") if name in rows]
    whole = rows["phi - theta"]
    return [f"10-NN on {', '.join(found)}; labels shuffled {percent(whole['knn10_shuffled'])}%",
            f"purity of phi - theta {whole['purity']:.3f}, silhouette {whole['silhouette']:.3f}",
            f"reader - best geometry ({' / '.join(dict.fromkeys(c['best']))}) "
            f"{span(c['gap'], 100)} points"]


def clustering_claim(c: dict) -> str:
    note = ""
    if c["verdict"] == "first half holds":
        note = " (its second half needs several models)"
    elif not c["whole_bank"]:
        note = f" (a bank of {c['bank']} is only a part of the training set)"
    return (f"C1 {c['verdict'].replace(' here', '')} on this checkpoint{note}: reader - best "
            f"geometry {span(c['gap'], 100)} points; rule: supported > 2, refuted < 2")


def flow_lines(f: dict) -> list[str]:
    start, first, last = f["rows"][0], f["rows"][1], f["rows"][-1]
    text = (f"10-NN on the mean token: {percent(start['pooled_knn10'])}% at the input, "
            f"{percent(first['pooled_knn10'])}% after the input map, "
            f"{percent(last['pooled_knn10'])}% at the end")
    if "untrained_pooled_knn10" in last:
        text += f"; untrained {percent(last['untrained_pooled_knn10'])}%"
    lines = [text, f"at the end, against a bank of {f['half']}: seen in training "
                   f"{percent(last['seen_knn10'])}%, never seen {percent(last['unseen_knn10'])}%"]
    if last["auroc"]:
        lines.append("purity of a test image's neighbours tells whether it is read right: AUROC "
                     f"{last['auroc'][0]:.2f} at the end, {start['auroc'][0]:.2f} at the input")
    if f.get("knock_outs"):
        alone = max((row for row in f["knock_outs"] if row["span"] == "alone"),
                    key=lambda row: row["loss"][0])
        lines.append(f"dearest sub-block: {alone['replaced']} in block {alone['block']} costs "
                     f"{span(alone['loss'], 100)} points")
    return lines


def flow_claim(f: dict) -> str:
    if "rise" not in f:
        return "C2 not decided on this checkpoint: there is no untrained reader to compare with"
    note = " (its first half needs several models)" if "half" in f["verdict"] else ""
    return (f"C2 {f['verdict'].replace(' here', '')} on this checkpoint{note}: rise of 10-NN over "
            f"the untrained reader {span(f['rise'], 100)} points, in the second half of the blocks "
            f"minus half of it {span(f['late_minus_half'], 100)}; rule: > 0, refuted < 0")


def route_lines(b: dict) -> list[str]:
    losses = {row["name"]: row["loss"] for row in b["rows"]
              if row["group"] in ("replaced", "control")}
    singles, same_class = b["single_columns"]["losses"], "another image's of the same class"
    controls = []
    for name in dict.fromkeys(b["strongest"]):
        single = (singles.get(name.removeprefix("column ")), None, None)
        controls.append(f"{name} {span(losses.get(name, single), 100)}")
    ranks = [f"{row['rank']}: {percent(row['accuracy'])}%" for row in b["rows"]
             if row["group"] == "rank" and row["rank"] in (0, 1, 2, 4)]
    return [f"bias column exchanged between images: loss {span(b['permuted'], 100)} points; "
            f"strongest control: {' / '.join(controls)}",
            f"same-class donor {span(losses[same_class], 100)}; other-class donor: predictions "
            f"move to its class {span(b['moved_to_donor'], 100)} points over its base rate",
            f"bias vector cut to rank {', '.join(ranks)}; effective rank "
            f"{b['effective_rank']:.1f} of {b['bias_entries']}"]


def route_claim(b: dict) -> str:
    return (f"C3 {b['verdict'].replace(' here', '')} on this checkpoint: loss with the bias column "
            f"exchanged - strongest control {span(b['margin'], 100)} points; rule: supported > 2, "
            f"refuted < 0 (against the energy-matched sets alone {span(b['margin_matched'], 100)})")


def content_lines(c: dict) -> list[str]:
    lines = []
    name = "bias column" if "bias column" in c["regressions"] else next(iter(c["regressions"]))
    tables = c["regressions"][name]["to_facts"]
    table = tables.get("4") or list(tables.values())[-1]
    facts = {fact: r2[0] for fact, r2 in table.items() if r2}
    best = sorted(facts, key=facts.get, reverse=True)[:4]
    lines.append(f"four components of the {name} predict: "
                 + ", ".join(f"{fact} R2 {facts[fact]:.3f}" for fact in best))
    other, same = c["mediation"]
    part = other["parts"][name]
    lines.append(f"mean colour of another class's image: total effect {span(other['total'], 100)} "
                 f"points, by the {name} alone {span(part['indirect'], 100)}; share mediated "
                 f"{span(part['share'], 1, 2)}; of a same-class image {span(same['total'], 100)}")
    return lines


# ---- Across models -------------------------------------------------------------------------------

# All other flags, whatever the method, make the architecture.
TRAINING = {name for name, *_ in FLAGS["training"]} | {"augment", "steps_test", "precision"}


def key_of(training: dict, leave_out=()) -> str:
    """The same for runs of the same settings; of --init-from only whether it was given. What is
    None is left out: a flag that older runs did not have, or had and is gone."""
    flags = training | {"init_from": bool(training.get("init_from"))}
    return json.dumps({key: value for key, value in sorted(flags.items())
                       if value is not None and key not in FREE and key not in leave_out})


def run_of(content: dict) -> str:
    """The same for two checkpoints of one run."""
    return content["method"] + key_of(content["args"])


def points(models: list[dict]) -> list[dict]:
    """What the comparison takes from each model's report."""
    found = []
    for model in models:
        flags, done, method = model["training"], model["experiments"], model.get("method", "mwt")
        w_task = flags.get("w_task")           # None: a method without a class loss for its weights
        label = method if w_task is None else f"w_task {w_task:g}"
        point = {"name": model["name"], "reader": model["reader"], "seed": flags["seed"],
                 "label": model.get("lane") or label, "w_task": w_task,
                 "setting": method + key_of(flags, ["seed"]),
                 "architecture": method + key_of(flags, TRAINING),
                 "apart_from_w_task": key_of(flags, ["w_task"])}
        if c := done.get("clustering"):
            point |= {"purity": c["purity"], "gap": c["gap"][0], "whole_bank": c["whole_bank"]}
        if f := done.get("token-flow"):
            point["stages"] = {row["stage"]: (row["pooled_purity"], row["pooled_knn10"])
                               for row in f["rows"]}
            if "rise" in f:
                point |= {"late": f["late_minus_half"][0], "rise": f["rise"][0]}
        if b := done.get("bias-route"):
            point |= {"margin": b["margin"][0], "permuted": b["permuted"][0]}
        found.append(point)
    return found


def with_accuracy(one: list[dict], seed: int) -> dict:
    """Rank correlations of purity, and of each stage's purity and 10-NN, with reader accuracy."""
    y, settings = [p["reader"] for p in one], [p["setting"] for p in one]
    found, first = {}, {}
    if all("purity" in p for p in one):
        first = {"phi - theta": [p["purity"] for p in one]}
        found["purity"] = correlations(first, y, settings, seed)
    if all("stages" in p for p in one):
        for i, key in enumerate(("stage purity", "stage knn10")):
            columns = {stage: [p["stages"][stage][i] for p in one] for stage in one[0]["stages"]}
            columns = (first if i == 0 else {}) | columns
            found[key] = correlations(columns, y, settings, seed)
    return found


def over_seeds(one: list[dict]) -> list[dict]:
    """t intervals of each setting that has three seeds or more."""
    found = []
    for setting in dict.fromkeys(p["setting"] for p in one):
        same = [p for p in one if p["setting"] == setting]
        if len({p["seed"] for p in same}) >= 3:
            row = {"models": [p["name"] for p in same], "label": same[0]["label"], "n": len(same),
                   "w_task": same[0]["w_task"],
                   "whole_bank": all(p.get("whole_bank") for p in same)}
            for key in ("reader", "gap", "late", "rise", "margin", "purity"):
                if all(key in p for p in same):
                    row[key] = t_interval([p[key] for p in same])
            found.append(row)
    return found


def task_pairs(one: list[dict]) -> list[dict]:
    """Purity with the class loss less without it, paired by seed."""
    without, found = {}, []
    for p in one:
        if p["w_task"] == 0 and "purity" in p:
            without[p["apart_from_w_task"]] = p["purity"]
    for w_task in sorted({p["w_task"] for p in one} - {0, None}):
        differences = [p["purity"] - without[p["apart_from_w_task"]] for p in one
                       if p["w_task"] == w_task and p["apart_from_w_task"] in without
                       and "purity" in p]
        if differences:
            found.append({"w_task": w_task, "n": len(differences),
                          "mean": float(np.mean(differences)), "interval": t_interval(differences)})
    return found


def across(found: list[dict], seed: int = 0) -> dict:
    """The comparison of models, over the largest group of one architecture."""
    architectures = [p["architecture"] for p in found]
    most = max(architectures, key=architectures.count)
    one = [p for p in found if p["architecture"] == most]
    result = {"points": found, "models": len(one), "others": len(found) - len(one),
              "correlations": with_accuracy(one, seed), "seeds": over_seeds(one),
              "pairs": task_pairs(one)}
    verdicts = [line for row in result["seeds"] for line in seed_verdicts(row, result)]
    if not result["seeds"]:
        verdicts = ["No setting has three seeds: nothing is said about the method, only about each "
                    "checkpoint."]
    return result | {"verdicts": verdicts}


def seed_verdicts(row: dict, result: dict) -> list[str]:
    """C1, C2 and C3 of a setting with three seeds or more."""
    rho = {key: (c or {}).get("spearman", {}) for key, c in result["correlations"].items()}
    purity = rho.get("purity", {}).get("phi - theta")
    last = rho.get("stage purity", {}).get("last - first") if "purity" in rho else None
    few, n, lines = "too few models or settings of one architecture for correlations", row["n"], []
    models = f"over {result['models']} models"
    if "gap" in row:
        gap, low = side(row["gap"], POINTS), side(purity, 0.5)
        verdict = decide(gap > 0 and low < 0 and row["whole_bank"], gap < 0 or low > 0)
        about = (f"Spearman's rho(purity of phi - theta, accuracy) {span(purity, 1, 2)} {models} "
                 "(rule: < 0.5)" if purity else few)
        lines.append(f"C1, {row['label']}: {verdict}. Reader - best geometry "
                     f"{span(row['gap'], 100)} points over {n} seeds (rule: > 2); {about}")
    if "late" in row:
        late, more = side(row["late"], 0) if side(row["rise"], 0) > 0 else 0, side(last, 0)
        about = (f"rho(purity at the last stage) - rho(purity of phi - theta) {span(last, 1, 2)} "
                 "(rule: > 0)" if last else few)
        verdict = decide(late > 0 and more > 0, late < 0 or more < 0)
        lines.append(f"C2, {row['label']}: {verdict}. Rise of 10-NN in the second half of the "
                     f"blocks - half of the rise {span(row['late'], 100)} points over {n} seeds "
                     f"(rule: > 0); {about}")
    if "margin" in row:
        lines.append(f"C3, {row['label']}: {route_verdict(row)}. Loss with the bias column "
                     f"exchanged - largest control {span(row['margin'], 100)} points over {n} "
                     "seeds (rule: > 2, refuted < 0)")
    return lines


def across_table(result: dict) -> str:
    lines = [f"{'model':28s}{'w_task':>8s}{'reader %':>9s}{'purity':>8s}{'gap':>7s}{'late':>7s}"
             f"{'bias loss':>10s}{'margin':>8s}"]
    for p in result["points"]:
        points_ = [f"{100 * p[key]:+.1f}" if key in p else ""
                   for key in ("gap", "late", "permuted", "margin")]
        purity = f"{p['purity']:.3f}" if "purity" in p else ""
        w_task = "" if p["w_task"] is None else f"{p['w_task']:g}"
        lines.append(f"{p['name'][:27]:28s}{w_task:>8s}{percent(p['reader']):>9s}{purity:>8s}"
                     + "".join(f"{text:>{w}s}" for text, w in zip(points_, (7, 7, 10, 8))))
    lines.append("gap: reader - best geometry; late: rise of 10-NN in the second half of the "
                 "blocks - half of the rise; bias loss: bias column exchanged; margin: bias loss - "
                 "the strongest control's; all in points of accuracy")
    for pair in result["pairs"]:
        interval = pair["interval"] or (pair["mean"], None, None)
        lines.append(f"purity of phi - theta, w_task {pair['w_task']:g} minus 0, same seeds: "
                     f"{span(interval, 1, 4)}, n = {pair['n']}")
    for key, c in result["correlations"].items():
        values = "too few models or settings"
        if c:
            values = ", ".join(f"{name} {rho[0]:+.2f}" for name, rho in c["spearman"].items())
            values += f" (Spearman, {c['n']} models, {c['settings']} settings)"
        lines.append(f"rho with reader accuracy, {key}: {values}")
    return fold("\n".join([*lines, *result["verdicts"]]))
