"""Peak rates, memory, links and nodes of the machines a plan is made for, each with its source.

A value that a data sheet gives is the data sheet's, dense (without sparsity) and in one direction; what is reached of
it is a `*_share`. A range has three
values: slow, typical, fast. What has no public source says "assumed" and why.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from peco_ds.errors import UserError, nearest
from peco_ds.schema import short
from peco_ds.strict_yaml import NOT_YAML, read_yaml

PRECISIONS = ("bf16", "fp16", "fp32")
GIB, TIB = 2**30, 2**40


@dataclass(frozen=True)
class Hardware:
    """One kind of GPU in one kind of node."""

    name: str  # as --hardware takes it
    title: str
    # of a GPU, as torch reports it: without what the driver keeps for itself
    memory_bytes: float
    peak_flops: dict[str, float]  # dense, by precision: bf16, fp16, fp32
    memory_bytes_s: float  # device memory of a GPU, read and written
    gpus_per_node: int
    link_bytes_s: float  # NVLink or PCIe of a GPU, inside a node
    network_bytes_s: float  # of a whole node, between nodes
    host_memory_bytes: float  # of a node
    cores_per_node: int  # real ones
    storage_bytes_s: float  # shared file system, a node
    # of the peak that the matrix products of a training step reach
    product_share: tuple[float, float, float] = (0.5, 0.6, 0.7)
    # of the 16-bit peak that the attention kernel reaches, forward and backward
    attention_share: tuple[float, float, float] = (0.1, 0.15, 0.25)
    # of memory_bytes_s that kernels reach that only read and write
    memory_share: float = 0.85
    # pattern of the name that the driver gives the GPU; "": none
    device_name: str = ""
    sources: dict[str, str] = field(default_factory=dict)  # field -> where its value comes from


_ASSUMED_MEMORY_SHARE = (
    "assumed: copies reach 0.84 to 0.90 of HBM's data-sheet rate (public measurements of A100 "
    "and H100), reductions and ragged rows less"
)
_ASSUMED_STORAGE = (
    "assumed: 4 GB/s to a node, what reference designs of GPU clusters ask of a shared file "
    "system for training on images"
)
_MATMUL_FLOPS = (
    "table of maximum achievable matrix-product FLOP/s of 'Machine Learning Engineering' "
    "(github.com/stas00/ml-engineering, compute/accelerator)"
)
_NARROW = (
    "a step's products have shared dimensions of 768 to 5120, random values and a warm card, so "
    "less than that: the fast value is assumed"
)
_CALIBRATED = (
    "calibrated once (benchmarks/plan_world.py): slow is the share at which, all else typical, "
    "the published {row} comes out; typical lies half-way to fast"
)
_OWN_ATTENTION = (
    "assumed: PyTorch's memory-efficient kernels, which alone take a learned bias, are written "
    "for Ampere's instructions; FlashAttention-2's paper (arXiv 2307.08691) "
    "shows kernels of that kind at a quarter to a third of an A100's peak at 64 numbers a head "
    "and long rows, and 200 to 1000 tokens fill tiles badly"
)


def _memory_source(gib: float) -> str:
    return f"{gib} GiB: total that PyTorch states in its out-of-memory messages"


_HOPPER_SOURCES = {
    "product_share": "H100 SXM reaches 794.5 of 989 TFLOP/s (0.80) at its best shape, H200 the same: "
    f"{_MATMUL_FLOPS}; {_NARROW}; "
    f"{_CALIBRATED.format(row='training of ViT-g/14 on 8 H100 (NeMo)')}",
    "attention_share": f"{_OWN_ATTENTION}; on Hopper they gain from clock and multiprocessors alone, so the share of "
    "its peak is less than half of Ampere's",
    "memory_share": _ASSUMED_MEMORY_SHARE,
    "storage_bytes_s": _ASSUMED_STORAGE,
    "link_bytes_s": "NVLink 4: 900 GB/s in both directions together (data sheet)",
    "network_bytes_s": "8 ConnectX-7 ports of 400 Gb/s (DGX data sheet)",
    "gpus_per_node": "DGX and HGX",
    "cores_per_node": "2 Xeon 8480C of 56 cores (DGX data sheet)",
    "host_memory_bytes": "32 modules of 64 GiB (DGX data sheet)",
}

_H100 = Hardware(
    name="h100",
    title="NVIDIA H100 SXM5 80 GB, DGX or HGX of 8",
    memory_bytes=79.1 * GIB,
    peak_flops={"bf16": 989.4e12, "fp16": 989.4e12, "fp32": 66.9e12},
    memory_bytes_s=3.35e12,
    gpus_per_node=8,
    link_bytes_s=450e9,
    network_bytes_s=400e9,
    host_memory_bytes=2 * TIB,
    cores_per_node=112,
    storage_bytes_s=4e9,
    product_share=(0.44, 0.57, 0.70),
    attention_share=(0.08, 0.12, 0.20),
    memory_share=0.85,
    device_name=r"GH200|H100",
    sources={
        **_HOPPER_SOURCES,
        "memory_bytes": _memory_source(79.1),
        "peak_flops": "data sheet: 989.4 TFLOP/s dense in 16 bits, half of the sparse figure; 66.9 in fp32 without "
        "tensor cores, PyTorch's default",
        "memory_bytes_s": "data sheet: 3.35 TB/s",
    },
)
_A100_80 = Hardware(
    name="a100-80",
    title="NVIDIA A100 SXM4 80 GB, DGX or HGX of 8",
    memory_bytes=79.1 * GIB,
    peak_flops={"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12},
    memory_bytes_s=2.039e12,
    gpus_per_node=8,
    link_bytes_s=300e9,
    network_bytes_s=200e9,
    host_memory_bytes=2 * TIB,
    cores_per_node=128,
    storage_bytes_s=4e9,
    product_share=(0.60, 0.70, 0.80),
    attention_share=(0.18, 0.27, 0.38),
    memory_share=0.85,
    device_name=r"A100.*80GB",
    sources={
        "memory_bytes": _memory_source(79.1),
        "peak_flops": "data sheet: 312 TFLOP/s dense in 16 bits; 19.5 in fp32 without tensor cores, PyTorch's default",
        "memory_bytes_s": "data sheet: 2,039 GB/s",
        "gpus_per_node": "DGX and HGX",
        "link_bytes_s": "NVLink 3: 600 GB/s in both directions together (data sheet)",
        "network_bytes_s": "8 ConnectX-6 ports of 200 Gb/s (DGX data sheet)",
        "host_memory_bytes": "2 TB (DGX A100 640 GB data sheet)",
        "cores_per_node": "2 EPYC 7742 of 64 cores (DGX data sheet)",
        "storage_bytes_s": _ASSUMED_STORAGE,
        "product_share": f"A100 SXM reaches 271.2 of 312 TFLOP/s (0.87) at its best shape: {_MATMUL_FLOPS}; {_NARROW}; "
        f"{_CALIBRATED.format(row='training of ViT-g/14 on 8 A100 (NeMo)')}",
        "attention_share": _OWN_ATTENTION,
        "memory_share": _ASSUMED_MEMORY_SHARE,
    },
)
_WORKSTATION = {
    "gpus_per_node": "a single card, as the published rows were measured",
    "link_bytes_s": "PCIe of the card's generation, 16 lanes, less the line code; no NVLink",
    "network_bytes_s": "assumed: 10 Gb/s Ethernet",
    "host_memory_bytes": "assumed: 64 GiB",
    "cores_per_node": "assumed",
    "storage_bytes_s": "assumed: a local disk",
    "attention_share": _OWN_ATTENTION,
    "memory_share": "assumed: 0.85, as of the data-centre cards",
}
_WORKSTATION_NODE = dict(
    gpus_per_node=1, network_bytes_s=1.25e9, host_memory_bytes=64 * GIB, cores_per_node=16, storage_bytes_s=2e9
)

_CATALOGUE = (
    _H100,
    replace(
        _H100,
        name="h200",
        title="NVIDIA H200 SXM 141 GB, DGX or HGX of 8",
        memory_bytes=139.8 * GIB,
        memory_bytes_s=4.8e12,
        device_name=r"(?<!G)H200",
        sources={
            **_H100.sources,
            "memory_bytes": _memory_source(139.8),
            "memory_bytes_s": "data sheet: 4.8 TB/s",
            "peak_flops": f"{_H100.sources['peak_flops']}; the H200 computes with the same chip",
        },
    ),
    replace(
        _A100_80,
        name="a100-40",
        title="NVIDIA A100 SXM4 40 GB, DGX of 8",
        memory_bytes=39.4 * GIB,
        memory_bytes_s=1.555e12,
        host_memory_bytes=1 * TIB,
        device_name=r"A100.*40GB",
        sources={
            **_A100_80.sources,
            "memory_bytes": _memory_source(39.4),
            "memory_bytes_s": "data sheet: 1,555 GB/s",
            "host_memory_bytes": "1 TB (DGX A100 320 GB data sheet)",
        },
    ),
    _A100_80,
    replace(
        _H100,
        name="b200",
        title="NVIDIA B200 180 GB, DGX or HGX of 8",
        memory_bytes=178.3 * GIB,
        peak_flops={"bf16": 2250e12, "fp16": 2250e12, "fp32": 75e12},
        memory_bytes_s=8e12,
        link_bytes_s=900e9,
        product_share=(0.40, 0.52, 0.64),
        attention_share=(0.04, 0.07, 0.12),
        device_name=r"(?<!G)B200",
        sources={
            **_HOPPER_SOURCES,
            "memory_bytes": _memory_source(178.3),
            "peak_flops": "data sheet: 2,250 TFLOP/s dense in 16 bits, half of the sparse figure; 75 in fp32 without "
            "tensor cores, PyTorch's default",
            "memory_bytes_s": "data sheet: 8 TB/s",
            "link_bytes_s": "NVLink 5: 1.8 TB/s in both directions together (data sheet)",
            "cores_per_node": "2 Xeon 8570 of 56 cores (DGX data sheet)",
            "host_memory_bytes": "2 TB, can be 4 (DGX data sheet)",
            "product_share": f"B200 reaches 1,745 of 2,250 TFLOP/s (0.78) at its best shape: {_MATMUL_FLOPS}; "
            f"{_NARROW}; slow and typical assumed in the H100's proportions",
            "attention_share": f"{_OWN_ATTENTION}; on Blackwell they do not use its tensor cores' own "
            "instructions either",
        },
    ),
    Hardware(
        name="l40s",
        title="NVIDIA L40S 48 GB, PCIe servers of 8",
        memory_bytes=44.4 * GIB,
        peak_flops={"bf16": 362e12, "fp16": 362e12, "fp32": 91.6e12},
        memory_bytes_s=0.864e12,
        gpus_per_node=8,
        link_bytes_s=31.5e9,
        network_bytes_s=50e9,
        host_memory_bytes=1 * TIB,
        cores_per_node=64,
        storage_bytes_s=4e9,
        product_share=(0.39, 0.50, 0.62),
        attention_share=(0.12, 0.18, 0.28),
        memory_share=0.85,
        device_name=r"L40S",
        sources={
            "memory_bytes": _memory_source(44.4),
            "peak_flops": "data sheet: 362 TFLOP/s dense in 16 bits; 91.6 in fp32",
            "memory_bytes_s": "data sheet: 864 GB/s",
            "gpus_per_node": "assumed: servers of 4 to 10 cards are sold",
            "link_bytes_s": "PCIe 4, 16 lanes, one direction (data sheet: 64 GB/s in both)",
            "network_bytes_s": "assumed: one port of 400 Gb/s",
            "host_memory_bytes": "assumed: 1 TiB",
            "cores_per_node": "assumed: two processors of 32 cores",
            "storage_bytes_s": _ASSUMED_STORAGE,
            "product_share": "252 of 362 TFLOP/s (0.70) at the best shape, the card draws at most 350 W "
            f"(github.com/mag-/gpu_benchmark); {_NARROW}; slow and typical assumed in the H100's "
            "proportions",
            "attention_share": _OWN_ATTENTION,
            "memory_share": "assumed: 0.85, as of cards with HBM",
        },
    ),
    Hardware(
        name="v100",
        title="NVIDIA V100 SXM2 32 GB, nodes of 8",
        memory_bytes=31.7 * GIB,
        peak_flops={"bf16": 15.7e12, "fp16": 125e12, "fp32": 15.7e12},
        memory_bytes_s=0.9e12,
        gpus_per_node=8,
        link_bytes_s=150e9,
        network_bytes_s=50e9,
        host_memory_bytes=512 * GIB,
        cores_per_node=40,
        storage_bytes_s=2e9,
        product_share=(0.32, 0.47, 0.62),
        attention_share=(0.10, 0.18, 0.28),
        memory_share=0.82,
        device_name=r"V100",
        sources={
            "memory_bytes": _memory_source(31.7),
            "peak_flops": "data sheet: 125 TFLOP/s in fp16; 15.7 in fp32; bf16 has no tensor cores there and runs at "
            "the pace of fp32 at best",
            "memory_bytes_s": "data sheet: 900 GB/s",
            "gpus_per_node": "DGX-1",
            "link_bytes_s": "NVLink 2: 300 GB/s in both directions together (data sheet)",
            "network_bytes_s": "4 ports of 100 Gb/s (DGX-1 data sheet)",
            "host_memory_bytes": "512 GB (DGX-1 data sheet)",
            "cores_per_node": "2 Xeon E5-2698 v4 of 20 cores (DGX-1 data sheet)",
            "storage_bytes_s": "assumed: a shared file system of its years",
            "product_share": f"large products reach about 0.75 of the peak (assumed); {_NARROW}; "
            f"{_CALIBRATED.format(row='53 hours of DeiT-B on 8 cards')}",
            "attention_share": _OWN_ATTENTION,
            "memory_share": "assumed: a little below the A100's",
        },
    ),
    Hardware(
        name="rtx3090",
        title="NVIDIA GeForce RTX 3090 24 GB, one card",
        memory_bytes=23.7 * GIB,
        peak_flops={"bf16": 71e12, "fp16": 71e12, "fp32": 35.6e12},
        memory_bytes_s=0.936e12,
        link_bytes_s=31.5e9,
        **_WORKSTATION_NODE,
        product_share=(0.78, 0.92, 0.98),
        attention_share=(0.30, 0.45, 0.60),
        device_name=r"RTX 3090",
        sources={
            **_WORKSTATION,
            "memory_bytes": _memory_source(23.7),
            "peak_flops": "GA102 white paper: 71 TFLOP/s dense in 16 bits with sums in fp32; 35.6 in fp32",
            "memory_bytes_s": "data sheet: 936 GB/s",
            "product_share": "calibrated once (benchmarks/plan_world.py): typical brings timm's rows of ViT-B/16 and "
            "ViT-L/16 within 5%, which would need 1.01 and 0.97; GeForce sums in fp32 at half pace, so "
            "products come close to that lower peak; the range is assumed",
        },
    ),
    Hardware(
        name="rtx5090",
        title="NVIDIA GeForce RTX 5090 32 GB, one card",
        memory_bytes=31.4 * GIB,
        peak_flops={"bf16": 209.5e12, "fp16": 209.5e12, "fp32": 104.8e12},
        memory_bytes_s=1.792e12,
        link_bytes_s=63e9,
        **_WORKSTATION_NODE,
        product_share=(0.70, 0.82, 0.92),
        attention_share=(0.25, 0.38, 0.55),
        device_name=r"RTX 5090",
        sources={
            **_WORKSTATION,
            "memory_bytes": _memory_source(31.4),
            "peak_flops": "Blackwell RTX white paper: 209.5 TFLOP/s dense in 16 bits with sums in fp32; 104.8 in fp32",
            "memory_bytes_s": "data sheet: 1,792 GB/s",
            "product_share": f"assumed, a little below the RTX 3090's; {_NARROW}",
        },
    ),
    Hardware(
        name="rtx-pro-6000",
        title="NVIDIA RTX PRO 6000 Blackwell Max-Q 96 GB, one card of 300 W",
        memory_bytes=94.9 * GIB,
        peak_flops={"bf16": 438.9e12, "fp16": 438.9e12, "fp32": 109.7e12},
        memory_bytes_s=1.792e12,
        link_bytes_s=63e9,
        **_WORKSTATION_NODE,
        product_share=(0.40, 0.52, 0.65),
        attention_share=(0.12, 0.20, 0.32),
        device_name=r"RTX PRO 6000",
        sources={
            **_WORKSTATION,
            "memory_bytes": _memory_source(94.9),
            "peak_flops": "data sheet of the Max-Q edition: 3,511 TOPS sparse in fp4, an eighth of that dense in 16 "
            "bits; 109.7 in fp32",
            "memory_bytes_s": "data sheet: 1,792 GB/s",
            "product_share": f"assumed: at 300 W the clock of large products falls to about two thirds; {_NARROW}",
        },
    ),
)
HARDWARE: dict[str, Hardware] = {hardware.name: hardware for hardware in _CATALOGUE}
ALIASES = {
    "h100-sxm": "h100",
    "h100-sxm5": "h100",
    "h100-80": "h100",
    "h200-sxm": "h200",
    "a100": "a100-80",
    "a100-sxm": "a100-80",
    "a100-80gb": "a100-80",
    "a100-40gb": "a100-40",
    "v100-32": "v100",
    "3090": "rtx3090",
    "5090": "rtx5090",
}
# Cards by their driver's name that compute at another pace than the catalogue's of that chip. FLOP/s, dense, 16 bits;
# data sheets.
_OTHER_PEAKS = ((r"H100 PCIe", 756e12), (r"H[12]00 NVL", 835e12), (r"V100-PCIE", 112e12))
# a slice of one, or another chip under its name: the peak is not known
_PART_OF_A_CARD = r"MIG|Laptop"


def find_hardware(text: str | Path) -> Hardware:
    """A machine of the catalogue by name, or one's own from a YAML file.

    The file sets fields of `Hardware` by their names; `base: h100` starts from the catalogue's values, without it every
    field that has no default is needed. peak_flops is a mapping of precisions, rates are in B/s and FLOP/s, the shares'
    three values a list.

    Raises: UserError for an unknown name, with the nearest one; for a file that is none, is not YAML, or has a key or a
        value that is no field's.
    """
    text = str(text)
    path = Path(text).expanduser()
    if path.suffix.lower() in (".yaml", ".yml") or path.is_file():
        return _read(path)
    name = text.strip().lower().replace("_", "-").replace(" ", "-")
    name = ALIASES.get(name, name)
    if name in HARDWARE:
        return HARDWARE[name]
    known = [*HARDWARE, *ALIASES]
    raise UserError(
        f"hardware {short(text)}: not in the catalogue; known: {', '.join(HARDWARE)}, or give the "
        f"path of a YAML file of your own{nearest(name, known)}"
    )


def hardware_of_device(name: str) -> Hardware | None:
    """The catalogue's machine by the name that the driver gives the GPU (`torch.cuda.get_device_name()`), with that
    card's own peak where it differs; None for one that is not known.
    """
    if re.search(_PART_OF_A_CARD, name):
        return None
    found = next((hardware for hardware in _CATALOGUE if re.search(hardware.device_name, name)), None)
    slower = next((peak for pattern, peak in _OTHER_PEAKS if re.search(pattern, name)), None)
    if found is None or slower is None:
        return found
    return replace(found, title=name, peak_flops={**found.peak_flops, "bf16": slower, "fp16": slower})


def hardware_table() -> str:
    """The catalogue as aligned plain text: each machine's values, and under it where they come from.

    Without a final newline.
    """
    parts = []
    for hardware in _CATALOGUE:
        lines = [f"{hardware.name}: {hardware.title}"]
        for item in _NUMBERS:
            lines.append(f"  {item:<18} {_shown(getattr(hardware, item), item):<38} {hardware.sources[item]}")
        parts.append("\n".join(lines))
    aliases = ", ".join(f"{alias} = {name}" for alias, name in ALIASES.items())
    return "\n\n".join([*parts, f"other names: {aliases}"])


# --------------------------------------------------------------------------------- a file of one's own

_TEXTS = ("name", "title", "device_name")
_WHOLE = ("gpus_per_node", "cores_per_node")
_RANGES = ("product_share", "attention_share")
_SHARES = (*_RANGES, "memory_share")
_NUMBERS = tuple(item.name for item in fields(Hardware) if item.name not in (*_TEXTS, "sources"))
_OPTIONAL = (*_TEXTS, *_SHARES)


def _read(path: Path) -> Hardware:
    if not path.is_file():
        raise UserError(f"hardware {path}: no such file; give a YAML file, or one of {', '.join(HARDWARE)}")
    try:
        raw = read_yaml(path)
    except NOT_YAML as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds {type(raw).__name__}, a machine is fields with values, as `base: h100`")
    known = ["base", *_TEXTS, *_NUMBERS]
    for key in raw:
        if key not in known:
            raise UserError(f"{path}: unknown field {short(key)}; fields: {', '.join(known)}{nearest(str(key), known)}")
    base = raw.pop("base", None)
    if base is not None and (not isinstance(base, str) or Path(base).suffix):
        raise UserError(f"{path}: base {short(base)}: name a machine of the catalogue: {', '.join(HARDWARE)}")
    start = find_hardware(base) if base else None
    values = {key: _value(path, key, value, start) for key, value in raw.items()}
    missing = [key for key in _NUMBERS if key not in values and key not in _OPTIONAL] if start is None else []
    if missing:
        raise UserError(
            f"{path}: {missing[0]} is not set; give {', '.join(missing)}, or start from a machine of the "
            f"catalogue with base: {next(iter(HARDWARE))}"
        )
    values = {"name": path.stem, "title": f"{path.stem}, from {path.name}"} | values
    from_file = {key: f"{path}" for key in values if key in _NUMBERS}
    if start is not None:
        return replace(start, **values, sources=start.sources | from_file)
    assumed = dict.fromkeys(_SHARES, "assumed: the default of a machine that says nothing of it")
    return Hardware(**values, sources=assumed | from_file)


def _value(path: Path, key: str, value, start: Hardware | None):
    """The value of a file's field, of the field's type. Raises: UserError."""
    if key in _TEXTS:
        if not isinstance(value, str) or not value:
            raise UserError(f"{path}: {key} {short(value)}: give a text")
        return value
    if key == "peak_flops":
        if not isinstance(value, dict) or not value:
            raise UserError(
                f"{path}: peak_flops {short(value)}: give FLOP/s by precision, as {{bf16: 989e12, fp32: 67e12}}"
            )
        for precision in value:
            if precision not in PRECISIONS:
                raise UserError(
                    f"{path}: peak_flops.{short(precision)}: not a precision; known: "
                    f"{', '.join(PRECISIONS)}{nearest(str(precision), list(PRECISIONS))}"
                )
        rates = {precision: _positive(path, f"peak_flops.{precision}", rate) for precision, rate in value.items()}
        rates = ({} if start is None else start.peak_flops) | rates
        missing = [precision for precision in PRECISIONS if precision not in rates]
        if missing:
            raise UserError(f"{path}: peak_flops.{missing[0]} is not set; give FLOP/s of {', '.join(PRECISIONS)}")
        return rates
    if key in _RANGES:
        if not isinstance(value, list) or len(value) != 3:
            raise UserError(
                f"{path}: {key} {short(value)}: give three shares, slow, typical and fast, as [0.5, 0.6, 0.7]"
            )
        shares = tuple(_share(path, key, item) for item in value)
        if list(shares) != sorted(shares):
            raise UserError(f"{path}: {key} {short(value)}: slow, typical, fast, so none below the one before it")
        return shares
    if key == "memory_share":
        return _share(path, key, value)
    number = _positive(path, key, value)
    if key in _WHOLE:
        if number != int(number):
            raise UserError(f"{path}: {key} {short(value)}: give a whole number")
        return int(number)
    return number


def _positive(path: Path, key: str, value) -> float:
    # YAML reads 4e9 as a text, for want of a dot
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    unit, least = _UNITS.get(key.partition(".")[0], ("", 0.0))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise UserError(f"{path}: {key} {short(value)}: give a number above 0{unit and f', in {unit}'}")
    if value < least:
        raise UserError(f"{path}: {key} {value:g} is too little to be {unit}; an H100 node has {_reference(key)}")
    return float(value)


# Field -> its unit, and less than any machine has: 100 for a network was meant in Gb/s, 80 for a memory in GB.
_UNITS = {
    "memory_bytes": ("bytes", 1e9),
    "peak_flops": ("FLOP/s", 1e10),
    "memory_bytes_s": ("bytes a second", 1e9),
    "link_bytes_s": ("bytes a second", 1e8),
    "network_bytes_s": ("bytes a second", 1e7),
    "host_memory_bytes": ("bytes", 1e9),
    "storage_bytes_s": ("bytes a second", 1e6),
}


def _reference(key: str) -> str:
    """What the catalogue has there, written as the file wants it."""
    name, _, precision = key.partition(".")
    value = getattr(HARDWARE["h100"], name)
    return f"{value.get(precision, value['bf16']) if isinstance(value, dict) else value:.3g}"


def _share(path: Path, key: str, value) -> float:
    share = _positive(path, key, value)
    if share > 1:
        raise UserError(f"{path}: {key} {short(value)}: a share, at most 1")
    return share


def _shown(value, name: str) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {rate / 1e12:g}" for key, rate in value.items()) + " TFLOP/s"
    if isinstance(value, tuple):
        return " ".join(f"{item:.2f}" for item in value)
    if name in ("memory_bytes", "host_memory_bytes"):
        return f"{value / GIB:g} GiB"
    return f"{value / 1e9:g} GB/s" if name.endswith("_bytes_s") else f"{value:g}"
