"""What the tests of the CLIP scorers share."""

import pytest

from fixtures import clip as fixtures
from fixtures.clip_models import save_aesthetic, save_open_clip, save_transformers

CPU = {"device": "cpu", "precision": "float32"}


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Parameters of each CLIP scorer for the small models of clip_fixtures, on the CPU in float32. Read only."""
    folder = tmp_path_factory.mktemp("clip")
    hps = {
        "checkpoint": str(save_open_clip(folder / "hps.pt")),
        "tokenizer": str(fixtures.write_merges(folder / "merges.txt.gz")),
        **CPU,
    }
    both = str(save_transformers(folder / "transformers"))
    predictor, clip = map(str, save_aesthetic(folder))
    return {
        "hpsv2": hps,
        "hpsv2.1": hps,
        "hpsv2.0": hps,
        "clip": {"clip": both, **CPU},
        "pickscore": {"clip": both, "tokenizer": both, **CPU},
        "aesthetic": {"predictor": predictor, "clip": clip, **CPU},
    }
