"""Answers in a terminal: text as it is accepted, coloured by who gave each token."""
