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

from checkpoint import generator
from claims import percent, span, table
from data import stratified_sample
from measures import (bootstrap, chance, crossed, effective_rank, over_repeats, paired_bootstrap,
                      principal, regression)

BLOCK = 128                # images that go through a model at once


@torch.no_grad()
def by_blocks(f, x: Tensor) -> Tensor:
    """f(x) (n, ...), a block of rows at a time."""
    return torch.cat([f(block) for block in x.split(BLOCK)])


# ---- Bias route (claim C3) -----------------------------------------------------------------------
#
# Is the bias column of the tokens a route of its own? It is replaced in every token: by its mean,
# by another image's, of any, of the same or of another class, and entry by entry by other images'
# (the same marginal distribution); it is kept alone; and it is cut to its first principal
# components. Every loss is of the reader's accuracy on the same test images.
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
# direction, the column of highest energy (the strongest), the most expensive of 64 single columns.
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
    return (x.mT @ x).double() / len(tokens)


def exchange_sizes(tokens: Tensor, embed: Tensor | None) -> Tensor:
    """A matrix (D, D) whose sum over the rows and columns of a set is half the mean squared change
    that exchanging these columns makes after the input map, weight embed (width, D)."""
    C = covariance(tokens)
    W = torch.eye(len(C), dtype=C.dtype, device=C.device) if embed is None else embed.double()
    return C * (W.T @ W)


def matched_sets(M: Tensor, size: float, allowed: Tensor, count: int, seed=0) -> list[tuple]:
    """At most `count` distinct random sets of the allowed columns whose sum over M is within 10% of
    size."""
    g, M, allowed, found = generator("sets", seed), M.cpu(), allowed.cpu(), {}
    for _ in range(10 * count):
        columns_ = grown_set(M, size, allowed[torch.randperm(len(allowed), generator=g)])
        if columns_ and len(found) < count:
            found[columns_] = True             # a dict keeps the order in which they were found
    return list(found)


def grown_set(M: Tensor, size: float, order: Tensor) -> tuple | None:
    """The first columns of `order` up to `size`; then, while it does not fit, the exchange of one
    inside for one outside that brings it nearest. None if it never fits."""
    sums = M[order][:, order].cumsum(0).cumsum(1).diagonal()   # of the first 1, 2, ... columns
    m = int((sums < size).sum()) + 1
    if m >= len(order):
        return None
    inside, outside = order[:m].clone(), order[m:].clone()
    for _ in range(10):
        total, own, with_set = M[inside][:, inside].sum(), M.diagonal(), M[:, inside].sum(1)
        if abs(float(total) / size - 1) < 0.1:
            return tuple(sorted(inside.tolist()))
        leaving = own[inside] - 2 * with_set[inside]                       # (m,)
        joining = own[outside] + 2 * with_set[outside]
        sums = total + leaving[:, None] + joining - 2 * M[inside][:, outside]  # of each exchange
        i, j = divmod(int((sums / size - 1).abs().argmin()), len(outside))
        inside[i], outside[j] = int(outside[j]), int(inside[i])
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
    """Bases (D, 1): the leading direction and the strongest column, the bias column apart,
    and what else the model names."""
    bias, C = parts["bias column"], covariance(tokens)
    others = (bias[:, 0] == 0).nonzero().flatten()
    leading = torch.zeros_like(bias)
    leading[others, 0] = torch.linalg.eigh(C[others][:, others]).eigenvectors[:, -1].to(bias.dtype)
    highest = torch.zeros_like(bias)
    highest[others[C.diagonal()[others].argmax()]] = 1
    named = {name: U for name, U in parts.items() if name != "bias column"}
    return {"leading direction": leading, "strongest column": highest, **named}


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


# A change is a function (tokens (b, T, D), their rows (b,)) -> tokens.

def toward(part, target: Tensor):
    """The part from target (q, T, D), or (T, D), the same for all images."""
    if target.dim() == 2:
        return lambda x, rows: x + part(target - x)
    return lambda x, rows: x + part(target[rows] - x)


def exchanged(part, tokens: Tensor, order: Tensor):
    """The part from the images that `order` (q,) names."""
    order = order.to(tokens.device)
    return lambda x, rows: x + part(tokens[order[rows]] - x)


@torch.no_grad()
def predict(read, tokens: Tensor, change=None, rows: Tensor | None = None) -> Tensor:
    """Predictions on the CPU for tokens[rows] as change(tokens, their rows) makes them."""
    rows = torch.arange(len(tokens)) if rows is None else rows

    def guess(r):
        r = r.to(tokens.device)
        return read(change(tokens[r], r) if change else tokens[r]).argmax(-1).cpu()
    return by_blocks(guess, rows)


