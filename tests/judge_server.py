"""An OpenAI-compatible server on this machine that judges by a known rule, and fails as it is told.

`rule` gives the text of an answer: it is called with what stands in the tags of our templates.
`fault` names what goes wrong with an attempt: it is called with the number of the request, from 1,
and with how often the same question was asked before."""
import json, random, re, socket, threading, time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

STATUS = {"400": 400, "401": 401, "404": 404, "429": 429, "500": 500, "503": 503, "quota": 429,
          "later": 429, "much later": 429}


def choose(first, second): return json.dumps({"choice": "A" if first else "B" if second else "tie"})


def longer(a, b, **_): return choose(len(a) > len(b), len(b) > len(a))
def always_first(**_): return choose(True, False)


def coin(seed):
    "A choice that depends on the texts and their order alone, and has no reason."
    def rule(a, b, **_): return choose(random.Random(f"{seed}|{a}|{b}").random() < .5, True)
    return rule


def by_length(response, **_):
    "A grade for the tests of scores."
    return json.dumps({"score": 1 + len(response) % 10})


def parts(text):
    "What stands in the tags of a template."
    found = {name: re.search(rf"<{tag}>\n(.*?)\n</{tag}>", text, re.S)
             for name, tag in dict(a="response_a", b="response_b", response="response").items()}
    return {name: match[1] for name, match in found.items() if match}


class _Judge(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *_): pass

    def _send(self, value, status=200, more=0, **headers):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", headers.pop("kind", "application/json"))
        self.send_header("Content-Length", str(len(body) + more))
        for name, text in headers.items(): self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path.endswith("/models") and self.server.lists_models:
            return self._send({"object": "list", "data": []})
        self._send({"error": {"message": "no such page"}}, 404)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text, server = body["messages"][-1]["content"], self.server
        with server.lock:
            before = server.asked.count(text)
            server.asked.append(text)
            server.bodies.append((time.monotonic(), body, self.headers))
            server.now += 1
            server.most = max(server.most, server.now)
            fault = server.fault(len(server.asked), before)
        try: self._fail(fault, body, text) if fault else self._answer(body, text)
        except (BrokenPipeError, ConnectionResetError): pass
        finally:
            with server.lock: server.now -= 1

    def _fail(self, fault, body, text):
        whole = json.dumps(self._reply(body, self.server.rule(**parts(text)))).encode()
        if fault in STATUS:
            code = "insufficient_quota" if fault == "quota" else None
            wait = {"429": "0", "later": "0.6", "much later": "86400"}.get(fault)
            said = f"this is fault {fault}, {self.headers.get('Authorization')}"
            return self._send({"error": {"message": said, "code": code}}, STATUS[fault],
                              **({"Retry_After": wait} if wait else {}))
        if fault == "hang": self.server.free.wait(20)
        if fault == "drip":
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            for _ in range(80): self.server.free.wait(.05) or self.wfile.write(b" ")
            self.wfile.write(whole) # after four seconds, each byte in time
            self.close_connection = True
        if fault == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        if fault == "cut":
            self._send(whole[:40], more=len(whole) - 40)
            self.close_connection = True
        if fault == "not json": self._send(whole[:40])
        if fault == "page": self._send(b"<html>bad gateway</html>", kind="text/html")
        if fault == "no choices": self._send({**json.loads(whole), "choices": []})
        if fault == "no content": self._send(self._reply(body, None))
        if fault == "refusal": self._send(self._reply(body, None, refusal="I will not judge this."))
        if fault == "filter": self._send(self._reply(body, None, "content_filter"))
        if fault == "length": self._send(self._reply(body, '{"choice": "A', "length"))
        if fault == "prose": self._send(self._reply(body, "Both have their merits."))
        if fault == "no usage": self._send({**json.loads(whole), "usage": None})

    def _answer(self, body, text):
        time.sleep(self.server.delay(len(self.server.asked)))
        self._send(self._reply(body, self.server.rule(**parts(text))))

    def _reply(self, body, content, finish="stop", refusal=None):
        message = {"role": "assistant", "content": content, "refusal": refusal}
        sent = len(body["messages"][-1]["content"]) // 4
        return {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"] + "-1",
                "choices": [{"index": 0, "message": message, "finish_reason": finish}],
                "usage": {"prompt_tokens": sent, "completion_tokens": 6, "total_tokens": sent + 6}}


@contextmanager
def judge_server(rule=longer, fault=lambda number, before: None, delay=lambda number: 0.,
                 lists_models=True):
    "The server; `url` is its base_url, `asked` the questions, `most` how many at a time."
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Judge)
    server.rule, server.fault, server.delay, server.lists_models = rule, fault, delay, lists_models
    server.asked, server.bodies, server.now, server.most = [], [], 0, 0
    server.lock, server.free = threading.Lock(), threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield server
    finally:
        server.free.set()
        server.shutdown(), server.server_close()
