"""Helper pack for a test server: nodes that break a run on purpose, and one that tells what the process holds."""
from __future__ import annotations

import gc
import json

import comfy.model_management
import torch
from comfy_api.latest import ComfyExtension, io


class OutOfMemory(io.ComfyNode):
    """The model works until a layer of this step asks for memory in vain, as a full card does."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Fault_OutOfMemory", category="fault",
            inputs=[io.Model.Input("model"), io.Int.Input("step", default=1, min=0)], outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: io.Model.Type, step: int) -> io.NodeOutput:
        model = model.clone()

        def patch(x, extra_options):
            # From the call alone: the host's cache keeps this MODEL, and what it counted itself would be there in the next run.
            done = int((extra_options["sample_sigmas"] > extra_options["sigmas"].max()).sum())
            # After our own patches of the same block: what they hold at this moment must be let go as well.
            if done >= step and extra_options["block"][0] == "output":
                raise comfy.model_management.OOM_EXCEPTION(f"simulated at step {done}")
            return x

        model.set_model_patch(patch, "middle_patch")
        return io.NodeOutput(model)


class Residents(io.ComfyNode):
    """Text: tensors that live in this process, bytes of VRAM that torch gave out, models that the host has loaded."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Fault_Residents", category="fault", is_output_node=True,
            inputs=[io.Int.Input("turn", default=0, min=0, max=1 << 30)], outputs=[io.String.Output()],
        )

    @classmethod
    def execute(cls, turn: int) -> io.NodeOutput:
        gc.collect()
        tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
        models = len(comfy.model_management.current_loaded_models)
        vram = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        text = json.dumps({"tensors": tensors, "vram": vram, "models": models})
        return io.NodeOutput(text, ui={"text": [text]})


class Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [OutOfMemory, Residents]


async def comfy_entrypoint() -> ComfyExtension:
    return Extension()
