"""The KuaiRand experiment: how the files become sequences, and the quality that must not be lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from components.errors import BadInput
from components.schemas import action_mask
from model.dataset import SequenceDataset
from model.experiments.kuairand import DAY_US, FIRST_WINDOW, WINDOWS, hstu, mean
from model.experiments.kuairand_data import day_us, read_catalogue, read_log, sequences
from model.ranker import RankerConfig
from tests.model.golden import SHARED

LOG = """user_id,video_id,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,play_time_ms,tab
2,10,1000,1,0,0,0,0,0,1,5000,1
2,10,1000,1,0,0,0,0,0,1,5000,1
2,11,9000,0,0,0,0,0,0,0,0,1
2,12,20000,1,1,0,0,1,0,0,3000,0
1,10,15000,0,0,0,0,0,1,0,100,4
"""
VIDEOS = """video_id,author_id,video_duration,tag
10,5,20000.0,"39,2"
11,6,,
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "log_standard_x.csv").write_text(LOG)
    (tmp_path / "video_features_basic_x.csv").write_text(VIDEOS)
    return tmp_path


def test_rows_become_sequences_with_actions_known_after_the_play(folder: Path) -> None:
    dataset = SequenceDataset(sequences(read_log(folder), 0, 10**9, 0))
    one, two = dataset[0], dataset[1]
    assert (one.user_id, two.user_id) == (1, 2)
    assert two.item_id.tolist() == [10, 11, 12], "the exact duplicate counts once"
    assert two.page.tolist() == [2, 2, 1] and two.aux_value.tolist() == [2, 1]
    assert two.actions.tolist() == [action_mask("click,long_view,watch"), 0, action_mask("click,like,share,watch")]
    assert two.action_of.tolist() == [0, 2] and two.action_known_at.tolist() == [6_000_000, 23_000_000]
    assert two.action_value.tolist() == [5.0, 3.0]
    assert one.actions.tolist() == [action_mask("dislike,watch")]


def test_a_window_has_its_interactions_after_limited_context(folder: Path) -> None:
    log = read_log(folder)
    window = SequenceDataset(sequences(log, 20_000_000, 30_000_000, 1))
    assert len(window) == 1 and window[0].item_id.tolist() == [11, 12] and window[0].new_from == 1
    assert window[0].action_of.tolist() == [1]
    whole = SequenceDataset(sequences(log, 20_000_000, 30_000_000, 64))
    assert whole[0].new_from == 2 and whole[0].action_of.tolist() == [0, 2]


def test_videos_have_author_first_tag_and_duration(folder: Path) -> None:
    assert read_catalogue(folder).features(np.array([10, 11])).tolist() == [[5, 40, 9], [6, 0, 0]]


def test_a_folder_without_the_files_or_with_an_empty_one_is_refused(tmp_path: Path) -> None:
    for read in (read_log, read_catalogue):
        with pytest.raises(BadInput, match="data folder of KuaiRand"):
            read(tmp_path)
    (tmp_path / "log_standard_x.csv").touch()
    with pytest.raises(BadInput, match="data folder of KuaiRand"):
        read_log(tmp_path)


@pytest.mark.integration
def test_hstu_beats_the_rates_frozen_and_continual_and_continual_beats_frozen() -> None:
    data = SHARED / "data" / "KuaiRand-Pure" / "data"
    if not data.exists():
        pytest.skip(f"KuaiRand-Pure is not here: {data}")
    torch.set_num_threads(1)
    first = day_us(FIRST_WINDOW, 8)
    starts = [first + i * DAY_US for i in range(WINDOWS)]
    one, other, _ = hstu(read_log(data), read_catalogue(data), starts, RankerConfig())
    frozen, continual = mean(one), mean(other)
    assert frozen["auc_click"] > 0.716 and frozen["ne_click"] < 0.892 and frozen["auc_long_view"] > 0.713
    assert continual["auc_click"] > 0.728 and continual["ne_click"] < 0.882 and continual["auc_long_view"] > 0.724
    assert continual["auc_click"] > frozen["auc_click"] and continual["ne_click"] < frozen["ne_click"]
