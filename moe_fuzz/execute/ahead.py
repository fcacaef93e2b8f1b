"""The target as checks call it. On a GPU what they will ask for is called before they ask, with the step's own call.

Waiting for the device is what a small case costs: where several processes share a GPU, each wait is a turn of theirs.
So a step enqueues its call, the copies of the results, and the calls of the relations that can be known without the
results; the host waits once. Work is done in the order of the stream, so a target that uses its buffers again is copied
from in time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_fuzz.execute import clock
from moe_fuzz.execute.call import TargetError
from moe_fuzz.execute.calls import BadResult, Results, check_shapes
from moe_fuzz.ops.inputs import Inputs

Runs = Callable[[Inputs], Results]  # enqueues a call, and the copies of what it returns


class Asked:
    """A call of the target, held to the shapes that its inputs ask for: relations compare row by row."""

    def __init__(self, run: Runs, wait: Callable[[], None], outputs: Callable[..., Any]) -> None:
        """wait: until the device is done. outputs: of the family."""
        self._run, self._wait, self._outputs = run, wait, outputs
        self._made: list[tuple[Inputs, Results | Exception]] = []
        self.later = 0  # calls that were not made ahead

    def ahead(self, inputs: Inputs) -> None:
        """Makes a call, of which nothing is heard before somebody asks for it: neither its results nor its error."""
        try:
            self._made.append((inputs, self._run(inputs)))
        except (TargetError, BadResult, MemoryError) as error:
            self._made.append((inputs, error))

    def __call__(self, inputs: Inputs) -> Any:
        """The outputs for these inputs: once those of a call made ahead for this very object, then of another call.
        Raises TargetError, BadResult, DeviceLost, MemoryError."""
        at = next((at for at, (one, _) in enumerate(self._made) if one is inputs), None)
        if at is None:
            self.later += 1
            # Only what judges may be in inference mode: a target is called as a server calls it.
            with clock.calling(), torch.inference_mode(False):
                results = self._run(inputs)
                self._wait()
        else:
            made = self._made.pop(at)[1]
            if isinstance(made, Exception):
                raise made
            results = made
        check_shapes(inputs, results)
        return self._outputs(*results)
