"""Low-quality images without ground truth."""

from typing import Any

from torch.utils.data import Dataset

from data.check import leave_out_unreadable
from data.files import Files
from utils.utils_error import UserError
from utils.utils_image import get_image_paths, read_image, uint2tensor3
from utils.utils_option import DatasetOptions


class DatasetL(Dataset[dict[str, Any]]):
    """``l``: items with ``L`` (C, h, w), RGB in [0, 1], ``L_path`` and ``L_extras``, what else its file holds.

    Images that cannot be read are left out, with a warning. Raises UserError for a folder that is not named, is missing
    or holds no image that can be read.
    """

    def __init__(self, dataset_opt: DatasetOptions):
        if not dataset_opt.dataroot_L:
            raise UserError(f"datasets.{dataset_opt.phase}.dataroot_L is not set: name the folder of images to restore")
        self.n_channels = dataset_opt.n_channels
        files = [Files(path, None, None) for path in get_image_paths(dataset_opt.dataroot_L)]
        self.paths = [path for path, *_ in leave_out_unreadable(files, dataset_opt.phase, self.n_channels)]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        img, extras = read_image(path, self.n_channels)
        return {"L": uint2tensor3(img), "L_path": path, "L_extras": extras}
