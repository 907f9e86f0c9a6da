"""What the tables of evidence rest on: lessons whose pose can leak, the CLIP-like encoder, candidates, intervals, verdicts."""
from __future__ import annotations

import itertools
import math

import pytest
import torch
from bench import _ablation, _ablation_table, _looks

from likeness.models.common import files
from likeness.models.common.errors import LikenessError
from likeness.models.demo import base, lessons, packed, pretrain, world
from likeness.models.demo.first_stage import FirstStage
from likeness.models.demo.judge import HEADS
from likeness.models.demo.pool import render_pool
from likeness.models.demo.recipe import Recipe
from likeness.models.vision.keys import identify
from likeness.models.vision.load import load_vit


class Unet(torch.nn.Module):
    """The smallest network that a base can have."""

    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Conv2d(48, 48, 1)

    def forward(self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.mix(x)


def poses_of(monkeypatch, correlate: float, n: int = 96) -> tuple[lessons.Pair, dict[str, torch.Tensor]]:
    """Pairs and the poses of their references."""
    seen, real = [], lessons.draw_references
    monkeypatch.setattr(lessons, "draw_references", lambda who, pose, *rest: seen.append(pose) or real(who, pose, *rest))
    pair = lessons.draw_pairs(n, torch.Generator().manual_seed(3), world.WIDE, correlate=correlate)
    monkeypatch.undo()
    return pair, seen[0]


def test_a_share_of_references_stands_as_the_target(monkeypatch):
    free, loose = poses_of(monkeypatch, 0.0)
    tied, same = poses_of(monkeypatch, 1.0)
    most, near = poses_of(monkeypatch, 0.8)
    assert torch.equal(free.target, tied.target) and torch.equal(free.identity["colour"], tied.identity["colour"])
    for name in ("mirror", "turn"):
        assert torch.equal(same[name], tied.pose[name]) and not torch.equal(loose[name], free.pose[name])
    # A turn is never the same by chance, a facing in half of the others.
    assert 0.68 < (near["turn"] == most.pose["turn"]).float().mean() < 0.92
    assert 0.35 < (loose["mirror"] == free.pose["mirror"]).float().mean() < 0.65
    assert not torch.equal(free.reference, tied.reference) and loose["size"].unique().tolist() == [2]


def test_no_caption_tells_where_a_creature_faces():
    pair = lessons.draw_pairs(16, torch.Generator().manual_seed(3), world.WIDE)
    told = []
    for mirror in (0, 1):
        pose = {**pair.pose, "mirror": torch.full((16,), mirror)}
        data = lessons.Lessons(pair.target, pair.target, [], pair.identity, pose, pair.scene, pair.garment,
                               lessons.covered(pair))
        told.append(lessons.told(data, torch.arange(16), torch.Generator().manual_seed(0)))
    assert told[0] == told[1]


# -- the world of a base -------------------------------------------------------------------------------
def test_a_base_says_what_it_draws():
    assert world.WORLDS[world.world_of({})] == world.EASY and world.WORLDS[world.world_of({"world": "wide"})] == world.WIDE
    with pytest.raises(LikenessError, match="'huge', this pack knows easy and wide"):
        world.world_of({"world": "huge"})
    assert base.STAGES_OF["easy"] == base.STAGES == base.WIDE_STAGES[:-1]
    assert base.WIDE_STAGES[-1].variation == world.WIDE._replace(pairs=0.2)


@pytest.fixture
def short_stages(monkeypatch):
    """Both worlds' bases in three steps, on a first stage that nobody trained."""
    easy = (base.Stage("easy", 1, world.EASY, 40, 1),)
    monkeypatch.setattr(base, "STAGES_OF", {"easy": easy, "wide": (*easy, base.Stage("wide", 2, world.WIDE, 40, 2))})
    first = FirstStage()
    first.init_weights()
    monkeypatch.setattr(Recipe, "first_stage", lambda self: (first, 0.0))


def test_a_base_of_either_world_is_labelled_when_it_is_one(short_stages, tmp_path, monkeypatch):
    """The wide run goes through the easy stage first, and neither takes the other's checkpoint for its own."""
    said, real = [], Recipe._write
    monkeypatch.setattr(Recipe, "_write", lambda self, *args, **more: said.append(more) or real(self, *args, **more))
    one = Recipe(tmp_path / "work", tmp_path / "weights", "test", lambda _: None)
    for name in ("wide", "easy", "wide"):
        one.base(Unet(), name)
        header = files.read_header(tmp_path / "weights" / "base.safetensors")
        assert world.world_of(header.metadata) == name
        assert header.tensors["text.text_model.embeddings.token_embedding.weight"].dtype == "I8", "in 8 bits, as it ships"
    assert [(more["steps"], more.get("world"), more["stages"].count("steps")) for more in said] == [
        ("1", None, 1), ("3", "wide", 2), ("3", "wide", 2), ("1", None, 1), ("1", None, 1), ("3", "wide", 2)]


def test_a_wide_base_may_begin_with_a_file_of_the_easy_world(short_stages, tmp_path, monkeypatch):
    """The stages before its own are taken as done, and its pictures go through the file's own first stage."""
    Recipe(tmp_path / "work", tmp_path / "easy", "test", lambda _: None).base(Unet())
    monkeypatch.setattr(Recipe, "first_stage", lambda self: pytest.fail("made once more"))
    drawn, real = [], base.render_pool
    monkeypatch.setattr(base, "render_pool", lambda n, seed, variation: drawn.append(variation) or real(n, seed, variation))
    begun, train = [], base.BaseRun.train_stage
    monkeypatch.setattr(base.BaseRun, "train_stage", lambda self, *args: begun.append(
        (self.step, self.unet.mix.weight.detach().clone())) or train(self, *args))
    start = tmp_path / "easy" / "base.safetensors"
    Recipe(tmp_path / "other", tmp_path / "wide", "test", lambda _: None).base(Unet(), "wide", start)
    (step, weight), = begun
    known, made = packed.load(start), packed.load(tmp_path / "wide" / "base.safetensors")
    assert step == 1 and drawn == [world.WIDE] and torch.equal(weight, known["unet.mix.weight"].float())
    assert all(torch.equal(made[name], value) for name, value in known.items() if name.startswith("first_stage."))
    assert not torch.equal(made["unet.mix.weight"], known["unet.mix.weight"])
    assert files.read_header(tmp_path / "wide" / "base.safetensors").metadata["steps"] == "3"


@pytest.mark.parametrize("name", ["easy", "wide"])
def test_references_and_truths_of_the_ablation_vary_as_the_base(name, monkeypatch):
    asked: list[world.Variation] = []
    for draw in ("draw_poses", "draw_scene_parameters"):
        real = getattr(world, draw)
        monkeypatch.setattr(world, draw, lambda n, g, variation, real=real: asked.append(variation) or real(n, g, variation))
    assert _ablation.trials(7, 2, world.WORLDS[name]).mirror.sum() == 16
    assert asked == [world.WORLDS[name]] * 4


# -- the encoder that learned from captions ------------------------------------------------------------
def clip() -> pretrain.ViT:
    model, g = pretrain._initialised("clip", 5).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():  # norms and biases that begin at one and zero must be told apart too
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=g)
    return model


