"""Blob stores on this machine: what `blobfile` asks of Google's and Azure's, over real HTTP.

Only where requests go is changed, in the pool of connections that `blobfile` uses: everything
before that (its choice of credentials, requests, retries, answers read) is the real thing.

As a script, `python cloud_emulation.py ADDRESS SCRIPT ARGUMENTS`, it runs another script with all
requests sent to an emulation at ADDRESS.
"""

from __future__ import annotations

import hashlib
import json
import re
import runpy
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import urllib3
from blobfile import _azure, _common, _gcp

PAGE = 3  # files in one answer to a request for a list, so that there are several
GCS_HOST, AZURE_HOST = "storage.googleapis.com", ".blob.core.windows.net"


@dataclass(frozen=True)
class Blob:
    data: bytes
    version: int
    time: float

    @property
    def md5(self) -> str:
        return b64encode(hashlib.md5(self.data).digest()).decode()


@dataclass(frozen=True)
class Request:
    method: str
    host: str
    segments: list[str]  # of the path
    query: dict[str, str]
    headers: dict[str, str]  # names in lower case
    data: bytes

    def __str__(self) -> str:
        query = "&".join(f"{key}={value}" for key, value in self.query.items())
        return f"{self.method} {self.host}/{'/'.join(self.segments)}?{query}"


@dataclass(frozen=True)
class Answer:
    status: int = 200
    data: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Silence(Exception):
    """The connection is to end without an answer."""


class Cloud:
    """Buckets of Google's and containers of Azure's, and the server through which they are seen."""

    def __init__(self):
        self.buckets = {"gs://bucket", "az://account/box"}
        self.blobs: dict[str, Blob] = {}  # by path, gs://… or az://…
        self.private: set[str] = set()  # buckets that want credentials
        self.unlisted: set[str] = set()  # containers whose files all may read, but not list
        self.requests: list[Request] = []
        # Called before each request is answered; what it returns, if anything, is the answer.
        self.before: Callable[[Request], Answer | None] = lambda request: None
        self._uploads: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def put(self, path: str, data: bytes) -> None:
        version = 1 + max((blob.version for blob in self.blobs.values()), default=0)
        self.blobs[path] = Blob(data, version, time.time())

    def put_folder(self, path: str, folder: Path) -> None:
        """All files of a folder on this machine."""
        for file in folder.rglob("*"):
            if file.is_file():
                self.put(f"{path}/{file.relative_to(folder).as_posix()}", file.read_bytes())

    def names(self, path: str) -> list[str]:
        """Of the files under a path, relative to it, sorted."""
        return sorted(p[len(path) + 1 :] for p in self.blobs if p.startswith(f"{path}/"))

    def fail(self, *answers: Answer | type[Silence]) -> None:
        """Give these answers to the next requests, whatever they are."""
        left = list(answers)

        def next_failure(_: Request) -> Answer | None:
            failure = left.pop(0) if left else None
            if failure is Silence:
                raise Silence
            return failure

        self.before = next_failure

    def answer(self, request: Request) -> Answer:
        self.requests.append(request)
        if (answer := self.before(request)) is not None:
            return answer
        with self._lock:
            if request.host == "www.googleapis.com":
                return _json({"access_token": "token", "expires_in": 3600})
            if request.host == GCS_HOST:
                return _Google(self, request).answer()
            return _Azure(self, request).answer()

    def page(
        self, start: str, delimiter: str, size: int, after: str
    ) -> tuple[list[str], list[str], str]:
        """Paths of blobs, of folders, and where the next page begins ("": there is none)."""
        found: dict[str, bool] = {}  # path -> is it a blob
        for path in sorted(path for path in self.blobs if path.startswith(start)):
            head, cut, _ = path[len(start) :].partition(delimiter or "\0")
            found[start + head + cut] = not cut
        left = [path for path in found if path > after]
        page, more = left[:size], left[size:]
        blobs = [path for path in page if found[path]]
        folders = [path for path in page if not found[path]]
        return blobs, folders, page[-1] if more else ""

    def piece(self, path: str, request: Request) -> Answer:
        """A range of a blob."""
        data = self.blobs[path].data
        first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers["range"]).groups()
        if int(first) >= len(data):
            return Answer(416)
        return Answer(206, data[int(first) : int(last) + 1 if last else None])

    def begin_upload(self) -> str:
        self._uploads[key := str(len(self._uploads))] = b""
        return key

    def add_to_upload(self, key: str, data: bytes) -> bytes:
        self._uploads[key] = self._uploads.get(key, b"") + data
        return self._uploads[key]


