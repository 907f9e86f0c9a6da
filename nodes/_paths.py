"""Where files lie: with the root, the only place that asks the host's folder_paths."""
from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import folder_paths

from ..models.common.errors import LikenessError

FOLDER, ENCODER_FOLDERS = "likeness", ("likeness", "clip_vision")
PHOTOMAKER, INSTANTID = "photomaker", "instantid"  # the host knows the first
SUBJECTS, INVERSIONS, FACES = "subjects", "inversions", "faces"  # what our own nodes save
INSIGHTFACE = "insightface"
MINIATURE = "miniature (ships with the pack)"  # the face pack for the heads of creatures
_MINIATURE_FACES = Path(__file__).parent.parent / "models" / "demo" / "weights" / "faces"
NO_FILE = "(no file in models/likeness)"
_ENDINGS = (".safetensors", ".sft")


def register() -> None:
    """Make our model folders known to the host beside those that the artist's own settings named."""
    for folder in (FOLDER, INSTANTID):
        folder_paths.add_model_folder_path(folder, os.path.join(folder_paths.models_dir, folder))
        paths, endings = folder_paths.folder_names_and_paths[folder]
        folder_paths.folder_names_and_paths[folder] = (paths, set(endings) | folder_paths.supported_pt_extensions)
    known = INSIGHTFACE in folder_paths.folder_names_and_paths
    folder_paths.add_model_folder_path(INSIGHTFACE, os.path.join(folder_paths.models_dir, INSIGHTFACE))
    paths, endings = folder_paths.folder_names_and_paths[INSIGHTFACE]
    if endings or not known:  # an empty set, as another pack may have left it, lists every file
        folder_paths.folder_names_and_paths[INSIGHTFACE] = (paths, set(endings) | {".onnx"})


def _names(folder: str) -> list[str]:
    try:
        names = folder_paths.get_filename_list(folder)
    except FileNotFoundError:  # the host trips over a folder that was deleted since it looked, and the node would be gone
        folder_paths.filename_list_cache.pop(folder, None)
        names = folder_paths.get_filename_list(folder)
    return [name for name in names if folder != FOLDER or Path(name).parts[0] not in (SUBJECTS, INVERSIONS, FACES)]


def adapter_files() -> list[str]:
    """Choices of a loader for adapters."""
    return _names(FOLDER) or [NO_FILE]


def encoder_files() -> list[str]:
    """Choices of a loader for encoders, from both folders."""
    return sorted({name for folder in ENCODER_FOLDERS for name in _names(folder)}) or [NO_FILE]


def no_file(folder: str) -> str:
    """The only choice of a loader while its folder is empty."""
    return NO_FILE if folder == FOLDER else f"(no file in models/{folder})"


def model_files(folder: str) -> list[str]:
    """Choices of a loader for the files of one folder."""
    return _names(folder) or [no_file(folder)]


def whole_models(folders: Iterable[str]) -> list[str]:
    """Choices of a loader for whole models, from all these folders."""
    return sorted({name for folder in folders for name in _names(folder)})


def find(name: str | None, folders: Iterable[str]) -> Path | None:
    """The file of that name in the first of the folders that has it; None also for a name not known yet."""
    for folder in folders:
        path = folder_paths.get_full_path(folder, name) if name else None
        if path is not None:
            return Path(path)
    return None


def missing(name: str, folders: Iterable[str]) -> str:
    """The sentence for a model file that is not there; it names every folder that was searched."""
    places = " or ".join(place for folder in folders for place in folder_paths.get_folder_paths(folder))
    if name in map(no_file, folders) and name != NO_FILE:
        return f"There is no model file for this node yet; put one into {places} and press R."
    if name == NO_FILE:
        return (f"There is no model file for this node yet; put one into {places} and press R, or use Load "
                "Miniature World, which needs no file.")
    return f"The file {name} is not in {places}; put it there and press R, or choose another file."


def face_files() -> dict[str, Path]:
    """Every .onnx file below the folders of insightface, by its name there, and the miniature's last."""
    names = (name for name in _names(INSIGHTFACE) if name.lower().endswith(".onnx"))
    found = {name: Path(path) for name in names if (path := folder_paths.get_full_path(INSIGHTFACE, name)) is not None}
    return found | {f"{MINIATURE}/{path.name}": path for path in sorted(_MINIATURE_FACES.glob("*.onnx"))}


