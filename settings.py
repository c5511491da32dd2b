"""What a run is given: its flags and recipes, the checks that come before any work, the machine.

A flag that is not given is absent from what the parser returns: a recipe or a checkpoint has it.
"""
import argparse
import contextlib
import math
import os
import platform
import shlex
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
    def parse(text: str):
        value = kind(text)
        if not low <= value <= high or value == math.inf or above and value == low:
            raise argparse.ArgumentTypeError(
                f"{text} is not {'above' if above else 'from'} {low}, at most {high}")
        return value
    parse.__name__ = kind.__name__             # for argparse's message
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
        ("size", whole(2), None, "pixels a side (default: the data's own; a folder 32)"),
        ("train_size", whole(1), None, "train on so many images, always the same ones"),
        ("test_size", whole(1), None, "evaluate on so many images"),
        ("val", number(0, 0.9), 0.0, "share of the training set to evaluate on, held out"),
        ("augment", None, False, "random crop, flip; from 64 pixels on also rotation and scale")],
    "model": [
        ("width", whole(1, 4096), 128, "neurons a layer; also the reader's width"),
        ("depth", whole(1, 64), 4, "hidden layers of the SIREN"),
        ("omega", number(0, above=True), 10.0, "omega, frequency of the first layer"),
        ("steps", whole(1), 6, "k, inner-loop steps"),
        ("steps_test", whole(1), None, "k in evaluation, with --shared-lr"),
        ("shared_lr", None, False, "one alpha for all inner steps"),
        ("fraction", number(0, 1, above=True), 1.0, "s, share of the pixels drawn a step"),
        ("reader_depth", whole(0, 1000), 10, "blocks of the reader"),
        ("head_dim", whole(1), 64, "features an attention head; divides the width"),
        ("mlp_ratio", whole(1), 1, "hidden over outer features in the reader's MLP"),
        ("token_scale", number(0), 500.0, "lambda, factor on the tokens; 0: layer norm instead"),
        ("readout", whole(0), 0, "learned queries that gather the tokens; 0: their mean"),
        ("branch", str, None, "bias, column:N or colour (the mean): past the blocks to the logits"),
        ("centre_colour", None, False, "remove each image's mean colour before it is fitted")],
    "training": [
        ("w_task", number(0), 0.01, "weight of the class loss for the INR; 0 is WT"),
        ("w_cluster", number(0), 0.0, "weight of a contrastive loss on phi - theta, for the INR"),
        ("cluster_random", None, None, "that loss with random labels, fixed for the run"),
        ("epochs", epochs, 10, "passes over the training set; 5.5: the last is half a one"),
        ("batch_size", whole(1), 16, "images a step and process"),
        ("lr", number(0, above=True), 1e-4, "peak learning rate of the SIREN and the reader"),
        ("lr_alpha", number(0, above=True), 1e-2, "peak learning rate of alpha, the step sizes"),
        ("weight_decay", number(0), 1e-4, "AdamW's, on every parameter"),
        ("seed", whole(0), 0, "of initial parameters, data order, augmentation and pixels"),
        ("init_from", str, None, "checkpoint to take SIREN and alpha from"),
        ("freeze_siren", None, False, "train the reader only; with --init-from this is WT-seq"),
        ("precision", ("float32", "tf32", "bf16"), "float32", "bf16: of the reader, else TF32")],
    "run (changes no result)": [
        ("data_root", str, "data", "folder of the downloaded data sets"),
        ("workers", whole(0), min(8, os.cpu_count() or 1), "processes that decode image files"),
        ("out", str, "out.pt", "checkpoint, *.pt; *.json and *.png are written beside it"),
        ("resume", None, False, "go on with the run in --out, by its flags"),
        ("save_minutes", number(0), 5.0, "minutes between checkpoints, beside one an epoch"),
        ("device", str, "auto", "auto (CUDA if there is one), or a torch device"),
        ("recompute", None, False, "compute the inner steps again going backward: less memory"),
        ("compile", None, None, "torch.compile the step (default: on CUDA)"),
        ("eval_only", None, False, "evaluate --ckpt; writes only a given --out"),
        ("ckpt", str, None, "checkpoint to evaluate")]}
RECIPE = {name: default for group in FLAGS.values() for name, _, default, _ in group}
DIGITS = dict(width=64, depth=2, steps=4, reader_depth=3, head_dim=32, epochs=15, lr=3e-3)
HIGH_RESOLUTION = dict(omega=30.0, steps=4, epochs=40, fraction=0.25)      # from 64 pixels a side

