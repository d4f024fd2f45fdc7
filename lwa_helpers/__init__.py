"""Layerwise-Adapter: which layers of an LLM matter for recommendation, and how small can it be made?"""

from __future__ import annotations

from importlib import import_module

_HOME = {
    "BaseRecommender": "recommender",
    "Recommendation": "recommender",
    "FisherInformationCalculator": "fisher.calculator",
    "FisherResult": "fisher.result",
    "LayerwiseDistillation": "distillation.weighting",
    "DistillationTrainer": "distillation.trainer",
    "load_amazon": "data.amazon",
    "load_movielens": "data.movielens",
    "Interactions": "data.interactions",
    "load_teacher": "models.loading",
    "build_student": "distillation.student",
}

__all__ = list(_HOME)


def __getattr__(name: str):
    """Import a public name when it is first used, so that `lwa status` need not load torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'lwa_helpers' has no attribute {name!r}")
    return getattr(import_module(f"lwa_helpers.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
