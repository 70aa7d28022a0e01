"""The vector functions of csrc/cpu/math.h: their error in ulp against the table in that file, and their values at the edges, per ISA."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import mpmath as mp  # type: ignore[import-untyped]
import numpy as np
import pytest
import remez
import torch

from dlkernels import backend

HEADER = (Path(__file__).parent.parent / "csrc/cpu/math.h").read_text()
BOUND = {
    (name, dtype): float(ulp)
    for name, *ulps in re.findall(r"^// +(\w+) +(\d\.\d) +(\d\.\d)", HEADER, re.MULTILINE)
    for dtype, ulp in zip(("float32", "float64"), ulps)
}
FUNCTIONS = sorted({name for name, _ in BOUND})
ISAS = [isa for isa in backend.supported_isas() if isa in ("default", "avx2", "avx512")]  # the others contain the same code

EVALUATE = """
import sys, numpy as np, torch
from dlkernels import backend
backend.load_cpu()
x = np.load(sys.argv[1])
y = {f"{f}_{k}": torch.ops.dlkernels.vector_math(torch.from_numpy(x[k]), f).numpy() for f in sys.argv[3:] for k in x.files}
np.savez(sys.argv[2], **y)
"""


def float32_points() -> np.ndarray:
    """A million bit patterns evenly spread over all of them, every power of two with its neighbours, and dense ranges."""
    spread = np.arange(0, 2**32, 4099, dtype=np.uint64).astype(np.uint32)
    boundaries = (np.arange(512, dtype=np.uint32)[:, None] << np.uint32(23)) + np.arange(-8, 9, dtype=np.int32).astype(np.uint32)
    dense = [np.linspace(-a, a, 100_003, dtype=np.float32) for a in (0.5, 2, 6, 20, 110)]
    return np.concatenate([spread.view(np.float32), boundaries.ravel().view(np.float32), *dense])


def float64_points() -> np.ndarray:
    """Three thousand numbers: random bit patterns, powers of two with their neighbours, and uniform in ranges."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 2**64, 500, dtype=np.uint64).view(np.float64)
    powers = np.ldexp(1.0, np.arange(-1074, 1024, 9))
    uniform = [rng.uniform(-a, a, 300) for a in (0.1, 0.5, 1, 2, 6, 40, 750)]
    near_one = rng.uniform(0.6, 1.6, 300)
    return np.concatenate([patterns, powers, np.nextafter(powers, 0), -powers, near_one, *uniform])


def sigmoid64(x: torch.Tensor) -> torch.Tensor:
    z = torch.exp(-x.abs())
    return torch.where(x < 0, z, 1) / (1 + z)


FLOAT64: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "exp": torch.exp,
    "log": torch.log,
    "tanh": torch.tanh,
    "sigmoid": sigmoid64,
    "elu": lambda x: torch.where(x > 0, x, torch.expm1(x)),
    "softplus": lambda x: x.clamp(min=0) + torch.log1p(torch.exp(-x.abs())),
    "erf": torch.erf,
    "gauss_cdf": lambda x: torch.erfc(-x / math.sqrt(2)) / 2,
    "gauss_pdf": lambda x: torch.exp(-x * x / 2) / math.sqrt(2 * math.pi),
}
EXACT: dict[str, Callable[[mp.mpf], mp.mpf]] = {
    "exp": mp.exp,
    "log": mp.log,
    "tanh": mp.tanh,
    "sigmoid": lambda x: 1 / (1 + mp.exp(-x)),
    "elu": lambda x: x if x > 0 else mp.expm1(x),
    "softplus": lambda x: x if x > 200 else mp.log1p(mp.exp(x)),
    "erf": mp.erf,
    "gauss_cdf": lambda x: mp.erfc(-x / mp.sqrt(2)) / 2,
    "gauss_pdf": lambda x: mp.exp(-x * x / 2) / mp.sqrt(2 * mp.pi),
}


def exact64(name: str, x: float) -> tuple[float, float]:
    """f(x) as the unevaluated sum of two doubles. Beyond 800 every function that does not grow forever has reached its limit."""
    with mp.workdps(50):
        if math.isnan(x) or (name == "log" and x < 0):
            return math.nan, 0.0
        y = EXACT[name](mp.mpf(x if name in ("log", "elu", "softplus") else max(-800.0, min(800.0, x))))
        rounded = float(y)
        return rounded, 0.0 if math.isinf(rounded) else float(y - mp.mpf(rounded))


def ulp_errors(value: np.ndarray, exact: np.ndarray, rest: np.ndarray | float = 0.0) -> np.ndarray:
    """|value - (exact + rest)| in units of the spacing of ``value``'s dtype just below ``exact``; infinite where only one is NaN.

    An infinite value counts as the first power of two that does not fit, so an overflow is right exactly where rounding overflows.
    """
    info = np.finfo(value.dtype)
    if value.dtype == np.float32:
        too_large = 2.0**128
        value, exact = np.clip(value.astype(np.float64), -too_large, too_large), np.clip(exact, -too_large, too_large)
    _, exponent = np.frexp(np.nextafter(np.abs(exact), 0))
    spacing = np.ldexp(1.0, np.maximum(exponent - info.nmant - 1, info.minexp - info.nmant))
    error = np.where(value == exact, 0, np.abs(value - exact)) if np.isscalar(rest) else np.abs((value - exact) - rest)
    error = np.where(value == exact, np.abs(rest), error) / spacing
    one_nan = np.isnan(value) != np.isnan(exact)
    return np.where(one_nan, np.inf, np.where(np.isnan(exact), 0, error))


@cache
def points() -> dict[str, np.ndarray]:
    return {"float32": float32_points(), "float64": float64_points()}


