"""The queue of the runs that `benchmarks/protocol.md` governs: ``python -m benchmarks.queue --help``.

`rows`: every row as data. `derive`: settings that depend on finished runs. `shapes`: networks of given widths. `book`: what is
done, from the records alone. `program`: which version of the package trains. `trial`: the fastest way to compute here.
`worker`: one run in a process of its own. `scheduler`: starts workers and stops them. `nats`,
`returns`: what records hold of a run beside its own files. `latency`: all final networks in one sitting. `tables`: tables and the
picture.
"""
