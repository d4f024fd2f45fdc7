"""Teachers that rank a fixed candidate list: models served by Ollama, local models, and the fusion of several."""
