"""CustAny's adapter: config and file agree, an untrained one changes nothing, each path does what it says."""
from __future__ import annotations

import pytest
import torch

from likeness.models.common.errors import LikenessError
from likeness.models.custany import config as configs
from likeness.models.custany.adapter import CustAny, check_shapes, expected_shapes, is_custany
from likeness.models.custany.layers import replace_word, resample_grid
from unit.training_toy import CONFIG, LAYERS, WIDTH, draw


def build(config=CONFIG, trained: bool = False, **options) -> CustAny:
    adapter = CustAny(config, **options)
    adapter.init_weights(torch.Generator().manual_seed(0))
    if trained:
        generator = torch.Generator().manual_seed(1)
        for p in adapter.parameters():
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return adapter


def features(b: int = 2, tokens: tuple[int, int] = (16, 16)) -> list:
    return [(draw(10, b, 6), draw(11, b, tokens[0], 6)), (draw(12, b, 5), draw(13, b, tokens[1], 5))]


@pytest.mark.parametrize("config", [CONFIG, configs.preset("sd15"), configs.preset("sdxl")._replace(
    fuse="tokens", category_mode="drop_rest", background="grey", margin=0.2)])
def test_config_survives_metadata(config):
    metadata = configs.to_metadata(config)
    assert all(isinstance(value, str) for value in metadata.values())
    assert configs.from_metadata(metadata) == config


@pytest.mark.parametrize("text, word", [
    (None, "likeness.custany"), ("{", "cannot be read"), ("[]", "cannot be read"),
    ('{"width": 4}', "cannot be read"), ('{"width": 4, "future": 1}', "future")])
def test_bad_metadata_is_named(text, word):
    with pytest.raises(LikenessError, match=word):
        configs.from_metadata({} if text is None else {configs.METADATA_KEY: text})


@pytest.mark.parametrize("change, word", [
    ({"head_dim": 3}, "heads"), ({"fuse": "sum"}, "fuse"), ({"category_mode": "all"}, "category_mode"),
    ({"background": "rainbow"}, "background"), ({"resolutions": (224,)}, "resolution"),
    ({"layers": ()}, "layers"),
    ({"layers": (("output.3", 8),)}, "output.3"), ({"layers": (*LAYERS, LAYERS[0])}, "twice")])
def test_config_refuses_what_cannot_work(change, word):
    with pytest.raises(LikenessError, match=word):
        CONFIG._replace(**change).check()


def test_layouts_of_the_real_bases():
    assert configs.sd15_layers() == tuple(
        (f"output.{block}.0", channels)
        for block, channels in zip(range(3, 12), [1280] * 3 + [640] * 3 + [320] * 3, strict=True))
    assert configs.sdxl_layers() == tuple(
        (f"output.{block}.{index}", 1280) for block in range(3) for index in (0, 9)) + tuple(
        (f"output.{block}.{index}", 640) for block in range(3, 6) for index in (0, 1))
    shapes = expected_shapes(configs.preset("sd15"))
    projections = sum(shape[0] * shape[1] for key, shape in shapes.items()
                      if key.startswith("layers.") and ".to_" in key and key.endswith(".weight"))
    assert projections == 23_224_320


def test_miniature_size():
    layers = tuple((f"output.{block}.0", 96) for block in range(4))
    config = configs.CustAnyConfig(128, (("dinov2", 96), ("mae", 96)), layers, head_dim=32, base="miniature")
    assert sum(p.numel() for p in CustAny(config, device="meta").parameters()) == 413_568


def test_untrained_adapter_changes_nothing_and_a_trained_one_does():
    x, word = draw(1, 2, 9, 8), draw(2, 2, WIDTH)
    for trained in (False, True):
        adapter = build(trained=trained)
        tokens, local = adapter.encode(features())
        same_word = torch.equal(word + adapter.word_delta(tokens, word), word)
        same = [torch.equal(x + adapter.local(key, x, *adapter.keys_values(key, local)), x)
                for key, _ in LAYERS]
        assert [same_word, *same] == [not trained] * 3


