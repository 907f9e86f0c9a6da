"""Adapter and encoder files, good and bad, and the tokens that they make of reference pictures."""
from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from harness import mini
from host.support import (
    COPIES,
    adapter_state,
    base,
    comfy,
    config_for,
    draw,
    encode,
    folder,
    injected,
    miniature,
    new_adapter,
    plain,
    prompt,
    sample,
    subject,
)
from likeness.models.common import files
from likeness.models.common.errors import LikenessError
from likeness.models.custany.config import to_metadata
from likeness.models.hosting import adapters, encoders, subjects
from likeness.models.hosting.inject import Strengths, inject

MODULE = "likeness.custany"


@pytest.fixture(autouse=True)
def _as_a_node():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def loaded():
    """(adapter, encoders) of the random miniature."""
    with torch.inference_mode():
        pair = tuple(encoders.load_encoder(miniature() / name) for name in (mini.DINO, mini.MAE))
        return adapters.load_adapter(miniature() / mini.ADAPTER), encoders.Encoders(pair)


def write(path: Path, kind: str = "sd15", drop: str = "", metadata: dict[str, str] | None = None, **changes: Any) -> Path:
    config = config_for(kind, **changes)
    state = {key: value for key, value in adapter_state(config).items() if not (drop and key.startswith(drop))}
    files.save(path, state, to_metadata(config) if metadata is None else metadata)
    return path


# -- files ---------------------------------------------------------------------------------------------
def test_the_method_is_told_from_the_tensors(tmp_path):
    got = adapters.load_adapter(write(tmp_path / "realcustom_sdxl.safetensors"))
    assert got.method == "custany" and got.config == config_for("sd15") and got.name == "realcustom_sdxl.safetensors"
    assert got.sha256 == files.sha256(tmp_path / got.name)
    assert dict(got.metadata)[MODULE] == to_metadata(got.config)[MODULE]
    saved = files.load(tmp_path / got.name)[0]
    assert all(torch.equal(value, saved[key]) for key, value in got.patcher.model.state_dict().items())
    assert not any(p.requires_grad for p in got.patcher.model.parameters()) and not got.patcher.model.training


def test_half_precision_files(tmp_path):
    config = config_for("sd15")
    files.save(tmp_path / "half.safetensors", {k: v.half() for k, v in adapter_state(config).items()}, to_metadata(config))
    module = adapters.load_adapter(tmp_path / "half.safetensors").patcher.model
    tokens, local = module.encode([(draw(1, 1, 12), draw(2, 1, 4, 12)), (draw(3, 1, 8), draw(4, 1, 4, 8))])
    assert tokens.dtype == local.dtype == torch.float32


class Trap:
    def __reduce__(self):
        return Path.touch, (Path(folder() / "sprung"),)


