"""What Triton makes of the routers for Hopper, on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cpu.test_ahead import run

#: Biases that are packed, and that stand apart, beside lists of two, three and five experts.
_PROGRAM = """
import re
import torch
from moe_fuzz.bench.ahead import ahead
from moe_fuzz.kernels.grouped_topk import grouped_topk
from moe_fuzz.kernels.routing import topk_softmax

def fused(experts, stride, router=topk_softmax, **options):
    bias = torch.empty(stride * experts)[::stride]
    with ahead(whole=True) as found:
        router(torch.empty(9, experts, dtype=torch.bfloat16), 3, bias=bias, **options)
    ((name, binary),) = found.binaries
    each = int(re.search(r"EACH=(\\d+)", name)[1])
    print(len(re.findall(r"fma[.]rn[.]f32", binary.asm["ptx"])) == each > 1, name)

for stride in (1, 3):
    fused(61, stride)
    fused(160, stride)
    fused(64, stride, grouped_topk, n_group=4, topk_group=2, scoring="softmax", group_score="max", renormalize=False)
fused(96, 3)
"""


def test_scores_with_a_bias_are_computed_alike_for_all_experts(tmp_path: Path) -> None:
    """A product and a sum that are fused for one expert of a list, and not for another, are other bits: with Triton 3.6
    it was so where the biases stand apart, and of two that tie the second was taken."""
    pytest.importorskip("triton.backends.nvidia", reason="this build of Triton has no compiler for NVIDIA")
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    ended = run(str(program))
    assert ended.returncode == 0, ended.stderr
    answers = ended.stdout.splitlines()
    assert len(answers) == 7
    assert not [line for line in answers if not line.startswith("True ")]
