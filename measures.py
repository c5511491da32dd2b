"""Do the rows of a matrix cluster by class, can simple classifiers tell the classes, how surely?

    x, labels = torch.randn(1000, 64), torch.randint(10, (1000,))
    neighbor_purity(x, labels), silhouette(x, labels), fisher_ratio(x, labels)
    linear_probe(x[:800], labels[:800], x[800:], labels[800:])
    wilson(45, 50), t_interval([0.61, 0.64, 0.60]), paired_bootstrap(right_a, right_b)

x is (n, d), a bank (n, d), queries (q, d), of floats; labels, (n,) or (q,), are integers from 0.
Distances are Euclidean, intervals (low, high) are of 95%. Needs torch and numpy alone: copy it.
"""
import functools
import math

import numpy as np
import torch
import torch.nn.functional as F

BLOCK = 2**24  # distances that are held at a time: 64 MB in float32
ENDS = torch.tensor([0.025, 0.975], dtype=torch.float64)


def check(x, labels, rows=1):
    """A ValueError for what would give a number without meaning."""
    if x.dim() != 2 or labels.shape != x.shape[:1] or len(x) < rows or not x.norm().isfinite():
        raise ValueError(f"x {tuple(x.shape)}, labels {tuple(labels.shape)}: not (n, d), (n,) with "
                         f"n >= {rows}, or not finite")


def accuracy(predicted, labels) -> float:
    """Share of predictions that are right; both (q,)."""
    return (predicted == labels).double().mean().item()


def chance(labels) -> float:
    """Accuracy of who always says the most frequent class."""
    return torch.bincount(labels).max().item() / len(labels)


# ---- Geometry ----

