"""The pages in docs/ and the README: their code runs, their links lead somewhere, their numbers are those measured."""

import ast
import importlib
import inspect
import json
import pkgutil
import re
import runpy

import pytest
import torch

import hpcloss
from hpcloss import compat
from tests.tools.cases import ROOT
from tests.tools.documents import EXCERPT, blocks, headings, links, run

PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
EVERY = ["README.md", "CONTRIBUTING.md", "examples/README.md", "hpcloss/DESIGN.md", *PAGES]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of torch's own compiler
@pytest.mark.filterwarnings("ignore:.*does not have many workers")  # Lightning's, of so small a training
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")  # Lightning's own call of torch
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_the_code_of_a_page_runs(page, capsys):
    """Pages state what comes out as assertions."""
    for package in ("monai", "lightning"):
        if any(re.search(rf"^(from|import) {package}\b", block, re.MULTILINE) for block in blocks(page)):
            pytest.importorskip(package)
    names = run(page)
    for name, value in names.items():
        if isinstance(value, torch.Tensor) and value.is_leaf and value.grad is not None:
            assert value.grad.isfinite().all(), name


def test_the_code_of_the_readme_runs():
    features, labels = torch.randn(2, 64, 32, 32), torch.randint(4, (2, 32, 32))
    network = torch.nn.Sequential()
    network.add_module("body", torch.nn.Conv2d(1, 16, 3, padding=1))
    network.add_module("classify", torch.nn.Conv2d(16, 4, 1))
    names = run(
        "README.md",
        torch=torch,
        hpcloss=hpcloss,
        features=features,
        labels=labels,
        height=32,
        width=32,
        supcon=lambda x, y: hpcloss.region_supcon_loss(x, y, None, background=None),
        network=network,
        batches=[(torch.randn(2, 1, 32, 32), labels)] * 2,
    )
    before = torch.stack(names["losses"]).mean()
    after = hpcloss.region_supcon_loss(features, labels, 16, reduction="region", background=None)
    torch.testing.assert_close(after, before)
    assert names["loss"] > 0 and any(p.grad.abs().sum() > 0 for p in names["head"].parameters())


@pytest.mark.parametrize(
    "page, block",
    [(page, block) for page in PAGES for block in blocks(page) if block.startswith(f"{EXCERPT} of examples/")],
)
def test_an_excerpt_stands_in_its_file(page, block):
    """Line by line, in this order; indentation may differ."""
    first, *lines = block.splitlines()
    source = iter([line.strip() for line in (ROOT / first.rpartition(" ")[2]).read_text(encoding="utf-8").splitlines()])
    missing = [line for line in lines if line.strip() not in source]
    assert not missing


def test_the_losses_with_statistics_are_those_that_are_named():
    text = (ROOT / "docs/getting_started.md").read_text(encoding="utf-8")
    (paragraph,) = [part for part in text.split("\n\n") if "return_stats=True" in part and "host" in part]
    losses = [thing for name, thing in vars(hpcloss).items() if name.endswith("Loss")]
    having = {loss.__name__ for loss in losses if "return_stats" in inspect.signature(loss.forward).parameters}
    assert set(re.findall(r"`(\w+Loss)`", paragraph)) == having


LOSS_PAGES = [page for page in PAGES if re.match(r"docs/losses/(?!index)", page)]


@pytest.mark.parametrize("page", LOSS_PAGES)
def test_the_page_of_a_loss_has_its_defaults_and_its_options(page):
    """Each row of its table is the signature's, each option that its text writes as name=value is one of the loss."""
    text = (ROOT / page).read_text(encoding="utf-8")
    loss = getattr(hpcloss, re.search(r"^::: hpcloss\.(\w+)$", text, re.MULTILINE)[1])
    parameters = inspect.signature(loss).parameters
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ([^|]+) \|", text.partition("\n## Defaults")[2], re.MULTILINE)
    assert rows
    for names, values in rows:
        for name, value in zip(re.findall(r"\w+", names), values.split(", "), strict=True):
            assert parameters[name].default == ast.literal_eval(value.strip("`")), name
    needed = {"num_classes": 4} if "num_classes" in parameters else {}
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for name, value in re.findall(r"`(\w+)=([^`(]+)`", prose):
        loss(**{**needed, name: ast.literal_eval(value)})  # raises for an option or a value that is not there


@pytest.mark.parametrize("page", EVERY)
def test_links_lead_somewhere(page):
    for link in links(page):
        path, _, heading = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if heading:
            assert heading in headings(target.resolve().relative_to(ROOT).as_posix()), link


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    assert {page.removeprefix("docs/") for page in PAGES} <= set(re.findall(r"\S+\.md$", menu, re.MULTILINE))


def test_every_public_name_is_in_the_api():
    """By a line of mkdocstrings, `::: hpcloss.name`, on some page."""
    found = {name for page in PAGES for name in re.findall(r"^::: (\S+)$", (ROOT / page).read_text(), re.MULTILINE)}
    expected = {f"hpcloss.{name}" for name in set(hpcloss.__all__) - {"__version__"}}
    for library in compat.__all__:
        module = importlib.import_module(f"hpcloss.compat.{library}")
        own = [thing for name, thing in vars(module).items() if not name.startswith("_") and inspect.isclass(thing)]
        expected |= {f"{module.__name__}.{cls.__name__}" for cls in own if cls.__module__ == module.__name__}
    assert not expected - found
    for name in found:
        pkgutil.resolve_name(name)  # raises where there is none


# ------------------------------------------------------------------------------------------------------- picture


@pytest.fixture(scope="module")
def drawing():
    return runpy.run_path(str(ROOT / "docs/draw.py"))


def test_the_picture_is_that_of_its_script(drawing):
    assert (ROOT / "docs/partition.svg").read_text(encoding="utf-8") == drawing["picture"]()


def test_the_pairs_of_the_picture(drawing):
    """What the intervals say of each pair is what labels, regions and identity say of its two pixels."""
    pairs, labels = drawing["plan"](), drawing["LABELS"]
    region = (torch.arange(labels.shape[1]) // drawing["REGION_SIZE"]).expand(labels.shape).reshape(-1)[pairs.order]
    label = labels.reshape(-1)[pairs.order]
    met = (region[:, None] == region) & (label != drawing["IGNORED"]) & ((label > 0) & (label < 255))[:, None]
    same = label[:, None] == label
    expected = torch.where(met, torch.where(same, drawing["POSITIVE"], drawing["NEGATIVE"]), drawing["NOTHING"])
    expected[met & torch.eye(len(label), dtype=torch.bool)] = drawing["SELF"]
    assert torch.equal(drawing["relations"](pairs), expected)


# ------------------------------------------------------------------------------------------------------- numbers

FIGURES = re.findall(r"^\| `(bench_[^`]+)` \| `([^`]+)` \| ([^|]+) \|", (ROOT / "docs/benchmarks.md").read_text(), re.M)


def test_numbers_are_in_the_results():
    """A row of the page names a benchmark, its figure and the value, rounded as it stands there."""
    measured = {row["name"]: row for row in json.loads((ROOT / "benchmarks/results/cpu.json").read_text())["rows"]}
    assert FIGURES
    for name, figure, text in FIGURES:
        value = text.split()[0]
        digits = len(value.partition(".")[2])
        assert f"{measured[name][figure]:.{digits}f}" == value, name
