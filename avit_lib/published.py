"""What others published, beside which our own figures stand; other data or other training, so never the same thing."""

from dataclasses import dataclass

PAPER = "paper, ImageNet"
REPORT = "report, Caltech-256"
SOURCES = {
    PAPER: "Yin et al., CVPR 2022, arXiv 2112.07658, abstract and table 2: A-ViT-T against DeiT-T on ImageNet-1k.",
    REPORT: "Giamba and Di Luccio, student report of Sapienza University, README of github.com/lorenzo-di-luccio/"
    "NNProject: DeiT-Ti and A-ViT-T on Caltech-256; it gives no computation and no depth.",
}


@dataclass(frozen=True)
class Published:
    """The figures of one model in one source; None where the source gives none. Fractions are 0 to 1."""

    run: str  # the run of a profile that it is the counterpart of
    source: str  # one of SOURCES
    accuracy: float | None = None
    f1_macro: float | None = None
    minus_deit: float | None = None  # accuracy less that of DeiT in the same source
    mean_depth: float | None = None  # layers of 12
    gflops_per_image: float | None = None
    speedup: float | None = None  # of throughput, over DeiT


PUBLISHED = (
    Published("avit", PAPER, 0.710, None, -0.003, 7.23, 0.8, 1.62),
    Published("deit", REPORT, 0.7322, 0.7220, 0.0),
    Published("avit", REPORT, 0.6957, 0.6873, 0.6957 - 0.7322),
    Published("avit_finetuned", REPORT, 0.7121, 0.7023, 0.7121 - 0.7322),
)
