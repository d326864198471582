"""The losses of arXiv:2505.08101 at the size of the demo: Chamfer between unscaled diagrams, published weights.

On the simulated streets, without the demo's pseudo-labels, which are no part of the method.
"""

_base_ = ["ptv3_to_student_tiny.py"]

save_path = "exp/sim_tiny/ptv3_to_student_paper"
model = dict(
    terms=dict(
        pseudo=None,
        logits={{_base_.paper_terms.logits}},
        gradient={{_base_.paper_terms.gradient}},
        topology={{_base_.paper_terms.topology}},
    ),
)
