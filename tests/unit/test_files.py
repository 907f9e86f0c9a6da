"""Weights files: what is wrong with one is said in a sentence, and saving never leaves half a file."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from likeness.models.common import files
from likeness.models.common.errors import LikenessError
from likeness.models.common.files import Header, TensorInfo, check_file, load, read_header, save, sha256

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.float16)}


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, **changes) -> dict:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end], **changes}


def test_header_tells_types_shapes_and_metadata(tmp_path):
    save(tmp_path / "x.safetensors", TENSORS, {"method": "custany"})
    assert read_header(tmp_path / "x.safetensors") == Header(
        {"a.weight": TensorInfo("F32", (2, 3)), "b": TensorInfo("F16", (5,))}, {"method": "custany"}
    )
    check_file(tmp_path / "x.safetensors")


def test_load_gives_back_what_was_saved(tmp_path):
    save(tmp_path / "new folder" / "x.safetensors", TENSORS, {"k": "v"})
    tensors, metadata = load(tmp_path / "new folder" / "x.safetensors")
    assert metadata == {"k": "v"} and tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor)


def test_a_large_file_is_read_in_portions(tmp_path, monkeypatch):
    """What was read of a mapped file counts as memory until it is closed: each opening copies about a portion, and no more."""
    tensors = {f"layer.{k}": torch.full((4, 8), float(k)) for k in range(10)}
    save(tmp_path / "many.safetensors", tensors, {"who": "me"})
    read: list[int] = []
    real = files.safe_open

    class Watched:
        def __init__(self, *args, **options):
            self.file = real(*args, **options)

        def __enter__(self):
            read.append(0)
            self.inside = self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def get_tensor(self, name):
            tensor = self.inside.get_tensor(name)
            read[-1] += tensor.nbytes
            return tensor

    monkeypatch.setattr(files, "safe_open", Watched)
    monkeypatch.setattr(files, "PORTION", 300)  # of 128 bytes a tensor
    found, metadata = load(tmp_path / "many.safetensors")
    assert read == [384, 384, 384, 128] and metadata["who"] == "me"
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    read.clear()
    assert list(load(tmp_path / "many.safetensors", only=lambda name: name == "layer.3")[0]) == ["layer.3"] and read == [128]


def test_header_is_read_without_the_tensors(tmp_path, monkeypatch):
    save(tmp_path / "x.safetensors", TENSORS)
    monkeypatch.setattr(files, "safe_open", None)  # only load may use it
    assert len(read_header(tmp_path / "x.safetensors").tensors) == 2


BAD = {
    "empty": (b"", "is empty"),
    "html": (b"<!DOCTYPE html><html><body>Sign in</body></html>" * 20, "web page"),
    "html with a space": (b"\xef\xbb\xbf \n<HTML>" + b" " * 99, "web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "git-LFS pointer"),
    "text": (b"Entry not found, sorry", "start makes no sense"),
    "short": (b"\x05\0\0", "start makes no sense"),
    "absurd length": (raw({}, length=1 << 60), "start makes no sense"),
    "length over the limit": (raw({}, length=100_000_001), "start makes no sense"),
    "pickle": (b"\x80\x02}q\x00" + b"x" * 40, "PyTorch file"),
    "zip": (b"PK\x03\x04" + b"x" * 40, "PyTorch file"),
    "only a length": (struct.pack("<Q", 400), "cut off inside its header"),
    "cut header": (raw({"a": entry(0, 4)}, length=400), "cut off inside its header"),
    "no JSON": (raw(b"{nothing"), "header cannot be read"),
    "no text": (raw(b"{\xff\xfe\xff"), "header cannot be read"),
    "deep JSON": (raw(b'{"a":' + b"[" * 100_000), "header cannot be read"),
    "metadata no text": (raw({"__metadata__": {"a": 1}}), "header cannot be read"),
    "metadata a list": (raw({"__metadata__": [1]}), "header cannot be read"),
    "no dict": (raw({"a": 3}), "broken header entry for a"),
    "no offsets": (raw({"a": {"dtype": "U8", "shape": [4]}}, b"1234"), "broken header entry for a"),
    "three offsets": (raw({"a": entry(0, 4, data_offsets=[0, 2, 4])}, b"1234"), "broken header entry for a"),
    "fractions": (raw({"a": entry(0, 4, shape=[4.0])}, b"1234"), "broken header entry for a"),
    "negative offset": (raw({"a": entry(-4, 0)}, b"1234"), "negative"),
    "end before begin": (raw({"a": entry(0, 4, data_offsets=[4, 0])}, b"1234"), "negative"),
    "negative size": (raw({"a": entry(0, 4, shape=[-4])}, b"1234"), "negative"),
    "wrong size": (raw({"a": entry(0, 4, shape=[3])}, b"1234"), "does not fit"),
    "overlap": (raw({"a": entry(0, 4), "b": entry(2, 6)}, b"123456"), "overlapping tensors at b"),
    "gap": (raw({"a": entry(0, 2), "b": entry(3, 6)}, b"123456"), "gap"),
    "truncated": (raw({"a": entry(0, 4), "b": entry(4, 9)}, b"12345678"), "cut off: it has .* bytes of"),
    "too long": (raw({"a": entry(0, 4)}, b"12345"), "1 bytes too many"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_with_one_sentence(name, tmp_path):
    content, reason = BAD[name]
    path = tmp_path / "my adapter.safetensors"
    path.write_bytes(content)
    for function in (read_header, check_file, load):
        with pytest.raises(LikenessError, match=reason) as caught:
            function(path)
        text = str(caught.value)
        assert text.startswith("The file my adapter.safetensors ") and text.endswith(".") and "\n" not in text
        assert ": " in text  # what to do comes after the colon


def test_missing_file_and_folder(tmp_path):
    for function in (read_header, check_file, load, sha256):
        with pytest.raises(LikenessError, match="gone.safetensors does not exist: check"):
            function(tmp_path / "gone.safetensors")
        with pytest.raises(LikenessError, match="is a folder: choose a file"):
            function(tmp_path)


def test_pickles_are_only_checked_for_what_they_are_not(tmp_path):
    path = tmp_path / "encoder.bin"
    torch.save({"a": torch.ones(2)}, path)
    check_file(path)
    path.write_bytes(BAD["lfs"][0])
    with pytest.raises(LikenessError, match="git-LFS"):
        check_file(path)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_cut_of_a_good_file_passes(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("cut") / "x.safetensors"
    save(path, TENSORS)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(LikenessError):
        read_header(path)


@settings(max_examples=60, deadline=None)
@given(start=st.binary(max_size=80), text=st.text(max_size=60))
def test_any_bytes_are_refused_or_read_but_never_crash(start, text, tmp_path_factory):
    path = tmp_path_factory.mktemp("any") / "x.safetensors"
    for content in (start, raw(b"{" + text.encode()), raw({text: start.hex()})):
        path.write_bytes(content)
        try:
            assert isinstance(read_header(path), Header)
        except LikenessError:
            pass


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_damaged_header_is_refused_or_still_tells_the_truth(data, tmp_path_factory):
    """Bytes of a good header changed at random: what passes can be loaded, and is as large as the header says."""
    path = tmp_path_factory.mktemp("damaged") / "x.safetensors"
    save(path, TENSORS, {"method": "custany"})
    content = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    for place, byte in data.draw(st.lists(st.tuples(st.integers(0, end - 1), st.integers(0, 255)), min_size=1, max_size=4)):
        content[place] = byte
    path.write_bytes(content)
    try:
        header, (tensors, _) = read_header(path), load(path)
    except LikenessError:
        return
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: info.shape for name, info in header.tensors.items()}


def test_sha256_of_several_blocks(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(content)
    assert sha256(tmp_path / "x") == hashlib.sha256(content).hexdigest()


def test_views_and_shared_tensors_are_saved(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "t": base.T,
        "row": base[1],
        "same": base,
        "again": base,
        "scalar": torch.tensor(2.0),
        "grad": torch.nn.Parameter(torch.ones(2)),
    }
    save(tmp_path / "x.safetensors", tensors)
    loaded, _ = load(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor.detach()), name
    assert (tmp_path / "x.safetensors").stat().st_size < 1000  # a row is not saved with its whole base


@pytest.mark.parametrize("step", ("save_file", "fsync", "replace"))
@pytest.mark.parametrize("error", (OSError("disk full"), KeyboardInterrupt()))
def test_a_failed_save_leaves_the_old_file_and_no_rest(step, error, tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save(path, TENSORS, {"version": "1"})
    old = path.read_bytes()
    real = files.save_file

    def fail(*args, **kwargs):
        if step == "save_file":
            real(*args, **kwargs)  # part of the file is already there
        raise error

    monkeypatch.setattr(files, "save_file", fail) if step == "save_file" else monkeypatch.setattr(
        os, step, fail
    )
    with pytest.raises(type(error)):
        save(path, {"c": torch.zeros(3)}, {"version": "2"})
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_the_new_file_appears_in_one_step(tmp_path, monkeypatch):
    """Until the rename the old file is whole; the new one is whole and flushed before it takes the name."""
    path, steps = tmp_path / "x.safetensors", []
    save(path, TENSORS)
    old, replace, fsync = path.read_bytes(), os.replace, os.fsync

    def watch(source, target):
        assert path.read_bytes() == old and os.path.dirname(source) == str(tmp_path)
        assert set(read_header(source).tensors) == {"c"}
        steps.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    monkeypatch.setattr(os, "fsync", lambda number: (steps.append("fsync"), fsync(number)))
    save(path, {"c": torch.zeros(3)})
    assert steps == ["fsync", "replace"] and set(load(path)[0]) == {"c"}


@pytest.mark.skipif(sys.platform == "win32", reason="rights of another kind")
def test_saved_files_have_ordinary_rights(tmp_path):
    save(tmp_path / "x.safetensors", TENSORS)
    (tmp_path / "plain").write_bytes(b"")
    rights = [stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("x.safetensors", "plain")]
    assert rights[0] == rights[1]


def test_loaded_tensors_do_not_hang_on_the_file(tmp_path):
    path = tmp_path / "x.safetensors"
    save(path, TENSORS)
    tensors, _ = load(path)
    path.write_bytes(b"\0" * path.stat().st_size)  # in place: a mapped tensor would change
    assert torch.equal(tensors["a.weight"], TENSORS["a.weight"])


def test_a_header_length_that_looks_like_a_pickle_is_read(tmp_path):
    """0x0280 bytes of header: the file's first two bytes are those of a protocol 2 pickle."""
    path = tmp_path / "odd.safetensors"
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(0x0280)
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert files.read_header(path).tensors["a"].shape == (1,)