@cache
def exact(name: str, dtype: str) -> tuple[np.ndarray, np.ndarray | float]:
    x = points()[dtype]
    if dtype == "float32":
        return FLOAT64[name](torch.from_numpy(x).double()).numpy(), 0.0
    both = np.array([exact64(name, value) for value in x.tolist()])
    return both[:, 0], both[:, 1]


def evaluate(isa: str, folder: Path, **x: np.ndarray) -> dict[str, np.ndarray]:
    """Every function at every array of ``x``, keyed "function_key", in a process that loads the library for ``isa``."""
    np.savez(folder / "x.npz", **x)  # type: ignore[arg-type]
    command = [sys.executable, "-c", EVALUATE, str(folder / "x.npz"), str(folder / f"{isa}.npz"), *FUNCTIONS]
    environment = os.environ | {"DLKERNELS_ISA": isa, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return dict(np.load(folder / f"{isa}.npz"))


@pytest.fixture(scope="module", params=ISAS)
def values(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return evaluate(request.param, tmp_path_factory.mktemp("math"), **points())


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    backend.load_cpu()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_error_in_ulp(values: dict[str, np.ndarray], name: str, dtype: str) -> None:
    reference, rest = exact(name, dtype)
    with np.errstate(invalid="ignore"):
        errors = ulp_errors(values[f"{name}_{dtype}"], reference, rest)
    worst = int(np.argmax(errors))
    x, y = points()[dtype][worst], values[f"{name}_{dtype}"][worst]
    assert errors[worst] <= BOUND[name, dtype], f"{name}({x!r}) = {y!r}, exact {reference[worst]!r}: {errors[worst]:.2f} ulp"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ranges_and_symmetry(values: dict[str, np.ndarray], dtype: str) -> None:
    x = points()[dtype]
    number = ~np.isnan(x)
    for name, low in (("tanh", -1), ("erf", -1), ("sigmoid", 0), ("gauss_cdf", 0), ("exp", 0), ("elu", -1), ("softplus", 0)):
        y = values[f"{name}_{dtype}"][number]
        assert y.min() >= low and (name in ("exp", "elu", "softplus") or y.max() <= 1), name
    for name in ("tanh", "erf"):
        y = values[f"{name}_{dtype}"][number]
        assert np.array_equal(np.signbit(y), np.signbit(x[number])), name


INF, NAN = math.inf, math.nan
EDGES = {  # exact values, at 0, -0, inf, -inf, NaN
    "exp": [1, 1, INF, 0, NAN],
    "log": [-INF, -INF, INF, NAN, NAN],
    "tanh": [0.0, -0.0, 1, -1, NAN],
    "sigmoid": [0.5, 0.5, 1, 0, NAN],
    "elu": [0.0, 0.0, INF, -1, NAN],
    "softplus": [math.log(2), math.log(2), INF, 0, NAN],
    "erf": [0.0, -0.0, 1, -1, NAN],
    "gauss_cdf": [0.5, 0.5, 1, 0, NAN],
    "gauss_pdf": [1 / math.sqrt(2 * math.pi)] * 2 + [0, 0, NAN],
}


@pytest.mark.parametrize("isa", ISAS)
def test_edges(isa: str, tmp_path: Path) -> None:
    x = [0.0, -0.0, INF, -INF, NAN]
    y = evaluate(isa, tmp_path, float32=np.array(x, np.float32), float64=np.array(x))
    for name, expected in EDGES.items():
        for dtype in ("float32", "float64"):
            got, wanted = y[f"{name}_{dtype}"], np.array(expected, dtype)
            assert np.array_equal(got, wanted, equal_nan=True), f"{name} {dtype}: {got}, exact {wanted}"
            assert np.array_equal(np.signbit(got[:4]), np.signbit(wanted[:4])) or name == "log", f"{name} {dtype}: {got}"


def test_gelu_tail_is_more_accurate_than_1_plus_erf() -> None:
    """x Phi(x) keeps its relative accuracy where x (1 + erf(x / sqrt 2)) / 2 has lost every digit."""
    x = torch.linspace(-12, -3, 10_001)
    exact = x.double() * torch.erfc(-x.double() / math.sqrt(2)) / 2
    ours = ((x * torch.ops.dlkernels.vector_math(x, "gauss_cdf")).double() / exact - 1).abs().max()
    native = (torch.nn.functional.gelu(x).double() / exact - 1).abs().max()
    assert ours < 6 * torch.finfo(torch.float32).eps < native


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_length_gives_the_same_lanes(dtype: torch.dtype) -> None:
    x = torch.linspace(-3, 3, 40, dtype=dtype)
    whole = torch.ops.dlkernels.vector_math(x, "tanh")
    for n in range(41):
        assert torch.equal(torch.ops.dlkernels.vector_math(x[:n], "tanh"), whole[:n])


def test_bad_input_is_an_error() -> None:
    op = torch.ops.dlkernels.vector_math
    with pytest.raises(RuntimeError, match="f is 'cosh'"):
        op(torch.zeros(3), "cosh")
    with pytest.raises(RuntimeError, match="dtype"):
        op(torch.zeros(3, dtype=torch.int32), "exp")
    with pytest.raises(RuntimeError, match="contiguous"):
        op(torch.zeros(4, 4).t(), "exp")


@pytest.mark.parametrize("ctype", ["float", "double"])
def test_tables_are_what_remez_gives(ctype: str) -> None:
    section = HEADER[HEADER.index(f"struct coefficients<{ctype}>") :]
    for name, (coefficients, _) in remez.tables(ctype).items():
        found = re.search(rf"constexpr {ctype} {name}\[\] = \{{(.*?)\}}", section, re.DOTALL)
        assert found is not None, name
        assert [entry.strip().rstrip("f") for entry in found[1].split(",")] == remez.text(ctype, coefficients), name
