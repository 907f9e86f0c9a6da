"""Chromium without a window, driven over its own DevTools protocol: aiohttp only, which the host needs anyway."""
from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from .paths import HarnessError

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--mute-audio",
         "--remote-debugging-port=0", "--window-size=1600,1000")


def program() -> str | None:
    """Chromium or Chrome of this machine (LIKENESS_CHROMIUM names another one), or None."""
    named = os.environ.get("LIKENESS_CHROMIUM")
    found = (shutil.which(name) for name in ((named,) if named else PROGRAMS))
    return next((path for path in found if path), None)


class PageError(AssertionError):
    """A script of the test raised inside the page, or the page did not get where it should."""


class Browser:
    """One page of a fresh profile; `with` ends the program and removes the profile."""

    def __init__(self, start_timeout: float = 120) -> None:
        path = program()
        if path is None:
            raise HarnessError(f"No browser: install Chromium (looked for {', '.join(PROGRAMS)}).")
        self.errors: list[str] = []  # uncaught exceptions and messages of level error, as the console shows them
        self._profile = Path(tempfile.mkdtemp(prefix="likeness-browser-"))
        self._loop = asyncio.new_event_loop()
        self._number, self._session, self._socket = 0, None, None
        self._process = subprocess.Popen(
            [path, *FLAGS, f"--user-data-dir={self._profile}", "about:blank"], stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            self._loop.run_until_complete(self._connect(time.monotonic() + start_timeout))
            for domain in ("Page", "Runtime", "Log"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    async def _connect(self, end: float) -> None:
        import aiohttp

        self._session = aiohttp.ClientSession()
        note = self._profile / "DevToolsActivePort"
        while time.monotonic() < end and self._process.poll() is None:
            try:
                port = int(note.read_text().split()[0])
                async with self._session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                    pages = [t for t in await answer.json() if t["type"] == "page"]
                self._socket = await self._session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0)
                return
            except (OSError, ValueError, IndexError, aiohttp.ClientError):
                await asyncio.sleep(0.2)
        raise HarnessError("The browser did not start.")

    # -- the protocol -------------------------------------------------------------------------------
    def call(self, method: str, timeout: float = 60, **parameters: Any) -> dict:
        """One command of the protocol and its result; events that come meanwhile are looked at."""
        return self._loop.run_until_complete(asyncio.wait_for(self._call(method, parameters), timeout))

    async def _call(self, method: str, parameters: dict) -> dict:
        self._number += 1
        number = self._number
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        async for message in self._socket:
            data = json.loads(message.data)
            if data.get("id") == number:
                if "error" in data:
                    raise PageError(f"{method}: {data['error'].get('message')}")
                return data["result"]
            self._note(data)
            if data.get("method") == "Page.javascriptDialogOpening":  # "leave the page?" would hold everything up
                self._number += 1
                await self._socket.send_json({"id": self._number, "method": "Page.handleJavaScriptDialog",
                                              "params": {"accept": True}})
        raise PageError("The browser closed the connection.")

    def _note(self, event: dict) -> None:
        parameters = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            about = parameters["exceptionDetails"]
            self.errors.append(about.get("exception", {}).get("description") or about["text"])
        elif event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")
        elif event.get("method") == "Runtime.consoleAPICalled" and parameters["type"] == "error":
            self.errors.append(" ".join(str(a.get("value", a.get("description", ""))) for a in parameters["args"]))

    # -- what a person does ------------------------------------------------------------------------
    def open(self, address: str) -> None:
        """Go to an address and wait for its document."""
        self.call("Page.navigate", url=address)
        self.until("document.readyState === 'complete'", f"{address} to load")

    def run(self, script: str, *values: Any, timeout: float = 60) -> Any:
        """The value of an async function body inside the page; `values` arrive as `args`."""
        text = f"(async (args) => {{ {script} }})({json.dumps(values)})"
        got = self.call("Runtime.evaluate", timeout, expression=text, awaitPromise=True, returnByValue=True, userGesture=True)
        if "exceptionDetails" in got:
            about = got["exceptionDetails"]
            raise PageError(about.get("exception", {}).get("description") or about["text"])
        return got["result"].get("value")

    def until(self, condition: str, what: str, *values: Any, timeout: float = 120) -> Any:
        """Ask for a JavaScript expression until it is true; its value."""
        end = time.monotonic() + timeout
        while True:
            try:
                value = self.run(f"return {condition}", *values)
            except PageError:  # a page that is just being left has no context
                if time.monotonic() > end:
                    raise
                value = None
            if value:
                return value
            if time.monotonic() > end:
                raise PageError(f"Waited {timeout:.0f} s in vain for {what}. {' | '.join(self.errors[-5:])}")
            time.sleep(0.2)

    def click(self, place: str, what: str, *values: Any, timeout: float = 60) -> None:
        """A real mouse click into the middle of the element that the expression `place` gives, once it stands still and
        nothing lies over it."""
        find = f"""(() => {{ const e = {place}; if (!e) return null; e.scrollIntoView({{block: 'center'}});
            const r = e.getBoundingClientRect(), x = r.x + r.width / 2, y = r.y + r.height / 2;
            const top = document.elementFromPoint(x, y);
            return r.width && top && (e.contains(top) || top.contains(e)) ? [x, y] : null }})()"""
        end = time.monotonic() + timeout
        before, now = None, self.until(find, what, *values, timeout=timeout)
        while before != now and time.monotonic() < end:
            time.sleep(0.2)
            before, now = now, self.until(find, what, *values, timeout=timeout)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, x=now[0], y=now[1], **button)

    def press(self, key: str, control: bool = False, command: str = "") -> None:
        """A letter key, with Ctrl if asked; `command` (copy, paste) is what the system makes of it."""
        code = {"code": f"Key{key.upper()}", "key": key, "windowsVirtualKeyCode": ord(key.upper()),
                "modifiers": 2 if control else 0}
        self.call("Input.dispatchKeyEvent", type="rawKeyDown", commands=[command] if command else [], **code)
        self.call("Input.dispatchKeyEvent", type="keyUp", **code)

    def write(self, text: str) -> None:
        """Text at the cursor."""
        self.call("Input.insertText", text=text)

    def enter(self) -> None:
        """The key Enter."""
        code = {"code": "Enter", "key": "Enter", "windowsVirtualKeyCode": 13}
        for kind, more in (("rawKeyDown", {}), ("char", {"text": "\r"}), ("keyUp", {})):
            self.call("Input.dispatchKeyEvent", type=kind, **code, **more)

    def picture(self) -> bytes:
        """PNG of what the window would show."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def close(self) -> None:
        """End the program with all its children and remove the profile; safe to call twice."""
        if self._loop.is_closed():
            return
        for part in (self._socket, self._session):
            if part is not None:
                self._loop.run_until_complete(part.close())
        self._loop.close()
        if self._process.poll() is None:
            try:
                if os.name == "nt":
                    self._process.kill()
                else:
                    os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self._process.wait(20)
        shutil.rmtree(self._profile, ignore_errors=True)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
