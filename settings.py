"""What a run is given: its flags and recipes, the checks that come before any work, the machine.

Every program here takes its flags through this file. A flag that is not given is absent from what
the parser returns, so that a recipe, a checkpoint or --init-from can fill it in.
"""
import argparse
import contextlib
import math
import os
import platform
import shlex
import sys
from pathlib import Path

import numpy as np
import torch

from checkpoint import InputError, read_checkpoint
from data import SIZE

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))    # torchrun's
LAUNCH = f"torchrun --nproc_per_node={WORLD}" if WORLD > 1 else "python"

# ---- Flags ---------------------------------------------------------------------------------------

def number(low: float, high: float = math.inf, above: bool = False, kind=float):
    """Parses a finite number of at least `low`, or above it, and at most `high`."""
    wanted = "a whole number" if kind is int else "a number"
    wanted += f" {'above' if above else 'of at least'} {low}"
    wanted += f" and at most {high}" if high < math.inf else ""

    def parse(text: str):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high and value < math.inf and not (above and value == low):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return parse


def whole(low: int, high: float = math.inf):
    return number(low, high, kind=int)


def epochs(text: str):
    """Parses a number of epochs; a whole one stays whole."""
    value = number(1)(text)
    return int(value) if value == int(value) else value


# Each flag: name, what it takes (None: nothing), default, help. The defaults are the paper's recipe
# for CIFAR-10, MNIST and Fashion-MNIST; below is what differs elsewhere.
FLAGS = {
    "data": [
        ("dataset", str, "digits", "digits, cifar10, mnist, fashion_mnist, or a folder with "
                                   "train/<class>/ and test/<class>/ or val/<class>/"),
        ("size", whole(2), None, "pixels a side (default: the data set's own; a folder 32)"),
        ("train_size", whole(1), None, "train on so many images, always the same ones"),
        ("test_size", whole(1), None, "evaluate on so many images"),
        ("val", number(0, 0.9), 0.0, "share of the training set to evaluate on, held out"),
        ("augment", None, False, "random crop, flip; from 64 pixels on also rotation and scale")],
    "model": [
        ("width", whole(1, 4096), 128, "neurons a layer; also the reader's width"),
        ("depth", whole(1, 64), 4, "hidden layers of the SIREN"),
        ("omega", number(0, above=True), 10.0, "omega, frequency of the first layer"),
        ("steps", whole(1), 6, "k, inner-loop steps"),
        ("steps_test", whole(1), None, "k in evaluation; other than --steps with --shared-lr only"),
        ("shared_lr", None, False, "one alpha for all inner steps"),
        ("fraction", number(0, 1, above=True), 1.0, "s, share of the pixels drawn a step"),
        ("reader_depth", whole(0, 1000), 10, "blocks of the reader"),
        ("head_dim", whole(1), 64, "features an attention head; divides the width"),
        ("mlp_ratio", whole(1), 1, "hidden over outer features in the reader's MLP"),
        ("token_scale", number(0), 500.0, "lambda, factor on the tokens; 0: layer norm instead"),
        ("readout", whole(0), 0, "learned queries that gather the tokens; 0: their mean"),
        ("branch", str, None, "bias, column:N or colour: that column of the tokens, or the "
                                      "mean colour, to the logits past the reader's blocks"),
        ("centre_colour", None, False, "remove each image's mean colour before it is fitted")],
    "training": [
        ("w_task", number(0), 0.01, "weight of the class loss for the INR; 0 is WT"),
        ("w_cluster", number(0), 0.0, "weight of a contrastive loss on phi - theta, for the INR"),
        ("cluster_random", None, None, "that loss with random labels, the same for all of the run"),
        ("epochs", epochs, 10, "passes over the training set; 5.5: the last is half a one"),
        ("batch_size", whole(1), 16, "images a step and process"),
        ("lr", number(0, above=True), 1e-4, "peak learning rate of the SIREN and the reader"),
        ("lr_alpha", number(0, above=True), 1e-2, "peak learning rate of alpha, the step sizes"),
        ("weight_decay", number(0), 1e-4, "AdamW's, on every parameter"),
        ("seed", whole(0), 0, "of initial parameters, data order, augmentation and pixels"),
        ("init_from", str, None, "checkpoint whose SIREN and alpha are taken; the reader is new"),
        ("freeze_siren", None, False, "train the reader only; with --init-from this is WT-seq"),
        ("precision", ("float32", "tf32", "bf16"), "float32",
         "of matrix products; bf16: the reader in bfloat16, else TF32")],
    "run (changes no result)": [
        ("data_root", str, "data", "folder of the downloaded data sets"),
        ("workers", whole(0), min(8, os.cpu_count() or 1), "processes that decode image files"),
        ("out", str, "out.pt", "checkpoint, *.pt; *.json and *.png are written beside it"),
        ("resume", None, False, "go on with the run saved in --out"),
        ("save_minutes", number(0), 5.0, "minutes between checkpoints, beside one an epoch"),
        ("device", str, "auto", "auto (CUDA if there is one), or a torch device"),
        ("recompute", None, False, "the backward pass computes the inner steps again: less memory"),
        ("compile", None, None, "torch.compile the step (default: on CUDA)"),
        ("eval_only", None, False, "evaluate --ckpt; writes nothing unless --out is given"),
        ("ckpt", str, None, "checkpoint to evaluate")]}
