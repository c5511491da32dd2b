"""From measurements to sentences: the rule by which each claim is decided, what a report says in a
dozen lines, and the comparison across models and seeds.

C1a the weights do not cluster by class        C1b nor can a simple trained classifier see it
C1c pressure to cluster does not help          C2a classes come apart late in the reader
C3  the bias column is a route beyond its size C4  acting on the diagnosis helps

A claim may come out either way. Absence of significance is never support: what is neither supported
nor refuted is "not decided here"; what could not have come out otherwise gets no verdict, and why.
Intervals are (value, low, high), 95%, shares of 1. (These are the second rules, written after the
first reports; recorded reports of before keep the first ones' verdicts.)
"""
import json
import textwrap

from measures import spearman, t_interval
from settings import FLAGS, FREE

POINTS = 0.02          # a difference of accuracy below two points is none
CEILING = 0.96         # above it an opponent leaves the reader too little to add
FLOOR = 0.10           # a reader so little above chance has nothing to explain
ENOUGH = 10            # fewer random sets of columns decide nothing

SUPPORTED, REFUTED, OPEN = "supported", "refuted", "not decided here"


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
    if value is not None and key in ("purity", "silhouette", "fisher"):
        return f"{value:.3f}"
    return percent(value)


def table(titles: list[str], rows: list[list[str]]) -> str:
    """Aligned text: the first column flush left, all others flush right."""
    lines = [titles, *([*row, *[""] * (len(titles) - len(row))] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(text.rjust(width) if i else text.ljust(width)
                               for i, (text, width) in enumerate(zip(line, widths))).rstrip()
                     for line in lines)


def fold(text: str) -> str:
    """Lines of at most 100 columns."""
    return "\n".join(line if len(line) <= 100 else textwrap.fill(line, 100, subsequent_indent="  ")
                     for line in text.split("\n"))


# ---- Rules: intervals to a verdict ---------------------------------------------------------------

def side(interval, limit: float) -> int:
    """1: the interval lies wholly above the limit, -1: below, 0: neither, or there is none."""
    if interval is None or interval[1] is None:
        return 0
    return int(interval[1] > limit) - int(interval[2] < limit)


def decide(supported: bool, refuted: bool) -> str:
    return REFUTED if refuted else SUPPORTED if supported else OPEN


def lead(gap) -> str:
    """Of a difference: supported above 2 points, refuted below 0, equivalent within 2 points."""
    verdict = decide(side(gap, POINTS) > 0, side(gap, 0) < 0)
    within = side(gap, -POINTS) > 0 > side(gap, POINTS)
    return "equivalent" if verdict == OPEN and within else verdict


def opponent_verdict(gap, best: float, reader: float, chance: float) -> str:
    """C1a, C1b: does the reader lead its opponent (G or L), whose accuracy is `best`?"""
    if reader - chance < FLOOR:
        return "no verdict: floor (the reader is hardly above chance)"
    if best > CEILING:
        return "no verdict: ceiling (nothing is left for a reader to add)"
    return lead(gap)


def pressure_verdict(purity, accuracy, beyond_random) -> str:
    """C1c, a contrastive lane less its baseline, paired by seed. Supported: purer, the reader
    worse, and worse than the same loss with fixed random labels makes it, which is the price of any
    second loss. Refuted: purer and the reader better."""
    purer, better = side(purity, 0), side(accuracy, 0)
    return decide(purer > 0 > better and side(beyond_random, 0) < 0, purer > 0 and better > 0)


def late_verdict(views: dict, blocks: int) -> str:
    """C2a: the last half of the blocks has more of the rise than the first half, in each view.
    views: {name: {"rise", "late_less_early"}}."""
    if blocks < 2:
        return "no verdict: fewer than two blocks have no halves"
    if any(side(view["rise"], 0) <= 0 for view in views.values()):
        return OPEN                            # nothing rises that could rise late
    sides = {side(view["late_less_early"], 0) for view in views.values()}
    if {1, -1} <= sides:
        return "depends on the view"
    return decide(sides == {1} and len(views) > 1, sides == {-1} and len(views) > 1)


def route_verdict(controls: dict, reader: float, chance: float) -> str:
    """C3: the loss with the bias column exchanged less that of each control of its size: supported
    above 2 points against both, refuted below 0 against either; one larger than the bias column
    refutes nothing. controls: {name: {"number", "size" over the bias column's, "margin"}}."""
    if reader - chance < FLOOR:
        return "no verdict: floor (the reader is hardly above chance)"
    sets = controls.get("random columns", {"number": 0})["number"]
    if sets < ENOUGH or "principal components" not in controls:
        return (f"no verdict: too few controls of the bias column's size ({sets} sets of columns, "
                f"{len(controls) - (sets > 0)} of components)")
    return decide(all(side(each["margin"], POINTS) > 0 for each in controls.values()),
                  any(side(each["margin"], 0) < 0 for each in controls.values()
                      if each["size"] < 1.1))


def helps_verdict(contrasts: dict, detectable: float, p: float | None) -> str:
    """C4, a lane less its baseline, less the baseline of its compute, and so on, over five seeds or
    more: supported above 0 against all, p after Holm's correction over lanes below 0.05; refuted
    below 0 against the first two. detectable: the least gain that these seeds would show."""
    gains = list(contrasts.values())
    verdict = decide(all(side(gain, 0) > 0 for gain in gains) and p is not None and p < 0.05,
                     all(side(gain, 0) < 0 for gain in gains[:2]))
    if verdict == OPEN and detectable > POINTS:
        return f"cannot be seen at this power (least effect {100 * detectable:.1f} points)"
    return verdict


# ---- Evidence: what the claims need of a model ---------------------------------------------------
#
# Every figure is (value, low, high). Of one checkpoint low and high are over test images; over the
# seeds of a setting they are a t interval of the values. The same sentences are made of both.

def evidence(model: dict) -> dict:
    """The figures of a report, by name."""
    def alone(value):
        return value, None, None

    done, found = model["experiments"], {"R": alone(model["reader"])}
    if c := done.get("clustering"):
        found |= {"chance": alone(c.get("chance", 0.0)), "purity": alone(c["purity"])}
        for letter in "GL":
            if best := c.get(letter):
                found |= {letter: alone(best["accuracy"]), f"R - {letter}": best["gap"],
                          f"{letter} on pixels": alone(best["pixels"]),
                          f"{letter} - pixels": best["over_pixels"]}
    if f := done.get("token-flow"):
        found["blocks"] = alone(f.get("blocks", 0))
        for view, each in f.get("rises", {}).items():
            found |= {f"rise {view}": each["rise"], f"late {view}": each["late_less_early"]}
    if b := done.get("bias-route"):
        found |= {"chance": alone(b.get("chance", 0.0)), "exchanged": b["permuted"]}
        for name, each in b.get("controls", {}).items():
            found |= {f"margin {name}": each["margin"], f"number {name}": alone(each["number"]),
                      f"size {name}": alone(each["size"])}
    return found


def over_seeds(same: list[dict]) -> dict:
    """The evidence of one setting, of the figures that all its models have; of controls the least
    number and the largest size."""
    found = {}
    for name in set.intersection(*map(set, same)):
        values = [each[name][0] for each in same]
        extreme = {"number": min, "size": max}.get(name.split()[0])
        found[name] = (extreme(values), None, None) if extreme else t_interval(values)
    return found


def sentences(e: dict, who: str = "") -> list[str]:
    """C1 to C3 of one checkpoint or, by name, of a setting over its seeds."""
    found = [*opponent_claims(e), *flow_claims(e), *route_claims(e)]
    words = {"C1a": "the weights do not cluster", "C1b": "nor does a simple classifier see it",
             "C2a": "classes come apart late", "C3": "the bias column is a route beyond its size"}
    return [f"{claim}, {who or words[claim]}: {verdict}. {why}" for claim, verdict, why in found]


def opponent_claims(e: dict):
    for claim, letter, what in (("C1a", "G", "best geometry"), ("C1b", "L", "best classifier")):
        if f"R - {letter}" in e:
            verdict = opponent_verdict(e[f"R - {letter}"], e[letter][0], e["R"][0], e["chance"][0])
            yield claim, verdict, (
                f"Reader {percent(e['R'][0])}% - {what} of the weights {percent(e[letter][0])}% = "
                f"{span(e[f'R - {letter}'], 100)} points (rule: supported > 2, refuted < 0, "
                f"equivalent within 2); on pixels {percent(e[f'{letter} on pixels'][0])}%, weights "
                f"- pixels {span(e[f'{letter} - pixels'], 100)}")


def flow_claims(e: dict):
    names = {"pooled": "mean token", "flattened": "all tokens flattened"}
    views = {names[view]: {"rise": e[f"rise {view}"], "late_less_early": e[f"late {view}"]}
             for view in names if f"rise {view}" in e}
    if views:
        found = "; ".join(f"{name} {span(each['rise'], 100)}, late - early "
                          f"{span(each['late_less_early'], 100)}" for name, each in views.items())
        alone = "" if len(views) == 2 else "; all tokens were not looked at, for want of memory"
        yield "C2a", late_verdict(views, e["blocks"][0]), (
            f"Rise of 10-NN over untrained readers, points: {found}{alone} (rule: late - early > 0 "
            "in both views, refuted < 0 in both)")
    elif "blocks" in e:
        yield "C2a", "no verdict", "There is no untrained reader to compare with"


def route_claims(e: dict):
    if "exchanged" in e:
        controls = {name: {"number": e[f"number {name}"][0], "size": e[f"size {name}"][0],
                           "margin": e[f"margin {name}"]}
                    for name in ("random columns", "principal components") if f"margin {name}" in e}
        found = "; ".join(f"{each['number']} sets of {name} ({each['size']:.1f} times its size) "
                          f"{span(each['margin'], 100)}" for name, each in controls.items())
        yield "C3", route_verdict(controls, e["R"][0], e["chance"][0]), (
            f"Loss when exchanged {span(e['exchanged'], 100)} points; less that of "
            f"{found or 'nothing of its size'} (rule: supported > 2 against both, refuted < 0 "
            "against either)")


def content_line(c: dict) -> str:
    """What the route carries: no claim."""
    name, (other, same) = next(iter(c["told"])), c["mediation"]
    part = other["parts"][name]
    return (f"mean colour of another class's image costs {span(other['total'], 100)} points, in "
            f"the {name} alone {span(part['indirect'], 100)}; share mediated "
            f"{span(part['share'], 1, 2)}; of a same-class image {span(same['total'], 100)}")


def summary(model: dict) -> list[str]:
    """The reader's accuracy, then a line a claim."""
    low, high = model["reader_interval"]
    unfinished = " (the run is not finished)" if model["unfinished"] else ""
    part = "" if model["whole_bank"] else (f"; {model['bank']} training images only: geometry and "
                                           "classifiers are weaker opponents than they could be")
    lines = [f"reader {percent(model['reader'])}% [{percent(low)}, {percent(high)}] on "
             f"{model['test']} {model['evaluated_on']}{unfinished}{part}"]
    lines += sentences(evidence(model))
    if "content" in model["experiments"]:
        lines.append(content_line(model["experiments"]["content"]))
    return [*lines, "verdicts are about this checkpoint; intervals are over test images"]


# ---- Across models -------------------------------------------------------------------------------

# All other flags, whatever the method, make the architecture.
DATA = ("dataset", "size", "train_size", "test_size", "val")
TRAINING = {name for name, *_ in FLAGS["training"]} | {"augment", "steps_test", "precision"}
# Of other methods: what follows from a run's own tokens or goes with its seed, and what a program
# compares besides the weights that it hands on.
ASIDE = {"token_scale", "start", "choose", "kinds", "init", "only", "rate_mlp", "rate_lora",
         "diffusion_steps", "seeds"}


def key_of(training: dict, leave_out=()) -> str:
    """The same for runs of the same settings; of --init-from only whether it was given. What is
    None is left out: a flag that older runs did not have, or had and is gone."""
    flags = training | {"init_from": bool(training.get("init_from"))}
    return json.dumps({key: value for key, value in sorted(flags.items())
                       if value is not None and key not in FREE and key not in leave_out})


def run_of(content: dict) -> str:
    """The same for two checkpoints of one run."""
    return content["method"] + key_of(content["args"])


def point(model: dict) -> dict:
    """What the comparison takes from one model's report: who it is, and its evidence."""
    flags, method = model["training"], model.get("method", "mwt")
    label, aside = model.get("lane") or method, ASIDE
    if method == "mwt":
        names, aside = {0: "WT", 0.01: "MWT"}, set()
        label = model.get("lane") or names.get(flags["w_task"], f"w_task {flags['w_task']}")
    found = {"name": model["name"], "seed": flags["seed"], "method": method,
             "data": json.dumps([flags.get(key) for key in DATA]), "label": label,
             "setting": method + key_of(flags, aside | {"seed"}),
             "architecture": method + key_of(flags, aside | TRAINING),
             "evidence": evidence(model)}
    flow = model["experiments"].get("token-flow", {})
    if "reader_halves" in flow:
        found |= {"reader_halves": flow["reader_halves"],
                  "stages": {row["stage"]: row["purity_halves"] for row in flow["rows"]}}
    return found


def with_accuracy(one: list[dict], seed: int) -> dict:
    """C2b, description: Spearman's rho over models of purity, by stage, with accuracy; of stages
    on one half of the test images, with accuracy on the other half."""
    settings, found = [p["setting"] for p in one], {}
    if all("purity" in p["evidence"] for p in one):
        purity, reader = ([p["evidence"][name][0] for p in one] for name in ("purity", "R"))
        found["phi - theta"] = spearman(purity, reader, settings, seed)
    if all("stages" in p for p in one):
        for stage in one[0]["stages"]:
            found[stage] = spearman([p["stages"][stage][0] for p in one],
                                    [p["reader_halves"][1] for p in one], settings, seed)
    return {name: rho for name, rho in found.items() if rho}


def against_pixels(points: list[dict]) -> list[str]:
    """The reader on weights less the same Transformer on pixels (method "pixels"), same data,
    paired by seed."""
    pixels = {(p["data"], p["seed"]): p["evidence"]["R"][0] for p in points
              if p["method"] == "pixels"}
    gaps = {}                                  # by setting
    for p in points:
        if p["method"] != "pixels" and (p["data"], p["seed"]) in pixels:
            gap = p["evidence"]["R"][0] - pixels[p["data"], p["seed"]]
            gaps.setdefault((p["label"], p["setting"]), []).append(gap)
    return [f"{label} - the same Transformer on pixels: "
            f"{span(t_interval(each) or (each[0], None, None), 100)} points, {len(each)} seeds"
            for (label, _), each in gaps.items()]


def across(models: list[dict], seed: int = 0) -> dict:
    """The comparison of models' reports: by setting, and correlations over the largest group of one
    architecture."""
    points, settings = [point(model) for model in models], {}
    architectures = [p["architecture"] for p in points]
    one = [p for p in points if p["architecture"] == max(architectures, key=architectures.count)]
    for p in points:
        settings.setdefault(p["setting"], []).append(p)
    rows, verdicts = [], []
    for same in settings.values():
        if len({p["seed"] for p in same}) >= 3:
            found, label = over_seeds([p["evidence"] for p in same]), same[0]["label"]
            rows.append({"label": label, "models": [p["name"] for p in same], "n": len(same),
                         **found})
            verdicts += sentences(found, f"{label}, {len(same)} seeds")
    few = ["No setting has three seeds: nothing is said about the method, only about each "
           "checkpoint."]
    return {"points": points, "models": len(one), "settings": len({p["setting"] for p in one}),
            "correlations": with_accuracy(one, seed), "seeds": rows,
            "verdicts": (verdicts or few) + against_pixels(points)}


ACROSS = {"R": "R %", "G": "G %", "L": "L %", "R - G": "R-G", "R - L": "R-L",
          "G on pixels": "px G", "L on pixels": "px L", "late pooled": "late",
          "late flattened": "all", "exchanged": "bias", "margin random columns": "sets",
          "margin principal components": "comp"}


def across_table(result: dict) -> str:
    """A row a model, in percent and points."""
    points = result["points"]
    keys = [key for key in ACROSS if any(key in p["evidence"] for p in points)]
    lines = [table(["model", "", *(ACROSS[key] for key in keys)],
                   [[p["name"][:24], p["label"],
                     *(percent(p["evidence"].get(key, [None])[0]) for key in keys)]
                    for p in points]),
             "px: on pixels; late: late - early rise of 10-NN on the mean token, all: of all; "
             "bias: loss with the bias column exchanged; sets, comp: less its controls'; points"]
    if result["correlations"]:
        values = ", ".join(f"{name} {rho[0]:+.2f}" for name, rho in result["correlations"].items())
        lines.append(f"Spearman's rho of purity and accuracy ({result['models']} models, "
                     f"{result['settings']} settings): {values}; description, no verdict: near the "
                     "head purity restates accuracy")
    return fold("\n".join([*lines, *result["verdicts"]]))
