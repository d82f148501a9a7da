"""Live frames: what leaves when, what is dropped, and a camera's stream in and an anonymized one out."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mien.errors import ModelError
from mien.model import Model
from mien.video import synthetic
from mien.video.errors import InvalidVideo
from mien.video.live import LiveFrames, LiveResult, Mailbox
from mien.video.stream import LiveReport, run_live
from mien.video.synthetic import Shot
from mien.video.tracking import State
from tests.mien.camera import Camera
from tests.mien.video_parts import Blind, Remembering, differ, frames, hiding

FRAMES = 16
FACE = np.s_[60:180, 80:240]


@pytest.fixture(scope="module")
def shots(astronaut: NDArray[np.uint8], remembering: Remembering) -> list[Shot]:
    (face,) = remembering.detect(astronaut)
    return list(synthetic.shots(astronaut, face.landmarks, "turn", frames=FRAMES))


def run(live: LiveFrames, shots: list[Shot]) -> list[LiveResult]:
    return [result for shot in shots for result in live.push(shot.pixels)] + live.flush()


def unchanged(results: list[LiveResult], shots: list[Shot]) -> list[int]:
    return [r.index for r in results if differ(r.pixels[FACE], shots[r.index].pixels[FACE]) < 5]


@pytest.mark.parametrize("lookahead", [0, 5])
def test_frames_leave_in_order_and_no_later_than_said(
    lookahead: int, shots: list[Shot], remembering: Remembering
) -> None:
    live = LiveFrames(hiding, remembering, np.zeros(16, bool), lookahead=lookahead)
    left: list[int] = []
    for number, shot in enumerate(shots):
        left += [r.index for r in live.push(shot.pixels)]
        assert left == list(range(max(0, number + 1 - lookahead)))
    assert left + [r.index for r in live.flush()] == list(range(FRAMES))


def test_a_face_that_is_seen_late_is_changed_as_far_back_as_frames_wait(
    shots: list[Shot], remembering: Remembering
) -> None:
    """Stated in docs/video.md: without looking ahead the first frames of a face that is missed leave as they came."""

    def live(lookahead: int) -> LiveFrames:
        return LiveFrames(hiding, Blind(remembering, range(6)), np.zeros(16, bool), lookahead=lookahead)

    assert unchanged(run(live(0), shots), shots) == list(range(6))
    assert unchanged(run(live(4), shots), shots) == list(range(2))
    assert unchanged(run(live(6), shots), shots) == []


def test_a_known_face_is_carried_through_frames_in_which_it_is_not_seen(
    shots: list[Shot], remembering: Remembering
) -> None:
    live = LiveFrames(hiding, Blind(remembering, range(5, 12)), np.zeros(16, bool))
    results = run(live, shots)
    assert unchanged(results, shots) == []
    assert {r.faces[0].state for r in results[5:12]} == {State.flow}
    assert {face.track for r in results for face in r.faces} == {0}


def test_live_frames_are_recovered_by_the_geometry_that_came_with_them(
    shots: list[Shot], remembering: Remembering, model: Model
) -> None:
    there = LiveFrames(model.transform_float, remembering, model.code_for("anonymize", "x"), size=model.crop_size)
    changed = run(there, shots[:6])
    back = LiveFrames(
        model.transform_float,
        remembering,
        model.code_for("recover", "x"),
        size=model.crop_size,
        operation="recover",
    )
    for result, shot in zip(changed, shots[:6], strict=True):
        (recovered,) = back.push(result.pixels, faces=result.faces)
        hidden, left = (differ(p[FACE], shot.pixels[FACE]) for p in (result.pixels, recovered.pixels))
        assert left < 2 and hidden > 3 * left


def test_a_face_the_network_cannot_do_is_masked_and_any_other_error_loses_the_frame(
    shots: list[Shot], remembering: Remembering
) -> None:
    def refusing(crops: object, codes: object) -> object:
        raise ModelError("no")

    def failing(crops: object, codes: object) -> object:
        raise RuntimeError("the engine has gone")

    results = run(LiveFrames(refusing, remembering, np.zeros(16, bool)), shots[:2])  # type: ignore[arg-type]
    assert all(r.faces[0].masked for r in results) and unchanged(results, shots) == []
    live = LiveFrames(failing, remembering, np.zeros(16, bool))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError):
        live.push(shots[0].pixels)
    assert live.flush() == [], "a frame that an error stopped is not given out later"


def test_frames_of_one_stream_are_of_one_kind(shots: list[Shot], remembering: Remembering) -> None:
    live = LiveFrames(hiding, remembering, np.zeros(16, bool))
    live.push(shots[0].pixels)
    for wrong in (shots[1].pixels[:100], shots[1].pixels.astype(np.float32), shots[1].pixels[..., 0]):
        with pytest.raises(ValueError, match=r"expected|one size"):
            live.push(wrong)


@given(st.lists(st.integers(), max_size=30), st.integers(1, 5))
def test_a_mailbox_drops_the_oldest_and_counts_them(items: list[int], capacity: int) -> None:
    box: Mailbox[int] = Mailbox(capacity)
    for item in items:
        box.put(item)
    box.close()
    got = []
    while (item := box.get(1)) is not None:
        got.append(item)
    assert got == items[-capacity:] and box.dropped == len(items) - len(got)


def test_an_empty_mailbox_is_waited_for_no_longer_than_asked() -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        Mailbox[int]().get(0.1)
    assert time.monotonic() - start < 5


# Streams. ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recording(shots: list[Shot], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the camera sends: two seconds there and back, MPEG-TS as cameras code it."""
    path = tmp_path_factory.mktemp("camera") / "recording.ts"
    there_and_back = [s.pixels for s in shots] + [s.pixels for s in shots[::-1]]
    synthetic.write(path, there_and_back, options={"preset": "veryfast", "tune": "zerolatency", "g": "10"})
    return path


