"""The nodes of PhotoMaker and InstantID: files from their folders, what they give, and their sentences."""
from __future__ import annotations

import shutil

import pytest
import torch

from host.portraits import BUFFALO, PROMPT, TRIGGERED, faces, file, pictures
from host.support import base, encode
from likeness.models.common.errors import LikenessError


@pytest.fixture(autouse=True)
def folders(nodes, tmp_path, monkeypatch):
    """Model folders with the three files under other names."""
    import folder_paths

    for name, kinds in (("photomaker", ("v1", "v2")), ("instantid", ("instantid",))):
        (tmp_path / name).mkdir()
        for kind in kinds:
            shutil.copy(file(kind), tmp_path / name / f"my {kind}.bin")
        entry = ([str(tmp_path / name)], folder_paths.supported_pt_extensions)
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, entry)
        folder_paths.filename_list_cache.pop(name, None)
    yield tmp_path
    for name in ("photomaker", "instantid"):  # the host would go on serving the test's list
        folder_paths.filename_list_cache.pop(name, None)


def run(nodes, name, *values, **named):
    with torch.inference_mode():
        return nodes[f"Likeness_{name}"].execute(*values, **named).args


def test_the_folders_are_listed(nodes):
    def choices(name):
        return next(item for item in nodes[f"Likeness_{name}"].define_schema().inputs if item.id == "file").options
    assert choices("LoadPhotoMaker") == ["my v1.bin", "my v2.bin"] and choices("LoadInstantID") == ["my instantid.bin"]


def test_photomaker(nodes):
    model = base("sdxl")[0]
    for version, more in ((1, {}), (2, {"faces": faces(1, 2, space=BUFFALO)})):
        maker, with_lora, text = run(nodes, "LoadPhotoMaker", f"my v{version}.bin", model, 1.0)
        assert f"PhotoMaker v{version}" in text and with_lora is not model
        assert ("buffalo_l" in text) == (version == 2)
        positive, free, text, found = run(nodes, "PhotoMakerEncode", maker, base("sdxl")[1], pictures(2), TRIGGERED, "img", 0.2,
                                          1.0, "error", **more)
        assert len(positive) == 2 and len(free) == 1 and found and f"class word \"woman\" {2 * version} times" in text


def test_instantid(nodes):
    instantid, text = run(nodes, "LoadInstantID", "my instantid.bin")
    assert "4 tokens a face, 70 layers" in text and "antelopev2" in text
    pair = encode("sdxl", PROMPT), encode("sdxl", "blurry")
    out = run(nodes, "InstantIDApply", base("sdxl")[0], *pair, instantid, faces(1), 0.8, 0.8, 0.0, 1.0, "average", "all", "error")
    model, positive, negative, free, text, found = out
    assert model is not base("sdxl")[0] and found and "70 layers" in text and len(positive) == len(negative) == len(free) == 1


@pytest.mark.parametrize("name", ["LoadPhotoMaker", "LoadInstantID"])
def test_missing_files(nodes, folders, name):
    cls = nodes[f"Likeness_{name}"]
    folder = "photomaker" if name == "LoadPhotoMaker" else "instantid"
    model = (base("sdxl")[0], 1.0) if name == "LoadPhotoMaker" else ()
    known = next(item for item in cls.define_schema().inputs if item.id == "file").options[0]
    assert cls.validate_inputs() is True and cls.validate_inputs(known) is True
    assert "is not in" in cls.validate_inputs("gone.bin") and str(folders / folder) in cls.validate_inputs("gone.bin")
    before = cls.fingerprint_inputs(known)
    (folders / folder / known).write_bytes(b"another file")
    assert cls.fingerprint_inputs(known) != before
    with pytest.raises(LikenessError, match="gone.bin is not in"):
        run(nodes, name, "gone.bin", *model)
    with pytest.raises(LikenessError, match="cannot be read as weights"):
        run(nodes, name, known, *model)
    import folder_paths
    for path in (folders / folder).iterdir():
        path.unlink()
    folder_paths.filename_list_cache.pop(folder, None)
    nothing = f"(no file in models/{folder})"
    assert next(item for item in cls.define_schema().inputs if item.id == "file").options == [nothing]
    assert cls.validate_inputs(nothing).startswith("There is no model file for this node yet; put one into")
