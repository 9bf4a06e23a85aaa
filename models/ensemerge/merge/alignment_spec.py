"""How a recipe asks for alignment: by a method that merges aligned networks, or by `align` beside any method.

merge_method: mudsc                                  merge_method: ties
models: [digits-x, digits-y]                         base_model: digits-x
parameters: {alpha: 0.5, matching: align}            align: {by: both, alpha: 0.5}
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
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
    transport, 0 for an exact one. Raises InvalidSpec for values that these cannot have.
    """

    by: str = WEIGHTS
    alpha: float | None = 0.5
    matching: str = ALIGN
    starts: int = 0
    damping: float = 0.5
    budget: float = 1.0
    regularization: float = 0.0

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise InvalidSpec(f"'alpha' is {self.alpha}; expected a number from 0 to 1, or '{AUTO}'")
        for name, value in (("damping", self.damping), ("budget", self.budget)):
            if not 0 <= value <= 1:
                raise InvalidSpec(f"'{name}' is {value}; expected a value from 0 to 1")
        if self.starts < 0:
            raise InvalidSpec(f"'starts' is {self.starts}; expected at least 0")
        if not 0 <= self.regularization < math.inf:
            raise InvalidSpec(f"'regularization' is {self.regularization}; expected at least 0, and finite")
        if self.matching == TRANSPORT and self.by != WEIGHTS:
            raise InvalidSpec(f"'by' is '{self.by}'; a transport compares weights, expected '{WEIGHTS}'")


def split_alignment(body: object, where: str) -> tuple[object, Alignment | None]:
    """A recipe's mapping without what it says of alignment, and that. Raises InvalidSpec."""
    if not isinstance(body, Mapping):
        return body, None
    implied = ALIGNING.get(str(body.get("merge_method")))
    if implied is None:
        rest = {key: value for key, value in body.items() if key != "align"}
        alignment = _parse(_as_mapping(body["align"]), f"{where}: align") if "align" in body else None
    else:
        rest, own = _split_parameters(body, where)
        alignment = _parse({**implied, **own}, f"{where}: parameters")
    if alignment is not None and alignment.matching == ZIP:
        _refuse_other_than_mean(body, where)
    return rest, alignment


def _split_parameters(body: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe of a method that aligns by itself, and those of its parameters that say how."""
    if "align" in body:
        raise InvalidSpec(f"{where}: '{body['merge_method']}' aligns by itself; leave out 'align'")
    parameters = body.get("parameters")
    if not isinstance(parameters, Mapping):
        return dict(body), {}
    others = {key: value for key, value in parameters.items() if key not in KEYS}
    return {**body, "parameters": others}, {key: value for key, value in parameters.items() if key in KEYS}


def _refuse_other_than_mean(body: Mapping[str, Any], where: str) -> None:
    """The networks' shares of a zip make the merged weights by their plain mean alone. Raises InvalidSpec."""
    method = body.get("merge_method")
    if method != "linear" and method not in ALIGNING:
        raise InvalidSpec(f"{where}: a zip is merged by its mean, not by '{method}'; expected `merge_method: linear`")
    if body.get("base_model") is not None:
        raise InvalidSpec(f"{where}: a zip has no base model; leave out 'base_model'")
    models = body.get("models")
    entries = [body, *(models if isinstance(models, list) else [])]
    parameters = [entry["parameters"] for entry in entries if isinstance(entry, Mapping) and entry.get("parameters")]
    for key in ("weight", "normalize"):
        if any(isinstance(given, Mapping) and key in given for given in parameters):
            raise InvalidSpec(f"{where}: all networks count the same in a zip; leave out '{key}'")


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
    try:
        alignment = Alignment(by, alpha, matching, starts, damping, budget, regularization)
    except InvalidSpec as error:
        raise InvalidSpec(f"{where}: {error}") from None
    _refuse_idle(alignment, dict(entry) if isinstance(entry, Mapping) else {}, where)
    return alignment


def _refuse_idle(alignment: Alignment, given: Collection[str], where: str) -> None:
    """A key that changes nothing is a mistake. Raises InvalidSpec."""
    by, matching = ("by", alignment.by), ("matching", alignment.matching)
    needs = {"alpha": (by, BOTH), "damping": (matching, ZIP), "budget": (matching, ZIP)}
    for key, ((decides, value), wanted) in {**needs, "regularization": (matching, TRANSPORT)}.items():
        if key in given and value != wanted:
            raise InvalidSpec(
                f"{where}: '{key}' changes nothing with `{decides}: {value}`; drop it, or set `{decides}: {wanted}`"
            )


def _alpha(value: Any, where: str) -> float | None:
    if value == AUTO:
        return None
    if isinstance(value, str):
        raise InvalidSpec(f"{where}: expected a number from 0 to 1, or '{AUTO}', got {describe(value)}")
    return checked(value, float, where)
