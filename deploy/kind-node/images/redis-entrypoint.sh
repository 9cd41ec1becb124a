#!/bin/sh
# The documented contract of the official image's entrypoint; see README.md.
set -eu
case ${1:-} in
-* | *.conf) set -- redis-server "$@" ;;
esac
umask 0077
exec "$@"
