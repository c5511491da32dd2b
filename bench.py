"""What a training step costs, on random images of the size of --dataset, with train.py's flags.

    python bench.py                  # three ways to the same gradients, in turn
    python bench.py cost             # time and memory as batch, pixels, width, k grow; a figure
    python bench.py imagenet         # what ImageNet-1K would take at this machine's speed

Prints a table and writes its numbers to --out, *.json. Three ways (--no-compile: all eager):

    A  inner gradients in closed form, one backward pass: what train.py does
    B  the textbook: autograd through autograd, two backward passes; always eager
    C  inner gradients by torch.func.grad, one backward pass
"""
import contextlib
import copy
import itertools
import json
import math
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
import types
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import mean, median

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import figures
import settings
import train
from checkpoint import InputError, Stop, exits, generator
from inner_loop import functional_loss_and_grad, textbook_loss_and_grad

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


def count_flops(model: train.MWT, batch: int) -> int:
    """FLOPs (a multiply-add is two) of the matrix products of a step on `batch` images, counted by
    torch on tensors without memory. With n pixels a look, w neurons, D hidden layers, C channels
    an inner step takes 2n (3 D w^2 + 2 C w + 4 w) an image, its backward pass about twice that."""
    model = copy.deepcopy(model).to("meta")
    model.inner_loop.recompute, model.read = False, model.reader.forward   # autocast has no meta
    looks, channels = model.inner_loop.steps + 1, model.siren.head.out_features
    each = (batch,) if model.fraction < 1 else ()      # coordinates of an image's own
    with torch.device("meta"), FlopCounterMode(display=False) as counter, \
            sdpa_kernel(SDPBackend.MATH):
        statistics = model(torch.empty(looks, *each, model.points, 2),
                           torch.empty(looks, batch, model.points, channels),
                           torch.zeros(batch, dtype=torch.long))
        statistics[:3].sum().backward()
    return counter.get_total_flops()


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


def make_model(args) -> train.MWT:
    channels = 1 if args.dataset in ("digits", "mnist", "fashion_mnist") else 3
    return train.MWT(args, channels, classes=1000 if args.mode == "imagenet" else 10)


def measure(args, path: str, parts: bool = False) -> dict:
    """Times 3 to 20 steps of path A, B or C, in about 20 seconds; and `measure_parts`."""
    device, n = settings.find_device(args.device), args.batch_size
    torch.set_float32_matmul_precision("highest" if args.precision == "float32" else "high")
    forward = model = make_model(args).to(device)
    if path != "A":
        inner = textbook_loss_and_grad if path == "B" else functional_loss_and_grad
        model.siren.loss_and_grad = types.MethodType(inner, model.siren)
    model.inner_loop.recompute = args.recompute and path != "B"
    optimizer = train.make_optimizer(model, args)

    g, channels = generator("bench"), model.siren.head.out_features
    pixels = torch.randint(256, (n, channels, args.size, args.size), dtype=torch.uint8, generator=g)
    labels = torch.randint(10, (n,), generator=g)
    images = data.Images([], labels, pixels).resident(device, 0)
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
              "peak_memory_bytes": peak_memory(device), "compiled": forward is not model,
              "flops": count_flops(make_model(args), n)}
    return result | (measure_parts(model, optimizer, images, batch) if parts else {})


def measure_parts(model: train.MWT, optimizer, images: data.Images, batch) -> dict:
    """The parts of an eager step (ms), evaluation, and the best of ten large matrix products."""
    device, (coords, values, _) = model.coords.device, batch
    tokens = model.tokens(model.fit_and_error(coords, values)[0]).detach().requires_grad_()
    n = max(len(images), model.block_size)
    images = images.take(torch.arange(n, device=device) % len(images))
    size = 4096 if device.type == "cuda" else 2048
    kind = torch.bfloat16 if model.bf16 else torch.float32
    square = torch.randn(size, size, device=device, dtype=kind)
    product = min(timed(lambda: square @ square, 10, device))

    def time_of(function, *args):
        return median(timed(partial(function, *args), 5, device))

    inner, read = time_of(model.fit_and_error, coords, values), time_of(model.read, tokens)
    step = time_of(train.backward, model, optimizer, *batch)
    return {"phases_ms": {"inner loop": inner, "reader": read, "backward": step - inner - read,
                          "optimizer": time_of(optimizer.step)},
            "evaluation_images_per_second": 1000 * n / time_of(train.evaluate, model, images),
            "matrix_peak_tflops": 2 * size ** 3 / product / 1e9}


