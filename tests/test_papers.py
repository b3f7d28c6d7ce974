"""Every public loss: against its oracle, against the numbers of the official code, and in the registry of methods."""

import functools
import inspect
import re
from dataclasses import dataclass

import oracles
import pytest
import torch
from official import GOLDEN, Official

import kdfast
from kdfast.cli import main
from kdfast.papers import KINDS, PAPERS, find

# What the repositories state; "none": nothing, and empty: nobody has looked.
LICENCES = ("", "none", "Apache-2.0", "BSD-2-Clause", "DINOv3 licence", "MIT", "MIT-style, NAVER")
MODULES = [
    name
    for name in kdfast.__all__
    if inspect.isclass(getattr(kdfast, name)) and issubclass(getattr(kdfast, name), torch.nn.Module)
]
PUBLIC = [
    name for name in MODULES if hasattr(kdfast.losses, name) and getattr(kdfast, name) not in kdfast.losses.LAYERS
]
# Losses with weights, and how they are made.
WITH_STATE = {
    "CRD": lambda: kdfast.CRD(student_dim=11, teacher_dim=7, n_data=20),
    "CTKD": lambda: kdfast.CTKD(),
    "FGD": lambda: kdfast.FGD(4, 7),
    "MGD": lambda: kdfast.MGD(4, 7),
    "QueueKL": lambda: kdfast.QueueKL(11, size=20),
    "ReviewKD": lambda: kdfast.ReviewKD([4, 3], [5, 4]),
    "SimKD": lambda: kdfast.SimKD(4, 7),
    "TAID": lambda: kdfast.TAID(),
    "VID": lambda: kdfast.VID(student_channels=4, mid_channels=6, teacher_channels=7),
}
# Of their steps each depends on the ones before: tests/test_nce.py and test_similarity.py compare them.
STEPWISE = {"CRD", "QueueKL"}


def of_two_networks(loss, images, labels, *networks):
    """`loss` of the logits of two networks [w1, b1, w2, b2] on images."""
    logits = [torch.tanh(images.flatten(1) @ w1.t() + b1) @ w2.t() + b2 for w1, b1, w2, b2 in networks]
    return loss(*logits, images, labels)


# Losses of more than tensors, and how they are called with tensors.
CALLS = {"JacobianMatching": of_two_networks}
CALLS |= {"JointLoss": lambda loss, *tensors: loss(*tensors, epoch=30)}

