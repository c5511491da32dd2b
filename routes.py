"""What does a part of the weights do? Exchange it between images, and see what the reader loses.

    bias_route(model.read, tokens, labels, reference, model.parts())       # a report (a dict)
    print(bias_table(report))

Two experiments of diagnostics.py, each a section: is the bias column of the tokens a route of its
own (claim C3), and what does that route carry. A section begins with its method, in words, and ends
with its table.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import claims
from checkpoint import generator
from claims import percent, span, table
from data import stratified_sample
from measures import (bootstrap, chance, crossed, effective_rank, over_repeats, paired_bootstrap,
                      principal, regression)

BLOCK = 256                # images that go through a model at once


@torch.no_grad()
def by_blocks(f, x: Tensor) -> Tensor:
    """f(x) (n, ...), a block of rows at a time."""
    return torch.cat([f(block) for block in x.split(BLOCK)])


# ---- Bias route (claim C3) -----------------------------------------------------------------------
#
# Is the bias column of the tokens a route of its own? It is replaced in every token: by nothing, by
# its mean, by another image's, entry by entry by other images' (the same marginal distribution), by
# Gaussian noise of its mean and variance, by its negative, by an image's of the same or of another
# class; it is kept alone; and it is cut to its first principal components. Every loss is of the
# reader's accuracy on the same test images.
#
# Any part of a token that is exchanged between images costs something, a large part more than a
# small one. So two controls have the bias column's size, the mean squared change that the exchange
# makes after the reader's input map, within 10%: random sets of other columns; and, since the bias
# column is coherent, of a low rank r over all its entries, r consecutive principal components of
# all other entries. Donors are the same for every part. C3 is supported if exchanging the bias
# column costs more than 2 points more than either control, refuted if it costs less than one of
# them; fewer than ten sets decide nothing (claims.route_verdict). Where no r components have its
# size, the next larger ones stand in: they can support C3, not refute it.
#
# Other routes stand beside them, none of them a control, whatever their size: the leading
# direction, the column of highest energy, the most expensive of 64 single columns.
#
# A part is a projection of tokens (b, T, D) -> (b, T, D).

SETS, WINDOWS = 15, 5      # controls of either kind, at most


def columns(U: Tensor):
    """The part spanned by orthonormal U (D, m) in each token."""
    return lambda x: x @ U @ U.mT


def components(P: Tensor):
    """The part spanned by orthonormal P (T * D, r) in all tokens flattened."""
    return lambda x: (x.flatten(1) @ P @ P.mT).view_as(x)


def covariance(tokens: Tensor) -> Tensor:
    """Of token features over images, summed over tokens (D, D), float64. Its trace over a set of
    columns is the set's energy."""
    x = (tokens - tokens.mean(0)).flatten(0, 1)
    return sum((part.mT @ part).double() for part in x.split(1 << 16)) / len(tokens)


def exchange_sizes(tokens: Tensor, embed: Tensor | None) -> Tensor:
    """A matrix (D, D) whose sum over the rows and columns of a set is half the mean squared change
    that exchanging these columns makes after the input map, weight embed (width, D)."""
    C = covariance(tokens)
    W = torch.eye(len(C), dtype=C.dtype, device=C.device) if embed is None else embed.double()
    return C * (W.T @ W)


def matched_sets(M: Tensor, size: float, allowed: Tensor, count: int, seed=0) -> list[tuple]:
    """At most `count` distinct sets of the allowed columns whose sum over M is within 10% of size,
    at random: of all sets of one to three (of 160 columns), and where these are too few, larger
    ones."""
    g, found, M = generator("sets", seed), [], M.cpu()
    allowed = allowed.cpu()[torch.randperm(len(allowed), generator=g)]
    for m in (1, 2, 3):
        sets = torch.combinations(allowed[:160], m)                        # (s, m)
        sums = M[sets[:, :, None], sets[:, None, :]].sum((1, 2))
        found += [tuple(sorted(s)) for s in sets[(sums / size - 1).abs() < 0.1].tolist()]
    chosen = [found[i] for i in torch.randperm(len(found), generator=g)[:count].tolist()]
    for _ in range(5 * count):
        larger = grown_set(M, size, allowed, g) if len(chosen) < count else None
        if larger and larger not in chosen:
            chosen.append(larger)
    return chosen


