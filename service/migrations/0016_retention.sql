-- Where a conversation's history begins: all messages below were removed. `removed_xact` is the transaction that stored the
-- newest of those: a stream's position that does not see it has lost messages. Neither rewrites the table.
ALTER TABLE conversations
    ADD COLUMN first_seq    bigint NOT NULL DEFAULT 1,
    ADD COLUMN removed_xact xid8;

-- Whose turn it is to remove old messages, and how far it has come: see service/src/chat/retention.rs.
CREATE TABLE message_retention (
    only_row     boolean     PRIMARY KEY DEFAULT true CHECK (only_row),
    holder       uuid,
    held_until   timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- Conversations below this id are done.
    reached      uuid        NOT NULL DEFAULT '00000000-0000-0000-0000-000000000000',
    -- When the next sweep may begin, and when the last one was through.
    next_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    completed_at timestamptz
);

INSERT INTO message_retention DEFAULT VALUES;

-- Old messages lie together, because rows are stored as they come: a vacuum frees whole pages for new ones. By default it
-- waits until a fifth of the table is dead. A vacuum reads all of the indexes, so it should be rare as well: with a
-- twentieth, 30 days of messages are vacuumed every 36 hours.
ALTER TABLE messages SET (autovacuum_vacuum_scale_factor = 0.05);
