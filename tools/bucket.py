"""A bucket for tests: as much of S3 as PyArrow uses, for anyone who reaches it. python tools/bucket.py HOST PORT FOLDER

It knows any number of buckets, which are made by `PUT /NAME`, and checks no signature. Objects are files in FOLDER.
"""

import hashlib
import io
import re
import sys
import uuid
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape


class Object(NamedTuple):
    """What is known of a stored object."""

    path: Path
    size: int  # bytes
    etag: str
    kind: str  # its content type
    changed: str


class Handler(BaseHTTPRequestHandler):
    """One connection. Requests are named after the method and what they are about."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm, wbufsize = True, -1  # or each answer waits 40 ms
    folder = Path()
    buckets: dict[str, dict[str, Object]] = {}
    uploads: dict[str, dict[int, Object]] = {}  # by upload, its parts

    def handle_expect_100(self) -> bool:
        """Send "100 Continue" at once: from the buffer, it would come when S3's client has waited a second for it."""
        go_on = super().handle_expect_100()
        self.wfile.flush()
        return go_on

    def handle_one_request(self):
        """Let no connection that breaks off print a traceback."""
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def do_PUT(self):  # noqa: D102
        if not self.key:
            self.buckets.setdefault(self.bucket, {})
            return self.answer()
        if source := self.headers.get("x-amz-copy-source"):
            bucket, _, key = unquote(source).lstrip("/").partition("/")
            if key not in self.buckets.get(bucket, {}):
                return self.refuse("NoSuchKey")
            self.objects[self.key] = self.buckets[bucket][key]
            return self.answer(f"<CopyObjectResult><ETag>{self.objects[self.key].etag}</ETag></CopyObjectResult>")
        stored = self.store(self.body())
        if "uploadId" in self.query:
            self.uploads[self.query["uploadId"]][int(self.query["partNumber"])] = stored
        elif self.objects is None:
            return self.refuse("NoSuchBucket")
        else:
            self.objects[self.key] = stored
        return self.answer(ETag=stored.etag)

    def do_POST(self):  # noqa: D102
        body = self.body()
        if "delete" in self.query:
            for element in ElementTree.fromstring(body).iter():
                if element.tag.endswith("Key"):
                    self.objects.pop(element.text, None)
            return self.answer("<DeleteResult/>")
        if "uploads" in self.query:
            upload = uuid.uuid4().hex
            self.uploads[upload] = {}
            name = f"<Bucket>{self.bucket}</Bucket><Key>{escape(self.key)}</Key><UploadId>{upload}</UploadId>"
            return self.answer(f"<InitiateMultipartUploadResult>{name}</InitiateMultipartUploadResult>")
        parts = [part for _, part in sorted(self.uploads.pop(self.query["uploadId"]).items())]
        whole = self.store(b"".join(part.path.read_bytes() for part in parts))
        for part in parts:
            part.path.unlink()
        self.objects[self.key] = whole
        result = f"<Bucket>{self.bucket}</Bucket><Key>{escape(self.key)}</Key><ETag>{whole.etag}</ETag>"
        return self.answer(f"<CompleteMultipartUploadResult>{result}</CompleteMultipartUploadResult>")

    def do_GET(self):  # noqa: D102
        if self.objects is None:
            return self.refuse("NoSuchBucket")
        if not self.key:
            return self.answer(self.listing(), **{"x-amz-bucket-region": "us-east-1"})
        found = self.objects.get(self.key)
        if not found:
            return self.refuse("NoSuchKey")
        first, last = 0, found.size - 1
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(last, int(wanted[2] or last))
        headers = {"ETag": found.etag, "Last-Modified": found.changed, "Content-Type": found.kind}
        if wanted:
            headers["Content-Range"] = f"bytes {first}-{last}/{found.size}"
        content = b""
        if self.command == "GET" and found.size:
            with found.path.open("rb") as stream:
                stream.seek(first)
                content = stream.read(last - first + 1)
        return self.answer(content, 206 if wanted else 200, length=last - first + 1, **headers)

    do_HEAD = do_GET

    def do_DELETE(self):  # noqa: D102
        if "uploadId" in self.query:
            self.uploads.pop(self.query["uploadId"], None)
        else:
            self.objects.pop(self.key, None)
        return self.answer(status=204)

    def listing(self) -> str:
        """Return the objects below `prefix`, what lies beyond the next `delimiter` as one, `max-keys` at a time."""
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        after = max(self.query.get("continuation-token", ""), self.query.get("start-after", ""))
        most, entries, last, more = int(self.query.get("max-keys", 1000)), {}, "", "false"
        for key in sorted(key for key in list(self.objects) if key.startswith(prefix) and key > after):
            below, found, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
            name = prefix + below + found if found else key
            if name not in entries and len(entries) == most:
                more = "true"
                break
            one, last = self.objects[key], key
            content = f"<Size>{one.size}</Size><ETag>{one.etag}</ETag><LastModified>2026-01-01T00:00:00Z</LastModified>"
            entries[name] = f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
            if not found:
                entries[name] = f"<Contents><Key>{escape(key)}</Key>{content}</Contents>"
        token = f"<NextContinuationToken>{escape(last)}</NextContinuationToken>" if more == "true" else ""
        head = f"<Name>{self.bucket}</Name><KeyCount>{len(entries)}</KeyCount><IsTruncated>{more}</IsTruncated>{token}"
        return f"<ListBucketResult>{head}{''.join(entries.values())}</ListBucketResult>"

    def parse_request(self) -> bool:
        """Split the address into bucket, key and query."""
        if not super().parse_request():
            return False
        address = urlsplit(self.path)
        self.bucket, _, self.key = unquote(address.path).lstrip("/").partition("/")
        self.query = {name: value[-1] for name, value in parse_qs(address.query, keep_blank_values=True).items()}
        self.objects = self.buckets.get(self.bucket)
        return True

    def body(self) -> bytes:
        """Read what the request sends, without the frames that HTTP and S3 put around its chunks."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = self.unframe(self.rfile)
        else:
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length)
            if len(body) < length:
                raise ConnectionError("the client broke off")  # S3 keeps no part of an object
        if self.headers.get("x-amz-content-sha256", "").startswith("STREAMING-"):
            body = self.unframe(io.BytesIO(body))
        return body

    @staticmethod
    def unframe(stream) -> bytes:
        """Join chunks, each behind a line with its size in hexadecimal; leave out what follows the last."""
        chunks = []
        while size := int(stream.readline().split(b";")[0] or b"-1", 16):
            chunks.append(stream.read(max(0, size)))
            if len(chunks[-1]) != size:
                raise ConnectionError("the client broke off")
            stream.readline()
        while stream.readline().strip():
            pass
        return b"".join(chunks)

    def store(self, content: bytes) -> Object:
        """Write an object's content to a file of its own."""
        path = self.folder / uuid.uuid4().hex
        path.write_bytes(content)
        kind = self.headers.get("Content-Type", "application/octet-stream")
        return Object(path, len(content), f'"{hashlib.md5(content).hexdigest()}"', kind, formatdate(usegmt=True))

    def answer(self, content: str | bytes = b"", status: int = 200, length: int | None = None, **headers):
        """Send a response; XML if the content is a text."""
        if isinstance(content, str):
            content = f'<?xml version="1.0" encoding="UTF-8"?>{content}'.encode()
            headers["Content-Type"] = "application/xml"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, code: str):
        """Send S3's error."""
        self.answer(f"<Error><Code>{code}</Code><Message>{code}</Message></Error>", 404)

    def log_message(self, *_):
        """Print nothing."""


if __name__ == "__main__":
    Handler.folder = Path(sys.argv[3])
    ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()
