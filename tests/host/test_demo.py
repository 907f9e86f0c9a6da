"""The miniature as MODEL, CLIP and VAE: stock nodes and samplers cannot tell it from any other model."""
from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from harness import mini
from host.support import (
    base,
    comfy,
    comfy_extras,
    core,
    draw,
    encode,
    folder,
    injected,
    latent_of,
    latent_preview,
    miniature,
    sample,
)
from likeness.models.common.errors import LikenessError
from likeness.models.common.files import load
from likeness.models.demo import schedule
from likeness.models.demo.captions import row_ids
from likeness.models.demo.first_stage import CHANNELS, PATCH, FirstStage
from likeness.models.demo.text import TextModel
from likeness.models.hosting import demo

PICTURE = (1, 64, 80, 3)


@pytest.fixture(autouse=True)
def _as_a_node():
    with torch.inference_mode():
        yield


def part(name: str) -> dict[str, torch.Tensor]:
    """Rounded as the shipped file and the host's text encoders are, so that equal means equal."""
    state, _ = load(miniature() / mini.BASE)
    if name == "text":
        state = {key: value.half() for key, value in state.items()}
    return {key[len(name) + 1:]: value.float() for key, value in state.items() if key.startswith(name + ".")}


def stage() -> FirstStage:
    module = FirstStage()
    module.load_state_dict(part("first_stage"))
    return module.eval()


@pytest.mark.parametrize("text", [
    "a photo of a cat on beach, left", "a lovely big red and blue striped dog with a pink scarf in snow", "",
    "a (cat:1.0) at night"])
def test_the_text_encoder_is_the_one_of_training(text):
    """CLIP's tokenizer, the expanded table and the host's transformer against the small net that was trained."""
    model = TextModel()
    model.load_state_dict(part("text"))
    rows = encode("mini", text)[0][0]
    expected = model(row_ids([text.replace("(", "").replace(":1.0)", "")]))
    assert rows.shape == expected.shape == (1, 32, 128)
    assert torch.allclose(rows.float(), expected, atol=5e-6), float((rows - expected).abs().max())


def test_tokens_beyond_this_world_read_the_unknown_row():
    table = base("mini")[1].cond_stage_model.clip_l.transformer.get_input_embeddings().weight
    small = part("text")["text_model.embeddings.token_embedding.weight"]
    assert table.shape == (49408, 128)
    assert torch.equal(table[5000].float(), small[0]) and torch.equal(table[49407].float(), small[2])
    assert torch.equal(table[2368].float(), small[row_ids(["cat"])[0, 1]])


def test_the_hosts_registry_of_models_is_untouched():
    before = list(comfy.supported_models.models)
    formats = dir(comfy.latent_formats)
    demo.load_base(path=miniature() / mini.BASE)
    assert comfy.supported_models.models == before and dir(comfy.latent_formats) == formats
    assert not any("demo" in model.__name__.lower() for model in comfy.supported_models.models)