BAD = {
    "page.safetensors": (b"<!DOCTYPE html><html>Sign in</html>", "web page"),
    "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git-LFS"),
    "nothing.safetensors": (b"", "is empty"),
    "noise.safetensors": (bytes(range(256)) * 4, "not a safetensors file"),
    "page.bin": (b"<!DOCTYPE html><html></html>", "web page"),
    "pointer.PT": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git-LFS"),
    "NOISE.SafeTensors": (bytes(range(256)) * 4, "not a safetensors file"),
    "nothing.pt": (b"", "is empty"),
    "trap.pt": (pickle.dumps({"state_dict": Trap()}), "cannot be read as weights"),
    "trap.safetensors": (pickle.dumps({"state_dict": Trap()}, protocol=2), "PyTorch file"),
    "list.pth": (None, "cannot be read as weights"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("what", ["adapter", "encoder"])
def test_files_that_are_no_weights(name, what, tmp_path):
    content, said = BAD[name]
    path = tmp_path / name
    if content is None:
        torch.save([torch.zeros(3)], path)
    else:
        path.write_bytes(content)
    load = adapters.load_adapter if what == "adapter" else encoders.load_encoder
    with pytest.raises(LikenessError, match=said) as caught:
        load(path)
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not (folder() / "sprung").exists(), "the pickle was executed"
    assert encoders.describe(path) is None


def test_a_file_that_is_not_there(tmp_path):
    for name in ("gone.safetensors", "gone.pt"):
        for load in (adapters.load_adapter, encoders.load_encoder):
            with pytest.raises(LikenessError, match=f"{name} does not exist"):
                load(tmp_path / name)
        assert encoders.describe(tmp_path / name) is None


def test_a_truncated_file(tmp_path):
    path = write(tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(LikenessError, match="cut off"):
        adapters.load_adapter(path)


def test_files_of_another_kind(tmp_path):
    files.save(tmp_path / "lora.safetensors", {"lora_unet_x.lora_up.weight": torch.zeros(2, 2)})
    with pytest.raises(LikenessError, match="looks like a LoRA"):
        adapters.load_adapter(tmp_path / "lora.safetensors")
    with pytest.raises(LikenessError, match="looks like"):
        adapters.load_adapter(miniature() / mini.DINO)
    with pytest.raises(LikenessError, match="subject adapter"):
        encoders.load_encoder(miniature() / mini.ADAPTER)


def test_metadata_and_tensors_must_agree(tmp_path):
    with pytest.raises(LikenessError, match="holds no 'likeness.custany'"):
        adapters.load_adapter(write(tmp_path / "none.safetensors", metadata={}))
    with pytest.raises(LikenessError, match="does not hold it"):
        adapters.load_adapter(write(tmp_path / "less.safetensors", drop="layers.output_3_0.to_q"))
    other = to_metadata(config_for("sd15")._replace(width=96))
    with pytest.raises(LikenessError, match="96.*64|64.*96"):
        adapters.load_adapter(write(tmp_path / "width.safetensors", metadata=other))
    with pytest.raises(LikenessError, match="update the pack"):
        adapters.load_adapter(write(tmp_path / "new.safetensors", metadata={MODULE: '{"colour": 1}'}))
    with pytest.raises(LikenessError, match="cannot be read"):
        adapters.load_adapter(write(tmp_path / "broken.safetensors", metadata={MODULE: "{"}))


def test_an_adapter_on_another_base_is_refused_by_both_names(tmp_path):
    got = adapters.load_adapter(write(tmp_path / "a.safetensors"))
    tokens = (("global", draw(1, 1, 2, 64)), ("local", draw(2, 1, 9, 64)))
    who = adapters.Subject("custany", tokens, "all", got.config.base, 64, "s", "e", got.sha256, got)
    _, word = prompt("sd15")
    with pytest.raises(LikenessError, match="trained for SD1.5.*text width 160"):
        inject(base("sdxl")[0], prompt("sdxl")[0], [], who, word, Strengths(1, 1))
    with pytest.raises(LikenessError, match="SD3 is another kind of network"):
        inject(base("sd3")[0], prompt("sd15")[0], [], who, word, Strengths(1, 1))


# -- which encoders ------------------------------------------------------------------------------------
def test_wanted_encoders_come_from_the_header(tmp_path):
    wanted, hashes, registers = adapters.wanted_encoders(adapters.load_adapter(miniature() / mini.ADAPTER))
    assert wanted == (("dinov2", 48), ("mae", 48)) and not registers
    assert hashes == tuple(files.sha256(miniature() / name) for name in (mini.DINO, mini.MAE))
    loaded = adapters.load_adapter(write(tmp_path / "a.safetensors"))
    assert adapters.wanted_encoders(loaded) == (config_for("sd15").encoders, (), ())


def test_match_goes_by_keys_and_prefers_the_right_hash(tmp_path):
    """Names say nothing; junk in the folder does not matter; the hash decides between equals."""
    wanted, hashes, _ = adapters.wanted_encoders(adapters.load_adapter(miniature() / mini.ADAPTER))
    other = tmp_path / "aa_dinov2.safetensors"
    files.save(other, mini.encoder_state("dinov2", 99), mini.encoder_metadata("dinov2"))
    right = tmp_path / "zz.safetensors"
    right.write_bytes((miniature() / mini.DINO).read_bytes())
    mae = tmp_path / "dinov2_but_mae.safetensors"
    mae.write_bytes((miniature() / mini.MAE).read_bytes())
    junk = []
    for name, (content, _) in BAD.items():
        junk.append(tmp_path / name)
        junk[-1].write_bytes(content or b"\x80\x04N.")
    found = encoders.match(wanted, hashes, [*junk, other, mae, right, tmp_path / "gone.safetensors"])
    assert found == [right, mae]
    assert encoders.match(wanted, ("0" * 64, ""), [other, mae, right]) == [other, mae], "no such hash: the first that fits"
    assert encoders.match(wanted, (), [right, mae, other]) == [right, mae]
    with pytest.raises(LikenessError) as caught:
        encoders.match(wanted, hashes, [other, right])
    assert "mae encoder of width 48" in str(caught.value) and "aa_dinov2.safetensors (dinov2 48)" in str(caught.value)
    with pytest.raises(LikenessError, match="no encoder at all"):
        encoders.match(wanted, hashes, junk)
    with pytest.raises(LikenessError, match="width 1024"):
        encoders.match((("dinov2", 1024),), (), [right])
    assert not (folder() / "sprung").exists()


def test_pickles_are_read_only_while_something_is_missing(tmp_path, monkeypatch):
    wanted, hashes, _ = adapters.wanted_encoders(adapters.load_adapter(miniature() / mini.ADAPTER))
    dino, mae = miniature() / mini.DINO, tmp_path / "a_mae.pt"
    torch.save(mini.encoder_state("mae", 5), mae)
    big = tmp_path / "b_clip_of_many_gigabytes.pt"
    torch.save({"x": torch.zeros(3)}, big)
    read, real = [], comfy.utils.load_torch_file
    monkeypatch.setattr(comfy.utils, "load_torch_file", lambda path, **k: read.append(path) or real(path, **k))
    assert encoders.match(wanted, hashes, [big, dino, miniature() / mini.MAE]) == [dino, miniature() / mini.MAE]
    assert read == []
    safe = tmp_path / "dino.SAFETENSORS"
    safe.write_bytes(dino.read_bytes())
    assert encoders.match(wanted[:1], (), [mae, big, safe]) == [safe] and read == []


def test_a_file_that_says_mae_comes_before_one_that_could_be_a_plain_vit(tmp_path):
    """The tensors of the encoder are the same; a decoder, a mask token or the metadata tell them apart."""
    state = mini.encoder_state("mae", 5)
    heads = {key: value for key, value in mini.encoder_metadata("mae").items() if key != "likeness.family"}
    plain, told = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    files.save(plain, state, heads)
    for more in ({"decoder_pos_embed": torch.zeros(1, 2, 2)}, {"decoder.mask_token": torch.zeros(1, 1, 2)}):
        files.save(told, {**state, **more}, heads)
        assert encoders.describe(plain) == encoders.describe(told) and encoders.describe(plain).family == "mae"
        assert encoders.says_mae(told) and not encoders.says_mae(plain)
        assert encoders.match((("mae", 48),), (), [plain, told]) == [told]
        assert encoders.match((("mae", 48),), (files.sha256(plain),), [plain, told]) == [plain], "the hash is surer"
    files.save(told, state, {**heads, "likeness.family": "mae"})
    assert encoders.match((("mae", 48),), (), [plain, told]) == [told]


def test_encoders_in_another_order_or_width_are_refused(loaded):
    adapter, pair = loaded
    pictures = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    swapped = encoders.Encoders(pair.items[::-1])
    with pytest.raises(LikenessError, match=r"trained with dinov2 48 \+ mae 48, the encoders are mae 48 \+ dinov2 48"):
        adapters.extract(adapter, swapped, pictures, "concat", "s")
    with pytest.raises(LikenessError, match="the encoders are dinov2 48;"):
        adapters.extract(adapter, encoders.Encoders(pair.items[:1]), pictures, "concat", "s")
    assert pair.hash != swapped.hash


# -- copies for other devices --------------------------------------------------------------------------
@COPIES
def test_every_patcher_can_be_made_again(loaded):
    """The host makes a copy for another graphics card, or one without dynamic memory, by the loader's factory."""
    adapter, pair = loaded
    model, clip, vae = base("mini")
    for patcher in (adapter.patcher, *(item.patcher for item in pair.items), model, clip.patcher, vae.patcher):
        before = {key: value.clone() for key, value in patcher.model.state_dict().items()}
        for copy in (patcher.clone(force_deepcopy=True), patcher.deepclone_multigpu()):
            again = copy.model.state_dict()
            assert copy.model is not patcher.model and set(again) == set(before)
            assert all(torch.equal(again[key], value) for key, value in before.items())
            assert all(again[key].data_ptr() != value.data_ptr() for key, value in patcher.model.state_dict().items()
                       if value.numel())


@COPIES
def test_a_copied_model_carries_the_subject_too():
    """The patch keeps the adapter under its own patcher, and its layers cast to where the rows are."""
    done = injected("mini")
    copy = done.model.deepclone_multigpu()
    assert copy.model is not done.model.model
    one, two = (sample(m, done.positive, done.negative, kind="mini") for m in (done.model, copy))
    assert torch.equal(one, two) and not torch.equal(one, plain("mini"))


# -- tokens --------------------------------------------------------------------------------------------
def pictures_of(n: int) -> torch.Tensor:
    return torch.rand(n, 64, 64, 3, generator=torch.Generator().manual_seed(4))


def mlp_by_hand(state: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """LayerNorm, Linear, GELU, Linear from the tensors of a file."""
    w = {key: state[f"{name}.{key}"] for key in ("norm.weight", "norm.bias", "hidden.weight", "hidden.bias", "out.weight",
                                                 "out.bias")}
    x = F.layer_norm(x, x.shape[-1:], w["norm.weight"], w["norm.bias"]) @ w["hidden.weight"].T + w["hidden.bias"]
    return F.gelu(x) @ w["out.weight"].T + w["out.bias"]


def test_tokens_by_hand(loaded):
    """What a file means, for ever: the order of the encoders, of class token and word, of norm and layers."""
    adapter, pair = loaded
    pictures = pictures_of(1)
    features = encoders.encode(pair, pictures, adapter.config.resolutions)
    assert [tuple(t.shape) for f in features for t in f] == [(1, 48), (1, 64, 48)] * 2
    state = adapter.patcher.model.state_dict()
    tokens = torch.stack([mlp_by_hand(state, f"encoder_mlps.{k}", features[k][0]) for k in range(2)], 1)
    patches = [mlp_by_hand(state, f"encoder_mlps.{k}", features[k][1]) for k in range(2)]
    local = mlp_by_hand(state, "local_mlp", torch.cat(patches, -1))
    who = adapters.extract(adapter, pair, pictures, "concat", "name")
    assert torch.allclose(who.get("global"), tokens, atol=1e-5) and torch.allclose(who.get("local"), local, atol=1e-5)
    assert (who.method, who.base, who.width, who.source_hash) == ("custany", "miniature", 128, "name")
    assert who.adapter is adapter and who.adapter_hash == adapter.sha256 and who.encoder_hash == pair.hash
    pair = adapters.project(who, ["output.2.0"]).model.get("output.2.0")
    assert torch.allclose(pair.k, local @ state["layers.output_2_0.to_k.weight"].T, atol=1e-4)
    assert torch.allclose(pair.v, local @ state["layers.output_2_0.to_v.weight"].T, atol=1e-4)
    word = draw(8, 2, 128)
    for row, delta in zip(word, adapters.word_delta(who, word)[0], strict=True):
        hand = mlp_by_hand(state, "global_mlp", torch.cat([tokens[0, 0], tokens[0, 1], row]))
        assert torch.allclose(delta, hand, atol=1e-4)


@pytest.mark.parametrize("combine", adapters.PAIRINGS)
def test_several_references(loaded, combine):
    adapter, pair = loaded
    each = [adapters.extract(adapter, pair, one[None], "concat", "s") for one in pictures_of(3)]
    who = adapters.extract(adapter, pair, pictures_of(3), combine, "s")
    assert who.pairing == ("per latent" if combine == "one per latent" else "all")
    for name in ("global", "local"):
        parts = torch.cat([one.get(name) for one in each])
        expected = parts.mean(0, keepdim=True) if combine == "average" else parts
        assert torch.allclose(who.get(name), expected, atol=1e-5)
    assert who.pictures == (1 if combine == "average" else 3)
    word = draw(8, 2, 128)
    delta = adapters.word_delta(who, word)
    assert delta.shape == ((3 if combine == "one per latent" else 1), 2, 128)
    module = adapter.patcher.model
    source = who.get("global") if combine == "one per latent" else who.get("global").mean(0, keepdim=True)
    for k in range(delta.shape[0]):
        assert torch.allclose(delta[k], module.word_delta(source[k:k + 1].expand(2, -1, -1), word), atol=1e-5)


def test_many_references_go_in_chunks(loaded, monkeypatch):
    adapter, pair = loaded
    whole = encoders.encode(pair, pictures_of(5), adapter.config.resolutions)
    sizes = []
    model = pair.items[0].patcher.model
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda x, *a, **k: sizes.append(x.shape[0]) or forward(x, *a, **k))
    monkeypatch.setattr(encoders, "CHUNK", 2)
    chunked = encoders.encode(pair, pictures_of(5), adapter.config.resolutions)
    assert sizes == [2, 2, 1]
    for a, b in zip(whole, chunked, strict=True):
        assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a, b, strict=True))


