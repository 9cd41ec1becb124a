#!/bin/sh
# Two users talk, with curl alone: register, log in, send, read, and follow the stream over a broken connection.
#
#   ./chat.sh http://localhost:8000
set -eu

service=${1:?usage: $0 URL, for example $0 http://localhost:8000}
tag=$(date +%s)

# A field of a JSON answer. Use jq where there is more to read.
field() { sed -n "s/.*\"$1\":\"\([^\"]*\)\".*/\1/p"; }

register() {
    curl -sS --fail-with-body -X POST "$service/register" -H 'content-type: application/json' \
        -d "{\"username\":\"$1\",\"email\":\"$1@example.com\",\"password\":\"correct horse battery\"}" | field id
}

log_in() {
    curl -sS --fail-with-body -X POST "$service/login" -H 'content-type: application/json' \
        -d "{\"username\":\"$1\",\"password\":\"correct horse battery\"}" | field access_token
}

# The key makes it safe to send the same message again after an error: it is stored once.
send() {
    curl -sS --fail-with-body --retry 3 --retry-all-errors -X POST "$service/send" \
        -H "authorization: Bearer $1" -H 'content-type: application/json' -H "idempotency-key: $tag-$3" \
        -d "{\"recipient_id\":\"$2\",\"content\":\"message $3\"}" >/dev/null
}

# Shows the events of some seconds. With a position it goes on exactly behind it.
follow() {
    curl -sSN --max-time "$2" "$service/stream" -H "authorization: Bearer $1" ${3:+-H "last-event-id: $3"} || test $? = 28
}

ana_id=$(register "ana$tag") && ana=$(log_in "ana$tag")
ben_id=$(register "ben$tag") && ben=$(log_in "ben$tag")

echo "Ben follows, and Ana writes:"
(sleep 1 && send "$ana" "$ben_id" 1) &
follow "$ben" 3 >stream.$$ && cat stream.$$
wait

echo "Ana writes while Ben is away:"
send "$ana" "$ben_id" 2
send "$ana" "$ben_id" 3

echo "Ben comes back, and misses nothing:"
position=$(sed -n 's/^id: //p' stream.$$ | tail -n 1)
follow "$ben" 2 "$position"
rm stream.$$

echo "The conversation, newest first:"
curl -sS --fail-with-body "$service/messages?peer_id=$ana_id" -H "authorization: Bearer $ben"
echo
echo "Ben's conversations:"
curl -sS --fail-with-body "$service/conversations" -H "authorization: Bearer $ben"
echo
