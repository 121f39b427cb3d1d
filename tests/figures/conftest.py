"""Published results that the figures are drawn from."""

import pytest
from builders import factory
from builders.asked import record
from builders.published import identity, published, several_chains


@pytest.fixture(scope="session")
def full(tmp_path_factory):
    return published(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """Two cycles, one seed, one control, nothing scored, no record beside the summary."""
    config = factory.config(cycles=2, ks=(32, 64), seeds=(0,), controls={"random": 1})
    return published(tmp_path_factory.mktemp("smoke"), config, scored=False, base_model=False)


@pytest.fixture(scope="session")
def several(tmp_path_factory):
    return published(
        tmp_path_factory.mktemp("several"), several_chains(), identity=identity(), asked=record()
    )
