"""Every setting of a run: a class for each topic, presets, the command line made from them. Loads no PyTorch.

`setting`: what one setting is. `data`, `pruning`, `gates`, `training`, `run`: the settings of a topic and their checks.
`presets`: values by data set and architecture. `config`: all of them together. `commandline`: the flags.
"""
