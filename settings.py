"""What a run is given: its flags and recipes, the checks that come before any work, the machine.

Every program here takes its flags through this file. A flag that is not given is absent from what
the parser returns, so that a recipe, a checkpoint or --init-from can fill it in.
"""
import argparse
import contextlib
import math
import os
import platform
import re
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

def whole(low: int):
    """A whole number of at least `low`."""
    def parse(text: str) -> int:
        if not text.strip().lstrip("+-").isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {low}")
        return int(text)
    return parse


def number(low: float, high: float = math.inf, above: bool = False):
    """A finite number of at least `low`, or above it, and at most `high`."""
    limits = f"{'above' if above else 'of at least'} {low:g}"
    limits += f" and at most {high:g}" if high < math.inf else ""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or math.isinf(value) or above and value == low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {limits}")
        return value
    return parse


def branch_name(text: str) -> str:
    if text not in ("bias", "colour") and not re.fullmatch(r"column:(0|[1-9][0-9]*)", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither bias nor colour nor column:N")
    return text


# Each flag: name, what it takes (None: nothing), default, help. The defaults are the paper's recipe
# for CIFAR-10, MNIST and Fashion-MNIST; below is what differs elsewhere. An explicit flag wins.
FLAGS = {
    "data": [
        ("dataset", str, "digits", "digits, cifar10, mnist, fashion_mnist, or a folder with "
                                   "train/<class>/ and test/<class>/ or val/<class>/"),
        ("data_root", str, "data", "folder of the downloaded data sets"),
        ("size", whole(2), None, "pixels a side (default: the data set's own; a folder 32)"),
        ("train_size", whole(1), None, "train on so many images, always the same ones"),
        ("test_size", whole(1), None, "evaluate on so many images"),
        ("val", number(0, 0.9), 0.0, "share of the training set to evaluate on, held out"),
        ("augment", None, False, "random crop and flip; from 64 pixels on also rotation and scale"),
        ("workers", whole(0), min(8, os.cpu_count() or 1), "processes that decode image files")],
    "model": [
        ("width", whole(1), 128, "neurons a layer; also the reader's width"),
        ("depth", whole(1), 4, "hidden layers of the SIREN"),
        ("omega", number(0, above=True), 10.0, "omega, frequency of the first layer"),
        ("steps", whole(1), 6, "k, inner-loop steps"),
        ("steps_test", whole(1), None, "k in evaluation; other than --steps with --shared-lr only"),
        ("shared_lr", None, False, "one alpha for all inner steps"),
        ("fraction", number(0, 1, above=True), 1.0, "s, share of the pixels drawn a step"),
        ("reader_depth", whole(0), 10, "blocks of the reader"),
        ("head_dim", whole(1), 64, "features an attention head; divides the width"),
        ("mlp_ratio", whole(1), 1, "hidden over outer features in the reader's MLP"),
        ("token_scale", number(0), 500.0, "lambda, factor on the tokens; 0: layer norm instead"),
        ("readout", whole(0), 0, "learned queries that gather the tokens; 0: their mean"),
        ("branch", branch_name, None, "bias, column:N or colour: that column of the tokens, or the "
                                      "mean colour, to the logits past the reader's blocks"),
        ("centre_colour", None, False, "remove each image's mean colour before it is fitted")],
    "training": [
        ("w_task", number(0), 0.01, "weight of the class loss for the INR; 0 is WT"),
        ("w_cluster", number(0), 0.0, "weight of a contrastive loss on phi - theta, for the INR"),
        ("epochs", whole(1), 10, "passes over the training set"),
        ("batch_size", whole(1), 16, "images a step and process"),
        ("lr", number(0, above=True), 1e-4, "peak learning rate of the SIREN and the reader"),
        ("lr_alpha", number(0, above=True), 1e-2, "peak learning rate of alpha, the step sizes"),
        ("weight_decay", number(0), 1e-4, "AdamW's, on every parameter"),
        ("seed", whole(0), 0, "of initial parameters, data order, augmentation and pixels"),
        ("init_from", str, None, "checkpoint whose SIREN and alpha are taken; the reader is new"),
        ("freeze_siren", None, False, "train the reader only; with --init-from this is WT-seq")],
    "run": [
        ("out", str, "out.pt", "checkpoint, *.pt; *.json and *.png are written beside it"),
        ("resume", None, False, "go on with the run saved in --out"),
        ("save_minutes", number(0), 5.0, "minutes between checkpoints, beside one an epoch"),
        ("device", str, "auto", "auto (CUDA if there is one), or a torch device"),
        ("precision", str, "float32", "float32, tf32, or bf16: the reader in bfloat16, else TF32"),
        ("recompute", None, False, "the backward pass computes the inner steps again: less memory"),
        ("compile", None, None, "torch.compile the step (default: on CUDA)"),
        ("eval_only", None, False, "evaluate --ckpt; writes nothing unless --out is given"),
        ("ckpt", str, None, "checkpoint to evaluate")]}
RECIPE = {name: default for group in FLAGS.values() for name, _, default, _ in group}
DIGITS = dict(width=64, depth=2, steps=4, reader_depth=3, head_dim=32, epochs=15, lr=3e-3)
HIGH_RESOLUTION = dict(omega=30.0, steps=4, epochs=40, fraction=0.25)      # from 64 pixels a side

FREE = {"data_root", "out", "resume", "save_minutes", "workers", "device", "recompute", "compile",
        "eval_only", "ckpt"}                   # all others change the result
CORE = ("width", "depth", "omega", "steps", "shared_lr", "centre_colour")  # what --init-from brings


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(message)


def parser(description: str = "") -> Parser:
    """All flags. What is not given is absent from the result, so that recipes fill it in."""
    p = Parser(prog="train.py", description=description, allow_abbrev=False,
               argument_default=argparse.SUPPRESS)
    special = {"digits": DIGITS, "64 pixels and more": HIGH_RESOLUTION}
    for title, flags in FLAGS.items():
        group = p.add_argument_group(title)
        for name, kind, default, text in flags:
            defaults = [] if default in (None, False) and default != 0.0 else [str(default)]
            defaults += [f"{where} {s[name]}" for where, s in special.items() if name in s]
            text += f" (default {'; '.join(defaults)})" if defaults else ""
            takes = {"type": kind} if kind else {"action": "store_true"}
            group.add_argument("--" + name.replace("_", "-"), help=text, **takes)
    group.add_argument("--no-compile", dest="compile", action="store_false", help="run eagerly")
    return p


def as_flags(values: dict) -> list[str]:
    """The command line that gives these settings; what is None or False needs no flag."""
    flags = []
    for key, value in values.items():
        name = "--" + key.replace("_", "-")
        if value is not None and value is not False:
            flags.append(name if value is True else f"{name}={value}")
    return flags


def recipe(dataset: str = "digits", size: int | None = None) -> dict:
    """All settings where no flag says otherwise."""
    size = size or SIZE.get(dataset, 32)
    special = (DIGITS if dataset == "digits" else {}) | (HIGH_RESOLUTION if size >= 64 else {})
    return RECIPE | special | {"dataset": dataset, "size": size}


def command_line(args, program: str = "train") -> str:
    """The shortest command that makes this run, whatever flags it was started or resumed with."""
    usual = recipe(args.dataset, args.size) | {"dataset": "digits",
                                               "size": SIZE.get(args.dataset, 32)}
    run_only = {"resume", "eval_only", "ckpt", "compile", "recompute", "workers"}
    changed = {key: value for key, value in vars(args).items()
               if value != usual.get(key) and key not in run_only}
    return shlex.join([*LAUNCH.split(), f"{program}.py", *as_flags(changed)])


def flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def settings(explicit: dict, saved: dict | None = None) -> argparse.Namespace:
    """Explicit flags over a saved run's, or over the data set's recipe (and what --init-from
    brings). InputError: flags that do not go together."""
    if saved is None:
        saved = recipe(**{key: explicit[key] for key in ("dataset", "size") if key in explicit})
        if "init_from" in explicit:
            content = read_checkpoint(explicit["init_from"])
            if content["method"] != "mwt":
                raise InputError(f"--init-from {explicit['init_from']}: not made by train.py")
            core = RECIPE | content["args"]
            taken = [*CORE, "val"] if core["dataset"] == saved["dataset"] else CORE    # held out
            saved |= {key: core[key] for key in taken}
            for key in taken:
                if explicit.get(key, core[key]) != core[key]:
                    raise InputError(f"{flag(key)} {explicit[key]}: but {explicit['init_from']} "
                                     f"has {core[key]}")
    args = argparse.Namespace(**(RECIPE | saved | explicit))
    column = (args.branch or "").removeprefix("column:")
    if args.width % args.head_dim:
        raise InputError(f"--head-dim {args.head_dim} does not divide --width {args.width}")
    if args.precision not in ("float32", "tf32", "bf16"):
        raise InputError(f"--precision {args.precision}: neither float32 nor tf32 nor bf16")
    if args.steps_test not in (None, args.steps) and not args.shared_lr:
        raise InputError(f"--steps-test {args.steps_test} differs from --steps {args.steps}: that "
                         "needs --shared-lr, one alpha for all steps")
    if column.isdecimal() and int(column) >= args.width:
        raise InputError(f"--branch {args.branch}: a token's columns, but for the bias, are 0 to "
                         f"{args.width - 1}")
    if args.w_cluster and WORLD > 1:
        raise InputError("--w-cluster compares the images of a batch: not by torchrun")
    if int(args.fraction * args.size ** 2 + 1e-9) < 1:
        raise InputError(f"--fraction {args.fraction:g} of {args.size}x{args.size} pixels is less "
                         "than one pixel")
    return args


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
    if not os.access(out.parent, os.W_OK) or out.is_dir():
        raise InputError(f"--out {out}: no folder {out.parent} that can be written to"
                         if not out.is_dir() else f"--out {out}: is a folder")
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


def check_changes(explicit: dict, content: dict, path: str, free: set[str]):
    """Explicit flags may differ from a checkpoint's only where that changes no result."""
    for key, value in explicit.items():
        if key not in free and value != content["args"].get(key):
            raise InputError(f"{flag(key)} {value}: but {path} was made with "
                             f"{content['args'].get(key)}")


def open_run(explicit: dict) -> tuple[argparse.Namespace, dict | None]:
    """The settings, and the checkpoint to evaluate or to go on with."""
    content = None
    if explicit.get("eval_only"):
        if "ckpt" not in explicit:
            raise InputError("--eval-only needs --ckpt")
        content = read_checkpoint(explicit["ckpt"])
        free = FREE | {"dataset", "test_size", "steps_test", "fraction", "precision"}
        free |= set() if explicit.get("val") else {"val"}
        check_changes(explicit, content, explicit["ckpt"], free)
        saved = content["args"] | {"device": "auto", "compile": False, "out": None}
        args = settings(explicit, saved)
    elif "ckpt" in explicit:
        raise InputError("--ckpt needs --eval-only; to start from a checkpoint's SIREN use "
                         "--init-from, to go on with a run --resume")
    elif explicit.get("resume"):
        path = explicit.get("out", RECIPE["out"])
        content = read_checkpoint(path)
        if "progress" in content:              # the same global batch, on any number of processes
            batch, left = divmod(content["progress"]["global_batch"], WORLD)
            content["args"]["batch_size"] = batch
            if left:
                raise InputError(f"--resume: a batch of {batch * WORLD + left} images in all "
                                 f"cannot be split over {WORLD} processes")
        check_changes(explicit, content, path, FREE)
        args = settings(explicit, content["args"])
    else:
        args = settings(explicit)
    if RANK == 0 and args.out is not None:
        check_output(args)
    if content is not None and content["method"] != "mwt":
        raise InputError(f"this checkpoint was made by {content['method']}, not by train.py")
    return args, content


# ---- The machine ---------------------------------------------------------------------------------

def free_memory(device: torch.device) -> float:
    """Bytes that can be taken; infinity where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return 1024 * int(line.split()[1])
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
    hardware = platform.processor() or platform.machine()
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "numpy": np.__version__}
    return {"device": f"{device}: {hardware}", "threads": torch.get_num_threads(),
            "versions": versions}
