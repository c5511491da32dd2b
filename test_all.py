"""Every test of the project.

    python test_all.py  # all of them; ends with "N passed, N failed"
    python test_all.py resume  # those with "resume" in their name
"""
import argparse
import ast
import contextlib
import functools
import io
import json
import math
import os
import platform
import random
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import tracemalloc
import types
from functools import partial
from pathlib import Path
from unittest import SkipTest

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import bench
import checkpoint
import claims
import data
import diagnostics
import figures
import interventions
import measures
import settings
import train
from checkpoint import InputError, generator, load_checkpoint, read_checkpoint, seeded
from diagnostics import Fitted
from inner_loop import MetaSGD, draw_pixels, each_step, functional_loss_and_grad, textbook_loss_and_grad
from measures import supervised_contrastive
from reader import Attention, Reader, RoutedReader
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


@contextlib.contextmanager
def raises(kind):
    try:
        yield
    except kind:
        return
    raise AssertionError(f"no {kind.__name__}")


def apart(a, b) -> float:
    """Relative difference of two tensors, or of two lists of tensors, concatenated."""
    a, b = (torch.cat([x.detach().double().flatten() for x in ([xs] if torch.is_tensor(xs) else xs)]) for xs in (a, b))
    return float((a - b).norm() / b.norm())


def same(a: dict, b: dict) -> bool:
    """Whether two state dicts agree bit for bit."""
    return list(a) == list(b) and all(torch.equal(v, b[k]) for k, v in a.items())


def tiny_model(inner=None, classes=4, **changed) -> train.MWT:
    """inner: a function in place of the closed form of the inner gradient."""
    tiny = dict(dataset="cifar10", size=6, width=8, depth=2, steps=3, reader_depth=2, head_dim=4) | changed
    model = train.MWT(settings.settings(tiny), 1 if tiny["dataset"] == "digits" else 3, classes)
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
    """python argv."""
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


def image_folder(root, train_images=12, test_images=4, size=10, second="test", classes="abc") -> Path:
    from PIL import Image
    rng, root = np.random.default_rng(0), Path(root)
    for split, n in (("train", train_images), (second, test_images)):
        for c in classes:
            (root / split / c).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (size, size + 2, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / c / f"{i:03d}.png")
    return root


# ---- siren.py ------------------------------------------------------------------------------------

def test_coordinate_grid_by_hand():
    assert coordinate_grid(2, 3).tolist() == [[-1, -1], [-1, 0], [-1, 1], [1, -1], [1, 0], [1, 1]]


@float64()
def test_siren_forward_by_hand():
    """One pixel at a time, in numpy."""
    siren = Siren(2, 3, width=5, depth=2, omega=7.0)
    weights, coords = Weights(torch.randn(2, 5, 3), torch.randn(2, 2, 5, 6)), torch.randn(4, 2)
    V, c, scale = (p.detach().numpy() for p in (siren.head.weight, siren.head.bias, siren.scale))
    for n, image in enumerate(siren(coords, weights).detach().numpy()):
        for got, x in zip(image, coords.numpy()):
            W = weights.first[n].numpy()
            a = np.sin(7.0 * (W[:, :2] @ x + W[:, 2]))
            for W in weights.hidden[n].numpy():
                a = np.sin(W[:, :5] @ a + W[:, 5])
            np.testing.assert_allclose(got, scale * (V @ a + c), rtol=1e-10, atol=1e-12)


def test_siren_initialisation():
    siren = Siren(2, 3, width=64, depth=3)
    for weight, bound in ((siren.first, 1 / 2), (siren.hidden, math.sqrt(6 / 64))):
        w = weight[..., :-1].detach()
        assert 0.95 * bound < float(w.abs().max()) <= bound and abs(float(w.mean())) < 0.1 * bound
        assert torch.all(weight[..., -1] == 0)
    assert torch.all(siren.scale == 0.1)


@float64()
def test_closed_form_gradient_against_autograd():
    for dims, out, width, depth, n, points in ((2, 3, 8, 2, 4, 9), (3, 1, 5, 1, 2, 7), (1, 4, 6, 3, 1, 5)):
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
    """k steps of plain SGD on one image, by torch.autograd, against the batch; with all pixels and with given ones."""
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
        drawn = inner(siren, coords, values, steps=5, fraction=0.5)  # 5 steps: its step sizes are shared
    expected = inner.descend(siren, *each_step(coords, values, 5, draw_pixels(5, 5, 16, 0.5)))
    assert apart(drawn, expected) == 0
    with raises(ValueError):  # three steps with step sizes for two
        MetaSGD(siren, steps=2)(siren, coords, values, steps=3)


def test_pixels_drawn():
    assert draw_pixels(1, 1, 100, 0.29).shape == (1, 1, 29)  # 0.29 * 100 = 28.999... in floating point
    drawn = draw_pixels(6, 50, 99, 0.1)
    assert drawn.shape == (6, 50, 9) and drawn.min() >= 0 and drawn.max() <= 98
    rows = [tuple(sorted(set(r.tolist()))) for step in drawn for r in step]
    assert all(len(r) == 9 for r in rows) and len(set(rows)) == 300  # distinct, and fresh each time
    counts = torch.bincount(draw_pixels(200, 50, 20, 0.25).flatten(), minlength=20) / 10000  # probability 1/4
    assert (counts - 0.25).abs().max() < 6 * math.sqrt(0.25 * 0.75 / 10000)
    assert draw_pixels(1, 3, 16, 1.0).sort(-1).values.eq(torch.arange(16)).all()
    with raises(ValueError):
        draw_pixels(1, 1, 16, 0.05)


# ---- reader.py -----------------------------------------------------------------------------------

@float64()
def test_attention_by_hand():
    attention, x = Attention(6, head_dim=3), torch.randn(2, 5, 6)
    h = F.layer_norm(x, (6,), attention.norm.weight, attention.norm.bias)
    out = torch.zeros(2, 5, 6)
    for n in range(2):
        for head in (slice(0, 3), slice(3, 6)):
            q, k, v = (h[n] @ attention.qkv.weight[6 * part:][head].T for part in range(3))
            for t in range(5):
                weight = (k @ q[t] / math.sqrt(3)).exp()
                out[n, t, head] = weight @ v / weight.sum()
    expected = 0.1 * (out @ attention.out.weight.T + attention.out.bias)
    assert apart(attention(x), expected) <= 1e-12 and apart(attention(x, asking=2), expected[:, :2]) <= 1e-12


@float64()
def test_reader_input_and_trace():
    for features in (None, 3):
        tokens = torch.randn(3, 10, features or 7)
        reader = Reader(10, 6, 4, features, depth=2, head_dim=3, token_scale=50.0)
        torch.nn.init.normal_(reader.beta)
        logits, trace = reader.trace(tokens)
        stages, states = zip(*trace)
        assert stages == ("input map", "attention 1", "MLP 1", "attention 2", "MLP 2")
        assert torch.equal(logits, reader(tokens)) and logits.shape == (3, 4)
        first = 50.0 * (tokens + reader.beta) @ reader.embed.weight.T + reader.embed.bias
        assert apart(states[0], first) <= 1e-12
        for before, block, after in zip(states, reader.blocks, states[1:]):
            assert torch.equal(before + block(before), after)
        assert apart(logits, states[-1].mean(1) @ reader.head.weight.T + reader.head.bias) <= 1e-12
    normed, x = Reader(10, 6, 4, 3, depth=0, head_dim=3, token_scale=0.0), tokens.flatten(1)
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert apart(normed(tokens), normed.head(normed.embed(x.view_as(tokens)).mean(1))) <= 1e-12


@float64()
def test_readout_and_branches_by_hand():
    tokens, colour = torch.randn(3, 10, 7), torch.rand(3, 3)
    reader = RoutedReader(10, 6, 4, depth=1, head_dim=3, readout=2)
    logits, trace = reader.trace(tokens)
    states = [x for _, x in trace]
    assert [x.shape[1] for x in states] == [10, 10, 10, 2, 2, 2, 2] and torch.equal(logits, reader(tokens))
    x = states[2]
    q = [torch.stack([query + x.sum(1) / 10 for query in reader.queries], 1)]
    for attention, mlp in zip(reader.gather[::2], reader.gather[1::2]):
        q.append(q[-1] + attention(torch.cat([q[-1], x], 1))[:, :2])  # all ask; only the queries are answered
        q.append(q[-1] + mlp(q[-1]))
    assert apart(states[3:], q[1:]) <= 1e-12
    assert apart(logits, reader.head((q[-1][:, 0] + q[-1][:, 1]) / 2)) <= 1e-12
    assert apart(reader(tokens[:, torch.randperm(10)]), logits) <= 1e-12  # beta is 0: there is no order
    plain = Reader(10, 6, 4, depth=1, head_dim=3, token_scale=50.0)
    cases = (("bias", 50 * tokens[..., 6]), ("column:2", 50 * tokens[..., 2]), ("colour", colour))
    for branch, features in cases:
        reader = RoutedReader(10, 6, 4, depth=1, head_dim=3, token_scale=50.0, branch=branch)
        reader.load_state_dict(plain.state_dict(), strict=False)
        more = [colour] if branch == "colour" else []
        assert torch.equal(reader(tokens, *more), plain(tokens))  # the branch is silent at first
        torch.nn.init.normal_(reader.branch.down.weight)
        b = reader.branch
        added = F.gelu(features @ b.up.weight.T + b.up.bias) @ b.down.weight.T + b.down.bias
        assert apart(reader(tokens, *more), plain(tokens) + added) <= 1e-12


def test_parameter_counts():
    """The paper's Table 4."""
    def count(*parts):
        return sum(p.numel() for part in parts for p in part.parameters())
    siren = Siren(2, 3, width=128, depth=4)
    assert count(siren, MetaSGD(siren, steps=6)) == 465_414
    assert count(Reader(4 * 64, 64, 10, depth=10)) == 273_034
    assert count(Reader(4 * 128, 128, 10, depth=5)) == 581_258


@folder()
def test_concept_files_work_alone():
    """Each file, copied into an empty folder, does its work there with torch alone."""
    code = """
import os, sys, torch
def alone(name):  # only its folder is in reach, and nothing came from another
    assert not {"siren", "inner_loop", "reader"} & set(sys.modules)
    sys.path.insert(0, os.path.abspath(name))
    __import__(name)
    del sys.path[0]
    return sys.modules.pop(name)
siren, inner_loop, reader = map(alone, ("siren", "inner_loop", "reader"))
class Linear(torch.nn.Linear):  # any network with an anchor will do
    anchor = lambda self: siren.Weights(torch.zeros(3, 2), torch.zeros(3, 2))
    forward = lambda self, coords, w: coords @ (w.first + w.hidden).mT
    loss_and_grad = inner_loop.textbook_loss_and_grad
phi = inner_loop.MetaSGD(Linear(1, 1), steps=1)(Linear(1, 1), torch.eye(2), torch.ones(4, 2, 3))
assert phi.first.shape == (4, 3, 2) and (phi.first > 0).all()
assert siren.Siren()(siren.coordinate_grid(4, 4), siren.Siren().anchor()).shape == (16, 3)
assert reader.Reader(8, 64, 3, depth=1)(torch.zeros(2, 8, 65)).shape == (2, 3)
"""
    for name in ("siren", "inner_loop", "reader"):
        Path(name).mkdir()
        shutil.copy(HERE / f"{name}.py", name)
    status, _, err = finish(start("-I", "-c", code))
    assert status == 0, err


# ---- checkpoint.py -------------------------------------------------------------------------------

def test_draws_are_a_function_of_their_key():
    keys = [("order", 0, 1), ("order", 1, 0), ("order", 0, 10), ("pixels", 0, 1), ("order", 0), ("order", 0, 1)]
    drawn = [tuple(torch.rand(3, generator=generator(*key)).tolist()) for key in keys]
    assert drawn[0] == drawn[-1] and len(set(drawn)) == len(keys) - 1
    with torch.random.fork_rng():
        expected = torch.rand(2)
    with seeded("reader", 0):
        layer = torch.rand(4)
    with seeded("reader", 0):
        assert torch.equal(torch.rand(4), layer)
    assert torch.equal(torch.rand(2), expected)  # what is drawn inside is not missed outside


@folder()
def test_checkpoint_survives_a_kill_while_saving():
    """A process that does nothing but save is killed. All zeros, then all ones, ...: a mixture is a torn file."""
    code = """
import itertools, sys, torch
sys.path.insert(0, sys.argv[1])
import checkpoint
for i in itertools.count():
    model = {str(j): torch.full((200_000,), i) for j in range(8)}
    checkpoint.save_checkpoint("out.pt", {"method": "mwt", "args": {}, "data": (), "metrics": {}, "model": model})
"""
    def number():
        model = read_checkpoint("out.pt")["model"]
        found, = {int(v) for x in model.values() for v in (x.min(), x.max())}
        return found

    child, seen = start("-c", code, HERE), set()
    wait_for(Path("out.pt").exists, child)
    for _ in range(50):  # whole at any moment, also while the next one is being written
        time.sleep(0.02 * random.random())
        seen.add(number())
    child.kill()
    child.communicate()
    assert number() >= max(seen) > min(seen)


@folder()
def test_bad_checkpoints():
    class Evil:
        def __reduce__(self):
            return os.system, ("touch harm",)

    trained(TINY, "--epochs 1")
    content, whole = torch.load("out.pt", weights_only=True), Path("out.pt").read_bytes()
    nan = {k: v * math.nan for k, v in content["model"].items()}
    huge, typed = (content["args"] | change for change in ({"width": 10 ** 9}, {"depth": "deep"}))
    for name, saved in {"half.pt": whole[:len(whole) // 2], "empty.pt": b""}.items():
        Path(name).write_bytes(saved)
    torch.save(Evil(), "evil.pt")
    words = dict.fromkeys(("half", "empty", "evil"), "damaged")
    for name, change, words[name] in (
            ("other", {"format": None}, "not a checkpoint of routed-inr"), ("future", {"version": 99}, "version 99"),
            ("part", {"model": None}, "no model"), ("nan", {"model": nan}, "not finite"),
            ("huge", {"args": huge}, "disagree"), ("typed", {"args": typed}, "disagree"),
            *((name, {"method": name}, "method") for name in ("magic", "os", "train"))):
        torch.save(content | change, f"{name}.pt")
    for name, word in words.items():
        refused(["--eval-only", "--ckpt", f"{name}.pt"], f"{name}.pt", word)
        with raises(InputError):
            load_checkpoint(f"{name}.pt")
    assert len(words) == 12 and not Path("harm").exists()
    for more, word in (("--width 99", "--width"), ("--steps-test 5", "--shared-lr"), ("--val 0.2", "--val")):
        refused(["--eval-only", "--ckpt", "out.pt", *more.split()], word)  # --val: it was trained on those images
    del content["method"]  # the first checkpoints did not say
    torch.save(content, "first.pt")
    assert same(*(load_checkpoint(f"{name}.pt")[0].state_dict() for name in ("first", "out")))


@folder()
def test_train_is_not_imported_twice():
    """`python train.py` that loads a checkpoint: its file is then the module "train"."""
    trained(TINY, "--epochs 1")
    for name, expected in (("out", 0), ("gone", 2)):
        modules, status = dict(sys.modules), 0
        del sys.modules["train"]
        with replaced(sys, "argv", ["train.py", "--eval-only", "--ckpt", f"{name}.pt"]), \
                contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                runpy.run_path(str(HERE / "train.py"), run_name="__main__")
            except SystemExit as error:
                status = error.code
        assert status == expected and sys.modules["train"].__name__ == "__main__"
        sys.modules.update(modules)


# ---- data.py -------------------------------------------------------------------------------------

def test_digits_split_and_range():
    images, test = data.load_dataset(settings.settings({}))
    assert (len(images), len(test)) == (1437, 360) and images.pixels.dtype == torch.uint8
    both = torch.bincount(images.labels) + torch.bincount(test.labels)
    assert both.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180] # the UCI file's
    assert (torch.bincount(test.labels) - both * 360 / 1797).abs().max() < 1
    assert set(images.signal(images.pixels).unique().tolist()) == {i / 8 - 1 for i in range(17)}


def test_subsets_are_stratified_and_always_the_same():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    rows = data.stratified_sample(labels, 11)
    assert rows.tolist() == sorted(set(rows.tolist())) and torch.bincount(labels[rows]).tolist() == [6, 3, 2]
    assert torch.equal(rows, data.stratified_sample(labels, 11))
    assert set(data.stratified_sample(labels, 10).tolist()) < set(data.stratified_sample(labels, 20).tolist())
    whole, _ = data.load_dataset(settings.settings({}))
    images, held = data.load_dataset(settings.settings({"val": 0.2}))
    assert len(held) == round(0.2 * 1437) and len(images) + len(held) == 1437
    everything, seen, unseen = ({bytes(x.numpy()) for x in part.pixels} for part in (whole, images, held))
    assert not seen & unseen and seen | unseen == everything


@folder()
def test_image_files_of_every_mode():
    from PIL import Image
    ramp = np.linspace(0, 255, 24 * 20).reshape(20, 24).astype(np.uint8)
    colour = np.stack([ramp, ramp.T.reshape(20, 24), 255 - ramp], -1)
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    for mode in ("RGB", "L", "RGBA", "P", "LA", "1", "CMYK"):
        Image.fromarray(colour).convert(mode).save(mode + (".jpg" if mode == "CMYK" else ".png"))
    for name, pixels in (("deep.png", ramp.astype(np.uint16) * 257), ("deep.tif", ramp.astype(np.int32) * 257),
                         ("shallow.png", ramp), ("board.png", board)):
        Image.fromarray(pixels).save(name)
    decoded = {path.name: data.decode(path, 16).float() for path in Path().iterdir()}
    assert len(decoded) == 11 and all(x.shape == (3, 16, 16) for x in decoded.values())
    assert all(x.std() > 20 for name, x in decoded.items() if name != "board.png")
    for name in ("deep.png", "deep.tif"):  # 16 bits are scaled, not clipped
        assert (decoded[name] - decoded["shallow.png"]).abs().max() <= 1
    assert torch.equal(decoded["RGBA.png"], decoded["RGB.png"]) and data.decode("L.png", 16).dtype == torch.uint8
    assert (decoded["board.png"] - 127.5).abs().max() < 10  # antialiased


@folder()
def test_folder_resident_and_streamed_agree():
    root = image_folder("set", second="val")
    args = settings.settings({"dataset": str(root), "size": 8, "workers": 2})
    images, test = data.load_dataset(args)
    assert (len(images), len(test), images.classes, images.channels) == (36, 12, ["a", "b", "c"], 3)
    with replaced(data, "RESIDENT_BYTES", 0):
        streamed, _ = data.load_dataset(args)
        args.train_size = 1
        assert len(data.load_dataset(args)[0]) == 1
    assert images.pixels is not None and streamed.pixels is None
    order = [torch.tensor([5, 0, 35]), torch.tensor([7])]
    for workers in (0, 2):
        pairs = zip(images.batches(order, "cpu"), streamed.batches(order, "cpu", workers), strict=True)
        assert all(torch.equal(a, b) for pair in pairs for a, b in zip(*pair))


@folder()
def test_folder_of_many_files():
    """Of an image that does not fit, a path is in memory: less than a kilobyte, where the decoded image has twelve."""
    with replaced(data, "RESIDENT_BYTES", 0):
        image_folder("many", train_images=1, test_images=1, classes="0123456789")
        for source in Path().glob("many/train/*/000.png"):
            for i in range(1, 1000):
                os.link(source, source.with_name(f"{i:03d}.png"))
        tracemalloc.start()
        images, _ = data.load_dataset(settings.settings({"dataset": "many", "size": 64}))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(images) == 10_000 and images.pixels is None and peak < 10_000_000, peak


@folder()
def test_torchvision_files():
    """Fashion-MNIST in its own file format, made here, read by torchvision's class; no network."""
    raw, rng = Path("data/FashionMNIST/raw"), np.random.default_rng(0)
    raw.mkdir(parents=True)
    for split, n in (("train", 40), ("t10k", 20)):
        images, labels = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), np.arange(n, dtype=np.uint8) % 10
        for name, header, x in (("images-idx3", [0x803, n, 28, 28], images), ("labels-idx1", [0x801, n], labels)):
            (raw / f"{split}-{name}-ubyte").write_bytes(np.array(header, ">i4").tobytes() + x.tobytes())
    args = settings.settings({"dataset": "fashion_mnist"})
    found, test = data.load_dataset(args)
    assert found.pixels.shape == (40, 1, 28, 28) and len(test) == 20 and len(found.classes) == 10
    assert torch.equal(test.pixels[:, 0], torch.from_numpy(images)) and test.labels.tolist() == labels.tolist()
    args.size = 14
    assert data.load_dataset(args)[0].pixels.shape == (40, 1, 14, 14)


