"""From raw reviews to interactions, prompts and training windows."""
