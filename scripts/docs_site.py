"""Which files outside docs/ are on the documentation site, and where: MkDocs calls this on every build (mkdocs.yml).

README.md is the first page. Every file of the project that a page links to comes along below project/, and the links
are turned to where it went, so that the same relative links work on a code host and on the site.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(?<=\]\()(?!https?://|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the README and, page after page, the files outside docs/ that pages link to."""
    waiting = ["README.md", *(_project_path(file.src_uri) for file in files.documentation_pages())]
    while waiting:
        path = waiting.pop()
        if files.get_file_from_path(_site_path(path)) is None:
            files.append(File.generated(config, _site_path(path), abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            text = (ROOT / path).read_text(encoding="utf-8")
            linked = {_linked_path(path, target) for target in _LINK.findall(text)}
            waiting += sorted(linked_path for linked_path in linked if _is_to_be_added(linked_path, files))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Returns the page with its links turned to where the files are on the site."""
    path = _project_path(page.file.src_uri)

    def turned(match: re.Match[str]) -> str:
        site_path = _site_path(_linked_path(path, match[1]))
        if files.get_file_from_path(site_path) is None:
            return match[1]
        return posixpath.relpath(site_path, posixpath.dirname(page.file.src_uri) or ".")

    return _LINK.sub(turned, markdown)


def _is_to_be_added(path: str, files: Files) -> bool:
    return (ROOT / path).is_file() and not path.startswith("../") and files.get_file_from_path(_site_path(path)) is None


def _linked_path(path: str, target: str) -> str:
    """Returns the path, from the project's folder, of what a document at `path` links to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), target))


def _site_path(path: str) -> str:
    """Returns where a file of the project stands among the sources of the site."""
    if path == "README.md":
        return "index.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"project/{path}"


def _project_path(site_path: str) -> str:
    """Returns the file of the project that stands at a place among the sources of the site."""
    if site_path == "index.md":
        return "README.md"
    return site_path.removeprefix("project/") if site_path.startswith("project/") else f"docs/{site_path}"
