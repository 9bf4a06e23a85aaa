"""The recipes that mergekit and ensemerge both run, and the checkpoints that they merge.

Every method that both have, with each parameter that changes its numbers, and the ways in which a recipe can state
one: per model, for all, along a gradient, by filter, in slices, at several levels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from checkpoints import Llama, make_family
from safetensors.torch import save_file

LAYERS = 3
LLAMA = Llama(hidden=32, intermediate=48, layers=LAYERS, heads=4, vocabulary=64)
# Two tensors of more than one block each.
WIDE = Llama(hidden=192, intermediate=800, layers=1, heads=4, vocabulary=800)
TUNED = ("tuned-1", "tuned-2", "tuned-3")
NUMBERS = "0123456789"


@dataclass(frozen=True)
class Case:
    """One recipe: `name` says what is special about it, `family` whose checkpoints it merges."""

    name: str
    family: str
    recipe: Mapping[str, Any]
    known: str = ""  # why the numbers differ even with `compat: mergekit`

    @property
    def method(self) -> str:
        return str(self.recipe["merge_method"])

    @property
    def file(self) -> str:
        """The name of its files."""
        return f"{self.method}-{self.family}-{self.name}".replace(" ", "-")


# Checkpoints.


def make_checkpoints(folder: Path, families: Sequence[str]) -> None:
    """Write a base and three fine-tunes for each family."""
    for family in families:
        if family == "gpt2":
            _make_family(folder / family, _gpt2_shapes(), GPT2, step=0.002)
        elif family == "quiet":
            _make_family(folder / family, LLAMA.shapes(), LLAMA.config(), step=2e-5)
        elif family == "tokens":
            _make_tokens(folder / family)
        else:
            llama = WIDE if family == "wide" else LLAMA
            dtype = torch.bfloat16 if family == "bf16" else torch.float32
            make_family(folder / family, llama, tuned=len(TUNED), dtype=dtype)


GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": 32,
    "n_head": 4,
    "n_layer": LAYERS,
    "n_positions": 24,
    "vocab_size": 64,
}


Shapes = Mapping[str, tuple[int, ...]]


def _gpt2_shapes() -> Shapes:
    """A GPT-2's tensors: its linear maps are stored `(in, out)`, and the head is the embedding."""
    width = 32
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (64, width), "wpe.weight": (24, width)}
    maps = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width)}
    maps |= {"mlp.c_fc": (width, 4 * width), "mlp.c_proj": (4 * width, width)}
    for layer in range(LAYERS):
        for name, shape in maps.items():
            shapes |= {f"h.{layer}.{name}.weight": shape, f"h.{layer}.{name}.bias": shape[1:]}
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h.{layer}.{norm}.{part}": (width,) for part in ("weight", "bias")}
    shapes |= {f"ln_f.{part}": (width,) for part in ("weight", "bias")}
    return {f"transformer.{name}": shape for name, shape in shapes.items()}


def _make_family(folder: Path, shapes: Shapes, config: Mapping[str, Any], step: float) -> None:
    random = torch.Generator().manual_seed(2)
    base = {name: torch.randn(shape, generator=random) * 0.02 for name, shape in shapes.items()}
    _save(folder / "base", base, config)
    for name in TUNED:
        steps = {key: torch.randn(tensor.shape, generator=random) * step for key, tensor in base.items()}
        _save(folder / name, {key: tensor + steps[key] for key, tensor in base.items()}, config)


def _save(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


# Llamas whose tokenizers differ: other ids for the same tokens, tokens of their own, special ones among them.
VOCABULARIES: Mapping[str, tuple[str, Sequence[str]]] = {
    "base": ("abcdefghijklmnop" + NUMBERS, ["<s>", "</s>"]),
    "tuned-1": ("ponmlkjihgfedcbaqr" + NUMBERS, ["<s>", "</s>", "<|user|>"]),
    "tuned-2": (NUMBERS + "abcdefghijklmnoqr", ["<s>", "</s>", "<|user|>", "<|call|>"]),
    "tuned-3": ("abcdefghijklmnop" + NUMBERS, ["<s>", "</s>"]),
}


def _make_tokens(folder: Path) -> None:
    """Each with a table as long as its vocabulary, but for the last, whose table is padded to 64 rows."""
    for number, (name, (plain, special)) in enumerate(VOCABULARIES.items()):
        size = 64 if name == "tuned-3" else len(plain) + len(special)
        llama = replace(LLAMA, vocabulary=size)
        random = torch.Generator().manual_seed(number)
        tensors = {key: torch.randn(shape, generator=random) * 0.02 for key, shape in llama.shapes().items()}
        _save(folder / name, tensors, llama.config())
        _save_tokenizer(folder / name, plain, special)


def _save_tokenizer(folder: Path, plain: str, special: Sequence[str]) -> None:
    added = [
        {"id": len(plain) + i, "content": token, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, token in enumerate(special)
    ]
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(plain)}, "merges": []}
    document: dict[str, Any] = {"version": "1.0", "added_tokens": added, "model": model}
    document |= dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    (folder / "tokenizer.json").write_text(json.dumps(document))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


