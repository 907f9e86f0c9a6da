"""The pack's nodes on a real server: listed, explained, and the whole subject graph from a picture file on disk."""
from __future__ import annotations

import json
import shutil
from io import BytesIO

import pytest

from harness import mini, paths, schemas
from harness.canvas_inputs import EDITORS, inputs_of

GOLDEN = json.loads(schemas.GOLDEN.read_text(encoding="utf-8")) if schemas.GOLDEN.is_file() else {}


@pytest.fixture(scope="module")
def world(host, server):
    """The server with a miniature: the shipped weights, or random ones in its own copy of the pack."""
    weights = server.base / "custom_nodes" / paths.PACK_FOLDER / "models" / "demo" / "weights"
    if not (weights / mini.ADAPTER).is_file():
        mini.make_weights(weights)
    import torch
    from PIL import Image

    picture = (torch.rand(60, 80, 4, generator=torch.Generator().manual_seed(0)) * 255).byte()
    picture[..., 3] = 0
    picture[10:50, 20:60, 3] = 255
    Image.fromarray(picture.numpy()).save(server.input / "creature.png")
    return server


def link(name, place=0):
    return [name, place]


def call(class_type, **inputs):
    return {"class_type": f"Likeness_{class_type}", "inputs": inputs}


def core(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def pixels(result, name="save"):
    """The picture itself: the file also holds the graph that made it."""
    import torch
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    return torch.stack([pil_to_tensor(Image.open(BytesIO(data))) for data in result.images[name]])


def same(one, other):
    return bool((pixels(one) == pixels(other)).all())


def graph(**changes):
    """Picture file -> subject -> picture, with every node of this issue that needs no file of its own."""
    prompt = {
        "demo": call("LoadDemo", method="CustAny"),
        "file": core("LoadImage", image="creature.png"),
        "mask": core("InvertMask", mask=link("file", 1)),
        "cut": call("PrepareReference", image=link("file"), mask=link("mask"), preset="subject on white", margin=0.1,
                    size=64, on_missing="error"),
        "cut_image": core("SaveImage", images=link("cut"), filename_prefix="cut"),
        "id": call("ExtractID", adapter=link("demo", 3), encoders=link("demo", 4), image=link("file"),
                   mask=link("mask"), combine="concat", on_missing="error"),
        "text": call("EncodePrompt", clip=link("demo", 1), text="a photo of a cat in the snow", word="cat",
                     occurrence=0, on_missing="error"),
        "empty": core("CLIPTextEncode", clip=link("demo", 1), text=""),
        "layers": call("LayerWeights", adapter=link("demo", 3), preset="custom", coarse=1.0, middle=1.0, fine=0.5,
                       fade_first=1.0, fade_last=1.0),
        "blend": call("BlendSubjects", subject_a=link("id"), subject_b=link("id"), weight=0.5, mode="concat"),
        "inject": call("DualLevelInjector", model=link("demo"), positive=link("text"), negative=link("empty"),
                       subject=link("blend"), word=link("text", 1), preset="custom", global_strength=1.0,
                       local_strength=1.0, start_percent=0.0, end_percent=1.0, layer_weights=link("layers")),
        "latent": core("EmptyLatentImage", width=64, height=64, batch_size=1),
        "sampler": core("KSampler", model=link("inject"), positive=link("inject", 1), negative=link("inject", 2),
                        latent_image=link("latent"), seed=3, steps=3, cfg=4.0, sampler_name="euler",
                        scheduler="normal", denoise=1.0),
        "pixels": core("VAEDecode", samples=link("sampler"), vae=link("demo", 2)),
        "save": core("SaveImage", images=link("pixels"), filename_prefix="creature"),
    }
    for name, values in changes.items():
        prompt[name]["inputs"].update(values)
    return prompt


def test_every_node_is_listed_as_the_golden_file_says(server):
    info = {name: entry for name, entry in server.object_info().items() if name.startswith("Likeness_")}
    assert set(info) == set(GOLDEN) and GOLDEN
    for name, entry in info.items():
        golden = GOLDEN[name]
        assert (entry["display_name"], entry["category"]) == (golden["display_name"], golden["category"])
        sections = {"required": [], "optional": []}
        for item in golden["inputs"]:
            sections["optional" if item.get("optional") else "required"].append(item["id"])
        for section, names in sections.items():
            assert entry["input_order"].get(section, []) == names, name
        assert entry["output"] == [item["type"] for item in golden["outputs"]]
        assert entry["output_name"] == [item["name"] for item in golden["outputs"]]
        assert all(entry["output_tooltips"]) and entry["search_aliases"]


def test_sockets_of_core_types_grow_no_editor(server):
    """The page sends an editor's value with every run: a box of its own would take the place of Placement's numbers."""
    info = server.get("/object_info")
    seen = [item.type for name in GOLDEN for item in inputs_of(info[name]) if item.type in EDITORS and not item.widget]
    grown = [f"{name} {item.name}" for name in GOLDEN for item in inputs_of(info[name]) if item.type in EDITORS and item.widget]
    assert sorted(seen) == ["BOUNDING_BOX"] * 2 + ["CURVE"] * 2 and not grown


def test_pages_and_names_reach_the_browser(server):
    names = server.get("/i18n")["en"]
    for node_id in GOLDEN:
        page = server.get_bytes(f"/extensions/{paths.PACK_FOLDER}/docs/{node_id}.md").decode()
        assert page.startswith(f"# {GOLDEN[node_id]['display_name']}")
        assert names["nodeDefs"][node_id]["display_name"] == GOLDEN[node_id]["display_name"]
    assert names["dataTypes"]["LIKENESS_SUBJECT"] and names["nodeCategories"]["2 subject"]


def test_from_a_picture_file_to_a_picture(world):
    result = world.run(graph())
    assert result.ok, result.error
    assert result.images["save"][0].startswith(b"\x89PNG") and result.images["cut_image"]
    assert result.images["id"], "ID Extractor shows on the node what the encoder saw"
    plain = world.run(graph(inject={"global_strength": 0.0, "local_strength": 0.0}))
    assert plain.ok and not same(plain, result)
    assert "id" in plain.cached and "inject" in plain.executed
    world.free()
    again = world.run(graph(sampler={"seed": 4}))
    assert again.ok and not same(again, result)
    assert same(world.run(graph()), result), "the same graph gave another picture after all models were unloaded"


def test_a_saved_subject_gives_the_same_picture(world):
    prompt = graph()
    prompt["keep"] = call("SaveSubject", subject=link("blend"), filename_prefix="test/creature")
    made = world.run(prompt)
    assert made.ok, made.error
    path = made.outputs["keep"]["text"][0]
    assert path.endswith("creature_00001_.safetensors")
    choices = world.object_info(fresh=True)["Likeness_LoadSubject"]["input"]["required"]["file"][1]["options"]
    assert "test/creature_00001_.safetensors [output]" in choices
    prompt = graph(inject={"subject": link("load")})
    prompt["load"] = call("LoadSubject", file="test/creature_00001_.safetensors [output]", adapter=link("demo", 3),
                          accept_other_adapter=False, encoders=link("demo", 4))
    loaded = world.run(prompt)
    assert loaded.ok, loaded.error
    assert same(loaded, made) and "load" in loaded.executed


def test_a_curve_over_the_steps(world):
    if "CurveEditor" not in world.object_info():
        pytest.skip("this host has no Curve Editor")
    pictures = []
    for end in (1.0, 0.0):
        prompt = graph(inject={"curve": link("curve")})
        prompt["curve"] = core("CurveEditor", curve={"points": [[0.0, 1.0], [1.0, end]], "interpolation": "linear"})
        result = world.run(prompt)
        assert result.ok, result.error
        pictures.append(result)
    plain = world.run(graph())
    assert same(pictures[0], plain) and not same(pictures[1], plain)


@pytest.mark.parametrize(("changes", "status", "sentence"), [
    ({"text": {"word": "dog"}}, "error", "The word \"dog\" is not in the prompt"),
    ({"id": {"mask": ["black", 0]}}, "error", "The mask is empty"),
    ({"inject": {"start_percent": 0.9, "end_percent": 0.1}}, "invalid", "The subject would act from 0.9 to 0.1"),
    ({"inject": {"global_strength": 3.0}}, "invalid", "bigger than max"),
    ({"layers": {"overrides": "output.77: 1"}}, "error", "this adapter has the layers output.0.0"),
])
def test_the_artist_reads_one_sentence(world, changes, status, sentence):
    prompt = graph(**changes)
    prompt["black"] = core("SolidMask", value=0.0, width=80, height=60)
    del prompt["cut_image"]  # with another good output the host would run that one
    result = world.run(prompt)
    assert result.status == status and sentence in result.error


def test_loaders_without_files(world):
    result = world.run({"1": call("LoadAdapter", file="(no file in models/likeness)"),
                        "2": core("PreviewAny", source=link("1", 2))})
    assert result.status == "invalid" and str(world.base / "models" / "likeness") in result.error


def test_an_adapter_file_in_the_model_folder(world):
    """The artist's way: adapter and encoders as files, told by their contents, served after a press on R."""
    weights = world.base / "custom_nodes" / paths.PACK_FOLDER / "models" / "demo" / "weights"
    folder = world.base / "models" / "likeness"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for source, name in ((mini.ADAPTER, "creatures.safetensors"), (mini.DINO, "a.safetensors"), (mini.MAE, "b.sft")):
            shutil.copy(weights / source, folder / name)
        prompt = graph(id={"adapter": link("files"), "encoders": link("files", 1)}, layers={"adapter": link("files")})
        prompt["files"] = call("LoadAdapter", file="creatures.safetensors")
        prompt["said"] = core("PreviewAny", source=link("files", 2))
        result = world.run(prompt)
        assert result.ok, result.error
        assert same(result, world.run(graph()))
        said = json.dumps(result.outputs["said"])
        assert "a.safetensors" in said and "b.sft" in said and "not the very file" not in said
    finally:
        shutil.rmtree(folder)
