"""The evidence's own machinery with the real host: devices, the runs of the ablation, and pictures made a batch at a time."""
from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import _ablation, _ablation_table, custany

from harness import mini
from harness.paths import HarnessError
from host.support import comfy, miniature
from likeness.models.common import files
from likeness.models.common.errors import LikenessError
from likeness.models.demo import ablation, lessons, pretrain, recipe, recontext, world
from likeness.models.demo.judge import Judge
from likeness.models.hosting import training_base
from likeness.models.hosting.inject import Strengths, inject
from likeness.models.hosting.prompt import encode_prompt
from likeness.models.hosting.subjects import extract_from_picture
from likeness.nodes import training_cli, training_miniature, training_realcustom

PAIRS = 6


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A random miniature with all three encoders and a random judge under the names of the recipe."""
    folder = tmp_path_factory.mktemp("weights")
    for target, name in (("base", mini.BASE), ("dino", mini.DINO), ("mae", mini.MAE)):
        (folder / f"{target}.safetensors").write_bytes((miniature() / name).read_bytes())
    config = pretrain.vit_config("clip")
    model = mini.pack("models.vision.vit").ViT(config)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=g))
    files.save(folder / "clip.safetensors", pretrain.transformers_names(model),
               {"likeness.family": "clip", "num_heads": "3"})
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        judge = Judge()
    files.save(folder / "judge.safetensors", judge.state_dict(), {"accuracy": json.dumps({"kind": 0.2}), "worlds": "easy wide"})
    return folder


def train_all(adapters: Path, weights: Path, **more: Any) -> list[Path]:
    settings = {"seeds": [0], "steps": 1, "pairs": PAIRS} | more
    return training_miniature.train_ablation(adapters, weights, adapters / "work", **settings)


@pytest.fixture(scope="module")
def adapters(weights, tmp_path_factory) -> Path:
    """One step of every variant, one seed."""
    folder = tmp_path_factory.mktemp("adapters")
    train_all(folder, weights)
    return folder


# -- any device ----------------------------------------------------------------------------------------
def test_nothing_of_the_miniature_stays_behind_on_the_cpu(weights, monkeypatch):
    """Tensors of the device `meta` do not meet those of the CPU: what was not moved raises."""
    # The host's attention for CPUs asks how much memory is free, and no driver answers for this device.
    monkeypatch.setattr(comfy.model_management, "get_free_memory",
                        lambda device, both=False: (1 << 34, 1 << 34) if both else 1 << 34)
    base = training_base.MiniatureBase(weights / "base.safetensors", [weights / "dino.safetensors", weights / "clip.safetensors"],
                                       "meta")
    came: list[torch.Tensor] = []  # a table on `meta` takes rows of the CPU without a word, a card does not
    for module in (base.text, base.unet, *(model for model, _ in base.encoders)):
        module.register_forward_pre_hook(lambda _, inputs: came.extend(inputs))
    rows, first, count = base.encode_text(["a cat on the beach", "a dog"], ["cat", "dog"])
    pictures = torch.rand(2, 3, 64, 64)
    latents, features = base.encode_image(pictures), base.features(pictures)
    t = base.timesteps(2, torch.Generator().manual_seed(0))
    x, target, weight = base.noised(latents, t, torch.randn(2, 48, 8, 8, device="meta"))
    seen = []
    out = base.denoise(x, t, rows, lambda key, h: seen.append(key) or h)
    moved = [rows, latents, x, target, weight, out, base.embed_image(pictures), *(tensor for pair in features for tensor in pair)]
    assert {tensor.device.type for tensor in (*moved, *came)} == {"meta"} and len(seen) == 7 and len(came) == 7
    assert first.tolist() == [2, 2] and count.tolist() == [1, 1] and t.device.type == "cpu"


def test_devices_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert training_base.training_device("cpu") == torch.device("cpu")
    assert training_base.training_device("auto") == comfy.model_management.get_torch_device()
    with pytest.raises(LikenessError, match="torch sees none"):
        training_base.training_device("cuda")


# -- the runs ------------------------------------------------------------------------------------------
def test_every_variant_is_another_training(weights, adapters, monkeypatch):
    """Encoders, lessons and losses are those of the table, and each file tells the command that makes it."""
    said = {name: files.read_header(ablation.folder_of(adapters, name, 0) / "adapter.safetensors").metadata
            for name in ablation.VARIANTS}
    for name, metadata in said.items():
        assert metadata["command"] == (f"python dev.py train demo ablation --only {name} --seeds 0 --steps 1 "
                                       f"--weights {weights.name}")
        assert metadata["base_sha256"] == files.sha256(weights / "base.safetensors")
    families = {name: [entry["family"] for entry in json.loads(metadata["encoders"])] for name, metadata in said.items()}
    two = ["dinov2", "mae"]
    assert families == {"both": two, "global": two, "local": two, "dino": ["dinov2"], "mae": ["mae"], "clip": ["clip"],
                        "coupled": two, "decoupled": two}
    assert {name for name in said if said[name]["correlate"] == "0.9"} == {"coupled", "decoupled"}
    offs = {name: tuple(json.loads(said[name]["train_config"])[key] for key in ("global_off", "local_off")) for name in said}
    assert offs == dict.fromkeys(said, (0.1, 0.1)) | {"global": (0.1, 1.0), "local": (1.0, 0.1)}
    assert all(json.loads(metadata["train_config"])[key] == value for metadata in said.values()
               for key, value in ablation.RECIPE.items())
    losses = {name: json.loads(metadata["losses"]) for name, metadata in said.items()}
    assert {name for name in losses if losses[name]["decouple"]} == {"decoupled"}
    # Pairs of one pose are other lessons: four sets of encoders, and one of them twice.
    assert len(list(adapters.glob("lessons_*.pt"))) == 5
    # What is done is not done again, what is not done goes on, another base is refused.
    drawn = []
    monkeypatch.setattr(lessons, "prepare", lambda *args: drawn.append(args))
    stamps = {path: path.stat().st_mtime_ns for path in adapters.glob("*/adapter.safetensors")}
    assert len(train_all(adapters, weights)) == 8 == len(stamps) and not drawn
    assert {path: path.stat().st_mtime_ns for path in adapters.glob("*/adapter.safetensors")} == stamps


@pytest.mark.parametrize("method", ["custany", "realcustom"])
def test_lessons_are_of_the_world_that_the_base_draws(weights, tmp_path, monkeypatch, method):
    room, train = {"custany": (lessons, training_miniature.train_miniature),
                   "realcustom": (recontext, training_realcustom.train_miniature_realcustom)}[method]
    asked: list[world.Variation] = []

    class Stop(Exception):
        pass

    def prepare(n: int, seed: int, variation: world.Variation, *rest: Any) -> None:
        asked.append(variation)
        raise Stop
    monkeypatch.setattr(room, "prepare", prepare)
    own = tmp_path / "weights"
    own.mkdir()
    for name in ("dino", "mae"):  # three heads of RealCustom++'s projector side by side
        files.save(own / f"{name}.safetensors", mini.encoder_state({"dino": "dinov2"}.get(name, name), 20, 96),
                   mini.encoder_metadata({"dino": "dinov2"}.get(name, name)))
    state, metadata = files.load(weights / "base.safetensors")
    for label in ("easy", "wide"):
        files.save(own / "base.safetensors", state, metadata | ({"world": label} if label == "wide" else {}))
        with pytest.raises(Stop):
            train(tmp_path / label, own, "test", pairs=PAIRS, steps=1)
    assert asked == [world.EASY, world.WIDE]
    assert _ablation_world(own, weights, tmp_path) == ("wide", world.WIDE)
    state, metadata = files.load(own / "judge.safetensors")
    files.save(own / "judge.safetensors", state, {key: value for key, value in metadata.items() if key != "worlds"})
    with pytest.raises(HarnessError, match="never saw the wide world"):
        _ablation.Studio(own, tmp_path, tmp_path, 2)


def _ablation_world(own: Path, weights: Path, tmp_path: Path) -> tuple[str, world.Variation]:
    """What the bench makes of a folder of weights."""
    (own / "judge.safetensors").write_bytes((weights / "judge.safetensors").read_bytes())
    asked = []
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(_ablation, "trials", lambda seed, each, variation: asked.append(variation))
        studio = _ablation.Studio(own, tmp_path, tmp_path, 2)
        studio.trials(0)
    return studio.world, asked[0]


def test_a_run_goes_on_and_never_on_other_lessons(weights, tmp_path):
    def run(name: str = "one", **settings: Any) -> dict[str, str]:
        path = training_miniature.train_miniature(tmp_path / name, weights, "test",
                                                  **{"pairs": PAIRS, "batch": 2, "steps": 1, "csv_every": 1, **settings})
        return files.read_header(path).metadata
    assert run()["steps"] == "1" and run(steps=3)["steps"] == "3"
    table = (tmp_path / "one" / "loss.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table] == ["step", "1", "2", "3"], "it went on at step 1"
    for change in ({"correlate": 0.5}, {"encoders": ("dino",)}, {"pairs": PAIRS + 1}):
        with pytest.raises(LikenessError, match="other lessons"):
            run(steps=4, **change)
    with pytest.raises(LikenessError, match="another file to begin with"):
        run(steps=4, start=tmp_path / "one" / "adapter.safetensors")
    with pytest.raises(LikenessError, match="other settings"):
        run(steps=4, seed=1)
    assert run(steps=4)["steps"] == "4"


def test_the_third_encoder_is_made_beside_the_adapters(weights, tmp_path, monkeypatch):
    """And once: it is for the comparison, the folder of weights is what ships."""
    for name, value in (("POOL", 8), ("CLIP_STEPS", 2)):
        monkeypatch.setattr(recipe, name, value)
    monkeypatch.setattr(pretrain, "BATCH", 4)
    own, adapters = tmp_path / "weights", tmp_path / "adapters"
    own.mkdir()
    for name in ("base", "dino", "mae", "judge"):
        (own / f"{name}.safetensors").write_bytes((weights / f"{name}.safetensors").read_bytes())
    train_all(adapters, own, variants=["clip"], seeds=[0, 1])
    assert sorted(path.stem for path in own.iterdir()) == ["base", "dino", "judge", "mae"]
    assert files.read_header(adapters / "clip.safetensors").metadata["command"] == "python dev.py train demo clip"
    assert len(list((adapters / "work").glob("clip_*.pt"))) == 1 and len(list(adapters.glob("lessons_*.pt"))) == 1
    studio = _ablation.Studio(own, adapters, tmp_path, 2)
    assert [item.config.family for item in studio.loaded("clip", 1)[1].items] == ["clip"]


def test_the_command_line(weights, tmp_path, monkeypatch):
    seen: list[tuple] = []
    monkeypatch.setattr(training_cli, "train_ablation", lambda *args: seen.append(args))
    words = ["demo", "ablation", "--weights", str(weights), "--work", str(tmp_path), "--only", "clip", "both", "--seeds", "1",
             "--steps", "9", "--device", "cpu"]
    assert training_cli.main(words) == 0
    assert float(torch.tensor(1e-40) / 2) > 0, "smallest numbers are left flushed to zero in this process"
    assert seen == [(tmp_path / "ablation", weights, tmp_path, ["clip", "both"], [1], 9, "cpu")]
    with pytest.raises(SystemExit):
        training_cli.main(["demo", "ablation", "--only", "siglip"])
    monkeypatch.setattr(training_base.torch.cuda, "is_available", lambda: False)
    out = str(tmp_path / "run")
    assert training_cli.main(["custany", "--world", "demo", "--weights", str(weights), "--out", out, "--device", "cuda"]) == 2


# -- the pictures --------------------------------------------------------------------------------------
@pytest.fixture
def studio(weights, adapters, tmp_path, monkeypatch) -> _ablation.Studio:
    monkeypatch.setattr(_ablation, "STEPS", 2)
    with torch.inference_mode():
        return _ablation.Studio(weights, adapters, tmp_path, 2)


def awake(adapter: Any) -> Any:
    """Of one training step only: its ends are near zero, so it gets random ones."""
    g = torch.Generator().manual_seed(1)
    state = {name: draw_like(value, g) if ".to_out." in name or name.startswith("global_mlp.out") else value
             for name, value in adapter.patcher.model.state_dict().items()}
    adapter.patcher.model.load_state_dict(state)
    return adapter


def draw_like(value: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    return 4 * torch.randn(value.shape, generator=g) / value.shape[-1] ** 0.5


@pytest.mark.parametrize("strengths", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_a_batch_is_what_the_nodes_make_one_by_one(studio, strengths):
    """Own prompt, own reference, own noise for each latent of a batch."""
    t = studio.trials(0)
    index = (t.ids["kind"][t.identity] == 2).nonzero()[:, 0][:3]
    with torch.inference_mode():
        adapter, encoders = studio.loaded("both", 0)
        awake(adapter)
        batch, memory = studio._batch(_ablation.Row("both", strengths), t, 2, index, (adapter, encoders))
        plain, none = studio._batch(_ablation.Row(None), t, 2, index, None)
        assert memory > 0 == none and (batch - plain).abs().mean() > 1e-3 and (batch[0] - batch[1]).abs().mean() > 1e-3
        for row, k in enumerate(index.tolist()):
            text = f"a photo of a bear {world.SCENES[t.scene[k]]}, {world.PLACES[t.place[k]]}"
            positive, word, _ = encode_prompt(studio.clip, text, "bear")
            who, facing = t.identity[k], t.mirror[k]
            subject = extract_from_picture(adapter, encoders, t.picture[who, facing][None].permute(0, 2, 3, 1),
                                           t.mask[who, facing][None], "concat", 0.1, "error").subject
            done = inject(studio.model, positive, studio._text(""), subject, word, Strengths(*strengths))
            latent = comfy.sample.sample(done.model, t.noise[k:k + 1], 2, _ablation.CFG, "euler", "normal", done.positive,
                                         done.negative, torch.zeros(1, 48, 8, 8), seed=0, disable_pbar=True)
            assert torch.allclose(studio.decode(latent)[0], batch[row], atol=5e-5), (row, text)


def test_a_shuffled_row_takes_another_creatures_reference(studio):
    t = studio.trials(0)
    index = (t.identity == 1).nonzero()[:, 0]
    swapped = t._replace(picture=t.picture.roll(-5, 0), mask=t.mask.roll(-5, 0))
    with torch.inference_mode():
        tools = studio.loaded("both", 0)
        awake(tools[0])
        kind = int(t.ids["kind"][1])
        shuffled, _ = studio._batch(_ablation.Row("both", shuffled=True), t, kind, index, tools)
        there, _ = studio._batch(_ablation.Row("both"), swapped, kind, index, tools)
        own, _ = studio._batch(_ablation.Row("both"), t, kind, index, tools)
    assert torch.equal(shuffled, there) and not torch.allclose(shuffled, own, atol=1e-3)


def test_a_described_row_has_its_whole_look_in_words(studio):
    t = studio.trials(0)
    index = (t.ids["kind"][t.identity] == 2).nonzero()[:, 0][:3]
    name, texts = _ablation.sentences(_ablation.ROWS["described"], t, 2, index)
    k = int(t.identity[index[0]])
    words = [world.COLOUR_NAMES[t.ids["colour"][k]], world.COLOUR_NAMES[t.ids["second"][k]], world.PATTERNS[t.ids["pattern"][k]]]
    assert texts[0].startswith(f"a photo of a {words[0]} and {words[1]} {words[2]} bear") and name == "bear"
    worn = int(t.ids["accessory"][k])
    assert not worn or f"{world.COLOUR_NAMES[t.ids['accent'][k]]} {world.ACCESSORIES[worn]}" in texts[0]
    plain = _ablation.sentences(_ablation.ROWS["none"], t, 2, index)[1]
    assert plain[0] == f"a photo of a bear {world.SCENES[t.scene[index[0]]]}, {world.PLACES[t.place[index[0]]]}"
    with torch.inference_mode():
        described, plainly = (studio._batch(_ablation.ROWS[row], t, 2, index, None)[0] for row in ("described", "none"))
    assert (described - plainly).abs().mean() > 1e-3


def test_an_adapter_is_measured_where_it_was_trained_only(studio, weights, adapters, tmp_path):
    """On another base or with another encoder of the same size it would give numbers that mean nothing."""
    def copied(part: str) -> _ablation.Studio:
        own = tmp_path / part
        shutil.copytree(weights, own)
        state, metadata = files.load(own / f"{part}.safetensors")
        files.save(own / f"{part}.safetensors", state, metadata | {"changed": "yes"})
        with torch.inference_mode():
            return _ablation.Studio(own, adapters, tmp_path, 2)
    assert studio.loaded("both", 0)
    for part in ("base", "mae"):
        with pytest.raises(HarnessError, match="another base or with other encoders"):
            copied(part).loaded("both", 0)


def test_trainings_of_a_row_are_equally_long(weights, adapters, tmp_path, monkeypatch):
    monkeypatch.setattr(_ablation, "STEPS", 1)
    monkeypatch.setattr(_ablation.Studio, "steps", lambda self, name, seed: 5 + seed)
    with pytest.raises(HarnessError, match="none had 5 and 6 steps"):
        _ablation_table.ablation(weights, adapters, tmp_path, ["none"], [0, 1], 2, 1)


def test_the_ablation_has_a_run_of_its_own():
    with pytest.raises(HarnessError, match="of their own"):
        custany.main(["--only", "quality", "ablation"])


def test_the_whole_table_resumes_and_names_what_is_missing(weights, adapters, tmp_path, monkeypatch):
    monkeypatch.setattr(_ablation, "STEPS", 1)
    made, real = [], _ablation.Studio.render
    monkeypatch.setattr(_ablation.Studio, "render", lambda self, row, seed: made.append(row) or real(self, row, seed))

    def run(rows: list[str], seeds: list[int]) -> dict[str, Any]:
        return _ablation_table.ablation(weights, adapters, tmp_path, rows, seeds, 2, 1)
    first = run(["none", "both", "clip"], [0])
    assert len(made) == 3 and first["missing"] == "nothing" and first["pictures_both"] == 32
    used = [ablation.folder_of(adapters, "both", 0) / "adapter.safetensors", weights / "dino.safetensors",
            weights / "mae.safetensors"]
    values = sum(math.prod(info.shape) for path in used for info in files.read_header(path).tensors.values())
    kept = 4 * 2 * 64 * 96  # layers, keys and values, tokens, channels
    assert first["memory_mib_both"] == pytest.approx(4 * (values + kept) / 2 ** 20, abs=1e-3)  # float32 on a CPU
    assert first["memory_mib_none"] == 0 < first["time_over_plain_both"] and 0 < first["chance_near"] < 1 / 20
    out = run(["none", "both", "clip", "coupled"], [0, 1])
    assert len(made) == 5, "only the new row and the text of the new seed"
    assert out["missing"] == "both_1, clip_1, coupled_1" and out["seeds_none"] == 2 and out["seeds_both"] == 1
    for key in _ablation.MEASURES:
        for row in ("none", "both", "clip", "coupled", "ceiling", "coded"):
            assert out[f"{key}_{row}_lo"] <= out[f"{key}_{row}"] <= out[f"{key}_{row}_hi"]
    assert {path.name for path in tmp_path.glob("*.png")} == {f"ablation_{name}.png" for name in _ablation_table.TABLES}
    assert "| CLIP only | 1 x 1, 32 |" in (tmp_path / "ablation.md").read_text() and out["steps_none"] == 0
    path = ablation.folder_of(adapters, "both", 0) / "adapter.safetensors"
    before = path.read_bytes()
    state, metadata = files.load(path)
    files.save(path, {key: value + 0.01 for key, value in state.items()}, metadata)
    run(["none", "both"], [0])
    path.write_bytes(before)
    assert len(made) == 6, "another adapter is measured anew"
    real_trials = _ablation.trials
    monkeypatch.setattr(_ablation, "trials", lambda *words: real_trials(*words)._replace(noise=1 + real_trials(*words).noise))
    run(["none", "both"], [0])
    assert len(made) == 8, "and whatever is asked for otherwise"