# Parameters other than the defaults, and the kinds of the arguments, see `inputs`.
CASES = [
    ("AKL", {}, "student teacher"),
    ("AKL", {"head": 0.8}, "student teacher"),
    ("AlphaBeta", {}, "student teacher"),
    ("AlphaBeta", {"alpha": 1.0, "beta": 0.0}, "student teacher"),
    ("AlphaBeta", {"alpha": 0.0, "beta": 0.6}, "student teacher"),
    ("AlphaBeta", {"alpha": 0.5, "beta": -0.5}, "student teacher"),
    ("AlphaBeta", {"alpha": 0.0, "beta": 0.0}, "student teacher"),
    ("CTKD", {}, "student teacher epoch"),
    ("CWD", {}, "map map"),
    ("CWD", {"temperature": 1.0}, "maps maps"),
    ("CTKD", {"minimum": 2.0, "maximum": 5.0, "ramp_epochs": 20}, "student teacher epoch"),
    ("KD", {"teacher_temperature": 2.0}, "student teacher"),
    ("KD", {"standardize": True, "temperature": 2.0, "alpha": 0.5}, "student teacher labels"),
    ("LSKD", {}, "student teacher"),
    ("LSKD", {"temperature": 5.0}, "student teacher"),
    ("LinearKD", {}, "vectors head short_vectors short_head"),
    ("LinearKD", {"temperature": 2.0, "beta": 0.3, "alpha": 0.4}, "vectors head short_vectors short_head labels"),
    ("NKD", {}, "student teacher labels"),
    ("NKD", {"temperature": 3.0, "gamma": 3.5}, "student teacher labels"),
    ("SkewKL", {}, "student teacher"),
    ("SkewKL", {"skew": 0.4, "reverse": True}, "student teacher"),
    ("TAID", {}, "student teacher"),
    ("TAID", {"start": 0.75}, "student teacher"),
    ("TTM", {}, "student teacher"),
    ("TVD", {}, "student teacher"),
    ("WTTM", {}, "student teacher"),
    ("WTTM", {"temperature": 2.0}, "student teacher"),
    ("AB", {}, "map map"),
    ("AB", {"margin": 2.0, "reduction": "none"}, "maps maps"),
    ("AB", {"margin": 0.5, "reduction": "mean"}, "vectors vectors"),
    ("AEKD", {}, "student networks"),
    ("AEKD", {"temperature": 2.0, "slack": 1.0, "normalize": True}, "student networks"),
    ("AT", {}, "map other_map"),
    ("AT", {"p": 1}, "map other_map"),
    ("AT", {"p": 3}, "maps small_maps"),
    ("CCKD", {}, "vectors short_vectors"),
    ("CCKD", {"gamma": 1.0, "order": 3}, "vectors short_vectors"),
    ("CCKD", {"kernel": "bilinear"}, "vectors short_vectors"),
    ("CWTM", {}, "student teacher labels"),
    ("Codistillation", {}, "student networks"),
    ("Codistillation", {"mode": "reverse_kl"}, "student networks"),
    ("CollaborativeLearning", {}, "networks labels"),
    (
        "CollaborativeLearning",
        {"temperature": 2.0, "alpha": 0.5, "rampup_epochs": 40, "eps": 1e-4},
        "networks labels epoch",
    ),
    ("DIST", {}, "student teacher"),
    ("DIST", {"beta": 2.0, "gamma": 0.5, "temperature": 4.0}, "student teacher"),
    ("DKD", {}, "student teacher labels"),
    ("DKD", {"temperature": 1.0, "alpha": 0.5, "beta": 2.0}, "student teacher labels"),
    ("DKPP", {}, "student teacher labels permutations"),
    ("DKPP", {"temperature": 2.0, "keep": "argmax"}, "student teacher labels permutations"),
    ("DML", {}, "student networks"),
    ("DML", {"temperature": 3.0}, "student networks labels"),
    ("DiversityCooperation", {}, "networks labels"),
    ("DiversityCooperation", {"temperature": 5.0, "sign": -1}, "stacked labels"),
    ("DiversityCooperation", {"relation": "l2"}, "networks labels"),
    ("DiversityCooperation", {"relation": "cos", "temperature": 5.0}, "stacked labels"),
    ("DiversityCooperation", {"relation": "distil", "temperature": 2.0}, "networks labels"),
    ("EnD", {}, "student networks"),
    ("EnD", {"temperature": 2.5}, "student networks"),
    ("EnDD", {}, "student networks"),
    ("EnDD", {"temperature": 2.5, "smoothing": 1e-4, "teacher_smoothing": 0.1}, "student stacked"),
    ("EnDD", {"temperature": 2.5, "variant": "ensemble_temperature"}, "student networks"),
    ("EnDD", {"temperature": 2.5, "variant": "dirichlet_temperature"}, "student networks"),
    ("EnDD", {"temperature": 0.4, "variant": "reverse"}, "student networks"),
    ("FAKD", {}, "maps large_maps"),
    ("FAKD", {"affinity": "channel"}, "map map"),
    ("FAKD", {"affinity": "instance"}, "maps small_maps"),
    ("FFL", {}, "networks student labels epoch"),
    ("FFL", {"temperature": 1.0, "rampup_epochs": 0, "eps": 0.0}, "networks student labels epoch"),
    ("FGD", {"student_channels": 4, "teacher_channels": 7}, "map other_map boxes image_sizes"),
    (
        "FGD",
        {
            "student_channels": 4,
            "teacher_channels": 4,
            **{"temperature": 1.0, "foreground": 0.1, "background": 0.2, "attention": 0.3, "relation": 0.4},
        },
        "map map boxes image_sizes",
    ),
    ("FSP", {}, "three_maps three_maps"),
    ("FT", {}, "map map"),
    ("FT", {}, "maps maps"),
    ("FitNets", {}, "map map"),
    ("FitNets", {}, "maps maps"),
    ("FitNets", {}, "vectors vectors"),
    ("GramAnchoring", {}, "map other_map"),
    ("GramAnchoring", {"positive": False}, "maps large_maps"),
    ("HCL", {}, "map map"),
    ("HCL", {}, "maps maps"),
    ("HardDarkRank", {}, "vectors short_vectors"),
    ("HardDarkRank", {"alpha": 0.2, "beta": 1.5, "permute_len": 2}, "vectors short_vectors"),
    ("HardDarkRank", {"alpha": 0.2, "beta": 1.0, "permute_len": 9}, "vectors short_vectors"),  # more than there are
    ("IRG", {}, "irg_student irg_teacher"),
    ("IRG", {"vertex_weight": 2.0, "edge_weight": 0.5, "transformation_weight": 1.0}, "irg_student irg_teacher"),
    ("IRGEdge", {}, "vectors short_vectors"),
    ("IRGTransformation", {}, "vectors vectors short_vectors short_vectors"),
    ("JSD", {}, "student teacher"),
    ("JSD", {"beta": 0.1, "temperature": 2.0}, "student teacher"),
    ("JSD", {"beta": 0, "temperature": 2.0}, "student teacher"),
    ("JSD", {"beta": 1, "temperature": 2.0}, "student teacher"),
    ("JacobianMatching", {}, "images labels network wide_network"),
    ("JointLoss", {}, "networks labels distances"),
    ("JointLoss", {"feature_weight": 0.5, "decay_floor": 0.2, "decay_epochs": 40}, "stacked labels distances"),
    ("JointLoss", {"decay_epochs": 20}, "networks labels distances"),  # over by then
    ("JointLoss", {"stage": "ta"}, "networks labels distances"),
    ("KD", {}, "student teacher"),
    ("KD", {}, "student teacher labels"),  # without alpha labels are ignored
    ("KD", {"temperature": 1.0, "reduction": "none"}, "student teacher"),
    ("KD", {"alpha": 0.9}, "student teacher labels"),
    ("KD", {"alpha": 0.9}, "student teacher probabilities"),
    ("KD", {"alpha": 0.0, "temperature": 2.0, "reduction": "sum"}, "student teacher labels"),
    ("KD", {"alpha": 0.3, "label_smoothing": 0.1, "ignore_index": 2, "reduction": "mean"}, "student teacher labels"),
    ("KD", {"alpha": 0.3, "ignore_index": 2, "reduction": "none"}, "student teacher labels"),
    ("KDCL", {}, "stacked labels"),
    ("KDCL", {"rule": "naive", "weight": 0.5}, "stacked labels"),
    ("KDCL", {"rule": "general", "temperature": 3.0}, "stacked labels"),
    ("KDCL", {"rule": "mean", "temperature": 1.0}, "stacked labels"),
    ("LKD", {"patches": 2}, "maps small_maps"),
    ("LKD", {"patches": 3, "intra_weight": 2.0, "inter_weight": 0.5, "cross_weight": 0.25}, "map other_map"),
    ("LKD", {}, "many_positions many_positions"),
    ("LabelRefinery", {}, "student probabilities"),
    ("LabelRefinery", {"reduction": "sum"}, "student probabilities"),
    ("LabelRefinery", {"reduction": "none"}, "student probabilities"),
    ("MGD", {"student_channels": 4, "teacher_channels": 7}, "map other_map kept"),
    ("MGD", {"student_channels": 4, "teacher_channels": 4, "mask_ratio": 0.3}, "map map kept"),
    ("NST", {}, "maps small_maps"),
    ("NST", {}, "map map"),
    ("NST", {}, "many_positions many_positions"),
    ("OFD", {}, "map map margin"),
    ("OFD", {"reduction": "none"}, "maps maps margins"),
    ("OFD", {"reduction": "mean"}, "maps maps margins"),
    ("OKDDip", {}, "networks student attention labels epoch"),
    (
        "OKDDip",
        {"temperature": 2.0, "alpha": 0.3, "rampup_epochs": 10, "eps": 1e-5},
        "networks student attention labels epoch",
    ),
    ("ONE", {}, "networks gate labels epoch"),
    ("ONE", {"temperature": 1.0, "rampup_epochs": 0, "eps": 0.0}, "networks gate labels epoch"),
    ("PKD", {}, "map map"),
    ("PatchKL", {}, "map other_map"),
    ("PatchKL", {"temperature": 0.5}, "maps maps"),
    ("PKD", {}, "maps_of_4 larger_maps_of_4"),
    ("PKT", {}, "vectors short_vectors"),
    ("PKT", {"eps": 1e-3}, "vectors short_vectors"),
    ("RKD", {}, "vectors short_vectors"),
    ("RKD", {"distance_weight": 1.0, "angle_weight": 2.0}, "vectors short_vectors"),
    ("RKD", {"distance_weight": 0.0, "angle_weight": -2.0}, "vectors short_vectors"),
    ("RKDAngle", {}, "vectors short_vectors"),
    ("RKDDistance", {}, "vectors short_vectors"),
    ("ReviewKD", {"student_channels": [4, 3], "teacher_channels": [5, 4]}, "maps large_maps"),
    (
        "ReviewKD",
        {"student_channels": [4, 4], "teacher_channels": [4, 4], "mid_channels": 5},
        "maps_of_4 larger_maps_of_4",
    ),
    ("ReverseKD", {}, "student teacher"),
    ("ReverseKD", {"temperature": 5.0}, "student teacher"),
    ("SP", {}, "maps small_maps"),
    ("SP", {}, "vectors short_vectors"),
    ("SimKD", {"student_channels": 4, "teacher_channels": 7}, "map other_map"),
    ("SimKD", {"student_channels": 4, "teacher_channels": 7, "factor": 3}, "square small_square"),
    ("SimKD", {"student_channels": 7, "teacher_channels": 4}, "small_square square"),
    ("TfKDReg", {}, "student labels"),
    ("TfKDReg", {"temperature": 1.0, "alpha": 0.5, "multiplier": 10.0}, "student labels"),
    ("TfKDSelf", {}, "student teacher labels"),
    ("TfKDSelf", {"temperature": 6.0, "alpha": 0.5, "multiplier": 50.0}, "student teacher labels"),
    ("VID", {"student_channels": 4, "mid_channels": 6, "teacher_channels": 7}, "map other_map"),
    (
        "VID",
        {"student_channels": 4, "mid_channels": 2, "teacher_channels": 5, "init_variance": 0.1, "eps": 0.01},
        "maps_of_4 maps_of_5",
    ),
]
CASES = [(name, parameters, tuple(kinds.split())) for name, parameters, kinds in CASES]
FIXED = {
    "labels",
    "probabilities",
    "permutations",
    "epoch",
    "kept",
    "boxes",
    "image_sizes",
}  # kinds that no loss differentiates


