"""Folders of training pictures: each bad row is named, good ones come out cut, shuffled and turned."""
from __future__ import annotations

import json
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from likeness.models.common.errors import LikenessError
from likeness.models.training.config import TrainConfig
from likeness.models.training.custany import CustAnyTask, folder_source
from likeness.models.training.data import FolderData, augment_reference, validate
from likeness.models.training.loop import train
from unit.training_toy import CONFIG, ToyBase, settings

GOOD = {"reference": "r.png", "mask": "m.png", "target": "t.png", "caption": "a Cat on grass",
        "category": "cat"}


@pytest.fixture
def folder(tmp_path):
    """A red square on blue with its mask; a target that is wider than high, green in its middle."""
    red = np.zeros((40, 60, 3), np.uint8)
    red[..., 2] = 255
    red[10:20, 30:50] = (255, 0, 0)
    mask = np.zeros((40, 60), np.uint8)
    mask[10:20, 30:50] = 255
    target = np.zeros((32, 64, 3), np.uint8)
    target[:, 16:48] = (0, 255, 0)
    Image.fromarray(red).save(tmp_path / "r.png")
    Image.fromarray(mask).save(tmp_path / "m.png")
    Image.fromarray(target).save(tmp_path / "t.png")
    return tmp_path


def write(folder, *rows) -> None:
    text = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(text) + "\n", encoding="utf-8")


def rgb(pixels) -> list[float]:
    return [round(value, 2) for value in pixels.tolist()]


def test_good_rows_and_what_they_give(folder):
    write(folder, GOOD, "", {key: value for key, value in GOOD.items() if key != "mask"} | {"subject": "tom"})
    assert validate(folder) == []
    data = FolderData(folder, size=16, reference_size=24, augment=False)
    batch = data.batch(2, torch.Generator().manual_seed(0))
    assert batch.captions == ["a Cat on grass"] * 2 and batch.words == ["cat"] * 2
    assert batch.reference.shape == (2, 3, 24, 24) and batch.target.shape == (2, 3, 16, 16)
    assert batch.latents is None and batch.features is None and batch.embeds is None
    order = [data.rows[index].mask is not None for index in data.order.tolist()]
    cut, whole = batch.reference[order.index(True)], batch.reference[order.index(False)]
    assert rgb(cut[:, 12, 12]) == [1, 0, 0] and rgb(cut[:, 0, 12]) == [1, 1, 1]
    assert not (cut[2] > 0.5).logical_and(cut[0] < 0.5).any()  # nothing blue is left
    # The subject is twice as wide as high, and has a margin of a tenth on each side.
    assert (cut[1] < 0.5).float().mean().item() == pytest.approx(0.5 / 1.2 ** 2, abs=0.04)
    assert rgb(whole[:, 12, 5]) == [0, 0, 1]
    assert batch.target[:, 1].mean() > 0.97 and batch.target[:, 0].max() == 0  # the middle of the wide target
    assert [(row.line, row.subject) for row in data.rows] == [(1, ""), (3, "tom")]


def test_margin_and_background_are_the_adapters(folder):
    write(folder, GOOD)
    config = CONFIG._replace(background="grey", margin=0.0, resolutions=(8, 20))
    data = folder_source(folder, config, TrainConfig(reference_augment=False), size=16)
    cut = data.batch(1, torch.Generator()).reference[0]
    assert cut.shape == (3, 20, 20) and rgb(cut[:, 0, 10]) == [0.5] * 3
    assert (cut[1] < 0.25).float().mean().item() == pytest.approx(0.5, abs=0.08)
    assert folder_source(folder, config, TrainConfig(), size=16).augment


def save(folder, name, array) -> str:
    Image.fromarray(array).save(folder / name)
    return name


def spoil(path, chunk: bytes, name: str, at: int) -> None:
    """A copy of a PNG with one changed byte in its last chunk of that kind, whose checksum is right."""
    data = bytearray(path.read_bytes())
    start = data.rfind(chunk)
    end = start + 4 + int.from_bytes(data[start - 4:start], "big")
    data[start + at] ^= 128
    data[end:end + 4] = zlib.crc32(data[start:end]).to_bytes(4, "big")
    (path.parent / name).write_bytes(data)


