"""What a training step costs, on random images of the size of --dataset, with train.py's flags.

    python bench.py                  # three ways to the same gradients, in turn
    python bench.py cost             # time and memory as batch, pixels, width, k grow; a figure
    python bench.py imagenet         # hours for ImageNet-1K at this speed, decoding not counted

Writes its numbers to --out, *.json. Three ways (--no-compile: all eager):

    A  inner gradients in closed form, one backward pass: what train.py does
    B  the textbook: autograd through autograd, two backward passes; always eager
    C  inner gradients by torch.func.grad, one backward pass
"""
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import shlex
import sys
import time
import types
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
import figures
import settings
import train
from checkpoint import InputError, Stop, exits, generator
from inner_loop import functional_loss_and_grad, textbook_loss_and_grad
from pixels import count_flops

# ---- One step ------------------------------------------------------------------------------------

def textbook_backward(model: train.MWT, coords, values, labels):
    """The published way to the gradients, of a batch as `MWT.look` returned it: two backward
    passes, the class loss's gradient of the INR scaled in between."""
    with sdpa_kernel(SDPBackend.MATH):
        phi, error = model.fit_and_error(coords, values)
        logits = model.logits(model.tokens(phi), values)
        F.cross_entropy(logits, labels).backward(retain_graph=True)
        for p in [*model.siren.parameters(), *model.inner_loop.parameters()]:
            if p.grad is not None:
                p.grad *= model.w_task
        error.mean().backward()


def step_flops(args, channels: int, classes: int) -> int:
    """FLOPs of the matrix products of a step. With n pixels a look, w neurons, D hidden layers and
    C channels an inner step takes 2n (3 D w^2 + 2 C w + 4 w) an image, and about twice that in the
    backward pass."""
    with torch.device("meta"):                 # no memory
        model = train.MWT(args, channels, classes)
        model.read = model.reader.forward      # without autocast, which has no meta
        looks, n = args.steps + 1, args.batch_size
        each = (n,) if args.fraction < 1 else ()       # coordinates of an image's own
        return count_flops(model, torch.empty(looks, *each, model.points, 2),
                           torch.empty(looks, n, model.points, channels),
                           torch.zeros(n, dtype=torch.long))


def timed(action, count: int, device: torch.device) -> list[float]:
    """Milliseconds of each of `count` calls."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - began))
    return times


def peak_memory(device: torch.device) -> int | None:
    """Bytes: of the device on CUDA, else of the process; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(ImportError):     # Windows has no such module
        import resource
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(args, path: str, parts: bool) -> dict:
    """Times 3 to 20 steps of path A, B or C, in about 20 seconds; and `measure_parts`."""
    device, n = settings.find_device(args.device), args.batch_size
    channels = 1 if args.dataset in ("digits", "mnist", "fashion_mnist") else 3
    torch.set_float32_matmul_precision("highest" if args.precision == "float32" else "high")
    forward = model = train.MWT(args, channels, 10).to(device)
    if path != "A":
        inner = textbook_loss_and_grad if path == "B" else functional_loss_and_grad
        model.siren.loss_and_grad = types.MethodType(inner, model.siren)
    model.inner_loop.recompute = args.recompute and path != "B"
    optimizer = train.make_optimizer(model, args)

    g, shape = generator("bench"), (n, channels, args.size, args.size)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=g)
    images = data.Images([], torch.randint(10, (n,), generator=g), pixels).resident(device, 0)
    rows, number = [torch.arange(n)], itertools.count()

    def prepare():
        return next(train.image_batches(args, model, images, rows, next(number)))

    def step():
        batch = prepare()
        if path == "B":
            textbook_backward(model, *batch)
        else:
            train.backward(forward, optimizer, *batch)
        train.update(optimizer)

    batch, began = prepare(), time.perf_counter()
    if path != "B" and args.compile is not False:
        forward = train.compiled(model, *batch)
        model.zero_grad()
    timed(step, 1, device)
    first = time.perf_counter() - began
    ms = timed(step, max(3, min(20, round(20_000 / timed(step, 1, device)[0]))), device)
    result = {"ms": ms, "images_per_second": 1000 * n / median(ms), "first_step_seconds": first,
              "peak_memory_bytes": peak_memory(device),
              "flops": step_flops(args, channels, 10)}
    return result | (measure_parts(model, optimizer, batch) if parts else {})


def measure_parts(model: train.MWT, optimizer, batch) -> dict:
    """The parts of an eager step, and a large matrix product."""
    device, (coords, values, _) = model.coords.device, batch
    tokens = model.tokens(model.fit_and_error(coords, values)[0]).detach().requires_grad_()
    inner, read, step = (median(timed(action, 5, device)) for action in (
        partial(model.fit_and_error, coords, values), partial(model.read, tokens),
        partial(train.backward, model, optimizer, *batch)))
    size = 4096 if device.type == "cuda" else 2048
    square = torch.randn(size, size, device=device)
    product = min(timed(lambda: square @ square, 10, device))
    return {"phases_ms": {"inner loop": inner, "reader": read, "backward": step - inner - read},
            "matrix_peak_tflops": 2 * size ** 3 / product / 1e9}


