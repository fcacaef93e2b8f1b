"""All that a script needs to make the calls of a case without moe-fuzz: tensors to the bit, arguments, the target.

An exhibit is a JSON value, made by the worker, which has torch; the parent renders it into `repro.py` and tables.

    {"op": "topk_softmax", "device": "cpu", "edge": "right", "memory_limit": null, "contract": {…}, "interpreter": "…",
     "tape": "…", "peers": {"world": 2, …} or null,
     "load": {"kind": "file", "path": "/…/routing.py", "attribute": "topk_softmax", "factory": false, …},
     "steps": [{"top_k": 2, "tokens": 3, "experts": 8, "scale": 1.0, "renormalize": false, "padding": "distinct",
                "width": 2, "fluid": ["logits", …], "results": {"weights": …, "ids": …},
                "scoring": "softmax", "n_group": 1, "topk_group": 1, "group_score": "max", "n_shared": 0,
                "tensors": {"logits": TENSOR, …}, "out": {"weights": …, "ids": …} or null,
                "keywords": {"renormalize": {"value": false}, "bias": {"tensor": "bias"}, "out": {"out": true}},
                "flagged": [2], "lawful": [0, 1], "defined": [0, 1], "healed": {"rows": [2], "values": TENSOR} or null,
                "subset": [1] or null, "refills": null or the number of the step whose tensors it fills anew}]}

Those are the steps of routing; `fluid`: the tensors that change from replay to replay. `peers`: who the ranks of an
all-reduce are, and what calls there are around its own. execute/exhibit_general.py has the steps of other families.

`load` is how a script gets at the target: {"kind": "file" | "module" | "source", …}. A target that stands for a call
into a library says what it calls (execute/barecall.py); its source is written from that, and `load` also has
"libraries": [{"variable": "MOE_FUZZ_VLLM_LIB", "path": "/…/_moe_C.abi3.so"}], for `torch.ops.load_library` (several
files are joined as in PATH; a Python file registers its operators itself), "imports": [modules], "environment":
{variable: value} and "calls": the dotted name of what is called.

TENSOR: {"dtype": "float32", "shape": [3, 8], "gap": 0, "column_stride": 0, "strides": [8, 1], "offset": 0,
"alignment": 16} and either
"bits", a flat list of each element's bits as an unsigned integer, or, beyond 256 elements, "zlib": the bytes,
compressed, in base64. `gap`, `column_stride` and `offset` are in elements, `alignment` in bytes.
"""

from __future__ import annotations

import ast
import inspect
import os
import resource
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from moe_fuzz.case import Case
from moe_fuzz.checks.families import FAMILIES
from moe_fuzz.checks.routing.observation import Outputs, RoutingObservation
from moe_fuzz.errors import CaseError
from moe_fuzz.execute import interpreter_language, interpreter_nan, interpreter_values, peers, tape
from moe_fuzz.execute.barecall import BareCall, bare_call
from moe_fuzz.execute.exhibit_general import general_step
from moe_fuzz.execute.exhibit_tensor import tensor
from moe_fuzz.ops import get_space
from moe_fuzz.ops.allreduce.text import IN_PLACE
from moe_fuzz.ops.inputs import Inputs, Lie
from moe_fuzz.ops.routing.inputs import materialize
from moe_fuzz.targets import registry
from moe_fuzz.targets.bind import Target

_PACKAGE = "moe_fuzz"
_NO_GROUPS = {"n_group": 1, "topk_group": 1, "group_score": "max", "n_shared": 0}
_NOTHING = Outputs(torch.empty(0, 0), torch.empty(0, 0, dtype=torch.int32))


def exhibit(case: Case, target: Target, device: str = "cpu") -> dict[str, Any]:
    """The exhibit of a case and its target. CaseError if the target implements another op."""
    if target.info.op != case.op:
        raise CaseError("op", f"{target.info.name} implements {target.info.op}, not {case.op}")
    step = _step if get_space(case.op).family == "routing" else general_step
    steps = [step(case, index, target) for index in range(len(case.steps))]
    for index, found in enumerate(steps):
        found["refills"] = _refilled(case, index) if case.steps[index].refilled else None
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    return {
        "op": case.op,
        "device": device,
        "edge": case.config["edge"],
        "memory_limit": None if limit == resource.RLIM_INFINITY else limit,
        "contract": asdict(target.info.contract),
        "load": _load(target),
        "interpreter": _interpreter(target) if device == "cpu" else "",
        "tape": _tape(case, target) if device == "cpu" else "",
        "peers": _peers(case, target) if get_space(case.op).family == "allreduce" else None,
        "steps": steps,
    }


