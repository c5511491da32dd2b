"""Do the rows of a matrix cluster by class, can simple classifiers tell the classes, how surely?

    x, labels = torch.randn(1000, 64), torch.randint(10, (1000,))
    neighbor_purity(x, labels), silhouette(x, labels), fisher_ratio(x, labels)
    bank, bank_labels, queries, its_labels = x[:800], labels[:800], x[800:], labels[800:]
    linear_probe(bank, bank_labels, queries, its_labels)
    wilson(45, 50), t_interval([0.61, 0.64, 0.60]), paired_bootstrap(right_a, right_b)

x is (n, d), a bank (n, d), queries (q, d); labels, (n,) or (q,), are integers from 0. Distances are
Euclidean, intervals (low, high) are 95% intervals. A ValueError in one line says what has the wrong
shape, is not finite or is too small. The file needs torch and numpy alone: copy it.
"""
import functools
import math

import numpy as np
import torch
import torch.nn.functional as F

BLOCK = 2**24           # distances that are held at a time: 64 MB in float32
ENDS = torch.tensor([0.025, 0.975], dtype=torch.float64)


def check(x, labels, rows=1, classes=1):
    """x as float32 (float64 stays) and labels as int64; a ValueError if they will not do."""
    x, labels = x.detach(), labels.detach()
    if x.dim() != 2 or x.shape[1] == 0 or labels.shape != x.shape[:1]:
        raise ValueError(f"x {tuple(x.shape)} and labels {tuple(labels.shape)}: not (n, d), (n,)")
    if len(x) < rows:
        raise ValueError(f"{len(x)} rows, but {rows} are needed")
    if labels.is_floating_point() or labels.min() < 0:
        raise ValueError("labels must be integers from 0")
    if len(labels.unique()) < classes:
        raise ValueError(f"fewer than the {classes} classes that are needed")
    x = x if x.dtype == torch.float64 else x.float()
    if not x.norm().isfinite():
        raise ValueError("x holds values that are not finite, or too large to be squared")
    return x, labels.long()


def check_bank(bank, bank_labels, queries, rows=1, classes=1):
    """As `check`, and the queries as the bank's type."""
    bank, bank_labels = check(bank, bank_labels, rows, classes)
    queries, _ = check(queries, torch.zeros(queries.shape[:1], dtype=torch.long))
    if queries.shape[1] != bank.shape[1]:
        raise ValueError(f"a bank of {bank.shape[1]} features, queries of {queries.shape[1]}")
    return bank, bank_labels, queries.to(bank.dtype)


def accuracy(predicted, labels) -> float:
    """Share of predictions that are right; both (q,)."""
    if labels.shape != predicted.shape or labels.is_floating_point():
        raise ValueError(f"{len(predicted)} queries need as many labels, integers")
    return (predicted == labels).double().mean().item()


def chance(labels) -> float:
    """Accuracy of who always says the most frequent class."""
    return torch.bincount(labels).max().item() / len(labels)


# ---- Neighbours ----

