"""Pack scenes: pairs of an image and the map of its pixels' classes, as one record each.

Nothing of a map is changed: what its numbers mean stands in the manifest, and is applied when a record is read. A map
that is missing, in colours, of another size or with a number that is no class ends the packing, by name: it would
train a model on wrong labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peco_ds.command_line import user_path
from peco_ds.data.image_folders import Image, Listing, list_images
from peco_ds.data.image_shards import Members, PackJob
from peco_ds.errors import UserError
from peco_ds.schema import MAP_EXTENSION, SceneMaps, sha256_of_json

# The list of classes that lies beside ADE20K's images, and the names of its columns.
_ADE20K_CLASSES = "objectInfo150.txt"
_ADE20K_COLUMNS = "Idx\tRatio\tTrain\tVal\t"
# No class: the value that no map's class may have, since it marks what is not labelled.
UNLABELLED = 255


# Options of pack_images.py that only scenes have.
SCENE_OPTIONS = ("maps", "reduce_zero_label", "ignored")


def add_scene_options(parser) -> None:
    parser.add_argument(
        "--maps",
        type=user_path,
        metavar="DIR",
        help="with --labels scenes: folder of the class maps, a PNG of the same name for each image; "
        "default: `annotations` for `images` in the path of --images",
    )
    parser.add_argument(
        "--reduce_zero_label",
        action="store_true",
        help="with --labels scenes: 0 in a map is no class and k is the k-th one, as in ADE20K; else 0 is the first",
    )
    parser.add_argument(
        "--ignored",
        type=int,
        nargs="*",
        default=[],
        metavar="N",
        help="with --labels scenes: further numbers that are no class; 255 never is one",
    )


def check_scene_options(args) -> None:
    """Raises: UserError if options of scenes stand without --labels scenes, or beside what does not go with them."""
    if args.labels != "scenes":
        given = next((name for name in SCENE_OPTIONS if getattr(args, name)), None)
        if given:
            raise UserError(f"--{given} goes with --labels scenes; add that, or drop it")
        return
    if args.synsets is not None or args.short_side:
        name = "synsets" if args.synsets is not None else "short_side"
        raise UserError(f"--{name} does not go with --labels scenes: a map stays as it is published; drop it")
    outside = next((number for number in args.ignored if not 0 <= number <= UNLABELLED), None)
    if outside is not None:
        raise UserError(f"--ignored {outside}: must lie between 0 and {UNLABELLED}, the numbers of 8 bits")


@dataclass(frozen=True)
class Scenes:
    """The maps of a folder of images, and what their numbers mean."""

    folder: Path
    classes: list[str]
    maps: SceneMaps

    def numbers(self) -> set[int]:
        """Every number that a map may hold."""
        first = 1 if self.maps.reduce_zero_label else 0
        known = set(range(first, first + len(self.classes)))
        return known | {UNLABELLED, *self.maps.ignored} | ({0} if self.maps.reduce_zero_label else set())


def list_scenes(
    images: Path, maps: Path | None, classes_file: Path | None, *, reduce_zero_label: bool, ignored: list[int]
) -> tuple[Listing, Scenes]:
    """Every image below a folder, and the folder of their maps; each image has one.

    Args:
        maps: None: the folder of the same place below a sibling `annotations` of `images`, as in ADEChallengeData2016.
        classes_file: one class a line, or ADE20K's objectInfo150.txt; None: that file beside the two folders.
        reduce_zero_label, ignored: as of `SceneMaps`.
    Raises: UserError if a folder or the class file is missing, an image has no map, or a map no image.
    """
    found = list_images(images, "none", None, None)
    folder = maps or _sibling(images)
    if not folder.is_dir():
        raise UserError(f"--maps {folder}: no such folder; give the folder of the class maps")
    _check_pairs(found.images, folder)
    classes = read_scene_classes(classes_file or _beside(images))
    highest = len(classes) if reduce_zero_label else len(classes) - 1
    if highest >= UNLABELLED:
        raise UserError(f"--classes: {len(classes)} classes, a map of 8 bits holds at most {UNLABELLED}; give fewer")
    taken = [number for number in ignored if number <= highest and not (reduce_zero_label and number == 0)]
    if taken:
        raise UserError(
            f"--ignored {taken[0]}: is the number of a class, --classes names {len(classes)}; drop it, or take its "
            "line out of the file"
        )
    return found, Scenes(folder.resolve(), classes, SceneMaps(reduce_zero_label, sorted(set(ignored) - {UNLABELLED})))


def _sibling(images: Path) -> Path:
    parts = list(images.resolve().parts)
    places = [place for place, part in enumerate(parts) if part == "images"]
    if not places:
        raise UserError(
            f"--images {images}: no folder `images` in its path whose sibling `annotations` could hold the maps; give "
            "--maps DIR"
        )
    parts[places[-1]] = "annotations"
    return Path(*parts)


def _beside(images: Path) -> Path:
    for folder in list(images.resolve().parents)[:2]:
        if (folder / _ADE20K_CLASSES).is_file():
            return folder / _ADE20K_CLASSES
    raise UserError("--labels scenes: which classes the maps hold is not known; give --classes FILE, one a line")


def _check_pairs(images: list[Image], folder: Path) -> None:
    wanted = {map_path(image.path): image.path for image in images}
    missing = sorted(path for name, path in wanted.items() if not (folder / name).is_file())
    if missing:
        raise UserError(
            f"--maps {folder}: image {missing[0]!r} has no map {map_path(missing[0])!r} there ({len(missing)} such); "
            "add it, or take the image away"
        )
    if len(wanted) < len(images):
        paths = sorted(image.path for image in images)
        twice = next(one for one, other in zip(paths, paths[1:]) if map_path(one) == map_path(other))
        raise UserError(f"--images: {twice!r} and another image share the map {map_path(twice)!r}; keep one of them")
    alone = sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*.png") if str(path.relative_to(folder)) not in wanted
    )
    if alone:
        raise UserError(
            f"--maps {folder}: map {alone[0]!r} has no image ({len(alone)} such); add it, or take the map away"
        )


def map_path(image_path: str) -> str:
    """Where the map of an image lies, relative to the folder of maps."""
    return image_path.rpartition(".")[0] + ".png"


def read_scene_classes(path: Path) -> list[str]:
    """Class names: one a line, each a whole line; of ADE20K's objectInfo150.txt the last column.

    Raises: UserError if the file cannot be read, is empty, or names a class twice.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {path}: cannot be read as text ({error}); correct the path") from None
    if lines and lines[0].startswith(_ADE20K_COLUMNS):
        # Synonyms stay: "screen" alone stands for two of the classes.
        lines = [line.split("\t")[-1].strip() for line in lines[1:]]
    twice = next((line for line, later in zip(sorted(lines), sorted(lines)[1:]) if line == later), None)
    if not lines or twice is not None:
        raise UserError(
            f"--classes {path}: {f'{twice!r} stands twice' if twice else 'is empty'}; wants one class a line"
        )
    return lines


