"""Paths and URLs: what is meant, what is misspelled, and what no message may show."""

from __future__ import annotations

from pathlib import Path

import pytest

from della_dist.errors import InputError
from della_dist.locations import (
    absolute,
    check_location,
    masked,
    model_and_adapters,
    overlap,
    place,
    short_names,
)
from della_dist.storage.opening import open_store

MISSPELLED = {
    "s3:/bucket/x": "s3://bucket/x",
    "s3//b": "s3://b",
    "s3;//b": "s3://b",
    "s3;/b": "s3://b",
    "S3:\\\\b\\c": "s3://b/c",
    "s3:b/x": "s3://b/x",
    "s3:": "s3://",
    "s3:://b": "s3://b",
    "s3 ://b": "s3://b",
    "s3a:/b": "s3a://b",
    "s3_://b": "s3://b",
    " s3://b": "s3://b",
    "'s3://b'": "s3://b",
    "http:/host/x": "http://host/x",
    "https//host/x": "https://host/x",
    "gs:b": "gs://b",
    "hf:/org/name": "hf://org/name",
    "az;//c/x": "az://c/x",
    "mystore:/b": "mystore://b",
    "://bucket/x": "",
    "file:/abs/x": "file:///abs/x",
    "file:x": "file:///x",
    "file//abs/x": "file:///abs/x",
    "file://host/abs": "file:///",
    "file://localhost/abs": "file:///abs",
    "FILE://localhost/abs": "file:///abs",
    "file://~/x": "file:///",
}


@pytest.mark.parametrize("location", MISSPELLED)
def test_misspelled(location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="look") as caught:
        check_location(location)
    assert MISSPELLED[location] in str(caught.value)
    with pytest.raises(InputError, match="look"):
        open_store(location)


@pytest.mark.parametrize(
    "location",
    [
        *("simplecache::s3://b/x", "filecache::https://h/x?sig=SECRET", "zip::s3://A:SECRET@b/x"),
        *("/abs/s3://A:SECRET@b", "./s3://b", "blockcache::file:///x", "zip://x::s3://b"),
    ],
)
def test_urls_behind_something_else(location: str) -> None:
    with pytest.raises(ValueError, match=r"URL of the store alone|user name") as caught:
        check_location(location)
    assert "SECRET" not in str(caught.value)
    with pytest.raises(InputError):
        open_store(location)


@pytest.mark.parametrize(
    "location",
    [
        *("s3://b", "S3://b/x", "gs://b/x", "hf://org/name", "memory://x", "az://c@a.host/x"),
        *("file:///abs", "FILE:///abs", "/s3:/b", "./s3:/b", "./s3//b", "../gs:b", "~/s3:/x"),
        *("org/name", "s3", "s3/bucket", "s3-bucket/x", "http", "C:/models", "a b/c", "a:b", "x;y"),
        *("/a/b:/c", "models//base", "user@host/x", "."),
    ],
)
def test_meant(location: str) -> None:
    check_location(location)


@pytest.mark.parametrize("location", ["", " ", "a\0b"])
def test_no_place_at_all(location: str) -> None:
    with pytest.raises(ValueError, match="is "):
        check_location(location)


@pytest.mark.parametrize("separator", ["://", ":/", ";//", "//", ":\\\\", ":", "; //", ":///"])
@pytest.mark.parametrize("scheme", ["s3", "S3a", "gs", "https", "file"])
@pytest.mark.parametrize("user", ["KEY:SECRET", "KEY:SEC/RET", "KEY", "KEY:SEC@RET"])
def test_credentials_are_never_shown(scheme: str, separator: str, user: str) -> None:
    location = f"{scheme}{separator}{user}@bucket/x"
    shown = [masked(location), masked(f"{location}: there is no such thing, see user@host.")]
    try:
        check_location(location)
    except ValueError as error:
        shown.append(str(error))
    else:
        assert scheme == "file"  # a local path, and nothing but that
        return
    for text in shown:
        assert "SEC" not in text
        assert "RET" not in text
        assert "KEY" not in text


@pytest.mark.parametrize("location", ["s3:/b/x?X-Amz-Signature=abc", "https:/h/x?token=abc#t"])
def test_queries_are_never_shown(location: str) -> None:
    with pytest.raises(ValueError, match="look") as caught:
        check_location(location)
    assert "abc" not in str(caught.value)
    assert "abc" not in masked(f"{location} is wrong")


@pytest.mark.parametrize(
    "text",
    [
        "https://host/x#SECRET is wrong",
        "https://h/x;token=SECRET",
        "reading s3://b/x&X-Amz-Security-Token=SECRET failed",
        "simplecache::s3://A:SECRET@b/x",
        "filecache::https://h/x?sig=SECRET",
    ],
)
def test_secrets_behind_a_url_are_never_shown(text: str) -> None:
    assert "SECRET" not in masked(text)


