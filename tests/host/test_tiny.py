"""The tiny checkpoints are what the tests take them for: the host's own classes, alive in every part."""
from __future__ import annotations

import pytest

STEPS = 2


def sample(model, clip, seed=0, prompt="a red cat on a beach", latent=None):
    import comfy.sample
    import torch

    def encode(text):
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))

    with torch.inference_mode():
        if latent is None:
            latent = torch.zeros(1, model.get_model_object("latent_format").latent_channels, 8, 8)
        noise = comfy.sample.prepare_noise(latent, seed)
        return comfy.sample.sample(
            model, noise, STEPS, 5.0, "euler", "normal", encode(prompt), encode(""), latent, seed=seed
        )


@pytest.mark.parametrize(
    ("kind", "family", "prediction", "width"),
    [("sd15", "SD15", "EPS", 64), ("sdxl", "SDXL", "EPS", 160), ("sd3", "SD3", "CONST", 4096)],
)
def test_kind(tiny_checkpoint, kind, family, prediction, width):
    import torch

    model, clip, vae = tiny_checkpoint(kind)
    config = type(model.model.model_config)
    assert family in [c.__name__ for c in config.__mro__] and config.__name__ == f"Tiny{family}"
    assert prediction in [c.__name__ for c in type(model.model.model_sampling).__mro__]
    rows = clip.encode_from_tokens_scheduled(clip.tokenize("a cat"))[0][0]
    assert rows.shape[0] == 1 and rows.shape[1] >= 77 and rows.shape[2] == width
    out = sample(model, clip)
    assert torch.isfinite(out).all() and out.std() > 0.05
    assert torch.equal(out, sample(model, clip)), "the same seed gave another latent"
    assert not torch.equal(out, sample(model, clip, prompt="a blue dog")), "the prompt does nothing"
    with torch.inference_mode():
        pixels = vae.decode(out)
    assert pixels.shape == (1, 64, 64, 3) and pixels.std() > 0.01


def test_sd15_and_sdxl_have_the_real_block_layout(tiny_checkpoint):
    """Block numbers of patches: SD1.5 attends in output 3 to 11, SDXL ten deep in 0 to 2, two in 3 to 5."""
    def depths(kind):
        unet = tiny_checkpoint(kind)[0].model.diffusion_model
        found = {}
        for number, block in enumerate(unet.output_blocks):
            for part in block:
                if hasattr(part, "transformer_blocks"):
                    found[number] = len(part.transformer_blocks)
        return found

    assert depths("sd15") == dict.fromkeys(range(3, 12), 1)
    assert depths("sdxl") == {0: 10, 1: 10, 2: 10, 3: 2, 4: 2, 5: 2}


def test_lora_and_controlnet_change_the_result(tiny_checkpoint, tiny_files):
    import comfy.controlnet
    import comfy.sample
    import comfy.sd
    import comfy.utils
    import torch

    model, clip, _ = tiny_checkpoint("sd15")
    plain = sample(model, clip)
    lora = comfy.utils.load_torch_file(str(tiny_files["tiny_sd15_lora.safetensors"]))
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    assert len(patched.patches) == len(lora) // 3, "the host did not recognise every key"
    assert not torch.equal(sample(patched, clip), plain)
    assert torch.equal(sample(model, clip), plain), "the LoRA reached the parent"

    control = comfy.controlnet.load_controlnet(str(tiny_files["tiny_sd15_control.safetensors"]))
    hint = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        cond = clip.encode_from_tokens_scheduled(clip.tokenize("a cat"))
        control = control.copy().set_cond_hint(hint, 1.0, (0.0, 1.0))
        extra = {"control": control, "control_apply_to_uncond": True}
        controlled = [[c[0], {**c[1], **extra}] for c in cond]
        latent = torch.zeros(1, 4, 8, 8)
        noise = comfy.sample.prepare_noise(latent, 0)
        run = [comfy.sample.sample(model, noise, STEPS, 1.0, "euler", "normal", c, cond, latent)
               for c in (cond, controlled)]
    assert not torch.equal(*run)