@dataclass(frozen=True)
class Code:
    """Code code as a golden file names it: our module from its parameters, and which arrays are the inputs."""

    build: callable
    inputs: tuple  # a tuple in it is a list of inputs
    grad_scale: float = 1.0  # our gradient in theirs, the loss alike but for a weight of theirs
    softmax: bool = True  # compares probabilities: in float32 with an absolute floor
    digits: float = 1e-9  # of the loss in float64, ten times that of the gradients: less where they round in between


def _relation(build, inputs=("student", "teacher"), grad_scale=1.0):
    return Code(build, inputs, grad_scale, softmax=False)


LAYERS = ("fm1", "fm2", "feat", "out")
OFFICIAL = {
    "kd_distillkl": Code(lambda p: kdfast.KD(p["T"]), "st"),
    "kd_at_distillation": Code(lambda p: kdfast.KD(p["T"], alpha=p["alpha"]), "sty"),
    "codistill_rkl": Code(lambda p: kdfast.ReverseKD(), ("output", "peer")),
    "dkd": Code(lambda p: kdfast.DKD(p["temperature"], p["alpha"], p["beta"]), "sty"),
    "dist": Code(lambda p: kdfast.DIST(p["beta"], p["gamma"], p["tau"]), "st"),
    "dist_seg": Code(lambda p: kdfast.DIST(p["beta"], p["gamma"]), "st"),
    "tf_loss_kd": Code(lambda p: kdfast.TfKDSelf(p["temperature"], p["alpha"]), "sty"),
    "tf_loss_kd_self": Code(lambda p: kdfast.TfKDSelf(p["temperature"], p["alpha"], p["multiplier"]), "sty"),
    "tf_loss_kd_regularization": Code(
        lambda p: kdfast.TfKDReg(p["reg_temperature"], p["reg_alpha"], p["multiplier"]), "sy"
    ),
    "label_refinery": Code(
        lambda p: kdfast.LabelRefinery("mean" if p["size_average"] else "sum"), ("model_output", "refined_labels")
    ),
    "rkd_distance": _relation(lambda p: kdfast.RKDDistance()),
    "rkd_angle": _relation(lambda p: kdfast.RKDAngle()),
    "rkd_repdistiller": _relation(lambda p: kdfast.RKD(p["w_d"], p["w_a"])),
    "rkd_hard_darkrank": _relation(lambda p: kdfast.HardDarkRank(p["alpha"], p["beta"], p["permute_len"])),
    "irg_edge_caffe": _relation(lambda p: kdfast.IRGEdge(), grad_scale=2.0),
    "irg_trans_caffe": _relation(
        lambda p: kdfast.IRGTransformation(), ("student_late", "student_early", "teacher_late", "teacher_early")
    ),
    "irg_aberhu": _relation(
        lambda p: kdfast.IRG(p["w_irg_vert"], p["w_irg_edge"], p["w_irg_tran"]),
        tuple(tuple(f"{layer}_{side}" for layer in LAYERS) for side in "st"),
    ),
}


