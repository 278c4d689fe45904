"""Keeps the tensors that a PyTorch model saves for backward packed."""
