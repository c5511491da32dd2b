"""Is an image's fitted latent a smooth function of the image? The conditions under which the
implicit function theorem says so, measured. It stands alone: copy it.

    L(z, X) = |f(z) - X|^2 / D + lambda_z |z|^2,    z*(X) = argmin L

f renders a latent z as D pixel values. Where L' = 0 and L'' is invertible (' = d/dz), z* is smooth
near X, and dz = -L''^-1 (dL'/dX) dX. L'' also has to be invertible without the 2 lambda_z that the
penalty adds, if the images are to be the cause. Gauss-Newton's 2 J^T J / D + 2 lambda_z, with
J = df/dz, leaves out how f curves: does it predict dz as well?

    found = measure(f, minimise, images, 1e-3, changes, starts)        # images (n, D)
    verdicts(found)                                        # {condition: does it hold?}
"""
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jacfwd, jvp, vmap

warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)   # torch's own

ZERO = 1e-8                # a gradient below is 0; so is an eigenvalue, over the largest
SAME, ALIKE = 1e-3, 0.02   # same z: over the distance between images; same picture: rms of pixels
SHARE = 0.95               # of refits must end at the same z
SIZES = (1e-4, 1e-3, 1e-2, 1e-1)           # |dX| / |X|
SIZE, ERROR = 1e-3, 0.01   # at this size dz must be predicted up to this share of it


def objective(render, lambda_z: float):
    """The function L of one latent z (l,) and one image x (D,)."""
    return lambda z, x: (render(z) - x).square().mean() + lambda_z * z.square().sum()


