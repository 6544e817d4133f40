#!/usr/bin/env bash
# train.py in two containers with nothing but RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as Kubernetes sets them;
# first with the names of the hosts known, then with each host's own name on its loopback, where gloo would listen.
. "$(dirname "$0")/lab.sh"
lab_open
lab_run
pods() {
  local number
  for number in 1 2; do
    on $number env RANK=$((number - 1)) WORLD_SIZE=2 MASTER_ADDR="$1" MASTER_PORT=23456 timeout --kill-after=10 "$LAB_SECONDS" \
      "$PYTHON" train.py "$LAB/tiny.yml" --set save="$LAB/checkpoints_$2" runs_dir="$LAB/$2/runs" >"$LAB/log$number" 2>&1 &
    pods[$number]=$!
  done
  for number in 2 1; do
    wait "${pods[$number]}"
    code=$?
    cat "$LAB"/log[12] >"$LAB/log"
    expect_code 0 $code "the pod of rank $((number - 1))"
  done
  same_losses "plain variables, $2" "$LAB/$2"
}
pods 10.77.0.1 "names known"
for number in 1 2; do
  printf '127.0.0.1 localhost\n127.0.1.1 node%s\n' $number >"$LAB/hosts$number"
  on $number mount --bind "$LAB/hosts$number" /etc/hosts
done
pods 10.77.0.1 "names on the loopback"
expect_text "$LAB/log1" "this host's name is its loopback's; gloo uses eth0"
