"""Routers with a known bug each: the proof that every check can fire.

`catalog.py` lists them, free of torch. The files beside it hold them; each imports nothing but torch and triton, so
that a repro can load it by its path. A bug is written the way the real one was, and friendly inputs do not show it.
"""