def test_augmentation_at_low_resolution():
    images, u = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8), torch.rand(20, 6)
    for flip in (False, True):
        for n, got in enumerate(data.augment(images, u, flip).numpy()):
            padded = np.pad(images[n].numpy(), ((0, 0), (4, 4), (4, 4)), mode="reflect")
            y, x = int(u[n, 0] * 9), int(u[n, 1] * 9)
            expected = padded[:, y:y + 32, x:x + 32]
            assert np.array_equal(got, expected[:, :, ::-1] if flip and u[n, 2] < 0.5 else expected)


def test_augmentation_at_high_resolution():
    size = 64
    y, x = torch.meshgrid(*[(torch.arange(size) + 0.5) / size * 2 - 1] * 2, indexing="ij")
    ramps = torch.stack([x, y]).expand(200, -1, -1, -1)
    still = torch.tensor([0.5, 1.0, 0.5, 0.5, 0.5, 0.9]).expand(200, 6)  # no angle, whole area, centred, no flip
    mirrored = still * torch.tensor([1, 1, 1, 1, 1, 0.1])
    for u, flip, expected in ((still, True, ramps), (mirrored, True, ramps.flip(-1)), (mirrored, False, ramps)):
        assert torch.allclose(data.augment(ramps, u, flip), expected, atol=1e-5)
    # On linear ramps bilinear look-up is exact, so finite differences give back the map: scale, aspect and angle.
    u = torch.rand(200, 6)
    u[:, 3:5] = 0.5
    centre = slice(size // 2 - 4, size // 2 + 4)
    moved = data.augment(ramps, u, False)[:, :, centre, centre]
    along_x = moved.diff(dim=-1).mean((-1, -2)) * size / 2  # (N, 2): d(x, y) / dx
    along_y = moved.diff(dim=-2).mean((-1, -2)) * size / 2
    w, h = along_x.norm(dim=1), along_y.norm(dim=1)
    assert torch.allclose(w * h, 0.8 + 0.2 * u[:, 1], atol=1e-4) and w.max() <= 1.0001 and h.max() <= 1.0001
    assert (w / h).min() > 3 / 4 and (w / h).max() < 4 / 3
    angle = torch.atan2(along_x[:, 1], along_x[:, 0])
    assert torch.allclose(angle, (2 * u[:, 0] - 1) * math.pi / 6, atol=1e-4)


@folder()
def test_bad_data():
    import torchvision

    def no_network(self):
        os.makedirs(self.raw_folder)
        raise RuntimeError("no network\nhere")
    with replaced(torchvision.datasets.MNIST, "download", no_network):
        refused(["--dataset", "mnist", "--data-root", "empty"], "empty", "MNIST/raw", "no network here")
    Path("one-split/train/a").mkdir(parents=True)
    refused(["--dataset", "one-split"], "one-split")
    image_folder("one-class", classes="a")
    refused(["--dataset", "one-class", "--batch-size", "4"], "one class")
    shutil.copytree(image_folder("other"), "differ")
    Path("differ/test/c").rename("differ/test/d")
    refused(["--dataset", "differ", "--batch-size", "4"], "differ", "c, d")
    broken = os.path.join("other", "train", "b", "005.png")
    Path(broken).write_bytes(b"not an image")
    refused(["--dataset", "other", "--size", "8", "--batch-size", "4", "--workers", "0"], broken, "decoded")


# ---- settings.py ---------------------------------------------------------------------------------

def test_recipes_and_command_lines():
    digits, cifar, large = map(flags, ([], ["--dataset", "cifar10"], "--dataset set --size 64 --steps 6".split()))
    assert (digits.size, digits.width, digits.epochs, digits.lr) == (8, 64, 15, 3e-3)
    assert (cifar.size, cifar.width, cifar.epochs, cifar.steps, cifar.omega, cifar.lr) == (32, 128, 10, 6, 10, 1e-4)
    assert (large.width, large.epochs, large.omega, large.fraction, large.steps) == (128, 40, 30, 0.25, 6)
    for argv in ([], [*TINY[:-2], "--augment", "--lr", "1e-5", "--val", "0.1"],
                 ["--dataset", "a folder", "--size", "64", "--omega", "10", "--out", "it's.pt"]):
        again = shlex.split(settings.command_line(flags(argv)))
        assert again[:2] == ["python", "train.py"] and len(again) <= len(argv) + 2
        assert flags(again[2:]) == flags(argv)


@folder()
def test_bad_values():
    cases = """--steps -3 = --steps; --steps 0 = --steps; --steps ² = --steps; --fraction 0 = --fraction
        --fraction 1.5 = --fraction; --fraction 0.001 = pixel; --lr nan = --lr; --lr inf = --lr; --w-task -1 = --w-task
        --epochs two = --epochs; --val 1 = --val; --head-dim 5 = --head-dim; --batch-size 5000 = 1437
        --train-size 9999 = 1437; --train-size 10 = --batch-size; --device tpu9 = --device; --device cuda:99 = --device
        --device meta = --device; --precision fp8 = --precision; --out nowhere/out.pt = nowhere; --out out.txt = .pt
        --no-such-flag = --no-such-flag; --steps-test 9 = --shared-lr; --dataset no/such/folder = no/such/folder
        --dataset = --dataset; --eval-only = --ckpt; --resume = out.pt; --init-from gone.pt = gone.pt
        --eval-only --ckpt gone.pt = gone.pt; --ckpt out.pt = --eval-only; --branch column:64 = column
        --branch column:-1 = --branch; --branch weight = --branch; --w-cluster -1 = --w-cluster
        --readout -1 = --readout; --width 99999999999999999999 --head-dim 1 = --width"""
    for case in cases.replace("\n", ";").split(";"):
        argv, word = case.split(" = ")
        refused(argv.split(), word.strip())
    refused(["--out", ""], "--out")
    Path("dir.pt").mkdir()
    refused(["--out", "dir.pt"], "dir.pt")
    Path("precious.pt").write_text("something else")
    refused(["--out", "precious.pt"], "precious.pt", "overwrite")


# ---- train.py: the model -------------------------------------------------------------------------

def test_what_a_model_looks_at():
    model, (images, _) = tiny_model(fraction=0.5), batch()
    coords, values = model.look(images, 4)  # in evaluation: the same pixels of all images, always
    assert coords.shape == (4, 5, 18, 2) and values.shape == (4, 5, 18, 3)
    assert torch.equal(coords, coords[:, :1].expand_as(coords)) and not torch.equal(coords[0], coords[1])
    assert torch.equal(coords[:, :2], model.look(images[3:], 4)[0])
    coords, values = model.look(images, 4, generator("a"))  # in training: each image its own
    assert not torch.equal(coords[:, 0], coords[:, 1])
    rows, columns = ((coords + 1) * 2.5).round().long().unbind(-1)
    for n in range(5):
        assert torch.equal(values[:, n], images[n][:, rows[:, n], columns[:, n]].permute(1, 2, 0))


@float64()
def test_tokens_logits_and_reconstructions():
    model, (images, _) = tiny_model(depth=3), batch()
    phi, theta, tokens = model.adapt(images), model.siren.anchor(), model.fit(images)
    assert tokens.shape == (5, 24, 9)
    for n, layer, neuron in ((0, 0, 0), (3, 1, 5), (4, 2, 7)):
        moved = phi.hidden[n, layer, neuron] - theta.hidden[layer, neuron]
        assert apart(tokens[n, 8 * layer + neuron], moved) <= 1e-12
    logits, trace = model.trace(tokens)
    assert torch.equal(logits, model.read(tokens)) and len(trace) == 5
    for n in range(5):  # an image's logits do not depend on its batch
        assert apart(model.read(model.fit(images[n:n + 1]))[0], logits[n]) <= 1e-10
    swapped = tokens[:, [3, 1, 2, 0, *range(4, 24)]]
    assert apart(model.read(swapped), logits) <= 1e-12  # beta is 0 at the start
    torch.nn.init.normal_(model.reader.beta, std=0.01)
    assert apart(model.read(swapped), model.read(tokens)) > 1e-4
    shown = model.siren(model.coords, theta).T.reshape(3, 6, 6).clamp(-1, 1)
    assert apart(model.reconstruct(images, 0), shown.expand(5, -1, -1, -1)) <= 1e-12


@float64()
def test_centred_colour():
    """Another mean colour changes neither weights nor error; it reaches the logits through the colour branch alone."""
    model, plain, (images, labels) = tiny_model(centre_colour=True, branch="colour"), tiny_model(), batch()
    torch.nn.init.normal_(model.reader.branch.down.weight)
    tokens, colour = model.fit(images), images.mean((2, 3))
    other = images + torch.tensor([0.1, -0.2, 0.3])[:, None, None]
    assert apart(model.fit(other), tokens) <= 1e-10 and apart(plain.fit(other), plain.fit(images)) > 1e-2
    assert apart(tokens, plain.fit(images - colour[..., None, None])) <= 1e-12
    (_, a), (_, b) = (model.fit_and_error(*model.look(x, 4)) for x in (images, other))
    assert apart(a, b) <= 1e-10
    seen = model.look(images, 4)
    assert apart(model.colour(seen[1]), colour) <= 1e-12
    expected = F.cross_entropy(model.reader(tokens, colour), labels)
    assert apart(model(*seen, labels)[0], expected) <= 1e-10
    assert apart(expected, F.cross_entropy(model.read(tokens), labels)) > 1e-3
    # the clamp is to what a pixel can be, not to what a centred one can be
    bright = images + 0.95
    phi, error = model.fit_and_error(*model.look(bright, 4), clamp=True)
    shown = (model.siren(model.coords, phi) + bright.mean((2, 3))[:, None]).clamp(-1, 1)
    assert (shown == 1).any() and apart(error, (shown - bright.flatten(2).mT).square().mean((1, 2))) <= 1e-12
    assert apart(model.reconstruct(bright), shown.mT.reshape(images.shape)) <= 1e-12
    drawn = tiny_model(centre_colour=True, fraction=0.5)  # of drawn pixels: the mean of what was drawn
    _, values = drawn.look(images, 4, generator("a"))
    pixels = draw_pixels(4, 5, 36, 0.5, generator("a"))
    mean = torch.stack([images.flatten(2)[n][:, pixels[:, n].flatten()].mean(1) for n in range(5)])
    assert apart(drawn.colour(values), mean) <= 1e-12


@float64()
def test_contrastive_loss_against_the_equation():
    """It drives theta and alpha, and leaves the reader's gradient alone."""
    x, labels = torch.randn(7, 5), torch.tensor([0, 0, 1, 1, 1, 2, 0])  # the 2 is alone
    z, terms = F.normalize(x, dim=1), []
    for i in (0, 1, 2, 3, 4, 6):
        others = [a for a in range(7) if a != i]
        e = {a: math.exp(float(z[i] @ z[a]) / 0.1) for a in others}
        positive = [-math.log(e[a] / sum(e.values())) for a in others if labels[a] == labels[i]]
        terms.append(sum(positive) / len(positive))
    for scale in (1, 3):
        assert abs(float(supervised_contrastive(scale * x, labels)) - sum(terms) / 6) <= 1e-12
    assert float(supervised_contrastive(x, torch.arange(7))) == 0
    images, labels = batch()[0], torch.tensor([0, 0, 1, 1, 2])
    clustered, without, alone = tiny_model(w_cluster=0.3), tiny_model(), tiny_model()
    for model in (clustered, without):
        model(*model.look(images, 4), labels)[:3].sum().backward()
    phi = alone.adapt(images)
    rows = [(phi.first - alone.siren.first).flatten(1), alone.tokens(phi).flatten(1)]
    (0.3 * supervised_contrastive(torch.cat(rows, 1), labels)).backward()
    got, base, expected = grads(clustered), grads(without), grads(alone)
    for name in ("siren", "inner_loop"):
        assert apart([a - b for a, b in zip(got[name], base[name])], expected[name]) <= 1e-9
    assert all(map(torch.equal, got["reader"], base["reader"]))


def test_same_core_whatever_the_reader():
    one = tiny_model()
    for more in (dict(reader_depth=3, w_task=0.0), dict(readout=2), dict(branch="bias"), dict(branch="column:3"),
                 dict(centre_colour=True, branch="colour"), dict(w_cluster=1.0)):
        other = tiny_model(**more).state_dict()
        assert all(torch.equal(v, other[k]) for k, v in one.state_dict().items())
    denser = tiny_model(steps=7).state_dict()  # the same first step sizes
    for name, v in one.state_dict().items():
        assert torch.equal(v, denser[name][:3] if name.startswith("inner_loop") else denser[name])
    assert not torch.equal(one.siren.first, tiny_model(seed=1).siren.first)


def test_precision_bf16_stays_close():
    """The reader alone is in bfloat16, the losses are not."""
    images, labels = batch()
    exact, rough = tiny_model(), tiny_model(precision="bf16")
    a, b = (model(*model.look(images, 4), labels).detach() for model in (exact, rough))
    assert a[1] == b[1] and a[0] != b[0] and abs(float(a[0] - b[0])) < 0.05
    fits = train.Fits(rough.fit(images), labels, torch.ones(5))
    frozen = train.reader_task(rough.read, fits).forward(*fits).detach()
    assert frozen.dtype == torch.float32 and abs(float(frozen[0] - b[0])) < 1e-6
    with folder():
        trained(TINY, "--precision bf16")
        assert all(p.dtype == torch.float32 for p in load_checkpoint("out.pt")[0].parameters())


def test_psnr_and_evaluation_against_one_image_at_a_time():
    assert abs(float(train.psnr(torch.tensor(0.04))) - 20) < 1e-5  # in [0, 1]: MSE 0.01
    assert float(train.psnr(torch.tensor(0.0))) == 100
    args = settings.settings({"test_size": 30, "width": 8, "head_dim": 4})
    _, test = data.load_dataset(args)
    model = train.MWT(args, 1, 10).requires_grad_(False)
    result, right, decibels = train.evaluate(model, test), [], []
    for image, label in zip(test.signal(test.pixels), test.labels):
        phi = model.adapt(image[None])
        right.append(int(model.read(model.tokens(phi)).argmax()) == int(label))
        error = (model.siren(model.coords, phi)[0].clamp(-1, 1) - image.flatten(1).mT) / 2
        decibels.append(10 * math.log10(1 / float(error.square().mean())))
    p = np.mean(right)
    assert result["test_accuracy"] == p and abs(result["test_psnr"] - np.mean(decibels)) < 1e-3
    for x in result["test_interval"]:  # Wilson (1927): the roots x of (p - x)^2 = z^2 x (1 - x) / n
        assert abs((p - x) ** 2 - 1.959964 ** 2 * x * (1 - x) / 30) < 1e-9
    model.fraction = 0.3
    assert train.evaluate(model, test) == train.evaluate(model, test) != result  # the same pixels each time


# ---- train.py: the outer loop --------------------------------------------------------------------

@folder()
def test_training_learns_and_reports():
    """A small run on digits gets well above chance, and writes what it says it writes."""
    out = trained("--train-size 700 --epochs 5 --width 32 --depth 1 --reader-depth 2 --steps 3 --lr 1e-2 "
                  "--test-size 180 --val 0.2", draw=True)
    r, before = report(), Path("out.pt").read_bytes()
    assert r["test_accuracy"] > 0.75 and r["test_psnr"] > 20
    assert r["epochs"][0]["loss"] > r["epochs"][-1]["loss"] and len(r["epochs"]) == 5
    assert r["epochs"][-1]["test_accuracy"] == r["test_accuracy"] and r["seconds"] > 0
    assert r["flags"]["width"] == 32 and r["versions"]["torch"] == torch.__version__
    assert Path("out.png").read_bytes().startswith(b"\x89PNG") and not Path("out.pt.tmp").exists()
    assert set(read_checkpoint("out.pt")) == {"format", "version", "method", "args", "data", "model", "metrics"}
    assert "95% interval" in out and "held-out" in out and out.count("\nepoch") == 5
    assert f"{100 * r['test_accuracy']:.2f}%" in trained("--eval-only --ckpt out.pt")
    assert Path("out.pt").read_bytes() == before and "finished" in trained("--resume")


@float64()
@folder()
def test_outer_steps_by_hand():
    """Three steps with the rates of OneCycleLR and the clipping written out, on textbook gradients."""
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
        # OneCycleLR (Smith & Topin 2018) with a warm-up of 0.05 of 3 steps: all three are on the way down.
        fall = (1 + math.cos(math.pi * (t - (0.05 * 3 - 1)) / (2 - (0.05 * 3 - 1)))) / 2
        for top, group in zip((0.02, 0.3, 0.02), optimizer.param_groups, strict=True):
            group["lr"] = top / 25e4 + (top - top / 25e4) * fall
            group["betas"] = 0.95 + (0.85 - 0.95) * fall, 0.999
            norm = torch.cat([p.grad.flatten() for p in group["params"]]).norm()
            clipped |= bool(norm > 1)
            for p in group["params"]:
                p.grad *= min(1, 1 / (norm + 1e-6))
        optimizer.step()
    assert clipped, "no gradient was long enough to be clipped"
    assert apart(got.parameters(), model.parameters()) <= 1e-9


@folder()
def test_augmentation_reaches_the_run():
    seen = []

    def spy(images, u, flip):
        seen.append(flip)
        return plain(images, u, flip)
    image_folder("set")
    with replaced(data, "augment", spy) as plain:
        trained(TINY, "--epochs 1")
        assert not seen
        trained(TINY, "--epochs 1 --augment")
        trained(TINY, "--epochs 1 --augment --train-size 32 --test-size 9 --dataset set --size 8 --out set.pt")
    assert seen == [False] * 10 + [True] * 2  # digits have no mirror image


@folder()
def test_shared_step_sizes_and_steps_at_test_time():
    for more in ([], ["--freeze-siren"]):
        trained(TINY, "--epochs 1 --shared-lr --steps-test 5", more)
        psnr = {}
        for k in (1, 2, 5):
            trained(f"--eval-only --ckpt out.pt --steps-test {k} --out now.pt")
            psnr[k] = round(report("now")["test_psnr"], 3)
        assert len(set(psnr.values())) == 3 and psnr[5] == round(report()["test_psnr"], 3), more
    assert "--eval-only" in report("now")["command"] and "--eval-only" not in report()["command"]


@folder()
def test_loss_that_is_not_finite_stops_the_run():
    status, _, err = command([*TINY, *"--epochs 1 --batch-size 160 --lr 1e38 --lr-alpha 1e38".split()])  # one step
    assert status == 1 and "epoch 1, step 1" in err and not Path("out.pt").exists(), err
    status, _, err = command([*TINY, *"--epochs 40 --lr 1e37 --save-minutes 0".split()])
    assert status == 1 and "not finite at epoch" in err and err.count("\n") == 1, err
    if Path("out.pt").exists():
        model, _ = load_checkpoint("out.pt")
        assert all(torch.isfinite(p).all() for p in model.parameters()) and "last good checkpoint" in err


@folder()
def test_broken_image_met_while_streaming_is_named_after_saving():
    argv = [*TINY, *"--dataset set --size 64 --fraction 0.01 --augment --train-size 36 --test-size 9".split()]
    with replaced(data, "RESIDENT_BYTES", 0):
        file = image_folder("set") / "train" / "b" / "005.png"
        whole = file.read_bytes()
        file.write_bytes(whole[:100])
        for workers in (0, 2):
            status, _, err = command([*argv, "--batch-size", 4, "--workers", workers, "--out", f"{workers}.pt"])
            assert status == 2 and err.count("\n") == 1 and "005.png" in err, err
            assert read_checkpoint(f"{workers}.pt")["progress"]["step"] < 9
        file.write_bytes(whole)
        assert "waiting for data" in trained("--resume --out 2.pt")
        assert all(0 < epoch["waiting_for_data"] < epoch["seconds"] for epoch in report("2")["epochs"])


# ---- train.py: interrupted runs, several processes -----------------------------------------------

@folder()
def test_signals_save_and_say_how_to_resume():
    """The signal comes in the 15th of 20 steps. What was stopped is not overwritten, and goes on bit for bit."""
    steps = []

    def spy(images, u, flip):
        steps.append(len(steps) + 1)
        if steps[-1] == 15:
            os.kill(os.getpid(), number)
        return plain(images, u, flip)
    out = ["--out", "a run.pt"]
    with replaced(data, "augment", spy) as plain:
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.getsignal(number)
            steps.clear()
            status, _, err = command([*TINY, "--augment", *out])
            assert status == 128 + number and "train.py --resume --out 'a run.pt'" in err and err.count("\n") == 1, err
            progress = read_checkpoint("a run.pt")["progress"]
            assert (progress["epoch"], progress["step"]) == (1, 5) and signal.getsignal(number) == before
            refused([*TINY, *out], "--resume")
            refused(["--resume", *out, "--lr", "0.5"], "--lr")
            trained(["--resume", *out, "--save-minutes", "1"])
        trained(TINY, "--augment --out straight.pt")
        assert same(*(read_checkpoint(name)["model"] for name in ("straight.pt", "a run.pt")))


def position(path) -> float:
    """Steps done, of 20 an epoch, as the checkpoint says; 0 without one, infinite when it is finished."""
    if not Path(path).exists():
        return 0
    progress = read_checkpoint(path).get("progress", {"epoch": math.inf, "step": 0})
    return 20 * progress["epoch"] + progress["step"]


def same_epochs(a: dict, b: dict, tolerance: float) -> bool:
    pairs = zip(a["metrics"]["epochs"], b["metrics"]["epochs"], strict=True)
    return all(abs(x[k] - y[k]) <= tolerance for x, y in pairs
               for k in x if k not in ("seconds", "waiting_for_data", "peak_memory_bytes"))


@folder()
def test_resume_after_kill_bit_for_bit():
    """Four epochs in one go, against the same killed in epoch 2 and resumed."""
    argv = [*TINY, *"--train-size 320 --epochs 4 --fraction 0.5 --augment --save-minutes 0".split()]
    killed = start(HERE / "train.py", *argv, "--out", "killed.pt")
    wait_for(lambda: position("killed.pt") > 22, killed)
    killed.kill()
    killed.communicate()
    assert 22 < position("killed.pt") < 80, "the kill came too late"
    trained("--resume --out killed.pt --save-minutes 5")
    trained(argv, "--out straight.pt --save-minutes 5")
    a, b = (read_checkpoint(p) for p in ("straight.pt", "killed.pt"))
    assert same(a["model"], b["model"]) and same_epochs(a, b, 0)


@folder()
def test_two_processes_equal_one():
    """torchrun, gloo, float64: two processes, stopped by SIGTERM and resumed, against one with twice the batch."""
    code = "import sys, torch\nsys.path.insert(0, sys.argv[1])\ntorch.set_default_dtype(torch.float64)\n" \
           "import train\ntrain.main(sys.argv[2:])"

    def torchrun(*argv):
        return start(*"-m torch.distributed.run --standalone --nproc_per_node=2 --no-python".split(), sys.executable,
                     "-c", code, HERE, *argv)

    argv = [*TINY, "--train-size", "320", "--test-size", "39"]
    two = torchrun(*argv, "--batch-size", 8, "--out", "two.pt", "--save-minutes", 0)
    wait_for(lambda: position("two.pt") > 2, two)
    two.terminate()
    _, _, err = finish(two)
    assert "torchrun --nproc_per_node=2 train.py --resume --out two.pt" in err, err
    assert 2 < position("two.pt") < 40, "the signal came too late"
    status, out, err = finish(torchrun("--resume", "--out", "two.pt"))
    assert status == 0 and out.count("\nepoch") == 2, (out, err)  # only the first process prints
    with float64():
        trained(argv, "--out one.pt")
    a, b = (read_checkpoint(p) for p in ("one.pt", "two.pt"))
    assert list(a["model"]) == list(b["model"]) and a["model"]["siren.first"].dtype == torch.float64
    assert apart(b["model"].values(), a["model"].values()) <= 1e-9 and same_epochs(a, b, 1e-4)


# ---- train.py: a reader on fixed weights ---------------------------------------------------------

@folder()
def test_frozen_siren_and_new_reader():
    trained(TINY, "--w-task 0 --seed 1 --out wt.pt --val 0.1")
    trained(TINY, "--init-from wt.pt --freeze-siren --out seq.pt")
    (wt, _), (seq, args) = (load_checkpoint(p) for p in ("wt.pt", "seq.pt"))
    for name in ("siren", "inner_loop"):
        assert same(getattr(wt, name).state_dict(), getattr(seq, name).state_dict())
    assert not torch.equal(wt.reader.embed.weight, seq.reader.embed.weight)
    assert args.val == 0.1  # what the INR did not see stays unseen
    Path("wt.pt").rename("moved.pt")
    trained("--resume --out seq.pt")
    Path("moved.pt").rename("wt.pt")
    refused([*TINY, "--init-from", "wt.pt", "--out", "wt.pt"], "overwrite")
    refused(["--init-from", "wt.pt", "--width", "16"], "--width")


@float64()
@folder()
def test_frozen_siren_fits_once_and_trains_the_same_reader():
    fitted = []

    def spy(self, siren, coords, values):
        fitted.append(values.shape[1])
        return plain(self, siren, coords, values)
    with replaced(MetaSGD, "descend", spy) as plain:
        trained(TINY, "--epochs 4 --freeze-siren")
        assert 200 <= sum(fitted) < 250  # 160 and 40 images, and some for the pictures
        got, args = load_checkpoint("out.pt")
        model = train.MWT(args, 1, 10)  # the same, image by image
        for part in (model.siren, model.inner_loop):
            part.requires_grad_(False)
        args.out = None
        fitted.clear()
        metrics = train.train(args, model, train.image_task(args, model, *data.load_dataset(args)))
        assert sum(fitted) == 4 * 200 and apart(got.parameters(), model.parameters()) <= 1e-9
        for x, y in zip(report()["epochs"], metrics["epochs"], strict=True):
            assert all(abs(x[k] - y[k]) < 1e-6 for k in ("loss", "train_accuracy", "test_accuracy", "test_psnr"))
        for more in ("--fraction 0.5", "--augment"):  # no fit is the same twice
            fitted.clear()
            trained(TINY, "--freeze-siren", more)
            assert sum(fitted) >= 2 * 200


@folder()
def test_resume_of_a_frozen_run_bit_for_bit():
    class Killed(BaseException):
        pass

    def spy(path, content):
        plain(path, content)
        if content.get("progress", {"epoch": 0})["epoch"] == 2:
            raise Killed
    with replaced(train, "save_checkpoint", spy) as plain, raises(Killed):
        trained(TINY, "--epochs 3 --freeze-siren --out killed.pt")
    assert len(read_checkpoint("killed.pt")["metrics"]["epochs"]) == 2
    trained("--resume --out killed.pt")
    trained(TINY, "--epochs 3 --freeze-siren --out straight.pt")
    a, b = (read_checkpoint(name) for name in ("straight.pt", "killed.pt"))
    assert same(a["model"], b["model"]) and same_epochs(a, b, 0)


@folder()
def test_reader_learns_planted_classes():
    g = generator("planted")
    directions = torch.randn(3, 6, 5, generator=g)

    def planted(n):
        labels = torch.randint(3, (n,), generator=g)
        return 0.01 * (directions[labels] + torch.randn(n, 6, 5, generator=g)), labels
    (tokens, labels), (others, other_labels) = planted(300), planted(200)
    args = settings.settings(dict(width=8, head_dim=4, reader_depth=1, epochs=10, batch_size=16, lr=1e-2))
    reader = train.train_reader(tokens, labels, args)
    assert reader.beta.shape == (6, 5) and not list(Path().iterdir())
    assert (reader(others).argmax(1) == other_labels).double().mean() > 0.95
    assert abs(float((reader.token_scale * tokens).square().mean()) - 1) < 1e-5
    assert same(reader.state_dict(), train.train_reader(tokens, labels, args).state_dict())
    args.seed = 1
    assert not same(reader.state_dict(), train.train_reader(tokens, labels, args).state_dict())


# ---- measures.py: geometry ------------------------------------------------------------------------------------------


def samples(seed=0, n=90, d=3, integers=False):
    """Rows with many ties and duplicates, or without ties; three classes of unequal size."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(3, (n, d), generator=g).float() if integers else torch.randn(n, d, generator=g)
    return x, torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), n, replacement=True, generator=g)


def planted_classes(seed, n, d, classes, spread=1.0):
    """Rows of unit normal noise around class means drawn from N(0, spread^2)."""
    g = torch.Generator().manual_seed(seed)
    means, labels = spread * torch.randn(classes, d, generator=g), torch.randint(classes, (n,), generator=g)
    return means[labels] + torch.randn(n, d, generator=g), labels


def brute_distances(bank, queries):
    """By differences in float64."""
    return (queries.double()[:, None] - bank.double()[None]).square().sum(2)


def rejects(function, *args, **more) -> bool:
    """A ValueError of one line."""
    try:
        function(*args, **more)
    except ValueError as error:
        return "\n" not in str(error)
    return False


def test_neighbors_against_brute_force():
    x, labels = samples(0)
    y, queries = samples(1, 40)
    for shift, dtype in ((0, torch.float32), (30, torch.float32), (100, torch.float64)):
        a, b = (x + shift).to(dtype), (y + shift).to(dtype)
        between, among = brute_distances(a, b), brute_distances(a, a)
        among.fill_diagonal_(math.inf)
        for distance in (between, among):  # the planted_classes rows have no two distances closer than rounding
            gaps = distance.sort(1).values[:, :11].diff(dim=1)
            assert gaps.min() > (1e-7 if shift == 0 else 1e-9)
        for k in (1, 4, 10):
            expected = between.argsort(1)[:, :k]
            found = measures.nearest(a, b, k)
            assert torch.equal(found, expected) and found.dtype == torch.int64, (shift, k)
            counts = [[labels[rows].tolist().count(c) for c in range(3)] for rows in expected]
            winners = torch.tensor([count.index(max(count)) for count in counts])
            assert torch.equal(measures.knn_predict(a, labels, b, k), winners)
            assert measures.knn_accuracy(a, labels, b, queries, k) == float((winners == queries).double().mean())
            own = among.argsort(1)[:, :k]
            assert torch.equal(measures.nearest(a, k=k), own)
            share = (labels[own] == labels[:, None]).double().mean(1)
            assert torch.allclose(measures.purity(a, labels, k), share, atol=1e-12)
            assert abs(measures.neighbor_purity(a, labels, k) - float(share.mean())) < 1e-12


def test_ties_of_distances_and_votes():
    assert measures.vote(torch.tensor([[2, 1, 1, 2], [0, 2, 2, 1], [2, 2, 0, 1]]), 3).tolist() == [1, 2, 2]
    bank, labels = torch.tensor([[0.0], [1.0], [3.0], [4.0]]), torch.tensor([9, 4, 4, 9])
    assert measures.knn_predict(bank, labels, torch.tensor([[2.0]]), 4).tolist() == [4]  # two votes each
    assert measures.nearest(torch.tensor([[0.0], [4.0], [2.0]]), torch.tensor([[2.0]]), 3).tolist() == [[2, 0, 1]]
    x, _ = samples(0, integers=True)
    x = torch.cat([x, -x])  # mean 0, so without rounding; many equal distances
    distance = brute_distances(x, x).fill_diagonal_(math.inf)
    found = measures.nearest(x, k=10)
    taken = distance.gather(1, found)
    assert torch.equal(taken, distance.sort(1).values[:, :10])
    assert ((taken[:, 1:] > taken[:, :-1]) | (found[:, 1:] > found[:, :-1])).all()
    assert not (found == torch.arange(len(x))[:, None]).any()
    equal = torch.randn(1, 300, generator=torch.Generator().manual_seed(0)).repeat(40, 1)
    others = torch.randn(40, 300, generator=torch.Generator().manual_seed(1))
    x = torch.cat([equal, others])  # rounding does not part equal rows
    assert torch.equal(measures.nearest(x, equal[:1], 40), torch.arange(40)[None])
    assert measures.silhouette(equal, torch.arange(40) % 2) == 0
    assert (measures.silhouettes(x, torch.arange(80) // 40)[:40] == 1).all()


def test_blocks_change_nothing():
    x, labels = samples(0, 200, 5)
    y, _ = samples(1, 50, 5)

    def everything():
        return (measures.nearest(x, k=7), measures.nearest(x, y, 7), measures.silhouettes(x, labels),
                measures.nearest_mean_predict(x, labels, y), measures.class_means(x, labels, 3),
                torch.tensor(measures.fisher_ratio(x, labels)))

    whole = everything()
    with replaced(measures, "BLOCK", 1700), replaced(measures, "BLOCK_ROWS", 7):
        for a, b in zip(everything(), whole):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_silhouette_and_class_means_against_brute_force():
    for integers in (True, False):
        x, labels = samples(2, integers=integers)
        y, queries = samples(3, 40)
        X, L = x.double().numpy(), labels.numpy()
        scores = []
        for i in range(len(X)):
            d = np.sqrt(((X - X[i]) ** 2).sum(1))
            a, b = d[(L == L[i]) & (np.arange(len(X)) != i)].mean(), min(d[L == c].mean() for c in set(L) - {L[i]})
            scores.append((b - a) / max(a, b))
        assert np.abs(measures.silhouettes(x, labels).numpy() - scores).max() < 1e-5
        assert abs(measures.silhouette(x, labels) - np.mean(scores)) < 1e-5
        means = np.stack([X[L == c].mean(0) for c in range(3)])
        assert np.abs(measures.class_means(x, labels, 3).numpy() - means).max() < 1e-12
        between = sum((L == c).sum() * ((means[c] - X.mean(0)) ** 2).sum() for c in range(3))
        assert abs(measures.fisher_ratio(x, labels) - between / ((X - means[L]) ** 2).sum()) < 1e-10
        predicted = ((y.double().numpy()[:, None] - means) ** 2).sum(2).argmin(1)
        assert measures.nearest_mean_predict(x, labels, y).tolist() == predicted.tolist()
        assert measures.nearest_mean_accuracy(x, labels, y, queries) == np.mean(predicted == queries.numpy())
    assert measures.class_means(x, labels, 4)[3].isnan().all()
    sparse = torch.where(labels == 1, 7, labels)  # labels 1 and 3 to 6 do not occur
    for predict in (measures.nearest_mean_predict, measures.linear_probe_predict, measures.knn_predict):
        assert set(predict(x, sparse, 100 * y).tolist()) <= {0, 2, 7}
    assert measures.nearest_mean_predict(torch.tensor([[0.0], [2.0]]), torch.tensor([5, 3]), torch.ones(1, 1)) == 3


def test_measures_by_hand_and_invariance():
    x, labels = torch.tensor([[0.0], [1.0], [10.0], [12.0]]), torch.tensor([0, 0, 1, 1])
  # a = 1, 1, 2, 2; b = 11, 10, 9.5, 11.5
    assert np.allclose(measures.silhouettes(x, labels), [10 / 11, 9 / 10, 7.5 / 9.5, 9.5 / 11.5], atol=1e-6)
    assert measures.silhouettes(x, torch.tensor([0, 0, 0, 5]))[3] == 0  # alone in its class
  # means 0.5 and 11, overall 5.75: between 4 * 5.25^2, within 2 * 0.25 + 2 * 1
    assert abs(measures.fisher_ratio(x, labels) - 4 * 5.25 ** 2 / 2.5) < 1e-9
    assert measures.purity(x, labels, 1).tolist() == [1] * 4 and measures.neighbor_purity(x, labels, 3) == 1 / 3
    for same in (torch.full((7, 2), 0.1), torch.full((7, 2), 0.1, dtype=torch.float64)):
        ids = torch.tensor([0, 1, 1, 0, 1, 0, 1])
        assert measures.silhouette(same, ids) == 0 and measures.fisher_ratio(same, ids) == 0
        assert measures.fisher_ratio(same + ids[:, None], ids) == math.inf
    x, labels = samples(4, 60, 4)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0]
    for moved in (x @ rotation, x + 3, 500 * x):  # phi, phi - theta and scaled tokens differ by shift and scale
        for measure in (measures.neighbor_purity, measures.silhouette, measures.fisher_ratio):
            assert abs(measure(moved, labels) - measure(x, labels)) < 1e-5
    far = torch.cat([x, x[:1] + 1e4])  # float64 sums: a far row costs nothing
    X, L = far.double(), torch.cat([labels, labels[:1]])
    means = torch.stack([X[L == c].mean(0) for c in range(3)])
    within = (X - means[L]).square().sum()
    assert abs(measures.fisher_ratio(far, L) / float((X - X.mean(0)).square().sum() / within - 1) - 1) < 1e-9


def test_measures_on_odd_input():
    x, labels = samples(0)
    y, queries = samples(1, 30)
    x, y = (300 * x).round(), (300 * y).round()
    pair = measures.knn_accuracy, measures.nearest_mean_accuracy, measures.linear_probe
    alone = measures.neighbor_purity, measures.silhouette, measures.fisher_ratio
    for measure in pair:
        expected = measure(x, labels, y, queries)
        for other in (x.long(), x.double(), x.half(), x.clone().requires_grad_()):
            got = measure(other, labels.int(), y, queries.to(torch.uint8))
            assert type(got) is float and abs(got - expected) < 0.04, measure
        assert measure(x, labels * 10 ** 9 + 5, y, queries * 10 ** 9 + 5) == expected  # any integers from 0
    bad = [(x * 1e20, labels), (x[:, :0], labels), (x, labels - 1), (x, labels.float()), (x * math.nan, labels),
           (x[:0], labels[:0]), (x, labels[:-1]), (x[0], labels)]
    assert all(rejects(measures.knn_predict, x, labels, queries) for queries in (x * 1e20, x * math.nan, x[:0], x[0]))
    for args in bad:
        assert all(rejects(measure, *args) for measure in alone), args
        assert all(rejects(measure, *args, y, queries) for measure in pair), args
    for measure in pair:
        assert rejects(measure, x, labels, y[:, :1], queries) and rejects(measure, x, labels, y, queries[:-1])
    assert rejects(measures.knn_accuracy, x, labels, y, queries, 0) and rejects(measures.neighbor_purity, x, labels, 0)
    assert rejects(measures.neighbor_purity, x, labels, 90) and not rejects(measures.neighbor_purity, x, labels, 89)
    assert rejects(measures.nearest, x, k=90) and not rejects(measures.nearest, x, y, k=90)
    assert rejects(measures.linear_probe, x, labels * 0, y, queries) and rejects(measures.silhouette, x, labels * 0)


# ---- measures.py: linear probe --------------------------------------------------------------------------------------

def newton(x, labels, classes, penalty):
    """Multinomial logistic regression by Newton's method in float64: logits as a function."""
    z = F.pad(x, (0, 1), value=1.0)
    n, d = z.shape
    ridge = torch.eye(d, dtype=z.dtype) * penalty
    ridge[-1, -1] = 1e-9  # of logits' common part, which changes nothing
    W, Y = torch.zeros(classes, d, dtype=z.dtype), F.one_hot(labels, classes).to(z.dtype)
    for _ in range(30):
        p = (z @ W.T).softmax(1)
        gradient = (p - Y).T @ z / n + W @ ridge
        curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None]  # (n, classes, classes)
        hessian = torch.einsum("nab,ni,nj->aibj", curvature, z, z).reshape(classes * d, -1) / n
        hessian += torch.block_diag(*[ridge] * classes)
        W -= torch.linalg.solve(hessian, gradient.flatten()).view(classes, d)
    return lambda y: F.pad(y, (0, 1), value=1.0) @ W.T


