"""One training step of CustAny: the same gradient as the summed loss, and switches that really cut."""
from __future__ import annotations

import json
import logging

import pytest
import torch

from likeness.models.common import files
from likeness.models.common.errors import LikenessError
from likeness.models.custany import config as configs
from likeness.models.custany import losses
from likeness.models.custany.adapter import check_shapes
from likeness.models.training.base import Batch
from likeness.models.training.custany import CustAnyTask
from unit.training_toy import CONFIG, LAYERS, ToyBase, ToySource, draw, settings

OFF = {"drop_text": 0.0, "drop_reference": 0.0, "drop_both": 0.0, "global_off": 0.0, "local_off": 0.0}


def build(config=CONFIG, base=None, trained: bool = True, **changes) -> CustAnyTask:
    task = CustAnyTask(base or ToyBase(), config, settings(**(OFF | changes)))
    if trained:  # else the zero ends hide most gradients
        generator = torch.Generator().manual_seed(1)
        for module in task.modules().values():
            for p in module.parameters():
                p.data.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return task


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(n: int = 6) -> Batch:
    return ToySource().batch(n, seeded(2))


def gradients(task: CustAnyTask) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{name}": p.grad for prefix, module in task.modules().items()
            for name, p in module.named_parameters()}


def summed(task: CustAnyTask, batch: Batch, generator: torch.Generator) -> dict[str, float]:
    """The same step written plainly: one graph, one backward of the summed loss."""
    base, adapter, n = task.base, task.adapter, len(batch.captions)
    keep_text, word_on, local_on = task.switches(n, generator)
    captions = [c if k else "" for c, k in zip(batch.captions, keep_text, strict=True)]
    rows, first, _ = base.encode_text(captions, batch.words)
    t = base.timesteps(n, generator)
    x_t, target, weight = base.noised(batch.latents, t, torch.randn(batch.latents.shape, generator=generator))
    tokens, local = adapter.encode(batch.features)
    word_on = word_on * (first >= 0)
    here = torch.arange(n)
    fused = rows[here, first] + adapter.word_delta(tokens, rows[here, first]) * word_on[:, None]
    new = torch.stack([torch.cat([row[:f], word[None], row[f + 1:]]) if f >= 0 else row
                       for row, f, word in zip(rows, first, fused, strict=True)])

    def middle(key, x):
        return x + local_on[:, None, None] * adapter.local(key, x, *adapter.keys_values(key, local))
    masked = task.decouple(batch.embeds)
    normal = losses.denoise(base.denoise(x_t, t, new, middle), target, weight)
    decouple = losses.denoise(base.denoise(x_t, t, new + masked[:, None], middle), target, weight)
    contrast = losses.contrast(fused, masked, task.train.contrast_mode, word_on)
    total = losses.total(normal, decouple, contrast, task.train.loss_weights)
    total.backward()
    parts = {"total": total, "normal": normal, "decouple": decouple, "contrast": contrast}
    return {name: value.item() for name, value in parts.items()}


@pytest.mark.parametrize("changes", [
    {}, {"contrast_mode": "abs", "weight_decouple": 3.0, "weight_contrast": 2.0},
    {"drop_text": 0.3, "drop_reference": 0.2, "drop_both": 0.2, "global_off": 0.2, "local_off": 0.3}])
def test_two_passes_give_the_gradient_of_the_sum(changes):
    one, two = build(**changes), build(**changes)
    batch = sample(16)
    if changes.get("drop_text"):
        assert 0 < one.switches(16, seeded())[0].sum() < 16
    expected, got = summed(one, batch, seeded()), two.step(batch, seeded())
    assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    want, have = gradients(one), gradients(two)
    for name, grad in want.items():
        assert grad is not None and grad.abs().sum() > 0, name
        assert torch.allclose(have[name], grad, rtol=1e-4, atol=1e-6 * float(grad.abs().max() + 1)), name


def test_steps_add_up_until_the_optimizer_clears():
    once, twice = build(), build()
    batch = sample()
    once.step(batch, seeded())
    for _ in range(2):
        twice.step(batch, seeded())
    for name, grad in gradients(once).items():
        assert torch.allclose(gradients(twice)[name], 2 * grad, rtol=1e-5, atol=1e-7), name


def test_base_gets_the_frozen_text_and_no_gradient():
    class Base(ToyBase):
        def encode_text(self, captions, words):
            assert not torch.is_grad_enabled()
            return super().encode_text(captions, words)
    base = Base()
    base.table.requires_grad_()
    build(base=base).step(sample(), seeded())
    assert base.table.grad is None


