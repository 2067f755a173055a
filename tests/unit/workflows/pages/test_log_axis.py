import pytest
from matplotlib.figure import Figure

from protlm.workflows.pages.log_axis import log_ticks, set_log_scale, tick_labels


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (9, 26, [10, 15, 20, 25]),
        (3.2, 26, [5, 7, 10, 15, 20]),
        (0.016, 0.4, [0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3]),
        (20, 2000, [20, 50, 100, 200, 500, 1000, 2000]),
        (3, 100, [5, 10, 20, 50, 100]),
        (17.2, 19, [17.5, 18, 18.5, 19]),
        (1e-3, 300, [0.001, 0.01, 0.1, 1, 10, 100]),
    ],
)
def test_ticks_are_round_numbers(low, high, ticks):
    assert log_ticks(low, high) == ticks


@pytest.mark.parametrize("low", [1e-12, 0.03, 1.0, 17.3, 9e5])
@pytest.mark.parametrize("factor", [1.0001, 1.02, 1.3, 2, 3.1, 5, 12, 40, 300, 1e5, 1e14, 1e60])
def test_every_range_has_several_ticks_inside_it(low, factor):
    ticks = log_ticks(low, low * factor)
    assert 4 <= len(ticks) <= 11
    assert sorted(set(ticks)) == ticks
    assert low <= ticks[0] < ticks[-1] <= low * factor
    labels = tick_labels(ticks)
    assert len(set(labels)) == len(ticks)


def test_labels_of_one_axis_are_all_of_one_kind():
    assert tick_labels([0.001, 0.2, 15, 17.5, 1000, 200000]) == ["0.001", "0.2", "15", "17.5", "1,000", "200,000"]
    assert tick_labels([1e-4, 0.01, 3, 20]) == ["10⁻⁴", "10⁻²", "3·10⁰", "2·10¹"]
    assert tick_labels([1e6, 2.5e11]) == ["10⁶", "2.5·10¹¹"]


@pytest.mark.parametrize("which", ["x", "y"])
@pytest.mark.parametrize("values", [[5.0, 5.0], [1.0, 30.0], [0.2, 400.0]])
def test_an_axis_gets_the_ticks_of_what_it_shows(which, values):
    figure = Figure()
    axes = figure.add_subplot()
    axes.plot(*((values, [1, 2]) if which == "x" else ([1, 2], values)))
    set_log_scale(axes, which)
    figure.canvas.draw()
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    assert axis.get_scale() == "log"
    assert list(axis.get_majorticklocs()) == log_ticks(low, high)
    assert [label.get_text() for label in axis.get_ticklabels()] == tick_labels(log_ticks(low, high))
    assert len(axis.get_minorticklocs()) == 0
    assert 0 < low < min(values) <= max(values) < high
