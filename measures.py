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
BLOCK_ROWS = 256        # rows that are made float64 at a time
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
    """Mean of each class's rows (classes, d), float64; NaN for a class without rows."""
    sums = torch.zeros(classes, x.shape[1], dtype=torch.float64, device=x.device)
    for rows, row_labels in zip(x.split(BLOCK_ROWS), labels.split(BLOCK_ROWS)):
        sums.index_add_(0, row_labels, rows.double())
    return sums / torch.bincount(labels, minlength=classes)[:, None]


def fisher_ratio(x, labels) -> float:
    """Trace of the between-class over trace of the within-class scatter (Fukunaga 1990, ch. 10);
    0 where the class means are equal, infinity where no class has any spread."""
    x, labels = check(x, labels, classes=2)
    present, labels = labels.unique(return_inverse=True)
    sizes = torch.bincount(labels)[:, None]  # (classes, 1)
    means = class_means(x, labels, len(present))  # (classes, d)
    mean = (sizes * means).sum(0) / len(x)
    between = (sizes * (means - mean).square()).sum().item()
    within = total = 0.0
    for rows, row_labels in zip(x.split(BLOCK_ROWS), labels.split(BLOCK_ROWS)):
        within += (rows.double() - means[row_labels]).square().sum().item()
        total += rows.double().square().sum().item()
    rounding = 1e-24 * total
    if between <= rounding:
        return 0.0
    return between / within if within > rounding else math.inf


def nearest_mean_predict(bank, bank_labels, queries):
    """The bank's class (q,) whose mean is nearest; the smallest label of equally near ones."""
    bank, bank_labels, queries = check_bank(bank, bank_labels, queries)
    present, index = bank_labels.unique(return_inverse=True)
    means = class_means(bank, index, len(present)).to(bank.dtype)
    return present[torch.cat([d.argmin(1) for _, d in squared_distances(means, queries)])]


def nearest_mean_accuracy(bank, bank_labels, queries, labels) -> float:
    return accuracy(nearest_mean_predict(bank, bank_labels, queries), labels)


# ---- Linear probe ----

# Times d: to copy every feature changes nothing then.
PENALTIES = (0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)


def logistic(x, labels, classes, penalty, start=None):
    """Multinomial logistic regression: weight (classes, d) and bias (classes,) with the least
    mean cross-entropy + penalty / 2 |weight|^2, by L-BFGS (Nocedal 1980) from `start` or zero."""
    if start is None:
        start = x.new_zeros(classes, x.shape[1]), x.new_zeros(classes)
    weight, bias = (parameter.clone().requires_grad_() for parameter in start)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, tolerance_grad=1e-6,
                                  tolerance_change=1e-6, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), labels)
        loss = loss + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def standardizer(x):
    """Mean and 1 / standard deviation (d,) of the features; 0 for the latter of a constant one."""
    deviation, mean = torch.std_mean(x, dim=0, correction=0)
    return mean, torch.where(deviation > 1e-7 * mean.abs(), 1 / deviation, 0.0)


def linear_probe_predict(bank, bank_labels, queries, penalties=PENALTIES):
    """Labels (q,) by logistic regression on the bank's standardised features (Alain & Bengio 2016).

    The penalty has the least cross-entropy on a held-out fifth of the bank (every fifth row of each
    class); with it, all of the bank is fitted. From strong to weak, each fit starts where the last
    one ended; two in a row that are no better end the search.
    """
    bank, bank_labels, queries = check_bank(bank, bank_labels, queries, classes=2)
    present, index = bank_labels.unique(return_inverse=True)
    classes, d = len(present), bank.shape[1]
    held = torch.zeros_like(index, dtype=torch.bool)
    for c in range(classes):
        held[(index == c).nonzero()[4::5]] = True
    order = held.long().argsort(stable=True)  # the held-out rows last
    n = len(bank) - int(held.sum())
    mean, scale = standardizer(bank)
    x, y = bank[order].sub_(mean).mul_(scale), index[order]

    solution = best = None
    least, worse = math.inf, 0
    for penalty in sorted(penalties, reverse=True):
        solution = logistic(x[:n], y[:n], classes, penalty * d, solution)
        loss = F.cross_entropy(F.linear(x[n:], *solution), y[n:]).item()
        if loss < least or best is None:
            best, least, worse = (penalty * d, solution), loss, 0
        else:
            worse += 1
        if worse == 2:
            break
    weight, bias = logistic(x, y, classes, *best)
    return present[F.linear((queries - mean) * scale, weight, bias).argmax(1)]


