"""What small models must show. Timings decide nothing here: those claims run by `python scripts/claims.py`."""

import pytest


pytest.importorskip("matplotlib")

from helpers.claims import CLAIMS


@pytest.mark.parametrize(
    "name",
    [
        "stabilisation",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("state_tracking", "revising_storage", "memory_capacity")),
    ],
)
def test_claim_holds(name, tmp_path):
    for row in CLAIMS[name].measure(3, tmp_path):  # seeds; what counts is their median
        assert row["holds"], row
