"""Cores pushed into folders and, by the real Hub client, to a Hub on this machine; what the card says."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import mean

import jinja2
import pytest
import torch
from builders import factory, tiny_core
from builders.hub import hub
from builders.tiny_core import rewrite
from huggingface_hub import ModelCard

from dmsae_lib.config.run import Run
from dmsae_lib.distill.core_export import export_core
from dmsae_lib.distill.core_format import load_core
from dmsae_lib.report.card import model_card, push_core
from dmsae_lib.report.summary import write_summary
from dmsae_lib.store.artifacts import UserError, write

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
TOKEN = "hf_thisIsNobodysToken"
CYCLES = tiny_core.CYCLES


@pytest.fixture(scope="module")
def run(tiny_llama, tmp_path_factory) -> Run:
    return tiny_core.build_run(tmp_path_factory.mktemp("a clone"), tiny_llama)


@pytest.fixture
def folder(run, tmp_path) -> Path:
    return export_core(run, tmp_path / "a core")


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory) -> dict:
    """A summary whose numbers follow from the factory's formulas."""
    config = factory.config(CYCLES, ks=(24, 48, 64, 80), seeds=(0, 1), controls={})
    run = factory.build_run(tmp_path_factory.mktemp("synthetic"), config, scored=False)
    return json.loads((write_summary(run) / "summary.json").read_text())


def results_of(run: Run, summary: dict, folder: Path, core: str = "") -> Path:
    """A results folder of ``run``, or of a run with another last core."""
    last = f"cycle_{CYCLES}/core"
    core = core or json.loads((run.cycle(CYCLES, "core") / "manifest.json").read_text())["hash"]
    with write(folder, "summary", {last: core}) as writer:
        writer.circumstances["stages"] = {}
        writer.json("summary.json", summary)
    return folder


def code_of(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)[1]


# Into a folder


def test_into_a_folder_and_back(folder, tmp_path):
    target = tmp_path / "shared" / "core"
    assert push_core(folder, str(target), licence="mit") == str(target)
    there, here = load_core(str(target)), load_core(folder)
    assert torch.equal(there.W_enc, here.W_enc) and there.record == here.record
    assert {path.name for path in target.iterdir()} == {"core.json", "core.safetensors", "README.md"}
    push_core(target, target, licence="mit")  # a card for the core that lies there
    with pytest.raises(UserError, match="holds other files"):
        push_core(folder, tmp_path, licence="mit")