def _step(case: Case, index: int, target: Target) -> dict[str, Any]:
    inputs = materialize(case, index)
    seen = RoutingObservation(case, index, target.info, inputs, _NOTHING, lambda _: _NOTHING)
    alignment = target.info.capabilities.alignment
    undefined = (~seen.defined).nonzero().flatten().tolist()
    defined = seen.defined.nonzero().flatten()
    speaks = seen.flagged if seen.dialect != "distinct" else torch.zeros_like(seen.flagged)
    invariant = target.info.contract.batch_invariant and seen.tokens > 1 and len(defined) > 0
    healed = {"rows": undefined, "values": tensor(seen.healed_inputs.plain["logits"][undefined])} if undefined else None
    return {
        "top_k": inputs.top_k,
        "tokens": seen.tokens,
        "experts": seen.experts,
        "width": inputs.width,
        "fluid": list(inputs.fluid),
        "results": {name: {"shape": list(shape)} for name, (shape, _) in inputs.results.items()},
        "scoring": seen.scoring,
        **_NO_GROUPS,
        **inputs.options,
        "tensors": {name: _placed(name, plain, inputs, alignment) for name, plain in inputs.plain.items()},
        "out": _out(seen.tokens, inputs.width, max(4, alignment)) if case.config["out"] else None,
        "keywords": _keywords(case, inputs, target),
        "flagged": seen.flagged.nonzero().flatten().tolist(),
        "lawful": (~speaks).nonzero().flatten().tolist(),
        "defined": defined.tolist(),
        "healed": healed,
        "subset": defined.flip(0)[::2].tolist() if invariant else None,  # as the check batch_invariance takes them
    }


def _peers(case: Case, target: Target) -> dict[str, Any]:
    config = case.config
    return {
        "group": target.keywords.get("group", ""),
        "world": int(config["ranks"]),
        "capacity": peers.capacity_of(case),
        "launches": str(config["launches"]),
        "pace": str(config["pace"]),
        "seed": case.seed,
        "groups": int(config["groups"]),
        "burst": int(config["burst"]),
    }


def _refilled(case: Case, index: int) -> int | None:
    """The step whose tensors this one fills anew, as EagerSteps finds it."""
    materialize = FAMILIES[case.op].materialize
    inputs = materialize(case, index, "cpu")
    return next((at for at in reversed(range(index)) if inputs.refills(materialize(case, at, "cpu"))), None)


def _keywords(case: Case, inputs: Inputs, target: Target) -> dict[str, dict[str, Any]]:
    """The keyword arguments in the target's spelling; only those that it takes. A bare call is written in the op's."""
    given: dict[str, dict[str, Any]] = {name: {"value": value} for name, value in inputs.options.items()}
    given |= {name: {"tensor": name} for name in inputs.plain if name != "logits"}
    given |= {"out": {"out": True}} if case.config["out"] else {}
    call = bare_call(target.function)
    if call:
        taken = call.names() | ({"out"} if call.takes_out else set())
        return {name: value for name, value in given.items() if name in taken and name in target.keywords}
    return {target.keywords[name]: value for name, value in given.items() if name in target.keywords}


def _placed(name: str, plain: torch.Tensor, inputs: Inputs, alignment: int) -> dict[str, Any]:
    """A tensor, and how `Inputs.place` lays it."""
    lie = inputs.lies.get(name, Lie())
    strides = list(lie.strides(plain.shape))
    return tensor(plain) | asdict(lie) | {"strides": strides, "alignment": max(alignment, plain.element_size())}


def _out(tokens: int, width: int, alignment: int) -> dict[str, Any]:
    dtypes = {"weights": "float32", "ids": "int32"}
    return {name: {"dtype": dtype, "shape": [tokens, width], "alignment": alignment} for name, dtype in dtypes.items()}


def _interpreter(target: Target) -> str:
    """What a script must do to Triton's interpreter, so that it gives what the worker's gives; empty where it is not
    needed."""
    if not target.info.triton:
        return ""
    files = (str(module.__file__) for module in (interpreter_values, interpreter_nan, interpreter_language))
    return "\n\n\n".join(_below_imports(Path(file).read_text(encoding="utf-8")) for file in files)


def _tape(case: Case, target: Target) -> str:
    """What stands in for CUDA's graphs, where anything does."""
    if case.mode not in ("graph", "piecewise") or not target.info.capabilities.one_host_path:
        return ""
    if case.config.get("out") == IN_PLACE:  # done again, it would find what it has written
        return ""
    return _below_imports(Path(str(tape.__file__)).read_text(encoding="utf-8")).replace("canary.", "")