def test_linear_probe_is_at_its_optimum():
    """The gradient of the penalised loss is 0, and the logits are those of Newton's method in float64."""
    g = torch.Generator().manual_seed(0)
    for n, d, penalty in ((60, 5, 1.0), (60, 5, 0.01), (40, 60, 0.05)):
        x, labels = torch.randn(n, d, generator=g), torch.randint(3, (n,), generator=g)
        exact = newton(x.double(), labels, 3, penalty)(x.double())
        for z in (x, x.double()):
            weight, bias = (p.requires_grad_() for p in measures.logistic(z, labels, 3, penalty))
            assert weight.shape == (3, d) and bias.shape == (3,)
            loss = F.cross_entropy(z @ weight.T + bias, labels) + penalty / 2 * weight.square().sum()
            gradient = torch.cat([p.flatten() for p in torch.autograd.grad(loss, (weight, bias))])
            assert gradient.norm() < 2e-3
            logits = (z @ weight.T + bias).detach().double()
            assert (logits.log_softmax(1) - exact.log_softmax(1)).abs().max() < 0.03, (n, d, penalty)
    weight, bias = measures.logistic(x, labels, 3, 100.0)  # the bias is free
    assert weight.abs().max() < 0.01 and (bias.softmax(0) - torch.bincount(labels) / n).abs().max() < 0.01


