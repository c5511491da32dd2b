"""Is the class signal clustered in the weights, or routed through the reader, and what does the
route carry?

    python diagnostics.py --ckpt out.pt                          # four experiments
    python diagnostics.py --ckpt out.pt --only clustering --samples 2000
    python diagnostics.py --ckpt a.pt b.pt c.pt --out models     # each, and a comparison of all

Four experiments, a section each: do the weights cluster by class (claim C1), where in the reader
do classes come apart (C2), is the bias column of the tokens a route of its own (C3), and what does
that route carry. A section begins with its method, in words, and ends with its table. What is
measured goes into a report (a dict); claims.py turns it into sentences, figures.py into pictures.

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
from checkpoint import METHODS, InputError, exits, generator, model_from, read_checkpoint, seeded
from claims import cell, percent, span, table
from data import load_dataset, stratified_sample
from measures import (auroc, bootstrap, crossed, effective_rank, fisher_ratio, knn_predict, nearest,
                      nearest_mean_predict, linear_probe_predict, over_repeats, paired_bootstrap,
                      principal, purity, regression, silhouettes, vote, wilson)
from settings import Parser, command_line, environment, find_device, free_memory, whole

BLOCK = 256                # images that go through a model at once
REFERENCE = 2000           # training images for means, principal components and regressions


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


@torch.no_grad()
def by_blocks(f, x: Tensor, title: str | None = None) -> Tensor:
    """f(x) (n, ...), a block of rows at a time."""
    blocks = tqdm(x.split(BLOCK), title, leave=False, disable=None if title else True)
    return torch.cat([f(block) for block in blocks])


def sample(labels: Tensor, count: int) -> Tensor:
    """At most `count` row numbers, the same share of each class, always the same ones."""
    return stratified_sample(labels, min(count, len(labels)))


def accuracy(guesses: Tensor, labels: Tensor) -> float:
    return float((guesses == labels).double().mean())


# ---- Clustering (claim C1) -----------------------------------------------------------------------
#
# If the class sat in the weights as clusters, geometry alone would find it: an image's nearest
# neighbours, or the nearest class mean, would tell its class as well as the trained reader does.
# Every training image (the bank) and every test image (the queries) is fitted. In each coordinate
# system, the weights whole, by layer, standardised, scaled to length one, cut to a part of the
# token, and the raw pixels, we ask 1-NN, 10-NN and the nearest class mean for a test image's class,
# and beside them a linear probe, which is trained and no geometry. Purity, silhouette and Fisher
# ratio are the test images' own. Chance: 10-NN with the bank's labels shuffled.
#
# The reader's accuracy less the best geometry's (chosen on one half of the test images, measured on
# the other) decides the first half of C1. Another outcome is as possible: on easy data geometry
# reads the weights as well as the reader.

def coordinate_systems(model, bank: Fitted, queries: Fitted):
    """Yields (name, bank rows (n, d), query rows (q, d)): where classes might cluster."""
    def both(f):
        return f(bank).flatten(1), f(queries).flatten(1)

    yield "pixels", *both(lambda each: each.images)
    named = [{"phi - theta": each.tokens.flatten(1)} for each in (bank, queries)]
    if hasattr(model, "coordinates"):
        named = [plain | model.coordinates(each.images, each.tokens)
                 for plain, each in zip(named, (bank, queries))]
    for name in named[0]:
        if name != "phi":                      # theta is one shift for all: the same distances
            yield name, named[0][name], named[1][name]
    mean, deviation = bank.tokens.mean(0), bank.tokens.std(0, correction=0)
    scale = torch.where(deviation > 1e-7 * mean.abs(), 1 / deviation, 0.0)
    yield "standardised per weight", *both(lambda each: (each.tokens - mean) * scale)
    if "bias column" in model.parts():
        U = model.parts()["bias column"]       # (D, 1)
        rest = torch.eye(len(U), device=U.device) - U @ U.T
        yield "bias column", *both(lambda each: each.tokens @ U)
        yield "all but the bias column", *both(lambda each: each.tokens @ rest)
    yield "cosine of phi - theta", *map(F.normalize, both(lambda each: each.tokens))
    if "phi" in named[0]:
        yield "cosine of phi", *(F.normalize(each["phi"]) for each in named)
    if model.reader is not None:
        beta, input_map = model.reader.beta, model.reader.input_map
        yield "cosine of phi - theta + beta", *map(F.normalize, both(lambda e: e.tokens + beta))
        yield "after the reader's input map", *both(lambda each: by_blocks(input_map, each.tokens))


def measure(bank: Tensor, bank_labels: Tensor, x: Tensor, labels: Tensor, probe=False) -> dict:
    """All measures of queries x (q, d): predictions knn1, knn10, nearest_mean and probe (q,),
    purity and silhouette (q,), the numbers of the 10 nearest bank rows (q, 10), Fisher ratio."""
    classes = int(max(bank_labels.max(), labels.max())) + 1
    neighbors = nearest(bank, x, 10)
    found = {"d": x.shape[1], "neighbors": neighbors, "knn1": bank_labels[neighbors[:, 0]],
             "knn10": vote(bank_labels[neighbors], classes),
             "nearest_mean": nearest_mean_predict(bank, bank_labels, x),
             "purity": purity(x, labels), "silhouette": silhouettes(x, labels),
             "fisher": fisher_ratio(x, labels)}
    if probe:
        found["probe"] = linear_probe_predict(bank, bank_labels, x)
    return found


def report_row(found: dict, labels: Tensor) -> dict:
    """A report's figures of one coordinate system."""
    row = {key: accuracy(found[key], labels)
           for key in ("knn1", "knn10", "nearest_mean", "probe") if key in found}
    row |= {key: float(found[key].mean()) for key in ("purity", "silhouette")}
    fisher = found["fisher"] if math.isfinite(found["fisher"]) else None       # no spread
    return row | {"d": found["d"], "fisher": fisher}


# A probe standardises and is linear: scaled or mapped linearly, it would find nothing new.
UNPROBED = ("standardised per weight", "cosine of phi - theta", "cosine of phi",
            "cosine of phi - theta + beta", "after the reader's input map")
NO_GEOMETRY = ("pixels", "after the reader's input map")       # of the weights
GEOMETRY = {"knn1": "1-NN", "knn10": "10-NN", "nearest_mean": "nearest mean"}