def test_the_clip_encoder_is_read_as_any_clip_file():
    model, pixels = clip(), torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    names = pretrain.transformers_names(model)
    assert identify(names, {"num_heads": "3"}) == pretrain.vit_config("clip"), "told from names and shapes, without a label"
    again, _ = load_vit(names, {"num_heads": "3"})
    with torch.no_grad():
        for a, b in zip(model(pixels)[:2], again(pixels)[:2], strict=True):
            assert torch.equal(a, b)


def test_the_clip_encoder_is_transformers_clip():
    transformers = pytest.importorskip("transformers")
    model, pixels = clip(), torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    config = transformers.CLIPVisionConfig(hidden_size=96, intermediate_size=384, num_hidden_layers=4, num_attention_heads=3,
                                           image_size=64, patch_size=8, hidden_act="quick_gelu")
    theirs = transformers.CLIPVisionModel(config).eval()
    own = {key: value for key, value in theirs.state_dict().items() if "position_ids" not in key}
    names = pretrain.transformers_names(model)
    if not next(iter(own)).startswith("vision_model."):  # transformers 5 has no prefix in memory, files still have it
        names = {key.removeprefix("vision_model."): value for key, value in names.items()}
    assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in names.items()}
    theirs.load_state_dict(names, strict=False)
    with torch.no_grad():
        assert torch.allclose(theirs(pixels).pooler_output, model(pixels).cls, atol=1e-5)


def test_clip_learns_from_words_that_tell_the_look(monkeypatch):
    pool = render_pool(8, 1, world.WIDE)
    texts = pretrain.descriptions(pool.identity)
    for k, text in enumerate(texts):
        assert world.KINDS[int(pool.identity["kind"][k])] in text and world.PATTERNS[int(pool.identity["pattern"][k])] in text
        assert world.COLOUR_NAMES[int(pool.identity["second"][k])] in text
        assert not any(word in text for word in (*world.PLACES, *world.SCENES, *world.SIZES))
    monkeypatch.setattr(pretrain, "BATCH", 4)
    losses, real = [], pretrain.info_nce
    monkeypatch.setattr(pretrain, "info_nce", lambda *args: losses.append(real(*args)) or losses[-1])
    before = pretrain._initialised("clip", 2).state_dict()
    model = pretrain.train_clip(pool, lambda pixels: pixels, 40, lambda _: None)
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8]) and not any(p.requires_grad for p in model.parameters())
    assert not torch.equal(model.state_dict()["patch.weight"], before["patch.weight"])