def bad_rows(folder) -> list[tuple[object, str]]:
    (folder / "text.png").write_text("<html>not a picture</html>")
    (folder / "cut.png").write_bytes((folder / "r.png").read_bytes()[:60])
    (folder / "empty.png").write_bytes(b"")
    save(folder, "small.png", np.full((20, 30), 255, np.uint8))
    save(folder, "black.png", np.zeros((40, 60), np.uint8))
    save(folder, "clear.png", np.zeros((40, 60, 4), np.uint8))
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(folder / "turned.png", exif=exif)
    spoil(folder / "turned.png", b"eXIf", "noexif.png", 4)   # PIL names what is broken here with a SyntaxError
    noise = np.random.default_rng(0).integers(0, 255, (200, 300, 3), np.uint8)   # large enough for several chunks
    Image.fromarray(noise).save(folder / "large.png")
    spoil(folder / "large.png", b"IDAT", "chunk.png", 0)
    return [
        ("{broken", "not JSON"), ("[1]", "not JSON"),
        ({"reference": "r.png", "target": "t.png", "caption": "a cat"}, "'category' is missing"),
        (GOOD | {"caption": 5}, "'caption' is missing"), (GOOD | {"mask": 3}, "'mask'"),
        (GOOD | {"reference": "gone.png"}, "reference gone.png does not exist"),
        (GOOD | {"mask": "gone.png"}, "mask gone.png does not exist"),
        (GOOD | {"target": "text.png"}, "target text.png cannot be read"),
        (GOOD | {"reference": "cut.png"}, "reference cut.png cannot be read"),
        (GOOD | {"mask": "empty.png"}, "mask empty.png cannot be read"),
        (GOOD | {"mask": "noexif.png"}, "mask noexif.png cannot be read (not a TIFF file"),
        (GOOD | {"target": "chunk.png"}, "target chunk.png cannot be read (broken PNG file"),
        (GOOD | {"mask": "small.png"}, "the mask is 30 x 20, but the reference is 60 x 40"),
        (GOOD | {"mask": "black.png"}, "the mask is empty"),
        (GOOD | {"mask": None, "reference": "clear.png"}, "transparent"),
        (GOOD | {"category": "dog"}, "'dog' does not stand in the caption"),
        (GOOD | {"category": "ca"}, "'ca' does not stand"),
        (GOOD | {"category": "at"}, "'at' does not stand"),
        (GOOD | {"target": "../t.png"}, "outside the folder"),
    ]


def test_each_bad_row_is_named(folder):
    bad = bad_rows(folder)
    write(folder, GOOD, *(row for row, _ in bad), GOOD)
    report = validate(folder)
    assert [line.split(":")[0] for line in report] == [f"line {number}" for number in range(2, 2 + len(bad))]
    for line, (_, reason) in zip(report, bad, strict=True):
        assert reason in line


def test_all_faults_of_a_row_stand_in_its_line(folder):
    write(folder, GOOD | {"category": "dog", "target": "gone.png"})
    [line] = validate(folder)
    assert "dog" in line and "gone.png" in line


def test_training_refuses_bad_rows_or_leaves_them_out(folder, caplog):
    write(folder, GOOD, GOOD | {"category": "dog"}, "{", GOOD | {"category": "CAT", "caption": "the cat."})
    with pytest.raises(LikenessError, match="2 of 4 rows.*line 2.*line 3"):
        FolderData(folder)
    data = FolderData(folder, skip_bad=True)
    assert [row.line for row in data.rows] == [1, 4] and caplog.text.count("leaves out") == 2
    write(folder, "{")
    with pytest.raises(LikenessError, match="no usable row"):
        FolderData(folder, skip_bad=True)
    (folder / "metadata.jsonl").unlink()
    for call in (validate, FolderData):
        with pytest.raises(LikenessError, match="metadata.jsonl"):
            call(folder)


def test_unchecked_pictures_are_named_when_they_fail(folder):
    (folder / "cut.png").write_bytes((folder / "r.png").read_bytes()[:60])
    write(folder, GOOD | {"reference": "cut.png"})
    assert validate(folder, pictures=False) == []
    with pytest.raises(LikenessError, match="Line 1 "):
        FolderData(folder, pictures=False).batch(1, torch.Generator())
    write(folder, GOOD | {"mask": save(folder, "black.png", np.zeros((40, 60), np.uint8))})
    with pytest.raises(LikenessError, match="Line 1 .*empty"):
        FolderData(folder, pictures=False).batch(1, torch.Generator())


