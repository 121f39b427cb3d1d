"""The atlas as one static page, and the folder results/<name>/atlas that holds it.

index.html carries its style, its script and its data inside: a page that is opened from a disk may fetch
nothing, and one file can be sent. Its content security policy names style and script by their hashes, so that
nothing else runs and nothing is loaded, whatever the texts of the web in it hold. They are made visible
(text.visible) before they go in, and the script puts them into the page as text alone.
"""

import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.colors import to_hex

from dmsae_lib.atlas.neuronpedia import batches
from dmsae_lib.atlas.text import visible
from dmsae_lib.figures.style import cycle_colour
from dmsae_lib.report.layout import Row
from dmsae_lib.store.artifacts import Artifact, load
from dmsae_lib.store.atomic import write_text

TEMPLATES = Path(__file__).with_name("page")
NOTES = Path("docs") / "atlas.md"  # by hand; what it says of a latent stands on the page too


def _embedded(value: Row) -> str:
    """JSON for a script element: no character ends or opens a tag."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def notes_of(text: str, name: str) -> list[Row]:
    """{key (group/id), text} of each entry of a page that begins with a link to a latent of an atlas:
    ``- [c0:8](../results/<name>/atlas/index.html#main/c0:8): what it seems to do``."""
    entry = rf"^- \[[^\]]*\]\([^)]*results/{re.escape(name)}/atlas/index\.html#([^)]+)\): (.+(?:\n  .+)*)"
    return [
        {"key": key, "text": " ".join(said.split())} for key, said in re.findall(entry, text, re.MULTILINE)
    ]


def _visible_words(pairs: list[list]) -> list[list]:
    return [[visible(text), *rest] for text, *rest in pairs]


def shown_data(atlas: Row, notes: list[Row]) -> Row:
    """What index.html carries of atlas.json: all strings visible, with the cycles' colours and the notes."""
    latents = []
    for latent in atlas["latents"]:
        logits = {name: _visible_words(latent["logits"][name]) for name in ("raises", "lowers")}
        latents.append(latent | {"logits": logits, "by_token": _visible_words(latent["by_token"])})
    cycles = range(atlas["cycles"] + 1)
    more = {
        "title": _title(atlas),
        "tokens": [visible(text) for text in atlas["tokens"]],
        "latents": latents,
        "colours": [to_hex(cycle_colour(t, atlas["cycles"])) for t in cycles],
        "notes": notes,
    }
    return {name: atlas[name] for name in ("text", "groups", "cycles")} | more


def _title(atlas: Row) -> str:
    return visible(f"{Path(atlas['model']).name}, {atlas['hook']}, SAEs of {atlas['d_sae']:,} latents")


def index_html(atlas: Row, content_hash: str, notes: list[Row]) -> str:
    """The page of ``atlas`` (atlas.json, whose artefact has ``content_hash``)."""
    parts = {name: (TEMPLATES / name).read_text(encoding="utf-8") for name in ("atlas.css", "atlas.js")}
    made = f"Written by make atlas from a run of {visible(atlas['config'])}, artefact {content_hash[:12]}."
    made += (
        " Texts are of the test split, as found; of the embedded text, sets labelled as hate or spam are out."
    )
    environment = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined)
    return environment.get_template("index.html.j2").render(
        title=_title(atlas),
        footer=made,
        style=parts["atlas.css"],
        script=parts["atlas.js"],
        style_hash=_hash(parts["atlas.css"]),
        script_hash=_hash(parts["atlas.js"]),
        data=_embedded(shown_data(atlas, notes)),
    )


def write_pages(folder: Path, root: Path, name: str) -> None:
    """Write index.html and neuronpedia/ beside the atlas.json of ``folder``, to be results/<name>/atlas."""
    artifact = load(folder, "atlas", "atlas")
    atlas, docs = artifact.json("atlas.json"), root / NOTES
    notes = notes_of(docs.read_text(encoding="utf-8"), name) if docs.is_file() else []
    known = {f"{latent['group']}/{latent['id']}" for latent in atlas["latents"]}
    here = [note for note in notes if note["key"] in known]
    write_text(folder / "index.html", index_html(atlas, artifact.hash, here))
    for chain, batch in batches(atlas).items():
        text = json.dumps(batch, allow_nan=False, separators=(",", ":"))
        write_text(folder / "neuronpedia" / chain / "batch-0.json", text)


def publish_atlas(artifact: Artifact, folder: Path, root: Path, name: str) -> None:
    """Copy the artefact into ``folder``, which is to be results/<name>/atlas, and write its pages there."""
    shutil.copytree(artifact.folder, folder, dirs_exist_ok=True)
    write_pages(folder, root, name)
