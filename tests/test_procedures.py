"""The procedures, each by training small networks on the digits: what they teach, to whom and in which order."""

import copy
import multiprocessing
import os
import signal
import time
import warnings

import pytest
import torch
from processes import HAVE_GLOO, NO_GLOO
from torch import nn

import kdfast
from kdfast import procedures
from kdfast.procedures import PeerExchange, PeerWarning, inversion

sklearn_datasets = pytest.importorskip("sklearn.datasets", reason="the [compare] extra is not installed")
dist = pytest.importorskip("torch.distributed")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_fallback_warning():
    """Plain PyTorch trains as well."""
    with kdfast.fallback():
        yield


def digits():
    """-> training images (898, 64) and labels, test images and labels."""
    images, labels = sklearn_datasets.load_digits(return_X_y=True)
    images, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:898], order[898:]
    return images[train], labels[train], images[test], labels[test]


def network(width=16):
    return nn.Sequential(nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 10))


def batches(images, labels, epochs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(len(labels), generator=generator).split(64)[:-1]:
            yield images[index], labels[index]


def trainer(images, labels, epochs=8):
    """-> train(network, objective) for the procedures, which also records what was trained."""

    def train(net, objective):
        train.trained.append(net)
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        for batch in batches(images, labels, epochs):
            value = objective(*batch)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()

    train.trained = []
    return train


@torch.no_grad()
def accuracy(net, images, labels):
    return (net.eval()(images).argmax(1) == labels).double().mean().item()


# ---- one network after the other -------------------------------------------------------------------------------------
@pytest.mark.parametrize("loss", [None, kdfast.CWTM(), kdfast.DKPP(temperature=2.0)], ids=["KD", "CWTM", "DKPP"])
def test_born_again(loss):
    """Every generation learns, with each of the paper's losses, and the ensemble beats their mean."""
    images, labels, test_images, test_labels = digits()
    train = trainer(images, labels)
    networks = procedures.born_again(network, train, generations=2, loss=loss)
    assert networks == train.trained and len({id(net) for net in networks}) == 3
    assert not any(net.training or any(p.requires_grad for p in net.parameters()) for net in networks)
    scores = [accuracy(net, test_images, test_labels) for net in networks]
    assert min(scores) > 0.9, scores
    assert accuracy(procedures.Ensemble(networks), test_images, test_labels) > sum(scores) / 3


def test_born_again_learns_from_the_generation_before():
    """Generation k's objective is the loss on what generation k - 1 says in evaluation mode."""
    images, labels = torch.rand(8, 64), torch.arange(8)
    seen, objectives = [], []

    def loss(student, teacher, y):
        assert student.requires_grad and not teacher.requires_grad and torch.equal(y, labels)
        seen.append(teacher)
        return student.sum()

    def train(net, objective):
        objectives.append(objective(images, labels))

    networks = procedures.born_again(network, train, 2, loss)
    assert len(seen) == 2
    for teacher, net in zip(seen, networks, strict=False):
        assert torch.equal(teacher, net(images))
    first = copy.deepcopy(networks[0]).train()
    torch.testing.assert_close(objectives[0], nn.functional.cross_entropy(first(images), labels))
    with pytest.raises(ValueError, match="generations must be at least 1"):
        procedures.born_again(network, train, 0)


def test_ensemble_is_the_mean_of_probabilities():
    networks = [network().eval() for _ in range(3)]
    images = torch.rand(5, 64)
    want = torch.stack([net(images).softmax(1) for net in networks]).mean(0)
    torch.testing.assert_close(procedures.Ensemble(networks)(images).exp(), want)
    with pytest.raises(ValueError, match="networks must have at least one network"):
        procedures.Ensemble([])


def test_refine_labels():
    """No round after the first looks at the labels, or the first either where there is a refinery already."""
    images, labels, test_images, test_labels = digits()
    sizes, none = [], torch.full_like(labels, -1)  # a label that would be an error

    def make(number):
        sizes.append(number)
        return network(16 + number)

    trains = [trainer(images, y) for y in (labels, none, none)]
    networks = procedures.refine_labels(make, lambda net, objective: trains[len(sizes) - 1](net, objective), rounds=3)
    assert networks == [train.trained[0] for train in trains] and sizes == [0, 1, 2]
    assert not any(net.training or any(p.requires_grad for p in net.parameters()) for net in networks)
    scores = [accuracy(net, test_images, test_labels) for net in networks]
    assert min(scores) > 0.9, scores
    (pupil,) = procedures.refine_labels(make, trainer(images, none), 1, refinery=networks[2])
    assert accuracy(pupil, test_images, test_labels) > 0.9


def test_refined_labels_are_those_of_the_inputs():
    """The soft cross-entropy with what the network before says, in evaluation mode, about the very batch."""
    values, inputs = [], [torch.rand(8, 64) for _ in range(3)]

    def train(net, objective):
        values.append(objective(inputs[len(values)], torch.arange(8)))
        before.append(copy.deepcopy(net))

    before = []
    networks = procedures.refine_labels(lambda number: network(), train, 3)
    torch.testing.assert_close(values[0], nn.functional.cross_entropy(before[0](inputs[0]), torch.arange(8)))
    for number in (1, 2):
        refined = networks[number - 1](inputs[number]).softmax(1)
        want = -(refined * before[number](inputs[number]).log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(values[number], want)
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        procedures.refine_labels(lambda number: network(), train, 0)


# ---- several networks together ---------------------------------------------------------------------------------------
def plain_dml(student, peers, labels):
    """The formula, for what does not ask about the kernels."""
    ce = nn.functional.cross_entropy(student, labels)
    return ce + sum(
        nn.functional.kl_div(student.log_softmax(1), peer.softmax(1), reduction="batchmean") for peer in peers
    )


def test_mutual_learning_on_digits():
    images, labels, test_images, test_labels = digits()
    networks = [network() for _ in range(3)]
    mutual = procedures.MutualLearning(networks, [torch.optim.Adam(net.parameters(), 1e-2) for net in networks])
    losses = [mutual.step(*batch) for batch in batches(images, labels, 8)]
    assert losses[0].shape == (3,) and torch.stack(losses[-5:]).mean() < torch.stack(losses[:5]).mean() / 2
    assert min(accuracy(net, test_images, test_labels) for net in networks) > 0.9


def test_mutual_learning_updates_in_turn():
    """As written in the paper: each network's step is taken with the new weights of those before it."""
    images, labels, *_ = digits()
    networks = [nn.Linear(64, 10) for _ in range(3)]
    by_hand = copy.deepcopy(networks)
    mutual = procedures.MutualLearning(networks, [torch.optim.SGD(n.parameters(), 0.5) for n in networks], plain_dml)
    for x, y in batches(images, labels, 1):
        losses = mutual.step(x, y)
        for i, net in enumerate(by_hand):
            peers = [other(x).detach() for j, other in enumerate(by_hand) if j != i]
            value = plain_dml(net(x), peers, y)
            torch.testing.assert_close(losses[i], value.detach())
            for p, grad in zip(net.parameters(), torch.autograd.grad(value, list(net.parameters())), strict=True):
                p.data -= 0.5 * grad
    for net, other in zip(networks, by_hand, strict=True):
        torch.testing.assert_close(net.weight, other.weight)


def test_mutual_learning_errors():
    net, optimizer = network(), torch.optim.SGD(network().parameters(), 0.1)
    with pytest.raises(ValueError, match="networks must be at least 2, got 1"):
        procedures.MutualLearning([net], [optimizer], plain_dml)
    with pytest.raises(ValueError, match="optimizers must be one per network, 2, got 1"):
        procedures.MutualLearning([net, net], [optimizer], plain_dml)


# ---- codistillation --------------------------------------------------------------------------------------------------
def codistil(exchange, net, images, labels, steps, seed, before_step=lambda step: None):
    """Train with the mean of the peers' probabilities as a second target."""
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for step, (x, y) in zip(range(steps), batches(images, labels, 100, seed), strict=False):
        before_step(step)
        logits, peers = net(x), exchange.logits(x)
        value = nn.functional.cross_entropy(logits, y)
        if peers:
            value = value - (torch.stack(peers).softmax(2).mean(0) * logits.log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        exchange.step()


def pair(folder, **options):
    networks = [network(), network()]
    return networks, [PeerExchange(net, folder, peer=i, peers=2, **options) for i, net in enumerate(networks)]


def test_exchange_every_n_steps(tmp_path):
    """A peer is what it was at its last exchange, running statistics included, and has no gradient."""
    images, labels, *_ = digits()
    (net, other), (here, there) = pair(tmp_path, every=4)
    assert here.logits(images[:3]) == [] and here.peer_steps == {}
    codistil(there, other, images, labels, 5, seed=1)
    copied = copy.deepcopy(other)  # one step later than what it wrote
    codistil(here, net, images, labels, 3, seed=0)
    assert here.peer_steps == {}
    here.step()
    assert here.peer_steps == {1: 4}
    (said,) = here.logits(images[:9])
    assert not said.requires_grad and not torch.equal(said, copied.eval()(images[:9]))
    there.exchange()
    (before,) = here.logits(images[:9])
    assert torch.equal(before, said)
    here.exchange()
    (now,) = here.logits(images[:9])
    assert here.peer_steps == {1: 5} and torch.equal(now, other.eval()(images[:9]))
    assert sorted(os.listdir(tmp_path)) == ["peer0.pt", "peer1.pt"]


def test_silent_peer(tmp_path, monkeypatch):
    """One warning for each silence, with what is used instead; who comes back is heard."""
    now = [1000.0]
    monkeypatch.setattr(procedures.peers.time, "monotonic", lambda: now[0])
    (_, other), (here, there) = pair(tmp_path, timeout=60.0)

    def exchange(seconds):
        now[0] += seconds
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            here.exchange()
        assert all(w.category is PeerWarning and w.filename == __file__ for w in caught)
        return [str(w.message) for w in caught]

    assert exchange(59) == []
    path = tmp_path / "peer1.pt"
    assert exchange(2) == [f"peer 1 has written no weights to {path} for 61 s: going on without it"]
    assert exchange(99) == []
    there.steps = 40
    there.exchange()
    assert exchange(1) == [] and here.peer_steps == {1: 40} and exchange(59) == []
    images = torch.rand(3, 64)
    assert exchange(20) == [f"peer 1 has written no weights to {path} for 79 s: going on with those of its step 40"]
    assert torch.equal(here.logits(images)[0], other.eval()(images)) and exchange(999) == []
    there.exchange()
    assert exchange(1) == [] and len(exchange(61)) == 1


def test_damaged_file_is_silence(tmp_path):
    """What cannot be read, half a file for example, leaves the weights from before."""
    images = torch.rand(3, 64)
    _, (here, there) = pair(tmp_path)
    there.exchange()
    here.exchange()
    (before,) = here.logits(images)
    for content in (b"", (tmp_path / "peer1.pt").read_bytes()[:1000], b"no weights at all"):
        (tmp_path / "peer1.pt").write_bytes(content)
        here.exchange()
        assert torch.equal(here.logits(images)[0], before)
    (tmp_path / "peer1.pt").unlink()
    here.exchange()
    assert torch.equal(here.logits(images)[0], before)


def test_failed_write_leaves_no_file(tmp_path, monkeypatch):
    _, (here, _) = pair(tmp_path)

    def full_disk(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        here.exchange()
    assert os.listdir(tmp_path) == []


def test_exchange_errors(tmp_path):
    for options, error, message in (
        ({}, ValueError, "peer and peers are required without torch.distributed"),
        ({"peer": 2, "peers": 2}, ValueError, "peer must be from 0 to 1, got 2"),
        ({"peer": 0, "peers": 2, "every": 0}, ValueError, "every must be at least 1"),
        ({"peer": 0, "peers": 2, "timeout": 0}, ValueError, "timeout must be finite and above 0"),
    ):
        with pytest.raises(error, match=message):
            PeerExchange(network(), tmp_path, **options)
    PeerExchange(network(8), tmp_path, peer=1, peers=2).exchange()
    with pytest.raises(ValueError, match="network must be the same on all peers; the weights in .*peer1.pt do not fit"):
        PeerExchange(network(), tmp_path, peer=0, peers=2).exchange()


STEPS, EVERY, DEATH = 60, 10, 25
RANKS, DEAD, ALIVE = 3, 1, (0, 2)


def rank(number, port, folder, results):
    """One process of gloo with its own share of the digits; one of them dies in the middle of a step."""
    torch.set_num_threads(1)
    torch.manual_seed(number)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=number, world_size=RANKS)
    images, labels, test_images, test_labels = digits()
    net = network()
    first = torch.nn.Linear(1, 1)  # the first step loads parts of torch, for longer than peers wait
    first(torch.ones(1)).backward()
    torch.optim.SGD(first.parameters(), 0.1).step()
    dist.barrier()  # together, as far as that goes: from here on silence counts
    exchange = PeerExchange(net, folder, every=EVERY, timeout=0.5)

    def before_step(step):
        if number == DEAD and step == DEATH:
            os.kill(os.getpid(), signal.SIGKILL)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        codistil(exchange, net, images[number::RANKS], labels[number::RANKS], STEPS, number, before_step)
        store.set(f"trained by {number}", "")
        store.wait([f"trained by {other}" for other in ALIVE])
        give_up = time.monotonic() + 60
        while exchange.peer_steps.get(DEAD) != 20 and time.monotonic() < give_up:
            exchange.exchange()
        time.sleep(0.6)
        exchange.exchange()
    messages = [str(w.message) for w in caught if w.category is PeerWarning]
    results.put((number, exchange.peer_steps, messages, accuracy(net, test_images, test_labels)))
    results.close()
    results.join_thread()
    dist.destroy_process_group()


@pytest.mark.skipif(not HAVE_GLOO, reason=NO_GLOO)
def test_codistillation_between_processes(tmp_path):
    """Of three, one is killed after 25 steps: the others learn, and end with each other's last weights.

    Of the dead one they have the weights of step 20, and say so.
    """
    context = multiprocessing.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # it outlives every rank
    results = context.Queue()
    processes = [
        context.Process(target=rank, args=(number, store.port, str(tmp_path), results)) for number in range(RANKS)
    ]
    for process in processes:
        process.start()
    try:
        found = [results.get(timeout=120) for _ in ALIVE]
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, -signal.SIGKILL, 0]
    finally:
        for process in processes:
            process.kill()
    assert sorted(number for number, *_ in found) == list(ALIVE)
    for number, steps, messages, score in found:
        (other,) = set(ALIVE) - {number}
        assert steps == {DEAD: 20, other: STEPS} and score > 0.85
        dead = [message for message in messages if message.startswith("peer 1 ")]
        assert len(dead) == 1 and dead[0].endswith("going on with those of its step 20")


# ---- residual distillation -------------------------------------------------------------------------------------------
class Shortcut(nn.Sequential):
    """x + layers(x)."""

    def forward(self, x):
        return x + super().forward(x)


def paths(cuts=(1, 2)):
    """Three stages of 8 numbers and a classifier; the teacher's with shortcuts."""
    student = [nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8)) for _ in range(3)]
    teacher = [Shortcut(nn.BatchNorm1d(8), nn.Linear(8, 8)) for _ in range(3)]
    return procedures.JointPaths([*student, nn.Linear(8, 10)], [*teacher, nn.Linear(8, 10)], cuts)


