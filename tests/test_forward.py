from types import SimpleNamespace

import pytest
import torch

from peco_ds.evaluation.forward import forward_images_per_s


def test_throughput_is_images_over_time_and_the_slow_first_pass_is_not_in_it(monkeypatch):
    sizes, now = [], [0.0]
    monkeypatch.setattr("peco_ds.evaluation.forward.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def forward(images):
        now[0] += 0.02 if sizes else 0.5
        sizes.append(len(images))

    rate = forward_images_per_s(forward, torch.zeros(8, 3, 4, 4), seconds=0.3)
    assert rate == pytest.approx(8 / 0.02)
    assert set(sizes) == {8}
