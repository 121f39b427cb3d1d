"""The SAE module: nested reconstructions, initialisation, folding, thresholds, inference selection."""

import numpy as np
import pytest
import torch
from builders.sae import random
from scipy.optimize import minimize

from dmsae_lib.sae.model import MatryoshkaSAE, geometric_median, load_folded, load_trained, save_sae
from dmsae_lib.store.artifacts import UserError, load, write

pytestmark = pytest.mark.usefixtures("one_thread")

D_IN, D_SAE, CORE, PREFIXES = 12, 40, 5, (6, 17)


def make_sae(core: int = CORE, core_sparsity: str = "relu", threshold: float = 0.6) -> MatryoshkaSAE:
    """All weights random, so that no term can hide behind a zero."""
    sae = MatryoshkaSAE(D_IN, D_SAE, PREFIXES, random(core, D_IN, seed=1) if core else None, core_sparsity)
    for seed, parameter in enumerate(sae.parameters(), start=2):
        parameter.data.copy_(0.5 * random(*parameter.shape, seed=seed))
    sae.threshold.fill_(threshold)
    sae.threshold_ema.fill_(0.9 * threshold)
    return sae.requires_grad_(False)


def naive_encode(sae: MatryoshkaSAE, x: torch.Tensor, threshold: float) -> np.ndarray:
    """Latent by latent in float64."""
    rows = np.concatenate([sae.core_rows.numpy(), sae.free_rows.numpy()]).astype(float)
    f = np.zeros((len(x), len(rows)))
    for t, vector in enumerate(x.numpy().astype(float)):
        for i, row in enumerate(rows):
            value = max(0.0, float((vector - sae.b_dec.numpy()) @ row) + float(sae.b_enc[i]))
            exempt = sae.core_sparsity == "relu" and i < sae.n_core
            f[t, i] = value if exempt or value > threshold else 0.0
    return f


@pytest.mark.parametrize("core", [0, CORE])
@pytest.mark.parametrize("core_sparsity", ["relu", "batchtopk"])
def test_inference_activations_latent_by_latent(core, core_sparsity):
    sae, x = make_sae(core, core_sparsity), random(20, D_IN, seed=9)
    f = sae.encode(x)
    expected = naive_encode(sae, x, 0.6)
    assert np.allclose(f.numpy(), expected, atol=1e-5)
    assert np.array_equal(f.numpy() > 0, expected > 0)
    at_ema = sae.select(sae.pre_activations(x), sae.threshold_ema)
    assert np.allclose(at_ema.numpy(), naive_encode(sae, x, 0.54), atol=1e-5)
    weak = (sae.pre_activations(x)[:, :core] > 0) & (sae.pre_activations(x)[:, :core] <= 0.6)
    # only the exempt core keeps weak ones
    assert bool((f[:, :core][weak] > 0).all()) == (core_sparsity == "relu") or not core


@pytest.mark.parametrize("core", [0, CORE])
def test_prefix_reconstructions_against_a_loop(core):
    sae, x = make_sae(core), random(9, D_IN, seed=9)
    f, W_dec = sae.encode(x), sae.W_dec.double()
    assert sae.prefixes == (*PREFIXES, D_SAE - core)
    for j, free in enumerate(sae.prefixes):
        for t in range(len(x)):
            expected = sae.b_dec.double().clone()
            for i in range(core + free):  # the whole core is in every prefix
                expected += float(f[t, i]) * W_dec[i]
            assert torch.allclose(sae.decode_prefix(f, j)[t].double(), expected, atol=1e-5)
    last = len(sae.prefixes) - 1
    assert torch.allclose(sae.decode_prefix(f, last), sae(x), atol=1e-6)
    assert torch.equal(sae.decode(f), sae(x))


def test_three_dimensions():
    sae, x = make_sae(), random(3, 7, D_IN, seed=4)
    f = sae.encode(x)
    assert f.shape == (3, 7, D_SAE) and torch.allclose(
        f.flatten(0, 1), sae.encode(x.flatten(0, 1)), atol=1e-6
    )
    assert torch.equal(f > 0, (sae.encode(x.flatten(0, 1)) > 0).view(3, 7, D_SAE))
    assert torch.allclose(
        sae.decode_prefix(f, 0).flatten(0, 1), sae.decode_prefix(f.flatten(0, 1), 0), atol=1e-6
    )
    assert sae(x).shape == x.shape


def test_w_enc_holds_the_core_first():
    sae = make_sae()
    assert sae.W_enc.shape == (D_IN, D_SAE)
    assert torch.equal(sae.W_enc[:, :CORE].T, sae.core_rows) and torch.equal(
        sae.W_enc[:, CORE:].T, sae.free_rows
    )


