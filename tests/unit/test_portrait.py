"""PhotoMaker and InstantID without the host: the public files' names and shapes, and every module against its formula."""
from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from harness import portraits
from likeness.models.common.errors import LikenessError
from likeness.models.portrait import instantid, photomaker
from likeness.models.portrait.perceiver import Perceiver, perceiver_config
from likeness.models.portrait.weights import fill, part

TINY = portraits.TINY
State = dict[str, Tensor]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def meta(shapes: dict) -> State:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def parameters(shapes: dict) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


# -- formulas, written out in float64 ----------------------------------------------------------------------
def norm(x: Tensor, state: State, name: str) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    spread = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (spread + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x: Tensor, state: State, name: str) -> Tensor:
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2 ** 0.5))


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    d = q.shape[-1] // heads
    out = []
    for h in range(heads):
        s = slice(h * d, (h + 1) * d)
        out.append(((q[..., s] @ k[..., s].transpose(-1, -2)) / d ** 0.5).softmax(-1) @ v[..., s])
    return torch.cat(out, -1)


def perceiver(latents: Tensor, source: Tensor, state: State, depth: int, heads: int) -> Tensor:
    source = linear(source, state, "proj_in")
    for n in range(depth):
        a, m = f"layers.{n}.0", f"layers.{n}.1"
        x, l = norm(source, state, f"{a}.norm1"), norm(latents, state, f"{a}.norm2")  # noqa: E741
        kv = linear(torch.cat([x, l], 1), state, f"{a}.to_kv")
        k, v = kv[..., :kv.shape[-1] // 2], kv[..., kv.shape[-1] // 2:]
        latents = latents + linear(attention(linear(l, state, f"{a}.to_q"), k, v, heads), state, f"{a}.to_out")
        latents = latents + linear(gelu(linear(norm(latents, state, f"{m}.0"), state, f"{m}.1")), state, f"{m}.3")
    return norm(linear(latents, state, "proj_out"), state, "norm_out")


def tower(pixels: Tensor, state: State, size: portraits.Sizes) -> tuple[Tensor, Tensor]:
    """(last hidden state (n, 1 + p, d), pooled (n, d)) of CLIP with quick GELU."""
    n, w, heads = len(pixels), size.vision, size.vision // 64
    kernel = state["embeddings.patch_embedding.weight"].reshape(w, -1)
    cells = pixels.unfold(2, 14, 14).unfold(3, 14, 14)  # n, 3, rows, columns, 14, 14
    patches = cells.permute(0, 2, 3, 1, 4, 5).reshape(n, -1, kernel.shape[1]) @ kernel.T
    x = torch.cat([state["embeddings.class_embedding"].expand(n, 1, w), patches], 1)
    x = norm(x + state["embeddings.position_embedding.weight"], state, "pre_layrnorm")
    for k in range(size.depth):
        layer = f"encoder.layers.{k}"
        y = norm(x, state, f"{layer}.layer_norm1")
        q, key, v = (linear(y, state, f"{layer}.self_attn.{p}_proj") for p in "qkv")
        x = x + linear(attention(q, key, v, heads), state, f"{layer}.self_attn.out_proj")
        y = linear(norm(x, state, f"{layer}.layer_norm2"), state, f"{layer}.mlp.fc1")
        x = x + linear(y / (1 + (-1.702 * y).exp()), state, f"{layer}.mlp.fc2")
    return x, norm(x[:, 0], state, "post_layernorm")


def fuse(text: Tensor, identity: Tensor, state: State) -> Tensor:
    def mlp(x: Tensor, name: str) -> Tensor:
        return linear(gelu(linear(norm(x, state, f"{name}.layernorm"), state, f"{name}.fc1")), state, f"{name}.fc2")
    x = mlp(torch.cat([text, identity], -1), "mlp1") + text
    return norm(x + mlp(x, "mlp2"), state, "layer_norm")


def double(state: State) -> State:
    return {name: value.double() for name, value in state.items()}


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got.double(), wanted, atol=2e-5, rtol=1e-4)


