"""The miniature world as MODEL, CLIP and VAE that every stock node understands.

Nothing is registered: the host's list of models stays as it is. The network, the text encoder and the tokenizer are
the host's own classes at another size; only the first stage is ours.
"""
from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management as management
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.taesd.taesd
import torch
from torch import Tensor

from ..common import files
from ..common.errors import LikenessError
from ..demo import packed
from ..demo.captions import CONTEXT_LENGTH, TOKEN_IDS, UNKNOWN
from ..demo.first_stage import CHANNELS, PATCH, FirstStage
from ..demo.schedule import SAMPLING
from ..demo.text import HEADS, LAYERS, WIDTH
from .adapters import Adapter, make_adapter
from .demo_unet import UNET_CONFIG
from .encoders import Encoders, make_encoder
from .memory import patcher_class

WEIGHTS = Path(__file__).parent.parent / "demo" / "weights"
_ENCODERS = ("dino.safetensors", "mae.safetensors")
METHODS = {"CustAny": ("custany.safetensors", _ENCODERS), "RealCustom++": ("realcustom.safetensors", _ENCODERS)}
VOCABULARY = 49408


class DemoLatent(comfy.latent_formats.LatentFormat):
    """48 whitened channels; the preview colours follow from the patch PCA (set when the weights are read)."""
    latent_channels = CHANNELS
    scale_factor = 1.0

    def __init__(self, first_stage: dict[str, Tensor] | None = None):
        if first_stage is None:
            return
        # the mean colour of a patch is linear in its latent: exact factors, no fit
        basis = first_stage["basis"].float().view(3, PATCH * PATCH, CHANNELS).mean(1) * first_stage["scale"].float()
        mean = first_stage["mean"].float().view(3, PATCH * PATCH).mean(1)
        # the host adds its bias after the factors and maps -1..1 to 0..255
        self.latent_rgb_factors = basis.T.tolist()
        self.latent_rgb_factors_bias = mean.tolist()


class DemoConfig(comfy.supported_models_base.BASE):
    """What the host asks of a model family."""
    unet_config = UNET_CONFIG
    unet_extra_config: dict[str, Any] = {}
    latent_format = DemoLatent
    sampling_settings = SAMPLING
    memory_usage_factor = 1.0

    def model_type(self, state_dict, prefix=""):
        return comfy.model_base.ModelType.V_PREDICTION

    def inpaint_model(self):
        return False

    def process_clip_state_dict_for_saving(self, state_dict):
        return {f"cond_stage_model.{key}": value for key, value in state_dict.items()}


class _Tokenizer(comfy.sd1_clip.SDTokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data=None):
        super().__init__(max_length=CONTEXT_LENGTH, embedding_size=WIDTH, embedding_directory=embedding_directory,
                         tokenizer_data=tokenizer_data or {})


class DemoTokenizer(comfy.sd1_clip.SD1Tokenizer):
    """CLIP's byte-pair tokenizer with windows of 32."""

    def __init__(self, embedding_directory=None, tokenizer_data=None):
        super().__init__(embedding_directory=embedding_directory, tokenizer_data=tokenizer_data or {}, tokenizer=_Tokenizer)


class _TextModel(comfy.sd1_clip.SDClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        config = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
                  "hidden_act": "quick_gelu", "max_position_embeddings": CONTEXT_LENGTH, "projection_dim": WIDTH,
                  "vocab_size": VOCABULARY, "layer_norm_eps": 1e-5, "eos_token_id": 49407, "attention_dropout": 0.0}
        super().__init__(device=device, max_length=CONTEXT_LENGTH, layer="last", textmodel_json_config=config, dtype=dtype,
                         return_projected_pooled=False, model_options=model_options or {})


class DemoClip(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=_TextModel)


class DemoVAE(comfy.sd.VAE):
    """The host's VAE object round our first stage, so that tiling, batching and memory stay the host's."""

    def __init__(self, module: FirstStage, disable_dynamic: bool = False):
        # The host builds only first stages that it detects. It may set itself up round its smallest one, which is
        # then exchanged before anything is loaded anywhere.
        small = comfy.taesd.taesd.TAESD(latent_channels=CHANNELS)
        super().__init__(sd=small.state_dict())
        module.to(self.vae_dtype)
        self.latent_channels = CHANNELS
        self.first_stage_model = module
        self.patcher = patcher_class(disable_dynamic)(module, load_device=self.device,
                                                      offload_device=management.vae_offload_device())


def _parts(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key[len(name) + 1:]: value for key, value in state.items() if key.startswith(name + ".")}


