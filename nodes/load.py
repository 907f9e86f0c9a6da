"""Loaders: adapters with their encoders, encoders alone, and the miniature world that ships with the pack."""
from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io

from ..models.common.errors import LikenessError
from ..models.hosting import demo
from ..models.hosting.adapters import Adapter, load_adapter, load_encoders, wanted_encoders
from ..models.hosting.encoders import Encoder, Encoders, load_encoder, match, says_mae
from . import _paths, _types

NO_SECOND, IGNORE = "none", "ignore"


def _path(name: str, folders: tuple[str, ...]) -> Path:
    path = _paths.find(name, folders)
    if path is None:
        raise LikenessError(_paths.missing(name, folders))
    return path


def _there(name: str | None, folders: tuple[str, ...]) -> bool | str:
    """For validate_inputs, which sees None for a name that comes by a link."""
    return True if name is None or _paths.find(name, folders) else _paths.missing(name, folders)


def _encoder_lines(items: tuple[Encoder, ...], paths: list[Path], hashes: tuple[str, ...] = ()) -> list[str]:
    lines = []
    for number, (item, path) in enumerate(zip(items, paths, strict=True), 1):
        wanted = hashes[number - 1] if number <= len(hashes) else ""
        same = item.is_file(wanted)
        other = "" if same else "; not the very file of the training"
        if not same and item.config.family == "mae" and not says_mae(path):
            other += (". WARNING: a plain ViT, trained for something else, has the same tensors, and nothing in this file says "
                      "that it is an MAE; with a wrong one the likeness is lost")
        lines.append(f"encoder {number}: {item.config.family}, width {item.config.width}: {path.name} from "
                     f"{path.parent}{other}")
    return lines


def _adapter_lines(adapter: Adapter) -> list[str]:
    config, metadata = adapter.config, dict(adapter.metadata)
    lines = [f"{adapter.name}: method {adapter.method} for {config.base}, text width {config.width}, "
             f"{len(config.layers)} layers"]
    if adapter.found_base:
        use = "used in place of the checkpoint's" if adapter.base_weights else "ignored"
        lines.append(f"the file also holds {adapter.found_base} tensors of a base model: {use}")
    if metadata.get("dataset_license"):
        lines.append(f"licence of its training data: {metadata['dataset_license']}")
    return lines


class LoadAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_LoadAdapter",
            display_name="Load Subject Adapter",
            category=_types.LOAD,
            description="Loads a subject adapter, the file that teaches a model to take a subject from a "
                        "picture, together with the vision encoders that it was trained with.",
            search_aliases=["ipadapter", "custany", "subject adapter", "reference adapter",
                            "load ipadapter", "faceid"],
            inputs=[
                io.Combo.Input(
                    "file", options=_paths.adapter_files(),
                    tooltip="Adapter file from models/likeness. The method is told from its contents, so "
                            "any file name will do.",
                ),
                io.Combo.Input(
                    "base_weights", options=[IGNORE, "apply"], default=IGNORE, optional=True, advanced=True,
                    tooltip="For RealCustom++ files that also hold a whole base model: ignore it and keep your "
                            "checkpoint, or apply it in the injector. The text output says what was found.",
                ),
            ],
            outputs=[
                _types.Adapter.Output(
                    display_name="adapter",
                    tooltip="The adapter. Goes to ID Extractor, Layer Weights and Load Subject.",
                ),
                _types.Encoders.Output(
                    display_name="encoders",
                    tooltip="The vision encoders that this adapter needs, found among your files by their "
                            "contents. Goes to ID Extractor.",
                ),
                io.String.Output(
                    display_name="text",
                    tooltip="What was loaded: method, base model, and which encoder files were taken from "
                            "which folder.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        return _there(file, (_paths.FOLDER,))

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, **others: object) -> str:
        return _paths.stamp(_paths.find(file, (_paths.FOLDER,)), *_paths.encoder_candidates())

    @classmethod
    def execute(cls, file: str, base_weights: str = IGNORE) -> io.NodeOutput:
        path = _path(file, (_paths.FOLDER,))
        adapter = load_adapter(path, base_weights != IGNORE)
        wanted, hashes, registers = wanted_encoders(adapter)
        paths = match(wanted, hashes, [other for other in _paths.encoder_candidates() if other != path], registers)
        encoders = load_encoders(adapter, paths)
        text = "\n".join([*_adapter_lines(adapter), *_encoder_lines(encoders.items, paths, hashes)])
        return io.NodeOutput(adapter, encoders, text)


class LoadEncoders(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = _paths.encoder_files()
        return io.Schema(
            node_id="Likeness_LoadEncoders",
            display_name="Load Vision Encoders",
            category=_types.LOAD,
            description="Loads vision encoders by hand, for experts. Load Subject Adapter finds the right "
                        "ones by itself.",
            search_aliases=["dinov2", "mae", "siglip", "clip vision", "image encoder",
                            "ipadapter clip vision"],
            inputs=[
                io.Combo.Input(
                    "first", options=names,
                    tooltip="Encoder file from models/likeness or models/clip_vision: DINOv2, MAE, SigLIP "
                            "or CLIP vision.",
                ),
                io.Combo.Input(
                    "second", options=[NO_SECOND, *(name for name in names if name != _paths.NO_FILE)],
                    default=NO_SECOND,
                    tooltip="Second encoder, for adapters that read two. The order is that of the adapter's "
                            "training.",
                ),
            ],
            outputs=[
                _types.Encoders.Output(
                    display_name="encoders",
                    tooltip="The encoders in this order. Goes to ID Extractor.",
                ),
                io.String.Output(display_name="text", tooltip="Family, width and place of each encoder."),
            ],
        )

    @classmethod
    def validate_inputs(cls, first: str | None = None) -> bool | str:
        return _there(first, _paths.ENCODER_FOLDERS)

    @classmethod
    def fingerprint_inputs(cls, first: str | None = None, second: str | None = None, **others: object) -> str:
        return _paths.stamp(*(_paths.find(name, _paths.ENCODER_FOLDERS) for name in (first, second)))

    @classmethod
    def execute(cls, first: str, second: str) -> io.NodeOutput:
        names = [first] if second == NO_SECOND else [first, second]
        paths = [_path(name, _paths.ENCODER_FOLDERS) for name in names]
        encoders = Encoders(tuple(load_encoder(path) for path in paths))
        return io.NodeOutput(encoders, "\n".join(_encoder_lines(encoders.items, paths)))


class LoadDemo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_LoadDemo",
            display_name="Load Miniature World",
            category=_types.LOAD,
            description="A tiny text-to-image model of small creatures with a trained adapter. It ships "
                        "with the pack, needs no download and paints within seconds on a CPU: the place to "
                        "try every method.",
            search_aliases=["demo", "example model", "miniature", "tiny model", "likeness demo", "subject",
                            "reference"],
            inputs=[
                io.Combo.Input(
                    "method", options=demo.available(),
                    tooltip="Which method's adapter to load with the miniature.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="The miniature diffusion model, 64 x 64 pixels; a model like any other.",
                ),
                io.Clip.Output(
                    display_name="clip",
                    tooltip="Its text encoder. It knows the words of this world, see the help page.",
                ),
                io.Vae.Output(display_name="vae", tooltip="Its first stage, for VAE Encode and VAE Decode."),
                _types.Adapter.Output(
                    display_name="adapter",
                    tooltip="The subject adapter of the chosen method.",
                ),
                _types.Encoders.Output(
                    display_name="encoders",
                    tooltip="The vision encoders of that adapter.",
                ),
            ],
        )

    @classmethod
    def execute(cls, method: str) -> io.NodeOutput:
        adapter, encoders = demo.load_method(method)
        return io.NodeOutput(*demo.load_base(_paths.embeddings()), adapter, encoders)


NODES = [LoadAdapter, LoadEncoders, LoadDemo]
