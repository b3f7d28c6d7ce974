"""What a network knows of its input: the noise layer and the metrics, against the official numbers and by hand."""

import math

import behaviour
import pytest
import torch
from official import Official, every_file

import kdfast
from kdfast.analysis import pixel_entropy


# ---- noise -----------------------------------------------------------------------------------------------------------
@every_file("explain_sigma")
def test_noise_matches_official_code(path):
    """The objective of the official loop, over features relu(w image)."""
    x = Official(path)
    noise = kdfast.NoiseSigma(x["in_sigma"], x.parameters["image_size"])
    noisy, penalty = noise(x["in_image"], x["in_unit_noise"])
    features, wanted = (torch.relu(image.flatten(1) @ x["in_w"].t()) for image in (noisy, x["in_image"]))
    error = (features - wanted).square().mean() / x.parameters["sigma_f"]
    loss = error - x.parameters["lambda_param"] * penalty
    got = {"out_noise_image": noisy, "out_penalty": penalty, "loss": loss, "loss_feature": error}
    got |= {"grad_sigma": torch.autograd.grad(loss, noise.sigma)[0], "state_after_sigma": noise.sigma}
    for name, value in got.items():
        torch.testing.assert_close(value.detach(), x[name].view(value.shape), rtol=1e-10, atol=1e-13)


def test_noise():
    """Each value of sigma covers its part of the image; the parameter is clamped, and moves away from the bounds."""
    sigma = torch.tensor([[0.5, 2.0], [1e-9, 0.1]])[None, None]
    noise = kdfast.NoiseSigma(sigma, 4)
    assert noise.sigma.data_ptr() != sigma.data_ptr()
    noisy, penalty = noise(torch.zeros(1, 3, 4, 4), torch.ones(5, 3, 4, 4))
    assert noisy.shape == (5, 3, 4, 4)
    held = torch.tensor([[0.5, 1.0], [1e-3, 0.1]])
    assert torch.equal(noise.sigma[0, 0], held)
    assert torch.equal(noisy[3, 1], held.repeat_interleave(2, 0).repeat_interleave(2, 1))
    torch.testing.assert_close(penalty, pixel_entropy(held).mean())
    (grad,) = torch.autograd.grad(penalty, noise.sigma)
    torch.testing.assert_close(grad[0, 0], 1 / (4 * held))
    assert repr(noise) == "NoiseSigma(size=2, image_size=4)"


def test_noise_of_two_images():
    """Both forwards come before one backward."""
    noise = kdfast.NoiseSigma(torch.rand(1, 1, 3, 3) + 0.1, 6)
    first, second = (noise(torch.randn(1, 2, 6, 6), torch.randn(3, 2, 6, 6))[1] for _ in range(2))
    grads = [torch.autograd.grad(x, noise.sigma, retain_graph=True)[0] for x in (first, first + second)]
    torch.testing.assert_close(2 * grads[0], grads[1])


def test_noise_compiles():
    torch.compiler.reset()
    noise = kdfast.NoiseSigma(torch.rand(1, 1, 3, 3) + 0.1, 6)
    inputs = torch.randn(1, 2, 6, 6), torch.randn(3, 2, 6, 6)
    for got, want in zip(torch.compile(noise, fullgraph=True, backend="eager")(*inputs), noise(*inputs), strict=True):
        torch.testing.assert_close(got, want)


def test_noise_no_host_sync(cuda):
    noise = kdfast.NoiseSigma(torch.rand(1, 1, 3, 3) + 0.1, 6).cuda()
    unit_noise = torch.randn(3, 2, 6, 6, device="cuda")

    def total(image):
        noisy, penalty = noise(image, unit_noise)
        return noisy.square().sum() + penalty

    behaviour.check_no_host_sync(total, [torch.randn(1, 2, 6, 6, device="cuda")])


