"""PhotoMaker in the host: the right rows, the identity in them by its formula, its LoRA, and core's own object beside ours."""
from __future__ import annotations

import gc
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import portraits
from host.portraits import ANTELOPE, BUFFALO, TRIGGERED, encoded, face, faces, file, photomaker, pictures, weights
from host.support import base, comfy, comfy_extras, encode, folder, sample
from likeness.models.common.errors import LikenessError
from likeness.models.hosting import portrait_files
from likeness.models.hosting.portrait_files import load_instantid
from likeness.models.hosting.portrait_photomaker import encode_photomaker, load_photomaker
from likeness.models.hosting.portrait_prompt import stack
from likeness.models.portrait.weights import part
from unit.test_portrait import fuse, gelu, linear, norm, perceiver, tower

TINY = portraits.TINY
FREE = "a woman in the rain"
LAYERS = 70 * 2 * 4  # blocks, attentions, matrices


@pytest.fixture(autouse=True)
def _as_a_node():
    with torch.inference_mode():
        yield


def clip() -> Any:
    return base("sdxl")[1]


def identity(version: int, count: int, seed: int = 0) -> Tensor:
    """(k, width) by hand, from the file's tensors."""
    state = weights(f"v{version}")["id_encoder"]
    pixels = comfy.clip_vision.clip_preprocess(pictures(count, seed), 28).float()
    hidden, pooled = tower(pixels, part(state, "vision_model."), TINY)
    if version == 1:
        return torch.cat([linear(pooled, state, "visual_projection"), linear(pooled, state, "visual_projection_2")], -1)
    q = part(state, "qformer_perceiver.")
    embeddings = torch.stack([face(k).embedding for k in range(1, count + 1)])
    tokens = norm(linear(gelu(linear(embeddings, q, "token_proj.0")), q, "token_proj.2").reshape(count, 2, -1), q, "token_norm")
    return (tokens + perceiver(tokens, hidden, part(q, "perceiver_resampler."), 2, 2)).flatten(0, 1)


def fused(version: int, rows: Tensor, who: Tensor) -> Tensor:
    return fuse(rows, who, part(weights(f"v{version}")["id_encoder"], "fuse_module."))


# -- rows --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("version", "count"), [(1, 1), (1, 3), (2, 1), (2, 2)])
def test_the_class_word_stands_once_for_every_token_and_carries_them(version, count):
    many = count * version
    done = encoded(version, count, start=0.0)
    assert torch.equal(done.free[0][0], encode("sdxl", FREE)[0][0])
    repeated = encode("sdxl", "a" + " woman" * many + " in the rain")[0]
    got, columns = done.positive[0][0], list(range(2, 2 + many))  # start, a, woman
    others = [k for k in range(got.shape[1]) if k not in columns]
    assert torch.equal(got[:, others], repeated[0][:, others])
    torch.testing.assert_close(got[0, columns], fused(version, repeated[0][0, columns], identity(version, count)), atol=1e-3,
                               rtol=1e-3)
    assert torch.equal(done.positive[0][1]["pooled_output"], repeated[1]["pooled_output"])
    assert f"class word \"woman\" {many} time" in done.report and done.found


