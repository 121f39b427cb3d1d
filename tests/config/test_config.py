"""Configurations: every one in configs/ loads, overrides, names of runs, chains and arms."""

from pathlib import Path

import pytest
import yaml

from dmsae_lib.config import RunConfig, load_config, sections
from dmsae_lib.config.run import Run, open_run
from dmsae_lib.config.sections import CONTROLS, UNFROZEN
from dmsae_lib.config.yaml_file import split_overrides
from dmsae_lib.store import artifacts
from dmsae_lib.store.artifacts import UserError

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_loads_by_name_and_by_path(name):
    config = load_config(name)
    assert config.name == name and config == load_config(ROOT / "configs" / f"{name}.yaml")
    again = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))
    assert (
        type(config).model_validate(again) == config
    )  # what a run's config.yaml holds is the same configuration


def test_the_regime_of_the_paper():
    """Method, sections 4, 7c and 9: sizes, schedule and the rounds."""
    paper = load_config("gemma-2-2b")
    assert paper.steps() == 244_140 and round(paper.training.warmup * paper.steps()) == 1000
    assert [m / paper.sae.d_sae for m in paper.sae.prefixes] == [1 / 32, 3 / 32, 7 / 32, 15 / 32]
    assert (paper.training.k, paper.distill.cycles, paper.training.k_aux) == (320, 7, 2304 // 2)
    default = load_config("default")
    assert [m / default.sae.d_sae for m in default.sae.prefixes] == [1 / 32, 3 / 32, 7 / 32, 15 / 32]
    assert default.distill.cycles == 7 and default.data.fresh_factor == 8


def test_extended_has_five_chains_of_each_kind_and_every_control_at_every_k():
    default, extended = load_config("default"), load_config("extended")
    for section in ("model", "sae", "training"):
        assert getattr(extended, section) == getattr(default, section)
    assert (
        extended.data.train_tokens == default.data.train_tokens and extended.retrain.ks == default.retrain.ks
    )
    settings = {
        name: extended.for_chain(name)
        for name in ("main", *(chain.name for chain in extended.distill.chains))
    }
    kinds = {
        name: (c.training.core_sparsity, c.training.core_decoder_init, c.seed) for name, c in settings.items()
    }
    assert sorted(kinds.values()) == sorted(
        (*kind, seed) for kind in (("batchtopk", "encoder"), ("relu", "random")) for seed in range(5)
    )
    assert extended.retrained_chains == list(kinds)  # each with its own core
    for name, (sparsity, _, seed) in kinds.items():
        arms = ["none", "distilled", *CONTROLS, *UNFROZEN] if sparsity == "batchtopk" else ["distilled"]
        assert all(
            sorted(extended.retrain_arms(k, name)) == sorted((arm, 0) for arm in arms)
            for k in extended.retrain.ks
        )
        twin = next(other for other, kind in kinds.items() if kind[2] == seed)
        assert extended.trains(name, 0) == twin and extended.trains(name, 1) == name
        prefix = "" if twin == "main" else f"chain_{twin}_"
        # a stage that there is
        assert Run(extended, "extended", ROOT).stage(0, "train", name) == f"{prefix}cycle_0_train"
        assert bool(settings[name].distill.placebos) == (sparsity == "batchtopk")


def test_a_chain_cannot_count_twice():
    """Two chains of one seed and the same core settings are one chain; with other core settings they are
    two."""
    load_config(
        "smoke",
        ["distill.chains=[{name: a, core_sparsity: batchtopk}, {name: b, core_bias_init: match_frequency}]"],
    )
    for chains in ("{name: a}", "{name: a, seed: 3}, {name: b, seed: 3}"):
        with pytest.raises(UserError, match="would count twice"):
            load_config("smoke", [f"distill.chains=[{chains}]"])


def test_overrides_reach_any_depth_and_take_yaml():
    config = load_config(
        "smoke",
        [
            "training.k=16",
            "training.lr=1e-2",
            "retrain.ks=[16, 48]",
            "retrain.controls_at=[16]",
            "model.name=my model",
            "data.store=stream",
            "seed=3",
            "saebench.probing_sets=[]",
        ],
    )
    assert (config.training.k, config.training.lr, config.retrain.ks, config.seed) == (16, 0.01, [16, 48], 3)
    assert (config.model.name, config.data.store, config.saebench.probing_sets) == ("my model", "stream", [])
    assert load_config("smoke").training.k == 32


def test_the_hash_depends_on_the_settings_alone(tmp_path):
    text = (ROOT / "configs" / "smoke.yaml").read_text()
    (tmp_path / "smoke.yaml").write_text("# a comment\n" + text)
    plain = load_config("smoke")
    assert load_config(tmp_path / "smoke.yaml").hash == plain.hash
    assert (
        load_config("smoke", ["training.k=32"]).hash
        == plain.hash
        != load_config("smoke", ["training.lr=1e-2"]).hash
    )


@pytest.mark.parametrize(
    "override, suggestion",
    [
        (
            "training.learning_rate=1",
            "unknown key training.learning_rate; known there: core_sparsity, core_bias_init",
        ),
        ("training.grad_clipp=1", "unknown key training.grad_clipp; did you mean grad_clip?"),
        ("traning.k=1", "unknown key traning; did you mean training?"),
        ("distill.chains=[{name: a, sead: 1}]", "unknown key distill.chains.0.sead; did you mean seed?"),
    ],
)
def test_an_unknown_key_is_named_with_a_suggestion(override, suggestion):
    with pytest.raises(UserError) as caught:
        load_config("smoke", [override])
    assert suggestion in str(caught.value)


def test_a_run_is_named_by_its_configuration_and_its_overrides():
    assert open_run("smoke").folder == ROOT / "runs" / "smoke"
    assert open_run("smoke", "", ["training.k=32"]).name == "smoke"  # as it stands anyway
    changed = open_run("smoke", "", ["training.lr=1e-2"])
    assert changed.name == f"smoke--{changed.config.hash[:8]}"
    assert changed.name == open_run("smoke", "", ["training.lr=1e-2"]).name
    assert len({open_run("smoke", "", [f"seed={seed}"]).name for seed in range(4)}) == 4
    assert open_run("smoke", "mine", ["training.lr=1e-2"]).folder == ROOT / "runs" / "mine"


@pytest.mark.parametrize(
    "name", ["..", ".", "../results", "a/b", "/tmp/x", "-x", ".hidden", "a b", "a\n", "über", "a$b"]
)
def test_a_run_cannot_leave_the_folder_of_runs(name):
    with pytest.raises(UserError, match="cannot name a folder: use letters, digits"):
        open_run("smoke", name)
    with pytest.raises(UserError, match="name is"):
        load_config("smoke", [f"name={yaml.safe_dump(name)}"])


def test_where_a_run_keeps_its_stages():
    run = open_run("smoke")
    assert run.cycle(2, "core") == run.folder / "cycle_2" / "core"
    assert run.cycle(2, "sae", "other") == run.folder / "chain_other" / "cycle_2" / "sae"
    assert run.retrained(32, "random", 1) == run.folder / "retrain" / "k32" / "random-seed1"
    assert run.scores(32, "random", 1) == run.folder / "saebench" / "k32" / "random-seed1"
    of_chain = run.folder / "chain_b" / "saebench" / "k32" / "distilled-seed1"
    assert run.scores(32, "distilled", 1, "b") == of_chain


def test_a_chain_takes_its_own_seed_and_core_settings_and_nothing_else():
    """But for the placebos, the null of a claim that is judged by chains of the main one's kind."""
    config = load_config(
        "smoke", ["distill.chains=[{name: b, seed: 5, core_sparsity: batchtopk}, {name: d, seed: 6}]"]
    )
    assert config.for_chain("main") == config
    assert config.for_chain("d").model_copy(update={"seed": 0}) == config and config.distill.placebos
    other = config.for_chain("b")
    assert (other.seed, other.training.core_sparsity, other.training.core_bias_init) == (
        5,
        "batchtopk",
        "zero",
    )
    assert other.distill.placebos == []
    update = {
        "seed": 0,
        "training": other.training.model_copy(update={"core_sparsity": "relu"}),
        "distill": config.distill,
    }
    assert other.model_copy(update=update) == config
    with pytest.raises(UserError, match="no chain 'c' in config smoke: use one of main, b"):
        config.for_chain("c")


def test_arms_at_each_k():
    config = load_config(
        "smoke",
        ["retrain.ks=[32, 48]", "retrain.seeds=[4, 7]", "retrain.controls={random: 2, most_frequent: 1}"],
    )
    pairs = [("none", 4), ("none", 7), ("distilled", 4), ("distilled", 7)]
    controls = [("random", 4), ("random", 7), ("most_frequent", 4)]
    assert config.control_ks == [config.training.k] == [32]
    assert config.retrain_arms(32) == pairs + controls and config.retrain_arms(48) == pairs
    everywhere = load_config(
        "smoke",
        [
            "retrain.ks=[32, 48]",
            "retrain.seeds=[4]",
            "retrain.controls={random: 1}",
            "retrain.controls_at=[32, 48]",
        ],
    )
    assert [len(everywhere.retrain_arms(k)) for k in (32, 48)] == [3, 3]
    assert load_config("smoke", ["retrain.controls={}"]).control_ks == []


def test_seeds_that_only_the_distillation_k_has_and_those_of_a_chain():
    b, c = "{name: b, seed: 3, retrain: [distilled]}", "{name: c, seed: 4, seeds: [9], retrain: [none]}"
    chains = f"distill.chains=[{b}, {c}]"
    config = load_config(
        "smoke", ["retrain.ks=[32, 48]", "retrain.seeds=[4]", "retrain.more_seeds=[5, 6]", chains]
    )
    found = {k: [s for arm, s in config.retrain_arms(k) if arm == "distilled"] for k in (32, 48)}
    assert found == {32: [4, 5, 6], 48: [4]}
    for k in (32, 48):  # more seeds are the main chain's; another chain has its own, or those of all
        assert config.retrain_arms(k, "b") == [("distilled", 4)]
        assert config.retrain_arms(k, "c") == [("none", 9)]


def test_a_chain_has_its_controls_where_the_main_one_has():
    chain = "distill.chains=[{name: b, seed: 3, seeds: [0, 5], retrain: [distilled], controls: [pca]}]"
    config = load_config("smoke", ["retrain.ks=[16, 32]", "retrain.controls={}", chain])
    own = [(arm, seed) for arm in ("distilled", "pca") for seed in (0, 5)]
    assert config.retrain_arms(32, "b") == own and config.retrain_arms(16, "b") == own[:2]
    assert "pca" not in dict(config.retrain_arms(32))
    assert "controls" not in load_config("smoke").distill.chains[0].model_dump()


def test_a_run_that_scores_the_main_chain_alone_is_the_same_as_before_there_were_others():
    """Nothing is written of the default, by which a finished run would be stale."""
    plain, said = load_config("smoke"), load_config("smoke", ["saebench.chains=[main]"])
    other = load_config("smoke", ["saebench.chains=[equal-l0, main]"])
    assert plain == said and plain.hash == said.hash != other.hash
    assert "chains" not in plain.model_dump()["saebench"]
    assert other.model_dump()["saebench"]["chains"] == ["equal-l0", "main"]
    assert plain.saebench.decisive() == other.saebench.decisive()  # no score depends on it
    assert other.scorable[:2] == [(32, "distilled", 0, "equal-l0"), (32, "none", 0, "main")]


def test_further_seeds_can_be_scored():
    config = load_config("smoke", ["retrain.more_seeds=[7]", "saebench.suite.seeds=[7]"])
    assert (32, "distilled", 7, "main") in config.scorable


def test_steps_cover_the_tokens_of_a_cycle():
    config = load_config("smoke")
    assert config.steps() == 12000 // 256 and config.steps(3) == 3 * 12000 // 256


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A folder that stands in for the repository, with a model, a text and an SAE of the user's in it."""
    root = tmp_path.resolve() / "clone"
    for name in ("configs", "notebooks", "models/mine", "texts", "saes/theirs", "elsewhere/owner/name"):
        (root / name).mkdir(parents=True)
    monkeypatch.setattr(artifacts, "repository_root", lambda: root)
    return root


def write_config(path: Path, **sections: dict) -> None:
    tree = yaml.safe_load((ROOT / "configs" / "smoke.yaml").read_text())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        yaml.safe_dump(tree | {name: tree.get(name, {}) | changed for name, changed in sections.items()})
    )


