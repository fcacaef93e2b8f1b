"""Targets: names, where they lead, what a signature tells, and every wrong one a clear error."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from moe_fuzz.contract import Capabilities, TargetInfo
from moe_fuzz.errors import EnvironmentProblem, UsageError
from moe_fuzz.options import LIB_VARIABLES
from moe_fuzz.targets import registry
from moe_fuzz.targets.bind import bind

ROUTERS = '''
import torch
from moe_fuzz import Capabilities, Contract, declares

def plain(logits, k):
    weights, ids = torch.softmax(logits.float(), -1).topk(k)
    return weights, ids.int()

def spelled(gating, topk, norm_topk_prob=False, e_score_correction_bias=None, routed_scaling_factor=1.0):
    return norm_topk_prob, e_score_correction_bias, routed_scaling_factor

def everything(logits, k, **options):
    return options

@declares(contract=Contract(deterministic=True), capabilities=Capabilities(max_top_k=8, dtypes=("bfloat16",)),
          clauses={"ids": "README: ids are distinct"})
def promised(logits, k, renormalize=True, is_padding=None, padding="minus_one"):
    return plain(logits, k)

def dialect(logits, k, is_padding=None, padding="minus_one"):
    return plain(logits, k)

def layer(hidden, gate, w13, w2, k, *, is_padding=None, dialect="minus_one", padding="distinct"):
    return hidden, *plain(hidden @ gate.t(), k)

def factory():
    return plain

class Module(torch.nn.Module):
    def forward(self, logits, k, renormalize=False, is_padding=None):
        return plain(logits, k)

module = Module()

def one(logits, *, top_k):
    return plain(logits, top_k)

def biased(logits, k, bias):
    return plain(logits, k)

@declares(capabilities=Capabilities(bias_required=True))
def needs_bias(logits, k, *, e_score_correction_bias):
    return plain(logits + e_score_correction_bias, k)

@declares(capabilities=Capabilities(activation_formats=("nvfp4",)))
def quantizes(x, w13, w2, weights, ids, s13, s2, alpha13, alpha2, *, x_global, h_global):
    return x

def grouped(logits, k, renormalize, groups):
    return plain(logits, k)

number = 3

class Holder:
    @staticmethod
    def inside(logits, k):
        return plain(logits, k)
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "routers.py"
    path.write_text(ROUTERS)
    return path


def test_names_resolve() -> None:
    assert registry.resolve("topk_softmax")[:2] == ("topk_softmax@builtin", "topk_softmax@sglang")
    assert {"topk_softmax@torch", "topk_softmax@vllm"} < set(registry.resolve("topk_softmax"))
    assert registry.resolve("torch", "topk_softmax") == ("topk_softmax@torch",)
    every = ("align@torch", "allreduce_rmsnorm@torch", "allreduce_rmsnorm@torch.nccl",
             "allreduce_rmsnorm@torch.one_shot", "allreduce_rmsnorm@torch.two_shot", "experts_bf16@torch",
             "experts_bf16@torch.grouped", "experts_nvfp4@torch", "grouped_topk@torch", "moe_layer@torch",
             "nvfp4_quantize@torch", "topk_sigmoid@torch", "topk_softmax@torch")  # fmt: skip
    assert registry.resolve("torch") == every
    assert registry.resolve("torch", "topk_sigmoid") == ("topk_sigmoid@torch",)
    assert registry.resolve("topk_softmax@planted.nan_argmax") == ("topk_softmax@planted.nan_argmax",)
    assert registry.resolve("package.module:function", "topk_softmax") == ("topk_softmax@package.module:function",)


def test_a_file_is_named_by_its_absolute_path(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    assert registry.resolve("routers.py:plain", "topk_softmax") == (f"topk_softmax@{file}:plain",)
    assert registry.resolve("topk_softmax@./routers.py:factory()") == (f"topk_softmax@{file}:factory()",)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("topk_softmx", "topk_softmax"),
        ("topk_softmax@torhc", "topk_softmax@torch"),
        ("topk_softmx@torch", "topk_softmax"),
        ("topk_softmax@", "op@provider"),
        ("vlm", "vllm"),
        ("tensorrt", "list targets"),
        ("nowhere.py:router", "path/to/file.py"),
    ],
)
def test_what_is_no_target_is_told_with_the_nearest(text: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        registry.resolve(text, "topk_softmax")
    assert hint in caught.value.hint


def test_an_installed_package_offers_targets_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme_router.py").write_text(ROUTERS)
    info = tmp_path / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    entry = "[moe_fuzz.targets]\ntopk_softmax@acme = acme_router:plain\n"
    (info / "entry_points.txt").write_text(entry)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "topk_softmax@acme" in {target.name for target in registry.known()}
    assert registry.resolve("acme") == ("topk_softmax@acme",)
    assert "acme_router" not in sys.modules, "the parent must not import a target"
    assert bind("topk_softmax@acme").info.provider == "acme"


def test_the_signature_says_what_a_function_takes(file: Path) -> None:
    plain = bind(f"topk_softmax@{file}:plain")
    can = plain.info.capabilities
    assert (can.renormalize, can.bias, can.scale, can.is_padding, can.out) == ((False,), False, False, False, False)
    assert plain.info.contract.padding == ("garbage",)
    assert plain.info.provider == "user"
    weights, ids = plain({"logits": torch.randn(2, 8), "top_k": 2, "renormalize": True, "scale": 2.0})
    assert (weights.shape, ids.dtype) == ((2, 2), torch.int32)


def test_other_spellings_and_keywords_of_any_name(file: Path) -> None:
    spelled = bind(f"topk_softmax@{file}:spelled")
    given = {"logits": None, "top_k": 2, "renormalize": True, "bias": "b", "scale": 2.5, "padding": "x"}
    assert spelled(given) == (True, "b", 2.5)
    everything = bind(f"topk_softmax@{file}:everything")
    assert everything({"logits": None, "top_k": 2, "bias": "b", "out": "o"}) == {"bias": "b", "out": "o"}
    assert everything.info.capabilities.out


def test_a_module_takes_what_its_forward_names(file: Path) -> None:
    module = bind(f"topk_softmax@{file}:module")
    can = module.info.capabilities
    assert (can.renormalize, can.bias, can.is_padding, can.out) == ((False, True), False, True, False)
    given = {"logits": torch.randn(2, 8), "top_k": 2, "renormalize": True, "padding": "distinct", "scale": 1.0}
    assert module(given)[1].shape == (2, 2)


def test_a_grouped_router_takes_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "grouped.py"
    path.write_text(
        "def named(logits, k, renormalize, num_expert_group, topk_group, scoring_func='softmax', bias=None): ...\n"
        "def whole(logits, k, *, n_group, topk_group, scoring, group_score, n_shared=0, expert_map=None): ...\n"
    )
    named, whole = (bind(f"grouped_topk@{path}:{name}") for name in ("named", "whole"))
    assert (named.keywords["n_group"], named.keywords["scoring"]) == ("num_expert_group", "scoring_func")
    can = named.info.capabilities
    assert (can.scorings, can.group_scores, can.n_shared) == (("softmax", "sigmoid"), ("max",), 0)
    assert not can.expert_map
    can = whole.info.capabilities
    assert (can.group_scores, can.n_shared, can.expert_map) == (("max", "top2_sum"), 8, True)
    with pytest.raises(UsageError, match="num_expert_group"):
        bind(f"topk_softmax@{path}:named")


def test_declarations_are_cut_down_to_the_signature(file: Path) -> None:
    info = bind(f"topk_softmax@{file}:promised").info
    assert info.capabilities.max_top_k == 8
    assert not info.capabilities.bias
    assert info.contract.deterministic
    assert info.classify("ids") == ("contract", "README: ids are distinct")
    assert info.classify("weights") == ("robustness", "")
    assert bind(f"topk_softmax@{file}:dialect").info.contract.padding == ("minus_one",)
    assert bind(f"moe_layer@{file}:layer").info.contract.padding == ("minus_one",)  # what a layer's word for it says
    assert TargetInfo.from_json(info.to_json()) == info


def test_what_a_declaration_makes_certain_needs_no_default(file: Path) -> None:
    assert bind(f"topk_softmax@{file}:needs_bias").info.capabilities.bias_required
    assert bind(f"experts_nvfp4@{file}:quantizes").info.capabilities.activation_formats == ("nvfp4",)


def test_factories_and_attributes(file: Path) -> None:
    assert bind(f"topk_softmax@{file}:factory()")({"logits": torch.randn(1, 4), "top_k": 1})[1].shape == (1, 1)
    assert bind(f"topk_softmax@{file}:Holder.inside")({"logits": torch.randn(1, 4), "top_k": 1})[1].shape == (1, 1)


@pytest.mark.parametrize(
    ("place", "error", "says"),
    [
        ("{file}:nothing", UsageError, "it defines: plain, spelled"),
        ("{file}:number", UsageError, "not a function"),
        ("{file}:factory", UsageError, "first two positional"),
        ("{file}:factory", UsageError, "named with () behind"),
        ("{file}:one", UsageError, "first two positional"),
        ("{file}:biased", UsageError, "'bias' without a default"),
        ("{file}:biased", UsageError, "give it one (or declare Capabilities(bias_required=True))"),
        ("{file}:grouped", UsageError, "'groups' without a default"),
        ("{file}.py:plain", EnvironmentProblem, "cannot be imported"),
        ("no_such_package.module:f", EnvironmentProblem, "cannot be imported"),
        ("no_such_package.module:f", EnvironmentProblem, "set PYTHONPATH to the folder that it lies in"),
        ("{lacking}:plain", EnvironmentProblem, "what it needs must be installed"),
        ("{bad}:plain", EnvironmentProblem, "SyntaxError"),
        ("{bad}:plain", EnvironmentProblem, "bad.py` does, which shows where it fails"),
    ],
)
def test_what_cannot_be_bound_says_why(file: Path, place: str, error: type[Exception], says: str) -> None:
    bad = file.parent / "bad.py"
    bad.write_text("def broken(:\n")
    lacking = file.parent / "lacking.py"
    lacking.write_text("import no_such_package\n")
    with pytest.raises(error) as caught:
        bind("topk_softmax@" + place.format(file=file, bad=bad, lacking=lacking))
    assert says in f"{caught.value.message} {caught.value.hint}"  # type: ignore[attr-defined]


def test_what_is_imported_in_a_call_lies_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "beside_the_router.py").write_text("import torch\ndef ids(x, k): return x.topk(k).indices.int()\n")
    (tmp_path / "late.py").write_text("""
def router(logits, k):
    import beside_the_router
    return logits.softmax(-1)[:, :k], beside_the_router.ids(logits, k)

def factory():
    import beside_the_router
    return router
""")
    before = list(sys.path)
    try:
        for place in ("late.py:router", "late.py:factory()"):
            target = bind(f"topk_softmax@{tmp_path}/{place}")
            assert target({"logits": torch.tensor([[1.0, 3.0, 2.0]]), "top_k": 2})[1].tolist() == [[1, 2]]
        assert sys.path == [*before, str(tmp_path)]  # behind all others, and once
    finally:
        sys.path[:] = before


def test_our_own_targets_and_every_planted_bug_can_be_bound() -> None:
    for known in registry.known(planted=True):
        if known.provider in (*LIB_VARIABLES, "flashinfer"):  # a serving library: tests/cpu/test_*providers.py
            continue
        info = bind(known.name).info
        assert info.name == known.name
        assert info.capabilities == Capabilities(**{**info.to_json()["capabilities"]})
        assert known.provider != "planted" or info.clauses["*"].startswith("planted")
