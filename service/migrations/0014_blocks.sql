-- Whom a user does not want to hear from. The statement that stores messages looks here by both; the primary key serves it. The
-- other index is for the deletion of a user.
CREATE TABLE blocks (
    blocker    uuid        NOT NULL REFERENCES users ON DELETE CASCADE,
    blocked    uuid        NOT NULL REFERENCES users ON DELETE CASCADE,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (blocker, blocked)
);

CREATE INDEX blocks_blocked ON blocks (blocked);

-- Whether a user has ever blocked anybody, so that a message to one who has not costs no look-up.
ALTER TABLE users ADD COLUMN has_blocked boolean NOT NULL DEFAULT false;

-- With whom a user has begun a conversation in an hour, counted since 1970: one row per user. It counts against
-- NEW_CONVERSATIONS_PER_HOUR, and is swept when the hour is over. Without a foreign key: its check would fail a whole batch of messages
-- where a user is being deleted.
CREATE TABLE new_conversations (
    user_id uuid   PRIMARY KEY,
    hour    bigint NOT NULL,
    peers   uuid[] NOT NULL
);

-- For the sweep. Within an hour no update changes it.
CREATE INDEX new_conversations_hour ON new_conversations (hour);