CORE = {"width", "depth", "omega", "steps", "shared_lr", "centre_colour"}  # what --init-from brings
FREE = {name for name, *_ in FLAGS["run (changes no result)"]}             # beside --resume
EVALUATED = {"dataset", "test_size", "steps_test", "fraction", "precision", "val"}     # and --ckpt


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(message)


def parser(description="", program="train.py", used=RECIPE.keys(), usual=RECIPE) -> Parser:
    """The flags that a program uses, with its usual values in the help. What is not given is absent
    from the result."""
    p = Parser(prog=program, description=description, allow_abbrev=False,
               argument_default=argparse.SUPPRESS)
    if usual is RECIPE:
        p.epilog = (f"Defaults for digits: {' '.join(as_flags(DIGITS))}; from 64 pixels a side on: "
                    f"{' '.join(as_flags(HIGH_RESOLUTION))}.")
    for title, flags in FLAGS.items():
        group = p.add_argument_group(title)
        for name, kind, default, text in flags:
            takes = ({"action": "store_true"} if kind is None else
                     {"choices": kind} if isinstance(kind, tuple) else {"type": kind})
            default = usual.get(name, default)
            text += "" if default in (None, False) else f" (default {default})"
            if name in used:
                group.add_argument(flag(name), help=text, **takes)
    if "compile" in used:
        group.add_argument("--no-compile", dest="compile", action="store_false", help="run eagerly")
    return p


def flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def as_flags(values: dict) -> list[str]:
    """The command line that gives these settings; what is None or False needs no flag."""
    words = {key: [flag(key)] if value is True else [flag(key), *value]
             if isinstance(value, list) else [f"{flag(key)}={value}"]
             for key, value in values.items() if value is not None and value is not False}
    return [word for each in words.values() for word in each]


def recipe(dataset: str, size: int | None) -> dict:
    """All settings where no flag says otherwise."""
    size = size or SIZE.get(dataset, 32)
    special = (DIGITS if dataset == "digits" else {}) | (HIGH_RESOLUTION if size >= 64 else {})
    return RECIPE | special | {"dataset": dataset, "size": size}


# For these some programs have usual values of their own.
OWN = "width depth omega fraction reader_depth head_dim epochs batch_size lr".split()


def command_line(args, program: str = "train") -> str:
    """A short command that makes this run, whatever flags it was started or resumed with."""
    usual = recipe(args.dataset, args.size)
    usual |= {"dataset": "digits", "size": SIZE.get(args.dataset, 32)}
    for key in {"cohort": [*usual], "hyperinr": OWN, "mlora": OWN}.get(program, ()):
        del usual[key]
    hidden = {"resume", "compile", "recompute", "workers"}
    if program != "train":
        hidden.add("token_scale")              # it follows from the tokens
    changed = {key: value for key, value in vars(args).items()
               if value != usual.get(key) and key not in hidden}
    return shlex.join([*LAUNCH.split(), f"{program}.py", *as_flags(changed)])


# ---- Checks before any work ----------------------------------------------------------------------

def settings(given: dict, saved: dict | None = None) -> argparse.Namespace:
    """Flags given, over a saved run's, or over the data set's recipe and what --init-from brings.
    InputError: flags that do not go together."""
    if saved is None:
        saved = recipe(given.get("dataset", "digits"), given.get("size"))
        if path := given.get("init_from"):
            core = RECIPE | read_checkpoint(path)["args"]
            taken = {*CORE, "val"} if core["dataset"] == saved["dataset"] else CORE    # held out
            read_run(path, given, RECIPE.keys() - taken)
            saved |= {key: core[key] for key in taken}
    args = argparse.Namespace(**(RECIPE | saved | given))
    branch, _, column = (args.branch or "bias").partition(":")
    is_column = branch == "column" and column.isdecimal() and int(column) < args.width
    problems = {
        f"--head-dim {args.head_dim} does not divide --width {args.width}":
            args.width % args.head_dim,
        f"--steps-test {args.steps_test}: other than --steps only with --shared-lr":
            args.steps_test not in (None, args.steps) and not args.shared_lr,
        f"--branch {args.branch}: neither bias, colour nor column:0 to column:{args.width - 1}":
            args.branch not in (None, "bias", "colour") and not is_column,
        "--cluster-random needs --w-cluster": args.cluster_random and not args.w_cluster,
        "--w-cluster compares the images of a batch: not by torchrun": args.w_cluster and WORLD > 1,
        f"--fraction {args.fraction:g} of {args.size}x{args.size} pixels is less than one":
            int(args.fraction * args.size ** 2 + 1e-9) < 1}
    for problem, is_there in problems.items():
        if is_there:
            raise InputError(problem)
    return args