def test_entropy():
    """Of a normal distribution, from an integral."""
    x = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    for sigma in (0.3, 1.0, 2.5):
        density = torch.exp(-((x / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))
        entropy = -torch.special.xlogy(density, density).sum() * (x[1] - x[0])
        torch.testing.assert_close(pixel_entropy(torch.tensor(sigma, dtype=torch.float64)), entropy)


# ---- metrics ---------------------------------------------------------------------------------------------------------
@every_file("explain_metrics")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_metrics_match_official_code(path, dtype):
    x = Official(path, dtype)
    sigma, distance, checkpoints = (x(name) for name in ("sigma", "weight_distance", "checkpoints"))
    got = kdfast.quantify_knowledge(sigma, distance, checkpoints, threshold=x.parameters["threshold"])
    wanted = x.results("out_")
    assert set(got) == set(wanted) | {"fore_max_std", "back_max_std"}
    for name, value in wanted.items():
        digits = x.of_type({"rtol": 1e-10, "atol": 1e-13}, {"rtol": 1e-4, "atol": 1e-6})
        torch.testing.assert_close(got[name].double(), value.view(got[name].shape), **digits)
    for side in ("fore", "back"):
        torch.testing.assert_close(got[f"{side}_max_std"] ** 2, got[f"{side}_max_var"])


def by_hand():
    """Two images, three checkpoints, 4 x 4 pixels, one of them background: sigma is 1 there, and 0.5 of a concept."""
    sigma = torch.ones(2, 3, 4, 4)
    foreground = torch.ones(4, 4, dtype=torch.bool)
    foreground[0] = False
    sigma[0, 0, 1, 0] = sigma[0, 1, 1, :3] = sigma[0, 2, 1, :2] = 0.5  # 1, 3, 2 concepts, 3 pixels in all
    sigma[1, 1, 2, 0] = sigma[1, 2, 2, 1] = 0.5  # 0, 1, 1: two pixels in all, one of them kept
    return sigma, torch.tensor([0.5, 0.25, 0.125, 0.125]), [0, 1, 3], foreground


def test_metrics_by_hand():
    sigma, distance, checkpoints, foreground = by_hand()
    got = kdfast.quantify_knowledge(sigma, distance, checkpoints, foreground)
    # Both are complete at the second checkpoint, in epoch 1: a tie goes to the first.
    assert got["fore_max_mean"] == 0.75 and got["fore_max_std"] == 0 == got["fore_max_var"]
    torch.testing.assert_close(got["fore_max_slope"].item(), (3 + 1) / 2 / 0.75)
    torch.testing.assert_close(got["fore_percent"].item(), (2 / 3 + 1 / 2) / 2)
    torch.testing.assert_close(got["total_percent"], got["fore_percent"])
    assert got["back_percent"] == 0 and got["back_max_mean"] == 0.5  # no concept at all: from the first checkpoint on
    torch.testing.assert_close(got["background_mean"], pixel_entropy(torch.ones(3)))
    each = foreground.expand(2, 4, 4)
    for name, value in kdfast.quantify_knowledge(sigma, distance.tolist(), torch.tensor(checkpoints), each).items():
        assert torch.equal(value, got[name])


def test_metrics_take_the_centre():
    """Without a foreground: rows and columns from a sixth to five sixths."""
    sigma = torch.rand(2, 3, 12, 12) * 0.9 + 0.1
    centre = torch.zeros(12, 12, dtype=torch.bool)
    centre[2:11, 2:11] = True
    got, want = (kdfast.quantify_knowledge(sigma, [0.1, 0.2, 0.3], [0, 1, 2], f) for f in (None, centre))
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_metrics_threshold():
    """More is asked of a concept, and there are fewer."""
    sigma, distance, checkpoints, foreground = by_hand()
    gap = math.log(2)  # of a concept here
    slopes = [
        kdfast.quantify_knowledge(sigma, distance, checkpoints, foreground, threshold=t)["fore_max_slope"]
        for t in (0.99 * gap, 1.01 * gap)
    ]
    assert slopes[0] > 0 and slopes[1] == 0


ERRORS = [
    (lambda s, d, c, f: kdfast.NoiseSigma([1.0], 4), TypeError, "sigma must be a torch.Tensor, got list"),
    (
        lambda s, d, c, f: kdfast.NoiseSigma(torch.ones(1, 2, 2, 2), 4),
        ValueError,
        r"sigma must be \(1, 1, size, size\), got shape \(1, 2, 2, 2\)",
    ),
    (lambda s, d, c, f: kdfast.NoiseSigma(torch.ones(1, 1, 2, 2), 4.0), TypeError, "image_size must be an int"),
    (
        lambda s, d, c, f: kdfast.NoiseSigma(torch.ones(1, 1, 2, 2), 4)(torch.ones(1, 3, 4, 5), torch.ones(1, 3, 4, 4)),
        ValueError,
        r"image must have 4 x 4 pixels, got shape \(1, 3, 4, 5\)",
    ),
    (
        lambda s, d, c, f: kdfast.NoiseSigma(torch.ones(1, 1, 2, 2), 4)(torch.ones(1, 3, 4, 4), torch.ones(3, 4, 4)),
        ValueError,
        r"unit_noise must be \(batch, channels, height, width\)",
    ),
    (lambda s, d, c, f: kdfast.quantify_knowledge(s[0], d, c), ValueError, r"sigma must be \(images, checkpoints, "),
    (lambda s, d, c, f: kdfast.quantify_knowledge(s[:0], d, c), ValueError, "sigma must be .*got shape"),
    (lambda s, d, c, f: kdfast.quantify_knowledge(s, d[None], c), ValueError, r"weight_distance must be \(epochs,\)"),
    (
        lambda s, d, c, f: kdfast.quantify_knowledge(s, d, c[:2]),
        ValueError,
        r"checkpoints must be 3 epochs, one for each checkpoint of sigma, got \[0, 1\]",
    ),
    (lambda s, d, c, f: kdfast.quantify_knowledge(s, d, [0.0, 1.0, 2.0]), ValueError, "checkpoints must be 3 epochs"),
    (
        lambda s, d, c, f: kdfast.quantify_knowledge(s, d, [0, 1, 4]),
        ValueError,
        r"checkpoints must be epochs from 0 to 3, got \[0, 1, 4\]",
    ),
    (lambda s, d, c, f: kdfast.quantify_knowledge(s, d, c, threshold="1"), TypeError, "threshold must be a number"),
    (lambda s, d, c, f: kdfast.quantify_knowledge(s, d, c, f.float()), ValueError, "foreground must be booleans"),
    (lambda s, d, c, f: kdfast.quantify_knowledge(s, d, c, f[:2]), ValueError, r"foreground must be .*\(4, 4\)"),
    (lambda s, d, c, f: kdfast.quantify_knowledge(s, d, c, [[True]]), TypeError, "foreground must be a torch.Tensor"),
    (
        lambda s, d, c, f: kdfast.quantify_knowledge(s, d, c, torch.ones_like(f)),
        ValueError,
        "foreground must leave background in every image",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[message for *_, message in ERRORS])
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(*by_hand())
