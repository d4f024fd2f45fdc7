"""Evaluation of rankings: metrics, statistics, the test protocol and baselines."""
