"""Each contestant's own public training step, behind one small interface.

Built from the same weights; all use a learning rate so small that the state stays the same while it is timed.
Nothing of the peers is copied or changed: their trainers are imported, given the same job, and stepped as
their own loops do.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks import cases
from benchmarks.cases import Case

LR = 1e-5
AUX_ALPHA = 1 / 32
# length of the training that the trainers believe to be in: no schedule ends, nothing is logged
STEPS = 1_000_000
DEAD_AFTER = 10_000_000  # tokens; dictionary_learning's constant, which no latent reaches by itself here


class Contestant(Protocol):
    def step(self, x: Tensor) -> Any:
        """One training step of every SAE on the batch ``x`` (batch_size, d_in)."""

    def loss(self, result: Any) -> float:
        """The first SAE's objective of the step that returned ``result``."""

    def dead(self) -> int:
        """How many latents of the first SAE count as dead now."""


class Ours:
    """``dmsae_lib.sae.training.Trainer.train_step``, fused Adam and all."""

    def __init__(self, case: Case, inputs: dict[str, Tensor], dead: Tensor, device: str, n_core: int = 0):
        from dmsae_lib.config.sections import TrainingConfig
        from dmsae_lib.sae.model import MatryoshkaSAE
        from dmsae_lib.sae.training import Trainer

        shape = case.shape
        config = TrainingConfig(
            k=shape.k,
            batch_size=shape.batch_size,
            lr=LR,
            warmup=0,
            decay=0,
            aux_alpha=AUX_ALPHA,
            dead_window=DEAD_AFTER,
            autocast=shape.bf16,
        )
        self.trainers = []
        for _ in range(case.n_saes):
            core = inputs["W_enc"][:n_core] if n_core else None
            sae = MatryoshkaSAE(shape.d_in, shape.d_sae, shape.widths[:-1], core).to(device)
            with torch.no_grad():
                sae.free_rows.copy_(inputs["W_enc"][n_core:])
                sae.W_dec.copy_(inputs["W_dec"])
                sae.b_enc.copy_(inputs["b_enc"])
                # a core latent then fires as often as when it was selected
                sae.b_enc[:n_core] -= inputs["threshold"]
                sae.b_dec.copy_(inputs["b_dec"])
            trainer = Trainer(sae, config, STEPS)
            trainer.since_fired[dead] = DEAD_AFTER
            self.trainers.append(trainer)

    def step(self, x: Tensor) -> Any:
        return [trainer.train_step(x) for trainer in self.trainers]

    def loss(self, result: Any) -> float:
        return float(result[0].loss)

    def dead(self) -> int:
        return int((self.trainers[0].since_fired >= DEAD_AFTER).sum())


class SAELens:
    """``SAETrainer.step``; several SAEs in turn on one batch, as SAELens's ``MultiSAETrainer`` steps them."""

    def __init__(self, case: Case, inputs: dict[str, Tensor], dead: Tensor, device: str):
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.saes.matryoshka_batchtopk_sae import (
            MatryoshkaBatchTopKTrainingSAE,
            MatryoshkaBatchTopKTrainingSAEConfig,
        )
        from sae_lens.training.sae_trainer import SAETrainer

        shape = case.shape
        window = DEAD_AFTER // shape.batch_size  # SAELens counts batches
        self.trainers = []
        for _ in range(case.n_saes):
            sae = MatryoshkaBatchTopKTrainingSAE(
                MatryoshkaBatchTopKTrainingSAEConfig(
                    d_in=shape.d_in,
                    d_sae=shape.d_sae,
                    k=shape.k,
                    matryoshka_widths=shape.widths,
                    aux_loss_coefficient=AUX_ALPHA,
                    apply_b_dec_to_input=True,
                    normalize_activations="none",
                    dtype="float32",
                    device=device,
                )
            )
            with torch.no_grad():
                sae.W_enc.copy_(inputs["W_enc"].T)
                for name in ("W_dec", "b_enc", "b_dec"):
                    getattr(sae, name).copy_(inputs[name])
            config = SAETrainerConfig(
                total_training_samples=STEPS * shape.batch_size,
                train_batch_size_samples=shape.batch_size,
                lr=LR,
                lr_end=LR,
                device=device,
                autocast=shape.bf16,
                dead_feature_window=window,
                logger=LoggingConfig(log_to_wandb=False),
            )
            trainer = SAETrainer(config, sae, data_provider=iter(()))
            trainer.n_forward_passes_since_fired[dead] = window + 1
            self.trainers.append(trainer)

    def step(self, x: Tensor) -> Any:
        losses = []
        for trainer in self.trainers:
            losses.append(trainer.step(x).loss.detach())
            trainer.n_training_steps += 1  # `fit` counts, `step` does not
        return losses

    def loss(self, result: Any) -> float:
        return float(result[0])

    def dead(self) -> int:
        return int(self.trainers[0].dead_neurons.sum())