def test_joint_paths():
    """Each path is the student's prefix and then the teacher; a prefix runs once, whatever the number of paths."""
    joint = paths().train()
    assert not any(module.training for module in joint.teacher.modules()) and joint.student.training
    x = torch.randn(16, 8)
    logits, features = joint(x)
    assert joint.student[0][0].num_batches_tracked == 1 and joint.teacher[2][0].num_batches_tracked == 0
    reference = copy.deepcopy(joint)
    for cut, z, feature in zip((1, 2, 4), logits, features, strict=True):
        prefix, rest = reference.student[: min(cut, 3)], reference.teacher[cut:3]
        want = nn.Sequential(*prefix, *rest)(x)
        torch.testing.assert_close(feature, want)
        last = reference.student[3] if cut == 4 else reference.teacher[3]
        torch.testing.assert_close(z, last(want))
    target = joint.targets(x)
    torch.testing.assert_close(target.logits[0], nn.Sequential(*joint.teacher)(x))
    torch.testing.assert_close(target.features[0], nn.Sequential(*joint.teacher[:3])(x))


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_joint_path_sends_the_teachers_gradients_through_the_prefix(cut):
    """To the student's stages before the cut, to none after it, and to nothing of the teacher."""
    joint = paths([cut])
    through_teacher, plain = joint(torch.randn(16, 8)).logits
    through_teacher.logsumexp(1).sum().backward(retain_graph=True)
    assert [stage[0].weight.grad is not None for stage in joint.student[:3]] == [cut > i for i in range(3)]
    assert joint.student[3].weight.grad is None
    assert all(p.grad is None and not p.requires_grad for p in joint.teacher.parameters())
    plain.logsumexp(1).sum().backward()
    assert all(p.grad is not None for p in joint.student.parameters())


