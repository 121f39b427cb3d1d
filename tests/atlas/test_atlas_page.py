"""The bytes of the page and the form for Neuronpedia; what a browser makes of it is in test_browser."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from builders.atlas import HOSTILE, hostile_atlas

from dmsae_lib.atlas.cards import compact_cards
from dmsae_lib.atlas.neuronpedia import batches
from dmsae_lib.atlas.page import index_html, notes_of, shown_data, write_pages
from dmsae_lib.atlas.text import visible
from dmsae_lib.store.artifacts import write

ROOT = Path(__file__).parents[2]
PUBLISHED = sorted((ROOT / "results").glob("*/atlas"))
NOTES = [{"key": "main/c0:0", "text": "<b>a note</b>"}]


class Elements(HTMLParser):
    """Every element with its attributes, and the text of scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.texts: dict[int, str] = {}
        self.open = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.open = True

    def handle_endtag(self, tag):
        self.open = False

    def handle_data(self, data):
        if self.open:
            place = len(self.found) - 1
            self.texts[place] = self.texts.get(place, "") + data

    def all(self, tag: str) -> list[tuple[dict, str]]:
        return [(at, self.texts.get(i, "")) for i, (name, at) in enumerate(self.found) if name == tag]


@pytest.fixture(scope="module")
def page() -> str:
    return index_html(hostile_atlas(), "f" * 64, NOTES)


def test_every_character_that_could_act_unseen_is_shown_by_its_number():
    text = "".join(map(chr, range(0x3000))) + "\ud800\ufeff\U000e0001"
    assert all(char.isprintable() for char in visible(text))
    assert visible("a\u202eb\nc\td\r\x00") == "a⟨U+202E⟩b⏎c⇥d␍⟨U+0000⟩"
    assert visible(" cat, Häuser, שלום, 日本 🙂") == " cat, Häuser, שלום, 日本 🙂"


def test_the_page_holds_its_own_two_scripts_and_loads_nothing(page):
    read = Elements(page)
    (data, text), (script, code) = read.all("script")
    assert data == {"type": "application/json", "id": "data"} and script == {}
    assert json.loads(text) == json.loads(json.dumps(shown_data(hostile_atlas(), NOTES)))
    assert not read.all("img") and not read.all("iframe") and not read.all("b")
    outside = [
        at for _, at in read.found for value in (at.get("src"), at.get("href")) if value and "//" in value
    ]
    assert not outside
    ((policy, _),) = [
        (at, _) for at, _ in read.all("meta") if at.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy["content"].startswith("default-src 'none'; ")
    for kind, inside in (("script-src", code), ("style-src", read.all("style")[0][1])):
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy["content"]


def test_the_data_of_the_page_hold_printable_text_alone(page):
    data = Elements(page).all("script")[0][1]
    assert not set("<>&") & set(data) and data.isascii()

    def strings(value):
        if isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                yield from strings(item)
        elif isinstance(value, str):
            yield value

    found = list(strings(json.loads(data)))
    assert all(text.isprintable() for text in found)
    assert {visible(text) for text in HOSTILE} <= set(found)


def test_cards_in_a_notebook_hold_no_element_but_their_own():
    atlas = hostile_atlas()
    read = Elements(compact_cards(atlas, atlas["latents"]))
    assert {tag for tag, _ in read.found} == {"h4", "p", "br", "code", "div", "bdi", "span"}
    assert not [at for _, at in read.found if set(at) - {"style", "title"}]
    titles = [float(at["title"]) for at, _ in read.all("span")]
    shown = [c for latent in atlas["latents"] for c in latent["contexts"] if c["tenth"] in (2, 4, 6, 8, 10)]
    assert titles == [value for context in shown for value in context["values"]]


# The keys of the dictionaries in SAEDashboard 0.8.0's neuronpedia_dashboard.py
FEATURE = """feature_index neuron_alignment_indices neuron_alignment_values neuron_alignment_l1
correlated_neurons_indices correlated_neurons_l1 correlated_neurons_pearson correlated_features_indices
correlated_features_l1 correlated_features_pearson neg_str neg_values pos_str pos_values frac_nonzero
freq_hist_data_bar_values freq_hist_data_bar_heights logits_hist_data_bar_heights logits_hist_data_bar_values
n_prompts_total n_tokens_in_prompt dataset decoder_weights_dist activations""".split()


def test_the_form_for_neuronpedia_is_saedashboards_and_holds_the_same_numbers():
    atlas = hostile_atlas()
    found = batches(atlas)
    assert list(found) == ["main", "other"]
    assert set(found["main"]) == {"model_id", "layer", "sae_set", "sae_id_suffix", "features"}
    assert found["main"]["layer"] == 1 and len(found["main"]["features"]) == 10
    for feature, latent in zip(found["other"]["features"], atlas["latents"][10:]):
        assert sorted(feature) == sorted(FEATURE)
        assert feature["feature_index"] == latent["index"]
        assert list(zip(feature["pos_str"], feature["pos_values"])) == list(
            map(tuple, latent["logits"]["raises"])
        )
        assert feature["freq_hist_data_bar_values"] == pytest.approx([10 / 6, 5, 50 / 6], abs=1e-3)
        assert feature["logits_hist_data_bar_values"] == [-0.5, 0.5, 1.5]
        for activation, context in zip(feature["activations"], latent["contexts"]):
            assert set(activation) == {"bin_min", "bin_max", "bin_contains", "tokens", "values"}
            ids = atlas["text"][context["row"]][context["start"] : context["start"] + 6]
            assert activation["tokens"] == [atlas["tokens"][i] for i in ids]
            assert (activation["bin_min"], activation["bin_max"]) == (context["tenth"] - 1, context["tenth"])
            assert activation["bin_contains"] == 0.1 and activation["values"] == context["values"]
    assert json.loads(json.dumps(found, allow_nan=False)) == json.loads(json.dumps(found))


def test_notes_are_taken_from_entries_that_link_to_a_latent():
    text = """
- [c0:8](../results/toy/atlas/index.html#main/c0:8): Numbers
  in lists.
- [c0:9](../results/other/atlas/index.html#main/c0:9): of another atlas
Text with a [link](../results/toy/atlas/index.html#main/c1:1): no entry.
"""
    assert notes_of(text, "toy") == [{"key": "main/c0:8", "text": "Numbers in lists."}]


def test_pages_are_written_beside_the_artefact_and_again_the_same(tmp_path):
    folder = tmp_path / "results" / "toy" / "atlas"
    with write(folder, "atlas", {"harvest": "0" * 64}) as writer:
        writer.json("atlas.json", hostile_atlas())
    write_pages(folder, tmp_path, "toy")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    names = {str(path.relative_to(folder)) for path in before}
    assert {"index.html", "neuronpedia/main/batch-0.json", "neuronpedia/other/batch-0.json"} <= names
    write_pages(folder, tmp_path, "toy")
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.parent.name)
def test_a_published_page_is_what_the_code_writes(folder, tmp_path):
    from dmsae_lib.store.artifacts import load

    atlas = load(folder, "atlas").json("atlas.json")
    notes = notes_of((ROOT / "docs" / "atlas.md").read_text(encoding="utf-8"), folder.parent.name)
    known = {f"{latent['group']}/{latent['id']}" for latent in atlas["latents"]}
    assert {note["key"] for note in notes} <= known
    written = (folder / "index.html").read_text(encoding="utf-8")
    assert written == index_html(atlas, load(folder, "atlas").hash, notes), "run `make figures`"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 10 * 2**20
    assert not re.search(r"/(work|home|root|tmp)/", written)
