"""How a language model ranks items and how it is trained to: heads, training, the task."""
