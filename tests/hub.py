"""A stand-in for Hugging Face's hub: a server on this machine that keeps repositories in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, ClassVar

_COMMIT = "0123456789" * 4


class Handler(BaseHTTPRequestHandler):
    """Answers what uploading and downloading of small files ask."""

    files: ClassVar[dict[str, dict[str, bytes]]] = {}
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any) -> None:
        self._send(json.dumps(value).encode(), Content_Type="application/json")

    def do_POST(self) -> None:
        """Make a repository, say how files go up, or take a commit."""
        body = self._body()
        url = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            fields = json.loads(body)
            name = f"{fields.get('organization') or 'someone'}/{fields['name']}"
            self.files.setdefault(name, {})
            self._json({"url": f"{url}/{name}", "name": name, "id": name})
        elif "/preupload/" in self.path:
            paths = [one["path"] for one in json.loads(body)["files"]]
            self._json({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]})
        elif match := re.match(r"/api/models/(.+?/.+?)/commit/", self.path):
            for line in body.splitlines():
                record = json.loads(line)
                if record["key"] == "file":
                    value = record["value"]
                    self.files[match[1]][value["path"]] = base64.b64decode(value["content"])
            commit = f"{url}/{match[1]}/commit/{_COMMIT}"
            self._json({"success": True, "commitOid": _COMMIT, "commitUrl": commit, "hookOutput": ""})
        else:
            self._json({})

    def do_GET(self) -> None:
        """Send a file, or what is known of a repository."""
        match = re.match(r"/(?:api/models/)?([^/]+/[^/?]+)", self.path)
        repository = self.files.get(match[1]) if match else None
        if match is None or repository is None:
            self._send(b"", 404, X_Error_Code="RepoNotFound")
        elif self.path.startswith("/api/") and "/tree/" in self.path:
            self._json(
                [{"type": "file", "path": name, "size": len(x), "oid": _COMMIT} for name, x in repository.items()]
            )
        elif self.path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in repository]
            self._json({"id": match[1], "sha": _COMMIT, "siblings": siblings, "private": False, "tags": []})
        else:
            name = re.sub(r"^/[^/]+/[^/]+/resolve/[^/]+/", "", self.path.partition("?")[0])
            content = repository.get(name)
            if content is None:
                self._send(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=_COMMIT)
            else:
                tag = f'"{hashlib.sha1(content).hexdigest()}"'
                self._send(content, ETag=tag, X_Repo_Commit=_COMMIT)

    do_HEAD = do_GET


def start_hub() -> tuple[ThreadingHTTPServer, str]:
    """Start an empty hub and return it with its address; `shutdown` ends it."""
    Handler.files = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"
