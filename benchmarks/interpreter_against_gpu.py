"""Triton's interpreter, as workers have it, beside a GPU: single operations, and where their numbers differ.

    python benchmarks/interpreter_against_gpu.py [--only REGEX] [--keep FOLDER] [--compiled PATH]

Every operation is a kernel that runs twice on the same inputs, in two processes: interpreted, with what
moe_fuzz/execute/interpreter_*.py does, and compiled. All bits are compared; what differs is a line of a table. Exit
code 0: all of that is in ALLOWED, with a reason; 1: something is not; 3: without a GPU the interpreted half alone ran.

--keep FOLDER keeps interpreted.pt and compiled.pt; --compiled PATH is such a file, from a machine with a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

N = 512
SHORT = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.int32: "int32",
         torch.float8_e4m3fn: "float8e4nv", torch.float8_e5m2: "float8e5", torch.int8: "int8"}  # fmt: skip
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_SPECIAL = (
    0.0, -0.0, 1.0, -1.0, 2.5, -2.5, 0.5, 1.5, torch.inf, -torch.inf, torch.nan, 3e9, -3e9, 1e-40, -1e-40, 65504, 65520,
    448, 449, 464, 465, 480, 57344, 61440, 1e30, -1e30, 300.5, 127.5, -128.7, 255.9, 1e-5, 3.3895e38, 2**-9, 2**-10,
    2**-17, 2**-126, 2**-133,
)  # fmt: skip

#: Expressions of x and y. Of float32 alone, of any float, of those what gives an integer or a truth, and of int32.
FUNCTIONS = (
    "tl.exp(x)", "tl.exp2(x)", "tl.log(x)", "tl.log2(x)", "tl.sqrt(x)", "tl.sqrt_rn(x)", "tl.rsqrt(x)",
    "tl.sigmoid(x)", "tl.floor(x)", "tl.ceil(x)", "tl.erf(x)", "tl.sin(x)", "tl.cos(x)", "tl.softmax(x)",
    "libdevice.tanh(x)", "libdevice.rint(x)", "libdevice.pow(tl.abs(x), 1.5)", "libdevice.log1p(tl.abs(x))",
    "libdevice.expm1(x)", "libdevice.trunc(x)", "libdevice.round(x)", "libdevice.isinf(x).to(tl.float32)",
    "libdevice.fast_expf(x)", "libdevice.rcp_rn(x)", "libdevice.div_rn(x, y)", "tl.div_rn(x, y)", "tl.fdiv(x, y)",
    "libdevice.float2int_rn(x).to(tl.float32)", "libdevice.exp(x)", "libdevice.fma(x, y, x)",
)  # fmt: skip
ARITHMETIC = (
    "x + y", "x - y", "x * y", "x / y", "tl.maximum(x, y)", "tl.minimum(x, y)",
    "tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)", "-x", "tl.abs(x)", "tl.fma(x, y, x)",
    "tl.where(x > y, x, y)", "tl.clamp(x, -1.0, 1.0)", "x * 1.7", "x + 1", "1.0 / x", "x * 3 + y", "tl.sum(x, 0)",
    "tl.max(x, 0)", "tl.min(x, 0)", "tl.cumsum(x, 0)", "tl.sort(x)", "tl.sort(x, descending=True)",
    "tl.cumprod(tl.clamp(x, 0.9, 1.1), 0)", "x * x + y * y", "tl.sum(x * y, 0)", "x % y", "tl.where(x == y, x, 0)",
    "tl.xor_sum(x.to(tl.float32).to(tl.int32, bitcast=True), 0)",
)  # fmt: skip
TO_INTEGERS = (
    "x > y", "x >= y", "x == y", "x != y", "x < y", "x.to(tl.int32)", "x.to(tl.int8)", "x.to(tl.uint8)",
    "x.to(tl.int16)", "x.to(tl.uint32)", "x.to(tl.int64)", "x.to(tl.int1)", "tl.argmax(x, 0)", "tl.argmin(x, 0)",
    "tl.argmax(x, 0, tie_break_left=False)", "(x > 0) & (y > 0)",
    "tl.argmax(tl.where(x == x, x, float('-inf')), 0)",
)  # fmt: skip
INTEGERS = (
    "x + y", "x * y", "x // y", "x % y", "x >> (y & 31)", "x << (y & 31)", "x ^ y", "x & y", "x | y", "~x", "-x",
    "tl.maximum(x, y)", "tl.minimum(x, y)", "tl.abs(x)", "tl.umulhi(x, y)", "tl.cdiv(x, y)", "tl.sum(x, 0)",
    "tl.max(x, 0)", "tl.argmax(x, 0)", "tl.cumsum(x, 0)", "tl.sort(x)", "x.to(tl.int8)", "x.to(tl.int16)",
    "x.to(tl.uint8)", "x.to(tl.uint32) >> 3", "x.to(tl.uint32) // 7", "x.to(tl.uint32) % 7", "x > y",
    "x.to(tl.int64) * y", "x.to(tl.uint8) + y.to(tl.uint8)", "x.to(tl.int8) * y.to(tl.int8)", "x * 3", "x // 2",
    "x % 2", "tl.where(x > 0, x, -x)", "tl.xor_sum(x, 0)", "(x == y) | (x > 5)",
)  # fmt: skip
_TOGETHER = re.compile(r"tl\.(sum|max|min|argmax|argmin|cumsum|cumprod|sort|softmax|xor_sum|dot)\(")


class Allowed(NamedTuple):
    """Operations that may differ in some kinds of elements, by so much of the compiled number."""

    names: str
    kinds: frozenset[str]
    most: float
    reason: str


NUMBER, TINY, ZERO = "number", "subnormal", "sign of 0"
SPECIAL, NAN_IN, NAN_BITS = "inf or NaN", "of NaN", "bits of NaN"
ALLOWED = (
    Allowed(r"float32: (tl|libdevice)\.(exp|exp2|log|log2|sqrt|rsqrt|sigmoid|erf|sin|cos|softmax|tanh|pow|log1p|expm1"
            r"|fast_expf|fdiv)\(.*", frozenset({NUMBER, TINY}), 4e-6,
            "good to some units in the last place; subnormal numbers are 0 there"),
    Allowed(r"float32: (tl\.(floor|ceil)|libdevice\.(rcp_rn|div_rn|fma))\(.*", frozenset({TINY}), 0.0,
            "libdevice takes subnormal numbers for 0"),
    Allowed(r"(float32|int32): (x / y|1\.0 / x).*", frozenset({NUMBER, TINY}), 2.5e-7, "div.full, good to two units"),
    Allowed(r"\w+: (x \* 3 \+ y|x \* x \+ y \* y)", frozenset({NUMBER, SPECIAL, TINY}), 5e-2,
            "contracted: the product is not rounded there"),
    Allowed(r"b?float\w+: x % y", frozenset({NUMBER, SPECIAL, ZERO, TINY}), torch.inf,
            "by way of a rounded quotient there"),
    Allowed(r"\w+: \(tl\.arg(max|min)\(x, 0.*", frozenset({NUMBER}), torch.inf,
            "among NaN who is found depends on which pairs are compared"),
    Allowed(r"\w+: tl\.clamp\(.*", frozenset({NAN_IN}), torch.inf,
            "c with the sign of NaN there, as the compiler sees that limits are -c and c"),
    Allowed(r"\w+: tl\.cumprod\(.*", frozenset({NUMBER}), 4e-6, "products in another order"),
    Allowed(r"float8e5: x\.to\(tl\.bfloat16\)", frozenset({SPECIAL, NAN_IN}), torch.inf,
            "widened by scaling there: of infinity and NaN Triton 3.6 makes numbers"),
    Allowed(r"\w+: tl\.dot.*", frozenset({NUMBER}), 1e-6, "sums in another order, in tensor cores with fewer bits"),
)  # fmt: skip


class Operation(NamedTuple):
    """A kernel of parameters x_ptr, y_ptr, out_ptr and `size`, by its body."""

    name: str
    body: str
    x: torch.Tensor
    y: torch.Tensor
    out: torch.dtype
    results: int = N
    size: int = N

    @property
    def elementwise(self) -> bool:
        return not _TOGETHER.search(self.name)


def operations() -> Iterator[Operation]:
    generator = torch.Generator().manual_seed(0)

    def normal(count: int) -> torch.Tensor:
        return torch.randn(count, generator=generator)

    rest = N - len(_SPECIAL)
    x = torch.cat([torch.tensor(_SPECIAL, dtype=torch.float32), normal(rest) * normal(rest).mul(4).exp()])
    y = x[torch.randperm(N, generator=generator)]
    few = [0, 1, -1, 2**31 - 1, -(2**31), 7, -7, 3, -3, 128, 255, 256]
    many = torch.randint(-(2**31), 2**31, (N - len(few),), generator=generator)
    integers = torch.cat([torch.tensor(few), many]).to(torch.int32)
    divisors = torch.cat([torch.tensor([2, 3, 3, 5, 7, -3, 3, -2, 2, 7, 5, 31]),
                          torch.randint(1, 100, (N - len(few),), generator=generator)]).to(torch.int32)  # fmt: skip

    def elements(expression: str, x: torch.Tensor, y: torch.Tensor, out: torch.dtype, how: str = "") -> Operation:
        body = ("    at = tl.arange(0, size)\n    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)\n"
                f"    tl.store(out_ptr + at, {expression})\n")  # fmt: skip
        return Operation(f"{SHORT[x.dtype]}: {how or expression}", body, x, y, out)

    for expression in FUNCTIONS:
        yield elements(expression, x, y, torch.float32)
    for dtype in FLOATS:
        of_x, of_y = x.to(dtype), y.to(dtype)
        for expression in ARITHMETIC:
            yield elements(expression, of_x, of_y, dtype)
        for expression in TO_INTEGERS:
            yield elements(f"({expression}).to(tl.int64)", of_x, of_y, torch.int64)
        for wanted in (*FLOATS, torch.float8_e4m3fn, torch.float8_e5m2):
            yield elements(f"x.to(tl.{SHORT[wanted]})", of_x, of_y, wanted)
            yield elements("x", of_x, of_y, wanted, f"x stored as {SHORT[wanted]}")
        yield elements(f"x.to(tl.{SHORT[dtype]})", integers, divisors, dtype)
    for eight in (torch.float8_e4m3fn, torch.float8_e5m2):
        every = torch.arange(N).to(torch.uint8).view(eight)
        for wanted in FLOATS:
            yield elements(f"x.to(tl.{SHORT[wanted]})", every, every, wanted)
    for expression in INTEGERS:
        yield elements(f"({expression}).to(tl.int64)", integers, divisors, torch.int64)
    yield elements("x / y", integers, divisors, torch.float32)
    for dtype in (*FLOATS, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8):
        for depth in (16, 32, 128) if dtype.itemsize > 1 else (32, 128):
            ways = ("ieee", "tf32", "tf32x3") if dtype == torch.float32 else ("tf32",)
            generator.manual_seed(depth)
            a, b = ((normal(16 * depth) * (40 if dtype == torch.int8 else 1)).to(dtype) for _ in range(2))
            for way in ways:
                yield _product(a, b, depth, way)


def _product(a: torch.Tensor, b: torch.Tensor, depth: int, way: str) -> Operation:
    out = torch.int32 if a.dtype == torch.int8 else torch.float32
    body = ("    i, k = tl.arange(0, 16), tl.arange(0, size)\n"
            "    a = tl.load(x_ptr + i[:, None] * size + k[None, :])\n"
            "    b = tl.load(y_ptr + i[None, :] * size + k[:, None])\n"
            "    tl.store(out_ptr + i[:, None] * 16 + i[None, :],\n"
            f"             tl.dot(a, b, input_precision={way!r}, out_dtype=tl.{SHORT[out]}))\n")  # fmt: skip
    return Operation(f"{SHORT[a.dtype]}: tl.dot() of {depth}, {way}", body, a, b, out, 256, depth)


def run(device: str, only: str) -> dict[str, torch.Tensor | str]:
    """What each operation gives, or its error."""
    chosen = [one for one in operations() if re.search(only, one.name)]
    head = "import triton, triton.language as tl\nfrom triton.language.extra import libdevice\n"
    kernels = (f"\n@triton.jit\ndef kernel_{n}(x_ptr, y_ptr, out_ptr, size: tl.constexpr):\n{one.body}"
               for n, one in enumerate(chosen))  # fmt: skip
    found: dict[str, torch.Tensor | str] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.py"
        file.write_text(head + "".join(kernels))
        spec = importlib.util.spec_from_file_location("kernels", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for n, one in enumerate(chosen):
            out = torch.zeros(one.results, dtype=one.out, device=device)
            try:
                getattr(module, f"kernel_{n}")[(1,)](one.x.to(device), one.y.to(device), out, one.size)
                found[one.name] = out.cpu()
            except Exception as error:  # noqa: BLE001 - the compiler's or the interpreter's: compared, as numbers are
                found[one.name] = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
    return found


class Difference(NamedTuple):
    name: str
    kinds: dict[str, int]  # how many elements
    worst: float  # of numbers, relative to the compiled one; of products, to the largest
    example: str
    reason: str  # empty: not allowed


def compare(one: Operation, interpreted: torch.Tensor | str, compiled: torch.Tensor | str) -> Difference | None:
    """None where they are the same to the bit, or both errors."""
    if isinstance(interpreted, str) or isinstance(compiled, str):
        if isinstance(interpreted, str) and isinstance(compiled, str):
            return None
        sides = (side if isinstance(side, str) else "no error" for side in (interpreted, compiled))
        return Difference(one.name, {"error": 1}, 0.0, " | ".join(sides), "")
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[compiled.element_size()]
    differ = interpreted.view(whole) != compiled.view(whole)
    if not differ.any():
        return None
    ours, theirs = interpreted.double(), compiled.double()
    nothing = torch.zeros_like(differ)
    read = [one.x, one.y] if re.search(r"\by\b", one.name) else [one.x]
    given = [side.double() for side in read] if one.elementwise else []
    of_tiny = sum(((side != 0) & (side.abs() < 2**-126) for side in given), nothing) > 0
    small = compiled.is_floating_point() and (ours.abs() < 2**-126) & (theirs.abs() < 2**-126) & (ours != theirs)
    of_nan = sum((side.isnan() for side in given), nothing) > 0
    left, kinds = differ, {}
    for kind, where in (
        (NAN_BITS, ours.isnan() & theirs.isnan()), (TINY, of_tiny | small), (NAN_IN, of_nan),
        (SPECIAL, ~(ours.isfinite() & theirs.isfinite())), (ZERO, ours == theirs), (NUMBER, differ),
    ):  # fmt: skip
        kinds[kind], left = left & where, left & ~where
    scale = theirs.abs() if one.elementwise or "dot" not in one.name else theirs.abs().max()
    worst = ((ours - theirs).abs() / scale)[kinds[NUMBER]].max().item() if kinds[NUMBER].any() else 0.0
    counts = {kind: int(where.sum()) for kind, where in kinds.items() if where.any()}
    rules = [rule for rule in ALLOWED if re.fullmatch(rule.names, one.name)]
    reason = next((rule.reason for rule in rules if counts.keys() <= rule.kinds and worst <= rule.most), "")
    at = int(differ.nonzero()[0])
    return Difference(one.name, counts, worst, f"[{at}] {ours[at]:.9g} | {theirs[at]:.9g}", reason)


def table(differences: list[Difference]) -> str:
    lines = []
    for reason in sorted({one.reason for one in differences}):
        lines.append(f"\n{reason or 'NOT ALLOWED'}")
        for one in differences:
            if one.reason == reason:
                kinds = ", ".join(f"{count} {kind}" for kind, count in one.kinds.items())
                worst = f"{one.worst:.0e}" if one.worst else ""
                lines.append(f"  {one.name:48} {kinds:32} {worst:8} {one.example}")
    return "\n".join(lines).strip("\n")


def _child(way: str, path: Path, only: str) -> None:
    if way == "interpreted":
        from moe_fuzz.execute.interpreter import hasten
        from moe_fuzz.execute.interpreter_language import complete
        from moe_fuzz.execute.interpreter_nan import pick
        from moe_fuzz.execute.interpreter_values import correct

        if not all([hasten(), correct(), pick(), complete()]):
            sys.exit("this Triton's interpreter is built differently")
    torch.save(run("cpu" if way == "interpreted" else "cuda", only), path)


def _start(way: str, path: Path, only: str) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"} if way == "interpreted" else {}
    subprocess.run([sys.executable, __file__, "--child", way, str(path), "--only", only], check=True, env=environment)
    return dict(torch.load(path))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", metavar="REGEX", help="operations whose name has this in it")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where both sides' results are kept")
    parser.add_argument("--compiled", type=Path, metavar="PATH", help="the compiled side, from another machine")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        _child(options.child[0], Path(options.child[1]), options.only)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        interpreted = _start("interpreted", folder / "interpreted.pt", options.only)
        if options.compiled is None and not torch.cuda.is_available():
            print(f"{len(interpreted)} operations were interpreted; there is no GPU to compare with")
            return 3
        compiled = torch.load(options.compiled) if options.compiled else _start("compiled", folder / "compiled.pt",
                                                                                options.only)  # fmt: skip
    both = [one for one in operations() if one.name in interpreted and one.name in compiled]
    differences = [found for one in both if (found := compare(one, interpreted[one.name], compiled[one.name]))]
    wrong = sum(not one.reason for one in differences)
    print(table(differences))
    same, may = len(both) - len(differences), len(differences) - wrong
    print(f"\n{len(both)} operations: {same} have the same bits, {may} differ and may, {wrong} may not")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
