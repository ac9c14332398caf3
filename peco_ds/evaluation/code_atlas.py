"""Code atlas of a tokenizer: its commonest, rarest and purest codes, with examples, and how much a code tells of the
class of its image.

All counts and shares are of patches, and the same for any number of ranks and any batch. Patches of one image resemble
one another, so that where the size of a sample matters, images are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from peco_ds.models.vq import usage

# Codes of a section.
SHOWN = 8
# Examples of a code, each from another image; rarest and purest codes are looked for among those that have so many.
EXAMPLES = 5
# Classes named beside a code.
CLASSES = 3
# Of the normal distribution, for a two-sided interval of 95 %.
Z_95 = 1.959964
# Images of no class in particular that are added to those of a code, where classes are predicted from it.
PRIOR_IMAGES = tuple(4.0**power for power in range(7))


class Example(NamedTuple):
    """A patch that carries a code."""

    sample: int
    # Of the patch, counted from 0.
    row: int
    column: int


class AtlasCode(NamedTuple):
    code: int
    patches: int
    # Of all patches.
    share: float
    # That carry it.
    images: int
    # The commonest first, each with its share of the code's patches.
    classes: tuple[tuple[str, float], ...]
    # Lower end of the 95 % interval of the first class's share (`wilson_bound`); None without labels.
    purity_bound: float | None
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class CodeAtlas:
    """What is known of a tokenizer's codes on an image set."""

    # "commonest", "rarest" and, of a labelled set, "purest" -> codes.
    sections: dict[str, list[AtlasCode]]
    # As `AtlasSums.result` says.
    summary: dict[str, float]
    labelled: bool

    def examples(self) -> list[Example]:
        return [example for codes in self.sections.values() for code in codes for example in code.examples]

    def facts(self, key_of: Callable[[int], str]) -> dict:
        """What is recorded: {"summary", section: its codes}.

        Args:
            key_of: sample -> name of the image.
        """

        def recorded(code: AtlasCode) -> dict:
            classes = [{"class": name, "share": share} for name, share in code.classes]
            of_class = {"purity_bound": code.purity_bound, "classes": classes} if self.labelled else {}
            examples = [
                {"image": key_of(sample), "row": row, "column": column} for sample, row, column in code.examples
            ]
            facts = {"code": code.code, "patches": code.patches, "share": code.share, "images": code.images}
            return {**facts, **of_class, "examples": examples}

        return {
            "summary": self.summary,
            **{name: [recorded(code) for code in codes] for name, codes in self.sections.items()},
        }