class Losses:
    """The loss of accuracy that each change makes, image by image, and a report's rows of them."""

    def __init__(self, read, tokens: Tensor, labels: Tensor, seed: int):
        self.read, self.tokens, self.labels, self.seed = read, tokens, labels.cpu(), seed
        self.right = (predict(read, tokens) == self.labels).double()
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
        self.rows.append({"group": group, "name": name, "repeats": len(changes),
                          "loss": bootstrap(loss, over_repeats(self.seed), self.seed), **more})
        return loss


def shuffled_entries(tokens: Tensor, bias: Tensor, seed: int, repeat: int) -> Tensor:
    """Tokens (q, T, D) whose bias column has each entry from another image: the same marginal
    distribution, nothing of how entries go together."""
    g, own = generator("marginal", repeat, seed), tokens @ bias                # (q, T, 1)
    shuffled = torch.stack([own[torch.randperm(len(own), generator=g).to(own.device), t]
                            for t in range(own.shape[1])], 1)
    return tokens + (shuffled - own) @ bias.mT


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

    for r in [2 ** i for i in range(5) if 2 ** i <= len(variances)]:
        losses.add("rank", f"bias column, rank {r}", [cut(r)], rank=r, energy=shares[r - 1])
    return effective_rank(variances)


def matched_controls(reference: Tensor, bias: Tensor, embed, rank: float, seed: int) -> dict:
    """{control: (its parts, their size over the bias column's)}."""
    M = exchange_sizes(reference, embed)
    size, eye = float((bias.double().T @ M @ bias.double())), torch.eye(len(bias)).to(bias)
    if size <= 0:
        return {}
    others = (bias[:, 0] == 0).nonzero().flatten()
    sets = matched_sets(M, size, others, SETS, seed)
    bases, ratio = matched_components(reference, bias, max(1, round(rank)), size, embed)
    return {"random columns": ([columns(eye[:, list(s)]) for s in sets], 1.0),
            "principal components": ([components(P) for P in bases], ratio)}


def bias_route(read, tokens: Tensor, labels: Tensor, reference: Tensor, parts: dict[str, Tensor],
               seed=0, repeats=3, embed=None) -> dict:
    """tokens (q, T, D) of test images, reference (n, T, D) of training images; parts as the model
    names them, embed the input map's weight. Random choices are repeated; a loss's interval is over
    images and repeats."""
    losses, bias = Losses(read, tokens, labels, seed), parts["bias column"]
    part, mean = columns(bias), reference.mean(0)
    orders = [donors(labels, "any", r, seed) for r in range(repeats)]

    def from_class(kind):
        return [exchanged(part, tokens, donors(labels, kind, r, seed)) for r in range(repeats)]

    of_bias = losses.add("replaced", "another image's",
                         [exchanged(part, tokens, order) for order in orders])
    losses.add("replaced", "its train mean", [toward(part, mean)])
    losses.add("replaced", "each entry another image's",
               [toward(part, shuffled_entries(tokens, bias, seed, r)) for r in range(repeats)])
    losses.add("replaced", "another image's of the same class", from_class("same"))
    losses.add("replaced", "an image's of another class", from_class("other"))
    losses.add("kept", "only the bias column", [lambda x, rows: mean + part(x - mean)])
    rank, margins, above_sets = cut_bias(losses, bias, reference), {}, None
    for name, (group, size) in matched_controls(reference, bias, embed, rank, seed).items():
        if group:
            changes = [exchanged(control, tokens, orders[s % repeats])
                       for s, control in enumerate(group)]
            loss = losses.add("control", name, changes)
            # The s-th control against the bias column from the same donors.
            pairs = of_bias[:, torch.arange(len(group)) % repeats] - loss
            margins[name] = {"number": len(group), "size": size,
                             "margin": bootstrap(pairs, over_repeats(seed), seed)}
            if name == "random columns":
                above_sets = float((loss.mean(0) < of_bias.mean()).double().mean())
    for name, U in other_routes(reference, parts).items():
        losses.add("route", name, [exchanged(columns(U), tokens, orders[0])])
    single = single_columns(losses, bias, orders[0])
    losses.bar.close()
    return {"rows": losses.rows, "reader": float(losses.right.mean()), "test": len(tokens),
            "classes": int(labels.max()) + 1, "chance": chance(labels),
            "reference": len(reference), "permuted": losses.rows[0]["loss"], "controls": margins,
            "above_sets": above_sets, "effective_rank": rank, "single_columns": single}


