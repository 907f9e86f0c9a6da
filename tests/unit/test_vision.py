"""What the native ViT does with grids, types and attention; golden numbers of timm's encoders."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from likeness.models.common.attention import sdpa
from likeness.models.common.errors import LikenessError
from likeness.models.vision.load import load_vit
from likeness.models.vision.vit import ViT, VitConfig
from unit import recipe

BASE = VitConfig(
    "dinov2", "timm", width=24, depth=2, heads=3, mlp=32, patch=4, grid=3, registers=2, layer_scale=True
)


def tiny(config: VitConfig = BASE, **options) -> ViT:
    """ViT with every parameter random, in evaluation mode."""
    vit = ViT(config, **options).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for parameter in vit.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return vit


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(6))


class _Cast:
    """Stand-in for the host's casting layers: weights of any type, work in the type of the input."""

    def _cast(self, x):
        return self.weight.to(x), None if self.bias is None else self.bias.to(x)


class _Linear(_Cast, nn.Linear):
    def forward(self, x):
        return F.linear(x, *self._cast(x))


class _Conv2d(_Cast, nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, *self._cast(x))


class _LayerNorm(_Cast, nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, *self._cast(x), self.eps)


CASTING = SimpleNamespace(Linear=_Linear, Conv2d=_Conv2d, LayerNorm=_LayerNorm, Embedding=nn.Embedding)


@pytest.mark.parametrize("stored", (torch.float16, torch.bfloat16))
def test_host_casting_reaches_the_bare_parameters(stored):
    state = {key: tensor.to(stored) for key, tensor in tiny().state_dict().items()}
    cast, plain = ViT(BASE, CASTING, dtype=stored).eval(), ViT(BASE).eval()
    cast.load_state_dict(state)
    plain.load_state_dict(state)  # the same rounded numbers, held in float32
    for size in (12, 20):
        out = cast(noise(1, 3, size, size))
        assert out.cls.dtype == out.patches.dtype == torch.float32
        torch.testing.assert_close(out.patches, plain(noise(1, 3, size, size)).patches, atol=1e-5, rtol=0)
        assert cast(noise(1, 3, size, size).bfloat16()).patches.dtype == torch.bfloat16


def test_every_layer_with_weights_comes_from_operations():
    config = BASE._replace(pre_norm=True)
    kinds = {type(module) for module in ViT(config, CASTING).modules()}
    assert kinds == {ViT, nn.ModuleList, _Linear, _Conv2d, _LayerNorm, type(ViT(config).blocks[0])}


def test_attention_can_be_replaced():
    calls = []

    def attention(q, k, v, heads):
        calls.append((tuple(q.shape), heads))
        return sdpa(q, k, v, heads)

    vit, x = tiny(), noise(2, 3, 12, 12)
    before = vit(x).patches
    vit.attention = attention
    assert torch.equal(vit(x).patches, before)
    assert calls == [((2, 12, 24), 3)] * 2
    vit.attention = lambda q, k, v, heads: v
    assert not torch.allclose(vit(x).patches, before)


def test_sdpa_by_hand_and_with_a_mask():
    q, k, v = noise(3, 2, 4, 6).unbind(0)
    by_head = []
    for part in (slice(0, 3), slice(3, 6)):
        weights = torch.softmax(q[..., part] @ k[..., part].transpose(1, 2) / 3**0.5, dim=-1)
        by_head.append(weights @ v[..., part])
    torch.testing.assert_close(sdpa(q, k, v, 2), torch.cat(by_head, dim=-1))
    only_first = torch.zeros(4, 4, dtype=torch.bool)
    only_first[:, 0] = True
    torch.testing.assert_close(sdpa(q, k, v, 2, only_first), v[:, :1].expand(-1, 4, -1))


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    batch=st.integers(1, 3),
    cls=st.booleans(),
    registers=st.integers(0, 2),
)
def test_shapes_on_any_grid(rows, columns, batch, cls, registers):
    config = BASE._replace(cls=cls, cls_position=cls, registers=registers)
    out = tiny(config)(noise(batch, 3, rows * 4, columns * 4), layers=(1, 0))
    assert out.grid == (rows, columns)
    assert out.patches.shape == (batch, rows * columns, 24)
    assert (out.cls is None) if not cls else out.cls.shape == (batch, 24)
    assert [hidden.shape for hidden in out.hidden] == [(batch, config.prefix + rows * columns, 24)] * 2


def test_patches_are_rows_first():
    """With attention switched off, one bright patch changes its own token and no other."""
    vit = tiny()
    for block in vit.blocks:
        block.o.weight.zero_()
    x = noise(1, 3, 8, 20)
    bright = x.clone()
    bright[..., 4:8, 12:16] += 3  # row 1, column 3 of a 2 x 5 grid
    changed = (vit(bright).patches - vit(x).patches).abs().amax(-1)[0]
    assert (changed > 1e-3).nonzero().flatten().tolist() == [1 * 5 + 3]


