"""Small checkpoints as people keep them: safetensors with a config, in one file or in shards."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = Mapping[str, torch.Tensor]


def llama(
    step: int = 0, *, hidden: int = 32, layers: int = 2, vocabulary: int = 48, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """The tensors of a Llama; `step` 0 is the base, others are a random step away from it."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        shapes |= {f"{prefix}.mlp.{p}_proj.weight": (2 * hidden, hidden) for p in ("gate", "up")}
        shapes |= {f"{prefix}.mlp.down_proj.weight": (hidden, 2 * hidden)}
        shapes |= {f"{prefix}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    base, moved = torch.Generator().manual_seed(0), torch.Generator().manual_seed(step)
    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=base) * 0.1
        if step:
            values += torch.randn(shape, generator=moved) * 0.01
        tensors[name] = values.to(dtype)
    return tensors


def write_checkpoint(folder: Path, tensors: Tensors, *, shards: int = 1) -> Path:
    """Write tensors and a config.json into a new folder."""
    folder.mkdir(parents=True)
    names = list(tensors)
    size = -(-len(names) // shards)
    where: dict[str, str] = {}
    for shard in range(shards):
        those = names[shard * size : (shard + 1) * size]
        file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name].contiguous() for name in those}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(those, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    layers = 1 + max((int(name.split(".")[2]) for name in names if name.startswith("model.layers.")), default=-1)
    config = {"model_type": "llama", "num_hidden_layers": layers, "tie_word_embeddings": False}
    if "model.embed_tokens.weight" in tensors:
        config["vocab_size"] = tensors["model.embed_tokens.weight"].shape[0]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
