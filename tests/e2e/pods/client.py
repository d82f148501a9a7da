"""Callers inside the cluster, in the serving image: through the Service, so that its endpoints are judged too.

The last line of the output is a JSON object. Exit code 1, and a line that says why, where something did not hold.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import threading
import time
from typing import Any

import httpx
from round_trip import PASSWORD, WRONG, distance, synthetic


def post(base: str, operation: str, image: bytes, **fields: str) -> httpx.Response:
    """One request over a connection of its own, so that each is balanced anew.

    A pod that is killed takes its address with it: what was under way hears nothing more, and must not wait for long.
    """
    files = {"image": ("synthetic.png", image, "image/png")}
    data = {"aligned": "true"} | fields
    return httpx.post(f"{base}/v1/{operation}", files=files, data=data, timeout=httpx.Timeout(15.0, connect=3.0))


def model(base: str) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.get(f"{base}/v1/model", timeout=20.0).raise_for_status().json()
    return answer


def wrong_password(base: str) -> dict[str, Any]:
    """The right password gives the picture back; a wrong one another, by an answer that looks the same."""
    image = synthetic(model(base)["crop_size"])
    safe = post(base, "anonymize", image, password=PASSWORD)
    right = post(base, "recover", safe.content, password=PASSWORD)
    wrong = post(base, "recover", safe.content, password=WRONG)
    for answer in (safe, right, wrong):
        hold(answer.status_code == 200, f"{answer.status_code}: {answer.text[:200]}")
    # What may differ is what differs between any two requests.
    own = {"x-request-id", "date", "content-length"}
    seen = [{k: v for k, v in answer.headers.items() if k not in own} for answer in (right, wrong)]
    hold(seen[0] == seen[1], f"headers tell a wrong password from the right one: {seen}")
    back, third = distance(image, right.content), distance(image, wrong.content)
    hold(back < third / 2, f"recovered at {back:.2f}, with a wrong password at {third:.2f}")
    for fields, picture in (({"password": ""}, image), ({"password": PASSWORD}, b"no picture"), ({}, image)):
        answer = post(base, "anonymize", picture, **fields)
        hold(400 <= answer.status_code < 500, f"bad input got {answer.status_code}")
        hold(answer.headers["content-type"].startswith("application/problem+json"), "an error of another format")
    return {"recovered": round(back, 3), "wrong": round(third, 3)}


def load(base: str, seconds: float, callers: int) -> dict[str, Any]:
    """Ask all the time; how many answers were good, and what and when (seconds from the start) the others were."""
    image = synthetic(model(base)["crop_size"])
    began = time.monotonic()
    good, failures, lock = [0], list[dict[str, Any]](), threading.Lock()

    def caller() -> None:
        while time.monotonic() - began < seconds:
            try:
                answer = post(base, "anonymize", image, password=PASSWORD)
                what = None if answer.status_code == 200 else str(answer.status_code)
            except httpx.HTTPError as error:
                what = type(error).__name__
            with lock:
                if what is None:
                    good[0] += 1
                else:
                    failures.append({"at": round(time.monotonic() - began, 1), "what": what})
            if what is not None:
                time.sleep(0.2)

    threads = [threading.Thread(target=caller) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"good": good[0], "failures": failures[:200], "failed": len(failures)}


def digests(base: str, count: int) -> dict[str, Any]:
    """What the pods behind the Service serve."""
    return {"digests": sorted({model(base)["digest"] for _ in range(count)})}


def connect(host: str, port: int) -> dict[str, Any]:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError as error:
        return {"open": False, "why": type(error).__name__}
    return {"open": True}


def listen(port: int, seconds: float) -> dict[str, Any]:
    with socket.create_server(("", port)) as server:
        server.settimeout(1.0)
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            try:
                server.accept()[0].close()
            except TimeoutError:
                continue
    return {}


def hold(condition: bool, otherwise: str) -> None:
    if not condition:
        raise SystemExit(otherwise)


def main() -> None:
    parser = argparse.ArgumentParser(prog="client")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("wrong-password", "load", "digests"):
        command = commands.add_parser(name)
        command.add_argument("base", help="http://HOST:PORT")
        if name == "load":
            command.add_argument("--seconds", type=float, default=30.0)
            command.add_argument("--callers", type=int, default=4)
        if name == "digests":
            command.add_argument("--count", type=int, default=20)
    command = commands.add_parser("connect")
    command.add_argument("host")
    command.add_argument("port", type=int)
    command = commands.add_parser("listen")
    command.add_argument("port", type=int)
    command.add_argument("--seconds", type=float, default=300.0)
    given = vars(parser.parse_args())
    run = {"wrong-password": wrong_password, "load": load, "digests": digests, "connect": connect, "listen": listen}
    sys.stdout.write(json.dumps(run[given.pop("command")](**given)) + "\n")


if __name__ == "__main__":
    main()
