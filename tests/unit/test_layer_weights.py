"""Layer weights: levels by resolution, fades, overrides."""
from __future__ import annotations

import pytest

from likeness.models.common.errors import LikenessError
from likeness.models.common.layer_weights import layer_weights, level_names, parse_overrides, weights_report
from likeness.models.custany.config import sd15_layers, sdxl_layers

SD15 = [key for key, _ in sd15_layers()]
SDXL = [key for key, _ in sdxl_layers()]
ONE = {"coarse": 1.0, "middle": 1.0, "fine": 1.0}


def test_levels_follow_the_resolutions():
    names = level_names(SD15, "sd15")
    assert [names[key] for key in SD15] == ["coarse"] * 3 + ["middle"] * 3 + ["fine"] * 3
    names = level_names(SDXL, "sdxl")
    assert {key for key in SDXL if names[key] == "coarse"} == {k for k in SDXL if k.split(".")[1] in "012"}
    assert "middle" not in names.values()
    names = level_names([f"output.{n}.0" for n in range(4)], "miniature")
    assert list(names.values()) == ["coarse", "coarse", "fine", "fine"]
    # an adapter that sits in the whole network: the middle block has SD1.5's lowest resolution
    names = level_names(["input.1.0", "input.4.0", "input.8.0", "middle.0.0", "output.11.0"], "sd15")
    assert names == {"input.1.0": "fine", "input.4.0": "middle", "input.8.0": "middle", "middle.0.0": "coarse",
                     "output.11.0": "fine"}


def test_levels_are_factors():
    weights = dict(layer_weights(SD15, "sd15", {"coarse": 0.0, "middle": 0.5, "fine": 2.0}))
    assert list(weights) == SD15 and list(weights.values()) == [0.0] * 3 + [0.5] * 3 + [2.0] * 3
    assert set(layer_weights(SD15, "sd15", ONE)) == {(key, 1.0) for key in SD15}


def test_the_order_is_that_of_the_network():
    keys = ["output.10.0", "output.9.1", "output.9.0", "input.2.0", "middle.0.0"]
    got = [key for key, _ in layer_weights(keys, "sd15", ONE)]
    assert got == ["input.2.0", "middle.0.0", "output.9.0", "output.9.1", "output.10.0"]


def test_a_fade_multiplies_in_even_steps():
    weights = layer_weights(SD15, "sd15", {**ONE, "fine": 0.0}, (1.0, 0.0))
    assert [round(factor, 6) for _, factor in weights] == [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0, 0, 0]
    assert layer_weights(["output.3.0"], "sd15", ONE, (0.25, 1.0)) == (("output.3.0", 0.25),)


def test_overrides_replace():
    weights = dict(layer_weights(SDXL, "sdxl", ONE, (0.5, 0.5), "output.0.9: 0.2,\n output.4 : 0; output.4.1: -1"))
    assert weights["output.0.9"] == 0.2 and weights["output.4.0"] == 0.0 and weights["output.4.1"] == -1.0
    assert all(factor == 0.5 for key, factor in weights.items() if key not in ("output.0.9", "output.4.0", "output.4.1"))
    assert parse_overrides(" , ;\n", SDXL) == {}
    # output.1 is a block of its own, not the beginning of output.11
    assert set(parse_overrides("output.1: 0", ["output.1.0", "output.11.0"])) == {"output.1.0"}


@pytest.mark.parametrize("text", ["output.3.0", "output.3.0: x", "output.3.0: nan", "output.3.0: inf", ": 1", "0.5"])
def test_an_unreadable_override_is_named(text):
    with pytest.raises(LikenessError, match="cannot be read|names the layer") as caught:
        parse_overrides(text, SD15)
    assert text in str(caught.value) or "layers" in str(caught.value)


def test_an_unknown_layer_is_named_with_the_known_ones():
    with pytest.raises(LikenessError, match="output.2") as caught:
        parse_overrides("output.2: 1", SD15)
    assert "output.11.0" in str(caught.value)


def test_the_report_names_every_layer():
    text = weights_report(layer_weights(SDXL, "sdxl", {**ONE, "fine": 0.25}), "sdxl")
    assert all(key in text for key in SDXL) and "output.5.1: 0.25" in text
    assert "middle: this adapter has no such layers" in text
