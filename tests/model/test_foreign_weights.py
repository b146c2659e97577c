"""Tests for weights that come from elsewhere: a model of equal function is read, others are named.

No file may cause another exception than `FormatError`, or take time or memory by what it claims.
"""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import GPT, GPTConfig, checkpoint
from model.errors import FormatError

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=32, vocab_size=300)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TABLE, HEAD = "transformer.wte.weight", "lm_head.weight"

Change = Callable[[dict[str, Tensor]], object]


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    GPT(CONFIG, seed=2).to_hf(tmp_path)
    return tmp_path


def edit(folder: Path, change: Change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def set_keys(path: Path, values: dict[str, Any], without: tuple[str, ...] = ()) -> None:
    old = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**old, **values}.items() if k not in without}))


def shard(folder: Path) -> None:
    """Distribute the weights over two files with an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names, index = sorted(tensors), {}
    for i, part in enumerate((names[:9], names[9:])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        index.update(dict.fromkeys(part, file))
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))


def is_the_model(folder: Path) -> bool:
    read, expected = GPT.from_hf(folder).state_dict(), GPT(CONFIG, seed=2).state_dict()
    return all(torch.equal(read[name], expected[name]) for name in expected)


# -- models of equal function --------------------------------------------------------------------


def as_published(tensors: dict[str, Tensor]) -> None:
    """No prefix, and masks; others store the tied head as well."""
    for name in list(tensors):
        tensors[name.removeprefix("transformer.")] = tensors.pop(name)
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    tensors["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    tensors[HEAD] = tensors["wte.weight"].clone()


@pytest.mark.parametrize(
    "change", [as_published, lambda t: t.update({HEAD: t.pop(TABLE)}), lambda t: None]
)
def test_tied_weights_are_read_under_either_name(exported: Path, change: Change) -> None:
    edit(exported, change)
    assert is_the_model(exported)
    shard(exported)
    assert is_the_model(exported)


@pytest.mark.parametrize(
    "name", ["gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"]
)
def test_each_name_of_the_tanh_gelu_is_the_same_function(exported: Path, name: str) -> None:
    activations = pytest.importorskip("transformers.activations")
    x = torch.linspace(-12, 12, 10_001)
    expected = torch.nn.functional.gelu(x.double(), approximate="tanh")
    assert (activations.ACT2FN[name](x) - expected).abs().max() < 1e-6
    assert (activations.ACT2FN["gelu"](x) - expected).abs().max() > 1e-4  # another function
    set_keys(exported / "config.json", {"activation_function": name})
    assert is_the_model(exported)


ALIASES = {
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
}


def test_config_keys_have_the_aliases_of_transformers(exported: Path) -> None:
    path = exported / "config.json"
    values = json.loads(path.read_text())
    set_keys(path, {alias: values[key] for alias, key in ALIASES.items()}, tuple(ALIASES.values()))
    assert is_the_model(exported)
    assert GPT.from_hf(exported).config == CONFIG
    set_keys(path, {"n_layer": 3})
    with pytest.raises(
        FormatError, match=r"config\.json: num_hidden_layers is 2, but n_layer is 3"
    ):
        GPT.from_hf(exported)


# -- others are refused by name ------------------------------------------------------------------

BAD: list[tuple[Change, str]] = [
    (lambda t: t[TABLE][7].fill_(float("nan")), rf"'{TABLE}'.* 16 of 4800"),
    (lambda t: t["transformer.ln_f.bias"][3:4].fill_(float("inf")), r"'transformer\.ln_f\.bias'"),
    (lambda t: t.update({TABLE: t[TABLE].double() + 1e300}), TABLE),  # overflows in float32
    (lambda t: t.update({TABLE: t[TABLE].to(torch.int8)}), rf"{TABLE}.*int8"),
    (lambda t: t.update({TABLE: t[TABLE].to(torch.complex64)}), rf"{TABLE}.*complex64"),
    (lambda t: t.update({"wte.weight": torch.zeros(300, 16)}), rf"{TABLE}.*'wte\.weight'"),
    (lambda t: t.update({HEAD: t[TABLE][:299].clone()}), rf"'{HEAD}' is \(299, 16\).*\(300, 16\)"),
    (lambda t: t.update({HEAD: torch.zeros(300, 16)}), rf"'{HEAD}'.*'{TABLE}'"),
    # sizes are those in the file: [in, out], and without padding
    (lambda t: t.update({TABLE: torch.zeros(9, 16)}), r"\(9, 16\).*\(300, 16\)"),
    (
        lambda t: t.update({"transformer.h.1.mlp.c_fc.weight": torch.zeros(64, 16)}),
        r"'transformer\.h\.1\.mlp\.c_fc\.weight' is \(64, 16\).*\(16, 64\)",
    ),
    (lambda t: t.pop("transformer.ln_f.bias"), r"ln_f\.bias"),
    (lambda t: t.update({"score.weight": torch.zeros(2)}), r"score\.weight"),
    (lambda t: t.update({"transformer.h.2.ln_1.bias": torch.zeros(16)}), r"h\.2\.ln_1\.bias"),
]


@pytest.mark.parametrize(("change", "named"), BAD)
def test_wrong_tensors_are_named_as_they_are_in_the_file(
    exported: Path, change: Change, named: str
) -> None:
    edit(exported, change)
    with pytest.raises(FormatError, match=named) as caught:
        GPT.from_hf(exported)
    assert "\n" not in str(caught.value)


def test_non_finite_weights_of_a_checkpoint_are_named(tmp_path: Path) -> None:
    state = GPT(CONFIG).state_dict()
    state["h.1.ln_2.weight"][0] = float("-inf")
    checkpoint.write(tmp_path, CONFIG, state, {})
    with pytest.raises(FormatError, match=r"h\.1\.ln_2\.weight.* 1 of 16"):
        GPT.from_checkpoint(tmp_path)


def test_shards_and_index_must_agree(exported: Path) -> None:
    shard(exported)
    index = json.loads((exported / INDEX).read_text())["weight_map"]
    first, second = sorted(set(index.values()))

    def refused(weight_map: Any, named: str) -> None:
        (exported / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(FormatError, match=named) as caught:
            GPT.from_hf(exported)
        assert "\n" not in str(caught.value)

    without = {name: file for name, file in index.items() if name != TABLE}
    refused(without, rf"{second}: tensor '{TABLE}'")
    refused({**index, TABLE: first}, rf"{second}: tensor '{TABLE}'")
    refused({**index, "transformer.h.9.x": second}, rf"{second}: tensor 'transformer\.h\.9\.x'")
    refused({**index, TABLE: "gone.safetensors"}, r"gone\.safetensors")
    others: list[Any] = [None, [second], second, 3, {}]
    for other in others:
        refused(other, rf"{INDEX}: key 'weight_map'")
    for file in (
        "../x.safetensors",
        "/x.safetensors",
        "x.bin",
        "\0.safetensors",
        "\ud800",
        7,
        None,
    ):
        refused({**index, TABLE: file}, rf"{INDEX}: ")
    (exported / INDEX).write_text("{}")
    with pytest.raises(FormatError, match=rf"{INDEX}: key 'weight_map'"):
        GPT.from_hf(exported)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("activation_function", "gelu"),
        ("activation_function", ["gelu_new"]),
        ("layer_norm_epsilon", 1e-6),
        ("scale_attn_by_inverse_layer_idx", True),
        ("tie_word_embeddings", False),
        ("n_inner", 17),
        ("n_head", 5),
        ("n_embd", "x" * 10_000),
        ("n_layer", 10**4000),
        ("vocab_size", None),
    ],
)
def test_other_architectures_are_named_by_key(exported: Path, key: str, value: object) -> None:
    set_keys(exported / "config.json", {key: value})
    with pytest.raises(FormatError, match=key) as caught:
        GPT.from_hf(exported)
    assert len(str(caught.value)) < 400


def test_missing_files_are_named_and_pickles_need_conversion(exported: Path) -> None:
    with pytest.raises(FormatError, match=r"config\.json"):
        GPT.from_hf(exported / "nowhere")
    (exported / WEIGHTS).rename(exported / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"model\.safetensors.*save_pretrained"):
        GPT.from_hf(exported)


@pytest.mark.parametrize(("dtype", "width"), [("F4", 0.5), ("F8_E8M0", 1), ("C64", 8), ("I32", 4)])
def test_weights_of_another_type_are_refused(exported: Path, dtype: str, width: float) -> None:
    tensors = load_file(exported / WEIGHTS)
    entries, end = {}, 0
    for name, tensor in tensors.items():
        size = int(tensor.numel() * width)
        entries[name] = {
            "dtype": dtype, "shape": list(tensor.shape), "data_offsets": [end, end + size],
        }  # fmt: skip
        end += size
    (exported / WEIGHTS).write_bytes(header(json.dumps(entries)) + bytes(end))
    with pytest.raises(FormatError, match=r"model\.safetensors: tensor "):
        GPT.from_hf(exported)


def test_a_pipe_in_place_of_the_weights_is_refused(exported: Path) -> None:
    (exported / WEIGHTS).unlink()
    os.mkfifo(exported / WEIGHTS)
    # with a writer, so that without the check the test fails instead of waiting
    writer = os.open(exported / WEIGHTS, os.O_RDWR)
    try:
        with pytest.raises(FormatError, match=r"model\.safetensors is not a regular file"):
            GPT.from_hf(exported)
    finally:
        os.close(writer)


# -- bombs ---------------------------------------------------------------------------------------

DEEP = "[" * 1_000_000


def header(text: str, length: int | None = None) -> bytes:
    data = text.encode()
    return (len(data) if length is None else length).to_bytes(8, "little") + data


BOMBS: list[tuple[str, dict[str, Any] | str | bytes]] = [
    ("config.json", {"n_layer": 10**9}),
    ("config.json", {"n_embd": 2**31 - 2}),
    ("config.json", {"vocab_size": 2**31 - 1}),
    ("config.json", {"vocab_size": 2**60}),
    ("config.json", {"n_positions": 2**31 - 1}),
    ("config.json", DEEP),
    ("config.json", '{"n_layer":' + DEEP),
    ("config.json", '{"n_layer": ' + "9" * 1_000_000 + "}"),
    ("config.json", "{}" + " " * 2**25),
    (WEIGHTS, header("{}", 2**60)),
    (WEIGHTS, header("{}", 2**63)),
    (WEIGHTS, header(DEEP)),
    (WEIGHTS, header('{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}')),
    (WEIGHTS, header('{"a":{"dtype":"F32","shape":[9223372036854775807,4],"data_offsets":[0,0]}}')),
    (WEIGHTS, b""),
]  # fmt: skip


@pytest.mark.parametrize(("file", "content"), BOMBS)
def test_a_bomb_is_refused_at_once(
    exported: Path, tmp_path_factory: pytest.TempPathFactory, file: str, content: Any
) -> None:
    """The same with a checkpoint of ours, whose `state.json` holds the config."""
    ours = tmp_path_factory.mktemp("ours")
    checkpoint.write(ours, CONFIG, GPT(CONFIG).state_dict(), {})
    if isinstance(content, dict):
        set_keys(exported / file, content)
        (key, value), *_ = content.items()
        model = {**CONFIG.to_dict(), "block_size" if key == "n_positions" else key: value}
        (ours / "state.json").write_text(json.dumps({"model": model}))
    else:
        data = content if isinstance(content, bytes) else content.encode()
        (exported / file).write_bytes(data)
        (ours / ("state.json" if file == "config.json" else file)).write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (lambda: GPT.from_hf(exported), lambda: GPT.from_checkpoint(ours)):
        with pytest.raises(FormatError) as caught:
            read()
        assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    SCALARS,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module", params=["one file", "shards"])
def contents(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("good")
    GPT(CONFIG, seed=2).to_hf(folder)
    if request.param == "shards":
        shard(folder)
    names = sorted(path.name for path in folder.glob("[cm]*"))
    return {name: (folder / name).read_bytes() for name in names}


def damage(draw: Callable[..., Any], value: Any) -> Any:
    """Replace one part of a JSON value."""
    if isinstance(value, dict) and value and draw(st.integers(0, 3), "depth"):
        key = draw(st.sampled_from(sorted(value)))
        return {**value, key: damage(draw, value[key])}
    return draw(JSON)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_changes_nothing(
    contents: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Config, index and headers: with another value or byte, or cut short."""
    folder = tmp_path_factory.mktemp("damaged")
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    name = data.draw(st.sampled_from(list(contents)))
    content, start = contents[name], 8 if name.endswith(".safetensors") else 0
    end = 8 + int.from_bytes(content[:8], "little") if start else len(content)
    kind = data.draw(st.sampled_from(["value", "byte", "cut"]))
    if kind == "value":
        text = json.dumps(damage(data.draw, json.loads(content[start:end]))).encode()
        content = (len(text).to_bytes(8, "little") if start else b"") + text + content[end:]
    elif kind == "byte":
        at = data.draw(st.integers(0, end - 1))
        content = content[:at] + bytes([data.draw(st.integers(0, 255))]) + content[at + 1 :]
    else:
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    (folder / name).write_bytes(content)
    with suppress(FormatError):
        assert is_the_model(folder)