def test_joint_loss_trains_the_prefix_by_its_paths_and_stage_ta_does_not():
    joint, x, labels = paths(), torch.randn(16, 8), torch.arange(16) % 10
    gradients = {}
    for stage in ("joint", "ta"):
        logits, features = joint(x)
        loss = kdfast.JointLoss(stage=stage)(logits, labels, [f.square().mean() for f in features], epoch=0)
        gradients[stage] = torch.autograd.grad(loss, joint.student[0][1].weight, retain_graph=True)[0]
        alone = kdfast.ops.cross_entropy(logits[-1], labels) + 1e-3 * features[-1].square().mean()
        if stage == "ta":
            (want,) = torch.autograd.grad(alone, joint.student[0][1].weight)
            torch.testing.assert_close(gradients["ta"], want)
    assert (gradients["joint"] - gradients["ta"] / 3).abs().max() > 0.1 * gradients["ta"].abs().max()


@pytest.mark.parametrize(
    ("student", "teacher", "cuts", "named"),
    [
        (3, 2, [1], "student and teacher must be equally long lists of at least 2 stages, got 3 and 2"),
        (1, 1, [], "at least 2 stages, got 1 and 1"),
        (3, 3, [0], "cuts must be at least 1, got 0"),
        (3, 3, [3], "cuts must be rising numbers of stages from 1 to 2"),
        (3, 3, [2, 1], r"cuts must be rising .* got \[2, 1\]"),
    ],
)
def test_joint_paths_refuse(student, teacher, cuts, named):
    with pytest.raises(ValueError, match=named):
        procedures.JointPaths([nn.Identity()] * student, [nn.Identity()] * teacher, cuts)


