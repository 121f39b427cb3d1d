"""The README's numbers are those of results/, and every file it links to exists."""

import re
from pathlib import Path

import pytest

from dmsae_lib.artifacts import repository_root
from dmsae_lib.readme import BEGIN, END, current_block

ROOT = repository_root(Path(__file__).parent)
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_block_is_what_the_published_results_give():
    if not (ROOT / "results" / "default" / "summary.json").is_file():
        pytest.skip("results/default is not published in this tree")
    written = TEXT[TEXT.index(BEGIN) : TEXT.index(END) + len(END)]
    assert written == current_block(ROOT), "run `make publish`, or put the README's results block back"


def test_links_lead_somewhere():
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", TEXT) if not t.startswith("http")]
    if not (ROOT / "results" / "default").is_dir():
        targets = [t for t in targets if not t.startswith(("results/", "figures/"))]
    missing = [t for t in targets if not (ROOT / t).exists()]
    assert len(targets) >= 3 and not missing


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([a-z-]+)", TEXT, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"README names make {target}"
