"""Set up .venv-bench: the project's environment as it is, with dictionary_learning on top.

The new environment holds the few packages of requirements.txt and sees all others in the environment that
runs this script, so both peers and we run on the very same torch. The project's environment does not see it.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

FOLDER = Path(".venv-bench")
NEEDS = Path(__file__).with_name("requirements.txt")
CHECK = "import sae_lens; from dictionary_learning.trainers import matryoshka_batch_top_k"


def run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
        shutil.rmtree(FOLDER, ignore_errors=True)
        sys.exit(
            "error: the benchmark's environment could not be set up (see above); mend that and run "
            "'make bench-environment' again."
        )


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    uv = shutil.which("uv")
    venv.create(FOLDER, with_pip=uv is None, symlinks=True)
    python = FOLDER / "bin" / "python"
    run(
        *(
            [uv, "pip", "install", "--python", str(python)]
            if uv
            else [str(python), "-m", "pip", "install", "--no-input"]
        ),
        "--quiet",
        "--no-deps",
        "-r",
        str(NEEDS),
    )
    own = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(FOLDER)}))
    below = os.path.relpath(sysconfig.get_path("purelib"), FOLDER)  # relative: the clone may be moved
    # addsitedir rather than a plain path: it reads the .pth files there as well, the project's own among them
    (own / "project.pth").write_text(
        f"import os, site, sys; site.addsitedir(os.path.join(sys.prefix, {below!r}))\n"
    )
    run(str(python), "-c", CHECK)
    (FOLDER / ".complete").touch()
    print(f"{FOLDER} is set up")


if __name__ == "__main__":
    main()
