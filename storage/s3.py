"""Objects of a bucket under a prefix, in any S3-compatible store, through boto3."""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import boto3
import tenacity
from botocore import exceptions as aws
from botocore.config import Config

from storage.base import (
    AccessDenied,
    Entry,
    NoCredentials,
    NotFound,
    StorageError,
    StorageFull,
    Unreachable,
    Written,
    checked,
    join,
    mismatch,
    of_os,
)

logger = logging.getLogger(__name__)

_RANGE: Final = 16 << 20  # read at once; also what a reader holds in memory
_PART: Final = 64 << 20  # written at once; a multipart upload has at most 10,000 parts
_STREAMS: Final = 4  # parts on their way at the same time
_CHECK_PATIENCE: Final = 10.0
_SHA256: Final = "sha256"  # key of the object's metadata

# Worth trying again: no connection, a connection that broke, a store that is starting, busy or throttling.
_PASSING: Final = (
    aws.EndpointConnectionError,
    aws.ConnectionError,
    aws.HTTPClientError,
    aws.ResponseStreamingError,
    aws.IncompleteReadError,
)
_PASSING_CODES: Final = frozenset(
    {"InternalError", "ServiceUnavailable", "SlowDown", "RequestTimeout", "RequestTimeTooSkewed", "Throttling",
     "ThrottlingException", "TooManyRequests", "500", "502", "503", "504"}
)  # fmt: skip
_DENIED: Final = frozenset(
    {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "401", "403",
     "Forbidden", "AccountProblem", "AllAccessDisabled"}
)  # fmt: skip

T = TypeVar("T")


