"""Is the class signal clustered in the weights, or routed through the reader? Experiments on trained checkpoints.

    python diagnostics.py --ckpt out.pt                          # table, report.json and clustering.png in out-diagnostics/
    python diagnostics.py --ckpt out.pt --samples 2000           # a bank of 2,000 training images, and its half and quarter

So far: do the weights cluster by class, as well as the trained reader can read them? Sections, top to bottom: measures,
statistics, clustering, report, command line. The measures take any (n, d) tensor.
"""
import json
import math
import platform
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import train

# ---- Measures ------------------------------------------------------------------------------------------------------------
#
# x is (n, d), labels (n,) integers from 0. Distances are Euclidean; the bank's mean is subtracted first.

BLOCK_BYTES = 256 << 20            # of one block's distances or differences


def check(x: Tensor, labels: Tensor, k: int = 0, classes: int = 2):
    """ValueError: no (n, d) tensor with a label a row, not finite, fewer than k rows, or fewer classes than needed."""
    if x.dim() != 2 or labels.shape != x.shape[:1]:
        raise ValueError(f"expected x (n, d) and labels (n,), got {tuple(x.shape)} and {tuple(labels.shape)}")
    if len(x) < max(k, 1):
        raise ValueError(f"{len(x)} rows, but {max(k, 1)} are needed")
    if not torch.isfinite(x).all():
        raise ValueError("x holds values that are not finite")
    if len(labels.unique()) < classes:
        raise ValueError(f"{len(labels.unique())} class in the sample, but {classes} are needed")


