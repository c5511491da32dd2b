"""Is the class signal clustered in the weights, or routed through the reader, and what does the route carry?

    python diagnostics.py --ckpt out.pt                          # tables, report.json and figures in out-diagnostics/
    python diagnostics.py --ckpt out.pt --only clustering --samples 2000     # one experiment, a bank of 2,000 images
    python diagnostics.py --ckpt a.pt b.pt c.pt --out models     # each of them, and the comparison across models

Four experiments: do the weights cluster by class (claim C1), where in the reader do classes come apart (C2, token flow), is
the bias column of the tokens a route of its own (C3), and what does that route carry (content). Sections, top to bottom:
measures, statistics, fitted weights, the four experiments, across models, report, figures, command line. The measures take
any (n, d) tensor; the experiments take `fit` and `read` callables or tensors, not a checkpoint.
"""
import argparse
import contextlib
import copy
import ctypes
import functools
import itertools
import json
import math
import os
import shlex
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import train

# ---- Measures ------------------------------------------------------------------------------------------------------------
#
# x is (n, d), labels (n,) integers from 0. Distances are Euclidean; a mean is subtracted first, for the sake of rounding only.

BLOCK_BYTES = 128 << 20            # of one block's distances or differences
FEW = 16                           # rows that are made float64 at a time


def check(x: Tensor, labels: Tensor, k: int = 0, classes: int = 2) -> tuple[Tensor, Tensor]:
    """x as float32 or float64 and labels as int64. ValueError: no (n, d) tensor with a label a row, no integers from 0, not
    finite or too large to be squared, fewer than k rows, or fewer classes than needed."""
    x, labels = x.detach(), labels.detach()
    if x.dim() != 2 or not x.shape[1] or labels.shape != x.shape[:1]:
        raise ValueError(f"expected x (n, d) and labels (n,), got {tuple(x.shape)} and {tuple(labels.shape)}")
    if labels.is_floating_point() or len(labels) and int(labels.min()) < 0:
        raise ValueError("labels must be integers from 0")
    x = x if x.dtype in (torch.float32, torch.float64) else x.float() if x.is_floating_point() else x.double()
    if len(x) < max(k, 1):
        raise ValueError(f"{len(x)} rows, but {max(k, 1)} are needed")
    if not torch.isfinite(x).all():
        raise ValueError("x holds values that are not finite")
    if float(x.abs().max()) > math.sqrt(torch.finfo(x.dtype).max / (16 * x.shape[1])):
        raise ValueError("x holds values too large to be squared; scale it down")
    if len(labels.unique()) < classes:
        raise ValueError(f"{len(labels.unique())} class in the sample, but {classes} are needed")
    return x, labels.long()


def check_pair(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int = 0, classes: int = 1):
    """As `check`, both of one type; labels numbered anew, in the same order, so that any integers will do."""
    bank, bank_labels = check(bank, bank_labels, k, classes)
    queries, labels = check(queries, labels, classes=1)
    if bank.shape[1] != queries.shape[1]:
        raise ValueError(f"a bank of {bank.shape[1]} features, but queries of {queries.shape[1]}")
    dtype = torch.promote_types(bank.dtype, queries.dtype)
    bank_labels, labels = torch.cat([bank_labels, labels]).unique(return_inverse=True)[1].split([len(bank), len(queries)])
    return bank.to(dtype), bank_labels, queries.to(dtype), labels


def by_rows(f, x: Tensor, count: int) -> Tensor:
    """f(x) (n, ...) of x (n, ...), `count` rows at a time. The result is made at once: pieces of it, left between large temporaries,
    would keep those from being used again (glibc's heap: gigabytes)."""
    found = None
    for start in range(0, max(1, len(x)), count):
        part = f(x[start:start + count])
        if found is None:
            found = part.new_empty(len(x), *part.shape[1:])
        found[start:start + count] = part
    return found


