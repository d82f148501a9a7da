"""The model's verbs against a running service, over HTTP or gRPC, waiting or not.

    client = mien.Client("http://localhost:3000")         # or https://, grpc://, grpcs://
    safe = client.anonymize(photo, "correct horse")       # PIL.Image -> PIL.Image, as mien.load(...).anonymize
    answer = client.recover_bytes(data, "correct horse")  # a file's bytes -> Answer

    async with mien.AsyncClient("grpc://localhost:3001", api_key=key) as client:
        faces = await client.detect(photo)

**Errors** are those of :mod:`mien.errors`: what a model raises in the process, a client raises from afar.

**Trying again.** Every operation is a pure function of its request: a service keeps nothing, so asking twice changes
nothing and costs only its time. Asked again is therefore: where no connection could be made; where the service refused
*before* working (429 and 503 that say when to come back: full queue, rate limit, model being loaded); and, once, where
the connection broke before an answer. Never asked again is what may still be running or would run as long again (a
time-out on either side), what the service will refuse again (every 4xx), and a stream of frames. All of it happens
within ``timeout`` seconds and ``attempts``.

**Secrets.** Passwords and pictures travel in bodies, never in URLs; over a network that others can read, use
``https://`` or ``grpcs://``. No proxy is taken from the environment and no redirect is followed: either would hand
password and picture to somebody else.

Importing this loads neither torch nor grpc; ``grpc://`` needs the ``grpc`` extra.
"""

from mien.clients.client import AsyncClient, Client
from mien.clients.requests import Answer, Frame, TrackedFace, Tracking

__all__ = ["Answer", "AsyncClient", "Client", "Frame", "TrackedFace", "Tracking"]