def _maps(build):
    """Code code on one list of maps per network, s0, s1 ... and t0, t1 ...: all that the file has."""
    return Code(build, ("s*", "t*"), softmax=False)


OFFICIAL |= {
    "at_official": _maps(lambda p: kdfast.AT()),
    "sp_rep": _maps(lambda p: kdfast.SP()),
    "nst_rep": _maps(lambda p: kdfast.NST()),
    "fsp_rep": _maps(lambda p: kdfast.FSP()),
    "fakd_sa": _maps(lambda p: kdfast.FAKD()),
    "fakd_ca": _maps(lambda p: kdfast.FAKD("channel")),
    "fakd_ia": _maps(lambda p: kdfast.FAKD("instance")),
    "pkt": _relation(lambda p: kdfast.PKT(p["eps"]), "st"),
    "cc_zoo_gaussian": _relation(lambda p: kdfast.CCKD("gaussian", p["gamma"], p["P_order"]), "st"),
    "at_rep": _maps(lambda p: kdfast.AT(p["p"])),
}


def _ofd(student, teacher, weights, gammas, betas, teacher_gammas, teacher_betas):
    """The official Distiller: a connector and a margin for each layer, of which the last weighs most."""
    layers = zip(student, teacher, weights, gammas, betas, teacher_gammas, teacher_betas, strict=True)
    loss = 0.0
    for s, t, weight, gamma, beta, teacher_gamma, teacher_beta in layers:
        connector = kdfast.OFDConnector(s.shape[1], t.shape[1]).to(s)
        names = dict(zip([name for name, _ in connector.named_parameters()], (weight, gamma, beta), strict=True))
        s = torch.func.functional_call(connector, names, s)
        loss = loss / 2 + kdfast.OFD()(s, t, kdfast.ofd_margin(teacher_gamma, teacher_beta))
    return loss


