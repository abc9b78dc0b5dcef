"""Campaigns of bad things: each must be refused by name, and nothing may be lost, silently wrong or changed.

The normal tests try a sample; `make campaigns` tries everything and prints the attempts by kind.
"""
