"""The header parser takes what the reference writes and refuses everything else with a sentence."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from core.errors import LoraFileError
from core.lora_header import MAX_HEADER_BYTES, TensorInfo, read_header

TENSORS = {"lora_unet_a.lora_down.weight": torch.ones(4, 8), "lora_unet_a.alpha": torch.tensor(2.0)}
WHOLE = save(TENSORS, metadata={"ss_network_dim": "4"})


def write(folder: Path, header: object, data: bytes = b"", *, text: bytes | None = None) -> Path:
    """A file with any header, sane or not."""
    body = json.dumps(header).encode() if text is None else text
    path = folder / "file.safetensors"
    path.write_bytes(len(body).to_bytes(8, "little") + body + data)
    return path


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_file_of_the_reference_library_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(TENSORS | {"half": torch.ones(3, dtype=torch.float16)}, path, metadata={"ss_network_dim": "4"})
    header = read_header(path)
    assert header.tensors["lora_unet_a.lora_down.weight"] == TensorInfo("F32", (4, 8))
    assert header.tensors["lora_unet_a.alpha"] == ("F32", ())
    assert header.tensors["half"] == ("F16", (3,))
    assert header.metadata == {"ss_network_dim": "4"}


ODD_HEADERS = {
    "no tensors": ({"__metadata__": {"a": "b"}}, b"", "no tensors"),
    "empty object": ({}, b"", "no tensors"),
    "a list": ([1, 2], b"", "not a JSON object"),
    "trailing bytes": ({"a": entry([1], 0, 4)}, b"12345", "extra bytes"),
    "cut off": ({"a": entry([2], 0, 8)}, b"1234", "cut off"),
    "gap": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"x" * 12, "gap or overlap"),
    "overlap": ({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, b"x" * 8, "gap or overlap"),
    "shape does not fill": ({"a": entry([3], 0, 4)}, b"x" * 4, "does not fill"),
    "overflowing shape": ({"a": entry([2**62, 4], 0, 0)}, b"", "does not fill"),
    "empty tensor": ({"a": entry([2**60, 0], 0, 0)}, b"", "is empty"),
    "five dimensions": ({"a": entry([1, 1, 1, 1, 1], 0, 4)}, b"x" * 4, "at most 4"),
    "negative size": ({"a": entry([-1], 0, 4)}, b"x" * 4, "whole numbers"),
    "a truth value as size": ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"x" * 4, "whole"),
    "negative offset": ({"a": entry([1], -4, 0)}, b"", "two whole numbers"),
    "unknown type": ({"a": entry([1], 0, 1, "F8_E4M3")}, b"x", "allowed are"),
    "a path as name": ({"../../etc/passwd": entry([1], 0, 4)}, b"x" * 4, "odd name"),
    "dots in a row": ({"a..b": entry([1], 0, 4)}, b"x" * 4, "odd name"),
    "markup as name": ({"<script>": entry([1], 0, 4)}, b"x" * 4, "odd name"),
    "a very long name": ({"a" * 300: entry([1], 0, 4)}, b"x" * 4, "odd name"),
    "an extra field": ({"a": entry([1], 0, 4) | {"more": 1}}, b"x" * 4, "exactly"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": entry([1], 0, 4)}, b"x" * 4, "text to text"),
    "too many tensors": ({f"t{i}": entry([1], 4 * i, 4 * i + 4) for i in range(20_001)}, b"", "more than 20000"),
}


@pytest.mark.parametrize("case", ODD_HEADERS)
def test_an_odd_header_is_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    header, data, reason = ODD_HEADERS[case]
    with pytest.raises(LoraFileError, match=reason):
        read_header(write(tmp_path, header, data))


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    one = json.dumps(entry([1], 0, 4))
    path = write(tmp_path, None, b"x" * 4, text=f'{{"a":{one},"a":{one}}}'.encode())
    with pytest.raises(LoraFileError, match="twice"):
        read_header(path)


@pytest.mark.parametrize(
    "text",
    [b"[" * 100_000, b"{" * 10, b'{"a": NaN}', b"\xff\xfe{}", b' {"a": 1}', b'{"a": ' + b"9" * 10_000 + b"}", b"null"],
)
def test_a_header_that_is_no_sane_json_is_refused(text: bytes, tmp_path: Path) -> None:
    with pytest.raises(LoraFileError):
        read_header(write(tmp_path, None, text=text))


def test_a_huge_announced_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bomb.safetensors"
    path.write_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
    with path.open("ab") as file:
        file.truncate(200 * 1024 * 1024)  # sparse: costs no disk
    with pytest.raises(LoraFileError, match="announces a header"):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"1234567", b"PK\x03\x04" + b"\0" * 100, b"\x80\x04\x95" + b"\0" * 50])
def test_a_short_file_a_zip_and_a_pickle_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(LoraFileError):
        read_header(path)


def test_a_missing_file_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(LoraFileError, match="cannot be read"):
        read_header(tmp_path / "nothing.safetensors")


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_changed_bytes_give_a_sane_header_or_our_error(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(WHOLE)
    for position, value in changes:
        data[position] = value
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(data)
    try:
        header = read_header(path)
    except LoraFileError as error:
        assert str(error).startswith("mutated.safetensors")
    else:
        assert 1 <= len(header.tensors) <= 2


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(WHOLE) - 1))
def test_every_truncation_is_refused(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    path = tmp_path_factory.getbasetemp() / "truncated.safetensors"
    path.write_bytes(WHOLE[:length])
    with pytest.raises(LoraFileError):
        read_header(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)
FIELDS = st.fixed_dictionaries({"dtype": st.just("F32") | JSON, "shape": JSON, "data_offsets": JSON})


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "b.alpha", "__metadata__"]), JSON | FIELDS, max_size=3) | JSON)
def test_any_json_as_header_is_refused_or_understood(tmp_path_factory: pytest.TempPathFactory, header: object) -> None:
    path = write(tmp_path_factory.getbasetemp(), header, b"x" * 4)
    try:
        read_header(path)
    except LoraFileError as error:
        assert len(str(error)) > 20
