"""Images: the embedded digits, torchvision's sets, folders of image files; subsets, batches,
augmentation.

    train, test = load_dataset(args)            # args: dataset, data_root, size, train_size, ...
    for images, labels in train.batches(torch.randperm(len(train)).split(16), "cpu"):
        values = train.signal(images)           # uint8 (N, C, size, size) -> [-1, 1]
"""
import math
import os
import signal
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from checkpoint import InputError, generator

SIZE = dict(digits=8, cifar10=32, mnist=28, fashion_mnist=28)     # pixels a side; a folder: 32
RESIDENT_BYTES = 2 << 30    # up to this size images live on the device; larger sets on the disk


# ---- One split of a data set ---------------------------------------------------------------------

def decode(path: str, size: int) -> Tensor:
    """An image file of any size and mode, squashed to a square: uint8 (3, size, size)."""
    from PIL import Image
    with Image.open(path) as image:
        if image.mode.startswith("I"):          # 16 bits a pixel: Pillow would clip at 255
            grey = (np.asarray(image, dtype=np.float64) / 257).clip(0, 255)
            image = Image.fromarray(grey.astype(np.uint8))
        image = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)  # antialiased
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Images(torch.utils.data.Dataset):
    """Labels (n,), class names, and pixels (n, C, size, size), uint8, or paths of image files."""

    def __init__(self, classes: list[str], labels, pixels: Tensor | None = None,
                 paths: np.ndarray | None = None, size: int = 32, levels: int = 255):
        self.classes, self.levels = classes, levels
        self.labels = torch.as_tensor(labels, dtype=torch.long)
        self.pixels, self.paths = pixels, paths
        self.size, self.channels = size, 3
        if pixels is not None:
            self.size, self.channels = pixels.shape[-1], pixels.shape[1]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row: int) -> Tensor | str:
        """The decoded image; of a file that cannot be decoded the path, since an exception would
        reach us as a worker's traceback."""
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
            pixels = torch.empty(len(self), 3, self.size, self.size, dtype=torch.uint8)
            order = torch.arange(len(self)).split(64)
            batches = self.batches(order, "cpu", workers)
            progress = tqdm(order, "decoding", leave=False, disable=None)
            for rows, (images, _) in zip(progress, batches):
                pixels[rows] = images
        return Images(self.classes, self.labels.to(device), pixels.to(device), None, self.size,
                      self.levels)

    def batches(self, order, device, workers: int = 0):
        """Yields (uint8 images, labels) on the device for each tensor of row numbers in `order`.
        InputError: an image file that cannot be decoded."""
        if self.pixels is not None:
            for rows in order:
                rows = rows.to(self.pixels.device)
                yield self.pixels[rows], self.labels[rows]
            return
        loader = torch.utils.data.DataLoader(
            self, batch_sampler=[rows.tolist() for rows in order], num_workers=workers,
            collate_fn=stack, worker_init_fn=leave_signals_to_the_parent,
            pin_memory=torch.device(device).type == "cuda")
        for rows, images in zip(order, loader):
            if isinstance(images, str):
                raise InputError(f"{images}: cannot be decoded as an image; replace or remove it")
            labels = self.labels[rows].to(device, non_blocking=True)
            yield images.to(device, non_blocking=True), labels

    def signal(self, images: Tensor) -> Tensor:
        """Grey levels 0 .. levels to [-1, 1]."""
        return images.to(torch.get_default_dtype()) * (2 / self.levels) - 1


def stack(samples: list[Tensor | str]) -> Tensor | str:
    """A batch of decoded images; the path of one that could not be decoded."""
    broken = [sample for sample in samples if isinstance(sample, str)]
    return broken[0] if broken else torch.stack(samples)


def leave_signals_to_the_parent(_worker: int):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def stratified_sample(labels: Tensor, count: int) -> Tensor:
    """`count` row numbers, ascending, with the same share of each class (largest remainders);
    always the same ones."""
    sizes = torch.bincount(labels.cpu())
    exact = sizes * (count / len(labels))
    take = exact.floor().long()
    remainders = torch.argsort(exact - take, descending=True, stable=True)
    take[remainders[:count - int(take.sum())]] += 1
    rows = []
    for c, t in enumerate(take.tolist()):
        of_class = torch.nonzero(labels.cpu() == c).flatten()
        order = torch.randperm(len(of_class), generator=generator("subset", c))
        rows.append(of_class[order[:t]])
    return torch.cat(rows).sort().values.to(labels.device)


# ---- Where they come from ------------------------------------------------------------------------

def read_digits() -> dict[str, Images]:
    classes = [str(c) for c in range(10)]
    with np.load(Path(__file__).parent / "data" / "digits.npz") as f:
        return {split: Images(classes, f[f"{split}_labels"],
                              torch.from_numpy(f[f"{split}_images"])[:, None], levels=16)
                for split in ("train", "test")}


FILES = {"cifar10": ("CIFAR10", "cifar-10-batches-py (cifar-10-python.tar.gz unpacked)"),
         "mnist": ("MNIST", "MNIST/raw (the four unpacked ubyte files)"),
         "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw (the four unpacked ubyte files)")}


def read_torchvision(name: str, root: str) -> dict[str, Images]:
    from torchvision import datasets
    kind, files = FILES[name]
    try:
        sets = {split: getattr(datasets, kind)(root, train=split == "train", download=True)
                for split in ("train", "test")}
    except Exception as error:     # network, disk and format errors of many types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"--dataset {name}: not in {root} and not to be downloaded ({reason}); "
                         f"put {files} into {root}, or name another --data-root") from error
    found = {}
    for split, images in sets.items():
        pixels = torch.as_tensor(images.data)                      # (n, h, w) or (n, h, w, 3)
        pixels = pixels[:, None] if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2).contiguous()
        found[split] = Images(images.classes, images.targets, pixels)
    return found


