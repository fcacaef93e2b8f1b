"""Speaks the protocol of moe_fuzz/bench/child.py without a GPU: times are made up, and labels say how to misbehave."""

from __future__ import annotations

import json
import os
import sys
import time

if "--no-device" in sys.argv:
    print(json.dumps({"kind": "failed", "reason": "there is no CUDA device", "hint": "find one"}), flush=True)
    sys.exit(3)
if "--dead" in sys.argv:
    sys.exit(7)
print(json.dumps({"kind": "ready", "machine": {"gpu": "none"}, "versions": {"torch": "0"}}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    times = {}
    for number, candidate in enumerate(request["candidates"]):
        label = candidate["label"]
        print(json.dumps({"kind": "doing", "label": label, "what": "verification"}), flush=True)
        if label == "crashes":
            os.kill(os.getpid(), 11)
        if label == "hangs":
            time.sleep(600)
        if label == "wrong":
            left_out = {"kind": "candidate", "label": label, "status": "wrong", "reason": "ids: twice"}
            print(json.dumps(left_out), flush=True)
            continue
        times[label] = [number + 1 + 0.001 * sample for sample in range(request["rounds"])]
    if "--dies-timing" in sys.argv:
        print(json.dumps({"kind": "doing", "label": "", "what": "timing"}), flush=True)
        sys.exit(1)
    floor = {"empty": [0.5] * request["rounds"], "copy": [0.9] * request["rounds"], "bytes_per_us": 4e6}
    facts = {label: {"nan_safe": "finite" if label == "torch" else "safe", "origin": ""} for label in times}
    more = {"cold": {}, "facts": facts, "floor": floor if times else {}, "bytes": 9216}
    answer = {"kind": "times", "times": times, **more}
    print(json.dumps(answer), flush=True)
