"""Face packs, swappers and saved faces: loaders, the saver, and what is missing."""
from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io, ui

from ..models.common.errors import LikenessError
from ..models.face.faces import Faces
from ..models.face.report import check
from ..models.face.storage import load_faces, save_faces
from ..models.hosting.face import BACKENDS, load_models, load_swapper
from ..models.hosting.memory import counted
from . import _paths, _types

_BACKEND = ("What the networks run on. torch: under ComfyUI's memory manager, any graphics card. onnxruntime: insightface's "
            "own way. auto takes torch on a card and onnxruntime on a CPU.")


def _packs() -> list[str]:
    packs = _paths.face_packs()
    return sorted(packs, key=lambda name: (name == _paths.MINIATURE, name != "buffalo_l", name))


def _swappers() -> list[str]:
    return sorted(_paths.face_files(), key=lambda name: ("swap" not in name.lower(), name.startswith(_paths.MINIATURE), name))


def _no_swapper(file: str) -> str:
    places = " or ".join(_paths.face_folders())
    return f"The file {file} is not in {places}; put inswapper_128.onnx into {places} and press R."


class LoadFaceModels(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_LoadFaceModels",
            display_name="Load Face Models",
            category=_types.LOAD,
            description="Loads an insightface pack: the networks that find and recognise faces. buffalo_l serves Face Swap and "
                        "PhotoMaker v2, antelopev2 serves InstantID.",
            search_aliases=["insightface", "buffalo_l", "antelopev2", "faceid", "instantid face analysis", "reactor",
                            "face analysis", "arcface"],
            inputs=[
                io.Combo.Input(
                    "pack", options=_packs(),
                    tooltip="Folder of .onnx files in models/insightface/models. Which file does what is told from its "
                            "contents.",
                ),
                io.Combo.Input("backend", options=list(BACKENDS), default=BACKENDS[0], tooltip=_BACKEND),
            ],
            outputs=[
                _types.FaceModels.Output(
                    display_name="face_models",
                    tooltip="The networks. Goes to Analyze Faces and Face Swap.",
                ),
                io.String.Output(
                    display_name="text",
                    tooltip="Every file of the pack with its use, where it runs, the name of the embeddings and the licence.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, pack: str | None = None) -> bool | str:
        return True if pack is None or pack in _paths.face_packs() else _paths.missing_pack(pack)

    @classmethod
    def fingerprint_inputs(cls, pack: str | None = None, **others: object) -> str:
        return _paths.stamp(*_paths.face_packs().get(pack or "", ()))

    @classmethod
    def execute(cls, pack: str, backend: str) -> io.NodeOutput:
        paths = _paths.face_packs().get(pack)
        if not paths:
            raise LikenessError(_paths.missing_pack(pack))
        return io.NodeOutput(*load_models(paths[0].parent, backend, paths))


class LoadFaceSwapper(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_LoadFaceSwapper",
            display_name="Load Face Swapper",
            category=_types.LOAD,
            description="Loads the network that swaps faces, inswapper_128 in full or half precision.",
            search_aliases=["inswapper", "reactor", "face swap model", "roop", "insightface swapper", "faceswap"],
            inputs=[
                io.Combo.Input(
                    "file", options=_swappers(),
                    tooltip="An .onnx file from models/insightface. It must hold the identity map, which cleaned files lose.",
                ),
                io.Combo.Input("backend", options=list(BACKENDS), default=BACKENDS[0], tooltip=_BACKEND),
            ],
            outputs=[
                _types.FaceSwapper.Output(display_name="swapper", tooltip="The swapper. Goes to Face Swap."),
                io.String.Output(
                    display_name="text",
                    tooltip="Its size, where it runs, which embeddings it takes, and the licence.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        return True if file is None or file in _paths.face_files() else _no_swapper(file)

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, **others: object) -> str:
        return _paths.stamp(_paths.face_files().get(file or ""))

    @classmethod
    def execute(cls, file: str, backend: str) -> io.NodeOutput:
        path = _paths.face_files().get(file)
        if path is None:
            raise LikenessError(_no_swapper(file))
        return io.NodeOutput(*load_swapper(path, backend))


class SaveFaces(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_SaveFaces",
            display_name="Save Faces",
            category=_types.FACE,
            description="Writes faces into output/likeness/faces, in the layout of ReActor's face models. The file holds "
                        "numbers that identify a person: keep it as carefully as a passport picture.",
            search_aliases=["save face model", "reactor save face model", "export face", "store face", "face embeds"],
            inputs=[
                _types.Faces.Input("faces", tooltip="The faces to keep, of Select Faces or Blend Faces."),
                io.String.Input(
                    "filename_prefix", default="face",
                    tooltip="Name of the file below output/likeness/faces; a number is added. Sub-folders and date marks work "
                            "as in Save Image.",
                ),
            ],
            outputs=[io.String.Output(display_name="text", tooltip="Path of the written file.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, faces: Faces, filename_prefix: str) -> io.NodeOutput:
        path = _paths.new_path(_paths.FACES, filename_prefix)
        save_faces(path, faces)
        return io.NodeOutput(str(path), ui=ui.PreviewText(str(path)))


class LoadFaces(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_LoadFaces",
            display_name="Load Faces",
            category=_types.FACE,
            description="Reads faces that Save Faces wrote, or a face model of ReActor.",
            search_aliases=["load face model", "reactor load face model", "import face", "face embeds", "saved face"],
            inputs=[
                io.Combo.Input(
                    "file", options=list(_paths.saved_files(_paths.FACES)) or [_paths.nothing_saved(_paths.FACES)],
                    tooltip="Saved faces from output/likeness/faces, from input, from models/likeness/faces or from "
                            "models/reactor/faces. Press R after saving new ones.",
                ),
            ],
            outputs=[
                _types.Faces.Output(display_name="faces", tooltip="The faces, as source of Face Swap or as a reference."),
                io.String.Output(display_name="text", tooltip="How many, in which space, and who wrote the file."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        known = file is None or file in _paths.saved_files(_paths.FACES)
        return True if known else _paths.missing_saved(_paths.FACES, file)

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, **others: object) -> str:
        return _paths.stamp(_paths.saved_files(_paths.FACES).get(file or ""))

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        path = _paths.saved_files(_paths.FACES).get(file)
        if path is None:
            raise LikenessError(_paths.missing_saved(_paths.FACES, file))
        return io.NodeOutput(*load_faces(path))


class CheckFiles(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_CheckFiles",
            display_name="Check Files",
            category=_types.MEASURE,
            description="Looks at every face file: what it is, whether it is whole, what is missing and where it goes; and which "
                        "installed packages own OpenCV and onnxruntime.",
            search_aliases=["insightface", "missing model", "face files", "doctor", "check models", "where do files go"],
            inputs=[
                io.Boolean.Input(
                    "hashes", default=True,
                    tooltip="Compare the files with the published SHA-256 sums. Off saves some seconds for large files.",
                ),
            ],
            outputs=[io.String.Output(display_name="text", tooltip="The report, one line a file.")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, hashes: bool = True, **others: object) -> str:
        return _paths.stamp(*map(Path, _paths.face_folders()), *_paths.face_files().values())

    @classmethod
    def execute(cls, hashes: bool) -> io.NodeOutput:
        loose = [path for _, path in sorted(_paths.loose_face_files().items())]
        packs = _paths.face_packs()
        every = [*loose, *(path for paths in packs.values() for path in paths)]
        text = check(_paths.face_folders(), packs, loose, hashes, counted(sum(path.stat().st_size for path in every)))
        return io.NodeOutput(text, ui=ui.PreviewText(text))


NODES = [LoadFaceModels, LoadFaceSwapper, SaveFaces, LoadFaces, CheckFiles]