def read_run(path: str, given: dict, free: set) -> dict:
    """A checkpoint of train.py. InputError: a flag is given that is neither free nor as it was."""
    content = read_checkpoint(path)
    if content["method"] != "mwt":
        raise InputError(f"{path}: made by {content['method']}, not by train.py")
    made_with = RECIPE | content["args"]
    for key in given.keys() - free:
        if given[key] != made_with[key]:
            raise InputError(f"{flag(key)} {given[key]}: but {path} was made with {made_with[key]}")
    return content


def open_run(given: dict) -> tuple[argparse.Namespace, dict | None]:
    """The settings, and the checkpoint to evaluate or to go on with, whose flags then hold."""
    content, saved = None, None
    if ("eval_only" in given) != ("ckpt" in given):
        raise InputError("--eval-only and --ckpt need each other; see also --init-from, --resume")
    if "eval_only" in given:                   # a new share of --val could have been trained on
        free = FREE | EVALUATED - ({"val"} if given.get("val") else set())
        content = read_run(given["ckpt"], given, free)
        saved = content["args"] | {"device": "auto", "out": None}
    elif "resume" in given:
        content = read_run(path := given.get("out", RECIPE["out"]), given, FREE)
        saved = content["args"]
        batch = content.get("progress", {}).get("global_batch")
        if batch not in (None, saved["batch_size"] * WORLD):
            raise InputError(f"--resume: {path} needs {batch // saved['batch_size']} process(es)")
    args = settings(given, saved)
    if RANK == 0 and args.out is not None:
        check_output(args)
    return args, content


def check_output(args):
    """Can args.out be written, and would that destroy anything?"""
    out = Path(args.out)
    if out.suffix != ".pt" or out.is_dir() or not os.access(out.parent, os.W_OK):
        raise InputError(f"--out {out}: must be a file *.pt in a folder that can be written to")
    if args.resume or args.eval_only or not out.exists():
        return
    if "progress" in read_checkpoint(out):     # what is no checkpoint is refused there
        raise InputError(f"--out {out}: an unfinished run: --resume or delete it, or name another")
    if args.init_from and os.path.samefile(out, args.init_from):
        raise InputError(f"--out {out}: would overwrite --init-from; choose another")


def method_settings(p: Parser, argv: list[str] | None, usual: dict, digits: dict):
    """The settings of another method's program: flags given, over its usual values, which `digits`
    changes for digits."""
    p.epilog = f"Defaults for digits: {' '.join(as_flags(digits))}."
    given = vars(p.parse_args(argv))
    usual = usual | (digits if given.get("dataset", "digits") == "digits" else {})
    args = settings(usual | given)
    check_output(argparse.Namespace(out=args.out, resume=True))    # it goes on with its own run
    return args


def open_method_run(args, found_out=frozenset({"token_scale"})) -> dict | None:
    """What the same command left, which has found some of its settings out. InputError: args.out
    holds another's run."""
    if not os.path.exists(args.out):
        return None
    content = read_checkpoint(args.out)
    fixed = vars(args).keys() - FREE - found_out
    if any(content["args"].get(key) != vars(args)[key] for key in fixed):
        raise InputError(f"--out {args.out}: holds another run; choose another")
    vars(args).update({key: content["args"][key] for key in found_out})
    return content


# ---- The machine ---------------------------------------------------------------------------------

def find_device(name: str) -> torch.device:
    """auto: CUDA if there is one. InputError: a device that cannot be used."""
    try:
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=device).item()
        return device
    except Exception as error:     # no driver, no such index, not built in: a type for each
        raise InputError(f"--device {name}: {str(error).splitlines()[0][:120]}") from error


def free_memory(device: torch.device) -> float:
    """Bytes that can be taken; infinity where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(dict(line.split()[:2] for line in lines)["MemAvailable:"])
    return math.inf


def environment(device: torch.device) -> dict:
    """What a measurement depends on beside the code."""
    cuda = device.type == "cuda"
    hardware = torch.cuda.get_device_name(device) if cuda else platform.machine()
    return {"device": f"{device}: {hardware}", "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "numpy": np.__version__}}
