-- Exports that run, one per user at most on all replicas together. An export extends its lease while it runs, so that one of a
-- process that was killed ends by itself.
CREATE TABLE exports (
    user_id    uuid        PRIMARY KEY REFERENCES users ON DELETE CASCADE,
    holder     uuid        NOT NULL,
    expires_at timestamptz NOT NULL
);
