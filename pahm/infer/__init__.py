"""From pictures to hands in camera space, and the files that hold them."""