class DictionaryLearning:
    """``MatryoshkaBatchTopKTrainer.update``; several SAEs in turn on one batch, as its ``trainSAE`` steps
    them."""

    def __init__(self, case: Case, inputs: dict[str, Tensor], dead: Tensor, device: str):
        from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer

        shape = case.shape
        sizes = [b - a for a, b in zip([0, *shape.widths], shape.widths)]
        self.trainers = []
        for _ in range(case.n_saes):
            trainer = MatryoshkaBatchTopKTrainer(
                steps=STEPS,
                activation_dim=shape.d_in,
                dict_size=shape.d_sae,
                k=shape.k,
                layer=0,
                lm_name="none",
                group_fractions=[size / shape.d_sae for size in sizes],
                # it takes their mean: this makes the loss the sum, as ours is
                group_weights=[float(len(sizes))] * len(sizes),
                lr=LR,
                auxk_alpha=AUX_ALPHA,
                warmup_steps=0,
                device=device,
            )
            trainer.ae.W_enc.data.copy_(inputs["W_enc"].T)
            for name in ("W_dec", "b_enc", "b_dec"):
                getattr(trainer.ae, name).data.copy_(inputs[name])
            trainer.dead_feature_threshold = DEAD_AFTER
            trainer.num_tokens_since_fired[dead] = DEAD_AFTER
            self.trainers.append(trainer)
        # beyond: step 0 sets b_dec, early ones keep no threshold
        self.count = self.trainers[0].threshold_start_step + 1
        self.autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=shape.bf16)

    def step(self, x: Tensor) -> Any:
        with self.autocast:
            losses = [trainer.update(self.count, x) for trainer in self.trainers]
        self.count += 1
        return losses

    def loss(self, result: Any) -> float:
        return float(result[0])

    def dead(self) -> int:
        trainer = self.trainers[0]
        return int((trainer.num_tokens_since_fired >= trainer.dead_feature_threshold).sum())


def dense_work(case: Case, inputs: dict[str, Tensor]) -> dict[str, Callable[[Tensor], Any]]:
    """What the steps are set against, by name; each writes into memory that is there already.

    ``floor``: the encoder's product. ``five_gemms``: that, the decoder's, and the backward products of a
    dense SAE (of activations, of W_dec and of W_enc). ``flat_topk``: BatchTopK's selection by one torch.topk
    over all activations.
    """
    shape, kind = case.shape, torch.bfloat16 if case.shape.bf16 else torch.float32
    like = inputs["W_dec"].device
    down = inputs["W_enc"].T.to(kind).contiguous()  # (d_in, d_sae)
    up = inputs["W_dec"].to(kind)
    a, grad = (torch.empty(shape.batch_size, shape.d_sae, dtype=kind, device=like) for _ in range(2))
    out = torch.empty(shape.batch_size, shape.d_in, dtype=kind, device=like)
    grad_up, grad_down = torch.empty_like(up), torch.empty_like(down)
    positive = ((inputs["x"][0] - inputs["b_dec"]) @ inputs["W_enc"].T + inputs["b_enc"]).relu().flatten()

    def five(x: Tensor) -> None:
        torch.mm(x, down, out=a)
        torch.mm(a, up, out=out)
        torch.mm(out, up.T, out=grad)
        torch.mm(a.T, out, out=grad_up)
        torch.mm(x.T, grad, out=grad_down)

    return {
        "floor": lambda x: torch.mm(x.to(kind), down, out=a),
        "five_gemms": lambda x: five(x.to(kind)),
        "flat_topk": lambda x: torch.topk(positive, shape.k * shape.batch_size, sorted=False),
    }


def build(name: str, case: Case, inputs: dict[str, Tensor], dead: Tensor, device: str) -> Contestant:
    if name in (cases.SPARSE, cases.MATRICES):
        from dmsae_lib.sae.entries import SPARSE_BELOW

        # every contestant has its own process
        SPARSE_BELOW[torch.device(device).type] = 1.1 if name == cases.SPARSE else 0.0
    if name in (cases.OURS, cases.SPARSE, cases.MATRICES):
        return Ours(case, inputs, dead, device)
    if name == cases.CORED:
        return Ours(case, inputs, dead, device, case.shape.n_core)
    return {cases.SAELENS: SAELens, cases.DICTIONARY: DictionaryLearning}[name](case, inputs, dead, device)
