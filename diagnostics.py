"""Is the class signal clustered in the weights, or routed through the reader, and what does the
route carry?

    python diagnostics.py --ckpt out.pt                          # four experiments
    python diagnostics.py --ckpt out.pt --only clustering --samples 2000
    python diagnostics.py --ckpt a.pt b.pt c.pt --out models     # each, and a comparison of all

Four experiments: do the weights cluster by class, or can any simple classifier tell it (claim C1),
where in the reader do classes come apart (C2), and, in routes.py, is the bias column of the tokens
a route of its own (C3), and what does that route carry. A section begins with its method, in words,
and ends with its table. What is measured goes into a report (a dict); claims.py turns it into
sentences, figures.py into pictures.

The checkpoint may be any method's whose model has `fit` (images -> tokens), `read` (tokens ->
logits), `trace` (tokens -> logits, named states), `parts` (named bases of parts of a token),
`reader` (a Reader, or None) and, if it likes, `coordinates` (more places to look for clusters).
"""
import argparse
import json
import math
import os
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import claims
import figures
import spaces
from checkpoint import METHODS, InputError, exits, generator, model_from, read_checkpoint, seeded
from claims import cell, percent, span, table
from data import load_dataset, stratified_sample
from measures import (DECAYS, PENALTIES, bootstrap, chance, crossed, fisher_ratio, fit_linear,
                      fit_mlp, fit_probe, knn_predict, nearest, nearest_mean_predict,
                      paired_bootstrap, purity, silhouettes, vote, wilson)
from model import psnr
from routes import BLOCK, bias_route, bias_table, by_blocks, content, content_table, other_routes
from settings import RECIPE, Parser, command_line, environment, find_device, free_memory, whole
from train import train_reader

REFERENCE = 2000           # training images for means, principal components and regressions
UNTRAINED = 5              # readers with initial parameters, to compare with
WALKED = 5000              # training images of the bank in token flow: six readers walk it
KNOCKED = 1000             # test images that sub-blocks are knocked out on


class Fitted(NamedTuple):
    """A data set as weights."""
    images: Tensor         # (n, C, size, size) in [-1, 1]
    labels: Tensor         # (n,)
    tokens: Tensor         # (n, T, D)

    def take(self, rows: Tensor) -> "Fitted":
        return Fitted(*(x[rows] for x in self))


@torch.no_grad()
def fit_all(fit, images, device, workers: int = 0, title: str = "fitting") -> Fitted:
    """Every image of a `data.Images`, fitted block by block into one tensor."""
    order, found = torch.arange(len(images)).split(BLOCK), None
    bar = tqdm(order, title, leave=False, disable=None)
    for rows, (pixels, labels) in zip(bar, images.batches(order, device, workers)):
        block = Fitted(images.signal(pixels), labels, fit(images.signal(pixels)))
        if found is None:
            found = Fitted(*(x.new_empty(len(images), *x.shape[1:]) for x in block))
        for whole_set, x in zip(found, block):
            whole_set[rows] = x
    return found


def sample(labels: Tensor, count: int) -> Tensor:
    """At most `count` row numbers, the same share of each class, always the same ones."""
    return stratified_sample(labels, min(count, len(labels)))


def accuracy(guesses: Tensor, labels: Tensor) -> float:
    return float((guesses == labels).double().mean())


# ---- Clustering (claim C1) -----------------------------------------------------------------------
#
# If the class sat in the weights as clusters, geometry alone would find it: an image's nearest
# neighbours, or the nearest class mean, would tell its class as well as the trained reader does
# (C1a). If it sat there openly, any trained classifier would: a linear or a small nonlinear one on
# the weights flattened (C1b). Every training image (the bank) and every test image (the queries) is
# fitted. In each coordinate system, the raw pixels, the weights whole, by layer, standardised,
# scaled to length one, the bias column, we ask 1-NN, 10-NN and the nearest class mean for a test
# image's class; on pixels and weights the two trained classifiers too. Purity, silhouette and
# Fisher ratio are the test images' own. Chance: 10-NN with the bank's labels shuffled.
#
# R is the reader's accuracy, G the best geometry's (chosen on one half of the test images, measured
# on the other), L the best trained classifier's (chosen on a held-out fifth of the bank). C1a is
# supported if R - G > 2 points, refuted if < 0, "equivalent" within 2 points; C1b the same with L
# (claims.opponent_verdict). There is no verdict where G or L is above 96%, or the reader less than
# 10 points above chance. G and L on pixels tell whether fitting added anything.