def test_missing_and_damaged_weights(tmp_path):
    with pytest.raises(LikenessError, match="missing from this copy"):
        demo.load_base(path=tmp_path / "base.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((miniature() / mini.BASE).read_bytes()[:5000])
    with pytest.raises(LikenessError, match="cut off"):
        demo.load_base(path=cut)


# -- first stage ---------------------------------------------------------------------------------------
def picture() -> torch.Tensor:
    small = draw(5, 1, 3, 8, 10)
    return torch.nn.functional.interpolate(small, PICTURE[1:3], mode="bicubic").clamp(-1, 1).movedim(1, -1) / 2 + 0.5


def test_vae_encode_and_decode_are_the_first_stage():
    vae, pixels = base("mini")[2], picture()
    latent = core.VAEEncode().encode(vae, pixels)[0]["samples"]
    assert latent.shape == (1, CHANNELS, 8, 10)
    assert torch.allclose(latent, stage().encode(pixels.movedim(-1, 1) * 2 - 1), atol=1e-4)
    out = core.VAEDecode().decode(vae, {"samples": latent})[0]
    expected = (stage().decode(latent) / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    assert out.shape == PICTURE and torch.allclose(out, expected, atol=1e-4)
    assert vae.spacial_compression_decode() == PATCH and vae.latent_channels == CHANNELS


def test_odd_pictures_and_batches():
    vae = base("mini")[2]
    pixels = torch.rand(3, 61, 47, 3, generator=torch.Generator().manual_seed(0))
    assert vae.encode(pixels).shape == (3, CHANNELS, 7, 5)
    assert vae.decode(draw(1, 3, CHANNELS, 7, 5)).shape == (3, 56, 40, 3)


def test_tiled_decode_and_encode():
    """Tiles are blended, so a border of a few pixels may differ: the refiner sees no further than that."""
    vae = base("mini")[2]
    latent = draw(2, 1, CHANNELS, 20, 24)
    whole = vae.decode(latent)
    tiled = core.VAEDecodeTiled().decode(vae, {"samples": latent}, 64, 16)[0]
    assert tiled.shape == whole.shape and torch.isfinite(tiled).all()
    assert (tiled - whole).abs().mean() < 0.02 and (tiled - whole).abs().mean() < 0.1 * whole.std()
    pixels = torch.rand(1, 160, 192, 3, generator=torch.Generator().manual_seed(0))
    latent = core.VAEEncodeTiled().encode(vae, pixels, 64, 16)[0]["samples"]
    assert torch.allclose(latent, vae.encode(pixels), atol=1e-3), "the PCA has no border at all"


def test_preview_colours_are_the_means_of_the_decoded_patches():
    """The host's own previewer, with our factors, gives the mean colour of every 8 x 8 patch of the PCA's picture."""
    latents = base("mini")[0].model.latent_format
    previewer = latent_preview.Latent2RGBPreviewer(latents.latent_rgb_factors, latents.latent_rgb_factors_bias)
    latent = stage().encode(picture().movedim(-1, 1) * 2 - 1)
    linear = stage().linear(latent).clamp(-1, 1)
    mean = torch.nn.functional.avg_pool2d(linear, PATCH)[0].movedim(0, -1)
    seen = previewer.decode_latent_to_preview(latent)
    assert seen.size == (10, 8)
    got = torch.frombuffer(bytearray(seen.tobytes()), dtype=torch.uint8).reshape(8, 10, 3).float() / 255 * 2 - 1
    assert (got - mean).abs().max() < 0.03 and got.std() > 0.1


def test_core_finds_the_previewer(monkeypatch):
    monkeypatch.setattr(latent_preview.args, "preview_method", latent_preview.LatentPreviewMethod.Latent2RGB)
    previewer = latent_preview.get_previewer(torch.device("cpu"), base("mini")[0].model.latent_format)
    kind, image, _ = previewer.decode_latent_to_preview_image("JPEG", draw(1, 2, CHANNELS, 8, 8))
    assert kind == "JPEG" and image.size == (8, 8) and image.mode == "RGB"


# -- model ---------------------------------------------------------------------------------------------
def test_the_noise_schedule_is_the_one_of_training():
    model = base("mini")[0]
    sampling = model.get_model_object("model_sampling")
    alphas = schedule.alphas_cumprod()
    assert torch.allclose(sampling.sigmas, ((1 - alphas) / alphas).sqrt(), rtol=1e-4)
    assert model.model.model_type.name == "V_PREDICTION"
    # core's denoised picture against the one that training's v means
    clean, noise, t = draw(1, 1, CHANNELS, 4, 4), draw(2, 1, CHANNELS, 4, 4), torch.tensor([600])
    x, v = schedule.noised(clean, t, noise)
    sigma = sampling.sigmas[t]
    host_x = sampling.noise_scaling(sigma, noise, clean)
    assert torch.allclose(sampling.calculate_input(sigma, host_x), x, atol=1e-4)
    assert torch.allclose(sampling.calculate_denoised(sigma, v, host_x), clean, atol=1e-3)
    assert sampling.timestep(sigma).item() == pytest.approx(600, abs=0.01)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "ddim", "lcm", "heun", "uni_pc", "dpmpp_2m_sde"])
@pytest.mark.parametrize("scheduler", ["normal", "karras"])
def test_samplers(sampler, scheduler):
    positive, negative = encode("mini", "a cat on beach"), encode("mini", "")
    out = sample(base("mini")[0], positive, negative, kind="mini", sampler=sampler, scheduler=scheduler, steps=3)
    assert out.shape == (1, CHANNELS, 8, 8) and torch.isfinite(out).all() and out.std() > 0.05


def test_ksampler_node_with_the_empty_latent_of_core():
    """EmptyLatentImage makes four channels; core mends empty latents by itself. Half denoise keeps the picture."""
    model = base("mini")[0]
    positive, negative = encode("mini", "a cat on beach"), encode("mini", "")
    empty = core.EmptyLatentImage().generate(64, 64, 2)[0]
    assert empty["samples"].shape[1] == 4
    out = core.KSampler().sample(model, 3, 2, 4.0, "euler", "normal", positive, negative, empty)[0]["samples"]
    assert out.shape == (2, CHANNELS, 8, 8) and not torch.equal(out[0], out[1])
    start = {"samples": out[:1]}
    half = core.KSampler().sample(model, 3, 2, 4.0, "euler", "normal", positive, negative, start, denoise=0.5)[0]["samples"]
    assert half.shape == out[:1].shape and torch.isfinite(half).all() and not torch.equal(half, out[:1])
    done = injected("mini")
    again = core.KSampler().sample(done.model, 3, 2, 4.0, "euler", "normal", done.positive, done.negative, empty)[0]
    assert torch.isfinite(again["samples"]).all() and not torch.equal(again["samples"], out)


