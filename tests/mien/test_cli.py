"""The command, run in this process (``main()``) but for what only a real process shows."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mien import cli
from mien.passwords import derive_code, format_code
from tests.mien.command import Command

SECRET = "hunter-two-and-a-half"


@pytest.fixture
def folder(tmp_path: Path, photo: Image.Image, monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> Path:
    """A working folder with two sound pictures, one without a face, one that is none; the current directory."""
    work = tmp_path / "work"
    (work / "in" / "sub").mkdir(parents=True)
    small = photo.crop((96, 0, 352, 256))
    small.save(work / "face.png")
    small.save(work / "in" / "one.jpg", quality=95)
    small.resize((200, 200)).save(work / "in" / "sub" / "two.png")
    Image.new("RGB", (64, 64), (9, 99, 9)).save(work / "in" / "meadow.png")
    (work / "in" / "text.png").write_text("hello")
    (work / "in" / "notes.txt").write_text("not looked at")
    monkeypatch.chdir(work)
    monkeypatch.setenv("MIEN_MODEL", str(model_folder))
    monkeypatch.setenv("MIEN_PASSWORD", SECRET)
    return work


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(float)


def test_a_picture_goes_there_and_back(folder: Path, mien: Command) -> None:
    there = mien("anonymize", "face.png")
    assert there.code == 0 and there.out.strip() == "1 face anonymized: face.anon.png"
    back = mien("recover", "face.anon.png")
    assert back.code == 0 and back.out.splitlines()[-1] == "1 face recovered: face.recovered.png"
    original, hidden, recovered = (pixels(folder / f"face{n}.png") for n in ("", ".anon", ".recovered"))
    assert np.abs(recovered - original).mean() < np.abs(hidden - original).mean() / 2


def test_a_folder_is_mirrored_and_what_failed_is_listed(folder: Path, mien: Command) -> None:
    ran = mien("anonymize", "in", "-o", "out")
    assert ran.code == cli.SOME_FAILED
    assert sorted(str(p.relative_to("out")) for p in Path("out").rglob("*.*")) == ["one.anon.png", "sub/two.anon.png"]
    assert ran.err.count("mien: ") == 2
    assert "in/meadow.png: No face was found" in ran.err and "in/text.png: This is not a picture" in ran.err
    assert ran.out.splitlines()[-1] == "Written to out"
    # Again: nothing is overwritten, and that is said for each.
    before = (folder / "out/one.anon.png").stat().st_mtime_ns
    again = mien("anonymize", "in", "-o", "out")
    assert again.code == cli.SOME_FAILED and again.err.count("exists") == 2
    assert (folder / "out/one.anon.png").stat().st_mtime_ns == before


def test_pictures_without_faces_are_copied_or_skipped_on_request(folder: Path, mien: Command) -> None:
    (folder / "in/text.png").unlink()
    copied = mien("anonymize", "in", "-o", "out", "--on-no-face", "copy")
    assert copied.code == 0 and (folder / "out/meadow.anon.png").exists()
    skipped = mien("anonymize", "in", "-o", "other", "--on-no-face", "skip")
    assert skipped.code == 0 and not (folder / "other/meadow.anon.png").exists()


def test_names_that_would_collide_keep_their_suffix(folder: Path, mien: Command) -> None:
    shutil.copy(folder / "face.png", folder / "in/one.png")
    ran = mien("anonymize", "in", "-o", "out", "--dry-run")
    assert "in/one.jpg -> out/one.jpg.anon.png" in ran.out and "in/one.png -> out/one.png.anon.png" in ran.out


def test_a_dry_run_writes_nothing(folder: Path, mien: Command) -> None:
    before = sorted(folder.rglob("*"))
    ran = mien("anonymize", "in", "--dry-run")
    assert ran.code == 0 and "in/one.jpg -> in.anon/one.anon.png" in ran.out
    assert ran.out.splitlines()[-1] == "Nothing was written. 4 pictures would be anonymized."
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["anonymize", "nowhere.png"], cli.FILE_TROUBLE, "no file or folder nowhere.png"),
        (["anonymize", "in/text.png"], cli.BAD_PICTURE, "not a picture"),
        (["anonymize", "in/meadow.png"], cli.NO_FACE, "No face was found"),
        (["anonymize", "face.png", "--faces", "7"], cli.NO_FACE, "numbered from 0"),
        (["anonymize", "face.png", "--faces", "x"], cli.USAGE, "--faces takes numbers"),
        (["anonymize", "face.png", "--model", "nowhere"], cli.BAD_MODEL, "no model in nowhere"),
        (["anonymize", "face.png", "-o", "in/one.jpg"], cli.FILE_TROUBLE, "exists"),
        (["anonymize", "face.png", "--format", "gif"], cli.USAGE, "gif"),
        (["anonymize", "face.png", "--password-file", "nowhere"], cli.FILE_TROUBLE, "nowhere: No such file"),
        (["anonymize", "face.png", "--password", "x"], cli.USAGE, "No such option"),
        (["anonymize", "in", "-o", "in"], cli.USAGE, "another folder"),
        (["frobnicate"], cli.USAGE, "No such command"),
        (["detect", "in/meadow.png"], cli.NO_FACE, "No face was found"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_every_mistake_has_one_clear_line_and_an_exit_code(
    folder: Path, mien: Command, arguments: list[str], code: int, says: str
) -> None:
    before = sorted(folder.rglob("*"))
    ran = mien(*arguments)
    assert ran.code == code
    assert says in ran.err
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("password", ["", "x" * 10_000])
def test_unusable_passwords_have_their_own_exit_code(folder: Path, mien: Command, password: str) -> None:
    (folder / "pw").write_text(password + "\nsecond line\n")
    ran = mien("anonymize", "face.png", "--password-file", "pw")
    assert ran.code == cli.BAD_PASSWORD and "password" in ran.err and "xxx" not in ran.err


def test_a_wrong_password_is_no_error_and_gives_other_faces(folder: Path, mien: Command) -> None:
    (folder / "wrong").write_text("something else")
    mien("anonymize", "face.png")
    ran = mien("recover", "face.anon.png", "--password-file", "wrong")
    right = mien("recover", "face.anon.png", "-o", "right.png")
    assert ran.code == right.code == 0
    assert ran.out.replace("face.recovered.png", "") == right.out.replace("right.png", "") and ran.err == right.err
    assert (
        np.abs(pixels(folder / "face.recovered.png") - pixels(folder / "face.png")).mean()
        > 2 * np.abs(pixels(folder / "right.png") - pixels(folder / "face.png")).mean()
    )


def test_a_swapped_model_is_refused(folder: Path, mien: Command, model_folder: Path) -> None:
    shutil.copytree(model_folder, folder / "model")
    config = json.loads((folder / "model/config.json").read_text())
    (folder / "model/config.json").write_text(json.dumps({**config, "digest": "1" * 64}))
    ran = mien("anonymize", "face.png", "--model", "model")
    assert ran.code == cli.BAD_MODEL and "sha256" in ran.err


def test_faces_are_listed_for_people_and_programs(folder: Path, mien: Command) -> None:
    plain = mien("detect", "face.png")
    assert plain.code == 0 and plain.out.startswith("face.png: 1 face\n  0: x ")
    listed = json.loads(mien("detect", "face.png", "--json").out)
    assert listed["file"] == "face.png" and len(listed["faces"][0]["landmarks"]) == 5


@pytest.fixture
def not_root() -> Iterator[None]:
    """No permission stops root; files are then looked at as somebody else."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_that_cannot_be_read_is_listed_and_the_others_are_done(
    folder: Path, mien: Command, request: pytest.FixtureRequest
) -> None:
    closed = folder / "in/closed"
    closed.mkdir(mode=0o000)
    mien("anonymize", "in", "--dry-run")  # all that is imported late is imported now, while it can be read
    request.getfixturevalue("not_root")
    ran = mien("anonymize", "in", "--dry-run")
    assert "in/closed: Permission denied" in ran.err
    assert "4 pictures would be anonymized" in ran.out


