import math

import numpy as np
import pytest

from peco_ds.schedules import cosine_with_warmup, linear_with_warmup


def rate(step):
    return cosine_with_warmup(step, peak=1.5e-3, floor=1e-5, warmup_steps=10, total_steps=110)


def test_the_rate_rises_linearly_from_zero_and_falls_as_half_a_cosine():
    assert [rate(step) for step in (0, 1, 5)] == pytest.approx([0, 1.5e-4, 7.5e-4])
    assert rate(10) == pytest.approx(1.5e-3)
    assert rate(60) == pytest.approx((1.5e-3 + 1e-5) / 2)
    assert rate(110) == pytest.approx(1e-5) and rate(500) == pytest.approx(1e-5)
    assert all(rate(step) > rate(step + 1) for step in range(10, 110))


def test_the_warm_up_differs_from_the_released_one_by_its_stated_step_and_the_cosine_not_at_all():
    released = [*np.linspace(0, 1.5e-3, 10)]
    released += [1e-5 + (1.5e-3 - 1e-5) * (1 + math.cos(math.pi * step / 100)) / 2 for step in range(100)]
    assert [rate(step) * 10 for step in range(10)] == pytest.approx([released[step] * 9 for step in range(10)])
    assert [rate(step) for step in range(10, 110)] == pytest.approx(released[10:])
    assert released[9] == pytest.approx(rate(10)) and rate(9) == pytest.approx(0.9 * rate(10))


def test_no_warm_up_starts_at_the_peak():
    assert cosine_with_warmup(0, peak=1.0, floor=0.0, warmup_steps=0, total_steps=10) == 1.0


@pytest.mark.parametrize(
    "step, lr",
    [(0, 3.0e-10), (749, 1.490989e-4), (1499, 2.969912e-4), (1500, 2.971875e-4), (80000, 1.5e-4), (159999, 1.875e-9)],
)
def test_the_line_of_segmentation_falls_during_its_warm_up_too(step, lr):
    found = linear_with_warmup(step, peak=3e-4, floor=0.0, warmup_steps=1500, total_steps=160_000)
    assert found == pytest.approx(lr, rel=1e-6)
