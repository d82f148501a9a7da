"""The ``mien`` command: pictures, folders of them and clips, with a model in this process or a service elsewhere.

Passwords and API keys come from a hidden prompt, a file or the environment, never from an argument, where other users
of the machine could read them. Heavy modules are imported inside the commands, so that ``mien --help`` answers at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal, NoReturn

import typer

from mien import __version__, errors
from mien.video import command as video

if TYPE_CHECKING:
    from mien.clients import Client
    from mien.detection import Face
    from mien.model import Model
    from mien.passwords import Code
    from mien.pictures import Format
    from mien.video.clips import Report

OK: Final = 0
SOME_FAILED: Final = 1
USAGE: Final = 2
BAD_PICTURE: Final = 3
NO_FACE: Final = 4
BAD_PASSWORD: Final = 5
BAD_MODEL: Final = 6
FILE_TROUBLE: Final = 7
SERVICE_TROUBLE: Final = 8
INTERRUPTED: Final = 130

_EXIT_CODES = (
    "Exit codes: 0 done, 1 some files of a folder failed, 2 wrong usage, 3 not a usable picture, 4 no face (or not the "
    "one asked for), 5 password, 6 model, 7 a file or folder could not be read or written, 8 the service."
)

app = typer.Typer(
    help="Change the faces in pictures under a password, and give them back only to who knows it.",
    epilog=_EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    # A traceback that shows local variables would show the password.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class FormatOption(StrEnum):
    """Output formats."""

    png = "png"
    jpeg = "jpeg"
    webp = "webp"


class OnNoFace(StrEnum):
    """What to do with a picture without faces."""

    error = "error"
    copy = "copy"
    skip = "skip"


Source = Annotated[Path, typer.Argument(metavar="IN", help="A picture, or a folder (searched recursively).")]
Output = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="OUT", help="File, or folder for a folder. Default: beside IN.")
]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model", envvar="MIEN_MODEL", metavar="MODEL", help="Model folder, or models:/NAME@ALIAS of the registry."
    ),
]
UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url",
        envvar="MIEN_URL",
        metavar="URL",
        help="Ask the service at http(s):// or grpc(s):// instead of loading a model.",
    ),
]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file", metavar="FILE", help="First line is the service's API key; else the variable MIEN_API_KEY."
    ),
]
Realm = Annotated[str, typer.Option("--realm", envvar="MIEN_REALM", help="Public name of the deployment.")]
Formats = Annotated[
    FormatOption, typer.Option("--format", help="PNG keeps every pixel for recovery; the others lose some.")
]
Quality = Annotated[int, typer.Option("--quality", min=1, max=100, help="For JPEG and WebP (WebP 100: lossless).")]
Faces = Annotated[
    str | None, typer.Option("--faces", metavar="0,2,...", help="Only these faces, numbered as `mien detect` does.")
]
KeepMetadata = Annotated[bool, typer.Option("--keep-metadata", help="Keep EXIF (place and time too) and comments.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]
NoFace = Annotated[OnNoFace, typer.Option("--on-no-face", help="For pictures in which no face is found.")]
PasswordFile = Annotated[
    Path | None,
    typer.Option("--password-file", metavar="FILE", help="First line is the password. `-`: standard input."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")]

_DEFAULT_MODEL: Final = "models/mien-128"
Operation = Literal["anonymize", "recover"]


@dataclass(frozen=True)
class Engine:
    """Who does the work: a model to load, or a service to ask."""

    model: str
    realm: str
    url: str | None
    api_key_file: Path | None


@dataclass(frozen=True)
class Local:
    """A model in this process, and the code derived once: it is meant to be slow."""

    model: Model
    code: Code = field(repr=False)

    def edit(self, data: bytes, job: Job) -> tuple[bytes, int]:
        """The changed picture, encoded, and how many faces changed."""
        run = self.model.anonymize_bytes if job.operation == "anonymize" else self.model.recover_bytes
        result = run(
            data,
            code=self.code,
            faces=job.faces,
            format=job.format,
            quality=job.quality,
            keep_metadata=job.keep_metadata,
        )
        return result.data, len(result.faces)


@dataclass(frozen=True)
class Remote:
    """A service, and the password that goes with every request."""

    client: Client
    password: str = field(repr=False)

    def edit(self, data: bytes, job: Job) -> tuple[bytes, int]:
        """See :meth:`Local.edit`."""
        run = self.client.anonymize_bytes if job.operation == "anonymize" else self.client.recover_bytes
        answer = run(
            data,
            self.password,
            faces=job.faces,
            format=job.format,
            quality=job.quality,
            keep_metadata=job.keep_metadata,
        )
        return answer.data, answer.face_count


class Stop(Exception):
    """Ends the command with one line on stderr."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class Job:
    """What one command does to every picture."""

    operation: Operation
    format: Format
    quality: int
    faces: list[int] | None
    keep_metadata: bool
    overwrite: bool
    on_no_face: OnNoFace
    dry_run: bool
    video: video.Options = field(default_factory=video.Options)


