"""For mkdocs: links from the pages to files outside of docs/, such as ../models/qpwc_fast.md, work in the site.

Such a file becomes part of the site below repository/, a Markdown file as a page, whose links are treated
alike. In the repository itself all links stay as they are.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = "repository/"
# [text](target) and ![text](target "title"), but nothing in code blocks or spans.
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?(?:\s+\"[^\"]*\")?\))")
_CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`|^ {4}[^\n]*$)", re.MULTILINE | re.DOTALL)


def in_site(path: str) -> str:
    """A file's place in the site, by its place in the repository."""
    return path.removeprefix("docs/") if path.startswith("docs/") else OUTSIDE + path


def in_repository(path: str) -> str:
    """The inverse of `in_site`."""
    return path.removeprefix(OUTSIDE) if path.startswith(OUTSIDE) else f"docs/{path}"


def target(page: str, link: str) -> str | None:
    """The file in the repository that a page there (by its place) links to; None if it is no such link."""
    if re.match(r"[a-z]+:", link) or link.startswith("/"):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    return path if not path.startswith("..") and (ROOT / path).is_file() else None


def outside_code(text: str, change) -> str:
    """The text with `change` applied to all that is not code."""
    return "".join(part if number % 2 else change(part) for number, part in enumerate(_CODE.split(text)))


def rewritten(page: str, text: str) -> str:
    """A page's text with its links as they are in the site."""

    def link(match: re.Match) -> str:
        path = target(page, match[2])
        if path is None:
            return match[0]
        return match[1] + posixpath.relpath(in_site(path), posixpath.dirname(in_site(page)) or ".") + match[3]

    return outside_code(text, lambda part: _LINK.sub(link, part))


def linked(page: str, text: str) -> set[str]:
    """The files outside of docs/ that a page links to."""
    found: set[str] = set()

    def collect(part: str) -> str:
        paths = {target(page, match[2]) for match in _LINK.finditer(part)}
        found.update(path for path in paths if path and not path.startswith("docs/"))
        return part

    outside_code(text, collect)
    return found


def on_files(files: Files, config) -> Files:
    """Add what the pages link to, and what that links to."""
    pages = [(in_repository(f.src_uri), f.content_string) for f in files.documentation_pages()]
    known: set[str] = set()
    while pages:
        page, text = pages.pop()
        for path in sorted(linked(page, text) - known):
            known.add(path)
            # Not in the navigation, and no warning because of that.
            inclusion = InclusionLevel.NOT_IN_NAV
            files.append(
                File.generated(config, in_site(path), abs_src_path=str(ROOT / path), inclusion=inclusion)
            )
            if path.endswith(".md"):
                pages.append((path, (ROOT / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Rewrite the links of a page."""
    return rewritten(in_repository(page.file.src_uri), markdown)
