"""Fetching the official data sets: streamed, checked, and put in place by one rename.

What is checked. The sums of a9a, a9a.t and tiny Shakespeare are those of the complete files; those of MNIST
are of the four compressed files, and MD5 sums of the CIFAR-10 archive (as its authors publish it) and of the
Tiny ImageNet archive. All of them are checked again for format and size when a task reads them.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import http.client
import logging
import os
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from loscar_core.errors import ConfigError, DataMissingError
from loscar_worker.tasks import a9a, charlm, cifar10, mnist, tiny_imagenet
from loscar_worker.tasks.files import progress, resolve_data_dir

_CHUNK_BYTES = 1 << 18
_RETRY_PAUSE_S = 1.0

_logger = logging.getLogger(__name__)


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...
    def hexdigest(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Source:
    """One file of a data set, or one archive that holds all of it.

    urls: tried in turn. path: where the file goes, relative to the data folder. sha256, md5: lower-case
    hexadecimal, None where there is none to rely on. unpack_to: for archives, the folder inside the data
    folder that appears. needed: for archives, files of that folder without which the set is not there.
    """

    urls: tuple[str, ...]
    path: str
    sha256: str | None = None
    md5: str | None = None
    unpack_to: str | None = None
    needed: tuple[str, ...] = ()


def _mnist(name: str, sha256: str) -> Source:
    mirrors = (mnist.SOURCE, "https://storage.googleapis.com/cvdf-datasets/mnist/")
    return Source(tuple(f"{mirror}{name}.gz" for mirror in mirrors), f"mnist/{name}.gz", sha256)


_CIFAR10 = (
    Source(
        (cifar10.SOURCE,),
        "cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        unpack_to=cifar10.FOLDER,
        needed=(*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"),
    ),
)

SOURCES: dict[str, tuple[Source, ...]] = {
    "a9a": (
        Source(
            (a9a.SOURCE + "a9a",),
            "a9a",
            "f5d5ffd8d865ff41328e7ee043e4b020816914ff6843ff15b98905ddbedce906",
        ),
        Source(
            (a9a.SOURCE + "a9a.t",),
            "a9a.t",
            "1f448a153f0320399a7e40836eb207655b0bde0f21fc941cc472193daa9f5de9",
        ),
    ),
    "mnist": (
        _mnist("train-images-idx3-ubyte", "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
        _mnist("train-labels-idx1-ubyte", "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
        _mnist("t10k-images-idx3-ubyte", "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
        _mnist("t10k-labels-idx1-ubyte", "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
    ),
    "cifar10": _CIFAR10,
    "cifar10-resnet18": _CIFAR10,
    "tiny-imagenet": (
        Source(
            (tiny_imagenet.SOURCE,),
            "tiny-imagenet-200.zip",
            md5="90528d7ca1a48142e341f4ef8d21d0de",
            unpack_to=tiny_imagenet.FOLDER,
            needed=("wnids.txt", "val/val_annotations.txt"),
        ),
    ),
    "charlm": (
        Source(
            (charlm.SOURCE,),
            "tinyshakespeare/input.txt",
            "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        ),
    ),
}
"""Built-in tasks that need files, and where these come from."""


def download_task(name: str, data_dir: Path | None = None) -> None:
    """Fetch what the built-in task `name` needs and does not have; nothing for tasks without files.

    Data files that are there are left alone, whatever they hold; an archive in the data folder is checked and
    used. data_dir: as for `load_task`. Several processes may do this at once: each fetches its own copy and the
    last rename wins; better let one do it before the others start.

    Raises DataMissingError where no source answers, ConfigError where a file is not what it should be or the
    disk refuses it.
    """
    folder = resolve_data_dir(data_dir)
    for source in SOURCES.get(name, ()):
        if source.unpack_to is None:
            alternatives = (source.path, source.path.removesuffix(".gz"))
            if not any((folder / path).is_file() for path in alternatives):
                _fetch_any(source, folder / source.path)
            continue
        target = folder / source.unpack_to
        if all((target / file).is_file() for file in source.needed):
            continue
        archive = folder / source.path
        if archive.is_file():
            # Put there by hand, or left by an attempt that was interrupted while unpacking.
            _compare(str(archive), _sums_of(archive), source.sha256, source.md5)
        else:
            _fetch_any(source, archive)
        unpack(archive, folder, source.unpack_to)
        archive.unlink(missing_ok=True)


def _fetch_any(source: Source, dest: Path) -> None:
    for url in source.urls[:-1]:
        try:
            return fetch(url, dest, sha256=source.sha256, md5=source.md5)
        except ConfigError as error:
            _logger.warning("%s; trying another source", error)
    fetch(source.urls[-1], dest, sha256=source.sha256, md5=source.md5)


def fetch(
    url: str,
    dest: Path,
    *,
    sha256: str | None = None,
    md5: str | None = None,
    attempts: int = 3,
    timeout_s: float = 30.0,
) -> None:
    """Download `url` (http or https) to the file `dest`, whose folders are made, with a progress bar on a
    terminal.

    `dest` appears complete and checked, or not at all. sha256, md5: expected sums in hexadecimal; without
    one, only the announced length is checked. attempts: how often a connection that fails is tried, with
    growing pauses; an answer such as "not found" and a wrong sum are not tried again. timeout_s: seconds
    without any byte.

    Raises DataMissingError where the URL cannot be fetched; ConfigError on another scheme, a wrong sum, or a
    folder that cannot be written.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url}: only http and https are fetched")
    part = dest.with_name(f"{dest.name}.{os.getpid()}.part")
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, attempts + 1):
            try:
                sums = _stream(url, part, timeout_s)
                break
            except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
                refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
                if isinstance(error, urllib.error.HTTPError):
                    error.close()
                if refused or attempt == attempts:
                    raise DataMissingError(
                        f"{url} cannot be fetched ({_reason(error)}); put it at {dest} by hand"
                    ) from error
                time.sleep(_RETRY_PAUSE_S * attempt)
        _compare(url, sums, sha256, md5)
        part.replace(dest)
    except OSError as error:
        raise ConfigError(f"{url} cannot be fetched to {dest}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _compare(what: str, sums: dict[str, str], sha256: str | None, md5: str | None) -> None:
    for kind, expected in (("sha256", sha256), ("md5", md5)):
        if expected is not None and sums[kind] != expected.lower():
            raise ConfigError(f"{what} is not the expected file: its {kind} is {sums[kind]}, not {expected}")


def _sums_of(path: Path) -> dict[str, str]:
    try:
        with path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            stream.seek(0)
            return {"sha256": sha256, "md5": hashlib.file_digest(stream, "md5").hexdigest()}
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error


def _reason(error: Exception) -> str:
    # URLError's own text wraps the cause in noise; that of its subclass HTTPError has the status.
    if isinstance(error, urllib.error.URLError) and not isinstance(error, urllib.error.HTTPError):
        return str(error.reason)
    return str(error) or type(error).__name__


def _stream(url: str, part: Path, timeout_s: float) -> dict[str, str]:
    """Write the body of `url` to `part`; returns its sums. Raises what urllib raises, and on a short body."""
    hashes: dict[str, _Hash] = {"sha256": hashlib.sha256(), "md5": hashlib.md5(usedforsecurity=False)}
    request = urllib.request.Request(url, headers={"User-Agent": "loscar"})
    with urllib.request.urlopen(request, timeout=timeout_s) as response:
        announced = response.headers.get("Content-Length")
        total = int(announced) if announced is not None and announced.isdigit() else None
        done = 0
        with part.open("wb") as stream, progress(url.rsplit("/", 1)[-1], total, is_bytes=True) as advance:
            while chunk := response.read(_CHUNK_BYTES):
                stream.write(chunk)
                for each in hashes.values():
                    each.update(chunk)
                done += len(chunk)
                advance(len(chunk))
        if total is not None and done != total:
            # read() with a size returns what there is when the peer hangs up; it does not raise.
            raise ConnectionError(f"the connection ended {total - done} bytes early")
    return {kind: each.hexdigest() for kind, each in hashes.items()}


def unpack(archive: Path, dest: Path, top: str) -> None:
    """Unpack the folder `top` of a .zip or .tar.gz archive to dest/top; replaces files of the same name
    there.

    Only regular files strictly below `top` are written, never links or paths that leave it. The files appear
    in dest/top after all of them have been unpacked beside it. Raises ConfigError where the archive is broken
    or has no such folder, or the disk refuses.
    """
    stage = dest / f"{top}.{os.getpid()}.part"
    try:
        shutil.rmtree(stage, ignore_errors=True)
        count = 0
        with _members(archive) as (total, members), progress(f"unpacking {archive.name}", total) as advance:
            for name, open_member in members:
                advance(1)
                path = PurePosixPath(name)
                if len(path.parts) < 2 or path.parts[0] != top or ".." in path.parts or "\\" in name:
                    continue
                target = stage.joinpath(*path.parts[1:])
                target.parent.mkdir(parents=True, exist_ok=True)
                with open_member() as source, target.open("wb") as stream:
                    shutil.copyfileobj(source, stream, _CHUNK_BYTES)
                count += 1
        if not count:
            raise ConfigError(f"{archive}: it holds no folder {top}")
        _put_in_place(stage, dest / top)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ConfigError(f"{archive}: the archive is broken ({error}); remove it and fetch it again") from error
    except OSError as error:
        raise ConfigError(f"{archive}: cannot be unpacked to {dest}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


_Member = tuple[str, Callable[[], IO[bytes]]]


@contextlib.contextmanager
def _members(archive: Path) -> Iterator[tuple[int | None, Iterator[_Member]]]:
    """The number of entries where it is known, and the regular files with a way to open each, in order."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as unzip:
            infos = [info for info in unzip.infolist() if not info.is_dir()]
            yield len(infos), ((info.filename, functools.partial(unzip.open, info)) for info in infos)
    else:
        with gzip.open(archive) as raw, tarfile.open(fileobj=raw, mode="r:") as tar:
            # Not getmembers(): that would decompress the whole archive once more, only to count.
            yield (
                None,
                ((info.name, functools.partial(_tar_file, tar, info)) for info in tar if info.isfile()),
            )
            # tarfile stops before the end of the stream, where gzip's own checksum is.
            while raw.read(_CHUNK_BYTES):
                pass


def _tar_file(tar: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    stream = tar.extractfile(info)
    if stream is None:
        raise tarfile.TarError(f"{info.name} is not a file")
    return stream


def _put_in_place(stage: Path, target: Path) -> None:
    if not target.exists():
        stage.replace(target)
        return
    for path in sorted(stage.rglob("*")):
        if path.is_file():
            final = target / path.relative_to(stage)
            final.parent.mkdir(parents=True, exist_ok=True)
            path.replace(final)
