"""The closed forms of sizing, against torch's FLOP counter, real modules and the bytes of real artefacts."""

import gc
import json
import struct
from types import SimpleNamespace

import pytest
import torch
from builders import factory
from builders import sae as toy_sae
from builders.models import save_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.sizing import Machine, Op, SAESize, shape_of
from benchmarks.sizing_stages import BLOCK_COPIES, DOCUMENTS, KINDS, Sizing, Stage, Text, published
from dmsae_lib.command.plan import stages as stages_of
from dmsae_lib.config import load_config
from dmsae_lib.data import activations
from dmsae_lib.data.contexts import Contexts
from dmsae_lib.data.corpus import tokenise
from dmsae_lib.data.language_model import LanguageModel, next_token_loss
from dmsae_lib.distill.attribution import attribute
from dmsae_lib.figures import FIGURES
from dmsae_lib.report.results import Results
from dmsae_lib.sae.model import MatryoshkaSAE, save_sae
from dmsae_lib.sae.training import Trainer
from dmsae_lib.store import artifacts
from dmsae_lib.store.artifacts import UserError

CPU = Machine("two cores", "cpu", 1e11, 1e11, 1e10, 16 * 2**30, 32 * 2**20)
GPU = Machine("a GPU", "cuda", 3e14, 4e14, 2e12, 80e9, 50e6)
PILE = Text(0.5, 500)


def flops(work) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.fixture(scope="module", params=["embedded", "tiny_llama", "tiny_gemma2"])
def model(request, one_thread):
    if request.param == "embedded":
        return LanguageModel(load_config("default").model)
    return request.getfixturevalue(request.param)


def test_the_model_takes_the_flops_that_torch_counts(model):
    shape, rows, context = shape_of(str(model.folder)), 3, model.config.context_size
    tokens = torch.randint(3, 300, (rows, context), generator=torch.Generator().manual_seed(0))
    positions, below, layers = rows * context, model.layer + 1, model.n_layers
    assert flops(lambda: model.lower(tokens)) == shape.forward(positions, below, context, 4).flops
    resid = model.lower(tokens).requires_grad_(True)

    def forward():
        contexts = Contexts(tokens, torch.full((rows,), context), model.bos)
        return next_token_loss(model.upper(tokens, resid), contexts)[0]

    whole, upper = (
        shape.forward(positions, n, context, 4, logits=True).flops for n in (layers, layers - below)
    )
    back = shape.backward(positions, layers - below, context, 4).flops
    with torch.enable_grad():
        assert flops(forward) == upper
        assert flops(lambda: forward().backward()) == upper + back
        assert flops(lambda: model.logits(tokens)) == whole


def test_the_model_has_the_parameters_of_the_module(model):
    module = AutoModelForCausalLM.from_pretrained(model.folder)  # TransformerLens adds biases that are 0
    assert shape_of(str(model.folder)).parameters == sum(p.numel() for p in module.parameters())


def test_gemma_has_the_parameters_that_its_report_counts():
    shape = shape_of("google/gemma-2-2b")
    assert shape.parameters - shape.vocabulary * shape.d_model == 2_024_517_888  # arXiv 2408.00118, table 2


def test_another_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="a gpt2 model: sizing knows llama"):
        shape_of(str(tmp_path))


def size_of(sae) -> SAESize:
    return SAESize(sae.d_in, sae.d_sae, sae.n_core, sae.prefixes[:-1])


def tensors_in(path) -> int:
    """Bytes of a safetensors file behind its header."""
    raw = path.read_bytes()
    return len(raw) - 8 - struct.unpack("<Q", raw[:8])[0]


@pytest.mark.parametrize("core", [0, toy_sae.CORE])
def test_an_sae_holds_and_writes_the_bytes_that_it_should(tmp_path, core):
    sae = toy_sae.make_sae(core)
    size = size_of(sae)
    assert size.trained == sum(p.numel() for p in sae.parameters())
    with artifacts.write(tmp_path / "sae", "sae") as writer:
        save_sae(writer, sae, 1.0)
    assert size.file == tensors_in(tmp_path / "sae" / "sae.safetensors")
    trainer = Trainer(sae, toy_sae.config(), 10)
    trainer.train_step(toy_sae.batch(0))
    trainer.save(tmp_path / "checkpoint", {})
    assert size.checkpoint == tensors_in(tmp_path / "checkpoint" / "state.safetensors")
    states = trainer.optimizer.state.values()
    moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
    live = [*sae.parameters(), *(p.grad for p in sae.parameters()), *moments, sae.core_rows]
    assert size.training == sum(tensor.nbytes for tensor in live)


