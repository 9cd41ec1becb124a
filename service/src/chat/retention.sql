WITH held AS MATERIALIZED (
    -- Without waiting: a statement that stores messages locks conversations in another order, and must not wait for it here.
    SELECT c.id, c.low_user, c.high_user, c.first_seq, f.next_seq
    FROM unnest($1::uuid[], $2::bigint[]) AS f (id, next_seq)
    JOIN conversations c ON c.id = f.id
    ORDER BY c.id
    FOR NO KEY UPDATE OF c SKIP LOCKED
), removed AS (
    DELETE FROM messages m USING held h
    WHERE m.conversation_id = h.id AND m.seq >= h.first_seq AND m.seq < h.next_seq
    RETURNING m.seq
), begins AS (
    UPDATE conversations c
    SET first_seq = h.next_seq,
        removed_xact = coalesce((SELECT m.xact FROM messages m
                                 WHERE m.conversation_id = h.id AND m.seq = h.next_seq - 1), c.removed_xact)
    FROM held h
    WHERE c.id = h.id AND c.first_seq < h.next_seq
)
-- The locks last until the commit, which need not wait for its flush: what a crash brings back is removed again.
SELECT h.id, h.low_user, h.high_user, h.next_seq AS "next_seq!", (SELECT count(*) FROM removed) AS "removed!"
FROM held h
CROSS JOIN (SELECT set_config('synchronous_commit', 'off', true)) AS commits
