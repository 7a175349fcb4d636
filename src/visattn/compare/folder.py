"""The run folder: files written whole or not at all, one writer at a time, nothing in it from elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from visattn.compare.plan import Plan
from visattn.compare.settings import FORMAT
from visattn.errors import UserError, require
from visattn.writing import LOCK, PARTIAL, alone, write_json

__all__ = ["RunFolder", "check_out", "check_same", "notes_on"]


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: It is none; the message says why.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError("is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"is not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError("is not a JSON object")
    return content


class RunFolder:
    """The folder of one plan.

    Args:
        plan: The plan.

    Raises:
        UserError: The folder belongs to another run, or holds something that does not belong to this one.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.path = plan.settings.out
        self.check()

    def trial(self, arm: str, seed: int) -> Path:
        """Where a finished trial lies."""
        return self.path / "trials" / f"{arm}-seed{seed}"

    def failure(self, arm: str, seed: int) -> Path:
        """Where the reason of a failed trial lies."""
        return self.path / "failures" / f"{arm}-seed{seed}.json"

    def costs(self, arm: str) -> Path:
        """Where the costs of an arm lie."""
        return self.path / "costs" / f"{arm}.json"

    def finished(self) -> set[tuple[str, int]]:
        """Arm and seed of the trials that need not be run again."""
        return {(arm.name, seed) for arm, seed in self.plan.trials() if self.trial(arm.name, seed).is_dir()}

    def check(self) -> None:
        """Raise `UserError` unless the folder is new, empty, or this run's, with nothing from elsewhere in it."""
        check_out(self.path)
        if not (self.path / "run.json").exists():
            return
        try:
            run = _read_json(self.path / "run.json")
        except ValueError as error:
            raise UserError(f"--out {self.path}: its run.json {error}. Use another --out.") from error
        parts = [run.get("identity"), *(run.get(part, {}) for part in ("versions", "hardware"))]
        if run.get("format") != FORMAT or not all(isinstance(part, dict) for part in parts):
            raise UserError(f"--out {self.path}: written by another version of visattn compare. Use another --out.")
        check_same(self.path, "run", run["identity"], self.plan.identity())
        known = {self.trial(arm.name, seed): (arm.name, seed) for arm, seed in self.plan.trials()}
        for folder in sorted((self.path / "trials").glob("*")):
            if folder.name.startswith(PARTIAL):
                continue
            if folder not in known:
                raise UserError(f"{folder} is no trial of this run. Remove it or use another --out.")
            self._check_trial(folder, *known[folder])

    def _check_trial(self, folder: Path, arm: str, seed: int) -> None:
        """Raise `UserError` unless a finished trial is whole and this run's."""
        name, expected = "result.json", {"run": self.plan.fingerprint(), "arm": arm, "seed": seed}
        try:
            result = _read_json(folder / name)
            for key, value in expected.items():
                if result.get(key) != value:
                    raise ValueError(f"has {key} {_show(result.get(key))} instead of {_show(value)}")
            epochs = result.get("epochs")
            if not isinstance(epochs, list) or len(epochs) != self.plan.settings.epochs:
                raise ValueError(f"does not have {self.plan.settings.epochs} epochs")
            name = "weights.safetensors"
            self._check_weights(folder / name, arm, {key: str(value) for key, value in expected.items()})
        except ValueError as error:
            raise UserError(
                f"{folder / name} is not a checkpoint of this run: it {error}. Remove {folder} to train it again."
            ) from error

    def _check_weights(self, path: Path, arm: str, expected: dict[str, str]) -> None:
        safetensors = require("safetensors", extra="compare", purpose="visattn compare")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise ValueError("is missing") from None
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"is no whole safetensors file ({error})") from error
        for key, value in expected.items():
            if metadata.get(key) != value:
                raise ValueError(f"has {key} {_show(metadata.get(key))} instead of {_show(value)}")
        if shapes != self.plan.shapes.get(arm):
            raise ValueError("does not have the weights of this arm")

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Create the folder or continue in it, alone.

        Raises:
            UserError: Another process is writing to it, or it cannot be written.
        """
        with alone(self.path, "visattn compare"):
            self.check()  # again: it may have changed before the lock was ours
            for name in ("trials", "failures", "costs"):
                (self.path / name).mkdir(exist_ok=True)
            for left in [*self.path.glob(f"{PARTIAL}*"), *self.path.glob(f"*/{PARTIAL}*")]:  # of a killed run
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            self._write_run()
            yield

    def _write_run(self) -> None:
        """Write `run.json`, or note in the one there what has changed around an unchanged plan."""
        path, now = self.path / "run.json", self.plan.record()
        if path.exists():
            before = _read_json(path)
            before["notes"] = [*notes] if isinstance(notes := before.get("notes"), list) else []
            before["notes"] += notes_on(before, now, ("versions", "hardware"))
            now = before
        write_json(path, now)

    @contextlib.contextmanager
    def new_trial(self, arm: str, seed: int) -> Iterator[Path]:
        """A folder to fill, which becomes the trial's when the context ends well and vanishes otherwise."""
        final = self.trial(arm, seed)
        partial = final.with_name(f"{PARTIAL}{final.name}")
        partial.mkdir()
        try:
            yield partial
            for path in partial.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            partial.replace(final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def check_out(path: Path) -> None:
    """Raise `UserError` if a path can be no run folder; looks at nothing but names, so it can go first."""
    if path.exists() and not path.is_dir():
        raise UserError(f"--out {path}: a file. Give a folder.")
    if path.is_dir() and not (path / "run.json").exists():
        strange = [p.name for p in path.iterdir() if p.name != LOCK and not p.name.startswith(PARTIAL)]
        ours = {"trials", "failures", "costs"}  # all there is when a run is killed before its first file
        if any(name not in ours or any((path / name).iterdir()) for name in strange):
            raise UserError(f"--out {path}: not empty and no run folder of visattn compare. Use another --out.")


def check_same(out: Path, what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `UserError` unless what a folder holds is what is to be continued there.

    Args:
        out: The folder.
        what: What it holds, in a word.
        before: Identity of that.
        now: Identity of what is to be continued.
    """
    changed = [f"{k} was {_show(before.get(k))}, now {_show(v)}" for k, v in now.items() if before.get(k) != v]
    if changed:
        raise UserError(
            f"--out {out} holds another {what}: {'; '.join(changed)}. "
            "Repeat its settings to continue it, or use another --out."
        )


def notes_on(before: Mapping[str, Any], now: Mapping[str, Any], parts: Sequence[str]) -> list[str]:
    """What has changed in some parts of a record since it was written, without what its notes say already."""
    changes = [
        f"Continued with {key} {value}; it was started with {was}."
        for part in parts
        for key, value in now[part].items()
        if (was := before.get(part, {}).get(key)) != value
    ]
    return [note for note in changes if note not in before["notes"]]


def _show(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
