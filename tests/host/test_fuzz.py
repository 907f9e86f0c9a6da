"""Anything an artist can plug in: the pack works, or says its own sentence, and nothing else ever comes out."""
from __future__ import annotations

import json
import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness import mini as mini_module
from host import face_support as faces
from host.support import CHANNELS, Strengths, base, encode, inject, inject_into, latent_of, plain, prompt, run, subject
from likeness.models.common import files
from likeness.models.common.errors import LikenessError
from likeness.models.common.masks import as_mask
from likeness.models.common.reference import prepare
from likeness.models.hosting import adapters, subjects
from likeness.models.hosting.prompt import encode_prompt, tokens_report

# The same examples each time, so that nobody's change turns red by luck; `dev.py test --fuzz` draws new ones, and more.
NEW = bool(os.environ.get("LIKENESS_FUZZ"))
TIMES = 10 if NEW else 1
FEW = settings(max_examples=25 * TIMES, deadline=None, derandomize=not NEW, database=None, print_blob=True,
               suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
MANY = settings(FEW, max_examples=60 * TIMES)
JSON = st.recursive(st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text(max_size=6) | st.just(10 ** 30),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
                    max_leaves=6)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.bool])


def own_sentence(error: LikenessError) -> None:
    text = str(error)
    assert text and text[-1] in ".!?" and len(text.split()) > 4


@pytest.fixture(autouse=True)
def _as_a_node():
    with torch.inference_mode():
        yield


def numbers(data: Any, shape: tuple[int, ...], wild: bool = False) -> torch.Tensor:
    """Noise of a drawn type; wild: out of range, with nan and infinity in it."""
    dtype = data.draw(DTYPES)
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    if dtype in (torch.uint8, torch.bool):
        return (noise * (255 if dtype == torch.uint8 else 2)).to(dtype)
    broken = data.draw(st.sampled_from([float("nan"), float("inf"), float("-inf"), None])) if wild else None
    if broken is not None and noise.numel():
        noise = noise * 6 - 3
        noise.view(-1)[::3] = broken
    return noise.to(dtype)


side = st.integers(1, 40)


def mask_shape(data: Any, batch: int, height: int, width: int) -> tuple[int, ...]:
    b, h, w = data.draw(st.sampled_from([1, batch])), data.draw(side), data.draw(side)
    if data.draw(st.booleans()):
        h, w = height, width
    return data.draw(st.sampled_from([(h, w), (b, h, w), (b, 1, h, w), (b, h, w, 1), (b + 1, h, w), (0, h, w), (h,)]))


@MANY
@given(data=st.data())
def test_masks(data):
    batch, height, width = data.draw(st.integers(1, 3)), data.draw(side), data.draw(side)
    mask = numbers(data, mask_shape(data, batch, height, width), wild=True)
    try:
        out = as_mask(mask, batch, height, width)
    except LikenessError as error:
        return own_sentence(error)
    assert out.shape == (batch, height, width) and out.dtype == torch.float32
    assert bool(((out >= 0) & (out <= 1)).all())


@FEW
@given(data=st.data())
def test_pictures(data, mini):
    batch, height, width = data.draw(st.integers(0, 3)), data.draw(side), data.draw(side)
    image = numbers(data, (batch, height, width, data.draw(st.sampled_from([1, 2, 3, 4]))), wild=True)
    mask = numbers(data, mask_shape(data, batch, height, width), wild=True) if data.draw(st.booleans()) else None
    missing, margin = data.draw(st.sampled_from(["error", "pass through"])), data.draw(st.floats(0, 1))
    try:
        cut = prepare(image, mask, "subject on white", margin, data.draw(st.sampled_from([0, 8, 64])), missing)
        combine = data.draw(st.sampled_from(adapters.PAIRINGS))
        got = subjects.extract_from_picture(mini.adapter, mini.encoders, image, mask, combine, margin, missing)
    except LikenessError as error:
        return own_sentence(error)
    assert cut.image.shape[0] == batch > 0 and cut.image.shape[1] == cut.image.shape[2] and len(cut.found) == batch
    assert torch.isfinite(cut.image).all()
    assert got.found == any(cut.found) and (got.subject.pictures > 0) == got.found
    assert all(bool(torch.isfinite(t).all()) for _, t in got.subject.tokens) and torch.isfinite(got.picture).all()


def broken(what: str) -> torch.Tensor:
    """A picture with a face whose every seventh number is `what`, or none at all."""
    image = faces.picture(faces=faces.TWO)
    if what == "no picture":
        return image[:0]
    if what == "no pixels":
        return image[:, :0]
    image.view(-1)[::7] = float(what)
    return image