def test_keys_and_values_are_made_once_a_step():
    task = build()
    made = []
    inner = task.adapter.keys_values
    task.adapter.keys_values = lambda key, local: made.append(key) or inner(key, local)
    task.step(sample(), seeded())
    assert made == [key for key, _ in LAYERS]
    assert task.base.calls == made * 2  # two passes


def test_decoupling_can_be_off():
    task = build(decouple="off")
    assert set(task.modules()) == {"adapter"}
    row = task.step(sample(), seeded())
    assert row["decouple"] == row["contrast"] == row["cosine"] == 0
    assert row["total"] == pytest.approx(2 * row["normal"])
    assert task.base.calls == [key for key, _ in LAYERS]


def nonzero(task: CustAnyTask) -> set[str]:
    return {name.split(".")[1] for name, grad in gradients(task).items()
            if name.startswith("adapter.") and grad is not None and bool(grad.abs().sum() > 0)}


ALL = {"encoder_mlps", "global_mlp", "local_mlp", "layers"}


@pytest.mark.parametrize("change, parts", [
    ({}, ALL), ({"drop_reference": 1.0}, set()), ({"drop_both": 1.0}, set()),
    ({"drop_text": 1.0}, {"encoder_mlps", "local_mlp", "layers"}),
    ({"global_off": 1.0}, {"encoder_mlps", "local_mlp", "layers"}),
    ({"local_off": 1.0}, {"encoder_mlps", "global_mlp"}), ({"global_off": 1.0, "local_off": 1.0}, set())])
def test_switches_cut_the_path(change, parts):
    task = build(**change)
    task.step(sample(), seeded())
    assert nonzero(task) == parts


@pytest.mark.parametrize("change, empty", [({"drop_text": 1.0}, True), ({"drop_both": 1.0}, True),
                                           ({"drop_reference": 1.0}, False), ({"global_off": 1.0}, False)])
def test_dropped_text_is_the_empty_caption(change, empty):
    seen = []

    class Base(ToyBase):
        def encode_text(self, captions, words):
            seen.extend(captions)
            return super().encode_text(captions, words)
    build(base=Base(), **change).step(sample(), seeded())
    assert set(seen) == ({""} if empty else {"a cat on grass"})


def test_switches_act_per_sample_and_as_often_as_asked():
    task = build(drop_text=0.1, drop_reference=0.2, drop_both=0.05, global_off=0.3, local_off=0.4)
    text, word, local = task.switches(200_000, seeded())
    both = 1 - 0.05
    keep = 0.9 * both, 0.9 * 0.8 * 0.7 * both, 0.8 * 0.6 * both
    for got, expected in zip((text, word, local), keep, strict=True):
        assert got.mean().item() == pytest.approx(expected, abs=0.005)
    assert set(local.tolist()) == {0.0, 1.0}
    # Only the sample whose switch is off loses its effect.
    task = build()
    task.switches = lambda n, generator: (torch.ones(n), torch.ones(n), (torch.arange(n) != 1).float())
    batch, leaves = sample(3), []
    features = [tuple(part.clone().requires_grad_() for part in pair) for pair in batch.features]
    leaves = [patches for _, patches in features]
    task.step(batch._replace(features=features), seeded())
    for patches in leaves:
        assert [bool(grad.abs().sum() > 0) for grad in patches.grad] == [True, False, True]


def test_a_caption_without_the_word_gets_no_injection():
    task = build(local_off=1.0)
    task.step(sample()._replace(words=["dog"] * 6), seeded())
    assert nonzero(task) == set()


def test_dropped_reference_keeps_the_whole_prompt():
    """Also when the rest of the word is dropped: sampling without a subject reads the plain prompt."""
    seen = []

    class Base(ToyBase):
        def encode_text(self, captions, words):
            rows, first, count = super().encode_text(captions, words)
            seen.append(rows)
            return rows, first, count * 2

        def denoise(self, x_t, t, rows, middle=None):
            seen.append(rows.detach())
            return super().denoise(x_t, t, rows, middle)
    config = CONFIG._replace(category_mode="drop_rest")
    build(config, Base(), decouple="off", drop_reference=1.0).step(sample(), seeded())
    assert torch.equal(seen[0], seen[1])
    build(config, Base(), decouple="off").step(sample(), seeded())
    assert torch.equal(seen[3][:, 2:5], seen[2][:, 3:6]) and not torch.equal(seen[3][:, 1], seen[2][:, 1])