def test_whatever_is_a_file_in_configs_can_be_named(repository, monkeypatch):
    for name in ("plain", "my.v2", "2024.01", "a.yaml.b", "lr-1e-3.seed0"):
        write_config(repository / "configs" / f"{name}.yaml")
    (repository / "configs" / "folder.yaml").mkdir()
    with pytest.raises(UserError) as caught:
        load_config("my.v3")
    listed = (
        str(caught.value)
        .partition("use one of ")[2]
        .removesuffix(", or the path of a YAML file.")
        .split(", ")
    )
    assert listed == sorted(("plain", "my.v2", "2024.01", "a.yaml.b", "lr-1e-3.seed0"))
    for place in (repository, repository / "notebooks"):
        monkeypatch.chdir(place)
        for name in listed:
            for said in (name, f"{name}.yaml", f"configs/{name}.yaml"):
                assert load_config(said).name == name and open_run(said).folder == repository / "runs" / name


PATHS = {
    "model": {"name": "models/mine"},
    "data": {"source": "texts"},
    "distill": {"from_sae": "./saes/theirs", "chains": []},
    "retrain": {"imported": {"theirs": "saes/theirs", "hub": "release:sae_id"}},
    "saebench": {"suite": {"data": "texts", "unlearning_corpus": "texts/../models"}},
}


