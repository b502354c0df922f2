"""Networks of torchvision and timm, as their packages make them, trained to half their MACs, beside dense twins."""
