"""The absorption eval: found where it was planted and nowhere else, the gate, the cache, and what sae_bench
itself gives."""

import json
import random
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from builders.saebench import load_model, make_bench, sae_of, state

from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.data.workers import Workers
from dmsae_lib.sae.model import FoldedSAE, MatryoshkaSAE
from dmsae_lib.saebench import absorption
from dmsae_lib.saebench.adapter import Adapter, our_model, undisturbed
from dmsae_lib.saebench.runner import NotRun
from dmsae_lib.store.artifacts import Artifact

LETTERS = "abcdefghijklmnopqrstuvwxyz"
# channels 0..25 spell, 26..56 are one for each S-word, the others hold noise
S, WIDTH = LETTERS.index("s"), 64
SPELT, OWN = 4.0, 2.0  # what a word has in its letter's channel, and an S-word in its own
SEED = 1  # of a split with words of every letter in both parts
CONTEXT = 128
TOO_LONG = " sesquipedalian"  # in the vocabulary, but the tokenizer cuts it in two


@pytest.fixture(scope="module", autouse=True)
def fewer_probes():
    """Up to 3 latents for a letter, not 10, and shorter training: most of the time goes into those probes."""
    from sae_bench.evals.absorption import eval_config, main  # noqa: F401  its own run_eval keeps the real one

    with pytest.MonkeyPatch.context() as patch:
        fewer = partial(eval_config.AbsorptionEvalConfig, max_k_value=3)
        patch.setattr(eval_config, "AbsorptionEvalConfig", fewer)
        patch.setattr(absorption, "PROBE", absorption.PROBE | {"num_epochs": 20, "lr": 5e-2})
        yield


