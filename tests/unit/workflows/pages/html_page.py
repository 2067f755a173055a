"""A reader of the pages that protlm writes, as strict as a test has to be."""

import re
from html.parser import HTMLParser


class ReadPage(HTMLParser):
    """The words and the tags of a page, all of which must be closed in order."""

    def __init__(self, page):
        super().__init__()
        self.words, self.tags, self.open = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.words.append(text.strip())

    @property
    def ids(self):
        return [attributes["id"] for _, attributes in self.tags if "id" in attributes]


def rows_of(page):
    """Returns the cells of all rows of all tables, as they are written."""
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr[^>]*>(.*?)</tr>", page) if "<td" in row]


def assert_self_contained(page):
    """Fails if a page has a script, or loads anything."""
    read = ReadPage(page)
    assert not {tag for tag, _ in read.tags} & {"script", "link", "img", "iframe", "object", "base", "form"}
    for _, attributes in read.tags:
        assert all(value.startswith(("#", "data:")) for name, value in attributes.items() if name in ("href", "src"))
    assert not re.search(r"https?:|url\((?!#)|@import|\son\w+=", page)


def assert_distinct_ids(page):
    """Fails if two elements have one id, or a reference leads nowhere."""
    read = ReadPage(page)
    assert len(read.ids) == len(set(read.ids))
    assert set(re.findall(r'url\(#(.+?)\)|href="#(.+?)"', page)) <= {(name, "") for name in read.ids} | {
        ("", name) for name in read.ids
    }