def _vid(parameters):
    def loss(student, teacher, w1, w2, w3, log_scale):
        sizes = student.shape[1], w1.shape[0], teacher.shape[1]
        vid = kdfast.VID(*sizes, parameters["init_pred_var"], parameters["eps"])
        weights = {"regressor.0.weight": w1, "regressor.2.weight": w2, "regressor.4.weight": w3}
        return torch.func.functional_call(vid, {**weights, "log_scale": log_scale}, (student, teacher))

    return loss


def _with_jacobians(student, teacher):
    """JacobianMatching of networks with one class, linear, so that their Jacobians are these."""
    images = torch.zeros_like(student).requires_grad_()
    logits = [(images * x).flatten(1).sum(1, keepdim=True) for x in (student, teacher)]
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    return kdfast.JacobianMatching()(*logits, images, labels)


OFFICIAL |= {
    "hint": _relation(lambda p: kdfast.FitNets(), "st"),
    "ft_official": _relation(lambda p: kdfast.FT(), "st"),
    "ab_official": _relation(lambda p: kdfast.AB(p["margin"]), "st"),
    "ofd_official": _relation(lambda p: kdfast.OFD(), ("s", "t", "margin")),
    # Its margins are float32.
    "ofd_distiller": Code(lambda p: _ofd, ("s*", "t*", "w*", "g*", "b*", "bnw*", "bnb*"), softmax=False, digits=1e-7),
    "vid_rep": _relation(_vid, ("s", "t", "w1", "w2", "w3", "log_scale")),
    "jacobian_zoo_mlp": _relation(
        lambda p: functools.partial(of_two_networks, kdfast.JacobianMatching()),
        ("img", "y", *(tuple(f"{side}{name}" for name in ("w1", "b1", "w2", "b2")) for side in "st")),
    ),
    "jacobian_zoo_tail": _relation(lambda p: _with_jacobians, ("js", "jt")),
    "hcl": _maps(lambda p: kdfast.HCL()),
    "cwd": _maps(lambda p: kdfast.CWD(p["tau"])),
    "pkd": _maps(lambda p: kdfast.PKD()),
}


def _endd(variant):
    return _relation(
        lambda p: kdfast.EnDD(p["temp"], p["smoothing"], p["teacher_prob_smoothing"], variant),
        ("logits", "teacher_logits"),
    )


_DIVERSITY = Code(
    lambda p: kdfast.DiversityCooperation(
        p["reg_type"].removeprefix("neg_"), p["T"], sign=-1 if p["reg_type"].startswith("neg_") else 1
    ),
    ("logits", "labels"),
)
OFFICIAL |= {
    "ban_cwtm": Code(lambda p: kdfast.CWTM(), ("student", "teacher", "labels")),
    **{f"divcoop_{relation}": _DIVERSITY for relation in ("l2", "cos", "js", "distil", "neg_js")},
    "endd_dirichletenddloss": _endd("dirichlet"),
    "endd_dirichletenddentemploss": _endd("ensemble_temperature"),
    "endd_dirichletendddirtemploss": _endd("dirichlet_temperature"),
    "endd_dirichletenddrevloss": _endd("reverse"),
}


def _joint(stage):
    def build(p):
        loss = kdfast.JointLoss(p["dis_weight"], p["dc"], stage=stage)
        return functools.partial(loss, epoch=p["epoch"])

    return Code(build, ("logits_student", "labels", "loss_dis"))


def _total_variation(p):
    return lambda x: sum(
        p[weight] * value for weight, value in zip(("w1", "w2"), kdfast.total_variation(x), strict=True)
    )


OFFICIAL |= {
    "jointrd_joint": _joint("joint"),
    "jointrd_ta": _joint("ta"),
    # Its margins are float32.
    "jointrd_margin": Code(
        lambda p: kdfast.residual_margin_loss,
        ("source", "target", "bn_weight", "bn_bias"),
        softmax=False,
        digits=1e-7,
    ),
    **dict.fromkeys(
        ("deepinversion_bn", "diode_bn"),
        _relation(
            lambda p: functools.partial(
                kdfast.bn_statistics_loss,
                p=p["p_norm"],
                alpha_mean=p.get("alpha_mean", 1.0),
                alpha_var=p.get("alpha_var", 1.0),
            ),
            ("x", "running_mean", "running_var"),
        ),
    ),
    **dict.fromkeys(("deepinversion_tv", "diode_tv"), _relation(_total_variation, "x")),
    "diode_selfsim": _relation(
        lambda p: functools.partial(kdfast.self_similarity, threshold=p["threshold"]),
        "x",
    ),
    "deepinversion_adi": Code(
        lambda p: functools.partial(kdfast.adaptive_inversion, temperature=p["T"]), ("student", "teacher")
    ),
}


