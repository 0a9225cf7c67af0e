"""Attention map reuse for Transformers."""
