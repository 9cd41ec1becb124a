WITH held AS (
    -- Locks the row: while this runs no other replica can take over.
    UPDATE erasures SET held_until = clock_timestamp() + make_interval(secs => $3)
    WHERE user_id = $1 AND holder = $2
    RETURNING user_id
), next AS (
    SELECT c.conversation_id, c.after_seq
    FROM held
    JOIN erased_conversations c ON c.user_id = held.user_id
    WHERE c.xact IS NULL
    ORDER BY c.conversation_id LIMIT 1
), page AS MATERIALIZED (
    SELECT m.*
    FROM next
    CROSS JOIN LATERAL (
        SELECT conversation_id, seq, sender_id = $1 AND content <> '' AS is_to_erase FROM messages
        WHERE conversation_id = next.conversation_id AND seq > next.after_seq
        ORDER BY seq LIMIT $4
    ) m
), locked AS MATERIALIZED (
    SELECT m.conversation_id, m.seq
    FROM page p
    JOIN messages m ON m.conversation_id = p.conversation_id AND m.seq = p.seq
    WHERE p.is_to_erase
    ORDER BY m.conversation_id, m.seq
    FOR UPDATE OF m
), erased AS (
    UPDATE messages m SET content = ''
    FROM locked l
    WHERE m.conversation_id = l.conversation_id AND m.seq = l.seq
    RETURNING m.seq
), counted AS (
    SELECT (SELECT count(*) FROM page) AS read, (SELECT max(seq) FROM page) AS last_read,
           (SELECT count(*) FROM erased) AS erased, (SELECT max(seq) FROM erased) AS last_erased
)
UPDATE erased_conversations c
SET after_seq = coalesce(n.last_read, c.after_seq),
    seq = greatest(c.seq, n.last_erased),
    xact = CASE WHEN n.read < $4 THEN pg_current_xact_id() END,
    erased_at = clock_timestamp()
FROM next, counted n
WHERE c.conversation_id = next.conversation_id AND c.user_id = $1
RETURNING c.peer_id, c.seq AS last, c.xact IS NOT NULL AS "is_done!", n.read AS "read!", n.erased AS "erased!"
