"""Cards of checkpoints, adapters and data folders, and pushing to the Hub."""

from .card import adapter_card, checkpoint_card, dataset_card, folder_card
from .check import check_card, is_repo_id
from .data_record import DataRecord, DataSource
from .push import PushPlan, PushResult, plan_push, push_folder, push_to_hub
from .space import write_space


__all__ = [
    "DataRecord",
    "DataSource",
    "PushPlan",
    "PushResult",
    "adapter_card",
    "check_card",
    "checkpoint_card",
    "dataset_card",
    "folder_card",
    "is_repo_id",
    "plan_push",
    "push_folder",
    "push_to_hub",
    "write_space",
]
