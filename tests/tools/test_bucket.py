"""The bucket of the tests on hosts keeps what PyArrow writes, also in several parts, and lists it page by page."""

import os
import socket
import subprocess
import sys
import urllib.request

import pyarrow.fs
import pytest

from helpers import settings
from support import wait_for


@pytest.fixture
def bucket(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, settings.PROJECT / "tools/bucket.py", "127.0.0.1", str(port), tmp_path])

    def create():
        request = urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT")
        try:
            return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).status == 200
        except OSError:
            return False

    try:
        wait_for(create, "the bucket does not answer")
        yield f"s3://key:secret@bucket/some/folder?region=a&scheme=http&endpoint_override=127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def test_bucket_gives_back_what_pyarrow_writes(bucket):
    filesystem, folder = pyarrow.fs.FileSystem.from_uri(bucket)
    filesystem.create_dir(folder)
    contents = {"a b&<c>%41?": b"text", "empty": b"", "below/large": os.urandom(20_000_000)}
    for name, content in contents.items():
        with filesystem.open_output_stream(f"{folder}/{name}") as stream:
            stream.write(content)
    assert {name: filesystem.open_input_stream(f"{folder}/{name}").read() for name in contents} == contents
    with filesystem.open_input_file(f"{folder}/below/large") as file:
        file.seek(1_000_000)
        assert file.read(10) == contents["below/large"][1_000_000:1_000_010]
    filesystem.move(f"{folder}/empty", f"{folder}/moved")
    listed = {file.base_name: file.type.name for file in filesystem.get_file_info(pyarrow.fs.FileSelector(folder))}
    assert listed == {"a b&<c>%41?": "File", "moved": "File", "below": "Directory"}
    filesystem.delete_dir(folder)
    assert filesystem.get_file_info(folder).type == pyarrow.fs.FileType.NotFound


def test_bucket_lists_more_than_a_page(bucket):
    filesystem, folder = pyarrow.fs.FileSystem.from_uri(bucket)
    for number in range(1010):
        filesystem.open_output_stream(f"{folder}/{number // 2}/{number}").close()
    assert len(filesystem.get_file_info(pyarrow.fs.FileSelector(folder))) == 505
    assert len(filesystem.get_file_info(pyarrow.fs.FileSelector(folder, recursive=True))) == 505 + 1010