def in_a_process(function, *args):
    """function(*args) in a process of its own: peak memory is its own, nothing is compiled yet."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                return pool.submit(function, *args).result()
            except (BrokenExecutor, torch.OutOfMemoryError) as error:
                raise Stop(1, "a measurement was killed or ran out of memory") from error


# ---- Which steps are measured, and what follows --------------------------------------------------

def plan(args) -> list[tuple]:
    """(what, its value, path, settings) of each measurement. InputError: settings that do not go
    together."""
    if args.mode == "paths":
        return [("turn", turn, path, args) for turn in (1, 2) for path in "ABC"]
    if args.mode == "imagenet":
        return [("turn", 1, "A", args)]
    return [(settings.flag(key), value, "A", settings.settings({key: value}, vars(args)))
            for key in ("batch_size", "size", "width", "steps")
            for value in (max(1, vars(args)[key] * halves // 2) for halves in (1, 2, 3, 4))]


HEAD = (f"{'':18s}{'ms a step':>10s}{'least':>9s}{'most':>9s}{'images/s':>10s}{'peak GiB':>10s}"
        f"{'TFLOP/s':>9s}{'first step s':>14s}")


def tflops(r: dict) -> float:
    return r["flops"] / median(r["ms"]) / 1e9


def row(r: dict) -> str:
    """A line under HEAD."""
    name, memory = f"{r['path']} {r['what']} {r['value']}", r["peak_memory_bytes"] or math.nan
    return (f"{name:18s}{median(r['ms']):10.1f}{min(r['ms']):9.1f}{max(r['ms']):9.1f}"
            f"{r['images_per_second']:10.1f}{memory / 2 ** 30:10.2f}{tflops(r):9.3f}"
            f"{r['first_step_seconds']:14.1f}")


def compare_paths(runs: list[dict]) -> tuple[dict, list[str]]:
    """How many times as long as A the others took in the same turn (mean, least, most); lines."""
    ms = {path: [median(r["ms"]) for r in runs if r["path"] == path] for path in "ABC"}
    ratios, lines, first = {}, [], runs[0]
    for path in "BC":
        each = [slow / fast for slow, fast in zip(ms[path], ms["A"])]
        ratios[f"{path}/A"] = mean(each), min(each), max(each)
        lines.append(f"ratio {path}/A {mean(each):.2f} (of two turns {min(each):.2f} and "
                     f"{max(each):.2f})")
    peak, phases = first["matrix_peak_tflops"], first["phases_ms"].items()
    lines += [f"A: {first['flops'] / 1e9:.1f} GFLOP a step, at {tflops(first) / peak:.0%} of the "
              f"matrix peak, {peak:.3f} TFLOP/s here",
              "an eager step: " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in phases),
              f"evaluation: {first['evaluation_images_per_second']:.1f} images/s"]
    return {"ratios": ratios}, lines


def decode_seconds(size: int) -> float:
    """Of one 500x375 JPEG of smooth noise, by one process."""
    from torchvision.io import write_jpeg
    coarse = torch.randint(256, (1, 3, 24, 32), generator=generator("jpeg")).float()
    noise = F.interpolate(coarse, (375, 500), mode="bicubic")[0].clamp(0, 255).byte()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "noise.jpg")
        write_jpeg(noise, path, quality=90)
        return min(timed(partial(data.decode, path, size), 20, torch.device("cpu"))) / 1000


def training_hours(images, epochs, step_seconds, decode_seconds, devices, workers) -> float:
    """The longer of the steps and of decoding by `workers` processes a device, both in seconds an
    image. More devices cost nothing in between."""
    seconds = max(step_seconds, decode_seconds / max(1, workers))
    return images * epochs * seconds / devices / 3600


def imagenet(args, step: dict) -> tuple[dict, list[str]]:
    """Hours by number of devices; lines."""
    decoding, hours = decode_seconds(args.size), {}
    lines = [f"decoding a JPEG: {1000 * decoding:.1f} ms; {args.workers} workers a device",
             f"ImageNet-1K, {args.epochs} epochs, from this step (the paper: 306 min an epoch):"]
    for n in (1, 8, 64):
        hours[n] = training_hours(1_281_167, args.epochs, 1 / step["images_per_second"], decoding,
                                  n, args.workers)
        minutes = 60 * hours[n] / args.epochs
        lines.append(f"{n:4d} devices: {hours[n]:.3g} h, {minutes:.3g} min an epoch")
    return {"decode_seconds": decoding, "hours": hours}, lines


# ---- Command line --------------------------------------------------------------------------------

UNUSED = {"data_root", "train_size", "test_size", "val", "steps_test", "readout", "branch",
          "w_cluster", "init_from", "freeze_siren", "resume", "save_minutes", "eval_only", "ckpt"}


def run(argv: list[str]):
    p = settings.parser(__doc__.split("\n\n")[0])
    p.prog = "bench.py"
    p.add_argument("mode", nargs="?", choices=("paths", "cost", "imagenet"), default="paths")
    explicit = vars(p.parse_args(argv))
    for name in UNUSED & set(explicit):
        raise InputError(f"{settings.flag(name)}: does not shape the step that is measured")
    usual = {"dataset": "cifar10", "out": "bench.json"}
    if explicit["mode"] == "imagenet":
        usual |= {"size": 320, "width": 256, "fraction": 0.01}
    args = settings.settings(usual | explicit)
    out, device, measurements = Path(args.out), settings.find_device(args.device), plan(args)
    if out.suffix != ".json" or not out.parent.is_dir() or out.is_dir():
        raise InputError(f"--out {out}: needs a file name in *.json, in a folder that is there")

    report = {"command": shlex.join(["python", "bench.py", *argv]), "flags": vars(args),
              **settings.environment(device)}
    shape = ("size", "fraction", "width", "depth", "steps", "reader_depth", "batch_size")
    print(*settings.as_flags({key: vars(args)[key] for key in shape}))
    print(f"{args.precision} on {report['device']}, {report['threads']} threads", HEAD, sep="\n")
    runs = report[args.mode] = []
    for what, value, path, changed in measurements:
        parts = args.mode == "paths" and not runs
        result = in_a_process(measure, changed, path, parts)
        runs.append({"what": what, "value": value, "path": path} | result)
        print(row(runs[-1]), flush=True)
    more, lines = {}, []
    if args.mode == "paths":
        more, lines = compare_paths(runs)
    elif args.mode == "imagenet":
        more, lines = imagenet(args, runs[0])
    for line in lines:
        print(line)
    out.write_text(json.dumps(report | more, indent=1, allow_nan=False) + "\n")
    if args.mode == "cost":
        figures.cost_figure(out.with_suffix(".png"), report)


def main(argv: list[str] | None = None):
    with exits("bench.py"):
        run(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
