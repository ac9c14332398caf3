"""Names alone decide which images are packed, under which label and which key; no file here holds an image."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peco_ds.data.image_folders import list_images, unique_keys
from peco_ds.errors import UserError

NUM_CLASSES = 6
NUM_IMAGES = 20


@pytest.fixture
def tree(tmp_path) -> Path:
    """The layout of ILSVRC's training set."""
    root = tmp_path / "train"
    for number in range(NUM_IMAGES):
        folder = root / f"n{number % NUM_CLASSES:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{folder.name}_{number}.JPEG").touch()
    return root


@pytest.fixture
def flat(tmp_path) -> tuple[Path, list[str]]:
    """The layout of ILSVRC's validation set, and the synset of each image in name order."""
    folder = tmp_path / "val"
    folder.mkdir()
    for number in range(NUM_IMAGES):
        (folder / f"ILSVRC2012_val_{number + 1:08d}.JPEG").touch()
    return folder, [f"n{number * 5 % NUM_CLASSES:08d}" for number in range(NUM_IMAGES)]


def refusal(folder: Path, labels: str, synsets: Path | None, classes_file: Path | None) -> str:
    with pytest.raises(UserError) as error:
        list_images(folder, labels, synsets, classes_file)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_image_is_listed_with_its_size_its_key_and_the_label_of_its_class_folder(tree):
    (tree / "n00000003" / "n00000003_3.JPEG").write_bytes(b"1234")
    (tree / "n00000003" / "notes.txt").touch()
    images, classes = list_images(tree, "auto", None, None)
    assert classes == sorted(path.name for path in tree.iterdir())
    assert [image.path for image in images] == sorted(
        f"{path.parent.name}/{path.name}" for path in tree.glob("*/*.JPEG")
    )
    assert all(image.path == f"{classes[image.label]}/{image.key}.JPEG" for image in images)
    assert {image.key: image.size_bytes for image in images if image.size_bytes} == {"n00000003_3": 4}


def test_a_full_list_of_classes_keeps_the_usual_indices_where_images_cover_few(flat, tmp_path):
    folder, synsets = flat
    (tmp_path / "synsets.txt").write_text("\n".join(synsets))
    everything = sorted({*synsets, "n00000000", "n99999999", "n00000003"})
    (tmp_path / "classes.txt").write_text("\n".join(everything))
    images, classes = list_images(folder, "auto", tmp_path / "synsets.txt", tmp_path / "classes.txt")
    assert classes == everything
    assert [classes[image.label] for image in images] == synsets


def test_lists_that_do_not_fit_the_folder_are_refused(flat, tmp_path):
    folder, synsets = flat
    listing, classes = tmp_path / "list.txt", tmp_path / "classes.txt"

    def line_for(text, labels="auto", classes_file=None):
        listing.write_text(text)
        return refusal(folder, labels, listing, classes_file)

    assert "19 lines for 20 images" in line_for("\n".join(synsets[:-1]))
    assert "--classes" in line_for("\n".join("1" for _ in synsets))
    names = sorted(path.name for path in folder.iterdir())
    assert "is not in" in line_for("\n".join(f"{name} {synset}" for name, synset in list(zip(names, synsets))[1:]))
    assert "not in the folder" in line_for(
        "\n".join(f"{name} {synset}" for name, synset in [*zip(names, synsets), ("more.JPEG", synsets[0])])
    )
    assert "one label a line" in line_for("")
    assert "--labels" in line_for("\n".join(synsets), labels="folders")
    classes.write_text("\n".join(sorted(set(synsets))))
    assert "do not follow sorted synsets" in line_for("\n".join("1" for _ in synsets), classes_file=classes)
    classes.write_text("\n".join(sorted(set(synsets))[::-1]))
    assert "outside 1..6" in line_for("\n".join("7" for _ in synsets), classes_file=classes)
    classes.write_text("n12345678\n")
    assert "is not in" in line_for("\n".join(synsets), classes_file=classes)
    classes.write_text("n12345678\nn12345678\n")
    assert "stands twice" in line_for("\n".join(synsets), classes_file=classes)
    assert "cannot be read" in refusal(folder, "auto", tmp_path / "absent.txt", None)


@given(
    st.lists(
        st.text(alphabet="ab_./", min_size=1, max_size=8).map(lambda text: text + ".jpg"), unique=True, max_size=30
    )
)
def test_keys_are_unique_and_fit_a_tar_member(paths):
    keys = unique_keys(paths)
    assert len(set(keys)) == len(paths)
    assert not any("." in key or "/" in key for key in keys)


def test_a_loop_of_links_is_walked_once(tree):
    (tree / "n00000000" / "back").symlink_to(tree, target_is_directory=True)
    images, _ = list_images(tree, "auto", None, None)
    assert len(images) == NUM_IMAGES


def test_a_link_to_nowhere_is_listed_so_that_it_is_rejected_by_name(tree):
    (tree / "n00000000" / "gone.jpg").symlink_to(tree / "nowhere.jpg")
    images, _ = list_images(tree, "auto", None, None)
    assert [image.path for image in images if image.size_bytes < 0] == ["n00000000/gone.jpg"]