def coordinate_systems(model, bank: Fitted, queries: Fitted):
    """Yields (name, bank rows (n, d), query rows (q, d)): where classes might cluster. phi - theta
    is the tokens flattened, or what the model's own `coordinates` calls so: of an MWT with the
    first layer, which the reader does not see."""
    def both(f):
        return f(bank).flatten(1), f(queries).flatten(1)

    yield "pixels", *both(lambda each: each.images)
    named = [{"phi - theta": each.tokens.flatten(1)} for each in (bank, queries)]
    if hasattr(model, "coordinates"):
        named = [plain | model.coordinates(each.images, each.tokens)
                 for plain, each in zip(named, (bank, queries))]
    for name in named[0]:
        yield name, named[0][name], named[1][name]
    mean, deviation = bank.tokens.mean(0), bank.tokens.std(0, correction=0)
    scale = torch.where(deviation > 1e-7 * mean.abs(), 1 / deviation, 0.0)
    yield "standardised per weight", *both(lambda each: (each.tokens - mean) * scale)
    yield "cosine of phi - theta", *map(F.normalize, both(lambda each: each.tokens))
    if "bias column" in model.parts():
        yield "bias column", *both(lambda each: each.tokens @ model.parts()["bias column"])
    if model.reader is not None:
        input_map = model.reader.input_map
        yield "after the reader's input map", *both(lambda each: by_blocks(input_map, each.tokens))


GEOMETRY = {"knn1": "1-NN", "knn10": "10-NN", "nearest_mean": "nearest mean"}
PROBES = {"linear": (fit_linear, PENALTIES), "mlp": (fit_mlp, DECAYS)}
PROBED = ("pixels", "phi - theta")


def clustering(systems, bank_labels: Tensor, labels: Tensor, guesses: Tensor, probes=True,
               seed=0) -> dict:
    """systems: as `coordinate_systems` yields; guesses (q,): the trained reader's predictions."""
    g, classes = generator("shuffle", seed), int(max(bank_labels.max(), labels.max())) + 1
    shuffled = bank_labels[torch.randperm(len(bank_labels), generator=g).to(labels.device)]
    rows, hits, held = [], {}, {}      # hits: {(coordinate, how): (q,)}; held: accuracy on a fifth
    for name, bank, x in tqdm(systems, "clustering", leave=False, disable=None):
        neighbors = nearest(bank, x, 10)
        found = {"knn1": bank_labels[neighbors[:, 0]],
                 "knn10": vote(bank_labels[neighbors], classes),
                 "nearest_mean": nearest_mean_predict(bank, bank_labels, x)}
        for how, (fit, settings) in PROBES.items() if probes and name in PROBED else ():
            found[how], held[name, how] = fit_probe(fit, settings, bank, bank_labels, x)
        fisher = fisher_ratio(x, labels)
        rows.append({"coordinate": name, "d": x.shape[1],
                     **{how: accuracy(answer, labels) for how, answer in found.items()},
                     "knn10_shuffled": accuracy(vote(shuffled[neighbors], classes), labels),
                     "purity": float(purity(x, labels).mean()),
                     "silhouette": float(silhouettes(x, labels).mean()),
                     "fisher": fisher if math.isfinite(fisher) else None})     # inf: no spread
        hits |= {(name, how): (answer == labels).double() for how, answer in found.items()}
    right = (guesses == labels).double()
    pure = next(row["purity"] for row in rows if row["coordinate"] == "phi - theta")
    result = {"rows": rows, "purity": pure, "reader": float(right.mean()),
              "reader_interval": wilson(int(right.sum()), len(right)), "chance": chance(labels),
              "bank": len(bank_labels), "test": len(labels), "classes": classes}
    return result | opponents(right, hits, held, seed)


