"""LoRA for any PyTorch model, by rewriting its torch.fx graphs."""
