"""The original's public names of this module, wherever they are defined now."""

from typing import Any

from transfertransfo.data.dataset import PERSONACHAT_URL, get_dataset
from transfertransfo.model.sources import HF_FINETUNED_MODEL, download_pretrained_model
from transfertransfo.training.runs import make_logdir

__all__ = [
    "HF_FINETUNED_MODEL", "PERSONACHAT_URL", "AttrDict", "download_pretrained_model", "get_dataset", "make_logdir",
]  # fmt: skip


class AttrDict(dict):
    """A dict whose keys are attributes too."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.__dict__ = self
