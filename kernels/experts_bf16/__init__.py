"""The experts of a layer in bfloat16 or float16: two grouped products and a sum.

`launch.py` holds the call, `kernels.py` and `tiles.py` what runs on the device, `blocks.py` the table of block shapes.
"""

from moe_fuzz.kernels.experts_bf16.launch import experts_bf16, workspace_bytes

__all__ = ["experts_bf16", "workspace_bytes"]
