"""RealCustom++ in training on the toy base: its attention by hand, its switches, its file, its names and curriculum."""
from __future__ import annotations

import pytest
import torch

from likeness.models.common import files
from likeness.models.common.errors import LikenessError
from likeness.models.demo import creatures, lessons, recontext
from likeness.models.demo.world import EASY
from likeness.models.realcustom import config as configs
from likeness.models.realcustom.adapter import build
from likeness.models.realcustom.config import RealCustomConfig
from likeness.models.training.base import Batch
from likeness.models.training.loop import train
from likeness.models.training.realcustom import RealCustomTask
from unit.training_toy import CHANNELS, LAYERS, WIDTH, ToyBase, draw, settings

VISION = 64
CONFIG = RealCustomConfig(WIDTH, VISION, (("dinov2", VISION),), ((0,),), LAYERS, base="miniature", size=8, registers=(0,))
OFF = {"drop_text": 0.0, "drop_reference": 0.0, "drop_both": 0.0}
READ = draw(21, 3, VISION)


def encode(pixels):
    tokens = pixels.flatten(2).mT[:, :20] @ READ
    return tokens[:, :4], tokens[:, 4:]


def task(trained: bool = True, **changes) -> RealCustomTask:
    out = RealCustomTask(ToyBase(), CONFIG, settings(**(OFF | changes)), encode, 8, ["hash"], 1)
    if trained:
        generator = torch.Generator().manual_seed(1)
        for name, p in out.adapter.named_parameters():
            if name.endswith(".v.weight"):
                p.data.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return out


class Source:
    """Sixteen subjects; a picture tells its latents."""

    def __init__(self):
        self.pictures = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(5))
        self.latents = (encode(self.pictures)[0].mean(1) @ draw(6, VISION, 64) / 8).tanh().view(16, 4, 4, 4)

    def batch(self, n, generator):
        k = torch.randint(16, (n,), generator=generator)
        return Batch(self.pictures[k], None, self.latents[k], ["a cat on grass"] * n, ["cat"] * n)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_values_begin_at_zero_and_everything_else_is_filled():
    fresh = task(trained=False)
    state = fresh.adapter.state_dict()
    assert all(not value.any() for name, value in state.items() if name.endswith(".v.weight"))
    assert all(value.any() for name, value in state.items() if not name.endswith((".v.weight", "bias")))
    assert all(torch.equal(value, other) for value, other in
               zip(state.values(), task(trained=False).adapter.state_dict().values(), strict=True))
    q, out = draw(1, 2, 16, CHANNELS), draw(2, 2, 16, CHANNELS)
    cross = fresh._cross(draw(3, 2, 4, WIDTH), None)
    assert torch.equal(cross("output.0.0", q, out, 2), out)


def test_the_attention_by_hand():
    """out + M softmax(q k / sqrt d) v, two heads; nothing for a block that the adapter does not have."""
    own, tokens = task(), draw(3, 2, 4, WIDTH)
    q, out, mask = draw(1, 2, 16, CHANNELS), draw(2, 2, 16, CHANNELS), torch.rand(2, 1, 8, 8, generator=seeded())
    state = {name: value.double() for name, value in own.adapter.state_dict().items()}
    k, v = (tokens.double() @ state[f"layers.output_1_0.{which}.weight"].T for which in "kv")
    parts = []
    for head in (slice(0, 4), slice(4, 8)):
        parts.append((q.double()[..., head] @ k[..., head].mT / 2).softmax(-1) @ v[..., head])
    share = mask.double().unflatten(-1, (4, 2)).unflatten(-3, (4, 2)).mean((-1, -3)).flatten(2).mT
    want = out.double() + share * torch.cat(parts, -1)
    torch.testing.assert_close(own._cross(tokens, mask)("output.1.0", q, out, 2).double(), want, atol=1e-5, rtol=1e-5)
    assert own._cross(tokens, mask)("input.1.0", q, out, 2) is out


