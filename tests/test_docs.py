"""The documentation: its commands and examples run, its links resolve, its file tree is complete.

Commands run with tiny networks, in a folder with the files that the pages name.
"""

import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import typer.main

import spairkit
from spairkit.cli.main import app, main
from spairkit.images import read_pixels
from spairkit.training.loop import train

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "CHANGELOG.md"]
MAX_WORDS = 900

# commands that would install, download, test, change the shell, need an extra, or not end soon
UNRUN = (
    "python3 -m venv",
    "source",
    "pip install",
    "pytest",
    "ruff",
    "mypy",
    "spairkit --install-completion",
    "srun",
    "spairkit detect /shared",
    "spairkit app",
    "spairkit data make invaders",
    "spairkit data make slide",
    "spairkit train --data slide",
    "spairkit eval --data slide-test",
)

LOOP = {"train.batch_size": "2", "train.threads": "1"}
IMAGES = {"data.validation_images": "2", "data.test_images": "2"}
DENSE = {"model.encoder_hidden": "[8]", "model.decoder_hidden": "[8]"}
SPAIR = DENSE | {
    "model.backbone_channels": "[4]",
    "model.features": "8",
    "model.hidden": "8",
    "search.mode": "refine",  # moves of an untrained network take long
}
NETWORKS = {
    "spair": SPAIR,
    "air": DENSE | {"model.units": "8"},
    "dair": DENSE | {"model.units": "8", "model.difference_hidden": "[8]"},
    "conncomp": {"model.images": "4"},
    "watershed": {},
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    place: str


def blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text().splitlines()
    language, start = "", -1
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start < 0:
            language, start = line[3:].strip(), number
            assert language, f"{page.name}:{number + 1}: a block needs a language"
        else:
            place = f"{page.name}:{start + 1}"
            yield Block(language, "\n".join(lines[start + 1 : number]), place)
            start = -1
    assert start < 0, f"{page.name}: a block is not closed"


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command; `&&` separates two."""
    for line in block.text.replace("\\\n", " ").splitlines():
        for part in line.removeprefix("$ ").split("&&"):
            if words := shlex.split(part, comments=True):
                yield [words[0].removeprefix(".venv/bin/"), *words[1:]]


def assigned(settings: dict[str, str], prefix: str = "") -> list[str]:
    """`--set` words; a prefix restricts settings of the model to one model of a comparison."""
    return [word for key, value in settings.items() for word in ("--set", f"{prefix}{key}={value}")]


def option(words: list[str], name: str, default: str) -> str:
    return words[words.index(name) + 1] if name in words else default


def small(words: list[str]) -> list[str]:
    """The command, scaled down to about a second."""
    command = words[0]
    network = assigned(NETWORKS[option(words, "--model", "spair")])
    if command == "train":
        if "--resume" in words:
            return [*words, "--steps", "3"]
        return [*words, "--steps", "2", *assigned(LOOP | IMAGES), *network]
    if command == "sweep":
        settings = LOOP | IMAGES | {"train.steps": "2"}
        return [*words, "--trials", "1", *assigned(settings), *network]
    if command == "compare":
        if Path(option(words, "--out", "none")).exists():
            return words
        tiny = [
            *assigned(LOOP | IMAGES),
            *assigned(SPAIR, "spair."),
            *assigned(NETWORKS["conncomp"] | {"train.steps": "2"}, "conncomp."),
        ]
        scenes = [] if "--data" in words else ["--objects", "1"]
        few = ["--models", "spair,conncomp", "--seeds", "1", "--budget", "2", *scenes]
        return [*words, *few, *tiny]
    if words[:2] == ["experiment", "fig2"]:
        return [*words, "--scale", "smoke"]
    if command == "export":
        return [*words, "--size", "12x24"]
    if words[:2] == ["data", "make"]:
        return words if "--count" in words else [*words, "--count", "1"]
    if words[:2] == ["bench", "train"]:
        return [*words, "--batch", "1", "--seconds", "0", *assigned(SPAIR)]
    if words[:2] == ["bench", "time-to-ap"]:
        sizes = LOOP | IMAGES | {"train.steps": "2"}
        easy = ["--seeds", "1", "--every", "2", "--ap", "0", "--count-accuracy", "0"]
        return [*words, *easy, *assigned(sizes), *network]
    if words[:2] == ["bench", "search"]:
        return [*words, "--batch", "1", "--size", "48", "--seconds", "0"]
    if words[:2] == ["bench", "detect"]:
        return [*words, "--size", "48", "--seconds", "0"]
    if command == "bench":
        return [*words, "--batch", "1", "--seconds", "0"]
    return words


def small_train(*arguments: Any, **options: Any) -> Any:
    """`spairkit.train`, scaled down to about a second."""
    sizes = {
        "train.batch_size": 2,
        "train.steps": 2,
        "data.validation_images": 2,
        "model.backbone_channels": [4],
        "model.encoder_hidden": [8],
        "model.decoder_hidden": [8],
    }
    return train(*arguments, **options | {"set": {**sizes, **options.get("set", {})}})


def run(words: list[str], place: str) -> None:
    if words[0] == "torchrun":  # test_distributed.py starts it, with these words
        assert words[1:4] == ["--nproc-per-node=2", "-m", "spairkit"], place
        words = words[3:]
    assert words[0] == "spairkit", f"{place}: {words[0]} is neither run nor in UNRUN"
    with pytest.raises(SystemExit) as exited:
        main(small(words[1:]))
    assert exited.value.code == 0, f"{place}: {shlex.join(words)}"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the pages name."""
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        size = ["--set", "data.image_height=72", "--set", "data.image_width=72"]
        run(["spairkit", "data", "make", "cells", "--count", "2", *size], "cells")
        run(["spairkit", "train"], "runs/digits-quick-1")
    annotations = folder / "cells" / "annotations.json"
    for number in (1, 2):
        old, new = f"0000{number - 1}.png", f"{number}.png"
        (folder / "cells" / old).rename(folder / "cells" / new)
        annotations.write_text(annotations.read_text().replace(old, new))
    shutil.copy(folder / "cells" / "1.png", folder / "scene.png")
    scenes = [read_pixels(folder / "cells" / f"{number}.png").numpy()[0] for number in (1, 2)]
    tifffile.imwrite(folder / "film.tif", np.stack(scenes), photometric="minisblack")
    digits = np.random.default_rng(0).integers(1, 256, (200, 28, 28), np.uint8)
    labels = np.arange(200) % 10
    np.savez(folder / "mnist.npz", x_train=digits, y_train=labels, x_test=digits, y_test=labels)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_examples_run(
    page: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(prepared, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(spairkit, "train", small_train, raising=False)
    names: dict[str, Any] = {}
    for block in blocks(page):
        if block.language == "python":
            exec(compile(block.text, block.place, "exec"), names)
        elif block.language == "toml":
            (folder / "space.toml").write_text(block.text)
        elif block.language == "sh":
            for words in commands(block):
                if not shlex.join(words).startswith(UNRUN):
                    run(words, block.place)
        else:
            assert block.language == "tree", f"{block.place}: a block of {block.language}"


def test_readme_is_short_and_tests_like_ci() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= MAX_WORDS
    tested = [line for line in text.splitlines() if line.endswith("&& .venv/bin/pytest -n 2")]
    assert len(tested) == 1
    assert tested[0] in (ROOT / ".ci" / "run").read_text()


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Headings as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    text = prose(page)
    for link in [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'src="([^"]+)"', text)]:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def tree() -> dict[str, str]:
    """Path and description of each file in the trees of docs/code.md."""
    files: dict[str, str] = {}
    for block in blocks(ROOT / "docs" / "code.md"):
        folders: list[str] = []
        for line in block.text.splitlines() if block.language == "tree" else ():
            name, _, description = line.strip().partition(" ")
            del folders[(len(line) - len(line.lstrip())) // 2 :]
            path = "".join([*folders, name])
            if name.endswith("/"):
                folders.append(name)
            else:
                files[path] = description.strip()
    return files


def test_tree_lists_every_module() -> None:
    listed = tree()
    tops = ("spairkit", "kernels", "cli", "tests")
    modules = {
        path.relative_to(ROOT).as_posix()
        for top in tops
        for path in (ROOT / top).rglob("*.py")
        if path.parts[len(ROOT.parts) :][:2] not in (("spairkit", "kernels"), ("spairkit", "cli"))
        and not (path.name == "__init__.py" and path.parent != ROOT / "spairkit")
    }
    assert set(listed) == modules
    assert all(listed.values()), "each file needs a description"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_in_prose_exist(page: Path) -> None:
    for path in re.findall(r"`((?:spairkit|kernels|cli|tests|docs)/[\w./]*)`", prose(page)):
        assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_every_command_and_option_is_documented() -> None:
    text = (ROOT / "docs" / "command-line.md").read_text()
    known = set(re.findall(r"--[a-z][a-z-]*", text))

    def check(command: Any, name: str) -> None:
        for parameter in command.params:
            missing = {word for word in parameter.opts if word.startswith("--")} - known
            assert missing <= {"--help", "--version"}, f"{name}: {missing}"
        for word, child in getattr(command, "commands", {}).items():
            assert f"spairkit {f'{name} {word}'.strip()}" in text, f"{name} {word}"
            check(child, f"{name} {word}".strip())

    check(typer.main.get_command(app), "")


def test_cited_sections_of_the_model_exist() -> None:
    headings = re.findall(r"^##+ ([\d.]+?)\.? ", (ROOT / "docs" / "model.md").read_text(), re.M)
    for path in [path for top in ("spairkit", "kernels") for path in (ROOT / top).rglob("*.py")]:
        for section in re.findall(r"docs/model\.md (\d+(?:\.\d+)?)", path.read_text()):
            assert section in headings, f"{path}: docs/model.md {section}"
