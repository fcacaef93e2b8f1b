"""What a case may cost: as much as an interpreter takes for a kernel of Triton's, far more numbers for any other."""

from __future__ import annotations

import random
from itertools import islice

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from moe_fuzz import strategies
from moe_fuzz.contract import Capabilities, Contract, TargetInfo
from moe_fuzz.ops import get_space
from moe_fuzz.ops.space import Means
from moe_fuzz.restriction import RestrictedSpace, Restriction
from moe_fuzz.targets.bind import bind
from moe_fuzz.targets.reach import has_triton

#: op -> a config, and what of it the old limit of every target on a CPU was: slots, tokens, elements, bytes.
LIMITS = {
    "align": ({"experts": "0-63", "top_k": 8, "block_size": 16, "expert_map": "none", "ids_dtype": "int32",
               "edge": "right", "out": False}, 8, 2056),
    "topk_softmax": ({"experts": "0-127", "top_k": 8}, 1, 513),
    "grouped_topk": ({"experts": "0-127", "top_k": 8, "n_group": 8, "topk_group": 4}, 1, 513),
    "nvfp4_quantize": ({"blocks": "0-31", "layout": "linear", "activation": "none"}, 32, 10584),
    "allreduce_rmsnorm": ({"ranks": 2, "hidden": 1024, "dtype": "bfloat16", "burst": 0, "groups": 1}, 2048, 73728),
    "experts_bf16": ({"experts": "0-63", "top_k": 8, "hidden": 32, "intermediate": 32}, 1, 2),
}  # fmt: skip


def info_of(op: str, triton: bool) -> TargetInfo:
    can = Capabilities(out=True, alignment=1, any_strides=True, compiles=triton)
    return TargetInfo(f"{op}@it", op, "it", contract=Contract(), capabilities=can, triton=triton)