def test_a_dropped_reference_is_the_black_picture():
    batch = Source().batch(4, seeded())
    black = task(drop_reference=1.0)
    deep, local = black._features(batch, torch.tensor([True, False, True, False]))
    assert torch.equal(deep[0], encode(torch.zeros(1, 3, 8, 8))[0][0]) and torch.equal(local[1], encode(batch.reference)[1][1])
    other = batch._replace(reference=1 - batch.reference)
    assert black.step(batch, seeded()) == black.step(other, seeded())
    assert task().step(batch, seeded()) != task().step(other, seeded())
    words = batch._replace(captions=["a dog on snow"] * 4)
    assert task(drop_text=1.0).step(batch, seeded()) == task(drop_text=1.0).step(words, seeded())
    both = other._replace(captions=words.captions)
    assert task(drop_both=1.0).step(batch, seeded()) == task(drop_both=1.0).step(both, seeded())


def test_masks_are_the_places_where_most_of_the_subject_is_for_half_of_the_samples():
    share = torch.rand(400, 8, 8, generator=seeded(9))
    masks = task()._mask(Source().batch(400, seeded())._replace(mask=share), seeded())[:, 0].flatten(1)
    limited = masks.amin(1) == 0
    assert 0.4 < limited.float().mean() < 0.6 and bool((masks[~limited] == 1).all())
    assert set(masks[limited].unique().tolist()) == {0.0, 1.0} and bool((masks[limited].sum(1) == 14).all())
    inside, outside = share.flatten(1)[limited], masks[limited] == 0
    assert bool((inside.masked_fill(outside, 2).amin(1) >= inside.masked_fill(~outside, -1).amax(1) - 2e-3).all())
    assert task()._mask(Source().batch(2, seeded()), seeded()) is None


def test_the_mask_of_a_small_word_takes_its_neighbours():
    share = torch.zeros(400, 8, 8)
    share[:, 4, 3:6] = 0.7
    masks = task()._mask(Source().batch(400, seeded())._replace(mask=share), seeded())[:, 0]
    near = masks[masks.flatten(1).amin(1) == 0]
    assert len(near) and bool((near[:, 4, 3:6] == 1).all()) and bool((near[:, 2:7, 1:8].sum((1, 2)) == 14).all())


