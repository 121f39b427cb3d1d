"""The texts of TPP and SCR: each once, in one class and one split, with the labels of the wheel."""

import pandas as pd
import pytest

from dmsae_lib.data.corpus import PROBING_SETS, beginning, wheel_sets
from dmsae_lib.saebench import class_pairs
from dmsae_lib.saebench.adapter import undisturbed
from dmsae_lib.saebench.perturbation import BIASED

pytestmark = pytest.mark.usefixtures("offline")


@pytest.mark.parametrize("name", class_pairs.TPP_SETS)
def test_tpp_texts(name):
    texts = class_pairs.tpp_texts(name, seed=0)
    flat = [text for classes in texts.values() for found in classes.values() for text in found]
    # no text twice, in no two classes or splits
    assert len(flat) == len(set(flat)) and all(text.strip() for text in flat)
    starts = {
        split: {beginning(text) for found in classes.values() for text in found}
        for split, classes in texts.items()
    }
    assert not starts["train"] & starts["test"]  # nor a near-duplicate
    sizes = {split: {len(found) for found in classes.values()} for split, classes in texts.items()}
    assert sizes == {"train": {600}, "test": {300}} and 4 <= len(texts["train"]) <= 5
    assert class_pairs.tpp_texts(name, seed=0) == texts
    other = class_pairs.tpp_texts(name, seed=1)
    label = next(iter(texts["train"]))
    assert set(other["train"][label]) != set(texts["train"][label])
    if name == "subjects":
        assert set(flat) <= class_pairs.probing_texts() and set(class_pairs.SUBJECTS) <= set(PROBING_SETS)


@pytest.mark.parametrize("name", class_pairs.SCR_PAIRS)
def test_scr_texts(name):
    with undisturbed():
        texts, again, other = (class_pairs.scr_texts(name, seed) for seed in (0, 0, 1))
    assert texts == again and set(texts["train"][BIASED]) != set(other["train"][BIASED])
    train, test = ({text for found in half.values() for text in found} for half in texts.values())
    assert not train & test and not set(map(beginning, train)) & set(map(beginning, test))
    for half in texts.values():
        male, female = set(half["male / female"]), set(half["female_data_only"])
        professor, nurse = set(half["professor / nurse"]), set(half["nurse_data_only"])
        assert not male & female and not professor & nurse and male | female == professor | nurse
        size = len(half[BIASED])
        assert {len(found) for found in half.values()} == {size} and size % 2 == 0 and size >= 100
        assert (
            len(male & professor)
            == len(male & nurse)
            == len(female & professor)
            == len(female & nurse)
            == size / 2
        )
        assert male & professor < set(half[BIASED]) and female & nurse < set(half["female_nurse_data_only"])
        assert not set(half[BIASED]) & (female | nurse)


def test_scr_labels_are_those_of_the_wheel():
    with undisturbed():
        reviews, news = (class_pairs.scr_texts(name, 0)["train"] for name in ("product_film", "world_sport"))
    sets = "157_amazon_5star", "113_movie_sent", "97_news_class"
    tables = (pd.read_csv(wheel_sets()[name]).drop_duplicates("prompt").set_index("prompt") for name in sets)
    stars, films, topics = (table["target"] for table in tables)
    assert (stars[reviews[BIASED]] == 1).all() and (films[reviews["female_nurse_data_only"]] == 0).all()
    assert all("Reuters" in text for text in news["male / female"])
    assert not any("Reuters" in text for text in news["female_data_only"])
    known = topics[topics.index.intersection(news["nurse_data_only"])]
    assert len(known) > 20 and (known == "Sport").all()
    assert set(reviews["professor / nurse"]) <= set(stars.index)
