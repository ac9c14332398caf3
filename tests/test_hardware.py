"""The catalogue of machines: what its names, files and refusals do for a user."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from peco_ds.errors import UserError
from peco_ds.planner.hardware import (
    ALIASES,
    HARDWARE,
    PRECISIONS,
    Hardware,
    find_hardware,
    hardware_of_device,
    hardware_table,
)

FULL = """
memory_bytes: 24e9
peak_flops: {bf16: 100e12, fp16: 100.0e+12, fp32: 3.0e+13}
memory_bytes_s: 1.0e+12
gpus_per_node: 4
link_bytes_s: 25e9
network_bytes_s: 12.5e9
host_memory_bytes: 256e9
cores_per_node: 32
storage_bytes_s: 1e9
"""


@pytest.fixture
def written(tmp_path):
    """A YAML file of the given text."""

    def write(text: str, name: str = "own.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    "text, name",
    [
        ("h100", "h100"),
        ("H200", "h200"),
        ("A100_40", "a100-40"),
        ("h100-SXM", "h100"),
        (" a100 ", "a100-80"),
        ("rtx PRO 6000", "rtx-pro-6000"),
    ],
)
def test_a_machine_is_found_by_its_name_in_any_spelling(text, name):
    assert find_hardware(text) is HARDWARE[name]


def test_every_alias_names_a_machine_and_no_machine_twice():
    assert set(ALIASES.values()) <= set(HARDWARE)
    assert not set(ALIASES) & set(HARDWARE)


@pytest.mark.parametrize("text, near", [("h10", "h100"), ("a100-8", "a100-80"), ("l40", "l40s")])
def test_an_unknown_name_is_refused_with_the_nearest_and_all_known_ones(text, near):
    with pytest.raises(UserError) as refused:
        find_hardware(text)
    assert f"did you mean {near!r}" in str(refused.value) and "\n" not in str(refused.value)
    assert all(name in str(refused.value) for name in HARDWARE)


@pytest.mark.parametrize("machine", HARDWARE.values(), ids=HARDWARE)
def test_every_number_of_the_catalogue_names_its_source(machine):
    numbers = {item.name for item in fields(Hardware)} - {"name", "title", "device_name", "sources"}
    assert numbers <= set(machine.sources)
    assert all(machine.sources[name].strip() for name in numbers)
    assert set(machine.peak_flops) == set(PRECISIONS)


@pytest.mark.parametrize("machine", HARDWARE.values(), ids=HARDWARE)
def test_ranges_rise_from_slow_to_fast_and_stay_below_the_peak(machine):
    for shares in (machine.product_share, machine.attention_share):
        assert 0 < shares[0] < shares[1] < shares[2] <= 1
    assert 0 < machine.memory_share < 1
    assert machine.peak_flops["fp32"] < machine.peak_flops["fp16"]


def test_a_file_starts_from_a_machine_and_changes_what_it_says(written):
    path = written(
        "base: h100\nname: rented\ngpus_per_node: 4\nproduct_share: [0.3, 0.4, 0.5]\npeak_flops: {bf16: 800e12}\n"
    )
    machine, base = find_hardware(str(path)), HARDWARE["h100"]
    assert (machine.name, machine.gpus_per_node, machine.product_share) == ("rented", 4, (0.3, 0.4, 0.5))
    assert machine.peak_flops == {**base.peak_flops, "bf16": 800e12}
    assert machine.memory_bytes == base.memory_bytes
    assert (
        machine.sources["gpus_per_node"] == str(path)
        and machine.sources["memory_bytes"] == base.sources["memory_bytes"]
    )


def test_a_whole_machine_of_ones_own_needs_no_base(written):
    machine = find_hardware(written(FULL, "lab.yml"))
    assert machine.name == "lab"
    assert (machine.memory_bytes, machine.peak_flops["fp32"], machine.cores_per_node) == (24e9, 3e13, 32)
    assert all(
        item.name in machine.sources
        for item in fields(Hardware)
        if item.name not in ("name", "title", "device_name", "sources")
    )


def test_memory_may_stand_in_gib_and_a_value_may_name_its_source(written):
    path = written("base: h100\nmemory_bytes: 94 GiB\nhost_memory_bytes: 1.5 TiB\nsources: {memory_bytes: a label}\n")
    machine = find_hardware(path)
    assert (machine.memory_bytes, machine.host_memory_bytes) == (94 * 2**30, 1.5 * 2**40)
    assert (machine.sources["memory_bytes"], machine.sources["host_memory_bytes"]) == ("a label", str(path))


@pytest.mark.parametrize(
    "text, named",
    [
        ("base: h100\nmemory_byte: 1e9\n", "did you mean 'memory_bytes'"),
        ("base: h10\n", "did you mean 'h100'"),
        ("base: other.yaml\n", "base"),
        ("base: h100\ngpus_per_node: 0\n", "gpus_per_node"),
        ("base: h100\ngpus_per_node: 2.5\n", "gpus_per_node"),
        ("base: h100\nlink_bytes_s: -1\n", "link_bytes_s"),
        ("base: h100\nlink_bytes_s: fast\n", "link_bytes_s"),
        ("base: h100\nlink_bytes_s: .inf\n", "link_bytes_s"),
        ("base: h100\nlink_bytes_s: true\n", "link_bytes_s"),
        ("base: h100\npeak_flops: 989e12\n", "peak_flops"),
        ("base: h100\npeak_flops: {bf61: 989e12}\n", "did you mean 'bf16'"),
        ("base: h100\npeak_flops: {bf16: no}\n", "peak_flops.bf16"),
        ("base: h100\nproduct_share: 0.5\n", "product_share"),
        ("base: h100\nproduct_share: [0.7, 0.6, 0.5]\n", "product_share"),
        ("base: h100\nmemory_share: 1.5\n", "memory_share"),
        ("base: h100\ntitle: 5\n", "title"),
        ("base: h100\nmemory_bytes: 94 GB\n", "memory_bytes"),
        ("base: h100\nlink_bytes_s: 94 GiB\n", "link_bytes_s"),
        ("base: h100\nsources: {speed: a label}\n", "sources"),
        (FULL.replace("cores_per_node: 32\n", ""), "cores_per_node is not set"),
        (FULL.replace(", fp32: 3.0e+13", ""), "peak_flops.fp32 is not set"),
        ("- h100\n", "list"),
        ("base: [\n", "not YAML"),
        ("base: h100\nbase: h200\n", "stands twice"),
    ],
)
def test_a_file_that_says_nonsense_is_refused_in_one_line_that_names_file_and_field(written, text, named):
    path = written(text)
    with pytest.raises(UserError) as refused:
        find_hardware(path)
    message = str(refused.value)
    assert named in message and "\n" not in message
    assert str(path) in message or "not in the catalogue" in message


def test_a_missing_file_is_refused_by_its_name(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        find_hardware(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    "device, name, peak",
    [
        ("NVIDIA H100 80GB HBM3", "h100", 989.4e12),
        ("NVIDIA H100 PCIe", "h100", 756e12),
        ("NVIDIA H100 NVL", "h100", 835e12),
        ("NVIDIA H200", "h200", 989.4e12),
        ("NVIDIA H200 NVL", "h200", 835e12),
        ("NVIDIA GH200 480GB", "h100", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", "a100-80", 312e12),
        ("NVIDIA A100-PCIE-40GB", "a100-40", 312e12),
        ("NVIDIA B200", "b200", 2250e12),
        ("NVIDIA L40S", "l40s", 362e12),
        ("Tesla V100-SXM2-32GB", "v100", 125e12),
        ("NVIDIA GeForce RTX 3090", "rtx3090", 71e12),
    ],
)
def test_a_device_finds_its_machine_and_the_peak_of_its_own_card(device, name, peak):
    machine = hardware_of_device(device)
    assert (machine.name, machine.peak_flops["fp16"]) == (name, peak)


@pytest.mark.parametrize("device", ["AMD Instinct MI300X", "CPU", "NVIDIA GB200", "NVIDIA GeForce RTX 4090"])
def test_a_device_that_is_not_in_the_catalogue_has_no_machine(device):
    assert hardware_of_device(device) is None


def test_the_table_shows_every_machine_with_its_sources():
    table = hardware_table()
    for machine in HARDWARE.values():
        assert f"{machine.name}: {machine.title}" in table
        assert all(source in table for source in machine.sources.values())


@pytest.mark.parametrize(
    "line, said",
    [
        ("network_bytes_s: 100", "too little to be bytes a second; an H100 node has 4e+11"),
        ("memory_bytes: 24", "too little to be bytes"),
        ("peak_flops: {bf16: 989}", "too little to be FLOP/s"),
        ("network_bytes_s: 100 Gb/s", "a number above 0, in bytes a second"),
    ],
)
def test_a_rate_in_other_units_is_told_from_one_in_bytes(tmp_path, line, said):
    path = tmp_path / "mine.yaml"
    path.write_text(f"base: h100\n{line}\n")
    with pytest.raises(UserError, match=re.escape(said)):
        find_hardware(path)


@pytest.mark.parametrize("name", ["NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 5090 Laptop GPU"])
def test_a_part_of_a_card_has_no_known_peak(name):
    assert hardware_of_device(name) is None
