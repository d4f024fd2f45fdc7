"""Raw reviews to interactions, prompts and windows."""