def test_a_full_disk_leaves_the_old_file_whole(folder: Path, mien: Command) -> None:
    """The kernel refuses this process to write more than 20 kB to any file."""
    (folder / "face.anon.png").write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        ran = mien("anonymize", "face.png", "--overwrite")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ran.code == cli.FILE_TROUBLE
    assert ran.err == "mien: face.anon.png could not be written: File too large\n"
    assert (folder / "face.anon.png").read_bytes() == b"old"
    assert not list(folder.glob(".*"))


def test_the_password_is_asked_for_twice_and_shown_nowhere(folder: Path, model_folder: Path) -> None:
    # The last blank of the prompt comes when the terminal no longer echoes.
    # A model that will be refused, so that all happens but the work.
    shutil.copytree(model_folder, folder / "model")
    (folder / "model/model.safetensors").write_bytes(b"")
    environment = {k: v for k, v in os.environ.items() if k != "MIEN_PASSWORD"}
    terminal, their_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "mien", "anonymize", "face.png", "--model", "model"],
        stdin=their_end,
        stdout=their_end,
        stderr=their_end,
        env=environment,
        start_new_session=True,
    )
    os.close(their_end)
    shown, answered = b"", 0
    try:
        # Reading fails once the process has closed the other end.
        with contextlib.suppress(OSError):
            while got := os.read(terminal, 4096):
                shown += got
                if answered < 2 and shown.count(b"assword") > answered and shown.endswith(b": "):
                    answered += 1
                    # Everybody on the machine can read this.
                    assert SECRET not in Path(f"/proc/{process.pid}/cmdline").read_text()
                    os.write(terminal, SECRET.encode() + b"\n")
        assert process.wait(timeout=60) == cli.BAD_MODEL, shown.decode()
    finally:
        process.kill()
        os.close(terminal)
    assert answered == 2 and SECRET.encode() not in shown
    assert b"sha256" in shown


