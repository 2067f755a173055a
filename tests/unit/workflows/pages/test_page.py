import subprocess
import sys

import pytest

from protlm.workflows.pages.figures import Svg
from protlm.workflows.pages.page import Figure, KeyValues, Page, Section, Table, Text, Warnings, render
from tests.unit.workflows.pages.html_page import ReadPage, assert_distinct_ids, assert_self_contained, rows_of

EVIL = "<script>alert('x')</script>&\"'"


def page_of(*blocks, summary=()):
    return render(Page("Title", "Subtitle", summary, [Section("first", "First section", blocks)]))


def test_a_page_has_a_language_a_title_and_headings_in_order_with_a_link_to_each():
    sections = [Section("a", "Section A", [Text("one")]), Section("b-2", "Section B", [])]
    page = render(Page("Some title", "Some subtitle", [Text("zero")], sections))
    read = ReadPage(page)
    assert ("html", {"lang": "en"}) in read.tags
    assert [tag for tag, _ in read.tags if tag in ("h1", "h2", "h3")] == ["h1", "h2", "h2"]
    links = [attributes["href"] for tag, attributes in read.tags if tag == "a"]
    assert links == ["#summary", "#a", "#b-2"]
    assert [word for word in read.words if word in ("Some title", "zero", "one")] == [
        *["Some title"] * 2,
        "zero",
        "one",
    ]
    assert page.startswith("<!DOCTYPE html>")


def test_a_page_needs_no_other_file_and_no_script():
    page = page_of(Text("x"))
    assert_self_contained(page)
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_all_text_is_escaped():
    table = Table((EVIL, "b"), [(EVIL, EVIL)], caption=EVIL)
    blocks = [Text(EVIL), Text(f"`{EVIL}` **{EVIL}**"), table, Warnings([EVIL]), KeyValues([(EVIL, EVIL)]),
              Figure(Svg("<svg></svg>"), EVIL, table)]  # fmt: skip
    read = ReadPage(render(Page(EVIL, EVIL, blocks, [Section("a", EVIL, blocks)])))
    assert "script" not in {tag for tag, _ in read.tags}
    assert read.words.count(EVIL) == 2 * 15 + 5  # the blocks twice; title twice, subtitle, heading and its link


def test_code_and_strong_text_are_marked():
    assert "<p>Run <code>a &lt;b&gt;</code>, <strong>now</strong>; 2 * 3 ** 4 `</p>" in page_of(
        Text("Run `a <b>`, **now**; 2 * 3 ** 4 `")
    )


def test_a_table_has_columns_of_their_kinds_and_strong_rows():
    table = Table(("model", "score", "hash"), [("a", "1", "ff"), ("b", "2", "ee")], ("text", "number", "code"),
                  caption="Scores", strong_rows=[1])  # fmt: skip
    page = page_of(table)
    assert rows_of(page) == [["a", "1", "ff"], ["b", "2", "ee"]]
    assert '<tr class="strong"><td class="text">b</td><td class="number">2</td><td class="code">ee</td>' in page
    assert '<p class="caption" aria-hidden="true">Scores</p>\n<div class="scroll"><table aria-label="Scores">' in page
    assert '<th scope="col" class="number">score</th>' in page
    assert page.count("strong") - page.count("tr.strong") == 1


def test_columns_are_by_default_a_text_and_numbers():
    assert Table(("a", "b", "c"), []).kinds == ("text", "number", "number")


@pytest.mark.parametrize(
    ("header", "rows", "kinds"),
    [(("a", "b"), [("1",)], ()), (("a",), [("1", "2")], ()), (("a",), [("1",)], ("text", "text"))],
)
def test_a_table_with_rows_of_another_length_is_refused(header, rows, kinds):
    with pytest.raises(ValueError, match="expected one length"):
        Table(header, rows, kinds)


def test_a_figure_has_its_reading_and_its_numbers():
    page = page_of(Figure(Svg("<svg></svg>"), "It is `5`.", Table(("x",), [("5",)])))
    figure = page[page.index("<figure>") : page.index("</figure>")]
    assert "<figcaption>It is <code>5</code>.</figcaption>" in figure
    assert figure.index("<svg>") < figure.index("<details>") < figure.index("<td")
    assert "<details>" not in page_of(Figure(Svg("<svg></svg>"), "x"))


def test_no_warnings_leave_no_box():
    assert '<ul class="warnings">' in page_of(Warnings(["a"]))
    assert '<ul class="warnings">' not in page_of(Warnings([]))


def test_without_a_summary_there_is_no_link_to_it():
    assert "#summary" not in page_of(Text("x"))
    assert_distinct_ids(page_of(Text("x"), summary=[Text("y")]))


@pytest.mark.parametrize("ids", [("a", "a"), ("summary",), ("A b",), ("",)])
def test_an_id_that_no_link_can_have_is_refused(ids):
    with pytest.raises(ValueError, match="section id"):
        render(Page("t", "s", [], [Section(id_, "x", []) for id_ in ids]))


def test_neither_jinja_nor_matplotlib_is_imported_before_a_page_is_made():
    code = (
        "import sys, protlm.workflows.prep.prepare, protlm.workflows.pages.page, protlm.workflows.pages.figures\n"
        "sys.exit(', '.join({'matplotlib', 'jinja2', 'markupsafe'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr == "\n"