def test_lora_on_model_and_clip():
    """Names as kohya writes them; the miniature's modules have the host's names, so the host finds all of them."""
    model, clip, _ = base("mini")
    weights = {}

    def low_rank(name: str, shape: tuple[int, int], seed: int) -> None:
        weights[f"{name}.lora_up.weight"] = draw(seed, shape[0], 2)
        weights[f"{name}.lora_down.weight"] = draw(seed + 1, 2, shape[1]) / 4
        weights[f"{name}.alpha"] = torch.tensor(2.0)
    unet = [key for key, value in model.model.diffusion_model.state_dict().items() if key.endswith("attn2.to_k.weight")]
    for seed, key in enumerate(unet):
        low_rank(f"lora_unet_{key[:-len('.weight')].replace('.', '_')}", (96, 128), seed)
    for layer in range(2):
        low_rank(f"lora_te_text_model_encoder_layers_{layer}_self_attn_q_proj", (128, 128), 50 + layer)
    new_model, new_clip = comfy.sd.load_lora_for_models(model, clip, weights, 1.0, 1.0)
    assert len(unet) == 7 and len(new_model.patches) == 7 and len(new_clip.patcher.patches) == 2
    text = new_clip.encode_from_tokens_scheduled(new_clip.tokenize("a cat on beach"))
    plain, negative = encode("mini", "a cat on beach"), encode("mini", "")
    assert not torch.allclose(text[0][0], plain[0][0], atol=1e-3)
    before = sample(model, plain, negative, kind="mini")
    assert not torch.equal(sample(new_model, plain, negative, kind="mini"), before)
    assert torch.equal(sample(model, plain, negative, kind="mini"), before)


def test_clip_set_last_layer():
    clip = base("mini")[1]
    skipped = core.CLIPSetLastLayer().set_last_layer(clip, -2)[0]
    rows = skipped.encode_from_tokens_scheduled(skipped.tokenize("a cat"))[0][0]
    assert rows.shape == (1, 32, 128) and not torch.allclose(rows, encode("mini", "a cat")[0][0], atol=1e-3)
    same = core.CLIPSetLastLayer().set_last_layer(clip, -1)[0]
    assert torch.equal(same.encode_from_tokens_scheduled(same.tokenize("a cat"))[0][0], encode("mini", "a cat")[0][0])


def test_model_save_and_checkpoint_save(tmp_path, monkeypatch):
    model, clip, vae = base("mini")
    saver = comfy_extras.nodes_model_merging.ModelSave()
    saver.output_dir = str(tmp_path)
    saver.save(model, "m/mini")
    path = next((tmp_path / "m").glob("*.safetensors"))
    state = load_file(path)
    for key, value in part("unet").items():
        name = next(k for k in (f"model.diffusion_model.{key}", key) if k in state)
        assert torch.equal(state[name].float(), value), key
    saver = comfy_extras.nodes_model_merging.CheckpointSave()
    saver.output_dir = str(tmp_path)
    saver.save(model, clip, vae, "c/mini")
    state = load_file(next((tmp_path / "c").glob("*.safetensors")))
    heads = {key.split(".")[0] for key in state}
    assert {"model", "cond_stage_model", "first_stage_model"} <= heads
    assert torch.equal(state["first_stage_model.basis"].float(), part("first_stage")["basis"])
    table = next(value for key, value in state.items() if key.endswith("token_embedding.weight"))
    assert table.shape == (49408, 128)


def test_a_lora_on_the_saved_model_is_baked_in(tmp_path):
    model = base("mini")[0].clone()
    key = "diffusion_model.input_blocks.0.0.weight"
    model.add_patches({key: (torch.ones(96, 48, 3, 3),)}, 0.5)
    saver = comfy_extras.nodes_model_merging.ModelSave()
    saver.output_dir = str(tmp_path)
    saver.save(model, "mini")
    state = load_file(next(tmp_path.glob("*.safetensors")))
    saved = state[f"model.{key}"].float()
    assert torch.allclose(saved, part("unet")[key.split(".", 1)[1]] + 0.5, atol=1e-5)


def test_latents_are_not_scaled():
    latents = base("mini")[0].model.latent_format
    x = draw(1, 1, CHANNELS, 2, 2)
    assert torch.equal(latents.process_in(x), x) and torch.equal(latents.process_out(x), x)
    assert latents.latent_channels == CHANNELS == latent_of("mini").shape[1] and folder().is_dir()


def test_shipped_method_names(monkeypatch):
    """Adapter and encoders of a method, from their files; a missing file is named."""
    monkeypatch.setattr(demo, "WEIGHTS", miniature())
    adapter, encoders = demo.load_method("CustAny")
    assert adapter.method == "custany" and adapter.config.base == "miniature"
    assert [(item.config.family, item.config.width) for item in encoders.items] == list(adapter.config.encoders)
    monkeypatch.setattr(demo, "WEIGHTS", miniature() / "nowhere")
    with pytest.raises(LikenessError, match="custany.safetensors are missing"):
        demo.load_method("CustAny")
