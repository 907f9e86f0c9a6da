"""RealCustom++ trained on the host's bases, and its file in an injector."""
from __future__ import annotations

import argparse
import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from harness import mini, tiny
from host.support import base, comfy, draw, folder, miniature, sample
from host.test_training_host import CAPTIONS, far_from_half, loaded
from likeness.models.common import files
from likeness.models.common.errors import LikenessError
from likeness.models.hosting import adapters, encoders, training_base
from likeness.models.hosting.inject import Strengths, inject
from likeness.models.hosting.prompt import encode_prompt
from likeness.models.hosting.training_realcustom import checkpoint_encode, config_of, miniature_encode
from likeness.models.realcustom.adapter import RealCustom, release_names
from likeness.models.realcustom.config import identify, layer_key, to_metadata
from likeness.models.training import loop
from likeness.models.training.base import Batch
from likeness.models.training.config import TrainConfig
from likeness.models.training.loop import train
from likeness.models.training.realcustom import RealCustomTask


@cache
def weights() -> Path:
    """A random miniature whose encoders add up to three heads of the projector."""
    out = folder() / "wide"
    out.mkdir()
    (out / "base.safetensors").write_bytes((miniature() / mini.BASE).read_bytes())
    for seed, (name, family) in enumerate((("dino", "dinov2"), ("mae", "mae")), 20):
        files.save(out / f"{name}.safetensors", mini.encoder_state(family, seed, 96), mini.encoder_metadata(family))
    return out


def files_of_encoders() -> list[Path]:
    return [weights() / "dino.safetensors", weights() / "mae.safetensors"]


def pair() -> encoders.Encoders:
    return encoders.Encoders(tuple(encoders.load_encoder(path) for path in files_of_encoders()))


def new_task(trained: bool = True) -> tuple[Any, RealCustomTask]:
    small = training_base.MiniatureBase(weights() / "base.safetensors", files_of_encoders())
    config = config_of(small.width, small.layers, [vit for _, vit in small.encoders], 64)
    task = RealCustomTask(small, config, TrainConfig(), miniature_encode(small, config), 128, small.hashes, 1)
    if trained:
        for name, value in task.adapter.named_parameters():
            if name.endswith(".v.weight"):
                value.data.copy_(draw(9, *value.shape) / 8)
    return small, task


def test_the_miniatures_layout():
    """The published structure: one block before the last of both encoders, every text attention, widths from the parts."""
    small, task = new_task()
    config = task.config
    assert (config.vision, config.width, config.base, config.blocks) == (192, 128, "miniature", ((0,), (0,)))
    parts = ("input.1", "input.3", "middle.0", "output.0", "output.1", "output.2", "output.3")
    assert [key for key, _ in config.layers] == [f"{part}.0" for part in parts]
    state = release_names(task.adapter.state_dict(), small.residual_blocks)
    assert identify(state, to_metadata(config)) == config
    names = comfy.utils.unet_to_diffusers(base("mini")[0].model.model_config.unet_config)
    for name in state:
        if name.endswith("attn2.to_k_vision.weight"):
            there = names[name.replace("to_k_vision", "to_k")].split(".")
            part, number, depth = layer_key(name, 1)[0].split(".")
            assert there[0] == f"{part}_block" + ("" if part == "middle" else "s") and there[-4] == depth
            assert part == "middle" or there[1] == number


def test_training_and_use_are_one_network():
    """The loop's own attention, mask and all, against what the injector makes of the file."""
    small, task = new_task()
    picture = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(2))
    mask = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(3))
    x, t = draw(3, 1, 48, 8, 8), torch.tensor([600])
    with torch.no_grad():
        rows, _, _ = small.encode_text(["a cat on beach"], [""])
        tokens = task.adapter.encode(task._features(Batch(picture, None, None, [""], [""]), torch.tensor([False])))
        plain = small.denoise(x, t, rows)
        trained = small.denoise(x, t, rows, cross=task._cross(tokens, mask[:, None]))
    with torch.inference_mode():
        model, clip, _ = base("mini")
        state = release_names(task.adapter.state_dict(), 1)
        made = adapters.make_adapter(state, to_metadata(task.config), "hash", "name")
        who = adapters.extract(made, pair(), picture.movedim(1, -1), "concat", "s")
        torch.testing.assert_close(who.get("local"), tokens, atol=1e-4, rtol=1e-4)
        positive, word, _ = encode_prompt(clip, "a cat on beach", "cat")
        done = inject(model, positive, [], who, word, Strengths(1.0, 1.0), mask=mask)
        sigma = model.get_model_object("model_sampling").sigmas[t].view(-1, 1, 1, 1)
        seen = {}

        def note(apply_model, args):
            seen["out"] = apply_model(x * (1 + sigma ** 2) ** 0.5, sigma.flatten(), **args["c"])
            return seen["out"]
        watched = done.model.clone()
        watched.set_model_unet_function_wrapper(note)
        sample(watched, done.positive, done.positive, cfg=1.0, kind="mini")
        host_x = x * (1 + sigma ** 2) ** 0.5
        used = (host_x / (sigma ** 2 + 1) - seen["out"]) * (sigma ** 2 + 1) ** 0.5 / sigma
    assert (used - trained).abs().max() < 6e-3 * trained.abs().max(), "the host's text encoder rounds to fp16"
    assert (trained - plain).abs().max() > 3e-2 * trained.abs().max()


