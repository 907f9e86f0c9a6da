"""The renderer of the miniature CustomNet: true views, places and splits."""
from __future__ import annotations

import pytest
import torch

from likeness.models.demo import solids, views
from likeness.models.demo.views import Scene, select


def scene(n: int = 6, **camera: float) -> Scene:
    """n held-out buildings of all kinds in one box, from one camera."""
    every = views.identities()
    rows = torch.arange(3).repeat(n)[:n] * (every["kind"].shape[0] // 3) + torch.arange(n)
    cameras = {name: torch.full((n,), camera.get(name, 0.0)) for name in ("azimuth", "elevation", "distance")}
    return Scene(select(every, rows), cameras, torch.zeros(n, dtype=torch.long), torch.tensor([[8, 8, 56, 56]]).repeat(n, 1))


def box_of(mask: torch.Tensor) -> torch.Tensor:
    rows, columns = (mask > 0.5).any(1).nonzero()[:, 0], (mask > 0.5).any(0).nonzero()[:, 0]
    return torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()


def test_the_references_own_view_fills_its_share_of_the_box():
    for mask in views.render(scene())[1]:
        x0, y0, x1, y1 = box_of(mask).tolist()
        assert max(x1 - x0, y1 - y0) == pytest.approx(48 * views.SHARE, abs=2)
        assert ((x0 + x1) / 2, (y0 + y1) / 2) == (pytest.approx(32, abs=1), pytest.approx(32, abs=1))


def test_faces_come_and_go_with_the_camera():
    """At azimuth 0 only the front is seen of the walls, at 90 only the side, from below the roof of a block is gone."""
    front, side, roof = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    colours = torch.tensor([[front, side, roof]])

    def seen(azimuth: float, elevation: float) -> list[bool]:
        drawn = solids.draw_solids(torch.ones(1, 3, 64, 64), torch.tensor([0]), colours, torch.tensor([azimuth]),
                                   torch.tensor([elevation]), torch.tensor([[32.0, 32.0]]), torch.tensor([30.0]))
        part = drawn.picture[0] * drawn.mask[0]
        return [bool(((part[k] > 0.5) & (part[(k + 1) % 3] < 0.2) & (part[(k + 2) % 3] < 0.2)).sum() > 20) for k in range(3)]
    assert seen(0.0, 30.0) == [True, False, True]
    assert seen(90.0, 30.0) == [False, True, True]
    assert seen(30.0, 30.0) == [True, True, True]
    assert seen(0.0, 0.0) == [True, False, False]


def test_a_camera_to_the_right_sees_the_right_wall_to_the_right():
    """The front moves to the left of the picture: the sign of the azimuth, once and for all."""
    def middle(azimuth: float) -> float:
        colours = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
        drawn = solids.draw_solids(torch.zeros(1, 3, 64, 64), torch.tensor([0]), colours, torch.tensor([azimuth]),
                                   torch.tensor([20.0]), torch.tensor([[32.0, 32.0]]), torch.tensor([30.0])).picture[0]
        red = (drawn[0] > 0.5) & (drawn[1] < 0.2) & (drawn[2] < 0.2)
        return float(red.nonzero()[:, 1].float().mean())
    assert middle(40.0) < middle(0.0) < middle(-40.0)


def test_distance_shrinks_the_outline():
    sizes = [views.render(scene(distance=far))[1].sum((1, 2)) for far in (-0.1, 0.1, 0.3)]
    assert (sizes[0] > 1.1 * sizes[1]).all() and (sizes[1] > 1.1 * sizes[2]).all()


def test_sharp_corners_grow_no_spikes():
    """The outline stays within its corners and the ink: half-planes alone would let a corner shoot out."""
    for azimuth in range(-60, 61, 5):
        picture = scene(azimuth=float(azimuth))
        for row, mask in enumerate(views.render(picture)[1]):
            kind = int(picture.identity["kind"][row])
            camera = torch.tensor([views.REFERENCE[0] + azimuth]), torch.tensor([views.REFERENCE[1]])
            want = solids.extent(kind, *camera)[0]
            scale = solids.outline_scale(torch.tensor([kind]), torch.tensor([48 * views.SHARE]), *views.REFERENCE)
            width, height = ((want[2:] - want[:2]) * scale).tolist()
            x0, y0, x1, y1 = box_of(mask).tolist()
            assert x1 - x0 <= width + 3 and y1 - y0 <= height + 3


def test_the_splits_do_not_meet():
    every = views.identities()
    out = views.held_out(every)
    assert 0.08 < float(out.float().mean()) < 0.12
    assert torch.equal(views.number_of(every), torch.arange(every["kind"].shape[0]))
    training, held = views.draw(300, 1), views.draw(300, 1, training=False)
    assert not views.held_out(training.identity).any() and views.held_out(held.identity).all()
    assert not views.held_out_scene(training.identity, training.scene).any()
    for name in ("front", "side", "roof"):
        assert training.identity[name].max() == 7
    same = views.draw(300, 1)
    assert all(torch.equal(same.identity[name], value) for name, value in training.identity.items())
    assert torch.equal(same.box, training.box)


def test_cameras_and_boxes_keep_to_their_ranges():
    drawn = views.draw(2000, 3)
    assert drawn.camera["azimuth"].abs().max() <= views.AZIMUTH
    assert drawn.camera["azimuth"].abs().max() > 0.95 * views.AZIMUTH
    assert drawn.camera["elevation"].abs().max() <= views.ELEVATION
    low, high = views.DISTANCE
    assert low <= drawn.camera["distance"].min() and drawn.camera["distance"].max() <= high
    assert (drawn.box % views.PATCH == 0).all() and drawn.box.min() == 0 and drawn.box.max() == 64
    assert set((drawn.box[:, 2] - drawn.box[:, 0]).tolist()) == set(views.SIDES)


def test_the_easy_world_only_turns():
    easy, wide = views.draw(40, 7, easy=True), views.draw(40, 7)
    assert (easy.box == torch.tensor(views.EASY_BOX)).all() and not easy.camera["distance"].any()
    assert torch.equal(easy.camera["azimuth"], wide.camera["azimuth"])


def test_captions():
    drawn = views.draw(50, 4)
    told = views.captions(drawn.identity, drawn.scene, torch.Generator().manual_seed(1))
    assert {text.startswith("a photo of a ") for text in told} == {True, False}
    assert all(any(text.endswith(place) for place in views.SCENES) for text in told)
    assert views.captions(drawn.identity, drawn.scene)[0].startswith("a photo of a ")


def test_the_benchs_rules_read_true_pictures():
    """What the bench measures with, on renders: view, outline and scene."""
    from bench import _view_rules as rules

    generator = torch.Generator().manual_seed(2)
    n = 12
    buildings = rules.held_out(n, 1)
    cameras = {"azimuth": torch.linspace(-58, 58, n), "elevation": torch.linspace(-18, 18, n), "distance": torch.zeros(n)}
    picture = Scene(buildings, cameras, torch.arange(n) % 5, views.draw_boxes(n, generator))
    drawn, masks = views.render(picture)
    azimuth, elevation = rules.cameras(drawn, picture)
    assert float((azimuth - cameras["azimuth"]).abs().median()) <= 3
    assert float((elevation - cameras["elevation"]).abs().median()) <= 4
    assert float(rules.iou(rules.silhouettes(drawn, picture), masks > 0.5).mean()) > 0.85
    assert torch.equal(rules.backgrounds(drawn, picture.box), picture.scene)


def test_the_benchs_outline_does_not_know_the_asked_box():
    """A building at the wrong place, or at the right one and once more, is no building at its place."""
    from bench import _view_rules as rules

    n = 6
    straight = {name: torch.zeros(n) for name in ("azimuth", "elevation", "distance")}
    asked = Scene(rules.held_out(n, 1), straight, torch.arange(n) % 5, torch.tensor([[0, 0, 40, 40]]).repeat(n, 1))
    right, masks = views.render(asked)
    elsewhere = asked._replace(box=asked.box + 24)
    wrong, _ = views.render(elsewhere)
    twice, _ = views.render(elsewhere, right)
    overlaps = [rules.iou(rules.silhouettes(picture, asked), masks > 0.5) for picture in (right, wrong, twice)]
    assert float(overlaps[0].min()) > 0.7
    assert float(overlaps[1].max()) < 0.5 and float(overlaps[2].max()) < 0.5