# Recipes.


def cases() -> list[Case]:
    """All of them, those of a method together."""
    parts = (_averages, _spheres, _task_vectors, _selections, _layers, _tokens, _as_people_write, _small_steps, _narrow)
    found = [case for part in parts for case in part()]
    methods = list(dict.fromkeys(case.method for case in found))
    return sorted(found, key=lambda case: methods.index(case.method))


def _case(method: str, name: str, family: str = "llama", **rest: Any) -> Case:
    """`models`, `base_model` and so on; the names of models are those within the family."""
    return Case(name, family, {"merge_method": method, **_placed(rest, family)})


def _placed(value: Any, family: str) -> Any:
    """A recipe's part with `base` and `tuned-1` as paths."""
    if isinstance(value, Mapping):
        return {key: _placed(inner, family) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_placed(inner, family) for inner in value]
    return f"{family}/{value}" if isinstance(value, str) and value in ("base", *TUNED) else value


def _models(count: int = 3, **parameters: Sequence[Any]) -> list[dict[str, Any]]:
    """The first fine-tunes, each with its own entry of every parameter."""
    return _models_with(parameters, count)


def _models_with(parameters: Each, count: int = 3) -> list[dict[str, Any]]:
    own = [{key: values[k] for key, values in parameters.items()} for k in range(count)]
    return [{"model": TUNED[k], **({"parameters": own[k]} if own[k] else {})} for k in range(count)]


def _task_case(method: str, name: str, each: Each, family: str = "llama", **shared: Any) -> Case:
    """Three fine-tunes of a base; `shared` are parameters for all models."""
    # `lambda` is no name for an argument in Python.
    parameters = {key.rstrip("_"): value for key, value in shared.items()}
    return _case(method, name, family, models=_models_with(each), base_model="base", parameters=parameters)


Each = Mapping[str, Sequence[Any]]
WEIGHTS = [0.5, 0.3, 0.2]


def _averages() -> list[Case]:
    weights = _models(weight=WEIGHTS)
    rounded = {"dtype": "float32", "out_dtype": "bfloat16"}
    filtered = _models(weight=[[{"filter": "self_attn", "value": [0, 0.5, 1]}, {"value": 0.4}], 0.6, [1, 0]])
    return [
        _case("linear", "weights", models=weights),
        _case("linear", "weights", "gpt2", models=weights),
        _case("linear", "weights", "wide", models=weights),
        _case("linear", "rounded once", "bf16", models=weights, **rounded),
        _case("linear", "not normalized", models=_models(weight=[1, 0.5, -0.25]), parameters={"normalize": False}),
        _case("linear", "gradient and filter", models=filtered),
        _case("linear", "base merged too", models=_models(), base_model="base", parameters={"weight": 1.0}),
        _case("passthrough", "one model", models=_models(1)),
        _case("passthrough", "one model", "gpt2", models=_models(1)),
        _case("passthrough", "scale", models=_models(1, scale=[[{"filter": "down_proj", "value": 0.5}, {"value": 1}]])),
        _case("passthrough", "cast", "bf16", models=_models(1), dtype="float32"),
    ]


def _pair(first: str = "base", second: str = "tuned-1", layers: int = LAYERS) -> dict[str, Any]:
    """A slice of two models, over all layers."""
    return {"sources": [{"model": name, "layer_range": [0, layers]} for name in (first, second)]}


BY_PART = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
    {"value": 0.5},
]