def test_encoders_of_different_size_begin_on_equal_terms():
    """The projector reads x as it read (x - mean) / deviation before; what the norms give has the same size in every channel."""
    own, generator = task(), seeded(4)
    mean, deviation = torch.randn(VISION, generator=generator), torch.rand(VISION, generator=generator) + 0.2
    mean[VISION // 2:], deviation[VISION // 2:] = mean[VISION // 2:] * 2, deviation[VISION // 2:] * 3
    even = torch.randn(4, 500, VISION, generator=generator)
    before = own.adapter.projector.projector_base(even)
    own.adapter.even_out(mean, deviation)
    features = even * deviation + mean
    torch.testing.assert_close(own.adapter.projector.projector_base(features), before, atol=1e-4, rtol=1e-4)
    for norm in (own.adapter.projector.min_attention.norm1, own.adapter.projector.min_attention.norm2):
        values = norm(features).flatten(0, 1)
        assert values.mean(0).abs().max() < 0.3 and 0.7 < values.std(0).min() and values.std(0).max() < 1.5


def test_it_learns_resumes_and_its_file_is_the_releases(tmp_path):
    first = train(task(False, steps=60), settings(**OFF, steps=60), Source(), tmp_path / "whole")
    rows = (tmp_path / "whole" / "loss.csv").read_text().splitlines()[1:]
    losses = [float(row.split(",")[1]) for row in rows]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    half = train(task(False), settings(**OFF, steps=60), Source(), tmp_path / "half",
                 should_stop=lambda: (tmp_path / "half" / "state").exists())
    assert not half.finished
    again = train(task(False), settings(**OFF, steps=60), Source(), tmp_path / "half")
    (one, metadata), (two, _) = (files.load(result.path) for result in (first, again))
    assert again.finished and all(torch.equal(value, two[name]) for name, value in one.items())
    assert "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k_vision.weight" in one
    config = configs.identify(one, metadata)
    assert config == CONFIG and metadata["method"] == "realcustom"
    module = build(config, configs.split(one))
    features = encode(Source().pictures[:2])
    assert module.encode(list(features)).shape == (2, 4, WIDTH)


def test_another_base_is_refused():
    with pytest.raises(LikenessError, match="this base model does not have"):
        RealCustomTask(ToyBase(), CONFIG._replace(layers=(("output.7.0", 8),)), settings(), encode, 8, [""])


@pytest.mark.parametrize("blocks", (1, 2, 3))
def test_names_of_networks_with_any_number_of_residual_blocks(blocks):
    """Two levels: their entries as the host counts them, there and back."""
    downs = [f"input.{level * (blocks + 1) + number + 1}.0" for level in (0, 1) for number in range(blocks)]
    ups = [f"output.{number}.1" for number in range(2 * (blocks + 1))]
    keys = [*downs, "middle.0.0", *ups]
    names = [configs.layer_name(key, which, blocks) for key in keys for which in "kv"]
    assert configs.residual_blocks(names) == blocks
    assert [configs.layer_key(name, blocks)[0] for name in names[::2]] == keys
    assert list(configs.split(dict.fromkeys(names)).layers) == [f"{key}.{which}" for key in keys for which in "kv"]


def test_the_curriculum_opens(monkeypatch):
    assert [recontext.open_pairs(100, progress) for progress in (0.0, 0.335, 0.67, 1.0)] == [40, 70, 100, 100]
    seen, crowded, with_neighbours = [], [], recontext.with_neighbours
    monkeypatch.setattr(recontext, "with_neighbours", lambda *args: crowded.append(1) or with_neighbours(*args))
    data = recontext.prepare(recontext.BLOCK + 4, 3, EASY, 32, lambda pixels: pixels[:, :, ::8, ::8],
                             lambda pixels: seen.append(pixels) or (pixels.flatten(2), pixels.flatten(2)))
    assert data.mask.shape == (132, 8, 8) and data.deep.dtype == torch.float16 and len(seen) == len(crowded) == 2
    inside = data.mask.flatten(1).sum(1)
    assert bool((inside > 0.5).all()) and bool((inside < 40).all())
    ink = [(pixels.amin(1) < 0.95).float().mean() for pixels in (seen[0][:64], seen[1])]
    assert ink[1] < ink[0], "later references stand smaller in their picture"


def test_neighbours_stand_across_and_are_nobody(monkeypatch):
    """They come where the subject stands at a side, in the other half, and neither word nor mask is theirs."""
    pair = lessons.draw_pairs(256, torch.Generator().manual_seed(1), EASY)
    crowded = recontext.with_neighbours(pair, torch.Generator().manual_seed(2))
    changed = (crowded.target != pair.target).any(1)
    there = changed.flatten(1).any(1)
    place = pair.pose["place"]
    assert not bool(there[place == 1].any()) and 0.15 < float(there[place != 1].float().mean()) < 0.4
    sides = changed[..., :24].any(2).any(1), changed[..., 40:].any(2).any(1)  # a tail or a wing may cross the middle
    assert not bool((sides[0] & (place == 0)).any()) and not bool((sides[1] & (place == 2)).any())
    assert float((pair.mask - crowded.mask).mean()) < 1e-3, "in the easy world they hardly cover the subject"
    assert torch.equal(crowded.reference, pair.reference) and crowded.identity is pair.identity
    monkeypatch.setattr(recontext, "standing", lambda pose: creatures.standing(pair.pose))  # as if it stood before the subject
    before = recontext.with_neighbours(pair, torch.Generator().manual_seed(2))
    assert float(before.mask[there].mean()) < 0.5 * float(pair.mask[there].mean()), "what it hides is not the subject"
