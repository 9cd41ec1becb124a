#!/bin/sh
# Assembles the root of a stand-in image from this machine's packages: assemble.sh postgres|redis FOLDER [POSTGRES_BIN_FOLDER]
set -eu
image=$1 root=$2

# Copies a program or library to the same path, with every library that it loads.
bring() {
    for file in "$@"; do
        mkdir -p "$root$(dirname "$file")"
        cp -L "$file" "$root$file"
        for library in $(ldd "$file" 2>/dev/null | grep -o '/[^ ]*'); do
            [ -e "$root$library" ] || { mkdir -p "$root$(dirname "$library")"; cp -L "$library" "$root$library"; }
        done
    done
}

rm -rf "$root"
mkdir -p "$root/bin" "$root/etc" "$root/tmp" "$root/usr/local/bin" "$root/usr/lib/locale"
chmod 1777 "$root/tmp"
cp "$(command -v busybox)" "$root/bin/busybox"
for tool in $("$root/bin/busybox" --list); do
    [ "$tool" = busybox ] || ln -s busybox "$root/bin/$tool"
done
cp -r /usr/lib/locale/C.utf8 "$root/usr/lib/locale/"
cp "$(dirname "$0")/$image-entrypoint.sh" "$root/usr/local/bin/docker-entrypoint.sh"
chmod 755 "$root/usr/local/bin/docker-entrypoint.sh"
printf 'root:x:0:0:root:/root:/bin/sh\n%s:x:999:999::/tmp:/bin/sh\n' "$image" > "$root/etc/passwd"
printf 'root:x:0:\n%s:x:999:\n' "$image" > "$root/etc/group"
printf 'passwd: files\ngroup: files\nhosts: files dns\n' > "$root/etc/nsswitch.conf"

case $image in
postgres)
    bin=$3
    version=$(basename "$(dirname "$bin")")
    share=/usr/share/postgresql/$version
    bring "$bin"/* "/usr/lib/postgresql/$version/lib"/*.so
    # Without the JIT compiler, which has a hundred megabytes. Locales and collations come from the C library.
    rm -f "$root/usr/lib/postgresql/$version/lib/llvmjit.so"
    rm -f "$root"/usr/lib/*/libLLVM* "$root"/lib/*/libLLVM*
    mkdir -p "$root$(dirname "$share")" "$root/usr/share/zoneinfo" "$root/docker-entrypoint-initdb.d"
    cp -rL "$share" "$root$share"
    sed -i "s/^#listen_addresses = .*/listen_addresses = '*'/" "$root$share/postgresql.conf.sample"
    cp -rL /usr/share/zoneinfo/. "$root/usr/share/zoneinfo/"
    for program in "$bin"/*; do ln -sf "$program" "$root/usr/local/bin/$(basename "$program")"; done
    mkdir -p "$root/var/lib/postgresql/data" "$root/var/run/postgresql"
    chown -R 999:999 "$root/var/lib/postgresql" "$root/var/run/postgresql"
    chmod 3777 "$root/var/run/postgresql"
    ;;
redis)
    bring "$(command -v redis-server)" "$(command -v redis-cli)"
    mkdir -p "$root/data"
    chown 999:999 "$root/data"
    ;;
esac
