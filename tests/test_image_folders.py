"""Which files are packed, under which label and which key, and why the others are not; no file here holds an image."""

from __future__ import annotations

import os
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
    images, classes, left_out, *_ = list_images(tree, "auto", None, None)
    assert classes == sorted(path.name for path in tree.iterdir())
    assert [image.path for image in images] == sorted(
        f"{path.parent.name}/{path.name}" for path in tree.glob("*/*.JPEG")
    )
    assert all(image.path == f"{classes[image.label]}/{image.key}.JPEG" for image in images)
    assert {image.key: image.size_bytes for image in images if image.size_bytes} == {"n00000003_3": 4}
    assert left_out == [("n00000003/notes.txt", "empty file")]


def test_a_full_list_of_classes_keeps_the_usual_indices_where_images_cover_few(flat, tmp_path):
    folder, synsets = flat
    (tmp_path / "synsets.txt").write_text("\n".join(synsets))
    everything = sorted({*synsets, "n00000000", "n99999999", "n00000003"})
    (tmp_path / "classes.txt").write_text("\n".join(everything))
    images, classes, *_ = list_images(folder, "auto", tmp_path / "synsets.txt", tmp_path / "classes.txt")
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
    images = list_images(tree, "auto", None, None).images
    assert len(images) == NUM_IMAGES


def test_a_link_to_nowhere_is_listed_so_that_it_is_rejected_by_name(tree):
    (tree / "n00000000" / "gone.jpg").symlink_to(tree / "nowhere.jpg")
    images = list_images(tree, "auto", None, None).images
    assert [image.path for image in images if image.size_bytes < 0] == ["n00000000/gone.jpg"]


# ------------------------------------------------------------------- every file is taken, or left out for a reason

JPEG = b"\xff\xd8\xff\xe0 and so on"


def test_every_file_is_an_image_or_left_out_with_its_reason(tmp_path):
    root = tmp_path / "images"
    contents = {
        "a.jpg": b"",
        "b.jfif": b"",
        "c.PJPEG": b"",
        "d.jpg_large": JPEG,
        "e": JPEG,
        "sub/deeper/f.txt": JPEG,
        "g.avif": b"\0\0\0\x1cftypavif",
        "h.heic": b"\0\0\0\x1cftypheic",
        "i.txt": b"words",
        "j.zip": b"PK\x03\x04",
        "k.mp4": b"\0\0\0\x1cftypmp42",
        "l": b"",
        "m.NEF": b"MM\0* a thumbnail is first",
        ".DS_Store": b"x",
        "._a.jpg": b"x",
        "Thumbs.db": b"x",
        "@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg": JPEG,
        "sub/__MACOSX/._a.jpg": b"x",
        ".ipynb_checkpoints/a-checkpoint.jpg": JPEG,
    }
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    os.mkfifo(root / "n")
    (root / "o").symlink_to("nowhere")
    (root / "p").symlink_to("p")
    (root / "q").symlink_to(root, target_is_directory=True)
    (root / "r.jpg").symlink_to("r.jpg")
    listing = list_images(root, "auto", None, None)
    assert [image.path for image in listing.images] == [
        "a.jpg",
        "b.jfif",
        "c.PJPEG",
        "d.jpg_large",
        "e",
        "r.jpg",
        "sub/deeper/f.txt",
    ]
    assert dict(listing.left_out) == {
        "g.avif": "AVIF image, not decoded",
        "h.heic": "HEIF image, not decoded",
        "i.txt": "no image",
        "j.zip": "archive, not unpacked",
        "k.mp4": "film",
        "l": "empty file",
        "m.NEF": "camera raw, not decoded",
        ".DS_Store": "hidden",
        "._a.jpg": "hidden",
        "Thumbs.db": "file of a system",
        "@eaDir/": "folder of a system, with all in it",
        "sub/__MACOSX/": "folder of a system, with all in it",
        ".ipynb_checkpoints/": "hidden folder, with all in it",
        "n": "no regular file",
        "o": "link to nothing",
        "p": "link to nothing",
        "q/": "link to a folder that is there already",
    }
    # keys without an image's suffix are their own names
    assert [image.key for image in listing.images] == ["a", "b", "c", "d_jpg_large", "e", "r", "f_txt"]


def test_folders_of_systems_are_no_classes_and_need_not_be_readable(tree):
    before = list_images(tree, "folders", None, None)
    for name in ("@eaDir", "$RECYCLE.BIN", "__MACOSX", "lost+found", "System Volume Information"):
        (tree / name).mkdir()
    (tree / "@eaDir" / "x.jpg").touch()
    (tree / "lost+found").chmod(0)
    try:
        after = list_images(tree, "folders", None, None)
    finally:
        (tree / "lost+found").chmod(0o700)
    assert after[:2] == before[:2] and len(after.left_out) == 5


def test_a_class_folder_of_what_is_left_out_says_what_that_is(tree):
    (tree / "n99999999").mkdir()
    for number in range(3):
        (tree / "n99999999" / f"{number}.heic").write_bytes(b"\0\0\0\x1cftypheic")
    line = refusal(tree, "auto", None, None)
    assert "n99999999' holds no image (3 HEIF image, not decoded, e.g. 'n99999999/0.heic'; what is not" in line


