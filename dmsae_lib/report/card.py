"""A core on its way to others: pushed to the Hub or into a folder, with a model card written from core.json
and results.

Pulling is :func:`dmsae_lib.distill.core_format.load_core` with the repository's name. The token is the Hub
client's own affair (HF_TOKEN, or `hf auth login`): nothing here reads, prints or writes it.
"""

from pathlib import Path
from statistics import mean, median
from typing import Any

from dmsae_lib.config.sections import EMBEDDED
from dmsae_lib.distill.core_format import FILES, HUB_ID, PortableCore, load_core, names_folder, write_files
from dmsae_lib.report.results import Results
from dmsae_lib.store.artifacts import UserError, load

Row = dict[str, Any]
TAGS = ["dmsae-core", "sparse-autoencoder", "matryoshka-sae", "interpretability", "arxiv:2512.24975"]
EXAMPLE = """import json
import torch
{imports}from safetensors.torch import load_file

folder, d_sae, k = {folder}, {d_sae}, {k}
scale = json.load(open(f"{{folder}}/core.json"))["normaliser"]["scale"]
core = load_file(f"{{folder}}/core.safetensors")["W_enc"]  # ({d_in}, {size}), never changed
activations = scale * torch.randn(4096, {d_in}) / {d_in} ** 0.5  # put yours here: the model's at {hook_name}
encoder, decoder = torch.nn.Linear({d_in}, d_sae), torch.nn.Linear(d_sae, {d_in})
optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
for x in (activations / scale).split(512):
    W_enc = torch.cat([core, encoder.weight.T[:, {size}:]], dim=1)  # biases and decoder are trained, the core's too
    f = torch.relu((x - decoder.bias) @ W_enc + encoder.bias)
    {select}
    loss = (decoder(f) - x).square().sum(dim=1).mean()
    optimizer.zero_grad(), loss.backward(), optimizer.step()
"""
SELECT = {
    "relu": "f = f * ((f >= f[:, {size}:].topk(k).values[:, -1:]) | (torch.arange(d_sae) < {size}))  # all of the core is kept",
    "batchtopk": "f = f * (f >= f.flatten().topk(k * len(x)).values[-1])  # the core competes with the rest",
}
CARD = """---
{metadata}
---

# Distilled core of {model} at {hook_name}

{size} encoder directions of a sparse autoencoder (SAE) on the residual stream, to be frozen in SAEs that you train. They were
found by attribution-guided distillation of Matryoshka SAEs ([paper](https://arxiv.org/abs/2512.24975); made with a replication
of it): in each of {cycles} cycles the fewest of the innermost latents that hold {coverage:.0%} of the attribution to the next-token
loss were kept, and the rest was trained afresh.

| | |
|:--|:--|
{facts}

## Use it in your own training

Divide your activations by the scale, put the core first in the encoder, and never change it:

```python
{example}```

With the replication's library, `load_core("{source}")` of `dmsae_lib.distill.core_format` checks the hashes, and the model and hook that
you mean to use.

## What was measured

{measured}

## Where it comes from

{parents}

`core.json` holds all of this and every latent's history, share of the attribution and frequency.
"""