@dataclass
class Tally:
    """How the files of a folder went."""

    done: int = 0
    faces: int = 0
    copied: int = 0
    skipped: int = 0
    ignored: int = 0
    failed: list[tuple[Path, str]] = field(default_factory=list)


@app.command()
def anonymize(
    context: typer.Context,
    source: Source,
    output: Output = None,
    model: ModelOption = _DEFAULT_MODEL,
    url: UrlOption = None,
    api_key_file: KeyFile = None,
    realm: Realm = "mien",
    format: Formats = FormatOption.png,  # noqa: A002
    quality: Quality = 95,
    faces: Faces = None,
    keep_metadata: KeepMetadata = False,
    overwrite: Overwrite = False,
    on_no_face: NoFace = OnNoFace.error,
    password_file: PasswordFile = None,
    dry_run: DryRun = False,
    exclude: video.Except = None,
    codec: video.VideoCodec = None,
    crf: video.Crf = None,
    detect_every: video.Every = 1,
    track_passwords: video.TrackPasswords = None,
) -> None:
    """Change every face in a picture or in a folder of pictures.

    The password is asked for (twice), or comes from --password-file or the variable MIEN_PASSWORD.
    """
    job = _job("anonymize", format, quality, faces, keep_metadata, overwrite, on_no_face, dry_run)
    job.video = video.Options(exclude, codec, crf, detect_every, track_passwords)
    _check_engine(context, url)
    _run(job, source, output, Engine(model, realm, url, api_key_file), password_file)


@app.command()
def recover(
    context: typer.Context,
    source: Source,
    output: Output = None,
    model: ModelOption = _DEFAULT_MODEL,
    url: UrlOption = None,
    api_key_file: KeyFile = None,
    realm: Realm = "mien",
    format: Formats = FormatOption.png,  # noqa: A002
    quality: Quality = 95,
    faces: Faces = None,
    keep_metadata: KeepMetadata = False,
    overwrite: Overwrite = False,
    on_no_face: NoFace = OnNoFace.error,
    password_file: PasswordFile = None,
    dry_run: DryRun = False,
    exclude: video.Except = None,
    codec: video.VideoCodec = None,
    crf: video.Crf = None,
    detect_every: video.Every = 1,
    track_passwords: video.TrackPasswords = None,
) -> None:
    """Give the faces back. A wrong password is no error: it gives other faces.

    The password is asked for, or comes from --password-file or the variable MIEN_PASSWORD.
    """
    job = _job("recover", format, quality, faces, keep_metadata, overwrite, on_no_face, dry_run)
    job.video = video.Options(exclude, codec, crf, detect_every, track_passwords)
    _check_engine(context, url)
    _run(job, source, output, Engine(model, realm, url, api_key_file), password_file)