RECIPE = {name: default for group in FLAGS.values() for name, _, default, _ in group}
DIGITS = dict(width=64, depth=2, steps=4, reader_depth=3, head_dim=32, epochs=15, lr=3e-3)
HIGH_RESOLUTION = dict(omega=30.0, steps=4, epochs=40, fraction=0.25)      # from 64 pixels a side

FREE = {name for name, *_ in FLAGS["run (changes no result)"]}
CORE = ("width", "depth", "omega", "steps", "shared_lr", "centre_colour")  # what --init-from brings


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(message)


def parser(description: str = "") -> Parser:
    """All flags. What is not given is absent from the result."""
    p = Parser(prog="train.py", description=description, allow_abbrev=False,
               argument_default=argparse.SUPPRESS)
    for title, flags in FLAGS.items():
        group = p.add_argument_group(title)
        for name, kind, default, text in flags:
            usual = {"": default, "digits ": DIGITS.get(name),
                     "64 pixels and more ": HIGH_RESOLUTION.get(name)}
            usual = [f"{where}{value}" for where, value in usual.items()
                     if value is not None and value is not False]
            text += f" (default {'; '.join(usual)})" if usual else ""
            takes = {"type": kind} if kind else {"action": "store_true"}
            takes = {"choices": kind} if isinstance(kind, tuple) else takes
            group.add_argument(flag(name), help=text, **takes)
    group.add_argument("--no-compile", dest="compile", action="store_false", help="run eagerly")
    return p


def flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def as_flags(values: dict) -> list[str]:
    """The command line that gives these settings; what is None or False needs no flag."""
    return [flag(key) if value is True else f"{flag(key)}={value}"
            for key, value in values.items() if value is not None and value is not False]


def recipe(dataset: str, size: int | None) -> dict:
    """All settings where no flag says otherwise."""
    size = size or SIZE.get(dataset, 32)
    special = (DIGITS if dataset == "digits" else {}) | (HIGH_RESOLUTION if size >= 64 else {})
    return RECIPE | special | {"dataset": dataset, "size": size}


def command_line(args, program: str = "train") -> str:
    """The shortest command that makes this run, whatever flags it was started or resumed with."""
    usual = recipe(args.dataset, args.size)
    usual |= {"dataset": "digits", "size": SIZE.get(args.dataset, 32)}
    if program == "cohort":                                # its defaults are its own
        usual = {}
    hidden = {"resume", "eval_only", "ckpt", "compile", "recompute", "workers"}
    hidden |= set() if program == "train" else {"token_scale"}     # it follows from the tokens
    changed = {key: value for key, value in vars(args).items()
               if value != usual.get(key) and key not in hidden}
    return shlex.join([*LAUNCH.split(), f"{program}.py", *as_flags(changed)])


