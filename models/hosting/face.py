"""Face networks in the host: torch modules under its memory manager, or sessions of onnxruntime."""
from __future__ import annotations

import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management as management
import comfy.ops
import torch
from torch import Tensor, nn

from ..common import files
from ..common.errors import LikenessError
from ..common.records import brief
from ..face.contract import (
    ATTRIBUTES,
    DETECTOR,
    FLOAT16,
    LANDMARKS,
    RECOGNISER,
    SPACES,
    SWAPPER,
    Contract,
    contract_of,
    emap_of,
    read_graph,
    space_of,
)
from ..face.libraries import INSTALL, there
from ..face.networks import Network, Session, can_batch, convert, in_order
from ..face.pack import LICENCE, Found, look, pick
from .memory import patcher_of, ready

BACKENDS = ("auto", "torch", "onnxruntime")
MEMORY = 1 << 28  # bytes of activations; the largest, a detector at 640 pixels, takes less
CAST = ("Conv2d", "Linear", "BatchNorm2d", "ConvTranspose2d")  # layers whose weights the host can keep elsewhere
# (file, stamp, back end) -> network, for as long as some node's output still holds it
_loaded: weakref.WeakValueDictionary[tuple[str, int, int, str], Any] = weakref.WeakValueDictionary()
_emaps: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()  # of swappers, while those live


class TorchNetwork:
    """An .onnx file as a torch module under a host patcher. doubt: a note on numbers that could not be checked."""
    backend = "torch"

    def __init__(self, path: Path, contract: Contract, model: Any):
        self.name, self.contract, self.batches = path.name, contract, can_batch(contract, self.backend)
        self.patcher, self.doubt = _patcher(path, model)
        self.patcher.cached_patcher_init = (reload_network, (path,))

    @property
    def device(self) -> torch.device:
        return self.patcher.load_device

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        out = self.patcher.model(*in_order(self.contract, tuple(tensor.to(self.device) for tensor in inputs)))
        return [out] if isinstance(out, Tensor) else list(out)


def reload_network(path: Path, disable_dynamic: bool = False) -> Any:
    """The host's factory for a copy with weights of its own."""
    return _patcher(path, read_graph(path), disable_dynamic)[0]


def _patcher(path: Path, model: Any, disable_dynamic: bool = False) -> tuple[Any, str]:
    half = any(tensor.data_type == FLOAT16 for tensor in model.graph.initializer)
    module, doubt = convert(path, model)
    module = _host_layers(module)
    if half:  # stored as in the file, computed in float32
        for layer in module.modules():
            if getattr(layer, "comfy_cast_weights", False):
                layer.half()
    return patcher_of(module, disable_dynamic), doubt


def _host_layers(module: nn.Module) -> nn.Module:
    """Layers of torch become the host's own, which have the same tensors and can be kept in main memory."""
    for layer in module.modules():
        name = type(layer).__name__
        if name in CAST and type(layer) is getattr(nn, name):
            layer.__class__ = getattr(comfy.ops.manual_cast, name, type(layer))
    return module


class FaceModels(NamedTuple):
    """LIKENESS_FACE_MODELS: the networks of a pack; space names the embeddings of its recogniser."""
    detector: Network
    recogniser: Network
    landmarks: Network | None
    attributes: Network | None
    space: str
    name: str


class FaceSwapper(NamedTuple):
    """LIKENESS_FACE_SWAPPER: the network, its identity map (512, 512) and the space of the embeddings it takes."""
    network: Network
    emap: Tensor
    space: str
    name: str

    def __repr__(self) -> str:
        return brief(self)


def choose_backend(wish: str) -> str:
    """torch on an accelerator, else onnxruntime, which says itself where it is missing."""
    if wish != "auto":
        return wish
    if there("onnx2torch") and (management.get_torch_device().type != "cpu" or not there("insightface")):
        return "torch"
    return "onnxruntime"


def load_network(path: Path, contract: Contract, backend: str, model: Any = None) -> tuple[Network, str]:
    """One network, and a note when another back end had to step in. A file that is loaded already is not read again."""
    wanted = choose_backend(backend)
    known = _loaded.get(_key(path, wanted))
    if known is not None:
        return known, _doubt(known)
    network: Network
    if wanted == "torch":
        try:
            network = TorchNetwork(path, contract, model if model is not None else read_graph(path))
        except LikenessError as error:
            if backend != "auto" or not there("insightface"):
                raise
            note = f"{path.name} runs in onnxruntime: {error}"
            return load_network(path, contract, "onnxruntime")[0], note
    else:
        network = Session(path, contract)
    _loaded[_key(path, wanted)] = network
    return network, _doubt(network)


