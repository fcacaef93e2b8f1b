"""`moe-fuzz doctor`: what of this machine works, what does not, and the way out."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from moe_fuzz._version import __version__
from moe_fuzz.cli import machine, params, probes
from moe_fuzz.errors import EXIT_CLEAN, EXIT_ENVIRONMENT, MoeFuzzError

OK, WARN, FAIL = "ok", "warn", "FAIL"
_COLORS = {OK: "green", WARN: "yellow", FAIL: "red"}
_WORKER_MEMORY = 1 << 30  # what a worker takes once torch is loaded, roughly
_NEEDED_SPACE = 256 << 20


@dataclass(frozen=True)
class Line:
    """One thing looked at. FAIL: a campaign cannot run; warn: it can, but not as well."""

    state: str
    subject: str
    text: str
    hint: str = ""


@click.command(short_help="Look at this machine: what works, what does not, and the way out.")
@params.workers
@params.device
@params.memory
@params.state_dir
@click.pass_context
def command(ctx: click.Context, workers: int | None, device: str, memory: int | None, state_dir: Path) -> None:
    """Look at this machine: versions, GPU, fences, workers, the state directory, and which targets can run.

    Exit code 3 if something essential is broken.
    """
    failed = False
    for line in examine(workers, device, memory, state_dir, (ctx.obj or {}).get("config_error")):
        mark = click.style(line.state.ljust(4), fg=_COLORS[line.state], bold=line.state == FAIL)
        click.echo(f"{mark}  {line.subject.ljust(10)}  {line.text}")
        if line.hint:
            click.echo(f"      {'':10}  → {line.hint}")
        failed |= line.state == FAIL
    click.echo("\nsomething essential is broken: see FAIL above" if failed else "\nready: `moe-fuzz run` can start")
    ctx.exit(EXIT_ENVIRONMENT if failed else EXIT_CLEAN)


def examine(
    workers: int | None, device: str, memory: int | None, state_dir: Path, config_error: MoeFuzzError | None
) -> Iterator[Line]:
    """The lines one by one, so that a slow one does not hold back those before it."""
    yield Line(OK, "moe-fuzz", f"{__version__}, Python {sys.version.split()[0]} at {sys.executable}")
    if config_error is not None:
        yield Line(FAIL, "config", config_error.message, config_error.hint)
    found, problem = probes.versions()
    yield from judge_versions(found, problem)
    yield from judge_gpu(machine.gpus(), found, machine.driver_version())
    chosen = params.pick_device(device)
    yield judge_workers(params.pick_workers(workers, chosen), chosen, memory, machine.memory_available())
    yield judge_fence(probes.guard())
    if chosen == "cuda":
        yield from judge_slots(machine.gpus())
        yield from judge_cuda(*probes.cuda(), probes.allocator(), shutil.which("compute-sanitizer"))
    yield judge_state(state_dir)
    if "torch" in found:
        yield judge_backends(probes.backends())
        yield from _targets(chosen)


def judge_versions(found: dict[str, Any], problem: str) -> Iterator[Line]:
    if problem:
        yield Line(FAIL, "packages", problem, "a worker imports torch, triton and numpy: reinstall them")
        return
    for name in ("torch", "triton", "numpy"):
        if f"{name}_error" in found:
            yield Line(FAIL, name, f"cannot be imported: {found[f'{name}_error']}", f"pip install --upgrade {name}")
        else:
            yield Line(OK, name, str(found[name]))
    both = "triton" in found and "numpy" in found
    if both and _version(found["triton"]) < (3, 7) and _version(found["numpy"]) >= (2, 4):
        yield Line(
            WARN if found.get("gpus") else FAIL,  # a GPU compiles its kernels
            "triton", f"the interpreter of triton {found['triton']} does not work with numpy {found['numpy']}",
            "pip install 'numpy<2.4', or 'triton>=3.7'",
        )  # fmt: skip


def _version(text: str) -> tuple[int, ...]:
    """`3.7.1+git` → (3, 7)."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def judge_gpu(gpus: tuple[machine.Gpu, ...], found: dict[str, Any], driver: str) -> Iterator[Line]:
    with_driver = f", driver {driver}" if driver else ""
    seen = found.get("gpus", [])
    if seen:
        memory = f", {machine.human(gpus[0].memory)}" if gpus and gpus[0].memory else ""
        yield Line(OK, "gpu", f"{len(seen)}: {', '.join(sorted(set(seen)))}{memory}{with_driver}")
    elif gpus:
        build = f"is built for CUDA {found['cuda_build']}" if found.get("cuda_build") else "is built without CUDA"
        yield Line(
            WARN, "gpu", f"{len(gpus)} {gpus[0].name}{with_driver}, but torch, which {build}, cannot use it: kernels "
            "run on the CPU",
            "install a torch built for the CUDA version that `nvidia-smi` shows",
        )  # fmt: skip
    else:
        yield Line(WARN, "gpu", "none: kernels run in Triton's interpreter on the CPU, and graphs are acted out")