@app.command()
def detect(
    source: Source,
    url: UrlOption = None,
    api_key_file: KeyFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per picture and line.")] = False,
    sheet: video.Sheet = None,
    no_sheet: video.NoSheet = False,
    detect_every: video.Every = 1,
) -> None:
    """List the faces in a picture or in a folder of pictures, largest first; of a clip, its tracks with pictures."""
    files, troubles = _pictures_in(source, leave_out=None)
    find = _finder(url, api_key_file)
    tally = Tally(failed=troubles)
    for path in files:
        try:
            if video.is_video(path):
                tally.faces += video.list_tracks(
                    path, as_json=as_json, sheet=sheet, no_sheet=no_sheet or source.is_dir(), every=detect_every
                )
                tally.done += 1
                continue
            found = find(path.read_bytes())
        except (errors.MienError, OSError) as error:
            if source.is_file():
                raise
            tally.failed.append((path, _reason(error)))
            continue
        tally.done += 1
        tally.faces += len(found)
        if as_json:
            listed = [
                {
                    "box": [round(float(v), 2) for v in face.box],
                    "confidence": round(face.confidence, 4),
                    "landmarks": [[round(float(v), 2) for v in point] for point in face.landmarks],
                }
                for face in found
            ]
            typer.echo(json.dumps({"file": str(path), "faces": listed}))
            continue
        typer.echo(f"{path}: {_count(len(found), 'face')}")
        for index, face in enumerate(found):
            x0, y0, x1, y1 = (round(float(v)) for v in face.box)
            typer.echo(f"  {index}: x {x0} to {x1}, y {y0} to {y1}, confidence {face.confidence:.3f}")
    _report_failures(tally)
    if source.is_file() and not tally.faces:
        raise Stop(f"No face was found in {source}.", NO_FACE)


@app.command()
def live(
    source: Annotated[str, typer.Argument(metavar="IN", help="rtsp://, udp://, tcp://, http://, srt://, or a file.")],
    target: Annotated[str, typer.Option("-o", "--output", metavar="OUT", help="The same, or a .ts or .mkv file.")],
    model: ModelOption = _DEFAULT_MODEL,
    realm: Realm = "mien",
    password_file: PasswordFile = None,
    lookahead: Annotated[
        int,
        typer.Option("--lookahead", min=0, max=250, help="Frames to wait, so that faces found late are changed too."),
    ] = 0,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds without a frame that end it.")] = 10.0,
    detect_every: video.Every = 1,
) -> None:
    """Anonymize a camera's stream while it runs. What leaves is lossy and for watching: recover from recordings."""
    _check_model(model)
    password = _password(password_file, confirm=True)
    from mien.model import load

    loaded = load(model, realm=realm)
    code = loaded.code_for("anonymize", password)
    del password
    report = video.run_live(loaded, source, target, code, lookahead=lookahead, timeout=timeout, every=detect_every)
    typer.echo(
        f"{_count(report.frames, 'frame')} anonymized, {report.dropped:,} dropped, "
        f"{_count(report.transformed, 'face')} changed, {report.masked:,} masked."
    )


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"mien {__version__}")


@app.command()
def serve(
    model: ModelOption = _DEFAULT_MODEL,
    realm: Realm = "mien",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")] = 3000,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command instead of running it.")] = False,
) -> None:
    """Offer the model over HTTP, with a web page (needs the `serve` extra)."""
    from importlib.util import find_spec

    # By name, because the library must not depend on the service; see the import contracts in pyproject.toml.
    command = [sys.executable, "-m", "bentoml", "serve", _SERVICE, "--port", str(port), "--host", host]
    if dry_run:
        typer.echo(f"MIEN_MODEL={model} MIEN_REALM={realm} {' '.join(command)}")
        return
    if find_spec("bentoml") is None or find_spec("serving") is None:
        raise Stop('Serving is not installed. Run: pip install "mien[serve]"', USAGE)
    _check_model(model)
    environment = {
        **os.environ,
        "MIEN_MODEL": model if _is_uri(model) else str(Path(model).resolve()),
        "MIEN_REALM": realm,
        "BENTOML_DO_NOT_TRACK": "true",
    }
    # A service takes passwords and keys from its callers and has no use for a caller's.
    for name in ("MIEN_PASSWORD", "MIEN_API_KEY", "MIEN_URL"):
        environment.pop(name, None)
    sys.stdout.flush()
    # Replaces this process, so that signals reach the service itself.
    os.execve(sys.executable, command, environment)  # noqa: S606


_SERVICE: Final = "serving.service:MienService"


def main() -> None:
    """Entry point: every expected error is one line on stderr and an exit code of its own."""
    try:
        code = app(standalone_mode=False)
    except Stop as stop:
        _fail(str(stop), stop.code)
    except errors.MienError as error:
        _fail(str(error), _code_of(error))
    except OSError as error:
        _fail(_reason(error), FILE_TROUBLE)
    except KeyboardInterrupt:
        _fail("Interrupted; files written so far are whole.", INTERRUPTED)
    except Exception as error:
        _fail_as_click_does(error)
    # Without standalone mode `typer.Exit(code)` arrives here as a return value, and so does typer's own of a Ctrl-C.
    if code == INTERRUPTED:
        _fail("Interrupted; files written so far are whole.", INTERRUPTED)
    sys.exit(code if isinstance(code, int) else OK)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"mien: {message}", err=True)
    sys.exit(code)


