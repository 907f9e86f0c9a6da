"""Checkpoints of the host as a frozen base for the training engine, and the file that comes out in an injector."""
from __future__ import annotations

import copy
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness import mini, tiny
from host.support import adapter_state, by_hand, comfy, draw, folder, miniature, sample
from host.support import base as support_base
from likeness.models.common import files
from likeness.models.common.errors import LikenessError
from likeness.models.custany.config import CustAnyConfig, sd15_layers, sdxl_layers, to_metadata
from likeness.models.custany.layers import replace_word
from likeness.models.hosting import adapters, encoders, training_base
from likeness.models.hosting.half_gradients import HalfGradients
from likeness.models.hosting.inject import Strengths, inject
from likeness.models.hosting.prompt import encode_prompt
from likeness.models.training.base import Batch
from likeness.models.training.config import TrainConfig
from likeness.models.training.custany import CustAnyTask
from likeness.models.training.loop import train

CAPTIONS = ["a cat on the beach", "a photo of a dog in the snow"]
WORDS = ["cat", "dog"]


@cache
def encoder_files():
    return [miniature() / name for name in (mini.DINO, mini.MAE)]


@cache
def loaded(kind: str) -> training_base.CheckpointBase:
    """Loaded as the trainer does it: outside of inference mode."""
    tiny.register()
    return training_base.load_checkpoint_base(tiny.ensure()[f"tiny_{kind}.safetensors"], encoder_files())


class Source:
    def batch(self, n: int, generator: torch.Generator) -> Batch:
        pictures = torch.rand(n, 3, 64, 64, generator=generator)
        return Batch(pictures, pictures.flip(-1), None, CAPTIONS[:n], WORDS[:n])


def shrunk(base: training_base.CheckpointBase) -> CustAnyConfig:
    """The preset with heads that fit the tiny layers."""
    return training_base.preset_for(base)._replace(head_dim=16)


