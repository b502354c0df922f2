"""How well the growth of benefits is measured: ``python -m benchmarks.growth --help``.

`frozen`: the command, and the table at frozen weights. `optimizers`: in training, by several optimizers.
"""
