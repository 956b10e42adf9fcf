# Every named recipe on the 31M teacher, 10M tokens each: TEACHER, TRAIN and DEV name its folder and the two text files.
data="data={source: $TRAIN, seq_len: 2048, recall_fraction: 0.5, max_tokens: 10M}"
evaluation="evaluation={text: $DEV, lengths: [1024, 2048], windows: 64, recall: true, recall_items: 64, batch_size: 16, between: false}"

named() {
    name=$1; shift
    linearize convert --model "$TEACHER" --recipe default/$name model.dtype=float32 "$data" "$evaluation" \
        'stages.*.micro_batch_size=null' 'stages.*.batch_size=8' "$@" -o runs/named/$name
}
# The rates of stages that train everything are auto's: the papers' are for a hundred times as many parameters.
kl() { echo "stages.$1.lr=3.0e-4"; }
mixer='lrs={mixer: 1.0e-3}'
short="stages.0.batch_size=32 stages.1.batch_size=32 stages.1.schedule=cosine"
long="data.seq_len=1024 stages.2.seq_len=2048 stages.2.lr=1.0e-4"

named radlads tokens=10M $short $(kl 1) "stages.1.$mixer" $long
named kl_guided tokens=10M $short $(kl 1) "stages.1.$mixer" $long
named halo tokens=10M $(kl 1) "stages.1.$mixer" $long
named mohawk stages.0.tokens=1M stages.1.tokens=2M stages.2.tokens=7M $(kl 2) "stages.2.$mixer"
named xlstm tokens=10M $(kl 1) "stages.1.$mixer"
named mamba_in_llama tokens=10M $(kl 0) "stages.0.$mixer" $(kl 1) "stages.1.$mixer"
named attention_to_mamba tokens=10M $(kl 1) "stages.1.$mixer"
named taylor_gdn stages.0.batch_size=4 stages.0.tokens=307k stages.1.tokens=9.7M $(kl 1) "stages.1.$mixer"
named xatl tokens=10M stages.0.lr=3.0e-4
named liger tokens=10M
for name in hedgehog hedgecats lolcats; do named $name tokens=10M stages.1.lr=1.0e-3; done
for name in t2r supra lizard; do named $name tokens=10M stages.1.lr=1.0e-3 "stages.1.$mixer"; done

ours() {
    name=$1; tokens=$2; shift 2
    linearize convert --model "$TEACHER" --recipe docs/results/teacher-30m-auto.yaml data.source="$TRAIN" "$evaluation" \
        tokens=${tokens}M data.max_tokens=$((tokens * 700))k stages.0.data.max_tokens=$((tokens * 325 + 200))k "$@" -o runs/named/$name
}
two='layers={type: window_ablation, keep: 2}'
for tokens in 1 10; do
    ours auto_linear-${tokens}M $tokens
    ours auto-${tokens}M $tokens "$two"
done
ours as-lolcats 10 'mixer={type: lolcats, rope: window}'
ours as-gdn 10 'mixer={type: gdn, window: 64, combine: sigmoid, rope: window}'
ours as-lolcats-hybrid 10 "$two" 'mixer={type: lolcats, rope: window}'
ours as-kda-hybrid 10 "$two" 'mixer={type: kda, window: 64, combine: sigmoid, rope: window}'
linearize report runs/named/*
