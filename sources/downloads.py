"""How bytes come: downloads over HTTP and from Kaggle that resume, retry, verify and give up in time."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from tqdm.auto import tqdm

from core.errors import LabError, choose

TRIES = 5  # failures in a row, without `PROGRESS` between them, before a download gives up
RETRY_WAIT = 1.0  # seconds before the second try; doubles with every further one
CHUNK = 1 << 16  # bytes read at a time; a cut loses at most as many
PROGRESS = 1 << 20
AGAIN = "run the same call again"


class _TryAgainError(Exception):
    """A failure that another try may cure."""


# ---- disk


def human_size(count: float) -> str:
    """`count` bytes as a human reads it, in decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} bytes"


def require_space(folder: Path, needed: float, label: str) -> int:
    """Bytes free in `folder`. Raises: LabError if they are fewer than `needed`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise LabError(
            f"{label} needs {human_size(needed)} and {folder.resolve()} has {human_size(free)} free: "
            f"free {human_size(needed - free)}, or set data_dir to a larger disk"
        )
    return free


@contextmanager
def disk_errors(label: str, folder: Path, kept: str) -> Iterator[None]:
    """Turns what the disk of `folder` does wrong into LabError; `kept` says what a second call goes on from."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise  # from requests or a decompressor: an OSError by name only
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise LabError(
                f"{label}: the disk of {folder} is full; {kept}: free some space, then {AGAIN}"
            ) from error
        raise LabError(
            f"{label}: cannot write in {folder} ({error}); set data_dir to another folder"
        ) from error


# ---- the two kinds of server