def test_odd_pictures_are_read(folder):
    rgba = np.zeros((40, 60, 4), np.uint8)
    rgba[..., 0], rgba[10:20, 30:50, 3] = 255, 255
    deep = np.zeros((40, 60), np.uint16)
    deep[10:20, 30:50] = 65535
    mask = np.array(Image.open(folder / "m.png"))
    turned = Image.fromarray(np.rot90(mask).copy())  # stands upright by its EXIF entry only
    exif = Image.Exif()
    exif[274] = 6
    turned.save(folder / "turned.png", exif=exif)
    grey = save(folder, "grey.png", np.full((8, 8), 128, np.uint8))
    write(folder, GOOD | {"reference": save(folder, "alpha.png", rgba), "mask": None},
          GOOD | {"mask": save(folder, "deep.png", deep)}, GOOD | {"mask": "turned.png"},
          GOOD | {"target": grey})
    assert validate(folder) == []
    data = FolderData(folder, size=16, reference_size=24, augment=False)
    red = [data._load(row)[0].float() / 255 for row in data.rows]
    for cut in red:
        assert torch.allclose(cut, red[1], atol=0.02)
    assert data._load(data.rows[3])[1].unique().tolist() == [128]


def many(folder, n: int) -> list[str]:
    captions = [f"a cat number {index}" for index in range(n)]
    write(folder, *(GOOD | {"caption": caption} for caption in captions))
    return captions


def test_each_epoch_takes_every_row_in_a_new_order(folder):
    captions = many(folder, 7)
    data, generator = FolderData(folder, 8, 8, augment=False), torch.Generator().manual_seed(0)
    seen = [caption for _ in range(7) for caption in data.batch(3, generator).captions]
    epochs = [seen[start:start + 7] for start in (0, 7, 14)]
    assert all(sorted(epoch) == captions for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = FolderData(folder, 8, 8, augment=False)
    assert again.batch(21, torch.Generator().manual_seed(0)).captions == seen
    assert FolderData(folder, 8, 8).batch(21, torch.Generator().manual_seed(1)).captions != seen


def test_position_in_the_epoch_is_kept(folder):
    many(folder, 7)
    whole, generator = FolderData(folder, 8, 8), torch.Generator().manual_seed(0)
    whole.batch(4, generator)
    state, chance = json.loads(json.dumps(whole.state_dict())), generator.get_state()
    expected = whole.batch(9, generator)
    other = FolderData(folder, 8, 8)
    other.load_state_dict(state)
    generator.set_state(chance)
    got = other.batch(9, generator)
    assert got.captions == expected.captions and torch.equal(got.reference, expected.reference)
    many(folder, 6)
    with pytest.raises(LikenessError, match="7 training rows.*6"):
        FolderData(folder, 8, 8).load_state_dict(state)


def test_training_from_a_folder_resumes(folder, tmp_path):
    many(folder, 5)

    def start(out, stop=None):
        cfg = settings(steps=4, save_every=100)
        task = CustAnyTask(ToyBase(), CONFIG, cfg)
        train(task, cfg, FolderData(folder, 8, 8), tmp_path / out, should_stop=stop)
        return task
    calls = iter((False, True))
    whole = start("whole")
    start("parts", lambda: next(calls))
    for a, b in zip(whole.adapter.parameters(), start("parts").adapter.parameters(), strict=True):
        assert torch.equal(a, b)


def test_augmentation_moves_the_subject_and_keeps_the_ground():
    picture = torch.ones(64, 3, 32, 32)
    picture[:, :, 12:20, 12:18] = torch.tensor([1.0, 0, 0]).view(3, 1, 1)
    out = augment_reference(picture, torch.Generator().manual_seed(0))
    assert out.shape == picture.shape and out.min() >= 0 and out.max() <= 1
    assert torch.equal(out, augment_reference(picture, torch.Generator().manual_seed(0)))
    assert out[:, :, 0].min() == 1  # white comes in from the border
    weight = 1 - out[:, 1]
    area = weight.sum((1, 2)) / 48
    assert 0.7 < area.min() < 0.85 and 1.1 < area.max() < 1.25
    place = torch.arange(32.0)
    x, y = ((weight.sum(axis) * place).sum(1) / weight.sum((1, 2)) for axis in (1, 2))
    assert x.std() > 0.5 and y.std() > 0.5 and (x - 14.5).abs().max() < 5
    grey = torch.full((2, 3, 8, 8), 0.5)
    assert torch.equal(augment_reference(grey, torch.Generator(), "grey"), grey)


def test_augmentation_mirrors_and_turns():
    picture = torch.ones(200, 3, 32, 32)
    picture[:, :, 8:24, 16] = 0  # an upright line with a foot to the right
    picture[:, :, 23, 16:24] = 0
    ink = 1 - augment_reference(picture, torch.Generator().manual_seed(1))[:, 0]
    place = torch.arange(32.0)
    column = lambda rows: (ink[:, rows].sum(1) * place).sum(1) / ink[:, rows].sum((1, 2))  # noqa: E731
    upper, foot = column(slice(6, 16)), column(slice(20, 28))
    left = (foot < upper).float().mean()
    assert 0.35 < left < 0.65
