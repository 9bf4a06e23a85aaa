"""Write layouts_by_mergekit.json: which tensors and parameters mergekit 0.1.5 takes for a few recipes.

Run by hand, in an environment with mergekit:  python make_layouts_by_mergekit.py
The recipes name tiny Llama-shaped models, a, b (4 layers) and base; only names and headers matter.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from mergekit.architecture import get_architecture_info  # type: ignore[import-not-found]
from mergekit.config import MergeConfiguration  # type: ignore[import-not-found]
from mergekit.io.tasks import LoaderCache  # type: ignore[import-not-found]
from mergekit.options import MergeOptions  # type: ignore[import-not-found]
from mergekit.plan import MergePlanner  # type: ignore[import-not-found]
from transformers import LlamaConfig, LlamaForCausalLM

RECIPES = {
    "gradients": """
merge_method: linear
models:
  - model: a
    parameters: {weight: [0, 0.5, 0.3, 1]}
  - model: b
    parameters:
      weight:
        - {filter: mlp, value: [1, 0]}
        - {filter: "*", value: 0.25}
parameters: {normalize: [true, false]}
""",
    "precedence": """
merge_method: task_arithmetic
base_model: base
slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
      - model: a
        layer_range: [0, 2]
        parameters: {weight: [{filter: self_attn, value: 0.9}]}
      - {model: b, layer_range: [2, 4]}
    parameters:
      weight: [{filter: layers.3, value: [0.1, 0.2]}, {filter: layers.1.mlp, value: 0.4}]
  - sources:
      - {model: base, layer_range: [3, 4]}
      - {model: a, layer_range: [3, 4], parameters: {weight: [0.5, 0.75]}}
      - {model: b, layer_range: [0, 1]}
parameters: {weight: [7, 8], lambda: [{filter: norm, value: 0.5}, {value: 2}]}
""",
    "passthrough": """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources: [{model: b, layer_range: [1, 4], parameters: {scale: [{filter: o_proj, value: 0}, {value: 1}]}}]
""",
    "slerp": """
merge_method: slerp
base_model: a
models: [{model: b}, {model: a}]
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
""",
}


def main() -> None:
    target = Path(__file__).resolve().with_name("layouts_by_mergekit.json")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name in ("a", "b", "base"):
            _model().save_pretrained(name)
        names = sorted(_model().state_dict())
        layouts = {name: _layout(yaml.safe_load(text)) for name, text in RECIPES.items()}
    document = {"recipes": RECIPES, "names": names, "layouts": layouts}
    target.write_text(json.dumps(document) + "\n")


def _model() -> Any:
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=False, **shape)).to(torch.float32)


def _layout(body: dict[str, Any]) -> dict[str, Any]:
    config = MergeConfiguration.model_validate(body)
    options = MergeOptions()
    LoaderCache().setup(options)
    architecture = get_architecture_info(config, options)
    planner = MergePlanner(config, architecture, options, config.referenced_models()[0].config())
    planner._plan()
    return {weight.name: _task(task) for weight, task in planner._tensors}


def _task(task: Any) -> dict[str, Any]:
    names = {str(model): info.name for model, info in task.gather_tensors.weight_info.items()}
    inputs = {str(model): dict(values) for model, values in task.input_parameters.items()}
    return {"tensors": names, "parameters": inputs, "shared": dict(task.parameters)}


if __name__ == "__main__":
    main()
