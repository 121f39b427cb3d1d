"""Where a run computes: every path below ``runs/<name>/`` and every stage's name, in one place."""

import re
from pathlib import Path

from dmsae_lib.config import RunConfig, load_config
from dmsae_lib.config.yaml_file import expect
from dmsae_lib.store import artifacts
from dmsae_lib.store.artifacts import Artifact, UserError, load

STEP = {"sae": "train", "attribution": "attribute", "core": "distill"}  # what makes which artefact of a cycle
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Run:
    """Where one run computes: ``runs/<name>/`` below the repository root, and the paths of its stages."""

    def __init__(self, config: RunConfig, name: str, root: Path):
        self.config, self.name, self.root = config, name, root
        self.folder = root / "runs" / name

    def cycle(self, cycle: int, part: str, chain: str = "main") -> Path:
        """The folder of a cycle's ``sae``, ``attribution``, ``core`` or placebo; one seed shares cycle 0."""
        return self.base(self.config.trains(chain, cycle)) / f"cycle_{cycle}" / part

    def stage(self, cycle: int, step: str, chain: str = "main") -> str:
        """The name of the stage that trains, attributes or distills (``step``) a cycle, where that lies."""
        return self._of(self.config.trains(chain, cycle), f"cycle_{cycle}_{step}")

    def retrain_stage(self, chain: str = "main") -> str:
        """The name of the stage that trains SAEs with a chain's cores."""
        return self._of(chain, "retrain")

    @staticmethod
    def _of(chain: str, stage: str) -> str:
        return stage if chain == "main" else f"chain_{chain}_{stage}"

    def load(self, cycle: int, part: str, chain: str = "main") -> Artifact:
        """The artefact in :meth:`cycle`, verified; the error for a missing one names the stage to make."""
        kind = "sae" if part.startswith("placebo_") else part
        made_by = f"stages STAGE={self.stage(cycle, STEP[kind], chain)}"
        return load(self.cycle(cycle, part, chain), kind, made_by)

    def base(self, chain: str) -> Path:
        return self.folder if chain == "main" else self.folder / f"chain_{chain}"

    def retrained(self, k: int, arm: str, seed: int, chain: str = "main") -> Path:
        return self.base(chain) / "retrain" / f"k{k}" / f"{arm}-seed{seed}"

    def scores(self, k: int, arm: str, seed: int, chain: str = "main") -> Path:
        """The folder with one artefact per SAEBench eval and evaluation seed."""
        return self.base(chain) / "saebench" / f"k{k}" / f"{arm}-seed{seed}"


def open_run(config: str, run: str = "", overrides: list[str] | tuple[str, ...] = ()) -> Run:
    """The run that a notebook or make target works in.

    Without overrides that is ``runs/<config>``; with overrides ``runs/<config>--<hash8>``, so that a rerun
    with other parameters never overwrites the plain one; ``run`` names it freely.
    """
    expect(str, run=run)
    resolved = load_config(config, overrides)
    if run and not NAME.fullmatch(run):
        raise UserError(f"The run name {run!r} cannot name a folder: use letters, digits, '.', '_' and '-'.")
    plain = not overrides or resolved == load_config(config)
    name = run or (resolved.name if plain else f"{resolved.name}--{resolved.hash[:8]}")
    return Run(resolved, name, artifacts.repository_root())
