"""A server on this machine in the Hub's own layout, for clients that are real.

It serves the folders below `root`, `datasets/owner/name` and `models/owner/name`, each with its one
commit under the names `main` and `v1`, and notes which files were asked for. A file that is to
`stall` is sent up to its middle only, and then nothing more. Whoever shows the token `write` can
make a model repository and commit to it; the token `read` is not enough."""
import base64, hashlib, json, os, sys, threading, time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote

COMMIT = "1" * 40


def _entry(repo, path):
    name = path.relative_to(repo).as_posix()
    if path.is_dir(): return dict(type="directory", path=name, oid=COMMIT)
    oid = hashlib.sha1(path.read_bytes()).hexdigest()
    return dict(type="file", path=name, size=path.stat().st_size, oid=oid)


class _Writing:
    "What the Hub answers when a model is written."
    def _writes(self, words)->bool:
        "Answer a request that writes, if it is one."
        if self.command == "PUT": self._keep(words[-1])
        elif self.command == "POST" and words[1:] == ["validate-yaml"]: self._json({})
        elif self.command == "POST" and words[1:] == ["repos", "create"]: self._create()
        elif self.command == "POST" and words[-3:] == ["lfs", "objects", "batch"]: self._batch()
        elif self.command == "POST" and words[4:5] == ["preupload"]: self._modes()
        elif self.command == "POST" and words[4:5] == ["commit"]: self._commit(words)
        elif self.command == "POST" and words[4:5] == ["branch"]: self._json({})
        else: return False
        return True

    def _create(self):
        asked = json.loads(self.body)
        name = f"{asked.get('organization')}/{asked['name']}"
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token != "write": return self._send(status=403 if token else 401)
        folder = self.server.root/"models"/name
        made = dict(url=f"{self.server.url}/{name}")
        if folder.exists(): return self._json(made, 409)
        folder.mkdir(parents=True)
        self.server.private[name] = asked.get("private") or asked.get("visibility") == "private"
        self._json(made)

    def _modes(self):
        "Weights go by LFS, all else in the commit."
        mode = lambda path: "lfs" if path.endswith(".safetensors") else "regular"
        self._json(dict(files=[dict(path=f["path"], uploadMode=mode(f["path"]), shouldIgnore=False)
                               for f in json.loads(self.body)["files"]]))

    def _batch(self):
        put = lambda oid: dict(upload=dict(href=f"{self.server.url}/put/{oid}"))
        self._json(dict(objects=[dict(oid=o["oid"], size=o["size"], actions=put(o["oid"]))
                                 for o in json.loads(self.body)["objects"]]))

    def _keep(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid: return self._send(status=400)
        self.server.kept[oid] = self.body
        self._send()

    def _commit(self, words):
        parts = [json.loads(line) for line in self.body.splitlines()]
        folder, files = self.server.root/"models"/words[2]/words[3], {}
        for part in parts:
            value = part["value"]
            if part["key"] == "file": files[value["path"]] = base64.b64decode(value["content"])
            if part["key"] == "lfsFile": files[value["path"]] = self.server.kept[value["oid"]]
        for path, body in files.items():
            (folder/path).parent.mkdir(parents=True, exist_ok=True)
            (folder/path).write_bytes(body)
        self.server.committed.append((words[5], parts[0]["value"]["summary"], sorted(files)))
        self._json(dict(commitUrl=f"{self.server.url}/{words[2]}/{words[3]}/commit/{COMMIT}",
                        commitOid=COMMIT))


class _Hub(_Writing, BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *_): pass

    def _send(self, body=b"", status=200, **headers):
        self.send_response(status)
        self.send_header("Content-Length", headers.pop("length", len(body)))
        for name, value in headers.items(): self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(body)

    def _json(self, value, status=200):
        self._send(json.dumps(value).encode(), status, Content_Type="application/json")

    def _missing(self, code="EntryNotFound"): self._send(status=404, X_Error_Code=code)

    def _answer(self):
        words = unquote(self.path.partition("?")[0]).strip("/").split("/")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self._writes(words): return
        api = words[0] == "api"
        if api: words = words[1:]
        if not api and words[0] != "datasets": words = ["models", *words]
        repo, rest = self.server.root.joinpath(*words[:3]), words[3:]
        if not repo.is_dir() or len(words) < 3: return self._missing("RepoNotFound")
        named = rest[1] if len(rest) > 1 else "main"
        self.commit = self.server.commits.get("/".join(words[1:3]), COMMIT)
        if named not in ("main", "v1", self.commit): return self._missing("RevisionNotFound")
        (self._about if api else self._file)(repo, rest)

    def _about(self, repo, rest):
        "What a repository is, its tree below a folder, or some of its paths."
        kind, below = (rest + ["revision"])[0], repo.joinpath(*rest[2:])
        inside = lambda folder, names: [_entry(repo, path) for path in sorted(folder.glob(names))]
        if kind == "revision":
            files = [dict(rfilename=e["path"]) for e in inside(repo, "**/*") if e["type"] == "file"]
            return self._json(dict(id="/".join(repo.parts[-2:]), sha=self.commit, private=False,
                                   tags=[], siblings=files))
        if kind == "tree":
            deep = "recursive=true" in self.path.lower()
            if not below.is_dir(): return self._missing()
            return self._json(inside(below, "**/*" if deep else "*"))
        asked = parse_qs(self.body.decode())["paths"]
        self._json([_entry(repo, repo/path) for path in asked if path and (repo/path).exists()])

    def _file(self, repo, rest):
        "A file, or the range of its bytes that is asked for."
        path = repo.joinpath(*rest[2:])
        if not path.is_file(): return self._missing()
        body, status, more = path.read_bytes(), 200, {}
        if self.command == "GET": self.server.asked.append(path.relative_to(repo).as_posix())
        stalls = self.command == "GET" and path.name == self.server.stall
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.partition("=")[2].partition("-")
            end, size = min(int(last or len(body)) + 1, len(body)), len(body)
            body, status = body[int(first):end], 206
            more = dict(Content_Range=f"bytes {first}-{end - 1}/{size}")
            self.server.ranges.append((path.name, int(first)))
        etag = hashlib.sha1(path.read_bytes()).hexdigest()
        more |= dict(ETag=f'"{etag}"', X_Repo_Commit=self.commit)
        if stalls: more, body = {**more, "length": len(body)}, body[:len(body) // 2]
        self._send(body, status, **more)
        while stalls and self.server.stall == path.name: time.sleep(.05)
        self.close_connection = stalls or self.close_connection

    do_GET = do_HEAD = do_POST = do_PUT = _answer


@contextmanager
def hub(root, commits=()):
    """The server; `asked` lists the files that were read and `ranges` the parts that began later,
    `committed` what was written, and `private` which repositories were made. `url` is what
    HF_ENDPOINT must be. `commits` gives repositories a commit of their own."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.root, server.asked, server.ranges, server.stall = root, [], [], None
    server.commits, server.kept, server.private, server.committed = dict(commits), {}, {}, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield server
    finally: server.shutdown(), server.server_close()


def online(server, cache)->dict:
    """The environment of a process that has this hub, a cache of its own, and the tests' path:
    behind PYTHONPATH, by which tools/mutants.py names its copy of the library."""
    path = [*filter(None, [os.environ.get("PYTHONPATH")]), *sys.path]
    return {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0", "PYTHONPATH": os.pathsep.join(path)}