def _json(content: dict, status: int = 200) -> Answer:
    return Answer(status, json.dumps(content).encode())


class _Google:
    """https://cloud.google.com/storage/docs/json_api"""

    def __init__(self, cloud: Cloud, request: Request):
        self.cloud, self.request = cloud, request

    def answer(self) -> Answer:
        r = self.request
        at = r.segments.index("b") + 1
        self.bucket, rest = f"gs://{r.segments[at]}", r.segments[at + 1 :]
        if self.bucket in self.cloud.private and "authorization" not in r.headers:
            return _json({"error": {"code": 401, "message": "Anonymous caller"}}, 401)
        if self.bucket not in self.cloud.buckets:
            return _json({"error": {"code": 404}}, 404)
        if r.segments[0] == "upload":
            return self._upload()
        if len(rest) < 2:
            return self._list() if rest else _json({"name": self.bucket})
        path = f"{self.bucket}/{rest[1]}"
        if path not in self.cloud.blobs:
            return _json({"error": {"code": 404}}, 404)
        if "rewriteTo" in rest:
            self.cloud.put(f"gs://{rest[4]}/{rest[6]}", self.cloud.blobs[path].data)
            return _json({"done": True})
        return self._blob(path)

    def _blob(self, path: str) -> Answer:
        if self.request.method == "DELETE":
            del self.cloud.blobs[path]
            return Answer(204)
        if self.request.query.get("alt") == "media":
            return self.cloud.piece(path, self.request)
        return _json(self._describe(path))

    def _describe(self, path: str) -> dict:
        blob = self.cloud.blobs[path]
        when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(blob.time))
        return {
            "name": path[len(self.bucket) + 1 :],
            "size": str(len(blob.data)),
            "updated": when,
            "timeCreated": when,
            "md5Hash": blob.md5,
            "generation": str(blob.version),
        }

    def _list(self) -> Answer:
        q = self.request.query
        start = f"{self.bucket}/{q.get('prefix', '')}"
        size = min(PAGE, int(q.get("maxResults", PAGE)))
        after = q.get("pageToken", "")
        blobs, folders, more = self.cloud.page(start, q.get("delimiter", ""), size, after)
        content: dict = {"nextPageToken": more} if more else {}
        if blobs:
            content["items"] = [self._describe(path) for path in blobs]
        if folders:
            content["prefixes"] = [path[len(self.bucket) + 1 :] for path in folders]
        return _json(content)

    def _upload(self) -> Answer:
        r = self.request
        if r.method == "POST":
            key, name = self.cloud.begin_upload(), json.loads(r.data)["name"]
            url = f"https://{GCS_HOST}/upload/storage/v1/b/{self.bucket[5:]}/o"
            return Answer(headers={"Location": f"{url}?upload_id={key}&name={name}"})
        data = self.cloud.add_to_upload(r.query["upload_id"], r.data)
        if r.headers["content-range"].endswith("/*"):
            return Answer(308)
        self.cloud.put(f"{self.bucket}/{r.query['name']}", data)
        return _json({})