def _masked(build, entropy=None):
    """Code of language models, on the rows of a mask; entropy: (s, t, p) -> logits whose entropy it has beside ours."""

    def masked(p):
        def loss(student, teacher, mask):
            value = build(p)(student, teacher, mask=mask)
            if entropy:
                log_p = entropy(student, teacher, p)[mask].log_softmax(-1)
                value = value - torch.where(log_p > -INF, log_p.exp() * log_p, 0.0).sum(-1).mean()
            return value

        return loss

    return Code(masked, ("s", "t", "mask"))


def _alpha_beta(p):
    """Its branches for the limits lack a factor."""
    a, b = p["alpha"], p["beta"]
    factor = (1 if a == 0 == b else b if a == 0 else a) if a * b * (a + b) == 0 else 1
    return lambda s, t, mask: factor * kdfast.AlphaBeta(a, b)(s, t, mask=mask)


INF = float("inf")
OFFICIAL |= {
    "lskd": Code(lambda p: kdfast.LSKD(p["temperature"]), "st"),
    "nkd": Code(lambda p: kdfast.NKD(p["temp"], p["gamma"]), "sty"),
    "ttm": Code(lambda p: kdfast.TTM(1 / p["l"]), "st"),
    "wttm": Code(lambda p: kdfast.WTTM(1 / p["l"]), "st"),
    "distillm_forward_kl": _masked(lambda p: kdfast.KD(1.0), lambda s, t, p: t),
    "distillm_reverse_kl": _masked(lambda p: kdfast.ReverseKD()),
    "distillm_js": _masked(lambda p: kdfast.JSD(1 - p["lam"])),
    "distillm_tv": _masked(lambda p: kdfast.TVD()),
    "distillm_skew_forward": _masked(lambda p: kdfast.SkewKL(p["lam"]), lambda s, t, p: t),
    "distillm_skew_reverse": _masked(lambda p: kdfast.SkewKL(p["lam"], reverse=True)),
    "akl": _masked(lambda p: kdfast.AKL(p["mu"])),
    "abkd": _masked(_alpha_beta),
    "taid": _masked(
        lambda p: kdfast.TAID(p["t_start"]),
        lambda s, t, p: (1 - p["t_start"]) * s.detach() + p["t_start"] * t,
    ),
}
# The others are no losses, or have a state: the tests of their own files read them.
OTHERS = (
    "ctkd_",
    "topk_",
    "crd_",
    "ban_dkpp_permute",
    "endd_uncertainties",
    "endd_temperature",
    "fgd_",
    "mgd_",
    "reviewkd_",
    "simkd_",
    "ofd_margin__",
    "explain_",
)
FILES = sorted(path for path in GOLDEN.glob("*.npz") if not path.name.startswith(OTHERS))


def inputs(kinds, device, rows=6, cols=11):
    """The arguments of a loss, one for each kind: float64, `rows` samples."""

    def normal(*shape):
        return torch.randn(rows, *shape, dtype=torch.float64)

    def network(width, pixels=24):
        """Weights of two layers, see `of_two_networks`."""
        shapes = (width, pixels), (width,), (cols, width), (cols,)
        return [torch.randn(shape, dtype=torch.float64) for shape in shapes]

    labels = torch.randint(cols, (rows,))
    labels[:2] = 2  # what some cases ignore
    make = {
        # Logits of two networks, labels, probabilities.
        "student": lambda: normal(cols) * 3,
        "teacher": lambda: normal(cols) * 3,
        "labels": lambda: labels,
        "probabilities": lambda: torch.softmax(normal(cols), 1),
        # Three networks' logits, in a list and in one tensor; permutations; weights of these networks.
        "networks": lambda: [normal(cols) * 3 for _ in range(3)],
        "stacked": lambda: torch.stack([normal(cols) * 3 for _ in range(3)]),
        "permutations": lambda: torch.rand(rows, cols).argsort(1),
        "gate": lambda: torch.softmax(normal(3), 1),
        "attention": lambda: torch.softmax(normal(3, 3), 2),
        "epoch": lambda: torch.tensor(7),
        # Embeddings of two networks.
        "vectors": lambda: normal(cols),
        "short_vectors": lambda: normal(7),
        # Classifiers over them.
        "head": lambda: torch.randn(cols, cols, dtype=torch.float64),
        "short_head": lambda: torch.randn(cols, 7, dtype=torch.float64),
        # Maps of two networks, or lists of them, those of the teacher smaller or as large. Margins of the channels.
        "map": lambda: normal(4, 5, 3),
        "other_map": lambda: normal(7, 5, 3),
        "square": lambda: normal(4, 6, 6),
        "small_square": lambda: normal(7, 3, 3),
        # Positions of `map` that are kept; boxes in images of any size, of which one has none.
        "kept": lambda: torch.rand(rows, 1, 5, 3) < 0.5,
        "boxes": lambda: [torch.rand(i % 4, 2).repeat(1, 2) * 40 + torch.tensor([0, 0, 30, 20]) for i in range(rows)],
        "image_sizes": lambda: torch.tensor([[60 + i, 80] for i in range(rows)]),
        "margin": lambda: -torch.rand(4, dtype=torch.float64),
        "maps": lambda: [normal(4, 7, 6), normal(3, 4, 3)],
        "small_maps": lambda: [normal(5, 3, 3), normal(3, 4, 3)],
        "large_maps": lambda: [normal(5, 7, 6), normal(4, 4, 3)],
        "margins": lambda: [-torch.rand(channels, dtype=torch.float64) for channels in (4, 3)],
        # As many channels in each layer, of either network.
        "maps_of_4": lambda: [normal(4, 7, 7), normal(4, 3, 3)],
        "larger_maps_of_4": lambda: [normal(4, 9, 8), normal(4, 2, 2)],
        "maps_of_5": lambda: [normal(5, 3, 3), normal(5, 6, 6)],
        # Three layers, for FSP; more positions than channels.
        "three_maps": lambda: [normal(4, 7, 6), normal(3, 4, 4), normal(5, 4, 4)],
        "many_positions": lambda: normal(3, 4, 5),
        # What IRG reads of a network: maps that are pooled, in windows that overlap; embeddings; logits.
        "irg_student": lambda: [normal(2, 7, 4), normal(4, 3, 4), normal(9), normal(cols)],
        "irg_teacher": lambda: [normal(3, 4, 4), normal(3, 4, 4), normal(5), normal(cols)],
        # A number for each network.
        "distances": lambda: [normal()[0].square() for _ in range(3)],
        # Images, and two networks.
        "images": lambda: normal(3, 4, 2),
        "network": lambda: network(5),
        "wide_network": lambda: network(8),
    }
    return torch.utils._pytree.tree_map(lambda x: x.to(device), [make[kind]() for kind in kinds])


