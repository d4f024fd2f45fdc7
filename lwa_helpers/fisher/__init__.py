"""Fisher information of causal LMs: per layer, module, attention head and parameter, exact and as cheap as a training step."""
