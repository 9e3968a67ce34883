"""Model cards: one folder a published weight, the page of a family, and the catalogue that is written from both."""

from zoo.cards.card import Metric, card_facts, check_card, make_card
from zoo.cards.own import is_own_folder, write_own_model

__all__ = ["Metric", "card_facts", "check_card", "is_own_folder", "make_card", "write_own_model"]
