"""Model cards: what a checkpoint folder says about itself."""

from .checkpoint_card import checkpoint_card


__all__ = ["checkpoint_card"]
