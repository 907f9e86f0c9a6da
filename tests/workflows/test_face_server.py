"""Faces on a real server: files in folders, the swap in a saved picture, and what that picture says about itself."""
from __future__ import annotations

import json
from io import BytesIO

import pytest

from harness import face_pack


@pytest.fixture(scope="module")
def open_studio(host, make_server, tmp_path_factory):
    """Function: flags -> a server with a synthetic pack under the name buffalo_l and a scene with two faces."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("insightface")
    face_pack.pack(folder)
    face_pack.swapper(folder / face_pack.SWAPPER)

    def make(*flags):
        server = make_server(model_folders={"insightface": folder}, flags=flags)
        for name, faces in (("scene", ((200, 160, 24), (448, 304, 48))), ("person", ((320, 240, 48),))):
            Image.fromarray(face_pack.scene(faces=faces)).save(server.input / f"{name}.png")
        return server

    return make


@pytest.fixture(scope="module")
def studio(open_studio):
    return open_studio()


def call(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def graph(prefix="swap", **changes):
    prompt = {
        "models": call("Likeness_LoadFaceModels", pack="buffalo_l", backend="auto"),
        "swapper": call("Likeness_LoadFaceSwapper", file=face_pack.SWAPPER, backend="auto"),
        "scene": call("LoadImage", image="scene.png"),
        "person": call("LoadImage", image="person.png"),
        "source": call("Likeness_AnalyzeFaces", face_models=["models", 0], image=["person", 0], detection_size="640",
                       threshold=0.5, on_missing="error"),
        "swap": call("Likeness_SwapFaces", swapper=["swapper", 0], image=["scene", 0], source=["source", 0],
                     face_models=["models", 0], boost=1, mask_kind="hull", identity_weight=1.0, colour_match=0.0,
                     restore_visibility=1.0, on_missing="error", assign="in turn", feather=0.15, smoothing=0,
                     detection_size="640", threshold=0.5),
        "save": call("SaveImage", images=["swap", 0], filename_prefix=prefix),
    }
    for name, values in changes.items():
        prompt[name]["inputs"].update(values)
    return prompt


def chunk(result):
    """The `prompt` text of the saved PNG."""
    from PIL import Image

    return json.loads(Image.open(BytesIO(result.images["save"][0])).text["prompt"])


def test_the_saved_picture_names_the_swap_on_a_first_and_a_cached_run(studio):
    first = studio.run(graph())
    assert first.ok, first.error
    again = studio.run(graph(prefix="again"))
    assert "swap" in first.executed and "swap" not in again.executed and "save" in again.executed
    for result in (first, again):
        node = chunk(result)["swap"]
        assert node["class_type"] == "Likeness_SwapFaces"
        assert node["inputs"]["source"] == ["source", 0] and node["inputs"]["identity_weight"] == 1.0
    assert chunk(first)["person"]["inputs"] == {"image": "person.png"}


def test_without_metadata_the_saved_picture_says_nothing(open_studio):
    """As README and help say: who starts the host so gets no trace of the swap."""
    from PIL import Image

    result = open_studio("--disable-metadata").run(graph())
    assert result.ok and "swap" in result.executed, result.error
    (data,) = result.images["save"]
    assert not Image.open(BytesIO(data)).text and b"Likeness" not in data


def test_a_scene_without_faces_stops_with_one_sentence(studio):
    result = studio.run(graph(swap={"threshold": 0.95, "detection_size": "192"}))
    assert result.status == "error" and "No face to swap was found in picture 1 of 1" in result.error
    # the host prints the inputs of a node that fails into its history: all but the pictures are words of ours
    inputs = next(data["current_inputs"] for name, data in result.history["status"]["messages"] if name == "execution_error")
    told = json.dumps({name: value for name, value in inputs.items() if name != "image"})
    assert "embedding of 512 numbers" in told and "tensor(" not in told


def test_the_menus_hold_the_files_and_check_files_tells_of_them(studio):
    info = studio.object_info(fresh=True)
    assert "buffalo_l" in json.dumps(info["Likeness_LoadFaceModels"]["input"]["required"]["pack"])
    result = studio.run({"check": call("Likeness_CheckFiles", hashes=False),
                         "show": call("PreviewAny", source=["check", 0])})
    assert result.ok, result.error