def single_columns(losses: Losses, bias: Tensor, order: Tensor) -> dict:
    """64 other columns, each exchanged alone, on a third of the images, at most 250: the most
    expensive, chosen on one half of them, measured on the other."""
    images = stratified_sample(losses.labels, min(250, len(losses.labels) // 3))
    eye = torch.eye(len(bias)).to(bias)
    others = (bias[:, 0] == 0).nonzero().flatten()
    picked = torch.linspace(0, len(others) - 1, min(64, len(others))).round().long()
    loss = torch.stack([losses.of(exchanged(columns(eye[:, j:j + 1]), losses.tokens, order), images)
                        for j in others[picked.to(others.device)].tolist()], 1)    # (images, 64)
    largest, _ = crossed(loss, losses.seed)
    return {"images": len(images), "columns": loss.shape[1],
            "largest": bootstrap(largest, seed=losses.seed)}


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
# Two ways to ask. Regression: from a part's first four principal components, how well can facts of
# the image be told (mean of a channel, contrast, layout), fitted on training images and scored on
# test images; other parts are asked the same. Causal mediation (Pearl 2001; Vig et al. 2020): give
# each image another's mean colour and fit it again, which costs the reader some accuracy (total
# effect); then put only one part of the new weights into the old tokens (indirect effect), or the
# old part back into the new ones (what it restores). A route that carries the colour would have
# most of the effect; that it tells the colour, by regression, does not say that the reader uses it.

def image_facts(images: Tensor) -> dict[str, Tensor]:
    """What a low-dimensional route might carry, of images (n, C, size, size): each (n,). Facts that
    an image below 4 pixels a side does not have are left out."""
    n, channels, size, _ = images.shape
    colours = {1: ["grey"], 3: ["red", "green", "blue"]}.get(
        channels, [f"channel {c + 1}" for c in range(channels)])
    facts = {f"mean {colour}": images[:, c].mean((1, 2)) for c, colour in enumerate(colours)}
    grey, edge, half = images.mean(1), size // 4, size // 2
    centre = torch.zeros(size, size, dtype=torch.bool, device=images.device)
    centre[edge:size - edge, edge:size - edge] = True
    facts["contrast"] = grey.std((1, 2), correction=0)
    facts["centre - surround"] = grey[:, centre].mean(1) - grey[:, ~centre].mean(1)
    facts["left - right"] = (grey[:, :, :half] - grey[:, :, size - half:]).mean((1, 2))
    facts["top - bottom"] = (grey[:, :half] - grey[:, size - half:]).mean((1, 2))
    return {name: values for name, values in facts.items() if not values.isnan().any()}


def told(reference, test, U: Tensor) -> dict:
    """{fact: R^2 on test images} from four components of the part U (D, m); None for a fact that is
    the same of all."""
    mean, P, _ = principal((reference.tokens @ U).flatten(1))
    x, x_test = (((each.tokens @ U).flatten(1) - mean) @ P[:, :4] for each in (reference, test))
    known, of_test = image_facts(reference.images), image_facts(test.images)
    r2 = regression(x, torch.stack([*known.values()], 1), x_test,
                    torch.stack([*of_test.values()], 1)).tolist()
    return {fact: None if math.isnan(value) else value for fact, value in zip(known, r2)}


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
        put_in, put_back = (toward(columns(U), each) for each in (changed, tokens))
        indirect = right - (predict(read, tokens, put_in) == labels).double()
        restored = (predict(read, changed, put_back) == labels).double() - after
        result["parts"][name] = {
            "indirect": bootstrap(indirect, seed=seed), "share": share(indirect),
            "restored": bootstrap(restored, seed=seed), "share_restored": share(restored)}
    return result


def content(read, fit, test, reference, parts: dict[str, Tensor], seed=0) -> dict:
    """test, reference: images (n, C, size, size), labels and tokens of test and training images, as
    `diagnostics.Fitted` has them; parts {name: basis (D, m)}: the model's, and other routes."""
    first = dict([next(iter(parts.items()))])          # of a same-class donor it is enough
    return {"told": {name: told(reference, test, U) for name, U in parts.items()},
            "mediation": [mediation(read, fit, test, asked, kind, seed)
                          for kind, asked in (("other", parts), ("same", first))],
            "test": len(test.labels), "reference": len(reference.labels)}


def content_table(result: dict) -> str:
    parts = result["told"]
    text = [table(["R2 from 4 components of", *parts],
                  [[fact, *("" if found[fact] is None else f"{found[fact]:.3f}"
                            for found in parts.values())] for fact in next(iter(parts.values()))])]
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
