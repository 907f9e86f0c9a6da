"""For those who want to repeat a release's own pictures: its schedule and its solver."""
from __future__ import annotations

from comfy_api.latest import io

from ..models.hosting.exact import RELEASES, release_sigmas, single_step_sampler
from . import _types


class ReleaseSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_ReleaseSigmas",
            display_name="Release Sigmas",
            category=_types.EXACT,
            description="The very noise levels that a method's public release samples at, for Sampler Custom.",
            search_aliases=["scheduler", "sigmas", "trailing timesteps", "realcustom schedule",
                            "customnet schedule", "zero123 schedule", "ddim"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled; its own table of noise is read."),
                io.Combo.Input("release", options=list(RELEASES), tooltip="Whose schedule."),
                io.Int.Input("steps", default=25, min=1, max=1000,
                             tooltip="RealCustom++ takes 25. CustomNet takes 50 and runs 49 of them."),
                io.Float.Input(
                    "denoise", default=1.0, min=0.01, max=1.0, step=0.01,
                    tooltip="Below 1 only the last part of a longer schedule is run, for image to image. The "
                            "number of steps stays.",
                ),
            ],
            outputs=[
                io.Sigmas.Output(display_name="sigmas", tooltip="One level a step, and the last one. Goes to Sampler Custom."),
            ],
        )

    @classmethod
    def execute(cls, model: io.Model.Type, release: str, steps: int, denoise: float) -> io.NodeOutput:
        return io.NodeOutput(release_sigmas(model, steps, denoise, release))


class RealCustomSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_RealCustomSampler",
            display_name="RealCustom Sampler",
            category=_types.EXACT,
            description="The solver of the RealCustom release: DPM-Solver++ of second order with one evaluation a "
                        "step. Core's dpmpp_2m comes close; this one repeats the release.",
            search_aliases=["dpm solver singlestep", "realcustom", "dpmpp 2s", "sampler"],
            inputs=[],
            outputs=[
                io.Sampler.Output(display_name="sampler", tooltip="Goes to Sampler Custom or Sampler Custom Advanced."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(single_step_sampler())


NODES = [ReleaseSigmas, RealCustomSampler]
