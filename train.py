"""Trains a SIREN initialisation, its inner-loop step sizes and a Transformer reader end to end, to classify images from the
weights of their INRs (Gielisse & van Gemert, "End-to-End Implicit Neural Representations for Classification", CVPR 2025).

    python train.py                                              # 8x8 digits, embedded: under two minutes on two CPU cores
    python train.py --dataset cifar10                            # the paper's MWT; downloads the data
    python train.py --dataset cifar10 --w-task 0                 # WT: the class loss does not reach the INR
    torchrun --nproc_per_node=4 train.py --dataset path/to/imagenette --width 256
    python train.py --resume --out out.pt                        # go on after a crash, a kill or Ctrl-C
    python train.py --eval-only --ckpt out.pt

Sections, top to bottom: settings, data, augmentation, model, checkpoints, evaluation, outer loop, report, command line.
"""
import argparse
import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import shlex
import signal
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

try:
    import resource
except ImportError:                # Windows
    resource = None

from inner_loop import MetaSGD, draw_pixels, functional_loss_and_grad, take_pixels, textbook_loss_and_grad
from reader import Reader
from siren import Siren, Weights, coordinate_grid

# ---- Settings ------------------------------------------------------------------------------------------------------------

# The paper's recipe for CIFAR-10, MNIST and Fashion-MNIST, then what differs elsewhere. An explicit flag always wins.
RECIPE = dict(
    dataset="digits", data_root="data", train_size=None, test_size=None, val=0.0, augment=False,
    width=128, depth=4, omega=10.0, steps=6, steps_test=None, shared_lr=False, fraction=1.0,
    reader_depth=10, head_dim=64, mlp_ratio=1, token_scale=500.0, readout=0, branch=None, centre_colour=False,
    w_task=0.01, w_cluster=0.0, epochs=10, batch_size=16, lr=1e-4, lr_alpha=1e-2, weight_decay=1e-4, seed=0,
    init_from=None, freeze_siren=False,
    out="out.pt", resume=False, save_minutes=5.0, workers=min(8, os.cpu_count() or 1), device="auto", precision="float32",
    recompute=False, compile=None, eval_only=False, ckpt=None, bench=None)
DIGITS = dict(width=64, depth=2, steps=4, reader_depth=3, head_dim=32, epochs=15, lr=3e-3)
HIGH_RESOLUTION = dict(omega=30.0, steps=4, epochs=40, fraction=0.25)      # at 64 pixels a side and more
SIZE = dict(digits=8, cifar10=32, mnist=28, fashion_mnist=28)              # pixels a side; a folder: 32

# These may change when a run is resumed; every other flag changes the result.
FREE = {"data_root", "out", "resume", "save_minutes", "workers", "device", "recompute", "compile", "eval_only", "ckpt", "bench"}
CORE = ("width", "depth", "omega", "steps", "shared_lr", "centre_colour")                   # what --init-from takes over

RESIDENT_BYTES = 2 << 30       # images (train + test, uint8) up to this size live on the device; more are decoded as needed
EVAL_POINTS = 1 << 17          # image points evaluated at once


class InputError(Exception):
    """The user's input cannot be used: one line that says what is wrong, where, and what to do."""
    status = 2


class BrokenImage(InputError):
    """A file that cannot be decoded; met by one process, which says so."""


class Stop(Exception):
    """The run ends here with this exit status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def generator(*key, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator that is a function of `key` alone. Every draw of a run comes from one keyed by what it is for, the
    seed and the step, so a resumed run needs no random state, and no draw depends on how many others came before it."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


@contextlib.contextmanager
def seeded(*key):
    """Layers made inside take their initial parameters from a generator of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.set_state(generator(*key).get_state())
        yield


# ---- Data ----------------------------------------------------------------------------------------------------------------

def decode(path: str, size: int) -> Tensor:
    """An image file of any size and mode, squashed to a square: uint8 (3, size, size)."""
    from PIL import Image
    with Image.open(path) as image:
        if image.mode.startswith("I"):                             # 16 bits a pixel: Pillow's convert would clip at 255
            image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8))
        image = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)       # antialiased
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Images(torch.utils.data.Dataset):
    """One split: labels (n,), class names, and uint8 pixels (n, C, size, size) or the paths of files yet to be decoded."""

    def __init__(self, classes: list[str], labels, pixels: Tensor | None = None, paths: np.ndarray | None = None,
                 size: int = 32, levels: int = 255):
        self.classes, self.labels, self.levels = classes, torch.as_tensor(labels, dtype=torch.long), levels
        self.pixels, self.paths = pixels, paths
        self.size, self.channels = (size, 3) if pixels is None else (pixels.shape[-1], pixels.shape[1])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row: int) -> Tensor | str:
        """The decoded image; of a file that cannot be decoded the path (an exception would reach us as a worker's traceback)."""
        path = os.fsdecode(self.paths[row])
        try:
            return decode(path, self.size)
        except Exception:
            return path

    def take(self, rows: Tensor) -> "Images":
        pixels = None if self.pixels is None else self.pixels[rows]
        paths = None if self.paths is None else self.paths[rows.cpu().numpy()]
        return Images(self.classes, self.labels[rows], pixels, paths, self.size, self.levels)

    def resident(self, device, workers: int) -> "Images":
        """The same images, decoded and on the device."""
        pixels = self.pixels
        if pixels is None:
            order = torch.arange(len(self)).split(64)
            batches = self.batches(order, "cpu", workers)
            pixels = torch.empty(len(self), 3, self.size, self.size, dtype=torch.uint8)
            for rows, (images, _) in zip(order, tqdm(batches, "decoding", len(order), leave=False, disable=None)):
                pixels[rows[0]:rows[0] + len(rows)] = images
        return Images(self.classes, self.labels.to(device), pixels.to(device), size=self.size, levels=self.levels)

    def batches(self, order, device, workers: int = 0):
        """Yields (uint8 images, labels) on the device for each tensor of row numbers in `order`. BrokenImage: as it says."""
        if self.pixels is not None:
            if isinstance(order, Tensor):                  # to the device once, not at every step
                order = order.to(self.pixels.device)
            for rows in order:
                rows = rows.to(self.pixels.device)
                yield self.pixels[rows], self.labels[rows]
            return
        loader = torch.utils.data.DataLoader(
            self, batch_sampler=[rows.tolist() for rows in order], num_workers=workers, collate_fn=collate,
            worker_init_fn=leave_signals_to_the_parent, pin_memory=torch.device(device).type == "cuda")
        for rows, images in zip(order, loader):
            if isinstance(images, str):
                raise BrokenImage(f"{images}: cannot be decoded as an image; replace it or remove it")
            yield images.to(device, non_blocking=True), self.labels[rows].to(device, non_blocking=True)

    def signal(self, images: Tensor) -> Tensor:
        """Grey levels 0 .. levels to [-1, 1]."""
        return images.to(torch.get_default_dtype()) * (2 / self.levels) - 1


def collate(samples: list[Tensor | str]) -> Tensor | str:
    broken = next((s for s in samples if isinstance(s, str)), None)
    return broken or (torch.stack(samples) if samples else torch.empty(0))     # a process may get no rows of a last batch


def leave_signals_to_the_parent(_worker: int):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def stratified(labels: Tensor, count: int) -> Tensor:
    """`count` row numbers with the same share of each class (largest remainders), always the same ones, in ascending order."""
    sizes = torch.bincount(labels)
    exact = sizes * (count / len(labels))
    take = exact.floor().long()
    take[torch.argsort(exact - take, descending=True, stable=True)[:count - int(take.sum())]] += 1
    rows = [torch.nonzero(labels == c).flatten()[torch.randperm(int(n), generator=generator("subset", c))[:t]]
            for c, (n, t) in enumerate(zip(sizes, take))]
    return torch.cat(rows).sort().values


def read_digits() -> dict[str, Images]:
    with np.load(Path(__file__).parent / "data" / "digits.npz") as f:
        return {split: Images([str(c) for c in range(10)], f[f"{split}_labels"],
                              torch.from_numpy(f[f"{split}_images"]).unsqueeze(1), levels=16) for split in ("train", "test")}


def read_torchvision(name: str, root: str) -> dict[str, Images]:
    from torchvision import datasets
    kind, where = {"cifar10": (datasets.CIFAR10, "cifar-10-batches-py (cifar-10-python.tar.gz unpacked)"),
                   "mnist": (datasets.MNIST, "MNIST/raw (the four unpacked ubyte files)"),
                   "fashion_mnist": (datasets.FashionMNIST, "FashionMNIST/raw (the four unpacked ubyte files)")}[name]
    folders = [Path(root, kind.__name__, "raw"), Path(root, kind.__name__), Path(root)]
    new = [folder for folder in folders if not folder.exists()]
    try:
        sets = {"train": kind(root, train=True, download=True), "test": kind(root, train=False, download=True)}
    except Exception as error:     # network, disk and format errors of many types
        for folder in new:         # torchvision makes them before it finds that it cannot download
            with contextlib.suppress(OSError):
                folder.rmdir()
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"--dataset {name}: not in {root} and not to be downloaded ({reason}); "
                         f"put {where} into {root}, or name another --data-root") from error
    pixels = {split: torch.as_tensor(s.data) for split, s in sets.items()}
    pixels = {split: x.unsqueeze(1) if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous() for split, x in pixels.items()}
    return {split: Images(s.classes, s.targets, pixels[split]) for split, s in sets.items()}


