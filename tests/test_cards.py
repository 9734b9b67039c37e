"""SET: the rule against all triples, hands against the rule, scenes against loops over pixels."""

from itertools import combinations, permutations

import numpy as np
import pytest
import torch

from spairkit.config import DataConfig
from spairkit.config_values import from_dict
from spairkit.data.cards import BACKGROUNDS, COLOURS, drawn_patches, hands, has_set, third_cards
from spairkit.data.datasets import CARDS, data_settings, open_dataset
from spairkit.errors import InputError

CONFIG = from_dict({"data": CARDS}).data


def attributes(card: int) -> tuple[int, int, int]:
    return card // 9, card // 3 % 3, card % 3


def is_set(cards: tuple[int, ...]) -> bool:
    """The rule of the game, attribute by attribute."""
    values = [{attributes(card)[i] for card in cards} for i in range(3)]
    return all(len(different) != 2 for different in values)


def test_rule_matches_all_triples() -> None:
    triples = list(combinations(range(27), 3))
    expected = [is_set(triple) for triple in triples]
    assert sum(expected) == 117
    assert has_set(torch.tensor(triples)).tolist() == expected


def test_third_card_makes_a_set_with_any_two() -> None:
    thirds = third_cards().tolist()
    for a, b in permutations(range(27), 2):
        assert thirds[a][b] not in (a, b)
        assert is_set((a, b, thirds[a][b]))


def test_absent_cards_are_in_no_set() -> None:
    assert has_set(torch.tensor([[0, 1, 2, -1], [0, 1, -1, -1], [-1, -1, -1, 5]])).tolist() == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("num_cards", [3, 5])
def test_hands_are_all_combinations_divided_by_the_rule(num_cards: int) -> None:
    without, with_set = (list(map(tuple, part.tolist())) for part in hands(num_cards))
    assert sorted(without + with_set) == list(combinations(range(27), num_cards))
    assert all(any(map(is_set, combinations(hand, 3))) for hand in with_set)
    assert not any(any(map(is_set, combinations(hand, 3))) for hand in without[:2000])


def test_half_of_the_scenes_hold_a_set() -> None:
    cards = open_dataset(CONFIG, "train")
    labels = torch.cat([cards.batch(torch.arange(n, n + 500)).labels for n in range(0, 2000, 500)])
    has = has_set(labels)
    assert abs(float(has.float().mean()) - 0.5) < 4 * 0.5 / 2000**0.5
    assert all(len(set(hand)) == 7 for hand in labels.tolist())
    # each of 27 is in 7 / 27 of the hands, and in each place equally often
    share = torch.bincount(labels[:, 0], minlength=27) / 2000
    assert float((share - 1 / 27).abs().max()) < 5 * (1 / 27 / 2000) ** 0.5


def test_scene_matches_a_loop_over_pixels() -> None:
    batch = open_dataset(CONFIG, "test").batch(torch.tensor([0, 3, 77]))
    patches = drawn_patches(14).astype(int)
    for b in range(3):
        ground = (255 * batch.images[b, :, 0, 0]).round().int().tolist()
        assert tuple(ground) in BACKGROUNDS
        drawn = np.empty((48, 48, 3), dtype=int)
        drawn[:] = ground
        boxes = batch.boxes[b].int().tolist()
        for card, (left, top, _, _) in zip(batch.labels[b].tolist(), boxes, strict=True):
            colour, shape, strokes = attributes(card)
            for patch, light in (
                (patches[shape], COLOURS[colour]),
                (patches[3 + strokes], [0] * 3),
            ):
                for y in range(14):
                    for x in range(14):
                        alpha = patch[y, x]
                        for c in range(3):
                            old = drawn[top + y, left + x, c]
                            new = round((old * (255 - alpha) + light[c] * alpha) / 255)
                            drawn[top + y, left + x, c] = new
        assert torch.equal(
            (255 * batch.images[b]).round().int(), torch.tensor(drawn).permute(2, 0, 1)
        )


def test_pixels_of_the_shapes_and_strokes() -> None:
    circle, square, diamond, one, two, three, nothing = drawn_patches(14).astype(int)
    assert (square == 255).all()
    assert not nothing.any()
    assert circle[7].tolist()[1:13] == [255] * 12
    assert circle[0, 0] == diamond[0, 0] == diamond[3, 2] == 0
    assert abs(circle.sum() / 255 - np.pi * 49) < 1
    assert diamond.sum() / 255 == pytest.approx(98, abs=2)
    for number, strokes in enumerate((one, two, three), start=1):
        assert strokes.sum() == 255 * 6 * number
        columns = np.flatnonzero(strokes.any(0)).tolist()
        assert columns == [7 - number + 2 * i for i in range(number)]
        # no stroke leaves the narrowest shape
        assert (diamond[strokes > 0] == 255).all()


def test_a_scene_depends_on_its_index_alone() -> None:
    cards = open_dataset(CONFIG, "train")
    together = cards.batch(torch.arange(40))
    alone = open_dataset(CONFIG, "train").batch(torch.tensor([17]))
    assert torch.equal(together.images[17:18], alone.images)
    assert torch.equal(together.labels[17:18], alone.labels)


def test_cards_overlap_by_at_most_a_third() -> None:
    boxes = open_dataset(CONFIG, "train").batch(torch.arange(20)).boxes
    for placed in boxes.tolist():
        for k, (x1, y1, x2, y2) in enumerate(placed):
            shared = sum(
                max(min(x2, c) - max(x1, a), 0) * max(min(y2, d) - max(y1, b), 0)
                for a, b, c, d in placed[:k]
            )
            assert shared <= 14 * 14 / 3


def test_the_name_stands_for_the_paper_s_scenes() -> None:
    assert from_dict(data_settings("cards")).data == CONFIG
    assert CONFIG.max_objects == 7


def test_settings_that_cards_lack_are_refused() -> None:
    for values in ({"min_objects": 6}, {"max_objects": 8, "min_objects": 8}, {"colour": "random"}):
        with pytest.raises(InputError, match="cards"):
            from_dict({"data": {**CARDS, **values}})


def test_training_scenes_repeat_after_train_images() -> None:
    endless = open_dataset(DataConfig(), "train").batch(torch.arange(5))
    few = open_dataset(DataConfig(train_images=5), "train")
    assert len(few) == 5
    batch = few.batch(torch.arange(3, 13))
    order = torch.tensor([3, 4, 0, 1, 2, 3, 4, 0, 1, 2])
    assert torch.equal(batch.images, endless.images[order])
    assert torch.equal(
        few.batch(torch.tensor([(7 << 32) + 2])).images,
        few.batch(torch.tensor([((7 << 32) + 2) % 5])).images,
    )
    test = DataConfig(train_images=5, test_images=9)
    assert len(open_dataset(test, "test")) == 9