def squared_distances(bank, queries):
    """Yields, block by block, a first query's number and squared distances (rows, n) from it on.

    |y - x|^2 = |y|^2 + |x|^2 - 2 y.x, one matrix product. Rounding grows with |y|^2 + |x|^2: so the
    bank's mean is subtracted first, and what is no more than rounding counts 0.
    """
    mean = bank.mean(0)
    bank = bank - mean
    lengths = bank.square().sum(1)  # (n,)
    rounding = 16 * torch.finfo(bank.dtype).eps
    rows = max(1, BLOCK // len(bank))
    for start in range(0, len(queries), rows):
        y = queries[start:start + rows] - mean  # (rows, d)
        sums = y.square().sum(1, keepdim=True) + lengths  # (rows, n)
        distances = torch.addmm(sums, y, bank.T, alpha=-2)
        yield start, distances.masked_fill_(distances < rounding * sums, 0)


def nearest(bank, queries=None, k=10):
    """Row numbers (q, k) of each query's k nearest bank rows, nearest first.

    Without queries: of each bank row, among the others. Equal distances are in order of the rows,
    but which of those equal to the k-th topk takes, it does not promise.
    """
    alone = queries is None
    queries = bank if alone else queries
    if not 1 <= k <= len(bank) - alone:
        raise ValueError(f"{k} neighbours asked of {len(bank) - alone} rows")
    found = []
    for start, distances in squared_distances(bank, queries):
        if alone:
            distances.diagonal(start).fill_(math.inf)
        index = distances.topk(k, largest=False).indices.sort(1).values
        order = distances.gather(1, index).argsort(dim=1, stable=True)
        found.append(index.gather(1, order))
    return torch.cat(found)


def vote(neighbor_labels, classes):
    """The most frequent (q,) of labels (q, k); a tied vote goes to the smallest label."""
    votes = neighbor_labels.new_zeros(len(neighbor_labels), classes)
    votes.scatter_add_(1, neighbor_labels, torch.ones_like(neighbor_labels))
    return votes.argmax(1)  # the first of equal ones


def knn_predict(bank, bank_labels, queries, k=10):
    """`vote` (q,) of the k nearest bank rows (Cover & Hart 1967)."""
    bank, bank_labels, queries = check_bank(bank, bank_labels, queries, rows=k)
    present, index = bank_labels.unique(return_inverse=True)
    return present[vote(index[nearest(bank, queries, k)], len(present))]


def knn_accuracy(bank, bank_labels, queries, labels, k=10) -> float:
    return accuracy(knn_predict(bank, bank_labels, queries, k), labels)


def purity(x, labels, k=10):
    """Share (n,) of each row's k nearest other rows that have its label."""
    x, labels = check(x, labels, rows=k + 1)
    return (labels[nearest(x, k=k)] == labels[:, None]).double().mean(1)


def neighbor_purity(x, labels, k=10) -> float:
    return purity(x, labels, k).mean().item()


def silhouettes(x, labels):
    """(b - a) / max(a, b) of each row (n,) (Rousseeuw, J. Comput. Appl. Math. 1987): a is the mean
    distance to the other rows of its class, b to the nearest other class. Alone in its class: 0."""
    x, labels = check(x, labels, classes=2)
    _, labels = labels.unique(return_inverse=True)
    member = F.one_hot(labels).to(x.dtype)  # (n, classes)
    sums = []
    for start, distances in squared_distances(x, x):
        distances.diagonal(start).fill_(0)
        sums.append(distances.sqrt_() @ member)
    sums = torch.cat(sums).double()  # (n, classes)
    sizes = member.sum(0).double()  # (classes,)
    others = sizes[labels] - 1  # (n,)
    own = labels[:, None]
    a = sums.gather(1, own).squeeze(1) / others.clamp_min(1)
    b = (sums / sizes).scatter(1, own, math.inf).amin(1)
    larger = torch.maximum(a, b)
    return torch.where((others > 0) & (larger > 0), (b - a) / larger, 0.0)


def silhouette(x, labels) -> float:
    return silhouettes(x, labels).mean().item()


# ---- Class means ----

def class_means(x, labels, classes):
    """Mean of each class's rows (classes, d); NaN for a class without rows."""
    sums = x.new_zeros(classes, x.shape[1]).index_add_(0, labels, x)
    return sums / torch.bincount(labels, minlength=classes)[:, None]


def fisher_ratio(x, labels) -> float:
    """Trace of the between-class over trace of the within-class scatter (Fukunaga 1990, ch. 10);
    0 where the class means are equal, infinity where no class has any spread."""
    x, labels = check(x, labels, classes=2)
    x = x.double()
    present, labels = labels.unique(return_inverse=True)
    means = class_means(x, labels, len(present))[labels]  # each row's class mean (n, d)
    between = (means - x.mean(0)).square().sum().item()
    within = (x - means).square().sum().item()
    rounding = 1e-24 * x.square().sum().item()
    if between <= rounding:
        return 0.0
    return between / within if within > rounding else math.inf


def nearest_mean_predict(bank, bank_labels, queries):
    """The bank's class (q,) whose mean is nearest; the smallest label of equally near ones."""
    bank, bank_labels, queries = check_bank(bank, bank_labels, queries)
    present, index = bank_labels.unique(return_inverse=True)
    means = class_means(bank, index, len(present))
    return present[torch.cat([d.argmin(1) for _, d in squared_distances(means, queries)])]


def nearest_mean_accuracy(bank, bank_labels, queries, labels) -> float:
    return accuracy(nearest_mean_predict(bank, bank_labels, queries), labels)


# ---- Trained classifiers ----

PENALTIES = (0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)  # times d: a feature twice changes nothing
DECAYS = (1.0, 1e-2, 1e-4)  # of the MLP probe's weights


def standardizer(x):
    """Mean and 1 / standard deviation (d,) of the features; 0 for the latter of a constant one."""
    deviation, mean = torch.std_mean(x, dim=0, correction=0)
    return mean, torch.where(deviation > 1e-7 * mean.abs(), 1 / deviation, 0.0)


def fit_linear(x, labels, classes, penalty, start=None):
    """Multinomial logistic regression, a torch.nn.Linear: the least mean cross-entropy +
    penalty * d / 2 |weight|^2, by L-BFGS (Nocedal 1980) from the layer `start` or from zero."""
    layer = torch.nn.utils.skip_init(torch.nn.Linear, x.shape[1], classes).to(x)
    if start:
        layer.load_state_dict(start.state_dict())
    else:
        layer.weight.data.zero_(), layer.bias.data.zero_()
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
        rows = rows.to(x.device)
        F.cross_entropy(mlp(x[rows]), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return mlp.requires_grad_(False)


def fit_probe(fit, settings, bank, bank_labels, queries):
    """Labels (q,) by a classifier of standardised features (Alain & Bengio 2016), and its accuracy
    on a held-out fifth of the bank (every fifth row, class by class), the rest of it fitted.

    fit(x, labels, classes, setting, start): `fit_linear` or `fit_mlp`. The setting, of `settings`
    from strong to weak, has the least cross-entropy on the held-out fifth; the first that is no
    better ends the search. With it, all of the bank is fitted.
    """
    bank, bank_labels, queries = check_bank(bank, bank_labels, queries, classes=2)
    present, index = bank_labels.unique(return_inverse=True)
    held = torch.zeros_like(index, dtype=torch.bool)
    held[index.argsort(stable=True)[4::5]] = True
    order = held.long().argsort(stable=True)  # the held-out rows last
    n = len(bank) - int(held.sum())
    mean, scale = standardizer(bank)
    x, y = bank[order].sub_(mean).mul_(scale), index[order]

    best = layer = None
    least = held_out = math.inf
    for setting in settings:
        layer = fit(x[:n], y[:n], len(present), setting, layer)
        logits = layer(x[n:])  # (held out, classes)
        loss = F.cross_entropy(logits, y[n:]).item()
        if best is not None and not loss < least:
            break
        best, least, held_out = (setting, layer), loss, accuracy(logits.argmax(1), y[n:])
    layer = fit(x, y, len(present), *best)
    return present[layer((queries - mean) * scale).argmax(1)], held_out


def linear_probe(bank, bank_labels, queries, labels) -> float:
    """Accuracy of logistic regression, its penalty as `fit_probe` chooses it."""
    return accuracy(fit_probe(fit_linear, PENALTIES, bank, bank_labels, queries)[0], labels)


def mlp_probe(bank, bank_labels, queries, labels) -> float:
    """Accuracy of a network of two layers, its weight decay as `fit_probe` chooses it."""
    return accuracy(fit_probe(fit_mlp, DECAYS, bank, bank_labels, queries)[0], labels)


# ---- Intervals ----

def wilson(correct, n, z=1.959964):
    """Interval of a proportion (Wilson, JASA 1927)."""
    if not 0 <= correct <= n or n == 0:
        raise ValueError(f"{correct} of {n} is no proportion")
    p = correct / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


@functools.lru_cache(maxsize=2)
def multiplicities(n, seed, draws):
    """How often each of n rows is drawn (draws, n), n rows with replacement at a time."""
    drawn = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(draws, n, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(counts))


def first_mean(means):
    return means[..., 0]


def bootstrap(values, statistic=first_mean, seed=0, draws=2000):
    """(value, low, high) of a statistic of the column means of values (n,) or (n, m), percentiles
    over rows drawn again (Efron 1979). statistic: column means (..., m) -> (...)."""
    values = values.double().cpu()
    values = values[:, None] if values.dim() == 1 else values
    means = multiplicities(len(values), seed, draws) @ values / len(values)  # (draws, m)
    return statistic(values.mean(0)).item(), *statistic(means).nanquantile(ENDS).tolist()


def paired_bootstrap(a, b, seed=0):
    """(value, low, high) of the mean of a - b, (n,) each, of the same n images."""
    return bootstrap(a.double() - b.double(), seed=seed)


def over_repeats(seed=0):
    """A statistic for `bootstrap`, where columns are repeats of a random choice: their mean, with
    repeats drawn again as well as rows."""
    def statistic(means):
        if means.dim() == 1:
            return means.mean()
        g = torch.Generator().manual_seed(seed + 10**9)  # not as the rows are drawn
        drawn = torch.randint(means.shape[1], means.shape, generator=g)
        return means.gather(1, drawn).mean(1)

    return statistic


def crossed(values, seed=0):
    """The best of m candidates without flattery: its values (n, ...), and the numbers of the two
    that were chosen. values (n, m, ...): of the candidates on n images; on one half of the images
    the one with the largest mean is chosen, on the other measured, both ways. NaN: not measured."""
    values = values.double()
    halves = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed)).chunk(2)
    picked = torch.full_like(values[:, 0], math.nan)
    choices = []
    for measured, other in (halves, halves[::-1]):
        means = values[other].nanmean(0).view(values.shape[1], -1).mean(1)  # (m,)
        choices.append(int(means.argmax()))
        picked[measured] = values[measured, choices[-1]]
    return picked, choices


