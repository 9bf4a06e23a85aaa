"""Random Llama-shaped checkpoints of any size, as they are kept on disk: bf16, sharded, with an index and a config."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file


@dataclass(frozen=True)
class Llama:
    """The sizes that decide how large a checkpoint is."""

    hidden: int = 1536
    intermediate: int = 4096
    layers: int = 14
    heads: int = 12
    vocabulary: int = 32000

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, in the order of the file."""
        named: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            named |= {f"{prefix}.self_attn.{p}_proj.weight": (self.hidden, self.hidden) for p in "qkvo"}
            named |= {f"{prefix}.mlp.{p}_proj.weight": (self.intermediate, self.hidden) for p in ("gate", "up")}
            named |= {f"{prefix}.mlp.down_proj.weight": (self.hidden, self.intermediate)}
            named |= {f"{prefix}.{norm}_layernorm.weight": (self.hidden,) for norm in ("input", "post_attention")}
        return named | {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocabulary, self.hidden)}

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


def make_family(
    folder: Path, llama: Llama, *, tuned: int, shards: int = 2, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write `base` and `tuned-1` … `tuned-n` under `folder`, each a small random step away from the base."""
    make_checkpoint(folder / "base", llama, shards, dtype, 0)
    for number in range(1, tuned + 1):
        make_checkpoint(folder / f"tuned-{number}", llama, shards, dtype, number)


def make_checkpoint(folder: Path, llama: Llama, shards: int, dtype: torch.dtype, step: int) -> None:
    """One checkpoint: the base of the family, `step` 0, or the base with a random step."""
    folder.mkdir(parents=True)
    names = list(llama.shapes())
    size = -(-len(names) // shards)
    where: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        those = names[shard * size : (shard + 1) * size]
        save_file({name: _values(llama, name, dtype, step) for name in those}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(those, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(llama.config()))


def _values(llama: Llama, name: str, dtype: torch.dtype, step: int) -> torch.Tensor:
    shape = llama.shapes()[name]
    seed = list(llama.shapes()).index(name)
    values = torch.empty(shape).normal_(0, 0.02, generator=torch.Generator().manual_seed(seed))
    if step:
        generator = torch.Generator().manual_seed(step * 100_003 + seed)
        values += torch.empty(shape).normal_(0, 0.002, generator=generator)
    return values.to(dtype)
