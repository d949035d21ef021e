"""Renders hands: poses, skin, backgrounds, cameras, pictures and the output folder."""
