"""Bad settings: what is wrong -> one sentence that names the setting, the value and the remedy."""

import pytest
from builders.sentences import assert_one_sentence

from dmsae_lib.config import RunConfig, load_config
from dmsae_lib.store.artifacts import UserError

# The configuration: overrides of configs/smoke.yaml -> what the sentence holds

CONFIG = {
    "a misspelt key": (["training.learning_rat=1"], ["unknown key training.learning_rat"]),
    "a misspelt section": (["trainning.k=1"], ["unknown key trainning", "did you mean training?"]),
    "text for a number": (["training.k=many"], ["training.k is 'many'", "a valid integer"]),
    "a fraction for a whole number": (["training.k=1.5"], ["training.k is 1.5", "a valid integer"]),
    "a negative number": (["training.lr=-1"], ["training.lr is -1", "greater than 0"]),
    "an unknown choice": (
        ["training.core_sparsity=topk"],
        ["training.core_sparsity is 'topk'", "'relu' or 'batchtopk'"],
    ),
    "an infinite rate": (["training.lr=.inf"], ["training.lr is inf", "finite"]),
    "a momentum of 1": (["training.betas=[0.9, 1.0]"], ["training.betas.1 is 1.0", "less than 1"]),
    "a floor above k": (["training.k_min=33"], ["training.k_min is 33", "retrain.ks", "32"]),
    "a chain's name that is none": (
        ["distill.chains=[{name: a/b}]"],
        ["distill.chains.0.name is 'a/b'", "letters, digits, '_' and '-'"],
    ),
    "a coverage above 1": (["distill.coverage=1.2"], ["distill.coverage is 1.2", "less than 1"]),
    "an unknown arm": (
        ["retrain.arms=[none, distiled]"],
        ["retrain.arms.1 is 'distiled'", "one of none, distilled,"],
    ),
    "no value": (["training.k"], ["'training.k' is not of the form section.key=value"]),
    "broken YAML": (["training.k=[1"], ["'training.k=[1'", "not valid YAML"]),
    "a setting below a setting": (["training.k.x=1"], ["k is not a section"]),
    "a required section taken out": (["model=null"], ["model is None", "dictionary"]),
    "prefixes that do not increase": (
        ["sae.prefixes=[16, 16, 48]"],
        ["sae.prefixes is [16, 16, 48]", "increase"],
    ),
    "no prefixes": (["sae.prefixes=[]"], ["sae.prefixes is []"]),
    "a prefix as wide as the SAE": (
        ["sae.prefixes=[16, 256]"],
        ["sae.prefixes ends at 256", "below sae.d_sae = 256"],
    ),
    "k above the width": (["training.k=257"], ["training.k is 257", "sae.d_sae = 256"]),
    "a later k above the width": (["retrain.ks=[32, 300]"], ["retrain.ks is 300", "sae.d_sae = 256"]),
    "less text than one batch": (
        ["data.train_tokens=100"],
        ["data.train_tokens is 100", "training.batch_size = 256"],
    ),
    "a buffer smaller than two batches": (
        ["data.store=stream", "data.buffer_rows=3"],
        ["data.buffer_rows is 3", "256"],
    ),
    "controls at a k that is not trained": (
        ["retrain.controls_at=[40]"],
        ["retrain.controls_at is 40", "retrain.ks"],
    ),
    "more draws than seeds": (["retrain.controls={random: 2}"], ["2 seeds of random", "retrain.seeds = [0]"]),
    "an arm twice": (["retrain.controls={none: 1}"], ["retrain.controls names none", "retrain.arms"]),
    "a further seed twice": (["retrain.more_seeds=[0]"], ["retrain.more_seeds names 0", "retrain.seeds"]),
    "further seeds at a k that is not trained": (
        ["retrain.more_seeds=[7]", "retrain.ks=[16]", "retrain.controls={}"],
        ["training.k is 32", "retrain.more_seeds", "retrain.ks = [16]"],
    ),
    "a control of a chain twice": (
        ["distill.chains=[{name: b, seed: 1, retrain: [pca], controls: [pca]}]"],
        ["distill.chains.0.controls names pca", "at every k"],
    ),
    "a chain's control at a k that is not trained": (
        ["distill.chains=[{name: b, seed: 1, controls: [pca]}]", "retrain.ks=[16]", "retrain.controls={}"],
        ["training.k is 32", "retrain.ks = [16]"],
    ),
    "a chain without seeds": (
        ["distill.chains=[{name: b, seed: 1, seeds: []}]"],
        ["distill.chains.0.seeds is []", "one entry at least"],
    ),
    "scores of a chain that is not there": (
        ["saebench.chains=[main, relu]"],
        ["saebench.chains names relu", "no chain that is retrained", "use main, equal-l0"],
    ),
    "scores of a chain that is not retrained": (
        ["distill.chains=[{name: relu, seed: 1}]", "saebench.chains=[relu]"],
        ["saebench.chains names relu", "no chain that is retrained", "use main"],
    ),
    "scores of arms that are not trained": (
        ["saebench.arms=[none, pca]", "saebench.chains=[equal-l0]"],
        ["saebench.arms is ['none', 'pca']", "chains = ['equal-l0'] has", "they have distilled"],
    ),
    "a suite of an arm that is not trained": (
        ["saebench.suite.arms=[pca]", "retrain.controls={}"],
        ["saebench.suite.arms is ['pca']", "chains = ['main'] has", "they have none, distilled"],
    ),
    "a suite at a k that is not trained": (
        ["saebench.suite.ks=[16]"],
        ["saebench.suite.ks is [16]", "they have 32"],
    ),
    "a suite of seeds that no SAE has": (
        ["saebench.suite.seeds=[7, 8]"],
        ["saebench.suite.seeds is [7, 8]", "they have 0"],
    ),
    "a suite of further seeds elsewhere than at their k": (
        ["retrain.ks=[16, 32]", "retrain.more_seeds=[7]", "saebench.suite={ks: [16], seeds: [7]}"],
        ["saebench.suite.seeds is [7]", "they have 0"],
    ),
    "no seeds": (["retrain.seeds=[]"], ["retrain.seeds is []", "one entry at least"]),
    "too little text for fresh tokens": (
        ["data.fresh_factor=2"],
        ["data.fresh_factor is 2", "distill.cycles + 1 = 3"],
    ),
    "another chain's core where no chain is alike": (
        ["retrain.controls={other_chain: 1}"],
        ["the arm other_chain of the chain main", "in its seed alone", "distill.chains"],
    ),
    "another chain's core for a chain that is alone": (
        ["distill.chains=[{name: a, seed: 1}, {name: b, core_sparsity: batchtopk, retrain: [other_chain]}]"],
        ["the arm other_chain of the chain b", "in its seed alone"],
    ),
    "two chains of one name": (
        ["distill.chains=[{name: a}, {name: a}]"],
        ["distill.chains is ['a', 'a']", "differ"],
    ),
    "prefixes of another SAE that do not increase": (
        ["distill.from_prefixes=[16, 16]"],
        ["from_prefixes is [16, 16]", "increase"],
    ),
    "a key twice": (["retrain.controls={random: 1, random: 1}"], ["the key random is there twice"]),
    "a hook of another kind": (
        ["model.hook_name=blocks.1.hook_mlp_out"],
        ["model.hook_name is 'blocks.1.hook_mlp_out'", "blocks.12.hook_resid_post", "no other place"],
    ),
}