def _doubt(network: Network) -> str:
    return network.doubt if isinstance(network, TorchNetwork) else ""


def _key(path: Path, backend: str) -> tuple[str, int, int, str]:
    return *files.version(path), backend


def prepare(networks: list[Network | None], memory: int = MEMORY, beside: tuple[Any, ...] = ()) -> None:
    """Brings the torch networks among these to their device, all at once, with the patchers `beside` them."""
    own = [network.patcher for network in networks if isinstance(network, TorchNetwork)]
    if own or beside:
        ready([*beside, *own], memory)
        for patcher in own:
            _settle(patcher)


def _settle(patcher: Any) -> None:
    """Constants of the file and slopes go to the device: the host leaves there what it does not know how to cast, where not
    all of a network fits. They are small, and come back with the rest."""
    device = patcher.load_device
    for layer in patcher.model.modules():
        if hasattr(layer, "comfy_cast_weights"):
            continue
        for parameter in layer.parameters(recurse=False):
            parameter.data = parameter.data.to(device)
        for name, buffer in layer.named_buffers(recurse=False):
            setattr(layer, name, buffer.to(device))


def load_models(folder: Path, backend: str = "auto", paths: Iterable[Path] = ()) -> tuple[FaceModels, str]:
    """The face pack in a folder, and a report. paths: its files where they lie in more folders than this one.

    Raises LikenessError for a pack without detector or recogniser."""
    found = look(folder, paths)
    chosen = pick(folder, found)
    networks: dict[str, Network] = {}
    notes = []
    for kind in (DETECTOR, RECOGNISER, LANDMARKS, ATTRIBUTES):
        item = chosen.get(kind)
        if item is not None and item.contract is not None:
            networks[kind], note = load_network(item.path, item.contract, backend)
            notes += [note] if note else []
    recogniser = chosen[RECOGNISER]
    assert recogniser.contract is not None
    space = space_of(recogniser.path, recogniser.contract)
    models = FaceModels(networks[DETECTOR], networks[RECOGNISER], networks.get(LANDMARKS), networks.get(ATTRIBUTES), space,
                        folder.name)
    places = dict.fromkeys(str(item.path.parent) for item in found)
    lines = [f"face pack {folder.name} from {' and '.join(places)}", *(_line(item, networks) for item in found),
             f"embeddings: {space}{'' if space in SPACES or recogniser.contract.space else ', named after the file'}", *notes,
             f"licence: {recogniser.contract.licence or LICENCE}"]
    return models, "\n".join(lines + _missing_library())


def _line(item: Found, networks: dict[str, Network]) -> str:
    network = networks.get(item.kind)
    used = network is not None and network.name == item.path.name
    where = f", {network.backend} on {_place(network)}" if used and network is not None else ", not used"
    return f"{item.path.name}: {item.kind}{where}"


def _place(network: Network) -> str:
    return network.provider if isinstance(network, Session) else str(network.device)


def _missing_library() -> list[str]:
    return [] if there("insightface") else [f"note: insightface is not installed, so only the back end torch works; {INSTALL}"]


def load_swapper(path: Path, backend: str = "auto") -> tuple[FaceSwapper, str]:
    """A swapper with its identity map, and a report. Raises LikenessError for a file of another kind."""
    network: Network | None = _loaded.get(_key(path, choose_backend(backend))) if path.is_file() else None
    note = "" if network is None else _doubt(network)
    if network is None or network not in _emaps:
        model = read_graph(path)
        contract = contract_of(model)
        if contract.kind != SWAPPER:
            raise LikenessError(f"The file {path.name} is no face swapper, it holds the network: {contract.kind}; choose "
                                "inswapper_128.onnx.")
        emap = emap_of(path, model)
        network, note = load_network(path, contract, backend, model)
        _emaps[network] = emap
    contract = network.contract
    space = contract.space or SPACES[0]
    lines = [f"{path.name}: swapper of {contract.size} pixels, {network.backend} on {_place(network)}",
             f"it takes faces in the space {space}", *([note] if note else []), f"licence: {contract.licence or LICENCE}"]
    return FaceSwapper(network, _emaps[network], space, path.name), "\n".join(lines + _missing_library())
