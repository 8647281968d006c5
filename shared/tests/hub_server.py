"""A stand-in of the Hugging Face hub in a thread: what its client calls to make a repository, upload and download files.

As the hub does, it takes weights by Git LFS and small files inside of the commit, and checks the card's metadata. It has no Xet,
the hub's newer way for large files: the client needs HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_THE-TOKEN-ITSELF"


class Hub:
    """The hub of one test.

    repositories: name -> path -> content. private: names.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.large: dict[str, bytes] = {}  # by SHA-256, what LFS holds
        owner = self

        class Handler(BaseHTTPRequestHandler):
            disable_nagle_algorithm = True  # else a small answer waits 40 ms for the header to be acknowledged
            protocol_version = "HTTP/1.1"

            def _handle(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                path = self.path.partition("?")[0]
                writes = self.command in ("POST", "PUT") and "validate" not in path and not path.startswith("/lfs/")
                if writes and self.headers["Authorization"] != f"Bearer {TOKEN}":
                    self._send(401, b"{}")
                    return
                found = owner.answer(self.command, path, body, f"http://{self.headers['Host']}")
                if found is None:
                    self._send(404, b'{"error": "Entry not found"}', {"X-Error-Code": "EntryNotFound"})
                elif isinstance(found, tuple):
                    self._send(200, *found)
                else:
                    self._send(200, json.dumps(found).encode())

            do_GET = do_HEAD = do_POST = do_PUT = _handle

            def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                given = {"Content-Type": "application/json", "Content-Length": str(len(content))} | (headers or {})
                for name, value in given.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                """Silent."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def commit(self, name: str) -> str:
        """The number of a repository's state, 40 digits."""
        files = {path: hashlib.sha256(content).hexdigest() for path, content in self.repositories[name].items()}
        return hashlib.sha1(json.dumps(files, sort_keys=True).encode()).hexdigest()

    def answer(self, method: str, path: str, body: bytes, url: str) -> Any:
        """What is sent back: something for JSON, or (content, headers); None where nothing is known of it."""
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'user'}/{asked['name']}"
            self.repositories.setdefault(name, {})
            self.private |= (
                {name}
                if "private" in (asked.get("visibility"), *(["private"] if asked.get("private") else []))
                else set()
            )
            return {"url": f"{url}/{name}", "id": name}
        if path == "/api/validate-yaml":
            head = json.loads(body)["content"].split("---")[1]
            assert isinstance(yaml.safe_load(head), dict)
            return {"errors": [], "warnings": []}
        if path.startswith("/lfs/"):
            self.large[path.removeprefix("/lfs/")] = body
            return {}
        if path.startswith("/api/") and not path.startswith("/api/models/"):
            return {}  # what the client asks of the hub besides, such as who is calling
        name = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2]).removesuffix(".git")
        if name not in self.repositories:
            return None
        rest = path.partition(name)[2]
        if rest == ".git/info/lfs/objects/batch":
            return {"transfer": "basic", "objects": [self._upload(entry, url) for entry in json.loads(body)["objects"]]}
        if rest == "/preupload/main":
            files = [{"path": entry["path"], "shouldIgnore": False} for entry in json.loads(body)["files"]]
            return {
                "files": [f | {"uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"} for f in files]
            }
        if rest == "/commit/main":
            for line in map(json.loads, body.splitlines()):
                self._take(name, line["key"], line["value"])
            oid = self.commit(name)
            return {"commitUrl": f"{url}/{name}/commit/{oid}", "commitOid": oid, "success": True}
        return self._read(name, rest)

    def _upload(self, entry: dict[str, Any], url: str) -> dict[str, Any]:
        return {**entry, "actions": {"upload": {"href": f"{url}/lfs/{entry['oid']}"}}}

    def _take(self, name: str, key: str, value: dict[str, Any]) -> None:
        if key == "file":
            assert value["encoding"] == "base64"
            self.repositories[name][value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            content = self.large[value["oid"]]
            assert hashlib.sha256(content).hexdigest() == value["oid"]
            self.repositories[name][value["path"]] = content

    def _read(self, name: str, rest: str) -> Any:
        files, oid = self.repositories[name], self.commit(name)
        if rest in ("", "/revision/main", f"/revision/{oid}"):
            return {"id": name, "sha": oid, "siblings": [{"rfilename": path} for path in files]}
        for start in (f"/tree/{oid}", "/tree/main"):
            if rest.startswith(start):
                return [{"type": "file", "path": p, "size": len(c), "oid": _blob(c)} for p, c in files.items()]
        for start in (f"/resolve/{oid}/", "/resolve/main/"):
            if rest.startswith(start) and (content := files.get(rest.removeprefix(start))) is not None:
                return content, {"ETag": f'"{_blob(content)}"', "X-Repo-Commit": oid}
        return None


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\x00" % len(content) + content).hexdigest()
