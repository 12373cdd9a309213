"""A benchmark's data: given, shipped, or fetched with a checked hash from a server on loopback."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from trl_spatial.evaluation.benchmarks import BENCHMARKS, make_benchmark
from trl_spatial.evaluation.benchmarks.base import DataFile
from trl_spatial.evaluation.data_files import find_data, hash_data, published_hash


CONTENT = b"a red circle to the left of a blue square\n"


@pytest.fixture
def server():
    """A server with one file; it counts requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append(self.path)
            is_known = self.path == "/prompts.txt"
            self.send_response(200 if is_known else 404)
            self.end_headers()
            self.wfile.write(CONTENT if is_known else b"")

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def benchmark(server, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = make_benchmark("geneval")
    found.files = (_file(server, "prompts.txt", hashlib.sha256(CONTENT).hexdigest()),)
    return found


def _file(server, name, digest):
    return DataFile(name, f"http://127.0.0.1:{server.server_port}/{name}", digest)


def test_a_file_is_fetched_once(benchmark, server):
    folder = find_data(benchmark)
    assert (folder / "prompts.txt").read_bytes() == CONTENT
    assert find_data(benchmark) == folder
    assert server.requests == ["/prompts.txt"]
    assert hash_data(folder) == published_hash(benchmark.files)


def test_another_content_is_refused_and_not_kept(benchmark, server):
    benchmark.files = (_file(server, "prompts.txt", "0" * 64),)
    with pytest.raises(ValueError, match=r"SHA-256 is [0-9a-f]{64}, not 0{64}.*--data"):
        find_data(benchmark)
    with pytest.raises(ValueError, match="not the file"):
        find_data(benchmark)
    assert len(server.requests) == 2


def test_what_cannot_be_fetched_is_named_with_a_way_out(benchmark, server):
    benchmark.files = (_file(server, "absent.txt", "0" * 64),)
    with pytest.raises(ValueError, match=r"cannot be fetched: 404.*absent\.txt.*license.*--data"):
        find_data(benchmark)


def test_a_folder_is_taken_as_it_is(benchmark, server, tmp_path):
    assert find_data(benchmark, str(tmp_path)) == tmp_path
    with pytest.raises(ValueError, match="There is no folder"):
        find_data(benchmark, str(tmp_path / "absent"))
    assert server.requests == []


def test_the_hash_of_a_folder_is_of_names_and_contents(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one")
    before = hash_data(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"two")
    changed = hash_data(tmp_path)
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert len({before, changed, hash_data(tmp_path)}) == 3


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_an_example_and_says_where_its_data_is(name):
    benchmark = make_benchmark(name)
    assert benchmark.name == name
    assert benchmark.load(find_data(benchmark, "example"))
    for file in benchmark.files:
        assert file.url.startswith("https://")
        assert len(file.sha256) == 64 or name == "dpg-bench"  # whose hash is not known