class _Azure:
    """https://learn.microsoft.com/en-us/rest/api/storageservices/blob-service-rest-api"""

    def __init__(self, cloud: Cloud, request: Request):
        self.cloud, self.request = cloud, request
        account = request.host.removesuffix(AZURE_HOST)
        self.box = f"az://{account}/{request.segments[0]}"

    def answer(self) -> Answer:
        r = self.request
        anonymous = "authorization" not in r.headers
        listing = r.query.get("comp") == "list"
        hidden = self.cloud.private | (self.cloud.unlisted if listing else set())
        if anonymous and self.box in hidden:
            return self._missing("ResourceNotFound")
        if self.box not in self.cloud.buckets:
            return self._missing("ContainerNotFound")
        if len(r.segments) == 1:
            return self._list() if listing else Answer()
        path = f"{self.box}/{r.segments[1]}"
        if r.method == "PUT":
            return self._put(path)
        if path not in self.cloud.blobs:
            return self._missing("BlobNotFound")
        return self._blob(path)

    def _missing(self, code: str) -> Answer:
        return Answer(404, headers={"x-ms-error-code": code})

    def _blob(self, path: str) -> Answer:
        r = self.request
        if r.method == "DELETE":
            del self.cloud.blobs[path]
            return Answer(202)
        if r.method == "HEAD":
            head = {"x-ms-blob-type": "BlockBlob", **self._describe(path)}
            head["x-ms-creation-time"] = head.pop("Creation-Time")
            return Answer(headers=head)
        if r.query.get("comp") == "blocklist":
            return Answer(data=b"<BlockList><CommittedBlocks/></BlockList>")
        if r.headers.get("if-match", self._etag(path)) != self._etag(path):
            return Answer(412, headers={"x-ms-error-code": "ConditionNotMet"})
        return self.cloud.piece(path, r)

    def _etag(self, path: str) -> str:
        return f"0x{self.cloud.blobs[path].version:X}"

    def _describe(self, path: str) -> dict[str, str]:
        blob = self.cloud.blobs[path]
        when = formatdate(blob.time, usegmt=True)
        return {
            "Content-Length": str(len(blob.data)),
            "Last-Modified": when,
            "Creation-Time": when,
            "Content-MD5": blob.md5,
            "Etag": self._etag(path),
        }

    def _put(self, path: str) -> Answer:
        r = self.request
        if source := r.headers.get("x-ms-copy-source"):
            _, _, host, box, name = source.split("/")
            origin = f"az://{host.removesuffix(AZURE_HOST)}/{box}/{unquote(name)}"
            if origin not in self.cloud.blobs:
                return self._missing("BlobNotFound")
            self.cloud.put(path, self.cloud.blobs[origin].data)
            head = {"x-ms-copy-id": "1", "x-ms-copy-status": "success", "etag": self._etag(path)}
            return Answer(202, headers=head)
        if r.query["comp"] == "block":
            self.cloud.add_to_upload(r.query["blockid"], r.data)
            return Answer(201)
        blocks = re.findall("<Latest>(.*?)</Latest>", r.data.decode())
        self.cloud.put(path, b"".join(self.cloud.add_to_upload(key, b"") for key in blocks))
        return Answer(201, headers={"ETag": self._etag(path)})

    def _list(self) -> Answer:
        q = self.request.query
        start = f"{self.box}/{q.get('prefix', '')}"
        size = min(PAGE, int(q.get("maxresults", PAGE)))
        after = q.get("marker", "")
        blobs, folders, more = self.cloud.page(start, q.get("delimiter", ""), size, after)
        cut = len(self.box) + 1
        items = [f"<BlobPrefix><Name>{path[cut:]}</Name></BlobPrefix>" for path in folders]
        for path in blobs:
            facts = "".join(f"<{k}>{v}</{k}>" for k, v in self._describe(path).items())
            items.append(f"<Blob><Name>{path[cut:]}</Name><Properties>{facts}</Properties></Blob>")
        text = f"<Blobs>{''.join(items)}</Blobs><NextMarker>{more}</NextMarker>"
        return Answer(data=f"<EnumerationResults>{text}</EnumerationResults>".encode())


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Nothing to say: a client that has gone is often what a test is about."""


def _handler(cloud: Cloud) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def serve(self) -> None:
            parts = urlsplit(self.path)
            host, *segments = [unquote(part) for part in parts.path.strip("/").split("/")]
            query = {key: values[0] for key, values in parse_qs(parts.query).items()}
            headers = {name.lower(): value for name, value in self.headers.items()}
            data = self.rfile.read(int(headers.get("content-length", 0)))
            try:
                answer = cloud.answer(Request(self.command, host, segments, query, headers, data))
            except Silence:
                self.close_connection = True
                return
            self.send_response(answer.status)
            for name, value in {"Content-Length": len(answer.data), **answer.headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(answer.data)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = serve

        def log_message(self, *_: object) -> None:
            pass

    return Handler


class _Redirected(urllib3.PoolManager):
    """Sends every request to an emulation, the host that it was meant for first in its path."""

    def __init__(self, address: str):
        super().__init__(maxsize=8)
        self.address = address

    def request(self, method: str, url: str, **settings: object) -> urllib3.BaseHTTPResponse:
        return super().request(method, f"{self.address}/{url.partition('://')[2]}", **settings)


def redirect(address: str) -> Callable[[], None]:
    """Send what blobfile asks to an emulation from now on; what this returns ends it."""
    director, pool = _common.global_pool_director, _Redirected(address)
    director.get_http_pool = lambda: pool
    _forget_tokens()

    def undo() -> None:
        del director.get_http_pool
        _forget_tokens()

    return undo


def _forget_tokens() -> None:
    for manager in (_gcp.access_token_manager, _azure.access_token_manager):
        manager._tokens.clear()
        manager._expirations.clear()


if __name__ == "__main__":
    redirect(sys.argv[1])
    sys.argv[:2] = []
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