def grown_set(M: Tensor, size: float, allowed: Tensor, g) -> tuple | None:
    """Random columns up to `size`, then exchanged one by one until the size fits; None if it never
    does."""
    order = allowed[torch.randperm(len(allowed), generator=g)]
    sums = M[order][:, order].cumsum(0).cumsum(1).diagonal()   # of the first 1, 2, ... columns
    count = int((sums < size).sum()) + 1
    if count >= len(order):
        return None
    for _ in range(500):
        inside = order[:count]
        off = abs(float(M[inside][:, inside].sum()) / size - 1)
        if off < 0.1:
            return tuple(sorted(inside.tolist()))
        i, j = int(torch.randint(count, (), generator=g)), count + int(
            torch.randint(len(order) - count, (), generator=g))
        other = order.clone()
        other[i], other[j] = order[j], order[i]
        if abs(float(M[other[:count]][:, other[:count]].sum()) / size - 1) < off:
            order = other
    return None


def matched_components(tokens: Tensor, bias: Tensor, r: int, size: float, embed) -> tuple:
    """Bases (T * D, r), and their mean size over the bias column's: r consecutive principal
    components of all entries but the bias column's, of its size, as `exchange_sizes` has it, within
    10%; at most WINDOWS of all there are. Where none fits, the smallest that is larger."""
    rest = tokens - columns(bias)(tokens)
    _, P, variances = principal(rest.flatten(1))                           # (T * D, n)
    directions = P.T.unflatten(1, tokens.shape[1:])                        # (n, T, D)
    if embed is not None:
        directions = by_blocks(lambda block: block @ embed.T, directions)
    each = variances * directions.double().square().sum((1, 2))            # (n,)
    sums = F.pad(each.cumsum(0), (1, 0))
    ratios = (sums[r:] - sums[:-r]) / size                                 # of each window
    starts = ((ratios - 1).abs() < 0.1).nonzero().flatten()
    if not len(starts):
        starts = (ratios >= 1).nonzero().flatten()[-1:]
    picked = torch.linspace(0, len(starts) - 1, min(WINDOWS, len(starts))).round().long()
    found = starts[picked.to(starts.device)]
    ratio = float(ratios[found].mean()) if len(found) else None
    return [P[:, i:i + r] for i in found.tolist()], ratio


