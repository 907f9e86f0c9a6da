"""The nodes of camera, place and CustomNet: what they give, and one clear sentence for each bad input."""
from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from host import customnet_files as cf
from host.support import folder, miniature
from likeness.models.common.errors import LikenessError
from likeness.models.customnet.view import View
from likeness.models.demo import views as toys
from likeness.models.hosting import customnet


def node(nodes, name, *values, **named):
    with torch.inference_mode():
        return nodes[f"Likeness_{name}"].execute(*values, **named).args


@pytest.fixture
def checkpoints(host, nodes, tmp_path, monkeypatch):
    """Empty folders of models and a private place for previews."""
    import folder_paths

    for name in ("checkpoints", "likeness"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name,
                            ([str(tmp_path / name)], folder_paths.supported_pt_extensions))
        folder_paths.filename_list_cache.pop(name, None)
        (tmp_path / name).mkdir()
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    yield tmp_path / "checkpoints"
    for name in ("checkpoints", "likeness"):
        folder_paths.filename_list_cache.pop(name, None)


# -- camera and place ------------------------------------------------------------------------------------------
def test_viewpoint(nodes):
    assert node(nodes, "Viewpoint", 30.0, 10.0, 0.2, False) == (View((30.0,), (10.0,), (0.2,)),)
    assert node(nodes, "Viewpoint", 30.0, 10.0, 0.0, True)[0].azimuth == (-30.0,)
    camera = {"position": {"x": 2, "y": 0, "z": 2}, "target": {"x": 0, "y": 0, "z": 0}, "zoom": 1, "cameraType": "perspective"}
    view = node(nodes, "Viewpoint", 0.0, 0.0, 0.0, False, camera, 1.0)[0]
    assert view.azimuth[0] == pytest.approx(45)
    assert view.distance[0] == pytest.approx(8 ** 0.5 - 1)
    with pytest.raises(LikenessError, match="camera_info"):
        node(nodes, "Viewpoint", 0.0, 0.0, 0.0, False, "front")


def test_turntable(nodes):
    view = node(nodes, "Turntable", -60.0, 60.0, 3, 10.0, 0.0, True, False)[0]
    assert view == View((-60.0, 0.0, 60.0), (10.0,) * 3, (0.0,) * 3, True)
    assert node(nodes, "Turntable", -60.0, 60.0, 3, 10.0, 0.0, False, True)[0].azimuth == (60.0, 0.0, -60.0)


NUMBERS = (0.25, 0.25, 0.5, 0.5)
SQUARE = "square, cropped at the frame"


def test_placement_from_numbers_masks_and_boxes(nodes, checkpoints):
    placement, box, preview, found = node(nodes, "Placement", *NUMBERS, "whole reference", SQUARE, 256, 128, "error")
    assert box == {"x": 64, "y": 0, "width": 128, "height": 128}
    assert preview.shape == (1, 128, 256, 3)
    assert placement.pixels(256, 128) == [(64, 0, 192, 128)]
    mask = torch.zeros(2, 64, 64)
    mask[0, 16:48, 16:48], mask[1, 0:20, 0:20] = 1, 1
    placement, box, preview, found = node(nodes, "Placement", *NUMBERS, "object", SQUARE, 256, 256, "error", mask)
    assert len(placement.boxes) == 2
    assert preview.shape[0] == 2
    assert box["width"] == round(128 * 1.28)
    boxes = [[{"x": 10.0, "y": 10.0, "width": 50.0, "height": 20.0, "label": "cat", "score": 0.7}]]
    image = torch.zeros(1, 100, 100, 3)
    placement, box, preview, found = node(nodes, "Placement", *NUMBERS, "whole reference", "stretched", 8, 8, "error", None,
                                          boxes, image)
    assert found is True and placement.boxes == ((0.1, 0.1, 0.5, 0.2),)
    assert preview.shape == (1, 100, 100, 3)
    # what stands over is cut off for core's crop and kept in the placement
    placement, box, *_ = node(nodes, "Placement", -0.25, 0.5, 0.5, 0.75, "whole reference", "stretched", 256, 128, "error")
    assert box == {"x": 0, "y": 64, "width": 64, "height": 64}
    assert placement.pixels(256, 128) == [(-64, 64, 64, 160)]
    with pytest.raises(LikenessError, match="disconnect one"):
        node(nodes, "Placement", *NUMBERS, "object", SQUARE, 64, 64, "error", mask, boxes)
    with pytest.raises(LikenessError, match="outside"):
        node(nodes, "Placement", 1.5, 0.0, 0.2, 0.2, "object", SQUARE, 256, 256, "error")