@pytest.mark.parametrize(("kind", "width", "blocks"), [("sd15", 64, 9), ("sdxl", 160, 36)])
def test_what_the_engine_sees(kind, width, blocks):
    base = loaded(kind)
    assert base.width == width and base.embed_width == 48
    ups = [key for key, _ in base.layers if key.startswith("output.")]
    assert len(ups) == blocks and dict(base.layers)["output.3.0"] == (128 if kind == "sd15" else 64)
    config = training_base.preset_for(base)
    assert config.width == width and config.base == "custom" and [key for key, _ in config.layers] == ups
    rows, first, count = base.encode_text([*CAPTIONS, "nothing here", "x " * 90 + "cat"], [*WORDS, "cat", "cat"])
    assert rows.shape == (4, 77, width) and first.tolist() == [2, 5, -1, -1] and count.tolist() == [1, 1, 0, 0]
    assert torch.allclose(rows[0], base.clip.encode_from_tokens(base.clip.tokenize(CAPTIONS[0])), atol=1e-6)
    latents = base.encode_image(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert latents.shape == (2, 4, 8, 8) and not latents.requires_grad
    features = base.features(torch.rand(2, 3, 64, 64))
    assert [tuple(t.shape) for pair in features for t in pair] == [(2, 48), (2, 64, 48)] * 2
    assert base.embed_image(torch.rand(2, 3, 64, 64)).shape == (2, 48)
    _, first, count = base.encode_text(["a teddy bear and a teddy bear"], ["teddy bear"])
    assert first.tolist() == [2] and count.tolist() == [2]
    assert base.encode_text(["", "a cat"], ["", ""])[1].tolist() == [-1, -1]


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_captions_are_read_letter_by_letter(kind):
    """Brackets and names of embeddings are text (a prompt says it with backslashes), and words are found among them."""
    base = loaded(kind)
    plain = {"a (black) cat on a sofa": r"a \(black\) cat on a sofa", "a ((cat:1.4)) here": r"a \(\(cat:1.4\)\) here",
             "a cat, (1) x": r"a cat, \(1\) x", "embedding:one a cat": "embedding : one a cat",
             "a embedding:two cat": "a embedding : two cat"}
    rows, first, count = base.encode_text(list(plain), ["cat"] * len(plain))
    for row, prompt in zip(rows, plain.values(), strict=True):
        assert torch.allclose(row[None], base.clip.encode_from_tokens(base.clip.tokenize(prompt)), atol=1e-6)
    assert first.tolist() == [5, 3, 2, 6, 6] and count.tolist() == [1] * len(plain)
    assert base.encode_text(["a cat (black) here"], ["cat (black)"])[2].tolist() == [4]


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("prediction", ["EPS", "V_PREDICTION", "V_PREDICTION_EDM", "EDM"])
def test_denoise_is_the_hosts_own_prediction(kind, prediction, monkeypatch):
    """apply_model gives the denoised latent; the network's output is read back from it."""
    base = loaded(kind)
    model, model_type = base.model.model, comfy.model_base.ModelType[prediction]
    width = 0.5 if prediction == "EDM" else 1.0  # Playground 2.5 has EDM's own sigma_data
    monkeypatch.setattr(model.model_config, "sampling_settings", {"sigma_data": width})
    sampling = comfy.model_base.model_sampling(model.model_config, model_type)
    monkeypatch.setattr(model, "model_type", model_type)
    monkeypatch.setitem(model._modules, "model_sampling", sampling)
    monkeypatch.setattr(base, "sampling", sampling)
    clean, noise = draw(1, 2, 4, 8, 8), draw(2, 2, 4, 8, 8)
    t = torch.tensor([400 if prediction.endswith("EDM") else 100, 800])
    x_t, target, weight = base.noised(clean, t, noise)
    assert weight is None
    sigma = base.sampling.sigmas[t]
    assert torch.allclose(x_t, base.sampling.noise_scaling(sigma.view(-1, 1, 1, 1), noise, clean), atol=1e-5)
    # The right answer must be denoised to the clean latent by the host.
    shaped = sigma.view(-1, 1, 1, 1)
    assert torch.allclose(base.sampling.calculate_denoised(sigma, target, x_t), clean, atol=1e-3)
    whole = (shaped ** 2 + width ** 2) ** 0.5
    published = {"EPS": noise, "EDM": (shaped * clean - width ** 2 * noise) / (width * whole)}
    torch.testing.assert_close(target, published.get(prediction, (noise - shaped * clean) / whole), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        rows, _, _ = base.encode_text(CAPTIONS, WORDS)
        got = base.denoise(x_t, t, rows)
        more = {}
        if kind == "sdxl":
            pooled = torch.cat([base.clip.encode_from_tokens(base.clip.tokenize(c), return_pooled=True)[1] for c in CAPTIONS])
            more["y"] = base.model.model.encode_adm(pooled_output=pooled, width=64, height=64, device=torch.device("cpu"))
        denoised = base.model.model.apply_model(x_t, sigma, c_crossattn=rows, transformer_options={}, **more)
    if prediction == "EPS":
        expected = (x_t - denoised) / shaped
    else:
        expected = (x_t * (width / whole) ** 2 - denoised) * whole / (shaped * (-width if prediction == "EDM" else width))
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max() + 1e-5
    assert got.std() > 0.05


def test_the_middle_of_every_block_is_called():
    base = loaded("sd15")
    called: list[tuple[str, tuple]] = []

    def middle(key: str, x: torch.Tensor) -> torch.Tensor:
        called.append((key, tuple(x.shape)))
        return x
    with torch.no_grad():
        rows, _, _ = base.encode_text(CAPTIONS, WORDS)
        base.denoise(draw(1, 2, 4, 8, 8), torch.tensor([5, 900]), rows, middle)
    assert [(key, shape[2]) for key, shape in called] == list(base.layers)


def test_the_base_is_frozen_on_any_host():
    base = loaded("sd15")
    base.unet.requires_grad_(True)  # as 0.18.2 leaves it
    again = training_base.CheckpointBase(base.model, base.clip, base.vae, base.encoders)
    assert not any(parameter.requires_grad for parameter in again.unet.parameters())



@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_two_steps_of_training_and_the_file_in_an_injector(kind, tmp_path):
    base = loaded(kind)
    config = shrunk(base)
    if kind == "sdxl":
        config = config._replace(layers=tuple(pair for pair in config.layers if pair[0].endswith(".0")))
    settings = TrainConfig(steps=2, batch=2, lr=1e-2, warmup=0, save_every=5, ema=0.5, csv_every=1, seed=3, drop_text=0.0,
                           drop_reference=0.0, drop_both=0.0)
    task = CustAnyTask(base, config, settings)
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    start = {name: value.clone() for name, value in task.adapter.state_dict().items()}
    rows: list[dict[str, Any]] = []
    result = train(task, settings, Source(), tmp_path, log=rows.append)
    assert result.finished and len(rows) == 2
    assert all(torch.isfinite(torch.tensor(row[name])) for row in rows for name in ("total", "normal", "decouple", "contrast"))
    assert all(torch.equal(value, before[name]) for name, value in base.unet.state_dict().items())
    assert not any(p.grad is not None for p in base.unet.parameters()), "gradients of frozen weights take memory for nothing"
    assert not any(p.grad is not None for p in base.clip.cond_stage_model.parameters())
    moved = {name for name, value in task.adapter.state_dict().items() if not torch.equal(value, start[name])}
    assert {"global_mlp.out.weight", "local_mlp.out.weight"} <= moved and any(name.endswith("to_out.weight") for name in moved)

    with torch.inference_mode():
        adapter = adapters.load_adapter(result.path)
        assert adapter.config == config
        pair = encoders.Encoders(tuple(encoders.load_encoder(path) for path in encoder_files()))
        who = adapters.extract(adapter, pair, torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1)), "concat", "s")
        positive, word, _ = encode_prompt(base.clip, CAPTIONS[0], "cat")
        negative = base.clip.encode_from_tokens_scheduled(base.clip.tokenize(""))
        done = inject(base.model, positive, negative, who, word, Strengths(1.0, 1.0))
        out = sample(done.model, done.positive, done.negative)
        assert torch.isfinite(out).all() and not torch.equal(out, sample(base.model, positive, negative))