def face_packs() -> dict[str, list[Path]]:
    """Name of each face pack -> its files: folders below insightface or insightface/models, NAME inside NAME as one."""
    packs: dict[str, list[Path]] = {}
    for name, path in face_files().items():
        parts = [part for part in Path(name).parent.parts if part != "models"]
        if len(parts) > 1 and parts[-1] == parts[-2]:
            parts.pop()
        if parts:
            packs.setdefault("/".join(parts), []).append(path)
    return packs


def loose_face_files() -> dict[str, Path]:
    """.onnx files that lie in no pack, such as swappers."""
    packed = {path for paths in face_packs().values() for path in paths}
    return {name: path for name, path in face_files().items() if path not in packed}


def face_folders() -> list[str]:
    """Folders that are searched for face files."""
    return list(folder_paths.get_folder_paths(INSIGHTFACE))


def missing_pack(name: str) -> str:
    """The sentence for a face pack that is not there."""
    places = " or ".join(os.path.join(place, "models") for place in face_folders())
    return (f"The face pack {name} is not there; put a folder such as buffalo_l or antelopev2 with its .onnx files into {places} "
            "and press R; Check Files says what belongs in it.")


def encoder_candidates() -> list[Path]:
    """Files that may hold an encoder, quick ones first: only safetensors can be told from the header."""
    paths = [Path(path) for folder in ENCODER_FOLDERS for name in _names(folder)
             if (path := folder_paths.get_full_path(folder, name)) is not None]
    return sorted(dict.fromkeys(paths), key=lambda path: path.suffix.lower() not in _ENDINGS)


def stamp(*paths: Path | None) -> str:
    """Changes when one of the files does."""
    out = []
    for path in paths:
        try:
            stat = path.stat() if path is not None else None
        except OSError:
            stat = None
        out.append(f"{path}:{stat.st_mtime_ns}:{stat.st_size}" if stat else f"{path}:none")
    return "|".join(out)


def embeddings() -> Any:
    """Folders of textual inversions."""
    return folder_paths.get_folder_paths("embeddings")


def _folder(kind: str) -> Path:
    return Path(folder_paths.get_output_directory()) / FOLDER / kind


def _reactor() -> Path:
    return Path(folder_paths.models_dir) / "reactor" / "faces"


def saved_files(kind: str) -> dict[str, Path]:
    """Choices of a loader of `kind`: saved ones, those in the input folder, those beside the models."""
    places = [(_folder(kind), "output", True), (Path(folder_paths.get_input_directory()), "input", False)]
    places += [(Path(folder) / kind, "models", True) for folder in folder_paths.get_folder_paths(FOLDER)]
    if kind == FACES:
        places.append((_reactor(), "reactor", True))
    out: dict[str, Path] = {}
    for folder, where, deep in places:
        found = (folder.rglob("*") if deep else folder.glob("*")) if folder.is_dir() else ()
        files = (path for path in found if path.suffix.lower() in _ENDINGS and path.is_file())
        for path in sorted(files):
            out.setdefault(f"{path.relative_to(folder).as_posix()} [{where}]", path)
    return out


def nothing_saved(kind: str) -> str:
    """The only choice of a loader while there is no file."""
    return f"(no saved {kind[:-1]})"


def missing_saved(kind: str, name: str) -> str:
    """The sentence for a saved file that is not there."""
    folders = [Path(folder) / kind for folder in folder_paths.get_folder_paths(FOLDER)]
    folders += [_reactor()] if kind == FACES else []
    places = ", ".join(map(str, (_folder(kind), folder_paths.get_input_directory(), *folders)))
    one = kind[:-1]
    what = f"There is no saved {one} yet" if name == nothing_saved(kind) else f"The saved {one} {name} is not there"
    node = f"Save {kind.capitalize() if kind == FACES else one.capitalize()}"
    return f"{what}; use {node}, or put one into {places}, and press R."


def new_path(kind: str, prefix: str) -> Path:
    """A free name below output/likeness/<kind>, numbered like the host's pictures. Raises LikenessError."""
    try:
        folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, str(_folder(kind)))
    except Exception as error:  # the host raises a bare Exception
        raise LikenessError(f"The name {prefix} leads out of the folder {_folder(kind)}; use a plain name, such as cat."
                            ) from error
    return Path(folder) / f"{name}_{counter:05}_.safetensors"
