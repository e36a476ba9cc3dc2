"""A pocket model: a small LLaVA-1.5 that really sees, trained from scratch on scenes drawn here."""
