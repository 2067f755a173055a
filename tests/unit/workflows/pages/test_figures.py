import os
import re
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest

from protlm.workflows.pages.figures import draw, heat_map, matrix
from protlm.workflows.pages.page import Figure, Page, Section, render
from protlm.workflows.pages.palette import LIGHT, MODEL_MARKS, SPLIT_MARKS
from tests.unit.workflows.pages.html_page import assert_distinct_ids, assert_self_contained


def plot_everything(figure):
    left, middle, right = figure.subplots(1, 3)
    left.bar(range(3), [1, 2, 3], label="<b> & $x", **SPLIT_MARKS["valid"].bars)
    left.errorbar([0, 1], [1, 2], yerr=0.2, **MODEL_MARKS[0].points)
    left.set_xlabel("length, residues")
    left.legend()
    middle.pcolormesh(np.arange(9.0).reshape(3, 3), cmap=heat_map())
    middle.set_title("bold", fontweight="bold")
    right.imshow(np.eye(3), cmap=heat_map(diverging=True))


@pytest.fixture(scope="module")
def svg():
    return draw(plot_everything, 'A "label" of <everything>')


def test_a_figure_is_an_image_with_a_label_that_takes_the_width_there_is(svg):
    root = ElementTree.fromstring(svg)
    assert root.tag == "svg"
    assert root.attrib.keys() == {"viewBox", "style", "role", "aria-label"}
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"] == 'A "label" of <everything>'


def test_text_stays_text_in_the_font_of_the_page(svg):
    texts = ["".join(element.itertext()) for element in ElementTree.fromstring(svg).iter("text")]
    assert {"length, residues", "<b> & $x", "bold"} <= set(texts)
    assert "font-family" not in svg
    assert "font:" not in svg


def test_a_letter_that_the_font_of_matplotlib_lacks_is_the_readers_affair():
    # Warnings are errors here.
    assert "蛋白质" in draw(lambda figure: figure.text(0, 0, "蛋白质"), "x")


def test_colours_are_those_of_the_readers_mode(svg):
    assert not re.search('[ "]#[0-9a-f]{6}', re.sub('href="#', "", svg))
    for role in ("ink", "soft", "rule", "valid", "model-1", "heat-0", "heat-16"):
        assert f"var(--{role})" in svg


def test_any_other_colour_is_kept():
    svg = draw(lambda figure: figure.subplots().plot([1, 2], color="#123456"), "x")
    assert "#123456" in svg


def test_the_same_drawing_gives_the_same_bytes_whatever_the_reader_of_matplotlib_set(svg, monkeypatch):
    monkeypatch.setitem(mpl.rcParams, "font.size", 30)
    monkeypatch.setitem(mpl.rcParams, "axes.facecolor", "red")
    assert draw(plot_everything, 'A "label" of <everything>') == svg
    assert mpl.rcParams["font.size"] == 30
    assert mpl.rcParams["axes.facecolor"] == "red"


def test_two_figures_on_a_page_share_no_name_and_load_nothing(svg):
    figures = [Figure(svg, "a"), Figure(draw(plot_everything, "another"), "b")]
    page = render(Page("t", "s", [], [Section("a", "A", figures)]))
    assert_distinct_ids(page)
    assert_self_contained(page)
    assert "<image" in page
    assert "w3.org" not in page


def test_colours_of_a_scale_are_all_on_the_map():
    assert list(heat_map().colors) == [color for role, color in LIGHT.items() if role.startswith("heat-")]


def test_a_matrix_has_its_first_row_at_the_top_and_no_cell_for_nan():
    values = np.array([[0.0, 1.0], [2.0, np.nan]])
    svg = draw(lambda figure: matrix(figure.subplots(), values, "AC", "DE", label="share"), "x")
    root = ElementTree.fromstring(svg)
    height = {element.text: float(element.attrib["y"]) for element in root.iter("text") if element.text in ("A", "C")}
    assert height["A"] < height["C"]
    cells = re.findall(r'd="M (\S+) (\S+) [^"]*" [^>]*fill: var\(--heat-(\d+)\)', svg)[:3]
    assert [level for *_, level in cells] == ["0", "8", "16"]
    (x0, y0, _), (x1, y1, _), (x2, y2, _) = [tuple(map(float, cell)) for cell in cells]
    assert x0 == x2 < x1
    assert y0 == y1 < y2


def test_zero_is_the_middle_of_a_diverging_matrix():
    values = np.array([[0.0, -1.0, 4.0]])
    svg = draw(lambda figure: matrix(figure.subplots(), values, "A", "BCD", label="log-odds", diverging=True), "x")
    assert re.findall(r"fill: var\(--balance-(\d+)\)", svg)[:3] == ["8", "6", "16"]


def test_matplotlib_prints_nothing_where_it_has_no_folder_for_its_font_cache(tmp_path):
    (tmp_path / "file").touch()
    code = (
        "from protlm.workflows.pages.figures import draw\nimport logging\n"
        "print(draw(lambda figure: figure.subplots().plot([1, 2]), 'x')[:4], logging.getLogger('matplotlib').level)"
    )
    environment = os.environ | {"MPLCONFIGDIR": str(tmp_path / "file" / "none")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("<svg 0\n", "")