def test_init_does_not_depend_on_what_was_there():
    first, second = build(), CustAny(CONFIG)
    for p in second.parameters():
        p.data.fill_(float("nan"))
    second.init_weights(torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.encoder_mlps[0].hidden.weight.abs().max() <= 6 ** -0.5
    assert first.encoder_mlps[0].hidden.weight.std().item() == pytest.approx(6 ** -0.5 / 3 ** 0.5, rel=0.2)


def test_every_weight_of_the_adapter_matters():
    """With the zero ends filled, no parameter is without influence on word or picture."""
    adapter = build(trained=True)
    tokens, local = adapter.encode(features())
    out = adapter.word_delta(tokens, draw(2, 2, WIDTH)).square().sum()
    for key, channels in LAYERS:
        attended = adapter.local(key, draw(3, 2, 9, channels), *adapter.keys_values(key, local))
        out = out + attended.square().sum()
    out.backward()
    dead = [name for name, p in adapter.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


def test_word_delta_is_a_residual_of_word_and_class_tokens():
    adapter = build(trained=True)
    word = draw(2, 2, WIDTH)
    base = features()
    tokens, local = adapter.encode(base)
    assert tokens.shape == (2, 2, WIDTH) and local.shape == (2, 16, WIDTH)
    delta = adapter.word_delta(tokens, word)
    by_hand = adapter.global_mlp(torch.cat([tokens[:, 0], tokens[:, 1], word], -1))
    assert torch.equal(delta, by_hand)
    # Patches alone must not reach the word, class tokens must.
    patches = [(cls, patch + 1) for cls, patch in base]
    assert torch.equal(adapter.word_delta(adapter.encode(patches)[0], word), delta)
    for index in (0, 1):
        other = [(cls + (index == place) * draw(3, *cls.shape), patch)
                 for place, (cls, patch) in enumerate(base)]
        assert not torch.equal(adapter.word_delta(adapter.encode(other)[0], word), delta)
        assert torch.equal(adapter.encode(other)[1], local)


def test_local_attention_by_hand():
    adapter = build(trained=True)
    layer = adapter.layers["output_0_0"]
    x, (_, local) = draw(1, 2, 3, 8), adapter.encode(features())
    k, v = adapter.keys_values("output.0.0", local)
    q = layer.to_q(torch.nn.functional.layer_norm(x, (8,), layer.norm.weight, layer.norm.bias))
    heads = []
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        heads.append((q[..., part] @ k[..., part].transpose(1, 2) / 2).softmax(-1) @ v[..., part])
    expected = layer.to_out(torch.cat(heads, -1))
    assert torch.allclose(adapter.local("output.0.0", x, k, v), expected, atol=1e-5)


def test_attention_can_be_replaced():
    seen = []

    def spy(q, k, v, heads):
        seen.append((q.shape, k.shape, heads))
        return torch.zeros_like(q)
    adapter = build(trained=True, attention=spy)
    k, v = adapter.keys_values("output.1.0", adapter.encode(features())[1])
    out = adapter.local("output.1.0", draw(1, 2, 3, 8), k, v)
    assert seen == [((2, 3, 8), (2, 16, 8), 2)]
    assert torch.equal(out, adapter.layers["output_1_0"].to_out.bias.expand(2, 3, 8))


@pytest.mark.parametrize("grid, tokens, length", [
    (0, (16, 9), 16), (0, (4, 25), 4), (3, (16, 9), 9), (2, (16, 16), 4), (0, (6, 6), 6)])
def test_grids_are_brought_to_one(grid, tokens, length):
    adapter = build(CONFIG._replace(grid=grid), trained=True)
    assert adapter.encode(features(tokens=tokens))[1].shape == (2, length, WIDTH)


def test_fusing_as_tokens_keeps_all():
    adapter = build(CONFIG._replace(fuse="tokens"), trained=True)
    both = features(tokens=(16, 9))
    local = adapter.encode(both)[1]
    assert local.shape == (2, 25, WIDTH)
    alone = adapter.local_mlp(adapter.encoder_mlps[1](both[1][1]))
    assert torch.allclose(local[:, 16:], alone, atol=1e-6)


def test_resampling_keeps_place_and_level():
    ramp = torch.arange(4.0).repeat(4, 1)  # grows to the right
    tokens = torch.stack([ramp, ramp.T], -1).reshape(1, 16, 2)
    small = resample_grid(tokens, 2).view(2, 2, 2)
    assert torch.allclose(small[..., 0], small[0, :, 0].expand(2, 2)) and small[0, 0, 0] < small[0, 1, 0]
    assert torch.allclose(small[..., 0].T, small[..., 1])
    assert small[..., 0].mean() == pytest.approx(1.5)
    large = resample_grid(tokens, 8).view(8, 8, 2)
    assert torch.allclose(large[3, 1:7, 0], torch.tensor([0.25, 0.75, 1.25, 1.75, 2.25, 2.75]))
    assert resample_grid(tokens, 4) is tokens
    assert resample_grid(tokens.half(), 2).dtype == torch.float16


@pytest.mark.parametrize("bad, word", [
    (features()[:1], "dinov2 6, mae 5"), (features()[::-1], "widths"), (features(tokens=(6, 16)), "square")])
def test_features_that_do_not_fit_are_named(bad, word):
    with pytest.raises(LikenessError, match=word):
        build().encode(bad)


def test_sniffing_and_shapes():
    adapter = build()
    shapes = {key: tuple(value.shape) for key, value in adapter.state_dict().items()}
    assert is_custany(shapes) and not is_custany(["encoder_mlps.0.norm.weight"]) and not is_custany([])
    assert not is_custany([key for key in shapes if "to_k" not in key])
    check_shapes(CONFIG, shapes)
    with pytest.raises(LikenessError, match=r"layers.output_0_0.to_k.weight is \[8, 32\].*\[8, 16\]"):
        wide = expected_shapes(CONFIG._replace(width=32))
        check_shapes(CONFIG._replace(width=32), wide | {key: shapes[key] for key in shapes if "to_k" in key})
    with pytest.raises(LikenessError, match="output_1_0"):
        check_shapes(CONFIG._replace(layers=LAYERS[:1]), shapes)
    with pytest.raises(LikenessError, match="does not hold"):
        check_shapes(CONFIG._replace(layers=(*LAYERS, ("output.2.0", 8))), shapes)


def test_weights_can_be_made_by_other_operations():
    class Operations:
        made = 0

        class Linear(torch.nn.Linear):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                Operations.made += 1
        LayerNorm = torch.nn.LayerNorm
    adapter = CustAny(CONFIG, operations=Operations, dtype=torch.float16)
    assert Operations.made == 2 * 4 + 4 * len(LAYERS)
    assert {p.dtype for p in adapter.parameters()} == {torch.float16}
    assert set(adapter.state_dict()) == set(build().state_dict())


@pytest.mark.parametrize("mode, rows", [
    ("keep_rest", [[0, 11, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 15]]),
    ("drop_rest", [[0, 11, 4, 5, 0, 0], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 15]])])
def test_word_rows(mode, rows):
    text = torch.arange(6.0)[None, :, None].expand(3, 6, 2)
    first, count = torch.tensor([1, -1, 5]), torch.tensor([3, 0, 1])
    out = replace_word(text, first, count, torch.full((3, 2), 10.0), mode)
    assert out[..., 0].tolist() == rows and torch.equal(out[..., 0], out[..., 1])


@pytest.mark.parametrize("mode", ["keep_rest", "drop_rest"])
def test_word_rows_pass_gradients_to_present_words_only(mode):
    delta = torch.zeros(2, 3, requires_grad=True)
    replace_word(draw(1, 2, 5, 3), torch.tensor([2, -1]), torch.tensor([2, 0]), delta, mode).sum().backward()
    assert delta.grad.tolist() == [[1.0] * 3, [0.0] * 3]


def test_the_global_level_reads_the_mean_of_a_words_rows():
    """Training and use must agree: a word of two tokens is the mean of both, a word of one is its row bit for bit."""
    from likeness.models.custany.layers import word_mean

    rows = torch.randn(3, 6, 4)
    mean = word_mean(rows, torch.tensor([1, 2, -1]), torch.tensor([2, 1, 0]))
    assert torch.allclose(mean[0], (rows[0, 1] + rows[0, 2]) / 2)
    assert torch.equal(mean[1], rows[1, 2]) and torch.equal(mean[2], rows[2, 0])