# ---- what a network knows of its input -------------------------------------------------------------------------------
def test_learn_sigma():
    """Of a linear network: sigma is inverse to its weights, at the asked entropy, and each image has its own."""
    weight = torch.tensor([1.0, 2.0, 4.0, 8.0]).reshape(1, 1, 2, 2)
    # The second half of the network looks at a quarter of the image, and sees nothing of the first image.
    images = torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])
    large = weight.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def features(x):
        assert x.shape[1:] == (1, 4, 4)
        return x * large

    generator = torch.Generator().manual_seed(0)
    sigma = procedures.learn_sigma(features, images, 2, penalty=-2.0, noises=256, steps=200, generator=generator)
    assert sigma.shape == (2, 2, 2)
    want = (1 / weight[0]) * torch.exp(-2.0 - 0.5 * torch.tensor(2 * torch.pi).log() - 0.5 + weight.log().mean())
    torch.testing.assert_close(sigma, want.expand(2, 2, 2), rtol=0.08, atol=0)
    again = procedures.learn_sigma(features, images, 2, penalty=-2.0, noises=256, steps=200, generator=generator)
    assert not torch.equal(again, sigma)


def test_learn_sigma_finds_what_the_network_reads():
    """A network that reads the left half of the image only."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(32, 8)).requires_grad_(False)
    images = torch.randn(3, 1, 8, 8)
    sigma = procedures.learn_sigma(lambda x: net(x[..., :4].contiguous()), images, 8, penalty=-1.5, steps=120)
    assert sigma[:, :, 4:].min() > 2 * sigma[:, :, :4].mean()
    for wrong, named in (({"size": 0}, "size"), ({"noises": 0}, "noises"), ({"rate": -1.0}, "rate")):
        with pytest.raises(ValueError, match=named):
            procedures.learn_sigma(net, images, **{"size": 8, **wrong})


# ---- images out of a network -----------------------------------------------------------------------------------------
def inverted():
    """A classifier of 8 x 8 images that has been trained for a moment, and its batch norms."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
    )
    net = nn.Sequential(net, nn.Flatten(), nn.Linear(8 * 16, 10))
    images, labels, *_ = digits()
    train = trainer(images.reshape(-1, 1, 8, 8), labels, epochs=2)
    train(net, lambda x, y: kdfast.ops.cross_entropy(net(x), y))
    net.zero_grad()
    return net.eval(), [net[0][1], net[0][4]]


