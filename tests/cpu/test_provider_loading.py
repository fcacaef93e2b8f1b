"""Where a serving library is loaded from, a package, a file or a Python function, and what is said if there is none."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_fuzz import strategies
from moe_fuzz.ops import OPS, get_space
from moe_fuzz.options import ProviderOptions, RunOptions
from moe_fuzz.targets import extension, registry, sources
from moe_fuzz.targets.bind import Target, bind
from moe_fuzz.verdict import PASS
from moe_fuzz.worker.pool import Pool
from tests.cpu import fake_library
from tests.cpu.loaded_libraries import VARIABLE, nothing_loaded, refused


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with nothing_loaded(monkeypatch):
        yield


@pytest.mark.parametrize("provider", VARIABLE)
def test_without_package_and_library_the_way_out_is_named(provider: str) -> None:
    if sources.installed(sources.SOURCES[provider].package):
        pytest.skip(f"{provider} is installed here")
    said = refused(f"topk_softmax@{provider}")
    assert VARIABLE[provider] in said
    assert "pip install" in said
    assert f"[tool.moe-fuzz.providers.{provider}]" in said


@pytest.mark.parametrize(
    ("content", "says"), [(None, "no such file"), (b"\x7fELF", "does not load"), (b"raise OSError('lost')", "lost")]
)
def test_a_library_that_is_missing_or_does_not_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None, says: str
) -> None:
    file = tmp_path / ("library.py" if content and content[0] != 0x7F else "library.so")
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setattr(sources, "VLLM", replace(sources.VLLM, package="no_such_package"))
    monkeypatch.setenv("MOE_FUZZ_VLLM_LIB", os.pathsep.join([str(file), ""]))
    said = refused("topk_softmax@vllm")
    assert says in said
    assert str(file) in said


def test_cuda_libraries_beside_torch_are_loaded_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """sgl_kernel needs libnvrtc, which torch loads only when it compiles."""
    (tmp_path / "libnvrtc.so.13").write_text("")
    loaded: list[str] = []

    def load(path: str) -> None:
        if not loaded:
            cause = OSError("libnvrtc.so.13: cannot open shared object file: No such file or directory")
            raise OSError(f"Could not load this library: {path}") from cause
        loaded.append(path)

    monkeypatch.setattr(extension, "_cuda_folders", lambda: [tmp_path])
    monkeypatch.setattr(extension.torch.ops, "load_library", load)
    monkeypatch.setattr(extension.ctypes, "CDLL", lambda path, mode: loaded.append(path))
    extension._load_file(Path("/some/common_ops.abi3.so"))
    assert loaded == [str(tmp_path / "libnvrtc.so.13"), "/some/common_ops.abi3.so"]


def test_a_lone_library_is_named_by_size_and_hash(tmp_path: Path) -> None:
    file = tmp_path / "lib.so"
    file.write_bytes(b"x" * 250_000)
    short = hashlib.sha256(b"x" * 250_000).hexdigest()[:12]
    assert extension.identity(file) == f"{file} (0.2 MB, sha256 {short})"


def test_an_installed_package_comes_first_and_tells_its_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "acme_serving"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('the package itself is not imported')")
    (package / "_moe_C.py.so").write_text("")
    info = tmp_path / "acme_serving-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-serving\nVersion: 1.2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("MOE_FUZZ_VLLM_LIB", "/nowhere.so")
    source = replace(sources.VLLM, package="acme_serving", distributions=("acme-serving",))
    monkeypatch.setattr(extension, "_load_file", lambda file: None)
    library = extension.load(source)
    assert (library.version, [f.name for f in library.files]) == ("1.2", ["_moe_C.py.so"])
    assert library.origin("schema").startswith("acme_serving 1.2, ")


# ---- Python functions -----------------------------------------------------------------------------------------------

FUNCTIONS = '''
import torch

def fused_topk(hidden_states, gating_output, topk, renormalize, indices_type=None, scoring_func="softmax"):
    assert hidden_states.size(0) == gating_output.size(0) and scoring_func == "softmax"
    from moe_fuzz.reference.routing import topk_softmax
    weights, ids = topk_softmax(gating_output, topk, renormalize=renormalize)
    return weights, ids, torch.zeros_like(ids)
'''


def test_the_python_wrapper_is_bound_by_its_signature(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if sources.installed("vllm"):
        pytest.skip("vllm is installed here")
    folder = tmp_path / "vllm" / "model_executor" / "layers" / "fused_moe" / "router"
    folder.mkdir(parents=True)
    (folder / "fused_topk_router.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    bound: Target = bind("topk_softmax@vllm.fused_topk")
    assert bound.info.capabilities.renormalize == (False, True)
    assert not bound.info.capabilities.bias
    assert "fused_topk_router.fused_topk(hidden_states, gating_output" in bound.info.origin
    weights, ids = bound({"logits": torch.randn(4, 8), "top_k": 2, "renormalize": True, "scale": 2.0})
    assert torch.allclose(weights.sum(1), torch.ones(4))
    assert ids.dtype == torch.int32


def test_the_python_wrapper_needs_the_whole_package() -> None:
    if sources.installed("vllm"):
        pytest.skip("vllm is installed here")
    assert "its extension library alone" in refused("topk_softmax@vllm.fused_topk")


# ---- the whole way --------------------------------------------------------------------------------------------------


def test_a_worker_loads_the_library_that_the_environment_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MOE_FUZZ_VLLM_LIB", str(fake_library.stub(tmp_path, "_moe_C", "vllm 0.24.0")))
    target = "topk_softmax@vllm"
    with Pool(1, "cpu") as pool:
        info = pool.describe(target)
        cases = list(itertools.islice(strategies.grid(get_space(info.op), info, "cpu", seed=1), 12))
        with pool.lease() as worker:
            verdicts = worker.run(cases, target, RunOptions())
    assert "operators.py (" in info.origin
    assert [verdict.kind for verdict in verdicts] == [PASS] * len(cases)


def test_the_library_may_be_given_to_the_workers_of_its_provider_alone(tmp_path: Path) -> None:
    lib = str(fake_library.stub(tmp_path, "_moe_C", "vllm 0.33.0"))
    with Pool(1, "cpu", providers={"vllm": ProviderOptions(env={"MOE_FUZZ_VLLM_LIB": lib})}) as pool:
        assert pool.describe("topk_softmax@vllm").contract.padding == ("minus_one",)
        assert pool.describe("topk_softmax@torch").provider == "torch"


def test_all_libraries_are_listed() -> None:
    names = {target.name for target in registry.known()}
    for op in sorted({*OPS} - {"moe_layer"}):  # whose halves are targets each; the whole is a method of a model's class
        assert f"{op}@vllm" in names
        # its FP4 operators left with 0.5.10; of its all-reduces none is a target
        assert (f"{op}@sglang" in names) == ("nvfp4" not in op and op != "allreduce_rmsnorm")


def test_a_list_says_from_what_a_target_would_be_bound() -> None:
    if sources.installed("vllm") or sources.installed("sgl_kernel"):
        pytest.skip("a serving library is installed here")
    where = sources.whereabouts
    lib = {"MOE_FUZZ_VLLM_LIB": os.pathsep.join(["/a/_moe_C.abi3.so", "/b/_C.abi3.so"])}
    assert where("vllm", "", lib) == "MOE_FUZZ_VLLM_LIB: _moe_C.abi3.so, _C.abi3.so"
    assert where("vllm", "fused_topk", lib) == "nothing: no package vllm"
    assert where("sglang", "", lib) == "nothing: no package sgl_kernel, no MOE_FUZZ_SGLANG_LIB"
    assert (where("builtin", "", {}), where("acme", "", {})) == ("ours", "an installed package")