def in_a_process(function, *args):
    """function(*args) in a process of its own: peak memory is its own, nothing is compiled yet."""
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args).result()
        except (BrokenExecutor, torch.OutOfMemoryError) as error:
            raise Stop(1, "a measurement was killed or ran out of memory") from error


# ---- Which steps are measured, and what follows --------------------------------------------------

def plan(args) -> list[tuple]:
    """(what, its value, path, settings) of each measurement."""
    if args.mode == "paths":
        return [("turn", turn, path, args) for turn in (1, 2) for path in "ABC"]
    if args.mode == "imagenet":
        return [("turn", 1, "A", args)]
    return [(settings.flag(key), value, "A", settings.settings({key: value}, vars(args)))
            for key in ("batch_size", "size", "width", "steps")
            for value in (max(1, vars(args)[key] * halves // 2) for halves in (1, 2, 3, 4))]


HEAD = (f"{'':18s}{'ms a step':>10s}{'images/s':>10s}{'peak GiB':>10s}{'TFLOP/s':>9s}"
        f"{'first step s':>14s}")


def tflops(r: dict) -> float:
    return r["flops"] / median(r["ms"]) / 1e9


def row(r: dict) -> str:
    """A line under HEAD."""
    name, memory = f"{r['path']} {r['what']} {r['value']}", r["peak_memory_bytes"] or math.nan
    return (f"{name:18s}{median(r['ms']):10.1f}{r['images_per_second']:10.1f}"
            f"{memory / 2 ** 30:10.2f}{tflops(r):9.3f}{r['first_step_seconds']:14.1f}")


def compare_paths(runs: list[dict]) -> dict:
    """How many times as long as A the others took, in each of the two turns."""
    ratios, a = {}, runs[0]
    ms = {path: [median(r["ms"]) for r in runs if r["path"] == path] for path in "ABC"}
    for path in "BC":
        ratios[f"{path}/A"] = each = [slow / fast for slow, fast in zip(ms[path], ms["A"])]
        print(f"ratio {path}/A {each[0]:.2f} and {each[1]:.2f}, by turn")
    print(f"A: {a['flops'] / 1e9:.1f} GFLOP a step, at {tflops(a) / a['matrix_peak_tflops']:.0%} "
          f"of the matrix peak, {a['matrix_peak_tflops']:.3f} TFLOP/s here")
    print("an eager step:", ", ".join(f"{name} {ms:.1f} ms" for name, ms in a["phases_ms"].items()))
    return {"ratios": ratios}


def imagenet(args, step: dict) -> dict:
    """Hours by number of devices."""
    hours = {n: 1_281_167 * args.epochs / step["images_per_second"] / n / 3600 for n in (1, 8, 64)}
    print(f"ImageNet-1K, {args.epochs} epochs, at this speed; decoding JPEGs is not counted")
    for n, took in hours.items():
        print(f"{n:4d} devices: {took:.3g} h, {60 * took / args.epochs:.3g} min an epoch")
    return {"hours": hours}


# ---- Command line --------------------------------------------------------------------------------

UNUSED = {"data_root", "train_size", "test_size", "val", "steps_test", "readout", "branch",
          "w_cluster", "init_from", "freeze_siren", "resume", "save_minutes", "eval_only", "ckpt"}


def run(argv: list[str]):
    p = settings.parser(__doc__.split("\n\n")[0], "bench.py", settings.RECIPE.keys() - UNUSED)
    p.add_argument("mode", nargs="?", choices=("paths", "cost", "imagenet"), default="paths")
    explicit = vars(p.parse_args(argv))
    usual = {"dataset": "cifar10", "out": "bench.json"}
    if explicit["mode"] == "imagenet":
        usual |= {"size": 320, "width": 256, "fraction": 0.01}
    args = settings.settings(usual | explicit)
    out, device, measurements = Path(args.out), settings.find_device(args.device), plan(args)
    if out.suffix != ".json" or not out.parent.is_dir() or out.is_dir():
        raise InputError(f"--out {out}: needs a file name in *.json, in a folder that is there")
    report = {"command": shlex.join(["python", "bench.py", *argv]), "flags": vars(args),
              **settings.environment(device)}
    print(f"{args.precision} on {report['device']}, {report['threads']} threads", HEAD, sep="\n")
    runs = report[args.mode] = []
    for what, value, path, changed in measurements:
        result = in_a_process(measure, changed, path, args.mode == "paths" and not runs)
        runs.append({"what": what, "value": value, "path": path} | result)
        print(row(runs[-1]), flush=True)
    if args.mode == "paths":
        report |= compare_paths(runs)
    elif args.mode == "imagenet":
        report |= imagenet(args, runs[0])
    out.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    if args.mode == "cost":
        figures.cost_figure(out.with_suffix(".png"), report)


def main(argv: list[str] | None = None):
    with exits("bench.py"):
        run(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