def clustering(systems, bank_labels: Tensor, labels: Tensor, guesses: Tensor, whole_bank=True,
               probe=True, seed=0) -> dict:
    """systems: as `coordinate_systems` yields; guesses (q,): the trained reader's predictions."""
    g = generator("shuffle", seed)
    classes = int(max(bank_labels.max(), labels.max())) + 1
    shuffled = bank_labels[torch.randperm(len(bank_labels), generator=g).to(labels.device)]
    order = torch.randperm(len(bank_labels), generator=g).to(labels.device)
    right, rows, geometry, by_bank = (guesses == labels).double(), [], {}, {}
    for name, bank, x in tqdm(systems, "clustering", leave=False, disable=None):
        found = measure(bank, bank_labels, x, labels, probe and name not in UNPROBED)
        row = {"coordinate": name} | report_row(found, labels)
        chance = vote(shuffled[found["neighbors"]], classes)
        rows.append(row | {"knn10_shuffled": accuracy(chance, labels)})
        if name not in NO_GEOMETRY:
            for key, title in GEOMETRY.items():
                geometry[f"{title} on {name}"] = (found[key] == labels).double()
        if name == "phi - theta":
            for n in (len(bank) // 4, len(bank) // 2):     # would a larger bank help?
                part, its_labels = bank[order[:n]], bank_labels[order[:n]]
                near = nearest(part, x, min(10, n))
                by_bank[str(n)] = accuracy(vote(its_labels[near], classes), labels)
            by_bank[str(len(bank))], weights_purity = row["knn10"], row["purity"]
    best, choices = crossed(torch.stack(list(geometry.values()), 1), seed)
    result = {"rows": rows, "reader": float(right.mean()), "bank": len(bank_labels),
              "reader_interval": wilson(int(right.sum()), len(right)), "whole_bank": whole_bank,
              "test": len(labels), "classes": classes, "knn10_by_bank": by_bank,
              "best": [list(geometry)[c] for c in choices], "best_accuracy": float(best.mean()),
              "gap": paired_bootstrap(right, best), "purity": weights_purity}
    return result | {"verdict": claims.clustering_verdict(result)}


def clustering_table(result: dict) -> str:
    keys = {"1-NN %": "knn1", "10-NN %": "knn10", "mean %": "nearest_mean", "probe %": "probe",
            "shuffl. %": "knn10_shuffled", "purity": "purity", "silh.": "silhouette",
            "Fisher": "fisher"}
    rows = [[row["coordinate"], *(cell(row, key) for key in keys.values())]
            for row in result["rows"]]
    rows.append(["trained reader", "", percent(result["reader"])])
    curve = ", ".join(f"{n}: {percent(a)}%" for n, a in result["knn10_by_bank"].items())
    return (table(["coordinate", *keys], rows) + f"\nbank {result['bank']}, test {result['test']} "
            "images; shuffl.: 10-NN, the bank's labels shuffled\n"
            f"10-NN on phi - theta by bank size: {curve}")


# ---- Token flow (claim C2) -----------------------------------------------------------------------
#
# Where in the reader do classes come apart? The same measures after the input map and after every
# sub-block of the residual stream, in two views: the mean over tokens, and, where memory allows,
# all tokens flattened. Against them stand a reader with initial parameters, whose random features
# cluster a little too, and a bank that the trained reader never saw, since states of training
# images may cluster only because their labels were fitted. The head applied to earlier states is
# the logit lens (nostalgebraist 2020). AUROC: does the purity of a test image's neighbours tell
# whether the reader gets it right? Then each sub-block is knocked out, alone or with all later
# ones of its kind.
#
# C2 expects that the second half of the blocks has more than half of the rise of 10-NN over the
# untrained reader's. The first attention may as well do most of it.

class NearestSoFar:
    """The k nearest rows of a bank that comes block by block: of all tokens flattened, all at once
    would be too large."""

    def __init__(self, queries: Tensor, k: int = 10):
        self.mean = queries.mean(0)
        self.queries, self.seen = queries - self.mean, 0
        self.squares = self.queries.square().sum(1, keepdim=True)
        self.distance = queries.new_full((len(queries), k), math.inf)      # squared
        self.index = torch.zeros(len(queries), k, dtype=torch.long, device=queries.device)

    def update(self, block: Tensor):
        x = block - self.mean
        d = torch.addmm(self.squares + x.square().sum(1), self.queries, x.T, alpha=-2)
        index = torch.arange(self.seen, self.seen + len(x), device=x.device).expand(len(d), -1)
        distance, index = torch.cat([self.distance, d], 1), torch.cat([self.index, index], 1)
        self.distance, order = distance.topk(self.index.shape[1], largest=False)
        self.index, self.seen = index.gather(1, order), self.seen + len(x)


class Walk(NamedTuple):
    """What one pass of bank and queries through a reader leaves, by stage."""
    logits: Tensor                     # (q, classes)
    bank: dict[str, Tensor]            # (n, width) mean over tokens
    queries: dict[str, Tensor]         # (q, width) mean over tokens
    flattened: dict[str, dict]         # all tokens: nearest bank rows (q, 10), purity (q,)


@torch.no_grad()
def walk(trace, bank: Fitted, queries: Fitted, flattened: bool) -> Walk:
    logits, states, pooled, near = [], {}, {}, {}
    for x in queries.tokens.split(BLOCK):
        output, named = trace(x)
        logits.append(output)
        for name, state in [("input tokens", x), *named]:
            states.setdefault(name, []).append(state.flatten(1) if flattened else state.mean(1))
    states = {name: torch.cat(blocks) for name, blocks in states.items()}
    if flattened:
        near = {name: NearestSoFar(x) for name, x in states.items()}
    for x in tqdm(bank.tokens.split(BLOCK), "token flow", leave=False, disable=None):
        for name, state in [("input tokens", x), *trace(x)[1]]:
            pooled.setdefault(name, []).append(state.mean(1))
            if flattened:
                near[name].update(state.flatten(1))
    pooled = {name: torch.cat(blocks) for name, blocks in pooled.items()}
    found = {name: {"neighbors": search.index, "purity": purity(states[name], queries.labels)}
             for name, search in near.items()}
    if flattened:
        states = {name: x.unflatten(1, (-1, pooled[name].shape[1])).mean(1)
                  for name, x in states.items()}
    return Walk(torch.cat(logits), pooled, states, found)


def stage_row(walked: Walk, stage: str, bank_labels, labels, probe: bool) -> tuple[dict, dict]:
    """One stage's figures for a report's row, and its measures on the mean token."""
    found = measure(walked.bank[stage], bank_labels, walked.queries[stage], labels, probe)
    row = {f"pooled_{key}": accuracy(found[key], labels)
           for key in ("knn10", "knn1", "probe") if key in found}
    row["pooled_purity"] = float(found["purity"].mean())
    if stage in walked.flattened:
        neighbors = bank_labels[walked.flattened[stage]["neighbors"]]      # (q, 10)
        classes = int(max(bank_labels.max(), labels.max())) + 1
        row |= {"flattened_knn10": accuracy(vote(neighbors, classes), labels),
                "flattened_knn1": accuracy(neighbors[:, 0], labels),
                "flattened_purity": float(walked.flattened[stage]["purity"].mean())}
    return row, found


def unseen_bank(walked: Walk, bank_labels: Tensor, labels: Tensor) -> tuple[int, dict]:
    """10-NN on the mean token of one half of the queries, against the other half, which the reader
    never saw, and against as many training images: their number, {stage: figures}."""
    half = sample(labels, len(labels) // 2)
    rest = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    rest[half] = False
    seen, found = sample(bank_labels, len(half)), {}
    for stage, x in walked.queries.items():
        banks = {"seen": (walked.bank[stage][seen], bank_labels[seen]),
                 "unseen": (x[half], labels[half])}
        found[stage] = {}
        for name, (bank, its_labels) in banks.items():
            guesses = knn_predict(bank, its_labels, x[rest])
            found[stage][f"{name}_knn10"] = accuracy(guesses, labels[rest])
    return len(half), found


def token_flow(trace, untrained, bank: Fitted, queries: Fitted, head=None, flattened=True,
               probe=True, seed=0) -> dict:
    """trace, untrained: tokens -> logits, [(stage, state), ...] of the trained reader and of one
    with initial parameters, or None; head: the reader's last layer, or None."""
    labels, rows, knn10 = queries.labels, [], {}
    walked = walk(trace, bank, queries, flattened)
    null = walk(untrained, bank, queries, flattened) if untrained else None
    half, unseen = unseen_bank(walked, bank.labels, labels)
    right = walked.logits.argmax(1) == labels
    for stage, x in walked.queries.items():
        row, found = stage_row(walked, stage, bank.labels, labels, probe)
        knn10[stage] = [found["knn10"] == labels]
        if null:
            null_row, null_found = stage_row(null, stage, bank.labels, labels, probe)
            row |= {f"untrained_{key}": value for key, value in null_row.items()}
            knn10[stage].append(null_found["knn10"] == labels)
        row |= {"stage": stage, "auroc": auroc(found["purity"], right, seed), **unseen[stage]}
        row["logit_lens"] = None
        if head is not None and stage != "input tokens":
            row["logit_lens"] = accuracy(head(x).argmax(1), labels)
        rows.append(row)
    result = {"rows": rows, "views": ["pooled"] + ["flattened"] * bool(walked.flattened),
              "reader": float(right.double().mean()), "bank": len(bank.labels), "half": half,
              "test": len(labels), "classes": int(labels.max()) + 1}
    return result | (rise(knn10, seed) if null else {"verdict": "not measured"})


def rise(knn10: dict[str, list[Tensor]], seed: int) -> dict:
    """Of 10-NN on the mean token over the untrained reader's, from the input map to the last stage,
    and what the second half of the blocks has of it, less half. knn10: {stage: which queries are
    read right (q,), by the trained reader's states and by the untrained one's}."""
    stages = list(knn10)
    shown = (stages[1], stages[len(stages) // 2], stages[-1])
    gains = torch.stack([knn10[s][0].double() - knn10[s][1].double() for s in shown], 1)   # (q, 3)

    def whole_rise(m):
        return m[..., 2] - m[..., 0]

    def late_less_half(m):
        return m[..., 2] - m[..., 1] - whole_rise(m) / 2

    result = {"rise": bootstrap(gains, whole_rise, seed), "middle": shown[1],
              "late_minus_half": bootstrap(gains, late_less_half, seed)}
    return result | {"verdict": claims.flow_verdict(result)}


def flow_table(result: dict) -> str:
    keys = {"10-NN %": "pooled_knn10", "probe %": "pooled_probe", "lens %": "logit_lens",
            "purity": "pooled_purity", "all NN %": "flattened_knn10",
            "all pur.": "flattened_purity", "null NN %": "untrained_pooled_knn10",
            "null pur.": "untrained_pooled_purity"}
    rows = []
    for row in result["rows"]:
        auroc_ = f"{row['auroc'][0]:.2f}" if row["auroc"] else ""
        rows.append([row["stage"], *(cell(row, key) for key in keys.values()), auroc_])
    last = result["rows"][-1]
    return (table(["stage", *keys, "AUROC"], rows) + "\nof the mean over tokens; all: all tokens "
            "flattened; null: untrained reader, mean token; lens: the head applied early; AUROC: "
            f"does purity tell right from wrong; bank {result['bank']}, test {result['test']} "
            f"images\nlast stage, 10-NN with a bank of {result['half']}: training images "
            f"{percent(last['seen_knn10'])}%, never seen {percent(last['unseen_knn10'])}%")


# Knock-outs

def fixed_map(attention, weights: Tensor):
    """Attention with a fixed map (heads, T, T) in place of its own."""
    def forward(x):
        v = weights @ attention.heads(x)[2]                        # (N, heads, T, head_dim)
        return attention.layer_scale * attention.out(v.transpose(1, 2).flatten(2))
    return forward


def fixed_output(output: Tensor):
    """The same output (T, width) for every image."""
    return lambda x: output


def attention_map(attention, x: Tensor) -> Tensor:
    """The attention weights (N, heads, T, T) at x (N, T, width)."""
    q, k, _ = attention.heads(x)
    return (q @ k.mT / math.sqrt(attention.head_dim)).softmax(-1)


@torch.no_grad()
def substitutes(reader, tokens: Tensor, seed: int) -> dict[str, dict]:
    """{what it is: {number of a sub-block: what takes its place}}, from reference tokens: means
    over all of them, attention maps over 512."""
    blocks = reader.blocks
    means, maps = [0.0] * len(blocks), [0.0] * len(blocks)
    drawn = torch.randperm(len(tokens), generator=generator("maps", seed))[:512].sort().values
    for part in tokens.split(64):
        states = [x for _, x in reader.trace(part)[1]]
        for b, block in enumerate(blocks):
            means[b] = means[b] + block(states[b]).sum(0) / len(tokens)            # (T, width)
    for part in tokens[drawn.to(tokens.device)].split(64):
        states = [x for _, x in reader.trace(part)[1]]
        for b in range(0, len(blocks), 2):
            maps[b] = maps[b] + attention_map(blocks[b], states[b]).sum(0) / len(drawn)
    attention, mlp = range(0, len(blocks), 2), range(1, len(blocks), 2)
    itself = torch.eye(tokens.shape[1], device=tokens.device)      # each token attends to itself
    return {"attention: its mean": {b: fixed_output(means[b]) for b in attention},
            "attention: nothing": {b: fixed_output(0 * means[b]) for b in attention},
            "attention: to itself": {b: fixed_map(blocks[b], itself) for b in attention},
            "attention: mean map": {b: fixed_map(blocks[b], maps[b]) for b in attention},
            "MLP: its mean": {b: fixed_output(means[b]) for b in mlp}}


@torch.no_grad()
def knock_outs(reader, tokens: Tensor, labels: Tensor, reference: Tensor, seed=0) -> list[dict]:
    """Loss of the reader's accuracy with one sub-block replaced, alone or with all later ones of
    its kind."""
    cases = []                         # (name, first sub-block, span, {sub-block: substitute})
    for name, found in substitutes(reader, reference, seed).items():
        for b in found:
            later = {at: module for at, module in found.items() if at >= b}
            cases += [(name, b, "alone", {b: found[b]}), (name, b, "from here on", later)]

    right = torch.zeros(len(cases) + 1, len(tokens), dtype=torch.float64)
    blocks = torch.arange(len(tokens)).split(BLOCK)
    for rows in tqdm(blocks, "knock-outs", leave=False, disable=None):
        logits, states = reader.trace(tokens[rows])
        right[-1, rows] = (logits.argmax(1) == labels[rows]).double().cpu()
        for i, (_, first, _, replaced) in enumerate(cases):
            x = states[first][1]                                   # all before it is as it was
            for b in range(first, len(reader.blocks)):
                x = x + replaced.get(b, reader.blocks[b])(x)
            guesses = reader.conclude(x, tokens[rows]).argmax(1)
            right[i, rows] = (guesses == labels[rows]).double().cpu()
    return [{"replaced": name, "block": b // 2 + 1, "span": where,
             "loss": paired_bootstrap(right[-1], right[i], seed)}
            for i, (name, b, where, _) in enumerate(cases)]


def knock_out_table(found: list[dict]) -> str:
    blocks = sorted({row["block"] for row in found})
    losses = {(row["replaced"], row["span"], row["block"]): row["loss"][0] for row in found}
    rows = [[f"{name}, {where}", *(f"{100 * losses[name, where, b]:+.1f}" for b in blocks)]
            for name, where in dict.fromkeys((row["replaced"], row["span"]) for row in found)]
    return table(["loss of accuracy, points; block", *map(str, blocks)], rows)


# ---- Bias route (claim C3) -----------------------------------------------------------------------
#
# Is the bias column of the tokens a route of its own? It is replaced in every token: by nothing, by
# its mean, by another image's, entry by entry by other images' (the same marginal distribution), by
# Gaussian noise of its mean and variance, by its negative, by an image's of the same or of another
# class; it is kept alone; and it is cut to its first principal components. Against that stand other
# parts of a token, exchanged between the same images: the column of highest energy, the most
# constant one, the leading direction, random sets of columns with at least the bias column's
# energy before or after the input map, and 64 single columns one by one. Every loss is of the
# reader's accuracy on the same test images.
#
# C3 holds if exchanging the bias column costs more than exchanging the strongest control (chosen on
# one half of the images, measured on the other). Any control may turn out the stronger.
#
# A part is the span of orthonormal columns U (D, m); columns of the identity are a token's columns.

RANKS = (1, 2, 4, 8)


def put(x: Tensor, values: Tensor, U: Tensor) -> Tensor:
    """Tokens x (b, T, D) with the part's values (b, T, m), or (T, m) for all, put in."""
    return x + (values - x @ U) @ U.mT


def covariance(tokens: Tensor) -> Tensor:
    """Of token features over images, summed over tokens (D, D), float64. Its trace over a set of
    columns is the set's energy."""
    x = (tokens - tokens.mean(0)).flatten(0, 1)
    return sum((part.mT @ part).double() for part in x.split(1 << 16)) / len(tokens)


def energy(C: Tensor, U: Tensor, W: Tensor) -> float:
    """Of the part U (D, m) after the map W (r, D): the trace of W U U^T C U U^T W^T."""
    return float(((U.T @ C @ U) * ((W @ U).T @ (W @ U))).sum())


def input_maps(C: Tensor, embed: Tensor | None) -> dict[str, Tensor]:
    """Where energy is compared: before the reader's input map, and after it where there is one."""
    maps = {"before": torch.eye(len(C), dtype=C.dtype, device=C.device)}
    return maps if embed is None else maps | {"after": embed.double()}


def random_columns(C: Tensor, W: Tensor, bias: Tensor, *key) -> Tensor:
    """A random set of columns (D, m), the bias column not among them, in which the last one drawn
    brings the energy after W to the bias column's or above."""
    columns = torch.nonzero(bias[:, 0] == 0).flatten().cpu()
    order = columns[torch.randperm(len(columns), generator=generator("columns", *key))].to(C.device)
    D = (C * (W.T @ W))[order][:, order]       # a set's energy is the sum of this over it
    sums = D.cumsum(0).cumsum(1).diagonal()    # of the first 1, 2, ... columns of the order
    enough = torch.nonzero(sums >= energy(C, bias.double(), W)).flatten()
    count = int(enough[0]) + 1 if len(enough) else len(order)
    return torch.eye(len(C), dtype=bias.dtype, device=C.device)[:, order[:count]]


def controls(tokens: Tensor, parts: dict[str, Tensor], embed: Tensor | None = None, seed=0,
             repeats=5) -> dict[str, list[Tensor]]:
    """The bias column and what it is compared with: {name: its bases U}, `repeats` of those that
    are drawn. tokens (n, T, D): training images'; embed (width, D): weight of the input map."""
    bias, C = parts["bias column"], covariance(tokens)
    others = (bias[:, 0] == 0).nonzero().flatten()             # every column but the bias column
    eye = torch.eye(len(C), dtype=bias.dtype, device=bias.device)
    highest = others[C.diagonal()[others].argmax()]
    leading = torch.zeros(len(C), 1, dtype=bias.dtype, device=bias.device)
    leading[others, 0] = torch.linalg.eigh(C[others][:, others]).eigenvectors[:, -1].to(bias.dtype)
    named = {"bias column": [bias], "column of highest energy": [eye[:, highest][:, None]]}
    named |= {name: [U] for name, U in parts.items() if name != "bias column"}
    named["leading direction"] = [leading]
    for where, W in input_maps(C, embed).items():
        named[f"random columns, energy matched {where} the input map"] = [
            random_columns(C, W, bias, where, r, seed) for r in range(repeats)]
    return named


def energies(tokens: Tensor, parts: dict[str, list[Tensor]], embed=None) -> dict[str, list[float]]:
    """Each part's energy over the bias column's, before the input map and after it."""
    C, found = covariance(tokens), {name: [] for name in parts}
    for W in input_maps(C, embed).values():
        every = {name: sum(energy(C, U.double(), W) for U in bases) / len(bases)
                 for name, bases in parts.items()}
        bias, whole = every["bias column"], float((C * (W.T @ W)).sum())
        for name in parts:
            found[name].append(every[name] / bias if bias > 1e-12 * whole else None)
    return found


def donors(labels: Tensor, kind: str, *key) -> Tensor:
    """Another image for each, at random (q,): "any" (a permutation without fixed points), one of
    the "same" class (the same; an image alone in its class keeps its own), or one of an "other"."""
    g, result = generator("donors", kind, *key), torch.arange(len(labels))
    labels = labels.cpu()
    for c in [None] if kind == "any" else labels.unique():
        of_class = labels == c if c is not None else torch.ones(len(labels), dtype=torch.bool)
        rows, others = of_class.nonzero().flatten(), (~of_class).nonzero().flatten()
        order = rows[torch.randperm(len(rows), generator=g)]
        if kind != "other":
            result[order] = order.roll(1)                      # one cycle
        elif len(others):
            result[rows] = others[torch.randint(len(others), (len(rows),), generator=g)]
    return result


@torch.no_grad()
def predict(read, tokens: Tensor, change=None, rows: Tensor | None = None) -> Tensor:
    """Predictions on the CPU for tokens[rows] as change(tokens, their rows) makes them."""
    rows = torch.arange(len(tokens)) if rows is None else rows

    def guess(r):
        r = r.to(tokens.device)
        return read(change(tokens[r], r) if change else tokens[r]).argmax(-1).cpu()
    return by_blocks(guess, rows)


# Changes: each makes a function (tokens (b, T, D), their rows (b,)) -> tokens.

def exchanged(tokens: Tensor, U: Tensor, order: Tensor):
    """The part from the images that `order` (q,) names."""
    order = order.to(tokens.device)
    return lambda x, rows: put(x, tokens[order[rows]] @ U, U)


def replaced(values: Tensor, U: Tensor):
    """The part's values (q, T, m)."""
    return lambda x, rows: put(x, values[rows], U)


def constant(values: Tensor, U: Tensor):
    """The same values (T, m) for all images."""
    return lambda x, rows: put(x, values, U)


def cut(components: tuple, rank: int, U: Tensor):
    """The part's values, flattened, cut to their first principal components."""
    mean, P = components[0], components[1][:, :rank]

    def change(x, rows):
        v = (x @ U).flatten(1) - mean
        return put(x, (mean + v @ P @ P.mT).view(len(x), -1, U.shape[1]), U)
    return change


class Losses:
    """The loss of accuracy that each change makes, image by image, and a report's rows of them."""

    def __init__(self, read, tokens: Tensor, labels: Tensor, seed: int):
        self.read, self.tokens, self.labels, self.seed = read, tokens, labels.cpu(), seed
        self.guesses = predict(read, tokens)
        self.right = (self.guesses == self.labels).double()
        self.rows, self.values = [], {}            # values: (group, name): (q, repeats), NaN unseen
        self.bar = tqdm(desc="bias route", leave=False, disable=None)

    def run(self, group: str, name: str, changes: list, images=None, **more) -> list[Tensor]:
        """The mean over changes; images: on those only. Returns their predictions."""
        at = torch.arange(len(self.labels)) if images is None else images.cpu()
        guesses = []
        for change in changes:
            guesses.append(predict(self.read, self.tokens, change, at))
            self.bar.update()
        hits = torch.stack([(guess == self.labels[at]).double() for guess in guesses], 1)
        loss = self.right[at, None] - hits                                 # (images, repeats)
        shape = len(self.labels), len(changes)
        self.values[group, name] = torch.full(shape, math.nan, dtype=torch.float64)
        self.values[group, name][at] = loss
        sd = float(loss.mean(0).std()) if len(changes) > 1 else None
        self.rows.append({"group": group, "name": name, "accuracy": float(hits.mean()), "sd": sd,
                          "loss": bootstrap(loss, over_repeats(self.seed), self.seed),
                          "repeats": len(changes), "images": len(at), **more})
        return guesses

    def margin(self, names: list) -> tuple:
        """The loss with the bias column exchanged less the strongest of names', and which."""
        bias = self.values["replaced", "another image's"]
        repeats = bias.shape[1]
        every = torch.stack([self.values[key].expand(-1, repeats) for key in names], 1)
        strongest, choices = crossed(every, self.seed)
        seen = ~strongest.isnan().any(1)
        interval = bootstrap((bias - strongest)[seen], over_repeats(self.seed), self.seed)
        return interval, [names[c][1] for c in choices]


def replace_bias(losses: Losses, bias: Tensor, reference: Tensor, seed: int, repeats: int) -> dict:
    """Every way to replace the bias column, and what of another class's it moves predictions to."""
    tokens, labels = losses.tokens, losses.labels
    own, known, mean = tokens @ bias, reference @ bias, reference.mean(0)  # (q, T, 1), (n, T, 1)
    center, deviation = known.mean(0), known.std(0, correction=0)
    marginal, noise = [], []
    for r in range(repeats):
        g = generator("marginal", r, seed)
        shuffled = [own[torch.randperm(len(own), generator=g).to(own.device), t]
                    for t in range(own.shape[1])]
        marginal.append(replaced(torch.stack(shuffled, 1), bias))
        draw = torch.randn(own.shape, generator=generator("normal", r, seed)).to(own)
        noise.append(replaced(center + deviation * draw, bias))

    def from_donors(kind):
        return [exchanged(tokens, bias, donors(labels, kind, r, seed)) for r in range(repeats)]

    losses.run("replaced", "zero", [constant(torch.zeros_like(center), bias)])
    losses.run("replaced", "its train mean", [constant(center, bias)])
    losses.run("replaced", "another image's", from_donors("any"))
    losses.run("replaced", "each entry another image's", marginal)
    losses.run("replaced", "Gaussian, same mean and variance", noise)
    losses.run("replaced", "its negative", [lambda x, rows: put(x, -(x @ bias), bias)])
    losses.run("replaced", "another image's of the same class", from_donors("same"))
    moved = losses.run("replaced", "an image's of another class", from_donors("other"))
    losses.run("kept", "only the bias column",
               [lambda x, rows: put(mean.expand_as(x), x @ bias, bias)])
    drawn_to = []
    for r, guess in enumerate(moved):
        theirs = labels[donors(labels, "other", r, seed)]
        drawn_to.append((guess == theirs).double() - (losses.guesses == theirs).double())
    return bootstrap(torch.stack(drawn_to).mean(0), seed=seed)


def bias_route(read, tokens: Tensor, labels: Tensor, reference: Tensor,
               parts: dict[str, list[Tensor]], seed=0, repeats=5, embed=None) -> dict:
    """tokens (q, T, D) of test images, reference (n, T, D) of training images; parts as from
    `controls`, embed the input map's weight. Random choices are repeated; a loss's interval is over
    images and repeats. Of drawn parts the low-rank controls take the first."""
    losses, bias = Losses(read, tokens, labels, seed), parts["bias column"][0]
    moved = replace_bias(losses, bias, reference, seed, repeats)

    components = principal((reference @ bias).flatten(1))
    variances = components[2]
    shares = (variances.cumsum(0) / variances.sum()).tolist()
    for r in [0] + [2 ** i for i in range(20) if 2 ** i <= len(variances)]:
        losses.run("rank", f"bias column, rank {r}", [cut(components, r, bias)], rank=r,
                   energy=shares[r - 1] if r else 0.0)

    over_bias = energies(reference, parts, embed)
    orders = [donors(labels, "any", r, seed) for r in range(repeats)]
    for name, bases in parts.items():
        if name == "bias column":
            continue
        swaps = [exchanged(tokens, bases[r % len(bases)], order) for r, order in enumerate(orders)]
        losses.run("control", name, swaps, energy_over_bias=over_bias[name],
                   columns=sum(U.shape[1] for U in bases) / len(bases))
        components = principal((reference @ bases[0]).flatten(1))
        for r in RANKS:
            if r <= min(len(components[2]), len(shares)):
                losses.run("low-rank control", f"{name}, rank {r}",
                           [cut(components, r, bases[0])], part=name, rank=r)
    singles = single_columns(losses, bias, orders[0])

    controls_ = [key for key in losses.values if key[0] in ("control", "single column")]
    matched = [key for key in controls_ if "matched" in key[1]]
    margin, strongest = losses.margin(controls_)
    losses.bar.close()
    rows = [row for row in losses.rows if row["group"] != "single column"]
    result = {"rows": rows, "reader": float(losses.right.mean()), "test": len(tokens),
              "classes": int(labels.max()) + 1, "reference": len(reference), "margin": margin,
              "permuted": next(r["loss"] for r in rows if r["name"] == "another image's"),
              "strongest": strongest, "margin_matched": losses.margin(matched)[0],
              "moved_to_donor": moved, "effective_rank": effective_rank(variances),
              "bias_entries": tokens.shape[1], "single_columns": singles}
    return result | {"verdict": claims.route_verdict(result)}


def single_columns(losses: Losses, bias: Tensor, order: Tensor) -> dict:
    """64 other columns, each exchanged alone, on at most 1,000 images."""
    images, eye = sample(losses.labels, 1000), torch.eye(len(bias)).to(bias)
    others = (bias[:, 0] == 0).nonzero().flatten().tolist()
    found = {}
    for i in torch.linspace(0, len(others) - 1, min(64, len(others))).round().long().tolist():
        j = others[i]
        exchange = exchanged(losses.tokens, eye[:, j:j + 1], order)
        losses.run("single column", f"column {j}", [exchange], images)
        found[str(j)] = losses.rows[-1]["loss"][0]
    of_bias = float(losses.values["replaced", "another image's"][images].mean())
    below = sum(loss < of_bias for loss in found.values())
    return {"images": len(images), "losses": found, "bias": of_bias,
            "bias_percentile": 100 * below / len(found)}


def bias_table(result: dict) -> str:
    titles = {"replaced": "bias column: ", "kept": "kept, all else at its mean: ",
              "rank": "", "control": "another image's "}
    rows = []
    for row in result["rows"]:
        if row["group"] in titles:
            name = titles[row["group"]] + row["name"].replace(", energy matched", ", matched")
            ratios = "/".join("-" if ratio is None else f"{ratio:.1f}"
                              for ratio in row.get("energy_over_bias", []))
            share = percent(row.get("energy"))
            rows.append([name, span(row["loss"], 100), str(row["repeats"]), ratios or share])
    single = result["single_columns"]
    losses = sorted(single["losses"].values())
    return (table(["loss of accuracy", "points [95%]", "n", "energy"], rows) + "\nn: repeats of "
            "random choices; energy: of a rank in % of the bias column's; of a control over the "
            f"bias column's, before/after the input map\n{len(losses)} single columns, another "
            f"image's ({single['images']} images): loss {100 * losses[0]:+.1f} to "
            f"{100 * losses[-1]:+.1f}; the bias column's {100 * single['bias']:+.1f}, above "
            f"{single['bias_percentile']:.0f}% of them")


# ---- Content: what the route carries -------------------------------------------------------------
#
# Two ways to ask. Regression: from a part's first principal components, how well can facts of the
# image be told (mean of a channel, contrast, coarse layout), fitted on training images and scored
# on test images; the controls' parts are asked the same. Causal mediation (Pearl 2001; Vig et al.
# 2020): give each image another's mean colour and fit it again, which costs the reader some
# accuracy (total effect); then put only one part of the new weights into the old tokens (indirect
# effect), or the old part back into the new ones (what it restores). A route that carries the
# colour would have most of the effect; that it tells the colour, by regression, does not say that
# the reader uses it.

def image_facts(images: Tensor) -> dict[str, Tensor]:
    """What a low-dimensional route might carry, of images (n, C, size, size): each (n,). Facts that
    an image below 4 pixels a side does not have are left out."""
    n, channels, size, _ = images.shape
    colours = {1: ["grey"], 3: ["red", "green", "blue"]}.get(
        channels, [f"channel {c + 1}" for c in range(channels)])
    facts = {f"mean {colour}": images[:, c].mean((1, 2)) for c, colour in enumerate(colours)}
    grey, edge, half = images.mean(1), size // 4, size // 2
    facts["contrast"] = grey.std((1, 2), correction=0)
    centre = torch.zeros(size, size, dtype=torch.bool, device=images.device)
    centre[edge:size - edge, edge:size - edge] = True
    facts["centre - surround"] = grey[:, centre].mean(1) - grey[:, ~centre].mean(1)
    left, right = grey[:, :, :half], grey[:, :, size - half:]
    facts["left - right"] = left.mean((1, 2)) - right.mean((1, 2))
    facts["top - bottom"] = grey[:, :half].mean((1, 2)) - grey[:, size - half:].mean((1, 2))
    place = (torch.arange(size, device=images.device) + 0.5) / size
    wave = torch.cos(math.pi * torch.arange(3, device=images.device)[:, None] * place).to(grey)
    for v, u in ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0)):                          # DCT-II
        values = torch.einsum("nyx,y,x->n", grey, wave[v], wave[u]) / size ** 2
        facts[f"cosine, {v} down {u} across"] = values
    return {name: values for name, values in facts.items() if not values.isnan().any()}


def mediation(read, fit, test: Fitted, parts: dict[str, list[Tensor]], kind: str, seed=0) -> dict:
    """By mean colour, with donors of the "other" or "same" class. Effects are losses of accuracy;
    shares are of the total effect, none where its interval holds 0. Pixels pushed out of [-1, 1]
    stay and are counted."""
    images, tokens, labels = test.images, test.tokens, test.labels.cpu()
    colour = images.mean((2, 3), keepdim=True)
    swapped = images + colour[donors(labels, kind, "colour", seed).to(images.device)] - colour
    changed = by_blocks(fit, swapped, f"fitting with the mean colour of {kind} class")
    right = (predict(read, tokens) == labels).double()
    after = (predict(read, changed) == labels).double()
    total = paired_bootstrap(right, after, seed)

    def ratio(means):
        return means[..., 0] / means[..., 1]

    def share(effect: Tensor):
        if total[1] > 0:
            return bootstrap(torch.stack([effect, right - after], 1), ratio, seed)

    result = {"donors": kind, "total": total, "accuracy": float(after.mean()),
              "outside": float((swapped.abs() > 1).double().mean()), "parts": {}}
    for name, bases in parts.items():
        put_in = [predict(read, tokens, replaced(changed @ U, U)) == labels for U in bases]
        put_back = [predict(read, changed, replaced(tokens @ U, U)) == labels for U in bases]
        indirect = torch.stack([right - hits.double() for hits in put_in])         # (repeats, q)
        restored = torch.stack([hits.double() - after for hits in put_back])
        result["parts"][name] = {
            "indirect": bootstrap(indirect.mean(0), seed=seed), "share": share(indirect.mean(0)),
            "restored": bootstrap(restored.mean(0), seed=seed), "repeats": len(bases),
            "share_restored": share(restored.mean(0)),
            "indirect_sd": float(indirect.mean(1).std()) if len(bases) > 1 else None}
    return result


def content(read, fit, test: Fitted, reference: Fitted, parts: dict[str, list[Tensor]],
            seed=0) -> dict:
    """parts as from `controls`; of drawn ones the regressions take the first."""
    known, asked = image_facts(reference.images), image_facts(test.images)
    y, y_test = (torch.stack(list(facts.values()), 1) for facts in (known, asked))
    regressions = {}
    for name, bases in parts.items():
        mean, components, variances = principal((reference.tokens @ bases[0]).flatten(1))
        x, x_test = (((each.tokens @ bases[0]).flatten(1) - mean) @ components
                     for each in (reference, test))
        to_facts = {}
        for r in sorted({min(r, x.shape[1]) for r in (*RANKS, 16)}):
            scores = regression(x[:, :r], y, x_test[:, :r], y_test, seed)
            to_facts[str(r)] = dict(zip(known, scores))
        scores = regression(y, x[:, :8], y_test, x_test[:, :8], seed) if x.shape[1] else []
        regressions[name] = {"to_facts": to_facts, "from_facts": scores,
                             "energy": (variances.cumsum(0) / variances.sum())[:16].tolist()}
    mediations = [mediation(read, fit, test, parts, kind, seed) for kind in ("other", "same")]
    return {"regressions": regressions, "mediation": mediations, "test": len(test.labels),
            "reference": len(reference.labels)}


def at_rank(regression_: dict, r: int) -> dict:
    """R^2 of each fact from r components, or from as many as there are."""
    return regression_["to_facts"].get(str(r)) or list(regression_["to_facts"].values())[-1]


def content_table(result: dict) -> str:
    columns = {claims.SHORT.get(name, name): at_rank(found, 4)
               for name, found in result["regressions"].items()}
    facts = list(next(iter(columns.values())))
    text = [table(["R2 from 4 components of", *columns],
                  [[fact, *("" if found[fact] is None else f"{found[fact][0]:.3f}"
                            for found in columns.values())] for fact in facts])]
    for m in result["mediation"]:
        rows = [["(total effect)", span(m["total"], 100)]]
        for name, part in m["parts"].items():
            rows.append([claims.SHORT.get(name, name), span(part["indirect"], 100),
                         span(part["share"], 1, 2), span(part["share_restored"], 1, 2)])
        titles = [f"mean colour of {m['donors']} class", "indirect, points", "share",
                  "share restored"]
        text.append(table(titles, rows)
                    + f"\n{percent(m['outside'])}% of the pixels beyond [-1, 1]")
    return "\n".join(text)


# ---- Command line --------------------------------------------------------------------------------

EXPERIMENT = {             # of each: its table, its figure, its file
    "clustering": (clustering_table, figures.clustering_figure, "clustering.png"),
    "token-flow": (flow_table, figures.flow_figure, "token_flow.png"),
    "bias-route": (bias_table, figures.bias_figure, "bias_route.png"),
    "content": (content_table, figures.content_figure, "content.png")}


def parser() -> Parser:
    p = Parser(prog="diagnostics.py", description=__doc__.split("\n\n")[0])
    p.add_argument("--ckpt", nargs="+", required=True, help="checkpoints; several are compared")
    p.add_argument("--only", nargs="+", choices=EXPERIMENT, default=list(EXPERIMENT),
                   help="experiments (default all)", metavar="EXPERIMENT")
    p.add_argument("--samples", type=whole(24), help="so many training images (default all)")
    p.add_argument("--repeats", type=whole(1), default=5, help="of each random choice (default 5)")
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
    bank = images
    if flags.samples and flags.samples > len(images):
        raise InputError(f"--samples {flags.samples}: {path} has {len(images)} training images")
    if flags.samples:
        bank = images.take(sample(images.labels, flags.samples))
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


def diagnose(path: str, flags, device, write) -> dict:
    """One checkpoint's report; write(report) is called after each experiment."""
    model, saved, args, images, test, whole = open_checkpoint(path, flags, device)
    bank = fit_all(model.fit, images, device, args.workers, "fitting the bank")
    queries = fit_all(model.fit, test, device, args.workers, "fitting the test images")
    logits = by_blocks(model.read, queries.tokens)
    if not torch.isfinite(logits).all():
        raise InputError(f"{path}: its fits or predictions are not finite")
    guesses, labels, reader = logits.argmax(-1), queries.labels, model.reader
    right, done, seed = int((guesses == labels).sum()), {}, flags.seed
    report = {"name": Path(path).stem, "checkpoint": path, "method": saved["method"],
              "command": command_line(argparse.Namespace(**saved["args"]),
                                      METHODS[saved["method"]]),
              "training": saved["args"], "data": args.dataset, "test": len(test),
              "bank": len(images), "unfinished": "progress" in saved,
              "evaluated_on": "held-out training images" if args.val else "test images",
              "reader": right / len(test), "reader_interval": wilson(right, len(test)),
              "left_out": left_out(model, flags.only), "experiments": done}
    if "clustering" in flags.only:
        systems = coordinate_systems(model, bank, queries)
        done["clustering"] = clustering(systems, bank.labels, labels, guesses, whole, seed=seed)
        write(report)
    if "token-flow" in flags.only:
        done["token-flow"] = flow_of(model, bank, queries, args.seed, device, seed)
        write(report)
    parts, reference = model.parts(), bank.take(sample(bank.labels, REFERENCE))
    bases = {name: [U] for name, U in parts.items()}
    if "bias column" in parts:
        embed = reader.embed.weight if reader is not None else None
        bases = controls(reference.tokens, parts, embed, seed, flags.repeats)
        if "bias-route" in flags.only:
            done["bias-route"] = bias_route(model.read, queries.tokens, labels, reference.tokens,
                                            bases, seed, flags.repeats, embed)
            write(report)
    if "content" in flags.only and parts:
        done["content"] = content(model.read, model.fit, queries, reference, bases, seed)
        write(report)
    return report


def flow_of(model, bank: Fitted, queries: Fitted, model_seed: int, device, seed: int) -> dict:
    """Token flow and knock-outs as far as the model has a reader."""
    logits, states = model.trace(queries.tokens[:1])
    room = sum(4 * x.numel() for _, x in states) * len(queries.labels) * 2
    flattened = room < free_memory(device) / 2
    if model.reader is None:
        return token_flow(model.trace, None, bank, queries, None, flattened, seed=seed)
    with seeded("reader", model_seed):
        untrained = type(model.reader)(*model.reader.arguments).to(device).requires_grad_(False)
    result = token_flow(model.trace, untrained.trace, bank, queries, model.reader.head, flattened,
                        seed=seed)
    known = bank.tokens[sample(bank.labels, REFERENCE)]
    result["knock_outs"] = knock_outs(model.reader, queries.tokens, queries.labels, known, seed)
    return result


def left_out(model, only) -> list[str]:
    """What this model has nothing for, a line each."""
    lines = []
    if getattr(model.reader, "takes_colour", False):
        lines.append("the branch for the mean colour: this is what the weights alone give")
    if model.reader is None and "token-flow" in only:
        lines.append("untrained reader, logit lens, knock-outs: this method has no Reader")
    if "bias column" not in model.parts() and "bias-route" in only:
        lines.append("bias route: this method's tokens have no bias column")
    if not model.parts() and "content" in only:
        lines.append("content: this method names no parts of a token")
    return lines


def present(folder: Path, model: dict) -> str:
    """Draws a report's figures; returns its tables and what they say."""
    text = []
    for name, (to_text, figure, file) in EXPERIMENT.items():
        (folder / file).unlink(missing_ok=True)                # an earlier report's
        if name in model["experiments"]:
            result = model["experiments"][name]
            figure(folder / file, result)
            text.append(to_text(result))
            if "knock_outs" in result:
                text.append(knock_out_table(result["knock_outs"]))
    (folder / "summary.png").unlink(missing_ok=True)
    figures.summary_figure(folder / "summary.png", model)
    text += [f"left out: {line}" for line in model["left_out"]]
    return claims.fold("\n\n".join([*text, "\n".join(model["summary"])]))


def save(path: Path, report: dict):
    """Whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


def make_folders(out: Path, paths: list[str]) -> list[Path]:
    """Where each checkpoint's report goes. InputError: a folder that cannot be made."""
    names = [Path(path).stem for path in paths]
    found = [out]
    if len(paths) > 1:
        found = [out / (name if names.count(name) == 1 else f"{name}-{i + 1}")
                 for i, name in enumerate(names)]
    try:
        for folder in [out, *found]:
            folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: no folder that can be made: {error.strerror}") from error
    return found


def run(argv: list[str] | None):
    flags = parser().parse_args(argv)
    device, seen, models = find_device(flags.device), {}, []
    for path in flags.ckpt:                    # all of them before any work
        same = seen.setdefault(claims.run_of(open_checkpoint(path, flags, device).saved), path)
        if same != path or flags.ckpt.count(path) > 1:
            raise InputError(f"--ckpt: {same} and {path} are the same run")
    out = Path(flags.out or str(Path(flags.ckpt[0]).with_suffix("")) + "-diagnostics")
    command = ["python", "diagnostics.py", *(sys.argv[1:] if argv is None else argv)]
    about = environment(device) | {"command": shlex.join(command), "flags": vars(flags)}
    for path, folder in zip(flags.ckpt, make_folders(out, flags.ckpt)):
        def write(report: dict):
            save(folder / "report.json", about | {"model": report})

        model = diagnose(path, flags, device, write)
        model["summary"] = claims.summary(model)
        write(model)
        print(f"== {path}\n\n{present(folder, model)}\nwrote {folder}/report.json and figures\n",
              flush=True)
        models.append(model)
    if len(models) > 1:
        result = claims.across(claims.points(models), flags.seed)
        save(out / "report.json", about | {"across": result})
        figures.models_figure(out / "models.png", result)
        print(claims.across_table(result) + f"\nwrote {out}/report.json and models.png")


def main(argv: list[str] | None = None):
    with exits("diagnostics.py"):
        run(argv)


if __name__ == "__main__":
    main()