def with_leaves(kinds, arguments):
    """The same arguments, those that a loss may differentiate as leaves; -> arguments, leaves."""
    leaves = []

    def leaf(x):
        leaves.append(x.detach().clone().requires_grad_())
        return leaves[-1]

    tree_map = torch.utils._pytree.tree_map
    return [x if kind in FIXED else tree_map(leaf, x) for kind, x in zip(kinds, arguments, strict=True)], leaves


@pytest.mark.parametrize(("name", "parameters", "kinds"), CASES, ids=[f"{n}{i}" for i, (n, *_) in enumerate(CASES)])
def test_matches_oracle(implementation, name, parameters, kinds):
    """float64, also with the oracle's defaults, which are the paper's."""
    arguments = inputs(kinds, implementation.device)
    (ours, leaves), (theirs, exact) = (with_leaves(kinds, arguments) for _ in range(2))
    module = getattr(kdfast, name)(**parameters).to(implementation.device, torch.float64)
    oracle = functools.partial(oracles.LOSSES[name], **parameters)
    if weights := dict(module.named_parameters()):
        copies = {key: x.detach().clone().requires_grad_() for key, x in weights.items()}
        oracle = functools.partial(oracle, weights=copies)
        leaves, exact = [*leaves, *weights.values()], [*exact, *copies.values()]
    call = CALLS.get(name, lambda loss, *tensors: loss(*tensors))
    loss, want = call(module, *ours), call(oracle, *theirs)
    assert loss.shape == ((6,) if parameters.get("reduction") == "none" else ())
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=1e-14)
    factors = torch.linspace(-1, 2, loss.numel(), dtype=torch.float64, device=loss.device).view(loss.shape)
    got, expected = (torch.autograd.grad(x, y, factors, allow_unused=True) for x, y in ((loss, leaves), (want, exact)))
    for a, b in zip(got, expected, strict=True):
        assert a is not None or b is None
        if b is None:  # a gradient that stops
            assert a is None or not a.any()
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-8 * b.abs().max().item())