def test_info_nce_by_hand():
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    b = torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    s = [[6.0, 0.0], [8.0, 10.0]]
    rows = sum(math.log(sum(map(math.exp, s[k]))) - s[k][k] for k in range(2)) / 2
    columns = sum(math.log(math.exp(s[0][k]) + math.exp(s[1][k])) - s[k][k] for k in range(2)) / 2
    assert pretrain.info_nce(a, b, 0.1).item() == pytest.approx(rows + columns, abs=1e-5)


# -- candidates ----------------------------------------------------------------------------------------
def attributes(look: dict[str, torch.Tensor], k: int) -> tuple[int, ...]:
    return tuple(int(look[name][k]) for name in ("colour", "second", "pattern", "accessory", "accent"))


@pytest.mark.parametrize(("accessory", "near"), [(0, 6 + 6 + 2 + 16), (2, 6 + 6 + 2 + 2 + 7)])
def test_hard_candidates(accessory, near):
    true = {"colour": 1, "second": 4, "pattern": 2, "accessory": accessory, "accent": 5}
    look = {name: torch.tensor(value) for name, value in true.items()}
    rows, count = _looks.hard_candidates(look, torch.Generator().manual_seed(0))
    found = [attributes(rows, k) for k in range(_looks.HARD)]
    assert count == near and len(set(found)) == 64
    expected = (1, 4, 2, accessory, 5 if accessory else 0)
    assert found[-1] == expected

    def apart(other: tuple[int, ...]) -> int:
        plain = sum(a != b for a, b in zip(other[:4], expected[:4], strict=True))
        return plain + (other[3] > 0 and accessory > 0 and other[4] != expected[4])
    assert [apart(other) for other in found] == [1] * near + [2] * (63 - near) + [0]
    everything = {look for look in itertools.product(range(8), range(8), range(3), range(3), range(8))
                  if look[0] != look[1] and (look[3] or not look[4])}
    assert {other for other in everything if apart(other) == 1} == set(found[:near]), "none is left out"


