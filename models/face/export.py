"""Finishing touches on exported networks, so that they keep the contracts of the public files."""
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from .contract import EMAP, LICENCE_KEY, SPACE_KEY
from .libraries import need


def to_half(model: Any) -> Any:
    """Weights and arithmetic in float16 between casts; inputs and outputs stay float32, as in inswapper_128_fp16."""
    onnx = need("onnx")
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    graph = model.graph
    fixed = {name for node in graph.node if node.op_type == "Resize" for name in node.input[1:]}  # scales are float32 for ever

    def narrow(tensor: Any) -> None:
        if tensor.data_type == single:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype("float16"), tensor.name))

    for tensor in graph.initializer:
        if tensor.name not in fixed:
            narrow(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value" and node.output[0] not in fixed:
                narrow(attribute.t)
    for node in graph.node:
        for places, values in ((node.input, graph.input), (node.output, graph.output)):
            for index, name in enumerate(places):
                if any(name == value.name for value in values):
                    places[index] = f"{name}.half"
    casts = [onnx.helper.make_node("Cast", [value.name], [f"{value.name}.half"], to=half) for value in graph.input]
    ends = [onnx.helper.make_node("Cast", [f"{value.name}.half"], [value.name], to=single) for value in graph.output]
    nodes = [*casts, *graph.node, *ends]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    return model


def without_copies(model: Any) -> Any:
    """Layers take a shared weight itself, not a copy that a node makes of it: converters to torch look for it by its name."""
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    copies = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Identity" and node.input[0] in weights}
    kept = [node for node in graph.node if node.output[0] not in copies]
    for node in kept:
        for index, name in enumerate(node.input):
            node.input[index] = copies.get(name, name)
    del graph.node[:]
    graph.node.extend(kept)
    return model


def write(model: Any, path: Path, space: str, command: str, emap: Tensor | None = None) -> None:
    """Saves the network whole or not at all, with the name of its embeddings, the command that made it and, for a swapper, its
    identity map."""
    onnx = need("onnx")
    if emap is not None:
        model.graph.initializer.append(onnx.numpy_helper.from_array(emap.half().numpy(), EMAP))
    onnx.helper.set_model_props(model, {SPACE_KEY: space, LICENCE_KEY: "drawn and trained by this pack, GPL-3.0",
                                         "likeness.command": command})
    model.doc_string = ""
    for node in model.graph.node:
        node.doc_string = ""
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    onnx.save(model, str(part))
    os.replace(part, path)
