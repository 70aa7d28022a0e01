"""The polynomials of csrc/cpu/math.h: `python tests/remez.py` fits them again and prints the tables (a few seconds).

Remez exchange: among all polynomials of one degree the one with the smallest worst error has an error curve that touches that worst value
degree + 2 times with alternating sign (Chebyshev). So: choose degree + 2 points, solve for the polynomial whose errors there are
+e, -e, ..., move the points to the true extrema of its error curve, and repeat. All in 60 digits, rounded once at the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import mpmath as mp  # type: ignore[import-untyped]

mp.mp.dps = 60
Function = Callable[[mp.mpf], mp.mpf]


def chebyshev_points(low: mp.mpf, high: mp.mpf, n: int) -> list[mp.mpf]:
    """n points of [low, high], denser towards both ends."""
    return [(low + high) / 2 - (high - low) / 2 * mp.cos(mp.pi * i / (n - 1)) for i in range(n)]


def remez(f: Function, weight: Function, low: mp.mpf, high: mp.mpf, degree: int) -> tuple[list[mp.mpf], mp.mpf]:
    """The polynomial p that minimises max weight(x) |p(x) - f(x)| on [low, high]: (coefficients, lowest power first; that maximum)."""
    n = degree + 2
    points = chebyshev_points(low, high, n)
    grid = chebyshev_points(low, high, 24 * n)
    target = [(x, weight(x), f(x)) for x in grid]
    for _ in range(12):
        rows = mp.matrix([[x**j for j in range(n - 1)] + [(-1) ** i / weight(x)] for i, x in enumerate(points)])
        *coefficients, level = mp.lu_solve(rows, mp.matrix([f(x) for x in points]))
        errors = [(x, w * (mp.polyval(coefficients[::-1], x) - y)) for x, w, y in target]
        worst = max(abs(e) for _, e in errors)
        arches = [max(arch, key=lambda xe: abs(xe[1])) for _, arch in itertools.groupby(errors, key=lambda xe: xe[1] > 0)]
        if worst < 1.01 * abs(level) or len(arches) < n:
            break
        while len(arches) > n:
            del arches[0 if abs(arches[0][1]) < abs(arches[-1][1]) else -1]
        points = [x for x, _ in arches]
    return coefficients, worst


def exp_tail(r: mp.mpf) -> mp.mpf:
    """(e^r - 1 - r) / r^2."""
    return mp.hyp1f1(1, 3, r) / 2


def exp2_tail(r: mp.mpf) -> mp.mpf:
    """(2^r - 1) / r."""
    return mp.expm1(r * mp.log(2)) / r if r else mp.log(2)


def log_tail(z: mp.mpf) -> mp.mpf:
    """(log((1 + s) / (1 - s)) - 2s) / s^3 for z = s^2."""
    return mp.hyp2f1(1, 1.5, 2.5, z) * 2 / 3


def erf_tail(z: mp.mpf) -> mp.mpf:
    """erf(x) / x - 1 for z = x^2."""
    return mp.hyp1f1(0.5, 1.5, -z) * 2 / mp.sqrt(mp.pi) - 1


def mills(v: mp.mpf, c: int) -> mp.mpf:
    """(t + 2c) e^(t^2/2) Phi(-t) for v = (t - c) / (t + 2c)."""
    t = c * (1 + 2 * v) / (1 - v)
    return (t + 2 * c) * mp.exp(t * t / 2) * mp.erfc(t / mp.sqrt(2)) / 2


def at_place(f: Function, limit: mp.mpf) -> Function:
    """f of x as a function of x^2 - limit^2/2, which lies around 0."""
    return lambda u: f(mp.sqrt(u + limit * limit / 2))


def cdf_slope(x: mp.mpf) -> mp.mpf:
    """(Phi(x) - 1/2) / x."""
    return mp.hyp1f1(0.5, 1.5, -x * x / 2) / mp.sqrt(2 * mp.pi)


def gelu_gradient_slope(x: mp.mpf) -> mp.mpf:
    """((x Phi(x))' - 1/2) / x."""
    return cdf_slope(x) + mp.exp(-x * x / 2) / mp.sqrt(2 * mp.pi)


def odd(f: Function, limit: float, degree: int) -> tuple[list[mp.mpf], mp.mpf]:
    """f(x) / x for 0 <= x <= limit, with the smallest error in f."""
    half = mp.mpf(limit) ** 2 / 2
    return remez(at_place(f, mp.mpf(limit)), at_place(lambda x: x + 0.01, mp.mpf(limit)), -half, half, degree)


def tables(ctype: str) -> dict[str, tuple[list[mp.mpf], mp.mpf]]:
    """The coefficients and the worst error of every polynomial for ctype "float" or "double", by its name in math.h."""
    degree = {"float": (4, 3, 6, 9, 5), "double": (9, 6, 11, 21, 10)}[ctype]
    c, limit = {"float": (2, mp.mpf(14.5)), "double": (3, mp.mpf(39))}[ctype]
    ln2, s2 = mp.log(2), (3 - 2 * mp.sqrt(2)) ** 2
    only_float = {"gelu": odd(cdf_slope, 5.3, 14), "gelu_gradient": odd(gelu_gradient_slope, 5.8, 17)} if ctype == "float" else {}
    # A weight turns the error of the polynomial into that of the function; 0.01 and 0.001 keep the equations regular where it would be 0.
    return only_float | {
        "exp": remez(exp_tail, lambda r: (r * r + 0.01) * mp.exp(-r), -0.501 * ln2, 0.501 * ln2, degree[0]),
        "exp2": remez(exp2_tail, lambda r: (abs(r) + 0.01) / mp.mpf(2) ** r, mp.mpf(-0.501), mp.mpf(0.501), degree[4]),
        "log": remez(log_tail, lambda z: (z + 0.001) / 2, mp.mpf(0), s2, degree[1]),
        "erf": remez(erf_tail, lambda z: mp.mpf(1), mp.mpf(0), mp.mpf(1), degree[2]),
        "mills": remez(lambda v: mills(v, c), lambda v: 1 / mills(v, c), mp.mpf(-0.5), (limit - c) / (limit + 2 * c), degree[3]),
    }


def text(ctype: str, coefficients: list[mp.mpf]) -> list[str]:
    """Decimals that round to the right number: 9 digits for float, 17 for double."""
    return [mp.nstr(c, {"float": 9, "double": 17}[ctype], strip_zeros=False) for c in coefficients]


if __name__ == "__main__":
    for ctype in ("float", "double"):
        for name, (coefficients, worst) in tables(ctype).items():
            print(f"{ctype} {name}: worst error 2^{mp.nstr(mp.log(worst, 2), 4)}\n    {', '.join(text(ctype, coefficients))}")
