#!/bin/sh
# Two users talk, with curl alone: register, log in, send, read, follow the stream over a broken connection, renew the tokens, log out.
#
#   ./chat.sh http://localhost:8000
set -eu

service=${1:?usage: $0 URL, for example $0 http://localhost:8000}
tag=$(date +%s)
stream=$(mktemp)
trap 'rm -f "$stream"' EXIT

# Prints the answer; a refusal goes to the standard error, and ends the script.
post() {
    path=$1 body=$2
    shift 2
    answer=$(curl -sS --fail-with-body --max-time 15 "$service/$path" -H 'content-type: application/json' -d "$body" "$@") ||
        { printf '%s\n' "$path: $answer" >&2 && return 1; }
    printf '%s\n' "$answer"
}

get() {
    curl -sS --fail-with-body --max-time 15 "$service/$2" -H "authorization: Bearer $1"
    echo
}

# A field of a JSON answer. Use jq where there is more to read.
field() { sed -n "s/.*\"$1\":\"\([^\"]*\)\".*/\1/p"; }

register() { post register "{\"username\":\"$1\",\"email\":\"$1@example.com\",\"password\":\"correct horse battery\"}"; }

log_in() { post login "{\"username\":\"$1\",\"password\":\"correct horse battery\"}"; }

# The key makes it safe to send the same message again where there was no answer: it is stored once.
send() {
    post send "{\"recipient_id\":\"$2\",\"content\":\"message $3\"}" -H "authorization: Bearer $1" \
        -H "idempotency-key: $tag-$3" --retry 3 --retry-all-errors >/dev/null
}

# Shows the events of some seconds. With a position it goes on exactly behind it.
follow() {
    curl -sSN --max-time "$2" "$service/stream" -H "authorization: Bearer $1" ${3:+-H "last-event-id: $3"} || test $? = 28
}

ana_id=$(register "ana$tag" | field id)
ben_id=$(register "ben$tag" | field id)
ana=$(log_in "ana$tag" | field access_token)
ben_tokens=$(log_in "ben$tag")
ben=$(echo "$ben_tokens" | field access_token)
: "${ana_id:?} ${ben_id:?} ${ana:?} ${ben:?}"

echo "Ben follows, and Ana writes:"
(sleep 1 && send "$ana" "$ben_id" 1) &
follow "$ben" 3 >"$stream"
wait
cat "$stream"

echo "Ana writes while Ben is away:"
send "$ana" "$ben_id" 2
send "$ana" "$ben_id" 3

echo "Ben comes back, and misses nothing:"
follow "$ben" 2 "$(sed -n 's/^id: //p' "$stream" | tail -n 1)"

echo "The conversation, newest first:"
get "$ben" "messages?peer_id=$ana_id"

echo "Ben's conversations:"
get "$ben" conversations

# Before the access token expires. The refresh token works once: where the answer is lost, repeat it within 10 seconds.
echo "Ben's tokens are exchanged for new ones:"
ben_tokens=$(post refresh "{\"refresh_token\":\"$(echo "$ben_tokens" | field refresh_token)\"}" --max-time 3 --retry 2 --retry-all-errors)
ben=$(echo "$ben_tokens" | field access_token)
get "$ben" me

echo "Ben logs out, and his tokens are of no use any more:"
post logout '' -H "authorization: Bearer $ben"
curl -sS --max-time 15 -o /dev/null -w '%{http_code}\n' "$service/me" -H "authorization: Bearer $ben"