@pytest.mark.parametrize(
    "text",
    [
        "/home/someone@host/model is missing",
        "az://container@account.host/x: no such object",
        "models--org--name/snapshots/a@b",
        "--locality /data/*:disk=a: which is it?",
        "s3://b/a&b=c/model;x=1 is missing",
    ],
)
def test_what_is_no_credential_is_shown(text: str) -> None:
    assert masked(text) == text


def test_short_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    hub = "/cache/hub/models--org--name/snapshots/"
    names = {
        "/data/base": "data/base",
        "a/math/": "a/math",
        "b/math": "b/math",
        ".": tmp_path.name,
        "file:///data/code": "code",
        f"{hub}1234": "org/name@1234",
        f"{hub}5678": "org/name@5678",
        "/cache/hub/models--org--other/snapshots/1": "org/other",
        "s3://bucket/models/chat/": "chat",
        "s3://bucket/models/base": "models/base",
    }
    assert short_names(list(names)) == list(names.values())
    assert short_names([]) == []


def test_short_names_end(tmp_path: Path) -> None:
    # What differs in its first part only; and the same twice, which nothing tells apart.
    assert short_names(["/a/x/m", "/b/x/m"]) == ["a/x/m", "b/x/m"]
    assert short_names(["/x/m", "/m"]) == ["x/m", "m"]
    assert short_names(["/m", "/m"]) == ["m", "m"]
    assert short_names(["s3://a", "s3://a/b", "gs://a"]) == ["s3://a", "b", "gs://a"]


@pytest.mark.parametrize("unit", ["x", "x:", "s3:", ":/", "x?", "x@", "x.", "x=", "/", "s3//"])
def test_long_words_are_looked_at_once(unit: str) -> None:
    """Whoever passes a megabyte where a path should be waits no minutes for the answer."""
    long = unit * (1_000_000 // len(unit))
    assert ("@" in unit or "?" in unit) or masked(long) == long
    for text in (f"s3://KEY:SECRET{long}@bucket/x", f"s3:/b?{long}&token=SECRET"):
        assert "SECRET" not in masked(text)


def test_the_current_directory_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    for function in (place, absolute):
        with pytest.raises(InputError, match="models/base is relative, and the current directory"):
            function("models/base")
        assert function(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize(
    ("location", "chain"),
    [
        ("org/base+org/lora", ["org/base", "org/lora"]),
        ("org/base@v1+org/lora@refs+hf://org/b", ["org/base@v1", "org/lora@refs", "hf://org/b"]),
        ("hf://org/base@a1+/data/lora", ["hf://org/base@a1", "/data/lora"]),
        ("s3://bucket/x+y/base", ["s3://bucket/x+y/base"]),
        ("s3://bucket/base+s3://bucket/lora", ["s3://bucket/base", "s3://bucket/lora"]),
        ("/gone/g+h/m", ["/gone/g+h/m"]),
        ("/gone/base+/gone/lora", ["/gone/base", "/gone/lora"]),
        ("stage+./lora", ["stage", "./lora"]),
        ("stage+org/lora", ["stage", "org/lora"]),
        ("/gone/stage+org/lora", ["/gone/stage+org/lora"]),
        ("here+there/is", ["here", "there/is"]),
        ("x+y/m+z", ["x+y/m", "z"]),
        ("z+x+y/m", ["z", "x+y/m"]),
        ("c++/m+z+x", ["c++/m", "z", "x"]),
        ("my+model", ["my+model"]),
        ("a+b", ["a+b"]),
        ("+a", ["+a"]),
        ("a+", ["a+"]),
        ("+", ["+"]),
    ],
)
def test_models_and_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str, chain: list[str]
) -> None:
    for path in ("here", "there/is", "x+y/m", "z", "c++/m", "x", "my+model"):
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path)
    assert list(model_and_adapters(location)) == chain
    assert "+".join(model_and_adapters(location)) == location


def test_an_output_in_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "l").mkdir()
    (tmp_path / "l+a").mkdir()
    assert overlap(f"{tmp_path}/l+a/o", f"org/base+{tmp_path}/l+a")
    assert overlap(f"{tmp_path}/l", f"org/base+{tmp_path}/l")
    assert not overlap(f"{tmp_path}/l/o", f"org/base+{tmp_path}/l+a")


def test_revisions_of_adapters_are_shown() -> None:
    for text in ("hf://org/base@x1+hf://org/a", "MODEL+hf://org/a@x1", "hf://o/b@x+hf://o/a@y"):
        assert masked(f"see {text}: so") == f"see {text}: so"
    assert "secret" not in masked("hf://user:secret@x/y+hf://org/a")


def test_short_names_of_adapters() -> None:
    names = short_names(
        ["hf://org/base@a1+/w/run1/last", "hf://org/base@a1+/w/run2/last", "/w/base+hf://org/a@b2"]
    )
    assert names == ["org/base@a1+run1/last", "org/base@a1+run2/last", "base+org/a"]


def test_pages_of_the_hub() -> None:
    for page in ("https://huggingface.co/org/name", "https://hf.co/org/name/tree/main"):
        with pytest.raises(ValueError, match=r"Write hf://org/name$"):
            check_location(page)