def _fail_as_click_does(error: Exception) -> NoReturn:
    show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
    if show is not None and isinstance(code, int):  # a usage error of the command line parser
        show()
        sys.exit(code)
    if type(error).__name__ == "Abort":  # Ctrl-C or end of input at the prompt
        _fail("Interrupted.", INTERRUPTED)
    raise error


def _code_of(error: errors.MienError) -> int:
    table: list[tuple[type[errors.MienError], int]] = [
        (errors.NoFaceFound, NO_FACE),
        (errors.NoSuchFace, NO_FACE),
        (errors.InvalidPassword, BAD_PASSWORD),
        (errors.ModelError, BAD_MODEL),
        (errors.WrongModel, BAD_MODEL),
        (errors.ServiceError, SERVICE_TROUBLE),
    ]
    return next((code for kind, code in table if isinstance(error, kind)), BAD_PICTURE)


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _job(
    operation: Operation,
    format_: FormatOption,
    quality: int,
    faces: str | None,
    keep_metadata: bool,
    overwrite: bool,
    on_no_face: OnNoFace,
    dry_run: bool,
) -> Job:
    name: Format = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}[format_.value]  # type: ignore[assignment]
    return Job(operation, name, quality, _indices(faces), keep_metadata, overwrite, on_no_face, dry_run)