def squared_distances(bank, queries=None, own=0.0):
    """Yields squared distances (rows, n) of blocks of queries to the bank's rows: |y|^2 + |x|^2 -
    2 y.x of what is less the bank's mean, which keeps rounding small. Without queries: of the
    bank's rows to each other, `own` to themselves."""
    mean, alone = bank.mean(0), queries is None
    bank = bank - mean
    queries = bank if alone else queries - mean
    squares, rows = bank.square().sum(1), max(1, BLOCK // len(bank))  # (n,)
    for start in range(0, len(queries), rows):
        y = queries[start:start + rows]  # (rows, d)
        distances = torch.addmm(y.square().sum(1, keepdim=True) + squares, y, bank.T, alpha=-2)
        if alone:
            distances.diagonal(start).fill_(own)
        yield distances.clamp_min_(0)


def nearest(bank, queries=None, k=10):
    """Row numbers (q, k) of each query's k nearest bank rows, nearest first. Without queries: of
    each bank row, among the others."""
    return torch.cat([distances.topk(k, largest=False).indices
                      for distances in squared_distances(bank, queries, own=math.inf)])


def vote(neighbor_labels, classes):
    """The most frequent (q,) of labels (q, k); a tied vote goes to the smallest label."""
    return F.one_hot(neighbor_labels, classes).sum(1).argmax(1)  # the first of equal ones


def knn_predict(bank, bank_labels, queries, k=10):
    """`vote` (q,) of the k nearest bank rows (Cover & Hart 1967)."""
    check(bank, bank_labels, rows=k)
    return vote(bank_labels[nearest(bank, queries, k)], int(bank_labels.max()) + 1)


def knn_accuracy(bank, bank_labels, queries, labels, k=10) -> float:
    return accuracy(knn_predict(bank, bank_labels, queries, k), labels)


def purity(x, labels, k=10):
    """Share (n,) of each row's k nearest other rows that have its label."""
    check(x, labels, rows=k + 1)
    return (labels[nearest(x, k=k)] == labels[:, None]).double().mean(1)


def neighbor_purity(x, labels, k=10) -> float:
    return purity(x, labels, k).mean().item()


def silhouettes(x, labels):
    """(b - a) / max(a, b) of each row (n,) (Rousseeuw 1987): a is the mean distance to the others
    of its class, b to the nearest other class. Alone in its class: 0."""
    check(x, labels)
    labels = labels.unique(return_inverse=True)[1]  # without gaps
    member = F.one_hot(labels).to(x)  # (n, classes)
    sums = torch.cat([squares.sqrt_() @ member for squares in squared_distances(x)]).double()
    sizes, own = member.sum(0).double(), labels[:, None]  # (classes,), (n, 1)
    a = sums.gather(1, own).squeeze(1) / (sizes[labels] - 1)
    b = (sums / sizes).scatter(1, own, math.inf).amin(1)
    return ((b - a) / torch.maximum(a, b)).nan_to_num(0)


def silhouette(x, labels) -> float:
    return silhouettes(x, labels).mean().item()


def class_means(x, labels):
    """Labels that occur (classes,), their rows' means (classes, d), each row's place there (n,)."""
    present, index = labels.unique(return_inverse=True)
    sums = x.new_zeros(len(present), x.shape[1]).index_add_(0, index, x)
    return present, sums / torch.bincount(index)[:, None], index


def fisher_ratio(x, labels) -> float:
    """Trace of the between-class over that of the within-class scatter (Fukunaga 1990); infinity
    where no class has any spread, 0 where nothing has."""
    check(x, labels)
    x = x.double()
    _, means, index = class_means(x, labels)
    means = means[index]  # each row's (n, d)
    ratio = (means - x.mean(0)).square().sum() / (x - means).square().sum()
    return ratio.nan_to_num(0, math.inf).item()


def nearest_mean_predict(bank, bank_labels, queries):
    """The bank's class (q,) whose mean is nearest; the smallest label of equally near ones."""
    check(bank, bank_labels)
    present, means, _ = class_means(bank, bank_labels)
    return present[torch.cat([d.argmin(1) for d in squared_distances(means, queries)])]


def nearest_mean_accuracy(bank, bank_labels, queries, labels) -> float:
    return accuracy(nearest_mean_predict(bank, bank_labels, queries), labels)


# ---- Clusters ----

def kmeans(x, k, g, steps=50):
    """Cluster (n,) of each row of x (n, d): Lloyd's steps, so many or until nothing moves, from a
    start by k-means++."""
    def nearest_centre(centres):
        return torch.cat([*squared_distances(centres, x)]).min(1)

    centres = x[torch.randint(len(x), (1,), generator=g)]
    while len(centres) < k:
        chances = nearest_centre(centres).values.double().cpu() + 1e-12
        centres = torch.cat([centres, x[torch.multinomial(chances, 1, generator=g)]])
    for _ in range(steps):
        member = F.one_hot(nearest_centre(centres).indices, k).to(x)  # (n, k)
        means = member.T @ x / member.sum(0).clamp_min(1)[:, None]
        before, centres = centres, torch.where(member.any(0)[:, None], means, centres)
        if torch.equal(before, centres):
            break
    return nearest_centre(centres).indices


def adjusted_rand(a, b) -> float:
    """Agreement of two clusterings (n,): 1 the same, 0 as by chance (Hubert & Arabie 1985)."""
    table = F.one_hot(a).double().T @ F.one_hot(b).double()
    together, rows, columns, pairs = (float((n * (n - 1) / 2).sum()) for n in (
        table, table.sum(1), table.sum(0), table.sum()))
    expected = rows * columns / pairs
    return (together - expected) / ((rows + columns) / 2 - expected)


# ---- Trained classifiers ----

PENALTIES = (0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)  # times d: a feature twice changes nothing
DECAYS = (1.0, 1e-2, 1e-4)  # of the MLP probe's weights


def fit_linear(x, labels, classes, penalty, start=None):
    """Multinomial logistic regression, a torch.nn.Linear: the least mean cross-entropy +
    penalty * d / 2 |weight|^2, by L-BFGS (Nocedal 1980) from the layer `start` or from zero."""
    layer = torch.nn.utils.skip_init(torch.nn.Linear, x.shape[1], classes).to(x)
    for name, value in layer.named_parameters():
        value.data.copy_(getattr(start, name) if start else torch.zeros_like(value))
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=50, tolerance_grad=1e-6,
                                  tolerance_change=1e-6, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(x), labels)
        loss = loss + penalty * x.shape[1] / 2 * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return layer.requires_grad_(False)