class S3:
    """See :class:`storage.Prefix`.

    Args:
        url: ``s3://bucket`` or ``s3://bucket/prefix``.
        patience: seconds for which what may pass is tried again.
    """

    def __init__(self, url: str, *, patience: float = 600.0) -> None:
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        if not bucket or "@" in bucket:
            raise StorageError("expected s3://bucket/prefix; credentials go into the AWS variables")
        self.bucket, self.patience = bucket, patience
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._client: Any = None
        self._pid = 0
        self._making = threading.Lock()

    def __repr__(self) -> str:
        return f"S3({self.url!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "patience": self.patience}

    def __setstate__(self, state: dict[str, Any]) -> None:
        S3.__init__(self, state["url"], patience=state["patience"])

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self._prefix}".rstrip("/")

    def check(self) -> None:
        self._call("list_objects_v2", "", patience=min(_CHECK_PATIENCE, self.patience), Prefix=self._prefix, MaxKeys=1)

    def exists(self, name: str) -> bool:
        try:
            self._call("head_object", name, Key=self._key(name))
        except NotFound:
            return False
        return True

    def size(self, name: str) -> int:
        return int(self._call("head_object", name, Key=self._key(name))["ContentLength"])

    def read(self, name: str, *, start: int = 0, length: int | None = None, sha256: str | None = None) -> bytes:
        parts: list[bytes] = []
        stored = self._ranges(name, start, length, parts.append)
        data = b"".join(parts)
        if start == 0 and length is None:
            found = hashlib.sha256(data).hexdigest()
            for expected in (sha256, stored):
                if expected is not None and found != expected:
                    raise mismatch(join(self.url, name), found, expected)
        return data

    def download(self, name: str, path: Path, *, sha256: str | None = None) -> Written:
        hasher, size = hashlib.sha256(), 0
        try:
            with open(path, "wb") as file:

                def take(data: bytes) -> None:
                    nonlocal size
                    hasher.update(data)
                    file.write(data)
                    size += len(data)

                stored = self._ranges(name, 0, None, take)
        except OSError as error:
            raise of_os(error, path) from error
        found = hasher.hexdigest()
        for expected in (sha256, stored):
            if expected is not None and found != expected:
                raise mismatch(join(self.url, name), found, expected)
        return Written(size, found)

    def write(self, name: str, source: bytes | Path) -> Written:
        key = self._key(name)
        if isinstance(source, bytes):
            written = Written(len(source), hashlib.sha256(source).hexdigest())
            return self._write(name, key, written, lambda start, length: source[start : start + length])
        try:
            with open(source, "rb") as file:
                written = Written(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())
                return self._write(name, key, written, lambda start, length: os.pread(file.fileno(), length, start))
        except OSError as error:
            raise of_os(error, source) from error

    def delete(self, name: str) -> None:
        self._call("delete_object", name, Key=self._key(name))

    def list(self, start: str = "") -> Iterator[Entry]:
        more: dict[str, Any] = {}
        while True:
            page = self._call("list_objects_v2", "", Prefix=self._prefix + start, **more)
            for item in page.get("Contents", []):
                if not item["Key"].endswith("/"):  # some stores list folders
                    name = item["Key"].removeprefix(self._prefix)
                    yield Entry(name, int(item["Size"]), str(item.get("ETag", "")).strip('"'))
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def _key(self, name: str) -> str:
        return self._prefix + checked(name)

    def _ranges(self, name: str, start: int, length: int | None, take: Callable[[bytes], None]) -> str | None:
        """Hand an object, or part of it, to ``take`` range by range; the sha256 of its metadata, if it has any.

        Each range is tried again for itself, and all are of one version of the object (its ETag).
        """
        key, position = self._key(name), start
        match: dict[str, str] = {}
        stored: str | None = None
        end = None if length is None else start + length
        while end is None or position < end:
            stop = position + _RANGE if end is None else min(position + _RANGE, end)
            arguments = {"Key": key, "Range": f"bytes={position}-{stop - 1}", **match}
            answer, data = self._retried(name, lambda a=arguments: self._get(a))  # type: ignore[misc]
            if answer is None:  # begins at or after its end; only an empty object's metadata is worth a call
                if start == 0:
                    stored = self._call("head_object", name, Key=key).get("Metadata", {}).get(_SHA256)
                return stored
            take(data)
            position += len(data)
            stored = answer.get("Metadata", {}).get(_SHA256)
            match = {"IfMatch": answer["ETag"]}
            total = int(answer["ContentRange"].rpartition("/")[2]) if "ContentRange" in answer else position
            if position >= total:
                return stored
        return stored

    def _get(self, arguments: dict[str, Any]) -> tuple[dict[str, Any] | None, bytes]:
        try:
            answer = self._connected().get_object(Bucket=self.bucket, **arguments)
        except aws.ClientError as error:
            if error.response.get("Error", {}).get("Code") in ("InvalidRange", "416"):
                return None, b""
            raise
        return answer, answer["Body"].read()

    def _write(self, name: str, key: str, written: Written, part: Callable[[int, int], bytes]) -> Written:
        metadata = {_SHA256: written.sha256}
        if written.size <= _PART:
            body = part(0, written.size)
            # The store recomputes this one and refuses another body.
            checksum = base64.b64encode(bytes.fromhex(written.sha256)).decode()
            self._call("put_object", name, Key=key, Body=body, ChecksumSHA256=checksum, Metadata=metadata)
            return written
        size = max(_PART, -(-written.size // 9_000))
        upload = self._call("create_multipart_upload", name, Key=key, Metadata=metadata, ChecksumAlgorithm="SHA256")[
            "UploadId"
        ]

        def send(number: int) -> dict[str, Any]:
            body = part((number - 1) * size, size)
            checksum = base64.b64encode(hashlib.sha256(body).digest()).decode()
            answer = self._call(
                "upload_part", name, Key=key, UploadId=upload, PartNumber=number, Body=body, ChecksumSHA256=checksum
            )
            return {"PartNumber": number, "ETag": answer["ETag"], "ChecksumSHA256": checksum}

        try:
            with ThreadPoolExecutor(_STREAMS) as pool:
                parts = list(pool.map(send, range(1, -(-written.size // size) + 1)))
            self._call("complete_multipart_upload", name, Key=key, UploadId=upload, MultipartUpload={"Parts": parts})
        except BaseException:
            with suppress(StorageError):
                self._call("abort_multipart_upload", name, patience=0, Key=key, UploadId=upload)
            raise
        found = self.size(name)
        if found != written.size:
            raise StorageError(f"{join(self.url, name)} has {found} bytes after an upload of {written.size}")
        return written

    def _call(self, operation: str, name: str, *, patience: float | None = None, **arguments: Any) -> Any:
        return self._retried(
            name, lambda: getattr(self._connected(), operation)(Bucket=self.bucket, **arguments), patience
        )

    def _retried(self, name: str, call: Callable[[], T], patience: float | None = None) -> T:
        where = join(self.url, name) if name else self.url
        patience = self.patience if patience is None else patience

        def warn(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            if state.seconds_since_start:  # the first attempts pass in silence: they are everyday life
                log = logger.warning if state.seconds_since_start > 2 else logger.debug
                log("%s: no answer for %.0f s, trying again (%s)", where, state.seconds_since_start, error)

        try:
            return tenacity.Retrying(
                retry=tenacity.retry_if_exception(_passes),
                wait=tenacity.wait_random_exponential(multiplier=0.25, max=8),
                stop=tenacity.stop_after_delay(patience),
                before_sleep=warn,
                reraise=True,
            )(call)
        except (aws.BotoCoreError, aws.ClientError, ValueError) as error:
            raise _of_aws(error, where, self.bucket, _endpoint(self._client)) from error

    def _connected(self) -> Any:
        """A client of this process: sockets do not survive a fork."""
        with self._making:
            if self._client is None or self._pid != os.getpid():
                self._client = boto3.session.Session().client(
                    "s3",
                    config=Config(
                        connect_timeout=5,
                        read_timeout=30,
                        retries={"mode": "standard", "total_max_attempts": 2},
                        max_pool_connections=16,
                        # Checksums are given explicitly: the default's trailing ones are unknown to older stores.
                        request_checksum_calculation="when_required",
                        response_checksum_validation="when_required",
                    ),
                )
                self._pid = os.getpid()
            return self._client


def _endpoint(client: Any) -> str:
    return str(client.meta.endpoint_url) if client is not None else os.environ.get("AWS_ENDPOINT_URL", "AWS")


def _passes(error: BaseException) -> bool:
    if isinstance(error, aws.ClientError):
        code = str(error.response.get("Error", {}).get("Code"))
        return code in _PASSING_CODES or _status(error) >= 500
    return isinstance(error, _PASSING) and not isinstance(error, aws.ProxyConnectionError)


def _status(error: aws.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _of_aws(error: Exception, where: str, bucket: str, endpoint: str) -> StorageError:
    if isinstance(error, aws.NoCredentialsError | aws.PartialCredentialsError | aws.CredentialRetrievalError):
        return NoCredentials(f"{where}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role")
    if isinstance(error, aws.ClientError):
        code = str(error.response.get("Error", {}).get("Code"))
        if code in _DENIED or _status(error) in (401, 403):
            return AccessDenied(f"{where}: {endpoint} refuses these credentials ({code})")
        if code == "NoSuchBucket":
            return NotFound(f"{where}: there is no bucket {bucket!r} at {endpoint}")
        if code in ("NoSuchKey", "404", "NotFound", "NoSuchUpload"):
            return NotFound(f"{where}: there is no such object")
        if code in ("PreconditionFailed", "412"):
            return StorageError(f"{where} was replaced while it was read")
        if code in ("QuotaExceeded", "InsufficientStorage", "507"):
            return StorageFull(f"{where}: {endpoint} has no room left ({code})")
        if code in ("BadDigest", "XAmzContentSHA256Mismatch", "InvalidDigest"):
            return mismatch(where, "another", "that of the upload")
        if _passes(error):
            return Unreachable(f"{where}: {endpoint} answers {code} and no more than that")
        return StorageError(f"{where}: {endpoint} answers {code}")
    if isinstance(error, aws.ResponseParserError if hasattr(aws, "ResponseParserError") else ()):
        return Unreachable(f"{where}: what answers at {endpoint} is not S3; see AWS_ENDPOINT_URL")
    if isinstance(error, ValueError):  # botocore: "Invalid endpoint: ..."
        return Unreachable(f"{where}: {error}; see AWS_ENDPOINT_URL")
    if isinstance(error, _PASSING):
        return Unreachable(f"{where}: nothing answers at {endpoint} ({type(error).__name__}); see AWS_ENDPOINT_URL")
    return StorageError(f"{where}: {error}")
