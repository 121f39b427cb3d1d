"""The same notebooks on other models: one from outside by every stage, a tiny Gemma-2 by the paper's own
settings."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders.models import save_model

from dmsae_lib.config.run import Run, open_run
from dmsae_lib.store import artifacts

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_name(request):
    """A name below runs/ for this test alone, removed afterwards."""
    name = f"test-{request.node.name.split('_')[1]}-{os.getpid()}"
    yield name
    shutil.rmtree(ROOT / "runs" / name, ignore_errors=True)


def run_stages(config: str, run: str, overrides: list[str], stage: str = "stages") -> Run:
    """Plan and make, as `make stages CONFIG=... RUN=... SET=... STAGE=...` does."""
    command = [
        sys.executable,
        "-m",
        "dmsae_lib.command.plan",
        "--config",
        config,
        "--run",
        run,
        "--make",
        "make",
        stage,
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    python = os.path.relpath(sys.executable, ROOT)  # the absolute path may hold a space
    environment |= {"PY": python, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, *(word for setting in overrides for word in ("--set", setting))],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    return open_run(config, run, overrides)


def text_beside(model: Path) -> str:
    """Text that comes with the model, where there is some."""
    found = [
        path
        for name in ("generated_stories.txt", "tinystories_leozoroaster.txt")
        if (path := model.parent / name).is_file()
    ]
    return str(found[0]) if found else "embedded"


def test_outside_model_by_every_stage(test_model, run_name):
    config = json.loads((test_model / "config.json").read_text())
    width = config["hidden_size"]
    run = run_stages(
        "smoke",
        run_name,
        [
            "threads=1",
            f"model.name={json.dumps(str(test_model))}",
            "model.hook_name=blocks.2.hook_resid_post",
            "model.context_size=64",
            f"data.source={json.dumps(text_beside(test_model))}",
            "data.train_tokens=6000",
            "data.select_tokens=1000",
            "data.test_tokens=1000",
            "data.fresh_factor=1",
            "distill.cycles=1",
            "retrain.ks=[32]",
            "retrain.controls={random: 1}",
            "saebench.probing_sets=[]",
        ],
    )
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


def test_gemma_by_the_settings_of_the_paper(one_thread, run_name, tmp_path):
    """bfloat16, one document per row, streamed, autocast: configs/gemma-2-2b.yaml with only names and sizes
    changed."""
    words = "the cat sat on a mat def main return x in range pain chest and dog looked".split()
    source = random.Random(0)
    texts = [" ".join(source.choices(words, k=source.randint(1, 12))) for _ in range(4000)]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    model = save_model(tmp_path / "tiny gemma", "gemma2", layers=3, context=16)
    learn(model, texts)
    run = run_stages(
        "gemma-2-2b",
        run_name,
        [
            "threads=1",
            f"model.name={json.dumps(str(model))}",
            "model.hook_name=blocks.1.hook_resid_post",
            "model.context_size=16",
            f"data.source={json.dumps(str(tmp_path / 'texts.jsonl'))}",
            "data.train_tokens=10000",
            "data.select_tokens=500",
            "data.test_tokens=500",
            "data.buffer_rows=64",
            "sae.d_sae=256",
            "sae.prefixes=[8, 24, 56, 120]",
            "training.k=16",
            "training.batch_size=128",
            "training.k_aux=16",
            "training.dead_window=4000",
            "training.lr=3e-3",
            "distill.cycles=1",
            "retrain.ks=[16]",
            "retrain.controls_at=[16]",
        ],
        stage="cycle_1_train",
    )
    paper = open_run("gemma-2-2b").config
    for section, names in {
        "model": ("dtype",),
        "data": ("packing", "store"),
        "training": ("autocast", "core_sparsity"),
    }.items():
        assert all(
            getattr(getattr(run.config, section), name) == getattr(getattr(paper, section), name)
            for name in names
        )
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