@dataclass(frozen=True)
class SceneJob(PackJob):
    """One shard of scenes to be written."""

    scenes: Scenes

    def members(self, image: Image) -> Members:
        stored = super().members(image)
        data = map_bytes(self.scenes.folder / map_path(image.path))
        self._check(data, image, next(iter(stored.files.values())))
        return stored._replace(files={**stored.files, MAP_EXTENSION: data})

    def _check(self, data: bytes, image: Image, image_bytes: bytes) -> None:
        """Raises: UserError if the map is not one of this image."""
        from peco_ds.data.decode import DecodeError, decode_map, decode_rgb

        path = self.scenes.folder / map_path(image.path)
        try:
            found = decode_map(data)
        except DecodeError as error:
            raise UserError(f"{path}: {error}") from None
        size, wanted = tuple(found.shape), tuple(decode_rgb(image_bytes).shape[1:])
        if size != wanted:
            raise UserError(
                f"{path}: {size[1]} x {size[0]} px, its image {image.path!r} has {wanted[1]} x {wanted[0]}; give the "
                "map of this image"
            )
        strange = sorted(set(found.unique().tolist()) - self.scenes.numbers())
        if strange:
            reduced = self.scenes.maps.reduce_zero_label
            first, last = (1, len(self.scenes.classes)) if reduced else (0, len(self.scenes.classes) - 1)
            raise UserError(
                f"{path}: holds the number {strange[0]}, classes are {first} to {last}; correct the map, name the "
                "class in --classes, or set --ignored or --reduce_zero_label"
            )

    def digest(self) -> str:
        sizes = [(self.scenes.folder / map_path(image.path)).stat().st_size for image in self.images]
        maps = self.scenes.maps
        return sha256_of_json([super().digest(), sizes, self.scenes.classes, maps.reduce_zero_label, maps.ignored])


def map_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); make the map readable") from None
