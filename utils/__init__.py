"""Tools that know neither models nor data sets: options, images, degradations, SSL, checkpoints, the training loop."""
