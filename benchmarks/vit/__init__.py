"""A small vision transformer on the digits under AdamW, pruned to half its MACs: ``python -m benchmarks.vit --help``.

`comparison`: the command, trainings and tables. `model`: the network.
"""