def test_what_is_damaged_is_not_pushed(folder, tmp_path):
    content = bytearray((folder / "core.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "core.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="core.safetensors does not match its hash"):
        push_core(folder, tmp_path / "target", licence="mit")
    assert not (tmp_path / "target").exists()


# The card


def test_the_cards_front_matter(folder, tmp_path):
    push_core(folder, tmp_path / "one", licence="cc-by-4.0")
    data = ModelCard.load(tmp_path / "one" / "README.md").data
    # a local model has no page
    assert (data.license, data.library_name, data.base_model) == ("cc-by-4.0", "dmsae", None)
    assert {"sparse-autoencoder", "dmsae-core", "arxiv:2512.24975"} <= set(data.tags)
    rewrite(folder, model=load_core(folder).record["model"] | {"name": "google/gemma-2-2b"})
    card = ModelCard(model_card(load_core(folder), "me/core", licence="gemma"))
    assert card.data.base_model == "google/gemma-2-2b"
    assert card.text.lstrip().startswith("# Distilled core of google/gemma-2-2b")


def test_a_licence_is_asked_for_unless_the_model_came_with_the_clone(folder):
    core = load_core(folder)
    with pytest.raises(UserError, match="tiny llama has terms of its own"):
        model_card(core)
    rewrite(folder, model=core.record["model"] | {"name": "wheeltext-4x128"})
    assert ModelCard(model_card(load_core(folder))).data.license == "mit"


def test_the_card_says_what_the_core_is(run, folder):
    core = load_core(folder)
    card, record = model_card(core, licence="mit"), core.record
    frequency = sum(latent.frequency for latent in core.latents)
    for fact in (
        f"| W_enc | (32, {len(core)}) float32 |",
        "| scale | 7.25:",
        "| hook | `blocks.0.hook_resid_post`",
        core.hash,
        "last_two, after cycle 2",
        "in each of 3 cycles",
        "80% of the attribution",
        "SAEs of 48 latents",
        "mean_abs, coverage 0.8, over 100 tokens (text: texts.jsonl)",
        record["model"]["hash"],
        record["parents"]["harvest"],
        f"{frequency:.1f} of its latents",
    ):
        assert fact in card, fact
    cycles = Counter(latent.id[1:].partition(":")[0] for latent in core.latents)
    assert f"| first selected in cycle | {', '.join(f'{t}: {cycles[t]}' for t in sorted(cycles))} |" in card
    assert "No results were given" in card and str(run.root) not in card and "{" not in card.split("```")[0]


def test_the_card_gives_the_runs_own_numbers(run, folder, synthetic, tmp_path):
    """Loss increase and FVU as the factory's formulas have them, and every verdict."""
    card = model_card(load_core(folder), "me/core", results_of(run, synthetic, tmp_path / "results"), "mit")
    table = [line.strip("| ").split(" | ") for line in card.splitlines() if line.count(" | ") == 6]
    rows = {(row[0], row[1]): row for row in table}
    for k in (64, 80):
        for arm in ("none", "distilled"):
            totals = [k * (1 + 0.005 * (seed - 1)) for seed in (0, 1)]
            expected = mean(factory.loss_increase(arm, L0, seed) for seed, L0 in enumerate(totals))
            seeds, *_, fvu, increase = rows[str(k), arm][2:]
            assert seeds == "2" and float(increase) == pytest.approx(expected, abs=6e-5)
            assert float(fvu) == pytest.approx(mean(factory.fvu(arm, L0) for L0 in totals), abs=6e-5)
    assert ("24", "distilled (unbound)") in rows and ("24", "none") in rows
    for name, claim in synthetic["claims"].items():
        assert f"| {name}: {claim['claim']} | **{claim['verdict']}** |" in card


def test_another_cores_results_are_refused(run, folder, synthetic, tmp_path):
    other = results_of(run, synthetic, tmp_path / "other", core="0" * 64)
    with pytest.raises(UserError, match="were not trained with this core"):
        model_card(load_core(folder), None, other, "mit")
    results = results_of(run, synthetic, tmp_path / "own")
    for changes in ({"reading": "all_of_last"}, {"cycle": 1}):
        part = load_core(export_core(run, tmp_path / "part", **changes))
        with pytest.raises(UserError, match="were not trained with this core"):
            model_card(part, None, results, "mit")


def test_the_template_is_given_all_that_it_names(run, folder, synthetic, tmp_path, monkeypatch):
    """jinja2 by itself writes nothing in the place of a name that it does not know."""
    monkeypatch.setattr(jinja2, "Template", partial(jinja2.Template, undefined=jinja2.StrictUndefined))
    results = results_of(run, synthetic, tmp_path / "results")
    for where, measured in ((None, None), ("me/core", results)):
        assert model_card(load_core(folder), where, measured, "mit").endswith("frequency.\n")


@pytest.mark.parametrize("sparsity", ["relu", "batchtopk"])
def test_the_cards_code_runs_as_it_stands(folder, sparsity, tmp_path, monkeypatch):
    """From the card's own folder: the loss falls, and the core's columns never reach the optimiser."""
    core = load_core(folder)
    rewrite(folder, distilled=core.record["distilled"] | {"core_sparsity": sparsity})
    push_core(folder, tmp_path / "target", licence="mit")
    monkeypatch.chdir(tmp_path / "target")
    torch.manual_seed(0)
    losses: list[float] = []
    code, last = code_of(Path("README.md").read_text()), "    optimizer.zero_grad()"
    code = code.replace(last, f"    seen(loss)\n{last}")
    names: dict = {"seen": lambda loss: losses.append(loss.item())}
    exec(compile(code, "card", "exec"), names)
    size, f = len(core), names["f"]
    assert torch.equal(names["W_enc"][:, :size], core.W_enc) and names["W_enc"].shape == (32, 48)
    assert not names["encoder"].weight.grad[:size].any() and names["encoder"].weight.grad[size:].any()
    assert names["encoder"].bias.grad[:size].any() and names["decoder"].weight.grad[:, :size].any()
    assert losses[-1] < losses[0]
    if sparsity == "relu":
        expected = 8 - sum(latent.frequency for latent in core.latents)
        assert names["k"] == max(1, round(expected)) and int((f[:, size:] > 0).sum(1).max()) <= names["k"]
    else:
        assert names["k"] == 8 and int((f > 0).sum()) <= 8 * len(f)


# The Hub


HUB = """
import os
from huggingface_hub import constants
from dmsae_lib.store.artifacts import UserError
from dmsae_lib.distill.core_format import load_core
from dmsae_lib.report.card import push_core

def refused(function, *given, **named):
    try:
        function(*given, **named)
    except UserError as error:
        print(error)

print(push_core({folder!r}, "me/core", licence="mit"))
core = load_core("me/core")
print(core.hash, float(core.W_enc.double().sum()))
{example}
print(tuple(W_enc.shape))
os.environ["HF_TOKEN"] = "another"
refused(load_core, "me/nothing")
refused(push_core, {folder!r}, "you/core", licence="mit")
constants.HF_HUB_OFFLINE = True  # what the variable of that name sets
print(load_core("me/core").hash)
refused(load_core, "me/nothing")
"""


def test_to_the_hub_and_back_in_one_call_each(folder, tmp_path):
    """The client's own code: a repository, one commit, a download, then its cache without network."""
    home, core = tmp_path / "home", load_core(folder)
    home.mkdir()
    card = model_card(core, "me/core", licence="mit")
    kept = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    kept |= {"HOME": str(home), "HF_HOME": str(home), "PYTHONPATH": str(ROOT), "HF_TOKEN": TOKEN}
    code = HUB.format(folder=str(folder), example=code_of(card))
    with hub(TOKEN) as server:
        kept |= {"HF_ENDPOINT": server.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=kept, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [new] = server.created
    assert (new["organization"], new["name"], new["visibility"]) == ("me", "core", "private")
    assert server.messages == [f"Core {core.hash[:12]}"] and 'snapshot_download("me/core")' in card
    expected = {path.name: path.read_bytes() for path in folder.iterdir()} | {"README.md": card.encode()}
    assert server.repos == {"me/core": expected}
    address, pulled, shape, unknown, forbidden, cached, not_cached = done.stdout.splitlines()
    assert address == f"{server.address}/me/core/commit/{'1' * 40}" and shape == "(32, 48)"
    assert pulled == f"{core.hash} {float(core.W_enc.double().sum())}" and cached == core.hash
    for said, kind in ((unknown, "RepositoryNotFoundError"), (not_cached, "LocalEntryNotFoundError")):
        assert said.startswith("There is no folder me/nothing") and kind in said
    assert forbidden.startswith("The Hub did not take the core for you/core (") and "401" in forbidden
    assert forbidden.endswith("with a token that may write there.")
    written = [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert not written and TOKEN not in done.stdout + done.stderr