def test_the_recipe_in_two_parts_is_the_recipe_in_one(tmp_path, monkeypatch):
    """Four steps at once, and two that are gone on with: one file, which loads with its encoders."""
    from likeness.nodes.training_realcustom import train_miniature_realcustom
    more = {"pairs": 6, "batch": 2, "save_every": 2}
    one = train_miniature_realcustom(tmp_path / "one", weights(), "test", steps=4, **more)
    stopped = {"count": 0}
    from likeness.nodes import training_realcustom as module

    def halfway(*args, **settings):
        stopped["count"] += 1
        stop = {"should_stop": lambda: stopped["count"] == 1 and (tmp_path / "two" / "state").exists()}
        return train(*args, **{**settings, **stop})
    real, module.train = module.train, halfway
    try:
        train_miniature_realcustom(tmp_path / "two", weights(), "test", steps=4, **more)
        two = train_miniature_realcustom(tmp_path / "two", weights(), "test", tmp_path / "shipped.safetensors", steps=4, **more)
    finally:
        module.train = real
    (a, metadata), (b, _) = files.load(one), files.load(two)
    assert stopped["count"] == 2 and all(torch.equal(value, b[name]) for name, value in a.items())
    assert (tmp_path / "shipped.safetensors").read_bytes() == two.read_bytes()
    assert metadata["method"] == "realcustom" and metadata["dataset_license"]
    with torch.inference_mode():
        adapter = adapters.load_adapter(one)
        assert adapter.config.base == "miniature" and adapters.wanted_encoders(adapter)[2] == (0, 0)
        assert adapters.load_encoders(adapter, files_of_encoders()).items[0].config.depth == 1
    asked: list[float] = []
    monkeypatch.setattr(module.recontext, "open_pairs", lambda n, progress: asked.append(progress) or n)
    again = train_miniature_realcustom(tmp_path / "three", weights(), "test", steps=1, start=one, **more)
    assert files.load(again)[0].keys() == a.keys()
    assert asked == [1.0], "a trained adapter goes on with all pairs"
    assert metadata["device"] == "cpu"
    for folder_, begin in (("one", one), ("three", None)):
        with pytest.raises(LikenessError, match=f"{folder_} holds a run on another base, .* another file to begin with"):
            train_miniature_realcustom(tmp_path / folder_, weights(), "test", steps=5, start=begin, **more)
    other = tmp_path / "other"
    other.mkdir()
    for name in ("base", "dino", "mae"):
        (other / f"{name}.safetensors").write_bytes((weights() / f"{name}.safetensors").read_bytes())
    files.save(other / "dino.safetensors", mini.encoder_state("dinov2", 77, 96), mini.encoder_metadata("dinov2"))
    with pytest.raises(LikenessError, match="holds a run on another base, other encoders"):
        train_miniature_realcustom(tmp_path / "one", other, "test", steps=5, **more)


