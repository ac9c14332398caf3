"""Collectives' times against what nccl-tests reached on published machines, and against the rules every ring obeys."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from peco_ds.planner.hardware import Hardware
from peco_ds.planner.network import NETWORK_SHARE, NVLINK_SHARE, OPERATIONS, PCIE_SHARE, bus_bytes_s, collective_seconds

GIB = 2**30
H100 = Hardware(
    name="h100-like",
    title="",
    memory_bytes=80e9,
    peak_flops={"bf16": 989e12},
    memory_bytes_s=3.35e12,
    gpus_per_node=8,
    link_bytes_s=450e9,
    network_bytes_s=400e9,
    host_memory_bytes=2e12,
    cores_per_node=112,
    storage_bytes_s=4e9,
)
# 4 cards of 200 Gb/s a node
A100 = replace(H100, name="a100-like", link_bytes_s=300e9, network_bytes_s=100e9)
PCIE = replace(H100, name="pcie", link_bytes_s=63e9, network_bytes_s=12.5e9)

# operation, bytes, ranks, machine, published bus bandwidth in GB/s, error allowed.
PUBLISHED = [
    ("all_reduce", 4 * GIB, 8, H100, 476, 0.05),  # nccl-tests issue 290
    ("all_gather", 8 * GIB, 8, H100, 350, 0.05),  # NCCL issue 1281
    ("reduce_scatter", 8 * GIB, 8, H100, 360, 0.05),  # the same
    ("all_reduce", 8 * GIB, 16, H100, 470, 0.10),  # what NCCL issue 2409 expects of two nodes
    # 248 nodes, H200, from below 300 on: nccl-tests issue 283
    ("all_reduce", GIB // 2, 1984, H100, 350, 0.20),
    ("all_reduce", 2 * GIB, 256, H100, 340, 0.10),  # NCCL issue 1218
    # the same machine: far below what we say, and below what its owner expected
    ("all_gather", 2 * GIB, 256, H100, 200, 0.55),
    # 4 to 128 nodes, NCCL issue 1229, which gives no size: nccl-tests' usual largest is taken
    ("reduce_scatter", 8 * GIB, 32, H100, 360, 0.05),
    ("reduce_scatter", 8 * GIB, 128, H100, 320, 0.15),
    ("reduce_scatter", 8 * GIB, 512, H100, 280, 0.20),
    ("reduce_scatter", 8 * GIB, 1024, H100, 260, 0.20),
    ("all_reduce", 4 * GIB, 8, A100, 232.5, 0.05),  # NCCL issue 1048
    ("all_reduce", 4 * GIB, 16, A100, 86, 0.15),  # the same; two nodes
    # three nodes, the best of several: nccl-tests issue 119
    ("all_reduce", 128 * 2**20, 24, A100, 96, 0.15),
    ("all_reduce", 4 * GIB, 8, PCIE, 28, 0.15),  # eight RTX 5090: NCCL issue 1639
]


@pytest.mark.parametrize(
    "operation, num_bytes, ranks, machine, published, allowed",
    PUBLISHED,
    ids=lambda value: getattr(value, "name", None),
)
def test_predicted_bus_bandwidth_is_near_the_published_one(operation, num_bytes, ranks, machine, published, allowed):
    assert bus_bandwidth(operation, num_bytes, ranks, machine) / 1e9 == pytest.approx(published, rel=allowed)


# of 4 bytes, H20 with H100's links: DeepEP issue 303, NCCL issue 1244
@pytest.mark.parametrize("ranks, published", [(8, 12.5e-6), (16, 47e-6)])
def test_predicted_latency_of_a_sum_is_within_a_factor_of_two(ranks, published):
    assert published / 2 < collective_seconds("all_reduce", 4, ranks, H100) < 2 * published


@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_rank_and_no_bytes_cost_nothing(operation):
    assert collective_seconds(operation, 1e9, 1, H100) == 0
    assert collective_seconds(operation, 0, 64, H100) == 0


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("machine", (H100, A100, PCIE), ids=lambda machine: machine.name)
def test_more_bytes_and_more_whole_nodes_never_take_less_time(operation, machine):
    for ranks in (2, 8, 64, 1024):
        times = [collective_seconds(operation, 10**power, ranks, machine) for power in range(1, 12)]
        assert times == sorted(times)
    for num_bytes in (10, 1e6, 1e9):
        times = [collective_seconds(operation, num_bytes, ranks, machine) for ranks in (8, 16, 32, 64, 128, 1024)]
        assert times == sorted(times)


def test_a_long_gather_takes_its_bytes_over_the_slowest_link():
    sent = 1e12 * 7 / 8
    assert collective_seconds("all_gather", 1e12, 8, H100) == pytest.approx(sent / (NVLINK_SHARE * 450e9), rel=0.001)
    assert collective_seconds("all_gather", 1e12, 8, PCIE) == pytest.approx(sent / (PCIE_SHARE * 63e9), rel=0.001)
    assert collective_seconds("all_gather", 1e12, 64, A100) == pytest.approx(
        1e12 * 63 / 64 / (NETWORK_SHARE * 100e9), rel=0.01
    )


def test_without_in_switch_sums_an_all_reduce_is_a_reduction_and_a_gather():
    both = collective_seconds("reduce_scatter", 1e10, 8, A100) + collective_seconds("all_gather", 1e10, 8, A100)
    assert collective_seconds("all_reduce", 1e10, 8, A100) == pytest.approx(both, rel=0.01)
    assert collective_seconds("all_reduce", 1e10, 8, H100) < 0.8 * (
        collective_seconds("reduce_scatter", 1e10, 8, H100) + collective_seconds("all_gather", 1e10, 8, H100)
    )


def test_few_bytes_cost_hops_and_a_sum_of_few_bytes_takes_a_tree():
    gather = [collective_seconds("all_gather", 1000, ranks, H100) for ranks in (128, 1024)]
    assert gather[1] / gather[0] == pytest.approx(8, rel=0.1)
    summed = [collective_seconds("all_reduce", 4, ranks, H100) for ranks in (128, 1024)]
    assert summed[1] / summed[0] < 2 and summed[1] < 200e-6


def test_a_node_with_few_of_its_gpus_slows_everyone():
    whole = collective_seconds("reduce_scatter", 1e9, 16, H100)
    assert collective_seconds("reduce_scatter", 1e9, 12, H100) > 1.5 * whole
    assert bus_bytes_s(9, H100) == pytest.approx(NETWORK_SHARE * 50e9)


def test_a_share_of_the_rates_stretches_long_collectives_and_not_their_latency():
    for operation in OPERATIONS:
        assert collective_seconds(operation, 1e12, 64, H100, share=0.5) == pytest.approx(
            2 * collective_seconds(operation, 1e12, 64, H100), rel=0.02
        )
        assert collective_seconds(operation, 8, 64, H100, share=0.5) == pytest.approx(
            collective_seconds(operation, 8, 64, H100), rel=0.01
        )
    half = replace(H100, link_bytes_s=225e9, network_bytes_s=200e9)
    assert collective_seconds("all_gather", 1e9, 64, H100, share=0.5) == pytest.approx(
        collective_seconds("all_gather", 1e9, 64, half)
    )


def bus_bandwidth(operation: str, num_bytes: float, ranks: int, machine: Hardware) -> float:
    """As nccl-tests reports it: what a rank sends, over the time."""
    sent = {"all_reduce": 2 * (ranks - 1) / ranks, "reduce": 1.0}.get(operation, (ranks - 1) / ranks)
    seconds = collective_seconds(operation, num_bytes, ranks, machine)
    assert math.isfinite(seconds)
    return num_bytes * sent / seconds
