"""The pruner in PyTorch: gates, probes, growth, cutting; any model in anyone's training loop."""