@pytest.mark.parametrize("core", [0, CORE])
def test_initialisation(core):
    sae, batch = make_sae(core), random(200, D_IN, seed=8) + 1.0
    rows = sae.core_rows.clone()
    sae.initialise(torch.Generator().manual_seed(3), batch)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(D_SAE), atol=1e-6)
    assert torch.equal(sae.free_rows, sae.W_dec[core:])
    assert torch.equal(sae.core_rows, rows)  # copied from the previous cycle, never initialised
    assert not sae.b_enc.any()  # the core's b_enc too
    assert torch.equal(sae.b_dec, geometric_median(batch))
    again, other = make_sae(core), make_sae(core)
    (
        again.initialise(torch.Generator().manual_seed(3), batch),
        other.initialise(torch.Generator().manual_seed(4), batch),
    )
    assert torch.equal(again.W_dec, sae.W_dec) and not torch.allclose(other.W_dec, sae.W_dec)
    if core:  # fresh decoder directions, not the frozen encoder rows
        assert float(torch.cosine_similarity(sae.W_dec[:core], rows).abs().max()) < 0.99


def test_geometric_median_minimises_the_sum_of_distances():
    x = random(60, 4, seed=5) * torch.tensor([1.0, 2.0, 0.5, 1.0])
    x[:6] += 40.0  # outliers drag the mean, hardly the median
    points = x.double().numpy()

    def total(p):
        return np.linalg.norm(points - p, axis=1).sum()

    best = minimize(
        total,
        points.mean(0),
        method="Nelder-Mead",
        options={"xatol": 1e-7, "fatol": 1e-10, "maxiter": 20_000},
    )
    found = geometric_median(x).double().numpy()
    assert total(found) <= best.fun * (1 + 1e-7)
    assert np.allclose(found, best.x, atol=1e-3)
    assert total(found) < 0.9 * total(points.mean(0))


def test_geometric_median_of_a_majority_point():
    x = torch.cat([torch.full((11, 3), 2.0), random(9, 3, seed=6)])
    assert torch.allclose(geometric_median(x), torch.full((3,), 2.0), atol=1e-5)


def test_core_decoder_rows_start_random_or_at_the_encoder_rows():
    """Either way the free latents and b_dec are the same, so arms stay paired by seed."""
    first = random(50, D_IN, seed=3)
    drawn, copied = make_sae(), make_sae()
    drawn.initialise(torch.Generator().manual_seed(5), first)
    copied.initialise(torch.Generator().manual_seed(5), first, "encoder")
    unit = copied.core_rows / copied.core_rows.norm(dim=1, keepdim=True)
    assert (
        torch.allclose(copied.W_dec[:CORE], unit, atol=1e-6)
        and float((drawn.W_dec[:CORE] * unit).sum(1).abs().max()) < 0.9
    )
    assert torch.equal(drawn.W_dec[CORE:], copied.W_dec[CORE:]) and torch.equal(
        drawn.free_rows, copied.free_rows
    )
    assert torch.equal(drawn.b_dec, copied.b_dec) and not bool(copied.b_enc.any())


@pytest.mark.parametrize("scale", [0.01, 1.0, 37.5])
@pytest.mark.parametrize("core_sparsity", ["relu", "batchtopk"])
def test_folded_equals_the_unfolded_one_on_scaled_inputs(scale, core_sparsity):
    sae, z = make_sae(core_sparsity=core_sparsity), random(30, D_IN, seed=7)
    folded, x = sae.folded(scale), scale * z
    f, expected = folded.encode(x), sae.encode(x / scale)
    assert torch.equal(f > 0, expected > 0)
    assert torch.allclose(f, scale * expected, rtol=1e-4, atol=1e-5 * scale)
    for j in range(len(sae.prefixes)):
        assert torch.allclose(
            folded.decode_prefix(f, j), scale * sae.decode_prefix(expected, j), rtol=1e-4, atol=1e-5 * scale
        )
    for name in ("core_rows", "free_rows", "W_dec"):  # a core row means the same everywhere
        assert torch.equal(getattr(folded, name), getattr(sae, name))
    assert float(folded.threshold) == 0.6 * scale and folded.core_sparsity == core_sparsity
    assert not any(p.requires_grad for p in folded.parameters())


def test_save_and_load_keep_everything_bit_for_bit(tmp_path):
    sae = make_sae(core_sparsity="batchtopk")
    sae.threshold.fill_(0.1 + 1e-12)  # float32 could not hold these
    sae.threshold_ema.fill_(1 / 3)
    with write(tmp_path / "sae", "sae") as writer:
        save_sae(writer, sae, scale=2.5)
    artifact = load(tmp_path / "sae", "sae")
    again = load_trained(artifact)
    assert again.state_dict().keys() == sae.state_dict().keys()
    for name, value in sae.state_dict().items():
        assert value.dtype == again.state_dict()[name].dtype and torch.equal(
            value, again.state_dict()[name]
        ), name
    assert again.threshold.dtype == torch.float64 and float(again.threshold) == 0.1 + 1e-12
    assert (again.prefixes, again.core_sparsity, again.n_core) == (sae.prefixes, "batchtopk", CORE)
    x = random(15, D_IN, seed=9)
    assert torch.equal(again.encode(x), sae.encode(x))
    assert torch.equal(load_folded(artifact).encode(x), sae.folded(2.5).encode(x))


