"""Pages in a real browser: nothing fails, every figure is there, and nothing is wider than a telephone or a screen."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from protlm.cli.app import main
from protlm.data.storage.dataset import open_dataset
from protlm.workflows.pages.figures import draw, matrix
from protlm.workflows.pages.page import Figure, KeyValues, Page, Section, Table, Text, Warnings, render
from protlm.workflows.pages.palette import DARK, LIGHT, MODEL_MARKS, SPLIT_MARKS
from tests.unit.workflows.evaluate.eval_cases import save_new_model

pytestmark = pytest.mark.slow

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
    "--dump-dom",
]  # fmt: skip
PROBE = """
<script>
addEventListener("load", () => {
  const is_drawn = mark => {
    const box = mark.getBoundingClientRect(), style = getComputedStyle(mark);
    return box.width + box.height > 1 && !(style.fill === "none" && style.stroke === "none");
  };
  document.querySelectorAll("details").forEach(details => details.open = true);
  const letter_height = text => {
    const {a, b} = text.getScreenCTM();
    return parseFloat(getComputedStyle(text).fontSize) * Math.hypot(a, b);
  };
  const probe = {
    width: innerWidth,
    background: getComputedStyle(document.documentElement).backgroundColor,
    scrolled: document.documentElement.scrollWidth,
    wide: [...document.querySelectorAll("body *")]
      .filter(element => !element.parentElement.closest(".scroll"))
      .filter(element => element.getBoundingClientRect().right > innerWidth + 0.5)
      .map(element => element.outerHTML.slice(0, 80)),
    figures: [...document.querySelectorAll("figure svg")].map(svg => ({
      label: svg.getAttribute("aria-label"),
      width: svg.getBoundingClientRect().width,
      height: svg.getBoundingClientRect().height,
      marks: [...svg.querySelectorAll("path, use, image")].filter(is_drawn).length,
      ink: getComputedStyle(svg.querySelector("text")).fill,
      letters: Math.min(...[...svg.querySelectorAll("text")].map(letter_height)),
    })),
  };
  parent.postMessage(JSON.stringify(probe), "*");
});
</script>
"""
# A window is at least 500 pixels wide, a frame is as wide as it is told.
FRAME = """
<!DOCTYPE html><meta name="color-scheme" content="light dark"><pre id="probe"></pre>
<script>addEventListener("message", event => document.getElementById("probe").textContent = event.data)</script>
<iframe src="page.html" style="border: 0; width: WIDTHpx; height: 900px"></iframe>
"""


@pytest.fixture(scope="module")
def full_page():
    """A page with every kind of block, and content that is wider than any screen."""
    word = "x" * 300
    wide = Table([f"column {number}" for number in range(40)], [["1,234,567"] * 40], caption="A wide table")
    texts = Table(("name", "hash"), [(word, "0123456789abcdef" * 8)], ("text", "code"), strong_rows=[0])

    def plot_lines(figure):
        axes = figure.subplots()
        for name, mark in SPLIT_MARKS.items():
            axes.plot([0, 1, 2], np.arange(3) + len(name), label=name, **mark.line)
        axes.set(xlabel="step", ylabel="perplexity")
        axes.legend()

    def plot_matrix(figure):
        axes = figure.subplots()
        letters = "ACDEFGHIKLMNPQRSTVWY"
        matrix(axes, np.arange(-100.0, 300.0).reshape(20, 20), letters, letters, label="log-odds", diverging=True)
        axes.set(xlabel="predicted", ylabel="true")

    def plot_bars(figure):
        axes = figure.subplots()
        for place, mark in enumerate(MODEL_MARKS):
            axes.bar([place], [place + 1], **mark.bars)
        axes.set(xlabel="model", ylabel="accuracy")

    figures = [
        Figure(draw(plot_lines, "lines"), "Lines rise.", texts),
        Figure(draw(plot_matrix, "matrix", height=4), "A matrix.", wide),
        Figure(draw(plot_bars, "bars", width=7.2), f"Bars {word}."),
    ]
    blocks = [Text(word), Text(f"`{word}` **strong**", soft=True), wide, texts, Warnings([word, "short"])]
    pairs = KeyValues([("accuracy", "0.123"), (word, word)])
    sections = [Section("blocks", f"Blocks {word}", blocks), Section("figures", "Figures", figures)]
    return render(Page(f"A page {word}", word, [pairs], sections))


@pytest.fixture(scope="module")
def dataset_page(dataset):
    return (dataset / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def comparison_page(dataset, run_dir, tmp_path_factory):
    """The comparison of a run with a softmax model that never learned, on two splits."""
    folder = tmp_path_factory.mktemp("comparison")
    untrained = save_new_model(folder / ("<long> " + "x" * 200), attention="softmax")
    command = ["eval", "--compare", run_dir, untrained, dataset, "--split", "test", "--split", "valid", "--out", folder]
    assert main([str(word) for word in command]) == 0
    return (folder / "comparison.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def evaluation_page(tmp_path_factory, run_dir, dataset):
    """The page of an evaluation of two splits, with attention maps and the approximation."""
    out = tmp_path_factory.mktemp("evaluation")
    shown = open_dataset(dataset).split("test").id(0)
    options = ["--split", "test", "--split", "valid", "--attention", shown, "--approximation"]
    assert main(["eval", str(run_dir), str(dataset), *options, "--out", str(out / "report")]) == 0
    page = (out / "report" / "report.html").read_text(encoding="utf-8")
    for label in ("Attention maps of", "Error of the attention by head", "Perplexity by residues from the C-terminus"):
        assert label in page
    return page


def opened(page, folder, *, width, dark):
    """Opens a page, and returns its measurements by the probe; fails on anything that is printed on the console."""
    (folder / "page.html").write_text(page.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    path = folder / "frame.html"
    path.write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    options = [*OPTIONS, f"--user-data-dir={folder / 'profile'}", "--window-size=1500,1000"]
    options += ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run([BROWSER, *options, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    return json.loads(html.unescape(re.search('<pre id="probe">(.*?)</pre>', done.stdout)[1]))


def rgb(color):
    return f"rgb({', '.join(str(int(color[place : place + 2], 16)) for place in (1, 3, 5))})"


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1400])
@pytest.mark.parametrize("name", ["full_page", "dataset_page", "comparison_page", "evaluation_page"])
def test_a_page_is_whole_in_a_browser(request, tmp_path, name, width, dark):
    page = request.getfixturevalue(name)
    probe = opened(page, tmp_path, width=width, dark=dark)
    assert probe["width"] == width
    assert probe["wide"] == []
    assert probe["scrolled"] <= width
    colors = DARK if dark else LIGHT
    assert probe["background"] == rgb(colors["page"])
    assert len(probe["figures"]) == page.count("<figure>") > 1
    for figure in probe["figures"]:
        assert figure["marks"] > 10, figure
        assert figure["width"] >= 320, figure
        assert figure["height"] > 100, figure
        assert figure["letters"] >= 9, figure
        assert figure["ink"] in (rgb(colors["ink"]), rgb(colors["soft"])), figure


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")
def test_the_check_sees_an_error_and_a_wide_element(tmp_path):
    page = render(Page("t", "s", [Text("x")], []))
    wide = page.replace("</main>", '<div style="width: 500px">wide</div></main>')
    assert opened(wide, tmp_path, width=360, dark=False)["wide"] != []
    with pytest.raises(AssertionError, match="CONSOLE"):
        opened(page.replace("</main>", "</main><script>unknown()</script>"), tmp_path, width=360, dark=False)
