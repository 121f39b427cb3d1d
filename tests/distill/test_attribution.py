"""Attribution against autograd through the latents, aggregators against numpy, selection against brute
force."""

from itertools import combinations

import numpy as np
import pytest
import torch
from builders.sae import make_sae, with_rows
from scipy.stats import spearmanr

from dmsae_lib.config import sections
from dmsae_lib.data.contexts import Contexts
from dmsae_lib.distill import attribution
from dmsae_lib.distill.attribution import (
    BINS,
    COVERAGES,
    HIGH,
    LOW,
    AttributionTable,
    attribute,
    contributions,
    describe,
    gradient_at_prefix0,
    jaccard,
    smallest_cover,
)
from dmsae_lib.sae.model import MatryoshkaSAE
from dmsae_lib.store.artifacts import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

CORE, PREFIX0, BIN_RATIO = 4, 9, 10 ** ((HIGH - LOW) / BINS)


@pytest.fixture(scope="module")
def sae(tiny_llama) -> MatryoshkaSAE:
    """Random weights in the units of the model's residual; about a third of the latents fire on a token."""
    x = tiny_llama.lower(torch.arange(3, 19)[None])
    sae = make_sae(CORE, "relu", (PREFIX0, 20), 40, x.flatten(0, 1)).requires_grad_(False)
    sae.threshold.fill_(float(sae.pre_activations(x).median()))
    return sae


def by_autograd(model, sae: MatryoshkaSAE, batch: Contexts) -> torch.Tensor:
    """f_i df_i for every candidate and usable position, the graph going through f, on the Transformers model
    itself."""
    import transformers

    llama = transformers.AutoModelForCausalLM.from_pretrained(model.config.name, dtype=torch.float32).eval()
    kept, tokens, lengths = {}, batch.tokens, batch.lengths
    layer = llama.model.layers[0]
    handle = layer.register_forward_hook(lambda _, __, out: kept.update(resid=out))
    with torch.no_grad():
        llama(tokens)
    handle.remove()
    resid = kept["resid"]
    usable = (torch.arange(tokens.shape[1]) < lengths[:, None]) & (tokens != 0)
    n = sae.n_core + sae.prefixes[0]
    a = torch.relu((resid - sae.b_dec) @ torch.cat([sae.core_rows, sae.free_rows]).T + sae.b_enc)[..., :n]
    a[..., sae.n_core :] *= a[..., sae.n_core :] > float(sae.threshold)
    f = a.clone().requires_grad_(True)
    put = torch.where(usable[..., None], f @ sae.W_dec[:n] + sae.b_dec, resid)
    handle = layer.register_forward_hook(lambda *_: put)
    logits = llama(tokens).logits
    handle.remove()
    loss = torch.zeros(())
    for row in range(len(tokens)):
        for t in range(1, tokens.shape[1]):
            if usable[row, t]:  # the target is neither BOS nor padding
                loss = loss - logits[row, t - 1].log_softmax(-1)[tokens[row, t]]
    (gradient,) = torch.autograd.grad(loss, f)
    return (f.detach() * gradient)[usable]


