"""Talks to a running ComfyUI over HTTP and its websocket, as the page does."""
from __future__ import annotations

import asyncio
import json
import time
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .paths import HarnessError

Event = Callable[[str, dict], None]
# A proxy set for the outside world must not catch calls to our own machine.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


@dataclass
class RunResult:
    """What one queued prompt did."""

    status: str  # success | error | interrupted | invalid (refused before it ran) | timeout
    error: str = ""
    node_errors: dict = field(default_factory=dict)
    prompt_id: str = ""
    seconds: float = 0.0
    executed: list[str] = field(default_factory=list)  # node ids that ran, in order
    cached: list[str] = field(default_factory=list)  # node ids answered by the host's cache
    outputs: dict[str, dict] = field(default_factory=dict)  # node id -> what the page was sent
    images: dict[str, list[bytes]] = field(default_factory=dict)  # node id -> files as they were written
    files: dict[str, list[dict]] = field(default_factory=dict)  # node id -> filename, subfolder, type
    previews: list[bytes] = field(default_factory=list)  # sampler previews (binary frames)
    events: list[tuple[float, str, dict]] = field(default_factory=list)
    history: dict = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Every output of the prompt was accepted and made."""
        return self.status == "success" and not self.node_errors


class Client:
    """Calls to the server at `url` (without a slash at the end)."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._info: dict | None = None

    def log(self, lines: int = 0) -> str:
        """The server's log where it is known (see Server)."""
        return ""

    def get_bytes(self, path: str, timeout: float = 60) -> bytes:
        """Body of GET `path`; urllib's HTTPError for 4xx and 5xx."""
        with _open(self.url + path, timeout=timeout) as answer:
            return answer.read()

    def get(self, path: str, timeout: float = 60) -> Any:
        """GET `path` as JSON."""
        return json.loads(self.get_bytes(path, timeout))

    def post(self, path: str, data: Any = None, timeout: float = 60) -> Any:
        """POST JSON to `path`; JSON back, or None for an empty answer."""
        body = json.dumps({} if data is None else data).encode()
        request = urllib.request.Request(
            self.url + path, data=body, headers={"Content-Type": "application/json"}
        )
        with _open(request, timeout=timeout) as answer:
            text = answer.read()
        return json.loads(text) if text.strip() else None

    def object_info(self, fresh: bool = False) -> dict:
        """Every node the server knows; kept, because it is some megabytes."""
        if self._info is None or fresh:
            self._info = self.get("/object_info")
        return self._info

    def interrupt(self) -> None:
        """Cancel what runs now, as the page's button does."""
        self.post("/interrupt")

    def free(self) -> None:
        """Unload all models and drop the cache before the next prompt."""
        self.post("/free", {"unload_models": True, "free_memory": True})
        # The server looks at it between two prompts: after this one at the latest, and so before the next.
        result = self.run({"1": {"class_type": "PreviewAny", "inputs": {"source": "free"}}})
        if result.status != "success":
            raise HarnessError(f"The server could not be freed: {result.error or result.status}")

    def run(
        self, prompt: dict, timeout: float = 300, on_event: Event | None = None, workflow: dict | None = None
    ) -> RunResult:
        """Queue an API prompt, wait for its end, fetch its pictures. Never raises for a failed prompt.

        `on_event(type, data)` sees each websocket message while it runs (call `interrupt` there).
        `workflow` is the UI graph, written into the pictures as the page does.
        """
        return asyncio.run(self._run(prompt, timeout, on_event, workflow))

    async def _run(
        self, prompt: dict, timeout: float, on_event: Event | None, workflow: dict | None
    ) -> RunResult:
        import aiohttp

        client, result = uuid.uuid4().hex, RunResult("timeout")
        body: dict[str, Any] = {"prompt": prompt, "client_id": client}
        if workflow is not None:
            body["extra_data"] = {"extra_pnginfo": {"workflow": workflow}}
        async with aiohttp.ClientSession(self.url, timeout=aiohttp.ClientTimeout(total=None)) as session:
            async with session.ws_connect(f"/ws?clientId={client}", max_msg_size=0) as socket_:
                begin = time.monotonic()
                async with session.post("/prompt", json=body) as answer:
                    reply = await answer.json()
                result.node_errors = reply.get("node_errors") or {}
                if "prompt_id" not in reply:
                    result.status, result.error = "invalid", refusal(reply)
                    return result
                result.prompt_id = reply["prompt_id"]
                if result.node_errors:
                    result.error = refusal({"node_errors": result.node_errors})
                try:
                    await asyncio.wait_for(self._follow(socket_, result, begin, on_event), timeout)
                except asyncio.TimeoutError:
                    result.error = f"not finished after {timeout:.0f} s"
                    self.interrupt()
                result.seconds = time.monotonic() - begin
            async with session.get(f"/history/{result.prompt_id}") as answer:
                result.history = (await answer.json()).get(result.prompt_id) or {}
            result.outputs = result.history.get("outputs", {})
            for node, output in result.outputs.items():
                for item in (i for v in output.values() if isinstance(v, list) for i in v):
                    if isinstance(item, dict) and "filename" in item:
                        view = {k: item.get(k, "") for k in ("filename", "subfolder", "type")}
                        async with session.get("/view", params=view) as answer:
                            if answer.status == 200:
                                result.images.setdefault(node, []).append(await answer.read())
                                result.files.setdefault(node, []).append(view)
        return result

    async def _follow(
        self, socket_: Any, result: RunResult, begin: float, on_event: Event | None
    ) -> None:
        import aiohttp

        async for message in socket_:
            if message.type == aiohttp.WSMsgType.BINARY:
                result.previews.append(message.data)
                continue
            event = json.loads(message.data)
            kind, data = event["type"], event.get("data") or {}
            if data.get("prompt_id") not in (None, result.prompt_id):
                continue
            result.events.append((time.monotonic() - begin, kind, data))
            if kind == "execution_cached":
                result.cached = list(data["nodes"])
            elif kind == "executing" and data.get("node") is not None:
                result.executed.append(data["node"])
            elif kind == "execution_success":
                result.status = "success"
            elif kind == "execution_interrupted":
                result.status = "interrupted"
            elif kind == "execution_error":
                result.status = "error"
                who = f"{data.get('node_type')} (node {data.get('node_id')})"
                result.error = f"{who}: {str(data.get('exception_message', '')).strip()}"
            if on_event is not None:
                on_event(kind, data)
            # Sent after the history is written, for a success, an error and a cancel alike.
            if kind == "executing" and data.get("node") is None and data.get("prompt_id"):
                return
        if result.status == "timeout":
            result.status, result.error = "error", "the server closed the connection:\n" + self.log(40)


def refusal(reply: dict) -> str:
    """The host's reasons for refusing a prompt, as one text."""
    parts = []
    for node, entry in (reply.get("node_errors") or {}).items():
        for error in entry.get("errors", []):
            text = ": ".join(t for t in (error.get("message"), error.get("details")) if t)
            parts.append(f"{entry.get('class_type')} (node {node}): {text}")
    error = reply.get("error")
    if error and not parts:
        details = error if isinstance(error, str) else f"{error.get('message')}: {error.get('details')}"
        parts.append(details.strip(": "))
    return "; ".join(parts) or "refused without a reason"