def free_port(kind: socket.SocketKind) -> int:
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(kind: socket.SocketKind, port: int) -> bool:
    """By the kernel's table of sockets: asking for a connection would be taken for the stream."""
    table = Path("/proc/net/tcp" if kind is socket.SOCK_STREAM else "/proc/net/udp")
    return f"0100007F:{port:04X}" in table.read_text() or f"00000000:{port:04X}" in table.read_text()


def check(report: LiveReport, pictures: list[NDArray[np.uint8]], recording: Path, judge: Callable[..., int]) -> None:
    assert report.frames + report.dropped >= 2 * FRAMES - 2
    assert report.transformed > 0.8 * report.frames
    assert len(pictures) >= 10 and judge(pictures) == 0
    sent = [frame.pixels for frame in frames(recording)]
    assert judge(sent) == len(sent), "the judge knows the face"


def test_a_cameras_stream_comes_in_by_rtsp_and_leaves_anonymized(
    recording: Path, model: Model, judge_of_faces: Callable[..., int], tmp_path: Path
) -> None:
    told: list[LiveReport] = []
    target = tmp_path / "out.ts"
    # Slower than its clip, so that a busy machine keeps up.
    with Camera(recording, seconds=4.0) as camera:
        report = run_live(
            model,
            camera.url,
            str(target),
            model.code_for("anonymize", "x"),
            timeout=30,
            capacity=64,
            progress=told.append,
        )
    assert camera.asked[-1] == "PLAY" and told[-1] == report
    got = frames(target)
    times = [frame.pts for frame in got]
    assert len(got) == report.frames and times == sorted(set(times))
    check(report, [frame.pixels for frame in got], recording, judge_of_faces)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("url", "kind", "options"),
    [
        ("rtsp://127.0.0.1:{port}/safe", socket.SOCK_STREAM, ["rtsp_flags=listen", "listen_timeout=60"]),
        ("udp://127.0.0.1:{port}?pkt_size=1316", socket.SOCK_DGRAM, []),
    ],
    ids=["rtsp", "udp"],
)
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="no /proc/net to see who listens")
def test_the_command_sends_the_anonymized_stream_on(
    url: str,
    kind: socket.SocketKind,
    options: list[str],
    recording: Path,
    model_folder: Path,
    judge_of_faces: Callable[..., int],
    background: Callable[..., subprocess.Popen[bytes]],
    tmp_path: Path,
) -> None:
    """Camera, command and viewer are three processes, as they are behind a camera."""
    port = free_port(kind)
    url = url.format(port=port)
    viewer = background(
        [sys.executable, "-m", "tests.mien.viewer", url, tmp_path / "got.npz", *options], log=tmp_path / "viewer.log"
    )
    for _ in range(300):
        if listens(kind, port):
            break
        time.sleep(0.1)
    with Camera(recording, seconds=8.0) as camera:
        live = background(
            [sys.executable, "-m", "mien", "live", camera.url, "-o", url, "--timeout", "30"],
            log=tmp_path / "live.log",
            env={**os.environ, "MIEN_PASSWORD": "x", "MIEN_MODEL": str(model_folder), "OMP_NUM_THREADS": "1"},
        )
        assert live.wait(120) == 0, (tmp_path / "live.log").read_text()
    assert viewer.wait(120) == 0, (tmp_path / "viewer.log").read_text()
    said = (tmp_path / "live.log").read_text()
    assert "s3cret" not in said and " 0 masked." in said
    pictures = list(np.load(tmp_path / "got.npz")["pictures"])
    assert pictures and judge_of_faces(pictures) == 0


@pytest.fixture
def judge_of_faces(shots: list[Shot]) -> Callable[..., int]:
    """In how many pictures the face is as in the shot that they are nearest to (by the background and the rest)."""

    def count(pictures: Iterable[NDArray[np.uint8]]) -> int:
        def middle(pixels: NDArray[np.uint8], shot: Shot) -> NDArray[np.uint8]:
            x, y = np.rint(shot.landmarks.mean(axis=0)).astype(int)
            return pixels[y - 16 : y + 16, x - 16 : x + 16]

        return sum(min(differ(middle(p, s), middle(s.pixels, s)) for s in shots) < 5 for p in pictures)

    return count


def test_a_stream_that_is_lost_is_said_without_the_cameras_password(
    model: Model, recording: Path, tmp_path: Path
) -> None:
    code = model.code_for("anonymize", "x")
    port = free_port(socket.SOCK_STREAM)
    with pytest.raises(InvalidVideo) as caught:
        run_live(model, f"rtsp://user:s3cret@127.0.0.1:{port}/", str(tmp_path / "out.ts"), code, timeout=2)
    assert "s3cret" not in str(caught.value)
    with Camera(recording, seconds=2.0) as camera, pytest.raises(InvalidVideo, match="go to") as caught:
        run_live(model, camera.url, "ftp://user:s3cret@127.0.0.1/out", code, timeout=5)
    assert "s3cret" not in str(caught.value)


def test_a_stream_ends_when_it_is_told_to(model: Model, recording: Path, tmp_path: Path) -> None:
    stop = threading.Event()

    def enough(report: LiveReport) -> None:
        if report.frames >= 3:
            stop.set()

    report = run_live(
        model,
        str(recording),
        str(tmp_path / "out.mkv"),
        model.code_for("anonymize", "x"),
        stop=stop,
        progress=enough,
    )
    assert report.frames == 3 == len(frames(tmp_path / "out.mkv"))