def test_a_class_folder_that_is_a_link_to_another_is_refused_with_both(tree):
    (tree / "alias").symlink_to(tree / "n00000001", target_is_directory=True)
    line = refusal(tree, "auto", None, None)
    assert "alias' is a link to" in line and "n00000001" in line
    listing = list_images(tree, "none", None, None)
    assert len(listing.images) == NUM_IMAGES and listing.left_out[0][0] == "alias/"


def test_a_tree_of_links_is_packed_as_what_it_links_to_and_counted(tree, tmp_path):
    """Class folders that are links, out of the tree; and real class folders of links to files."""
    expected = list_images(tree, "folders", None, None)
    folders, files = tmp_path / "folders", tmp_path / "files"
    folders.mkdir()
    for class_folder in tree.iterdir():
        (folders / class_folder.name).symlink_to(class_folder, target_is_directory=True)
        (files / class_folder.name).mkdir(parents=True)
        for path in class_folder.iterdir():
            (files / class_folder.name / path.name).symlink_to(path)
    for linked in (folders, files):
        found = list_images(linked, "folders", None, None)
        assert found[:3] == expected[:3]
        assert found.remarks.numbers() == {"reached by a link": NUM_IMAGES}
    (files / "n00000000" / "again.jpg").symlink_to(tree / "n00000001" / "n00000001_1.JPEG")
    found = list_images(files, "folders", None, None)
    assert len(found.images) == NUM_IMAGES + 1
    # in path order the link of the first class comes before
    assert "1 linked a second time, so in the set twice" in found.remarks.text()


@pytest.mark.parametrize("target", ["nowhere", "circle"])
def test_a_class_folder_that_is_a_link_to_nothing_is_refused_and_not_missed(tree, target):
    (tree / "circle").symlink_to(tree / "elcric", target_is_directory=True)
    (tree / "elcric").symlink_to(tree / target, target_is_directory=True)
    assert "circle' stands among the class folders and is a link to nothing, or round in a circle (2 such)" in refusal(
        tree, "folders", None, None
    )
    listing = list_images(tree, "none", None, None)
    assert len(listing.images) == NUM_IMAGES
    assert [reason for _, reason in listing.left_out] == ["link to nothing"] * 2


def test_a_link_to_a_folder_above_is_not_followed(tree, tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "me.jpg").touch()
    (tree / "n00000000" / "up").symlink_to(tmp_path, target_is_directory=True)
    listing = list_images(tree, "folders", None, None)
    assert len(listing.images) == NUM_IMAGES
    assert listing.left_out == [("n00000000/up/", "link to a folder that this one lies in")]


def test_names_are_told_apart_by_capitals_and_remarked_and_classes_are_not(tree):
    for name in ("a.jpg", "A.JPG", "a.JPG", "b.png"):
        (tree / "n00000002" / name).touch()
    listing = list_images(tree, "folders", None, None)
    keys = {image.path.partition("/")[2]: image.key for image in listing.images if image.label == 2}
    assert len(set(keys.values())) == len(keys) and keys["A.JPG"] == "A" and keys["b.png"] == "b"
    assert "2 named as another but for capitals" in listing.remarks.text()
    (tree / "N00000002").mkdir()
    assert "'N00000002' and 'n00000002' look like one class" in refusal(tree, "folders", None, None)
    assert len(list_images(tree, "none", None, None).images) == NUM_IMAGES + 4


def test_a_list_of_labels_tells_names_apart_by_capitals(tmp_path):
    for name in ("a.jpg", "A.jpg"):
        (tmp_path / "flat" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "flat" / name).touch()
    listing = tmp_path / "list.csv"
    listing.write_text("A.jpg,owl\na.jpg,fox\n")
    found = list_images(tmp_path / "flat", "auto", listing, None)
    assert {image.path: found.classes[image.label] for image in found.images} == {"a.jpg": "fox", "A.jpg": "owl"}
    listing.write_text("a.jpg,owl\na.jpg,fox\n")
    assert "lines 1 and 2 both name image 'a.jpg'" in refusal(tmp_path / "flat", "auto", listing, None)


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.heic").write_bytes(b"\0\0\0\x1cftypheic")
    line = refusal(tmp_path / "images", "auto", None, None)
    assert "holds no image" in line and "1 HEIF image, not decoded, e.g. 'a.heic'" in line
    assert "can be converted to JPEG or PNG" in line


def test_images_below_their_class_folder_have_its_label_and_are_remarked(tree):
    (tree / "n00000002" / "old").mkdir()
    (tree / "n00000002" / "old" / "x.jpg").touch()
    listing = list_images(tree, "auto", None, None)
    assert {image.path: image.label for image in listing.images}["n00000002/old/x.jpg"] == 2
    assert listing.remarks.text() == "1 deeper than its class folder, e.g. 'n00000002/old/x.jpg'"


def test_a_stray_image_beside_the_class_folders_is_named_as_the_reason_for_no_labels(tree):
    (tree / "cover.jpg").touch()
    listing = list_images(tree, "auto", None, None)
    assert listing.classes is None and "'cover.jpg' lies beside the folders" in listing.labels_from


def test_class_folders_that_look_alike_are_refused(tree):
    (tree / "caf\u00e9").mkdir()
    (tree / "cafe\u0301").mkdir()
    assert "look like one class" in refusal(tree, "folders", None, None)