def test_linear_probe_standardises_and_fits_all_of_the_bank():
    x, labels = planted_classes(1, 300, 8, 3, 0.7)
    y, _ = planted_classes(2, 200, 8, 3, 0.7)
    mean, deviation = x.double().mean(0), x.double().std(0, correction=0)
    logits = newton((x.double() - mean) / deviation, labels, 3, 0.01 * 8)
    expected = logits((y.double() - mean) / deviation)
    sure = (expected.topk(2).values.diff() < -0.05).squeeze(1)
    stretch = torch.logspace(-3, 3, 8)  # features of all scales, far from 0
    for bank, queries in ((x, y), (x * stretch + 5, y * stretch + 5)):
        got = measures.linear_probe_predict(bank, labels, queries, penalties=(0.01,))
        assert torch.equal(got[sure], expected.argmax(1)[sure]) and sure.float().mean() > 0.8
    copied = measures.linear_probe_predict(x.repeat(1, 3), labels, y.repeat(1, 3), penalties=(0.01,))
    assert torch.equal(copied[sure], expected.argmax(1)[sure])  # copies change nothing
    constant = F.pad(x, (0, 1), value=0.1), F.pad(y, (0, 1), value=5.0)  # and constants count 0
    same = measures.linear_probe_predict(constant[0], labels, constant[1])
    same = same == measures.linear_probe_predict(x, labels, y)
    assert same.float().mean() > 0.98
    assert measures.linear_probe(x * 0 + 1, labels, y, labels[:200]) <= 0.6  # nothing but constants


def test_linear_probe_chooses_its_penalty():
    """Penalty by the held-out fifth's cross-entropy; two in a row that are no better end the search."""
    tried = []

    def spy(x, labels, classes, penalty, start=None):
        tried.append((len(x), round(penalty / x.shape[1], 9), start is None))
        return plain(x, labels, classes, penalty, start)

    def choice(x, labels):
        tried.clear()
        measures.linear_probe_predict(x, labels, x)
        return tried[-1][1]

    with replaced(measures, "logistic", spy) as plain:
        easy, hard = planted_classes(3, 400, 30, 4, 1.0), planted_classes(3, 400, 30, 4, 0.0)
        assert choice(*easy) <= 1e-4 and choice(*hard) == 0.1
        penalties = [penalty for _, penalty, _ in tried[:-1]]
        assert penalties == [0.1, 0.01, 0.001] and [first for *_, first in tried] == [True] + [False] * 3
        fifth = sum(int((hard[1] == c).sum()) // 5 for c in range(4))
        assert [n for n, *_ in tried] == [400 - fifth] * 3 + [400]
        few = torch.arange(8) % 2  # nothing can be held out
        assert choice(torch.randn(8, 3), few) == 0.1


def test_linear_probe_on_planted_classes():
    """Where scikit-learn's LogisticRegression has 1.0 at every C from 0.1 up, the probe has it too."""
    for seed in range(3):
        x, labels = planted_classes(seed, 1500, 40, 7)
        assert measures.linear_probe(x[:500], labels[:500], x[500:], labels[500:]) >= 0.996, seed
    x, labels = planted_classes(0, 220, 40, 7)
    wide = torch.cat([x, torch.randn(220, 160, generator=torch.Generator().manual_seed(9))], 1)  # d > n
    assert measures.linear_probe(wide[:150], labels[:150], wide[150:], labels[150:]) > 0.7


# ---- measures.py: statistics ----------------------------------------------------------------------------------------

def test_wilson_and_t_by_table():
    low, high = measures.wilson(45, 50)  # roots of (p - x)^2 = z^2 x (1 - x) / n
    for end in (low, high):
        assert abs((0.9 - end) ** 2 - 1.959964 ** 2 * end * (1 - end) / 50) < 1e-12
    assert low < 0.9 < high and measures.wilson(0, 10)[0] == 0 and measures.wilson(10, 10)[1] > 1 - 1e-12
    assert all(rejects(measures.wilson, *args) for args in ((0, 0), (3, 2), (-1, 2)))
    table = {1: 12.7062, 2: 4.30265, 5: 2.57058, 10: 2.22814, 30: 2.04227, 1000: 1.96234}
    assert all(abs(measures.t_quantile(freedom) - t) < 2e-4 * t for freedom, t in table.items())
    mean, low, high = measures.t_interval([1.0, 2.0, 3.0])
    assert mean == 2 and abs(high - (2 + 4.30265 / math.sqrt(3))) < 1e-3 and abs(low + high - 4) < 1e-9
    assert measures.t_interval([1.0]) is None


def ratio_of_means(means):
    return means[..., 0] / means[..., 1]


def test_bootstrap_covers_and_knows_ties():
    a = torch.tensor([1.0] * 70 + [0.0] * 30)
    assert measures.paired_bootstrap(a, a) == (0, 0, 0)
    mean, low, high = measures.paired_bootstrap(a, torch.zeros(100))
    half = 1.96 * math.sqrt(0.7 * 0.3 / 100)
    assert abs(mean - 0.7) < 1e-12 and abs(low - (0.7 - half)) < 0.02 and abs(high - (0.7 + half)) < 0.02
    assert measures.paired_bootstrap(a, 1 - a, seed=3) == measures.paired_bootstrap(a, 1 - a, seed=3)
    assert measures.bootstrap(a) == measures.bootstrap(a[:, None]) == (mean, low, high)
    counts = measures.multiplicities(100, 5, 300)
    assert counts.shape == (300, 100) and (counts.sum(1) == 100).all() and abs(float(counts.var()) - 0.99) < 0.05
    g, covered = torch.Generator().manual_seed(0), 0
    for repeat in range(200):  # a ratio_of_means of means, truth 2
        x = 1 + torch.rand(100, generator=g)
        values = torch.stack([2 * x + torch.randn(100, generator=g), x], 1)
        _, low, high = measures.bootstrap(values, ratio_of_means, seed=repeat, draws=400)
        covered += low <= 2 <= high
    assert 0.88 < covered / 200 < 0.99
    spread = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(50, 4)  # all variance is between the repeats
    value, low, high = measures.bootstrap(spread, measures.over_repeats())
    assert value == 1.5 and low < 0.8 and high > 2.2
    column = torch.arange(30.0)  # as many rows as repeats: they are not drawn alike, or the two would cancel
    _, low, high = measures.bootstrap(column - column[:, None], measures.over_repeats())
    assert high - low > 5


def test_ranks_and_auroc_against_brute_force():
    assert measures.ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1, 3.5, 2]
    g = torch.Generator().manual_seed(1)
    score, right = torch.randint(6, (80,), generator=g).float(), torch.rand(80, generator=g) < 0.6

    def brute(rows):
        s, r = score[rows], right[rows]
        return float(((s[r][:, None] > s[~r]).double() + 0.5 * (s[r][:, None] == s[~r])).mean())

    value, low, high = measures.auroc(score, right)
    assert abs(value - brute(torch.arange(80))) < 1e-12
    drawn = torch.randint(80, (1000, 80), generator=torch.Generator().manual_seed(0))  # one draw at a time
    assert np.allclose((low, high), np.quantile([brute(rows) for rows in drawn], [0.025, 0.975]), atol=1e-9)
    assert measures.auroc(score, right | True) is None and measures.auroc(score, right & False) is None
    assert measures.auroc(right.float(), right) == (1, 1, 1)
    one = measures.auroc(torch.arange(4.0), torch.arange(4) == 1)  # a third of the draws is without a right row
    assert all(math.isfinite(end) for end in one)


def test_correlations():
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(12, generator=g), torch.randn(12, generator=g)
    columns = {"a": x.tolist(), "b": (x + y).tolist()}
    result = measures.correlations(columns, y.tolist(), list(range(12)))
    assert result["n"] == result["settings"] == 12 and list(result["pearson"]) == ["a", "b", "last - first"]
    assert abs(result["pearson"]["b"][0] - np.corrcoef(x + y, y)[0, 1]) < 1e-6
    place = np.argsort(np.argsort(x)), np.argsort(np.argsort(y))
    assert abs(result["spearman"]["a"][0] - np.corrcoef(*place)[0, 1]) < 1e-6
    for kind in ("pearson", "spearman"):
        a, b, difference = (result[kind][name] for name in ("a", "b", "last - first"))
        assert abs(difference[0] - (b[0] - a[0])) < 1e-12
        assert all(low < value < high for value, low, high in (a, b, difference))
    assert measures.correlations({"a": [1, 2, 3, 4]}, [1, 2, 3, 4], list("abcd")) is None
    assert measures.correlations({"a": [1] * 6}, range(6), range(6)) is None
    assert measures.correlations({"a": range(6)}, range(6), [0] * 6) is None
    seeds, apart = (measures.correlations({"a": x.repeat(9).tolist()}, y.repeat(9), settings, draws=500)["pearson"]["a"]
                    for settings in (list(range(12)) * 9, list(range(108))))
    assert seeds[2] - seeds[1] > 2 * (apart[2] - apart[1])  # nine seeds of a setting are no nine settings
    few = measures.correlations({"a": x.tolist()}, y, [i % 4 for i in range(12)], draws=50)["pearson"]
    assert list(few) == ["a"] and few["a"][1:] == (None, None)  # four settings: no interval
    monotone = measures.correlations({"a": range(6)}, [i ** 3 for i in range(6)], range(6), draws=50)
    assert monotone["spearman"]["a"][1:] == (None, None) and monotone["pearson"]["a"][1] is not None


def test_crossed_does_not_flatter():
    noise = torch.rand(400, 60, generator=torch.Generator().manual_seed(2))  # the best of 60 equal candidates
    picked, choices = measures.crossed(noise)
    assert abs(float(picked.mean()) - 0.5) < 0.05 and float(noise.mean(0).max()) > 0.525
    half = torch.randperm(400, generator=torch.Generator().manual_seed(0))[:200]
    assert choices[0] == noise[torch.ones(400).index_fill(0, half, 0).bool()].mean(0).argmax()
    assert torch.equal(picked[half], noise[half, choices[0]].double())
    better = noise.clone()
    better[:, 7] += 1
    assert measures.crossed(better)[1] == [7, 7]
    repeats = torch.stack([better, better], 2)
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
    low_rank = torch.randn(40, 2, generator=g) @ torch.randn(2, 9, generator=g)
    assert measures.principal(low_rank.double())[1].shape == (9, 2)
    assert abs(measures.effective_rank(torch.ones(5)) - 5) < 1e-6
    assert abs(measures.effective_rank(torch.tensor([3.0, 0.0])) - 1) < 1e-6
    assert measures.r_squared(torch.tensor([1.0, 5.0, 1.0])) == 0.75
    x = torch.randn(1000, 4, generator=g)
    noise = torch.randn(1000, 3, generator=g)
    y = torch.stack([x[:, 0] + 3, x[:, 1] + noise[:, 1], noise[:, 2], torch.ones(1000)], 1)  # R^2 1, 1/2, 0; none
    r2 = measures.regression(x[:600], y[:600], x[600:], y[600:])
    assert r2[0][0] > 1 - 1e-9 and r2[3] is None
    for (value, low, high), truth in zip(r2[1:3], (0.5, 0.0)):
        assert low < value < high and low - 0.03 < truth < high + 0.03 and high - low < 0.25
    X, Y = F.pad(x, (0, 1), value=1.0).double().numpy(), y[:, 1].double().numpy()
    rest = Y[600:]
    error = (X[600:] @ np.linalg.lstsq(X[:600], Y[:600], rcond=None)[0] - rest) ** 2
    assert abs(r2[1][0] - (1 - error.mean() / rest.var())) < 1e-9


