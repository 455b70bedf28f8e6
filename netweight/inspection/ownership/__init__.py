"""Whose a network or a data set is: marks that training left, and traits that it has of its own."""
