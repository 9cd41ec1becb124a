#!/bin/sh
# Builds the node image: build.sh IMAGE PROGRAM KINDS_FILES RECIPE FOLDER. Debian's part is kept in the engine as an image.
set -eu
image=$1 program=$2 kind=$3 recipe=$4 folder=$5
here=$(cd "$(dirname "$0")" && pwd)
debian=chat-service/debian:bookworm
packages=systemd,systemd-sysv,conntrack,iptables,nftables,iproute2,ethtool,util-linux,mount,kmod,e2fsprogs,bash,ca-certificates,curl,jq
packages=$packages,procps,containerd,runc,containernetworking-plugins
# Those that the kubeadm of Kubernetes 1.34.4 and the containerd configuration of kind name.
pods="registry.k8s.io/kube-apiserver:v1.34.4 registry.k8s.io/kube-controller-manager:v1.34.4 registry.k8s.io/kube-scheduler:v1.34.4
registry.k8s.io/kube-proxy:v1.34.4 registry.k8s.io/etcd:3.6.5-0 registry.k8s.io/coredns/coredns:v1.12.1
registry.k8s.io/metrics-server/metrics-server:v0.8.0"
pause=registry.k8s.io/pause:3.10

rm -rf "$folder"
mkdir -p "$folder/context"
if ! docker image inspect "$debian" >/dev/null 2>&1; then
    debootstrap --variant=minbase --include="$packages" bookworm "$folder/debian" http://deb.debian.org/debian
    (cd "$folder/debian" && rm -rf var/cache/apt/* var/lib/apt/lists/* usr/share/doc/* usr/share/man/* usr/share/locale/* usr/share/info/*)
    tar -C "$folder/debian" -c . | docker import - "$debian"
fi
cp -r --no-preserve=mode,ownership "$kind" "$folder/context/kind"
cp -r "$here/files" "$folder/context/files"
cp "$program" "$folder/context/kubernetes-node"
build() { docker build --file "$here/Dockerfile" --target "$1" --tag "$2" "$folder/context"; }
build pause $pause
build kubernetes chat-service/kubernetes:v1.34.4
build node chat-service/kind-node:v1.34.4
for name in $pods; do docker tag chat-service/kubernetes:v1.34.4 "$name"; done

# As `kind build node-image` does it: a containerd in a container takes the images, and the container becomes the image.
docker rm --force kind-node-build >/dev/null 2>&1 || true
docker run --detach --name kind-node-build --entrypoint sleep chat-service/kind-node:v1.34.4 infinity
docker exec --detach kind-node-build containerd
timeout 30 sh -c 'until docker exec kind-node-build ctr version >/dev/null 2>&1; do sleep 0.2; done'
# shellcheck disable=SC2086 # several names
docker save $pods $pause |
    docker exec --interactive kind-node-build ctr -n k8s.io images import --all-platforms --no-unpack --digests -
docker exec kind-node-build sh -c 'pkill containerd; while pgrep containerd; do sleep 0.1; done; rm -rf /run/containerd /tmp/*'
docker commit --change 'ENTRYPOINT ["/usr/local/bin/entrypoint", "/sbin/init"]' --change 'CMD []' \
    --change "LABEL recipe=$recipe" kind-node-build "$image"
docker rm --force kind-node-build
# shellcheck disable=SC2086
docker rmi $pods $pause >/dev/null
rm -rf "$folder"