class _TimeoutAdapter(HTTPAdapter):
    """Gives a time-out to requests that come without one: Kaggle's client sets none."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        super().__init__()

    def send(self, *args: Any, **options: Any) -> requests.Response:
        options["timeout"] = options.get("timeout") or self.timeout
        return super().send(*args, **options)


@contextmanager
def _open_http(url: str, headers: dict[str, str], timeout: float) -> Iterator[requests.Response]:
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
        response.raise_for_status()
        yield response


@contextmanager
def _open_kaggle(url: str, headers: dict[str, str], timeout: float) -> Iterator[requests.Response]:
    """The archive of a Kaggle set, by kagglehub's own client, credentials and requests.

    Not by `kagglehub.dataset_download`: it has no time-out, appends whatever a resumed request
    answers, and unpacks without a bound.
    """
    from kagglehub.clients import build_kaggle_client
    from kagglesdk.datasets.types.dataset_api_service import ApiDownloadDatasetRequest, ApiGetDatasetRequest

    handle = _handle(url)
    kaggle_credentials()  # a broken file is told as such
    with build_kaggle_client() as client:
        session = client.http_client()._session
        for scheme in ("https://", "http://"):
            session.mount(scheme, _TimeoutAdapter(timeout))
        service = client.datasets.dataset_api_client
        wanted = ApiDownloadDatasetRequest()
        wanted.owner_slug, wanted.dataset_slug = handle.owner, handle.dataset
        if not handle.is_versioned():
            asked = ApiGetDatasetRequest()
            asked.owner_slug, asked.dataset_slug = handle.owner, handle.dataset
            handle = handle.with_version(service.get_dataset(asked).current_version_number)
        wanted.dataset_version_number = handle.version
        session.headers.update(headers)  # they follow the redirect to the archive's own host
        with service.download_dataset(wanted) as response:
            yield response


OPENERS: dict[str, Callable[[str, dict[str, str], float], AbstractContextManager[requests.Response]]] = {
    "http": _open_http,
    "https": _open_http,
    "kaggle": _open_kaggle,
}


def _handle(url: str) -> Any:
    from kagglehub.handle import parse_dataset_handle

    return parse_dataset_handle(url.removeprefix("kaggle://"))


def kagglehub_copy(url: str) -> Path | None:
    """Where kagglehub has a set already: in its own cache, or mounted by Kaggle or Colab; else None."""
    from kagglehub import exceptions
    from kagglehub.cache import Cache, get_cached_path
    from kagglehub.colab_cache_resolver import DatasetColabCacheResolver
    from kagglehub.kaggle_cache_resolver import DatasetKaggleCacheResolver

    handle = _handle(url)
    versions = Path(get_cached_path(handle), "versions").glob("[0-9]*")
    for version in sorted((int(path.name) for path in versions if path.name.isdigit()), reverse=True):
        if cached := Cache().load_from_cache(handle.with_version(version)):
            return Path(cached)
    try:
        for resolver in (DatasetKaggleCacheResolver(), DatasetColabCacheResolver()):
            if resolver.is_supported(handle):
                return Path(resolver(handle)[0])
    except (
        requests.RequestException,
        exceptions.BackendError,
        exceptions.CredentialError,
        exceptions.KaggleEnvironmentError,
    ) as error:
        warnings.warn(f"the mounted copy of {handle} cannot be had ({error}); downloading it", stacklevel=2)
    return None


def kaggle_credentials() -> str:
    """Where kagglehub finds Kaggle credentials ("" for nowhere). Raises: LabError on a broken file."""
    from kagglehub.config import get_kaggle_credentials

    folder = Path(os.environ.get("KAGGLE_CONFIG_DIR", Path.home() / ".kaggle"))
    places = {
        "KAGGLE_API_TOKEN": bool(os.environ.get("KAGGLE_API_TOKEN")),
        "~/.kaggle/access_token": any(Path.home().glob(".kaggle/access_token*")),
        "KAGGLE_USERNAME and KAGGLE_KEY": bool(
            os.environ.get("KAGGLE_USERNAME") and os.environ.get("KAGGLE_KEY")
        ),
        str(folder / "kaggle.json"): (folder / "kaggle.json").is_file(),
        "Colab's secrets or kagglehub.login()": True,
    }
    try:
        if get_kaggle_credentials() is None:
            return ""
    except ValueError as error:
        raise LabError(
            f"{folder / 'kaggle.json'} is no credentials file; delete it, for public sets need none, or take "
            "a new one from your Kaggle account's settings"
        ) from error
    return next(place for place, found in places.items() if found)


# ---- what went wrong, in one sentence


def _refusal(url: str, status: int) -> str:
    if status in (404, 410):
        if url.startswith("kaggle:"):
            return f"Kaggle has no set {url.removeprefix('kaggle://')} (404): its owner may have renamed it"
        return f"{url} does not exist any more ({status})"
    if not url.startswith("kaggle:"):
        return f"the server refuses {url} ({status}): open it in a browser to see why"
    handle, found = url.removeprefix("kaggle://"), kaggle_credentials()
    if found:
        return (
            f"Kaggle refuses {handle} ({status}) with the credentials from {found}: "
            "public sets need none, so correct these or remove them"
        )
    return (
        f"Kaggle refuses {handle} ({status}) without credentials, which public sets do not need: accept "
        f"what its page https://www.kaggle.com/datasets/{handle} asks for, and put an API token into "
        "KAGGLE_API_TOKEN (or KAGGLE_USERNAME and KAGGLE_KEY), ~/.kaggle/kaggle.json or Colab's secrets"
    )


def _status(error: requests.HTTPError) -> int:
    """The status of a refusal; Kaggle may put it into the body of a 200."""
    response = error.response
    assert response is not None
    return response.status_code if response.status_code >= 400 else int(response.json()["code"])


@contextmanager
def _server_errors(url: str, part: Path, timeout: float) -> Iterator[None]:
    """Turns what a server does wrong into LabError, or _TryAgainError where another try may help."""
    try:
        yield
    except requests.HTTPError as error:
        status = _status(error)
        if status == 416:  # asks past the end of a file that changed on the server
            part.unlink(missing_ok=True)
        if status in (408, 416, 429) or status >= 500:
            raise _TryAgainError(f"answers with error {status}") from error
        raise LabError(_refusal(url, status)) from error
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        causes = (error, *error.args)  # requests wraps urllib3's errors, not always in its own of that name
        reasons = (reason for kind, reason in _REASONS.items() if any(isinstance(e, kind) for e in causes))
        raise _TryAgainError(next(reasons, "cannot be reached").format(timeout=timeout)) from error


_REASONS: dict[type[Exception], str] = {
    requests.Timeout: "sends nothing for {timeout:g} s",
    urllib3.exceptions.TimeoutError: "sends nothing for {timeout:g} s",
    requests.exceptions.SSLError: "shows no valid certificate",
    requests.exceptions.JSONDecodeError: "answers with something other than JSON",
    requests.exceptions.ChunkedEncodingError: "cuts the connection",
    urllib3.exceptions.ProtocolError: "cuts the connection",
}


# ---- downloads


@dataclass
class _State:
    """What the bytes of an unfinished download belong to, so that two files are never joined."""

    url: str
    validator: str  # ETag, or the date of the last change
    total: int | None
    md5: str  # as the server states it

    @classmethod
    def of(cls, url: str, response: requests.Response) -> _State:
        headers = response.headers
        etag = headers.get("ETag", "")
        strong = bool(etag) and not etag.startswith("W/")
        return cls(
            url=url,
            validator=etag if strong else headers.get("Last-Modified", ""),
            total=_total(response),
            md5=_stated_md5(headers.get("x-goog-hash", "")),
        )

    @classmethod
    def load(cls, file: Path, url: str) -> _State | None:
        """The state of an unfinished download of `url`, if the server gave enough to go on from it."""
        try:
            state = cls(**json.loads(file.read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return state if state.url == url and state.validator and state.total else None


def _stated_md5(header: str) -> str:
    """The MD5, hexadecimal, of a header of Google's storage: `crc32c=n03x6A==,md5=Ojk9c3dhfxgoKVVHYwFbHQ==`."""
    found = re.search(r"\bmd5=([A-Za-z0-9+/]{22}==)", header)
    return base64.b64decode(found[1]).hex() if found else ""