class AtlasSums:
    """Codes counted by class, and the places of a few patches of each, over a rank's images.

    Memory: 8 V C bytes for the counts (64 MiB for 8192 codes and 1000 classes), however many images there are.

    Args:
        grid: patches a side.
        classes: names in label order; empty for a set without labels.
    """

    def __init__(self, num_codes: int, grid: int, classes: tuple[str, ...], device: torch.device) -> None:
        self._grid, self._classes, self._device = grid, classes, device
        # Patches of each half of the images. A set without labels is one class.
        self._patches = torch.zeros(2, num_codes, max(len(classes), 1), dtype=torch.int32, device=device)
        self._images = torch.zeros(2, num_codes, dtype=torch.int32, device=device)
        self._places = _FirstPlaces(num_codes, grid**2)

    @torch.no_grad()
    def add(self, codes: torch.Tensor, labels: torch.Tensor, samples: torch.Tensor) -> None:
        """
        Args:
            codes: int64 [b, N] on the device.
            labels: int64 [b]; not read for a set without labels.
            samples: int64 [b] on the CPU, global sample numbers; -1: the row only fills up the batch.
        """
        real = samples >= 0
        samples, labels, codes = samples[real], labels[real.to(labels.device)], codes[real.to(codes.device)]
        if not len(samples):
            return
        halves = torch.from_numpy((_mixed(samples.numpy()) & np.uint64(1)).astype(np.int64))
        labels = labels if self._classes else torch.zeros_like(samples)
        of_half = codes + len(self._patches[0]) * halves.to(self._device)[:, None]
        _count(self._patches, of_half * self._patches.shape[2] + labels.to(self._device)[:, None])
        ordered = of_half.sort(dim=1).values
        is_first = torch.ones_like(ordered, dtype=torch.bool)
        is_first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        _count(self._images, ordered[is_first])
        places = samples.numpy()[:, None] * self._grid**2 + np.arange(self._grid**2)
        self._places.add(codes.cpu().numpy().ravel(), places.ravel())

    def result(self, world) -> CodeAtlas:
        """The atlas; the same on every rank. Called once.

        Its summary has codes_used and perplexity (as `vq.usage`), codes_in_few_images (used, but in fewer than EXAMPLES
        images) and, of a labelled set, what `class_numbers` gives. Collective.
        """
        halves = world.all_reduce(self._patches).cpu().numpy()
        images = world.all_reduce(self._images).cpu().numpy()
        joint, carriers = halves.sum(axis=0, dtype=np.int64), images.sum(axis=0, dtype=np.int64)
        patches = joint.sum(axis=1)
        in_enough = carriers >= EXAMPLES
        summary: dict[str, float] = {
            **usage(torch.from_numpy(patches)),
            "codes_in_few_images": int(((carriers > 0) & ~in_enough).sum()),
        }
        sections = {
            "commonest": _first_codes(-patches, patches > 0),
            "rarest": _first_codes(patches, in_enough),
        }
        bounds = wilson_bound(joint.max(axis=1) / patches.clip(min=1), carriers.clip(min=1))
        if self._classes:
            summary |= class_numbers(halves, images)
            sections["purest"] = _first_codes(-bounds, in_enough)
        shown = sorted({int(code) for codes in sections.values() for code in codes})
        places = self._places.of_all_ranks(shown, world)

        def entry(code: int) -> AtlasCode:
            # A stable sort: of equal classes the first in label order.
            order = np.argsort(-joint[code], kind="stable")[:CLASSES] if self._classes else ()
            return AtlasCode(
                code,
                int(patches[code]),
                float(patches[code] / patches.sum()),
                int(carriers[code]),
                tuple((self._classes[c], float(joint[code, c] / patches[code])) for c in order if joint[code, c]),
                float(bounds[code]) if self._classes else None,
                tuple(self._example(place) for place in places[code]),
            )

        return CodeAtlas(
            {name: [entry(int(code)) for code in codes] for name, codes in sections.items()},
            summary,
            labelled=bool(self._classes),
        )

    def _example(self, place: int) -> Example:
        sample, patch = divmod(place, self._grid**2)
        return Example(sample, *divmod(patch, self._grid))


def wilson_bound(share: np.ndarray, trials: np.ndarray) -> np.ndarray:
    """Lower end of the two-sided 95 % score interval of a share seen in a number of independent trials.

    Source: Wilson, Probable inference (JASA 22, 1927).
    """
    middle = share + Z_95**2 / (2 * trials)
    spread = Z_95 * np.sqrt(share * (1 - share) / trials + (Z_95 / (2 * trials)) ** 2)
    # Rounding would make a share of nothing a little less than nothing.
    return np.maximum((middle - spread) / (1 + Z_95**2 / trials), 0.0)


def class_numbers(patches: np.ndarray, images: np.ndarray) -> dict[str, float]:
    """How much one code tells of the class of its image.

    On the images that are counted, more and rarer codes always seem to tell more. So every number is taken a second
    time from one half of the images to the other, and averaged over the two directions: these compare tokenizers with
    codebooks of any size, and are what a code tells of an image that was not seen. A code's classes are then predicted
    from the images that carry it, and some images of no class in particular.

    Args:
        patches: [2, V, C], of each half.  images: [2, V], that carry a code, of each half.
    Returns: class_bits, the entropy of the class; information_bits, the mutual information of code and class, and
        held_out_information_bits, at the best of PRIOR_IMAGES, and at least 0; purity, the share of the commonest class
        of a code, weighted by its use, and held_out_purity, how often the class that one half gives a code is right in
        the other; commonest_class, the share of patches of the commonest class, which is the purity of codes that tell
        nothing.
    """
    joint = patches.sum(axis=0, dtype=np.int64)
    total, of_class = int(joint.sum()), joint.sum(axis=0)
    bits_saved, hits = np.zeros(len(PRIOR_IMAGES)), 0
    for seen, carriers, other in ((patches[0], images[0], patches[1]), (patches[1], images[1], patches[0])):
        of_seen = seen.sum(axis=0, dtype=np.int64)
        prior = (of_seen + 1) / (of_seen.sum() + len(of_seen))
        # Of a code that was not seen, and of equal classes, the commonest one.
        hits += int(np.take_along_axis(other, (seen + prior).argmax(axis=1)[:, None], axis=1).sum())
        # Only pairs that occur in the other half count.
        codes, classes = other.nonzero()
        uses = seen.sum(axis=1, dtype=np.int64).clip(min=1)
        share, weight = seen[codes, classes] / uses[codes], carriers[codes].astype(np.float64)
        for place, added in enumerate(PRIOR_IMAGES):
            gain = (weight * share / prior[classes] + added) / (weight + added)
            bits_saved[place] += other[codes, classes] @ np.log2(gain)
    return {
        "class_bits": _entropy_bits(of_class),
        "information_bits": _entropy_bits(of_class) + _entropy_bits(joint.sum(axis=1)) - _entropy_bits(joint),
        "held_out_information_bits": max(float(bits_saved.max()) / total, 0.0),
        "purity": float(joint.max(axis=1).sum() / total),
        "held_out_purity": hits / total,
        "commonest_class": float(of_class.max() / total),
    }