def test_pictures_are_encoded_when_nothing_is_precomputed():
    pictures = Batch(draw(20, 2, 3, 4, 4), draw(21, 2, 3, 4, 4), None, ["a cat", "big dog"], ["cat", "dog"])
    base = ToyBase()
    ready = pictures._replace(latents=base.encode_image(pictures.target),
                              features=base.features(pictures.reference),
                              embeds=base.embed_image(pictures.target))
    one, two = build(), build()
    assert one.step(pictures, seeded()) == two.step(ready._replace(reference=None, target=None), seeded())
    assert all(torch.equal(grad, gradients(two)[name]) for name, grad in gradients(one).items())
    for missing in ("reference", "target"):
        with pytest.raises(LikenessError, match=missing):
            build().step(pictures._replace(**{missing: None}), seeded())


def test_half_precision_features_and_base():
    class Base(ToyBase):
        def denoise(self, x_t, t, rows, middle=None):
            self.seen = rows.dtype

            def cast(key, x):
                out = middle(key, x.bfloat16())
                assert out.dtype == torch.bfloat16
                return out.float()
            return super().denoise(x_t, t, rows.float(), cast)

        def encode_text(self, captions, words):
            rows, first, count = super().encode_text(captions, words)
            return rows.bfloat16(), first, count
    batch = sample()
    half = batch._replace(features=[tuple(part.half() for part in pair) for pair in batch.features])
    task = build(base=Base())
    row = task.step(half, seeded())
    assert task.base.seen == torch.bfloat16
    assert row["total"] == pytest.approx(build().step(batch, seeded())["total"], rel=0.1)


def test_channel_weight_of_the_base_counts():
    class Base(ToyBase):
        def noised(self, latents, t, noise):
            return *super().noised(latents, t, noise)[:2], torch.tensor([0.0, 0.0, 0.0, 4.0])
    task = build(base=Base(), decouple="off")
    task.step(sample(), seeded())
    assert nonzero(task) == ALL
    task = build(base=Base(), decouple="off")
    task.base.leave[:, 3] = 0  # now the base cannot reach the only channel that counts
    task.step(sample(), seeded())
    assert nonzero(task) == set()


def test_collapse_is_told_once(caplog):
    task = build()
    task._report({"normal": torch.tensor(1.0), "cosine": torch.tensor(-0.95)})
    task._report({"normal": torch.tensor(1.0), "cosine": torch.tensor(-0.85)})
    task._report({"normal": torch.tensor(1.0), "cosine": torch.tensor(-0.95)})
    assert [r.levelno for r in caplog.records] == [logging.WARNING] and "-0.950" in caplog.text
    task._report({"normal": torch.tensor(1.0), "cosine": torch.tensor(0.0)})
    task._report({"normal": torch.tensor(1.0), "cosine": torch.tensor(-0.91)})
    assert len(caplog.records) == 2


@pytest.mark.parametrize("config, word", [
    (CONFIG._replace(width=32), "width 32"), (CONFIG._replace(layers=(("output.7.0", 8),)), "output.7.0"),
    (CONFIG._replace(layers=(("output.0.0", 16),)), "16 channels")])
def test_config_has_to_fit_the_base(config, word):
    with pytest.raises(LikenessError, match=word):
        build(config)


def test_same_seed_same_start():
    one, two, other = (build(trained=False, seed=seed) for seed in (4, 4, 5))
    for a, b in zip(one.adapter.parameters(), two.adapter.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.adapter.local_mlp.hidden.weight, other.adapter.local_mlp.hidden.weight)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_file_says_what_it_is(tmp_path, dtype):
    task = CustAnyTask(ToyBase(), CONFIG, settings(export_dtype=dtype), ("aa", "bb"))
    state = {name: module.state_dict() for name, module in task.modules().items()}
    story = {"steps": "8", "dataset_license": "CC0", "method": "wrong"}
    task.export(tmp_path / "adapter.safetensors", state, story)
    header = files.read_header(tmp_path / "adapter.safetensors")
    check_shapes(CONFIG, {key: info.shape for key, info in header.tensors.items()})
    assert {info.dtype for info in header.tensors.values()} == {"F16" if dtype == "fp16" else "F32"}
    meta = header.metadata
    assert configs.from_metadata(meta) == CONFIG
    expected = {"format_version": "1", "method": "custany", "base": "miniature", "background": "white",
                "steps": "8", "dataset_license": "CC0"}
    assert {name: meta[name] for name in expected} == expected
    assert json.loads(meta["encoders"]) == [{"family": "dinov2", "width": 6, "sha256": "aa"},
                                            {"family": "mae", "width": 5, "sha256": "bb"}]
    apart = files.read_header(tmp_path / "decouple.safetensors")
    assert "mask" in apart.tensors and apart.metadata["method"] == "custany.decouple"
    with pytest.raises(LikenessError, match="hashes"):
        CustAnyTask(ToyBase(), CONFIG, settings(), ("aa",))