def read_folder(root: str, size: int) -> dict[str, Images]:
    from torchvision.datasets import ImageFolder
    second = "test" if os.path.isdir(os.path.join(root, "test")) else "val"
    found = {}
    for split, name in (("train", "train"), ("test", second)):
        folder = os.path.join(root, name)
        if not os.path.isdir(folder):
            raise InputError(f"--dataset {root}: needs train/<class>/ and test/<class>/ or "
                             f"val/<class>/; {folder} is not there")
        try:
            files = ImageFolder(folder)
        except OSError as error:
            raise InputError(f"--dataset {root}: {' '.join(str(error).split())}") from error
        paths = np.array([os.fsencode(path) for path, _ in files.samples])
        found[split] = Images(files.classes, files.targets, paths=paths, size=size)
    train, test = found["train"].classes, found["test"].classes
    if train != test:
        odd = sorted(set(train) ^ set(test))
        raise InputError(f"--dataset {root}: train and {second} differ in their classes: "
                         f"{', '.join(odd[:5])} in only one of them")
    if len(train) < 2:
        raise InputError(f"--dataset {root}: one class only ({train[0]}); a classifier needs two")
    return found


def load_dataset(args, device="cpu", train: bool = True) -> tuple[Images, Images]:
    """(train, test) of args.dataset, data_root, size, train_size, test_size, workers; with args.val
    test is that share of the training set. On the device where they fit; train=False leaves the
    training images where they are. InputError: data that are missing or cannot be used."""
    if args.dataset == "digits":
        found = read_digits()
    elif args.dataset in SIZE:
        found = read_torchvision(args.dataset, args.data_root)
    elif os.path.isdir(args.dataset):
        found = read_folder(args.dataset, args.size)
    else:
        raise InputError(f"--dataset {args.dataset}: neither {', '.join(SIZE)} nor a folder")
    if args.val:
        images = found["train"]
        held_out = torch.zeros(len(images), dtype=torch.bool)
        held_out[stratified_sample(images.labels, max(1, round(args.val * len(images))))] = True
        found = {"train": images.take((~held_out).nonzero().flatten()),
                 "test": images.take(held_out.nonzero().flatten())}
    for split, count in (("train", args.train_size), ("test", args.test_size)):
        images = found[split]
        if count and count > len(images):
            raise InputError(f"--{split}-size {count}: there are only {len(images)} images")
        if count:
            images = images.take(stratified_sample(images.labels, count))
        if images.pixels is not None and images.size != args.size:
            from torchvision.transforms.functional import resize
            images.pixels = resize(images.pixels, [args.size] * 2, antialias=True)
            images.size = args.size
        found[split] = images
    wanted = [split for split in found if train or split == "test"]
    count = sum(len(found[split]) for split in wanted)
    if count * found["test"].channels * args.size ** 2 <= RESIDENT_BYTES:
        found.update({split: found[split].resident(device, args.workers) for split in wanted})
    return found["train"], found["test"]


# ---- Augmentation: whole batches, on the device --------------------------------------------------

def augment(images: Tensor, u: Tensor, flip: bool) -> Tensor:
    """Images (N, C, size, size) changed at random, by uniform numbers u (N, 6)."""
    return (shift if images.shape[-1] < 64 else rotate_and_crop)(images, u, flip)


def shift(images: Tensor, u: Tensor, flip: bool) -> Tensor:
    """A crop out of 4 pixels of reflection (a quarter of the image where that is less), flipped
    half of the time. Below 64 pixels a side."""
    n, _, size, _ = images.shape
    pad = min(4, size // 4)

    def source(u):                 # (N, size): where each row or column of the crop comes from
        offset = (u * (2 * pad + 1)).long()[:, None] - pad
        i = (torch.arange(size, device=images.device) + offset).abs()
        return (size - 1) - ((size - 1) - i).abs()

    rows, columns = source(u[:, 0]), source(u[:, 1])
    if flip:
        columns = torch.where(u[:, 2:3] < 0.5, columns.flip(1), columns)
    image = torch.arange(n, device=images.device)[:, None, None]
    return images[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def rotate_and_crop(images: Tensor, u: Tensor, flip: bool) -> Tensor:
    """Rotation by up to 30 degrees, the corners filled by reflection, then a crop of area 0.8 to 1
    of the image and aspect 3/4 to 4/3, and a flip, in one bilinear look-up. From 64 pixels a side.

    An aspect r fits into the image only for area <= r <= 1 / area: its logarithm is uniform there.
    """
    angle = (2 * u[:, 0] - 1) * math.radians(30)
    area = 0.8 + 0.2 * u[:, 1]
    aspect = area ** (2 * u[:, 2] - 1)
    half_w, half_h = (area * aspect).sqrt(), (area / aspect).sqrt()
    x, y = (2 * u[:, 3] - 1) * (1 - half_w), (2 * u[:, 4] - 1) * (1 - half_h)   # the centre
    if flip:
        half_w = torch.where(u[:, 5] < 0.5, -half_w, half_w)
    cos, sin = angle.cos(), angle.sin()
    top = torch.stack([cos * half_w, -sin * half_h, cos * x - sin * y], dim=-1)
    bottom = torch.stack([sin * half_w, cos * half_h, sin * x + cos * y], dim=-1)
    maps = torch.stack([top, bottom], dim=-2)                                   # (N, 2, 3)
    grid = F.affine_grid(maps, images.shape, align_corners=False)
    return F.grid_sample(images.to(u.dtype), grid, padding_mode="reflection", align_corners=False)
