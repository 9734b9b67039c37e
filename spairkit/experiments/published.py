"""Results of the SPAIR paper, read off its plots (docs/model.md 12), and of others on scenes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A mean and its 95 % confidence interval, in [0, 1]; all equal if none was published."""

    mean: float
    low: float
    high: float


_CONNCOMP = {1: 0.989, 3: 0.696, 5: 0.507, 7: 0.426, 9: 0.367}

FIGURE_2: dict[str, dict[int, Published]] = {
    "spair": {
        1: Published(0.789, 0.769, 0.808),
        3: Published(0.696, 0.689, 0.703),
        5: Published(0.673, 0.665, 0.681),
        7: Published(0.659, 0.653, 0.665),
        9: Published(0.624, 0.616, 0.632),
    },
    "air": {
        1: Published(0.790, 0.781, 0.799),
        3: Published(0.455, 0.373, 0.537),
        5: Published(0.130, 0.036, 0.223),
        7: Published(0.081, 0.048, 0.115),
        9: Published(0.065, 0.062, 0.068),
    },
    "dair": {
        1: Published(0.788, 0.780, 0.796),
        3: Published(0.202, 0.030, 0.374),
        5: Published(0.060, 0.030, 0.089),
        7: Published(0.046, 0.031, 0.061),
        9: Published(0.051, 0.047, 0.054),
    },
    "conncomp": {objects: Published(mean, mean, mean) for objects, mean in _CONNCOMP.items()},
}
"""Fig. 2 (docs/model.md 12.1): `ap_spair` by model and number of digits per image.

Images are 48 x 48 pixels with EMNIST digits of 14 pixels; AIR and DAIR are given the true count."""


def _over_counts(thousandths: str) -> dict[int, Published]:
    """Means for 1, 2, 3 ... digits per image, without intervals."""
    means = [int(word) / 1000 for word in thousandths.split()]
    return {n: Published(mean, mean, mean) for n, mean in enumerate(means, start=1)}


FIGURE_3: dict[str, dict[str, dict[int, Published]]] = {
    "ap_spair": {
        "conncomp": _over_counts(
            "993 899 860 818 785 760 717 691 657 638 603 579 559 535 519 506 495 480 471 453"
        ),
        "1-5": _over_counts(
            "767 737 722 695 683 677 666 656 646 641 634 626 621 608 605 598 590 586 573 569"
        ),
        "6-10": _over_counts(
            "756 734 723 701 689 683 675 669 659 657 652 648 646 638 637 634 628 624 618 615"
        ),
        "11-15": _over_counts(
            "742 727 712 695 679 677 669 662 654 651 646 643 642 635 634 631 625 623 616 615"
        ),
    },
    "count_error": {
        "conncomp": _over_counts(
            "69 12 280 501 165 404 695 837 1060 1173 "
            "1422 1502 1767 1880 2029 2186 2338 2619 2443 2799"
        ),
        "1-5": _over_counts(
            "7 26 39 79 134 175 240 305 378 442 526 603 689 807 894 1001 1127 1287 1432 1545"
        ),
        "6-10": _over_counts(
            "10 20 35 65 95 130 167 206 253 282 354 380 419 475 515 557 634 690 738 775"
        ),
        "11-15": _over_counts(
            "17 27 53 73 121 144 194 220 255 298 362 369 406 458 509 554 617 628 681 695"
        ),
    },
    "count_wrong": {
        "conncomp": _over_counts(
            "11 63 254 426 155 368 630 567 684 738 804 842 859 805 846 877 869 877 894 889"
        ),
        "1-5": _over_counts(
            "7 26 39 78 129 170 226 282 343 384 448 494 544 609 641 679 714 784 814 827"
        ),
        "6-10": _over_counts(
            "10 20 34 64 94 128 162 198 239 264 328 345 374 417 441 466 512 558 567 585"
        ),
        "11-15": _over_counts(
            "17 27 52 72 120 141 187 212 241 281 335 340 369 408 436 470 507 521 542 550"
        ),
    },
}
"""Fig. 3: by figure, digits of the training scenes, and digits of the test scene, 1 to 20.

Trained on crops of 48 x 48 pixels of scenes of 84 x 84, tested on whole scenes. The figures are
`ap_spair`, `count_error` in objects, and `count_wrong`, the share of scenes that are not counted
exactly. ConnComp has a threshold for each figure and number of digits. The 95 % intervals of AP are
.003 to .011 wide on either side."""