def drawn(op: str, info: TargetInfo, start: int = 0, examples: int = 40, device: str = "cpu") -> list:
    space, found = get_space(op), []

    @seed(start)
    @settings(max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(strategies.rounds(space, info, device))
    def draw(cases):
        found.append(cases)

    draw()
    return found


def most_rows(case) -> int:
    return max(step.tokens for step in case.steps)


@pytest.mark.parametrize("op", LIMITS)
def test_plain_code_is_given_sizes_beyond_those_of_an_interpreter(op):
    space, (config, each, limit) = get_space(op), LIMITS[op]
    interpreted, plain = Means("cpu"), Means("cpu", interpreted=False)
    assert each * max(space.tokens(config, interpreted)) <= limit
    assert each * max(space.tokens(config, plain.more)) > 2 * limit
    assert max(space.tokens(config, plain.more)) > max(space.tokens(config, plain))
    assert max(space.tokens(config, interpreted.more)) >= max(space.tokens(config, interpreted))


def test_a_campaign_on_plain_code_reaches_them():
    slots = {}
    for triton in (True, False):
        info = info_of("align", triton)
        cases = [case for cases in drawn("align", info, 1, 150) for case in cases]
        cases += islice(strategies.grid(get_space("align"), info, "cpu", 1), 300)
        slots[triton] = max(most_rows(case) * int(case.config["top_k"]) for case in cases)
    assert slots[False] > 65536 > 16 * 1024 > slots[True]


@pytest.mark.parametrize("op", ["align", "topk_softmax", "allreduce_rmsnorm", "nvfp4_quantize"])
@pytest.mark.parametrize("triton", [True, False], ids=["interpreted", "plain"])
def test_no_case_costs_more_than_the_larger_means_and_few_cost_more_than_the_ordinary(op, triton):
    """What a config costs at its least is not to be had for less: such a case is as small as can be."""
    space, info = get_space(op), info_of(op, triton)
    means = Means.of(info, "cpu")
    rounds = drawn(op, info, 2, 150)
    assert all(space.affordable(case, means.more) or most_rows(case) <= 8 for cases in rounds for case in cases)
    large = [cases for cases in rounds if any(most_rows(case) > 8 and not space.affordable(case, means)
                                              for case in cases)]  # fmt: skip
    assert all(len(cases) == 1 for cases in large)
    assert len(large) <= len(rounds) / 8


@pytest.mark.parametrize(
    ("op", "triton", "many"), [("experts_bf16", True, False), ("experts_bf16", False, True),
                               ("experts_nvfp4", True, False), ("experts_nvfp4", False, False)]
)  # fmt: skip
def test_large_means_go_into_the_slots_of_few_experts_or_of_very_many(monkeypatch, op, triton, many):
    """More than 8 bits count: of one expert, or of experts that have one each. Among others an expert has few."""
    monkeypatch.setattr(strategies, "LARGE", 1)
    found = [case for cases in drawn(op, info_of(op, triton), examples=180) for case in cases]
    slots = [(len(case.experts), most_rows(case) * int(case.config["top_k"])) for case in found]
    assert sum(experts > 256 and each >= experts if many else each > 256 * experts for experts, each in slots) >= 15
    only = Restriction(values=(("experts", ("8",)),))
    info, space = info_of(op, triton), RestrictedSpace(get_space(op), only)
    config = space.complete({axis.name: axis.values[0] for axis in space.axes(info)}, info)
    allowed = {axis.name: axis.values for axis in space.axes(info)}
    assert space.crowded(config, allowed, info, Means("cpu", triton).more, random.Random(0)) == config


@pytest.mark.parametrize("op", LIMITS)
def test_what_is_drawn_is_the_same_each_time(op):
    for triton in (True, False):
        info = info_of(op, triton)
        assert drawn(op, info, 3, 25) == drawn(op, info, 3, 25)


def test_on_a_gpu_there_is_one_budget():
    means = Means.of(info_of("align", False), "cuda")
    assert means.more is means
    assert get_space("align").tokens(LIMITS["align"][0], means) == get_space("align").tokens(
        LIMITS["align"][0], Means("cuda"))  # fmt: skip
    assert drawn("align", info_of("align", True), 4, 20, "cuda")


@pytest.mark.parametrize(("target", "triton"), [("align@torch", False), ("topk_softmax@torch", False),
                                               ("moe_layer@torch", False), ("align@builtin", True),
                                               ("grouped_topk@builtin", True), ("allreduce_rmsnorm@builtin", True),
                                               ("experts_nvfp4@builtin.large", True)])  # fmt: skip
def test_a_target_knows_whether_it_has_kernels_of_tritons(target, triton):
    assert bind(target).info.triton is triton


SOURCE = """
import functools
import helper_of_{name} as helper
import torch
import triton
import triton.language as tl

@triton.jit
def kernel(x):
    tl.store(x, 1.0)

def launch(x):
    kernel[(1,)](x)

class Held:
    def __init__(self):
        self.run = launch
    def __call__(self, logits, top_k, renormalize=False):
        self.run(logits)

def made(what):
    def route(logits, top_k, renormalize=False):
        return what(logits)
    return route

def plain(logits, top_k, renormalize=False):
    return torch.topk(logits.exp().sum(), triton.cdiv(top_k, 1))

def direct(logits, top_k, renormalize=False):
    launch(logits)

def inner(logits, top_k, renormalize=False):
    return [launch(row) for row in logits]

def of_a_module(logits, top_k, renormalize=False):
    return helper.launch(logits)

def of_a_module_plain(logits, top_k, renormalize=False):
    return helper.other(logits)

def loads(logits, top_k, renormalize=False):
    from not_there_of_{name} import route
    return route(logits)

def operator(logits, top_k, renormalize=False):
    return torch.ops.somebody.route(logits)

class Unready:
    __slots__ = ()
    def __getattr__(self, name):  # as that of a pydantic model which is not built yet
        raise RuntimeError(name)

class Proxy:
    @property
    def __class__(self):  # as that of a proxy without an object
        raise RuntimeError("no object")

unready, proxy = Unready(), Proxy()

def beside_what_answers(logits, top_k, renormalize=False):
    return unready, launch(logits)

def what_answers(logits, top_k, renormalize=False):
    return unready

def beside_a_proxy(logits, top_k, renormalize=False):
    return launch(logits), proxy

def a_proxy(logits, top_k, renormalize=False):
    return proxy

held, closed, open_ = Held(), made(launch), made(torch.sum)
partial = functools.partial(lambda f, logits, top_k, renormalize=False: f(logits), launch)
table = {{"a": launch}}

def chosen(logits, top_k, renormalize=False):
    return table["a"](logits)
"""


@pytest.fixture
def module(tmp_path):
    (tmp_path / "helper_of_reach.py").write_text("import triton\n\n@triton.jit\ndef kernel(x):\n    pass\n\n"
        "def launch(x):\n    kernel[(1,)](x)\n\ndef other(x):\n    return x\n")  # fmt: skip
    file = tmp_path / "target_of_reach.py"
    file.write_text(SOURCE.format(name="reach"))
    return file


@pytest.mark.parametrize(("name", "found"), [
    ("plain", False), ("direct", True), ("inner", True), ("of_a_module", True), ("of_a_module_plain", False),
    ("held", True), ("closed", True), ("open_", False), ("partial", True), ("chosen", True), ("loads", None),
    ("operator", None), ("beside_what_answers", True), ("what_answers", False), ("beside_a_proxy", True),
    ("a_proxy", False),
])  # fmt: skip
def test_a_kernel_is_found_wherever_the_code_names_it(module, name, found):
    bound = bind(f"topk_softmax@{module}:{name}")
    assert has_triton(bound.function) is found
    assert bound.info.triton is (found is not False)


def test_what_cannot_be_told_is_as_the_target_declares(tmp_path):
    file = tmp_path / "declared_of_reach.py"
    file.write_text("import torch\nfrom moe_fuzz.contract import Capabilities, declares\n\n"
                    "@declares(capabilities=Capabilities(compiles=False))\n"
                    "def route(logits, top_k, renormalize=False):\n    return torch.ops.somebody.route(logits)\n")
    bound = bind(f"topk_softmax@{file}:route")
    assert has_triton(bound.function) is None
    assert not bound.info.triton
