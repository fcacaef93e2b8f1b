"""Quantizing to NVFP4 fused with silu(gate) * up, beside the two launches that it replaces and beside plain PyTorch.

    PYTHONPATH=. python benchmarks/quantize_silu.py [--tokens 8,512,32768] [--json FILE]

Microseconds in CUDA graphs, interleaved; bytes that must move over the time, as a share of a large copy's rate. Each
is verified first: fused and apart may differ where silu's last bit does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch

from moe_fuzz.bench import timing
from moe_fuzz.bench.child import environment
from moe_fuzz.kernels.nvfp4 import nvfp4_quantize
from moe_fuzz.reference.nvfp4 import nvfp4_quantize as reference
from moe_fuzz.targets.torch_nvfp4 import nvfp4_quantize as by_torch

#: Intermediate sizes of a rank, of models that are served in NVFP4.
SIZES = {"qwen3-30b-a3b": 768, "qwen3-vl-235b-a22b-tp4": 384, "deepseek-v3": 2048}
_DIFFER = 0.05  # of the bytes of codes: silu and the product are rounded apart there


def activated(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", default="8,512,32768", help="rows: tokens times top_k")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rate = timing.copy_bandwidth("cuda")
    print(f"{torch.cuda.get_device_name()}: a large copy moves {rate / 1e6:.2f} TB/s")
    found = []
    for name, inter in SIZES.items():
        for rows in map(int, options.tokens.split(",")):
            draw = torch.Generator("cuda").manual_seed(rows)
            x = torch.randn(rows, 2 * inter, device="cuda", generator=draw).bfloat16()
            scale = torch.tensor([300.0], device="cuda")
            expected = reference(x.cpu()[:64], scale.cpu(), "linear", activation="silu")
            calls: dict[str, timing.Call] = {
                "fused": partial(nvfp4_quantize, x, scale, activation="silu"),
                "apart": lambda x=x, scale=scale: nvfp4_quantize(activated(x), scale),  # type: ignore[misc]
                "torch": lambda x=x, scale=scale: by_torch(activated(x), scale),  # type: ignore[misc]
            }
            for label, call in calls.items():
                differ = (call()[0][:64].cpu() != expected[0]).float().mean()
                assert differ < _DIFFER, f"{label}: {differ:.2%} of the codes are others"
            graphs = {label: timing.capture([call], 20) for label, call in calls.items()}
            us = {label: statistics.median(v) for label, v in timing.interleaved(graphs, 20, 30).items()}
            moved = rows * inter * (2 * 2 + 0.5 + 1 / 16)
            found.append({"model": name, "rows": rows, "us": us, "of_copy": moved / rate / us["fused"]})
            print(f"{name:24} rows {rows:6}  " + "  ".join(f"{label} {t:8.2f}" for label, t in us.items())
                  + f"  fused at {moved / rate / us['fused']:.0%} of a copy's rate", flush=True)
            if options.json:
                record = {"command": "python benchmarks/quantize_silu.py", "date": time.strftime("%Y-%m-%d"),
                          **environment(), "unit": "us", "points": found}  # fmt: skip
                options.json.write_text(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
