-- One row per pair of users. Every message updates last_seq and last_at, so no index may name them and half
-- of each page stays free: the updates stay on their page (HOT) and touch no index.
CREATE TABLE conversations (
    low_user  uuid        NOT NULL,
    high_user uuid        NOT NULL,
    id        uuid        NOT NULL,
    last_seq  bigint      NOT NULL,
    last_at   timestamptz NOT NULL,
    PRIMARY KEY (low_user, high_user),
    CHECK (low_user < high_user)
) WITH (fillfactor = 50);

-- "All conversations of a user" needs the other side of the primary key as well.
CREATE INDEX conversations_high_user ON conversations (high_user);

-- The primary key is the reading order: a page of history is one range of it. It leads with the
-- conversation, so the table can be partitioned or distributed by conversation_id as it stands. There are
-- no foreign keys: the only writer joins the rows that it refers to, in the same statement.
CREATE TABLE messages (
    conversation_id uuid        NOT NULL,
    seq             bigint      NOT NULL,
    id              uuid        NOT NULL,
    sender_id       uuid        NOT NULL,
    content         text        NOT NULL,
    created_at      timestamptz NOT NULL,
    PRIMARY KEY (conversation_id, seq)
);
