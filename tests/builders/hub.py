"""As much of the Hub as making a repository, one commit, and a download of all files ask for, on one machine.

Every file is taken as a regular one (the real Hub takes large ones another way: the affair of its client).
"""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SHA = "1" * 40


class Hub(ThreadingHTTPServer):
    def __init__(self, token: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.token, self.repos, self.created, self.messages = token, {}, [], []
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *words) -> None:
        pass

    def answer(self, content: object, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body)), "X-Repo-Commit": SHA} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.strip("/").split("/")  # api/models/<owner>/<name>/<action>/main
        if self.headers["Authorization"] != f"Bearer {self.server.token}" and path[1] != "validate-yaml":
            return self.answer({"error": "Invalid username or password."}, 401)
        if path[1:] == ["repos", "create"]:
            self.server.created.append(json.loads(body))
            url = "{}/{organization}/{name}".format(self.server.address, **self.server.created[-1])
            return self.answer({"url": url})
        if path[1] == "validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path[4] == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            answers = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self.answer({"files": answers})
        lines = [json.loads(line) for line in body.splitlines()]
        self.server.messages += [line["value"]["summary"] for line in lines if line["key"] == "header"]
        files = [line["value"] for line in lines if line["key"] == "file"]
        content = {file["path"]: base64.b64decode(file["content"]) for file in files}
        self.server.repos["/".join(path[2:4])] = content
        address = f"{self.server.address}/{path[2]}/{path[3]}/commit/{SHA}"
        self.answer({"commitUrl": address, "commitOid": SHA})

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/").split("/")
        listing = path[0] == "api"  # api/models/<owner>/<name>/..., or <owner>/<name>/resolve/<sha>/<file>
        files = self.server.repos.get("/".join(path[2:4] if listing else path[:2]))
        if files is None:
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        oids = {name: hashlib.sha1(content).hexdigest() for name, content in files.items()}
        if listing and path[4] == "tree":
            entries = [{"path": n, "size": len(files[n]), "oid": oids[n]} for n in files]
            return self.answer([{"type": "file", **entry} for entry in entries])
        if listing:
            siblings = [{"rfilename": name} for name in files]
            return self.answer({"id": "/".join(path[2:4]), "sha": SHA, "siblings": siblings})
        self.answer(files[path[4]], ETag=f'"{oids[path[4]]}"')

    do_HEAD = do_GET


@contextlib.contextmanager
def hub(token: str) -> Iterator[Hub]:
    """A Hub in which whoever has ``token`` may write."""
    server = Hub(token)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
