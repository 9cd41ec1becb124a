#!/bin/sh
# A Docker engine for a machine that has none, and no systemd: engine.sh start|close|stop STATE DATA. It has PID and mount namespaces of
# its own, so that the end of one process ends all containers and mounts. `stop` undoes the rest, also after a kill.
set -eu
verb=$1 state=$2 data=$3
here=$(cd "$(dirname "$0")" && pwd)
cgroup=chat-service-kind
run=/run/$cgroup

start() {
    mkdir -p "$state" "$data"
    sysctl vm.overcommit_memory vm.panic_on_oom kernel.panic kernel.panic_on_oops net.ipv4.ip_forward > "$state/sysctls"
    # A table that nobody has used yet would be missing from what is saved.
    for table in filter nat; do iptables -t $table -N $cgroup && iptables -t $table -X $cgroup; done
    iptables-save > "$state/iptables"
    ls /sys/class/net > "$state/links"
    # The engine must not keep a file of the caller's open, such as a lock.
    setsid unshare --mount --pid --fork --kill-child --mount-proc sh "$here/engine.sh" run "$state" "$data" \
        > "$state/log" 2>&1 < /dev/null 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&- &
    echo $! > "$state/pid"
    timeout 60 sh -c 'until docker version >/dev/null 2>&1; do sleep 0.2; done' || { tail -n 12 "$state/log"; exit 1; }
}

# The namespaces' first process.
run() {
    mount --make-rshared /
    mkdir -p /run/containerd
    mount -t tmpfs none /run/containerd
    set -- --data-root "$data" --exec-root $run --pidfile "$state/dockerd.pid" --host unix:///var/run/docker.sock \
        --cgroup-parent /$cgroup --exec-opt native.cgroupdriver=cgroupfs --ip6tables=false
    # CAP_SYS_RESOURCE is bit 24.
    if [ $((0x$(sed -n 's/^CapEff:\t//p' /proc/self/status) >> 24 & 1)) = 0 ]; then
        set -- "$@" --add-runtime without-sys-resource="$here/runc.sh" --default-runtime without-sys-resource
    fi
    dockerd "$@" &
    # It also reaps what has lost its parent.
    wait
}

# Nothing of a container leaves the machine. Else a packet to a Service that has no rule yet may be answered by something outside,
# and the connection is kept.
close() {
    for device in $(ip route show default | sed -n 's/.* dev \([^ ]*\).*/\1/p'); do
        iptables -C DOCKER-USER -o "$device" -j REJECT 2>/dev/null || iptables -I DOCKER-USER -o "$device" -j REJECT
    done
}

stop() {
    [ -d "$state" ] || return 0
    pid=$(cat "$state/pid" 2>/dev/null || echo none)
    ours() { grep -q "$state" "/proc/$pid/cmdline" 2>/dev/null; }
    if ours; then
        # The parent ends after its child, and that after all others.
        kill -KILL $(cat "/proc/$pid/task/$pid/children")
        for _ in $(seq 300); do ours || break; sleep 0.1; done
    fi
    for _ in $(seq 50); do
        find /sys/fs/cgroup -depth -type d -path "*/$cgroup*" -exec rmdir {} + 2>/dev/null && break
        sleep 0.1
    done
    [ ! -e "$state/iptables" ] || iptables-restore < "$state/iptables"
    for link in $(ls /sys/class/net); do
        case $link in docker0 | br-*) grep -qx "$link" "$state/links" || ip link delete "$link" ;; esac
    done
    [ ! -e "$state/sysctls" ] || sysctl -q -p "$state/sysctls"
    rm -rf /var/run/docker.sock $run "$state"
}

[ "$verb" != start ] || stop
$verb
