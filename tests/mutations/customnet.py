"""Faults in CustomNet."""
from __future__ import annotations

from harness.mutate import Mutation

HOSTING, CUSTOMNET, TRAINING = "models/hosting/", "models/customnet/", "models/training/"
UNIT = ("tests/unit/test_customnet.py",)
LEARN = ("tests/unit/test_training_customnet.py",)


def host(name: str, *tests: str) -> tuple[str, ...]:
    """Named tests of tests/host/test_<name>.py: the whole file takes a minute."""
    return tuple(f"tests/host/test_{name}.py::test_{test}" for test in tests)


NETWORK, REPLACED = host("customnet_golden", "network"), host("customnet_golden", "a_replaced_text_attention_keeps_the_object")
CFG, COUNTS = host("customnet_rows", "cfg"), host("customnet_rows", "rows_that_do_not_fit")
BATCH, STRENGTHS = (host("customnet_rows", name) for name in ("views_in_one_batch_are_the_single_runs", "strengths"))
INPAINT = host("customnet_rows", "the_inpaint_variant_sees_place_and_background_and_its_negative_the_background_alone")
NOISE = host("customnet_rows", "one_noise_for_all_views")
HALF, SAVED = (host("customnet_files", name) for name in ("half_precision_copy", "cores_own_save_node_writes_a_file_that_loads"))
PLACES, VIEWPOINT = (host("nodes_view", name) for name in ("placement_from_numbers_masks_and_boxes", "viewpoint"))
DEVICE, SIGN, SMALL, REFERENCES = (host("customnet_rows", name) for name in (
    "latents_come_to_the_noises_device", "one_place_says_which_way_the_public_weights_turn",
    "a_small_picture_of_the_reference_is_shrunk_with_care", "each_reference_of_a_batch_is_checked"))
WIDE, ODD, TEXT = (host("customnet_rows", name) for name in (
    "a_wide_picture_shrinks_the_reference_as_a_square_one", "sizes_lose_what_core_would_cut_off",
    "a_text_encoder_of_another_model"))
AGAIN = host("nodes_view", "another_training_in_the_same_folder_is_refused")
ASKED = host("customnet_files", "a_folder_that_takes_no_file_costs_no_reading")
OUTLINE = ("tests/unit/test_toy_buildings.py::test_the_benchs_outline_does_not_know_the_asked_box",)
SCHEDULE = host("customnet_golden", "the_releases_schedule_begins_at_noise_for_any_count")
PART = host("customnet_files", "a_part_is_read_without_the_others")

