"""Seconds of a collective over NVLink inside nodes and a network between them.

As NCCL's own tuner reckons: latency by hop plus bytes over a bus bandwidth, for each algorithm and protocol, and the
fastest of them is taken. Rings serve every operation, trees and NVLink's in-switch sums (NVLS) the all-reduce alone. A
ring of n ranks makes n - 1 hops for a gather or a reduce-scatter and twice that for an all-reduce; it leaves each node
once, so nodes - 1 (twice nodes) of its hops cross the network. NCCL lays as many rings side by side as there are
network cards, so the bus bandwidth over nodes is what a GPU's link or the whole node's network gives, the smaller of
both.

Left out: other jobs on the same network, the switches' layout (every node is taken to reach every other at full rate),
the tuner's correction of trees between 1 and 256 MB (up to a half), and what a running collective takes from the
computation beside it (step_cost.CONTENTION).

Published bus bandwidths (tests/test_network.py) are met within 15%, but reduce-scatters on 64 to 128 nodes are
predicted 17% too fast, and of one all-gather on 32 nodes half was reached: long rings over many switches do worse than
the tuner's latencies say.

Sources: NCCL 2.21, src/graph/tuning.cc (latencies, shares) and src/graph/topo.h (bandwidth of links); NVIDIA's answers
and users' measurements in the trackers of NCCL and nccl-tests, named beside each value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from peco_ds.planner.hardware import Hardware

OPERATIONS = ("all_gather", "reduce_scatter", "all_reduce", "reduce")

# Of the data sheet's rate. NCCL counts on 20 of 25 GB/s a link on Volta and Ampere, 20.6 on Hopper, 40.1 of 50 on
# Blackwell; measured: 232 GB/s of 300 (A100, NCCL issue 1048), 350 to 370 of 450 (H100, NCCL issue 1281, nccl-tests
# issue 212).
NVLINK_SHARE = 0.8
# NCCL counts on 12 of 15.75 GB/s for one PCIe link; eight GPUs that share host bridges reached 28 GB/s of 64 (NCCL
# issue 1639). Assumed: between the two.
PCIE_SHARE = 0.5
# 46 to 48 GB/s of a 400 Gb/s card, 24 of a 200 Gb/s one (nccl-tests issues 290 and 252).
NETWORK_SHARE = 0.94
# No PCIe link is faster (generation 6, 16 lanes), no NVLink of a data-centre GPU slower (V100: 150 GB/s).
PCIE_FASTEST = 128e9
# Hopper's NVLink 4 (H200's too) and later sum inside the switch: 275 GB/s of data where rings get 370 on the bus (H100,
# nccl-tests issue 212).
NVLS_FROM = 400e9
NVLS_SHARE = 275 / 370
NVLS_LATENCY_S, NVLS_NETWORK_LATENCY_S = 23e-6, 14e-6


@dataclass(frozen=True)
class _Protocol:
    """Latencies in seconds: of a call, of a hop over NVLink, PCIe, the network; for rings and trees.

    How many of the bytes on the wire are data.
    """

    ring: tuple[float, float, float, float]
    tree: tuple[float, float, float, float]
    ring_share: float
    tree_share: float
    # B/s on one node, two, more
    fastest: tuple[float, float, float] = (math.inf, math.inf, math.inf)


_MICRO = 1e-6
_SIMPLE = _Protocol(
    (8.4 * _MICRO, 3.4 * _MICRO, 5.7 * _MICRO, 14.0 * _MICRO), (0.0, 28 * _MICRO, 28 * _MICRO, 28 * _MICRO), 1.0, 0.92
)
# This protocol runs over NVLink alone.
_LL128 = _Protocol(
    (14.0 * _MICRO, 1.9 * _MICRO, math.inf, 4.0 * _MICRO),
    (14.0 * _MICRO, 1.25 * _MICRO, math.inf, 8.5 * _MICRO),
    0.92,
    0.92 * 120 / 128,
)
_LL = _Protocol(
    (6.6 * _MICRO, 0.6 * _MICRO, 1.0 * _MICRO, 2.7 * _MICRO),
    (6.8 * _MICRO, 0.6 * _MICRO, 1.0 * _MICRO, 5.0 * _MICRO),
    0.25,
    0.92 / 3.8,
    (87.7e9, 22.5e9, 19.0e9),
)
_PROTOCOLS = (_SIMPLE, _LL128, _LL)
# Where a ring crosses nodes, every hop waits for the network's bookkeeping: a microsecond on Intel hosts, three under
# the plain protocol.
_OVERHEAD_S = {_SIMPLE: 3 * _MICRO, _LL128: 1 * _MICRO, _LL: 1 * _MICRO}
# Factor on a long ring's latency in an all-reduce over nodes.
_PLATEAU = 1.4


def collective_seconds(
    operation: str, num_bytes: float, ranks: int, hardware: Hardware, *, share: float = 1.0
) -> float:
    """One collective over all ranks, nothing else on the links, from the last rank's call on.

    Args:
        operation: all_gather, reduce_scatter, all_reduce or reduce (to one owner).
        num_bytes: of a gather the whole result, of a reduction the whole input.
        ranks: one a GPU. Nodes are filled one after another; the last takes what is left and reaches the network by as
            many cards as its share of the GPUs.
        share: of the rates below that links and network reach, to try better and worse ones.
    """
    assert operation in OPERATIONS and ranks >= 1 and num_bytes >= 0 and share > 0, (operation, ranks, num_bytes, share)
    if ranks == 1 or num_bytes == 0:
        return 0.0
    nodes = math.ceil(ranks / hardware.gpus_per_node)
    bus = share * bus_bytes_s(ranks, hardware)
    nvlink = hardware.link_bytes_s > PCIE_FASTEST
    protocols = [protocol for protocol in _PROTOCOLS if nvlink or protocol is not _LL128]
    times = [_ring_seconds(operation, num_bytes, ranks, nodes, bus, nvlink, protocol) for protocol in protocols]
    if operation == "all_reduce":
        times += [_tree_seconds(num_bytes, ranks, nodes, bus, nvlink, protocol) for protocol in protocols]
        # In-switch sums want whole nodes; over more than two of them trees and rings are as fast, both at the network's
        # rate.
        if hardware.link_bytes_s >= NVLS_FROM and nodes <= 2 and ranks % hardware.gpus_per_node == 0:
            times.append(_nvls_seconds(num_bytes, nodes, share, hardware))
    return min(times)


def bus_bytes_s(ranks: int, hardware: Hardware) -> float:
    """What long messages reach on the slowest hop of a ring, B/s a GPU of a whole node; inf for one rank."""
    if ranks == 1:
        return math.inf
    link = hardware.link_bytes_s * (NVLINK_SHARE if hardware.link_bytes_s > PCIE_FASTEST else PCIE_SHARE)
    if ranks <= hardware.gpus_per_node:
        return link
    last = ranks % hardware.gpus_per_node or hardware.gpus_per_node
    return min(link, NETWORK_SHARE * hardware.network_bytes_s * last / hardware.gpus_per_node)


def _ring_seconds(
    operation: str, num_bytes: float, ranks: int, nodes: int, bus: float, nvlink: bool, protocol: _Protocol
) -> float:
    call, nvlink_hop, pcie_hop, network_hop = protocol.ring
    hops, crossings, carried = ranks - 1, nodes - 1, num_bytes * (ranks - 1) / ranks
    if operation == "all_reduce":
        hops, crossings, carried = 2 * hops, min(2 * hops, 2 * nodes) if nodes > 1 else 0, 2 * carried
    elif operation == "reduce":
        # A reduce is a pipeline to the owner: every byte passes every hop.
        carried = num_bytes
    hop = nvlink_hop if nvlink else pcie_hop
    if nodes > 1:
        hop = max(hop, _OVERHEAD_S[protocol])
    latency = call + (hops - crossings) * hop + crossings * network_hop
    if operation == "all_reduce" and nodes > 1 and protocol is _SIMPLE:
        latency *= _PLATEAU
    return latency + carried / _reached(protocol, protocol.ring_share, bus, nodes)


def _tree_seconds(num_bytes: float, ranks: int, nodes: int, bus: float, nvlink: bool, protocol: _Protocol) -> float:
    """Up and down two trees over nodes, a chain inside each node: a GPU sends and receives everything twice at most."""
    call, nvlink_hop, pcie_hop, network_hop = protocol.tree
    hop, local = nvlink_hop if nvlink else pcie_hop, math.ceil(ranks / nodes)
    latency = call + 2 * ((local - 1) * hop + math.ceil(math.log2(nodes)) * network_hop)
    return latency + 2 * num_bytes / _reached(protocol, protocol.tree_share, bus, nodes)


def _nvls_seconds(num_bytes: float, nodes: int, share: float, hardware: Hardware) -> float:
    """Summed inside each node's switch, then exchanged between at most two nodes, every byte over the network once."""
    rate = NVLS_SHARE * NVLINK_SHARE * hardware.link_bytes_s
    if nodes > 1:
        rate = min(rate, NETWORK_SHARE * hardware.network_bytes_s)
    return NVLS_LATENCY_S + 2 * (nodes - 1) * NVLS_NETWORK_LATENCY_S + num_bytes / (share * rate)


def _reached(protocol: _Protocol, share: float, bus: float, nodes: int) -> float:
    return min(bus * share, protocol.fastest[min(nodes, 3) - 1])