def test_measures_work_alone():
    """The file, copied into an empty folder, does its work there with torch and numpy."""
    code = ("import torch, measures as m; x, y = torch.randn(60, 4), torch.arange(60) % 3; "
            "print(m.neighbor_purity(x, y, 3), m.silhouette(x, y), m.linear_probe(x, y, x, y), m.wilson(5, 9))")
    with tempfile.TemporaryDirectory() as path:
        shutil.copy(measures.__file__, path)
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run([sys.executable, "-c", code], cwd=path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.split()) == 5, done.stderr


# ---- figures.py: from small planted reports, whole and with parts missing ------------------------

GAP, NO_ENDS = [0.1, 0.0, 0.2], [0.1, None, None]


def drawn(draw, *report) -> bool:
    """Whether draw wrote a PNG file; it is removed."""
    draw(Path("figure.png"), *report)
    content = Path("figure.png").read_bytes()
    Path("figure.png").unlink()
    return content.startswith(b"\x89PNG")


def planted_experiments(whole: bool) -> dict:
    """Not whole: as of a method without a reader of ours or a bias column, right on all images."""
    stage = {"pooled_knn10": 0.5, "seen_knn10": 0.5, "unseen_knn10": 0.4, "auroc": GAP if whole else None}
    more = {"pooled_probe": 0.6, "untrained_pooled_knn10": 0.4, "flattened_knn10": 0.5, "logit_lens": 0.3}
    rows = [stage | {"stage": "input tokens", "logit_lens": None}, stage | {"stage": "MLP 1"} | (more if whole else {})]
    flow = {"rows": rows, "views": ["pooled"] + ["flattened"] * whole, "half": 5, "classes": 3, "reader": 1.0}
    routes = [{"group": group, "name": "x", "loss": GAP, "rank": 1} for group in ("replaced", "rank")[:1 + whole]]
    facts = {"to_facts": {"1": {"mean grey": GAP, "contrast": None}}, "from_facts": []}
    parts = {"bias column" if whole else "x": {"indirect": GAP, "share": GAP}}
    clustering = {"rows": [{"coordinate": "phi - theta", "knn10": 0.5} | ({"probe": 0.6} if whole else {})], "gap": GAP,
                  "classes": 3, "reader": 1.0, "reader_interval": [0.6, 1.0], "verdict": "refuted"}
    knocked = [{"replaced": "MLP", "block": 1, "span": where, "loss": GAP} for where in ("alone", "from here on")]
    return {"clustering": clustering, "token-flow": flow | {"verdict": "not measured"}
            | ({"knock_outs": knocked, "late_minus_half": GAP} if whole else {}),
            "bias-route": {"rows": routes, "permuted": GAP, "margin": GAP, "verdict": "supported",
                           "single_columns": {"losses": {"0": 0.1} if whole else {}}},
            "content": {"regressions": {"x": facts}, "mediation": [{"donors": "other", "total": GAP, "parts": parts}]}}


@folder()
def test_figures_of_one_model():
    for done in (planted_experiments(True), planted_experiments(False)):
        assert drawn(figures.clustering_figure, done["clustering"]) and drawn(figures.flow_figure, done["token-flow"])
        assert drawn(figures.bias_figure, done["bias-route"]) and drawn(figures.content_figure, done["content"])
        assert drawn(figures.content_figure, {"regressions": done["content"]["regressions"]})
        for some in (done, {}, {"clustering": done["clustering"]}):
            model = {"name": "$a$", "reader": 0.7, "test": 9, "data": "$", "experiments": some}
            assert drawn(figures.summary_figure, model)


@folder()
def test_figures_of_training_and_cost():
    keys = ("epoch", "loss", "train_accuracy", "test_accuracy", "train_psnr", "test_psnr")
    for channels, where in ((1, "test set"), (3, "validation share of the training set")):
        images = np.zeros((1, channels, 4, 4))
        shown = {"stages": [0, 2], "images": images, "shown": np.stack([images, images + 2]), "psnr": [[9.0], [20.0]],
                 "classes": ["$"], "guesses": ["a$b$"]}
        report = {"epochs": [dict.fromkeys(keys, 1)], "evaluated_on": where}
        assert drawn(figures.training_figure, report, shown)
    cost = [{"what": "k", "value": k, "ms": [9.0, 10.0], "flops": k * 1e9, "peak_memory_bytes": memory}
            for k, memory in ((1, None), (2, 2 ** 30))]
    assert drawn(figures.cost_figure, {"cost": cost, "device": "cpu"})


@folder()
def test_figures_of_a_sweep_say_whether_they_drew():
    lanes = [{"lane": lane, "n": n, "purity": [0.2, sd], "reader": [0.4, sd], "w_task": 0.01}
             for lane, n, sd in (("wt", 2, 0.1), ("task1", 1, None), ("deeper", 2, 0.1))]
    differences = [{"lane": row["lane"], "minus": "wt", "seeds": row["n"], "interval": GAP} for row in lanes[1:]]
    rho = {"settings": 2, "spearman": {"phi - theta": NO_ENDS, "last - first": GAP}}
    points = [{"architecture": "a", "w_task": 0.1, "purity": 0.2, "reader": 0.4}, {"architecture": "b"}]
    across = {"points": points, "models": 2, "correlations": {"purity": rho, "stage purity": rho}}
    report = {"lanes": lanes, "differences": differences, "factorial": {"seeds": 1, "accuracy": {"bias": GAP}},
              "across": across}
    none = {"lanes": lanes[:1], "differences": [], "factorial": None,
            "across": across | {"correlations": {"stage purity": None}}}
    for name in ("lanes", "clusters", "factorial", "population"):
        draw = getattr(figures, f"{name}_figure")
        assert drawn(draw, report, "test images") and draw(Path("figure.png"), report, "test images") is True
        Path("figure.png").unlink()
        assert draw(Path("figure.png"), none, "test images") is False and not Path("figure.png").exists()
    assert drawn(figures.models_figure, none["across"])


def test_a_probe_that_few_coordinates_have_is_drawn():
    rows = [{"coordinate": name, "knn1": 0.5, "knn10": 0.5, "nearest_mean": 0.5} for name in "ab"]
    result = {"rows": [rows[0] | {"probe": 0.6}, rows[1]], "reader_interval": [0.6, 0.8], "reader": 0.7, "classes": 10,
              "gap": GAP, "verdict": "refuted", "bank": 9, "test": 9}
    for found, expected in ((result, True), (result | {"rows": rows}, False)):
        _, (axis, *_) = figures.canvas(1, 1, 6, 4)
        figures.geometry(axis, found)
        assert ("linear probe" in axis.get_legend_handles_labels()[1]) == expected


def test_figures_stand_alone():
    lines = Path(figures.__file__).read_text().splitlines()
    modules = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert modules <= {"itertools", "math", "textwrap", "pathlib", "numpy", "matplotlib"}
    assert [figures.span(x, 100) for x in (GAP, NO_ENDS, None)] == ["+10.0 [+0.0, +20.0]", "+10.0 (no interval)",
                                                                "none"]


SMALL = dict(width=8, head_dim=4, depth=1, reader_depth=1, steps=2, batch_size=4)


def bench_command(argv):
    """bench.main in process: (exit status, what it printed to stdout and stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            bench.main([str(a) for a in argv])
            status = 0
        except SystemExit as error:
            status = error.code
    return status, out.getvalue(), err.getvalue()


# ---- outer gradients -------------------------------------------------------------------------------------------------

def test_outer_gradients_against_the_textbook():
    """One first-order pass against autograd through autograd in two passes, in float64, per group of parameters."""
    with float64():
        images, labels = batch()
        for w_task in (0.0, 0.01, 1.0):
            for fraction in (1.0, 0.5):
                fast, slow = (tiny_model(inner, w_task=w_task, fraction=fraction)
                              for inner in (None, textbook_loss_and_grad))
                seen = fast.look(images, 4, None if fraction == 1 else torch.Generator().manual_seed(1))
                fast(*seen, labels)[:2].sum().backward()
                bench.textbook_backward(slow, *seen, labels)
                for name, expected in grads(slow).items():
                    assert all(g.abs().max() > 0 for g in expected), name
                    assert apart(grads(fast)[name], expected) <= 1e-8, (name, w_task, fraction)


def trained_a_little(images, labels, **tiny) -> dict:
    """The state of a tiny model after 60 steps on these images."""
    args = settings.settings({**tiny, "lr": 3e-3})
    model = tiny_model(classes=10, **tiny)
    groups = train.parameter_groups(model, args)
    optimizer = train.make_optimizer(groups, args)
    for _ in range(60):
        train.backward(model, groups, *model.look(images, 3), labels)
        train.update(groups, optimizer)
    return model.state_dict()


def test_faster_ways_against_the_textbook():
    """Outer gradients per group: compiled in float32, by torch.func, with inner steps recomputed, and the reader in
    bfloat16. At initialisation within limits; of a trained model, whose gradients are small differences, they are
    printed."""
    ways = {"torch.func": 1e-4, "recomputed": 1e-5, "bf16": 3e-2, "compiled": 1e-4}
    # As inductor captures, decomposes and partitions it; its 40 kernels would take a minute to build.
    compiled = partial(torch.compile, fullgraph=True, backend="aot_eager_decomp_partition")
    tiny = dict(dataset="digits", size=8, width=8, depth=2, steps=2, reader_depth=1, head_dim=4)
    test = data.read_digits()["test"]
    images, labels = test.signal(test.pixels[:16]), test.labels[:16]
    new, trained = tiny_model(classes=10, **tiny).state_dict(), trained_a_little(images, labels, **tiny)
    for way, limit in ways.items():
        slow = tiny_model(textbook_loss_and_grad, classes=10, **tiny)
        model = tiny_model(functional_loss_and_grad if way == "torch.func" else None, classes=10, **tiny,
                           precision="bf16" if way == "bf16" else "float32")
        model.inner_loop.recompute = way == "recomputed"
        forward = compiled(model) if way == "compiled" else model
        for state in (new, trained):
            for each in (slow, model):
                each.load_state_dict(state)
                each.zero_grad()
            seen = slow.look(images, 3)
            bench.textbook_backward(slow, *seen, labels)
            forward(*seen, labels)[:2].sum().backward()
            gaps = {name: apart(grads(model)[name], expected) for name, expected in grads(slow).items()}
            assert state is trained or max(gaps.values()) <= limit, (way, gaps)
            assert list(model.state_dict()) == list(slow.state_dict())
            if state is trained:
                print(f"trained, {way}: " + ", ".join(f"{name} {gap:.0e}" for name, gap in gaps.items()))


# ---- benchmark -------------------------------------------------------------------------------------------------------

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
    from torch.nn.attention import SDPBackend, sdpa_kernel
    images, labels = batch()
    plain = ({}, {"fraction": 0.5}, {"depth": 1, "steps": 1, "mlp_ratio": 2, "width": 12})
    lanes = ({"branch": "colour"}, {"branch": "column:2"}, {"readout": 3, "mlp_ratio": 2}, {"w_cluster": 1.0})
    counts = []
    for changed in (*plain, *lanes, {"precision": "bf16"}):
        model = tiny_model(**changed)
        seen = model.look(images, model.inner_loop.steps + 1, torch.Generator())
        counts.append(bench.count_flops(model, 5))
        assert all(p.grad is None and p.device.type == "cpu" for p in model.parameters())
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(*seen, labels)[:3].sum().backward()
        assert counter.get_total_flops() == counts[-1], changed
        if changed in plain:
            assert counts[-1] == flops_by_hand(model, 5), changed
        elif changed in lanes:                                 # each is counted
            assert counts[-1] > counts[0], changed


def test_training_hours_by_hand():
    assert bench.training_hours(3600, 10, 2.0, 1.0, devices=4, workers=2) == 5.0               # the steps take longer
    assert bench.training_hours(3600, 10, 0.1, 1.0, devices=4, workers=2) == 1.25              # the decoding does


def test_three_paths_are_three():
    """Only B calls autograd within autograd and two backward passes, only C torch.func (which calls
    autograd.grad); all reach the same gradients."""
    args = settings.settings({"dataset": "digits", "mode": "paths", "compile": False, **SMALL})
    used, reached, update = [], {}, train.update

    def keep_gradients(groups, optimizer):
        reached.setdefault(path, [p.grad.clone() for group in groups for p in group["params"]])
        return update(groups, optimizer)

    def noted(name, function):
        def call(*args, **kwargs):
            used.append((path, name))
            return function(*args, **kwargs)
        return call

    with replaced(bench, "textbook_backward", noted("two passes", bench.textbook_backward)), \
            replaced(torch.autograd, "grad", noted("autograd.grad", torch.autograd.grad)), \
            replaced(torch.func, "grad", noted("func.grad", torch.func.grad)), \
            replaced(train, "update", keep_gradients):
        for path in "ABC":
            result = bench.measure(args, path)
            assert 3 <= len(result["ms"]) <= 20 and min(result["ms"]) > 0 and not result["compiled"]
            assert result["peak_memory_bytes"] > 2 ** 20
    assert set(used) == {("B", "two passes"), ("B", "autograd.grad"), ("C", "func.grad"), ("C", "autograd.grad")}
    assert apart(reached["B"], reached["A"]) < 1e-4 and apart(reached["C"], reached["A"]) < 1e-4


def test_bench_command():
    small = [*settings.as_flags(SMALL), "--dataset", "digits", "--no-compile"]

    def here(function, *args):     # without the seconds that a process takes to start
        return function(*args)

    with folder(), replaced(bench, "in_a_process", here):
        status, out, err = bench_command(small)
        assert status == 0 and "ratio B/A" in out and max(map(len, out.splitlines())) <= 100, (out, err)
        report = json.loads(Path("bench.json").read_text())
        assert [(r["path"], r["value"]) for r in report["paths"]] == [(p, turn) for turn in (1, 2) for p in "ABC"]
        ms = {path: [np.median(r["ms"]) for r in report["paths"] if r["path"] == path] for path in "ABC"}
        for path in "BC":
            each = [slow / fast for slow, fast in zip(ms[path], ms["A"])]
            assert np.allclose(report["ratios"][f"{path}/A"], [np.mean(each), min(each), max(each)])
        assert {"command", "flags", "device", "threads", "versions"} <= set(report) and report["flags"]["width"] == 8
        first = report["paths"][0]
        assert set(first["phases_ms"]) == {"inner loop", "reader", "backward", "optimizer"}
        assert first["evaluation_images_per_second"] > 0 and first["matrix_peak_tflops"] > 0
        assert all(r["first_step_seconds"] > 0 and r["flops"] == first["flops"] for r in report["paths"])

        plan = bench.plan
        args = settings.settings({"dataset": "cifar10", "mode": "cost"})
        assert {(what, value) for what, value, _, _ in plan(args)} >= {
            ("--batch-size", 8), ("--size", 48), ("--width", 256), ("--steps", 12)}
        assert all(vars(changed)[what[2:].replace("-", "_")] == value for what, value, _, changed in plan(args))
        with replaced(bench, "plan", lambda args: [r for r in plan(args) if r[0] == "--steps"][:2]):
            status, out, err = bench_command(["cost", *small, "--out", "cost.json"])
        assert status == 0, err
        rows = json.loads(Path("cost.json").read_text())["cost"]
        assert [r["value"] for r in rows] == [1, 2] and rows[0]["flops"] < rows[1]["flops"]
        assert Path("cost.png").stat().st_size > 5000


def test_bench_bad_input():
    def never(*args):
        raise AssertionError("measured before the input was checked")

    with folder(), replaced(bench, "in_a_process", never):
        Path("full.json").mkdir()
        for flags, word in ((["--out", "full.json"], "full.json"), (["--out", "a.txt"], "a.txt"),
                            (["--out", "no/a.json"], "no/a.json"), (["--freeze-siren"], "--freeze-siren"),
                            (["cost", "--size", "40", "--fraction", "0.0007"], "--fraction"),
                            (["--branch", "bias"], "--branch"), (["--head-dim", "60"], "--head-dim"),
                            (["--width", "9" * 20, "--head-dim", "1"], "--width"), (["speed"], "speed"),
                            (["--device", "tpu9"], "tpu9")):
            status, out, err = bench_command(flags)
            assert status == 2 and err.count("\n") == 1 and word in err and not out, (flags, status, out, err)


def die():
    os._exit(9)


def test_a_measurement_has_a_process_of_its_own():
    try:
        bench.in_a_process(die)
    except checkpoint.Stop as error:
        assert error.status == 1 and "memory" in str(error)
    else:
        raise AssertionError("a killed process went unnoticed")


def test_bench_imagenet_as_a_user_runs_it():
    with folder():
        flags = [*settings.as_flags(SMALL), "--size=64", "--fraction=0.001", "--no-compile", "--out=i.json"]
        done = subprocess.run([sys.executable, HERE / "bench.py", "imagenet", *flags], capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0 and not done.stderr, done.stderr
        report = json.loads(Path("i.json").read_text())
        assert max(map(len, done.stdout.splitlines())) <= 100
    hours = [report["hours"][n] for n in ("1", "8", "64")]
    seconds = max(1 / report["imagenet"][0]["images_per_second"], report["decode_seconds"] / report["flags"]["workers"])
    assert np.allclose(hours, [1_281_167 * 40 * seconds / 3600 / devices for devices in (1, 8, 64)])


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
    model.coordinates = lambda images, tokens: {"late": tokens[:, 2:].flatten(1), "phi": tokens.flatten(1) + 2}
    t, mean, deviation = queries.tokens, bank.tokens.mean(0), bank.tokens.std(0, correction=0)
    deviation[1, 2] = math.inf
    expected = {"pixels": queries.images, "phi - theta": t, "late": t[:, 2:], "bias column": t[..., 4],
                "standardised per weight": (t - mean) / deviation, "cosine of phi - theta": t, "cosine of phi": t + 2,
                "all but the bias column": t * torch.tensor([1, 1, 1, 1, 0]),
                "cosine of phi - theta + beta": t + reader.beta,
                "after the reader's input map": 7 * (t + reader.beta) @ reader.embed.weight.T + reader.embed.bias}
    with replaced(diagnostics, "BLOCK", 16):
        found = {name: x for name, *x in diagnostics.coordinate_systems(model, bank, queries)}
    assert set(found) == set(expected)
    for name, x in expected.items():
        x = x.flatten(1) / (x.flatten(1).norm(dim=1, keepdim=True) if "cosine" in name else 1)
        assert apart([found[name][1]], [x]) < 1e-5 and found[name][0].shape == (60, x.shape[1]), name
    z = found["standardised per weight"][0]                                    # of the bank: mean 0, deviation 1
    assert z.mean(0).abs().max() < 1e-5 and (z.std(0, correction=0) - 1).abs().sort().values[:-1].max() < 1e-5
    bare = types.SimpleNamespace(reader=None, parts=dict)                      # has nothing but tokens
    names = [name for name, *_ in diagnostics.coordinate_systems(bare, bank, queries)]
    assert names == ["pixels", "phi - theta", "standardised per weight", "cosine of phi - theta"]


def tiny_mwt(**more) -> train.MWT:
    flags = dict(width=6, depth=2, head_dim=3, steps=2, reader_depth=1, size=5) | more
    return train.MWT(settings.settings(flags), 3, 4).eval().requires_grad_(False)


def test_coordinates_and_parts_of_mwt():
    model, images = tiny_mwt(), torch.rand(3, 3, 5, 5) * 2 - 1
    model.siren.first[2], model.siren.hidden[:, 2] = 0.0, 0.0
    model.siren.first[2, 2] = model.siren.hidden[0, 2, -1] = 0.1       # these neurons do not see the pixel's place
    assert {name: int(U.argmax()) for name, U in model.parts().items()} == {"bias column": 6, "most constant column": 2}
    phi, named = model.adapt(images), model.coordinates(images, model.fit(images))
    first, hidden = (phi.first - model.siren.first).flatten(1), phi.hidden - model.siren.hidden
    expected = {"phi - theta": torch.cat([first, hidden.flatten(1)], 1), "first layer": first, "phi": phi.hidden,
                "hidden layer 1": hidden[:, 0], "hidden layer 2": hidden[:, 1]}
    assert set(named) == set(expected) and all(apart([named[k]], [expected[k]]) < 1e-6 for k in named)


def test_nothing_depends_on_blocks():
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (50, 3, 5, 5), generator=g, dtype=torch.uint8)
    images, model = data.Images(list("abc"), torch.arange(50) % 3, pixels), tiny_mwt(fraction=0.5)
    for block in (7, 50, 256):
        with replaced(diagnostics, "BLOCK", block):
            found = diagnostics.fit_all(model.fit, images, "cpu")
        assert torch.equal(found.labels, images.labels) and torch.equal(found.images, images.signal(pixels))
        assert apart([found.tokens], [model.fit(images.signal(pixels))]) < 1e-6
    bank, queries = torch.randn(150, 6, generator=g), torch.randn(40, 6, generator=g)
    for size in (1, 4, 11, 64, 150):
        search = diagnostics.NearestSoFar(queries)
        for block in bank.split(size):
            search.update(block)
        assert torch.equal(search.index, measures.nearest(bank, queries, 10)), size
    x, y = fitted(0, n=90), fitted(1, n=40)
    trace = lambda tokens: (tokens.sum(1), [("input map", tokens[:, :2].sin())])
    with replaced(diagnostics, "BLOCK", 16):
        walked, pooled = (diagnostics.walk(trace, x, y, flattened) for flattened in (True, False))
    assert torch.equal(walked.logits, y.tokens.sum(1)) and not pooled.flattened
    for stage, f in (("input tokens", lambda t: t), ("input map", lambda t: t[:, :2].sin())):
        known, own = f(x.tokens), f(y.tokens)
        for each in (walked, pooled):
            assert apart([each.queries[stage], each.bank[stage]], [own.mean(1), known.mean(1)]) < 1e-6
        near = measures.nearest(known.flatten(1), own.flatten(1), 10)
        assert torch.equal(walked.flattened[stage]["neighbors"], near)
        assert torch.equal(walked.flattened[stage]["purity"], measures.purity(own.flatten(1), y.labels))
    half, unseen = diagnostics.unseen_bank(walked, x.labels, y.labels)         # of the queries: one half asks the other
    known = torch.isin(torch.arange(40), diagnostics.sample(y.labels, 20))
    means, labels = y.tokens.mean(1), y.labels
    expected = measures.knn_accuracy(means[known], labels[known], means[~known], labels[~known])
    assert half == 20 and unseen["input tokens"]["unseen_knn10"] == expected


def clustering_of(clusters, read_right, n=300, bank_classes=4, **more):
    """A class vector of that length in the weights; a reader that is right so often beyond chance."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(bank_classes, (2 * n,), generator=g)
    labels[n:] %= 4
    x = torch.randn(2 * n, 6, generator=g) + clusters * F.one_hot(labels, 6)
    guesses = torch.where(torch.rand(n, generator=g) < read_right, labels[n:], torch.randint(4, (n,), generator=g))
    systems = [("pixels", 0 * x[:n], 0 * x[n:]), ("phi - theta", x[:n], x[n:])]
    return diagnostics.clustering(systems, labels[:n], labels[n:], guesses, **more)