@pytest.mark.parametrize("dead", [0, 11])
@pytest.mark.parametrize("core", [0, toy_sae.CORE])
def test_a_dense_step_takes_the_flops_that_torch_counts(core, dead):
    k = 30  # of 60 latents: dense
    sae = toy_sae.make_sae(core)
    trainer = Trainer(sae, toy_sae.config(k=k, k_aux=5), 10)
    trainer.since_fired[core : core + dead] = 10**9
    ops = size_of(sae).step(toy_sae.BATCH, k, CPU, dead)
    assert not size_of(sae).sparse(k, "cpu")
    assert flops(lambda: trainer.train_step(toy_sae.batch(0))) == sum(op.flops for op in ops)


def test_a_sparse_step_leaves_the_encoder_and_the_core_to_dense_products():
    sae, k = toy_sae.make_sae(), 2
    assert size_of(sae).sparse(k, "cpu")
    ops = {op.name: op for op in size_of(sae).step(toy_sae.BATCH, k, CPU)}
    trainer = Trainer(sae, toy_sae.config(k=k), 10)
    counted = sum(ops[name].flops for name in ("encoder", "core", "weights and Adam"))
    assert flops(lambda: trainer.train_step(toy_sae.batch(0))) == counted
    assert ops["active entries"].flops == 4 * 2 * toy_sae.BATCH * k * toy_sae.D_IN


def test_attribution_takes_the_flops_of_its_candidates_at_all_positions():
    """Of the SAE's part: the model multiplies nothing. Half of each context is padding, encoded."""
    config = load_config("default", ["data.select_tokens=1000", "model.context_size=16"])
    sized = Sizing(config, shape_of("wheeltext-4x128"), CPU, Text(0.5, 8), core=5)
    sae = MatryoshkaSAE(128, config.sae.d_sae, config.sae.prefixes, torch.ones(5, 128)).requires_grad_(False)
    model = SimpleNamespace(
        bos=0,
        device="cpu",
        config=config.model,
        lower=lambda tokens: torch.ones(*tokens.shape, 128),
        upper=lambda tokens, resid: resid * 1,
        usable=lambda contexts, resid: contexts.usable(),
    )
    split = Contexts(torch.full((128, 16), 7), torch.full((128,), 8), 0)
    assert split.usable_count().sum() == sized.text.collected(1000)
    ops = [op for op in sized._attribute(sized.cored) if not op.forward]
    assert flops(lambda: attribute(model, sae, split)) == sum(op.flops for op in ops)


def test_rows_are_gathered_from_memory_where_their_table_is_larger_than_the_cache():
    size = SAESize(2304, 65536, 0, (2048,))
    moved = {op.name: op.bytes for op in size.step(2048, 80, GPU)}["active entries"]
    assert moved == 4 * 4 * 2048 * 80 * 2304 + 2 * 4 * 2304 * 65536
    assert "dense products" in {op.name for op in size.step(2048, 320, GPU)}


def test_the_slower_of_arithmetic_and_memory_decides_for_each_operation():
    ops = [Op("arithmetic", 4e14, 1e9), Op("memory", 1e9, 4e12), Op("language model", 3e14, 0, forward=True)]
    assert GPU.seconds(ops) == pytest.approx(1 + 2 + 1)


