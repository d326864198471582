"""How networks are trained where one optimiser is not enough."""

from __future__ import annotations

from .trainers import AlternatingTrainer, Joined

__all__ = ["AlternatingTrainer", "Joined"]