def test_where_nothing_was_found_the_numbers_may_stand_in(nodes):
    mask = torch.zeros(2, 64, 64)
    mask[0, 16:48, 16:48] = 1
    by_hand = ((0.25, 0.25, 0.5, 0.5),)
    for given, boxes, whole in (({"mask": mask}, by_hand * 2, False), ({"mask": mask[:1]}, by_hand, True),
                                ({"bounding_box": []}, by_hand, False), ({"bounding_box": [[]]}, by_hand, False),
                                ({"bounding_box": [[{"x": 4, "y": 0, "width": 4, "height": 8}], []]},
                                 ((0.0625, 0.0, 0.0625, 0.125), *by_hand), False), ({}, by_hand, True)):
        placement, *_, found = node(nodes, "Placement", *NUMBERS, "whole reference", SQUARE, 64, 64, "pass through", **given)
        assert (placement.boxes, found) == (boxes, whole)
        if not whole:
            with pytest.raises(LikenessError, match="empty|found nothing"):
                node(nodes, "Placement", *NUMBERS, "whole reference", SQUARE, 64, 64, "error", **given)


def test_reference_of_the_preset(nodes):
    picture = torch.rand(1, 90, 120, 3)
    mask = torch.zeros(1, 90, 120)
    mask[:, 10:70, 20:100] = 1
    image, silhouette, found = node(nodes, "PrepareReference", picture, "CustomNet", 0.3, 64, "error", mask)
    assert image.shape == (1, 256, 256, 3) and silhouette.shape == (1, 256, 256) and found is True
    assert int(silhouette.sum()) == 60 * 80
    with pytest.raises(LikenessError, match="neither a mask nor an alpha"):
        node(nodes, "PrepareReference", picture, "CustomNet", 0.1, 512, "error")


# -- files -----------------------------------------------------------------------------------------------------
def test_loading_and_saving_half(nodes, checkpoints):
    shutil.copy(cf.path(), checkpoints / "any.safetensors")
    load = nodes["Likeness_LoadCustomNet"]
    assert load.define_schema().inputs[0].options[1:] == ["any.safetensors"]
    before = load.fingerprint_inputs("any.safetensors")
    *parts, variant, text = node(nodes, "LoadCustomNet", "any.safetensors", True)
    assert variant == "normal" and len(parts) == 4
    assert "saved as any_fp16.safetensors" in text
    assert (checkpoints / "any_fp16.safetensors").is_file()
    assert load.fingerprint_inputs("any.safetensors") == before
    assert load.validate_inputs("any.safetensors") is True
    assert "is not in" in load.validate_inputs("other.safetensors")
    with pytest.raises(LikenessError, match="is not in"):
        node(nodes, "LoadCustomNet", "other.safetensors", False)


def test_the_whole_chain_through_the_nodes(nodes, checkpoints):
    loaded = cf.loaded("inpaint")
    reference = cf.reference()
    view = node(nodes, "Turntable", -30.0, 30.0, 2, 0.0, 0.0, True, False)[0]
    placement = node(nodes, "Placement", *NUMBERS, "object", SQUARE, 64, 64, "error")[0]
    done = node(nodes, "ViewConditioner", cf.encode("on the beach", "inpaint"), cf.encode("", "inpaint"), loaded.vision,
                loaded.vae, reference, 64, 64, 1.0, 1.0, view, placement, torch.rand(1, 64, 64, 3))
    positive, negative, latent, background, mask, text = done
    assert latent["samples"].shape == (2, 4, 8, 8) and latent["batch_index"] == [0, 0]
    assert background.shape == (2, 64, 64, 3) and mask.shape == (2, 64, 64)
    assert "azimuth -30" in text and "azimuth 30" in text
    with torch.inference_mode():
        out = cf.support.sample(loaded.model, positive, negative, steps=1, latent=latent["samples"])
    assert out.shape == (2, 4, 8, 8)


def test_without_view_and_place_the_reference_fills_the_picture(nodes):
    loaded = cf.loaded()
    texts = cf.encode("x"), cf.encode("")
    done = node(nodes, "ViewConditioner", *texts, loaded.vision, loaded.vae, cf.reference(), 64, 64, 1.0, 1.0)
    shown = done[0][0][1][cf.KEY]
    assert shown.camera.tolist() == [[0.0, 0.0, 1.0, 0.0]]
    assert done[4].all()


# -- miniature -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(host) -> Path:
    """A miniature of three training steps on the random base, with the random base's other parts beside it."""
    from likeness.nodes.training_views import train_miniature

    place = folder() / "miniature_customnet"
    shutil.copytree(miniature(), place, dirs_exist_ok=True)
    train_miniature(folder() / "customnet_run", place, "a test", place / customnet.MINIATURE, pictures=24, steps=3, batch=4)
    return place