def test_clustering_verdict_on_planted_truths():
    routed, clustered, nothing = clustering_of(0, 0.9), clustering_of(8, 0.9), clustering_of(0, 0)
    assert routed["gap"][1] > 0.4 and routed["verdict"] == "first half holds" and abs(routed["purity"] - 0.25) < 0.1
    assert clustering_of(0, 0.9, whole_bank=False, probe=False)["verdict"] == "not decided here"
    assert all(clustered["rows"][1][key] > 0.99 for key in ("knn1", "knn10", "nearest_mean", "probe", "purity"))
    assert clustered["verdict"] == "refuted" and all("phi - theta" in name for name in clustered["best"])
    assert abs(nothing["reader"] - 0.25) < 0.1 and nothing["verdict"] != "first half holds"
    for result in (routed, clustered):             # shuffled labels are at chance whatever was planted
        weights = result["rows"][1]
        assert abs(weights["knn10_shuffled"] - 0.25) < 0.12 and list(result["knn10_by_bank"]) == ["75", "150", "300"]
        assert weights["knn10"] == result["knn10_by_bank"]["300"]
    assert clustering_of(8, 0.9, bank_classes=6, probe=False)["rows"][1]["knn10"] > 0.5    # classes that no query has


def token_flow_of(kind, n=400, null=True, **more):
    """Two tokens u, v of 30 features. "input": a class vector in each; otherwise the class is the signs of u_0 v_0 and
    u_1 v_1, which only something that compares tokens can see; "random": nothing. The planted reader adds a class
    vector in its second block, of "first attention" in its first attention."""
    g = torch.Generator().manual_seed(0)
    tokens, labels = torch.randn(2 * n, 2, 30, generator=g), torch.randint(4, (2 * n,), generator=g)
    signs = lambda x: ((x[:, 0, :2] * x[:, 1, :2] > 0) * torch.tensor([1, 2])).sum(1)
    if "attention" in kind:
        labels = signs(tokens)
    elif kind == "input":
        tokens = tokens + 6 * F.one_hot(labels, 30)[:, None]

    def trace(x, trained=True):
        guess = x.mean(1)[:, :4].argmax(1) if kind == "input" else signs(x)
        found = 20 * F.one_hot(guess, 30)[:, None] * trained
        first = x + found * (kind == "first attention")
        names = ("input map", "attention 1", "MLP 1", "attention 2", "MLP 2")
        return F.one_hot(guess, 4).float(), list(zip(names, (x, first, first, x + found, x + found)))
    bank, queries = (Fitted(labels, labels, tokens).take(rows) for rows in torch.arange(2 * n).chunk(2))
    untrained = (lambda x: trace(x, False)) if null else None
    return diagnostics.token_flow(trace, untrained, bank, queries, probe=False, **more)


def test_token_flow_on_planted_truths():
    late, early, nothing = (token_flow_of(kind) for kind in ("attention", "input", "random"))
    start, end = late["rows"][0], late["rows"][-1]
    assert max(start["pooled_knn10"], start["flattened_knn10"]) < 0.4 and start["stage"] == "input tokens"
    assert min(end[key] for key in ("pooled_knn10", "flattened_knn10", "unseen_knn10", "flattened_purity")) > 0.99
    assert late["verdict"] == "second half holds" and late["middle"] == "MLP 1" and late["rise"][0] > 0.5
    assert end["untrained_pooled_knn10"] == start["pooled_knn10"]
    gain = [row["pooled_knn10"] - row["untrained_pooled_knn10"] for row in late["rows"]]
    assert abs(late["rise"][0] - (gain[5] - gain[1])) < 1e-9
    assert abs(late["late_minus_half"][0] - (gain[5] - gain[3] - late["rise"][0] / 2)) < 1e-9
    assert early["rows"][0]["pooled_knn10"] > 0.99 and early["verdict"] == "not decided here"
    assert token_flow_of("first attention")["verdict"] == "refuted"
    assert nothing["verdict"] == "not decided here" and abs(nothing["rows"][-1]["pooled_knn10"] - 0.25) < 0.1
    head = torch.nn.Linear(30, 4, bias=False).requires_grad_(False)
    head.weight.copy_(torch.eye(4, 30))
    alone = token_flow_of("attention", flattened=False, null=False, head=head)
    assert alone["verdict"] == "not measured" and "rise" not in alone and "flattened_knn10" not in alone["rows"][1]
    assert alone["rows"][-1]["logit_lens"] > 0.99 > 0.4 > alone["rows"][1]["logit_lens"] and end["logit_lens"] is None
    assert alone["rows"][-1]["auroc"] is None and alone["rows"][-1]["pooled_purity"] == end["pooled_purity"]


def test_knock_outs_by_hand():
    torch.manual_seed(0)
    reader = Reader(6, 8, 4, depth=2, head_dim=4).requires_grad_(False)
    for name, p in reader.named_parameters():
        torch.nn.init.normal_(p, std=0.0 if name in ("beta", "head.bias") else 0.6)
    tokens, known = torch.randn(200, 6, 9) / 100, torch.randn(70, 6, 9) / 100
    labels, blocks = reader(tokens).argmax(1), reader.blocks
    with replaced(diagnostics, "BLOCK", 64):
        found = diagnostics.knock_outs(reader, tokens, labels, known)
    rows = {(row["replaced"], row["span"], row["block"]): row["loss"][0] for row in found}
    assert len(rows) == len(found) == 2 * (4 * 2 + 2) and max(rows.values()) > 0.1
    states, mine = ([x for _, x in reader.trace(x)[1]] for x in (known, tokens))
    mean = [block(x).mean(0) for block, x in zip(blocks, states)]

    def same(name, span, number, x, start=4):
        """The loss is that of going on from x with block number `start`."""
        for block in blocks[start:]:
            x = x + block(x)
        loss = float((reader.head(x.mean(1)).argmax(1) != labels).double().mean())
        assert abs(rows[name, span, number] - loss) < 1e-9, (name, span, number)

    same("MLP: its mean", "alone", 2, mine[3] + mean[3])
    same("attention: nothing", "alone", 1, mine[0], 1)
    same("attention: its mean", "alone", 1, mine[0] + mean[0], 1)
    x = mine[0] + mean[0]
    x = x + blocks[1](x)
    same("attention: its mean", "from here on", 1, x + mean[2], 3)                     # attention 2 too, not the MLP
    x = mine[1] + mean[1]
    same("MLP: its mean", "from here on", 1, x + blocks[2](x) + mean[3])
    attention, x = blocks[2], mine[2]

    def mapped(A, x):
        v = attention.qkv(attention.norm(x))[..., 16:].unflatten(-1, (2, 4)).transpose(1, 2)
        return attention.layer_scale * attention.out((A @ v).transpose(1, 2).flatten(2))
    A = diagnostics.attention_map(attention, states[2])
    assert apart([A.sum(-1), mapped(A, states[2])], [torch.ones(70, 2, 6), attention(states[2])]) < 1e-5
    same("attention: to itself", "alone", 2, x + mapped(torch.eye(6), x), 3)
    same("attention: mean map", "alone", 2, x + mapped(A.mean(0), x), 3)


def test_donors():
    labels, rows = torch.randint(4, (90,), generator=torch.Generator().manual_seed(0)), torch.arange(90)
    labels[0] = 9                  # alone in its class
    order, same, other = (diagnostics.donors(labels, kind, 0) for kind in ("any", "same", "other"))
    assert (order != rows).all() and all(torch.equal(x.sort().values, rows) for x in (order, same))
    assert (labels[same] == labels).all() and (same[1:] != rows[1:]).all() and (labels[other] != labels).all()
    again, another = (diagnostics.donors(labels, "other", key) for key in (0, 1))
    assert torch.equal(other, again) and not torch.equal(other, another)
    assert torch.equal(diagnostics.donors(0 * labels, "other", 0), rows)       # no other class: its own


def bias_route_of(where, n=600, tokens=12, width=20):
    """Tokens whose class is planted, and a reader that reads it there: "bias", "column" (number 3), "energy" (every
    column, as far as its energy goes), "joint" (the sign of a product of two bias entries), "nowhere" (not at all)."""
    g = torch.Generator().manual_seed(0)
    labels, eye = torch.randint(4, (2 * n,), generator=g), torch.eye(width + 1)
    scale = torch.linspace(0.5, 1.5, width + 1)
    scale[-1] = 1.0
    x = torch.randn(2 * n, tokens, width + 1, generator=g) * scale
    if where == "joint":
        labels = (x[:, 0, -1] * x[:, 1, -1] > 0).long()
        read = lambda t: (t[:, 0, -1] * t[:, 1, -1])[:, None] * torch.tensor([-1, 1])
    else:
        strength = {"bias": 2 * eye[-1], "column": 2 * eye[3], "energy": 0.35}.get(where, 2)
        told = torch.randn(4, tokens, width + 1, generator=g) * scale * strength
        x = x + told[labels] * (where != "nowhere")
        read = lambda t: torch.einsum("ntf,ctf->nc", t, told / scale**2) - (told**2 / scale**2).sum((1, 2)) / 2
    parts = diagnostics.controls(x[:n], {"bias column": eye[:, -1:], "first": eye[:, :1]}, eye, repeats=3)
    result = diagnostics.bias_route(read, x[n:], labels[n:], x[:n], parts, repeats=3, embed=eye)
    return result, {row["name"]: row["loss"][0] for row in result["rows"]}


def test_bias_route_on_planted_truths():
    bias, loss = bias_route_of("bias")
    assert bias["reader"] > 0.95 and bias["verdict"] == "supported" and bias["moved_to_donor"][0] > 0.8
    assert min(loss[key] for key in ("another image's", "zero", "its train mean", "an image's of another class")) > 0.5
    assert abs(loss["only the bias column"]) < 0.02 and abs(loss["another image's of the same class"]) < 0.02
    assert all(abs(row["loss"][0]) < 0.02 for row in bias["rows"] if "control" in row["group"]) and "first" in loss
    assert bias["single_columns"]["bias_percentile"] == 100 and bias["margin"][1] > 0.5
    ranks = {row["rank"]: row for row in bias["rows"] if row["group"] == "rank"}
    assert ranks[0]["loss"][0] > 0.5 and abs(ranks[4]["loss"][0]) < 0.03 and abs(ranks[8]["loss"][0]) < 0.03
    assert list(ranks) == [0, 1, 2, 4, 8] and ranks[0]["energy"] == 0 < ranks[4]["energy"] < ranks[8]["energy"] < 1
    column, loss = bias_route_of("column")
    assert column["reader"] > 0.95 and column["verdict"] == "refuted" and loss["another image's"] == 0
    assert column["strongest"] == ["column 3"] * 2 and column["single_columns"]["losses"]["3"] > 0.5
    energy, loss = bias_route_of("energy")
    assert energy["reader"] > 0.8 and energy["verdict"] != "supported" and loss["another image's"] < 0.15
    joint, loss = bias_route_of("joint")           # all of it is in how two entries go together
    assert joint["reader"] == 1 and joint["verdict"] == "supported" and joint["moved_to_donor"][0] == 1
    assert min(loss["each entry another image's"], loss["Gaussian, same mean and variance"]) > 0.4
    assert loss["another image's of the same class"] == 0 and loss["its negative"] == 0
    nothing, _ = bias_route_of("nowhere")
    assert abs(nothing["reader"] - 0.25) < 0.08 and nothing["verdict"] == "not decided here"


