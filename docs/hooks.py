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
SOURCE_OF = {page: source for source, page in SHOWN.items()}
PICTURES = ("benchmarks/results/**/*.png", "benchmarks/results/**/*.svg")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s:]+)\)")


@event_priority(100)  # before the plugin that turns notebooks into pages
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the documents, and the pictures that pages show."""
    found = {page: ROOT / source for source, page in SHOWN.items() if page != "index.md"}
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
    folder = posixpath.dirname(SOURCE_OF.get(here, f"docs/{here}"))

    def moved(match: re.Match[str]) -> str:
        picture, text, link = match.groups()
        path, mark, heading = link.partition("#")
        if not path:
            return match[0]
        target = posixpath.normpath(posixpath.join(folder, path))
        inside = SHOWN.get(target, target.removeprefix("docs/"))
        if files.get_file_from_path(inside):
            return f"{picture}[{text}]({posixpath.relpath(inside, posixpath.dirname(here) or '.')}{mark}{heading})"
        if not (ROOT / target).exists():
            return match[0]  # the strict build says so
        return f"[{text}]({config.repo_url}/blob/main/{target}{mark}{heading})" if config.repo_url else text

    return LINK.sub(moved, markdown)
