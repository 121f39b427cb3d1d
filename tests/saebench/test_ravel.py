"""RAVEL on a tiny model that has learnt made-up facts about nine cities, whose embeddings name country and
language."""

import json

import pytest
import torch
from builders.models import save_model
from builders.saebench import load_model, make_bench, sae_of

from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.sae.model import FoldedSAE
from dmsae_lib.saebench import ravel as saebench_ravel
from dmsae_lib.saebench.ravel import run_ravel
from dmsae_lib.saebench.runner import NotRun

CITIES = "ABCDEFGHI"
LABELS = {"Country": "xyz", "Language": "uvw"}  # city i lies in country i // 3 and speaks language i % 3
TEMPLATES = {
    "Country": [f"%s k{c}" for c in "abcdefghijkl"],
    "Language": [f"%s l{c}" for c in "abcdefghijkl"],
}
SELECTION = {"entity_attribute_selection": {"city": ["Country", "Language"]}}
SIZE = 8.0


def label(city: int, attribute: str) -> str:
    return LABELS[attribute][city // 3 if attribute == "Country" else city % 3]


def save_knowing(folder, steps: int):
    """Layer 0 does nothing, so the hook after it reads the embeddings; layer 1 and the head learn to
    answer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_model(folder, context=16)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding[:, :6] = 0
        for i, city in enumerate(CITIES):
            (token,) = tokenizer.encode(city, add_special_tokens=False)
            embedding[token] = 0
            embedding[token, [i // 3, 3 + i % 3]] = SIZE
        for part in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj):
            part.weight.zero_()
    prompts = [
        (template % city, label(i, attribute))
        for attribute, templates in TEMPLATES.items()
        for template in templates
        for i, city in enumerate(CITIES)
    ]
    rows = torch.tensor(
        [
            tokenizer.encode(prompt) + 7 * tokenizer.encode(answer, add_special_tokens=False)
            for prompt, answer in prompts
        ]
    )
    learnt = [*model.model.layers[1].parameters(), *model.model.norm.parameters(), model.lm_head.weight]
    optimiser = torch.optim.Adam(learnt, lr=5e-3)
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(
            model(rows).logits[:, -8:-1].flatten(0, 1), rows[:, -7:].flatten()
        )
        loss.backward()
        optimiser.step()
        model.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def few_batches(monkeypatch):
    monkeypatch.setattr(saebench_ravel, "BATCH_ROWS", 24)


@pytest.fixture(scope="module")
def model(one_thread, tmp_path_factory) -> LanguageModel:
    return load_model(save_knowing(tmp_path_factory.mktemp("models") / "knowing", steps=150), context=16)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    (base := folder / "adamkarvonen/ravel_prompts").mkdir(parents=True)
    for name, content in {
        "entity_attributes": {
            city: {attribute: label(i, attribute) for attribute in LABELS} for i, city in enumerate(CITIES)
        },
        "entity_to_split": dict.fromkeys(CITIES, "train"),
        "prompt_to_split": {template: "train" for templates in TEMPLATES.values() for template in templates},
        "attribute_to_prompts": TEMPLATES,
    }.items():
        (base / f"ravel_city_{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def latents_of(rows: torch.Tensor, bias: float = 0.0) -> FoldedSAE:
    sae = sae_of(torch.nn.functional.normalize(rows, dim=1))
    sae.b_enc.fill_(bias)
    return sae


def run(sae, model, cache, data, seed=0):
    return run_ravel(sae, model, make_bench(cache, data=data), seed, **SELECTION)


def test_latents_for_attributes_score_1_and_latents_for_cities_a_half(model, data, tmp_path):
    axes = torch.eye(model.d_model)[:6]
    cities = torch.stack([axes[i // 3] + axes[3 + i % 3] for i in range(9)])
    by_attribute = run(latents_of(axes), model, tmp_path, data)
    assert by_attribute["metrics"] == {"disentanglement_score": 1, "cause_score": 1, "isolation_score": 1}
    assert by_attribute["known_facts"] == {"city_Country": 108, "city_Language": 108}
    assert set(by_attribute["attributes"]) == {"city_Country", "city_Language"}

    # A city's latent fires with SIZE * sqrt(2) for it, half of that for its neighbours: only the first is
    # above the bias.
    sae = latents_of(cities, bias=-0.75 * SIZE * 2**0.5)
    sae.W_dec.data.mul_(4)  # what the bias took off
    by_city = run(sae, model, tmp_path, data)
    assert by_city["metrics"]["disentanglement_score"] < 0.6
    assert run(latents_of(axes), model, tmp_path, data) == by_attribute
    assert torch.is_grad_enabled() and not list(model.folder.glob("blocks*"))


def test_facts_are_looked_up_once_for_each_model(model, data, tmp_path, monkeypatch):
    from sae_bench.evals.ravel import instance

    calls = []
    real = instance.generate_batched
    monkeypatch.setattr(
        instance, "generate_batched", lambda *given, **options: calls.append(1) or real(*given, **options)
    )
    axes = torch.eye(model.d_model)[:6]
    first = run(latents_of(axes), model, tmp_path, data)
    assert run(latents_of(axes.flip(0)), model, tmp_path, None, seed=1)["known_facts"] == first["known_facts"]
    assert len(calls) == 1 and len(list(tmp_path.iterdir())) == 1
    ignorant = load_model(save_knowing(tmp_path / "ignorant", steps=0), context=16)
    for _ in range(2):
        with pytest.raises(
            NotRun,
            match=r"answers \d+ questions about city: Country rightly, with . different answers",
        ):
            run(latents_of(axes), ignorant, tmp_path, data)
    assert len(calls) == 2


def test_the_shim_puts_what_a_hook_returns_into_the_model(model):
    from transformers import AutoModelForCausalLM

    plain, tokens = AutoModelForCausalLM.from_pretrained(model.folder), torch.tensor([[0, 35, 40, 50]])
    seen = []

    def hook(module, inputs, outputs):
        seen.append(outputs[0])
        return (0 * outputs[0], *outputs[1:])

    before = plain(tokens).logits
    handle = saebench_ravel.LayerWithTuples(plain.model.layers[0]).register_forward_hook(hook)
    blank = plain(tokens).logits
    handle.remove()
    assert torch.allclose(seen[0], model.lower(tokens), atol=1e-5) and torch.equal(
        plain(tokens).logits, before
    )
    assert torch.allclose(blank, model.upper(tokens, torch.zeros(1, 4, model.d_model)), atol=1e-4)


def test_without_prompts_or_bos_the_reason_is_one_sentence(model, tmp_path, monkeypatch):
    sae = latents_of(torch.eye(model.d_model)[:6])
    why = r"^it needs the prompts of adamkarvonen/ravel_prompts, but (.* cannot be reached|HF_HUB_OFF)[^\n]*$"
    with pytest.raises(NotRun, match=why):
        run_ravel(sae, model, make_bench(tmp_path), 0)
    with pytest.raises(NotRun, match=r"and there is no .*nowhere/adamkarvonen/ravel_prompts$"):
        run_ravel(sae, model, make_bench(tmp_path, data=tmp_path / "nowhere"), 0)
    assert not list(tmp_path.iterdir()) and torch.is_grad_enabled()
    monkeypatch.setattr(model.tokenizer, "encode", lambda text: [5])
    with pytest.raises(NotRun, match="puts no BOS before a text"):
        run_ravel(sae, model, make_bench(tmp_path), 0)
