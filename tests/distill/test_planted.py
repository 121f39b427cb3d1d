"""A toy whose causal latents are known: distillation keeps them, random cores of equal size do not.

Twenty orthonormal directions fire in sparse combinations; ten of them are strong, and the next token depends
on four of these. A first prefix knows the strong ones, so only attribution can tell the four.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dmsae_lib.config.sections import DataConfig, TrainingConfig
from dmsae_lib.data.activations import StreamedActivations, usable_residuals
from dmsae_lib.data.contexts import Contexts
from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.distill.attribution import attribute
from dmsae_lib.distill.controls import candidate_pool, control_core
from dmsae_lib.distill.core import Candidates, Core, distil, reading_members
from dmsae_lib.distill.evaluation import calibrate_threshold, calibration_residuals
from dmsae_lib.sae.loop import train_saes
from dmsae_lib.sae.model import MatryoshkaSAE
from dmsae_lib.sae.training import Trainer
from dmsae_lib.store.seeds import generator

pytestmark = pytest.mark.usefixtures("one_thread")

FEATURES, STRONG, CAUSAL, VOCABULARY, CONTEXT = 20, 10, [1, 4, 6, 8], 200, 32
D_SAE, PREFIXES, K, BATCH, STEPS = 48, (18, 30), 2, 256, 600


class PlantedModel:
    """The LanguageModel interface. The current token and the two before it each add one feature, or none."""

    bos, device, outlier_limit = 0, "cpu", math.inf
    usable = LanguageModel.usable
    config = SimpleNamespace(batch_rows=64, dtype="float32")

    def __init__(self, seed: int):
        random = np.random.default_rng(seed)
        self.directions = torch.from_numpy(np.linalg.qr(random.normal(size=(FEATURES, FEATURES)))[0]).float()
        tables = np.zeros((3, VOCABULARY, FEATURES), dtype=np.float32)
        for lag in range(3):
            feature = random.permutation(np.arange(VOCABULARY) % FEATURES)
            size = np.where(
                feature < STRONG, random.uniform(0.8, 1.4, VOCABULARY), random.uniform(0.3, 0.6, VOCABULARY)
            )
            tables[lag, np.arange(VOCABULARY), feature] = size * (random.random(VOCABULARY) < 0.8)
        tables[:, self.bos] = 0
        self.tables = torch.from_numpy(tables)
        self.effects = torch.from_numpy(random.normal(size=(len(CAUSAL), VOCABULARY))).float()

    def lower(self, tokens):
        features = torch.zeros(*tokens.shape, FEATURES)
        for lag in range(3):
            before = torch.roll(tokens, lag, dims=1)
            before[:, :lag] = self.bos
            features += self.tables[lag][before]
        return features @ self.directions

    def upper(self, tokens, resid):
        logits = resid @ self.directions[CAUSAL].T @ self.effects
        return logits.index_fill(-1, torch.tensor([self.bos]), -30.0)  # BOS is never predicted

    def text(self, rows: int, seed: int) -> Contexts:
        """Contexts drawn from the model itself, so that the causal features predict what comes."""
        random = torch.Generator().manual_seed(seed)
        tokens = torch.zeros(rows, CONTEXT, dtype=torch.int64)
        tokens[:, 1] = torch.randint(1, VOCABULARY, (rows,), generator=random)
        for t in range(2, CONTEXT):
            logits = self.upper(tokens, self.lower(tokens))[:, t - 1]
            tokens[:, t] = torch.multinomial(logits.softmax(-1), 1, generator=random).squeeze(1)
        return Contexts(tokens, torch.full((rows,), CONTEXT), self.bos)


def best_cosines(rows: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """For each direction, the largest cosine with any of the rows."""
    return (torch.nn.functional.normalize(rows, dim=1) @ directions.T).max(0).values


@pytest.fixture(scope="module")
def chain(one_thread, tmp_path_factory):
    """Cycles 0, 1 and 2 by the real Trainer: the model, and each cycle's SAE, attribution table and core."""
    model, folder = PlantedModel(seed=0), tmp_path_factory.mktemp("planted")
    train, select = model.text(300, seed=1), model.text(60, seed=2)
    x = torch.cat(list(usable_residuals(model, train)))
    scale = float(x.square().sum(1).mean().sqrt())
    data = DataConfig(source="planted", train_tokens=len(x), select_tokens=1, test_tokens=1, buffer_rows=100)
    source = StreamedActivations(model, train, data, scale)
    found: list[tuple[MatryoshkaSAE, object, Core]] = []
    for cycle in range(3):
        previous = found[-1][2] if found else None
        sae = MatryoshkaSAE(FEATURES, D_SAE, PREFIXES, previous.rows if previous else None)
        sae.initialise(generator(cycle, "init", "free"), x[:BATCH] / scale)
        trainer = Trainer(sae, TrainingConfig(k=K, batch_size=BATCH, lr=5e-3), STEPS)

        def batches(cursor, cycle=cycle):
            return source.batches(BATCH, 0, f"cycle {cycle}", cursor)

        train_saes([trainer], batches, [folder / "checkpoint"], [{}], report=lambda _: None)
        folded = sae.folded(scale)
        calibrate_threshold(folded, calibration_residuals(model, select), K, 1)
        table = attribute(model, folded, select)
        found.append(
            (
                sae,
                table,
                distil(cycle, sae, table.scores["mean_abs"], table.scores["frequency"], previous, 0.9, None),
            )
        )
    return model, found


