"""Concave problems on the trembling simplex: every entry at least `floor`, entries summing to one.

What matrix games with a variance penalty need: the exact maximiser of a concave quadratic (a best response), its entropy-smoothed
version, and the equilibrium of several such maximisers, found as the zero of a complementarity system.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from jaxtyping import Float
from scipy.linalg import null_space
from scipy.optimize import nnls, root

from volvelle.core.errors import UserError

Vector = Float[np.ndarray, " n"]
Matrix = Float[np.ndarray, "n n"]


def check_floor(size: int, floor: float) -> None:
    """Raise UserError unless a distribution over `size` entries with every entry >= `floor` exists."""
    if not (0 <= floor and floor * size <= 1):
        raise UserError(f"floor={floor}: with {size} actions the least probability must lie in [0, {1 / size:.4g}]")


def maximise_quadratic(linear: Vector, quadratic: Matrix, floor: float = 0.0) -> Vector:
    """argmax over p of `linear @ p - p @ quadratic @ p`, exactly, by a primal active-set method.

    `quadratic` is symmetric positive semidefinite, singular or zero included. Where several p are optimal, the one of least
    Euclidean norm is returned, so the answer is a function of the arguments (all entries equal leaves the uniform distribution).
    """
    n = len(linear)
    check_floor(n, floor)
    if n == 1 or floor * n >= 1 - 1e-15:
        return np.full(n, 1 / n)
    linear = linear - linear.mean()                        # adding a constant moves no maximiser
    scale = max(np.abs(linear).max(), np.abs(quadratic).max())
    if scale == 0:
        return np.full(n, 1 / n)
    m, q = linear / scale, quadratic / scale
    p = np.full(n, float(floor))
    first = int(np.argmax(m))
    p[first] += 1 - n * floor
    free = [first]                                          # entries allowed to move; the others sit at the floor
    for _ in range(100 * n):
        gradient = m - 2 * q @ p
        step, longest = _step(gradient[free], q[np.ix_(free, free)])
        falling = step < 0
        if np.abs(step).max() > 1e-13:
            room = np.where(falling, (p[free] - floor) / np.where(falling, -step, 1.0), np.inf)
            blocking = int(np.argmin(room))
            p[free] += min(longest, max(room[blocking], 0.0)) * step
            if room[blocking] <= longest:
                p[free[blocking]] = floor
                del free[blocking]
                continue
        gradient = m - 2 * q @ p
        excess = gradient - gradient[free].mean()
        excess[free] = -np.inf
        best = int(np.argmax(excess))
        if excess[best] <= 1e-12:
            return _least_norm(p, m, q, floor)
        free.append(best)
    raise RuntimeError(f"the active-set method did not finish in {100 * n} steps for {n} actions; is the quadratic part symmetric?")


@cache
def _sum_zero(size: int) -> np.ndarray:
    """Orthonormal columns that span {x : sum x = 0}."""
    return null_space(np.ones((1, size)))


def _step(gradient: np.ndarray, quadratic: np.ndarray) -> tuple[np.ndarray, float]:
    """Direction inside {sum = 0} that improves most, and how far it may go: 1 for a Newton step, inf along a flat ray."""
    size = len(gradient)
    if size == 1:
        return np.zeros(1), 1.0
    basis = _sum_zero(size)
    slope = basis.T @ gradient
    curvature, axes = np.linalg.eigh(2 * basis.T @ quadratic @ basis)
    slope = axes.T @ slope
    flat = curvature <= 1e-12
    if np.abs(slope[flat]).max(initial=0.0) > 1e-12:
        return basis @ (axes @ np.where(flat, slope, 0.0)), np.inf
    return basis @ (axes @ np.where(flat, 0.0, slope / np.where(flat, 1.0, curvature))), 1.0


def _least_norm(p: np.ndarray, m: np.ndarray, q: np.ndarray, floor: float) -> np.ndarray:
    """The shortest optimal distribution. The optimal set is {q x = q p, m x = m p, sum x = 1, x >= floor}: a least-distance
    problem, solved through non-negative least squares (Lawson and Hanson, Solving Least Squares Problems, chapter 23)."""
    directions = null_space(np.vstack([q, m, np.ones(len(p))]), rcond=1e-10)
    if directions.size:
        shift = directions @ (directions.T @ p)
        stacked = np.vstack([directions.T, (floor - p + shift)[None]])
        stacked[np.abs(stacked) < 1e-13] = 0                # rounding here would pass for a constraint
        target = np.zeros(len(stacked))
        target[-1] = 1.0
        weights, _ = nnls(stacked, target)
        rest = stacked @ weights - target
        p = p - shift - directions @ rest[:-1] / rest[-1]
    p = np.where(p - floor < 1e-14, floor, p)
    return floor + (p - floor) * (1 - floor * len(p)) / (p - floor).sum()


def maximise_smoothed(linear: Vector, quadratic: Matrix, temperature: float, floor: float = 0.0,
                      start: Vector | None = None) -> Vector:
    """argmax over p of `linear @ p - p @ quadratic @ p + temperature * entropy(z)` with p = floor + (1 - n floor) z.

    z is the part of p that is free to move, p itself at floor 0. The maximiser is unique and interior. Damped Newton on z, until the
    value is within 1e-12 (relative) of the optimum. `start` (a distribution) shortens the way.
    """
    n = len(linear)
    check_floor(n, floor)
    if temperature <= 0:
        raise UserError(f"temperature={temperature}: must be positive; use maximise_quadratic for temperature 0")
    mass = 1 - n * floor
    if n == 1 or mass <= 1e-15:
        return np.full(n, 1 / n)
    m = mass * (linear - 2 * floor * quadratic.sum(1))
    q = mass**2 * quadratic
    scale = max(np.abs(m - m.mean()).max(), np.abs(q).max(), temperature)

    z = np.full(n, 1 / n) if start is None else np.maximum((start - floor) / mass, 1e-12)
    z, done = _newton(m, q, temperature, z / z.sum(), scale)
    if not done:                                            # from far away: cool down, each optimum starting the next
        z = np.full(n, 1 / n)
        for heat in np.geomspace(scale, temperature, 2 + int(np.log2(scale / temperature))):
            z, done = _newton(m, q, heat, z, scale)
    if not done:
        raise RuntimeError(f"the smoothed best response did not converge at temperature {temperature} with {n} actions")
    return floor + mass * z


def _newton(m: np.ndarray, q: np.ndarray, temperature: float, z: np.ndarray, scale: float) -> tuple[np.ndarray, bool]:
    """Damped Newton on log z for `m z - z q z + temperature entropy(z)`; says whether the optimality gap closed."""

    def value(z):
        return m @ z - z @ q @ z - temperature * (z * np.log(z)).sum()

    for _ in range(60):
        gradient = m - 2 * q @ z - temperature * (1 + np.log(z))
        gradient -= z @ gradient
        if gradient.max() <= 1e-11 * scale:
            return z, True
        width = np.sqrt(z)                                  # scaled so that the entropy's curvature is the identity
        system = 2 * width[:, None] * q * width + temperature * np.eye(len(z))
        solved = np.linalg.solve(system, np.stack([width * gradient, width], 1))
        growth = (solved[:, 0] - solved[:, 1] * (width @ solved[:, 0]) / (width @ solved[:, 1])) / width
        rising = growth > 0                                 # growth is a rate of change of log z; no entry may pass 1
        length, now = min(1.0, (-np.log(z[rising]) / growth[rising]).min(initial=np.inf)), value(z)
        while length > 1e-9:
            moved = np.maximum(z * np.exp(length * growth), 1e-300)
            moved /= moved.sum()
            if value(moved) >= now - 1e-13 * scale:
                break
            length /= 2
        z = moved
    return z, False


def equilibrium(gradients: Callable[[list[np.ndarray]], list[np.ndarray]], start: list[np.ndarray],
                floor: float = 0.0) -> list[np.ndarray]:
    """A profile near `start` in which every p^i maximises its concave objective over the trembling simplex, the others held.

    `gradients(profile)` gives each player's gradient in its own p. The optimality conditions (p_j >= floor, gradient_j <= level,
    one of them tight) are one system through the Fischer-Burmeister function, solved from `start` by Powell's method. It converges
    locally; a caller must measure the residual of what comes back.
    """
    sizes = [len(p) for p in start]
    cuts = np.cumsum(sizes)[:-1]
    for size in sizes:
        check_floor(size, floor)
    first = gradients(start)
    scale = max(max(np.ptp(g) for g in first), 1e-9)

    def split(x):
        return np.split(x[: sum(sizes)], cuts), x[sum(sizes):]

    def system(x):
        profile, levels = split(x)
        rows = []
        for p, g, level in zip(profile, gradients(profile), levels, strict=True):
            above, slack = p - floor, level - g / scale
            rows += [above + slack - np.hypot(above, slack), [p.sum() - 1]]
        return np.concatenate(rows)

    levels = np.array([g.max() / scale for g in first])
    x = np.concatenate([*start, levels])
    for method in ("hybr", "lm"):                           # Levenberg-Marquardt goes on where Powell's method stalls
        x = root(system, x, method=method, options={"xtol": 1e-14}).x
        if np.abs(system(x)).max() < 1e-12:
            break
    profile = [np.maximum(p, floor) for p in split(x)[0]]
    free = [1 - floor * n for n in sizes]
    return [floor + (p - floor) * f / s if (s := (p - floor).sum()) > 0 else np.full(len(p), 1 / len(p))
            for p, f in zip(profile, free, strict=True)]
