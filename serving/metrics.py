"""The service's numbers, in prometheus-client, in memory.

BentoML points prometheus-client at memory-mapped files (``PROMETHEUS_MULTIPROC_DIR``) so that several worker processes
can be summed. There is one process here and nothing is written while serving, so the variable is taken away before
prometheus-client reads it; this module must therefore be the first that imports it.
"""

from __future__ import annotations

import os
from collections.abc import Callable

os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)
os.environ.pop("prometheus_multiproc_dir", None)

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 20, 40, 60)


class Metrics:
    """All metrics of one engine. Label values come from fixed sets, never from a request."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        r = self.registry
        self.requests = Counter(
            "mien_requests_total", "Requests finished", ["operation", "transport", "outcome"], registry=r
        )
        self.seconds = Histogram(
            "mien_request_seconds",
            "Seconds from admission to the answer, or to the end of a stream",
            ["operation", "transport"],
            buckets=_SECONDS,
            registry=r,
        )
        self.faces = Counter("mien_faces_total", "Faces changed, recovered or detected", ["operation"], registry=r)
        self.batch_size = Histogram(
            "mien_batch_size",
            "Face crops in one pass of the network",
            buckets=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128),
            registry=r,
        )
        self.queue_depth = Gauge("mien_queue_depth", "Admitted requests that wait for a worker", registry=r)
        self.inflight = Gauge("mien_inflight_requests", "Requests a worker is busy with", registry=r)
        self.uploads = Gauge("mien_uploads", "Requests whose body is being received", registry=r)
        self.streams = Gauge("mien_streams", "TransformStream calls open", registry=r)
        self.frames = Counter("mien_frames_total", "Video frames answered", ["operation"], registry=r)
        self.dropped = Counter(
            "mien_frames_dropped_total", "Video frames dropped to stay live, as their streams asked", registry=r
        )
        self.model_stale = Gauge(
            "mien_model_stale", "1 while the model that was asked for is not the one that serves", registry=r
        )
        self.model_info = Gauge("mien_model_info", "1 for the model that serves", ["digest", "version"], registry=r)
        self.model_reloads = Counter(
            "mien_model_reloads_total", "Model loads, the first one included", ["outcome"], registry=r
        )
        # A series that exists from the start can be alerted on; one that appears with the first failure cannot.
        for outcome in ("ok", "failed"):
            self.model_reloads.labels(outcome)

    def watch(
        self,
        *,
        queue_depth: Callable[[], int],
        inflight: Callable[[], int],
        uploads: Callable[[], int],
        streams: Callable[[], int],
    ) -> None:
        """Read these gauges from the engine whenever they are scraped."""
        self.queue_depth.set_function(queue_depth)
        self.inflight.set_function(inflight)
        self.uploads.set_function(uploads)
        self.streams.set_function(streams)

    def model(self, digest: str, version: str) -> None:
        """Name the model that serves from now on, and it alone."""
        self.model_info.clear()
        self.model_info.labels(digest=digest, version=version).set(1)

    def render(self) -> bytes:
        """The Prometheus text exposition, :data:`CONTENT_TYPE`."""
        return generate_latest(self.registry)