# -- names and shapes of the public files ------------------------------------------------------------------
@pytest.mark.parametrize(("version", "tensors", "millions"), [(1, 407, 326.3), (2, 463, 543.4)])
def test_photomaker_at_its_true_size(version, tensors, millions):
    shapes = portraits.id_encoder(version)
    assert len(shapes) == tensors and parameters(shapes) / 1e6 == pytest.approx(millions, abs=0.06)
    config = photomaker.identify(shapes)
    assert (config.version, config.vision, config.projections, config.width) == (version, 1024, (768, 1280), 2048)
    assert config.per == version and (config.qformer is None or config.qformer[:4] == (2048, 1024, 2048, 4))
    assert config.qformer is None or (config.qformer.heads, config.qformer.inner, config.embedding) == (16, 2048, 512)
    module = photomaker.build(meta(shapes))
    assert module.size == 224 and sum(p.numel() for p in module.parameters()) == parameters(shapes)
    assert (module.vision.config.heads, module.vision.config.activation) == (16, "quick_gelu")


def test_instantid_at_its_true_size():
    parts = portraits.instantid()
    assert len(parts["image_proj"]) == 51 and parameters(parts["image_proj"]) / 1e6 == pytest.approx(81.98, abs=0.01)
    assert len(parts["ip_adapter"]) == 140 and parameters(parts["ip_adapter"]) / 1e6 == pytest.approx(340.79, abs=0.01)
    state = portraits.flat(parts)
    assert instantid.is_instantid(state)
    config = instantid.identify(state)
    assert config.resampler == (1280, 512, 2048, 4, 20, 1280, 5120) and config.tokens == 16 and config.width == 2048
    assert [int(number) for number, _ in config.layers] == list(range(1, 140, 2))
    module = instantid.build(meta(state))
    assert sum(p.numel() for p in module.parameters()) == parameters(state)


@pytest.mark.parametrize("version", [1, 2])
def test_a_part_too_few_or_too_many_is_one_sentence(version):
    shapes = portraits.id_encoder(version, TINY)
    without = dict(shapes)
    del without["fuse_module.mlp2.fc1.bias"]
    with pytest.raises(LikenessError, match="lacks fuse_module.mlp2.fc1.bias; download"):
        photomaker.build(meta(without))
    with pytest.raises(LikenessError, match="unknown part fuse_module.mlp3.weight; download"):
        photomaker.build(meta(shapes | {"fuse_module.mlp3.weight": (2, 2)}))
    with pytest.raises(LikenessError, match=r"of the shape \(3,\) instead of \(160,\); download"):
        photomaker.build(meta(shapes | {"fuse_module.layer_norm.bias": (3,)}))
    with pytest.raises(LikenessError, match="lacks a part of its identity encoder; download"):
        photomaker.build({"visual_projection.weight": torch.zeros(3, 2)})
    blocks = {name: shape for name, shape in shapes.items() if "layers.1.mlp" not in name}
    with pytest.raises(LikenessError, match="incomplete"):
        photomaker.build(meta(blocks))


def test_an_ip_adapter_is_not_an_instantid():
    """Plus for SDXL has the same names; only the width of what it reads tells."""
    parts = portraits.instantid(TINY)
    parts["image_proj"]["proj_in.weight"] = (64, 1280)
    with pytest.raises(LikenessError, match="looks like an IP-Adapter; choose"):
        instantid.build(meta(portraits.flat(parts)))
    parts = portraits.instantid(TINY)
    del parts["ip_adapter"]["7.to_v_ip.weight"]
    with pytest.raises(LikenessError, match="InstantID file lacks ip_adapter.7.to_v_ip.weight; download"):
        instantid.build(meta(portraits.flat(parts)))
    del parts["image_proj"]["layers.0.0.to_q.weight"]
    with pytest.raises(LikenessError, match="lacks a part of its resampler"):
        instantid.build(meta(portraits.flat(parts)))


