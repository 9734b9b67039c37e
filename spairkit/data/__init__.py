"""Datasets: synthetic scenes of scattered glyphs, and folders of images.

Read `datasets` first, then `scenes`, then `folder`.
"""