def push_core(
    folder: str | Path,
    to: str | Path,
    *,
    results: str | Path | None = None,
    licence: str = "",
    private: bool = True,
) -> str:
    """Put the core in ``folder`` and its model card where others get it, in one call; returns the address.

    Args:
        to: a repository of the Hub (owner/name), made where there is none, in one commit; or a folder.
        results: of the core's run (results/<name> or runs/<run>/summary), for the numbers on the card.
        licence: an identifier of the Hub, such as ``mit`` or ``gemma``; needed unless the model is an
        embedded one (MIT). private: what a new repository is.

    Raises UserError where the core is damaged, the results are another run's, the licence is missing, or the
    Hub declines.
    """
    folder, local = Path(folder).expanduser(), names_folder(to)
    core = load_core(folder)
    card = model_card(core, None if local else str(to), Path(results) if results else None, licence)
    files = {name: (folder / name).read_bytes() for name in FILES} | {"README.md": card.encode()}
    if local:
        write_files(Path(to).expanduser(), files)
        return str(to)
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(library_name="dmsae")
    try:
        api.create_repo(str(to), private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        return api.create_commit(str(to), operations, commit_message=f"Core {core.hash[:12]}").commit_url
    except Exception as error:  # the Hub client raises a dozen kinds, from DNS to a token that may not write
        said = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(
            f"The Hub did not take the core for {to} ({type(error).__name__}: {said}): check the name and "
            "the network, "
            "and log in (`hf auth login`, or HF_TOKEN) with a token that may write there."
        ) from error


def model_card(
    core: PortableCore, repo_id: str | None = None, results: Path | None = None, licence: str = ""
) -> str:
    """README.md of a core in the repository ``repo_id``, or (None) in a folder that holds the card as
    well."""
    from huggingface_hub import ModelCardData

    record, model = core.record, core.record["model"]
    if not licence and model["name"] not in {path.parent.name for path in EMBEDDED.glob("*/config.json")}:
        raise UserError(
            f"Say under which licence the core goes out (LICENCE=mit, LICENCE=gemma ...): {model['name']} "
            "has terms of "
            "its own."
        )
    base = model["name"] if HUB_ID.fullmatch(model["name"]) else None
    metadata = ModelCardData(license=licence or "mit", library_name="dmsae", base_model=base, tags=TAGS)
    return CARD.format(
        metadata=metadata.to_yaml(),
        model=model["name"],
        hook_name=core.hook_name,
        size=len(core),
        source=repo_id or "this folder",
        cycles=record["distilled"]["cycle"] + 1,
        coverage=record["attribution"]["coverage"],
        facts=_facts(core),
        example=_example(core, repo_id),
        measured=_measured(core, results),
        parents="\n".join(
            f"- {name.replace('_', ' ')}: `{value}`" for name, value in record["parents"].items() if value
        ),
    )


def _facts(core: PortableCore) -> str:
    record, distilled, model = core.record, core.record["distilled"], core.record["model"]
    firsts = [latent.first_cycle for latent in core.latents]
    frequencies = [latent.frequency for latent in core.latents]
    rows = {
        "model": f"{model['name']} ({model['architecture']}, {model['n_layers']} layers), content hash `{model['hash']}`",
        "hook": f"`{core.hook_name}` (TransformerLens)",
        "W_enc": f"({core.d_in}, {len(core)}) float32",
        "scale": f"{core.scale!r}: divide activations by it, so that the mean of their squared norm is 1",
        "first selected in cycle": ", ".join(f"{t}: {firsts.count(t)}" for t in sorted(set(firsts))),
        'reading of "the final core"': f"{distilled['reading']}, after cycle {distilled['cycle']}",
        "attribution": f"{record['attribution']['aggregator']}, coverage {record['attribution']['coverage']}, over "
        f"{record['attribution']['tokens']:,} tokens (text: {record['data']['source']})",
        "distilled in": f"SAEs of {distilled['d_sae']} latents, k = {distilled['k']}, {distilled['tokens_per_cycle']:,} tokens per "
        f"cycle; the core's sparsity: {distilled['core_sparsity']}",
        "frequency": f"{sum(frequencies):.1f} of its latents are active on an average token, the median one on "
        f"{median(frequencies):.1%} of the tokens",
        "content hash": f"`{core.hash}`",
    }
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _example(core: PortableCore, repo_id: str | None) -> str:
    distilled, size = core.record["distilled"], len(core)
    budget = distilled["k"]
    if distilled["core_sparsity"] == "relu":  # the core takes its part of the budget first
        budget = max(
            1,
            min(round(budget - sum(latent.frequency for latent in core.latents)), distilled["d_sae"] - size),
        )
    return EXAMPLE.format(
        imports="from huggingface_hub import snapshot_download\n" if repo_id else "",
        d_in=core.d_in,
        size=size,
        k=budget,
        folder=f'snapshot_download("{repo_id}")' if repo_id else '"."',
        d_sae=distilled["d_sae"],
        hook_name=core.hook_name,
        select=SELECT[distilled["core_sparsity"]].format(size=size),
    )


def _measured(core: PortableCore, results: Path | None) -> str:
    """Markdown of the retrained SAEs without and with the core, means over seeds, and of the verdicts."""
    if results is None:
        return "No results were given with this core."
    summary, distilled = Results(results).summary, core.record["distilled"]
    last, reading = summary["sizes"]["n_cycles"], summary["final_core"]["reading"]
    made_from = load(results, "summary").parents.get(f"cycle_{last}/core")
    if (made_from, last, reading) != (
        core.record["parents"]["core"],
        distilled["cycle"],
        distilled["reading"],
    ):
        raise UserError(
            f"The SAEs in {results} were not trained with this core: give the results of its own run, or "
            "none."
        )
    lines = [
        "SAEs trained without a core and with this one, means over seeds, on held-out text (*unbound*: the "
        "core alone exceeds k):",
        "",
        "| k | core | seeds | core L0 | total L0 | FVU | loss increase (nats) |",
        "|--:|:--|--:|--:|--:|--:|--:|",
    ]
    rows = [
        row for row in summary["retrain"] if row["chain"] == "main" and row["arm"] in ("none", "distilled")
    ]
    for k, arm in dict.fromkeys((row["k"], row["arm"]) for row in rows):
        here = [row for row in rows if (row["k"], row["arm"]) == (k, arm)]
        core_l0, total = (mean(row["L0"][part] for row in here) for part in ("core", "total"))
        fvu, increase = (mean(row[name] for row in here) for name in ("fvu", "loss_increase"))
        name = f"{arm} (unbound)" if any(row["unbound"] for row in here) else arm
        lines.append(
            f"| {k} | {name} | {len(here)} | {core_l0:.1f} | {total:.1f} | {fvu:.4f} | {increase:.4f} |"
        )
    lines += [
        "",
        "The paper's claims, judged on this run by code:",
        "",
        "| claim | verdict | numbers |",
        "|:--|:--|:--|",
    ]
    lines += [
        f"| {name}: {row['claim']} | **{row['verdict']}** | {row['detail']} |"
        for name, row in summary["claims"].items()
    ]
    return "\n".join(lines)
