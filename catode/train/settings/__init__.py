"""The settings of a run: one class for each topic, presets, the command line made from them. Loads no PyTorch.

`setting`: one setting. `data`, `pruning`, `gates`, `training`, `run`: the settings of a topic and their checks.
`presets`: values by data set and architecture. `config`: all settings. `commandline`: the flags.
"""
