"""Hooks of mkdocs: pages of the site that lie outside `docs/`, and links that lead there.

A document links to others as they lie in the repository. On the site, links to its pages become links between pages,
and links to anything else, such as source files, become plain text.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = ("CONTRIBUTING.md", "configs/*.md", "benchmarks/results/*.md", "t2i_align/assets/*.md", "notebooks/*.ipynb")
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")


@event_priority(100)  # before the plugin that looks for notebooks
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside that the navigation names."""
    named = str(config.nav)
    for file in (file for pattern in OUTSIDE for file in sorted(ROOT.glob(pattern))):
        if (uri := file.relative_to(ROOT).as_posix()) in named:
            files.append(File(uri, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **_: Any) -> str:
    """Links between pages, wherever their files lie."""
    assert page.file.abs_src_path
    here = Path(page.file.abs_src_path).parent
    uris = {file.abs_src_path: file.src_uri for file in files}

    def changed(link: re.Match[str]) -> str:
        text, target, anchor = link.groups()
        if re.match(r"\w+:", target):
            return link[0]
        uri = uris.get(os.path.normpath(here / target))
        if uri is None:
            return text
        return f"[{text}]({posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or '.')}{anchor or ''})"

    return LINK.sub(changed, markdown)
