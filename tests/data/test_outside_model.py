"""The same notebooks on other models: one from outside by every stage, a tiny Gemma-2 by the paper's own
settings."""

import json
import random
from pathlib import Path

import pytest
import torch
from builders.models import save_model
from builders.run import execute, execute_all, open_tiny, stage_of

from dmsae_lib.config import load_config
from dmsae_lib.store import artifacts


def text_beside(model: Path) -> str:
    """Text that comes with the model, where there is some."""
    found = [
        path
        for name in ("generated_stories.txt", "tinystories_leozoroaster.txt")
        if (path := model.parent / name).is_file()
    ]
    return str(found[0]) if found else "embedded"


def test_outside_model_by_every_stage(test_model, tmp_path):
    config = json.loads((test_model / "config.json").read_text())
    width = config["hidden_size"]
    overrides = f"""
        threads=1
        model.name={json.dumps(str(test_model))}
        model.hook_name=blocks.2.hook_resid_post
        model.context_size=64
        data.source={json.dumps(text_beside(test_model))}
        data.train_tokens=6000
        data.select_tokens=1000
        data.test_tokens=1000
        data.fresh_factor=1
        distill.cycles=1
        retrain.ks=[32]
        retrain.controls={{random: 1}}
        saebench.probing_sets=[]
    """
    run = open_tiny(tmp_path, "outside", *overrides.strip().split("\n        "), config="smoke")
    execute_all(run)
    harvest = artifacts.load(run.folder / "harvest", "harvest").json("record.json")
    assert (harvest["model"]["d_model"], harvest["model"]["n_layers"]) == (width, config["num_hidden_layers"])
    assert harvest["clean_loss"] < 0.7 * harvest["zero_loss"]  # a model that knows something about this text
    summary = json.loads((run.folder / "summary" / "summary.json").read_text())
    assert summary["inputs"]["model"]["name"] == str(test_model) and summary["sizes"]["d_in"] == width
    assert [row["cycle"] for row in summary["cycles"]] == [0, 1] and summary["final_core"]["size"] > 0
    assert {row["arm"] for row in summary["retrain"]} == {"none", "distilled", "random"}
    for row in summary["retrain"]:
        assert row["loss_recovered"] > 0.5, row
        scored = row["chain"] == "main" and row["arm"] in run.config.saebench.arms
        assert row["saebench"]["ce_loss_score"] > 0.5 if scored else row["saebench"] is None, row
    assert len(list((run.folder / "figures").glob("*.png"))) >= 8


def learn(folder: Path, texts: list[str]) -> None:
    """Teach the model in ``folder`` enough of ``texts`` that its residual stream carries something."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for start in range(0, 64 * 40, 64):
        ids = tokenizer(
            texts[start : start + 64], padding=True, truncation=True, max_length=16, return_tensors="pt"
        )["input_ids"]
        loss = model(ids, labels=torch.where(ids == tokenizer.pad_token_id, -100, ids)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def test_gemma_by_the_settings_of_the_paper(one_thread, tmp_path):
    """bfloat16, one document per row, streamed, autocast: configs/gemma-2-2b.yaml with only names and sizes
    changed."""
    words = "the cat sat on a mat def main return x in range pain chest and dog looked".split()
    source = random.Random(0)
    texts = [" ".join(source.choices(words, k=source.randint(1, 12))) for _ in range(4000)]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    model = save_model(tmp_path / "tiny gemma", "gemma2", layers=3, context=16)
    learn(model, texts)
    overrides = f"""
        threads=1
        model.name={json.dumps(str(model))}
        model.hook_name=blocks.1.hook_resid_post
        model.context_size=16
        data.source={json.dumps(str(tmp_path / "texts.jsonl"))}
        data.train_tokens=10000
        data.select_tokens=500
        data.test_tokens=500
        data.buffer_rows=64
        sae.d_sae=256
        sae.prefixes=[8, 24, 56, 120]
        training.k=16
        training.batch_size=128
        training.k_aux=16
        training.dead_window=4000
        training.lr=3e-3
        distill.cycles=1
        retrain.ks=[16]
        retrain.controls_at=[16]
        saebench.suite.ks=[16]
    """
    run = open_tiny(tmp_path, "paper", *overrides.strip().split("\n        "), config="gemma-2-2b")
    for stage in ("harvest", "cycle_0_train", "cycle_0_attribute", "cycle_0_distill", "cycle_1_train"):
        execute(run, stage_of(run, stage))
    paper, kept = load_config("gemma-2-2b"), {"model": ("dtype",), "data": ("packing", "store")}
    for section, names in (kept | {"training": ("autocast", "core_sparsity")}).items():
        for name in names:
            assert getattr(getattr(run.config, section), name) == getattr(getattr(paper, section), name)
    harvest = artifacts.load(run.folder / "harvest", "harvest").json("record.json")
    assert harvest["model"]["architecture"] == "Gemma2ForCausalLM" and harvest["shards"] == 0
    core = artifacts.load(run.cycle(0, "core"), "core").tensors("core.safetensors")["W_enc"]
    trained = artifacts.load(run.cycle(1, "sae"), "sae")
    metrics = trained.json("metrics.json")
    assert (
        trained.tensors("sae.safetensors")["core_rows"].numpy().tobytes()
        == core.T.contiguous().numpy().tobytes()
    )
    assert metrics["core_in"] == core.shape[1] > 0 and metrics["fvu"]["full"] < 0.9
    assert metrics["unbound"] or metrics["L0"]["total"] == pytest.approx(16, rel=0.05)