def fit_mlp(x, labels, classes, decay, start=None):
    """Two layers, 256 GELU units, a torch.nn.Module: AdamW (1e-3, cosine decay, weight decay), 20
    epochs of batches of 128, always the same draws; `start` is not used."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mlp = torch.nn.Sequential(torch.nn.Linear(x.shape[1], 256), torch.nn.GELU(),
                                  torch.nn.Linear(256, classes)).to(x)
        batches = [rows for _ in range(20) for rows in torch.randperm(len(x)).split(128)]
    optimizer = torch.optim.AdamW(mlp.parameters(), 1e-3, weight_decay=decay, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for rows in batches:
        F.cross_entropy(mlp(x[rows]), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return mlp.requires_grad_(False)


def fit_probe(fit, settings, bank, bank_labels, queries):
    """Labels (q,) by a classifier of standardised features (Alain & Bengio 2016), and its accuracy
    on a held-out fifth of the bank (every fifth row, class by class).

    fit: `fit_linear` or `fit_mlp`. Of its settings, from strong to weak, the one of the least
    cross-entropy on the held-out fifth is taken; the first that is no better ends the search. With
    it all of the bank is fitted."""
    check(bank, bank_labels, rows=5)
    classes, held = int(bank_labels.max()) + 1, torch.zeros_like(bank_labels)
    held[bank_labels.argsort(stable=True)[4::5]] = 1
    order, n = held.argsort(stable=True), int((held == 0).sum())  # the held-out rows last
    deviation, mean = torch.std_mean(bank, dim=0, correction=0)
    scale = torch.where(deviation > 1e-7 * mean.abs(), 1 / deviation, 0.0)  # 0: constant
    x, y = bank[order].sub_(mean).mul_(scale), bank_labels[order]

    best = layer = None
    least = math.inf
    for setting in settings:
        layer = fit(x[:n], y[:n], classes, setting, layer)
        logits = layer(x[n:])  # (held out, classes)
        loss = F.cross_entropy(logits, y[n:]).item()
        if loss >= least:
            break
        best, least, held_out = (setting, layer), loss, accuracy(logits.argmax(1), y[n:])
    layer = fit(x, y, classes, *best)
    return layer((queries - mean) * scale).argmax(1), held_out


def linear_probe(bank, bank_labels, queries, labels) -> float:
    return accuracy(fit_probe(fit_linear, PENALTIES, bank, bank_labels, queries)[0], labels)


def mlp_probe(bank, bank_labels, queries, labels) -> float:
    return accuracy(fit_probe(fit_mlp, DECAYS, bank, bank_labels, queries)[0], labels)


# ---- Intervals ----

def wilson(correct, n, z=1.959964):
    """Interval of a proportion (Wilson, JASA 1927)."""
    p = correct / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(p * (1 - p) / n + (z / (2 * n))**2) / (1 + z**2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


@functools.lru_cache(maxsize=2)  # every interval over the same images asks again
def multiplicities(n, seed, draws):
    """How often each of n rows is drawn (draws, n), n rows with replacement at a time."""
    drawn = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed))
    return torch.stack([torch.bincount(rows, minlength=n) for rows in drawn]).double()


def bootstrap(values, statistic=lambda means: means[..., 0], seed=0, draws=2000):
    """(value, low, high) of a statistic of the column means of values (n,) or (n, m), percentiles
    over rows drawn again (Efron 1979). statistic: column means (..., m) -> (...)."""
    values = values.double().cpu().reshape(len(values), -1)
    means = multiplicities(len(values), seed, draws) @ values / len(values)  # (draws, m)
    return statistic(values.mean(0)).item(), *statistic(means).nanquantile(ENDS).tolist()


def paired_bootstrap(a, b, seed=0):
    """(value, low, high) of the mean of a - b, (n,) each, of the same n images."""
    return bootstrap(a.double() - b.double(), seed=seed)


def over_repeats(seed=0):
    """A statistic for `bootstrap` where columns are repeats of a random choice: their mean, with
    repeats drawn again as well as rows."""
    def statistic(means):
        if means.dim() == 1:
            return means.mean()
        g = torch.Generator().manual_seed(seed + 10**9)  # not as the rows are drawn
        return means.gather(1, torch.randint(means.shape[1], means.shape, generator=g)).mean(1)

    return statistic


def crossed(values, seed=0):
    """The best of m candidates without flattery: chosen by its mean on one half of n images,
    measured on the other, both ways. values (n, m, ...), NaN: not measured -> (n, ...), and the
    numbers of the two that were chosen."""
    values = values.double()
    halves = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed)).chunk(2)
    picked, choices = torch.empty_like(values[:, 0]), []
    for measured, other in (halves, halves[::-1]):
        means = values[other].nanmean(0).view(values.shape[1], -1).mean(1)  # (m,)
        choices.append(int(means.argmax()))
        picked[measured] = values[measured, choices[-1]]
    return picked, choices


@functools.lru_cache
def student(freedom):
    """Angles u from 0 to pi / 2, and the probability that |t| < sqrt(freedom) tan u, for t of
    Student's distribution: u then has a density like cos(u)^(freedom - 1)."""
    u = np.linspace(0, math.pi / 2, 100_001)
    density = np.cos(u) ** (freedom - 1)
    area = np.cumsum(density) - (density + density[0]) / 2  # trapezoids
    return u, area / area[-1]


def t_quantile(freedom, level=0.975) -> float:
    u, within = student(freedom)
    return math.sqrt(freedom) * math.tan(np.interp(2 * level - 1, within, u))


