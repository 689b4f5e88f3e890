"""Mip-NeRF 360 in JAX: the library behind train.py, eval.py and render.py."""
