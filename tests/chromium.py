"""A headless Chromium for tests of pages: the DevTools protocol through pipes, without any further package."""

import base64
import itertools
import json
import os
import select
import shutil
import signal
import time
from pathlib import Path
from types import TracebackType
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, _NAMES)), None) if hasattr(os, "posix_spawn") else None


class Page:
    """One page of a browser of its own; to be used in a ``with`` statement.

    Args:
        url: the page, usually ``Path.as_uri()``.
        profile: an empty folder for the browser's files.
        size: of the window in pixels.
        dark: whether the system is said to prefer dark pages.
    """

    def __init__(self, url: str, profile: Path, size: tuple[int, int] = (1200, 900), dark: bool = False) -> None:
        assert BROWSER is not None
        command = [BROWSER, "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--disable-gpu"]
        command += ["--no-first-run", "--hide-scrollbars", "--disable-dev-shm-usage", "--no-sandbox", "about:blank"]
        import fcntl

        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # The browser reads commands from descriptor 3 and answers on 4; copies from 10 on stay clear of both.
        copies = [fcntl.fcntl(theirs, fcntl.F_DUPFD_CLOEXEC, 10) for theirs in (theirs_in, theirs_out)]
        actions: list[Any] = [(os.POSIX_SPAWN_DUP2, copy, at) for at, copy in enumerate(copies, 3)]
        actions += [(os.POSIX_SPAWN_OPEN, at, os.devnull, os.O_WRONLY, 0) for at in (1, 2)]
        self._process = os.posix_spawn(BROWSER, command, os.environ, file_actions=actions)
        for theirs in (theirs_in, theirs_out, *copies):
            os.close(theirs)
        self._numbers = itertools.count(1)
        self._received = b""
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        window = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **window)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Network.enable")
        none = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.call("Network.emulateNetworkConditions", **none)
        self.open(url)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol, and its answer."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            while b"\0" in self._received:
                line, self._received = self._received.split(b"\0", 1)
                answer = json.loads(line)
                if answer.get("id") == number:
                    assert "error" not in answer, f"{method}: {answer['error']}"
                    return answer["result"]
            if select.select([self._in], [], [], 1)[0]:
                received = os.read(self._in, 2**20)
                assert received, "the browser has ended"
                self._received += received
        raise TimeoutError(f"{method}: no answer from the browser")

    def open(self, url: str) -> None:
        """Go to a page and wait until it is loaded."""
        self.call("Page.navigate", url=url)
        deadline = time.monotonic() + 60
        while self.eval("document.readyState") != "complete" or self.eval("location.href") == "about:blank":
            assert time.monotonic() < deadline, f"{url} does not load"
            time.sleep(0.05)

    def eval(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str, code: str = "", shift: bool = False) -> None:
        """Press and release a key."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=code, modifiers=8 * shift)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Drag with the left button, in pixels of the window."""
        for kind, (x, y) in (("mousePressed", start), ("mouseMoved", end), ("mouseReleased", end)):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def wheel(self, x: float, y: float, delta: float) -> None:
        """Turn the wheel over a point of the window; a negative delta is away from the user."""
        self.call("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=delta)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """Save what the window shows, or the whole page, as a PNG."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._out)  # the browser ends when its commands do
        os.close(self._in)
        deadline = time.monotonic() + 10
        while os.waitpid(self._process, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(self._process, signal.SIGKILL)
                deadline += 10
            time.sleep(0.05)
