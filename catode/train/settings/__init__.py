"""Every setting of a run: fields, ranges, presets, the command line made from them. Loads no PyTorch."""
