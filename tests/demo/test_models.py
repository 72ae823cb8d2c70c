import pytest

torch = pytest.importorskip("torch")

from ringcomm.demo.models import CONTEXT, CharTransformer, DigitsNet, num_parameters  # noqa: E402


def test_transformer_has_two_million_parameters_nearly_all_of_them_matrices() -> None:
    model = CharTransformer()
    count = num_parameters(model)
    vectors = sum(p.numel() for p in model.parameters() if p.dim() < 2)
    assert 1.8e6 < count < 2.2e6
    assert vectors < 0.002 * count
    assert len({p.data_ptr() for p in model.parameters()}) == len(list(model.parameters()))


def test_transformer_does_not_see_the_future() -> None:
    torch.manual_seed(0)
    model = CharTransformer(width=32, num_heads=2, num_layers=2)
    characters = torch.randint(128, (1, CONTEXT))
    changed = characters.clone()
    changed[0, 40] = (changed[0, 40] + 1) % 128
    before, after = model(characters), model(changed)
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.equal(before[:, 40:], after[:, 40:])


def test_digits_net_gives_ten_logits() -> None:
    assert DigitsNet()(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
