WITH input AS (
    SELECT n, id, sender, recipient, content, key, session, may_begin,
           least(sender, recipient) AS low, greatest(sender, recipient) AS high
    FROM unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::text[], $5::text[], $6::uuid[], $7::boolean[])
         WITH ORDINALITY AS t (id, sender, recipient, content, key, session, may_begin, n)
), replayed AS (
    -- What was sent under the same key before, and whether it is the same message.
    SELECT i.n, m.id, m.seq, m.created_at, (c.id IS NOT NULL AND m.content = i.content) AS same
    FROM input i
    JOIN idempotency_keys k ON k.sender_id = i.sender AND k.key = i.key
    JOIN messages m ON m.conversation_id = k.conversation_id AND m.seq = k.seq
    LEFT JOIN conversations c ON c.low_user = i.low AND c.high_user = i.high AND c.id = k.conversation_id
), accepted AS (
    -- The writer has not seen this conversation, and it is not there.
    SELECT i.*, i.may_begin AND (SELECT c.id FROM conversations c WHERE c.low_user = i.low AND c.high_user = i.high) IS NULL
           AS begins
    FROM input i
    JOIN users s ON s.id = i.sender
    JOIN users r ON r.id = i.recipient
    -- These are no NOT EXISTS, because the planner may expect those to leave one row, and then joins all that follows in
    -- nested loops: with 200 messages that takes half as much time again.
    WHERE (SELECT p.n FROM replayed p WHERE p.n = i.n) IS DISTINCT FROM i.n
      AND (SELECT e.session_id FROM ended_sessions e WHERE e.session_id = i.session LIMIT 1)
          IS DISTINCT FROM i.session
      -- Most users have never blocked anybody: their own row, which is read anyway, says so.
      AND (NOT r.has_blocked
           OR (SELECT b.blocker FROM blocks b WHERE b.blocker = i.recipient AND b.blocked = i.sender)
              IS DISTINCT FROM i.recipient)
), counted AS (
    -- With whom each sender begins a conversation in this hour, $8 users at most. The lock of the sender's row puts the
    -- statements of all replicas in an order, and an update sees what the one before it has committed, whatever its own
    -- snapshot: so no more than $8 are ever allowed in an hour, several of one batch included. A user who is there already is not
    -- counted twice, although several statements may find no conversation yet. The count and the conversation are one transaction:
    -- neither is without the other. It is one too many only where both users begin the same conversation at the same moment, and
    -- neither could have seen the other's message. These rows are locked before any conversation, in the order of users: no deadlock.
    INSERT INTO new_conversations AS held (user_id, hour, peers)
    SELECT sender, floor(extract(epoch FROM clock_timestamp()) / 3600)::bigint, (array_agg(recipient ORDER BY n))[1:$8]
    FROM (SELECT sender, recipient, min(n) AS n FROM accepted WHERE begins GROUP BY sender, recipient) AS first
    GROUP BY sender
    ORDER BY sender
    ON CONFLICT (user_id) DO UPDATE
    -- A statement that waited may come from the hour before: then it counts in this one.
    SET hour = CASE WHEN held.hour = excluded.hour + 1 THEN held.hour ELSE excluded.hour END,
        peers = CASE WHEN held.hour NOT IN (excluded.hour, excluded.hour + 1) THEN excluded.peers
                ELSE (held.peers || ARRAY(SELECT peer FROM unnest(excluded.peers) WITH ORDINALITY AS t (peer, n)
                                          WHERE peer <> ALL (held.peers) ORDER BY n))[1:$8] END
    RETURNING user_id, peers
), permitted AS (
    SELECT a.* FROM accepted a
    WHERE NOT a.begins OR a.recipient = ANY ((SELECT c.peers FROM counted c WHERE c.user_id = a.sender)::uuid[])
), touched AS (
    -- Locks the conversations, always in this order, and continues their seq.
    INSERT INTO conversations AS held (low_user, high_user, id, last_seq, last_at)
    SELECT low, high, gen_random_uuid(), count(*), clock_timestamp()
    FROM permitted
    GROUP BY low, high
    ORDER BY low, high
    ON CONFLICT (low_user, high_user) DO UPDATE
    SET last_seq = held.last_seq + excluded.last_seq,
        last_at = greatest(held.last_at, clock_timestamp()),
        last_xact = pg_current_xact_id()
    RETURNING id, low_user, high_user, last_seq, last_at
), sent AS (
    INSERT INTO messages (conversation_id, seq, id, sender_id, content, created_at)
    SELECT t.id,
           t.last_seq - count(*) OVER (PARTITION BY a.low, a.high)
                      + row_number() OVER (PARTITION BY a.low, a.high ORDER BY a.n),
           a.id, a.sender, a.content, t.last_at
    FROM permitted a
    JOIN touched t ON t.low_user = a.low AND t.high_user = a.high
    RETURNING conversation_id, seq, id, created_at
), keyed AS (
    INSERT INTO idempotency_keys (sender_id, key, conversation_id, seq, created_at)
    SELECT a.sender, a.key, s.conversation_id, s.seq, s.created_at
    FROM permitted a
    JOIN sent s ON s.id = a.id
    WHERE a.key IS NOT NULL
)
-- The sender is looked for only where a message was not stored, to find out why.
SELECT (s.id IS NOT NULL OR (EXISTS (SELECT FROM users u WHERE u.id = i.sender)
                             AND NOT EXISTS (SELECT FROM ended_sessions e WHERE e.session_id = i.session))) AS "sender_exists!",
       coalesce(s.id, p.id) AS "id?",
       coalesce(s.seq, p.seq) AS "seq?",
       coalesce(s.created_at, p.created_at) AS "created_at?",
       p.same AS "replay?",
       -- As the sender above: only where a message was not stored.
       (s.id IS NULL AND EXISTS (SELECT FROM blocks b WHERE b.blocker = i.recipient AND b.blocked = i.sender)) AS "blocked!",
       -- Seconds to the hour's end, where only the limit of new conversations refused it.
       CASE WHEN s.id IS NULL AND EXISTS (SELECT FROM accepted a WHERE a.n = i.n)
            THEN 3600 - floor(extract(epoch FROM clock_timestamp()))::bigint % 3600 END AS "retry_after?"
FROM input i
LEFT JOIN sent s ON s.id = i.id
LEFT JOIN replayed p ON p.n = i.n
ORDER BY i.n