def test_synthesize_reaches_the_labels_and_the_statistics():
    net, norms = inverted()
    before = copy.deepcopy(net.state_dict())
    labels, start = torch.arange(20) % 10, torch.rand(20, 1, 8, 8)
    kept = start.clone()

    def loss(logits, shown, change, step):
        assert torch.equal(logits, net(shown)) and change == procedures.Change(8)
        return kdfast.ops.cross_entropy(logits, labels)

    def gaps(images):
        with torch.no_grad(), inversion.norm_inputs(norms) as inputs:
            net(images)
            return [
                kdfast.bn_statistics_loss(x, n.running_mean, n.running_var) for x, n in zip(inputs, norms, strict=True)
            ]

    images = procedures.synthesize(net, norms, loss, start, steps=60, limits=(0, 1))
    assert torch.equal(start, kept) and not images.requires_grad and images.amin() >= 0 and images.amax() <= 1
    assert accuracy(net, images, labels) == 1
    assert all(after < before for after, before in zip(gaps(images), gaps(start), strict=True))
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items()), "the network has moved"
    assert all(p.grad is None for p in net.parameters()) and not norms[0]._forward_pre_hooks


def test_image_prior_is_the_sum_of_its_terms():
    net, norms = inverted()
    images = torch.rand(4, 1, 8, 8)
    with inversion.norm_inputs(norms) as inputs:
        net(images)
    first, second = (
        kdfast.bn_statistics_loss(x, n.running_mean, n.running_var, 1) for x, n in zip(inputs, norms, strict=True)
    )
    l1, l2 = kdfast.total_variation(images)
    want = 0.5 * (3 * first + second) + 0.1 * l1 + 0.2 * l2 + 0.3 * images.flatten(1).norm(dim=1).mean()
    torch.testing.assert_close(procedures.ImagePrior(0.5, 3, 1, 0.1, 0.2, 0.3)(images, norms, inputs), want)
    torch.testing.assert_close(inputs[0], net[0][0](images))


