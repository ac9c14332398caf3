"""A list of labels is read in its stated form, whatever program saved it, or refused with its line; nothing between."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peco_ds.data.label_lists import labels_from_list, read_classes
from peco_ds.errors import UserError

PATHS = ["a.jpg", "b.jpg", "c.jpg"]
NAMES = ["fox", "owl", "fox"]


def names_in(tmp_path: Path, content: str | bytes, paths: list[str] = PATHS, classes: str | None = None) -> list[str]:
    """The class of each image."""
    (tmp_path / "list").write_bytes(content if isinstance(content, bytes) else content.encode())
    if classes is not None:
        (tmp_path / "classes").write_text(classes)
    found = labels_from_list(paths, tmp_path / "list", None if classes is None else tmp_path / "classes")
    return [found.classes[number] for number in found.numbers]


def refusal(read) -> str:
    with pytest.raises(UserError) as error:
        read()
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------- what is read

FORMS = {
    "spaces": "a.jpg fox\nb.jpg owl\nc.jpg fox\n",
    "several spaces and blank lines": "\n  a.jpg   fox \n\nb.jpg\u00a0owl\nc.jpg fox\n\n",
    "tabs": "a.jpg\tfox\nb.jpg\towl\nc.jpg\tfox\n",
    "commas": "a.jpg,fox\nb.jpg,owl\nc.jpg,fox",
    "commas and spaces": "a.jpg, fox\nb.jpg, owl\nc.jpg , fox",
    "semicolons, as a German spreadsheet": "a.jpg;fox\nb.jpg;owl\nc.jpg;fox\n",
    "a header": "filename,label\na.jpg,fox\nb.jpg,owl\nc.jpg,fox\n",
    "a header in capitals, with tabs": "Image\tClass\na.jpg\tfox\nb.jpg\towl\nc.jpg\tfox\n",
    "a line for Excel": "sep=;\nimage;label\na.jpg;fox\nb.jpg;owl\nc.jpg;fox\n",
    "quotes": '"a.jpg","fox"\n"b.jpg","owl"\n"c.jpg","fox"\n',
    "quotes and spaces": '"a.jpg" "fox"\n"b.jpg" owl\n"c.jpg" "fox"\n',
    "empty columns at the end": "a.jpg,fox,,\nb.jpg,owl,,\nc.jpg,fox,,\n",
    "any order": "c.jpg,fox\na.jpg,fox\nb.jpg,owl\n",
    "no suffixes": "a,fox\nb,owl\nc,fox\n",
    "another suffix": "a.JPEG,fox\nb.png,owl\nc.jpeg,fox\n",
    "the folder before the name": "./a.jpg,fox\n.\\b.jpg,owl\nc.jpg,fox\n",
    "one label a line": "fox\nowl\nfox\n",
    "one label a line, in quotes": '"fox"\n"owl"\n"fox"\n',
    "one label a line under a header": "label\nfox\nowl\nfox\n",
    "Kaggle's boxes": "ImageId,PredictionString\na,fox 1 2 3 4 fox 5 6 7 8 \nb,owl 1 2 3 4 \nc,fox 1 2 3 4 \n",
    "Kaggle's boxes without boxes": "ImageId,PredictionString\na,fox\nb,owl\nc,fox\n",
}
ENCODINGS = {
    "UTF-8": lambda text: text.encode(),
    "a byte-order mark": lambda text: text.encode("utf-8-sig"),
    "UTF-16, as Excel's Unicode text": lambda text: text.encode("utf-16"),
    "UTF-16, the other way round": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    "DOS line ends": lambda text: text.replace("\n", "\r\n").encode(),
    "line ends of old Macs": lambda text: text.replace("\n", "\r").encode(),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_stated_form_is_read_in_every_encoding(tmp_path, form):
    for encoding, encode in ENCODINGS.items():
        assert names_in(tmp_path, encode(FORMS[form])) == NAMES, encoding


def test_labels_of_several_words_are_whole_where_a_tab_or_a_comma_stands_between(tmp_path):
    species = ["great white shark", "great grey owl", "great white shark"]
    for between in ("\t", ",", ";"):
        lines = [f"{path}{between}{name}" for path, name in zip(PATHS, species)]
        assert names_in(tmp_path, "\n".join(lines)) == species
    assert names_in(tmp_path, '"a.jpg","shark, white"\nb.jpg,owl\nc.jpg,owl\n')[0] == "shark, white"
    assert names_in(tmp_path, "my cat.jpg\tfox\n", ["my cat.jpg"]) == ["fox"]
    assert names_in(tmp_path, '"my cat.jpg" fox\n', ["my cat.jpg"]) == ["fox"]


def test_paths_tell_images_of_one_name_apart(tmp_path):
    paths = ["x/a.jpg", "x/b.png", "y/a.jpg", "y/b.jpg"]
    lines = ["x/a.jpg,one", "x/b,two", "y/a,three", "y\\b.jpg,four"]
    assert names_in(tmp_path, "\n".join(lines), paths) == ["one", "two", "three", "four"]
    # of two suffixes the listed one counts
    assert names_in(tmp_path, "a.jpg,one\na.png,two\n", ["a.jpg", "a.png"]) == ["one", "two"]


def test_accents_match_however_a_file_system_writes_them(tmp_path):
    assert names_in(tmp_path, "\u00fc.jpg,fox\n", ["u\u0308.jpg"]) == ["fox"]


def test_an_image_that_is_named_like_a_header_is_an_image(tmp_path):
    assert names_in(tmp_path, "image,fox\nb,owl\n", ["image.jpg", "b.jpg"]) == ["fox", "owl"]


def test_numbers_are_places_among_the_classes_from_0_beside_names_and_from_1_alone(tmp_path):
    assert names_in(tmp_path, "a.jpg 2\nb.jpg 0\nc.jpg 2\n", classes="ape\nowl\nfox\n") == ["fox", "ape", "fox"]
    assert names_in(tmp_path, "3\n1\n3\n", classes="ape\nowl\nfox\n") == ["fox", "ape", "fox"]
    found = labels_from_list(PATHS, tmp_path / "list", tmp_path / "classes")
    assert "numbers counted from 1" in found.read_as


# ---------------------------------------------------------------------------------------- what is refused

REFUSED = {
    "spaces in labels": ("a.jpg great white shark\nb.jpg owl\nc.jpg fox", "line 1 has 4 words"),
    "spaces in one label": ("a.jpg fox\nb.jpg grey owl\nc.jpg fox", "line 2 has 3 words"),
    "spaces in names": ("my a.jpg fox\nb.jpg owl\nc.jpg fox", "line 1 has 3 words"),
    "labels of two words, one a line": ("red fox\ngrey owl\nred fox", "'a.jpg' is not in"),
    "labels of one and of two words": ("fox\ngrey owl\nfox", "line 2 has 2 words"),
    "a tab on some lines": ("a.jpg\tfox\nb.jpg owl\nc.jpg\tfox", "line 1 has a tab and line 2 has none"),
    "a comma on some lines": ("a,fox\nb,owl\nc", "line 1 has a comma and line 3 has none"),
    "a number and a name": ("a.jpg,0,fox\nb.jpg,1,owl\nc.jpg,0,fox", "line 1 has 3 fields"),
    "an image without a label": ("a.jpg,fox\nb.jpg,\nc.jpg,fox", "line 2 has 1 fields"),
    "an empty name": ("a.jpg,fox\n,owl\nc.jpg,fox", "line 2 has an empty field"),
    "an image twice, alike": ("a.jpg,fox\nb.jpg,owl\nc.jpg,fox\na.jpg,fox", "lines 1 and 4 both name image 'a.jpg'"),
    "an image twice, unlike": ("a.jpg,fox\nb.jpg,owl\nc.jpg,fox\na,owl", "('fox' and 'owl')"),
    "an image that is not there": ("a.jpg,fox\nb.jpg,owl\nc.jpg,fox\nd.jpg,owl", "line 4: image 'd.jpg' is listed but"),
    "an image that is not listed": ("a.jpg,fox\nc.jpg,owl", "image 'b.jpg' is not in"),
    "label before name": ("fox,a.jpg\nowl,b.jpg\nfox,c.jpg", "write the image name before the label"),
    "a header of no stated words": ("what,ever\na.jpg,fox\nb.jpg,owl\nc.jpg,fox", "line 1: image 'what' is listed"),
    "a name and a name": ("a.jpg,a.jpg\nb.jpg,owl\nc.jpg,fox", "line 1: 'a.jpg' is the name of an image, no label"),
    "capitals in names": ("A.jpg,fox\nb.jpg,owl\nc.jpg,fox", "names 'A.jpg', which is no image but for capitals"),
    "a header alone": ("filename,label\n", "holds a header alone"),
    "names alone": ("a.jpg\nb.jpg\nc.jpg", "holds an image's name"),
    "names without suffixes alone": ("a\nb\nc", "are the names of the images"),
    "colons": ("a:fox\nb:owl\nc:fox", "line 1: 'a:fox' holds an image's name"),
    "bars": ("a.jpg|fox\nb.jpg|owl\nc.jpg|fox", "'a.jpg|fox' holds an image's name"),
    "names and numbers": ("a.jpg,fox\nb.jpg,1\nc.jpg,fox", "line 2: '1' is no name of a class"),
    "numbers with a point": ("a.jpg,1.0\nb.jpg,0.0\nc.jpg,1.0", "line 1: '1.0' is no name of a class"),
    "no value": ("a.jpg,fox\nb.jpg,NaN\nc.jpg,fox", "line 2: 'NaN' is no name of a class"),
    "a spreadsheet's error": ("a.jpg,fox\nb.jpg,#REF!\nc.jpg,fox", "line 2: '#REF!' is no name of a class"),
    "capitals": ("a.jpg,fox\nb.jpg,owl\nc.jpg,Fox", "lines 1 and 3: 'fox' and 'Fox' look like one class"),
    "a blank line between": ("fox\n\nowl\nfox", "line 2 is blank"),
    "too few lines": ("fox\nowl", "2 lines for 3 images"),
    "a quote left open": ('a.jpg,"fox\nb.jpg,owl\nc.jpg,fox', "line 1 is not CSV"),
    "two labels in the boxes": (
        "ImageId,PredictionString\na,fox 1 2 3 4 owl 1 2 3 4\nb,owl 1 2 3 4\nc,owl 1 2 3 4",
        "line 2 gives 'a' two labels, fox and owl",
    ),
    "boxes of three numbers": (
        "ImageId,PredictionString\na,fox 1 2 3\nb,owl\nc,owl",
        "line 2 is not a synset and four",
    ),
    "zero bytes": ("a.jpg fox\nb.jpg owl\0\nc.jpg fox", "line 2 holds the character '\\x00'"),
    "nothing": ("", "is empty"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_is_of_no_stated_form_is_refused_with_its_line(tmp_path, how):
    text, reason = REFUSED[how]
    line = refusal(lambda: names_in(tmp_path, text))
    assert reason in line and str(tmp_path / "list") in line


def test_text_in_another_encoding_is_refused_with_its_line(tmp_path):
    assert "line 2 is not UTF-8" in refusal(
        lambda: names_in(tmp_path, "a.jpg,fox\nb.jpg,ü\nc.jpg,fox".encode("latin-1"))
    )
    no_mark = "a.jpg,fox\nb.jpg,owl\n".encode("utf-16-le")
    assert "line 1 holds the character '\\x00'" in refusal(lambda: names_in(tmp_path, no_mark))


def test_a_name_that_two_images_share_is_refused(tmp_path):
    for paths in (["x/a.jpg", "y/a.jpg"], ["a.jpeg", "a.png"]):
        line = refusal(lambda: names_in(tmp_path, "a,fox\nb,owl\n", paths))
        assert repr(paths[0]) in line and repr(paths[1]) in line


@pytest.mark.parametrize(
    "paths",
    [
        ["i10.jpg", "i2.jpg"],
        ["B.jpg", "a.jpg"],
        ["a-1.jpg", "a.jpg"],
        ["x/b.jpg", "y/a.jpg"],
        ["x/a.jpg", "y/a.jpg"],
    ],
    ids=["numbers without zeros", "capitals", "a name within another", "folders", "equal names"],
)
def test_one_label_a_line_is_refused_where_the_order_of_names_is_in_doubt(tmp_path, paths):
    assert "write the image name before each label" in refusal(lambda: names_in(tmp_path, "fox\nowl\n", paths))


def test_numbers_that_count_the_images_are_no_labels(tmp_path):
    line = refusal(lambda: names_in(tmp_path, "a 1\nb 2\nc 3\n", classes="ape\nowl\nfox\nelk\n"))
    assert "count the lines from 1 to 3" in line


def test_numbers_are_refused_where_the_classes_are_numbers_too(tmp_path):
    line = refusal(lambda: names_in(tmp_path, "a 1\nb 0\nc 1\n", classes="3\n4\n5\n"))
    assert "names or places" in line
    # the place is the name
    assert names_in(tmp_path, "a 1\nb 0\nc 1\n", classes="0\n1\n") == ["1", "0", "1"]


def test_labels_that_look_alike_are_read_where_the_classes_list_both(tmp_path):
    assert names_in(tmp_path, "a x\nb X\nc 7\n", classes="x\nX\n7\n") == ["x", "X", "7"]


# ----------------------------------------------------------------------------------------------- classes

CLASS_FILES = {
    "one a line": ("fox\ngrey owl\n", ["fox", "grey owl"]),
    "words after synsets": ("n01440764 tench, Tinca tinca\nn01443537\tgoldfish\n", ["n01440764", "n01443537"]),
    "the devkit's map": ("n02119789 1 kit_fox\nn02100735 2 English_setter\n", ["n02119789", "n02100735"]),
    "words with commas": ("tench, Tinca tinca\ngoldfish, Carassius\n", ["tench, Tinca tinca", "goldfish, Carassius"]),
    "numbers from 0 before names": ("0 fox\n1 grey owl\n", ["fox", "grey owl"]),
    "numbers from 1 and colons": ("1: fox\n2: grey owl\n", ["fox", "grey owl"]),
    "names that are numbers": ("0\n1\n2\n", ["0", "1", "2"]),
    "quotes": ('"fox"\n"owl, grey"\n', ["fox", "owl, grey"]),
    "a JSON list": (json.dumps(["fox", "grey owl"]), ["fox", "grey owl"]),
    "imagenet_class_index.json": (
        json.dumps({"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}),
        ["n01440764", "n01443537"],
    ),
    "JSON of numbers to names": (json.dumps({"1": "owl", "0": "fox"}), ["fox", "owl"]),
    "JSON of names to numbers": (json.dumps({"owl": 1, "fox": 0}, indent=1), ["fox", "owl"]),
}


@pytest.mark.parametrize("form", CLASS_FILES)
def test_a_file_of_classes_is_read_in_every_stated_form(tmp_path, form):
    text, names = CLASS_FILES[form]
    for encoding, encode in ENCODINGS.items():
        (tmp_path / "classes").write_bytes(encode(text))
        assert read_classes(tmp_path / "classes") == names, encoding


REFUSED_CLASSES = {
    "a class twice": ("fox\nowl\nfox\n", "'fox' stands twice, on line 1 and line 3"),
    "a class twice in two forms of its accent": ("\u00fc\nu\u0308\n", "stands twice"),
    "a blank line between": ("fox\n\nowl\n", "line 2 is blank"),
    "synsets on some lines": ("n01440764 tench\ngoldfish\n", "line 2 begins with no synset"),
    "numbers out of order": ("0 fox\n2 owl\n1 elk\n", "line 2 has number 2 where 1 follows"),
    "quotes about a part": ('"fox" red\nowl\n', "line 1 has quotes about a part"),
    "nothing": ("\n", "is empty"),
    "JSON with a gap": ('{"0": "fox", "2": "owl"}', "none has the number 1"),
    "JSON with a number twice": ('{"fox": 0, "owl": 0}', "two classes have the number 0"),
    "JSON with a class twice": ('{"fox": 0, "fox": 1}', "stands twice"),
    "JSON of something else": ('{"0": {"fox": 1}}', "entry 0 is"),
    "Python in place of JSON": ("{0: 'tench, Tinca tinca',\n 1: 'goldfish'}", "not JSON"),
}


@pytest.mark.parametrize("how", REFUSED_CLASSES)
def test_a_file_of_classes_of_no_stated_form_is_refused_with_its_line(tmp_path, how):
    text, reason = REFUSED_CLASSES[how]
    (tmp_path / "classes").write_text(text)
    line = refusal(lambda: read_classes(tmp_path / "classes"))
    assert reason in line and str(tmp_path / "classes") in line


def test_an_image_that_is_listed_and_left_out_says_why(tmp_path):
    (tmp_path / "list").write_text("a.jpg,fox\nb.heic,owl\n")
    left_out = {"b.heic": "HEIF image, not decoded"}
    line = refusal(lambda: labels_from_list(["a.jpg"], tmp_path / "list", None, left_out))
    assert "line 2: image 'b.heic' is listed but left out: HEIF image, not decoded" in line