def test_controls_hold_the_energy():
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(300, 5, 13, generator=g) * torch.linspace(0.3, 2, 13), torch.randn(12, 13, generator=g)
    eye, bias = torch.eye(13), torch.eye(13)[:, -1:]
    parts = diagnostics.controls(x, {"bias column": bias, "two": eye[:, 2:4]}, W, repeats=4)
    found = diagnostics.energies(x, parts, W)
    energy = lambda U, M: float(((x - x.mean(0)) @ U @ U.T @ M.T).square().sum() / len(x))
    for i, (where, M) in enumerate((("before", eye), ("after", W))):
        sets = parts[f"random columns, energy matched {where} the input map"]
        assert len({tuple(U.sum(1).tolist()) for U in sets}) > 1 and len(sets) == 4
        for U in sets:                             # as many columns as are needed, and no more
            assert U[-1].abs().max() == 0 and energy(U, M) >= 0.999 * energy(bias, M)
            assert U.shape[1] == 1 or energy(U[:, :-1], M) < energy(bias, M)
        for name, bases in parts.items():
            expected = np.mean([energy(U, M) for U in bases]) / energy(bias, M)
            assert abs(found[name][i] / expected - 1) < 1e-3, name
    assert parts["column of highest energy"][0].argmax() == 11 and torch.equal(parts["two"][0], eye[:, 2:4])
    v = parts["leading direction"][0]
    assert v[-1] == 0 and energy(v, eye) >= max(energy(eye[:, j:j + 1], eye) for j in range(12)) - 1e-3
    without = diagnostics.controls(x, {"bias column": bias}, repeats=2)        # no input map
    assert sum("matched" in name for name in without) == 1 and len(diagnostics.energies(x, without)["bias column"]) == 1
    y = diagnostics.put(x[:5], x[5:10] @ bias, bias)
    assert apart([y[..., -1], y[..., :-1]], [x[5:10, :, -1], x[:5, :, :-1]]) < 1e-6


def test_content_on_planted_truths():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (500,), generator=g)
    images = 0.25 * torch.randn(500, 3, 6, 6, generator=g) + 0.6 * (F.one_hot(labels, 3) - 0.5)[:, :, None, None]
    for column, name in ((-1, "bias column"), (2, "column of highest energy")):
        def fit(x):                # pixels, which the class is not in once the mean is out; and the mean, in one column
            tokens = x.flatten(2)[:, :, :9] - x.mean((2, 3))[:, :, None]
            tokens[:, :, column] = x.mean((2, 3))
            return tokens

        read = lambda t: t[:, :, column]
        known, test = (Fitted(images, labels, fit(images)).take(rows) for rows in torch.arange(500).chunk(2))
        parts = diagnostics.controls(known.tokens, {"bias column": torch.eye(9)[:, -1:]}, repeats=2)
        result = diagnostics.content(read, fit, test, known, parts)
        other, same = result["mediation"]
        part, expected = other["parts"], float(column == -1)
        assert other["total"][0] > 0.5 and abs(same["total"][0]) < 0.05 and 0 < other["outside"] < 0.2
        assert same["parts"]["bias column"]["share"] is None
        assert abs(part["bias column"]["share"][0] - expected) < 0.05
        assert abs(part["bias column"]["share_restored"][0] - expected) < 0.05
        assert abs(part["column of highest energy"]["share"][0] - (1 - expected)) < 0.05
        r2 = diagnostics.at_rank(result["regressions"][name], 4)
        assert all(r2[f"mean {c}"][0] > 0.999 for c in ("red", "green", "blue")) and r2["contrast"][0] < 0.5
        assert result["regressions"][name]["from_facts"][0][0] > 0.999
    with replaced(diagnostics, "donors", lambda labels, *key: torch.arange(len(labels))):      # each its own: no effect
        assert diagnostics.mediation(read, fit, test, parts, "other")["total"] == (0, 0, 0)


def test_image_facts_by_hand():
    ramp = torch.linspace(-1, 1, 8).expand(1, 3, 8, 8)
    wave = sum(math.cos(math.pi * (i + 0.5) / 8) * (2 * i / 7 - 1) for i in range(8)) / 8
    expected = {"left - right": -8 / 7, "cosine, 0 down 1 across": wave, "top - bottom": 0, "mean red": 0,
                "cosine, 1 down 0 across": 0, "contrast": math.sqrt(3 / 7), "centre - surround": 0}
    turned = {"left - right": "top - bottom", "cosine, 0 down 1 across": "cosine, 1 down 0 across"}
    turned |= {value: key for key, value in turned.items()}
    facts = diagnostics.image_facts(torch.cat([ramp, ramp.mT]))
    for name, value in expected.items():
        assert max(abs(facts[name][0] - value), abs(facts[turned.get(name, name)][1] - value)) < 1e-6, name
    for size in (1, 2, 3):
        assert all(torch.isfinite(v).all() for v in diagnostics.image_facts(torch.randn(5, 3, size, size)).values())


# ---- claims.py -------------------------------------------------------------------------------------------------------

def test_verdict_rules():
    """By where an interval lies: above, about or below 0, and two points; there may be none."""
    words = {1: "supported", 0: "not decided here", -1: "refuted"}
    for interval, zero, points in (((0.05, 0.03, 0.07), 1, 1), ((0.05, 0.01, 0.09), 1, 0), ((0.01, -0.01, 0.03), 0, 0),
                                   ((-0.05, -0.09, -0.01), -1, -1), ((0.01, 0.005, 0.015), 1, -1), (None, 0, 0)):
        assert claims.route_verdict({"margin": interval}) == words[max(0, points) or min(0, zero)], interval
        verdict = claims.clustering_verdict({"gap": interval, "whole_bank": True})
        assert verdict == words[points].replace("supported", "first half holds"), interval
        verdict = claims.flow_verdict({"rise": (0.2, 0.1, 0.3), "late_minus_half": interval})
        assert verdict == words[zero].replace("supported", "second half holds"), interval
        assert claims.flow_verdict({"rise": (0.2, -0.1, 0.3), "late_minus_half": interval}) == words[0]


def population(link=True, n=8, seeds=3, **more):
    """n settings of so many seeds. Purity follows the reader's accuracy, or, without the link, goes against it."""
    g, found = torch.Generator().manual_seed(0), []
    for i in range(n * seeds):
        setting, seed = divmod(i, seeds)
        strength, noise = setting / n + 0.2 * float(torch.rand(1, generator=g)), torch.rand(2, generator=g).tolist()
        figures = {key: value + 0.001 * seed for key, value in
                   (dict(gap=0.1, late=0.05, rise=0.2, margin=0.05) | more).items()}
        found.append(figures | dict(
            name=f"{setting}-{seed}", label="here", seed=seed, w_task=float(setting), reader=0.5 + 0.1 * strength,
            architecture="one", setting=str(setting), apart_from_w_task=str(seed), whole_bank=True, permuted=0.1,
            purity=(strength if link else -strength) + 0.1 * noise[0],
            stages={"input tokens": noise, "MLP 1": (strength, strength)}))
    return found


def test_comparison_across_models():
    across = functools.cache(lambda link=True, **more: claims.across(population(link, **more)))

    def verdicts(claim, result):
        return {line.split(": ")[1].split(".")[0] for line in result["verdicts"] if line.startswith(claim)}

    with replaced(claims, "correlations", functools.partial(measures.correlations, draws=200)):
        tracked, against = across(), across(False)
        for claim, result, expected in (
                ("C1", tracked, "refuted"), ("C1", against, "supported"), ("C1", across(False, gap=-0.1), "refuted"),
                ("C1", across(False, gap=0.0195), "not decided here"), ("C2", against, "supported"),
                ("C2", across(late=-0.001), "not decided here"), ("C2", across(False, late=-0.05), "refuted"),
                ("C3", tracked, "supported"), ("C3", across(margin=-0.1), "refuted"),
                ("C3", across(margin=0.01), "not decided here")):
            assert verdicts(claim, result) == {expected}, (claim, expected, result["verdicts"])
        partial = population(False)                # part of a bank; and the last stage tells no more than the weights
        for p in partial:
            p["whole_bank"], p["stages"]["MLP 1"] = False, (p["purity"], 0)
        partial = claims.across(partial)
        assert verdicts("C1", partial) == verdicts("C2", partial) == {"not decided here"}
        rho = {key: found["spearman"] for key, found in tracked["correlations"].items()}
        assert rho["purity"]["phi - theta"][0] > 0.9 and rho["stage knn10"]["MLP 1"][0] > 0.9
        row, purity = tracked["seeds"][0], {p["name"]: p["purity"] for p in tracked["points"]}
        assert row["n"] == 3 and np.allclose(row["gap"], measures.t_interval([0.1, 0.101, 0.102]))
        differences = [purity[f"2-{seed}"] - purity[f"0-{seed}"] for seed in range(3)]         # paired by seed
        assert len(tracked["pairs"]) == 7 and tracked["pairs"][1]["n"] == 3
        assert tracked["pairs"][1]["interval"] == measures.t_interval(differences)
        few = across(n=1)
        assert few["correlations"]["purity"] is None and "too few" in few["verdicts"][0]
        assert all("nothing is said about the method" in across(n=2, seeds=seeds)["verdicts"][0] for seeds in (1, 2))
        mixed = population()
        mixed[0]["architecture"] = "two"
        assert (claims.across(mixed)["models"], claims.across(mixed)["others"]) == (23, 1)
        assert all(len(line) <= 100 for each in (tracked, few) for line in claims.across_table(each).split("\n"))


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


def quick_probe():
    """The linear probe takes most of the time: in its place the nearest mean."""
    return replaced(diagnostics, "linear_probe_predict", measures.nearest_mean_predict)


def names_in(path) -> set[str]:
    return {p.name for p in Path(path).iterdir()}


def no_row_is_folded(experiments: dict):
    """A table's rows, unlike the words below it, fit into 100 columns as they are."""
    for name, result in experiments.items():
        text = diagnostics.EXPERIMENT[name][0](result)
        assert all(len(line) <= 100 for line in text.split("\n") if "  " in line), text


FILES = {"clustering": "clustering.png", "token-flow": "token_flow.png", "bias-route": "bias_route.png",
         "content": "content.png"}


def test_diagnostics_command():
    with folder() as here:
        assert command([*TINY, "--fraction", "0.5"])[0] == 0
        out = diagnosed("out.pt", "--samples", 80, "--repeats", 2)
        assert all(f"\n{claim} " in out for claim in ("C1", "C2", "C3")) and "left out" not in out
        assert names_in("out-diagnostics") == {*FILES.values(), "summary.png", "report.json"}
        assert all(p.read_bytes().startswith(b"\x89PNG") for p in here.glob("out-diagnostics/*.png"))
        report = report_in("out-diagnostics")["model"]
        done, clusters = report["experiments"], report["experiments"]["clustering"]
        rows = {row["coordinate"]: row for row in clusters["rows"]}
        assert report["bank"] == 80 and rows["bias column"]["d"] == 16 and rows["phi - theta"]["d"] == 8 * 3 + 16 * 9
        assert "probe" in rows["phi - theta"] and not clusters["whole_bank"] and "part of the training set" in out
        assert len(done["token-flow"]["rows"]) == 4 and len(done["token-flow"]["knock_outs"]) == 10
        assert report["method"] == "mwt" and "--fraction=0.5" in report["command"] and set(done) == set(FILES)
        no_row_is_folded(done)
        model, args = checkpoint.load_checkpoint("out.pt")
        accuracy = train.evaluate(model, data.load_dataset(args)[1])["test_accuracy"]
        assert report["reader"] == accuracy == done["bias-route"]["reader"]
        some = ["out.pt", "--only", "bias-route", "content", "--samples", 80, "--repeats", 2, "--out", "again"]
        diagnosed(*some)                           # two runs say the same
        assert report_in("again")["model"]["experiments"] == {key: done[key] for key in ("bias-route", "content")}
        diagnosed("out.pt", "--only", "content", "--repeats", 1, "--out", "again")
        assert names_in("again") == {"report.json", "content.png", "summary.png"}      # nothing of the run before

        def interrupted(*_):       # as Ctrl-C would, and also where a background shell has SIGINT ignored
            raise KeyboardInterrupt
        with replaced(diagnostics, "flow_of", interrupted), quick_probe():
            assert diagnosed("out.pt", "--out", "part", status=130) == "interrupted"
        assert set(report_in("part")["model"]["experiments"]) == {"clustering"}        # what was done by then


def test_diagnostics_of_several_checkpoints():
    with folder(), quick_probe():
        flags = [*TINY, "--epochs", 1, "--steps", 1, "--reader-depth", 0, "--val", 0.2, "--out"]
        for more in (["out.pt"], ["wt.pt", "--w-task", 0], ["other.pt", "--width", 4]):
            assert command([*flags, *more])[0] == 0
        out = diagnosed("out.pt", "wt.pt", "other.pt", "--only", "clustering", "token-flow", "--out", "both")
        assert "too few" in out and "No setting has three seeds" in out and "w_task 0.01 minus 0" in out
        assert names_in("both") == {"out", "wt", "other", "report.json", "models.png"}
        assert names_in("both/wt") == {"report.json", "clustering.png", "token_flow.png", "summary.png"}
        result, (one, wt) = report_in("both")["across"], (report_in(f"both/{name}")["model"] for name in ("out", "wt"))
        assert (result["models"], result["others"]) == (2, 1)
        assert [p["label"] for p in result["points"]] == ["w_task 0.01", "w_task 0", "w_task 0.01"]
        purity = [model["experiments"]["clustering"]["purity"] for model in (one, wt)]
        assert abs(result["pairs"][0]["mean"] - (purity[0] - purity[1])) < 1e-12 and result["pairs"][0]["n"] == 1
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
                (["out.pt", "out.pt"], "out.pt and out.pt are the same run"), (["out.pt", "copy.pt"], "same run"),
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
    with folder() as here, quick_probe():
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
        assert len(done["token-flow"]["knock_outs"]) == 20 and "\nC3 " in out
        assert "planted.py" in report["command"] and "--knots=5" in report["command"]

        bare = planted.Bare({}, 10)
        bare.means.data = torch.stack([pixels[images.labels == c].flatten(1).mean(0) for c in range(10)])
        save_planted("bare.pt", bare, seed=0)
        out, report = diagnosed("bare.pt", "--out", "bare"), report_in("bare")["model"]
        titles = ["untrained reader, logit lens, knock-outs", "bias route", "content"]
        assert [line.split(":")[0] for line in report["left_out"]] == titles and report["reader"] > 0.6
        assert all(f"\nleft out: {line}\n" in out for line in report["left_out"]) and "C2 not decided" in out
        assert set(report["experiments"]) == {"clustering", "token-flow"} and "\nC3 " not in out
        assert names_in("bare") == {"report.json", "summary.png", "clustering.png", "token_flow.png"}
        diagnosed("bare.pt", "--only", "content", "--out", "nothing")
        assert names_in("nothing") == {"report.json", "summary.png"}

        # a comparison: of train.py's flags they have those of the data alone
        assert command([*TINY, "--epochs", 1])[0] == 0
        out = diagnosed("0.pt", "1.pt", "2.pt", "out.pt", "--only", "clustering", "--out", "models")
        result = report_in("models")["across"]
        assert (result["models"], result["others"], result["pairs"]) == (3, 1, [])
        assert [row["n"] for row in result["seeds"]] == [3] and out.count("\nC1, planted: ") == 1


def test_models_that_are_always_right_or_wrong():
    """No AUROC, no spread of a class, a bias column that never changes, images that are all the same."""
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
            assert report["reader"] == accuracy and set(done) == set(FILES) and done["bias-route"]["verdict"]
            no_row_is_folded(done)
            assert accuracy == 0.5 or all(row["auroc"] is None for row in done["token-flow"]["rows"])
            assert done["clustering"]["rows"][0]["fisher"] == fisher


