"""The run on fake tensors that writes a torch.fx.Graph."""