def _spheres() -> list[Case]:
    found = [
        _case("slerp", "t", models=_models(1), base_model="base", parameters={"t": 0.3}),
        _case("slerp", "t", "gpt2", models=_models(1), base_model="base", parameters={"t": [0, 1]}),
        _case("slerp", "t", "wide", models=_models(1), base_model="base", parameters={"t": 0.3}),
        _case("slerp", "t by part", slices=[_pair()], base_model="base", parameters={"t": BY_PART}),
        _case("slerp", "base second", slices=[_pair("tuned-1", "base")], base_model="base", parameters={"t": 0.2}),
        # Unlike a base and its fine-tune these are far from parallel.
        _case("slerp", "far apart", "tokens", models=_models(1), base_model="base", parameters={"t": 0.4}, **UNION),
    ]
    pair = _models(2, weight=[0.3, 0.7])
    ways = {
        "flat": {},
        "last axis": {"nuslerp_flatten": False},
        "first axis": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    }
    for way, parameters in ways.items():
        found += [
            _case("nuslerp", f"{way}, models", models=pair, parameters=parameters),
            _case("nuslerp", f"{way}, task vectors", models=pair, base_model="base", parameters=parameters),
            _case("nuslerp", f"{way}, task vectors", "gpt2", models=pair, base_model="base", parameters=parameters),
        ]
    weights = _models(weight=WEIGHTS)
    return [
        *found,
        _case("nuslerp", "task vectors", "wide", models=pair, base_model="base"),
        _case("nuslerp", "gradient", models=_models(2, weight=[[0, 1], [1, 0.2, 0]]), base_model="base"),
        _case("multislerp", "models", models=weights),
        _case("multislerp", "task vectors", models=weights, base_model="base"),
        _case("multislerp", "task vectors", "gpt2", models=weights, base_model="base"),
        _case("multislerp", "not normalized", models=weights, parameters={"normalize_weights": False, "eps": 1e-6}),
        _case("karcher", "three models", models=_models()),
        _case("karcher", "three models", "gpt2", models=_models()),
        _case("karcher", "few steps", models=_models(), parameters={"max_iter": 2, "tol": 1e-9}),
        _case("karcher", "base merged too", models=_models(2), base_model="base"),
        _case("karcher", "far apart", "tokens", models=_models(), **UNION),
    ]


UNION = {"tokenizer_source": "union"}
DENSITIES = [0.5, 0.7, 1.0]
GRADIENTS = {"weight": [[0, 0.3, 0.7, 1], 0.5, [1, 0]], "density": [[1, 0.7, 0.2], 0.5, 0.6]}


def _task_vectors() -> list[Case]:
    plain = {"weight": [1.0, 0.5, -0.25]}
    found = [
        _task_case("task_arithmetic", "weights", plain),
        _task_case("task_arithmetic", "weights", plain, "gpt2"),
        _task_case("task_arithmetic", "normalized, lambda", plain, normalize=True, lambda_=0.6),
        _task_case("task_arithmetic", "rounded once", plain, "bf16"),
    ]
    found[-1] = replace(found[-1], recipe={**found[-1].recipe, "dtype": "float32", "out_dtype": "bfloat16"})
    extra: Mapping[str, Each] = {
        "ties": {},
        "dare_linear": {},
        "dare_ties": {},
        "della": {"epsilon": [0.1, 0.2, 0.15]},
        "della_linear": {"epsilon": [0.1, 0.2, 0.15]},
        "breadcrumbs": {"gamma": [0.01, 0.05, 0.02]},
        "breadcrumbs_ties": {"gamma": [0.01, 0.05, 0.02]},
    }
    for method, more in extra.items():
        each: Each = {"weight": WEIGHTS, "density": DENSITIES, **more}
        gradients: Each = {**GRADIENTS, "epsilon": [0.1] * 3} if "epsilon" in more else {**GRADIENTS, **more}
        found += [_task_case(method, "weights and densities", each, family) for family in ("llama", "gpt2", "wide")]
        found += [
            _task_case(method, f"normalize {yes}, rescale {not yes}", each, normalize=yes, rescale=not yes)
            for yes in (True, False)
        ]
        found += [
            _task_case(method, "lambda", each, int8_mask=True, lambda_=1.5),
            _task_case(method, "gradients", gradients),
        ]
    return found


