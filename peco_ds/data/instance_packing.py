"""Pack images with their COCO annotations: one text beside each image, the original file beside the shards.

`pack_images.py --help` imports this file, so what needs torch is imported where it is used.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from peco_ds.data.atomic_files import flush_to_disk, temporary_file
from peco_ds.data.coco_annotations import CocoAnnotations, read_coco
from peco_ds.data.image_folders import Image
from peco_ds.data.image_shards import Members, PackJob
from peco_ds.errors import UserError, describe_os_error
from peco_ds.schema import sha256_of_json, write_json

# Extension of the member that holds an image's entry and objects.
INSTANCES = "instances.json"
# Beside the shards: the annotation file as it was given, and its categories.
ANNOTATIONS_NAME, CATEGORIES_NAME = "annotations.json", "categories.json"


@dataclass(frozen=True)
class InstancesJob(PackJob):
    """One shard of images with objects."""

    # Image path -> the text of its record.
    texts: dict[str, str]

    def digest(self) -> str:
        return sha256_of_json([super().digest(), self.texts])

    def members(self, image: Image) -> Members:
        """Raises: UserError if the image has another size than its entry says: its objects would lie elsewhere."""
        from PIL import Image as PilImage

        stored = super().members(image)
        entry = json.loads(self.texts[image.path])["image"]
        with PilImage.open(io.BytesIO(next(iter(stored.files.values())))) as opened:
            size = opened.size
        if size != (entry["width"], entry["height"]):
            raise UserError(
                f"--annotations: image {entry['id']} {entry['file_name']!r} is {entry['width']} x {entry['height']} "
                f"px there, the file {image.path!r} is {size[0]} x {size[1]} px; give the images that "
                "were annotated"
            )
        return stored._replace(files={**stored.files, INSTANCES: self.texts[image.path].encode()})


@dataclass(frozen=True)
class Instances:
    """An annotation file and the images of a folder that it lists."""

    annotations: CocoAnnotations
    images: list[Image]
    # Image path -> image id.
    ids: dict[str, int]
    # (path, reason) of images that the file does not list, or that have no object to train on and were not wanted.
    left_out: list[tuple[str, str]]

    def jobs(self, jobs: list[PackJob]) -> list[PackJob]:
        """The same shards with the records of their images."""
        return [
            InstancesJob(
                **vars(job), texts={image.path: self.annotations.text_of(self.ids[image.path]) for image in job.images}
            )
            for job in jobs
        ]

    def options(self) -> dict[str, str]:
        """What distinguishes sets of one folder."""
        return {"annotations": str(self.annotations.path), "annotations_sha256": self.annotations.sha256}

    def write_beside(self, out: Path) -> None:
        """Leave the annotation file and its categories beside the shards.

        Raises: UserError if they cannot be written.
        """
        target = out / ANNOTATIONS_NAME
        try:
            with temporary_file(target) as file, open(self.annotations.path, "rb") as source:
                shutil.copyfileobj(source, file)
                flush_to_disk(file)
                os.replace(file.name, target)
            facts = {"categories": self.annotations.categories, "annotations_sha256": self.annotations.sha256}
            write_json(out / CATEGORIES_NAME, facts)
        except OSError as error:
            raise UserError(f"{describe_os_error(error, target)}; make room and start again to continue") from None

    def told(self) -> str:
        """Part of the closing line."""
        objects = sum(len(self.annotations.objects[self.ids[image.path]]) for image in self.images)
        return f"{objects} objects of {len(self.annotations.categories)} categories"


def find_instances(images: list[Image], folder: Path, path: Path, *, only_with_objects: bool) -> Instances:
    """Match the images of a folder with a COCO file by path below the folder, else by file name.

    Args:
        images: as `list_images` finds them.  path: of the annotation file.
        only_with_objects: leave out images on which a detector could learn no object, as published recipes do.
    Raises: UserError if the file is at fault, or names an image that is not there.
    """
    annotations = read_coco(path)
    of_path = {image.path: image for image in images}
    of_name = {image.path.rpartition("/")[2]: image for image in images}
    kept: list[Image] = []
    ids: dict[str, int] = {}
    left_out: list[tuple[str, str]] = []
    for number, entry in annotations.images.items():
        name = entry["file_name"]
        image = of_path.get(name) or of_name.get(name.rpartition("/")[2])
        if image is None:
            raise UserError(
                f"--annotations {path}: lists image {number} {name!r}, which is not in {folder}; complete the folder "
                "or give the file of this folder"
            )
        if image.path in ids:
            raise UserError(
                f"--annotations {path}: images {ids[image.path]} and {number} are both {image.path!r}; correct the file"
            )
        ids[image.path] = number
        if only_with_objects and not any(map(can_be_learnt, annotations.objects[number])):
            left_out.append((image.path, "no object to train on"))
            continue
        kept.append(image)
    if not kept:
        raise UserError(f"--annotations {path}: no image has an object; drop --only_with_objects, or give another file")
    kept.sort(key=lambda image: image.path)
    left_out += [(image.path, f"not in {path.name}") for image in images if image.path not in ids]
    return Instances(annotations, kept, ids, left_out)


def can_be_learnt(entry: dict) -> bool:
    """Whether a detector is trained on an object: no crowd, and a box with an area."""
    return not entry.get("iscrowd") and min(entry["bbox"][2:]) > 0
