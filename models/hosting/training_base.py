"""The host's models as a frozen base for the training engine (models/training/base.py, Protocol Base)."""
from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.sd
import torch
from torch import Tensor

from ..common import files
from ..common.errors import LikenessError
from ..custany.config import CustAnyConfig, sd15_layers, sdxl_layers
from ..demo import packed
from ..demo.base import channel_weights, part
from ..demo.captions import row_ids, word_rows
from ..demo.first_stage import FirstStage
from ..demo.schedule import STEPS, noised
from ..demo.text import TextModel
from ..vision.load import load_vit
from ..vision.preprocess import common_size, preprocess
from .blocks import attention_blocks, text_width
from .demo_unet import UNET_CONFIG, build_trainable_unet
from .encoders import Encoders, encode, load_encoder
from .half_gradients import HalfGradients
from .memory import ready
from .prompt import locate
from .slots import Slot, laid_round, text_attention

log = logging.getLogger("likeness")
Middle = Callable[[str, Tensor], Tensor]
Cross = Callable[[str, Tensor, Tensor, int], Tensor]
Features = list[tuple[Tensor, Tensor]]


def with_patches(middle: Middle | None, cross: Cross | None, layers: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """transformer_options that call `middle` and `cross` at the host's own patch points, as injections do."""
    options: dict[str, Any] = {}
    if middle is not None:
        def patch(x: Tensor, extra_options: dict[str, Any]) -> Tensor:
            block = extra_options["block"]
            return middle(f"{block[0]}.{block[1]}.{extra_options.get('block_index', 0)}", x)
        options["patches"] = {"middle_patch": [patch]}
    if cross is not None:
        def make(key: str, before: Slot | None) -> Slot:
            def slot(q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
                return cross(key, q, text_attention(before, q, k, v, extra_options), extra_options["n_heads"])
            return slot
        options = laid_round(options, [key for key, _ in layers], make)
    return options


DEVICES = ("auto", "cpu", "cuda")


def training_device(name: str) -> torch.device:
    """auto: where the host would compute. Raises LikenessError for a card that is not there."""
    if name == "auto":
        return management.get_torch_device()
    if name == "cuda" and not torch.cuda.is_available():
        raise LikenessError("Training was to run on a CUDA card, but torch sees none; say --device cpu, or mend the driver.")
    return torch.device(name)


class MiniatureBase:
    """The miniature in plain float32 layers: what the shipped adapters are trained on."""

    def __init__(self, weights: Path, encoders: list[Path], device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        state = packed.load(weights)
        self.unet, self.text, self.stage = build_trainable_unet(), TextModel(), FirstStage()
        for module, name in ((self.unet, "unet"), (self.text, "text"), (self.stage, "first_stage")):
            part(module, name, state).to(self.device)
        loaded = [files.load(path) for path in encoders]
        self.encoders = [load_vit(tensors, metadata, device=self.device) for tensors, metadata in loaded]
        self.sizes = common_size([config for _, config in self.encoders])
        self.hashes = [files.sha256(path) for path in encoders]
        self.width = UNET_CONFIG["context_dim"]
        self.embed_width = sum(config.width for _, config in self.encoders)
        channels = self.unet.model_channels
        parts = ("input.1", "input.3", "middle.0", "output.0", "output.1", "output.2", "output.3")
        self.residual_blocks = self.unet.num_res_blocks[0]
        self.layers = tuple((f"{part}.0", channels) for part in parts)
        self._weight = channel_weights(self.stage)

    def encode_text(self, captions: list[str], words: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        first = word_rows(captions, words)
        return self.text(row_ids(captions).to(self.device)), first, (first >= 0).long()

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.stage.encode(pixels.to(self.device) * 2 - 1)

    @torch.no_grad()
    def embed_image(self, pixels: Tensor) -> Tensor:
        """Means of the patch tokens: a small encoder's class token, which learned from mirrored views who it is, hardly tells the
        pose that the decoupling branch has to know (facing 0.64, the mean 0.81, by a linear probe)."""
        return torch.cat([patches.mean(1) for _, patches in self.features(pixels)], 1)

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Features:
        pictures = pixels.to(self.device).permute(0, 2, 3, 1)
        out = []
        for (model, config), size in zip(self.encoders, self.sizes, strict=True):
            result = model(preprocess(pictures, config, size))
            out.append((result.cls, result.patches))
        return out

    def timesteps(self, n: int, generator: torch.Generator) -> Tensor:
        """One from each of n equal slices: uniform, with less noise in the loss than free draws."""
        slices = (torch.arange(n) + torch.rand(n, generator=generator)) * (STEPS / n)
        return slices.long().clamp(max=STEPS - 1)

    def noised(self, latents: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return *noised(latents, t, noise), self._weight

    def denoise(self, x_t: Tensor, t: Tensor, rows: Tensor, middle: Middle | None = None, cross: Cross | None = None) -> Tensor:
        return self.unet(x_t, t.to(x_t.device).float(), context=rows,
                         transformer_options=with_patches(middle, cross, self.layers))


def activation_bytes(layers: Sequence[tuple[str, int]], narrow: int, latents: tuple[int, ...], dtype: torch.dtype) -> int:
    """What a step holds between forward and backward, for latents (b, c, h, w); narrow: channels of the finest level.

    Nothing of the frozen network needs a gradient of its weights, but all that lies between the injection and the loss
    is kept: 30 to 37 values (counted) for each token and channel of a transformer block, with the residual blocks round
    it, and a third more for what the kernels take while they run."""
    values = 0
    for _, channels in layers:
        level = max(0, round(math.log2(channels / narrow)))  # channels double where the grid is halved
        values += channels * math.ceil(latents[-2] / 2 ** level) * math.ceil(latents[-1] / 2 ** level)
    return 48 * latents[0] * values * dtype.itemsize


# The host's names of what a network predicts, where x_t is the latent plus sigma times noise. FLOW and others mix them.
PREDICTIONS = ("EPS", "V_PREDICTION", "V_PREDICTION_EDM", "V_PREDICTION_CONTINUOUS", "EDM")


class CheckpointBase:
    """An SD1.5 or SDXL checkpoint that the host has loaded; its weights stay frozen."""

    def __init__(self, model: Any, clip: Any, vae: Any, encoders: Encoders):
        self.model, self.clip, self.vae, self.encoders = model, clip, vae, encoders
        self.device = model.load_device
        self.unet: Any = model.model.diffusion_model
        self.width = text_width(model)
        if not self.width:
            raise LikenessError("Adapters are trained on SD1.5 or SDXL checkpoints; this file holds another kind of model.")
        channels, own = self.unet.in_channels, model.model.latent_format.latent_channels
        if channels != own:
            raise LikenessError(f"This checkpoint is one for inpainting or editing: it reads {channels} channels where a latent "
                                f"has {own}; train on the text-to-image checkpoint that it was made from.")
        predicts = model.model.model_type.name
        if predicts not in PREDICTIONS:
            raise LikenessError(f"Adapters are trained on checkpoints that predict noise, v or EDM's output, as SD1.5 and SDXL "
                                f"do; this one is of the host's kind {predicts}.")
        self.unet.requires_grad_(False)  # the oldest host leaves it on, and gradients of frozen weights are as large as they
        self.layers = tuple(attention_blocks(model).items())
        self.embed_width = encoders.items[0].config.width
        self.residual_blocks = int(self.unet.num_res_blocks[0])
        self.sampling = model.get_model_object("model_sampling")
        self._pooled: Tensor | None = None

    @torch.no_grad()
    def encode_text(self, captions: list[str], words: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """First windows only; the pooled rows that SDXL wants are kept for the next denoise call.

        A caption describes a picture: its brackets are punctuation, and the CLIP of `load_checkpoint_base` knows no folder of
        embeddings."""
        rows, first, count, pooled = [], [], [], []
        for caption, word in zip(captions, words, strict=True):
            tokens = self.clip.tokenize(caption, disable_weights=True)
            found = locate(self.clip, tokens, word, 1)[0] if word else None
            entry = self.clip.encode_from_tokens(tokens, return_pooled=True)
            window = self.clip.tokenize("")
            length = len(next(iter(window.values()))[0])
            rows.append(entry[0][:, :length].float())
            pooled.append(entry[1])
            columns = found.columns if found is not None and found.columns and found.columns[0] < length else ()
            first.append(columns[0] if columns else -1)
            count.append(len(columns))
        self._pooled = torch.cat(pooled).float().to(self.device) if pooled[0] is not None else None
        return torch.cat(rows).to(self.device).clone(), torch.tensor(first), torch.tensor(count)

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor:
        latents = self.vae.encode(pixels.permute(0, 2, 3, 1).float().cpu())
        return self.model.model.process_latent_in(latents).to(self.device).clone()

    @torch.no_grad()
    def embed_image(self, pixels: Tensor) -> Tensor:
        return self.features(pixels)[0][0]

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Features:
        pairs = encode(self.encoders, pixels.permute(0, 2, 3, 1).cpu())
        return [(cls.to(self.device).clone(), patches.to(self.device).clone()) for cls, patches in pairs]

    def timesteps(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(0, len(self.sampling.sigmas), (n,), generator=generator)

    def noised(self, latents: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Variance-exploding as the host samples it; the target is the output that the host would take for these latents."""
        sigma = self.sampling.sigmas.to(latents)[t.to(latents.device)].view(-1, 1, 1, 1)
        x_t = latents + sigma * noise
        if self.model.model.model_type.name == "EPS":
            return x_t, noise, None  # the same without rounding
        # the host's denoised latents are linear in the network's input and output
        denoised, zeros = self.sampling.calculate_denoised, torch.zeros_like(x_t)
        of_input, of_output = denoised(sigma, zeros, x_t), denoised(sigma, torch.ones_like(x_t), zeros)
        return x_t, (latents - of_input) / of_output, None

    def denoise(self, x_t: Tensor, t: Tensor, rows: Tensor, middle: Middle | None = None, cross: Cross | None = None) -> Tensor:
        base = self.model.model
        # Encoders and first stage may have taken its place since the last step; cheap while it is there.
        ready([self.model], activation_bytes(self.layers, self.unet.model_channels, tuple(x_t.shape),
                                             base.get_dtype_inference()))
        sigma = self.sampling.sigmas.to(x_t)[t.to(x_t.device)]
        dtype = base.get_dtype_inference()
        extra = {}
        if self._pooled is not None and base.adm_channels:
            height, width = x_t.shape[-2] * 8, x_t.shape[-1] * 8
            extra["y"] = base.encode_adm(pooled_output=self._pooled, width=width, height=height, device=x_t.device).to(dtype)
        scaled = self.sampling.calculate_input(sigma, x_t).to(dtype)
        half = HalfGradients() if dtype == torch.float16 else None
        if half is not None:
            rows, middle, cross = half.into(rows), middle and half.middle(middle), cross and half.cross(cross)
        out = self.unet(scaled, self.sampling.timestep(sigma).float(), context=rows.to(dtype),
                        transformer_options=with_patches(middle, cross, self.layers), **extra).float()
        return out if half is None else half.end(out)


def load_checkpoint_base(checkpoint: Path, encoders: list[Path], exact_gelu: bool = False) -> CheckpointBase:
    """From files as ComfyUI uses them; exact_gelu: as Load Adapter loads the encoders of RealCustom++.

    Raises LikenessError for a file that holds no such model."""
    if not Path(checkpoint).is_file():
        raise LikenessError(f"The checkpoint {checkpoint} does not exist; give the path of an SD1.5 or SDXL file.")
    files.check_file(checkpoint)
    try:
        loaded = comfy.sd.load_checkpoint_guess_config(str(checkpoint), output_vae=True, output_clip=True)
    except RuntimeError as error:  # the host's word for a file that it does not know
        log.debug("%s: %s", checkpoint, error)
        loaded = None
    if loaded is None or loaded[0] is None:
        raise LikenessError(f"The file {Path(checkpoint).name} is no checkpoint that ComfyUI knows; choose an SD1.5 or SDXL "
                            "file.")
    model, clip, vae = loaded[:3]
    base = CheckpointBase(model, clip, vae, Encoders(tuple(load_encoder(path, exact_gelu=exact_gelu) for path in encoders)))
    log.info("Training computes on %s.", base.device)
    return base


def preset_for(base: CheckpointBase) -> CustAnyConfig:
    """The adapter layout of SD1.5 or SDXL where the base has it, else one layer in every block of the way up."""
    configs = [item.config for item in base.encoders.items]
    sizes = common_size(configs)
    have, up = dict(base.layers), tuple((k, c) for k, c in base.layers if k.startswith("output."))
    # SD2 has the blocks of SD1.5 and another text
    known = (("sd15", 768, sd15_layers()), ("sdxl", 2048, sdxl_layers()))
    family, layers = next(((name, layers) for name, width, layers in known
                           if width == base.width and all(have.get(k) == c for k, c in layers)), ("custom", up))
    heads = 64 if all(c % 64 == 0 for _, c in up) else 32
    return CustAnyConfig(base.width, tuple((c.family, c.width) for c in configs), layers, head_dim=heads,
                         grid=sizes[0] // configs[0].patch, resolutions=tuple(sizes), base=family).check()