def linear_probe(bank, bank_labels, queries, labels) -> float:
    return accuracy(linear_probe_predict(bank, bank_labels, queries), labels)


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
    """Of m candidates, values (n, m, ...), that with the largest mean: its values (n, ...) and two
    choices. It is chosen on one half of the n images and measured on the other, both ways, so that
    the best of many is not flattered. NaN: not measured."""
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
def t_quantile(freedom) -> float:
    """97.5% quantile of Student's t, by the integral of its density from 0."""
    t, step = np.linspace(0, 13, 400_001, retstep=True)  # 12.7 is the largest
    n = freedom + 1
    log_constant = math.lgamma(n / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
    density = np.exp(log_constant - n / 2 * np.log1p(t**2 / freedom))
    area = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * step)])
    return float(np.interp(0.475, area, t))


def t_interval(values):
    """(mean, low, high) of independent values (Student 1908); None for fewer than two."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return None
    mean = float(values.mean())
    half = t_quantile(len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half


# ---- Ranks and correlations ----

def ranks(x):
    """Ranks from 1 (n,); equal values share their mean rank."""
    _, place, counts = x.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[place]


def auroc(score, right, seed=0, draws=1000):
    """(value, low, high) of the probability that a right row scores above a wrong one, ties half
    (Hanley & McNeil 1982), by bootstrap over rows (n,). None where all are right or all wrong."""
    right = right.bool().cpu()
    if right.all() or not right.any():
        return None
    values, place = score.double().cpu().unique(return_inverse=True)

    def area(times):  # (draws, n) times a row counts
        counts = torch.zeros(2, len(times), len(values), dtype=torch.float64)
        wrongs = counts[0].index_add_(1, place, times * ~right)  # (draws, distinct scores)
        rights = counts[1].index_add_(1, place, times * right)
        below = wrongs.cumsum(1) - wrongs / 2
        return (rights * below).sum(1) / (rights.sum(1) * wrongs.sum(1))

    value = area(torch.ones(1, len(right), dtype=torch.float64)).item()
    return value, *area(multiplicities(len(right), seed, draws)).nanquantile(ENDS).tolist()


def correlate(table):
    """Pearson's and Spearman's correlation (2, m) of each row but the last of table (m, n) with the
    last one, and at the end the last of these less the first."""
    result = []
    for rows in (table, torch.stack([ranks(row) for row in table])):
        r = torch.corrcoef(rows)[-1, :-1]
        result.append(torch.cat([r, r[-1:] - r[:1]]))
    return torch.stack(result)


def correlations(columns, y, settings, seed=0, draws=2000):
    """Correlation of columns {name: (n,)} with y (n,) over n models, as {"n", "settings",
    "pearson": {name: (value, low, high)}, "spearman": ...}, "last - first" among the names.

    Whole settings are drawn again: seeds of one are no independent models. low and high are None
    for fewer than five settings and where all draws agree. None in all: fewer than five models or
    two settings, or a constant column.
    """
    table = torch.tensor([*columns.values(), list(y)], dtype=torch.float64)  # (m, n)
    groups = [torch.tensor([i for i, setting in enumerate(settings) if setting == group])
              for group in dict.fromkeys(settings)]
    constant = any(len(row.unique()) < 2 for row in table)
    if table.shape[1] < 5 or len(groups) < 2 or constant:
        return None
    g = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(draws):
        rows = [groups[i] for i in torch.randint(len(groups), (len(groups),), generator=g)]
        drawn.append(correlate(table[:, torch.cat(rows)]))
    low, high = torch.stack(drawn).nanquantile(ENDS, dim=0)  # (2, m) each
    value = correlate(table)
    known = (high - low > 1e-9) & (len(groups) >= 5)
    names = [*columns, "last - first"] if len(columns) > 1 else [*columns]
    result = {"n": table.shape[1], "settings": len(groups), "pearson": {}, "spearman": {}}
    for i, kind in enumerate(("pearson", "spearman")):
        for j, name in enumerate(names):
            ends = (low[i, j].item(), high[i, j].item()) if known[i, j] else (None, None)
            result[kind][name] = value[i, j].item(), *ends
    return result


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


def r_squared(means):
    """1 - error / variance, from the means (..., 3) of squared error, t^2 and t."""
    return 1 - means[..., 0] / (means[..., 1] - means[..., 2].square())


def regression(x, y, x_test, y_test, seed=0):
    """[(R^2, low, high)] on test rows, by bootstrap, of each column of y (n, m) regressed on x
    (n, r) by least squares with an intercept; None for a column that is constant on the test."""
    x, y, x_test, y_test = (z.double().cpu() for z in (x, y, x_test, y_test))
    mean, scale = standardizer(x)
    x, x_test = (F.pad((z - mean) * scale, (0, 1), value=1.0) for z in (x, x_test))
    solution = torch.linalg.lstsq(x, y, driver="gelsd").solution  # (r + 1, m)
    errors = (y_test - x_test @ solution).square()  # (q, m)
    result = []
    for error, t in zip(errors.T, (y_test - y_test.mean(0)).T):
        values = torch.stack([error, t.square(), t], dim=1)
        constant = t.square().mean() <= 1e-12
        result.append(None if constant else bootstrap(values, r_squared, seed))
    return result


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
