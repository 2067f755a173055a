"""The picture of a scan: its size follows from the protein, what it shows from the scores."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from protlm.inference.blosum import STANDARD_RESIDUES
from protlm.workflows.score.heat_map import draw_heat_map, printable

PROTEIN = "MKVLAAGHWQEDRSTYPFNIC" * 11  # 231 residues


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, laid out but not written."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: figures.append(self) or path.write_bytes(b"x"))
    return figures


def scan(protein=PROTEIN):
    generator = np.random.default_rng(0)
    scores = generator.normal(-2, 1, (len(protein), 20))
    for position, letter in enumerate(protein):
        if letter in STANDARD_RESIDUES:
            scores[position, STANDARD_RESIDUES.index(letter)] = np.nan
    return scores


def test_every_cell_has_its_score_in_bands_of_a_hundred(drawn, tmp_path):
    scores = scan()
    draw_heat_map(tmp_path / "h.png", scores, PROTEIN, title="P1", offset=10)
    (figure,) = drawn
    *bands, _ = figure.axes
    assert [axes.get_xlim() for axes in bands] == [(10.5, 110.5), (110.5, 210.5), (210.5, 310.5)]
    shown = np.concatenate([axes.images[0].get_array().filled(np.nan) for axes in bands], axis=1)
    rows = [label.get_text() for label in bands[0].get_yticklabels()]
    assert sorted(rows) == sorted(STANDARD_RESIDUES)
    for position, letter in enumerate(PROTEIN):
        for row, mutant in enumerate(rows):
            expected = 0 if mutant == letter else scores[position, STANDARD_RESIDUES.index(mutant)]
            assert shown[row, position] == expected
    letters = "".join(text.get_text() for axes in bands for text in axes.texts)
    assert letters == PROTEIN
    dots = np.concatenate([axes.collections[0].get_offsets() for axes in bands])
    assert [(int(x) - 11, rows[int(y)]) for x, y in dots] == list(enumerate(PROTEIN))
    # Wild type and mutant are told apart by the sign of the colour scale.
    low, high = bands[0].images[0].get_clim()
    assert low == -high < 0
    red, _, blue, _ = (np.array(bands[0].images[0].cmap(place)) for place in (0.0, 0.5, 1.0, np.nan))
    assert red[0] > red[2]
    assert blue[2] > blue[0]
    grey = bands[0].images[0].cmap(np.ma.masked_invalid([np.nan]))[0, :3]
    assert np.ptp(grey) < 0.1


@pytest.mark.parametrize(
    ("name", "shown"), [("a$b$_c", "a$b$_c"), ("a\tb\x00é本", "a?b???"), ("x" * 99, "x" * 57 + "...")]
)
def test_an_id_of_anything_is_a_title(name, shown, tmp_path):
    assert printable(name) == shown
    # A character that the font lacks would be a warning, a formula that is none an error.
    draw_heat_map(tmp_path / "h.png", scan("MK"), "MK", title=printable(name), offset=0)


def test_one_residue_all_equal_scores_and_unknown_letters_are_drawn(drawn, tmp_path):
    for protein, scores in (("M", scan("M")), ("MX", np.zeros((2, 20))), ("MX", np.full((2, 20), np.nan))):
        draw_heat_map(tmp_path / "h.svg", scores, protein, title="P1", offset=0)
    assert len(drawn) == 3


@pytest.mark.parametrize(("num_residues", "most_pixels"), [(300, (1700, 1400)), (1000, (1700, 4000))])
def test_it_is_readable_at_usual_lengths(num_residues, most_pixels, tmp_path):
    """A cell has ten pixels and more either way, and a letter stands over each column."""
    protein = (PROTEIN * 5)[:num_residues]
    path = tmp_path / "h.png"
    draw_heat_map(path, scan(protein), protein, title="P1", offset=0)
    content = path.read_bytes()
    width, height = (int.from_bytes(content[start : start + 4]) for start in (16, 20))
    assert 100 * 10 < width <= most_pixels[0]
    assert 20 * 10 * num_residues / 100 < height <= most_pixels[1]