_SIZES = tuple(1000 * 2**k for k in range(8))


def _over_sizes(
    *values: float | None, last: tuple[float, float] | None = None
) -> dict[int, Published]:
    """Means for 1,000, 2,000 ... 128,000 training images; None is missing in the figure.

    `last` is the 95 % interval of the last one, the only one that is known.
    """
    points = {
        size: Published(mean, mean, mean)
        for size, mean in zip(_SIZES, values, strict=True)
        if mean is not None
    }
    if last is not None:
        points[_SIZES[-1]] = Published(points[_SIZES[-1]].mean, *last)
    return points


FIGURE_4: dict[str, dict[int, Published]] = {
    "truebb": _over_sizes(
        0.105, 0.164, 0.492, 0.700, 0.763, 0.826, 0.852, 0.864, last=(0.855, 0.874)
    ),
    "spair-unfixed": _over_sizes(
        0.078, 0.087, 0.102, 0.161, 0.373, 0.541, 0.621, 0.689, last=(0.664, 0.714)
    ),
    "spair-fixed": _over_sizes(
        0.083, 0.082, 0.108, 0.152, 0.235, 0.433, 0.544, 0.587, last=(0.558, 0.616)
    ),
    "conncomp": _over_sizes(0.063, 0.067, None, None, 0.112, 0.127, 0.137, 0.178),
    "convnet": _over_sizes(0.057, 0.062, 0.057, 0.059, 0.068, 0.109, 0.148, 0.111),
    "air-fixed": _over_sizes(0.046, 0.054, 0.055, 0.057, 0.056, 0.064, 0.069, 0.066),
    "air-unfixed": _over_sizes(0.053, 0.053, 0.053, 0.055, 0.057, 0.066, 0.068, 0.071),
}
"""Fig. 4: accuracy of the sum of five digits, by method and number of training images.

Images are 48 x 48 pixels. `fixed` trains the classifier only, `unfixed` also the
encoder of objects."""

FIGURE_7: dict[str, dict[str, dict[int, Published]]] = {
    "ap_spair": {
        "lateral": _over_counts(
            "657 637 630 619 613 612 610 603 599 600 595 594 591 588 586 582 579 576 573 572"
        ),
        "no-lateral": _over_counts(
            "624 557 531 509 502 503 492 489 487 489 487 485 489 485 486 485 485 483 479 481"
        ),
    },
    "count_error": {
        "lateral": _over_counts(
            "16 41 69 87 116 144 184 223 255 288 348 381 402 444 488 549 597 656 704 738"
        ),
        "no-lateral": _over_counts(
            "283 552 829 1081 1330 1504 1769 1984 2117 2302 "
            "2418 2529 2703 2911 2922 3031 3072 3251 3275 3277"
        ),
    },
    "count_wrong": {
        "lateral": _over_counts(
            "16 41 67 87 114 139 176 211 239 269 319 339 361 390 412 465 491 522 548 570"
        ),
        "no-lateral": _over_counts(
            "256 434 569 669 754 801 839 876 885 908 908 917 925 944 939 938 951 947 958 949"
        ),
    },
}
"""Fig. 7: as Fig. 3, for models with and without lateral context, trained on 11 to 15 digits."""

TABLE_1: dict[str, tuple[float, float]] = {
    "spair": (0.579, 0.019),
    "convnet": (0.501, 0.0),
    "truebb": (0.577, 0.012),
}
"""Table 1: accuracy on SET by method, and its standard deviation over the runs."""

OBJECTS_ARI: dict[str, dict[str, tuple[float, float]]] = {
    "flat": {"Slot Attention on Multi-dSprites": (0.913, 0.003)},
    "solid": {
        "Slot Attention on CLEVR with up to 6 objects": (0.988, 0.003),
        "Slot Attention on CLEVR": (0.959, 0.024),
        "GNM on CLEVR": (0.651, 0.042),
        "SPAIR on CLEVR": (0.771, 0.019),
    },
}
"""`foreground_ari` by the kind of scene that is most like, method and dataset: mean, and standard
deviation over the runs. The first of each is from Table 1 of Locatello et al. 2020
(arXiv:2006.15055), the others are from Karazija et al. 2021 (ClevrTex)."""
