WITH low AS (
    -- IS NOT TRUE: of a plain comparison the planner expects to remove most rows, and then it sorts all of them
    -- instead of reading the first ones in the order of the index.
    SELECT min(active_hour) AS oldest_hour FROM (
        SELECT active_hour FROM conversations
        WHERE low_user = $1 AND active_hour <= hour_of($2)
          AND (first_seq > last_seq) IS NOT TRUE AND ((last_at, id) >= ($2, $3)) IS NOT TRUE
        ORDER BY active_hour DESC LIMIT $4
    ) AS newest
), high AS (
    SELECT min(active_hour) AS oldest_hour FROM (
        SELECT active_hour FROM conversations
        WHERE high_user = $1 AND active_hour <= hour_of($2)
          AND (first_seq > last_seq) IS NOT TRUE AND ((last_at, id) >= ($2, $3)) IS NOT TRUE
        ORDER BY active_hour DESC LIMIT $4
    ) AS newest
), own AS (
    -- No OR: a plan for any user would read all of the user's conversations, of which it expects few.
    SELECT id, high_user AS peer, last_seq, last_at FROM conversations
    WHERE low_user = $1 AND first_seq <= last_seq AND (last_at, id) < ($2, $3)
      AND active_hour BETWEEN (SELECT greatest(oldest_hour, 1) FROM low) AND hour_of($2)
    UNION ALL
    SELECT id, high_user AS peer, last_seq, last_at FROM conversations
    WHERE low_user = $1 AND first_seq <= last_seq AND (last_at, id) < ($2, $3)
      AND active_hour <= 0
    UNION ALL
    SELECT id, low_user AS peer, last_seq, last_at FROM conversations
    WHERE high_user = $1 AND first_seq <= last_seq AND (last_at, id) < ($2, $3)
      AND active_hour BETWEEN (SELECT greatest(oldest_hour, 1) FROM high) AND hour_of($2)
    UNION ALL
    SELECT id, low_user AS peer, last_seq, last_at FROM conversations
    WHERE high_user = $1 AND first_seq <= last_seq AND (last_at, id) < ($2, $3)
      AND active_hour <= 0
), page AS MATERIALIZED (
    SELECT * FROM own ORDER BY last_at DESC, id DESC LIMIT $4
)
SELECT current_setting('transaction_read_only')::boolean AS "read_only!",
       EXISTS (SELECT FROM users WHERE id = $1)
           AND NOT EXISTS (SELECT FROM ended_sessions WHERE session_id = $5) AS "user_exists!",
       position_epoch() AS "epoch!", pg_current_snapshot()::text AS "snapshot!",
       p.id AS "conversation?", p.peer AS "peer?", u.username AS "username?", p.last_at AS "last_at?",
       m.id AS "id?", m.seq AS "seq?", m.sender_id AS "sender?", m.content AS "content?",
       m.created_at AS "created_at?"
FROM (VALUES (1)) AS one
LEFT JOIN page p ON true
LEFT JOIN messages m ON m.conversation_id = p.id AND m.seq = p.last_seq
LEFT JOIN users u ON u.id = p.peer
ORDER BY p.last_at DESC, p.id DESC
