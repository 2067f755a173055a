"""Numbers of a report with their intervals, as its page shows them in cells and draws them."""

from collections.abc import Mapping
from typing import Any


def with_interval(row: Mapping[str, Any], metric: str) -> str:
    """Returns a metric with its interval in parentheses, if it has one."""
    value, low, high = (row[f"{metric}{suffix}"] for suffix in ("", "_low", "_high"))
    if value is None:
        return "–"
    digits = 2 if metric == "perplexity" else 3
    if low is None or high is None:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def span(row: Mapping[str, Any], metric: str) -> tuple[float, float]:
    """Returns how far the interval of a metric reaches below and above it; nothing without one."""
    value, low, high = (row[f"{metric}{suffix}"] for suffix in ("", "_low", "_high"))
    # A percentile of replicates need not lie on its own side of the value.
    return (0.0, 0.0) if None in (value, low, high) else (max(0.0, value - low), max(0.0, high - value))