def test_the_token_files_are_those_that_tokenising_leaves(tmp_path):
    words = 40
    texts = (f"{i}" + " a" * (words - 1) for i in range(12_000))
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))

    class Words:
        bos_token_id = 0

        def __call__(self, texts, **_):
            return {"input_ids": [[5] * len(text.split()) for text in texts]}

    data = f"data.source={tmp_path / 'text.jsonl'} data.packing=one_per_row data.fresh_factor=8"
    sizes = "data.train_tokens=1875 data.select_tokens=400 data.test_tokens=10240"
    sizes += " model.context_size=64 training.batch_size=100"
    config = load_config("default", [*data.split(), *sizes.split()])
    made = tokenise(config.data, Words(), 64)
    sized = Sizing(config, shape_of("wheeltext-4x128"), CPU, Text(words / 64, words), core=10)
    assert sized.token_files == sum(split.tokens.nbytes for split in made.values())
    batches = -(-15_000 // (DOCUMENTS * words))
    found = made["train"].usable_count().sum()
    assert batches > 1 and sized.text.collected(15_000) == batches * DOCUMENTS * words == found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_shards_are_those_that_harvesting_leaves(tmp_path, tiny_llama, random_split, dtype):
    small = tiny_llama.config.model_copy(update={"dtype": dtype})
    changes = ["data.train_tokens=2000", "training.batch_size=100", "data.fresh_factor=8"]
    config = load_config("default", changes)
    config = config.model_copy(update={"model": small})
    splits = {name: random_split(200) for name in ("train", "select", "test")}
    with artifacts.write(tmp_path / "harvest", "harvest") as writer:
        activations.harvest(writer, LanguageModel(small), splits, config.data)
    shape = shape_of(str(tiny_llama.folder))
    shards = activations.StoredActivations(artifacts.load(tmp_path / "harvest", "harvest"), 1.0).shards
    assert sum(shard.nbytes for shard in shards) == Sizing(config, shape, CPU, PILE, 10).shards


def gemma(machine: Machine = GPU, overrides=("training.together=64",)) -> Sizing:
    config = load_config("gemma-2-2b", list(overrides))
    return Sizing(config, shape_of("google/gemma-2-2b"), machine, PILE, core=197)


def test_what_does_not_fit_beside_each_other_takes_another_pass():
    large = Machine("large", "cuda", 3e14, 4e14, 2e12, 1e12, 50e6)
    jobs, cycle = [(False, 1)] * 18, 500_000_000
    assert gemma(large).fits >= 18 and len(gemma(large).retrained["main"]) == 18
    assert gemma(large)._streamed(jobs) == cycle
    assert gemma(large)._streamed([*jobs, (False, 8), (True, 8)]) == (8 + 8) * cycle
    assert gemma(large, ["training.together=10"])._streamed(jobs) == 2 * cycle
    fits = gemma().fits
    assert 1 < fits < 18 and gemma()._streamed(jobs) == -(-18 // fits) * cycle
    assert gemma().training_memory(fits, 640) <= 0.9 * GPU.memory < gemma().training_memory(fits + 1, 640)


def test_stored_activations_are_not_made_again():
    stored = gemma(overrides=["data.store=disk"])
    assert stored._streamed([(False, 1)]) == 0
    assert stored.harvest().disk - gemma().harvest().disk == stored.shards == 500_000_000 * 2304 * 2
    streamed = gemma().train().flops - stored.train().flops
    assert streamed == pytest.approx(8 * stored.lower(500_000_000).flops)


def test_stages_add_up():
    plain = ["distill.chains=[]", "distill.placebos=[]"]
    config = load_config("default", [*plain, "learning_rate_sweep=[0.5, 2.0]"])
    default = Sizing(config, shape_of("wheeltext-4x128"), CPU, Text(0.98, 95), core=41)
    stages = {stage.kind: stage for stage in default.stages()}
    assert list(stages) == list(KINDS) and all(isinstance(stage, Stage) for stage in stages.values())
    assert [stages[kind].processes for kind in KINDS] == [1, 8, 8, 8, 1, 1, 1]
    assert len(default.retrained["main"]) == 29
    chains = "distill.chains=[{name: a, seed: 1}, {name: b, seed: 2}]"
    chains = load_config("default", [*plain, chains, "learning_rate_sweep=[]"])
    three = Sizing(chains, default.shape, CPU, default.text, core=41)
    assert three.train().flops == pytest.approx(3 * stages["train"].flops)
    assert three.train().disk == 3 * stages["train"].disk
    assert [stage.kind for stage in three.stages()] == [kind for kind in KINDS if kind != "learning_rate"]
    one = load_config("default", ["retrain.ks=[16]", "retrain.seeds=[0]", "retrain.controls={}"])
    pair = Sizing(one, default.shape, CPU, default.text, core=41)
    assert pair.retrain().disk == pair.plain.file + pair.cored.file
    assert pair.retrain().disk == 2 * 4 * (2 * 1024 * 128 + 1024 + 128) + 32


def test_shared_cycles_placebos_and_retrained_chains_are_counted_once_each():
    """Two placebos in each of seven cycles of the chains; a chain of the main one's seed shares its first."""
    chains = (
        "distill.chains=[{name: a, seed: 1, core_sparsity: batchtopk, core_decoder_init: encoder}, "
        "{name: b, core_sparsity: relu, retrain: [distilled]}]"
    )
    config = load_config("default", [chains, "distill.placebos=[random_directions, data_points]"])
    sized = Sizing(config, shape_of("wheeltext-4x128"), CPU, Text(0.98, 95), core=41)
    assert sized.cycles == (2, 21, 28)
    assert list(sized.retrained) == ["main", "b"]
    counts = sized.train().processes, sized.retrain().processes
    names = [stage.name for stage in stages_of(config)]
    assert counts == tuple(sum(name.endswith(end) for name in names) for end in ("_train", "retrain"))
    assert counts == (23, 2)


def test_every_scored_sae_of_every_chain_is_counted():
    """3 k's: the main chain's two arms with three seeds, and one arm with one seed of the chain beside it."""
    chain = "distill.chains=[{name: relu, core_sparsity: relu, seeds: [0], retrain: [distilled, random]}]"
    shape, text = shape_of("wheeltext-4x128"), Text(0.98, 95)
    main, both = (
        Sizing(load_config("default", [chain, f"saebench.chains={chains}"]), shape, CPU, text, core=41)
        for chains in ("[main]", "[main, relu]")
    )
    encoded = [
        [op for op in one.saebench().ops if op.name == main.cored.encode(1).name] for one in (main, both)
    ]
    per_sae = [sum(op.flops for op in ops) / n for ops, n in zip(encoded, (18, 21))]
    assert per_sae[0] == pytest.approx(per_sae[1]) and per_sae[0] > 0


def test_three_copies_of_a_streamed_block_live_while_the_next_is_made(monkeypatch):
    """Counted among all tensors at the moment of the last operation, whose result is the third."""
    rows, width, seen = 64, 1237, []  # a size that no other tensor has

    class Scale:
        def __rtruediv__(self, x):
            gc.collect()
            tensors = [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]
            seen.append(sum(tensor.numel() == rows * width for tensor in tensors))
            return x / 1.0

    blocks = [torch.ones(16, width) for _ in range(4)]
    clones = lambda model, split: iter([block.clone() for block in blocks])  # noqa: E731
    monkeypatch.setattr(activations, "usable_residuals", clones)
    data = load_config("default", ["data.store=stream", "data.buffer_rows=64"]).data
    contexts = Contexts(torch.zeros(200, 1), torch.ones(200), 0)
    source = activations.StreamedActivations(None, contexts, data, Scale())
    batches = source.batches(rows, 0, "test")
    for _ in range(3):
        next(batches)
    # the first block has none before it
    assert seen == [BLOCK_COPIES - 2, BLOCK_COPIES - 1, BLOCK_COPIES - 1]


@pytest.fixture
def results(tmp_path) -> Results:
    """A published synthetic run of seven cycles, each stage of which took two seconds."""
    run = factory.build_run(tmp_path)
    notebooks = [f"cycle_{t}_{part}" for t in range(8) for part in ("train", "attribute", "distill")]
    notebooks += ["harvest", "learning_rate", "retrain", "saebench", "summary"]
    (run.folder / "notebooks").mkdir()
    for name in notebooks:
        (run.folder / "notebooks" / f"{name}.json").write_text('{"seconds": 2.0}')
    return Results(factory.publish(run))


def test_what_was_measured_has_the_names_of_what_is_predicted(results):
    measured = published(results)
    times = dict.fromkeys(KINDS, 1) | dict.fromkeys(("train", "attribute", "distill"), 8)
    assert measured["processes"] == times
    assert measured["seconds"] == {kind: 2.0 * n for kind, n in times.items()}
    assert measured["hardware"]["cores"] and measured["threads"] == 2


def test_the_figure_is_drawn_for_the_summary_that_it_was_made_from(results):
    times = {"processes": 1, "start_up_seconds": 3.0, "measured_seconds": 9.0}
    stages = [{"kind": kind, "work_seconds": 2.0 * (kind != "distill"), **times} for kind in KINDS]
    hours = {"A": 20.0, "B": 7.0}
    machines = [{"name": name, "hours": {"train": n, "retrain": 2 * n}} for name, n in hours.items()]
    prediction = {"config": "large", "saes": 26, "machines": machines}
    record = {"config": "synthetic", "summary": "another", "stages": stages, "prediction": prediction}
    sizing = FIGURES["10_sizing"]
    assert sizing(results) is None
    artifacts.write_json(results.folder / "sizing.json", record)
    assert sizing(results) is None
    artifacts.write_json(results.folder / "sizing.json", record | {"summary": results.hash})
    figure = sizing(results)
    left, right = ([text.get_text() for text in axes.texts] for axes in figure.axes)
    assert right == ["60 h", "21 h"] and "(26 SAEs)" in figure.get_label()
    assert set(left) == {"× 1.8", "× 3.0"}  # distilling is starting alone
    seconds = {tuple(line.get_xdata()) for line in figure.axes[0].lines}
    assert {(5.0, 9.0), (5.0,), (3.0, 9.0), (9.0,)} <= seconds
    assert [bar.get_width() for bar in figure.axes[1].patches] == [20.0, 40.0, 0.0, 7.0, 14.0, 0.0]


def test_what_a_config_leaves_out_is_transformers_default(tmp_path):
    """Against the number of parameters that transformers makes of the same file."""
    folder = save_model(tmp_path / "llama", num_key_value_heads=4)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name in ("tie_word_embeddings", "num_key_value_heads", "head_dim"):
        config.pop(name, None)
    path.write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    assert shape_of(str(folder)).parameters == sum(p.numel() for p in model.parameters())
