"""RealCustom++ files, their encoders and the tokens that they make of reference pictures."""
from __future__ import annotations

import gc
import json
from functools import cache
from pathlib import Path

import pytest
import torch

from host import release
from host.support import COPIES, base, encode, folder
from likeness.models.common import files
from likeness.models.common.errors import LikenessError
from likeness.models.common.records import Subject
from likeness.models.hosting import adapters, encoders, prompt, realcustom, subjects
from likeness.models.realcustom import preprocess
from likeness.models.realcustom.phrase import substring_columns, substring_ranges
from likeness.models.vision.load import load_vit
from likeness.models.vision.preprocess import normalise
from unit import recipe

HEADS = {"num_heads": "2"}


@pytest.fixture(autouse=True)
def _as_a_node():
    with torch.inference_mode():
        yield


@cache
def place() -> Path:
    """Folder with the adapter, its encoders, and a DINOv2 of the same width without registers."""
    path = folder() / "realcustom"
    files.save(path / "anything.safetensors", release.weights(), release.METADATA)
    siglip, dino = recipe.weights("vit_siglip_small"), recipe.weights("vit_dinov2reg_small")
    files.save(path / "b_siglip.safetensors", siglip, HEADS)
    files.save(path / "a_dino.safetensors", {k: v for k, v in dino.items() if k != "reg_token"}, HEADS)
    files.save(path / "b_dino.safetensors", dino, HEADS)
    return path


@cache
def loaded() -> tuple[adapters.Adapter, encoders.Encoders]:
    with torch.inference_mode():
        adapter = adapters.load_adapter(place() / "anything.safetensors")
        wanted, hashes, registers = adapters.wanted_encoders(adapter)
        paths = encoders.match(wanted, hashes, sorted(place().glob("?_*.safetensors")), registers)
        return adapter, adapters.load_encoders(adapter, paths)


def pictures(n: int = 1) -> torch.Tensor:
    return torch.rand(n, 50, 70, 3, generator=torch.Generator().manual_seed(7))


# -- files -----------------------------------------------------------------------------------------------
def test_a_file_is_told_by_its_keys_and_its_base_is_left_alone():
    adapter, _ = loaded()
    assert (adapter.method, adapter.name, adapter.config.width) == ("realcustom", "anything.safetensors", 96)
    assert adapter.base_weights == () and adapter.found_base > 600
    state = adapter.patcher.model.state_dict()
    name = "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_v_vision.weight"
    assert torch.equal(state["layers.input_4_1.v.weight"], release.weights()[name])
    assert len(state) == 17 + 2 * 22


@COPIES
def test_every_patcher_can_be_made_again():
    """For another graphics card: weights of its own, no base, as many blocks and the same GELU as at first."""
    adapter, pair = loaded()
    for patcher in (adapter.patcher, *(item.patcher for item in pair.items)):
        before = patcher.model.state_dict()
        for copy in (patcher.clone(force_deepcopy=True), patcher.deepclone_multigpu()):
            again = copy.model.state_dict()
            assert copy.model is not patcher.model and again.keys() == before.keys()
            assert all(torch.equal(again[key], value) and again[key].data_ptr() != value.data_ptr()
                       for key, value in before.items())
            assert getattr(copy.model, "config", None) == getattr(patcher.model, "config", None)


def test_a_pickle_of_the_releases_form(tmp_path):
    """Half precision, inside a wrapper, under a prefix; told by its keys alone, read by the host's safe loader."""
    shapes = recipe.manifest("keys_projector_realcustom_sigdino_highres")
    small = {8704: 8, 2048: 96}
    state = {f"module.encoder_hidden_states_vision_projection.{key}": torch.zeros([small.get(n, n) for n in shape]).half()
             for key, shape in shapes.items()}
    for which in "kv":
        state[f"module.mid_block.attentions.0.transformer_blocks.0.attn2.to_{which}_vision.weight"] = torch.zeros(128, 96).half()
    torch.save({"state_dict": state}, tmp_path / "RealCustom_highres.pth")
    adapter = adapters.load_adapter(tmp_path / "RealCustom_highres.pth")
    assert adapter.method == "realcustom" and adapter.config.layers == (("middle.0.0", 128),)
    assert adapter.config.encoders == (("siglip", 1152), ("dinov2", 1024)) and adapter.config.registers == (0, 4)


@pytest.mark.parametrize("drop, said", (("projector.2.bias", "lacks the tensor projector.projector.2.bias"),
                                        ("projector_base.weight", "no subject adapter"),
                                        ("up_blocks.1.attentions.2.transformer_blocks.1.attn2.to_k_vision.weight", "only one")))
