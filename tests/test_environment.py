"""pyproject.toml, requirements.lock, environment.yml and the Makefile name the same environment."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
PIP = next(item["pip"] for item in CONDA if isinstance(item, dict))
TORCH = "2.13.0"
NOT_IN_LOCK = {"torch", "torchvision", "nvidia-nccl-cu12", "nvidia-nccl-cu13"}


def lock_for(python: str, system: str = "linux", machine: str = "x86_64") -> dict[str, str]:
    """{package: version} that the lock gives on one platform."""
    where = default_environment() | {
        "python_version": ".".join(python.split(".")[:2]),
        "python_full_version": python,
        "sys_platform": system,
        "platform_machine": machine,
        "os_name": "posix",
        "implementation_name": "cpython",
    }
    found = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(where):
            (pin,) = requirement.specifier
            assert pin.operator == "==", line
            assert canonicalize_name(requirement.name) not in found, f"{requirement.name} is pinned twice"
            found[canonicalize_name(requirement.name)] = pin.version
    return found


def direct() -> list[Requirement]:
    extras = [item for group in PROJECT["optional-dependencies"].values() for item in group]
    return [Requirement(item) for item in [*PROJECT["dependencies"], *extras]]


@pytest.mark.parametrize("python", ["3.11.7", "3.12.1"])
@pytest.mark.parametrize("system, machine", [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")])
def test_every_direct_dependency_is_pinned_within_its_range(python, system, machine):
    lock = lock_for(python, system, machine)
    for requirement in direct():
        version = TORCH if requirement.name == "torch" else lock.get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} is not in requirements.lock: run `make lock`"
        assert version in requirement.specifier, f"{requirement} but {version} is pinned: run `make lock`"


def test_lock_leaves_out_what_setup_installs_itself_or_not_at_all():
    assert not NOT_IN_LOCK & set(lock_for("3.11.7"))
    overrides = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]["override-dependencies"]
    assert {Requirement(item).name for item in overrides} == NOT_IN_LOCK
    makefile = (ROOT / "Makefile").read_text()
    assert set(re.findall(r"--no-emit-package (\S+)", makefile)) == NOT_IN_LOCK


def test_python_range_is_the_same_everywhere():
    versions = SpecifierSet(PROJECT["requires-python"])
    supported = [minor for minor in range(8, 16) if f"3.{minor}.0" in versions]
    assert supported == [11, 12]
    assert "(3, 11) <= sys.version_info < (3, 13)" in (ROOT / "setup.sh").read_text()
    (python,) = [item for item in CONDA if isinstance(item, str) and item.startswith("python")]
    assert f"{python.removeprefix('python=')}.0" in versions


def test_torch_is_the_same_everywhere():
    assert re.search(r"^TORCH = torch==(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1] == TORCH
    assert f"torch=={TORCH}" in PIP
    (vision,) = [item for item in PIP if item.startswith("torchvision==")]
    minor = int(TORCH.split(".")[1])
    assert vision == f"torchvision==0.{minor + 15}.0", "torchvision 0.(n + 15) is built for torch 2.n"


def test_conda_environment_is_python_pip_make_and_the_lock():
    names = sorted(re.split("[=<>]", item)[0] for item in CONDA if isinstance(item, str))
    assert names == ["make", "pip", "python"]
    assert [item for item in PIP if not item.startswith("torch")] == ["-r requirements.lock", "-e ."]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("uv"), reason="needs uv (and the network)")
def test_what_conda_hands_to_pip_can_be_resolved(tmp_path):
    shutil.copy(ROOT / "requirements.lock", tmp_path)  # outside the clone, whose [tool.uv] leaves torch out
    (tmp_path / "requirements.txt").write_text("\n".join(item for item in PIP if item != "-e ."))
    command = ["uv", "pip", "install", "--dry-run", "--python", sys.executable, "-r", "requirements.txt"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0 and "torchvision==" in ended.stderr, ended.stderr


FILES = ["pyproject.toml", "requirements.lock", "environment.yml", "Makefile", "setup.sh", ".ci/run"]


@pytest.mark.parametrize("name", FILES)
def test_no_registry_host_and_no_path_of_some_machine(name):
    text = (ROOT / name).read_text()
    assert not re.search(r"https?://|--(extra-)?index-url|--find-links|--trusted-host", text)
    assert not re.search(r"(?<![\w.$)}*~])/(opt|home|root|work|tmp|Users)/", text)