def test_no_core_survives_save_and_load(tmp_path):
    sae = make_sae(core=0)
    with write(tmp_path / "sae", "sae") as writer:
        save_sae(writer, sae, scale=1.0)
    again = load_folded(load(tmp_path / "sae", "sae"))
    assert again.n_core == 0 and torch.equal(again.W_enc, sae.W_enc)


def test_the_caller_keeps_its_core_rows():
    rows = random(CORE, D_IN)
    sae = MatryoshkaSAE(D_IN, D_SAE, PREFIXES, rows)
    rows += 1
    assert not torch.allclose(sae.core_rows, rows)


@pytest.mark.parametrize(
    "core, d_sae, prefixes", [(23, 40, (6, 17)), (40, 40, (6, 17)), (40, 40, ()), (0, 17, (6, 17))]
)
def test_too_large_a_core_is_refused(core, d_sae, prefixes):
    with pytest.raises(
        UserError, match=rf"sae.d_sae is {d_sae}: a core of {core} .*raise sae.d_sae, or lower"
    ):
        MatryoshkaSAE(D_IN, d_sae, prefixes, random(core, D_IN) if core else None)
    assert MatryoshkaSAE(D_IN, 41, (6, 17), random(23, D_IN)).prefixes == (6, 17, 18)


def test_a_warm_start_is_free_from_the_rows_on():
    """Encoder rows as given, decoder rows as a core's, in the first free latents; all of it is trained."""
    rows = 2 * random(5, D_IN, seed=9)
    warm = MatryoshkaSAE(D_IN, D_SAE, [5 + m for m in PREFIXES], core_sparsity="batchtopk")
    warm.initialise(torch.Generator().manual_seed(5), random(50, D_IN, seed=3), "encoder", rows)
    assert warm.n_core == 0 and torch.equal(warm.free_rows[:5], rows)
    assert torch.allclose(warm.W_dec[:5], torch.nn.functional.normalize(rows, dim=1))
    assert torch.equal(warm.free_rows[5:], warm.W_dec[5:]) and warm.free_rows.requires_grad
    frozen = MatryoshkaSAE(D_IN, D_SAE, PREFIXES, rows, "batchtopk")
    frozen.initialise(torch.Generator().manual_seed(5), random(50, D_IN, seed=3), "encoder")
    # the same SAE, but for what is frozen
    assert torch.equal(frozen.W_enc, warm.W_enc) and torch.equal(frozen.W_dec, warm.W_dec)
    assert frozen.prefixes[0] + frozen.n_core == warm.prefixes[0]


def test_the_first_latents_alone(make=make_sae):
    """Encoding the first ones is encoding all and keeping those, for one threshold and for one of each
    latent."""
    x = random(30, D_IN, seed=4)
    for sae in (make(), make(0)):
        for threshold in (
            torch.tensor(0.3, dtype=torch.float64),
            torch.linspace(0, 1, D_SAE, dtype=torch.float64),
        ):
            sae.threshold = threshold
            torch.testing.assert_close(
                sae.encode(x, first=CORE + 3), sae.encode(x)[:, : CORE + 3], rtol=1e-6, atol=1e-6
            )


@pytest.mark.parametrize(
    "cast",
    [
        lambda sae: sae.to(torch.bfloat16).to(torch.float32),
        lambda sae: sae.half().float(),
        lambda sae: sae.bfloat16().double(),
        lambda sae: sae.to("cpu", torch.float16),
    ],
)
def test_thresholds_are_the_same_after_any_cast(cast):
    """A float64 with all its bits in use, one for all latents and one for each."""
    for shape in ((), (24,)):
        sae = MatryoshkaSAE(8, 24, (6,), torch.randn(3, 8))
        sae.threshold, sae.threshold_ema = (
            torch.full(shape, value, dtype=torch.float64) for value in (1 / 3, 0.1)
        )
        moved = cast(sae)
        assert torch.equal(moved.threshold, torch.full(shape, 1 / 3, dtype=torch.float64))
        assert torch.equal(moved.threshold_ema, torch.full(shape, 0.1, dtype=torch.float64))
        assert moved.W_dec.dtype == moved.core_rows.dtype != torch.int64


def test_thresholds_move_with_the_module():
    moved = MatryoshkaSAE(8, 24, (6,), torch.randn(3, 8)).to("meta", torch.bfloat16)
    assert (
        moved.threshold.is_meta
        and moved.threshold.dtype == torch.float64
        and moved.W_dec.dtype == torch.bfloat16
    )