def settings(explicit: dict, saved: dict | None = None) -> argparse.Namespace:
    """Explicit flags over a saved run's, or over the data set's recipe (and what --init-from
    brings). InputError: flags that do not go together."""
    if saved is None:
        saved = recipe(explicit.get("dataset", "digits"), explicit.get("size"))
        if path := explicit.get("init_from"):
            content = read_checkpoint(path)
            core = RECIPE | content["args"]
            taken = [*CORE, "val"] if core["dataset"] == saved["dataset"] else CORE    # held out
            if content["method"] != "mwt":
                raise InputError(f"--init-from {path}: not made by train.py")
            check_changes({key: explicit[key] for key in taken if key in explicit}, core, path)
            saved |= {key: core[key] for key in taken}
    args = argparse.Namespace(**(RECIPE | saved | explicit))
    branch, _, column = (args.branch or "bias").partition(":")
    is_column = branch == "column" and column.isdecimal() and int(column) < args.width
    if args.width % args.head_dim:
        raise InputError(f"--head-dim {args.head_dim} does not divide --width {args.width}")
    if args.steps_test not in (None, args.steps) and not args.shared_lr:
        raise InputError(f"--steps-test {args.steps_test} differs from --steps {args.steps}: that "
                         "needs --shared-lr, one alpha for all steps")
    if not is_column and args.branch not in (None, "bias", "colour"):
        raise InputError(f"--branch {args.branch}: neither bias nor colour nor column:0 to "
                         f"column:{args.width - 1}")
    if args.cluster_random and not args.w_cluster:
        raise InputError("--cluster-random: says which labels --w-cluster takes; give both")
    if args.w_cluster and WORLD > 1:
        raise InputError("--w-cluster compares the images of a batch: not by torchrun")
    if int(args.fraction * args.size ** 2 + 1e-9) < 1:
        raise InputError(f"--fraction {args.fraction:g} of {args.size}x{args.size} pixels is less "
                         "than one")
    return args


def check_changes(explicit: dict, made_with: dict, path: str, free=frozenset()):
    """Explicit flags may differ from a checkpoint's only where that changes no result."""
    for key, value in explicit.items():
        if key not in free and value != made_with.get(key):
            raise InputError(f"{flag(key)} {value}: but {path} was made with {made_with.get(key)}")


def find_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=device).item()
        return device
    except Exception as error:     # no driver, no such index, not built in: a type for each
        raise InputError(f"--device {name}: {str(error).splitlines()[0][:120]}") from error


def check_output(args):
    """Before any work: can args.out be written, and would that destroy anything?"""
    out = Path(args.out)
    if out.suffix != ".pt":
        raise InputError(f"--out {out}: the name must end in .pt")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise InputError(f"--out {out}: is a folder, or its folder cannot be written to")
    if args.resume or args.eval_only or not out.exists():
        return
    if args.init_from and os.path.samefile(out, args.init_from):
        raise InputError(f"--out {out}: would overwrite --init-from; choose another")
    try:
        unfinished = "progress" in read_checkpoint(out)
    except InputError as error:
        raise InputError(f"--out {out}: would overwrite a file that is no checkpoint") from error
    if unfinished:
        raise InputError(f"--out {out}: holds an unfinished run; go on with it by --resume, or "
                         "delete it, or choose another")


def open_run(explicit: dict) -> tuple[argparse.Namespace, dict | None]:
    """The settings, and the checkpoint to evaluate or to go on with."""
    saved, content, evaluates = None, None, "eval_only" in explicit
    if evaluates != ("ckpt" in explicit):
        raise InputError("--eval-only and --ckpt need each other; to start from a checkpoint's "
                         "SIREN use --init-from, to go on with a run --resume")
    if evaluates or "resume" in explicit:
        path = explicit["ckpt"] if evaluates else explicit.get("out", RECIPE["out"])
        content, free = read_checkpoint(path), FREE
        if content["method"] != "mwt":
            raise InputError(f"{path}: made by {content['method']}, not by train.py")
        saved = content["args"]
        if evaluates:
            free = FREE | {"dataset", "test_size", "steps_test", "fraction", "precision"}
            if not explicit.get("val"):        # a share could have been trained on
                free.add("val")
        elif "progress" in content:            # the same global batch, on any number of processes
            batch = content["progress"]["global_batch"]
            if batch % WORLD:
                raise InputError(f"--resume: a batch of {batch} images in all cannot be split over "
                                 f"{WORLD} processes")
            saved["batch_size"] = batch // WORLD
        check_changes(explicit, saved, path, free)
        saved = saved | ({"device": "auto", "compile": False, "out": None} if evaluates else {})
    args = settings(explicit, saved)
    if RANK == 0 and args.out is not None:
        check_output(args)
    return args, content


# ---- The machine ---------------------------------------------------------------------------------

def free_memory(device: torch.device) -> float:
    """Bytes that can be taken; infinity where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(dict(line.split()[:2] for line in lines)["MemAvailable:"])
    return math.inf


def peak_memory(device: torch.device) -> int | None:
    """Bytes: of the device on CUDA, else of the process; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(ImportError):     # Windows has no such module
        import resource
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def environment(device: torch.device) -> dict:
    """What a measurement depends on beside the code."""
    cuda = device.type == "cuda"
    hardware = torch.cuda.get_device_name(device) if cuda else platform.machine()
    return {"device": f"{device}: {hardware}", "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "numpy": np.__version__}}