def read_folder(root: str, size: int) -> dict[str, Images]:
    from torchvision.datasets import ImageFolder
    second = "test" if os.path.isdir(os.path.join(root, "test")) else "val"
    found = {}
    for split, name in (("train", "train"), ("test", second)):
        folder = os.path.join(root, name)
        if not os.path.isdir(folder):
            raise InputError(f"--dataset {root}: needs train/<class>/ and test/<class>/ or val/<class>/; {folder} is not there")
        try:
            files = ImageFolder(folder)
        except (FileNotFoundError, OSError) as error:
            raise InputError(f"--dataset {root}: {' '.join(str(error).split())}") from error
        found[split] = Images(files.classes, files.targets, paths=np.array([os.fsencode(p) for p, _ in files.samples]), size=size)
    train, test = found["train"].classes, found["test"].classes
    if train != test:
        odd = sorted(set(train) ^ set(test))
        raise InputError(f"--dataset {root}: train and {second} differ in their classes: {', '.join(odd[:5])} in only one of them")
    if len(train) < 2:
        raise InputError(f"--dataset {root}: one class only ({train[0]}); a classifier needs two")
    return found


def load_dataset(args, device: torch.device | str = "cpu", train: bool = True) -> tuple[Images | None, Images]:
    """(train, test) of args.dataset, cut and split as args say, on the device where they fit; train=False leaves it undecoded.

    With args.val the second is that share of the training set, held out of the first. Uses args.dataset, data_root, size,
    train_size, test_size, val, workers. InputError: data that are missing or cannot be used.
    """
    if args.dataset == "digits":
        found = read_digits()
    elif args.dataset in SIZE:
        found = read_torchvision(args.dataset, args.data_root)
    elif os.path.isdir(args.dataset):
        found = read_folder(args.dataset, args.size)
    else:
        raise InputError(f"--dataset {args.dataset}: neither {', '.join(SIZE)} nor a folder that is there")
    if args.val:
        every = torch.arange(len(found["train"]))
        held = stratified(found["train"].labels, max(1, round(args.val * len(every))))
        found = {"train": found["train"].take(every[~torch.isin(every, held)]), "test": found["train"].take(held)}
    for split, count in (("train", args.train_size), ("test", args.test_size)):
        if count is not None:
            if count > len(found[split]):
                raise InputError(f"--{split}-size {count}: there are only {len(found[split])} images")
            found[split] = found[split].take(stratified(found[split].labels, count))
    for split, data in found.items():
        if data.pixels is not None and data.size != args.size:
            from torchvision.transforms.functional import resize
            found[split] = Images(data.classes, data.labels, resize(data.pixels, [args.size] * 2, antialias=True), levels=data.levels)
    wanted = [split for split in found if train or split == "test"]
    if sum(len(found[split]) for split in wanted) * found["test"].channels * args.size ** 2 <= RESIDENT_BYTES:
        found.update({split: found[split].resident(device, args.workers) for split in wanted})
    return found["train"], found["test"]


# ---- Augmentation: whole batches, on the device --------------------------------------------------------------------------