def _total(response: requests.Response) -> int | None:
    if response.status_code == 206:
        found = re.search(r"/(\d+)$", response.headers.get("Content-Range", ""))
        return int(found[1]) if found else None
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _attempt(url: str, part: Path, label: str, timeout: float, progress: bool) -> _State:
    """Bring `part` nearer to the whole file. Raises: _TryAgainError if it is not whole afterwards."""
    state_file = part.with_name(part.name + ".json")
    state = _State.load(state_file, url)
    start = _size(part) if state else 0
    if state and start == state.total:
        return state
    headers = {"Accept-Encoding": "identity"}  # or a .tar.gz may come unpacked, and sizes never match
    if state and start:
        headers |= {"Range": f"bytes={start}-", "If-Range": state.validator}
    opener = choose(OPENERS, urlsplit(url).scheme, "kind of address")
    with _server_errors(url, part, timeout), opener(url, headers, timeout) as response:
        if response.status_code == 206 and state:
            _check_continues(response, state, start, part)
        else:
            start, state = 0, _State.of(url, response)
            part.unlink(missing_ok=True)
            state_file.write_text(json.dumps(asdict(state)))
        if state.total:
            require_space(part.parent, state.total - start, label)
        _receive(response, part, start, state.total, label, progress)
    if state.total and _size(part) != state.total:  # urllib3 before 2.0 takes a cut for the end
        raise _TryAgainError("cuts the connection")
    return state


def _check_continues(response: requests.Response, state: _State, start: int, part: Path) -> None:
    """Raises: _TryAgainError, and drops `part`, if these bytes do not follow on from it."""
    now = _State.of(state.url, response)
    begins = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    same = (now.validator, now.total) == (state.validator, state.total)
    if not (same and begins and int(begins[1]) == start):
        part.unlink()
        raise _TryAgainError("has another file than before")


def _receive(
    response: requests.Response, part: Path, start: int, total: int | None, label: str, progress: bool
) -> None:
    bar = tqdm(
        desc=label,
        total=total,
        initial=start,
        unit="B",
        unit_scale=True,
        disable=not progress,
        mininterval=0.5,
    )
    with bar, part.open("ab") as file:
        for chunk in response.raw.stream(CHUNK, decode_content=False):
            file.write(chunk)
            bar.update(len(chunk))


def _verify(path: Path, checksum: str, label: str) -> None:
    """Raises: LabError, and deletes the file, if it does not have this `algorithm:hex` checksum."""
    algorithm, _, expected = checksum.partition(":")
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        path.unlink()
        raise LabError(
            f"{label}: the download's {algorithm} is {digest.hexdigest()} in place of {expected}, "
            f"so it is damaged and was deleted; {AGAIN}"
        )


def download(
    url: str,
    path: Path,
    *,
    label: str = "",
    checksum: str | None = None,
    timeout: float = 60.0,
    progress: bool = True,
) -> None:
    """Bring the file at `url` to `path`, going on where an earlier call was interrupted.

    The bytes go to `path` + ".part" until all are there and verified, so `path` is always whole.

    Args:
        url: http://, https://, or kaggle://owner/set for a Kaggle set's archive.
        path: the file to make; nothing is asked of a server if it exists.
        label: what the progress bar and the messages call it.
        checksum: "md5:..." or "sha256:...", hexadecimal; the MD5 that Google's storage states is
            checked besides.
        timeout: seconds a server may be silent.
    Raises: LabError if the server refuses, fails `TRIES` times in a row, or sends something else, or
        if the disk is full.
    """
    if path.exists():
        return
    label = label or path.name
    part = path.with_name(path.name + ".part")
    host = "Kaggle" if url.startswith("kaggle:") else urlsplit(url).hostname
    failures = 0
    while True:
        before = _size(part)
        try:
            with disk_errors(label, path.parent, "what was downloaded is kept"):
                state = _attempt(url, part, label, timeout, progress)
            break
        except _TryAgainError as error:
            failures = 1 if _size(part) - before >= PROGRESS else failures + 1
            if failures >= TRIES:
                there = f" ({human_size(_size(part))} are there already)" if _size(part) else ""
                raise LabError(
                    f"{label}: {host} {error}, {TRIES} times in a row; check the network or wait, then "
                    f"{AGAIN}{there}"
                ) from error
            time.sleep(RETRY_WAIT * 2 ** (failures - 1))
    for wanted in (checksum, state.md5 and f"md5:{state.md5}"):
        if wanted:
            _verify(part, wanted, label)
    os.replace(part, path)
    part.with_name(part.name + ".json").unlink(missing_ok=True)
