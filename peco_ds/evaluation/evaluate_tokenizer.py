"""Evaluate a tokenizer: reconstructions, use of the codebook, images per second, what a classifier reads in the
reconstructions, probes of the codes alone, and an atlas of the codes.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from peco_ds.data.central_squares import read_square, square_batches
from peco_ds.data.image_set import ImageSet
from peco_ds.errors import UserError
from peco_ds.evaluation.atlas_picture import atlas_picture
from peco_ds.evaluation.code_atlas import AtlasSums, CodeAtlas, atlas_line
from peco_ds.evaluation.code_probes import probe_codes
from peco_ds.evaluation.forward import ForwardSettings, in_precision, world_images_per_s
from peco_ds.evaluation.perceptual_distance import load_lpips
from peco_ds.evaluation.pixel_classifier import PixelClassifier
from peco_ds.evaluation.reconstruction import CodeSums, RoundTripSums, quality_line, round_trip_of, save_png
from peco_ds.evaluation.reconstruction_accuracy import ReconstructionAccuracy, reading_line
from peco_ds.evaluation.stopping import until_stopped
from peco_ds.models.tokenizers import load_tokenizer
from peco_ds.own_files import ATLAS

# Codes a side at which a release is measured unless told otherwise: 224 px at stride 16, 112 px at stride 8.
GRID = 14


class TokenizerEvaluation:
    """A tokenizer's release, opened and checked before any rank joins another; `measure` then runs on all ranks.

    Args:
        image_px: side of the images; None: that of the tokenizer's training run (`own_px`), where it is known, else
            what gives 14 x 14 codes.
        lpips: file or folder with AlexNet or VGG16, to measure LPIPS too.
    Raises: UserError for a damaged release, a size that the tokenizer does not take, or LPIPS of one without images.
    """

    def __init__(self, release: Path, *, image_px: int | None, own_px: int | None, lpips: Path | None) -> None:
        self._tokenizer, self.card = load_tokenizer(release)
        only_px, stride_px = self.card.settings.only_px, self.card.stride_px
        self._image_px = image_px or only_px or own_px or GRID * stride_px
        if only_px not in (None, self._image_px):
            raise UserError(
                f"--image_px {image_px}: the tokenizer takes images of {only_px} px only; leave --image_px out"
            )
        if self._image_px % stride_px:
            raise UserError(f"--image_px {self._image_px}: not a multiple of the tokenizer's stride {stride_px}")
        self._release = release
        self._atlas: CodeAtlas | None = None
        if lpips:
            self.check_makes_images("--lpips", lpips)
        self._distance = load_lpips(lpips) if lpips else None

    def check_makes_images(self, option: str, value: object) -> None:
        """Raises: UserError if an option asks for reconstructions and the tokenizer makes none."""
        if not self._tokenizer.makes_images:
            raise UserError(
                f"{option} {value}: the tokenizer {self._release} makes no images, so there is nothing to "
                f"compare; leave {option} out"
            )

    def measure(
        self,
        images: ImageSet,
        how: ForwardSettings,
        world,
        *,
        train: ImageSet | None = None,
        classifier: PixelClassifier | None = None,
        classifier_images: int | None = None,
        atlas: Path | None = None,
    ) -> tuple[dict, str]:
        """Collective.

        Args:
            images: to measure on.
            train: labelled as `images` are; None: the codes are not probed.
            classifier: of the classes of `images`; reads the reconstructions. None: nobody does.
            classifier_images: of how many images, spread over the set; None: of all.
            atlas: picture that `draw_atlas` makes afterwards; None: none, and nothing of it in the result.
            world: the ranks (`runtime.distributed.World`).
        Returns: settings, quality, throughput, what the classifier reads, the atlas and code probes as they are
            recorded, and one line about them.
        Raises: Stopped if the ranks were asked to stop; UserError for an unreadable image.
        """
        tokenizer, distance, num_codes = self._tokenizer.to(world.device), self._distance, self.card.num_codes
        if distance is not None:
            distance.to(world.device)
        round_trip = in_precision(round_trip_of(tokenizer), how.precision, world.device)
        tokenize = in_precision(tokenizer.tokenize, how.precision, world.device)
        tokenize_images_per_s = world_images_per_s(tokenize, how.batch, self._image_px, world)
        if tokenizer.makes_images:
            sums: CodeSums = RoundTripSums(num_codes, world.device, distance)
        else:
            sums = CodeSums(num_codes, world.device)
        reading = None
        if classifier is not None:
            num_classes = len(images.manifest.classes or ())
            reading = ReconstructionAccuracy(classifier.to(world.device), how, num_classes, world.device)
            read = samples_spread(images.num_samples, classifier_images or images.num_samples)
        counted = None
        if atlas is not None:
            classes = tuple(images.manifest.classes or ())
            counted = AtlasSums(num_codes, self._grid, classes, world.device)
        codes = []
        begun = time.perf_counter()
        for batch in self._squares(images, how, world):
            output = round_trip(batch.images_01 * 2 - 1)
            sums.add(batch.images_01, output, (batch.samples >= 0).to(world.device))
            if reading is not None:
                assert output.reconstruction is not None, "checked by check_makes_images"
                chosen = torch.isin(batch.samples, read)
                if chosen.any():
                    reading.add(batch.images_01[chosen], output.reconstruction[chosen], batch.labels[chosen])
            if counted is not None:
                counted.add(output.codes, batch.labels, batch.samples)
            codes.append((output.codes, batch.labels, batch.samples))
        quality = sums.result(world.all_reduce)
        end_to_end_images_per_s = images.num_samples / (time.perf_counter() - begun)
        result = {
            "settings": {
                "image_px": self._image_px,
                "num_codes": num_codes,
                "lpips_network": distance.network if distance else None,
                **how.facts(world),
            },
            "quality": quality,
            "throughput": {
                "tokenize_images_per_s": tokenize_images_per_s,
                "end_to_end_images_per_s": end_to_end_images_per_s,
            },
        }
        line = f"{quality_line(quality, num_codes)} on {images.num_samples} images at {self._image_px} px"
        if reading is not None:
            result["reconstructions_read_by"] = reading.result()
            line += f"; {reading_line(result['reconstructions_read_by'])}"
        if atlas is not None and counted is not None:
            found_codes = counted.result(world)
            result["atlas"] = found_codes.facts(images.key)
            line += f"; {atlas_line(found_codes)}, {atlas}"
            self._atlas = found_codes
        if train is not None:
            assert train.manifest.classes is not None, "the images to train on are labelled"
            train_codes = (
                (tokenize(batch.images_01 * 2 - 1), batch.labels, batch.samples)
                for batch in self._squares(train, how, world)
            )
            result["code_probes"] = probe_codes(
                tokenizer.code_vectors,
                _gathered(train_codes, world),
                _gathered(codes, world),
                len(train.manifest.classes),
                world,
            )
            result["train_images"] = train.facts()
            line += "".join(
                f"; {name}: linear {found['best_linear']:.2f}, k-NN {found['best_knn']:.2f}"
                for name, found in result["code_probes"]["images_as"].items()
            )
        return result, line

    @property
    def _grid(self) -> int:
        return self._image_px // self.card.stride_px

    def draw_atlas(self, path: Path, images: ImageSet) -> None:
        """Draw what `measure` found of the codes, once its figures are safe. Not collective.

        Raises: OSError that names the file; UserError for a file there that evaluate.py has not written.
        """
        assert self._atlas is not None, "measured with an atlas"
        picture = atlas_picture(
            self._atlas,
            lambda sample: read_square(images, sample, self._image_px),
            title=f"Code atlas of tokenizer {self.card.fingerprint[:12]}",
            images=f"{'/'.join(images.folder.parts[-2:])}: {images.num_samples:,} images",
            num_codes=self.card.num_codes,
            grid=self._grid,
        )
        save_png(path, picture, ATLAS)

    def _squares(self, images: ImageSet, how: ForwardSettings, world):
        batches = square_batches(images, self._image_px, world, batch=how.batch, num_workers=how.num_workers)
        return until_stopped(batches, world.stop_requested)


def samples_spread(num_samples: int, count: int) -> torch.Tensor:
    """int64 [min(count, num_samples)], ascending: the numbers of as many samples at even distances, so that a set which
    lies class by class gives some of every class.
    """
    count = min(count, num_samples)
    return torch.arange(count) * num_samples // count


def _gathered(batches, world):
    """Codes int32 [n, N] and labels int64 [n] of the whole set in the order of its samples, on every rank's CPU.

    Collective.
    """
    codes, labels, samples = (
        torch.cat(parts) for parts in zip(*((codes.int().cpu(), labels, samples) for codes, labels, samples in batches))
    )
    codes, labels, samples = (world.gather(part.to(world.device)).cpu() for part in (codes, labels, samples))
    order = samples.argsort()[int((samples < 0).sum()) :]
    return codes[order], labels[order]
