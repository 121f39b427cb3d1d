"""Class pairs for sae_bench's TPP and SCR, made of the labelled texts of the sae-probes wheel.

sae_bench itself takes biographies (profession, gender) and product reviews (category, stars) from the Hub.
What stands for them here; a text with two labels is left out, ``seed`` decides which texts are drawn and how
they are split.

TPP: one class against the others of its set; the class names are handed to sae_bench as they are.

* ``subjects``: passages of web text that end in a certain pair of words (label ``bigram`` of the sets in
  SUBJECTS): schools, medicine, genetics, courts, rights. All are texts of probing sets, so no model or SAE
  was trained on them.
* ``news``: the four topics of set 97, by its own labels (its Entertainment is what others call technology,
  its Technology business).

SCR: two attributes in all four combinations. sae_bench's names are those of its first data set, whatever the
classes are: ``professor`` / ``nurse`` for the first attribute, ``male`` / ``female`` for the second. The
biased probe sees ``male_professor`` and ``female_nurse`` alone.

================  ===============  ================  =================  ====================================
pair              professor        nurse             male / female      sets
================  ===============  ================  =================  ====================================
product_film      Amazon products  films             good / bad review  157, 113 (probing sets, as above)
product_business  Amazon products  Yelp businesses   good / bad review  157, 111 (one and five stars)
business_film     Yelp businesses  films             good / bad review  111, 113
world_sport       world news       sports news       Reuters / AP       97, 161, 162; agency named in text
================  ===============  ================  =================  ====================================
"""

import re
from collections import Counter

import torch

from dmsae_lib.data.corpus import PROBING_SETS, wheel_sets
from dmsae_lib.store.seeds import generator

Texts = dict[str, dict[str, list[str]]]  # {"train" or "test": {sae_bench's name of the class: texts}}

SUBJECTS = ("65_high-school", "69_blood-pressure", "72_gene-expression", "76_trial-court", "79_human-rights")
TPP_SETS = ("subjects", "news")
SCR_PAIRS = ("product_film", "product_business", "business_film", "world_sport")
# set, its label of a good review, and of a bad one (stars less one)
REVIEWS = {
    "product": ("157_amazon_5star", "1", "0"),
    "film": ("113_movie_sent", "1", "0"),
    "business": ("111_yelp_data", "4", "0"),
}
TRAINING = 2 / 3  # share of a class's texts that its probe is trained on
MOST = 900  # texts per class, and per combination of two attributes; sae_bench takes 2500
REUTERS, AP = re.compile(r"\bReuters\b"), re.compile(r"\bAP\b|\bAssociated Press\b")


def tpp_texts(name: str, seed: int) -> Texts:
    """Equally many texts for every class of a set in TPP_SETS, no text in two classes or in both splits."""
    if name == "subjects":
        classes = {subject.partition("_")[2]: _labelled(subject)["bigram"] for subject in SUBJECTS}
    else:
        classes = _labelled("97_news_class")
    times = Counter(text for texts in classes.values() for text in texts)
    classes = {label: [text for text in texts if times[text] == 1] for label, texts in classes.items()}
    n = min(MOST, *map(len, classes.values()))
    halves = {label: _split(texts, n, seed, "tpp", name, label) for label, texts in classes.items()}
    return {split: {label: half[split] for label, half in halves.items()} for split in ("train", "test")}


def scr_texts(name: str, seed: int) -> Texts:
    """The six lists of texts that SCR wants for a pair in SCR_PAIRS, put together by sae_bench from the four
    combinations: the biased lists have as many texts as the balanced ones.

    To be called inside :func:`dmsae_lib.saebench.adapter.undisturbed`.
    """
    import pandas as pd
    from sae_bench.evals.scr_and_tpp.dataset_creation import get_spurious_corr_data
    from sae_bench.sae_bench_utils.dataset_info import gender_dict, profession_dict

    combinations = _world_sport() if name == "world_sport" else _reviews(*name.split("_"))
    halves = {
        key: _split(texts, min(MOST, len(texts)), seed, "scr", name, *key)
        for key, texts in combinations.items()
    }
    columns, jobs, genders = ["hard_text", "profession", "gender"], ("professor", "nurse"), ("male", "female")
    made = {}
    for split in ("train", "test"):
        rows = [
            (text, profession_dict[job], gender_dict[gender])
            for (job, gender), half in halves.items()
            for text in half[split]
        ]
        room = {key: len(half[split]) for key, half in halves.items()}
        biased = room["professor", "male"], room["nurse", "female"]
        m = min(*room.values(), *((n - 1) // 2 for n in biased))  # sae_bench asks for more than 2 m of those
        frame = pd.DataFrame(rows, columns=columns)
        made[split] = get_spurious_corr_data(frame, jobs, genders, "LabHC/bias_in_bios", m, seed)
    return made


def probing_texts() -> set[str]:
    """All texts of the probing sets: no model and no SAE of ours was trained on them."""
    return {text for name in PROBING_SETS for texts in _labelled(name).values() for text in texts}


def _labelled(name: str) -> dict[str, list[str]]:
    """{label: texts} of a set of the wheel, without repetitions and without texts that have two labels."""
    import pandas as pd

    rows = pd.read_csv(wheel_sets()[name], usecols=["prompt", "target"]).astype(str).drop_duplicates()
    rows = rows.drop_duplicates("prompt", keep=False)
    by_label = rows[rows["prompt"].str.strip() != ""].groupby("target")["prompt"]
    return {label: texts.tolist() for label, texts in by_label}


def _split(texts: list[str], n: int, seed: int, *names: str) -> dict[str, list[str]]:
    drawn = [texts[i] for i in torch.randperm(len(texts), generator=generator(seed, *names))[:n]]
    middle = round(n * TRAINING)
    return {"train": drawn[:middle], "test": drawn[middle:]}


def _reviews(first: str, second: str) -> dict[tuple[str, str], list[str]]:
    """Reviews of two kinds by kind and sentiment."""
    found = {}
    for job, kind in (("professor", first), ("nurse", second)):
        name, good, bad = REVIEWS[kind]
        labelled = _labelled(name)
        found |= {(job, "male"): labelled[good], (job, "female"): labelled[bad]}
    return found


def _world_sport() -> dict[tuple[str, str], list[str]]:
    """News of two topics that name one of the two agencies."""
    four = _labelled("97_news_class")
    world = four["Politics"] + _labelled("161_agnews_0")["1"]
    sport = four["Sport"] + _labelled("162_agnews_1")["1"]
    return {
        (job, gender): [t for t in dict.fromkeys(texts) if agency.search(t) and not other.search(t)]
        for job, texts in (("professor", world), ("nurse", sport))
        for gender, agency, other in (("male", REUTERS, AP), ("female", AP, REUTERS))
    }
