"""Every test of the project.

    python test_all.py                  # all of them; ends with "N passed, N failed"
    python test_all.py resume           # those with "resume" in their name
    pytest test_all.py                  # the same functions
"""
import contextlib
import io
import itertools
import json
import math
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
from pathlib import Path
from unittest import SkipTest

import numpy as np
import torch
import torch.nn.functional as F

import diagnostics
import interventions
import train
from inner_loop import MetaSGD, draw_pixels, functional_loss_and_grad, take_pixels, textbook_loss_and_grad
from reader import Attention, Reader
from siren import Siren, Weights, coordinate_grid

HERE = Path(__file__).resolve().parent
TINY = ("--width 8 --depth 2 --steps 2 --reader-depth 1 --head-dim 4 --batch-size 16 --train-size 160 --test-size 40 "
        "--epochs 2 --workers 0").split()


class TextbookSiren(Siren):
    loss_and_grad = textbook_loss_and_grad


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


def apart(a, b) -> float:
    """Relative difference of two lists of tensors, concatenated."""
    a, b = (torch.cat([x.detach().double().flatten() for x in xs]) for xs in (a, b))
    return float((a - b).norm() / b.norm())


def tiny_model(textbook=False, **more) -> train.MWT:
    settings = dict(channels=3, size=6, classes=4, width=8, depth=2, steps=3, reader_depth=2, head_dim=4) | more
    model = train.MWT(**settings)
    if textbook:
        model.siren.__class__ = TextbookSiren
    return model


def batch(n=5, size=6, classes=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, size, size, generator=g) * 2 - 1, torch.randint(classes, (n,), generator=g)


def grads(model) -> dict[str, list[torch.Tensor]]:
    return {name: [torch.zeros_like(p) if p.grad is None else p.grad for p in part.parameters()]
            for name, part in model.named_children()}


def command(argv):
    """train.main in process: (exit status, what it printed to stdout and stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            train.main([str(a) for a in argv])
            status = 0
        except SystemExit as error:
            status = error.code
    return status, out.getvalue(), err.getvalue()


def start(argv) -> subprocess.Popen:
    """train.py as a process of its own."""
    return subprocess.Popen([sys.executable, str(HERE / "train.py"), *map(str, argv)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def finish(process) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def wait_for(condition, process, seconds=100):
    """Until the condition holds; an error if the process ends or time runs out before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def written(pattern) -> bool:
    """Whether a file of that name holds something; a program that only tries whether it can write leaves an empty one for a moment."""
    with contextlib.suppress(FileNotFoundError):
        return any(path.stat().st_size for path in Path().glob(pattern))
    return False


def save_image(path, pixels, mode=None):
    from PIL import Image
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path)


def image_folder(root: Path, train_images=12, test_images=4, size=10, second="test", classes="abc") -> Path:
    rng = np.random.default_rng(0)
    for split, n in (("train", train_images), (second, test_images)):
        for c in classes:
            for i in range(n):
                save_image(root / split / c / f"{i:03d}.png", rng.integers(0, 256, (size, size + 2, 3), dtype=np.uint8))
    return root


# ---- siren.py ----------------------------------------------------------------------------------------------------------

def test_coordinate_grid_by_hand():
    expected = [[-1, -1], [-1, 0], [-1, 1], [1, -1], [1, 0], [1, 1]]
    assert coordinate_grid(2, 3).tolist() == expected


def test_siren_forward_by_hand():
    """One pixel at a time, in numpy."""
    with float64():
        torch.manual_seed(0)
        siren = Siren(2, 3, width=5, depth=2, omega=7.0)
        weights = Weights(torch.randn(2, 5, 3), torch.randn(2, 2, 5, 6))
        coords = torch.randn(4, 2)
        got = siren(coords, weights).detach().numpy()
        V, c, scale = (p.detach().numpy() for p in (siren.head.weight, siren.head.bias, siren.scale))
        for n in range(2):
            W0, W = weights.first[n].numpy(), weights.hidden[n].numpy()
            for p, x in enumerate(coords.numpy()):
                a = np.sin(7.0 * (W0[:, :2] @ x + W0[:, 2]))
                for W1 in W:
                    a = np.sin(W1[:, :5] @ a + W1[:, 5])
                np.testing.assert_allclose(got[n, p], scale * (V @ a + c), rtol=1e-10, atol=1e-12)


def test_siren_initialisation():
    siren = Siren(2, 3, width=64, depth=3)
    for weight, bound in ((siren.first, 1 / 2), (siren.hidden, math.sqrt(6 / 64))):
        w = weight[..., :-1]
        assert 0.95 * bound < float(w.detach().abs().max()) <= bound and abs(float(w.detach().mean())) < 0.1 * bound
        assert torch.all(weight[..., -1] == 0)
    assert torch.all(siren.scale == 0.1)


def test_closed_form_gradient_against_autograd():
    with float64():
        for seed, (dims, out, width, depth, images, points) in enumerate([(2, 3, 8, 2, 4, 9), (3, 1, 5, 1, 2, 7), (3, 2, 12, 4, 3, 20), (1, 4, 6, 3, 1, 5)]):
            torch.manual_seed(seed)
            siren = Siren(dims, out, width, depth, omega=5.0)
            values = torch.randn(images, points, out)
            batched = Weights(*(w + 0.1 * torch.randn(images, *w.shape) for w in siren.anchor()))
            for coords in (torch.randn(points, dims), torch.randn(images, points, dims)):
                for weights in (batched, siren.anchor()):
                    loss, grad = siren.loss_and_grad(coords, values, weights)
                    for n in range(images):
                        one = [(w[n] if weights is batched else w).detach().requires_grad_() for w in weights]
                        x = coords if coords.dim() == 2 else coords[n]
                        expected = (siren(x, Weights(*one)) - values[n]).square().mean()
                        assert apart([loss[n]], [expected]) <= 1e-12
                        assert apart([g[n] for g in grad], torch.autograd.grad(expected, one)) <= 1e-9
                    for other in (textbook_loss_and_grad, functional_loss_and_grad):
                        its_loss, its_grad = other(siren, coords, values, weights)
                        assert apart([its_loss, *its_grad], [loss, *grad]) <= 1e-9


# ---- inner_loop.py -----------------------------------------------------------------------------------------------------

def test_inner_loop_by_hand():
    """k steps of plain SGD on one image, by torch.autograd, against the batch; with all pixels and with given ones."""
    with float64():
        for shared in (False, True):
            torch.manual_seed(0)
            siren = Siren(2, 3, width=6, depth=2)
            inner = MetaSGD(siren, steps=3, shared=shared)
            assert len(inner.first) == (1 if shared else 3) and inner.first.min() >= 0.1 and inner.first.max() <= 1
            coords, values = coordinate_grid(4, 4), torch.rand(5, 16, 3)
            for pixels in (None, draw_pixels(3, 5, 16, 0.4)):
                phi = inner(siren, *((coords, values) if pixels is None else take_pixels(coords, values, pixels)))
                for n in range(5):
                    one = [w.detach().clone().requires_grad_() for w in siren.anchor()]
                    for j in range(3):
                        seen = torch.arange(16) if pixels is None else pixels[j, n]
                        loss = (siren(coords[seen], Weights(*one)) - values[n, seen]).square().mean()
                        step = torch.autograd.grad(loss, one)
                        alpha = [a[0 if shared else j].detach() for a in (inner.first, inner.hidden)]
                        one = [(w - a * g).detach().requires_grad_() for w, a, g in zip(one, alpha, step)]
                    assert apart([w[n] for w in phi], one) <= 1e-12
    siren = Siren(2, 3, width=6, depth=2)
    longer = MetaSGD(siren, steps=2, shared=True)(siren, coords.float(), values.float(), steps=5)
    assert longer.hidden.shape == (5, 2, 6, 7)
    try:
        MetaSGD(siren, steps=2)(siren, coords.float(), values.float(), steps=3)
    except ValueError:
        return
    raise AssertionError("three steps with step sizes for two must be an error")


def test_pixels_drawn():
    assert draw_pixels(1, 1, 100, 0.29).shape == (1, 1, 29)                    # 0.29 * 100 = 28.999... in floating point
    drawn = draw_pixels(6, 50, 99, 0.1)
    assert drawn.shape == (6, 50, 9) and drawn.min() >= 0 and drawn.max() <= 98
    rows = [tuple(sorted(set(r.tolist()))) for step in drawn for r in step]
    assert all(len(r) == 9 for r in rows) and len(set(rows)) == 300            # distinct, and fresh each time
    counts = torch.bincount(draw_pixels(200, 50, 20, 0.25).flatten(), minlength=20) / 10000    # each with probability 1/4
    assert (counts - 0.25).abs().max() < 6 * math.sqrt(0.25 * 0.75 / 10000)
    assert draw_pixels(1, 3, 16, 1.0).sort(-1).values.eq(torch.arange(16)).all()
    with float64():                # a fraction of 1 uses each pixel once
        model = tiny_model()
        images, _ = batch()
        every = draw_pixels(3, 5, 36, 1.0)
        assert apart(model.adapt(images, pixels=every), model.adapt(images)) <= 1e-12
        fewer = tiny_model(fraction=0.5)
        assert apart(fewer.adapt(images), fewer.adapt(images)) > 1e-3


# ---- reader.py ---------------------------------------------------------------------------------------------------------

def test_attention_by_hand():
    with float64():
        torch.manual_seed(0)
        attention = Attention(6, head_dim=3)
        x = torch.randn(2, 5, 6)
        h = F.layer_norm(x, (6,), attention.norm.weight, attention.norm.bias)
        out = torch.zeros(2, 5, 6)
        W = attention.qkv.weight
        for n in range(2):
            for head in range(2):
                q, k, v = (h[n] @ W[part * 6 + head * 3: part * 6 + head * 3 + 3].T for part in range(3))
                for t in range(5):
                    score = torch.stack([q[t] @ k[s] for s in range(5)]) / math.sqrt(3)
                    weight = score.exp() / score.exp().sum()
                    out[n, t, 3 * head: 3 * head + 3] = sum(weight[s] * v[s] for s in range(5))
        expected = 0.1 * (out @ attention.out.weight.T + attention.out.bias)
        assert apart([attention(x)], [expected]) <= 1e-12


def test_reader_input_and_flow():
    with float64():
        torch.manual_seed(0)
        tokens = torch.randn(3, 10, 7)
        reader = Reader(10, 6, 4, depth=2, head_dim=3, token_scale=50.0)
        torch.nn.init.normal_(reader.beta)
        logits, states = reader(tokens, flow=True)
        assert len(states) == 5 and torch.equal(logits, reader(tokens))
        assert apart([states[0]], [50.0 * (tokens + reader.beta) @ reader.embed.weight.T + reader.embed.bias]) <= 1e-12
        for before, block, after in zip(states, reader.blocks, states[1:]):
            assert torch.equal(before + block(before), after)
        assert apart([logits], [states[-1].mean(1) @ reader.head.weight.T + reader.head.bias]) <= 1e-12
        normed = Reader(10, 6, 4, depth=0, head_dim=3, token_scale=0.0)
        x = tokens.flatten(1)
        x = ((x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()).view_as(tokens)
        assert apart([normed(tokens)], [normed.head(normed.embed(x).mean(1))]) <= 1e-12


def test_readout_and_branches_by_hand():
    with float64():
        torch.manual_seed(0)
        tokens, colour = torch.randn(3, 10, 7), torch.rand(3, 3)
        reader = Reader(10, 6, 4, depth=1, head_dim=3, readout=2)
        logits, states = reader(tokens, flow=True)
        assert [x.shape[1] for x in states] == [10, 10, 10, 2, 2, 2, 2] and torch.equal(logits, reader(tokens))
        x = states[2]
        z = torch.stack([query + x.sum(1) / 10 for query in reader.queries], 1)
        for attention, mlp in zip(reader.gather[::2], reader.gather[1::2]):
            z = z + attention(torch.cat([z, x], 1))[:, :2]                     # all ask, and only the queries' answers are used
            z = z + mlp(z)
        assert apart([logits], [reader.head((z[:, 0] + z[:, 1]) / 2)]) <= 1e-12
        swapped = reader(tokens[:, torch.randperm(10)])
        assert apart([swapped], [logits]) <= 1e-12                             # beta is 0: the queries have no order to go by
        plain = Reader(10, 6, 4, depth=1, head_dim=3, token_scale=50.0)
        for branch, features, scale in (("bias", tokens[..., 6], 50), ("column:2", tokens[..., 2], 50), ("colour", colour, 1)):
            reader = Reader(10, 6, 4, depth=1, head_dim=3, token_scale=50.0, branch=branch)
            reader.load_state_dict(plain.state_dict(), strict=False)
            assert torch.equal(reader(tokens, colour=colour), plain(tokens))   # the branch is silent at first
            torch.nn.init.normal_(reader.branch.down.weight)
            b = reader.branch
            expected = plain(tokens) + F.gelu(scale * features @ b.up.weight.T + b.up.bias) @ b.down.weight.T + b.down.bias
            assert apart([reader(tokens, colour=colour)], [expected]) <= 1e-12
            assert branch != "colour" or torch.equal(reader(tokens), plain(tokens))


def test_centred_colour():
    """Another mean colour changes neither the weights nor the error; it reaches the logits through the colour branch alone."""
    with float64():
        model = tiny_model(centre_colour=True, branch="colour")
        torch.nn.init.normal_(model.reader.branch.down.weight)
        images, labels = batch()
        shift = torch.tensor([0.1, -0.2, 0.3])
        other = images + shift[:, None, None]
        assert apart([model.fit(other)], [model.fit(images)]) <= 1e-10 and apart([tiny_model().fit(other)], [tiny_model().fit(images)]) > 1e-2
        centred = images - images.mean((2, 3), keepdim=True)
        assert apart([model.fit(images)], [tiny_model().fit(centred)]) <= 1e-12
        a, b = (model.reconstruct(*model.look(x)) for x in (images, other))
        assert apart([a[1]], [b[1]]) <= 1e-10
        assert apart([model.colour(model.look(other)[1])], [model.colour(model.look(images)[1]) + shift]) <= 1e-12
        pixels = draw_pixels(4, 5, 36, 0.5)
        coords, values = model.look(images, pixels)
        drawn = torch.stack([images.flatten(2)[n][:, pixels[:, n].flatten()].mean(1) for n in range(5)])
        assert apart([model.colour(values)], [drawn]) <= 1e-12
        # the clamp is to what a pixel can be, not to what a centred one can be
        phi, error = model.reconstruct(*model.look(images), clamp=True)
        prediction = model.siren(model.coords, phi) + images.mean((2, 3))[:, None]
        assert apart([error], [(prediction.clamp(-1, 1) - images.flatten(2).mT).square().mean((1, 2))]) <= 1e-12


def test_contrastive_loss_against_the_equation():
    with float64():
        g = torch.Generator().manual_seed(0)
        x, labels, t = torch.randn(7, 5, generator=g), torch.tensor([0, 0, 1, 1, 1, 2, 0]), 0.1            # the 2 is alone
        z = [row / row.norm() for row in x]
        terms = []
        for i in range(7):
            P = [p for p in range(7) if p != i and labels[p] == labels[i]]
            total = sum(math.exp(float(z[i] @ z[a]) / t) for a in range(7) if a != i)
            if P:
                terms.append(-sum(math.log(math.exp(float(z[i] @ z[p]) / t) / total) for p in P) / len(P))
        assert len(terms) == 6 and abs(float(train.supervised_contrastive(x, labels)) - sum(terms) / 6) <= 1e-12
        assert abs(float(train.supervised_contrastive(3 * x, labels)) - sum(terms) / 6) <= 1e-12
        assert float(train.supervised_contrastive(x, torch.arange(7))) == 0
        # it drives theta and alpha, and leaves the reader's gradient alone
        images, _ = batch()
        labels = torch.tensor([0, 0, 1, 1, 2])
        with_, without = tiny_model(w_cluster=0.3), tiny_model()
        for model in (with_, without):
            model(*model.look(images), labels)[:3].sum().backward()
        ours = [p.grad - q.grad for m in ("siren", "inner_loop") for p, q in zip(getattr(with_, m).parameters(), getattr(without, m).parameters())]
        alone = tiny_model()
        phi = alone.adapt(images)
        rows = torch.cat([(phi.first - alone.siren.first).flatten(1), (phi.hidden - alone.siren.hidden).flatten(1)], 1)
        (0.3 * train.supervised_contrastive(rows, labels)).backward()
        expected = [torch.zeros_like(p) if p.grad is None else p.grad for m in (alone.siren, alone.inner_loop) for p in m.parameters()]
        assert apart(ours, expected) <= 1e-9
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(with_.reader.parameters(), without.reader.parameters()))