def test_training_and_use_are_one_network():
    """The loop's own middle and word, with the weights of a file, against what the injector makes of that file."""
    base = loaded("sd15")
    config = shrunk(base)
    task = CustAnyTask(base, config, TrainConfig(decouple="off"))
    task.adapter.load_state_dict(adapter_state(config))
    pictures = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    x, t = draw(3, 1, 4, 8, 8) * 5, torch.tensor([600])
    sigma = base.sampling.sigmas[t]
    with torch.no_grad():
        rows, first, count = base.encode_text(CAPTIONS[:1], WORDS[:1])
        tokens, local = task.adapter.encode(task._features(Batch(pictures, None, None, CAPTIONS[:1], WORDS[:1])))
        delta = task.adapter.word_delta(tokens, rows[:, first[0]])
        fused = replace_word(rows, first, count, delta)
        kv = {key: task.adapter.keys_values(key, local) for key in task.keys}
        trained = base.denoise(x, t, fused, task._middle(kv, torch.ones(1, 1, 1)))
        plain = base.denoise(x, t, rows)
    with torch.inference_mode():
        made = adapters.make_adapter(task.adapter.state_dict(), to_metadata(config), "hash", "name")
        pair = encoders.Encoders(tuple(encoders.load_encoder(path) for path in encoder_files()))
        who = adapters.extract(made, pair, pictures.movedim(1, -1), "concat", "s")
        positive, word, _ = encode_prompt(base.clip, CAPTIONS[0], "cat")
        done = inject(base.model, positive, [], who, word, Strengths(1.0, 1.0))
        assert torch.allclose(done.positive[0][0], fused, atol=1e-5)
        seen = {}

        def note(apply_model, args):
            seen["out"] = apply_model(x, sigma, **args["c"])
            return seen["out"]
        model = done.model.clone()
        model.set_model_unet_function_wrapper(note)
        sample(model, done.positive, done.positive, cfg=1.0)
    used = (x - seen["out"]) / sigma.view(-1, 1, 1, 1)
    assert (used - trained).abs().max() < 1e-4 * trained.abs().max()
    assert (trained - plain).abs().max() > 1e-2 * trained.abs().max()
    key = config.layers[0][0]
    hand = by_hand(made, key, draw(5, 1, 4, 128), who.get("local"))
    assert torch.allclose(task.adapter.local(key, draw(5, 1, 4, 128), *kv[key]), hand, atol=1e-4)


def test_bases_that_cannot_be_trained():
    with pytest.raises(LikenessError, match="does not exist"):
        training_base.load_checkpoint_base(folder() / "gone.safetensors", encoder_files())
    tiny.register()
    with pytest.raises(LikenessError, match="SD1.5 or SDXL"):
        training_base.load_checkpoint_base(tiny.ensure()["tiny_sd3.safetensors"], encoder_files())
    with pytest.raises(LikenessError, match="no checkpoint"):
        training_base.load_checkpoint_base(miniature() / mini.DINO, encoder_files())


