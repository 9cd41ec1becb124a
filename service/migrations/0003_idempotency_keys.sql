-- The message that a sender's Idempotency-Key stands for. Written by the statement that inserts the message.
CREATE TABLE idempotency_keys (
    sender_id       uuid        NOT NULL,
    key             text        NOT NULL COLLATE "C",
    conversation_id uuid        NOT NULL,
    seq             bigint      NOT NULL,
    created_at      timestamptz NOT NULL,
    CONSTRAINT idempotency_keys_in_use PRIMARY KEY (sender_id, key)
);

-- For the sweep of expired keys.
CREATE INDEX idempotency_keys_created_at ON idempotency_keys (created_at);
