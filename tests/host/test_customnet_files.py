"""The authors' file as it is: told by its keys, loaded whole, refused when it is another, saved in half precision."""
from __future__ import annotations

import math
import shutil

import pytest
import torch

from harness import tiny
from host import customnet_files as cf
from host.support import comfy
from likeness.models.common import files
from likeness.models.common.errors import LikenessError
from likeness.models.customnet import config
from likeness.models.customnet.pixels import pixel_values
from likeness.models.hosting import customnet
from likeness.models.hosting.customnet_model import CustomNetConfig
from likeness.models.hosting.customnet_unet import DualUNet, renamed
from likeness.models.hosting.customnet_vision import clip_config, embed_reference
from unit.test_customnet import shapes


@pytest.fixture(autouse=True)
def _as_a_node():
    with torch.inference_mode():
        yield


def picture_of(loaded: customnet.Loaded) -> torch.Tensor:
    """Two steps with one file."""
    tokens = loaded.clip.tokenize("on the beach")
    entries = loaded.clip.encode_from_tokens_scheduled(tokens)
    done = cf.view.condition(entries, entries, loaded.vision, loaded.vae, cf.reference(),
                             cf.View((30.0,), (0.0,), (0.0,)), cf.BOXES, 64, 64)
    return cf.run(done, loaded.model)


