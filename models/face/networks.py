"""The two back ends: an .onnx file as a session of onnxruntime, or converted to a torch module."""
from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..common.errors import LikenessError
from .contract import FLOAT16, SWAPPER, Contract, contract_of, read_graph
from .libraries import need, there

BATCH = 8  # crops at a time
PROBE = 128  # side of a picture for networks that take any


class Network(Protocol):
    """A loaded network. A call takes the picture (n, 3, h, w) and then any vectors, float32, and gives its outputs.

    batches: whether n may be more than 1. device: where inputs are best made and outputs lie.
    """
    name: str
    contract: Contract
    backend: str
    batches: bool

    @property
    def device(self) -> torch.device: ...

    def __call__(self, *inputs: Tensor) -> list[Tensor]: ...


def in_order(contract: Contract, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Picture first, vectors after, sorted into the file's own order of inputs."""
    places = sorted(range(len(contract.inputs)), key=lambda place: -len(contract.inputs[place][1]))
    ordered: list[Tensor] = list(inputs)
    for place, tensor in zip(places, inputs, strict=True):
        ordered[place] = tensor
    return ordered


def can_batch(contract: Contract, backend: str) -> bool:
    """Swappers declare one picture and recognisers one row of output; onnxruntime holds them to it, torch does not."""
    values = contract.inputs if backend == "torch" else contract.inputs + contract.outputs
    is_open = all(not shape or shape[0] != 1 for _, shape in values)
    return is_open or (backend == "torch" and contract.kind == SWAPPER)


def run_all(network: Network, pictures: Tensor, *vectors: Tensor) -> Tensor:
    """First output for all pictures (n, 3, s, s), as many at a time as the network takes."""
    step = BATCH if network.batches else 1
    return torch.cat([network(part, *vectors)[0] for part in pictures.split(step)])


class Session:
    """An .onnx file in onnxruntime; insightface chooses the device and loads what that needs."""
    backend = "onnxruntime"

    def __init__(self, path: str | Path, contract: Contract):
        zoo = need("insightface")
        self.name, self.contract, self.batches = Path(path).name, contract, can_batch(contract, self.backend)
        try:
            options = zoo.onnxruntime.SessionOptions()
            options.log_severity_level = 3  # errors; a swapper's identity map, which no node uses, is worth a warning to it
            self.session = zoo.PickableInferenceSession(_source(path, contract), sess_options=options,
                                                        providers=zoo.get_default_providers())
        except Exception as error:  # the library raises errors of its own kinds
            raise LikenessError(f"onnxruntime cannot open {self.name} ({error}): download it again, or choose the back end "
                                "torch.") from error

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def provider(self) -> str:
        """What it really runs on: a wish that onnxruntime cannot fulfil ends on the CPU without an error."""
        return self.session.get_providers()[0].removesuffix("ExecutionProvider")

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        feed = {}
        for (name, _), tensor in zip(self.contract.inputs, in_order(self.contract, inputs), strict=True):
            feed[name] = tensor.detach().cpu().float().contiguous().numpy()
        wanted = [name for name, _ in self.contract.outputs]
        return [torch.from_numpy(array).float() for array in self.session.run(wanted, feed)]


def _to_float32(model: Any) -> Any:
    """The same network in float32: half precision on disk stays exact, and variances are not computed in half."""
    onnx = need("onnx")
    half, single = FLOAT16, onnx.TensorProto.FLOAT

    def widen(tensor: Any) -> None:
        if tensor.data_type == half:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype("float32"), tensor.name))

    for tensor in model.graph.initializer:
        widen(tensor)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == half:
                attribute.i = single
            if attribute.HasField("t"):
                widen(attribute.t)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type == half:
            value.type.tensor_type.elem_type = single
    return model


def _source(path: str | Path, contract: Contract) -> str | bytes:
    """What onnxruntime opens: the file itself, or the network of a half file in float32, as the other back end has it."""
    return _to_float32(read_graph(path)).SerializeToString() if contract.half else str(path)


def convert(path: str | Path, model: Any) -> tuple[nn.Module, str]:
    """A parsed file as a torch module in float32, its positional inputs in the file's order; and a note for the artist where
    onnx2torch doubts its numbers and nothing is there to compare them with.

    Raises LikenessError for an operator that onnx2torch does not know or gives other numbers for; `model` may be changed."""
    onnx2torch, name = need("onnx2torch"), Path(path).name
    contract = contract_of(model)
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            module = onnx2torch.convert(_to_float32(model)).eval().requires_grad_(False)
    except Exception as error:  # the library raises errors of its own kinds
        raise LikenessError(f"The file {name} cannot be converted for the back end torch ({error}): choose onnxruntime."
                            ) from error
    doubts = [str(warning.message) for warning in heard if "differ" in str(warning.message)]
    if not doubts:
        return module, ""
    if not there("onnxruntime"):
        return module, (f"{name} runs in torch unchecked: onnx2torch warns that its numbers may differ ({doubts[0]}), and "
                        "onnxruntime, which would tell, is not installed")
    if not _agrees(module, path, contract):
        raise LikenessError(f"The file {name} cannot be converted for the back end torch without another result "
                            f"({doubts[0]}): choose onnxruntime.")
    return module, ""


def _agrees(module: nn.Module, path: str | Path, contract: Contract) -> bool:
    """Whether a converted module gives what onnxruntime gives, on one random input. onnx2torch warns of some ways of resizing
    that torch does not have; for whole factors most of them are the same."""
    session = need("onnxruntime").InferenceSession(_source(path, contract), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.rand([side or (1 if place == 0 else PROBE) for place, side in enumerate(shape)], generator=generator)
              for _, shape in contract.inputs]
    feed = {name: tensor.numpy() for (name, _), tensor in zip(contract.inputs, inputs, strict=True)}
    with torch.inference_mode():
        out = module(*inputs)
        pairs = zip([out] if isinstance(out, Tensor) else out, map(torch.from_numpy, session.run(None, feed)), strict=True)
        return all(bool((a - b).abs().max() <= 1e-3 * max(1.0, float(b.abs().max()))) for a, b in pairs)
