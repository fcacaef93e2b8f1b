"""The pipe's messages, and what the parent makes of a dead worker's traces: no process is started here."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from moe_fuzz.errors import CaseError, EnvironmentProblem, MoeFuzzError, UsageError
from moe_fuzz.options import FenceOptions, RunOptions
from moe_fuzz.worker import autopsy, protocol
from moe_fuzz.worker.protocol import Channel, ChannelClosed, Garbled

PACKAGES = ("/venv/site-packages/torch", "/venv/site-packages/triton")
LAYOUT = autopsy.Layout(("/usr/lib/python3.11",), PACKAGES, "/src/moe_fuzz")


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours), theirs


def test_messages_arrive_whole_and_in_order(pair):
    channel, other = pair
    data = b"".join(protocol.encode({"n": n, "text": "é\n" * n}) for n in range(50))
    received = []
    for start in range(0, len(data), 7):
        other.sendall(data[start : start + 7])
        while (message := channel.receive(0)) is not None:
            received.append(message)
    assert received == [{"n": n, "text": "é\n" * n} for n in range(50)]
    assert channel.receive(0) is None
    assert channel.receive(0.01) is None


def test_the_end_of_the_stream_comes_after_what_was_sent(pair):
    channel, other = pair
    other.sendall(b'{"a":1}\n{"b"')
    other.close()
    assert channel.receive(1.0) == {"a": 1}
    with pytest.raises(ChannelClosed):
        channel.receive(1.0)
    with pytest.raises(ChannelClosed):
        channel.send({"c": 1})


@pytest.mark.parametrize("line", [b"Hello\n", b"[1]\n", b"\n", b"\xff\xfe\n", b"[" * 100000 + b"\n"])
def test_a_strangers_line_is_garbled(pair, line):
    channel, other = pair
    other.sendall(line)
    with pytest.raises(Garbled):
        channel.receive(1.0)


def test_a_line_without_an_end_is_garbled(pair, monkeypatch):
    channel, other = pair
    monkeypatch.setattr(protocol, "MAX_LINE", 1000)
    other.sendall(b"x" * 1001)
    with pytest.raises(Garbled):
        channel.receive(1.0)


@pytest.mark.parametrize("options", [
    RunOptions(),
    RunOptions(("structural",), FenceOptions(("logits",), "left", "write", (), False), 0.5, 2.0),
    RunOptions(checks=()),
])
def test_run_options_survive_the_pipe(pair, options):
    channel, other = pair
    Channel(other).send(options.to_json())
    assert RunOptions.from_json(channel.receive(1.0)) == options


def test_run_options_refuse_nonsense():
    with pytest.raises(UsageError, match="deadline"):
        RunOptions(deadline=0)
    with pytest.raises(UsageError, match="first_deadline"):
        RunOptions(first_deadline=float("nan"))
    with pytest.raises(UsageError, match="colour"):
        RunOptions.from_json({"colour": "red"})


@pytest.mark.parametrize("error", [
    UsageError("a", "b"), EnvironmentProblem("a", "b"), MoeFuzzError("a", "b"), CaseError("steps[0].rows", "a", "b"),
])
def test_errors_survive_the_pipe(error):
    back = protocol.error_from_json(protocol.error_to_json(error))
    assert (type(back), back.message, back.hint, str(back)) == (type(error), error.message, error.hint, str(error))
    assert getattr(back, "where", None) == getattr(error, "where", None)


def _trace(*files: str, head: str = "Current thread 0x1 ") -> str:
    frames = (f'  File "{file}", line {n} in f{n}\n' for n, file in enumerate(files))
    return head + "(most recent call first):\n" + "".join(frames)


@pytest.mark.parametrize(("files", "expected"), [
    (["/usr/lib/python3.11/ctypes/__init__.py", "/src/moe_fuzz/fence/own.py", "/src/moe_fuzz/kernels/routing.py"],
     "routing.py:2 in f2"),
    (["/venv/site-packages/torch/_ops.py", "/venv/site-packages/triton/runtime/jit.py", "/src/moe_fuzz/planted/nan.py"],
     "nan.py:2 in f2"),
    (["<frozen importlib._bootstrap>", "/usr/lib/python3.11/site-packages/vllm/ops.py"], "ops.py:1 in f1"),
    (["<string>", "/venv/site-packages/triton/runtime/interpreter.py", "/me/kernels.py"], "kernels.py:2 in f2"),
    (["<string>", "/src/moe_fuzz/worker/child.py"], ""),
    (["/src/moe_fuzz/targets/torch.py", "/src/moe_fuzz/worker/child.py"], ""),
    (["/src/moe_fuzz_extra/mine.py"], "mine.py:0 in f0"),
    (["/venv/site-packages/torchvision/ops.py"], "ops.py:0 in f0"),
])
def test_site_is_the_innermost_frame_of_the_target(files, expected):
    assert autopsy.site("Fatal Python error: Segmentation fault\n\n" + _trace(*files), LAYOUT) == expected


def test_site_is_taken_from_the_thread_that_died():
    others = [_trace(file, head="Thread 0x2 ") for file in ("/a/other.py", "/a/third.py")]
    text = "\n".join([others[0], _trace("/a/mine.py"), others[1]])
    assert autopsy.site(text, LAYOUT) == "mine.py:0 in f0"
    assert autopsy.site(_trace("/a/stack.py", head="Stack "), LAYOUT) == "stack.py:0 in f0"
    assert autopsy.site("Fatal Python error: Aborted\n\n<no Python frame>\n", LAYOUT) == ""


@pytest.mark.parametrize(("status", "kills", "printed", "kind", "symptom"), [
    (int(signal.SIGSEGV), 0, "", "crash", "SIGSEGV"),
    (int(signal.SIGBUS) | 0x80, 1, "", "crash", "SIGBUS"),
    (int(signal.SIGRTMIN) + 3, 0, "", "crash", "SIG37"),
    (int(signal.SIGKILL), 0, "", "crash", "killed:SIGKILL"),
    (int(signal.SIGKILL), 1, "", "out-of-memory", "out-of-memory"),
    (int(signal.SIGABRT), 0, "what(): std::bad_alloc", "out-of-memory", "out-of-memory"),
    (int(signal.SIGABRT), 0, "assertion failed", "crash", "SIGABRT"),
    (3 << 8, 0, "", "crash", "exit:3"),
    (0, 0, "", "crash", "exit:0"),
    (protocol.EXIT_PIPE << 8, 0, "", "crash", "closed-pipe"),
    (None, 0, "", "crash", "closed-pipe"),
])
def test_wait_status_becomes_a_verdict(tmp_path, status, kills, printed, kind, symptom):
    log = tmp_path / "w.log"
    log.write_text("std::bad_alloc of an earlier case\n" + printed)
    verdict = autopsy.crash(status, log, 34, LAYOUT, kills, 1.5)
    assert (verdict.kind, verdict.key[1], verdict.seconds) == (kind, symptom, 1.5)
    assert "earlier" not in verdict.detail


def test_kernel_counter_of_out_of_memory_kills_is_a_number():
    assert autopsy.oom_kills() >= 0
    assert autopsy._memory_events()  # on Linux there is at least one to read


def test_the_parents_side_imports_nothing_heavy():
    code = ("import sys, moe_fuzz.worker.pool; "
            "print([m for m in ('torch', 'triton', 'numpy', 'hypothesis') if m in sys.modules])")
    root = str(Path(protocol.__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert said.stdout.strip() == "[]", said.stderr
