"""Where images come from: scenes scattered from glyphs, and folders of a person's own images.

Read `datasets` first (which one is opened), then `scenes`, then `folder`.
"""