def nearest(bank: Tensor, queries: Tensor | None, k: int) -> Tensor:
    """The k nearest bank rows of each query, nearest first; equal distances go to the lower index: (q, k).

    queries None: of each bank row among the others. A matrix product finds the candidates; its rounding can neither lose nor
    reorder any, since all that lie within it of the k-th are compared again by their differences in float64.
    """
    raw = bank if queries is None else queries
    mean = bank.double().mean(0)
    x, y = ((z.double() - mean).to(bank.dtype) for z in (bank, raw))
    squares, found = x.square().sum(1), []
    rows = max(1, BLOCK_BYTES // (8 * len(x)))
    tolerance = 64 * torch.finfo(x.dtype).eps
    for start in range(0, len(y), rows):
        block = y[start:start + rows]
        lengths = block.square().sum(1, keepdim=True)
        d = torch.addmm(squares + lengths, block, x.T, alpha=-2)                       # squared distances (rows, n)
        if queries is None:
            d[torch.arange(len(block)), torch.arange(start, start + len(block))] = math.inf
        limit = d.topk(k, largest=False).values[:, -1:] + tolerance * (lengths + squares.max())
        count = int((d <= limit).sum(1).max())
        candidates = d.topk(count, largest=False).indices.sort(dim=1).values            # (rows, count), ascending
        exact = torch.empty(candidates.shape, dtype=torch.float64, device=x.device)
        few = max(1, BLOCK_BYTES // (8 * count * x.shape[1]))
        for i in range(0, len(block), few):
            exact[i:i + few] = (bank[candidates[i:i + few]].double() - raw[start:start + rows][i:i + few, None].double()).square().sum(-1)
        if queries is None:        # a row is no neighbour of itself, even where rounding made room for it
            exact[candidates == torch.arange(start, start + len(block), device=x.device)[:, None]] = math.inf
        found.append(candidates.gather(1, exact.sort(dim=1, stable=True).indices[:, :k]))
    return torch.cat(found)


def vote(labels: Tensor, classes: int) -> Tensor:
    """The most frequent of labels (q, k); a tied vote goes to the smallest label: (q,)."""
    return F.one_hot(labels, classes).sum(1).argmax(1)


def knn_predict(bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int = 10) -> Tensor:
    """The majority's label of each query's k nearest bank rows (Cover & Hart 1967): (q,)."""
    check(bank, bank_labels, k, classes=1)
    return vote(bank_labels[nearest(bank, queries, k)], int(bank_labels.max()) + 1)


def knn_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int = 10) -> float:
    """Share of queries whose label is the majority's of their k nearest bank rows."""
    check(queries, labels, classes=1)
    return float((knn_predict(bank, bank_labels, queries, k) == labels).double().mean())


def neighbor_purity(x: Tensor, labels: Tensor, k: int = 10) -> float:
    """Mean share of a row's k nearest other rows that have its label."""
    check(x, labels, k + 1, classes=1)
    return float((labels[nearest(x, None, k)] == labels[:, None]).double().mean())


def silhouette(x: Tensor, labels: Tensor) -> float:
    """Mean silhouette (b - a) / max(a, b), a the mean distance to a row's own class and b to the nearest other one
    (Rousseeuw, J. Comput. Appl. Math. 1987). A row that is alone in its class, or at distance 0 from all, counts 0."""
    check(x, labels)
    _, labels = labels.unique(return_inverse=True)
    x = (x.double() - x.double().mean(0)).to(x.dtype)
    member = F.one_hot(labels).to(torch.float64)                                       # (n, classes)
    sizes, total = member.sum(0), 0.0
    rows = max(1, BLOCK_BYTES // (24 * len(x)))
    for start in range(0, len(x), rows):
        d = torch.cdist(x[start:start + rows], x).double()
        own = labels[start:start + rows, None]
        d[torch.arange(len(d)), torch.arange(start, start + len(d))] = 0               # cdist rounds
        sums = d @ member                                                              # (rows, classes)
        a = sums.gather(1, own).squeeze(1) / (sizes[own.squeeze(1)] - 1).clamp_min(1)
        b = (sums / sizes).scatter(1, own, math.inf).min(1).values
        s = (b - a) / torch.maximum(a, b).clamp_min(torch.finfo(torch.float64).tiny)
        total += float(s[sizes[own.squeeze(1)] > 1].sum())
    return total / len(x)


def class_means(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The labels that occur, ascending, and the mean of their rows: (classes,), (classes, d) float64."""
    present, index = labels.unique(return_inverse=True)
    sums = torch.zeros(len(present), x.shape[1], dtype=torch.float64, device=x.device).index_add_(0, index, x.double())
    return present, sums / torch.bincount(index)[:, None]


def fisher_ratio(x: Tensor, labels: Tensor) -> float:
    """Trace of the between-class over trace of the within-class scatter (Fisher 1936; Fukunaga 1990, ch. 10). Rows that are
    all equal count 0; classes without spread of their own infinity."""
    check(x, labels)
    _, means = class_means(x, labels)
    _, index = labels.unique(return_inverse=True)
    between = float((torch.bincount(index)[:, None] * (means - x.double().mean(0)).square()).sum())
    within = float((x.double() - means[index]).square().sum())
    return 0.0 if between <= 1e-24 * float(x.double().square().sum()) else between / within if within else math.inf


def nearest_mean_predict(bank: Tensor, bank_labels: Tensor, queries: Tensor) -> Tensor:
    """The class whose mean over the bank is nearest; a tie goes to the smallest label: (q,)."""
    check(bank, bank_labels, classes=1)
    present, means = class_means(bank, bank_labels)
    return present[nearest(means, queries.double(), 1)[:, 0]]


def nearest_mean_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor) -> float:
    """Share of queries whose nearest class mean of the bank is their own class's."""
    check(queries, labels, classes=1)
    return float((nearest_mean_predict(bank, bank_labels, queries) == labels).double().mean())


PROBE_LAMBDAS = (10.0, 1.0, 0.1, 0.01, 0.001)


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


def standardised(bank: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Both by the bank's mean and standard deviation, in float64; a feature that is constant in the bank becomes 0."""
    mean, deviation = bank.double().mean(0), bank.double().std(0, correction=0)
    scale = torch.where(deviation > 1e-12 * bank.double().abs().amax(0), 1 / deviation, 0.0)
    return (bank.double() - mean) * scale, (queries.double() - mean) * scale


def compressed(z: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Where d > n, n features in place of d that give the same regression: rows of the Cholesky factor L of z z^T. W lies in the
    span of the rows, so only their inner products count (the n x n dual problem)."""
    if z.shape[1] <= len(z):
        return z, queries
    gram = z @ z.T
    gram.diagonal().add_(1e-10 * gram.diagonal().mean().clamp_min(1e-300))
    factor = torch.linalg.cholesky(gram)
    return factor, torch.linalg.solve_triangular(factor, z @ queries.T, upper=False).T


def linear_probe(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor) -> float:
    """Accuracy of multinomial logistic regression on standardised features (Alain & Bengio 2016). The ridge penalty is the best
    of five on a held-out fifth of the bank (every fifth row of each class), the larger one where they tie."""
    check(bank, bank_labels)
    check(queries, labels, classes=1)
    classes = int(max(bank_labels.max(), labels.max())) + 1
    held = torch.zeros(len(bank), dtype=torch.bool, device=bank.device)
    for c in bank_labels.unique():
        held[torch.nonzero(bank_labels == c).flatten()[4::5]] = True
    best = PROBE_LAMBDAS[0]
    if held.any():
        z, y = compressed(*standardised(bank[~held], bank[held]))
        scores = []
        for penalty in PROBE_LAMBDAS:
            W = logistic(z, bank_labels[~held], classes, penalty, tolerance=1e-5)
            scores.append(float(((y @ W[:-1] + W[-1]).argmax(1) == bank_labels[held]).double().mean()))
        best = PROBE_LAMBDAS[scores.index(max(scores))]
    z, y = compressed(*standardised(bank, queries))
    W = logistic(z, bank_labels, classes, best, tolerance=1e-6)
    return float(((y @ W[:-1] + W[-1]).argmax(1) == labels).double().mean())


# ---- Statistics ----------------------------------------------------------------------------------------------------------

def paired_bootstrap(a: Tensor, b: Tensor, seed: int = 0, draws: int = 10_000) -> tuple[float, float, float]:
    """Mean of a - b over the same n images, and its 95% percentile interval (Efron 1979)."""
    difference = (a.double() - b.double()).cpu()
    g = train.generator("bootstrap", seed)
    means = torch.cat([difference[torch.randint(len(difference), (100, len(difference)), generator=g)].mean(1) for _ in range(draws // 100)])
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(difference.mean()), low, high


# ---- Clustering (claim C1) -----------------------------------------------------------------------------------------------

@torch.no_grad()
def embed(model: train.MWT, data: train.Images, workers: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Every image re-fitted, block by block: its pixels, first layer and tokens of phi - theta, and the reader's input map,
    on the CPU; and the reader's predictions (n,). With fraction < 1 the pixels drawn are the same each time."""
    device, k = model.coords.device, model.inner_loop.steps
    order = torch.arange(len(data)).split(64)
    blocks, predictions = [], []
    batches = data.batches(order, device, workers)
    for b, (images, _) in enumerate(tqdm(batches, "fitting", len(order), leave=False, disable=None)):
        images = data.signal(images)
        phi = model.adapt(images, pixels=model.draw(k, len(images), train.generator("diagnostics", b, device=device)))
        tokens = model.tokens(phi)
        logits, states = model.read(tokens, flow=True)
        predictions.append(logits.argmax(-1).cpu())
        parts = {"pixels": images.flatten(1), "first": (phi.first - model.siren.first).flatten(1), "tokens": tokens, "mapped": states[0].flatten(1)}
        blocks.append({name: x.float().cpu() for name, x in parts.items()})
    return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}, torch.cat(predictions)


def coordinates(bank: dict[str, Tensor], test: dict[str, Tensor], model: train.MWT):
    """Yields (name, bank (n, d), queries (q, d)) of each coordinate system in which classes might cluster.

    phi, phi - theta and lambda (phi - theta + beta) differ by shift and scale, so their Euclidean measures are the same;
    cosine ones, listed apart, are Euclidean on rows scaled to length 1.
    """
    depth, width = model.siren.hidden.shape[:2]
    both = (bank, test)
    yield "pixels", *(x["pixels"] for x in both)
    yield "phi - theta", *(torch.cat([x["first"], x["tokens"].flatten(1)], 1) for x in both)
    yield "  first layer", *(x["first"] for x in both)
    for layer in range(depth):
        yield f"  hidden layer {layer + 1}", *(x["tokens"][:, layer * width:(layer + 1) * width].flatten(1) for x in both)
    yield "  standardised per weight", *(x.float() for x in standardised(*(x["tokens"].flatten(1) for x in both)))
    anchor, beta = (x.detach().cpu() for x in (model.siren.hidden.flatten(0, 1), model.reader.beta))
    for name, shift in (("phi - theta", 0 * beta), ("phi", anchor), ("phi - theta + beta", beta)):
        yield f"  cosine of {name}", *(F.normalize((x["tokens"] + shift).flatten(1), dim=1) for x in both)
    yield "bias column", *(x["tokens"][..., -1] for x in both)
    yield "all but the bias column", *(x["tokens"][..., :-1].flatten(1) for x in both)
    yield "after the reader's input map", *(x["mapped"] for x in both)


def clustering(named, bank_labels: Tensor, labels: Tensor, reader: Tensor, seed: int = 0) -> dict:
    """How far each coordinate system clusters by class, beside the trained reader.

    named: triples (name, bank (n, d), queries (q, d)), as from `coordinates`; reader (q,): the reader's predictions. Purity,
    silhouette and Fisher ratio are the queries' own. Accuracies at n / 4 and n / 2 show whether a larger bank would help.
    """
    shuffled = torch.randperm(len(bank_labels), generator=train.generator("shuffle", seed))
    parts = train.generator("bank", seed)
    right, rows, curve = (reader == labels), [], {}
    best = None
    for name, bank, queries in named:
        row = {"coordinate": name, "d": bank.shape[1]}
        guesses = {"knn1": knn_predict(bank, bank_labels, queries, 1), "knn10": knn_predict(bank, bank_labels, queries, 10),
                   "nearest_mean": nearest_mean_predict(bank, bank_labels, queries)}
        for key, guess in guesses.items():
            row[key] = float((guess == labels).double().mean())
            if "pixels" not in name and "input map" not in name and (best is None or row[key] > best[0]):
                best = (row[key], name, key, guess == labels)
        row["purity"], row["silhouette"] = neighbor_purity(queries, labels), silhouette(queries, labels)
        row["fisher"] = fisher_ratio(queries, labels)
        row["linear_probe"] = linear_probe(bank, bank_labels, queries, labels)
        row["knn10_shuffled"] = knn_accuracy(bank, bank_labels[shuffled], queries, labels)
        row["reader_minus_knn10"] = paired_bootstrap(right, guesses["knn10"] == labels, seed)
        rows.append(row)
        if name == "phi - theta":
            order = torch.randperm(len(bank), generator=parts)
            curve = {n: knn_accuracy(bank[order[:n]], bank_labels[order[:n]], queries, labels) for n in (len(bank) // 4, len(bank) // 2, len(bank)) if n >= 10}
    gap = paired_bootstrap(right, best[3], seed)
    return {"rows": rows, "reader": float(right.double().mean()), "reader_interval": train.wilson(int(right.sum()), len(right)), "bank": len(bank_labels),
            "test": len(labels), "knn10_by_bank": curve, "best": {"coordinate": best[1].strip(), "measure": best[2], "accuracy": best[0]}, "gap": gap}


def clustering_verdict(result: dict, whole_bank: bool = True) -> str:
    """C1 on one checkpoint: the gap alone can refute it; that no pressure to cluster helps needs several models. A part of the bank
    handicaps the geometry, so that it cannot support the claim."""
    mean, low, high = (100 * x for x in result["gap"])
    if high < 2:
        verdict = "refuted on this checkpoint"
    elif not whole_bank:
        verdict = f"not decided here (a bank of {result['bank']} images is only a part of the training set)"
    else:
        verdict = ("its first half holds on this checkpoint" if low > 2 else "not decided here") + " (the second half needs several models)"
    return (f"C1 {verdict}: reader - best geometry ({result['best']['measure']} on {result['best']['coordinate']}) = {mean:+.1f} points "
            f"[{low:+.1f}, {high:+.1f}]; rule: supported needs > 2, refuted < 2, interval over images")


# ---- Report --------------------------------------------------------------------------------------------------------------

COLUMNS = {"knn1": "1-NN %", "knn10": "10-NN %", "nearest_mean": "mean %", "linear_probe": "probe %", "knn10_shuffled": "shuffl.",
           "purity": "purity", "silhouette": "silh.", "fisher": "Fisher"}


def clustering_table(result: dict) -> str:
    lines = [f"{'coordinate':30s}" + "".join(f"{title:>8s}" for title in COLUMNS.values())]
    for row in result["rows"]:
        values = [(f"{100 * row[key]:.1f}" if key in ("knn1", "knn10", "nearest_mean", "linear_probe", "knn10_shuffled") else f"{row[key]:.3f}") for key in COLUMNS]
        lines.append(f"{row['coordinate']:30s}" + "".join(f"{value:>8s}" for value in values))
    low, high = result["reader_interval"]
    lines.append(f"{'trained reader':30s}{100 * result['reader']:16.1f}  95% interval {100 * low:.1f} to {100 * high:.1f}; "
                 f"bank {result['bank']}, test {result['test']} images")
    lines.append("10-NN on phi - theta by bank size: " + ", ".join(f"{n}: {100 * a:.1f}%" for n, a in result["knn10_by_bank"].items()))
    return "\n".join(lines)


def clustering_figure(path: Path, result: dict, classes: int):
    from matplotlib.figure import Figure
    rows = result["rows"][::-1]
    figure = Figure(figsize=(8, 1.6 + 0.36 * len(rows)), layout="constrained", dpi=120)
    axis = figure.subplots()
    for key, marker, label in (("knn10", "o", "10 nearest neighbours"), ("nearest_mean", "s", "nearest class mean"), ("linear_probe", "^", "linear probe"),
                               ("knn10_shuffled", "x", "10 nearest neighbours, labels shuffled")):
        axis.plot([100 * row[key] for row in rows], range(len(rows)), marker, label=label)
    axis.axvline(100 * result["reader"], color="black", label="trained reader (band: 95% interval)")
    axis.axvspan(*(100 * x for x in result["reader_interval"]), color="black", alpha=0.12)
    axis.axvline(100 / classes, color="grey", linestyle=":", label="chance")
    axis.set_yticks(range(len(rows)), [row["coordinate"] for row in rows])
    axis.set_xlabel("accuracy on test images (%)")
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path)


# ---- Command line --------------------------------------------------------------------------------------------------------

def parser() -> train.Parser:
    p = train.Parser(prog="diagnostics.py", description=__doc__.split("\n\n")[0])
    p.add_argument("--ckpt", required=True, help="checkpoint of a run of train.py")
    p.add_argument("--samples", type=train.whole(10), help="bank: so many training images, the same share of each class (default all)")
    p.add_argument("--seed", type=train.whole(0), default=0, help="of the bootstrap and the shuffles (default 0)")
    p.add_argument("--dataset", help="look at other data than the checkpoint was trained on")
    p.add_argument("--data-root", help="folder of the downloaded data sets (default: the run's)")
    p.add_argument("--device", default="auto", help="auto (CUDA if there is one), or a torch device (default auto)")
    p.add_argument("--out", help="folder for report.json and clustering.png (default: the checkpoint's name + -diagnostics)")
    return p


BANK_BYTES = 1 << 30               # of the fitted bank's weights in memory; a larger one needs --samples


def run(argv: list[str] | None):
    flags = parser().parse_args(argv)
    device = train.find_device(flags.device)
    content = train.read_checkpoint(flags.ckpt)
    model, args = train.load_checkpoint(flags.ckpt, device)
    args.dataset, args.data_root = flags.dataset or args.dataset, flags.data_root or args.data_root
    out = Path(flags.out or str(Path(flags.ckpt).with_suffix("")) + "-diagnostics")
    if out.exists() and not out.is_dir() or not out.parent.is_dir():
        raise train.InputError(f"--out {out}: not a folder that can be made")
    data, test = train.load_dataset(args, device)
    if train.facts(test)[:2] != content["data"][:2]:
        raise train.InputError(f"--dataset {args.dataset}: other channels or classes than {flags.ckpt} was trained on")
    every = len(data)
    if flags.samples and flags.samples < every:
        data = data.take(train.stratified(data.labels.cpu(), flags.samples).to(data.labels.device))
    size = 4 * len(data) * 2 * model.reader.beta.numel()
    if size > BANK_BYTES:
        raise train.InputError(f"the fitted bank takes {size / 2**30:.1f} GiB; --samples {int(len(data) * BANK_BYTES / size)} or fewer fit")
    if len(data) < 11 or len(test) < 11:
        raise train.InputError(f"{len(data)} bank and {len(test)} test images: 10 neighbours need at least 11 of each")

    bank, _ = embed(model, data, args.workers)
    queries, reader = embed(model, test, args.workers)
    named = tqdm(list(coordinates(bank, queries, model)), "measuring", leave=False, disable=None)
    result = clustering(named, data.labels.cpu(), test.labels.cpu(), reader, flags.seed)
    verdict = clustering_verdict(result, whole_bank=len(data) == every)
    print(clustering_table(result) + "\n\n" + verdict)
    out.mkdir(exist_ok=True)
    report = {"flags": vars(flags), "checkpoint": train.command_line(args), "device": str(device), "clustering": result, "verdicts": {"C1": verdict},
              "versions": {"python": platform.python_version(), "torch": torch.__version__}}
    (out / "report.json").write_text(json.dumps(report, indent=1, default=list) + "\n")
    clustering_figure(out / "clustering.png", result, len(test.classes))
    print(f"wrote {out}/report.json and clustering.png")


def main(argv: list[str] | None = None):
    """Exit status: 0, 2 bad input, 130 interrupted."""
    try:
        run(argv)
    except (train.InputError, KeyboardInterrupt) as error:
        print(f"diagnostics.py: {'error: ' if isinstance(error, train.InputError) else ''}{error or 'interrupted'}", file=sys.stderr)
        raise SystemExit(getattr(error, "status", 130)) from None


if __name__ == "__main__":
    main()
