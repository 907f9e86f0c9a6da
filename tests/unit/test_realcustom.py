"""RealCustom++'s projector, masks and file names against the release's numbers."""
from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

from likeness.models.common.errors import LikenessError
from likeness.models.realcustom import config as configs
from likeness.models.realcustom.adapter import build, release_names
from likeness.models.realcustom.masks import MaskSum, resized, subject_mask, word_map
from likeness.models.realcustom.projector import UNREAD, build_projector, load_projector
from unit.recipe import GOLDEN, golden, manifest, weights

CLOSE = {"atol": 1e-5, "rtol": 0}
VARIANTS = ("highres", "highres_shallow")
MASKS = golden("mask_8x8")


def meta(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in manifest(name).items()}


# -- the projector ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("prefix", ("", configs.PROJECTOR, f"module.{configs.PROJECTOR}"))
def test_projector_equals_the_release(prefix):
    want = golden("projector_highres")
    module = load_projector({prefix + key: value for key, value in weights("projector_highres").items()})
    deep, local = want["in.deep"], want["in.local"]
    torch.testing.assert_close(module.min_attention(deep, local, module.attention), want["mid.min_attention"], **CLOSE)
    torch.testing.assert_close(module.projector(want["mid.min_attention"]), want["mid.projector"], **CLOSE)
    torch.testing.assert_close(module.projector_base(deep), want["mid.base"], **CLOSE)
    torch.testing.assert_close(module([deep, local]), want["out"], **CLOSE)


def test_adaptive_projector_equals_the_release():
    want = golden("projector_highres_adaptive")
    state = {**weights("projector_highres_adaptive"), "scale_value.value": want["w.scale_value.value"]}
    out = load_projector(state)([want["in.deep"], want["in.local"]])
    torch.testing.assert_close(out, want["out"], **CLOSE)
    torch.testing.assert_close(out, want["mid.base"] + 0.3 * want["mid.projector"], **CLOSE)


