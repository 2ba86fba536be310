"""Train a generator with pixel losses.

python main_train_psnr.py --opt options/train_bsrgan_psnr.json
python main_train_psnr.py --opt options/train_bsrgan_psnr.json train.iterations=1000 datasets.train.H_size=128
torchrun --nproc_per_node=2 main_train_psnr.py --opt options/train_bsrgan_psnr.json
"""

from training.loop import train, training_options
from utils.utils_dist import run


def main() -> None:
    train(training_options(__doc__, models=["plain"]))


if __name__ == "__main__":
    run(main)