def places(config: RunConfig) -> list[str | None]:
    suite = config.saebench.suite
    return [
        config.model.name,
        config.data.source,
        config.distill.from_sae,
        config.retrain.imported["theirs"],
        suite.data,
        suite.unlearning_corpus,
    ]


def test_a_path_means_the_same_wherever_python_runs(repository, monkeypatch):
    """Below the repository's root, also where another thing of that name lies in the folder that Python runs
    in."""
    write_config(repository / "configs" / "mine.yaml", **PATHS)
    (repository / "notebooks" / "texts").mkdir()
    found = []
    for place in (repository, repository / "notebooks", repository / "models" / "mine", repository.parent):
        monkeypatch.chdir(place)
        found.append(load_config("mine"))
    expected = ["models/mine", "texts", "saes/theirs", "saes/theirs", "texts", "models"]
    assert all(places(config) == [str(repository / path) for path in expected] for config in found)
    assert (
        len({config.hash for config in found}) == 1 and found[0].retrain.imported["hub"] == "release:sae_id"
    )
    dumped = found[0].model_dump(
        mode="json"
    )  # goes into hashes, parameters files and the run's copy: no machine's own paths
    assert (
        str(repository) not in yaml.safe_dump(dumped)
        and RunConfig.model_validate(dumped).hash == found[0].hash
    )
    assert dumped["distill"]["from_sae"] == "./saes/theirs"


