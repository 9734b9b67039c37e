"""Breaks safeguards on purpose, one at a time, and shows that each break turns the suite red.

    python tests/break_safeguards.py [WORD ...]

Works on a copy of the checkout. Each safeguard is a text that is replaced once, and the test files
that should notice. Words choose the safeguards whose names contain one of them. The exit status is
1 if a break stays green, and an error is raised if a text is not found or the unbroken tests fail.
Takes about ten minutes.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Safeguard:
    """A text of one file, what breaks it, and the test files that should fail."""

    name: str
    file: str
    text: str
    broken: str
    tests: tuple[str, ...]


SAFEGUARDS = (
    Safeguard(
        "files appear by a rename",
        "spairkit/storage/durable.py",
        "        os.replace(temporary, path)\n",
        "        shutil.copyfile(temporary, path)\n        temporary.unlink()\n",
        ("test_durable.py",),
    ),
    Safeguard(
        "files are flushed to disk",
        "spairkit/storage/durable.py",
        "            _write_all(descriptor, piece)\n        os.fsync(descriptor)\n",
        "            _write_all(descriptor, piece)\n",
        ("test_durable.py",),
    ),
    Safeguard(
        "sha256 of checkpoints is compared",
        "spairkit/storage/checkpoints.py",
        "    if sha256(data).hexdigest() != expected.sha256:\n",
        "    if False:\n",
        ("test_checkpoints.py",),
    ),
    Safeguard(
        "sha256 of a manifest is compared",
        "spairkit/storage/checkpoints.py",
        "        if data[:end] != _HEAD + sha256(data[end:]).hexdigest().encode():\n",
        "        if False:\n",
        ("test_mutated_checkpoints.py",),
    ),
    Safeguard(
        "count prior is clamped before its logarithm",
        "spairkit/presence.py",
        "        log_on = (weight * on).sum(1).clamp(min=MIN_PROBABILITY).log()\n",
        "        log_on = (weight * on).sum(1).log()\n",
        ("test_extreme_inputs.py",),
    ),
    Safeguard(
        "impossible counts keep a finite log-weight",
        "spairkit/presence.py",
        "torch.where(impossible, IMPOSSIBLE, belief + log_likelihood)",
        "belief + likelihood.log()",
        ("test_extreme_inputs.py",),
    ),
    Safeguard(
        "a run is locked",
        "spairkit/storage/runs.py",
        "            lock.acquire(timeout=_LOOK_SECONDS, poll_interval=_LOOK_SECONDS / 4)\n",
        "            pass\n",
        ("test_runs.py",),
    ),
    Safeguard(
        "KL terms are weighted by presence",
        "spairkit/models/spair.py",
        "            latents.presence,\n            *self.priors,\n",
        "            torch.ones_like(latents.presence),\n            *self.priors,\n",
        ("test_spair.py",),
    ),
    Safeguard(
        "pixels have their centres at halves",
        "spairkit/rendering.py",
        "    pixel = torch.arange(num_pixels, dtype=low.dtype, device=low.device) + 0.5\n",
        "    pixel = torch.arange(num_pixels, dtype=low.dtype, device=low.device)\n",
        ("test_rendering.py",),
    ),
    Safeguard(
        "a cell comes after its neighbours",
        "spairkit/models/wavefront.py",
        "        [(i, t - 2 * i) for i in range(rows) if 0 <= t - 2 * i < columns]\n",
        "        [(i, t - i) for i in range(rows) if 0 <= t - i < columns]\n",
        ("test_wavefront.py",),
    ),
    Safeguard(
        "no glyph is in two splits",
        "spairkit/data/glyphs.py",
        '{"train": (0, 8), "validation": (8, 9), "test": (9, 10)}',
        '{"train": (0, 9), "validation": (8, 9), "test": (9, 10)}',
        ("test_glyphs.py",),
    ),
    Safeguard(
        "links in a run are refused",
        "spairkit/storage/durable.py",
        "            if name not in but and not is_temporary(name) and path.is_symlink():\n",
        "            if False:\n",
        ("test_moved_runs.py",),
    ),
    Safeguard(
        "the page is for those with the token",
        "spairkit/app/server.py",
        "        if not _same(given, self._token):\n",
        "        if not given:\n",
        ("test_app.py",),
    ),
    Safeguard(
        "the page is for names of this machine",
        "spairkit/app/server.py",
        "        if _hostname(host) not in _HOSTS:\n",
        "        if not host:\n",
        ("test_app.py",),
    ),
    Safeguard(
        "other pages change nothing",
        "spairkit/app/server.py",
        '            if site != "same-origin" or (origin is not None and origin != f"http://{host}"):\n',
        "            if False:\n",
        ("test_app.py",),
    ),
    Safeguard(
        "corrections of another program are kept",
        "spairkit/app/corrections.py",
        "        if self._state() != self._seen:\n",
        "        if False:\n",
        ("test_app.py",),
    ),
    Safeguard(
        "corrections of another window are kept",
        "spairkit/app/session.py",
        "            if self._revisions.get(index, 0) != revision:\n",
        "            if False:\n",
        ("test_app.py",),
    ),
    Safeguard(
        "a training ends with the app",
        "cli/train.py",
        "    orphaned = parent_ended()\n",
        "    import threading\n\n    orphaned = threading.Event()\n",
        ("test_app.py",),
    ),
)


def main(words: list[str]) -> int:
    """Breaks the chosen safeguards; the number that no test noticed."""
    chosen = [s for s in SAFEGUARDS if not words or any(word in s.name for word in words)]
    if not chosen:
        raise SystemExit(f"no safeguard is called {' or '.join(words)}")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "spairkit")
        shutil.copytree(ROOT, copy, symlinks=True, ignore=_not_needed)
        files = sorted({name for safeguard in chosen for name in safeguard.tests})
        status, output = _tested(copy, files)
        if status != 0:
            raise SystemExit(f"{output}\nthe tests fail before anything is broken")
        print(f"unbroken: green ({', '.join(files)})", flush=True)
        unnoticed = [safeguard.name for safeguard in chosen if not _is_noticed(copy, safeguard)]
    print(f"{len(chosen) - len(unnoticed)} of {len(chosen)} breaks turned the suite red")
    return len(unnoticed)


def _is_noticed(copy: Path, safeguard: Safeguard) -> bool:
    path = copy / safeguard.file
    whole = path.read_text()
    if whole.count(safeguard.text) != 1:
        found = whole.count(safeguard.text)
        raise SystemExit(
            f"{safeguard.name}: the text to break is {found} times in {safeguard.file}:\n"
            f"{safeguard.text}"
        )
    path.write_text(whole.replace(safeguard.text, safeguard.broken))
    start = time.monotonic()
    try:
        status, output = _tested(copy, list(safeguard.tests), "--exitfirst")
    finally:
        path.write_text(whole)
    # 1 says that tests failed; others that they could not be run
    if status not in (0, 1):
        raise SystemExit(f"{output}\n{safeguard.name}: the tests did not run")
    failed = [line.split()[1] for line in output.splitlines() if line.startswith("FAILED ")]
    verdict = f"red by {failed[0]}" if failed else "GREEN: no test noticed"
    print(f"{safeguard.name}: {verdict} ({time.monotonic() - start:.0f} s)", flush=True)
    return bool(failed)


def _tested(copy: Path, files: list[str], *options: str) -> tuple[int, str]:
    """Exit status and output of the tests in the copy."""
    # the import system takes a file of the same second and size for unchanged
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    ended = subprocess.run(
        [*command, *(f"tests/{name}" for name in files)],
        cwd=copy,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return ended.returncode, ended.stdout


def _not_needed(folder: str, names: list[str]) -> list[str]:
    """What is not copied: hidden folders, and what runs and builds have left at the top."""
    if Path(folder) != ROOT:
        return [name for name in names if name.endswith(".pyc")]
    return [name for name in names if name.startswith(".") or name in ("runs", "build", "dist")]


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
