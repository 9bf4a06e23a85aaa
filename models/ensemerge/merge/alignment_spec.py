"""How a recipe asks for alignment: by a method that merges aligned networks, or by `align` beside any method.

merge_method: mudsc                                  merge_method: ties
models: [digits-x, digits-y]                         base_model: digits-x
parameters: {alpha: 0.5, matching: align}            align: {by: both, alpha: 0.5}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ensemerge.errors import InvalidSpec
from ensemerge.fields import Fields, checked, describe

WEIGHTS, ACTIVATIONS, BOTH = "weights", "activations", "both"
ALIGN, ZIP, TRANSPORT = "align", "zip", "transport"
AUTO = "auto"
# What each method that merges aligned networks means.
ALIGNING = {
    "weight_matching": {"by": WEIGHTS},
    "activation_matching": {"by": ACTIVATIONS},
    "mudsc": {"by": BOTH},
    "zipit": {"by": ACTIVATIONS, "matching": ZIP},
    "ot_fusion": {"by": WEIGHTS, "matching": TRANSPORT},
}
KEYS = ("alpha", "matching", "starts", "damping", "budget", "regularization")


@dataclass(frozen=True)
class Alignment:
    """How the units of the networks are brought into one order before their weights are merged.

    `alpha` is the share of similarity by weights where it is by both, None where it is to be found. `starts` random
    orders are tried beside the usual ones. `damping` and `budget` are those of a zip, `regularization` that of a
    transport, 0 for an exact one.
    """

    by: str = WEIGHTS
    alpha: float | None = 0.5
    matching: str = ALIGN
    starts: int = 0
    damping: float = 0.5
    budget: float = 1.0
    regularization: float = 0.0


def split_alignment(body: object, where: str) -> tuple[object, Alignment | None]:
    """A recipe's mapping without what it says of alignment, and that. Raises InvalidSpec."""
    if not isinstance(body, Mapping):
        return body, None
    rest = dict(body)
    implied = ALIGNING.get(str(body.get("merge_method")))
    if implied is None:
        entry = rest.pop("align", None)
        return rest, None if entry is None else _parse(_as_mapping(entry), f"{where}: align")
    if "align" in rest:
        raise InvalidSpec(f"{where}: '{body['merge_method']}' aligns by itself; leave out 'align'")
    parameters = rest.get("parameters")
    if not isinstance(parameters, Mapping):
        return rest, _parse(implied, f"{where}: parameters")
    rest["parameters"] = {key: value for key, value in parameters.items() if key not in KEYS}
    own = {key: value for key, value in parameters.items() if key in KEYS}
    return rest, _parse({**implied, **own}, f"{where}: parameters")


def _as_mapping(entry: object) -> object:
    return {"by": entry} if isinstance(entry, str) else entry


def _parse(entry: object, where: str) -> Alignment:
    fields = Fields(entry, where)
    by = fields.choose("by", (WEIGHTS, ACTIVATIONS, BOTH), WEIGHTS)
    alpha = _alpha(fields.take("alpha", object, 0.5), f"{where}: 'alpha'")
    matching = fields.choose("matching", (ALIGN, ZIP, TRANSPORT), ALIGN)
    starts = fields.take("starts", int, 0)
    damping, budget = fields.take("damping", float, 0.5), fields.take("budget", float, 1.0)
    regularization = fields.take("regularization", float, 0.0)
    fields.finish()
    if regularization < 0:
        raise InvalidSpec(f"{where}: 'regularization' is {regularization}; expected at least 0")
    if matching == TRANSPORT and by != WEIGHTS:
        raise InvalidSpec(f"{where}: 'by' is '{by}'; a transport compares weights, expected '{WEIGHTS}'")
    for name, value in (("damping", damping), ("budget", budget)):
        if not 0 <= value <= 1:
            raise InvalidSpec(f"{where}: '{name}' is {value}; expected a value from 0 to 1")
    if starts < 0:
        raise InvalidSpec(f"{where}: 'starts' is {starts}; expected at least 0")
    return Alignment(by, alpha, matching, starts, damping, budget, regularization)


def _alpha(value: Any, where: str) -> float | None:
    if value == AUTO:
        return None
    if isinstance(value, str):
        raise InvalidSpec(f"{where}: expected a number from 0 to 1, or '{AUTO}', got {describe(value)}")
    share = checked(value, float, where)
    if not 0 <= share <= 1:
        raise InvalidSpec(f"{where} is {share}; expected a number from 0 to 1, or '{AUTO}'")
    return share