@pytest.mark.parametrize("what", ["nan", "inf", "-inf", "no picture", "no pixels"])
def test_broken_pictures_through_the_nodes(nodes, mini, tmp_path, monkeypatch, what):
    import folder_paths

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    image, source = broken(what), faces.only(faces.analysed(faces.picture(faces=faces.TWO)))
    mask, paste = torch.ones(1, 480, 640), (2, "box", 1.0, 0.5, 1.0, "pass through", "in turn", 0.15, 0, "640", 0.5)
    calls = [
        *(("PrepareReference", image, preset, 0.1, 64, "error", mask) for preset in ("subject on white", "CustomNet")),
        ("ExtractID", mini.adapter, mini.encoders, image, "concat", "error"),
        ("Placement", 0.1, 0.1, 0.8, 0.8, "object", "stretched", 64, 64, "error", None, None, image),
        ("AnalyzeFaces", faces.models(), image, "640", 0.5, "pass through"),
        ("SwapFaces", faces.swapper(), image, source, *paste, faces.models()),
        ("SwapFaces", faces.swapper(), image, source, *paste, None, faces.analysed(faces.picture(faces=faces.TWO))),
    ]
    for name, *values in calls:
        try:
            out = nodes[f"Likeness_{name}"].execute(*values).args
        except LikenessError as error:
            assert what.startswith("no "), f"{name}: {error}"
            own_sentence(error)
            continue
        assert not what.startswith("no "), name
        shown = [part for part in out if isinstance(part, torch.Tensor)]
        if name == "SwapFaces":  # what the mask leaves alone stays to the bit, as broken as it came
            inside = (out[1] > 0)[..., None].expand_as(out[0])
            assert torch.equal(out[0][~inside].view(torch.int32), image[~inside].view(torch.int32))
            shown = [out[0][inside], out[1]]
        assert shown and all(bool(torch.isfinite(part).all()) for part in shown), name


PIECES = st.sampled_from(["cat", "a", " ", "(", ")", "((", "))", "\\(", "\\)", "\\", ":1.2", ":", "[", "]", "{a|b}", "<lora:x:1>",
                          "embedding:none", "\u72d0\u72f8", "\u00e9", "\U0001f98a", "\u200d", "\u0130", "\n", "\t", ",", "BREAK",
                          "1.5)", "\u0000", "\u202e", "'", '"'])


@pytest.mark.parametrize("kind", ["sd15", "mini"])
@MANY
@given(data=st.data())
def test_prompts(kind, data):
    text = "".join(data.draw(st.lists(PIECES | st.text(max_size=5), max_size=12)))
    word = data.draw(st.sampled_from(["cat", text, text[:3], text[3:6]]) | st.text(max_size=6))
    clip = base(kind)[1]
    try:
        conditioning, place, found = encode_prompt(clip, text, word, data.draw(st.integers(0, 3)), None,
                                                   data.draw(st.sampled_from(["error", "pass through"])))
    except LikenessError as error:
        return own_sentence(error)
    assert found == bool(place.columns) and tokens_report(place)
    if found:
        assert max(place.columns) < conditioning[0][0].shape[1]
        assert torch.equal(place.rows, conditioning[0][0][0, list(place.columns)])


@pytest.mark.parametrize("kind", ["sd15", "mini"])
@FEW
@given(before=st.lists(PIECES, max_size=5), after=st.lists(PIECES, max_size=5))
def test_a_word_that_stands_alone_is_found_in_any_company(kind, before, after):
    text = "".join(before) + " , duck , " + "".join(after)
    assert encode_prompt(base(kind)[1], text, "duck", 0, None, "pass through")[2], text


@MANY
@given(data=st.data())
def test_metadata_of_adapters(data, mini):
    state, metadata = adapter_parts(mini)
    name, value = data.draw(st.sampled_from(sorted(metadata))), data.draw(JSON)
    if name == "likeness.custany" and data.draw(st.booleans()):
        fields = json.loads(metadata[name])
        fields[data.draw(st.sampled_from(sorted(fields)))] = value
        value = fields
    metadata = {**metadata, name: json.dumps(value) if data.draw(st.booleans()) else data.draw(st.text(max_size=20))}
    try:
        adapter = adapters.make_adapter(state, metadata, "0" * 64, "fuzzed")
        assert adapters.wanted_encoders(adapter)
    except LikenessError as error:
        own_sentence(error)


def adapter_parts(mini: Any) -> tuple[dict, dict]:
    return files.load(mini.folder / mini_module.ADAPTER)


