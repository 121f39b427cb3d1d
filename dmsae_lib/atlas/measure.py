"""Everything that an atlas shows of a run, as one JSON value, and the artefact that holds it."""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dmsae_lib.atlas.ablation import ABLATED_TOKENS, ablate
from dmsae_lib.atlas.activity import activity, rounded
from dmsae_lib.atlas.latents import Shown, nearest, open_shown
from dmsae_lib.data.contexts import Contexts
from dmsae_lib.data.language_model import LanguageModel, lowered
from dmsae_lib.distill.harvest import Harvest
from dmsae_lib.report.examples import direct_logits
from dmsae_lib.report.layout import Row, readable
from dmsae_lib.store.artifacts import Artifact, load, write

SHOWN_TOKENS = 2**15  # of the test split, at most, in which activations are looked for
WORDS = 10  # tokens that a latent raises, and as many that it lowers
LOGIT_BINS = 32


def logits_of(effects: Tensor, spelled: Callable[[list[int]], list[str]]) -> Row:
    """Of one latent's direct effects (vocabulary,) per unit of activation: {raises, lowers: [[token,
    effect]], histogram: {counts, low, high} over the vocabulary}."""

    def ends(sign: int) -> list[tuple[str, float]]:
        best = (sign * effects).topk(min(WORDS, len(effects)))
        return list(zip(spelled(best.indices.tolist()), [rounded(sign * v) for v in best.values.tolist()]))

    low, high = float(effects.min()), float(effects.max())
    counts = effects.double().histc(LOGIT_BINS, low, high).int().tolist()
    spread = {"counts": counts, "low": rounded(low), "high": rounded(high)}
    return {"raises": ends(1), "lowers": ends(-1), "histogram": spread}


@torch.no_grad()
def _activations(
    model: LanguageModel, groups: list[Shown], contexts: Contexts
) -> tuple[list[Tensor], Tensor]:
    """Of every group (rows, positions, latents) on the CPU, and the usable positions (rows, positions)."""
    found: list[list[Tensor]] = [[] for _ in groups]
    usable = []
    for batch, resid in lowered(model, contexts):
        usable.append(model.usable(batch, resid).cpu())
        for group, parts in zip(groups, found):
            parts.append(group.sae.encode(resid)[..., group.indices].cpu())
    return [torch.cat(parts) for parts in found], torch.cat(usable)


def measured(harvest: Harvest, report: Callable[[str], None] = print) -> tuple[Row, dict[str, str]]:
    """The content of atlas.json (see :func:`write_atlas`), and {artefact: hash} of what it was made from."""
    run, model, test = harvest.run, harvest.model, harvest.splits["test"]
    groups = [group for chain in run.config.exemplars for group in open_shown(run, chain)]
    for group in groups:
        group.sae.to(model.device)
    contexts, ablated = test.first(SHOWN_TOKENS), test.first(ABLATED_TOKENS)
    activations, usable = _activations(model, groups, contexts)

    def spelled(ids: list[int]) -> list[str]:
        return model.tokenizer.batch_decode([[i] for i in ids])

    latents = []
    for group, f, near in zip(groups, activations, nearest(groups)):
        report(f"{group.name}: {len(group.latents)} latents")
        logits = direct_logits(group.sae.W_dec[group.indices], model)
        own = group.chain == "main"  # of other chains' latents nobody asks it, and each takes a pass
        losses = ablate(model, group.sae, ablated, group.indices) if own else [None] * len(group.latents)
        for j, latent in enumerate(group.latents):
            about = {"group": group.name, **latent, "share": rounded(latent["share"])}
            about |= activity(f[..., j], usable, contexts)
            about["by_token"] = [(spelled([i])[0], *rest) for i, *rest in about["by_token"]]
            about |= {"logits": logits_of(logits[j], spelled), "nearest": near[j], "ablation": losses[j]}
            latents.append(about)
    table: dict[int, int] = {}  # token id to its place among the strings
    text = [[table.setdefault(i, len(table)) for i in row] for row in contexts.tokens.tolist()]
    about_groups = [
        {"name": group.name, "chain": group.chain, "role": group.role, "kind": group.kind} for group in groups
    ]
    made = {
        "config": run.config.name,
        "model": model.config.name,
        "hook": model.hook_name,
        "data": run.config.data.source,
        "cycles": run.config.distill.cycles,
        "k": run.config.training.k,
        "d_in": model.d_model,
        "d_sae": run.config.sae.d_sae,
        "context_size": model.context_size,
        "n_contexts": len(contexts),
        "tokens": spelled(list(table)),
        "text": text,
        "groups": about_groups,
        "latents": latents,
    }
    sources = {"harvest": harvest.artifact.hash}
    for group in groups:
        sources |= group.sources
    return made, sources


def write_atlas(harvest: Harvest) -> Artifact:
    """Make the artefact ``runs/<run>/atlas``, whose atlas.json is::

    config, model, hook, data, cycles, k, d_in, d_sae, context_size, n_contexts
    tokens, text   distinct strings of tokens, and the contexts of the test split as places among these
    groups         {name, chain, role, kind}: latents that stand together, see latents.Shown
    latents        {group, id, index, first_cycle, share, history} of latents.Shown, and what was measured:
                   activity.activity, logits (:func:`logits_of`), nearest (latents.nearest),
                   ablation (ablation.ablate; None but for the main chain)
    """
    made, sources = measured(harvest)
    folder = harvest.run.folder / "atlas"
    with write(folder, "atlas", sources) as writer:
        writer.path("atlas.json").write_text(_lines(readable(made)), encoding="utf-8")
    return load(folder, "atlas")


def _lines(value: Row) -> str:
    """JSON text with one entry of a list per line: a latent, a context."""

    def short(item: Any) -> str:
        return json.dumps(item, allow_nan=False, separators=(",", ":"))

    def block(item: Any) -> str:
        return "[\n" + ",\n".join(map(short, item)) + "\n]" if isinstance(item, list) else short(item)

    return "{\n" + ",\n".join(f"{short(key)}: {block(item)}" for key, item in value.items()) + "\n}\n"