@pytest.mark.parametrize("case", CONFIG)
def test_configuration(case):
    overrides, parts = CONFIG[case]
    with pytest.raises(UserError) as caught:
        load_config("smoke", overrides)
    assert_one_sentence(
        str(caught.value).replace("did you mean training?", "did you mean training?."), *parts
    )


SETS = {
    "retrain.ks": "[32, 16, 32]",
    "retrain.seeds": "[0, 1, 0]",
    "retrain.more_seeds": "[5, 6, 5]",
    "retrain.arms": "[none, distilled, none]",
    "retrain.controls_at": "[32, 32]",
    "distill.placebos": "[pca, pca]",
    "learning_rate_sweep": "[1, 2.0, 1.0]",
    "saebench.chains": "[main, main]",
    "saebench.arms": "[none, none]",
    "saebench.probing_ks": "[1, 5, 1]",
    "saebench.probing_sets": "[54_cs_tf, 54_cs_tf]",
    "saebench.suite.evals": "[mdl, mdl]",
    "saebench.suite.arms": "[none, none]",
    "saebench.suite.ks": "[32, 32]",
    "saebench.suite.seeds": "[0, 0]",
    "saebench.suite.eval_seeds": "[2, 0, 2]",
}


@pytest.mark.parametrize("setting", SETS)
def test_an_entry_that_is_there_twice(setting):
    """It would be trained, scored or counted twice, or fail after everything was trained."""
    with pytest.raises(UserError) as caught:
        load_config("smoke", [f"{setting}={SETS[setting]}"])
    assert_one_sentence(str(caught.value), f"smoke.yaml: {setting} names", "twice", "name each once")


def test_every_list_of_settings_is_a_set_or_in_order():
    """A list that is added later is one of the sets above, or is named here with what else refuses repeated
    entries."""
    of_chains = {"retrain": "[none, none]", "seeds": "[2, 2]", "controls": "[none, none]"}
    for name, value in of_chains.items():
        with pytest.raises(UserError, match=f"distill.chains.0.{name} names (none|2) twice"):
            load_config("smoke", [f"distill.chains=[{{name: a, seed: 1, {name}: {value}}}]"])
    in_order = {"sae.prefixes", "distill.from_prefixes", "distill.chains"}
    definitions = RunConfig.model_json_schema()["$defs"]

    def lists(section: dict, place: str = "") -> set[str]:
        found = set()
        for name, setting in section["properties"].items():
            for kind in setting.get("anyOf", [setting]):
                if kind.get("type") == "array" and "prefixItems" not in kind:
                    found.add(f"{place}{name}")
                held = definitions.get(kind.get("items", kind).get("$ref", "").split("/")[-1], {})
                found |= lists(held, f"{place}{name}.") if "properties" in held else set()
        return found

    known = {*SETS, *in_order, *(f"distill.chains.{name}" for name in of_chains)}
    assert lists(RunConfig.model_json_schema()) == known


FILES = {
    "missing": (None, ["There is no configuration", "use one of default,"]),
    "empty": ("", ["holds no settings"]),
    "a list": ("- 1", ["holds no settings"]),
    "broken YAML": ("model: {name: [x}", ["is not valid YAML"]),
    "tabs": ("model:\n\tname: x", ["is not valid YAML"]),
    "not text": (b"\xff\xfe\x00", ["is not valid YAML"]),
    "a section twice": ("seed: 0\nmodel: {}\nseed: 1", ["is not valid YAML", "the key seed is there twice"]),
    "without a section": ("seed: 0", ["the key model is missing; add it"]),
}


@pytest.mark.parametrize("case", FILES)
def test_configuration_file(case, tmp_path):
    content, parts = FILES[case]
    if content is not None:
        (tmp_path / "my.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "my.yaml")
    assert_one_sentence(str(caught.value), "my.yaml", *parts)
