"""Oracle: the recursion of Flow-GRPO in float64, written out."""

import copy

import pytest
import torch

from trl_spatial.diffusion_grpo.runtime.ema import EMA


def make_module(dtype=torch.float32):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    module[0].bias.requires_grad_(False)
    return module.to(dtype)


def change(module, scale=1.0):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn_like(parameter)


def snapshot(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("every", [1, 8])
@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999])
def test_equals_the_recursion(decay, every):
    module = make_module()
    ema = EMA(module, decay, every=every)
    expected = {name: value.double() for name, value in snapshot(module).items()}
    for step in range(1, 101):
        change(module)
        ema.step()
        if step % every == 0:
            share = min(decay, (1 + step) / (10 + step))
            for name, value in snapshot(module).items():
                expected[name] = share * expected[name] + (1 - share) * value.double()
    assert set(ema.weights) == {"0.weight", "1.weight", "1.bias"}  # what is frozen needs no average
    for name, weight in ema.weights.items():
        torch.testing.assert_close(weight.double(), expected[name], rtol=1e-4, atol=1e-5)


def test_bfloat16_weights_are_averaged_in_float32():
    module = make_module(torch.bfloat16)
    ema = EMA(module, 0.9)
    ema.num_updates = 1000  # the warm-up is over
    with torch.no_grad():
        module[1].bias.zero_()
        ema.weights["1.bias"].fill_(1.0)
    for _ in range(5):
        ema.step()
    assert ema.weights["1.bias"].dtype == torch.float32
    torch.testing.assert_close(ema.weights["1.bias"], torch.full((2,), 0.9**5))  # .9 ** 5 is no number of bfloat16


class TestApplied:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_computes_with_the_average_and_gives_the_weights_back(self, dtype):
        module = make_module(dtype)
        ema = EMA(module, 0.9)
        averaged = copy.deepcopy(module)
        change(module)
        before, inputs = snapshot(module), torch.ones(1, 3, dtype=dtype)
        with torch.no_grad():
            averaged[0].bias.copy_(module[0].bias)  # frozen: not averaged
            with ema.applied():
                assert torch.equal(module(inputs), averaged(inputs))
                assert all(parameter.dtype == dtype for parameter in module.parameters())
            assert not torch.equal(module(inputs), averaged(inputs))
        for name, value in snapshot(module).items():
            assert torch.equal(value, before[name])

    def test_gives_the_weights_back_after_an_error(self):
        module = make_module()
        ema = EMA(module, 0.9)
        change(module)
        before = snapshot(module)
        with pytest.raises(KeyboardInterrupt), ema.applied():
            raise KeyboardInterrupt
        assert all(torch.equal(value, before[name]) for name, value in snapshot(module).items())

    def test_training_goes_on_as_if_nothing_had_happened(self):
        def train(look_at_average):
            module = make_module()
            optimizer, ema = torch.optim.AdamW(module.parameters(), lr=0.1), EMA(module, 0.9)
            for _ in range(4):
                module(torch.ones(5, 3)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                ema.step()
                if look_at_average:
                    with torch.no_grad(), ema.applied():
                        module(torch.ones(5, 3))
            return snapshot(module), ema.weights

        for plain, looked in zip(train(False), train(True), strict=True):
            assert all(torch.equal(plain[name], looked[name]) for name in plain)


def test_continues_from_its_state():
    module = make_module()
    ema = EMA(module, 0.9, every=3)
    for _ in range(4):
        change(module)
        ema.step()
    twin = copy.deepcopy(module)
    resumed = EMA(twin, 0.9, every=3)
    resumed.load_state_dict(copy.deepcopy(ema.state_dict()))
    for generator_seed in range(4):
        for average, of in ((ema, module), (resumed, twin)):
            torch.manual_seed(generator_seed)
            change(of)
            average.step()
    assert resumed.num_updates == ema.num_updates == 8
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in ema.weights.items())


@pytest.mark.parametrize(("kwargs", "words"), [({"decay": 1.0}, "got 1.0"), ({"decay": 0.9, "every": 0}, "got 0")])
def test_errors(kwargs, words):
    with pytest.raises(ValueError, match=words):
        EMA(make_module(), **kwargs)