def test_in_a_yaml_outside_the_repository_paths_begin_at_its_folder(repository, monkeypatch):
    theirs = repository.parent / "their project"
    write_config(theirs / "mine.yaml", **PATHS)
    for name in ("models/mine", "texts", "saes/theirs"):
        (theirs / name).mkdir(parents=True)
    for place in (repository, theirs, repository.parent):
        monkeypatch.chdir(place)
        config = load_config(theirs / "mine.yaml")
        assert places(config)[:4] == [
            str(theirs / path) for path in ("models/mine", "texts", "saes/theirs", "saes/theirs")
        ]
    copy = repository / "runs" / "mine" / "config.yaml"  # what the notebooks of a run are given
    copy.parent.mkdir(parents=True)
    copy.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(copy) == config and load_config(copy).hash == config.hash


def test_names_of_nothing_local_stay_as_they_are(repository, monkeypatch):
    (repository / "embedded").mkdir()
    (repository / "wheeltext-4x128").mkdir()  # as an embedded model is called, which comes first
    names = {
        "model": {"name": "wheeltext-4x128"},
        "data": {"source": "embedded"},
        "distill": {"from_sae": "release:sae"},
    }
    write_config(repository / "configs" / "mine.yaml", **names)
    monkeypatch.chdir(repository / "notebooks")
    config = load_config("mine", ["data.source=owner/name"])
    assert (config.model.name, config.data.source, config.distill.from_sae) == (
        "wheeltext-4x128",
        "owner/name",
        "release:sae",
    )
    assert load_config("mine").data.source == "embedded"
    # where a folder of that name would be taken for it, but only here
    monkeypatch.chdir(repository / "elsewhere")
    with pytest.raises(UserError) as caught:
        load_config("mine", ["data.source=owner/name"])
    assert (
        f"data.source is owner/name: paths are relative to {repository}, where there is no such thing"
        in str(caught.value)
    )


