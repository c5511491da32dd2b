"""A trained model on disk, whichever method made it: written whole or not at all, read without
ever running code from the file.

    save_checkpoint("out.pt", {"method": "mwt", "args": ..., "data": ..., "model": ..., ...})
    model, args = load_checkpoint("out.pt", "cpu")

A method's file offers `from_checkpoint(content, device) -> model`.
"""
import argparse
import contextlib
import hashlib
import importlib
import os
import sys
from pathlib import Path

import torch

FORMAT, VERSION = "routed-inr", 1
# A method's file; a module's name never comes from a checkpoint.
METHODS = {"mwt": "model", "pixels": "pixels", "hyperinr": "hyperinr", "mlora": "mlora",
           "cohort": "cohort"}
PARTS = {"args": dict, "data": tuple, "model": dict, "metrics": dict}


class InputError(Exception):
    """The user's input cannot be used: one line that says what is wrong, where, what to do."""
    status = 2


class Stop(Exception):
    """The program ends here with this exit status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@contextlib.contextmanager
def exits(program: str):
    """How every program ends early: one line and no traceback. Exit status 2: bad input; 1: a loss
    that is not finite; 130, 143: stopped by Ctrl-C, SIGTERM."""
    try:
        yield
    except (InputError, Stop, KeyboardInterrupt) as error:
        status = getattr(error, "status", 130)
        kind = "error: " if status == 2 else ""
        print(f"{program}: {kind}{str(error) or 'interrupted'}", file=sys.stderr)
        raise SystemExit(status) from None


def generator(*key, device="cpu") -> torch.Generator:
    """A random generator that is a function of `key` alone: what it is for, the seed, the step.
    So a resumed run needs no random state, and no draw depends on how many came before it."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


@contextlib.contextmanager
def seeded(*key):
    """Layers made inside take their initial parameters from a generator of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.set_state(generator(*key).get_state())
        yield


def save_checkpoint(path: str | Path, content: dict):
    """Writes the whole file or nothing: the last good one stays until the new one is on disk."""
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as f:
        torch.save({"format": FORMAT, "version": VERSION, **content}, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def read_checkpoint(path: str | Path) -> dict:
    """What was saved: method, args (all flags), data (channels, class names, number of training
    images), model (a state dict), metrics; of an unfinished run progress, optimizer, scheduler too.

    InputError: a file that is missing, truncated, of another kind, or of another version.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except Exception as error:     # a damaged archive raises errors of many types
        raise InputError(f"{path}: damaged, truncated or not a checkpoint") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path}: not a checkpoint of {FORMAT}")
    if content.get("version") != VERSION:
        raise InputError(f"{path}: checkpoint version {content.get('version')}, not {VERSION}")
    content.setdefault("method", "mwt")        # the first checkpoints did not say
    if content["method"] not in METHODS:
        raise InputError(f"{path}: made by a method unknown here; known are {', '.join(METHODS)}")
    for key, kind in PARTS.items():
        if not isinstance(content.get(key), kind):
            raise InputError(f"{path}: damaged: no {key} in it")
    return content


def model_from(content: dict, path: str | Path, device="cpu"):
    """The model in what `read_checkpoint` returned. InputError: its parts do not fit together."""
    try:
        method = importlib.import_module(METHODS[content["method"]])
        model = method.from_checkpoint(content, device)
    except Exception as error:     # wrong shapes, keys, types: whatever a damaged file brings
        raise InputError(f"{path}: damaged: its settings and parameters disagree") from error
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        raise InputError(f"{path}: damaged: its parameters are not finite")
    return model


def load_checkpoint(path: str | Path, device="cpu"):
    """(model, args): a model of any method, and the flags it was trained with."""
    content = read_checkpoint(path)
    return model_from(content, path, device), argparse.Namespace(**content["args"])
