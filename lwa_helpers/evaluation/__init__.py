"""How good is a ranking, and how sure can we be? Metrics, statistics, the test protocol and baselines."""
