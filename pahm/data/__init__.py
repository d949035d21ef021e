"""Images of hands: reading, rendering and augmenting them."""