def opponents(right: Tensor, hits: dict, held: dict, seed: int) -> dict:
    """G and L of the weights and of the pixels, and what the reader, right (q,), has beyond them.
    hits: {(coordinate, how): which queries are read right (q,)}; held: {(coordinate, how): accuracy
    on the held-out fifth of the bank}."""
    def best_geometry(of_pixels: bool):
        asked = [key for key in hits if key[1] in GEOMETRY and (key[0] == "pixels") == of_pixels
                 and key[0] != "after the reader's input map"]             # no geometry of weights
        values, choices = crossed(torch.stack([hits[key] for key in asked], 1), seed)
        return values, [f"{GEOMETRY[asked[c][1]]} on {asked[c][0]}" for c in choices]

    def best_probe(of_pixels: bool):
        asked = {key: a for key, a in held.items() if (key[0] == "pixels") == of_pixels}
        name, how = max(asked, key=asked.get)
        return hits[name, how], [f"{how} probe on {name}"]

    found = {}
    for letter, best in {"G": best_geometry, "L": best_probe}.items() if held else [
            ("G", best_geometry)]:
        (weights, names), (pixels, pixel_names) = best(False), best(True)
        found[letter] = {"accuracy": float(weights.mean()), "best": names,
                         "gap": paired_bootstrap(right, weights, seed),    # reader - best
                         "pixels": float(pixels.mean()), "best_on_pixels": pixel_names,
                         "over_pixels": paired_bootstrap(weights, pixels, seed),
                         "reader_over_pixels": paired_bootstrap(right, pixels, seed)}
    return found


def clustering_table(result: dict) -> str:
    keys = {"1-NN": "knn1", "10-NN": "knn10", "mean": "nearest_mean", "linear": "linear",
            "MLP": "mlp", "shuffled": "knn10_shuffled", "purity": "purity",
            "silh.": "silhouette", "Fisher": "fisher"}
    rows = [[row["coordinate"], *(cell(row, key) for key in keys.values())]
            for row in result["rows"]]
    rows.append(["trained reader", "", percent(result["reader"])])
    text = (table(["coordinate", *keys], rows) + f"\nbank {result['bank']}, test {result['test']} "
            "images; accuracies in %; shuffled: 10-NN, the bank's labels shuffled")
    for letter in "GL":
        if letter in result:
            best = result[letter]
            text += (f"\n{letter}: {percent(best['accuracy'])}% ({' / '.join(best['best'])}); on "
                     f"pixels {percent(best['pixels'])}% ({' / '.join(best['best_on_pixels'])}); "
                     f"reader - pixels {span(best['reader_over_pixels'], 100)} points")
    return text


# ---- Token flow (claim C2) -----------------------------------------------------------------------
#
# Where in the reader do classes come apart? 10-NN after the input map and after every sub-block of
# the residual stream, on the mean over tokens; and, after the blocks that decide, on all tokens
# flattened. Against them stand five readers with initial parameters, whose random features cluster
# a little too, and a bank that the trained reader never saw, since states of training images may
# cluster only because their labels were fitted. The head applied to earlier states is the logit
# lens (nostalgebraist 2020). Then all attention, or all MLPs, from one block on are knocked out:
# replaced by their mean output, which all images share.
#
# C2a is supported if, of the rise of 10-NN from the input map to the last block, over the untrained
# readers' mean, the last half of the blocks has more than the first half (of an odd number the
# middle one counts for neither), in both views, and refuted if less in both (claims.late_verdict).
# Purity near the head restates accuracy, so which stage's purity goes with accuracy over models
# (C2b) is description.

@torch.no_grad()
def walk(trace, tokens: Tensor, flattened=()) -> tuple[Tensor, dict, dict]:
    """One pass through a reader: logits, {stage: mean token (n, width)} and, of the stages named,
    {stage: all tokens (n, T * width)}. trace: tokens -> logits, [(stage, state), ...]."""
    logits, pooled, whole_states = [], {}, {}
    for rows in tqdm(torch.arange(len(tokens)).split(BLOCK), "token flow", leave=False,
                     disable=None):
        output, states = trace(tokens[rows])
        logits.append(output)
        for stage, state in [("input tokens", tokens[rows]), *states]:
            pooled.setdefault(stage, []).append(state.mean(1))
            if stage in flattened:
                room = state.new_empty(len(tokens), state[0].numel())
                whole_states.setdefault(stage, room)[rows] = state.flatten(1)
    pooled = {stage: torch.cat(blocks) for stage, blocks in pooled.items()}
    return torch.cat(logits), pooled, whole_states


def whole_blocks(stages: list[str], reader) -> list[str]:
    """The input map and the stages where a block ends; queries that gather tokens are none."""
    return stages[1:] if reader is None else stages[1:2 + len(reader.blocks):2]


