"""All four losses on the simulated streets at the size of the demo with the weights of docs/methods/topology_kd.md.

Without the demo's pseudo-labels, which are no part of the method.
"""

_base_ = ["ptv3_to_student_tiny.py"]

save_path = "exp/sim_tiny/ptv3_to_student_recommended"
model = dict(
    terms=dict(
        pseudo=None,
        logits={{_base_.recommended_terms.logits}},
        gradient={{_base_.recommended_terms.gradient}},
        topology={{_base_.recommended_terms.topology}},
    ),
)
