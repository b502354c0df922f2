"""Measurements behind the numbers that the README states; each is a command, ``python -m benchmarks.NAME --help``.

`digits` (accuracy and removals on the default data), `cifar` (CIFAR-10 against its rivals), `estimators` (bias and
noise against exact enumeration), `gate_cost` (what gates, measuring and checking cost, what compaction gives back),
`sensitivity` (what each knob does), `copies` (which copy of a data set a record was made with) and others; `queue` makes the
runs of the results in order (`protocol.md`). `common`, which is no command, is what they share. With `--quick` a command shows
in seconds that it runs, and measures nothing.
"""
