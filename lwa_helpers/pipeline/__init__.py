"""Notebooks run in order, each only if stale; manifests, publishing and comparison."""
