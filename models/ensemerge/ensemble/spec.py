"""What a `kind: ensemble` model.yaml says.

members: [digits-a, digits-b, digits-c]     # models of this repository, optionally name:version
combine: mean_probability
plan: auto                                  # or fused: the plan that the workshop compiles
"""

from __future__ import annotations

from dataclasses import dataclass

from ensemerge.ensemble.combiners import COMBINERS
from ensemerge.errors import InvalidSpec
from ensemerge.fields import checked
from ensemerge.repository import Spec

PLANS = ("auto", "fused")


@dataclass(frozen=True)
class EnsembleSpec:
    """An ensemble as data. Until there is another plan, `auto` means `fused`."""

    members: tuple[str, ...]
    combine: str
    plan: str


def parse_ensemble(spec: Spec) -> EnsembleSpec:
    """Read the body of a `kind: ensemble` model.yaml. Raises InvalidSpec."""
    fields = spec.fields()
    members = [checked(member, str, f"{spec.where}: members") for member in fields.take("members", list)]
    combine = fields.choose("combine", COMBINERS, "mean_probability")
    plan = fields.choose("plan", PLANS, "auto")
    fields.finish()
    if not members:
        raise InvalidSpec(f"{spec.where}: 'members' is empty; expected at least one model")
    return EnsembleSpec(tuple(members), combine, plan)
