"""Clips as files: what is kept, what is left out, what is refused, and that nothing half done stays."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mien.errors import ImageTooLarge, NoFaceFound, WrongModel
from mien.model import Model
from mien.pictures import Limits
from mien.video import clips, synthetic
from mien.video.container import Reader
from mien.video.errors import InvalidVideo
from tests.mien.video_parts import Pixels, Remembering, differ, frames, hiding, others

SUBTITLES = ((0.1, 0.3, "first"), (0.4, 0.6, "second"))


@pytest.fixture(scope="module")
def pictures(astronaut: NDArray[np.uint8], remembering: Remembering) -> list[Pixels]:
    (face,) = remembering.detect(astronaut)
    return [s.pixels for s in synthetic.shots(astronaut, face.landmarks, "move", frames=20, size=(192, 256), eyes=26)]


@pytest.fixture
def change(model: Model, remembering: Remembering) -> Callable[..., clips.Report]:
    def run(source: Path, target: Path, **options: object) -> clips.Report:
        code = model.code_for("anonymize", "x")
        return clips.anonymize(model, source, target, code, detector=remembering, **options)  # type: ignore[arg-type]

    return run


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
def test_times_sound_subtitles_and_colour_are_kept_and_other_metadata_is_not(
    suffix: str, pictures: list[Pixels], change: Callable[..., clips.Report], tmp_path: Path
) -> None:
    source, target = tmp_path / f"in.{suffix}", tmp_path / f"out.{suffix}"
    # A variable rate: 25 frames a second that stumble twice.
    steps = [512] * len(pictures)
    steps[5], steps[11] = 1300, 770
    times = [int(t) for t in np.cumsum([0, *steps])]
    synthetic.write(
        source,
        pictures,
        times=times,
        sound=True,
        subtitles=SUBTITLES,
        metadata={"title": "secret", "location": "+48.2+016.4/", "comment": "secret"},
        colour=(1, 1, 1, 1),
    )
    report = change(source, target, codec="h264", crf=12)
    with Reader(source) as a, Reader(target) as b:
        was, now = a.clip, b.clip
        before = [(f.pts * was.time_base, f.duration * was.time_base) for f in a.frames()]
        after = [(f.pts * now.time_base, f.duration * now.time_base) for f in b.frames()]
    assert report.frames == len(before) == len(after) == len(pictures)
    assert [t for t, _ in before] == [t for t, _ in after]
    if suffix != "mkv":  # Matroska need not say how long a frame stays
        assert before == after
        assert now.time_base == was.time_base
    assert others(source) == others(target) and {kind for kind, *_ in others(target)} == {"audio", "subtitle"}
    assert now.colour == was.colour and (now.colour.range, now.colour.matrix) == (1, 1)
    raw = target.read_bytes()
    assert b"secret" not in raw and b"+48.2" not in raw


@pytest.mark.parametrize("rotation", [90, 180])
def test_rotated_clips_stay_rotated_and_their_faces_are_found_upright(
    rotation: int, pictures: list[Pixels], change: Callable[..., clips.Report], tmp_path: Path
) -> None:
    source, target = tmp_path / "in.mp4", tmp_path / "out.mp4"
    stored = [np.rot90(p, -(rotation // 90)) for p in pictures[:6]]
    synthetic.write(source, stored, rotation=rotation, codec="libx264rgb", pixel_format="rgb24", options={"qp": "0"})
    report = change(source, target)
    assert len(report.trajectories) == 1
    with Reader(target) as reader:
        assert reader.clip.rotation == rotation
        assert (reader.clip.width, reader.clip.height) == (256, 192)
        assert all(differ(f.pixels[40:150], p[40:150]) > 0.5 for f, p in zip(reader.frames(), pictures, strict=False))


def test_what_is_outside_the_faces_stays_bit_for_bit_in_lossless_clips(
    pictures: list[Pixels], change: Callable[..., clips.Report], tmp_path: Path
) -> None:
    source, target = tmp_path / "in.mkv", tmp_path / "out.mp4"
    synthetic.write(source, pictures[:6], codec="ffv1", pixel_format="bgr0", options={"level": "3"})
    change(source, target)
    for before, after in zip(pictures, frames(target), strict=False):
        assert np.array_equal(before[:20], after.pixels[:20])
        assert not np.array_equal(before, after.pixels)


@pytest.mark.parametrize("pixel_format", ["yuv420p10le", "yuv422p10le"])
def test_ten_bits_work_and_are_said_to_become_eight(
    pixel_format: str, pictures: list[Pixels], change: Callable[..., clips.Report], tmp_path: Path
) -> None:
    source, target = tmp_path / "in.mkv", tmp_path / "out.mp4"
    synthetic.write(
        source, pictures[:6], codec="libx265", pixel_format=pixel_format, options={"x265-params": "log-level=none"}
    )
    report = change(source, target)
    assert report.frames == 6 and len(report.trajectories) == 1
    assert any("10 bits" in note for note in report.notes)


def test_transparency_is_kept_where_the_codec_can_and_refused_where_it_cannot(
    pictures: list[Pixels], change: Callable[..., clips.Report], tmp_path: Path
) -> None:
    source = tmp_path / "in.mkv"
    alpha = np.tile(np.linspace(0, 255, 256).astype(np.uint8), (192, 1))
    synthetic.write(
        source, [np.dstack([p, alpha]) for p in pictures[:4]], codec="ffv1", pixel_format="bgra", options={"level": "3"}
    )
    with pytest.raises(InvalidVideo, match="transparency"):
        change(source, tmp_path / "out.mp4", codec="h264")
    report = change(source, tmp_path / "out.mkv")
    assert report.codec.name == "ffv1" and len(report.trajectories) == 1
    for frame in frames(tmp_path / "out.mkv"):
        assert frame.alpha is not None and np.array_equal(frame.alpha, alpha)


def test_odd_sizes_work_losslessly_and_are_refused_by_codecs_that_halve(
    pictures: list[Pixels], change: Callable[..., clips.Report], tmp_path: Path
) -> None:
    source = tmp_path / "in.mkv"
    odd = [np.ascontiguousarray(p[:191, :255]) for p in pictures[:4]]
    synthetic.write(source, odd, codec="ffv1", pixel_format="bgr0", options={"level": "3"})
    report = change(source, tmp_path / "out.mp4")
    assert report.codec.name == "lossless" and frames(tmp_path / "out.mp4")[0].pixels.shape == (191, 255, 3)
    with pytest.raises(InvalidVideo, match="even"):
        change(source, tmp_path / "no.mp4", codec="h265")
    change(source, tmp_path / "yes.mp4", codec="h264-444")


def test_truncated_clips_are_refused_wherever_they_end(
    pictures: list[Pixels], change: Callable[..., clips.Report], tmp_path: Path
) -> None:
    for suffix, options in (("mp4", None), ("mkv", None), ("ts", None), ("mp4", {"movflags": "faststart"})):
        source = tmp_path / f"in.{suffix}"
        synthetic.write(source, pictures * 5, sound=True, container_options=options)
        assert len(frames(source)) == 100
        whole = source.read_bytes()
        # MPEG-TS is made for streams that begin and end anywhere: it has no length, and cannot be short of it.
        for share in (0.002, 0.3, 0.85) if suffix != "ts" else (0.002,):
            source.write_bytes(whole[: int(len(whole) * share)])
            with pytest.raises(InvalidVideo):
                frames(source)
    with pytest.raises(InvalidVideo, match="truncated"):
        change(source, tmp_path / "out.mp4", transform=hiding)
    assert not (tmp_path / "out.mp4").exists()


def test_what_is_no_video_is_refused_in_words(change: Callable[..., clips.Report], tmp_path: Path) -> None:
    import wave

    text, empty, sound = tmp_path / "text.mp4", tmp_path / "empty.mp4", tmp_path / "sound.mkv"
    text.write_text("no video at all\n" * 100)
    empty.write_bytes(b"")
    with wave.open(str(sound), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(16000))
    for source, why in ((text, "not a video"), (empty, "not a video"), (sound, "no video")):
        with pytest.raises(InvalidVideo, match=why):
            change(source, tmp_path / "out.mp4")
    with pytest.raises(FileNotFoundError):
        change(tmp_path / "nowhere.mp4", tmp_path / "out.mp4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.mp4", "sound.mkv", "text.mp4"]


def test_a_clip_of_zero_frames_is_refused(change: Callable[..., clips.Report], tmp_path: Path) -> None:
    import av

    source = tmp_path / "in.mp4"
    with av.open(str(source), "w") as out:
        video = out.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        out.start_encoding()
        for packet in video.encode(None):
            out.mux(packet)
    with pytest.raises(InvalidVideo):
        change(source, tmp_path / "out.mp4")
    assert not (tmp_path / "out.mp4").exists()


def test_a_clip_larger_than_the_limits_costs_nothing(
    pictures: list[Pixels], change: Callable[..., clips.Report], tmp_path: Path
) -> None:
    synthetic.write(tmp_path / "in.mp4", pictures[:2])
    with pytest.raises(ImageTooLarge, match="256x192"):
        change(tmp_path / "in.mp4", tmp_path / "out.mp4", limits=Limits(max_side=200))


def test_a_clip_without_a_face_is_an_error_unless_it_is_asked_for(
    change: Callable[..., clips.Report], tmp_path: Path
) -> None:
    synthetic.write(tmp_path / "in.mp4", [np.full((96, 128, 3), 90, np.uint8)] * 3, metadata={"title": "secret"})
    with pytest.raises(NoFaceFound):
        change(tmp_path / "in.mp4", tmp_path / "out.mp4")
    assert not (tmp_path / "out.mp4").exists()
    assert change(tmp_path / "in.mp4", tmp_path / "out.mp4", allow_no_face=True).frames == 3
    assert b"secret" not in (tmp_path / "out.mp4").read_bytes()


def test_what_an_interrupt_or_an_error_leaves_is_nothing(
    pictures: list[Pixels], change: Callable[..., clips.Report], tmp_path: Path
) -> None:
    source, target = tmp_path / "in.mp4", tmp_path / "out.mp4"
    synthetic.write(source, pictures)
    target.write_bytes(b"what was there before")

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "changing faces" and done > 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        change(source, target, progress=stop)
    assert target.read_bytes() == b"what was there before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """256 KiB."""
    with tempfile.TemporaryDirectory() as folder:
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, timeout=30, check=False
        )
        if made.returncode:
            pytest.skip(f"no small disk can be mounted here: {made.stderr.decode().strip()}")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "-l", folder], capture_output=True, timeout=30, check=True)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_full_disk_is_said_and_leaves_no_half_file(
    suffix: str, pictures: list[Pixels], change: Callable[..., clips.Report], tmp_path: Path, small_disk: Path
) -> None:
    synthetic.write(tmp_path / "in.mp4", pictures)
    with pytest.raises(OSError, match="No space left") as caught:
        change(tmp_path / "in.mp4", small_disk / f"out.{suffix}")
    assert caught.value.errno == errno.ENOSPC
    assert list(small_disk.iterdir()) == []
    assert os.statvfs(small_disk).f_bfree == os.statvfs(small_disk).f_blocks, "nothing holds the space"


def test_recovery_without_geometry_finds_the_faces_again_and_says_so(
    pictures: list[Pixels], model: Model, change: Callable[..., clips.Report], remembering: Remembering, tmp_path: Path
) -> None:
    import av

    source, target, bare, back = (tmp_path / name for name in ("in.mp4", "out.mp4", "bare.mp4", "back.mkv"))
    synthetic.write(source, pictures[:8])
    change(source, target)
    with av.open(str(target)) as a, av.open(str(bare), "w") as b:
        stream = b.add_stream_from_template(a.streams.video[0])
        for packet in a.demux(a.streams.video[0]):
            if packet.size:
                packet.stream = stream
                b.mux(packet)
    report = clips.recover(model, bare, back, model.code_for("recover", "x"), detector=remembering, codec="ffv1")
    assert any("found again" in note for note in report.notes)
    originals, now = frames(source), frames(back)
    anonymized = frames(target)
    left = np.mean([differ(a.pixels, o.pixels) for a, o in zip(now, originals, strict=True)])
    changed = np.mean([differ(a.pixels, o.pixels) for a, o in zip(anonymized, originals, strict=True)])
    assert left < changed


def test_a_clip_of_another_model_is_refused(
    pictures: list[Pixels], model: Model, change: Callable[..., clips.Report], tmp_path: Path
) -> None:
    synthetic.write(tmp_path / "in.mp4", pictures[:3])
    change(tmp_path / "in.mp4", tmp_path / "out.mp4")

    class Other:
        digest, crop_size = "0" * 64, model.crop_size

    with pytest.raises(WrongModel):
        clips.recover(Other(), tmp_path / "out.mp4", tmp_path / "back.mp4", np.zeros(16, bool))  # type: ignore[arg-type]


def test_containers_that_cannot_hold_a_stream_say_so_before_any_work(
    pictures: list[Pixels], change: Callable[..., clips.Report], tmp_path: Path
) -> None:
    synthetic.write(tmp_path / "in.mkv", pictures[:2], subtitles=SUBTITLES)
    asked: list[str] = []
    with pytest.raises(InvalidVideo, match=r"\.mkv holds"):
        change(tmp_path / "in.mkv", tmp_path / "out.mp4", progress=lambda stage, done, total: asked.append(stage))
    with pytest.raises(InvalidVideo, match=r"not as '\.webm'"):
        change(tmp_path / "in.mkv", tmp_path / "out.webm")
    assert not asked


def test_ntsc_rates_are_kept(pictures: list[Pixels], change: Callable[..., clips.Report], tmp_path: Path) -> None:
    base = Fraction(1, 30_000)
    times = [1001 * i for i in range(7)]
    synthetic.write(tmp_path / "in.mp4", pictures[:6], rate=30, times=times, time_base=base)
    change(tmp_path / "in.mp4", tmp_path / "out.mp4")
    with Reader(tmp_path / "out.mp4") as reader:
        assert [f.pts * reader.clip.time_base for f in reader.frames()] == [t * base for t in times[:-1]]
        assert abs(reader.clip.rate - Fraction(30_000, 1001)) < Fraction(1, 100)