def test_incomplete_files_are_refused(drop, said):
    state = {key: value for key, value in release.weights().items() if not key.endswith(drop)}
    with pytest.raises(LikenessError, match=said):
        adapters.make_adapter(state, release.METADATA, "", "broken.pth")


# -- encoders --------------------------------------------------------------------------------------------
def test_encoders_are_found_with_their_registers_and_without_their_last_blocks():
    _, pair = loaded()
    assert [item.name for item in pair.items] == ["b_siglip.safetensors", "b_dino.safetensors"]
    assert [(len(item.patcher.model.blocks), item.config.depth) for item in pair.items] == [(2, 2), (3, 3)]


def test_a_missing_one_is_named_with_its_registers():
    wanted, hashes, registers = adapters.wanted_encoders(loaded()[0])
    with pytest.raises(LikenessError, match="dinov2 encoder of width 64 with 4 registers, found .*a_dino.safetensors"):
        encoders.match(wanted, hashes, [place() / "a_dino.safetensors", place() / "b_siglip.safetensors"], registers)


def test_swapped_single_and_other_encoders_are_refused():
    adapter, pair = loaded()
    other = encoders.load_encoder(place() / "a_dino.safetensors")
    for items in (pair.items[::-1], pair.items[:1], (pair.items[0], other)):
        with pytest.raises(LikenessError, match=r"siglip 64 \+ dinov2 64 with 4 registers in this order"):
            adapters.extract(adapter, encoders.Encoders(items), pictures(), "concat", "s")


def test_the_exact_gelu_whatever_the_style_of_the_file():
    state = recipe.weights("vit_siglip_small")
    said = {**HEADS, "likeness.activation": "gelu_tanh"}
    assert encoders.make_encoder(state, said, "", "").config.activation == "gelu_tanh"
    assert encoders.make_encoder(state, said, "", "", 2, True).config.activation == "gelu"


def test_black_tokens_belong_to_the_form_of_gelu_too():
    """The same file through Load Adapter and through Load Encoders: another activation, other tokens."""
    adapter, pair = loaded()
    tanh = encoders.Encoders(tuple(item._replace(config=item.config._replace(activation="gelu_tanh")) for item in pair.items))
    realcustom.black_tokens(adapter, pair)
    before = len(adapter.patcher.get_attachment(realcustom.BLACK_TOKENS))
    realcustom.black_tokens(adapter, tanh)
    assert len(adapter.patcher.get_attachment(realcustom.BLACK_TOKENS)) == before + 1
    realcustom.black_tokens(adapter, pair)
    assert len(adapter.patcher.get_attachment(realcustom.BLACK_TOKENS)) == before + 1


# -- tokens ----------------------------------------------------------------------------------------------
def tokens_by_hand(image: torch.Tensor) -> torch.Tensor:
    """The chain of the release from whole encoders, one picture at a time."""
    vits = [load_vit(recipe.weights(f"vit_{name}_small"), HEADS) for name in ("siglip", "dinov2reg")]
    seen = preprocess.views(image, 42)

    def read(pixels):
        out = []
        for (vit, config), block in zip(vits, (1, 2), strict=True):
            out.append(vit(normalise(pixels, config), layers=(block,)).hidden[0][:, config.prefix:])
        return torch.cat(out, -1)
    local = read(seen.quarters).permute(1, 0, 2).reshape(1, 36, 128)  # (4, n, d) of one picture: place by place
    return loaded()[0].patcher.model.projector([read(seen.whole), local])


@pytest.mark.parametrize("combine", adapters.PAIRINGS)
def test_tokens_equal_the_chain_of_the_release(combine):
    adapter, pair = loaded()
    image = pictures(3)
    who = adapters.extract(adapter, pair, image, combine, "source")
    each = torch.cat([tokens_by_hand(one[None]) for one in image])
    want = each.mean(0, keepdim=True) if combine == "average" else each
    torch.testing.assert_close(who.get("local"), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(who.get("black"), tokens_by_hand(torch.zeros(1, 84, 84, 3)), atol=1e-5, rtol=1e-5)
    assert who.pairing == ("per latent" if combine == "one per latent" else "all")
    assert (who.method, who.width, who.adapter) == ("realcustom", 96, adapter)


def test_the_black_picture_is_encoded_once(monkeypatch):
    adapter, pair = loaded()
    first = adapters.extract(adapter, pair, pictures(), "concat", "s")
    calls = []
    model = pair.items[0].patcher.model
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda x, *a, **k: calls.append(len(x)) or forward(x, *a, **k))
    second = adapters.extract(adapter, pair, pictures(), "concat", "s")
    assert calls == [1, 4] and second.get("black") is first.get("black")
    assert realcustom.black_store(first) is realcustom.black_store(second)


