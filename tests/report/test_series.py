import pytest

from dmsae_lib.config import sections
from dmsae_lib.report import series


def test_an_arm_without_a_look_is_refused_before_anything_is_trained_or_drawn(monkeypatch):
    series.check_names()
    monkeypatch.setitem(sections.ARMS, "toy", "new rows")
    with pytest.raises(RuntimeError, match="The arm toy .*report.series.ARMS"):
        series.check_names()
