"""Teachers that rank a fixed list of candidates: models served by Ollama, local models, and fusions of several."""
