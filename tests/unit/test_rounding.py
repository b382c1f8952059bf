"""`experiments/rounding.py`: the perturbation reaches the run, and is as small as it says."""

import pytest
from experiments import rounding
from tests.runs import tiny


def test_perturbed_runs_differ_from_the_plain_one_and_from_each_other(monkeypatch):
    config = tiny(steps=4)
    plain, again, last_bit = (rounding.final_loss(config, number) for number in (None, None, 0))
    assert plain == again
    assert last_bit == pytest.approx(plain, abs=1e-5)
    monkeypatch.setattr(rounding, "LAST_BIT", 1e-2)  # of the last bit alone four steps make too little
    perturbed = [rounding.final_loss(config, number) for number in (0, 1)]
    assert len({plain, *perturbed}) == 3
    assert perturbed == pytest.approx([plain] * 2, abs=0.05)
