"""RealCustom++'s guidance: calls and memory beside the release's, what it costs at SDXL's size, and the miniature's rows.

counts: calls of the network at 25 steps, keys and values made while sampling. memory: what the maps of one guidance pass
take at 1024 x 1024. located: the mask against the true area of rendered pictures. quality: the trained adapter on held-out
identities (three files of three training seeds with --adapters). sdxl: seconds at the true shapes, about 14 GiB.
"""
from __future__ import annotations

import argparse
import weakref
from pathlib import Path
from typing import Any

STEPS, REFRESH = 25, 12


def counts() -> dict[str, int]:
    """A random adapter on the miniature, all layers: what 25 steps ask of the network and of the adapter."""
    import comfy.samplers
    import torch
    from _guidance_world import World, injected, random_adapter

    from likeness.models.hosting.word_maps import CAPTURE

    with torch.inference_mode():
        world = World()
        who = random_adapter(world)
        done = injected(world, who, "a photo of a cat on the beach", "cat", refresh=REFRESH)
        seen = {"guidance": 0, "generate": 0, "rows": 0, "kv": 0}

        def look(apply_model: Any, args: dict[str, Any]) -> Any:
            kind = "guidance" if CAPTURE in args["c"]["transformer_options"] else "generate"
            seen[kind] += 1
            seen["rows"] += args["input"].shape[0]
            return apply_model(args["input"], args["timestep"], **args["c"])

        module = who.adapter.patcher.model
        for name in ("keys_values", "encode"):
            real = getattr(module, name)
            setattr(module, name, lambda *a, real=real: seen.update(kv=seen["kv"] + 1) or real(*a))
        model = done.model.clone()
        model.set_model_unet_function_wrapper(look)
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(done.positive, done.negative)
        guider.set_cfg(3.5)
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)
        guider.sample(torch.randn(1, 48, 8, 8), torch.zeros(1, 48, 8, 8), comfy.samplers.ksampler("euler"), sigmas,
                      disable_pbar=True, seed=0)
    return {"calls_guidance": seen["guidance"], "calls_generate": seen["generate"], "rows": seen["rows"],
            "kv_recomputed": seen["kv"]}


class Watermark:
    """The most bytes that live at a time in tensors made inside the block."""

    def __enter__(self) -> Any:
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode

        mark = self
        self.now = self.most = 0
        known: set[int] = set()

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                out = function(*args, **(kwargs or {}))
                for tensor in out if isinstance(out, (tuple, list)) else (out,):
                    if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                        storage = tensor.untyped_storage()
                        size, place = storage.nbytes(), storage.data_ptr()
                        known.add(place)
                        mark.now += size
                        mark.most = max(mark.most, mark.now)
                        weakref.finalize(storage, mark.gone, known, place, size)
                return out
        self.mode = Mode()
        self.mode.__enter__()
        return self

    def gone(self, known: set[int], place: int, size: int) -> None:
        known.discard(place)
        self.now -= size

    def __exit__(self, *error: Any) -> None:
        self.mode.__exit__(*error)


def memory() -> dict[str, int]:
    """The 70 layers of SDXL at 1024, one picture, a two-token word: what stays, and the most that is there for a moment."""
    import torch

    from likeness.models.hosting.stamps import KEY, RowStamps
    from likeness.models.hosting.word_maps import Capture, Sought, Target, mark

    layers = [(64, 640, 10)] * 4 + [(32, 1280, 20)] * 60 + [(64, 640, 10)] * 6
    capture = Capture([Target(77, (Sought("word", (5, 6), ("max_norm",)),))], (), False)
    stamps = RowStamps(((mark(0),),), (None,), (128, 128), 1.0)
    most = 0
    with torch.inference_mode():
        for side, channels, heads in layers:
            q, k = torch.randn(1, side * side, channels).half(), torch.randn(1, 77, channels).half()
            options = {KEY: stamps, "n_heads": heads, "activations_shape": [1, channels, side, side]}
            with Watermark() as seen:
                capture.add("output.0.0", q, k, options)
            most = max(most, seen.most)
    release = sum(heads * 77 * side * side * 4 for side, _, heads in layers)
    return {"map_bytes_held": capture.held, "map_bytes_transient": most, "map_bytes_release_a_call": release}


def main(argv: list[str]) -> dict[str, Any]:
    import torch

    parser = argparse.ArgumentParser(prog="dev.py bench guidance")
    rows = ("counts", "memory", "located", "quality", "sdxl", "sd15")
    parser.add_argument("--only", choices=rows, nargs="*", default=["counts", "memory", "located", "quality"])
    parser.add_argument("--adapters", type=Path, nargs="*", default=[], help="files of several training seeds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("output/bench"),
                        help="folder of pictures and of the adapters measured before, which are not measured again")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    out: dict[str, Any] = {"steps": STEPS, "refresh": REFRESH}
    if "counts" in args.only:
        out |= counts()
    if "memory" in args.only:
        out |= memory()
    if "located" in args.only:
        from _guidance_located import located
        out |= located()
    if "quality" in args.only:
        from _guidance_quality import quality
        out |= quality(args.adapters, args.out)
    for family in [word for word in ("sd15", "sdxl") if word in args.only]:  # the smaller first: peaks are the process's
        from _guidance_shapes import overhead
        out |= overhead(family, args.threads, STEPS, REFRESH)
    return out
