"""Peak rates, memory, links and nodes of the machines a plan is made for, each with its source.

The machines themselves stand in hardware.yaml; a file of one's own is read in the same way.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from peco_ds.errors import UserError, nearest
from peco_ds.schema import short
from peco_ds.strict_yaml import NOT_YAML, read_yaml
from peco_ds.user_paths import expand_path

PRECISIONS = ("bf16", "fp16", "fp32")
GIB = 2**30
CATALOGUE = Path(__file__).with_name("hardware.yaml")


@dataclass(frozen=True)
class Hardware:
    """One kind of GPU in one kind of node."""

    # Name that --hardware takes.
    name: str
    title: str
    # Memory of a GPU as torch reports it, without what the driver keeps for itself.
    memory_bytes: float
    # Dense, by precision: bf16, fp16, fp32.
    peak_flops: dict[str, float]
    # Device memory of a GPU, read and written.
    memory_bytes_s: float
    gpus_per_node: int
    # NVLink or PCIe of a GPU, inside a node.
    link_bytes_s: float
    # A whole node's links to other nodes.
    network_bytes_s: float
    # A node's.
    host_memory_bytes: float
    # Physical cores.
    cores_per_node: int
    # The shared file system, as one node sees it.
    storage_bytes_s: float
    # Share of the peak that the matrix products of a training step reach: slow, typical, fast.
    product_share: tuple[float, float, float] = (0.5, 0.6, 0.7)
    # Share of the 16-bit peak that the attention kernel reaches, forward and backward.
    attention_share: tuple[float, float, float] = (0.1, 0.15, 0.25)
    # Share of memory_bytes_s that kernels reach which only read and write.
    memory_share: float = 0.85
    # Pattern of the name that the driver gives the GPU; "": none.
    device_name: str = ""
    # Field -> where its value comes from.
    sources: dict[str, str] = field(default_factory=dict)


_TEXTS = ("name", "title", "device_name")
_WHOLE = ("gpus_per_node", "cores_per_node")
_RANGES = ("product_share", "attention_share")
_NUMBERS = tuple(item.name for item in fields(Hardware) if item.name not in (*_TEXTS, "sources"))
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
# Binary units that a number of bytes may be written with.
_BINARY = {"GiB": 2**30, "TiB": 2**40}
# Names of a slice of a card, or of another chip under the card's name, whose peak is not known.
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
    path = expand_path(text)
    if path.suffix.lower() in (".yaml", ".yml") or path.is_file():
        return _read(path)
    name = text.strip().lower().replace("_", "-").replace(" ", "-")
    name = ALIASES.get(name, name)
    if name in HARDWARE:
        return HARDWARE[name]
    raise UserError(
        f"hardware {short(text)}: not in the catalogue; known: {', '.join(HARDWARE)}, or give the path of a YAML file "
        f"of your own{nearest(name, [*HARDWARE, *ALIASES])}"
    )


def hardware_of_device(name: str) -> Hardware | None:
    """The catalogue's machine by the name that the driver gives the GPU (`torch.cuda.get_device_name()`), with that
    card's own peak where it differs; None for one that is not known.
    """
    if re.search(_PART_OF_A_CARD, name):
        return None
    found = next((machine for machine in HARDWARE.values() if re.search(machine.device_name, name)), None)
    slower = next((peak for pattern, peak in _OTHER_CARDS.items() if re.search(pattern, name)), None)
    if found is None or slower is None:
        return found
    return replace(found, title=name, peak_flops={**found.peak_flops, "bf16": slower, "fp16": slower})


def hardware_table() -> str:
    """The catalogue as aligned plain text: each machine's values, and under it where they come from.

    Without a final newline.
    """
    parts = []
    for machine in HARDWARE.values():
        lines = [f"{machine.name}: {machine.title}"]
        for item in _NUMBERS:
            lines.append(f"  {item:<18} {_shown(getattr(machine, item), item):<38} {machine.sources[item]}")
        parts.append("\n".join(lines))
    aliases = ", ".join(f"{alias} = {name}" for alias, name in ALIASES.items())
    return "\n\n".join([*parts, f"other names: {aliases}"])


def _shown(value, name: str) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {rate / 1e12:g}" for key, rate in value.items()) + " TFLOP/s"
    if isinstance(value, tuple):
        return " ".join(f"{item:.2f}" for item in value)
    if name in ("memory_bytes", "host_memory_bytes"):
        return f"{value / GIB:g} GiB"
    return f"{value / 1e9:g} GB/s" if name.endswith("_bytes_s") else f"{value:g}"


# ----------------------------------------------------------------------------------- the machines' files


def _read(path: Path) -> Hardware:
    """A file of one's own. Raises: UserError."""
    if not path.is_file():
        raise UserError(f"hardware {path}: no such file; give a YAML file, or one of {', '.join(HARDWARE)}")
    try:
        raw = read_yaml(path)
    except NOT_YAML as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds {type(raw).__name__}, a machine is fields with values, as `base: h100`")
    named = {"name": path.stem, "title": f"{path.stem}, from {path.name}"}
    return _machine(str(path), named | raw, source=str(path))


