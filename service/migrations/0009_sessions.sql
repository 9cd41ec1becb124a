-- A session lasts from a login until it is ended, or its refresh token was not used for a long time. Refresh tokens are kept as
-- hashes: see service/src/security/refresh.rs.
CREATE TABLE sessions (
    id             uuid        PRIMARY KEY,
    user_id        uuid        NOT NULL REFERENCES users ON DELETE CASCADE,
    family         uuid        NOT NULL CONSTRAINT sessions_family UNIQUE,
    current_hash   bytea       NOT NULL,
    previous_hash  bytea,
    salt           bytea,
    created_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    last_used_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    client_address text,
    user_agent     text
);

CREATE INDEX sessions_user_id ON sessions (user_id);

-- For the sweep of those that were not used.
CREATE INDEX sessions_last_used_at ON sessions (last_used_at);

-- Sessions that have ended while their access tokens may still be valid. Every statement that serves a token looks here, so the
-- table stays small. A token of a release without sessions has its user's id as session. `xact` tells a replica which rows are
-- new, in whatever order they were committed.
CREATE TABLE ended_sessions (
    session_id uuid        NOT NULL,
    xact       xid8        NOT NULL DEFAULT pg_current_xact_id(),
    ended_at   timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE INDEX ended_sessions_session_id ON ended_sessions (session_id);

CREATE INDEX ended_sessions_xact ON ended_sessions (xact);
