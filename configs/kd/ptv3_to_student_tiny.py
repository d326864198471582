"""`ptv3_to_student.py` at the size of the demo: minutes on two CPU cores.

The teacher knows three fully labelled drives. The student sees three other drives on which one point in a hundred is
labelled, as where a person clicks instead of painting; the teacher has an opinion on all the others.
"""

_base_ = [
    "../_base_/sim_tiny.py",
    "../_base_/ptv3_pair_tiny.py",
    "../_base_/topology_kd.py",
    "../_base_/cpu_minutes.py",
]

save_path = "exp/sim_tiny/ptv3_to_student"
data = dict(train=dict(sequences=["03", "04", "05"], label_fraction=0.01))
model = dict(
    type="kd.Distiller",
    teacher_cache=None,  # a folder: ask the teacher once per scan, docs/teacher_cache.md
    student=dict(model={{_base_.student_model}}, taps=dict(enc_out="backbone.enc")),
    teacher=dict(
        model={{_base_.teacher_model}},
        taps=dict(enc_out="backbone.enc"),
        weight="exp/sim_tiny/semseg-pt-v3m1-0-base/model/model_last.pth",
        config="configs/sim/semseg-pt-v3m1-0-base_tiny.py",
        train_if_missing=True,
    ),
    terms=dict(
        logits=dict(type="kd.LogitKL", temperature=1.0, weight=1.0),
        pseudo=dict(
            type="kd.PseudoLabels",
            criteria=[
                dict(type="CrossEntropyLoss", loss_weight=1.0, ignore_index=-1),
                dict(type="LovaszLoss", mode="multiclass", loss_weight=1.0, ignore_index=-1),
            ],
            weight=1.0,
        ),
    ),
)
