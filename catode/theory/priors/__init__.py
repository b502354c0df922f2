"""The flattening hyper-prior and its rivals."""

from catode.theory.priors.priors import BernoulliPrior, FlatteningPrior, HardConcrete, Prior, SpikeAndSlab

__all__ = ["BernoulliPrior", "FlatteningPrior", "HardConcrete", "Prior", "SpikeAndSlab"]