def test_pictures_stay_in_their_order():
    """Each token of the class word carries its own picture: another second picture changes the second token alone."""
    one, two = (encode_photomaker(photomaker(1)[0], clip(), pictures(3)[chosen], TRIGGERED, "img", None, 0.0).positive[0][0]
                for chosen in ([0, 1], [0, 2]))
    torch.testing.assert_close(one[0, 2], two[0, 2], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(one[0, 3], two[0, 3], atol=1e-3) and not torch.allclose(one[0, 2], one[0, 3], atol=1e-3)


def test_many_pictures_go_in_blocks_and_can_be_cancelled(monkeypatch):
    from likeness.models.hosting import portrait_photomaker
    whole = encoded(2, 3, start=0.0).positive[0][0]
    monkeypatch.setattr(portrait_photomaker, "CHUNK", 2)
    torch.testing.assert_close(encoded(2, 3, start=0.0).positive[0][0], whole, atol=1e-4, rtol=1e-4)
    asked = []

    def cancel():
        asked.append(True)
        if len(asked) == 2:
            raise comfy.model_management.InterruptProcessingException
    monkeypatch.setattr(portrait_photomaker, "stop_if_asked", cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        encoded(2, 3, start=0.0)
    monkeypatch.undo()
    assert torch.equal(encoded(2, 3, start=0.0).positive[0][0], whole)


@pytest.mark.parametrize("trigger", ["img", "photomaker", "Xyzzy person"])
def test_any_word_may_be_the_trigger(trigger):
    usual = encoded(start=0.0)
    other = encoded(text=f"a woman {trigger} in the rain", trigger=f" {trigger},", start=0.0)
    assert torch.equal(usual.positive[0][0], other.positive[0][0]) and torch.equal(usual.free[0][0], other.free[0][0])


def test_earlier_words_of_several_tokens_move_nothing():
    """Core counts words; the place is counted in tokens."""
    text = "extraordinarily photorealistic watercolour of a woman{} in the rain"
    done = encoded(text=text.format(" img"), start=0.0)
    plain = encode("sdxl", text.format(""))[0][0]
    differs = (done.positive[0][0] - plain).abs().amax((0, 2)).nonzero().flatten().tolist()
    window = [entry[0] for entry in clip().tokenize(text.format(""))["l"][0]]
    assert differs == [window.index(clip().tokenize("woman")["l"][0][1][0])] and differs[0] > 6


def test_a_prompt_weight_scales_what_comes_out_as_core_does():
    """Core turns a row z of weight w into (z - empty) * w + empty; z is the fused row here."""
    weighted = encoded(text="a (woman img:1.3) in the rain", start=0.0).positive[0][0]
    plain = encoded(start=0.0).positive[0][0]
    empty = encode("sdxl", "")[0][0]
    torch.testing.assert_close(weighted[0, 2], (plain[0, 2] - empty[0, 2]) * 1.3 + empty[0, 2], atol=1e-3, rtol=1e-3)
    assert torch.equal(encoded(text="a (woman img:1.3) in the rain", start=0.0).free[0][0],
                       encode("sdxl", "a (woman:1.3) in the rain")[0][0])


def test_a_full_window_hands_its_end_to_the_next():
    words = [f"{w}" for w in ("red", "blue", "green", "grey", "pink") for _ in range(15)]
    text = " ".join(["woman img", *words[:73]])
    prompt = stack(clip(), text, "img", 4)
    for key in ("l", "g"):
        before = [e[0] for w in clip().tokenize(text.replace(" img", ""))[key] for e in w]
        windows = [[e[0] for e in w] for w in prompt.tokens[key]]
        assert [len(w) for w in windows] == [77, 77]
        start, end = windows[0][0], windows[0][76]
        assert windows[0][:5] == [start, *[before[1]] * 4] and windows[1][0] == start
        content = [t for w in windows for t in w[1:w.index(end)]]
        assert content == [before[1]] * 3 + before[1:before.index(end)]
    assert prompt.columns == (1, 2, 3, 4)
    done = encoded(1, 4, text=text, start=0.0)
    assert done.positive[0][0].shape[1] == 154 and done.free[0][0].shape[1] == 77


def test_the_trigger_may_stand_in_a_later_window():
    text = " ".join(["blue"] * 80 + ["woman img in the rain"])
    prompt = stack(clip(), text, "img", 2)
    done = encoded(1, 2, text=text, start=0.0)
    assert prompt.columns[0] > 77
    plain = clip().encode_from_tokens_scheduled(prompt.tokens)[0][0]
    changed = (done.positive[0][0] - plain).abs().amax((0, 2)).nonzero().flatten().tolist()
    assert tuple(changed) == prompt.columns


@pytest.mark.parametrize(("text", "trigger", "says"), [
    (FREE, "img", "is not in the prompt .*write it once"), ("a woman img and a man img", "img", "stands 2 times"),
    ("img of a woman", "img", "no word before it"), ("a woman, img", "img", "no word before it"),
    ("", "img", "is not in the prompt"), (TRIGGERED, "", "trigger word is empty"), (TRIGGERED, " , ", "trigger word is empty"),
    ("a woman imgs", "img", "is not in the prompt"),
    (" ".join(["blue"] * 73 + ["woman img"]), "img", "would stand 3 times .*front of the prompt")])
def test_the_trigger_is_asked_for(text, trigger, says):
    with pytest.raises(LikenessError, match=says) as caught:
        encoded(1, 3, text=text, trigger=trigger)
    assert ";" in str(caught.value) and str(caught.value).endswith(".")


# -- when and how much -------------------------------------------------------------------------------------
def test_the_identity_begins_after_its_share():
    done = encoded(start=0.3)
    ranges = [(entry[1]["start_percent"], entry[1]["end_percent"]) for entry in done.positive]
    assert ranges == [(0.0, 0.3), (0.3, 1.0)]
    assert torch.equal(done.positive[0][0], done.free[0][0]) and not torch.equal(done.positive[1][0], done.free[0][0])
    assert "start_percent" not in done.free[0][1]
    at_once = encoded(start=0.0)
    assert len(at_once.positive) == 1 and torch.equal(at_once.positive[0][0], done.positive[1][0])
    assert torch.equal(encoded(start=1.0).positive[0][0], done.free[0][0])


def test_strength():
    none, half, full = (encoded(1, 2, start=0.0, strength=s) for s in (0.0, 0.5, 1.0))
    assert none.positive is none.free and "strength 0" in none.report
    plain = encode("sdxl", "a woman woman in the rain")[0][0]
    torch.testing.assert_close(half.positive[0][0], (plain + full.positive[0][0]) / 2, atol=1e-4, rtol=1e-4)


def test_pictures_through_the_whole_model():
    model = photomaker(1)[1]
    done = encoded(start=0.0)
    negative = encode("sdxl", "blurry")
    ours = sample(model, done.positive, negative, kind="sdxl", steps=2)
    assert torch.isfinite(ours).all()
    assert not torch.allclose(ours, sample(model, done.free, negative, kind="sdxl", steps=2), rtol=1e-2, atol=1e-1)
    ranged = encoded(start=0.5)
    assert torch.isfinite(sample(model, ranged.positive, negative, kind="sdxl", steps=3)).all()


# -- faces, for v2 -----------------------------------------------------------------------------------------
def test_faces_and_pictures_belong_together():
    def refused(says, **more):
        with pytest.raises(LikenessError, match=says) as caught:
            encoded(2, 3, **more)
        assert ";" in str(caught.value) and str(caught.value).endswith(".")
    refused("needs FACES of the same pictures", faces=None)
    refused("come from 2 picture.s. and the IMAGE has 3", faces=faces(1, 2, space=BUFFALO))
    refused("of w600k_r50 .the pack buffalo_l., these faces come from glintr100; choose buffalo_l", faces=faces(1, 2, 3))
    refused("no face in picture 1, 3 of 3", faces=faces(None, 2, None, space=BUFFALO))
    assert ANTELOPE == faces(1).space


def test_pictures_without_a_face_are_left_out():
    some = encoded(2, 3, start=0.0, faces=faces(1, None, 2, space=BUFFALO), on_missing="pass through")
    assert "2 of 3 picture(s) with a face" in some.report and some.found
    kept = encode_photomaker(photomaker(2)[0], clip(), pictures(3)[[0, 2]], TRIGGERED, "img", faces(1, 2, space=BUFFALO), 0.0)
    assert torch.equal(some.positive[0][0], kept.positive[0][0])
    nobody = encoded(2, 2, faces=faces(None, None, space=BUFFALO), on_missing="pass through")
    assert not nobody.found and nobody.positive is nobody.free and "passed through" in nobody.report
    assert torch.equal(nobody.free[0][0], encode("sdxl", FREE)[0][0])
    assert "v1 does not look at FACES" in encoded(1, 2, faces=faces(None)).report


def test_the_largest_face_is_the_person():
    group = faces((face(3, 20), face(1, 60)), space=BUFFALO)
    assert torch.equal(encoded(2, 1, faces=group).positive[1][0], encoded(2, 1).positive[1][0])


# -- core's own node and object ----------------------------------------------------------------------------
WIDE = TINY._replace(image=224)  # core's object and node know one size of picture


@pytest.fixture(scope="module")
def wide():
    """(our object, core's object) of one file."""
    import comfy_extras.nodes_photomaker as theirs
    parts = portraits.random(portraits.photomaker(1, WIDE), 8)
    path = portraits.write(folder() / "wide.bin", parts)
    with torch.inference_mode():
        ours = load_photomaker(path, base("sdxl")[0], 0.0)[0]
        core = theirs.PhotoMakerIDEncoder.__new__(theirs.PhotoMakerIDEncoder)
        config = {**theirs.VISION_CONFIG_DICT, "hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2,
                  "num_hidden_layers": 2, "projection_dim": 64}
        comfy.clip_model.CLIPVisionModelProjection.__init__(core, config, torch.float32, "cpu", comfy.ops.manual_cast)
        core.load_device = torch.device("cpu")
        core.visual_projection_2 = comfy.ops.manual_cast.Linear(128, 96, bias=False)
        core.fuse_module = theirs.FuseModule(160, comfy.ops.manual_cast)
        core.load_state_dict(parts["id_encoder"])
        return ours, core


def test_our_object_answers_cores_encode(wide):
    node = comfy_extras.nodes_photomaker.PhotoMakerEncode
    text = "a woman photomaker in the rain"
    ours, theirs = (node.execute(one, pictures(2), clip(), text)[0] for one in wide)
    torch.testing.assert_close(ours[0][0], theirs[0][0], atol=1e-3, rtol=1e-3)

    class Echo:
        load_device = torch.device("cpu")

        def __call__(self, id_pixel_values, prompt_embeds, class_tokens_mask):
            return prompt_embeds.clone()
    plain = node.execute(Echo(), pictures(2), clip(), text)[0][0][0]
    assert (ours[0][0] - plain).abs().amax((0, 2)).nonzero().flatten().tolist() == [2]
    with pytest.raises(LikenessError, match="v2 needs face embeddings.*use Likeness' PhotoMaker Encode"):
        node.execute(photomaker(2)[0], pictures(1), clip(), text)


@pytest.mark.parametrize("count", [1, 3])
def test_our_encode_takes_cores_v1(wide, count):
    ours, theirs = (encode_photomaker(one, clip(), pictures(count), TRIGGERED, "img", start=0.0) for one in wide)
    torch.testing.assert_close(ours.positive[0][0], theirs.positive[0][0], atol=1e-3, rtol=1e-3)
    assert torch.equal(ours.free[0][0], theirs.free[0][0]) and "PhotoMaker v1" in theirs.report


def test_foreign_objects_are_refused(wide):
    class Plus(torch.nn.Module):
        pass
    for foreign in (Plus(), None, 3, "photomaker"):
        with pytest.raises(LikenessError, match="of another pack; load the file with"):
            encode_photomaker(foreign, clip(), pictures(1), TRIGGERED, "img")
    theirs = wide[1]
    theirs.qformer_perceiver = torch.nn.Identity()
    try:
        with pytest.raises(LikenessError, match="of another pack"):
            encode_photomaker(theirs, clip(), pictures(1), TRIGGERED, "img")
    finally:
        del theirs.qformer_perceiver


def test_a_clip_of_another_family():
    with pytest.raises(LikenessError, match="fuses text of width 160, the prompt has 64; encode it"):
        encode_photomaker(photomaker(1)[0], base("sd15")[1], pictures(1), TRIGGERED, "img")
    with pytest.raises(LikenessError, match="CLIP input is empty"):
        encode_photomaker(photomaker(1)[0], None, pictures(1), TRIGGERED, "img")


def same_weights(one: Any, other: Any) -> bool:
    pair = [patcher.model.state_dict() for patcher in (one, other)]
    return pair[0].keys() == pair[1].keys() and all(torch.equal(value, pair[1][name]) for name, value in pair[0].items())


# -- files and the LoRA ------------------------------------------------------------------------------------
def test_bin_and_safetensors_are_one():
    for kind in ("v1", "v2"):
        first, model, text = load_photomaker(file(kind), base("sdxl")[0], 1.0)
        second = load_photomaker(file(kind, ".safetensors"), base("sdxl")[0], 1.0)[0]
        assert first.config == second.config and f"PhotoMaker {kind}" in text
        assert text.endswith("LoRA 1: 560 layers of the model")
        assert same_weights(first.patcher, second.patcher)
        assert len(model.patches) == LAYERS and not base("sdxl")[0].patches
    one, two = (load_instantid(file("instantid", ending)) for ending in (".bin", ".safetensors"))
    assert one.config == two.config
    assert same_weights(one.patcher, two.patcher)


def lora_of(names: dict[str, Tensor], strength: float = 1.0) -> Any:
    parts = {"id_encoder": weights("v1")["id_encoder"], "lora_weights": names}
    return load_photomaker(portraits.write(folder() / "lora.safetensors", parts), base("sdxl")[0], strength)


def test_the_lora_by_its_formula():
    lora = weights("v1")["lora_weights"]
    model = load_photomaker(file("v1"), base("sdxl")[0], 0.5)[1]
    for old, new in (("attn1.processor.to_q", "attn1.to_q"), ("attn2.processor.to_k", "attn2.to_k"),
                     ("attn1.processor.to_v", "attn1.to_v"), ("attn2.processor.to_out", "attn2.to_out.0")):
        stem = f"unet.mid_block.attentions.0.transformer_blocks.7.{old}_lora"
        key = f"diffusion_model.middle_block.1.transformer_blocks.7.{new}.weight"
        plain = base("sdxl")[0].model.state_dict()[key].float()
        got = comfy.lora.calculate_weight(model.patches[key], plain.clone(), key)
        want = plain + 0.5 * lora[f"{stem}.up.weight"] @ lora[f"{stem}.down.weight"]
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    off, same, text = load_photomaker(file("v1"), base("sdxl")[0], 0.0)
    assert same is base("sdxl")[0] and "LoRA 0: off" in text


def test_the_lora_in_the_names_of_other_releases():
    lora = weights("v1")["lora_weights"]
    for down, up in (("lora_A", "lora_B"), ("lora.down", "lora.up")):
        named = {}
        for name, value in lora.items():
            stem, way = name.replace(".processor", "").removesuffix(".weight").split("_lora.")
            stem += ".0" if stem.endswith("to_out") else ""
            named[f"{stem}.{down if way == 'down' else up}.weight"] = value
        assert len(lora_of(named)[1].patches) == LAYERS
    assert "no LoRA part" in lora_of({})[2]
    nothing = {name: torch.zeros(4, 4) for name in ("{}.to_q_lora.down.weight", "{}.to_q_lora.up.weight")}
    with pytest.raises(LikenessError, match="Only 560 of the 561 layers"):
        lora_of({**lora, **{name.format("unet.nowhere"): value for name, value in nothing.items()}})
    others = {name.format("text_encoder.text_model.encoder.layers.0.self_attn"): value for name, value in nothing.items()}
    more = lora_of({**lora, **others})
    assert len(more[1].patches) == LAYERS and "560 layers of the model; 1 more of the file are not of its UNet" in more[2]
    with pytest.raises(LikenessError, match="Only 0 of the 1 layers"):
        lora_of(others)
    with pytest.raises(LikenessError, match="load a SDXL checkpoint"):
        load_photomaker(file("v1"), base("sd15")[0], 1.0)


@pytest.mark.parametrize("ending", [".bin", ".safetensors"])
def test_a_loaded_file_is_not_read_again(monkeypatch, tmp_path, ending):
    """Neither for another strength nor for another model; the LoRA when it is first wanted, and nothing is kept for ever."""
    path, read = portraits.write(tmp_path / f"v1{ending}", weights("v1")), []
    real, load = portrait_files.read_parts, portrait_files.files.load
    monkeypatch.setattr(portrait_files, "read_parts", lambda *words: read.append([]) or real(*words))
    monkeypatch.setattr(portrait_files.files, "load", lambda path, only=None: load(path, only=lambda name: (
        (only is None or only(name)) and not read[-1].append(name))))
    model = base("sdxl")[0]
    first, same, _ = load_photomaker(path, model, 0.0)
    assert len(read) == 1 and same is model and not any(name.startswith("lora_weights.") for name in read[0])
    second, half, _ = load_photomaker(path, model, 0.5)
    assert len(read) == 2 and all(name.startswith("lora_weights.") for name in read[1]) and len(half.patches) == LAYERS
    third, full, text = load_photomaker(path, model.clone(), 1.0)
    assert len(read) == 2 and first.patcher is second.patcher is third.patcher and "LoRA 1: 560 layers" in text
    portraits.write(path, weights("v1"))
    os.utime(path, ns=(1, 1))
    assert load_photomaker(path, model, 1.0)[0].patcher is not first.patcher and len(read) == 3
    del first, second, third, same, half, full
    gc.collect()
    assert not [key for key in portrait_files._encoders if key[0] == str(path)]
    assert len(portrait_files._loras) <= len(portrait_files._encoders)


def test_wrong_files_are_one_sentence(tmp_path):
    def refused(says, name, content=None, parts=None, load=lambda path: load_photomaker(path, base("sdxl")[0], 1.0)):
        path = tmp_path / name
        if parts is not None:
            portraits.write(path, parts)
        elif content is not None:
            path.write_bytes(content)
        with pytest.raises(LikenessError, match=says) as caught:
            load(path)
        assert str(caught.value).endswith(".") and name in str(caught.value)
    small = {"a": {"b": torch.zeros(2)}}
    refused("does not exist", "gone.bin")
    for load in (load_instantid, lambda path: load_photomaker(path, base("sdxl")[0], 1.0)):
        refused("is empty", "empty.bin", b"", load=load)
        refused("is a web page", "page.bin", b"<!DOCTYPE html><html>", load=load)
        refused("git-LFS pointer", "pointer.bin", b"version https://git-lfs.github.com/spec/v1\n", load=load)
        refused("cannot be read as weights", "half.bin", file("v1").read_bytes()[:20000], load=load)
        refused("cut off", "half.safetensors", file("v1", ".safetensors").read_bytes()[:200000], load=load)
        refused("cannot be read as weights", "text.bin", b"hello world, this is no file of weights", load=load)
    refused("is no PhotoMaker file; choose photomaker-v1.bin", "other.safetensors", parts=small)
    refused("is no PhotoMaker file, it looks like InstantID's ip-adapter", "i.bin", parts=weights("instantid"))
    refused("is no InstantID file, it looks like PhotoMaker; choose", "p.bin", parts=weights("v1"), load=load_instantid)
    refused("is no InstantID file; choose", "list.bin", parts={"a": torch.zeros(2)}, load=load_instantid)


def test_a_copy_for_another_device_has_weights_of_its_own():
    for patcher in (photomaker(1)[0].patcher, load_instantid(file("instantid")).patcher):
        make, words = patcher.cached_patcher_init
        other = make(*words, disable_dynamic=True)
        assert other.model is not patcher.model and same_weights(other, patcher)
