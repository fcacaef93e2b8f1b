"""The tensors of an exhibit (execute/exhibit.py) for a person: numbers, tables and Python literals. Free of torch."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "int32": 4, "bool": 1, "uint8": 1, "float8_e4m3fn": 1,
          "int64": 8}  # bytes; fmt: skip
_WIDTH = 112  # columns of a literal's line, its comment aside
_COLUMNS = 16  # of a table


def values(tensor: Mapping[str, Any]) -> list[float]:
    """The elements, flat, as Python numbers."""
    return [_value(bits, tensor["dtype"]) for bits in _bits(tensor)]


def rows(tensor: Mapping[str, Any]) -> list[list[str]]:
    """The elements as text, row by row; a vector has one row."""
    texts = [number(value) for value in values(tensor)]
    shape = tensor["shape"]
    width = shape[-1] if shape else 1
    return [texts[i * width : (i + 1) * width] for i in range(math.prod(shape[:-1]))]


def number(value: float) -> str:
    """Short, and with the sign of zeros and NaNs."""
    if math.isnan(value):
        return "-nan" if math.copysign(1.0, value) < 0 else "nan"
    return f"{value:.6g}"


def tables(exhibit: Mapping[str, Any]) -> dict[str, str]:
    """Name of each input tensor of a case -> its shape, dtype, layout and values as text."""
    found = {}
    for index, step in enumerate(exhibit["steps"]):
        for name, tensor in step["tensors"].items():
            title = name if len(exhibit["steps"]) == 1 else f"step {index} {name}"
            found[title] = "\n".join([f"{tensor['dtype']} {tensor['shape']}{layout(tensor)}", *_table(rows(tensor))])
    return found


def layout(tensor: Mapping[str, Any]) -> str:
    """`, strides (9, 1), offset 2`, where it is not packed."""
    parts = [f", strides {tuple(tensor['strides'])}"] if tensor["gap"] or tensor["column_stride"] else []
    return "".join([*parts, *([f", offset {tensor['offset']}"] if tensor["offset"] else [])])


def literal(tensor: Mapping[str, Any]) -> str:
    """Python source of `tensor(dtype, shape, bits)` with the values as comments; what it calls is in the template."""
    head = f"torch.{tensor['dtype']}, {tuple(tensor['shape'])}"
    if "zlib" in tensor:
        text = tensor["zlib"]
        lines = [f"    {text[i : i + _WIDTH]!r}" for i in range(0, len(text), _WIDTH)]
        return "\n".join([f"tensor({head}, (  # {summary(tensor)}", *lines, "))"])
    if not tensor["bits"]:
        return f"tensor({head}, [])"
    return "\n".join([f"tensor({head}, [", *_lines(tensor), "])"])


def summary(tensor: Mapping[str, Any]) -> str:
    """What a tensor too long to be printed holds."""
    all_of_them = values(tensor)
    finite = [value for value in all_of_them if math.isfinite(value)]
    parts = [f"{number(min(finite))} to {number(max(finite))}"] if finite else []
    for name, found in (
        ("NaN", sum(map(math.isnan, all_of_them))),
        ("inf", all_of_them.count(math.inf)),
        ("-inf", all_of_them.count(-math.inf)),
    ):
        parts += [f"{found} x {name}"] if found else []
    return f"{len(all_of_them)} values: " + ", ".join(parts)


def _lines(tensor: Mapping[str, Any]) -> Iterator[str]:
    size, whole = _SIZES[tensor["dtype"]], tensor["bits"]
    if size == 8:  # as torch takes them: signed
        whole = struct.unpack(f"={len(whole)}q", struct.pack(f"={len(whole)}Q", *whole))
    digits = "d" if size in (1, 8) else f"#0{2 + 2 * size}x"
    width = tensor["shape"][-1] if tensor["shape"] else 1
    per_line = {1: 16, 2: 6, 4: 4, 8: 8}[size]
    several = len(tensor["shape"]) > 1
    for row, texts in enumerate(rows(tensor)):
        for at in range(0, width, per_line):
            end = min(at + per_line, width)
            integers = [format(bits, digits) for bits in whole[row * width + at : row * width + end]]
            place = f"row {row}" if several else ""
            if width > per_line:
                place = f"{place} [{at}:{end}]".strip()
            shown = "" if size in (1, 8) else f"{place}: {'  '.join(texts[at:end])}".removeprefix(": ")
            yield f"    {', '.join(integers)}," + (f"  # {shown}" if shown else "")


def _table(table: Sequence[Sequence[str]]) -> Iterator[str]:
    """Right-aligned columns; a wide row goes on in further lines."""
    widths = max((len(text) for row in table for text in row), default=0)
    margin = len(str(len(table) - 1))
    for index, row in enumerate(table):
        for at in range(0, max(1, len(row)), _COLUMNS):
            label = str(index).rjust(margin) if at == 0 else " " * margin
            yield f"{label}  {' '.join(text.rjust(widths) for text in row[at : at + _COLUMNS])}".rstrip()


def _bits(tensor: Mapping[str, Any]) -> list[int]:
    if "zlib" not in tensor:
        return list(tensor["bits"])
    data = zlib.decompress(base64.b64decode(tensor["zlib"]))
    kind = {1: "B", 2: "H", 4: "I", 8: "Q"}[_SIZES[tensor["dtype"]]]
    return list(struct.unpack(f"={len(data) // struct.calcsize(kind)}{kind}", data))


def _value(bits: int, dtype: str) -> float:
    if dtype == "float16":
        value: float = struct.unpack("=e", struct.pack("=H", bits))[0]
    elif dtype in ("bool", "uint8"):
        value = float(bits)
    elif dtype == "int64":
        value = float(struct.unpack("=q", struct.pack("=Q", bits))[0])
    elif dtype == "float8_e4m3fn":
        exponent, mantissa = bits >> 3 & 15, bits & 7
        value = math.ldexp(mantissa + 8 * (exponent > 0), max(exponent, 1) - 10) if bits & 127 < 127 else math.nan
        value = math.copysign(value, -1.0 if bits >> 7 else 1.0)
    elif dtype == "int32":
        value = float(struct.unpack("=i", struct.pack("=I", bits))[0])
    else:
        value = struct.unpack("=f", struct.pack("=I", bits << 16 if dtype == "bfloat16" else bits))[0]
    return value
