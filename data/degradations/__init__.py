"""Random degradations: drawn as a list of steps, applied to one image or to a batch."""