def atlas_line(atlas: CodeAtlas) -> str:
    """What a code tells of the class, as a few words."""
    if not atlas.labelled:
        return "no labels, so no classes of codes"
    found = atlas.summary
    return (
        f"a code tells {found['held_out_information_bits']:.3f} of {found['class_bits']:.2f} bits of the class, "
        f"purity {100 * found['held_out_purity']:.1f} % (held out)"
    )


class _FirstPlaces:
    """The places of each code with the smallest hashes, one an image: a random choice that does not depend on the order
    in which they are seen.

    A place is sample * N + patch. As many as EXAMPLES are kept for each code.
    """

    def __init__(self, num_codes: int, num_patches: int) -> None:
        self._num_patches = num_patches
        # -1 where there is none (yet).
        self._places = np.full((num_codes, EXAMPLES), -1)
        # A place with a larger hash is none of a code's first ones.
        self._largest = np.full(num_codes, np.iinfo(np.uint64).max, dtype=np.uint64)

    def add(self, codes: np.ndarray, places: np.ndarray) -> None:
        """Args: codes, places: int64 [n]."""
        is_near = _mixed(places) < self._largest[codes]
        codes, places = codes[is_near], places[is_near]
        touched = np.unique(codes)
        known = self._places[touched]
        codes, places, rank = self._first(
            np.concatenate([codes, np.repeat(touched, EXAMPLES)]), np.concatenate([places, known.ravel()])
        )
        self._places[codes, rank] = places
        last = self._places[touched, -1]
        full = touched[last >= 0]
        self._largest[full] = _mixed(last[last >= 0])

    def of_all_ranks(self, codes: list[int], world) -> dict[int, list[int]]:
        """Code -> its places over all ranks, smallest hash first. Collective.

        Args:
            codes: the same on every rank.
        """
        places = np.concatenate([part.ravel() for part in world.gather_objects(self._places[codes])])
        asked = np.tile(np.repeat(np.array(codes, dtype=np.int64), EXAMPLES), world.size)
        found: dict[int, list[int]] = {code: [] for code in codes}
        for code, place, _ in zip(*(part.tolist() for part in self._first(asked, places))):
            found[code].append(place)
        return found

    def _first(self, codes: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of codes and places [n] (-1: none) the first EXAMPLES of each code, by code and hash, and each one's number
        among those of its code.
        """
        codes, places = codes[places >= 0], places[places >= 0]
        hashes, samples = _mixed(places), places // self._num_patches
        # One an image: its smallest hash.
        order = np.lexsort((hashes, samples, codes))
        order = order[_begins(codes[order], samples[order])]
        order = order[np.lexsort((hashes[order], codes[order]))]
        begins = np.flatnonzero(_begins(codes[order]))
        rank = np.arange(len(order)) - np.repeat(begins, np.diff(begins, append=len(order)))
        order, rank = order[rank < EXAMPLES], rank[rank < EXAMPLES]
        return codes[order], places[order], rank


def _begins(*columns: np.ndarray) -> np.ndarray:
    """bool [n]: where a new group of equal rows begins, in sorted columns [n]."""
    begins = np.ones(len(columns[0]), dtype=bool)
    begins[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return begins


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """uint64 [n]: a random-looking number for each, and another one for every other.

    Source: the output function of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
    """
    mixed = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _count(table: torch.Tensor, index: torch.Tensor) -> None:
    """Add 1 to entries of a table, in place.

    Args:
        index: into the flattened table, any shape.
    """
    index = index.flatten()
    table.view(-1).scatter_add_(0, index, torch.ones_like(index, dtype=table.dtype))


def _first_codes(by: np.ndarray, among: np.ndarray) -> np.ndarray:
    """The SHOWN codes with the smallest values [V]; of equal ones the smaller code first."""
    codes = np.flatnonzero(among)
    return codes[np.argsort(by[codes], kind="stable")][:SHOWN]


def _entropy_bits(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())
