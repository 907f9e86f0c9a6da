"""Families and sizes from names and shapes alone, at true sizes; what is refused, and how."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from likeness.models.common.errors import LikenessError
from likeness.models.common.files import read_header, save
from likeness.models.vision.keys import identify
from likeness.models.vision.load import load_vit
from unit.recipe import manifest
from unit.vision_styles import HEADS, meta_state, on_meta, oracle, to_old, to_open_clip, to_timm

L14 = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}
G14 = {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "patch_size": 14}
TRUE_SIZES = {  # kind, transformers config, what must be told
    "dinov2-small": (
        "dinov2",
        dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14, image_size=518),
        dict(width=384, heads=6, grid=37, mlp=1536, registers=0),
    ),
    "dinov2-large-registers": (
        "registers",
        dict(L14, image_size=518),
        dict(width=1024, depth=24, heads=16, registers=4, antialias=True, swiglu=False),
    ),
    "dinov2-giant-registers": (
        "registers",
        dict(G14, image_size=518, use_swiglu_ffn=True),
        dict(width=1536, depth=40, heads=24, swiglu=True, mlp=4096, layer_scale=True),
    ),
    "mae-large": (
        "mae",
        dict(L14, patch_size=16, image_size=224, intermediate_size=4096),
        dict(width=1024, depth=24, heads=16, patch=16, grid=14, layer_scale=False, registers=0),
    ),
    "siglip-so400m": (
        "siglip",
        dict(L14, hidden_size=1152, num_hidden_layers=27, intermediate_size=4304, image_size=384),
        dict(width=1152, depth=27, heads=16, mlp=4304, grid=27, cls=False, cls_position=False),
    ),
    "siglip2-giant": (
        "siglip",
        dict(
            L14, hidden_size=1536, num_hidden_layers=40, intermediate_size=6144, image_size=256, patch_size=16
        ),
        dict(width=1536, heads=16, grid=16),
    ),
    "clip-l": (
        "clip",
        dict(L14, intermediate_size=4096, image_size=224),
        dict(width=1024, heads=16, activation="quick_gelu", pre_norm=True, patch_bias=False),
    ),
    "clip-h": (
        "clip",
        dict(L14, hidden_size=1280, num_hidden_layers=32, intermediate_size=5120, image_size=224),
        dict(width=1280, depth=32, heads=16, activation="gelu", eps=1e-5, grid=16),
    ),
    "clip-bigg": (
        "clip",
        dict(L14, hidden_size=1664, num_hidden_layers=48, intermediate_size=8192, image_size=224),
        dict(width=1664, depth=48, heads=16, activation="gelu"),
    ),
}
STYLES = {
    "memory": lambda state: state,
    "timm": to_timm,
    "timm-fc1": lambda state: to_timm(state, packed="fc1"),
}


@pytest.mark.parametrize("name", TRUE_SIZES)
def test_true_sizes_are_told_and_fit(name):
    kind, config, told = TRUE_SIZES[name]
    state = meta_state(kind, **config)
    layouts = [make(state) for make in STYLES.values()]
    layouts += [to_open_clip(state)] if kind == "clip" else []
    layouts += [to_old(state)] if kind in ("dinov2", "registers", "mae") else []
    for layout in layouts:
        found = identify({key: list(tensor.shape) for key, tensor in layout.items()})
        assert found.family == {"registers": "dinov2"}.get(kind, kind)
        assert {key: getattr(found, key) for key in told} == told
        vit, same = load_vit(layout)
        assert same == found
        assert all(tensor.is_meta for tensor in vit.state_dict().values())


@pytest.mark.parametrize(
    "name, told",
    [
        (
            "keys_hf_dinov2_with_registers_large",
            dict(family="dinov2", style="transformers", grid=37, cls_position=True),
        ),
        (
            "keys_timm_vit_large_patch14_reg4_dinov2_384",
            dict(family="dinov2", style="timm", grid=27, cls_position=False),
        ),
        ("keys_hf_siglip_so400m_vision", dict(family="siglip", style="transformers", activation="gelu_tanh")),
        (
            "keys_timm_vit_so400m_patch14_siglip_384_384",
            dict(family="siglip", style="timm", activation="gelu"),
        ),
    ],
)
def test_golden_manifests(name, told):
    shapes = manifest(name)
    vit, config = load_vit(on_meta(shapes))
    assert config == identify(shapes)
    assert {key: getattr(config, key) for key in told} == told
    assert (config.width, config.depth) == ((1024, 24) if config.family == "dinov2" else (1152, 27))
    assert config.registers == (4 if config.family == "dinov2" else 0)
    ignored = sum(
        tensor.numel()
        for key, tensor in on_meta(shapes).items()
        if key.startswith(("head.", "attn_pool.")) or key.endswith("mask_token")
    )
    assert sum(p.numel() for p in vit.parameters()) + ignored == sum(
        t.numel() for t in on_meta(shapes).values()
    )


@pytest.mark.parametrize(
    "prefix",
    (
        "vit.",
        "dinov2.",
        "vision_model.",
        "model.",
        "visual.",
        "visual.trunk.",
        "module.",
        "module.visual.trunk.",
    ),
)
def test_prefixes_are_stripped(prefix):
    plain = to_timm(oracle("dinov2").state_dict())
    state = {prefix + key: tensor for key, tensor in plain.items()}
    state["text.blocks.0.norm1.weight"] = torch.zeros(3)  # a text tower beside it
    assert identify(state, HEADS) == identify(plain, HEADS)
    ours, _ = load_vit(state, HEADS)
    same, _ = load_vit(plain, HEADS)
    for name, tensor in same.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


def test_a_checkpoint_one_level_down_is_opened():
    plain = to_timm(oracle("mae").state_dict())
    vit, config = load_vit({"model": plain, "epoch": 3}, HEADS)
    assert config.family == "mae" and torch.equal(vit.norm.weight, plain["norm.weight"])


def test_the_order_in_the_file_does_not_decide():
    one = to_timm(oracle("dinov2").state_dict())
    two = {"visual." + key: tensor for key, tensor in to_timm(oracle("mae").state_dict()).items()}
    for state in ({**one, **two}, {**two, **one}):
        assert identify(state, HEADS) == identify(one, HEADS)


def test_chunked_blocks_of_the_original_training_code():
    plain = to_timm(oracle("dinov2").state_dict())
    chunked = {
        re.sub(r"^blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}", key): tensor
        for key, tensor in plain.items()
    }
    assert "blocks.1.2.norm1.weight" in chunked and "blocks.0.1.norm1.weight" in chunked
    ours, config = load_vit(chunked, HEADS)
    assert config.depth == 3
    for index in range(3):
        assert torch.equal(ours.blocks[index].fc1.weight, plain[f"blocks.{index}.mlp.fc1.weight"])


def test_eps_depends_on_family_and_release():
    eps = {
        (kind, style): identify(make(oracle(kind).state_dict()), HEADS).eps
        for kind in ("dinov2", "mae", "siglip", "clip")
        for style, make in STYLES.items()
        if style != "timm-fc1"
    }
    assert eps == {
        ("dinov2", "memory"): 1e-6,
        ("dinov2", "timm"): 1e-6,
        ("mae", "memory"): 1e-12,
        ("mae", "timm"): 1e-6,
        ("siglip", "memory"): 1e-6,
        ("siglip", "timm"): 1e-6,
        ("clip", "memory"): 1e-5,
        ("clip", "timm"): 1e-5,
    }


def test_unknown_width_asks_for_num_heads():
    state = oracle("dinov2").state_dict()
    with pytest.raises(LikenessError, match="unknown width 48.*add num_heads to the metadata"):
        identify(state)
    assert identify(state, {"num_heads": "6"}).heads == 6
    for wrong in ("5", "0", "-4", "many"):
        with pytest.raises(LikenessError, match=f"num_heads = {wrong}.*width 48"):
            identify(state, {"num_heads": wrong})


def test_num_heads_in_the_metadata_beats_the_table():
    state = meta_state(
        "mae", hidden_size=384, num_hidden_layers=1, num_attention_heads=6, intermediate_size=64
    )
    assert identify(state).heads == 6
    assert identify(state, {"num_heads": "12"}).heads == 12


def test_metadata_override_family_and_activation():
    state = oracle("mae").state_dict()
    config = identify(state, {**HEADS, "likeness.family": "dinov2", "likeness.activation": "gelu_tanh"})
    assert (config.family, config.activation, config.eps, config.layer_scale) == (
        "dinov2",
        "gelu_tanh",
        1e-6,
        False,
    )
    assert load_vit(state, {**HEADS, "likeness.family": "dinov2"})[0].blocks[0].ls1 is None
    for key in ("likeness.family", "likeness.activation"):
        with pytest.raises(LikenessError, match=f"{key} = other"):
            identify(state, {**HEADS, key: "other"})


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", ("registers", "swiglu", "mae", "siglip", "clip"))
def test_missing_and_unexpected_tensors_are_named(kind, style):
    state = STYLES[style](oracle(kind).state_dict())
    last = [key for key in state if ".2." in key][:5]
    with pytest.raises(LikenessError, match=r"lacks blocks\.2\.\w+.*and \d+ more: the file is incomplete"):
        load_vit({key: tensor for key, tensor in state.items() if key not in last}, HEADS)
    extra = {f"adapter.{index}.weight": torch.zeros(2) for index in range(5)}
    with pytest.raises(
        LikenessError, match=r"adapter\.0\.weight, adapter\.1\.weight, adapter\.2\.weight and 2 more"
    ):
        load_vit({**state, **extra}, HEADS)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_lost_tensor_is_noticed(data):
    """But for the mask token, which is ignored, and registers, which no other size tells."""
    state = to_timm(oracle(data.draw(st.sampled_from(("dinov2", "swiglu", "mae", "clip")))).state_dict())
    lost = data.draw(st.sampled_from(sorted(key for key in state if key != "mask_token")))
    with pytest.raises(LikenessError):
        load_vit({key: tensor for key, tensor in state.items() if key != lost}, HEADS)


def test_a_wrong_shape_is_named():
    state = oracle("siglip").state_dict()
    state["encoder.layers.1.mlp.fc1.bias"] = torch.zeros(5)
    with pytest.raises(LikenessError, match=r"blocks\.1\.fc1\.bias \(5,\) instead of \(96,\)"):
        load_vit(state, HEADS)


@pytest.mark.parametrize(
    "key, guess",
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "a diffusion model"),
        ("lora_unet_down_blocks_0.lora_up.weight", "a LoRA"),
        ("decoder.up_blocks.0.weight", "a VAE"),
        ("text_model.encoder.layers.0.weight", "a text encoder"),
        ("control_model.x", "a ControlNet"),
        ("layer.0.rope_embeddings.x", "DINOv3"),
        ("image_proj.latents", "an IP-Adapter"),
        ("weird", "no kind that is known"),
    ],
)
def test_what_is_no_encoder_is_named(key, guess):
    state = {key: torch.zeros(2)}
    assert identify(state) is None
    with pytest.raises(LikenessError, match=f"not a vision encoder.*{guess}"):
        load_vit(state)


@pytest.mark.parametrize(
    "change",
    [
        {"pos_embed": (1, 30, 48)},
        {"pos_embed": (1, 16, 32)},
        {"pos_embed": (1, 4, 4, 48)},
        {"pos_embed": (1, 0, 48)},
        {"patch_embed.proj.weight": (48, 3, 14, 7)},
        {"patch_embed.proj.weight": (48, 588)},
        {"patch_embed.proj.weight": (48, 1, 14, 14)},
        {"register_tokens": (48,)},
    ],
)
def test_other_transformers_are_not_taken_for_ours(change):
    state = {key: tuple(tensor.shape) for key, tensor in to_timm(oracle("registers").state_dict()).items()}
    assert identify(state, HEADS) is not None
    assert identify({**state, **change}, HEADS) is None


def test_identify_works_from_a_file_header(tmp_path):
    path = tmp_path / "encoder.safetensors"
    save(path, oracle("registers").state_dict(), HEADS)
    header = read_header(path)
    assert identify(header.tensors, header.metadata) == identify(oracle("registers").state_dict(), HEADS)
