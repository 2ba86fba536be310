"""Tools that know neither models nor data sets: the self-similarity loss, images, options, checkpoints, processes."""

import os

# OpenMP's threads sleep while they wait, instead of spinning: beside anything else that wants the cores, a step on the
# CPU takes half the time (70 instead of 160 ms in the demo, two cores), and the same where nothing does. It is
# read once, when torch is imported, so it is set before.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# OpenCV refuses images of more pixels by their headers: utils_image.MAX_PIXELS, for files that Pillow cannot tell of.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(1 << 28))
