"""Train a ranker, which orders restored images as a quality metric does: RankSRGAN's, for path.pretrained_netR.

python main_train_ranker.py --opt options/train_ranker.json
python main_train_ranker.py --opt options/train_ranker.json datasets.train.rank_csv=results/results.csv
torchrun --nproc_per_node=2 main_train_ranker.py --opt options/train_ranker.json
"""

from data.check import check_dataset
from data.select_dataset import define_Dataset
from models.select_model import define_Model
from utils.utils_dist import run
from utils.utils_train import train, training_options


def main() -> None:
    train(training_options(__doc__, models=["ranker"]), define_Model, define_Dataset, check_dataset)


if __name__ == "__main__":
    run(main)