def squared_length(x: Tensor) -> Tensor:
    """Of each row, (n, d) -> (n,) float64, without a float64 copy of x."""
    return by_rows(lambda rows: rows.double().square().sum(1), x, max(1, (1 << 20) // x.shape[1]))


def column_means(x: Tensor) -> Tensor:
    """(n, d) -> (d,) float64, without a float64 copy of x."""
    return sum(rows.double().sum(0) for rows in x.split(FEW)) / len(x)


class Nearest:
    """The k nearest bank rows of each query, nearest first, over a bank that comes block by block; equal distances go to the
    lower index. queries (q, d); first: the bank row that the first query is, where queries are bank rows: none is its own neighbour.

    A matrix product finds a block's candidates. Its rounding can neither lose nor reorder any: all that lie within it of the
    k-th are compared by the sum of their squared differences.
    """

    def __init__(self, queries: Tensor, k: int, first: int | None = None):
        self.raw, self.k, self.first, self.seen = queries, k, first, 0
        self.mean = column_means(queries).to(queries.dtype)
        self.y = queries - self.mean
        self.squares = squared_length(self.y)[:, None].to(queries.dtype)
        self.distance = torch.full((len(queries), k), math.inf, dtype=torch.float64, device=queries.device)    # squared
        self.index = torch.zeros(len(queries), k, dtype=torch.long, device=queries.device)

    def update(self, block: Tensor) -> Tensor:
        """Takes the next rows of the bank; returns squared distances to them (q, b), as rounded by the matrix product."""
        x = block - self.mean
        squares = squared_length(x).to(x.dtype)
        d = torch.addmm(squares + self.squares, self.y, x.T, alpha=-2)
        slack = 64 * torch.finfo(x.dtype).eps * (squares + self.squares)
        if self.first is not None:
            own = torch.arange(self.first, self.first + len(d), device=d.device)[:, None] == torch.arange(self.seen, self.seen + len(x), device=d.device)
            d.masked_fill_(own, math.inf)
        limit = self.distance[:, -1:]
        if len(x) >= self.k:
            limit = torch.minimum(limit, (d + slack).topk(self.k, largest=False).values[:, -1:].double())
        pairs = ((d - slack <= limit) & (d < math.inf)).nonzero()
        if len(pairs):
            exact = by_rows(lambda p: squared_length(self.raw[p[:, 0]].sub_(block[p[:, 1]])), pairs, max(1, BLOCK_BYTES // (128 * x.shape[1])))
            rows, columns = pairs.T
            counts = torch.bincount(rows, minlength=len(d))
            place = self.k + torch.arange(len(rows), device=d.device) - (counts.cumsum(0) - counts)[rows]
            shape = len(d), self.k + int(counts.max())
            distance, index = exact.new_full(shape, math.inf), rows.new_zeros(shape)
            distance[:, :self.k], index[:, :self.k] = self.distance, self.index
            distance[rows, place], index[rows, place] = exact, columns + self.seen
            self.distance, order = (z[:, :self.k] for z in distance.sort(dim=1, stable=True))
            self.index = index.gather(1, order)
        self.seen += len(x)
        return d.masked_fill_(own, 0).clamp_min_(0) if self.first is not None else d.clamp_min_(0)


def nearest(bank: Tensor, queries: Tensor | None, k: int) -> Tensor:
    """The k nearest bank rows of each query (q, k), as `Nearest`; queries None: of each bank row among the others."""
    if k < 1:
        raise ValueError(f"{k} neighbours, but one is needed")
    found = []
    y = bank if queries is None else queries
    rows = max(1, BLOCK_BYTES // (8 * min(len(bank), 4096)))
    for start in range(0, len(y), rows):
        search = Nearest(y[start:start + rows], k, start if queries is None else None)
        for block in bank.split(4096):
            search.update(block)
        found.append(search.index)
    return torch.cat(found)


def vote(labels: Tensor, classes: int) -> Tensor:
    """The most frequent of labels (q, k); a tied vote goes to the smallest label: (q,)."""
    return F.one_hot(labels, classes).sum(1).argmax(1)


def knn_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int = 10) -> float:
    """Share of queries whose label is the majority's of their k nearest bank rows (Cover & Hart 1967)."""
    bank, bank_labels, queries, labels = check_pair(bank, bank_labels, queries, labels, k)
    return float((vote(bank_labels[nearest(bank, queries, k)], int(bank_labels.max()) + 1) == labels).double().mean())


def neighbor_purity(x: Tensor, labels: Tensor, k: int = 10) -> float:
    """Mean share of a row's k nearest other rows that have its label (as Manning et al., Introduction to Information Retrieval
    2008, ch. 16, with neighbourhoods for clusters)."""
    x, labels = check(x, labels, k + 1, classes=1)
    return float((labels[nearest(x, None, k)] == labels[:, None]).double().mean())


def silhouettes(sums: Tensor, labels: Tensor, sizes: Tensor) -> Tensor:
    """Silhouette (b - a) / max(a, b) of each row (Rousseeuw, J. Comput. Appl. Math. 1987): a is the mean distance to its own
    class, b to the nearest other one. sums (n, classes) of distances, sizes (classes,). Alone in its class, or a = b = 0: 0."""
    own = labels[:, None]
    a = sums.gather(1, own).squeeze(1) / (sizes[labels] - 1).clamp_min(1)
    b = (sums / sizes).nan_to_num(math.inf).masked_fill(sizes == 0, math.inf).scatter(1, own, math.inf).min(1).values
    return torch.where(sizes[labels] > 1, (b - a) / torch.maximum(a, b).clamp_min(torch.finfo(torch.float64).tiny), 0.0)


def silhouette(x: Tensor, labels: Tensor) -> float:
    """Mean silhouette, as `silhouettes`."""
    x, labels = check(x, labels)
    _, labels = labels.unique(return_inverse=True)
    member = F.one_hot(labels).to(torch.float64)                                       # (n, classes)
    x = x.double() - x.double().mean(0)
    sums = torch.cat([torch.cdist(block, x, compute_mode="donot_use_mm_for_euclid_dist") @ member
                      for block in x.split(max(1, BLOCK_BYTES // (8 * len(x))))])
    return float(silhouettes(sums, labels, member.sum(0)).mean())


def class_means(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The labels that occur, ascending, and the mean of their rows: (classes,), (classes, d) float64."""
    present, index = labels.unique(return_inverse=True)
    sums = torch.zeros(len(present), x.shape[1], dtype=torch.float64, device=x.device).index_add_(0, index, x.double())
    return present, sums / torch.bincount(index)[:, None]


def fisher_ratio(x: Tensor, labels: Tensor) -> float:
    """Trace of the between-class over trace of the within-class scatter (Fisher 1936; Fukunaga 1990, ch. 10). Rows that are
    all equal count 0; classes without spread of their own infinity."""
    x, labels = check(x, labels)
    _, means = class_means(x, labels)
    _, index = labels.unique(return_inverse=True)
    between = float((torch.bincount(index)[:, None] * (means - x.double().mean(0)).square()).sum())
    within = float((x.double() - means[index]).square().sum())
    return 0.0 if between <= 1e-24 * float(x.double().square().sum()) else between / within if within else math.inf


def nearest_mean_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor) -> float:
    """Share of queries whose nearest class mean of the bank is their own class's; a tie goes to the smallest label."""
    bank, bank_labels, queries, labels = check_pair(bank, bank_labels, queries, labels)
    present, means = class_means(bank, bank_labels)
    return float((present[nearest(means, queries.double(), 1)[:, 0]] == labels).double().mean())


PROBE_LAMBDAS = (1.0, 0.1, 0.01, 1e-3, 1e-4)       # times d: what a feature and its copy share does not depend on their number


def logistic(z: Tensor, labels: Tensor, classes: int, penalty: float, tolerance: float = 1e-9) -> Tensor:
    """W (r + 1, classes), last row the bias, of the multinomial logistic regression on z (n, r), float64: the minimum of the
    mean cross-entropy + penalty / 2 * |W without the bias|^2. L-BFGS (Nocedal 1980) in the coordinates V = R W, where R^T R is a
    quarter of the features' covariance + penalty, about the Hessian (Boehning 1992): tens of iterations in place of thousands."""
    hessian = z.T @ z / (4 * len(z))
    hessian.diagonal().add_(penalty)
    R = torch.linalg.cholesky(hessian, upper=True)
    whitened = torch.linalg.solve_triangular(R, z, upper=True, left=False)             # z R^-1
    V = torch.zeros(z.shape[1] + 1, classes, dtype=z.dtype, device=z.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([V], max_iter=500, history_size=20, tolerance_grad=tolerance, tolerance_change=tolerance ** 2,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        with torch.enable_grad():
            u = whitened @ V[:-1]                                                      # z W, without the bias
            # |V|^2 = |z W|^2 / 4n + penalty |W|^2
            loss = F.cross_entropy(u + V[-1], labels) + (V[:-1].square().sum() - u.square().sum() / (4 * len(z))) / 2
            loss.backward()
        return loss

    optimizer.step(closure)
    V = V.detach()
    return torch.cat([torch.linalg.solve_triangular(R, V[:-1], upper=True), V[-1:]])


def moments(rows) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation of each feature of what rows() yields, blocks (b, d): float64; 0 in place of the latter where
    it is constant. A few rows at a time, so that there is no float64 copy of all."""
    n = sum(len(x) for x in rows())
    mean = sum(few.double().sum(0) for x in rows() for few in x.split(FEW)) / n
    deviation = (sum((few.double() - mean).square().sum(0) for x in rows() for few in x.split(FEW)) / n).sqrt()
    return mean, torch.where(deviation > 1e-7 * mean.abs(), 1 / deviation, 0.0)


def factor(gram: Tensor) -> Tensor:
    """Lower L with L L^T = gram, up to the rounding it came with."""
    rounding = 100 * torch.finfo(gram.dtype).eps * gram.diagonal().mean()
    return torch.linalg.cholesky(gram + rounding.clamp_min(1e-30) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))


def numbered(blocks):
    """Each block with the number of its first row."""
    start = 0
    for block in blocks:
        yield start, block
        start += len(block)


def probe(rows, labels: Tensor, classes: int) -> Tensor:
    """W (d + 1, classes) float64, last row the bias, of multinomial logistic regression on standardised features, to be applied to
    raw ones; rows() yields them block by block (b, d), in the order of labels (n,). The ridge penalty is the best of five on a held-out
    fifth (every fifth row of each class), the larger one where they tie. Where d > n it is solved in the n x n dual: W lies in the span
    of the rows, so that only their inner products count, and the rows of the Gram matrix's Cholesky factor give the same regression."""
    mean, scale = moments(rows)
    n, d = len(labels), len(mean)

    def standard(x):
        return ((few.double() - mean).mul_(scale).to(x.dtype) for few in x.split(FEW))

    give_back()
    if dual := d > n:
        gram = torch.empty(n, n, device=labels.device, dtype=next(iter(rows())).dtype)     # made at once, as in `by_rows`
        for i, a in numbered(torch.cat(list(standard(x))) for x in rows()):
            for j, b in numbered(few for x in rows() for few in standard(x)):
                gram[i:i + len(a), j:j + len(b)] = a @ b.T
        z = factor(gram)
    else:
        z = torch.cat([few for x in rows() for few in standard(x)])
    held = torch.zeros(n, dtype=torch.bool, device=labels.device)
    for c in labels.unique():
        held[torch.nonzero(labels == c).flatten()[4::5]] = True
    best = PROBE_LAMBDAS[0]
    if held.any():
        if dual:
            part = factor(gram[~held][:, ~held])
            other = torch.linalg.solve_triangular(part, gram[~held][:, held], upper=False).T
        else:
            part, other = z[~held], z[held]
        scores = []
        for penalty in PROBE_LAMBDAS:
            W = logistic(part, labels[~held], classes, penalty * d, tolerance=1e-4)
            scores.append(float(((other @ W[:-1] + W[-1]).argmax(1) == labels[held]).double().mean()))
        best = PROBE_LAMBDAS[scores.index(max(scores))]
    V = logistic(z, labels, classes, best * d, tolerance=1e-5)
    W, b = V[:-1], V[-1]
    if dual:
        A = torch.linalg.solve_triangular(z.T, W, upper=True)                          # (n, classes)
        W = sum((few.T @ a).double() for few, a in zip((few for x in rows() for few in standard(x)), A.split([len(few) for x in rows() for few in x.split(FEW)])))
    W = W.double() * scale[:, None]
    return torch.cat([W, (b - mean @ W)[None]])


def linear_probe(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor) -> float:
    """Accuracy on queries of multinomial logistic regression on the bank's standardised features (Alain & Bengio 2016)."""
    bank, bank_labels, queries, labels = check_pair(bank, bank_labels, queries, labels, classes=2)
    W = probe(lambda: bank.split(ROWS), bank_labels, int(max(bank_labels.max(), labels.max())) + 1)
    return float(((queries.double() @ W[:-1] + W[-1]).argmax(1) == labels).double().mean())


# ---- Statistics ----------------------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=2)
def redrawn(n: int, seed: int, draws: int) -> Tensor:
    """How often each of n rows is drawn (draws, n), n rows with replacement at a time."""
    drawn = torch.randint(n, (draws, n), generator=train.generator("bootstrap", seed))
    return torch.zeros(draws, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(1, dtype=torch.float64).expand(draws, n))


def bootstrap(values: Tensor, statistic=lambda means: means[..., 0], seed: int = 0, draws: int = 2000) -> tuple[float, float, float]:
    """A statistic of the column means of values (n, m), and its 95% percentile interval over rows drawn again (Efron 1979).
    statistic: (..., m) -> (...). Two columns of the same images make it a paired bootstrap."""
    values = values.double().cpu()
    values = values[:, None] if values.dim() == 1 else values
    low, high = statistic(redrawn(len(values), seed, draws) @ values / len(values)).nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(statistic(values.mean(0))), low, high


def paired_bootstrap(a: Tensor, b: Tensor, seed: int = 0) -> tuple[float, float, float]:
    """Mean of a - b over the same n images, and its 95% interval."""
    return bootstrap(a.double() - b.double(), seed=seed)


def over_repeats(seed: int = 0):
    """For `bootstrap`, where the columns are repeats of a random choice: their mean, the repeats drawn again as well."""
    def statistic(means: Tensor) -> Tensor:
        if means.dim() == 1:
            return means.mean()
        drawn = torch.randint(means.shape[1], means.shape, generator=train.generator("repeats", seed))
        return means.gather(1, drawn).mean(1)
    return statistic


def ranks(x: Tensor) -> Tensor:
    """Ranks from 1; equal values share their mean rank."""
    _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[inverse]


def auroc(score: Tensor, right: Tensor, seed: int = 0, draws: int = 1000) -> tuple[float, float, float] | None:
    """Probability that a right one scores above a wrong one, ties half (Hanley & McNeil 1982), and its 95% bootstrap interval;
    None where all are right or all wrong."""
    score, right = score.double().cpu(), right.bool().cpu()

    def area(score, right):
        positive = int(right.sum())
        return (float(ranks(score)[right].sum()) - positive * (positive + 1) / 2) / max(1, positive * (len(right) - positive))

    if right.all() or not right.any():
        return None
    g, areas = train.generator("auroc", seed), []
    for _ in range(draws):
        rows = torch.randint(len(score), (len(score),), generator=g)
        if 0 < int(right[rows].sum()) < len(rows):
            areas.append(area(score[rows], right[rows]))
    return area(score, right), *np.quantile(areas, [0.025, 0.975]).tolist()


def t_interval(values) -> tuple[float, float, float] | None:
    """Mean and 95% t interval (Student 1908) of independent values; None for fewer than two."""
    values = np.asarray(values, dtype=float)
    n = len(values)
    if n < 2:
        return None
    half = t_quantile(n - 1) * values.std(ddof=1) / math.sqrt(n)
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


@functools.lru_cache
def t_quantile(freedom: int) -> float:
    """97.5% quantile of Student's t with so many degrees of freedom, by the integral of its density."""
    x, n = np.linspace(0, 13, 400_001), freedom + 1                                    # 12.7 is the largest
    density = math.exp(math.lgamma(n / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi) * (1 + x ** 2 / freedom) ** (-n / 2)
    area = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * (x[1] - x[0]))])
    return float(np.interp(0.475, area, x))


def correlations(columns: dict[str, list], y, settings: list, seed: int = 0, draws: int = 2000) -> dict | None:
    """Pearson's and Spearman's correlation of each column with y over models, and of the last minus the first column's, each
    (value, low, high) with a 95% bootstrap interval that draws whole settings: seeds of one setting are no independent models.
    Fewer than five settings are too few to draw from, and so are those that give one value only (rho 1 of six settings, however they
    are drawn): low and high are None. None in all with fewer than five models or two
    settings, or where anything is constant."""
    x, y = torch.tensor(list(columns.values()), dtype=torch.float64), torch.as_tensor(y, dtype=torch.float64)
    groups = [torch.tensor([i for i, s in enumerate(settings) if s == setting]) for setting in dict.fromkeys(settings)]
    if len(y) < 5 or len(groups) < 2 or any(z.unique().numel() < 2 for z in (*x, y)):
        return None
    g = train.generator("correlation", seed)
    drawn = [torch.cat([groups[i] for i in torch.randint(len(groups), (len(groups),), generator=g)]) for _ in range(draws)]
    result = {"n": len(y), "settings": len(groups)}
    for kind, of in (("pearson", lambda v: v), ("spearman", ranks)):
        def all_of(rows):
            r = torch.corrcoef(torch.stack([of(z[rows]) for z in (*x, y)]))[-1, :-1]
            return torch.cat([r, (r[-1] - r[0])[None]])
        values, many = all_of(torch.arange(len(y))), torch.stack([all_of(rows) for rows in drawn])
        limits = many.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0).T.tolist()
        names = [*columns, "last - first"] if len(columns) > 1 else [*columns]
        result[kind] = {name: (value, *(ends if len(groups) >= 5 and ends[0] < ends[1] else (None, None))) for name, value, ends in zip(names, values.tolist(), limits)}
    return result


# ---- Fitted weights ------------------------------------------------------------------------------------------------------

MEMORY = 13 << 28                  # bytes, 3.25 GiB: fitted weights that are kept, and what is made of them at one time
ROWS = 256                         # images in a block
REFERENCE = 2000                   # training images for linear probes, means, principal components and regressions


class Block(NamedTuple):
    """Consecutive images of a data set, their labels, and their fitted weights: first layer and tokens of phi - theta."""
    start: int
    images: Tensor                 # (b, C, size, size) in [-1, 1]
    labels: Tensor                 # (b,)
    tokens: Tensor                 # (b, T, width + 1)
    first: Tensor                  # (b, ...), or nothing: (b, 0)


class Fits:
    """A data set as fitted weights, block by block: kept as far as `keep` bytes go, the rest fitted again at each pass.

    fit(images, block) -> tokens, or (tokens, first layer); block numbers the call, for fits that draw pixels.
    """

    def __init__(self, fit, data: train.Images, keep: int = 0, device="cpu", workers: int = 0):
        self.fit, self.data, self.device, self.workers = fit, data, device, workers
        self.labels, self.keep, self.kept, self.bytes = data.labels.to(device), keep, {}, 0

    @classmethod
    def given(cls, tokens: Tensor, labels: Tensor, images: Tensor | None = None, first: Tensor | None = None) -> "Fits":
        """Of tensors that are at hand."""
        self = cls.__new__(cls)
        nothing = tokens.new_zeros(len(tokens), 0)
        self.labels, self.data, self.bytes = labels, None, 0
        self.all = Block(0, nothing if images is None else images, labels, tokens, nothing if first is None else first)
        self.kept = {b: Block(b * ROWS, *part) for b, part in enumerate(zip(*(x.split(ROWS) for x in self.all[1:])))}
        return self

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def at_hand(self) -> bool:
        """All of it is kept."""
        return len(self.kept) * ROWS >= len(self)

    @torch.no_grad()
    def blocks(self, start: int = 0, stop: int | None = None):
        """Yields the blocks from image `start`, a multiple of ROWS, on."""
        numbers = range(start // ROWS, math.ceil((len(self) if stop is None else min(stop, len(self))) / ROWS))
        missing = [torch.arange(b * ROWS, min((b + 1) * ROWS, len(self))) for b in numbers if b not in self.kept]
        batches = self.data.batches(missing, self.device, self.workers) if missing else None
        with tqdm(desc="fitting", total=sum(map(len, missing)), unit=" images", leave=False, disable=None if missing else True) as bar:
            for b in numbers:
                block = self.kept.get(b)
                if block is None:
                    grey, labels = next(batches)           # uint8 images
                    fitted = self.fit(self.data.signal(grey), b)
                    tokens, first = fitted if isinstance(fitted, tuple) else (fitted, fitted.new_zeros(len(grey), 0))
                    block = Block(b * ROWS, grey, labels, tokens, first)
                    size = sum(x.numel() * x.element_size() for x in block[1:])
                    if self.bytes + size <= self.keep:
                        self.kept[b], self.bytes = block, self.bytes + size
                    bar.update(len(grey))
                yield block._replace(images=self.data.signal(block.images)) if self.data else block

    def whole(self) -> Block:
        """All of it as one block."""
        return self.all if self.data is None else self.take(torch.arange(len(self), device=self.labels.device), at_hand=True).all

    def take(self, rows: Tensor, at_hand: bool = False) -> "Fits":
        """Those images only; in tensors of their own if all were kept, or if asked for."""
        if not (self.at_hand or at_hand):
            return Fits(self.fit, self.data.take(rows.to(self.data.labels.device)), 0, self.device, self.workers)
        taken = None
        for block in self.blocks():
            here = torch.nonzero((rows >= block.start) & (rows < block.start + len(block.labels))).flatten()
            taken = taken or [x.new_empty(len(rows), *x.shape[1:]) for x in block[1:]]
            for x, values in zip(taken, block[1:]):
                x[here] = values[rows[here] - block.start]
        images, labels, tokens, first = taken
        return Fits.given(tokens, labels, images, first)


class Part:
    """Some images of a bank at hand, in its order, with no copy of their fits."""

    def __init__(self, bank: Fits, rows: Tensor):
        self.bank, self.rows, self.bytes = bank, rows.sort().values, bank.bytes
        self.labels = bank.labels[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def blocks(self, start: int = 0, stop: int | None = None):
        """All of them; where they begin and end is the bank's affair."""
        for block in self.bank.blocks():
            here = self.rows[(self.rows >= block.start) & (self.rows < block.start + len(block.labels))] - block.start
            for few in here.split(4 * FEW):
                yield Block(block.start, *(x[few] for x in block[1:]))


def give_back():
    """Freed memory to the system: glibc keeps pieces of up to 32 MB in a heap that grows by half a gigabyte as they come and go."""
    with contextlib.suppress(OSError, AttributeError):     # another C library
        ctypes.CDLL(None).malloc_trim(0)


def some(labels: Tensor, count: int) -> Tensor:
    """At most `count` rows, the same share of each class, always the same ones."""
    return train.stratified(labels.cpu(), min(count, len(labels))).to(labels.device)


@torch.no_grad()
def measure(coordinates: dict, bank: Fits, queries: Fits, reference: Fits | None = None, k: int = 10) -> dict[str, dict]:
    """All measures of each coordinate system, a name and a function from a block to (b, d), in as few passes as memory allows.

    Of each query (q,): the predictions knn1, knn10, nearest_mean and, with a reference, probe (fitted on it); `purity`, the share
    of its k nearest other queries with its label; silhouette. Of all: d, fisher, and
    `neighbors` (q, k), numbers of bank rows. The coordinate systems that fit into memory together share a pass.
    """
    labels, q = queries.labels, len(queries)
    classes = int(max(bank.labels.max(), labels.max())) + 1
    device, f64 = labels.device, torch.float64
    sizes, of_class = torch.bincount(bank.labels, minlength=classes), torch.bincount(labels, minlength=classes)
    sample = next(iter(queries.blocks(0, 1)))
    bytes_each = {name: 4 * f(sample).shape[1] for name, f in coordinates.items()}
    work, groups, room = max(1 << 27, MEMORY - bank.bytes - queries.bytes - (1 << 30)), [], 0           # the gibibyte: a block's states
    for name, size in bytes_each.items():
        size *= max(2 * q, len(reference or ()))           # the queries twice: as they are, and centred
        if not groups or room < size:
            groups, room = groups + [[]], work
        groups[-1].append(name)
        room -= size
    results = {}
    bar = tqdm(desc="measuring", total=len(coordinates), leave=False, disable=None)
    for group in groups:
        piece = max(FEW, (1 << 23) // max(bytes_each[name] for name in group))

        def parts(data, start=0, stop=None):
            """The blocks, split where their coordinates would be large."""
            for block in data.blocks(start, stop):
                starts = range(0, len(block.labels), piece)
                yield from [block] if len(starts) == 1 else (Block(block.start + i, *(x[i:i + piece] for x in block[1:])) for i in starts)

        def collect(data, start, stop):
            x = {name: torch.empty(stop - start, bytes_each[name] // 4, device=device) for name in group}
            for block in parts(data, start, stop):
                for name in group:
                    x[name][block.start - start:block.start - start + len(block.labels)] = coordinates[name](block)
            return x

        probes = {}
        if reference is not None:                          # at hand where there is room, or else made again at each pass
            known = collect(reference, 0, len(reference)) if len(reference) * sum(bytes_each[name] for name in group) <= work else {}
            for name in group:
                rows_of = (lambda: known[name].split(ROWS)) if known else (lambda: (coordinates[name](block).float() for block in parts(reference)))
                probes[name] = probe(rows_of, reference.labels, classes)
            del known
        rows = ROWS * max(1, work // (2 * ROWS * sum(bytes_each[name] for name in group)))
        found_in = {name: {} for name in group}
        means = {name: torch.zeros(classes, bytes_each[name] // 4, dtype=f64, device=device) for name in group}
        own_sums = {name: torch.zeros_like(means[name]) for name in group}
        for start in range(0, q, rows):
            give_back()
            chunk = collect(queries, start, min(q, start + rows))
            near = {name: Nearest(x, k) for name, x in chunk.items()}
            for block in parts(bank):
                for name in group:
                    x = coordinates[name](block).float()
                    near[name].update(x)
                    for few, its in zip(x.split(FEW), block.labels.split(FEW)) if start == 0 else ():
                        means[name].index_add_(0, its, few.double())
            found = {name: near.pop(name).index for name in group}
            among = {name: Nearest(x, k, start) for name, x in chunk.items()}
            sums = {name: torch.zeros(len(x), classes, dtype=f64, device=device) for name, x in chunk.items()}
            centre = {name: column_means(x) for name, x in chunk.items()} if start == 0 else centre
            total = dict.fromkeys(group, 0.0) if start == 0 else total
            for block in parts(queries):
                member = F.one_hot(block.labels, classes).to(f64)
                for name in group:
                    x = coordinates[name](block).float()
                    sums[name] += among[name].update(x).sqrt().double() @ member
                    for few, its in zip(x.split(FEW), block.labels.split(FEW)) if start == 0 else ():
                        few = few.double() - centre[name]
                        own_sums[name].index_add_(0, its, few)
                        total[name] += float(few.square().sum())
            for name, x in chunk.items():
                if start == 0:
                    means[name] = means[name][sizes > 0] / sizes[sizes > 0, None]
                mine = labels[start:start + len(x)]
                neighbors = bank.labels[found[name]]
                part = {"knn1": neighbors[:, 0], "knn10": vote(neighbors, classes), "neighbors": found[name],
                        "purity": (labels[among[name].index] == mine[:, None]).double().mean(1),
                        "silhouette": silhouettes(sums[name], mine, of_class),
                        "nearest_mean": torch.nonzero(sizes).flatten()[by_rows(lambda y: nearest(means[name], y.double(), 1)[:, 0], x, FEW)]}
                if name in probes:
                    part["probe"] = by_rows(lambda y: y.double() @ probes[name][:-1] + probes[name][-1], x, FEW).argmax(1)
                for key, value in part.items():
                    found_in[name].setdefault(key, []).append(value.cpu())
            del chunk, among, near, x                      # before the next one takes its room
        for name in group:
            inside = float((own_sums[name].square().sum(1) / of_class.clamp_min(1)).sum())
            between = inside - float(own_sums[name].sum(0).square().sum()) / q
            within = total[name] - inside
            fisher = 0.0 if between <= 1e-12 * total[name] else between / within if within > 1e-12 * total[name] else math.inf
            results[name] = {"d": bytes_each[name] // 4, "fisher": fisher} | {key: torch.cat(value) for key, value in found_in[name].items()}
            bar.update()
    bar.close()
    return {name: results[name] for name in coordinates}


def accuracies(result: dict, labels: Tensor, shuffled: Tensor) -> dict:
    """The figures of a report out of one coordinate system's measures; shuffled: the bank's labels in another order, for chance."""
    labels = labels.cpu()
    row = {"d": result["d"]} | {key: float((result[key] == labels).double().mean()) for key in ("knn1", "knn10", "nearest_mean", "probe") if key in result}
    row |= {key: float(result[key].mean()) for key in ("purity", "silhouette")}
    row["fisher"] = result["fisher"] if math.isfinite(result["fisher"]) else None      # None: classes without spread of their own
    guess = vote(shuffled.cpu()[result["neighbors"]], int(max(shuffled.max(), labels.max())) + 1)
    return row | {"knn10_shuffled": float((guess == labels).double().mean())}


def crossed(values: Tensor, seed: int = 0) -> tuple[Tensor, list[int]]:
    """Of candidates (n, m, ...) measured on the same images, the one with the largest mean, chosen on one half of the images and
    looked at on the other, both ways: its values (n, ...) and the two choices. Nothing is chosen on the image it is measured on, so
    that the best of many is not flattered. NaN: not measured."""
    halves = torch.randperm(len(values), generator=train.generator("halves", seed)).chunk(2)
    picked, choices = torch.full((len(values), *values.shape[2:]), math.nan, dtype=torch.float64), []
    for here, there in (halves, halves[::-1]):
        choices.append(int(values[there].double().nanmean(0).view(values.shape[1], -1).mean(1).argmax()))
        picked[here] = values[here, choices[-1]].double()
    return picked, choices


# ---- Clustering (claim C1) -----------------------------------------------------------------------------------------------

def weight_coordinates(bank: Fits, layers: int = 1, anchor: Tensor | None = None, beta: Tensor | None = None, input_map=None) -> dict:
    """Coordinate systems in which classes might cluster: {name: function from a block to (b, d)}.

    phi, phi - theta and lambda (phi - theta + beta) differ by shift and scale, so their Euclidean measures are the same; cosine
    ones, listed apart, are Euclidean on rows scaled to length 1. anchor (T, width + 1): theta's tokens; beta: the reader's.
    """
    count, mean, square = 0, 0.0, 0.0
    for tokens in (few.double() for block in bank.blocks() for few in block.tokens.split(FEW)):        # Chan et al. 1979: moments of parts, combined
        n, m = len(tokens), tokens.mean(0)
        square = square + (tokens - m).square().sum(0) + (m - mean) ** 2 * (count * n / (count + n))
        mean = mean + (m - mean) * (n / (count + n))
        count += n
    deviation = (square / count).sqrt()
    scale = torch.where(deviation > 1e-7 * mean.abs(), 1 / deviation, 0.0).float()
    mean = mean.float()
    named = {"pixels": lambda b: b.images.flatten(1),
             "phi - theta": lambda b: torch.cat([b.first.flatten(1), b.tokens.flatten(1)], 1),
             "  first layer": lambda b: b.first.flatten(1)}
    for layer in range(layers):
        named[f"  hidden layer {layer + 1}"] = lambda b, layer=layer: b.tokens.chunk(layers, dim=1)[layer].flatten(1)
    named["  standardised per weight"] = lambda b: ((b.tokens - mean) * scale).flatten(1)
    named["  bias column"] = lambda b: b.tokens[..., -1]
    named["  all but the bias column"] = lambda b: b.tokens[..., :-1].flatten(1)
    for name, shift in (("phi - theta", 0.0), ("phi", anchor), ("phi - theta + beta", beta)):
        if shift is not None:
            named[f"  cosine of {name}"] = lambda b, shift=shift: F.normalize((b.tokens + shift).flatten(1), dim=1)
    if input_map:
        named["after the reader's input map"] = lambda b: input_map(b.tokens).flatten(1)
    sample = next(iter(bank.blocks(0, 1)))
    return {name: f for name, f in named.items() if f(sample).shape[1]}


def clustering(coordinates: dict, bank: Fits, queries: Fits, reader: Tensor, reference: Fits | None = None, whole_bank: bool = True, seed: int = 0) -> dict:
    """How far the weights cluster by class, beside the trained reader. reader (q,): its predictions.

    Purity, silhouette and Fisher ratio are the queries' own. Accuracies at n / 4 and n / 2 show whether a larger bank would help.
    """
    measured, labels = measure(coordinates, bank, queries, reference), queries.labels.cpu()
    g = train.generator("shuffle", seed)
    shuffled = bank.labels.cpu()[torch.randperm(len(bank), generator=g)]
    right, rows, geometry = (reader.cpu() == labels).double(), [], {}
    for name, result in measured.items():
        row = {"coordinate": name.strip()} | accuracies(result, labels, shuffled)
        row["reader_minus_knn10"] = paired_bootstrap(right, (result["knn10"] == labels).double(), seed)
        rows.append(row)
        if name.strip() != "pixels" and "input map" not in name:
            geometry |= {f"{title} on {name.strip()}": (result[key] == labels).double()
                         for key, title in (("knn1", "1-NN"), ("knn10", "10-NN"), ("nearest_mean", "nearest mean"))}
    best, choices = crossed(torch.stack(list(geometry.values()), 1), seed)
    curve, order = {}, torch.randperm(len(bank), generator=g).to(bank.labels.device)
    for n in (len(bank) // 4, len(bank) // 2):
        if n > 10:
            part = Part(bank, order[:n]) if bank.at_hand else bank.take(order[:n])
            curve[str(n)] = float((measure({"phi - theta": coordinates["phi - theta"]}, part, queries)["phi - theta"]["knn10"] == labels).double().mean())
    whole = next(row for row in rows if row["coordinate"] == "phi - theta")
    gap = paired_bootstrap(right, best, seed)
    low, high = 100 * gap[1], 100 * gap[2]
    verdict = "refuted" if high < 2 else "not decided here" if low <= 2 or not whole_bank else "first half holds"
    return {"rows": rows, "reader": float(right.mean()), "reader_interval": train.wilson(int(right.sum()), len(right)), "bank": len(bank), "whole_bank": whole_bank,
            "probe_images": len(reference) if reference is not None else 0, "test": len(labels), "classes": int(labels.max()) + 1,
            "knn10_by_bank": curve | {str(len(bank)): whole["knn10"]}, "best": [list(geometry)[c] for c in choices], "best_accuracy": float(best.mean()),
            "gap": gap, "purity": whole["purity"], "verdict": verdict}


# ---- Token flow (claim C2) -----------------------------------------------------------------------------------------------

class Flow:
    """The reader's states of a block, run once: the input tokens, after the input map, after every sub-block."""

    def __init__(self, read):
        self.read, self.block, self.states = read, None, None

    def __call__(self, block: Block) -> list[Tensor]:
        if self.block is not block:
            self.block, self.states = block, [block.tokens, *self.read(block.tokens, flow=True)[1]]
        return self.states


def stage_names(states: list[Tensor]) -> list[str]:
    """Of the input tokens and the reader's states; those of fewer tokens are its queries."""
    gathered = sum(x.shape[1] != states[0].shape[1] for x in states)
    names = [f"{kind} {b + 1}" for b in range((len(states) - gathered) // 2) for kind in ("attention", "MLP")]
    return ["input tokens", "input map", *names[:len(states) - gathered - 2], *[f"{kind} {b + 1}" for b in range(gathered // 2) for kind in ("gather", "queries")]]


def token_flow(read, untrained, bank: Fits, queries: Fits, reference: Fits | None = None, head=None, seed: int = 0, flattened: bool = True) -> dict:
    """Where in the reader classes come apart: measures of its residual stream, stage by stage, as the mean over tokens and, where
    it fits into memory, flattened.

    untrained: `read` of the same architecture with initial parameters, the null. A second null is a bank the reader never saw
    (half of the queries, the other half against it), beside as many of its training images. head: applied early to the mean
    over tokens it is the logit lens (nostalgebraist 2020).
    """
    sample = Flow(read)(next(iter(queries.blocks(0, 1))))
    count, names, labels = len(sample), stage_names(sample), queries.labels.cpu()
    fits = 4 * len(queries) * sum(x[0].numel() for x in sample) <= MEMORY // 2
    views = {"pooled": lambda x: x.mean(1)} | ({"flattened": lambda x: x.flatten(1)} if flattened and fits else {})

    def stages(read, views):
        flow = Flow(read)
        return {(s, view): lambda b, s=s, f=f: f(flow(b)[s]).float() for s in range(count) for view, f in views.items()}

    trained, null = (measure(stages(r, views), bank, queries, reference) for r in (read, untrained))
    half = some(queries.labels, len(queries) // 2)
    rest = torch.arange(len(queries), device=half.device)
    rest = rest[~torch.isin(rest, half)]
    others, unseen = queries.take(rest), queries.take(half)
    seen, unseen = (x.take(some(x.labels, min(len(bank), len(unseen)))) for x in (bank, unseen))
    banks = {"seen": seen, "unseen": unseen}
    halved = {name: measure(stages(read, {"pooled": views["pooled"]}), b, others) for name, b in banks.items()}

    logits = [[] for _ in range(count)]
    for block in queries.blocks():
        output, states = read(block.tokens, flow=True)
        for s in range(1, count if head else 1):
            logits[s].append(head(states[s - 1].mean(1)).argmax(1).cpu())
        logits[0].append(output.argmax(1).cpu())
    right = torch.cat(logits[0]) == labels
    rows = []
    for s, name in enumerate(names):
        row = {"stage": name}
        for view in views:
            for who, measured in (("", trained), ("untrained_", null)):
                result = measured[s, view]
                row |= {f"{who}{view}_{key}": float((result[key] == labels).double().mean()) for key in ("knn10", "knn1", "probe") if key in result}
                row[f"{who}{view}_purity"] = float(result["purity"].mean())
        row |= {f"{bank}_knn10": float((halved[bank][s, "pooled"]["knn10"] == labels[rest.cpu()]).double().mean()) for bank in banks}
        row["logit_lens"] = float((torch.cat(logits[s]) == labels).double().mean()) if s and head else None
        row["auroc"] = auroc(trained[s, "pooled"]["purity"], right, seed)
        rows.append(row)
    gains = torch.stack([(trained[s, "pooled"]["knn10"] == labels).double() - (null[s, "pooled"]["knn10"] == labels).double() for s in (1, count // 2, count - 1)], 1)
    rise = bootstrap(gains, lambda m: m[..., 2] - m[..., 0], seed)
    late = bootstrap(gains, lambda m: (m[..., 2] - m[..., 1]) - (m[..., 2] - m[..., 0]) / 2, seed)
    verdict = "not decided here" if rise[1] <= 0 else "second half holds" if late[1] > 0 else "refuted" if late[2] < 0 else "not decided here"
    return {"rows": rows, "views": list(views), "reader": float(right.double().mean()), "rise": rise, "late_minus_half": late, "middle": names[count // 2],
            "bank": len(bank), "half": len(unseen), "test": len(labels), "classes": int(labels.max()) + 1, "verdict": verdict}


class Constant(nn.Module):
    """In place of a sub-block: the same output (T, width) for every image."""

    def __init__(self, output: Tensor):
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        return self.output.expand_as(x)


class FixedMap(nn.Module):
    """Attention with a fixed map (heads, T, T) in place of its own; None: each token attends to itself."""

    def __init__(self, attention, weights: Tensor | None):
        super().__init__()
        self.attention, self.weights = attention, weights

    def forward(self, x: Tensor) -> Tensor:
        v = self.attention.qkv(self.attention.norm(x)).chunk(3, dim=-1)[2]
        if self.weights is not None:
            v = (self.weights @ v.unflatten(-1, (-1, self.attention.head_dim)).transpose(1, 2)).transpose(1, 2).flatten(2)
        return self.attention.layer_scale * self.attention.out(v)


def attention_map(attention, x: Tensor) -> Tensor:
    """The attention weights (N, heads, T, T) at x (N, T, width)."""
    q, k, _ = (y.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for y in attention.qkv(attention.norm(x)).chunk(3, dim=-1))
    return (q @ k.mT / math.sqrt(attention.head_dim)).softmax(-1)


@torch.no_grad()
def knock_outs(reader, tokens: Tensor, labels: Tensor, reference: Tensor, seed: int = 0) -> list[dict]:
    """Loss of the reader's accuracy with a sub-block's output replaced, one sub-block at a time and from each on.

    Attention by its mean over the reference tokens, by nothing, by each token attending to itself, by its map averaged over 512
    reference images; an MLP by its mean. reader: a `Reader`; its modules are swapped, it needs no flag for it.
    """
    blocks = reader.blocks
    outputs, maps = [0.0] * len(blocks), [0.0] * len(blocks)
    mapped = torch.randperm(len(reference), generator=train.generator("maps", seed))[:512]             # data may be sorted by class
    chosen = torch.zeros(len(reference), dtype=torch.bool).index_fill_(0, mapped, True).to(reference.device)
    for part, among in zip(reference.split(32), chosen.split(32)):
        _, states = reader(part, flow=True)
        for b, block in enumerate(blocks):
            outputs[b] = outputs[b] + block(states[b]).sum(0) / len(reference)
            if b % 2 == 0:
                maps[b] = maps[b] + attention_map(block, states[b][among]).sum(0) / len(mapped)
    kinds = {"attention: its mean": lambda b: Constant(outputs[b]), "attention: nothing": lambda b: Constant(torch.zeros_like(outputs[b])),
             "attention: to itself": lambda b: FixedMap(blocks[b], None), "attention: mean map": lambda b: FixedMap(blocks[b], maps[b])}
    kinds = [(name, make, range(0, len(blocks), 2)) for name, make in kinds.items()] + [("MLP: its mean", lambda b: Constant(outputs[b]), range(1, len(blocks), 2))]
    runs = [(name, b, span, {at: make(at) for at in (which if span == "from here on" else [b]) if at >= b})
            for name, make, which in kinds for b in which for span in ("alone", "from here on")]
    right = torch.zeros(len(runs) + 1, len(tokens), dtype=torch.float64)
    for rows in tqdm(torch.arange(len(tokens)).split(ROWS), "knock-outs", leave=False, disable=None):
        output, states = reader(tokens[rows], flow=True)
        right[-1, rows] = (output.argmax(1) == labels[rows]).double().cpu()
        for i, (_, b, _, swapped) in enumerate(runs):
            x = states[b]                                  # what comes before is as it was
            for at in range(b, len(blocks)):
                x = x + swapped.get(at, blocks[at])(x)
            right[i, rows] = (reader.conclude(x, tokens[rows])[0].argmax(1) == labels[rows]).double().cpu()
    return [{"replaced": name, "block": b // 2 + 1, "span": span, "loss": paired_bootstrap(right[-1], right[i], seed)} for i, (name, b, span, _) in enumerate(runs)]


# ---- Bias route (claim C3) -----------------------------------------------------------------------------------------------
#
# A part of every token: the span of orthonormal columns U (width + 1, m). Columns of the identity are columns of the token.

def put(x: Tensor, values: Tensor, U: Tensor) -> Tensor:
    """Tokens x (b, T, width + 1) with the part's values (b, T, m), or (T, m) for all, in place of their own."""
    return x + (values - x @ U) @ U.mT


def principal(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (d,), components (d, r) by falling variance, and their variances (r,), of rows (n, d)."""
    mean = values.mean(0)
    x = (values - mean).double()
    wide = x.shape[0] < x.shape[1]
    squares, Q = torch.linalg.eigh(x @ x.mT if wide else x.mT @ x)         # the smaller Gram matrix: faster than svd
    kept = torch.nonzero(squares > 1e-12 * squares[-1]).flatten().flip(0)
    components = x.mT @ Q[:, kept] / squares[kept].sqrt() if wide else Q[:, kept]
    return mean, components.to(values.dtype), squares[kept] / len(x)


def effective_rank(variances: Tensor) -> float:
    """exp of the entropy of the shares of variance (Roy & Vetterli 2007)."""
    p = variances / variances.sum()
    return float(torch.exp(-(p * p.clamp_min(1e-300).log()).sum()))


def token_covariance(tokens: Tensor) -> Tensor:
    """Covariance (width + 1, width + 1) of token features over images, summed over tokens; its trace over a set of columns is the
    set's centred energy."""
    x = (tokens - tokens.mean(0)).flatten(0, 1)
    return sum((part.mT @ part).double() for part in x.split(1 << 16)) / len(tokens)


def constancy(siren, coords: Tensor) -> Tensor:
    """How constant each incoming activation of the hidden layers is over pixels, at theta: mean^2 / mean square, over all layers
    (width,), 1 for a bias."""
    a, means, squares = coords, 0.0, 0.0
    for weight in siren.layers(siren.anchor())[:-1]:
        a = torch.sin(a @ weight[:, :-1].mT + weight[:, -1])                           # (P, width), the next layer's input
        means, squares = means + a.mean(0).square(), squares + a.square().mean(0)
    return means / squares


def controls(reference: Tensor, embed: Tensor | None = None, constant: Tensor | None = None, seed: int = 0, repeats: int = 5) -> dict[str, list[Tensor]]:
    """The bias column and the parts that it is compared with: {name: its bases U}, `repeats` of those that are drawn.

    A random set holds at least the bias column's centred energy, before the reader's input map or, with its weight embed
    (width, width + 1), after it. constant (width,): as `constancy`.
    """
    width = reference.shape[-1] - 1
    C = token_covariance(reference)
    eye = torch.eye(width + 1, dtype=reference.dtype, device=reference.device)
    maps = {"before": torch.eye(width + 1, dtype=C.dtype, device=C.device)} | ({"after": embed.double()} if embed is not None else {})
    named = {"bias column": [eye[:, -1:]], "column of highest energy": [eye[:, int(C.diagonal()[:-1].argmax())][:, None]]}
    if constant is not None:
        named["most constant column"] = [eye[:, int(constant.argmax())][:, None]]
    direction = F.pad(torch.linalg.eigh(C[:-1, :-1]).eigenvectors[:, -1], (0, 1))      # without the bias column, or it would be the bias column
    named["leading direction"] = [direction[:, None].to(reference.dtype)]
    for where, W in maps.items():
        inner, sets = W.mT @ W, []
        for r in range(repeats):
            order = torch.randperm(width, generator=train.generator("columns", where, r, seed)).to(C.device)
            D = (C * inner)[order][:, order]               # energy of a set: the sum of C_jl (W^T W)_jl over it
            energy = torch.stack([D[:m, :m].sum() for m in range(1, width + 1)])
            enough = torch.nonzero(energy >= (C * inner)[-1, -1]).flatten()
            sets.append(eye[:, order[:int(enough[0]) + 1 if len(enough) else width]])
        named[f"random columns, energy matched {where} the input map"] = sets
    return named


def energies(reference: Tensor, parts: dict[str, list[Tensor]], embed: Tensor | None = None) -> dict[str, list[float]]:
    """Each part's centred energy over the bias column's, before the reader's input map and after it; the mean of those drawn."""
    C = token_covariance(reference)
    found = {}
    for W in [torch.eye(len(C), dtype=C.dtype, device=C.device)] + ([embed.double()] if embed is not None else []):
        every = {name: float(np.mean([float(((U.T @ C @ U) * (W @ U).T.matmul(W @ U)).sum()) for U in (U.double() for U in bases)])) for name, bases in parts.items()}
        for name, energy in every.items():
            found.setdefault(name, []).append(energy / max(every["bias column"], 1e-300))
    return found


@torch.no_grad()
def predict(read, tokens: Tensor, change=None, rows: Tensor | None = None) -> Tensor:
    """Predictions (on the CPU) for tokens[rows] as change(tokens, their rows) makes them."""
    rows = torch.arange(len(tokens), device=tokens.device) if rows is None else rows
    return by_rows(lambda r: read(change(tokens[r], r) if change else tokens[r]).argmax(-1), rows, ROWS).cpu()


def donors(labels: Tensor, kind: str, *key) -> Tensor:
    """Another image for each, at random: "any" (a permutation without fixed points), one of the "same" class (the same, and an
    image that is alone in its class keeps its own), or one of an"other" class."""
    g, result = train.generator("donors", kind, *key), torch.arange(len(labels))
    labels = labels.cpu()
    for c in [None] if kind == "any" else labels.unique():
        rows = torch.arange(len(labels)) if c is None else torch.nonzero(labels == c).flatten()
        others = torch.nonzero(labels != c).flatten() if kind == "other" else None
        order = rows[torch.randperm(len(rows), generator=g)]
        if kind != "other":
            result[order] = order.roll(1)                  # one cycle
        elif len(others):
            result[rows] = others[torch.randint(len(others), (len(rows),), generator=g)]
    return result


RANKS = (1, 2, 4, 8)


def bias_route(read, tokens: Tensor, labels: Tensor, reference: Tensor, parts: dict[str, list[Tensor]], seed: int = 0, repeats: int = 5,
               embed: Tensor | None = None) -> dict:
    """What the reader loses when the bias column of every token is replaced, and what when matched controls are.

    tokens (q, T, width + 1) of test images, reference of training images (means, variances, principal components); parts as from
    `controls`, embed the input map's weight. Every loss is in accuracy over the same images, repeated for random choices (sd over
    the repeats); its interval is over images and repeats. Of random sets the low-rank controls take the first.
    """
    q, truth = len(tokens), labels.cpu()
    bias, mean = parts["bias column"][0], reference.mean(0)
    base = predict(read, tokens)
    right = (base == truth).double()
    rows, values = [], {}
    bar = tqdm(desc="bias route", leave=False, disable=None)

    def run(group: str, name: str, changes: list, images: Tensor | None = None) -> dict:
        """The mean over changes, each a function (tokens, rows) -> tokens; images: on those only."""
        guesses = []
        for change in changes:
            guesses.append(predict(read, tokens, change, images))
            bar.update()
        at = torch.arange(q) if images is None else images.cpu()
        hits = torch.stack([(guess == truth[at]).double() for guess in guesses], 1)    # (images, repeats)
        values[group, name] = torch.full((q, len(changes)), math.nan, dtype=torch.float64)
        values[group, name][at] = loss = right[at, None] - hits
        row = {"group": group, "name": name, "accuracy": float(hits.mean()), "loss": bootstrap(loss, over_repeats(seed), seed), "repeats": len(changes),
               "sd": float(loss.mean(0).std()) if len(changes) > 1 else None, "images": len(at)}
        rows.append(row)
        return row | {"guesses": guesses}

    def swap(U, order):
        return lambda x, r: put(x, tokens[order.to(r.device)[r]] @ U, U)

    any_donor = [donors(labels, "any", r, seed) for r in range(repeats)]
    own = tokens @ bias                                    # (q, T, 1)
    marginal = [torch.stack([own[torch.randperm(q, generator=g).to(own.device), t] for t in range(own.shape[1])], 1)
                for g in (train.generator("marginal", r, seed) for r in range(repeats))]
    b_mean, b_sd = (reference @ bias).mean(0), (reference @ bias).std(0, correction=0)
    normal = [b_mean + b_sd * torch.randn(own.shape, generator=train.generator("normal", r, seed)).to(own) for r in range(repeats)]
    run("replaced", "zero", [lambda x, r: put(x, torch.zeros_like(b_mean), bias)])
    run("replaced", "its train mean", [lambda x, r: put(x, b_mean, bias)])
    permuted = run("replaced", "another image's", [swap(bias, order) for order in any_donor])
    run("replaced", "each entry another image's", [lambda x, r, v=v: put(x, v[r], bias) for v in marginal])
    run("replaced", "Gaussian, same mean and variance", [lambda x, r, v=v: put(x, v[r], bias) for v in normal])
    run("replaced", "its negative", [lambda x, r: put(x, -(x @ bias), bias)])
    run("replaced", "another image's of the same class", [swap(bias, donors(labels, "same", r, seed)) for r in range(repeats)])
    other = [donors(labels, "other", r, seed) for r in range(repeats)]
    moved = run("replaced", "an image's of another class", [swap(bias, order) for order in other])
    drawn_to = torch.stack([(guess == truth[order]).double() - (base == truth[order]).double() for guess, order in zip(moved["guesses"], other)])
    run("kept", "only the bias column", [lambda x, r: put(mean.expand_as(x), x @ bias, bias)])
    run("kept", "all but the bias column", [lambda x, r: put(x, mean @ bias, bias)])

    def cut(U, r):
        """The part's values cut to r principal components of the reference, one vector an image."""
        m, components, _ = principals[id(U)]
        P = components[:, :r]

        def change(x, _):
            v = (x @ U).flatten(1) - m
            return put(x, (m + v @ P @ P.mT).view(len(x), -1, U.shape[1]), U)
        return change

    principals = {id(U): principal((reference @ U).flatten(1)) for bases in parts.values() for U in bases[:1]}
    variances = principals[id(bias)][2]
    shares = (variances.cumsum(0) / variances.sum()).tolist()
    for r in [0] + [2 ** i for i in range(20) if 2 ** i < len(variances)] + [len(variances)]:
        run("rank", f"bias column, rank {r}", [cut(bias, r)])
        rows[-1] |= {"rank": r, "energy": shares[r - 1] if r else 0.0}
    energy = energies(reference, parts, embed)
    for name, bases in parts.items():
        if name == "bias column":
            continue
        run("control", name, [swap(bases[i % len(bases)], order) for i, order in enumerate(any_donor)])
        rows[-1] |= {"columns": sum(U.shape[1] for U in bases) / len(bases), "energy_over_bias": energy[name]}
        theirs = principals[id(bases[0])][2]
        for r in [0, *(r for r in RANKS if r <= min(len(theirs), len(shares)))]:
            same = int(torch.searchsorted(theirs.cumsum(0) / theirs.sum(), shares[r - 1] - 1e-9)) + 1 if r else 0
            for title, rank in (("", r),) + ((" for the bias column's energy", min(same, len(theirs))),) * bool(r):
                run("low-rank control", f"{name}, rank {r}{title}", [cut(bases[0], rank)])
                rows[-1] |= {"part": name, "rank": rank, "as": r}
    width = tokens.shape[-1] - 1
    few = some(labels, 1000)
    eye = torch.eye(width + 1, dtype=tokens.dtype, device=tokens.device)
    singles = {str(j): run("single column", f"column {j}", [swap(eye[:, j:j + 1], any_donor[0])], few)["loss"][0]
               for j in torch.linspace(0, width - 1, min(64, width)).round().long().unique().tolist()}
    bar.close()
    bias_loss = values["replaced", "another image's"]
    bias_there = float(bias_loss[few.cpu()].mean())

    def against(names: list) -> tuple:
        """The bias column's loss minus the strongest control's, and which that was."""
        strongest, choices = crossed(torch.stack([values[key].expand(-1, repeats) for key in names], 1), seed)
        seen = ~strongest.isnan().any(1)
        return bootstrap((bias_loss - strongest)[seen], over_repeats(seed), seed), [names[c][1] for c in choices]

    margin, strongest = against([key for key in values if key[0] in ("control", "single column")])
    margin_matched, _ = against([key for key in values if key[0] == "control" and "matched" in key[1]])
    low, high = 100 * margin[1], 100 * margin[2]
    return {"rows": [row for row in rows if row["group"] != "single column"], "reader": float(right.mean()), "test": q, "classes": int(truth.max()) + 1,
            "reference": len(reference), "permuted": permuted["loss"], "margin": margin, "strongest": strongest, "margin_matched": margin_matched,
            "moved_to_donor": bootstrap(drawn_to.mean(0), seed=seed), "effective_rank": effective_rank(variances), "bias_entries": own.shape[1],
            "single_columns": {"images": len(few), "losses": singles, "bias": bias_there,
                               "bias_percentile": 100 * float(np.mean([loss < bias_there for loss in singles.values()]))},
            "verdict": "supported" if low > 2 else "refuted" if high < 0 else "not decided here"}


# ---- Content: what the route carries -------------------------------------------------------------------------------------

def image_facts(images: Tensor) -> dict[str, Tensor]:
    """What a low-dimensional route might carry, of images (n, C, size, size): each (n,). Parts that have no pixel (below 4 a side) give none."""
    n, channels, size, _ = images.shape
    grey = images.mean(1)
    colours = ("red", "green", "blue") if channels == 3 else ("grey",) if channels == 1 else tuple(f"channel {c + 1}" for c in range(channels))
    facts = {f"mean {colour}": images[:, c].mean((1, 2)) for c, colour in enumerate(colours)} | {"contrast": grey.std((1, 2), correction=0)}
    edge, half = size // 4, size // 2
    centre = torch.zeros(size, size, dtype=torch.bool, device=images.device)
    centre[edge:size - edge, edge:size - edge] = True
    facts["centre - surround"] = grey[:, centre].mean(1) - grey[:, ~centre].mean(1)
    facts["left - right"] = grey[:, :, :half].mean((1, 2)) - grey[:, :, size - half:].mean((1, 2))
    facts["top - bottom"] = grey[:, :half].mean((1, 2)) - grey[:, size - half:].mean((1, 2))
    wave = torch.cos(math.pi * torch.arange(3, device=images.device)[:, None] * (torch.arange(size, device=images.device) + 0.5) / size).to(grey)   # DCT-II
    for v, u in ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0)):
        facts[f"cosine, {v} down {u} across"] = torch.einsum("nyx,y,x->n", grey, wave[v], wave[u]) / size ** 2
    return {name: values for name, values in facts.items() if not values.isnan().any()}


def regression(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, seed: int = 0) -> list[tuple[float, float, float] | None]:
    """R^2 on test rows, with interval, of each column of y (n, m) regressed on x (n, r) by least squares with an intercept.
    R^2 = 1 - squared error / squared deviation from the test mean; None where y is constant there."""
    x, y, x_test, y_test = (z.double().cpu() for z in (x, y, x_test, y_test))
    mean, scale = moments(lambda: [x])
    x, x_test = (F.pad((z - mean) * scale, (0, 1), value=1.0) for z in (x, x_test))
    predicted = x_test @ torch.linalg.lstsq(x, y, driver="gelsd").solution
    result = []
    for j in range(y.shape[1]):
        t = y_test[:, j] - y_test[:, j].mean()
        values = torch.stack([(y_test[:, j] - predicted[:, j]).square(), t.square(), t], 1)
        r2 = lambda m: 1 - m[..., 0] / (m[..., 1] - m[..., 2].square())
        result.append(bootstrap(values, r2, seed) if float(t.square().mean()) > 1e-12 else None)
    return result


def mediation(read, fit, images: Tensor, tokens: Tensor, labels: Tensor, parts: dict[str, list[Tensor]], kind: str, seed: int = 0) -> dict:
    """Causal mediation (Pearl 2001; Vig et al. 2020) with the mean colour as treatment, donors of the "other" or "same" class.

    Total effect: the loss of accuracy when each image takes its donor's mean colour and is fitted again. Indirect effect of a
    part: the loss when only that part comes from the swapped fit. Restored: what its original values win back in the swapped
    tokens. Shares of the total effect; none where its interval holds 0. Pixels pushed out of [-1, 1] stay and are counted.
    """
    truth, colour = labels.cpu(), images.mean((2, 3), keepdim=True)
    swapped = images + colour[donors(labels, kind, "colour", seed).to(images.device)] - colour
    changed = fit_tokens(fit, swapped, f"fitting with the mean colour of {kind} class")
    right = (predict(read, tokens) == truth).double()
    after = (predict(read, changed) == truth).double()
    total = paired_bootstrap(right, after, seed)
    result = {"donors": kind, "total": total, "accuracy": float(after.mean()), "outside": float((swapped.abs() > 1).double().mean()), "parts": {}}
    for name, bases in parts.items():
        indirect = torch.stack([right - (predict(read, tokens, lambda x, r, U=U: put(x, changed[r] @ U, U)) == truth).double() for U in bases])
        restored = torch.stack([(predict(read, changed, lambda x, r, U=U: put(x, tokens[r] @ U, U)) == truth).double() - after for U in bases])
        row = {"indirect": bootstrap(indirect.mean(0), seed=seed), "restored": bootstrap(restored.mean(0), seed=seed), "repeats": len(bases),
               "indirect_sd": float(indirect.mean(1).std()) if len(bases) > 1 else None}
        for key, effect in (("share", indirect), ("share_restored", restored)):
            row[key] = bootstrap(torch.stack([effect.mean(0), right - after], 1), lambda m: m[..., 0] / m[..., 1], seed) if total[1] > 0 else None
        result["parts"][name] = row
    return result


@torch.no_grad()
def fit_tokens(fit, images: Tensor, title: str) -> Tensor:
    """Tokens (n, T, width + 1) of images (n, C, size, size), block by block."""
    fitted = (fit(x, b) for b, x in enumerate(tqdm(images.split(ROWS), title, leave=False, disable=None)))
    return torch.cat([tokens[0] if isinstance(tokens, tuple) else tokens for tokens in fitted])


def content(read, fit, test: Block, reference: Block, parts: dict[str, list[Tensor]], seed: int = 0) -> dict:
    """What the bias column carries, beside what its controls carry: linear regressions both ways between a part's first r principal
    components and facts of the image (fitted on the reference, scored on the test images; of random sets the first), and mediation by mean colour."""
    known, asked = image_facts(reference.images), image_facts(test.images)
    y, y_test = (torch.stack(list(f.values()), 1) for f in (known, asked))
    regressions = {}
    for name, bases in parts.items():
        mean, components, variances = principal((reference.tokens @ bases[0]).flatten(1))
        x, x_test = (((block.tokens @ bases[0]).flatten(1) - mean) @ components for block in (reference, test))
        to_facts = {str(r): dict(zip(known, regression(x[:, :r], y, x_test[:, :r], y_test, seed))) for r in sorted({min(r, x.shape[1]) for r in (*RANKS, 16)})}
        back = regression(y, x[:, :8], y_test, x_test[:, :8], seed)
        regressions[name] = {"to_facts": to_facts, "from_facts": back, "energy": (variances.cumsum(0) / variances.sum())[:16].tolist()}
    tokens = fit_tokens(fit, test.images, "fitting")       # again, since drawn pixels hang on the block an image is in
    return {"regressions": regressions, "mediation": [mediation(read, fit, test.images, tokens, test.labels, parts, kind, seed) for kind in ("other", "same")],
            "test": len(test.labels), "reference": len(reference.labels)}


# ---- Across models -------------------------------------------------------------------------------------------------------

ARCHITECTURE = ("dataset", "size", "train_size", "test_size", "val", "width", "depth", "omega", "steps", "shared_lr", "fraction", "reader_depth", "head_dim", "mlp_ratio", "token_scale",
                "readout", "branch", "centre_colour")


def points(models: list[dict]) -> list[dict]:
    """What the comparison takes from each model's report; architecture and setting are keys, the same for what is alike."""
    found = []
    for model in models:
        flags, e = model["training"] | {"init_from": bool(model["training"]["init_from"])}, model["experiments"]       # not the path: each seed has its own
        point = {"name": model["name"], "label": model.get("lane") or f"w_task {flags['w_task']:g}", "seed": flags["seed"], "w_task": flags["w_task"], "reader": model["reader"],
                 "architecture": json.dumps({key: flags[key] for key in ARCHITECTURE}),
                 "setting": json.dumps({key: value for key, value in flags.items() if key != "seed" and key not in train.FREE}),
                 "apart_from_w_task": json.dumps({key: value for key, value in flags.items() if key != "w_task" and key not in train.FREE})}
        if "clustering" in e:
            point |= {"purity": e["clustering"]["purity"], "gap": e["clustering"]["gap"][0], "whole_bank": e["clustering"]["whole_bank"]}
        if "token-flow" in e:
            point["stages"] = {row["stage"]: (row["pooled_purity"], row["pooled_knn10"]) for row in e["token-flow"]["rows"]}
            point |= {"late": e["token-flow"]["late_minus_half"][0], "rise": e["token-flow"]["rise"][0]}
        if "bias-route" in e:
            point |= {"margin": e["bias-route"]["margin"][0], "permuted": e["bias-route"]["permuted"][0]}
        found.append(point)
    return found


def side(interval, limit: float) -> int:
    """1: wholly above the limit, -1: below, 0: neither, or no interval."""
    return 0 if interval is None or interval[1] is None else int(interval[1] > limit) - int(interval[2] < limit)


def across(found: list[dict], seed: int = 0) -> dict:
    """The comparison across models, over the largest group of one architecture: correlations with reader accuracy,
    t intervals over the seeds of each setting that has three or more, purity with the class loss minus without, paired by seed."""
    architectures = [p["architecture"] for p in found]
    one = [p for p in found if p["architecture"] == max(architectures, key=architectures.count)]
    y, settings = [p["reader"] for p in one], [p["setting"] for p in one]
    result = {"points": found, "models": len(one), "others": len(found) - len(one), "correlations": {}, "seeds": [], "pairs": []}
    if all("purity" in p for p in one):
        columns = {"phi - theta": [p["purity"] for p in one]}
        result["correlations"]["purity"] = correlations(columns, y, settings, seed)
    if all("stages" in p for p in one):
        for i, key in enumerate(("purity", "knn10")):
            stages = {name: [p["stages"][name][i] for p in one] for name in one[0]["stages"]}
            first = {"phi - theta": [p["purity"] for p in one]} if i == 0 and all("purity" in p for p in one) else {}
            result["correlations"][f"stage {key}"] = correlations(first | stages, y, settings, seed)
    for setting in dict.fromkeys(settings):
        same = [p for p in one if p["setting"] == setting]
        if len({p["seed"] for p in same}) >= 3:
            result["seeds"].append({"models": [p["name"] for p in same], "label": same[0]["label"], "w_task": same[0]["w_task"], "n": len(same), "reader": t_interval([p["reader"] for p in same])}
                                   | {key: t_interval([p[key] for p in same]) for key in ("gap", "late", "rise", "margin", "purity") if all(key in p for p in same)})
    for w_task in sorted({p["w_task"] for p in one} - {0}):
        pairs = [(a["purity"], b["purity"]) for a in one for b in one
                 if a["w_task"] == w_task and b["w_task"] == 0 and a["apart_from_w_task"] == b["apart_from_w_task"] and "purity" in a and "purity" in b]
        if pairs:
            differences = [a - b for a, b in pairs]
            result["pairs"].append({"w_task": w_task, "n": len(pairs), "mean": float(np.mean(differences)), "interval": t_interval(differences)})
    result["verdicts"] = []
    for s in result["seeds"]:
        few = "too few models or settings of one architecture for correlations"
        if "gap" in s:
            rho = (result["correlations"].get("purity") or {}).get("spearman", {}).get("phi - theta")
            gap, low = side(s["gap"], 0.02), side(rho, 0.5)
            whole = all(p.get("whole_bank") for p in one if p["name"] in s["models"])
            verdict = "refuted" if gap < 0 or low > 0 else "supported" if gap > 0 and low < 0 and whole else "not decided here"
            result["verdicts"].append(f"C1, {s['label']}: {verdict}. Reader - best geometry {span(s['gap'], 100)} points over {s['n']} seeds (rule: > 2); "
                                      + (f"Spearman's rho(purity of phi - theta, accuracy) {span(rho, 1, 2)} over {len(one)} models (rule: < 0.5)" if rho else few))
        if "late" in s:
            rho = (result["correlations"].get("stage purity") or {}).get("spearman", {}).get("last - first") if "purity" in one[0] else None
            late, more = side(s["late"], 0) if side(s["rise"], 0) > 0 else 0, side(rho, 0)
            verdict = "refuted" if late < 0 or more < 0 else "supported" if late > 0 and more > 0 else "not decided here"
            result["verdicts"].append(f"C2, {s['label']}: {verdict}. Rise of 10-NN in the second half of the blocks - half of the rise {span(s['late'], 100)} points over {s['n']} seeds "
                                      f"(rule: > 0); " + (f"rho(purity at the last stage) - rho(purity of phi - theta) {span(rho, 1, 2)} (rule: > 0)" if rho else few))
        if "margin" in s:
            margin = s["margin"]
            verdict = "supported" if side(margin, 0.02) > 0 else "refuted" if side(margin, 0) < 0 else "not decided here"
            result["verdicts"].append(f"C3, {s['label']}: {verdict}. Loss with the bias column permuted - largest control {span(margin, 100)} points over {s['n']} seeds (rule: > 2, refuted < 0)")
    if not result["seeds"]:
        result["verdicts"].append("No setting has three seeds: nothing is said about the method, only about each checkpoint.")
    return result


# ---- Report --------------------------------------------------------------------------------------------------------------

def span(interval, factor: float = 1, digits: int = 1) -> str:
    """value [low, high]"""
    if interval is None:
        return "none"
    if interval[1] is None:
        return f"{factor * interval[0]:+.{digits}f} (no interval: too few settings)"
    value, low, high = (f"{factor * x:+.{digits}f}" for x in interval)
    return f"{value} [{low}, {high}]"


def percent(x: float | None) -> str:
    return "" if x is None else f"{100 * x:.1f}"


def clustering_table(result: dict) -> str:
    columns = {"knn1": "1-NN %", "knn10": "10-NN %", "nearest_mean": "mean %", "probe": "probe %", "knn10_shuffled": "shuffl.", "purity": "purity", "silhouette": "silh.", "fisher": "Fisher"}
    lines = [f"{'coordinate':30s}" + "".join(f"{title:>8s}" for title in columns.values())]
    for row in result["rows"]:
        values = [percent(row.get(key)) if key[:3] in ("knn", "nea", "pro") else "inf" if row[key] is None else f"{row[key]:.3f}" for key in columns]
        lines.append(f"{row['coordinate']:30s}" + "".join(f"{value:>8s}" for value in values))
    low, high = result["reader_interval"]
    lines.append(f"{'trained reader':30s}{100 * result['reader']:16.1f}  95% interval {100 * low:.1f} to {100 * high:.1f}")
    lines.append(f"bank {result['bank']}, probe fitted on {result['probe_images']}, test {result['test']} images; shuffl.: 10-NN, labels shuffled")
    lines.append("standardised, bias column, all but the bias column, cosine: of the hidden layers only")
    lines.append("10-NN on phi - theta by bank size: " + ", ".join(f"{n}: {100 * a:.1f}%" for n, a in result["knn10_by_bank"].items()))
    return "\n".join(lines)


def flow_table(result: dict) -> str:
    lines = [f"{'':13s}{'mean over tokens':^31s}{'flattened':^22s}{'untrained':^15s}{'AUROC':>18s}",
             f"{'stage':13s}" + "".join(f"{t:>8s}" for t in ("10-NN %", "probe %", "lens %")) + f"{'purity':>7s}"
             + "".join(f"{t:>{w}s}" for t, w in (("10-NN %", 8), ("probe %", 8), ("purity", 7), ("10-NN %", 8), ("purity", 7)))]
    for row in result["rows"]:
        cells = [percent(row.get(key)) if "purity" not in key else f"{row[key]:.3f}" if key in row else ""
                 for key in ("pooled_knn10", "pooled_probe", "logit_lens", "pooled_purity", "flattened_knn10", "flattened_probe", "flattened_purity", "untrained_pooled_knn10", "untrained_pooled_purity")]
        auc = f"{row['auroc'][0]:.2f} [{row['auroc'][1]:.2f}, {row['auroc'][2]:.2f}]" if row["auroc"] else ""
        lines.append(f"{row['stage']:13s}" + "".join(f"{c:>{w}s}" for c, w in zip(cells, (8, 8, 8, 7, 8, 8, 7, 8, 7))) + f"{auc:>18s}")
    lines.append(f"bank {result['bank']}, test {result['test']} images; lens: the head applied early; AUROC: does an image's purity (mean over tokens) tell whether it is read right")
    last = result["rows"][-1]
    lines.append(f"last stage, 10-NN with a bank of {result['half']}: training images {percent(last['seen_knn10'])}%, images never seen {percent(last['unseen_knn10'])}%")
    return "\n".join(lines)


def knock_out_table(rows: list[dict]) -> str:
    blocks = sorted({row["block"] for row in rows})
    lines = [f"{'loss of accuracy, points':24s}" + "".join(f"{f'block {b}':>9s}" for b in blocks)]
    for kind, span_ in dict.fromkeys((row["replaced"], row["span"]) for row in rows):
        cells = [f"{100 * row['loss'][0]:9.1f}" for b in blocks for row in rows if (row["replaced"], row["span"], row["block"]) == (kind, span_, b)]
        lines.append(f"{kind + (', on' if span_ != 'alone' else ''):24s}" + "".join(cells))
    return "\n".join(lines) + "\n', on': in this block and all later ones"


def bias_table(result: dict) -> str:
    lines = [f"{'loss of accuracy, points':48s}{'mean [95% interval]':>22s}{'sd':>6s}{'n':>4s}{'columns':>9s}{'energy':>11s}"]
    titles = {"replaced": "bias column replaced by", "kept": "all else at the train mean, kept", "control": "another part replaced by another image's", "rank": "bias column cut to its first principal components"}
    for group, title in titles.items():
        lines.append(title)
        for row in (row for row in result["rows"] if row["group"] == group):
            name = row["name"].replace("energy matched", "matched") + (f" ({100 * row['energy']:.0f}% of its variance)" if "energy" in row else "")
            size = f"{row['columns']:9.1f}{'/'.join(f'{e:.1f}' for e in row['energy_over_bias']):>11s}" if "columns" in row else ""
            lines.append(f"  {name:46s}{span(row['loss'], 100):>22s}{'' if row['sd'] is None else format(100 * row['sd'], '.1f'):>6s}{row['repeats']:4d}{size}")
    lines.append("n: repeats of random choices; energy: centred, over the bias column's, before / after the input map")
    singles = sorted(result["single_columns"]["losses"].values())
    lines.append(f"{len(singles)} single columns, another image's ({result['single_columns']['images']} images): loss {100 * singles[0]:+.1f} to {100 * singles[-1]:+.1f}, median {100 * singles[len(singles) // 2]:+.1f}; "
                 f"the bias column's {100 * result['single_columns']['bias']:+.1f}, above {result['single_columns']['bias_percentile']:.0f}% of them")
    return "\n".join(lines)


SHORT = {"column of highest energy": "highest col", "most constant column": "const. col", "leading direction": "direction",
         "random columns, energy matched before the input map": "rnd, before", "random columns, energy matched after the input map": "rnd, after"}


def at_rank(regression: dict, r: int) -> dict:
    """R^2 of each fact from r components, or from as many as there are."""
    return regression["to_facts"].get(str(r)) or list(regression["to_facts"].values())[-1]


def content_table(result: dict) -> str:
    names, r = list(result["regressions"]), 4
    lines = [f"{f'R2 from {r} components of':25s}" + "".join(f"{SHORT.get(name, name):>12s}" for name in names)]
    for fact in at_rank(result["regressions"][names[0]], 1):
        cells = [at_rank(reg, r)[fact] for reg in result["regressions"].values()]
        lines.append(f"{fact:25s}"[:25] + "".join(f"{'' if c is None else format(c[0], '.3f'):>12s}" for c in cells))
    lines.append("R2 from all facts to component 1, 2, 3, 4 of the bias column: " + ", ".join(f"{c[0]:.3f}" if c else "none" for c in result["regressions"]["bias column"]["from_facts"][:4]))
    for m in result["mediation"]:
        lines.append(f"mean colour of an image of {'another' if m['donors'] == 'other' else 'the same'} class: total effect {span(m['total'], 100)} points; {100 * m['outside']:.1f}% of the pixels beyond [-1, 1]")
        lines.append(f"  {'part put in or restored':24s}{'indirect, points':>22s}{'share':>26s}{'share restored':>26s}")
        for name, part in m["parts"].items():
            shares = "".join(f"{span(part[key], 1, 2) if part[key] else 'none':>26s}" for key in ("share", "share_restored"))
            lines.append(f"  {SHORT.get(name, name):24s}{span(part['indirect'], 100):>22s}{shares}")
        if not m["total"][1] > 0:
            lines.append("  no share of a total effect that may be 0")
    return "\n".join(lines)


def summary(model: dict) -> list[str]:
    """A dozen lines about one checkpoint, then one a claim."""
    e, verdicts = model["experiments"], []
    low, high = model["reader_interval"]
    lines = [f"reader accuracy {100 * model['reader']:.1f}% [{100 * low:.1f}, {100 * high:.1f}] on {model['test']} {model.get('evaluated_on', 'test images')}"
             + (" (the run is not finished)" if model.get("unfinished") else "")]
    if "clustering" in e:
        c = e["clustering"]
        rows = {row["coordinate"]: row for row in c["rows"]}
        lines.append(f"10-NN on pixels {percent(rows['pixels']['knn10'])}%, on phi - theta {percent(rows['phi - theta']['knn10'])}%, on the bias column {percent(rows['bias column']['knn10'])}%; labels shuffled {percent(rows['phi - theta']['knn10_shuffled'])}%"
                     if "pixels" in rows else f"10-NN on phi - theta {percent(rows['phi - theta']['knn10'])}%")
        lines.append(f"purity of phi - theta {c['purity']:.3f}, silhouette {rows['phi - theta']['silhouette']:.3f}")
        lines.append(f"reader - best geometry ({' / '.join(dict.fromkeys(c['best']))}) {span(c['gap'], 100)} points")
        end = {"first half holds": " (its second half needs several models)", "not decided here": "" if c["whole_bank"] else f" (a bank of {c['bank']} is only a part of the training set)"}.get(c["verdict"], "")
        verdicts.append(f"C1 {c['verdict'].replace(' here', '')} on this checkpoint{end}: reader - best geometry {span(c['gap'], 100)} points; rule: supported > 2, refuted < 2")
    if "token-flow" in e:
        f = e["token-flow"]
        first, last = f["rows"][1], f["rows"][-1]
        lines.append(f"10-NN on the mean token: {percent(f['rows'][0]['pooled_knn10'])}% at the input, {percent(first['pooled_knn10'])}% after the input map, {percent(last['pooled_knn10'])}% at the end; untrained {percent(last['untrained_pooled_knn10'])}%")
        lines.append(f"at the end, against a bank of {f['half']}: seen in training {percent(last['seen_knn10'])}%, never seen {percent(last['unseen_knn10'])}%")
        if last["auroc"]:
            lines.append(f"purity of a test image's neighbours tells whether it is read right: AUROC {last['auroc'][0]:.2f} [{last['auroc'][1]:.2f}, {last['auroc'][2]:.2f}] at the end, {f['rows'][0]['auroc'][0]:.2f} at the input")
        if f.get("knock_outs"):
            alone = max((r for r in f["knock_outs"] if r["span"] == "alone"), key=lambda r: r["loss"][0])
            every = max((r for r in f["knock_outs"] if r["span"] != "alone" and r["replaced"] == "attention: its mean"), key=lambda r: r["loss"][0])
            lines.append(f"dearest sub-block: {alone['replaced']} in block {alone['block']} costs {span(alone['loss'], 100)} points; all attention from block {every['block']} on at its mean {span(every['loss'], 100)}")
        verdicts.append(f"C2 {f['verdict'].replace(' here', '')} on this checkpoint{' (its first half needs several models)' if 'half' in f['verdict'] else ''}: rise of 10-NN over the untrained reader {span(f['rise'], 100)} points, in the second half of the blocks minus half of it "
                        f"{span(f['late_minus_half'], 100)}; rule: > 0, refuted < 0")
    if "bias-route" in e:
        b = e["bias-route"]
        by = {(row["group"], row["name"]): row for row in b["rows"]}
        lines.append(f"bias column permuted over images: loss {span(b['permuted'], 100)} points; strongest control ({' / '.join(dict.fromkeys(b['strongest']))}) "
                     + " / ".join(span(by["control", n]["loss"], 100) if ("control", n) in by else f"{100 * b['single_columns']['losses'][n.split()[1]]:+.1f}" for n in dict.fromkeys(b["strongest"])))
        same = "another image's of the same class"
        lines.append(f"same-class donor {span(by['replaced', same]['loss'], 100)}, other-class donor: predictions move to its class {span(b['moved_to_donor'], 100)} points over its base rate")
        ranks_ = [row for row in b["rows"] if row["group"] == "rank" and row["rank"] in (0, 1, 2, 4)]
        lines.append("bias vector cut to rank " + ", ".join(f"{row['rank']}: {percent(row['accuracy'])}%" for row in ranks_) + f"; effective rank {b['effective_rank']:.1f} of {b['bias_entries']}")
        verdicts.append(f"C3 {b['verdict'].replace(' here', '')} on this checkpoint: loss with the bias column permuted - strongest control {span(b['margin'], 100)} points; rule: supported > 2, refuted < 0"
                        + (f" (against the energy-matched sets alone {span(b['margin_matched'], 100)})" if "margin_matched" in b else ""))
    if "content" in e:
        c = e["content"]
        facts = {k: v for k, v in at_rank(c["regressions"]["bias column"], 4).items() if v}
        lines.append("four components of the bias column predict: " + ", ".join(f"{k} R2 {v[0]:.3f}" for k, v in sorted(facts.items(), key=lambda kv: -kv[1][0])[:4]))
        m = c["mediation"][0]
        part = m["parts"]["bias column"]
        lines.append(f"mean colour of another class's image: total effect {span(m['total'], 100)} points, by the bias column alone {span(part['indirect'], 100)}; share mediated {span(part['share'], 1, 2)}"
                     + (f"; of a same-class image {span(c['mediation'][1]['total'], 100)}"))
    return lines + [""] + verdicts + (["the intervals are over test images, of one checkpoint"] if verdicts else [])


# ---- Figures -------------------------------------------------------------------------------------------------------------

def canvas(rows: int, columns: int, width: float, height: float, **more):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    return figure, figure.subplots(rows, columns, squeeze=False, **more).flatten()


def bars(axis, names: list[str], intervals: list, styles: list | None = None):
    """Horizontal bars in points of accuracy, first on top, with their intervals; a missing one is empty."""
    for i, interval in enumerate(intervals):
        if interval is not None:
            value, low, high = (100 * x for x in interval)
            axis.barh(i, value, color=(styles or ["C0"] * len(names))[i], alpha=0.75)
            axis.plot([low, high], [i, i], color="black", linewidth=1.2)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.grid(axis="x", alpha=0.3)


def stage_axis(axis, stages: list[str]):
    axis.set_xticks(range(len(stages)), [s.replace("attention ", "A").replace("MLP ", "M").replace("gather ", "G").replace("queries ", "Q").replace(" tokens", "").replace("input map", "map") for s in stages], fontsize=8, rotation=0 if len(stages) < 12 else 60)
    axis.grid(alpha=0.3)


def clustering_figure(path: Path, result: dict):
    rows = result["rows"][::-1]
    figure, (axis,) = canvas(1, 1, 8, 1.8 + 0.36 * len(rows))
    for key, marker, label in (("knn1", "d", "nearest neighbour"), ("knn10", "o", "10 nearest neighbours"), ("nearest_mean", "s", "nearest class mean"), ("probe", "^", "linear probe"),
                               ("knn10_shuffled", "x", "10 nearest neighbours, labels shuffled")):
        if key in rows[0]:
            axis.plot([100 * row[key] for row in rows], range(len(rows)), marker, label=label)
    axis.axvline(100 * result["reader"], color="black", label="trained reader (band: 95% interval)")
    axis.axvspan(*(100 * x for x in result["reader_interval"]), color="black", alpha=0.12)
    axis.axvline(100 / result["classes"], color="grey", linestyle=":", label="chance")
    axis.set_yticks(range(len(rows)), [row["coordinate"] for row in rows])
    axis.set_xlabel("accuracy on test images (%)")
    axis.set_title(f"Classes by geometry of the weights; bank {result['bank']}, test {result['test']} images", fontsize=10)
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path)


def flow_lines(axis, result: dict, view: str, legend: bool = True):
    rows = result["rows"]
    for key, style, label in ((f"{view}_knn10", "o-", "10-NN"), (f"{view}_probe", "^-", "linear probe"), (f"untrained_{view}_knn10", "o:", "10-NN, untrained reader"),
                              (f"untrained_{view}_probe", "^:", "probe, untrained reader"), ("logit_lens", "s--", "head applied early")):
        if key in rows[-1] and rows[-1][key] is not None and (view == "pooled" or key != "logit_lens"):
            axis.plot([None if row[key] is None else 100 * row[key] for row in rows], style, markersize=4, label=label)
    axis.axhline(100 * result["reader"], color="black", linewidth=1, label="trained reader")
    axis.axhline(100 / result["classes"], color="grey", linestyle=":", label="chance")
    stage_axis(axis, [row["stage"] for row in rows])
    axis.set_ylabel("accuracy on test images (%)")
    if legend:
        axis.legend(fontsize=7)


def flow_figure(path: Path, result: dict):
    rows, stages = result["rows"], [row["stage"] for row in result["rows"]]
    knocked = result.get("knock_outs") or []
    figure, axes = canvas(3 if knocked else 2, 2, 12, 12 if knocked else 8)
    for axis, view, title in zip(axes, ("pooled", "flattened"), ("Mean over tokens", "All tokens, flattened")):
        if view in result["views"]:
            flow_lines(axis, result, view)
            axis.set_title(title, fontsize=10)
        else:
            axis.axis("off")
    for key, style, label in (("pooled_purity", "o-", "purity, mean over tokens"), ("flattened_purity", "s-", "purity, flattened"), ("untrained_pooled_purity", "o:", "purity, mean, untrained reader")):
        if key in rows[0]:
            axes[2].plot([row[key] for row in rows], style, markersize=4, label=label)
    if rows[0]["auroc"]:
        x = range(len(rows))
        axes[2].errorbar(x, [row["auroc"][0] for row in rows], yerr=[[row["auroc"][0] - row["auroc"][1] for row in rows], [row["auroc"][2] - row["auroc"][0] for row in rows]],
                         fmt="^--", markersize=4, color="C3", label="AUROC: purity tells right from wrong")
    axes[2].set_title("Neighbour purity among test images", fontsize=10)
    axes[2].set_ylabel("share of 10 neighbours; AUROC")
    for key, style, label in (("seen_knn10", "o-", "bank seen in training"), ("unseen_knn10", "s--", "bank never seen")):
        axes[3].plot([100 * row[key] for row in rows], style, markersize=4, label=label)
    axes[3].set_title(f"10-NN on the mean token, banks of {result['half']} images", fontsize=10)
    axes[3].set_ylabel("accuracy on half of the test images (%)")
    for axis in axes[2:4]:
        stage_axis(axis, stages)
        axis.legend(fontsize=7)
    for axis, where in zip(axes[4:], ("alone", "from here on")):
        for kind, style in zip(dict.fromkeys(row["replaced"] for row in knocked), ("o-", "s--", "^-.", "d:", "x-")):
            mine = [row for row in knocked if row["replaced"] == kind and row["span"] == where]
            axis.plot([row["block"] for row in mine], [100 * row["loss"][0] for row in mine], style, markersize=4, label=kind)
        axis.set_title("Replaced in one block" if where == "alone" else "Replaced in this block and all later ones", fontsize=10)
        axis.set_xlabel("block")
        axis.set_ylabel("loss of accuracy (points)")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    if knocked:
        axes[5].legend(fontsize=7)                         # of both
    figure.suptitle(f"Token flow: A, M: after the attention, the MLP of a block; bank {result['bank']}, test {result['test']} images", fontsize=11)
    figure.savefig(path)


def bias_figure(path: Path, result: dict):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 8.5), layout="constrained", dpi=120)
    left, right = figure.subfigures(1, 2, width_ratios=[1.15, 1])
    axis = left.subplots()
    shown = [row for row in result["rows"] if row["group"] in ("replaced", "kept", "control")]
    colours = {"replaced": "C0", "kept": "C2", "control": "C1"}
    label = {"replaced": "bias: ", "kept": "kept: ", "control": "control: "}
    bars(axis, [textwrap.fill(label[row["group"]] + row["name"], 34) for row in shown], [row["loss"] for row in shown], [colours[row["group"]] for row in shown])
    axis.set_xlabel("loss of accuracy (points; line: 95% interval)")
    axis.set_title("Replaced in every token; controls: by another image's", fontsize=10)
    top, bottom = right.subplots(2, 1)
    ranks_ = [row for row in result["rows"] if row["group"] == "rank"]
    top.plot(range(len(ranks_)), [100 * row["accuracy"] for row in ranks_], "o-", color="black", label="bias column")
    lows = [row for row in result["rows"] if row["group"] == "low-rank control" and "for the bias" not in row["name"]]
    for style, name in zip(("s--", "^--", "d--", "x:", "+:"), dict.fromkeys(row["part"] for row in lows)):
        mine = [row for row in lows if row["part"] == name]
        top.plot([[r["rank"] for r in ranks_].index(row["rank"]) for row in mine], [100 * row["accuracy"] for row in mine], style, markersize=4, label=SHORT.get(name, name))
    top.axhline(100 * result["reader"], color="grey", linewidth=1)
    top.set_xticks(range(len(ranks_)), [row["rank"] for row in ranks_], fontsize=8)
    top.set_xlabel("principal components kept, all else of the token untouched")
    top.set_ylabel("accuracy (%)")
    top.legend(fontsize=7, loc="lower right")
    top.set_title("Cut to rank r; grey: the reader", fontsize=10)
    top.grid(alpha=0.3)
    losses = [100 * x for x in result["single_columns"]["losses"].values()]
    bottom.hist(losses, bins=20, color="C1", alpha=0.75, label=f"{len(losses)} other columns")
    bottom.axvline(100 * result["single_columns"]["bias"], color="C0", linewidth=2, label="bias column")
    bottom.set_xlabel("loss of accuracy, one column permuted over images (points)")
    bottom.set_ylabel("columns")
    bottom.legend(fontsize=8)
    bottom.set_title(f"Single columns, {result['single_columns']['images']} images", fontsize=10)
    figure.savefig(path)


def content_figure(path: Path, result: dict):
    names = list(result["regressions"])
    figure, (left, right) = canvas(1, 2, 13, 6.4, width_ratios=[1.25, 1])
    tables = [at_rank(reg, 4) for reg in result["regressions"].values()]
    facts = list(tables[0])
    values = np.array([[math.nan if table[fact] is None else table[fact][0] for table in tables] for fact in facts])
    left.imshow(values.clip(0, 1), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i, j in itertools.product(range(len(facts)), range(len(names))):
        left.text(j, i, "none" if math.isnan(values[i, j]) else f"{round(values[i, j], 2) + 0.0:.2f}", ha="center", va="center", fontsize=8, color="white" if values[i, j] > 0.6 else "black")
    left.set_xticks(range(len(names)), [textwrap.fill(name, 13) for name in names], fontsize=7.5)
    left.set_yticks(range(len(facts)), facts, fontsize=8)
    left.set_title("R² on test images, from 4 principal components of a part", fontsize=10)
    labels, intervals, colours = [], [], []
    for m in result["mediation"]:
        who = "another class" if m["donors"] == "other" else "the same class"
        gap = [""] if labels else []
        labels, intervals, colours = labels + gap + [f"{who}: total effect"], intervals + [None] * len(gap) + [m["total"]], colours + ["black"] * (1 + len(gap))
        for name, part in m["parts"].items():
            labels.append(textwrap.fill(name, 30))
            intervals.append(part["indirect"])
            colours.append("C0" if name == "bias column" else "C1")
    bars(right, labels, intervals, colours)
    right.set_xlabel("loss of accuracy (points; line: 95% interval)")
    right.set_title("Mean colour from an image of …; then only one part from it", fontsize=10)
    figure.savefig(path)


def summary_figure(path: Path, model: dict):
    e, count = model["experiments"], len(model["experiments"])
    figure, axes = canvas(2 if count > 2 else 1, min(count, 2), 12 if count > 1 else 6.5, 9 if count > 2 else 4.8)
    axes = list(axes)
    if "clustering" in e:
        c, axis = e["clustering"], axes.pop(0)
        rows = {row["coordinate"]: row for row in c["rows"]}
        names = [name for name in ("pixels", "phi - theta", "bias column", "all but the bias column", "after the reader's input map") if name in rows]
        axis.barh(range(len(names) + 2), [100 * rows[name]["knn10"] for name in names] + [100 * c["best_accuracy"], 100 * c["reader"]], color=["C1"] * len(names) + ["C2", "C0"], alpha=0.75)
        axis.set_yticks(range(len(names) + 2), [f"10-NN, {name}" for name in names] + ["best geometry of the weights", "trained reader"], fontsize=8)
        axis.invert_yaxis()
        axis.axvline(100 / c["classes"], color="black", linestyle=":")
        axis.set_xlabel("accuracy on test images (%); dotted: chance")
        axis.set_title(f"Do the weights cluster?\nreader - best geometry {span(c['gap'], 100)}: C1 {c['verdict']}", fontsize=10)
    if "token-flow" in e:
        f, axis = e["token-flow"], axes.pop(0)
        flow_lines(axis, f, "pooled")
        axis.set_xlabel("stage; A, M: after a block's attention, MLP")
        axis.set_title(f"Where do classes come apart? (mean token)\nlate rise - half {span(f['late_minus_half'], 100)}: C2 {f['verdict']}", fontsize=10)
    if "bias-route" in e:
        b, axis = e["bias-route"], axes.pop(0)
        shown = [row for row in b["rows"] if row["group"] == "control"]
        singles = b["single_columns"]["losses"]
        worst = max(singles.values())
        bars(axis, ["bias column", *(textwrap.fill(row["name"], 30) for row in shown), f"largest of {len(singles)} single columns"], [b["permuted"], *(row["loss"] for row in shown), (worst,) * 3],
             ["C0"] + ["C1"] * (len(shown) + 1))
        axis.set_xlabel("loss of accuracy, permuted over images (points)")
        axis.set_title(f"Is the bias column a route of its own?\nloss - strongest control's {span(b['margin'], 100)}: C3 {b['verdict']}", fontsize=10)
    if "content" in e:
        c, axis = e["content"], axes.pop(0)
        m = c["mediation"][0]
        names = list(m["parts"])
        bars(axis, ["total effect", *(textwrap.fill(name, 30) for name in names)], [m["total"], *(m["parts"][name]["indirect"] for name in names)], ["black"] + ["C0"] + ["C1"] * (len(names) - 1))
        axis.set_xlabel("loss of accuracy (points)")
        share = m["parts"]["bias column"]["share"]
        axis.set_title("What does it carry? Mean colour swapped\n" + (f"share through the bias column {span(share, 1, 2)}" if share else "no clear total effect: no share"), fontsize=10)
    for axis in axes:
        axis.axis("off")
    figure.suptitle(f"{model['name']}: reader {100 * model['reader']:.1f}% on {model['test']} {model.get('evaluated_on', 'test images')}, {model['data']}", fontsize=11)
    figure.savefig(path)


def models_figure(path: Path, result: dict):
    found = result["points"]
    most = max([p["architecture"] for p in found], key=[p["architecture"] for p in found].count)
    stages = [(key, label, result["correlations"][key]) for key, label in (("stage purity", "purity"), ("stage knn10", "10-NN accuracy")) if result["correlations"].get(key)]
    figure, (left, *right) = canvas(1, 1 + bool(stages), 7 + 6 * bool(stages), 4.8)
    labels = list(dict.fromkeys(p["label"] for p in found))
    for label, marker in zip(labels, itertools.cycle("os^dvP*X<")):           # nine, and ten colours: no two labels alike
        mine = [p for p in found if p["label"] == label and "purity" in p]
        left.scatter([p["purity"] for p in mine], [100 * p["reader"] for p in mine], marker=marker, label=label,
                     facecolors=[f"C{labels.index(label) % 10}" if p["architecture"] == most else "none" for p in mine], edgecolors=f"C{labels.index(label) % 10}")
    left.set_xlabel("neighbour purity of phi - theta")
    left.set_ylabel("reader accuracy (%)")
    left.legend(fontsize=8 if len(labels) < 8 else 6, **({"loc": "upper left", "bbox_to_anchor": (1, 1)} if len(labels) >= 8 else {}))
    left.grid(alpha=0.3)
    c = (result["correlations"].get("purity") or {}).get("spearman", {}).get("phi - theta")
    left.set_title("Models (hollow: another architecture)\n" + (f"Spearman's rho {span(c, 1, 2)}" if c else "too few for a correlation"), fontsize=10)
    names = ["phi - theta"] + [name for name in (stages[0][2]["spearman"] if stages else ()) if name not in ("last - first", "phi - theta")]
    for k, ((key, label, c), style) in enumerate(zip(stages, ("o-", "s--"))):
        y = np.array([c["spearman"].get(name, (None,) * 3) for name in names], dtype=float)            # no interval: NaN
        right[0].errorbar(np.arange(len(names)) + 0.12 * k, y[:, 0], yerr=np.abs(y[:, 1:].T - y[:, 0]), fmt=style, markersize=4, capsize=2, label=f"{label}, mean over tokens")
        stage_axis(right[0], names)
        right[0].legend(fontsize=8)
        right[0].set_ylabel("Spearman's rho with reader accuracy")
        right[0].set_title(f"By stage of the reader, {result['models']} models of one architecture"
                           + ("" if c["settings"] >= 5 else f"\nno intervals: {c['settings']} settings"), fontsize=10)
    figure.savefig(path)


# ---- Command line --------------------------------------------------------------------------------------------------------

EXPERIMENTS = ("clustering", "token-flow", "bias-route", "content")
DRAW = {"clustering": ("clustering.png", clustering_figure), "token-flow": ("token_flow.png", flow_figure), "bias-route": ("bias_route.png", bias_figure),
        "content": ("content.png", content_figure)}


def parser() -> train.Parser:
    p = train.Parser(prog="diagnostics.py", description=__doc__.split("\n\n")[0])
    p.add_argument("--ckpt", nargs="+", required=True, help="checkpoints of runs of train.py; several are also compared")
    p.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), help="experiments (default all)", metavar="EXPERIMENT")
    p.add_argument("--samples", type=train.whole(24), help="bank: so many training images, the same share of each class (default all)")
    p.add_argument("--repeats", type=train.whole(1), default=5, help="draws of each random choice (default 5)")
    p.add_argument("--seed", type=train.whole(0), default=0, help="of random choices and intervals (default 0)")
    p.add_argument("--dataset", help="look at other data than the checkpoint was trained on")
    p.add_argument("--data-root", help="folder of the downloaded data sets (default: the run's)")
    p.add_argument("--device", default="auto", help="auto (CUDA if there is one), or a torch device (default auto)")
    p.add_argument("--out", help="folder for the reports and figures (default: the first checkpoint's name + -diagnostics)")
    return p


def fitter(model: train.MWT):
    """`fit` of a model: images, number of the block -> (tokens, first layer of phi - theta). Drawn pixels are the same each time."""
    points = max(1, int(model.fraction * len(model.coords)))

    @torch.no_grad()
    def fit(images: Tensor, block: int = 0):
        pixels = model.draw(model.inner_loop.steps, len(images), train.generator("diagnostics", block, device=images.device))
        few = max(1, (train.EVAL_POINTS if images.is_cuda else 1 << 12) // points)     # on the CPU what the caches hold
        parts = [model.adapt(x, pixels=None if pixels is None else pixels[:, i * few:(i + 1) * few]) for i, x in enumerate(images.split(few))]
        return torch.cat([model.tokens(phi) for phi in parts]), torch.cat([(phi.first - model.siren.first) for phi in parts])
    return fit


def bank_and_queries(fit, data: train.Images, test: train.Images, device, workers: int) -> tuple[Fits, Fits]:
    """Both fitted, and kept as far as memory goes."""
    give_back()
    queries = Fits(fit, test, MEMORY, device, workers)
    for _ in queries.blocks():                             # the test images are looked at most often, so they are kept first
        pass
    bank = Fits(fit, data, max(0, MEMORY - queries.bytes - (1 << 27)), device, workers)
    for _ in bank.blocks():
        pass
    return bank, queries


def looked_at(args, flags):
    """The settings of the data to look at: the run's, unless --dataset names others, which are taken whole."""
    other = {"dataset": flags.dataset, "train_size": None, "test_size": None, "val": 0.0} if flags.dataset not in (None, args.dataset) else {}
    return argparse.Namespace(**vars(args) | other | ({"data_root": flags.data_root} if flags.data_root else {}))


def diagnose(path: str, flags, device: torch.device, write) -> dict:
    """One checkpoint's report; write(report) is called after each experiment."""
    model, args = train.load_checkpoint(path, device)
    model.bf16 = False                                     # experiments compare small differences
    model.eval().requires_grad_(False)
    seen = looked_at(args, flags)
    data, test = train.load_dataset(seen, device)
    every = len(data)
    if flags.samples and flags.samples < every:
        data = data.take(some(data.labels, flags.samples))
    fit, read = fitter(model), model.read
    bank, queries = bank_and_queries(fit, data, test, device, args.workers)
    reference = bank if len(bank) <= REFERENCE else bank.take(some(bank.labels, REFERENCE))
    if not reference.bytes and reference.data is not None:
        reference.keep = 1 << 30
    give_back()
    logits = torch.cat([by_rows(read, block.tokens, FEW) for block in queries.blocks()])
    if not torch.isfinite(logits).all():
        raise train.InputError(f"{path}: a damaged checkpoint: its fits or predictions are not finite")
    predictions = logits.argmax(-1).cpu()
    right = int((predictions == queries.labels.cpu()).sum())
    if args.branch == "colour":
        print(f"{path}: its branch for the mean colour is left out: what follows is about what the reader gets from the weights", flush=True)
    report = {"name": Path(path).stem, "checkpoint": path, "command": train.command_line(args), "training": vars(args), "data": seen.dataset, "test": len(test), "bank": len(data),
              "evaluated_on": "held-out training images" if seen.val else "test images", "unfinished": "progress" in train.read_checkpoint(path),
              "reader": right / len(test), "reader_interval": train.wilson(right, len(test)), "experiments": {}}
    done = report["experiments"]
    if "clustering" in flags.only:
        stem = copy.deepcopy(model.reader)
        stem.blocks = nn.ModuleList()
        coordinates = weight_coordinates(bank, args.depth, model.siren.hidden.flatten(0, 1), model.reader.beta, lambda tokens: stem(tokens, flow=True)[1][0])
        done["clustering"] = clustering(coordinates, bank, queries, predictions, reference, len(data) == every, flags.seed)
        write(report)
    if "token-flow" in flags.only:
        null = train.build_model(args, data.channels, len(data.classes)).reader.to(device).requires_grad_(False)
        done["token-flow"] = token_flow(read, null, bank, queries, reference, model.reader.head, flags.seed)
    if set(flags.only) - {"clustering"}:
        # From here on one tensor holds all that is looked at: as many images as a gigabyte has room for.
        room = max(100, (1 << 30) // (4 * model.reader.beta.numel()))
        small = (queries if len(queries) <= room else queries.take(some(queries.labels, room))).whole()
        known = (reference if len(reference) <= room else reference.take(some(reference.labels, room))).whole()
        queries.kept, bank.kept = {}, {}
    if "token-flow" in flags.only:
        done["token-flow"]["knock_outs"] = knock_outs(model.reader, small.tokens, small.labels, known.tokens, flags.seed)
        write(report)
    if {"bias-route", "content"} & set(flags.only):
        parts = controls(known.tokens, model.reader.embed.weight, constancy(model.siren, model.coords), flags.seed, flags.repeats)
    if "bias-route" in flags.only:
        done["bias-route"] = bias_route(read, small.tokens, small.labels, known.tokens, parts, flags.seed, flags.repeats, model.reader.embed.weight)
        write(report)
    if "content" in flags.only:
        done["content"] = content(read, fit, small, known, parts, flags.seed)
        write(report)
    return report


def tables(model: dict) -> str:
    e = model["experiments"]
    text = [clustering_table(e["clustering"])] if "clustering" in e else []
    if "token-flow" in e:
        text += [flow_table(e["token-flow"]), knock_out_table(e["token-flow"]["knock_outs"])]
    text += [bias_table(e["bias-route"])] if "bias-route" in e else []
    text += [content_table(e["content"])] if "content" in e else []
    return fold("\n\n".join([*text, "\n".join(summary(model))]))


def fold(text: str) -> str:
    """Lines of at most 100 columns."""
    return "\n".join(line if len(line) <= 100 else textwrap.fill(line, 100, subsequent_indent="  ") for line in text.split("\n"))


def run(argv: list[str] | None):
    flags = parser().parse_args(argv)
    device = train.find_device(flags.device)
    if len(set(map(os.path.abspath, flags.ckpt))) < len(flags.ckpt):
        raise train.InputError("--ckpt: the same checkpoint twice")
    runs = {}
    for path in flags.ckpt:                                # all of them before any work
        content_ = train.read_checkpoint(path)
        args = train.load_checkpoint(path, "cpu")[1]
        same = runs.setdefault(json.dumps({key: value for key, value in vars(args).items() if key not in train.FREE}), path)
        if same != path:
            raise train.InputError(f"--ckpt: {same} and {path} are the same run: the same settings and seed")
        seen = looked_at(args, flags)
        data, test = train.load_dataset(seen, "cpu", train=False)
        if min(len(data), len(test)) < 24 or len(test.labels.unique()) < 2 or len(data.labels.unique()) < 2:
            raise train.InputError(f"{path}: {len(data)} bank and {len(test)} test images: 10 neighbours of half of them need at least 24 of each, of two classes")
        if flags.samples and flags.samples > len(data):
            raise train.InputError(f"--samples {flags.samples}: {path} has only {len(data)} training images")
        if train.facts(test)[:2] != content_["data"][:2]:
            raise train.InputError(f"--dataset {seen.dataset}: other channels or classes than {path} was trained on")
    out = Path(flags.out or str(Path(flags.ckpt[0]).with_suffix("")) + "-diagnostics")
    if out.exists() and not out.is_dir() or not out.parent.is_dir():
        raise train.InputError(f"--out {out}: not a folder that can be made")
    names = [Path(path).stem for path in flags.ckpt]
    folders = [out if len(names) == 1 else out / (name if names.count(name) == 1 else f"{name}-{i + 1}") for i, name in enumerate(names)]
    figures = [name for name, _ in DRAW.values()] + ["summary.png"]
    for folder in dict.fromkeys([out, *folders]):
        for name in ("", "report.json", *figures):
            try:
                train.touch(folder / name) if name else folder.mkdir(exist_ok=True)
            except OSError as error:
                raise train.InputError(f"--out {out}: {folder / name} cannot be written ({error.strerror})") from error
    about = train.environment(device) | {"command": shlex.join(["python", "diagnostics.py", *(sys.argv[1:] if argv is None else argv)]), "flags": vars(flags)}
    models = []
    for path, folder in zip(flags.ckpt, folders):
        def write(report: dict):
            save(folder / "report.json", about | {"model": report})

        model = diagnose(path, flags, device, write)
        model["summary"] = summary(model)
        write(model)
        for key, result in model["experiments"].items():
            DRAW[key][1](folder / DRAW[key][0], result)
        summary_figure(folder / "summary.png", model)
        for name in {name for key, (name, _) in DRAW.items() if key not in model["experiments"]}:
            (folder / name).unlink(missing_ok=True)        # an earlier run's, no part of this report
        print((f"== {path}\n\n" if len(flags.ckpt) > 1 else "") + tables(model) + f"\nwrote {folder}/report.json and figures\n", flush=True)
        models.append(model)
    if len(models) > 1:
        result = across(points(models), flags.seed)
        save(out / "report.json", about | {"across": result})
        models_figure(out / "models.png", result)
        print(models_table(result) + f"\nwrote {out}/report.json and models.png")


def models_table(result: dict) -> str:
    lines = [f"{'model':28s}{'w_task':>8s}{'reader %':>9s}{'purity':>8s}{'gap':>7s}{'late':>7s}{'bias loss':>10s}{'margin':>8s}"]
    for p in result["points"]:
        cells = [f"{p['w_task']:g}", percent(p["reader"]), f"{p['purity']:.3f}" if "purity" in p else "", *(format(100 * p[key], "+.1f") if key in p else "" for key in ("gap", "late", "permuted", "margin"))]
        lines.append(f"{p['name'][:27]:28s}" + "".join(f"{c:>{w}s}" for c, w in zip(cells, (8, 9, 8, 7, 7, 10, 8))))
    lines.append("gap: reader - best geometry; late: rise of 10-NN in the second half of the blocks - half of the rise; bias loss: bias column "
                 "permuted; margin: bias loss - the strongest control's; all in points of accuracy")
    for pair in result["pairs"]:
        lines.append(f"purity of phi - theta, w_task {pair['w_task']:g} minus 0, same seeds: {pair['mean']:+.4f}" + (f" [{pair['interval'][1]:+.4f}, {pair['interval'][2]:+.4f}], n = {pair['n']}" if pair["interval"] else " (one seed)"))
    for key, c in result["correlations"].items():
        lines.append(f"rho with reader accuracy, {key}: " + (", ".join(f"{name} {value[0]:+.2f}" for name, value in c["spearman"].items()) + f" (Spearman, {c['n']} models, {c['settings']} settings)" if c else "too few models or settings"))
    return fold("\n".join([*lines, *result["verdicts"]]))


def save(path: Path, content: dict):
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


def main(argv: list[str] | None = None):
    """Exit status: 0, 2 bad input, 130 interrupted."""
    try:
        run(argv)
    except (train.InputError, KeyboardInterrupt) as error:
        print(f"diagnostics.py: {'error: ' if isinstance(error, train.InputError) else ''}{str(error) or 'interrupted'}", file=sys.stderr)
        raise SystemExit(getattr(error, "status", 130)) from None


if __name__ == "__main__":
    main()
