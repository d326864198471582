"""PTv3 (46.2 M) teaches a small PTv3 (2.78 M) on the simulated streets, with all four losses of arXiv:2505.08101.

The labels, the teacher's class scores, the map of what the bottleneck's features do for the task, and their topology;
docs/methods/topology_kd.md. Siblings: `_paper`, the published weights and distances; `_recommended`, those that did
best here; `_logits`, `_gradient` and `_topology`, fewer terms. The teacher and the student alone:
`configs/sim/semseg-pt-v3m1-0-base.py`, `configs/sim/semseg-pt-v3m1-1-student.py`.
"""

_base_ = [
    "../_base_/sim.py",
    "../_base_/ptv3_pair.py",
    "../_base_/topology_kd.py",
    "../_base_/adamw_onecycle.py",
]

save_path = "exp/sim/ptv3_to_student"
enable_amp = True
model = dict(
    type="kd.Distiller",
    teacher_cache=None,  # a folder: ask the teacher once per scan, without the gradient term; docs/teacher_cache.md
    student=dict(model={{_base_.student_model}}, taps=dict(enc_out="backbone.enc")),
    teacher=dict(
        model={{_base_.teacher_model}},
        taps=dict(enc_out="backbone.enc"),
        weight="exp/sim/semseg-pt-v3m1-0-base/model/model_best.pth",
        config="configs/sim/semseg-pt-v3m1-0-base.py",
        train_if_missing=True,
    ),
    terms={{_base_.recommended_terms}},
)