def test_the_picture_goes_in_whole_unless_a_mask_says_what():
    adapter, pair = loaded()
    whole = subjects.extract_from_picture(adapter, pair, pictures(), None, "concat", 0.1, "error")
    assert torch.equal(whole.picture, pictures()) and "1 x (9 local)" in whole.report and "squeezed" in whole.report
    mask = torch.zeros(1, 50, 70)
    mask[:, 10:30, 20:40] = 1
    cut = subjects.extract_from_picture(adapter, pair, pictures(), mask, "concat", 0.0, "error")
    assert tuple(cut.picture.shape) == (1, 84, 84, 3) and "squeezed" not in cut.report
    empty = subjects.extract_from_picture(adapter, pair, pictures(), 0 * mask, "concat", 0.1, "pass through")
    assert not empty.found and empty.subject.pictures == 0


def test_subjects_are_saved_loaded_and_blended(tmp_path):
    adapter, pair = loaded()
    a, b = (adapters.extract(adapter, pair, pictures(2)[k:k + 1], "concat", str(k)) for k in range(2))
    subjects.save_subject(a, tmp_path / "a.safetensors")
    again, text = subjects.load_subject(tmp_path / "a.safetensors", adapter, pair)
    assert "1 x (9 local)" in text
    assert all(torch.equal(again.get(name), a.get(name)) for name in ("local", "black"))
    mixed, _ = subjects.blend(a, b, 0.25, "average")
    torch.testing.assert_close(mixed.get("local"), 0.75 * a.get("local") + 0.25 * b.get("local"))
    both, _ = subjects.blend(a, b, 0.5, "concat")
    assert torch.equal(both.get("local"), torch.cat([a.get("local"), b.get("local")]))
    assert torch.equal(both.get("black"), a.get("black")) and both.get("black").shape[0] == 1
    files.save(tmp_path / "bad.safetensors", {"local": a.get("local")}, files.read_header(tmp_path / "a.safetensors").metadata)
    with pytest.raises(LikenessError, match="damaged"):
        subjects.load_subject(tmp_path / "bad.safetensors", adapter, pair)


def test_keys_and_values_are_those_of_the_file_and_lie_under_a_patcher():
    adapter, _ = loaded()
    tokens = torch.randn(2, 9, 96, generator=torch.Generator().manual_seed(1))
    who = Subject("realcustom", (("local", tokens), ("black", tokens[:1])), "all", adapter.config.base, 96, "", "", "", adapter)
    name = "up_blocks.0.attentions.2.transformer_blocks.1.attn2.to_{}_vision.weight"
    for pairing, rows in (("all", tokens.reshape(1, 18, 96)), ("per latent", tokens)):
        patcher = realcustom.subject_store(who._replace(pairing=pairing), ["output.2.1", "input.4.0"])
        pair = patcher.model.get("output.2.1")
        for which, got in (("k", pair.k), ("v", pair.v)):
            torch.testing.assert_close(got.data, rows @ release.weights()[name.format(which)].T, atol=1e-4, rtol=1e-5)
        numbers = 2 * 18 * (128 + 64)
        assert patcher.model_size() == sum(p.nbytes for p in patcher.model.parameters()) == 4 * numbers


def test_keys_and_values_are_made_once_for_all_injectors_of_a_subject():
    """Several words of one picture share them; other layers or another picture do not; they go with their last reader."""
    adapter, _ = loaded()
    tokens = torch.randn(2, 1, 9, 96, generator=torch.Generator().manual_seed(1))
    one, other = (Subject("realcustom", (("local", t), ("black", t)), "all", adapter.config.base, 96, "", "", "", adapter)
                  for t in tokens)
    layers = ["output.2.1", "input.4.0"]
    store = realcustom.subject_store(one, layers)
    assert realcustom.subject_store(one._replace(source_hash="read again"), layers) is store
    others = [realcustom.subject_store(one, layers[:1]), realcustom.subject_store(other, layers),
              realcustom.subject_store(one, layers, keep=False)]
    assert all(each is not store for each in others)
    known = adapter.patcher.get_attachment(realcustom.SUBJECT_STORES)
    assert len(known) >= 3
    del store, others
    gc.collect()
    assert len(known) == 0


