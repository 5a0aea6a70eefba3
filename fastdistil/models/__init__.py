"""Transformers' models as hidden, transform, weight; students; what they predict."""
