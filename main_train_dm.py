"""Train a diffusion model (ResShift, StableSR, one-step), with the self-similarity loss where the options ask for it.

python main_train_dm.py --opt options/train_resshift_ssl.json
python main_train_dm.py --opt options/train_resshift_ssl.json train.ssl_l1_weight=200 train.ssl_kl_weight=200
torchrun --nproc_per_node=2 main_train_dm.py --opt options/train_resshift_ssl.json
"""

from training.command_line import training_command
from utils.utils_launch import run


def main() -> None:
    command = training_command(__doc__, models=["dm"])
    from training.loop import train  # with torch and all models: once the options are right

    train(*command)


if __name__ == "__main__":
    run(main)