def _below_imports(text: str) -> str:
    ends = [node.end_lineno or 0 for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return "\n".join(text.splitlines()[max(ends) :]).strip()


# ---- where the target lives -----------------------------------------------------------------------------------------


def _load(target: Target) -> dict[str, Any]:
    """How a script gets at the function: from a file, from a module, or from its own source, if that needs no more.

    The function's own home is preferred to the place where it was named: an adapter's file imports moe-fuzz, the kernel
    that it hands on does not. `needs_moe_fuzz` says that nothing free of it was found.
    """
    call = bare_call(target.function)
    if call:
        return _from_call(call, target)
    place, _, attribute = registry.locate(target.info.name).rpartition(":")
    factory, attribute = attribute.endswith("()"), attribute.removesuffix("()")
    home = _home(target.function)
    if home:
        module, name = home
        path = str(getattr(module, "__file__", None) or "")
        by_path = module.__name__.partition(".")[0] == _PACKAGE or module.__name__.startswith("moe_fuzz_target_")
        if by_path and path.endswith(".py") and not _imports_us(path):
            return _from_file(path, name)
        if not by_path and module.__name__ != "__main__":
            return {"kind": "module", "module": module.__name__, "attribute": name, "factory": False}
    source = _source(target.function)
    if source:
        return {"kind": "source", "text": source, "attribute": target.function.__name__}
    if place.endswith(".py"):
        return _from_file(place, attribute, factory) | {"needs_moe_fuzz": _imports_us(place)}
    ours = place.partition(".")[0] == _PACKAGE
    found = {"kind": "module", "module": place, "attribute": attribute, "factory": factory}
    return found | {"needs_moe_fuzz": ours or _imports_us(getattr(sys.modules.get(place), "__file__", None))}


def _from_call(call: BareCall, target: Target) -> dict[str, Any]:
    name = target.info.op
    files = {variable: [os.path.realpath(path) for path in paths.split(os.pathsep)]
             for variable, paths in call.libraries.items()}  # fmt: skip
    return {
        "kind": "source",
        "text": call.source(name, out=call.takes_out and "out" in target.keywords),
        "attribute": name,
        "calls": call.function,
        "libraries": [{"variable": variable, "path": os.pathsep.join(paths)} for variable, paths in files.items()],
        "imports": list(call.modules),
        "environment": dict(call.environment),
    }


def _from_file(path: str, attribute: str, factory: bool = False) -> dict[str, Any]:
    return {"kind": "file", "path": os.path.realpath(path), "attribute": attribute, "factory": factory}


def _home(function: Callable[..., Any]) -> tuple[ModuleType, str] | None:
    """The module and the name in it that hold this very function; None for a closure, a method, a partial."""
    module = sys.modules.get(str(getattr(function, "__module__", "")))
    found: Any = module
    for part in str(getattr(function, "__qualname__", "<none>")).split("."):
        found = getattr(found, part, None)
    return (module, function.__qualname__) if module is not None and found is function else None


def _imports_us(path: str | None) -> bool:
    """Whether a Python file imports moe_fuzz, at its top or anywhere in it."""
    if not path or not path.endswith(".py"):
        return False
    for node in ast.walk(ast.parse(Path(path).read_bytes())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        if any(name.partition(".")[0] == _PACKAGE for name in names):
            return True
    return False


def _imported(node: ast.AST) -> list[str]:
    """The modules that are imported inside of it."""
    found = [name.name for one in ast.walk(node) if isinstance(one, ast.Import) for name in one.names]
    return found + [one.module or "" for one in ast.walk(node) if isinstance(one, ast.ImportFrom)]


def _beside(function: Callable[..., Any], modules: list[str]) -> bool:
    """Whether one of the modules lies beside the function's file, where nobody finds it who has the source alone."""
    folder = Path(inspect.getfile(function)).resolve().parent
    for name in {name.partition(".")[0] for name in modules}:
        known = sys.modules.get(name)
        if known is None:  # not reached by the call; a relative import has no name
            places = [folder / f"{name}.py", folder / name]
        else:
            found = (*getattr(known, "__path__", ()), getattr(known, "__file__", None))
            places = [Path(place) for place in found if place]
        if any(place.exists() and place.resolve().parent == folder for place in places):
            return True
    return False


def _source(function: Callable[..., Any]) -> str:
    """The source of a plain function without its decorators, below the imports it needs; empty if it needs more."""
    if not inspect.isfunction(function) or function.__closure__ or function.__name__ == "<lambda>":
        return ""
    used = inspect.getclosurevars(function).globals
    modules = {name: value.__name__ for name, value in used.items() if isinstance(value, ModuleType)}
    if len(modules) < len(used) or any(name.partition(".")[0] == _PACKAGE for name in modules.values()):
        return ""
    try:
        text = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):  # no file behind it
        return ""
    node = ast.parse(text).body[0]
    if not isinstance(node, ast.FunctionDef):
        return ""
    defaults = [value for value in (*node.args.defaults, *node.args.kw_defaults) if value is not None]
    names = {name.id for value in defaults for name in ast.walk(value) if isinstance(name, ast.Name)}
    if not names <= {*modules, "torch"} or _beside(function, [*modules.values(), *_imported(node)]):
        return ""
    imports = [f"import {full}" + (f" as {name}" if name != full else "") for name, full in sorted(modules.items())]
    return "\n".join([*imports, "", "", *text.splitlines()[node.lineno - 1 :]]).strip() + "\n"