def _machine(where: str, raw: dict, *, source: str = "") -> Hardware:
    """A machine as a file's mapping has it.

    Args:
        where: file, or file and machine, for messages.
        source: where a value comes from that has no source of its own.
    Raises: UserError for an unknown field, a missing one, or a value that is none of its field's.
    """
    known = ["base", *_TEXTS, *_NUMBERS, "sources"]
    for key in raw:
        if key not in known:
            raise UserError(
                f"{where}: unknown field {short(key)}; fields: {', '.join(known)}{nearest(str(key), known)}"
            )
    base = raw.get("base")
    if base is not None and (not isinstance(base, str) or Path(base).suffix):
        raise UserError(f"{where}: base {short(base)}: name a machine of the catalogue: {', '.join(HARDWARE)}")
    start = find_hardware(base) if base else None
    values = {key: _value(where, key, raw[key], start) for key in raw if key not in ("base", "sources")}
    sources = _sources(where, raw.get("sources", {}))
    if source:
        sources = {key: source for key in values if key in _NUMBERS} | sources
    if start is not None:
        return replace(start, **values, sources=start.sources | sources)
    missing = [key for key in _NUMBERS if key not in values and key not in (*_RANGES, "memory_share")]
    if missing:
        raise UserError(
            f"{where}: {missing[0]} is not set; give {', '.join(missing)}, or start from a machine of the catalogue "
            f"with base: {next(iter(HARDWARE))}"
        )
    assumed = dict.fromkeys((*_RANGES, "memory_share"), "assumed: the default of a machine that says nothing of it")
    return Hardware(**values, sources=assumed | sources)


def _sources(where: str, raw) -> dict[str, str]:
    """Sources by field; the parts of one are joined, the catalogue's notes put in."""
    if not isinstance(raw, dict) or not all(key in _NUMBERS for key in raw):
        raise UserError(f"{where}: sources {short(raw)}: give texts by field, as {{memory_bytes: data sheet}}")
    parts = {key: value if isinstance(value, list) else [value] for key, value in raw.items()}
    return {key: "; ".join(_NOTES.get(part, str(part)) for part in found) for key, found in parts.items()}


def _value(where: str, key: str, value, start: Hardware | None):
    """The value of a file's field, of the field's type. Raises: UserError."""
    if key in _TEXTS:
        if not isinstance(value, str) or not value:
            raise UserError(f"{where}: {key} {short(value)}: give a text")
        return value
    if key == "peak_flops":
        return _peaks(where, value, start)
    if key in _RANGES:
        if not isinstance(value, list) or len(value) != 3:
            raise UserError(
                f"{where}: {key} {short(value)}: give three shares, slow, typical and fast, as [0.5, 0.6, 0.7]"
            )
        shares = tuple(_share(where, key, item) for item in value)
        if list(shares) != sorted(shares):
            raise UserError(f"{where}: {key} {short(value)}: slow, typical, fast, so none below the one before it")
        return shares
    if key == "memory_share":
        return _share(where, key, value)
    number = _positive(where, key, value)
    if key in _WHOLE and number != int(number):
        raise UserError(f"{where}: {key} {short(value)}: give a whole number")
    return int(number) if key in _WHOLE else number


def _peaks(where: str, value, start: Hardware | None) -> dict[str, float]:
    if not isinstance(value, dict) or not value:
        raise UserError(
            f"{where}: peak_flops {short(value)}: give FLOP/s by precision, as {{bf16: 989e12, fp32: 67e12}}"
        )
    for precision in value:
        if precision not in PRECISIONS:
            raise UserError(
                f"{where}: peak_flops.{short(precision)}: not a precision; known: {', '.join(PRECISIONS)}"
                f"{nearest(str(precision), list(PRECISIONS))}"
            )
    rates = {precision: _positive(where, f"peak_flops.{precision}", rate) for precision, rate in value.items()}
    rates = ({} if start is None else start.peak_flops) | rates
    missing = [precision for precision in PRECISIONS if precision not in rates]
    if missing:
        raise UserError(f"{where}: peak_flops.{missing[0]} is not set; give FLOP/s of {', '.join(PRECISIONS)}")
    return rates


def _positive(where: str, key: str, value) -> float:
    name, _, precision = key.partition(".")
    unit, least = _UNITS.get(name, ("", 0.0))
    # YAML reads 4e9 as a text, for want of a dot
    if isinstance(value, str):
        number, _, binary = value.partition(" ") if unit == "bytes" else (value, "", "")
        with suppress(ValueError, KeyError):
            value = float(number) * (_BINARY[binary] if binary else 1)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise UserError(f"{where}: {key} {short(value)}: give a number above 0{unit and f', in {unit}'}")
    if value < least:
        usual = getattr(HARDWARE["h100"], name)
        usual = usual.get(precision, usual["bf16"]) if isinstance(usual, dict) else usual
        raise UserError(f"{where}: {key} {value:g} is too little to be {unit}; an H100 node has {usual:.3g}")
    return float(value)


def _share(where: str, key: str, value) -> float:
    share = _positive(where, key, value)
    if share > 1:
        raise UserError(f"{where}: {key} {short(value)}: a share, at most 1")
    return share


_RAW = read_yaml(CATALOGUE)
_NOTES: dict[str, str] = _RAW["notes"]
ALIASES: dict[str, str] = _RAW["other_names"]
_OTHER_CARDS = {name: float(peak) for name, peak in _RAW["other_cards"].items()}
HARDWARE: dict[str, Hardware] = {}
for _name, _fields in _RAW["machines"].items():
    HARDWARE[_name] = _machine(f"{CATALOGUE.name}: {_name}", {"name": _name} | _fields)
