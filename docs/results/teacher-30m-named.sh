# Every named recipe on the 31M teacher: TEACHER, TRAIN and DEV name its folder and the two text files. TOKENS is the budget
# of each in millions (10); RECIPES some of them instead of all; ITEMS the questions a case (64), FACTS=yes asks as many as
# teacher-30m-auto.yaml does with the facts anywhere; RATES=twice doubles the rates of stages that train everything,
# RATES=four and RATES=eight double them again: name recipes that have such stages. The mixers of xatl keep their own.
TOKENS=${TOKENS:-10}
case "$RATES" in
    "") times=1 ;;
    twice) times=2 ;;
    four) times=4 ;;
    eight) times=8 ;;
    *) echo "RATES is twice, four, eight or unset, got $RATES" >&2; exit 1 ;;
esac
[ -n "$FACTS" ] && probes=", probes: [{type: facts, facts: [1], lengths: [250, 950, 1850], items: 200}, {type: facts, \
facts: [4], lengths: [300, 1000, 1800], items: 200}, {type: facts, facts: [8], lengths: [370, 1070, 1670], items: 200}]"
data="data={source: $TRAIN, seq_len: 2048, recall_fraction: 0.5, max_tokens: ${TOKENS}M}"
evaluation="evaluation={text: $DEV, lengths: [1024, 2048], windows: 64, recall: true, recall_items: ${ITEMS:-64}, batch_size: 16, \
between: false$probes}"

named() {
    name=$1; shift
    case " ${RECIPES:-$name} " in *" $name "*) ;; *) return 0 ;; esac
    linearize convert --model "$TEACHER" --recipe default/$name model.dtype=float32 "$data" "$evaluation" \
        'stages.*.micro_batch_size=null' 'stages.*.batch_size=8' "$@" -o runs/named${RATES:+-$RATES}/$name
}
# The rates of stages that train everything are auto's first ones, twice those, which it has now, or four or eight times:
# the papers' are for a hundred times as many parameters.
all=$((3 * times)).0e-4 mixers=${times}.0e-3 last=${times}.0e-4
kl() { echo "stages.$1.lr=$all"; }
mixer="lrs={mixer: $mixers}"
short="stages.0.batch_size=32 stages.1.batch_size=32 stages.1.schedule=cosine"
long="data.seq_len=1024 stages.2.seq_len=2048 stages.2.lr=$last"

named radlads tokens=${TOKENS}M $short $(kl 1) "stages.1.$mixer" $long
named kl_guided tokens=${TOKENS}M $short $(kl 1) "stages.1.$mixer" $long
named halo tokens=${TOKENS}M $(kl 1) "stages.1.$mixer" $long
named mohawk stages.0.tokens=${TOKENS}00k stages.1.tokens=$((TOKENS * 2))00k stages.2.tokens=$((TOKENS * 7))00k $(kl 2) "stages.2.$mixer"
named xlstm tokens=${TOKENS}M $(kl 1) "stages.1.$mixer"
named mamba_in_llama tokens=${TOKENS}M $(kl 0) "stages.0.$mixer" $(kl 1) "stages.1.$mixer"
named attention_to_mamba tokens=${TOKENS}M $(kl 1) "stages.1.$mixer"
named taylor_gdn stages.0.batch_size=4 stages.0.tokens=307k stages.1.tokens=$((TOKENS * 1000 - 300))k $(kl 1) "stages.1.$mixer"
named xatl tokens=${TOKENS}M stages.0.lr=$all
named liger tokens=${TOKENS}M
named lolcats tokens=${TOKENS}M stages.1.lr=1.0e-3
for name in hedgehog hedgecats; do named $name tokens=${TOKENS}M stages.1.lr=1.0e-3 mixer.backend=torch; done
for name in t2r supra lizard; do named $name tokens=${TOKENS}M stages.1.lr=1.0e-3 'stages.1.lrs={mixer: 1.0e-3}'; done

[ -n "$RECIPES$RATES" ] && exit

ours() {
    name=$1; tokens=$2; shift 2
    linearize convert --model "$TEACHER" --recipe docs/results/teacher-30m-auto-64.yaml data.source="$TRAIN" "$evaluation" \
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
