"""The losses of arXiv:2505.08101 beside the labels, in two settings: docs/methods/topology_kd.md.

`paper_terms`: Chamfer between unscaled diagrams, the weights of the published code. `recommended_terms`: diagrams in
units of the mean pair distance, sorted deaths in H0.
"""

__logits = dict(type="kd.LogitKL", temperature=1.0, weight=0.3)
__gradient = dict(type="kd.GradientGuided", tap="enc_out", normalize="minmax", weight=10.0)
paper_terms = dict(
    logits=__logits,
    gradient=__gradient,
    topology=dict(
        type="kd.Topology",
        tap="enc_out",
        homology=dict(h0=1.0, h1=1.0),
        distance=dict(h0="chamfer", h1="chamfer"),
        scale="none",
        every=1,
        weight=0.1,
    ),
)
recommended_terms = dict(
    logits=__logits,
    gradient=__gradient,
    topology=dict(
        type="kd.Topology",
        tap="enc_out",
        homology=dict(h0=1.0, h1=1.0),
        distance=dict(h0="w2", h1="chamfer"),
        scale="mean",
        every=1,
        weight=0.1,
    ),
)
