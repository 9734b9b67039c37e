"""Frames of Space Invaders with the boxes of its sprites, made at run time by the package ale-py.

A frame is the field between the score and the ground, 173 x 160 pixels. Every sprite in it is an
object. The memory of the game gives the place of the formation, and with it the cell of each alien;
the box of a sprite is drawn round its pixels, which have a colour of their own:

    alien    the pixels in a cell of the formation, also while an alien bursts
    shield   what is left of each of the three
    ship     the player's, also while it is wrecked
    shot     each line of the player or the aliens
    digit    the number of lives, now and then

A shot before an alien hides some of its pixels. The game is played at random.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor

from spairkit.detections import Truth
from spairkit.errors import InputError

NAMES = ("alien", "shield", "ship", "shot", "digit")
"""Kinds of sprites; a label is an index."""

HEIGHT, WIDTH = 173, 160
"""Of a frame, in pixels."""

_ALIEN, _SHIELD, _SHIP, _SHOT, _DIGIT = range(len(NAMES))
_TOP = 22  # first row of the field on the screen, below the score
_COLOURS = {
    _ALIEN: (134, 134, 29),
    _SHIELD: (181, 83, 40),
    _SHIP: (50, 132, 50),
    _SHOT: (142, 142, 142),
    _DIGIT: (162, 134, 56),
}

# the formation: addresses in the memory, and its cells on the screen in pixels
_LEFT_ADDRESS, _DOWN_ADDRESS = 26, 16
_LEFT, _FORMATION_TOP, _STEP_DOWN = -1, 31, 2
_ROWS, _COLUMNS, _CELL_HEIGHT, _CELL_WIDTH = 6, 6, 18, 16
_MARGIN = 4  # pixels before the sprite in its cell

_SHIELDS = (slice(41, 51), slice(73, 83), slice(105, 115))  # columns of the screen
_TOUCHING = np.ones((3, 3), int)

_HELD = 8  # frames of the game between two choices of an action
_APART = 45  # frames of the game between two that are taken
_MOST_BEFORE = 400  # frames of the game before the first one, drawn at random

Array = npt.NDArray[Any]


def frames(seed: int) -> Iterator[tuple[Tensor, Truth]]:
    """Frames [3, 173, 160] uint8 with their boxes, endlessly, as a pure function of the seed.

    Every 45th frame of games played at random: each eighth frame of the game, one of its six
    actions is drawn. A finished game is followed by another.

    Raises:
        InputError: ale-py is not installed, or lacks the game.
    """
    game = _game(seed)
    draws = np.random.default_rng(seed)
    actions = game.getMinimalActionSet()
    action, time, due = actions[0], 0, int(draws.integers(_MOST_BEFORE))
    while True:
        if time % _HELD == 0:
            action = actions[draws.integers(len(actions))]
        game.act(action)
        if game.game_over():
            game.reset_game()
        elif time >= due:
            due = time + _APART
            screen = game.getScreenRGB()
            field = torch.from_numpy(screen[_TOP : _TOP + HEIGHT].copy()).permute(2, 0, 1)
            yield field.contiguous(), _truth(screen, game.getRAM())
        time += 1


def _game(seed: int) -> Any:
    try:
        from ale_py import ALEInterface, LoggerMode, roms
    except ImportError:
        raise InputError(
            "frames of Space Invaders need ale-py, which is not installed: run pip install "
            "'.[atari]' in spairkit's folder"
        ) from None
    ALEInterface.setLoggerMode(LoggerMode.Error)
    game = ALEInterface()
    game.setInt("random_seed", seed)
    game.setFloat("repeat_action_probability", 0.0)
    rom = roms.get_rom_path("space_invaders")
    if rom is None:
        raise InputError("this ale-py has no Space Invaders; install another version")
    game.loadROM(rom)
    game.reset_game()
    return game


def _truth(
    screen: Array,  # [210, 160, 3] uint8
    memory: Array,  # [128] uint8
) -> Truth:
    """Boxes of the sprites in the field, in its pixels."""
    drawn = {kind: (screen == colour).all(2) for kind, colour in _COLOURS.items()}
    for mask in drawn.values():
        mask[:_TOP] = mask[_TOP + HEIGHT :] = False
    found = [(_ALIEN, part) for part in _cells(drawn[_ALIEN], memory)]
    found += [(_SHIELD, _within(drawn[_SHIELD], np.s_[:, columns])) for columns in _SHIELDS]
    found += [(kind, drawn[kind]) for kind in (_SHIP, _DIGIT)]
    lines, number = ndimage.label(drawn[_SHOT], _TOUCHING)
    found += [(_SHOT, lines == line) for line in range(1, number + 1)]
    found = [(kind, mask) for kind, mask in found if mask.any()]
    boxes = [_box(mask) for _, mask in found]
    return Truth(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor([kind for kind, _ in found], dtype=torch.int64),
    )


def _cells(
    drawn: Array,  # [210, 160] bool
    memory: Array,
) -> Iterator[Array]:
    """The pixels in each cell of the formation, row by row."""
    left = int(memory[_LEFT_ADDRESS]) + _LEFT - _MARGIN
    top = int(memory[_DOWN_ADDRESS]) * _STEP_DOWN + _FORMATION_TOP - _MARGIN
    for row in range(_ROWS):
        y = top + row * _CELL_HEIGHT
        for column in range(_COLUMNS):
            x = left + column * _CELL_WIDTH
            rows, columns = slice(max(y, 0), y + _CELL_HEIGHT), slice(max(x, 0), x + _CELL_WIDTH)
            yield _within(drawn, (rows, columns))


def _within(mask: Array, part: Any) -> Array:
    """The mask without the pixels outside a part."""
    kept = np.zeros_like(mask)
    kept[part] = mask[part]
    return kept


def _box(mask: Array) -> tuple[int, int, int, int]:
    """Left, top, right and bottom, half-open, in pixels of the field."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]) - _TOP, int(columns[-1]) + 1, int(rows[-1]) + 1 - _TOP
