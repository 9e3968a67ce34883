"""Model cards: one folder a published weight, the page of a family, and the catalogue that is written from both."""

from zoo.cards.card import Metric, card_facts, check_card, make_card

__all__ = ["Metric", "card_facts", "check_card", "make_card"]