# -- what is measured ----------------------------------------------------------------------------------
def judge_of(t: _ablation.Trials, **wrong: torch.Tensor):
    """A judge that is right about everything but what `wrong` says; a picture's first pixel tells which one it is."""
    own = world.select(t.ids, t.identity)
    right = {**own, "scene": t.scene, "place": t.place, "mirror": t.mirror} | wrong

    def judge(pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = (pictures[:, 0, 0, 0] * 1000).round().long()
        return {name: 20 * torch.nn.functional.one_hot(right[name][rows], count).float() for name, count in HEADS.items()}
    return judge


def test_trials_and_measures():
    t = _ablation.trials(1, 4, world.WIDE)
    assert bool(world.held_out(t.ids).all()) and len(set(world.identity_code(t.ids).tolist())) == 16
    assert t.mirror.view(16, 4).sum(1).tolist() == [2] * 16, "both facings of every identity"
    assert not torch.equal(t.picture[:, 0], t.picture[:, 1]) and t.noise.shape == (64, 48, 8, 8)
    assert {*t.scene.tolist()} == set(range(5)) and {*t.place.tolist()} == set(range(3))
    again, other = _ablation.trials(1, 4, world.WIDE), _ablation.trials(2, 4, world.WIDE)
    assert torch.equal(again.noise, t.noise) and not torch.equal(other.ids["colour"], t.ids["colour"])

    pictures = torch.arange(64).view(64, 1, 1, 1).expand(64, 3, 2, 2) / 1000

    def rates(**wrong: torch.Tensor) -> dict[str, float]:
        hits = _ablation.judged(judge_of(t, **wrong), t, pictures)
        return {name: sum(values) / len(values) for name, values in hits.items()}
    assert rates() == dict.fromkeys(_ablation.MEASURES, 1.0)
    away = rates(mirror=1 - t.mirror)
    assert away.pop("leak") == 0.0 and set(away.values()) == {1.0}
    own = world.select(t.ids, t.identity)
    slip = rates(pattern=(own["pattern"] + 1) % 3)  # one attribute: another of the 64 for sure, of the 16 hardly
    assert slip["retrieval_hard"] == 0.0 and slip["retrieval"] > 0.5 and slip["scene"] == slip["leak"] == 1.0
    assert rates(scene=(t.scene + 1) % 5)["scene"] == 0.0 and rates(place=(t.place + 1) % 3)["place"] == 0.0


def test_intervals_are_over_seeds_and_pictures():
    g = torch.Generator().manual_seed(1)
    pictures = (torch.rand(3, 400, generator=g) < 0.5).float()
    low, high = _ablation_table.spread(pictures)
    assert 0.04 < high - low < 0.13 and low < float(pictures.mean()) < high
    apart = torch.tensor([[0.1], [0.5], [0.9]]).expand(3, 400)  # no picture differs, but the seeds do
    low, high = _ablation_table.spread(apart)
    assert low < 0.25 and high > 0.75
    assert _ablation_table.spread(torch.ones(1, 8)) == (1.0, 1.0)
    alike = torch.tensor([0.0, 1.0]).repeat_interleave(200).expand(1, 400)  # two identities, always wrong and always right
    low, high = _ablation_table.spread(alike, 2)
    assert (low, high) == (0.0, 1.0) and _ablation_table.spread(alike)[0] > 0.4


def measured(rate: float, leak: float = 0.5, seeds: tuple[int, ...] = (0, 1, 2)) -> dict[int, dict]:
    """16 identities of 100 pictures, each with the same share of hits."""
    def hits(share: float) -> list[float]:
        return [1.0 if k < round(share * 100) else 0.0 for k in range(100)] * 16
    return dict.fromkeys(seeds, dict.fromkeys(_ablation.MEASURES, hits(rate)) | {"leak": hits(leak), "memory_mib": 2.0})


def test_summary_verdicts_and_goals():
    rows = {"none": measured(0.02), "global": measured(0.3), "local": measured(0.83), "both": measured(0.84),
            "coupled": measured(0.8, 0.9), "decoupled": measured(0.7, 0.6), "ceiling": measured(1.0),
            "shuffled": measured(0.3)}
    out = _ablation_table.summary(rows)
    assert out["retrieval_both"] == 0.84 and out["retrieval_both_lo"] < 0.84 < out["retrieval_both_hi"]
    assert out["verdict_retrieval_hard_local_over_global"] == "shown"
    assert out["verdict_retrieval_hard_both_over_local"] == "not shown"
    assert out["verdict_leak_coupled_over_decoupled"] == "shown"
    assert out["more_retrieval_hard_both_than_local"] == pytest.approx(0.01) and out["more_retrieval_hard_both_than_local_lo"] > 0
    assert _ablation_table.verdict(out, "leak", "decoupled", "coupled") == "the other way round"
    assert out["goal_retrieval_both"] == "missed, 0.85" and out["goal_retrieval_hard_both"] == "reached, 0.6"
    assert out["lost_retrieval_decoupled"] == pytest.approx(0.1) and out["goal_lost_retrieval_decoupled"].startswith("missed")
    assert out["premise_leak_coupled_over_both"] == "shown" and out["goal_retrieval_shuffled"] == "missed, at most 0.125"
    assert _ablation_table.summary({"shuffled": measured(0.1)})["goal_retrieval_shuffled"].startswith("reached")
    few = _ablation_table.summary({"local": measured(0.9, seeds=(0, 1)), "global": measured(0.1)})
    assert few["verdict_retrieval_hard_local_over_global"] == "not judged, fewer than 3 training seeds"
    assert out["seeds_both"] == 3 and out["pictures_both"] == 4800 and "verdict_retrieval_hard_both_over_dino" not in out
    said = {**out, "chance": 0.0625, "chance_hard": 0.0156, "chance_near": 0.04, "time_over_plain_local": 1.05,
            "steps_local": 2600, "world": "wide", "missing": "clip_1"}
    text = _ablation_table.markdown(said)
    assert "| local level, trained alone | 3 x 2600, 4800 | 0.83 (" in text and "| 1.05 | 2.00 |" in text
    assert "Missing: clip_1." in text and "| text only | 4800 |" in text and text.count("| 0.90 (") == 1
    # Where no creature turns, half of the references agree with any adapter.
    assert "| 0.90 (" not in _ablation_table.markdown({**said, "world": "easy"})
    assert "`verdict_leak_coupled_over_decoupled`: shown" in text
    assert "`more_leak_coupled_than_decoupled`: 0.3 (" in text and "`more_leak_coupled_than_decoupled_lo`" not in text


def test_what_decoupling_loses_is_told_of_the_same_training_seeds():
    """One run of each is missing, not of the same seed: only the seed that both have counts."""
    rows = {"coupled": {**measured(0.9, seeds=(1,)), **measured(0.2, seeds=(2,))}, "decoupled": measured(0.9, seeds=(0, 1))}
    assert _ablation_table.summary(rows)["lost_retrieval_decoupled"] == 0.0
    assert "lost_retrieval_decoupled" not in _ablation_table.summary({"coupled": measured(0.9, seeds=(0,)),
                                                                     "decoupled": measured(0.9, seeds=(1,))})
