"""The native ViT equals the classes of transformers, from every key style of a release."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
import transformers

from likeness.models.vision.load import load_vit
from unit.vision_styles import EXTRA, FAMILY, HEADS, TINY, oracle, to_old, to_open_clip, to_timm

KINDS = ("dinov2", "registers", "swiglu", "mae", "siglip", "clip")
# timm and the original releases differ in two numbers from transformers; the oracle is built with theirs.
AS_TIMM = {"mae": {"layer_norm_eps": 1e-6}, "siglip": {"hidden_act": "gelu"}}


def pixels(height: int = 56, width: int = 56) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def expected(model, kind: str, x: torch.Tensor, **options):
    """(class token or None, patch tokens in raster order after the final norm, raw hidden states)."""
    if kind == "mae":
        tokens = (x.shape[2] // 14) * (x.shape[3] // 14)
        options["noise"] = torch.arange(float(tokens)).expand(len(x), -1)  # else it shuffles the patches
    out = model(x, output_hidden_states=True, **options)
    if kind == "clip":
        return out.pooler_output, model.post_layernorm(out.last_hidden_state[:, 1:]), out.hidden_states
    last = out.last_hidden_state
    if kind == "siglip":
        return None, last, out.hidden_states
    prefix = 1 + EXTRA[kind].get("num_register_tokens", 0)
    return last[:, 0], last[:, prefix:], out.hidden_states


def check(vit, model, kind: str, x: torch.Tensor, **options) -> None:
    cls, patches, hidden = expected(model, kind, x, **options)
    with torch.no_grad():
        out = vit(x, layers=(0, -1))
    assert out.grid == (x.shape[2] // 14, x.shape[3] // 14)
    assert (out.cls is None) == (cls is None)
    if cls is not None:
        torch.testing.assert_close(out.cls, cls, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.patches, patches, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.hidden[0], hidden[1], atol=1e-5, rtol=0)
    if kind in ("siglip", "clip"):  # the last entry of the others is already normed
        torch.testing.assert_close(
            vit.norm(out.hidden[1])[:, vit.config.prefix :], patches, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_names_in_memory(kind):
    model = oracle(kind)
    vit, config = load_vit(model.state_dict(), HEADS)
    assert (config.family, config.style) == (FAMILY.get(kind, kind), "transformers")
    check(vit, model, kind, pixels())


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_names_on_disk(kind, tmp_path):
    model = oracle(kind)
    model.save_pretrained(tmp_path)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    vit, _ = load_vit(state, HEADS)
    check(vit, model, kind, pixels())


@pytest.mark.parametrize("kind", ("dinov2", "registers", "swiglu", "mae"))
def test_transformers_4_names(kind):
    model = oracle(kind)
    state = to_old(model.state_dict())
    assert state.keys() != model.state_dict().keys()
    vit, _ = load_vit(state, HEADS)
    check(vit, model, kind, pixels())


@pytest.mark.parametrize("kind", KINDS)
def test_timm_and_original_names(kind):
    model = oracle(kind, **AS_TIMM.get(kind, {}))
    vit, config = load_vit(to_timm(model.state_dict()), HEADS)
    assert (config.family, config.style) == (FAMILY.get(kind, kind), "timm")
    check(vit, model, kind, pixels())


def test_timm_packs_swiglu_in_fc1():
    model = oracle("swiglu")
    state = to_timm(model.state_dict(), packed="fc1")
    assert "blocks.0.mlp.fc1.weight" in state and not any("w12" in key for key in state)
    vit, config = load_vit(state, HEADS)
    assert config.swiglu and config.mlp == 128
    check(vit, model, "swiglu", pixels())


def test_open_clip_names():
    model = oracle("clip")
    vit, config = load_vit(to_open_clip(model.state_dict()), HEADS)
    assert config.style == "open_clip" and config.pre_norm and not config.patch_bias
    check(vit, model, "clip", pixels())


@pytest.mark.parametrize("size", ((70, 70), (42, 84)))
@pytest.mark.parametrize("kind", KINDS)
def test_positions_of_another_grid(kind, size):
    model = oracle(kind)
    vit, _ = load_vit(model.state_dict(), HEADS)
    options = {} if kind in ("dinov2", "registers", "swiglu") else {"interpolate_pos_encoding": True}
    check(vit, model, kind, pixels(*size), **options)


def test_pixels_beyond_the_last_patch_are_left_out():
    model = oracle("siglip")
    vit, _ = load_vit(model.state_dict(), HEADS)
    out = vit(pixels(60, 60))
    torch.testing.assert_close(out.patches, vit(pixels(60, 60)[..., :56, :56]).patches)
    assert out.grid == (4, 4)


def test_mae_tokens_are_in_raster_order():
    """transformers shuffles the patches even with mask_ratio 0; a shuffled order must be visible here."""
    model = oracle("mae")
    vit, _ = load_vit(model.state_dict(), HEADS)
    x = pixels()
    torch.manual_seed(3)
    with torch.no_grad():
        shuffled = model(x)
        ours = vit(x).patches
    tokens = shuffled.last_hidden_state[:, 1:]
    restored = torch.gather(tokens, 1, shuffled.ids_restore[..., None].expand_as(tokens))
    torch.testing.assert_close(ours, restored, atol=1e-5, rtol=0)
    assert (ours - tokens).abs().max() > 1e-2  # the oracle did shuffle, and our order is another one
    distance = torch.cdist(ours, ours) + 1e3 * torch.eye(16)
    assert distance.min() > 1e-2  # no two tokens are alike: any permutation fails the comparison above


def test_pretraining_file_of_mae_without_its_decoder(tmp_path):
    torch.manual_seed(0)
    model = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            **TINY,
            **EXTRA["mae"],
            decoder_hidden_size=32,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=32,
        )
    ).eval()
    model.save_pretrained(tmp_path)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert any(key.startswith("decoder.") for key in state)
    vit, config = load_vit(state, HEADS)
    assert config.depth == 3
    check(vit, model.vit, "mae", pixels())
