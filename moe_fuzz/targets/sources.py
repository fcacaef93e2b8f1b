"""Where the serving libraries are to be found: packages, library files, variables. Free of torch, and of loading."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_fuzz.options import LIB_VARIABLES


@dataclass(frozen=True)
class Source:
    """Where a provider's operators may come from."""

    provider: str
    package: str  # the Python package that holds the library
    distributions: tuple[str, ...]  # the names under which it is installed
    namespace: str  # of its operators: torch.ops.NAMESPACE
    patterns: tuple[str, ...]  # its library files inside the package, the best first


VLLM = Source("vllm", "vllm", ("vllm",), "_moe_C", ("_moe_C_stable_libtorch*.so", "_moe_C*.so"))
SGLANG = Source("sglang", "sgl_kernel", ("sglang-kernel", "sgl-kernel"), "sgl_kernel",
                ("{sm}/common_ops*.so", "common_ops*.so"))  # fmt: skip
#: Variants that are in another package of the same project.
PACKAGES: Mapping[str, tuple[str, tuple[str, ...]]] = {"sglang.triton": ("sglang", ("sglang",))}
#: Variants that are operators of the extension library, and need nothing else of the package.
IN_LIBRARY = frozenset(
    {"sglang.moe_sum", "sglang.moe_sum_reduce", "sglang.shuffle", "vllm.moe_permute", "vllm.moe_sum"}
)
SOURCES: Mapping[str, Source] = {source.provider: source for source in (VLLM, SGLANG)}


def installed(package: str) -> bool:
    """Whether the package can be imported; it is not."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a module of that name without a spec: somebody's stub
        return False


def version(distributions: Sequence[str]) -> str:
    """Of the first of these that is installed; empty if none is."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def whereabouts(provider: str, variant: str, environment: Mapping[str, str]) -> str:
    """For a list of targets: from what this interpreter would bind it. Whether that loads, a worker says.

    variant: of the provider, such as `fused_topk`; most are Python functions, which no library alone holds.
    """
    source = SOURCES.get(provider)
    if source is None:
        return "ours" if provider in ("builtin", "torch") else "an installed package"
    package, distributions = PACKAGES.get(f"{provider}.{variant}", (source.package, source.distributions))
    if installed(package):
        return f"package {package} {version(distributions)}".rstrip()
    if variant and f"{provider}.{variant}" not in IN_LIBRARY:
        return f"nothing: no package {package}"
    variable = LIB_VARIABLES[provider]
    names = [os.path.basename(name) for name in environment.get(variable, "").split(os.pathsep) if name]
    return f"{variable}: {', '.join(names)}" if names else f"nothing: no package {package}, no {variable}"
