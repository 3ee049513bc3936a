"Headless Chromium over the DevTools protocol: as much of it as the tests of figures need."
import base64, contextlib, json, shutil, subprocess, time, urllib.request

import pytest

FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
         "--disable-background-networking --disable-component-update --hide-scrollbars "
         "--remote-allow-origins=* --remote-debugging-port=0").split()
KEY_CODES = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Enter": 13,
             "Tab": 9, " ": 32, "Home": 36, "End": 35, "PageUp": 33, "PageDown": 34}
TEXTS = {"Enter": "\r", " ": " "}


def find_chromium():
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next(filter(None, map(shutil.which, names)), None)


class Page:
    "One tab. Events that arrive between commands are kept in `events`."
    def __init__(self, socket):
        self.socket, self.count, self.events = socket, 0, []
        for domain in ("Page", "Runtime", "Network", "Log"): self.send(f"{domain}.enable")

    def send(self, method, **params):
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("method") == "Page.javascriptDialogOpening":  # "Leave this page?" Yes.
                self.socket.send(json.dumps({"id": 0, "method": "Page.handleJavaScriptDialog",
                                             "params": {"accept": True}}))
            elif "method" in message: self.events.append(message)
            elif message["id"] == self.count:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]

    def open(self, url):
        self.events.clear()
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def evaluate(self, code):
        "The value of a JavaScript expression; a promise is awaited."
        answer = self.send("Runtime.evaluate", expression=code, returnByValue=True,
                           awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:2000])
        return answer["result"].get("value")

    def wait(self, condition, seconds=30):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(RuntimeError):  # the page may be changing under our feet
                if value := self.evaluate(condition): return value
            time.sleep(.05)
        raise TimeoutError(f"never true: {condition}")

    def settle(self):
        "Wait for two frames: what was scheduled is drawn."
        self.evaluate("new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))")

    def key(self, name, modifiers=0):
        "Press and release; modifiers 8 is Shift."
        common = dict(key=name, code="Space" if name == " " else name, modifiers=modifiers,
                      windowsVirtualKeyCode=KEY_CODES[name])
        text = {"text": TEXTS[name]} if name in TEXTS else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def mouse(self, kind, x, y):
        pressed = kind != "mouseReleased"
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1,
                  buttons=int(pressed))

    def click(self, x, y):
        self.mouse("mousePressed", x, y)
        self.mouse("mouseReleased", x, y)

    def drag(self, start, end, steps=6, touch=False):
        "Mouse or finger from one point to another."
        points = [[a + (b - a) * k / steps for a, b in zip(start, end)] for k in range(steps + 1)]
        if touch: return self._swipe(points)
        self.mouse("mousePressed", *points[0])
        for point in points[1:]: self.mouse("mouseMoved", *point)
        self.mouse("mouseReleased", *points[-1])

    def _swipe(self, points):
        for k, (x, y) in enumerate(points):
            self.send("Input.dispatchTouchEvent", type="touchMove" if k else "touchStart",
                      touchPoints=[{"x": x, "y": y}])
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def viewport(self, width, height=900, mobile=False):
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=mobile)

    def dark(self, on=True):
        feature = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
        self.send("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self, path, full=True):
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=full)["data"]
        path.write_bytes(base64.b64decode(data))
        return path

    @property
    def errors(self):
        "Exceptions, console errors and failed loads since `open`, as text."
        bad = {"Runtime.exceptionThrown": lambda p: True,
               "Log.entryAdded": lambda p: p["entry"]["level"] == "error",
               "Runtime.consoleAPICalled": lambda p: p["type"] in ("error", "assert")}
        return [json.dumps(e["params"])[:600] for e in self.events
                if e["method"] in bad and bad[e["method"]](e["params"])]

    @property
    def requests(self):
        "Addresses asked for since `open`."
        return [e["params"]["request"]["url"] for e in self.events
                if e["method"] == "Network.requestWillBeSent"]


def _debug_port(profile, process):
    "Chromium writes its port into the profile once it listens."
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(FileNotFoundError, IndexError, ValueError):
            return int((profile/"DevToolsActivePort").read_text().split()[0])
        time.sleep(.05)
    raise RuntimeError("Chromium did not start.")


@contextlib.contextmanager
def chromium(folder):
    "A running browser with a fresh profile below `folder`; yields its `Page`, closes cleanly."
    websocket = pytest.importorskip("websocket",
                                    reason="needs websocket-client (comes with jupyterlab)")
    binary = find_chromium() or pytest.skip("needs Chromium on the PATH")
    profile = folder/"profile"
    process = subprocess.Popen([binary, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port = _debug_port(profile, process)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        tabs = json.load(opener.open(f"http://127.0.0.1:{port}/json"))
        address = next(t["webSocketDebuggerUrl"] for t in tabs if t["type"] == "page")
        socket = websocket.create_connection(address, timeout=60, http_no_proxy=["127.0.0.1"])
        page = Page(socket)
        yield page
        with contextlib.suppress(OSError, websocket.WebSocketException): page.send("Browser.close")
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired): process.wait(10)
        if process.poll() is None: process.kill()
