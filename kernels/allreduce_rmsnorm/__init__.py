"""All-reduce over ranks, residual and RMSNorm in one launch a rank.

`launch.py` holds the call, `group.py` who the ranks are and the memory they share, `kernels.py` what runs on the
device, `barrier.py` how ranks wait for each other, `dispatch.py` which way is taken at which size.
"""

from moe_fuzz.kernels.allreduce_rmsnorm.group import Group, LocalGroup, RankGroup, RankTimeout
from moe_fuzz.kernels.allreduce_rmsnorm.launch import allreduce_rmsnorm

__all__ = ["Group", "LocalGroup", "RankGroup", "RankTimeout", "allreduce_rmsnorm"]