def expand_vocabulary(small: Tensor) -> Tensor:
    """(rows, d) table of this world's words -> (49408, d): every other token reads the row of unknown words."""
    table = small[UNKNOWN].repeat(VOCABULARY, 1)
    table[49406], table[49407] = small[1], small[2]
    for row, token in enumerate(TOKEN_IDS.values()):
        table[token] = small[row + 3]
    return table


def load_base(embedding_directory: Any = None, path: Path | None = None) -> tuple[Any, Any, Any]:
    """MODEL, CLIP, VAE of the miniature. Raises LikenessError when the weights are missing or damaged."""
    path = path or WEIGHTS / "base.safetensors"
    if not path.exists():
        raise LikenessError(f"The miniature's weights {path.name} are missing from this copy of the pack; install it again, or "
                            "make them with: python dev.py train demo.")
    state = packed.load(path)
    model, clip, vae = _model(state), _clip(state, embedding_directory), _vae(state)
    for part, patcher in (("unet", model), ("text", clip.patcher), ("first_stage", vae.patcher)):
        patcher.cached_patcher_init = (reload_part, (part, path))
    return model, clip, vae


def reload_part(part: str, path: Path, disable_dynamic: bool = False) -> Any:
    """The host's factory for a patcher with weights of its own, for another device."""
    state = packed.load(path)
    if part == "unet":
        return _model(state, disable_dynamic)
    return (_clip(state, None, disable_dynamic) if part == "text" else _vae(state, disable_dynamic)).patcher


def latent_format(path: Path) -> DemoLatent:
    """The format of the first stage in a base file."""
    state, _ = files.load(path, only=lambda name: name.startswith("first_stage."))
    return DemoLatent(_parts(state, "first_stage"))


def _model(whole: dict[str, Tensor], disable_dynamic: bool = False) -> Any:
    state = _parts(whole, "unet")
    load_device = management.get_torch_device()
    offload_device = management.unet_offload_device()
    config = DemoConfig(UNET_CONFIG)
    config.latent_format = DemoLatent(_parts(whole, "first_stage"))
    dtype = management.unet_dtype(model_params=4_000_000, supported_dtypes=[torch.float16, torch.float32])
    config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, load_device))
    model = config.get_model({}, "", device=offload_device)
    model.load_model_weights({f"{key}": value for key, value in state.items()}, "")
    return patcher_class(disable_dynamic)(model, load_device=load_device, offload_device=offload_device)


def _clip(whole: dict[str, Tensor], embedding_directory: Any, disable_dynamic: bool = False) -> Any:
    state = _parts(whole, "text")
    table = "text_model.embeddings.token_embedding.weight"
    state = {**state, table: expand_vocabulary(state[table]),
             "text_projection.weight": torch.eye(WIDTH, dtype=state[table].dtype)}
    target = comfy.supported_models_base.ClipTarget(DemoTokenizer, DemoClip)
    clip = comfy.sd.CLIP(target, embedding_directory=embedding_directory, parameters=6_700_000,
                         **({"disable_dynamic": True} if disable_dynamic else {}))  # older hosts do not know the word
    clip.load_sd({f"clip_l.transformer.{key}": value for key, value in state.items()}, full_model=True)
    return clip


def _vae(whole: dict[str, Tensor], disable_dynamic: bool = False) -> Any:
    module = FirstStage(operations=comfy.ops.disable_weight_init)
    module.load_state_dict({key: value.float() for key, value in _parts(whole, "first_stage").items()})
    return DemoVAE(module.eval().requires_grad_(False), disable_dynamic)


@cache
def _sha256(path: Path, stamp: float) -> str:
    return files.sha256(path)


def available() -> list[str]:
    """Methods whose adapter is in this copy of the pack; CustAny's always is."""
    return [name for name, (file, _) in METHODS.items() if name == "CustAny" or (WEIGHTS / file).exists()]


def load_method(method: str) -> tuple[Adapter, Encoders]:
    """The adapter of a method and the encoders that it was trained with."""
    name, encoder_names = METHODS[method]

    def read(file: str) -> dict[str, Any]:
        path = WEIGHTS / file
        if not path.exists():
            raise LikenessError(f"The miniature's weights {file} are missing from this copy of the pack; install it again, "
                                "or make them with: python dev.py train demo.")
        state, metadata = files.load(path)
        return {"state": state, "metadata": metadata, "sha256": _sha256(path, path.stat().st_mtime), "name": file, "path": path}
    return make_adapter(**read(name)), Encoders(tuple(make_encoder(**read(file)) for file in encoder_names))
