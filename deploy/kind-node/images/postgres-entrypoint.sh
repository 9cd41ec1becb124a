#!/bin/sh
# The documented contract of the official image's entrypoint; see README.md.
set -eu

# Prints the value of $NAME, else the content of the file $NAME_FILE, else a default.
setting() {
    eval "value=\${$1:-} file=\${$1_FILE:-}"
    if [ -n "$value" ] && [ -n "$file" ]; then
        echo "error: both $1 and $1_FILE are set (but are exclusive)" >&2
        exit 1
    fi
    [ -z "$file" ] || value=$(cat "$file")
    printf %s "${value:-$2}"
}

case ${1:-} in -*) set -- postgres "$@" ;; esac
if [ "${1:-}" != postgres ] || [ -s "$PGDATA/PG_VERSION" ]; then
    exec "$@"
fi

user=$(setting POSTGRES_USER postgres)
database=$(setting POSTGRES_DB "$user")
password=$(setting POSTGRES_PASSWORD '')
method=${POSTGRES_HOST_AUTH_METHOD:-scram-sha-256}
if [ -z "$password" ] && [ "$method" != trust ]; then
    echo 'Error: Database is uninitialized and superuser password is not specified.' >&2
    echo '       You must specify POSTGRES_PASSWORD to a non-empty value for the superuser.' >&2
    exit 1
fi
mkdir -p "$PGDATA"
chmod 700 "$PGDATA"
secret=$(mktemp)
printf '%s\n' "$password" > "$secret"
# Unquoted on purpose: the variable may hold several arguments.
# shellcheck disable=SC2086
initdb --username="$user" --pwfile="$secret" ${POSTGRES_INITDB_ARGS:-} "$PGDATA"
rm -f "$secret"
printf '\nhost all all all %s\n' "$method" >> "$PGDATA/pg_hba.conf"

# First without the network, so that no client reaches a half-initialized database.
pg_ctl -D "$PGDATA" -o "-c listen_addresses=''" -w start
export PGPASSWORD="$password"
if [ "$database" != postgres ]; then
    psql -v ON_ERROR_STOP=1 --username "$user" --dbname postgres -c "CREATE DATABASE \"$database\""
fi
for file in /docker-entrypoint-initdb.d/*; do
    case $file in
    *.sh) sh "$file" ;;
    *.sql) psql -v ON_ERROR_STOP=1 --username "$user" --dbname "$database" -f "$file" ;;
    esac
done
unset PGPASSWORD
pg_ctl -D "$PGDATA" -m fast -w stop
echo 'PostgreSQL init process complete; ready for start up.'
exec "$@"