def test_cancel_between_chunks(loaded, monkeypatch):
    management = comfy.model_management
    adapter, pair = loaded
    monkeypatch.setattr(encoders, "CHUNK", 1)
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        encoders.encode(pair, pictures_of(3), adapter.config.resolutions)
    assert encoders.encode(pair, pictures_of(1), adapter.config.resolutions)[0][0].shape == (1, 48)


def test_pictures_and_tokens_are_left_as_they_were(loaded):
    adapter, pair = loaded
    pictures = pictures_of(2)
    kept = pictures.clone()
    who = adapters.extract(adapter, pair, pictures, "concat", "s")
    before = [t.clone() for _, t in who.tokens]
    adapters.project(who, [key for key, _ in adapter.config.layers])
    adapters.word_delta(who, draw(1, 1, 128))
    assert torch.equal(pictures, kept) and all(torch.equal(a, t) for a, (_, t) in zip(before, who.tokens, strict=True))
    assert all(t.device.type == "cpu" and t.dtype == torch.float32 for _, t in who.tokens)


def test_picture_hash_tells_pixels_and_shapes_apart():
    a = torch.zeros(1, 4, 6, 3)
    names = {adapters.picture_hash(a), adapters.picture_hash(a.reshape(1, 6, 4, 3)), adapters.picture_hash(a + 1),
             adapters.picture_hash(a, a), adapters.picture_hash(None)}
    assert len(names) == 5 and adapters.picture_hash(a) == adapters.picture_hash(a.clone(), None)