def mean_and_error(values):
    """Of independent values, two or more."""
    values = np.asarray(values, dtype=float)
    return float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))


def t_interval(values):
    """(mean, low, high) of independent values (Student 1908); None for fewer than two."""
    if len(values) < 2:
        return None
    mean, error = mean_and_error(values)
    half = t_quantile(len(values) - 1) * error
    return mean, mean - half, mean + half


def t_test(values) -> float:
    """Two-sided p of a mean of 0, of two independent values or more."""
    (mean, error), freedom = mean_and_error(values), len(values) - 1
    u = math.atan2(abs(mean), error * math.sqrt(freedom))
    return 1 - float(np.interp(u, *student(freedom)))


def holm(p) -> list[float]:
    """p values that allow for their number (Holm 1979): below 0.05 all together at 5%."""
    order = np.argsort(p)
    adjusted = np.maximum.accumulate(np.arange(len(p), 0, -1) * np.asarray(p)[order]).clip(max=1)
    return adjusted[np.argsort(order)].tolist()


# ---- Correlations ----

def spearman(x, y, settings, seed=0, draws=2000):
    """(rho, low, high) of ranks of x and y, over models (Spearman 1904). Whole settings are drawn
    again: seeds of one are no independent models. None for fewer than five models or a constant x
    or y; low and high are None below five settings."""
    pairs = torch.tensor([list(x), list(y)], dtype=torch.float64)  # (2, n)
    if pairs.shape[1] < 5 or (pairs.amax(1) == pairs.amin(1)).any():
        return None
    groups = [torch.tensor([i for i, each in enumerate(settings) if each == setting])
              for setting in dict.fromkeys(settings)]

    def rho(rows):
        values = pairs[:, rows]
        ranks = torch.sign(values[:, :, None] - values[:, None]).sum(2)  # those below - those above
        return torch.corrcoef(ranks)[0, 1]

    value, n, g = rho(slice(None)).item(), len(groups), torch.Generator().manual_seed(seed)
    if n < 5:
        return value, None, None
    drawn = [rho(torch.cat([groups[i] for i in torch.randint(n, (n,), generator=g)]))
             for _ in range(draws)]
    return value, *torch.stack(drawn).nanquantile(ENDS).tolist()


# ---- Components and regression ----

def principal(x):
    """Mean (d,), principal components (d, r) and their falling variances (r,) of rows (n, d)."""
    mean = x.mean(0)
    centred = (x - mean).double()
    wide = x.shape[0] < x.shape[1]
    gram = centred @ centred.T if wide else centred.T @ centred  # the smaller one
    squares, vectors = torch.linalg.eigh(gram)
    kept = (squares > 1e-12 * squares[-1]).nonzero().squeeze(1).flip(0)
    components = vectors[:, kept]
    if wide:
        components = centred.T @ components / squares[kept].sqrt()
    return mean, components.to(x.dtype), squares[kept] / len(x)


def effective_rank(variances) -> float:
    """exp of the entropy of the shares of variance (Roy & Vetterli 2007)."""
    return torch.special.entr(variances / variances.sum()).sum().exp().item()


def regression(x, y, x_test, y_test):
    """R^2 (m,) on test rows of the columns of y (n, m), each by least squares of x (n, r) with an
    intercept; NaN for a column that is constant there."""
    x, y, x_test, y_test = (z.double().cpu() for z in (x, y, x_test, y_test))
    x, x_test = (F.pad(z, (0, 1), value=1.0) for z in (x, x_test))
    solution = torch.linalg.lstsq(x, y, driver="gelsd").solution  # (r + 1, m)
    error = (y_test - x_test @ solution).square().mean(0)
    variance = y_test.var(0, correction=0)
    return torch.where(variance > 1e-12, 1 - error / variance, math.nan)


# ---- Pressure to cluster ----

def supervised_contrastive(x, labels, temperature=0.1):
    """A loss that pulls rows of one label together (Khosla et al., NeurIPS 2020, equation 2): the
    mean, over a row's others of its label, of -log softmax over all others of cosine / temperature;
    then over rows, without those that are alone."""
    z = F.normalize(x, dim=1)
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_p = (z @ z.T / temperature).masked_fill(own, -math.inf).log_softmax(1)  # (n, n)
    positive = (labels[:, None] == labels) & ~own
    count = positive.sum(1)
    rows = log_p.masked_fill(~positive, 0).sum(1) / count.clamp_min(1)
    return -rows.sum() / (count > 0).sum().clamp_min(1)
