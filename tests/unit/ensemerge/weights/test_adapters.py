from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.memory import peak_bytes_of

from ensemerge.errors import InvalidData
from ensemerge.weights import adapters
from ensemerge.weights.adapters import AdaptedWeights
from ensemerge.weights.file import WeightFile
from ensemerge.weights.reader import TensorInfo, WeightReader, read
from ensemerge.weights.safetensors import SafetensorsWeights
from ensemerge.weights.torch_files import TorchWeights

ROWS, COLUMNS = 40, 30
PREFIX = "base_model.model."
Tensors = dict[str, torch.Tensor]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def save_base(folder: Path, dtype: torch.dtype = torch.float32) -> SafetensorsWeights:
    tensors = {
        "embed.weight": randn(50, COLUMNS),
        "layers.0.q.weight": randn(ROWS, COLUMNS),
        "layers.0.q.bias": randn(ROWS),
        "layers.1.q.weight": randn(ROWS, COLUMNS, seed=1),
        "conv.weight": randn(8, 3, 2, 5),
        "head.weight": randn(50, COLUMNS, seed=2),
    }
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / "model.safetensors")
    return SafetensorsWeights(folder)


def save_adapter(folder: Path, tensors: Tensors, *, pickled: bool = False, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    full = {PREFIX + name: tensor for name, tensor in tensors.items()}
    if pickled:
        torch.save(full, folder / "adapter_model.bin")
    else:
        save_file(full, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def product(module: str, rows: int = ROWS, columns: int = COLUMNS, rank: int = 4, seed: int = 5) -> Tensors:
    a, b = randn(rank, columns, seed=seed), randn(rows, rank, seed=seed)
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def times(tensors: Tensors, module: str) -> torch.Tensor:
    return tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]


def assert_windows_agree(reader: WeightReader, name: str) -> None:
    """The same bits, however a tensor is cut."""
    whole = read(reader, name).reshape(-1)
    for step in (1 << 20, 97, 31, 1):
        for start in range(0, whole.numel(), max(step, 37)):
            stop = min(start + step, whole.numel())
            assert torch.equal(reader.window(name, start, stop), whole[start:stop])
            reader.give_back(name, start, stop)


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
def test_the_product_is_added_and_the_rest_is_the_base(tmp_path: Path, pickled: bool) -> None:
    base = save_base(tmp_path / "base")
    tensors = product("layers.0.q")
    reader = AdaptedWeights(base, save_adapter(tmp_path / "adapter", tensors, pickled=pickled))
    expected = read(base, "layers.0.q.weight") + 1.5 * times(tensors, "layers.0.q")
    assert torch.allclose(read(reader, "layers.0.q.weight"), expected, atol=1e-5)
    assert reader.names == base.names
    assert reader.resident_bytes == 0
    for name in base.names:
        assert reader.info(name) == base.info(name)
        assert torch.equal(read(reader, name), read(base, name)) is (name != "layers.0.q.weight")


def test_windows_give_the_same_bits_as_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "TILE_ELEMENTS", 7 * COLUMNS)
    base = save_base(tmp_path / "base", torch.bfloat16)
    tensors = product("layers.0.q") | {
        "embed.lora_embedding_A": randn(4, 50),
        "embed.lora_embedding_B": randn(COLUMNS, 4),
        "head.weight": randn(50, COLUMNS, seed=9),
    }
    reader = AdaptedWeights(base, save_adapter(tmp_path / "adapter", tensors))
    for name in reader.names:
        assert_windows_agree(reader, name)