def save_spelling_model(folder: Path, known: str = LETTERS, lacking: str = "#", seed: int = 0) -> Path:
    """A one-layer Llama whose residual stream is its embedding: a word's first letter, if it is one of
    ``known`` (else any other letter), a channel of its own for each S-word, and noise. Every word is one
    token, but not the answers ``lacking``."""
    import transformers
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    words = random.Random(seed)
    drawn = {
        f" {letter}{''.join(words.choices(LETTERS, k=5))}"
        for letter in LETTERS
        for _ in range(30 if letter == "s" else 16)
    }
    answers = [f" {letter}" for letter in LETTERS.upper()]
    others = [*answers, *(" has", " the", " first", " letter", TOO_LONG, "\n", ":")]
    vocabulary = {text: i for i, text in enumerate(["<bos>", "<unk>", *sorted(drawn), *others])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    pieces = Regex(rf" (?=[{lacking}]\b)| ?[A-Za-z]{{1,9}}|\n|:")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"bos_token": "<bos>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        **{"vocab_size": len(vocabulary), "hidden_size": WIDTH, "intermediate_size": 8},
        **{"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 128},
        **{"tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0},
    )
    model = transformers.LlamaForCausalLM(config)
    rows = torch.zeros(len(vocabulary), WIDTH)
    own = iter(range(26, 57))
    for text, i in vocabulary.items():
        letter = text.strip().lower()[:1]
        if letter and letter in LETTERS:
            wrong = [other for other in LETTERS if other not in known + letter]
            rows[i, LETTERS.index(letter if letter in known else words.choice(wrong))] = SPELT
        if letter == "s" and text != TOO_LONG:
            rows[i, next(own)] = OWN
        else:
            rows[i, 57:] = torch.randn(WIDTH - 57)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(rows)
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LanguageModel:
    return load_model(save_spelling_model(tmp_path_factory.mktemp("models") / "spells"), context=CONTEXT)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def recognised(model: LanguageModel, cache: Path) -> list[tuple[str, int]]:
    """The S-words of the test split that the ground-truth probe recognises, with the channel that each has
    for itself."""
    probes = probes_of(model, cache)
    tensors, test = probes.tensors("probes.safetensors"), probes.json("words.json")["test"]
    scores = tensors["x_test"] @ tensors["weight"].T + tensors["bias"]
    return [
        (word, 26 + int(x[26:57].argmax()))
        for (word, letter), x, score in zip(test, tensors["x_test"], scores)
        if letter == S and score[S] > 0
    ]


def spelling_sae(kept: dict[int, float]) -> FoldedSAE:
    """One latent per letter; for the S-word with the channel i, that of S is active at ``kept[i]`` of what it
    should be, and a latent of the word itself holds the rest of the residual. Other words have the letter's
    latent alone."""
    d_sae = 26 + len(kept)
    rows, decoder = torch.zeros(d_sae, WIDTH), torch.zeros(d_sae, WIDTH)
    rows[:26, :26] = decoder[:26, :26] = torch.eye(26)
    for i, (channel, share) in enumerate(kept.items(), start=26):
        rows[S, channel] = (share - 1) * SPELT / OWN
        decoder[i, S], decoder[i, channel] = (1 - share) * SPELT, OWN
        rows[i, channel] = decoder[i].norm() / OWN
    return sae_of(rows, torch.nn.functional.normalize(decoder, dim=1), threshold=1e-3)


def probes_of(model: LanguageModel, cache: Path, seed: int = SEED) -> Artifact:
    return absorption.prepare_absorption(Workers(model), make_bench(cache), seed)


def run(sae: FoldedSAE, model: LanguageModel, cache: Path) -> dict:
    return absorption.run_absorption(sae, model, make_bench(cache), SEED)


def test_absorption_is_found_where_it_was_planted(model, cache):
    words = recognised(model, cache)
    half, *hidden = [channel for _, channel in words[: 1 + len(words) // 2]]
    assert len(hidden) >= 2 and len(words) > 1 + len(hidden)
    found = run(spelling_sae({half: 0.5} | dict.fromkeys(hidden, 0.0)), model, cache)
    assert found["n_letters"] == 26 and min(found["probe_f1"].values()) > 0.6
    probe = probes_of(model, cache).tensors("probes.safetensors")["weight"][S]
    # of the half-absorbed word, along the probe
    carried = 1 - 0.5 * SPELT * probe[S] / (SPELT * probe[S] + OWN * probe[half])
    assert 0.4 < carried < 0.6
    full, fraction = len(hidden) / len(words), (len(hidden) + float(carried)) / len(words)
    for letter, scores in found["letters"].items():
        assert scores["letter_latents"] == [LETTERS.index(letter)]
        assert scores["full_absorption_rate"] == (full if letter == "s" else 0)
        assert scores["mean_absorption_fraction"] == pytest.approx(fraction if letter == "s" else 0, rel=1e-5)
    assert found["letters"]["s"]["num_full_absorption"] == len(hidden)
    assert found["letters"]["s"]["num_probe_true_positives"] == len(words)
    assert found["metrics"] == {
        "mean_full_absorption_score": pytest.approx(full / 26),
        "mean_num_split_features": 1.0,
        "mean_absorption_fraction_score": pytest.approx(fraction / 26, rel=1e-5),
    }


def run_and_listen(sae: MatryoshkaSAE, model: LanguageModel, cache: Path) -> tuple[dict, list[str]]:
    """The result, and every prompt that the model was given."""
    asked, real = [], absorption.Prompts.run_with_cache

    def listen(prompts, texts, names_filter):
        asked.extend(texts)
        return real(prompts, texts, names_filter)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(absorption.Prompts, "run_with_cache", listen)
        return run(sae, model, cache), asked


@pytest.fixture(scope="module")
def clean(model, cache) -> tuple[dict, list[str]]:
    probes_of(model, cache)
    return run_and_listen(spelling_sae({}), model, cache)


def test_the_model_meets_each_prompt_once_for_all_saes(model, cache, clean, monkeypatch):
    found, asked = clean
    position, hook = probes_of(model, cache).json("words.json")["position"], model.hook_name
    prompts, some = absorption.Prompts(model, position), asked[:3]
    said = model.lower(torch.cat([prompts.to_tokens(text) for text in some]))[:, position]
    monkeypatch.setattr(type(model), "lower", lambda *_: pytest.fail("the model was asked again"))
    assert torch.allclose(prompts.run_with_cache(some, [hook])[1][hook][:, position], said, atol=1e-6)
    assert run_and_listen(spelling_sae({}), model, cache) == (found, asked)


def test_a_latent_per_letter_absorbs_nothing(clean):
    clean, _ = clean
    assert clean["metrics"] == {
        "mean_full_absorption_score": 0,
        "mean_absorption_fraction_score": 0,
        "mean_num_split_features": 1,
    }
    assert {scores["one_latent_f1"] for scores in clean["letters"].values()} == {1.0}


def test_the_numbers_are_those_of_sae_bench_itself(model, cache, tmp_path, monkeypatch):
    """Its own run_eval, with the same ground-truth probes laid where it looks for them."""
    from sae_bench.evals.absorption import main
    from sae_bench.evals.absorption.probing import LinearProbe

    # its run_eval unpickles its probes; ours does not
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    sae = MatryoshkaSAE(WIDTH, 96, (16,))
    sae.initialise(torch.Generator().manual_seed(0), torch.zeros(4, WIDTH))
    sae.requires_grad_(False).threshold.fill_(1.0)
    ours = run(sae, model, cache)
    assert (
        ours["metrics"]["mean_full_absorption_score"] > 0.01
        and ours["metrics"]["mean_num_split_features"] > 1
    )

    probes = probes_of(model, cache)
    words, tensors = probes.json("words.json"), probes.tensors("probes.safetensors")
    place = tmp_path / "probes" / "spells" / "layer_0"
    place.mkdir(parents=True)
    probe = LinearProbe(WIDTH, 26)
    probe.load_state_dict({"fc.weight": tensors["weight"], "fc.bias": tensors["bias"]})
    torch.save(probe, place / "probe.pth")
    labels = {f"y_{part}": np.array([letter for _, letter in words[part]]) for part in ("train", "test")}
    np.savez(
        place / "data.npz", X_train=tensors["x_train"].numpy(), X_test=tensors["x_test"].numpy(), **labels
    )
    for part in ("train", "test"):
        pd.DataFrame({"token": [word for word, _ in words[part]]}).to_csv(place / f"{part}_df.csv")
    folders = {"experiment_dir": tmp_path / "sparse", "probes_dir": tmp_path / "probes"}
    monkeypatch.setattr(
        main, "run_k_sparse_probing_experiment", partial(main.run_k_sparse_probing_experiment, **folders)
    )
    folders |= {
        "experiment_dir": tmp_path / "absorption",
        "sparse_probing_experiment_dir": tmp_path / "sparse",
    }
    monkeypatch.setattr(
        main, "run_feature_absortion_experiment", partial(main.run_feature_absortion_experiment, **folders)
    )
    monkeypatch.setattr(model.bridge.cfg, "model_name", "spells")
    # it refuses prompts that differ
    monkeypatch.setattr(
        "sae_bench.evals.absorption.feature_absorption.get_alpha_tokens",
        lambda _: [word for word, _ in words["train"] + words["test"]],
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    config = main.AbsorptionEvalConfig(
        model_name="spells",
        max_k_value=3,
        prompt_token_pos=words["position"],
        precalc_k_sparse_probe_sae_acts=True,
        k_sparse_probe_batch_size=ours["settings"]["k_sparse_probe_batch_size"],
    )
    with undisturbed(), our_model(model):
        torch.manual_seed(SEED)
        (theirs,) = main.run_eval(
            config, [("theirs", Adapter(sae, model))], "cpu", str(tmp_path / "out")
        ).values()
    assert words["position"] == -6
    assert ours["metrics"] == {
        name: pytest.approx(theirs["eval_result_metrics"]["mean"][name], rel=1e-6) for name in ours["metrics"]
    }
    details = {one["first_letter"]: one for one in theirs["eval_result_details"]}
    assert {letter: scores["num_full_absorption"] for letter, scores in ours["letters"].items()} == {
        letter: one["num_full_absorption"] for letter, one in details.items()
    }
    (file,) = (tmp_path / "artifacts" / "absorption").glob("*.json")
    assert {row["letter"]: row["f1_probe"] for row in json.loads(file.read_text())} == pytest.approx(
        ours["probe_f1"], abs=1e-9
    )


@pytest.mark.parametrize("known", [LETTERS[:18], LETTERS[5:]])
def test_the_gate(known, tmp_path):
    model = load_model(save_spelling_model(tmp_path / "model", known), context=CONTEXT)
    found = run(spelling_sae({}), model, tmp_path)
    assert {letter for letter, f1 in found["probe_f1"].items() if f1 > 0.6} == set(known)
    if len(known) < 20:
        assert "F1 > 0.6 on 18 of 26 letters" in found["not_run"] and "sae_bench wants 20" in found["not_run"]
        assert found["metrics"] == {} and set(found) == {"metrics", "not_run", "probe_f1"}
    else:
        assert found["n_letters"] == len(known) and set(found["letters"]) == set(known)
        assert found["metrics"]["mean_full_absorption_score"] == 0 and "not_run" not in found


def test_probes_are_made_once_and_never_taken_over_by_another_model(tmp_path, monkeypatch):
    from sae_bench.evals.absorption import vocab

    first = load_model(save_spelling_model(tmp_path / "model"), context=CONTEXT)
    probes = probes_of(first, tmp_path / "cache")
    again = probes_of(first, tmp_path / "cache")
    assert again.provenance == probes.provenance and probes.parents == {"model": first.hash}
    real = vocab.get_alpha_tokens  # tokenizers give their vocabulary in another order in each process
    monkeypatch.setattr(vocab, "get_alpha_tokens", lambda tokenizer: real(tokenizer)[::-1])
    assert probes_of(first, tmp_path / "other").hash == probes.hash
    words = probes.json("words.json")
    asked = [word for part in ("train", "test") for word, _ in words[part]]
    assert sorted(asked) == sorted(set(real(first.tokenizer)) - {TOO_LONG})
    assert all(LETTERS[letter] == word[1].lower() for word, letter in words["train"] + words["test"])

    retrained = load_model(
        save_spelling_model(tmp_path / "model", known="abc"), context=CONTEXT
    )  # in the same place
    other = probes_of(retrained, tmp_path / "cache")
    assert other.folder != probes.folder and other.parents == {"model": retrained.hash}
    assert np.mean(list(other.json("words.json")["probe_f1"].values())) < 0.5
    assert probes_of(first, tmp_path / "cache", SEED + 1).folder != probes.folder


def test_the_seed_alone_decides_and_nothing_is_left_behind(model, cache, clean, tmp_path, monkeypatch):
    import sae_bench

    places = Path(sae_bench.__file__).parent, model.folder, tmp_path
    monkeypatch.chdir(tmp_path)
    random.seed(1)
    torch.manual_seed(1)
    before = state(*places)
    assert run_and_listen(spelling_sae({}), model, cache) == clean and len(set(clean[1])) > 80
    assert torch.is_grad_enabled() and state(*places) == before


def test_a_model_that_cannot_be_asked_is_not_run(model, tmp_path, monkeypatch):
    from sae_bench.evals.absorption import vocab

    lacking = load_model(save_spelling_model(tmp_path / "lacking", lacking="QRSTUVWXYZ"), context=CONTEXT)
    with pytest.raises(NotRun, match=r'no single token for the answer " Q" \(10 of the 26 letters\)'):
        probes_of(lacking, tmp_path)
    with pytest.raises(NotRun, match="prompts have 88 tokens, more than model.context_size, 64"):
        probes_of(load_model(model.folder, context=64), tmp_path)
    sae = sae_of(torch.eye(WIDTH)[:2])
    with pytest.raises(NotRun, match="the SAE has 2 latents, and sae_bench's probes pick up to 3"):
        run(sae, model, tmp_path)
    real = vocab.get_alpha_tokens
    monkeypatch.setattr(
        vocab, "get_alpha_tokens", lambda tokenizer: [word for word in real(tokenizer) if word[1] not in "xX"]
    )
    with pytest.raises(NotRun, match="no word of the train split starts with 'x'"):
        probes_of(model, tmp_path / "other")


def test_an_outside_model_is_not_run_and_says_why(test_model, tmp_path):
    outside = load_model(test_model, layer=1, context=CONTEXT)
    with pytest.raises(NotRun, match="no single token for the answer|reach F1"):
        probes_of(outside, tmp_path)