def test_a_subject_for_another_adapter_is_of_that_one_from_then_on(tmp_path):
    """Else two injectors in a row with one file under both adapters would be one, and blending would mix their tokens."""
    first, other = new_adapter(config_for("sd15"), seed=11), new_adapter(config_for("sd15"), seed=99)
    saved = tmp_path / "subject.safetensors"
    subjects.save_subject(subject("sd15", of=first), saved)
    own, _ = subjects.load_subject(saved, first)
    accepted, report = subjects.load_subject(saved, other, accept_other=True)
    assert (own.adapter_hash, accepted.adapter_hash) == (first.sha256, other.sha256) and "accepted" in report
    positive, word = prompt("sd15")
    done = inject(base("sd15")[0], positive, encode("sd15", "blurry"), own, word, Strengths(0.0, 1.0))
    both = inject(done.model, done.positive, done.negative, accepted, word, Strengths(0.0, 1.0))
    assert len(both.model.model_options["transformer_options"]["patches"]["middle_patch"]) == 2
    with pytest.raises(LikenessError, match="subjects of one adapter"):
        subjects.blend(accepted, subject("sd15", seed=2, of=first), 0.5, "average")
    mixed, _ = subjects.blend(subject("sd15", seed=2, of=other), accepted, 0.5, "average")
    for one in (accepted, mixed):  # saved again, the file still tells whose tokens they are
        subjects.save_subject(one, saved)
        assert files.read_header(saved).metadata["adapter_hash"] == first.sha256
        with pytest.raises(LikenessError, match="switch accept_other_adapter on"):
            subjects.load_subject(saved, other)