# -- the release's phrases -------------------------------------------------------------------------------
@pytest.mark.parametrize("case", json.loads((recipe.GOLDEN / "phrase_tokens.json").read_text(encoding="utf-8")),
                         ids=lambda case: f"{case['phrase']} in {case['prompt'][:20]}")
@pytest.mark.parametrize("tower", "lg")
def test_columns_of_the_release(case, tower):
    tokenizer = getattr(base("sdxl")[1].tokenizer, f"clip_{tower}").tokenizer

    def length(text: str) -> int:
        return len(tokenizer(text)["input_ids"]) - 2
    assert substring_columns(case["prompt"], case["phrase"], length) == tuple(case["columns"])
    assert [list(pair) for pair in substring_ranges(case["prompt"], case["phrase"], length)] == case["token_ranges"]


@pytest.mark.parametrize("tower", "lg")
def test_the_releases_negative_as_an_artist_writes_it(tower):
    """Cut after 75 tokens, its brackets escaped: the release's own ids in one window. Bare brackets would be weights."""
    ids = json.loads((recipe.GOLDEN / "negative_prompt_tokens.json").read_text(encoding="utf-8"))["truncated_ids"]
    clip = base("sdxl")[1]
    text = getattr(clip.tokenizer, f"clip_{tower}").tokenizer.decode(ids[1:-1])
    assert "((((" in text and len(ids) == 77
    windows = clip.tokenize(text.replace("(", "\\(").replace(")", "\\)"))[tower]
    assert [[int(entry[0]) for entry in window] for window in windows] == [ids]
    assert {entry[1] for entry in windows[0]} == {1.0}
    bare = clip.tokenize(text)[tower]
    assert [int(entry[0]) for entry in bare[0]] != ids and max(entry[1] for entry in bare[0]) > 1.0


def found(text: str, word: str, occurrence: int = 0, **more):
    return prompt.encode_prompt(base("sdxl")[1], text, word, occurrence, rule=prompt.SUBSTRING, **more)[1]


def test_the_releases_rule_on_the_prompts_of_an_artist():
    word = found("a cat in a category of cats", "cat")
    assert word.columns == (2, 5, 7) and word.firsts == (0, 1, 2)
    assert found("a cat in a category of cats", "cat", 2).columns == (5,)
    assert found("a (dog:1.2) running", "dog").columns == (2,)  # the weight is read, not spelled
    weighted = found("a (dog:1.2) running", "dog")
    assert weighted.weights == pytest.approx((1.2,))
    assert torch.equal(weighted.rows, encode("sdxl", "a (dog:1.2) running")[0][0][0, [2]])
    assert found("a photo of a Dog", "dog", on_missing="pass through").columns == ()
    for text, said in (("a photo of a Dog", "not in the prompt"), ("a cat", "occurrence 2")):
        with pytest.raises(LikenessError, match=said):
            found(text, text.split()[-1].lower(), 2 if text == "a cat" else 0)
    assert prompt.encode_prompt(base("sdxl")[1], "a category", "cat", on_missing="pass through")[1].columns == ()
    with pytest.raises(LikenessError, match="no token of its own among the first 75: it stands behind them"):
        found("dog " * 80 + "cat", "cat")


def test_the_releases_rule_looks_into_the_same_text_only():
    """A CONDITIONING of another text is refused by either rule; the word keeps the commas that the release looks for."""
    text = "a cat, in a category"
    stock = encode("sdxl", text)
    stock = [[stock[0][0].clone(), {key: value for key, value in stock[0][1].items() if key != prompt.HASH_KEY}]]
    word = found(text, " cat, ", conditioning=stock)
    assert word.text == "cat," and word.columns == (2, 3)
    assert torch.equal(word.rows, stock[0][0][0, [2, 3]])
    with pytest.raises(LikenessError, match="another text than"):
        found(text, "cat", conditioning=[[encode("sdxl", "a red robot")[0][0], {}]])


def test_the_releases_rule_refuses_what_moves_the_tokens():
    clip = base("sdxl")[1]
    tokens = clip.tokenize("a photo of a cat")
    tokens = {key: [[(torch.zeros(64), *entry[1:]) if place == 2 else entry for place, entry in enumerate(windows[0])]]
              for key, windows in tokens.items()}  # as the host puts an embedding there
    with pytest.raises(LikenessError, match="did not fit into the first window, moves them"):
        prompt.locate_as_release(clip, tokens, "a photo of a cat", "cat", 0)
