"""The stages of a run as sums of the parts in :mod:`benchmarks.sizing`, and what the published run measured.

Not counted, because no closed form knows them: reading and tokenising text, starting processes, drawing
figures, and the logistic probes of SAEBench. Notebook 08 shows what that leaves out.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from benchmarks.sizing import Machine, Op, SAESize, Shape
from dmsae_lib.config import RunConfig
from dmsae_lib.config.sections import LONGER, UNFROZEN
from dmsae_lib.data.activations import NORM_SAMPLE_ROWS
from dmsae_lib.data.corpus import DOCUMENTS, PROBING_SETS
from dmsae_lib.data.language_model import choose_device, choose_dtype
from dmsae_lib.distill.evaluation import CALIBRATION_TOKENS
from dmsae_lib.distill.evaluation import SHARED_BYTES as MEASURING_BYTES
from dmsae_lib.report.results import Results
from dmsae_lib.saebench.core import SHARED_BYTES
from dmsae_lib.saebench.probing import LARGEST_TRAIN, SMALLEST_TEST

KINDS = ("harvest", "train", "attribute", "distill", "learning_rate", "retrain", "saebench")
# of each set, that an SAE encodes; a few sets have some hundred less
PROBING_TEXTS = LARGEST_TRAIN + SMALLEST_TEST
BLOCK_COPIES = 3  # of a streamed block while it is made: joined, scaled, and the one before, still in use
ROOM = 0.9  # share of a GPU's memory that jointly trained SAEs may fill


@dataclass(frozen=True)
class Text:
    """A corpus: the share of positions that count (neither BOS nor padding), usable tokens per document."""

    usable: float
    document: int

    def collected(self, tokens: int) -> int:
        """Usable tokens of a split that asks for ``tokens``."""
        return math.ceil(tokens / (DOCUMENTS * self.document)) * DOCUMENTS * self.document


@dataclass(frozen=True)
class Stage:
    """One kind of stage, all of its processes together; ``memory``: the peak of one, ``disk``: what stays."""

    kind: str
    processes: int
    ops: list[Op]
    memory: float
    disk: float

    @property
    def flops(self) -> float:
        return sum(op.flops for op in self.ops)

    @property
    def bytes(self) -> float:
        return sum(op.bytes for op in self.ops)


class Sizing:
    """A configuration on a language model and a machine.

    Args:
        text: the corpus. core: the size of the core, which only a run can tell.
        dead: free latents under AuxK in an average step.
    """

    def __init__(
        self, config: RunConfig, shape: Shape, machine: Machine, text: Text, core: int, dead: int = 0
    ):
        self.config, self.shape, self.machine, self.text, self.dead = config, shape, machine, text, dead
        self.blocks = int(config.model.hook_name.split(".")[1]) + 1  # below the hook
        self.context = config.model.context_size
        self.element = 4 if choose_dtype(config.model.dtype, choose_device(config.device)) == "float32" else 2
        self.plain, self.cored = (
            SAESize(shape.d_model, config.sae.d_sae, c, tuple(config.sae.prefixes)) for c in (0, core)
        )

    # Parts of stages

    def lower(self, tokens: float) -> Op:
        """The model up to the hook, over the contexts that hold ``tokens`` usable tokens."""
        return self.shape.forward(tokens / self.text.usable, self.blocks, self.context, self.element)

    def whole(self, tokens: float) -> Op:
        """The whole model; so do sae_bench's passes run, whatever is put in the hook's place."""
        positions = tokens / self.text.usable
        return self.shape.forward(positions, self.shape.layers, self.context, self.element, logits=True)

    def upper(self, tokens: float) -> Op:
        """The model from the hook on."""
        positions, above = tokens / self.text.usable, self.shape.layers - self.blocks
        return self.shape.forward(positions, above, self.context, self.element, logits=True)

    def _fit(self, sae: SAESize, k: int, factor: int = 1) -> list[Op]:
        """Train on given batches, calibrate the threshold, measure on `test`."""
        cfg = self.config
        select = min(CALIBRATION_TOKENS, self.text.collected(cfg.data.select_tokens))
        test = self.text.collected(cfg.data.test_tokens)
        step = sae.step(cfg.training.batch_size, k, self.machine, self.dead)
        ops = [*(op * cfg.steps(factor) for op in step), self.lower(select), sae.encode(select)]
        return [*ops, self.lower(test), self.upper(2 * test), sae.encode(test), sae.decode(test)]

    def _attribute(self, sae: SAESize) -> list[Op]:
        tokens = self.text.collected(self.config.data.select_tokens)
        # encoded and decoded at all positions
        positions, candidates = tokens / self.text.usable, sae.core + sae.prefixes[0]
        back = self.shape.backward(positions, self.shape.layers - self.blocks, self.context, self.element)
        flops, moved = 2 * (positions + tokens) * candidates * sae.d_in, 120 * tokens * candidates
        ops = [self.lower(tokens), self.upper(tokens), back, sae.encode(positions, candidates)]
        return [*ops, Op("contributions", flops, moved)]  # sums in float64

    def _streamed(self, jobs: Iterable[tuple[bool, int]]) -> float:
        """Tokens that the model makes for (fresh, factor) jobs of one order, ``together`` on a pass."""
        groups: dict[bool, list[int]] = {}
        for fresh, factor in jobs:
            if fresh or self.config.data.store == "stream":
                groups.setdefault(fresh, []).append(factor)
        passes = sum(max(factors) * math.ceil(len(factors) / self.together) for factors in groups.values())
        return passes * self.config.data.train_tokens

    # Memory and disk

    @property
    def model_bytes(self) -> int:
        return self.element * self.shape.parameters

    def training_memory(self, saes: int, k: int) -> float:
        """The model, a block of activations, ``saes`` SAEs with their optimisers, one step's matrices; and
        what measuring the first finished one takes while all the others are still there."""
        cfg = self.config
        block = 4 * cfg.data.buffer_rows * self.context * self.text.usable * self.shape.d_model
        matrices = 2 if self.cored.sparse(k, self.machine.device) else 4
        step = 4 * matrices * cfg.training.batch_size * cfg.sae.d_sae
        measuring = self.logits_memory(backward=False) - self.model_bytes + self.kept_residuals
        streaming = BLOCK_COPIES * block if cfg.data.store == "stream" else 0
        return self.model_bytes + saes * self.plain.training + streaming + max(step, measuring)

    @property
    def kept_residuals(self) -> float:
        """Those on which thresholds are set and, where they are few, those of the test split."""
        data, width = self.config.data, 4 * self.shape.d_model
        tested = width * self.text.collected(data.test_tokens) / self.text.usable
        calibrated = width * min(CALIBRATION_TOKENS, data.select_tokens)
        return calibrated + (tested if tested <= MEASURING_BYTES else 0)

    def logits_memory(self, backward: bool) -> float:
        """The model, an SAE, its activations and one batch's logits, with float32 copies for the loss."""
        positions = self.config.model.batch_rows * self.context
        logits = positions * self.shape.vocabulary * (self.element + 8) * (2 if backward else 1)
        return self.model_bytes + self.plain.file + logits + 12 * positions * self.config.sae.d_sae

    @property
    def fits(self) -> int:
        """SAEs that find room beside the model while they are trained jointly; 1 at least, room or not."""
        one, two = (self.training_memory(n, max(self.config.retrain.ks)) for n in (1, 2))
        return max(1, int((ROOM * self.machine.memory - one) / (two - one)) + 1)

    @property
    def together(self) -> int:
        """SAEs on one pass: ``training.together``, lowered to what fits."""
        return min(self.config.training.together, self.fits)

    @property
    def shards(self) -> int:
        """Bytes of the training activations of one cycle, were they stored (``data.store: disk``)."""
        return self.element * self.config.data.train_tokens * self.shape.d_model

    @property
    def token_files(self) -> float:
        """Token ids of all splits, int32, padding included."""
        data = self.config.data
        wanted = (data.train_tokens * data.fresh_factor, data.select_tokens, data.test_tokens)
        return sum(4 * self.text.collected(tokens) / self.text.usable for tokens in wanted)

    def checkpoints(self, saes: int) -> int:
        """Disk for ``saes`` SAEs while they train together: a checkpoint each, one of them twice."""
        return (saes + 1) * self.plain.checkpoint

    # Stages

    @cached_property
    def retrained(self) -> dict[str, list[tuple[int, str, int]]]:
        """(k, arm, seed) of every SAE after distillation, by chain."""
        cfg = self.config
        return {
            chain: [(k, arm, seed) for k in cfg.retrain.ks for arm, seed in cfg.retrain_arms(k, chain)]
            for chain in cfg.retrained_chains
        }

    @cached_property
    def cycles(self) -> tuple[int, int, int]:
        """SAEs without a core, with one, and placebos of the distillation chains; some share their first."""
        cfg, last = self.config, self.config.distill.cycles
        first = {cfg.trains(chain, 0) for chain in cfg.chains}
        placebos = sum(len(cfg.for_chain(chain).distill.placebos) for chain in cfg.chains)
        return len(first), last * len(cfg.chains), last * placebos

    def harvest(self) -> Stage:
        """One pass below the hook, stored or not, since it measures the scale; then the reference losses."""
        data, test = self.config.data, self.text.collected(self.config.data.test_tokens)
        sample = NORM_SAMPLE_ROWS * self.context * self.text.usable
        # bare, zero and mean ablation
        ops = [self.lower(data.train_tokens + sample + test), self.whole(test), self.upper(2 * test)]
        disk = self.token_files + (self.shards if data.store == "disk" else 0)
        return Stage("harvest", 1, ops, self.logits_memory(backward=False), disk)

    def train(self) -> Stage:
        k, (plain, cored, placebos) = self.config.training.k, self.cycles
        counts = ((plain, self.plain), (cored + placebos, self.cored))
        ops = [op * n for n, sae in counts for op in self._fit(sae, k)]
        ops.append(self.lower((plain + cored) * self._streamed([(False, 1)])))  # placebos share their cycle's
        at_once = 1 + min(len(self.config.distill.placebos), self.together - 1)
        disk = plain * self.plain.file + (cored + placebos) * self.cored.file
        return Stage("train", plain + cored, ops, self.training_memory(at_once, k), disk)

    def attribute(self) -> Stage:
        plain, cored, placebos = self.cycles
        ops = [op * (plain + cored + placebos) for op in self._attribute(self.cored)]
        return Stage("attribute", plain + cored, ops, self.logits_memory(backward=True), 0)

    def distill(self) -> Stage:
        n = sum(self.cycles[:2])
        return Stage("distill", n, [], self.cored.file, n * 4 * self.cored.core * self.cored.d_in)

    def learning_rate(self) -> Stage:
        """Each rate without and with a core, once for each of the main kind's chains, on one pass."""
        n, k = len(self.config.learning_rate_sweep) * len(self.config.replicates), self.config.training.k
        ops = [op * n for sae in (self.plain, self.cored) for op in self._fit(sae, k)]
        ops.append(self.lower(self._streamed([(False, 1)] * 2 * n)))
        return Stage("learning_rate", min(n, 1), ops, self.training_memory(min(2 * n, self.together), k), 0)

    def retrain(self) -> Stage:
        """Every k, arm and seed of a chain on one pass over the data, as many together as may and fit."""
        ops, disk, seed_0 = [], 0, self.config.retrain.seeds[0]
        for chain, saes in self.retrained.items():
            jobs = []
            for k, arm, seed in saes:
                sae = self.plain if arm in ("none", *UNFROZEN, *LONGER) else self.cored
                factor = self.config.distill.cycles + 1 if arm in LONGER else 1
                ops += self._fit(sae, k, factor)
                jobs.append((arm == "longer_fresh", factor))
                disk += sae.file
                if chain == "main" and arm in ("none", "distilled") and seed == seed_0:
                    ops += self._attribute(sae)  # for the heat map of core sizes
            ops.append(self.lower(self._streamed(jobs)))
        at_once = min(self.together, max(map(len, self.retrained.values())))
        training = self.training_memory(at_once, max(self.config.retrain.ks))
        memory = max(training, self.logits_memory(backward=True))
        return Stage("retrain", len(self.retrained), ops, memory, disk)

    def saebench(self) -> Stage:
        """The passes and encodings of both evals; the fits of the probes are not predicted."""
        cfg, n = self.config, sum(arm in self.config.saebench.arms for _, arm, *_ in self.config.scorable)
        sets = len(PROBING_SETS if cfg.saebench.probing_sets is None else cfg.saebench.probing_sets)
        positions, texts = cfg.saebench.core_rows * self.context, sets * PROBING_TEXTS
        tokens, outputs = positions * self.text.usable, 2 * self.element * positions * self.shape.vocabulary
        alike = 2 if outputs <= SHARED_BYTES else 2 * n  # passes of the clean and of the zero-ablated model
        ops = [self.whole((alike + n) * tokens), self.lower(n * tokens)]
        ops.append(self.cored.encode(n * (2 * tokens + texts)))
        ops.append(self.lower(texts * min(self.text.document, self.context)))
        return Stage("saebench", 1, ops, self.logits_memory(backward=False), 0)

    def stages(self) -> list[Stage]:
        found = [getattr(self, kind)() for kind in KINDS]
        return [stage for stage in found if stage.processes]


def published(results: Results) -> dict[str, Any]:
    """What a published run measured: seconds and processes by kind of stage, hardware, threads."""
    measured = {name: results.made[name] for name in ("seconds", "processes", "hardware")}
    return measured | {"threads": results.summary["inputs"]["threads"]}
