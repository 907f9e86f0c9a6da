"""The bench of CustomNet measures the nodes' own way too."""
from __future__ import annotations

import pytest
import torch

from host.support import comfy  # noqa: F401  the host's modules stand on the path


def test_rows_through_the_nodes():
    """One run of eight views and places of a held-out building, read by the renderer's rules; then the same from the wrong
    side and place, which the rules must tell."""
    from bench import customnet as bench
    from bench._view_nodes import Nodes

    from likeness.models.demo import views
    from likeness.models.hosting.customnet import MINIATURE
    from likeness.models.hosting.demo import WEIGHTS

    nodes, asked = Nodes(WEIGHTS / MINIATURE, WEIGHTS), bench.scenes()
    found = bench.through_nodes(nodes, asked, 1)
    assert found["nodes_pictures"] == 8
    assert found["nodes_retrieval"] >= 0.75 and found["nodes_placement_iou"] >= 0.7 and found["nodes_background"] == 1.0

    class Wrong:
        def paint(self, scene, seed):
            other = torch.tensor([[0, 0, 40, 40]]).repeat(len(scene.box), 1) + 24 * (scene.box[:, :1] < 12)
            return views.render(scene._replace(box=other, camera={**scene.camera, "azimuth": -scene.camera["azimuth"]}))[0]
    wrong = bench.through_nodes(Wrong(), asked, 1)
    assert wrong["nodes_retrieval"] <= 0.25 and wrong["nodes_placement_iou"] < 0.6
    with pytest.raises(ValueError, match="One run has one sentence"):
        nodes.paint(views.blocks(asked._replace(scene=torch.arange(256) % 5), 8)[0], 1)


def test_every_row_has_its_chance():
    """Saying the reference's own camera is off by 30 and 10 degrees in the middle of what is asked."""
    from bench import customnet as bench

    chances = bench.chances(bench.scenes(), bench.turned())
    assert chances["azimuth_median_deg_chance"] == pytest.approx(30, abs=4)
    assert chances["elevation_median_deg_chance"] == pytest.approx(10, abs=2)
    assert 0.2 < chances["placement_iou_chance"] < 0.6
    assert {"retrieval_chance", "identity_chance", "background_chance", "distance_monotone_chance"} < set(chances)
