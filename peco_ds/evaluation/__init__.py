"""Measures of finished or running models."""
