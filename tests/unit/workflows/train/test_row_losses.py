"""The losses of the stages against their formulas, written out in float64."""

import pytest
import torch

from protlm.config import Config, TrainConfig
from protlm.data.batching.batches import Batch
from protlm.model.segments import Segments
from protlm.workflows.train.row_losses import DistillLoss, TransferLoss, language_loss, row_loss_of
from tests.unit.model.small_models import bounds, build, proteins

SIZES = (3, 40, 17)
SHAPE = {"num_layers": 3, "positions": "learned", "max_positions": 4096}


@pytest.fixture(scope="module")
def teacher():
    return build(attention="softmax", dropout=0.5, **SHAPE)


@pytest.fixture(scope="module")
def student():
    model = build(1, attention=("positive", "local", "near-far"), near_block=8, **SHAPE)
    with torch.no_grad():
        # Far from the teacher's predictions, where the divergence one way is not that the other way.
        model.head.bias.add_(torch.randn(33, generator=torch.Generator().manual_seed(2)))
    return model


def batch_of(*places):
    tokens = torch.cat(proteins(*SIZES))
    positions = torch.tensor(places, dtype=torch.long)
    return Batch(tokens, bounds(*SIZES), positions, tokens[positions] % 20 + 4, 0, len(tokens))


@pytest.fixture
def batch():
    return batch_of(1, 10, 50)


def squares(x):
    return x.double().square().sum().item()


def expected_transfer(student, teacher, batch):
    """Returns the sum over the layers with features of Σ‖y − t‖² / Σ‖t‖²."""
    total, segments = 0.0, Segments.from_bounds(batch.cu_seqlens, len(batch.tokens))
    with torch.no_grad():
        states = teacher.hidden_states(batch.tokens, batch.cu_seqlens, (0, 1, 2))
        for number in (0, 2):
            x = teacher.layers[number].attention_norm(states[number])
            y, t = (model.layers[number].attention(x, segments, None) for model in (student, teacher))
            total += squares(y - t) / squares(t)
    return total


def test_transfer_is_the_relative_error_of_each_attention_on_the_teachers_input(student, teacher, batch):
    settings = Config(model=student.config, train=TrainConfig(stage="transfer"))
    # The teacher is asked in evaluation mode, whatever mode it comes in.
    row = TransferLoss(teacher.train(), settings)(student.train(), batch)
    assert row.loss.item() == pytest.approx(expected_transfer(student, teacher, batch), rel=1e-5)
    assert row.loss.item() > 0.1
    assert (row.weight, row.nll, row.num_correct) == (1, 0.0, 0)
    row.loss.backward()
    learns = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    student.zero_grad()
    assert {name.partition(".attention.")[0] for name in learns} == {"layers.0", "layers.2"}
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_model_transfers_nothing_from_itself(student, batch):
    settings = Config(model=student.config, train=TrainConfig(stage="transfer"))
    same = build(1, attention=("positive", "local", "near-far"), near_block=8, **SHAPE)
    assert TransferLoss(same, settings)(student, batch).loss.item() == 0


def expected_distill(student, teacher, batch):
    """Returns the means over all tokens and over the targets of Σ p·log(p / q), and Σ‖h − t‖² / Σ‖t‖²."""
    with torch.no_grad():
        p, q = (model(batch.tokens, batch.cu_seqlens).double().softmax(-1) for model in (teacher, student))
        h, t = (model.hidden_states(batch.tokens, batch.cu_seqlens, (3,))[3] for model in (student, teacher))
    each = [sum((a * (a / b).log()).item() for a, b in zip(p[i], q[i], strict=True)) for i in range(len(p))]
    targets = batch.target_positions.tolist()
    of_targets = sum(each[place] for place in targets) / len(targets) if targets else 0.0
    return sum(each) / len(each) + of_targets + squares(h - t) / squares(t)


@pytest.mark.parametrize("places", [(1, 10, 50), ()], ids=["targets", "none"])
def test_distillation_is_the_divergence_of_all_predictions_and_the_error_of_the_last_state(student, teacher, places):
    batch = batch_of(*places)
    row = DistillLoss(teacher.train())(student, batch)
    assert row.loss.item() == pytest.approx(expected_distill(student, teacher.eval(), batch), rel=1e-4)
    assert row.weight == 1
    plain = language_loss(student, batch)
    assert row.nll.item() == pytest.approx(plain.nll.item(), rel=1e-5)
    assert row.num_correct == plain.num_correct
    assert plain.weight == len(places)


def test_a_run_without_a_stage_has_the_loss_of_language_modelling(student):
    assert row_loss_of(Config(model=student.config), None) is language_loss
