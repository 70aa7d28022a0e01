"""The report's numbers and drawings: units as a person reads them, axes that cover their values, marks where they belong."""

from __future__ import annotations

import math

import pytest

from dlkernels.report import records, svg, units


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (units.seconds(1.234e-5), "12.3 µs"),
        (units.seconds(9.999e-4), "1.00 ms"),
        (units.seconds(0.5), "500 ms"),
        (units.seconds(2.0), "2.00 s"),
        (units.seconds(None), "–"),
        (units.si(4.1e11, "FLOP/s"), "410 GFLOP/s"),
        (units.tick(1e9, ""), "1 G"),
        (units.tick(1e-4, "s"), "100 µs"),
        (units.spread(9.5e-4, 1.02e-3), "0.950–1.02 ms"),
        (units.times(0.9999), "0.99×"),
        (units.times(1.0), "1.00×"),
        (units.times(250.0), "250×"),
        (units.percent(0.834), "83 %"),
        (units.percent(0.0042), "0.4 %"),
        (units.binary(3 * 2**20), "3 MiB"),
        (units.error(0.0), "0"),
    ],
)
def test_units(shown: str, expected: str) -> None:
    assert shown == expected


@pytest.mark.parametrize("value", [None, True, "3", math.nan, math.inf, 10**400, [1]])
def test_only_finite_numbers_are_numbers(value: object) -> None:
    assert records.number(value) is None


@pytest.mark.parametrize("values", [[1.0], [1e-7, 3e-1], [5e8, 5e8], [1e-60, 1e60], [0.9, 1.1]])
def test_a_log_axis_covers_its_values_with_few_ticks(values: list[float]) -> None:
    axis = svg.Axis.over(values, "", str, log=True)
    assert all(0 <= axis.place(value) <= 1 for value in values)
    ticks = axis.ticks(6)
    assert 1 <= len(ticks) <= 7
    assert all(axis.low <= tick <= axis.high for tick in ticks)


@pytest.mark.parametrize("values", [[0.0], [3.0, 3.0], [-2.0, 5.0], [1e-12, 2e-12], [1e9, 1e9 + 1]])
def test_a_linear_axis_covers_its_values_with_few_ticks(values: list[float]) -> None:
    axis = svg.Axis.over(values, "", str)
    assert all(0 <= axis.place(value) <= 1 for value in values)
    assert 1 <= len(axis.ticks(6)) <= 7


def test_marks_stand_where_their_values_say() -> None:
    plot = svg.Plot(svg.Axis(1.0, 100.0, "", str, log=True), svg.Axis(0.0, 10.0, "", str), "a & b", width=400, height=270)
    left, top = plot.at(1.0, 10.0)
    right, bottom = plot.at(100.0, 0.0)
    assert plot.at(10.0, 5.0) == pytest.approx(((left + right) / 2, (top + bottom) / 2))
    plot.mark((10.0, 5.0), "ours", "circle", "<tip>")
    assert "&lt;tip&gt;" in plot.svg()
    assert 'aria-label="a &amp; b"' in plot.svg()
