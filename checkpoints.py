"""Checkpoints on disk: whole or not there, checked before they are gone on from, and what stops a run in good order."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from config import SettingsError, is_main_process
from model_utils import write_folder

MANIFEST_FILE = "checkpoint_manifest.json"
STAGING, LOCK_FILE = ".saving", ".in_use"
# Of a save that was killed, or met a full disk.
LEFTOVERS = (STAGING, ".checkpoint-*.partial", ".checkpoint-*.old", ".final_model.partial", ".final_model.weights")
_CHUNK = 1 << 22
_LITTLE_SPACE = 1 << 20  # bytes


class StoppedError(Exception):
    """A run that ended before its last step, in good order: the message says what was kept.

    exit_code: what the command ends with; 128 plus the number of the signal that ended it, else 1.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextlib.contextmanager
def claimed(output_dir: str | Path) -> Iterator[None]:
    """The output folder for this run alone, all its processes, as long as the context lasts; made where there is none.

    Raises:
        SettingsError: where it cannot be written to, or another process has claimed it.
    """
    if not is_main_process():
        yield
        return
    lock = Path(output_dir, LOCK_FILE)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("a")
    except OSError as error:
        raise SettingsError(
            f"output_dir is {output_dir}, which cannot be written to ({error.strerror}): give another folder"
        ) from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with this process, however it ends
        except (BlockingIOError, PermissionError):
            raise SettingsError(
                f"output_dir is {output_dir}, where another run is at work: wait for its end, or give another folder"
            ) from None
        except OSError:  # a file system without locks
            pass
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """The folders `checkpoint-N` of a run, newest first."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(output_dir).glob("checkpoint-*")]
    steps = [(int(match[1]), path) for match, path in found if match and path.is_dir()]
    return [path for _, path in sorted(steps, reverse=True)]


def put_in_place(filled: str | Path, folder: str | Path) -> None:
    """Make `filled` (on the same disk) the checkpoint `folder`, with a manifest; what it holds is on the disk then."""
    filled = Path(filled)
    manifest = {"files": _checksums(filled, to_disk=True)}
    with open(filled / MANIFEST_FILE, "w", encoding="utf-8") as file:
        file.write(json.dumps(manifest, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())

    def move(target: str) -> None:
        for path in filled.iterdir():
            os.replace(path, Path(target, path.name))

    write_folder(folder, move)
    filled.rmdir()
    parent = os.open(Path(folder).parent, os.O_RDONLY)
    try:
        os.fsync(parent)  # the new name, too, is on the disk then
    finally:
        os.close(parent)


def fault_of(checkpoint: str | Path) -> str | None:
    """What is wrong with a checkpoint, by the sizes and CRC-32 sums of its manifest; None: it is whole."""
    checkpoint = Path(checkpoint)
    try:
        expected = json.loads((checkpoint / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"no {MANIFEST_FILE}"
    except (ValueError, KeyError):
        return f"{MANIFEST_FILE} cannot be read"
    for name, (size, _) in expected.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
    found = _checksums(checkpoint, names=list(expected))
    changed = [name for name, sum_ in expected.items() if found[name] != sum_]
    return f"{', '.join(changed)}: changed since it was saved" if changed else None


def newest_whole(output_dir: str | Path, say: Callable[[str], Any]) -> Path | None:
    """The newest checkpoint that is whole; broken ones before it are set aside, and `say` gets a line for each."""
    broken: list[Path] = []
    for checkpoint in checkpoints_in(output_dir):
        fault = fault_of(checkpoint)
        if fault is None:
            for faulty in broken:  # else it would pass for the newest one when the run is stopped again
                set_aside(faulty)
            return checkpoint
        broken.append(checkpoint)
        say(f"skipped {checkpoint}, which is broken: {fault}")
    return None


def set_aside(path: Path) -> None:
    """Give what is no longer of the run the suffix `.unused`; a checkpoint is then removed as the oldest ones are."""
    unused = path.with_name(f"{path.name}.unused")
    shutil.rmtree(unused, ignore_errors=True)
    os.replace(path, unused)


def remove_leftovers(output_dir: str | Path) -> None:
    """Remove what a save that was killed left; a checkpoint that was about to be replaced is put back."""
    for pattern in LEFTOVERS:
        for path in Path(output_dir).glob(pattern):
            replaced = path.with_name(path.name[1:].removesuffix(".old"))
            if path.suffix == ".old" and not replaced.exists():
                os.replace(path, replaced)
            else:
                shutil.rmtree(path)


@contextlib.contextmanager
def full_disk_reported(output_dir: str | Path, what: str) -> Iterator[None]:
    """Where the disk is full, remove what was half written and stop with what was kept.

    Raises:
        StoppedError: in place of the error of whatever wrote.
    """
    try:
        yield
    except Exception as error:
        if not _is_full_disk(error, output_dir):
            raise
        remove_leftovers(output_dir)
        kept = checkpoints_in(output_dir)
        rest = f"{kept[0]} was kept, and the same command goes on from it" if kept else "there is no checkpoint yet"
        raise StoppedError(
            f"no space was left on the disk of {output_dir} while {what} was saved; {rest}. Make room, or keep fewer "
            "checkpoints (--save_total_limit)"
        ) from error


def _is_full_disk(error: BaseException, folder: str | Path) -> bool:
    """torch and safetensors raise errors of their own, without the number of the operating system's."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    if os.strerror(errno.ENOSPC) in str(error):
        return True
    is_writer = "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error)
    return is_writer and shutil.disk_usage(folder).free < _LITTLE_SPACE


def _checksums(folder: Path, names: list[str] | None = None, to_disk: bool = False) -> dict[str, list[int]]:
    """File -> [bytes, CRC-32], for `names` or for every file below `folder`."""
    if names is None:
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: checksum(folder / name, to_disk), names), strict=True))


def checksum(path: str | Path, to_disk: bool = False) -> list[int]:
    """[bytes, CRC-32] of a file; with `to_disk` it is on the disk then."""
    size = total = 0
    with open(path, "rb") as file:
        if to_disk:
            os.fsync(file.fileno())
        while chunk := file.read(_CHUNK):
            size, total = size + len(chunk), zlib.crc32(chunk, total)
    return [size, total]