def second_derivative(loss, z: Tensor, x: Tensor) -> Tensor:
    """L'' (n, l, l), a column for each tangent; so many at once as a CPU's caches hold."""
    room, eye = max(1, 2 ** 15 // x.shape[1]), torch.eye(z.shape[1]).to(z)

    def one(z, x):
        def column(tangent):
            return jvp(lambda z: grad(loss)(z, x), (z,), (tangent,))[1]
        return vmap(column, chunk_size=room)(eye)
    return vmap(one, chunk_size=max(1, room // len(eye)))(z, x)


def newton(loss, z: Tensor, x: Tensor, steps=15) -> Tensor:
    """z where L' = 0, by damped Newton from near there: along each eigenvector of L'' down by slope
    / |eigenvalue|; of this the whole, or the half, quarter, ... that first does not raise L."""
    z, value = z.clone(), vmap(loss)
    for _ in range(steps):
        slope = vmap(grad(loss))(z, x)
        going = slope.norm(dim=1) > ZERO / 1000
        if not going.any():
            break
        at, to, slope = z[going], x[going], slope[going, None]
        values, basis = torch.linalg.eigh(second_derivative(loss, at, to))
        values = values.abs().clamp(min=ZERO * values.abs().amax(1, True))[:, None]
        move = -(slope @ basis / values @ basis.mT)[:, 0]
        limit = value(at, to) * (1 + 1e-13)                    # rounding is no rise
        for _ in range(20):
            if not (rises := value(at + move, to) > limit).any():
                break
            move[rises] /= 2
        z[going] = at + move
    return z


def spread(x: Tensor) -> list[float]:
    """[median, least, most]"""
    return [float(each) for each in (x.median(), x.min(), x.max())]


def curvature(loss, lambda_z: float, z: Tensor, x: Tensor) -> dict:
    """L', and the eigenvalues of L'' with and without the 2 lambda_z that the penalty adds."""
    values = torch.linalg.eigvalsh(second_derivative(loss, z, x))              # (n, l), ascending
    return {"|L'|": spread(vmap(grad(loss))(z, x).norm(dim=1)),
            "smallest eigenvalue of L''": spread(values[:, 0]),
            "... without the penalty's share": spread(values[:, 0] - 2 * lambda_z),
            "largest eigenvalue of L''": spread(values[:, -1]),
            "condition number of L''": spread(values[:, -1] / values[:, 0].abs().clamp_min(1e-300))}


def identifiability(J: Tensor) -> dict:
    """Of the eigenvalues s of J^T J, J = d pixels / dz (n, D, l). Participation ratio: (sum s)^2 /
    sum s^2, how many directions of z move the picture."""
    s = torch.linalg.eigvalsh(J.mT @ J).clamp_min(1e-300).flip(1)              # (n, l), falling
    return {"rank of J^T J": spread((s > ZERO * s[:, :1]).sum(1).double()),
            "condition number of J^T J": spread(s[:, 0] / s[:, -1]),
            "participation ratio of J^T J": spread(s.sum(1).square() / s.square().sum(1)),
            "spectrum": s.median(0).values.tolist()}


def uniqueness(render, z: Tensor, ends: dict) -> dict:
    """Did fits from elsewhere end at z (n, l), or show the same picture? ends: {start: (n, l)}."""
    found = {}
    for start, end in ends.items():
        distance = (end - z).norm(dim=1) / torch.pdist(z).median()
        rms = (render(end) - render(z)).square().mean(1).sqrt()
        found[start] = {"same z": float((distance < SAME).double().mean()),
                        "same picture": float((rms < ALIKE).double().mean()),
                        "rms": spread(rms), "distances": distance.tolist()}
    return found


def predict(loss, second: Tensor, z: Tensor, x: Tensor, dx: Tensor) -> Tensor:
    """dz = -second^-1 (dL'/dX) dX (n, l)."""
    def mixed(z, x, dx):
        return jvp(lambda x: grad(loss)(z, x), (x,), (dx,))[1]
    inverse = torch.linalg.pinv(second, hermitian=True)        # flat directions, if no penalty
    return -(inverse @ vmap(mixed)(z, x, dx)[..., None])[..., 0]


def prediction(loss, lambda_z: float, J: Tensor, z: Tensor, x: Tensor, changes: dict) -> list[dict]:
    """|predicted dz - dz of a refit| / |dz| as images change, by L'' and by Gauss-Newton.
    changes: {what: direction (n, D)}; images that it leaves as they are do not count."""
    rows, eye = [], torch.eye(z.shape[1]).to(z)
    ways = {"newton": second_derivative(loss, z, x),
            "gauss_newton": 2 / x.shape[1] * J.mT @ J + 2 * lambda_z * eye}
    for what, direction in changes.items():
        some = direction.norm(dim=1) > 0
        at, to, unit = z[some], x[some], F.normalize(direction[some]) * x[some].norm(dim=1)[:, None]
        for size in SIZES if some.any() else ():
            dz = newton(loss, at, to + size * unit) - at
            errors = {way: (predict(loss, second[some], at, to, size * unit) - dz).norm(dim=1)
                      / dz.norm(dim=1) for way, second in ways.items()}
            rows.append({"change": what, "size": size, **{w: spread(e) for w, e in errors.items()}})
    return rows


def measure(render, minimise, x: Tensor, lambda_z: float, changes: dict, starts: dict) -> dict:
    """All of it, in the precision of images x (n, D), float64 if anything is to come out.

    render(z (..., l)) -> (..., D); minimise(z, x, lambda_z) -> z near a minimum, from z. changes:
    {what: direction (n, D) to change the images in}; starts: {name: z (n, l)}: "z*" is reached from
    the first and measured; then each image is fitted again from the others."""
    refits, images = {}, x.repeat(len(starts), 1)
    for name, penalty in (("no penalty", 0.0), ("penalty", lambda_z)):
        loss = objective(render, penalty)
        ends = newton(loss, minimise(torch.cat([*starts.values()]), images, penalty), images)
        z, *others = ends.split(len(x))
        refits[name] = uniqueness(render, z, dict(zip([*starts][1:], others)))
    J = torch.cat([vmap(jacfwd(render))(block) for block in z.split(4)])       # (n, D, l)
    return {"z*": z, "images": len(x), "latent": z.shape[1], "lambda_z": lambda_z, "refits": refits,
            **curvature(loss, lambda_z, z, x), **identifiability(J),
            "predictions": prediction(loss, lambda_z, J, z, x, changes)}


def verdicts(found: dict) -> dict[str, str]:
    """{condition: does it hold on all images, of dz on the median one?} of what `measure` found."""
    def outcome(holds: bool, without_penalty: bool = True) -> str:
        if not holds:
            return "does not hold"
        return "holds" if without_penalty else "holds only by the penalty"

    floor = ZERO * found["largest eigenvalue of L''"][2]
    definite, alone = (found[name][1] > floor for name in (
        "smallest eigenvalue of L''", "... without the penalty's share"))
    full = found["rank of J^T J"][1] == found["latent"]
    said = {"L' = 0": outcome(found["|L'|"][2] <= ZERO),
            "L'' is positive definite": outcome(definite, alone),
            "every direction of z is seen": outcome(full or found["lambda_z"] > 0, full)}
    for start in found["refits"]["penalty"]:
        same, alone = (found["refits"][name][start]["same z"] >= SHARE
                       for name in ("penalty", "no penalty"))
        said[f"the same z from {start} start"] = outcome(same, alone)
    errors = [row["newton"][0] for row in found["predictions"] if row["size"] == SIZE]
    said[f"dz is predicted, |dX| = {SIZE:g} |X|"] = outcome(max(errors) <= ERROR)
    return said
