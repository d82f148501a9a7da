"""MTCNN's landmarks as a loss, and D's view of colour."""

import torch

from training.discriminators import pool_colour
from training.draws import Draws
from training.pose import Pose, jitter, pose_distance


def test_a_moved_face_is_at_a_distance_that_can_be_learned_from() -> None:
    torch.manual_seed(0)
    image = torch.nn.functional.interpolate(torch.rand(2, 3, 16, 16) * 2 - 1, size=128, mode="bilinear")
    pose, placed = Pose(), jitter(Draws(0, 0, 2), 2)
    real = pose(image, placed)
    assert torch.isclose(pose_distance(real, pose(image, placed)), -real[2].mean(), atol=1e-4)
    moved = image.roll(6, dims=3).requires_grad_()
    distance = pose_distance(real, pose(moved, placed)) + real[2].mean()
    assert distance > 0.01
    distance.backward()
    assert moved.grad is not None and moved.grad.abs().max() > 0


def test_pooled_colour_keeps_luma_and_hides_fine_colour() -> None:
    torch.manual_seed(0)
    grey = torch.rand(1, 1, 32, 32).expand(1, 3, 32, 32) * 0.5
    grain = torch.randn(1, 3, 32, 32) * 0.1
    grain = grain - (grain * torch.tensor([0.299, 0.587, 0.114])[None, :, None, None]).sum(dim=1, keepdim=True)
    assert torch.allclose(pool_colour(grey, 8), grey, atol=1e-6)
    assert (pool_colour(grey + grain, 8) - grey).abs().mean() < 0.3 * grain.abs().mean()
