# What led to recipe auto, 10M tokens each: TEACHER, TRAIN and DEV name the 31M teacher's folder and the two text files.
ours() {
    name=$1; shift
    linearize convert --model "$TEACHER" --recipe docs/results/teacher-30m-auto-64.yaml data.source="$TRAIN" evaluation.text="$DEV" \
        'evaluation.probes=[]' stages.0.tokens=3M stages.0.data.max_tokens=4M stages.1.tokens=7M data.max_tokens=7M "$@" -o runs/ten/$name
}
two='layers={type: window_ablation, keep: 2}'
twice="stages.1.lr=6.0e-4 stages.1.lrs.mixer=2.0e-3"
four="stages.1.lr=1.2e-3 stages.1.lrs.mixer=4.0e-3"
short="stages.0.tokens=1M stages.0.data.max_tokens=2M stages.1.tokens=9M data.max_tokens=9M"
answers="stages.1.ce=0.9 stages.1.ce_on=answers"

ours auto "$two"
ours auto-ce0.1 "$two" stages.1.ce=0.1
ours auto-ce0.3 "$two" stages.1.ce=0.3
ours auto-ce0.5 "$two" stages.1.ce=0.5
ours auto-ce0.3-short "$two" stages.1.ce=0.3 $short
ours auto-twice "$two" $twice
ours auto-twice-ce0.3 "$two" $twice stages.1.ce=0.3
ours auto-answers "$two" $answers
ours auto-answers-twice "$two" $answers $twice
ours auto-answers-four "$two" $answers $four
ours auto_linear
ours auto_linear-short $short
ours auto_linear-ce0.3 stages.1.ce=0.3
ours auto_linear-twice $twice
ours auto_linear-twice-ce0.3 $twice stages.1.ce=0.3
ours auto_linear-answers-twice $answers $twice
ours auto_linear-answers-four $answers $four
ours auto_linear-answers-128 $answers mixer.window=128
ours auto_linear-answers-twice-128 $answers $twice mixer.window=128
ours auto_linear-answers-twice-256 $answers $twice mixer.window=256
linearize report runs/ten/*
