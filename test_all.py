"""Every test of the project.

    python test_all.py  # all of them; ends with "N passed, N failed"
    python test_all.py resume  # those with "resume" in their name
"""
import argparse
import ast
import contextlib
import functools
import glob
import io
import json
import math
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import bench
import checkpoint
import claims
import cohort
import data
import diagnostics
import dictionary
import diffusion
import figures
import hyperinr
import interventions
import measures
import mlora
import pixels
import routes
import settings
import spaces
import theorem
import train
from checkpoint import generator, load_checkpoint, read_checkpoint
from diagnostics import Fitted
from inner_loop import MetaSGD, draw_pixels, each_step, functional_loss_and_grad, textbook_loss_and_grad
from measures import supervised_contrastive
from reader import Reader, RoutedReader
from siren import Siren, Weights, coordinate_grid

HERE = Path(__file__).resolve().parent
TINY = ("--width 8 --depth 2 --steps 2 --reader-depth 1 --head-dim 4 --batch-size 16 --train-size 160 --test-size 40 "
        "--epochs 2 --workers 0").split()
torch.set_num_threads(1)  # as `start` has it: runs agree bit for bit


@contextlib.contextmanager
def float64():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def folder():
    """A temporary folder that is also the working directory, as a user's would be."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as path:
        os.chdir(path)
        try:
            yield Path(path)
        finally:
            os.chdir(before)


@contextlib.contextmanager
def replaced(owner, name, value):
    plain = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield plain
    finally:
        setattr(owner, name, plain)


def rejects(function, *args, kind=ValueError, **more) -> bool:
    """An error of one line."""
    try:
        function(*args, **more)
    except kind as error:
        return "\n" not in str(error)
    return False


def apart(a, b) -> float:
    """Relative difference of two tensors, or of two lists of tensors, concatenated."""
    a, b = (torch.cat([x.detach().double().flatten() for x in ([xs] if torch.is_tensor(xs) else xs)]) for xs in (a, b))
    return float((a - b).norm() / b.norm())


def same(a: dict, b: dict) -> bool:
    """Whether two state dicts agree bit for bit."""
    return list(a) == list(b) and all(torch.equal(v, b[k]) for k, v in a.items())


def tiny_settings(**changed) -> argparse.Namespace:
    tiny = dict(dataset="cifar10", size=6, width=8, depth=2, steps=3, reader_depth=2, head_dim=4)
    return settings.settings(tiny | changed)


def tiny_model(inner=None, classes=4, **changed) -> train.MWT:
    """inner: a function in place of the closed form of the inner gradient."""
    args = tiny_settings(**changed)
    model = train.MWT(args, 1 if args.dataset == "digits" else 3, classes)
    if inner:
        model.siren.loss_and_grad = types.MethodType(inner, model.siren)
    return model


def batch(n=5, size=6, classes=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, size, size, generator=g) * 2 - 1, torch.randint(classes, (n,), generator=g)


def grads(model) -> dict[str, list[torch.Tensor]]:
    return {name: [torch.zeros_like(p) if p.grad is None else p.grad for p in part.parameters()]
            for name, part in model.named_children()}


def flags(argv) -> argparse.Namespace:
    return settings.settings(vars(settings.parser().parse_args(argv)))


def command(argv, main=train.main):
    """A program's main in process: (exit status, what it printed to stdout, to stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(a) for a in argv])
            status = 0
        except SystemExit as error:
            status = error.code
    return status, out.getvalue(), err.getvalue()


def trained(*argv, draw=False) -> str:
    """What a run of train.py printed; it must go well. Strings are split into flags, lists taken as they are."""
    argv = [a for more in argv for a in (more.split() if isinstance(more, str) else more)]
    with contextlib.nullcontext() if draw else replaced(figures, "training_figure", lambda *_: None):
        status, out, err = command(argv)
    assert status == 0, (argv, err)
    return out


def report(name="out") -> dict:
    return json.loads(Path(f"{name}.json").read_text())


def refused(argv, *words, main=train.main):
    """Exit status 2, one line that has the words in it, nothing written."""
    def everything():
        return {p: p.is_file() and p.read_bytes() for p in Path().rglob("*")}
    before, begin = everything(), f"{main.__module__}.py: error: "
    status, out, err = command(argv, main)
    assert status == 2 and err.count("\n") == 1 and err.startswith(begin) and not out, (argv, status, out, err)
    assert all(str(w) in err for w in words), (argv, words, err)
    assert before == everything(), argv


def start(*argv) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def finish(process) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def wait_for(condition, process, seconds=100):
    """Until the condition holds; an error if the process ends or time runs out before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def image_folder(root, second="test") -> Path:
    """12 training and 4 test images a class, of noise."""
    from PIL import Image
    rng, root = np.random.default_rng(0), Path(root)
    for split, n in (("train", 12), (second, 4)):
        for c in "abc":
            (root / split / c).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / c / f"{i:03d}.png")
    return root


# ---- siren.py ------------------------------------------------------------------------------------

@float64()
def test_siren_by_hand():
    """The field is not sin(W a + b) layer by layer, or it starts from other weights than SIREN's."""
    assert coordinate_grid(2, 3).tolist() == [[-1, -1], [-1, 0], [-1, 1], [1, -1], [1, 0], [1, 1]]
    siren = Siren(2, 3, width=64, depth=2, omega=7.0)
    for weight, bound in ((siren.first, 1 / 2), (siren.hidden, math.sqrt(6 / 64))):
        assert 0.95 * bound < weight[..., :-1].abs().max() <= bound and (weight[..., -1] == 0).all()
    weights, coords = Weights(torch.randn(2, 64, 3), torch.randn(2, 2, 64, 65) / 8), torch.randn(4, 2)
    V, c, scale = (p.detach().numpy() for p in (siren.head.weight, siren.head.bias, siren.scale))
    for n, image in enumerate(siren(coords, weights).detach().numpy()):
        for got, x in zip(image, coords.numpy()):
            W = weights.first[n].numpy()
            a = np.sin(7.0 * (W[:, :2] @ x + W[:, 2]))
            for W in weights.hidden[n].numpy():
                a = np.sin(W[:, :-1] @ a + W[:, -1])
            np.testing.assert_allclose(got, scale * (V @ a + c), rtol=1e-10, atol=1e-12)


@float64()
def test_closed_form_gradient_against_autograd():
    """An inner gradient is wrong: of the three ways, with shared or own pixels, at the anchor or off it."""
    for dims, out, width, depth, n, points in ((2, 3, 8, 2, 4, 9), (3, 1, 5, 1, 2, 7)):
        siren, values = Siren(dims, out, width, depth, omega=5.0), torch.randn(n, points, out)
        batched = Weights(*(w + 0.1 * torch.randn(n, *w.shape) for w in siren.anchor()))
        for coords in (torch.randn(points, dims), torch.randn(n, points, dims)):
            for weights in (batched, siren.anchor()):
                each = [(w if weights is batched else w.expand(n, *w.shape)).detach().requires_grad_()
                        for w in weights]
                loss = (siren(coords, Weights(*each)) - values).square().mean((1, 2))
                expected = [loss, *torch.autograd.grad(loss.sum(), each)]
                for way in (Siren.loss_and_grad, textbook_loss_and_grad, functional_loss_and_grad):
                    loss, grad = way(siren, coords, values, weights)
                    assert all(apart(a, b) <= 1e-9 for a, b in zip([loss, *grad], expected, strict=True))


# ---- inner_loop.py -------------------------------------------------------------------------------

@float64()
def test_inner_loop_by_hand():
    """phi of a batch is not k steps of plain SGD with step j's sizes on each image alone, by torch.autograd."""
    coords, values = coordinate_grid(4, 4), torch.rand(5, 16, 3)
    for shared in (False, True):
        siren = Siren(2, 3, width=6, depth=2)
        inner = MetaSGD(siren, steps=3, shared=shared)
        assert len(inner.first) == (1 if shared else 3) and inner.first.min() >= 0.1 and inner.first.max() <= 1
        for pixels in (None, draw_pixels(3, 5, 16, 0.4)):
            phi = inner.descend(siren, *each_step(coords, values, 3, pixels))
            for n in range(5):
                one = [w.detach().clone().requires_grad_() for w in siren.anchor()]
                for j in range(3):
                    seen = torch.arange(16) if pixels is None else pixels[j, n]
                    loss = (siren(coords[seen], Weights(*one)) - values[n, seen]).square().mean()
                    alphas = (a[0 if shared else j].detach() for a in (inner.first, inner.hidden))
                    steps = zip(one, alphas, torch.autograd.grad(loss, one))
                    one = [(w - alpha * g).detach().requires_grad_() for w, alpha, g in steps]
                assert apart([w[n] for w in phi], one) <= 1e-12
            assert pixels is not None or apart(inner(siren, coords, values), phi) == 0
    with torch.random.fork_rng():
        drawn = inner(siren, coords, values, steps=5, fraction=0.5)
    assert apart(drawn, inner.descend(siren, *each_step(coords, values, 5, draw_pixels(5, 5, 16, 0.5)))) == 0
    assert rejects(MetaSGD(siren, steps=2), siren, coords, values, steps=3)  # step sizes for two


def test_pixels_drawn():
    """Drawn pixels are too few, not distinct, not fresh at each step or image, or not uniform."""
    drawn = draw_pixels(200, 50, 100, 0.29)
    assert drawn.shape == (200, 50, 29)  # 0.29 * 100 = 28.999... in floating point
    assert all(len(set(row.tolist())) == 29 for row in drawn[0]) and len(drawn[:3].flatten(0, 1).unique(dim=0)) == 150
    counts = torch.bincount(drawn.flatten(), minlength=100) / 10_000
    assert len(counts) == 100 and (counts - 0.29).abs().max() < 6 * math.sqrt(0.29 * 0.71 / 10_000)
    assert draw_pixels(1, 3, 16, 1.0).sort(-1).values.eq(torch.arange(16)).all()
    assert rejects(draw_pixels, 1, 1, 16, 0.05)


# ---- reader.py -----------------------------------------------------------------------------------

@float64()
def test_reader_by_hand():
    tokens, reader = torch.randn(2, 10, 7), Reader(10, 6, 4, depth=1, head_dim=3, token_scale=50.0)
    attention, mlp = reader.blocks
    assert all((block.layer_scale == 0.1).all() for block in reader.blocks)
    for p in reader.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x = 50.0 * (tokens + reader.beta) @ reader.embed.weight.T + reader.embed.bias
    h, out = F.layer_norm(x, (6,), attention.norm.weight, attention.norm.bias), torch.zeros_like(x)
    for n in range(2):
        for head in (slice(0, 3), slice(3, 6)):
            q, k, v = (h[n] @ attention.qkv.weight[6 * part:][head].T for part in range(3))
            for t in range(10):
                weight = (k @ q[t] / math.sqrt(3)).exp()
                out[n, t, head] = weight @ v / weight.sum()
    y = x + attention.layer_scale * (out @ attention.out.weight.T + attention.out.bias)
    h = F.layer_norm(y, (6,), mlp.norm.weight, mlp.norm.bias)
    z = y + mlp.layer_scale * (F.gelu(h @ mlp.up.weight.T + mlp.up.bias) @ mlp.down.weight.T + mlp.down.bias)
    logits, trace = reader.trace(tokens)
    assert [stage for stage, _ in trace] == ["input map", "attention 1", "MLP 1"]
    assert apart([state for _, state in trace], [x, y, z]) <= 1e-12
    assert apart(logits, z.mean(1) @ reader.head.weight.T + reader.head.bias) <= 1e-12
    assert torch.equal(logits, reader(tokens))
    normed, x = Reader(10, 6, 4, 7, depth=0, head_dim=3, token_scale=0.0), tokens.flatten(1)
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert apart(normed(tokens), normed.head(normed.embed(x.view_as(tokens)).mean(1))) <= 1e-12


@float64()
def test_readout_and_branches_by_hand():
    tokens, colour = torch.randn(3, 10, 7), torch.rand(3, 3)
    reader = RoutedReader(10, 6, 4, depth=1, head_dim=3, readout=2)
    logits, trace = reader.trace(tokens)
    states = [x for _, x in trace]
    assert torch.equal(logits, reader(tokens))
    x = states[2]
    q = [torch.stack([query + x.sum(1) / 10 for query in reader.queries], 1)]
    for attention, mlp in zip(reader.gather[::2], reader.gather[1::2]):
        q.append(q[-1] + attention(torch.cat([q[-1], x], 1))[:, :2])  # all ask; only the queries are answered
        q.append(q[-1] + mlp(q[-1]))
    assert apart(states[3:], q[1:]) <= 1e-12
    assert apart(logits, reader.head((q[-1][:, 0] + q[-1][:, 1]) / 2)) <= 1e-12
    plain = Reader(10, 6, 4, depth=1, head_dim=3, token_scale=50.0)
    for name, features in (("bias", 50 * tokens[..., 6]), ("column:2", 50 * tokens[..., 2]), ("colour", colour)):
        reader = RoutedReader(10, 6, 4, depth=1, head_dim=3, token_scale=50.0, branch=name)
        reader.load_state_dict(plain.state_dict(), strict=False)
        more, branch = [colour] if name == "colour" else [], reader.branch
        assert torch.equal(reader(tokens, *more), plain(tokens))
        torch.nn.init.normal_(branch.down.weight)
        added = F.gelu(features @ branch.up.weight.T + branch.up.bias) @ branch.down.weight.T + branch.down.bias
        assert apart(reader(tokens, *more), plain(tokens) + added) <= 1e-12


def test_parameter_counts():
    siren = Siren(2, 3, width=128, depth=4)
    parts = (siren, MetaSGD(siren, steps=6)), (Reader(4 * 64, 64, 10, depth=10),), (Reader(4 * 128, 128, 10, depth=5),)
    counts = [sum(p.numel() for part in each for p in part.parameters()) for each in parts]
    assert counts == [465_414, 273_034, 581_258]


# ---- checkpoint.py -------------------------------------------------------------------------------

def test_draws_are_a_function_of_their_key():
    """A resumed run would draw other numbers, or two keys the same ones."""
    keys = [("order", 0, 1), ("order", 1, 0), ("pixels", 0, 1), ("order", 0), ("order", 0, 1)]
    drawn = [tuple(torch.rand(3, generator=generator(*key)).tolist()) for key in keys]
    assert drawn[0] == drawn[-1] and len(set(drawn)) == len(keys) - 1


@folder()
def test_checkpoint_is_written_whole_or_not_at_all():
    """A save that ends half-way leaves something else than the last good checkpoint."""
    def torn(content, file):
        file.write(b"half of it")
        raise OSError("no space left")
    checkpoint.save_checkpoint("out.pt", {"model": torch.ones(3)})
    good = Path("out.pt").read_bytes()
    with replaced(torch, "save", torn):
        assert rejects(checkpoint.save_checkpoint, "out.pt", {}, kind=OSError) and Path("out.pt").read_bytes() == good


@folder()
def test_bad_checkpoints():
    """A checkpoint runs code; a broken or foreign one gives a traceback or a model; or an old one is not read."""
    class Evil:
        def __reduce__(self):
            return os.system, ("touch harm",)

    trained(TINY, "--epochs 1")
    content, whole = torch.load("out.pt", weights_only=True), Path("out.pt").read_bytes()
    Path("half.pt").write_bytes(whole[:len(whole) // 2])
    torch.save(Evil(), "evil.pt")
    nan = {k: v * math.nan for k, v in content["model"].items()}
    words = {"half": "damaged", "evil": "damaged"}
    for name, change, words[name] in (
            ("other", {"format": None}, "not a checkpoint"), ("future", {"version": 99}, "version 99"),
            ("part", {"model": None}, "no model"), ("nan", {"model": nan}, "not finite"),
            ("huge", {"args": content["args"] | {"width": 10 ** 9}}, "disagree"), ("os", {"method": "os"}, "method")):
        torch.save(content | change, f"{name}.pt")
    for name, word in words.items():
        refused(["--eval-only", "--ckpt", f"{name}.pt"], f"{name}.pt", word)
    assert len(words) == 8 and not Path("harm").exists()
    for more, word in (("--width 99", "--width"), ("--steps-test 5", "--shared-lr"), ("--val 0.2", "--val")):
        refused(["--eval-only", "--ckpt", "out.pt", *more.split()], word)  # --val: it was trained on those images
    del content["method"]  # the first checkpoints did not say
    torch.save(content, "first.pt")
    assert same(*(load_checkpoint(f"{name}.pt")[0].state_dict() for name in ("first", "out")))


# ---- data.py -------------------------------------------------------------------------------------

def test_digits_and_subsets():
    """The digits are not UCI's in [-1, 1]; a subset is not stratified; held-out images are trained on."""
    images, test = data.load_dataset(settings.settings({}))
    both = torch.bincount(images.labels) + torch.bincount(test.labels)
    assert (len(images), len(test)) == (1437, 360) and (torch.bincount(test.labels) - both / 5).abs().max() < 1
    assert both.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert set(images.signal(images.pixels).unique().tolist()) == {i / 8 - 1 for i in range(17)}
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    rows = data.stratified_sample(labels, 11)
    assert torch.bincount(labels[rows]).tolist() == [6, 3, 2] and torch.equal(rows, data.stratified_sample(labels, 11))
    seen, held = data.load_dataset(settings.settings({"val": 0.2}))
    whole, seen, unseen = ({bytes(x.numpy()) for x in part.pixels} for part in (images, seen, held))
    assert len(held) == round(0.2 * 1437) and not seen & unseen and seen | unseen == whole


@folder()
def test_image_files_of_every_mode():
    """A file of some mode is not decoded as what it shows, or 16 bits are clipped."""
    from PIL import Image
    ramp = np.linspace(0, 255, 24 * 20).reshape(20, 24).astype(np.uint8)
    colour = np.stack([ramp, ramp.T.reshape(20, 24), 255 - ramp], -1)
    for mode in ("RGB", "L", "RGBA", "P", "LA", "1"):
        Image.fromarray(colour).convert(mode).save(mode + ".png")
    for name, pixels in (("deep.png", ramp.astype(np.uint16) * 257), ("shallow.png", ramp)):
        Image.fromarray(pixels).save(name)
    decoded = {path.stem: data.decode(path, 16).float() for path in Path().iterdir()}
    assert len(decoded) == 8 and all(x.shape == (3, 16, 16) and x.std() > 20 for x in decoded.values())
    assert (decoded["deep"] - decoded["shallow"]).abs().max() <= 1 and torch.equal(decoded["RGBA"], decoded["RGB"])


@folder()
def test_folder_resident_and_streamed_agree():
    """A folder too large for memory gives other images than one that is held, or is held all the same."""
    args = settings.settings({"dataset": str(image_folder("set", second="val")), "size": 8, "workers": 2})
    images, test = data.load_dataset(args)
    assert (len(images), len(test), images.classes, images.channels) == (36, 12, ["a", "b", "c"], 3)
    with replaced(data, "RESIDENT_BYTES", 0):
        streamed, _ = data.load_dataset(args)
    assert images.pixels is not None and streamed.pixels is None
    order = [torch.tensor([5, 0, 35]), torch.tensor([7])]
    for workers in (0, 2):
        pairs = zip(images.batches(order, "cpu"), streamed.batches(order, "cpu", workers), strict=True)
        assert all(torch.equal(a, b) for pair in pairs for a, b in zip(*pair))


@folder()
def test_torchvision_files():
    """Fashion-MNIST, made here in its own file format, is not read as written, or not resized."""
    raw, rng = Path("data/FashionMNIST/raw"), np.random.default_rng(0)
    raw.mkdir(parents=True)
    for split, n in (("train", 40), ("t10k", 20)):
        images, labels = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), np.arange(n, dtype=np.uint8) % 10
        for name, header, x in (("images-idx3", [0x803, n, 28, 28], images), ("labels-idx1", [0x801, n], labels)):
            (raw / f"{split}-{name}-ubyte").write_bytes(np.array(header, ">i4").tobytes() + x.tobytes())
    found, test = data.load_dataset(settings.settings({"dataset": "fashion_mnist"}))
    assert found.pixels.shape == (40, 1, 28, 28) and len(found.classes) == 10
    assert torch.equal(test.pixels[:, 0], torch.from_numpy(images)) and test.labels.tolist() == labels.tolist()
    assert data.load_dataset(settings.settings({"dataset": "fashion_mnist", "size": 14}))[0].size == 14


def test_augmentation_at_low_resolution():
    """It is not a crop out of 4 pixels of reflection, flipped where that is asked."""
    images, u = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8), torch.rand(20, 6)
    for flip in (False, True):
        for n, got in enumerate(data.augment(images, u, flip).numpy()):
            padded = np.pad(images[n].numpy(), ((0, 0), (4, 4), (4, 4)), mode="reflect")
            y, x = int(u[n, 0] * 9), int(u[n, 1] * 9)
            expected = padded[:, y:y + 32, x:x + 32]
            assert np.array_equal(got, expected[:, :, ::-1] if flip and u[n, 2] < 0.5 else expected)


