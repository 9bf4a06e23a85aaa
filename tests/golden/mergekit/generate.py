"""Make the golden files: small float32 tensors, and what mergekit 0.1.5 merges them into.

Run by hand, in an environment of its own:

    python -m venv mergekit && mergekit/bin/pip install mergekit==0.1.5
    mergekit/bin/python tests/golden/mergekit/generate.py

`cases.json` says which methods run, with what parameters, and which tensors are left out, and why.
`inputs.safetensors` gets the models and the base, `outputs.safetensors` every merged tensor and, where a method drops
elements at random, which ones it kept.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
SHAPES = {"embedding": (11, 6), "wide": (5, 12), "tall": (12, 5), "vector": (9,), "conv": (4, 3, 2, 2), "quiet": (6, 5)}
MODELS = 3


def make_inputs() -> dict[str, dict[str, torch.Tensor]]:
    """Three fine-tunes of one base; in `quiet` they hardly moved, in the others a tenth of the elements did not."""
    random = torch.Generator().manual_seed(20)
    base = {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()}
    models = {"base": base}
    for k in range(MODELS):
        models[f"model{k}"] = {
            name: tensor + _update(tensor.shape, 1e-4 if name == "quiet" else 0.05, random)
            for name, tensor in base.items()
        }
    return models


def _update(shape: torch.Size, size: float, random: torch.Generator) -> torch.Tensor:
    moved = torch.rand(shape, generator=random) > 0.1
    return torch.randn(shape, generator=random) * size * moved


@contextmanager
def recorded(masks: list[torch.Tensor]) -> Iterator[None]:
    """Keeps what `torch.bernoulli` draws."""
    drawn: Callable[..., torch.Tensor] = torch.bernoulli

    def record(*arguments: Any, **options: Any) -> torch.Tensor:
        masks.append(drawn(*arguments, **options))
        return masks[-1]

    torch.bernoulli = record
    try:
        yield
    finally:
        torch.bernoulli = drawn


def outputs_of(case: dict[str, Any], inputs: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Everything that one case makes, by `case/tensor` and `case/tensor/model` for the masks."""
    from mergekit.merge_methods.api import merge_tensors  # type: ignore[import-not-found]

    based = case.get("base", False)
    members = (["base"] if based else []) + [f"model{k}" for k in range(case["models"])]
    made = {}
    for name in SHAPES:
        if name in case.get("skip", ()):
            continue
        masks: list[torch.Tensor] = []
        with recorded(masks):
            made[f"{case['name']}/{name}"] = merge_tensors(
                [inputs[member][name] for member in members],
                case["method"],
                parameters=case.get("shared", {}) | case.get("each", {}),
                base_index=0 if based or case.get("first") else None,
                name=name,
            ).contiguous()
        # A model of density 1 draws nothing.
        drew = [k for k, density in enumerate(case.get("each", {}).get("density", ())) if density < 1]
        for k, mask in zip(drew, masks, strict=False):
            made[f"{case['name']}/{name}/{k}"] = mask.to(torch.uint8).reshape(SHAPES[name])
    return made


def main() -> None:
    inputs = make_inputs()
    made: dict[str, torch.Tensor] = {}
    torch.manual_seed(21)
    for case in json.loads((HERE / "cases.json").read_text()):
        made |= outputs_of(case, inputs)
    flat = {f"{member}/{name}": t for member, tensors in inputs.items() for name, t in tensors.items()}
    save_file(flat, str(HERE / "inputs.safetensors"))
    save_file(made, str(HERE / "outputs.safetensors"), {"made_by": "mergekit 0.1.5"})


if __name__ == "__main__":
    main()