def test_layers_of_the_host_in_the_order_of_the_file():
    blocks = {"input.4.0": 64, "middle.0.0": 128, "middle.0.1": 128, "output.0.0": 128, "output.10.0": 64}
    assert instantid.layer_keys(blocks) == ["input.4.0", "output.0.0", "output.10.0", "middle.0.0", "middle.0.1"]


# -- modules against their formulas ------------------------------------------------------------------------
@pytest.mark.parametrize(("depth", "inner", "head"), [(1, 64, 64), (3, 256, 128)])
def test_perceiver(depth, inner, head):
    shapes = portraits._resampler(24, 32, 40, depth, inner)
    state = portraits.random({"all": shapes}, 3)["all"]
    config = perceiver_config(shapes, head, "This")
    assert config == (32, 24, 40, depth, inner // head, inner, 128)
    module = fill(lambda ops: Perceiver(config, ops, None, "meta"), state, "This")
    latents, source = draw(1, 2, 5, 32), draw(2, 2, 7, 24)
    close(module(latents, source), perceiver(latents.double(), source.double(), double(state), depth, inner // head))


def test_instantid_tokens_and_layers():
    parts = portraits.random(portraits.instantid(TINY), 1)
    module = instantid.build(portraits.flat(parts))
    embedding = torch.cat([8 * draw(4, 2, 512) / 512 ** 0.5, torch.zeros(1, 512)])
    tokens = module.tokens(embedding)
    state = double(parts["image_proj"])
    wanted = perceiver(state["latents"].expand(3, -1, -1), embedding.double()[:, None], state, 2, 2)
    assert tokens.shape == (3, 4, 160)
    close(tokens, wanted)
    assert not torch.allclose(tokens[0], tokens[1]) and not torch.allclose(tokens[0], tokens[2])
    for number in ("1", "69", "139"):
        k, v = module.keys_values(number, tokens)
        close(k, wanted @ parts["ip_adapter"][f"{number}.to_k_ip.weight"].double().T)
        close(v, wanted @ parts["ip_adapter"][f"{number}.to_v_ip.weight"].double().T)


def pixels(count: int) -> Tensor:
    return draw(7, count, 3, 28, 28)


def test_photomaker_v1():
    state = portraits.random({"x": portraits.id_encoder(1, TINY)}, 5)["x"]
    module = photomaker.build(state)
    text, exact = draw(8, 3, 160), double(state)
    got = module.identities(pixels(3))
    pooled = tower(pixels(3).double(), part(exact, "vision_model."), TINY)[1]
    identity = torch.cat([linear(pooled, exact, "visual_projection"), linear(pooled, exact, "visual_projection_2")], -1)
    assert got.shape == (3, 1, 160)
    close(got[:, 0], identity)
    close(module.fuse(text, got[:, 0]), fuse(text.double(), identity, part(exact, "fuse_module.")))


def test_photomaker_v2():
    state = portraits.random({"x": portraits.id_encoder(2, TINY)}, 6)["x"]
    module = photomaker.build(state)
    embedding, exact = draw(9, 2, 512), double(state)
    got = module.identities(pixels(2), embedding)
    hidden = tower(pixels(2).double(), part(exact, "vision_model."), TINY)[0]
    q = part(exact, "qformer_perceiver.")
    tokens = linear(gelu(linear(embedding.double(), q, "token_proj.0")), q, "token_proj.2").reshape(2, 2, 160)
    tokens = norm(tokens, q, "token_norm")
    wanted = tokens + perceiver(tokens, hidden, part(q, "perceiver_resampler."), 2, 2)
    assert got.shape == (2, 2, 160)
    close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(dtype):
    parts = portraits.random(portraits.instantid(TINY), 1)
    half, full = (instantid.build(portraits.flat(parts), dtype=kind) for kind in (dtype, torch.float32))
    embedding = 8 * draw(4, 2, 512) / 512 ** 0.5
    near, exact = half.tokens(embedding.to(dtype)), full.tokens(embedding)
    assert near.dtype is dtype and (near.float() - exact).abs().mean() < 0.02 * exact.abs().mean() * (8 if dtype is torch.bfloat16
                                                                                                       else 1)