def augment_low(images: Tensor, u: Tensor, flip: bool) -> Tensor:
    """Images (N, C, size, size) cropped out of 4 pixels of reflection (a quarter of the image where that is less), and flipped,
    by uniform numbers u (N, 6). Below 64 pixels a side."""
    n, _, size, _ = images.shape
    pad = min(4, size // 4)

    def source(shift):             # (N, size): where each row or column of the crop comes from
        i = (torch.arange(size, device=images.device) + (shift * (2 * pad + 1)).long().unsqueeze(1) - pad).abs()
        return (size - 1) - ((size - 1) - i).abs()

    rows, cols = source(u[:, 0]), source(u[:, 1])
    if flip:
        cols = torch.where(u[:, 2:3] < 0.5, cols.flip(1), cols)
    image = torch.arange(n, device=images.device)[:, None, None]
    return images[image, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def augment_high(images: Tensor, u: Tensor, flip: bool, pixels: Tensor | None = None) -> Tensor:
    """Rotation by up to 30 degrees, the corners filled by reflection, then a crop of area 0.8 to 1 of the image and aspect 3/4 to
    4/3, and a flip, in one bilinear look-up; by uniform numbers u (N, 6). From 64 pixels a side. An aspect r fits into the image
    only for area <= r <= 1 / area, so its logarithm is uniform in that range. The images (N, C, size, size), or of the result
    only those of its pixels that pixels (d, N, n) number: (d, N, n, C).
    """
    angle = (2 * u[:, 0] - 1) * math.radians(30)
    area = 0.8 + 0.2 * u[:, 1]
    aspect = area ** (2 * u[:, 2] - 1)
    half_w, half_h = (area * aspect).sqrt(), (area / aspect).sqrt()
    centre_x, centre_y = (2 * u[:, 3] - 1) * (1 - half_w), (2 * u[:, 4] - 1) * (1 - half_h)
    if flip:
        half_w = torch.where(u[:, 5] < 0.5, -half_w, half_w)
    cos, sin = angle.cos(), angle.sin()
    where = torch.stack([torch.stack([cos * half_w, -sin * half_h, cos * centre_x - sin * centre_y], dim=-1),
                         torch.stack([sin * half_w, cos * half_h, sin * centre_x + cos * centre_y], dim=-1)], dim=-2)  # (N, 2, 3)
    n, channels, size, _ = images.shape
    drawn = torch.arange(size * size, device=images.device).expand(1, n, -1) if pixels is None else pixels
    xy = (2 * torch.stack([drawn % size, drawn // size], dim=-1) + 1) / size - 1           # (d, N, n, 2)
    xy = xy.to(where.dtype) @ where[..., :2].mT + where[:, None, :, 2]
    found = F.grid_sample(images.to(where.dtype), xy.transpose(0, 1), mode="bilinear", padding_mode="reflection", align_corners=False)   # (N, C, d, n)
    return found.view_as(images) if pixels is None else found.permute(2, 0, 3, 1)


# ---- Model ---------------------------------------------------------------------------------------------------------------

class MWT(nn.Module):
    """Anchor, inner loop and reader for images (N, channels, size, size) in [-1, 1]."""

    def __init__(self, channels: int, size: int, classes: int, width=128, depth=4, omega=10.0, steps=6, shared_lr=False,
                 fraction=1.0, reader_depth=10, head_dim=64, mlp_ratio=1, token_scale=500.0, readout=0, branch=None, centre_colour=False,
                 w_task=0.01, w_cluster=0.0, bf16=False, seed=0):
        super().__init__()
        self.fraction, self.w_task, self.w_cluster, self.centre_colour, self.bf16 = fraction, w_task, w_cluster, centre_colour, bf16
        with seeded("siren", seed):
            self.siren = Siren(2, channels, width, depth, omega)
        with seeded("inner loop", seed):
            self.inner_loop = MetaSGD(self.siren, steps, shared_lr)
        with seeded("reader", seed):
            self.reader = Reader(depth * width, width, classes, reader_depth, head_dim, mlp_ratio, token_scale, readout, branch, channels)
        self.register_buffer("coords", coordinate_grid(size, size), persistent=False)      # (P, 2)

    def draw(self, draws: int, images: int, generator: torch.Generator) -> Tensor | None:
        """Pixel numbers (draws, images, n) for inner steps and losses; None where every pixel is used."""
        if self.fraction == 1:
            return None
        return draw_pixels(draws, images, len(self.coords), self.fraction, generator, generator.device)

    def look(self, images: Tensor, pixels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Coordinates (P, 2) and values (N, P, C), or (d, N, n, 2) and (d, N, n, C) of those that pixels (d, N, n) number."""
        values = images.flatten(2).mT
        return (self.coords, values) if pixels is None else take_pixels(self.coords, values, pixels)

    def colour(self, values: Tensor) -> Tensor:
        """Mean colour (N, C) of values (N, P, C), or of all drawn pixels (d, N, n, C)."""
        return values.mean(1) if values.dim() == 3 else values.mean((0, 2))

    def adapt(self, images: Tensor, steps: int | None = None, pixels: Tensor | None = None) -> Weights:
        """phi, the weights of each image's INR; with centre_colour of the image less its mean colour."""
        coords, values = self.look(images, pixels)
        if self.centre_colour:
            values = values - self.colour(values)[:, None]
        return self.inner_loop(self.siren, coords, values, steps, self.fraction)

    def tokens(self, weights: Weights) -> Tensor:
        """phi - theta, hidden neuron by hidden neuron: (N, depth * width, width + 1); tokens[..., -1] is the bias column."""
        return (weights.hidden - self.siren.hidden).flatten(1, 2)

    def fit(self, images: Tensor, steps: int | None = None, pixels: Tensor | None = None) -> Tensor:
        """images (N, C, size, size) -> tokens."""
        return self.tokens(self.adapt(images, steps, pixels))

    def read(self, tokens: Tensor, flow: bool = False, colour: Tensor | None = None):
        """tokens -> logits (N, classes); with flow=True also the reader's states. colour: for a reader with a branch that takes it."""
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bf16):
            return self.reader(tokens, flow, colour)

    def reconstruct(self, coords: Tensor, values: Tensor, steps: int | None = None, clamp: bool = False) -> tuple[Weights, Tensor]:
        """phi and each image's mean squared error (N,) there, of what `look` returned; of k + 1 draws the error's is the last."""
        mean = self.colour(values)[:, None] if self.centre_colour else 0.0                     # (N, 1, C)
        weights = self.inner_loop(self.siren, coords, values - mean, steps)
        if values.dim() == 4:
            coords, values = coords[-1], values[-1]
        prediction = self.siren(coords, weights) + mean
        return weights, ((prediction.clamp(-1, 1) if clamp else prediction) - values).square().mean((-2, -1))

    def forward(self, coords: Tensor, values: Tensor, labels: Tensor) -> Tensor:
        """Means over a batch as `look` returned it (5,): class loss, reconstruction and weighted contrastive loss, the outer losses,
        then accuracy and PSNR (dB).

        The class loss reaches the INR with weight w_task: its gradient is scaled where tokens enter the reader, so that one
        backward pass serves all losses.
        """
        weights, error = self.reconstruct(coords, values)
        tokens = self.tokens(weights)
        value = tokens.detach()
        logits = self.read(value + self.w_task * (tokens - value) if self.w_task else value, colour=self.colour(values)).to(tokens.dtype)
        whole = torch.cat([(weights.first - self.siren.first).flatten(1), tokens.flatten(1)], 1) if self.w_cluster else None
        cluster = self.w_cluster * supervised_contrastive(whole, labels) if self.w_cluster else error.new_zeros(())
        return torch.stack([F.cross_entropy(logits, labels), error.mean(), cluster, (logits.argmax(-1) == labels).to(error.dtype).mean(),
                            psnr(error.detach()).mean()])


def psnr(error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1] (peak to peak 2), at most 100 dB."""
    return 10 * torch.log10(4 / error.clamp_min(4e-10))


def supervised_contrastive(x: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """Pulls rows x (n, d) of one label together (Khosla et al., NeurIPS 2020, equation 2, without a projection head): with z the rows
    at length 1, the mean over rows i of -1/|P(i)| sum_{p in P(i)} log(exp(z_i z_p / t) / sum_{a != i} exp(z_i z_a / t)). P(i): the other
    rows of i's label; rows that have none are left out, 0 if all are."""
    z = F.normalize(x, dim=1)
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_p = (z @ z.T / temperature).masked_fill(own, -math.inf).log_softmax(1)             # (n, n)
    positive = (labels[:, None] == labels) & ~own
    count = positive.sum(1)
    return -(log_p.masked_fill(~positive, 0).sum(1) / count.clamp_min(1)).sum() / (count > 0).sum().clamp_min(1)


def build_model(args, channels: int, classes: int) -> MWT:
    keys = ("width", "depth", "omega", "steps", "shared_lr", "fraction", "reader_depth", "head_dim", "mlp_ratio", "token_scale",
            "readout", "branch", "centre_colour", "w_task", "w_cluster", "seed")
    return MWT(channels, args.size, classes, bf16=args.precision == "bf16", **{key: getattr(args, key) for key in keys})


# ---- Checkpoints ---------------------------------------------------------------------------------------------------------

FORMAT, VERSION = "routed-inr", 1


def save_checkpoint(path: str | Path, content: dict):
    """Writes the whole file or nothing: the last good one stays in place until the new one is safe on the disk."""
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as f:
        torch.save({"format": FORMAT, "version": VERSION, **content}, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint's content: args, data, model, metrics, and of an unfinished run progress, optimizer, scheduler.

    InputError: a file that is missing, truncated, of another kind or of an unknown version.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except Exception as error:     # a damaged archive raises errors of many types
        raise InputError(f"{path}: not a checkpoint that can be read: truncated, damaged or of another kind") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path}: not a checkpoint of {FORMAT}")
    if content.get("version") != VERSION:
        raise InputError(f"{path}: checkpoint version {content.get('version')}, but this program reads version {VERSION}")
    if not all(isinstance(content.get(key), kind) for key, kind in dict(args=dict, data=tuple, model=dict, metrics=dict).items()):
        raise InputError(f"{path}: a damaged checkpoint: parts of it are missing")
    try:                           # its settings pass the same checks as a user's
        known = vars(parser().parse_args(as_flags(content["args"])))
    except InputError as error:
        raise InputError(f"{path}: a damaged checkpoint: {error}") from error
    if "size" not in known or any(known.get(key) != value for key, value in content["args"].items() if value not in (None, False)):
        raise InputError(f"{path}: a damaged checkpoint: its settings are incomplete or of wrong types")
    return content | {"args": RECIPE | content["args"]}


def model_from(content: dict, path: str | Path, device: torch.device | str) -> MWT:
    args = argparse.Namespace(**content["args"])
    try:
        channels, classes, _ = content["data"]
        with torch.device("meta"):                                             # takes no memory: the sizes are only claims
            model = build_model(args, channels, len(classes))
        model.load_state_dict(content["model"], assign=True)
        model.coords = coordinate_grid(args.size, args.size).to(model.siren.first.dtype)
        model = model.to(device)
    except Exception as error:
        raise InputError(f"{path}: a damaged checkpoint: its settings and its parameters do not agree") from error
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        raise InputError(f"{path}: a damaged checkpoint: its parameters are not finite")
    return model


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> tuple[MWT, argparse.Namespace]:
    """The model and the settings it was trained with. InputError: not a usable checkpoint."""
    content = read_checkpoint(path)
    return model_from(content, path, device), argparse.Namespace(**content["args"])


# ---- Processes: with torchrun every process takes its rows of the global batch -------------------------------------------

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LAUNCH = f"torchrun --nproc_per_node={WORLD}" if WORLD > 1 else "python"


def average(tensors: list[Tensor]):
    """In place, the mean over processes of each tensor: one flat all-reduce."""
    if WORLD > 1:
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, mean in zip(tensors, (flat / WORLD).split([t.numel() for t in tensors])):
            t.copy_(mean.view_as(t))


def agree(code: int, group=None) -> int:
    """The largest code any process has, over the hosts' network: no process leaves the loop alone, no device waits."""
    if WORLD > 1:
        code = torch.tensor(code)
        dist.all_reduce(code, op=dist.ReduceOp.MAX, group=group)
    return int(code)


# ---- Evaluation ----------------------------------------------------------------------------------------------------------

def wilson(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95% interval of a proportion (Wilson, JASA 1927)."""
    p, centre = correct / n, (correct / n + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


@torch.no_grad()
def evaluate(model: MWT, data: Images, steps: int | None = None, workers: int = 0, poll=lambda: None) -> dict:
    """Accuracy with its interval and mean PSNR (dB) over `data`. `poll` is called between batches.

    With fraction < 1 the inner loop and the PSNR see drawn pixels, from a generator of their own that is the same each time.
    """
    device, k = model.coords.device, model.inner_loop.steps if steps is None else steps
    size = max(WORLD, EVAL_POINTS // max(1, int(model.fraction * len(model.coords))))
    order = torch.arange(len(data)).split(min(size, 512))
    mine = [rows[RANK::WORLD] for rows in order]
    correct, decibels = torch.zeros(2, len(data), device=device)
    for b, (images, labels) in enumerate(data.batches(mine, device, workers)):
        poll()
        if len(images):
            pixels = model.draw(k + 1, len(order[b]), generator("evaluation", b, device=device))
            pixels = None if pixels is None else pixels[:, RANK::WORLD]
            coords, values = model.look(data.signal(images), pixels)
            weights, error = model.reconstruct(coords, values, steps, clamp=True)
            decibels[mine[b]] = psnr(error).to(decibels.dtype)
            correct[mine[b]] = (model.read(model.tokens(weights), colour=model.colour(values)).argmax(-1) == labels).to(correct.dtype)
    if WORLD > 1:
        dist.all_reduce(correct)
        dist.all_reduce(decibels)
    correct = int(correct.sum())
    return {"test_accuracy": correct / len(data), "test_interval": list(wilson(correct, len(data))),
            "test_psnr": float(decibels.mean()), "test_images": len(data)}


def summary(result: dict, args) -> str:
    low, high = result["test_interval"]
    of = "held-out training images" if args.val else "test images"
    estimate = f" (an estimate: {args.fraction:g} of the pixels)" if args.fraction < 1 else ""
    return (f"accuracy {100 * result['test_accuracy']:.2f}% (95% interval {100 * low:.2f} to {100 * high:.2f}, "
            f"n = {result['test_images']} {of}), PSNR {result['test_psnr']:.2f} dB{estimate}")


# ---- Outer loop ----------------------------------------------------------------------------------------------------------

def parameter_groups(model: MWT, args) -> list[dict]:
    """Three groups, each with its learning rate and clipped by itself; frozen parameters are in none."""
    groups = [("siren", model.siren, args.lr), ("alpha", model.inner_loop, args.lr_alpha), ("reader", model.reader, args.lr)]
    groups = [{"name": name, "params": [p for p in part.parameters() if p.requires_grad], "lr": lr} for name, part, lr in groups]
    return [group for group in groups if group["params"]]


def backward(forward, groups: list[dict], *batch) -> Tensor:
    """Gradients of the losses, averaged over processes; returns the batch's statistics (5,), as MWT.forward."""
    stats = forward(*batch)
    stats[:3].sum().backward()
    stats = stats.detach()
    average([p.grad for group in groups for p in group["params"]] + [stats])
    return stats


def update(groups: list[dict], optimizer) -> Tensor:
    """Clips each group's gradient to norm 1 and steps; returns the sum of the norms. Nothing here waits for the device."""
    norms = [nn.utils.clip_grad_norm_(group["params"], 1.0) for group in groups]
    optimizer.step()
    optimizer.zero_grad()
    return sum(norms)


def make_optimizer(groups: list[dict], args) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=groups[0]["params"][0].device.type in ("cpu", "cuda"))


def compiled(model: MWT, *batch):
    """torch.compile of the step, tried on one batch; where this machine cannot compile, the model as it is, and a line that says so."""
    fast = torch.compile(model)
    try:
        fast(*batch)[:3].sum().backward()
        return fast
    except Exception as error:     # a missing compiler, driver or package: each has a type of its own
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        print(f"torch.compile does not work here, so the step runs without it: {reason[:160]}", file=sys.stderr, flush=True)
        return model
    finally:
        model.zero_grad()


def textbook_backward(model: MWT, coords: Tensor, values: Tensor, labels: Tensor):
    """The published way to the same gradients: two backward passes, the class loss's gradient of the INR scaled in between.

    With a model whose siren has `loss_and_grad = textbook_loss_and_grad` nothing of the fast path is left in it.
    """
    weights, error = model.reconstruct(coords, values)
    F.cross_entropy(model.read(model.tokens(weights), colour=model.colour(values)), labels).backward(retain_graph=True)
    for p in [*model.siren.parameters(), *model.inner_loop.parameters()]:
        if p.grad is not None:
            p.grad *= model.w_task
    error.mean().backward()


DRAWN_TOGETHER = 8             # images: rows of the global batch whose pixels come from one generator


def sampled(args, model: MWT, images: Tensor, step: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """What this step looks at of the images (N, C, size, size), augmented and drawn: as `MWT.look`. `first`: the row of the global
    batch that the first image is; what is drawn for a row does not depend on how the batch is split over processes."""
    device, flip, last = images.device, args.dataset not in ("digits", "mnist"), first + len(images)
    pixels = None
    if args.fraction < 1:
        blocks = range(first // DRAWN_TOGETHER, math.ceil(last / DRAWN_TOGETHER))
        pixels = torch.cat([model.draw(args.steps + 1, DRAWN_TOGETHER, generator("pixels", args.seed, step, b, device=device)) for b in blocks], dim=1)
        pixels = pixels[:, first - blocks[0] * DRAWN_TOGETHER:][:, :len(images)]
    if args.augment:
        u = torch.rand(last, 6, generator=generator("augmentation", args.seed, step))[first:].to(device)
        if args.size >= 64 and pixels is not None:         # looks up no pixel but the drawn ones
            return model.coords[pixels], augment_high(images, u, flip, pixels)
        images = (augment_low if args.size < 64 else augment_high)(images, u, flip)
    return model.look(images, pixels)


def peak_memory(device: torch.device) -> int | None:
    """Bytes: of the device on CUDA, else of the process; None where the system does not say (Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def train(args, model: MWT, data: Images, test: Images, content: dict | None = None) -> dict:
    """Trains to the last epoch, writing args.out as it goes, and returns the metrics. `content`: a checkpoint to go on from.
    Stop: interrupted (after saving), a broken image (after saving), or a loss that is not finite (without)."""
    device = model.coords.device
    global_batch = args.batch_size * WORLD
    steps_per_epoch = len(data) // global_batch                                # the incomplete last batch is dropped
    total = args.epochs * steps_per_epoch
    model.inner_loop.recompute = args.recompute
    groups = parameter_groups(model, args)
    optimizer = make_optimizer(groups, args)
    # OneCycleLR divides by zero where the warm-up is exactly one step long.
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [group["lr"] for group in groups], total_steps=total,
                                                    pct_start=0.05 if total != 20 else 0.051)
    forward = None if args.compile or args.compile is None and device.type == "cuda" else model      # None: compile at the first batch
    hosts = dist.new_group(backend="gloo") if WORLD > 1 else None

    metrics, start, first_step = {"epochs": [], "seconds": 0.0}, 0, 0
    sums = torch.zeros(5, device=device, dtype=model.coords.dtype)             # of the statistics of this epoch's steps
    bad = torch.full((), -1, device=device)                                    # the first step that was not finite
    if content is not None:
        try:
            optimizer.load_state_dict(content["optimizer"])
            scheduler.load_state_dict(content["scheduler"])
            metrics, progress = content["metrics"], content["progress"]
            start, first_step = progress["epoch"], progress["step"]
            sums += progress["sums"].to(device)
        except Exception as error:
            raise InputError(f"{args.out}: a damaged checkpoint: it cannot be gone on from") from error
    saved_at, seconds_before, began = time.monotonic(), metrics["seconds"], time.monotonic()
    caught = []                                                                # signals

    def save(epoch: int, step: int, finished: bool = False):
        nonlocal saved_at
        if int(bad) >= 0 or not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
            e, s = divmod(int(bad) if int(bad) >= 0 else epoch * steps_per_epoch + step - 1, steps_per_epoch)
            kept = f"{args.out} is the last good checkpoint" if os.path.exists(args.out) else "no checkpoint had been written"
            raise Stop(1, f"the loss or its gradient is not finite at epoch {e + 1}, step {s + 1}; {kept}")
        metrics["seconds"] = seconds_before + time.monotonic() - began
        if RANK == 0:
            rest = {} if finished else {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
                                        "progress": {"epoch": epoch, "step": step, "sums": sums.cpu(), "global_batch": global_batch,
                                                     "seconds": time.monotonic() - epoch_began, "waited": waited}}
            save_checkpoint(args.out, {"args": vars(args), "data": facts(data), "model": model.state_dict(), "metrics": metrics, **rest})
        saved_at = time.monotonic()

    def look(epoch: int, step: int, error: BrokenImage | None = None):
        """Between steps: save when it is time, end when asked to. All processes do the same."""
        due = time.monotonic() - saved_at >= 60 * args.save_minutes
        code = agree(1000 if error else 1 + caught[0] if caught else int(due and RANK == 0), hosts)
        if code:
            save(epoch, step)
        if code == 1000:
            raise error or Stop(2, "a broken image, named by the process that met it")
        if code > 1:
            raise Stop(127 + code, f"stopped and saved at epoch {epoch + 1}, step {step}; go on with: "
                                   f"{LAUNCH} train.py --resume --out {shlex.quote(args.out)}")

    handlers = {number: signal.signal(number, lambda number, _: caught.append(number)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for epoch in range(start, args.epochs):
            epoch_began = time.monotonic() - (progress["seconds"] if first_step else 0)
            order = torch.randperm(len(data), generator=generator("order", args.seed, epoch))
            order = order[:steps_per_epoch * global_batch].view(steps_per_epoch, WORLD, -1)[first_step:, RANK]
            batches = data.batches(order, device, args.workers)
            with tqdm(desc=f"epoch {epoch + 1}/{args.epochs}", total=steps_per_epoch * global_batch, unit=" images",
                      initial=first_step * global_batch, leave=False, disable=None if RANK == 0 else True) as bar:
                read_at, waited = 0.0, progress.get("waited", 0.0) if first_step else 0.0
                for step in range(first_step, steps_per_epoch):
                    error, asked_at = None, time.monotonic()
                    try:
                        images, labels = next(batches)
                    except BrokenImage as e:
                        error = e
                    waited += time.monotonic() - asked_at
                    look(epoch, step, error)
                    now = epoch * steps_per_epoch + step
                    coords, values = sampled(args, model, images, now, RANK * args.batch_size)
                    batch = coords, data.signal(values), labels
                    if forward is None:
                        forward = compiled(model, *batch)
                    stats = backward(forward, groups, *batch)
                    norms = update(groups, optimizer)
                    scheduler.step()
                    finite = torch.isfinite(stats[:3].sum() + norms)
                    bad = torch.where((bad < 0) & ~finite, now, bad)           # stays on the device until somebody looks
                    sums += stats
                    bar.update(global_batch)
                    if not bar.disable and time.monotonic() - read_at > 1:
                        read_at, (loss, *_, accuracy, decibel) = time.monotonic(), stats.tolist()
                        bar.set_postfix_str(f"loss {loss:.3f}, accuracy {100 * accuracy:.0f}%, PSNR {decibel:.1f} dB")
            # An evaluation that is interrupted is done again when the run goes on: all steps of the epoch are behind it.
            try:
                result = evaluate(model, test, args.steps_test, args.workers, poll=lambda: look(epoch, steps_per_epoch))
            except BrokenImage as error:
                look(epoch, steps_per_epoch, error)
            if not math.isfinite(result["test_psnr"]):     # the last step made weights whose loss is not finite
                bad.clamp_(min=(epoch + 1) * steps_per_epoch - 1)
            loss, reconstruction, cluster, accuracy, decibel = (sums / steps_per_epoch).tolist()
            metrics.update(result)
            metrics["epochs"].append({
                "epoch": epoch + 1, "loss": loss, "reconstruction": reconstruction, "weighted_cluster_loss": cluster, "train_accuracy": accuracy,
                "train_psnr": decibel, "test_accuracy": result["test_accuracy"], "test_psnr": result["test_psnr"],
                "seconds": time.monotonic() - epoch_began, "waiting_for_data": waited, "peak_memory_bytes": peak_memory(device)})
            sums.zero_()
            first_step = 0
            save(epoch + 1, 0, finished=epoch + 1 == args.epochs)
            if RANK == 0:
                last, name = metrics["epochs"][-1], "val" if args.val else "test"
                memory = last["peak_memory_bytes"]
                print(f"epoch {epoch + 1:3d}/{args.epochs}  loss {loss:.4f}  reconstruction {reconstruction:.5f}  "
                      f"{name} accuracy {100 * result['test_accuracy']:.2f}%  {name} PSNR {result['test_psnr']:.2f} dB  "
                      f"{last['seconds']:.1f} s" + (f", {100 * waited / last['seconds']:.0f}% of it waiting for data" if data.pixels is None else "")
                      + (f"  peak {memory / 2**30:.2f} GiB" if memory else ""), flush=True)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return metrics


def facts(data: Images) -> tuple[int, list[str], int]:
    """What a checkpoint must know of its training data: channels, class names, number of images."""
    return data.channels, list(data.classes), len(data)


# ---- Report --------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def draw_figure(path: Path, args, model: MWT, test: Images, metrics: dict):
    """Learning curves, and a few test images as the inner loop reconstructs them after each step."""
    from matplotlib.figure import Figure
    device, k = model.coords.device, args.steps_test or args.steps
    rows = torch.linspace(0, len(test) - 1, min(4, len(test))).long()
    images, labels = next(test.batches([rows], device))
    images = test.signal(images)
    stages = torch.linspace(0, k, min(k, 7) + 1).round().int().tolist()        # steps shown
    pixels = model.draw(k, len(rows), generator("figure", device=device))
    fits = [model.adapt(images, j, pixels) for j in stages]
    colour = model.colour(model.look(images, pixels)[1])
    predicted = model.read(model.tokens(fits[-1]), colour=colour).argmax(-1)

    figure = Figure(figsize=(max(9, 1.35 * (len(stages) + 1)), 2.6 + 1.75 * len(rows)), layout="constrained", dpi=110)
    top, bottom = figure.subfigures(2, 1, height_ratios=[2.6, 1.75 * len(rows)])
    epochs, marker = [e["epoch"] for e in metrics["epochs"]], "o" if len(metrics["epochs"]) < 30 else None
    held = "val" if args.val else "test"
    panels = {"class loss (nats)": [("train", "loss", 1)], "accuracy (%)": [("train", "train_accuracy", 100), (held, "test_accuracy", 100)],
              "PSNR (dB)": [("train", "train_psnr", 1), (held, "test_psnr", 1)]}
    for axis, (title, lines) in zip(top.subplots(1, 3), panels.items()):
        for (name, key, factor), style in zip(lines, ("--", "-")):
            axis.plot(epochs, [factor * e[key] for e in metrics["epochs"]], style, marker=marker, markersize=3, label=name)
        axis.set_xlabel("epoch")
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)

    def show(axis, image, text):
        image = ((image.float().cpu().clamp(-1, 1) + 1) / 2).permute(1, 2, 0)
        axis.imshow(image.expand(-1, -1, 3) if image.shape[-1] == 1 else image, interpolation="nearest")
        axis.set_xlabel(text, fontsize=8, parse_math=False)                    # a class may be called "$"
        axis.set_xticks([])
        axis.set_yticks([])

    grid = bottom.subplots(len(rows), len(stages) + 1, squeeze=False)
    for i, line in enumerate(grid):
        for axis, j, phi in zip(line, stages, fits):
            one = phi._make(w if j == 0 else w[i:i + 1] for w in phi)          # at step 0 all images are at the anchor
            shown = model.siren(model.coords, one).view(-1, args.size ** 2, test.channels)[0] + (colour[i] if model.centre_colour else 0)
            shown = shown.mT.view_as(images[i])
            show(axis, shown, f"{float(psnr((shown.clamp(-1, 1) - images[i]).square().mean())):.1f} dB")
        right = "right" if predicted[i] == labels[i] else "wrong"
        show(line[-1], images[i], f"{test.classes[labels[i]]}\nread as {test.classes[predicted[i]]} ({right})")
    for axis, title in zip(grid[0], [f"step {j}" if j else "anchor" for j in stages] + ["image"]):
        axis.set_title(title, fontsize=9)
    figure.savefig(path)


def environment(device: torch.device) -> dict:
    """What a measurement depends on beside the code."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": f"{device}: {hardware}", "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}}


def write_reports(args, model: MWT, test: Images, metrics: dict, command: str):
    """args.out with .json and .png in place of .pt."""
    if RANK == 0:
        report = {"command": command, "flags": vars(args), **environment(model.coords.device), "processes": WORLD,
                  "evaluated_on": "validation share of the training set" if args.val else "test set", **metrics}
        Path(args.out).with_suffix(".json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        draw_figure(Path(args.out).with_suffix(".png"), args, model, test, metrics)


# ---- Benchmark -----------------------------------------------------------------------------------------------------------

PATHS = {"A": "fast: closed form, one backward pass", "B": "textbook: autograd through autograd, two backward passes, eager",
         "C": "torch.func.grad in place of the closed form"}


def count_flops(model: MWT, batch: int, backward: bool = True) -> dict[str, float]:
    """FLOPs (a multiply-add is two) of the matrix products of one step on `batch` images, by part.

    With n pixels an image and draw, w neurons, D layers, C channels, one inner step takes 2n (3 D w^2 + 2 C w + 4 w): forward,
    the gradient of the layers' inputs, and that of their weights. The first step's forward part runs once for the batch where
    all images see the same pixels. A product takes two more in the backward pass, or one where an input is data.
    """
    depth, width, _ = model.siren.hidden.shape
    n, channels, steps, reader = int(model.fraction * len(model.coords) + 1e-9), model.siren.head.out_features, model.inner_loop.steps, model.reader
    both, one = (3, 2) if backward else (1, 1)             # products of two results; of a result and data
    forward = 2 * n * (one * 2 * width + both * (depth * width ** 2 + channels * width))
    gradient = 2 * n * (one * 2 * width + both * (2 * depth * width ** 2 + channels * width))
    first = forward if model.fraction == 1 else batch * forward
    tokens = depth * width
    matrices = sum(p.numel() for p in [reader.embed.weight, *reader.blocks.parameters()] if p.dim() == 2)
    read = 2 * tokens * matrices + len(reader.blocks) // 2 * 4 * tokens ** 2 * width + 2 * width * reader.head.out_features
    if reader.queries is not None:
        asking, asked = len(reader.queries), len(reader.queries) + tokens
        for attention, mlp in zip(reader.gather[::2], reader.gather[1::2]):
            read += 2 * asked * 3 * width ** 2 + 4 * asking * asked * width + 2 * asking * (width ** 2 + 2 * mlp.up.weight.numel())
    read *= both
    if reader.branch is not None:
        read += 2 * ((one if reader.column is None else both) * reader.branch.up.weight.numel() + both * reader.branch.down.weight.numel())
    cluster = 3 * 2 * batch ** 2 * (model.siren.first.numel() + model.siren.hidden.numel()) if backward and model.w_cluster else 0
    return {"inner loop": first + batch * gradient + (steps - 1) * batch * (forward + gradient) + batch * forward, "reader": batch * read, "contrastive loss": cluster}


def timed(step, count: int, device: torch.device) -> list[float]:
    """Milliseconds of each of `count` calls; by device events on CUDA, so that the host may run ahead as it does in training."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(count):
            step()
            marks.append(time.perf_counter())
        return [1000 * (b - a) for a, b in zip(marks, marks[1:])]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) for a, b in zip(marks, marks[1:])]


def measure_path(args, path: str, seconds: float = 20.0, more: bool = False) -> dict:
    """Times one path of PATHS on random images, in about that many seconds and at most 20 steps after the warm-up; with `more`
    also the matrix peak, the phases of an eager step and evaluation. To be called in a process of its own: its peak memory is."""
    device = find_device(args.device)
    torch.set_float32_matmul_precision("highest" if args.precision == "float32" else "high")
    channels, classes = 1 if args.dataset in ("digits", "mnist", "fashion_mnist") else 3, 1000 if args.bench == "imagenet" else 10
    model = build_model(args, channels, classes).to(device)
    if path != "A":
        model.siren.loss_and_grad = types.MethodType(textbook_loss_and_grad if path == "B" else functional_loss_and_grad, model.siren)
    model.inner_loop.recompute = args.recompute and path != "B"
    groups = parameter_groups(model, args)
    optimizer = make_optimizer(groups, args)
    g, n = generator("bench", device=device), args.batch_size
    images = torch.randint(256, (n, channels, args.size, args.size), dtype=torch.uint8, generator=g, device=device)
    labels = torch.randint(classes, (n,), generator=g, device=device)
    random = Images([], labels, images)                    # for its grey levels
    forward, steps = None, itertools.count()

    def step():
        nonlocal forward
        coords, values = sampled(args, model, images, next(steps))
        batch = coords, random.signal(values), labels
        if path == "B":
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                textbook_backward(model, *batch)
        else:
            if forward is None:
                forward = compiled(model, *batch) if args.compile is not False else model
            backward(forward, groups, *batch)
        update(groups, optimizer)

    warm_up = sum(timed(step, 1, device)) / 1000
    one = timed(step, 1, device)[0]
    times = timed(step, max(3, min(20, round(1000 * seconds / one))), device)
    result = {"ms": times, "images": n, "warm_up_seconds": warm_up, "peak_memory_bytes": peak_memory(device), "compiled": forward not in (None, model),
              "flops": sum(count_flops(model, n).values()), "inner_gradient": model.siren.loss_and_grad.__name__}
    if more:
        coords, values = model.look(random.signal(images), None if args.fraction == 1 else model.draw(args.steps + 1, n, g))
        tokens = model.tokens(model.reconstruct(coords, values)[0]).detach().requires_grad_()
        few = max(3, len(times) // 4)
        median = lambda f: float(np.median(timed(f, few, device)))
        inner, read = median(lambda: model.reconstruct(coords, values)), median(lambda: model.read(tokens))
        whole_ = median(lambda: backward(model, groups, coords, values, labels))

        def optimize():
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            update(groups, optimizer)

        many = random.take(torch.arange(max(n, min(512, EVAL_POINTS // coords.shape[-2])), device=device) % n)
        rate = len(many) / median(lambda: evaluate(model, many)) * 1000
        size = 4096 if device.type == "cuda" else 2048
        square = torch.randn(2, size, size, device=device, dtype=torch.bfloat16 if args.precision == "bf16" else torch.float32)
        median(lambda: square[0] @ square[1])
        result |= {"phases_ms": {"inner loop": inner, "reader": read, "backward": whole_ - inner - read, "optimizer": median(optimize)},
                   "evaluation_images_per_second": rate, "matrix_peak_tflops": 2 * size ** 3 / min(timed(lambda: square[0] @ square[1], 10, device)) / 1e9}
    return result


def in_a_process(function, *args):
    """function(*args) in a process of its own."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args).result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise Stop(1, "a benchmark process was killed: out of memory?") from error


def variations(args) -> list[tuple[str, int, dict]]:
    """What `--bench cost` varies: (what, its value, settings)."""
    around = {"batch size": ("batch_size", [max(1, args.batch_size * f // 4) for f in (1, 2, 4, 8)]), "pixels a side": ("size", [args.size * f // 4 for f in (2, 3, 4, 6)]),
              "width": ("width", [args.head_dim * f for f in (1, 2, 3, 4)]), "k": ("steps", [2, 4, 6, 8])}
    return [(what, value, vars(args) | {key: value}) for what, (key, values) in around.items() for value in values]


def decode_seconds(size: int) -> float:
    """Of one 500x375 JPEG of smooth noise, read and decoded by one process."""
    from PIL import Image
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a.jpg")
        coarse = torch.randint(256, (1, 3, 24, 32), generator=generator("jpeg"), dtype=torch.uint8)
        Image.fromarray(F.interpolate(coarse.float(), (375, 500), mode="bicubic")[0].clamp(0, 255).byte().permute(1, 2, 0).numpy()).save(path, quality=90)
        return min(timed(lambda: decode(path, size), 20, torch.device("cpu"))) / 1000


def training_hours(images: int, epochs: int, step_seconds: float, decode_seconds: float, devices: int, workers: int) -> float:
    """Wall time of a run: the larger of what the devices need for the steps and what `workers` processes a device need to decode.
    step_seconds and decode_seconds are of one image."""
    return images * epochs * max(step_seconds, decode_seconds / max(1, workers)) / devices / 3600


def bench(args):
    """Measures, prints, and writes args.out (JSON) and for the cost a figure beside it."""
    device = find_device(args.device)
    report = environment(device) | {"command": command_line(args) + (" --no-compile" if args.compile is False else ""), "flags": vars(args)}
    print(f"{args.size}x{args.size} pixels, {args.fraction:g} of them a step, width {args.width}, depth {args.depth}, k {args.steps}, reader depth {args.reader_depth}, "
          f"batch {args.batch_size}, {args.precision}\n{report['device']}, {report['threads']} threads, torch {torch.__version__}", flush=True)
    row = lambda name, r: (f"{name:18s}{np.median(r['ms']):10.1f}{min(r['ms']):10.1f}{max(r['ms']):10.1f}{1000 * r['images'] / np.median(r['ms']):10.1f}"
                           f"{r['peak_memory_bytes'] / 2 ** 30 if r['peak_memory_bytes'] else math.nan:10.2f}{r['flops'] / np.median(r['ms']) / 1e9:10.3f}")
    head = f"{'':18s}{'ms a step':>10s}{'least':>10s}{'most':>10s}{'images/s':>10s}{'peak GiB':>10s}{'TFLOP/s':>10s}"
    with tempfile.TemporaryDirectory() as cache:           # so that compile times are those of a first time
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        if args.bench == "cost":
            report["cost"] = []
            print(head)
            for what, value, changed in variations(args):
                report["cost"].append({"what": what, "value": value} | in_a_process(measure_path, argparse.Namespace(**changed), "A", 10.0))
                print(row(f"{what} {value}", report["cost"][-1]), flush=True)
            cost_figure(Path(args.out).with_suffix(".png"), report)
        elif args.bench == "imagenet":
            report["paths"], report["decode_seconds"] = {"A": [in_a_process(measure_path, args, "A", 20.0)]}, decode_seconds(args.size)
            fast, image = report["paths"]["A"][0], report["decode_seconds"]
            step = np.median(fast["ms"]) / 1000 / args.batch_size
            report["imagenet"] = [{"devices": n, "hours": training_hours(1_281_167, args.epochs, step, image, n, args.workers),
                                   "limit": "decoding" if image / max(1, args.workers) > step else "step"} for n in (1, 8, 64)]
            print(f"{head}\n{row('fast', fast)}\ndecoding a 500x375 JPEG: {1000 * image:.1f} ms, {args.workers} workers a device\n"
                  f"ImageNet-1K, {args.epochs} epochs, if more devices cost nothing in between (an extrapolation of one measured step):")
            for r in report["imagenet"]:
                print(f"{r['devices']:4d} devices: {r['hours']:.3g} h ({60 * r['hours'] / args.epochs:.3g} min an epoch; the paper's 306), {r['hours'] * r['devices']:.4g} device-hours; limited by the {r['limit']}")
        else:
            report["paths"] = {path: [] for path in PATHS}
            for turn, path in itertools.product(range(2), PATHS):
                report["paths"][path].append(in_a_process(measure_path, args, path, 20.0, turn == 0 and path == "A"))
            turns = {path: [np.median(r["ms"]) for r in both] for path, both in report["paths"].items()}
            report["ratios"] = {f"{path}/A": [float(f([b / a for b, a in zip(turns[path], turns["A"])])) for f in (np.mean, min, max)] for path in "BC"}
            print(head + f"{'first s':>9s}")
            for path, both in report["paths"].items():
                print(row(path, both[0] | {"ms": sum((r["ms"] for r in both), [])}) + f"{both[0]['warm_up_seconds']:9.1f}")
            first = report["paths"]["A"][0]
            share = first["flops"] / np.median(first["ms"]) / 1e9 / first["matrix_peak_tflops"]
            print("\n".join([*(f"{path}: {text}" + (", compiled" if report["paths"][path][0]["compiled"] else "") for path, text in PATHS.items()),
                             *(f"ratio {name} {mean:.2f} [{low:.2f}, {high:.2f}] (mean, least and most of two turns)" for name, (mean, low, high) in report["ratios"].items()),
                             f"A runs at {100 * share:.0f}% of the matrix peak measured here, {first['matrix_peak_tflops']:.3f} TFLOP/s; {first['flops'] / 1e9:.1f} GFLOP a step",
                             "phases of an eager step: " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in first["phases_ms"].items()),
                             f"evaluation: {first['evaluation_images_per_second']:.1f} images/s"]))
    Path(args.out).write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    print(f"wrote {args.out}")


def cost_figure(path: Path, report: dict):
    """Time and memory of a step against its counted FLOPs, one line for each thing varied."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 4.6), layout="constrained", dpi=120)
    axes = figure.subplots(1, 2)
    for (what, rows), style in zip(itertools.groupby(report["cost"], lambda r: r["what"]), ("o-", "s--", "^-.", "d:")):
        rows = list(rows)
        x = [r["flops"] / 1e9 for r in rows]
        axes[0].loglog(x, [np.median(r["ms"]) for r in rows], style, label=f"{what}: {', '.join(str(r['value']) for r in rows)}")
        axes[1].loglog(x, [(r["peak_memory_bytes"] or math.nan) / 2 ** 30 for r in rows], style, label=what)
    rate = [np.median(r["ms"]) / r["flops"] for r in report["cost"]]
    ends = [f([r["flops"] for r in report["cost"]]) for f in (min, max)]
    axes[0].loglog([f / 1e9 for f in ends], [f * np.median(rate) for f in ends], color="grey", linewidth=1, label=f"{1 / np.median(rate) / 1e9:.3f} TFLOP/s")
    for axis, title in zip(axes, ("ms a step", "peak memory (GiB)")):
        axis.set_xlabel("counted GFLOP a step")
        axis.set_ylabel(title)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    figure.suptitle(f"Cost of a training step; {report['device']}", fontsize=11)
    figure.savefig(path)


# ---- Command line --------------------------------------------------------------------------------------------------------

def whole(low: int):
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {low}")
        return value
    return parse


def number(low: float, high: float = math.inf, open_low: bool = False):
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)) or open_low and value == low:
            limits = f"{'above' if open_low else 'of at least'} {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {limits}")
        return value
    return parse


def branch(text: str) -> str:
    kind, _, column = text.partition(":")
    if text not in ("bias", "colour") and not (kind == "column" and column.isascii() and column.isdigit() and str(int(column)) == column):
        raise argparse.ArgumentTypeError(f"{text!r} is neither bias nor colour nor column:N")
    return text


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(message)


def parser() -> Parser:
    """All flags. What is not given is absent from the result, so that recipes and saved runs can fill it in."""
    p = Parser(prog="train.py", description=__doc__.split("\n\n")[0], argument_default=argparse.SUPPRESS, allow_abbrev=False)

    def flag(name: str, kind, text: str, **more):
        usual = [] if RECIPE[name] is None or RECIPE[name] is False else [RECIPE[name]]
        usual += [f"{where} {values[name]}" for where, values in (("digits", DIGITS), ("64 pixels and more", HIGH_RESOLUTION)) if name in values]
        text += f" (default {'; '.join(map(str, usual))})" if usual else ""
        group.add_argument("--" + name.replace("_", "-"), help=text, **({"type": kind} if kind else {"action": "store_true"}), **more)

    group = p.add_argument_group("data")
    flag("dataset", str, "digits, cifar10, mnist, fashion_mnist, or a folder with train/<class>/ and test/<class>/ or val/<class>/")
    flag("data_root", str, "folder of the downloaded data sets")
    group.add_argument("--size", type=whole(2), help="pixels a side (default: the data set's own; a folder 32)")
    flag("train_size", whole(1), "train on so many images, the same share of each class, always the same ones")
    flag("test_size", whole(1), "evaluate on so many images")
    flag("val", number(0, 0.9), "share of the training set held out and evaluated on instead of the test set")
    flag("augment", None, "random crop and flip; at 64 pixels and more also rotation and scale")
    flag("workers", whole(0), "processes that decode image files")

    group = p.add_argument_group("model")
    flag("width", whole(1), "neurons a layer; also the reader's width")
    flag("depth", whole(1), "hidden layers of the SIREN")
    flag("omega", number(0, open_low=True), "omega, frequency of the first layer")
    flag("steps", whole(1), "k, inner-loop steps")
    flag("steps_test", whole(1), "inner-loop steps in evaluation; other than k only with --shared-lr (default k)")
    flag("shared_lr", None, "one alpha for all inner steps")
    flag("fraction", number(0, 1, open_low=True), "s, share of the pixels drawn at each inner step")
    flag("reader_depth", whole(0), "blocks of the reader")
    flag("head_dim", whole(1), "features an attention head; divides the width")
    flag("mlp_ratio", whole(1), "hidden over outer features in the reader's MLP")
    flag("token_scale", number(0), "lambda, factor on the tokens; 0: layer norm instead")
    flag("readout", whole(0), "learned queries that gather the tokens by class attention, starting from their mean; 0: the mean alone")
    flag("branch", branch, "bias, column:N or colour: that column of the tokens, or the mean colour, to the logits past the reader's blocks")
    flag("centre_colour", None, "remove each image's mean colour before it is fitted")

    group = p.add_argument_group("training")
    flag("w_task", number(0), "weight of the class loss for the INR; 0 is WT")
    flag("w_cluster", number(0), "weight of a supervised contrastive loss on phi - theta, for the INR")
    flag("epochs", whole(1), "number of passes over the training set")
    flag("batch_size", whole(1), "images a step and process")
    flag("lr", number(0, open_low=True), "peak learning rate of the SIREN and the reader")
    flag("lr_alpha", number(0, open_low=True), "peak learning rate of alpha, the inner step sizes")
    flag("weight_decay", number(0), "AdamW's, on every parameter")
    flag("seed", whole(0), "of the initial parameters, the data order, augmentation and pixels")
    flag("init_from", str, "checkpoint whose SIREN and alpha this run starts from (its reader is new)")
    flag("freeze_siren", None, "train the reader only: with --init-from this is WT-seq, without it the SIREN stays random")

    group = p.add_argument_group("run")
    flag("out", str, "checkpoint, *.pt; *.json and *.png are written beside it")
    flag("resume", None, "go on with the run saved in --out")
    flag("save_minutes", number(0), "minutes between checkpoints, beside one an epoch; 0: after every step")
    flag("device", str, "auto (CUDA if there is one), or a torch device")
    flag("precision", str, "float32, tf32, or bf16: the reader in bfloat16, all else in TF32", choices=["float32", "tf32", "bf16"])
    flag("recompute", None, "the backward pass computes the inner steps again: less memory, more time, the same gradients")
    flag("compile", None, "torch.compile the step (default: on CUDA)")
    group.add_argument("--no-compile", dest="compile", action="store_false", help="run the step eagerly")
    flag("eval_only", None, "evaluate --ckpt and stop; writes nothing unless --out is given")
    flag("ckpt", str, "checkpoint to evaluate")
    group.add_argument("--bench", nargs="?", const="paths", choices=["paths", "cost", "imagenet"],
                       help="measure steps on random data, CIFAR-10's recipe and compiled unless flags say otherwise: three ways to "
                            "the same gradients, the cost as the work grows, or what ImageNet would take; writes --out, *.json (default bench.json)")
    return p


def as_flags(values: dict) -> list[str]:
    """The command line that gives these settings; what is None or False needs no flag."""
    return ["--" + key.replace("_", "-") + ("" if value is True else f"={value}") for key, value in values.items()
            if value is not None and value is not False]


def recipe(dataset: str = RECIPE["dataset"], size: int | None = None) -> dict:
    """All settings where no flag says otherwise."""
    size = size or SIZE.get(dataset, 32)
    return RECIPE | (DIGITS if dataset == "digits" else {}) | (HIGH_RESOLUTION if size >= 64 else {}) | {"dataset": dataset, "size": size}


def command_line(args) -> str:
    """The shortest command that makes this run, whatever flags it was started or gone on with."""
    usual = recipe(args.dataset, args.size) | {"dataset": RECIPE["dataset"], "size": SIZE.get(args.dataset, 32)}
    run_only = {"resume", "eval_only", "ckpt", "compile", "recompute", "workers"}
    return shlex.join([*LAUNCH.split(), "train.py", *as_flags({k: v for k, v in vars(args).items() if v != usual[k] and k not in run_only})])


def settings(explicit: dict, saved: dict | None = None) -> argparse.Namespace:
    """Explicit flags over a saved run's, or over the data set's recipe (and what --init-from brings)."""
    if saved is None:
        saved = recipe(**{key: explicit[key] for key in ("dataset", "size") if key in explicit})
        if "init_from" in explicit:
            core = read_checkpoint(explicit["init_from"])["args"]
            taken = CORE + (("val",) if core["dataset"] == saved["dataset"] else ())       # what it held out stays held out
            saved |= {key: core[key] for key in taken}
            for key in taken:
                if explicit.get(key, core[key]) != core[key]:
                    raise InputError(f"--{key.replace('_', '-')} {explicit[key]}: but {explicit['init_from']} has {core[key]}")
    args = argparse.Namespace(**(saved | explicit))
    if args.width % args.head_dim:
        raise InputError(f"--head-dim {args.head_dim} does not divide --width {args.width}")
    if args.steps_test not in (None, args.steps) and not args.shared_lr:
        raise InputError(f"--steps-test {args.steps_test} differs from --steps {args.steps}: that needs --shared-lr, one alpha for all steps")
    if (args.branch or "").startswith("column:") and int(args.branch[7:]) >= args.width:
        raise InputError(f"--branch {args.branch}: the columns of a token, but for the bias, are 0 to {args.width - 1}")
    if args.w_cluster and WORLD > 1:
        raise InputError("--w-cluster compares the images of a batch: run it as one process, not by torchrun")
    if int(args.fraction * args.size ** 2 + 1e-9) < 1:
        raise InputError(f"--fraction {args.fraction:g} of {args.size}x{args.size} pixels is less than one pixel")
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
    except Exception as error:     # no driver, no such index, not built in: torch has a type for each
        raise InputError(f"--device {name}: {str(error).splitlines()[0][:120]}") from error


def touch(path: Path):
    """OSError where a file cannot be written; changes nothing."""
    there = path.exists()
    open(path, "ab").close()
    there or path.unlink()


def check_output(args):
    """Before any work: can args.out be written, and would that destroy anything?"""
    out = Path(args.out)
    if out.suffix != ".pt" or not out.parent.is_dir():
        raise InputError(f"--out {out}: " + ("the name must end in .pt" if out.suffix != ".pt" else f"there is no folder {out.parent}"))
    fresh = not args.resume and not args.eval_only
    if fresh and args.init_from and out.exists() and os.path.samefile(out, args.init_from):
        raise InputError(f"--out {out}: would overwrite --init-from; choose another")
    for path in (out, out.with_suffix(".json"), out.with_suffix(".png"), Path(f"{out}.tmp")):
        try:
            touch(path)
        except OSError as error:
            raise InputError(f"--out {out}: {path} cannot be written ({error.strerror})") from error
    if fresh and out.exists():
        try:
            unfinished = "progress" in read_checkpoint(out)
        except InputError as error:
            raise InputError(f"--out {out}: would overwrite a file that is no checkpoint of {FORMAT}; choose another") from error
        if unfinished:
            raise InputError(f"--out {out}: holds an unfinished run; go on with it by --resume, or delete it, or choose another")


def check_changes(explicit: dict, content: dict, path: str, free: set[str]):
    """Explicit flags may differ from a checkpoint's only where they do not change what it stands for."""
    for key, value in explicit.items():
        if key not in free and value != content["args"][key]:
            raise InputError(f"--{key.replace('_', '-')} {value}: but {path} was made with {content['args'][key]}")


def run(explicit: dict):
    if explicit.get("bench"):
        usual = {"dataset": "cifar10", "out": "bench.json"} | (dict(size=320, width=256, fraction=0.01) if explicit["bench"] == "imagenet" else {})
        args = settings(usual | explicit)
        unused = set(explicit) & {"w_cluster", "branch", "freeze_siren", "init_from", "val", "train_size", "test_size", "steps_test", "resume", "eval_only", "ckpt"}
        if unused or WORLD > 1:
            raise InputError("--bench measures one process" if WORLD > 1 else f"--{min(unused).replace('_', '-')}: not with --bench, which measures a step of the plain model on random data")
        if Path(args.out).suffix != ".json" or not Path(args.out).parent.is_dir():
            raise InputError(f"--out {args.out}: with --bench a file that ends in .json, in a folder that is there")
        for path in (Path(args.out), Path(args.out).with_suffix(".png")):
            try:
                touch(path)
            except OSError as error:
                raise InputError(f"--out {args.out}: {path} cannot be written ({error.strerror})") from error
        for changed in [vars(args), *(changed for _, _, changed in variations(args) if args.bench == "cost")]:         # all, before the first is measured
            settings({key: value for key, value in changed.items() if value is not None and value is not False})
            try:
                with torch.device("meta"):
                    build_model(argparse.Namespace(**changed), 3, 10)
            except (RuntimeError, OverflowError, TypeError) as error:
                raise InputError(f"--width {args.width} --depth {args.depth}: a model of that size cannot be made here") from error
        return bench(args)
    content, only = None, bool(explicit.get("eval_only"))
    if "ckpt" in explicit and not only:
        raise InputError("--ckpt needs --eval-only; to start from a checkpoint's SIREN use --init-from, to go on with a run --resume")
    path = explicit.get("ckpt" if only else "out", None if only else RECIPE["out"])
    if only:
        if path is None:
            raise InputError("--eval-only needs --ckpt")
        content = read_checkpoint(path)
        check_changes(explicit, content, path, FREE | {"dataset", "test_size", "steps_test", "fraction", "precision"} | ({"val"} if not explicit.get("val") else set()))
        args = settings(explicit, content["args"] | {"device": "auto", "compile": False, "out": None})
    elif explicit.get("resume"):
        content = read_checkpoint(path)
        batch, left = divmod(content["progress"]["global_batch"], WORLD) if "progress" in content else (content["args"]["batch_size"], 0)
        content["args"]["batch_size"] = batch              # the same global batch, on however many processes
        if left:
            raise InputError(f"--resume: a batch of {batch * WORLD + left} images in all cannot be split over {WORLD} processes")
        check_changes(explicit, content, path, FREE)
        args = settings(explicit, content["args"])
    else:
        args = settings(explicit)
    if RANK == 0 and args.out is not None:
        check_output(args)
    device = find_device(args.device)
    torch.set_float32_matmul_precision("highest" if args.precision == "float32" else "high")
    if WORLD > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if RANK:
            dist.barrier()                                 # the first process downloads, the others find
    data, test = load_dataset(args, device, train=not only)
    if WORLD > 1 and RANK == 0:
        dist.barrier()
    if not only and args.batch_size * WORLD > len(data):
        raise InputError(f"--batch-size {args.batch_size} on {WORLD} process{'es' * (WORLD > 1)}: there are only {len(data)} training images")

    if content is None:
        try:
            model = build_model(args, data.channels, len(data.classes)).to(device)
        except (RuntimeError, OverflowError, TypeError) as error:
            raise InputError(f"--width {args.width} --depth {args.depth}: a model of that size cannot be made here") from error
        if args.init_from:
            start, _ = load_checkpoint(args.init_from, device)
            if start.siren.head.out_features != data.channels:
                raise InputError(f"--init-from {args.init_from}: not made for images of {data.channels} channels")
            model.siren.load_state_dict(start.siren.state_dict())
            model.inner_loop.load_state_dict(start.inner_loop.state_dict())
    else:
        if only and facts(test)[:2] != tuple(content["data"])[:2] or not only and facts(data) != tuple(content["data"]):
            raise InputError(f"--dataset {args.dataset}: not the data that {path} was trained on, or changed since: other channels, "
                             "classes or number of images")
        model = model_from(content, path, device)
        model.fraction, model.bf16 = args.fraction, args.precision == "bf16"
    for part in (model.siren, model.inner_loop):
        part.requires_grad_(not args.freeze_siren)

    if only:
        metrics = content["metrics"] | evaluate(model, test, args.steps_test, args.workers)
        if RANK == 0:
            print(summary(metrics, args))
        if args.out is not None:
            write_reports(args, model, test, metrics, shlex.join([*LAUNCH.split(), "train.py", *as_flags(explicit)]))
        return
    if RANK == 0:
        count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
        print(f"{args.dataset}: {len(data):,} training and {len(test):,} {'held-out' if args.val else 'test'} images, "
              f"{data.channels}x{args.size}x{args.size}, {len(data.classes)} classes; on {device}"
              + (f", {WORLD} processes" if WORLD > 1 else f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""))
        print(f"parameters: SIREN with alpha {count['siren'] + count['inner_loop']:,}, reader {count['reader']:,}")
        print("settings: " + " ".join(f"{key}={value}" for key, value in vars(args).items()), flush=True)
    if content is not None and "progress" not in content:
        metrics = content["metrics"]
        if RANK == 0:
            print(f"the run in {args.out} is finished: nothing to train")
    else:
        metrics = train(args, model, data, test, content)
    if RANK == 0:
        print(f"{summary(metrics, args)}; {metrics['seconds']:.0f} s", flush=True)
    write_reports(args, model, test, metrics, command_line(args))


def main(argv: list[str] | None = None):
    """Exit status: 0; 1 a loss that is not finite; 2 bad input; 130 or 143 stopped by Ctrl-C or SIGTERM."""
    try:
        run(vars(parser().parse_args(argv)))
    except (InputError, Stop, KeyboardInterrupt) as error:
        status = getattr(error, "status", 130)
        if RANK == 0 or isinstance(error, BrokenImage):
            print(f"train.py: {'error: ' if status == 2 else ''}{str(error) or 'interrupted'}", file=sys.stderr)
        raise SystemExit(status) from None
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