def test_every_public_loss_is_covered():
    assert PUBLIC and set(PUBLIC) - STEPWISE == set(oracles.LOSSES) == {name for name, *_ in CASES}
    assert {path.name.split("__")[0] for path in FILES} == set(OFFICIAL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_matches_official_code(implementation, path, dtype):
    """float64: `digits` of the loss, 10 times that of the largest gradient. float32: 2e-5, for softmax-KL with a floor.

    A log-probability in float32 is off by 1e-7, so a KL of 1e-8 between nearly equal networks has no digits to compare.
    """
    x = Official(path, dtype, implementation.device)
    code, p = OFFICIAL[x.name], x.parameters
    arguments = [[x(n) for n in name] if isinstance(name, tuple) else x(name) for name in code.inputs]
    loss = code.build(p)(*arguments)
    assert loss.shape == () and loss.dtype == dtype
    temperature = max([1.0, *(v for k, v in p.items() if k in ("T", "temperature", "tau", "reg_temperature"))])
    rows = len(arguments[0]) if p.get("size_average") is False else 1
    weight = p.get("loss_weight", 1.0)
    floor = x.of_type(1e-14, 2e-7 * temperature**2 * rows * code.softmax)
    want = x["loss"].sum() / weight  # its parts are the layers
    x.assert_close("loss", loss, want, x.of_type(code.digits, 2e-5), floor)
    floor = x.of_type(1e-13, 2e-8 * temperature * rows * code.softmax)
    for name, grad in x.gradients(loss).items():
        want = code.grad_scale / weight * x[f"grad_{name}"]
        x.assert_close(name, grad, want, x.of_type(10 * code.digits, 2e-5), floor)


@pytest.mark.parametrize("name", MODULES)
def test_docstring(name):
    """The first line names the method, and its paper with authors, venue and year: help() and grep find either."""
    first = inspect.getdoc(getattr(kdfast, name)).splitlines()[0]
    if name in PUBLIC:
        assert re.match(r"[A-Z][\w -]* - \S.*\([A-Z][^()]+, ([A-Z][^()]+ )?(19|20)\d\d\).*\.$", first), first
    assert "Shapes:" in inspect.getdoc(getattr(kdfast, name))


@pytest.mark.parametrize("name", PUBLIC)
def test_repr_and_state(name):
    """A loss without weights has no state, and its repr says what it was made with."""
    module = WITH_STATE.get(name, getattr(kdfast, name))()
    assert bool(module.state_dict()) == (name in WITH_STATE)
    parameters = inspect.signature(type(module)).parameters.values()
    for name in [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD][:1]:
        assert f"{name}={getattr(module, name)!r}" in repr(module)


# ---- the registry of methods -----------------------------------------------------------------------------------------
def of_kdfast(name):
    """kdfast's "procedures.born_again"."""
    return functools.reduce(getattr, name.split("."), kdfast)


def constructor(loss):
    """The parameters of a loss's constructor."""
    parameters = inspect.signature(loss.__init__).parameters.values()
    return [p.name for p in parameters if p.name != "self" and p.kind is p.POSITIONAL_OR_KEYWORD]


def test_every_public_loss_is_a_paper():
    """What is added to kdfast.losses has an entry in kdfast/papers.py, by itself or beside a loss."""
    named = [paper.name for paper in PAPERS]
    assert len(named) == len(set(named))
    assert sorted(name for name in named if hasattr(kdfast, name)) == sorted(PUBLIC)
    beside = {name for paper in PAPERS for name in paper.also}
    assert {*kdfast.losses.__all__} <= {*named, *beside} and all(map(of_kdfast, beside))


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.name)
def test_paper(paper):
    """An entry says what is true of its class: the paper, arguments, ops, and names of other tables."""
    assert paper.kind in KINDS and paper.licence in LICENCES and bool(paper.code) >= bool(paper.licence)
    assert all(hasattr(kdfast.ops, op) for op in paper.ops)
    made, *called = re.findall(r"([\w.]*)\(([\w, ]*)\)", paper.call)
    target = of_kdfast(made[0])
    signatures = [constructor(target) if inspect.isclass(target) else inspect.signature(target).parameters]
    if called:
        signatures.append(inspect.signature(target.forward).parameters)
    for (_, names), parameters in zip([made, *called], signatures, strict=True):
        assert {*filter(None, names.split(", "))} <= {*parameters}
    if hasattr(kdfast, paper.name):
        first = inspect.getdoc(target).splitlines()[0]
        assert re.match(r"\w+", paper.authors)[0] in first and str(paper.year) in first


@pytest.mark.parametrize("name", PUBLIC)
def test_every_setting_is_documented_and_shown(name):
    """help() names each argument of the constructor, and repr shows its value."""
    loss = getattr(kdfast, name)
    module = WITH_STATE.get(name, loss)()
    section = re.search(r"^Args:\n((?: .*\n?)+)", inspect.getdoc(loss), re.MULTILINE)
    documented = re.findall(r"^ {4}(\w+(?:, \w+)*):|\. (\w+(?:, \w+)*):", section[1] if section else "", re.MULTILINE)
    documented = ", ".join(one or other for one, other in documented).split(", ")
    for setting in constructor(loss):
        assert setting in documented, f"{setting} is not in the docstring's Args"
        assert f"{setting}=" in repr(module), f"{setting} is not in {module!r}"


def test_list_finds_a_paper(capsys):
    """Any part of its name, title or authors; without a word, all of them."""
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {paper.name} " in printed for paper in PAPERS)
    assert not find("no such method")
    for word, name in (("similarity-preserving", "SP"), ("tian", "CRD"), ("ban-2", "Born-Again"), ("nce", "CRD")):
        assert main(["list", word]) == 0
        assert f"\n{name}" in "\n" + capsys.readouterr().out
    assert main(["list", "no such method"]) == 1 and "No method has" in capsys.readouterr().out
