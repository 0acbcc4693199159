"""Trainers: upstream's classes with the mixin in front."""