def far_from_half(base: training_base.CheckpointBase, task: Any, side: int, monkeypatch: Any) -> float:
    """How far a step's whole gradient with the network in float16 is from the one in float32, as a share; the loss is as small
    as the mean over four SDXL latents makes it."""
    pictures = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    batch = Batch(pictures, pictures.flip(-1), draw(1, 2, 4, 8, 8), CAPTIONS, WORDS)
    small, noised = batch.latents.numel() / (4 * 4 * 128 * 128), base.noised

    def gradient() -> torch.Tensor:
        task.step(batch, torch.Generator().manual_seed(1))
        parts = [p.grad.flatten() for module in task.modules().values() for p in module.parameters() if p.grad is not None]
        for module in task.modules().values():
            module.zero_grad()
        return torch.cat(parts)
    monkeypatch.setattr(base, "noised", lambda *args: (*noised(*args)[:2], torch.tensor(small)))
    whole = gradient()
    monkeypatch.setattr(base, "unet", copy.deepcopy(base.unet).half())
    monkeypatch.setattr(base.model.model, "manual_cast_dtype", torch.float16)
    return float((gradient() - whole).norm() / whole.norm())


@pytest.mark.parametrize("decouple", ["off", "channel"])
def test_a_network_in_half_precision_gives_the_same_gradient(decouple, monkeypatch):
    base = loaded("sd15")
    task = CustAnyTask(base, shrunk(base), TrainConfig(decouple=decouple, drop_text=0.0, drop_reference=0.0, drop_both=0.0,
                                                       weight_contrast=1e-4))
    task.adapter.load_state_dict(adapter_state(shrunk(base)))
    assert 0 < far_from_half(base, task, 64, monkeypatch) < 0.01


@pytest.mark.parametrize("loss", [0.0, 1e-42])
def test_the_factor_of_a_vanished_gradient_is_finite(loss):
    half = HalfGradients()
    rows = draw(1, 1, 3, 4).requires_grad_()
    (half.end(half.into(rows)) * loss).sum().backward()
    assert torch.equal(rows.grad, torch.zeros_like(rows))


def test_kinds_that_cannot_be_trained(monkeypatch):
    base = loaded("sd15")
    parts = (base.model, base.clip, base.vae, base.encoders)
    with monkeypatch.context() as patch, pytest.raises(LikenessError, match="inpainting or editing: it reads 9 channels"):
        patch.setattr(base.unet, "in_channels", 9)
        training_base.CheckpointBase(*parts)
    for kind in ("FLOW", "IMG_TO_IMG", "STABLE_CASCADE"):
        with monkeypatch.context() as patch, pytest.raises(LikenessError, match=f"of the host's kind {kind}"):
            patch.setattr(base.model.model, "model_type", comfy.model_base.ModelType[kind])
            training_base.CheckpointBase(*parts)


@pytest.mark.parametrize(("width", "layers", "family"), [
    (768, sd15_layers(), "sd15"), (2048, sdxl_layers(), "sdxl"), (1024, sd15_layers(), "custom"), (768, sdxl_layers(), "custom")])
def test_the_preset_goes_by_blocks_and_text(width, layers, family):
    """SD2 has the blocks of SD1.5, and reads another text."""
    config = training_base.preset_for(SimpleNamespace(width=width, layers=layers, encoders=loaded("sd15").encoders))
    assert (config.base, config.width, config.layers) == (family, width, layers)


def test_the_miniature_as_a_base():
    """Its plain torch layers and the host's object are one network."""
    base = training_base.MiniatureBase(miniature() / mini.BASE, encoder_files())
    model, clip, _ = support_base("mini")
    comfy.model_management.load_models_gpu([model])  # a clone with a LoRA may have left its weights in the shared network
    with torch.no_grad():
        rows, first, count = base.encode_text(["a cat on beach", "a dog"], ["cat", "cat"])
        assert first.tolist() == [2, -1] and count.tolist() == [1, 0]
        clean, noise, t = draw(1, 2, 48, 8, 8), draw(2, 2, 48, 8, 8), torch.tensor([100, 800])
        x, target, weight = base.noised(clean, t, noise)
        assert weight.numel() == 48
        got = base.denoise(x, t, rows)
        sampling = model.get_model_object("model_sampling")
        sigma = sampling.sigmas[t].view(-1, 1, 1, 1)
        host_x = clean + sigma * noise
        denoised = model.model.apply_model(host_x, sigma.flatten(), c_crossattn=rows, transformer_options={})
    expected = (host_x / (sigma ** 2 + 1) - denoised) * (sigma ** 2 + 1) ** 0.5 / sigma
    assert (got - expected).abs().max() < 1e-3 * expected.abs().max()
    host_rows = clip.encode_from_tokens_scheduled(clip.tokenize("a cat on beach"))[0][0]
    assert torch.allclose(host_rows, rows[:1], atol=5e-3), "fp16 rounding of the host's text encoder is all that may differ"


