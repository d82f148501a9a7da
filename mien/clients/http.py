"""Over HTTP, by httpx: one exchange, its failures named. Trying again is :mod:`mien.clients.client`'s."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np

from mien import __version__, errors
from mien.clients.failures import Failed, refused
from mien.clients.requests import Answer, Edit
from mien.detection import Face
from mien.pictures import MEDIA_TYPES, Format

_CONNECT_TIMEOUT: Final = 5.0
_FORMATS: Final[Mapping[str, Format]] = {media_type: name for name, media_type in MEDIA_TYPES.items()}


def _options(url: str, api_key: str | None, ca: Path | None) -> dict[str, Any]:
    headers = {"User-Agent": f"mien/{__version__}"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    return {
        "base_url": url,
        "headers": headers,
        "verify": ssl.create_default_context(cafile=ca) if ca else True,
        # Neither a proxy from the environment nor a redirect gets to see a password.
        "trust_env": False,
        "follow_redirects": False,
    }


def _request(
    client: httpx.Client | httpx.AsyncClient, operation: str, data: bytes, form: dict[str, str], seconds: float
) -> httpx.Request:
    timeout = httpx.Timeout(seconds, connect=min(_CONNECT_TIMEOUT, seconds))
    files = {"image": ("picture", data, "application/octet-stream")}
    return client.build_request("POST", f"v1/{operation}", files=files, data=form, timeout=timeout)


def _failed(error: httpx.HTTPError, url: str) -> Failed:
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)):
        return Failed(errors.ServiceUnavailable(f"The service at {url} cannot be reached."), again=True)
    if isinstance(error, httpx.TimeoutException):
        return Failed(errors.ServiceTimeout("The service did not answer in time."))
    if isinstance(error, httpx.UnsupportedProtocol):
        return Failed(errors.ServiceError(f"{url} is not an address of a service."))
    return Failed(errors.ServiceUnavailable(f"The connection to {url} broke."), again=True, broken=True)


def _checked(response: httpx.Response) -> httpx.Response:
    """The response, or :class:`Failed` with what its problem document says."""
    if response.is_success:
        return response
    try:
        problem = response.json()
        slug = str(problem["type"]).removeprefix("urn:mien:problem:")
        detail = str(problem["detail"])
    except (ValueError, KeyError, TypeError):  # a proxy's own page
        slug, detail = "", f"The service answered with status {response.status_code}."
    wait = response.headers.get("retry-after", "")
    raise refused(response.status_code, slug, detail, float(wait) if wait.isascii() and wait.isdigit() else None)


def _answer(response: httpx.Response) -> Answer:
    headers = _checked(response).headers
    try:
        return Answer(
            data=response.content,
            format=_FORMATS[headers["content-type"]],
            face_count=int(headers["x-mien-faces"]),
            digest=headers["x-mien-model-digest"],
            request_id=headers["x-request-id"],
        )
    except (KeyError, ValueError):
        raise Failed(errors.ServiceError(f"{response.url.host} answers, but not as Mien does.")) from None


def _faces(response: httpx.Response) -> list[Face]:
    try:
        return [
            Face(np.array(face["box"], np.float64), float(face["confidence"]), np.array(face["landmarks"], np.float64))
            for face in _checked(response).json()["faces"]
        ]
    except (KeyError, ValueError, TypeError):
        raise Failed(errors.ServiceError(f"{response.url.host} answers, but not as Mien does.")) from None


class HTTP:
    """Waiting exchanges; safe to use from several threads."""

    def __init__(self, url: str, api_key: str | None, ca: Path | None) -> None:
        self._url = url
        self._client = httpx.Client(**_options(url, api_key, ca))

    def edit(self, data: bytes, edit: Edit, timeout: float) -> Answer:
        return _answer(self._send(edit.operation, data, edit.form(), timeout))

    def detect(self, data: bytes, timeout: float) -> list[Face]:
        return _faces(self._send("detect", data, {}, timeout))

    def _send(self, operation: str, data: bytes, form: dict[str, str], timeout: float) -> httpx.Response:
        try:
            return self._client.send(_request(self._client, operation, data, form, timeout))
        except httpx.HTTPError as error:
            # `from None`: httpx' errors hold the request, and the request holds the password.
            raise _failed(error, self._url) from None

    def close(self) -> None:
        self._client.close()


class AsyncHTTP:
    """:class:`HTTP` for an event loop."""

    def __init__(self, url: str, api_key: str | None, ca: Path | None) -> None:
        self._url = url
        self._client = httpx.AsyncClient(**_options(url, api_key, ca))

    async def edit(self, data: bytes, edit: Edit, timeout: float) -> Answer:
        return _answer(await self._send(edit.operation, data, edit.form(), timeout))

    async def detect(self, data: bytes, timeout: float) -> list[Face]:
        return _faces(await self._send("detect", data, {}, timeout))

    async def _send(self, operation: str, data: bytes, form: dict[str, str], timeout: float) -> httpx.Response:
        try:
            return await self._client.send(_request(self._client, operation, data, form, timeout))
        except httpx.HTTPError as error:
            raise _failed(error, self._url) from None

    async def close(self) -> None:
        await self._client.aclose()
