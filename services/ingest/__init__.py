"""Photos -> aligned square crops -> WebDataset shards and a manifest: ``python -m services.ingest``."""

from mien.manifest import Manifest, ShardError
from services.ingest.config import IngestConfig, IngestError, Source
from services.ingest.pipeline import run, verify

__all__ = ["IngestConfig", "IngestError", "Manifest", "ShardError", "Source", "run", "verify"]
