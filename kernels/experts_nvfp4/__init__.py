"""The experts of a layer with weights in NVFP4: as `experts_bf16`, with weights decoded on their way.

`launch.py` holds the call, `kernels.py` the product that decodes, `decode.py` the decoding, `prepare.py` what runs
before, `blocks.py` the table of block shapes and the choice of a backend.
"""

from moe_fuzz.kernels.experts_nvfp4.blocks import BACKENDS, choose_backend, devices, formats, rule
from moe_fuzz.kernels.experts_nvfp4.launch import experts_nvfp4, workspace_bytes

__all__ = ["BACKENDS", "choose_backend", "devices", "experts_nvfp4", "formats", "rule", "workspace_bytes"]