def test_synthesize_refuses():
    net, norms = inverted()
    images = torch.rand(2, 1, 8, 8)

    def loss(logits, *rest):
        return logits.sum()

    with pytest.raises(ValueError, match=r"norms must all be used by model, numbers \[2\] are not"):
        procedures.synthesize(net, [*norms, nn.BatchNorm2d(3).eval()], loss, images, 1)
    with pytest.raises(ValueError, match=r"norms must have running statistics, norms\[0\]"):
        procedures.synthesize(net, [nn.BatchNorm2d(3, track_running_stats=False).eval()], loss, images, 1)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        procedures.synthesize(net, norms, loss, images, 0)
    with pytest.raises(ValueError, match=r"evaluation mode, but norms\[0\] is training"):
        procedures.synthesize(net.train(), norms, loss, images, 1)


def test_a_change_moves_boxes_with_their_images():
    generator = torch.Generator().manual_seed(0)
    augment = procedures.Augment(jitter=2, contrast=0.2, brightness=0.1, generator=generator)
    flips = set()
    for _ in range(20):
        change = augment.draw(16)
        flips.add(change.flip)
        box = torch.tensor([[4.0, 5.0, 9.0, 8.0]])
        image = torch.zeros(1, 1, 16, 16)
        image[..., 5:8, 4:9] = 1
        torch.testing.assert_close(change.restored(change.boxes(box)), box)
        left, top, right, bottom = change.boxes(box)[0].long().tolist()
        moved = change.images(image) - change.brightness
        inside = torch.zeros_like(image)
        inside[..., top:bottom, left:right] = change.contrast
        torch.testing.assert_close(moved, inside)
        assert abs(change.down) <= 2 and abs(change.right) <= 2 and 0.8 <= change.contrast <= 1.2
    assert flips == {True, False}
    erased = procedures.Augment(False, 0, 0, 0, erase=3, generator=generator).draw(8).images(torch.ones(2, 1, 8, 8))
    assert (erased == 0).sum() == 2 * 9 and ((erased == 0) | (erased == 1)).all()