def test_augmentation_at_high_resolution():
    """Angle, area or flip is not what was drawn. On ramps bilinear look-up is exact: differences give the map back."""
    size, u = 64, torch.rand(50, 6)
    y, x = torch.meshgrid(*[(torch.arange(size) + 0.5) / size * 2 - 1] * 2, indexing="ij")
    ramps = torch.stack([x, y]).expand(50, -1, -1, -1)
    still = torch.tensor([0.5, 1.0, 0.5, 0.5, 0.5, 0.1]).expand(50, 6)  # no angle, whole area, centred
    for flip, expected in ((False, ramps), (True, ramps.flip(-1))):
        assert torch.allclose(data.augment(ramps, still, flip), expected, atol=1e-5)
    u[:, 3:5] = 0.5
    centre = slice(size // 2 - 4, size // 2 + 4)
    moved = data.augment(ramps, u, False)[:, :, centre, centre]
    along_x = moved.diff(dim=-1).mean((-1, -2)) * size / 2  # (N, 2): d(x, y) / dx
    along_y = moved.diff(dim=-2).mean((-1, -2)) * size / 2
    w, h = along_x.norm(dim=1), along_y.norm(dim=1)
    assert torch.allclose(w * h, 0.8 + 0.2 * u[:, 1], atol=1e-4) and w.max() <= 1.0001 and h.max() <= 1.0001
    assert torch.allclose(torch.atan2(along_x[:, 1], along_x[:, 0]), (2 * u[:, 0] - 1) * math.pi / 6, atol=1e-4)


@folder()
def test_bad_data():
    """Data that are missing, split unevenly or broken give no line that names them."""
    import torchvision

    def no_network(self):
        raise RuntimeError("no network\nhere")
    with replaced(torchvision.datasets.MNIST, "download", no_network):
        refused(["--dataset", "mnist", "--data-root", "empty"], "empty", "MNIST/raw", "no network here")
    Path("one-split/train/a").mkdir(parents=True)
    refused(["--dataset", "one-split"], "one-split")
    (image_folder("other") / "test" / "c").rename("other/test/d")
    refused(["--dataset", "other", "--batch-size", "4"], "other", "c, d")
    Path("other/test/d").rename("other/test/c")
    Path("other/train/b/005.png").write_bytes(b"not an image")
    argv = [*TINY, *"--dataset other --size 8 --batch-size 4 --train-size 36 --test-size 9".split()]
    refused(argv, "other/train/b/005.png")
    with replaced(data, "RESIDENT_BYTES", 0):                      # met while training
        status, _, err = command([*argv, "--workers", 2])
    assert status == 2 and err.count("\n") == 1 and "other/train/b/005.png" in err, err


# ---- settings.py ---------------------------------------------------------------------------------

def test_recipes_and_command_lines():
    """A data set has another recipe than the README's, or the command that is printed makes another run."""
    digits, cifar, large = map(flags, ([], ["--dataset", "cifar10"], "--dataset set --size 64 --steps 6".split()))
    assert (digits.size, digits.width, digits.epochs) == (8, 64, 15)
    assert (cifar.size, cifar.width, cifar.epochs, cifar.steps, cifar.omega) == (32, 128, 10, 6, 10)
    assert (large.width, large.epochs, large.omega, large.fraction, large.steps) == (128, 40, 30, 0.25, 6)
    for argv in ([], [*TINY[:-2], "--augment"], ["--dataset", "a folder", "--size", "64", "--omega", "10"]):
        again = shlex.split(settings.command_line(flags(argv)))
        assert again[:2] == ["python", "train.py"] and flags(again[2:]) == flags(argv)


@folder()
def test_bad_values():
    """A wrong flag, value or file name gives no line that names it, or a file is overwritten."""
    cases = """--steps 0 = --steps; --steps two = --steps; --fraction 1.5 = --fraction; --fraction 0.001 = pixel
        --epochs 0.5 = --epochs; --epochs nan = --epochs; --cluster-random = --w-cluster
        --lr nan = --lr; --head-dim 5 = --head-dim; --batch-size 5000 = 1437
        --train-size 9999 = 1437; --device tpu9 = --device; --precision fp8 = --precision; --steps-test 9 = --shared-lr
        --out nowhere/out.pt = nowhere; --out out.txt = .pt; --out dir.pt = dir.pt; --out precious.pt = precious.pt
        --no-such-flag = --no-such-flag; --dataset no/such/folder = no/such/folder; --dataset = --dataset
        --eval-only = --ckpt; --ckpt out.pt = --eval-only; --eval-only --ckpt gone.pt = gone.pt; --resume = out.pt
        --init-from gone.pt = gone.pt; --branch column:64 = column; --branch weight = --branch
        --width 99999999999999999999 --head-dim 1 = --width"""
    Path("dir.pt").mkdir()
    Path("precious.pt").write_text("something else")
    for case in cases.replace("\n", ";").split(";"):
        argv, word = case.split(" = ")
        refused(argv.split(), word.strip())


# ---- train.py: the model -------------------------------------------------------------------------

@float64()
def test_tokens_logits_and_reconstructions():
    """A token is not its neuron, logits depend on the batch, or a reconstruction is not the field."""
    model, (images, _) = tiny_model(depth=3), batch()
    phi, theta, tokens = model.adapt(images), model.siren.anchor(), model.fit(images)
    assert tokens.shape == (5, 24, 9)
    for n, layer, neuron in ((0, 0, 0), (3, 1, 5), (4, 2, 7)):
        moved = phi.hidden[n, layer, neuron] - theta.hidden[layer, neuron]
        assert apart(tokens[n, 8 * layer + neuron], moved) <= 1e-12
    logits, trace = model.trace(tokens)
    assert torch.equal(logits, model.read(tokens)) and len(trace) == 5
    for n in range(5):
        assert apart(model.read(model.fit(images[n:n + 1]))[0], logits[n]) <= 1e-10
    shown = model.siren(model.coords, theta).T.reshape(3, 6, 6).clamp(-1, 1)
    assert apart(model.reconstruct(images, 0), shown.expand(5, -1, -1, -1)) <= 1e-12


@float64()
def test_centred_colour():
    """The mean colour reaches the weights or the error, or the logits other than through the colour branch."""
    model, (images, labels) = tiny_model(centre_colour=True, branch="colour"), batch()
    torch.nn.init.normal_(model.reader.branch.down.weight)
    tokens, colour = model.fit(images), images.mean((2, 3))
    assert apart(tokens, tiny_model().fit(images - colour[..., None, None])) <= 1e-12
    expected = F.cross_entropy(model.reader(tokens, colour), labels)
    assert apart(model(*model.look(images, 4), labels)[0], expected) <= 1e-10
    phi, error = model.fit_and_error(*model.look(images + 0.95, 4), clamp=True)  # to what a pixel can be
    shown = (model.siren(model.coords, phi) + colour[:, None] + 0.95).clamp(-1, 1)
    assert apart(error, (shown - (images + 0.95).flatten(2).mT).square().mean((1, 2))) <= 1e-12
    drawn = tiny_model(centre_colour=True, fraction=0.5)  # of drawn pixels: the mean of all that were drawn
    coords, values = drawn.look(images, 4, generator("a"))
    assert coords.shape == (4, 5, 18, 2) and not torch.equal(coords[:, 0], coords[:, 1])
    expected = drawn.inner_loop.descend(drawn.siren, coords[:-1], values[:-1] - values.mean((0, 2))[:, None])
    assert apart(drawn.fit_and_error(coords, values)[0], expected) <= 1e-12


@float64()
def test_contrastive_loss_by_hand():
    """It is not Khosla's equation 2, does not drive theta and alpha with its weight, or reaches the reader."""
    x, labels = torch.randn(7, 5), torch.tensor([0, 0, 1, 1, 1, 2, 0])  # the 2 is alone: left out
    z, terms = F.normalize(x, dim=1), []
    for i in (0, 1, 2, 3, 4, 6):
        e = {a: math.exp(float(z[i] @ z[a]) / 0.1) for a in range(7) if a != i}
        positive = [-math.log(e[a] / sum(e.values())) for a in e if labels[a] == labels[i]]
        terms.append(sum(positive) / len(positive))
    assert abs(float(supervised_contrastive(3 * x, labels)) - sum(terms) / 6) <= 1e-12
    assert float(supervised_contrastive(x, torch.arange(7))) == 0
    images, labels = batch()[0], torch.tensor([0, 0, 1, 1, 2])
    model = tiny_model(w_cluster=0.3)
    phi = model.adapt(images)
    rows = [(phi.first - model.siren.first).flatten(1), model.tokens(phi).flatten(1)]
    loss = model(*model.look(images, 4), labels)[2]
    assert apart(loss, 0.3 * supervised_contrastive(torch.cat(rows, 1), labels)) <= 1e-12
    loss.backward()
    assert not any(g.any() for g in grads(model)["reader"])
    assert all(p.grad.any() for p in (*model.siren.anchor(), *model.inner_loop.parameters()))


def test_same_core_whatever_the_reader():
    """Two variants of one seed start from other weights, so that luck is compared too."""
    one = tiny_model()
    for more in (dict(reader_depth=3), dict(readout=2), dict(branch="column:3")):
        other = tiny_model(**more).state_dict()
        assert all(torch.equal(v, other[k]) for k, v in one.state_dict().items())
    denser = tiny_model(steps=7).state_dict()  # the same first step sizes
    for name, v in one.state_dict().items():
        assert torch.equal(v, denser[name][:3] if name.startswith("inner_loop") else denser[name])
    assert not torch.equal(one.siren.first, tiny_model(seed=1).siren.first)


def test_psnr_and_evaluation_one_image_at_a_time():
    """Accuracy, its interval or PSNR are not those of the test images, or depend on what is drawn."""
    assert abs(float(train.psnr(torch.tensor(0.04))) - 20) < 1e-5  # in [0, 1]: MSE 0.01
    args = settings.settings({"test_size": 30, "width": 8, "head_dim": 4})
    _, test = data.load_dataset(args)
    model = train.MWT(args, 1, 10).requires_grad_(False)
    result, right, decibels = train.evaluate(model, test), [], []
    for image, label in zip(test.signal(test.pixels), test.labels):
        phi = model.adapt(image[None])
        right.append(int(model.read(model.tokens(phi)).argmax()) == int(label))
        error = (model.siren(model.coords, phi)[0].clamp(-1, 1) - image.flatten(1).mT) / 2
        decibels.append(10 * math.log10(1 / float(error.square().mean())))
    assert result["test_accuracy"] == np.mean(right) and abs(result["test_psnr"] - np.mean(decibels)) < 1e-3
    assert result["test_interval"] == list(measures.wilson(sum(right), 30))
    model.fraction = 0.3
    assert train.evaluate(model, test) == train.evaluate(model, test) != result


# ---- train.py: the outer loop --------------------------------------------------------------------

@folder()
def test_training_learns_and_reports():
    """A small run on digits stays near chance, or its files or its last line do not say how it went."""
    out = trained("--train-size 600 --epochs 3 --width 32 --depth 1 --reader-depth 1 --steps 2 --lr 2e-2 "
                  "--test-size 120 --val 0.2", draw=True)
    r, before = report(), Path("out.pt").read_bytes()
    assert r["test_accuracy"] > 0.6 and r["test_psnr"] > 18 and r["epochs"][0]["loss"] > r["epochs"][-1]["loss"]
    assert len(r["epochs"]) == 3 and r["epochs"][-1]["test_accuracy"] == r["test_accuracy"]
    assert Path("out.png").read_bytes().startswith(b"\x89PNG") and not Path("out.pt.tmp").exists()
    assert set(read_checkpoint("out.pt")) == {"format", "version", "method", "args", "data", "model", "metrics"}
    assert "95% interval" in out and "validation" in out and out.count("\nepoch") == 3
    assert f"{100 * r['test_accuracy']:.2f}%" in trained("--eval-only --ckpt out.pt")
    assert Path("out.pt").read_bytes() == before and "finished" in trained("--resume")


@float64()
@folder()
def test_outer_steps_by_hand():
    """Steps are not AdamW at OneCycleLR's rates, each group clipped to norm 1, on textbook gradients."""
    trained(TINY, "--epochs 3 --train-size 16 --lr 0.02 --lr-alpha 0.3 --weight-decay 0.1 --w-task 1")
    got, args = load_checkpoint("out.pt")
    images, _ = data.load_dataset(args)
    model, clipped = train.MWT(args, 1, 10), False
    model.siren.loss_and_grad = types.MethodType(textbook_loss_and_grad, model.siren)
    optimizer = torch.optim.AdamW([{"params": part.parameters()} for part in model.children()], weight_decay=0.1)
    for t in range(3):
        rows = torch.randperm(16, generator=generator("order", 0, t))
        optimizer.zero_grad()
        model(*model.look(images.signal(images.pixels[rows]), 3), images.labels[rows])[:2].sum().backward()
        # OneCycleLR with a warm-up of 0.05 of 3 steps: all three are on the way down.
        fall = (1 + math.cos(math.pi * (t - (0.05 * 3 - 1)) / (2 - (0.05 * 3 - 1)))) / 2
        for top, group in zip((0.02, 0.3, 0.02), optimizer.param_groups, strict=True):
            group["lr"] = top / 25e4 + (top - top / 25e4) * fall
            group["betas"] = 0.95 + (0.85 - 0.95) * fall, 0.999
            norm = torch.cat([p.grad.flatten() for p in group["params"]]).norm()
            clipped |= bool(norm > 1)
            for p in group["params"]:
                p.grad *= min(1, 1 / (norm + 1e-6))
        optimizer.step()
    assert clipped and apart(got.parameters(), model.parameters()) <= 1e-9


@folder()
def test_augmentation_reaches_the_run():
    """Images are augmented where that was not asked, or digits mirrored, which have no mirror image."""
    seen = []

    def spy(images, u, flip):
        seen.append(flip)
        return plain(images, u, flip)

    image_folder("set")
    with replaced(data, "augment", spy) as plain:
        for more in ("", "--augment", "--augment --train-size 32 --test-size 9 --dataset set --size 8"):
            trained(TINY, "--epochs 1", more)
    assert seen == [False] * 10 + [True] * 2


@folder()
def test_shared_step_sizes_and_steps_at_test_time():
    """--steps-test is not the number of inner steps in evaluation: of a new run, of --eval-only, of frozen fits."""
    for more in ([], ["--freeze-siren"]):
        trained(TINY, "--epochs 1 --shared-lr --steps-test 5", more)
        psnr = {}
        for k in (1, 5):
            trained(f"--eval-only --ckpt out.pt --steps-test {k} --out now.pt")
            psnr[k] = round(report("now")["test_psnr"], 3)
        assert psnr[1] != psnr[5] == round(report()["test_psnr"], 3), more


@folder()
def test_loss_that_is_not_finite_stops_the_run():
    """It goes on, or is saved over the last good checkpoint."""
    trained(TINY, "--epochs 1")
    good = Path("out.pt").read_bytes()
    for more in ("--batch-size 160", ""):          # seen by the evaluation after one step; by the sums of ten
        status, _, err = command([*TINY, *f"--epochs 1 --lr 1e38 --lr-alpha 1e38 {more}".split()])
        assert status == 1 and "not finite" in err and err.count("\n") == 1 and Path("out.pt").read_bytes() == good


# ---- train.py: interrupted runs, several processes -----------------------------------------------

@contextlib.contextmanager
def signal_at(step: int, number: int):
    """In that step of a run this process gets the signal."""
    steps = []

    def spy(*batch):
        steps.append(batch)
        if len(steps) == step:
            os.kill(os.getpid(), number)
        return plain(*batch)
    with replaced(train, "backward", spy) as plain:
        yield


@folder()
def test_signals_save_and_say_how_to_resume():
    """Ctrl-C or SIGTERM loses a step, the way on or the file, or changes the weights by a bit; 2.35 epochs are not 24
    steps of ten an epoch."""
    out, argv = ["--out", "a run.pt"], [*TINY, "--augment", "--epochs", "2.35"]
    trained(argv, "--out straight.pt")
    straight = read_checkpoint("straight.pt")
    for number, at, reached in ((signal.SIGINT, 15, (1, 5)), (signal.SIGTERM, 22, (2, 2))):
        before = signal.getsignal(number)
        with signal_at(at, number):
            status, _, err = command([*argv, *out])
        assert status == 128 + number and "train.py --resume --out 'a run.pt'" in err and err.count("\n") == 1, err
        stopped = read_checkpoint("a run.pt")
        assert (stopped["progress"]["epoch"], stopped["progress"]["step"]) == reached
        assert stopped["scheduler"]["total_steps"] == 24 and signal.getsignal(number) == before
        refused([*argv, *out], "--resume")
        refused(["--resume", *out, "--lr", "0.5"], "--lr")
        trained(["--resume", *out, "--save-minutes", "1"])
        resumed = read_checkpoint("a run.pt")
        assert same(resumed["model"], straight["model"]) and same_epochs(resumed, straight, 0)
    assert len(straight["metrics"]["epochs"]) == 3 and "--epochs=2.35" in report("straight")["command"]
    assert type(flags("--epochs 2.0".split()).epochs) is int


@folder()
def test_random_labels():
    """They do not stay an image's own, have other sizes than the classes, or replace the labels of the class loss."""
    seen, argv = [], [*TINY, *"--w-cluster 1 --cluster-random".split()]

    def spy(x, labels, **more):
        seen.append(labels)
        return plain(x, labels, **more)
    with replaced(sys.modules["model"], "supervised_contrastive", spy) as plain:
        trained(argv)
    images, own = data.load_dataset(flags(argv))[0], {}
    for step, labels in enumerate(seen):       # which images a step sees is the data order's
        order = torch.randperm(160, generator=generator("order", 0, step // 10)).view(10, 16)
        for row, label in zip(order[step % 10].tolist(), labels.tolist()):
            assert own.setdefault(row, label) == label
    drawn = torch.tensor([own[row] for row in range(160)])
    assert torch.equal(drawn.bincount(), images.labels.bincount()) and (drawn == images.labels).float().mean() < 0.2
    for name, more in (("classes", ""), ("random", "--cluster-random")):       # one step: nothing is learned yet
        trained(TINY, f"--w-cluster 1 --epochs 1 --train-size 16 --out {name}.pt", more)
    a, b = (report(name)["epochs"][0] for name in ("classes", "random"))
    assert a["loss"] == b["loss"] and a["weighted_cluster_loss"] != b["weighted_cluster_loss"]


def same_epochs(a: dict, b: dict, tolerance: float) -> bool:
    pairs = zip(a["metrics"]["epochs"], b["metrics"]["epochs"], strict=True)
    return all(abs(x[k] - y[k]) <= tolerance for x, y in pairs
               for k in x if k != "seconds")


@folder()
def test_resume_after_kill_bit_for_bit():
    """A run killed in its second epoch and resumed ends with other weights or figures than one that was not."""
    def progress():
        return read_checkpoint("killed.pt").get("progress") if Path("killed.pt").exists() else None

    argv = [*TINY, *"--train-size 320 --epochs 3 --fraction 0.5 --augment --save-minutes 0".split()]
    killed = start(HERE / "train.py", *argv, "--out", "killed.pt")
    wait_for(lambda: progress() and progress()["epoch"] >= 1 and progress()["step"] >= 2, killed)
    killed.kill()
    killed.communicate()
    assert progress(), "the kill came too late"
    trained("--resume --out killed.pt --save-minutes 5")
    trained(argv, "--out straight.pt --save-minutes 5")
    a, b = (read_checkpoint(p) for p in ("straight.pt", "killed.pt"))
    assert same(a["model"], b["model"]) and same_epochs(a, b, 0)


@folder()
def test_two_processes_equal_one():
    """torchrun's two processes, each with half of the batch, end with other weights or figures than one process makes
    (gloo, float64); or one process goes on with what two began."""
    code = "import sys, torch\nsys.path.insert(0, sys.argv[1])\ntorch.set_default_dtype(torch.float64)\n" \
           "import train\ntrain.main(sys.argv[2:])"
    argv = [*TINY, "--test-size", "39", "--out"]
    with float64():
        trained(argv, "one.pt")
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 --no-python".split()
    run = start(*torchrun, sys.executable, "-c", code, HERE, *argv, "two.pt", "--batch-size", 8)
    status, out, err = finish(run)
    assert status == 0 and out.count("\nepoch") == 2, (out, err)  # only the first process prints
    a, b = (read_checkpoint(p) for p in ("one.pt", "two.pt"))
    assert list(a["model"]) == list(b["model"]) and a["model"]["siren.first"].dtype == torch.float64
    assert apart(b["model"].values(), a["model"].values()) <= 1e-9 and same_epochs(a, b, 1e-4)
    checkpoint.save_checkpoint("two.pt", b | {"progress": {"global_batch": 16}})
    refused(["--resume", "--out", "two.pt"], "two.pt", "2 process")


# ---- train.py: a reader on fixed weights ---------------------------------------------------------

@folder()
def test_frozen_siren_and_new_reader():
    """WT-seq changes the INR, keeps the reader, trains on held-out images, needs wt.pt to resume or overwrites it."""
    trained(TINY, "--w-task 0 --seed 1 --out wt.pt --val 0.1")
    trained(TINY, "--init-from wt.pt --freeze-siren --augment --out seq.pt")
    (wt, _), (seq, args) = (load_checkpoint(p) for p in ("wt.pt", "seq.pt"))
    for name in ("siren", "inner_loop"):
        assert same(getattr(wt, name).state_dict(), getattr(seq, name).state_dict())
    assert not torch.equal(wt.reader.embed.weight, seq.reader.embed.weight) and args.val == 0.1
    refused([*TINY, "--init-from", "wt.pt", "--out", "wt.pt"], "overwrite")
    refused([*TINY, "--init-from", "wt.pt", "--steps", "3"], "--steps 3")
    Path("wt.pt").unlink()
    trained("--resume --out seq.pt")


@float64()
@folder()
def test_frozen_siren_fits_once_and_trains_the_same_reader():
    """Fits that never change are made again, or others only once; they train another reader than images do; or such a
    run, stopped and resumed, is not the same bit for bit."""
    fitted = []

    def fits(self, siren, coords, values):
        fitted.append(values.shape[1])
        return plain(self, siren, coords, values)

    with replaced(MetaSGD, "descend", fits) as plain:
        trained(TINY, "--freeze-siren")
        assert 200 <= sum(fitted) < 250  # 160 and 40 images, and some for the pictures
        for more in ("--fraction 0.5", "--augment"):  # no fit is the same twice
            fitted.clear()
            trained(TINY, "--freeze-siren --out drawn.pt", more)
            assert sum(fitted) >= 2 * 200
    got, args = load_checkpoint("out.pt")
    model, (images, test) = train.MWT(args, 1, 10), data.load_dataset(args)    # the same, image by image
    model.siren.requires_grad_(False), model.inner_loop.requires_grad_(False)
    args.out = None
    metrics = train.train(args, model, 160, partial(train.image_batches, args, model, images), model,
                          lambda poll: train.evaluate(model, test))
    assert apart(got.parameters(), model.parameters()) <= 1e-9
    assert same_epochs({"metrics": report()}, {"metrics": metrics}, 1e-6)
    with signal_at(13, signal.SIGTERM):
        assert command([*TINY, *"--freeze-siren --out stopped.pt".split()])[0] == 143
    trained("--resume --out stopped.pt")
    a, b = (read_checkpoint(name) for name in ("out.pt", "stopped.pt"))
    assert same(a["model"], b["model"]) and same_epochs(a, b, 0)


@folder()
def test_reader_learns_planted_classes():
    """It does not learn what is there, scales tokens to another size, writes a file, or is not a matter of the seed."""
    g = generator("planted")
    directions = torch.randn(3, 6, 5, generator=g)

    def planted(n):
        labels = torch.randint(3, (n,), generator=g)
        return 0.01 * (2 * directions[labels] + torch.randn(n, 6, 5, generator=g)), labels
    (tokens, labels), (others, other_labels) = planted(300), planted(200)
    args = settings.settings(dict(width=8, head_dim=4, reader_depth=1, epochs=6, batch_size=16, lr=2e-2))
    assert train.train_reader(tokens, labels, args, classes=12).head.out_features == 12
    reader = train.train_reader(tokens, labels, args)
    assert reader.beta.shape == (6, 5) and not list(Path().iterdir())
    assert (reader(others).argmax(1) == other_labels).double().mean() > 0.85
    assert abs(float((reader.token_scale * tokens).square().mean()) - 1) < 1e-5
    assert same(reader.state_dict(), train.train_reader(tokens, labels, args).state_dict())


# ---- measures.py: geometry -----------------------------------------------------------------------

def planted_classes(seed, n=90, d=3, classes=3, spread=1.0):
    """Rows of unit normal noise around class means drawn from N(0, spread^2)."""
    g = torch.Generator().manual_seed(seed)
    means, labels = spread * torch.randn(classes, d, generator=g), torch.randint(classes, (n,), generator=g)
    return means[labels] + torch.randn(n, d, generator=g), labels


def test_neighbors_against_brute_force():
    (x, labels), (y, queries), k = planted_classes(0), planted_classes(1, 40), 4
    for shift, block in ((0, 2 ** 24), (30, 900)):
        a, b = x + shift, y + shift
        between, among = ((z.double()[:, None] - a.double()).square().sum(2) for z in (b, a))
        expected, own = between.argsort(1)[:, :k], among.fill_diagonal_(math.inf).argsort(1)[:, :k]
        counts = [[labels[rows].tolist().count(c) for c in range(3)] for rows in expected]
        winners = torch.tensor([count.index(max(count)) for count in counts])  # the smallest label of a tied vote
        share = (labels[own] == labels[:, None]).double().mean(1)
        with replaced(measures, "BLOCK", block):
            assert torch.equal(measures.nearest(a, b, k), expected) and torch.equal(measures.nearest(a, k=k), own)
            assert torch.equal(measures.knn_predict(a, labels, b, k), winners)
            assert measures.knn_accuracy(a, labels, b, queries, k) == float((winners == queries).double().mean())
            assert abs(measures.neighbor_purity(a, labels, k) - float(share.mean())) < 1e-12


def test_silhouette_and_class_means_against_brute_force():
    (x, labels), (y, queries) = planted_classes(2), planted_classes(3, 40)
    X, L, scores = x.double().numpy(), labels.numpy(), []
    for i in range(len(X)):
        d = np.sqrt(((X - X[i]) ** 2).sum(1))
        a, b = d[(L == L[i]) & (np.arange(len(X)) != i)].mean(), min(d[L == c].mean() for c in set(L) - {L[i]})
        scores.append((b - a) / max(a, b))
    means = np.stack([X[L == c].mean(0) for c in range(3)])
    between = sum((L == c).sum() * ((means[c] - X.mean(0)) ** 2).sum() for c in range(3))
    predicted = 3 * ((y.double().numpy()[:, None] - means) ** 2).sum(2).argmin(1)
    for block in (2 ** 24, 900):
        with replaced(measures, "BLOCK", block):
            assert np.abs(measures.silhouettes(x, 3 * labels).numpy() - scores).max() < 1e-5    # labels 0, 3 and 6
            assert abs(measures.fisher_ratio(x, labels) - between / ((X - means[L]) ** 2).sum()) < 1e-10
            accuracy = measures.nearest_mean_accuracy(x, 3 * labels, y, 3 * queries)
            assert accuracy == np.mean(predicted == 3 * queries.numpy())
    assert measures.silhouettes(torch.arange(4.0)[:, None], torch.tensor([0, 0, 0, 5]))[3] == 0  # alone in its class
    for args in ((x * math.nan, labels), (x[:0], labels[:0]), (x, labels[:-1]), (x[0], labels)):
        assert all(rejects(measure, *args) for measure in (measures.purity, measures.silhouette, measures.fisher_ratio))
        assert all(rejects(measure, *args, y, queries) for measure in (measures.knn_accuracy, measures.linear_probe))


# ---- measures.py: trained classifiers --------------------------------------------------------------

def test_logistic_regression_is_at_its_optimum():
    g = torch.Generator().manual_seed(0)
    for n, d, penalty, falls in ((60, 5, 0.2, 0), (60, 5, 0.002, 0), (40, 60, 0.001, 0), (300, 90, 1e-4, 1)):
        x, labels = torch.randn(n, d, generator=g).double(), torch.randint(3, (n,), generator=g)
        x /= torch.arange(1.0, d + 1) ** falls
        layer = measures.fit_linear(x, labels, 3, penalty).requires_grad_()
        loss = F.cross_entropy(layer(x), labels) + penalty * d / 2 * layer.weight.square().sum()
        gradient = torch.autograd.grad(loss, [*layer.parameters()])
        assert all(part.abs().max() < 1e-3 for part in gradient), (n, d, penalty)
        again = measures.fit_linear(x, labels, 3, penalty, layer)              # starts there, and stays
        assert apart([*again.parameters()], [*layer.parameters()]) < 1e-2


def test_probes_standardise_and_fit_all_of_the_bank():
    (x, labels), (y, _) = planted_classes(1, 300, 8, 3, 0.7), planted_classes(2, 200, 8, 3, 0.7)
    mean, deviation = x.mean(0), x.std(0, correction=0)
    order = torch.zeros(300).index_fill(0, labels.argsort(stable=True)[4::5], 1).argsort(stable=True)
    stretch = torch.logspace(-3, 3, 8)  # features of all scales, far from 0
    for fit in (measures.fit_linear, measures.fit_mlp):
        logits = fit(((x - mean) / deviation)[order], labels[order], 3, 0.01)((y - mean) / deviation)
        sure = (logits.topk(2).values.diff() < -0.05).squeeze(1)
        for bank, asked in ((x, y), (x * stretch + 5, y * stretch + 5)):
            got, _ = measures.fit_probe(fit, [0.01], bank, labels, asked)
            assert torch.equal(got[sure], logits.argmax(1)[sure]) and sure.float().mean() > 0.8
    expected, _ = measures.fit_probe(measures.fit_linear, [0.01], x, labels, y)
    for bank, asked in ((x.repeat(1, 3), y.repeat(1, 3)), (F.pad(x, (0, 1), value=0.1), F.pad(y, (0, 1), value=5.0))):
        got, _ = measures.fit_probe(measures.fit_linear, [0.01], bank, labels, asked)
        assert (got == expected).float().mean() > 0.97                         # neither copies nor constants matter


def test_mlp_probe_sees_what_no_line_divides():
    x = torch.randn(1500, 3, generator=torch.Generator().manual_seed(0))
    labels = (x[:, 0] * x[:, 1] > 0).long()
    state = torch.random.get_rng_state()
    assert measures.mlp_probe(x[:1200], labels[:1200], x[1200:], labels[1200:]) > 0.85
    assert measures.linear_probe(x[:1200], labels[:1200], x[1200:], labels[1200:]) < 0.65
    assert torch.equal(state, torch.random.get_rng_state())


def test_probe_chooses_its_setting():
    tried = []

    def spy(x, labels, classes, penalty, start=None):
        layer = measures.fit_linear(x, labels, classes, penalty, start)
        tried.append((len(x), penalty, layer))
        return layer

    for spread, strongest, weakest in ((1.0, 1e-3, 0.0), (0.3, 0.02, 1e-3), (0.0, 0.2, 0.05)):
        x, labels = planted_classes(3, 400, 30, 4, spread)
        tried.clear()
        _, accuracy = measures.fit_probe(spy, measures.PENALTIES, x, labels, x)
        held = labels.argsort(stable=True)[4::5]
        z = ((x - x.mean(0)) / x.std(0, correction=0))[held]
        losses = {penalty: float(F.cross_entropy(layer(z), labels[held])) for _, penalty, layer in tried[:-1]}
        n, last, _ = tried.pop()
        assert n == 400 and {n for n, *_ in tried} == {320}
        assert last == min(losses, key=losses.get) and weakest <= last <= strongest, losses
        best = next(layer for _, penalty, layer in tried if penalty == last)
        assert accuracy == float((best(z).argmax(1) == labels[held]).double().mean())


# ---- measures.py: statistics ---------------------------------------------------------------------

def test_wilson_t_and_holm_by_table():
    low, high = measures.wilson(45, 50)  # roots of (p - x)^2 = z^2 x (1 - x) / n
    assert low < 0.9 < high and measures.wilson(0, 10)[0] == 0
    assert all(abs((0.9 - end) ** 2 - 1.959964 ** 2 * end * (1 - end) / 50) < 1e-12 for end in (low, high))
    table = {1: 12.7062047, 2: 4.3026527, 5: 2.5705818, 30: 2.0422725, 1000: 1.9623391}
    assert all(abs(measures.t_quantile(freedom) - t) < 1e-6 for freedom, t in table.items())
    assert abs(measures.t_test([0.0, 1.0, 2.0]) - 0.2254033) < 1e-6    # t = sqrt(3): 1 - sqrt(3 / 5)
    assert measures.t_test([1.0, 1.0]) == 0 and measures.t_test([0.0, 0.0]) == 1
    assert np.allclose(measures.holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    assert np.allclose(measures.t_interval([1.0, 2.0, 3.0]), (2, 2 - 4.3026527 / 3 ** 0.5, 2 + 4.3026527 / 3 ** 0.5))


def test_bootstrap_covers_and_knows_ties():
    a, g, covered = torch.rand(100).round(), torch.Generator().manual_seed(0), 0
    assert measures.paired_bootstrap(a, a) == (0, 0, 0)
    for repeat in range(200):  # a ratio of means, truth 2
        x = 1 + torch.rand(100, generator=g)
        values = torch.stack([2 * x + torch.randn(100, generator=g), x], 1)
        _, low, high = measures.bootstrap(values, lambda means: means[..., 0] / means[..., 1], repeat, draws=400)
        covered += low <= 2 <= high
    assert 0.9 < covered / 200 < 0.99
    spread = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(50, 4)  # all variance is between the repeats
    value, low, high = measures.bootstrap(spread, measures.over_repeats())
    assert value == 1.5 and low < 0.8 and high > 2.2


def test_spearman():
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(12, generator=g).tolist(), torch.randn(12, generator=g).tolist()
    value, low, high = measures.spearman(x, y, range(12), draws=300)
    d = np.argsort(np.argsort(x)) - np.argsort(np.argsort(y))
    assert abs(value - (1 - 6 * (d ** 2).sum() / (12 ** 3 - 12))) < 1e-9 and low < value < high
    tied = measures.spearman([3, 1, 3, 2, 0], [0, 1, 2, 3, 4], range(5), draws=50)[0]
    assert abs(tied - np.corrcoef([4.5, 2, 4.5, 3, 1], range(5))[0, 1]) < 1e-9
    assert measures.spearman(range(4), range(4), range(4)) is measures.spearman([1] * 6, range(6), range(6)) is None
    (_, *seeds), (_, *single) = (measures.spearman(x * 9, y * 9, groups, draws=200)
                                 for groups in ([*range(12)] * 9, range(108)))
    assert seeds[1] - seeds[0] > 2 * (single[1] - single[0])                   # nine seeds are no nine settings
    assert measures.spearman(x, y, [i % 4 for i in range(12)], draws=50)[1:] == (None, None)


def test_crossed_does_not_flatter():
    noise = torch.rand(400, 60, generator=torch.Generator().manual_seed(2))
    picked, _ = measures.crossed(noise)
    assert abs(float(picked.mean()) - 0.5) < 0.015 and float(noise.mean(0).max()) > 0.525
    repeats = (noise + F.one_hot(torch.tensor(7), 60))[..., None].repeat(1, 1, 2)
    repeats[:5] = math.nan  # not measured
    picked, choices = measures.crossed(repeats)
    assert picked.shape == (400, 2) and choices == [7, 7] and picked[:5].isnan().all() and picked[5:].min() >= 1


def test_principal_and_regression():
    g = torch.Generator().manual_seed(3)
    for shape in ((30, 50), (50, 30)):
        x = torch.randn(*shape, generator=g).double()
        mean, V, variances = measures.principal(x)
        assert (V.T @ V - torch.eye(V.shape[1])).abs().max() < 1e-9
        assert (mean + (x - mean) @ V @ V.T - x).abs().max() < 1e-9
        assert torch.allclose(variances, torch.linalg.svdvals(x - mean)[:V.shape[1]] ** 2 / shape[0])
    assert abs(measures.effective_rank(torch.tensor([2.0, 2.0, 0.0])) - 2) < 1e-6
    x, noise = torch.randn(1000, 4, generator=g), torch.randn(1000, 3, generator=g)
    y = torch.stack([x[:, 0] + 3, x[:, 1] + noise[:, 1], noise[:, 2], torch.ones(1000)], 1)  # R^2 1, 1/2, 0; none
    r2 = measures.regression(x[:600], y[:600], x[600:], y[600:])
    assert r2[0] > 1 - 1e-9 and r2[3].isnan() and abs(r2[1] - 0.5) < 0.1 and abs(r2[2]) < 0.05


# ---- bench.py: outer gradients -------------------------------------------------------------------

def textbook_grads(coords, values, labels, **tiny) -> dict:
    """Of a new model, by autograd through autograd in two backward passes."""
    model = tiny_model(textbook_loss_and_grad, **tiny)
    bench.textbook_backward(model, coords, values, labels)
    return grads(model)


@float64()
def test_outer_gradients_against_the_textbook():
    """One first-order pass does not give theta, alpha or the reader their gradients, at a weight of the class loss."""
    images, labels = batch()
    for w_task in (0.0, 0.01, 1.0):
        for fraction in (1.0, 0.5):
            fast = tiny_model(w_task=w_task, fraction=fraction)
            seen = fast.look(images, 4, generator("pixels"))
            fast(*seen, labels)[:2].sum().backward()
            for name, expected in textbook_grads(*seen, labels, w_task=w_task, fraction=fraction).items():
                assert all(g.abs().max() > 0 for g in expected), name
                assert apart(grads(fast)[name], expected) <= 1e-8, (name, w_task, fraction)


def test_faster_ways_against_the_textbook():
    """A step compiled (without building kernels), by torch.func, with inner steps recomputed, or with the reader in
    bfloat16 gives other gradients."""
    compiled = partial(torch.compile, fullgraph=True, backend="aot_eager")
    tiny = dict(depth=1, steps=2, reader_depth=1)
    images, labels = batch(n=16)
    for way, limit in {"torch.func": 1e-4, "recomputed": 1e-5, "bf16": 3e-2, "compiled": 1e-4}.items():
        inner, precision = functional_loss_and_grad if way == "torch.func" else None, ("float32", "bf16")[way == "bf16"]
        model = tiny_model(inner, **tiny, precision=precision)
        model.inner_loop.recompute = way == "recomputed"
        seen = model.look(images, 3)
        (compiled(model) if way == "compiled" else model)(*seen, labels)[:2].sum().backward()
        expected = textbook_grads(*seen, labels, **tiny)
        gaps = {name: apart(grads(model)[name], expected[name]) for name in expected}
        assert (1e-5 if way == "bf16" else 0) <= max(gaps.values()) <= limit, (way, gaps)


# ---- bench.py: the command -----------------------------------------------------------------------

SMALL = dict(width=8, head_dim=4, depth=1, reader_depth=1, steps=2, batch_size=4)


def quick_times():
    """At most two calls of what is timed."""
    plain = bench.timed
    return replaced(bench, "timed", lambda action, count, device: plain(action, min(count, 2), device))


def flops_by_hand(model, batch: int) -> int:
    """Of a plain model: an inner step's forward products and the gradients of inputs and weights; a product takes two
    more in the backward pass, or one where an input is data; the first forward once where all see the same pixels."""
    depth, width, _ = model.siren.hidden.shape
    n, k, reader = model.points, model.inner_loop.steps, model.reader
    head, tokens = model.siren.head.out_features * width, depth * width
    forward = 2 * n * (2 * 2 * width + 3 * (depth * width ** 2 + head))
    gradient = 2 * n * (2 * 2 * width + 3 * (2 * depth * width ** 2 + head))
    inner = (forward if model.fraction == 1 else batch * forward) + batch * (k * gradient + k * forward)
    blocks = len(reader.blocks) // 2
    matrices = width * (width + 1) + blocks * (4 + 2 * reader.blocks[1].up.out_features // width) * width ** 2
    read = 2 * tokens * matrices + blocks * 4 * tokens ** 2 * width + 2 * width * reader.head.out_features
    return inner + batch * 3 * read


def test_counted_flops_by_hand_and_of_a_real_step():
    """They are not those of the formula, or those of a step that is really made, or a lane's parts cost nothing."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    images, labels = batch()
    plain, counts = ({}, {"fraction": 0.5, "depth": 1, "steps": 1, "mlp_ratio": 2}), []
    for changed in (*plain, {"branch": "colour", "readout": 3, "w_cluster": 1.0, "precision": "bf16"}):
        args, model = tiny_settings(batch_size=5, **changed), tiny_model(**changed)
        counts.append(bench.step_flops(args, 3, 4))
        assert changed not in plain or counts[-1] == flops_by_hand(model, 5), changed
    model.bf16 = False
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*model.look(images, 4), labels)[:3].sum().backward()
    assert counter.get_total_flops() == counts[-1] > counts[0]


@folder()
def test_bench_command():
    """B is not the textbook's two passes or C not by torch.func; a ratio is not of one turn's medians; `cost` does not
    grow what it says; hours are not of 1,281,167 images."""
    small, used, paths = [*settings.as_flags(SMALL), "--dataset", "digits", "--no-compile"], set(), []

    def here(function, args, path, parts):
        paths.append(path)
        return function(args, path, parts)

    def noted(owner, name):
        def call(*args, **more):
            used.add(f"{paths[-1]} {owner.__name__}")
            return plain(*args, **more)
        plain = getattr(owner, name)
        return replaced(owner, name, call)

    with replaced(bench, "in_a_process", here), quick_times(), noted(bench, "textbook_backward"), \
            noted(torch.autograd, "grad"), noted(torch.func, "grad"):
        status, out, err = command(small, bench.main)
    assert status == 0 and "ratio B/A" in out and max(map(len, out.splitlines())) <= 100, (out, err)
    assert paths == [*"ABCABC"] and used == {"B bench", "B torch.autograd", "C torch.autograd", "C torch.func"}
    runs, ratio = report("bench")["paths"], report("bench")["ratios"]["B/A"]
    assert np.allclose(ratio, [np.median(runs[b]["ms"]) / np.median(runs[b - 1]["ms"]) for b in (1, 4)])
    first = {key: value for key, value in runs[0].items() if key not in ("what", "value", "path")}

    def planted(function, args, *_):
        return first | {"flops": args.width * args.size * args.steps * args.batch_size}

    with replaced(bench, "in_a_process", planted):
        assert command(["cost", *small, "--out", "cost.json"], bench.main)[0] == 0
    rows = {(r["what"], r["value"]): r["flops"] for r in report("cost")["cost"]}
    knobs = {"--batch-size": 4, "--size": 8, "--width": 8, "--steps": 2}
    assert rows == {(name, f * value // 2): 512 * f // 2 for name, value in knobs.items() for f in (1, 2, 3, 4)}
    assert Path("cost.png").exists()
    with replaced(bench, "in_a_process", None):  # before anything is measured
        for argv in ("--out no/a.json", "--freeze-siren", "speed", "cost --width 99", "--device tpu9"):
            refused(argv.split(), argv.split()[-1], main=bench.main)
    argv = [*settings.as_flags(SMALL), "--size=64", "--fraction=0.001", "--no-compile"]     # in a process of its own
    assert command(["imagenet", *argv], bench.main)[0] == 0
    found = report("bench")
    assert np.isclose(found["hours"]["8"] * 3600 * 8 * found["imagenet"][0]["images_per_second"], 40 * 1_281_167)


# ---- diagnostics.py: planted truths ----------------------------------------------------------------------------------

def fitted(seed=0, n=60) -> Fitted:
    g = torch.Generator().manual_seed(seed)
    images, labels = torch.rand(n, 3, 2, 2, generator=g) * 2 - 1, torch.randint(3, (n,), generator=g)
    return Fitted(images, labels, torch.randn(n, 4, 5, generator=g))


def test_coordinate_systems_by_hand():
    bank, queries = fitted(0), fitted(1, n=30)
    bank.tokens[:, 1, 2] = queries.tokens[:, 1, 2] = 3.7                       # a weight that never changes
    reader = Reader(4, 8, 3, features=5, depth=1, head_dim=4, token_scale=7.0).requires_grad_(False)
    reader.beta.copy_(torch.arange(20).view(4, 5) / 10)
    model = types.SimpleNamespace(reader=reader, parts=lambda: {"bias column": torch.eye(5)[:, 4:]})
    model.coordinates = lambda images, tokens: {"late": tokens[:, 2:].flatten(1)}
    t, mean, deviation = queries.tokens, bank.tokens.mean(0), bank.tokens.std(0, correction=0)
    deviation[1, 2] = math.inf
    expected = {"pixels": queries.images, "phi - theta": t, "late": t[:, 2:], "bias column": t[..., 4],
                "standardised per weight": (t - mean) / deviation, "cosine of phi - theta": t,
                "after the reader's input map": 7 * (t + reader.beta) @ reader.embed.weight.T + reader.embed.bias}
    found = {name: x for name, *x in diagnostics.coordinate_systems(model, bank, queries)}
    assert set(found) == set(expected)
    for name, x in expected.items():
        x = x.flatten(1) / (x.flatten(1).norm(dim=1, keepdim=True) if "cosine" in name else 1)
        assert apart([found[name][1]], [x]) < 1e-5 and found[name][0].shape == (60, x.shape[1]), name
    bare = types.SimpleNamespace(reader=None, parts=dict)                      # has nothing but tokens
    names = [name for name, *_ in diagnostics.coordinate_systems(bare, bank, queries)]
    assert names == ["pixels", "phi - theta", "standardised per weight", "cosine of phi - theta"]


def tiny_mwt(**more) -> train.MWT:
    flags = dict(width=6, depth=2, head_dim=3, steps=2, reader_depth=1, size=5) | more
    return train.MWT(settings.settings(flags), 3, 4).eval().requires_grad_(False)


def test_nothing_depends_on_blocks():
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (50, 3, 5, 5), generator=g, dtype=torch.uint8)
    images, model = data.Images(list("abc"), torch.arange(50) % 3, pixels), tiny_mwt(fraction=0.5)
    for block in (7, 50, 256):
        with replaced(diagnostics, "BLOCK", block):
            found = diagnostics.fit_all(model.fit, images, "cpu")
        assert torch.equal(found.labels, images.labels) and torch.equal(found.images, images.signal(pixels))
        assert apart([found.tokens], [model.fit(images.signal(pixels))]) < 1e-6
    x, y = fitted(0, n=90), fitted(1, n=40)
    f = lambda tokens: tokens[:, :2].sin()
    trace = lambda tokens: (tokens.sum(1), [("input map", f(tokens))])
    with replaced(diagnostics, "BLOCK", 16):
        logits, pooled, whole = diagnostics.walk(trace, y.tokens, ["input map"])
    assert torch.equal(logits, y.tokens.sum(1)) and torch.equal(whole["input map"], f(y.tokens).flatten(1))
    assert apart([pooled["input tokens"], pooled["input map"]], [y.tokens.mean(1), f(y.tokens).mean(1)]) < 1e-6
    unseen = diagnostics.unseen_bank(x.tokens.mean(1), x.labels, y.tokens.mean(1), y.labels)
    known = torch.isin(torch.arange(40), diagnostics.sample(y.labels, 20))     # one half of the queries asks the other
    means, labels = y.tokens.mean(1), y.labels
    expected = measures.knn_accuracy(means[known], labels[known], means[~known], labels[~known])
    assert unseen["unseen_knn10"] == expected != unseen["seen_knn10"]


def verdict_of(lines, claim) -> str:
    """Of a claim's sentence the verdict alone."""
    return next(line.split(": ", 1)[1] for line in lines if line.startswith(claim)).split(".")[0]


def verdicts(name: str, result: dict) -> dict[str, str]:
    """Of a report with this experiment alone."""
    lines = claims.sentences(claims.evidence({"reader": result["reader"], "experiments": {name: result}}))
    return {line.split(",")[0]: verdict_of([line], "C") for line in lines}


def clustering_of(kind, read_right, n=600):
    """Weights that hold the class as "clusters"; "linear", in directions of small variance, so that geometry is blind
    to it; as "parity" of six signs, which nothing simple finds; or not at all. A reader that is right so often beyond
    chance."""
    g = torch.Generator().manual_seed(0)
    labels, x = torch.randint(4, (2 * n,), generator=g), torch.randn(2 * n, 24, generator=g)
    if kind == "clusters":
        x = x + 4 * F.one_hot(labels, 24)
    elif kind == "linear":
        x = torch.cat([10 * x, F.one_hot(labels, 4) + 0.4 * torch.randn(2 * n, 4, generator=g)], 1)
    elif kind == "parity":
        labels = (x[:, :6] > 0).sum(1) % 2 + 2 * ((x[:, 6:12] > 0).sum(1) % 2)
    guesses = torch.where(torch.rand(n, generator=g) < read_right, labels[n:], torch.randint(4, (n,), generator=g))
    systems = [("pixels", 0 * x[:n], 0 * x[n:]), ("phi - theta", x[:n], x[n:])]
    return diagnostics.clustering(systems, labels[:n], labels[n:], guesses)


def test_clustering_on_planted_truths():
    parity, linear, clusters = (clustering_of(kind, 0.7) for kind in ("parity", "linear", "clusters"))
    for result, geometry, classifier in ((parity, "supported", "supported"), (linear, "supported", "refuted"),
                                         (clusters, "no verdict: ceiling", "no verdict: ceiling"),
                                         (clustering_of("none", 0), "no verdict: floor", "no verdict: floor")):
        found = verdicts("clustering", result)
        assert found["C1a"].startswith(geometry) and found["C1b"].startswith(classifier), found
    assert linear["G"]["accuracy"] < 0.4 < 0.85 < linear["L"]["accuracy"] < 0.96
    assert linear["G"]["pixels"] < 0.4 and linear["L"]["over_pixels"][1] > 0.4
    assert all(clusters["rows"][1][key] > 0.95 for key in ("knn1", "knn10", "nearest_mean", "linear", "mlp"))
    assert abs(parity["purity"] - 0.25) < 0.1 and abs(parity["chance"] - 0.25) < 0.05
    assert all(abs(each["rows"][1]["knn10_shuffled"] - 0.25) < 0.08 for each in (parity, linear, clusters))


def test_opponents_are_chosen_on_other_images():
    """G: the best of many equal ones is no better than one of them. L: by the held-out fifth of the bank alone."""
    g, right = torch.Generator().manual_seed(0), torch.ones(500)
    hits = {(f"place {i}", how): torch.rand(500, generator=g).round() for i in range(30)
            for how in ("knn1", "knn10", "linear", "mlp")}
    hits |= {("pixels", how): torch.zeros(500) for how in ("knn1", "linear")}
    hits["after the reader's input map", "knn1"] = right                       # no geometry of the weights
    held = {key: 0.5 for key in hits if key[1] in ("linear", "mlp")} | {("place 7", "mlp"): 0.6}
    found = diagnostics.opponents(right, hits, held, 0)
    assert abs(found["G"]["accuracy"] - 0.5) < 0.06 < max(float(x.mean()) for x in hits.values()) - 0.44
    assert found["L"]["best"] == ["mlp probe on place 7"] and found["L"]["pixels"] == 0
    assert found["L"]["accuracy"] == float(hits["place 7", "mlp"].mean())


def token_flow_of(kind, n=400, null=True, blocks=2, **more):
    """Two tokens u, v of 30 features. "input": a class vector in each; otherwise the class is the signs of u_0 v_0 and
    u_1 v_1, which only something that compares tokens can see; "random": nothing. The planted reader adds a class
    vector in its "second" block or in its "first"; of "views" its first block adds it to u and takes it from v."""
    g = torch.Generator().manual_seed(0)
    tokens, labels = torch.randn(2 * n, 2, 30, generator=g), torch.randint(4, (2 * n,), generator=g)
    signs = lambda x: ((x[:, 0, :2] * x[:, 1, :2] > 0) * torch.tensor([1, 2])).sum(1)
    if kind in ("first", "second", "views"):
        labels = signs(tokens)
    elif kind == "input":
        tokens = tokens + 6 * F.one_hot(labels, 30)[:, None]

    def trace(x, trained=True):
        guess = x.mean(1)[:, :4].argmax(1) if kind == "input" else signs(x)
        found = 20 * F.one_hot(guess, 30)[:, None] * trained
        apart_ = torch.cat([found, -found], 1)
        first = x + found * (kind == "first") + apart_ * (kind == "views")
        names = [f"block {b}" for b in range(1, blocks + 1)]
        states = [first] * (blocks - 1) + [x + found]
        return F.one_hot(guess, 4).float(), [("input map", x), *zip(names, states)]
    bank, queries = (Fitted(labels, labels, tokens).take(rows) for rows in torch.arange(2 * n).chunk(2))
    untrained = [lambda x: trace(x, False)] * 2 if null else []
    return diagnostics.token_flow(trace, untrained, bank, queries, probes=False, **more)


def test_token_flow_on_planted_truths():
    late, early, nothing = (token_flow_of(kind) for kind in ("second", "input", "random"))
    start, end = late["rows"][0], late["rows"][-1]
    assert start["pooled_knn10"] < 0.4 and start["stage"] == "input tokens" and "flattened_knn10" not in start
    assert min(end[key] for key in ("pooled_knn10", "flattened_knn10", "unseen_knn10", "purity")) > 0.99
    assert late["ends"] == ["input map", "block 1", "block 1", "block 2"] and late["blocks"] == 2
    gain = [row["pooled_knn10"] - row["untrained_pooled_knn10"] for row in late["rows"]]
    view = late["rises"]["pooled"]
    assert abs(view["rise"][0] - (gain[3] - gain[1])) < 1e-9
    assert abs(view["late_less_early"][0] - (gain[3] - gain[2] - (gain[2] - gain[1]))) < 1e-9
    verdict = lambda found: verdicts("token-flow", found)["C2a"]
    assert early["rows"][0]["pooled_knn10"] > 0.99 and abs(nothing["rows"][-1]["pooled_knn10"] - 0.25) < 0.1
    assert [verdict(each) for each in (late, early, nothing)] == ["supported", "not decided here", "not decided here"]
    assert verdict(token_flow_of("first")) == "refuted" and verdict(token_flow_of("views")) == "depends on the view"
    assert verdict(token_flow_of("second", blocks=1)).startswith("no verdict: fewer than two blocks")
    assert token_flow_of("second", blocks=5)["ends"] == ["input map", "block 2", "block 3", "block 5"]
    head = torch.nn.Linear(30, 4, bias=False).requires_grad_(False)
    head.weight.copy_(torch.eye(4, 30))
    reader = types.SimpleNamespace(head=head, blocks=[None] * 2)               # two sub-blocks: states "input map" and
    alone = token_flow_of("second", null=False, reader=reader, flattened=False)        # "block 2" end a whole block
    assert alone["ends"][-1] == "block 2" and alone["blocks"] == 1 and "rises" not in alone
    assert verdict(alone) == "no verdict"
    assert alone["rows"][-1]["logit_lens"] > 0.99 > 0.4 > alone["rows"][1]["logit_lens"]
    assert "flattened_knn10" not in alone["rows"][-1]


def test_knock_outs_by_hand():
    torch.manual_seed(0)
    reader = Reader(6, 8, 4, depth=2, head_dim=4).requires_grad_(False)
    for name, p in reader.named_parameters():
        torch.nn.init.normal_(p, std=0.0 if name in ("beta", "head.bias") else 0.6)
    tokens, known = torch.randn(200, 6, 9) / 100, torch.randn(70, 6, 9) / 100
    labels, blocks = reader(tokens).argmax(1), reader.blocks
    with replaced(diagnostics, "BLOCK", 64):
        found = diagnostics.knock_outs(reader, tokens, labels, known)
    rows = {(row["replaced"], row["block"]): row["loss"][0] for row in found}
    assert len(rows) == len(found) == 4 and max(rows.values()) > 0.1
    states = [x for _, x in reader.trace(known)[1]]
    mean = [block(x).mean(0) for block, x in zip(blocks, states)]
    for (name, first), loss in rows.items():
        x = reader.input_map(tokens)
        for b, block in enumerate(blocks):
            knocked = (b in (0, 2) if name == "attention" else b in (1, 3)) and b // 2 + 1 >= first
            x = x + (mean[b] if knocked else block(x))
        assert abs(loss - float((reader.head(x.mean(1)).argmax(1) != labels).double().mean())) < 1e-9, (name, first)


# ---- routes.py: planted truths ---------------------------------------------------------------------------------------

def test_donors():
    labels, rows = torch.randint(4, (90,), generator=torch.Generator().manual_seed(0)), torch.arange(90)
    labels[0] = 9                  # alone in its class
    order, same, other = (routes.donors(labels, kind, 0) for kind in ("any", "same", "other"))
    assert (order != rows).all() and all(torch.equal(x.sort().values, rows) for x in (order, same))
    assert (labels[same] == labels).all() and (same[1:] != rows[1:]).all() and (labels[other] != labels).all()
    again, another = (routes.donors(labels, "other", key) for key in (0, 1))
    assert torch.equal(other, again) and not torch.equal(other, another)
    assert torch.equal(routes.donors(0 * labels, "other", 0), rows)       # no other class: its own


def bias_route_of(where, n=600, tokens=12, width=24):
    """Tokens whose class is planted, and a reader that reads it there: "bias"; "share" (in the bias column and the
    others alike, as far as their size goes); "less" (in all but the bias column); "rival" (in the bias column, and in
    the same pattern along one direction of the other columns); "joint" (the sign of a product of two bias entries);
    "nowhere" (not at all). Beside it all columns but the bias column hold components that tell nothing."""
    g = torch.Generator().manual_seed(0)
    labels, eye = torch.randint(4, (2 * n,), generator=g), torch.eye(width + 1)
    x = 0.2 * torch.randn(2 * n, tokens, width + 1, generator=g)
    strength = torch.linspace(2.4, 0, 60)
    if where == "rival":                               # none of them as large as the rival
        strength = torch.cat([torch.full((8,), 4.0), torch.full((52,), 0.2)])
    patterns = torch.linalg.qr(torch.randn(tokens * width, 60, generator=g)).Q.T
    x[..., :-1] += (torch.randn(2 * n, 60, generator=g) * strength @ patterns).view(-1, tokens, width)
    x[..., :-1] *= torch.linspace(0.5, 1.5, width)
    x[..., -1] *= 1 if where in ("bias", "rival") else 5
    if where == "joint":
        labels = (x[:, 0, -1] * x[:, 1, -1] > 0).long()
        read = lambda t: (t[:, 0, -1] * t[:, 1, -1])[:, None] * torch.tensor([-1, 1])
    else:
        told = torch.randn(4, tokens, width + 1, generator=g)
        told[..., :-1] *= {"share": 0.06, "less": 0.06, "nowhere": 0.3}.get(where, 0)
        told[..., -1] = 3 * torch.linalg.qr(told[..., -1].T).Q.T           # four patterns of one length
        told[..., -1] *= {"share": 0.115, "less": 0, "nowhere": 0.3}.get(where, 1)
        if where == "rival":
            told[..., :-1] = 1.02 * told[..., -1:] * F.normalize(torch.randn(width, generator=g), dim=0)
        x = x + told[labels] * (where != "nowhere")
        read = lambda t: torch.einsum("ntf,ctf->nc", t, told) - (told ** 2).sum((1, 2)) / 2
    parts = {"bias column": eye[:, -1:], "first": eye[:, :1]}
    result = routes.bias_route(read, x[n:], labels[n:], x[:n], parts, repeats=3, embed=eye)
    loss = {row["name"]: row["loss"][0] for row in result["rows"]}
    return result, loss, verdicts("bias-route", result)["C3"]


def test_bias_route_on_planted_truths():
    bias, loss, verdict = bias_route_of("bias")
    assert bias["reader"] > 0.95 and verdict == "supported" and bias["above_sets"] == 1
    assert min(loss[key] for key in ("another image's", "its train mean", "an image's of another class")) > 0.5
    assert abs(loss["only the bias column"]) < 0.02 and abs(loss["another image's of the same class"]) < 0.02
    assert all(abs(row["loss"][0]) < 0.02 for row in bias["rows"] if row["group"] in ("control", "route"))
    assert bias["controls"]["random columns"]["number"] == 15 and bias["single_columns"]["largest"][0] < 0.02
    ranks = {row["rank"]: row for row in bias["rows"] if row["group"] == "rank"}
    assert ranks[1]["loss"][0] > 0.2 and abs(ranks[4]["loss"][0]) < 0.03 and list(ranks) == [1, 2, 4, 8]
    assert 0 < ranks[1]["energy"] < ranks[4]["energy"] < ranks[8]["energy"] < 1
    for where, sign in (("share", 0), ("less", -1)):
        result, loss, verdict = bias_route_of(where)
        margin = result["controls"]["random columns"]["margin"]
        assert 0.6 < result["reader"] < 0.9 and verdict != "supported", (where, verdict)
        assert claims.side(margin, 0) == sign, (where, margin)
    assert verdict == "refuted" and loss["another image's"] == 0 < loss["random columns"]
    rival, loss, verdict = bias_route_of("rival")      # random columns cost less, but as low a rank costs as much
    margins = {name: each["margin"] for name, each in rival["controls"].items()}
    assert verdict != "supported" and loss["another image's"] > 0.2, verdict
    assert margins["random columns"][1] > 0.2 and abs(margins["principal components"][0]) < 0.05
    joint, loss, verdict = bias_route_of("joint")      # all of it is in how two entries go together
    assert joint["reader"] == 1 and verdict == "supported"
    assert loss["each entry another image's"] > 0.4 and loss["another image's of the same class"] == 0
    nothing, _, verdict = bias_route_of("nowhere")
    assert abs(nothing["reader"] - 0.25) < 0.08 and verdict.startswith("no verdict: floor")


def test_controls_have_the_size_of_the_bias_column():
    """Measured on exchanged tokens after the map, not by the covariances that found them."""
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(400, 5, 13, generator=g) * torch.linspace(0.5, 2, 13), torch.randn(12, 13, generator=g)
    bias, others = torch.eye(13)[:, -1:], torch.arange(12)
    order = torch.randperm(400, generator=g)

    def size(part):                                    # x may be correlated: over all pairs, not one permutation
        moved = part(x - x.mean(0)) @ W.T
        return 2 * float(moved.square().sum() / len(x))

    M, eye = routes.exchange_sizes(x, W), torch.eye(13)
    of_bias = size(routes.columns(bias))
    assert abs(2 * float(M[-1, -1]) / of_bias - 1) < 1e-4
    moved = routes.exchanged(routes.columns(bias), x, order)(x, torch.arange(400)) - x
    assert abs(float((moved @ W.T).square().sum() / len(x)) / of_bias - 1) < 0.2
    sets = routes.matched_sets(M, of_bias / 2, others, 20)
    assert len(set(sets)) == len(sets) == 20 and all(12 not in s for s in sets)
    for s in sets:
        assert abs(size(routes.columns(eye[:, list(s)])) / of_bias - 1) < 0.101, s
    large = routes.matched_sets(M, float(M[8:12, 8:12].sum()), others, 10)         # no three columns are that large
    assert len(large) == 10 and all(len(s) > 3 for s in large)
    for s in large:
        assert abs(float(M[list(s)][:, list(s)].sum()) / float(M[8:12, 8:12].sum()) - 1) < 0.1
    assert routes.matched_sets(M, 1e9, others, 10) == [] == routes.matched_sets(M, 1e-9, others, 10)
    found, ratio = routes.matched_components(x, bias, 2, of_bias / 8, W)
    assert 1 <= len(found) <= 5 and abs(ratio - 1) < 0.1
    for P in found:
        assert P.shape == (65, 2) and P.view(5, 13, 2)[:, -1].abs().max() < 1e-5
        assert abs(size(routes.components(P)) / (of_bias / 4) - 1) < 0.101
    _, larger = routes.matched_components(x, bias, 59, of_bias / 8, W)         # of so many none is that small
    assert larger > 1.1 and routes.matched_components(x, bias, 2, 1e9, W) == ([], None)
    named = routes.other_routes(x, {"bias column": bias, "two": eye[:, 2:4]})
    assert named["strongest column"].argmax() == 11 and torch.equal(named["two"], eye[:, 2:4])
    energy = lambda U: float(((x - x.mean(0)) @ U).square().sum())
    assert named["leading direction"][-1] == 0
    assert energy(named["leading direction"]) >= max(energy(eye[:, j:j + 1]) for j in range(12)) * (1 - 1e-6)


def test_margin_interval_covers():
    """Over images and sets: of simulated repeats about 95% hold the planted margin."""
    g, held = torch.Generator().manual_seed(0), 0
    for repeat in range(200):
        images, sets = 0.3 * torch.randn(150, 1, generator=g), 0.1 * torch.randn(20, generator=g)
        losses = 0.2 + images + sets + 0.5 * torch.randn(150, 20, generator=g)
        _, low, high = measures.bootstrap(losses, measures.over_repeats(repeat), repeat, draws=400)
        held += low < 0.2 < high
    assert 0.9 <= held / 200 <= 0.99, held


def test_content_on_planted_truths():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (500,), generator=g)
    images = 0.25 * torch.randn(500, 3, 6, 6, generator=g) + 0.6 * (F.one_hot(labels, 3) - 0.5)[:, :, None, None]
    for column, name in ((-1, "bias column"), (2, "strongest column")):
        def fit(x):                # pixels, which the class is not in once the mean is out; and the mean, in one column
            tokens = x.flatten(2)[:, :, :9] - x.mean((2, 3))[:, :, None]
            tokens[:, :, column] = x.mean((2, 3))
            return tokens

        read = lambda t: t[:, :, column]
        known, test = (Fitted(images, labels, fit(images)).take(rows) for rows in torch.arange(500).chunk(2))
        bias = {"bias column": torch.eye(9)[:, -1:]}
        parts = bias | routes.other_routes(known.tokens, bias)
        result = routes.content(read, fit, test, test, known, parts)
        other, same = result["mediation"]
        part, expected = other["parts"], float(column == -1)
        assert other["total"][0] > 0.5 and abs(same["total"][0]) < 0.05 and 0 < other["outside"] < 0.2
        assert same["parts"]["bias column"]["share"] is None
        assert abs(part["bias column"]["share"][0] - expected) < 0.05
        assert abs(part["bias column"]["share_restored"][0] - expected) < 0.05
        assert abs(part["strongest column"]["share"][0] - (1 - expected)) < 0.05
        r2 = result["told"][name]
        assert all(r2[f"mean {c}"] > 0.999 for c in ("red", "green", "blue")) and r2["contrast"] < 0.5
    with replaced(routes, "donors", lambda labels, *key: torch.arange(len(labels))):       # each its own: no effect
        assert routes.mediation(read, fit, test, parts, "other")["total"] == (0, 0, 0)
    for size in (1, 2, 3):                             # what small images have no part for is left out
        assert all(torch.isfinite(v).all() for v in routes.image_facts(torch.randn(5, 3, size, size)).values())


# ---- pixels.py -------------------------------------------------------------------------------------------------------

def test_patches_by_hand():
    """Patches are other squares, lose a pixel, or are not as near to the weights' number as they could be; their reader
    is not the weights' own, or costs something else."""
    for (tokens, size, channels), expected in (((192, 16, 3), (2, 1)), ((128, 8, 1), (1, 1)), ((128, 28, 1), (2, 1)),
                                               ((512, 32, 3), (2, 1)), ((64, 16, 3), (2, 3))):
        assert pixels.choose_patch(tokens, size, channels) == expected
    for channels, depth, count, together in ((3, 3, 192, 1), (3, 1, 64, 3), (1, 1, 64, 1)):
        args = settings.settings(dict(dataset="cifar10", size=16, width=64, depth=depth, reader_depth=1))
        model, images = pixels.Pixels(args, channels, 10), torch.rand(5, channels, 16, 16)
        tokens = model.fit(images)
        assert tokens.shape == (5, count, 65) and not tokens[..., 4 * together:].any()
        assert all(a.shape == b.shape for a, b in zip(train.MWT(args, 3, 10).reader.parameters(), model.parameters()))
        for t in range(count):
            plane, row, column = t // 64 * together, 2 * (t % 64 // 8), 2 * (t % 8)
            square = images[:, plane:plane + together, row:row + 2, column:column + 2]
            assert torch.equal(tokens[:, t, :4 * together], square.flatten(1))
        multiply_adds = count * 64 * (65 + 6 * 64) + 2 * count ** 2 * 64 + 64 * 10
        assert pixels.count_flops(model.reader, tokens[:1]) == 3 * 2 * multiply_adds


def test_offsets_start_at_random():
    """They do not have the size asked for, or are no matter of the seed, or change other parameters."""
    tokens, labels = 5 * torch.randn(40, 30, 20), torch.arange(40) % 2
    args = settings.settings(dict(width=8, head_dim=4, reader_depth=1, epochs=1, lr=1e-12))
    plain, spread, again = (train.train_reader(tokens, labels, args, spread) for spread in (0.0, 2.0, 2.0))
    assert abs(float(spread.beta.detach().std()) / 10 - 1) < 0.1 and plain.beta.abs().max() < 1e-6
    assert same(spread.state_dict(), again.state_dict()) and apart(spread.embed.weight, plain.embed.weight) < 1e-6


PIXELS = ("--train-size 200 --test-size 40 --width 16 --depth 4 --reader-depth 1 --head-dim 8 --epochs 1 "
          "--choose").split()


@folder()
def test_pixels_command():
    """A setting is chosen on test images, or another than wins on the held-out fifth, or the last reader does not see
    all training images; a stopped run begins again; diagnostics.py does not open what is saved."""
    seen, winner = [], {"spread": 0.3, "lr": 9e-3, "epochs": 3}

    def planted(args, model, examples, batches, forward, evaluate, *more):
        """Trains; held-out images are read the better the nearer a setting is to the winner."""
        seen.append(examples)
        if len(seen) == 6:
            raise KeyboardInterrupt
        wins = sum(math.isclose(vars(args)[key], value) for key, value in winner.items()) / 4
        test = (lambda poll: evaluate(poll) | {"test_accuracy": wins}) if args.val else evaluate
        return plain(args, model, examples, batches, forward, test, *more)
    with replaced(train, "train", planted) as plain:
        assert [command(PIXELS, pixels.main)[0] for _ in range(2)] == [130, 0]
    found, (model, args) = report("pixels"), load_checkpoint("pixels.pt")
    assert seen == [160] * 9 + [200] and len(found["trials"]) == 8 and args.val == 0
    assert all(math.isclose(vars(args)[key], value) for key, value in winner.items())
    assert names_in(".") == {"pixels.pt", "pixels.json"}
    assert command(PIXELS, pixels.main)[0] == 0                    # nothing to train
    assert command([*shlex.split(found["command"])[2:], "--out", "again.pt"], pixels.main)[0] == 0
    assert same(read_checkpoint("again.pt")["model"], model.state_dict())
    with quickly():
        out = diagnosed("pixels.pt")
    result = report_in("pixels-diagnostics")["model"]
    assert set(result["experiments"]) == {"clustering", "token-flow"} and result["reader"] == found["test_accuracy"]
    assert "left out: bias-route: " in out and "left out: content: " in out and "pixels.py" in result["command"]
    Path("list.json").write_text("[]")
    for argv, *words in ((["--lr", 1], "pixels.pt", "another"), (["--out", "list.pt"], "list.json", "another"),
                         (["--fraction", 0.5], "--fraction"), (["--spread", -1], "--spread")):
        refused([*PIXELS, *argv], *words, main=pixels.main)


@folder()
def test_stopped_pixels_go_on_bit_for_bit():
    flags = [*PIXELS[:-1], "--epochs", 2, "--spread", 1]
    with signal_at(17, signal.SIGTERM):
        status, _, err = command(flags, pixels.main)
    assert status == 143 and "go on by: the same command" in err and "progress" in read_checkpoint("pixels.pt")
    for argv in (flags, [*flags, "--out", "whole.pt"]):
        assert command(argv, pixels.main)[0] == 0
    assert same(*(read_checkpoint(path)["model"] for path in ("pixels.pt", "whole.pt")))


# ---- theorem.py ------------------------------------------------------------------------------------------------------

@float64()
def test_theorem_of_a_linear_field():
    """A figure of the theorem is not the closed form; a flat direction of z is not found and called."""
    for is_flat, penalty in ((False, 1e-3), (True, 1e-3), (True, 0.0), (False, 0.0)):
        A, b, x = torch.randn(48, 5), torch.randn(48), torch.rand(6, 48) * 2 - 1
        A[:, 4] *= not is_flat
        render, noise = lambda z: z @ A.T + b, torch.randn(6, 48)
        noise[0] = 0                           # nothing is said of an image that does not change
        found = theorem.measure(render, lambda z, x, penalty: z, x, penalty, {"noise": noise, "none": 0 * noise},
                                {"0": torch.zeros(6, 5), "random": torch.randn(6, 5), "another's": torch.randn(6, 5)})
        H, s = 2 / 48 * A.T @ A + 2 * penalty * torch.eye(5), torch.linalg.eigvalsh(A.T @ A)
        values, said = torch.linalg.eigvalsh(H), theorem.verdicts(found)
        for name, value in (("smallest eigenvalue of L''", values[0]), ("largest eigenvalue of L''", values[4]),
                            ("... without the penalty's share", values[0] - 2 * penalty),
                            ("rank of J^T J", 5 - is_flat), ("|L'|", 0),
                            ("participation ratio of J^T J", s.sum() ** 2 / s.square().sum())):
            assert np.allclose(found[name], float(value), rtol=1e-8, atol=1e-8), name
        if penalty or not is_flat:
            assert np.allclose(found["condition number of L''"], float(values[4] / values[0]), rtol=1e-8)
            loss, dx = theorem.objective(render, penalty), torch.randn(6, 48)
            z = theorem.newton(loss, torch.randn(6, 5), x)
            assert apart(z, torch.linalg.solve(H, 2 / 48 * A.T @ (x - b).T).T) < 1e-8
            dz = theorem.predict(loss, H.expand(6, 5, 5), z, x, dx)
            assert apart(dz, torch.linalg.solve(H, 2 / 48 * A.T @ dx.T).T) < 1e-8
            assert all(row[way][2] < 1e-8 for row in found["predictions"] for way in ("newton", "gauss_newton"))
        word = "holds" if not is_flat else "holds only by the penalty" if penalty else "does not hold"
        assert [*said.values()][1:4] == [word] * 3 and said["L' = 0"] == "holds", (said, is_flat, penalty)
        row = found["refits"]["no penalty"]["random"]
        assert row["same picture"] == 1 and row["same z"] == 1 - is_flat and row["rms"][2] < 1e-8


def test_theorem_verdicts():
    """A planted case is called something else."""
    def refits(without, same):
        return {"refits": {name: {start: {"same z": share} for start in ("random", "another's")}
                           for name, share in (("no penalty", without), ("penalty", same))}}
    smallest, without, rank = "smallest eigenvalue of L''", "... without the penalty's share", "rank of J^T J"
    good = {"latent": 5, "lambda_z": 1e-3, "|L'|": [0, 0, 1e-9], "largest eigenvalue of L''": [1, 1, 1],
            smallest: [.5, .1, 1], without: [.5, .1, 1], rank: [5, 5, 5], **refits(1, 1),
            "predictions": [{"size": s, "newton": [e, 0, 9]} for s, e in ((1e-3, .009), (1e-3, .001), (1e-2, 1))]}
    names, fails, penalty = list(theorem.verdicts(good)), "does not hold", "holds only by the penalty"
    for changed, expected in (({}, {}), ({"|L'|": [0, 0, 2e-8]}, {0: fails}),
                              ({without: [.5, -1e-3, 1]}, {1: penalty}),
                              ({smallest: [.5, 1e-9, 1], without: [.5, -1e-3, 1]}, {1: fails}),
                              ({rank: [5, 4, 5]}, {2: penalty}), ({rank: [5, 4, 5], "lambda_z": 0}, {2: fails}),
                              (refits(.94, .96), {3: penalty, 4: penalty}), (refits(1, .94), {3: fails, 4: fails}),
                              ({"predictions": [{"size": 1e-3, "newton": [.02, 0, 1]}]}, {5: fails})):
        expected = {name: expected.get(i, "holds") for i, name in enumerate(names)}
        assert theorem.verdicts(good | changed) == expected, changed


# ---- hyperinr.py -----------------------------------------------------------------------------------------------------

HYPER = ("--train-size 96 --test-size 40 --width 8 --latent 6 --joint-epochs 3 --reader-depth 1 "
         "--head-dim 4 --epochs 1 --workers 0").split()


def tiny_hyperinr(**changed):
    """Its hypernetwork far enough from the anchor that images differ."""
    args = settings.settings(hyperinr.USUAL | dict(dataset="cifar10", size=4, width=6, latent=5, head_dim=3) | changed)
    with replaced(hyperinr, "HIDDEN", 16):
        model = hyperinr.HyperINR(args, 3, 4).requires_grad_(False)
    model.H[-1].weight *= 40
    return model


@float64()
def test_generated_weights_one_by_one():
    """A batch of fields is not each image's own network; tokens are not its hidden rows less H(0)'s."""
    with checkpoint.seeded("hyperinr", 0):
        frequencies = torch.rand(2, 3).numpy() - 0.5
    for fourier in (False, True):
        model, z, act = tiny_hyperinr(depth=2, fourier=fourier), torch.randn(4, 5), np.sin
        act, got = (lambda u: np.maximum(u, 0)) if fourier else np.sin, model.render(z).view(4, 16, 3)
        for n in range(4):
            W, start = ([w[0].numpy() for w in model.weights(each)] for each in (z[n:n + 1], torch.zeros(1, 5)))
            assert apart(model.tokens(z)[n], torch.tensor(np.concatenate(W[1:3]) - np.concatenate(start[1:3]))) < 1e-12
            for p, a in enumerate(coordinate_grid(4, 4).numpy()):
                a = np.concatenate([f(10 * a @ frequencies) for f in (np.sin, np.cos)]) if fourier else a
                for i, w in enumerate(W):
                    a = w[:, :-1] @ a + w[:, -1]
                    a = a if i == 3 else act(10 * a if i == 0 and not fourier else a)
                np.testing.assert_allclose(got[n, p], a, rtol=1e-12, atol=1e-12)
        assert apart(hyperinr.flat(model.show(z)), model.render(z).clamp(-1, 1)) < 1e-12       # pixels in one order


@float64()
def test_derivatives_and_newton():
    """Hessian or mixed derivative are not those of finite differences; Newton or Adam do not end at a minimum."""
    model, x, z, h = tiny_hyperinr(), torch.rand(3, 48) * 2 - 1, torch.randn(3, 5) / 2, 1e-5
    loss, vmap = theorem.objective(model.render, 1e-3), torch.func.vmap
    slope, value = vmap(torch.func.grad(loss)), vmap(loss)
    assert apart(value(z, x), (model.render(z) - x).square().mean(1) + 1e-3 * z.square().sum(1)) < 1e-12
    differences = [(slope(z + h * e, x) - slope(z - h * e, x)) / (2 * h) for e in torch.eye(5)]
    assert apart(theorem.second_derivative(loss, z, x), torch.stack(differences, 2)) < 1e-7
    dx = torch.randn(3, 48)
    mixed = (slope(z, x + h * dx) - slope(z, x - h * dx)) / (2 * h)
    assert apart(-theorem.predict(loss, torch.eye(5).expand(3, 5, 5), z, x, dx), mixed) < 1e-7
    near = model.descend(torch.zeros(3, 5), x.view(3, 16, 3), 1e-3, 200)
    for start in (near, z):
        end = theorem.newton(loss, start, x, 40)
        assert slope(end, x).norm(dim=1).max() <= 1e-8
        assert torch.linalg.eigvalsh(theorem.second_derivative(loss, end, x)).min() > 0    # no saddle
        assert start is z or apart(value(near, x), value(end, x)) < 0.02


@folder()
def test_hyperinr_command():
    """A killed run does not go on from its last epoch, bit for bit; diagnostics.py does not run all four experiments,
    or reads otherwise than the report says; bad input is taken."""
    def killed(*arguments, **more):
        plain(*arguments, **more)
        if more.get("progress") == {"epoch": 2}:
            raise KeyboardInterrupt
    with replaced(hyperinr, "FIT_STEPS", 20), replaced(hyperinr, "HIDDEN", 32), replaced(hyperinr, "MEASURED", 3), \
            replaced(hyperinr, "POLISH_STEPS", 20), quickly():
        with replaced(hyperinr, "save", killed) as plain:
            assert command(HYPER, hyperinr.main)[0] == 130
        for argv in (HYPER, [*HYPER, "--out", "whole.pt"]):
            status, out, err = command(argv, hyperinr.main)
            assert status == 0 and max(map(len, out.splitlines())) <= 100, (err, out)
        found, (model, args) = report("hyperinr"), load_checkpoint("hyperinr.pt")
        assert same(model.state_dict(), load_checkpoint("whole.pt")[0].state_dict())
        assert found["metrics"] == report("whole")["metrics"] and found["verdicts"] == report("whole")["verdicts"]
        again = vars(hyperinr.read_flags([*shlex.split(found["command"])[2:], "--out", "other.pt"]))
        assert all(again[key] == found["flags"][key] for key in again.keys() - {"out", "token_scale", "workers"})
        images = (test := data.load_dataset(args)[1]).signal(test.pixels)
        decibels = hyperinr.psnr((model.reconstruct(images) - images).square().mean((1, 2, 3))).mean()
        assert np.isclose(found["metrics"]["test_psnr"], float(decibels), rtol=1e-4)
        diagnosed("hyperinr.pt", "--repeats", 1)
    result = report_in("hyperinr-diagnostics")["model"]
    assert set(result["experiments"]) == set(FILES) and result["reader"] == found["metrics"]["test_accuracy"]
    rows = {row["coordinate"]: row["knn10"] for row in result["experiments"]["clustering"]["rows"]}
    for name, place in (("z", "z"), ("phi - theta", "weights"), ("bias column", "bias column"), ("pixels", "pixels")):
        assert np.isclose(rows[name], found["class"][place]["10-NN"][0])
    for argv, *words in ((["--latent", 7], "hyperinr.pt", "another"), (["--steps", 2], "--steps"),
                         (["--test-size", 9, "--out", "few.pt"], "9 test images"), (["--lambda-z", -1], "--lambda-z"),
                         (["--out", "a.png"], "a.png")):
        refused([*HYPER, *argv], *words, main=hyperinr.main)


# ---- diffusion.py ----------------------------------------------------------------------------------------------------

@float64()
def test_diffusion_of_a_gaussian():
    """The state is not that of DDPM's small steps; the sampler does not bring a planted Gaussian's mean and covariance
    back from the best denoiser, or training finds none."""
    x, angles = torch.full((20000, 1, 1), 2.0), torch.linspace(0, 1.2, 41)
    state, v = diffusion.noised(x, torch.randn(x.shape), angles[-1])
    chain = x
    for before, after in zip(angles, angles[1:]):
        keep = (after.cos() / before.cos()).square()           # 1 - beta
        chain = keep.sqrt() * chain + (1 - keep).sqrt() * torch.randn(x.shape)
    for each in (state, chain):
        assert abs(each.mean() - 2 * math.cos(1.2)) < 0.03 and abs(each.std() - math.sin(1.2)) < 0.03
    assert apart(angles[-1].cos() * state - angles[-1].sin() * v, x) < 1e-12
    mean, root = torch.randn(3), torch.randn(3, 3)
    S = root @ root.T

    def best(x, angle):            # v expected of a state: both of its parts are linear in the state
        cos, sin = angle[0].cos(), angle[0].sin()
        seen = (x - cos * mean) @ torch.linalg.inv(cos ** 2 * S + sin ** 2 * torch.eye(3))
        return cos * sin * seen - sin * (mean + cos * seen @ S)
    origin, *columns = diffusion.ddim(best, torch.cat([torch.zeros(1, 3), torch.eye(3)]), 500)    # an affine map
    M = torch.stack(columns) - origin
    assert apart(origin, mean) < 1e-2 and apart(M.T @ M, S) < 1e-2
    data = torch.tensor([3.0, -2.0]) + 0.3 * torch.randn(200, 4, 2)
    assert (diffusion.diffusion(data, 50, 2, 40).mean(0) - data.mean(0)).abs().max() < 1


@float64()
def test_judging_samples():
    """The Fréchet distance of known Gaussians is another, sampled ones have other moments; a memorising sampler is not
    caught, or an honest one is."""
    def exactly(mean, root, n=50):                             # rows with just this mean and covariance
        x = torch.randn(n, 3)
        x = x - x.mean(0)
        return x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T @ root.T + mean
    for roots in ([torch.diag(torch.rand(3) + 0.5) for _ in "ab"], [torch.randn(3, 3) for _ in "ab"]):
        means, (S, R) = torch.randn(2, 3), (root @ root.T for root in roots)
        got = diffusion.frechet(*map(exactly, means, roots))
        cross = np.sqrt(np.linalg.eigvals((S @ R).numpy()).real).sum()
        assert np.isclose(got, float((means[0] - means[1]).square().sum() + S.trace() + R.trace()) - 2 * cross)
        if roots[0][0, 1] == 0:
            by_hand = (means[0] - means[1]).square().sum() + (roots[0] - roots[1]).diagonal().square().sum()
            assert np.isclose(got, float(by_hand))
    x = exactly(torch.tensor([1.0, 2, 3]), torch.randn(3, 3)).unflatten(1, (3, 1))
    drawn = diffusion.gaussian(x, 40000, generator("drawn"))
    assert apart(drawn.mean(0), x.mean(0)) < 0.02 and apart(torch.cov(drawn[..., 0].T), torch.cov(x[..., 0].T)) < 0.05
    bank, test, honest = torch.randn(3, 200, 4, 5)
    copied, fair = (diffusion.copies(x, bank, test) for x in (bank.flip(0) + 0.01 * torch.randn(200, 4, 5), honest))
    assert copied["nearest"] < 0.05 * copied["nearest of test"] and copied["copied"] == 1
    assert abs(fair["nearest"] / fair["nearest of test"] - 1) < 0.1 and fair["copied"] < 0.15


# ---- mlora.py --------------------------------------------------------------------------------------------------------

LOW_RANK = ("--train-size 96 --test-size 40 --width 8 --depth 2 --rank 2 --latent 3 --base-epochs 2 --fit-steps 5 "
            "--diffusion-steps 3 --reader-depth 1 --head-dim 4 --epochs 1 --workers 0").split()


def tiny_mlora(**changed) -> mlora.MLoRA:
    args = settings.settings(mlora.USUAL | dict(dataset="cifar10", size=4, width=6, depth=2, rank=2, head_dim=3,
                                                fit_steps=6, fraction=0.5) | changed)
    return mlora.MLoRA(args, 3, 4)


@float64()
def test_fits_one_by_one():
    """A block of fits is not each image's own; what a mask freezes moves, or differs between images or starts."""
    model, (images, _) = tiny_mlora(fit_steps=4).double(), batch(3, 4)
    for kind, init in ((kind, init) for kind in mlora.KINDS for init in ("shared", "separate")):
        together, free, start = model.fit_kind(kind, init, images), model.free(kind), model.start(kind)
        with replaced(mlora, "BLOCK", 2):
            alone = torch.cat([model.fit_kind(kind, init, image[None]) for image in images.flip(0)]).flip(0)
            assert apart(together, model.fit_kind(kind, init, images)) < 1e-9
        assert apart(together, alone) < 1e-9
        assert torch.equal(together[:, ~free], start.to(images)[~free].expand(3, -1))
        assert (together - start)[:, free].abs().median() > 0
        rows = free[6:-3] if kind.startswith("mlp") else free
        assert ((~rows[:, :6]).sum(1) == (2 if kind.endswith("asym") else 0)).all() and rows[:, 6:].all()
        frozen = start[6:-3][~rows] if kind.startswith("mlp") else start[~rows]
        assert (frozen == 0).all() if kind.startswith("mlora") else (frozen != 0).all()
        distance = torch.pdist(torch.stack([model.start(kind, i)[free] for i in range(3)]))
        assert distance.min() > 0.1


@float64()
def test_low_rank_weights_by_hand():
    """A field is not that of its materialised weights, a gradient not the chain rule's; factors start elsewhere."""
    model = tiny_mlora().double()
    first, *hidden, head = (w.numpy() for w in model.base.split(6, -2))
    for kind in ("mlp", "lora", "mlora"):
        own = (model.start(kind) + 0.1 * torch.randn(model.free(kind).shape)).requires_grad_()
        if kind == "mlp":
            first, *W, head = (w.detach().numpy() for w in own.split(6, -2))
        else:
            A, B = own.unflatten(0, (2, 2)).split(6, -1)
            change, W = (B.mT @ A).detach().numpy(), [w.copy() for w in hidden]
            for w, each in zip(W, change):
                w[:, :6] = w[:, :6] * each if kind == "mlora" else w[:, :6] + each
        layers = [first[:, [0, 1, -1]], *W, head]
        for got, a in zip(mlora.field(model.inputs(kind), model.layers(kind, own)), model.coords.numpy()):
            for i, w in enumerate(layers):
                a = w[:, :-1] @ a + w[:, -1]
                a = np.sin(a) if i < 3 else a
            np.testing.assert_allclose(got.detach().numpy(), a, rtol=1e-10, atol=1e-12)
        first, head = model.base[:6].numpy(), model.base[-3:].numpy()
        if kind != "mlp":
            def loss(layers):
                return (mlora.field(model.inputs(kind), layers) - 0.3).square().mean()
            leaves = [(W.detach().requires_grad_(), b) for W, b in model.layers(kind, own)]
            got, = torch.autograd.grad(loss(model.layers(kind, own)), own)
            for i, G in enumerate(torch.autograd.grad(loss(leaves), [W for W, _ in leaves])[:2]):
                G = G * torch.tensor(hidden[i][:, :6]) if kind == "mlora" else G
                expected = torch.cat([B[i] @ G, A[i] @ G.T], -1)
                assert apart(got.unflatten(0, (2, 2))[i], expected) < 1e-10
    for kind, expected in (("lora", 0), ("mlora", 1), ("mlora-asym", 1)):
        A, B = torch.stack([model.start(kind, i) for i in range(3000)]).unflatten(1, (2, 2)).split(6, -1)
        covered = (model.free(kind)[:, :6].unflatten(0, (2, 2)).any(1, True)).expand(2, 6, 6)
        assert ((B.mT @ A).mean(0) - expected)[covered].abs().max() < 0.05


def test_base_is_folded():
    """A modulated layer is not s (W a + b); what is left is not the field at z = 0; nothing is learnt."""
    model, calls = tiny_mlora(latent=3, base_epochs=30), []
    base, factor = torch.randn(6 * 3 + 3, 7), torch.randn(12)
    a, s = torch.randn(5, 2), (1 + factor).split(6)
    first, *hidden, head = base.split(6)
    expected = torch.sin(a @ first[:, :2].T + first[:, -1])
    for scale, w in zip(s, hidden):
        expected = torch.sin(scale * (expected @ w[:, :-1].T + w[:, -1]))
    expected = expected @ head[:, :-1].T + head[:, -1]
    assert apart(mlora.field(a, mlora.split_layers(mlora.modulated(base, factor), 6)), expected) < 1e-5

    def spy(base, factor):
        calls.append((factor.shape, plain(base, factor)))
        return calls[-1][1]
    images = torch.linspace(-1, 1, 8).view(8, 1, 1, 1) * torch.linspace(0, 1, 4).expand(8, 3, 4, 4)
    with replaced(mlora, "modulated", spy) as plain, replaced(mlora, "LR_BASE", 3e-2):
        decibels = mlora.train_base(model, images)
    assert calls[-1][0] == (12,) and torch.equal(model.base, calls[-1][1]) and not model.base.requires_grad
    assert decibels > mlora.train_base(tiny_mlora(latent=3, base_epochs=1), images) + 3


def test_clusters_by_hand():
    """The adjusted Rand index is another than by hand; k-means does not find planted clusters."""
    a, b = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 0, 1, 1, 2, 2])
    assert np.isclose(measures.adjusted_rand(a, b), (2 - 6 * 3 / 15) / ((6 + 3) / 2 - 6 * 3 / 15))
    assert measures.adjusted_rand(a, 1 - a) == 1
    drawn = torch.randint(4, (2, 500))
    assert abs(measures.adjusted_rand(*drawn)) < 0.05
    x = 10 * torch.randn(5, 8)[torch.arange(200) % 5] + torch.randn(200, 8)
    assert measures.adjusted_rand(measures.kmeans(x, 5, generator("planted")), torch.arange(200) % 5) == 1


def test_planted_permutation():
    """Components in another order are not found, though the line between then has no barrier; other differences are
    taken for one; or putting them in order changes the picture."""
    model, (images, _) = tiny_mlora(rank=3), batch(4, 4)
    a = torch.stack([model.start("mlora", i) for i in range(4)])
    orders = torch.stack([torch.randperm(3) for _ in range(8)]).view(4, 2, 3, 1)
    for b, is_order in ((a.unflatten(1, (2, 3)).gather(2, orders.expand(4, 2, 3, 12)).flatten(1, 2), True),
                        (a + 0.05 * torch.randn(a.shape), False)):
        aligned = mlora.align(a, b, 3)
        assert apart(model.show("mlora", aligned), model.show("mlora", b)) < 1e-4
        assert torch.equal(aligned, a if is_order else b)
        x = model.show("mlora", a)
        before, after = (mlora.barrier(mlora.path_errors(model, "mlora", a, each, x)) for each in (b, aligned))
        assert after < 1e-9 < before if is_order else after == before
    assert np.isclose(mlora.barrier(torch.tensor([[0.0, 2], [3, 2], [2, 2]])), 1)     # (2 + 0) / 2


def test_rates():
    """A rate is chosen by reconstruction or by neighbours alone; or the rates tried are not those that are reported."""
    rows = {rate: {"PSNR": decibels, "1-NN": near} for rate, decibels, near in (
        (0.1, 50, 0.7), (0.03, 40, 0.885), (0.01, 30, 0.9), (0.003, 20, 0.8))}
    assert mlora.best_rate(rows) == 0.03
    model, (images, labels) = tiny_mlora(fit_steps=2, rank=1), batch(12, 4)
    tried = mlora.choose_rates(model, images, labels % 2)
    for kind in ("mlp", "lora", "mlora"):
        rows = {rate: tried[f"{kind}, {rate}"] for rate in mlora.RATES}
        assert getattr(model.args, f"rate_{kind}") == mlora.best_rate(rows)
        assert len({row["PSNR"] for row in rows.values()}) == 4


@folder()
def test_mlora_command():
    """A killed run does not go on after its last kind, with the same figures; diagnostics.py does not run, or reads
    otherwise than the report says; bad input is taken."""
    argv = [*LOW_RANK, "--choose", "--kinds", "mlora", "mlp-asym", "lora"]
    examined = []

    def killed(model, *what):
        examined.append(what[:2])
        if len(examined) == 3:
            raise KeyboardInterrupt
        plain(model, *what)
    with quickly():
        with replaced(mlora, "examine", killed) as plain:
            assert command(argv, mlora.main)[0] == 130
            for more in ([], ["--out", "whole.pt"]):
                status, out, err = command([*argv, *more], mlora.main)
                assert status == 0 and max(map(len, out.splitlines())) <= 110, (err, out)
        assert len(examined) == 3 + 3 + 5 and examined[2] == examined[3]
        found, (model, args) = report("mlora"), load_checkpoint("mlora.pt")
        whole = report("whole")
        assert all(found[part] == whole[part] for part in ("rates", "classify", "connect", "generate", "base_psnr"))
        assert same(model.state_dict(), load_checkpoint("whole.pt")[0].state_dict())
        shown = read_checkpoint("mlora.pt")["metrics"]["pictures"].values()
        assert all(x.untyped_storage().nbytes() == 4 * x.numel() for x in shown)
        assert set(found["classify"]) == {"pixels", "mlora", "mlora, separate", "mlp-asym", "lora", "lora, separate"}
        assert set(found["connect"]) == {"mlora", "mlp-asym", "lora"}
        assert set(found["generate"]) == {"mlora, Gaussian", "mlora, DDPM", "mlp-asym, Gaussian", "lora, Gaussian",
                                          "lora, DDPM"}
        words = shlex.split(found["command"])
        again = vars(mlora.read_flags([*words[2:], "--out", "other.pt"]))
        assert all(again[key] == found["flags"][key] for key in again.keys() - {"out", "token_scale", "workers"})
        images = (test := data.load_dataset(args)[1]).signal(test.pixels)
        decibels = mlora.psnr((model.reconstruct(images) - images).square().mean((1, 2, 3))).mean()
        assert np.isclose(found["classify"]["mlora"]["PSNR"], float(decibels), rtol=1e-4)
        out = diagnosed("mlora.pt")
    result = report_in("mlora-diagnostics")["model"]
    assert set(result["experiments"]) == {"clustering", "token-flow"} and "no bias column" in out
    assert result["reader"] == found["classify"]["mlora"]["reader"]
    rows = {row["coordinate"]: row["knn10"] for row in result["experiments"]["clustering"]["rows"]}
    assert np.isclose(rows["phi - theta"], found["classify"]["mlora"]["10-NN"])
    for more, *words in ((["--rank", 3], "mlora.pt", "another"), (["--steps", 2], "--steps"), (["--rank", 0], "--rank"),
                         (["--init", "separate", "--only", "connect", "--out", "no.pt"], "--only connect"),
                         (["--kinds", "glora"], "glora"), (["--test-size", 9, "--out", "few.pt"], "9 test images")):
        refused([*argv, *more], *words, main=mlora.main)
    status, _, err = command([*LOW_RANK, "--rate-mlora", 1e30, "--out", "inf.pt"], mlora.main)
    assert status == 1 and err.startswith("mlora.py: the fits of mlora are not finite") and err.count("\n") == 1


# ---- dictionary.py ---------------------------------------------------------------------------------------------------

@float64()
def test_maps_by_hand():
    """Spread, disc, likeness or half-width is another number than where it is known."""
    coords, maps = coordinate_grid(31, 31), torch.zeros(961, 3)
    maps[100, 0] = maps[15 * 31, 2] = maps[15 * 31 + 30, 2] = 2                # a point; a pair at (0, -1) and (0, 1)
    maps[:, 1] = 1
    uniform = 2 * np.linspace(-1, 1, 31).var()
    np.testing.assert_allclose(dictionary.spread(maps, coords), [0, 1, math.sqrt(1 / uniform)], atol=1e-6)
    held = dictionary.in_a_disc(maps, coords)
    assert abs(held[0] - 1) < 1e-9 and abs(held[2] - 0.5) < 1e-9 and 26 / 961 <= held[1] <= 29 / 961
    pictures = torch.rand(961, 3)
    maps = torch.stack([3 - 2 * pictures[:, 1], torch.rand(961)], 1)
    against = np.abs(np.corrcoef(maps[:, 1], pictures.T)[0, 1:]).max()
    np.testing.assert_allclose(dictionary.likeness(maps, pictures), [1, against], atol=1e-9)
    wave = torch.cos(torch.arange(60) * math.pi / 12)                          # period 24: below a half past 24 / 6
    assert dictionary.half_width((wave[:, None] + wave).view(-1, 1)) in range(4, 7)
    assert dictionary.half_width(torch.randn(3600, 5)) == 1


@float64()
def test_dictionary_by_hand():
    """The code is not the k largest where positive; loss or gradient, dead atoms included, are others; training leaves
    as much of sparse activations as a random dictionary does."""
    sae = dictionary.Dictionary(*(torch.randn(*shape).requires_grad_() for shape in ((6, 4), (6, 4), (4,))))
    (E, D, c), a = (p.detach() for p in sae), torch.randn(5, 4)
    x, s = a - c, (a - c) @ E.T
    for dead in (torch.zeros(6), torch.tensor([0, 1, 0, 0, 1, 1])):
        M, R = torch.zeros(5, 6), torch.zeros(5, 6)    # which fire, and of the dead
        for p in range(5):
            for mask, able in ((M, range(6)), (R, dead.nonzero().flatten().tolist())):
                for i in sorted(able, key=lambda i: -s[p, i])[:2]:
                    mask[p, i] = s[p, i] > 0
        r, aux = x - s * M @ D, bool(dead.any()) / 32
        more = r - s * R @ D
        up = -(r @ D.T * M + aux * more @ D.T * R) / 10                        # d loss / d s
        grads = [up.T @ x, -((s * M).T @ r + aux * (s * R).T @ more) / 10, -r.sum(0) / 10 - (up @ E).sum(0)]
        with replaced(dictionary, "TOPK", 2):
            loss = sae.loss(a, sae.code(a), dead.bool())
        assert apart(loss, (r.square().sum() + aux * more.square().sum()) / 20) < 1e-12
        assert apart(torch.autograd.grad(loss, list(sae)), grads) < 1e-10
    a = (torch.rand(400, 32) < 0.1) * torch.rand(400, 32) @ F.normalize(torch.randn(32, 16))
    with replaced(dictionary, "ATOMS", 64):
        found = [dictionary.train_dictionary(a, steps, 0) for steps in (0, 200)]
    missed = [(a - sae.code(a) @ sae.decoder - sae.centre).square().mean() for sae in found]
    assert missed[1] < missed[0] / 4 and apart(found[1].decoder.norm(dim=1), torch.ones(64)) < 1e-12


@float64()
def test_ablation_by_hooking():
    """A direction is not projected out, one that decides is not told from one that does not, or an atom subtracted
    where it fires changes something elsewhere."""
    a, first = torch.randn(49, 6), torch.nn.Linear(6, 12).requires_grad_(False)
    first.weight[:, :2] *= torch.tensor([20, 0])       # direction 0 decides, nothing reads 1

    def rest(a):
        return (first(a).tanh() / 2).view(49, 4, 3).transpose(0, 1)
    z, values = a.relu() * (torch.rand(49, 6) < 0.3), rest(a) + 0.01 * torch.randn(4, 49, 3)
    z[:, 5] = 0                                        # a dead atom
    rows = dictionary.ablate(rest, a, z, torch.eye(6), values, 0)
    assert rows["change elsewhere, if only there"].tolist() == [0] and len(rows["PSNR lost (dB), random"]) == 5
    for n, d in enumerate(torch.eye(6)[:5]):
        hook = first.register_forward_pre_hook(lambda module, x: x[0] - torch.outer((x[0] - x[0].mean(0)) @ d, d))
        output = rest(a)
        hook.remove()
        lost = dictionary.decibels(rest(a), values) - dictionary.decibels(output, values)
        change = (output - rest(a)).square().sum((0, 2))
        expected = lost.mean(), lost.max(), change[z[:, n] > 0].sum() / change.sum()
        for row, x in zip(("PSNR lost (dB)", "PSNR lost on one image (dB)", "change where it fires"), expected):
            assert n == 1 or abs(rows[f"{row}, atom"][n] - x) < 1e-9
    less = rows["PSNR lost (dB), atom"] - rows["PSNR lost (dB), random"]
    assert less[0] > 1 and less[1] < -1


# ---- cohort.py -------------------------------------------------------------------------------------------------------

def cohort_args(backbone="siren", size=8):
    return argparse.Namespace(backbone=backbone, width=32, layers=3, size=size, fit_steps=40)


@float64()
def test_cohort_fits_by_hand():
    """The field is another one, N images fitted at once are not each fitted as if alone by Adam, what is frozen moves,
    or a stable rank is not that of power iteration."""
    for backbone in ("siren", "ffmlp"):
        encoder, a = cohort.Encoder(cohort_args(backbone), 3, 0), coordinate_grid(8, 8).numpy()
        *shared, last = weights = [w.detach().numpy() for w in encoder.layers]
        for w, bound in zip(weights, (1 / 4, 6 / 32 / 900) if backbone == "siren" else (6 / 64, 6 / 32)):
            assert 0.8 * bound < np.square(w).max() < bound
        if backbone == "ffmlp":
            phase = a @ encoder.frequencies.numpy().T
            a = np.concatenate([np.sin(phase), np.cos(phase)], 1)
        for W in shared:
            a = a @ W[:, :-1].T + W[:, -1]
            a = np.sin(30 * a) if backbone == "siren" else a.clip(0)
        got = encoder.predict(encoder.inputs(8), list(encoder.layers))
        assert apart(got, torch.from_numpy(a @ last[:, :-1].T)) < 1e-12
        values, before = torch.rand(5, 64, 3), [w.detach().clone() for w in encoder.layers]
        seen, start = encoder.through(encoder.inputs(8), encoder.layers[:2]).detach(), list(encoder.layers)[2:]
        found = cohort.fit(encoder, seen, start, values, [3, 9])
        for n in range(5):
            own = [w.detach().clone().requires_grad_() for w in start]
            optimizer = torch.optim.Adam(own, cohort.RECIPE[backbone][2])
            for step in range(9):
                optimizer.zero_grad()
                (encoder.predict(seen, own) - values[n]).square().mean().backward()
                optimizer.step()
                if step in (2, 8):
                    assert apart([w[n] for w in found[step == 8]], own) < 1e-9
        assert all(torch.equal(a, b) for a, b in zip(encoder.layers, before))
    W, v = torch.randn(20, 31), torch.randn(30)
    for _ in range(500):
        v = F.normalize(W[:, :-1].T @ (W[:, :-1] @ v), dim=0)
    assert apart(cohort.stable_rank(W), W[:, :-1].square().sum() / (W[:, :-1] @ v).square().sum()) < 1e-6


def planted_atoms(kind: str) -> dict:
    """Rows of a layer whose atoms are bumps, or the images, or noise over the whole plane."""
    own, others, maps = torch.rand(225, 4), torch.rand(225, 4), torch.rand(225, 8)
    if kind == "images":
        maps = own.repeat(1, 2)
    if kind == "bumps":
        maps = (-20 * (coordinate_grid(15, 15)[:, None] - torch.rand(8, 2) + 0.5).square().sum(2)).exp()
    sae = dictionary.Dictionary(torch.eye(8), torch.eye(8), torch.zeros(8))
    return dictionary.describe(maps, sae, own, others)[0]


@float64()
def test_planted_cohorts():
    """Layers 0 and 1 alone transfer: the sweep does not find it out, with the stable rank highest there or elsewhere;
    atoms that are bumps, that are the images, a direction that decides, are not told from others."""
    args, random = cohort_args(size=12), torch.linalg.qr(torch.randn(32, 32)).Q
    for second, third, best in ((random / 12, 1e-6 * torch.ones(32, 32), "yes"), (None, 1e-9 * random, "no")):
        encoder, untrained = (cohort.Encoder(args, 3, 0, key) for key in ("trained", "untrained"))
        encoder.recipe = (1, 1e-3, 1e-2)
        with torch.no_grad():
            if second is not None:
                encoder.layers[1][:, :-1] = second
            encoder.layers[2][:, :-1] = third
            values = encoder.through(encoder.inputs(12), encoder.layers[:2]) @ torch.randn(10, 32, 3) / 8
            rows = cohort.sweep(encoder, untrained, values, args, 0)
            rows["stable rank, trained"] = [cohort.stable_rank(w)[None] for w in encoder.layers[:-1]]
        for name in ("trained", "untrained", "random atoms", "other cohort"):
            for kind in ("bumps", "images", "noise"):
                for row, x in planted_atoms(kind if name == "trained" else "noise").items():
                    rows.setdefault(f"{row}, {name}", []).append(x)
        rows["PSNR lost (dB), atom"] = list(5 + torch.rand(3, 9))
        rows["PSNR lost (dB), random"] = list(torch.tensor([[0.], [5], [7]]) + torch.rand(3, 7))
        found = {claim: [cohort.verdict(cell, cohort.SAME.get(claim, 0)) for cell in cells]
                 for claim, cells in cohort.intervals([cohort.differences(rows)] * 2).items()}
        assert found["best depth: highest stable rank"] == [best]
        assert best == "no" or found["freezing there beats fine-tuning"] == ["yes"]
        assert found["frozen to here beats fine-tuning"][1] == "yes" == found["frozen to here beats untrained"][1]
        for claim, planted in (("atoms more local than untrained's", 0), ("atoms more local than random ones", 0),
                               ("atoms trace images trained on", 1)):
            assert [word == "yes" for word in found[claim]] == [layer == planted for layer in range(3)]
        assert found["an atom's direction matters"][::2] == ["yes", "no"]
    for low, high, word in ((1, 2, "yes"), (-2, -1, "no"), (-.4, .3, "same"), (-.4, .6, "not decided")):
        assert cohort.verdict((0, low, high), same=0.5) == word


COHORT = ("--size 8 --width 32 --layers 2 --images 6 --fit-steps 9 --token-steps 4 --train-size 60 --test-size 30 "
          "--epochs 1 --reader-depth 1").split()


@folder()
def test_cohort_command():
    """A stopped run is not found again, bit for bit; diagnostics.py cannot take it; a cohort is not learnt; bad input
    is taken."""
    fits, plain = [], cohort.Cohort.fit

    def killed(model, images):
        fits.append(len(images))
        if len(fits) == 4:
            raise KeyboardInterrupt
        return plain(model, images)
    with replaced(cohort, "RECIPE", {"siren": (150, 1e-3, 1e-3), "ffmlp": (150, 3e-3, 3e-3)}), \
            replaced(dictionary, "STEPS", 9), replaced(dictionary, "ATOMS", 24), replaced(cohort, "BLOCK", 20):
        with replaced(figures, "cohort_figure", lambda *_: None), replaced(cohort.Cohort, "fit", killed):
            assert command(COHORT, cohort.main)[0] == 130 and command(COHORT, cohort.main)[0] == 0
            assert fits == [1, 20, 20, 20, 1, 20, 1, 20, 10]                   # 40 of 60 were there
            assert command([*COHORT, "--out", "whole.pt"], cohort.main)[0] == 0
        argv = "--seeds 2 --freeze 0 --backbone ffmlp --out b.pt".split()
        status, out, err = command([*COHORT, *argv], cohort.main)
        assert status == 0 and "nan" not in out and max(map(len, out.splitlines())) <= 100, out + err
        for argv, word in ((["--freeze", 2], "--freeze 2"), (["--backbone", "x"], "siren"), (["--depth", 2], "--depth"),
                           (["--train-size", 19], "--train-size"), (["--out", "a.png"], "a.png")):
            refused([*COHORT, *argv], word, main=cohort.main)
        assert names_in(".") == set("b.png b.json b.pt cohort.json cohort.pt whole.json whole.pt".split())
        assert all(report(name)["rows"]["cohort's PSNR (dB)"][0][0] > 15 for name in ("b", "cohort"))
        assert same(*(read_checkpoint(path)["model"] for path in ("cohort.pt", "whole.pt")))
        model, images = load_checkpoint("b.pt")[0], torch.rand(3, 1, 8, 8) * 2 - 1
        own, = cohort.fit(model.encoder, *model.split(), images.flatten(2).mT, [4])
        assert apart(model.fit(images), torch.cat(own, 1) - torch.cat(model.split()[1])) < 1e-4
        shown = model.encoder.predict(model.split()[0], own).clamp(-1, 1)
        assert apart(model.reconstruct(images).flatten(2).mT, shown) < 1e-5
        with quickly():
            diagnosed("b.pt")
    found = report_in("b-diagnostics")["model"]
    assert set(found["experiments"]) == set(diagnostics.DEFAULT) and not found["left_out"]
    assert found["reader"] == read_checkpoint("b.pt")["metrics"]["test_accuracy"]


# ---- claims.py -------------------------------------------------------------------------------------------------------

def about(value, half=0.005) -> tuple:
    return value, value - half, value + half


def test_every_verdict():
    """Each rule by intervals above, about and below its limits: every outcome there is."""
    wide = about(0.01, 0.05)
    for gap, best, reader, expected in (
            (about(0.05), 0.4, 0.5, "supported"), (about(-0.05), 0.5, 0.4, "refuted"),
            (wide, 0.4, 0.5, "not decided here"), (about(0.01), 0.4, 0.5, "equivalent"),
            (about(0.02, 0.01), 0.4, 0.5, "not decided here"),
            (about(0.05), 0.97, 0.99, "no verdict: ceiling"), (about(0.05), 0.1, 0.15, "no verdict: floor"),
            (None, 0.4, 0.5, "not decided here")):
        assert claims.opponent_verdict(gap, best, reader, 0.1).startswith(expected), (gap, expected)

    for purity, accuracy, beyond, expected in (
            (about(0.1), about(-0.1), about(-0.05), "supported"), (about(0.1), about(0.1), None, "refuted"),
            (about(0.1), about(-0.1), about(0), "not decided here"),           # random labels hurt as much
            (about(0.1), about(-0.1), None, "not decided here"),
            (about(0), about(-0.1), about(-0.1), "not decided here")):
        assert claims.pressure_verdict(purity, accuracy, beyond) == expected, (purity, accuracy, beyond)

    def late(*views, rise=about(0.2), blocks=4):
        return claims.late_verdict({str(i): {"rise": rise, "late_less_early": v} for i, v in enumerate(views)}, blocks)
    up, down, flat = about(0.1), about(-0.1), about(0)
    assert [late(up, up), late(down, down), late(up, down), late(up, flat), late(up)] == [
        "supported", "refuted", "depends on the view", "not decided here", "not decided here"]
    assert late(up, up, rise=flat) == "not decided here" and late(up, up, blocks=1).startswith("no verdict: fewer")

    def route(sets, components, number=20, reader=0.5, size=1.0):
        found = {"random columns": {"number": number, "size": 1.0, "margin": sets}}
        found |= {"principal components": {"number": 5, "size": size, "margin": components}} if components else {}
        return claims.route_verdict(found, reader, 0.1)
    assert [route(up, up), route(up, down), route(flat, up), route(about(0.01), up)] == [
        "supported", "refuted", "not decided here", "not decided here"]
    assert route(up, up, size=1.2) == "supported" and route(up, down, size=1.2) == "not decided here"
    assert all(found.startswith("no verdict: too few") for found in (route(up, up, number=9), route(up, None)))
    assert route(up, up, reader=0.15).startswith("no verdict: floor")

    def helps(*gains, detectable=0.01, p=0.01):
        return claims.helps_verdict({str(i): gain for i, gain in enumerate(gains)}, detectable, p)
    assert [helps(up, up), helps(up, up, p=0.06), helps(up, flat), helps(down, down), helps(up, up, flat)] == [
        "supported", "not decided here", "not decided here", "refuted", "not decided here"]
    assert helps(flat, flat, detectable=0.03).startswith("cannot be seen at this power (least effect 3.0")


def model_report(setting, seed, gap, margin=0.05, late=0.1, stages=(0.5, 0.5)) -> dict:
    """A planted report of diagnostics.py, as the comparison takes it in."""
    opponent = {"accuracy": 0.4, "gap": about(gap), "pixels": 0.3, "best": ["x"], "over_pixels": about(0.1)}
    control = {"number": 20, "size": 1.0, "margin": about(margin)}
    view = {"rise": about(0.2), "late_less_early": about(late)}
    return {"name": f"{setting}-{seed}", "reader": 0.4 + gap, "bank": 100,
            "training": {"seed": seed, "w_task": setting, "width": 8}, "experiments": {
                "clustering": {"purity": stages[0], "chance": 0.1, "G": opponent, "L": opponent},
                "token-flow": {"rises": {"pooled": view, "flattened": view}, "blocks": 4,
                               "reader_halves": [0.4 + gap] * 2,
                               "rows": [{"stage": "MLP 1", "purity_halves": list(stages)}]},
                "bias-route": {"permuted": about(0.1), "above_sets": 1.0,
                               "controls": {"random columns": control, "principal components": control}}}}


def test_comparison_across_models():
    reports = [model_report(w, seed, 0.1 + 0.01 * w + 0.001 * seed, stages=(0.5 + 0.01 * w, 0.5 - 0.01 * w))
               for w in range(6) for seed in range(3)]
    with replaced(measures, "spearman", functools.partial(measures.spearman, draws=100)):
        result = claims.across(reports)
    assert result["models"] == 18 and result["settings"] == 6 and len(result["seeds"]) == 6
    row = result["seeds"][1]
    assert result["points"][3]["evidence"]["R - G"] == about(0.11)
    assert row["n"] == 3 and np.allclose(row["R - G"], measures.t_interval([0.11, 0.111, 0.112]))
    for claim, expected in (("C1a", "supported"), ("C1b", "supported"), ("C2a", "supported"), ("C3", "supported")):
        found = [line for line in result["verdicts"] if line.startswith(claim)]
        assert len(found) == 6 and all(f": {expected}. " in line for line in found), found
    rho = result["correlations"]
    assert rho["phi - theta"][0] > 0.9 and rho["MLP 1"][0] > 0.9       # purity of one half, accuracy of the other
    of_pixels = [model_report(0.01, seed, 0.05) | {"method": "pixels"} for seed in range(3)]
    beside = claims.across([*[model_report(0.01, seed, 0.1) for seed in range(3)], *of_pixels])["verdicts"]
    assert "MWT - the same Transformer on pixels: +5.0 [+5.0, +5.0] points, 3 seeds" in beside, beside
    latent = [model_report(0.01, seed, 0.1) | {"method": "hyperinr"} for seed in range(3)]
    for seed, found in enumerate(latent):      # a run's own: no other setting
        found["training"]["token_scale"] = seed
    assert [row["label"] for row in claims.across(latent)["seeds"]] == ["hyperinr"]
    reports[0]["training"]["width"] = 9
    assert claims.across(reports)["models"] == 17
    few = claims.across(reports[:2])
    assert "nothing is said about the method" in few["verdicts"][0] and few["correlations"] == {}
    refuted = claims.across([model_report(0.01, seed, -0.1, -0.1 + 0.001 * seed, -0.1) for seed in range(3)])
    assert [line.split(": ")[1].split(".")[0] for line in refuted["verdicts"]] == ["refuted"] * 4
    assert all(len(line) <= 100 for each in (result, few) for line in claims.across_table(each).split("\n"))


# ---- spaces.py -------------------------------------------------------------------------------------------------------

def space_report(method, seed, R, G, L, **more) -> dict:
    """A planted report of one model, with a figure for every column."""
    report = model_report(0.01, seed, 0.1, margin=0.03, late=0.07)
    done = report["experiments"]
    for letter, best in (("G", G), ("L", L)):
        done["clustering"][letter] = done["clustering"][letter] | {"accuracy": best}
    part = {"bias column": {"share": about(0.25)}}
    done |= {"same-reader": {"reader": R + 0.001 * seed, "tokens": 6, "features": 5, "psnr": 30 + seed},
             "content": {"mediation": [{"total": about(0.12), "parts": part}]}}
    training = report["training"] | {"dataset": "data/set", "size": 16, "train_size": 100}
    return report | {"method": method, "data": "data/set", "test": 50, "evaluated_on": "test images",
                     "training": training, "unfinished": False} | more


def test_four_spaces():
    """A planted answer is not the row's; a row with other images is compared; a figure gets into another column."""
    reports = [space_report(*each) for seed in range(3) for each in (
        ("mwt", seed, 0.5, 0.3, 0.4), ("hyperinr", seed, 0.5, 0.4, 0.51), ("mlora", seed, 0.5, 0.495, 0.51),
        ("cohort", seed, 0.5, 0.3, 0.4))]
    for report in reports:
        if report["method"] == "cohort":
            report["bank"] = 99
    apart = dict(reports[0], experiments={"same-reader": reports[0]["experiments"].pop("same-reader")},
                 training=reports[0]["training"] | {"out": "elsewhere.pt"})    # changes no result
    for report in reports[2::4]:       # of mLoRA: what its program compares besides
        report["training"]["kinds"] = ["mlora", "lora"][report["training"]["seed"]:]
    pixels = [{"flags": {"dataset": "data/set", "size": 16, "seed": seed, "train_size": 100}, "test_accuracy": 0.45}
              for seed in range(2)] + [{"flags": {"dataset": "data/set", "size": 8, "seed": 2, "train_size": 100},
                                        "test_accuracy": 0.9}]
    with folder():
        for i, each in enumerate([apart, *reports]):
            Path(f"{i}.json").write_text(json.dumps({"model": each}))
        for i, each in enumerate(pixels):
            Path(f"pixels{i}.json").write_text(json.dumps(each))
        names = sorted(map(str, Path().glob("*.json")))
        status, out, err = command([*names, "--out", "table"], spaces.main)
        assert status == 0, err
        assert names_in("table") == {"table.json", "table.md", "table.png"}
        assert out.startswith(Path("table/table.md").read_text())
        short = [[word.strip() for word in row.split("|")[1:-1]] for row in out.split("\n\n")[0].split("\n")]
        rows = {row["space"]: row for row in json.loads(Path("table/table.json").read_text())["rows"]}
        refused([*names, "0.png"], "0.png: no report", main=spaces.main)
        refused(["pixels0.json"], "no report of diagnostics.py", main=spaces.main)
    assert {name: row["answer"] for name, row in rows.items()} == {
        "MWT": "routed", "HyperINR": "simply there", "mLoRA": "clustered", "cohort": "not comparable"}
    assert rows["cohort"]["why_not"].startswith("data/set, 16 pixels a side, 99 training") and "99 training" in out
    assert short[0] == ["images", "stored as", "seeds", *spaces.SHORT.values(), "the class is"]
    assert [row[1] for row in short[2:]] == ["MWT", "HyperINR", "mLoRA", "cohort", "pixels"]
    assert short[2] == ["set", "MWT", "3", "30", "31.0 [28.5, 33.5]", "30.0", "40.0", "50.1 [49.9, 50.3]", "routed"]
    assert short[-1] == ["set", "pixels", "", "", "", "30.0", "30.0", "45.0 (n = 2)", ""], short[-1]
    cells = rows["MWT"]["cells"]
    expected = {"numbers": 30, "psnr": 31, "R": 0.501, "own": 0.5, "G": 0.3, "L": 0.4, "R - G": 0.201, "R - L": 0.101,
                "L - G": 0.1, "pixels R": 0.45, "pixels G": 0.3, "pixels L": 0.3, "late": 0.07, "bias column": 0.1,
                "columns": 0.03, "components": 0.03, "colour": 0.12, "share": 0.25}
    assert set(expected) == set(spaces.COLUMNS)
    assert all(np.isclose(cells[column][0], value) for column, value in expected.items()), cells
    assert np.allclose(cells["R"], [*measures.t_interval([0.5, 0.501, 0.502]), 3]) and rows["MWT"]["seeds"] == [0, 1, 2]
    assert cells["pixels R"][3] == 2 and "(n = 2)" in out       # a figure of fewer seeds says so
    one = {row["space"]: row["answer"] for row in spaces.rows(reports[4:8], [])}
    assert one["MWT"] == "not decided by one seed"
    wider = dict(reports[4]["training"], width=9)
    for change, words in ((dict(training=wider), "2 settings of this name"), (dict(bank=9), "data/set, 16 pixels"),
                          (dict(unfinished=True), "a run is not finished"), (dict(data="other/set"), "data/set, 16")):
        found = spaces.rows([*reports[::4], space_report("mwt", 7, 0.5, 0.3, 0.4) | change], [])
        assert words in found[0]["why_not"] and found[0]["answer"] == "not comparable", (change, found)


def test_answers_of_the_table():
    """A row's answer is another than the leads of R and L over G, and of R over L, say."""
    for R, G, L, expected in (
            (0.5, 0.3, 0.4, "routed"), (0.4, 0.3, 0.5, "simply there"), (0.4, 0.41, 0.5, "simply there"),
            (0.4, 0.5, 0.51, "clustered"), (0.4, (0.2, 0.6, 0.4), 0.5, "not routed"),
            (0.5, 0.3, (0.4, 0.5, 0.6), "not clustered"), ((0.3, 0.5, 0.7), 0.4, 0.4, "not decided here"),
            (0.98, 0.9, 0.97, "simply there"), (0.99, 0.97, 0.97, "no verdict: ceiling"),
            (0.08, 0.08, 0.08, "no verdict: floor"), (0.08, 0.2, 0.5, "simply there")):
        R, G, L = (x if isinstance(x, tuple) else (x,) * 3 for x in (R, G, L))
        found, = spaces.rows([space_report("mwt", seed, R[seed] - 0.001 * seed, G[seed], L[seed])
                              for seed in range(3)], [])
        assert found["answer"] == expected, (R, G, L, found["answer"])


def test_recorded_table():
    """A figure of the table on its page or in the README is not what the recorded reports say."""
    page, readme = ((HERE / name).read_text() for name in ("results/four_spaces.md", "README.md"))
    program, *words = shlex.split(page[page.index("python spaces.py results/"):].split("```")[0])[1:]
    *patterns, out = [HERE / word for word in words if word != "--out"]
    reports = [path for pattern in patterns for path in sorted(glob.glob(str(pattern)))]
    assert program == "spaces.py" and len(reports) > 30
    with folder(), replaced(figures, "spaces_figure", lambda *_: None):
        assert command([*reports, "--out", "again"], spaces.main)[0] == 0
        again, recorded = (json.loads((path / "table.json").read_text()) for path in (Path("again"), out))
        assert again == recorded and Path("again/table.md").read_text() in page
    cifar = [row for row in recorded["rows"] if row["data"] == "cifar10-jpeg"]
    assert spaces.in_short(cifar) in readme and (out / "table.png").exists()


# ---- The command -----------------------------------------------------------------------------------------------------

def diagnosed(*argv, status=0) -> str:
    """What diagnostics.py prints; of one that is refused the one line it says, less its beginning."""
    got, out, err = command(["--ckpt", *argv], diagnostics.main)
    assert got == status, (argv, got, out, err)
    start = f"diagnostics.py: {'error: ' * (status == 2)}"
    assert not status or err.count("\n") == 1 and err.startswith(start) and not out, (argv, out, err)
    assert all(len(line) <= 100 for line in out.splitlines()) and "nan" not in out, out
    return err.removeprefix(start).strip() if status else out


def report_in(path) -> dict:
    return json.loads(Path(path, "report.json").read_text())


@contextlib.contextmanager
def quickly():
    """What takes most of the time is left out: in place of trained classifiers the nearest mean, empty pictures."""
    mean = lambda fit, settings, bank, labels, x: (measures.nearest_mean_predict(bank, labels, x), 0.5)
    with replaced(diagnostics, "fit_probe", mean), \
            replaced(figures.Figure, "savefig", lambda figure, path: Path(path).touch()):
        yield


def names_in(path) -> set[str]:
    return {p.name for p in Path(path).iterdir()}


def no_row_is_folded(experiments: dict):
    """A table's rows, unlike the words below it, fit into 100 columns as they are."""
    for name, result in experiments.items():
        text = diagnostics.EXPERIMENT[name][1](result)
        assert all(len(line) <= 100 for line in text.split("\n") if "  " in line), text


FILES = {"clustering": "clustering.png", "token-flow": "token_flow.png", "bias-route": "bias_route.png",
         "content": "content.png"}


def test_diagnostics_command():
    with folder() as here:
        assert command([*TINY, "--fraction", "0.5"])[0] == 0
        out = diagnosed("out.pt", "--samples", 80, "--repeats", 2)
        assert all(f"\n{claim}, " in out for claim in ("C1a", "C1b", "C2a", "C3")) and "left out" not in out
        assert names_in("out-diagnostics") == {*FILES.values(), "summary.png", "report.json"}
        assert all(p.read_bytes().startswith(b"\x89PNG") for p in here.glob("out-diagnostics/*.png"))
        report = report_in("out-diagnostics")["model"]
        done, clusters = report["experiments"], report["experiments"]["clustering"]
        rows = {row["coordinate"]: row for row in clusters["rows"]}
        assert report["bank"] == 80 and rows["bias column"]["d"] == 16 and rows["phi - theta"]["d"] == 8 * 3 + 16 * 9
        assert "mlp" in rows["phi - theta"] and not report["whole_bank"] and "80 training images only" in out
        assert len(done["token-flow"]["rows"]) == 4 and len(done["token-flow"]["knock_outs"]) == 2
        assert report["method"] == "mwt" and set(done) == set(FILES)
        assert report["command"].startswith("python train.py") and "--fraction=0.5" in report["command"]
        no_row_is_folded(done)
        model, args = checkpoint.load_checkpoint("out.pt")
        accuracy = train.evaluate(model, data.load_dataset(args)[1])["test_accuracy"]
        assert report["reader"] == accuracy == done["bias-route"]["reader"]
        some = ["out.pt", "--only", "bias-route", "content", "--samples", 80, "--repeats", 2, "--out", "again"]
        diagnosed(*some)                           # two runs say the same
        assert report_in("again")["model"]["experiments"] == {key: done[key] for key in ("bias-route", "content")}
        diagnosed("out.pt", "--only", "content", "--repeats", 1, "--out", "again")
        assert names_in("again") == {"report.json", "content.png", "summary.png"}      # nothing of the run before

        def interrupted(*_, **more):       # as Ctrl-C would, and also where a background shell has SIGINT ignored
            raise KeyboardInterrupt
        with replaced(diagnostics, "token_flow", interrupted), quickly():
            assert diagnosed("out.pt", "--out", "part", status=130) == "interrupted"
        assert set(report_in("part")["model"]["experiments"]) == {"clustering"}        # what was done by then
        with replaced(diagnostics, "SIZES", (60, 1000)), quickly():
            out = diagnosed("out.pt", "--only", "learning-curve", "--out", "curve")
        curve = report_in("curve")["model"]["experiments"]["learning-curve"]
        assert [row["images"] for row in curve["rows"]] == [60, 160] and "reader - linear, points" in out
        assert names_in("curve") == {"report.json", "learning_curve.png", "summary.png"}
        no_row_is_folded({"learning-curve": curve})
        with quickly(), replaced(diagnostics, "SAME", diagnostics.SAME | dict(width=8, head_dim=4, epochs=3)):
            out = diagnosed("out.pt", "--only", "same-reader", "--out", "same")
        found = report_in("same")["model"]["experiments"]["same-reader"]
        assert "16 tokens of 9" in out and found["recipe"]["epochs"] == 3
        tested = train.evaluate(model, data.load_dataset(args)[1])["test_psnr"]
        assert np.isclose(found["psnr"], tested, atol=0.3)      # that is of drawn pixels


def test_same_reader():
    """A reader trained on planted tokens does not tell their class, or tells one that is not there."""
    labels, classes = torch.arange(120) % 3, torch.randn(3, 4, 5)
    for there, low, high in ((1, 0.95, 1), (0, 0.15, 0.55)):
        tokens = there * classes[labels] + 0.3 * torch.randn(120, 4, 5)
        bank, queries = (diagnostics.Fitted(torch.full((60, 1, 2, 2), 0.5), labels[rows], tokens[rows])
                         for rows in (slice(60), slice(60, 120)))
        model = argparse.Namespace(reconstruct=lambda images: images + 0.2)           # (0.2 / 2)^2: 20 dB
        with quickly(), replaced(diagnostics, "SAME", diagnostics.SAME | dict(width=8, head_dim=4, epochs=60, lr=1e-2)):
            found = diagnostics.same_reader(model, bank, queries, settings.settings({}))
        assert low <= found["reader"] <= high and np.isclose(found["psnr"], 20), found


def test_diagnostics_of_several_checkpoints():
    with folder(), quickly():
        flags = [*TINY, "--epochs", 1, "--steps", 1, "--reader-depth", 0, "--val", 0.2, "--out"]
        for more in (["out.pt"], ["wt.pt", "--w-task", 0]):
            assert command([*flags, *more])[0] == 0
        out = diagnosed("out.pt", "wt.pt", "--only", "clustering", "token-flow", "--out", "both")
        assert "No setting has three seeds" in out
        assert names_in("both") == {"out", "wt", "report.json", "models.png"}
        assert names_in("both/wt") == {"report.json", "clustering.png", "token_flow.png", "summary.png"}
        result, one = report_in("both")["across"], report_in("both/out")["model"]
        assert [p["label"] for p in result["points"]] == ["MWT", "WT"]
        assert f"on {one['test']} held-out training images" in out
        Path("sub").mkdir()
        shutil.copy("wt.pt", "sub/out.pt")         # two of one name
        diagnosed("out.pt", "sub/out.pt", "--only", "content", "--repeats", 1, "--out", "two")
        assert names_in("two") == {"out-1", "out-2", "report.json", "models.png"}


def test_diagnostics_refuses():
    with folder():
        assert command([*TINY, "--epochs", 1])[0] == 0
        shutil.copy("out.pt", "copy.pt")
        Path("short.pt").write_bytes(Path("out.pt").read_bytes()[:5000])
        Path("file").touch()
        content = checkpoint.read_checkpoint("out.pt")
        checkpoint.save_checkpoint("small.pt", content | {"args": content["args"] | {"test_size": 20}})
        parameters = content["model"]
        parameters["reader.head.weight"][:] = 3e38
        checkpoint.save_checkpoint("large.pt", content)
        parameters["reader.head.bias"][0] = math.nan
        checkpoint.save_checkpoint("nan.pt", content)
        before = sorted(Path().rglob("*"))
        for argv, *words in (
                (["gone.pt"], "gone.pt"), (["out.pt", "short.pt"], "short.pt", "truncated"), ([], "--ckpt"),
                (["out.pt", "copy.pt"], "out.pt", "the same run"),
                (["small.pt"], "20 test images", "at least 24"), (["out.pt", "--samples", 3], "--samples", "24"),
                (["out.pt", "--samples", 161], "--samples 161", "160 training images"),
                (["out.pt", "--dataset", "nowhere"], "nowhere"), (["out.pt", "--only", "magic"], "--only", "magic"),
                (["out.pt", "--out", "no/such"], "--out no/such"), (["out.pt", "--out", "file"], "--out file"),
                (["out.pt", "--device", "abacus"], "--device abacus"), (["nan.pt"], "parameters are not finite")):
            said = diagnosed(*argv, status=2)
            assert all(word in said for word in words), (argv, said)
        coloured = data.Images(list("ab"), torch.arange(40) % 2, torch.zeros(40, 3, 8, 8, dtype=torch.uint8))
        with replaced(diagnostics, "load_dataset", lambda *_: (coloured, coloured)):
            said = diagnosed("out.pt", "--dataset", "own", status=2)
            assert said == "--dataset own: other channels or classes than out.pt has"
        assert sorted(Path().rglob("*")) == before
        assert diagnosed("large.pt", status=2) == "large.pt: its fits or predictions are not finite"


def test_a_bank_that_does_not_fit():
    with folder():
        assert command([*TINY, "--epochs", 1])[0] == 0
        one, tests = 4 * 16 * 9, 6 * 40            # bytes of an image's fit; what 40 test images come to
        with replaced(diagnostics, "free_memory", lambda device: one * (4 * 100 + tests) + 100):
            said = diagnosed("out.pt", status=2)
            assert "160 fitted images" in said and "--samples 100, which would fit" in said
            diagnosed("out.pt", "--samples", 100, "--only", "content", "--repeats", 1)
            assert "101 fitted images" in diagnosed("out.pt", "--samples", 101, status=2)
        with replaced(diagnostics, "free_memory", lambda device: one * (4 * 20 + tests)):      # fewer than it takes
            assert "--samples 20" not in diagnosed("out.pt", status=2)


# Methods that are no MWT, with settings of their own and just what diagnostics asks for. Planted: strips of an image
# through a fixed matrix. Bare: the pixels and the nearest mean.
PLANTED = '''
import torch
from torch import nn
from reader import Reader

class Planted(nn.Module):
    def __init__(self, args, classes):
        super().__init__()
        self.register_buffer("matrix", torch.randn(16, 6, generator=torch.Generator().manual_seed(args["seed"])))
        self.reader = Reader(4, 8, classes, features=7, depth=2, head_dim=4, token_scale=1.0)
    def fit(self, images):                                     # (N, 1, 8, 8) -> (N, 4, 7)
        strips = images.flatten(1).unflatten(1, (4, 16))
        return torch.cat([strips @ self.matrix, strips.mean(2, keepdim=True)], 2)
    def read(self, tokens):
        return self.reader(tokens)
    def trace(self, tokens):
        return self.reader.trace(tokens)
    def parts(self):
        return {"bias column": torch.eye(7)[:, -1:]}
    def coordinates(self, images, tokens):
        return {"first strip": tokens[:, 0]}

class Bare(nn.Module):
    def __init__(self, args, classes):
        super().__init__()
        self.reader, self.means = None, nn.Parameter(torch.zeros(classes, 64))
    def fit(self, images):
        return images.flatten(1).unflatten(1, (4, 16))
    def read(self, tokens):
        return -torch.cdist(tokens.flatten(1), self.means)
    def trace(self, tokens):
        return self.read(tokens), [("input map", tokens), ("logits", self.read(tokens)[:, None])]
    def parts(self):
        return {}

def from_checkpoint(content, device):
    model = (Planted if "knots" in content["args"] else Bare)(content["args"], len(content["data"][1]))
    model.load_state_dict(content["model"])
    return model.to(device)
'''
DATA = dict(dataset="digits", data_root="data", size=8, train_size=160, test_size=40, val=0.0, workers=0)


@contextlib.contextmanager
def planted_method():
    """Its file in a temporary folder; yields its module."""
    with folder() as here, quickly():
        (here / "planted.py").write_text(PLANTED)
        sys.path.insert(0, str(here))
        checkpoint.METHODS["planted"] = "planted"
        try:
            import planted
            yield planted
        finally:
            sys.path.remove(str(here))
            del checkpoint.METHODS["planted"], sys.modules["planted"]


def save_planted(path, model, classes=10, **args):
    content = {"method": "planted", "args": DATA | args, "data": (1, [str(c) for c in range(classes)], 160)}
    checkpoint.save_checkpoint(path, content | {"model": model.state_dict(), "metrics": {}})


def test_a_method_that_is_no_mwt():
    with planted_method() as planted:
        images, test = data.load_dataset(argparse.Namespace(**DATA))
        pixels, asked = images.signal(images.pixels), test.signal(test.pixels)
        for seed in range(3):
            model = planted.Planted({"seed": seed}, 10)
            recipe = settings.settings(dict(width=8, reader_depth=2, head_dim=4, lr=1e-2, seed=seed))
            model.reader = train.train_reader(model.fit(pixels), images.labels, recipe)
            model.reader.embed.weight.data *= model.reader.token_scale         # one of its own would be a setting
            model.reader.token_scale = 1.0
            save_planted(f"{seed}.pt", model, seed=seed, knots=5)
        out = diagnosed("2.pt", "--repeats", 2, "--out", "full")
        report = report_in("full")["model"]
        done, right = report["experiments"], (model.read(model.fit(asked)).argmax(1) == test.labels).double().mean()
        assert report["method"] == "planted" and report["reader"] == float(right) > 0.2 and report["left_out"] == []
        assert set(done) == set(FILES) and names_in("full") == {*FILES.values(), "summary.png", "report.json"}
        rows = {row["coordinate"]: row["d"] for row in done["clustering"]["rows"]}
        assert rows["first strip"] == 7 and rows["phi - theta"] == 28 and rows["after the reader's input map"] == 32
        assert len(done["token-flow"]["knock_outs"]) == 4 and "\nC3, " in out
        assert "planted.py" in report["command"] and "--knots=5" in report["command"]

        bare = planted.Bare({}, 10)
        bare.means.data = torch.stack([pixels[images.labels == c].flatten(1).mean(0) for c in range(10)])
        save_planted("bare.pt", bare, seed=0)
        out, report = diagnosed("bare.pt", "--out", "bare"), report_in("bare")["model"]
        titles = ["untrained reader, logit lens, knock-outs", "bias-route", "content"]
        assert [line.split(":")[0] for line in report["left_out"]] == titles and report["reader"] > 0.6
        assert all(f"\nleft out: {line}\n" in out for line in report["left_out"])
        assert "\nC2a, classes come apart late: no verdict. There is" in out
        assert set(report["experiments"]) == {"clustering", "token-flow"} and "\nC3, " not in out
        assert names_in("bare") == {"report.json", "summary.png", "clustering.png", "token_flow.png"}
        diagnosed("bare.pt", "--only", "content", "--out", "nothing")
        assert names_in("nothing") == {"report.json", "summary.png"}

        # a comparison: of train.py's flags they have those of the data alone
        assert command([*TINY, "--epochs", 1])[0] == 0
        out = diagnosed("0.pt", "1.pt", "2.pt", "out.pt", "--only", "clustering", "--out", "models")
        result = report_in("models")["across"]
        assert (result["models"], result["settings"]) == (3, 1)
        assert [row["n"] for row in result["seeds"]] == [3] and out.count("\nC1a, planted, 3 seeds: ") == 1


def test_models_that_are_always_right_or_wrong():
    """No spread of a class, a bias column that never changes, images that are all the same."""
    labels, column = torch.arange(60) % 2, torch.arange(8)
    light = (4 * labels + 6)[:, None, None].expand(60, 8, 8)
    stripes = 16 * (column // (1 + labels[:, None, None]) % 2).expand(60, 8, 8)        # a row's mean is 0
    for pixels, sign, accuracy, fisher in ((light, 1, 1, None), (light, -1, 0, None), (stripes, 1, 0.5, None),
                                           (0 * light + 5, 1, 0.5, 0)):
        found = data.Images(["0", "1"], labels, pixels.to(torch.uint8)[:, None], levels=16)
        with planted_method() as planted, replaced(diagnostics, "load_dataset", lambda *_: (found, found)):
            model = planted.Planted({"seed": 0}, 2).requires_grad_(False)
            for name, p in model.reader.named_parameters():
                p.mul_(not name.endswith(("layer_scale", "embed.weight", "head.weight", "bias")))
            model.reader.embed.weight[0, -1] = 1       # the mean brightness alone decides
            model.reader.head.weight[:, 0] = torch.tensor([-sign, sign])
            save_planted("out.pt", model, classes=2, seed=0, knots=5)
            diagnosed("out.pt", "--repeats", 1)
            report = report_in("out-diagnostics")["model"]
            done = report["experiments"]
            assert report["reader"] == accuracy and set(done) == set(FILES)
            no_row_is_folded(done)
            assert done["clustering"]["rows"][0]["fisher"] == fisher


def test_nothing_is_claimed_of_nothing():
    """A model of images whose labels were shuffled, or whose reader is untrained, supports a claim."""
    def shuffled(args, device="cpu"):
        return [data.Images(found.classes, found.labels[torch.randperm(len(found), generator=torch.Generator()
                .manual_seed(1))], found.pixels, levels=found.levels) for found in load(args, device)]
    with folder():
        assert command([*TINY, "--epochs", 1, "--reader-depth", 2, "--out", "trained.pt"])[0] == 0
        content = checkpoint.read_checkpoint("trained.pt")
        untrained = train.MWT(argparse.Namespace(**content["args"] | {"seed": 9}), 1, 10).reader
        content["model"] |= {f"reader.{name}": value for name, value in untrained.state_dict().items()}
        checkpoint.save_checkpoint("untrained.pt", content | {"args": content["args"] | {"seed": 1}})
        for path, loader in (("untrained.pt", data.load_dataset), ("trained.pt", shuffled)):
            load = data.load_dataset
            with replaced(diagnostics, "load_dataset", loader), quickly():
                diagnosed(path, "--repeats", 2)
            summary = report_in(path[:-3] + "-diagnostics")["model"]["summary"]
            verdicts = [verdict_of([line], "C") for line in summary if line.startswith("C")]
            assert len(verdicts) == 4 and "supported" not in verdicts, summary


def start_program(program, argv, threads="OMP_NUM_THREADS=1") -> subprocess.Popen:
    """A program as a process of its own."""
    return subprocess.Popen([sys.executable, str(HERE / program), *map(str, argv)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=os.environ | dict([threads.split("=")]))


# ---- interventions.py --------------------------------------------------------------------------------

SWEEP = [*TINY, "--epochs", "1", "--seeds", "1", "--out", "sweep"]
FLOPS = {}


def sweep(argv) -> tuple[int, str, str]:
    """No figure a run, and FLOPs counted once."""
    def count(args, channels, classes):
        free = {"out", "seed", "epochs", "w_task"}
        key = str({name: value for name, value in vars(args).items() if name not in free})
        FLOPS[key] = FLOPS.get(key) or bench.step_flops(args, channels, classes)
        return FLOPS[key]

    with replaced(figures, "training_figure", lambda *more: None), replaced(interventions, "step_flops", count):
        return command(argv, interventions.main)


def run_file(name, pattern) -> Path:
    return next((Path(name) / "runs").glob(pattern))


def same_weights(a, b) -> bool:
    return same(read_checkpoint(a)["model"], read_checkpoint(b)["model"])


def planted_runs(accuracies: dict, purities: dict | None = None, n=1000) -> dict:
    """Runs, one a seed, of {lane: accuracies}."""
    order, runs = torch.randperm(n, generator=torch.Generator().manual_seed(0)), {}
    for lane, values in accuracies.items():
        for seed, accuracy in enumerate(values):
            runs[lane, seed] = dict.fromkeys(interventions.MEASURES, 1.0) | {
                "lane": lane, "reader": accuracy, "purity": (purities or {}).get(lane, values)[seed], "parameters": 1,
                "right": "".join("01"[int(i)] for i in order < round(accuracy * n)), "gflop_per_image": 1.0,
                "training": {"epochs": 10}}
    return runs


def judged(gains: dict, purities: dict | None = None, noise=0.001, seeds=5) -> dict[str, str]:
    """{claim: verdict} of runs with these gains over 50%, and noise of each run's own."""
    g = torch.Generator().manual_seed(0)

    def values(level, spread):
        return [level + 0.01 * seed + spread * float(torch.randn((), generator=g)) for seed in range(seeds)]
    report = interventions.summarise(planted_runs(
        {lane: values(0.5 + gain, noise) for lane, gain in gains.items()},
        {lane: values(purity, 0.0005) for lane, purity in (purities or {}).items()}))
    lines = interventions.judge(report["differences"], report["factorial"])
    return dict(line.split("; ")[0].split(": ", 1) for line in lines if line.startswith("C"))


def test_factorial_on_planted_accuracies():
    """Cells do not give the effects that were planted, by seed and over images."""
    a, b, c = torch.tensor(interventions.CELLS, dtype=torch.float64).T
    planted = 0.5 + 0.04 * a + 0.02 * b + 0.01 * c - 0.03 * a * b + 0.02 * a * b * c
    by_hand = {"all - added up": -0.03 + 0.02, "route": 0.04 - 0.03 / 2 + 0.02 / 4, "bias": 0.02 - 0.03 / 2 + 0.02 / 4,
               "dense": 0.01 + 0.02 / 4, "route x bias": -0.03 + 0.02 / 2, "route x dense": 0.02 / 2,
               "bias x dense": 0.02 / 2, "route x bias x dense": 0.02}
    runs = planted_runs({lane: [x, x + 0.1] for lane, x in zip(interventions.CELL_LANES, planted.tolist())})
    found = interventions.summarise(runs)["factorial"]
    assert set(found) == set(by_hand)
    for name, value in by_hand.items():
        assert np.allclose([*found[name]["over_seeds"], found[name]["over_images"][0]], value, atol=1e-6), name
    del runs["dense", 1], runs["baseline", 0]
    assert interventions.summarise(runs)["factorial"] == {}


def test_acting_helps_on_planted_runs():
    """C4: a gain that nothing explains away; one of compute, of any column, of chance; a loss; too few seeds."""
    gains = {"baseline": 0.0, "baseline@route": 0.01, "route": 0.05, "baseline@dense": 0.032, "dense": 0.03,
             "baseline@deeper": 0.02, "deeper": 0.0, "baseline@bias": 0.0, "column": 0.0, "column-random": 0.01,
             "bias": 0.04, "baseline@column": 0.0, "route+dense": -0.02, "baseline@route+dense": 0.03}
    assert judged(gains) == {           # column-random: without its compute's baseline
        "C4, route": "supported", "C4, bias": "supported", "C4, route+dense": "refuted",
        **dict.fromkeys(("C4, dense", "C4, column", "C4, deeper"), "not decided here")}
    for control in ("column", "column-random"):        # any column would do
        assert judged(gains | {control: 0.04})["C4, bias"] == "not decided here"
    assert judged(gains, seeds=4) == {}
    assert judged(gains, noise=0.06)["C4, route"].startswith("cannot be seen at this power (least effect ")
    alone = {lane: gains[lane] for lane in ("baseline", "route", "baseline@route")}
    assert judged(alone, noise=0.015)["C4, route"] == "supported"              # Holm: not beside five lanes more
    assert judged(alone | gains, noise=0.015)["C4, route"].startswith("cannot be seen")


def test_power_of_a_gain():
    """C4's interval does not hold the planted gain in 95% of repeats, or its power at the least effect is not 80%."""
    g, repeats, spread = torch.Generator().manual_seed(0), 1000, [-1.0, 0.0, 0.0, 1.0, 0.0]
    gain, covered, seen = interventions.detectable(spread) / np.std(spread, ddof=1), 0, 0
    for _ in range(repeats):
        _, low, high = measures.t_interval((gain + torch.randn(5, generator=g)).tolist())
        covered, seen = covered + (low <= gain <= high), seen + (low > 0)
    assert 0.93 <= covered / repeats <= 0.97 and 0.74 <= seen / repeats <= 0.86, (covered, seen)


def test_adding_up_on_planted_runs():
    """Additive gains, gains that cancel, none, and noise in which nothing could be seen."""
    def verdict(single, beyond=0.0, **more):
        gains = {lane: sum(single.get(part, 0) for part in lane.split("+")) for lane in interventions.CELL_LANES}
        gains["route+bias+dense"] += beyond
        return judged(gains, **more).get("C4, adding up")
    single = {"route": 0.05, "bias": 0.02, "dense": 0.01}
    assert verdict(single) == "additive" and verdict(single, -0.05) == verdict(single, -0.02) == "not additive"
    assert verdict(single, seeds=2) is None and verdict(single, noise=0.02).startswith("no verdict: ")
    assert verdict({}) == verdict({"route": -0.05}) == verdict(single, noise=0.02)
    unsure = {"over_seeds": (0.01, -0.003, 0.023), "least": 0.018}
    assert interventions.additivity_verdict(unsure, True) == "not decided here"


def test_pressure_on_planted_runs():
    """C1c: classes that hurt more than random labels; random labels that hurt as much; a gain; no control."""
    purities = {"baseline64": 0.2, "cluster1": 0.3, "cluster-random1": 0.2, "cluster0.1": 0.2, "cluster0.01": 0.3}
    gains = {"baseline64": 0.0, "cluster1": -0.05, "cluster-random1": -0.01, "cluster0.1": -0.05, "cluster0.01": -0.05}
    assert judged(gains, purities, seeds=3) == {       # cluster0.1 lacks its random labels, 0.01 has none
        "C1c, cluster1": "supported", "C1c, cluster0.01": "not decided here"}
    for changed, expected in (({"cluster-random1": -0.05}, "not decided here"), ({"cluster1": 0.05}, "refuted")):
        assert judged(gains | changed, purities, seeds=3)["C1c, cluster1"] == expected
    assert judged(gains, purities | {"cluster1": 0.2}, seeds=3)["C1c, cluster1"] == "not decided here"
    assert judged(gains, purities, seeds=2) == {}


def test_differences_of_planted_runs():
    """A difference is not of the seeds that both have; intervals over seeds and over images share a column; the
    correlation is of other lanes than those of the class loss."""
    runs = planted_runs({"baseline": [0.5, 0.6, 0.7], "wt": [0.0, 0.5, 0.6], "task1": [0.45], "task10": [0.3],
                         "deeper": [0.9], "baseline@wt": [0.9]})
    del runs["wt", 0]
    found = interventions.summarise(runs)["differences"]
    wt = found["wt - baseline"]
    assert np.allclose(wt["over_seeds"], -0.1) and found["deeper - baseline"]["over_seeds"] is None
    pair = (interventions.hits(runs[lane, 1]) for lane in ("wt", "baseline"))
    assert np.allclose(wt["over_images"], measures.paired_bootstrap(*pair))
    titles, *rows = interventions.contrast_table(found).split("\n")
    assert rows[0].count("[") == 2 and rows[-1].count("[") == 1 and rows[-1].index("[") > titles.index("over images")
    assert "accuracy +1.00 (no interval) over 7 models" in interventions.correlation(runs)[0]


def test_what_a_lane_loses():
    """The class planted in the bias column, read by the reader's blocks alone or by the branch alone: exchanged, it
    costs there and only there."""
    model = tiny_model(branch="bias", classes=2)
    images, labels = batch(60, classes=2)
    tokens = torch.randn(60, 16, 9, generator=generator("tokens")) * 1e-3
    tokens[..., -1] = (2 * labels[:, None] - 1) * 1e-3
    fits, other = Fitted(images, labels, tokens), routes.donors(labels, "any", 0, 0)

    def lost(**exchanged):
        return 1 - diagnostics.accuracy(interventions.predictions(model, fits, **exchanged), labels)
    reader = model.reader
    with torch.no_grad():
        for p in reader.parameters():
            p.zero_()
        for where in ("blocks", "branch"):
            if where == "blocks":
                reader.embed.weight[0, -1], reader.head.weight[1, 0], reader.head.weight[0, 0] = 1.0, 1.0, -1.0
            else:
                reader.head.weight.zero_()
                reader.branch.up.weight[0] = 1.0
                reader.branch.down.weight[1, 0], reader.branch.down.bias[0] = 1.0, 0.5
            assert lost() == 0, where
            for place in ("blocks", "branch"):
                cost = lost(**{place: other})
                assert cost > 0.3 if place == where else cost == 0, (where, place, cost)


def test_sweep_command():
    """A small sweep: a lane is not what it says, its printed command gives other weights, what is finished is made
    again, a run that fails ends it."""
    lanes = ["cluster1", "cluster-random1", "column", "colour", "deeper", "baseline@deeper", "route+bias+dense"]
    half = [*SWEEP, "--fraction", "0.5", "--lanes"]
    with folder() as here:
        status, out, err = sweep([*half, *lanes])
        assert status == 0 and not err, (out, err)
        text, runs = Path("sweep/report.md").read_text(), interventions.read_runs(here / "sweep")
        runs = {lane: run for (lane, _), run in runs.items()}
        assert set(runs) == {"baseline", "baseline64", *lanes}
        assert names_in("sweep") == {"runs", "sweep.json", "report.md", "report.json", "lanes.png", "clusters.png"}
        saved = {}
        for lane, run in runs.items():         # the model's own accuracy, of a colour branch and drawn pixels too
            content = read_checkpoint(run_file("sweep", f"{lane}-seed0.pt"))
            saved[lane] = content["args"]
            assert content["metrics"]["test_accuracy"] == run["reader"] == run["right"].count("1") / 40, lane
            assert (run["lost_branch"] is None) == (saved[lane]["branch"] is None)
        random = {"batch_size": 64, "w_cluster": 1.0, "cluster_random": True, "out": saved["cluster-random1"]["out"]}
        assert not saved["cluster1"]["cluster_random"] and saved["cluster-random1"] == saved["cluster1"] | random
        joined = {"steps": 6, "fraction": 1.0, "branch": "bias", "readout": 8}
        assert saved["route+bias+dense"] | joined == saved["route+bias+dense"]
        assert saved["column"]["branch"] == f"column:{runs['baseline']['highest_column']}"
        cost = {lane: run["gflop_per_image"] * run["training"]["epochs"] for lane, run in runs.items()}
        assert cost["deeper"] > 1.5 * cost["baseline"] and abs(cost["baseline@deeper"] / cost["deeper"] - 1) < 0.005
        for lane in ("column", "cluster-random1", "baseline@deeper"):
            line = interventions.command_of(runs[lane])
            threads, program, file, *words = shlex.split(line)
            assert line in text and [threads, program, file] == ["OMP_NUM_THREADS=1", "python", "train.py"]
            if lane == "column":
                assert finish(start_program("train.py", words, threads))[0] == 0
            else:
                trained(words)
            assert same_weights(run_file("sweep", f"{lane}-*.pt"), f"{lane}-seed0.pt"), lane
        # what is there stays, and a report is of all of it
        before = {path: path.stat().st_mtime_ns for path in (here / "sweep" / "runs").iterdir()}
        for argv in (["--report-only", "--out", "sweep"], [*half, "deeper", "--device", "cpu"]):
            status, again, err = sweep(argv)
            assert status == 0 and out.endswith(again) and all(len(line) <= 100 for line in again.splitlines()), err
        assert {path: path.stat().st_mtime_ns for path in (here / "sweep" / "runs").iterdir()} == before
        # runs that fail do not end the sweep
        run_file("sweep", "cluster1-*.diagnosis.json").unlink()
        run_file("sweep", "cluster1-*.pt").write_text("no checkpoint")
        status, out, err = sweep([*half, "cluster1", "deeper"])
        assert status == 1 and "not a checkpoint" in err and "failed: cluster1 seed 0;" in err and "\ndeeper " in out
        status, out, err = sweep([*SWEEP, "--lanes", "wt", "column", "--lr", "1e30", "--out", "bad"])
        assert status == 1 and err.count("not finite") == 2 and "no run is finished" in err, (out, err)
        assert "column seed 0\nleft out: needs its seed's baseline" in out, out


def test_what_a_sweep_refuses():
    """All that can be wrong is named in one line before any work, and nothing is made or changed."""
    def rejected(argv, word):
        refused(argv, word, main=interventions.main)

    with folder() as here, replaced(interventions, "step_flops", lambda args, *_: args.reader_depth):
        assert sweep([*SWEEP, "--lanes", "baseline"])[0] == 0
        for argv, word in (
                (["--lanes", "all", "magic"], "magic"), (["--lanes", "baseline@magic"], "baseline@magic"),
                (["--lanes", "bias+bias"], "--branch"), (["--lanes", "bias+colour", "--out", "new"], "colour: two"),
                (["--seeds", "0"], "--seeds"), (["--train-size", "200"], "--train-size 160, not 200"),
                (["--out", "."], "not of a sweep"), (["--out", "sweep/sweep.json"], "not of a sweep"),
                (["--steps-test", "2"], "--steps-test"), (["--branch", "magic"], "--branch")):
            rejected([*SWEEP, *argv], word)
        rejected(["--report-only", "--out", "new"], "not of a sweep")
        for path in (run_file("sweep", "*.diagnosis.json"), here / "sweep" / "sweep.json"):
            kept = path.read_text()
            for damaged in ("{}", "[]", kept[:len(kept) // 2]):
                path.write_text(damaged)
                for argv in ([*SWEEP, "--lanes", "baseline"], ["--report-only", "--out", "sweep"]):
                    rejected(argv, "damaged")
            path.write_text(kept)
    assert interventions.with_baselines(["bias+route", "cluster0.1+bias"]) == [
        "baseline", "baseline64", "cluster0.1+bias", "route+bias"]
    assert interventions.with_baselines(["baseline@bias+route", "dense"]) == [
        "baseline", "dense", "baseline@route+bias"]


@folder()
def test_claimed_runs():
    """A claim is not respected, or is for ever where it and the checkpoint have been silent for long."""
    claim, saved = Path("run.claim"), Path("run.pt")
    for minutes, ages, taken in ((5, {}, True), (5, {claim: 590}, False), (5, {claim: 610}, True),
                                 (5, {claim: 900, saved: 590}, False), (5, {claim: 590, saved: 900}, False),
                                 (5, {claim: 900, saved: 610}, True), (20, {claim: 900, saved: 610}, False)):
        for path in names_in("."):
            Path(path).unlink()
        for path, age in ages.items():
            path.touch()
            os.utime(path, (time.time() - age,) * 2)
        args = types.SimpleNamespace(out="run.pt", save_minutes=minutes)
        assert interventions.claim(args) == taken and claim.exists() and not interventions.claim(args), ages


def test_two_sweeps_share_a_folder():
    """Each run is made once, by one of them; the report covers the seeds of both."""
    with folder() as here:
        flags = [*TINY, "--lanes", "wt", "--out", "sweep"]
        process = start_program("interventions.py", [*flags, "--seeds", 1])
        wait_for(lambda: list(Path().glob("sweep/runs/*.claim")), process)
        ends = sweep([*flags, "--seeds", 2]), finish(process)
        assert [status for status, _, _ in ends] == [0, 0], ends
        assert "seed 0\nleft out: of another process" in ends[0][1], ends     # it went on with others
        assert sum(out.count("epoch   1/2") for _, out, _ in ends) == 4
        assert [*interventions.read_runs(here / "sweep")] == [("baseline", 0), ("baseline", 1), ("wt", 0), ("wt", 1)]


def test_killed_sweep_goes_on():
    """Killed at a random moment, and stopped by a signal, the same command ends as one that was not."""
    recipe = [*TINY, "--epochs", 3, "--train-size", 240]
    flags = [*recipe, "--seeds", 1, "--lanes", "wt", "--save-minutes", 0]
    with folder() as here:
        for lane, number in (("baseline", signal.SIGKILL), ("wt", signal.SIGTERM)):
            process = start_program("interventions.py", [*flags, "--out", "killed"])
            wait_for(lambda: list(here.glob(f"killed/runs/{lane}-*.pt")), process)
            time.sleep(0.2 * random.random())
            process.send_signal(number)
            status, _, err = finish(process)
            assert "progress" in read_checkpoint(run_file("killed", f"{lane}-*.pt"))
            assert len(list(here.glob("killed/runs/*.claim"))) == (number == signal.SIGKILL)
            for path in here.glob("killed/runs/baseline-*"):
                os.utime(path, (time.time() - 1000,) * 2)      # time goes by
        assert status == 143 and err.endswith("interventions.py: stopped; the same command goes on\n"), err
        assert sweep([*flags, "--out", "killed"])[0] == 0
        for lane, more in (("baseline", []), ("wt", ["--w-task", 0])):
            assert command([*recipe, *more, "--out", "straight.pt"])[0] == 0
            assert same_weights(run_file("killed", f"{lane}-*.pt"), "straight.pt"), lane
            Path("straight.pt").unlink()


def test_recorded_runs_are_recognised():
    """The recorded CIFAR-10 runs, of before the second rules, from a folder with settings that are none now: other
    accuracies, purities or commands; a verdict, without the seeds; a bias lane's `lost`, which was another figure."""
    path = HERE / "results" / "cifar10-jpeg-16px-sweep"
    recorded = json.loads((path / "report.json").read_text())["runs"]
    with folder() as here:
        shutil.copytree(path, "copy", ignore=shutil.ignore_patterns("*.png", "report.*"))
        status, out, err = sweep(["--report-only", "--out", "copy"])
        assert status == 0, err
        report, text = json.loads(Path("copy/report.json").read_text()), Path("copy/report.md").read_text()
        runs, base = interventions.read_runs(here / "copy"), interventions.open_sweep(here / "copy")
        assert {path.name for path in Path("copy").glob("*.png")} == {"lanes.png", "clusters.png", "factorial.png"}
    assert len(runs) == 26 and all(run["command"] in text for run in recorded)
    assert {key: (run["reader"], run["purity"]) for key, run in runs.items()} == {
        (run["lane"], run["seed"]): (run["reader"], run["purity"]) for run in recorded}
    facts = 3, range(10)
    assert interventions.lane_flags("deeper", base, facts, interventions.image_flops(base, facts))["reader_depth"] == 13
    few, rho = report["claims"]                        # no lane has the seeds that a verdict needs
    assert few.startswith("not judged") and few.endswith("route+bias+dense") and "accuracy +0.55 [" in rho
    lost = {row["lane"]: row["lost"][0] for row in report["lanes"]}
    assert lost["route+bias"] is None and lost["bias"] is None and 0.15 < lost["baseline"] < 0.16


# ---- every file ----------------------------------------------------------------------------------

def test_style():
    """What can be read: lines of 100 columns (here 120), functions of 60 lines."""
    found = []
    for path in sorted(HERE.glob("*.py")):
        text, columns = path.read_text(), 120 if path.name == "test_all.py" else 100
        long = [i for i, line in enumerate(text.splitlines(), 1) if len(line) > columns]
        found += [f"{path.name}: over {columns} columns: lines {long}"] if long else []
        found += [f"{path.name}: over 60 lines: {node.name}" for node in ast.walk(ast.parse(text))
                  if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 60]
    assert not found, "\n".join(found)


def test_rooms():
    """A file needs one that the README lists below it, or one to be copied needs more than torch, numpy, matplotlib."""
    rooms = ("siren inner_loop reader measures figures checkpoint data settings model train pixels theorem hyperinr "
             "diffusion dictionary cohort bench claims spaces mlora routes diagnostics interventions").split()
    for i, room in enumerate(rooms):
        needs = set()
        for node in ast.walk(ast.parse((HERE / f"{room}.py").read_text())):
            needs |= {name.name for name in node.names} if isinstance(node, ast.Import) else set()
            needs |= {node.module} if isinstance(node, ast.ImportFrom) else set()
        needs = {name.split(".")[0] for name in needs} - set(sys.stdlib_module_names)
        assert not needs & set(rooms[i:]), (room, needs)
        assert i > 4 or needs <= ({"torch"}, {"torch", "numpy"}, {"numpy", "matplotlib"})[max(0, i - 2)], (room, needs)


def attempt(name: str) -> tuple[float, str]:
    """Seconds, and what went wrong."""
    began, wrong = time.monotonic(), ""
    torch.manual_seed(0)
    try:
        globals()[name]()
    except Exception:
        wrong = traceback.format_exc()
    return time.monotonic() - began, wrong


def main(words: list[str]):
    """Runs the tests whose names have all these words, side by side: each uses one core."""
    names = [name for name in globals() if name.startswith("test_") and all(word in name for word in words)]
    jobs, failed = min(len(names), os.cpu_count() or 1, 4), 0
    with ProcessPoolExecutor(max(1, jobs), multiprocessing.get_context("spawn")) as pool:
        for name, (seconds, wrong) in zip(names, (pool.map if jobs > 1 else map)(attempt, names)):
            print(f"{wrong}{name[5:]:70s} {seconds:6.1f} s  {'FAILED' if wrong else 'ok'}", flush=True)
            failed += bool(wrong)
    print(f"{len(names) - failed} passed, {failed} failed")
    sys.exit(1 if failed or not names else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