def judge_workers(count: int, device: str, limit: int | None, available: int | None) -> Line:
    each = limit or _WORKER_MEMORY
    text = f"{count} on {device}" + (f", {machine.human(available)} of memory available" if available else "")
    if available is not None and count * each > available:
        fit = max(1, available // each)
        return Line(WARN, "workers", f"{text}: too little for {machine.human(each)} each", f"--workers {fit}")
    return Line(OK, "workers", text)


def judge_fence(answer: probes.Answer) -> Line:
    if answer.problem:
        return Line(FAIL, "fence", answer.problem, "without fences no access out of bounds is seen; report this line")
    return Line(OK, "fence", f"a read beyond a fenced tensor ends the process with {answer.said}, as it must")


def judge_backends(answer: probes.Answer) -> Line:
    if answer.problem:
        return Line(FAIL, "backends", answer.problem, "reinstall moe-fuzz, torch and triton")
    in_vain = "does not exist" in answer.said or "which needs" in answer.said
    return Line(FAIL if in_vain else OK, "backends", answer.said, "unset the variable" if in_vain else "")


def judge_slots(gpus: tuple[machine.Gpu, ...]) -> Iterator[Line]:
    """How many workers each GPU has room for, and whose memory is taken."""
    for number, gpu in enumerate(gpus):
        if gpu.memory is None or gpu.free is None:
            yield Line(WARN, "slots", f"GPU {number}: its memory is not known, so it gets one worker",
                       "pip install nvidia-ml-py, or put nvidia-smi on the PATH")  # fmt: skip
            continue
        text = f"GPU {number}: room for {gpu.room} of {gpu.slots} workers, {machine.human(gpu.free)} free"
        few = gpu.room < gpu.slots
        yield Line(WARN if few else OK, "slots", text, "somebody else's memory: `nvidia-smi` says whose" if few else "")


def judge_cuda(
    triton: probes.Answer, fence: probes.Answer, allocator: probes.Answer, sanitizer: str | None
) -> Iterator[Line]:
    if triton.said:
        yield Line(OK, "compiler", triton.said)
    else:
        hint = "Triton needs a C compiler, Python's headers and the driver's libcuda.so"
        yield Line(FAIL, "compiler", triton.problem, hint)
    if fence.said:
        yield Line(OK, "cuda fence", f"a read beyond a fenced tensor ends in {fence.said}, as it must")
    else:
        hint = "fences need the driver's virtual memory management; --device cpu has fences of its own"
        yield Line(FAIL, "cuda fence", fence.problem, hint)
    if allocator.said:
        yield Line(OK, "allocator", "`--fence all` can fence what C++ allocates")
    else:
        yield Line(WARN, "allocator", allocator.problem, "all but `--fence all` works without")
    if sanitizer:
        yield Line(OK, "sanitizer", sanitizer)
    else:
        yield Line(WARN, "sanitizer", "compute-sanitizer is not on the PATH", "it comes with the CUDA toolkit")


def judge_state(state_dir: Path) -> Line:
    place = state_dir.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.NamedTemporaryFile(dir=place) as file:
            file.write(b"moe-fuzz")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Line(FAIL, "state", f"{place} cannot be written: {error.strerror}", "name another one with --state-dir")
    free = machine.free_space(place)
    text = f"{state_dir}: {machine.human(free)} free"
    if free < _NEEDED_SPACE:
        return Line(WARN, "state", text, "a full disk loses findings: make room, or name another --state-dir")
    return Line(OK, "state", text)


def _targets(device: str) -> Iterator[Line]:
    """Asks a worker for every target known; that is also the proof that a worker starts."""
    from moe_fuzz.targets.registry import known
    from moe_fuzz.worker.pool import Pool

    names = [target.name for target in known()]
    with contextlib.ExitStack() as stack:
        try:
            pool = stack.enter_context(Pool(workers=1, device=device, providers=params.pick_providers()))
        except MoeFuzzError as error:
            yield Line(FAIL, "worker", f"no worker starts: {error.message}", error.hint)
            return
        yield from judge_targets(names, pool.describe)


def judge_targets(names: list[str], describe: Callable[[str], Any]) -> Iterator[Line]:
    available = 0
    for name in names:
        try:
            info = describe(name)
        except MoeFuzzError as error:
            yield Line(WARN, "target", f"{name}: {error.message}", error.hint)
        else:
            available += 1
            yield Line(OK, "target", f"{name}" + (f" ({info.origin})" if info.origin else ""))
    if not available:
        yield Line(FAIL, "target", "there is no target that can run", "install a provider, or test a file.py:function")
