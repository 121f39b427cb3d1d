"""The pages: what they link to is there, what they call exists, and the README stays two screens long."""

import re
from pathlib import Path

import pytest

from dmsae_lib.config import RunConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "results/*/*.md", "figures/*/*.md")
    for path in ROOT.glob(pattern)
)
NAMED = [str(path.relative_to(ROOT)) for path in PAGES]


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=NAMED)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        # an address within an atlas is made by its script
        if not there.exists() or anchor and there.suffix != ".html" and anchor not in anchors(there):
            wrong.append(target)
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=NAMED)
def test_commands_exist(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    called = re.findall(r"(?:^|`)make ([a-z][a-z-]+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert not [name for name in called if not re.search(rf"^{name}:", makefile, flags=re.MULTILINE)]


@pytest.mark.parametrize("page", PAGES, ids=NAMED)
def test_modules_and_settings_that_are_named_exist(page):
    """A module by its path; what is in backquotes with a section's name before it is a setting."""
    text = page.read_text(encoding="utf-8")
    assert not [name for name in re.findall(r"dmsae_lib/[\w/]+\.py", text) if not (ROOT / name).is_file()]
    named = re.findall(r"`((?:model|data|sae|training|distill|retrain|saebench)(?:\.[a-z_]+)+)\b", text)
    assert not [name for name in named if name.split(".")[-1] != "py" and not is_setting(name)]


def is_setting(name: str) -> bool:
    model = RunConfig
    for part in name.split("."):
        fields = getattr(model, "model_fields", None)
        if fields is None:
            return True  # a name of the user's own, as in retrain.imported.theirs
        if part not in fields:
            return False
        model = fields[part].annotation
    return True


def test_the_readme_is_two_screens():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_page_of_docs_is_reached_from_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {path for path in NAMED if path.startswith("docs/")} <= set(re.findall(r"\]\(([^)]+)\)", text))
