"""What the tests share: the environment, and the drawn world's processor, model and data."""

import os
import tempfile
from collections.abc import Callable
from copy import deepcopy

import pytest

import demo_model
import demo_world
from conversation import Renderer
from crop_tool import CropContract

# Nothing above imports torch, transformers or datasets, which read these when they are imported. Two workers with
# spinning threads on two cores would stand in each other's way.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # also where there is a GPU: what is compared is float32 of a CPU
_datasets_cache = tempfile.TemporaryDirectory(prefix="datasets-", ignore_cleanup_errors=True)
os.environ["HF_DATASETS_CACHE"] = _datasets_cache.name
os.environ["TRACKIO_DIR"] = os.path.join(_datasets_cache.name, "trackio")


@pytest.fixture(scope="session")
def tiny_model():
    """A random Qwen2.5-VL of a million parameters, float32, in eval mode; shared, so not to be changed."""
    return demo_model.build_model(demo_model.build_processor())


@pytest.fixture
def trainable_model(tiny_model):
    """A copy of `tiny_model` that a test may change."""
    return deepcopy(tiny_model)


@pytest.fixture(scope="session")
def base_folder(tiny_model, tmp_path_factory):
    """Folder of `tiny_model` with processor and contract: what `--model_name` of a training command names."""
    folder = tmp_path_factory.mktemp("base_model")
    tiny_model.save_pretrained(folder)
    demo_model.build_processor().save_pretrained(folder)
    CropContract(
        image_shorter_side=demo_world.OVERVIEW_SIDE,
        crop_shorter_side=demo_world.OVERVIEW_SIDE,
        max_pixels=4 * demo_world.OVERVIEW_SIDE**2,
        factor=demo_world.MERGED_PATCH,
        system_prompt=demo_world.SYSTEM_PROMPT,
    ).save(folder)
    return folder


@pytest.fixture(scope="session")
def _loaded(base_folder):
    from model_utils import load_processor

    return load_processor(str(base_folder))


@pytest.fixture(scope="session")
def processor(_loaded):
    return _loaded[0]


@pytest.fixture(scope="session")
def contract(_loaded):
    return _loaded[1]


@pytest.fixture(scope="session")
def renderer(processor, contract):
    return Renderer(processor, contract)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """`images/*.jpg` and `train.jsonl` (12 pictures, 36 questions), `val.jsonl` and `test.jsonl` (3 and 9 each)."""
    return demo_world.write_dataset(tmp_path_factory.mktemp("data"), 12, seed=1, num_val=3, num_test=3)


@pytest.fixture
def serve(monkeypatch):
    """Start a judge's endpoint that behaves as it is told (see judge_server.py); pauses between tries are short."""
    from judge_server import Server

    import judge
    import patience

    monkeypatch.setattr(judge, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.05)
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    servers = []

    def start(behave: Callable, port: int = 0) -> Server:
        servers.append(Server(behave, port).start())
        return servers[-1]

    yield start
    for server in servers:
        server.die()
