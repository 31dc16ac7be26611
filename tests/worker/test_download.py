from __future__ import annotations

import hashlib
import io
import socket
import stat
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from loscar_core.errors import ConfigError, DataMissingError
from loscar_worker.tasks import download, load_task, task_names
from loscar_worker.tasks.download import Source, download_task, fetch, unpack

BODY = bytes(range(256)) * 3000
SHA256 = hashlib.sha256(BODY).hexdigest()
MD5 = hashlib.md5(BODY).hexdigest()


class Site:
    """What the local server offers: bodies by path, plus a few paths that misbehave. Counts the requests."""

    def __init__(self) -> None:
        self.bodies: dict[str, bytes] = {"/good": BODY}
        self.failures: dict[str, int] = {}
        self.asked: list[str] = []
        self.url = ""


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    found = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.asked.append(self.path)
            body = found.bodies.get(self.path.removeprefix("/short").removeprefix("/unannounced"))
            if found.failures.get(self.path, 0) > 0:
                found.failures[self.path] -= 1
                self.send_error(503)
            elif body is None:
                self.send_error(404)
            else:
                self.send_response(200)
                if not self.path.startswith("/unannounced"):
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if self.path.startswith("/short") else body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "_RETRY_PAUSE_S", 0.01)
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


def test_fetch_checks_and_places(site: Site, tmp_path: Path) -> None:
    dest = tmp_path / "deep" / "er" / "file"
    fetch(f"{site.url}/good", dest, sha256=SHA256.upper(), md5=MD5)
    assert dest.read_bytes() == BODY
    fetch(f"{site.url}/unannounced/good", dest, md5=MD5)
    assert [path.name for path in dest.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("sums", [{"sha256": "0" * 64}, {"md5": "0" * 32}])
def test_a_wrong_sum_leaves_nothing(site: Site, tmp_path: Path, sums: dict[str, str]) -> None:
    (kind, wrong), right = next(iter(sums.items())), {"sha256": SHA256, "md5": MD5}
    with pytest.raises(ConfigError, match=f"its {kind} is {right[kind]}, not {wrong}"):
        fetch(f"{site.url}/good", tmp_path / "file", **sums)
    assert not list(tmp_path.iterdir())
    assert site.asked == ["/good"]


def test_a_wrong_sum_keeps_the_old_file(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(ConfigError):
        fetch(f"{site.url}/good", tmp_path / "file", sha256="0" * 64)
    assert (tmp_path / "file").read_bytes() == b"old"


def test_not_found_is_not_tried_again(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match=r"404.*put it at .*file by hand"):
        fetch(f"{site.url}/absent", tmp_path / "file")
    assert site.asked == ["/absent"]
    assert not list(tmp_path.iterdir())


def test_a_busy_server_is_tried_again(site: Site, tmp_path: Path) -> None:
    site.failures["/good"] = 2
    fetch(f"{site.url}/good", tmp_path / "file", sha256=SHA256)
    assert len(site.asked) == 3
    site.failures["/good"] = 9
    with pytest.raises(DataMissingError, match="503"):
        fetch(f"{site.url}/good", tmp_path / "file2", attempts=2)
    assert len(site.asked) == 5


def test_a_broken_connection_is_noticed(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match=f"ended {len(BODY) // 2} bytes early"):
        fetch(f"{site.url}/short/good", tmp_path / "file", attempts=2)
    assert len(site.asked) == 2
    assert not list(tmp_path.iterdir())


def test_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/x"
        with pytest.raises(DataMissingError, match="refused"):
            fetch(url, tmp_path / "file", attempts=1)


def test_a_silent_server_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        with pytest.raises(DataMissingError, match="timed out"):
            fetch(url, tmp_path / "file", attempts=1, timeout_s=0.2)


def test_other_schemes_and_unwritable_places(site: Site, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    with pytest.raises(ConfigError, match="only http"):
        fetch((tmp_path / "secret").as_uri(), tmp_path / "copy")
    with pytest.raises(ConfigError, match="cannot be fetched to"):
        fetch(f"{site.url}/good", tmp_path / "secret" / "below-a-file")


def tar_bytes(files: dict[str, bytes], link: str | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        if link is not None:
            info = tarfile.TarInfo(link)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(info)
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mode = 0o600
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zip_bytes(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


FILES = {
    "top/a": b"A",
    "top/deep/b": b"B",
    "top/../evil": b"e",
    "other/c": b"c",
    "/top/d": b"d",
    "../evil": b"e",
}


@pytest.mark.parametrize(("name", "make"), [("x.tar.gz", tar_bytes), ("x.zip", zip_bytes)])
def test_unpack_takes_only_what_lies_below_top(
    tmp_path: Path, name: str, make: Callable[[dict[str, bytes]], bytes]
) -> None:
    dest = tmp_path / "in"
    dest.mkdir()
    archive = dest / name
    archive.write_bytes(make(FILES))
    for _ in range(2):
        unpack(archive, dest, "top")
        assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(
            [f"in/{name}", "in/top/a", "in/top/deep/b"]
        )
        # The second time into a folder that is there: it gains what it lacks and keeps what else it has.
        (dest / "top" / "a").unlink()
    unpack(archive, dest, "top")
    with pytest.raises(ConfigError, match="holds no folder absent"):
        unpack(archive, dest, "absent")


def test_unpack_writes_no_links(tmp_path: Path) -> None:
    archive = tmp_path / "x.tar.gz"
    archive.write_bytes(tar_bytes({"top/a": b"A"}, link="top/link"))
    unpack(archive, tmp_path, "top")
    assert [path.name for path in (tmp_path / "top").iterdir()] == ["a"]
    assert stat.S_ISREG((tmp_path / "top" / "a").lstat().st_mode)


@pytest.mark.parametrize("name", ["x.tar.gz", "x.zip"])
def test_broken_archives_leave_nothing(tmp_path: Path, name: str) -> None:
    archive = tmp_path / name
    whole = (tar_bytes if name.endswith("gz") else zip_bytes)({f"top/{i}": bytes(9000) for i in range(9)})
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    for data in (b"", b"no archive at all", whole[: len(whole) // 2], bytes(damaged)):
        archive.write_bytes(data)
        with pytest.raises(ConfigError, match=r"x\.(tar\.gz|zip)"):
            unpack(archive, tmp_path, "top")
        assert [path.name for path in tmp_path.iterdir()] == [name]


def test_every_source_is_checked_by_a_sum() -> None:
    assert set(download.SOURCES) == set(task_names()) - {"digits"}
    for sources in download.SOURCES.values():
        for source in sources:
            assert len(source.sha256 or source.md5 or "") in (32, 64)
            assert all(url.startswith(("https://", "http://")) for url in source.urls)
            assert (source.unpack_to is None) == (not source.needed)


def test_the_sums_are_those_of_the_complete_files(real_data: Callable[[str], Path]) -> None:
    for task, name in (("a9a", "a9a"), ("charlm", "tinyshakespeare")):
        folder = real_data(name)
        for source in download.SOURCES[task]:
            assert hashlib.sha256((folder / source.path).read_bytes()).hexdigest() == source.sha256


def offer(monkeypatch: pytest.MonkeyPatch, task: str, *sources: Source) -> None:
    monkeypatch.setitem(download.SOURCES, task, sources)


def sum_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_load_task_downloads_what_is_missing(
    site: Site, tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = []
    for name in ("a9a", "a9a.t"):
        body = (tiny_data / name).read_bytes()
        site.bodies[f"/{name}"] = body
        # The first address is dead: the next one is taken.
        sources.append(Source((f"{site.url}/dead", f"{site.url}/{name}"), name, sum_of(body)))
    offer(monkeypatch, "a9a", *sources)
    folder = tmp_path / "empty"
    with pytest.raises(DataMissingError):
        load_task("a9a", folder)
    assert site.asked == []
    assert len(load_task("a9a", folder, download=True).train) == 4
    assert site.asked == ["/dead", "/a9a", "/dead", "/a9a.t"]
    load_task("a9a", folder, download=True)
    (folder / "a9a.t").unlink()
    load_task("a9a", folder, download=True)
    assert site.asked[4:] == ["/dead", "/a9a.t"]


def test_compressed_and_plain_files_both_count(site: Site, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    offer(monkeypatch, "mnist", *(Source((f"{site.url}/x",), f"mnist/{name}.gz") for name in names))
    download_task("mnist", tiny_data)
    assert site.asked == []


def test_archives_are_unpacked_and_removed(
    site: Site, tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = bytes(3073)
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    body = tar_bytes({f"cifar-10-batches-bin/{name}": record for name in names})
    site.bodies["/c.tar.gz"] = body
    source = Source(
        (f"{site.url}/c.tar.gz",),
        "c.tar.gz",
        sum_of(body),
        unpack_to="cifar-10-batches-bin",
        needed=tuple(names),
    )
    offer(monkeypatch, "cifar10", source)
    folder = tmp_path / "empty"
    assert len(load_task("cifar10", folder, download=True).train) == 5
    assert [path.name for path in folder.iterdir()] == ["cifar-10-batches-bin"]
    (folder / "cifar-10-batches-bin" / "data_batch_4.bin").unlink()
    assert len(load_task("cifar10", folder, download=True).train) == 5
    assert len(site.asked) == 2
    download_task("cifar10", folder)
    download_task("digits", folder)
    assert len(site.asked) == 2


def test_an_archive_put_there_by_hand_is_checked(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = tar_bytes({"t/x": b"X"})
    source = Source((f"{site.url}/t",), "t.tar.gz", sum_of(body), unpack_to="t", needed=("x",))
    offer(monkeypatch, "charlm", source)
    (tmp_path / "t.tar.gz").write_bytes(tar_bytes({"t/x": b"Y"}))
    with pytest.raises(ConfigError, match=r"t\.tar\.gz is not the expected file: its sha256"):
        download_task("charlm", tmp_path)
    (tmp_path / "t.tar.gz").write_bytes(body)
    download_task("charlm", tmp_path)
    assert (tmp_path / "t" / "x").read_bytes() == b"X"
    assert site.asked == []
