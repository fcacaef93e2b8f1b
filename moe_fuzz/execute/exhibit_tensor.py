"""A tensor of an exhibit (execute/exhibit.py): dtype, shape and bits in plain values. Worker side."""

from __future__ import annotations

import base64
import sys
import zlib
from typing import Any

import torch

MAX_LITERAL = 256  # elements; a longer tensor is compressed


def tensor(plain: torch.Tensor) -> dict[str, Any]:
    """dtype, shape and bits of a tensor."""
    data = plain.contiguous().flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    found: dict[str, Any] = {"dtype": str(plain.dtype).removeprefix("torch."), "shape": list(plain.shape)}
    if plain.numel() > MAX_LITERAL:
        # level 9 takes ten times as long on whole numbers, for a tenth less
        return found | {"zlib": base64.b64encode(zlib.compress(data, level=6)).decode()}
    size = plain.element_size()
    return found | {"bits": [int.from_bytes(data[i : i + size], sys.byteorder) for i in range(0, len(data), size)]}
