"""The sanitizer lane: a case under NVIDIA's compute-sanitizer, which names the line of the kernel.

    log.py     what the tool wrote → reports            lane.py    the parent's side: starts the tool, judges its answer
    child.py   the process under the tool               spec.py    what goes from one to the other, as files
"""