def test_logits_do_not_depend_on_the_batch_and_order_enters_by_beta():
    with float64():
        model = tiny_model()
        images, _ = batch(6)
        tokens = model.fit(images)
        logits = model.read(tokens)
        assert tokens.shape == (6, 16, 9)
        for n in range(6):
            assert apart([model.read(model.fit(images[n:n + 1]))[0]], [logits[n]]) <= 1e-10
        swapped = tokens[:, [3, 1, 2, 0, *range(4, 16)]]
        assert apart([model.read(swapped)], [logits]) <= 1e-12                 # beta is 0 at the start
        torch.nn.init.normal_(model.reader.beta, std=0.01)
        assert apart([model.read(swapped)], [model.read(tokens)]) > 1e-4


def test_parameter_counts():
    """The paper's Table 4."""
    def count(*parts):
        return sum(p.numel() for part in parts for p in part.parameters())
    siren = Siren(2, 3, width=128, depth=4)
    assert count(siren, MetaSGD(siren, steps=6)) == 465_414
    assert count(Reader(4 * 64, 64, 10, depth=10)) == 273_034
    assert count(Reader(4 * 128, 128, 10, depth=5)) == 581_258


def test_concept_files_work_alone():
    """Each file, copied into an empty folder, does its work there with torch alone."""
    uses = {
        "siren.py": "from siren import *\nassert Siren()(coordinate_grid(4, 4), Siren().anchor()).shape == (16, 3)",
        "reader.py": "import torch\nfrom reader import Reader\nassert Reader(8, 64, 3, depth=1)(torch.zeros(2, 8, 65)).shape == (2, 3)",
        "inner_loop.py": """
import torch
from typing import NamedTuple
from inner_loop import MetaSGD, textbook_loss_and_grad
class W(NamedTuple):
    only: torch.Tensor
class Linear(torch.nn.Module):                     # any network with an anchor will do
    def __init__(self):
        super().__init__()
        self.only = torch.nn.Parameter(torch.zeros(3, 2))
    def anchor(self):
        return W(self.only)
    def forward(self, coords, weights):
        return coords @ weights.only.mT
    loss_and_grad = textbook_loss_and_grad
net, x, y = Linear(), torch.eye(2), torch.ones(4, 2, 3)
phi = MetaSGD(net, steps=1)(net, x, y)
assert phi.only.shape == (4, 3, 2) and (phi.only > 0).all()"""}
    with folder() as here:
        for name, code in uses.items():
            alone = here / name[:-3]
            alone.mkdir()
            shutil.copy(HERE / name, alone)
            environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
            done = subprocess.run([sys.executable, "-c", code], cwd=alone, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, (name, done.stderr)


# ---- outer gradients ---------------------------------------------------------------------------------------------------

def test_outer_gradients_against_the_textbook():
    """One first-order pass against autograd through autograd in two passes, in float64, per group of parameters."""
    with float64():
        for w_task in (0.0, 0.01, 1.0):
            for fraction in (1.0, 0.5):
                images, labels = batch()
                pixels = None if fraction == 1 else draw_pixels(4, 5, 36, fraction)
                fast, slow = (tiny_model(textbook, w_task=w_task, fraction=fraction) for textbook in (False, True))
                fast(*fast.look(images, pixels), labels)[:2].sum().backward()
                train.textbook_backward(slow, *slow.look(images, pixels), labels)
                for name, expected in grads(slow).items():
                    assert all(g.abs().max() > 0 for g in expected), name
                    assert apart(grads(fast)[name], expected) <= 1e-8, (name, w_task, fraction)


def compiler():
    if not (shutil.which("g++") or shutil.which("clang++") or os.environ.get("CXX")):
        raise SkipTest("torch.compile needs a C++ compiler")


def test_faster_ways_against_the_textbook():
    """Outer gradients per group: compiled in float32, by torch.func, with inner steps recomputed, and the reader in bfloat16. At
    initialisation within limits; of a trained model, whose gradients are small differences, they are printed."""
    ways = {"torch.func": 1e-4, "recomputed": 1e-5, "bf16": 3e-2} | ({"compiled": 1e-4} if shutil.which("g++") or shutil.which("clang++") else {})
    with folder():
        assert command([*TINY, "--epochs", "4"])[0] == 0
        trained = train.read_checkpoint("out.pt")["model"]
    settings = dict(channels=1, size=8, classes=10, width=8, depth=2, steps=2, reader_depth=1, head_dim=4)
    test = train.read_digits()["test"]
    images, labels = test.signal(test.pixels[:16]), test.labels[:16]
    for state in (None, trained):
        def make(**more):
            model = tiny_model(**settings, **more)
            model.load_state_dict(state or model.state_dict())
            return model
        slow = make(textbook=True)
        train.textbook_backward(slow, *slow.look(images), labels)
        for way, limit in ways.items():
            model = make(bf16=way == "bf16")
            model.inner_loop.recompute = way == "recomputed"
            if way == "torch.func":
                model.siren.loss_and_grad = types.MethodType(functional_loss_and_grad, model.siren)
            forward = torch.compile(model, fullgraph=True) if way == "compiled" else model
            forward(*model.look(images), labels)[:2].sum().backward()
            gaps = {name: apart(grads(model)[name], expected) for name, expected in grads(slow).items()}
            assert state or max(gaps.values()) <= limit, (way, gaps)
            assert list(model.state_dict()) == list(slow.state_dict())
            if state:
                print(f"trained, {way}: " + ", ".join(f"{name} {gap:.0e}" for name, gap in gaps.items()))


def test_checkpoints_go_from_compiled_to_eager_to_two_processes():
    compiler()
    flags, calls = [*TINY, "--epochs", "3"], itertools.count(1)
    plain = train.agree
    with folder(), replaced(train, "agree", lambda code, group=None: 3 if next(calls) in (15, 30) else plain(code, group)):      # as Ctrl-C would
        assert command([*flags, "--compile", "--out", "way.pt"])[0] == 130
        assert "progress" in train.read_checkpoint("way.pt")
        assert command(["--resume", "--no-compile", "--out", "way.pt"])[0] == 130
        two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", HERE / "train.py", "--resume", "--out", "way.pt"],
                             env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        assert two.returncode == 0, two.stderr
        assert command([*flags, "--out", "straight.pt"])[0] == 0
        a, b = (train.read_checkpoint(p) for p in ("straight.pt", "way.pt"))
        assert "progress" not in b and list(a["model"]) == list(b["model"])
        assert 0 < apart(b["model"].values(), a["model"].values()) < 1e-3


def test_without_a_compiler_the_run_goes_on():
    with folder() as here:
        flags = [sys.executable, HERE / "train.py", *TINY, "--epochs", "1"]
        done = subprocess.run([*flags, "--compile", "--out", "broken.pt"], capture_output=True, text=True,
                              env=os.environ | {"CXX": "/no/such/compiler", "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(here / "cache")})
        assert done.returncode == 0, done.stderr
        said = [line for line in done.stderr.splitlines() if "torch.compile does not work here" in line]
        assert len(said) == 1 and "Traceback" not in done.stderr, done.stderr
        done = subprocess.run([*flags, "--out", "eager.pt"], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        a, b = (train.read_checkpoint(p)["model"] for p in ("eager.pt", "broken.pt"))
        assert all(torch.equal(v, b[k]) for k, v in a.items())


# ---- benchmark ---------------------------------------------------------------------------------------------------------

def test_counted_flops_against_torch():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    for more in ({}, {"fraction": 0.5}, {"depth": 1, "steps": 1, "mlp_ratio": 2, "width": 12}, {"readout": 3, "mlp_ratio": 2}, {"branch": "column:2"}, {"branch": "colour"}, {"w_cluster": 1.0}):
        model = tiny_model(**more)
        images, labels = batch()
        seen = model.look(images, model.draw(model.inner_loop.steps + 1, 5, torch.Generator()))
        for backward in (True, False):
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(backward):
                model.w_cluster = model.w_cluster if backward else 0.0
                loss = model(*seen, labels)[:3].sum()
                if backward:
                    loss.backward()
            assert counter.get_total_flops() == sum(train.count_flops(model, 5, backward).values()), (more, backward)


def test_training_hours_by_hand():
    assert train.training_hours(3600, 10, 2.0, 1.0, devices=4, workers=2) == 5.0               # the steps take longer
    assert train.training_hours(3600, 10, 0.1, 1.0, devices=4, workers=2) == 1.25              # the decoding does


def test_bench_command():
    small = ["--dataset", "digits", "--width", "8", "--head-dim", "4", "--depth", "1", "--reader-depth", "1", "--steps", "2", "--batch-size", "4", "--no-compile"]
    with folder():
        status, out, err = command(["--bench", *small])
        assert status == 0 and "ratio B/A" in out and max(map(len, out.splitlines()[2:])) <= 100, (out, err)
        report = json.loads(Path("bench.json").read_text())
        assert set(report["paths"]) == {"A", "B", "C"} and all(len(turns) == 2 for turns in report["paths"].values())
        runs = [r for turns in report["paths"].values() for r in turns]
        assert all(3 <= len(r["ms"]) <= 20 and min(r["ms"]) > 0 and r["peak_memory_bytes"] > 2 ** 20 and not r["compiled"] for r in runs)
        mean = [np.median(report["paths"]["B"][t]["ms"]) / np.median(report["paths"]["A"][t]["ms"]) for t in (0, 1)]
        assert np.allclose(report["ratios"]["B/A"], [np.mean(mean), min(mean), max(mean)])
        assert [report["paths"][path][0]["inner_gradient"] for path in "ABC"] == ["loss_and_grad", "textbook_loss_and_grad", "functional_loss_and_grad"]
        first, passes = report["paths"]["A"][0], []
        args, textbook = train.settings({"dataset": "digits", "width": 8, "head_dim": 4, "depth": 1, "reader_depth": 1, "steps": 2, "batch_size": 4, "compile": False}), train.textbook_backward
        with replaced(train, "textbook_backward", lambda *a: (passes.append(path), textbook(*a))):
            for path in "ABC":
                train.measure_path(args, path, 0.01)
        assert set(passes) == {"B"}
        assert set(first["phases_ms"]) == {"inner loop", "reader", "backward", "optimizer"} and first["evaluation_images_per_second"] > 0
        with replaced(train, "variations", lambda args: [("k", k, vars(args) | {"steps": k}) for k in (1, 2)]):
            assert command(["--bench", "cost", *small, "--out", "cost.json"])[0] == 0
        rows = json.loads(Path("cost.json").read_text())["cost"]
        assert [r["value"] for r in rows] == [1, 2] and rows[0]["flops"] < rows[1]["flops"] and Path("cost.png").stat().st_size > 5000
        assert command(["--bench", "imagenet", *small, "--fraction", "0.001", "--size", "64", "--out", "i.json"])[0] == 0
        assert [r["devices"] for r in json.loads(Path("i.json").read_text())["imagenet"]] == [1, 8, 64]
        Path("full.json").mkdir()
        for flags, word in ((["--out", "full.json"], "full.json"), (["cost", "--size", "40", "--fraction", "0.0007"], "--fraction"), (["--freeze-siren"], "--freeze-siren"), (["--width", "9" * 20, "--head-dim", "1"], "--width")):
            status, out, err = command(["--bench", *flags])
            assert status == 2 and err.count("\n") == 1 and word in err and not out, (flags, err)


def test_folder_of_many_files():
    """100,000 images: listed once, nothing but their paths in memory."""
    code = """
import resource, sys, time
sys.path.insert(0, sys.argv[1])
import torchvision.datasets, train
args = train.settings({"dataset": "many", "size": 8, "test_size": 8})
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
train.RESIDENT_BYTES, before, began = 0, peak(), time.monotonic()
data, test = train.load_dataset(args)
print(len(data), data.pixels is None, time.monotonic() - began, (peak() - before) / 1024)
"""
    with folder() as here:
        image_folder(here / "many", train_images=1, test_images=4, size=8, classes=[f"{c:03d}" for c in range(100)])
        for c in range(100):
            source = here / "many" / "train" / f"{c:03d}" / "000.png"
            for i in range(1, 1000):
                os.link(source, source.with_name(f"{i:03d}.png"))
        done = subprocess.run([sys.executable, "-c", code, HERE], capture_output=True, text=True)
        count, streamed, seconds, mebibytes = done.stdout.split()
        print(f"100,000 files: {float(seconds):.1f} s to list, {float(mebibytes):.0f} MiB", end=" ")
        assert count == "100000" and streamed == "True" and float(seconds) < 60 and float(mebibytes) < 100, done.stderr


def test_waiting_for_data_is_reported():
    with folder() as here:
        image_folder(here / "set", train_images=8, size=40)
        status, out, err = command([*TINY[:-8], "--epochs", "1", "--dataset", "set", "--size", "320", "--fraction", "0.01", "--augment", "--workers", "2",
                                    "--train-size", "24", "--test-size", "6", "--batch-size", "8", "--out", "wait.pt"])
        assert status == 0, err
        epoch, = json.loads(Path("wait.json").read_text())["epochs"]
        assert 0 < epoch["waiting_for_data"] < epoch["seconds"]
        with replaced(train, "RESIDENT_BYTES", 0):
            assert "waiting for data" in command([*TINY[:-8], "--epochs", "1", "--dataset", "set", "--size", "64", "--train-size", "24", "--test-size", "6", "--workers", "0"])[1]


def test_class_loss_does_not_reach_the_inr_at_w_task_0():
    images, labels = batch()
    for w_task in (0.0, 0.1):
        model = tiny_model(w_task=w_task)
        model(*model.look(images), labels)[0].backward()
        touched = [float(g.abs().max()) > 0 for g in grads(model)["siren"][:2] + grads(model)["inner_loop"]]
        assert all(touched) if w_task else not any(touched)
        assert all(float(g.abs().max()) > 0 for g in grads(model)["reader"])
        assert w_task or not any(float(g.abs().max()) > 0 for g in grads(model)["siren"])


# ---- data --------------------------------------------------------------------------------------------------------------

def test_digits_split_and_range():
    args = train.settings({})
    data, test = train.load_dataset(args)
    assert (len(data), len(test)) == (1437, 360) and data.pixels.dtype == torch.uint8
    both = torch.bincount(data.labels) + torch.bincount(test.labels)
    assert both.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # the UCI file's
    assert (torch.bincount(test.labels) - both * 360 / 1797).abs().max() < 1
    signal = data.signal(data.pixels)
    assert signal.min() == -1 and signal.max() == 1 and set(signal.unique().tolist()) == {i / 8 - 1 for i in range(17)}


def test_subsets_are_stratified_and_always_the_same():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    rows = train.stratified(labels, 11)
    assert rows.tolist() == sorted(set(rows.tolist())) and torch.bincount(labels[rows]).tolist() == [6, 3, 2]
    assert torch.equal(rows, train.stratified(labels, 11))
    assert set(train.stratified(labels, 10).tolist()) < set(train.stratified(labels, 20).tolist())
    whole, _ = train.load_dataset(train.settings({}))
    data, held = train.load_dataset(train.settings({"val": 0.2}))
    assert len(held) == round(0.2 * 1437) and len(data) + len(held) == 1437
    seen = {bytes(x.numpy()) for x in data.pixels.flatten(1)}
    unique = {bytes(x.numpy()) for x in held.pixels.flatten(1)}
    assert not seen & unique and len(seen | unique) == len({bytes(x.numpy()) for x in whole.pixels.flatten(1)})


def test_image_files_of_every_mode():
    from PIL import Image
    with folder() as here:
        ramp = np.linspace(0, 255, 24 * 20).reshape(20, 24).astype(np.uint8)
        colour = np.stack([ramp, ramp.T.reshape(20, 24), 255 - ramp], -1)
        Image.fromarray(colour).save("rgb.png")
        for mode, name in (("L", "l.png"), ("RGBA", "rgba.png"), ("P", "p.png"), ("CMYK", "cmyk.jpg"), ("LA", "la.png"), ("1", "1.png")):
            Image.fromarray(colour).convert(mode).save(name)
        Image.fromarray(ramp.astype(np.uint16) * 257).save("deep.png")
        Image.fromarray(ramp.astype(np.int32) * 257).save("deep.tif")
        for name in ("rgb.png", "l.png", "rgba.png", "p.png", "cmyk.jpg", "la.png", "1.png", "deep.png", "deep.tif"):
            x = train.decode(name, 16)
            assert x.shape == (3, 16, 16) and x.dtype == torch.uint8 and x.float().std() > 20, name
        for name in ("deep.png", "deep.tif"):      # 16 bits are scaled, not clipped
            Image.fromarray(ramp).save("shallow.png")
            assert (train.decode(name, 16).int() - train.decode("shallow.png", 16).int()).abs().max() <= 1, name
        plain = train.decode("rgb.png", 24).float()
        assert (train.decode("rgba.png", 24).float() - plain).abs().max() == 0
        # antialiased: a checkerboard shrinks to grey
        save_image(here / "board.png", (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
        assert (train.decode("board.png", 8).float() - 127.5).abs().max() < 10


def test_folder_resident_and_streamed_agree():
    with folder() as here:
        root = image_folder(here / "set", second="val")
        args = train.settings({"dataset": str(root), "size": 8, "workers": 2})
        data, test = train.load_dataset(args)
        assert (len(data), len(test), data.classes, data.channels) == (36, 12, ["a", "b", "c"], 3)
        with replaced(train, "RESIDENT_BYTES", 0):
            streamed, _ = train.load_dataset(args)
            one, _ = train.load_dataset(train.settings({"dataset": str(root), "size": 8, "train_size": 1}))
        assert len(one) == 1 and os.path.exists(os.fsdecode(one.paths[0]))
        assert data.pixels is not None and streamed.pixels is None
        order = [torch.tensor([5, 0, 35]), torch.tensor([7])]
        for workers in (0, 2):
            for (a, la), (b, lb) in zip(data.batches(order, "cpu"), streamed.batches(order, "cpu", workers), strict=True):
                assert torch.equal(a, b) and torch.equal(la, lb)


def test_torchvision_files():
    """Fashion-MNIST in its own file format, made here, read by torchvision's class; no network."""
    with folder() as here:
        raw = here / "data" / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        rng = np.random.default_rng(0)
        for split, n in (("train", 40), ("t10k", 20)):
            images, labels = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), np.arange(n, dtype=np.uint8) % 10
            (raw / f"{split}-images-idx3-ubyte").write_bytes(np.array([0x803, n, 28, 28], ">i4").tobytes() + images.tobytes())
            (raw / f"{split}-labels-idx1-ubyte").write_bytes(np.array([0x801, n], ">i4").tobytes() + labels.tobytes())
        data, test = train.load_dataset(train.settings({"dataset": "fashion_mnist", "data_root": str(here / "data")}))
        assert data.pixels.shape == (40, 1, 28, 28) and len(test) == 20 and len(data.classes) == 10
        assert torch.equal(test.pixels[:, 0], torch.from_numpy(images)) and test.labels.tolist() == labels.tolist()
        small, _ = train.load_dataset(train.settings({"dataset": "fashion_mnist", "data_root": str(here / "data"), "size": 14}))
        assert small.pixels.shape == (40, 1, 14, 14)


def test_augmentation_at_low_resolution():
    g = torch.Generator().manual_seed(0)
    images, u = torch.randint(256, (20, 3, 32, 32), generator=g, dtype=torch.uint8), torch.rand(20, 6, generator=g)
    for flip in (False, True):
        got = train.augment_low(images, u, flip)
        for n in range(20):
            padded = np.pad(images[n].numpy(), ((0, 0), (4, 4), (4, 4)), mode="reflect")
            y, x = int(u[n, 0] * 9), int(u[n, 1] * 9)
            expected = padded[:, y:y + 32, x:x + 32]
            if flip and u[n, 2] < 0.5:
                expected = expected[:, :, ::-1]
            assert np.array_equal(got[n].numpy(), expected)


def test_augmentation_at_high_resolution():
    size = 64
    y, x = torch.meshgrid(*[(torch.arange(size) + 0.5) / size * 2 - 1] * 2, indexing="ij")
    ramps = torch.stack([x, y, torch.ones_like(x)]).expand(200, -1, -1, -1)
    still = torch.tensor([0.5, 1.0, 0.5, 0.5, 0.5, 0.9]).expand(200, 6)        # no angle, whole area, centred, no flip
    assert torch.allclose(train.augment_high(ramps, still, True), ramps, atol=1e-5)
    mirrored = still.clone()
    mirrored[:, 5] = 0.1
    assert torch.allclose(train.augment_high(ramps, mirrored, True), ramps.flip(-1), atol=1e-5)
    assert torch.allclose(train.augment_high(ramps, mirrored, False), ramps, atol=1e-5)
    # On linear ramps bilinear look-up is exact, so finite differences give back the map: scale, aspect and angle.
    u = torch.rand(200, 6, generator=torch.Generator().manual_seed(0))
    u[:, 3:5] = 0.5
    moved = train.augment_high(ramps, u, False)[:, :2]
    centre = slice(size // 2 - 4, size // 2 + 4)
    along_x = moved[:, :, centre, centre].diff(dim=-1).mean((-1, -2)) * size / 2          # (N, 2): d(x, y) / dx
    along_y = moved[:, :, centre, centre].diff(dim=-2).mean((-1, -2)) * size / 2
    w, h = along_x.norm(dim=1), along_y.norm(dim=1)
    assert torch.allclose(w * h, 0.8 + 0.2 * u[:, 1], atol=1e-4) and w.max() <= 1.0001 and h.max() <= 1.0001
    assert (w / h).min() > 3 / 4 and (w / h).max() < 4 / 3
    angle = torch.atan2(along_x[:, 1], along_x[:, 0])
    assert torch.allclose(angle, (2 * u[:, 0] - 1) * math.pi / 6, atol=1e-4)
    # Only the drawn pixels: what the whole augmented image has there.
    images, u = torch.randint(256, (7, 3, size, size), dtype=torch.uint8), torch.rand(7, 6)
    pixels = draw_pixels(2, 7, size * size, 0.05)
    _, expected = take_pixels(torch.zeros(size * size, 2), train.augment_high(images, u, True).flatten(2).mT, pixels)
    assert torch.equal(train.augment_high(images, u, True, pixels), expected)


# ---- measures ----------------------------------------------------------------------------------------------------------

def test_psnr_and_interval_by_hand():
    assert abs(float(train.psnr(torch.tensor(0.04))) - 20) < 1e-5              # in [0, 1]: MSE 0.01
    assert float(train.psnr(torch.tensor(0.0))) == 100
    low, high = train.wilson(45, 50)               # Wilson (1927) by the quadratic formula: roots of (p - x)^2 = z^2 x (1 - x) / n
    for x in (low, high):
        assert abs((0.9 - x) ** 2 - 1.959964 ** 2 * x * (1 - x) / 50) < 1e-9
    assert low < 0.9 < high and train.wilson(0, 10)[0] == 0 and train.wilson(10, 10)[1] > 1 - 1e-12


def test_evaluation_against_one_image_at_a_time():
    args = train.settings({"test_size": 30, "width": 8, "head_dim": 4})
    _, test = train.load_dataset(args)
    model = train.build_model(args, 1, 10)
    result = train.evaluate(model, test)
    right, decibels = 0, []
    for image, label in zip(test.signal(test.pixels), test.labels):
        phi = model.adapt(image[None])
        right += int(model.read(model.tokens(phi)).argmax()) == int(label)
        pixels = ((model.siren(model.coords, phi)[0].clamp(-1, 1) + 1) / 2).detach()
        decibels.append(10 * math.log10(1 / float((pixels - (image.flatten(1).mT + 1) / 2).square().mean())))
    assert result["test_accuracy"] == right / 30 and abs(result["test_psnr"] - np.mean(decibels)) < 1e-3
    part = train.build_model(train.settings({"width": 8, "head_dim": 4, "fraction": 0.3}), 1, 10)
    assert train.evaluate(part, test) == train.evaluate(part, test)            # the same pixels each time


# ---- the outer loop ----------------------------------------------------------------------------------------------------

def test_training_learns_and_reports():
    """A small run on digits gets well above chance, and writes what it says it writes."""
    with folder():
        status, out, err = command("--train-size 700 --epochs 8 --width 32 --depth 1 --reader-depth 2 --steps 3 --lr 1e-2 "
                                   "--test-size 180 --val 0.2".split())
        assert status == 0, err
        report = json.loads(Path("out.json").read_text())
        assert report["test_accuracy"] > 0.8 and report["test_psnr"] > 20
        assert report["epochs"][0]["loss"] > report["epochs"][-1]["loss"] and len(report["epochs"]) == 8
        assert report["epochs"][-1]["test_accuracy"] == report["test_accuracy"]
        assert report["flags"]["width"] == 32 and report["versions"]["torch"] == torch.__version__ and report["seconds"] > 0
        assert Path("out.png").read_bytes().startswith(b"\x89PNG") and not Path("out.pt.tmp").exists()
        assert set(train.read_checkpoint("out.pt")) == {"format", "version", "args", "data", "model", "metrics"}
        assert "95% interval" in out and "held-out" in out and out.count("\nepoch") == 8
        before = Path("out.pt").read_bytes()
        status, out, _ = command(["--eval-only", "--ckpt", "out.pt"])
        assert status == 0 and f"{100 * report['test_accuracy']:.2f}%" in out and Path("out.pt").read_bytes() == before
        status, out, _ = command(["--resume"])
        assert status == 0 and "finished" in out
        model, args = train.load_checkpoint("out.pt")
        assert args.width == 32 and model.siren.first.shape == (32, 3)


def test_frozen_siren_and_new_reader():
    with folder():
        for argv in (["--w-task", "0", "--seed", "1", "--out", "wt.pt", "--val", "0.1"],
                     ["--init-from", "wt.pt", "--freeze-siren", "--out", "seq.pt"]):
            status, _, err = command([*TINY, *argv])
            assert status == 0, err
        wt, seq = (train.load_checkpoint(p)[0].state_dict() for p in ("wt.pt", "seq.pt"))
        for key in wt:
            if not key.startswith("reader"):
                assert torch.equal(wt[key], seq[key]), key
        assert not torch.equal(wt["reader.embed.weight"], seq["reader.embed.weight"])
        assert train.load_checkpoint("seq.pt")[1].val == 0.1                   # what the INR did not see stays unseen
        Path("wt.pt").rename("moved.pt")
        assert command(["--resume", "--out", "seq.pt"])[0] == 0
        Path("moved.pt").rename("wt.pt")
        refused([*TINY, "--init-from", "wt.pt", "--out", "wt.pt"], "overwrite")
        status, _, err = command(["--init-from", "wt.pt", "--width", "16"])
        assert status == 2 and "--width" in err


def test_shared_step_sizes_and_steps_at_test_time():
    with folder():
        assert command([*TINY, "--shared-lr"])[0] == 0
        results = [command(["--eval-only", "--ckpt", "out.pt", "--steps-test", str(k)]) for k in (1, 2, 6)]
        assert [r[0] for r in results] == [0, 0, 0] and len({r[1] for r in results}) == 3
        assert command(["--eval-only", "--ckpt", "out.pt"])[1] == results[1][1]


def test_command_line_gives_the_same_settings():
    for argv in ([], [*TINY[:-2], "--augment", "--lr", "1e-5", "--val", "0.1"], ["--dataset", "a folder", "--size", "64", "--omega", "10"]):
        args = train.settings(vars(train.parser().parse_args(argv)))
        again = shlex.split(train.command_line(args))
        assert again[:2] == ["python", "train.py"] and len(again) <= len(argv) + 2
        assert train.settings(vars(train.parser().parse_args(again[2:]))) == args


def test_same_core_whatever_the_reader():
    one = tiny_model()
    for more in (dict(reader_depth=3, w_task=0.0), dict(readout=2), dict(branch="bias"), dict(branch="column:3"), dict(centre_colour=True, branch="colour"), dict(w_cluster=1.0)):
        other = tiny_model(**more)
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())
    denser = tiny_model(steps=7)                                               # the same first step sizes
    for name, v in one.state_dict().items():
        assert torch.equal(v, denser.state_dict()[name][:3] if name.startswith("inner_loop") else denser.state_dict()[name])
    assert not torch.equal(one.siren.first, tiny_model(seed=1).siren.first)


def test_precision_bf16_stays_close():
    images, labels = batch()
    exact, rough = tiny_model(), tiny_model(bf16=True)
    a, b = (m(*m.look(images), labels).detach() for m in (exact, rough))
    assert a[1] == b[1] and a[0] != b[0] and abs(float(a[0] - b[0])) < 0.05    # the reader alone is in bf16
    with folder():
        status, _, err = command([*TINY, "--precision", "bf16"])
        assert status == 0, err
        assert all(p.dtype == torch.float32 for p in train.load_checkpoint("out.pt")[0].parameters())


@contextlib.contextmanager
def replaced(owner, name, value):
    plain = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield plain
    finally:
        setattr(owner, name, plain)


def test_outer_steps_by_hand():
    """Three steps of a run, in float64, against AdamW, OneCycleLR and clipping written out, on textbook gradients."""
    flags = [*TINY, "--epochs", "3", "--train-size", "16", "--lr", "0.02", "--lr-alpha", "0.3", "--weight-decay", "0.1", "--w-task", "1"]
    with float64(), folder():
        assert command(flags)[0] == 0
        got = train.load_checkpoint("out.pt")[0]
        args = train.settings(vars(train.parser().parse_args(flags)))
        data, _ = train.load_dataset(args)
        model = train.build_model(args, 1, 10)
        model.siren.__class__ = TextbookSiren
        groups = {part: list(getattr(model, part).parameters()) for part in ("siren", "inner_loop", "reader")}
        moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()}
        clipped = set()
        for t in range(3):
            rows = torch.randperm(16, generator=train.generator("order", 0, t))
            model.zero_grad()
            train.textbook_backward(model, *model.look(data.signal(data.pixels[rows])), data.labels[rows])
            # OneCycleLR (Smith & Topin 2018) with a warm-up of 0.05 of 3 steps: all three are on the way down.
            way = (t - (0.05 * 3 - 1)) / (2 - (0.05 * 3 - 1))
            fall = (1 + math.cos(math.pi * way)) / 2
            beta1, beta2 = 0.95 + (0.85 - 0.95) * fall, 0.999
            for part, parameters in groups.items():
                top = 0.3 if part == "inner_loop" else 0.02
                lr = top / 25e4 + (top - top / 25e4) * fall
                norm = torch.cat([p.grad.flatten() for p in parameters]).norm()
                clipped |= {part} if norm > 1 else set()
                for p in parameters:
                    g = p.grad * min(1, 1 / (norm + 1e-6))
                    m, v = moments[p]
                    m.mul_(beta1).add_((1 - beta1) * g)
                    v.mul_(beta2).add_((1 - beta2) * g * g)
                    with torch.no_grad():
                        p -= lr * 0.1 * p
                        p -= lr * (m / (1 - beta1 ** (t + 1))) / ((v / (1 - beta2 ** (t + 1))).sqrt() + 1e-8)
        assert clipped, "no gradient was long enough to be clipped"
        assert apart(got.parameters(), model.parameters()) <= 1e-9


def test_what_a_row_draws_does_not_depend_on_the_split():
    images = torch.randint(256, (45, 3, 64, 64), dtype=torch.uint8)
    for fraction in (0.01, 1.0):
        args = train.settings({"dataset": "cifar10", "size": 64, "augment": True, "fraction": fraction, "width": 8, "head_dim": 4, "depth": 1, "reader_depth": 1})
        model = train.build_model(args, 3, 10)
        cut = (lambda x: x) if fraction == 1 else (lambda x: x.transpose(0, 1))
        whole = cut(train.sampled(args, model, images, 7)[1])
        for first, last in ((0, 5), (5, 16), (16, 45), (44, 45)):
            got = cut(train.sampled(args, model, images[first:last], 7, first)[1])
            assert (got - whole[first:last]).abs().max() < 0.1             # grey levels: a rounding of the angle apart
        assert (cut(train.sampled(args, model, images, 8)[1]) - whole).abs().max() > 100


def test_augmentation_and_steps_reach_the_run():
    seen = []

    def spy(images, u, flip):
        seen.append(flip)
        return plain(images, u, flip)
    with folder() as here, replaced(train, "augment_low", spy) as plain:
        assert command([*TINY, "--epochs", "1"])[0] == 0 and not seen
        assert command([*TINY, "--epochs", "1", "--augment"])[0] == 0 and seen == [False] * 10          # digits have no mirror image
        image_folder(here / "set")
        assert command([*TINY[:-8], "--train-size", "32", "--test-size", "9", "--epochs", "1", "--augment", "--dataset", "set", "--size", "8", "--out", "set.pt"])[0] == 0
        assert seen[10:] == [True] * 2
        assert command([*TINY, "--epochs", "1", "--shared-lr", "--steps-test", "5"])[0] == 0
        trained = json.loads(Path("out.json").read_text())
        assert command(["--eval-only", "--ckpt", "out.pt", "--steps-test", "5", "--out", "five.pt"])[0] == 0
        assert command(["--eval-only", "--ckpt", "out.pt", "--steps-test", "2", "--out", "two.pt"])[0] == 0
        five, two = (json.loads(Path(f"{name}.json").read_text()) for name in ("five", "two"))
        assert five["test_psnr"] == trained["test_psnr"] != two["test_psnr"]
        assert "--eval-only" in five["command"] and "--eval-only" not in trained["command"]


def test_resume_after_kill_bit_for_bit():
    """Four epochs in one go, against the same killed with SIGKILL in epoch 3 and resumed."""
    flags = [*TINY, "--train-size", "640", "--epochs", "4", "--fraction", "0.5", "--augment", "--save-minutes", "0"]
    with folder():
        straight, killed = start([*flags, "--out", "straight.pt"]), start([*flags, "--out", "killed.pt"])

        def in_epoch_3():
            with contextlib.suppress(train.InputError):
                progress = train.read_checkpoint("killed.pt").get("progress", {"epoch": 4})
                assert progress["epoch"] < 3, "the kill came too late"
                return progress["epoch"] == 2 and progress["step"] >= 3
        wait_for(in_epoch_3, killed)
        killed.kill()
        killed.communicate()
        assert finish(straight)[0] == 0
        content = train.read_checkpoint("killed.pt")
        assert content["progress"]["epoch"] == 2 and 3 <= content["progress"]["step"] < 40, "the kill came too late"
        # the flag that would change the result is refused, the harmless one is not
        status, _, err = command(["--resume", "--out", "killed.pt", "--lr", "0.5"])
        assert status == 2 and "--lr" in err
        status, _, err = command([*TINY, "--out", "killed.pt"])
        assert status == 2 and "--resume" in err
        assert finish(start(["--resume", "--out", "killed.pt", "--save-minutes", "5"]))[0] == 0
        a, b = (train.read_checkpoint(p) for p in ("straight.pt", "killed.pt"))
        assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())
        for x, y in zip(a["metrics"]["epochs"], b["metrics"]["epochs"], strict=True):
            assert all(x[k] == y[k] for k in x if k not in ("seconds", "waiting_for_data", "peak_memory_bytes"))


def test_signals_save_and_say_how_to_resume():
    with folder():
        runs = {status: start([*TINY, "--epochs", "2000", "--out", f"{status}.pt"]) for status in (130, 143)}
        for status, process in runs.items():
            wait_for(lambda: written(f"{status}.pt"), process)
            process.send_signal(signal.SIGINT if status == 130 else signal.SIGTERM)
        for status, process in runs.items():
            got, _, err = finish(process)
            assert got == status and f"--resume --out {status}.pt" in err and "Traceback" not in err, (got, err)
            assert train.read_checkpoint(f"{status}.pt")["progress"]["epoch"] >= 1


def test_checkpoint_survives_a_kill_while_saving():
    """A process that does nothing but save is killed at random moments. All zeros, then all ones, ...: a mixture is a torn file."""
    code = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import train
i = 0
while True:
    model = {str(j): torch.full((200_000,), i) for j in range(8)}
    train.save_checkpoint("out.pt", {"args": vars(train.settings({})), "data": (), "metrics": {}, "model": model})
    i += 1
"""
    with folder():
        rng = random.Random(0)
        for _ in range(3):
            Path("out.pt").unlink(missing_ok=True)
            child = subprocess.Popen([sys.executable, "-c", code, str(HERE)])
            wait_for(lambda: Path("out.pt").exists(), child)
            for _ in range(20):                    # whole at any moment, also while the next one is being written
                time.sleep(0.02 * rng.random())
                model = train.read_checkpoint("out.pt")["model"]
                assert len({int(v) for x in model.values() for v in (x.min(), x.max())}) == 1
            child.kill()
            child.wait()
            model = train.read_checkpoint("out.pt")["model"]
            assert len({int(v) for x in model.values() for v in (x.min(), x.max())}) == 1


def test_loss_that_is_not_finite_stops_the_run():
    with folder():
        status, _, err = command([*TINY, "--epochs", "1", "--batch-size", "160", "--lr", "1e38", "--lr-alpha", "1e38"])     # its only step
        assert status == 1 and "epoch 1, step 1" in err and not Path("out.pt").exists(), err
        status, _, err = command([*TINY, "--epochs", "40", "--lr", "1e37", "--save-minutes", "0"])
        assert status == 1 and "not finite at epoch" in err and err.count("\n") == 1, err
        if Path("out.pt").exists():
            model, _ = train.load_checkpoint("out.pt")
            assert all(torch.isfinite(p).all() for p in model.parameters()) and "last good checkpoint" in err


def test_two_processes_equal_one():
    """torchrun, gloo, float64: gradients of the first step to 1e-10, weights after 20 steps to 1e-9."""
    code = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_default_dtype(torch.float64)
import train
plain, seen = train.backward, []
def spy(forward, groups, *batch):
    stats = plain(forward, groups, *batch)
    if not seen:
        seen.append(1)
        torch.save([p.grad.clone() for g in groups for p in g["params"]], f"grads{train.WORLD}{train.RANK}.pt")
    return stats
train.backward = spy
train.main(sys.argv[2:])
"""
    flags = [*TINY, "--fraction", "0.5", "--augment", "--test-size", "39"]
    with folder():
        one = subprocess.Popen([sys.executable, "-c", code, HERE, *flags, "--out", "one.pt"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert finish(one)[0] == 0
        two = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python", sys.executable, "-c", code,
                                HERE, *flags, "--batch-size", "8", "--out", "two.pt"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        status, out, err = finish(two)
        assert status == 0, err
        assert out.count("\nepoch") == 2, out                                  # only the first process prints
        gradients = [torch.load(f"grads{name}.pt", weights_only=True) for name in ("10", "20", "21")]
        assert apart(gradients[1], gradients[0]) <= 1e-10 and apart(gradients[2], gradients[1]) == 0
        a, b = (train.read_checkpoint(p) for p in ("one.pt", "two.pt"))
        assert apart(b["model"].values(), a["model"].values()) <= 1e-9
        assert a["model"]["siren.first"].dtype == torch.float64
        for x, y in zip(a["metrics"]["epochs"], b["metrics"]["epochs"], strict=True):
            assert abs(x["loss"] - y["loss"]) < 1e-9 and x["test_accuracy"] == y["test_accuracy"] and abs(x["test_psnr"] - y["test_psnr"]) < 1e-4


# ---- bad input ---------------------------------------------------------------------------------------------------------

def refused(argv, *words):
    """Exit status 2, one line that has the words in it, nothing written."""
    def everything():
        return {p: p.is_file() and p.read_bytes() for p in Path().rglob("*")}
    before = everything()
    status, out, err = command(argv)
    assert status == 2 and err.count("\n") == 1 and err.startswith("train.py: error: ") and not out, (argv, status, out, err)
    assert all(str(w) in err for w in words), (argv, words, err)
    assert before == everything(), argv


def test_bad_values():
    with folder():
        for argv, word in [("--steps -3", "--steps"), ("--steps 0", "--steps"), ("--fraction 0", "--fraction"), ("--fraction 1.5", "--fraction"),
                           ("--lr nan", "--lr"), ("--lr inf", "--lr"), ("--w-task -1", "--w-task"), ("--epochs two", "--epochs"), ("--val 1", "--val"),
                           ("--head-dim 5", "--head-dim"), ("--batch-size 5000", "1437"), ("--train-size 9999", "1437"), ("--train-size 10", "--batch-size"),
                           ("--device tpu9", "--device"), ("--device cuda:99", "--device"), ("--precision fp8", "--precision"), ("--out nowhere/out.pt", "nowhere"),
                           ("--out out.txt", ".pt"), ("--no-such-flag", "--no-such-flag"), ("--steps-test 9", "--shared-lr"), ("--fraction 0.001", "pixel"),
                           ("--dataset no/such/folder", "no/such/folder"), ("--eval-only", "--ckpt"), ("--resume", "out.pt"), ("--init-from gone.pt", "gone.pt"),
                           ("--eval-only --ckpt gone.pt", "gone.pt"), ("--dataset", "--dataset"), ("--ckpt out.pt", "--eval-only"),
                           ("--branch column:64", "column"), ("--branch column:-1", "--branch"), ("--branch weight", "--branch"), ("--w-cluster -1", "--w-cluster"), ("--readout -1", "--readout"),
                           ("--device meta", "--device"), ("--width 99999999999999999999 --head-dim 1", "--width"), ("--steps ²", "--steps")]:
            refused(argv.split(), word)
        refused(["--out", ""], "--out")
        Path("dir.pt").mkdir()
        refused(["--out", "dir.pt"], "dir.pt")
        Path("precious.pt").write_text("something else")
        refused(["--out", "precious.pt"], "precious.pt", "overwrite")


def test_bad_data():
    with folder() as here:
        import torchvision

        def no_network(self):
            os.makedirs(self.raw_folder)
            raise RuntimeError("no network\nhere")
        with replaced(torchvision.datasets.MNIST, "download", no_network):
            refused(["--dataset", "mnist", "--data-root", "empty"], "empty", "MNIST/raw", "no network here")
        (here / "one-split" / "train" / "a").mkdir(parents=True)
        refused(["--dataset", "one-split"], "one-split")
        image_folder(here / "one-class", classes="a")
        refused(["--dataset", "one-class", "--batch-size", "4"], "one class")
        shutil.copytree(image_folder(here / "other"), here / "differ")
        (here / "differ" / "test" / "c").rename(here / "differ" / "test" / "d")
        refused(["--dataset", "differ", "--batch-size", "4"], "differ", "c, d")
        (here / "other" / "train" / "b" / "005.png").write_bytes(b"not an image")
        refused(["--dataset", "other", "--size", "8", "--batch-size", "4"], os.path.join("other", "train", "b", "005.png"), "decoded")


def test_broken_image_met_while_streaming_is_named_after_saving():
    with folder() as here:
        image_folder(here / "set")
        whole = (here / "set" / "train" / "b" / "005.png").read_bytes()
        (here / "set" / "train" / "b" / "005.png").write_bytes(whole[:100])
        flags = "--dataset set --size 8 --width 8 --depth 1 --steps 1 --reader-depth 0 --head-dim 4 --batch-size 4 --epochs 1".split()
        with replaced(train, "RESIDENT_BYTES", 0):
            for workers in ("0", "2"):
                status, _, err = command([*flags, "--workers", workers, "--out", f"{workers}.pt"])
                assert status == 2 and err.count("\n") == 1 and "005.png" in err, err
                met = train.read_checkpoint(f"{workers}.pt")["progress"]
            (here / "set" / "train" / "b" / "005.png").write_bytes(whole)
            status, _, err = command(["--resume", "--out", "2.pt"])
            assert status == 0 and met["step"] < 9, err


def test_bad_checkpoints():
    class Evil:
        def __reduce__(self):
            return os.system, ("touch harm",)

    with folder():
        assert command([*TINY, "--epochs", "1"])[0] == 0
        content = torch.load("out.pt", weights_only=True)
        whole = Path("out.pt").read_bytes()
        Path("half.pt").write_bytes(whole[:len(whole) // 2])
        Path("empty.pt").write_bytes(b"")
        torch.save(Evil(), "evil.pt")
        torch.save({"weights": torch.zeros(3)}, "other.pt")
        torch.save(content | {"version": 99}, "future.pt")
        torch.save({k: v for k, v in content.items() if k != "model"}, "part.pt")
        torch.save(content | {"args": content["args"] | {"width": 10 ** 9}}, "huge.pt")
        torch.save(content | {"args": content["args"] | {"size": "big"}}, "typed.pt")
        for name, word in [("half", "truncated"), ("empty", "truncated"), ("evil", "another kind"), ("other", "not a checkpoint of routed-inr"),
                           ("future", "version 99"), ("part", "missing"), ("huge", "damaged"), ("typed", "damaged")]:
            refused(["--eval-only", "--ckpt", f"{name}.pt"], f"{name}.pt", word)
        assert not Path("harm").exists()
        refused(["--eval-only", "--ckpt", "out.pt", "--width", "99"], "--width")
        refused(["--eval-only", "--ckpt", "out.pt", "--steps-test", "5"], "--shared-lr")
        refused(["--eval-only", "--ckpt", "out.pt", "--val", "0.2"], "--val")  # it was trained on those images


def test_bad_input_on_the_command_line():
    with folder():
        for argv in (["--steps", "x"], ["--dataset", "nowhere"], ["--eval-only", "--ckpt", "gone.pt"]):
            status, out, err = finish(start(argv))
            assert status == 2 and err.count("\n") == 1 and err.startswith("train.py: error: ") and not out, (argv, status, out, err)
        assert not list(Path().iterdir())


# ---- diagnostics.py: measures ------------------------------------------------------------------------------------------

def samples(seed=0, n=90, d=3, integers=True):
    """Rows with many ties and duplicates, classes of unequal size; or without ties."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(3, (n, d), generator=g).double() if integers else torch.randn(n, d, generator=g).double()
    return x.float(), torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), n, replacement=True, generator=g)


def brute_neighbors(bank, query, k, skip=None):
    """Sorted by (distance, index), in exact arithmetic on Python numbers."""
    distance = [(sum((a - b) ** 2 for a, b in zip(row, query)), i) for i, row in enumerate(bank.double().tolist()) if i != skip]
    return [i for _, i in sorted(distance)[:k]]


def test_neighbor_measures_against_brute_force():
    for integers in (True, False):
        for shift in (0.0, 100.0):
            x, labels = samples(0, integers=integers)
            y, queries = samples(1, 40, integers=integers)
            x, y = x + shift, y + shift
            for k in (1, 4, 10):
                neighbors = [brute_neighbors(x, q, k) for q in y.double().tolist()]
                assert diagnostics.nearest(x, y, k).tolist() == neighbors
                right = 0
                for rows, label in zip(neighbors, queries.tolist()):
                    votes = [labels[rows].tolist().count(c) for c in range(3)]
                    right += votes.index(max(votes)) == label
                assert diagnostics.knn_accuracy(x, labels, y, queries, k) == right / 40
                own = [brute_neighbors(x, q, k, skip=i) for i, q in enumerate(x.double().tolist())]
                share = np.mean([np.mean([int(labels[j] == labels[i]) for j in rows]) for i, rows in enumerate(own)])
                assert abs(diagnostics.neighbor_purity(x, labels, k) - share) < 1e-12
    assert diagnostics.vote(torch.tensor([[2, 1, 1, 2], [0, 2, 2, 1]]), 3).tolist() == [1, 2]
    same = torch.ones(6, 4)        # constant features: all distances are 0, the lowest indices win
    assert diagnostics.nearest(same, None, 2).tolist() == [[1, 2], [0, 2]] + [[0, 1]] * 4


def test_neighbors_do_not_depend_on_the_block_size():
    x, _ = samples(0, 200, 5, integers=False)
    with replaced(diagnostics, "BLOCK_BYTES", 20_000):
        small = diagnostics.nearest(x, None, 7), diagnostics.silhouette(x, torch.arange(200) % 4)
    assert torch.equal(small[0], diagnostics.nearest(x, None, 7))
    assert abs(small[1] - diagnostics.silhouette(x, torch.arange(200) % 4)) < 1e-9


def test_class_measures_against_brute_force():
    for integers in (True, False):
        x, labels = samples(2, integers=integers)
        y, queries = samples(3, 40, integers=integers)
        X, L = x.double().numpy(), labels.numpy()
        scores = []
        for i in range(len(X)):
            d = np.sqrt(((X - X[i]) ** 2).sum(1))
            others = [d[(L == L[i]) & (np.arange(len(X)) != i)].mean(), min(d[L == c].mean() for c in set(L) - {L[i]})]
            scores.append((others[1] - others[0]) / max(others))
        assert abs(diagnostics.silhouette(x, labels) - np.mean(scores)) < 1e-5
        means = np.stack([X[L == c].mean(0) for c in range(3)])
        between = sum((L == c).sum() * ((means[c] - X.mean(0)) ** 2).sum() for c in range(3))
        assert abs(diagnostics.fisher_ratio(x, labels) - between / ((X - means[L]) ** 2).sum()) < 1e-10
        predicted = [int(np.argmin(((means - q) ** 2).sum(1))) for q in y.double().numpy()]
        assert diagnostics.nearest_mean_accuracy(x, labels, y, queries) == np.mean(predicted == queries.numpy())


def test_measures_by_hand_and_invariance():
    x, labels = torch.tensor([[0.0], [1.0], [10.0], [12.0]]), torch.tensor([0, 0, 1, 1])
    # a = 1, 1, 2, 2; b = 11, 10, 9.5, 11.5
    assert abs(diagnostics.silhouette(x, labels) - np.mean([10 / 11, 9 / 10, 7.5 / 9.5, 9.5 / 11.5])) < 1e-6
    # means 0.5 and 11, overall 5.75: between 4 * 5.25^2, within 2 * 0.25 + 2 * 1
    assert abs(diagnostics.fisher_ratio(x, labels) - 4 * 5.25 ** 2 / 2.5) < 1e-9
    assert diagnostics.neighbor_purity(x, labels, 1) == 1 and diagnostics.neighbor_purity(x, labels, 3) == 1 / 3
    assert diagnostics.silhouette(torch.ones(4, 2), labels) == 0 and diagnostics.fisher_ratio(torch.ones(4, 2), labels) == 0
    x, labels = samples(4, 60, 4, integers=False)
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
    for moved in (x @ rotation, x + 3, 500 * x):   # phi, phi - theta and lambda (phi - theta + beta) differ by shift and scale
        for measure in (diagnostics.neighbor_purity, diagnostics.silhouette, diagnostics.fisher_ratio):
            assert abs(measure(moved, labels) - measure(x, labels)) < 1e-5
    for wrong in (lambda: diagnostics.silhouette(x, torch.zeros(60, dtype=torch.long)), lambda: diagnostics.neighbor_purity(x, labels, 60),
                  lambda: diagnostics.silhouette(x * math.nan, labels), lambda: diagnostics.silhouette(x[0], labels)):
        try:
            wrong()
        except ValueError:
            continue
        raise AssertionError("bad input must be a ValueError")


def test_measures_on_odd_input():
    x, labels = samples(0)
    y, queries = samples(1, 30)
    for knn in (diagnostics.knn_accuracy, diagnostics.nearest_mean_accuracy, diagnostics.linear_probe):
        expected = knn(x, labels, y, queries)
        for other in (x.long(), x.double(), x.half(), x.clone().requires_grad_()):
            assert abs(knn(other, labels.int(), y, queries.to(torch.uint8)) - expected) < 0.04
        assert knn(x, labels * 10 ** 9 + 5, y, queries * 10 ** 9 + 5) == expected      # any integers from 0
    pair = (diagnostics.knn_accuracy, diagnostics.nearest_mean_accuracy, diagnostics.linear_probe)
    alone = (diagnostics.neighbor_purity, diagnostics.silhouette, diagnostics.fisher_ratio)
    bad = [(x * 1e20, labels), (x[:, :0], labels), (x, labels - 1), (x, labels.float()), (x * math.nan, labels), (x[:0], labels[:0]), (x, labels[:-1]), (x[0], labels)]
    calls = [lambda f=f, a=a: f(*a, y, queries) for f in pair for a in bad] + [lambda f=f, a=a: f(*a) for f in alone for a in bad]
    calls += [lambda: diagnostics.knn_accuracy(x, labels, y[:, :1], queries), lambda: diagnostics.knn_accuracy(x, labels, y, queries, 0), lambda: diagnostics.neighbor_purity(x, labels, 0),
              lambda: diagnostics.linear_probe(x, labels * 0, y, queries), lambda: diagnostics.silhouette(x, labels * 0)]
    for i, call in enumerate(calls):
        try:
            call()
        except ValueError:
            continue
        raise AssertionError(f"call {i} gave a value")


def test_linear_probe_is_at_its_optimum():
    """The gradient of the regularised loss, by autograd at the solution, is 0, on standardised features, primal and dual alike."""
    g = torch.Generator().manual_seed(0)
    for n, d in ((60, 5), (40, 90)):
        x, labels = torch.randn(n, d, generator=g).double() * 3 + 1, torch.randint(3, (n,), generator=g)
        z = (x - x.mean(0)) / x.std(0, correction=0)
        with replaced(diagnostics, "PROBE_LAMBDAS", (0.01,)):
            raw = diagnostics.probe(lambda: x.split(40), labels, 3)
        W = torch.cat([raw[:-1] * x.std(0, correction=0)[:, None], (raw[-1] + x.mean(0) @ raw[:-1])[None]]).requires_grad_()     # for z
        loss = F.cross_entropy(z @ W[:-1] + W[-1], labels) + 0.01 * d / 2 * (W[:-1] ** 2).sum()
        assert torch.autograd.grad(loss, W)[0].norm() < 2e-4 * max(1, float(W.detach().norm()))
        for penalty in (1.0, 0.01):
            W = diagnostics.logistic(z, labels, 3, penalty).requires_grad_()
            loss = F.cross_entropy(z @ W[:-1] + W[-1], labels) + penalty / 2 * (W[:-1] ** 2).sum()
            assert torch.autograd.grad(loss, W)[0].norm() < 1e-6 * max(1, float(W.detach().norm()))
        if d > n:                  # the Gram matrix's Cholesky factor in place of the features: the same logits
            L = diagnostics.factor(z @ z.T)
            V = diagnostics.logistic(L, labels, 3, penalty)
            assert (L @ V[:-1] + V[-1] - (z @ W[:-1] + W[-1])).abs().max() < 1e-4
    far = torch.randint(3, (200,), generator=g)
    x = torch.randn(200, 4, generator=g) + 8 * F.one_hot(far, 4)
    assert diagnostics.linear_probe(x[:150], far[:150], x[150:], far[150:]) == 1
    wide = torch.cat([x, torch.randn(200, 160, generator=g)], 1)
    assert diagnostics.linear_probe(wide[:150], far[:150], wide[150:], far[150:]) > 0.6
    assert diagnostics.linear_probe(x[:150] * 0 + 1, far[:150], x[150:], far[150:]) <= 0.6      # constant features


# ---- diagnostics.py: statistics ----------------------------------------------------------------------------------------

def test_paired_bootstrap_covers_and_knows_ties():
    a = torch.tensor([1.0] * 70 + [0.0] * 30)
    assert diagnostics.paired_bootstrap(a, a) == (0, 0, 0)
    mean, low, high = diagnostics.paired_bootstrap(a, torch.zeros(100))
    assert abs(mean - 0.7) < 1e-12 and abs(low - (0.7 - 1.96 * 0.0458)) < 0.02 and abs(high - (0.7 + 1.96 * 0.0458)) < 0.02   # sqrt(0.7 * 0.3 / 100)
    assert diagnostics.paired_bootstrap(a, 1 - a, seed=3) == diagnostics.paired_bootstrap(a, 1 - a, seed=3)
    g, covered = torch.Generator().manual_seed(0), 0
    for repeat in range(200):      # a ratio of means, truth 2
        x = 1 + torch.rand(100, generator=g)
        value, low, high = diagnostics.bootstrap(torch.stack([2 * x + torch.randn(100, generator=g), x], 1), lambda m: m[..., 0] / m[..., 1], seed=repeat, draws=400)
        covered += low <= 2 <= high
    assert 0.88 < covered / 200 < 0.99


def test_statistics_against_brute_force():
    g = torch.Generator().manual_seed(1)
    score, right = torch.randint(6, (80,), generator=g).float(), torch.rand(80, generator=g) < 0.6
    wins = [float(a > b) + 0.5 * float(a == b) for a in score[right] for b in score[~right]]
    value, low, high = diagnostics.auroc(score, right)
    assert abs(value - np.mean(wins)) < 1e-12 and low < value < high
    assert diagnostics.auroc(score, right | True) is None
    mean, low, high = diagnostics.t_interval([1.0, 2.0, 3.0])
    assert mean == 2 and abs(high - (2 + 4.30265 / math.sqrt(3))) < 1e-3 and abs(low + high - 4) < 1e-9 and diagnostics.t_interval([1.0]) is None
    assert abs(diagnostics.t_interval([0.0, 2.0])[2] - (1 + 12.7062)) < 0.01
    assert diagnostics.ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1, 3.5, 2]
    x, y = torch.randn(12, generator=g), torch.randn(12, generator=g)
    result = diagnostics.correlations({"a": x.tolist(), "b": (x + y).tolist()}, y.tolist(), list(range(12)))
    assert abs(result["pearson"]["b"][0] - np.corrcoef(x + y, y)[0, 1]) < 1e-6
    place = lambda v: np.argsort(np.argsort(v))
    assert abs(result["spearman"]["a"][0] - np.corrcoef(place(x), place(y))[0, 1]) < 1e-6
    assert abs(result["pearson"]["last - first"][0] - (result["pearson"]["b"][0] - result["pearson"]["a"][0])) < 1e-12
    assert diagnostics.correlations({"a": [1, 2, 3, 4]}, [1, 2, 3, 4], list("abcd")) is None
    many = [diagnostics.correlations({"a": x.repeat(9).tolist()}, y.repeat(9).tolist(), settings)["pearson"]["a"] for settings in (list(range(12)) * 9, list(range(108)))]
    assert many[0][2] - many[0][1] > 2 * (many[1][2] - many[1][1])             # nine seeds of a setting are no nine settings
    few = diagnostics.correlations({"a": x.tolist()}, y.tolist(), [i % 4 for i in range(12)])["pearson"]       # four settings: no interval
    assert list(few) == ["a"] and few["a"][1:] == (None, None) and diagnostics.side(few["a"], -2.0) == 0 and "no interval" in diagnostics.span(few["a"])
    spread = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(50, 4)        # all of the variance is between the repeats
    value, low, high = diagnostics.bootstrap(spread, diagnostics.over_repeats())
    assert value == 1.5 and low < 0.8 and high > 2.2
    noise = torch.rand(400, 60, generator=g)       # the best of 60 equal candidates is not flattered
    picked, choices = diagnostics.crossed(noise)
    assert abs(float(picked.mean()) - 0.5) < 0.05 and float(noise.mean(0).max()) > 0.525
    better = noise.clone()
    better[:, 7] += 1
    assert diagnostics.crossed(better)[1] == [7, 7]
    x = torch.randn(40, 6, generator=g) @ torch.randn(6, 6, generator=g)
    mean, components, variances = diagnostics.principal(x)
    cut = mean + (x - mean) @ components[:, :2] @ components[:, :2].T
    U, s, V = np.linalg.svd((x - x.mean(0)).numpy(), full_matrices=False)
    assert np.abs(cut.numpy() - (x.mean(0).numpy() + (U[:, :2] * s[:2]) @ V[:2])).max() < 1e-4 and abs(float(variances[0]) - s[0] ** 2 / 40) < 1e-4
    assert abs(diagnostics.effective_rank(torch.ones(5)) - 5) < 1e-6
    for shape in ((30, 50), (50, 30)):
        x = torch.randn(*shape, generator=g).double()
        mean, V, variances = diagnostics.principal(x)
        assert apart([V.T @ V], [torch.eye(V.shape[1])]) < 1e-9 and apart([mean + (x - mean) @ V @ V.T], [x]) < 1e-9
        assert apart([variances], [torch.linalg.svdvals(x - mean)[:V.shape[1]] ** 2 / shape[0]]) < 1e-9


def test_donors():
    labels = torch.randint(4, (90,), generator=torch.Generator().manual_seed(0))
    labels[0] = 9                  # alone in its class
    rows = torch.arange(90)
    order = diagnostics.donors(labels, "any", 0)
    assert (order != rows).all() and torch.equal(order.sort().values, rows)
    same = diagnostics.donors(labels, "same", 0)
    assert (labels[same] == labels).all() and (same[1:] != rows[1:]).all() and same[0] == 0
    other = diagnostics.donors(labels, "other", 0)
    assert (labels[other] != labels).all() and not torch.equal(other, diagnostics.donors(labels, "other", 1))


# ---- diagnostics.py: planted truths ------------------------------------------------------------------------------------

def test_measuring_in_passes_changes_nothing():
    """Blocks, chunks and weights that are fitted again at each pass give what the measures give on whole tensors."""
    x, labels = samples(5, 150, 6, integers=False)
    y, queries = samples(6, 90, 6, integers=False)
    f = {"a": lambda b: b.tokens.flatten(1), "b": lambda b: b.tokens[:, 0]}
    with replaced(diagnostics, "ROWS", 16):
        given = diagnostics.measure(f, diagnostics.Fits.given(x.view(-1, 2, 3), labels), diagnostics.Fits.given(y.view(-1, 2, 3), queries), diagnostics.Fits.given(x.view(-1, 2, 3), labels))
        bits = [train.Images(list("abc"), l, (torch.arange(len(l)) + o).to(torch.uint8).view(-1, 1, 1, 1)) for l, o in ((labels, 0), (queries, 150))]
        both = torch.cat([x, y]).view(-1, 2, 3)
        fit = lambda images, block: both[((images.flatten() + 1) * 127.5).round().long()]
        again = [diagnostics.Fits(fit, data, keep) for data, keep in zip(bits, (0, 700))]
        refitted = diagnostics.measure(f, *again, again[0])
        assert again[1].kept and len(again[1].kept) < 6 and not again[0].kept
        whole, rows = diagnostics.Fits.given(x.view(-1, 2, 3), labels), torch.randperm(150, generator=torch.Generator().manual_seed(0))[:70]
        part, copy_ = (diagnostics.measure(f, bank, diagnostics.Fits.given(y.view(-1, 2, 3), queries)) for bank in (diagnostics.Part(whole, rows), whole.take(rows.sort().values)))
        assert all(torch.equal(part[name][key], copy_[name][key]) for name in f for key in ("neighbors", "knn1", "knn10", "nearest_mean", "purity"))
    for name, (bank, own) in {"a": (x, y), "b": (x[:, :3], y[:, :3])}.items():
        r = given[name]
        assert torch.equal(r["neighbors"], diagnostics.nearest(bank, own, 10))
        assert abs(float((r["knn10"] == queries).double().mean()) - diagnostics.knn_accuracy(bank, labels, own, queries)) < 1e-12
        assert abs(float(r["purity"].mean()) - diagnostics.neighbor_purity(own, queries)) < 1e-12
        assert abs(float(r["silhouette"].mean()) - diagnostics.silhouette(own, queries)) < 1e-4
        assert abs(r["fisher"] - diagnostics.fisher_ratio(own, queries)) < 1e-6
        assert float((r["nearest_mean"] == queries).double().mean()) == diagnostics.nearest_mean_accuracy(bank, labels, own, queries)
        assert float((r["probe"] == queries).double().mean()) == diagnostics.linear_probe(bank, labels, own, queries)
        for key in r:
            assert torch.equal(torch.as_tensor(r[key]), torch.as_tensor(refitted[name][key])), key


def test_coordinates_of_the_weights():
    """Euclidean measures of phi, phi - theta and lambda (phi - theta + beta) agree, so that only cosine ones are listed apart;
    these do not depend on an image's scale."""
    g = torch.Generator().manual_seed(0)
    x, theta, labels = torch.randn(120, 4, 5, generator=g), torch.randn(4, 5, generator=g), torch.randint(3, (120,), generator=g)
    bank = diagnostics.Fits.given(x, labels)
    named = {name.strip(): f for name, f in diagnostics.weight_coordinates(bank, 2, theta, 0 * theta).items()}
    assert "pixels" not in named and "first layer" not in named        # there are none
    block = bank.kept[0]
    plain = diagnostics.nearest(named["phi - theta"](block), None, 10)
    for moved in (x + theta, 500 * (x + theta)):
        assert torch.equal(diagnostics.nearest(moved.flatten(1), None, 10), plain)
    cosine = named["cosine of phi - theta"]
    scaled = block._replace(tokens=x * torch.rand(120, 1, 1, generator=g).add(0.1))
    assert apart([cosine(scaled)], [cosine(block)]) < 1e-6 and apart([named["cosine of phi"](block)], [F.normalize((x + theta).flatten(1), dim=1)]) < 1e-6
    z = named["standardised per weight"](block)
    assert z.mean(0).abs().max() < 1e-5 and (z.std(0, correction=0) - 1).abs().max() < 1e-5
    assert torch.equal(named["bias column"](block), x[..., 4]) and torch.equal(named["hidden layer 2"](block), x[:, 2:].flatten(1))
    assert torch.equal(named["all but the bias column"](block), x[..., :4].flatten(1))


def planted(seed=0, clusters=0.0, routed=1.0, n=300):
    """One coordinate system and a reader: how far classes lie apart, and how often the reader is right beyond chance."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (2 * n,), generator=g)
    x = (torch.randn(2 * n, 6, generator=g) + clusters * F.one_hot(labels, 6)).view(-1, 2, 3)
    told = torch.rand(n, generator=g) < routed
    reader = torch.where(told, labels[n:], torch.randint(4, (n,), generator=g))
    bank, queries = diagnostics.Fits.given(x[:n], labels[:n]), diagnostics.Fits.given(x[n:], labels[n:])
    coordinates = diagnostics.weight_coordinates(bank)
    return diagnostics.clustering(coordinates, bank, queries, reader), lambda: diagnostics.clustering(coordinates, bank, queries, reader, whole_bank=False)


def test_clustering_verdict_on_planted_truths():
    (routed, partial), (clustered, _), (random_labels, _) = planted(clusters=0, routed=0.9), planted(clusters=8, routed=0.9), planted(clusters=0, routed=0)
    assert routed["gap"][1] > 0.4 and routed["verdict"] == "first half holds" and partial()["verdict"] == "not decided here"
    assert clustered["rows"][0]["knn10"] > 0.99 and clustered["rows"][0]["purity"] > 0.99 and clustered["verdict"] == "refuted"
    assert abs(random_labels["rows"][0]["knn10"] - 0.25) < 0.1 and abs(random_labels["reader"] - 0.25) < 0.1 and random_labels["verdict"] != "first half holds"
    for result in (routed, clustered):             # shuffled labels are at chance whatever was planted
        assert abs(result["rows"][0]["knn10_shuffled"] - 0.25) < 0.12 and result["rows"][0]["knn10"] == result["knn10_by_bank"]["300"]


def token_flow_of(kind, n=400, seed=0):
    """Two tokens u, v of 30 features. "input": a class vector in each; "attention": the class is the signs of u_0 v_0 and u_1 v_1, which
    only something that compares tokens can see; "random": nothing. The planted reader adds a class vector in its second block."""
    g = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randn(2 * n, 2, 30, generator=g), torch.randint(4, (2 * n,), generator=g)
    signs = lambda tokens: ((tokens[:, 0, :2] * tokens[:, 1, :2] > 0) * torch.tensor([1, 2])).sum(1)
    if "attention" in kind:
        labels = signs(tokens)
    elif kind == "input":
        tokens = tokens + 6 * F.one_hot(labels, 30)[:, None]

    def read(tokens, flow=False, trained=True):
        guess = tokens.mean(1)[:, :4].argmax(1) if kind == "input" else signs(tokens)
        found = 20 * F.one_hot(guess, 30)[:, None] if trained else 0
        logits = F.one_hot(guess, 4).float()
        first = found if kind == "first attention" else 0
        return (logits, [tokens, tokens + first, tokens + first, tokens + found, tokens + found]) if flow else logits
    return diagnostics.token_flow(read, lambda t, flow: read(t, flow, False), *(diagnostics.Fits.given(x, l) for x, l in ((tokens[:n], labels[:n]), (tokens[n:], labels[n:]))))


def test_token_flow_on_planted_truths():
    late, early, nothing = (token_flow_of(kind) for kind in ("attention", "input", "random"))
    assert max(late["rows"][0]["pooled_knn10"], late["rows"][0]["flattened_knn10"]) < 0.4 and late["rows"][-1]["pooled_knn10"] > 0.99 and late["rows"][-1]["unseen_knn10"] > 0.99
    assert late["verdict"] == "second half holds" and late["rise"][0] > 0.5 and [row["stage"] for row in late["rows"]][-2:] == ["attention 2", "MLP 2"]
    assert late["rows"][-1]["untrained_pooled_knn10"] == late["rows"][0]["pooled_knn10"]
    assert early["rows"][0]["pooled_knn10"] > 0.99 and early["verdict"] != "second half holds"
    assert token_flow_of("first attention")["verdict"] == "refuted"
    assert nothing["verdict"] == "not decided here" and abs(nothing["rows"][-1]["pooled_knn10"] - 0.25) < 0.1


def test_knock_outs_by_hand():
    torch.manual_seed(0)
    reader = Reader(6, 8, 4, depth=2, head_dim=4)
    for p in reader.parameters():
        torch.nn.init.normal_(p, std=0.6)
    torch.nn.init.zeros_(reader.head.bias)
    torch.nn.init.zeros_(reader.beta)
    tokens, known = torch.randn(200, 6, 9) / 100, torch.randn(70, 6, 9) / 100
    labels = reader(tokens).argmax(1)
    rows = {(r["replaced"], r["span"], r["block"]): r["loss"][0] for r in diagnostics.knock_outs(reader, tokens, labels, known)}
    assert len(rows) == 2 * (4 * 2 + 2)
    _, states = reader(known, flow=True)
    _, mine = reader(tokens, flow=True)

    def loss(x):
        return float((reader.head(x.mean(1)).argmax(1) != labels).double().mean())

    rest = lambda x, start: x if start == 4 else rest(x + reader.blocks[start](x), start + 1)
    assert abs(rows["MLP: its mean", "alone", 2] - loss(mine[3] + reader.blocks[3](states[3]).mean(0))) < 1e-9
    assert abs(rows["attention: nothing", "alone", 1] - loss(rest(mine[0], 1))) < 1e-9
    both = rest(mine[0] + reader.blocks[0](states[0]).mean(0), 1)      # attention 1 at its mean; then attention 2 too
    x = mine[0] + reader.blocks[0](states[0]).mean(0)
    x = x + reader.blocks[1](x)
    x = x + reader.blocks[2](states[2]).mean(0)
    assert abs(rows["attention: its mean", "from here on", 1] - loss(x + reader.blocks[3](x))) < 1e-9
    assert abs(rows["attention: its mean", "alone", 1] - loss(both)) < 1e-9
    attention, x = reader.blocks[2], mine[2]
    v = attention.qkv(attention.norm(x))[..., 16:]                     # each token's own value
    assert abs(rows["attention: to itself", "alone", 2] - loss(rest(x + attention.layer_scale * attention.out(v), 3))) < 1e-9
    A = diagnostics.attention_map(attention, states[2])
    assert apart([A.sum(-1)], [torch.ones(70, 2, 6)]) < 1e-6
    v = attention.qkv(attention.norm(states[2]))[..., 16:].unflatten(-1, (2, 4)).transpose(1, 2)
    assert apart([attention.layer_scale * attention.out((A @ v).transpose(1, 2).flatten(2))], [attention(states[2])]) < 1e-5
    v = attention.qkv(attention.norm(x))[..., 16:].unflatten(-1, (2, 4)).transpose(1, 2)
    averaged = attention.layer_scale * attention.out((A.mean(0) @ v).transpose(1, 2).flatten(2))
    assert abs(rows["attention: mean map", "alone", 2] - loss(rest(x + averaged, 3))) < 1e-9
    assert max(rows.values()) > 0.1


def bias_route_of(where, n=600, seed=0, tokens_=12, width=20):
    """Tokens whose class is planted, and a reader that reads it there: "bias", "column" (number 3), "energy" (every column, as far
    as its energy goes), "joint" (the sign of a product of two bias entries), "nowhere" (random labels)."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (2 * n,), generator=g)
    scale = torch.linspace(0.5, 1.5, width + 1)
    scale[-1] = 1.0
    x = torch.randn(2 * n, tokens_, width + 1, generator=g) * scale
    told = torch.randn(4, tokens_, width + 1, generator=g) * scale
    if where == "joint":
        labels = (x[:, 0, -1] * x[:, 1, -1] > 0).long()
        read = lambda t: torch.stack([-t[:, 0, -1] * t[:, 1, -1], t[:, 0, -1] * t[:, 1, -1]], 1)
    else:
        used = {"bias": [width], "column": [3], "energy": range(width + 1), "nowhere": range(width + 1)}[where]
        mask = torch.zeros(width + 1).index_fill_(0, torch.tensor(list(used)), 0.35 if where == "energy" else 2.0)
        if where != "nowhere":
            x = x + (told * mask)[labels]
        y = told * mask / scale ** 2
        read = lambda t: torch.einsum("ntf,ctf->nc", t, y) - ((told * mask) * y).sum((1, 2)) / 2
    parts = diagnostics.controls(x[:n], torch.eye(width + 1)[:width], torch.ones(width), repeats=3)
    result = diagnostics.bias_route(read, x[n:], labels[n:], x[:n], parts, repeats=3)
    return result, {row["name"]: row["loss"][0] for row in result["rows"]}


def test_bias_route_on_planted_truths():
    bias, loss = bias_route_of("bias")
    assert bias["reader"] > 0.95 and bias["verdict"] == "supported" and loss["another image's"] > 0.5 and loss["all but the bias column"] > 0.5
    assert abs(loss["only the bias column"]) < 0.02 and bias["single_columns"]["bias_percentile"] == 100 and bias["moved_to_donor"][0] > 0.8
    assert all(abs(row["loss"][0]) < 0.02 for row in bias["rows"] if row["group"] in ("control", "low-rank control")) and abs(loss["another image's of the same class"]) < 0.02
    full = max((row for row in bias["rows"] if row["group"] == "rank"), key=lambda row: row["rank"])
    assert loss["bias column, rank 0"] > 0.5 and abs(loss["bias column, rank 4"]) < 0.03 and abs(full["loss"][0]) < 0.01
    column, loss = bias_route_of("column")
    assert column["reader"] > 0.95 and column["verdict"] == "refuted" and loss["another image's"] == 0 and max(column["single_columns"]["losses"].values()) > 0.5
    energy, loss = bias_route_of("energy")
    assert energy["reader"] > 0.8 and energy["verdict"] != "supported" and loss["another image's"] < 0.15
    joint, loss = bias_route_of("joint")
    assert joint["reader"] == 1 and joint["verdict"] == "supported" and loss["each entry another image's"] > 0.4 and loss["Gaussian, same mean and variance"] > 0.4
    assert loss["another image's of the same class"] == 0 and joint["moved_to_donor"][0] == 1 and loss["its negative"] == 0
    nothing, _ = bias_route_of("nowhere")
    assert abs(nothing["reader"] - 0.25) < 0.08 and nothing["verdict"] == "not decided here"


def test_controls_hold_the_energy():
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(300, 5, 13, generator=g) * torch.linspace(0.3, 2, 13), torch.randn(12, 13, generator=g)
    parts = diagnostics.controls(x, W, torch.linspace(0, 1, 12), repeats=4)
    energy = lambda z: float((z - z.mean(0)).square().sum() / len(z))
    for where, M in (("before", torch.eye(13)), ("after", W)):
        sets = parts[f"random columns, energy matched {where} the input map"]
        assert len(sets) == 4
        for U in sets:
            assert energy(x @ U @ U.T @ M.T) >= energy(x[..., -1:] @ M.T[-1:]) * 0.999 and U[-1].abs().max() == 0
            fewer = U[:, :-1]
            assert U.shape[1] == 1 or energy(x @ fewer @ fewer.T @ M.T) < energy(x[..., -1:] @ M.T[-1:])      # and no more columns than needed
    found = diagnostics.energies(x, parts, W)
    for name, bases in parts.items():
        for ratio, M in zip(found[name], (torch.eye(13), W)):
            assert abs(ratio - np.mean([energy(x @ U @ U.T @ M.T) for U in bases]) / energy(x[..., -1:] @ M.T[-1:])) < 1e-3 * ratio, name
    assert parts["column of highest energy"][0].argmax() == 11 and parts["most constant column"][0].argmax() == 11
    v = parts["leading direction"][0][:, 0]
    assert v[-1] == 0 and energy(x @ v[:, None]) >= max(energy(x[..., j:j + 1]) for j in range(12)) - 1e-3
    siren = Siren(2, 3, width=6, depth=1)
    torch.nn.init.constant_(siren.first[2, :2], 0.0)
    torch.nn.init.constant_(siren.first[2, 2:], 0.1)                   # this neuron does not see the pixel's place
    assert int(diagnostics.constancy(siren.requires_grad_(False), coordinate_grid(8, 8)).argmax()) == 2
    y = diagnostics.put(x[:5], x[5:10] @ parts["bias column"][0], parts["bias column"][0])
    assert apart([y[..., -1]], [x[5:10, :, -1]]) < 1e-6 and apart([y[..., :-1]], [x[:5, :, :-1]]) < 1e-6


def test_content_on_planted_truths():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (500,), generator=g)
    images = 0.25 * torch.randn(500, 3, 6, 6, generator=g) + 0.6 * (F.one_hot(labels, 3) - 0.5)[:, :, None, None]

    def fit(images, block=0, column=-1):
        tokens = images.flatten(2)[:, :, :9].clone()                   # pixels, in no relation to the class once the mean is out
        tokens -= images.mean((2, 3))[:, :, None]
        tokens[:, :, column] = images.mean((2, 3))
        return tokens

    for column, name in ((-1, "bias column"), (2, "column of highest energy")):
        tokens = fit(images, column=column)
        known, test = (diagnostics.Block(0, images[s], labels[s], tokens[s], tokens[s][:, :0]) for s in (slice(250), slice(250, 500)))
        read = lambda t: t[:, :, column]
        parts = diagnostics.controls(known.tokens, repeats=2)
        result = diagnostics.content(read, lambda x, b: fit(x, b, column), test, known, parts)
        other, same = result["mediation"]
        part = other["parts"]
        assert other["total"][0] > 0.5 and abs(same["total"][0]) < 0.05 and same["parts"]["bias column"]["share"] is None
        expected = float(column == -1)
        assert abs(part["bias column"]["share"][0] - expected) < 0.05 and abs(part["bias column"]["share_restored"][0] - expected) < 0.05
        assert abs(part["column of highest energy"]["share"][0] - (1 - expected)) < 0.05
        r2 = diagnostics.at_rank(result["regressions"][name], 4)
        assert all(r2[f"mean {c}"][0] > 0.999 for c in ("red", "green", "blue")) and r2["contrast"][0] < 0.5
        assert result["regressions"][name]["from_facts"][0][0] > 0.999
    # a fit that hangs on the block an image is in: with each image its own donor there is no effect, whatever tokens came before
    noisy = lambda x, b: fit(x, b) + torch.randn(len(x), 3, 9, generator=torch.Generator().manual_seed(b))
    with replaced(diagnostics, "donors", lambda labels, *key: torch.arange(len(labels))):
        assert all(m["total"] == (0, 0, 0) for m in diagnostics.content(lambda t: t[:, :, -1], noisy, test, known, parts)["mediation"])
    x, y = torch.randn(100, 3, generator=g), torch.randn(100, 2, generator=g)
    y[:, 1] = 2.0
    fitted = np.linalg.lstsq(np.c_[x[:60], np.ones(60)], y[:60, 0].numpy(), rcond=None)[0]
    error = y[60:, 0].numpy() - np.c_[x[60:], np.ones(40)] @ fitted
    r2 = diagnostics.regression(x[:60], y[:60], x[60:], y[60:])
    assert abs(r2[0][0] - (1 - (error ** 2).sum() / ((y[60:, 0] - y[60:, 0].mean()) ** 2).sum())) < 1e-5 and r2[0][1] < r2[0][0] < r2[0][2] and r2[1] is None
    assert all(torch.isfinite(v).all() for size in (1, 2, 3) for v in diagnostics.image_facts(torch.randn(5, 3, size, size)).values())
    ramp = torch.linspace(-1, 1, 8).expand(1, 3, 8, 8)
    facts = diagnostics.image_facts(torch.cat([ramp, ramp.mT]))
    assert abs(float(facts["mean red"][0])) < 1e-6 and float(facts["left - right"][0]) < -1 and abs(float(facts["top - bottom"][0])) < 1e-6
    assert abs(float(facts["left - right"][0] - facts["top - bottom"][1])) < 1e-6 and abs(float(facts["cosine, 0 down 1 across"][0] - facts["cosine, 1 down 0 across"][1])) < 1e-6


def test_comparison_across_models():
    g = torch.Generator().manual_seed(0)

    def population(link, gap=0.1, n=5, seeds=3, late=0.05, margin=0.05):
        found = []
        for i in range(n):
            for seed in range(seeds):
                strength = i / n + 0.02 * float(torch.randn(1, generator=g))
                reader = 0.5 + 0.1 * strength
                purity = strength if link else float(torch.rand(1, generator=g))
                found.append(dict(name=f"{i}-{seed}", label=f"w_task {i}", seed=seed, w_task=float(i), reader=reader, architecture="one", setting=str(i), apart_from_w_task=str(seed), purity=purity,
                                  whole_bank=True, gap=gap + 0.001 * seed, late=late + 0.001 * seed, rise=0.2 + 0.001 * seed, margin=margin + 0.001 * seed,
                                  permuted=0.1, stages={"input tokens": (0.1 * float(torch.rand(1, generator=g)), 0.3), "MLP 1": (strength, strength)}))
        return found

    tracked, apart_ = diagnostics.across(population(link=True)), diagnostics.across(population(link=False, n=8))
    verdicts = lambda result, claim: {v.split(": ")[1].split(".")[0] for v in result["verdicts"] if v.startswith(claim)}
    assert tracked["correlations"]["purity"]["spearman"]["phi - theta"][0] > 0.9 and verdicts(tracked, "C1") == {"refuted"}
    assert verdicts(apart_, "C1") <= {"supported", "not decided here"} and verdicts(apart_, "C1")
    assert apart_["correlations"]["stage purity"]["spearman"]["MLP 1"][0] > 0.9 and verdicts(apart_, "C2") == {"supported"}
    assert verdicts(tracked, "C3") == {"supported"}
    assert verdicts(diagnostics.across(population(True, margin=-0.1)), "C3") == {"refuted"} == verdicts(diagnostics.across(population(False, n=8, late=-0.05)), "C2")
    assert len(tracked["pairs"]) == 4 and tracked["pairs"][0]["n"] == 3
    few = diagnostics.across(population(True, n=1))
    assert few["correlations"]["purity"] is None and "too few" in few["verdicts"][0] and "not decided" in few["verdicts"][0]
    alone = diagnostics.across(population(True, n=1, seeds=2))
    assert "No setting has three seeds" in alone["verdicts"][0]
    mixed = population(True)
    mixed[0]["architecture"] = "two"
    assert diagnostics.across(mixed)["models"] == 14 and diagnostics.across(mixed)["others"] == 1


def test_diagnostics_command():
    def run(argv):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                diagnostics.main(argv)
                return 0, out.getvalue(), err.getvalue()
            except SystemExit as error:
                return error.code, out.getvalue(), err.getvalue()
    with folder() as here:
        assert command([*TINY, "--fraction", "0.5"])[0] == 0 and command([*TINY, "--fraction", "0.5", "--w-task", "0", "--out", "wt.pt"])[0] == 0
        status, out, err = run(["--ckpt", "out.pt", "--samples", "80", "--repeats", "2"])
        assert status == 0 and all(f"\n{claim} " in out for claim in ("C1", "C2", "C3")), err
        assert all(len(line) <= 100 for line in out.splitlines()), [line for line in out.splitlines() if len(line) > 100]
        report = json.loads((here / "out-diagnostics" / "report.json").read_text())["model"]
        rows = {row["coordinate"]: row for row in report["experiments"]["clustering"]["rows"]}
        assert report["bank"] == 80 and rows["bias column"]["d"] == 16 and rows["phi - theta"]["d"] == 8 * 3 + 16 * 9
        assert set(report["experiments"]) == set(diagnostics.EXPERIMENTS)
        for figure in ("clustering", "token_flow", "bias_route", "content", "summary"):
            assert (here / "out-diagnostics" / f"{figure}.png").read_bytes().startswith(b"\x89PNG"), figure
        again = run(["--ckpt", "out.pt", "--samples", "80", "--repeats", "2", "--out", "again"])
        assert again[0] == 0 and json.loads(Path("again/report.json").read_text())["model"] == report
        status, out, err = run(["--ckpt", "out.pt", "wt.pt", "--only", "clustering", "bias-route", "--repeats", "1", "--out", "both"])
        assert status == 0 and "too few" in out and "No setting has three seeds" in out and "w_task 0.01 minus 0" in out, err
        assert all(len(line) <= 100 for line in out.splitlines())
        e = report["experiments"]
        rows = [*diagnostics.flow_table(e["token-flow"]).split("\n")[:-2], *diagnostics.bias_table(e["bias-route"]).split("\n")[:-1], *diagnostics.clustering_table(e["clustering"]).split("\n"),
                *(line for line in diagnostics.content_table(e["content"]).split("\n") if "from all facts" not in line and "total effect" not in line)]
        assert max(map(len, rows)) <= 100, max(rows, key=len)      # no row of a table is folded
        assert run(["--ckpt", "out.pt", "--only", "content", "--repeats", "1", "--out", "again"])[0] == 0
        assert {p.name for p in Path("again").iterdir()} == {"report.json", "content.png", "summary.png"}       # nothing of the run before
        assert {p.name for p in Path("both").iterdir()} == {"out", "wt", "report.json", "models.png"} and not Path("both/out/content.png").exists()
        Path("broken.pt").write_text("no checkpoint")
        shutil.copy("out.pt", "copy.pt")
        content = train.read_checkpoint("out.pt")
        content["model"]["reader.head.bias"][0] = math.nan
        train.save_checkpoint("nan.pt", content)
        Path("full/report.json").mkdir(parents=True)
        assert run(["--ckpt", "nan.pt"])[::2] == (2, "diagnostics.py: error: nan.pt: a damaged checkpoint: its parameters are not finite\n")
        content["model"]["reader.head.bias"][:] = 3e38
        content["model"]["reader.head.weight"][:] = 3e38
        train.save_checkpoint("nan.pt", content)
        assert run(["--ckpt", "nan.pt"])[::2] == (2, "diagnostics.py: error: nan.pt: a damaged checkpoint: its fits or predictions are not finite\n")
        def interrupted(*_):       # as Ctrl-C would, and also where a background shell has SIGINT ignored
            raise KeyboardInterrupt

        with replaced(diagnostics, "clustering", interrupted):
            assert run(["--ckpt", "out.pt"])[::2] == (130, "diagnostics.py: interrupted\n")
        for argv, word in ((["--ckpt", "gone.pt"], "gone.pt"), (["--ckpt", "out.pt", "broken.pt"], "broken.pt"), ([], "--ckpt"), (["--ckpt", "out.pt", "--samples", "3"], "--samples"),
                           (["--ckpt", "out.pt", "--out", "no/such"], "no/such"), (["--ckpt", "out.pt", "--dataset", "nowhere"], "nowhere"),
                           (["--ckpt", "out.pt", "out.pt"], "twice"), (["--ckpt", "out.pt", "copy.pt"], "same run"), (["--ckpt", "out.pt", "--out", "full"], "report.json"), (["--ckpt", "out.pt", "--only", "magic"], "magic")):
            status, out, err = run(argv)
            assert status == 2 and err.count("\n") == 1 and word in err and not out, (argv, err)
        # the reader's accuracy there is the evaluation's
        model, args = train.load_checkpoint("out.pt")
        model.fraction = 1.0
        _, test = train.load_dataset(args)
        block = diagnostics.Fits(diagnostics.fitter(model), test).whole()
        assert float((model.read(block.tokens).argmax(1) == test.labels).double().mean()) == train.evaluate(model, test)["test_accuracy"]
        assert apart([block.tokens], [model.fit(test.signal(test.pixels))]) < 1e-6


# ---- interventions.py --------------------------------------------------------------------------------------------------

def sweep(argv) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            interventions.main([str(a) for a in argv])
            return 0, out.getvalue(), err.getvalue()
        except SystemExit as error:
            return error.code, out.getvalue(), err.getvalue()


def test_factorial_on_planted_accuracies():
    """Additive and sub-additive cells give their effects; intervals over seeds cover the truth in about 95% of repeats."""
    cells = np.array(interventions.CELLS, dtype=float)
    a, b, c = cells.T
    planted = 0.5 + 0.04 * a + 0.02 * b + 0.01 * c - 0.03 * a * b + 0.02 * a * b * c
    exact = interventions.factorial(np.repeat(planted[:, None], 2, 1))
    simple = {"route+bias - additive": -0.03, "route+dense - additive": 0, "bias+dense - additive": 0, "route+bias+dense - additive": -0.03 + 0.02}
    by_hand = simple | {"route": 0.04 - 0.03 / 2 + 0.02 / 4, "bias": 0.02 - 0.03 / 2 + 0.02 / 4, "dense": 0.01 + 0.02 / 4, "route x bias": -0.03 + 0.02 / 2,
               "route x dense": 0.02 / 2, "bias x dense": 0.02 / 2, "route x bias x dense": 0.02}
    assert set(exact) == set(by_hand) and all(abs(v[0] - by_hand[k]) < 1e-12 for k, v in exact.items())
    assert all(v[1] is None for v in interventions.factorial(planted[:, None]).values())
    rng, repeats = np.random.default_rng(0), 400
    covered = dict.fromkeys(by_hand, 0)
    for _ in range(repeats):
        y = planted[:, None] + 0.02 * rng.standard_normal(3) + 0.01 * rng.standard_normal((8, 3))          # seeds shift all lanes together
        for name, (value, low, high) in interventions.factorial(y).items():
            covered[name] += low <= by_hand[name] <= high
    assert all(0.92 <= k / repeats <= 0.98 for k in covered.values()), covered
    # over images, one seed: eight correlated predictions of each image
    for truth in (0.0, -0.05):
        hit = 0
        for repeat in range(100):
            level = 0.5 + 0.05 * a + truth * a * b
            right = torch.from_numpy((0.5 * rng.random((500, 1)) + 0.5 * rng.random((500, 8)) < level).astype(float))
            mean = np.array([np.mean(np.where(level[i] < 0.5, 2 * level[i] ** 2, 1 - 2 * (1 - level[i]) ** 2)) for i in range(8)])         # of the triangular sum
            value, low, high = interventions.factorial_over_images(right)["route x bias"]
            hit += low <= float(interventions.contrast((0, 1)) @ mean) <= high
        assert 88 <= hit <= 100, (truth, hit)
    assert abs(interventions.log_odds(0.75, 10 ** 9) - math.log(3)) < 1e-6 and np.isfinite(interventions.log_odds(1.0, 10))


def test_report_of_planted_runs():
    """The rules of the verdicts: three seeds, a gain over the capacity control, and one that is not there."""
    def result(lane, seed, accuracy, n=1000):
        g = torch.Generator().manual_seed(seed)
        right = torch.zeros(n, dtype=torch.int)
        right[torch.randperm(n, generator=g)[:round(accuracy * n)]] = 1
        return {"lane": lane, "seed": seed, "reader": float(right.double().mean()), "right": "".join(map(str, right.tolist())), "psnr": 30.0, "purity": 0.3, "gap": 0.1, "last_knn10": 0.5, "lost": 0.1, "colour_r2": 0.9,
                "parameters": 1, "gflop_per_image": 1.0, "seconds": 1.0, "training": {"w_task": 0.01, "w_cluster": 0.0}, "setting": lane,
                "experiments": {"token-flow": {"late_minus_half": (0.0, -0.1, 0.1)}}}
    gains = {"baseline": 0.0, "deeper": 0.01, "route": 0.05, "bias": 0.01, "dense": 0.0, "route+bias": 0.02, "route+dense": 0.05, "bias+dense": 0.01, "route+bias+dense": 0.02}
    jitter = lambda lane, seed: 0.001 * ((hash((len(lane), seed)) % 5) - 2)
    with replaced(diagnostics, "across", lambda points: {"verdicts": [], "correlations": {}, "models": len(points), "points": []}), replaced(diagnostics, "points", lambda models: models):
        for seeds in (3, 1):
            found = {lane: [result(lane, seed, 0.5 + gain + 0.01 * seed + jitter(lane, seed)) for seed in range(seeds)] for lane, gain in gains.items()}
            planted = interventions.summarise(found)
            lines = [line for line in interventions.claims(planted) if line.startswith("C4")]
            assert abs(planted["factorial"]["cells"][4]["additive"] - np.mean([r["reader"] for r in found["route"]])) < 1e-12
            by = {line.split(":")[0]: line for line in lines}
            if seeds == 3:
                assert "supported" in by["C4, route"] and "refuted" in by["C4, dense"] and "not decided" in by["C4, bias"], lines
                assert "not additive. All three together - the sum of their single gains -4." in by["C4, adding up"], lines
            else:
                assert all("not decided here (fewer" in line for line in lines) and "one seed" in by["C4, route"], lines
        def verdicts(gains, noise=0.0):
            found = {lane: [result(lane, seed, 0.5 + gain + 0.01 * seed + noise * rng.standard_normal()) for seed in range(3)] for lane, gain in gains.items()}
            return {line.split(":")[0]: line.split(":")[1].split(".")[0].strip() for line in interventions.claims(interventions.summarise(found)) if line.startswith("C4")}

        rng, single = np.random.default_rng(0), {"route": 0.05, "bias": 0.02, "dense": 0.01}
        sums = {"baseline": 0.0, "deeper": 0.0} | {lane: sum(single[part] for part in lane.split("+")) for lane in [*single, *interventions.COMBINED]}
        assert verdicts(sums, 0.001)["C4, adding up"] == "additive" and verdicts(sums, 0.02)["C4, adding up"] == "not decided here"
        # better than a control that depth harms, but worse than the baseline: no gain
        harmed = verdicts({"baseline": 0.0, "deeper": -0.05, "route": -0.02, "bias": 0.03}, 0.001)
        assert harmed == {"C4, route": "not decided here", "C4, bias": "supported"}, harmed
        assert verdicts({"baseline": 0.0, "bias": 0.0}) == {"C4": "not measured"}
        # a model that stands under two names counts once
        twice = {lane: [result("baseline", seed, 0.5) for seed in range(3)] for lane in ("baseline", "baseline64")}
        assert interventions.summarise(twice)["across"]["models"] == 3
    assert interventions.difference({"a": [result("a", 0, 0.5)], "b": [result("b", 1, 0.5)]}, "a", "b") is None


SWEEP = [*TINY, "--epochs", "1", "--seeds", "1", "--out", "sweep"]


def test_sweep_command():
    """A small sweep: its report is complete, every lane's printed command gives the same weights, what is finished is not trained again."""
    lanes = ["column", "column-random", "cluster1", "colour", "route+bias+dense", "deeper", "wt"]
    with folder() as here:
        status, out, err = sweep([*SWEEP, "--lanes", *lanes, "--jobs", "2"])
        assert status == 0, (out, err)
        report = json.loads((here / "sweep" / "report.json").read_text())
        assert {row["lane"] for row in report["lanes"]} == {"baseline", "baseline64", *lanes} and not report["missing"] and not report["failed"]
        text = (here / "sweep" / "report.md").read_text()
        assert all(f"\n| {lane} " in text for lane in lanes) and all(len(line) <= 100 for line in out.splitlines() if not line.startswith("wrote"))
        assert {p.name for p in (here / "sweep").glob("*.png")} == {"lanes.png", "clusters.png"}         # lanes of the factorial are missing, models for a correlation
        rows = {row["lane"]: row for row in report["lanes"]}
        assert rows["deeper"]["parameters"] >= max(rows[lane]["parameters"] for lane in ("colour", "column")) and rows["wt"]["parameters"] == rows["baseline"]["parameters"]
        settings = {run["lane"]: train.read_checkpoint(run["checkpoint"])["args"] for run in report["runs"]}
        assert settings["cluster1"]["batch_size"] == 64 and settings["route+bias+dense"]["steps"] == 6 and settings["route+bias+dense"]["branch"] == "bias"
        found = json.loads(next((here / "sweep" / "runs").glob("baseline-*.diagnosis.json")).read_text())
        assert settings["column"]["branch"] == f"column:{found['highest_column']}" and 0 <= found["highest_column"] < 8
        assert train.read_checkpoint(report["runs"][0]["checkpoint"])["metrics"]["test_accuracy"] == found["reader"] == found["right"].count("1") / 40
        for run in report["runs"]:
            if run["lane"] in ("column", "cluster1", "colour", "route+bias+dense"):
                threads, *words = shlex.split(run["command"])
                assert threads.startswith("OMP_NUM_THREADS=") and words[:2] == ["python", "train.py"]
                again = subprocess.run([sys.executable, HERE / "train.py", *words[2:-1], "--out=alone.pt"], env=os.environ | dict([threads.split("=")]), capture_output=True, text=True)
                assert again.returncode == 0, again.stderr
                a, b = (train.read_checkpoint(p)["model"] for p in (run["checkpoint"], "alone.pt"))
                assert all(torch.equal(v, b[k]) for k, v in a.items()), run["lane"]
        before = {p: p.stat().st_mtime_ns for p in (here / "sweep" / "runs").glob("*.pt")}
        shutil.copytree(here / "sweep", here / "copy")
        (here / "sweep" / "report.md").unlink()
        status, again, err = sweep(["--report-only", "--out", "sweep"])
        assert status == 0 and (here / "sweep" / "report.md").exists() and out.endswith(again), err
        assert sweep([*SWEEP, "--lanes", "wt", "--device", "cpu"])[0] == 0 and before == {p: p.stat().st_mtime_ns for p in (here / "sweep" / "runs").glob("*.pt")}
        assert len(json.loads((here / "sweep" / "report.json").read_text())["lanes"]) == 9                                # of all that was asked for
        # a changed setting is trained, and a run that fails does not end the sweep
        status, out, err = sweep([*SWEEP, "--lanes", "wt", "task10", "--lr", "1e30"])
        assert status == 1 and "3 of the runs failed" in err.splitlines()[-1] and "not finite" in err, (out, err)
        next((here / "copy" / "runs").glob("wt-*.diagnosis.json")).unlink()
        next((here / "copy" / "runs").glob("wt-*.pt")).write_text("no checkpoint")
        status, out, err = sweep([*SWEEP, "--lanes", "wt", "deeper", "--out", "copy"])
        report = json.loads((here / "copy" / "report.json").read_text())
        assert status == 1 and "wt, seed 0 failed" in err and report["missing"] == ["wt seed 0"] and "wt, seed 0" in report["failed"] and "\n| deeper " in out, (out, err)
        assert {p: p.stat().st_mtime_ns for p in before} == before
        for argv, word in ((["--lanes", "magic"], "magic"), (["--lanes", "bias+bias"], "twice"), (["--seeds", "0"], "--seeds"), (["--report-only"], "--out alone"), (["--train-size", "200"], "--train-size 160, not 200"),
                           (["--lanes", "baseline+bias"], "baseline"), (["--lanes", "bias+colour"], "--branch"), (["--lanes", "bias", "--branch", "bias"], "same as baseline"),
                           (["--lanes", "cluster1", "--train-size", "40", "--out", "small"], "batches of 64"), (["--lanes", "deeper", "--fraction", "0.02", "--size", "32", "--out", "small"], "deeper"), (["--out", "no/such"], "no folder"),
                           (["--steps-test", "2"], "--steps-test"), (["--lanes", "all", "magic"], "magic"), (["--lanes", "column+bias", "--out", "small"], "bias+column: two"), (["--resume"], "--resume"), (["--out", "."], "something else"), (["--branch", "magic"], "--branch")):
            status, out, err = sweep([*SWEEP, *argv])
            assert status == 2 and err.count("\n") == 1 and word in err and not out, (argv, err)
        assert not (here / "small").exists()
        # a damaged file, or data that changed, is named before any work
        for name, content in (("runs/" + next((here / "copy" / "runs").glob("deeper-*.diagnosis.json")).name, "{}"), ("sweep.json", '{"format": "routed-inr sweep", "version": 1, "settings": {}}')):
            kept = (here / "copy" / name).read_text()
            for text in (content, kept[:len(kept) // 2]):
                (here / "copy" / name).write_text(text)
                for argv in ([*SWEEP, "--lanes", "deeper", "--out", "copy"], ["--report-only", "--out", "copy"]):
                    status, out, err = sweep(argv)
                    assert status == 2 and err.count("\n") == 1 and ("damaged" in err or "something else" in err) and not out, (argv, err)
            (here / "copy" / name).write_text(kept)
        mark = json.loads((here / "copy" / "sweep.json").read_text())
        (here / "copy" / "sweep.json").write_text(json.dumps(mark | {"facts": [1, mark["facts"][1], 7]}))
        assert "data were changed" in sweep([*SWEEP, "--lanes", "wt", "--out", "copy"])[2]
        assert interventions.in_order(["bias+route", "cluster0.1+bias"]) == ["baseline", "baseline64", "route+bias", "bias+cluster0.1"]
        assert sweep(["--lanes", "wt"])[0] == 2 and sweep(["--report-only", "--out", "nowhere"])[0] == 2


def test_killed_sweep_goes_on():
    """Killed with its runs at a random moment, and stopped by a signal, the same command gives the weights of a sweep that was not."""
    flags = [*TINY, "--epochs", "6", "--seeds", "1", "--lanes", "wt", "--save-minutes", "0", "--train-size", "640"]

    def begin():
        return subprocess.Popen([sys.executable, HERE / "interventions.py", *flags, "--out", "killed"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    with folder() as here:
        process = begin()
        wait_for(lambda: written("killed/runs/baseline-*.pt"), process)
        time.sleep(0.5 * random.random())
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert "progress" in train.read_checkpoint(next(here.glob("killed/runs/baseline-*.pt")))
        process = begin()
        wait_for(lambda: written("killed/runs/wt-*.pt"), process)
        process.send_signal(signal.SIGTERM)
        status, _, err = finish(process)
        assert status == 143 and "goes on" in err and "Traceback" not in err, err
        assert sweep([*flags, "--out", "killed"])[0] == 0 and sweep([*flags, "--out", "straight"])[0] == 0
        for lane in ("baseline", "wt"):
            a, b = (train.read_checkpoint(next(here.glob(f"{name}/runs/{lane}-*.pt")))["model"] for name in ("killed", "straight"))
            assert all(torch.equal(v, b[k]) for k, v in a.items()), lane
        if interventions.fcntl:
            with open("killed/lock") as lock:
                interventions.fcntl.flock(lock, interventions.fcntl.LOCK_EX)
                status, out, err = sweep([*flags, "--out", "killed"])
                assert status == 2 and "at work" in err and err.count("\n") == 1 and not out


def test_contrastive_loss_makes_the_weights_purer():
    """On digits, against the same batches without it."""
    purity = {}
    for weight in (0.0, 1.0):
        with folder():
            assert command(["--train-size", "480", "--width", "16", "--head-dim", "8", "--reader-depth", "1", "--batch-size", "64", "--epochs", "12", "--w-cluster", weight])[0] == 0
            model, args = train.load_checkpoint("out.pt")
            test = train.load_dataset(args)[1]
            with torch.no_grad():
                phi = model.adapt(test.signal(test.pixels))
            x = torch.cat([(phi.first - model.siren.first).flatten(1), model.tokens(phi).flatten(1)], 1)
            purity[weight] = diagnostics.neighbor_purity(x, test.labels)
    assert purity[1.0] > purity[0.0] + 0.05, purity


# ------------------------------------------------------------------------------------------------------------------------

def main(words: list[str]):
    tests = [(name, f) for name, f in globals().items() if name.startswith("test_") and all(w in name for w in words)]
    passed, failed, skipped = 0, 0, 0
    for name, test in tests:
        began = time.monotonic()
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
