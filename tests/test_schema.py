"""Manifests: a set is taken only if its folder says what it holds."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peco_ds.errors import UserError
from peco_ds.schema import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    ImageManifest,
    Shard,
    TokenManifest,
    ViewRecipe,
    read_json,
    read_manifest,
    sha256_of_file,
    sha256_of_json,
    write_json,
    write_manifest,
)

SHARDS = [
    Shard("images-000000.tar", 3, 10240, "a" * 64, "b" * 64),
    Shard("images-000001.tar", 2, 10240, "c" * 64, "d" * 64, path="/elsewhere"),
]
IMAGES = ImageManifest(
    shards=SHARDS, samples=5, classes=["cat", "dog"], rejected=["x.jpg: truncated"], packed_as={"source": "here"}
)
TOKEN_SHARDS = [replace(shard, path="") for shard in SHARDS]
TOKENS = TokenManifest(
    shards=TOKEN_SHARDS,
    samples=5,
    images_fingerprint=IMAGES.fingerprint(),
    image_shards={s.name: s.sha256 for s in SHARDS},
    tokenizer_fingerprint="e" * 64,
    num_codes=8192,
    grid=(14, 14),
    num_views=2,
    views=ViewRecipe(224, (0.08, 1.0), (0.75, 1.33), 0.5, 0.4, 0),
)


def refusal(folder, manifest_type=ImageManifest) -> str:
    with pytest.raises(UserError) as caught:
        read_manifest(folder, manifest_type)
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message
    return message


def write_changed(folder, manifest, **changes) -> None:
    """A manifest with some fields changed; None removes a field."""
    raw = {**asdict(manifest), **changes}
    (folder / MANIFEST_NAME).write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


@pytest.mark.parametrize(
    "manifest",
    [IMAGES, replace(IMAGES, classes=None), TOKENS, replace(TOKENS, topk=4)],
    ids=["images", "unlabelled", "tokens", "topk"],
)
def test_a_manifest_comes_back_as_it_was_written(tmp_path, manifest):
    path = write_manifest(tmp_path, manifest)
    assert path == tmp_path / MANIFEST_NAME
    assert read_manifest(tmp_path, type(manifest)) == manifest


def test_a_token_set_from_before_its_tokenizers_facts_were_kept_is_read(tmp_path):
    write_changed(tmp_path, replace(TOKENS, tokenizer_facts={"judge": "none"}), tokenizer_facts=None)
    assert read_manifest(tmp_path, TokenManifest) == TOKENS
    write_changed(tmp_path, TOKENS, tokenizer_facts={"judge": 3})
    assert "tokenizer_facts.judge" in refusal(tmp_path, TokenManifest)


def test_writing_leaves_one_whole_file_and_replaces_an_older_one(tmp_path):
    write_manifest(tmp_path, IMAGES)
    write_manifest(tmp_path, replace(IMAGES, classes=["dog", "cat"]))
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_NAME]
    assert read_manifest(tmp_path, ImageManifest).classes == ["dog", "cat"]


def test_a_value_that_cannot_be_written_leaves_the_older_file_as_it_was(tmp_path):
    path = write_json(tmp_path / "facts.json", {"whole": True})
    with pytest.raises(TypeError):
        write_json(path, {"whole": object()})
    assert json.loads(path.read_text()) == {"whole": True}


def test_a_missing_folder_and_a_missing_manifest_say_who_makes_them(tmp_path):
    assert "pack_images.py" in refusal(tmp_path / "absent") and "no such folder" in refusal(tmp_path / "absent")
    assert "tokenize_shards.py" in refusal(tmp_path / "absent", TokenManifest)
    (tmp_path / "a.tar").touch()
    assert "1 tar" in refusal(tmp_path) and MANIFEST_NAME in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000])
def test_a_manifest_that_is_not_json_is_refused(tmp_path, content):
    (tmp_path / MANIFEST_NAME).write_bytes(content)
    assert "JSON" in refusal(tmp_path)


def test_a_manifest_of_the_other_kind_names_both_kinds(tmp_path):
    write_manifest(tmp_path, TOKENS)
    assert "'tokens'" in refusal(tmp_path) and "'images'" in refusal(tmp_path)
    write_manifest(tmp_path, IMAGES)
    assert "'tokens'" in refusal(tmp_path, TokenManifest) and "'images'" in refusal(tmp_path, TokenManifest)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"images"', "{}"])
def test_json_that_is_no_manifest_is_refused(tmp_path, text):
    (tmp_path / MANIFEST_NAME).write_text(text)
    assert "'images' are needed" in refusal(tmp_path)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, "1", None])
def test_another_format_version_is_named_beside_the_one_that_is_read(tmp_path, version):
    write_changed(tmp_path, IMAGES, format_version=version)
    assert repr(version) in refusal(tmp_path) and f"reads {FORMAT_VERSION}" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "shards",
        "samples",
        "images_fingerprint",
        "image_shards",
        "tokenizer_fingerprint",
        "num_codes",
        "grid",
        "num_views",
        "views",
    ],
)
def test_a_missing_field_is_named(tmp_path, name):
    write_changed(tmp_path, TOKENS, **{name: None})
    assert f"{name}: " in refusal(tmp_path, TokenManifest)


def test_a_mistyped_a_nested_and_an_unknown_field_are_named(tmp_path):
    write_changed(tmp_path, IMAGES, samples="many")
    assert "samples: " in refusal(tmp_path)
    write_changed(tmp_path, IMAGES, shards=[{**asdict(SHARDS[0]), "bytes": "much"}])
    assert "shards.0.bytes" in refusal(tmp_path)
    write_changed(tmp_path, IMAGES, colour="red")
    assert "colour" in refusal(tmp_path)


def test_the_fingerprint_follows_contents_and_order_and_nothing_else():
    assert replace(IMAGES, classes=None, rejected=[]).fingerprint() == IMAGES.fingerprint()
    assert replace(IMAGES, shards=[replace(SHARDS[0], path="/moved"), SHARDS[1]]).fingerprint() == IMAGES.fingerprint()
    assert replace(IMAGES, shards=SHARDS[::-1]).fingerprint() != IMAGES.fingerprint()
    assert (
        replace(IMAGES, shards=[replace(SHARDS[0], sha256="f" * 64), SHARDS[1]]).fingerprint() != IMAGES.fingerprint()
    )
    assert replace(IMAGES, shards=SHARDS[:1]).fingerprint() != IMAGES.fingerprint()


def test_hashes_are_sha256_of_the_bytes_and_of_canonical_json(tmp_path):
    content = os.urandom(3_000_000)
    (tmp_path / "file").write_bytes(content)
    assert sha256_of_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    assert (
        sha256_of_json({"b": 1, "a": [1.5, "x"]})
        == sha256_of_json({"a": [1.5, "x"], "b": 1})
        != sha256_of_json({"a": [1.5, "y"], "b": 1})
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(manifest=st.sampled_from([IMAGES, TOKENS]), data=st.data())
def test_a_manifest_with_a_random_field_is_read_or_a_user_error(tmp_path, manifest, data):
    name = data.draw(st.sampled_from(sorted(asdict(manifest))))
    write_changed(tmp_path, manifest, **{name: data.draw(json_values)})
    try:
        assert isinstance(read_manifest(tmp_path, type(manifest)), type(manifest))
    except UserError as error:
        assert str(tmp_path) in str(error)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=100))
def test_a_manifest_of_random_bytes_is_a_user_error(tmp_path, content):
    (tmp_path / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(UserError):
        read_manifest(tmp_path, ImageManifest)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_named_and_nothing_is_written(tmp_path, value):
    path = write_json(tmp_path / "e.json", {"whole": True})
    with pytest.raises(UserError, match=r"e.json: not written, quality.rows\[1\].loss = -?(nan|inf) is not finite"):
        write_json(path, {"target": "x", "quality": {"top1": 1.0, "rows": [{"loss": 1.0}, {"loss": value}]}})
    assert read_json(path) == {"whole": True} and list(tmp_path.iterdir()) == [path]