@pytest.mark.parametrize("name, count", (("customnet", 878701764), ("customnet_inpaint", 878713284)))
def test_both_manifests_build_with_nothing_missing_or_unexpected(name, count):
    """On the meta device: names and shapes of all four parts, as the public files have them."""
    found = {key: torch.empty(shape, device="meta") for key, shape in shapes(name).items() if config.wanted(key)}
    unet_config = comfy.model_detection.detect_unet_config(found, config.UNET)
    unet_config.pop("num_head_channels", None)
    own = CustomNetConfig(unet_config)
    network = DualUNet(**own.unet_config, dtype=torch.float32, device="meta")
    assert sum(p.numel() for p in network.parameters()) == count
    assert network.middle_block[1].transformer_blocks[0].attn2.heads == 8

    def part(prefix):
        return {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}

    def check(module, state):
        want = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        assert {key: tuple(value.shape) for key, value in state.items()} == want
    check(network, renamed(part(config.UNET)))
    tower = comfy.clip_vision.convert_to_transformers(part(config.VISION), "")
    settings = clip_config(tower)
    assert (settings["num_hidden_layers"], settings["num_attention_heads"], settings["image_size"]) == (24, 16, 224)
    check(comfy.clip_model.CLIPVisionModelProjection(settings, torch.float32, "meta", comfy.ops.manual_cast), tower)
    text = part(config.TEXT)
    sizes = customnet.text_sizes(text)
    assert sizes == {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    rest = {"hidden_act": "quick_gelu", "max_position_embeddings": 77, "vocab_size": 49408, "eos_token_id": 49407}
    encoder = comfy.clip_model.CLIPTextModel(sizes | rest, torch.float32, "meta", comfy.ops.manual_cast)
    check(encoder, part(config.TEXT + "transformer.") | {"text_projection.weight": torch.empty(768, 768, device="meta")})
    with torch.device("meta"):  # the settings of Stable Diffusion's first stage
        first_stage = comfy.ldm.models.autoencoder.AutoencoderKL(embed_dim=4, ddconfig={
            "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
            "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0})
    check(first_stage, part(config.VAE))


@pytest.mark.parametrize("ending", (".safetensors", ".pt"))
def test_a_file_loads_whole(ending, caplog):
    loaded = customnet.load(cf.path("normal", ending))
    assert loaded.variant == "normal"
    state = cf.state()
    network = loaded.model.model.diffusion_model.state_dict()
    name = "middle_block.1.transformer_blocks.0.attn2."
    assert torch.equal(network[name + "to_k.weight"], state[f"model.diffusion_model.{name}to_k_text.weight"])
    assert torch.equal(network[name + "to_v_obj.weight"], state[f"model.diffusion_model.{name}to_v.weight"])
    assert loaded.model.model.object_token.cc_projection.weight.dtype == torch.float32
    assert "missing" not in caplog.text
    assert torch.equal(picture_of(loaded), picture_of(cf.loaded()))


def test_a_file_of_the_trainer_loads(tmp_path):
    """It holds the network alone; text encoder, first stage and image tower are the miniature's."""
    from likeness.models.hosting import demo

    file = tmp_path / "mine.safetensors"
    shutil.copyfile(demo.WEIGHTS / "customnet.safetensors", file)
    done = customnet.load(file)
    assert done.variant == "normal" and "miniature" in done.text and done.vision is not None
    assert done.model.cached_patcher_init[1][0] == file, "another device reads the same file"
    assert customnet.save_half(file) == customnet.SMALL and list(tmp_path.iterdir()) == [file]


def test_the_inpaint_variant_is_told_apart():
    assert cf.loaded("inpaint").variant == "inpaint"
    assert cf.loaded("inpaint").model.model.layout.variant == "inpaint"


def test_the_text_encoder_has_the_files_weights():
    """A prompt must not be what an encoder without numbers makes of it."""
    got = cf.encode("a cat")[0][0]
    assert torch.isfinite(got).all() and got.shape == (1, 77, cf.WIDTH)
    table = cf.loaded().clip.cond_stage_model.clip_l.transformer.text_model.embeddings.token_embedding.weight
    want = cf.state()["text_encoder.transformer.text_model.embeddings.token_embedding.weight"]
    assert torch.allclose(table.float(), want, atol=1e-3)


def test_the_image_tower_gets_the_authors_pixels():
    vision = cf.loaded().vision
    reference = cf.view.checked_reference(cf.reference())
    want = vision.model(pixel_values=pixel_values(reference), intermediate_output=-2)[2].float()
    assert torch.equal(embed_reference(vision, reference), want)
    assert torch.isfinite(want).all() and want.std() > 0


def test_lora_reaches_the_text_projections():
    """SD1.5's names for the cross-attention's keys and values land where the text is, in both ways of writing them."""
    model = cf.loaded().model
    generator = torch.Generator().manual_seed(2)
    keys = {"lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k": "input_blocks.1.1.transformer_blocks.0.attn2.to_k",
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_v":
                "input_blocks.1.1.transformer_blocks.0.attn2.to_v"}
    lora = {}
    for key in keys:
        lora[f"{key}.lora_up.weight"] = torch.randn(32, 4, generator=generator)
        lora[f"{key}.lora_down.weight"] = torch.randn(4, cf.WIDTH, generator=generator)
        lora[f"{key}.alpha"] = torch.tensor(4.0)
    patched = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]
    assert set(patched.patches) == {f"diffusion_model.{name}.weight" for name in keys.values()}
    done = cf.conditioned()
    assert not torch.equal(cf.run(done, patched), cf.run(done))
    # without text there is nothing for it to act on
    mute = cf.conditioned(strengths=cf.view.Strengths(1.0, 0.0))
    assert torch.equal(cf.run(mute, patched), cf.run(mute))


def test_lora_reaches_the_text_encoder():
    """kohya's names, through the host's own loader with MODEL and CLIP."""
    loaded, generator = cf.loaded(), torch.Generator().manual_seed(2)
    key = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    lora = {f"{key}.lora_up.weight": torch.randn(128, 4, generator=generator), f"{key}.alpha": torch.tensor(4.0),
            f"{key}.lora_down.weight": torch.randn(4, cf.WIDTH, generator=generator)}
    model, clip = comfy.sd.load_lora_for_models(loaded.model, loaded.clip, lora, 1.0, 1.0)
    assert not model.patches
    assert set(clip.patcher.patches) == {"clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"}
    plain, moved = (one.encode_from_tokens_scheduled(one.tokenize("on the beach"))[0][0] for one in (loaded.clip, clip))
    assert float((moved - plain).abs().max()) > 1e-2
    again = loaded.clip.encode_from_tokens_scheduled(loaded.clip.tokenize("on the beach"))[0][0]
    torch.testing.assert_close(again, plain)


def test_the_sizes_that_the_help_tells(root):
    """Of the public file and of its half copy, from the manifest."""
    found = shapes("customnet")
    whole = sum(4 * math.prod(shape) for shape in found.values())
    half = sum((4 if key.startswith(config.PROJECTION) else 2) * math.prod(shape) for key, shape in found.items()
               if config.wanted(key))
    told = f"{half / 1e9:.1f} in place of {whole / 1e9:.1f} GB"
    assert told == "2.8 in place of 5.7 GB"
    assert told in (root / "js" / "docs" / "Likeness_LoadCustomNet.md").read_text(encoding="utf-8")


def test_a_folder_that_takes_no_file_costs_no_reading(tmp_path, monkeypatch):
    own = tmp_path / "small.safetensors"
    shutil.copy(cf.path(), own)

    def refuse(**_: object) -> None:
        raise OSError(30, "Read-only file system")
    monkeypatch.setattr(customnet.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(customnet, "read", lambda *_: pytest.fail("the file was read"))
    assert "cannot be written (Read-only file system)" in customnet.save_half(own)


def test_half_precision_copy(tmp_path, monkeypatch):
    own = tmp_path / "small.safetensors"
    shutil.copy(cf.path(), own)
    target = tmp_path / f"small{customnet.HALF_SUFFIX}"
    assert "saved as" in customnet.save_half(own)
    header = files.read_header(target)
    assert header.metadata["variant"] == "normal"
    assert not any(name.startswith(("betas", "cond_stage_model.model.token")) for name in header.tensors)
    assert header.tensors["cc_projection.weight"].dtype == "F32"
    assert header.tensors["model.diffusion_model.out.2.weight"].dtype == "F16"
    assert target.stat().st_size < 0.6 * cf.path().stat().st_size
    again, whole = picture_of(customnet.load(target)), picture_of(cf.loaded())
    assert float((again - whole).abs().max()) < 0.05 * float(whole.abs().max())
    before = target.stat().st_mtime_ns
    assert "already" in customnet.save_half(own)
    assert target.stat().st_mtime_ns == before
    # of a half copy under any name no other one is made
    assert "half precision already" in customnet.save_half(target)
    other = target.rename(tmp_path / "renamed.safetensors")
    assert "half precision already" in customnet.save_half(other)
    monkeypatch.setattr(files, "save", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    assert "cannot be written (Read-only file system)" in customnet.save_half(own)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["renamed.safetensors", "small.safetensors"]


def test_a_half_copy_can_be_cancelled(tmp_path, monkeypatch):
    own = tmp_path / "small.safetensors"
    shutil.copy(cf.path(), own)

    def stop() -> None:
        raise InterruptedError
    monkeypatch.setattr(customnet, "stop_if_asked", stop)
    with pytest.raises(InterruptedError):
        customnet.save_half(own)
    assert [path.name for path in tmp_path.iterdir()] == ["small.safetensors"]


def test_a_part_is_read_without_the_others():
    for parts in ((), ("first_stage_model.",), ("model.diffusion_model.", "cc_projection.")):
        state, layout = customnet.read(cf.path(), *parts)
        assert layout.variant == "normal"
        assert {name for name in state} == {name for name in customnet.read(cf.path())[0] if name.startswith(parts or "")}


def test_cores_own_save_node_writes_a_file_that_loads(tmp_path):
    loaded = cf.loaded()
    target = tmp_path / "core.safetensors"
    comfy.sd.save_checkpoint(str(target), loaded.model, loaded.clip, loaded.vae, loaded.vision)
    again = customnet.load(target)
    result, whole = picture_of(again), picture_of(loaded)
    assert float((result - whole).abs().max()) < 0.05 * float(whole.abs().max())


def test_other_files_are_refused(tmp_path):
    with pytest.raises(LikenessError, match="text width 64"):
        customnet.load(tiny.ensure()["tiny_sd15.safetensors"])
    lost = {name: value for name, value in cf.state().items() if "to_v_text" not in name or "middle" not in name}
    files.save(tmp_path / "lost.safetensors", lost)
    with pytest.raises(LikenessError, match="no whole CustomNet"):
        customnet.load(tmp_path / "lost.safetensors")
    (tmp_path / "page.pt").write_text("<!doctype html>")
    with pytest.raises(LikenessError, match="web page"):
        customnet.load(tmp_path / "page.pt")
    names = {name: value for name, value in cf.state().items() if "_text" not in name and "cc_" not in name}
    torch.save(names, tmp_path / "stock.pt")
    with pytest.raises(LikenessError, match="choose customnet_v1"):
        customnet.load(tmp_path / "stock.pt")


def test_another_device_gets_weights_of_its_own():
    loaded = cf.loaded()
    for patcher in (loaded.model, loaded.clip.patcher, loaded.vision.patcher, loaded.vae.patcher):
        function, arguments = patcher.cached_patcher_init
        again = function(*arguments, disable_dynamic=True)
        mine, other = patcher.model.state_dict(), again.model.state_dict()
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in list(mine)[:20])