def test_the_sum_is_rounded_once(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", torch.bfloat16)
    tensors = {name: tensor.bfloat16() for name, tensor in product("layers.0.q").items()}
    reader = AdaptedWeights(base, save_adapter(tmp_path / "adapter", tensors))
    exact = read(base, "layers.0.q.weight").double() + 1.5 * times(
        {name: tensor.double() for name, tensor in tensors.items()}, "layers.0.q"
    )
    got = read(reader, "layers.0.q.weight")
    assert got.dtype == torch.bfloat16
    assert (got == exact.bfloat16()).double().mean() > 0.999


def test_scales_by_module_and_by_root(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    tensors = product("layers.0.q") | product("layers.1.q", rank=2)
    for stabilised, scales in [(False, (6 / 4, 10 / 2)), (True, (6 / math.sqrt(4), 10 / math.sqrt(2)))]:
        config: dict[str, Any] = {
            "rank_pattern": {"1.q": 2},
            "alpha_pattern": {r"layers\.1\.q": 10},
            "use_rslora": stabilised,
        }
        reader = AdaptedWeights(base, save_adapter(tmp_path / "adapter", tensors, **config))
        for layer, scale in enumerate(scales):
            module = f"layers.{layer}.q"
            expected = read(base, f"{module}.weight") + scale * times(tensors, module)
            assert torch.allclose(read(reader, f"{module}.weight"), expected, atol=1e-5)


def test_a_pattern_fits_a_whole_name_or_its_end_after_a_dot() -> None:
    ranks = {"q": 2, "layers.1.k": 3, "x.k": 5}
    config = adapters.LoraConfig(8, 8, ranks, {}, rank_stabilised=False, transposed=False)
    names = ["q", "layers.0.q", "layers.0.qq", "layers.11.k", "layers.1.k", "wx.k"]
    assert [config.rank_of(name) for name in names] == [2, 2, 8, 8, 3, 8]


def test_transposed_layers_embeddings_and_convolutions(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    transposed = product("layers.0.q", rows=COLUMNS, columns=ROWS)  # a Conv1D: W is (in, out)
    reader = AdaptedWeights(base, save_adapter(tmp_path / "a", transposed, fan_in_fan_out=True))
    expected = read(base, "layers.0.q.weight") + 1.5 * times(transposed, "layers.0.q").T
    assert torch.allclose(read(reader, "layers.0.q.weight"), expected, atol=1e-5)

    a, b = randn(4, 50), randn(COLUMNS, 4)
    embedding = {"embed.lora_embedding_A": a, "embed.lora_embedding_B": b}
    reader = AdaptedWeights(base, save_adapter(tmp_path / "b", embedding))
    assert torch.allclose(read(reader, "embed.weight"), read(base, "embed.weight") + 1.5 * (b @ a).T, atol=1e-5)

    a, b = randn(4, 3, 2, 5), randn(8, 4, 1, 1)
    convolution = {"conv.lora_A.weight": a, "conv.lora_B.weight": b}
    reader = AdaptedWeights(base, save_adapter(tmp_path / "c", convolution, fan_in_fan_out=True))
    expected = read(base, "conv.weight") + 1.5 * torch.einsum("or,rihw->oihw", b[:, :, 0, 0], a)
    assert torch.allclose(read(reader, "conv.weight"), expected, atol=1e-5)
    # What the two convolutions do one after the other is what the adapted one does.
    x = randn(1, 3, 9, 9)
    two = torch.conv2d(x, read(base, "conv.weight")) + 1.5 * torch.conv2d(torch.conv2d(x, a), b)
    assert torch.allclose(torch.conv2d(x, read(reader, "conv.weight")), two, atol=1e-3)


def test_whole_tensors_and_biases_replace_and_add(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    tensors = product("layers.0.q") | {
        "head.weight": randn(53, COLUMNS),  # a vocabulary with three tokens more
        "layers.0.q.base_layer.bias": randn(ROWS, seed=3),
        "layers.0.q.lora_B.bias": randn(ROWS, seed=4),
    }
    reader = AdaptedWeights(base, save_adapter(tmp_path / "adapter", tensors))
    assert torch.equal(read(reader, "head.weight"), tensors["head.weight"])
    assert reader.info("head.weight") == TensorInfo((53, COLUMNS), torch.float32)
    bias = tensors["layers.0.q.base_layer.bias"] + 1.5 * tensors["layers.0.q.lora_B.bias"]
    assert torch.allclose(read(reader, "layers.0.q.bias"), bias, atol=1e-6)


def test_a_replacement_has_the_bases_dtype(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", torch.bfloat16)
    reader = AdaptedWeights(base, save_adapter(tmp_path / "adapter", {"head.weight": randn(50, COLUMNS)}))
    assert torch.equal(read(reader, "head.weight"), randn(50, COLUMNS).bfloat16())


def save_tied(folder: Path) -> TorchWeights:
    shared = randn(50, COLUMNS)
    torch.save({"embed.weight": shared, "head.weight": shared, "third.weight": shared}, folder / "tied.pt")
    return TorchWeights(folder / "tied.pt")


def test_a_tied_tensor_is_adapted_under_all_its_names(tmp_path: Path) -> None:
    base = save_tied(tmp_path)
    reader = AdaptedWeights(base, save_adapter(tmp_path / "adapter", product("head", rows=50)))
    assert reader.ties == {"head.weight": "embed.weight", "third.weight": "embed.weight"}
    expected = read(base, "embed.weight") + 1.5 * times(product("head", rows=50), "head")
    for name in base.names:
        assert torch.allclose(read(reader, name), expected, atol=1e-5)
    with pytest.raises(InvalidData, match="tied to another module that is adapted too"):
        both = product("head", rows=50) | product("embed", rows=50, seed=7)
        AdaptedWeights(base, save_adapter(tmp_path / "adapter", both))


def test_a_replaced_tensor_is_no_longer_tied(tmp_path: Path) -> None:
    base = save_tied(tmp_path)
    new = randn(50, COLUMNS, seed=3)
    reader = AdaptedWeights(base, save_adapter(tmp_path / "adapter", {"embed.weight": new}))
    assert reader.ties == {"third.weight": "head.weight"}
    assert torch.equal(read(reader, "embed.weight"), new)
    assert torch.equal(read(reader, "third.weight"), read(base, "third.weight"))


WRONG_TENSORS: dict[str, tuple[Tensors, str]] = {
    "no A": ({"layers.0.q.lora_B.weight": randn(ROWS, 4)}, "'layers.0.q' has only lora_B.weight"),
    "no B": ({"layers.0.q.lora_A.weight": randn(4, COLUMNS)}, "'layers.0.q' has only lora_A.weight"),
    "A of one, B of another": (
        {"embed.lora_embedding_A": randn(4, 50), "embed.lora_B.weight": randn(50, 4)},
        "'embed' has only",
    ),
    "no such module": (product("layers.7.q"), "adapts 'layers.7.q.weight', which the base model does not have"),
    "another width": (product("layers.0.q", columns=29), r"'layers.0.q': A is \[4, 29\]"),
    "another height": (product("layers.0.q", rows=41), r"B \[41, 4\]"),
    "another rank": (product("layers.0.q", rank=3), "of rank 4 by the configuration"),
    "a matrix for a convolution": (product("conv", rows=8, columns=30), "'conv': A is"),
    "DoRA": (product("layers.0.q") | {"layers.0.q.lora_magnitude_vector": randn(ROWS)}, "belongs to no sum"),
    "a tensor for nothing": ({"tail.weight": randn(3)}, "replaces nothing: the base has no 'tail.weight'"),
    "a tensor of another shape": ({"head.weight": randn(50, 29)}, r"'head.weight' of the base is"),
    "integers": ({"head.weight": torch.ones(50, COLUMNS, dtype=torch.int8)}, "torch.int8"),
    "a bias of another shape": (
        product("layers.0.q") | {"layers.0.q.lora_B.bias": randn(ROWS + 1)},
        "bias of 'layers.0.q' has another shape",
    ),
    "a bias where there is none": (
        product("layers.1.q") | {"layers.1.q.lora_B.bias": randn(ROWS)},
        "adapts 'layers.1.q.bias'",
    ),
}


@pytest.mark.parametrize(("tensors", "message"), WRONG_TENSORS.values(), ids=list(WRONG_TENSORS))
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, tensors: Tensors, message: str) -> None:
    with pytest.raises(InvalidData, match=message):
        AdaptedWeights(save_base(tmp_path / "base"), save_adapter(tmp_path / "adapter", tensors))


WRONG_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "'use_dora' is set"),
    "layers repeated": ({"layer_replication": [[0, 4]]}, "'layer_replication' is set"),
    "a changed base": ({"init_lora_weights": "pissa_niter_4"}, "changes the base's weights too"),
    "another kind": ({"peft_type": "IA3"}, "'peft_type' is 'IA3'"),
    "no rank": ({"r": 0}, "a rank or an alpha is 0"),
    "a word for alpha": ({"lora_alpha": "8"}, "a rank or an alpha is '8'"),
    "a rank of a module": ({"rank_pattern": {"q": -1}}, "a rank or an alpha is -1"),
    "patterns as a list": ({"rank_pattern": [1]}, "'rank_pattern' is"),
    "no pattern": ({"alpha_pattern": {"(": 3}}, r"'\(' in an adapter's rank_pattern"),
}


@pytest.mark.parametrize(("config", "message"), WRONG_CONFIGS.values(), ids=list(WRONG_CONFIGS))
def test_configurations_of_other_maths_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidData, match=message):
        AdaptedWeights(save_base(tmp_path / "base"), save_adapter(tmp_path / "a", product("layers.0.q"), **config))


def test_a_folder_without_adapter_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    with pytest.raises(InvalidData, match=r"adapter_config\.json"):
        AdaptedWeights(base, tmp_path / "base")
    folder = save_adapter(tmp_path / "adapter", product("layers.0.q"))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InvalidData, match="has neither"):
        AdaptedWeights(base, folder)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(InvalidData, match="'peft_type' is None"):
        AdaptedWeights(base, folder)


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_file({"q.weight": torch.ones(ROWS, COLUMNS, dtype=torch.int8)}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(InvalidData, match="before quantisation"):
        AdaptedWeights(SafetensorsWeights(tmp_path / "base"), save_adapter(tmp_path / "adapter", product("q")))


VOCABULARY, WIDTH, RANK = 150_000, 16, 64


def save_vocabulary(folder: Path, *, embedding: bool) -> AdaptedWeights:
    """A table of 9 MiB and an adapter of 37 MiB: more rows than a window touches."""
    (folder / "base").mkdir()
    save_file({"embed.weight": torch.randn(VOCABULARY, WIDTH)}, folder / "base" / "model.safetensors")
    high, wide = torch.randn(VOCABULARY, RANK), torch.randn(RANK, WIDTH)
    tensors = {"embed.lora_A.weight": wide, "embed.lora_B.weight": high}
    if embedding:
        tensors = {
            "embed.lora_embedding_A": high.T.contiguous(),
            "embed.lora_embedding_B": wide.T.contiguous(),
        }
    return AdaptedWeights(
        SafetensorsWeights(folder / "base"), save_adapter(folder / "adapter", tensors, r=RANK, lora_alpha=RANK)
    )


@pytest.mark.parametrize("embedding", [False, True], ids=["linear", "embedding"])
def test_only_the_rows_of_a_window_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedding: bool) -> None:
    reader = save_vocabulary(tmp_path, embedding=embedding)
    read_bytes = 0
    window = WeightFile.window

    def counted(file: WeightFile, offset: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        nonlocal read_bytes
        read_bytes += count * dtype.itemsize
        return window(file, offset, count, dtype)

    monkeypatch.setattr(WeightFile, "window", counted)
    tile = adapters.TILE_ELEMENTS
    for start in range(0, VOCABULARY * WIDTH, tile):
        reader.window("embed.weight", start, min(start + tile, VOCABULARY * WIDTH))
    tiles = -(-VOCABULARY * WIDTH // tile)
    assert read_bytes == 4 * (VOCABULARY * (WIDTH + RANK) + tiles * WIDTH * RANK)


@pytest.mark.parametrize("embedding", [False, True], ids=["linear", "embedding"])
def test_a_window_takes_no_more_memory_than_is_said(tmp_path: Path, embedding: bool) -> None:
    reader = save_vocabulary(tmp_path, embedding=embedding)
    reader.window("embed.weight", 0, 1)  # what a library takes when it is first used
    for elements in (1000, 300_000, VOCABULARY * WIDTH):
        said = reader.window_bytes("embed.weight", elements) + 4 * elements
        start = (VOCABULARY * WIDTH - elements) // 2
        peak = peak_bytes_of(partial(reader.window, "embed.weight", start, start + elements))
        assert peak <= said
    assert reader.window_bytes("embed.weight", 1000) < 4 * VOCABULARY * RANK // 2


def test_what_windows_take_of_replaced_and_biased_tensors(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", torch.bfloat16)
    tensors = product("layers.0.q") | {"head.weight": randn(50, COLUMNS), "layers.0.q.lora_B.bias": randn(ROWS)}
    reader = AdaptedWeights(base, save_adapter(tmp_path / "adapter", tensors))
    assert reader.window_bytes("layers.1.q.weight", 10) == 0
    assert reader.window_bytes("head.weight", 10) == 10 * 4  # as it is in the adapter
    assert reader.window_bytes("layers.0.q.bias", 10) == 10 * (2 + 4 + 2 * 4)
    factors = 4 * (ROWS * 4 + 4 * COLUMNS)
    assert reader.window_bytes("layers.0.q.weight", 10) > factors + adapters.LIBRARY_BYTES


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
def test_an_adapter_adds_its_files_to_the_bases(tmp_path: Path, pickled: bool) -> None:
    base = save_base(tmp_path / "base")
    folder = save_adapter(tmp_path / "adapter", product("layers.0.q"), pickled=pickled)
    weights = folder / ("adapter_model.bin" if pickled else "adapter_model.safetensors")
    expected = [tmp_path / "base" / "model.safetensors", folder / "adapter_config.json", weights]
    assert list(AdaptedWeights(base, folder).files) == expected
