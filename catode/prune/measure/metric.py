"""What an optimizer makes of the gradients of a burst: P in ``g P g``.

Source: docs/theory.md section 8.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from catode.prune.devices.transfer import floats
from catode.prune.measure.owned import Owned
from catode.prune.optimizers import Update


class Metric:
    """P, diagonal: ``rate / (sqrt(second + own * mean of the burst's g^2) + eps)``, or `rate` where nothing is scaled.

    The burst's own squares stand beside the mean of those before, as the optimizer's next steps will add them. Without
    them an entry that just woke up would count 1 / eps.

    Args:
        owned: The weights of the structures.
        parts: Rate, own and eps of every parameter, shape (parameters, 3), float64; then `second` of all entries, if any
            parameter's gradient is scaled; NaN where it is not.
    """

    def __init__(self, owned: Owned, parts: Sequence[torch.Tensor]):
        self.owned, self.parts = owned, list(parts)

    @classmethod
    def of(cls, owned: Owned, updates: dict[nn.Parameter, Update], second: dict[nn.Parameter, torch.Tensor]) -> Metric:
        """The metric before a step.

        Args:
            owned: The weights of the structures.
            updates: What the step does with each parameter that has a gradient.
            second: Copies of the means of past squared gradients, as the step weighs them.
        """
        none = Update(0.0)
        numbers = [n for p in owned.parameters for u in (updates.get(p, none),) for n in (u.rate, u.own, u.eps)]
        parts = [torch.tensor(floats(numbers), dtype=torch.float64).reshape(-1, 3)]
        if second:
            nan = {p: torch.full_like(p.detach(), torch.nan) for p in owned.parameters if p not in second}
            parts.append(owned.flat(second | nan))
        return cls(owned, parts)

    def times(self, gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """P g of each gradient, flat."""
        rates, owns, eps = self.parts[0].cpu().T.tolist()
        if len(self.parts) == 1:
            if all(rate == 1.0 for rate in rates):
                return list(gradients)
            scale = torch.cat([g.new_full((p.numel(),), r) for g, p, r in self._each(gradients[0], rates)])
            return [gradient * scale for gradient in gradients]
        scale = torch.zeros_like(gradients[0])
        for gradient in gradients:
            scale.addcmul_(gradient, gradient, value=1.0 / len(gradients))
        for part, second, rate, own, small in zip(
            self.owned.split(scale), self.owned.split(self.parts[1]), rates, owns, eps, strict=True
        ):
            part.mul_(own).add_(second).clamp_(min=0.0).sqrt_().add_(small).reciprocal_().mul_(rate)
            part.masked_fill_(second.isnan(), rate)
        return [(gradient * scale).masked_fill_(gradient == 0.0, 0.0) for gradient in gradients]

    def _each(self, gradient: torch.Tensor, rates: Sequence[float]):
        return ((gradient, p, rate) for p, rate in zip(self.owned.parameters, rates, strict=True))