def _indices(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise Stop(f"--faces takes numbers separated by commas, like 0,2, not {text!r}.", USAGE) from None


def _is_uri(model: str) -> bool:
    # Two letters at least: C:\\models is a folder.
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", model) is not None


def _check_model(model: str) -> None:
    """Before anything is asked or loaded. What a URI names is known when it was fetched."""
    if not _is_uri(model) and not (Path(model) / "config.json").is_file():
        raise Stop(f"There is no model in {model}. Name its folder with --model.", BAD_MODEL)


def _check_engine(context: typer.Context, url: str | None) -> None:
    """Refuse what a service would not heed: it has its own model and realm."""
    for name in ("model", "realm"):
        source = context.get_parameter_source(name)
        if url is not None and source is not None and source.name == "COMMANDLINE":
            raise Stop(f"--{name} is for a model loaded here; the service at --url has its own.", USAGE)


def _client(url: str, api_key_file: Path | None) -> Client:
    from mien.clients import Client

    key = os.environ.get("MIEN_API_KEY")
    if api_key_file is not None:
        key = _first_line(api_key_file).strip()
    try:
        return Client(url, api_key=key or None)
    except (ValueError, ImportError) as error:
        raise Stop(f"--url: {error}", USAGE) from None


def _finder(url: str | None, api_key_file: Path | None) -> Callable[[bytes], list[Face]]:
    if url is not None:
        return _client(url, api_key_file).detect
    from mien import pictures
    from mien.detection import MTCNNDetector

    detector = MTCNNDetector()
    return lambda data: detector.detect(pictures.decode(data).pixels)


def _run(job: Job, source: Path, output: Path | None, engine: Engine, password_file: Path | None) -> None:
    if not source.exists():
        raise Stop(f"There is no file or folder {source}.", FILE_TROUBLE)
    folder = source.is_dir()
    target = output or (
        _beside(source, job) if not folder else source.with_name(f"{source.name}.{_ENDING[job.operation]}")
    )
    if folder:
        if target.resolve() == source.resolve():
            raise Stop("OUT must be another folder than IN.", USAGE)
        files, troubles = _pictures_in(source, leave_out=target)
        pairs = list(zip(files, _targets(files, source, target, job), strict=True))
    else:
        if target.is_dir():
            target = target / _beside(source, job).name
        pairs, troubles = [(source, target)], []
    if job.dry_run:
        for path, to in pairs:
            typer.echo(f"{path} -> {to}{' (exists)' if to.exists() else ''}")
        for path, reason in troubles:
            typer.echo(f"{path}: {reason}", err=True)
        typer.echo(f"Nothing was written. {_count(len(pairs), 'picture')} would be {_DONE[job.operation]}.")
        return
    if not folder and target.exists() and not job.overwrite:
        # Before the password is asked for and the model is loaded.
        raise Stop(f"{target} exists. Use --overwrite to replace it, or -o for another name.", FILE_TROUBLE)

    clip = video.is_video(source)
    if engine.url is not None:
        if clip:
            raise Stop("--url does pictures. For a clip, load the model here: leave --url out.", USAGE)
        client = _client(engine.url, engine.api_key_file)
        worker: Local | Remote = Remote(client, _password(password_file, confirm=job.operation == "anonymize"))
    else:
        _check_model(engine.model)
        from mien.model import load

        if clip and job.video.track_passwords and password_file is None and job.operation == "recover":
            _clip(job, load(engine.model, realm=engine.realm), None, source, target)
            return
        password = _password(password_file, confirm=job.operation == "anonymize")
        model = load(engine.model, realm=engine.realm)
        # From here on nothing holds the password.
        worker = Local(model, model.code_for("anonymize", password))
        del password
    if folder:
        _run_folder(job, worker, pairs, troubles, target)
        return
    if clip and isinstance(worker, Local):
        _clip(job, worker.model, worker.code, source, target)
        return
    try:
        faces, _ = _one(job, worker, source, target)
    except errors.NoFaceFound:
        if job.on_no_face is not OnNoFace.skip:
            raise
        typer.echo(f"No face was found in {source}; skipped.")
        return
    typer.echo(f"{_count(faces, 'face')} {_DONE[job.operation]}: {target}" if faces else f"No face, copied: {target}")


_ENDING: Final = {"anonymize": "anon", "recover": "recovered"}
_DONE: Final = {"anonymize": "anonymized", "recover": "recovered"}


def _beside(source: Path, job: Job) -> Path:
    from mien.pictures import SUFFIXES

    if video.is_video(source):
        return video.beside(source, job.operation)
    stem = source.stem.removesuffix(".anon") if job.operation == "recover" else source.stem
    return source.with_name(f"{stem}.{_ENDING[job.operation]}{SUFFIXES[job.format]}")


def _targets(files: list[Path], source: Path, target: Path, job: Job) -> list[Path]:
    names = [target / path.relative_to(source).parent / _beside(path, job).name for path in files]
    # me.jpg and me.png would both become me.anon.png: such files keep their whole name.
    twice = {name for name, times in Counter(names).items() if times > 1}
    return [
        name.with_name(f"{path.name}{name.name.removeprefix(path.stem.removesuffix('.anon'))}")
        if name in twice
        else name
        for path, name in zip(files, names, strict=True)
    ]


def _pictures_in(source: Path, *, leave_out: Path | None) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Pictures and clips of a file or folder by name, sorted, and the folders that could not be read."""
    from mien.pictures import READABLE_SUFFIXES
    from mien.video.codecs import VIDEO_SUFFIXES

    if source.is_file():
        return [source], []
    if not source.exists():
        raise Stop(f"There is no file or folder {source}.", FILE_TROUBLE)
    troubles: list[tuple[Path, str]] = []
    readable = READABLE_SUFFIXES | VIDEO_SUFFIXES
    found: list[Path] = []
    avoid = leave_out.resolve() if leave_out else None

    def note(error: OSError) -> None:
        troubles.append((Path(error.filename or source), error.strerror or "cannot be read"))

    for here, folders, names in os.walk(source, onerror=note):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and (Path(here) / f).resolve() != avoid)
        found += [Path(here) / n for n in sorted(names) if Path(n).suffix.lower() in readable and n[0] != "."]
    if not found and not troubles:
        raise Stop(f"There is no picture in {source} (looked for {', '.join(sorted(READABLE_SUFFIXES))}).", BAD_PICTURE)
    return found, troubles


def _password(password_file: Path | None, *, confirm: bool) -> str:
    if password_file is not None:
        try:
            text = sys.stdin.readline() if str(password_file) == "-" else _first_line(password_file)
        except UnicodeDecodeError:
            raise Stop(f"{password_file} is not UTF-8 text.", BAD_PASSWORD) from None
        return text.rstrip("\r\n")
    if "MIEN_PASSWORD" in os.environ:
        return os.environ["MIEN_PASSWORD"]
    if not sys.stdin.isatty():
        raise Stop(
            "No password. Nobody can be asked here: use --password-file or the variable MIEN_PASSWORD.", BAD_PASSWORD
        )
    again = "The same password again" if confirm else False
    return str(typer.prompt("Password", hide_input=True, confirmation_prompt=again, err=True))


def _first_line(path: Path) -> str:
    # Bounded: a wrong path to something huge should not be read whole.
    with path.open(encoding="utf-8") as file:
        return file.readline(1 << 16)


def _one(job: Job, worker: Local | Remote, source: Path, target: Path) -> tuple[int, bool]:
    """Do one picture; how many faces changed, and whether it was copied for lack of any."""
    from mien import pictures
    from mien.files import write_atomically

    if target.exists() and not job.overwrite:
        raise Stop(f"{target} exists; --overwrite replaces it", FILE_TROUBLE)
    if video.is_video(source):
        if isinstance(worker, Remote):
            raise Stop("a clip: --url does pictures", USAGE)
        report = _run_clip(job, worker.model, worker.code, source, target)
        return len(report.trajectories), not report.trajectories
    data = source.read_bytes()
    try:
        out, faces = worker.edit(data, job)
    except errors.NoFaceFound:
        if job.on_no_face is not OnNoFace.copy:
            raise
        picture = pictures.decode(data, keep_metadata=job.keep_metadata)
        out, faces = pictures.encode(picture, job.format, quality=job.quality), 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, out)
    except OSError as error:
        raise Stop(f"{target} could not be written: {error.strerror}", FILE_TROUBLE) from error
    return faces, not faces


def _clip(job: Job, model: Model, code: Code | None, source: Path, target: Path) -> None:
    try:
        report = _run_clip(job, model, code, source, target, quiet=False)
    except errors.NoFaceFound:
        if job.on_no_face is not OnNoFace.skip:
            raise
        typer.echo(f"No face was found in {source}; skipped.")
        return
    video.tell(report, job.operation)


def _run_clip(job: Job, model: Model, code: Code | None, source: Path, target: Path, *, quiet: bool = True) -> Report:
    return video.one(
        job.operation,
        model,
        None if code is None else model.code_for(job.operation, code=code),
        source,
        target,
        faces=job.faces,
        options=job.video,
        allow_no_face=job.on_no_face is OnNoFace.copy,
        quiet=quiet,
    )


def _run_folder(
    job: Job,
    worker: Local | Remote,
    pairs: list[tuple[Path, Path]],
    troubles: list[tuple[Path, str]],
    target: Path,
) -> None:
    tally = Tally(failed=list(troubles))
    for source, to in _progress(pairs, job):
        try:
            faces, copied = _one(job, worker, source, to)
        except errors.NoFaceFound as error:
            if job.on_no_face is OnNoFace.skip:
                tally.skipped += 1
            else:
                tally.failed.append((source, str(error)))
        except (errors.AccessDenied, errors.InvalidPassword):
            raise  # the same for every picture
        except (errors.MienError, Stop) as error:
            tally.failed.append((source, str(error)))
        except OSError as error:
            tally.failed.append((source, error.strerror or str(error)))
        else:
            tally.done, tally.copied, tally.faces = (
                tally.done + (not copied),
                tally.copied + copied,
                tally.faces + faces,
            )
    _summary(tally, job)
    with contextlib.suppress(typer.Exit):
        _report_failures(tally)
    typer.echo(f"Written to {target}" if tally.done or tally.copied else "Nothing was written.")
    if tally.failed:
        raise typer.Exit(SOME_FAILED)


def _progress(pairs: list[tuple[Path, Path]], job: Job) -> Iterator[tuple[Path, Path]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Task as RichTask
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: RichTask) -> Text:
            return Text(f"{task.speed:.2f}/s" if task.speed else "-/s")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield from progress.track(pairs, description=job.operation)


def _summary(tally: Tally, job: Job) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "pictures", "faces")
    table.add_row(_DONE[job.operation], str(tally.done), str(tally.faces))
    for name, number in (("copied, no face", tally.copied), ("skipped, no face", tally.skipped)):
        if number:
            table.add_row(name, str(number), "")
    table.add_row("failed", str(len(tally.failed)), "")
    Console().print(table)


def _report_failures(tally: Tally) -> None:
    for path, reason in tally.failed:
        typer.echo(f"mien: {path}: {reason}", err=True)
    if tally.failed:
        raise typer.Exit(SOME_FAILED)
