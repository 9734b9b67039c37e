"""The table of objects of `spairkit detect --table`: a row for each, with its measurements."""

import json
import math
from typing import TYPE_CHECKING, Any

from spairkit.cli.console import csv_line

if TYPE_CHECKING:
    from spairkit.detections import Detections
    from spairkit.parts.plan import Found

_DIGITS = ".7g"  # of float32


def measured(detections: "Detections") -> str:
    """What the table needs of an image, as JSON: the columns, and the embeddings."""
    columns = {name: column.tolist() for name, column in detections.measurements().items()}
    return json.dumps({"columns": columns, "what": detections.what.tolist()})


def table_text(found: "list[Found]") -> str:
    """The table as CSV; what is not known is empty.

    Clusters are of the objects of all images together. Intensities are by colour if any image has
    colours, and there are columns in µm if any image has a resolution.
    """
    import numpy as np
    import torch

    from spairkit.groups import clusters
    from spairkit.measurements import by_colour

    parts: list[dict[str, Any]] = [json.loads(item.measured) for item in found]
    what = [row for part in parts for row in part["what"]]
    numbers = iter(clusters(torch.tensor(what)))
    tables = [{name: np.array(x, float) for name, x in part["columns"].items()} for part in parts]
    if any("mean_red" in table for table in tables):
        tables = [by_colour(table) for table in tables]
    # those of one image stand in order; the columns in µm are the last
    names = max((list(table) for table in tables), key=len, default=[])
    place = names.index("score") + 1 if names else 0
    lines = [csv_line(["image", "image_id", *names[:place], "cluster", *names[place:]])]
    for item, table in zip(found, tables, strict=True):
        absent = np.full(item.objects, np.nan)
        columns = [table.get(name, absent).tolist() for name in names]
        for row in zip(*columns, strict=True):
            values = ["" if math.isnan(value) else format(value, _DIGITS) for value in row]
            own = [item.name, item.number, *values[:place], next(numbers, ""), *values[place:]]
            lines.append(csv_line(own))
    return "".join(lines)
