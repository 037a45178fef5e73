"""A small causal diffusion world model, its procedural data, trainer and evaluation.

Outside the installed package: put the checkout's ``benchmarks`` folder on ``sys.path`` and import ``world_model``.
"""
