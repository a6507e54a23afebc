"""The proof that matrix products are right, on a CPU with products that are wrong."""

import random

import pytest
import torch
from torch.overrides import TorchFunctionMode

from colospec.mps import products
from colospec.target import Target


class FaultyKernels(TorchFunctionMode):
    """Matrix products with one wrong tile, or NaN in one place."""

    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong

    def __torch_function__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        is_product = function in (torch.Tensor.matmul, torch.Tensor.__matmul__)
        if is_product and result.dtype is torch.bfloat16:
            row = random.randrange(0, result.shape[0], 64)
            size = 64 if self.wrong == 0.0 else 1
            result[row : row + size, :size] = self.wrong
        return result


def test_right_products_pass_in_whole_and_in_samples():
    before = torch.get_rng_state()
    products.check_shape(torch.device("cpu"), (96, 130, 200))
    products.check_shape(torch.device("cpu"), (1030, 900, 700))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shape", [(100, 64, 200), (1030, 900, 700)])
@pytest.mark.parametrize("wrong", [0.0, float("nan")])
def test_one_wrong_tile_is_found_and_named(monkeypatch, shape, wrong):
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "42")
    m, k, n = shape
    words = rf"\[{m}, {k}\] -> \[{m}, {n}\].*mps.engine_threads"
    with pytest.raises(RuntimeError, match=words), FaultyKernels(wrong):
        products.check_shape(torch.device("cpu"), shape)


def test_model_shapes_are_those_of_its_layers(tmp_path):
    config = {"hidden_size": 4096, "num_hidden_layers": 36, "vocab_size": 151936,
              "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
              "intermediate_size": 12288}  # fmt: skip
    target = Target.from_config(tmp_path, config)
    assert products.model_shapes(target, tokens=8192, tp=2, draft_vocab_size=32000) == [
        (8192, 4096, 3072), (8192, 2048, 4096), (8192, 4096, 12288), (8192, 6144, 4096),
        (8192, 4096, 32000),
    ]  # fmt: skip