def by_hand(state: dict[str, torch.Tensor], x: torch.Tensor, others: torch.Tensor, which: str) -> torch.Tensor:
    """MLP(attention) in float64 from the formula, one batch row at a time."""
    w = {key: value.double() for key, value in state.items()}

    def norm(y, name):
        y = y - y.mean(-1, keepdim=True)
        y = y / (y.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return y * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(y, name):
        return y @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def gelu(y):
        return y * (1 + torch.erf(y / math.sqrt(2))) / 2

    a, m = f"min_attention{which}", f"projector{which}"
    q, k, v = linear(norm(x, f"{a}.norm1"), f"{a}.to_q"), *(linear(norm(others, f"{a}.norm2"), f"{a}.to_{n}") for n in "kv")
    heads = [(q[..., i:i + 64] @ k[..., i:i + 64].mT / 8).softmax(-1) @ v[..., i:i + 64] for i in range(0, q.shape[-1], 64)]
    y = gelu(linear(torch.cat(heads, -1), f"{m}.0"))
    return norm(linear(gelu(linear(y, f"{m}.2")), f"{m}.4"), f"{m}.5")


def test_shallow_projector_equals_the_formula_and_reads_no_local():
    state = weights("projector_highres")
    generator = torch.Generator().manual_seed(5)
    more = {key.replace("min_attention.", "min_attention2.").replace("projector.", "projector2."):
            value + 0.05 * torch.randn(value.shape, generator=generator)
            for key, value in state.items() if not key.startswith("projector_base")}
    state.update(more)
    *earlier, deep, local = (torch.randn(2, n, 128, generator=generator) for n in (9, 9, 9, 9, 36))
    module = load_projector(state)
    out = module([*earlier, deep, local])
    base = deep.double() @ state["projector_base.weight"].double().T + state["projector_base.bias"].double()
    fine = by_hand(state, deep.double(), torch.cat(earlier, 1).double(), "2")
    torch.testing.assert_close(out.double(), torch.cat([base, fine], 1), **CLOSE)
    assert torch.equal(out, module([*earlier, deep, None]))


def test_wrong_number_of_features_and_wrong_tensors():
    module = load_projector(weights("projector_highres"))
    with pytest.raises(LikenessError, match="reads 2 features, 5 came"):
        module([torch.zeros(1, 9, 128)] * 5)
    state = weights("projector_highres")
    del state["projector.4.bias"]
    with pytest.raises(LikenessError, match="projector.4.bias"):
        load_projector(state)
    with pytest.raises(LikenessError, match="no RealCustom"):
        load_projector({"a": torch.zeros(1)})


# -- files -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prefix", ("", "module.", "unet._orig_mod."))
def test_adapter_files_are_told_by_their_keys(variant, prefix):
    state = {prefix + key: value for key, value in meta(f"keys_added_realcustom_sigdino_{variant}").items()}
    assert configs.is_realcustom(state)
    config, parts = configs.identify(state), configs.split(state)
    shallow = variant != "highres"
    assert config.shallow is shallow and not config.adaptive and not parts.base
    assert (config.width, config.vision, config.base, len(config.layers)) == (2048, 2176, "sdxl", 70)
    assert config.blocks == (((7, 13, 19, 25), (4, 10, 16, 22)) if shallow else ((25,), (22,)))
    assert [channels for _, channels in config.layers].count(640) == 10
    # nothing missing, nothing unexpected
    module = build_projector(parts.projector, device="meta")
    module.load_state_dict(parts.projector, strict=True, assign=True)
    assert module.shallow is shallow
    assert {key: list(value.shape) for key, value in module.state_dict().items()} == manifest(
        f"keys_projector_realcustom_sigdino_{variant}")
    assert set(parts.layers) == {f"{key}.{which}" for key, _ in config.layers for which in "kv"}
    tokens = module([torch.empty(1, 729, 2176, device="meta")] * (4 if shallow else 1)
                    + [torch.empty(1, 2916, 2176, device="meta")])
    assert tuple(tokens.shape) == (1, 1458 if shallow else 729, 2048)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_whole_adapter_has_the_shapes_of_the_file(variant):
    """Keys and values of all 70 layers too; the shallow form leaves out what it never reads."""
    name = f"keys_added_realcustom_sigdino_{variant}"
    parts = configs.split(meta(name))
    module = build(configs.identify(meta(name)), parts)
    own = {key: list(value.shape) for key, value in release_names(module.state_dict(), 2).items()}
    unread = tuple(configs.PROJECTOR + part for part in UNREAD) if variant != "highres" else ()
    assert own == {key: shape for key, shape in manifest(name).items() if not key.startswith(unread)}
    wide, key = dict(parts.layers), "output.1.3.v"
    wide[key] = torch.empty(1280, 1024, device="meta")
    with pytest.raises(LikenessError, match=r"output_1_3\.v\.weight is \[1280, 1024\] instead of \[1280, 2048\]"):
        build(configs.identify(meta(name)), parts._replace(layers=wide))


@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_unets_are_told_and_sorted(variant):
    state = manifest(f"keys_unet_realcustom_sigdino_{variant}")
    parts = configs.split(state)
    assert configs.is_realcustom(state) and parts.base == manifest("keys_unet_sdxl")
    assert len(parts.base) >= configs.FULL_UNET
    assert configs.identify(state) == configs.identify(manifest(f"keys_added_realcustom_sigdino_{variant}"))
    assert not configs.is_realcustom(parts.base)


def test_layers_stand_in_the_order_of_the_release():
    config = configs.identify(manifest("keys_added_realcustom_sigdino_highres"))
    ids = json.loads((GOLDEN / "cross_attention_ids_realcustom_sigdino_highres.json").read_text(encoding="utf-8"))
    places = {configs.layer_key(f"{name}.attn2.to_k_vision.weight")[0]: number for name, number in ids.items()}
    assert [places[key] for key, _ in config.layers] == list(range(70))
    numbers = [key.split(".")[:2] for key, _ in config.layers]
    assert numbers[0] == ["input", "4"] and numbers[4] == ["input", "7"] and numbers[24] == ["middle", "0"]
    assert numbers[34] == ["output", "0"] and numbers[64] == ["output", "3"]


def test_other_encoders_need_their_names_in_the_file():
    state = {key: value for key, value in manifest("keys_tiny_unet").items()}
    with pytest.raises(LikenessError, match="features of width 128"):
        configs.identify(state)
    config = configs.identify(state, {configs.METADATA_KEY: json.dumps(
        {"encoders": [["siglip", 64], ["dinov2", 64]], "blocks": [[1], [2]], "size": 42})})
    assert (config.encoders, config.blocks, config.size) == ((("siglip", 64), ("dinov2", 64)), ((1,), (2,)), 42)
    assert configs.identify(state, configs.to_metadata(config)) == config
    for text in ('{"encoders": 3}', "nonsense", '{"blocks": [[1, 2], [2]], "encoders": [["siglip", 64], ["dinov2", 64]]}'):
        with pytest.raises(LikenessError, match="likeness.realcustom"):
            configs.identify(state, {configs.METADATA_KEY: text})


def test_files_that_lack_a_part_are_refused():
    state = manifest("keys_added_realcustom_sigdino_highres")
    for part, words in (("projector_base.weight", "lacks its projector"), ("up_blocks.0.attentions.1.transformer_blocks.3."
                        "attn2.to_v_vision.weight", "layer output.1.3")):
        broken = {key: value for key, value in state.items() if not key.endswith(part)}
        with pytest.raises(LikenessError, match=words):
            configs.identify(broken)


# -- masks -----------------------------------------------------------------------------------------------
CROSS = [key for key in MASKS if key.startswith("out.cross.")]
SELF = [key for key in MASKS if key.startswith("out.self.")]


def maps() -> list[torch.Tensor]:
    return [MASKS[f"crossmap.{number}"] for number in range(7)]


@pytest.mark.parametrize("name", [*CROSS, *SELF])
def test_masks_equal_the_release(name):
    strategy = name.split(".", 2)[2].split("+")
    self_maps = [MASKS["selfmap.0"], MASKS["selfmap.1"]] if name in SELF else []
    out = subject_mask(maps(), MASKS["target_token"][0], float(MASKS["mask_scope"]), strategy, (8, 8), self_maps)
    assert out.shape == MASKS[name].shape
    torch.testing.assert_close(out, MASKS[name], **CLOSE)


def test_no_file_of_masks_is_left_out():
    assert len(CROSS) == 15 and len(SELF) == 7


def test_a_running_sum_is_the_same_mask():
    for strategy in (("max_norm",), ("min_max_per_channel",), ("min_max_norm", "binary"), ()):
        total = MaskSum(strategy, (8, 8))
        for one in maps():
            total.add(word_map(one, MASKS["target_token"][0], (8, 8)))
            assert total.total.shape == (2, 1, 8, 8)
        want = subject_mask(maps(), MASKS["target_token"][0], 0.25, strategy, (8, 8))
        assert torch.equal(total.finish(0.25), want)


def test_a_word_that_is_nowhere_gives_an_empty_mask():
    out = subject_mask(maps(), torch.zeros(77), 0.25, ("max_norm",), (8, 8))
    assert out.abs().max() == 0


@pytest.mark.parametrize("size", ((8, 8), (9, 13), (5, 4)))
def test_any_size_keeps_its_share(size):
    out = subject_mask(maps(), MASKS["target_token"][0], 0.3, "max_norm", size)
    assert out.shape == (2, 1, *size)
    assert [(row > 0).sum() for row in out] == [int(size[0] * size[1] * 0.3)] * 2


def test_half_size_is_the_mean_of_two_by_two():
    mask = MASKS["out.cross.max_norm"]
    torch.testing.assert_close(resized(mask, (4, 4)), F.avg_pool2d(mask, 2), atol=1e-7, rtol=0)
