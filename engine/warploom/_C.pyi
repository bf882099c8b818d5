"""The compiled extension: an empty module whose loading registers the operators of torch.ops.warploom_cpu."""