def test_what_a_run_of_the_recipe_is_made_of(tmp_path, monkeypatch):
    """Encoders on equal terms, by what the pairs show; the curriculum counts steps; pairs and runs hang on their law."""
    from likeness.nodes import training_realcustom as module
    made, evened, asked = [], [], []

    def caught(task, config, source, out, **more):
        made.append(source)
        raise InterruptedError
    monkeypatch.setattr(module, "train", caught)
    monkeypatch.setattr(RealCustom, "even_out", lambda self, mean, deviation: evened.append((mean, deviation)))
    monkeypatch.setattr(module.recontext, "open_pairs", lambda n, progress: asked.append(progress) or n)

    def run(out, **more):
        with pytest.raises(InterruptedError):
            module.train_miniature_realcustom(out, weights(), "test", pairs=6, batch=2, steps=4, accumulation=3, **more)
        return {path.name for path in out.glob("recontext_*.pt")}
    kept = run(tmp_path / "one")
    deep = made[0].data.deep.float().flatten(0, 1)
    (mean, deviation), = evened
    torch.testing.assert_close(mean, deep.sum(0) / len(deep), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(deviation, ((deep - mean) ** 2).sum(0).div(len(deep) - 1).sqrt(), atol=1e-5, rtol=1e-4)
    for _ in range(12):
        made[0].batch(2, torch.Generator().manual_seed(0))
    assert asked == pytest.approx([number / 12 for number in range(12)]), "four steps of three batches each"
    for name in ("NEARNESS", "NEIGHBOURS", "OTHER_KIND", "GARMENT"):
        assert getattr(module.recontext, name) in module.recontext.LAW
    monkeypatch.setattr(module.recontext, "LAW", (*module.recontext.LAW, "other"))
    with pytest.raises(LikenessError, match="other lessons"):
        module.train_miniature_realcustom(tmp_path / "one", weights(), "test", pairs=6, batch=2, steps=4)
    assert len(kept) == 1 and not kept & run(tmp_path / "two")


def test_pictures_go_to_where_the_encoders_are():
    """On the meta device, which computes nothing and refuses what lies elsewhere."""
    small = training_base.MiniatureBase(weights() / "base.safetensors", files_of_encoders(), "meta")
    config = config_of(small.width, small.layers, [vit for _, vit in small.encoders], 64)
    assert {part.device.type for part in miniature_encode(small, config)(torch.zeros(1, 3, 128, 128))} == {"meta"}


@pytest.mark.parametrize("argv", (["realcustom", "--world", "demo"], ["demo", "realcustom"]))
def test_the_command_says_where_to_train(argv, tmp_path, monkeypatch):
    from likeness.nodes import training_cli, training_realcustom
    seen = []
    monkeypatch.setattr(training_realcustom, "train_miniature_realcustom", lambda *a, **settings: seen.append(settings))
    assert training_cli.main([*argv, "--device", "cpu", "--weights", str(tmp_path)]) == 0
    assert seen[0]["device"] == "cpu"


def test_a_file_does_not_tell_the_folders_of_the_machine(tmp_path, monkeypatch):
    from likeness.nodes import training_cli, training_realcustom
    told = []
    monkeypatch.setattr(training_realcustom, "train_miniature_realcustom", lambda *args, **_: told.append(args[2]))
    words = ["realcustom", "--world", "demo", "--out", str(tmp_path / "mine"), f"--weights={tmp_path / 'w'}"]
    assert training_cli.main([*words, "--from", "old/adapter.safetensors"]) == 0
    assert training_cli.main(["realcustom", "--world", "demo", "--from", "../../home/me/a.safetensors"]) == 0
    assert told == ["python dev.py train realcustom --world demo --out mine --weights=w --from old/adapter.safetensors",
                    "python dev.py train realcustom --world demo --from a.safetensors"]


@pytest.mark.parametrize("method", ("custany", "realcustom"))
@pytest.mark.parametrize("other", ("checkpoint", "encoder", "pictures", "size", "start"))
def test_a_folder_of_another_run_is_refused(method, other, tmp_path, monkeypatch):
    """On a checkpoint: told before anything large is loaded."""
    from likeness.nodes import training_cli, training_miniature, training_realcustom
    begin = {"custany": training_cli._train_folder, "realcustom": training_realcustom.train_folder_realcustom}[method]

    def load(*args, **settings):
        raise LikenessError("no checkpoint")
    for module in (training_base, training_realcustom):
        monkeypatch.setattr(module, "load_checkpoint_base", load)
    for name in ("checkpoint", "encoder", "start", "metadata.jsonl"):
        (tmp_path / name).write_bytes(name.encode())
    args = argparse.Namespace(out=tmp_path / "run", checkpoint=tmp_path / "checkpoint", encoders=[tmp_path / "encoder"],
                              data=tmp_path, size=64, start=None)
    with pytest.raises(LikenessError, match="no checkpoint"):  # it cannot begin, and leaves the folder free
        begin(args, "test")
    assert not (tmp_path / "run" / "recipe.json").exists()
    training_miniature.same_run(tmp_path / "run", training_miniature.folder_recipe(args))
    if other in ("size", "start"):
        setattr(args, other, {"size": 72, "start": tmp_path / "start"}[other])
    else:
        (tmp_path / {"pictures": "metadata.jsonl"}.get(other, other)).write_bytes(b"another")
    with pytest.raises(LikenessError, match="run holds a run on another base"):
        begin(args, "test")


@pytest.mark.parametrize("method", ("custany", "realcustom"))
@pytest.mark.parametrize(("words", "said"), (([], "unknown"), (["--license", "CC0"], "CC0")))
def test_the_file_tells_the_licence_of_its_pictures(method, words, said, tmp_path, monkeypatch):
    """The whole command on a checkpoint, stopped after its first step."""
    from likeness.nodes import training_cli, training_realcustom
    Image.new("RGBA", (64, 64), "red").save(tmp_path / "a.png")
    row = {"reference": "a.png", "target": "a.png", "caption": "a cat", "category": "cat"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    preset = training_base.preset_for
    monkeypatch.setattr(training_base, "preset_for", lambda base: preset(base)._replace(head_dim=16))  # fits the tiny layers
    stopped = partial(train, should_stop=lambda: True)
    monkeypatch.setattr(loop, "train", stopped)
    monkeypatch.setattr(training_realcustom, "train", stopped)
    loaded("sd15")  # the host knows the tiny checkpoint
    argv = [method, "--data", tmp_path, "--checkpoint", tiny.ensure()["tiny_sd15.safetensors"], "--encoders",
            *files_of_encoders(), "--size", "64", "--batch", "1", "--steps", "2", "--out", tmp_path / "run"]
    assert training_cli.main([*map(str, argv), *words]) == 0
    assert files.load(tmp_path / "run" / "adapter.safetensors")[1]["dataset_license"] == said


def test_two_steps_on_a_checkpoint(tmp_path):
    """SD1.5 shapes, the paper's second backbone."""
    host = loaded("sd15")
    own = training_base.CheckpointBase(host.model, host.clip, host.vae, pair())
    config = config_of(own.width, own.layers, [item.config for item in own.encoders.items], 64)
    assert own.residual_blocks == 2 and len(config.layers) == 16 and config.base == "text width 64"
    settings = TrainConfig(steps=2, batch=2, lr=1e-2, warmup=0, save_every=5, ema=0.5, csv_every=1)
    task = RealCustomTask(own, config, settings, checkpoint_encode(own, config), 128, ["", ""], own.residual_blocks)

    class Source:
        def batch(self, n: int, generator: torch.Generator) -> Batch:
            pictures = torch.rand(n, 3, 128, 128, generator=generator)
            return Batch(pictures, pictures[..., :64, :64], None, CAPTIONS[:n], ["cat", "dog"][:n])
    result = train(task, settings, Source(), tmp_path)
    with torch.inference_mode():
        adapter = adapters.load_adapter(result.path)
        assert adapter.config == config and adapter.method == "realcustom"
        who = adapters.extract(adapter, pair(), torch.rand(1, 128, 128, 3), "concat", "s")
        positive, word, _ = encode_prompt(own.clip, CAPTIONS[0], "cat")
        negative = own.clip.encode_from_tokens_scheduled(own.clip.tokenize(""))
        done = inject(own.model, positive, negative, who, word, Strengths(0.0, 1.0))
        out = sample(done.model, done.positive, done.negative)
        assert torch.isfinite(out).all() and not torch.equal(out, sample(own.model, positive, negative))


def test_a_network_in_half_precision_gives_the_same_gradient(monkeypatch):
    host = loaded("sd15")
    own = training_base.CheckpointBase(host.model, host.clip, host.vae, pair())
    config = config_of(own.width, own.layers, [item.config for item in own.encoders.items], 64)
    task = RealCustomTask(own, config, TrainConfig(), checkpoint_encode(own, config), 128, ["", ""], own.residual_blocks)
    for name, value in task.adapter.named_parameters():
        if name.endswith(".v.weight"):
            value.data.copy_(draw(9, *value.shape) / 8)
    assert 0 < far_from_half(own, task, 128, monkeypatch) < 0.01


def test_encoders_that_do_not_go_side_by_side_are_refused():
    vit = training_base.load_vit(*files.load(files_of_encoders()[0]))[1]
    for wrong in (vit._replace(patch=14), vit._replace(width=100)):
        with pytest.raises(LikenessError, match="equal patches and widths"):
            config_of(128, (), [vit, wrong], 64)