@MANY
@given(data=st.data())
def test_saved_subjects(data, mini, tmp_path_factory):
    """A damaged subject is refused; what is taken can be injected."""
    path = tmp_path_factory.getbasetemp() / "subject.safetensors"
    width, few = mini.adapter.config.width, st.integers(0, 3)
    shape = st.tuples(few, few, st.sampled_from([width, 1])) | st.tuples(few, few) | st.just((1, 2, width))
    tokens = {name: numbers(data, data.draw(shape), wild=True) for name in ("global", "local") if data.draw(st.integers(0, 9))}
    metadata = {"format": subjects.FORMAT, "format_version": "1", "method": "custany", "base": "miniature", "width": str(width),
                "pairing": "all", "adapter_hash": mini.adapter.sha256, "encoder_hash": mini.encoders.hash, "pictures": "1"}
    if data.draw(st.booleans()):
        metadata[data.draw(st.sampled_from(sorted(metadata)))] = data.draw(st.text(max_size=8) | st.sampled_from(["2", "\u00b2"]))
    files.save(path, tokens, metadata)
    try:
        subject, report = subjects.load_subject(path, mini.adapter, mini.encoders, data.draw(st.booleans()))
    except LikenessError as error:
        return own_sentence(error)
    assert report and subject.pictures > 0
    assert all(bool(torch.isfinite(t).all()) for _, t in subject.tokens)
    assert adapters.project(subject, [mini.adapter.config.layers[0][0]])


wide = st.integers(1, 128)


def sound(data: Any, *shape: int) -> torch.Tensor:
    """Noise that nothing may refuse: between 0.2 and 1, in a type that models and their pictures have."""
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    return (noise * 0.8 + 0.2).to(data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])))


def sound_mask(data: Any, count: int, height: int, width: int) -> torch.Tensor:
    """In any layout that a MASK may have, of its own size or the picture's; its right half at least holds the subject."""
    if data.draw(st.booleans()):
        height, width = data.draw(wide), data.draw(wide)
    mask = sound(data, count, height, width)
    if data.draw(st.booleans()):
        mask[..., :width // 2] = 0
    forms = [mask, mask[:, None], mask[..., None], *([mask[0]] if count == 1 else [])]
    return data.draw(st.sampled_from(forms))


@FEW
@given(data=st.data())
def test_sound_pictures_are_never_refused(data, mini):
    batch, height, width = data.draw(st.integers(1, 3)), data.draw(wide), data.draw(wide)
    image = sound(data, batch, height, width, data.draw(st.sampled_from([1, 2, 3, 4])))
    mask = sound_mask(data, data.draw(st.sampled_from([1, batch])), height, width) if data.draw(st.booleans()) else None
    margin, size = data.draw(st.floats(0, 1)), data.draw(st.sampled_from([0, 8, 64]))
    combine = data.draw(st.sampled_from(adapters.PAIRINGS))
    cut = prepare(image, mask, "subject on white", margin, size, "error")
    side = cut.image.shape[1]
    assert cut.image.shape == (batch, side, side, 3) and cut.mask.shape == (batch, side, side) and size in (0, side)
    assert torch.isfinite(cut.image).all() and torch.isfinite(cut.mask).all() and cut.found == (True,) * batch
    got = subjects.extract_from_picture(mini.adapter, mini.encoders, image, mask, combine, margin, "error")
    rows, config = 1 if combine == "average" else batch, mini.adapter.config
    assert got.found and got.subject.pictures == rows and got.picture.shape == (batch, *[max(config.resolutions)] * 2, 3)
    assert got.subject.get("global").shape == (rows, len(config.encoders), config.width)
    assert got.subject.get("local").shape[::2] == (rows, config.width)
    assert all(bool(torch.isfinite(t).all()) for _, t in got.subject.tokens) and torch.isfinite(got.picture).all()


@settings(FEW, max_examples=12 * TIMES)
@given(data=st.data())
def test_sizes_of_pictures(data):
    """Any latent with any mask samples to finite numbers."""
    batch, height, width = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 11)), data.draw(st.integers(2, 11))
    mask = numbers(data, (data.draw(st.integers(1, 4)), data.draw(side), data.draw(side)), wild=True)
    try:  # an empty mask is refused by the injector, more masks than pictures while sampling
        out = run(inject_into(base("sd15")[0], mask=mask), latent=latent_of("sd15", batch, height, width), steps=1)
    except LikenessError as error:
        return own_sentence(error)
    assert out.shape == (batch, 4, height, width) and bool(torch.isfinite(out).all())


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "mini"])
@settings(FEW, max_examples=8 * TIMES)
@given(data=st.data())
def test_any_references_act_on_any_latents(kind, data):
    """Whether they go to a latent each or all to all: nothing is refused, and something of them is in the picture."""
    references, batch = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    pairing = data.draw(st.sampled_from(subjects.PAIRINGS)) if references <= batch else "all"
    height = data.draw(wide)
    width = data.draw(st.integers(1, 256 // height))  # so many cells that it takes seconds
    latent = sound(data, batch, CHANNELS[kind], height, width)
    mask = sound_mask(data, data.draw(st.integers(1, batch)), height, width) if data.draw(st.booleans()) else None
    positive, word = prompt(kind)
    done = inject(base(kind)[0], positive, encode(kind, "blurry"), subject(kind, n=references, pairing=pairing), word,
                  Strengths(1.0, 1.0), mask=mask)
    out = run(done, kind=kind, latent=latent)
    assert out.shape == latent.shape and bool(torch.isfinite(out).all())
    assert not torch.equal(out, plain(kind, latent=latent)), "the subject does nothing"