def _selections() -> list[Case]:
    nothing: Each = {}
    found = [
        _task_case("sce", "all elements", nothing),
        _task_case("sce", "select_topk", nothing, select_topk=0.3),
        _task_case("sce", "select_topk", nothing, "gpt2", select_topk=0.3),
        _task_case("sce", "select_topk", nothing, "wide", select_topk=0.3),
        _task_case("sce", "gradient", nothing, select_topk=[0.1, 0.6, 1.0]),
        _task_case("model_stock", "tensors", nothing),
        _task_case("model_stock", "tensors", nothing, "gpt2"),
        _task_case("model_stock", "tensors", nothing, "wide"),
        _task_case("model_stock", "filter_wise", nothing, filter_wise=True),
        _task_case("model_stock", "filter_wise", nothing, "gpt2", filter_wise=True),
        _task_case("ram", "default", nothing),
        _task_case("ram", "epsilon", nothing, "gpt2", epsilon=0.002),
        _task_case("ramplus_tl", "default", nothing),
        _task_case("ramplus_tl", "r, alpha, epsilon", nothing, r=0.3, alpha=0.5, epsilon=0.002),
        _task_case("ramplus_tl", "r, alpha, epsilon", nothing, "wide", r=0.3, alpha=0.5, epsilon=0.002),
    ]
    one = _models(1)
    for family in ("llama", "gpt2", "wide"):
        found += [
            _case("nearswap", "t", family, models=one, base_model="base", parameters={"t": 0.001}),
            _case("arcee_fusion", "default", family, models=one, base_model="base"),
        ]
    t = {"t": [{"filter": "mlp", "value": [1e-4, 0.01]}, {"value": 0.002}]}
    return [*found, _case("nearswap", "gradient and filter", models=one, base_model="base", parameters=t)]


def _source(model: str, start: int, stop: int, **parameters: Any) -> dict[str, Any]:
    own = {"parameters": parameters} if parameters else {}
    return {"model": model, "layer_range": [start, stop], **own}


def _layers() -> list[Case]:
    """Slices: stacked, repeated, shifted against each other; settings at all levels."""
    shrunk = {"scale": [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.0}, {"value": 1.0}]}
    stacked = [{"sources": [_source("base", 0, 2)]}, {"sources": [_source("tuned-1", 1, 3)]}]
    repeated = [{"sources": [_source("base", 0, 2)]}, {"sources": [_source("base", 1, 3, **shrunk)]}]
    own = _source("tuned-1", 1, 3, weight=[0.1, 0.9], density=0.4)
    ties = [{"sources": [_source("base", 0, 2), _source("tuned-2", 0, 2), own], "parameters": {"weight": 0.7}}]
    top = {"weight": 9.0, "density": [0.9, 0.3], "normalize": False}
    shifted = [{"sources": [_source("tuned-1", 0, 2, weight=0.6), _source("tuned-2", 1, 3, weight=[0.1, 0.4])]}]
    cut: list[dict[str, Any]] = [
        {"sources": [_source("base", 0, 1), _source("tuned-1", 0, 1)], "parameters": {"t": [0.1, 0.9]}},
        {"sources": [_source("tuned-1", 1, 3), _source("base", 1, 3)], "residual_weight": 0.5},
    ]
    return [
        _case("passthrough", "stacked layers", slices=stacked),
        _case("passthrough", "stacked layers", "gpt2", slices=stacked),
        _case("passthrough", "repeated and scaled layers", slices=repeated),
        _case("linear", "shifted layers", slices=shifted),
        _case("ties", "all levels of settings", slices=ties, base_model="base", parameters=top),
        _case("slerp", "two slices", slices=cut, base_model="base", parameters={"t": [0.2, 0.6]}),
    ]


def _tokens() -> list[Case]:
    """Models whose vocabularies differ."""
    weights = _models(2, weight=[0.6, 0.4])
    based = {"models": [*weights, {"model": "base", "parameters": {"weight": 0.5}}], "base_model": "base"}
    rules = {
        "<|user|>": {"source": "tuned-2", "force": True},
        "<|call|>": {"source": {"kind": "zero"}},
        "q": {"source": {"kind": "model_token", "model": "base", "token": "a"}},
        "r": {"source": {"kind": "model_token", "model": "tuned-1", "token_id": 3}, "force": True},
    }
    chosen = {"source": "union", "tokens": rules}
    trimmed = _models(weight=WEIGHTS, density=DENSITIES)
    return [
        _case("linear", "union", "tokens", **based, tokenizer_source="union"),
        _case("linear", "base", "tokens", **based, tokenizer_source="base"),
        _case("linear", "a model's", "tokens", **based, tokenizer_source="tuned-1"),
        _case("linear", "without a base", "tokens", models=weights, tokenizer_source="tuned-1"),
        _case("linear", "rules", "tokens", **based, tokenizer=chosen),
        _case("linear", "padded", "tokens", **based, tokenizer={"source": "union", "pad_to_multiple_of": 16}),
        _case("task_arithmetic", "union", "tokens", models=_models(weight=WEIGHTS), base_model="base", **UNION),
        _case("ties", "rules", "tokens", models=trimmed, base_model="base", tokenizer=chosen),
    ]


