"""Vision encoders as the sockets carry them: native ViTs under host patchers."""
from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import comfy.ops
import comfy.utils
import torch
from torch import Tensor

from ..common import files
from ..common.errors import LikenessError
from ..vision.keys import has_mae_parts, identify
from ..vision.load import load_vit, unwrap
from ..vision.preprocess import common_size, preprocess
from ..vision.vit import VitConfig
from .memory import compute_dtype, patcher_of, ready, stop_if_asked

log = logging.getLogger("likeness")
CHUNK = 8  # reference pictures at a time: bounds the memory of a long list of references


class Encoder(NamedTuple):
    """One vision encoder; `patcher.model` is a ViT."""
    patcher: Any
    config: VitConfig
    sha256: str
    name: str

    def is_file(self, digest: str) -> bool:
        """Whether it was read from the file with this hash, as an adapter notes it; any file where it notes none."""
        return self.sha256.startswith(digest[:16])


class Encoders(NamedTuple):
    """LIKENESS_ENCODERS: the encoders in the order in which an adapter wants their features."""
    items: tuple[Encoder, ...]

    @property
    def hash(self) -> str:
        return "+".join(item.sha256[:16] for item in self.items)


def read_weights(path: str | Path, only: Callable[[str], bool] | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and metadata of any weights file; pickles only through the host's safe loader, and always whole."""
    path = Path(path)
    files.check_file(path)
    if files.is_safetensors(path):
        return files.load(path, only=only)
    try:
        return unwrap(comfy.utils.load_torch_file(str(path), safe_load=True)), {}
    except Exception as error:  # the unpickler raises what it likes
        raise LikenessError(f"The file {path.name} cannot be read as weights ({type(error).__name__}); download it again, "
                            "best as .safetensors.") from error


def label(config: VitConfig) -> str:
    """Family and width, for the artist."""
    return f"{config.family} {config.width}" + (f" with {config.registers} registers" if config.registers else "")


def describe(path: str | Path) -> VitConfig | None:
    """What encoder a file holds, or None; a safetensors file is told from its header alone."""
    return _look(path)[0]


def says_mae(path: str | Path) -> bool:
    """Whether a file names parts that only an MAE has; a plain ViT has the very tensors of an MAE's encoder."""
    return _look(path)[1]


def _look(path: str | Path) -> tuple[VitConfig | None, bool]:
    try:
        return _describe(*files.version(path))
    except OSError:
        return None, False


@lru_cache(256)  # a pickle must be read whole to be told, so once has to be enough
def _describe(path: str, modified: int, size: int) -> tuple[VitConfig | None, bool]:
    names: Mapping[str, Any]
    try:
        if files.is_safetensors(path):
            names, metadata = files.read_header(path)
        else:
            files.check_file(path)
            names, metadata = unwrap(comfy.utils.load_torch_file(str(path), safe_load=True)), {}
        return identify(names, metadata), metadata.get("likeness.family") == "mae" or has_mae_parts(names)
    except Exception as error:  # one broken pickle in the folder, which raises what it likes, must not hide the others
        log.debug("%s is no encoder: %s", path, error)
        return None, False


def load_encoder(path: str | Path, depth: int | None = None, exact_gelu: bool = False) -> Encoder:
    """The first `depth` blocks, or all. Raises LikenessError for anything that is no vision encoder."""
    state, metadata = read_weights(path)
    return make_encoder(state, metadata, files.sha256(path), Path(path).name, depth, exact_gelu, Path(path))


def make_encoder(state: Mapping[str, Any], metadata: Mapping[str, str], sha256: str, name: str, depth: int | None = None,
                 exact_gelu: bool = False, path: Path | None = None) -> Encoder:
    """From tensors that are read already; exact_gelu: whatever form of GELU the style of the file stands for; `path` is where
    the host can read them again for another device."""
    patcher, config = _patcher(state, metadata, depth, exact_gelu)
    if path is not None:
        patcher.cached_patcher_init = (reload_encoder, (path, depth, exact_gelu))
    return Encoder(patcher, config, sha256, name)


def reload_encoder(path: Path, depth: int | None = None, exact_gelu: bool = False, disable_dynamic: bool = False) -> Any:
    """The host's factory for a copy with weights of its own."""
    return _patcher(*read_weights(path), depth, exact_gelu, disable_dynamic)[0]


def _patcher(state: Mapping[str, Any], metadata: Mapping[str, str], depth: int | None, exact_gelu: bool,
             disable_dynamic: bool = False) -> tuple[Any, VitConfig]:
    metadata = {**metadata, "likeness.activation": "gelu"} if exact_gelu else metadata
    model, config = load_vit(state, metadata, operations=comfy.ops.manual_cast, depth=depth)
    patcher = patcher_of(model, disable_dynamic)
    dtype = compute_dtype(patcher.load_device)
    if dtype != torch.float32:
        model.to(dtype)
    return patcher, config


def encode(encoders: Encoders, pictures: Tensor, sizes: tuple[int, ...] = ()) -> list[tuple[Tensor, Tensor]]:
    """Pictures (b, s, s, 3) in 0..1 -> per encoder (class token (b, d), patch tokens (b, n, d)), float32 on the CPU.

    Patch tokens are in raster order. `sizes`: side in pixels for each encoder, else equal token grids."""
    configs = [item.config for item in encoders.items]
    sizes = sizes or common_size(configs)
    memory = max(CHUNK * (size // c.patch) ** 2 * c.width * 80 for size, c in zip(sizes, configs, strict=True))
    ready([item.patcher for item in encoders.items], memory)
    blocks = pictures.split(CHUNK)
    bar = comfy.utils.ProgressBar(len(encoders.items) * len(blocks))
    out = []
    for item, size in zip(encoders.items, sizes, strict=True):
        device = item.patcher.load_device
        dtype = next(item.patcher.model.parameters()).dtype
        parts = []
        for block in blocks:
            stop_if_asked()
            result = item.patcher.model(preprocess(block, item.config, size).to(device, dtype))
            cls = result.cls if result.cls is not None else result.patches.mean(1)
            parts.append((cls.float().cpu(), result.patches.float().cpu()))
            bar.update(1)
        out.append((torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])))
    return out


def match(wanted: tuple[tuple[str, int], ...], hashes: tuple[str, ...], candidates: list[str | Path],
          registers: tuple[int, ...] = ()) -> list[Path]:
    """The file for each wanted (family, width): the one with the right hash, else the first that fits.

    registers: how many each must have, where that matters. A file that says that it is an MAE comes before one that could
    be a plain ViT. Pickles, which must be read whole, are only looked at while something is missing. Raises LikenessError
    that names what is missing."""
    numbers = registers or (None,) * len(wanted)
    paths = sorted(map(Path, candidates), key=lambda path: not files.is_safetensors(path))
    known: list[tuple[Path, VitConfig | None]] = []

    def fitting_files(index: int) -> list[Path]:
        return [path for path, c in known if c is not None and (c.family, c.width) == wanted[index]
                and numbers[index] in (None, c.registers)]
    for path in paths:
        if not files.is_safetensors(path) and all(map(fitting_files, range(len(wanted)))):
            break
        known.append((path, describe(path)))
    out = []
    for index, (family, width) in enumerate(wanted):
        number, fitting = numbers[index], fitting_files(index)
        if not fitting:
            found = ", ".join(f"{p.name} ({label(c)})" for p, c in known if c is not None) or "no encoder at all"
            extra = f" with {number} registers" if number else ""
            raise LikenessError(f"This adapter needs a {family} encoder of width {width}{extra}, found {found}; put the file "
                                "into models/likeness or models/clip_vision and press R.")
        exact = [p for p in fitting if index < len(hashes) and hashes[index] and len(fitting) > 1
                 and files.sha256(p).startswith(hashes[index][:16])]
        surer = [path for path in fitting if family == "mae" and says_mae(path)]
        out.append((exact or surer or fitting)[0])
    return out