def test_the_network_is_made_ready_for_every_step(monkeypatch):
    """The text encoder, the encoders and the first stage run between two steps and may have pushed it out."""
    base = loaded("sd15")
    asked: list[tuple[list, int]] = []
    real = training_base.ready
    monkeypatch.setattr(training_base, "ready", lambda models, memory: asked.append((models, memory)) or real(models, memory))
    rows, _, _ = base.encode_text(CAPTIONS, WORDS)
    comfy.model_management.unload_all_models()
    with torch.no_grad():
        for side, batch in ((8, 1), (8, 2), (16, 2)):
            base.denoise(draw(1, batch, 4, side, side), torch.tensor([5] * batch), rows[:batch])
    assert [models for models, _ in asked] == [[base.model]] * 3
    one, two, large = (memory for _, memory in asked)
    assert two == 2 * one and 3.5 * two < large <= 4 * two


def test_activations_of_the_real_sizes():
    """SD1.5 at 512 and SDXL at 1024 in half precision, the way up alone: grids halve where channels double."""
    need = training_base.activation_bytes(sd15_layers(), 320, (1, 4, 64, 64), torch.float16)
    assert 0.4 < need / 2 ** 30 < 1
    up = [(f"output.{block}.{index}", channels) for block in range(6) for channels, depth in
          ((1280, 10) if block < 3 else (640, 2),) for index in range(depth)]
    assert 4 < training_base.activation_bytes(up, 320, (1, 4, 128, 128), torch.float16) / 2 ** 30 < 6


def test_lessons_of_other_weights_are_drawn_anew(tmp_path, monkeypatch):
    """Kept features belong to one base and its encoders; half a file left by a kill is no file."""
    from likeness.models.demo import lessons
    from likeness.nodes import training_miniature
    weights = tmp_path / "weights"
    weights.mkdir()
    for target, name in (("base", mini.BASE), ("dino", mini.DINO), ("mae", mini.MAE)):
        (weights / f"{target}.safetensors").write_bytes((miniature() / name).read_bytes())
    drawn, real = [], lessons.prepare
    monkeypatch.setattr(lessons, "prepare", lambda *args: drawn.append(args[0]) or real(*args))

    def run(out: str, **settings: Any) -> list[str]:
        training_miniature.train_miniature(tmp_path / out, weights, "test", **{"pairs": 4, "steps": 1, "batch": 2, **settings})
        return sorted(path.name for path in (tmp_path / out).glob("lessons_*"))
    first = run("one")
    assert len(first) == 1 and first[0].endswith(".pt") and drawn == [4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "weights"], "nothing lies beside the folder of the run"
    (tmp_path / "one" / f"{first[0]}.part").write_bytes(b"half")
    run("one", steps=2)
    assert drawn == [4]
    (tmp_path / "one" / f"{first[0]}.part").unlink()
    state, metadata = files.load(weights / "mae.safetensors")
    files.save(weights / "mae.safetensors", {key: value + 0.01 for key, value in state.items()}, metadata)
    run("two")
    assert drawn == [4, 4] and run("two", steps=2) != first

    def killed(value: Any, path: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", killed)
        run("three")
    assert [path.name.endswith(".part") for path in (tmp_path / "three").glob("lessons_*")] == [True]
    run("three")
    assert drawn == [4] * 4


def test_parts_of_the_miniature_are_kept_by_their_recipe(tmp_path):
    from likeness.models.demo.recipe import Recipe
    recipe, made = Recipe(tmp_path, tmp_path, "test", lambda _: None), []

    def make() -> torch.nn.Module:
        made.append(1)
        return torch.nn.Linear(2, 2)
    module, _ = recipe._kept("part", torch.nn.Linear(2, 2), make, 100)
    again, _ = recipe._kept("part", torch.nn.Linear(2, 2), make, 100)
    assert len(made) == 1 and torch.equal(module.weight, again.weight)
    recipe._kept("part", torch.nn.Linear(2, 2), make, 200)
    assert len(made) == 2 and not list(tmp_path.glob("*.part"))
