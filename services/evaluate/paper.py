"""What the paper and the field report, beside which ours is printed. Sources in ``docs/evaluation.md``."""

from __future__ import annotations

from typing import Final

# Section 5.3: people asked "same person?" on LFW; shares.
SAME_PERSON: Final = {"I-A": 0.047, "I-R": 1.0, "I-WR": 0.007, "A-WR": 0.013, "A1-A2": 0.122, "WR1-WR2": 0.027}
# What the right password gives back. The range of its L1 and L2 is not stated; [-1, 1] is what its network works in.
RECOVERY_ON: Final = {
    "CASIA-WebFace": {"lpips": 0.03, "dssim": 0.03, "l1": 0.04, "l2": 0.004},
    "LFW": {"lpips": 0.04, "dssim": 0.03, "l1": 0.04, "l2": 0.004},
    "FFHQ": {"lpips": 0.0602, "dssim": 0.0471, "l1": 0.0509, "l2": 0.0057},
}
RECOVERY: Final = RECOVERY_ON["LFW"]
# Table 2, LFW.
BASELINES: Final = {
    "ren": {"lpips": 0.08, "dssim": 0.07, "l1": 0.06, "l2": 0.010},
    "superpixel": {"lpips": 0.10, "dssim": 0.11, "l1": 0.07, "l2": 0.02},
    "edge": {"lpips": 0.28, "dssim": 0.26, "l1": 0.29, "l2": 0.18},
    "blur": {"lpips": 0.34, "dssim": 0.24, "l1": 0.14, "l2": 0.05},
    "noise": {"lpips": 0.13, "dssim": 0.12, "l1": 0.08, "l2": 0.01},
    "mask": {"lpips": 0.16, "dssim": 0.13, "l1": 0.10, "l2": 0.05},
}
# Table 3: mean shift of MTCNN's boxes and keypoints of A, R and WR against I, pixels of a 128 px frame.
DETECTION_ON: Final = {
    "CASIA-WebFace": {"box": 1.81, "landmarks": 0.94},
    "LFW": {"box": 1.62, "landmarks": 0.76},
    "FFHQ": {"box": 1.91, "landmarks": 0.89},
}
DETECTION: Final = DETECTION_ON["LFW"]
# Section 5.3: share taken for more real than a real face; 0.5 is chance.
MORE_REAL: Final = {"A": 0.289, "WR": 0.154}
# Section 4: seconds a batch of 12 on a Titan V.
BATCH_OF_12: Final = 0.0266
# The field since: TPR at FPR 1e-3 of anonymized against real LFW photos, FaceNet / ArcFace (PrIdentity's table).
FIELD_TPR: Final = {
    "unchanged faces": (0.965, 0.987),
    "CIAGAN": (0.033, 0.019),
    "RiDDLE": (0.032, 0.011),
    "G2Face": (0.009, 0.007),
    "PrIdentity": (0.019, 0.002),
}
# Rank-1 re-identification in a gallery of 1,000 (Face Anonymization Made Simple, table 1).
FIELD_RANK1: Final = {"FALCO": 0.005, "RiDDLE": 0.007, "DeepPrivacy2": 0.020, "FAMS": 0.008}
