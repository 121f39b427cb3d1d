"""A core on its way to others: pushed to the Hub or into a folder, with a model card that says what it is.

Pulling is :func:`dmsae_lib.distill.core_format.load_core` with the repository's name. The token is the Hub
client's own affair (HF_TOKEN, or `hf auth login`): nothing here reads, prints or writes it.
"""

from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd

from dmsae_lib.config.fields import EMBEDDED
from dmsae_lib.distill.core_format import FILES, HUB_ID, PortableCore, load_core, names_folder, write_files
from dmsae_lib.report.results import Results
from dmsae_lib.store.artifacts import UserError, load
from dmsae_lib.store.atomic import explain_errors

TEMPLATE = Path(__file__).with_name("templates") / "core_card.md.j2"
TAGS = ["dmsae-core", "sparse-autoencoder", "matryoshka-sae", "interpretability", "arxiv:2512.24975"]
MEASURED = {  # column of the card's table: what of a retrained SAE's row, put together over seeds how
    "seeds": ("seed", "size"),
    "core_L0": ("L0.core", "mean"),
    "total_L0": ("L0.total", "mean"),
    "fvu": ("fvu", "mean"),
    "loss_increase": ("loss_increase", "mean"),
    "unbound": ("unbound", "any"),
}


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
            embedded one (MIT).
        private: what a new repository is.

    Raises UserError where the core is damaged, the results are another run's, the licence is missing, or the
    Hub declines.
    """
    folder, local = Path(folder).expanduser(), names_folder(to)
    core = load_core(folder)
    card = model_card(core, None if local else str(to), results, licence)
    files = {name: (folder / name).read_bytes() for name in FILES} | {"README.md": card.encode()}
    if local:
        write_files(Path(to).expanduser(), files)
        return str(to)
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(library_name="dmsae")
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    remedy = (
        "check name and network, and log in (`hf auth login`, or HF_TOKEN) with a token that may write there"
    )
    with explain_errors(f"The Hub did not take the core for {to}", remedy):
        api.create_repo(str(to), private=private, exist_ok=True)
        return api.create_commit(str(to), operations, commit_message=f"Core {core.hash[:12]}").commit_url


def model_card(
    core: PortableCore,
    repo_id: str | None = None,
    results: str | Path | None = None,
    licence: str = "",
) -> str:
    """README.md of a core in the repository ``repo_id``, or (None) in a folder that holds the card as well.

    Raises UserError where the licence is missing or the results are another core's.
    """
    from huggingface_hub import ModelCard, ModelCardData

    name = core.record["model"]["name"]
    if not licence and name not in {path.parent.name for path in EMBEDDED.glob("*/config.json")}:
        raise UserError(
            f"Say under which licence the core goes out (LICENCE=mit, LICENCE=gemma ...): {name} has terms "
            "of its own."
        )
    base = name if HUB_ID.fullmatch(name) else None
    metadata = ModelCardData(license=licence or "mit", library_name="dmsae", base_model=base, tags=TAGS)
    frequencies = [latent.frequency for latent in core.latents]
    facts = core.record | {"repo_id": repo_id, "frequencies": frequencies, "median": median(frequencies)}
    facts |= {"free_budget": _free_budget(core), **(_measured(core, Path(results)) if results else {})}
    return f"{ModelCard.from_template(metadata, template_path=str(TEMPLATE), **facts)}\n"


def _free_budget(core: PortableCore) -> int:
    """k of the BatchTopK in the card's code: a ReLU core takes its part of the budget first."""
    distilled = core.record["distilled"]
    if distilled["core_sparsity"] != "relu":
        return distilled["k"]
    left = round(distilled["k"] - sum(latent.frequency for latent in core.latents))
    return max(1, min(left, distilled["d_sae"] - len(core)))


def _measured(core: PortableCore, results: Path) -> dict[str, Any]:
    """The retrained SAEs without and with the core, means over seeds, and the claims of its own run."""
    summary, distilled = Results(results).summary, core.record["distilled"]
    last, reading = summary["sizes"]["n_cycles"], summary["final_core"]["reading"]
    theirs = load(results, "summary").parents.get(f"cycle_{last}/core"), last, reading
    if theirs != (core.record["parents"]["core"], distilled["cycle"], distilled["reading"]):
        raise UserError(
            f"The SAEs in {results} were not trained with this core: give its own run's results, or none."
        )
    rows = pd.json_normalize(summary["retrain"]).query("chain == 'main' and arm in ('none', 'distilled')")
    means = rows.groupby(["k", "arm"], sort=False).agg(**MEASURED).reset_index()
    return {"retrained": means.to_dict("records"), "claims": summary["claims"]}