@functools.lru_cache
def student(freedom):
    """t from 0 (m,), and Student's distribution function there, by the integral of its density."""
    t, step = np.linspace(0, 700, 700_001, retstep=True)
    n = freedom + 1
    log_constant = math.lgamma(n / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
    density = np.exp(log_constant - n / 2 * np.log1p(t**2 / freedom))
    area = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * step)])
    return t, 0.5 + area


def t_quantile(freedom, level=0.975) -> float:
    t, distribution = student(freedom)
    return float(np.interp(level, distribution, t))


def t_interval(values):
    """(mean, low, high) of independent values (Student 1908); None for fewer than two."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return None
    mean = float(values.mean())
    half = t_quantile(len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def t_test(values) -> float:
    """Two-sided p of a mean of 0, of two independent values or more."""
    values = np.asarray(values, dtype=float)
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    if error == 0:
        return float(values.mean() == 0)
    t, distribution = student(len(values) - 1)
    return 2 * (1 - float(np.interp(abs(values.mean()) / error, t, distribution)))


def holm(p) -> list[float]:
    """p values that allow for their number (Holm 1979): below 0.05 all together at 5%."""
    adjusted, largest = [0.0] * len(p), 0.0
    for place, i in enumerate(np.argsort(p)):
        largest = max(largest, min(1.0, (len(p) - place) * p[i]))
        adjusted[i] = largest
    return adjusted


# ---- Ranks and correlations ----

def ranks(x):
    """Ranks from 1 (n,); equal values share their mean rank."""
    _, place, counts = x.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[place]


def auroc(score, right):
    """(value, low, high) of the probability that a right row scores above a wrong one, ties half
    (DeLong et al., Biometrics 1988); rows (n,). None where all are right or all wrong."""
    right, score = right.bool(), score.double()
    high, low = score[right].sort().values, score[~right].sort().values
    if not len(high) or not len(low):
        return None
    above, below = ((torch.searchsorted(other, x) + torch.searchsorted(other, x, right=True)) / 2.0
                    for x, other in ((high, low), (low, high)))
    value = above.double().mean().item() / len(low)
    spread = [x.double().var(correction=0).item() / len(other) ** 2 / len(x)
              for x, other in ((above, low), (below, high))]
    half = 1.959964 * math.sqrt(sum(spread))
    return value, max(0.0, value - half), min(1.0, value + half)


def spearman(x, y, settings, seed=0, draws=2000):
    """(rho, low, high) of ranks of x and y (n,), over n models (Spearman 1904). Whole settings are
    drawn again: seeds of one are no independent models. None for fewer than five models or a
    constant x or y; without low and high below five settings."""
    pairs = torch.tensor([list(x), list(y)], dtype=torch.float64)  # (2, n)
    if pairs.shape[1] < 5 or (pairs.amax(1) == pairs.amin(1)).any():
        return None

    def rho(rows):
        return torch.corrcoef(torch.stack([ranks(values[rows]) for values in pairs]))[0, 1]

    groups = [torch.tensor([i for i, setting in enumerate(settings) if setting == group])
              for group in dict.fromkeys(settings)]
    value = rho(torch.arange(pairs.shape[1])).item()
    if len(groups) < 5:
        return value, None, None
    g = torch.Generator().manual_seed(seed)
    drawn = [rho(torch.cat([groups[i] for i in torch.randint(len(groups), (len(groups),),
                                                             generator=g)]))
             for _ in range(draws)]
    return value, *torch.stack(drawn).nanquantile(ENDS).tolist()


# ---- Components and regression ----

def principal(x):
    """Mean (d,), principal components (d, r) by falling variance, and their variances
    (r,) of rows (n, d) of rank r."""
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
    """R^2 (m,) on test rows of each column of y (n, m) regressed on x (n, r) by least squares with
    an intercept; NaN for a column that is constant on the test."""
    x, y, x_test, y_test = (z.double().cpu() for z in (x, y, x_test, y_test))
    mean, scale = standardizer(x)
    x, x_test = (F.pad((z - mean) * scale, (0, 1), value=1.0) for z in (x, x_test))
    solution = torch.linalg.lstsq(x, y, driver="gelsd").solution  # (r + 1, m)
    error = (y_test - x_test @ solution).square().mean(0)
    variance = y_test.var(0, correction=0)
    return torch.where(variance > 1e-12, 1 - error / variance, math.nan)


# ---- Pressure to cluster ----

def supervised_contrastive(x, labels, temperature=0.1):
    """A loss that pulls rows of one label together (Khosla et al., NeurIPS 2020, equation 2, with
    no projection head): with z the rows at length 1, the mean over rows i of
    -1/|P(i)| sum_{p in P(i)} log(exp(z_i z_p / t) / sum_{a != i} exp(z_i z_a / t)), P(i) the other
    rows of i's label. Rows that have none are left out; 0 if all are."""
    z = F.normalize(x, dim=1)
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_p = (z @ z.T / temperature).masked_fill(own, -math.inf).log_softmax(1)  # (n, n)
    positive = (labels[:, None] == labels) & ~own
    count = positive.sum(1)
    rows = log_p.masked_fill(~positive, 0).sum(1) / count.clamp_min(1)
    return -rows.sum() / (count > 0).sum().clamp_min(1)