def _as_people_write() -> list[Case]:
    """Recipes of the shapes that stand in model cards."""
    both = [{"model": "base"}, {"model": "tuned-1"}]
    half = {"parameters": {"density": 0.5, "weight": 0.5}}
    listed = [{"model": "base"}, {"model": "tuned-1", **half}, {"model": "tuned-2", **half}]
    mask = {"normalize": False, "int8_mask": True}
    whole = [{"sources": [_source(name, 0, LAYERS, weight=0.5) for name in TUNED[:2]]}]
    return [
        _case("arcee_fusion", "base among the models", models=both, base_model="base", dtype="float32"),
        _case("model_stock", "base among the models", models=[*both, {"model": "tuned-2"}], base_model="base"),
        _case("slerp", "base among the models", models=both, base_model="base", parameters={"t": BY_PART}),
        _case("dare_ties", "base among the models", models=listed, base_model="base", parameters=mask),
        _case("ties", "half and half", models=listed[1:], base_model="base", parameters=mask, dtype="float32"),
        _case("linear", "slices over all", slices=whole, dtype="float32", tokenizer_source=None, parameters=None),
        _case("linear", "one module", modules={"default": {"slices": whole, "parameters": {"normalize": True}}}),
    ]


def _every(family: str, **top: Any) -> list[Case]:
    """One recipe for each method, with keys of its own at the top."""
    pair, weights = _models(2, weight=[0.3, 0.7]), _models(weight=WEIGHTS)
    based: dict[str, Any] = {"base_model": "base", **top}
    recipes: dict[str, dict[str, Any]] = {
        "linear": {"models": weights, **top},
        "slerp": {"models": _models(1), "parameters": {"t": 0.3}, **based},
        "nuslerp": {"models": pair, **based},
        "multislerp": {"models": weights, **based},
        "karcher": {"models": _models(), **top},
        "task_arithmetic": {"models": weights, **based},
        "sce": {"models": _models(), "parameters": {"select_topk": 0.3}, **based},
        "model_stock": {"models": _models(), **based},
        "nearswap": {"models": _models(1), "parameters": {"t": 1e-5}, **based},
        "arcee_fusion": {"models": _models(1), **based},
        "ram": {"models": _models(), **based},
        "ramplus_tl": {"models": _models(), **based},
    }
    trimmed = _models(weight=WEIGHTS, density=DENSITIES)
    sparse = ("ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties")
    recipes |= {method: {"models": trimmed, **based} for method in sparse}
    name = "all" if not top else ", ".join(f"{key} {value}" for key, value in top.items())
    return [_case(method, name, family, **recipe) for method, recipe in recipes.items()]


def _small_steps() -> list[Case]:
    """Fine-tunes a thousandth away from their base, as many real ones are."""
    filters = _task_case("model_stock", "filter_wise", {}, "quiet", filter_wise=True)
    return [*_tied(_every("quiet"), "breadcrumbs", "breadcrumbs_ties"), filters]


TIED = (
    "elements of one magnitude, which narrow dtypes and small steps give, share one fate; mergekit keeps those that a "
    "sort puts first, in an order that depends on the processor"
)
COMPUTED = "mergekit computes in bf16 and rounds at every step; here the sum is rounded once"
WIDER = "mergekit computes in bf16, and writes float32 although the recipe says bfloat16"


def _narrow() -> list[Case]:
    """bf16 checkpoints, computed in float32, and in what mergekit takes `dtype` for."""
    same = {"linear": "", "slerp": "", "arcee_fusion": WIDER, "ramplus_tl": WIDER}
    narrow = [replace(case, known=same.get(case.method, COMPUTED)) for case in _every("bf16", dtype="bfloat16")]
    wide = _tied(_every("bf16", dtype="float32"), "ties", "breadcrumbs", "breadcrumbs_ties", "sce")
    return [*wide, *narrow]


def _tied(found: Sequence[Case], *methods: str) -> list[Case]:
    """Marks the methods that keep a number of elements, where some of one magnitude lie at the threshold."""
    return [replace(case, known=TIED) if case.method in methods else case for case in found]