def start_program(program, argv, threads="OMP_NUM_THREADS=1") -> subprocess.Popen:
    """A program as a process of its own."""
    return subprocess.Popen([sys.executable, str(HERE / program), *map(str, argv)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=os.environ | dict([threads.split("=")]))


# ---- interventions.py --------------------------------------------------------------------------------

SWEEP = [*TINY, "--epochs", "1", "--seeds", "1", "--out", "sweep"]
FLOPS = {}


def sweep(argv) -> tuple[int, str, str]:
    """No figure a run, and the FLOPs of models alike counted once."""
    def count(model, batch):
        key = str(model), model.inner_loop.steps, model.points, model.w_cluster > 0, batch
        FLOPS[key] = FLOPS.get(key) or plain(model, batch)
        return FLOPS[key]

    with replaced(figures, "training_figure", lambda *more: None), \
            replaced(interventions, "count_flops", count) as plain:
        return command(argv, interventions.main)


def run_file(name, pattern) -> Path:
    return next((Path(name) / "runs").glob(pattern))


def same_weights(a, b) -> bool:
    return same(read_checkpoint(a)["model"], read_checkpoint(b)["model"])


def planted_runs(accuracies: dict, n=1000) -> dict:
    """Runs {lane: one a seed} with these accuracies."""
    found = {}
    for lane, values in accuracies.items():
        for seed, accuracy in enumerate(values):
            order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
            right = "".join("01"[int(i)] for i in order < round(accuracy * n))
            found.setdefault(lane, []).append(dict.fromkeys(interventions.MEASURED, 1.0) | {
                "lane": lane, "seed": seed, "reader": right.count("1") / n, "right": right, "setting": lane,
                "parameters": 1, "gflop_per_image": 1.0, "training": {"w_task": 0.01, "w_cluster": 0.0}})
    return found


def test_factorial_on_planted_accuracies():
    """Additive and sub-additive cells give their effects; intervals over seeds cover the truth in 95% of repeats."""
    a, b, c = torch.tensor(interventions.CELLS, dtype=torch.float64).T
    planted = 0.5 + 0.04 * a + 0.02 * b + 0.01 * c - 0.03 * a * b + 0.02 * a * b * c
    by_hand = {"route+bias - additive": -0.03, "route+dense - additive": 0, "bias+dense - additive": 0,
               "route+bias+dense - additive": -0.03 + 0.02, "route": 0.04 - 0.03 / 2 + 0.02 / 4,
               "bias": 0.02 - 0.03 / 2 + 0.02 / 4, "dense": 0.01 + 0.02 / 4, "route x bias": -0.03 + 0.02 / 2,
               "route x dense": 0.02 / 2, "bias x dense": 0.02 / 2, "route x bias x dense": 0.02}
    exact = interventions.over_seeds(planted[:, None].repeat(1, 2))
    assert set(exact) == set(by_hand) and all(abs(v[0] - by_hand[k]) < 1e-12 for k, v in exact.items())
    g, repeats, covered = torch.Generator().manual_seed(0), 300, dict.fromkeys(by_hand, 0)
    for _ in range(repeats):           # seeds shift all lanes together
        shift, noise = torch.randn(3, generator=g), torch.randn(8, 3, generator=g)
        for name, (_, low, high) in interventions.over_seeds(planted[:, None] + 0.02 * shift + 0.01 * noise).items():
            covered[name] += low <= by_hand[name] <= high
    assert all(0.92 <= k / repeats <= 0.98 for k in covered.values()), covered
    # one seed, over images: eight correlated predictions of each image
    rng, hit = np.random.default_rng(0), 0
    cells, level = interventions.CELL_LANES, (0.5 + 0.05 * a - 0.05 * a * b).numpy()
    mean = np.where(level < 0.5, 2 * level ** 2, 1 - 2 * (1 - level) ** 2)             # of the triangular sum
    for _ in range(20):
        right = 0.5 * rng.random((300, 1)) + 0.5 * rng.random((300, 8)) < level
        runs = {lane: [{"seed": 0, "right": "".join(map(str, column.astype(int)))}] for lane, column in
                zip(cells, right.T)}
        found = interventions.factorial(runs)
        value, low, high = found["accuracy"]["route x bias"]
        hit += low <= float(interventions.contrasts()["route x bias"] @ torch.from_numpy(mean)) <= high
        assert found["seeds"] == 1 and np.sign(found["log_odds"]["route x bias"][0]) == np.sign(value)
    assert hit >= 17, hit
    odds = interventions.log_odds(torch.tensor([0.75, 1.0], dtype=torch.float64), 10 ** 9)
    assert abs(float(odds[0]) - math.log(3)) < 1e-6 and torch.isfinite(odds).all()


def test_report_of_planted_runs():
    """The rules of the verdicts: three seeds, a gain over the capacity control, and one that is not there."""
    def verdicts(gains, noise=0.001, seeds=3) -> dict:
        g = torch.Generator().manual_seed(0)
        runs = planted_runs({lane: [0.5 + gain + 0.01 * seed + noise * float(torch.randn((), generator=g))
                                    for seed in range(seeds)] for lane, gain in gains.items()})
        across = {"verdicts": ["C1, wt: refuted.", "C1, baseline: supported."]}
        with replaced(claims, "across", lambda points: across), replaced(claims, "points", lambda models: models):
            return dict(line.split(": ") for line in interventions.all_claims(interventions.summarise(runs)))

    gains = {"baseline": 0.0, "deeper": 0.01, "route": 0.05, "bias": 0.01, "dense": 0.0, "route+bias": 0.02,
             "route+dense": 0.05, "bias+dense": 0.01, "route+bias+dense": 0.02}
    found, few = verdicts(gains), "not decided here (fewer than three seeds)"
    expected = {"C1, baseline": "supported.", "C4, route": "supported", "C4, dense": "refuted",
                "C4, bias": "not decided here", "C4, adding up": "not additive"}
    assert len(found) == 9 and found | expected == found, found
    assert set(verdicts(gains, seeds=1).values()) == {"supported.", few}
    single = {"route": 0.05, "bias": 0.02, "dense": 0.01}
    sums = {lane: sum(single.get(part, 0.0) for part in lane.split("+")) for lane in interventions.CELL_LANES}
    assert verdicts(sums)["C4, adding up"] == "additive" and verdicts(sums, 0.02)["C4, adding up"] == "not decided here"
    # better than a control that depth harms, but worse than the baseline: no gain
    found = verdicts({"baseline": 0.0, "deeper": -0.05, "route": -0.02, "bias": 0.03})
    assert found["C4, route"] == "not decided here" and found["C4, bias"] == "supported" and len(found) == 3, found
    assert list(verdicts({"baseline": 0.0, "bias": 0.0})) == ["C1, baseline"]
    # a model under two names counts once; lanes are compared over the seeds that both have
    runs = planted_runs({"baseline": [0.5, 0.6, 0.7], "wt": [0.4, 0.5]})
    runs["baseline64"] = runs["baseline"]
    with replaced(claims, "across", len), replaced(claims, "points", lambda models: models):
        assert interventions.summarise(runs)["across"] == 5
    value, low, high = interventions.difference(runs, "wt", "baseline")["interval"]
    assert abs(value + 0.1) < 1e-12 and abs(high - low) < 1e-12
    runs["wt"] = runs["wt"][1:]                # one seed: over images
    found = interventions.difference(runs, "wt", "baseline")
    assert found["seeds"] == 1 and found["interval"][1] < -0.1 < found["interval"][2] and found["purity"][1] is None
    assert interventions.difference(runs | {"wt": [runs["wt"][0] | {"seed": 9}]}, "wt", "baseline") is None


def test_sweep_command():
    """A small sweep: its report is complete, every lane's printed command gives the same weights, what is finished is
    not made again, what fails is named and does not end it."""
    lanes = ["column", "cluster1", "colour", "route+bias+dense", "deeper"]
    half = [*SWEEP, "--fraction", "0.5", "--lanes"]
    with folder() as here:
        status, out, err = sweep([*half, *lanes])
        assert status == 0 and "failed" not in out + err, (out, err)
        report = json.loads((here / "sweep" / "report.json").read_text())
        rows, runs = ({row["lane"]: row for row in report[key]} for key in ("lanes", "runs"))
        assert set(rows) == set(runs) == {"baseline", "baseline64", *lanes} and not report["missing"]
        text = (here / "sweep" / "report.md").read_text()
        assert all(f"\n| {lane} " in text and runs[lane]["command"] in text for lane in lanes)
        assert all(len(line) <= 100 for line in out.splitlines()) and out.count(" seed 0 ") == 7
        # lanes of the factorial are missing, and models for a correlation
        assert {path.name for path in (here / "sweep").glob("*.png")} == {"lanes.png", "clusters.png"}
        assert not list((here / "sweep").rglob("*.claim")) and len(list((here / "sweep" / "runs").glob("*.log"))) == 7
        assert rows["deeper"]["parameters"] >= max(rows[lane]["parameters"] for lane in ("colour", "column"))
        assert rows["deeper"]["gflop_per_image"] >= 1.25 * rows["colour"]["gflop_per_image"]
        contents = {lane: read_checkpoint(run_file("sweep", f"{lane}-seed0.pt")) for lane in runs}
        saved = {lane: content["args"] for lane, content in contents.items()}
        assert saved["cluster1"]["batch_size"] == 64 and saved["cluster1"]["w_cluster"] == 1.0
        joined = {"steps": 6, "fraction": 1.0, "branch": "bias", "readout": 8}
        assert saved["route+bias+dense"] | joined == saved["route+bias+dense"]
        found = json.loads(run_file("sweep", "baseline-*.diagnosis.json").read_text())
        assert saved["column"]["branch"] == f"column:{found['highest_column']}" and 0 <= found["highest_column"] < 8
        for lane, run in runs.items():         # the model's own accuracy, of a colour branch and drawn pixels too
            assert contents[lane]["metrics"]["test_accuracy"] == run["reader"] == rows[lane]["reader"][0], lane
        assert found["reader"] == found["right"].count("1") / 40
        for lane in ("column", "cluster1", "route+bias+dense"):
            threads, program, file, *words = shlex.split(runs[lane]["command"])
            assert threads == f"OMP_NUM_THREADS={torch.get_num_threads()}" and [program, file] == ["python", "train.py"]
            if lane == "column":
                assert finish(start_program("train.py", words, threads))[0] == 0
            else:
                trained(words)
            assert same_weights(run_file("sweep", f"{lane}-*.pt"), f"{lane}-seed0.pt"), lane
        # what is there stays, and a report is of all of it
        before = {path: path.stat().st_mtime_ns for path in (here / "sweep" / "runs").iterdir()}
        status, again, err = sweep(["--report-only", "--out", "sweep"])
        assert status == 0 and out.endswith(again), err
        assert sweep([*half, "deeper", "--device", "cpu"])[0] == 0
        assert json.loads((here / "sweep" / "report.json").read_text())["lanes"] == report["lanes"]
        assert {path: path.stat().st_mtime_ns for path in (here / "sweep" / "runs").iterdir()} == before
        # runs that fail do not end the sweep
        run_file("sweep", "cluster1-*.diagnosis.json").unlink()
        run_file("sweep", "cluster1-*.pt").write_text("no checkpoint")
        status, out, err = sweep([*half, "cluster1", "deeper"])
        assert status == 1 and "failed: cluster1 seed 0;" in err and "\n| deeper " in out, (out, err)
        [(name, why)] = json.loads((here / "sweep" / "report.json").read_text())["missing"].items()
        assert name == "cluster1 seed 0" and why.startswith("failed: train.py: error: ") and "not a checkpoint" in why
        status, out, err = sweep([*SWEEP, "--lanes", "wt", "column", "--lr", "1e30", "--out", "bad"])
        assert status == 1 and out.count("not finite") == 2 and "no run is finished" in err, (out, err)
        assert "column seed 0 " in out and "needs its seed's baseline" in out, out


def test_what_a_sweep_refuses():
    """All that can be wrong is named in one line before any work, and nothing is made or changed."""
    def rejected(argv, word):
        refused(argv, word, main=interventions.main)

    with folder() as here:
        assert sweep([*SWEEP, "--lanes", "baseline"])[0] == 0
        for argv, word in (
                (["--lanes", "magic"], "magic"), (["--lanes", "all", "magic"], "magic"),
                (["--lanes", "bias+bias"], "--branch"), (["--lanes", "bias+colour"], "--branch"),
                (["--lanes", "column+bias", "--out", "new"], "bias+column: two"), (["--seeds", "0"], "--seeds"),
                (["--lanes", "cluster1", "--train-size", "40", "--out", "new"], "batches of 64"),
                (["--lanes", "deeper", "--fraction", "0.02", "--size", "32", "--out", "new"], "deeper"),
                (["--train-size", "200"], "--train-size 160, not 200"), (["--lr", "1"], "--lr 0.003, not 1.0"),
                (["--out", "no/such", "--lanes", "wt"], "No such file"), (["--out", "."], "something else"),
                (["--steps-test", "2"], "--steps-test"), (["--resume"], "--resume"),
                (["--branch", "magic"], "--branch"), (["--report-only"], "--out alone")):
            rejected([*SWEEP, *argv], word)
        rejected(["--lanes", "wt"], "--out")
        rejected(["--report-only", "--out", "new"], "--out alone")
        with replaced(interventions, "LANES", interventions.LANES | {"baseline": ("", {"readout": 3})}):
            rejected([*SWEEP, "--lanes", "baseline"], "made with --readout 0, not 3")
        # a damaged file, or data that changed
        mark = here / "sweep" / "sweep.json"
        for path, text in ((run_file("sweep", "*.diagnosis.json"), "{}"), (mark, "[]")):
            kept = path.read_text()
            for damaged in (text, kept[:len(kept) // 2]):
                path.write_text(damaged)
                for argv in ([*SWEEP, "--lanes", "baseline"], ["--report-only", "--out", "sweep"]):
                    rejected(argv, "something else" if path == mark else "damaged")
            path.write_text(kept)
        mark.write_text(json.dumps(json.loads(mark.read_text()) | {"facts": [1, ["a"], 7]}))
        rejected([*SWEEP, "--lanes", "wt"], "other data")
    assert interventions.with_baselines(["bias+route", "cluster0.1+bias"]) == [
        "baseline", "baseline64", "cluster0.1+bias", "route+bias"]


def test_claimed_runs():
    """A claim is respected, unless its process is gone or it and the checkpoint have been silent for ten minutes."""
    with folder():
        args = types.SimpleNamespace(out="run.pt", save_minutes=5.0)
        path, checkpoint, gone = Path("run.claim"), Path("run.pt"), subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        assert interventions.claim(args) and path.read_text() == interventions.OWNER
        here = platform.node()
        for owner, ages, taken in ((f"1 {here}", {}, False), ("1 elsewhere", {}, False), ("", {}, False),
                                   (f"{gone.pid} {here}", {}, True), (f"{gone.pid} elsewhere", {}, False),
                                   ("1 elsewhere", {path: 590}, False), ("1 elsewhere", {path: 610}, True),
                                   ("1 elsewhere", {path: 900, checkpoint: 590}, False),
                                   ("1 elsewhere", {path: 590, checkpoint: 900}, False),
                                   ("1 elsewhere", {path: 900, checkpoint: 610}, True)):
            checkpoint.unlink(missing_ok=True)
            path.write_text(owner)
            for file, age in ages.items():
                file.touch()
                os.utime(file, (time.time() - age,) * 2)
            assert interventions.claim(args) == taken, (owner, ages)
            assert path.read_text() == (interventions.OWNER if taken else owner)
        args.save_minutes = 20.0               # a run at work may be silent for so long
        path.write_text("1 elsewhere")
        for file in (path, checkpoint):
            os.utime(file, (time.time() - 1000,) * 2)
        assert not interventions.claim(args)


def test_two_sweeps_share_a_folder():
    """Each run is made once, by one of them; the report covers the seeds of both."""
    with folder():
        flags = [*TINY, "--lanes", "wt", "--out", "sweep"]
        process = start_program("interventions.py", [*flags, "--seeds", 1])
        wait_for(lambda: list(Path().glob("sweep/runs/*.claim")), process)
        ends = sweep([*flags, "--seeds", 2]), finish(process)
        assert [status for status, _, _ in ends] == [0, 0], ends
        assert "baseline seed 0         being made by another process\n" in ends[0][1], ends  # it went on with others
        logs = [path.read_text() for path in Path("sweep/runs").glob("*.log")]
        assert len(logs) == 4 and all(log.count("epoch   1/2") == 1 for log in logs)
        # a run of another machine is left out, and named
        diagnosis = run_file("sweep", "wt-seed1.diagnosis.json")
        diagnosis.unlink()
        Path("sweep/runs/wt-seed1.claim").write_text("1 elsewhere")
        status, out, err = sweep([*flags, "--seed", 1, "--seeds", 1])
        report = json.loads(Path("sweep/report.json").read_text())
        assert status == 0 and report["missing"] == {"wt seed 1": "being made by another process"}, (out, err)
        assert [(run["lane"], run["seed"]) for run in report["runs"]] == [("baseline", 0), ("baseline", 1), ("wt", 0)]


def test_killed_sweep_goes_on():
    """Killed at a random moment, and stopped by a signal, the same command ends as one that was not."""
    flags = [*TINY, "--epochs", 4, "--seeds", 1, "--lanes", "wt", "--save-minutes", 0, "--train-size", 320]
    with folder() as here:
        for lane, number in (("baseline", signal.SIGKILL), ("wt", signal.SIGTERM)):
            process = start_program("interventions.py", [*flags, "--out", "killed"])
            wait_for(lambda: list(here.glob(f"killed/runs/{lane}-*.pt")), process)
            time.sleep(0.2 * random.random())
            process.send_signal(number)
            status, _, err = finish(process)
            assert "progress" in read_checkpoint(run_file("killed", f"{lane}-*.pt"))
            assert len(list(here.glob("killed/runs/*.claim"))) == (number == signal.SIGKILL)
        assert status == 143 and err.endswith("interventions.py: stopped; the same command goes on\n"), err
        assert sweep([*flags, "--out", "killed"])[0] == 0 and sweep([*flags, "--out", "straight"])[0] == 0
        for lane in ("baseline", "wt"):
            assert same_weights(*(run_file(name, f"{lane}-*.pt") for name in ("killed", "straight"))), lane


def test_recorded_runs_are_recognised():
    """The report of the recorded CIFAR-10 runs comes out again, from a folder with settings that are none now."""
    path = HERE / "results" / "cifar10-jpeg-16px-sweep"
    recorded = json.loads((path / "report.json").read_text())
    assert "bench" in json.loads((path / "sweep.json").read_text())["settings"]
    assert interventions.read_sweep(path).depth == 13
    with folder():
        shutil.copytree(path, "copy")
        status, out, err = sweep(["--report-only", "--out", "copy"])
        assert status == 0, err
        report, text = json.loads(Path("copy/report.json").read_text()), Path("copy/report.md").read_text()
    once, now = ({(run["lane"], run["seed"]): run["reader"] for run in r["runs"]} for r in (recorded, report))
    assert len(now) == 26 and now == once
    assert all(run["command"] in text for run in recorded["runs"])
    words = [{line.split(":")[0]: line.split(":")[1].split(".")[0] for line in r["claims"]
              if line.startswith(("C1, baseline", "C2", "C4"))} for r in (recorded, report)]
    assert words[0] == words[1] and len(words[0]) == 10, words


def test_contrastive_loss_makes_the_weights_purer():
    """On digits, against the same batches without it."""
    purity = {}
    flags = ["--train-size", 320, "--width", 16, "--head-dim", 8, "--reader-depth", 1, "--batch-size", 64]
    for weight in (0.0, 1.0):
        with folder():
            trained(list(map(str, flags)), f"--epochs 8 --w-cluster {weight}")
            model, args = load_checkpoint("out.pt")
            _, test = data.load_dataset(args)
            fits = diagnostics.fit_all(model.fit, test, "cpu")
            x = model.coordinates(fits.images, fits.tokens)["phi - theta"]
            purity[weight] = float(diagnostics.purity(x, fits.labels).mean())
    assert purity[1.0] > purity[0.0] + 0.05, purity


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


def main(words: list[str]):
    tests = [(name, f) for name, f in globals().items() if name.startswith("test_") and all(w in name for w in words)]
    passed, failed, skipped = 0, 0, 0
    for name, test in tests:
        began = time.monotonic()
        torch.manual_seed(0)
        try:
            test()
            verdict, passed = "ok", passed + 1
        except SkipTest as reason:
            verdict, skipped = f"skipped: {reason}", skipped + 1
        except Exception:
            traceback.print_exc()
            verdict, failed = "FAILED", failed + 1
        print(f"{name[5:]:70s} {time.monotonic() - began:6.1f} s  {verdict}", flush=True)
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    sys.exit(1 if failed or not tests else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