def test_position_table_follows_rows_and_columns():
    """A table that grows along the columns stays so on a wider grid (rows and columns are not swapped)."""
    vit = tiny()
    ramp = torch.arange(3.0).repeat(3, 1)  # value = column
    vit.position.zero_()
    vit.position[0, 1:] = ramp.flatten()[:, None]
    table = vit.positions(2, 6, like=noise(1)).view(2, 6, 24)
    assert torch.allclose(table[0], table[1], atol=1e-6)
    assert (table[0, 1:, 0] > table[0, :-1, 0]).all()
    assert torch.equal(vit.positions(3, 3, like=noise(1)).view(3, 3, 24)[..., 0], ramp)


def test_the_class_row_of_the_table_belongs_to_the_class_token():
    vit = tiny()
    tokens, _ = vit.embed(noise(1, 3, 12, 12))
    torch.testing.assert_close(tokens[:, :1], vit.cls + vit.position[:, :1])
    torch.testing.assert_close(tokens[:, 1:3], vit.registers)
    without = tiny(BASE._replace(cls_position=False))
    torch.testing.assert_close(without.embed(noise(1, 3, 12, 12))[0][:, :1], without.cls)


def test_hidden_states_are_raw_blocks_in_the_asked_order():
    vit, x = tiny(), noise(1, 3, 12, 12)
    first = vit.blocks[0](vit.embed(x)[0], sdpa)
    out = vit(x, layers=(-1, 0))
    torch.testing.assert_close(out.hidden[1], first)
    torch.testing.assert_close(out.hidden[0], vit.blocks[1](first, sdpa))
    torch.testing.assert_close(out.patches, vit.norm(out.hidden[0])[:, 3:])
    with pytest.raises(LikenessError, match="2 blocks.*(2,)"):
        vit(x, layers=(2,))


@pytest.mark.parametrize("shape", ((1, 4, 12, 12), (3, 12, 12), (1, 3, 3, 12)))
def test_wrong_pixels_are_refused(shape):
    with pytest.raises(LikenessError, match="at least 4 x 4 pixels"):
        tiny()(noise(*shape))


def test_loading_leaves_the_callers_tensors_alone():
    state = {
        f"blocks.{i}.{k}": v
        for i in range(2)
        for k, v in {
            "norm1.weight": noise(24),
            "norm1.bias": noise(24),
            "attn.qkv.weight": noise(72, 24),
            "attn.qkv.bias": noise(72),
            "attn.proj.weight": noise(24, 24),
            "attn.proj.bias": noise(24),
            "norm2.weight": noise(24),
            "norm2.bias": noise(24),
            "mlp.fc1.weight": noise(32, 24),
            "mlp.fc1.bias": noise(32),
            "mlp.fc2.weight": noise(24, 32),
            "mlp.fc2.bias": noise(24),
        }.items()
    }
    state |= {
        "cls_token": noise(1, 1, 24),
        "pos_embed": noise(1, 10, 24),
        "patch_embed.proj.weight": noise(24, 3, 4, 4),
        "patch_embed.proj.bias": noise(24),
        "norm.weight": noise(24),
        "norm.bias": noise(24),
    }
    before = {key: tensor.clone() for key, tensor in state.items()}
    for dtype in (torch.float16, None):
        vit, config = load_vit(state, {"num_heads": "3"}, operations=CASTING, dtype=dtype)
        assert config.family == "mae" and not vit.training
        for parameter in vit.parameters():
            assert parameter.dtype == (dtype or torch.float32) and not parameter.requires_grad
            parameter.data.zero_()
    assert all(torch.equal(before[key], tensor) for key, tensor in state.items())


# --- golden numbers of timm, recipe of tests/golden/realcustom ---


@pytest.mark.parametrize("name", ("vit_dinov2reg_small", "vit_siglip_small"))
def test_blocks_equal_timm(name):
    vit, config = load_vit(recipe.weights(name), {"num_heads": "2"})
    golden = recipe.golden(name)
    x = torch.from_numpy(recipe.stream(5000, 3 * 384 * 384).astype(np.float16).reshape(1, 3, 384, 384)).float()
    out = vit(x, layers=(0, 1, 2))
    assert out.grid == (27, 27)
    for index, hidden in enumerate(out.hidden):
        patches = hidden[:, config.prefix :].view(1, 27, 27, 64)
        torch.testing.assert_close(patches[:, ::2, ::2], golden[f"out.block{index}_s2"], atol=1e-5, rtol=0)
        torch.testing.assert_close(
            patches.double().mean((1, 2)).float(), golden[f"out.block{index}_mean"], atol=1e-5, rtol=0
        )
