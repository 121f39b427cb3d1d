"""SAEs to and from dictionary_learning, with the library itself on the other side, in its own environment."""

import json
import re
import subprocess
from types import SimpleNamespace

import pytest
import torch
from builders.sae import random
from builders.tiny_sae import CORE, D_SAE, KINDS, PREFIXES, K, residuals, write_run
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from dmsae_lib.interop import export_dictionary_learning, export_saelens, load_foreign
from dmsae_lib.interop.dictionary_learning import CLASSES
from dmsae_lib.sae.model import load_folded
from dmsae_lib.store.artifacts import UserError, repository_root

BENCH = repository_root() / ".venv-bench" / "bin" / "python"
TOLERANCE = 1e-5  # of the scale of the activations, float32
LINES = re.compile(r"```python\n(.*)```", flags=re.S)
APPLY = """
import torch
from safetensors.torch import save_file
x = load_file("x.safetensors")["x"]
with torch.no_grad():
    f = ae.encode(x)
    save_file({"f": f, "xhat": ae.decode(f)}, "theirs.safetensors")
open("class", "w").write(type(ae).__module__ + "." + type(ae).__name__)
"""
# One SAE of each class, of random weights, saved as the library's own training saves it.
MAKE = """
import json, sys
from safetensors.torch import load_file, save_file
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK

x, lm_name = load_file("x.safetensors")["x"], sys.argv[1]
made = [cls(32, 48) for cls in (AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder)]
made += [BatchTopKSAE(32, 48, 5), AutoEncoderTopK(32, 48, 5), MatryoshkaBatchTopKSAE(32, 48, 5, [8, 16, 24])]
for ae in made:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in ae.named_parameters():
            p.add_(torch.randn_like(p) * (0.3 if "dec" not in name or p.ndim == 1 else 0))
        if hasattr(ae, "threshold"):
            ae.threshold.copy_(torch.rand(ae.threshold.shape) + 0.5)
        f = ae.encode(x)
        name = type(ae).__name__
        os.makedirs(name)
        torch.save(ae.state_dict(), f"{name}/ae.pt")
        trainer = {"dict_class": name, "layer": 0, "lm_name": lm_name, "k": 5}
        trainer["submodule_name"] = "resid_post_layer_0"
        json.dump({"trainer": trainer, "buffer": {"ctx_len": 16}}, open(f"{name}/config.json", "w"))
        save_file({"f": f, "xhat": ae.decode(f)}, f"{name}/theirs.safetensors")
"""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The folder in which dictionary_learning makes one SAE of each class."""
    return tmp_path_factory.mktemp("theirs")


@pytest.fixture(scope="module")
def exported(tiny_llama, theirs, tmp_path_factory):
    """Every kind of SAE, and what dictionary_learning makes of its export by the very lines of its README.

    The same process, of its own environment, fills ``theirs``.
    """
    if not BENCH.exists():
        pytest.skip("dictionary_learning is not installed: make bench-environment sets it up in .venv-bench")
    save_file({"x": residuals(tiny_llama, rows=8, seed=2)}, theirs / "x.safetensors")
    found, lines, x = {}, ["import os"], residuals(tiny_llama, seed=1)
    for kind in KINDS:
        place = tmp_path_factory.mktemp(f"core{kind[0]}-{kind[1]}")
        artifact = write_run(place / "run", tiny_llama, *kind)
        folder = export_dictionary_learning(artifact.folder, place / "out")
        assert {path.name for path in folder.iterdir()} == {"README.md", "ae.safetensors", "config.json"}
        save_file({"x": x}, folder / "x.safetensors")
        [block] = LINES.findall((folder / "README.md").read_text())
        lines += [f"os.chdir({str(folder)!r})", block, APPLY]
        found[kind] = SimpleNamespace(artifact=artifact, ours=load_folded(artifact), folder=folder, x=x)
        found[kind].scale = artifact.json("sae.json")["scale"]
    lines += [f"os.chdir({str(theirs)!r})", MAKE]  # last: what it imports is of no help to a README
    command = [BENCH, "-c", "\n".join(lines), tiny_llama.config.name]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return found


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_exported_sae_computes_the_same_in_dictionary_learning(exported, kind):
    made = exported[kind]
    ours, theirs, x = made.ours, load_file(made.folder / "theirs.safetensors"), made.x
    f, pre = ours.encode(x), ours.pre_activations(x)
    clear = (pre - ours.threshold).abs() > TOLERANCE * made.scale
    assert clear.float().mean() > 0.999 and 0.02 < (f > 0).float().mean() < 0.5
    assert_close(theirs["f"][clear], f[clear], rtol=1e-5, atol=TOLERANCE * made.scale)
    assert_close(theirs["xhat"], ours.decode(theirs["f"]), rtol=1e-5, atol=TOLERANCE * made.scale)
    relu_core = kind == (CORE, "relu")
    found = (made.folder / "class").read_text()
    assert found.rpartition(".")[2] == ("JumpReluAutoEncoder" if relu_core else "MatryoshkaBatchTopKSAE")
    low = pre[:, :CORE] < ours.threshold.float()
    assert bool((theirs["f"][:, :CORE] > 0)[low].any()) == relu_core


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_config_says_where_it_comes_from(exported, kind, tiny_llama):
    made = exported[kind]
    config = json.loads((made.folder / "config.json").read_text())
    expected = {"activation_dim": 32, "dict_size": D_SAE, "k": K, "layer": 0, "lm_name": "tiny llama"}
    expected["submodule_name"] = "resid_post_layer_0"
    if kind != (CORE, "relu"):
        first = kind[0] + PREFIXES[0]
        expected["group_sizes"] = [first, PREFIXES[1] - PREFIXES[0], D_SAE - kind[0] - PREFIXES[1]]
        state = load_file(made.folder / "ae.safetensors")
        assert state["group_sizes"].tolist() == expected["group_sizes"]
    assert expected.items() <= config["trainer"].items() and config["buffer"] == {"ctx_len": 16}
    assert (config["dmsae"]["sae"], config["dmsae"]["model_hash"]) == (made.artifact.hash, tiny_llama.hash)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_round_trip_gives_the_same_sae(exported, kind, tiny_llama, tmp_path):
    made = exported[kind]
    back = load_foreign(made.folder, tiny_llama).source(made.scale)
    through_saelens = load_foreign(export_saelens(made.artifact, tmp_path / "out"), tiny_llama)
    through_saelens = through_saelens.source(made.scale)
    assert back.prefixes == through_saelens.prefixes
    assert (back.threshold.ndim == 1) == (kind == (CORE, "relu"))
    for name, value in through_saelens.state_dict().items():
        if name == "b_enc":  # b_dec W_enc was taken out of it, and put back
            assert_close(back.b_enc, value, rtol=1e-5, atol=TOLERANCE)
        else:
            assert torch.equal(back.state_dict()[name], value), name


@pytest.mark.usefixtures("exported")
@pytest.mark.parametrize("name", CLASSES)
def test_an_sae_of_theirs_computes_what_it_computes_there(theirs, tiny_llama, name):
    x = load_file(theirs / "x.safetensors")["x"]
    there = load_file(theirs / name / "theirs.safetensors")
    foreign = load_foreign(theirs / name, tiny_llama)
    state = torch.load(theirs / name / "ae.pt", weights_only=True)
    norms = state["W_dec"].norm(dim=1) if "W_dec" in state else state["decoder.weight"].norm(dim=0)
    assert (there["f"] > 0).any(1).all() and (there["f"] == 0).float().mean() > 0.2
    # decoder rows of norm 1 here, and features larger by as much
    assert_close(foreign.encode(x), there["f"] * norms, rtol=1e-4, atol=1e-4)
    assert_close(foreign(x), there["xhat"], rtol=1e-4, atol=1e-4)
    if foreign.architecture in ("topk", "gated"):
        with pytest.raises(UserError, match="it can be compared with"):
            foreign.source(1.0, [8])
        return
    source = foreign.source(3.0, None if name.startswith("Matryoshka") else [8, 24])
    assert source.prefixes == (8, 24, 48)
    assert_close(3 * source.encode(x / 3), there["f"] * norms, rtol=1e-4, atol=1e-4)
    assert_close(3 * source(x / 3), there["xhat"], rtol=1e-4, atol=1e-4)


def folder_of(tmp_path, state=None, **trainer):
    trainer = {"dict_class": "BatchTopKSAE", "layer": 0, "lm_name": "tiny llama", **trainer}
    tmp_path.joinpath("config.json").write_text(json.dumps({"trainer": trainer}))
    if state is None:
        weight = torch.nn.functional.normalize(random(8, 32), dim=1)
        state = {"encoder.weight": weight, "encoder.bias": torch.zeros(8), "decoder.weight": weight.T}
        state |= {"b_dec": torch.zeros(32), "threshold": torch.tensor(0.5), "k": torch.tensor(2)}
    torch.save(state, tmp_path / "ae.pt")
    return state


@pytest.mark.parametrize(
    "trainer, says",
    [
        ({"lm_name": "gpt2"}, "was trained on gpt2"),
        ({"layer": 1}, "reads blocks.1.hook_resid_post"),
        ({"submodule_name": "mlp_out_layer_0"}, "reads mlp_out_layer_0"),
        ({"dict_class": "CrossCoder"}, "is a CrossCoder"),
        ({"dict_class": "JumpReluAutoEncoder"}, "lacks weights of a JumpReluAutoEncoder"),
        ({"layer": None}, "is no SAE of dictionary_learning"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_llama, tmp_path, trainer, says):
    folder_of(tmp_path)
    assert load_foreign(tmp_path, tiny_llama).d_sae == 8
    folder_of(tmp_path, **trainer)
    with pytest.raises(UserError, match=says):
        load_foreign(tmp_path, tiny_llama)


def test_a_threshold_that_was_never_set_is_refused(tiny_llama, tmp_path):
    folder_of(tmp_path, folder_of(tmp_path) | {"threshold": torch.tensor(-1.0)})
    with pytest.raises(UserError, match="has no threshold yet"):
        load_foreign(tmp_path, tiny_llama)


def test_a_pickle_that_holds_code_is_refused_and_not_run(tiny_llama, tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    folder_of(tmp_path, {"encoder.weight": Trap()})
    with pytest.raises(UserError, match="UnpicklingError"):
        load_foreign(tmp_path, tiny_llama)
    assert not (tmp_path / "ran").exists()


def test_a_weight_of_the_wrong_size_is_refused(tiny_llama, tmp_path):
    folder_of(tmp_path, folder_of(tmp_path) | {"b_dec": torch.zeros(31)})
    with pytest.raises(UserError, match="lacks weights of a BatchTopKSAE .*size mismatch"):
        load_foreign(tmp_path, tiny_llama)