def test_boxes():
    boxes, labels = procedures.random_boxes(50, 3, 32, 6, 12, torch.Generator().manual_seed(0))
    sizes = boxes[:, 0, 2:] - boxes[:, 0, :2]
    assert (
        boxes.shape == (50, 1, 4)
        and boxes.min() >= 0
        and boxes.max() <= 32
        and set(labels.flatten().tolist()) == {0, 1, 2}
    )
    assert sizes.min() >= 6 - 1e-5 and sizes.max() <= 12 + 1e-5
    a = torch.tensor([[0.0, 0, 2, 2], [5, 5, 5, 5]])
    b = torch.tensor([[1.0, 0, 3, 2], [0, 0, 2, 2], [5, 5, 5, 5]])
    torch.testing.assert_close(procedures.box_overlap(a, b), torch.tensor([[1 / 3, 1, 0], [0, 0, 0]]))
    with pytest.raises(ValueError, match="smallest and largest must be sizes from 0 to side = 32, got 9 and 40"):
        procedures.random_boxes(2, 3, 32, 9, 40)


def test_add_boxes_takes_the_best_that_is_free():
    boxes, labels = torch.tensor([[[0.0, 0, 4, 4]]]).repeat(3, 1, 1), torch.tensor([[1], [0], [2]])
    near, far, other = [0.0, 1, 4, 5], [10.0, 10, 14, 14], [20.0, 20, 24, 24]
    found = [
        (torch.tensor([near, far, other]), torch.tensor([0, 2, 1])),
        (torch.tensor([near]), torch.tensor([0])),
        (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)),
    ]
    more, names = procedures.add_boxes(boxes, labels, found)
    assert names.tolist() == [[1, 2], [0, -1], [2, -1]] and more[0, 1].tolist() == far
    again, names = procedures.add_boxes(more, names, found, most=2)
    assert names.tolist() == [[1, 2, -1], [0, -1, -1], [2, -1, -1]]
