"""Exact Fisher information of causal LMs by layer, module, attention head and parameter, at a training step's cost."""