def other_routes(tokens: Tensor, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bases (D, 1): the leading direction and the column of highest energy, the bias column apart,
    and what else the model names."""
    bias, C = parts["bias column"], covariance(tokens)
    others = (bias[:, 0] == 0).nonzero().flatten()
    leading = torch.zeros_like(bias)
    leading[others, 0] = torch.linalg.eigh(C[others][:, others]).eigenvectors[:, -1].to(bias.dtype)
    highest = torch.zeros_like(bias)
    highest[others[C.diagonal()[others].argmax()]] = 1
    named = {name: U for name, U in parts.items() if name != "bias column"}
    return {"leading direction": leading, "column of highest energy": highest, **named}


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


# A change is a function (tokens (b, T, D), their rows (b,)) -> tokens.

def exchanged(part, tokens: Tensor, order: Tensor):
    """The part from the images that `order` (q,) names."""
    order = order.to(tokens.device)
    return lambda x, rows: x + part(tokens[order[rows]] - x)


def toward(part, target):
    """The part from `target`: tokens (T, D), the same for all images, or a function of rows."""
    if callable(target):
        return lambda x, rows: x + part(target(rows) - x)
    return lambda x, rows: x + part(target - x)


class Losses:
    """The loss of accuracy that each change makes, image by image, and a report's rows of them."""

    def __init__(self, read, tokens: Tensor, labels: Tensor, seed: int):
        self.read, self.tokens, self.labels, self.seed = read, tokens, labels.cpu(), seed
        self.guesses = predict(read, tokens)
        self.right = (self.guesses == self.labels).double()
        self.rows = []
        self.bar = tqdm(desc="bias route", leave=False, disable=None)

    def of(self, change, images: Tensor | None = None) -> Tensor:
        """Loss (q,) of one change; images: on those rows only."""
        rows = torch.arange(len(self.labels)) if images is None else images.cpu()
        guess = predict(self.read, self.tokens, change, rows)
        self.bar.update()
        return self.right[rows] - (guess == self.labels[rows]).double()

    def add(self, group: str, name: str, changes: list, **more) -> Tensor:
        """A report's row: the mean over changes; the interval is over images and changes. Returns
        the losses (q, changes)."""
        loss = torch.stack([self.of(change) for change in changes], 1)
        sd = float(loss.mean(0).std()) if len(changes) > 1 else None
        self.rows.append({"group": group, "name": name, "sd": sd, "repeats": len(changes),
                          "accuracy": float((self.right[:, None] - loss).mean()),
                          "loss": bootstrap(loss, over_repeats(self.seed), self.seed), **more})
        return loss


def replace_bias(losses: Losses, bias: Tensor, reference: Tensor, seed: int, repeats: int):
    """Every way to replace the bias column but by another image's, which `bias_route` does."""
    tokens, labels, part = losses.tokens, losses.labels, columns(bias)
    own, known, mean = tokens @ bias, reference @ bias, reference.mean(0)  # (q, T, 1), (n, T, 1)
    center, deviation = known.mean(0), known.std(0, correction=0)
    marginal, noise = [], []
    for r in range(repeats):
        g = generator("marginal", r, seed)
        shuffled = torch.stack([own[torch.randperm(len(own), generator=g).to(own.device), t]
                                for t in range(own.shape[1])], 1)          # (q, T, 1)
        draw = torch.randn(own.shape, generator=generator("normal", r, seed)).to(own)
        for changes, values in ((marginal, shuffled), (noise, center + deviation * draw)):
            changes.append(toward(part, lambda rows, values=values: values[rows] @ bias.mT))

    def from_class(kind):
        return [exchanged(part, tokens, donors(labels, kind, r, seed)) for r in range(repeats)]

    losses.add("replaced", "zero", [toward(part, torch.zeros_like(mean))])
    losses.add("replaced", "its train mean", [toward(part, mean)])
    losses.add("replaced", "each entry another image's", marginal)
    losses.add("replaced", "Gaussian, same mean and variance", noise)
    losses.add("replaced", "its negative", [lambda x, rows: x - 2 * part(x)])
    losses.add("replaced", "another image's of the same class", from_class("same"))
    losses.add("replaced", "an image's of another class", from_class("other"))
    losses.add("kept", "only the bias column", [lambda x, rows: mean + part(x - mean)])


def cut_bias(losses: Losses, bias: Tensor, reference: Tensor) -> float:
    """The bias column cut to its first principal components over images; returns its effective
    rank."""
    mean, P, variances = principal((reference @ bias).flatten(1))          # P (T, r)
    shares = (variances.cumsum(0) / variances.sum()).tolist()

    def cut(rank):
        def change(x, rows):
            v = (x @ bias).flatten(1) - mean                               # (b, T)
            lost = v - v @ P[:, :rank] @ P[:, :rank].mT
            return x - lost[..., None] @ bias.mT
        return change

    for r in [0] + [2 ** i for i in range(6) if 2 ** i <= len(variances)]:
        losses.add("rank", f"bias column, rank {r}", [cut(r)], rank=r,
                   energy=shares[r - 1] if r else 0.0)
    return effective_rank(variances)


def matched_controls(reference: Tensor, bias: Tensor, embed, rank: float, seed: int) -> dict:
    """{control: (its parts, their size over the bias column's)}."""
    M = exchange_sizes(reference, embed)
    size, eye = float((bias.double().T @ M @ bias.double())), torch.eye(len(bias)).to(bias)
    others = (bias[:, 0] == 0).nonzero().flatten()
    sets = matched_sets(M, size, others, SETS, seed) if size > 0 else []
    r = max(1, round(rank))
    bases, ratio = matched_components(reference, bias, r, size, embed) if size > 0 else ([], None)
    return {"random columns": ([columns(eye[:, list(s)]) for s in sets], 1.0),
            "principal components": ([components(P) for P in bases], ratio)}


def bias_route(read, tokens: Tensor, labels: Tensor, reference: Tensor, parts: dict[str, Tensor],
               seed=0, repeats=3, embed=None) -> dict:
    """tokens (q, T, D) of test images, reference (n, T, D) of training images; parts as the model
    names them, embed the input map's weight. Random choices are repeated; a loss's interval is over
    images and repeats."""
    losses, bias = Losses(read, tokens, labels, seed), parts["bias column"]
    orders = [donors(labels, "any", r, seed) for r in range(repeats)]

    def swaps(part, count):
        return [exchanged(part, tokens, orders[r % repeats]) for r in range(count)]

    of_bias = losses.add("replaced", "another image's", swaps(columns(bias), repeats))
    replace_bias(losses, bias, reference, seed, repeats)
    rank, margins, above_sets = cut_bias(losses, bias, reference), {}, None
    for name, (group, size) in matched_controls(reference, bias, embed, rank, seed).items():
        if group:
            changes = [exchanged(part, tokens, orders[s % repeats]) for s, part in enumerate(group)]
            loss = losses.add("control", name, changes)
            # The s-th control against the bias column from the same donors.
            pairs = of_bias[:, torch.arange(len(group)) % repeats] - loss
            margins[name] = {"number": len(group), "size": size,
                             "margin": bootstrap(pairs, over_repeats(seed), seed)}
            if name == "random columns":
                above_sets = float((loss.mean(0) < of_bias.mean()).double().mean())
    for name, U in other_routes(reference, parts).items():
        losses.add("route", name, swaps(columns(U), repeats))
    single = single_columns(losses, bias, orders[0])
    losses.bar.close()
    return {"rows": losses.rows, "reader": float(losses.right.mean()), "test": len(tokens),
            "classes": int(labels.max()) + 1, "chance": chance(labels),
            "reference": len(reference), "permuted": losses.rows[0]["loss"], "controls": margins,
            "above_sets": above_sets, "effective_rank": rank, "bias_entries": tokens.shape[1],
            "single_columns": single}


def single_columns(losses: Losses, bias: Tensor, order: Tensor) -> dict:
    """64 other columns, each exchanged alone, on at most 250 images: the most expensive (chosen on
    one half of the images, measured on the other), and the bias column on the same."""
    images = stratified_sample(losses.labels, min(250, len(losses.labels)))
    eye = torch.eye(len(bias)).to(bias)
    others = (bias[:, 0] == 0).nonzero().flatten().tolist()
    picked = torch.linspace(0, len(others) - 1, min(64, len(others))).round().long().tolist()
    loss = torch.stack([losses.of(exchanged(columns(eye[:, j:j + 1]), losses.tokens, order), images)
                        for j in (others[i] for i in picked)], 1)          # (images, columns)
    of_bias = losses.of(exchanged(columns(bias), losses.tokens, order), images)
    largest, _ = crossed(loss, losses.seed)
    return {"images": len(images), "columns": loss.shape[1], "bias": float(of_bias.mean()),
            "largest": bootstrap(largest, seed=losses.seed),
            "share_below_bias": float((loss.mean(0) < of_bias.mean()).double().mean())}


def bias_table(result: dict) -> str:
    titles = {"replaced": "bias column: ", "kept": "kept, all else at its mean: ", "rank": "",
              "control": "control of its size: ", "route": "another route: "}
    rows = []
    for row in result["rows"]:
        size = result["controls"].get(row["name"], {"size": 1})["size"]
        larger = f", {size:.1f} times as large" if size > 1.1 else ""
        rows.append([titles[row["group"]] + row["name"] + larger, span(row["loss"], 100),
                     str(row["repeats"]), percent(row.get("energy"))])
    single = result["single_columns"]
    rows.append([f"another route: most expensive of {single['columns']} columns",
                 span(single["largest"], 100), "1"])
    return (table(["loss of accuracy", "points [95%]", "n", "energy %"], rows) + "\nn: random "
            "choices; energy: share of the bias column's; controls: another image's, of the bias "
            "column's size after the input map; most expensive column: chosen on one half of "
            f"{single['images']} images, measured on the other")


# ---- Content: what the route carries -------------------------------------------------------------
#
# Two ways to ask. Regression: from a part's first principal components, how well can facts of the
# image be told (mean of a channel, contrast, coarse layout), fitted on training images and scored
# on test images; other parts are asked the same. Causal mediation (Pearl 2001; Vig et al. 2020):
# give each image another's mean colour and fit it again, which costs the reader some accuracy
# (total effect); then put only one part of the new weights into the old tokens (indirect effect),
# or the old part back into the new ones (what it restores). A route that carries the colour would
# have most of the effect; that it tells the colour, by regression, does not say that the reader
# uses it.

RANKS = (1, 2, 4, 8, 16)


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


def mediation(read, fit, test, parts: dict[str, Tensor], kind: str, seed=0) -> dict:
    """By mean colour, with donors of the "other" or "same" class. Effects are losses of accuracy;
    shares are of the total effect, none where its interval holds 0. Pixels pushed out of [-1, 1]
    stay and are counted."""
    images, tokens, labels = test.images, test.tokens, test.labels.cpu()
    colour = images.mean((2, 3), keepdim=True)
    swapped = images + colour[donors(labels, kind, "colour", seed).to(images.device)] - colour
    changed = by_blocks(fit, swapped)
    right = (predict(read, tokens) == labels).double()
    after = (predict(read, changed) == labels).double()
    total = paired_bootstrap(right, after, seed)

    def ratio(means):
        return means[..., 0] / means[..., 1]

    def share(effect: Tensor):
        if total[1] > 0:
            found = bootstrap(torch.stack([effect, right - after], 1), ratio, seed)
            return found if all(map(math.isfinite, found)) else None

    result = {"donors": kind, "total": total, "accuracy": float(after.mean()),
              "outside": float((swapped.abs() > 1).double().mean()), "parts": {}}
    for name, U in parts.items():
        put_in = toward(columns(U), lambda rows: changed[rows])
        put_back = toward(columns(U), lambda rows: tokens[rows])
        indirect = right - (predict(read, tokens, put_in) == labels).double()
        restored = (predict(read, changed, put_back) == labels).double() - after
        result["parts"][name] = {
            "indirect": bootstrap(indirect, seed=seed), "share": share(indirect),
            "restored": bootstrap(restored, seed=seed), "share_restored": share(restored)}
    return result


def content(read, fit, test, reference, parts: dict[str, Tensor], seed=0) -> dict:
    """test, reference: images (n, C, size, size), labels and tokens of test and training images, as
    `diagnostics.Fitted` has them; parts {name: basis (D, m)}: the model's, and other routes."""
    known, of_test = image_facts(reference.images), image_facts(test.images)
    y, y_test = (torch.stack(list(facts.values()), 1) for facts in (known, of_test))
    told = {}                          # {part: {number of components: {fact: R^2}}}
    for name, U in parts.items():
        mean, P, _ = principal((reference.tokens @ U).flatten(1))
        x, x_test = (((each.tokens @ U).flatten(1) - mean) @ P for each in (reference, test))
        told[name] = {}
        for r in sorted({min(r, x.shape[1]) for r in RANKS}):
            r2 = regression(x[:, :r], y, x_test[:, :r], y_test).tolist()
            told[name][str(r)] = {fact: None if math.isnan(value) else value
                                  for fact, value in zip(known, r2)}
    first = dict([next(iter(parts.items()))])          # of a same-class donor it is enough
    mediations = [mediation(read, fit, test, asked, kind, seed)
                  for kind, asked in (("other", parts), ("same", first))]
    return {"told": told, "mediation": mediations, "test": len(test.labels),
            "reference": len(reference.labels)}


def content_table(result: dict) -> str:
    columns_ = {name: claims.at_rank(found, 4) for name, found in result["told"].items()}
    short = [claims.SHORT.get(name, name) for name in columns_]
    facts = list(next(iter(columns_.values())))
    text = [table(["R2 from 4 components of", *short],
                  [[fact, *("" if r2[fact] is None else f"{r2[fact]:.3f}"
                            for r2 in columns_.values())] for fact in facts])]
    for m in result["mediation"]:
        rows = [["(total effect)", span(m["total"], 100)]]
        for name, part in m["parts"].items():
            rows.append([name, span(part["indirect"], 100), span(part["share"], 1, 2),
                         span(part["share_restored"], 1, 2)])
        titles = [f"mean colour of {m['donors']} class", "indirect, points", "share",
                  "share restored"]
        text.append(table(titles, rows)
                    + f"\n{percent(m['outside'])}% of the pixels beyond [-1, 1]")
    return "\n".join(text)
