"""Logarithmic axes that can be read: hides which values get a tick, so that an axis of any range has several."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MANTISSAS = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
"""The ticks within a power of ten, from few to many."""
_FEWEST_TICKS, _MOST_TICKS = 5, 9
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def set_log_scale(axes: "Axes", which: Literal["x", "y"]) -> None:
    """Makes an axis logarithmic, after everything is plotted, with ticks over the range that it shows."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}scale": "log"})
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    ticks = log_ticks(low, high)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FixedFormatter(tick_labels(ticks)))
    axis.set_minor_locator(NullLocator())


def log_ticks(low: float, high: float) -> list[float]:
    """Returns round numbers between two positive numbers, four to nine where the range allows it."""
    for mantissas in _MANTISSAS:
        ticks = _ticks(low, high, mantissas)
        if len(ticks) >= _FEWEST_TICKS:
            # Only whole powers of ten become too many.
            return ticks[:: math.ceil(len(ticks) / _MOST_TICKS)]
    # Less than a factor of about three: even steps, as on a linear axis.
    step = 10.0 ** math.floor(math.log10(high - low))
    steps = (step * factor for factor in (1, 0.5, 0.2, 0.1))
    return next(ticks for ticks in (_multiples(low, high, step) for step in steps) if len(ticks) >= _FEWEST_TICKS - 1)


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Returns the numbers as they are written or, where one of them has too many digits, all as powers of ten."""
    if all(1e-3 <= tick < 1e6 for tick in ticks):
        return [f"{tick:,.10g}" for tick in ticks]
    return [_power_of_ten(tick) for tick in ticks]


def _power_of_ten(value: float) -> str:
    mantissa, _, exponent = f"{value:.9e}".partition("e")
    power = f"10{str(int(exponent)).translate(_SUPERSCRIPTS)}"
    return power if float(mantissa) == 1 else f"{float(mantissa):g}·{power}"


def _ticks(low: float, high: float, mantissas: tuple[float, ...]) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = (float(f"{mantissa}e{power}") for power in powers for mantissa in mantissas)
    return [tick for tick in ticks if low <= tick <= high]


def _multiples(low: float, high: float, step: float) -> list[float]:
    return [float(f"{number * step:.12g}") for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
