"""Which directory target.path and target.weights mean."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer

from colospec.config import CONF_DIR, Mode, RunConfig, TargetConfig, Weights
from colospec.draft.eagle3.config import Eagle3Config
from colospec.draft.layers import eagle3_layers
from colospec.draft.rope import rope_frequencies
from colospec.target import Target
from colospec.train.find_target import CONFIGS, target_directory
from colospec.train.job import load_target

PUBLIC = sorted(CONFIGS.glob("*.json"))
# Parameters in billions, as their model cards say.
SIZES = {
    "Llama-3.1-8B-Instruct": 8.03, "Llama-3.3-70B-Instruct": 70.6, "Qwen3-0.6B": 0.596,
    "Qwen3-1.7B": 1.72, "Qwen3-14B": 14.8, "Qwen3-32B": 32.8, "Qwen3-4B": 4.02, "Qwen3-8B": 8.19,
}  # fmt: skip
TINY = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 16,
    "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 300, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """Empty caches of this test's own; the model hub's is at tmp_path/hub."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for module in ("huggingface_hub.constants", "transformers.utils.hub"):
        for name in ("HF_HUB_CACHE", "TRANSFORMERS_CACHE"):
            monkeypatch.setattr(f"{module}.{name}", str(tmp_path / "hub"), raising=False)
    return tmp_path / "hub"


def random_target(path):
    return target_directory(TargetConfig(path=str(path), weights=Weights.random))


def snapshot(hub, repository):
    """Make a repository of the model hub's cache, with a config.json."""
    folder = hub / ("models--" + repository.replace("/", "--"))
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc123")
    path = folder / "snapshots" / "abc123"
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(TINY))
    return path


@pytest.mark.parametrize("file", PUBLIC, ids=lambda file: file.stem)
def test_public_configs_are_those_of_models_of_their_size(file):
    target = Target.from_config(file, json.loads(file.read_text()))
    width = target.hidden_size
    heads = target.num_attention_heads + target.num_key_value_heads
    layer = 2 * heads * target.head_dim * width + 3 * target.intermediate_size * width
    vocabulary = (1 if target.tied else 2) * target.vocab_size * width
    total = target.num_layers * layer + vocabulary
    assert total / 1e9 == pytest.approx(SIZES[file.stem], rel=0.005)
    assert target.dtype is torch.bfloat16
    assert len(eagle3_layers(None, target)) == 3
    assert torch.isfinite(rope_frequencies(target)[0]).all()


def test_every_public_target_of_the_settings_comes_with_its_config():
    named = set()
    for file in (CONF_DIR / "target").glob("*.yaml"):
        for line in file.read_text().splitlines():
            if line.startswith("path: ") and line != "path: null":
                named.add(line.rpartition("/")[2])
    assert named == {file.stem for file in PUBLIC} == set(SIZES)


def test_random_weights_need_the_config_alone():
    path = random_target("Qwen/Qwen3-8B")
    assert json.loads((path / "config.json").read_text())["intermediate_size"] == 12288
    assert AutoConfig.from_pretrained(path).num_hidden_layers == 36
    text = "def f(x):\n    return 'é' # 語\n"
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"
    assert tokenizer(chat)["input_ids"][0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert load_target(
        RunConfig(
            mode=Mode.alternate,
            draft=Eagle3Config(),
            target=TargetConfig(path="Qwen/Qwen3-8B", weights=Weights.random),
        )
    ).path == path  # fmt: skip


def test_processes_that_ask_at_once_get_one_directory(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(random_target, ["Qwen/Qwen3-0.6B"] * 8))
    (path,) = paths
    assert list((tmp_path / "cache" / "colospec" / "targets").iterdir()) == [path]
    assert {"config.json", "tokenizer.json"} <= {file.name for file in path.iterdir()}


def test_a_directory_with_a_tokenizer_is_taken_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    made = random_target(tmp_path)
    assert made != tmp_path
    assert json.loads((made / "config.json").read_text()) == TINY
    (tmp_path / "tokenizer.json").touch()
    assert random_target(tmp_path) == tmp_path


def test_random_weights_of_an_unknown_repository_say_which_file_to_get(caches):
    with pytest.raises(ValueError, match=r"Qwen3-8B.*`hf download some/model config\.json`"):
        random_target("some/model")
    snapshot(caches, "some/model")
    assert json.loads((random_target("some/model") / "config.json").read_text()) == TINY


def test_a_repository_that_is_not_cached_says_what_to_type():
    with pytest.raises(ValueError, match=r"lacks config\.json.*`hf download Qwen/Qwen3-8B`.*/dir"):
        target_directory(TargetConfig(path="Qwen/Qwen3-8B"))


def test_a_cached_repository_is_found_once_it_is_whole(caches):
    path = snapshot(caches, "some/model")
    with pytest.raises(ValueError, match=r"lacks model\.safetensors"):
        target_directory(TargetConfig(path="some/model"))
    save_file({"x": torch.ones(1)}, path / "model.safetensors")
    assert target_directory(TargetConfig(path="some/model")) == path


def test_a_local_directory_wins_over_a_repository_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "model").mkdir(parents=True)
    assert str(target_directory(TargetConfig(path="some/model"))) == "some/model"


def test_other_paths_that_do_not_exist_are_left_to_the_reader(tmp_path):
    config = TargetConfig(path=str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"absent is not a Hugging Face model directory"):
        Target.load(target_directory(config))