@pytest.mark.parametrize(
    "text, overrides",
    [
        ("training.k=32", ["training.k=32"]),
        (" training.k=24  retrain.ks=[24] seed=1 ", ["training.k=24", "retrain.ks=[24]", "seed=1"]),
        ("model.name=my model seed=1", ["model.name=my model", "seed=1"]),
        (
            "retrain.ks=[8, 16] retrain.controls={random: 1, pca: 2}",
            ["retrain.ks=[8, 16]", "retrain.controls={random: 1, pca: 2}"],
        ),
        ("model.name=\"a b=c\" data.source='d e=f'", ['model.name="a b=c"', "data.source='d e=f'"]),
        ("model.name=o'brien data.source=o'hara", ["model.name=o'brien", "data.source=o'hara"]),
        ('retrain.controls={"random":1}', ['retrain.controls={"random":1}']),
    ],
)
def test_several_overrides_in_one_text(text, overrides):
    assert split_overrides(text) == overrides
    assert split_overrides(" ".join(overrides)) == overrides


@pytest.mark.parametrize("text", ["seed: 2024-13-45", "seed: !!int x", "[" * 5000, b"seed: \xff"])
def test_whatever_yaml_makes_of_it_a_broken_file_is_one_sentence(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match="mine.yaml is not valid YAML: "):
        load_config(path)


def test_an_open_list_takes_a_name_that_is_added_to_it(monkeypatch):
    overrides = [
        "distill.aggregator=toy_mean",
        "distill.placebos=[toy_rows]",
        "retrain.arms=[none, toy_rows, toy_free]",
        "saebench.suite.evals=[toy_eval]",
    ]
    for override in overrides:
        with pytest.raises(UserError, match="toy_.*must be one of"):
            load_config("smoke", [override])
    monkeypatch.setitem(sections.ARMS, "toy_rows", "new rows")
    monkeypatch.setitem(sections.ARMS, "toy_free", "unfrozen")
    sections.AGGREGATORS.append("toy_mean")
    sections.EVALS.append("toy_eval")
    try:
        config = load_config("smoke", overrides)
    finally:
        sections.AGGREGATORS.remove("toy_mean")
        sections.EVALS.remove("toy_eval")
    assert config.distill.aggregator == "toy_mean" and "toy_rows" in CONTROLS and "toy_free" not in CONTROLS


def test_a_misspelt_key_that_is_needed_is_named_as_it_stands(tmp_path):
    tree = yaml.safe_load((ROOT / "configs" / "smoke.yaml").read_text())
    tree["training"]["batchsize"] = tree["training"].pop("batch_size")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=r"unknown key training\.batchsize; did you mean batch_size\?"):
        load_config(tmp_path / "mine.yaml")
