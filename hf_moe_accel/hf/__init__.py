"""THE BORDER: upstream's shapes in, upstream's shapes out."""
