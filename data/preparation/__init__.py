"""From a folder of photographs to what training reads, and a survey of what is there."""
