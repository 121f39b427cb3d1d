"""No two SAEs of a run start alike: cycles, chains, placebos, retraining seeds, k's and arms each have a
stream of their own."""

from itertools import combinations
from types import SimpleNamespace

import pytest
import torch.nn.functional as F
from builders.run import execute, open_tiny, write_settings

from dmsae_lib.command.plan import stages
from dmsae_lib.config.run import open_run
from dmsae_lib.distill import fit

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:FigureCanvasAgg")]

CHAINS = (
    "distill.chains=[{name: b, seed: 1, retrain: [none, distilled]}, "
    "{name: c, core_sparsity: batchtopk, core_decoder_init: encoder, retrain: [distilled]}]"
)
SETTINGS = (
    CHAINS,
    "data.train_tokens=300",  # what follows the start is of no interest
    "data.select_tokens=100",
    "data.test_tokens=100",
    "distill.cycles=2",
    "distill.placebos=[random_directions, data_points]",
    "retrain.seeds=[0, 1]",
    "retrain.ks=[16, 24]",
    "retrain.controls={random: 2, rotated: 1, warm_start: 2, cold_start: 1, longer_repeated: 1}",
    "learning_rate_sweep=[0.5, 1.0]",
)


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """{place in the run: (encoder rows, decoder rows) that start at random}, of every SAE that the stages
    train."""
    root, found = tmp_path_factory.mktemp("streams"), {}
    write_settings(root)
    run, make = open_tiny(root, "streams", *SETTINGS), fit._trainer

    def recorded(job, harvest, *more):
        trainer = make(job, harvest, *more)
        warm, core = 0 if job.warm_rows is None else len(job.warm_rows), trainer.sae.n_core
        fresh = (
            core if job.training.core_decoder_init == "encoder" else 0
        )  # those start at the core's encoder rows
        place = job.folder.relative_to(run.folder).as_posix()
        assert place not in found, f"{place} was trained twice"
        found[place] = (
            trainer.sae.free_rows[warm:].detach().clone(),
            trainer.sae.W_dec[max(warm, fresh) :].detach().clone(),
        )
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "_trainer", recorded)
        for stage in stages(run.config):
            if stage.notebook[:2] in ("01", "02", "03", "04", "05", "09"):
                execute(run, stage)
    return run, found


def test_every_kind_of_sae_is_among_them(starts):
    places = starts[1]
    for place in (
        "cycle_0/sae",
        "cycle_2/placebo_data_points",
        "chain_b/cycle_0/sae",
        "chain_c/cycle_1/sae",
        "retrain/k16/distilled-seed1",
        "retrain/k24/none-seed0",
        "retrain/k16/warm_start-seed0",
        "chain_b/retrain/k24/distilled-seed0",
        "chain_c/retrain/k16/distilled-seed1",
        "retrain/k16/cold_start-seed0",
        "learning_rate/saes/x0.5-core-seed0",
        "learning_rate/saes/x1.0-none-seed1",
    ):
        assert place in places
    assert "chain_c/cycle_0/sae" not in places  # it has the main chain's seed and no core yet: the same SAE
    assert starts[0].cycle(0, "core", "c") == starts[0].folder / "cycle_0" / "core"


def test_no_two_saes_start_alike(starts):
    """Not one latent of one SAE starts near any latent of another, encoder or decoder row: two in 128
    dimensions, drawn apart, do not come within a |cosine| of .6."""
    for (a, mine), (b, other) in combinations(starts[1].items(), 2):
        for left, right in zip(mine, other):
            nearest = float((F.normalize(left, dim=1) @ F.normalize(right, dim=1).T).abs().max())
            assert nearest < 0.6, f"{a} and {b} share a latent at the start"


@pytest.mark.parametrize(
    "store, fresh, matters", [("disk", False, False), ("disk", True, True), ("stream", False, True)]
)
@pytest.mark.parametrize("setting", ["data.buffer_rows=600", "model.batch_rows=7"])
def test_what_orders_a_stream_is_among_what_an_sae_depends_on(store, fresh, matters, setting):
    """Else a checkpoint's cursor would mean another place in the text. And so is where the SAE's own random
    stream is named."""

    def parents(*overrides: str, place: str = "a"):
        run = open_run("smoke", "x", [f"data.store={store}", *overrides])
        harvest = SimpleNamespace(run=run, artifact=SimpleNamespace(hash="h"))
        return fit.parents_of(
            fit.Job(run.folder / place, run.config.training, 0, "order", 0, fresh=fresh), harvest
        )

    assert (parents() != parents(setting)) == matters and parents() == parents() != parents(place="b")
