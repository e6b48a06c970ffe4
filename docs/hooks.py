"""What the site shows from outside docs/: documents at the root, the notebook, and links to source files."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Where documents of the repository stand in the site.
SHOWN = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "hpcloss/DESIGN.md": "design.md",
    "examples/README.md": "examples.md",
    "examples/integrations/first_ten_minutes.ipynb": "first_ten_minutes.ipynb",
}
SOURCE_OF = {page: source for source, page in SHOWN.items() if page != "index.md"}
PICTURES = ("benchmarks/results/**/*.png", "benchmarks/results/**/*.svg")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s:]+)\)")
ANCHOR = re.compile(r'<a href="(?P<path>[^"#:]+\.(?:md|py|ipynb))"[^>]*>(?P<text>.*?)</a>')


@event_priority(100)  # before the plugin that turns notebooks into pages
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the documents, and the pictures that pages show."""
    found = {page: ROOT / source for page, source in SOURCE_OF.items()}
    for pattern in PICTURES:
        found |= {path.relative_to(ROOT).as_posix(): path for path in ROOT.glob(pattern)}
    for name, path in found.items():
        if path.name == name:  # the plugin of notebooks looks for the file in its folder
            files.append(File(name, str(path.parent), config.site_dir, config.use_directory_urls))
        else:
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links follow their targets to where the site has them; those to source files need `repo_url`, or are text."""
    here = page.file.src_uri

    def moved(match: re.Match[str]) -> str:
        picture, text, link = match.groups()
        path, mark, heading = link.partition("#")
        if not path:
            return match[0]
        target, inside = _target(page, path)
        if files.get_file_from_path(inside):
            return f"{picture}[{text}]({posixpath.relpath(inside, posixpath.dirname(here) or '.')}{mark}{heading})"
        if not (ROOT / target).exists():
            return match[0]  # the strict build says so
        return f"[{text}]({config.repo_url}/blob/main/{target}{mark}{heading})" if config.repo_url else text

    return LINK.sub(moved, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The same for a notebook, which its plugin reads from the file and renders by itself."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html

    def moved(match: re.Match[str]) -> str:
        text, path = match["text"], match["path"]
        target, inside = _target(page, path)
        file = files.get_file_from_path(inside)
        if file is not None:
            return f'<a href="{file.url_relative_to(page.file)}">{text}</a>'
        return f'<a href="{config.repo_url}/blob/main/{target}">{text}</a>' if config.repo_url else text

    return ANCHOR.sub(moved, html)


def _target(page: Page, path: str) -> tuple[str, str]:
    """Where a page's link leads: in the repository, and in the site if it is there."""
    here = page.file.src_uri
    folder = posixpath.dirname(SOURCE_OF.get(here, f"docs/{here}"))
    target = posixpath.normpath(posixpath.join(folder, path))
    return target, SHOWN.get(target, target.removeprefix("docs/"))
