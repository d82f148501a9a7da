"""Both doors without BentoML: ``python -m bench.doors --port 3000 --grpc-port 3001``.

For machines that have torch, uvicorn and grpcio and cannot install the rest. What answers is the same application and
the same gRPC server on the same engine; BentoML would only start and stop them. It runs in the uvicorn that BentoML
would run, and ends at SIGTERM as the service does. Settings are the service's, ``MIEN_*``.
"""

from __future__ import annotations

import argparse
import asyncio

from serving import metrics  # first of ours: see its docstring  # isort: skip

import uvicorn

from serving import app, hardening
from serving.engine import Engine
from serving.grpc_door import GrpcDoor
from serving.settings import Settings

_HOST = "127.0.0.1"


async def serve(port: int, grpc_port: int) -> None:
    """Until SIGTERM or SIGINT."""
    hardening.forbid_core_dumps()
    engine = Engine(Settings(), metrics.Metrics())
    engine.start()
    door = GrpcDoor(engine)
    await door.open(_HOST, grpc_port)
    config = uvicorn.Config(app.build(engine), _HOST, port, log_level="warning", lifespan="off", access_log=False)
    try:
        await uvicorn.Server(config).serve()
    finally:
        await door.close()
        await asyncio.to_thread(engine.close)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--grpc-port", type=int, required=True)
    asked = parser.parse_args()
    asyncio.run(serve(asked.port, asked.grpc_port))
