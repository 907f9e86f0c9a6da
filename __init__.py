"""Likeness: one reference picture in, new pictures of that subject out."""
WEB_DIRECTORY = "./js"


async def comfy_entrypoint():
    from comfy_api.latest import ComfyExtension

    class Likeness(ComfyExtension):
        async def get_node_list(self):
            return []

    return Likeness()