OTHERS = [i for i in range(FEATURES) if i not in CAUSAL]


def test_the_toy_is_no_foregone_conclusion(chain):
    """The first prefix of cycle 0 knows features without effect as well, and more of them than the core could
    hold."""
    model, ((sae, _, core), *_) = chain
    known = best_cosines(sae.free_rows[: PREFIXES[0]].detach(), model.directions[OTHERS]) > 0.9
    assert int(known.sum()) >= 4
    assert len(core) < PREFIXES[0] / 2


def test_the_distilled_core_holds_the_causal_directions(chain):
    model, found = chain
    _, table, last = found[-1]
    assert float(best_cosines(last.rows, model.directions[CAUSAL]).min()) > 0.9
    assert len(CAUSAL) <= len(last) < len(table.scores["mean_abs"]) / 2
    assert int((best_cosines(last.rows, model.directions[OTHERS]) > 0.9).sum()) <= len(last) - len(CAUSAL)


def test_what_is_selected_again_is_frozen(chain):
    """Latents that two cores share are the same bits, and causal directions are among them."""
    model, found = chain
    for (_, _, before), (sae, _, after) in zip(found, found[1:]):
        assert torch.equal(sae.core_rows, before.rows)
        rows = {latent.id: row for latent, row in zip(before.latents, before.rows)}
        again = [
            (row, rows[latent.id]) for latent, row in zip(after.latents, after.rows) if latent.id in rows
        ]
        assert all(torch.equal(row, earlier) for row, earlier in again)
        kept = torch.stack([row for row, _ in again])
        assert int((best_cosines(kept, model.directions[CAUSAL]) > 0.9).sum()) >= len(CAUSAL) - 1
    last = found[-1][2]
    assert len(reading_members(last, "last_two")) == len(again)


def test_random_cores_of_equal_size_do_not_hold_them(chain):
    model, found = chain
    parts = [Candidates.of(t, sae, table.scores["frequency"]) for t, (sae, table, _) in enumerate(found)]
    pool = candidate_pool(parts)
    last, causal = found[-1][2], model.directions[CAUSAL]
    held = []
    for kind in ("random", "random_directions"):
        for seed in range(10):
            rows, *_ = control_core(kind, last, pool, last.rows, torch.Generator().manual_seed(seed))
            held.append(float((best_cosines(rows, causal) > 0.9).float().mean()))
    assert max(held) < 1 and sum(held) / len(held) < 0.5