MUTATIONS = [
    # -- camera, canvas, pixels
    Mutation("sine and cosine of the azimuth are swapped", CUSTOMNET + "view.py", "turn.sin(), turn.cos()",
             "turn.cos(), turn.sin()", UNIT),
    Mutation("up is down", CUSTOMNET + "view.py", "[-e for e in self.elevation]", "[e for e in self.elevation]", UNIT),
    Mutation("a full turn shows its first view twice", CUSTOMNET + "view.py", "(count if whole else max(1, count - 1))",
             "max(1, count - 1)", UNIT),
    Mutation("the host's camera turns from the side", CUSTOMNET + "view.py", "math.atan2(x, z)", "math.atan2(z, x)", UNIT),
    Mutation("the canvas is black", CUSTOMNET + "location.py", "WHITE = 1.0", "WHITE = -1.0", UNIT),
    Mutation("the canvas is resized with its corners aligned", CUSTOMNET + "location.py", "align_corners=False",
             "align_corners=True", UNIT),
    Mutation("what leaves the frame is squashed, not cropped", CUSTOMNET + "location.py",
             "part = image[:, :, rows, columns]", "part = image", UNIT),
    Mutation("every row stands in the first box", CUSTOMNET + "location.py", "[None], box, size)",
             "[None], boxes[0], size)", UNIT),
    Mutation("the object's edge is soft", CUSTOMNET + "pixels.py", "(mask * 255).round() > 127",
             "(mask * 255).round() > 126", UNIT),
    Mutation("the image tower's pixels are antialiased", CUSTOMNET + "pixels.py", 'mode="bicubic", align_corners=True',
             'mode="bicubic", align_corners=False', UNIT),
    Mutation("the release's schedule keeps its first step", CUSTOMNET + "schedule.py", "every[-2::-1]", "every[::-1]", UNIT),
    # -- placement and telling files
    Mutation("square is counted in shares", CUSTOMNET + "placement.py", "(max(w, h) * grow,) * 2", "(w * grow, h * grow)", UNIT),
    Mutation("the first box is taken, not the surest", CUSTOMNET + "placement.py",
             "boxes[max(range(len(boxes)), key=scores.__getitem__)]", "boxes[0]", UNIT),
    Mutation("only the first picture's boxes count", CUSTOMNET + "placement.py", "return [list(entry) for entry in value]",
             "return [list(value[0])]", UNIT),
    Mutation("an inpaint file is taken for a normal one", CUSTOMNET + "config.py", '3: "inpaint"', '3: "normal"', UNIT),
    # -- the network
    Mutation("the object is lost where the text attention is replaced", HOSTING + "customnet_unet.py",
             "return out + self._attention_at(extra_options).late_object(carrier.tokens)", "return out", REPLACED),
    Mutation("the late object brings the bias again", HOSTING + "customnet_unet.py",
             "return self.to_out(value) - self.to_out(torch.zeros_like(value))", "return self.to_out(value)", REPLACED),
    Mutation("the object is added twice", HOSTING + "customnet_unet.py", "        carrier.added = True\n", "", NETWORK),
    Mutation("the object is added in the first block only", HOSTING + "customnet_unet.py", "            carrier.added = False\n",
             "", host("customnet_golden", "a_replaced_text_attention_keeps_the_object")),
    Mutation("the roles are not swapped", HOSTING + "customnet_unet.py", '(".attn2.to_k_text.", ".attn2.to_k.")',
             '(".attn2.to_k_text.", ".attn2.to_k_obj2.")', NETWORK),
    Mutation("less text means nothing", HOSTING + "customnet_unet.py", "value * self.scale.to(value)[:, :, None]", "value",
             host("customnet_golden", "block_with_less_text")),
    # -- rows
    Mutation("rows without object show it", HOSTING + "customnet_model.py",
             "return torch.zeros(rows, 1, self.layout.width, device=device)",
             "return torch.ones(rows, 1, self.layout.width, device=device)", CFG),
    Mutation("all rows have the first camera", HOSTING + "customnet_model.py", "camera = _rows(shown.camera, rows)",
             "camera = _rows(shown.camera[:1], rows)", BATCH),
    Mutation("the object's strength is not used", HOSTING + "customnet_model.py", " * shown.strength", "", STRENGTHS),
    Mutation("the negative shows the object", HOSTING + "view.py", "bare = Shown(None, None, None, around, 1.0",
             "bare = Shown(embed, view.vector(), location, around, 1.0", CFG),
    Mutation("the location is scaled as latents are", HOSTING + "view.py", "return vae.encode(((pixels + 1) / 2)",
             "return 0.18215 * vae.encode(((pixels + 1) / 2)", host("customnet_rows", "the_location_is_what_the_vae_gives")),
    Mutation("one noise is forgotten", HOSTING + "view.py", "if view.one_noise:", "if not view.one_noise:", NOISE),
    Mutation("any count of views passes", HOSTING + "customnet_model.py", "if tensor.shape[0] not in (1, rows):",
             "if tensor.shape[0] > 99:", COUNTS),
    # -- files and nodes
    Mutation("the object token is not saved", HOSTING + "customnet_model.py", "return {**out, **self.object_token.state_dict()}",
             "return out", SAVED),
    Mutation("the half copy halves the object token", HOSTING + "customnet.py",
             "value.is_floating_point() and not name.startswith(PROJECTION)", "value.is_floating_point()", HALF),
    Mutation("the half copy writes over a file", HOSTING + "customnet.py", "if target.exists():", "if False:", HALF),
    Mutation("flip does nothing", "nodes/view.py", "-azimuth if flip else azimuth", "azimuth", VIEWPOINT),
    Mutation("the mask is not looked at", "nodes/view.py", "        if mask is not None:\n            asked, width, height",
             "        if mask is None and False:\n            asked, width, height", PLACES),
    # -- training
    Mutation("the text is never left out", TRAINING + "customnet.py", "text if chance >= self.train.drop_text else",
             "text if chance >= 0 else", LEARN),
    Mutation("object and place go together", TRAINING + "customnet.py", "EMBED, LOCATION = 0.10, (0.05, 0.15)",
             "EMBED, LOCATION = 0.10, (0.0, 0.10)", LEARN),
    Mutation("the null takes the camera too", TRAINING + "customnet.py", "self.projection(embed * keep[:, None], camera)",
             "self.projection(embed * keep[:, None], camera * keep[:, None])", LEARN),
    Mutation("all weights learn at one rate", TRAINING + "loop.py", '= lr * group["rate"]', "= lr", LEARN),
    # -- after the review
    Mutation("the page grows a box of its own on Placement", "nodes/view.py",
             '"bounding_box", optional=True, extra_dict=_types.SOCKET,',
             '"bounding_box", optional=True,',
             ("tests/workflows/test_nodes_server.py::test_sockets_of_core_types_grow_no_editor",)),
    Mutation("what the trainer makes is no file for the loader", HOSTING + "customnet.py",
             '.metadata.get("base") == "miniature"', '.metadata.get("base") == "toys"',
             host("customnet_files", "a_file_of_the_trainer_loads")),
    Mutation("latents stay where the VAE left them", HOSTING + "customnet_model.py", ".to(noise.device)", "", DEVICE),
    Mutation("the sign of the public weights is not used", HOSTING + "customnet_model.py", "self.model_config.azimuth_sign",
             "1.0", SIGN),
    Mutation("the miniature hangs on the public weights' sign", HOSTING + "customnet_model.py",
             "azimuth_sign = 1.0  # trained by this pack, with its own cameras", "azimuth_sign = -AZIMUTH_SIGN", SIGN),
    Mutation("a small canvas skips pixels", HOSTING + "view.py", "if width == height == CANVAS:", "if True:", SMALL),
    Mutation("a wide canvas skips pixels", HOSTING + "view.py", "boxes, min(width, height))", "boxes, max(width, height))", WIDE),
    Mutation("sizes keep the rest of a division by 8", HOSTING + "view.py",
             "    width, height = width // CELL * CELL, height // CELL * CELL\n", "", ODD),
    Mutation("a prompt of another text encoder passes", HOSTING + "customnet_model.py",
             'self._check_text(kwargs.get("cross_attn"))', "pass", TEXT),
    Mutation("the box for core's crop begins below 0", "nodes/view.py", "min(max(value, 0), most)", "min(value, most)", PLACES),
    Mutation("a training of another ablation goes on", "nodes/training_views.py", '"ablation": ablation, ', "", AGAIN),
    Mutation("a training of another file goes on", "nodes/training_views.py", '"begun_with": digest(start)',
             '"begun_with": ""', AGAIN),
    Mutation("the background has no hole where the object will be", HOSTING + "view.py", "hole(picture[None], box) for",
             "picture[None] for", INPAINT),
    Mutation("the negative does not see the background", HOSTING + "view.py",
             "Shown(None, None, None, around, 1.0, strengths.text)",
             "Shown(None, None, None, None, 1.0, strengths.text)", INPAINT),
    Mutation("background and location change places", HOSTING + "customnet_model.py",
             'extra.append(self._latents(shown.background, noise, "background"))',
             'extra.insert(0, self._latents(shown.background, noise, "background"))', INPAINT),
    Mutation("a cut-out keeps its size", CUSTOMNET + "pixels.py",
             "    picture.thumbnail((limit, limit), Image.Resampling.LANCZOS)\n", "", UNIT),
    Mutation("white margin in the picture is object enough", CUSTOMNET + "placement.py", "    x0, y0, x1, y1 = own\n", "", UNIT),
    Mutation("a reference of another size is squashed in float", CUSTOMNET + "pixels.py", "Image.Resampling.BICUBIC",
             "Image.Resampling.LANCZOS", UNIT),
    Mutation("the zoom of the host's camera is not seen", CUSTOMNET + "view.py", "far / zoom / reference_distance",
             "far / reference_distance", UNIT),
    Mutation("gigabytes are read before the folder is asked", HOSTING + "customnet.py",
             "tempfile.TemporaryFile(dir=target.parent).close()", "pass", ASKED),
    Mutation("the bench looks for the building where it was asked", "tests/bench/_view_rules.py",
             "return torch.nn.functional.avg_pool2d(differs, 5, 1, 2)[:, 0] > 0.5",
             "return (torch.nn.functional.avg_pool2d(differs, 5, 1, 2)[:, 0] > 0.5) & (inside(scene.box) > 0)", OUTLINE),
    Mutation("the bench's rows through the nodes are the true views", "tests/bench/customnet.py",
             "torch.cat([nodes.paint(part, 900 + number) for number, part in enumerate(parts)])", "views.render(asked)[0]",
             ("tests/host/test_bench_customnet.py::test_rows_through_the_nodes",)),
    Mutation("references are checked together", HOSTING + "view.py", ".all(-1).float().mean(1)", ".all(-1).float().mean()[None]",
             REFERENCES),
    Mutation("square is counted in the frame of the box", CUSTOMNET + "placement.py",
             "x, y, w, h = box[0] * width, box[1] * height, box[2] * width, box[3] * height",
             "x, y, w, h = box[0] * width, box[1] * width, box[2] * width, box[3] * width", UNIT),
    Mutation("the release's schedule is cut at its noisy end", HOSTING + "exact.py", "levels if denoise >= 1 else", "None or",
             SCHEDULE),
    Mutation("half of a half is saved", HOSTING + "customnet.py", 'return "F32" not in network', "return False", HALF),
    Mutation("a part reads the whole file", HOSTING + "customnet.py", " and name.startswith(parts or \"\")", "", PART),
]