def test_nothing_written_holds_the_password(folder: Path, mien: Command) -> None:
    (folder / "in/text.png").unlink()
    mien("anonymize", "in", "-o", "out", "--keep-metadata", "--on-no-face", "copy")
    mien("recover", "out", "-o", "back", "--on-no-face", "copy")
    written = [path for name in ("out", "back") for path in (folder / name).rglob("*") if path.is_file()]
    assert len(written) == 6
    code = format_code(derive_code(SECRET)).encode()
    assert not [path for path in written if SECRET.encode() in path.read_bytes() or code in path.read_bytes()]


def test_without_a_terminal_nobody_is_asked(folder: Path, mien: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MIEN_PASSWORD")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    ran = mien("anonymize", "face.png")
    assert ran.code == cli.BAD_PASSWORD and "--password-file" in ran.err


def test_a_password_can_come_from_standard_input(folder: Path, mien: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    mien("anonymize", "face.png")
    monkeypatch.setattr(sys, "stdin", io.StringIO(SECRET + "\n"))
    assert mien("anonymize", "face.png", "-o", "again.png", "--password-file", "-").code == 0
    assert (folder / "again.png").read_bytes() == (folder / "face.anon.png").read_bytes()


def test_an_unforeseen_error_shows_no_local_variables(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: object, password: str, *rest: object) -> None:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr("mien.model.Model.code_for", broken)
    monkeypatch.setattr(sys, "argv", ["mien", "anonymize", "face.png"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # typer installs its own
    with pytest.raises(RuntimeError) as caught:
        cli.main()
    capsys.readouterr()
    sys.excepthook(caught.type, caught.value, caught.tb)
    shown = capsys.readouterr()
    assert "unforeseen" in shown.err and SECRET not in shown.out + shown.err


def test_help_answers_without_loading_torch() -> None:
    code = (
        "import sys, time\n"
        "sys.argv = ['mien', '--help']\n"
        "from mien.cli import main\n"
        "try: main()\n"
        "finally: print('TOOK', time.process_time(), 'torch' in sys.modules, 'PIL' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    took, *loaded = done.stdout.rpartition("TOOK ")[2].split()
    assert done.returncode == 0 and float(took) < 1.5 and loaded == ["False", "False"]
    assert "anonymize" in done.stdout and "Exit codes" in done.stdout


def test_serve_runs_the_service_with_the_model_in_its_environment(
    folder: Path, mien: Command, model_folder: Path
) -> None:
    ran = mien("serve", "--dry-run", "--port", "3456", "--realm", "here")
    assert ran.code == 0 and f"MIEN_MODEL={model_folder} MIEN_REALM=here" in ran.out
    assert "bentoml serve serving.service:MienService --port 3456" in ran.out and SECRET not in ran.out
    missing = mien("serve", "--model", "nowhere")
    assert missing.code == cli.BAD_MODEL


def test_the_version_is_the_packages(mien: Command) -> None:
    from mien import __version__

    assert mien("version").out == f"mien {__version__}\n"
