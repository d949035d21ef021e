"""Renders hands: poses, skin, backgrounds, cameras, pictures and the folder that holds them."""
