"""A Hugging Face Hub of one repository, served from a folder on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" + "0" * 34


class HubServer:
    """Answers what ``snapshot_download`` asks, until ``close``. ``asked`` holds the paths that were asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(with_body=True)

            def do_HEAD(self) -> None:
                self._answer(with_body=False)

            def _answer(self, *, with_body: bool) -> None:
                asked.append(self.path)
                name = self.path.rpartition("/resolve/")[2].partition("/")[2]
                if "/tree/" in self.path:
                    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
                    tree = [
                        {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0"} for path in files
                    ]
                    data = json.dumps(tree).encode()
                elif "/api/models/" in self.path:
                    siblings = [{"rfilename": path.name} for path in sorted(folder.iterdir())]
                    about = {"id": "acme/tiny", "sha": COMMIT, "private": False, "downloads": 0, "tags": []}
                    data = json.dumps({**about, "siblings": siblings}).encode()
                elif name and (folder / name).is_file():
                    data = (folder / name).read_bytes()
                else:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.end_headers()
                if with_body:
                    self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                """Says nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