def ends_of_halves(blocks: list[str]) -> list[str]:
    """Where the first half of the blocks begins and ends, where the last half does (4 stages)."""
    depth = len(blocks) - 1
    return [blocks[i] for i in (0, depth // 2, depth - depth // 2, depth)]


def stage_hits(trace, bank: Fitted, queries: Fitted, flattened) -> tuple:
    """{view: {stage: which queries 10-NN reads right (q,)}}; the bank's and the queries' mean
    tokens by stage; the queries' logits."""
    _, *known = walk(trace, bank.tokens, flattened)
    logits, *asked = walk(trace, queries.tokens, flattened)
    hits = {view: {stage: (knn_predict(x[stage], bank.labels, y) == queries.labels).double()
                   for stage, y in ys.items()}
            for view, x, ys in zip(("pooled", "flattened"), known, asked)}
    return hits, known[0], asked[0], logits


def unseen_bank(known: Tensor, known_labels: Tensor, x: Tensor, labels: Tensor) -> dict:
    """10-NN on the mean token (q, width) of one half of the queries, against the other half, which
    the reader never saw, and against as many training images."""
    half = sample(labels, min(len(labels) // 2, len(known)))
    seen = sample(known_labels, len(half))
    rest = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    rest[half] = False
    banks = {"seen": (known[seen], known_labels[seen]), "unseen": (x[half], labels[half])}
    return {f"{name}_knn10": accuracy(knn_predict(*each, x[rest]), labels[rest])
            for name, each in banks.items()}


def token_flow(trace, untrained: list, bank: Fitted, queries: Fitted, reader=None, flattened=True,
               probes=True, seed=0) -> dict:
    """trace, untrained: tokens -> logits, [(stage, state), ...] of the trained reader and of some
    with initial parameters; reader: a Reader, or None; flattened: whether memory allows that."""
    labels = queries.labels
    stages = ["input tokens", *(name for name, _ in trace(queries.tokens[:1])[1])]
    blocks = whole_blocks(stages, reader)
    ends = ends_of_halves(blocks)
    looked_whole = ends if flattened else []
    hits, known, asked, logits = stage_hits(trace, bank, queries, looked_whole)
    others = [stage_hits(each, bank, queries, looked_whole)[0] for each in untrained]
    right = (logits.argmax(1) == labels).double()
    split = torch.randperm(len(labels), generator=generator("halves", seed)).chunk(2)
    rows = []
    for stage, x in asked.items():                                         # x (q, width)
        pure = purity(x, labels)                                           # (q,)
        row = {"stage": stage, "purity": float(pure.mean()),
               "purity_halves": [float(pure[part].mean()) for part in split],
               **unseen_bank(known[stage], bank.labels, x, labels)}
        for view, found in hits.items():
            if stage in found:
                row[f"{view}_knn10"] = float(found[stage].mean())
            if others and stage in others[0][view]:
                row[f"untrained_{view}_knn10"] = float(mean_hits(others, view, stage).mean())
        if probes and stage in blocks:
            guesses, _ = fit_probe(fit_linear, PENALTIES, known[stage], bank.labels, x)
            row["pooled_linear"] = accuracy(guesses, labels)
        if reader is not None and stage != "input tokens":
            row["logit_lens"] = accuracy(reader.head(x).argmax(1), labels)
        rows.append(row)
    result = {"rows": rows, "reader": float(right.mean()), "bank": len(bank.labels),
              "reader_halves": [float(right[part].mean()) for part in split], "ends": ends,
              "blocks": len(blocks) - 1, "untrained": len(untrained),
              "test": len(labels), "classes": int(labels.max()) + 1}
    if untrained:
        result["rises"] = {view: rise(hits, others, view, ends, seed)
                           for view in hits if hits[view]}
    return result


def mean_hits(others: list[dict], view: str, stage: str) -> Tensor:
    """The share of untrained readers at whose stage a query is read right (q,)."""
    return torch.stack([each[view][stage] for each in others]).mean(0)


def rise(hits: dict, others: list[dict], view: str, ends: list[str], seed: int) -> dict:
    """Of 10-NN over the untrained readers' mean: from the input map to the last block, and what the
    last half of the blocks has of it less what the first half has."""
    gains = torch.stack([hits[view][stage] - mean_hits(others, view, stage) for stage in ends], 1)

    def late_less_early(m):
        return m[..., 3] - m[..., 2] - (m[..., 1] - m[..., 0])

    return {"rise": bootstrap(gains[:, 3] - gains[:, 0], seed=seed),
            "late_less_early": bootstrap(gains, late_less_early, seed)}


def flow_table(result: dict) -> str:
    keys = {"10-NN %": "pooled_knn10", "untrained": "untrained_pooled_knn10",
            "all 10-NN": "flattened_knn10", "untrained ": "untrained_flattened_knn10",
            "never seen": "unseen_knn10", "seen": "seen_knn10", "linear %": "pooled_linear",
            "lens %": "logit_lens", "purity": "purity"}
    rows = [[row["stage"], *(cell(row, key) for key in keys.values())] for row in result["rows"]]
    return (table(["stage", *keys], rows) + "\nof the mean over tokens; all: all tokens flattened; "
            f"untrained: mean of {result['untrained']} readers; never seen: 10-NN with half of the "
            "test images as the bank, seen: with as many training images; lens: the head applied "
            f"early; bank {result['bank']}, test {result['test']} images")


@torch.no_grad()
def knock_outs(reader, tokens: Tensor, labels: Tensor, reference: Tensor, seed=0) -> list[dict]:
    """Loss of accuracy where all attention, or all MLPs, from a block on add only what they add on
    the mean of reference tokens."""
    means = [0.0] * len(reader.blocks)                                     # of each (T, width)
    for part in reference.split(BLOCK):
        states = [x for _, x in reader.trace(part)[1]]
        for b in range(len(means)):
            means[b] = means[b] + (states[b + 1] - states[b]).sum(0) / len(reference)

    def right_without(kind: int, first: int) -> Tensor:
        def read(block):
            x = reader.input_map(block)
            for b, sub_block in enumerate(reader.blocks):
                x = x + (means[b] if b % 2 == kind and b // 2 >= first else sub_block(x))
            return reader.conclude(x, block)
        return (by_blocks(read, tokens).argmax(1) == labels).double()

    depth = len(reader.blocks) // 2
    right = right_without(0, depth)                                        # nothing is left out
    return [{"replaced": name, "block": first + 1,
             "loss": paired_bootstrap(right, right_without(kind, first), seed)}
            for kind, name in enumerate(("attention", "MLP")) for first in range(depth)]


def knock_out_table(found: list[dict]) -> str:
    blocks = sorted({row["block"] for row in found})
    rows = [[f"all {name} replaced",
             *(f"{100 * row['loss'][0]:+.1f}" for row in found if row["replaced"] == name)]
            for name in ("attention", "MLP")]
    return table(["loss of accuracy, points; from block", *map(str, blocks)], rows)


# ---- Learning curve: not among the default experiments -------------------------------------------
#
# What does a Transformer add to a simple classifier on the same weights, and from how many training
# images on? On the first 1,000, 2,500, ... fitted images a new reader is trained, in as many steps
# as all of them take, and the two trained classifiers.

SIZES = (1000, 2500, 5000, 10000, 25000)


def learning_curve(bank: Fitted, queries: Fitted, args, seed=0) -> dict:
    """args: the reader's settings and recipe, as `train.train_reader` takes them."""
    rows, labels, total = [], queries.labels, len(bank.labels)
    for n in [size for size in SIZES if size < total] + [total]:
        part = bank.take(sample(bank.labels, n))
        recipe = argparse.Namespace(**vars(args) | {"epochs": round(args.epochs * total / n)})
        reader = train_reader(part.tokens, part.labels, recipe).requires_grad_(False)
        right = {"reader": by_blocks(reader, queries.tokens).argmax(1) == labels}
        for kind, (fit, settings) in PROBES.items():
            guesses, _ = fit_probe(fit, settings, part.tokens.flatten(1), part.labels,
                                   queries.tokens.flatten(1))
            right[kind] = guesses == labels
        row = {"images": n} | {name: float(each.double().mean()) for name, each in right.items()}
        rows.append(row | {f"reader - {kind}": paired_bootstrap(right["reader"], right[kind], seed)
                           for kind in PROBES})
    return {"rows": rows, "test": len(labels), "classes": int(labels.max()) + 1}


def curve_table(result: dict) -> str:
    rows = [[str(row["images"]), *(percent(row[name]) for name in ("reader", *PROBES)),
             *(span(row[f"reader - {kind}"], 100) for kind in PROBES)] for row in result["rows"]]
    return table(["training images", "reader %", "linear %", "MLP %", "reader - linear, points",
                  "reader - MLP"], rows)


# ---- The same reader for every method: not among the default experiments -------------------------
#
# Methods come with readers of their own size, trained in their own way. To compare what is in their
# weights, a new reader, the same for all, is trained on the fitted training images.

SAME = dict(width=64, reader_depth=3, head_dim=32, mlp_ratio=1, epochs=15, batch_size=32, lr=3e-3,
            weight_decay=1e-4, precision="float32")


def same_reader(model, bank: Fitted, queries: Fitted, args) -> dict:
    recipe = argparse.Namespace(**vars(args) | SAME)
    classes = int(max(bank.labels.max(), queries.labels.max())) + 1
    reader = train_reader(bank.tokens, bank.labels, recipe, classes=classes).requires_grad_(False)
    right = by_blocks(reader, queries.tokens).argmax(1) == queries.labels
    error = (model.reconstruct(queries.images) - queries.images).square().mean((1, 2, 3))
    tokens, features = queries.tokens.shape[1:]
    return {"reader": float(right.double().mean()), "reader_interval": wilson(
                int(right.sum()), len(right)), "tokens": tokens, "features": features,
            "psnr": float(psnr(error).mean()), "recipe": SAME, "seed": args.seed}


def same_table(result: dict) -> str:
    low, high = result["reader_interval"]
    return (f"the same reader for every method: {percent(result['reader'])}% "
            f"[{percent(low)}, {percent(high)}]; {result['tokens']} tokens of "
            f"{result['features']} numbers\nwhat they show of test images: {result['psnr']:.2f} dB")


# ---- Command line --------------------------------------------------------------------------------

class Case(NamedTuple):
    """What an experiment may ask of."""
    model: nn.Module
    bank: Fitted               # training images
    queries: Fitted            # test images
    guesses: Tensor            # (q,) the model's predictions on them
    recipe: argparse.Namespace # all flags that the model was trained with
    seed: int                  # of random choices and intervals
    repeats: int               # of each random choice

    @property
    def reference(self) -> Fitted:
        return self.bank.take(sample(self.bank.labels, REFERENCE))


def run_clustering(case: Case) -> dict:
    systems = coordinate_systems(case.model, case.bank, case.queries)
    return clustering(systems, case.bank.labels, case.queries.labels, case.guesses, seed=case.seed)


def run_token_flow(case: Case) -> dict:
    """And knock-outs, as far as the model has a reader."""
    reader, queries, device = case.model.reader, case.queries, case.guesses.device
    bank = case.bank.take(sample(case.bank.labels, WALKED))
    largest = max(x.numel() for _, x in case.model.trace(queries.tokens[:1])[1])
    held = 5 * 4 * largest * (len(bank.labels) + len(queries.labels))  # bytes of four whole states
    untrained = []
    for i in range(UNTRAINED if reader is not None else 0):
        with seeded("reader", case.recipe.seed, i):
            other = type(reader)(*reader.arguments).to(device).requires_grad_(False)
        untrained.append(other.trace)
    result = token_flow(case.model.trace, untrained, bank, queries, reader,
                        held < free_memory(device), seed=case.seed)
    if reader is not None:
        asked = queries.take(sample(queries.labels, KNOCKED))
        result["knock_outs"] = knock_outs(reader, asked.tokens, asked.labels, case.reference.tokens,
                                          case.seed)
    return result


def run_bias_route(case: Case) -> dict:
    embed = None if case.model.reader is None else case.model.reader.embed.weight
    return bias_route(case.model.read, case.queries.tokens, case.queries.labels,
                      case.reference.tokens, case.model.parts(), case.seed, case.repeats, embed)


def run_content(case: Case) -> dict:
    parts = case.model.parts()
    if "bias column" in parts:
        bias = {"bias column": parts["bias column"]}
        parts = bias | other_routes(case.reference.tokens, parts)
    slow = getattr(case.model, "mediation_images", len(case.queries.labels))
    refitted = case.queries.take(sample(case.queries.labels, slow))
    return content(case.model.read, case.model.fit, case.queries, refitted, case.reference, parts,
                   case.seed)


def run_learning_curve(case: Case) -> dict:
    return learning_curve(case.bank, case.queries, case.recipe, case.seed)


def run_same_reader(case: Case) -> dict:
    return same_reader(case.model, case.bank, case.queries, case.recipe)


EXPERIMENT = {             # of each: what runs it, its table, its figure, its file
    "clustering": (run_clustering, clustering_table, figures.clustering_figure, "clustering.png"),
    "token-flow": (run_token_flow, flow_table, figures.flow_figure, "token_flow.png"),
    "bias-route": (run_bias_route, bias_table, figures.bias_figure, "bias_route.png"),
    "content": (run_content, content_table, figures.content_figure, "content.png"),
    "learning-curve": (run_learning_curve, curve_table, figures.curve_figure,
                       "learning_curve.png"),
    "same-reader": (run_same_reader, same_table, None, None)}
DEFAULT = ("clustering", "token-flow", "bias-route", "content")


def parser() -> Parser:
    p = Parser(prog="diagnostics.py", description=__doc__.split("\n\n")[0])
    p.add_argument("--ckpt", nargs="+", required=True, help="checkpoints; several are compared")
    p.add_argument("--only", nargs="+", choices=EXPERIMENT, default=DEFAULT,
                   metavar="EXPERIMENT", help=f"some of {', '.join(EXPERIMENT)} (default: all but "
                   "the last two, which train)")
    p.add_argument("--samples", type=whole(24), help="so many training images (default all)")
    p.add_argument("--repeats", type=whole(1), default=3, help="of each random choice (default 3)")
    p.add_argument("--seed", type=whole(0), default=0, help="of random choices and intervals")
    p.add_argument("--dataset", help="other data than the checkpoint was trained on")
    p.add_argument("--data-root", help="folder of the downloaded data sets (default: the run's)")
    p.add_argument("--device", default="auto", help="auto: CUDA if there is one")
    p.add_argument("--out", help="folder (default: the first checkpoint's name + -diagnostics)")
    return p


class Opened(NamedTuple):
    """A checkpoint, and the data to look at."""
    model: nn.Module
    saved: dict                # the checkpoint's content
    args: argparse.Namespace   # its flags, with other data where --dataset names them
    bank: object               # data.Images
    test: object               # data.Images
    whole: bool                # the bank is the whole training set


def open_checkpoint(path: str, flags, device) -> Opened:
    """InputError: all that can be wrong with it, before any work."""
    saved, changed = read_checkpoint(path), {}
    model = model_from(saved, path, device).eval().requires_grad_(False)
    model.bf16 = False                         # small differences are compared
    if flags.dataset not in (None, saved["args"]["dataset"]):
        changed = {"dataset": flags.dataset, "train_size": None, "test_size": None, "val": 0.0}
    if flags.data_root:
        changed["data_root"] = flags.data_root
    args = argparse.Namespace(**saved["args"] | changed)
    images, test = load_dataset(args, device)
    count = flags.samples or len(images)
    if count > len(images):
        raise InputError(f"--samples {count}: {path} has {len(images)} training images")
    bank = images.take(sample(images.labels, count)) if count < len(images) else images
    if (test.channels, list(test.classes)) != (saved["data"][0], list(saved["data"][1])):
        raise InputError(f"--dataset {args.dataset}: other channels or classes than {path} has")
    if min(len(bank), len(test)) < 24 or min(len(x.labels.unique()) for x in (bank, test)) < 2:
        raise InputError(f"{path}: {len(bank)} bank and {len(test)} test images: neighbours in "
                         "half of them need at least 24 of each, of two classes")
    check_memory(path, model, bank, test, device)
    return Opened(model, saved, args, bank, test, len(bank) == len(images))


def check_memory(path: str, model, images, test, device):
    """InputError where the fits, and what is made of them, would find no room."""
    one, _ = next(test.batches([torch.arange(1)], device))
    size = 4 * model.fit(test.signal(one)).numel() / 2 ** 30       # GiB of an image's fit
    room, need = free_memory(device) / 2 ** 30, size * (4 * len(images) + 6 * len(test))
    if need > room:
        fitting = int(room / size - 6 * len(test)) // 4
        way_out = f"use --samples {fitting}, which would fit"
        if fitting < 24:
            way_out = "the test images alone leave no room"
        raise InputError(f"{path}: {len(images)} fitted images take {need:.1f} GiB with what is "
                         f"made of them, and {room:.1f} are free: {way_out}")


def diagnose(path: str, opened: Opened, flags, device, write) -> dict:
    """One checkpoint's report; write(report) is called after each experiment."""
    model, saved, args, images, test, whole_bank = opened
    bank = fit_all(model.fit, images, device, args.workers, "fitting the bank")
    queries = fit_all(model.fit, test, device, args.workers, "fitting the test images")
    logits = by_blocks(model.read, queries.tokens)
    if not torch.isfinite(logits).all():
        raise InputError(f"{path}: its fits or predictions are not finite")
    guesses, recipe = logits.argmax(-1), argparse.Namespace(**RECIPE | saved["args"])
    program = "train" if saved["method"] == "mwt" else METHODS[saved["method"]]
    right, missing, done = int((guesses == queries.labels).sum()), left_out(model, recipe), {}
    report = {"name": Path(path).stem, "checkpoint": path, "method": saved["method"],
              "command": command_line(argparse.Namespace(**saved["args"]), program),
              "training": saved["args"], "data": args.dataset, "test": len(test),
              "bank": len(images), "whole_bank": whole_bank, "unfinished": "progress" in saved,
              "evaluated_on": "held-out training images" if args.val else "test images",
              "reader": right / len(test), "reader_interval": wilson(right, len(test)),
              "left_out": [f"{name}: {why}" for name, why in missing.items()
                           if name not in EXPERIMENT or name in flags.only], "experiments": done}
    case = Case(model, bank, queries, guesses, recipe, flags.seed, flags.repeats)
    for name, (run_experiment, *_) in EXPERIMENT.items():
        if name in flags.only and name not in missing:
            done[name] = run_experiment(case)
            write(report)
    return report


def left_out(model, recipe) -> dict[str, str]:
    """What this model has nothing for: {what: why}."""
    missing = {}
    if getattr(model.reader, "takes_colour", False):
        missing["the branch for the mean colour"] = "this is what the weights alone give"
    if model.reader is None:
        missing["untrained reader, logit lens, knock-outs"] = "this method has no Reader"
    if "bias column" not in model.parts():
        missing["bias-route"] = "this method's tokens have no bias column"
    if not model.parts():
        missing["content"] = "this method names no parts of a token"
    if recipe.steps_test not in (None, recipe.steps):
        missing["--steps-test"] = f"all is fitted with {recipe.steps} steps, as in training"
    return missing


def present(folder: Path, model: dict) -> str:
    """Draws a report's figures; returns its tables and what they say."""
    text = []
    for name, (_, to_text, figure, file) in EXPERIMENT.items():
        if file:
            (folder / file).unlink(missing_ok=True)            # an earlier report's
        if name in model["experiments"]:
            result = model["experiments"][name]
            if figure:
                figure(folder / file, result)
            text.append(to_text(result))
            if "knock_outs" in result:
                text.append(knock_out_table(result["knock_outs"]))
    figures.summary_figure(folder / "summary.png", model)
    text += [f"left out: {line}" for line in model["left_out"]]
    return claims.fold("\n\n".join([*text, "\n".join(model["summary"])]))


def save(path: Path, report: dict):
    """Whole or not at all."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


def make_folders(out: Path, paths: list[str]) -> list[Path]:
    """Where each checkpoint's report goes. InputError: a folder that cannot be made."""
    names = [Path(path).stem for path in paths]
    found = [out] if len(paths) == 1 else [
        out / (name if names.count(name) == 1 else f"{name}-{i + 1}")
        for i, name in enumerate(names)]
    try:
        for folder in [out, *found]:
            folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: no folder that can be made: {error.strerror}") from error
    return found


def run(argv: list[str] | None):
    flags = parser().parse_args(argv)
    device, models = find_device(flags.device), []
    opened = [open_checkpoint(path, flags, device) for path in flags.ckpt]     # before any work
    runs = [claims.run_of(each.saved) for each in opened]
    for path, same in zip(flags.ckpt, runs):
        if runs.count(same) > 1:
            raise InputError(f"--ckpt: {path} and another one are the same run")
    out = Path(flags.out or str(Path(flags.ckpt[0]).with_suffix("")) + "-diagnostics")
    command = ["python", "diagnostics.py", *(sys.argv[1:] if argv is None else argv)]
    about = environment(device) | {"command": shlex.join(command), "flags": vars(flags)}
    for path, checkpoint, folder in zip(flags.ckpt, opened, make_folders(out, flags.ckpt)):
        def write(report: dict):
            save(folder / "report.json", about | {"model": report})

        model = diagnose(path, checkpoint, flags, device, write)
        model["summary"] = claims.summary(model)
        write(model)
        print(f"== {path}\n\n{present(folder, model)}\nwrote {folder}/report.json and figures\n",
              flush=True)
        models.append(model)
    if len(models) > 1:
        result = claims.across(models, flags.seed)
        save(out / "report.json", about | {"across": result})
        figures.models_figure(out / "models.png", result)
        print(claims.across_table(result) + f"\nwrote {out}/report.json and models.png")
        if len({model["method"] for model in models}) > 1:
            spaces.write(out, models)
            print(f"one table of the weight spaces: {out}/table.md, table.json, table.png")


def main(argv: list[str] | None = None):
    with exits("diagnostics.py"):
        run(argv)


if __name__ == "__main__":
    main()