def test_contributions_equal_autograd_through_the_latents(tiny_llama, sae, random_split):
    batch = next(random_split(12, seed=1).batches(12, "cpu"))
    f, g = gradient_at_prefix0(tiny_llama, sae, batch)
    A = contributions(f, g, sae)
    expected = by_autograd(tiny_llama, sae, batch)
    assert A.shape == expected.shape == (int(batch.usable().sum()), CORE + PREFIX0)
    assert float((A - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert 0.1 < float((f > 0).float().mean()) < 0.9


def test_deeper_latents_play_no_part(tiny_llama, sae, random_split):
    batch = next(random_split(4, seed=2).batches(4, "cpu"))
    changed = sae.folded(1.0)
    changed.W_dec[CORE + PREFIX0 :] *= 7.0
    whole, without = (gradient_at_prefix0(tiny_llama, one, batch) for one in (sae, changed))
    assert torch.equal(whole[0], without[0]) and torch.equal(whole[1], without[1])


def test_bos_and_padding_keep_the_models_own_residual(tiny_llama, sae, random_split, monkeypatch):
    batch = next(random_split(10, seed=3).batches(10, "cpu"))
    tokens, lengths = batch.tokens, batch.lengths
    seen = []
    upper = type(tiny_llama).upper
    monkeypatch.setattr(
        type(tiny_llama), "upper", lambda self, t, resid: seen.append(resid.detach()) or upper(self, t, resid)
    )
    gradient_at_prefix0(tiny_llama, sae, batch)
    resid = tiny_llama.lower(tokens)
    unchanged = (seen[0] == resid).all(-1)
    for row in range(len(tokens)):
        for t in range(tokens.shape[1]):
            assert bool(unchanged[row, t]) == (int(tokens[row, t]) == 0 or t >= int(lengths[row]))


def materialised(model, sae, split) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """f and A (tokens, candidates) in float64, and each token's context."""
    fs, As, rows = [], [], []
    for row, batch in enumerate(split.batches(1, "cpu")):
        f, g = gradient_at_prefix0(model, sae, batch)
        fs.append(f.double().numpy())
        As.append(contributions(f, g, sae).double().numpy())
        rows += [row] * len(f)
    return np.concatenate(fs), np.concatenate(As), np.array(rows)


@pytest.fixture(scope="module")
def split(random_split):
    return random_split(25, seed=4)


@pytest.fixture(scope="module")
def table(tiny_llama, sae, split) -> AttributionTable:
    return attribute(tiny_llama, sae, split, quantile=0.9)


def test_aggregators_against_numpy(tiny_llama, sae, split, table):
    f, A, context = materialised(tiny_llama, sae, split)
    scores = {name: value.numpy() for name, value in table.scores.items()}
    assert table.tokens == len(A) and table.n_core == CORE
    assert np.allclose(scores["mean_abs"], np.abs(A).mean(0), rtol=1e-4, atol=1e-8)
    assert np.allclose(scores["abs_mean"], np.abs(A.mean(0)), rtol=1e-4, atol=1e-6 * np.abs(A).max())
    assert np.allclose(scores["frequency"], (f > 0).mean(0), atol=1e-12)
    for i in range(A.shape[1]):
        active = np.abs(A[f[:, i] > 0, i])
        exact = np.quantile(active, 0.9, method="inverted_cdf")
        assert 1 / BIN_RATIO <= scores["quantile"][i] / exact <= BIN_RATIO
        assert float(table.mean_activation[i]) == pytest.approx(f[f[:, i] > 0, i].mean(), rel=1e-5)
    for half, parity in zip(table.halves, (0, 1)):
        assert np.allclose(half.numpy(), np.abs(A[context % 2 == parity]).mean(0), rtol=1e-4, atol=1e-8)


def test_the_score_does_not_depend_on_the_batch_size(tiny_llama, sae, split, table):
    """The loss is summed over tokens: what stands beside a context in its batch does not matter. Nor for the
    halves."""
    for rows in (1, 3, 100):
        other = attribute(with_rows(tiny_llama, rows), sae, split, quantile=0.9)
        assert other.tokens == table.tokens
        for name, value in table.scores.items():
            tolerance = BIN_RATIO - 1 if name == "quantile" else 1e-4
            assert torch.allclose(other.scores[name], value, rtol=tolerance, atol=1e-7), (rows, name)
        for one, two in zip(other.halves, table.halves):
            assert torch.allclose(one, two, rtol=1e-4, atol=1e-8), rows


@pytest.mark.parametrize("quantile", [0.5, 0.99])
def test_quantile_of_the_histogram(tiny_llama, sae, split, quantile):
    f, A, _ = materialised(tiny_llama, sae, split)
    found = attribute(tiny_llama, sae, split, quantile).scores["quantile"].numpy()
    for i in range(A.shape[1]):
        exact = np.quantile(np.abs(A[f[:, i] > 0, i]), quantile, method="inverted_cdf")
        assert 1 / BIN_RATIO <= found[i] / exact <= BIN_RATIO


def test_a_latent_that_never_fires_scores_zero(tiny_llama, sae, split):
    silent = sae.folded(1.0)
    silent.b_enc[2] = -1e6
    table = attribute(tiny_llama, silent, split)
    assert (
        all(float(score[2]) == 0 for score in table.scores.values()) and float(table.mean_activation[2]) == 0
    )


def test_every_aggregator_that_may_be_named_has_its_function():
    assert list(attribution.SCORES) == sections.AGGREGATORS


def test_an_aggregator_of_ones_own(tiny_llama, sae, split, table, monkeypatch):
    """One line in AGGREGATORS and one function: it is a column of the table, and may decide."""
    monkeypatch.setattr(attribution, "SCORES", dict(attribution.SCORES))

    def total(sums, q):
        return sums.absolute

    with pytest.raises(ValueError, match="total is not in config.sections.AGGREGATORS"):
        attribution.aggregator(total)
    monkeypatch.setattr(attribution, "AGGREGATORS", [*sections.AGGREGATORS, "total"])
    with pytest.raises(UserError, match="distill.aggregator is total: no function"):
        attribute(tiny_llama, sae, split, aggregator="total")
    attribution.aggregator(total)
    found = attribute(tiny_llama, sae, split, aggregator="total")
    assert torch.allclose(found.scores["total"], table.scores["mean_abs"] * table.tokens)
    assert torch.allclose(sum(found.halves), found.scores["total"]) and "total" in found.rows()[0]


def test_rows_of_the_table(table):
    rows = table.rows()
    assert [row["index"] for row in rows] == list(range(CORE + PREFIX0))
    assert [row["is_core"] for row in rows] == [1] * CORE + [0] * PREFIX0
    assert set(rows[0]) == {
        "index",
        "is_core",
        "mean_activation",
        "mean_abs",
        "abs_mean",
        "quantile",
        "frequency",
        "half_a",
        "half_b",
    }
    assert rows[5]["mean_abs"] == float(table.scores["mean_abs"][5]) and rows[5]["half_b"] == float(
        table.halves[1][5]
    )


# --- selection


@pytest.mark.parametrize("seed", range(25))
def test_smallest_cover_against_all_subsets(seed):
    """Integer scores, so that ties and exactly reached coverages occur and the arithmetic of the reference is
    exact."""
    random = np.random.default_rng(seed)
    scores = random.integers(0, 6, random.integers(1, 9))
    if scores.sum() == 0:
        scores[0] = 1
    for percent in (1, 25, 50, 75, 80, 90, 99):
        found = smallest_cover(torch.from_numpy(scores).double(), percent / 100).tolist()
        enough = [
            c
            for size in range(len(scores) + 1)
            for c in combinations(range(len(scores)), size)
            if 100 * sum(scores[list(c)]) >= percent * scores.sum()
        ]
        assert len(found) == len(set(found)) == min(map(len, enough))
        assert tuple(sorted(found)) in enough
        # strongest, lowest index
        assert found == sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: len(found)]


def test_smallest_cover_by_hand():
    assert smallest_cover(torch.tensor([1.0, 5.0, 3.0, 1.0]), 0.8).tolist() == [1, 2]  # exactly 0.8
    # a tie: the lower index
    assert smallest_cover(torch.tensor([1.0, 5.0, 3.0, 1.0]), 0.81).tolist() == [1, 2, 0]
    assert smallest_cover(torch.tensor([0.0, 2.0, 0.0]), 0.99).tolist() == [1]
    for n in range(1, 10):  # sums of 0.1 are rounded, 0.8 and 0.9 of the total to below
        assert smallest_cover(torch.full((10,), 0.1, dtype=torch.float64), n / 10).tolist() == list(range(n))
    # ties, many of them
    assert smallest_cover(torch.ones(5000, dtype=torch.float64), 0.5).tolist() == list(range(2500))
    assert smallest_cover(torch.zeros(3), 0.9).tolist() == []


def test_what_is_recorded(table):
    record = describe(table, 0.9, "mean_abs")
    assert record["candidates"] == CORE + PREFIX0 and record["tokens"] == table.tokens
    curve = record["coverage_curve"]
    assert [c for c, _ in curve] == list(COVERAGES) and all(
        a <= b for (_, a), (_, b) in zip(curve, curve[1:])
    )
    assert (
        dict(curve)[0.9]
        == len(smallest_cover(table.scores["mean_abs"], 0.9))
        == record["aggregators"]["mean_abs"]["size"]
    )
    assert record["aggregators"]["mean_abs"]["jaccard"] == 1 and record["aggregators"]["mean_abs"][
        "spearman"
    ] == pytest.approx(1)
    chosen = set(smallest_cover(table.scores["mean_abs"], 0.9).tolist())
    for name in ("abs_mean", "quantile", "frequency"):
        other = set(smallest_cover(table.scores[name], 0.9).tolist())
        assert record["aggregators"][name]["jaccard"] == len(chosen & other) / len(chosen | other)
        rho = spearmanr(table.scores[name], table.scores["mean_abs"]).statistic
        assert record["aggregators"][name]["spearman"] == pytest.approx(rho)
    a, b = (set(smallest_cover(half, 0.9).tolist()) for half in table.halves)
    assert record["stability"]["jaccard"] == len(a & b) / len(a | b)
    assert record["stability"]["spearman"] == pytest.approx(spearmanr(*table.halves).statistic)


def test_jaccard():
    assert jaccard([1, 2, 3], [3, 4]) == 0.25 and jaccard({"a"}, {"b"}) == 0
    assert jaccard([], []) == 1.0
