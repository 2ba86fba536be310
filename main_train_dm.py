"""Train a diffusion model (ResShift, StableSR, one-step), with the self-similarity loss where the options ask for it.

python main_train_dm.py --opt options/train_resshift_ssl.json
python main_train_dm.py --opt options/train_resshift_ssl.json train.ssl_l1_weight=200 train.ssl_kl_weight=200
torchrun --nproc_per_node=2 main_train_dm.py --opt options/train_resshift_ssl.json
"""

from data.check import check_dataset
from data.select_dataset import define_Dataset
from models.select_model import define_Model
from utils.utils_dist import run
from utils.utils_train import train, training_options


def main() -> None:
    train(training_options(__doc__, models=["dm"]), define_Model, define_Dataset, check_dataset)


if __name__ == "__main__":
    run(main)