def test_the_miniature_trains_loads_and_paints(trained):
    with torch.inference_mode():
        loaded = customnet.load_miniature(None, trained)
        tokens = loaded.clip.tokenize("a house on the beach")
        text = loaded.clip.encode_from_tokens_scheduled(tokens)
        building = toys.select(toys.identities(), torch.tensor([5]))
        picture = toys.references(building, 256).movedim(1, -1)
        done = cf.view.condition(text, text, loaded.vision, loaded.vae, picture, View((30.0, -30.0), (0.0,) * 2, (0.0,) * 2),
                                 cf.BOXES, 64, 64)
        out = cf.run(done, loaded.model)
    assert out.shape == (2, 48, 8, 8)
    assert torch.isfinite(out).all()
    shown = done.positive[0][1][cf.KEY]
    assert shown.embed.shape == (1, 48) and shown.location.shape == (1, 48, 8, 8)


def test_the_host_sees_what_the_training_saw(trained):
    """Location latents and embedding of the nodes equal those of the lessons, at the training's own picture size."""
    from likeness.models.hosting.customnet_demo import MiniatureViews

    base = MiniatureViews(trained)
    scene = toys.draw(2, 5)
    lessons = base.lessons(scene)
    with torch.inference_mode():
        loaded = customnet.load_miniature(None, trained)
        pictures = toys.references(scene.identity, 256).movedim(1, -1)
        boxes = tuple((x0 / 64, y0 / 64, (x1 - x0) / 64, (y1 - y0) / 64) for x0, y0, x1, y1 in scene.box.tolist())
        cameras = View(*(tuple(scene.camera[name].tolist()) for name in ("azimuth", "elevation", "distance")))
        shown = cf.view.condition([], [], loaded.vision, loaded.vae, pictures, cameras, cf.Placement(boxes), 64, 64)
        assert shown.latent["samples"].shape[0] == 2
        done = cf.view.condition([[torch.zeros(1, 1, 1), {}]], [], loaded.vision, loaded.vae, pictures, cameras,
                                 cf.Placement(boxes), 64, 64).positive[0][1][cf.KEY]
    assert torch.equal(done.camera, lessons.camera)
    # the references were drawn at another size, so they are near, not equal
    assert float((done.location - lessons.location.float()).abs().mean()) < 0.12 * float(lessons.location.float().abs().mean())
    assert float((done.embed - lessons.embed).norm() / lessons.embed.norm()) < 0.12


def test_a_training_goes_on_where_it_stood(trained):
    from likeness.nodes.training_views import train_miniature

    whole, parts = folder() / "cn_whole", folder() / "cn_parts"
    for steps, out in ((4, whole), (2, parts), (4, parts)):
        train_miniature(out, trained, "a test", pictures=24, steps=steps, batch=4, schedule="constant")
    from likeness.models.common import files
    first, second = (files.load(out / "adapter.safetensors")[0] for out in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_training_begins_with_a_file(trained):
    """An easy part first, then everything: the second begins where the first ended."""
    from likeness.models.common import files
    from likeness.nodes.training_views import train_miniature

    first = train_miniature(folder() / "cn_easy", trained, "a test", pictures=24, steps=3, batch=4, easy=True)
    still = {"warmup": 0, "schedule": "constant", "lr": 1e-9}
    second = train_miniature(folder() / "cn_after", trained, "a test", pictures=24, steps=1, batch=4, start=first, **still)
    before, after = (files.load(path)[0] for path in (first, second))
    other = files.load(trained / customnet.MINIATURE)[0]

    def far(these):
        return max(float((before[name].float() - these[name].float()).abs().max()) for name in before)
    assert far(after) < 0.1 * far(other), (far(after), far(other))


def test_another_training_in_the_same_folder_is_refused(trained):
    """The checkpoint does not know what it was made from and would go on with other weights."""
    from likeness.nodes.training_views import train_miniature

    out, few = folder() / "cn_same", {"pictures": 24, "batch": 4}
    first = train_miniature(out, trained, "a test", steps=1, **few)
    for other in ({"ablation": "no location"}, {"easy": True}, {"start": trained / customnet.MINIATURE}):
        with pytest.raises(LikenessError, match="cn_same holds a run on another"):
            train_miniature(out, trained, "a test", steps=2, **few, **other)
    (out / "recipe.json").unlink()  # of a copy of this pack that wrote none: taken, and noted from now on
    assert train_miniature(out, trained, "a test", steps=1, **few) == first
    with pytest.raises(LikenessError, match="train in a new folder"):
        train_miniature(out, trained, "a test", steps=2, ablation="no location", **few)


def test_weights_that_are_missing_are_named(host):
    with pytest.raises(LikenessError, match="train customnet --ship"):
        customnet.load_miniature(None, Path(folder()))


